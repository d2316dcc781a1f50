"""Write and read a run's log, out_dir/log.jsonl: one JSON object a line, flushed as it is written.

`kind` names the type of an entry:

config   the settings
train    iter, loss, lr, grad_norm, ms, tokens_per_s, mfu, skipped_steps; `spike` if Watch saw one
eval     iter, train_loss, val_loss
norms    iter, ratio, step, angle, tensors: {name: {norm, ratio, step, angle, kappa, lagmul}},
         of matrices, embeddings included, and with wn_vectors of LayerNorm's weights.
         step: the length of the next step over the norm; angle: how far it turns, in degrees
damaged  iter, path and reason of an unreadable checkpoint, used: the one read in its place

Weights & Biases and TensorBoard, if enabled, chart the same entries. plot.py reads only this file.
"""

import errno
import fcntl
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from contextlib import contextmanager
from functools import cached_property, partial

from runtime.errors import fail
from runtime.files import replacing

NAME = 'log.jsonl'
INTERVALS = {'eval': 'eval_interval', 'norms': 'norm_log_interval'}  # the settings


def read(out_dir):
    """Return the log entries of the run in `out_dir`, dicts in the order written.

    Fails if there is no log or a line of it is damaged.
    """
    path = os.path.join(out_dir, NAME)
    if not os.path.isfile(path):
        fail(f'there is no {NAME} in {out_dir}: is it the out_dir of a run?')
    entries = []
    with open(path, encoding='utf-8', errors='replace') as f:
        lines = f.read().split('\n')
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError('not an object')
            entries.append(entry)
        except (ValueError, RecursionError):
            if number == len(lines):  # a killed process leaves half a line without a newline
                break
            fail(f'{path} is damaged at line {number}; delete that line')
    return entries


# the fields that an entry of each kind must have, and those that must be a number or null
REQUIRED = {
    'config': ('config',),
    'train': ('iter', 'loss'),
    'eval': ('iter', 'val_loss'),
    'norms': ('iter', 'ratio', 'tensors'),
}
NUMBERS = ('loss', 'val_loss', 'train_loss', 'ratio', 'ms', 'tokens_per_s', 'mfu')


def read_sound(out_dir):
    """Return read(out_dir) without the entries that lack a field or have one of another type.

    A note on standard error says how many were left out.
    """
    entries = read(out_dir)
    sound = [entry for entry in entries if _is_sound(entry)]
    if len(sound) < len(entries):
        damaged = f'{len(entries) - len(sound)} of its {len(entries)} entries are damaged'
        print(f'note: {os.path.join(out_dir, NAME)}: {damaged} and left out', file=sys.stderr)
    return sound


def _is_sound(entry):
    kind, iter_num = entry.get('kind'), entry.get('iter', 0)
    if not isinstance(kind, str) or any(key not in entry for key in REQUIRED.get(kind, ())):
        return False
    if type(iter_num) is not int or not 0 <= iter_num < 1 << 53:  # floats have each of them
        return False
    config, tensors = entry.get('config', {}), entry.get('tensors', {})
    if not isinstance(config, dict) or not isinstance(config.get('optimizer', ''), str):
        return False
    if not isinstance(tensors, dict) or not all(isinstance(t, dict) for t in tensors.values()):
        return False
    return all(_is_number(entry.get(key)) for key in NUMBERS)


def _is_number(value):
    return value is None or isinstance(value, float) or type(value) is int and abs(value) < 1 << 53


def final_ratios(out_dir, names):
    """Return (ratio of all tensors together, {name: its ratio}) at the end of the run in `out_dir`.

    Fails if its log has no norms, norms of others than the tensors `names`, or no finite ones.
    """
    norms = [entry for entry in read_sound(out_dir) if entry['kind'] == 'norms']
    problem, remedy = f'the run in {out_dir}', 'train both with the same n_layer and wn_vectors'
    if not norms:
        fail(f'{problem} recorded no norms; train it again with --norm_log_interval=100')
    tensors = norms[-1]['tensors']
    if tensors.keys() != set(names):
        fail(f'{problem} logged the norms of other tensors than this one; {remedy}')
    ratios = {name: of_tensor.get('ratio') for name, of_tensor in tensors.items()}
    for ratio in (norms[-1]['ratio'], *ratios.values()):
        if ratio is None or not _is_number(ratio):
            fail(f'{problem} ended with norms that are not all finite numbers; take another run')
    return norms[-1]['ratio'], ratios


