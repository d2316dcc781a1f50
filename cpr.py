"""AdamW, AdamCPR and AdamWN: Adam whose regularizer is the norm of each weight tensor.

All three are one update with another scalar d_j for tensor j. With u = m_hat / (sqrt(v_hat) + eps), Adam's direction,

    theta_j <- (1 - d_j) * theta_j - lr * u

    AdamW     d_j = lr * weight_decay                                Loshchilov & Hutter 2019
    AdamCPR   d_j = 2 * lambda_j                                     Franke et al., arXiv 2311.09058, Algorithm 1
              lambda_j <- max(0, lambda_j + mu / n_j * (R_j - kappa_j)),  R_j = sum(theta_j ** 2)
    AdamWN    d_j = k * (1 - r * ||theta_j at the start|| / ||theta_j||)     Loshchilov, arXiv 2311.11446, Algorithm 1

order='before' takes R_j and theta_j of d_j's product before the Adam update (AdamCPR, Algorithm 1, lines 6 and 7),
order='after' from the Adam-updated weights (AdamWN, line 13.c; and the pytorch-cpr package).

What decides d_j stands here, once; how it reaches the weights stands in kernels/. On an accelerator nothing in step()
waits for the device: clipping, skipping, kappa and lambda are decided there, for all tensors of a group at once.
"""

import math

import torch
from torch import nn
from torch.optim import Optimizer

from kernels import plain

REG_FUNCTIONS = ('l2', 'l1', 'std', 'huber')
KAPPA_INIT_METHODS = ('uniform', 'dependent', 'warm_start', 'inflection_point')
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)


