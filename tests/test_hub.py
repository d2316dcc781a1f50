"""Test data sets and models by their names on the hub. The real clients talk to a local hub."""

import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, TINY
from helpers.hub import Hub

TEXTS = [f'Document {i} has{" many" * (i % 9)} words.' for i in range(90)]


@pytest.fixture
def run(tmp_path):
    """Return run('train.py', '--key=value', ...), which returns (CompletedProcess, Hub).

    It starts a process that reaches only the hub in tmp_path/hub.
    """

    def run(script, *arguments):
        with Hub(tmp_path / 'hub') as hub:
            env = {
                **os.environ,
                'HF_ENDPOINT': hub.endpoint,
                'HF_HOME': str(tmp_path / 'home'),
                'HF_HUB_OFFLINE': '0',
                'HF_UPDATE_DOWNLOAD_COUNTS': '0',
                'NO_PROXY': '127.0.0.1',
            }
            wrapper = [sys.executable, str(ROOT / 'tests/helpers/hub.py')]
            command = [*wrapper, str(ROOT / script), *map(str, arguments)]
            options = {'capture_output': True, 'text': True, 'timeout': 120}
            return subprocess.run(command, cwd=tmp_path, env=env, **options), hub

    return run


@pytest.fixture
def corpora(tmp_path):
    """Return the folder of two data sets on the hub: one in two files, one in two configs."""
    folder = tmp_path / 'hub' / 'datasets'
    for path, texts in (
        ('Skylion007/openwebtext/plain_text/train-00000-of-00002', TEXTS[:40]),
        ('Skylion007/openwebtext/plain_text/train-00001-of-00002', TEXTS[40:]),
        ('other/texts/small/part', TEXTS[::2]),
        ('other/texts/large/part', TEXTS),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({'body' if 'other' in path else 'text': texts})
        pyarrow.parquet.write_table(table, folder / f'{path}.parquet')
    configs = {'Skylion007/openwebtext': ['plain_text'], 'other/texts': ['small', 'large']}
    for name, of_this_set in configs.items():
        card = '---\nconfigs:\n'
        for config in of_this_set:
            files = f'[{{split: train, path: {config}/*.parquet}}]'
            card += f'- config_name: {config}\n  data_files: {files}\n'
        (folder / name / 'README.md').write_text(card + '---\n')
    return folder


@pytest.fixture
def prepare(run, bpe_file):
    return lambda *arguments: run('data/openwebtext/prepare.py', '--bpe_file', bpe_file, *arguments)


@pytest.mark.parametrize(
    'arguments, files, column',
    [
        ([], 'Skylion007/openwebtext/plain_text', 'text'),
        (
            ['--dataset=other/texts', '--config=small', '--text_column=body'],
            'other/texts/small',
            'body',
        ),
    ],
)
def test_a_data_set_by_its_name_is_what_its_files_are(
    prepare, corpora, tmp_path, arguments, files, column
):
    outcome, hub = prepare(*arguments, '--out_dir=by_name')
    assert (outcome.returncode, outcome.stderr) == (0, '')
    assert sorted(path for path in hub.served if path.endswith('.parquet')) == [
        f'datasets/{files}/{path.name}' for path in sorted((corpora / files).iterdir())
    ]
    local = '--data_files', corpora / files / '*', f'--text_column={column}'
    outcome, hub = prepare(*local, '--out_dir=local')
    assert (outcome.returncode, hub.served) == (0, [])
    for name in ('train.bin', 'val.bin'):
        by_name, local = tmp_path / 'by_name' / name, tmp_path / 'local' / name
        assert by_name.read_bytes() == local.read_bytes()


def test_what_the_hub_does_not_have_is_said_in_a_line(prepare, run, corpora, dataset, tmp_path):
    for arguments, said in (
        (['--dataset=nobody/nothing'], 'nobody/nothing cannot be loaded from the hub'),
        (['--dataset=other/texts'], "available configs: ['small', 'large']"),
        (['--dataset=other/texts', '--config=medium'], "'medium' not found"),
        (['--text_column=body'], "the column 'body' of Skylion007/openwebtext is not there"),
    ):
        outcome, _ = prepare(*arguments, '--out_dir=out')
        assert outcome.returncode == 2 and said in outcome.stderr
        assert outcome.stderr.startswith('error: ') and outcome.stderr.count('\n') == 1
        assert not list((tmp_path / 'out').glob('*'))
    outcome, _ = run('train.py', *TINY, f'--dataset={dataset}', '--init_from=gpt2')
    assert outcome.returncode == 2
    assert outcome.stderr.startswith('error: ') and 'check the name' in outcome.stderr


def test_a_model_by_its_name_is_what_its_files_are(run, tmp_path, dataset):
    transformers = pytest.importorskip('transformers')
    vocab_size = len(json.loads((dataset / 'meta.json').read_text())['itos'])
    shape = dict(vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=16, n_positions=16)
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    reference.save_pretrained(tmp_path / 'hub' / 'gpt2')
    losses = []
    for source in ('gpt2', tmp_path / 'hub' / 'gpt2'):
        settings = f'--dataset={dataset}', f'--init_from={source}', '--eval_only=True'
        outcome, hub = run('train.py', *TINY, *settings)
        assert outcome.returncode == 0, outcome.stderr
        assert ('gpt2/model.safetensors' in hub.served) == (source == 'gpt2')
        losses.append([line for line in outcome.stdout.splitlines() if 'val loss' in line])
    assert losses[0] and losses[0] == losses[1]
