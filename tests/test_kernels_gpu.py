"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter.

What they are compiled to for GPUs that are not here is in the last part; that whole steps follow
the formulas, in test_optimizers.py.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton', reason='no Triton for this machine')

from helpers.optimizers import (
    VARIANTS,
    assert_same_state,
    copies,
    device_of,
    every_variant,
    gradient_steps,
    make,
    parameters,
    same_bits,
    train,
)
from helpers.passes import REGS, Problem, difference
from torch import nn

from cpr import AdamW
from nanonorm.kernels import gpu, plain
from nanonorm.kernels.tensors import CHUNK

ROOT = Path(__file__).resolve().parent.parent
DEVICE = device_of('triton')
needs_gpu = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
SIZES = [1, 0, 7, 1023, 1024, 1027, CHUNK + 1]
SMALL = [0, 7, 1029]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# a last digit of weights, that were rounded to the other side
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
every_dtype = pytest.mark.parametrize('dtype', DTYPES, ids=lambda d: str(d).rpartition('.')[2])


# ---- pass by pass


def both(sizes, *args, **kwargs):
    """The same problem for the kernels, on a GPU if there is one, and for PyTorch on the CPU."""
    ours, theirs = (Problem(k, sizes, *args, **kwargs) for k in (gpu, plain))
    return ours, theirs


def assert_close_sums(ours, theirs, sizes, dtype):
    """Sums of positive terms by their size, of others by the square root of their number."""
    half = dtype != torch.float32
    share = 0.02 if half else 1.0  # of the weights, which round to another side
    size = share * theirs.abs() + 3 * torch.tensor(sizes).to(ours).sqrt()
    assert ((ours - theirs).abs() <= (ROUNDING[dtype] if half else 1e-6) * size).all()


@pytest.mark.parametrize(
    'sizes, reg, dtype, offset, missing',
    [
        (SIZES, 'l2', torch.float32, 0, ()),
        (SIZES, 'l2', torch.float32, 1, (0, 4)),
        (SIZES, 'l2', torch.bfloat16, 0, ()),
        *((SMALL, reg, torch.float32, 0, ()) for reg in REGS),
        *((SMALL, reg, torch.bfloat16, 0, (1,)) for reg in ('l1', 'huber')),
        *((SMALL, 'l2', dtype, 3, ()) for dtype in (torch.bfloat16, torch.float16)),
        (SMALL, 'std', torch.float16, 0, ()),
    ],
)
def test_triton_updates_and_sums_what_plain_torch_does(sizes, reg, dtype, offset, missing):
    ours, theirs = both(sizes, reg, dtype, offset=offset, missing=missing)
    before = [x.clone() for x in ours.tensors]
    for step in (Problem.adam_, Problem.correct_):
        torch.testing.assert_close(ours.grad_squares(), theirs.grad_squares(), rtol=1e-6, atol=0)
        for problem in (ours, theirs):
            step(problem)
        assert difference(ours.t.params, theirs.t.params) <= ROUNDING[dtype]
        assert difference(ours.tensors[len(sizes) :], theirs.tensors[len(sizes) :]) < 3e-6
        assert_close_sums(ours.reg_sums(), theirs.reg_sums(), sizes, dtype)
    assert_close_sums(ours.moments_(), theirs.moments_(), sizes, dtype)
    for problem in (ours, theirs):
        problem.apply_()
    assert difference(ours.t.params, theirs.t.params) <= 2 * ROUNDING[dtype]
    assert difference(ours.tensors[len(sizes) :], theirs.tensors[len(sizes) :]) < 6e-6
    if dtype != torch.float32:
        pairs = list(zip(ours.t.params, theirs.t.params, strict=True))
        unequal = sum((p.cpu() != q).sum() for p, q in pairs)  # theirs are on the CPU
        assert unequal <= 0.01 * sum(p.numel() for p, _ in pairs)
    n = len(sizes)
    for j, size in enumerate(sizes):
        unchanged = [torch.equal(ours.tensors[i], before[i]) for i in (j, j + n, j + 2 * n)]
        assert unchanged == [j in missing or size == 0] * 3


def test_a_step_that_does_not_proceed_writes_nothing():
    problem = Problem(gpu, SMALL)
    problem.t.set_grads([torch.full_like(p, float('nan')) for p in problem.t.params])
    problem.proceed = torch.zeros_like(problem.proceed)
    before = [x.clone() for x in problem.tensors]
    sums = problem.reg_sums()
    problem.adam_()
    assert torch.equal(sums, problem.reg_sums())
    for step in (problem.correct_, problem.moments_, problem.apply_):
        step()
    assert same_bits(before, problem.tensors)


