"""Summarize the runs of compare.py: results.jsonl, the tables of report.md, the pictures."""

import itertools
import math
import os
import re
import shlex
import statistics
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from runtime import figures

HALVES = ('val_loss_choose', 'val_loss_report')  # the first half of val.bin, and the second
# Student's t at p = 5 %, two-sided, for 2 to 30 pairs. For more pairs the last is a little strict.
T_5_PERCENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_5_PERCENT += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
T_5_PERCENT += (2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)


@dataclass(eq=False)  # configs compare by identity
class Config:
    words: list  # what follows `python train.py`
    name: str  # its name in the report
    runs: list = field(default_factory=list)  # one Run a seed, in the order of --seeds

    @property
    def file(self):
        return self.name.split(' ')[0]

    @property
    def folder(self):
        return re.sub(r'[^\w.=+-]+', '_', self.name)

    def values(self, key):
        return [run.result[key] for run in self.runs]

    def mean(self, key):
        return statistics.fmean(self.values(key))

    def mean_and_deviation(self, key):
        return plus_minus(self.mean(key), deviation(self.values(key)))


@dataclass
class Run:
    seed: int
    out_dir: str
    arguments: list  # of train.py
    needs: set = field(default_factory=set)  # out_dirs of the runs that must be finished before
    settings: dict = None  # train.py's, from its defaults and the arguments
    entries: list = None  # of its log
    result: dict = None  # its line in results.jsonl

    @property
    def command(self):
        return shlex.join(['python', 'train.py', *self.arguments])


def result_of(run, config):
    """Return the entry of results.jsonl for a finished run, from its log."""
    settings = next(e['config'] for e in reversed(run.entries) if e['kind'] == 'config')
    evals = {e['iter']: e for e in run.entries if e['kind'] == 'eval'}
    ratios = {e['iter']: e['ratio'] for e in run.entries if e['kind'] == 'norms'}
    speed = {}
    for key in ('ms', 'tokens_per_s', 'mfu'):
        known = [e[key] for e in run.entries if e['kind'] == 'train' and e.get(key) is not None]
        speed[key] = statistics.median(known) if known else None
    val_losses = {i: finite_or_inf(evals[i]['val_loss']) for i in sorted(evals)}
    last = max(evals)
    return {
        'out_dir': run.out_dir,
        'config': config.name,
        'seed': run.seed,
        'optimizer': settings['optimizer'],
        'iters': last,
        'final_val_loss': val_losses[last],
        'best_val_loss': min(val_losses.values()),
        'final_train_loss': evals[last].get('train_loss'),
        'ratio': ratios[max(ratios)] if ratios else None,
        **speed,
        'val_losses': val_losses,
        'command': run.command,
    }


def finite_or_inf(loss):
    """Return infinity for nan and for None, which a log has in place of both."""
    return math.inf if loss is None or math.isnan(loss) else loss


# ---- the report


