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
TOKENS_PER_S = re.search(r'([\d,]+) tokens a second for GPT-2 .*? ([\d,]+) for', PAGE, re.DOTALL)
SPEED = dict(zip((12, 24), (int(x.replace(',', '')) for x in TOKENS_PER_S.groups()), strict=True))
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


def planned(words):
    """Return the settings of all runs of a compare.py command."""
    args, common = compare.parse(words)
    configs = [compare.config_of(text, common) for text in args.configs]
    compare.add_runs(configs, compare.seeds_of(args.seeds), args.out, [])
    runs = [run for config in configs for run in config.runs]
    compare.check_settings(runs)
    return [run.settings for run in runs]


@pytest.mark.parametrize('block, cost', [b for b in BLOCKS if 'compare.py' in b[0]])
def test_a_command_costs_what_the_page_says(block, cost):
    runs = [run for words in expanded(block) for run in planned(words[2:])]
    tokens, seconds = 0, 0.0
    for s in runs:
        of_run = s['max_iters'] * s['batch_size'] * s['gradient_accumulation_steps']
        of_run *= s['block_size']
        tokens += of_run
        seconds += of_run / SPEED[s['n_layer']]
        assert s['lr_decay_iters'] == s['max_iters'] and s['min_lr'] == s['learning_rate'] / 10
    rounded = re.sub(r'e\+0?', 'e', f'{tokens:.2e}')
    hours = seconds / 3600
    hours = f'{hours:.1f}' if hours < 10 else f'{hours:,.0f}'
    assert cost == f'{len(runs)} runs, {rounded} tokens, {hours} GPU hours'


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
            assert bounded and all('lagmul' in t for t in bounded)
            if wanted['kappa_init_method'] == 'warm_start':
                assert all(t['kappa'] > 0 for t in bounded)
