"""What the tests of the optimizers share: variants of them, tensors to train, comparisons."""

import importlib.util
import io
import itertools
import math

import pytest
import torch
from helpers.reference import Reference, gradients, penalty, weights
from torch import nn

from cpr import AdamCPR, AdamH, AdamW, AdamWN

KINDS = {'adamw': AdamW, 'adamcpr': AdamCPR, 'adamwn': AdamWN, 'adamh': AdamH}
BETAS = (0.8, 0.95)
ORDERS = ['before', 'after']
REG_FUNCTIONS = ['l2', 'l1', 'huber', 'std']
KAPPA_INIT_METHODS = ['uniform', 'dependent', 'warm_start', 'inflection_point']
every_class = pytest.mark.parametrize('cls', KINDS.values(), ids=lambda cls: cls.__name__)


# ---- implementations


def implementation(impl, package):
    missing = package is not None and importlib.util.find_spec(package) is None
    return pytest.param(impl, marks=pytest.mark.skipif(missing, reason=f'no {package}'))


TORCH, NUMBA = implementation('torch', None), implementation('numba', 'numba')
TRITON = implementation('triton', 'triton')
every_impl = pytest.mark.parametrize('impl', [TORCH, NUMBA, TRITON])


def device_of(impl):
    """Where an implementation is tested: Triton without a GPU in its interpreter."""
    return 'cuda' if impl == 'triton' and torch.cuda.is_available() else 'cpu'


# ---- optimizers whose every bound acts within a few steps

# On weights near 1 a kappa_update of 1 would make the constraint overshoot, and rounding errors
# grow with every swing.
VARIANTS = {
    'adamw': ('adamw', {'weight_decay': 0.3}),
    'cpr-uniform': (
        'adamcpr',
        {'kappa_init_method': 'uniform', 'kappa_init_param': 20.0, 'kappa_update': 0.1},
    ),
    'cpr-dependent-after': (
        'adamcpr',
        {
            'kappa_init_method': 'dependent',
            'kappa_init_param': 1.02,
            'order': 'after',
            'kappa_update': 0.1,
        },
    ),
    'cpr-warm-start': (
        'adamcpr',
        {'kappa_init_method': 'warm_start', 'kappa_init_param': 4, 'reg_function': 'l1'},
    ),
    'cpr-inflection': ('adamcpr', {'reg_step_size': 2, 'reg_ema_decay': 0.5, 'kappa_update': 0.1}),
    'cpr-inflection-after': (
        'adamcpr',
        {'reg_step_size': 2, 'order': 'after', 'reg_function': 'std'},
    ),
    'wn': ('adamwn', {'rate': 0.2, 'ratio': 1.3}),
    'wn-global-before': (
        'adamwn',
        {'rate': 0.2, 'ratio': 1.3, 'scope': 'global', 'order': 'before'},
    ),
    'h': ('adamh', {'step_scale': 2.0}),
}
every_variant = pytest.mark.parametrize('variant', VARIANTS)
SHAPES = [(4, 3), (7,), (17, 9)]


def make(variant, params, **more):
    kind, options = VARIANTS[variant]
    return KINDS[kind](params, **{'lr': 0.03, 'betas': BETAS, **options, **more})


def reference_of(variant, params, **more):
    kind, options = VARIANTS[variant]
    return Reference(kind, params, **{'lr': 0.03, 'betas': BETAS, **options, **more})


def everywhere(params):
    return [{'params': params, 'regularize': True}]


def cpr_options(reg_function, kappa_init_method, start, reg_by_lr=False):
    """Arguments of AdamCPR with which `gradients` takes the weights over their bound repeatedly."""
    R = penalty(reg_function, start.double())[0]
    mu = 24.0 if reg_by_lr else 0.6
    if reg_function == 'l2':  # much more, and it overshoots so far that rounding errors grow
        mu *= start.numel() / (2 * R)
    elif reg_function == 'std':
        mu *= start.numel() - 1
    param = {'uniform': 1.1 * R, 'dependent': 1.1, 'warm_start': 6, 'inflection_point': 1000.0}
    return {
        'reg_function': reg_function,
        'kappa_init_method': kappa_init_method,
        'kappa_init_param': param[kappa_init_method],
        'kappa_update': mu,
        'reg_step_size': 3,
        'reg_ema_decay': 0.5,
        'reg_by_lr': reg_by_lr,
    }


