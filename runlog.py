"""out_dir/log.jsonl: what happened in a run, one JSON object a line, appended and flushed as it happens.

The same entries become the charts of Weights & Biases and TensorBoard, where those are asked for.

`kind` is 'config', 'train' (iter, loss, lr, grad_norm, ms, tokens_per_s, mfu, skipped_steps, and `spike` where Watch
saw one), 'eval' (iter, train_loss, val_loss), 'norms' (iter, ratio, tensors: {name: {norm, ratio, kappa, lagmul}}) or
'damaged' (iter, path, reason, used: a checkpoint that could not be read, and the one before it). plot.py reads nothing
else.
"""

import errno
import fcntl
import json
import math
import os
from contextlib import suppress
from functools import partial

from runtime import fail

NAME = 'log.jsonl'


def read(out_dir):
    """All entries of the run in `out_dir`, a list of dicts in the order written. Fails where there is no log."""
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
            if number == len(
                lines
            ):  # a process killed while it wrote leaves half a line without its newline
                break
            fail(f'{path} is damaged at line {number}; delete that line')
    return entries


class WandB:
    """Charts of a run on Weights & Biases. Fails where it does not start."""

    def __init__(self, project, name, config):
        try:
            import wandb

            self.run = wandb.init(project=project, name=name, config=config)
        except Exception as e:  # not installed, not logged in, no network
            fail(
                f'wandb does not start ({e}); pip install wandb and run wandb login, or set WANDB_MODE=offline'
            )

    def draw(self, iter_num, values):
        self.run.log({'iter': iter_num, **values}, step=iter_num)

    def close(self):
        self.run.finish()


class TensorBoard:
    """Charts of a run in out_dir/tensorboard, after those from before `iter_num`. Fails where it is not installed."""

    def __init__(self, out_dir, iter_num):
        try:
            from torch.utils.tensorboard import SummaryWriter as make
        except ImportError:
            fail('tensorboard is not installed; run: pip install tensorboard')
        # its files are made when there is something to draw: until RunLog has the lock, out_dir may be another run's
        self.make, self.writer = (
            partial(make, os.path.join(out_dir, 'tensorboard'), purge_step=iter_num),
            None,
        )

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
    """Appends to out_dir/log.jsonl. A run that continues at `iter_num` drops the entries that it will write again.

    charts: those that draw what is written, too. out_dir None: does nothing, as it should be on all ranks but one.
    """

    def __init__(self, out_dir, iter_num=0, charts=()):
        self.charts, self.file = charts, None
        if out_dir is None:
            return
        os.makedirs(out_dir, exist_ok=True)
        self.path = os.path.join(out_dir, NAME)
        self.lock = open(
            os.path.join(out_dir, '.lock'), 'w'
        )  # held until this process ends, however it does
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(
                f'another run is writing to {out_dir}; wait until it is done, or choose another --out_dir'
            )
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
        self.file = open(
            self.path, 'ab', buffering=0
        )  # what is written is in the file, whatever comes next

    def write(self, kind, **entry):
        if self.file is None:
            return
        try:
            written = line({'kind': kind, **entry}).encode()
            if self.file.write(written) < len(written):  # the last of the room on the disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            fail(
                f'could not write {self.path} ({e.strerror}); make room, then go on with --init_from=auto'
            )
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
    """Looks for numbers gone wrong: losses that jump, and steps that are skipped one after the other.

    factor: a loss over so many times the running average of those before it is a spike; 0.0: none is.
    average: (sum, weight) of an earlier Watch, to go on where that one was.
    """

    DECAY = 0.98  # of the running average: it looks back over some 50 losses

    def __init__(self, factor, *average):
        self.factor, self.average = factor, average or (0.0, 0.0)
        self.iter_num = self.skipped = None
        self.in_a_row = 0

    def is_spike(self, loss):
        """Whether `loss` is one, a loss that is not finite included. The next is compared with this one, too."""
        total, weight = self.average
        spike = self.factor > 0 and not loss <= self.factor * (
            total / weight if weight else math.inf
        )
        if math.isfinite(loss):
            self.average = (
                self.DECAY * total + (1 - self.DECAY) * loss,
                self.DECAY * weight + (1 - self.DECAY),
            )
        return spike

    def skipped_in_a_row(self, iter_num, skipped):
        """How many steps up to that of iteration `iter_num` were skipped in a row, given how many were in all.

        As far as the calls can tell: of the steps between two of them, all or none.
        """
        if self.skipped is not None:
            every = iter_num - self.iter_num == skipped - self.skipped
            self.in_a_row = self.in_a_row + iter_num - self.iter_num if every else 0
        self.iter_num, self.skipped = iter_num, skipped
        return self.in_a_row


def _charted(kind, entry):
    """{chart: value} of an entry: 'train/lr', 'val/loss', 'norm/transformer.h.0.attn.c_attn.weight' and so on."""
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
    return {
        name: value for name, value in values.items() if value is not None and math.isfinite(value)
    }


def line(entry):
    """`entry` as a line of JSON."""
    return json.dumps(_finite(entry)) + '\n'


def _finite(value):
    """JSON has no nan and no infinity: they become null, so that any reader can parse the line."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