class WandB:
    """Draw a run's charts on Weights & Biases. Fails if it does not start."""

    def __init__(self, project, name, config):
        try:
            import wandb

            self.run = wandb.init(project=project, name=name, config=config)
        except Exception as e:  # not installed, not logged in, no network
            remedy = 'pip install wandb and run wandb login, or set WANDB_MODE=offline'
            fail(f'wandb does not start ({e}); {remedy}')

    def draw(self, iter_num, values):
        self.run.log({'iter': iter_num, **values}, step=iter_num)

    def close(self):
        self.run.finish()


class TensorBoard:
    """Draw a run's charts in out_dir/tensorboard, in place of earlier points from `iter_num` on.

    Fails if tensorboard is not installed.
    """

    def __init__(self, out_dir, iter_num):
        try:
            from torch.utils.tensorboard import SummaryWriter as make
        except ImportError:
            fail('tensorboard is not installed; run: pip install tensorboard')
        self.make = partial(make, os.path.join(out_dir, 'tensorboard'), purge_step=iter_num)

    @cached_property
    def writer(self):  # creates files: until RunLog has the lock, out_dir may be another run's
        return self.make()

    def draw(self, iter_num, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, iter_num)
        self.writer.flush()

    def close(self):
        self.writer.close()


@contextmanager
def _writing_to(out_dir):
    """Fail if another run has the lock of the folder, or it cannot be written."""
    try:
        yield
    except BlockingIOError:
        remedy = 'wait until it is done, or choose another --out_dir'
        fail(f'another run is writing to {out_dir}; {remedy}')
    except OSError as e:
        problem = f"out_dir='{out_dir}' cannot be written ({e.strerror})"
        fail(f'{problem}; choose another with --out_dir=PATH')


class RunLog:
    """Append to out_dir/log.jsonl, and draw the entries on the charts that the settings ask for.

    A run that continues at `iter_num` first drops the entries that it will write again. With its
    first entry a new run overwrites an earlier log, which checkpoint.put_aside() may have renamed.
    writes: False for all ranks but one: they write and draw nothing.
    Fails if another run has the folder, or it cannot be written.
    """

    def __init__(self, settings, iter_num=0, writes=True):
        self.charts, self.file, self.writes = [], None, writes
        if not writes:
            return
        out_dir = settings['out_dir']
        if settings['tensorboard_log']:
            self.charts.append(TensorBoard(out_dir, iter_num))
        self.path, self.mode = os.path.join(out_dir, NAME), 'ab' if iter_num > 0 else 'wb'
        with _writing_to(out_dir):
            os.makedirs(out_dir, exist_ok=True)
            # the system releases the lock when this process ends, even if it is killed
            self.lock = open(os.path.join(out_dir, '.lock'), 'w')
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if settings['wandb_log']:
            names = settings['wandb_project'], settings['wandb_run_name']
            self.charts.append(WandB(*names, settings))
        if iter_num > 0 and os.path.exists(self.path):
            with _writing_to(out_dir):
                self._drop_entries_from(iter_num, settings)

    def _drop_entries_from(self, iter_num, settings):
        kept = []
        for entry in read(settings['out_dir']):
            interval = settings.get(INTERVALS.get(str(entry.get('kind'))))
            # the last entries of a run that ended here and is made longer are not written again
            ended = entry.get('iter') == iter_num < settings['max_iters']
            again = type(entry.get('iter')) is int and entry['iter'] >= iter_num
            if not again or ended and interval and iter_num % interval > 0:
                kept.append(entry)
        with replacing(self.path) as temporary, open(temporary, 'w', encoding='utf-8') as f:
            f.writelines(map(line, kept))

    def write(self, kind, **entry):
        if not self.writes:
            return
        try:
            if self.file is None:  # unbuffered: a kill loses nothing that was written
                self.file = open(self.path, self.mode, buffering=0)
            written = line({'kind': kind, **entry}).encode()
            if self.file.write(written) < len(written):  # the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            problem = f'could not write {self.path} ({e.strerror})'
            fail(f'{problem}; make room, or make it writable, and go on with --init_from=auto')
        values = _charted(kind, entry)
        for chart in self.charts if values else ():
            chart.draw(entry['iter'], values)

    def close(self):
        for chart in self.charts:
            chart.close()
        if self.file is not None:
            self.file.close()
            self.lock.close()


