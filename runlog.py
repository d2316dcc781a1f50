"""out_dir/log.jsonl: what happened in a run, one JSON object a line, appended and flushed as it happens.

`kind` is 'config', 'train' (iter, loss, lr, grad_norm, ms, tokens_per_s, mfu), 'eval' (iter, train_loss, val_loss) or
'norms' (iter, ratio, tensors: {name: {norm, ratio, kappa, lagmul}}). plot.py reads nothing else.
"""

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
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):  # a process killed while it wrote leaves half a line without its newline
                break
            fail(f'{path} is damaged at line {number}; delete that line')
    return entries


class RunLog:
    """Appends to out_dir/log.jsonl. A run that continues at `iter_num` drops the entries that it will write again."""

    def __init__(self, out_dir, iter_num=0):
        self.path = os.path.join(out_dir, NAME)
        kept = []
        if iter_num > 0 and os.path.exists(self.path):
            kept = [e for e in read(out_dir) if e.get('iter', -1) < iter_num]
        temporary = f'{self.path}.tmp'
        with open(temporary, 'w', encoding='utf-8') as f:
            f.writelines(_line(e) for e in kept)
        os.replace(temporary, self.path)
        self.file = open(self.path, 'ab', buffering=0)  # what is written is in the file, whatever comes next

    def write(self, kind, **entry):
        try:
            self.file.write(_line({'kind': kind, **entry}).encode())
        except OSError as e:
            fail(f'could not write {self.path} ({e.strerror}); make room, then go on with --init_from=auto')


def _line(entry):
    return json.dumps(_finite(entry)) + '\n'


def _finite(value):
    """JSON has no nan and no infinity: they become null, so that any reader can parse the line."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
