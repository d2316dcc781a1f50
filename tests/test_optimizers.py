"""What AdamW, AdamCPR and AdamWN compute: against their formulas, against torch and against pytorch-cpr."""

import itertools
import math
import warnings

import pytest
import torch
from reference import SHAPES, STEPS, Reference, gradients, penalty, schedule, weights

from cpr import AdamCPR, AdamW, AdamWN

KINDS = {'adamw': AdamW, 'adamcpr': AdamCPR, 'adamwn': AdamWN}
BETAS = (0.8, 0.95)
REG_FUNCTIONS = ['l2', 'l1', 'huber', 'std']
ORDERS = ['before', 'after']


def clipping(grads, active):
    """A max_grad_norm that about two thirds of the steps exceed, or none. grads: a list of steps, each a list."""
    if not active:
        return 0.0
    norms = sorted(math.sqrt(sum(g.double().square().sum().item() for g in step)) for step in grads)
    return norms[len(norms) // 3]


def run(optimizer, params, grads, lrs, ratios=None, reference=None):
    """Trains `params` and returns what was seen after each step: the weights, and each scalar of the state, stacked.

    With a reference, the same gradients train that too; returned second.
    """
    ours, theirs = [], []
    for t, step in enumerate(grads):
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        for group in optimizer.param_groups:
            group['lr'] = lrs[t]
            if ratios:
                group['ratio'] = ratios[t]
        optimizer.step()
        state = [optimizer.state[p] for p in params]
        lagmul = [float(s['lagmul']) if 'lagmul' in s else 0.0 for s in state]
        kappa = [float(s['kappa']) if 'kappa' in s and s['kappa_set'] else None for s in state]
        norm = None if optimizer.grad_norm is None else float(optimizer.grad_norm)
        ours.append(([p.detach().clone() for p in params], lagmul, kappa, norm))
        if reference:
            reference.step(step, lr=lrs[t], ratio=ratios[t] if ratios else None)
            tensors = reference.tensors
            theirs.append(
                (
                    reference.params,
                    [w.lagmul for w in tensors],
                    [w.kappa for w in tensors],
                    reference.grad_norm,
                )
            )
    return ours, theirs


def assert_follows(
    kind, starts, grads, *, lr=0.03, ratios=None, regularize=None, tol=1e-5, **options
):
    """Our optimizer and the reference go the same way, step for step; returns the lagmuls of each tensor over time."""
    lrs = schedule(lr, len(grads))
    regularize = [True] * len(starts) if regularize is None else regularize
    options = {'betas': BETAS, **options}
    params = [torch.nn.Parameter(s.clone()) for s in starts]
    optimizer = KINDS[kind]([{'params': params, 'regularize': regularize}], lr=lr, **options)
    reference = Reference(kind, starts, regularize=regularize, lr=lr, **options)
    ours, theirs = run(optimizer, params, grads, lrs, ratios, reference)
    for i, w in enumerate(reference.tensors):
        decided = ~w.undecided
        assert decided.float().mean() > 0.98 or w.theta.numel() < 100
        a = torch.stack([o[0][i][decided] for o in ours]).double()
        b = torch.stack([o[0][i][decided] for o in theirs])
        torch.testing.assert_close(
            a, b, rtol=tol, atol=tol * b.abs().max().item() if b.numel() else 0.0
        )
        a, b = (
            torch.tensor([o[1][i] for o in seen], dtype=torch.float64) for seen in (ours, theirs)
        )
        torch.testing.assert_close(a, b, rtol=0, atol=10 * tol * max(1e-3, b.max().item()))
        if theirs[-1][2][i] is not None:
            assert ours[-1][2][i] == pytest.approx(theirs[-1][2][i], rel=tol)
        if options.get('kappa_init_method') == 'inflection_point':
            assert [o[2][i] is None for o in ours] == [o[2][i] is None for o in theirs], (
                'fires at the same step'
            )
    assert [o[3] for o in ours] == pytest.approx([o[3] for o in theirs], rel=tol)
    return [[o[1][i] for o in theirs] for i in range(len(starts))]


def phases(lagmul):
    """'0+0+' for a bound that was not reached, was, was not, was."""
    return ''.join(k for k, _ in itertools.groupby('+' if x > 0 else '0' for x in lagmul))


def cpr_options(reg_function, kappa_init_method, start, reg_by_lr=False):
    """Arguments of AdamCPR with which `gradients` takes the weights over their bound more than once."""
    R = penalty(reg_function, start.double())[0]
    mu = 24.0 if reg_by_lr else 0.6
    if reg_function == 'l2':
        mu *= start.numel() / (
            2 * R
        )  # much more, and the constraint overshoots so far that rounding errors grow
    elif reg_function == 'std':
        mu *= start.numel() - 1
    param = {'uniform': 1.1 * R, 'dependent': 1.1, 'warm_start': 6, 'inflection_point': 1000.0}[
        kappa_init_method
    ]
    return {
        'reg_function': reg_function,
        'kappa_init_method': kappa_init_method,
        'kappa_init_param': param,
        'kappa_update': mu,
        'reg_step_size': 3,
        'reg_ema_decay': 0.5,
        'reg_by_lr': reg_by_lr,
    }


# -- every variant against the formulas ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    'reg_by_lr, clip', [(False, True), (True, False)], ids=['clipped', 'reg_by_lr']
)
@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize(
    'kappa_init_method', ['uniform', 'dependent', 'warm_start', 'inflection_point']
)
@pytest.mark.parametrize('reg_function', REG_FUNCTIONS)
def test_adamcpr_follows_its_formula_while_the_bound_is_reached_and_left_and_reached_again(
    reg_function, kappa_init_method, order, reg_by_lr, clip
):
    for seed, shape in enumerate([(7,) if reg_function == 'std' else (1,), (33, 65)]):
        start = weights(shape, seed)
        grads = [[g] for g in gradients(start, seed)]
        options = cpr_options(reg_function, kappa_init_method, start, reg_by_lr)
        (lagmul,) = assert_follows(
            'adamcpr', [start], grads, order=order, max_grad_norm=clipping(grads, clip), **options
        )
        assert phases(lagmul).startswith('0+0+')


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('kappa_init_method', ['dependent', 'warm_start', 'inflection_point'])
def test_adamcpr_follows_its_formula_with_many_tensors_and_one_clipping_norm(
    kappa_init_method, order
):
    shapes = [*SHAPES, (257, 129), (4, 3, 2)]
    starts = [weights(s, i) for i, s in enumerate(shapes)]
    grads = list(zip(*(gradients(s, i) for i, s in enumerate(starts)), strict=True))
    regularize = [s.dim() >= 2 for s in starts]
    options = cpr_options('l2', kappa_init_method, starts[0])
    lagmuls = assert_follows(
        'adamcpr',
        starts,
        grads,
        order=order,
        regularize=regularize,
        max_grad_norm=clipping(grads, True),
        **options,
    )
    assert all((max(lagmul) > 0) == r for lagmul, r in zip(lagmuls, regularize, strict=True))


