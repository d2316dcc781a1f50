"""Test compare.py: its report against logs written by hand, and tiny runs of its own."""

import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY
from matplotlib.figure import Figure
from test_plot import write_log

import compare
from runtime import log as runlog
from runtime import report

ADAMW, WN = 'config/train_char_adamw.py', 'config/train_char_wn.py'
SMALL = [word for word in TINY if not word.startswith('--eval_iters')] + ['--log_interval=2']


def start(out, *arguments, **options):
    """Start compare.py as its user does."""
    command = [sys.executable, 'compare.py', *map(str, arguments), f'--out={out}', *SMALL]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes, **options)


def results(out):
    """Return {(config, seed): line of results.jsonl}, without its place and speed."""
    elsewhere = ('out_dir', 'ms', 'tokens_per_s', 'command')
    found = {}
    for line in map(json.loads, (out / 'runs' / 'results.jsonl').read_text().splitlines()):
        run = line['config'], line['seed']
        found[run] = {k: v for k, v in line.items() if k not in elsewhere}
    return found


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def recipe(dataset, tmp_path_factory):
    """Compare AdamW with AdamWN to its norms, two seeds: the folder and the arguments."""
    out = tmp_path_factory.mktemp('results') / 'recipe'
    wn = f'{WN} --wn_from={{1}} --wn_ramp_iters=2'
    arguments = [ADAMW, wn, '--seeds=1,2', f'--dataset={dataset}']
    process = start(out, *arguments, '--jobs=2')
    _, err = process.communicate()
    assert process.returncode == 0, err
    return out, arguments


@pytest.fixture
def finished(tmp_path):
    """Return finished(name, val_losses of a seed, ...), which makes a Config with these logs."""

    def make(name, *val_losses, optimizer='adamw', ratio=2.0, ms=10.0, mfu=None, **changes):
        config = report.Config([f'config/{name}.py'], name)
        speed = {'ms': ms, 'tokens_per_s': 2e4 / ms, 'mfu': mfu}
        defaults, _ = compare.configure(compare.train_settings()[0], [])
        settings = {**defaults, 'optimizer': optimizer, **changes}
        for seed, losses in enumerate(val_losses, 1):
            settings['max_iters'] = 100 * len(losses) - 100
            entries = [{'kind': 'config', 'config': settings}]
            entries += [{'kind': 'train', 'iter': i, 'loss': 1.0, **speed} for i in range(3)]
            for i, loss in enumerate(losses):
                evaluation = {'iter': 100 * i, 'train_loss': 1.0, 'val_loss': loss}
                entries.append({'kind': 'eval', **evaluation})
            entries.append({'kind': 'norms', 'iter': 0, 'ratio': 1.0, 'tensors': {}})
            entries.append({'kind': 'norms', 'iter': 100, 'ratio': ratio, 'tensors': {}})
            out_dir = write_log(tmp_path / name / str(seed), entries)
            run = report.Run(seed, out_dir, [f'config/{name}.py'], settings=settings)
            run.entries = runlog.read(out_dir)
            run.result = report.result_of(run, config)
            config.runs.append(run)
        return config

    return make


def test_the_report_says_what_the_logs_say(finished):
    first = finished(
        'first', [4.0, 2.0, 1.0, 1.1], [4.0, 2.0, 1.2, 1.3], [4.0, 2.0, 1.3, 1.5], ratio=3.0
    )
    second = finished(
        'second', [4.0, 1.1, 0.9, 0.9], [4.0, 1.5, 1.3, 1.2], [4.0, 2.0, 2.0, 1.9], ms=20.0, mfu=0.3
    )
    rows = report.table([first, second])
    # differences -0.2, -0.1, 0.4: deviation 0.3215, over sqrt(3)
    assert rows[0][2:] == ['1.3000 ± 0.2000', '1.1667 ± 0.1528', '', '200', '3.00', '10.0', '2,000']
    assert rows[1][2:] == [
        '1.3333 ± 0.5132',
        '1.3333 ± 0.5132',
        '+0.0333 ± 0.1856',
        '150 (2 of 3 seeds)',
        '2.00',
        '20.0',
        '1,000 (30.0% MFU)',
    ]


