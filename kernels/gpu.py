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

from .tensors import Table as Tensors  # noqa: F401  (what these passes work on)

WARPS = 8
VEC = constexpr(4)  # elements a lane at a time, where addresses allow it
LANES = constexpr(32 * WARPS)
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: run on the CPU, slowly
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ---- the mathematics of one element


@triton.jit
def direction(m, v, rsqrt_bias2, eps):
    return m / (tl.sqrt_rn(v) * rsqrt_bias2 + eps)  # sqrt would flush a tiny v to 0


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
        term = small * (tl.abs(theta) - 0.5 * small)
    else:
        term = theta * theta
    return term


# ---- `size` elements of a tensor from `start` on, V of them a lane at a time


@triton.jit
def pointer(addresses, column: constexpr, start, DTYPE: constexpr, V: constexpr):
    """Where element `start` of theta, grad, exp_avg or exp_avg_sq lies."""
    ptr = tl.load(addresses + column).to(tl.pointer_type(DTYPE)) + start
    return tl.multiple_of(ptr, 16) if V > 1 else ptr


@triton.jit
def sum_span(addresses, column, start, size, DTYPE: constexpr, REG: constexpr, V: constexpr):
    """The sums of reg_term and of the elements.

    `size` is a multiple of V. The mask is at < size, written so that the compiler sees that it is
    the same for the V elements of a lane, and moves them at once.
    """
    x_ptr = pointer(addresses, column, start, DTYPE, V)
    terms, elements = tl.zeros([LANES * V], tl.float32), tl.zeros([LANES * V], tl.float32)
    for k in range(0, size, LANES * V):
        at = k + tl.arange(0, LANES * V)
        mask = at // V < size // V
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        terms += reg_term(x, REG)
        elements += x
    return tl.sum(terms), tl.sum(elements)


@triton.jit
def adam_span(
    addresses, coefficients, hyper, start, size, DTYPE: constexpr, REG: constexpr, V: constexpr
):
    """plain.adam_ or, where REG is None, plain.moments_. Return the three sums of either."""
    theta_ptr = pointer(addresses, 0, start, DTYPE, V)
    grad_ptr = pointer(addresses, 1, start, DTYPE, V)
    exp_avg_ptr = pointer(addresses, 2, start, tl.float32, V)
    exp_avg_sq_ptr = pointer(addresses, 3, start, tl.float32, V)
    d, shift = tl.load(coefficients), tl.load(coefficients + 1)
    s, rsqrt_bias2 = tl.load(coefficients + 2), tl.load(coefficients + 3)
    grad_coef, beta1, rest1 = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2)
    beta2, rest2, eps = tl.load(hyper + 3), tl.load(hyper + 4), tl.load(hyper + 5)
    zeros = tl.zeros([LANES * V], tl.float32)
    x, y, z = zeros, zeros, zeros
    for k in range(0, size, LANES * V):
        at = k + tl.arange(0, LANES * V)
        mask = at // V < size // V
        g = tl.load(grad_ptr + at, mask, 0.0).to(tl.float32) * grad_coef
        m, v = tl.load(exp_avg_ptr + at, mask, 0.0), tl.load(exp_avg_sq_ptr + at, mask, 0.0)
        theta = tl.load(theta_ptr + at, mask, 0.0).to(tl.float32)
        m, v = beta1 * m + rest1 * g, beta2 * v + rest2 * g * g
        tl.store(exp_avg_ptr + at, m, mask)
        tl.store(exp_avg_sq_ptr + at, v, mask)
        u = tl.where(mask, direction(m, v, rsqrt_bias2, eps), 0.0)
        if REG is None:
            x, y, z = x + theta * theta, y + theta * u, z + u * u
        else:
            theta = (corrected(theta, d, shift, REG) - s * u).to(DTYPE)
            tl.store(theta_ptr + at, theta, mask)
            theta = tl.where(mask, theta.to(tl.float32), 0.0)
            x, y = x + reg_term(theta, REG), y + theta
    return tl.sum(x), tl.sum(y), tl.sum(z)


