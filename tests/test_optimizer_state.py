"""What the optimizers remember: saved, loaded, copied, exchanged with other packages."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.optimizers import (
    ORDERS,
    REG_FUNCTIONS,
    VARIANTS,
    Tiny,
    assert_close,
    assert_same_state,
    assert_unchanged_since,
    copies,
    device_of,
    every_variant,
    everywhere,
    gradient_steps,
    make,
    nanogpt_groups,
    parameters,
    run_model,
    same_bits,
    set_grads,
    snapshot,
    stepped,
    through_a_file,
    train,
)
from torch import nn

from cpr import AdamCPR, AdamH, AdamW, AdamWN

INFLECTION = {'ema', 'ema_last', 'ema_growth'}

# ---- a run that is interrupted


@pytest.mark.parametrize(
    'moment, dtype',
    [
        # before the first step, mid warm start, mid inflection, with the bound active
        *((moment, torch.float32) for moment in (0, 1, 3, 7, 20)),
        *((moment, torch.bfloat16) for moment in (3, 20)),
    ],
)
@every_variant
def test_a_run_continued_from_a_saved_state_dict_is_the_run_never_stopped(variant, moment, dtype):
    params = parameters(dtype=dtype)
    grads = gradient_steps(params, 30)
    optimizer = make(variant, params)
    train(optimizer, params, grads[:moment])
    resumed_params = copies(params)
    resumed = make(variant, resumed_params, lr=0.5)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_state(optimizer, resumed)
    train(optimizer, params, grads[moment:])
    train(resumed, resumed_params, grads[moment:])
    assert same_bits(params, resumed_params)
    assert_same_state(optimizer, resumed)


@pytest.mark.parametrize('moment', [0, 5])
def test_ratios_of_their_own_survive_saving_whether_set_before_the_first_step_or_later(moment):
    params = parameters()
    params[2].requires_grad_(False)  # it never gets a gradient
    grads = [[*step[:2], None] for step in gradient_steps(params, 12)]
    optimizer = AdamWN(params, rate=0.3)
    train(optimizer, params, grads[:moment])
    optimizer.set_ratios({params[0]: 1.7, params[2]: 0.4})
    resumed_params = copies(params)
    resumed = AdamWN(resumed_params, rate=0.3)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, params, grads[moment:])
    train(resumed, resumed_params, grads[moment:])
    assert same_bits(params, resumed_params)
    assert_same_state(optimizer, resumed)
    assert optimizer.state[params[0]]['ratio'] == torch.tensor(1.7)


def test_set_ratios_replaces_all_ratios_that_were_set_before():
    first, second = parameters(), parameters()
    grads = gradient_steps(first, 10)
    a, b = (AdamWN(p, rate=0.3, ratio=1.1) for p in (first, second))
    a.set_ratios({first[0]: 1.7, first[2]: 0.4})
    a.set_ratios({first[2]: 0.8})
    b.set_ratios({second[2]: 0.8})
    assert same_bits(train(a, first, grads), train(b, second, grads))
    assert a.state[first[0]]['ratio'].isnan()


def test_ratios_are_for_an_optimizers_own_tensors_that_are_steered_one_by_one():
    params = parameters()
    with pytest.raises(ValueError, match='ratios'):
        AdamWN(params).set_ratios({nn.Parameter(torch.ones(2)): 1.5})
    with pytest.raises(ValueError, match='ratios'):
        AdamWN(params, scope='global').set_ratios({params[0]: 1.5})


@every_variant
def test_half_precision_parameters_keep_float32_state(variant):
    params = parameters(dtype=torch.bfloat16)
    optimizer = stepped(make(variant, params), params, 20)
    loaded = make(variant, params)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in params:
        for o in (optimizer, loaded):
            dtypes = {name: x.dtype for name, x in o.state[p].items()}
            assert dtypes.pop('kappa_set', torch.bool) == torch.bool
            averages = {dtypes.pop(name) for name in INFLECTION & dtypes.keys()}
            assert averages <= {torch.float64}
            assert set(dtypes.values()) == {torch.float32}


@pytest.mark.parametrize(
    'variant, names',
    [
        ('adamw', set()),
        ('wn', {'init_norm', 'ratio'}),
        ('cpr-uniform', {'kappa', 'kappa_set', 'lagmul'}),
        ('cpr-inflection', {'kappa', 'kappa_set', 'lagmul'} | INFLECTION),
    ],
)
def test_the_state_has_the_documented_names_and_nothing_that_grows(variant, names):
    params = parameters([(5, 4)])
    state = stepped(make(variant, params), params, 1).state[params[0]]
    assert set(state) == {'step', 'exp_avg', 'exp_avg_sq'} | names
    assert all(state[name].dim() == 0 for name in {'step'} | names)
    if variant == 'cpr-inflection':
        assert not state['kappa_set'] and state['kappa'].isnan()


def test_load_state_dict_leaves_its_argument_alone_and_shares_nothing_with_it():
    params = parameters()
    optimizer = stepped(make('cpr-dependent-after', params), params, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    loaded = stepped(make('cpr-dependent-after', params), params, 1)
    loaded.load_state_dict(saved)
    stepped(loaded, params)
    assert saved['param_groups'] == before['param_groups']
    for i, state in before['state'].items():
        assert same_bits(state.values(), saved['state'][i].values())


@every_variant
def test_clearing_the_state_starts_afresh(variant):
    params = parameters()
    grads = gradient_steps(params, 8)
    optimizer = make(variant, params)
    train(optimizer, params, grads)
    fresh_params = copies(params)
    optimizer.state.clear()
    train(optimizer, params, grads)
    train(make(variant, fresh_params), fresh_params, grads)
    assert same_bits(params, fresh_params)


def unpickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize('duplicate', [copy.deepcopy, unpickled])
@every_variant
def test_a_copy_goes_on_as_the_original_does(variant, duplicate):
    params = parameters()
    grads = gradient_steps(params)
    optimizer = make(variant, params, max_grad_norm=5.0)
    train(optimizer, params, grads[:7])
    other_params, other = duplicate((params, optimizer))
    train(optimizer, params, grads[7:])
    assert not same_bits(params, other_params)
    train(other, other_params, grads[7:])
    assert same_bits(params, other_params)
    assert_same_state(optimizer, other)
    assert torch.equal(optimizer.grad_norm, other.grad_norm)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, unpickled])
def test_a_copy_made_beside_a_scheduler_steps_itself(duplicate):
    """torch's schedulers replace the optimizer's `step` by a function bound to that optimizer."""
    params = parameters()
    grads = gradient_steps(params)
    optimizer = AdamCPR(params, lr=1e-2)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    train(optimizer, params, grads[:1])
    other_params, other = duplicate((params, optimizer))
    before = copies(params)
    train(other, other_params, grads[1:2])
    assert same_bits(params, before) and not same_bits(params, other_params)


def test_a_step_may_be_an_integer():
    params = parameters()
    state = stepped(AdamW(params, lr=0.1), params).state_dict()
    results = []
    for kind in (float, int):
        others = parameters()
        optimizer = AdamW(others)
        saved = copy.deepcopy(state)
        for entry in saved['state'].values():
            entry['step'] = torch.tensor(kind(entry['step']))
        optimizer.load_state_dict(saved)
        stepped(optimizer, others, 20)
        results.append(others)
    assert same_bits(*results)


@pytest.mark.parametrize(
    'saved, loads', [('dependent', 'inflection_point'), ('inflection_point', 'uniform')]
)
def test_the_method_for_kappa_comes_with_the_state(saved, loads):
    params = parameters()
    first = stepped(AdamCPR(params, kappa_init_method=saved, kappa_init_param=0.5), params)
    others = copies(params)
    second = AdamCPR(others, kappa_init_method=loads)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    stepped(first, params, seed=1)
    stepped(second, others, seed=1)
    assert same_bits(params, others)
    assert_same_state(first, second)


# ---- steps at a learning rate of 0, by which torch.distributed.checkpoint and others make states

DECISIONS = ('lagmul', 'kappa', 'kappa_set', 'init_norm', 'ratio')
AT_REST = {
    'adamw': ('adamw', ()),
    'h': ('h', ()),
    **{
        f'cpr {reg} {order} {method}': ('cpr', (reg, order, method))
        for reg in REG_FUNCTIONS
        for order in ORDERS
        for method in ('dependent', 'warm_start', 'inflection_point')
    },
    **{
        f'wn {scope} {order}': ('wn', (scope, order))
        for scope in ('tensor', 'global')
        for order in ORDERS
    },
}

AT_REST_IN_TRITON = [
    'adamw',
    'h',
    'cpr l2 before dependent',
    'cpr l1 after dependent',
    'cpr huber before dependent',
    'cpr std after dependent',
    'wn tensor after',
    'wn global before',
]


def at_rest(name, params, **options):
    """An optimizer whose every step at a learning rate above 0 corrects something."""
    kind, details = AT_REST[name]
    if kind == 'adamw':
        return AdamW(params, weight_decay=0.5, **options)
    if kind == 'h':
        return AdamH(params, **options)
    if kind == 'wn':
        scope, order = details
        return AdamWN(params, scope=scope, order=order, rate=0.5, ratio=1.5, **options)
    reg, order, method = details
    bounds = {'dependent': 0.5, 'warm_start': 1, 'inflection_point': 1000.0}
    options.update(kappa_init_method=method, kappa_init_param=bounds[method])
    options.update(reg_step_size=1, reg_ema_decay=0.0, reg_function=reg, order=order)
    return AdamCPR(params, **options)


@pytest.mark.parametrize(
    'name, impl',
    [(name, impl) for name in AT_REST for impl in ('torch', 'numba')]
    + [(name, 'triton') for name in AT_REST_IN_TRITON],
)
def test_a_step_at_lr_0_changes_no_weight_and_no_decision(name, impl):
    """From the first step on, with zero gradients and with others, and with lr as a tensor."""
    pytest.importorskip(impl)
    params = parameters([(5, 4), (7,)], device=device_of(impl))
    optimizer = at_rest(name, params, lr=0.0, impl=impl)
    start = copies(params)
    zeros = [[torch.zeros_like(p) for p in params]]
    train(optimizer, params, zeros)
    assert same_bits(start, params)
    optimizer.param_groups[0]['lr'] = 0.1
    train(optimizer, params, gradient_steps(params, 2 if impl == 'triton' else 8))
    assert not same_bits(start, params)
    for lr in (0.0, 1e-46, torch.tensor(0.0)):  # 1e-46 is 0 in float32
        optimizer.param_groups[0]['lr'] = lr
        before = snapshot(optimizer, params)
        train(optimizer, params, [*zeros, *gradient_steps(params, 1, seed=1)])
        assert_unchanged_since(before, optimizer, params, DECISIONS)


@pytest.mark.parametrize('variant', VARIANTS)
def test_distributed_checkpoints_make_states_without_moving_weights(variant):
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    torch.manual_seed(0)
    model, other = Tiny(), Tiny()
    optimizer = make(variant, model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    made = get_optimizer_state_dict(model, optimizer)
    assert made['state'] and all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    run_model(model, optimizer, range(6))

    other.load_state_dict(model.state_dict())
    resumed = make(variant, other)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(other, resumed, saved)
    assert same_bits(model.parameters(), other.parameters())
    assert_same_state(optimizer, resumed)
    run_model(model, optimizer, range(6, 9))
    run_model(other, resumed, range(6, 9))
    assert same_bits(model.parameters(), other.parameters())


# ---- states of torch.optim.AdamW


@pytest.mark.parametrize('fused', [False, True])
def test_adamw_goes_on_from_torch_adamw_and_back(fused):
    torch.manual_seed(0)
    straight = Tiny()
    switching = copy.deepcopy(straight)
    oracle = torch.optim.AdamW(nanogpt_groups(straight), lr=0.01, fused=fused)
    first = torch.optim.AdamW(nanogpt_groups(switching), lr=0.01, fused=fused)
    run_model(straight, oracle, range(9))

    run_model(switching, first, range(3))
    ours = AdamW(switching, lr=0.5, weight_decay=0.7)
    ours.load_state_dict(through_a_file(first.state_dict()))
    run_model(switching, ours, range(3, 6))
    last = torch.optim.AdamW(nanogpt_groups(switching), lr=0.5, fused=fused)
    last.load_state_dict(through_a_file(ours.state_dict()))
    run_model(switching, last, range(6, 9))
    for p, q in zip(straight.parameters(), switching.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('cls', [AdamCPR, AdamWN])
def test_the_others_load_torch_adamws_state_and_torch_adamw_theirs(cls):
    torch.manual_seed(0)
    model = Tiny()
    before = torch.optim.AdamW(nanogpt_groups(model), lr=0.01)
    run_model(model, before, range(3))
    bound = {'kappa_init_method': 'dependent', 'kappa_init_param': 0.9}
    ours = cls(model, **bound if cls is AdamCPR else {'rate': 0.1})
    ours.load_state_dict(through_a_file(before.state_dict()))
    weight = model.fc.weight
    assert torch.equal(ours.state[weight]['exp_avg'], before.state[weight]['exp_avg'])
    run_model(model, ours, range(3, 6))
    assert ours.state[weight]['step'] == 6
    assert ('kappa' if cls is AdamCPR else 'init_norm') in ours.state[weight]
    after = torch.optim.AdamW(nanogpt_groups(model), lr=0.01)
    after.load_state_dict(through_a_file(ours.state_dict()))
    assert torch.equal(after.state[weight]['exp_avg_sq'], ours.state[weight]['exp_avg_sq'])
    run_model(model, after, range(6, 8))
    assert all(p.isfinite().all() for p in model.parameters())


# ---- states of pytorch-cpr


def pytorch_cprs(params, **options):
    pytorch_cpr = pytest.importorskip('pytorch_cpr')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pytorch_cpr.AdamCPR(params, foreach=False, **options)


@pytest.mark.parametrize(
    'options',
    [
        {'kappa_init_method': 'uniform', 'kappa_init_param': 24.0},
        {'kappa_init_method': 'dependent', 'kappa_init_param': 1.02},
        {'kappa_init_method': 'warm_start', 'kappa_init_param': 3},
        {'kappa_init_method': 'warm_start', 'kappa_init_param': 9},  # saved before it is set
    ],
    ids=lambda o: '-'.join(map(str, o.values())),
)
def test_a_run_of_pytorch_cpr_goes_on_here_as_it_would_there(options):
    options = {'lr': 0.03, 'betas': (0.8, 0.95), 'kappa_update': 0.1, **options}
    theirs = parameters([(4, 3), (5, 3)])
    grads = gradient_steps(theirs, 30)
    first = pytorch_cprs(everywhere(theirs), **options)
    train(first, theirs, grads[:6])
    ours = copies(theirs)
    second = AdamCPR(everywhere(ours), order='after', **options)
    second.load_state_dict(through_a_file(first.state_dict()))
    train(first, theirs, grads[6:])
    train(second, ours, grads[6:])
    assert_close(ours, theirs, tol=1e-5)
    for p, q in zip(ours, theirs, strict=True):
        assert second.state[p]['kappa'].item() == pytest.approx(first.state[q]['kappa'].item())
        assert second.state[p]['lagmul'].item() > 0


def test_a_bound_that_pytorch_cpr_has_not_set_is_not_a_bound_here():
    theirs = parameters([(4, 3)])
    first = pytorch_cprs(everywhere(theirs))
    train(first, theirs, gradient_steps(theirs, 3))
    assert first.state[theirs[0]]['kappa'] == 1e6
    ours = copies(theirs)
    second = AdamCPR(everywhere(ours), reg_step_size=4, reg_ema_decay=0.0)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert not second.state[ours[0]]['kappa_set']
    stepped(second, ours, 40)
    assert second.state[ours[0]]['kappa_set'] and second.state[ours[0]]['kappa'] < 100


# ---- states that do not fit


def test_a_state_dict_of_other_groups_is_refused_in_torchs_words():
    params = parameters()
    saved = make('adamw', params).state_dict()
    with pytest.raises(ValueError, match='different number of parameter groups'):
        make('adamw', [{'params': params[:1]}, {'params': params[1:]}]).load_state_dict(saved)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        make('adamw', params[:2]).load_state_dict(saved)


@pytest.mark.parametrize('name', ['exp_avg', 'exp_avg_sq'])
@pytest.mark.parametrize('wrong', ['another shape', 'missing'])
def test_moments_that_do_not_fit_are_refused_by_name_when_they_are_loaded(name, wrong):
    params = parameters()
    saved = copy.deepcopy(stepped(make('wn', params), params).state_dict())
    if wrong == 'missing':
        del saved['state'][2][name]
    else:
        saved['state'][2][name] = torch.zeros(9, 17)
    optimizer = make('wn', params)
    with pytest.raises(ValueError, match=name):
        optimizer.load_state_dict(saved)
    stepped(optimizer, params)


@pytest.mark.parametrize('name', ['maximize', 'amsgrad'])
def test_a_state_saved_with_a_meaning_that_we_lack_is_refused(name):
    params = parameters()
    theirs = stepped(torch.optim.AdamW(params, **{name: True}), params)
    with pytest.raises(ValueError, match=f'{name}.*AdamW'):
        AdamW(params).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize('at', [0.0, 0.03])
def test_a_parameter_of_another_shape_is_refused_not_written_beyond(at):
    for smaller in (torch.ones(3, 3), torch.ones(7, 7)):
        p = nn.Parameter(torch.ones(5, 5))
        optimizer = stepped(AdamW([p], lr=at), [p])
        p.data = smaller
        p.grad = torch.ones_like(smaller)
        with pytest.raises(ValueError, match='shape'):
            optimizer.step()


# ---- hooks


def test_a_pre_hook_may_bring_the_state_of_another_model():
    params, others = parameters(), [*parameters(), nn.Parameter(torch.ones(2))]
    first, second = stepped(AdamW(params), params), AdamW(others)

    def hook(optimizer, state_dict):
        return {**optimizer.state_dict(), 'state': state_dict['state']}

    second.register_load_state_dict_pre_hook(hook)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[others[0]]['exp_avg'], first.state[params[0]]['exp_avg'])
    assert others[-1] not in second.state


def test_what_a_post_hook_changes_in_the_loaded_state_is_kept():
    params, others = parameters(), parameters()
    first, second = stepped(AdamW(params), params), AdamW(others)

    def hook(optimizer):
        for state in optimizer.state.values():
            state['exp_avg'] = torch.zeros_like(state['exp_avg'])
            state['step'].fill_(100)

    second.register_load_state_dict_post_hook(hook)
    second.load_state_dict(first.state_dict())
    assert not second.state[others[0]]['exp_avg'].any()
    set_grads(others, gradient_steps(others, 1)[0])
    second.step()
    assert second.state[others[0]]['step'] == 101
    assert_close([second.state[others[0]]['exp_avg']], [0.1 * others[0].grad])


def test_a_hook_on_state_dict_may_rename_what_is_saved():
    params = parameters()
    optimizer = stepped(make('wn', params), params)

    def hook(_, state_dict):
        return {**state_dict, 'state': {f'p{i}': s for i, s in state_dict['state'].items()}}

    optimizer.register_state_dict_post_hook(hook)
    assert set(optimizer.state_dict()['state']) == {'p0', 'p1', 'p2'}