def deviation(values):
    """Return the standard deviation, nan for one value or if a value is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values)


def difference(config, other, key='final_val_loss'):
    """Compare a loss of `config` with that of `other`, paired by seed.

    Returns (mean, standard error, half the width of the 95 % confidence interval) of the
    differences, `config` minus `other`. The last two are nan with one seed.
    """
    pairs = zip(config.values(key), other.values(key), strict=True)
    differences = [ours - theirs for ours, theirs in pairs]
    n = len(differences)
    mean = sum(differences) / n  # nan if both runs of a pair blew up
    error = deviation(differences) / math.sqrt(n)
    return mean, error, error * T_5_PERCENT[min(n, 30) - 2]


def plus_minus(mean, spread, sign=''):
    return f'{mean:{sign}.4f}' + (f' ± {spread:.4f}' if math.isfinite(spread) else '')


def interval(config, other):
    """Return the difference on the second half of val.bin and its 95 % interval, as text."""
    mean, _, half = difference(config, other, 'val_loss_report')
    bounds = f' [{mean - half:+.4f}, {mean + half:+.4f}]' if math.isfinite(half) else ''
    return f'{mean:+.4f}{bounds}'


def steps_to(run, loss):
    """Return the iteration of the first evaluation with at most `loss`, or None."""
    if not math.isfinite(loss):  # of a run that blew up
        return None
    return next((i for i, val_loss in run.result['val_losses'].items() if val_loss <= loss), None)


def mean_of_known(config, key, form):
    """Return the mean of the runs that have a value for `key`, '' if none has."""
    known = [value for value in config.values(key) if value is not None]
    return format(statistics.fmean(known), form) if known else ''


def table(configs):
    """Return the rows of the report's table, each a list of cells."""
    first, rows = configs[0], []
    for number, config in enumerate(configs, 1):
        mean, error, half = difference(config, first)
        minus_first = plus_minus(mean, error, sign='+') + ' *' * (abs(mean) > half)
        pairs = zip(config.runs, first.runs, strict=True)
        reached = [steps_to(run, start.result['final_val_loss']) for run, start in pairs]
        reached = [i for i in reached if i is not None]
        steps = f'{statistics.fmean(reached):.0f}' if reached else 'never'
        if 0 < len(reached) < len(first.runs):
            steps += f' ({len(reached)} of {len(first.runs)} seeds)'
        mfu = mean_of_known(config, 'mfu', '.1%')
        rows.append(
            [
                str(number),
                f'`{config.name}`',
                config.mean_and_deviation('final_val_loss'),
                config.mean_and_deviation('best_val_loss'),
                '' if config is first else minus_first,
                steps,
                mean_of_known(config, 'ratio', '.2f'),
                mean_of_known(config, 'ms', '.1f'),
                mean_of_known(config, 'tokens_per_s', ',.0f') + (f' ({mfu} MFU)' if mfu else ''),
            ]
        )
    return rows


COLUMNS = (
    '',
    'config',
    'final val loss',
    'best val loss',
    'final, minus the first',
    "steps to the first's final loss",
    'norm ratio',
    'ms a step',
    'tokens/s',
)


def markdown(columns, rows):
    """Return the lines of a table."""
    lines = ['| ' + ' | '.join(cells) + ' |' for cells in [columns, *rows]]
    return [lines[0], '|---' * len(columns) + '|', *lines[1:], '']


def halves_section(configs):
    """Return the report's lines about the choice on one half and the losses on the other."""
    first = configs[0]
    ranked = sorted(configs, key=lambda config: config.mean('val_loss_choose'))
    rows, chosen = [], {}  # chosen: {config file: its best config on the first half}
    for config in ranked:
        chosen.setdefault(config.file, config)
        losses = [config.mean_and_deviation(key) for key in HALVES]
        minus_first = '' if config is first else interval(config, first)
        rows.append([str(configs.index(config) + 1), f'`{config.name}`', *losses, minus_first])
    lines = [
        '## Chosen on one half, reported on the other',
        '',
        'The final checkpoint of each run over the first half of val.bin, which ranks the configs, '
        'and over the second. This removes luck with the text, not with the seeds: confirm a '
        'choice with new seeds. Mean ± standard deviation. Differences '
        "on the second half are paired by seed: mean [95 % confidence interval by Student's t], "
        f'each by itself, over {len(first.runs)} seeds.',
        '',
        *markdown(
            ('', 'config', 'first half', 'second half', 'second, minus the first config'), rows
        ),
    ]
    pairs = itertools.combinations(chosen.values(), 2)
    compared = [[f'`{a.name}`', f'`{b.name}`', interval(a, b)] for a, b in pairs]
    if compared:
        lines += [
            'Of each config file the config that the first half chooses, compared in pairs:',
            '',
        ]
        lines += markdown(('one', 'other', 'second half, one minus the other'), compared)
    return lines


