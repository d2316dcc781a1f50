"""Weights of every kind: of any strides, empty, constant, written between steps, moved."""

import copy

import pytest
import torch
from helpers.optimizers import (
    BETAS,
    NUMBA,
    ORDERS,
    REG_FUNCTIONS,
    TORCH,
    TRITON,
    VARIANTS,
    assert_close,
    assert_same_state,
    copies,
    device_of,
    every_impl,
    every_variant,
    everywhere,
    gradient_steps,
    make,
    parameters,
    reference_of,
    same_bits,
    stepped,
    train,
)
from helpers.reference import Reference, gradients, weights
from torch import nn

from cpr import AdamCPR, AdamW, AdamWN
from nanonorm.kernels import tensors

KINDS_OF_WRITES = {
    'copy': lambda p: p.copy_(1.4 * p),
    'one element': lambda p: p[0, 0].fill_(4.0),
    'through a view': lambda p: p.detach().view(-1)[:5].mul_(1.5),
    'other memory': lambda p: setattr(p, 'data', 1.4 * p),
}

# ---- writes by others


@pytest.mark.parametrize('impl', [TORCH, NUMBA])
@pytest.mark.parametrize('write', KINDS_OF_WRITES)
@pytest.mark.parametrize('variant', sorted(VARIANTS.keys() - {'adamw'}))
def test_weights_written_between_steps_are_noticed(variant, write, impl):
    params = parameters()
    reference, optimizer = reference_of(variant, params), make(variant, params, impl=impl)
    for t, step in enumerate(gradient_steps(params, 20)):
        if t in (5, 14):
            with torch.no_grad():
                KINDS_OF_WRITES[write](params[0])
            reference.tensors[0].theta = params[0].detach().double()
        train(optimizer, params, [step])
        reference.step(step)
    assert_close(params, reference.params, tol=2e-5)


@pytest.mark.parametrize('impl', [TRITON])
@pytest.mark.parametrize('write', ['copy', 'other memory'])
@pytest.mark.parametrize('reg_function', ['l2', 'std'])
def test_weights_written_between_steps_are_noticed_in_triton(reg_function, write, impl):
    params = parameters([(4, 3), (9, 9)], device=device_of(impl))
    options = dict(kappa_init_method='dependent', kappa_init_param=1.02, kappa_update=0.1)
    options.update(reg_function=reg_function, lr=0.03, betas=BETAS)
    reference = Reference('adamcpr', [p.cpu() for p in params], **options)
    optimizer = AdamCPR(params, impl=impl, **options)
    for t, step in enumerate(gradient_steps(params, 5)):
        if t == 3:
            with torch.no_grad():
                KINDS_OF_WRITES[write](params[0])
            reference.tensors[0].theta = params[0].detach().cpu().double()
        train(optimizer, params, [step])
        reference.step(step)
    assert_close(params, reference.params, tol=2e-5)


@every_variant
def test_a_model_moved_to_other_memory_goes_on(variant):
    params = parameters()
    grads = gradient_steps(params, 20)
    other = copies(params)
    a, b = make(variant, params), make(variant, other)
    for t, step in enumerate(grads):
        if t == 8:
            for p in other:
                p.data = p.data.clone()
        train(a, params, [step])
        train(b, other, [step])
    assert same_bits(params, other)
    assert_same_state(a, b)


def test_sums_that_a_cuda_graph_records_are_not_taken_for_done_after_it(monkeypatch):
    """Within the graph they are: a replay does all of it in order."""
    table = tensors.Table([nn.Parameter(torch.ones(3))])
    grads = [torch.ones(3)]
    table.set_grads(grads)
    with monkeypatch.context() as capture:
        capture.setattr(tensors, 'is_capturing', lambda device: True)
        table.set_grads(grads)
        table.mark_sums_current()
        table.mark_written(summed=True)
        assert table.sums_are_current()
    table.set_grads(grads)
    assert not table.sums_are_current()
    table.mark_sums_current()
    table.set_grads(grads)
    assert table.sums_are_current()


def test_autograd_notices_that_a_step_wrote_a_weight():
    for impl in ('torch', 'numba'):
        (p,) = parameters([(3, 3)])
        optimizer = stepped(AdamW([p], impl=impl), [p], 1)
        loss = (p * p).sum()
        p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            loss.backward()


@pytest.mark.parametrize('impl', [TORCH, NUMBA])
@pytest.mark.parametrize('variant', ['cpr-dependent-after', 'cpr-uniform', 'wn'])
def test_a_tensor_starts_when_it_has_its_first_gradient(variant, impl):
    """Weights that are loaded or drawn anew while a layer is frozen are where it starts from."""
    params, late = parameters(), parameters([(5, 4)])[0]
    alone = nn.Parameter(2 * late.detach())
    grads = gradient_steps(params, 12)
    late_grads = gradient_steps([late], 8)
    optimizer = make(variant, [*params, late], impl=impl)
    optimizer.step()
    train(optimizer, [*params, late], [[*step, None] for step in grads[:4]])
    with torch.no_grad():
        late.mul_(2)
    pairs = zip(grads[4:], late_grads, strict=True)
    train(optimizer, [*params, late], [[*step, g] for step, (g,) in pairs])
    train(make(variant, [alone], impl=impl), [alone], late_grads)
    assert_close([late], [alone], tol=1e-6)


