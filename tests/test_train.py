"""train.py as its user runs it: what it learns and writes, how it resumes, its error lines."""

import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

from cpr import AdamW
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime import log as runlog


def losses(out_dir):
    return {e['iter']: e['loss'] for e in runlog.read(str(out_dir)) if e['kind'] == 'train'}


def entries(out_dir, kind):
    return [e for e in runlog.read(str(out_dir)) if e['kind'] == kind]


@pytest.fixture
def train(script, dataset, tmp_path):
    def run(*arguments, out='out'):
        return script(
            'train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path / out}', *arguments
        )

    return run


# -- it trains


@pytest.mark.parametrize(
    'arguments',
    [
        ('--optimizer=adamw',),
        ('--optimizer=adamcpr', '--reg_step_size=5'),
        (
            '--optimizer=adamcpr',
            '--kappa_init_method=warm_start',
            '--kappa_init_param=10',
            '--order=after',
        ),
        ('--optimizer=adamwn', '--wn_ratio=1.5', '--wn_ramp_iters=20'),
        ('--optimizer=adamwn', '--wn_ratio=1.5', '--wn_scope=global', '--order=before'),
        ('--optimizer=adamh', '--adamh_step_scale=4'),
        ('--dtype=bfloat16',),
        ('--dtype=float16',),
    ],
    ids=lambda a: ' '.join(a),
)
def test_the_loss_falls(train, tmp_path, arguments):
    outcome = train('--max_iters=60', '--lr_decay_iters=60', '--eval_interval=60', *arguments)
    first, last = entries(tmp_path / 'out', 'eval')
    assert outcome.status == 0, outcome.err
    assert first['val_loss'] == pytest.approx(math.log(13), rel=0.1)
    # AdamH's matrices cannot grow, and in so small a model they start small
    fall = 0.04 if '--optimizer=adamh' in arguments else 0.2
    assert last['val_loss'] < first['val_loss'] - fall


def test_train_and_validation_are_evaluated_on_their_own_text(train, tmp_path, dataset):
    train()
    for entry in entries(tmp_path / 'out', 'eval'):
        assert entry['train_loss'] != entry['val_loss']


def test_torch_compile_trains_to_the_same_losses(train, tmp_path):
    train('--max_iters=3', '--n_layer=1')
    outcome = train('--max_iters=3', '--n_layer=1', '--compile=True', out='compiled')
    assert outcome.status == 0, outcome.err
    assert losses(tmp_path / 'compiled') == pytest.approx(losses(tmp_path / 'out'), rel=1e-5)


def test_the_batch_of_an_iteration_does_not_depend_on_its_micro_steps(train, tmp_path):
    for size, steps in ((8, 1), (4, 2), (1, 8)):
        train(f'--batch_size={size}', f'--gradient_accumulation_steps={steps}', out=f'{size}')
    assert losses(tmp_path / '4') == pytest.approx(losses(tmp_path / '8'), rel=1e-5)
    assert losses(tmp_path / '1') == pytest.approx(losses(tmp_path / '8'), rel=1e-5)


def test_another_seed_sees_other_batches_but_is_evaluated_on_the_same(train, tmp_path):
    train('--seed=1', '--learning_rate=0.0', '--min_lr=0.0')
    train('--seed=2', '--learning_rate=0.0', '--min_lr=0.0', out='other')
    assert losses(tmp_path / 'out') != losses(tmp_path / 'other')
    first = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    outcome = train(
        f'--init_from={tmp_path / "out" / "ckpt.pt"}',
        '--seed=2',
        '--eval_only=True',
        out='evaluated',
    )
    assert f'val loss {first["best_val_loss"]:.4f}' in outcome.out


def test_eval_iters_0_takes_every_token_of_val_once(train, tmp_path, dataset):
    train('--eval_iters=0')
    saved = checkpoint.load(tmp_path / 'out' / 'ckpt.pt')
    model = GPT(GPTConfig(**saved['model_args'])).eval()
    model.load_state_dict(saved['model'])
    tokens = torch.from_numpy(np.fromfile(dataset / 'val.bin', dtype='<u2').astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(tokens) - 1, 16):
            y = tokens[i + 1 : i + 17]
            total += model(tokens[None, i : i + len(y)], y[None])[1].item() * len(y)
    assert entries(tmp_path / 'out', 'eval')[-1]['val_loss'] == pytest.approx(
        total / (len(tokens) - 1), rel=1e-5
    )


def test_eval_only_evaluates_and_writes_nothing(train, tmp_path):
    outcome = train('--eval_only=True')
    assert outcome.status == 0 and 'val loss' in outcome.out
    assert not (tmp_path / 'out').exists()


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(train, tmp_path):
    schedule = '--warmup_iters=2', '--lr_decay_iters=12', '--learning_rate=1e-2', '--min_lr=1e-3'
    train('--max_iters=14', *schedule)
    lr = {e['iter']: e['lr'] for e in entries(tmp_path / 'out', 'train')}
    wanted = [1e-2 / 3, 2e-2 / 3, 1e-2, 5.5e-3, 1e-3, 1e-3]
    assert [lr[i] for i in (0, 1, 2, 7, 12, 13)] == pytest.approx(wanted)


def test_every_parameter_receives_the_scheduled_learning_rate(train, tmp_path):
    train()
    groups = checkpoint.load(tmp_path / 'out' / 'ckpt.pt')['optimizer']['param_groups']
    assert {group['lr'] for group in groups} == {entries(tmp_path / 'out', 'train')[-1]['lr']}


def test_grad_clip_clips_the_gradients_and_the_log_has_their_norm_before_that(train, tmp_path):
    train('--grad_clip=1e-12', '--weight_decay=0.0')  # far below Adam's eps: almost no step
    train('--grad_clip=0.0', '--weight_decay=0.0', out='unclipped')
    moved, unclipped = (
        abs(entries(tmp_path / out, 'norms')[-1]['ratio'] - 1) for out in ('out', 'unclipped')
    )
    assert moved < 1e-3 < 1e-2 < unclipped
    assert all(e['grad_norm'] > 0.1 for e in entries(tmp_path / 'out', 'train'))