@pytest.mark.parametrize('clip', [False, True], ids=['unclipped', 'clipped'])
def test_adamw_follows_its_formula(clip):
    starts = [weights(s, i) for i, s in enumerate([*SHAPES, (257, 129)])]
    grads = list(zip(*(gradients(s, i) for i, s in enumerate(starts)), strict=True))
    regularize = [i % 2 == 0 for i in range(len(starts))]
    assert_follows(
        'adamw',
        starts,
        grads,
        weight_decay=0.5,
        regularize=regularize,
        max_grad_norm=clipping(grads, clip),
    )


@pytest.mark.parametrize(
    'scope, target',
    [
        *(
            ('tensor', t)
            for t in ('ratio', 'ratio per tensor', 'schedule', 'norm', 'norm per tensor')
        ),
        *(('global', t) for t in ('ratio', 'schedule', 'norm')),
    ],
)
@pytest.mark.parametrize('rate, clip', [(1e-2, True), (0.7, False)])
@pytest.mark.parametrize('order', ORDERS)
def test_adamwn_follows_its_formula(order, rate, clip, scope, target):
    starts = [weights(s, i) for i, s in enumerate(SHAPES)]
    grads = list(zip(*(gradients(s, i) for i, s in enumerate(starts)), strict=True))
    each = [0.5 + 0.4 * i for i in range(len(starts))]
    options = {
        'ratio': {'ratio': 1.7},
        'ratio per tensor': {'ratio': each},
        'schedule': {},
        'norm': {'norm': 4.0},
        'norm per tensor': {'norm': each},
    }[target]
    ratios = [1.0 + min(1.0, t / 40) for t in range(STEPS)] if target == 'schedule' else None
    assert_follows(
        'adamwn',
        starts,
        grads,
        ratios=ratios,
        order=order,
        rate=rate,
        scope=scope,
        regularize=[False, True, True, True, True],
        max_grad_norm=clipping(grads, clip),
        **options,
    )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    'kind, options',
    [('adamw', {'weight_decay': 0.5})]
    + [
        ('adamwn', {'order': o, 'rate': 0.1, 'ratio': 1.5, 'scope': s})
        for o in ORDERS
        for s in ('tensor', 'global')
    ]
    + [
        ('adamcpr', {'order': o, 'reg_function': f, 'kappa_init_method': m})
        for o in ORDERS
        for f in REG_FUNCTIONS
        for m in ('dependent', 'warm_start')
    ],
    ids=lambda v: '-'.join(map(str, v.values())) if isinstance(v, dict) else v,
)
def test_half_precision_weights_follow_the_formula_to_their_rounding(kind, options, dtype):
    """Arithmetic in float32: what is rounded differently is one element in a hundred, by a last digit or two."""
    start = weights((33, 65), dtype=dtype)
    grads = [[g] for g in gradients(start)]
    if kind == 'adamcpr':
        options = {
            **cpr_options(options['reg_function'], options['kappa_init_method'], start),
            **options,
        }
    options = {**options, 'lr': 0.03, 'betas': BETAS, 'max_grad_norm': clipping(grads, True)}
    p = torch.nn.Parameter(start.clone())
    reference = Reference(kind, [start], dtype=dtype, **options)
    ours, theirs = run(KINDS[kind]([p], **options), [p], grads, schedule(0.03), None, reference)
    assert p.dtype == dtype
    last_digit = (
        torch.finfo(dtype).eps * 2.0 ** reference.params[0].abs().clamp(min=2**-6).log2().floor()
    )
    off = (p.detach().double() - reference.params[0]).abs() / last_digit
    assert (off == 0).double().mean() > 0.9 and off.mean() < 0.1
    torch.testing.assert_close(
        *(torch.tensor([o[1][0] for o in s]) for s in (ours, theirs)), rtol=0.02, atol=1e-5
    )


