"""AdamW, AdamCPR and AdamWN: Adam whose regularizer is the norm of each weight tensor.

All three are one update with another scalar d_j for tensor j. With u = m_hat / (sqrt(v_hat) + eps), Adam's direction,

    theta_j <- (1 - d_j) * theta_j - lr * u

    AdamW     d_j = lr * weight_decay                                Loshchilov & Hutter 2019
    AdamCPR   d_j = 2 * lambda_j                                     Franke et al., arXiv 2311.09058, Algorithm 1
              lambda_j <- max(0, lambda_j + mu / n_j * (R_j - kappa_j)),  R_j = sum(theta_j ** 2)
    AdamWN    d_j = k * (1 - r * ||theta_j at the start|| / ||theta_j||)     Loshchilov, arXiv 2311.11446, Algorithm 1

order='before' takes R_j and theta_j of d_j's product before the Adam update (AdamCPR, Algorithm 1, lines 6 and 7),
order='after' from the Adam-updated weights (AdamWN, line 13.c; and the pytorch-cpr package).

Which tensors, in which order and with which options stands here; the passes that do it stand in kernels/, as Triton
kernels for a GPU and in plain torch. On an accelerator nothing in step() waits for the device: clipping, skipping,
kappa and lambda are decided there.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

import shards
from kernels import plain

MOMENTS = ('exp_avg', 'exp_avg_sq')
REG_FUNCTIONS = ('l2', 'l1', 'std', 'huber')
KAPPA_INIT_METHODS = ('uniform', 'dependent', 'warm_start', 'inflection_point')
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)


class _Member(NamedTuple):
    p: torch.Tensor
    group: dict[str, Any]
    place: int  # in the group
    number: int  # among all parameters of the optimizer
    regularized: bool


class _Batch:
    """The parameters that one call of each pass serves: one device, one kind of storage, the same options of Adam.

    The regularized ones come first, `parts` says which of them belong to which group. Their per-tensor state stands in
    vectors, so that one operation serves all; the optimizer's state of each parameter is a view into them.
    """

    def __init__(self, optimizer, passes, members):
        members = sorted(members, key=lambda member: not member.regularized)  # stable: else as they came
        self.group, self.passes = members[0].group, passes
        self.params = [m.p for m in members]
        states = [optimizer._state_of(m.p, m.group, m.regularized) for m in members]
        reg_function, self.over = self.group.get('reg_function', 'l2'), shards.groups(self.params[0])
        self.centred = bool(self.over) and reg_function == 'std'  # the mean is not that of the part: see Whole.centred
        self.tensors = passes.Tensors(
            *([shards.local(x) for x in xs] for xs in (self.params, *([s[k] for s in states] for k in MOMENTS))),
            'l2' if self.centred else reg_function, [m.number for m in members],
        )  # fmt: skip
        # what d_j is decided from, and by which passes: of a spread tensor that is little, and known from its parts
        self.whole, self.deciding = self.tensors, passes
        if self.over:
            self.whole, self.deciding = shards.Whole(self.params, reg_function), plain
        self.device = self.tensors.device
        self.regularized = sum(m.regularized for m in members)
        # place in its group, for options given as one value a parameter
        self.index = torch.tensor([m.place for m in members], device=self.device)
        self.parts = []
        for start, m in enumerate(members[: self.regularized]):
            if not self.parts or self.parts[-1][0] is not m.group:
                self.parts.append((m.group, slice(start, start)))
            self.parts[-1] = (m.group, slice(self.parts[-1][1].start, start + 1))
        self.scalars = {}
        for name in ('step', *(optimizer._scalars if self.regularized else ())):
            having = states if name == 'step' else states[: self.regularized]
            dtype = torch.bool if name == 'kappa_set' else torch.float32  # others' checkpoints have steps of int
            values = [torch.as_tensor(state[name], dtype=dtype, device=self.device) for state in having]
            self.scalars[name] = torch.stack(values)
            for j, state in enumerate(having):
                state[name] = self.scalars[name][j]
        self.states = [(p, state, dict(state)) for p, state in zip(self.params, states, strict=True)]
        self.steps = self.scalars['step']
        self.decay, self.no_decay = torch.zeros_like(self.steps), torch.zeros_like(self.steps)
        self.lists = {}  # per_tensor's, on the device

    def centre(self):
        """Where d_j is for a correction around the mean of parts that are elsewhere, have it for one around 0, and
        shift_() add what that takes too much."""
        if self.centred:
            decay, self.shifts = self.whole.centred(self.decay)
            self.decay.copy_(decay)

    def shift_(self):
        if self.centred:
            for theta, shift in zip(self.tensors.params[: self.regularized], self.shifts, strict=True):
                theta.add_(shift)

    def per_tensor(self, option):
        """A group's option, a number or one for each of its parameters, as it is or as a vector over the batch."""
        if isinstance(option, (list, tuple)):
            if self.lists.get('option') != list(option):
                self.lists = {'option': list(option), 'vector': torch.tensor(option, device=self.device).float()}
            option = self.lists['vector']
        if torch.is_tensor(option) and option.numel() > 1:
            return option.to(self.device, torch.float32)[self.index.clamp(max=option.numel() - 1)]
        return option.reshape(()) if torch.is_tensor(option) else option