@pytest.mark.parametrize(
    'differences, p',
    [
        ((-0.01, -0.02, -0.03), 0.0742),  # p as scipy.stats.ttest_rel has it
        ((-0.02, -0.02, -0.03), 0.0198),
        ((0.10, 0.11, 0.02, 0.01, 0.05), 0.0447),
        ((0.10, 0.11, 0.02, -0.01, 0.05), 0.0764),
        ((0.0, 0.0, 0.0), None),
        ((0.5,), None),
    ],
)
def test_a_star_marks_a_paired_t_test_below_5_percent(finished, differences, p):
    starts = [1.0 + 0.1 * i for i in range(len(differences))]
    first = finished('first', *([start] for start in starts))
    second = finished(
        'second', *([start + d] for start, d in zip(starts, differences, strict=True))
    )
    row = report.table([first, second])[1]
    assert row[4].endswith(' *') == (p is not None and p < 0.05)
    mean, _, half = report.difference(second, first)
    assert not p or (abs(mean) > half) == (p < 0.05)  # the interval leaves out 0


def test_a_run_that_blew_up_is_reported_as_such(finished):
    first = finished('first', [4.0, 2.0], [4.0, 2.1])
    second = finished('second', [4.0, None], [4.0, 2.0])
    row = report.table([first, second])[1]
    assert row[2:5] == ['inf', '3.0000 ± 1.4142', '+inf']
    assert 'inf' in report.text([first, second], 'results/x', [], {}, {})


def test_of_two_that_blew_up_none_is_lower(finished):
    first = finished('first', [4.0, None], [4.0, None], [4.0, 2.0])
    second = finished('second', [4.0, None], [4.0, 2.0], [4.0, None])
    assert report.table([first, second])[1][4] == '+nan'
    # what ends at infinity is not reached: only the third seed of the first has a final loss
    assert report.table([first, second])[1][5] == 'never'


def test_the_report_counts_what_was_tried_for_each_optimizer(finished):
    configs = [
        finished('a', [1.0]),
        finished('b', [0.9]),
        finished('c', [0.8], optimizer='adamcpr'),
    ]
    text = report.text(configs, 'results/x', [], {}, {})
    assert 'AdamW 2, AdamCPR 1' in text and 'AdamW 0.9000; AdamCPR 0.8000' in text


def test_of_many_configs_the_pictures_show_the_first_and_the_best_of_each_file(
    finished, tmp_path, monkeypatch
):
    configs = [finished(f'adamw weight_decay={i}', [4.0, 3.0, 2.0 - i]) for i in range(4)]
    configs += [
        finished(f'cpr kappa_init_param={i}', [4.0, 3.0, 1.5 + i], optimizer='adamcpr')
        for i in range(4)
    ]
    shown = []
    monkeypatch.setattr(
        'runtime.figures.loss_figure',
        lambda runs: shown.extend(run.name for run in runs) or Figure(),
    )
    captions = report.draw(configs, tmp_path)
    assert shown == ['adamw weight_decay=0', 'adamw weight_decay=3', 'cpr kappa_init_param=0']
    assert all((tmp_path / name).exists() for name in captions)


def test_two_evaluations_make_no_curve_of_losses(finished, tmp_path):
    assert 'loss.png' not in report.draw([finished('adamw', [4.0, 2.0])], tmp_path)
    assert 'loss.png' in report.draw([finished('adamw', [4.0, 3.0, 2.0])], tmp_path)


