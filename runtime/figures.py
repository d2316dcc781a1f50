"""Read the logs of runs and draw them: losses, norms, one tensor. plot.py and report.py use it."""

import difflib
import os
import re
import warnings
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure  # instead of pyplot, which looks for a display
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from runtime import log as runlog
from runtime.errors import fail
from runtime.files import replacing

# Okabe and Ito's colours, distinct under any colour vision. Their yellow is too pale for a line.
BLUE, VERMILLION, GREEN, PURPLE = '#0072B2', '#D55E00', '#009E73', '#CC79A7'
ORANGE, SKY, BLACK, GREY = '#E69F00', '#56B4E9', '#000000', '#777777'
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES = ('-', '-.', ':')  # the eighth run has the first colour and the second dash
KINDS = {  # end of a parameter's name -> colour of its line
    'wte': SKY,
    'wpe': PURPLE,
    'attn.c_attn': BLUE,
    'attn.c_proj': GREEN,
    'mlp.c_fc': VERMILLION,
    'mlp.c_proj': ORANGE,
    'other': GREY,
}
OPTIMIZERS = {'adamw': 'AdamW', 'adamcpr': 'AdamCPR', 'adamwn': 'AdamWN', 'adamh': 'AdamH'}
# a folder's name may have letters that the font lacks: they become boxes
warnings.filterwarnings('ignore', 'Glyph .* missing from font')
STYLE = {
    'figure.figsize': (8, 4.5),  # inches; a README is about 800 pixels wide
    'figure.constrained_layout.use': True,
    'savefig.dpi': 150,
    'font.size': 11,
    'text.parse_math': False,  # a folder's name may contain $
    'axes.titlesize': 11,
    'legend.fontsize': 10,
    'legend.title_fontsize': 11,
    'axes.grid': True,
    'axes.axisbelow': True,
    'axes.edgecolor': GREY,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.formatter.limits': (-3, 5),
    'axes.xmargin': 0.01,
    'grid.color': '#E4E4E4',
    'grid.linewidth': 0.7,
    'lines.linewidth': 2.0,
    'lines.solid_capstyle': 'round',
    'legend.frameon': True,
    'legend.framealpha': 0.9,
    'legend.edgecolor': 'none',
}


@dataclass
class Run:
    name: str  # its name in legends
    style: dict  # colour and dash of its lines, the same in every picture
    config: dict  # its settings, {} if the log has none
    entries: dict  # {kind: {iter: entry}}; if the log has an iteration twice, the later line
    bounded: list = field(default_factory=list)  # iterations at which a tensor's bound was set

    def series(self, kind, key, tensor=None):
        """Return (iterations, values) of `key`, two arrays of the same length.

        With `tensor`, `key` is one of that tensor's values, as in the log.
        A value is nan if the log has null or no value.
        """
        iters = sorted(self.entries.get(kind, {}))
        holders = [self.entries[kind][i] for i in iters]
        if tensor is not None:
            holders = [holder.get('tensors', {}).get(tensor, {}) for holder in holders]
        values = [number(holder.get(key)) for holder in holders]
        return np.array(iters, dtype=float), np.array(values, dtype=float)

    def tensors(self):
        """Return {name: {norm, ratio, ...}} at the last iteration with norms, {} without any."""
        norms = self.entries.get('norms')
        return norms[max(norms)].get('tensors', {}) if norms else {}

    def has(self, key):
        """Return whether some 'norms' entry has a number for `key`."""
        return bool(np.isfinite(self.series('norms', key)[1]).any())


def number(value):
    """Return `value` as a float, nan if it is null or too large for float32."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 3.4e38 else np.nan


def printable(name):
    """Return `name` with U+FFFD for what no font can measure, and at most 60 letters."""
    if len(name) > 60:
        name = f'{name[:30]}…{name[-29:]}'
    return ''.join(c if c.isprintable() else '\ufffd' for c in name)


def run_of(entries, name, style):
    """Return the Run of a log's entries, as runlog.read_sound() returns them."""
    config, by_kind = {}, {}
    for entry in entries:
        if entry['kind'] == 'config':
            config = entry['config']
        elif entry['kind'] in ('train', 'eval', 'norms'):
            by_kind.setdefault(entry['kind'], {})[entry['iter']] = entry
    optimizer = config.get('optimizer', '')
    words = re.split('[^a-z0-9]+', name.lower())
    if optimizer and optimizer not in words and optimizer.removeprefix('adam') not in words:
        name = f'{name} ({OPTIMIZERS.get(optimizer, optimizer)})'
    run = Run(printable(name), style, config, by_kind)
    for tensor in run.tensors():
        iters, kappa = run.series('norms', 'kappa', tensor)
        bounded = np.isfinite(kappa)
        if not bounded[:1].all():  # else it had its bound from the start
            run.bounded += [*iters[bounded][:1]]
    return run


