"""Train several configs of nanoNorm with several seeds and report which ends with the lowest loss.

    python compare.py CONFIG... --seeds=1,2,3 [--key=value...] --out=results/NAME [--jobs=N]

A CONFIG is what follows `python train.py`: a config file, in quotes if settings follow it.
A --key=value outside the quotes sets a key for all configs, unless a config sets it itself.
The shell expands grids:

    python compare.py 'config/train_char_adamw.py --weight_decay='{0,0.3,1} ...

{1} in a setting is the out_dir of the first CONFIG's run with the same seed, {2} of the second's.
The AdamWN paper trains with AdamW, then with AdamWN to the norms that AdamW ended with:

    python compare.py config/train_char_adamw.py 'config/train_char_wn.py --wn_from={1}' ...

Each run is one `python train.py`, in OUT/runs. A finished run is kept. An interrupted run resumes
from its checkpoint. The results are OUT/report.md, three pictures, results.jsonl with one JSON
object a run, and made.jsonl with the place and date of each run.
"""

import ast
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
from dataclasses import dataclass, field

import matplotlib
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import plot
from configurator import check, configure
from runtime import log as runlog
from runtime.errors import Arguments, border, fail
from runtime.files import write

WHOLE_VAL = '--eval_iters=0'  # every run is evaluated on the whole of val.bin
TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
OWN = ('seed', 'out_dir', 'eval_iters')  # settings that compare.py chooses
USAGE = 'python compare.py CONFIG... --seeds=1,2,3 [--key=value...] --out=results/NAME [--jobs=N]'
# Student's t at p = 5 %, two-sided, for 2 to 10 pairs. For more pairs the last is a little strict.
T_5_PERCENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(eq=False)  # configs compare by identity
class Config:
    words: list  # what follows `python train.py`
    name: str  # its name in the report; the folder of its runs is named after it
    runs: list = field(default_factory=list)  # one Run a seed, in the order of --seeds

    @property
    def file(self):
        return self.name.split(' ')[0]

    def mean(self, key):
        return statistics.fmean(run.result[key] for run in self.runs)

    def spread(self, key):
        """Return the standard deviation over the seeds, nan for one seed."""
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
    """Return the Configs that the command line names, with their Runs still to be made."""
    configs = []
    for text in dict.fromkeys(texts):
        try:
            words = shlex.split(text)
        except ValueError as e:
            remedy = "write 'config/NAME.py --key=value' in one pair of quotes"
            fail(f"'{text}' cannot be read ({e}); {remedy}")
        reserved = [f'--{key}=' for key in OWN]
        taken = [word for word in common + words if word.startswith(tuple(reserved))]
        if taken:
            reason = 'compare.py sets it by --seeds or --out, or to evaluate all of val.bin'
            fail(f'{taken[0]} is reserved: {reason}; leave it out')
        count = next((i for i, word in enumerate(words) if word.startswith('--')), len(words))
        if count == 0:
            fail(f"'{text}' names no config file; write 'config/NAME.py {text}'")
        files, settings = words[:count], words[count:]
        stem = '+'.join(os.path.splitext(os.path.basename(file))[0] for file in files)
        name = ' '.join([stem, *(word.removeprefix('--') for word in settings)])
        configs.append(Config([*files, *common, *settings], name))
    folders = [re.sub(r'[^\w.=+-]+', '_', config.name) for config in configs]
    if len(set(folders)) < len(folders):
        fail('two of the configs have the same name; rename one of the files')

    for number, (config, folder) in enumerate(zip(configs, folders, strict=True)):
        for seed in seeds:

            def out_dir_of(match, number=number, seed=seed):
                if not 0 < int(match[1]) <= number:
                    where = f"{match[0]} in '{configs[number].name}'"
                    fail(f'{where} must be the number of a config that stands before it')
                return os.path.join(out, 'runs', folders[int(match[1]) - 1], f'seed{seed}')

            words = [re.sub(r'\{(\d+)\}', out_dir_of, word) for word in config.words]
            out_dir = os.path.join(out, 'runs', folder, f'seed{seed}')
            words += [WHOLE_VAL, f'--seed={seed}', f'--out_dir={out_dir}']
            config.runs.append(Run(seed, out_dir, words))
    return configs