def test_the_tuning_picture_has_a_line_a_learning_rate_over_the_setting_of_each_rule(finished):
    def config(optimizer, rate, **settings):
        name = f'{optimizer} {rate} {settings}'
        loss = rate + sum(x for x in settings.values() if isinstance(x, float))
        return finished(name, [4.0, loss], optimizer=optimizer, learning_rate=rate, **settings)

    grid = [config('adamw', rate, weight_decay=d) for rate in (0.1, 0.2) for d in (1.0, 0.5, 0.0)]
    single = config('adamh', 0.1, adamh_step_scale=1.0)
    (ax,) = report.tuning_figure([*grid, single]).axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ['0', '0.5', '1']
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.1, 0.6, 1.1], [0.2, 0.7, 1.2]]
    assert ax.get_ylim()[1] > 1.2
    (ax,) = report.tuning_figure([grid[0], grid[2], grid[4]]).axes  # gaps are bridged
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.1, 1.1], [0.7]]
    (ax,) = report.tuning_figure([*grid, config('adamw', 0.3, weight_decay=9.0)]).axes
    assert 1.2 < ax.get_ylim()[1] < 9

    inflection = config('adamcpr', 0.1)  # has no setting to tune
    chosen = [
        finished(
            f'ws {steps}',
            [3.0],
            optimizer='adamcpr',
            kappa_init_method='warm_start',
            kappa_init_param=steps,
            learning_rate=0.1,
        )
        for steps in (50.0, 100.0)
    ]
    (_, ax) = report.tuning_figure([*grid, inflection, *chosen]).axes
    lines = [line for line in ax.lines if len(line.get_ydata())]
    drawn = [(line.get_linestyle(), line.get_ydata()[0]) for line in lines]
    assert drawn[0] == ('-', 3.0) and drawn[-1] == ('--', 0.1)
    assert report.tuning_figure([inflection, single]) is None
    uniform = [
        config('adamcpr', 0.1, kappa_init_method='uniform', kappa_init_param=k) for k in (1.0, 10.0)
    ]
    (_, ax) = report.tuning_figure([*grid, *uniform]).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ['uniform 1', 'uniform 10']


def test_pictures_call_the_configs_by_what_tells_them_apart():
    for names, labels in (
        (
            ['train_char_adamw lr=1 wd=0', 'train_char_adamw lr=1 wd=1', 'train_char_wn lr=1'],
            ['adamw wd=0', 'adamw wd=1', 'wn'],
        ),
        (['train_char_wn', 'train_char_wn k=1'], ['wn', 'wn k=1']),
    ):
        assert report.labels([report.Config([], name) for name in names]) == labels


def test_every_number_is_that_of_a_train_py_run(recipe, script, tmp_path):
    out, _ = recipe
    for line in map(json.loads, (out / 'runs' / 'results.jsonl').read_text().splitlines()):
        entries = runlog.read(line['out_dir'])
        assert line['val_losses'] == {
            str(e['iter']): e['val_loss'] for e in entries if e['kind'] == 'eval'
        }
    again = tmp_path / 'again'  # the last run, by its command
    outcome = script('train.py', *line['command'].split()[2:], f'--out_dir={again}')
    assert outcome.status == 0, outcome.err
    val_losses = [e['val_loss'] for e in runlog.read(again) if e['kind'] == 'eval']
    assert val_losses == list(line['val_losses'].values())


def test_a_number_in_braces_is_the_run_of_that_config_with_the_same_seed(recipe):
    out, _ = recipe
    for seed in (1, 2):
        settings = [
            runlog.read(path)[0]['config'] for path in sorted((out / 'runs').glob(f'*/seed{seed}'))
        ]
        assert settings[1]['wn_from'] == settings[0]['out_dir'] and settings[1]['seed'] == seed


def test_the_pictures_of_norms_leave_embeddings_and_layer_norms_out():
    tensors = {
        'transformer.wte.weight': dict(norm=100.0, ratio=10.0, step=0.5),
        'transformer.h.0.ln_1.weight': dict(norm=100.0, ratio=10.0, step=0.5),
        'transformer.h.0.attn.c_attn.weight': dict(norm=6.0, ratio=2.0, step=0.1),
        'transformer.h.0.mlp.c_proj.weight': dict(norm=8.0, ratio=2.0, step=0.1),
    }
    entry = {'kind': 'norms', 'iter': 3, 'tensors': tensors}
    found = report.of_matrices(entry)
    assert [found['ratio'], found['step']] == pytest.approx([10 / 5, 0.1])
    assert [*found['tensors']] == [*tensors][2:]
    tensors['transformer.h.0.mlp.c_proj.weight'] = dict(norm=8.0, ratio=2.0)
    assert math.isnan(report.of_matrices(entry)['step'])