def test_float16_without_clipping_counts_the_steps_that_it_skips(train, tmp_path, monkeypatch):
    step, seen = torch.amp.GradScaler.step, []

    def with_overflow(self, optimizer):
        if not seen:  # in the first step, before the optimizer has any state
            optimizer.param_groups[0]['params'][0].grad.fill_(math.inf)
        seen.append(self)
        return step(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, 'step', with_overflow)
    assert train('--dtype=float16', '--grad_clip=0.0', '--max_iters=4').status == 0
    assert [e['skipped_steps'] for e in entries(tmp_path / 'out', 'train')] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    'default, other, arguments',
    [
        (
            'before',
            'after',
            (
                '--optimizer=adamcpr',
                '--kappa_init_method=dependent',
                '--kappa_init_param=0.5',
                '--kappa_update=100.0',
            ),
        ),
        ('after', 'before', ('--optimizer=adamwn', '--wn_ratio=1.5', '--wn_rate=0.3')),
    ],
)
def test_order_auto_follows_the_papers(train, tmp_path, default, other, arguments):
    for order in ('auto', default, other):
        train(f'--order={order}', *arguments, out=order)
    assert losses(tmp_path / 'auto') == losses(tmp_path / default) != losses(tmp_path / other)


# -- norms


def test_norms_are_recorded_from_the_start_for_every_optimizer(train, tmp_path):
    for optimizer in ('adamw', 'adamcpr', 'adamwn', 'adamh'):
        train(
            f'--optimizer={optimizer}',
            '--kappa_init_method=dependent',
            '--kappa_init_param=0.9',
            out=optimizer,
        )
        records = entries(tmp_path / optimizer, 'norms')
        assert [r['iter'] for r in records] == [0, 2, 4, 6, 8]
        assert records[0]['ratio'] == 1 and all(
            t['ratio'] == 1 for t in records[0]['tensors'].values()
        )
        model = checkpoint.load(tmp_path / optimizer / 'ckpt.pt')['model']
        for name, tensor in records[-1]['tensors'].items():
            assert tensor['norm'] == pytest.approx(model[name].norm().item(), rel=1e-5)
            assert ('kappa' in tensor) == (
                optimizer == 'adamcpr' and 'transformer.h.' in name
            )  # not the embeddings
        total = math.hypot(*(t['norm'] for t in records[-1]['tensors'].values()))
        start = math.hypot(*(t['norm'] for t in records[0]['tensors'].values()))
        assert records[-1]['ratio'] == pytest.approx(total / start)


def test_adamwn_reaches_the_scheduled_ratio(train, tmp_path):
    train('--optimizer=adamwn', '--wn_rate=1.0', '--wn_ratio=1.3', '--wn_ramp_iters=4')
    ratio = {r['iter']: r['ratio'] for r in entries(tmp_path / 'out', 'norms')}
    assert [ratio[i] for i in (2, 4, 8)] == pytest.approx([1.15, 1.3, 1.3], rel=1e-4)


def test_adamh_holds_each_norm_and_moves_each_matrix_by_the_same_share_of_it(train, tmp_path):
    schedule = '--learning_rate=0.01', '--decay_lr=False', '--adamh_step_scale=2'
    train('--optimizer=adamh', *schedule, '--norm_log_interval=1')
    records = entries(tmp_path / 'out', 'norms')
    held = [t for r in records for name, t in r['tensors'].items() if 'transformer.h.' in name]
    assert [t['ratio'] for t in held] == pytest.approx([1] * len(held), rel=1e-6)
    moved = [t for t in held if 'step' in t]
    assert len(moved) == len(held) * 8 // 9  # no step follows the last iteration
    # 0.02 to the side of the sphere or so, then back onto it
    assert [t['step'] for t in moved] == pytest.approx([0.02] * len(moved), rel=0.04)
    assert [math.radians(t['angle']) for t in moved] == pytest.approx([0.02] * len(moved), rel=0.04)
    free = [r['tensors']['transformer.wte.weight']['ratio'] for r in records]
    assert free[-1] != pytest.approx(1, rel=1e-3)


def test_wn_from_takes_the_ratio_of_every_tensor_from_a_finished_run(train, tmp_path):
    train('--optimizer=adamw', '--max_iters=20')
    steered = '--optimizer=adamwn', '--wn_rate=1.0', '--wn_ramp_iters=4', '--wn_ratio=1.2'
    other = f'--wn_from={tmp_path / "out"}'
    train(*steered, other, out='wn')
    wanted, reached = (final_ratios(tmp_path / out) for out in ('out', 'wn'))
    assert reached == pytest.approx(wanted, rel=1e-4)
    assert len({round(ratio, 3) for ratio in wanted.values()}) > 3

    # a resumed run has the targets of its own settings
    train(*steered, '--init_from=resume', '--max_iters=10', other, out='wn')
    assert final_ratios(tmp_path / 'wn') == pytest.approx(wanted, rel=1e-4)
    train(*steered, '--init_from=resume', '--max_iters=12', out='wn')
    reached = list(final_ratios(tmp_path / 'wn').values())
    assert reached == pytest.approx([1.2] * len(reached), rel=1e-4)
    train(*steered, '--init_from=resume', '--max_iters=14', other, '--wn_scope=global', out='wn')
    total = entries(tmp_path / 'out', 'norms')[-1]['ratio']
    assert entries(tmp_path / 'wn', 'norms')[-1]['ratio'] == pytest.approx(total, rel=1e-4)


VECTORS = '--optimizer=adamwn', '--wn_vectors=True', '--bias=True', '--wn_ratio=1.3'


def test_wn_vectors_steers_layernorm_weights_and_leaves_biases_free(train, tmp_path):
    schedule = '--wn_rate=1.0', '--wn_ramp_iters=4'
    train(*VECTORS, *schedule)
    ratios = final_ratios(tmp_path / 'out')
    assert sum('.ln_' in name for name in ratios) == 5
    assert [*ratios.values()] == pytest.approx([1.3] * len(ratios), rel=1e-5)
    model = checkpoint.load(tmp_path / 'out' / 'ckpt.pt')['model']
    biases = {name: p for name, p in model.items() if name.endswith('.bias')}
    assert len(biases) == 13 and all(p.any() for p in biases.values())

    train(*VECTORS, *schedule, '--wn_vectors=False', out='free')
    assert not any('.ln_' in name for name in final_ratios(tmp_path / 'free'))
    free = checkpoint.load(tmp_path / 'free' / 'ckpt.pt')['model']['transformer.ln_f.weight']
    assert free.norm().item() != pytest.approx(1.3 * 16**0.5, rel=0.05)


def test_wn_vectors_only_adds_norms_to_the_log_of_another_optimizer(train, tmp_path):
    for vectors in (True, False):
        train(f'--wn_vectors={vectors}', out=f'{vectors}')
    assert losses(tmp_path / 'True') == losses(tmp_path / 'False')
    ours, theirs = (final_ratios(tmp_path / out) for out in ('True', 'False'))
    assert {name for name in ours if '.ln_' not in name} == theirs.keys() < ours.keys()


