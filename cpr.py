"""AdamW, AdamCPR, AdamWN and AdamH: Adam whose regularizer is the norm of each weight tensor.

With R = sum(theta^2), all four are one update of tensor j, unless order='after':

    theta_j <- (1 - d_j) * theta_j - s_j * u_j,    u_j = m_j / (sqrt(v_hat_j) + eps)

A rule is a class here. Its method `decide` computes d_j. s_j is lr / (1 - beta1^t); AdamH's
`decide` computes its own. A pass is a function of kernels/ that goes over memory: in Triton
(gpu.py), Numba (cpu.py) and PyTorch operations (plain.py). With order='before' a rule decides from
sums over theta that the previous step's pass left, and one pass updates all. With order='after' it
decides from the Adam-updated theta, and a second pass corrects that. AdamH decides between the two
halves of Adam's pass. On an accelerator only a step that makes new buckets waits for the device.
"""

import math
from collections.abc import Sequence
from functools import reduce
from numbers import Real

import torch
from torch import nn
from torch.optim import Optimizer

from nanonorm.kernels.bucket import SavedState, check, kernels_for, make_buckets

IMPLS, REG_FUNCTIONS = ('auto', 'triton', 'numba', 'torch'), ('l2', 'l1', 'std', 'huber')
KAPPA_INIT_METHODS = ('uniform', 'dependent', 'warm_start', 'inflection_point')
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# arguments that factories of other packages pass along: accepted if False, 0 or None
NEUTRAL = 'amsgrad maximize capturable differentiable foreach fused weight_decay'.split()