def test_the_report_names_all_commands_pictures_and_the_machine(recipe):
    out, arguments = recipe
    text = (out / 'report.md').read_text()
    command = text.split('```')[1].replace('\\\n', '')
    given = [*arguments, '--jobs=2', f'--out={out}', *SMALL]
    assert shlex.split(command) == ['python', 'compare.py', *given]
    pictures = sorted(path.name for path in out.glob('*.png'))
    assert pictures == ['final.png', 'loss.png', 'ratio.png', 'step.png']
    assert all(f'({name})' in text for name in pictures)
    assert 'torch' in text and 'not recorded' not in text


def test_a_run_from_before_a_setting_was_added_had_its_default(recipe, tmp_path):
    """`init_std` stands for the new setting."""
    text = (recipe[0] / 'runs' / 'train_char_adamw' / 'seed1' / 'log.jsonl').read_text()
    config, _, rest = text.partition('\n')
    entry = json.loads(config)
    del entry['config']['init_std']
    (tmp_path / 'log.jsonl').write_text(json.dumps(entry) + '\n' + rest)
    run = report.Run(1, str(tmp_path), ['--init_std=0.02'])
    assert compare.is_finished(run)
    run.arguments = ['--init_std=0.06']
    with pytest.raises(SystemExit):
        compare.is_finished(run)


def test_finished_runs_are_not_made_again(recipe):
    out, arguments = recipe
    before, text = files(out / 'runs'), (out / 'report.md').read_text()
    process = start(out, *arguments, '--jobs=2')
    _, err = process.communicate()
    assert process.returncode == 0, err
    after, written = files(out / 'runs'), out / 'runs' / 'results.jsonl'
    assert after.pop(written) > before.pop(written)
    assert after == before and (out / 'report.md').read_text() == text


def test_a_run_from_anothers_checkpoint_waits_until_it_is_finished(tmp_path, dataset):
    out, common = tmp_path / 'out', [f'--dataset={dataset}', '--seeds=1', '--jobs=2']
    onwards = f'{ADAMW} --init_from={{1}}/ckpt.pt --learning_rate=0.0 --min_lr=0.0 --max_iters=12'
    process = start(out, ADAMW, onwards, *common)
    _, err = process.communicate()
    assert process.returncode == 0, err
    first, second = (
        json.loads(line) for line in (out / 'runs' / 'results.jsonl').read_text().splitlines()
    )
    assert second['val_losses'] == {'8': first['final_val_loss'], '12': first['final_val_loss']}

    _, err = start(out, ADAMW, f'--init_from={tmp_path}/ckpt.pt', *common).communicate()
    assert 'made with init_from=scratch, not init_from=' in err
    (out / 'runs' / 'made.jsonl').write_text('{"out_dir": "cut o')
    assert start(out, ADAMW, *common).wait() == 0
    assert 'not recorded' in (out / 'report.md').read_text()


def test_killed_at_any_moment_it_goes_on_to_the_same_numbers(recipe, tmp_path):
    out, arguments = tmp_path / 'killed', [word for word in recipe[1] if not word.startswith(WN)]
    process = start(out, *arguments, '--jobs=1', start_new_session=True)
    while not list(out.glob('runs/*/seed2/log.jsonl')):  # until the second run has started
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = files(out / 'runs' / 'train_char_adamw' / 'seed1')
    process = start(out, *arguments, '--jobs=2')
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert files(out / 'runs' / 'train_char_adamw' / 'seed1') == done
    assert results(out).items() <= results(recipe[0]).items() and len(results(out)) == 2


