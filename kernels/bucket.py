"""What a step works on: the parameters that share options, a device and a dtype, as one object."""

import importlib
import math
import warnings

import torch

from . import dtensor, plain
from .tensors import as_laid_out, is_capturing, is_dense, local, sum_dtype

MOMENTS = ('exp_avg', 'exp_avg_sq')
# what goes over memory before the rule decides, and what after
PASSES = {
    'before': (None, 'adam_'),
    'between': ('moments_', 'apply_'),
    'after': ('adam_', 'correct_'),
}


class Bucket:
    """n parameters that share their groups' options, a device, a dtype and processes of shards.

    Vectors are (n,), on the device. state: {name: vector}; from a parameter's first gradient on,
    optimizer.state[p] shows views of them beside exp_avg and exp_avg_sq. R, mean, theta_u,
    u_squares: of whole tensors, as `measure` found them. numel: of whole tensors, at least 1.
    regularized, has_grad, active: bool; active: what this step corrects. lr, proceed, grad_squares,
    found_inf: 0-d. Where `proceed` is False, the step is skipped: nothing is active, `step` does
    not count it, and no pass writes. coefficients, hyper: see plain.adam_; decay (d), shift,
    step_size (s) and rsqrt_bias2 are the columns of coefficients. group stands for all `groups`.
    Their `regularize` and `reg_function` are read when the bucket is made.
    """

    def __init__(self, optimizer, groups, members, kernels):
        self.optimizer, self.groups, self.group = optimizer, groups, groups[0]
        self.kernels = kernels
        self.params, self.regularize = zip(*members, strict=True)
        self.shard_groups = dtensor.shard_groups(self.params[0])
        self.has_dtensors = any(hasattr(p, 'device_mesh') for p in self.params)
        self.tensors = kernels.Tensors(self.params, self.group.get('reg_function', 'l2'))
        self.tensors.set_grads([None] * len(members))
        self.device = self.tensors.device
        self.regularized = torch.tensor(self.regularize, dtype=torch.bool, device=self.device)
        self.coefficients = torch.zeros(len(members), 4, dtype=torch.float32, device=self.device)
        self.decay, self.shift, self.step_size, self.rsqrt_bias2 = self.coefficients.unbind(1)
        numel, dtype = [max(p.numel(), 1) for p in self.params], sum_dtype(self.device)
        self.numel = torch.tensor(numel, dtype=dtype, device=self.device)
        self.hyper = torch.zeros(6, dtype=torch.float32, device=self.device)
        self.grad_coef = self.hyper[0]  # a view
        self.lr, self.zero = torch.zeros_like(self.grad_coef), torch.zeros_like(self.grad_coef)
        self.log_betas, self._filled_for = self.hyper.new_zeros(2, 1), None
        self.has_grad, self._has_grad = None, None
        self.regularizes = any(self.regularize)
        self.measures_R = optimizer.needs_R and self.regularizes
        self.passes = PASSES[optimizer.order] if self.regularizes else ('adam_', None)
        self.moment_sums = None
        self.measure(R=True)
        self.state = {'step': torch.zeros_like(self.decay)}
        self.state.update(optimizer.init_state(self) if self.regularizes else {})
        saved = [optimizer.state.get(p, {}) for p in self.params]
        for name, fresh in self.state.items():
            values = [state.get(name, x) for state, x in zip(saved, fresh, strict=True)]
            values = [torch.as_tensor(x).to(fresh).reshape(()) for x in values]
            self.state[name] = torch.stack(values)
        self.started = [False] * len(members)
        for j, state in enumerate(saved):
            if 'exp_avg' in state:
                self._start(j)

    def _start(self, j):
        """Give parameter j its moments and show its part of the vectors."""
        p, state = self.params[j], self.optimizer.state[self.params[j]]
        for name in MOMENTS:
            x = state.get(name)
            x = torch.zeros_like(p, dtype=torch.float32) if x is None else x
            check(x.shape == p.shape, f'{name} has shape {tuple(x.shape)}, not {tuple(p.shape)}')
            state[name] = as_laid_out(p, x, torch.float32)
        shown = self.state if self.regularize[j] else ('step',)
        state.update({name: self.state[name][j] for name in shown})
        self.tensors.set_moments(j, *(state[name] for name in MOMENTS))
        self.started[j] = True

    def warn_of_zeros(self, consequence):
        """Warn of new tensors whose R is 0, which a bound or target relative to it would crush."""
        for name in self.zeros():
            warnings.warn(f'{name} starts with R = 0: {consequence}', stacklevel=2)

    def zeros(self):
        """Return the names of regularized tensors that take their first step and whose R is 0."""
        triples = zip(self.params, self.regularize, (self.R == 0).tolist(), strict=True)
        zeros = [p for p, flag, zero in triples if flag and zero and p.numel()]
        waiting = (p for p in zeros if 'exp_avg' not in self.optimizer.state.get(p, {}))
        return [self.optimizer.name_of(p) for p in waiting if p.grad is not None]

    def is_outdated(self):
        """Return whether options differ now, or a parameter has moved or has its first gradient."""
        if not all(same_options(self.optimizer, self.group, g) for g in self.groups[1:]):
            return True
        waiting = (p for p, s in zip(self.params, self.started, strict=True) if not s)
        starts = any(p.grad is not None for p in waiting) and not is_capturing(self.device)
        params = map(local, self.params) if self.has_dtensors else self.params
        return starts or self.tensors.have_moved(params)

    def set_grads(self):
        """Take this step's gradients; start parameters with their first. Return whether any."""
        grads = [p.grad for p in self.params]
        has_grad = [grad is not None for grad in grads]
        if has_grad != self._has_grad:
            if is_capturing(self.device):
                raise RuntimeError('before a capture, take a step with the same gradients')
            mask = torch.tensor(has_grad, pin_memory=self.device.type == 'cuda')
            self._has_grad, self.has_grad = has_grad, mask.to(self.device, non_blocking=True)
        for j, grad in enumerate(grads):
            if grad is not None and grad.layout is not torch.strided:
                name = self.optimizer.name_of(self.params[j])
                raise RuntimeError(f'{name} has a sparse gradient: make it dense')
            if grad is not None and not self.started[j]:
                self._start(j)
        if self.has_dtensors:
            pairs = zip(self.params, grads, strict=True)
            grads = [g if g is None else local(dtensor.sharded_like(p, g)) for p, g in pairs]
        self.tensors.set_grads(grads)
        if is_capturing(self.device):
            self.tensors.captured.append(self.has_grad)
        return any(has_grad)

    def measure(self, grads=False, R=False):
        """Find the gradients' sum of squares and R, of whole tensors: one all-reduce."""
        sums, found_inf = {}, getattr(self.optimizer, 'found_inf', None)  # GradScaler sets it
        if grads and found_inf is not None:
            sums['found_inf'] = found_inf.to(self.numel).reshape(())
        if grads and self.optimizer.max_grad_norm is not None:
            sums['grad_squares'] = self.kernels.grad_squares(self.tensors)
        if R and self.measures_R:
            found, self.moment_sums = self.moment_sums, None  # moments_ has summed theta^2 already
            sums['reg_sums'] = self.kernels.reg_sums(self.tensors) if found is None else found
        if self.shard_groups and sums:
            dtensor.all_reduce_(sums, self.shard_groups)
        self.found_inf, self.grad_squares = sums.get('found_inf'), sums.get('grad_squares')
        if R and self.measures_R:
            self.R, second, *third = sums['reg_sums'].unbind()
            if third:  # from moments_
                self.theta_u, self.u_squares = second, third[0]
            if self.tensors.reg_function == 'std':
                self.mean = second / self.numel
                squares = self.R - self.numel * self.mean.square()
                squares = torch.where(squares > 1e-6 * self.R, squares, 0.0)  # else it is rounding
                self.R = (squares / (self.numel - 1).clamp(min=1)).sqrt()

    def run(self, name):
        """Go over memory: the pass of this name, if any."""
        t, coefficients, proceed = self.tensors, self.coefficients, self.proceed
        if name == 'correct_':
            self.kernels.correct_(t, coefficients, proceed)
        elif name is not None:
            self.moment_sums = getattr(self.kernels, name)(t, coefficients, self.hyper, proceed)

    def begin(self, grad_coef, proceed):
        """Count the step where it goes ahead, and fill in all that Adam's pass needs but d_j."""
        lr, betas, eps = (self.group[name] for name in ('lr', 'betas', 'eps'))
        if (betas, eps) != self._filled_for:
            self._filled_for = betas, eps
            values = (betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps)
            for place, value in zip(self.hyper[1:], values, strict=True):
                place.fill_(value)
            for place, beta in zip(self.log_betas, betas, strict=True):
                place.fill_(math.log(beta) if beta else -math.inf)
        self.lr.fill_(lr.reshape(()) if torch.is_tensor(lr) else lr)
        self.grad_coef.copy_(grad_coef)
        self.proceed = proceed.to(self.device)
        if self.passes == PASSES['after']:  # the first pass corrects nothing
            self.coefficients[:, :2].zero_()

        moves, step = self.has_grad & self.proceed, self.state['step']
        step += moves
        if self.regularizes:
            self.active = self.regularized & moves
            if torch.is_tensor(lr) or lr < torch.finfo(torch.float32).tiny:
                self.active &= self.lr.bool()  # a step at lr = 0, or 1e-46, changes no decision
        bias1, bias2 = torch.expm1(step * self.log_betas).neg_().unbind()  # 1 - beta^t
        torch.div(self.lr, bias1, out=self.step_size)
        torch.rsqrt(bias2, out=self.rsqrt_bias2)