def test_wn_from_takes_the_ratios_of_vectors_from_a_run_that_logged_them(train, tmp_path):
    train('--wn_vectors=True', '--bias=True', '--max_iters=20')
    steered = *VECTORS, '--wn_rate=1.0', '--wn_ramp_iters=4', f'--wn_from={tmp_path / "out"}'
    train(*steered, out='wn')
    wanted, reached = (final_ratios(tmp_path / out) for out in ('out', 'wn'))
    assert reached == pytest.approx(wanted, rel=1e-4)
    bad(train(*steered, '--wn_vectors=False', out='other'), 'wn_vectors')


def test_wn_vectors_stays_as_it_is_when_a_run_resumes(train, tmp_path):
    train(*VECTORS)
    resumed = *VECTORS, '--init_from=resume', '--max_iters=10', '--wn_vectors=False'
    bad(train(*resumed), 'wn_vectors=True, not wn_vectors=False')
    assert train(*resumed, '--switch_optimizer=True').status == 0


def test_a_rule_that_only_logs_vectors_may_resume_with_another_wn_vectors(train):
    train('--optimizer=adamcpr', '--wn_vectors=True')
    resumed = '--optimizer=adamcpr', '--init_from=resume', '--max_iters=10', '--wn_vectors=False'
    assert train(*resumed).status == 0


def test_init_std_scales_the_initial_weights(train, tmp_path):
    first = []
    for std in (0.02, 0.06):
        train(f'--init_std={std}', out=f'out{std}')
        first.append(entries(tmp_path / f'out{std}', 'norms')[0]['tensors'])
    for name, narrow in first[0].items():
        assert first[1][name]['norm'] == pytest.approx(3 * narrow['norm'], rel=1e-5)


def final_ratios(out_dir):
    return {name: t['ratio'] for name, t in entries(out_dir, 'norms')[-1]['tensors'].items()}


# -- what it leaves


