import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.tokenizers import GPT2Tokenizer
from model import GPT, GPTConfig
from runtime import checkpoint

SAMPLE = Path(__file__).parents[1] / 'sample.py'
ITOS = list('\n abcdefgh')
SEPARATOR = '\n---------------\n'


def sample(capsys, monkeypatch, *arguments):
    """Run sample.py in this process: (exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, 'argv', [str(SAMPLE), '--device=cpu', *arguments])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGPIPE)}
    try:
        runpy.run_path(str(SAMPLE), run_name='__main__')
        status = 0
    except SystemExit as e:
        status = e.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, *capsys.readouterr()


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: sample(capsys, monkeypatch, *arguments)


@pytest.fixture
def fails(run):
    def fails(*arguments):
        """Return the single line on standard error after a mistake."""
        status, out, err = run(*arguments)
        assert status == 2 and out == '' and err.startswith('error: ') and err.count('\n') == 1
        return err

    return fails


def save(path, dataset, **model_args):
    """Write a checkpoint of a tiny model, as train.py does, and return the model."""
    sizes = dict(block_size=8, vocab_size=len(ITOS), n_layer=1, n_head=2, n_embd=8)
    model_args = {**sizes, 'bias': False, **model_args}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**model_args))
    model.lm_head.weight.data *= 20  # so that some tokens are likelier than others
    checkpoint.save(
        path,
        {
            'model': model.state_dict(),
            'optimizer': {},
            'model_args': model_args,
            'iter_num': 0,
            'best_val_loss': 1e9,
            'config': {'dataset': str(dataset)},
        },
    )
    return model.eval()


@pytest.fixture
def out_dir(tmp_path):
    """Return the out_dir of a character-level run whose data set lies in tmp_path/letters."""
    letters = tmp_path / 'letters'
    letters.mkdir()
    meta = {
        'tokenizer': 'char',
        'vocab_size': len(ITOS),
        'dtype': 'uint16',
        'itos': ITOS,
        'train_tokens': 1,
        'val_tokens': 1,
        'source': {},
    }
    (letters / 'meta.json').write_text(json.dumps(meta))
    save(tmp_path / 'ckpt.pt', letters)
    return tmp_path


@pytest.fixture
def bytes_for_gpt2(monkeypatch):
    """Replace GPT-2's encoding, which needs a download, by bytes, which often split characters."""
    encoding = SimpleNamespace(
        encode=lambda text, allowed_special: list(text.encode()),
        decode=lambda ids: bytes(i % 256 for i in ids).decode('utf-8', errors='replace'),
    )
    monkeypatch.setattr(
        GPT2Tokenizer, '__init__', lambda self, bpe_file: setattr(self, 'encoding', encoding)
    )
    return encoding


def test_samples_start_with_the_prompt_and_have_the_length_asked_for(run, out_dir):
    status, out, err = run(
        f'--out_dir={out_dir}', '--start=abba', '--num_samples=3', '--max_new_tokens=20'
    )
    assert (status, err) == (0, '')
    samples = out.split(SEPARATOR)
    assert [len(s) for s in samples] == [24, 24, 24, 0]
    assert all(s.startswith('abba') and set(s) <= set(ITOS) for s in samples[:3])
    assert len(set(samples[:3])) == 3


def test_the_same_seed_draws_the_same_text(run, out_dir):
    arguments = f'--out_dir={out_dir}', '--num_samples=2', '--max_new_tokens=30'
    first, again, other = (run(*arguments, f'--seed={seed}')[1] for seed in (1, 1, 2))
    assert first == again != other


def test_a_checkpoint_by_its_path_is_the_one_in_its_out_dir(run, out_dir):
    arguments = '--num_samples=1', '--max_new_tokens=30'
    by_path = run(*arguments, f'--init_from={out_dir}/ckpt.pt')
    assert by_path == run(*arguments, f'--out_dir={out_dir}') and by_path[0] == 0


