"""AdamW, AdamCPR and AdamWN behave as every torch.optim.Optimizer does, and keep their own promises about a step."""

import copy
import io
import math
import pickle

import pytest
import torch
from reference import Reference, gradients, weights
from torch import nn

from cpr import AdamCPR, AdamW, AdamWN

# name -> (class, arguments), such that every bound acts within a few steps. On weights near 1 a kappa_update of 1 would
# make the constraint overshoot, and rounding errors grow with every swing.
VARIANTS = {
    'adamw': (AdamW, {'weight_decay': 0.3}),
    'cpr-uniform': (
        AdamCPR,
        {'kappa_init_method': 'uniform', 'kappa_init_param': 20.0, 'kappa_update': 0.1},
    ),
    'cpr-dependent-after': (
        AdamCPR,
        {
            'kappa_init_method': 'dependent',
            'kappa_init_param': 1.02,
            'order': 'after',
            'kappa_update': 0.1,
        },
    ),
    'cpr-warm-start': (
        AdamCPR,
        {'kappa_init_method': 'warm_start', 'kappa_init_param': 4, 'reg_function': 'l1'},
    ),
    'cpr-inflection': (AdamCPR, {'reg_step_size': 2, 'reg_ema_decay': 0.5, 'kappa_update': 0.1}),
    'cpr-inflection-after': (
        AdamCPR,
        {'reg_step_size': 2, 'order': 'after', 'reg_function': 'std'},
    ),
    'wn': (AdamWN, {'rate': 0.2, 'ratio': 1.3}),
    'wn-global-before': (AdamWN, {'rate': 0.2, 'ratio': 1.3, 'scope': 'global', 'order': 'before'}),
}
every_variant = pytest.mark.parametrize('variant', VARIANTS)
SHAPES = [(4, 3), (7,), (17, 9)]


def make(variant, params, **more):
    cls, options = VARIANTS[variant]
    return cls(params, **{'lr': 0.03, 'betas': (0.8, 0.95), **options, **more})


def parameters(shapes=SHAPES, dtype=torch.float32):
    return [nn.Parameter(weights(s, i, dtype)) for i, s in enumerate(shapes)]


def gradient_steps(params, steps=40, seed=0):
    return list(
        zip(*(gradients(p.detach(), seed + i, steps) for i, p in enumerate(params)), strict=True)
    )


