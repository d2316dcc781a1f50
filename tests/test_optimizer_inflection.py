"""When AdamCPR's Kappa-IP sets a bound: at the inflection of R over time, and not before."""

import math

import pytest
import torch
from torch import nn

from cpr import AdamCPR

LOOK = 20
DECAYS = [0.0, 0.9, 0.99, 0.999, 0.9999]
STILL = 1e-30  # a learning rate that moves nothing: a step at 0 decides nothing


def firing_steps(curves, steps, *, order='before', reg_step_size=LOOK, reg_ema_decay=0.99):
    """The step at which AdamCPR sets each tensor's bound, or None, where R at step t is curve(t).

    The weights are written before each step. Ends when all bounds are set.
    """
    params = [nn.Parameter(torch.zeros(2, 2)) for _ in curves]
    for p in params:
        p.grad = torch.zeros_like(p)
    options = dict(reg_step_size=reg_step_size, reg_ema_decay=reg_ema_decay, max_grad_norm=None)
    optimizer = AdamCPR(params, lr=STILL, order=order, **options)
    fired = [None] * len(curves)
    for t in range(1, steps + 1):
        with torch.no_grad():
            for p, curve in zip(params, curves, strict=True):
                p.fill_(math.sqrt(curve(t) / 4))
        optimizer.step()
        for i, p in enumerate(params) if t % reg_step_size == 0 or t < 5 else ():
            if fired[i] is None and optimizer.state[p]['kappa_set']:
                fired[i] = t
                kappa = optimizer.state[p]['kappa'].item()
                assert kappa == pytest.approx(curves[i](t), rel=1e-6), 'kappa is R now'
        if None not in fired:
            break
    return fired


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
    """At step 800 an average started at zero slows down whatever R does; at step 1000 pytorch-cpr
    fires on weights that grow linearly, whose R accelerates."""
    names = 'constant 1', 'linear from 1', 'theta grows linearly', 'quadratic'
    curves = [NEVER[name] for name in names]
    assert firing_steps(curves, 3000, reg_step_size=200) == [None] * 4
    assert firing_steps(curves[2:], 1000, reg_step_size=200, order='after') == [None] * 2


def test_kappa_is_not_set_where_the_last_digit_of_a_float32_changes_its_size():
    """A straight R so slow that the average moves by less than float32 resolves. Past a power of
    two, where the last digit doubles, an average that drops what float32 does not hold would stand
    still for more than a thousand steps."""
    straight = [lambda t: 4 + 1e-7 * (t - 1500)]
    assert firing_steps(straight, 3700, reg_step_size=200, reg_ema_decay=0.999) == [None]


def sigmoid(center, width, low=1.0, high=11.0):
    return lambda t: low + (high - low) / (1.0 + math.exp(min(50.0, -(t - center) / width)))


@pytest.mark.parametrize(
    'decay, order', [*((d, 'before') for d in DECAYS), (0.99, 'after'), (0.9999, 'after')]
)
def test_a_sigmoid_sets_kappa_within_two_looks_of_its_inflection(decay, order):
    """Plus the delay of the average, 1 / (1 - decay) steps; and never before the inflection."""
    centers, delay = [110, 185, 250, 400], 1 / (1 - decay)
    curves = [sigmoid(c, w) for c, w in zip(centers, [25, 40, 60, 80], strict=True)]
    fired = firing_steps(curves, 1000, reg_ema_decay=decay, order=order)
    for center, step in zip(centers, fired, strict=True):
        assert step is not None and center <= step <= center + 2 * LOOK + delay


def test_each_tensor_sets_its_own_kappa_at_its_own_time():
    still = NEVER['constant 1'], NEVER['quadratic']
    curves = [sigmoid(120, 16), still[0], sigmoid(280, 16), still[1], sigmoid(200, 16)]
    fired = firing_steps(curves, 400, reg_ema_decay=0.9)
    assert [step is None for step in fired] == [False, True, False, True, False]
    assert fired[0] < fired[4] < fired[2]
    alone = [firing_steps([curves[i]], 400, reg_ema_decay=0.9)[0] for i in (0, 2, 4)]
    assert [fired[i] for i in (0, 2, 4)] == alone


def test_the_fourth_look_is_the_first_that_can_set_kappa():
    slowing = [lambda t: math.sqrt(t), lambda t: 1 - math.exp(-t / 50)]
    assert firing_steps(slowing, 200, reg_step_size=20, reg_ema_decay=0.0) == [80, 80]


@pytest.mark.parametrize('R_max', [7.0, 6.9, 6.7])
def test_the_constraint_acts_from_the_step_after_kappa_is_set(R_max):
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamCPR([p], lr=STILL, reg_step_size=2, reg_ema_decay=0.0)
    p.grad = torch.zeros_like(p)
    for R in [1, 2, 3, 4, 5, 6, 6.5, R_max]:  # looks at 2, 4, 6, 8: growth 2, 2, at most 1
        assert not optimizer.state[p].get('kappa_set', False)
        with torch.no_grad():
            p.fill_(math.sqrt(R / 4))
        before = p.detach().clone()
        optimizer.step()
    state = optimizer.state[p]
    assert state['kappa_set'] and state['kappa'].item() == pytest.approx(R_max, rel=1e-6)
    assert torch.equal(p, before) and state['lagmul'] == 0
    with torch.no_grad():
        p.fill_(math.sqrt(8 / 4))
    optimizer.step()
    lagmul = (8 - R_max) / 4
    assert state['lagmul'].item() == pytest.approx(lagmul, rel=1e-5)
    expected = torch.full((2, 2), (1 - 2 * lagmul) * math.sqrt(2.0))
    torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('start', ['step 0 at lr = 0', "step 5000 of torch's AdamW"])
def test_a_constant_r_sets_no_kappa_where_the_average_starts_after_the_steps(start):
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.zeros_like(p)
    optimizer = AdamCPR([p], lr=0.0, reg_step_size=LOOK)
    if start.startswith('step 0'):
        optimizer.step()
    else:
        adamw = torch.optim.AdamW([p], lr=0.0)
        adamw.step()
        adamw.state[p]['step'].fill_(5000)
        optimizer.load_state_dict(adamw.state_dict())
    optimizer.param_groups[0]['lr'] = STILL
    for _ in range(10 * LOOK):
        optimizer.step()
    assert optimizer.state[p]['step'] > 10 * LOOK and not optimizer.state[p]['kappa_set']