# -- the facts -------------------------------------------------------------------------------------------------------


def trained(optimizer_of, starts, grads, lrs):
    params = [torch.nn.Parameter(s.clone()) for s in starts]
    ours, _ = run_plain(optimizer_of(params), params, grads, lrs)
    return ours


def run_plain(optimizer, params, grads, lrs):
    seen = []
    for lr, step in zip(lrs, grads, strict=True):
        for group in optimizer.param_groups:
            group['lr'] = lr
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        seen.append([p.detach().clone() for p in params])
    return seen, optimizer


@pytest.fixture(scope='module')
def problem():
    starts = [weights(s, i) for i, s in enumerate([(7,), (3, 5), (33, 65), (257, 129)])]
    return (
        starts,
        list(zip(*(gradients(s, i) for i, s in enumerate(starts)), strict=True)),
        schedule(0.03),
    )


def everywhere(params):
    return [{'params': params, 'regularize': True}]


def close(a, b, tol=2e-6):
    for x, y in zip(a, b, strict=True):
        for p, q in zip(x, y, strict=True):
            torch.testing.assert_close(p.double(), q.double(), rtol=tol, atol=tol)


def same_bits(a, b):
    return all(
        torch.equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)
    )


def test_adamw_is_torch_adamw(problem):
    starts, grads, lrs = problem
    ours = trained(lambda p: AdamW(everywhere(p), weight_decay=0.1), starts, grads, lrs)
    close(ours, trained(lambda p: torch.optim.AdamW(p, weight_decay=0.1), starts, grads, lrs))


def test_adamw_decays_only_tensors_of_two_or_more_dimensions(problem):
    starts, grads, lrs = problem
    ours = trained(lambda p: AdamW(p, weight_decay=0.1), starts, grads, lrs)

    def torchs(p):
        decay, rest = [x for x in p if x.dim() >= 2], [x for x in p if x.dim() < 2]
        return torch.optim.AdamW(
            [{'params': decay}, {'params': rest, 'weight_decay': 0.0}], weight_decay=0.1
        )

    close(ours, trained(torchs, starts, grads, lrs))


