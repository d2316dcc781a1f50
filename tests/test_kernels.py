"""The passes over memory: Numba's kernels beside plain PyTorch's, and what becomes of a process."""

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Barrier, current_thread, main_thread

import pytest
import torch
from helpers.optimizers import VARIANTS, copies, gradient_steps, make, parameters, same_bits, train
from helpers.passes import REGS, Problem, difference

from cpr import AdamW
from nanonorm.kernels import plain
from nanonorm.kernels.tensors import CHUNK

ROOT = Path(__file__).resolve().parent.parent
SIZES = [1, 0, 7, 33, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17]
WEIGHT_AND_STATE = 3e-6  # a few roundings of float32


@pytest.fixture
def cpu():
    return pytest.importorskip('nanonorm.kernels.cpu', reason='no Numba')


# ---- pass by pass


@pytest.mark.parametrize('reg', REGS)
@pytest.mark.parametrize('offset, missing', [(0, ()), (1, ()), (3, (0, 4, 8))])
def test_numba_updates_what_plain_torch_does(cpu, reg, offset, missing):
    ours, theirs = (Problem(k, SIZES, reg, offset=offset, missing=missing) for k in (cpu, plain))
    before = [x.clone() for x in ours.tensors]
    for _ in range(2):
        for problem in (ours, theirs):
            problem.adam_()
        assert difference(ours.tensors, theirs.tensors) < WEIGHT_AND_STATE
        for problem in (ours, theirs):
            problem.correct_()
        assert difference(ours.t.params, theirs.t.params) < WEIGHT_AND_STATE
        sums = [problem.moments_() for problem in (ours, theirs)]
        torch.testing.assert_close(*sums, rtol=1e-6, atol=1e-3)
        assert difference(ours.tensors, theirs.tensors) < WEIGHT_AND_STATE
        for problem in (ours, theirs):
            problem.apply_()
        assert difference(ours.tensors, theirs.tensors) < WEIGHT_AND_STATE
    n = len(SIZES)
    for j, size in enumerate(SIZES):
        unchanged = [torch.equal(ours.tensors[i], before[i]) for i in (j, j + n, j + 2 * n)]
        assert unchanged == [j in missing or size == 0] * 3


