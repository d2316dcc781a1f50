"""Print the iteration that each tensor's kappa stems from, to norm_log_interval, as a table.

python results/detector/when.py results/detector
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime import log as runlog

when = {}  # {config: {tensor: [iteration, one a seed]}}
for log in sorted(Path(sys.argv[1]).glob('runs/*/*/log.jsonl')):
    entries = [e for e in runlog.read(log.parent) if e['kind'] == 'norms']
    for tensor, last in entries[-1]['tensors'].items():
        if 'kappa' in last:
            found = [e['iter'] for e in entries if e['tensors'][tensor].get('kappa') is not None]
            when.setdefault(log.parent.parent.name, {}).setdefault(tensor, []).append(
                found[0] if found else None
            )

tensors = list(next(iter(when.values())))
print('| tensor | ' + ' | '.join(when) + ' |')
print('|---' * (len(when) + 1) + '|')
for tensor in tensors:
    cells = [
        ', '.join('never' if i is None else str(i) for i in of[tensor]) for of in when.values()
    ]
    print(
        f'| `{tensor.removeprefix("transformer.").removesuffix(".weight")}` | '
        + ' | '.join(cells)
        + ' |'
    )
