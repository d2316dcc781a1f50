"""Which tensors the optimizers regularize, and the options of parameter groups."""

import warnings

import pytest
import torch
from helpers.optimizers import (
    NUMBA,
    TORCH,
    VARIANTS,
    Tiny,
    copies,
    every_class,
    every_variant,
    gradient_steps,
    make,
    nanogpt_groups,
    parameters,
    regularized,
    run_model,
    same_bits,
    stepped,
    train,
)
from torch import nn

from cpr import AdamCPR, AdamH, AdamW, AdamWN

MATRICES = {'wte.weight', 'wpe.weight', 'fc.weight', 'conv.weight'}

# ---- modules


@every_class
def test_a_module_makes_two_groups_laid_out_as_nanogpts(cls):
    model = Tiny()
    ours, nanogpts = cls(model).param_groups, nanogpt_groups(model)
    assert len(ours) == 2
    for a, b in zip(ours, nanogpts, strict=True):
        assert [id(p) for p in a['params']] == [id(p) for p in b['params']]
    assert ours[1]['weight_decay'] == 0.0


def test_adamcpr_and_adamh_leave_out_a_modules_embeddings_tied_weights_norms_and_biases():
    model = Tiny()
    assert regularized(AdamCPR(model), model) == {'fc.weight', 'conv.weight'}
    assert regularized(AdamCPR(model, reg_embedding=True), model) == MATRICES
    assert regularized(AdamH(model), model) == {'fc.weight', 'conv.weight'}


@pytest.mark.parametrize('cls', [AdamW, AdamWN])
def test_adamw_and_adamwn_regularize_every_tensor_of_two_or_more_dimensions(cls):
    model = Tiny()
    assert regularized(cls(model), model) == MATRICES