def make_buckets(optimizer):
    """Return an optimizer's parameters in buckets. Few large ones take less time than many."""
    families, buckets = [], {}  # lists of groups that agree; {what a bucket shares: its arguments}
    for group in optimizer.param_groups:
        groups = next((gs for gs in families if same_options(optimizer, gs[0], group)), None)
        if groups is None:
            families.append(groups := [])
        groups.append(group)
        flags = group['regularize']
        flags = flags if isinstance(flags, list) else [flags] * len(group['params'])
        for p, flag in zip(group['params'], flags, strict=True):
            kernels = kernels_for(p, optimizer)
            halves = flag and optimizer.order == 'between'  # others take the one cheaper pass
            shared = id(groups), halves, kernels, p.device, p.dtype, dtensor.shard_groups(p)
            _, members, _ = buckets.setdefault(shared, (groups, [], kernels))
            members.append((p, flag))
    return [Bucket(optimizer, *arguments) for arguments in buckets.values()]


def same_options(optimizer, group, other):
    """Return whether two groups agree in all `defaults`. A tensor is equal to itself alone."""
    pairs = [(group.get(name), other.get(name)) for name in optimizer.defaults]
    return all(x is y or not any(map(torch.is_tensor, (x, y))) and x == y for x, y in pairs)


def kernels_for(parameter, optimizer):
    """Return the module of kernels/ that updates a parameter. ValueError if `impl` cannot."""
    p, impl, auto = local(parameter), optimizer.impl, optimizer.impl == 'auto'
    float32_on_cpu = p.is_cpu and p.dtype == torch.float32
    if auto:
        impl = 'triton' if p.is_cuda else 'numba' if float32_on_cpu else 'torch'
    if impl == 'torch' or not is_dense(p):
        return plain
    try:
        kernels = importlib.import_module('.gpu' if impl == 'triton' else '.cpu', __package__)
    except ImportError:
        check(auto, f"impl='{impl}' needs a package: pip install {impl}")
        return plain
    if not (float32_on_cpu if impl == 'numba' else p.is_cuda or kernels.INTERPRETED):
        where = 'float32 on a CPU' if impl == 'numba' else 'a GPU, or TRITON_INTERPRET=1 on a CPU'
        name = optimizer.name_of(parameter)
        raise ValueError(f"impl='{impl}' needs {where}; {name} is {p.dtype} on {p.device}")
    return kernels