class NormAdam(Optimizer):
    """The base of the four: groups, buckets, clipping, skipping and the order of the passes.

    Args of all:
        max_grad_norm: clip the gradients to this total norm within the step, as clip_grad_norm_
            would before it, without writing them. 0.0 only measures it; None does not.
        impl: 'triton' (GPU; on a CPU only with TRITON_INTERPRET=1), 'numba' (float32 on a CPU),
            'torch', or 'auto': the first of them that fits and is installed.
        amsgrad, foreach, weight_decay and the like: accepted if False, 0 or None.
    `grad_norm` (0-d float32) is the total norm before clipping. If it is not finite, or GradScaler
    has found an overflow, the step changes no weight, moment or decision, and counts in
    `skipped_steps` (0-d int64). DTensors are updated shard by shard. Write weights under
    torch.no_grad(): the next decision misses a write through p.data, and a replayed CUDA graph
    misses every write. Replace entries of `state` by load_state_dict.
    """

    needs_R = True  # whether `decide` asks for R
    orders = ('before', 'after')  # what `order` may be; None: the first
    reg_embedding = reg_norms = True  # whether a module's embeddings and norms are regularized

    def __init__(self, params, defaults, order=None, max_grad_norm=0.0, impl='auto', **options):
        order = order or self.orders[0]
        for name, value in options.items():
            if name not in NEUTRAL:
                raise TypeError(f"{type(self).__name__} has no argument '{name}'")
            check(not value, f'{type(self).__name__} does not support {name}={value}; leave it out')
        fits = max_grad_norm is None or max_grad_norm >= 0
        check(fits, f'max_grad_norm={max_grad_norm} must be >= 0 or None')
        check(order in self.orders, f"order='{order}' must be one of {self.orders}")
        check(impl in IMPLS, f"impl='{impl}' must be one of {IMPLS}")
        self.order, self.max_grad_norm, self.impl = order, max_grad_norm, impl
        self.grad_norm, self.skipped_steps = None, torch.zeros((), dtype=torch.int64)
        self._names, self._buckets, self._captured = {}, None, []
        params = self._groups_of(params) if isinstance(params, nn.Module) else params
        super().__init__(params, {'weight_decay': 0.0, **defaults})  # for torch's AdamW to load

    def _groups_of(self, module):
        """Two groups as nanoGPT's: tensors of two or more dimensions, then the rest."""
        self._names = {id(p): name for name, p in module.named_parameters()}
        # frozen floats may be thawed later; other frozen dtypes cannot train
        params = [p for p in module.parameters() if p.requires_grad or p.dtype in FLOATS]
        regularized = self._regularized_in(module)
        matrices, vectors = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
        flags = [p in regularized and not hasattr(p, '_no_weight_decay') for p in matrices]
        vectors = {'params': vectors, 'regularize': False, 'weight_decay': 0.0}
        return [{'params': matrices, 'regularize': flags}, vectors]

    def _regularized_in(self, module):
        named = module.named_parameters(remove_duplicate=False)  # a tied weight has two names
        out = set()
        if not self.reg_norms:
            out |= {p for name, p in named if name.rpartition('.')[2] == 'bias'}
            out |= {p for m in module.modules() if isinstance(m, NORMS) for p in m.parameters()}
        if not self.reg_embedding:
            out |= {m.weight for m in module.modules() if isinstance(m, EMBEDDINGS)}
        return {p for p in module.parameters() if p.dim() >= 2} - out

    def add_param_group(self, param_group):
        # how transformers and timm mark what is not to be decayed
        no_decay = 'weight_decay' in param_group and not param_group['weight_decay']
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        params, flags = group['params'], group.get('regularize')
        self._names.update(zip(map(id, params), group.get('param_names', ()), strict=False))
        try:
            if flags is None:
                flags = [not no_decay and p.dim() >= 2 for p in params]
            elif not isinstance(flags, Sequence):
                flags = [bool(flags)] * len(params)
            group['regularize'] = flags[0] if len({*flags}) == 1 else [*flags]  # easier to read
            check(len(flags) == len(params), f'{len(flags)} flags in regularize for {len(params)}')
            group['betas'] = tuple(group['betas'])
            self.check_group(group)
        except Exception:
            self.param_groups.pop()
            raise
        self._drop_buckets()

    def check_group(self, group):
        """Raise ValueError for an option out of range or a parameter that cannot be updated."""
        lr, betas = group['lr'], group['betas']
        fits = lr.numel() == 1 if torch.is_tensor(lr) else lr >= 0
        check(fits, f'lr={lr} must be one number >= 0')
        fits = len(betas) == 2 and all(0 <= b < 1 for b in betas)
        check(fits, f'betas={betas} must be two numbers in [0, 1)')
        for name in ('eps', 'weight_decay'):
            check(group[name] >= 0, f'{name}={group[name]} must be >= 0')
        for p in group['params']:
            if p.layout is not torch.strided or p.dtype not in FLOATS:
                name = self.name_of(p)
                raise ValueError(f'{name} is {p.dtype}, {p.layout}: it must be dense, of {FLOATS}')
            kernels_for(p, self)  # raises now what the first step would

    def name_of(self, p):
        every = [q for group in self.param_groups for q in group['params']]
        return self._names.get(id(p)) or f'parameter {list(map(id, every)).index(id(p))}'

    def _current_buckets(self):
        """Return all buckets, with the gradients of this step; [] if there is no gradient."""
        buckets = self._buckets or []
        # fewer states than parameters that started: somebody has cleared optimizer.state
        cleared = sum(sum(b.started) for b in buckets) > len(self.state)
        if cleared or any(b.is_outdated() for b in buckets):
            self._drop_buckets()
        if self._buckets is None:
            self._buckets = make_buckets(self)
        with_grads = [b.set_grads() for b in self._buckets]
        return self._buckets if any(with_grads) else []

    def _drop_buckets(self):
        """Make new buckets in the next step. What a CUDA graph reads of the old ones is kept."""
        self._captured += [b for b in self._buckets or () if b.tensors.captured]
        self._buckets = None

    def decide(self, b):
        """Return d_j and shift_j (None: 0) of a bucket's tensors, (n,) or 0-d.

        Compute them from b.state and b.R, (n,), which is sum(theta^2) unless the group has another
        reg_function. Write b.state[name] in place, since optimizer.state shows views of it, and
        only where b.active; values returned elsewhere are ignored. Read no value on the host. A
        rule with order 'between' also has b.theta_u and b.u_squares, and sets b.step_size (s_j).
        """
        raise NotImplementedError

    def init_state(self, b):
        """The rule's {name: (n,)} for tensors that have no such state yet, from b.R."""
        return {}

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient. Returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets, before = self._current_buckets(), self.order == 'before'
        if not buckets:
            return loss
        for b in buckets:
            b.measure(grads=True, R=before)
        grad_coef, proceed = self._clip(buckets)
        for b in buckets:
            b.begin(grad_coef, proceed)
            b.run(b.passes[0])
            if not before:
                b.measure(R=True)
        self._decide(buckets)
        for b in buckets:
            b.run(b.passes[1])
            b.tensors.grads = ()  # else they live until the next step
        return loss

    def _clip(self, buckets):
        """Return the factor for the gradients and whether the step goes ahead: 0-d each."""
        device, scale = buckets[0].device, getattr(self, 'grad_scale', None)
        factors = [] if scale is None else [1 / scale.to(device)]
        finite = [b.found_inf.to(device) == 0 for b in buckets if b.found_inf is not None]
        if self.max_grad_norm is not None:
            squares = reduce(torch.add, (b.grad_squares.to(device) for b in buckets))
            self.grad_norm = reduce(torch.mul, factors, squares.sqrt()).float()
            finite.append(self.grad_norm < math.inf)
            if self.max_grad_norm > 0:
                factors.append((self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1))
        proceed = reduce(torch.logical_and, finite or [torch.ones((), device=device).bool()])
        self.skipped_steps = self.skipped_steps.to(device)
        self.skipped_steps += ~proceed
        return reduce(torch.mul, factors or [torch.ones((), device=device)]), proceed

    def _decide(self, buckets):
        """Fill in d_j and shift_j of the tensors that this step corrects."""
        for b in buckets:
            if b.regularizes:
                decay, shift = self.decide(b)
                torch.where(b.active, decay.float(), b.zero, out=b.decay)
                if shift is not None:
                    torch.where(b.active, shift.float(), b.zero, out=b.shift)

    @property
    def _step_supports_amp_scaling(self):
        return bool(self.max_grad_norm)  # else GradScaler unscales, for the caller to clip

    def __getstate__(self):
        # a scheduler of torch's sets `step`, bound to this very optimizer
        public = {name: x for name, x in vars(self).items() if name[0] != '_' and name != 'step'}
        return {**public, '_names': {}, '_buckets': None, '_captured': []}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._drop_buckets()

    def load_state_dict(self, state_dict):
        """As torch.optim's; but a state keeps its dtype, and an option that is not saved stays."""
        with SavedState(self):
            super().load_state_dict(state_dict)