@pytest.mark.parametrize('reg', REGS)
def test_the_sums_kept_from_an_update_are_those_of_reading_the_weights_anew(reg):
    ours = Problem(gpu, SMALL, reg)
    ours.adam_()
    anew = gpu.Tensors(ours.t.params, reg)
    anew.set_grads([None] * len(SMALL))
    sums = gpu.reg_sums(anew).cpu()
    if gpu.INTERPRETED:
        assert torch.equal(ours.reg_sums(), sums)
    torch.testing.assert_close(ours.reg_sums(), sums, rtol=1e-6, atol=1e-4)


def test_elements_beyond_2_to_the_31_are_found():
    """One chunk of a tensor of 2 ** 33 elements of which no other exists: the table says that the
    tensor starts as far before the chunk."""
    ours, whole = Problem(gpu, [CHUNK]), Problem(gpu, [CHUNK])
    start = 1 << 33
    ours.t.chunks[:, 1] += start
    ours.t.addresses -= 4 * start
    for problem in (ours, whole):
        problem.adam_()
    assert same_bits(ours.tensors, whole.tensors)
    assert torch.equal(ours.grad_squares(), whole.grad_squares())


def test_elements_beside_a_tensor_are_not_touched():
    """Tensors are parts of one memory, as views of a flat buffer are."""
    sizes = [1, 6, 1023, 5, 1030]
    flat = [torch.full((sum(sizes) + 8 * len(sizes),), 7.0, device=DEVICE) for _ in range(4)]
    places, at = [], 3
    for n in sizes:
        places.append(slice(at, at + n))
        at += n + 8
    t = gpu.Tensors([flat[0][x] for x in places])
    for j, x in enumerate(places):
        t.set_moments(j, flat[2][x], flat[3][x])
    t.set_grads([flat[1][x] for x in places])
    problem = Problem(gpu, sizes)
    gpu.adam_(t, problem.coefficients, problem.hyper, problem.proceed)
    gpu.correct_(t, problem.coefficients, problem.proceed)
    between = torch.ones_like(flat[0], dtype=torch.bool)
    for x in places:
        between[x] = False
        assert all((memory[x] != 7).all() for memory in (flat[2], flat[3]))
    assert all((memory[between] == 7).all() for memory in flat)


# ---- launches and bits


def test_a_step_launches_each_pass_once_for_any_number_of_tensors(monkeypatch):
    launched, launch = [], gpu._launch

    def noted(kernel, *args, **kwargs):
        launched.append(kernel)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(gpu, '_launch', noted)
    params = parameters([(3, 3)] * 20, device=DEVICE)
    optimizer = make('cpr-dependent-after', params, impl='triton', order='before')
    train(optimizer, params, gradient_steps(params, 2))
    # the first step sums R besides, which no pass has written yet
    assert launched == [gpu._sums, gpu._sums, gpu._adam, gpu._sums, gpu._adam]