def train_settings():
    """Return (defaults, limits) of train.py's settings, as configure() and check() take them.

    They are read from its source, because importing it would train.
    """
    defaults, limits, configured = {'__file__': TRAIN}, {}, False
    with open(TRAIN, encoding='utf-8') as f:
        assignments = [node for node in ast.parse(f.read()).body if isinstance(node, ast.Assign)]
    for node in assignments:
        configured = configured or 'configure(' in ast.unparse(node)
        name = getattr(node.targets[0], 'id', '')
        if not any(isinstance(part, ast.Name) for part in ast.walk(node.value)):  # a constant
            expression = compile(ast.Expression(node.value), TRAIN, 'eval')
            if name == 'limits':
                limits = eval(expression)
            elif not configured:
                defaults[name] = eval(expression)
    return defaults, limits


def check_settings(runs):
    """Fail as train.py does on a config file or a setting that is wrong, before any run starts."""
    defaults, limits = train_settings()
    for run in runs:
        settings, _ = configure(dict(defaults), run.arguments)
        check(settings, limits)


def is_finished(run):
    """Return whether the run's log holds its last evaluation.

    Fails if the run in that folder was made with other settings.
    """
    if not os.path.exists(os.path.join(run.out_dir, runlog.NAME)):
        return False
    run.entries = runlog.read_sound(run.out_dir)
    starts = [e['config'] for e in run.entries if e['kind'] == 'config']
    starts = [
        config for config in starts if {'init_from', 'max_iters', 'optimizer'} <= config.keys()
    ]
    if not starts:
        return False
    settings = {**starts[-1], 'init_from': starts[0]['init_from']}  # a resumed run logs 'resume'
    asked, _ = configure(dict(settings), run.arguments)  # equals settings if it is the same run
    other = [key for key in asked if asked[key] != settings[key] and key != 'out_dir']
    if other:
        was = ', '.join(f'{key}={settings[key]}' for key in other)
        now = ', '.join(f'{key}={asked[key]}' for key in other)
        problem = f'the run in {run.out_dir} was made with {was}, not {now}'
        fail(f'{problem}; choose another --out, or delete that run')
    return any(e['kind'] == 'eval' and e['iter'] == settings['max_iters'] for e in run.entries)