@pytest.mark.parametrize('reg', REGS)
@pytest.mark.parametrize('offset, missing', [(0, ()), (1, (0, 4, 8))])
def test_numba_sums_what_plain_torch_does(cpu, reg, offset, missing):
    ours, theirs = (Problem(k, SIZES, reg, offset=offset, missing=missing) for k in (cpu, plain))
    for step in (lambda problem: None, Problem.adam_, Problem.correct_):
        for problem in (ours, theirs):
            step(problem)
        squares = ours.grad_squares()
        torch.testing.assert_close(squares, theirs.grad_squares(), rtol=1e-6, atol=0)
        assert squares.dtype == torch.float64
        # what cancels in the sum of elements does not in that of their sizes
        for a, b in zip(ours.reg_sums(), theirs.reg_sums(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize('kernels', ['plain', 'cpu'])
def test_a_step_that_does_not_proceed_writes_nothing(kernels):
    kernels = pytest.importorskip(f'nanonorm.kernels.{kernels}')
    problem = Problem(kernels, SIZES)
    problem.t.set_grads([torch.full_like(p, float('nan')) for p in problem.t.params])
    problem.proceed = torch.tensor(False)
    before = [x.clone() for x in problem.tensors]
    for step in (problem.adam_, problem.correct_, problem.moments_, problem.apply_):
        step()
    assert same_bits(before, problem.tensors)


@pytest.mark.parametrize('reg', REGS)
def test_the_sums_kept_from_an_update_are_those_of_reading_the_weights_to_the_last_bit(cpu, reg):
    """A resumed run, which reads them, decides what the run that was never stopped does."""
    sizes = [*range(70), 100, 1000, *SIZES]
    ours = Problem(cpu, sizes, reg)
    ours.adam_()
    anew = cpu.Tensors(ours.t.params, reg)
    anew.set_grads([None] * len(sizes))
    assert torch.equal(ours.reg_sums(), cpu.reg_sums(anew))


def test_elements_beyond_2_to_the_31_are_found(cpu):
    """One chunk of a tensor of 2 ** 33 elements of which no other exists: the table says that the
    tensor starts as far before the chunk."""
    ours, whole = Problem(cpu, [CHUNK]), Problem(cpu, [CHUNK])
    start = 1 << 33
    ours.t.chunks[:, 1] += start
    ours.t.addresses -= 4 * start
    for problem in (ours, whole):
        problem.adam_()
    assert same_bits(ours.tensors, whole.tensors)
    assert torch.equal(ours.grad_squares(), whole.grad_squares())


@pytest.mark.parametrize('kernels', ['plain', 'cpu'])
def test_sums_over_many_elements_keep_their_digits(kernels):
    kernels = pytest.importorskip(f'nanonorm.kernels.{kernels}')
    x = torch.rand(10_000_001)
    exact = x.double().square().sum().item()
    t = kernels.Tensors([x])
    t.set_grads([x])
    assert kernels.grad_squares(t).item() == pytest.approx(exact, rel=1e-6)
    assert kernels.reg_sums(t)[0].item() == pytest.approx(exact, rel=1e-6)
    assert kernels.reg_sums(t)[1].item() == pytest.approx(x.double().sum().item(), rel=1e-6)


# ---- bits

MANY = [(4200, 511), (7,), (1, 1), (300, 300)]


@pytest.mark.parametrize('variant', ['cpr-dependent-after', 'cpr-inflection-after', 'wn', 'adamw'])
def test_numba_computes_the_same_bits_on_any_number_of_threads(cpu, variant):
    params = parameters(MANY)
    grads = gradient_steps(params, 4)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        alike = copies(params)
        runs.append(train(make(variant, alike, impl='numba', max_grad_norm=1.0), alike, grads))
    assert same_bits(runs[0], runs[1]) and same_bits(runs[0], runs[2])


def test_the_sum_over_all_gradients_has_the_same_bits_on_any_number_of_threads(cpu):
    problem, totals = Problem(cpu, SIZES), set()
    problem.t.grad_sums = torch.randn(200_000, 3) ** 21  # as many chunks as of 1.6G elements
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        totals.add(cpu.grad_squares(problem.t).item())
    assert len(totals) == 1


@pytest.mark.parametrize('variant', ['cpr-dependent-after', 'cpr-inflection-after', 'wn', 'adamw'])
def test_numba_computes_the_same_bits_among_other_tensors(cpu, variant):
    torch.set_num_threads(2)
    params = parameters(MANY)
    grads = gradient_steps(params, 4)
    alone, last = copies(params), copies(params)
    train(make(variant, alone[:1], impl='numba'), alone[:1], [g[:1] for g in grads])
    train(make(variant, last[::-1], impl='numba'), last, grads)
    assert torch.equal(alone[0], last[0])


# ---- processes


def python(code, **environment):
    """Run code in a process of its own, in the checkout; returns what it prints."""
    environment = {**os.environ, 'PYTHONPATH': 'tests', **environment}
    outcome = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout.strip()


START = """
import os, sys, torch
from torch import nn
torch.set_num_threads(2)

p = nn.Parameter(torch.ones(600, 600))  # enough for two threads
p.grad = torch.ones_like(p)

def step(optimizer):
    optimizer.step()
    return float(p.detach()[-1].sum())
"""


def test_a_forked_child_takes_steps_as_its_parent_does(cpu):
    """No thread goes with a child. PyTorch's own threads hang there: it works on small tensors."""
    fork = """
from cpr import AdamCPR
from nanonorm.kernels import numba_tools
optimizer = AdamCPR([p], impl='numba')
step(optimizer)
child = os.fork()
if child == 0:
    assert not numba_tools.threads
total = step(optimizer)
assert numba_tools.threads
if child == 0:
    print('child', total, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print('parent', total)
"""
    child, parent = python(START + fork).splitlines()
    assert child.split()[1] == parent.split()[1]


def test_a_child_that_is_forked_while_another_thread_compiles_a_kernel_takes_steps(cpu, tmp_path):
    """Numba holds a lock while it compiles, which no thread in the child would release."""
    fork = """
import gc
from threading import Event, Thread
from cpr import AdamW
from numba.core.event import Listener, install_listener

class Compiling(Listener):
    def on_start(self, event):
        compiles.set()

    def on_end(self, event):
        pass

compiles = Event()
optimizer = AdamW([p], impl='numba', lr=0.5, weight_decay=0.0)
with install_listener('numba:compile', Compiling()):
    thread = Thread(target=optimizer.step)
    thread.start()
    compiles.wait()
    child = os.fork()
if child == 0:
    q = nn.Parameter(torch.ones(3))
    q.grad = torch.ones_like(q)
    AdamW([q], impl='numba', lr=0.5, weight_decay=0.0).step()
    print(round(q.sum().item(), 3), gc.isenabled(), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
thread.join()
print(gc.isenabled())
"""
    printed = python(START + fork, NUMBA_CACHE_DIR=str(tmp_path)).split()
    assert printed == ['1.5', 'True', 'True']


@pytest.mark.parametrize('failing', [0, 5])
def test_an_exception_in_any_thread_reaches_the_caller_when_all_have_ended(cpu, failing):
    torch.set_num_threads(2)
    both, ended = Barrier(2, timeout=60), []

    def work(begin, end, failing):
        both.wait()  # so that each thread has one span
        if begin == failing:
            raise KeyError(begin)
        time.sleep(0.2)
        ended.append((begin, end))

    with pytest.raises(KeyError):
        cpu.share(work, 10, 1 << 20, failing)
    assert len(ended) == 1
    cpu.share(work, 10, 1 << 20, None)
    assert sorted(ended[1:]) == [(0, 5), (5, 10)]


def test_ctrl_c_is_raised_when_the_other_threads_have_ended(cpu):
    torch.set_num_threads(2)
    both, ended = Barrier(2, timeout=60), []

    def work(begin, end):
        both.wait()
        if current_thread() is not main_thread():
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)  # the main thread waits
            time.sleep(0.2)
            ended.append((begin, end))

    with pytest.raises(KeyboardInterrupt):
        cpu.share(work, 10, 1 << 20)
    assert len(ended) == 1


def test_a_thread_that_does_not_wake_is_not_waited_for(cpu, monkeypatch):
    torch.set_num_threads(3)
    monkeypatch.setattr('nanonorm.kernels.numba_tools.threads', [None, None])  # nobody listens
    monkeypatch.setattr('nanonorm.kernels.numba_tools.tasks', SimpleQueue())
    done = []
    cpu.share(lambda begin, end: done.append((begin, end)), 10, 1 << 20)
    assert done == [(0, 3), (3, 6), (6, 10)]


def test_two_threads_step_two_optimizers_as_one_does(cpu):
    torch.set_num_threads(2)
    params = parameters(MANY)
    grads = gradient_steps(params, 4)
    alike = [copies(params) for _ in range(3)]
    optimizers = [make('cpr-inflection', p, impl='numba') for p in alike]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(train, optimizers[:2], alike[:2], [grads, grads]))
    alone = train(optimizers[2], alike[2], grads)
    assert same_bits(runs[0], alone) and same_bits(runs[1], alone)