# ---- memory formats

DENSE = {
    'channels_last': lambda: weights((2, 3, 4, 5), 1).to(memory_format=torch.channels_last),
    'channels_last_3d': lambda: weights((2, 3, 2, 2, 2)).to(memory_format=torch.channels_last_3d),
    'transposed': lambda: weights((12, 10), 3).t(),
    'permuted': lambda: weights((3, 4, 5), 4).permute(1, 2, 0),
    'a part': lambda: weights((12, 10), 3)[3:7],
    'an axis of one': lambda: weights((4, 5), 2).as_strided((4, 1, 5), (5, 99, 1)),
}
NOT_DENSE = {
    'rows of a transposed': lambda: weights((12, 10), 3).t()[2:9],
    'every second': lambda: weights((12, 10), 3)[::2, ::3],
    'spread': lambda: torch.as_strided(weights((60,), 2), (6, 5), (10, 2)),
}
GRADIENTS = {
    'alike': lambda p, g: torch.empty_like(p).copy_(g),
    'contiguous': lambda p, g: g.contiguous(),
    'reversed': lambda p, g: (
        g.permute(*range(g.dim() - 1, -1, -1)).contiguous().permute(*range(g.dim() - 1, -1, -1))
    ),
    'expanded': lambda p, g: g.flatten()[0].expand(g.shape),
}


def trained_as_contiguous(variant, start, gradient, impl, steps, **options):
    """Weights as they lie in memory beside the same in a row: (ours, contiguous), optimizers."""
    ours, contiguous = [nn.Parameter(start)], [nn.Parameter(start.contiguous().clone())]
    a = make(variant, ours, impl=impl, max_grad_norm=2.0, **options)
    b = make(variant, contiguous, impl='torch', max_grad_norm=2.0, **options)
    for (g,) in gradient_steps(contiguous, steps):
        g = g.to(start.device)
        ours[0].grad = GRADIENTS[gradient](ours[0], g)
        contiguous[0].grad = ours[0].grad.contiguous()
        a.step()
        b.step()
    return ours, contiguous, a, b