@triton.jit
def correct_span(
    addresses, coefficients, start, size, DTYPE: constexpr, REG: constexpr, V: constexpr
):
    theta_ptr = pointer(addresses, 0, start, DTYPE, V)
    d, shift = tl.load(coefficients), tl.load(coefficients + 1)
    for k in range(0, size, LANES * V):
        at = k + tl.arange(0, LANES * V)
        mask = at // V < size // V
        theta = tl.load(theta_ptr + at, mask, 0.0).to(tl.float32)
        tl.store(theta_ptr + at, corrected(theta, d, shift, REG).to(DTYPE), mask)


@triton.jit
def apply_span(addresses, coefficients, hyper, start, size, DTYPE: constexpr, V: constexpr):
    theta_ptr = pointer(addresses, 0, start, DTYPE, V)
    exp_avg_ptr = pointer(addresses, 2, start, tl.float32, V)
    exp_avg_sq_ptr = pointer(addresses, 3, start, tl.float32, V)
    d, s, rsqrt_bias2 = tl.load(coefficients), tl.load(coefficients + 2), tl.load(coefficients + 3)
    eps = tl.load(hyper + 5)
    for k in range(0, size, LANES * V):
        at = k + tl.arange(0, LANES * V)
        mask = at // V < size // V
        m, v = tl.load(exp_avg_ptr + at, mask, 0.0), tl.load(exp_avg_sq_ptr + at, mask, 0.0)
        theta = tl.load(theta_ptr + at, mask, 0.0).to(tl.float32)
        theta = (1 - d) * theta - s * direction(m, v, rsqrt_bias2, eps)
        tl.store(theta_ptr + at, theta.to(DTYPE), mask)


# ---- the kernels: a chunk a program


@triton.jit
def vector_size(addresses, size):
    """How many elements go VEC a lane: none unless all addresses are multiples of 16."""
    return tl.where(addresses % 16 == 0, size // VEC * VEC, 0)


@triton.jit
def chunk_of(chunks, chunk):
    """The tensor that a chunk belongs to, where in it the chunk starts, and its size."""
    chunks += 3 * chunk
    return tl.load(chunks), tl.load(chunks + 1), tl.load(chunks + 2).to(tl.int32)


@triton.jit
def _sums(chunks, addresses, sums, COLUMN: constexpr, DTYPE: constexpr, REG: constexpr):
    """The sums of grad_squares or reg_sums in a chunk. 4 bytes an element (float32)."""
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)  # what is read last, `_adam` finds cached
    j, start, size = chunk_of(chunks, chunk)
    addresses += 4 * j
    address = tl.load(addresses + COLUMN)
    terms, elements = 0.0, 0.0
    if address != 0:
        head = vector_size(address, size)
        terms, elements = sum_span(addresses, COLUMN, start, head, DTYPE, REG, VEC)
        if head < size:
            tail = sum_span(addresses, COLUMN, start + head, size - head, DTYPE, REG, 1)
            terms, elements = terms + tail[0], elements + tail[1]
    tl.store(sums + 3 * chunk, terms)
    tl.store(sums + 3 * chunk + 1, elements)


@triton.jit
def _adam(chunks, addresses, coefficients, hyper, proceed, sums, DTYPE: constexpr, REG: constexpr):
    """plain.adam_ for a chunk, and the sums of its new theta. 28 bytes an element (float32).

    Where REG is None, plain.moments_: 24 bytes.
    """
    chunk = tl.program_id(0)
    j, start, size = chunk_of(chunks, chunk)
    addresses += 4 * j
    coefficients += 4 * j
    grad = tl.load(addresses + 1)
    if tl.load(proceed) & (grad != 0):
        any_of = tl.load(addresses) | grad | tl.load(addresses + 2) | tl.load(addresses + 3)
        head = vector_size(any_of, size)
        x, y, z = adam_span(addresses, coefficients, hyper, start, head, DTYPE, REG, VEC)
        if head < size:
            start, size = start + head, size - head
            tail = adam_span(addresses, coefficients, hyper, start, size, DTYPE, REG, 1)
            x, y, z = x + tail[0], y + tail[1], z + tail[2]
        tl.store(sums + 3 * chunk, x)
        tl.store(sums + 3 * chunk + 1, y)
        tl.store(sums + 3 * chunk + 2, z)