@pytest.mark.parametrize('enabled', [True, False])
def test_garbage_collection_is_off_only_while_a_kernel_is_compiled(cpu, enabled, monkeypatch):
    from numba import njit
    from numba.core.errors import TypingError
    from numba.core.event import Listener, install_listener

    class Noted(Listener):
        def on_start(self, event):
            seen.append(gc.isenabled())

        def on_end(self, event):
            pass

    tensors, seen = Problem(cpu, [5]).t, []
    good, bad = njit(lambda begin, end, table: None), njit(lambda begin, end, table: begin.missing)
    (gc.enable if enabled else gc.disable)()
    try:
        with install_listener('numba:compile', Noted()):
            cpu._run(good, tensors)
            assert seen == [False] and gc.isenabled() == enabled
            with pytest.raises(TypingError):
                cpu._run(bad, tensors)
            assert seen == [False, False] and gc.isenabled() == enabled
        monkeypatch.setattr(cpu, 'loading', None)
        cpu._run(good, tensors)
    finally:
        gc.enable()


def test_no_folder_for_compiled_code_is_no_reason_to_fail(cpu):
    step = """
from cpr import AdamW
optimizer = AdamW([p], impl='numba', lr=0.5, weight_decay=0.0)
print(step(optimizer))
from nanonorm.kernels import cpu
print(cpu._adam.stats.cache_path)
"""
    environment = {
        'NUMBA_CACHE_DIR': '/proc/nowhere',
        'NUMBA_CACHE_LOCATOR_CLASSES': 'UserProvidedCacheLocator',
    }
    total, folder = python(START + step, **environment).splitlines()
    assert float(total) == pytest.approx(0.5 * 600) and folder == 'None'


# ---- packages that are not installed


@pytest.fixture
def without(monkeypatch):
    """without('numba'): as if it were not installed."""

    def remove(package):
        loaded = [name for name in sys.modules if name.split('.')[0] == package]
        kernels = 'cpu' if package == 'numba' else 'gpu'
        for name in [*loaded, f'nanonorm.kernels.{kernels}']:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, package, None)

    return remove


@pytest.mark.parametrize('variant', VARIANTS)
def test_without_numba_plain_torch_is_taken(variant, without):
    without('numba')
    auto, plain_torch = parameters(), parameters()
    grads = gradient_steps(auto, 5)
    train(make(variant, auto), auto, grads)
    train(make(variant, plain_torch, impl='torch'), plain_torch, grads)
    assert same_bits(auto, plain_torch)


@pytest.mark.parametrize('package', ['numba', 'triton'])
def test_an_implementation_that_is_not_installed_is_refused_by_its_name(package, without):
    without(package)
    with pytest.raises(ValueError, match=f'pip install {package}'):
        AdamW(parameters(), impl=package)


def test_numba_is_refused_for_what_it_does_not_take_and_auto_takes_plain_torch(cpu):
    for dtype in (torch.bfloat16, torch.float16):
        params = parameters(dtype=dtype)
        with pytest.raises(ValueError, match=f"impl='numba'.*parameter 0.*{dtype}"):
            AdamW(params, impl='numba')
        train(AdamW(params), params, gradient_steps(params, 2))


def test_importing_the_optimizers_imports_neither_numba_nor_triton():
    """The first takes a second, and either may be missing."""
    code = "import sys, cpr; print([x for x in ('numba', 'triton') if x in sys.modules])"
    assert python(code) == '[]'