def train(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
    return params


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_state(a, b):
    """Two optimizers remember the same, bit for bit (nan, an unset kappa, equals nan)."""
    for x, y in zip(
        a.state_dict()['state'].values(), b.state_dict()['state'].values(), strict=True
    ):
        assert x.keys() == y.keys()
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=0, atol=0, equal_nan=True)
    return True


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def through_a_file(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# -- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'moment, dtype',
    [
        # before the first step, mid warm start, mid inflection, with the bound active
        (0, torch.float32),
        (1, torch.float32),
        (3, torch.float32),
        (7, torch.float32),
        (20, torch.float32),
        (3, torch.bfloat16),
        (20, torch.bfloat16),
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
    assert same_state(optimizer, resumed)
    train(optimizer, params, grads[moment:])
    train(resumed, resumed_params, grads[moment:])
    assert same_bits(params, resumed_params) and same_state(optimizer, resumed)


@every_variant
def test_half_precision_parameters_keep_float32_state(variant):
    params = parameters(dtype=torch.bfloat16)
    grads = gradient_steps(params, 20)
    optimizer = make(variant, params)
    train(optimizer, params, grads)
    loaded = make(variant, params)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in params:
        for o in (optimizer, loaded):
            dtypes = {name: x.dtype for name, x in o.state[p].items()}
            assert dtypes.pop('kappa_set', torch.bool) == torch.bool
            assert set(dtypes.values()) == {torch.float32}


def test_the_state_has_the_documented_names_and_nothing_that_grows():
    p = parameters([(5, 4)])
    for variant, own in {
        'adamw': set(),
        'wn': {'init_norm'},
        'cpr-uniform': {'kappa', 'kappa_set', 'lagmul'},
        'cpr-inflection': {
            'kappa',
            'kappa_set',
            'lagmul',
            'ema',
            'ema_error',
            'ema_last',
            'ema_growth',
        },
    }.items():
        optimizer = make(variant, p)
        train(optimizer, p, gradient_steps(p, 1))
        state = optimizer.state[p[0]]
        assert set(state) == {'step', 'exp_avg', 'exp_avg_sq'} | own
        assert all(state[name].dim() == 0 for name in {'step'} | own)
    assert not optimizer.state[p[0]]['kappa_set'] and optimizer.state[p[0]]['kappa'].isnan()


def test_load_state_dict_leaves_its_argument_alone_and_shares_nothing_with_it():
    params = parameters()
    optimizer = make('cpr-dependent-after', params)
    train(optimizer, params, gradient_steps(params, 5))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    train(loaded := make('cpr-dependent-after', params), params, gradient_steps(params, 1))
    loaded.load_state_dict(saved)
    train(loaded, params, gradient_steps(params, 3))
    assert saved['param_groups'] == before['param_groups']
    for i, state in before['state'].items():
        assert same_bits(state.values(), saved['state'][i].values())


def test_a_state_dict_of_another_shape_is_refused():
    params = parameters()
    saved = make('adamw', params).state_dict()
    with pytest.raises(ValueError):
        make('adamw', params[:2]).load_state_dict(saved)
    with pytest.raises(ValueError):
        make('adamw', [{'params': params[:1]}, {'params': params[1:]}]).load_state_dict(saved)


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
    assert same_bits(params, other_params) and same_state(optimizer, other)
    assert torch.equal(optimizer.grad_norm, other.grad_norm)


# -- together with torch.optim.AdamW -----------------------------------------------------------------------------


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


def nanogpt_groups(model):
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {'params': [p for p in params if p.dim() >= 2], 'weight_decay': 0.1},
        {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
    ]


def run_model(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


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
    options = (
        {'kappa_init_method': 'dependent', 'kappa_init_param': 0.9}
        if cls is AdamCPR
        else {'rate': 0.1}
    )
    ours = cls(model, **options)
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


# -- groups ----------------------------------------------------------------------------------------------------------


def regularized(optimizer, module):
    names = {id(p): name for name, p in module.named_parameters()}
    out = set()
    for group in optimizer.param_groups:
        flags = (
            group['regularize']
            if isinstance(group['regularize'], list)
            else [group['regularize']] * 99
        )
        out |= {names[id(p)] for p, flag in zip(group['params'], flags, strict=False) if flag}
    return out


@pytest.mark.parametrize('cls', [AdamW, AdamCPR, AdamWN])
def test_a_module_makes_two_groups_laid_out_as_nanogpts(cls):
    model = Tiny()
    ours, nanogpts = cls(model).param_groups, nanogpt_groups(model)
    assert len(ours) == 2
    for a, b in zip(ours, nanogpts, strict=True):
        assert [id(p) for p in a['params']] == [id(p) for p in b['params']]
    assert ours[1]['weight_decay'] == 0.0


def test_adamcpr_regularizes_a_modules_matrices_but_not_embeddings_tied_weights_norms_or_biases():
    model = Tiny()
    assert regularized(AdamCPR(model), model) == {'fc.weight', 'conv.weight'}
    assert regularized(AdamCPR(model, reg_embedding=True), model) == {
        'wte.weight',
        'wpe.weight',
        'fc.weight',
        'conv.weight',
    }


@pytest.mark.parametrize('cls', [AdamW, AdamWN])
def test_adamw_and_adamwn_regularize_every_tensor_of_two_or_more_dimensions(cls):
    model = Tiny()
    assert regularized(cls(model), model) == {
        'wte.weight',
        'wpe.weight',
        'fc.weight',
        'conv.weight',
    }


@pytest.mark.parametrize('cls', [AdamW, AdamCPR, AdamWN])
def test_a_weight_that_its_module_marks_is_not_regularized(cls):
    model = Tiny()
    all_of_them = regularized(cls(model), model)
    model.fc.weight._no_weight_decay = True
    assert regularized(cls(model), model) == all_of_them - {'fc.weight'} < all_of_them


def test_a_frozen_weight_is_no_parameter_of_the_optimizer():
    model = Tiny()
    model.fc.weight.requires_grad_(False)
    optimizer = AdamCPR(model, kappa_init_method='dependent', kappa_init_param=0.5)
    assert all(
        p is not model.fc.weight for group in optimizer.param_groups for p in group['params']
    )
    before = model.fc.weight.clone()
    run_model(model, optimizer, range(3))
    assert torch.equal(before, model.fc.weight)


def test_a_module_of_matrices_only_still_makes_two_groups():
    assert [len(g['params']) for g in AdamCPR(nn.Linear(3, 3, bias=False)).param_groups] == [1, 0]


def test_a_module_of_norms_only_is_not_regularized():
    model = nn.LayerNorm((3, 4))
    assert regularized(AdamCPR(model), model) == set()


def test_plain_parameters_are_regularized_from_two_dimensions_on_unless_a_group_says_otherwise():
    params = parameters([(4, 3), (7,), (2, 2, 2)])
    assert AdamCPR(params).param_groups[0]['regularize'] == [True, False, True]
    for said, flags in ((True, [1, 1, 1]), (False, [0, 0, 0]), ([False, True, True], [0, 1, 1])):
        grads = gradient_steps(params, 3)
        p = copies(params)
        optimizer = AdamCPR(
            [{'params': p, 'regularize': said}], kappa_init_method='dependent', kappa_init_param=0.9
        )
        train(optimizer, p, grads)
        assert ['lagmul' in optimizer.state[q] for q in p] == [bool(f) for f in flags]


def test_groups_have_options_of_their_own():
    params = parameters([(4, 3), (5, 6)])
    grads = gradient_steps(params, 10)
    options = [
        {'lr': 0.1, 'betas': (0.5, 0.9), 'weight_decay': 0.0},
        {'lr': 0.01, 'eps': 1e-3, 'weight_decay': 2.0},
    ]
    alone = copies(params)
    for p, own, i in zip(alone, options, (0, 1), strict=True):
        train(AdamW([p], **own), [p], [step[i : i + 1] for step in grads])
    groups = [{'params': [p], **own} for p, own in zip(params, options, strict=True)]
    train(AdamW(groups), params, grads)
    assert same_bits(params, alone)


@every_variant
def test_a_group_added_later_is_trained_as_from_the_start(variant):
    if variant == 'wn-global-before':
        return  # its joint norm is of all parameters there are
    params, late = parameters(), parameters([(5, 4), (3,)])
    grads, late_grads = gradient_steps(params, 20), gradient_steps(late, 14, seed=5)
    alone, late_alone = copies(params), copies(late)
    train(make(variant, alone), alone, grads)
    train(make(variant, late_alone), late_alone, late_grads)

    optimizer = make(variant, params)
    train(optimizer, params, grads[:6])
    optimizer.add_param_group({'params': late})
    assert optimizer.param_groups[1]['lr'] == 0.03
    train(optimizer, params + late, [a + b for a, b in zip(grads[6:], late_grads, strict=True)])
    assert same_bits(params, alone) and same_bits(late, late_alone)


def test_a_group_that_is_refused_is_not_added():
    params = parameters()
    optimizer = AdamCPR(params[:1])
    with pytest.raises(ValueError):
        optimizer.add_param_group({'params': params[1:], 'regularize': [True]})
    assert len(optimizer.param_groups) == 1


# -- one step among others -----------------------------------------------------------------------------------------


def test_zero_grad_closure_and_hooks():
    p = parameters([(3, 3)])
    optimizer, calls = AdamCPR(p), []
    optimizer.register_step_pre_hook(lambda *_: calls.append('pre'))
    optimizer.register_step_post_hook(lambda *_: calls.append('post'))

    def closure():
        optimizer.zero_grad()
        loss = (p[0] ** 2).sum()
        loss.backward()
        return loss

    before = p[0].detach().clone()
    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx((before**2).sum().item())
    assert not torch.equal(before, p[0]) and calls == ['pre', 'post']
    optimizer.zero_grad()
    assert p[0].grad is None and optimizer.step() is None


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
    grads = gradient_steps(params, 20)
    by_hand = copies(params)
    optimizer, other = make(variant, params), make(variant, by_hand)
    schedule = scheduler(optimizer)
    for step in grads:
        for a, b in zip(other.param_groups, optimizer.param_groups, strict=True):
            a['lr'], a['betas'] = b['lr'], b['betas']
        train(optimizer, params, [step])
        train(other, by_hand, [step])
        schedule.step()
    assert same_bits(params, by_hand)


@every_variant
def test_a_tensor_is_as_good_a_learning_rate_as_a_number(variant):
    params = parameters()
    grads = gradient_steps(params, 12)
    numbers, tensors = copies(params), copies(params)
    lr = torch.tensor(0.03)
    a, b = make(variant, numbers), make(variant, tensors, lr=lr)
    train(a, numbers, grads[:6])
    train(b, tensors, grads[:6])
    a.param_groups[0]['lr'] = 0.01
    lr.fill_(0.01)
    train(a, numbers, grads[6:])
    train(b, tensors, grads[6:])
    for p, q in zip(numbers, tensors, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@every_variant
def test_a_parameter_without_a_gradient_waits(variant):
    """Some steps with, some without, one that joins late: each goes through its own steps only."""
    params = parameters()
    kind = {AdamW: 'adamw', AdamCPR: 'adamcpr', AdamWN: 'adamwn'}[VARIANTS[variant][0]]
    options = {'lr': 0.03, 'betas': (0.8, 0.95), **VARIANTS[variant][1]}
    reference = Reference(kind, params, **options)
    optimizer = make(variant, params)
    for t, step in enumerate(gradient_steps(params)):
        step = [g if i == 1 or t % (2 + i) and t > 3 * i else None for i, g in enumerate(step)]
        before = [p.detach().clone() for p in params]
        train(optimizer, params, [step])
        reference.step(step)
        assert all(
            torch.equal(p, b) for p, b, g in zip(params, before, step, strict=True) if g is None
        )
    for p, expected in zip(params, reference.params, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=2e-5, atol=2e-5)
    assert optimizer.state[params[2]]['step'] == reference.tensors[2].t


@pytest.mark.parametrize('order', ['before', 'after'])
@pytest.mark.parametrize('target', [{'norm': 9.0}, {'ratio': 1.3}], ids=['norm', 'ratio'])
def test_a_joint_norm_is_that_of_all_tensors_whichever_have_gradients(target, order):
    results, start = [], parameters()
    grads = gradient_steps(start, 4)
    for waits in (False, True):
        params = copies(start)
        optimizer = AdamWN(params, lr=0.03, rate=0.5, scope='global', order=order, **target)
        train(optimizer, params, grads[:3])
        optimizer.param_groups[0]['lr'] = 0.0  # the correction alone
        before = params[0].detach().clone()
        train(optimizer, params, [[*grads[3][:2], None if waits else grads[3][2]]])
        results.append(params[0])
        assert not torch.equal(before, params[0])
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


def test_a_step_without_any_gradient_does_nothing():
    params = parameters()
    optimizer = make('cpr-dependent-after', params)
    optimizer.step()
    assert same_bits(params, parameters()) and not optimizer.state


def test_the_same_run_gives_the_same_bits_twice():
    torch.set_num_threads(2)
    for variant in VARIANTS:
        runs = []
        for _ in range(2):
            params = parameters([*SHAPES, (257, 1031)])
            runs.append(
                train(make(variant, params, max_grad_norm=3.0), params, gradient_steps(params, 8))
            )
        assert same_bits(*runs), variant


@every_variant
def test_the_order_in_which_tensors_are_listed_changes_no_bit(variant):
    if variant == 'wn-global-before':
        return  # a joint norm is a sum over tensors, and rounds in their order
    params = parameters([*SHAPES, (257, 33)])
    grads = gradient_steps(params, 15)
    listed = copies(params)
    train(make(variant, params), params, grads)
    train(make(variant, listed[::-1]), listed, grads)
    assert same_bits(params, listed)


def test_repr_names_the_class_and_its_options():
    text = repr(make('cpr-warm-start', parameters()))
    assert text.startswith('AdamCPR') and 'warm_start' in text and 'lr: 0.03' in text


# -- clipping, scaling, skipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize('max_grad_norm', [0.5, 6.0, 1e4])
@every_variant
def test_max_grad_norm_is_clip_grad_norm_and_a_step(variant, max_grad_norm):
    params = parameters([*SHAPES, (257, 33)])
    grads = gradient_steps(params, 12)
    ours, clipped = copies(params), copies(params)
    a, b = (
        make(variant, ours, max_grad_norm=max_grad_norm),
        make(variant, clipped, max_grad_norm=None),
    )
    for step in grads:
        for p, q, g in zip(ours, clipped, step, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        norm = torch.nn.utils.clip_grad_norm_(clipped, max_grad_norm)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, norm, rtol=1e-6, atol=0)
        assert same_bits([p.grad for p in ours], step), 'gradients are not rewritten'
    for p, q in zip(ours, clipped, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


def test_grad_norm_is_measured_unless_told_not_to():
    params = parameters()
    grads = gradient_steps(params, 3)
    measured, unmeasured = copies(params), copies(params)
    a, b = make('cpr-uniform', measured), make('cpr-uniform', unmeasured, max_grad_norm=None)
    train(a, measured, grads)
    train(b, unmeasured, grads)
    assert same_bits(measured, unmeasured) and b.grad_norm is None
    assert a.grad_norm.dim() == 0 and a.grad_norm.dtype == torch.float32
    assert a.grad_norm.item() == pytest.approx(
        math.sqrt(sum(g.square().sum().item() for g in grads[-1]))
    )
    assert (
        a.skipped_steps.dim() == 0 and a.skipped_steps.dtype == torch.int64 and a.skipped_steps == 0
    )


@pytest.mark.parametrize(
    'bad, max_grad_norm', [(math.nan, 0.0), (math.nan, 1.0), (math.inf, 1.0), (-math.inf, 0.0)]
)
@every_variant
def test_a_gradient_that_is_not_finite_changes_nothing_and_counts(variant, max_grad_norm, bad):
    """The run is that of the good steps alone; the bad ones are the first, one mid warm start, two in a row."""
    params = parameters()
    grads = gradient_steps(params, 20)
    good = copies(params)
    train(reference := make(variant, good, max_grad_norm=max_grad_norm), good, grads)
    poisoned = [g.clone() for g in grads[0]]
    poisoned[1][2] = bad
    optimizer = make(variant, params, max_grad_norm=max_grad_norm)
    for t, step in enumerate(grads):
        for _ in range({0: 1, 3: 1, 12: 2}.get(t, 0)):
            before, state = (
                [p.detach().clone() for p in params],
                copy.deepcopy(optimizer.state_dict()['state']),
            )
            train(optimizer, params, [poisoned])
            assert same_bits(params, before) and not optimizer.grad_norm.isfinite()
            for i, s in state.items():
                assert all(
                    torch.equal(s[k], optimizer.state_dict()['state'][i][k]) or s[k].isnan()
                    for k in s
                )
        train(optimizer, params, [step])
    assert optimizer.skipped_steps == 4
    assert same_bits(params, good) and same_state(optimizer, reference)


@pytest.mark.parametrize('unscale_first', [False, True])
@pytest.mark.parametrize('max_grad_norm', [None, 0.0, 4.0])
@every_variant
def test_a_grad_scaler_changes_nothing_but_the_steps_it_skips(
    variant, max_grad_norm, unscale_first
):
    params = parameters()
    plain = copies(params)
    grads = gradient_steps(params, 12)
    optimizer, other = (make(variant, p, max_grad_norm=max_grad_norm) for p in (params, plain))
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0, growth_interval=5)
    for t, step in enumerate(grads):
        for p, g in zip(params, step, strict=True):
            p.grad = scaler.scale(g.clone())
        if t in (2, 7):
            params[0].grad[0, 0] = math.inf
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if t not in (2, 7):
            train(other, plain, [step])
            if max_grad_norm is not None:
                torch.testing.assert_close(optimizer.grad_norm, other.grad_norm, rtol=1e-6, atol=0)
    assert scaler.get_scale() < 1024.0 * 2**2 and scaler.get_scale() != 1024.0
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    if not unscale_first:  # else the scaler itself leaves the step out
        assert optimizer.skipped_steps == 2


# -- weights that change, and weights of every kind ----------------------------------------------------------------


def write_copy(p, x):
    with torch.no_grad():
        p.copy_(x)


def write_data_copy(p, x):
    p.data.copy_(x)


def write_data(p, x):
    p.data = x.clone()


def write_one_element(p, x):
    p.data[0, 0] = 4.0


def write_through_a_view(p, x):
    p.detach().view(-1)[:5].mul_(1.5)


@pytest.mark.parametrize(
    'write', [write_copy, write_data_copy, write_data, write_one_element, write_through_a_view]
)
@pytest.mark.parametrize('variant', [v for v in VARIANTS if v != 'adamw'])
def test_weights_written_between_steps_are_noticed(variant, write):
    params = parameters()
    kind = 'adamwn' if variant.startswith('wn') else 'adamcpr'
    reference = Reference(
        kind, params, **{'lr': 0.03, 'betas': (0.8, 0.95), **VARIANTS[variant][1]}
    )
    optimizer = make(variant, params)
    for t, step in enumerate(gradient_steps(params, 20)):
        if t in (5, 14):
            write(params[0], 1.4 * params[0].detach())
            reference.tensors[0].theta = params[0].detach().double()
        train(optimizer, params, [step])
        reference.step(step)
    for p, expected in zip(params, reference.params, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@every_variant
def test_strides_do_not_matter(variant, dtype):
    base = weights((12, 10), 3, dtype)
    strided = [
        nn.Parameter(base.t()[2:9]),
        nn.Parameter(base[::2, ::3].clone(memory_format=torch.preserve_format)),
    ]
    strided.append(
        nn.Parameter(weights((2, 3, 4, 5), 1, dtype).to(memory_format=torch.channels_last))
    )
    strided.append(nn.Parameter(torch.as_strided(weights((60,), 2, dtype), (6, 5), (10, 2))))
    contiguous = [nn.Parameter(p.detach().contiguous().clone()) for p in strided]
    grads = gradient_steps(contiguous, 10)
    a, b = make(variant, strided, max_grad_norm=2.0), make(variant, contiguous, max_grad_norm=2.0)
    for step in grads:
        for p, q, g in zip(strided, contiguous, step, strict=True):
            q.grad = g.clone()
            p.grad = torch.empty_like(p).copy_(g)
        a.step()
        b.step()
    for p, q in zip(strided, contiguous, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6 if dtype == torch.float32 else 0.02, atol=1e-6)


@every_variant
def test_tensors_without_elements_scalars_and_single_elements_are_taken(variant):
    shapes = [(0,), (0, 3), (), (1,), (1, 1), (4, 3)]
    params = [nn.Parameter(weights(s, i)) for i, s in enumerate(shapes)]
    optimizer = make(variant, [{'params': params, 'regularize': True}], max_grad_norm=3.0)
    train(optimizer, params, gradient_steps(params, 16))
    assert all(p.isfinite().all() for p in params)
    assert same_bits([optimizer.state[p]['step'] for p in params], [torch.tensor(16.0)] * 6)
    moved = [
        not torch.equal(p, weights(s, i))
        for i, (p, s) in enumerate(zip(params, shapes, strict=True))
    ]
    assert moved == [False, False, True, True, True, True]


@pytest.mark.parametrize('order', ['before', 'after'])
@pytest.mark.parametrize('reg_function', ['l2', 'l1', 'huber', 'std'])
def test_adamcpr_takes_weights_that_are_all_equal(reg_function, order):
    for value in (0.0, 1.0):
        p = [nn.Parameter(torch.full((4, 3), value))]
        options = {
            'reg_function': reg_function,
            'order': order,
            'kappa_init_method': 'uniform',
            'betas': (0.8, 0.95),
            'kappa_init_param': 1e-3,
            'kappa_update': 0.1,
            'lr': 0.03,
        }
        reference = Reference('adamcpr', p, **options)
        optimizer = AdamCPR(p, **options)
        for g in [torch.zeros(4, 3), *gradients(weights((4, 3)), steps=5)]:
            train(optimizer, p, [[g]])
            reference.step([g])
            if reg_function == 'l1':  # weights sit on the kink, where a rounding decides
                assert p[0].isfinite().all()
            else:
                torch.testing.assert_close(
                    p[0].detach().double(), reference.params[0], rtol=1e-5, atol=1e-6
                )


@pytest.mark.parametrize('order', ['before', 'after'])
@pytest.mark.parametrize('scope', ['tensor', 'global'])
@pytest.mark.parametrize('target', [{'ratio': 1.5}, {'norm': 2.0}], ids=['ratio', 'norm'])
def test_adamwn_takes_weights_that_are_all_zero(order, scope, target):
    params = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5, 5))]
    options = {
        'order': order,
        'scope': scope,
        'rate': 0.5,
        'lr': 0.03,
        'betas': (0.8, 0.95),
        **target,
    }
    reference = Reference('adamwn', params, **options)
    optimizer = AdamWN(params, **options)
    grads = list(
        zip(gradients(weights((4, 3)), steps=6), gradients(weights((5, 5)), steps=6), strict=True)
    )
    for step in [(torch.zeros(4, 3), torch.zeros(5, 5)), *grads]:
        train(optimizer, params, [step])
        reference.step(step)
        for p, expected in zip(params, reference.params, strict=True):
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'cls, wrong',
    [
        *(
            (c, w)
            for c in (AdamW, AdamCPR, AdamWN)
            for w in (
                {'lr': -1.0},
                {'lr': math.nan},
                {'lr': torch.ones(2)},
                {'betas': (1.0, 0.9)},
                {'betas': (0.9, 1.0)},
                {'betas': (-0.1, 0.9)},
                {'eps': -1e-8},
                {'max_grad_norm': -1.0},
                {'max_grad_norm': math.nan},
                {'impl': 'magic'},
            )
        ),
        (AdamW, {'weight_decay': -0.1}),
        *(
            (AdamCPR, w)
            for w in (
                {'kappa_init_method': 'bad'},
                {'reg_function': 'l3'},
                {'order': 'during'},
                {'kappa_update': -1.0},
                {'reg_step_size': 0},
                {'reg_step_size': 2.5},
                {'reg_ema_decay': 1.0},
                {'reg_ema_decay': -0.1},
                *(
                    {'kappa_init_method': m, 'kappa_init_param': x}
                    for m in ('uniform', 'dependent', 'warm_start')
                    for x in (0, -1.0, math.nan)
                ),
                {'kappa_init_method': 'warm_start', 'kappa_init_param': 2.5},
                {'kappa_init_method': 'warm_start', 'kappa_init_param': math.inf},
                {'reg_step_size': math.inf},
            )
        ),
        *(
            (AdamWN, w)
            for w in (
                {'rate': -0.1},
                {'rate': 1.1},
                {'ratio': -1.0},
                {'ratio': math.nan},
                {'norm': -1.0},
                {'scope': 'all'},
                {'order': 'during'},
                {'ratio': [1.0, 2.0, -1.0]},
                {'scope': 'global', 'ratio': [1.0, 1.0, 2.0]},
                {'ratio': [1.0, 2.0]},
                {'norm': [1.0, 2.0]},
            )
        ),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x),
)
def test_arguments_out_of_range_raise_value_error(cls, wrong):
    with pytest.raises(ValueError):
        cls(parameters(), **wrong)


@pytest.mark.parametrize('cls', [AdamW, AdamCPR, AdamWN])
def test_groups_that_make_no_sense_raise_value_error(cls):
    params = parameters()
    with pytest.raises(ValueError):
        cls([])
    with pytest.raises(ValueError):
        cls([{'params': params, 'regularize': [True]}])
    with pytest.raises(ValueError):
        cls([{'params': params}, {'params': params[:1]}])
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError):
        cls(frozen)