@triton.jit
def _correct(chunks, addresses, coefficients, proceed, DTYPE: constexpr, REG: constexpr):
    """plain.correct_ for a chunk, where d is not 0. 8 bytes an element (float32)."""
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)  # what `_adam` wrote last is cached
    j, start, size = chunk_of(chunks, chunk)
    addresses += 4 * j
    coefficients += 4 * j
    if tl.load(proceed) & (tl.load(coefficients) != 0):
        head = vector_size(tl.load(addresses), size)
        correct_span(addresses, coefficients, start, head, DTYPE, REG, VEC)
        correct_span(addresses, coefficients, start + head, size - head, DTYPE, REG, 1)


@triton.jit
def _apply(chunks, addresses, coefficients, hyper, proceed, DTYPE: constexpr):
    """plain.apply_ for a chunk. 16 bytes an element (float32)."""
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)  # what `_adam` wrote last is cached
    j, start, size = chunk_of(chunks, chunk)
    addresses += 4 * j
    coefficients += 4 * j
    if tl.load(proceed) & (tl.load(addresses + 1) != 0):
        any_of = tl.load(addresses) | tl.load(addresses + 2) | tl.load(addresses + 3)
        head = vector_size(any_of, size)
        apply_span(addresses, coefficients, hyper, start, head, DTYPE, VEC)
        apply_span(addresses, coefficients, hyper, start + head, size - head, DTYPE, 1)


@triton.jit
def _totals(first, sums, totals):
    """The sum of a tensor's chunks, float64, in their order: one tensor and row a program."""
    j, row = tl.program_id(0), tl.program_id(1)
    end = tl.load(first + j + 1)
    total = tl.zeros([LANES], tl.float64)
    for chunk in range(tl.load(first + j), end, LANES):
        at = chunk + tl.arange(0, LANES)
        total += tl.load(sums + 3 * at + row, at < end, 0.0).to(tl.float64)
    tl.store(totals + row * tl.num_programs(0) + j, tl.sum(total))


# ---- the passes


def grad_squares(t):
    _launch(_sums, t, t.grad_sums, COLUMN=1, REG='l2')
    return t.grad_sums[:, 0].sum(dtype=torch.float64)


def reg_sums(t):
    if not t.sums_are_current():
        _launch(_sums, t, t.sums, COLUMN=0, REG=t.reg_function)
        t.mark_sums_current()
    return _totals_of(t, t.sums)[:2]


def adam_(t, coefficients, hyper, proceed):
    _launch(_adam, t, coefficients, hyper, proceed, t.sums, REG=t.reg_function)
    t.mark_written(summed=True)


def correct_(t, coefficients, proceed):
    _launch(_correct, t, coefficients, proceed, REG=t.reg_function)
    t.mark_written()


def moments_(t, coefficients, hyper, proceed):
    _launch(_adam, t, coefficients, hyper, proceed, t.moment_sums, REG=None)
    return _totals_of(t, t.moment_sums)


def apply_(t, coefficients, hyper, proceed):
    _launch(_apply, t, coefficients, hyper, proceed)
    t.mark_written()


def _totals_of(t, sums):
    """The sums of each tensor: (3, n) float64."""
    totals = torch.empty(3, len(t.params), dtype=torch.float64, device=t.device)
    with _on(t.device):
        _totals[(len(t.params), 3)](t.first, sums, totals, num_warps=WARPS)
    return totals


def _on(device):
    return torch.cuda.device(device) if device.type == 'cuda' else nullcontext()


def _launch(kernel, t, *arguments, **flags):
    with _on(t.device):
        dtype = DTYPES[t.params[0].dtype]
        kernel[(len(t.chunks),)](
            t.chunks, t.addresses, *arguments, DTYPE=dtype, **flags, num_warps=WARPS
        )