def test_the_checkpoint_has_nanogpts_keys_and_torch_adamw_can_load_its_optimizer(train, tmp_path):
    for optimizer in ('adamw', 'adamcpr', 'adamwn', 'adamh'):
        train(f'--optimizer={optimizer}', out=optimizer)
        saved = torch.load(tmp_path / optimizer / 'ckpt.pt', weights_only=True)
        assert {
            'model',
            'optimizer',
            'model_args',
            'iter_num',
            'best_val_loss',
            'config',
        } <= saved.keys()
        assert saved['iter_num'] == 8 and saved['config']['dataset'].endswith('sums')
        assert (
            ' '.join(sorted(saved['model_args']))
            == 'bias block_size dropout n_embd n_head n_layer vocab_size'
        )
        model = GPT(GPTConfig(**saved['model_args']))
        model.load_state_dict(saved['model'])
        params = [p for p in model.parameters() if p.requires_grad]
        theirs = torch.optim.AdamW(
            [
                {'params': [p for p in params if p.dim() >= 2], 'weight_decay': 0.1},
                {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
            ]
        )
        theirs.load_state_dict(saved['optimizer'])
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[
            1
        ].backward()
        theirs.step()


def test_a_nanogpt_checkpoint_is_continued_with_its_adamw_state(train, tmp_path):
    train()
    path = tmp_path / 'out' / 'ckpt.pt'
    saved = torch.load(path, weights_only=True)
    model = GPT(GPTConfig(**saved['model_args']))
    model.load_state_dict(saved['model'])
    params = list(model.parameters())
    theirs = torch.optim.AdamW(
        [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': 0.1},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ],
        lr=1e-2,
    )
    theirs.load_state_dict(saved['optimizer'])
    keys = ('model_args', 'iter_num', 'best_val_loss')
    torch.save(
        {
            'model': {f'_orig_mod.{k}': v for k, v in saved['model'].items()},
            'optimizer': theirs.state_dict(),
            'config': {'dataset': 'sums', 'device': 'cuda'},
            **{k: saved[k] for k in keys},
        },
        tmp_path / 'theirs.pt',
    )
    for out, source in (('a', path), ('b', tmp_path / 'theirs.pt')):
        assert train('--max_iters=12', f'--init_from={source}', out=out).status == 0
    assert losses(tmp_path / 'a') == losses(tmp_path / 'b') and list(losses(tmp_path / 'b')) == [
        8,
        9,
        10,
        11,
    ]


def test_a_nanogpt_character_run_is_evaluated_and_sampled_with_its_meta_pkl(
    script, train, tmp_path, dataset
):
    """As in nanoGPT's folder: out/ckpt.pt, data/sums/{train,val}.bin and meta.pkl, no meta.json."""
    train()
    theirs = tmp_path / 'data' / 'sums'
    theirs.mkdir(parents=True)
    for name in ('train.bin', 'val.bin', 'meta.pkl'):
        (theirs / name).write_bytes((dataset / name).read_bytes())
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    keys = ('model', 'optimizer', 'model_args', 'iter_num')
    torch.save(
        {
            **{k: saved[k] for k in keys},
            'best_val_loss': torch.tensor(1.5),
            'config': {'dataset': 'sums'},
        },
        tmp_path / 'out' / 'nano.pt',
    )
    nano = f'--init_from={tmp_path}/out/nano.pt'
    outcome = script(
        'sample.py', nano, '--start=1+', '--num_samples=1', '--max_new_tokens=20', '--device=cpu'
    )
    assert outcome.status == 0 and outcome.err == '' and set(outcome.out) <= set('0123456789+=\n-')
    outcome = script(
        'train.py',
        *TINY,
        nano,
        f'--dataset={theirs}',
        '--eval_only=True',
        f'--out_dir={tmp_path / "b"}',
    )
    assert f'val loss {saved["best_val_loss"]:.4f}' in outcome.out
    outcome = script(
        'train.py',
        *TINY,
        nano,
        f'--dataset={theirs}',
        '--max_iters=10',
        f'--out_dir={tmp_path / "b"}',
    )
    assert outcome.status == 0 and list(losses(tmp_path / 'b')) == [8, 9]


def test_a_checkpoint_of_the_first_version_resumes(train, tmp_path):
    """Its AdamWN kept targets in the groups, one number or one a tensor, and no ratio a tensor."""
    train('--optimizer=adamw')
    for number, source in enumerate(([], [f'--wn_from={tmp_path / "out"}'])):
        arguments = '--optimizer=adamwn', '--wn_ratio=1.5', '--wn_ramp_iters=20', *source
        train(*arguments, '--max_iters=16', out=f'new{number}')
        train(*arguments, out=f'old{number}')
        path = tmp_path / f'old{number}' / 'ckpt.pt'
        saved = torch.load(path, weights_only=True)
        for state in saved['optimizer']['state'].values():
            state.pop('ratio', None)
        matrices, vectors = saved['optimizer']['param_groups']
        ratios = torch.linspace(1.1, 1.9, len(matrices['params'])) if source else 1.5
        matrices.update(final_ratio=ratios, ratio=ratios)
        for group in (matrices, vectors):
            del group['ramp']
        torch.save(saved, path)
        outcome = train(*arguments, '--max_iters=16', '--init_from=resume', out=f'old{number}')
        assert outcome.status == 0, outcome.err
        assert losses(tmp_path / f'old{number}') == losses(tmp_path / f'new{number}')


def test_the_log_has_the_documented_kinds_and_fields(train, tmp_path):
    train()
    log = runlog.read(str(tmp_path / 'out'))
    assert {e['kind'] for e in log} == {'config', 'train', 'eval', 'norms'}
    assert entries(tmp_path / 'out', 'config')[0]['config']['batch_size'] == 4
    for e in entries(tmp_path / 'out', 'train'):
        assert {'iter', 'loss', 'lr', 'grad_norm', 'ms', 'tokens_per_s', 'mfu'} <= e.keys()
        assert e['ms'] > 0 and e['tokens_per_s'] > 0 and e['grad_norm'] > 0


def test_only_the_best_is_kept_when_asked(train, tmp_path):
    train('--always_save_checkpoint=False', '--learning_rate=0.0', '--min_lr=0.0')
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()  # no evaluation was better than the first


def test_only_a_lower_loss_is_kept_over_a_resume_too(train, tmp_path):
    """A learning rate of 1 makes the loss rise again."""
    arguments = '--always_save_checkpoint=False', '--eval_interval=1', '--learning_rate=1.0'
    arguments += '--min_lr=1.0', '--warmup_iters=0'
    train(*arguments, '--max_iters=4', '--checkpoint_interval=4')
    for more in '--max_iters=4', '--max_iters=8':
        assert train(*arguments, more, '--init_from=auto').status == 0
        losses = {e['iter']: e['val_loss'] for e in entries(tmp_path / 'out', 'eval')}
    best = min(losses, key=losses.get)
    saved = checkpoint.load(tmp_path / 'out' / 'ckpt.pt')
    assert saved['iter_num'] == max(best, 4) and saved['best_val_loss'] == min(losses.values())


def charts_of(tmp_path):
    """{chart: {iteration: value}}, as TensorBoard reads it from tmp_path/out."""
    event_accumulator = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    events = event_accumulator.EventAccumulator(str(tmp_path / 'out' / 'tensorboard')).Reload()
    return {
        name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()['scalars']
    }


def test_tensorboard_shows_what_the_log_says_over_a_resume(train, tmp_path):
    pytest.importorskip('tensorboard')
    arguments = (
        '--tensorboard_log=True',
        '--optimizer=adamcpr',
        '--kappa_init_method=warm_start',
        '--kappa_init_param=3',
    )
    assert train(*arguments).status == 0
    train('--init_from=resume', '--max_iters=12', *arguments)
    charts = charts_of(tmp_path)
    assert charts['train/loss'] == pytest.approx(losses(tmp_path / 'out'))
    val = {e['iter']: e['val_loss'] for e in entries(tmp_path / 'out', 'eval')}
    assert charts['val/loss'] == pytest.approx(val) and list(val) == [0, 4, 8, 12]
    name = 'transformer.h.0.mlp.c_fc.weight'
    for key in ('norm', 'ratio', 'kappa', 'lagmul'):
        written = {
            e['iter']: e['tensors'][name].get(key) for e in entries(tmp_path / 'out', 'norms')
        }
        written = {i: value for i, value in written.items() if value is not None}
        assert charts[f'{key}/{name}'] == pytest.approx(written) and written


def test_wandb_offline_receives_the_same_charts(train, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_DIR', str(tmp_path))
    monkeypatch.setenv('WANDB_SILENT', 'true')
    logged, log = {}, wandb.Run.log

    def spy(self, data, step=None, **kwargs):
        logged.setdefault(step, {}).update(data)
        return log(self, data, step=step, **kwargs)

    monkeypatch.setattr(wandb.Run, 'log', spy)
    outcome = train(
        '--wandb_log=True', '--wandb_run_name=t', '--max_iters=4', '--norm_log_interval=4'
    )
    assert outcome.status == 0, outcome.err
    assert list((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))
    assert {i: v['train/loss'] for i, v in logged.items() if 'train/loss' in v} == losses(
        tmp_path / 'out'
    )
    assert logged[4]['val/loss'] == entries(tmp_path / 'out', 'eval')[-1]['val_loss']
    assert (
        logged[4]['norm/transformer.wte.weight'] > 0
        and logged[0]['ratio/transformer.wte.weight'] == 1
    )


def test_tensorboard_that_is_not_installed_ends_with_one_error_line(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    bad(train('--tensorboard_log=True'), 'pip install tensorboard')
    assert not (tmp_path / 'out').exists()


# -- stopping and going on


@pytest.mark.parametrize(
    'arguments',
    [
        ('--optimizer=adamcpr', '--reg_step_size=2'),
        ('--optimizer=adamcpr', '--kappa_init_method=warm_start', '--kappa_init_param=6'),
        ('--optimizer=adamwn', '--wn_ratio=1.5', '--wn_ramp_iters=20'),
        ('--optimizer=adamwn', '--wn_vectors=True', '--bias=True', '--wn_ratio=1.5'),
        ('--optimizer=adamh',),
        ('--optimizer=adamw', '--dropout=0.2', '--gradient_accumulation_steps=3'),
        ('--optimizer=adamw', '--dtype=float16'),
    ],
    ids=lambda a: ' '.join(a),
)
def test_a_resumed_run_continues_bit_for_bit(train, tmp_path, arguments):
    train('--max_iters=16', *arguments)
    train('--max_iters=8', *arguments, out='resumed')
    outcome = train('--max_iters=16', '--init_from=resume', *arguments, out='resumed')
    assert outcome.status == 0, outcome.err
    assert losses(tmp_path / 'resumed') == losses(tmp_path / 'out')
    a, b = (checkpoint.load(tmp_path / out / 'ckpt.pt') for out in ('out', 'resumed'))
    assert all(torch.equal(a['model'][name], b['model'][name]) for name in a['model'])
    strip = [
        {k: v for k, v in e.items() if k not in ('ms', 'tokens_per_s')}
        for out in ('out', 'resumed')
        for e in runlog.read(str(tmp_path / out))
        if e['kind'] != 'config'
    ]
    assert strip[: len(strip) // 2] == strip[len(strip) // 2 :]


def start(out_dir, dataset, *arguments, **options):
    command = [
        sys.executable,
        'train.py',
        *TINY,
        f'--dataset={dataset}',
        f'--out_dir={out_dir}',
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        **options,
    )


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_iteration_and_writes_a_checkpoint(tmp_path, dataset, number):
    process = start(tmp_path / 'out', dataset, '--max_iters=100000', '--eval_interval=100000')
    for line in process.stdout:
        if line.startswith('iter 5:'):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err == ''
    assert f'stopped by {number.name}' in out and '--init_from=auto' in out
    saved = checkpoint.load(tmp_path / 'out' / 'ckpt.pt')
    assert saved['iter_num'] == max(losses(tmp_path / 'out')) + 1 >= 6


def test_ctrl_c_that_also_ends_tee_still_writes_a_checkpoint(tmp_path, dataset):
    """A terminal sends it to both ends of a pipe, and the other end is gone first."""
    process = start(tmp_path / 'out', dataset, '--max_iters=100000', '--eval_interval=100000')
    for line in process.stdout:
        if line.startswith('iter 5:'):
            break
    process.send_signal(signal.SIGSTOP)  # or it might write between the two lines that follow
    os.waitpid(process.pid, os.WUNTRACED)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT and process.stderr.read() == ''
    assert checkpoint.load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] >= 6


def test_a_run_whose_output_nobody_reads_stops_with_a_checkpoint(tmp_path, dataset):
    process = start(tmp_path / 'out', dataset, '--max_iters=100000', '--eval_interval=100000')
    for line in process.stdout:
        if line.startswith('iter 5:'):
            break
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE and process.stderr.read() == ''
    assert checkpoint.load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] >= 6


def test_twenty_kills_leave_the_same_log_as_an_undisturbed_run(tmp_path, dataset):
    arguments = (
        '--optimizer=adamcpr',
        '--reg_step_size=10',
        '--max_iters=120',
        '--lr_decay_iters=120',
        '--eval_interval=5',
        '--eval_iters=1',
        '--init_from=auto',
        '--dropout=0.1',
    )
    whole = start(tmp_path / 'whole', dataset, *arguments)
    assert whole.wait(timeout=120) == 0
    chance = random.Random(0)
    for kills in range(20):
        process = start(tmp_path / 'killed', dataset, *arguments)
        wanted = chance.randrange(2, 14)  # lines of output, one to two checkpoints' worth
        for _ in itertools.islice(process.stdout, wanted):
            pass
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, f'after {kills} kills it ended by itself'
        assert not (tmp_path / 'killed' / 'ckpt.pt').exists() or checkpoint.load(
            tmp_path / 'killed' / 'ckpt.pt'
        )
    last = start(tmp_path / 'killed', dataset, *arguments)
    assert last.wait(timeout=120) == 0
    assert losses(tmp_path / 'killed') == losses(tmp_path / 'whole')
    assert len(losses(tmp_path / 'whole')) == 120
    val = [
        {e['iter']: e['val_loss'] for e in entries(tmp_path / out, 'eval')}
        for out in ('killed', 'whole')
    ]
    assert val[0] == val[1]


def test_auto_starts_where_there_is_nothing_and_leaves_a_finished_run_alone(train, tmp_path):
    assert train('--init_from=auto').status == 0
    before = (
        (tmp_path / 'out' / 'ckpt.pt').read_bytes(),
        (tmp_path / 'out' / 'log.jsonl').read_bytes(),
    )
    outcome = train('--init_from=auto')
    assert outcome.status == 0 and 'nothing is left to train' in outcome.out
    assert before == (
        (tmp_path / 'out' / 'ckpt.pt').read_bytes(),
        (tmp_path / 'out' / 'log.jsonl').read_bytes(),
    )


def test_resume_without_the_config_takes_the_architecture_from_the_checkpoint(
    script, train, tmp_path, dataset
):
    train()
    outcome = script(
        'train.py',
        '--init_from=resume',
        f'--out_dir={tmp_path / "out"}',
        f'--dataset={dataset}',
        '--compile=False',
        '--eval_only=True',
        '--eval_iters=1',
        '--device=cpu',
    )
    assert outcome.status == 0 and 'iteration 8' in outcome.out


def test_switching_the_optimizer_keeps_moments_and_iteration(train, tmp_path):
    def state():
        return checkpoint.load(tmp_path / 'out' / 'ckpt.pt')['optimizer']['state'][2]

    train()
    switched = '--init_from=resume', '--switch_optimizer=True'
    outcome = train(*switched, '--optimizer=adamcpr', '--max_iters=12')
    assert outcome.status == 0 and list(losses(tmp_path / 'out')) == list(range(12))
    assert state()['step'] == 12 and 'kappa' in state()
    assert train(*switched, '--max_iters=14').status == 0  # and back
    assert set(state()) == {'step', 'exp_avg', 'exp_avg_sq'}


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path, dataset):
    out = tmp_path / 'out'
    assert start(out, dataset).wait(timeout=60) == 0
    before = (out / 'ckpt.pt').read_bytes()

    def no_room():  # as a full disk does: no file of this process grows beyond half a checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    process = start(out, dataset, '--init_from=resume', '--max_iters=12', preexec_fn=no_room)
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == 2 and 'could not write' in err and 'the checkpoint before it' in err
    )
    assert [line for line in err.splitlines() if line.startswith('error: ')] == err.splitlines()
    assert (out / 'ckpt.pt').read_bytes() == before
    assert sorted(p.name for p in out.iterdir()) == ['.lock', 'ckpt.1.pt', 'ckpt.pt', 'log.jsonl']
    assert start(out, dataset, '--init_from=resume', '--max_iters=12').wait(timeout=60) == 0


def test_a_checkpoint_in_the_runs_own_folder_is_not_lost_to_a_run_from_it(tmp_path, dataset):
    out = tmp_path / 'out'
    assert start(out, dataset).wait(timeout=60) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    process = start(out, dataset, f'--init_from={out}/ckpt.1.pt')
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.startswith('error: ') and 'another --out_dir' in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_stopped_in_its_last_iteration_a_run_still_ends_as_if_it_had_not_been(
    train, tmp_path, monkeypatch
):
    whole = entries(tmp_path / 'out', 'eval') if train().status == 0 else None
    step = AdamW.step

    def step_and_signal(self, *args):
        result = step(self, *args)
        if self.state[self.param_groups[0]['params'][0]]['step'] == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(AdamW, 'step', step_and_signal)
    assert train(out='stopped').status == 0
    assert entries(tmp_path / 'stopped', 'eval') == whole


def test_a_new_run_in_an_old_out_dir_is_not_taken_for_the_old_one(train, tmp_path):
    train()
    old = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    old_log = (tmp_path / 'out' / 'log.jsonl').read_bytes()
    train(
        '--max_iters=2', '--always_save_checkpoint=False', '--learning_rate=0.0', '--min_lr=0.0'
    )  # leaves none
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()
    assert (tmp_path / 'out' / 'ckpt.pt.old').read_bytes() == old
    assert 'from scratch at iteration 0' in train('--init_from=auto').out
    assert (tmp_path / 'out' / 'log.jsonl.old').read_bytes() == old_log


def test_the_log_of_a_run_whose_checkpoints_were_deleted_is_kept(train, tmp_path):
    train()
    log = (tmp_path / 'out' / 'log.jsonl').read_bytes()
    for path in (tmp_path / 'out').glob('ckpt*'):
        path.unlink()
    train('--max_iters=2')
    assert (tmp_path / 'out' / 'log.jsonl.old').read_bytes() == log


def test_a_run_made_longer_keeps_its_last_evaluation(train, tmp_path):
    train('--max_iters=7', '--eval_interval=4', '--norm_log_interval=4')
    ended = entries(tmp_path / 'out', 'eval')[-1], entries(tmp_path / 'out', 'norms')[-1]
    train('--max_iters=10', '--eval_interval=4', '--norm_log_interval=4', '--init_from=auto')
    assert [e['iter'] for e in entries(tmp_path / 'out', 'eval')] == [0, 4, 7, 8, 10]
    assert [e['iter'] for e in entries(tmp_path / 'out', 'norms')] == [0, 4, 7, 8, 10]
    assert ended[0] in entries(tmp_path / 'out', 'eval')
    assert ended[1] in entries(tmp_path / 'out', 'norms')


def test_a_run_that_continues_a_checkpoint_from_elsewhere_logs_only_its_own(train, tmp_path):
    train()
    train('--seed=5', out='other')
    train(f'--init_from={tmp_path / "out" / "ckpt.pt"}', '--max_iters=10', out='other')
    assert list(losses(tmp_path / 'other')) == [8, 9]
    train(
        f'--init_from={tmp_path / "out" / "ckpt.pt"}', '--max_iters=10'
    )  # its own checkpoint: as 'resume'
    assert list(losses(tmp_path / 'out')) == list(range(10))


def test_a_run_resumes_in_another_dtype(train, tmp_path):
    train()
    for i, dtype in enumerate(('float16', 'float32'), 1):
        assert (
            train('--init_from=resume', f'--dtype={dtype}', f'--max_iters={8 + 2 * i}').status == 0
        )
    assert list(losses(tmp_path / 'out')) == list(range(12))


def test_skipped_steps_are_counted_over_a_resume(train, tmp_path, monkeypatch):
    step, calls = AdamW.step, []

    def with_one_not_finite(self, *args):
        calls.append(self)
        if len(calls) == 4:
            self.param_groups[0]['params'][0].grad[0] = float('inf')
        return step(self, *args)

    monkeypatch.setattr(AdamW, 'step', with_one_not_finite)
    train()
    train('--init_from=resume', '--max_iters=10')
    steps = entries(tmp_path / 'out', 'train')
    assert [e['skipped_steps'] for e in steps] == [0, 0, 0] + [1] * 7
    assert steps[3]['grad_norm'] is None  # not finite: no number in JSON


def test_two_runs_cannot_write_to_one_out_dir(train, tmp_path, dataset):
    process = start(tmp_path / 'out', dataset, '--max_iters=100000', '--eval_interval=100000')
    for line in process.stdout:
        if line.startswith('iter 2:'):
            break
    bad(train(), 'another run is writing to')
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert max(losses(tmp_path / 'out')) >= 2


# -- what a user gets wrong


def bad(outcome, *says):
    assert outcome.status == 2, outcome.out
    assert outcome.err.startswith('error: ') and outcome.err.count('\n') == 1, outcome.err
    assert 'Traceback' not in outcome.err
    for text in says:
        assert text in outcome.err, outcome.err


@pytest.mark.parametrize(
    'argument, says',
    [
        ('--learning_rat=1', "did you mean 'learning_rate'?"),
        ('--batch_size=2.5', 'whole number'),
        ('config/train_char_cpx.py', 'did you mean config/train_char_cpr.py?'),
        ('--dataset=nowhere', 'shakespeare_char'),
        ('--dataset=shakespeare', 'python data/shakespeare/prepare.py'),
        ('--n_head=3', 'n_embd=16 is not divisible by n_head=3'),
        ('--learning_rate=-1.0', 'learning_rate=-1.0 must be >= 0'),
        ('--learning_rate=nan', 'learning_rate'),
        ('--learning_rate=1e999', 'finite'),
        ('--batch_size=0', 'batch_size=0 must be >= 1'),
        ('--gradient_accumulation_steps=0', 'must be >= 1'),
        ('--block_size=0', 'must be >= 1'),
        ('--block_size=100000', 'lower block_size'),
        ('--eval_interval=0', 'must be >= 1'),
        ('--log_interval=0', 'must be >= 1'),
        ('--norm_log_interval=0', 'must be >= 1'),
        ('--dropout=1.0', 'in [0, 1)'),
        ('--beta2=1.0', 'in [0, 1)'),
        ('--seed=-1', '>= 0'),
        ('--wn_rate=1.5', 'wn_rate=1.5 must be in [0, 1]'),
        ('--wn_rate=-0.5', 'wn_rate=-0.5 must be in [0, 1]'),
        ('--optimizer=adam', 'one of adamw adamcpr adamwn adamh'),
        ('--order=during', 'one of auto before after'),
        ('--impl=cuda', "impl='cuda'"),
        ('--device=cuda', '--device=cpu'),
        ('--device=tpu9', 'cannot be used here'),
        ('--device=hpu', 'cannot be used here'),
        ('--dtype=float8', 'dtype'),
        ('--lr_decay_iters=1', 'warmup_iters'),
        ('--init_from=resume', 'there is no checkpoint at'),
        ('--init_from=nowhere/ckpt.pt', 'nowhere/ckpt.pt'),
        ('--init_from=resme', "'resume'"),
        ('--seed=99999999999999999999', 'less than 2**63'),
        ('--learning_rate=' + '1' * 400, 'finite'),
        ('--device=meta', 'not supported'),
        ('--max_iters={[]}', 'whole number'),
        ('--wn_scope=all', 'one of tensor global'),
        ('--wn_from=nowhere', 'log.jsonl'),
    ],
)
def test_a_wrong_setting_ends_with_one_error_line_and_writes_nothing(
    train, tmp_path, argument, says, monkeypatch
):
    if argument == '--device=cuda' and torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    bad(train(argument), says)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'arguments, says',
    [
        (
            ('--kappa_init_method=warm_start', '--kappa_init_param=0'),
            'kappa_init_param=0.0 must be > 0',
        ),
        (('--kappa_init_method=uniform', '--kappa_init_param=0'), 'must be > 0'),
        (('--kappa_init_method=warm_start', '--kappa_init_param=2.5'), 'whole number of steps'),
        (('--kappa_init_method=sometimes',), 'inflection_point'),
        (('--reg_function=l3',), 'huber'),
        (('--reg_step_size=0',), '>= 1'),
        (('--reg_ema_decay=1.0',), 'in [0, 1)'),
        (('--kappa_update=-1',), '>= 0'),
    ],
)
def test_impossible_settings_of_adamcpr_end_with_one_error_line(train, tmp_path, arguments, says):
    bad(train('--optimizer=adamcpr', *arguments), says)
    assert not (tmp_path / 'out').exists()


