"""Train a small model under every engine and number of processes on the CPU, and make the README's two tables of it.

    python scripts/compare_parallel.py              1, 2 and 4 processes; some minutes
    python scripts/compare_parallel.py --worlds=1,2

The first table has the final validation loss of each run and the largest relative difference of a training loss from
the run in one process, the second what resuming under one engine costs after saving under another, in the same measure.
Ends with status 1 where a difference is more than 1e-5.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runlog  # noqa: E402
from data.prepare import CharTokenizer, write_dataset  # noqa: E402

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
}


def work(jobs):
    """Run train.py once for each list of arguments, all in this process (one of torchrun's, or the only one)."""
    stdout = sys.stdout
    for number, arguments in enumerate(json.loads(Path(jobs).read_text())):
        os.environ['TORCHELASTIC_RESTART_COUNT'] = str(
            number
        )  # as after a restart, ranks must not find old addresses
        sys.argv, sys.stdout = ['train.py', *arguments], open(os.devnull, 'w')
        try:
            runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
        finally:
            sys.stdout = stdout


def launch(folder, world, jobs):
    """Have `world` processes do the jobs, [(name, arguments)]: each writes to folder/name."""
    path = folder / 'jobs.json'
    path.write_text(
        json.dumps(
            [
                [
                    *SETTINGS,
                    f'--dataset={folder / "data"}',
                    f'--out_dir={folder / name}',
                    *arguments,
                ]
                for name, arguments in jobs
            ]
        )
    )
    run = [sys.executable]
    if world > 1:
        run += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world}']
    subprocess.run(
        [*run, __file__, f'--work={path}'],
        cwd=ROOT,
        check=True,
        env={'OMP_NUM_THREADS': '1', **os.environ},
    )


def losses(out_dir):
    return {e['iter']: e['loss'] for e in runlog.read(str(out_dir)) if e['kind'] == 'train'}


def difference(out_dir, reference):
    """The largest relative difference of a training loss; every iteration must be there."""
    ours, theirs = losses(out_dir), losses(reference)
    assert ours.keys() == theirs.keys() == set(range(ITERATIONS)), (
        f'{out_dir} does not have every iteration'
    )
    return max(abs(ours[i] - theirs[i]) / theirs[i] for i in theirs)


def compare(folder, worlds):
    """Train and resume everything in `folder`. Returns (rows of the first table, cells of the second)."""
    sums = [f'{a}+{b}={a + b}\n' for a in range(50) for b in range(50)]
    tokenizer = CharTokenizer(sorted(set(''.join(sums))))
    documents = {'train': [''.join(sums[::7] + sums[1::7])], 'val': [''.join(sums[2::7])]}
    write_dataset(folder / 'data', documents, tokenizer, {})

    kinds = [
        (engine, world)
        for world in worlds
        for engine in (['one'] if world == 1 else ['ddp', 'zero', 'fsdp'])
    ]
    for world in worlds:  # 1 comes first: the others take AdamWN's ratios from its AdamW
        jobs = []
        for (engine, _), (name, options) in product(
            [k for k in kinds if k[1] == world], OPTIMIZERS.items()
        ):
            options = [o.replace('WN_FROM', str(folder / 'one-1-AdamW')) for o in options]
            options += [f'--parallel={engine}'] if world > 1 else []
            jobs.append((f'{engine}-{world}-{name}', [*options, f'--max_iters={ITERATIONS}']))
            if name == 'AdamCPR':
                jobs.append((f'saved-{engine}-{world}', [*options, f'--max_iters={SAVED_AT}']))
        launch(folder, world, jobs)
    rows = []
    for (engine, world), name in product(kinds, OPTIMIZERS):
        out = folder / f'{engine}-{world}-{name}'
        val_loss = [e['val_loss'] for e in runlog.read(str(out)) if e['kind'] == 'eval'][-1]
        rows.append((engine, world, name, val_loss, difference(out, folder / f'one-1-{name}')))

    cells = {}
    for world in worlds:
        jobs = []
        for saved, (engine, _) in product(kinds, [k for k in kinds if k[1] == world]):
            name = f'{saved[0]}-{saved[1]}-to-{engine}-{world}'
            shutil.copytree(folder / f'saved-{saved[0]}-{saved[1]}', folder / name)
            options = [*OPTIMIZERS['AdamCPR'], '--init_from=resume', f'--max_iters={ITERATIONS}']
            jobs.append((name, options + ([f'--parallel={engine}'] if world > 1 else [])))
            cells[saved, (engine, world)] = name
        launch(folder, world, jobs)
    return rows, {
        cell: difference(folder / name, folder / 'one-1-AdamCPR') for cell, name in cells.items()
    }


def label(kind):
    return 'one process' if kind[1] == 1 else f'{kind[0]} x {kind[1]}'


def main(worlds):
    with tempfile.TemporaryDirectory() as folder:
        rows, cells = compare(Path(folder), worlds)
    print(
        '| engine x processes | optimizer | validation loss | largest difference from one process |'
    )
    print('|---|---|---|---|')
    for engine, world, name, val_loss, worst in rows:
        print(f'| {label((engine, world))} | {name} | {val_loss:.6f} | {worst:.1e} |')
    kinds = list(dict.fromkeys(saved for saved, _ in cells))
    print(
        '\n| saved under | ' + ' | '.join(f'resumed under {label(kind)}' for kind in kinds) + ' |'
    )
    print('|---' * (len(kinds) + 1) + '|')
    for saved in kinds:
        print(
            f'| {label(saved)} | '
            + ' | '.join(f'{cells[saved, kind]:.1e}' for kind in kinds)
            + ' |'
        )
    return max([row[-1] for row in rows] + list(cells.values())) > LIMIT


if __name__ == '__main__':
    option, _, value = (sys.argv[1:] or ['--worlds=1,2,4'])[0].partition('=')
    if option == '--work':
        work(value)
    else:
        sys.exit(main([int(world) for world in value.split(',')]))