class Embedder(nn.Module):
    """Names that contain 'embed' and 'norm' where no embedding or norm is."""

    def __init__(self):
        super().__init__()
        self.embedder = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm((2, 3)), nn.Linear(6, 4))
        self.patch_embed = nn.Conv2d(3, 8, 4)
        self.normalizer = nn.Linear(4, 4)
        self.words = nn.EmbeddingBag(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.words.weight


def test_adamcpr_knows_embeddings_and_norms_by_their_type_not_by_their_name():
    model = Embedder()
    expected = {'embedder.0.weight', 'embedder.2.weight', 'patch_embed.weight', 'normalizer.weight'}
    assert regularized(AdamCPR(model), model) == expected
    expected.add('words.weight')
    assert regularized(AdamCPR(model, reg_embedding=True), model) == expected


@every_class
def test_a_weight_that_its_module_marks_is_not_regularized(cls):
    model = Tiny()
    all_of_them = regularized(cls(model), model)
    model.fc.weight._no_weight_decay = True
    assert regularized(cls(model), model) == all_of_them - {'fc.weight'} < all_of_them


@every_class
def test_a_module_of_matrices_only_still_makes_two_groups(cls):
    assert [len(g['params']) for g in cls(nn.Linear(3, 3, bias=False)).param_groups] == [1, 0]


def test_a_module_of_norms_only_is_not_regularized():
    model = nn.LayerNorm((3, 4))
    assert regularized(AdamCPR(model), model) == set()


@pytest.mark.parametrize('impl', [TORCH, NUMBA])
@every_class
def test_parameters_frozen_at_construction_train_once_they_are_thawed(cls, impl):
    torch.manual_seed(0)
    model = Tiny()
    model.fc.requires_grad_(False)
    optimizer = cls(model, lr=0.01, impl=impl)
    assert 'fc.weight' in regularized(optimizer, model)
    before = [p.detach().clone() for p in model.fc.parameters()]
    run_model(model, optimizer, range(3))
    assert same_bits(before, model.fc.parameters())
    assert not any(p in optimizer.state for p in model.fc.parameters())
    model.fc.requires_grad_(True)
    run_model(model, optimizer, range(3))
    assert not any(torch.equal(p, q) for p, q in zip(before, model.fc.parameters(), strict=True))
    assert optimizer.state[model.fc.weight]['step'] == 3
    assert optimizer.state[model.conv.weight]['step'] == 6


# ---- tensors and groups


@every_class
def test_tensors_are_regularized_from_two_dimensions_on_unless_a_group_says_otherwise(cls):
    params = parameters([(4, 3), (7,), (2, 2, 2)])

    def flags(**said):
        (group,) = cls([{'params': params, **said}]).param_groups
        return group['regularize']

    assert flags() == [True, False, True] and flags(regularize=None) == [True, False, True]
    assert flags(regularize=True) is True and flags(regularize=False) is False
    assert flags(regularize=[False, True, True]) == [False, True, True]
    assert cls(params).param_groups[0]['regularize'] == [True, False, True]


@pytest.mark.parametrize('said', [True, False, [False, True, True]])
def test_what_a_group_says_of_regularization_is_what_is_regularized(said):
    params = parameters([(4, 3), (7,), (2, 2, 2)])
    options = dict(kappa_init_method='dependent', kappa_init_param=0.9)
    optimizer = stepped(AdamCPR([{'params': params, 'regularize': said}], **options), params)
    expected = said if isinstance(said, list) else [said] * 3
    assert ['lagmul' in optimizer.state[p] for p in params] == expected


@every_class
@pytest.mark.parametrize('no_decay', [0.0, 0])
def test_a_group_without_weight_decay_is_not_regularized_unless_it_says_so(cls, no_decay):
    """transformers and timm make such groups of what is not to be decayed."""
    model = Tiny()
    groups = [
        {'params': [model.fc.weight], 'weight_decay': 0.1},
        {'params': [model.wte.weight, model.ln.weight], 'weight_decay': no_decay},
        {'params': [model.conv.weight], 'weight_decay': no_decay, 'regularize': True},
        {'params': [model.wpe.weight]},
    ]
    assert regularized(cls(groups), model) == {'fc.weight', 'conv.weight', 'wpe.weight'}


def test_groups_have_options_of_their_own():
    params = parameters([(4, 3), (5, 6)])
    grads = gradient_steps(params, 10)
    options = [
        {'lr': 0.1, 'betas': [0.5, 0.9], 'weight_decay': 0.5},
        {'lr': 0.01, 'eps': 1e-3, 'weight_decay': 2.0},
    ]
    alone = copies(params)
    for i, (p, own) in enumerate(zip(alone, options, strict=True)):
        train(AdamW([p], **own), [p], [step[i : i + 1] for step in grads])
    groups = [{'params': [p], **own} for p, own in zip(params, options, strict=True)]
    train(AdamW(groups), params, grads)
    assert same_bits(params, alone)


def test_groups_may_find_kappa_and_measure_R_in_different_ways():
    params = parameters([(4, 3), (5, 6), (3, 3)])
    grads = gradient_steps(params, 12)
    options = [
        {'kappa_init_method': 'dependent', 'kappa_init_param': 1.02, 'reg_function': 'l1'},
        {'kappa_init_method': 'warm_start', 'kappa_init_param': 3, 'reg_function': 'std'},
        {'reg_step_size': 2, 'reg_ema_decay': 0.5},
    ]
    alone = copies(params)
    for i, (p, own) in enumerate(zip(alone, options, strict=True)):
        train(AdamCPR([p], lr=0.03, **own), [p], [step[i : i + 1] for step in grads])
    groups = [{'params': [p], **own} for p, own in zip(params, options, strict=True)]
    optimizer = AdamCPR(groups, lr=0.03)
    train(optimizer, params, grads)
    assert same_bits(params, alone) and all(optimizer.state[p]['kappa_set'] for p in params)


@pytest.mark.parametrize('variant', sorted(VARIANTS.keys() - {'wn-global-before'}))
def test_a_group_added_later_is_trained_as_from_the_start(variant):
    """But for a joint norm, which is of all parameters there are."""
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
    with pytest.raises(ValueError, match='regularize'):
        optimizer.add_param_group({'params': params[1:], 'regularize': [True]})
    assert len(optimizer.param_groups) == 1
    stepped(optimizer, params[:1])


@pytest.mark.parametrize('impl', [TORCH, NUMBA])
@pytest.mark.parametrize('variant', sorted(VARIANTS.keys() - {'wn-global-before'}))
def test_the_order_in_which_tensors_are_listed_changes_no_bit(variant, impl):
    """But for a joint norm, a sum over tensors, which rounds in their order."""
    params = parameters([*[(4, 3), (7,), (17, 9)], (257, 33)])
    grads = gradient_steps(params, 15)
    listed = copies(params)
    train(make(variant, params, impl=impl), params, grads)
    train(make(variant, listed[::-1], impl=impl), listed, grads)
    assert same_bits(params, listed)


@every_variant
def test_parameters_may_be_given_with_their_names(variant):
    params, named = parameters(), parameters()
    grads = gradient_steps(params, 6)
    names = ['first', 'second', 'third']
    optimizer = make(variant, list(zip(names, named, strict=True)))
    assert same_bits(train(make(variant, params), params, grads), train(optimizer, named, grads))
    assert optimizer.state_dict()['param_groups'][0]['param_names'] == names


# ---- tensors that start at zero

CPR_OF_ZEROS = dict(kappa_init_method='dependent', kappa_init_param=2.0)


def with_ratios(model):
    optimizer = AdamWN(model)
    optimizer.set_ratios({model['b'].weight: 1.5})
    return optimizer


@pytest.mark.parametrize(
    'make_it',
    [lambda p: AdamCPR(p, **CPR_OF_ZEROS), lambda p: AdamWN(p, ratio=1.5), with_ratios],
    ids=['dependent', 'ratio', 'ratios'],
)
def test_a_tensor_that_starts_at_zero_is_named_once_since_its_target_is_zero(make_it):
    torch.manual_seed(0)
    model = nn.ModuleDict({'a': nn.Linear(3, 4), 'b': nn.Linear(4, 5)})
    nn.init.zeros_(model['b'].weight)
    nn.init.zeros_(model['a'].bias)  # not regularized
    optimizer = make_it(model)
    with pytest.warns(UserWarning, match=r'b\.weight') as seen:
        stepped(optimizer, list(model.parameters()), 1)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        stepped(optimizer, list(model.parameters()), 3)
        optimizer.add_param_group({'params': parameters([(2, 2)])})
        stepped(optimizer, list(model.parameters()), 1)


@pytest.mark.parametrize(
    'make_it',
    [
        lambda p: AdamW(p),
        lambda p: AdamCPR(p, kappa_init_method='uniform'),
        lambda p: AdamCPR(p),
        lambda p: AdamWN(p, norm=2.0),
        lambda p: AdamWN([*p, nn.Parameter(torch.ones(2, 2))], scope='global'),
    ],
    ids=['adamw', 'uniform', 'inflection_point', 'norm', 'joint norm'],
)
def test_a_tensor_that_starts_at_zero_is_nothing_to_warn_of_elsewhere(make_it):
    params = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(0, 4))]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        stepped(make_it(params), params)