def test_damaged_data_ends_with_one_error_line(train, tmp_path, dataset):
    folder = tmp_path / 'd'
    folder.mkdir()
    meta = json.loads((dataset / 'meta.json').read_text())
    for content, says in (
        (b'\0' * 2001, 'odd'),
        (b'\0' * 20, 'block of 16'),
        (b'\xff\x00' * 1000, 'vocabulary'),
    ):
        for name in ('train', 'val'):
            (folder / f'{name}.bin').write_bytes(content)
            meta[f'{name}_tokens'] = len(content) // 2
        (folder / 'meta.json').write_text(json.dumps(meta))
        bad(train(f'--dataset={folder}'), says)
    (folder / 'meta.json').write_text('{')
    bad(train(f'--dataset={folder}'), 'meta.json')


def test_a_damaged_checkpoint_ends_with_one_error_line_and_stays(train, tmp_path):
    train('--keep_checkpoints=1')
    path = tmp_path / 'out' / 'ckpt.pt'
    whole = path.read_bytes()
    for content in (
        whole[: len(whole) // 2],
        b'',
        b'not a checkpoint',
        whole[:-1000] + b'\0' * 1000,
    ):
        path.write_bytes(content)
        bad(train('--init_from=resume', '--max_iters=20'), 'ckpt.pt')
        bad(train('--init_from=auto', '--max_iters=20'), 'ckpt.pt')
        assert path.read_bytes() == content
    torch.save({'something': 1}, path)
    bad(train('--init_from=resume'), 'ckpt.pt')


@pytest.mark.parametrize(
    'argument', ['--n_layer=3', '--n_embd=32', '--n_head=4', '--block_size=8', '--bias=True']
)
def test_resuming_with_another_architecture_ends_with_one_error_line(train, tmp_path, argument):
    train()
    before = (tmp_path / 'out' / 'log.jsonl').read_bytes()
    bad(
        train('--init_from=resume', '--max_iters=20', argument),
        argument[2:].partition('=')[0],
        'the checkpoint has',
    )
    assert (tmp_path / 'out' / 'log.jsonl').read_bytes() == before


def test_resuming_with_another_optimizer_says_what_is_kept_and_asks_for_the_flag(train):
    train()
    bad(
        train('--init_from=resume', '--max_iters=20', '--optimizer=adamcpr'),
        '--switch_optimizer=True',
        'moments',
    )


def test_an_out_dir_that_cannot_be_written_ends_with_one_error_line(train, tmp_path):
    (tmp_path / 'file').write_text('')
    bad(train(out='file'), "out_dir='")
    bad(train(out='file/below'), "out_dir='")


def test_wn_from_a_run_without_norms_ends_with_one_error_line(train, tmp_path):
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'log.jsonl').write_text(
        '{"kind": "eval", "iter": 0, "train_loss": 1, "val_loss": 1}\n'
    )
    bad(train('--optimizer=adamwn', f'--wn_from={tmp_path / "old"}'), 'recorded no norms')
    train('--n_layer=1')
    bad(train('--optimizer=adamwn', f'--wn_from={tmp_path / "out"}', out='wn'), 'n_layer')