@pytest.mark.parametrize('variant', ['cpr-dependent-after', 'cpr-inflection-after', 'wn'])
def test_the_same_bits_twice_and_in_another_order_of_the_tensors(variant):
    params = parameters([(7,), (2, CHUNK // 2 + 9), (3, 5)], device=DEVICE)
    grads = gradient_steps(params, 2)

    def run(order):
        own = copies(params)
        optimizer = make(variant, [own[i] for i in order], impl='triton', max_grad_norm=None)
        train(optimizer, own, grads)
        return [x for p in own for x in (p, *optimizer.state[p].values()) if not x.isnan().any()]

    first = run([0, 1, 2])
    assert same_bits(first, run([0, 1, 2])) and same_bits(first, run([2, 0, 1]))


def test_on_the_cpu_triton_needs_its_interpreter(monkeypatch):
    monkeypatch.setattr(gpu, 'INTERPRETED', False)
    with pytest.raises(ValueError, match='TRITON_INTERPRET=1'):
        AdamW([nn.Parameter(torch.ones(3))], impl='triton')


# ---- ahead of time, for GPUs that are not here


@pytest.fixture(scope='module')
def ahead_of_time():
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    command = [sys.executable, 'tests/helpers/aot.py']
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of(ahead_of_time, name):
    return [row for row in ahead_of_time['kernels'] if row['kernel'].startswith(name)]


def test_kernels_of_every_dtype_are_compiled_for_three_generations_of_gpus(ahead_of_time):
    found = [(row['kernel'], row['arch']) for row in ahead_of_time['kernels']]
    assert set(found) == set(itertools.product(dict(found), (80, 90, 100)))
    for kernel in ('adam', 'correct', 'sums', 'moments', 'apply'):
        for dtype in ('fp32', 'bf16', 'fp16'):
            assert of(ahead_of_time, f'{kernel} {dtype}')


def test_no_kernel_spills_registers_and_adams_has_at_most_64(ahead_of_time):
    for row in ahead_of_time['kernels']:
        print({name: x for name, x in row.items() if name != 'loops'})
        assert row['spilled'] == 0 and row['registers'] <= 64


def test_no_loop_over_elements_waits_at_a_barrier(ahead_of_time):
    for row in ahead_of_time['kernels']:
        expected = 1 if row['kernel'] == 'totals' else 2  # aligned and other elements
        assert len(row['loops']) == expected
        assert all(loop['barriers'] == 0 for loop in row['loops']), row


@pytest.mark.parametrize('dtype, size', [('fp32', 4), ('bf16', 2), ('fp16', 2)])
def test_aligned_elements_are_accessed_four_a_lane_and_others_one(ahead_of_time, dtype, size):
    """16 bytes of float32 at once, 8 of the 16-bit weights and gradients."""
    rows = of(ahead_of_time, f'adam {dtype}')
    rows += of(ahead_of_time, f'correct {dtype}') + of(ahead_of_time, f'sums {dtype}')
    rows += of(ahead_of_time, f'moments {dtype}') + of(ahead_of_time, f'apply {dtype}')
    assert len({row['kernel'] for row in rows}) >= 5
    for row in rows:
        for loop, lane in zip(row['loops'], (4, 1), strict=True):
            weight, moment = lane * size, lane * 4
            loads, stores = {  # of weights or gradients, and of moments
                'adam': ((2, 2), (1, 2)),
                'moments': ((2, 2), (0, 2)),
                'apply': ((1, 2), (1, 0)),
                'correct': ((1, 0), (1, 0)),
                'sums': ((1, 0), (0, 0)),
            }[row['kernel'].split()[0]]
            assert sorted(loop['loads']) == sorted([weight] * loads[0] + [moment] * loads[1])
            assert sorted(loop['stores']) == sorted([weight] * stores[0] + [moment] * stores[1])


def test_nothing_is_compiled_after_the_second_step_whatever_the_schedule(ahead_of_time):
    first, later = zip(*ahead_of_time['compilations'].values(), strict=True)
    assert sum(first) > 0 and set(later) == {0}


# ---- on a GPU


@needs_gpu
@every_variant
def test_no_step_waits_for_the_device(variant):
    params = parameters(device=DEVICE)
    optimizer = make(variant, params, max_grad_norm=1.0)
    grads = gradient_steps(params, 3)
    train(optimizer, params, grads[:2])
    for p, g in zip(params, grads[2], strict=True):
        p.grad = g.to(DEVICE)
    torch.cuda.set_sync_debug_mode('error')
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@needs_gpu
@pytest.mark.parametrize('variant', VARIANTS)
def test_a_captured_step_replays_as_it_would_be_taken(variant):
    lr = torch.tensor(1e-2, device=DEVICE)
    eager, graphed = (parameters(device=DEVICE) for _ in range(2))
    optimizer, captured = (make(variant, p, lr=lr, max_grad_norm=1.0) for p in (eager, graphed))
    grads = gradient_steps(eager, 3)
    train(optimizer, eager, grads)
    train(captured, graphed, grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for t in range(20):
        for p, q in zip(eager, graphed, strict=True):
            q.grad.copy_(p.grad.normal_())
        lr.fill_(1e-2 / (t + 1))
        optimizer.step()
        graph.replay()
    assert same_bits(eager, graphed)
    assert_same_state(optimizer, captured)


@needs_gpu
def test_a_tensor_of_more_than_2_to_the_31_elements():
    p = nn.Parameter(torch.ones((1 << 31) + CHUNK + 5, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.ones_like(p)
    AdamW([p], lr=0.5, weight_decay=0.0).step()
    assert (p == 0.5).all()
