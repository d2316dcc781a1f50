"""Train several configs of nanoNorm with several seeds and report which ends with the lowest loss.

    python compare.py CONFIG... --seeds=1,2,3 [--key=value...] --out=results/NAME
        [--jobs=N] [--halves]

A CONFIG is what follows `python train.py`: a config file, in quotes if settings follow it.
A --key=value outside the quotes sets a key for all configs, unless a config sets it itself.
The shell expands grids:

    python compare.py 'config/train_char_adamw.py --weight_decay='{0,0.3,1} ...

{1} in a setting is the out_dir of the first CONFIG's run with the same seed, {2} of the second's.
The AdamWN paper trains with AdamW, then with AdamWN to the norms that AdamW ended with:

    python compare.py config/train_char_adamw.py 'config/train_char_wn.py --wn_from={1}' ...

Each run is one `python train.py`, in OUT/runs. A finished run is kept. An interrupted run resumes
from its checkpoint. The results are OUT/report.md and its pictures, OUT/runs/results.jsonl with
one JSON object a run, and OUT/runs/made.jsonl with the place and date of each run.

The best of many configs is lower by luck. With --halves the choice is made on one half of the
validation text and reported on the other: each run's final checkpoint is evaluated over the first
half of val.bin (val_loss_choose in results.jsonl) and over the second (val_loss_report). The report
then ranks the configs by the first half and gives their losses on the second, with the differences
between configs, paired by seed, and 95 % confidence intervals. A run keeps its two losses in
halves.json. Finished runs that still have their ckpt.pt can be evaluated later. --halves removes
luck with the text, not luck with the seeds: confirm the choice with new seeds.
"""

import ast
import datetime
import itertools
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress

from tqdm import tqdm

from configurator import check, configure
from runtime import log as runlog
from runtime import report
from runtime.errors import Arguments, border, fail
from runtime.files import write
from runtime.report import Config, Run

# torch takes seconds to import: the functions that need it do so, after the settings are checked

TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
USAGE = (
    'python compare.py CONFIG... --seeds=1,2,3 [--key=value...] --out=results/NAME [--jobs=N] '
    '[--halves]'
)
RESERVED = ('seed', 'out_dir', 'eval_iters')  # settings that compare.py chooses

# ---- the command line


def config_of(text, common):
    """Return the Config of a CONFIG on the command line. common: the settings for all configs."""
    try:
        words = shlex.split(text)
    except ValueError as e:
        remedy = "write 'config/NAME.py --key=value' in one pair of quotes"
        fail(f"'{text}' cannot be read ({e}); {remedy}")
    for word in common + words:
        if word.startswith(tuple(f'--{key}=' for key in RESERVED)):
            reason = 'compare.py sets it by --seeds or --out, or to evaluate all of val.bin'
            fail(f'{word} is reserved: {reason}; leave it out')
    files = list(itertools.takewhile(lambda word: not word.startswith('--'), words))
    settings = words[len(files) :]
    if not files:
        fail(f"'{text}' names no config file; write 'config/NAME.py {text}'")
    stem = '+'.join(os.path.splitext(os.path.basename(file))[0] for file in files)
    name = ' '.join([stem, *(word.removeprefix('--') for word in settings)])
    return Config([*files, *common, *settings], name)


def add_runs(configs, seeds, out, reserved):
    """Give each config its runs. reserved: the arguments that compare.py adds to each run's."""
    if len({config.folder for config in configs}) < len(configs):
        fail('two of the configs have the same name; rename one of the files')
    for number, config in enumerate(configs):
        for seed in seeds:
            folders = [os.path.join(out, 'runs', c.folder, f'seed{seed}') for c in configs]
            earlier = {f'{{{i}}}': folder for i, folder in enumerate(folders[:number], 1)}
            run = Run(seed, folders[number], [])
            for word in config.words:
                for name in re.findall(r'\{\d+\}', word):
                    if name not in earlier:
                        fail(f'{name} in {word} must be the number of a config before its own')
                    word = word.replace(name, earlier[name])
                    run.needs.add(earlier[name])
                run.arguments.append(word)
            run.arguments += [*reserved, f'--seed={seed}', f'--out_dir={run.out_dir}']
            config.runs.append(run)


