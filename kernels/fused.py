"""The passes as Triton kernels: one launch for all tensors, whatever their number and sizes.

Twins of those in kernels/plain.py, under the same names and with the same arguments. A kernel finds its tensors through
a table of addresses, so parameters, gradients and moments keep their own storage. It cuts each into chunks of CHUNK
elements, one program a chunk; a chunk's partial sum of R stands in `sums`, and whoever needs R adds those of a tensor
up in their order. So the bits do not depend on the grid, on the other tensors or on time, and nothing is added
atomically. All decisions stay on the device.

A step with order='before' is four launches: sum_of_squares, clip, constrain_ (or steer_), adam_.
"""

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from kernels import plain

CHUNK = tl.constexpr(8192)  # elements a program works on
BLOCK = tl.constexpr(1024)  # of them at a time: 8 a thread, two accesses of 16 bytes in float32
LANES = tl.constexpr(1024)  # partial sums that a program which decides for one tensor takes at a time
WIDE = tl.constexpr(4096)  # the same for the one program that decides for all
WARPS = 4
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, slowly

TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ---- the mathematics of one element


@triton.jit
def adam(theta, g, m, v, d, mean, lr, rest1, rest2, bias1, sqrt_bias2, eps, REG: tl.constexpr):
    """Adam with the norm's correction: theta - d * g(theta) - lr * m_hat / (sqrt(v_hat) + eps), rest = 1 - beta."""
    m += rest1 * (g - m)
    v += rest2 * (g * g - v)
    u = (m / bias1) / (tl.sqrt(v) / sqrt_bias2 + eps)
    return corrected(theta, d, mean, REG) - lr * u, m, v


@triton.jit
def corrected(theta, d, mean, REG: tl.constexpr):
    """theta - d * g(theta), g the direction in which R grows; for std, d comes divided by (n - 1) std."""
    if REG == 'l1':
        theta -= d * tl.where(theta > 0, 1.0, tl.where(theta < 0, -1.0, 0.0))
    elif REG == 'huber':
        theta -= d * tl.minimum(tl.maximum(theta, -1.0), 1.0)
    elif REG == 'std':
        theta -= d * (theta - mean)
    else:
        theta -= d * theta
    return theta


@triton.jit
def term(theta, shift, REG: tl.constexpr):
    """What one element adds to R; for std, to the sum of squares around `shift`."""
    if REG == 'l1':
        x = tl.abs(theta)
    elif REG == 'huber':
        x = tl.abs(theta)
        x = tl.where(x < 1, x * x / 2, x - 0.5)
    elif REG == 'std':
        x = (theta - shift) * (theta - shift)
    else:
        x = theta * theta
    return x


@triton.jit
def one_minus_exp(x):
    """1 - e^x for x <= 0, to float32 rounding near 0, too: Adam's bias corrections, 1 - beta^t."""
    series = 1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * series)))
    return tl.where(x > -0.5, series, 1 - tl.exp(x))