@pytest.mark.parametrize(
    'edit, says',
    [
        (lambda c: c.pop('optimizer'), 'optimizer'),
        (lambda c: c['optimizer']['state'][0].pop('exp_avg'), 'exp_avg of parameter 0'),
        (
            lambda c: c['optimizer']['state'][1].update(exp_avg_sq=torch.zeros(3)),
            'exp_avg_sq of parameter 1',
        ),
        (lambda c: c['model_args'].update(unknown=1), 'unknown'),
        (lambda c: c.update(config=None), 'ckpt.pt'),
        (lambda c: c.update(model=None), 'ckpt.pt'),
        (lambda c: c['model'].pop('transformer.wpe.weight'), 'wpe'),
    ],
)
def test_a_checkpoint_that_does_not_fit_ends_with_one_error_line(train, tmp_path, edit, says):
    train()
    path = tmp_path / 'out' / 'ckpt.pt'
    saved = torch.load(path, weights_only=True)
    edit(saved)
    torch.save(saved, path)
    before = (tmp_path / 'out' / 'log.jsonl').read_bytes()
    bad(train('--init_from=resume', '--max_iters=12'), says)
    assert (tmp_path / 'out' / 'log.jsonl').read_bytes() == before


def test_resuming_adamcpr_with_another_kind_of_bound_asks_for_the_flag(train, tmp_path):
    train('--optimizer=adamcpr')
    other = (
        '--optimizer=adamcpr',
        '--kappa_init_method=dependent',
        '--kappa_init_param=0.5',
        '--max_iters=12',
    )
    bad(
        train('--init_from=resume', *other),
        'kappa_init_method=inflection_point',
        '--switch_optimizer=True',
    )
    assert train('--init_from=resume', '--switch_optimizer=True', *other).status == 0
    assert (
        entries(tmp_path / 'out', 'norms')[-1]['tensors']['transformer.h.0.mlp.c_fc.weight'][
            'kappa'
        ]
        > 0
    )
    bad(
        train('--init_from=resume', *other, '--kappa_init_param=0.7', '--max_iters=16'),
        'kappa_init_param=0.5',
    )
    bad(
        train('--init_from=resume', *other, '--reg_embedding=True', '--max_iters=16'),
        'reg_embedding=False',
    )


