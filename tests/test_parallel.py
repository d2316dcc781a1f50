"""train.py under torchrun: one run, on any number of processes and whatever happens to them."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
from conftest import ROOT, TINY
from helpers import processes

from runtime import checkpoint
from runtime import log as runlog

SAME = [
    *TINY,
    '--gradient_accumulation_steps=4',
    '--max_iters=50',
    '--lr_decay_iters=50',
    '--eval_interval=25',
    '--eval_iters=5',
]
CPR = ['--optimizer=adamcpr', '--reg_step_size=5']


def launcher(count, *options):
    return [
        sys.executable,
        *('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}'),
        *options,
    ]


def torchrun(count, out_dir, dataset, *arguments, launch=(), limit=180):
    """Start train.py on `count` processes; return torchrun's, which ends after `limit` seconds."""
    command = [
        *launcher(count, *launch),
        *('train.py', *SAME, f'--dataset={dataset}', f'--out_dir={out_dir}', *arguments),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    process.watchdog = threading.Timer(limit, process.terminate)  # torchrun then ends the others
    process.watchdog.daemon = True
    process.watchdog.start()
    return process


def finish(process):
    """(status, standard output, standard error without what torchrun adds)."""
    out, err = process.communicate()
    process.watchdog.cancel()
    return process.returncode, out, re.split(r'\nE\d{4} ', err)[0]


def values(out_dir, kind, field):
    return {e['iter']: e[field] for e in runlog.read(str(out_dir)) if e['kind'] == kind}


def workers(process):
    """Return the children of torchrun that it gave a session of their own."""
    children = open(f'/proc/{process.pid}/task/{process.pid}/children').read().split()
    return [pid for pid in map(int, children) if os.getsid(pid) == pid]


@pytest.fixture(scope='module')
def alone(dataset, tmp_path_factory):
    """The out_dir of a run in one process, AdamCPR's, to compare the others with."""
    out = tmp_path_factory.mktemp('alone')
    command = [
        sys.executable,
        'train.py',
        *SAME,
        *CPR,
        f'--dataset={dataset}',
        f'--out_dir={out}',
        '--dropout=0.1',
    ]
    subprocess.run(
        command,
        cwd=ROOT,
        check=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
    )
    return out


def same_run(out_dir, other, ended=None):
    """Assert that the logs agree up to the order of sums, and that nothing is in them twice.

    ended: the iteration at which the first of them ended before it was made longer. The norms of
    that are in its log as well.
    """
    losses = values(out_dir, 'train', 'loss')
    assert losses == pytest.approx(values(other, 'train', 'loss'), rel=1e-5) and len(losses) == 50
    for field in ('train_loss', 'val_loss'):
        ours, theirs = (values(out, 'eval', field) for out in (out_dir, other))
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = (values(out, 'norms', 'tensors') for out in (out_dir, other))
    assert (ended in ours) == (ended is not None)
    ours.pop(ended, None)
    assert ours.keys() == theirs.keys()
    for i in ours:
        for name, tensor in ours[i].items():
            unset = {
                key for key, value in tensor.items() if value is None
            }  # kappa, until it is set
            assert unset == {key for key, value in theirs[i][name].items() if value is None}, (
                i,
                name,
            )
            known, wanted = (
                {k: v for k, v in t.items() if k not in unset} for t in (tensor, theirs[i][name])
            )
            angles = known.pop('angle', 0), wanted.pop('angle', 0)  # of rounded norms
            assert angles[0] == pytest.approx(angles[1], rel=1e-2)
            assert known == pytest.approx(wanted, rel=1e-4, abs=1e-7), (i, name)
    kinds = [e['kind'] for e in runlog.read(str(out_dir))]
    norms = 26 if ended is None else 27
    assert [kinds.count(kind) for kind in ('train', 'eval', 'norms')] == [50, 3, norms]


@pytest.mark.parametrize(
    'engine, count', [('ddp', 4), ('zero', 2), ('fsdp --fsdp_shard_size=2', 4)]
)
def test_a_run_is_the_same_on_any_number_of_processes(alone, dataset, tmp_path, engine, count):
    arguments = [*CPR, '--dropout=0.1', *f'--parallel={engine}'.split()]
    status, out, err = finish(torchrun(count, tmp_path / 'out', dataset, *arguments))
    assert status == 0, err
    same_run(tmp_path / 'out', alone)
    assert out.count('iter 49:') == 1


def test_wn_vectors_steers_sharded_vectors(dataset, tmp_path):
    steered = '--wn_vectors=True', '--wn_ratio=1.3', '--wn_rate=1.0', '--wn_ramp_iters=4'
    arguments = '--optimizer=adamwn', *steered, '--parallel=fsdp', '--max_iters=6'
    status, _, err = finish(torchrun(2, tmp_path, dataset, *arguments))
    assert status == 0, err
    ratios = {n: t['ratio'] for n, t in values(tmp_path, 'norms', 'tensors')[6].items()}
    assert 'transformer.ln_f.weight' in ratios
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.3), rel=1e-5)