def test_without_ckpt_pt_it_takes_the_newest_checkpoint_of_the_run(run, out_dir):
    arguments = f'--out_dir={out_dir}', '--num_samples=1', '--max_new_tokens=30'
    before = run(*arguments)
    (out_dir / 'ckpt.pt').rename(out_dir / 'ckpt.1.pt')
    assert run(*arguments) == before and before[0] == 0


def test_prompt_from_a_file(run, out_dir):
    (out_dir / 'prompt.txt').write_text('head\nbead')
    status, out, _ = run(
        f'--out_dir={out_dir}',
        f'--start=FILE:{out_dir}/prompt.txt',
        '--num_samples=1',
        '--max_new_tokens=1',
    )
    assert status == 0 and out.startswith('head\nbead') and len(out.removesuffix(SEPARATOR)) == 10


def test_temperature_zero_gives_the_models_likeliest_text(run, out_dir):
    model = save(out_dir / 'ckpt.pt', out_dir / 'letters')
    ids = model.generate(torch.tensor([[ITOS.index('a')]]), 30, temperature=0)[0]
    _, out, _ = run(
        f'--out_dir={out_dir}',
        '--start=a',
        '--temperature=0',
        '--num_samples=1',
        '--max_new_tokens=30',
    )
    assert out == ''.join(ITOS[i] for i in ids) + SEPARATOR


def test_characters_cut_by_tokens_come_out_whole(run, bytes_for_gpt2, tmp_path):
    """Random bytes hold complete, split and impossible characters.

    The pieces must join to the text of all bytes decoded at once.
    """
    model = save(tmp_path / 'ckpt.pt', tmp_path, vocab_size=50304)
    torch.manual_seed(5)
    model = GPT(model.config)  # draws the random numbers that sample.py draws for its model
    model.load_state_dict(checkpoint.load(tmp_path / 'ckpt.pt')['model'])
    ids = list('é'.encode())
    out = model.generate(torch.tensor([ids]), 200, top_k=200)[0].tolist()
    status, text, err = run(
        f'--out_dir={tmp_path}',
        '--start=é',
        '--num_samples=1',
        '--max_new_tokens=200',
        '--temperature=1',
        '--seed=5',
    )
    assert status == 0
    assert text == bytes_for_gpt2.decode([i for i in out if i < 50257]) + SEPARATOR
    assert '\ufffd' in text
    assert err == f"note: {tmp_path} has no meta.json, its tokens are taken for GPT-2's\n"


def test_pieces_are_held_back_only_while_a_character_is_not_whole(capsys, monkeypatch, out_dir):
    arguments = ['--device=cpu', f'--out_dir={out_dir}', '--max_new_tokens=1']
    monkeypatch.setattr(sys, 'argv', [str(SAMPLE), *arguments])
    whole_characters = runpy.run_path(str(SAMPLE))['whole_characters']

    def decode(ids):
        return bytes(ids).decode('utf-8', errors='replace')

    pieces = list(whole_characters('aé😀b'.encode(), decode))
    assert pieces == ['a', '', 'é', '', '', '', '😀', 'b', '']
    assert list(whole_characters(b'\xf0\x9fa\xff', decode)) == ['', '', '\ufffda', '', '\ufffd']


def test_text_is_written_as_it_is_made(out_dir):
    command = [sys.executable, str(SAMPLE), '--device=cpu', f'--out_dir={out_dir}']
    command.append('--max_new_tokens=1000000')
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert len(process.stdout.read(50)) == 50  # of a sample that takes many minutes
        process.kill()


def test_a_mistake_ends_with_one_line_and_status_2(tmp_path):
    command = [sys.executable, str(SAMPLE), '--device=cpu', '--out_dir=nowhere']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('error: there is no checkpoint at nowhere/ckpt.pt')
    assert done.stderr.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_the_lowest_temperature_takes_the_likeliest_token(run, out_dir):
    arguments = f'--out_dir={out_dir}', '--start=a', '--num_samples=1', '--max_new_tokens=30'
    likeliest = run(*arguments, '--temperature=0')
    assert run(*arguments, '--temperature=1e-40') == run(*arguments, '--temperature=5e-324')
    assert run(*arguments, '--temperature=1e-40') == likeliest and likeliest[0] == 0


