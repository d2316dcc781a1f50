"""The passes over memory in PyTorch operations, a line a formula: for every device and dtype.

kernels/gpu.py and kernels/cpu.py have the same functions with the same arguments, and are tested
against these. A pass knows tensors and numbers, no optimizer. Arithmetic is in float32; weights
are rounded to nearest when they are stored. Nothing here waits for an accelerator.

`t` is a Tensors of n tensors. A tensor without a gradient in this step is left alone.
"""

import torch

from .tensors import Tensors, sum_dtype  # noqa: F401  (Tensors: what passes work on)


def grad_squares(t):
    """sum(grad ** 2) of all tensors that have a gradient: 0-d float64. 4 bytes a parameter."""
    grads = (p.new_zeros(()) if g is None else g for p, g in zip(t.params, t.grads, strict=True))
    return torch.stack([total(g.float().square()) for g in grads]).sum()


def reg_sums(t):
    """sum(reg_term) and sum(theta) of each tensor: (2, n) float64.

    gpu.py and cpu.py return the sums that the last `adam_` left, unless somebody has written the
    weights since: then they read 4 bytes a parameter.
    """
    terms = torch.stack([total(reg_term(p.float(), t.reg_function)) for p in t.params])
    return torch.stack([terms, torch.stack([total(p) for p in t.params])])


def adam_(t, coefficients, hyper, proceed):
    """Adam's update with the rule's correction. 28 bytes a parameter in gpu.py and cpu.py.

        m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  g = grad_coef * grad
        theta <- (1 - d) theta + shift - s m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    For l1 and huber `corrected` replaces (1 - d) theta + shift.
    coefficients: (n, 4) float32, a row a tensor: d, shift, s = lr / (1 - beta1^t) and
    1 / sqrt(1 - beta2^t). hyper: (6,) float32: grad_coef, beta1, 1 - beta1, beta2, 1 - beta2, eps.
    proceed: 0-d bool; where False, nothing changes.
    """
    tensors = zip(t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, coefficients, strict=True)
    for theta, g, m, v, (d, shift, s, rsqrt_bias2) in tensors:
        if g is None:
            continue
        new_m, new_v = moments(g.float() * hyper[0], m, v, hyper)
        u = direction(new_m, new_v, rsqrt_bias2, hyper)
        new_theta = corrected(theta.float(), d, shift, t.reg_function) - s * u
        for x, new in ((m, new_m), (v, new_v), (theta, new_theta)):
            x.copy_(torch.where(proceed, new, x))


def correct_(t, coefficients, proceed):
    """theta <- `corrected`. 8 bytes a parameter in gpu.py and cpu.py, none where d is 0."""
    for theta, g, (d, shift, _, _) in zip(t.params, t.grads, coefficients, strict=True):
        if g is not None:
            new = corrected(theta.float(), d, shift, t.reg_function)
            theta.copy_(torch.where(proceed, new, theta))


def moments_(t, coefficients, hyper, proceed):
    """The first half of `adam_`: m and v. 24 bytes a parameter in gpu.py and cpu.py.

    Returns sum(theta^2), sum(theta * u) and sum(u^2) of each tensor, (3, n) float64, where u is
    m / (sqrt(v) / sqrt(1 - beta2^t) + eps). Without a gradient they mean nothing.
    """
    sums = []
    tensors = zip(t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, coefficients, strict=True)
    for theta, g, m, v, (_, _, _, rsqrt_bias2) in tensors:
        if g is None:
            sums.append(theta.new_zeros(3, dtype=sum_dtype(t.device)))
            continue
        new_m, new_v = moments(g.float() * hyper[0], m, v, hyper)
        theta, u = theta.float(), direction(new_m, new_v, rsqrt_bias2, hyper)
        sums.append(torch.stack([total(theta.square()), total(theta * u), total(u.square())]))
        for x, new in ((m, new_m), (v, new_v)):
            x.copy_(torch.where(proceed, new, x))
    return torch.stack(sums, dim=1)


def apply_(t, coefficients, hyper, proceed):
    """The second half: theta <- (1 - d) theta - s u. 16 bytes a parameter in gpu.py and cpu.py."""
    tensors = zip(t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, coefficients, strict=True)
    for theta, g, m, v, (d, _, s, rsqrt_bias2) in tensors:
        if g is not None:
            new = (1 - d) * theta.float() - s * direction(m, v, rsqrt_bias2, hyper)
            theta.copy_(torch.where(proceed, new, theta))


def moments(g, m, v, hyper):
    _, beta1, rest1, beta2, rest2, _ = hyper
    return beta1 * m + rest1 * g, beta2 * v + rest2 * g * g


def direction(m, v, rsqrt_bias2, hyper):
    return m / (v.sqrt() * rsqrt_bias2 + hyper[5])


def corrected(theta, d, shift, reg_function):
    """theta - d * grad R(theta) up to a factor that d contains; for std, shift is d * mean."""
    if reg_function == 'l1':
        return theta - d * theta.sign()
    if reg_function == 'huber':
        return theta - d * theta.clamp(-1, 1)
    return (1 - d) * theta + shift


def reg_term(theta, reg_function):
    """What an element adds to R: theta^2 (l2, std), abs(theta) (l1), or Huber's function of it."""
    if reg_function == 'l1':
        return theta.abs()
    if reg_function == 'huber':
        small = theta.abs().clamp(max=1)
        return small * (theta.abs() - small / 2)  # theta^2 / 2 below 1, abs(theta) - 1/2 above
    return theta.square()


def total(x):
    return x.sum(dtype=sum_dtype(x.device))