@pytest.mark.parametrize(
    'target',
    [{'ratio': [1.0, 2.0, 1.0]}, {'norm': torch.ones(3)}, {'norm': (1.0, 2.0, 1.0)}],
    ids=['ratio', 'norm', 'tuple'],
)
def test_one_joint_norm_has_one_target_whenever_it_is_set(target):
    params = parameters()
    with pytest.raises(ValueError, match='must be a single number, not 3'):
        AdamWN([{'params': params, **target}], scope='global')
    optimizer = AdamWN(params[:1], scope='global')
    with pytest.raises(ValueError, match='must be a single number, not 3'):
        optimizer.add_param_group({'params': [*params[1:], *parameters([(2, 2)])], **target})
    optimizer = stepped(AdamWN(params, scope='global'), params)
    before, state = (
        [p.detach().clone() for p in params],
        copy.deepcopy(optimizer.state_dict()['state']),
    )
    optimizer.param_groups[0].update(target)
    with pytest.raises(ValueError, match='must be a single number, not 3'):
        optimizer.step()
    assert same_bits(before, params)
    assert all(
        same_bits(s.values(), state[i].values()) for i, s in optimizer.state_dict()['state'].items()
    )
    optimizer.param_groups[0].update(ratio=[1.5], norm=None)
    stepped(optimizer, params, seed=1)


