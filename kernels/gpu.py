"""The passes over memory as Triton kernels: one launch for all tensors, whatever their sizes.

Twins of those in kernels/plain.py. A kernel finds its tensors through the table of addresses of
tensors.Table, one program a chunk. A chunk's sums stand in `sums`, and `_totals` adds those of a
tensor in their order, so that the bits depend neither on the grid nor on the other tensors, and
nothing is added atomically.

Of a chunk whose tensors are all aligned, 4 elements a lane are accessed at a time (16 bytes in
float32); its last 0 to 3 elements, and tensors that are not aligned, one a lane.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from triton.language import constexpr

from kernels.tensors import Table as Tensors  # noqa: F401  (what these passes work on)

WARPS = 8
LANES = constexpr(32 * WARPS)
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: run on the CPU, slowly
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ---- the mathematics of one element


@triton.jit
def adam(g, m, v, beta1, rest1, beta2, rest2, eps, rsqrt_bias2):
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return m, v, m / (tl.sqrt_rn(v) * rsqrt_bias2 + eps)  # sqrt would flush a tiny v to 0


@triton.jit
def corrected(theta, d, shift, REG: constexpr):
    if REG == 'l1':
        new = theta - d * tl.where(theta > 0, 1.0, tl.where(theta < 0, -1.0, 0.0))
    elif REG == 'huber':
        new = theta - d * tl.minimum(tl.maximum(theta, -1.0), 1.0)
    else:
        new = (1 - d) * theta + shift
    return new


@triton.jit
def reg_term(theta, REG: constexpr):
    if REG == 'l1':
        term = tl.abs(theta)
    elif REG == 'huber':
        small = tl.minimum(tl.abs(theta), 1.0)
        term = small * (tl.abs(theta) - small / 2)
    else:
        term = theta * theta
    return term


# ---- elements of a chunk, from `start` of their tensor on, VEC of them a lane at a time


@triton.jit
def pointer(addresses, column: constexpr, start, DTYPE: constexpr, VEC: constexpr):
    """Where element `start` of theta, grad, exp_avg or exp_avg_sq lies."""
    place = tl.load(addresses + column).to(tl.pointer_type(DTYPE)) + start
    return tl.multiple_of(place, 16) if VEC > 1 else place


@triton.jit
def sum_of(addresses, column, start, size, DTYPE: constexpr, REG: constexpr, VEC: constexpr):
    x_ = pointer(addresses, column, start, DTYPE, VEC)
    terms, elements = tl.zeros([LANES * VEC], tl.float32), tl.zeros([LANES * VEC], tl.float32)
    for k in range(0, size, LANES * VEC):
        at = k + tl.arange(0, LANES * VEC)
        x = tl.load(x_ + at, at // VEC < size // VEC, 0.0).to(tl.float32)
        terms += reg_term(x, REG)
        elements += x
    return tl.sum(terms), tl.sum(elements)


@triton.jit
def adam_of(
    addresses, coefficients, hyper, start, size, DTYPE: constexpr, REG: constexpr, VEC: constexpr
):
    theta_ = pointer(addresses, 0, start, DTYPE, VEC)
    grad_ = pointer(addresses, 1, start, DTYPE, VEC)
    exp_avg_ = pointer(addresses, 2, start, tl.float32, VEC)
    exp_avg_sq_ = pointer(addresses, 3, start, tl.float32, VEC)
    d, shift = tl.load(coefficients), tl.load(coefficients + 1)
    s, rsqrt_bias2 = tl.load(coefficients + 2), tl.load(coefficients + 3)
    grad_coef, beta1, rest1 = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2)
    beta2, rest2, eps = tl.load(hyper + 3), tl.load(hyper + 4), tl.load(hyper + 5)
    terms, elements = tl.zeros([LANES * VEC], tl.float32), tl.zeros([LANES * VEC], tl.float32)
    for k in range(0, size, LANES * VEC):
        at = k + tl.arange(0, LANES * VEC)
        mask = at // VEC < size // VEC
        g = tl.load(grad_ + at, mask, 0.0).to(tl.float32) * grad_coef
        m, v = tl.load(exp_avg_ + at, mask, 0.0), tl.load(exp_avg_sq_ + at, mask, 0.0)
        theta = tl.load(theta_ + at, mask, 0.0).to(tl.float32)
        m, v, u = adam(g, m, v, beta1, rest1, beta2, rest2, eps, rsqrt_bias2)
        theta = (corrected(theta, d, shift, REG) - s * u).to(DTYPE)
        tl.store(theta_ + at, theta, mask)
        tl.store(exp_avg_ + at, m, mask)
        tl.store(exp_avg_sq_ + at, v, mask)
        theta = tl.where(mask, theta.to(tl.float32), 0.0)
        terms += reg_term(theta, REG)
        elements += theta
    return tl.sum(terms), tl.sum(elements)


@triton.jit
def correct(addresses, coefficients, start, size, DTYPE: constexpr, REG: constexpr, VEC: constexpr):
    theta_ = pointer(addresses, 0, start, DTYPE, VEC)
    d, shift = tl.load(coefficients), tl.load(coefficients + 1)
    for k in range(0, size, LANES * VEC):
        at = k + tl.arange(0, LANES * VEC)
        mask = at // VEC < size // VEC
        theta = tl.load(theta_ + at, mask, 0.0).to(tl.float32)
        tl.store(theta_ + at, corrected(theta, d, shift, REG).to(DTYPE), mask)


# ---- the kernels: a chunk a program


@triton.jit
def chunk_of(chunks, chunk):
    """The tensor that a chunk belongs to, where in it the chunk starts, and its size."""
    chunks += 3 * chunk
    return tl.load(chunks), tl.load(chunks + 1), tl.load(chunks + 2).to(tl.int32)


@triton.jit
def _sums(chunks, addresses, sums, COLUMN: constexpr, DTYPE: constexpr, REG: constexpr):
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)  # what is read last, `_adam` finds cached
    j, start, size = chunk_of(chunks, chunk)
    addresses += 4 * j
    address = tl.load(addresses + COLUMN)
    terms, elements = 0.0, 0.0
    if address != 0:
        wide = tl.where(address % 16 == 0, size // 4 * 4, 0)
        terms, elements = sum_of(addresses, COLUMN, start, wide, DTYPE, REG, 4)
        if wide < size:
            more = sum_of(addresses, COLUMN, start + wide, size - wide, DTYPE, REG, 1)
            terms, elements = terms + more[0], elements + more[1]
    tl.store(sums + 2 * chunk, terms)
    tl.store(sums + 2 * chunk + 1, elements)


@triton.jit
def _adam(chunks, addresses, coefficients, hyper, proceed, sums, DTYPE: constexpr, REG: constexpr):
    chunk = tl.program_id(0)
    j, start, size = chunk_of(chunks, chunk)
    addresses += 4 * j
    coefficients += 4 * j
    grad = tl.load(addresses + 1)
    if tl.load(proceed) & (grad != 0):
        together = tl.load(addresses) | grad | tl.load(addresses + 2) | tl.load(addresses + 3)
        wide = tl.where(together % 16 == 0, size // 4 * 4, 0)
        terms, elements = adam_of(addresses, coefficients, hyper, start, wide, DTYPE, REG, 4)
        if wide < size:
            start, size = start + wide, size - wide
            more = adam_of(addresses, coefficients, hyper, start, size, DTYPE, REG, 1)
            terms, elements = terms + more[0], elements + more[1]
        tl.store(sums + 2 * chunk, terms)
        tl.store(sums + 2 * chunk + 1, elements)


@triton.jit
def _correct(chunks, addresses, coefficients, proceed, DTYPE: constexpr, REG: constexpr):
    j, start, size = chunk_of(chunks, tl.num_programs(0) - 1 - tl.program_id(0))
    addresses += 4 * j
    coefficients += 4 * j
    if tl.load(proceed) & (tl.load(coefficients) != 0):
        wide = tl.where(tl.load(addresses) % 16 == 0, size // 4 * 4, 0)
        correct(addresses, coefficients, start, wide, DTYPE, REG, 4)
        correct(addresses, coefficients, start + wide, size - wide, DTYPE, REG, 1)


@triton.jit
def _totals(first, sums, totals):
    """The sum of a tensor's chunks, float64, in their order: one tensor and row a program."""
    j, row = tl.program_id(0), tl.program_id(1)
    end = tl.load(first + j + 1)
    total = tl.zeros([LANES], tl.float64)
    for chunk in range(tl.load(first + j), end, LANES):
        at = chunk + tl.arange(0, LANES)
        total += tl.load(sums + 2 * at + row, at < end, 0.0).to(tl.float64)
    tl.store(totals + row * tl.num_programs(0) + j, tl.sum(total))