def text(configs, out, arguments, pictures, made, halves=False):
    """Return the text of report.md.

    arguments: of the command line. pictures: {file name: caption}. made: what read_made() returns.
    """
    seeds = ', '.join(str(run.seed) for run in configs[0].runs)
    tried = {}
    for config in configs:
        tried.setdefault(config.runs[0].result['optimizer'], []).append(config)
    counts, lowest = [], []
    for optimizer, group in tried.items():
        name = figures.OPTIMIZERS.get(optimizer, optimizer)
        counts.append(f'{name} {len(group)}')
        lowest.append(f'{name} {min(c.mean("final_val_loss") for c in group):.4f}')
    runs = [run for config in configs for run in config.runs]
    machines = dict.fromkeys(made.get(run.out_dir, 'not recorded') for run in runs)
    lines = [
        f'# {os.path.basename(os.path.normpath(out))}: {len(configs)} configs, seeds {seeds}',
        '',
        *markdown(COLUMNS, table(configs)),
        explanation(len(configs[0].runs), len(configs)),
        '',
        f'Configurations tried: {", ".join(counts)}. Lowest final loss of each: '
        f'{"; ".join(lowest)}. The lowest of many is partly luck.',
        '',
        *(halves_section(configs) if halves else []),
        *(f'![{caption}]({name})\n' for name, caption in pictures.items()),
        '## Repeat it',
        '',
        '```',
        ' \\\n  '.join(['python compare.py', *map(shlex.quote, arguments)]),
        '```',
        '',
        f'Runs that are in {os.path.join(out, "runs")} already are kept. '
        'runs/results.jsonl has the command of each.',
        '',
        '## Made on',
        '',
        *(f'- {machine}' for machine in machines),
    ]
    return '\n'.join(lines) + '\n'


def explanation(seeds, rows):
    return (
        f'Losses in nats a token over the whole of val.bin, mean ± standard deviation over {seeds} '
        'seeds; the best is the lowest of the evaluations along the run. The difference to the '
        f'first config is paired by seed: mean ± standard error of {seeds} differences. * marks '
        'p < 5 % in a two-sided paired t test, each row taken by itself: if none of the '
        f'{rows - 1} rows truly differed, {0.05 * (rows - 1):.2f} would be expected to have one. '
        'Steps: the first evaluation that is at or below what the first config ended with at that '
        'seed. Norm ratio: all weight tensors together, embeddings included, end over start. ms a '
        'step, tokens/s: median over the run, mean over seeds; whatever else ran on the machine is '
        'in it. {N} in a name is the out_dir of row N.'
    )


# ---- the pictures


def labels(configs):
    """Return short names for the pictures: the configs' names without what all of them share."""
    names = [config.name.split(' ') for config in configs]
    shared = set.intersection(*(set(settings) for _, *settings in names))
    prefix = os.path.commonprefix([stem for stem, *_ in names]).rpartition('_')[0]
    short = []
    for stem, *settings in names:
        distinct = [word for word in settings if word not in shared]
        short.append(' '.join([stem.removeprefix(prefix).lstrip('_'), *distinct]))
    return short


@np.errstate(all='ignore')
def of_matrices(entry):
    """Return a 'norms' entry of the matrices in the blocks alone; ratio and step nan if unknown.

    Every rule acts on these; on embeddings AdamH never does, and AdamCPR only with reg_embedding.
    """
    others = 'wte', 'wpe', 'other'
    tensors = {n: x for n, x in entry['tensors'].items() if figures.kind_of(n) not in others}
    keys = 'norm', 'ratio', 'step'
    norm, ratio, step = np.array(
        [[figures.number(x.get(k)) for x in tensors.values()] for k in keys]
    )
    now, start = np.linalg.norm(norm), np.linalg.norm(norm / ratio)
    joint = {'ratio': float(now / start), 'step': float(np.linalg.norm(norm * step) / now)}
    return {**entry, **joint, 'tensors': tensors}