def test_other_settings_than_those_of_the_runs_there_are_refused(recipe, monkeypatch, capsys):
    out, arguments = recipe
    before = files(out)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match='2'):
        compare.main([*arguments, f'--out={out}', *SMALL, '--weight_decay=0.7'])
    assert 'made with weight_decay=0.1, not weight_decay=0.7' in capsys.readouterr().err
    assert files(out) == before


@pytest.fixture
def kept(recipe, tmp_path, monkeypatch, capsys):
    """Return (folder, call): a copy of the recipe's first config, and compare.py to run on it.

    call(...) returns (exit status, standard output, standard error).
    """
    out = tmp_path / 'kept'
    shutil.copytree(recipe[0] / 'runs' / 'train_char_adamw', out / 'runs' / 'train_char_adamw')
    shutil.copy(recipe[0] / 'runs' / 'made.jsonl', out / 'runs')
    monkeypatch.chdir(ROOT)

    def call(*arguments):
        capsys.readouterr()
        words = [word for word in recipe[1] if not word.startswith(WN)]
        try:
            compare.main([*words, f'--out={out}', *SMALL, *arguments])
            status = 0
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return out, call


def damage(path, number, line):
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(line)
    path.write_text('\n'.join(lines) + '\n')


@pytest.mark.parametrize(
    'change',
    [
        {'kind': None},
        {'kind': 7},
        {'iter': 'one'},
        {'iter': None},
        {'val_loss': 'low', 'loss': 'low', 'ratio': 'low'},
        {'ms': 'slow'},
        {'train_loss': []},
    ],
)
def test_a_damaged_entry_of_a_log_is_left_out_with_a_word(kept, change):
    out, call = kept
    path = out / 'runs' / 'train_char_adamw' / 'seed1' / 'log.jsonl'
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for kind in ('norms', 'eval', 'train'):  # the first of each, at iteration 0
        number = next(i for i, entry in enumerate(entries) if entry['kind'] == kind)
        damage(path, number, {**entries[number], **change})
    status, _, err = call()
    assert status == 0 and err.startswith(f'note: {path}: ') and err.count('\n') == 1
    assert 'entries are damaged and left out' in err


def test_a_damaged_made_jsonl_is_left_out(kept):
    out, call = kept
    whole = json.loads((out / 'runs' / 'made.jsonl').read_text().splitlines()[0])
    out_dirs = [str(path) for path in sorted((out / 'runs').glob('*/*'))]
    lines = ['7', '[]', 'null', '{"out_dir": []}', '[' * 100000, '\xff', '{"date": 7}']
    for gpus in (None, [7], 'x'):
        lines.append(json.dumps({**whole, 'out_dir': out_dirs[0], 'gpus': gpus}))
    lines.append(json.dumps({**whole, 'out_dir': out_dirs[1], 'date': 'a sunny day'}))
    (out / 'runs' / 'made.jsonl').write_text('\n'.join(lines))
    assert call()[0] == 0
    text = (out / 'report.md').read_text()
    assert '- not recorded' in text and '- a sunny day' in text and 'nanoNorm at' in text


def test_a_run_whose_log_was_lost_after_its_end_says_how_to_go_on(recipe, kept):
    out, _ = kept
    (out / 'runs' / 'train_char_adamw' / 'seed2' / 'log.jsonl').unlink()
    process = start(out, *(word for word in recipe[1] if not word.startswith(WN)))
    _, err = process.communicate()
    assert process.returncode == 2 and err.startswith('error: ') and err.count('\n') == 1
    assert f'{out}/runs/train_char_adamw/seed2' in err and 'Delete that folder' in err