@pytest.mark.parametrize(
    'change',
    [
        {'vocab_size': '10'},
        {'vocab_size': 10.0},
        {'dtype': ['uint16']},
        {'tokenizer': 7},
        {'itos': 10},
        {'itos': [1] * 10},
        {'itos': ['ab'] * 10},
        {'train_tokens': None},
    ],
)
def test_a_meta_json_whose_fields_are_of_other_types_is_named(fails, out_dir, change):
    path = out_dir / 'letters' / 'meta.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert f'{path} does not describe a data set' in fails(f'--out_dir={out_dir}')


def test_a_dataset_in_a_checkpoint_that_is_no_name_is_gpt2s(fails, out_dir):
    saved = checkpoint.load(out_dir / 'ckpt.pt')
    checkpoint.save(out_dir / 'ckpt.pt', {**saved, 'config': {'dataset': 7}})
    assert 'the model has 10 tokens and its tokenizer 50257' in fails(f'--out_dir={out_dir}')


@pytest.mark.parametrize('name', ['x' * 5000, 'a\0b', 'a\udcffb'])
def test_a_path_that_cannot_be_is_one_line(fails, out_dir, name):
    fails(f'--out_dir={name}')
    fails(f'--out_dir={out_dir}', f'--start=FILE:{name}')
    fails(f'--init_from={name}/ckpt.pt')


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--start=axe', "'x'"),
        ('--start=', 'start is empty'),
        ('--start=FILE:no/such.txt', 'no/such.txt'),
        ('--start=FILE:{out_dir}/empty.txt', 'empty.txt is empty'),
        ('--temperature=-0.5', 'temperature=-0.5'),
        ('--top_k=0', 'top_k=0'),
        ('--num_samples=0', 'num_samples=0'),
        ('--max_new_tokens=0', 'max_new_tokens=0'),
        ('--top_p=0.9', 'top_p'),
        ('--init_from=no/such/ckpt.pt', 'no checkpoint at no/such/ckpt.pt'),
        ('--init_from=./no/such/folder', 'neither a local folder nor a model that the hub gives'),
        ('--init_from={out_dir}', 'no config.json'),
        ('--init_from={out_dir}/empty.txt', 'empty.txt is not a readable checkpoint'),
    ],
)
def test_mistakes_are_named(fails, out_dir, argument, message):
    (out_dir / 'empty.txt').touch()
    assert message in fails(f'--out_dir={out_dir}', argument.format(out_dir=out_dir))


def test_a_model_of_another_shape_or_another_vocabulary_is_refused(fails, out_dir):
    path = out_dir / 'ckpt.pt'
    save(path, out_dir / 'letters', vocab_size=11)
    assert 'the model has 11 tokens and its tokenizer 10; prepare' in fails(f'--out_dir={out_dir}')
    save(path, out_dir / 'unprepared')
    error = fails(f'--out_dir={out_dir}')
    assert 'the model has 10 tokens and its tokenizer 50257; prepare' in error
    saved = checkpoint.load(path)
    for change in ({'n_layer': 2}, {'rotary': True}):
        checkpoint.save(path, {**saved, 'model_args': {**saved['model_args'], **change}})
        assert 'does not hold a model of this program' in fails(f'--out_dir={out_dir}')


def test_folder_of_transformers_is_sampled_with_gpt2s_tokens(run, bytes_for_gpt2, tmp_path):
    sizes = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=50257)
    state = GPT(GPTConfig(block_size=16, **sizes)).state_dict()
    conv1d = 'c_attn.weight', 'c_fc.weight', 'c_proj.weight'
    weights = {k: v.t() if k.endswith(conv1d) else v for k, v in state.items()}
    torch.save(weights, tmp_path / 'pytorch_model.bin')
    config = {'model_type': 'gpt2', 'n_positions': 16, **sizes}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    status, out, err = run(
        f'--init_from={tmp_path}', '--start=Hi', '--num_samples=2', '--max_new_tokens=5'
    )
    assert (status, err) == (0, '') and out.startswith('Hi') and out.count(SEPARATOR) == 2
