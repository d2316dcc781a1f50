"""The optimizers in float64, as their formulas say: what cpr.py is measured against.

One tensor at a time, no cache, no pass that does two things. Each is Adam's step less a correction,

    theta_t = theta_{t-1} - lr * u_t - correction(point)

where u_t = m_hat / (sqrt(v_hat) + eps), and the point is theta_{t-1} (order 'before') or
theta_{t-1} - lr * u_t ('after'). Sources: AdamW, Loshchilov & Hutter 2019; AdamCPR,
arXiv 2311.09058, Algorithm 1; AdamWN, arXiv 2311.11446, Algorithm 1. AdamH is another step:
Hyperball, arXiv 2606.16899.
"""

import math

import torch

FLOAT32_EPS = 2.0**-23
UNDECIDED = 1e-5  # a sign taken this close to zero is settled by float32 rounding


def penalty(reg_function, theta):
    """R(theta), a number, and its gradient, shaped as theta. Constant tensors have std 0."""
    if reg_function == 'l2':
        return theta.square().sum().item(), 2 * theta
    if reg_function == 'l1':
        return theta.abs().sum().item(), theta.sign()
    if reg_function == 'huber':
        terms = torch.where(theta.abs() < 1, theta.square() / 2, theta.abs() - 0.5)
        return terms.sum().item(), theta.clamp(-1, 1)
    if reg_function == 'std':
        centered, n = theta - theta.mean(), theta.numel()
        std = math.sqrt(centered.square().sum().item() / (n - 1)) if n > 1 else 0.0
        return std, centered / ((n - 1) * std) if std > 0 else torch.zeros_like(theta)
    raise ValueError(reg_function)


class Inflection:
    """Watches R: `sees(R)`, called once a step, is true at a look at which growth has shrunk.

    What shrinks must have been growth: of an R that falls in a straight line the bias-corrected
    average falls ever faster at first, as its delay settles, and a convex R must never fire.
    """

    def __init__(self, step_size, decay):
        self.step_size, self.decay = step_size, decay
        self.t, self.weighted_sum, self.looks = 0, 0.0, []

    def sees(self, R):
        self.t += 1
        self.weighted_sum = self.decay * self.weighted_sum + (1 - self.decay) * R
        if self.t % self.step_size:
            return False
        self.looks.append(self.weighted_sum / (1 - self.decay**self.t))
        if len(self.looks) < 4:
            return False
        a, b, c = self.looks[-3:]
        return b > a and (c - b) < (b - a) - 16 * FLOAT32_EPS * c


class Weights:
    """One tensor and everything the optimizers remember about it. ratio: None for the group's."""

    def __init__(self, theta, regularize, ratio):
        self.theta = theta.detach().to(torch.float64, copy=True)
        self.regularize, self.ratio = regularize, ratio
        self.t, self.m, self.v = 0, torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.theta_0 = None  # at the first step
        self.lagmul, self.kappa, self.inflection = 0.0, None, None
        # whose sign (l1) float32 may have seen differently
        self.undecided = torch.zeros(theta.shape, dtype=torch.bool)


OPTIONS = {
    'adamw': {'weight_decay': 0.01},
    'adamcpr': {
        'kappa_init_method': 'inflection_point',
        'kappa_init_param': 1000.0,
        'reg_function': 'l2',
        'kappa_update': 1.0,
        'reg_step_size': 200,
        'reg_ema_decay': 0.99,
        'reg_by_lr': False,
    },
    'adamwn': {'rate': 1e-2, 'ratio': 1.0, 'norm': None, 'ramp': 1.0, 'scope': 'tensor'},
    'adamh': {'step_scale': 10.0},
}