# ---- the passes


def grad_squares(t):
    _launch(_sums, t, t.grad_sums, COLUMN=1, REG='l2')
    return _total(t, t.grad_sums)[0]


def reg_sums(t):
    if not t.sums_are_current():
        _launch(_sums, t, t.sums, COLUMN=0, REG=t.reg_function)
        t.mark_sums_current()
    return _total(t, t.sums)


def adam_(t, coefficients, hyper, proceed):
    _launch(_adam, t, coefficients, hyper, proceed, t.sums, REG=t.reg_function)
    t.mark_written()
    t.mark_sums_current()


def correct_(t, coefficients, proceed):
    _launch(_correct, t, coefficients, proceed, REG=t.reg_function)
    t.mark_written()


def _on(device):
    return torch.cuda.device(device) if device.type == 'cuda' else nullcontext()


def _launch(kernel, t, *arguments, **flags):
    with _on(t.device):
        dtype = DTYPES[t.params[0].dtype]
        kernel[(len(t.chunks),)](
            t.chunks, t.addresses, *arguments, DTYPE=dtype, **flags, num_warps=WARPS
        )


def _total(t, sums):
    """Both sums of each tensor: (2, n) float64."""
    totals = torch.empty(2, len(t.params), dtype=torch.float64, device=t.device)
    with _on(t.device):
        _totals[(len(t.params), 2)](t.first, sums, totals, num_warps=WARPS)
    return totals
