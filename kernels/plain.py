"""The passes in plain torch: what runs on the CPU, and where no other implementation does.

Weights and gradients may be float32, bfloat16 or float16 and of any strides; arithmetic is in float32. No pass waits
for an accelerator: what decides (the decay, the clip coefficient, whether the step is skipped) stays in tensors there.
On the CPU, where reading a number costs nothing, those become Python numbers and ride in PyTorch's fused Adam.
"""

import torch

# Elements a float32 dot product sums at once on the CPU. MKL's single-precision dot loses about one part in 1e7 over
# this many and one in 1e4 over the 38 million of GPT-2's embedding; smaller pieces cost time (26 ms against 22 ms for
# the whole of GPT-2 124M at this size, 38 ms at a quarter of it). It is also a piece that stays in the L2 cache.
PIECE = 1 << 18


def _sum_of_squares(x):
    if not x.is_cpu:
        return torch.linalg.vector_norm(x, dtype=torch.float32).square()
    pieces = [piece.float() for piece in x.reshape(-1).split(PIECE)]
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum()


def _huber(x):
    small = x.abs().clamp_max(1.0)
    return (small * (x.abs() - small / 2)).sum()  # x^2 / 2 where |x| < 1, |x| - 1/2 elsewhere


def sum_of_squares(tensors):
    """sum over all tensors of sum(x ** 2): 0-d float32 on their device. Reads 4 bytes an element (float32)."""
    return torch.stack([_sum_of_squares(x) for x in tensors]).sum()


def regularizer(params, reg_function):
    """R_j of each tensor, (len(params),) float32 on their device (arXiv 2311.09058, section 4.3).

    l2: sum theta^2; l1: sum |theta|; huber: sum(theta^2 / 2 where |theta| < 1, else |theta| - 1/2);
    std: the sample standard deviation, 0 for a tensor of fewer than two elements.
    Reads 4 bytes a parameter (float32).
    """
    if reg_function == 'l2':
        values = [_sum_of_squares(theta) for theta in params]
    elif reg_function == 'l1':
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
        if reg_function == 'l2':
            theta.mul_(1 - d)
        elif reg_function == 'l1':
            theta.sub_(d * theta.float().sign())
        elif reg_function == 'huber':
            theta.sub_(d * theta.float().clamp(-1, 1))
        elif theta.numel() > 1:
            std, mean = torch.std_mean(theta.float())
            g = (theta.float() - mean) / ((theta.numel() - 1) * std)
            theta.sub_(d * torch.where(std > 0, g, 0.0))  # all elements equal: nothing to pull together


def adam_(params, grads, exp_avgs, exp_avg_sqs, steps, decay, *, lr, beta1, beta2, eps, grad_coef, skip):
    """theta_j <- (1 - decay_j) * theta_j - lr * m_hat / (sqrt(v_hat) + eps) with grad_coef * grad for the gradient.

    steps, decay: (len(params),) float32, the 1-based step of each tensor and its d_j (design: one scalar a tensor makes
    it AdamW, AdamCPR or AdamWN). lr: a number or a 0-d tensor. grad_coef: 0-d float32, clipping and unscaling in one;
    the gradients themselves are not written. skip: 0-d float32, 1.0 leaves everything as it is (decay must then be 0).
    Reads theta, g, m, v and writes theta, m, v once: 28 bytes a parameter (float32).
    """
    on_cpu = steps.is_cpu
    if on_cpu:
        if skip:
            return
        lr, grad_coef, decay = float(lr), float(grad_coef), decay.tolist()
    for j, (theta, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if theta.numel() == 0:
            continue
        tensors = (theta, exp_avg, exp_avg_sq)
        work = [x.float().contiguous() for x in tensors]  # themselves where they are that already
        flat = [x.view(-1) for x in (work[0], grad.float().contiguous(), *work[1:])]
        weight_decay = 0.0
        if on_cpu and lr != 0:
            weight_decay = decay[j] / lr  # fused Adam multiplies theta by 1 - lr * weight_decay in the same pass
        else:
            work[0].mul_(1 - decay[j])
        piece = PIECE if on_cpu and grad_coef != 1 else theta.numel()
        for theta_, grad_, exp_avg_, exp_avg_sq_ in zip(*(x.split(piece) for x in flat), strict=True):
            if not on_cpu or grad_coef != 1:
                grad_ = grad_ * grad_coef
            torch._fused_adamw_(
                [theta_], [grad_], [exp_avg_], [exp_avg_sq_], [], [steps[j]], lr=lr, beta1=beta1, beta2=beta2,
                weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False, grad_scale=None,
                found_inf=None if on_cpu else skip,
            )  # fmt: skip
        for x, y in zip(tensors, work, strict=True):
            if y is not x:
                x.copy_(y)
