"""docs/papers.md: its commands run, in miniature, and cost and log what the page says."""

import re
import subprocess

import pytest
from conftest import ROOT, TINY

import compare
import plot
from runtime import log as runlog

PAGE = (ROOT / 'docs' / 'papers.md').read_text()
BLOCKS = re.findall(r'^```sh\n(.*?)^```\n(?:\nCost: ([^\n]*)\.\n)?', PAGE, re.DOTALL | re.MULTILINE)
SPEED = {'124M': 400_000, '354M': 140_000}  # tokens a second
SMALL = [
    *(word for word in TINY if not word.startswith('--eval_iters')),
    '--n_layer=5',  # Figure 5 shows the fifth layer
    '--n_embd=8',
    '--batch_size=32',
    '--block_size=32',  # an evaluation takes all of val.bin
    '--max_iters=3',
    '--lr_decay_iters=3',
    '--wn_rate=1.0',  # every norm is at its target after the ramp
    '--wn_ramp_iters=2',
    '--kappa_init_param=2',
]


def expanded(block):
    """Return the commands in a block, each as the words that bash makes of it."""
    lines = block.replace('\\\n', ' ').splitlines()
    command = 'printf "%s\\0" '
    outs = [subprocess.check_output(['bash', '-c', command + line], text=True) for line in lines]
    return [out.split('\0')[:-1] for out in outs]


@pytest.fixture
def planned(monkeypatch):
    """Return planned(words), the settings of all runs of a compare.py command."""

    def settings_of(words):
        configs, check = [], compare.check_settings

        def stop(runs):
            check(runs)
            configs.extend(run.settings for run in runs)
            raise InterruptedError

        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(compare, 'check_settings', stop)
            compare.main(words)
        return configs

    return settings_of


@pytest.mark.parametrize('block, cost', [b for b in BLOCKS if 'compare.py' in b[0]])
def test_a_command_costs_what_the_page_says(planned, block, cost):
    runs = [run for words in expanded(block) for run in planned(words[2:])]
    tokens, seconds = 0, 0.0
    for s in runs:
        sequences = s['batch_size'] * s['gradient_accumulation_steps']
        tokens += s['max_iters'] * sequences * s['block_size']
        size = {12: '124M', 24: '354M'}[s['n_layer']]
        seconds += s['max_iters'] * sequences * s['block_size'] / SPEED[size]
        assert s['lr_decay_iters'] == s['max_iters'] and s['min_lr'] == s['learning_rate'] / 10
    rounded = re.sub(r'e\+0?', 'e', f'{tokens:.2e}')
    hours = seconds / 3600
    hours = f'{hours:.1f}' if hours < 10 else f'{hours:,.0f}'
    assert cost == f'{len(runs)} runs, {rounded} tokens, {hours} GPU hours'


def test_the_page_states_the_speed_that_its_hours_come_from():
    for size, speed in SPEED.items():
        assert f'{speed:,}' in PAGE and f'({size})' in PAGE


def test_the_commands_run(script, dataset, tmp_path, monkeypatch):
    """In one test, because Figure 5 draws runs of Figure 1."""
    check, made = compare.check_settings, []

    def shrink(runs):
        check(runs)
        wanted = [run.settings for run in runs]
        for run in runs:
            run.arguments += [*SMALL, f'--dataset={dataset}']
        check(runs)
        made.extend(zip(runs, wanted, strict=True))

    def make(runs, jobs, after):
        for run in runs:
            outcome = script('train.py', *run.arguments)
            assert outcome.status == 0, outcome.err
            after(run)

    (tmp_path / 'config').symlink_to(ROOT / 'config')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, 'check_settings', shrink)
    monkeypatch.setattr(compare, 'make', make)
    monkeypatch.setattr(compare.report, 'draw', lambda configs, out: {})
    for words in (words for block, _ in BLOCKS for words in expanded(block)):
        if words[1] == 'compare.py':
            compare.main([*words[2:], '--seeds=1'])
        else:
            plot.main(words[2:])
    assert (tmp_path / 'results' / 'cpr_figure5' / 'tensor.png').is_file()

    assert {wanted['optimizer'] for _, wanted in made} == {'adamw', 'adamwn', 'adamcpr'}
    for run, wanted in made:
        last = [e for e in runlog.read(run.out_dir) if e['kind'] == 'norms'][-1]['tensors']
        assert any('.ln_' in name for name in last) == wanted['wn_vectors']
        if wanted['optimizer'] == 'adamwn':
            ratios = [t['ratio'] for t in last.values()]
            assert ratios == pytest.approx([wanted['wn_ratio']] * len(ratios), rel=1e-5)
        if wanted['optimizer'] == 'adamcpr':
            bounded = [t for name, t in last.items() if '.h.' in name]
            assert all('lagmul' in t for t in bounded)
            if wanted['kappa_init_method'] == 'warm_start':
                assert all(t['kappa'] > 0 for t in bounded)
