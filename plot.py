"""Three pictures of one run or of several laid over each other, drawn from the log.jsonl of each and nothing else.

With --watch they are drawn again whenever a log has grown, until Ctrl-C.

loss.png    validation and training loss
ratio.png   the norm of the weights over its norm at the start (AdamWN paper, arXiv 2311.11446, Figure 3)
tensor.png  one tensor: squared norm and its bound kappa, growth, lambda, and the validation loss
            (CPR paper, arXiv 2311.09058, Figure 5)
"""

import argparse
import difflib
import os
import re
import sys
import time
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import (
    Figure,
)  # without pyplot there is no window to open and no display to look for
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

import runlog
from runtime import fail

# Okabe and Ito's colours, which readers with any colour vision tell apart; their yellow is too pale for a line
BLUE, VERMILLION, GREEN, PURPLE = '#0072B2', '#D55E00', '#009E73', '#CC79A7'
ORANGE, SKY, BLACK, GREY = '#E69F00', '#56B4E9', '#000000', '#777777'
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES = ('-', '-.', ':')  # from the eighth run on the colours come again, in another dash
KINDS = {  # how a parameter of the GPT ends -> the colour of its line
    'wte': SKY,
    'wpe': PURPLE,
    'attn.c_attn': BLUE,
    'attn.c_proj': GREEN,
    'mlp.c_fc': VERMILLION,
    'mlp.c_proj': ORANGE,
    'other': GREY,
}
OPTIMIZERS = {'adamw': 'AdamW', 'adamcpr': 'AdamCPR', 'adamwn': 'AdamWN'}
STYLE = {
    'figure.figsize': (8, 4.5),  # inches; a README shows it about 800 pixels wide
    'figure.constrained_layout.use': True,
    'savefig.dpi': 150,
    'font.size': 11,
    'text.parse_math': False,  # a folder may have a $ in its name
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
    name: str  # how legends call it
    style: dict  # colour and dash of its lines, the same in every picture
    config: dict  # its settings, {} where the log has none
    entries: (
        dict  # {kind: {iter: entry}}; of an iteration that stands twice in the log, the later line
    )

    def series(self, kind, key, tensor=None):
        """(iterations, values) of `key`, two arrays of the same length; nan where the log has null or nothing.

        With `tensor`, `key` is that tensor's own: norm, ratio, kappa or lagmul.
        """
        entries = self.entries.get(kind, {})
        iters = sorted(entries)
        holders = [
            entries[i] if tensor is None else entries[i].get('tensors', {}).get(tensor, {})
            for i in iters
        ]
        return np.array(iters, dtype=float), np.array(
            [_number(holder.get(key)) for holder in holders], dtype=float
        )

    def tensors(self):
        """{name: {norm, ratio, ...}} at the last iteration that has norms, {} where none has."""
        norms = self.entries.get('norms')
        return norms[max(norms)].get('tensors', {}) if norms else {}


def _number(value):
    """`value` as the float32 that training computed: null, and what overflows there, is nan."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 3.4e38 else np.nan


def load(out_dir, name, style):
    """The run in `out_dir`. Fails where there is no log."""
    config, entries = {}, {}
    for entry in runlog.read(out_dir):
        if entry.get('kind') == 'config':
            config = entry.get('config', {})
        elif 'iter' in entry:
            entries.setdefault(entry.get('kind'), {})[entry['iter']] = entry
    optimizer = config.get('optimizer', '')
    words = re.split('[^a-z0-9]+', name.lower())
    if optimizer and optimizer not in words and optimizer.removeprefix('adam') not in words:
        name = f'{name} ({OPTIMIZERS.get(optimizer, optimizer)})'
    return Run(name, style, config, entries)


def load_all(out_dirs):
    """The runs, called by the last part of their folder, by the whole of it where two end alike, and by number
    where what a legend has room for is alike."""
    names = [os.path.basename(os.path.abspath(out_dir)) for out_dir in out_dirs]
    if len(set(names)) < len(names):
        names = [os.path.normpath(out_dir) for out_dir in out_dirs]
    names = [
        name if len(name) <= 30 else f'{name[:12]}…{name[-17:]}' for name in names
    ]  # what a legend has room for
    if len(set(names)) < len(names):
        names = [f'{number}: {name}' for number, name in enumerate(names, 1)]
    runs = []
    for index, (out_dir, name) in enumerate(zip(out_dirs, names, strict=True)):
        dash, colour = divmod(index, len(COLOURS))
        runs.append(
            load(out_dir, name, {'color': COLOURS[colour], 'linestyle': DASHES[dash % len(DASHES)]})
        )
    return runs


def growth(iters, values):
    """How much `values` grew per iteration since the log point before: (iterations, growth), one point fewer."""
    return iters[1:], np.diff(values) / np.diff(iters)


def smooth(values):
    """Mean over the twentieth of all points that lies around each point; nan points do not count."""
    if len(values) == 0:
        return values
    window = np.ones(len(values) // 20 | 1)
    finite = np.isfinite(values)
    count = np.convolve(finite, window, 'same')
    total = np.convolve(np.where(finite, values, 0.0), window, 'same')
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def choose_tensor(runs, wanted=None):
    """The name of the tensor to look at: the one that `wanted` names, in full or by a part that no other name has.

    By default the one that the bound holds back most, with the largest lagmul at the end of a run. Where no lagmul is
    above zero, the one with the largest norm among those that have a bound, or else among those that are no embedding.
    None where no run has norms. Fails where `wanted` is no tensor's name or part of several.
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
            fail(
                f'--tensor={wanted} is part of {", ".join(matches[:4])}{more}; write more of the name'
            )
        return matches[0]
    bounded = [(name, values) for name, values in tensors if 'lagmul' in values]
    matrices = [(name, values) for name, values in tensors if kind_of(name) not in ('wte', 'wpe')]

    def rank(tensor):
        return [np.nan_to_num(_number(tensor[1].get(key))) for key in ('lagmul', 'norm')]

    return max(bounded or matrices or tensors, key=rank)[0]


def kind_of(tensor):
    """'mlp.c_fc' for 'transformer.h.3.mlp.c_fc.weight', and so on for the keys of KINDS."""
    return next((kind for kind in KINDS if tensor.removesuffix('.weight').endswith(kind)), 'other')


def draw(ax, iters, values, **style):
    """A line; a point where there is only one, which a line would not show."""
    if np.isfinite(values).sum() == 1:
        style['marker'] = 'o'
    ax.plot(iters, values, **style)


def iteration_axis(ax, label=True, nbins=8):
    ax.xaxis.set_major_locator(
        MaxNLocator(nbins, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1)
    )
    ax.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
    if label:
        ax.set_xlabel('iteration')


def frame_losses(ax, curves):
    """Give the height of the axes to what follows the first tenth of the `curves`, a list of (iterations, losses).

    The fall from the start comes in at the top, unless there are too few points to spare one. A loss over 12 has blown
    up (guessing costs ln(65536) = 11.1 with the largest vocabulary) and may leave at the top.
    """
    late = [
        losses[iters >= iters.max() / 10] if len(iters) > 4 else losses for iters, losses in curves
    ]
    shown = np.concatenate([losses[losses <= 12] for losses in late])
    if len(shown) and shown.min() < shown.max():
        margin = 0.05 * (shown.max() - shown.min())
        ax.set_ylim(shown.min() - margin, shown.max() + margin)


def loss_figure(runs):
    """Strong lines for the validation loss, thin ones for the training loss, whose noise shows in a single run only."""
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


def ratio_figure(runs):
    """The ratio of all tensors together; where there is room, for a single run, that of each tensor behind it."""
    figure = Figure()
    ax = figure.subplots()
    iteration_axis(ax)
    ax.set_ylabel('weight norm / weight norm at the start')
    if len(runs) == 1:
        (run,) = runs
        ax.set_title(run.name)
        for tensor in run.tensors():
            draw(
                ax,
                *run.series('norms', 'ratio', tensor),
                color=KINDS[kind_of(tensor)],
                linewidth=0.9,
                alpha=0.8,
            )
        iters, ratios = run.series('norms', 'ratio')
        draw(ax, iters, ratios, color=BLACK, linewidth=2.4, label=f'all tensors: {ratios[-1]:.3f}')
        handles, _ = ax.get_legend_handles_labels()
        kinds = {kind_of(tensor) for tensor in run.tensors()}
        handles += [
            Line2D([], [], color=KINDS[kind], label=kind) for kind in KINDS if kind in kinds
        ]
        figure.legend(handles=handles, loc='outside right upper', alignment='left')
    else:
        for run in runs:
            iters, ratios = run.series('norms', 'ratio')
            draw(ax, iters, ratios, **run.style, label=f'{ratios[-1]:.3f}   {run.name}')
        ax.legend(title='ratio at the end', alignment='left')
    return figure


def tensor_figure(runs, tensor):
    """Four panels about the tensor of that name; kappa bounds its squared norm where reg_function is l2."""
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
        handles.append(
            Line2D([], [], color=GREY, linestyle='--', linewidth=1.2, label='κ, its bound')
        )
    columns = min(
        4, 110 // (max(len(run.name) for run in runs) + 9)
    )  # 110 letters a row, 9 for a sample of the line
    figure.legend(handles=handles, loc='outside upper center', ncols=columns, title=tensor)
    return figure


def save(figure, path):
    """Write the picture as a whole or, where the disk refuses, leave what was at `path` and fail."""
    temporary = f'{path}.tmp'
    try:
        figure.savefig(temporary, format='png')
        os.replace(temporary, path)
    except OSError as e:
        if os.path.exists(temporary):
            os.unlink(temporary)
        fail(f'cannot write {path} ({e.strerror}); choose another folder with --out=FOLDER')
    print(path)


class Arguments(argparse.ArgumentParser):
    def error(self, message):
        fail(f'{message}; usage: {self.usage}')


@matplotlib.rc_context(STYLE)
def draw_all(args):
    """Write the pictures of the runs in args.out_dirs. Fails where one has neither a training nor a validation loss."""
    runs = load_all(args.out_dirs)
    for out_dir, run in zip(args.out_dirs, runs, strict=True):
        if not has_loss(run):
            fail(
                f'{os.path.join(out_dir, runlog.NAME)} has no loss yet; let the run reach its first evaluation'
            )
    with_norms = [run for run in runs if run.tensors()]
    tensor = choose_tensor(with_norms, args.tensor)
    figures = {'loss.png': loss_figure(runs)}
    if with_norms:
        figures['ratio.png'] = ratio_figure(with_norms)
        figures['tensor.png'] = tensor_figure(with_norms, tensor)

    out = args.out or (args.out_dirs[0] if len(runs) == 1 else 'plots')
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as e:
        fail(f'cannot make the folder {out} ({e.strerror}); choose another with --out=FOLDER')
    for name, figure in figures.items():
        save(figure, os.path.join(out, name))
    for run in runs:
        if not run.tensors():
            print(
                f'note: {run.name} has no norms in its log yet and is left out of ratio.png and tensor.png'
            )


def has_loss(run):
    return bool(run.entries.keys() & {'train', 'eval'})


def watch(args, seconds=2.0):
    """draw_all() whenever a log has changed, as soon as all runs have a loss; looks every so many seconds."""
    drawn = None
    while True:
        logs = [os.path.join(out_dir, runlog.NAME) for out_dir in args.out_dirs]
        state = [
            (os.path.getmtime(log), os.path.getsize(log)) if os.path.isfile(log) else None
            for log in logs
        ]
        if state != drawn and None not in state and all(map(has_loss, load_all(args.out_dirs))):
            draw_all(args)
            sys.stdout.flush()
            drawn = state
        time.sleep(seconds)


def main(argv):
    parser = Arguments(
        usage='python plot.py OUT_DIR... [--out=FOLDER] [--tensor=NAME] [--watch]',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        'out_dirs', nargs='+', metavar='OUT_DIR', help='out_dir of a run, where its log.jsonl is'
    )
    parser.add_argument(
        '--out',
        metavar='FOLDER',
        help="where to write; default: one run's OUT_DIR, plots for several",
    )
    parser.add_argument(
        '--tensor', metavar='NAME', help='tensor.png shows this one; a part of its name will do'
    )
    parser.add_argument(
        '--watch', action='store_true', help='draw again whenever a log has grown, until Ctrl-C'
    )
    args = parser.parse_args(argv)
    if not args.watch:
        draw_all(args)
        return
    for out_dir in args.out_dirs:
        if not os.path.isdir(out_dir):
            fail(f'there is no folder {out_dir} to watch; start the run first')
    try:
        watch(args)
    except KeyboardInterrupt:
        print()


if __name__ == '__main__':
    main(sys.argv[1:])
