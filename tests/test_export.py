"""export.py: what transformers opens is the model that was trained, and comes back as it went."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

from data.tokenizers import CharTokenizer, GPT2Tokenizer, tokenizer
from data.writer import write_dataset
from model import GPT, GPTConfig
from runtime import checkpoint

transformers = pytest.importorskip('transformers')
TEXT = "It's a test,  with\n\n spaces; é 数 and 2,000 numbers.\n"


@pytest.fixture
def gpt2_set(tmp_path, bpe_file):
    documents = {'train': [TEXT * 20], 'val': [TEXT]}
    write_dataset(tmp_path / 'corpus', documents, GPT2Tokenizer(bpe_file), {}, end_of_text=True)
    return tmp_path / 'corpus'


def save(out_dir, dataset, **model_args):
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=50304, n_layer=2, n_head=2, n_embd=16)
    model_args = {**sizes, 'bias': False, **model_args}
    model = GPT(GPTConfig(**model_args))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)  # biases and norms included
    out_dir.mkdir()
    checkpoint.save(
        out_dir / 'ckpt.pt',
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


def logits(model, x):
    with torch.no_grad():
        return model(x, x)[0]  # with targets, for all positions


@pytest.mark.parametrize(
    'model_args', [{}, {'bias': True}, {'bias': True, 'gelu_approximate': 'tanh', 'dropout': 0.1}]
)
def test_transformers_computes_the_same_logits_and_the_way_back_too(
    script, tmp_path, gpt2_set, model_args
):
    model = save(tmp_path / 'out', gpt2_set, **model_args)
    outcome = script('export.py', tmp_path / 'out', tmp_path / 'hf')
    assert outcome.status == 0, outcome.err
    assert (tmp_path / 'hf' / 'model.safetensors').is_file() and not (tmp_path / 'hf.tmp').exists()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'hf').eval()
    x = torch.randint(50257, (3, 32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, logits(model, x), rtol=0, atol=1e-4)
    back = GPT.from_pretrained(str(tmp_path / 'hf')).eval()
    torch.testing.assert_close(logits(back, x), logits(model, x), rtol=0, atol=1e-6)


def test_its_tokenizer_and_pipeline_speak_gpt2(script, tmp_path, gpt2_set, bpe_file):
    save(tmp_path / 'out', gpt2_set, vocab_size=50257)
    assert script('export.py', tmp_path / 'out', tmp_path / 'hf').status == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    ours = GPT2Tokenizer(bpe_file)
    for text in (TEXT, 'a<|endoftext|>b', '  \n\t x', ''):
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == 50256
    generate = transformers.pipeline('text-generation', str(tmp_path / 'hf'))
    text = generate('It is', max_new_tokens=8, do_sample=False)[0]['generated_text']
    assert text.startswith('It is') and len(text) > 5
    # by default no more tokens than the model has positions for
    assert generate('It is')[0]['generated_text'].startswith('It is')


def test_a_character_model_keeps_its_characters(script, tmp_path):
    char = CharTokenizer(sorted(set(TEXT)))
    write_dataset(tmp_path / 'chars', {'train': [TEXT], 'val': [TEXT]}, char, {})
    save(tmp_path / 'out', tmp_path / 'chars', vocab_size=len(char.itos))
    assert script('export.py', tmp_path / 'out' / 'ckpt.pt', tmp_path / 'hf').status == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    assert theirs.encode(TEXT) == char.encode(TEXT) and theirs.decode(char.encode(TEXT)) == TEXT


def test_an_exported_folder_is_trained_on_and_sampled(script, tmp_path, gpt2_set):
    save(tmp_path / 'out', gpt2_set, bias=True)
    script('export.py', tmp_path / 'out', tmp_path / 'hf')
    out = f'--out_dir={tmp_path / "on"}'
    command = [
        'train.py',
        f'--init_from={tmp_path / "hf"}',
        f'--dataset={gpt2_set}',
        out,
        '--max_iters=1',
        '--block_size=16',
        '--batch_size=2',
        '--gradient_accumulation_steps=1',
        '--eval_iters=1',
        '--compile=False',
        '--device=cpu',
    ]
    outcome = script(*command, '--n_layer=12')
    assert outcome.status == 2 and f'n_layer=12 but {tmp_path / "hf"} has n_layer=' in outcome.err
    outcome = script(*command)
    assert outcome.status == 0 and 'val loss' in outcome.out, outcome.err
    settings = json.loads((tmp_path / 'on' / 'log.jsonl').read_text().split('\n')[0])['config']
    model_args = checkpoint.load(tmp_path / 'out' / 'ckpt.pt')['model_args']
    assert all(settings[key] == model_args[key] for key in ('n_layer', 'n_head', 'n_embd', 'bias'))
    outcome = script('sample.py', out, '--num_samples=1', '--max_new_tokens=5', '--device=cpu')
    assert (outcome.status, outcome.err) == (0, '')  # the vocabulary lies beside the data set


def content(value, path=''):
    """Return {path of keys: leaf} of nested dicts and lists."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, x in items for k, v in content(x, f'{path}/{key}').items()}
    return {path: value}


@pytest.fixture(scope='module')
def trained(dataset, tmp_path_factory):
    """Return the out_dir of a run of four iterations, and the arguments that train four more."""
    out = tmp_path_factory.mktemp('trained') / 'out'
    arguments = [*TINY, f'--dataset={dataset}', '--optimizer=adamcpr', '--reg_step_size=1']
    command = [sys.executable, 'train.py', *arguments, f'--out_dir={out}', '--max_iters=4']
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out, arguments


