"""What the optimizers accept as arguments, and what they say of the rest."""

import math
from collections import UserList

import pytest
import torch
from helpers.optimizers import (
    KINDS,
    copies,
    every_class,
    gradient_steps,
    make,
    parameters,
    same_bits,
    train,
)
from torch import nn

from cpr import AdamCPR, AdamW, AdamWN

EVERYWHERE = [
    {'lr': -1.0},
    {'lr': math.nan},
    {'lr': torch.ones(2)},
    {'betas': (1.0, 0.9)},
    {'betas': (0.9, 1.0)},
    {'betas': (-0.1, 0.9)},
    {'betas': (0.9, 0.9, 0.9)},
    {'eps': -1e-8},
    {'max_grad_norm': -1.0},
    {'max_grad_norm': math.nan},
    {'impl': 'magic'},
]
OF_ADAMCPR = [
    {'kappa_init_method': 'bad'},
    {'reg_function': 'l3'},
    {'order': 'during'},
    {'kappa_update': -1.0},
    {'kappa_update': math.inf},
    {'reg_step_size': 0},
    {'reg_step_size': 2.5},
    {'reg_step_size': math.inf},
    {'reg_ema_decay': 1.0},
    {'reg_ema_decay': -0.1},
    *(
        {'kappa_init_method': method, 'kappa_init_param': x}
        for method in ('uniform', 'dependent', 'warm_start')
        for x in (0, -1.0, math.nan)
    ),
    {'kappa_init_method': 'warm_start', 'kappa_init_param': 2.5},
    {'kappa_init_method': 'warm_start', 'kappa_init_param': math.inf},
]
OF_ADAMWN = [
    {'rate': -0.1},
    {'rate': 1.1},
    {'ratio': -1.0},
    {'ratio': math.nan},
    {'norm': -1.0},
    {'scope': 'all'},
    {'order': 'during'},
]
WRONG = [
    *((cls, wrong) for cls in KINDS.values() for wrong in EVERYWHERE),
    (AdamW, {'weight_decay': -0.1}),
    *((AdamCPR, wrong) for wrong in OF_ADAMCPR),
    *((AdamWN, wrong) for wrong in OF_ADAMWN),
]