@triton.jit
def rounded(x, bits, DTYPE: tl.constexpr):
    """float32 to bfloat16 at random, up with a probability of what is cut off: right on average (bits: uint32)."""
    if DTYPE == tl.bfloat16:
        up = x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
        x = tl.where(x == x, (up & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def random_bits(seed, element, step, name):
    """plain.random_bits for some elements (int64) of a tensor, uint32 each."""
    low, high = element.to(tl.uint32), (element >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, low, high, low * 0 + step, low * 0 + name, 7)
    return r0, r1, r2, r3


# ---- a chunk, a tensor's sum: indexing, and nothing else


@triton.jit
def pointer(addresses, n, row: tl.constexpr, j, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where element `start` of tensor j lies. The row of the table says of which: theta, grad, exp_avg, exp_avg_sq."""
    address = tl.load(addresses + row * n + j).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + start


@triton.jit
def adam_chunk(
    addresses, n, j, start, size, samples, chunk, d, mean, lr, rest1, rest2, bias1, sqrt_bias2, eps, grad_coef, seed,
    step, name, THETA: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, REG: tl.constexpr, SUMS: tl.constexpr,
    STOCHASTIC: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adam's update of one chunk. Returns its part of R and, for std, of the sum around the shift.

    WHOLE: the chunk is CHUNK elements long and aligned, so that no access needs a mask and each is 16 bytes wide.
    """
    theta_ = pointer(addresses, n, 0, j, start, THETA, WHOLE)
    grad_ = pointer(addresses, n, 1, j, start, GRAD, WHOLE)
    exp_avg_ = pointer(addresses, n, 2, j, start, MOMENT, WHOLE)
    exp_avg_sq_ = pointer(addresses, n, 3, j, start, MOMENT, WHOLE)
    # with KEEP, `correct_` reads theta next: what else is read and written is not to drive it out of the L2 cache
    once: tl.constexpr = 'evict_first' if KEEP else ''
    again: tl.constexpr = 'evict_last' if KEEP else ''
    lanes = tl.arange(0, BLOCK)
    first_sum = tl.zeros([BLOCK], tl.float32)
    second_sum = tl.zeros([BLOCK], tl.float32)
    for k in range(0, CHUNK if WHOLE else size, BLOCK):
        at = k + lanes
        mask = None if WHOLE else at < size
        theta = tl.load(theta_ + at, mask).to(tl.float32)
        g = tl.load(grad_ + at, mask, eviction_policy=once).to(tl.float32) * grad_coef
        m = tl.load(exp_avg_ + at, mask, eviction_policy=once).to(tl.float32)
        v = tl.load(exp_avg_sq_ + at, mask, eviction_policy=once).to(tl.float32)
        theta, m, v = adam(theta, g, m, v, d, mean, lr, rest1, rest2, bias1, sqrt_bias2, eps, REG)
        if STOCHASTIC:
            r0, r1, r2, _ = random_bits(seed, start + at, step, name)
            theta, m, v = rounded(theta, r0, THETA), rounded(m, r1, MOMENT), rounded(v, r2, MOMENT)
        theta = theta.to(THETA)
        tl.store(theta_ + at, theta, mask, eviction_policy=again)
        tl.store(exp_avg_ + at, m.to(MOMENT), mask, eviction_policy=once)
        tl.store(exp_avg_sq_ + at, v.to(MOMENT), mask, eviction_policy=once)
        if SUMS:
            theta = theta.to(tl.float32)
            x = term(theta, mean, REG)
            first_sum += x if WHOLE else tl.where(mask, x, 0.0)
            if REG == 'std':
                second_sum += (theta - mean) if WHOLE else tl.where(mask, theta - mean, 0.0)
    if SUMS:
        tl.debug_barrier()  # one thread wrote it, another reads
        tl.store(samples + chunk, tl.load(theta_).to(tl.float32))
    return tl.sum(first_sum), tl.sum(second_sum)


@triton.jit
def sum_chunk(addresses, n, row: tl.constexpr, j, start, size, shift, DTYPE: tl.constexpr, REG: tl.constexpr,
              WHOLE: tl.constexpr):  # fmt: skip
    """The part of R, and for std of the sum around the shift, of one chunk."""
    x_ = pointer(addresses, n, row, j, start, DTYPE, WHOLE)
    lanes = tl.arange(0, BLOCK)
    first_sum = tl.zeros([BLOCK], tl.float32)
    second_sum = tl.zeros([BLOCK], tl.float32)
    for k in range(0, CHUNK if WHOLE else size, BLOCK):
        at = k + lanes
        mask = None if WHOLE else at < size
        x = tl.load(x_ + at, mask).to(tl.float32)
        y = term(x, shift, REG)
        first_sum += y if WHOLE else tl.where(mask, y, 0.0)
        if REG == 'std':
            second_sum += (x - shift) if WHOLE else tl.where(mask, x - shift, 0.0)
    return tl.sum(first_sum), tl.sum(second_sum)


@triton.jit
def place(owner, first, numel, chunk):
    """The tensor that `chunk` is a piece of, where in it the chunk starts, and how many elements it has."""
    j = tl.load(owner + chunk)
    start = (chunk - tl.load(first + j)).to(tl.int64) * CHUNK
    return j, start, tl.minimum(tl.load(numel + j) - start, CHUNK).to(tl.int32)


@triton.jit
def added(sums, low, high):
    """The sum of sums[low:high], float64: the parts of a tensor, in their order."""
    total = tl.zeros([LANES], tl.float64)
    for c in range(low, high, LANES):
        at = c + tl.arange(0, LANES)
        total += tl.load(sums + at, at < high, 0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def regularizer_of(n, chunks, j, addresses, numel, first, sums, samples, means, THETA: tl.constexpr, REG: tl.constexpr):
    """R_j of the weights as they are now, from the parts that the pass which wrote them left, and for std their mean.

    Somebody may have written them since, by way of p.data, which nothing counts: the first element of each chunk is
    compared with what it was, and where one differs the tensor is summed anew, by this one program.
    """
    low, high = tl.load(first + j), tl.load(first + j + 1)
    theta_ = pointer(addresses, n, 0, j, 0, THETA, False)
    changed = 0
    for c in range(low, high, LANES):
        at = c + tl.arange(0, LANES)
        now = tl.load(theta_ + (at - low).to(tl.int64) * CHUNK, at < high, 0.0).to(tl.float32)
        then = tl.load(samples + at, at < high, 0.0)
        changed += tl.sum((now.to(tl.int32, bitcast=True) != then.to(tl.int32, bitcast=True)).to(tl.int32))
    shift = tl.load(means + j)
    if changed > 0:
        for c in range(low, high):
            start = (c - low).to(tl.int64) * CHUNK
            size = tl.minimum(tl.load(numel + j) - start, CHUNK).to(tl.int32)
            first_sum, second_sum = sum_chunk(addresses, n, 0, j, start, size, shift, THETA, REG, False)
            tl.store(sums + c, first_sum)
            tl.store(sums + chunks + c, second_sum)
            tl.store(samples + c, tl.load(theta_ + start).to(tl.float32))
        tl.debug_barrier()  # what one thread stored, others load
    R = added(sums, low, high)
    if REG == 'std':
        count = tl.load(numel + j).to(tl.float64)
        moved = added(sums + chunks, low, high) / tl.maximum(count, 1)
        R = tl.where(count > 1, tl.sqrt(tl.maximum(R - count * moved * moved, 0) / tl.maximum(count - 1, 1)), 0.0)
        shift += moved.to(tl.float32)
    return R.to(tl.float32), shift


@triton.jit
def pull(decay, stds, numel, j, REG: tl.constexpr):
    """d_j; for std over (n - 1) std, 0 where all elements are equal and there is nothing to pull together."""
    d = tl.load(decay + j)
    if REG == 'std':
        std = tl.load(stds + j)
        d = tl.where(std > 0, d / ((tl.load(numel + j) - 1) * std), 0.0)
    return d


@triton.jit
def number(x, KIND: tl.constexpr):
    """A schedule's value, which may stand on the device."""
    if KIND != 'number':
        x = tl.load(x).to(tl.float32)
    return x


# ---- the kernels


@triton.jit(do_not_specialize=['n', 'chunks'])
def _sums(n, chunks, addresses, owner, first, numel, means, sums, samples, ROW: tl.constexpr, DTYPE: tl.constexpr,
          REG: tl.constexpr):  # fmt: skip
    """The parts of R, or of the sum of squares of the gradients: 4 bytes an element."""
    chunk = chunks - 1 - tl.program_id(0)  # backwards: Adam's pass begins with what is still in the L2 cache then
    j, start, size = place(owner, first, numel, chunk)
    shift = tl.load(means + j)
    first_sum = 0.0
    second_sum = 0.0
    if (size == CHUNK) & (tl.load(addresses + ROW * n + j) % 16 == 0):
        first_sum, second_sum = sum_chunk(addresses, n, ROW, j, start, size, shift, DTYPE, REG, True)
    else:
        first_sum, second_sum = sum_chunk(addresses, n, ROW, j, start, size, shift, DTYPE, REG, False)
    tl.store(sums + chunk, first_sum)
    if REG == 'std':
        tl.store(sums + chunks + chunk, second_sum)
    if samples is not None:
        tl.store(samples + chunk, tl.load(pointer(addresses, n, ROW, j, start, DTYPE, False)).to(tl.float32))


@triton.jit(do_not_specialize=['n', 'chunks'])
def _regularizers(n, chunks, j0, addresses, numel, first, sums, samples, means, R, THETA: tl.constexpr,
                  REG: tl.constexpr):  # fmt: skip
    """R of one tensor a program."""
    j = j0 + tl.program_id(0)
    value, _ = regularizer_of(n, chunks, j, addresses, numel, first, sums, samples, means, THETA, REG)
    tl.store(R + j, value)


@triton.jit(do_not_specialize=['n', 'chunks', 'count', 'max_norm'])
def _clip(n, chunks, parts, count, grad_scale, found_inf, max_norm, steps, skipped_steps, grad_norm, grad_coef,
          proceed):  # fmt: skip
    """The gradients' norm, the clip coefficient and whether the step goes ahead, by one program."""
    coef = 1.0
    go = tl.full([], True, tl.int1)
    if grad_scale is not None:
        coef = 1 / tl.load(grad_scale)
    if found_inf is not None:
        go = tl.load(found_inf) == 0
    if parts is not None:
        total = tl.zeros([WIDE], tl.float64)
        for c in range(0, count, WIDE):
            at = c + tl.arange(0, WIDE)
            total += tl.load(parts + at, at < count, 0.0).to(tl.float64)
        norm = (tl.sqrt(tl.sum(total)) * coef).to(tl.float32)
        go = go & (tl.abs(norm) < float('inf'))
        tl.store(grad_norm, norm)
        if max_norm > 0:
            coef = coef * tl.minimum(max_norm / (norm + 1e-6), 1.0)
    tl.store(grad_coef, coef)
    tl.store(proceed, go)
    for c in range(0, n, WIDE):
        at = c + tl.arange(0, WIDE)
        tl.store(steps + at, tl.load(steps + at, at < n) + go.to(tl.float32), at < n)
    if skipped_steps is not None:
        tl.store(skipped_steps, tl.load(skipped_steps) + 1 - go.to(tl.int64))


@triton.jit(do_not_specialize=['n', 'chunks', 'j0', 'warm_start', 'mu', 'every', 'rest', 'log_ema_decay', 'lr'])
def _constrain(
    n, chunks, j0, addresses, numel, first, sums, samples, means, stds, decay, steps, proceed, kappa, kappa_set,
    lagmul, ema, ema_error, ema_last, ema_growth, warm_start, mu, every, rest, log_ema_decay, lr, THETA: tl.constexpr,
    REG: tl.constexpr, METHOD: tl.constexpr, LR: tl.constexpr,
):  # fmt: skip
    """lambda <- max(0, lambda + mu / n (R - kappa)), d = 2 lambda: one tensor a program."""
    j = j0 + tl.program_id(0)
    if tl.load(proceed):
        R, mean = regularizer_of(n, chunks, j, addresses, numel, first, sums, samples, means, THETA, REG)
        if REG == 'std':  # Adam's pass is next: it and `correct_` take these up
            tl.store(means + j, mean)
            tl.store(stds + j, R)
        step = tl.load(steps + j)
        due = False
        if METHOD == 'warm_start':
            due = step >= warm_start
        if METHOD == 'inflection_point':
            # the bias-corrected average and its rounding error; see plain._slows_down
            average = tl.load(ema + j)
            unknown = average != average
            alpha = rest / one_minus_exp(step * log_ema_decay)
            error = tl.load(ema_error + j)
            move = tl.where(unknown, 0.0, error + alpha * (R - average - error))
            moved = tl.where(unknown, R, average + move)
            error = tl.where(unknown, 0.0, move - (moved - average))
            tl.store(ema_error + j, error)
            tl.store(ema + j, moved)
            if step.to(tl.int32) % every == 0:
                growth = tl.load(ema_growth + j)
                grown = moved - tl.load(ema_last + j)
                rounding = 16 * 1.1920929e-07 * tl.abs(moved)
                due = (step >= 4 * every) & (growth > 0) & (grown < growth - rounding)
                tl.store(ema_growth + j, grown)
                tl.store(ema_last + j, moved)
        constrained = tl.load(kappa_set + j) != 0
        bound = tl.load(kappa + j)
        if due & (constrained == 0):
            bound = R
            constrained = True
            tl.store(kappa + j, bound)
            tl.store(kappa_set + j, constrained)
        d = 0.0
        if constrained:
            count = 1.0 if REG == 'std' else tl.maximum(tl.load(numel + j), 1).to(tl.float32)
            d = tl.maximum(tl.load(lagmul + j) + mu / count * (R - bound), 0.0)
            tl.store(lagmul + j, d)
            d = d * (2 if REG == 'l2' else 1) * number(lr, LR)
        tl.store(decay + j, d)
    else:
        tl.store(decay + j, 0.0)


@triton.jit(do_not_specialize=['n', 'chunks', 'j0', 'target', 'init_norm', 'rate'])
def _steer(
    n, chunks, j0, addresses, numel, first, sums, samples, means, decay, proceed, target, init_norm, rate,
    THETA: tl.constexpr, TARGET: tl.constexpr, INIT: tl.constexpr,
):  # fmt: skip
    """d = rate * (1 - target * init_norm / ||theta||): one tensor a program."""
    j = j0 + tl.program_id(0)
    if tl.load(proceed):
        R, _ = regularizer_of(n, chunks, j, addresses, numel, first, sums, samples, means, THETA, 'l2')
        norm = tl.sqrt(R)
        aim = number(target + j if TARGET == 'vector' else target, TARGET)
        aim *= number(init_norm + j if INIT == 'vector' else init_norm, INIT)
        tl.store(decay + j, rate * (1 - tl.where(norm > 0, aim / norm, 0.0)))
    else:
        tl.store(decay + j, 0.0)


@triton.jit(do_not_specialize=[
    'n', 'chunks', 'lr', 'rest1', 'rest2', 'log_beta1', 'log_beta2', 'eps', 'seed'
])  # fmt: skip
def _adam(
    n, chunks, addresses, owner, first, numel, numbers, means, stds, sums, samples, steps, decay, grad_coef, proceed,
    lr, rest1, rest2, log_beta1, log_beta2, eps, seed, THETA: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
    REG: tl.constexpr, SUMS: tl.constexpr, STOCHASTIC: tl.constexpr, KEEP: tl.constexpr, LR: tl.constexpr,
):  # fmt: skip
    """theta <- theta - d_j g(theta) - lr u; exp_avg, exp_avg_sq; and the parts of the new R. 28 bytes a parameter."""
    if tl.load(proceed):
        chunk = tl.program_id(0)
        j, start, size = place(owner, first, numel, chunk)
        d = pull(decay, stds, numel, j, REG)
        mean = tl.load(means + j)
        step = tl.load(steps + j)
        bias1 = one_minus_exp(step * log_beta1)
        sqrt_bias2 = tl.sqrt(one_minus_exp(step * log_beta2))
        rate = number(lr, LR)
        coef = tl.load(grad_coef)
        name = tl.load(numbers + j) if STOCHASTIC else j
        misaligned = (tl.load(addresses + j) | tl.load(addresses + n + j) | tl.load(addresses + 2 * n + j)
                      | tl.load(addresses + 3 * n + j)) % 16  # fmt: skip
        first_sum = 0.0
        second_sum = 0.0
        if (size == CHUNK) & (misaligned == 0):
            first_sum, second_sum = adam_chunk(
                addresses, n, j, start, size, samples, chunk, d, mean, rate, rest1, rest2, bias1, sqrt_bias2, eps, coef,
                seed, step.to(tl.uint32), name, THETA, GRAD, MOMENT, REG, SUMS, STOCHASTIC, KEEP, True)  # fmt: skip
        else:
            first_sum, second_sum = adam_chunk(
                addresses, n, j, start, size, samples, chunk, d, mean, rate, rest1, rest2, bias1, sqrt_bias2, eps, coef,
                seed, step.to(tl.uint32), name, THETA, GRAD, MOMENT, REG, SUMS, STOCHASTIC, KEEP, False)  # fmt: skip
        if SUMS:
            tl.store(sums + chunk, first_sum)
            if REG == 'std':
                tl.store(sums + chunks + chunk, second_sum)


@triton.jit(do_not_specialize=['n', 'chunks', 'last', 'seed'])
def _correct(n, chunks, last, addresses, owner, first, numel, numbers, means, stds, steps, decay, seed,
             THETA: tl.constexpr, REG: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    """theta <- theta - d_j g(theta), where d_j is not 0. 8 bytes a parameter, less what the L2 still holds."""
    chunk = last - tl.program_id(0)  # backwards: what Adam's pass wrote last is still in the L2 cache
    j, start, size = place(owner, first, numel, chunk)
    d = pull(decay, stds, numel, j, REG)
    if d != 0:
        mean = tl.load(means + j)
        step = tl.load(steps + j).to(tl.uint32)
        name = tl.load(numbers + j) if STOCHASTIC else j
        if (size == CHUNK) & (tl.load(addresses + j) % 16 == 0):
            correct_chunk(addresses, n, j, start, size, d, mean, seed, step, name, THETA, REG, STOCHASTIC, True)
        else:
            correct_chunk(addresses, n, j, start, size, d, mean, seed, step, name, THETA, REG, STOCHASTIC, False)


@triton.jit
def correct_chunk(addresses, n, j, start, size, d, mean, seed, step, name, THETA: tl.constexpr, REG: tl.constexpr,
                  STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    theta_ = pointer(addresses, n, 0, j, start, THETA, WHOLE)
    for k in range(0, CHUNK if WHOLE else size, BLOCK):
        at = k + tl.arange(0, BLOCK)
        mask = None if WHOLE else at < size
        theta = corrected(tl.load(theta_ + at, mask).to(tl.float32), d, mean, REG)
        if STOCHASTIC:
            _, _, _, r3 = random_bits(seed, start + at, step, name)
            theta = rounded(theta, r3, THETA)
        tl.store(theta_ + at, theta.to(THETA), mask)


# ---- the passes


class Tensors(plain.Tensors):
    """plain.Tensors on one device, contiguous, of one dtype for each of params, gradients and moments; and where they
    are."""

    def __init__(self, params, exp_avgs, exp_avg_sqs, reg_function='l2', numbers=None):
        super().__init__(params, exp_avgs, exp_avg_sqs, reg_function, numbers)
        self.names = self._on_device(self.numbers, torch.int32)
        counts = [-(-p.numel() // CHUNK.value) for p in params]
        self.chunk_of = [sum(counts[:j]) for j in range(len(counts) + 1)]  # the first one of each tensor, and the end
        self.owner = self._on_device([j for j, count in enumerate(counts) for _ in range(count)], torch.int32)
        self.first = self._on_device(self.chunk_of, torch.int32)
        self.sizes = self._on_device([p.numel() for p in params], torch.int64)
        # of each chunk: its part of R, for std another of the sum around the mean; its first element; gradient's part
        self.sums, self.samples, self.grad_sums = (
            torch.empty(rows * self.chunk_of[-1], dtype=torch.float32, device=self.device) for rows in (2, 1, 1))
        # what std is summed around: the mean that was last known, to begin with any element
        self.means, self.stds = torch.zeros_like(self.numel), torch.zeros_like(self.numel)
        if reg_function == 'std':
            self.means = torch.stack([p.detach().reshape(-1)[:1].float().sum() for p in params])
        self.pointers, self.captured = None, []

    def _on_host(self, values, dtype):
        return torch.tensor(values, dtype=dtype, pin_memory=self.device.type == 'cuda')

    def _on_device(self, values, dtype):
        return self._on_host(values, dtype).to(self.device, non_blocking=True)

    def take(self, grads):
        super().take([g.contiguous() for g in grads])
        pointers = [x.data_ptr() for xs in (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs) for x in xs]
        capturing = self.device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
        if pointers != self.pointers and not capturing:
            self.addresses = self._on_device(pointers, torch.int64)
            self.spare = self._on_host(pointers, torch.int64)
            self.pointers = pointers
        elif pointers != self.pointers:  # gradients that the graph allocates; host memory cannot be had in a capture
            if self.spare is None:
                raise RuntimeError('before another capture, take a step of the optimizer outside of it')
            self.captured.append(self.spare.copy_(torch.tensor(pointers)))
            self.addresses = self.spare.to(self.device, non_blocking=True)
            self.spare = self.pointers = None
        if capturing:
            self.captured.append(self.addresses)  # read whenever the graph is replayed

    def wrote(self, span, summed):
        """Count a kernel's writes as torch counts its own; `summed`: the parts of R are those of what it wrote."""
        torch.autograd.graph.increment_version(self.params[span])
        self._written = self._versions(self.params) if summed else None

    def R_arguments(self):
        """What a kernel needs to know R. Where others wrote the weights since `wrote`, sums them first.

        Asks the host alone. Writes by way of p.data nothing counts: the kernels look for those themselves.
        """
        if self._written != self._versions(self.params):
            self.sum(0, self.params, self.reg_function, self.means, self.sums, self.samples)
            self._written = self._versions(self.params)
        return self.addresses, self.sizes, self.first, self.sums, self.samples, self.means

    def sum(self, row, tensors, reg_function, means, sums, samples):
        _launch(_sums, self.chunk_of[-1], self, self.addresses, self.owner, self.first, self.sizes, means, sums,
                samples, ROW=row, DTYPE=TL_DTYPE[tensors[0].dtype], REG=reg_function)  # fmt: skip

    def R(self, span):
        R = torch.empty_like(self.means)
        _launch(_regularizers, span.stop - span.start, self, span.start, *self.R_arguments(), R,
                THETA=TL_DTYPE[self.params[0].dtype], REG=self.reg_function)  # fmt: skip
        return R[span]


def _launch(kernel, programs, t, *args, num_warps=WARPS, **flags):
    """args: those after the number of tensors and of chunks, which every kernel of the table needs."""
    if programs:
        with torch.cuda.device(t.device) if t.device.type == 'cuda' else nullcontext():
            kernel[(programs,)](len(t.params), t.chunk_of[-1], *args, num_warps=num_warps, **flags)


def _number(x, device):
    """A number or a tensor as an argument of a kernel, and which it is: 'number', 'scalar' or 'vector'."""
    if not torch.is_tensor(x) or x.is_cpu and device.type != 'cpu':
        return float(x), 'number'
    return x.to(device, non_blocking=True), 'vector' if x.dim() else 'scalar'


def sum_of_squares(t):
    t.sum(1, t.grads, 'l2', t.means, t.grad_sums, None)
    return t.grad_sums


def clip(t, parts, steps, skipped_steps, *, max_norm, grad_scale, found_inf):
    grad_norm, grad_coef = torch.empty(2, dtype=torch.float32, device=t.device).unbind()
    proceed = torch.empty((), dtype=torch.bool, device=t.device)
    _launch(_clip, 1, t, parts, 0 if parts is None else parts.numel(), grad_scale, found_inf, float(max_norm or 0),
            steps, skipped_steps, grad_norm, grad_coef, proceed, num_warps=8)  # fmt: skip
    return None if parts is None else grad_norm, grad_coef, proceed


def constrain_(t, span, decay, steps, proceed, state, *, method, warm_start, mu, every, ema_decay, lr):
    lr, kind = _number(lr, t.device)
    detector = [state.get(k) for k in ('ema', 'ema_error', 'ema_last', 'ema_growth')]
    _launch(_constrain, span.stop - span.start, t, span.start, *t.R_arguments(), t.stds, decay, steps, proceed,
            state['kappa'], state['kappa_set'], state['lagmul'], *detector, float(warm_start), float(mu), int(every),
            1 - ema_decay, math.log(ema_decay) if ema_decay > 0 else -math.inf, lr, METHOD=method, LR=kind,
            THETA=TL_DTYPE[t.params[0].dtype], REG=t.reg_function)  # fmt: skip


def steer_(t, span, decay, proceed, target, init_norm, *, rate):
    (target, kind), (init_norm, init_kind) = _number(target, t.device), _number(init_norm, t.device)
    _launch(_steer, span.stop - span.start, t, span.start, *t.R_arguments(), decay, proceed, target, init_norm,
            float(rate), TARGET=kind, INIT=init_kind, THETA=TL_DTYPE[t.params[0].dtype])  # fmt: skip


def adam_(t, steps, decay, *, lr, beta1, beta2, eps, grad_coef, proceed, order, sums, seed=None):
    lr, kind = _number(lr, t.device)
    dtypes = (TL_DTYPE[xs[0].dtype] for xs in (t.params, t.grads, t.exp_avgs))
    logs = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    _launch(_adam, t.chunk_of[-1], t, t.addresses, t.owner, t.first, t.sizes, t.names, t.means, t.stds, t.sums,
            t.samples, steps, decay, grad_coef, proceed, lr, 1 - beta1, 1 - beta2, *logs, eps, seed or 0,
            **dict(zip(('THETA', 'GRAD', 'MOMENT'), dtypes, strict=True)), REG=t.reg_function, SUMS=sums > 0,
            STOCHASTIC=seed is not None, KEEP=order == 'after', LR=kind)  # fmt: skip
    t.wrote(slice(None), sums > 0)


def correct_(t, span, decay, steps, *, seed=None):
    first, end = t.chunk_of[span.start], t.chunk_of[span.stop]
    _launch(_correct, end - first, t, end - 1, t.addresses, t.owner, t.first, t.sizes, t.names, t.means, t.stds, steps,
            decay, seed or 0, THETA=TL_DTYPE[t.params[0].dtype], REG=t.reg_function,
            STOCHASTIC=seed is not None)  # fmt: skip
    t.wrote(span, False)