def test_wandb_that_does_not_start_ends_with_one_error_line_and_leaves_the_log(
    train, tmp_path, monkeypatch
):
    train()
    before = (tmp_path / 'out' / 'log.jsonl').read_bytes()
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as if it were not installed
    bad(train('--wandb_log=True'), 'wandb')
    assert (tmp_path / 'out' / 'log.jsonl').read_bytes() == before


# -- what goes wrong by itself


def test_fewer_checkpoints_are_kept_when_fewer_are_asked_for(train, tmp_path):
    train('--always_save_checkpoint=True', '--checkpoint_interval=2', '--keep_checkpoints=4')
    assert (tmp_path / 'out' / 'ckpt.3.pt').exists()
    train('--init_from=resume', '--max_iters=12', '--keep_checkpoints=1')
    assert [p.name for p in (tmp_path / 'out').glob('ckpt*')] == ['ckpt.pt']


def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it_and_the_log_says_so(train, tmp_path):
    train('--max_iters=12', out='whole')
    for content in (
        lambda b: b[: len(b) // 2],
        lambda b: b[:60000] + bytes([b[60000] ^ 1]) + b[60001:],
    ):
        train()
        path = tmp_path / 'out' / 'ckpt.pt'
        path.write_bytes(content(path.read_bytes()))
        outcome = train('--max_iters=12', '--init_from=auto')
        assert (
            outcome.status == 0
            and 'ckpt.pt is damaged' in outcome.out
            and 'at iteration 4' in outcome.out
        )
        assert losses(tmp_path / 'out') == losses(tmp_path / 'whole')
        entry = entries(tmp_path / 'out', 'damaged')[0]
        assert entry['iter'] == 4 and entry['used'].endswith('ckpt.1.pt') and entry['reason']
        assert {p.name for p in (tmp_path / 'out').glob('ckpt*')} >= {
            'ckpt.1.pt',
            'ckpt.pt',
            'ckpt.pt.damaged',
        }


def test_as_many_checkpoints_are_kept_as_asked_and_a_new_run_starts_without_them(train, tmp_path):
    train('--keep_checkpoints=3', '--checkpoint_interval=1', '--eval_interval=8')
    kept = {p.name: checkpoint.load(p)['iter_num'] for p in (tmp_path / 'out').glob('ckpt*')}
    assert kept == {'ckpt.pt': 8, 'ckpt.1.pt': 7, 'ckpt.2.pt': 6}
    train('--max_iters=2')
    kept = {p.name: torch.load(p)['iter_num'] for p in (tmp_path / 'out').glob('ckpt*')}
    assert kept == {'ckpt.pt': 2, 'ckpt.pt.old': 8}


def test_files_of_the_users_own_beside_the_checkpoints_stay(train, tmp_path):
    out = tmp_path / 'out'
    (out / 'ckpt-best2').mkdir(parents=True)
    own = [out / 'ckpt.5000.pt', out / 'ckpt-best2' / '.metadata']
    for path in own:
        path.write_bytes(b'of the user')
    for more in (), ('--max_iters=12', '--init_from=auto'), ():
        assert train('--checkpoint_interval=1', *more).status == 0
    (out / 'model.1.pt').write_bytes(b'of the user')
    checkpoint.save(out / 'model.pt', {})
    assert all(path.read_bytes() == b'of the user' for path in (*own, out / 'model.1.pt'))


def test_a_jump_of_the_loss_is_marked_in_the_log_and_after_a_resume_just_so(
    train, tmp_path, monkeypatch
):
    step = AdamW.step

    def spoil(self, *args):
        result = step(self, *args)
        if self.state[self.param_groups[0]['params'][0]]['step'] == 6:
            self.param_groups[0]['params'][0].data.mul_(300)
        return result

    train()
    assert not any('spike' in e for e in entries(tmp_path / 'out', 'train'))
    monkeypatch.setattr(AdamW, 'step', spoil)
    outcome = train(out='spoilt')
    assert [e['iter'] for e in entries(tmp_path / 'spoilt', 'train') if e.get('spike')] == [6, 7]
    assert outcome.out.count('SPIKE') == 2
    train('--max_iters=6', out='resumed')
    train('--init_from=resume', out='resumed')
    train('--loss_spike=0.0', out='off')
    for out, marked in (('resumed', [6, 7]), ('off', [])):
        assert [e['iter'] for e in entries(tmp_path / out, 'train') if e.get('spike')] == marked


def test_steps_without_a_finite_gradient_end_the_run_with_the_tensors_at_fault(
    train, tmp_path, monkeypatch
):
    step, calls = AdamW.step, []

    def not_finite(self, *args):
        calls.append(self)
        if len(calls) > 5:
            self.param_groups[0]['params'][1].grad.fill_(float('nan'))
        return step(self, *args)

    monkeypatch.setattr(AdamW, 'step', not_finite)
    outcome = train('--max_iters=100', '--max_skipped_steps=3')
    bad(outcome, 'no finite gradient in 3 steps up to iteration 7', 'transformer.wpe.weight nan')
    assert max(losses(tmp_path / 'out')) == 7
    assert train('--max_iters=12', '--max_skipped_steps=0', out='never').status == 0


@pytest.mark.parametrize('weight', [math.nan, 1e38])
def test_a_run_that_broke_down_leaves_its_checkpoints(train, tmp_path, monkeypatch, weight):
    """With weights of 1e38 the loss is nan, and so are the gradients: no step changes a weight."""
    step, steps = AdamW.step, []

    def spoil(self, *args):
        result = step(self, *args)
        steps.append(self)
        if len(steps) == 6:
            self.param_groups[0]['params'][0].data.fill_(weight)
        if len(steps) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(AdamW, 'step', spoil)
    outcome = train('--max_iters=100', '--eval_interval=4', '--max_skipped_steps=0')
    assert outcome.status == 128 + signal.SIGTERM
    assert 'wrote no checkpoint, since the loss or a weight is not finite' in outcome.out
    kept = {p.name: checkpoint.load(p)['iter_num'] for p in (tmp_path / 'out').glob('ckpt*.pt')}
    assert kept == {'ckpt.pt': 4}


def test_weights_that_are_no_numbers_do_not_replace_the_checkpoints(train, tmp_path, monkeypatch):
    step = AdamW.step

    def spoil(self, *args):
        result = step(self, *args)
        if self.state[self.param_groups[0]['params'][0]]['step'] == 5:
            self.param_groups[0]['params'][0].data.fill_(float('nan'))
        return result

    monkeypatch.setattr(AdamW, 'step', spoil)
    bad(
        train('--max_iters=100', '--max_skipped_steps=8', '--eval_interval=1'), 'no finite gradient'
    )
    kept = [checkpoint.load(tmp_path / 'out' / name) for name in ('ckpt.pt', 'ckpt.1.pt')]
    assert any(all(x.isfinite().all() for x in saved['model'].values()) for saved in kept)