def mean_run(config, label, style):
    """Return the mean over a config's seeds as a figures.Run, with the norms of the matrices."""
    runs = []
    for run in config.runs:
        logged = [of_matrices(e) if e['kind'] == 'norms' else e for e in run.entries]
        runs.append(figures.run_of(logged, config.name, style))
    entries = {}
    averaged = {'train': ['loss'], 'eval': ['val_loss', 'train_loss'], 'norms': ['ratio', 'step']}
    for kind, keys in averaged.items():
        common = set.intersection(*(set(run.entries.get(kind, {})) for run in runs))
        for i in sorted(common):
            values = {key: [run.entries[kind][i].get(key) for run in runs] for key in keys}
            means = {key: None if None in v else statistics.fmean(v) for key, v in values.items()}
            entries.setdefault(kind, {})[i] = means
    bounded = [i for run in runs for i in run.bounded]
    return figures.Run(label, style, runs[0].config, entries, bounded)


def final_figure(configs):
    """Plot one row a config: the final validation loss of each seed and their mean.

    A line marks the first config's mean.
    """
    names = labels(configs)
    figure = Figure(figsize=(4 + 0.07 * max(map(len, names)), 1 + 0.22 * len(configs)))  # inches
    ax = figure.subplots()
    optimizers = list(dict.fromkeys(config.runs[0].result['optimizer'] for config in configs))
    for row, config in enumerate(configs):
        colour = figures.COLOURS[optimizers.index(config.runs[0].result['optimizer'])]
        losses = config.values('final_val_loss')
        dot = {'marker': 'o', 'markersize': 4, 'alpha': 0.5, 'markeredgewidth': 0}
        bar = {'marker': '|', 'markersize': 12, 'markeredgewidth': 2}
        ax.plot(losses, [row] * len(losses), linestyle='', color=colour, **dot)
        ax.plot(statistics.fmean(losses), row, linestyle='', color=colour, **bar)
    dashed = {'color': figures.GREY, 'linewidth': 1, 'linestyle': '--', 'zorder': 0}
    ax.axvline(configs[0].mean('final_val_loss'), **dashed)
    ax.set_yticks(range(len(configs)), names, fontsize=8)
    ax.set_ylim(len(configs) - 0.4, -0.6)
    ax.grid(axis='y', visible=False)
    ax.margins(x=0.03)
    ax.locator_params(axis='x', nbins=5)
    ax.set_xlabel('final validation loss (nats per token)', fontsize=9)
    return figure


TUNED = {  # the setting to tune besides the learning rate
    'adamw': 'weight_decay',
    'adamcpr': 'kappa_init_param',
    'adamwn': 'wn_ratio',
    'adamh': 'adamh_step_scale',
}


def tuned_value(settings):
    """Return the value of the setting in TUNED, or the name of a variant that has no use for it."""
    if settings['optimizer'] == 'adamwn' and settings['wn_from']:
        return 'norms of another run'
    method = settings['kappa_init_method']
    if settings['optimizer'] == 'adamcpr' and method != 'warm_start':
        bounds = f'{method} {settings["kappa_init_param"]:g}'
        name = 'Kappa-IP' if method == 'inflection_point' else bounds
        return f'{name} with embeddings' if settings['reg_embedding'] else name
    return settings[TUNED[settings['optimizer']]]