def load_all(out_dirs):
    """Return the runs in the folders, with distinct names for the legends. Fails without a log.

    A name is the last part of the folder, or its full path if two runs share the last part.
    Names longer than a legend has room for are shortened, and numbered if two become equal.
    """
    names = [os.path.basename(os.path.abspath(out_dir)) for out_dir in out_dirs]
    if len(set(names)) < len(names):
        names = [os.path.normpath(out_dir) for out_dir in out_dirs]
    names = [name if len(name) <= 30 else f'{name[:12]}…{name[-17:]}' for name in names]
    if len(set(names)) < len(names):
        names = [f'{number}: {name}' for number, name in enumerate(names, 1)]
    runs = []
    for index, (out_dir, name) in enumerate(zip(out_dirs, names, strict=True)):
        dash, colour = divmod(index, len(COLOURS))
        style = {'color': COLOURS[colour], 'linestyle': DASHES[dash % len(DASHES)]}
        runs.append(run_of(runlog.read_sound(out_dir), name, style))
    return runs


def growth(iters, values):
    """Return (iterations, growth per iteration since the previous point), one point fewer."""
    return iters[1:], np.diff(values) / np.diff(iters)


def smooth(values):
    """Return the running mean over a twentieth of all points, without the nan points."""
    if len(values) == 0:
        return values
    window = np.ones(len(values) // 20 | 1)
    finite = np.isfinite(values)
    count = np.convolve(finite, window, 'same')
    total = np.convolve(np.where(finite, values, 0.0), window, 'same')
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def choose_tensor(runs, wanted=None):
    """Return the name of the tensor to draw, None if no run has norms.

    wanted: a tensor's name, or a part of it that no other name has. By default the tensor with the
    largest lagmul at the end of a run, which its bound holds back most. If no lagmul is positive,
    the tensor with the largest norm among the bounded ones, or else among all but the embeddings.
    Fails if `wanted` matches no name or several.
    """
    tensors = [(name, values) for run in runs for name, values in run.tensors().items()]
    names = list(dict.fromkeys(name for name, _ in tensors))
    if not names:
        return None
    if wanted:
        matches = [wanted] if wanted in names else [name for name in names if wanted in name]
        if not matches:
            near = difflib.get_close_matches(wanted, names, cutoff=0.0)
            fail(f"no tensor is called '{wanted}'; the nearest are {', '.join(near)}")
        if len(matches) > 1:
            more = f' and {len(matches) - 4} more' if len(matches) > 4 else ''
            several = ', '.join(matches[:4]) + more
            fail(f'--tensor={wanted} is part of {several}; write more of the name')
        return matches[0]
    bounded = [(name, values) for name, values in tensors if 'lagmul' in values]
    matrices = [(name, values) for name, values in tensors if kind_of(name) not in ('wte', 'wpe')]

    def rank(tensor):
        return [np.nan_to_num(number(tensor[1].get(key))) for key in ('lagmul', 'norm')]

    return max(bounded or matrices or tensors, key=rank)[0]


def kind_of(tensor):
    """Return the key of KINDS: 'mlp.c_fc' for 'transformer.h.3.mlp.c_fc.weight'."""
    return next((kind for kind in KINDS if tensor.removesuffix('.weight').endswith(kind)), 'other')


def draw(ax, iters, values, **style):
    """Draw a line, or a point if only one value is finite."""
    if np.isfinite(values).sum() == 1:
        style['marker'] = 'o'
    ax.plot(iters, values, **style)


def iteration_axis(ax, label=True, nbins=8):
    locator = MaxNLocator(nbins, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
    if label:
        ax.set_xlabel('iteration')


def frame_losses(ax, curves):
    """Fit the height of the axes to the curves after their first tenth.

    curves: a list of (iterations, losses). A curve of up to four points counts in full.
    Losses above 12 do not count: guessing costs ln(65536) = 11.1 with the largest 16-bit
    vocabulary, so they have blown up.
    """
    late = []
    for iters, losses in curves:
        late.append(losses[iters >= iters.max() / 10] if len(iters) > 4 else losses)
    shown = np.concatenate([losses[losses <= 12] for losses in late])
    if len(shown) and shown.min() < shown.max():
        margin = 0.05 * (shown.max() - shown.min())
        ax.set_ylim(shown.min() - margin, shown.max() + margin)


def loss_figure(runs):
    """Draw the validation loss in strong lines and the training loss, smoothed, in thin ones.

    A single run shows the unsmoothed training loss as well.
    """
    figure = Figure()
    ax = figure.subplots()
    curves = []
    for run in runs:
        iters, losses = run.series('train', 'loss')
        if len(runs) == 1:
            draw(ax, iters, losses, **run.style, linewidth=0.6, alpha=0.25)
        draw(ax, iters, smooth(losses), **run.style, linewidth=1.0, alpha=0.7)
        curves.append((iters, smooth(losses)))
        iters, losses = run.series('eval', 'val_loss')
        final = f'{losses[-1]:#.4g}   ' if len(losses) else ''
        draw(ax, iters, losses, **run.style, label=final + run.name)
        curves.append((iters, losses))
    frame_losses(ax, curves)
    iteration_axis(ax)
    ax.set_ylabel('loss (nats per token)')
    handles, _ = ax.get_legend_handles_labels()
    handles.append(Line2D([], [], color=GREY, linewidth=1.0, label='training loss, smoothed'))
    ax.legend(handles=handles, loc='best', title='validation loss at the end', alignment='left')
    return figure


RATIO = {'ratio': 'norm / norm at the start'}
STEP = {'step': 'step / weight norm', 'angle': 'its turn (degrees)'}


def norms_figure(runs, panels):
    """Draw a panel for each {key of 'norms': its label}, as in RATIO and STEP.

    It shows the tensors together and, for a single run, each tensor. Ticks on the line of the ratio
    show where AdamCPR set the bounds.
    """
    height = 4.5 if len(panels) == 1 else 5.2
    figure = Figure(figsize=(8, height + 0.25 * max(0, len(runs) - 3)))  # a line in the legend each
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    ticks = {'linestyle': '', 'marker': '|', 'markersize': 12, 'zorder': 3}
    handles, single = [], len(runs) == 1
    for run in runs:
        style = {'color': BLACK, 'linewidth': 2.4} if single else run.style
        ends = []
        for ax, key in zip(axes, panels, strict=True):
            for tensor in run.tensors() if single else ():
                thin = {'color': KINDS[kind_of(tensor)], 'linewidth': 0.9, 'alpha': 0.8}
                draw(ax, *run.series('norms', key, tensor), **thin)
            iters, values = run.series('norms', key)
            draw(ax, iters, values, **style)
            ends.append(f'{values[np.isfinite(values)][-1]:.3g}')  # no step follows the last record
            if key == 'ratio' and run.bounded:
                heights = np.interp(run.bounded, iters, values)
                ax.plot(run.bounded, heights, **ticks, color=style['color'])
        name = 'all tensors' if single else run.name
        handles.append(Line2D([], [], **style, label=f'{", ".join(ends)}   {name}'))
    if 'ratio' in panels and any(run.bounded for run in runs):
        handles.append(Line2D([], [], **ticks, color=GREY, label="a tensor's bound is set"))
    if single:
        present = {kind_of(tensor) for tensor in runs[0].tensors()}
        kinds = [kind for kind in KINDS if kind in present]
        handles += [Line2D([], [], color=KINDS[kind], label=kind) for kind in kinds]
        axes[0].set_title(runs[0].name)
    for ax, label in zip(axes, panels.values(), strict=True):
        iteration_axis(ax, label=ax is axes[-1])
        ax.set_ylabel(label)
    place = 'outside right upper' if single else 'outside lower center'
    title = f'{", ".join(panels)} at the end'
    figure.legend(handles=handles, loc=place, title=title, alignment='left')
    return figure


def tensor_figure(runs, tensor):
    """Draw four panels about one tensor. kappa bounds its squared norm if reg_function is l2."""
    figure = Figure(figsize=(8, 5))
    (norm_ax, growth_ax), (lambda_ax, loss_ax) = axes = figure.subplots(2, 2, sharex=True)
    bounded, curves = False, []
    for run in runs:
        iters, norms = run.series('norms', 'norm', tensor)
        draw(norm_ax, iters, norms**2, **run.style, label=run.name)
        draw(growth_ax, *growth(iters, norms**2), **run.style)
        draw(lambda_ax, *run.series('norms', 'lagmul', tensor), **run.style)
        iters, kappa = run.series('norms', 'kappa', tensor)
        if run.config.get('reg_function', 'l2') == 'l2' and np.isfinite(kappa).any():
            draw(norm_ax, iters, kappa, color=run.style['color'], linestyle='--', linewidth=1.2)
            bounded = True
        iters, losses = run.series('eval', 'val_loss')
        draw(loss_ax, iters, losses, **run.style)
        curves.append((iters, losses))
    frame_losses(loss_ax, curves)
    norm_ax.set_ylabel('squared norm')
    growth_ax.set_ylabel('growth per iteration')
    lambda_ax.set_ylabel('multiplier λ')
    loss_ax.set_ylabel('validation loss')
    for ax in axes.flat:
        iteration_axis(ax, label=ax in axes[1], nbins=5)
        if not any(np.isfinite(line.get_ydata()).any() for line in ax.lines):
            ax.set_yticks([])
            ax.text(0.5, 0.5, 'nothing in the log', color=GREY, ha='center', transform=ax.transAxes)
    figure.align_ylabels()
    handles, _ = norm_ax.get_legend_handles_labels()
    if bounded:
        dashed = {'color': GREY, 'linestyle': '--', 'linewidth': 1.2}
        handles.append(Line2D([], [], **dashed, label='κ, its bound'))
    longest = max(len(run.name) for run in runs)
    columns = max(1, min(4, 110 // (longest + 9)))  # 110 letters a row; a line's sample takes 9
    figure.legend(
        handles=handles, loc='outside upper center', ncols=columns, title=printable(tensor)
    )
    return figure


def save(figure, path):
    """Write the picture to `path`. If the disk refuses, leave `path` as it is and fail."""
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format='png')
    except OSError as e:
        fail(f'cannot write {path} ({e.strerror}); choose another folder with --out=FOLDER')
    print(path)


def has_loss(run):
    return bool(run.entries.keys() & {'train', 'eval'})