class AdamW(NormAdam):
    """Adam with decoupled weight decay: d_j = lr * weight_decay (Loshchilov & Hutter 2019).

    Args:
        params: an nn.Module, an iterable of tensors or of (name, tensor), or parameter groups. A
            group may say `regularize`, a bool or one bool a tensor. Where it does not, tensors of
            two or more dimensions are decayed; none if the group says weight_decay=0.
        lr, betas, eps: Adam's; lr is a number or a one-element tensor.
        weight_decay: per step and unit of learning rate.
        max_grad_norm, impl: see NormAdam.
    All optimizers raise ValueError for an argument out of range, TypeError for an unknown one.
    """

    needs_R, orders = False, ('before',)

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, **common):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, **common)

    def decide(self, b):
        return b.lr * b.group['weight_decay'], None


class AdamCPR(NormAdam):
    """Adam with an upper bound kappa_j on R_j of each tensor (arXiv 2311.09058, Algorithm 1).

        lambda_j <- max(0, lambda_j + mu / n_j * (R_j - kappa_j))
        theta_j  <- theta_j - lambda_j * grad R_j(theta_j) - s_j * u_j

    s_j * u_j is Adam's step, lr * m_hat_j / (sqrt(v_hat_j) + eps).

    Args, under pytorch_cpr.AdamCPR's names:
        params: as AdamW's. In a module, tensors of two or more dimensions have a bound, except
            those of norms, biases and, without reg_embedding, embeddings and weights tied to them.
        kappa_init_method: where kappa_j comes from. 'uniform' (Kappa-K): kappa_init_param.
            'dependent' (Kappa-kI0): kappa_init_param * R_j at the start. 'warm_start' (Kappa-WS):
            R_j after kappa_init_param steps. 'inflection_point' (Kappa-IP): R_j when its growth
            first slows, see slows_down. The last two have no bound until then.
        reg_function: R. 'l2': sum theta^2, 'l1': sum abs(theta), 'std': sample standard deviation,
            'huber': sum(theta^2 / 2 where abs(theta) < 1, else abs(theta) - 1/2).
        kappa_update: mu, how fast lambda follows; for 'std' not divided by n_j.
        reg_step_size, reg_ema_decay: of Kappa-IP, see slows_down.
        reg_by_lr: multiply the correction by the learning rate.
        order: 'before' (the paper's Algorithm 1) or 'after' (pytorch-cpr) the Adam update.
    State of a regularized tensor besides Adam's, 0-d each: kappa (nan until set), kappa_set, lagmul
    (lambda); for Kappa-IP ema, ema_last, ema_growth (float64, as R is).
    """

    reg_norms = False

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        kappa_init_method='inflection_point',
        kappa_init_param=1000.0,
        reg_function='l2',
        kappa_update=1.0,
        reg_step_size=200,
        reg_ema_decay=0.99,
        reg_embedding=False,
        reg_by_lr=False,
        *,
        order='before',
        **common,
    ):
        self.reg_embedding = reg_embedding
        defaults = dict(lr=lr, betas=betas, eps=eps)
        defaults.update(kappa_init_method=kappa_init_method, kappa_init_param=kappa_init_param)
        defaults.update(reg_function=reg_function, kappa_update=kappa_update, reg_by_lr=reg_by_lr)
        defaults.update(reg_step_size=reg_step_size, reg_ema_decay=reg_ema_decay)
        super().__init__(params, defaults, order=order, **common)

    def check_group(self, group):
        super().check_group(group)
        method, param = group['kappa_init_method'], group['kappa_init_param']
        mu, every, decay = (group[k] for k in ('kappa_update', 'reg_step_size', 'reg_ema_decay'))
        methods, functions = KAPPA_INIT_METHODS, REG_FUNCTIONS
        check(method in methods, f"kappa_init_method='{method}' must be one of {methods}")
        check(group['reg_function'] in functions, f'reg_function must be one of {functions}')
        check(method == 'inflection_point' or param > 0, f'kappa_init_param={param} must be > 0')
        fits = method != 'warm_start' or param % 1 == 0
        check(fits, f'kappa_init_param={param} must be a whole number of steps')
        fits = every >= 1 and every % 1 == 0
        check(fits, f'reg_step_size={every} must be a whole number of steps, at least 1')
        check(0 <= mu < math.inf, f'kappa_update={mu} must be >= 0 and finite')
        check(0 <= decay < 1, f'reg_ema_decay={decay} must be in [0, 1)')

    def init_state(self, b):
        method, param = b.group['kappa_init_method'], b.group['kappa_init_param']
        zeros, unset = torch.zeros_like(b.decay), torch.full_like(b.R, math.nan)
        kappa = {'uniform': zeros + param, 'dependent': param * b.R}.get(method, unset).float()
        if method == 'dependent':
            b.warn_of_zeros('its bound is 0')
        state = {'kappa': kappa, 'kappa_set': ~kappa.isnan(), 'lagmul': zeros}
        if method == 'inflection_point':
            state.update(ema=b.R.clone(), ema_last=unset, ema_growth=unset)
        return state

    def decide(self, b):
        group, R, kappa, lagmul = b.group, b.R, b.state['kappa'], b.state['lagmul']
        kappa_set, reg_function = b.state['kappa_set'], b.tensors.reg_function
        bounded, method = b.active & kappa_set, group['kappa_init_method']
        std = reg_function == 'std'

        # kappa_j <- R_j when it is due (section 4.2): a bound from the next step on
        due = None
        if method == 'warm_start':
            # in order 'before', R is that of the previous step
            due = b.state['step'] >= group['kappa_init_param'] + (self.order == 'before')
        elif method == 'inflection_point':
            due = self.slows_down(b)
        if due is not None:
            due = due & b.active & ~kappa_set
            kappa.copy_(torch.where(due, R, kappa))
            kappa_set |= due

        # lambda_j <- max(0, lambda_j + mu / n_j * (R_j - kappa_j))   (Algorithm 1, line 6)
        excess = (R - kappa) if std else (R - kappa) / b.numel
        change = torch.where(bounded, group['kappa_update'] * excess, b.zero)  # kappa may be nan
        lagmul.add_(change).clamp_(min=0)

        # theta_j <- theta_j - lambda_j * grad R_j(theta_j)           (line 7)
        decay = lagmul * b.lr if group['reg_by_lr'] else lagmul  # 0 where there is no bound
        if std:  # its gradient is (theta - mean) / ((n - 1) * std)
            decay = torch.where(R > 0, decay / ((b.numel - 1) * R), 0.0)
        elif reg_function == 'l2':
            decay = 2 * decay
        return decay, decay * b.mean if std else None

    def slows_down(self, b):
        """Return which R_j grow, but less than they did; None: none. Kappa-IP (section 4.2).

        An average of R_j with decay reg_ema_decay, bias-corrected as Adam's are, is looked at every
        reg_step_size steps. At the inflection a positive growth is larger than the one after it, by
        more than float32 rounding explains. The fourth look is the first that may find it.
        """
        step, every, beta = b.state['step'], b.group['reg_step_size'], b.group['reg_ema_decay']
        ema, last, growth = b.state['ema'], b.state['ema_last'], b.state['ema_growth']
        alpha = (1 - beta) / (1 - beta ** step.to(b.R))
        ema.lerp_(b.R, torch.where(b.active, alpha, b.zero))  # the corrected average itself
        look = b.active & (step % every == 0)
        if look.is_cpu and not look.any():  # a GPU would have to be waited for
            return None
        grown = ema - last  # nan at the first look: no comparison with it holds
        rounding = 16 * torch.finfo(torch.float32).eps * ema
        slower = look & (step >= 4 * every) & (growth > 0) & (grown < growth - rounding)
        torch.where(look, grown, growth, out=growth)
        torch.where(look, ema, last, out=last)
        return slower