def test_adamwn_with_ratio_zero_and_rate_lr_times_decay_is_adamw(problem):
    starts, grads, _ = problem
    lr, wd = 0.02, 0.3
    lrs = [lr] * len(grads)
    wn = trained(
        lambda p: AdamWN(everywhere(p), rate=lr * wd, ratio=0.0, order='before'), starts, grads, lrs
    )
    close(wn, trained(lambda p: torch.optim.AdamW(p, weight_decay=wd), starts, grads, lrs))
    close(wn, trained(lambda p: AdamW(everywhere(p), weight_decay=wd), starts, grads, lrs))


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('reg_function', REG_FUNCTIONS)
@pytest.mark.parametrize(
    'kappa',
    [
        {'kappa_init_method': 'uniform', 'kappa_init_param': 1e30},
        {'kappa_init_method': 'dependent', 'kappa_init_param': 100.0},
        {'kappa_init_method': 'warm_start', 'kappa_init_param': 1000},
        {'kappa_init_method': 'inflection_point'},
    ],
    ids=lambda k: k['kappa_init_method'],
)
def test_adamcpr_with_a_bound_never_reached_is_adam_without_decay_bit_for_bit(
    problem, kappa, reg_function, order
):
    starts, grads, lrs = problem
    starts, grads = starts[:3], [g[:3] for g in grads]
    free = trained(lambda p: AdamW(everywhere(p), weight_decay=0.0), starts, grads, lrs)
    bound = trained(
        lambda p: AdamCPR(everywhere(p), reg_function=reg_function, order=order, **kappa),
        starts,
        grads,
        lrs,
    )
    assert same_bits(free, bound)
    close(free, trained(torch.optim.Adam, starts, grads, lrs))


@pytest.mark.parametrize('ratio', [1.0, 2.0, 0.3])
def test_adamwn_after_with_rate_one_holds_every_norm_at_its_target(problem, ratio):
    starts, grads, lrs = problem
    seen = trained(lambda p: AdamWN(p, rate=1.0, ratio=ratio, order='after'), starts, grads, lrs)
    for step, i in itertools.product(seen, [1, 2, 3]):
        assert step[i].double().norm().item() == pytest.approx(
            ratio * starts[i].double().norm().item(), rel=1e-6
        )


def test_adamwn_global_after_with_rate_one_holds_the_joint_norm(problem):
    starts, grads, lrs = problem
    seen = trained(lambda p: AdamWN(p, rate=1.0, ratio=1.5, scope='global'), starts, grads, lrs)

    def joint(tensors):
        return math.sqrt(sum(t.double().square().sum().item() for t in tensors[1:]))

    assert all(joint(step) == pytest.approx(1.5 * joint(starts), rel=1e-6) for step in seen)
    assert any(abs(step[1].norm() / starts[1].norm() - 1.5) > 0.01 for step in seen), (
        'each tensor goes where it likes'
    )


def test_adamwn_holds_an_absolute_norm(problem):
    starts, grads, lrs = problem
    seen = trained(lambda p: AdamWN(p, rate=1.0, norm=3.0), starts, grads, lrs)
    assert all(
        step[i].double().norm().item() == pytest.approx(3.0, rel=1e-6)
        for step in seen
        for i in (1, 2, 3)
    )


def test_adamwn_leaves_vectors_uncontrolled(problem):
    starts, grads, lrs = problem
    free = trained(lambda p: AdamW(p, weight_decay=0.0), starts, grads, lrs)
    controlled = trained(lambda p: AdamWN(p, rate=0.5, ratio=3.0), starts, grads, lrs)
    assert same_bits([s[:1] for s in free], [s[:1] for s in controlled])


def test_defaults_are_the_papers():
    p = [torch.nn.Parameter(torch.ones(2, 2))]
    assert AdamCPR(p).order == 'before' and AdamWN(p).order == 'after'
    assert AdamWN(p).param_groups[0]['rate'] == 1e-2 and AdamWN(p).param_groups[0]['ratio'] == 1.0