def tuning_figure(configs):
    """Plot the final loss over each rule's own setting: a panel a rule, a line a learning rate.

    It is the lowest loss of the configs that agree in both. Horizontal lines are variants without
    that setting. The axis ends below losses that are far above most. Returns None if no rule has
    several values of its setting.
    """
    panels = {}  # {rule: {value or variant: {learning rate: loss}}}
    for config in configs:
        s, loss = config.runs[0].settings, config.mean('final_val_loss')
        losses = panels.setdefault(s['optimizer'], {}).setdefault(tuned_value(s), {})
        losses[s['learning_rate']] = min(loss, losses.get(s['learning_rate'], math.inf))
    values = {rule: sorted(x for x in panels[rule] if not isinstance(x, str)) for rule in panels}
    if all(len(tried) < 2 for tried in values.values()):
        return None
    rules = [rule for rule in panels if len(panels[rule]) > 1]
    rates = sorted({rate for rule in rules for losses in panels[rule].values() for rate in losses})
    figure = Figure(figsize=(2 + 2.2 * len(rules), 3.6))
    axes = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    for ax, rule in zip(axes, rules, strict=True):
        for rate, colour in zip(rates, itertools.cycle(figures.COLOURS), strict=False):
            tried = [i for i, value in enumerate(values[rule]) if rate in panels[rule][value]]
            line = [panels[rule][values[rule][i]][rate] for i in tried]
            ax.plot(tried, line, color=colour, marker='o', label=f'{rate:g}')
        variants = [x for x in panels[rule] if isinstance(x, str)]
        handles = []
        for variant, dash in zip(
            variants, itertools.cycle(('--', ':', '-.', (0, (6, 1)))), strict=False
        ):
            for rate, loss in panels[rule][variant].items():
                colour = ax.lines[rates.index(rate)].get_color()
                ax.axhline(loss, color=colour, linestyle=dash, linewidth=1.4)
            handles.append(Line2D([], [], color=figures.GREY, linestyle=dash, label=variant))
        if handles:
            ax.legend(handles=handles, fontsize=8, framealpha=0.5)
        ticks, turned = [f'{value:g}' for value in values[rule]], 45 * (len(values[rule]) > 5)
        ax.set_xticks(range(len(ticks)), ticks, rotation=turned)
        ax.set_xlabel(TUNED[rule] if values[rule] else '')
        ax.set_title(figures.OPTIMIZERS[rule])
        ax.margins(x=0.1)
    axes[0].set_ylabel('final validation loss')
    losses = [loss for rule in rules for line in panels[rule].values() for loss in line.values()]
    losses = [loss for loss in losses if math.isfinite(loss)]
    lowest, high = np.quantile(losses, [0, 0.75]) if losses else (0, 0)
    if high > lowest:  # show the valleys, not how high a rate that is too high can lead
        axes[0].set_ylim(top=min(axes[0].get_ylim()[1], lowest + 2 * (high - lowest)))
    handles = axes[0].lines[: len(rates)]
    figure.legend(handles=handles, title='learning rate', loc='outside right upper')
    return figure


# small files for the repository, as wide as their legends of long names
@matplotlib.rc_context({**figures.STYLE, 'savefig.dpi': 100, 'savefig.bbox': 'tight'})
def draw(configs, out):
    """Write the pictures to `out` and return {file name: caption}."""
    shown, caption = configs, 'mean over the seeds'
    if len(configs) > len(figures.COLOURS):  # too many lines for the colours
        best = {}
        for config in sorted(configs, key=lambda config: config.mean('final_val_loss')):
            best.setdefault(config.file, config)
        best = [config for config in configs if config in best.values()]
        shown = list(dict.fromkeys([configs[0], *best]))[: len(figures.COLOURS)]
        best_of_each = 'of each config file the settings with the lowest final loss'
        caption += f': the first config, and {best_of_each}'
    runs = []
    for config, label, colour in zip(shown, labels(shown), figures.COLOURS, strict=False):
        runs.append(mean_run(config, label, {'color': colour, 'linestyle': '-'}))
    explained = 'a dot a run, a bar their mean, dashed that of the first config'
    drawn = {'final.png': final_figure(configs)}
    captions = {'final.png': f'final validation loss: {explained}'}
    if any(len(run.entries['eval']) > 2 for run in runs):  # else the curves are straight lines
        drawn['loss.png'] = figures.loss_figure(runs)
        captions['loss.png'] = f'loss, {caption}'
    for key, label in {**figures.RATIO, 'step': figures.STEP['step']}.items():
        if all(run.has(key) for run in runs):
            drawn[f'{key}.png'] = figures.norms_figure(runs, {key: f'{label}, matrices'})
            captions[f'{key}.png'] = f'{label}, of the matrices in the blocks, {caption}'
    tuning = tuning_figure(configs)
    if tuning:
        drawn['tuning.png'] = tuning
        captions['tuning.png'] = (
            "final validation loss over each rule's own setting: the lowest of the configs that "
            'agree in it and in the learning rate, as far as the axis goes'
        )
    for name, figure in drawn.items():
        figures.save(figure, os.path.join(out, name))
    return captions