class AdamWN(NormAdam):
    """Adam that steers the norm of each tensor to a target (arXiv 2311.11446, Algorithm 1).

        d_j = k * (1 - r * ||theta_j at the start|| / ||theta_j||)

    Args:
        params: as AdamW's. Tensors of two or more dimensions are controlled.
        rate: k in [0, 1], the share of the way to the target that a step goes.
        ratio: r. `set_ratios` gives tensors ratios of their own.
        norm: the target norm, in place of one relative to the start.
        scope: 'tensor' steers every tensor by its own norm, 'global' all by their joint norm.
        order: 'after' (Algorithm 1, line 13.c) or 'before' the Adam update.
    A schedule sets group['ramp'] as it sets group['lr']: 0 steers to the norm at the start, 1 to
    the target, and numbers between them interpolate.
    State of a controlled tensor besides Adam's, 0-d each: init_norm, and ratio (nan: the group's).
    """

    orders = ('after', 'before')

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        *,
        rate=1e-2,
        ratio=1.0,
        norm=None,
        scope='tensor',
        order='after',
        **common,
    ):
        check(scope in ('tensor', 'global'), f"scope='{scope}' must be 'tensor' or 'global'")
        self.scope = scope
        defaults = dict(lr=lr, betas=betas, eps=eps)
        defaults.update(rate=rate, ratio=ratio, norm=norm, ramp=1.0)
        super().__init__(params, defaults, order=order, **common)

    def check_group(self, group):
        super().check_group(group)
        for name in ('rate', 'ratio', 'norm', 'ramp'):
            x, most = group[name], 1 if name in ('rate', 'ramp') else math.inf
            fits = isinstance(x, Real) and 0 <= x <= most or x is None and name == 'norm'
            check(fits, f'{name}={x} must be one number in [0, {most}]')

    def set_ratios(self, ratios):
        """Give the tensors in {parameter: r} that ratio, and all others their group's."""
        params = {p for group in self.param_groups for p in group['params']}
        check(self.scope == 'tensor' and params >= {*ratios}, 'ratios: of parameters, one by one')
        for state in self.state.values():
            state.pop('ratio', None)
        for p, ratio in ratios.items():
            self.state[p]['ratio'] = torch.tensor(ratio, dtype=torch.float32)
        self._drop_buckets()

    def init_state(self, b):
        if b.group['norm'] is None and self.scope == 'tensor':
            b.warn_of_zeros('its target is 0')
        return {'init_norm': b.R.sqrt().float(), 'ratio': torch.full_like(b.decay, math.nan)}

    def decide(self, b):
        group, norm, init_norm, ratio = b.group, b.R.sqrt(), b.state['init_norm'], b.state['ratio']
        ratio = torch.where(ratio.isnan(), group['ratio'], ratio)
        if self.scope == 'global':
            ratio, (norm, init_norm) = group['ratio'], self._joint_norms(b.device)
        target = ratio * init_norm if group['norm'] is None else group['norm']
        target = init_norm + group['ramp'] * (target - init_norm)
        return group['rate'] * (1 - torch.where(norm > 0, target / norm, 0.0)), None

    def _joint_norms(self, device):
        """Return ||theta|| and ||theta at the start|| of all controlled tensors together: 0-d."""
        squares = 0
        for b in self._buckets:
            if b.measures_R:
                both = torch.stack([b.R, b.state['init_norm'].to(b.R).square()])
                squares = squares + torch.where(b.regularized, both, 0.0).sum(dim=1).to(device)
        return squares.sqrt()


