"""The optimizers within a program: schedules, closures, hooks, compilation, missing gradients."""

import weakref

import pytest
import torch
from helpers.optimizers import (
    NUMBA,
    SHAPES,
    TORCH,
    TRITON,
    VARIANTS,
    assert_close,
    copies,
    device_of,
    every_impl,
    every_variant,
    gradient_steps,
    make,
    parameters,
    reference_of,
    same_bits,
    stepped,
    train,
)
from torch import nn

from cpr import AdamCPR, AdamWN
from nanonorm.kernels.bucket import Bucket

# ---- values that change from step to step


@pytest.mark.parametrize(
    'scheduler',
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: (t + 1) / 20),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            [7],
        ),
    ],
    ids=['cosine', 'lambda', 'one-cycle', 'sequential'],
)
@pytest.mark.parametrize('variant', ['adamw', 'cpr-dependent-after', 'wn'])
def test_learning_rate_schedulers_drive_it(variant, scheduler):
    params = parameters()
    by_hand = copies(params)
    optimizer, other = make(variant, params), make(variant, by_hand)
    schedule = scheduler(optimizer)
    for step in gradient_steps(params, 20):
        for a, b in zip(other.param_groups, optimizer.param_groups, strict=True):
            a['lr'], a['betas'] = b['lr'], b['betas']
        train(optimizer, params, [step])
        train(other, by_hand, [step])
        schedule.step()
    assert same_bits(params, by_hand)