# -- pytorch-cpr ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('reg_by_lr', [False, True], ids=['', 'reg_by_lr'])
@pytest.mark.parametrize('kappa_init_method', ['uniform', 'dependent', 'warm_start'])
@pytest.mark.parametrize('reg_function', REG_FUNCTIONS)
def test_adamcpr_after_is_pytorch_cpr(reg_function, kappa_init_method, reg_by_lr):
    pytorch_cpr = pytest.importorskip('pytorch_cpr')
    lrs = schedule(0.03)
    for seed, shape in enumerate([(7,), (33, 65)]):
        start = weights(shape, seed)
        grads = [[g] for g in gradients(start, seed)]
        options = {'betas': BETAS, **cpr_options(reg_function, kappa_init_method, start, reg_by_lr)}
        ours, theirs = [torch.nn.Parameter(start.clone())], [torch.nn.Parameter(start.clone())]
        seen, optimizer = run_plain(
            AdamCPR(everywhere(ours), order='after', **options), ours, grads, lrs
        )
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            expected, oracle = run_plain(
                pytorch_cpr.AdamCPR(everywhere(theirs), foreach=False, **options),
                theirs,
                grads,
                lrs,
            )
        state, wanted = optimizer.state[ours[0]], oracle.state[theirs[0]]
        if reg_function != 'l1':  # there, a sign taken within a rounding of zero may differ
            close(seen, expected, tol=1e-5)
        torch.testing.assert_close(seen[-1][0].norm(), expected[-1][0].norm(), rtol=1e-5, atol=0)
        off = ((seen[-1][0] - expected[-1][0]).abs() > 1e-5).float().mean()
        assert off < 0.01
        assert state['kappa'].item() == pytest.approx(wanted['kappa'].item(), rel=1e-6)
        assert state['lagmul'].item() == pytest.approx(wanted['lagmul'].item(), rel=1e-3, abs=1e-5)
        free = trained(
            lambda p: AdamW(everywhere(p), betas=BETAS, weight_decay=0.0), [start], grads, lrs
        )
        assert (free[-1][0] - seen[-1][0]).abs().max() > 0.05, 'the bound was reached'


# -- when Kappa-IP fires ------------------------------------------------------------------------------------------

LOOK = 20


def firing_steps(curves, steps, *, order='before', reg_step_size=LOOK, reg_ema_decay=0.99):
    """Step at which AdamCPR sets each tensor's bound, or None, where R at step t is curve(t). curves: functions of t.

    The weights are written before each step; the learning rate is 0. Ends when all bounds are set.
    """
    params = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in curves]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = AdamCPR(
        params,
        lr=0.0,
        order=order,
        reg_step_size=reg_step_size,
        reg_ema_decay=reg_ema_decay,
        max_grad_norm=None,
    )
    fired = [None] * len(curves)
    for t in range(1, steps + 1):
        with torch.no_grad():
            for p, curve in zip(params, curves, strict=True):
                p.fill_(math.sqrt(curve(t) / 4))
        optimizer.step()
        for i, p in enumerate(params) if t % reg_step_size == 0 or t < 5 else ():
            if fired[i] is None and optimizer.state[p]['kappa_set']:
                fired[i] = t
                assert optimizer.state[p]['kappa'].item() == pytest.approx(
                    curves[i](t), rel=1e-6
                ), 'kappa is R now'
        if None not in fired:
            break
    return fired


DECAYS = [0.0, 0.9, 0.99, 0.999, 0.9999]
NEVER = {
    'constant 1': lambda t: 1.0,
    'constant 1e-6': lambda t: 1e-6,
    'constant 12345.678': lambda t: 12345.678,
    'linear from 1, steep': lambda t: 1.0 + 0.01 * t,
    'linear from 1': lambda t: 1.0 + 1e-4 * t,
    'linear from 1, nearly flat': lambda t: 1.0 + 1e-7 * t,
    'linear from 0': lambda t: 0.3 * t,
    'linear from 1e4': lambda t: 1e4 + 1e-3 * t,
    'linear from 1e4, below rounding': lambda t: 1e4 + 1e-5 * t,
    'theta grows linearly': lambda t: 4 * (1.0 + 1e-4 * t) ** 2,
    'quadratic': lambda t: 1.0 + 1e-6 * t * t,
    'quadratic from 0': lambda t: 1e-5 * t * t,
    'power 1.5': lambda t: 1.0 + 1e-4 * t**1.5,
    'cubic': lambda t: 10.0 + 1e-8 * t**3,
    'exponential': lambda t: math.exp(t / 400),
    'slow exponential': lambda t: 100.0 * math.exp(t / 1e5),
}
FALLING = {
    'linear, falling': lambda t: 100.0 - 0.01 * t,
    'linear, falling slowly': lambda t: 100.0 - 1e-4 * t,
    'valley': lambda t: 10.0 + 1e-5 * (t - 350) ** 2,
    'decaying exponentially': lambda t: 1.0 + math.exp(-t / 200),
}


