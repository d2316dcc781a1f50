"""runtime/checkpoint.py: what it refuses to go on from, and what another program may have left."""

import pytest
import torch

from cpr import AdamW
from model import GPT, GPTConfig
from runtime import checkpoint


@pytest.fixture
def saved():
    """A checkpoint as train.py writes it."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=8))
    opt = AdamW(model)
    model(*torch.zeros(2, 1, 4, dtype=torch.long))[1].backward()
    opt.step()
    return {
        'model': model.state_dict(),
        'optimizer': opt.state_dict(),
        'model_args': model.config.model_args(),
        'iter_num': 1,
        'best_val_loss': 2.5,
        'config': {'optimizer': 'adamw'},
        'init_norms': {'transformer.wte.weight': 1.0},
        'skipped_steps': 0,
        'loss_average': (0.1, 0.2),
        'scaler': torch.amp.GradScaler('cpu').state_dict(),
    }


def test_what_was_saved_is_loaded(saved, tmp_path):
    checkpoint.save(tmp_path / 'ckpt.pt', saved)
    loaded = checkpoint.load(tmp_path / 'ckpt.pt')
    assert loaded.keys() == saved.keys() and loaded['loss_average'] == (0.1, 0.2)
    for key in ('init_norms', 'skipped_steps', 'loss_average', 'scaler'):  # nanoGPT has none
        del saved[key]
    saved['optimizer'] = {}  # left out to save room
    saved['best_val_loss'] = torch.tensor(2.5)  # nanoGPT's is a tensor
    checkpoint.save(tmp_path / 'ckpt.pt', saved)
    assert checkpoint.load(tmp_path / 'ckpt.pt').keys() == saved.keys()


WRONG = [
    ('iter_num', -1),
    ('iter_num', 1.5),
    ('iter_num', '1'),
    ('iter_num', None),
    ('iter_num', 10**30),
    ('best_val_loss', 'low'),
    ('best_val_loss', float('nan')),
    ('best_val_loss', torch.zeros(2)),
    ('skipped_steps', -1),
    ('skipped_steps', [0]),
    ('init_norms', 1.0),
    ('init_norms', {'transformer.wte.weight': 'long'}),
    ('init_norms', {'transformer.wte.weight': -1.0}),
    ('loss_average', (0.1,)),
    ('loss_average', 0.1),
    ('loss_average', ('a', 'b')),
    ('scaler', {'scale': 1.0}),
    ('scaler', 7),
    ('config', ['adamw']),
    ('model_args', {1: 2}),
    ('model', {'transformer.wte.weight': 'x'}),
    ('optimizer', None),
    ('optimizer', {'state': [1]}),
    ('optimizer', {'state': {0: 1}}),
]


@pytest.mark.parametrize('key, value', WRONG, ids=str)
def test_an_entry_that_no_run_can_go_on_from_is_one_error_line(saved, tmp_path, capsys, key, value):
    refused(tmp_path, {**saved, key: value}, capsys, f'has a wrong {key}')


@pytest.mark.parametrize('key', ['model', 'model_args', 'iter_num', 'best_val_loss', 'config'])
def test_an_entry_that_is_missing_is_one_error_line(saved, tmp_path, capsys, key):
    del saved[key]
    refused(tmp_path, saved, capsys, f'lacks {key}')


@pytest.mark.parametrize(
    'key, value',
    [
        ('step', torch.tensor(-1.0)),
        ('step', 'many'),
        ('step', torch.ones(2)),
        ('step', float('inf')),
        ('exp_avg', 0.0),
        ('exp_avg', 'x'),
        ('exp_avg_sq', torch.zeros(3)),
        ('kappa', torch.zeros(3)),
    ],
    ids=str,
)
def test_a_state_that_no_optimizer_has_is_one_error_line(saved, tmp_path, capsys, key, value):
    saved['optimizer']['state'][1][key] = value
    refused(tmp_path, saved, capsys, f'has a wrong {key} of parameter 1')


def test_what_is_no_dict_is_one_error_line(tmp_path, capsys):
    refused(tmp_path, [1, 2], capsys, 'is not a checkpoint of train.py')


def refused(tmp_path, content, capsys, says):
    torch.save(content, tmp_path / 'ckpt.pt')
    with pytest.raises(SystemExit, match='2'):
        checkpoint.load(tmp_path / 'ckpt.pt')
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1 and says in err


def test_a_kill_between_link_and_rename_leaves_nothing_behind(tmp_path):
    path, older = tmp_path / 'ckpt.pt', tmp_path / 'ckpt.1.pt'
    checkpoint.save(path, {'save': 1}, keep=2)
    (tmp_path / 'ckpt.pt.link').hardlink_to(path)  # killed before it became ckpt.1.pt
    checkpoint.save(path, {'save': 2}, keep=2)
    older.unlink()
    older.hardlink_to(path)  # killed before ckpt.pt was replaced
    checkpoint.save(path, {'save': 3}, keep=2)
    assert (torch.load(path), torch.load(older)) == ({'save': 3}, {'save': 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.1.pt', 'ckpt.pt']


def test_a_folder_whose_tensors_are_damaged_says_so(saved, tmp_path):
    run = {key: x for key, x in saved.items() if key != 'model'}
    checkpoint.save_folder(tmp_path / 'folder', run, checkpoint.model_of(saved))
    (tensors,) = (tmp_path / 'folder').glob('*.distcp')
    tensors.write_bytes(b'x' * tensors.stat().st_size)
    with pytest.raises(OSError, match='cannot be read .UnpicklingError.; restore it'):
        checkpoint.load_model(tmp_path / 'folder')


def test_a_model_that_does_not_fit_is_one_error_line(saved, capsys):
    for key, value in {'n_layer': 'two', 'n_embd': 8, 'vocab_size': -1, 'unknown': 1}.items():
        args = {**saved['model_args'], key: value}
        with pytest.raises(SystemExit, match='2'):
            checkpoint.model_of({**saved, 'model_args': args})
        err = capsys.readouterr().err
        assert err.startswith('error: ') and err.count('\n') == 1