def seeds_of(text):
    """Return the numbers of --seeds=1,2,3."""
    words = text.split(',')
    if all(re.fullmatch('[0-9]{1,19}', word) for word in words):
        seeds = [int(word) for word in words]
        if len(set(seeds)) == len(seeds) and max(seeds) < 1 << 63:
            return seeds
    fail(f'--seeds={text} must be different whole numbers below 2**63, as in --seeds=1,2,3')


def train_settings():
    """Return (defaults, limits) of train.py's settings, as configure() and check() take them.

    They are read from its source, because importing it would train: the assignments before it
    calls configure(), and that of `limits`.
    """
    with open(TRAIN, encoding='utf-8') as f:
        statements = ast.parse(f.read()).body
    end = next(i for i, node in enumerate(statements) if 'configure(' in ast.unparse(node))
    assigned = [node for node in statements[:end] if isinstance(node, ast.Assign)]
    assigned += [node for node in statements if ast.unparse(node).startswith('limits =')]
    settings = {'__file__': TRAIN}
    exec(compile(ast.Module(assigned, type_ignores=[]), TRAIN, 'exec'), settings)
    limits = settings.pop('limits')
    return settings, limits


def check_settings(runs):
    """Fail as train.py does on a config file or a setting that is wrong, before any run starts."""
    defaults, limits = train_settings()
    for run in runs:
        run.settings, _ = configure(dict(defaults), run.arguments)
        check(run.settings, limits)


# ---- the runs


def is_finished(run):
    """Return whether the run's log holds its last evaluation.

    Fails if the run in that folder was made with other settings.
    """
    if not os.path.exists(os.path.join(run.out_dir, runlog.NAME)):
        return False
    run.entries = runlog.read_sound(run.out_dir)
    starts = [entry['config'] for entry in run.entries if entry['kind'] == 'config']
    starts = [c for c in starts if {'init_from', 'max_iters', 'optimizer'} <= c.keys()]
    if not starts:
        return False
    defaults, _ = configure(train_settings()[0], [])  # of settings that are newer than the log
    settings = {**defaults, **starts[-1]}
    settings['init_from'] = starts[0]['init_from']  # a resumed run logs 'resume'
    asked, _ = configure(dict(settings), run.arguments)  # equals settings if it is the same run
    irrelevant = ('out_dir', 'always_save_checkpoint')  # for the losses
    other = [key for key in asked if asked[key] != settings[key] and key not in irrelevant]
    if other:
        was = ', '.join(f'{key}={settings[key]}' for key in other)
        now = ', '.join(f'{key}={asked[key]}' for key in other)
        problem = f'the run in {run.out_dir} was made with {was}, not {now}'
        fail(f'{problem}; choose another --out, or delete that run')
    return any(e['kind'] == 'eval' and e['iter'] == settings['max_iters'] for e in run.entries)


