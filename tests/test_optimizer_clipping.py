"""Gradient norms: clipped within the step, measured, scaled by a GradScaler, not finite."""

import copy
import math

import pytest
import torch
from helpers.optimizers import (
    NUMBA,
    TORCH,
    TRITON,
    assert_close,
    assert_same_state,
    assert_unchanged_since,
    copies,
    device_of,
    every_class,
    every_variant,
    gradient_steps,
    make,
    parameters,
    same_bits,
    set_grads,
    snapshot,
    train,
)
from torch import nn

SHAPES = [(4, 3), (7,), (17, 9), (257, 33)]


def scaler(device='cpu', **options):
    return torch.amp.GradScaler(device, init_scale=1024.0, **options)


# ---- clipping


@pytest.mark.parametrize('max_grad_norm', [0.5, 6.0, 1e4])
@every_variant
def test_max_grad_norm_is_clip_grad_norm_and_a_step(variant, max_grad_norm):
    params = parameters(SHAPES)
    ours, clipped = copies(params), copies(params)
    a = make(variant, ours, max_grad_norm=max_grad_norm)
    b = make(variant, clipped, max_grad_norm=None)
    for step in gradient_steps(params, 12):
        set_grads(ours, step)
        set_grads(clipped, step)
        norm = torch.nn.utils.clip_grad_norm_(clipped, max_grad_norm)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, norm, rtol=1e-6, atol=0)
        assert same_bits([p.grad for p in ours], step), 'gradients are not rewritten'
    for p, q in zip(ours, clipped, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


def test_one_norm_clips_the_gradients_of_all_groups_and_dtypes():
    params = [*parameters([(4, 3), (5,)]), *parameters([(3, 3)], torch.bfloat16)]
    grads = gradient_steps(params, 1)[0]
    set_grads(params, grads)
    groups = [{'params': params[:1]}, {'params': params[1:], 'lr': 0.1}]
    optimizer = make('adamw', groups, max_grad_norm=1.0, betas=(0.0, 0.0), eps=1e6)
    before = copies(params)
    optimizer.step()
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    assert norm > 1 and optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    for p, g in zip(params, grads, strict=True):
        assert_close([optimizer.state[p]['exp_avg']], [g.double() / norm], tol=1e-5)
    assert not same_bits(before, params)


def test_grad_norm_is_measured_unless_told_not_to():
    params = parameters()
    grads = gradient_steps(params, 3)
    measured, unmeasured = copies(params), copies(params)
    a, b = make('cpr-uniform', measured), make('cpr-uniform', unmeasured, max_grad_norm=None)
    assert same_bits(train(a, measured, grads), train(b, unmeasured, grads))
    assert b.grad_norm is None
    assert a.grad_norm.dim() == 0 and a.grad_norm.dtype == torch.float32
    norm = math.sqrt(sum(g.square().sum().item() for g in grads[-1]))
    assert a.grad_norm.item() == pytest.approx(norm)
    skipped = a.skipped_steps
    assert skipped.dim() == 0 and skipped.dtype == torch.int64 and skipped == 0


# ---- gradients that are not finite


@pytest.mark.parametrize('impl', [TORCH, NUMBA])
@pytest.mark.parametrize(
    'bad, max_grad_norm', [(math.nan, 0.0), (math.nan, 1.0), (math.inf, 1.0), (-math.inf, 0.0)]
)
@every_variant
def test_a_gradient_that_is_not_finite_changes_nothing_and_counts(
    variant, max_grad_norm, bad, impl
):
    """The run is that of the good steps alone. Bad ones: the first, mid warm start, two on end."""
    params = parameters()
    grads = gradient_steps(params, 20)
    good = copies(params)
    options = dict(max_grad_norm=max_grad_norm, impl=impl)
    reference = make(variant, good, **options)
    train(reference, good, grads)
    poisoned = [g.clone() for g in grads[0]]
    poisoned[1][2] = bad
    optimizer = make(variant, params, **options)
    for t, step in enumerate(grads):
        for _ in range({0: 1, 3: 1, 12: 2}.get(t, 0)):
            before = snapshot(optimizer, params)
            train(optimizer, params, [poisoned])
            assert not optimizer.grad_norm.isfinite()
            assert_unchanged_since(before, optimizer, params)
        train(optimizer, params, [step])
    assert optimizer.skipped_steps == 4 and same_bits(params, good)
    assert_same_state(optimizer, reference)


@pytest.mark.parametrize('impl', [TRITON])
@pytest.mark.parametrize('variant', ['cpr-dependent-after', 'cpr-uniform', 'wn'])
def test_triton_skips_a_step_whose_gradient_is_not_finite(variant, impl):
    params = parameters([(4, 3), (7,)], device=device_of(impl))
    grads = gradient_steps(params, 6)
    good = copies(params)
    reference = make(variant, good, impl=impl)
    train(reference, good, grads)
    poisoned = [grads[0][0], torch.full((7,), math.nan)]
    optimizer = make(variant, params, impl=impl)
    train(optimizer, params, [*grads[:3], poisoned, *grads[3:]])
    assert optimizer.skipped_steps == 1 and same_bits(params, good)
    assert_same_state(optimizer, reference)


@pytest.mark.parametrize('impl', [TORCH, NUMBA, TRITON])
@pytest.mark.parametrize('found', [0.0, 1.0])
def test_without_measuring_only_an_overflow_found_elsewhere_skips(found, impl):
    params = parameters([(4, 3)], device=device_of(impl))
    optimizer = make('cpr-uniform', params, max_grad_norm=None, impl=impl)
    before = copies(params)
    optimizer.found_inf = torch.tensor(found)
    train(optimizer, params, gradient_steps(params, 2))
    assert optimizer.grad_norm is None and optimizer.skipped_steps == 2 * found
    assert same_bits(before, params) == bool(found)


# ---- GradScaler


@every_class
@pytest.mark.parametrize('max_grad_norm, clips', [(None, False), (0.0, False), (1.0, True)])
def test_amp_scaling_is_claimed_only_where_the_step_clips(cls, max_grad_norm, clips):
    """Lightning refuses to clip for an optimizer that claims it."""
    optimizer = cls(parameters(), max_grad_norm=max_grad_norm)
    assert optimizer._step_supports_amp_scaling is clips
    assert copy.deepcopy(optimizer)._step_supports_amp_scaling is clips


@pytest.mark.parametrize('unscale_first', [False, True])
@pytest.mark.parametrize('max_grad_norm', [None, 0.0, 4.0])
@every_variant
def test_a_grad_scaler_changes_nothing_but_the_steps_it_skips(
    variant, max_grad_norm, unscale_first
):
    params = parameters()
    plain = copies(params)
    optimizer, other = (make(variant, p, max_grad_norm=max_grad_norm) for p in (params, plain))
    grad_scaler = scaler(growth_interval=5)
    for t, step in enumerate(gradient_steps(params, 12)):
        set_grads(params, [grad_scaler.scale(g.clone()) for g in step])
        if t in (2, 7):
            params[0].grad[0, 0] = math.inf
        if unscale_first:
            grad_scaler.unscale_(optimizer)
        grad_scaler.step(optimizer)
        grad_scaler.update()
        if t not in (2, 7):
            train(other, plain, [step])
            if max_grad_norm is not None:
                torch.testing.assert_close(optimizer.grad_norm, other.grad_norm, rtol=1e-6, atol=0)
    assert grad_scaler.get_scale() == 1024.0 / 2**2  # halved by each overflow
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    # without clipping in the step, the scaler itself leaves it out
    assert optimizer.skipped_steps == (2 if max_grad_norm else 0)


def test_clipping_between_unscaling_and_the_step_is_what_is_stepped_with():
    params = parameters()
    clipped = copies(params)
    a, b = make('cpr-uniform', params), make('cpr-uniform', clipped)
    grad_scaler = scaler()
    for step in gradient_steps(params, 8):
        set_grads(params, [grad_scaler.scale(g.clone()) for g in step])
        set_grads(clipped, step)
        grad_scaler.unscale_(a)
        for p in (params, clipped):
            nn.utils.clip_grad_norm_(p, 0.7)
        grad_scaler.step(a)
        grad_scaler.update()
        b.step()
    assert_close(params, clipped, tol=1e-6)
    assert a.grad_norm.item() == pytest.approx(0.7, rel=1e-5)


@pytest.mark.parametrize('impl', [TORCH, NUMBA, TRITON])
def test_scaled_gradients_are_unscaled_in_the_step_in_every_implementation(impl):
    params = parameters([(4, 3), (7,)], device=device_of(impl))
    plain = copies(params)
    options = dict(max_grad_norm=1.0, impl=impl)
    a, b = (
        make('cpr-dependent-after', params, **options),
        make('cpr-dependent-after', plain, **options),
    )
    grad_scaler = scaler(device_of(impl))
    for step in gradient_steps(params, 4):
        set_grads(params, [grad_scaler.scale(g.clone()) for g in step])
        grad_scaler.step(a)
        grad_scaler.update()
        train(b, plain, [step])
    assert_close(params, plain, tol=1e-6)
