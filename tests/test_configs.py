"""Test the files in config/: train.py accepts each, and each names its command."""

from pathlib import Path

import pytest
from conftest import ROOT

CONFIGS = sorted(path.name for path in (ROOT / 'config').glob('*.py'))


@pytest.mark.parametrize('name', CONFIGS)
def test_the_config_trains(script, dataset, tmp_path, name, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    text = Path('config', name).read_text()
    assert text.startswith('# ') and f'python train.py config/{name}' in text
    small = [
        '--n_layer=1',
        '--n_head=2',
        '--n_embd=16',
        '--block_size=16',
        '--batch_size=2',
        '--max_iters=1',
        '--gradient_accumulation_steps=1',
        '--eval_iters=1',
        '--compile=False',
        '--device=cpu',
    ]
    if "init_from = 'gpt2" in text:
        small += ['--init_from=scratch']
    outcome = script(
        'train.py',
        f'config/{name}',
        *small,
        f'--dataset={dataset}',
        f'--out_dir={tmp_path / "out"}',
    )
    assert outcome.status == 0, outcome.err
    assert 'val loss' in outcome.out


@pytest.mark.parametrize('name', [n for n in CONFIGS if n.startswith('train_gpt2')])
def test_gpt2_configs_take_the_papers_number_of_tokens(name):
    settings = {}
    exec(Path('config', name).read_text(), {}, settings)
    sequences = settings['batch_size'] * settings['gradient_accumulation_steps']
    assert sequences * settings['block_size'] == 491520
    if 'cpr' in name:  # Figure 3 of the CPR paper
        assert settings['warmup_iters'] == 5000
    if name == 'train_gpt2_cpr_ws.py':
        assert settings['kappa_init_param'] == 2 * settings['warmup_iters']
