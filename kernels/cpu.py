"""The passes over memory as Numba kernels for float32 on the CPU: each reads memory once.

Twins of those in kernels/plain.py. A kernel goes through chunks of a tensors.Table; Python's
threads share them, since Numba releases the GIL. The sums of a tensor's chunks are added in their
order, so that no bit depends on the number of threads or on the other tensors.
"""

import math

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic

from .tensors import Table as Tensors  # noqa: F401  (what these passes work on)
from .threads import share

REG = {'l2': 0, 'std': 0, 'l1': 1, 'huber': 2}  # l2 and std have the same arithmetic
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)  # else Numba takes float64


options = dict(error_model='numpy', fastmath={'contract', 'nsz', 'arcp'}, cache=True)
try:
    njit(**options)(lambda: 0)
except RuntimeError:  # no folder for compiled code can be written
    options['cache'] = False
element = njit(**options, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # for kernels to call


@intrinsic
def pointer(_, address):
    """An address as a pointer: of an array made of it within a kernel, no index wraps."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), generate


@element
def adam(g, m, v, hyper, rsqrt_bias2):
    m = hyper[1] * m + hyper[2] * g
    v = hyper[3] * v + hyper[4] * g * g
    return m, v, m / (math.sqrt(v) * rsqrt_bias2 + hyper[5])


@element
def corrected(theta, d, shift, reg):
    if reg == 1:
        return theta - d * (ONE if theta > 0 else -ONE if theta < 0 else ZERO)
    if reg == 2:
        return theta - d * min(max(theta, -ONE), ONE)
    return (ONE - d) * theta + shift


@element
def reg_term(theta, reg):
    if reg == 0:
        return theta * theta
    small = min(abs(theta), ONE)
    return small * (abs(theta) - HALF * small) if reg == 2 else abs(theta)


@njit(**options, inline='always')
def chunk_of(chunks, addresses, chunk, column):
    """The chunk's theta, grad, exp_avg or exp_avg_sq as an array; empty if it has no address."""
    j, start, size = chunks[chunk, 0], chunks[chunk, 1], chunks[chunk, 2]
    return carray(pointer(addresses[j, column] + 4 * start), size if addresses[j, column] else 0)


@njit(**options | {'fastmath': {*options['fastmath'], 'reassoc'}})
def sum_of(x, reg):
    """A chunk's sums, in vectors: here alone, for every pass to find the same bits."""
    terms, elements = ZERO, ZERO
    for i in range(len(x)):
        terms += reg_term(x[i], reg)
        elements += x[i]
    return terms, elements


@njit(**options, nogil=True)
def _sums(begin, end, chunks, addresses, column, reg, sums):
    for chunk in range(end - 1, begin - 1, -1):  # what is read last, `_adam` finds in the cache
        sums[chunk, 0], sums[chunk, 1] = sum_of(chunk_of(chunks, addresses, chunk, column), reg)


@njit(**options, nogil=True)
def _adam(begin, end, chunks, addresses, coefficients, hyper, reg, sums):
    for chunk in range(begin, end):
        grad = chunk_of(chunks, addresses, chunk, 1)
        if len(grad) == 0:
            continue
        theta = chunk_of(chunks, addresses, chunk, 0)
        exp_avg = chunk_of(chunks, addresses, chunk, 2)
        exp_avg_sq = chunk_of(chunks, addresses, chunk, 3)
        row = coefficients[chunks[chunk, 0]]
        d, shift, s, rsqrt_bias2 = row[0], row[1], row[2], row[3]
        for i in range(len(grad)):
            m, v, u = adam(hyper[0] * grad[i], exp_avg[i], exp_avg_sq[i], hyper, rsqrt_bias2)
            theta[i] = corrected(theta[i], d, shift, reg) - s * u
            exp_avg[i] = m
            exp_avg_sq[i] = v
        sums[chunk, 0], sums[chunk, 1] = sum_of(theta, reg)  # of what the cache still holds


@njit(**options, nogil=True)
def _correct(begin, end, chunks, addresses, coefficients, reg):
    for chunk in range(end - 1, begin - 1, -1):
        d, shift = coefficients[chunks[chunk, 0], 0], coefficients[chunks[chunk, 0], 1]
        if d != 0:
            theta = chunk_of(chunks, addresses, chunk, 0)
            for i in range(len(theta)):
                theta[i] = corrected(theta[i], d, shift, reg)


def grad_squares(t):
    _run(_sums, t, 1, REG['l2'], t.grad_sums.numpy())
    return t.grad_sums[:, 0].sum(dtype=torch.float64)


def reg_sums(t):
    if not t.sums_are_current():
        _run(_sums, t, 0, REG[t.reg_function], t.sums.numpy())
        t.mark_sums_current()
    starts = t.first[:-1].numpy()
    return torch.from_numpy(np.add.reduceat(t.sums.numpy(), starts, axis=0, dtype=np.float64).T)


def adam_(t, coefficients, hyper, proceed):
    if proceed:
        numbers = tuple(hyper.numpy())  # scalars for Numba
        _run(_adam, t, coefficients.numpy(), numbers, REG[t.reg_function], t.sums.numpy())
        t.mark_written(summed=True)


def correct_(t, coefficients, proceed):
    if proceed:
        _run(_correct, t, coefficients.numpy(), REG[t.reg_function])
        t.mark_written()


def _run(function, t, *arguments):
    table = t.chunks.numpy(), t.addresses.numpy()
    share(function, len(t.chunks), t.numel, *table, *arguments)
