"""The passes over memory as Numba kernels for float32 on the CPU: each reads its tensors once.

Twins of those in kernels/plain.py. A kernel goes through chunks of a tensors.Table; Python's
threads share them, since Numba releases the GIL. The sums of a tensor's chunks are added in their
order, so that no bit depends on the number of threads or on the other tensors.
"""

import math
from contextlib import nullcontext

import numpy as np
import torch
from numba import njit

from .numba_tools import array, arrays, element, in_vectors, loading, options, share
from .tensors import Table as Tensors  # noqa: F401  (what these passes work on)

REG = {'l2': 0, 'std': 0, 'l1': 1, 'huber': 2}  # l2 and std have the same arithmetic
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)  # else Numba takes float64


@element
def moments(g, m, v, hyper):
    return hyper[1] * m + hyper[2] * g, hyper[3] * v + hyper[4] * g * g


@element
def direction(m, v, rsqrt_bias2, hyper):
    return m / (math.sqrt(v) * rsqrt_bias2 + hyper[5])


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


@njit(**in_vectors)
def sum_of(x, reg):
    """A chunk's sums: here alone, for every pass to find the same bits."""
    terms, elements = ZERO, ZERO
    for i in range(len(x)):
        terms += reg_term(x[i], reg)
        elements += x[i]
    return terms, elements


@njit(**options, nogil=True)
def _sums(begin, end, table, column, reg, sums):
    for chunk in range(end - 1, begin - 1, -1):  # what is read last, `_adam` finds in the cache
        sums[chunk, 0], sums[chunk, 1] = sum_of(array(table, chunk, column), reg)


@njit(**options, nogil=True)
def _adam(begin, end, table, coefficients, hyper, reg, sums):
    for chunk in range(begin, end):
        theta, grad, exp_avg, exp_avg_sq = arrays(table, chunk)
        row = coefficients[table[0][chunk, 0]]
        d, shift, s, rsqrt_bias2 = row[0], row[1], row[2], row[3]
        for i in range(len(grad)):
            m, v = moments(hyper[0] * grad[i], exp_avg[i], exp_avg_sq[i], hyper)
            u = direction(m, v, rsqrt_bias2, hyper)
            theta[i] = corrected(theta[i], d, shift, reg) - s * u
            exp_avg[i] = m
            exp_avg_sq[i] = v
        if len(grad):
            sums[chunk, 0], sums[chunk, 1] = sum_of(theta, reg)  # of what the cache still holds


@njit(**options, nogil=True)
def _correct(begin, end, table, coefficients, reg):
    for chunk in range(end - 1, begin - 1, -1):
        row = coefficients[table[0][chunk, 0]]
        d, shift = row[0], row[1]
        if d != 0:
            theta = array(table, chunk, 0)
            for i in range(len(theta)):
                theta[i] = corrected(theta[i], d, shift, reg)


@njit(**in_vectors, nogil=True)
def _moments(begin, end, table, coefficients, hyper, sums):
    for chunk in range(begin, end):
        theta, grad, exp_avg, exp_avg_sq = arrays(table, chunk)
        rsqrt_bias2 = coefficients[table[0][chunk, 0], 3]
        theta_theta, theta_u, u_u = ZERO, ZERO, ZERO
        for i in range(len(grad)):
            m, v = moments(hyper[0] * grad[i], exp_avg[i], exp_avg_sq[i], hyper)
            u = direction(m, v, rsqrt_bias2, hyper)
            exp_avg[i] = m
            exp_avg_sq[i] = v
            theta_theta += theta[i] * theta[i]
            theta_u += theta[i] * u
            u_u += u * u
        sums[chunk, 0], sums[chunk, 1], sums[chunk, 2] = theta_theta, theta_u, u_u


@njit(**options, nogil=True)
def _apply(begin, end, table, coefficients, hyper):
    for chunk in range(end - 1, begin - 1, -1):
        theta, grad, exp_avg, exp_avg_sq = arrays(table, chunk)
        row = coefficients[table[0][chunk, 0]]
        d, s, rsqrt_bias2 = row[0], row[2], row[3]
        for i in range(len(grad)):
            u = direction(exp_avg[i], exp_avg_sq[i], rsqrt_bias2, hyper)
            theta[i] = (ONE - d) * theta[i] - s * u


def grad_squares(t):
    _run(_sums, t, 1, REG['l2'], t.grad_sums)
    # PyTorch's sum depends on the number of threads
    total = t.grad_sums.numpy()[:, 0].sum(dtype=np.float64)
    return torch.from_numpy(np.asarray(total))  # 0-d, in less time than torch.tensor


def reg_sums(t):
    if not t.sums_are_current():
        _run(_sums, t, 0, REG[t.reg_function], t.sums)
        t.mark_sums_current()
    return _totals(t, t.sums)[:2]


def adam_(t, coefficients, hyper, proceed):
    if proceed:
        _run(_adam, t, coefficients, tuple(hyper.numpy()), REG[t.reg_function], t.sums)
        t.mark_written(summed=True)


def correct_(t, coefficients, proceed):
    if proceed:
        _run(_correct, t, coefficients, REG[t.reg_function])
        t.mark_written()


def moments_(t, coefficients, hyper, proceed):
    if proceed:
        _run(_moments, t, coefficients, tuple(hyper.numpy()), t.moment_sums)
    return _totals(t, t.moment_sums)


def apply_(t, coefficients, hyper, proceed):
    if proceed:
        _run(_apply, t, coefficients, tuple(hyper.numpy()))
        t.mark_written()


def _totals(t, sums):
    starts = t.first.numpy()[:-1]
    return torch.from_numpy(np.add.reduceat(sums.numpy(), starts, axis=0, dtype=np.float64).T)


def _run(function, t, *arguments):
    arguments = [x.numpy() if torch.is_tensor(x) else x for x in arguments]
    table = t.chunks.numpy(), t.addresses.numpy()
    work = t.numel // 8 if function is _sums else t.numel  # a sum takes an eighth of Adam's time
    loaded = bool(function.overloads)  # the first call compiles the function or loads it
    with nullcontext() if loaded else loading():
        share(function, len(t.chunks), work, table, *arguments)
