"""Write and read a run's log, out_dir/log.jsonl: one JSON object a line, flushed as it is written.

`kind` names the type of an entry:

config   the settings
train    iter, loss, lr, grad_norm, ms, tokens_per_s, mfu, skipped_steps; `spike` if Watch saw one
eval     iter, train_loss, val_loss
norms    iter, ratio, tensors: {name: {norm, ratio, kappa, lagmul}}
damaged  iter, path and reason of an unreadable checkpoint, used: the one read in its place

Weights & Biases and TensorBoard, if enabled, chart the same entries. plot.py reads only this file.
"""

import errno
import fcntl
import json
import math
import os
import sys
from contextlib import suppress
from functools import partial

from runtime import fail

NAME = 'log.jsonl'


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
        except ValueError:
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
        # draw() creates the files: until RunLog has the lock, out_dir may be another run's
        self.make = partial(make, os.path.join(out_dir, 'tensorboard'), purge_step=iter_num)
        self.writer = None

    def draw(self, iter_num, values):
        if self.writer is None:
            self.writer = self.make()
        for name, value in values.items():
            self.writer.add_scalar(name, value, iter_num)
        self.writer.flush()

    def close(self):
        if self.writer is not None:
            self.writer.close()


class RunLog:
    """Append to out_dir/log.jsonl, and draw the entries on `charts`.

    A run that continues at `iter_num` first drops the entries that it will write again.
    With out_dir None it writes nothing, which all ranks but one use.
    """

    def __init__(self, out_dir, iter_num=0, charts=()):
        self.charts, self.file = charts, None
        if out_dir is None:
            return
        os.makedirs(out_dir, exist_ok=True)
        self.path = os.path.join(out_dir, NAME)
        # the system releases the lock when this process ends, even if it is killed
        self.lock = open(os.path.join(out_dir, '.lock'), 'w')
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = 'wait until it is done, or choose another --out_dir'
            fail(f'another run is writing to {out_dir}; {remedy}')
        kept = []
        if iter_num > 0 and os.path.exists(self.path):
            kept = [e for e in read(out_dir) if e.get('iter', -1) < iter_num]
        temporary = f'{self.path}.tmp'
        try:
            with open(temporary, 'w', encoding='utf-8') as f:
                f.writelines(line(e) for e in kept)
            os.replace(temporary, self.path)
        except OSError:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        self.file = open(self.path, 'ab', buffering=0)  # a kill loses nothing that was written

    def write(self, kind, **entry):
        if self.file is None:
            return
        try:
            written = line({'kind': kind, **entry}).encode()
            if self.file.write(written) < len(written):  # the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            problem = f'could not write {self.path} ({e.strerror})'
            fail(f'{problem}; make room, then go on with --init_from=auto')
        values = _charted(kind, entry)
        for chart in self.charts if values else ():
            chart.draw(entry['iter'], values)

    def close(self):
        for chart in self.charts:
            chart.close()
        if self.file is not None:
            self.file.close()
            self.lock.close()


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