class _NormAdam(Optimizer):
    """What the three have in common: grouping, clipping, skipping, state, and the order of the passes.

    A subclass says what d_j is: `_decide` has it computed for some regularized tensors. `_scalars` names the 0-d states
    it keeps for each of them and `_init_scalars` makes those.

    Args of all three:
        max_grad_norm: clip the gradients to this total norm within the step, as clip_grad_norm_ before it would,
            leaving them as they are. 0.0 measures and guards without clipping; None does not even measure.
        impl: 'torch'; 'triton', kernels for a GPU, on the CPU only in Triton's interpreter (TRITON_INTERPRET=1); or
            'auto', 'triton' for parameters on a GPU.
        moments_dtype: of exp_avg and exp_avg_sq, torch.float32 or torch.bfloat16.
        stochastic_rounding: True or a seed: round the bfloat16 weights (and moments) that are written at random, right
            on average, so that updates smaller than their last digit are not lost. The same seed gives the same bits.
            A correction that is a pass of its own (order='after'; in plain torch all but l2's) does so once more. Not
            so one addition, that of the mean's part in 'std' of DTensors: where it is less than half a last digit of
            bfloat16 weights it is lost, and they are pulled towards 0 instead of towards their mean.
        process_group: of the ranks that the parameters are divided between, each with whole tensors of its own, as
            torch.distributed.optim.ZeroRedundancyOptimizer does it: norms over all tensors are then over all ranks'.

    DTensors, such as fully_shard of FSDP2 makes, are updated part by part, each process what it has of a tensor, be it
    nothing at all. R and the gradients' norm are those of the whole tensors, their parts added up by one all-reduce a
    step (order='after': two). So kappa, lambda and clipping are the same on every process.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves grad_scale and found_inf here instead of unscaling by a pass
    _scalars = ()
    process_group = None

    def __init__(self, params, defaults, *, order, max_grad_norm=0.0, impl='auto', moments_dtype=torch.float32,
                 stochastic_rounding=None, process_group=None):
        lr, (beta1, beta2) = defaults['lr'], defaults['betas']
        _require(not torch.is_tensor(lr) or lr.numel() == 1, 'a tensor lr must have one element')
        _require(torch.is_tensor(lr) or lr >= 0, f'lr={lr} must be >= 0')
        _require(0 <= beta1 < 1 and 0 <= beta2 < 1, f'betas={defaults["betas"]} must both be in [0, 1)')
        _require(defaults['eps'] >= 0, f'eps={defaults["eps"]} must be >= 0')
        _require(order in ('before', 'after'), f"order='{order}' must be 'before' or 'after'")
        _require(max_grad_norm is None or max_grad_norm >= 0,
                 f'max_grad_norm={max_grad_norm} must be >= 0 (0 measures without clipping) or None')
        _require(impl in ('auto', 'torch', 'triton'), f"impl='{impl}' must be 'auto', 'torch' or 'triton'")
        _require(moments_dtype in (torch.float32, torch.bfloat16),
                 f'moments_dtype={moments_dtype} must be torch.float32 or torch.bfloat16')
        self.order, self.max_grad_norm, self.impl = order, max_grad_norm, impl
        self.moments_dtype = moments_dtype
        rounds = stochastic_rounding is not None and stochastic_rounding is not False  # 0 is a seed
        self.seed = int(stochastic_rounding) if rounds else None
        self.grad_norm, self.skipped_steps = None, torch.zeros((), dtype=torch.int64)
        self.process_group = process_group
        self._prepared, self._captured = (None, []), []
        if isinstance(params, nn.Module):
            params = self._group_module(params, defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        try:
            self._complete(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _complete(self, group):
        """Check a new group and say for each of its parameters whether it is regularized."""
        params, regularize = group['params'], group.get('regularize')
        for p in params:
            _require(p.dtype in (torch.float32, torch.bfloat16, torch.float16),
                     f'parameters must be float32, bfloat16 or float16, not {p.dtype}')
            if self.impl == 'triton':
                self._triton(p.device)  # raises now what would come up in the first step
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

        So a checkpoint's optimizer state has the layout of nanoGPT's, and any of the three loads that of another. A
        tensor that a module marks with `_no_weight_decay`, as state-space models do, is not regularized.
        """
        params = [p for p in module.parameters() if p.requires_grad]
        _require(params, f'{type(module).__name__} has no parameters that require a gradient')
        regularized = self._regularized_in(module)
        matrices, vectors = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
        vector_group = {'params': vectors, 'regularize': False}
        if 'weight_decay' in defaults:
            vector_group['weight_decay'] = 0.0  # what torch.optim.AdamW must find when it loads this group
        regularize = [id(p) in regularized and not getattr(p, '_no_weight_decay', False) for p in matrices]
        return [{'params': matrices, 'regularize': regularize}, vector_group]

    def _regularized_in(self, module):
        return {id(p) for p in module.parameters() if p.dim() >= 2}

    # -- state ----------------------------------------------------------------------------------------------------

    def _state_of(self, p, group, regularized):
        """The state of p, with whatever is still missing made: a state loaded from torch.optim.AdamW has no kappa."""
        state = self.state[p]
        if 'step' not in state:
            state['step'] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in MOMENTS:
            _require(name not in state or state[name].shape == p.shape,
                     f"a parameter's shape is {tuple(p.shape)} now, that of its {name} is not: drop optimizer.state[p]")
            if name not in state:  # spread as p is
                state[name] = torch.zeros_like(p, dtype=self.moments_dtype, memory_format=torch.contiguous_format)
        if regularized and any(name not in state for name in self._scalars):
            first = self._init_scalars(p, group)
            for name in self._scalars:
                state.setdefault(name, torch.as_tensor(first[name], device=p.device))
        return state

    def _batches(self):
        """The parameters that have a gradient, as a list of _Batch; made anew when anything about them changes."""
        options = [(id(g['lr']) if torch.is_tensor(g['lr']) else g['lr'], *g['betas'], g['eps'], g.get('reg_function'))
                   for g in self.param_groups]  # fmt: skip
        key, members, first = [], [], 0
        for group, ours in zip(self.param_groups, options, strict=True):
            regularize, alike = group['regularize'], options.index(ours)
            for i, p in enumerate(group['params']):
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(f'{type(self).__name__} does not support sparse gradients')
                regularized = regularize[i] if isinstance(regularize, list) else regularize
                part = shards.local(p)
                kind = (p.device, p.dtype, p.grad.dtype, part.is_contiguous(), alike)
                key.append((id(part), *kind, regularized, part.shape))
                members.append(_Member(p, group, i, first + i, regularized))
            first += len(group['params'])
        known, batches = self._prepared
        if not key:
            return []
        if known != key or any(self.state.get(p) is not s or any(s.get(k) is not x for k, x in entries.items())
                               for b in batches for p, s, entries in b.states):  # fmt: skip
            self._captured += [b for b in batches if b.tensors.captured]  # graphs still read their memory
            together = {}
            for kind, member in zip(key, members, strict=True):
                state = self._state_of(member.p, member.group, member.regularized)
                moments = [state[name] for name in MOMENTS]
                passes, over = self._passes_for([member.p, *moments]), shards.groups(member.p)
                together.setdefault((passes, over, *kind[1:6], *(x.dtype for x in moments)), []).append(member)
            batches = [_Batch(self, passes, alike) for (passes, *_), alike in together.items()]
            self._prepared = (key, batches)
        return batches

    def _passes_for(self, tensors):
        """The implementation of the passes for a parameter and its moments: kernels.fused or kernels.plain."""
        wanted = self.impl == 'triton' or self.impl == 'auto' and tensors[0].device.type == 'cuda'
        if wanted and all(x.is_contiguous() for x in tensors) and len({x.dtype for x in tensors[1:]}) == 1:
            return self._triton(tensors[0].device) or plain
        return plain

    def _triton(self, device):
        """kernels.fused, if it runs on `device`. Raises ValueError where it was asked for by name and does not."""
        try:
            from kernels import fused  # here, because there is no Triton for every machine that plain torch runs on
        except ImportError:
            _require(self.impl == 'auto', "impl='triton' needs the package triton: pip install triton")
            return None
        _require(device.type != 'cpu' or fused.INTERPRETED,
                 "impl='triton' runs on a GPU; on the CPU set TRITON_INTERPRET=1 to run the kernels in Triton's "
                 "interpreter, slowly, or take impl='torch'")  # fmt: skip
        return fused

    def __getstate__(self):
        own = {k: getattr(self, k) for k in ('order', 'max_grad_norm', 'impl', 'moments_dtype', 'seed', 'grad_norm',
                                             'skipped_steps')}  # fmt: skip
        return {**super().__getstate__(), **own}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._prepared, self._captured = (None, []), []  # the vectors of before are not those of the state just set

    def load_state_dict(self, state_dict):
        """As torch.optim's, but every state keeps its own dtype, and options that `state_dict` lacks stay ours."""
        saved, ids = {}, []

        def remember(_, state_dict):
            saved.update(state_dict['state'])
            ids.extend(i for group in state_dict['param_groups'] for i in group['params'])
            params = [p for group in self.param_groups for p in group['params']]
            for i, p in zip((i for group in state_dict['param_groups'] for i in group['params']), params, strict=False):
                for name in MOMENTS if saved.get(i) else ():
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
        for p, i in zip(params, ids, strict=True):
            for name, value in saved.get(i, {}).items():
                if torch.is_tensor(value):
                    self.state[p][name] = shards.like(p, value.detach().to(p.device, copy=True))

    # -- the step -------------------------------------------------------------------------------------------------

    def _decide(self, parts):
        """Have d_j computed. parts: (batch, group, span of the batch's tensors), all regularized; into batch.decay."""
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
        batches = self._batches()
        try:
            for b in batches:
                b.tensors.take([shards.local(p.grad) for p in b.params])
            if batches or self.process_group is not None:  # the other ranks wait for the sums of this one
                self._measure(batches)
                self._update(batches)
        finally:
            for b in batches:
                b.tensors.grads = None  # else they would live until the next step
        return loss

    def _add_up(self, batches, gradients=False, R=False):
        """For tensors that are spread over processes: add up what their parts here make of the gradients' sum of
        squares and of R, all by one all-reduce."""
        batches = [b for b in batches if b.over]
        vectors = []
        for b in batches:
            known = [x.sum().double().reshape(1) for x in (b.squares, b.found_inf) if gradients and x is not None]
            if R:
                known.append(b.whole.parts(b.tensors.params, b.regularized, b.tensors.R))
            vectors.append(torch.cat(known) if known else torch.zeros(0, dtype=torch.float64, device=b.device))
        shards.add_up(vectors, [b.over for b in batches])
        for b, vector in zip(batches, vectors, strict=True):
            if gradients and b.squares is not None:
                b.squares, vector = vector[:1].float(), vector[1:]
            if gradients and b.found_inf is not None:
                b.found_inf, vector = vector[0].float(), vector[1:]
            if R:
                b.whole.take(vector)

    def _measure(self, batches):
        """The gradients' norm; and for each batch its grad_coef and whether the step goes ahead, 0-d on its device."""
        found_inf, parts = getattr(self, 'found_inf', None), None
        devices = (p.device for group in self.param_groups for p in group['params'])
        device = batches[0].device if batches else next(devices, self.skipped_steps.device)
        for b in reversed(batches):
            b.squares = None if self.max_grad_norm is None else b.passes.sum_of_squares(b.tensors)
            b.found_inf = None if found_inf is None else found_inf.to(b.device)
        self._add_up(batches, gradients=True, R=self.order == 'before' and bool(self._scalars))
        if self.max_grad_norm is not None:
            parts = [b.squares.to(device) for b in reversed(batches)] or [torch.zeros(1, device=device).float()]
            parts = torch.cat(parts) if len(parts) > 1 else parts[0]
            if self.process_group is not None:
                parts = self._sum_of_ranks(parts.sum().reshape(1))
        self.skipped_steps = self.skipped_steps.to(device)
        for b in batches:
            scale, squares = (x if x is None else x.to(b.device) for x in (getattr(self, 'grad_scale', None), parts))
            grad_norm, b.grad_coef, b.proceed = b.passes.clip(
                b.tensors, squares, b.steps, self.skipped_steps if b is batches[0] else None,
                max_norm=self.max_grad_norm, grad_scale=scale, found_inf=b.found_inf,
            )  # fmt: skip
            self.grad_norm = grad_norm if b is batches[0] else self.grad_norm
        if parts is not None and not batches:
            self.grad_norm = parts.sum().sqrt()
            self.skipped_steps += ~self.grad_norm.isfinite()

    def _sum_of_ranks(self, x):
        """The sum of x over the ranks that the parameters are divided between."""
        x = x.double()
        torch.distributed.all_reduce(x, group=self.process_group)
        return x.float()

    def _update(self, batches):
        parts, before = [(b, *part) for b in batches for part in b.parts], self.order == 'before'
        if before:
            self._decide(parts)
            for b in batches:
                b.centre()
        for b in batches:
            lr, (beta1, beta2), eps = (b.group[k] for k in ('lr', 'betas', 'eps'))
            b.passes.adam_(
                b.tensors, b.steps, b.decay if before else b.no_decay, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
                grad_coef=b.grad_coef, proceed=b.proceed, order=self.order,
                sums=b.regularized if self._scalars and not b.centred else 0, seed=self.seed,
            )  # fmt: skip
        if not before:
            self._add_up(batches, R=True)
            self._decide(parts)
            for b in batches:
                b.centre()
                b.passes.correct_(b.tensors, slice(0, b.regularized), b.decay, b.steps, seed=self.seed)
        for b in batches:
            b.shift_()


