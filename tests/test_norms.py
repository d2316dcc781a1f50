"""Norms of weights and steps, as a run logs them."""

import math

import pytest
import torch
from torch import nn

from cpr import AdamW
from runtime.norms import norm_entry, norms_of, step_fields


def test_norms_are_those_of_the_tensors():
    assert norms_of({'a': torch.tensor([[3.0, 4.0]]), 'b': torch.zeros(2, 2)}) == {'a': 5, 'b': 0}
    assert norms_of({}) == {}


def test_a_step_has_its_length_over_the_norm_and_the_angle_by_which_it_turns():
    p = nn.Parameter(torch.tensor([[3.0, 0.0]]))
    before = {'p': p.detach().clone()}
    with torch.no_grad():
        p.copy_(torch.tensor([[0.0, 6.0]]))
    entry = norm_entry(AdamW([p]), {'p': p}, {'p': 1.5}, before)
    assert entry['tensors']['p'] == {
        'norm': 3,
        'ratio': 2,
        'step': pytest.approx(math.sqrt(5), rel=1e-6),
        'angle': pytest.approx(90),
    }
    assert entry['ratio'] == 2 and entry['angle'] == pytest.approx(90)
    assert norm_entry(AdamW([p]), {'p': p}, {'p': 1.5}) == {
        'ratio': 4,
        'tensors': {'p': {'norm': 6, 'ratio': 4}},
    }


@pytest.mark.parametrize('angle', [0.0, 1e-4, 1.0, 90.0, 179.0])
def test_small_angles_keep_their_digits(angle):
    radians = math.radians(angle)
    step = math.hypot(1 - math.cos(radians), math.sin(radians))
    assert step_fields(1.0, 1.0, step)['angle'] == pytest.approx(angle, rel=1e-9)


def test_a_tensor_that_is_zero_has_no_ratio_and_no_step():
    p = nn.Parameter(torch.zeros(2, 2))
    q = nn.Parameter(torch.ones(1, 1))
    before = {'p': torch.zeros(2, 2), 'q': torch.ones(1, 1)}
    tensors = norm_entry(AdamW([p, q]), {'p': p, 'q': q}, {'p': 0.0, 'q': 1.0}, before)['tensors']
    assert math.isnan(tensors['p']['ratio']) and 'step' not in tensors['p']
