"""The passes in plain torch: what runs on the CPU, and where no other implementation does.

Weights and gradients may be float32, bfloat16 or float16 and of any strides; arithmetic is in float32. No pass waits
for an accelerator: what decides (the decay, the clip coefficient, whether the step is skipped) stays in tensors there.
On the CPU, where reading a number costs nothing, those become Python numbers and ride in PyTorch's fused Adam.
"""

import torch

# Elements of a tensor that are worked on at a time on the CPU: what one operation wrote is still in the cache when the
# next reads it, and a float32 dot product is good to 4e-7 of itself (over the 38 million elements of GPT-2's embedding
# it would lose 1e-4). Squares of half-precision numbers, short of digits, all round the same way: fewer of them.
PIECE = 1 << 18
PIECE_HALF = 1 << 14
SMALL = 1 << 12  # elements: the pass over so short a tensor takes less time than the call of it


def _dot(piece):
    if piece.dtype == torch.float32:
        return torch.dot(piece, piece).item()
    return sum(torch.dot(part, part).item() for part in piece.float().split(PIECE_HALF))


def _sum_of_squares(x):
    """sum(x ** 2), a Python number on the CPU, else 0-d float32. Always the same bits for the same x."""
    if x.is_cpu:
        return sum(_dot(piece) for piece in x.reshape(-1).split(PIECE))
    return torch.linalg.vector_norm(x, dtype=torch.float32).square()


def _vector(values, device):
    """Numbers or 0-d tensors as a float32 vector."""
    if device.type == 'cpu':
        return torch.tensor(values, dtype=torch.float32)
    return torch.stack(values)


def _huber(x):
    small = x.abs().clamp_max(1.0)
    return (small * (x.abs() - small / 2)).sum()  # x^2 / 2 where |x| < 1, |x| - 1/2 elsewhere


def sum_of_squares(tensors):
    """sum over all tensors of sum(x ** 2): 0-d float32 on their device. Reads 4 bytes an element (float32)."""
    return _vector([_sum_of_squares(x) for x in tensors], tensors[0].device).sum()


def regularizer(params, reg_function):
    """R_j of each tensor, (len(params),) float32 on their device (arXiv 2311.09058, section 4.3).

    l2: sum theta^2; l1: sum |theta|; huber: sum(theta^2 / 2 where |theta| < 1, else |theta| - 1/2);
    std: the sample standard deviation, 0 for a tensor of fewer than two elements.
    Reads 4 bytes a parameter (float32).
    """
    if reg_function == 'l2':
        return _vector([_sum_of_squares(theta) for theta in params], params[0].device)
    if reg_function == 'l1':
        values = [theta.float().abs().sum() for theta in params]
    elif reg_function == 'huber':
        values = [_huber(theta.float()) for theta in params]
    else:
        values = [theta.float().std() if theta.numel() > 1 else theta.new_zeros((), dtype=torch.float32)
                  for theta in params]
    return torch.stack(values)


def correct_(params, decay, reg_function):
    """theta_j <- theta_j - decay_j * g(theta_j), decay (len(params),) float32 on the device of the parameters.

    g is the direction in which R grows: theta (l2), sign(theta) (l1), clip(theta, -1, 1) (huber),
    (theta - mean) / ((n - 1) std) (std). Reads and writes each parameter once: 8 bytes (float32).
    """
    for theta, d in zip(params, decay, strict=True):
        if reg_function == 'l2' and theta.dtype == torch.float32:
            theta.mul_(1 - d)
        elif reg_function == 'l2':
            theta.copy_(theta.float() * (1 - d))  # an accelerator would round 1 - d to the tensor's own dtype first
        elif reg_function == 'l1':
            theta.sub_(d * theta.float().sign())
        elif reg_function == 'huber':
            theta.sub_(d * theta.float().clamp(-1, 1))
        elif theta.numel() > 1:
            std, mean = torch.std_mean(theta.float())
            g = (theta.float() - mean) / ((theta.numel() - 1) * std)
            theta.sub_(d * torch.where(std > 0, g, 0.0))  # all elements equal: nothing to pull together


def adam_(
    params, grads, exp_avgs, exp_avg_sqs, steps, decay, *, lr, beta1, beta2, eps, grad_coef, skip, squares=None
):  # fmt: skip
    """theta_j <- (1 - decay_j) * theta_j - lr * m_hat / (sqrt(v_hat) + eps) with grad_coef * grad for the gradient.

    params, grads, exp_avgs, exp_avg_sqs: lists of tensors. steps, decay: (len(params),) float32, the 1-based step of
    each tensor and its d_j. lr: a number or a 0-d tensor. grad_coef: 0-d float32, clipping and unscaling in one; the
    gradients themselves are not written. skip: 0-d float32, 1.0 leaves everything as it is (decay must then be 0).
    squares: (len(params),) float32, receives sum(theta_j ** 2) of what was written.
    Reads theta, g, m, v and writes theta, m, v once: 28 bytes a parameter (float32); squares costs none on the CPU.
    """
    on_cpu = steps.is_cpu
    if on_cpu:
        if skip:
            if squares is not None:
                squares.copy_(regularizer(params, 'l2'))
            return
        lr, grad_coef, decay = float(lr), float(grad_coef), decay.tolist()
    steps = steps.unbind()
    scale = not on_cpu or grad_coef != 1
    scaled = torch.empty(PIECE) if on_cpu and scale else None
    sums = [0.0] * len(params)
    small = {}  # tensors whose pass is shorter than the call of it, by weight decay: (theta, g, m, v, step) of each

    def update(thetas, gs, exp_avgs, exp_avg_sqs, steps, weight_decay):
        torch._fused_adamw_(
            thetas, gs, exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay,
            eps=eps, amsgrad=False, maximize=False, grad_scale=None, found_inf=None if on_cpu else skip,
        )  # fmt: skip

    for j, (theta, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        tensors = (theta, grad, exp_avg, exp_avg_sq)
        work = [x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous() for x in tensors]
        copied = [(x, y) for x, y in zip(tensors, work, strict=True) if x is not y and x is not grad]
        weight_decay = 0.0
        if on_cpu and lr != 0:
            weight_decay = decay[j] / lr  # fused Adam multiplies theta by 1 - lr * weight_decay in the same pass
        else:
            work[0].mul_(1 - decay[j])
        if squares is None and not copied and theta.numel() <= SMALL:
            small.setdefault(weight_decay, []).append((*work, steps[j]))
            continue
        piece = PIECE if on_cpu else max(theta.numel(), 1)
        for theta_, grad_, exp_avg_, exp_avg_sq_ in zip(*(x.view(-1).split(piece) for x in work), strict=True):
            if scale:
                out = scaled if grad_.numel() == PIECE or not on_cpu else scaled[: grad_.numel()]
                grad_ = torch.mul(grad_, grad_coef, out=out)
            update([theta_], [grad_], [exp_avg_], [exp_avg_sq_], [steps[j]], weight_decay)
            if squares is not None and on_cpu:
                sums[j] += _dot(theta_ if work[0] is theta else theta_.to(theta.dtype))
        for x, y in copied:
            x.copy_(y)
    for weight_decay, batch in small.items():
        thetas, gs, *rest = zip(*batch, strict=True)
        update(thetas, torch._foreach_mul(gs, grad_coef) if scale else gs, *rest, weight_decay)
    if squares is not None:
        squares.copy_(_vector(sums, squares.device) if on_cpu else regularizer(params, 'l2'))