class SavedState:
    """A state that an optimizer is about to load, possibly from another optimizer or package."""

    def __init__(self, optimizer):
        self.optimizer, self.groups, self.states = optimizer, optimizer.param_groups, {}

    def __enter__(self):
        self.hooks = [
            self.optimizer.register_load_state_dict_pre_hook(self.complete),
            self.optimizer.register_load_state_dict_post_hook(self.restore, prepend=True),
        ]

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def complete(self, _, state_dict):
        """Add the optimizer's options that its groups lack. Raise ValueError if it does not fit."""
        groups, kind = state_dict['param_groups'], type(self.optimizer).__name__
        for name in ('maximize', 'amsgrad'):
            found = any(group.get(name) for group in groups)
            check(not found, f'the state was saved with {name}=True, which {kind} does not have')
        if [len(g['params']) for g in groups] != [len(g['params']) for g in self.groups]:
            return  # torch says that they do not fit
        params, ids = ([x for g in gs for x in g['params']] for gs in (self.groups, groups))
        for p, i in zip(params, ids, strict=True):
            self.states[p] = state = dict(state_dict['state'].get(i, {}))
            for name in MOMENTS if 'step' in state else ():
                fits = name in state and state[name].shape == p.shape
                check(fits, f'{name} of parameter {i} is missing or not of shape {tuple(p.shape)}')
            kappa = state.get('kappa')
            if kappa is not None and 'kappa_set' not in state:
                # pytorch_cpr marks no bound by 1e6 (Kappa-IP) and 0 (Kappa-WS)
                state['kappa_set'] = (kappa != 1e6) & (kappa != 0)
        pairs = zip(self.groups, groups, strict=True)
        groups = [{**mine, **its} for mine, its in pairs]
        for group, mine in zip(groups, self.groups, strict=True):
            self.optimizer.check_group({**group, 'params': mine['params']})
        return {**state_dict, 'param_groups': groups}

    def restore(self, optimizer):
        """Set the tensors as they were saved: torch has rounded them to the parameter's dtype."""
        for p, state in self.states.items():
            for name, x in state.items():
                if torch.is_tensor(x):
                    x = x.detach().to(p.device, copy=True)
                    optimizer.state[p][name] = dtensor.sharded_like(p, x)


def check(condition, message):
    if not condition:
        raise ValueError(message)