@pytest.mark.parametrize(
    'variant, impl',
    [
        *((variant, impl) for variant in VARIANTS for impl in ('auto', 'torch')),
        *(pytest.param(v, *TRITON.values, marks=TRITON.marks) for v in ('adamw', 'wn')),
    ],
)
@pytest.mark.parametrize('shape', [(), (1,)])
def test_a_tensor_is_as_good_a_learning_rate_as_a_number(variant, impl, shape):
    params = parameters(device=device_of(impl))
    grads = gradient_steps(params, 4 if impl == 'triton' else 12)
    numbers, tensors = copies(params), copies(params)
    lr = torch.full(shape, 0.03)
    a, b = make(variant, numbers, impl=impl), make(variant, tensors, lr=lr, impl=impl)
    half = len(grads) // 2
    train(a, numbers, grads[:half])
    train(b, tensors, grads[:half])
    a.param_groups[0]['lr'] = 0.01
    lr.fill_(0.01)
    train(a, numbers, grads[half:])
    train(b, tensors, grads[half:])
    for p, q in zip(numbers, tensors, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', ['ratio', 'ramp', 'rate'])
def test_a_tensor_is_as_good_a_target_as_a_number(name):
    params = parameters()
    numbers, tensors = copies(params), copies(params)
    a, b = (AdamWN(p, rate=0.5, ratio=1.5) for p in (numbers, tensors))
    for t, step in enumerate(gradient_steps(params, 8)):
        a.param_groups[0][name] = t / 10
        b.param_groups[0][name] = torch.tensor(t / 10)
        train(a, numbers, [step])
        train(b, tensors, [step])
    assert_close(numbers, tensors, tol=1e-6)


@pytest.mark.parametrize('target', [{'ratio': 2.0}, {'norm': 3.0}], ids=['ratio', 'norm'])
def test_a_ramp_leads_from_the_norm_at_the_start_to_the_target(target):
    (p,) = params = parameters([(17, 9)])
    start = p.norm().item()
    end = target.get('norm', 2.0 * start)
    optimizer = AdamWN(params, lr=0.01, rate=1.0, **target)
    for t, step in enumerate(gradient_steps(params, 11)):
        optimizer.param_groups[0]['ramp'] = t / 10
        train(optimizer, params, [step])
        expected = start + t / 10 * (end - start)
        assert p.norm().item() == pytest.approx(expected, rel=1e-5)


# ---- gradients that are not there


@pytest.mark.parametrize('impl', [TORCH, NUMBA])
@every_variant
def test_a_parameter_without_a_gradient_waits(variant, impl):
    """Some steps with, some without, one that joins late: each goes through its own steps only."""
    params = parameters()
    reference, optimizer = reference_of(variant, params), make(variant, params, impl=impl)
    for t, step in enumerate(gradient_steps(params)):
        step = [g if i == 1 or t % (2 + i) and t > 3 * i else None for i, g in enumerate(step)]
        before = copies(params)
        train(optimizer, params, [step])
        reference.step(step)
        waiting = [i for i, g in enumerate(step) if g is None]
        assert same_bits([params[i] for i in waiting], [before[i] for i in waiting])
    assert_close(params, reference.params, tol=2e-5)
    assert optimizer.state[params[2]]['step'] == reference.tensors[2].t


@pytest.mark.parametrize('impl', [TRITON])
def test_a_parameter_without_a_gradient_waits_in_triton(impl):
    params = parameters([(4, 3), (5, 5)], device=device_of(impl))
    reference = reference_of('wn-global-before', [p.cpu() for p in params], order='after')
    optimizer = make('wn-global-before', params, order='after', impl=impl)
    for t, step in enumerate(gradient_steps(params, 6)):
        step = [step[0], step[1] if t % 3 == 1 else None]
        train(optimizer, params, [step])
        reference.step(step)
        assert_close(params, reference.params, tol=1e-5)


@every_impl
@pytest.mark.parametrize('order', ['before', 'after'])
@pytest.mark.parametrize('target', [{'norm': 9.0}, {'ratio': 1.3}], ids=['norm', 'ratio'])
def test_a_joint_norm_is_that_of_all_tensors_whichever_have_gradients(target, order, impl):
    results, start = [], parameters(device=device_of(impl))
    grads = gradient_steps(start, 4)
    options = dict(rate=0.5, scope='global', order=order, impl=impl, **target)
    for waits in (False, True):
        params = copies(start)
        optimizer = AdamWN(params, lr=0.03, **options)
        train(optimizer, params, grads[:3])
        optimizer.param_groups[0]['lr'] = 1e-30  # the correction alone
        before = params[0].detach().clone()
        train(optimizer, params, [[*grads[3][:2], None if waits else grads[3][2]]])
        results.append(params[0])
        assert not torch.equal(before, params[0])
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


@every_variant
def test_a_step_without_any_gradient_does_nothing(variant):
    params = parameters()
    optimizer = make(variant, params)
    optimizer.step()
    assert same_bits(params, parameters()) and not optimizer.state


# ---- the surroundings of a step


def test_zero_grad_closure_and_hooks():
    (p,) = params = parameters([(3, 3)])
    optimizer, calls = AdamCPR(params), []
    optimizer.register_step_pre_hook(lambda *_: calls.append('pre'))
    optimizer.register_step_post_hook(lambda *_: calls.append('post'))

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx((before**2).sum().item())
    assert not torch.equal(before, p) and calls == ['pre', 'post']
    optimizer.zero_grad()
    assert p.grad is None and optimizer.step() is None


@every_variant
def test_no_step_reads_a_value_on_the_host(variant, monkeypatch):
    """Tensors of the device 'meta' have no values: to ask for one raises."""
    monkeypatch.setattr(Bucket, 'zeros', lambda bucket: [])  # only asked when buckets are made
    params = [nn.Parameter(torch.empty(shape, device='meta')) for shape in SHAPES]
    optimizer = make(variant, params, lr=torch.tensor(0.1, device='meta'), max_grad_norm=1.0)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()


@every_variant
def test_a_step_keeps_no_gradient_alive(variant):
    """zero_grad frees the memory of gradients before the next forward pass needs it."""
    params = parameters()
    optimizer = stepped(make(variant, params), params, 1)
    grads = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert [grad() for grad in grads] == [None] * 3


@pytest.mark.parametrize('impl', [TORCH, NUMBA])
@every_variant
def test_the_same_run_gives_the_same_bits_twice(variant, impl):
    torch.set_num_threads(2)
    runs = []
    for _ in range(2):
        params = parameters([(4, 3), (7,), (257, 259)])
        optimizer = make(variant, params, max_grad_norm=3.0, impl=impl)
        runs.append(train(optimizer, params, gradient_steps(params, 3)))
    assert same_bits(*runs)


@pytest.mark.parametrize('variant, impl', [('cpr-dependent-after', 'auto'), ('wn', 'torch')])
def test_a_compiled_training_step_makes_no_graph_of_the_optimizers(variant, impl):
    """Its 45 graphs and their guards took 9 times as long as the step itself."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    compiled, eager = parameters([(4, 3), (7,)]), parameters([(4, 3), (7,)])
    optimizers = make(variant, compiled, impl=impl), make(variant, eager, impl=impl)
    counter = CompileCounter()

    def train_step(params, optimizer):
        sum((p**3).sum() for p in params).backward()
        optimizer.step()
        optimizer.zero_grad()
        return params[0] + 1

    step = torch.compile(train_step, backend=counter)
    graphs = []
    for t in range(6):
        for optimizer in optimizers:
            optimizer.param_groups[0]['lr'] = 0.01 * (t + 1)
        step(compiled, optimizers[0])
        train_step(eager, optimizers[1])
        graphs.append(counter.frame_count)
    assert_close(compiled, eager, tol=1e-6)
    assert graphs[0] <= 3 and graphs[-1] == graphs[1]