@pytest.mark.parametrize(
    'wrong', [{'ratio': -1.0}, {'norm': [1.0, -2.0, 1.0]}, {'ratio': math.nan}]
)
def test_a_groups_own_target_is_not_negative_either(wrong):
    with pytest.raises(ValueError, match='must be >= 0'):
        AdamWN([{'params': parameters(), **wrong}])


@pytest.mark.parametrize('cls', [AdamW, AdamCPR, AdamWN])
def test_sparse_gradients_and_complex_parameters_are_refused(cls):
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises((RuntimeError, ValueError), match='sparse'):
        cls(embedding.parameters()).step()
    with pytest.raises((RuntimeError, ValueError), match='complex|real'):
        p = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
        p.grad = torch.ones_like(p)
        cls([p]).step()


def stepped(optimizer, params, steps=3, seed=0):
    train(optimizer, params, gradient_steps(params, steps, seed))
    return optimizer


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
    assert same_bits(params, others) and same_state(first, second)


def test_groups_may_find_kappa_in_different_ways_but_not_in_unknown_ones():
    params = parameters()
    groups = [
        {'params': params[:1], 'kappa_init_method': 'inflection_point'},
        {'params': params[1:]},
    ]
    stepped(AdamCPR(groups, kappa_init_method='uniform'), params)
    for name in ('kappa_init_method', 'reg_function'):
        with pytest.raises(ValueError, match=f"{name}='typo' must be one of"):
            AdamCPR([{'params': params, name: 'typo'}])