def phases(lagmul):
    """'0+0+' for a bound that was not reached, was, was not, was."""
    return ''.join(k for k, _ in itertools.groupby('+' if x > 0 else '0' for x in lagmul))


def clipping(grads, active=True):
    """A max_grad_norm that about two thirds of the steps exceed, or none. grads: lists, a step."""
    if not active:
        return 0.0
    norms = sorted(math.sqrt(sum(g.double().square().sum().item() for g in step)) for step in grads)
    return norms[len(norms) // 3]


# ---- training


def parameters(shapes=SHAPES, dtype=torch.float32, device='cpu'):
    return [nn.Parameter(weights(s, i, dtype).to(device)) for i, s in enumerate(shapes)]


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def gradient_steps(params, steps=40, seed=0):
    """A list of `steps` lists, a gradient a parameter."""
    each = [gradients(p.detach().cpu(), seed + i, steps) for i, p in enumerate(params)]
    return list(zip(*each, strict=True))


def set_grads(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.to(p.device, copy=True)


def train(optimizer, params, grads):
    for step in grads:
        set_grads(params, step)
        optimizer.step()
    return params


def stepped(optimizer, params, steps=3, seed=0):
    train(optimizer, params, gradient_steps(params, steps, seed))
    return optimizer


def trajectory(optimizer, params, grads, lrs):
    """The weights after each step."""
    seen = []
    for lr, step in zip(lrs, grads, strict=True):
        for group in optimizer.param_groups:
            group['lr'] = lr
        train(optimizer, params, [step])
        seen.append([p.detach().clone() for p in params])
    return seen


# ---- comparisons


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_same_state(a, b):
    """Two optimizers remember the same, bit for bit (nan, an unset kappa, equals nan)."""
    a, b = (optimizer.state_dict()['state'] for optimizer in (a, b))
    assert a.keys() == b.keys()
    for i in a:
        assert a[i].keys() == b[i].keys()
        for name in a[i]:
            torch.testing.assert_close(a[i][name], b[i][name], rtol=0, atol=0, equal_nan=True)


def assert_close(a, b, tol=2e-6):
    """Lists of tensors, or lists of such, are the same to a tolerance; dtypes may differ."""
    for x, y in zip(a, b, strict=True):
        if torch.is_tensor(x):
            x, y = x.detach().cpu().double(), y.detach().cpu().double()
            torch.testing.assert_close(x, y, rtol=tol, atol=tol)
        else:
            assert_close(x, y, tol)


def through_a_file(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def snapshot(optimizer, params):
    """Everything that a step may change, as numbers to compare with `unchanged_since`."""
    state = [{k: x.clone() for k, x in optimizer.state[p].items()} for p in params]
    return [p.detach().clone() for p in params], state


def assert_unchanged_since(before, optimizer, params, names=None):
    """Weights, and those entries of the state that `names` lists (None: all), are as they were."""
    weights_before, states_before = before
    assert same_bits(weights_before, params)
    for p, state in zip(params, states_before, strict=True):
        for name in state if names is None else state.keys() & set(names):
            x, y = optimizer.state[p][name], state[name]
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


# ---- a small model


class Tiny(nn.Module):
    """A GPT in the small: embedding tied to the head, norms, biases, matrices."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 6)
        self.wpe = nn.Embedding(5, 6)
        self.ln = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 1)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, x):
        x = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        x = self.conv(self.fc(self.ln(x)).transpose(1, 2)).transpose(1, 2)
        return self.lm_head(x)


def backward(model, seed=0):
    x = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(-1, 1).flatten()).backward()


def run_model(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def nanogpt_groups(model):
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {'params': [p for p in params if p.dim() >= 2], 'weight_decay': 0.1},
        {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
    ]


def regularized(optimizer, module):
    """The names of the module's parameters that the optimizer regularizes."""
    names, found = {id(p): name for name, p in module.named_parameters()}, set()
    for group in optimizer.param_groups:
        flags, params = group['regularize'], group['params']
        flags = flags if isinstance(flags, list) else [flags] * len(params)
        found |= {names[id(p)] for p, flag in zip(params, flags, strict=True) if flag}
    return found