@pytest.mark.parametrize('impl', [TORCH, NUMBA])
@pytest.mark.parametrize('gradient', GRADIENTS)
@pytest.mark.parametrize('layout', [*DENSE, *NOT_DENSE])
@pytest.mark.parametrize('variant', ['adamw', 'cpr-dependent-after', 'wn-global-before'])
def test_strides_of_weights_and_gradients_do_not_matter(variant, layout, gradient, impl):
    start = {**DENSE, **NOT_DENSE}[layout]()
    ours, contiguous, a, b = trained_as_contiguous(variant, start, gradient, impl, 10)
    assert ours[0].stride() == start.stride() and ours[0].data_ptr() == start.data_ptr()
    assert_close(ours, contiguous, tol=1e-6)
    for name, x in b.state[contiguous[0]].items():
        torch.testing.assert_close(a.state[ours[0]][name], x, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize('impl', [TRITON])
@pytest.mark.parametrize('gradient', ['alike', 'contiguous'])
@pytest.mark.parametrize('layout', ['channels_last', 'transposed'])
def test_strides_of_weights_and_gradients_do_not_matter_in_triton(layout, gradient, impl):
    start = DENSE[layout]().to(device_of(impl))
    ours, contiguous, *_ = trained_as_contiguous('cpr-dependent-after', start, gradient, impl, 3)
    assert_close(ours, contiguous, tol=1e-6)


@pytest.mark.parametrize('layout', DENSE)
def test_moments_of_a_dense_weight_have_its_strides_and_keep_them_when_loaded(layout):
    (p,) = params = [nn.Parameter(DENSE[layout]())]
    optimizer = stepped(AdamW(params), params, 1)
    q = nn.Parameter(p.detach().clone(memory_format=torch.preserve_format))
    other = AdamW([q])
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict['state'].values():
        state['exp_avg'] = state['exp_avg'].contiguous()
    other.load_state_dict(state_dict)
    stepped(other, [q], 1)
    for name in ('exp_avg', 'exp_avg_sq'):
        for o, x in ((optimizer, p), (other, q)):
            strides = zip(o.state[x][name].stride(), x.stride(), x.shape, strict=True)
            assert all(a == b for a, b, size in strides if size > 1)


@pytest.mark.parametrize('impl, module', [('numba', 'cpu'), ('triton', 'gpu')])
@pytest.mark.parametrize('layout', DENSE)
def test_a_dense_weight_is_updated_by_the_fast_kernels_whatever_its_strides(
    layout, impl, module, monkeypatch
):
    kernels = pytest.importorskip(f'nanonorm.kernels.{module}')
    taken, adam_ = [], kernels.adam_
    monkeypatch.setattr(kernels, 'adam_', lambda *args: (taken.append(1), adam_(*args)))
    params = [nn.Parameter(DENSE[layout]().to(device_of(impl)))]
    stepped(AdamW(params, impl=impl), params, 1)
    assert taken == [1]


@pytest.mark.parametrize('impl', [TORCH, NUMBA])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_gradients_of_another_dtype_are_cast(dtype, impl):
    params = parameters()
    grads = gradient_steps(params, 4)
    others = copies(params)
    a, b = make('cpr-uniform', params, impl=impl), make('cpr-uniform', others, impl=impl)
    for step in grads:
        for p, q, g in zip(params, others, step, strict=True):
            p.grad_dtype = None  # as FSDP2 and torchtitan do, that keep gradients in another
            p.grad = g.to(dtype)
            q.grad = g.to(dtype).float()
        a.step()
        b.step()
    assert same_bits(params, others)


# ---- sizes and values at the border


@pytest.mark.parametrize('impl', [TORCH, NUMBA])
@every_variant
def test_tensors_without_elements_scalars_and_single_elements_are_taken(variant, impl):
    shapes = [(0,), (0, 3), (), (1,), (1, 1), (4, 3)]
    params = parameters(shapes)
    start = copies(params)
    optimizer = make(variant, everywhere(params), max_grad_norm=3.0, impl=impl)
    train(optimizer, params, gradient_steps(params, 16))
    assert all(p.isfinite().all() for p in params)
    assert same_bits([optimizer.state[p]['step'] for p in params], [torch.tensor(16.0)] * 6)
    moved = [not torch.equal(p, q) for p, q in zip(params, start, strict=True)]
    # AdamH holds the norm of a single element, and with it the element but for its sign
    assert [moved[i] for i in (0, 1, 5)] == [False, False, True]
    assert variant == 'h' or all(moved[2:])


@pytest.mark.parametrize('impl', [TRITON])
def test_tensors_without_elements_scalars_and_single_elements_are_taken_by_triton(impl):
    shapes = [(0, 3), (), (1, 1), (4, 3)]
    params = parameters(shapes, device=device_of(impl))
    optimizer = make('cpr-dependent-after', everywhere(params), max_grad_norm=3.0, impl=impl)
    reference = reference_of(
        'cpr-dependent-after',
        [p.detach().cpu() for p in params],
        regularize=[True] * 4,
        max_grad_norm=3.0,
    )
    for step in gradient_steps(params, 4):
        train(optimizer, params, [step])
        reference.step(step)
    assert_close(params, reference.params, tol=1e-5)


@pytest.mark.parametrize('impl', [TORCH, NUMBA])
@pytest.mark.parametrize('value', [0.0, 1.0])
@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('reg_function', REG_FUNCTIONS)
def test_adamcpr_takes_weights_that_are_all_equal(reg_function, order, value, impl):
    (p,) = params = [nn.Parameter(torch.full((4, 3), value))]
    options = {'reg_function': reg_function, 'order': order, 'kappa_init_method': 'uniform'}
    options.update(kappa_init_param=1e-3, kappa_update=0.1, betas=BETAS, lr=0.03)
    reference = Reference('adamcpr', params, **options)
    optimizer = AdamCPR(params, impl=impl, **options)
    for g in [torch.zeros(4, 3), *gradients(weights((4, 3)), steps=5)]:
        train(optimizer, params, [[g]])
        reference.step([g])
        if reg_function == 'l1':  # weights sit on the kink, where a rounding decides
            assert p.isfinite().all()
        else:
            assert_close(params, reference.params, tol=1e-5)


@pytest.mark.filterwarnings('ignore:.*target is 0')
@every_impl
@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('scope', ['tensor', 'global'])
@pytest.mark.parametrize('target', [{'ratio': 1.5}, {'norm': 2.0}], ids=['ratio', 'norm'])
def test_adamwn_takes_weights_that_are_all_zero(order, scope, target, impl):
    params = [nn.Parameter(torch.zeros(s, device=device_of(impl))) for s in ((4, 3), (5, 5))]
    options = {'order': order, 'scope': scope, 'rate': 0.5, 'lr': 0.03, 'betas': BETAS, **target}
    reference = Reference('adamwn', [p.cpu() for p in params], **options)
    optimizer = AdamWN(params, impl=impl, **options)
    grads = zip(*(gradients(weights(p.shape), steps=2) for p in params), strict=True)
    for step in [[torch.zeros(4, 3), torch.zeros(5, 5)], *grads]:
        train(optimizer, params, [step])
        reference.step(step)
        assert_close(params, reference.params, tol=1e-5)


def test_a_shape_that_changes_within_the_same_memory_is_refused_not_read_beyond():
    """The gradient of the smaller weight ends before the memory of the larger one does."""
    for impl in ('torch', 'numba'):
        p = nn.Parameter(torch.ones(7, 7))
        optimizer = stepped(AdamW([p], impl=impl), [p])
        p.data = p.data[:5]
        p.grad = torch.ones(5, 7)
        with pytest.raises(ValueError, match='shape'):
            optimizer.step()