@pytest.mark.parametrize(
    'cls, wrong', WRONG, ids=lambda x: x.__name__ if isinstance(x, type) else str(x)
)
def test_an_argument_out_of_range_is_a_value_error_that_names_it(cls, wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        cls(parameters(), **wrong)


GROUPS_OWN = [
    *((AdamCPR, wrong) for wrong in OF_ADAMCPR if 'order' not in wrong),
    *((AdamWN, wrong) for wrong in OF_ADAMWN if not wrong.keys() & {'order', 'scope'}),
    *((AdamWN, {'ramp': ramp}) for ramp in (-0.1, 1.1, math.nan)),
    *((cls, wrong) for cls in KINDS.values() for wrong in EVERYWHERE[:8]),
]


@pytest.mark.parametrize(
    'cls, wrong', GROUPS_OWN, ids=lambda x: x.__name__ if isinstance(x, type) else str(x)
)
def test_a_groups_own_option_out_of_range_is_a_value_error_that_names_it(cls, wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        cls([{'params': parameters(), **wrong}])


@every_class
def test_groups_that_make_no_sense_are_value_errors(cls):
    params = parameters()
    for groups in (
        [],
        [{'params': params, 'regularize': [True]}],
        [{'params': params}, {'params': params[:1]}],
    ):
        with pytest.raises(ValueError):
            cls(groups)


# ---- arguments of other optimizers

NEUTRAL = {
    'amsgrad': False,
    'maximize': False,
    'foreach': None,
    'fused': None,
    'capturable': False,
    'differentiable': False,
}


@every_class
def test_arguments_of_torchs_optimizers_are_accepted_where_they_ask_for_nothing(cls):
    params, others = parameters(), parameters()
    grads = gradient_steps(params, 5)
    neutral = NEUTRAL if cls is AdamW else {**NEUTRAL, 'weight_decay': 0.0}
    train(cls(params), params, grads)
    train(cls(others, **neutral), others, grads)
    assert same_bits(params, others)
    cls(others, foreach=False, fused=False)


@every_class
@pytest.mark.parametrize('name', NEUTRAL)
def test_arguments_of_torchs_optimizers_that_ask_for_something_are_refused_by_name(cls, name):
    with pytest.raises(ValueError, match=f'{cls.__name__} .*{name}=True'):
        cls(parameters(), **{name: True})


@pytest.mark.parametrize('cls', [AdamCPR, AdamWN])
def test_weight_decay_is_refused_where_something_else_regularizes(cls):
    with pytest.raises(ValueError, match=f'{cls.__name__} .*weight_decay=0.1'):
        cls(parameters(), weight_decay=0.1)


@every_class
@pytest.mark.parametrize(
    'unknown', ['stochastic_rounding', 'moments_dtype', 'process_group', 'momentum']
)
def test_an_unknown_argument_is_a_type_error_that_names_it_and_the_class(cls, unknown):
    with pytest.raises(TypeError, match=f"{cls.__name__}.*'{unknown}'"):
        cls(parameters(), **{unknown: None})


@pytest.mark.parametrize('betas', [[0.8, 0.95], UserList([0.8, 0.95])], ids=['list', 'sequence'])
@every_class
def test_betas_may_be_any_sequence(cls, betas):
    params, others = parameters(), parameters()
    grads = gradient_steps(params, 5)
    train(cls(params, betas=(0.8, 0.95)), params, grads)
    train(cls(others, betas=betas), others, grads)
    assert same_bits(params, others)


def test_flags_of_regularization_may_be_any_sequence():
    params = parameters()
    optimizer = AdamWN([{'params': params, 'regularize': UserList([False, True, True])}])
    assert optimizer.param_groups[0]['regularize'] == [False, True, True]


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    results = []
    for default in (torch.float32, dtype):
        params = parameters()
        grads = gradient_steps(params, 5)
        try:
            torch.set_default_dtype(default)
            for variant in ('adamw', 'cpr-uniform', 'cpr-dependent-after', 'cpr-inflection', 'wn'):
                train(make(variant, params, max_grad_norm=1e-2), params, grads)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(copies(params))
    assert same_bits(*results)


def test_repr_names_the_class_and_its_options():
    text = repr(make('cpr-warm-start', parameters()))
    assert text.startswith('AdamCPR') and 'warm_start' in text and 'lr: 0.03' in text


# ---- parameters and gradients of other kinds


@every_class
@pytest.mark.parametrize(
    'wrong',
    [
        torch.zeros(2, 2, dtype=torch.complex64),
        torch.zeros(2, 2, dtype=torch.float64),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, 2).to_sparse_csr(),
    ],
    ids=['complex', 'float64', 'sparse', 'sparse rows'],
)
def test_a_parameter_that_is_not_supported_is_refused_by_its_name(cls, wrong):
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(wrong)
    with pytest.raises(ValueError, match='parameter 1 '):
        cls([good, bad])
    with pytest.raises(ValueError, match='head'):
        cls([('body', good), ('head', bad)])
    module = nn.Module()
    module.layer = nn.ParameterDict({'body': good, 'head': bad})
    with pytest.raises(ValueError, match=r'layer\.head'):
        cls(module)
    optimizer = cls([good])
    with pytest.raises(ValueError, match='parameter 1 '):
        optimizer.add_param_group({'params': [bad]})
    assert len(optimizer.param_groups) == 1


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 3, sparse=True)


@every_class
def test_a_sparse_gradient_is_refused_by_its_parameters_name(cls):
    model = Table()
    model.emb(torch.tensor([1, 2])).sum().backward()
    before = model.emb.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r'emb\.weight.*sparse'):
        cls(model).step()
    assert torch.equal(before, model.emb.weight)
