"""The passes in plain torch: what runs on the CPU, and wherever no other implementation does.

kernels/fused.py has each of them once more as a Triton kernel, under the same name and with the same arguments.

Weights and gradients may be float32, bfloat16 or float16 and of any strides; arithmetic is in float32. No pass waits
for an accelerator: what decides (the decay, the clip coefficient, whether the step is skipped) stays in tensors there.
On the CPU, where reading a number costs nothing, those become Python numbers and ride in PyTorch's fused Adam.

A `span` is a slice of the tensors that a Tensors holds. Vectors have one float32 value a tensor, those of a
regularizer's state one for each of the first, regularized ones.
"""

import math
from functools import partial

import torch

# Elements that each thread works on at a time on the CPU: what one operation wrote is in its core's cache when the next
# reads it. BLAS sums the squares of a piece in one go, and its float32 sum loses digits with the length of a thread's
# part, the more the fewer numbers a processor adds at a time: of so many, 3.3e-7 of itself with SSE4.2 alone.
PIECE = 1 << 16
ROW = 1 << 14  # elements of a gradient whose squares are summed in one go
LOW32 = 0xFFFFFFFF
SMALL = 1 << 12  # elements: the pass over so short a tensor takes less time than the call of it


class Tensors:
    """Tensors on one device that every pass treats alike, and what is known of their R.

    params, exp_avgs, exp_avg_sqs: lists of tensors. reg_function: which R, see `regularizer`. numbers: one for each
    tensor, which it keeps whatever others are there, for random numbers of its own.
    """

    captured = ()  # what a CUDA graph of a step reads whenever it is replayed

    def __init__(self, params, exp_avgs, exp_avg_sqs, reg_function='l2', numbers=None):
        self.numbers = list(range(len(params)) if numbers is None else numbers)
        self.params, self.exp_avgs, self.exp_avg_sqs = params, exp_avgs, exp_avg_sqs
        self.reg_function = reg_function
        self.device, self.on_cpu = params[0].device, params[0].is_cpu
        self.numel = torch.tensor([max(p.numel(), 1) for p in params], dtype=torch.float32, device=self.device)
        self.squares = None  # sum(theta ** 2) of the first ones as the last pass of Adam summed it
        self._written = None
        self._cut, self._scratch = (None, None), None

    def take(self, grads):
        """Have the gradients of this step, one a tensor; None lets go of them."""
        self.grads = grads

    def remember(self):
        """Note the weights that `squares` is of as they are now, for `unchanged`."""
        self._written = self._versions(self._summed()), self._samples()

    def unchanged(self):
        """Whether nobody has written them since. Every tensor counts its writes; what goes by way of p.data it does
        not count, so a few elements of each are compared besides. Asks the host, so it is for the CPU alone."""
        versions, samples = self._written
        return versions == self._versions(self._summed()) and torch.equal(samples, self._samples())

    def _summed(self):
        return self.params[: len(self.squares)]

    @staticmethod
    def _versions(params):
        return [(p.data_ptr(), p._version) for p in params]

    def _samples(self):
        return torch.cat([p.detach().flatten()[:: max(1, p.numel() // 16)] for p in self._summed()])

    def cut(self):
        """For each tensor on the CPU its pieces, (theta, exp_avg, exp_avg_sq) each; None where those are not all
        contiguous float32. Kept, because making them anew would take 3 % of every step."""
        tensors = list(zip(self.params, self.exp_avgs, self.exp_avg_sqs, strict=True))
        made_of = torch.get_num_threads(), [(x.data_ptr(), x.stride()) for xs in tensors for x in xs]
        if self._cut[0] != made_of:
            self._cut = made_of, [
                list(zip(*(_pieces(x.detach()) for x in xs), strict=True)) if all(map(_is_plain, xs)) else None
                for xs in tensors]  # fmt: skip
        return self._cut[1]

    def scratch(self):
        """Room for a piece, float32 on the CPU. Kept, because new memory is in no cache and not even in place yet."""
        size = PIECE * torch.get_num_threads()
        if self._scratch is None or self._scratch.numel() != size:
            self._scratch = torch.empty(size, dtype=torch.float32)
        return self._scratch

    def R(self, span):
        """R_j of the weights in `span` as they are now: as it was summed when they were written, if nobody wrote them
        since. An accelerator sums again before an update, because comparing there would make the host wait."""
        if self.squares is not None and (not self.on_cpu or self.unchanged()):
            return self.squares[span]
        return regularizer(self.params[span], self.reg_function)


def _is_plain(x):
    return x.dtype == torch.float32 and x.is_contiguous()


def _plain(x):
    """x itself where it is contiguous float32, else a copy that is."""
    return x if _is_plain(x) else x.float().contiguous()


def _pieces(x):
    """A contiguous tensor on the CPU as vectors of PIECE elements a thread, the last one shorter."""
    return x.view(-1).split(PIECE * torch.get_num_threads())


def _dot(piece):
    """sum(x ** 2) of a float32 piece, a Python number."""
    return torch.dot(piece, piece).item()


def _sum_of_squares(x):
    """sum(x ** 2), a Python number on the CPU, else 0-d float32. The same bits as when `adam_` sums piece by piece."""
    if x.is_cpu and x.dtype == torch.float32:
        return sum(map(_dot, _pieces(x.contiguous())))
    if x.is_cpu:  # in a product, squares of so few digits would all round the same way
        return sum(piece.float().square_().sum().item() for piece in _pieces(x.contiguous()))
    return torch.linalg.vector_norm(x, dtype=torch.float32).square()


def _sum_of_rows(x):
    """sum(x ** 2) of a tensor on the CPU, a Python number: in one pass where that is read from memory, not a cache."""
    if x.dtype != torch.float32:
        return _sum_of_squares(x)
    x = x.reshape(-1)
    rows = x.numel() // ROW
    if not rows:
        return _dot(x)
    norms = torch.linalg.vector_norm(x[: rows * ROW].view(rows, ROW), dim=1)
    return _dot(norms) + _dot(x[rows * ROW :])


def _vector(values, device):
    """Numbers or 0-d tensors as a float32 vector."""
    if device.type == 'cpu':
        return torch.tensor(values, dtype=torch.float32)
    return torch.stack(values)


def _huber(x):
    small = x.abs().clamp_max(1.0)
    return (small * (x.abs() - small / 2)).sum()  # x^2 / 2 where |x| < 1, |x| - 1/2 elsewhere


def sum_of_squares(t):
    """Parts of the sum over all gradients of sum(x ** 2): (number of parts,) float32 on their device.

    Reads 4 bytes an element (float32). On the CPU the sum does not depend on the order of the gradients.
    """
    # backwards, because Adam's pass, which comes next, starts with the first: that is still in the cache then
    if t.on_cpu:
        return _vector([math.fsum(_sum_of_rows(x) for x in reversed(t.grads))], t.device)
    return _vector([_sum_of_squares(x) for x in reversed(t.grads)], t.device)


def clip(t, parts, steps, skipped_steps, *, max_norm, grad_scale, found_inf):
    """What the gradients' norm means for the step. Returns grad_norm, grad_coef and proceed, 0-d each.

    parts: sum_of_squares' of all gradients, or None: not measured, grad_norm is None. grad_norm: the total norm, before
    clipping and without grad_scale. grad_coef: what to multiply gradients with, 1 / grad_scale to unscale and
    min(1, max_norm / (grad_norm + 1e-6)) to clip, as clip_grad_norm_ does; max_norm=0.0 does not. proceed: False where
    grad_norm is not finite or found_inf (0-d float32, or None) is not 0. Adds proceed to `steps`, a vector, and not
    proceed to `skipped_steps` (0-d int64, or None).
    """
    grad_coef = torch.ones((), dtype=torch.float32, device=t.device) if grad_scale is None else 1 / grad_scale
    proceed = torch.ones((), dtype=torch.bool, device=t.device) if found_inf is None else found_inf == 0
    grad_norm = None
    if parts is not None:
        grad_norm = parts.sum().sqrt() * grad_coef
        proceed = proceed & grad_norm.isfinite()
        if max_norm > 0:
            grad_coef = grad_coef * (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    steps += proceed
    if skipped_steps is not None:
        skipped_steps += ~proceed
    return grad_norm, grad_coef, proceed


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


def constrain_(t, span, decay, steps, proceed, state, *, method, warm_start, mu, every, ema_decay, lr):
    """AdamCPR's d_j, into decay[span]: the augmented Lagrangian's step (arXiv 2311.09058, Algorithm 1, line 6).

        lambda_j <- max(0, lambda_j + mu / n_j * (R_j - kappa_j))        (std: mu instead of mu / n_j)
        d_j = 2 lambda_j (l2), lambda_j (l1, huber, std), times lr

    steps: a vector. proceed: 0-d bool; where False, d_j is 0 and the state stays as it is. state: dict of vectors
    kappa, kappa_set (bool), lagmul and for 'inflection_point' ema, ema_error, ema_last, ema_growth.
    method: 'inflection_point' and 'warm_start' (after that many steps) set kappa_j to R_j when it is due, any other
    never does. every, ema_decay: the detector's, see `_slows_down`. lr: a number or a 0-d tensor.
    """
    R, step = t.R(span), steps[span]
    kappa, kappa_set, lagmul = (state[k][span] for k in ('kappa', 'kappa_set', 'lagmul'))
    due = torch.zeros_like(kappa_set)
    if method == 'warm_start':
        due = step >= warm_start
    elif method == 'inflection_point':
        due = _slows_down(R, step, proceed, {k: v[span] for k, v in state.items()}, every, ema_decay)
    set_now = due & ~kappa_set & proceed
    kappa.copy_(torch.where(set_now, R, kappa))
    kappa_set |= set_now
    rate = mu if t.reg_function == 'std' else mu / t.numel[span]
    constrained = kappa_set & proceed
    lagmul.copy_(torch.where(constrained, (lagmul + rate * (R - kappa)).clamp(min=0), lagmul))
    decay[span] = torch.where(constrained, lagmul * (2 if t.reg_function == 'l2' else 1) * lr, 0.0)


def _slows_down(R, step, proceed, state, every, ema_decay):
    """Kappa-IP's detector: for each tensor whether the growth of R's average since the last look, `every` steps ago, is
    less than the growth before it."""
    ema, error, last, growth = (state[k] for k in ('ema', 'ema_error', 'ema_last', 'ema_growth'))

    # ema <- ema + alpha (R - ema) with alpha = (1 - decay) / (1 - decay^t) is the bias-corrected average itself.
    # Where R moves little, alpha (R - ema) is below ema's last digit: ema_error carries what float32 rounds off.
    alpha = (1 - ema_decay) / -torch.expm1(step * (math.log(ema_decay) if ema_decay > 0 else -math.inf))
    move = torch.where(ema.isnan(), 0.0, error + alpha * (R - ema - error))
    moved = torch.where(ema.isnan(), R, ema + move)
    error.copy_(torch.where(proceed, torch.where(ema.isnan(), 0.0, move - (moved - ema)), error))
    ema.copy_(torch.where(proceed, moved, ema))

    look = (step % every == 0) & proceed
    grown = ema - last  # nan at the first look, and so no comparison with it holds
    rounding = 16 * torch.finfo(torch.float32).eps * ema.abs()  # of R, a float32 sum over the tensor, and of ema
    # A falling R is none that slows down; and the average's delay, which lengthens until it is full, would make a
    # straight fall look as if it grew steeper.
    found = look & (step >= 4 * every) & (growth > 0) & (grown < growth - rounding)
    growth.copy_(torch.where(look, grown, growth))
    last.copy_(torch.where(look, ema, last))
    return found


def steer_(t, span, decay, proceed, target, init_norm, *, rate):
    """AdamWN's d_j, into decay[span] (arXiv 2311.11446, Algorithm 1).

        d_j = rate * (1 - target_j * init_norm_j / ||theta_j||)

    target, init_norm: numbers, 0-d tensors or vectors for the whole of t. A tensor of zeros has no direction to grow
    in, d_j is `rate`.
    """
    target, init_norm = (x[span] if torch.is_tensor(x) and x.dim() else x for x in (target, init_norm))
    decay[span] = torch.where(proceed, steering(t.R(span).sqrt(), target * init_norm, rate), 0.0)


def steering(norm, target, rate):
    """The share of `norm`, a tensor, to take away so that it goes the way `rate` towards `target`."""
    return rate * (1 - torch.where(norm > 0, target / norm, 0.0))


def correct_(t, span, decay, steps, *, seed=None):
    """theta_j <- theta_j - decay_j * g(theta_j) for the tensors in `span`.

    g is the direction in which R grows: theta (l2), sign(theta) (l1), clip(theta, -1, 1) (huber),
    (theta - mean) / ((n - 1) std) (std). decay, steps: vectors. seed: as `adam_`'s, but by the word of random_bits that
    it leaves. Reads and writes each parameter once: 8 bytes (float32).
    """
    for theta, d, step, number in zip(t.params[span], decay[span], steps[span], t.numbers[span], strict=True):
        if t.on_cpu and d == 0:  # a bound that is not reached, a step that is skipped
            continue
        if t.reg_function == 'l2' and theta.dtype == torch.float32:
            theta.mul_(1 - d)
            continue
        x = theta.float()  # d times theta itself would be rounded to theta's dtype
        if t.reg_function == 'l2':
            g = x
        elif t.reg_function == 'l1':
            g = x.sign()
        elif t.reg_function == 'huber':
            g = x.clamp(-1, 1)
        elif theta.numel() > 1:
            std, mean = torch.std_mean(x)
            # all elements equal: nothing to pull together
            g = torch.where(std > 0, (x - mean) / ((theta.numel() - 1) * std), 0.0)
        else:
            g = torch.zeros_like(x)
        if seed is not None and theta.dtype == torch.bfloat16:
            bits = random_bits(seed, theta.numel(), step, number, t.device)[3]
            theta.copy_(rounded(x - d * g, bits.view(theta.shape)))
        else:
            theta.sub_(d * g)


def adam_(t, steps, decay, *, lr, beta1, beta2, eps, grad_coef, proceed, order, sums, seed=None):
    """theta_j <- theta_j - decay_j * g(theta_j) - lr * m_hat / (sqrt(v_hat) + eps).

    m and v are Adam's averages of grad_coef * grad and of its square, m_hat and v_hat those without their bias. g is
    `correct_`'s, (1 - decay_j) * theta_j for l2. The gradients are not written. steps, decay:
    vectors, the 1-based step of each tensor and its d_j. lr: a number or a 0-d tensor. grad_coef: 0-d float32.
    proceed: 0-d bool; where False, nothing changes. order: 'after' says that `correct_` follows and decay is all 0.
    sums: of how many of t's tensors, the first ones, R is going to be asked for: best summed on the way.
    seed: round what is stored in bfloat16 at random, right on average, by random_bits(seed, ...); None: to nearest.
    Reads theta, g, m, v and writes theta, m, v once: 28 bytes a parameter (float32); sums cost none on the CPU.
    """
    on_cpu = t.on_cpu
    if on_cpu and not proceed:
        return
    params, skip = t.params, None
    if t.reg_function != 'l2':  # only l2's correction is a decay that Adam's pass can carry
        if order == 'before':
            correct_(t, slice(0, sums), decay, steps, seed=seed)
        decay = torch.zeros_like(decay)
    if t.reg_function != 'l2' or not (on_cpu or order == 'after'):
        sums = 0  # an accelerator cannot ask whether others wrote the weights since: no sum is kept there for later
    if on_cpu:
        lr, decay = float(lr), decay.tolist()
    else:
        skip, decay = (~proceed).float(), torch.where(proceed, decay, 0.0)
    steps = steps.unbind()
    scale = not on_cpu or grad_coef != 1
    scaled = t.scratch() if on_cpu and scale else None
    squares = [0.0] * sums
    small = {}  # tensors whose pass is shorter than the call of it, by weight decay: (g, theta, m, v, step) of each
    update = partial(torch._fused_adamw_, lr=lr, beta1=beta1, beta2=beta2, eps=eps, amsgrad=False, maximize=False,
                     grad_scale=None, found_inf=skip)  # fmt: skip
    cut = t.cut() if on_cpu else [None] * len(params)
    for j, (theta, grad, pieces) in enumerate(zip(params, t.grads, cut, strict=True)):
        grad, copies = _plain(grad.detach()), {}  # autograd has nothing to note of pieces
        if pieces is None:
            stored = [x.detach() for x in (theta, t.exp_avgs[j], t.exp_avg_sqs[j])]
            work = [_plain(x) for x in stored]
            copies = {i: (x, y) for i, (x, y) in enumerate(zip(stored, work, strict=True)) if x is not y}
            pieces = list(zip(*(_pieces(x) if on_cpu else [x] for x in work), strict=True))
        weight_decay = 0.0
        if on_cpu and lr != 0:
            weight_decay = decay[j] / lr  # fused Adam multiplies theta by 1 - lr * weight_decay in the same pass
        else:
            for theta_, *_ in pieces:
                theta_.mul_(1 - decay[j])
        if j >= sums and not copies and theta.numel() <= SMALL:
            small.setdefault(weight_decay, []).append((grad.view(-1), *pieces[0], steps[j]))
            continue
        for grad_, (theta_, exp_avg_, exp_avg_sq_) in zip(_pieces(grad) if on_cpu else [grad], pieces, strict=True):
            if scale:
                out = scaled if not on_cpu or grad_.numel() == scaled.numel() else scaled[: grad_.numel()]
                grad_ = torch.mul(grad_, grad_coef, out=out)
            update([theta_], [grad_], [exp_avg_], [exp_avg_sq_], [], [steps[j]], weight_decay=weight_decay)
            if j < sums and on_cpu and 0 not in copies:
                squares[j] += _dot(theta_)
        stochastic = seed is not None and any(x.dtype == torch.bfloat16 for x, _ in copies.values())
        bits = random_bits(seed, theta.numel(), steps[j], t.numbers[j], t.device) if stochastic else None
        for i, (x, y) in copies.items():
            rounds = stochastic and x.dtype == torch.bfloat16
            x.copy_(rounded(y, bits[i].view(y.shape)) if rounds else y)
        if j < sums and on_cpu and 0 in copies:
            squares[j] = _sum_of_squares(theta)
    for weight_decay, batch in small.items():
        gs, thetas, exp_avgs, exp_avg_sqs, at = zip(*batch, strict=True)
        gs = torch._foreach_mul(gs, grad_coef) if scale else gs
        update(thetas, gs, exp_avgs, exp_avg_sqs, [], at, weight_decay=weight_decay)
    t.squares = None
    if sums:
        t.squares = _vector(squares, t.device) if on_cpu else regularizer(params[:sums], 'l2')
        t.remember()


def random_bits(seed, count, step, tensor, device):
    """Four tensors (count,) of 32 random bits, int64, for the elements of a tensor: they depend on nothing else.

    The first is for theta, the next for exp_avg and exp_avg_sq, the last for `correct_`. tensor: its number.
    """
    element = torch.arange(count, device=device)
    step, tensor = (torch.as_tensor(x, device=device).long().expand(count) for x in (step, tensor))
    return philox(element & LOW32, element >> 32, step, tensor, seed)


def philox(c0, c1, c2, c3, seed):
    """Philox4x32-7 (Salmon et al., SC 2011): random bits of a counter c, int64 of 32 bits each, and a key."""
    k0, k1 = seed & LOW32, seed >> 32 & LOW32
    for _ in range(7):
        product0, product2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # int64 holds all of their 64 bits, sign included
        c0, c1, c2, c3 = (product2 >> 32 & LOW32) ^ c1 ^ k0, product2 & LOW32, \
            (product0 >> 32 & LOW32) ^ c3 ^ k1, product0 & LOW32  # fmt: skip
        k0, k1 = k0 + 0x9E3779B9 & LOW32, k1 + 0xBB67AE85 & LOW32
    return c0, c1, c2, c3


def rounded(x, bits):
    """float32 `x` as a float32 that bfloat16 holds: up with a probability of what is cut off, right on average."""
    up = x.view(torch.int32) + (bits & 0xFFFF).int() & ~0xFFFF
    return torch.where(x.isnan(), x, up.view(torch.float32))