def test_a_file_becomes_a_folder_and_a_file_again_with_everything_in_it(script, tmp_path, trained):
    out, _ = trained
    folder, file, hf = tmp_path / 'ckpt-000004', tmp_path / 'ckpt.pt', tmp_path / 'hf'
    assert script('export.py', out, folder, '--to=folder').status == 0
    assert script('export.py', folder, file, '--to=file').status == 0
    before, after = (content(checkpoint.load(path)) for path in (out / 'ckpt.pt', file))
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert after[key] == value
    file.unlink()  # an out_dir that holds only the folder is exported too
    assert script('export.py', tmp_path, hf).status == 0
    weights = transformers.GPT2LMHeadModel.from_pretrained(hf).state_dict()
    assert torch.equal(weights['lm_head.weight'], before['/model/lm_head.weight'])


def test_a_run_resumes_from_what_was_converted_as_from_its_own(script, tmp_path, trained):
    out, arguments = trained
    losses = []
    for name in ('file', 'folder'):
        there = tmp_path / name
        shutil.copytree(out, there)
        if name == 'folder':
            assert script('export.py', there, there / 'ckpt-000004', '--to=folder').status == 0
            (there / 'ckpt.pt').unlink()
        outcome = script('train.py', *arguments, f'--out_dir={there}', '--init_from=resume')
        assert outcome.status == 0, outcome.err
        lines = (there / 'log.jsonl').read_text().splitlines()
        losses.append([json.loads(line).get('loss') for line in lines])
    assert losses[0] == losses[1] and losses[0][-3] is not None


@pytest.mark.parametrize('kind', ['hf', 'file', 'folder'])
def test_no_kind_writes_over_what_is_there_or_leaves_half(
    script, tmp_path, trained, kind, monkeypatch
):
    out, _ = trained
    target = tmp_path / 'target'
    for taken in (target, tmp_path / 'target.tmp'):
        taken.write_text('mine')
        outcome = script('export.py', out, target, f'--to={kind}')
        assert outcome.status == 2 and f'{taken} is there already' in outcome.err
        assert taken.read_text() == 'mine'
        taken.unlink()

    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.replace', full)
    outcome = script('export.py', out, target, f'--to={kind}')
    assert outcome.status == 2 and 'No space left on device' in outcome.err
    assert outcome.err.startswith('error: ') and outcome.err.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_in_one_line_and_leaves_nothing(script, tmp_path, gpt2_set):
    save(tmp_path / 'out', gpt2_set)
    (tmp_path / 'there').mkdir()
    (tmp_path / 'taken.tmp').mkdir()
    (tmp_path / 'llama').mkdir()
    (tmp_path / 'llama' / 'config.json').write_text(json.dumps({'model_type': 'llama'}))
    llama = f'--init_from={tmp_path / "llama"}'
    train = ('train.py', llama, f'--dataset={gpt2_set}', f'--out_dir={tmp_path / "hf"}')
    for arguments, says in (
        (('export.py', tmp_path / 'out'), 'TARGET'),
        (('export.py', tmp_path / 'out', tmp_path / 'hf', '--to=onnx'), "'onnx'"),
        (
            ('export.py', tmp_path / 'out', tmp_path / 'hf', '--to=folder'),
            'it has no optimizer state',
        ),
        (('export.py', tmp_path / 'nowhere', tmp_path / 'hf'), 'no checkpoint'),
        (('export.py', tmp_path / 'out', tmp_path / 'there'), 'is there already'),
        (('export.py', tmp_path / 'out', tmp_path / 'taken'), 'taken.tmp is there already'),
        (train, "is no GPT-2: its config.json says model_type='llama'"),
    ):
        outcome = script(*arguments)
        assert outcome.status == 2
        assert outcome.err.startswith('error: ') and outcome.err.count('\n') == 1
        assert says in outcome.err and not (tmp_path / 'hf').exists()
    assert (tmp_path / 'taken.tmp').exists()


def test_a_folder_that_cannot_be_is_one_line(script, tmp_path, gpt2_set):
    save(tmp_path / 'out', gpt2_set)
    for folder in ('x' * 5000, 'a\0b', 'a\ud800b', '.', '/', tmp_path / 'out' / 'ckpt.pt' / 'hf'):
        outcome = script('export.py', tmp_path / 'out', folder)
        assert outcome.status == 2 and outcome.err.startswith('error: ')
        assert outcome.err.count('\n') == 1


def test_without_transformers_the_command_is_named(script, tmp_path, gpt2_set, monkeypatch):
    save(tmp_path / 'out', gpt2_set)
    monkeypatch.setitem(__import__('sys').modules, 'transformers', None)
    outcome = script('export.py', tmp_path / 'out', tmp_path / 'hf')
    assert outcome.status == 2 and 'pip install transformers' in outcome.err
    assert not (tmp_path / 'hf').exists()


def test_tokenizer_named_in_meta_is_enough_to_decode(gpt2_set, bpe_file):
    meta = json.loads((gpt2_set / 'meta.json').read_text())
    assert tokenizer(meta, gpt2_set).decode(GPT2Tokenizer(bpe_file).encode(TEXT)) == TEXT