def test_the_halves_of_val_bin_make_up_the_final_loss(kept, dataset, monkeypatch):
    out, call = kept
    status, _, err = call('--halves')
    assert status == 0, err
    targets = (dataset / 'val.bin').stat().st_size // 2 - 1
    first = targets // 16 // 2 * 16  # whole blocks
    lines = [json.loads(line) for line in (out / 'runs' / 'results.jsonl').read_text().splitlines()]
    for line in lines:
        nats = first * line['val_loss_choose'] + (targets - first) * line['val_loss_report']
        assert nats / targets == pytest.approx(line['final_val_loss'], abs=1e-6)
        assert line['val_loss_choose'] != line['val_loss_report']
    text = (out / 'report.md').read_text()
    mean = (lines[0]['val_loss_report'] + lines[1]['val_loss_report']) / 2
    assert 'Chosen on one half' in text and f'| {mean:.4f} ± ' in text

    evaluate = compare.evaluate_halves
    monkeypatch.setattr(compare, 'evaluate_halves', None)  # they are kept
    assert call('--halves')[0] == 0 and (out / 'report.md').read_text() == text
    assert call()[0] == 0 and 'Chosen' not in (out / 'report.md').read_text()
    monkeypatch.setattr(compare, 'evaluate_halves', evaluate)
    for damaged in ('', '[]', 'null', '{"iter": 8}', '{"iter": 4}'):
        (out / 'runs' / 'train_char_adamw' / 'seed1' / 'halves.json').write_text(damaged)
        assert call('--halves')[0] == 0 and (out / 'report.md').read_text() == text


def test_halves_need_the_checkpoint_of_the_last_iteration(kept):
    out, call = kept
    path = out / 'runs' / 'train_char_adamw' / 'seed2' / 'ckpt.pt'
    torch.save({**torch.load(path), 'iter_num': 4}, path)
    status, _, err = call('--halves')
    assert status == 2 and f'{path} is of iteration 4' in err and err.count('\n') == 1
    path.unlink()
    status, _, err = call('--halves')
    assert status == 2 and f'{path}, which is not there' in err and f'delete {path.parent}' in err


def test_configs_are_chosen_on_one_half_and_compared_on_the_other(finished):
    losses = {  # of each seed, on the first half and on the second
        'adamw wd=0': ([1.0, 1.2, 1.1], [2.0, 2.1, 2.2]),
        'adamw wd=1': ([0.9, 1.1, 1.0], [2.3, 2.4, 2.2]),
        'cpr': ([0.5, 0.6, 0.7], [1.9, 2.2, 2.3]),
    }
    configs = []
    for name, (choose, second) in losses.items():
        configs.append(finished(name, [1.0], [1.0], [1.0]))
        for run, first_half, second_half in zip(configs[-1].runs, choose, second, strict=True):
            run.result.update(val_loss_choose=first_half, val_loss_report=second_half)
    rows = [line for line in report.halves_section(configs) if line.startswith('| ')][1:]
    assert rows[:3] == [
        '| 3 | `cpr` | 0.6000 ± 0.1000 | 2.1333 ± 0.2082 | +0.0333 [-0.2535, +0.3202] |',
        '| 2 | `adamw wd=1` | 1.0000 ± 0.1000 | 2.3000 ± 0.1000 | +0.2000 [-0.2303, +0.6303] |',
        '| 1 | `adamw wd=0` | 1.1000 ± 0.1000 | 2.1000 ± 0.1000 |  |',
    ]
    # the chosen of each file: -0.4, -0.2, 0.1, whose deviation is 0.2517
    assert rows[4] == '| `cpr` | `adamw wd=1` | -0.1667 [-0.7919, +0.4585] |'


@pytest.mark.parametrize(
    'config, says',
    [
        (f'{ADAMW} --weight_decai=1', "did you mean 'weight_decay'?"),
        (f'{ADAMW} --weight_decay=much', "weight_decay='much'"),
        (f'{ADAMW} --dropout=1.5', 'dropout=1.5 must be in [0, 1)'),
        (f'{ADAMW} --optimizer=sgd', "optimizer='sgd' must be one of adamw"),
        ('config/train_char_adamww.py', 'did you mean config/train_char_adamw.py?'),
    ],
)
def test_a_mistake_in_a_setting_is_found_before_any_run_starts(
    kept, monkeypatch, capsys, config, says
):
    out, _ = kept
    monkeypatch.setattr(subprocess, 'Popen', None)  # nothing can start
    with pytest.raises(SystemExit, match='2'):
        compare.main([ADAMW, config, '--seeds=7', f'--out={out}', *SMALL])
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1 and says in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