class Reference:
    """kind: a key of OPTIONS; options: the arguments of the optimizer in cpr.py.

    params: tensors, which are copied. regularize: a bool a tensor; by default tensors of two or
    more dimensions. ratios: AdamWN.set_ratios' as a list, None where there is none. dtype: what
    weights are rounded to when a pass writes them: once a step, in order 'after' twice.
    """

    def __init__(
        self, kind, params, *, regularize=None, ratios=None, dtype=torch.float64, **options
    ):
        regularize = [p.dim() >= 2 for p in params] if regularize is None else regularize
        ratios = [None] * len(params) if ratios is None else ratios
        self.kind, self.dtype = kind, dtype
        self.tensors = [Weights(*x) for x in zip(params, regularize, ratios, strict=True)]
        self.lr = options.pop('lr')
        self.betas = options.pop('betas', (0.9, 0.999))
        self.eps = options.pop('eps', 1e-8)
        self.max_grad_norm = options.pop('max_grad_norm', 0.0)
        self.order = options.pop('order', 'after' if kind == 'adamwn' else 'before')
        for name, default in OPTIONS[kind].items():
            setattr(self, name, options.pop(name, default))
        if options:
            raise TypeError(f'unknown: {options}')

    @property
    def params(self):
        return [w.theta for w in self.tensors]

    def step(self, grads, **changed):
        """grads: a tensor or None a parameter. changed: what a schedule sets, lr, ratio or ramp."""
        for name, value in changed.items():
            setattr(self, name, value)
        grads = [None if g is None else g.to(torch.float64) for g in grads]
        self.grad_norm = math.sqrt(sum(g.square().sum().item() for g in grads if g is not None))
        clip = min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6)) if self.max_grad_norm else 1.0

        moving = [(w, clip * g) for w, g in zip(self.tensors, grads, strict=True) if g is not None]
        for w, _ in moving:
            w.theta_0 = w.theta.clone() if w.theta_0 is None else w.theta_0
        directions = [self.direction(w, g) for w, g in moving]
        steps = [self.lr * u for u in directions]
        moving = [w for w, _ in moving]
        if self.kind == 'adamh':
            for w, u in zip(moving, directions, strict=True):
                w.theta = self.written(self.h(w, u) if w.regularize else w.theta - self.lr * u)
        elif self.order == 'before':
            corrections = self.corrections(moving, [w.theta for w in moving])
            for w, step, correction in zip(moving, steps, corrections, strict=True):
                w.theta = self.written(w.theta - correction - step)
        else:
            points = [self.written(w.theta - s) for w, s in zip(moving, steps, strict=True)]
            corrections = self.corrections(moving, points)
            for w, point, correction in zip(moving, points, corrections, strict=True):
                w.theta = self.written(point - correction)

    def written(self, theta):
        return theta.to(self.dtype).to(torch.float64)

    def direction(self, w, g):
        """u_t of Adam, with its moments bias-corrected."""
        beta1, beta2 = self.betas
        w.t += 1
        w.m = beta1 * w.m + (1 - beta1) * g
        w.v = beta2 * w.v + (1 - beta2) * g**2
        m_hat, v_hat = w.m / (1 - beta1**w.t), w.v / (1 - beta2**w.t)
        return m_hat / (v_hat.sqrt() + self.eps)

    def corrections(self, tensors, points):
        """What each tensor loses besides Adam's step."""
        if self.kind == 'adamw':
            corrections = [self.lr * self.weight_decay * x for x in points]
        elif self.kind == 'adamwn':
            corrections = self.wn(tensors, points)
        else:
            pairs = zip(tensors, points, strict=True)
            corrections = [self.cpr(w, x) if w.regularize else 0.0 for w, x in pairs]
        return [c if w.regularize else 0.0 for w, c in zip(tensors, corrections, strict=True)]

    def cpr(self, w, x):
        R, gradient = penalty(self.reg_function, x)
        nothing = torch.zeros_like(x)
        if w.kappa is None:
            if self.kappa_init_method == 'uniform':
                w.kappa = self.kappa_init_param
            elif self.kappa_init_method == 'dependent':
                w.kappa = self.kappa_init_param * penalty(self.reg_function, w.theta_0)[0]
            elif self.kappa_init_method == 'warm_start':
                # R of the weights that step number kappa_init_param leaves: with 'before' the next
                # step sees them first, with 'after' they are the point of that very step
                if w.t == self.kappa_init_param + (self.order == 'before'):
                    w.kappa = R
                return nothing
            else:
                w.inflection = w.inflection or Inflection(self.reg_step_size, self.reg_ema_decay)
                if w.inflection.sees(R):
                    w.kappa = R
                return nothing
        mu = self.kappa_update / (1 if self.reg_function == 'std' else max(x.numel(), 1))
        w.lagmul = max(0.0, w.lagmul + mu * (R - w.kappa))
        if self.reg_function == 'l1' and w.lagmul > 0:
            w.undecided |= x.abs() < UNDECIDED
        return w.lagmul * gradient * (self.lr if self.reg_by_lr else 1.0)

    def h(self, w, u):
        radius = w.theta_0.norm()
        moved = w.theta - self.step_scale * self.lr * radius * (u / u.norm())
        return radius * (moved / moved.norm())

    def wn(self, tensors, points):
        """k * (1 - target / norm) of each tensor, with its own norm and target or the joint ones.

        All: also those that have no gradient and stay as they are. The start of one that has not
        moved yet is now.
        """
        if self.scope == 'tensor':
            now = [x.norm().item() for x in points]
            start = [w.theta_0.norm().item() for w in tensors]
        else:
            moving = {id(w): x for w, x in zip(tensors, points, strict=True)}
            every = [w for w in self.tensors if w.regularize]
            now = joint_norm([moving.get(id(w), w.theta) for w in every])
            start = joint_norm([w.theta if w.theta_0 is None else w.theta_0 for w in every])
            now, start = [now] * len(tensors), [start] * len(tensors)
        corrections = []
        for w, x, norm, norm_0 in zip(tensors, points, now, start, strict=True):
            target = norm_0 * (self.ratio if w.ratio is None else w.ratio)
            target = target if self.norm is None else self.norm
            target = norm_0 + self.ramp * (target - norm_0)
            # weights that are all zero have no direction to be scaled along
            corrections.append(self.rate * (1 - target / norm) * x if norm > 0 else x)
        return corrections


def joint_norm(tensors):
    return math.sqrt(sum(x.square().sum().item() for x in tensors))


# The problem they are measured on: gradients that pull the weights away from zero, then back, then
# away again, so that a bound is reached, left and reached again.

SHAPES = [(1,), (7,), (3, 5), (33, 65), (1, 1)]
STEPS = 60


def weights(shape, seed=0, dtype=torch.float32):
    """A start off zero, where the sign of an element is the direction in which it grows."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x + 0.3 * x.sign()).to(dtype)


def gradients(start, seed=0, steps=STEPS):
    """A list of `steps` gradients shaped as `start`, of three very different sizes."""
    g = torch.Generator().manual_seed(1000 + seed)
    outward = start.float().sign()
    pull = [1.0 if t < 10 or 16 <= t < 30 or 42 <= t else -1.0 for t in range(steps)]
    noise = [0.5 * torch.randn(start.shape, generator=g) for _ in range(steps)]
    return [
        ((0.3, 1.0, 3.0)[t % 3] * (noise[t] - pull[t] * outward)).to(start.dtype)
        for t in range(steps)
    ]


def schedule(peak, steps=STEPS):
    """A learning rate that warms up and falls."""
    return [peak * min(1.0, (t + 1) / 5) * (1.0 - 0.4 * t / steps) for t in range(steps)]
