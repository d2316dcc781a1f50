"""runtime/log.py: how much time a run says it has left."""

import time

import pytest
from conftest import TINY

from runtime.log import Clock


@pytest.fixture
def passes(monkeypatch):
    """Return passes(seconds), which lets so much time go by."""
    now = [100.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def test_the_time_left_is_that_of_the_iterations_and_the_evaluations_to_come(passes):
    clock = Clock(0, max_iters=20, eval_interval=8)  # evaluations at 0, 8, 16 and 20
    with clock.evaluation(0):
        passes(100)
    passes(30)
    assert clock.lap(3) == 10
    assert clock.left() == '7.8 min left'  # 17 * 10 + 3 * 100
    passes(50)
    clock.lap(8)
    with clock.evaluation(8):
        passes(10)
    passes(90)
    clock.lap(17)
    assert clock.left() == '40 s left'  # 3 * 10 + 1 * 10
    passes(30)
    clock.lap(20)
    assert clock.left() == '10 s left'


def test_one_slow_iteration_such_as_the_first_does_not_count(passes):
    clock = Clock(0, max_iters=1003, eval_interval=2000)
    for i, seconds in enumerate((500, 9, 9), 1):
        passes(seconds)
        clock.lap(i)
    assert clock.left() == '2.5 h left'
    clock.max_iters = 50_003
    assert clock.left() == '5.2 d left'


def test_every_line_of_training_ends_with_the_time_left(script, dataset, tmp_path):
    outcome = script('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}')
    lines = [line for line in outcome.out.splitlines() if line.startswith('iter ')]
    assert len(lines) == 8 and all(line.endswith(' left') for line in lines)