@pytest.mark.parametrize('decay', DECAYS)
def test_an_r_that_does_not_slow_down_never_sets_kappa(decay):
    fired = firing_steps(list(NEVER.values()), 35 * LOOK, reg_ema_decay=decay)
    assert dict(zip(NEVER, fired, strict=True)) == dict.fromkeys(NEVER)


@pytest.mark.parametrize('decay', DECAYS)
def test_an_r_that_falls_without_slowing_in_its_growth_never_sets_kappa(decay):
    """Linear and accelerating (convex) curves that go down."""
    fired = firing_steps(list(FALLING.values()), 25 * LOOK, reg_ema_decay=decay)
    assert dict(zip(FALLING, fired, strict=True)) == dict.fromkeys(FALLING)


def test_with_the_default_settings_neither_the_averages_start_up_nor_acceleration_sets_a_kappa():
    """At step 800 an average started at zero slows down whatever R does; at step 1000 pytorch-cpr fires on weights
    that grow linearly, whose R accelerates."""
    curves = [
        NEVER[name] for name in ('constant 1', 'linear from 1', 'theta grows linearly', 'quadratic')
    ]
    assert firing_steps(curves, 3000, reg_step_size=200) == [None] * 4
    assert firing_steps(curves[2:], 1000, reg_step_size=200, order='after') == [None] * 2


def sigmoid(centre, width, low=1.0, high=11.0):
    return lambda t: low + (high - low) / (1.0 + math.exp(min(50.0, -(t - centre) / width)))


@pytest.mark.parametrize(
    'decay, order', [*((d, 'before') for d in DECAYS), (0.99, 'after'), (0.9999, 'after')]
)
def test_a_sigmoid_sets_kappa_within_two_looks_of_its_inflection(decay, order):
    """Plus the delay of the average, 1 / (1 - decay) steps; and never before the inflection."""
    centres, delay = [110, 185, 250, 400], 1 / (1 - decay)
    curves = [sigmoid(c, w) for c, w in zip(centres, [25, 40, 60, 80], strict=True)]
    fired = firing_steps(curves, 1000, reg_ema_decay=decay, order=order)
    for centre, step in zip(centres, fired, strict=True):
        assert step is not None and centre <= step <= centre + 2 * LOOK + delay


def test_each_tensor_sets_its_own_kappa_at_its_own_time():
    curves = [
        sigmoid(120, 16),
        NEVER['constant 1'],
        sigmoid(280, 16),
        NEVER['quadratic'],
        sigmoid(200, 16),
    ]
    fired = firing_steps(curves, 400, reg_ema_decay=0.9)
    assert [step is None for step in fired] == [False, True, False, True, False]
    assert fired[0] < fired[4] < fired[2]
    assert [fired[i] for i in (0, 2, 4)] == [
        firing_steps([curves[i]], 400, reg_ema_decay=0.9)[0] for i in (0, 2, 4)
    ]


def test_the_fourth_look_is_the_first_that_can_set_kappa():
    slowing = [lambda t: math.sqrt(t), lambda t: 1 - math.exp(-t / 50)]
    assert firing_steps(slowing, 200, reg_step_size=20, reg_ema_decay=0.0) == [80, 80]


def test_the_constraint_acts_from_the_step_after_kappa_is_set():
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = AdamCPR([p], lr=0.0, reg_step_size=2, reg_ema_decay=0.0)
    p.grad = torch.zeros_like(p)
    for R in [1, 2, 3, 4, 5, 6, 6.5, 7, 8]:  # looks at 2, 4, 6, 8: growth 2, 2, 1
        assert not bool(optimizer.state[p].get('kappa_set', False))
        with torch.no_grad():
            p.fill_(math.sqrt(R / 4))
        before = p.detach().clone()
        optimizer.step()
        if optimizer.state[p]['kappa_set']:
            break
    assert R == 7 and optimizer.state[p]['kappa'].item() == pytest.approx(7.0, rel=1e-6)
    assert torch.equal(p, before) and optimizer.state[p]['lagmul'] == 0
    with torch.no_grad():
        p.fill_(math.sqrt(8 / 4))
    optimizer.step()
    assert optimizer.state[p]['lagmul'].item() == pytest.approx(0.25, rel=1e-5)
    torch.testing.assert_close(p.detach(), torch.full((2, 2), (1 - 2 * 0.25) * math.sqrt(2.0)))
