"""Train several configs with several seeds and write one report about which ends lower.

    python compare.py CONFIG... --seeds=1,2,3 [--key=value...] --out=results/NAME [--jobs=N]

A CONFIG is what would follow `python train.py`: a config file, in quotes with settings of its own. The --key=value
outside of the quotes are for all of them, the ones inside count more. The shell writes grids:

    python compare.py config/train_char_adamw.py 'config/train_char_adamw.py --weight_decay='{0,0.3,1} ...

{1} in a setting stands for the out_dir of the first CONFIG's run with the same seed, {2} for the second's, and so on:
the AdamWN paper's recipe, AdamW and then AdamWN to the norms that AdamW ended with, is

    python compare.py config/train_char_adamw.py 'config/train_char_wn.py --wn_from={1}' --out=results/NAME

Every run is a `python train.py` of its own in OUT/runs. One that is finished is not made again, one that was stopped
goes on from its checkpoint. Writes OUT/report.md, three pictures and results.jsonl, one JSON object a run; made.jsonl
says where and when each run was made.
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field

import matplotlib
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import plot
import runlog
from configurator import configure
from runtime import fail

WHOLE_VAL = '--eval_iters=0'  # every run is evaluated on the whole of val.bin
OWN = ('seed', 'out_dir', 'eval_iters')  # settings that are not the user's here
# Student's t that 5 % of all draws exceed in size, for 2, 3, ... 10 pairs; with more pairs the last is a little strict
T_5_PERCENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(eq=False)  # two configs are the same where they are one object
class Config:
    words: list  # what follows `python train.py`
    name: str  # how the report and the folder of its runs call it
    runs: list = field(default_factory=list)  # one Run a seed, in the order of --seeds

    @property
    def file(self):
        return self.name.split(' ')[0]

    def mean(self, key):
        return statistics.fmean(run.result[key] for run in self.runs)

    def spread(self, key):
        """Standard deviation over the seeds, nan for a single one."""
        return _deviation([run.result[key] for run in self.runs])


@dataclass
class Run:
    seed: int
    out_dir: str
    arguments: list  # of train.py
    entries: list = None  # of its log
    result: dict = None  # its line in results.jsonl

    @property
    def command(self):
        return shlex.join(['python', 'train.py', *self.arguments])


def configs_of(texts, common, seeds, out):
    """The Configs that the command line names, each with its Runs still to be made."""
    configs = []
    for text in dict.fromkeys(texts):
        try:
            words = shlex.split(text)
        except ValueError as e:
            fail(
                f"'{text}' cannot be read ({e}); write 'config/NAME.py --key=value' in one pair of quotes"
            )
        taken = [word for word in common + words for key in OWN if word.startswith(f'--{key}=')]
        if taken:
            fail(
                f'{taken[0]} is what compare.py chooses itself: by --seeds, by --out, and every evaluation is of the '
                'whole of val.bin; leave it out'
            )
        own = next((i for i, word in enumerate(words) if word.startswith('--')), len(words))
        if own == 0:
            fail(f"'{text}' names no config file; write 'config/NAME.py {text}'")
        stem = '+'.join(os.path.splitext(os.path.basename(word))[0] for word in words[:own])
        name = ' '.join([stem, *(word.removeprefix('--') for word in words[own:])])
        configs.append(Config([*words[:own], *common, *words[own:]], name))
    folders = [re.sub(r'[^\w.=+-]+', '_', config.name) for config in configs]
    if len(set(folders)) < len(folders):
        fail('two of the configs differ in nothing that their names show; rename one of the files')

    for number, (config, folder) in enumerate(zip(configs, folders, strict=True)):
        for seed in seeds:

            def out_dir_of(match, number=number, seed=seed):
                if not 0 < int(match[1]) <= number:
                    fail(
                        f"{match[0]} in '{configs[number].name}' must be the number of a config that stands before it"
                    )
                return os.path.join(out, 'runs', folders[int(match[1]) - 1], f'seed{seed}')

            words = [re.sub(r'\{(\d+)\}', out_dir_of, word) for word in config.words]
            out_dir = os.path.join(out, 'runs', folder, f'seed{seed}')
            config.runs.append(
                Run(seed, out_dir, [*words, WHOLE_VAL, f'--seed={seed}', f'--out_dir={out_dir}'])
            )
    return configs


def is_finished(run):
    """Whether the log holds the run's last evaluation. Fails where the run there was made with other settings."""
    if not os.path.exists(os.path.join(run.out_dir, runlog.NAME)):
        return False
    run.entries = runlog.read(run.out_dir)
    starts = [e['config'] for e in run.entries if e.get('kind') == 'config']
    if not starts:
        return False
    settings = {**starts[-1], 'init_from': starts[0]['init_from']}  # it may have been resumed since
    asked, _ = configure(dict(settings), run.arguments)  # changes nothing where it is the same run
    other = [key for key in settings if asked[key] != settings[key] and key != 'out_dir']
    if other:
        was, now = (
            ', '.join(f'{key}={values[key]}' for key in other) for values in (settings, asked)
        )
        fail(
            f'the run in {run.out_dir} was made with {was}, not {now}; choose another --out, or delete that run'
        )
    return any(e['kind'] == 'eval' and e['iter'] == settings['max_iters'] for e in run.entries)