def environment(jobs):
    """Return the date, the commit, the machine and the versions that this call runs with."""
    processor = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            names = (line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
            processor = next(names, processor)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    command = ['git', 'describe', '--always', '--dirty']
    try:
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
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
    """Make the runs in order, up to `jobs` at a time.

    after: called in this thread with each run that is done.
    Fails with train.py's message if a run fails. The others are then stopped, as they are by
    Ctrl-C, and each leaves a checkpoint to resume from. Progress is a bar on a terminal, else a
    line for each run that is done.
    """
    gpus = [str(i) for i in range(torch.cuda.device_count())]
    gpus = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(gpus)).split(',') if gpus else []
    slots, running, latest, stopped = list(range(jobs)), {}, {}, threading.Event()
    done = {run.out_dir: threading.Event() for run in runs}

    def train(run):
        for word in run.arguments:  # {1} makes a run depend on another
            for other, event in done.items():
                if other != run.out_dir and re.search(rf'={re.escape(other)}(/|$)', word):
                    event.wait()
        if stopped.is_set():
            return run, 0, ''
        slot = slots.pop()
        env = {'OMP_NUM_THREADS': str(max(1, os.cpu_count() // jobs)), **os.environ}
        if gpus:
            env['CUDA_VISIBLE_DEVICES'] = gpus[slot % len(gpus)]
        command = [sys.executable, 'train.py', *run.arguments]
        if os.path.exists(os.path.join(run.out_dir, 'ckpt.pt')):
            command.append('--init_from=resume')
        name = os.path.basename(os.path.dirname(run.out_dir))
        with tempfile.TemporaryFile('w+', errors='replace') as errors:
            pipes = {'stdout': subprocess.PIPE, 'stderr': errors, 'text': True, 'errors': 'replace'}
            process = subprocess.Popen(command, env=env, **pipes)
            running[run.out_dir] = process
            if stopped.is_set():  # set while the process started
                process.terminate()
            for line in process.stdout:
                latest[run.out_dir] = f'{name}: {line.split(",")[0].strip()}'
                bar.set_postfix_str('; '.join(list(latest.values())), refresh=False)
                bar.update(0)
            status = process.wait()
            del running[run.out_dir]
            latest.pop(run.out_dir, None)
            slots.append(slot)
            errors.seek(0)
            return run, status, errors.read().strip().split('\n')[-1]

    options = {'miniters': 0, 'mininterval': 1.0, 'smoothing': 0, 'disable': None}
    bar = tqdm(total=len(runs), unit='run', **options)
    with bar, ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(train, run) for run in runs]
            for count, future in enumerate(as_completed(futures), 1):
                run, status, error = future.result()
                if status:
                    bar.close()  # ends its line before the message
                    fail(f'{error.removeprefix("error: ")} (status {status} of: {run.command})')
                bar.clear()  # after() may fail: its message takes the line
                after(run)
                done[run.out_dir].set()
                bar.update()
                if bar.disable:
                    print(f'{count} of {len(runs)}: {run.out_dir}', flush=True)
        finally:
            stopped.set()
            for event in done.values():
                event.set()
            for process in list(running.values()):
                process.terminate()


def result_of(run, config):
    """Return the entry of results.jsonl for a finished run, from its log."""
    settings = next(e['config'] for e in reversed(run.entries) if e['kind'] == 'config')
    evals = {e['iter']: e for e in run.entries if e['kind'] == 'eval'}
    steps = [e for e in run.entries if e['kind'] == 'train']
    speed = {}
    for key in ('ms', 'tokens_per_s', 'mfu'):
        known = [e[key] for e in steps if e.get(key) is not None]
        speed[key] = statistics.median(known) if known else None
    ratios = {e['iter']: e['ratio'] for e in run.entries if e['kind'] == 'norms'}
    val_losses = {i: evals[i]['val_loss'] for i in sorted(evals)}
    val_losses = {i: math.inf if loss is None else loss for i, loss in val_losses.items()}
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


def difference(config, first):
    """Compare the final losses of `config` and `first`, paired by seed.

    Returns (mean, standard error, whether p < 5 %) of the differences, `config` minus `first`.
    The test is the two-sided paired t test. The standard error is nan with one seed.
    """
    ours = [run.result['final_val_loss'] for run in config.runs]
    firsts = [run.result['final_val_loss'] for run in first.runs]
    differences = [a - b for a, b in zip(ours, firsts, strict=True)]
    n = len(differences)
    mean = sum(differences) / n  # nan if both runs of a pair blew up
    error = _deviation(differences) / math.sqrt(n)
    return mean, error, error > 0 and abs(mean) / error > T_5_PERCENT[min(n, 10) - 2]


def steps_to(run, loss):
    """Return the iteration of the first evaluation with at most `loss`, or None."""
    return next((i for i, val_loss in run.result['val_losses'].items() if val_loss <= loss), None)


def table(configs):
    """Return the rows of the report's table, each a list of cells."""
    first, rows = configs[0], []
    seeds = len(first.runs)
    for number, config in enumerate(configs, 1):
        mean, error, significant = difference(config, first)
        pairs = zip(config.runs, first.runs, strict=True)
        reached = [steps_to(run, start.result['final_val_loss']) for run, start in pairs]
        reached = [i for i in reached if i is not None]
        steps = f'{statistics.fmean(reached):.0f}' if reached else 'never'
        if 0 < len(reached) < seeds:
            steps += f' ({len(reached)} of {seeds} seeds)'
        final = _plus_minus(config.mean('final_val_loss'), config.spread('final_val_loss'))
        best = _plus_minus(config.mean('best_val_loss'), config.spread('best_val_loss'))
        minus_first = _plus_minus(mean, error, sign='+') + ' *' * significant
        if config is first:
            minus_first = ''
        row = [str(number), f'`{config.name}`', final, best, minus_first, steps]
        formats = {'ratio': '.2f', 'ms': '.1f', 'tokens_per_s': ',.0f'}
        row += [_formatted_mean(config, key, form) for key, form in formats.items()]
        mfu = _formatted_mean(config, 'mfu', '.1%')
        if mfu:
            row[-1] += f' ({mfu} MFU)'
        rows.append(row)
    return rows


def _formatted_mean(config, key, form):
    """Return the mean of the runs that have a value for `key`, '' if none has."""
    known = [run.result[key] for run in config.runs if run.result[key] is not None]
    return format(statistics.fmean(known), form) if known else ''


def _deviation(values):
    """Return the standard deviation, nan for one value or if a value is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values)


def _plus_minus(mean, spread, sign=''):
    return f'{mean:{sign}.4f}' + (f' ± {spread:.4f}' if math.isfinite(spread) else '')


COLUMNS = (
    "|  | config | final val loss | best val loss | final, minus the first | steps to the first's "
    'final loss | norm ratio | ms a step | tokens/s |'
)


def report(configs, out, arguments, pictures, made):
    """Return the text of report.md.

    arguments: of the command line. pictures: {file name: caption}. made: what read_made() returns.
    """
    seeds = [run.seed for run in configs[0].runs]
    named = ', '.join(map(str, seeds))
    tried = {}
    for config in configs:
        tried.setdefault(config.runs[0].result['optimizer'], []).append(config)
    counts, lowest = [], []
    for optimizer, group in tried.items():
        name = plot.OPTIMIZERS.get(optimizer, optimizer)
        counts.append(f'{name} {len(group)}')
        lowest.append(f'{name} {min(c.mean("final_val_loss") for c in group):.4f}')
    wheres = [made.get(run.out_dir) for config in configs for run in config.runs]
    machines = {json.dumps(where): where for where in wheres}.values()
    lines = [
        f'# {os.path.basename(os.path.normpath(out))}: {len(configs)} configs, seeds {named}',
        '',
        COLUMNS,
        '|---' * (COLUMNS.count('|') - 1) + '|',
        *('| ' + ' | '.join(row) + ' |' for row in table(configs)),
        '',
        _explanation(len(seeds), len(configs)),
        '',
        f'Configurations tried: {", ".join(counts)}. Lowest final loss of each: '
        f'{"; ".join(lowest)}. The lowest of many is lower by luck than a single one is.',
        '',
        *(f'![{caption}]({name})\n' for name, caption in pictures.items()),
        '## Repeat it',
        '',
        '```',
        ' \\\n  '.join(['python compare.py', *map(shlex.quote, arguments)]),
        '```',
        '',
        f'Runs that are in {os.path.join(out, "runs")} already are kept. '
        'results.jsonl has the command of each.',
        '',
        '## Made on',
        '',
        *(f'- {_described(where)}' for where in machines),
    ]
    return '\n'.join(lines) + '\n'


def _explanation(seeds, rows):
    return (
        f'Losses in nats a token over the whole of val.bin, mean ± standard deviation over {seeds} '
        'seeds; the best is the lowest of the evaluations along the run. The difference to the '
        f'first config is paired by seed: mean ± standard error of {seeds} differences. * marks '
        f'p < 5 % in a two-sided paired t test, each row taken by itself: of {rows - 1} rows that '
        f'differ in nothing, {0.05 * (rows - 1):.2f} are expected to have one. Steps: the first '
        'evaluation that is at or below what the first config ended with at that seed. Norm ratio: '
        'all weight tensors together, end over start. ms a step, tokens/s: median over the run, '
        'mean over seeds; whatever else ran on the machine is in it. {N} in a name is the out_dir '
        'of row N.'
    )


def _described(where):
    """Describe in one line what environment() returned when a run was made, or None."""
    if where is None:
        return 'not recorded'
    hardware = ', '.join([where['processor'], *where['gpus']])
    return (
        f'{where["date"]}: {hardware}, {where["jobs"]} at a time; '
        f'Python {where["python"]}, torch {where["torch"]}; nanoNorm at {where["commit"]}'
    )


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


def mean_run(config, label, style):
    """Return the mean over a config's seeds as a plot.Run."""
    runs = [plot.run_of(run.entries, config.name, style) for run in config.runs]
    entries = {}
    averaged = {'train': ['loss'], 'eval': ['val_loss', 'train_loss'], 'norms': ['ratio']}
    for kind, keys in averaged.items():
        common = set.intersection(*(set(run.entries.get(kind, {})) for run in runs))
        for i in sorted(common):
            values = {key: [run.entries[kind][i].get(key) for run in runs] for key in keys}
            means = {key: None if None in v else statistics.fmean(v) for key, v in values.items()}
            entries.setdefault(kind, {})[i] = means
    return plot.Run(label, style, runs[0].config, entries)


def final_figure(configs):
    """Plot one row a config: the final validation loss of each seed and their mean.

    A line marks the first config's mean.
    """
    names = labels(configs)
    figure = Figure(figsize=(4 + 0.07 * max(map(len, names)), 1 + 0.22 * len(configs)))  # inches
    ax = figure.subplots()
    optimizers = list(dict.fromkeys(config.runs[0].result['optimizer'] for config in configs))
    colours = {name: plot.COLOURS[i] for i, name in enumerate(optimizers)}
    for row, config in enumerate(configs):
        losses = [run.result['final_val_loss'] for run in config.runs]
        colour = colours[config.runs[0].result['optimizer']]
        dot = {'marker': 'o', 'markersize': 4, 'alpha': 0.5, 'markeredgewidth': 0}
        bar = {'marker': '|', 'markersize': 12, 'markeredgewidth': 2}
        ax.plot(losses, [row] * len(losses), linestyle='', color=colour, **dot)
        ax.plot(statistics.fmean(losses), row, linestyle='', color=colour, **bar)
    dashed = {'color': plot.GREY, 'linewidth': 1, 'linestyle': '--', 'zorder': 0}
    ax.axvline(configs[0].mean('final_val_loss'), **dashed)
    ax.set_yticks(range(len(configs)), names, fontsize=8)
    ax.set_ylim(len(configs) - 0.4, -0.6)
    ax.grid(axis='y', visible=False)
    ax.margins(x=0.03)
    ax.set_xlabel('final validation loss (nats per token)', fontsize=9)
    return figure


def draw(configs, out):
    """Write the pictures to `out` and return {file name: caption}."""
    shown, caption = configs, 'mean over the seeds'
    if len(configs) > len(plot.COLOURS):  # too many lines for the colours
        best = {}
        for config in configs:
            known = best.get(config.file)
            if known is None or config.mean('final_val_loss') < known.mean('final_val_loss'):
                best[config.file] = config
        shown = list(dict.fromkeys([configs[0], *best.values()]))[: len(plot.COLOURS)]
        best_of_each = 'of each config file the settings with the lowest final loss'
        caption += f': the first config, and {best_of_each}'
    runs = []
    for config, label, colour in zip(shown, labels(shown), plot.COLOURS, strict=False):
        runs.append(mean_run(config, label, {'color': colour, 'linestyle': '-'}))
    figures = {'final.png': final_figure(configs), 'loss.png': plot.loss_figure(runs)}
    explained = 'a dot a run, a bar their mean, dashed that of the first config'
    captions = {
        'final.png': f'final validation loss: {explained}',
        'loss.png': f'loss, {caption}',
    }
    if all(run.entries.get('norms') for run in runs):
        figures['ratio.png'] = plot.ratio_figure(runs)
        captions['ratio.png'] = f'norm ratio, {caption}'
    for name, figure in figures.items():
        plot.save(figure, os.path.join(out, name))
    return captions


def read_made(path):
    """Return {out_dir: what environment() returned when the run was made}.

    A line that is cut off or damaged is left out: the report says that the run is not recorded.
    """
    if not os.path.exists(path):
        return {}
    made = {}
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            try:
                entry = json.loads(line)
                out_dir = entry.pop('out_dir')
                if isinstance(entry['gpus'], list) and _described(entry):
                    made[out_dir] = entry
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue
    return made


def seeds_of(text):
    """Return the numbers of --seeds=1,2,3."""
    words = text.split(',')
    if all(re.fullmatch('[0-9]{1,19}', word) for word in words):
        seeds = [int(word) for word in words]
        if len(set(seeds)) == len(seeds) and max(seeds) < 1 << 63:
            return seeds
    fail(f'--seeds={text} must be different whole numbers below 2**63, as in --seeds=1,2,3')


@matplotlib.rc_context({**plot.STYLE, 'savefig.dpi': 100})  # small files for the repository
def main(argv):
    parser = Arguments(__doc__, usage=USAGE, allow_abbrev=False)
    text = 'a config file; in quotes with its own settings'
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help=text)
    text = 'one run of every config with each'
    parser.add_argument('--seeds', default='1,2,3', help=text)
    text = 'where the runs and the report go'
    parser.add_argument('--out', required=True, metavar='FOLDER', help=text)
    text = 'runs at a time; default: one for each GPU, or else for each core'
    parser.add_argument('--jobs', type=int, help=text)
    args, common = parser.parse_known_args(argv)
    seeds = seeds_of(args.seeds)
    jobs = args.jobs if args.jobs is not None else torch.cuda.device_count() or os.cpu_count()
    if jobs < 1:
        fail(f'--jobs={args.jobs} must be at least 1')

    configs = configs_of(args.configs, common, seeds, args.out)
    runs = {run.out_dir: (run, config) for config in configs for run in config.runs}
    check_settings(run for run, _ in runs.values())
    jobs = min(jobs, len(runs))
    missing = [run for run, _ in runs.values() if not is_finished(run)]
    made = os.path.join(args.out, 'made.jsonl')
    if missing:
        where = environment(jobs)
        finished = len(runs) - len(missing)
        print(f'{len(runs)} runs, {finished} of them finished before; {jobs} at a time')

        def after(run):
            if not is_finished(run):
                fail(
                    f'the run in {run.out_dir} has ended, but its log lacks the last evaluation: '
                    'the log was lost or damaged. Delete that folder, and the same command makes '
                    'the run again'
                )
            with open(made, 'a', encoding='utf-8') as f:
                f.write(runlog.line({'out_dir': run.out_dir, **where}))

        make(missing, jobs, after)
    for run, config in runs.values():
        run.result = result_of(run, config)

    results = ''.join(runlog.line(run.result) for run, _ in runs.values())
    write(os.path.join(args.out, 'results.jsonl'), results.encode())
    pictures = draw(configs, args.out)
    path = os.path.join(args.out, 'report.md')
    write(path, report(configs, args.out, argv, pictures, read_made(made)).encode())
    print(path)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as on Ctrl-C
    with border('mend that, and the same command goes on'):
        try:
            main(sys.argv[1:])
        except KeyboardInterrupt:
            print('stopped; the same command goes on', file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