def test_a_frozen_tensor_and_one_without_elements_are_nothing_to_warn_of():
    frozen, empty, trained = (nn.Parameter(torch.zeros(s)) for s in ((3, 4), (0, 4), (2, 2)))
    nn.init.ones_(trained)
    optimizer = AdamWN([('frozen', frozen), ('empty', empty), ('trained', trained)])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        train(optimizer, [frozen, empty, trained], [[None, torch.ones(0, 4), torch.ones(2, 2)]] * 2)
    with pytest.warns(UserWarning, match='frozen'):
        stepped(optimizer, [frozen, empty, trained], 1)


@pytest.mark.parametrize('variant', [v for v in VARIANTS if 'global' not in v])
def test_groups_of_equal_options_that_differ_later_are_updated_each_by_its_own(variant):
    params = parameters()
    alike, apart = copies(params), copies(params)
    halves = [{'params': alike[:2]}, {'params': alike[2:]}]
    together, first, second = (
        make(variant, halves),
        make(variant, apart[:2]),
        make(variant, apart[2:]),
    )
    for optimizer in (together, first, second):
        optimizer.max_grad_norm = None  # else the norm is of all
    for step, grads in enumerate(gradient_steps(params, 12)):
        if step == 5:
            together.param_groups[1]['lr'] = second.param_groups[0]['lr'] = 0.3
        if step == 9:
            together.param_groups[0]['lr'] = first.param_groups[0]['lr'] = 0.3
        train(together, alike, [grads])
        train(first, apart[:2], [grads[:2]])
        train(second, apart[2:], [grads[2:]])
    assert same_bits(alike, apart)