def environment(jobs):
    """Where and when the runs of this call are made."""
    processor = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            processor = next(
                (line.split(':', 1)[1].strip() for line in f if line.startswith('model name')),
                processor,
            )
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        git = subprocess.run(
            ['git', 'describe', '--always', '--dirty'], capture_output=True, text=True
        ).stdout.strip()
    except FileNotFoundError:
        git = ''
    return {
        'date': datetime.date.today().isoformat(),
        'commit': git or 'unknown',
        'jobs': jobs,
        'processor': f'{os.cpu_count()} x {processor}',
        'gpus': devices,
        'python': platform.python_version(),
        'torch': torch.__version__,
    }


def make(runs, jobs, after):
    """Make the runs, up to `jobs` at a time, in order; `after` is called in this thread with each that is done.

    Fails with what train.py said where one fails; the others are then stopped, as they are by Ctrl-C, each with a
    checkpoint to go on from.
    """
    gpus = [str(i) for i in range(torch.cuda.device_count())]
    gpus = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(gpus)).split(',') if gpus else []
    slots, running, latest, stopped = list(range(jobs)), {}, {}, threading.Event()
    done = {run.out_dir: threading.Event() for run in runs}

    def train(run):
        for word in run.arguments:  # a run may need the log of another
            for other, event in done.items():
                if other != run.out_dir and re.search(rf'={re.escape(other)}(/|$)', word):
                    event.wait()
        if stopped.is_set():
            return run, 0, ''
        slot = slots.pop()
        own = {'OMP_NUM_THREADS': str(max(1, os.cpu_count() // jobs)), **os.environ}
        if gpus:
            own['CUDA_VISIBLE_DEVICES'] = gpus[slot % len(gpus)]
        resume = (
            ['--init_from=resume'] if os.path.exists(os.path.join(run.out_dir, 'ckpt.pt')) else []
        )
        with tempfile.TemporaryFile('w+') as errors:
            process = subprocess.Popen(
                [sys.executable, 'train.py', *run.arguments, *resume],
                env=own,
                text=True,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
            running[run.out_dir] = process
            if stopped.is_set():  # while it started
                process.terminate()
            for line in process.stdout:
                latest[run.out_dir] = (
                    f'{os.path.basename(os.path.dirname(run.out_dir))}: {line.split(",")[0].strip()}'
                )
                bar.set_postfix_str('; '.join(list(latest.values())), refresh=False)
                bar.update(0)
            status = process.wait()
            del running[run.out_dir]
            latest.pop(run.out_dir, None)
            slots.append(slot)
            errors.seek(0)
            return run, status, errors.read().strip().split('\n')[-1]

    bar = tqdm(total=len(runs), unit='run', miniters=0, mininterval=1.0, smoothing=0)
    with bar, ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(train, run) for run in runs]):
                run, status, error = future.result()
                if status:
                    bar.close()  # its line ends here
                    fail(f'{error.removeprefix("error: ")} (status {status} of: {run.command})')
                after(run)
                done[run.out_dir].set()
                bar.update()
        finally:
            stopped.set()
            for event in done.values():
                event.set()
            for process in list(running.values()):
                process.terminate()


def result_of(run, config):
    """What results.jsonl says of a finished run, all of it from its log."""
    settings = next(e['config'] for e in reversed(run.entries) if e['kind'] == 'config')
    evals = {e['iter']: e for e in run.entries if e['kind'] == 'eval'}
    steps = [e for e in run.entries if e['kind'] == 'train']
    speed = {}
    for key in ('ms', 'tokens_per_s', 'mfu'):
        known = [e[key] for e in steps if e[key] is not None]
        speed[key] = statistics.median(known) if known else None
    ratios = {e['iter']: e['ratio'] for e in run.entries if e['kind'] == 'norms'}
    val_losses = {
        i: evals[i]['val_loss'] if evals[i]['val_loss'] is not None else math.inf
        for i in sorted(evals)
    }
    last = max(evals)
    return {
        'out_dir': run.out_dir,
        'config': config.name,
        'seed': run.seed,
        'optimizer': settings['optimizer'],
        'iters': last,
        'final_val_loss': val_losses[last],
        'best_val_loss': min(val_losses.values()),
        'final_train_loss': evals[last]['train_loss'],
        'ratio': ratios[max(ratios)] if ratios else None,
        **speed,
        'val_losses': val_losses,
        'command': run.command,
    }


def difference(config, first):
    """Final loss of `config` minus that of `first`, paired by seed: (mean, standard error, whether p < 5 %).

    The paired t test, two-sided: the mean over its standard error against Student's t. The error is nan with one seed.
    """
    differences = [
        a.result['final_val_loss'] - b.result['final_val_loss']
        for a, b in zip(config.runs, first.runs, strict=True)
    ]
    n = len(differences)
    mean = sum(differences) / n  # nan where both blew up
    error = _deviation(differences) / math.sqrt(n)
    return mean, error, error > 0 and abs(mean) / error > T_5_PERCENT[min(n, 10) - 2]


def steps_to(run, loss):
    """The iteration of the first evaluation whose validation loss is at most `loss`, None where there is none."""
    return next((i for i, val_loss in run.result['val_losses'].items() if val_loss <= loss), None)


def table(configs):
    """The rows of the report's table, each a list of cells."""
    first, rows = configs[0], []
    seeds = len(first.runs)
    for number, config in enumerate(configs, 1):
        mean, error, significant = difference(config, first)
        reached = [
            steps_to(run, start.result['final_val_loss'])
            for run, start in zip(config.runs, first.runs, strict=True)
        ]
        reached = [i for i in reached if i is not None]
        steps = f'{statistics.fmean(reached):.0f}' if reached else 'never'
        if 0 < len(reached) < seeds:
            steps += f' ({len(reached)} of {seeds} seeds)'
        means = {}
        for key in ('ratio', 'ms', 'tokens_per_s', 'mfu'):
            known = [run.result[key] for run in config.runs if run.result[key] is not None]
            means[key] = statistics.fmean(known) if known else None
        rows.append(
            [
                str(number),
                f'`{config.name}`',
                _plus_minus(config.mean('final_val_loss'), config.spread('final_val_loss')),
                _plus_minus(config.mean('best_val_loss'), config.spread('best_val_loss')),
                '' if config is first else _plus_minus(mean, error, sign='+') + ' *' * significant,
                steps,
                *(
                    '' if means[key] is None else format(means[key], form)
                    for key, form in (('ratio', '.2f'), ('ms', '.1f'), ('tokens_per_s', ',.0f'))
                ),
            ]
        )
        if means['mfu'] is not None:
            rows[-1][-1] += f' ({means["mfu"]:.1%} MFU)'
    return rows


def _deviation(values):
    """Standard deviation of a sample; nan for a single value, or where one is infinite."""
    return (
        statistics.stdev(values)
        if len(values) > 1 and all(map(math.isfinite, values))
        else math.nan
    )


def _plus_minus(mean, spread, sign=''):
    return f'{mean:{sign}.4f}' + (f' ± {spread:.4f}' if math.isfinite(spread) else '')


def report(configs, out, arguments, pictures, made):
    """The text of report.md."""
    first = configs[0]
    seeds = [run.seed for run in first.runs]
    tried = {}
    for config in configs:
        tried.setdefault(config.runs[0].result['optimizer'], []).append(config)
    head = [
        '',
        'config',
        'final val loss',
        'best val loss',
        'final, minus the first',
        "steps to the first's final loss",
        'norm ratio',
        'ms a step',
        'tokens/s',
    ]
    lines = [
        f'# {os.path.basename(os.path.normpath(out))}: {len(configs)} configs, seeds {", ".join(map(str, seeds))}',
        '',
        '| ' + ' | '.join(head) + ' |',
        '|---' * len(head) + '|',
        *('| ' + ' | '.join(row) + ' |' for row in table(configs)),
        '',
        f'Losses in nats a token over the whole of val.bin, mean ± standard deviation over {len(seeds)} seeds; the '
        'best is the lowest of the evaluations along the run. The difference to the first config is paired by seed: '
        f'mean ± standard error of {len(seeds)} differences. * marks p < 5 % in a two-sided paired t test, each row '
        f'taken by itself: of {len(configs) - 1} rows that differ in nothing, {0.05 * (len(configs) - 1):.2f} are '
        'expected to have one. Steps: the first evaluation that is at or below what the first config ended with at '
        'that seed. Norm ratio: all weight tensors together, end over start. ms a step, tokens/s: median over the '
        'run, mean over seeds; whatever else ran on the machine is in it. {N} in a name is the out_dir of row N.',
        '',
        'Configurations tried: '
        + ', '.join(f'{plot.OPTIMIZERS[name]} {len(group)}' for name, group in tried.items())
        + '. Lowest final loss of each: '
        + '; '.join(
            f'{plot.OPTIMIZERS[name]} {min(c.mean("final_val_loss") for c in group):.4f}'
            for name, group in tried.items()
        )
        + '. The lowest of many is lower by luck than a single one is.',
        '',
        *(f'![{caption}]({name})\n' for name, caption in pictures.items()),
        '## Repeat it',
        '',
        '```',
        ' \\\n  '.join(['python compare.py', *map(shlex.quote, arguments)]),
        '```',
        '',
        f'Runs that are in {os.path.join(out, "runs")} already are kept. results.jsonl has the command of each.',
        '',
        '## Made on',
        '',
    ]
    wheres = [made.get(run.out_dir) for config in configs for run in config.runs]
    for where in {json.dumps(where): where for where in wheres}.values():
        lines.append(
            '- not recorded'
            if where is None
            else f'- {where["date"]}: {where["processor"]}'
            + ''.join(f', {gpu}' for gpu in where['gpus'])
            + f', {where["jobs"]} at a time; Python {where["python"]}, torch {where["torch"]}; commit '
            + where['commit']
        )
    return '\n'.join(lines) + '\n'


def labels(configs):
    """What tells the configs apart, short enough for a picture: their names without the settings that all share."""
    names = [config.name.split(' ') for config in configs]
    shared = set.intersection(*(set(settings) for _, *settings in names))
    start = os.path.commonprefix([stem for stem, *_ in names]).rpartition('_')[0]
    return [
        ' '.join(
            [
                stem.removeprefix(start).lstrip('_'),
                *(word for word in settings if word not in shared),
            ]
        )
        for stem, *settings in names
    ]


def mean_run(config, label, style):
    """The mean over a config's seeds as one run that plot.py's figures draw."""
    runs = [plot.load(run.out_dir, config.name, style) for run in config.runs]
    entries = {}
    for kind, keys in (
        ('train', ['loss']),
        ('eval', ['val_loss', 'train_loss']),
        ('norms', ['ratio']),
    ):
        common = set.intersection(*(set(run.entries.get(kind, {})) for run in runs))
        for i in sorted(common):
            values = {key: [run.entries[kind][i][key] for run in runs] for key in keys}
            means = {key: None if None in v else statistics.fmean(v) for key, v in values.items()}
            entries.setdefault(kind, {})[i] = means
    return plot.Run(label, style, runs[0].config, entries)


def final_figure(configs):
    """One row a config: the final validation loss of each seed, and their mean; the first config's as a line."""
    names = labels(configs)
    figure = Figure(figsize=(4 + 0.07 * max(map(len, names)), 1 + 0.22 * len(configs)))  # inches
    ax = figure.subplots()
    optimizers = list(dict.fromkeys(config.runs[0].result['optimizer'] for config in configs))
    colours = {name: plot.COLOURS[i] for i, name in enumerate(optimizers)}
    for row, config in enumerate(configs):
        losses = [run.result['final_val_loss'] for run in config.runs]
        colour = colours[config.runs[0].result['optimizer']]
        ax.plot(
            losses,
            [row] * len(losses),
            'o',
            color=colour,
            markersize=4,
            alpha=0.5,
            markeredgewidth=0,
        )
        ax.plot(statistics.fmean(losses), row, '|', color=colour, markersize=12, markeredgewidth=2)
    ax.axvline(
        configs[0].mean('final_val_loss'), color=plot.GREY, linewidth=1, linestyle='--', zorder=0
    )
    ax.set_yticks(range(len(configs)), names, fontsize=8)
    ax.set_ylim(len(configs) - 0.4, -0.6)
    ax.grid(axis='y', visible=False)
    ax.margins(x=0.03)
    ax.set_xlabel('final validation loss (nats per token)', fontsize=9)
    return figure


def draw(configs, out):
    """Write the pictures; {file name: caption}."""
    shown, caption = configs, 'mean over the seeds'
    if len(configs) > len(plot.COLOURS):  # the figures have a colour for each of these
        best = {}
        for config in configs:
            known = best.get(config.file)
            if known is None or config.mean('final_val_loss') < known.mean('final_val_loss'):
                best[config.file] = config
        shown = list(dict.fromkeys([configs[0], *best.values()]))[: len(plot.COLOURS)]
        caption += (
            ': the first config, and of each config file the settings with the lowest final loss'
        )
    runs = [
        mean_run(config, label, {'color': plot.COLOURS[i], 'linestyle': '-'})
        for i, (config, label) in enumerate(zip(shown, labels(shown), strict=True))
    ]
    figures = {'final.png': final_figure(configs), 'loss.png': plot.loss_figure(runs)}
    captions = {
        'final.png': 'final validation loss: a dot a run, a bar their mean, dashed that of the first config',
        'loss.png': f'loss, {caption}',
    }
    if all(run.entries.get('norms') for run in runs):
        figures['ratio.png'], captions['ratio.png'] = (
            plot.ratio_figure(runs),
            f'norm ratio, {caption}',
        )
    for name, figure in figures.items():
        plot.save(figure, os.path.join(out, name))
    return captions


def read_made(path):
    """{out_dir: where and when the run was made}; a line that was cut off, by a full disk say, is left out."""
    if not os.path.exists(path):
        return {}
    made = {}
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            with suppress(ValueError):
                entry = json.loads(line)
                made[entry.pop('out_dir')] = entry
    return made


@matplotlib.rc_context(
    {**plot.STYLE, 'savefig.dpi': 100}
)  # a repository keeps many of these pictures
def main(argv):
    parser = plot.Arguments(
        usage='python compare.py CONFIG... --seeds=1,2,3 [--key=value...] --out=results/NAME [--jobs=N]',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        'configs',
        nargs='+',
        metavar='CONFIG',
        help='a config file; in quotes with its own settings',
    )
    parser.add_argument('--seeds', default='1,2,3', help='one run of every config with each')
    parser.add_argument(
        '--out', required=True, metavar='FOLDER', help='where the runs and the report go'
    )
    parser.add_argument(
        '--jobs', type=int, help='runs at a time; default: one for each GPU, or else for each core'
    )
    args, common = parser.parse_known_args(argv)
    seeds = args.seeds.split(',')
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        fail(f'--seeds={args.seeds} must be different whole numbers, as in --seeds=1,2,3')
    jobs = args.jobs if args.jobs is not None else torch.cuda.device_count() or os.cpu_count()
    if jobs < 1:
        fail(f'--jobs={args.jobs} must be at least 1')

    configs = configs_of(args.configs, common, [int(seed) for seed in seeds], args.out)
    runs = {run.out_dir: (run, config) for config in configs for run in config.runs}
    missing = [run for run, _ in runs.values() if not is_finished(run)]
    made = os.path.join(args.out, 'made.jsonl')
    if missing:
        where = environment(jobs)
        print(
            f'{len(runs)} runs, {len(runs) - len(missing)} of them finished before; {jobs} at a time'
        )

        def after(run):
            if not is_finished(run):
                fail(
                    f'the run in {run.out_dir} has no evaluation at its last iteration; if it was stopped, the same '
                    'command goes on'
                )
            with open(made, 'a', encoding='utf-8') as f:
                f.write(runlog.line({'out_dir': run.out_dir, **where}))

        make(missing, jobs, after)
    for run, config in runs.values():
        run.result = result_of(run, config)

    with open(os.path.join(args.out, 'results.jsonl'), 'w', encoding='utf-8') as f:
        f.writelines(runlog.line(run.result) for run, _ in runs.values())
    pictures = draw(configs, args.out)
    path = os.path.join(args.out, 'report.md')
    with open(path, 'w', encoding='utf-8') as f:
        f.write(report(configs, args.out, argv, pictures, read_made(made)))
    print(path)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print('stopped; the same command goes on', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as e:
        fail(
            f'{e.filename or "the report"} cannot be written or read ({e.strerror}); mend that, and the same command '
            'goes on'
        )
