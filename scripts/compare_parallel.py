"""Train a small model under every engine on the CPU, and print two tables of the differences.

    python scripts/compare_parallel.py              1, 2 and 4 processes; some minutes
    python scripts/compare_parallel.py --worlds=1,2

The first table has each run's final validation loss and its largest relative difference in a
training loss from the run in one process. The second has the same measure of runs that resume under
one engine what another has saved. The exit status is 1 if a difference is more than 1e-5.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.tokenizers import CharTokenizer  # noqa: E402
from data.writer import write_dataset  # noqa: E402
from runtime import log as runlog  # noqa: E402
from runtime.errors import Arguments, fail  # noqa: E402

ITERATIONS = 50
SAVED_AT = 25
LIMIT = 1e-5
SETTINGS = [
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=16',
    '--block_size=16',
    '--batch_size=4',
    '--gradient_accumulation_steps=4',
    '--device=cpu',
    '--dtype=float32',
    '--compile=False',
    '--eval_interval=25',
    '--eval_iters=5',
    '--learning_rate=1e-2',
    '--min_lr=1e-3',
    '--warmup_iters=2',
    f'--lr_decay_iters={ITERATIONS}',
]
OPTIMIZERS = {
    'AdamW': ['--optimizer=adamw'],
    'AdamCPR': ['--optimizer=adamcpr', '--reg_step_size=5'],
    'AdamWN': ['--optimizer=adamwn', '--wn_rate=0.3', '--wn_ramp_iters=20', '--wn_from=WN_FROM'],
    'AdamH': ['--optimizer=adamh', '--adamh_step_scale=2'],
}


def work(jobs):
    """Run train.py in this process, once for each list of arguments in the file `jobs`."""
    stdout = sys.stdout
    for number, arguments in enumerate(json.loads(Path(jobs).read_text())):
        # as after a restart, the ranks must not find the addresses of the run before
        os.environ['TORCHELASTIC_RESTART_COUNT'] = str(number)
        sys.argv, sys.stdout = ['train.py', *arguments], open(os.devnull, 'w')
        try:
            runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
        finally:
            sys.stdout = stdout


def launch(folder, world, jobs):
    """Let `world` processes do the jobs, [(name, arguments)]. Each writes to folder/name."""
    path, data = folder / 'jobs.json', f'--dataset={folder / "data"}'
    lists = [[*SETTINGS, data, f'--out_dir={folder / name}', *options] for name, options in jobs]
    path.write_text(json.dumps(lists))
    run = [sys.executable]
    if world > 1:
        run += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world}']
    environment = {'OMP_NUM_THREADS': '1', **os.environ}
    subprocess.run([*run, __file__, f'--work={path}'], cwd=ROOT, check=True, env=environment)


def losses(out_dir):
    return {e['iter']: e['loss'] for e in runlog.read(str(out_dir)) if e['kind'] == 'train'}


def difference(out_dir, reference):
    """Return the largest relative difference in a training loss. No iteration may be missing."""
    ours, theirs = losses(out_dir), losses(reference)
    expected = set(range(ITERATIONS))
    assert ours.keys() == theirs.keys() == expected, f'{out_dir} lacks iterations'
    return max(abs(ours[i] - theirs[i]) / theirs[i] for i in theirs)


def compare(folder, worlds):
    """Train and resume everything in `folder`.

    Returns (kinds, runs, cells). A kind of run is (engine, number of processes), runs has
    {(kind, optimizer): (validation loss, difference)}, cells {(saved, resumed): difference}.
    """
    sums = [f'{a}+{b}={a + b}\n' for a in range(50) for b in range(50)]
    tokenizer = CharTokenizer(sorted(set(''.join(sums))))
    documents = {'train': [''.join(sums[::7] + sums[1::7])], 'val': [''.join(sums[2::7])]}
    write_dataset(folder / 'data', documents, tokenizer, {})

    kinds = []
    for world in worlds:
        engines = ['one'] if world == 1 else ['ddp', 'zero', 'fsdp']
        kinds += [(engine, world) for engine in engines]
    for world in worlds:  # 1 comes first: the others take AdamWN's ratios from its AdamW
        jobs = []
        for kind, (name, options) in product(kinds, OPTIMIZERS.items()):
            if kind[1] != world:
                continue
            options = [o.replace('WN_FROM', str(folder / 'one-1-AdamW')) for o in options]
            options += parallel(kind)
            jobs.append((f'{folder_of(kind)}-{name}', [*options, f'--max_iters={ITERATIONS}']))
            if name == 'AdamCPR':
                jobs.append((f'saved-{folder_of(kind)}', [*options, f'--max_iters={SAVED_AT}']))
        launch(folder, world, jobs)
    runs = {}
    for kind, name in product(kinds, OPTIMIZERS):
        out = folder / f'{folder_of(kind)}-{name}'
        val_loss = [e['val_loss'] for e in runlog.read(str(out)) if e['kind'] == 'eval'][-1]
        runs[kind, name] = val_loss, difference(out, folder / f'one-1-{name}')

    resume = [*OPTIMIZERS['AdamCPR'], '--init_from=resume', f'--max_iters={ITERATIONS}']
    cells = {}
    for world in worlds:
        jobs = []
        for saved, kind in product(kinds, kinds):
            if kind[1] == world:
                name = f'{folder_of(saved)}-to-{folder_of(kind)}'
                shutil.copytree(folder / f'saved-{folder_of(saved)}', folder / name)
                jobs.append((name, resume + parallel(kind)))
                cells[saved, kind] = name
        launch(folder, world, jobs)
    reference = folder / 'one-1-AdamCPR'
    cells = {cell: difference(folder / name, reference) for cell, name in cells.items()}
    return kinds, runs, cells


def parallel(kind):
    return [f'--parallel={kind[0]}'] if kind[1] > 1 else []


def folder_of(kind):
    return f'{kind[0]}-{kind[1]}'


def label(kind):
    return 'one process' if kind[1] == 1 else f'{kind[0]} x {kind[1]}'


def main(worlds):
    with tempfile.TemporaryDirectory() as folder:
        kinds, runs, cells = compare(Path(folder), worlds)
    rows = []
    for kind in kinds:
        losses, differences = zip(*(runs[kind, name] for name in OPTIMIZERS), strict=True)
        losses = [f'{val_loss:.6f}' for val_loss in losses]
        rows.append([label(kind), *losses, f'{max(differences):.1e}'])
    table(['engine x processes', *OPTIMIZERS, 'largest difference from one process'], rows)
    print()
    rows = [[label(saved), *(f'{cells[saved, kind]:.1e}' for kind in kinds)] for saved in kinds]
    table(['saved under', *map(label, kinds)], rows)
    worst = max([worst for _, worst in runs.values()] + list(cells.values()))
    return worst > LIMIT


def table(header, rows):
    print('| ' + ' | '.join(header) + ' |')
    print('|---' * len(header) + '|')
    for row in rows:
        print('| ' + ' | '.join(row) + ' |')


if __name__ == '__main__':
    arguments = Arguments(__doc__)
    text = 'numbers of processes, 1 first; default: %(default)s'
    arguments.add_argument('--worlds', default='1,2,4', metavar='1,N,...', help=text)
    arguments.add_argument('--work', help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.work:
        work(args.work)
    elif re.fullmatch('1(,[1-9][0-9]*)*', args.worlds):
        sys.exit(main([int(world) for world in args.worlds.split(',')]))
    else:
        fail(f'--worlds={args.worlds} must be numbers of processes, 1 first, as in 1,2,4')