def visible_gpus():
    """Return the names of the GPUs, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    names = [str(i) for i in range(torch.cuda.device_count())]
    return os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(names)).split(',') if names else []


class Job:
    """A `python train.py` at work. `latest` is the beginning of the last line that it printed."""

    def __init__(self, run, gpu, threads):
        self.run, self.latest = run, 'starts'
        command = [sys.executable, 'train.py', *run.arguments]
        if os.path.exists(os.path.join(run.out_dir, 'ckpt.pt')):
            command.append('--init_from=resume')
        env = {'OMP_NUM_THREADS': str(threads), **os.environ}
        if gpu is not None:
            env['CUDA_VISIBLE_DEVICES'] = gpu
        self.errors = tempfile.TemporaryFile('w+', errors='replace')
        pipes = {'stdout': subprocess.PIPE, 'stderr': self.errors, 'errors': 'replace'}
        self.process = subprocess.Popen(command, env=env, text=True, **pipes)
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self):
        for line in self.process.stdout:
            self.latest = line.split(',')[0].strip()

    def fail_with_its_message(self):
        """Fail as train.py did, if it has failed."""
        if self.process.returncode:
            self.errors.seek(0)
            message = self.errors.read().strip().split('\n')[-1].removeprefix('error: ')
            fail(f'{message} (status {self.process.returncode} of: {self.run.command})')


def make(runs, jobs, after):
    """Make the runs, up to `jobs` at a time, each after those that it needs.

    after: called with each run that is done.
    If a run fails, or on Ctrl-C, the others are stopped, and each leaves a checkpoint to resume
    from. Progress is a bar on a terminal, else a line for each run that is done.
    """
    gpus, threads = visible_gpus() or [None], max(1, os.cpu_count() // jobs)
    waiting, running = list(runs), {}  # running: {slot: Job}
    # the bar is erased before anything else is printed, so that messages have lines of their own
    with tqdm(total=len(runs), unit='run', smoothing=0, leave=False, disable=None) as bar:
        try:
            while waiting or running:
                undone = {run.out_dir for run in waiting + [job.run for job in running.values()]}
                ready = [run for run in waiting if not run.needs & undone]
                free = [slot for slot in range(jobs) if slot not in running]
                for slot, run in zip(free, ready, strict=False):
                    waiting.remove(run)
                    running[slot] = Job(run, gpus[slot % len(gpus)], threads)
                time.sleep(0.1)
                names = [os.path.basename(os.path.dirname(j.run.out_dir)) for j in running.values()]
                latest = [f'{n}: {j.latest}' for n, j in zip(names, running.values(), strict=True)]
                bar.set_postfix_str('; '.join(latest))
                for slot, job in list(running.items()):
                    if job.process.poll() is None:
                        continue
                    del running[slot]
                    bar.clear()
                    job.fail_with_its_message()
                    after(job.run)
                    bar.update()
                    if bar.disable:
                        done = len(runs) - len(waiting) - len(running)
                        print(f'{done} of {len(runs)}: {job.run.out_dir}', flush=True)
        finally:
            for job in running.values():
                job.process.terminate()
            for job in running.values():
                job.process.wait()


def environment(jobs):
    """Return the date, the commit, the machine and the versions that this call runs with."""
    import torch

    processor = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            names = (line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
            processor = next(names, processor)
    commit = ''
    with suppress(FileNotFoundError):
        command = ['git', 'describe', '--always', '--dirty']
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        'date': datetime.date.today().isoformat(),
        'commit': commit or 'unknown',
        'jobs': jobs,
        'processor': f'{os.cpu_count()} x {processor}',
        'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        'python': platform.python_version(),
        'torch': torch.__version__,
    }


def described(where):
    """Describe in one line what environment() returned when a run was made."""
    hardware = ', '.join([where['processor'], *where['gpus']])
    return (
        f'{where["date"]}: {hardware}, {where["jobs"]} at a time; '
        f'Python {where["python"]}, torch {where["torch"]}; nanoNorm at {where["commit"]}'
    )


def read_made(path):
    """Return {out_dir: where and when the run was made, in one line} from made.jsonl.

    A line that is cut off or damaged is left out: the report says that the run is not recorded.
    """
    made = {}
    if not os.path.exists(path):
        return made
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry['gpus'], list):
                    made[entry['out_dir']] = described(entry)
    return made


# ---- the results


def halves_of(run):
    """Return {'val_loss_choose', 'val_loss_report': loss} of the run's final checkpoint.

    They are kept in halves.json, beside the checkpoint.
    """
    path = os.path.join(run.out_dir, 'halves.json')
    with suppress(OSError, ValueError, TypeError, KeyError):
        with open(path, encoding='utf-8') as f:
            kept = json.load(f)
        if kept['iter'] == run.settings['max_iters']:
            return {key: float(report.finite_or_inf(kept[key])) for key in report.HALVES}
    losses = evaluate_halves(run)
    write(path, runlog.line({'iter': run.settings['max_iters'], **losses}).encode())
    return losses


def evaluate_halves(run):
    """Evaluate the run's final checkpoint over each half of val.bin, nats a token.

    Each token of val.bin but the first is a target once. The halves meet at the end of a block, so
    that their sequences are those of the run's own evaluation.
    """
    import torch

    from data.tokens import TokenData, to_device
    from runtime import checkpoint
    from runtime.device import setup
    from runtime.distributed import Ranks

    path, settings = os.path.join(run.out_dir, 'ckpt.pt'), run.settings
    remedy = f'leave --halves out, or delete {run.out_dir}, and this command makes that run again'
    if not os.path.exists(path):
        fail(f'--halves evaluates {path}, which is not there; {remedy}')
    model, saved = checkpoint.load_model(path)
    if saved['iter_num'] != settings['max_iters']:
        fail(f'{path} is of iteration {saved["iter_num"]}, not of the last; {remedy}')
    rt = setup(settings['device'], settings['dtype'])
    model.eval().to(rt.device)
    block_size = model.config.block_size
    folder = os.path.join('data', settings['dataset'])
    data = TokenData(folder, block_size, model.config.vocab_size)
    tokens = data.splits['val']
    middle = (len(tokens) - 1) // block_size // 2 * block_size
    if middle == 0:
        fail(f'{folder}/val.bin has no two blocks of {block_size} tokens; leave --halves out')

    @torch.no_grad()
    def loss_of(x, y):
        x, y = to_device((x, y), rt.device)
        with rt.autocast():
            return model(x, y)[1]

    losses = {}
    for key, half in zip(report.HALVES, (tokens[: middle + 1], tokens[middle:]), strict=True):
        data.splits['val'] = half
        batches = data.sequential('val', settings['batch_size'])
        losses[key] = report.finite_or_inf(Ranks().mean_loss(batches, loss_of))
    return losses


def parse(argv):
    """Return the arguments, and the settings for all configs."""
    parser = Arguments(__doc__, usage=USAGE, allow_abbrev=False)
    text = 'a config file; in quotes with its own settings'
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help=text)
    text = 'one run of every config with each'
    parser.add_argument('--seeds', default='1,2,3', help=text)
    text = 'where the runs and the report go'
    parser.add_argument('--out', required=True, metavar='FOLDER', help=text)
    text = 'runs at a time; default: one for each GPU, or else for each core'
    parser.add_argument('--jobs', type=int, help=text)
    text = 'choose by the first half of val.bin, report the second'
    parser.add_argument('--halves', action='store_true', help=text)
    args, common = parser.parse_known_args(argv)
    for word in common:
        if not re.match('--[^=]+=', word):
            fail(f'{word} is not --key=value; CONFIGs go before all options')
    most = 8 * os.cpu_count()
    if args.jobs is not None and not 1 <= args.jobs <= most:
        fail(f'--jobs={args.jobs} must be from 1 to {most}, which is 8 for each core')
    return args, common


def main(argv):
    args, common = parse(argv)
    seeds = seeds_of(args.seeds)
    configs = [config_of(text, common) for text in dict.fromkeys(args.configs)]
    reserved = ['--eval_iters=0']  # evaluate over the whole of val.bin
    if args.halves:
        reserved.append('--always_save_checkpoint=True')  # the last one, whatever its loss
    add_runs(configs, seeds, args.out, reserved)
    runs = [run for config in configs for run in config.runs]
    check_settings(runs)

    missing = [run for run in runs if not is_finished(run)]
    folder = os.path.join(args.out, 'runs')
    made = os.path.join(folder, 'made.jsonl')
    if missing:
        jobs = min(args.jobs or len(visible_gpus()) or os.cpu_count(), len(missing))
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
    for config in configs:
        for run in config.runs:
            run.result = report.result_of(run, config)
    if args.halves:
        for run in tqdm(runs, desc='halves of val.bin', unit='run', leave=False, disable=None):
            run.result.update(halves_of(run))

    results = ''.join(runlog.line(run.result) for run in runs)
    write(os.path.join(folder, 'results.jsonl'), results.encode())
    pictures = report.draw(configs, args.out)
    path = os.path.join(args.out, 'report.md')
    text = report.text(configs, args.out, argv, pictures, read_made(made), args.halves)
    write(path, text.encode())
    print(path)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as on Ctrl-C
    with border('fix that, then run the same command again'):
        try:
            main(sys.argv[1:])
        except KeyboardInterrupt:
            print('stopped; the same command goes on', file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