def test_an_evaluation_gives_the_same_number_on_any_number_of_processes(alone, dataset, tmp_path):
    command = [
        sys.executable,
        'train.py',
        *SAME,
        *CPR,
        f'--dataset={dataset}',
        f'--out_dir={alone}',
        '--init_from=resume',
        '--eval_only=True',
        '--eval_iters=0',
    ]
    one = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True).stdout
    status, out, err = finish(torchrun(2, alone, dataset, *command[len(SAME) + 2 :]))
    assert status == 0 and 'val loss' in one and out == one, err


@pytest.mark.parametrize(
    'number', [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_to_torchrun_ends_the_run_with_a_checkpoint_that_it_goes_on_from(
    alone, dataset, tmp_path, number
):
    process = torchrun(
        2,
        tmp_path,
        dataset,
        *CPR,
        '--dropout=0.1',
        '--max_iters=100000',
        launch=['--signals-to-handle=SIGTERM,SIGUSR1'],
    )
    for line in process.stdout:
        if line.startswith('iter 5:'):
            process.send_signal(number)
            break
    status, out, err = finish(process)
    assert status != 0 and f'stopped by {number.name}' in out
    saved = checkpoint.load(tmp_path / 'ckpt.pt')['iter_num']
    assert saved == max(values(tmp_path, 'train', 'loss')) + 1
    if saved >= 50:
        pytest.skip('the signal came after the iterations of the run to compare with')
    process = torchrun(2, tmp_path, dataset, *CPR, '--dropout=0.1', '--init_from=auto')
    assert finish(process)[0] == 0
    same_run(tmp_path, alone)


@pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_workers_are_started_again_and_the_run_ends_with_the_same_bits(
    dataset, tmp_path, kills
):
    length = [
        *CPR,
        '--dropout=0.1',
        f'--max_iters={60 + 12 * kills}',
        '--eval_interval=1000',
        '--eval_iters=1',
        '--checkpoint_interval=5',
        '--init_from=auto',
    ]
    assert finish(torchrun(2, tmp_path / 'whole', dataset, *length))[0] == 0
    process = torchrun(
        2, tmp_path / 'killed', dataset, *length, launch=[f'--max-restarts={kills}'], limit=600
    )
    chance, killed, lost, last = random.Random(0), 0, [], -1
    wanted = chance.randrange(1, 12)
    for line in process.stdout:
        if not line.startswith('iter '):
            continue
        at = int(line.split()[1].rstrip(':'))
        if at <= last:
            lost.append(last + 1 - at)
        last, wanted = at, wanted - 1
        if wanted == 0 and killed < kills:
            time.sleep(chance.random() * 0.02)
            os.kill(chance.choice(workers(process)), signal.SIGKILL)
            killed, wanted = killed + 1, chance.randrange(6, 17)  # as many after the restart
    status, _, err = finish(process)
    assert (status, killed) == (0, kills), err
    # an interval, and the one whose checkpoint was just being written
    assert max(lost, default=0) <= 2 * 5, lost
    for field in ('loss', 'grad_norm'):
        ours, theirs = (values(tmp_path / out, 'train', field) for out in ('killed', 'whole'))
        assert ours == theirs and len(ours) == 60 + 12 * kills
    ours, theirs = (checkpoint.load(tmp_path / out / 'ckpt.pt') for out in ('killed', 'whole'))
    assert all(torch.equal(ours['model'][name], theirs['model'][name]) for name in theirs['model'])
    print(f'{killed} kills, {sum(lost)} iterations trained again: {lost}')


def test_the_error_of_a_failing_process_is_the_first_thing_said(dataset, tmp_path, monkeypatch):
    status, out, err = finish(torchrun(2, tmp_path, dataset, '--learning_rat=1'))
    assert status != 0 and err.count('error: ') == 1, err
    status, out, err = finish(torchrun(2, tmp_path, dataset, '--gradient_accumulation_steps=3'))
    assert err.count('error: ') == 1 and 'choose a multiple of 2' in err
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(subprocess, 'Popen', processes.UsualPopen)  # as its user starts it
    process = torchrun(2, tmp_path, dataset, '--max_iters=100000', '--checkpoint_interval=10')
    for line in process.stdout:
        # the disk goes: the first rank cannot write its next checkpoint
        if line.startswith('iter 15:'):
            while not (tmp_path / 'ckpt.pt.tmp').is_dir():
                with suppress(FileExistsError):  # a checkpoint that is being written
                    (tmp_path / 'ckpt.pt.tmp').mkdir()
    status, out, err = finish(process)
    assert (
        status != 0
        and err.count('error: ') == 1
        and 'could not write' in err
        and 'Traceback' not in err
    ), err


# Triton's interpreter takes seconds a case: one of each function and order, the rest when asked to
SOME = ['cpr l2 before', 'cpr std before', 'cpr std after', 'cpr l1 before', 'cpr huber after']
SOME += ['wn global after', 'h']


@pytest.mark.parametrize(
    'impl, count, names, tolerance',
    [
        ('torch', 4, [], 2e-6),  # sums over shards round otherwise
        ('numba', 4, [], 2e-4),
        ('triton', 2, SOME, 2e-4),
        pytest.param('triton', 4, [], 2e-4, marks=pytest.mark.slow),
    ],
)
def test_optimizers_update_dtensors_as_they_do_whole_tensors(impl, count, names, tolerance):
    if impl != 'torch':
        pytest.importorskip(impl)
    command = 'tests/helpers/sharded_worker.py', impl, *names
    lines = work(count, *command, TRITON_INTERPRET='1').splitlines()
    worst = {name: float(value) for name, value in (line.rsplit(': ', 1) for line in lines)}
    assert worst.keys() == set(names) if names else len(worst) == 18
    assert max(worst.values()) <= tolerance, worst


def work(count, *command, limit=400, **environment):
    """The standard output of a script on `count` processes, which must succeed."""
    outcome = subprocess.run(
        [*launcher(count), *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


@pytest.mark.parametrize('count, engine, shard_size', [(2, 'zero', 0), (4, 'fsdp', 2)])
def test_zero_gathers_parameters_once_an_iteration_and_shards_all_else(count, engine, shard_size):
    found = json.loads(work(count, 'tests/helpers/engine_worker.py', engine, str(shard_size)))
    groups, micro_steps = found['groups'], len(found['gathered'])
    if engine == 'zero':
        assert found['gathered'] == [groups] * (micro_steps - 1) + [0]
        assert found['gathers'] == groups
    else:  # the blocks twice a micro-step, what is around them once
        assert found['gathered'] == [0] * micro_steps
        assert found['gathers'] == micro_steps * (2 * groups - 1)
    assert found['scatters'] == micro_steps * groups
    assert found['error'] < 1e-6
    for name in ('gradients', 'moments', 'after_step', 'after_evaluation'):
        assert found[name] == 0.5, name


ENDINGS = {  # what a script ends with, and its status
    'ranks.close()': 0,
    'ranks.close(); sys.exit()': 0,
    'ranks.close(); sys.exit(143)': 143,
    'fail("no")': 2,
    'raise ValueError("no")': 1,
    'ranks.close(); raise ValueError("no")': 1,
}


def test_a_process_of_torchrun_leaves_with_its_status_and_without_destructors():
    """gloo's threads abort a process, at times, whose interpreter is taken down beside them."""
    code = """
import atexit, sys
from runtime.distributed import start
from runtime.errors import fail

class Loud:
    def __del__(self):
        print('destroyed', flush=True)

loud, ranks = Loud(), start('ddp', 'cpu')
atexit.register(print, 'at exit')
print('said', end=', ')
"""
    processes = []
    for ending in (*ENDINGS, 'pass'):  # the last without torchrun
        with socket.socket() as free:
            free.bind(('localhost', 0))
            port = free.getsockname()[1]
        torchrun = dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='localhost', MASTER_PORT=str(port))
        processes.append(
            subprocess.Popen(
                [sys.executable, '-c', code + ending],
                cwd=ROOT,
                env={**os.environ, **({} if ending == 'pass' else torchrun)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    statuses = [process.returncode for process in processes]
    assert statuses == [*ENDINGS.values(), 0]
    assert outputs == ['said, at exit\n'] * len(ENDINGS) + ['said, at exit\ndestroyed\n']


@pytest.mark.slow
def test_every_engine_trains_alike_and_resumes_what_every_other_has_saved():
    outcome = subprocess.run(
        [sys.executable, 'scripts/compare_parallel.py', '--worlds=1,2'],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_folders_resume_under_any_engine_and_convert_to_one_file_and_back(
    alone, dataset, tmp_path, script
):
    saved = tmp_path / 'saved'
    arguments = [*CPR, '--dropout=0.1']
    status, _, err = finish(
        torchrun(
            2,
            saved,
            dataset,
            *arguments,
            '--parallel=fsdp',
            '--sharded_checkpoint=True',
            '--max_iters=25',
            '--checkpoint_interval=10',
        )
    )
    assert status == 0, err
    assert sorted(p.name for p in saved.glob('ckpt*')) == [
        'ckpt-000020',
        'ckpt-000025',
    ]  # keep_checkpoints=2
    for name in ('cut', 'file'):
        shutil.copytree(saved, tmp_path / name)

    assert (
        finish(torchrun(2, saved, dataset, *arguments, '--parallel=zero', '--init_from=auto'))[0]
        == 0
    )
    same_run(saved, alone, ended=25)

    # a truncated file in the newest folder, and a newer one whose writing was interrupted
    part = next((tmp_path / 'cut' / 'ckpt-000025').glob('*.distcp'))
    part.write_bytes(part.read_bytes()[:-10])
    shutil.copytree(tmp_path / 'cut' / 'ckpt-000020', tmp_path / 'cut' / 'ckpt-000030')
    (tmp_path / 'cut' / 'ckpt-000030' / '.metadata').unlink()
    run = ['train.py', *SAME, *arguments, f'--dataset={dataset}', '--init_from=auto']
    outcome = script(*run, f'--out_dir={tmp_path / "cut"}')
    assert (
        outcome.status == 0
        and 'ckpt-000025 is damaged' in outcome.out
        and 'at iteration 20' in outcome.out
    )
    same_run(tmp_path / 'cut', alone)

    unfinished = tmp_path / 'cut' / 'ckpt-000030'
    for mistake in (
        (*run[:-1], f'--init_from={unfinished}', f'--out_dir={tmp_path / "new"}'),
        ('export.py', unfinished, tmp_path / 'new', '--to=file'),
        (
            'export.py',
            tmp_path / 'cut' / 'ckpt-000020',
            tmp_path / 'no' / 'folder' / 'ckpt.pt',
            '--to=file',
        ),
    ):
        outcome = script(*mistake)
        assert (
            outcome.status == 2
            and outcome.err.startswith('error: ')
            and outcome.err.count('\n') == 1
        )
        assert not (tmp_path / 'new').exists()
    (tmp_path / 'cut' / 'ckpt-000020' / 'run.pt').write_bytes(b'')
    assert checkpoint.damage(tmp_path / 'cut' / 'ckpt-000020').startswith('run.pt')

    folder, file = tmp_path / 'file' / 'ckpt-000025', tmp_path / 'file' / 'ckpt.pt'
    for source, target, kind in (
        (folder, file, 'file'),
        (file, tmp_path / 'again', 'folder'),
        (tmp_path / 'again', tmp_path / 'again.pt', 'file'),
    ):
        assert script('export.py', source, target, f'--to={kind}').status == 0
    one, two = checkpoint.load(file), checkpoint.load(tmp_path / 'again.pt')
    assert one.keys() == two.keys()
    assert all(torch.equal(one['model'][name], two['model'][name]) for name in one['model'])
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= one.keys()
    shutil.rmtree(folder)
    assert script(*run, f'--out_dir={tmp_path / "file"}').status == 0
    same_run(tmp_path / 'file', alone, ended=25)