class _Tensors:
    """The tensors of one group that a step treats alike: all regularized or none, all on one device.

    `scalars` holds their per-tensor state as vectors, so that one operation serves all; the optimizer's state of each
    parameter is a view into them.
    """

    def __init__(self, optimizer, group, regularized, members):
        self.group, self.regularized = group, regularized
        self.params = [p for _, p in members]
        states = [optimizer._state_of(p, group, regularized) for p in self.params]
        self.states = list(zip(self.params, states, strict=True))
        self.exp_avgs = [s['exp_avg'] for s in states]
        self.exp_avg_sqs = [s['exp_avg_sq'] for s in states]
        self.device = self.params[0].device
        # places in the group, for options given as one value a parameter
        self.index = torch.tensor([i for i, _ in members], device=self.device)
        self.scalars = {}
        for name in ('step', *(optimizer._scalars if regularized else ())):
            self.scalars[name] = torch.stack([torch.as_tensor(s[name], device=self.device) for s in states])
            for j, state in enumerate(states):
                state[name] = self.scalars[name][j]
        self.steps = self.scalars['step']
        self.reg_function = group.get('reg_function', 'l2')
        self.numel = torch.tensor([max(p.numel(), 1) for p in self.params], dtype=torch.float32, device=self.device)
        self.squares = None  # sum(theta ** 2) as the last step's pass summed it
        self._written = None

    def remember(self):
        """Note the weights as they are now, for `unchanged`."""
        samples = [p.detach().flatten()[:: max(1, p.numel() // 16)] for p in self.params]
        self._written = [(p.data_ptr(), p._version) for p in self.params], samples, torch.cat(samples)

    def unchanged(self):
        """Whether nobody has written the weights since. Every tensor counts its writes; what goes by way of p.data it
        does not count, so a few elements of each are compared besides. Asks the host, so it is for the CPU alone."""
        if self._written is None:
            return False
        written, samples, values = self._written
        return written == [(p.data_ptr(), p._version) for p in self.params] and torch.equal(torch.cat(samples), values)

    def per_tensor(self, option):
        """A group's option, a number or one value for each of its parameters, as a number or a vector for ours."""
        if isinstance(option, (list, tuple)) or (torch.is_tensor(option) and option.dim() > 0):
            return torch.as_tensor(option, dtype=torch.float32, device=self.device)[self.index]
        return option


class _NormAdam(Optimizer):
    """What the three have in common: grouping, clipping, skipping, state, and the order of the passes.

    A subclass says what d_j is: `_decays` returns it for the regularized tensors, given their R. `_scalars` names the
    0-d states it keeps for each of them and `_init_scalars` makes those.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves grad_scale and found_inf here instead of unscaling by a pass
    _scalars = ()

    def __init__(self, params, defaults, *, order, max_grad_norm, impl):
        lr, (beta1, beta2) = defaults['lr'], defaults['betas']
        _require(not torch.is_tensor(lr) or lr.numel() == 1, 'a tensor lr must have one element')
        _require(torch.is_tensor(lr) or lr >= 0, f'lr={lr} must be >= 0')
        _require(0 <= beta1 < 1 and 0 <= beta2 < 1, f'betas={defaults["betas"]} must both be in [0, 1)')
        _require(defaults['eps'] >= 0, f'eps={defaults["eps"]} must be >= 0')
        _require(order in ('before', 'after'), f"order='{order}' must be 'before' or 'after'")
        _require(max_grad_norm is None or max_grad_norm >= 0,
                 f'max_grad_norm={max_grad_norm} must be >= 0 (0 measures without clipping) or None')
        _require(impl in ('auto', 'torch'), f"impl='{impl}' must be 'auto' or 'torch'")
        self.order, self.max_grad_norm, self.impl = order, max_grad_norm, impl
        self.grad_norm, self.skipped_steps = None, torch.zeros((), dtype=torch.int64)
        self._prepared = (None, [])
        if isinstance(params, nn.Module):
            params = self._group_module(params, defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        try:
            self._complete(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _complete(self, group):
        """Check a new group and say for each of its parameters whether it is regularized."""
        params, regularize = group['params'], group.get('regularize')
        for p in params:
            _require(p.dtype in (torch.float32, torch.bfloat16, torch.float16),
                     f'parameters must be float32, bfloat16 or float16, not {p.dtype}')
        if regularize is None:
            regularize = [p.dim() >= 2 for p in params]
        elif isinstance(regularize, (bool, int)):
            regularize = [bool(regularize)] * len(params)
        _require(len(regularize) == len(params),
                 f'regularize has {len(regularize)} values for {len(params)} parameters')
        # one bool where one says it all: easier to read in a checkpoint
        group['regularize'] = regularize[0] if len(set(regularize)) == 1 else list(regularize)

    def _group_module(self, module, defaults):
        """Two groups as nanoGPT's: tensors of two or more dimensions, then the rest, each in the module's order.

        So a checkpoint's optimizer state has the layout of nanoGPT's, and any of the three loads that of another.
        """
        params = [p for p in module.parameters() if p.requires_grad]
        _require(params, f'{type(module).__name__} has no parameters that require a gradient')
        regularized = self._regularized_in(module)
        matrices, vectors = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
        vector_group = {'params': vectors, 'regularize': False}
        if 'weight_decay' in defaults:
            vector_group['weight_decay'] = 0.0  # what torch.optim.AdamW must find when it loads this group
        return [{'params': matrices, 'regularize': [id(p) in regularized for p in matrices]}, vector_group]

    def _regularized_in(self, module):
        return {id(p) for p in module.parameters() if p.dim() >= 2}

    # -- state ----------------------------------------------------------------------------------------------------

    def _state_of(self, p, group, regularized):
        """The state of p, with whatever is still missing made: a state loaded from torch.optim.AdamW has no kappa."""
        state = self.state[p]
        if 'step' not in state:
            state['step'] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in ('exp_avg', 'exp_avg_sq'):
            if name not in state:
                state[name] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        if regularized and any(name not in state for name in self._scalars):
            first = self._init_scalars(p, group)
            state.update({name: torch.as_tensor(first[name], device=p.device) for name in self._scalars})
        return state

    def _tensors(self):
        """The parameters that have a gradient, as lists of _Tensors; made anew when that set or their state changes."""
        key, members = [], {}
        for group in self.param_groups:
            regularize = group['regularize']
            for i, p in enumerate(group['params']):
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(f'{type(self).__name__} does not support sparse gradients')
                regularized = regularize[i] if isinstance(regularize, list) else regularize
                key.append((id(p), p.device, regularized))
                members.setdefault((id(group), regularized, p.device), (group, []))[1].append((i, p))
        known, tensors = self._prepared
        if known != key or any(self.state.get(p) is not s for t in tensors for p, s in t.states):
            tensors = [_Tensors(self, group, regularized, m)
                       for (_, regularized, _), (group, m) in members.items()]  # fmt: skip
            self._prepared = (key, tensors)
        return tensors

    def __getstate__(self):
        own = {k: getattr(self, k) for k in ('order', 'max_grad_norm', 'impl', 'grad_norm', 'skipped_steps')}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._prepared = (None, [])  # the vectors of before are not those of the state just set

    def load_state_dict(self, state_dict):
        """As torch.optim's, but every state keeps its own dtype, and options that `state_dict` lacks stay ours."""
        saved = {}

        def remember(_, state_dict):
            saved.update(state_dict['state'])
            params = [p for group in self.param_groups for p in group['params']]
            for i, p in zip((i for group in state_dict['param_groups'] for i in group['params']), params, strict=False):
                for name in ('exp_avg', 'exp_avg_sq') if saved.get(i) else ():
                    _require(name in saved[i] and saved[i][name].shape == p.shape,
                             f'{name} of parameter {i} is missing or not of its shape {tuple(p.shape)}')
            groups = [{**{k: v for k, v in ours.items() if k != 'params'}, **theirs}
                      for ours, theirs in zip(self.param_groups, state_dict['param_groups'], strict=False)]
            if len(groups) == len(state_dict['param_groups']):
                state_dict['param_groups'] = groups

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch casts every state to the parameter's dtype, which would round a bfloat16 model's moments and kappa
        params = [p for group in self.param_groups for p in group['params']]
        ids = [i for group in state_dict['param_groups'] for i in group['params']]
        for p, i in zip(params, ids, strict=True):
            for name, value in saved.get(i, {}).items():
                if torch.is_tensor(value):
                    self.state[p][name] = value.detach().to(p.device, copy=True)

    # -- the step -------------------------------------------------------------------------------------------------

    def _decays(self, tensors, proceed):
        """d_j, a vector for each of `tensors` (regularized ones only). `proceed` False: keep every state as it is."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. Returns the closure's loss, or None.

        Leaves the total gradient norm before clipping in `grad_norm` (0-d float32) and counts in `skipped_steps` (0-d
        int64) the steps that changed nothing because that norm was not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = self._tensors()
        if not tensors:
            return loss
        grad_coef, proceed = self._measure_gradients(tensors)
        self.skipped_steps = self.skipped_steps.to(proceed.device) + ~proceed
        if proceed.is_cpu and not proceed:
            return loss
        for t in tensors:
            t.steps.add_(proceed.to(t.device))

        before = self.order == 'before'
        regularized = [t for t in tensors if t.regularized]
        decays = dict(zip(regularized, self._decays(regularized, proceed), strict=True)) if before else {}
        for t in tensors:
            decay, group = decays.get(t, torch.zeros_like(t.steps)), t.group
            if t in decays and t.reg_function != 'l2':  # only l2's correction is a decay that Adam's pass can carry
                plain.correct_(t.params, decay, t.reg_function)
                decay = torch.zeros_like(decay)
            summing = t.regularized and self._scalars and t.reg_function == 'l2' and (not before or t.steps.is_cpu)
            t.squares = torch.empty_like(t.steps) if summing else None
            plain.adam_(
                t.params, [p.grad for p in t.params], t.exp_avgs, t.exp_avg_sqs, t.steps, decay,
                lr=group['lr'], beta1=group['betas'][0], beta2=group['betas'][1], eps=group['eps'],
                grad_coef=grad_coef.to(t.device), skip=(~proceed).float().to(t.device), squares=t.squares,
            )  # fmt: skip
            if before and summing:
                t.remember()
        if not before:
            for t, decay in zip(regularized, self._decays(regularized, proceed), strict=True):
                plain.correct_(t.params, decay, t.reg_function)
        return loss

    def _R(self, t):
        """R_j of the weights as they are now: what the pass that wrote them summed, if nobody wrote them since."""
        if t.squares is not None and (self.order == 'after' or t.unchanged()):
            return t.squares
        return plain.regularizer(t.params, t.reg_function)

    def _measure_gradients(self, tensors):
        """What to multiply the gradients with (unscaling and clipping), and whether the step goes ahead: 0-d each."""
        device = tensors[0].device
        coef, proceed = torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device)
        if getattr(self, 'grad_scale', None) is not None:
            coef = 1 / self.grad_scale.to(device)
        if getattr(self, 'found_inf', None) is not None:
            proceed = self.found_inf.to(device) == 0
        if self.max_grad_norm is not None:
            # backwards, because the pass that comes next starts with the first: their gradients are still in the cache
            squares = [plain.sum_of_squares([p.grad for p in reversed(t.params)]).to(device) for t in reversed(tensors)]
            self.grad_norm = torch.stack(squares).sum().sqrt() * coef
            proceed = proceed & self.grad_norm.isfinite()
            if self.max_grad_norm > 0:
                coef = coef * (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        return coef, proceed


def weight_norms(module):
    """{name: ||theta||} of the module's trainable tensors of two or more dimensions, as Python floats, in its order.

    The order is that of the first parameter group that an optimizer here makes of the module.
    """
    named = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad and p.dim() >= 2}
    squares = plain.regularizer(list(named.values()), 'l2').tolist() if named else []
    return {name: math.sqrt(square) for name, square in zip(named, squares, strict=True)}


class AdamW(_NormAdam):
    """Adam with decoupled weight decay: d_j = lr * weight_decay (Loshchilov & Hutter 2019).

    Args:
        params: an nn.Module, an iterable of tensors, or parameter groups. A group may say `regularize`, a bool or one
            bool a parameter; where it does not, tensors of two or more dimensions are decayed.
        lr: learning rate, a number or a one-element tensor.
        betas, eps: Adam's.
        weight_decay: per step and unit of learning rate.
        max_grad_norm: clip the gradients to this total norm within the step, as clip_grad_norm_ before it would,
            leaving them as they are. 0.0 measures and guards without clipping; None does not even measure.
        impl: 'auto' or 'torch'.
    Raises ValueError for an argument out of range.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, *,
                 max_grad_norm=0.0, impl='auto'):
        _require(weight_decay >= 0, f'weight_decay={weight_decay} must be >= 0')
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, order='before', max_grad_norm=max_grad_norm, impl=impl)

    def _decays(self, tensors, proceed):
        decays = [t.group['lr'] * t.group['weight_decay'] * torch.ones_like(t.steps) for t in tensors]
        return [torch.where(proceed.to(d.device), d, 0.0) for d in decays]


class AdamCPR(_NormAdam):
    """Adam with an upper bound kappa_j on R_j of each tensor, enforced by an augmented Lagrangian (arXiv 2311.09058).

        lambda_j <- max(0, lambda_j + mu / n_j * (R_j - kappa_j))
        theta_j  <- theta_j - lambda_j * grad R_j - lr * u             (l2: d_j = 2 * lambda_j)

    Args, under pytorch_cpr.AdamCPR's names:
        params: an nn.Module, an iterable of tensors, or parameter groups. Of a module are regularized the tensors of
            two or more dimensions other than norms', biases and, unless `reg_embedding`, embeddings, a weight tied
            to an embedding counting as one. A group may say `regularize`, a bool or one bool a parameter; where it
            does not, tensors of two or more dimensions are regularized.
        lr, betas, eps: Adam's.
        kappa_init_method: where kappa_j comes from (the paper's name):
            'uniform' (Kappa-K): kappa_init_param; 'dependent' (Kappa-kI0): kappa_init_param * R_j at the start;
            'warm_start' (Kappa-WS): R_j after kappa_init_param steps, no constraint until then;
            'inflection_point' (Kappa-IP): R_j when its growth first slows down, no constraint until then. For this a
            bias-corrected moving average of R_j (decay reg_ema_decay) is looked at every reg_step_size steps; the
            fourth look is the first that can find it, an R_j that falls has no growth to slow down. Each tensor has
            its own.
        kappa_init_param: see there; not used by 'inflection_point'.
        reg_function: R, one of 'l2', 'l1', 'std', 'huber' (formulas: kernels/plain.py, regularizer).
        kappa_update: mu, how fast lambda follows. Divided by the tensor's number of elements n_j, except for 'std'.
        reg_embedding: with a module: regularize embeddings too.
        reg_by_lr: multiply the correction by the learning rate.
        order: 'before' (the paper's Algorithm 1) or 'after' (pytorch-cpr) the Adam update.
        max_grad_norm, impl: as AdamW's.
    State of a regularized tensor besides Adam's, 0-d each: kappa (nan until set), kappa_set, lagmul (lambda) and, for
    'inflection_point', ema, ema_error, ema_last, ema_growth. Raises ValueError for an argument out of range.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, kappa_init_method='inflection_point',
                 kappa_init_param=1000.0, reg_function='l2', kappa_update=1.0, reg_step_size=200, reg_ema_decay=0.99,
                 reg_embedding=False, reg_by_lr=False, *, order='before', max_grad_norm=0.0, impl='auto'):
        _require(kappa_init_method in KAPPA_INIT_METHODS,
                 f"kappa_init_method='{kappa_init_method}' must be one of {', '.join(KAPPA_INIT_METHODS)}")
        _require(reg_function in REG_FUNCTIONS,
                 f"reg_function='{reg_function}' must be one of {', '.join(REG_FUNCTIONS)}")
        _require(kappa_init_method == 'inflection_point' or kappa_init_param > 0,
                 f'kappa_init_param={kappa_init_param} must be > 0')
        _require(kappa_init_method != 'warm_start' or kappa_init_param == int(kappa_init_param),
                 f'kappa_init_param={kappa_init_param} must be a whole number of steps for warm_start')
        _require(kappa_update >= 0, f'kappa_update={kappa_update} must be >= 0')
        _require(reg_step_size >= 1 and reg_step_size == int(reg_step_size),
                 f'reg_step_size={reg_step_size} must be a whole number of steps, at least 1')
        _require(0 <= reg_ema_decay < 1, f'reg_ema_decay={reg_ema_decay} must be in [0, 1)')
        self.reg_embedding = reg_embedding
        self._scalars = ('kappa', 'kappa_set', 'lagmul')
        if kappa_init_method == 'inflection_point':
            self._scalars += ('ema', 'ema_error', 'ema_last', 'ema_growth')
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=0.0,  # a group that torch.optim.AdamW can load must have one
            kappa_init_method=kappa_init_method, kappa_init_param=kappa_init_param, reg_function=reg_function,
            kappa_update=kappa_update, reg_step_size=reg_step_size, reg_ema_decay=reg_ema_decay, reg_by_lr=reg_by_lr,
        )  # fmt: skip
        super().__init__(params, defaults, order=order, max_grad_norm=max_grad_norm, impl=impl)

    def __getstate__(self):
        return {**super().__getstate__(), 'reg_embedding': self.reg_embedding, '_scalars': self._scalars}

    def _regularized_in(self, module):
        # a tied weight appears under both its names, so each name may rule it out
        named = [(name, p) for name, p in module.named_parameters(remove_duplicate=False) if p.dim() >= 2]
        out = {id(p) for name, p in named if name.rpartition('.')[2] == 'bias'}
        out |= {id(p) for m in module.modules() if isinstance(m, NORMS) for p in m.parameters()}
        if not self.reg_embedding:
            out |= {id(p) for name, p in named if 'embed' in name}
            out |= {id(m.weight) for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        return {id(p) for _, p in named} - out

    def _init_scalars(self, p, group):
        method, param = group['kappa_init_method'], group['kappa_init_param']
        kappa = math.nan
        if method == 'uniform':
            kappa = float(param)
        elif method == 'dependent':
            kappa = param * plain.regularizer([p], group['reg_function'])[0]
        return {'kappa': kappa, 'kappa_set': method in ('uniform', 'dependent'), 'lagmul': 0.0,
                'ema': math.nan, 'ema_error': 0.0, 'ema_last': math.nan, 'ema_growth': math.nan}

    def _decays(self, tensors, proceed):
        return [self._decay(t, self._R(t), proceed.to(t.device)) for t in tensors]

    def _decay(self, t, R, proceed):
        group, kappa, kappa_set, lagmul = t.group, *(t.scalars[k] for k in ('kappa', 'kappa_set', 'lagmul'))
        set_now = self._is_kappa_due(t, R, proceed) & ~kappa_set & proceed
        kappa.copy_(torch.where(set_now, R, kappa))
        kappa_set |= set_now
        mu = group['kappa_update'] if group['reg_function'] == 'std' else group['kappa_update'] / t.numel
        constrained = kappa_set & proceed
        lagmul.copy_(torch.where(constrained, (lagmul + mu * (R - kappa)).clamp(min=0), lagmul))
        decay = lagmul * (2 if group['reg_function'] == 'l2' else 1) * (group['lr'] if group['reg_by_lr'] else 1)
        return torch.where(constrained, decay, 0.0)

    def _is_kappa_due(self, t, R, proceed):
        """For each tensor whether kappa_j is to be taken from R_j now; asked anew each step until it was."""
        method = t.group['kappa_init_method']
        if method == 'warm_start':
            # R stems from the weights after this step's Adam update ('after') or from those after the step before
            return t.steps - int(self.order == 'before') >= t.group['kappa_init_param']
        if method == 'inflection_point':
            return self._slows_down(t, R, proceed)
        return torch.zeros_like(t.scalars['kappa_set'])

    def _slows_down(self, t, R, proceed):
        """Kappa-IP's detector: the growth of R's average since the last look is less than the growth before it."""
        every, decay = t.group['reg_step_size'], t.group['reg_ema_decay']
        ema, error, last, growth = (t.scalars[k] for k in ('ema', 'ema_error', 'ema_last', 'ema_growth'))

        # ema <- ema + alpha (R - ema) with alpha = (1 - decay) / (1 - decay^t) is the bias-corrected average itself.
        # Where R moves little, alpha (R - ema) is below ema's last digit: ema_error carries what float32 rounds off.
        alpha = (1 - decay) / -torch.expm1(t.steps * (math.log(decay) if decay > 0 else -math.inf))
        move = torch.where(ema.isnan(), 0.0, error + alpha * (R - ema - error))
        moved = torch.where(ema.isnan(), R, ema + move)
        error.copy_(torch.where(proceed, torch.where(ema.isnan(), 0.0, move - (moved - ema)), error))
        ema.copy_(torch.where(proceed, moved, ema))

        look = (t.steps % every == 0) & proceed
        grown = ema - last  # nan at the first look, and so no comparison with it holds
        rounding = 16 * torch.finfo(torch.float32).eps * ema.abs()  # of R, a float32 sum over the tensor, and of ema
        # A falling R is none that slows down; and the average's delay, which lengthens until it is full, would make a
        # straight fall look as if it grew steeper.
        found = look & (t.steps >= 4 * every) & (growth > 0) & (grown < growth - rounding)
        growth.copy_(torch.where(look, grown, growth))
        last.copy_(torch.where(look, ema, last))
        return found


class AdamWN(_NormAdam):
    """Adam that steers the norm of each tensor to a target (Weight Norm Control, arXiv 2311.11446).

        d_j = k * (1 - r * ||theta_j at the start|| / ||theta_j||)

    r = 0 is AdamW with k = lr * weight_decay. A schedule sets group['ratio'] before each step, as it sets group['lr'].

    Args:
        params: an nn.Module, an iterable of tensors, or parameter groups. A group may say `regularize`, a bool or one
            bool a parameter; where it does not, tensors of two or more dimensions are controlled.
        lr, betas, eps: Adam's.
        rate: k in [0, 1], the share of the way to the target that a step goes.
        ratio: r, the target as a multiple of the norm at the start: a number, or one for each parameter of the group.
        norm: the target itself, in place of ratio: a number, or one for each parameter of the group.
        scope: 'tensor' steers every tensor by its own norm, 'global' all of them by their joint norm.
        order: 'after' (Algorithm 1, line 13.c) or 'before' the Adam update.
        max_grad_norm, impl: as AdamW's.
    State of a controlled tensor besides Adam's: init_norm, 0-d. Raises ValueError for an argument out of range.
    """

    _scalars = ('init_norm',)

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, *, rate=1e-2, ratio=1.0, norm=None,
                 scope='tensor', order='after', max_grad_norm=0.0, impl='auto'):
        _require(0 <= rate <= 1, f'rate={rate} must be in [0, 1]')
        for name, target in (('ratio', ratio), ('norm', norm)):
            _require(target is None or bool((torch.as_tensor(target) >= 0).all()), f'{name}={target} must be >= 0')
        _require(scope in ('tensor', 'global'), f"scope='{scope}' must be 'tensor' or 'global'")
        _require(scope == 'tensor' or torch.as_tensor(ratio if norm is None else norm).numel() == 1,
                 "scope='global' steers one joint norm: ratio and norm must be single numbers")
        self.scope = scope
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0, rate=rate, ratio=ratio, norm=norm)
        super().__init__(params, defaults, order=order, max_grad_norm=max_grad_norm, impl=impl)

    def __getstate__(self):
        return {**super().__getstate__(), 'scope': self.scope}

    def _complete(self, group):
        super()._complete(group)
        for name in ('ratio', 'norm'):
            count = torch.as_tensor(0.0 if group[name] is None else group[name]).numel()
            _require(count in (1, len(group['params'])),
                     f"{name} has {count} values for a group of {len(group['params'])} parameters")

    def _init_scalars(self, p, group):
        return {'init_norm': plain.regularizer([p], 'l2')[0].sqrt()}

    def _decays(self, tensors, proceed):
        squares = [self._R(t) for t in tensors]
        starts = [t.scalars['init_norm'].square() for t in tensors]
        if self.scope == 'global' and tensors:
            squares, starts = ([torch.stack([x.sum().to(tensors[0].device) for x in xs]).sum()] * len(xs)
                               for xs in (squares, starts))  # fmt: skip
        return [self._decay(t, R.to(t.device).sqrt(), R_0.to(t.device).sqrt(), proceed.to(t.device))
                for t, R, R_0 in zip(tensors, squares, starts, strict=True)]

    def _decay(self, t, norm, init_norm, proceed):
        target = t.per_tensor(t.group['ratio']) * init_norm
        if t.group['norm'] is not None:
            target = t.per_tensor(t.group['norm'])
        away = 1 - torch.where(norm > 0, target / norm, 0.0)  # a tensor of zeros has no direction to grow in
        return torch.where(proceed, t.group['rate'] * away, 0.0).expand_as(t.steps)


def _require(condition, message):
    if not condition:
        raise ValueError(message)