def test_entries_of_the_state_may_be_replaced():
    params, others = parameters(), parameters()
    ours = stepped(AdamW(params, weight_decay=0.0), params)
    torchs = stepped(torch.optim.AdamW(others, weight_decay=0.0), others)
    for optimizer in (ours, torchs):
        for state in optimizer.state.values():
            for name in state:
                state[name] = (
                    state[name].clone() * 2
                )  # what brings a state back from elsewhere replaces it, too
    stepped(ours, params, seed=1)
    stepped(torchs, others, seed=1)
    for p, q in zip(params, others, strict=True):
        assert ours.state[p]['step'] == torchs.state[q]['step'] == 9
        torch.testing.assert_close(ours.state[p]['exp_avg'], torchs.state[q]['exp_avg'])
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    results = []
    for default in (torch.float32, dtype):
        params = parameters()
        grads = gradient_steps(params, 5)
        try:
            torch.set_default_dtype(default)
            for kind in (
                AdamW,
                lambda p, **k: AdamCPR(p, kappa_init_method='dependent', kappa_init_param=0.9, **k),
                AdamCPR,
                AdamWN,
            ):
                train(kind(params, max_grad_norm=1e-2), params, grads)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([p.detach().clone() for p in params])
    assert same_bits(*results)


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


def test_a_pre_hook_may_bring_the_state_of_another_model():
    params, others = parameters(), [*parameters(), torch.nn.Parameter(torch.ones(2))]
    first, second = stepped(AdamW(params), params), AdamW(others)

    def hook(optimizer, state_dict):
        return {**optimizer.state_dict(), 'state': state_dict['state']}

    second.register_load_state_dict_pre_hook(hook)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[others[0]]['exp_avg'], first.state[params[0]]['exp_avg'])
    assert others[-1] not in second.state


def test_a_write_through_data_is_noticed_in_a_tensor_that_is_not_contiguous():
    p = nn.Parameter(torch.randn(8, 8, 3, 3).to(memory_format=torch.channels_last))
    norm, optimizer = p.norm().item(), AdamWN([p], lr=1e-6, rate=1.0, order='before')
    for i in range(3):
        p.grad = torch.zeros_like(p)
        if i == 2:
            p.data.copy_(p.data * 3)
        optimizer.step()
    assert p.norm().item() == pytest.approx(norm, rel=1e-5)


def test_a_parameter_of_another_shape_is_refused_not_written_beyond():
    p = nn.Parameter(torch.ones(5, 5))
    optimizer = stepped(AdamW([p]), [p])
    p.data = torch.ones(7, 7)
    p.grad = torch.ones(7, 7)
    with pytest.raises(ValueError, match='shape'):
        optimizer.step()


def test_zero_is_a_seed():
    assert AdamW(parameters(), stochastic_rounding=0).seed == 0
