"""out_dir/log.jsonl: what happened in a run, one JSON object a line, appended and flushed as it happens.

`kind` is 'config', 'train' (iter, loss, lr, grad_norm, ms, tokens_per_s, mfu), 'eval' (iter, train_loss, val_loss) or
'norms' (iter, ratio, tensors: {name: {norm, ratio, kappa, lagmul}}). plot.py reads nothing else.
"""

import errno
import fcntl
import json
import math
import os

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
            if number == len(lines):  # a process killed while it wrote leaves half a line without its newline
                break
            fail(f'{path} is damaged at line {number}; delete that line')
    return entries


class RunLog:
    """Appends to out_dir/log.jsonl. A run that continues at `iter_num` drops the entries that it will write again."""

    def __init__(self, out_dir, iter_num=0):
        self.path = os.path.join(out_dir, NAME)
        self.lock = open(os.path.join(out_dir, '.lock'), 'w')  # held until this process ends, however it does
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f'another run is writing to {out_dir}; wait until it is done, or choose another --out_dir')
        kept = []
        if iter_num > 0 and os.path.exists(self.path):
            kept = [e for e in read(out_dir) if e.get('iter', -1) < iter_num]
        temporary = f'{self.path}.tmp'
        try:
            with open(temporary, 'w', encoding='utf-8') as f:
                f.writelines(_line(e) for e in kept)
            os.replace(temporary, self.path)
        except OSError:
            os.unlink(temporary)
            raise
        self.file = open(self.path, 'ab', buffering=0)  # what is written is in the file, whatever comes next

    def write(self, kind, **entry):
        try:
            line = _line({'kind': kind, **entry}).encode()
            if self.file.write(line) < len(line):  # the last of the room on the disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            fail(f'could not write {self.path} ({e.strerror}); make room, then go on with --init_from=auto')

    def close(self):
        self.file.close()
        self.lock.close()


def _line(entry):
    return json.dumps(_finite(entry)) + '\n'


def _finite(value):
    """JSON has no nan and no infinity: they become null, so that any reader can parse the line."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