class FailedJob(compare.Job):
    def __init__(self, run, gpu, threads):
        self.run, self.latest = run, 'iter 7'
        self.errors = io.StringIO('a warning\nerror: the disk is full\n')
        self.process = subprocess.Popen(['false'])


def test_the_error_of_a_run_stands_below_the_progress_bar_on_its_own_line(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    monkeypatch.setattr(compare, 'Job', FailedJob)
    with pytest.raises(SystemExit, match='2'):
        compare.make([report.Run(1, 'runs/a/seed1', ['config/a.py'])], 1, None)
    lines = re.split('[\r\n]', terminal.getvalue())
    assert any('0/1' in line and 'a: iter 7' in line for line in lines)
    command = 'python train.py config/a.py'
    assert f'error: the disk is full (status 1 of: {command})' in lines


def test_no_more_jobs_are_made_ready_than_there_are_runs(kept, monkeypatch):
    out, call = kept
    shutil.rmtree(out / 'runs')
    asked = []

    def make(runs, jobs, after):
        asked.append(jobs)
        raise SystemExit(3)

    monkeypatch.setattr(compare, 'make', make)
    assert call('--jobs=8')[0] == 3 and asked == [2]


@pytest.mark.parametrize(
    'arguments, says',
    [
        ([ADAMW, '--out=x', '--seeds=1,1'], '--seeds=1,1'),
        ([ADAMW, '--out=x', '--seeds=1,01'], '--seeds=1,01'),
        ([ADAMW, '--out=x', '--seeds=１'], 'different whole numbers'),
        ([ADAMW, '--out=x', '--seeds=-1'], '--seeds=-1'),
        ([ADAMW, '--out=x', f'--seeds={1 << 63}'], 'below 2**63'),
        ([ADAMW, '--out=x', '--seeds=' + '9' * 5000], 'below 2**63'),
        ([ADAMW, '--out=x', '--seeds='], 'different whole numbers'),
        ([ADAMW, '--out=x', '--seeds=one'], '--seeds=one'),
        ([ADAMW, '--out=x', '--jobs=-1'], '--jobs=-1'),
        ([ADAMW, '--out=x', '--jobs=0'], '--jobs=0'),
        ([ADAMW, '--out=x', '--jobs=1000000000'], '--jobs=1000000000'),
        ([ADAMW], '--out'),
        (['--out=x'], 'CONFIG'),
        (['--out=x', f'{WN} --wn_from={{1}}'], '{1}'),
        (['--out=x', f'{WN} --wn_from={{2}}', ADAMW], '{2}'),
        (['--out=x', ADAMW, './' + ADAMW], 'two of the configs'),
        (['--out=x', ADAMW + " --out_dir='x"], 'in one pair of quotes'),
        (['--out=x', '--seeds=1', ' --weight_decay=1'], 'names no config file'),
        (['--out=x', ADAMW, '--seed=7'], '--seed=7'),
        ([ADAMW, '--out=x', WN], 'CONFIGs go before'),
        ([ADAMW, '--out=x', '--weight_decay', '1'], '--weight_decay is not'),
        (['--out=x', ADAMW + ' --eval_iters=2'], '--eval_iters=2'),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, says, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='2'):
        compare.main(arguments)
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1 and says in err
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_config_is_what_train_py_says(tmp_path, dataset):
    process = start(
        tmp_path / 'out', f'{ADAMW} --weight_decai=1', f'--dataset={dataset}', '--seeds=1'
    )
    _, err = process.communicate()
    assert process.returncode == 2 and "did you mean 'weight_decay'?" in err
    assert err.splitlines()[-1].startswith('error: ')
    assert not (tmp_path / 'out').exists()