class Clock:
    """Time a run's iterations, and estimate how long the rest of it takes."""

    def __init__(self, iter_num, max_iters, eval_interval):
        self.max_iters, self.eval_interval, self.evaluation_seconds = max_iters, eval_interval, 0.0
        self.recent = deque(maxlen=20)
        self.start(iter_num)

    def start(self, iter_num):
        self.started, self.iter_num = time.perf_counter(), iter_num

    def lap(self, iter_num):
        """Return the seconds that each iteration before `iter_num` took since the last lap."""
        self.recent.append((time.perf_counter() - self.started) / (iter_num - self.iter_num))
        self.start(iter_num)
        return self.recent[-1]

    @contextmanager
    def evaluation(self, iter_num):
        started = time.perf_counter()
        yield
        self.evaluation_seconds = time.perf_counter() - started
        self.start(iter_num)

    def left(self):
        """Return the time left, evaluations included, after a lap: '2.1 h left'."""
        evaluations = -(-self.max_iters // self.eval_interval)  # in all, but the one at the start
        evaluations -= (self.iter_num - 1) // self.eval_interval
        seconds = (self.max_iters - self.iter_num) * statistics.median(self.recent)
        seconds += evaluations * self.evaluation_seconds
        for unit, size in (('d', 86400), ('h', 3600), ('min', 60)):
            if seconds >= 2 * size:
                return f'{seconds / size:.1f} {unit} left'
        return f'{seconds:.0f} s left'


class Watch:
    """Watch for losses that jump and for steps that are skipped in a row.

    factor: a loss above factor times the running average is a spike; 0.0 disables the check.
    average: (sum, weight) of an earlier Watch, to continue its average.
    """

    DECAY = 0.98  # the running average spans about 50 losses

    def __init__(self, factor, *average):
        self.factor, self.average = factor, average or (0.0, 0.0)
        self.iter_num = self.skipped = None
        self.in_a_row = 0

    def is_spike(self, loss):
        """Return whether `loss` is a spike or not finite, then add it to the average."""
        total, weight = self.average
        average = total / weight if weight else math.inf
        spike = self.factor > 0 and not loss <= self.factor * average
        if math.isfinite(loss):
            total = self.DECAY * total + (1 - self.DECAY) * loss
            weight = self.DECAY * weight + (1 - self.DECAY)
            self.average = (total, weight)
        return spike

    def skipped_in_a_row(self, iter_num, skipped):
        """Return how many steps up to iteration `iter_num` were skipped in a row.

        skipped: the number of skipped steps so far. The steps since the previous call count
        only if all of them were skipped.
        """
        if self.skipped is not None:
            every = iter_num - self.iter_num == skipped - self.skipped
            self.in_a_row = self.in_a_row + iter_num - self.iter_num if every else 0
        self.iter_num, self.skipped = iter_num, skipped
        return self.in_a_row


def _charted(kind, entry):
    """Return {chart: value} of an entry. Charts are named 'train/lr', 'val/loss', 'norm/TENSOR'."""
    if kind == 'train':
        values = {f'train/{key}': value for key, value in entry.items() if key != 'iter'}
    elif kind == 'eval':
        values = {'val/loss': entry['val_loss'], 'val/train_loss': entry['train_loss']}
    elif kind == 'norms':
        values = {'norm_ratio': entry['ratio']}
        for name, of_tensor in entry['tensors'].items():
            values |= {f'{key}/{name}': value for key, value in of_tensor.items()}
    else:
        values = {}
    return {k: v for k, v in values.items() if v is not None and math.isfinite(v)}


def line(entry):
    """Return `entry` as a line of JSON."""
    return json.dumps(_finite(entry)) + '\n'


def _finite(value):
    """Replace nan and infinity by None, because JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
