"""Draw docs/rules.png, the README's picture, from results/equilibrium/finalists/runs.tar.gz.

python scripts/draw_rules.py
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.report import of_matrices  # noqa: E402  (found by the line above)

RULES = (  # label, a config of the study, colour
    (
        'AdamW, tuned',
        'train_mini_adamw_learning_rate=4.2e-2_min_lr=0.0042_weight_decay=0.2',
        '#0072B2',
    ),
    ('AdamCPR, embeddings too', 'train_mini_cpr_reg_embedding=True', '#D55E00'),
    ('AdamWN, tuned', 'train_mini_wn_wn_ratio=2_wn_rate=0.1', '#009E73'),
    (
        'AdamH, tuned',
        'train_mini_h_learning_rate=1.2e-1_min_lr=0.012_adamh_step_scale=0.5',
        '#CC79A7',
    ),
)
PANELS = (  # kind of the log's entries, key, title
    ('train', 'loss', 'training loss (nats per token)'),
    ('norms', 'ratio', 'norm of the matrices / norm at the start'),
)


def series(archive, config, kind, key):
    """Return (iterations, mean of `key` over the seeds)."""
    values = {}
    for name in archive.getnames():
        if name.startswith(f'runs/{config}/') and name.endswith('/log.jsonl'):
            for entry in map(json.loads, archive.extractfile(name)):
                if entry['kind'] == kind:
                    x = of_matrices(entry)[key] if kind == 'norms' else entry[key]
                    values.setdefault(entry['iter'], []).append(x)
    return list(values), [np.mean(v) for v in values.values()]


figure = Figure(figsize=(8.3, 3.6), layout='constrained')
axes = figure.subplots(1, 2)
with tarfile.open(ROOT / 'results/equilibrium/finalists/runs.tar.gz') as archive:
    for ax, (kind, key, title) in zip(axes, PANELS, strict=True):
        for label, config, colour in RULES:
            iters, values = series(archive, config, kind, key)
            ax.plot(iters, values, color=colour, linewidth=2, label=label)
            if kind == 'norms':
                place = 'top' if label == 'AdamWN, tuned' else 'bottom'  # else two numbers meet
                end = iters[-1], values[-1]
                ax.annotate(f' {values[-1]:.1f}', end, color=colour, va=place)
        ax.set_title(title, fontsize=11)
        ax.set_xlabel('iteration')
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.grid(color='#E4E4E4')
        ax.spines[['top', 'right']].set_visible(False)
axes[0].set_ylim(1.5, 2.5)
figure.legend(
    *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2, frameon=False
)
picture = io.BytesIO()
figure.savefig(picture, dpi=110)
path = ROOT / 'docs' / 'rules.png'
Image.open(picture).convert('RGB').quantize(64).save(path, optimize=True)  # a quarter of the bytes
print(path)