def weight_norms(module):
    """{name: ||theta||} of the module's trainable tensors of two or more dimensions, as Python floats, in its order.

    The order is that of the first parameter group that an optimizer here makes of the module.
    """
    named = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad and p.dim() >= 2}
    squares = shards.regularizer(list(named.values()), 'l2').tolist() if named else []
    return {name: math.sqrt(square) for name, square in zip(named, squares, strict=True)}


class AdamW(_NormAdam):
    """Adam with decoupled weight decay: d_j = lr * weight_decay (Loshchilov & Hutter 2019).

    Args:
        params: an nn.Module, an iterable of tensors, or parameter groups. A group may say `regularize`, a bool or one
            bool a parameter; where it does not, tensors of two or more dimensions are decayed.
        lr: learning rate, a number or a one-element tensor.
        betas, eps: Adam's.
        weight_decay: per step and unit of learning rate.
        max_grad_norm, impl, moments_dtype, stochastic_rounding: see _NormAdam.
    Raises ValueError for an argument out of range.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, **common):
        _require(weight_decay >= 0, f'weight_decay={weight_decay} must be >= 0')
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, order='before', **common)

    def _decide(self, parts):
        for b, group, span in parts:
            b.decay[span] = group['lr'] * group['weight_decay']


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
        max_grad_norm, impl, moments_dtype, stochastic_rounding: see _NormAdam.
    State of a regularized tensor besides Adam's, 0-d each: kappa (nan until set), kappa_set, lagmul (lambda) and, for
    'inflection_point', ema, ema_error, ema_last, ema_growth. Raises ValueError for an argument out of range.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, kappa_init_method='inflection_point',
                 kappa_init_param=1000.0, reg_function='l2', kappa_update=1.0, reg_step_size=200, reg_ema_decay=0.99,
                 reg_embedding=False, reg_by_lr=False, *, order='before', **common):
        _require(kappa_init_method == 'inflection_point' or kappa_init_param > 0,
                 f'kappa_init_param={kappa_init_param} must be > 0')
        _require(kappa_init_method != 'warm_start' or float(kappa_init_param).is_integer(),
                 f'kappa_init_param={kappa_init_param} must be a whole number of steps for warm_start')
        _require(kappa_update >= 0, f'kappa_update={kappa_update} must be >= 0')
        _require(reg_step_size >= 1 and float(reg_step_size).is_integer(),
                 f'reg_step_size={reg_step_size} must be a whole number of steps, at least 1')
        _require(0 <= reg_ema_decay < 1, f'reg_ema_decay={reg_ema_decay} must be in [0, 1)')
        self.reg_embedding = reg_embedding
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=0.0,  # a group that torch.optim.AdamW can load must have one
            kappa_init_method=kappa_init_method, kappa_init_param=kappa_init_param, reg_function=reg_function,
            kappa_update=kappa_update, reg_step_size=reg_step_size, reg_ema_decay=reg_ema_decay, reg_by_lr=reg_by_lr,
        )  # fmt: skip
        super().__init__(params, defaults, order=order, **common)

    def __getstate__(self):
        return {**super().__getstate__(), 'reg_embedding': self.reg_embedding}

    @property
    def _scalars(self):
        watching = any(group['kappa_init_method'] == 'inflection_point' for group in self.param_groups)
        return ('kappa', 'kappa_set', 'lagmul', *(('ema', 'ema_error', 'ema_last', 'ema_growth') if watching else ()))

    def _complete(self, group):
        super()._complete(group)
        for name, allowed in (('kappa_init_method', KAPPA_INIT_METHODS), ('reg_function', REG_FUNCTIONS)):
            _require(group[name] in allowed, f"{name}='{group[name]}' must be one of {', '.join(allowed)}")

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
            kappa = param * shards.regularizer([p], group['reg_function'])[0]
        return {'kappa': kappa, 'kappa_set': method in ('uniform', 'dependent'), 'lagmul': 0.0,
                'ema': math.nan, 'ema_error': 0.0, 'ema_last': math.nan, 'ema_growth': math.nan}

    def _decide(self, parts):
        for b, group, span in parts:
            method, param = group['kappa_init_method'], group['kappa_init_param']
            b.deciding.constrain_(
                b.whole, span, b.decay, b.steps, b.proceed, b.scalars, method=method,
                # R stems from the weights after this step's Adam update ('after') or from those after the step before
                warm_start=param + int(self.order == 'before'), mu=group['kappa_update'],
                every=group['reg_step_size'], ema_decay=group['reg_ema_decay'],
                lr=group['lr'] if group['reg_by_lr'] else 1.0,
            )  # fmt: skip


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
        scope: 'tensor' steers every tensor by its own norm, 'global' all of them by their joint norm. A tensor without
            a gradient stays as it is and counts in that; until it has had one, its norm at the start is that of now.
        order: 'after' (Algorithm 1, line 13.c) or 'before' the Adam update.
        max_grad_norm, impl, moments_dtype, stochastic_rounding: see _NormAdam.
    State of a controlled tensor besides Adam's: init_norm, 0-d. Raises ValueError for an argument out of range; and
    step() for more than one ratio or norm of a group with scope='global'.
    """

    _scalars = ('init_norm',)

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, *, rate=1e-2, ratio=1.0, norm=None,
                 scope='tensor', order='after', **common):
        _require(0 <= rate <= 1, f'rate={rate} must be in [0, 1]')
        _require(scope in ('tensor', 'global'), f"scope='{scope}' must be 'tensor' or 'global'")
        self.scope = scope
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0, rate=rate, ratio=ratio, norm=norm)
        super().__init__(params, defaults, order=order, **common)

    def __getstate__(self):
        return {**super().__getstate__(), 'scope': self.scope}

    def _complete(self, group):
        super()._complete(group)
        for name in ('ratio', 'norm'):
            target = torch.as_tensor(0.0 if group[name] is None else group[name])
            _require(bool((target >= 0).all()), f'{name}={group[name]} must be >= 0')
            _require(target.numel() in (1, len(group['params'])),
                     f"{name} has {target.numel()} values for a group of {len(group['params'])} parameters")
        self._check_scope(group)

    def _check_scope(self, group):
        name = 'ratio' if group['norm'] is None else 'norm'
        target = group[name]
        count = len(target) if isinstance(target, (list, tuple)) else target.numel() if torch.is_tensor(target) else 1
        _require(self.scope == 'tensor' or count == 1,
                 f"scope='global' steers one joint norm: {name} must be a single number, not {count}")

    def _batches(self):
        for group in self.param_groups:  # before anything is written: a schedule or a state may have set them since
            self._check_scope(group)
        return super()._batches()

    def _init_scalars(self, p, group):
        return {'init_norm': shards.regularizer([p], 'l2')[0].sqrt()}

    def _waiting(self):
        """For each controlled tensor without a gradient, sum(theta ** 2) as it is and at the start."""
        for group in self.param_groups:
            regularize = group['regularize']
            for i, p in enumerate(group['params']):
                if p.grad is None and (regularize[i] if isinstance(regularize, list) else regularize):
                    now = shards.regularizer([p], 'l2')[0]
                    start = self.state[p]['init_norm'].square() if 'init_norm' in self.state.get(p, ()) else now
                    yield torch.stack([now, start])

    def _decide(self, parts):
        joint_norm = joint_init = None
        if self.scope == 'global':
            device = self.skipped_steps.device
            squares = [torch.stack([b.whole.R(span).sum(), b.scalars['init_norm'][span].square().sum()]).to(device)
                       for b, _, span in parts] + [x.to(device) for x in self._waiting()]  # fmt: skip
            joint = torch.stack(squares).sum(dim=0) if squares else torch.zeros(2, device=device)
            if self.process_group is not None:
                joint = self._sum_of_ranks(joint)
            joint_norm, joint_init = joint.sqrt()
        for b, group, span in parts:
            absolute = group['norm'] is not None
            target = b.per_tensor(group['norm'] if absolute else group['ratio'])
            if self.scope == 'global':
                norm, init_norm = joint_norm.to(b.device), 1.0 if absolute else joint_init.to(b.device)
                decay = plain.steering(norm, target * init_norm, group['rate'])
                b.decay[span] = torch.where(b.proceed, decay, 0.0)
            else:
                b.deciding.steer_(b.whole, span, b.decay, b.proceed, target,
                                1.0 if absolute else b.scalars['init_norm'], rate=group['rate'])  # fmt: skip


def _require(condition, message):
    if not condition:
        raise ValueError(message)