class AdamH(NormAdam):
    """Adam that holds the norm of each tensor and the relative size of its step (arXiv 2606.16899).

        theta <- R0 * Norm(theta - lr' * R0 * Norm(u)),  Norm(x) = x / ||x||,  lr' = step_scale * lr

    Args:
        params: as AdamCPR's without reg_embedding. Tensors that are not held take Adam's steps.
        step_scale: a held tensor's step over its norm, per unit of learning rate.
    R0 is the norm at the start. A tensor that starts at zero cannot be held: ValueError.
    State of a held tensor besides Adam's, 0-d: init_norm (R0).
    """

    orders, reg_embedding, reg_norms = ('between',), False, False

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, *, step_scale=10.0, **common):
        defaults = dict(lr=lr, betas=betas, eps=eps, step_scale=step_scale)
        super().__init__(params, defaults, **common)

    def check_group(self, group):
        super().check_group(group)
        check(group['step_scale'] >= 0, f'step_scale={group["step_scale"]} must be >= 0')

    def init_state(self, b):
        names = ', '.join(b.zeros())
        check(not names, f'{names} starts at zero and has no norm to hold: set regularize=False')
        return {'init_norm': b.R.sqrt().float()}

    def decide(self, b):
        R0, norm_u = b.state['init_norm'].to(b.R), b.u_squares.sqrt()
        # theta - s * u, on the sphere again by a = R0 / ||theta - s * u||
        s = torch.where(norm_u > 0, b.group['step_scale'] * b.lr * R0 / norm_u, 0.0)
        squares = b.R - 2 * s * b.theta_u + s * s * b.u_squares
        a = torch.where((s > 0) & (squares > 0), R0 / squares.sqrt(), 1.0)
        torch.where(b.active, (a * s).float(), b.step_size, out=b.step_size)
        return 1 - a, None
