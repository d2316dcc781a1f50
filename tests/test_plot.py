"""Test plot.py: what it reads from a log, what it draws, and how it reports mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import plot
from runtime import figures

ROOT = Path(__file__).parent.parent
C_FC = 'transformer.h.0.mlp.c_fc.weight'
C_PROJ = 'transformer.h.1.mlp.c_proj.weight'
WTE = 'transformer.wte.weight'


def write_log(out_dir, entries):
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / 'log.jsonl').write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    return str(out_dir)


def train_losses(points):
    return [{'kind': 'train', 'iter': i, 'loss': loss} for i, loss in points]


def losses(final=1.7, iters=range(0, 1001, 10)):
    """Return log entries whose validation loss falls by 2.7 to `final`.

    The training loss is 0.1 below it.
    """
    fall = {i: 2.7 * np.exp(-i / 100) for i in iters}
    train = train_losses([(i, final - 0.1 + fall[i]) for i in iters])
    return train + [{'kind': 'eval', 'iter': i, 'val_loss': final + fall[i]} for i in iters[::10]]


def norms(growth=1.0, bounded=False, iters=range(0, 1001, 100)):
    """Return log entries whose norms grow by `growth` times the start in 1000 iterations.

    bounded: the matrices other than the embedding get their kappa at iteration 500.
    """
    starts = {WTE: 9, C_FC: 5, C_PROJ: 3}
    entries = []
    for i in iters:
        ratio = 1 + growth * i / 1000
        tensors = {name: {'norm': n * ratio, 'ratio': ratio} for name, n in starts.items()}
        if bounded:
            for name, lagmul in [(C_FC, 1e-5), (C_PROJ, 2e-5)]:
                kappa = tensors[name]['norm'] ** 2 if i >= 500 else None
                tensors[name] |= {'kappa': kappa, 'lagmul': lagmul * max(0, i - 500)}
        entries.append({'kind': 'norms', 'iter': i, 'ratio': ratio, 'tensors': tensors})
    return entries


@pytest.fixture
def runs(tmp_path):
    """Return the folders of a finished AdamW, AdamCPR and AdamWN run."""

    def write(name, optimizer, final, growth):
        config = {'kind': 'config', 'config': {'optimizer': optimizer}}
        entries = [config, *losses(final), *norms(growth, bounded=optimizer == 'adamcpr')]
        return write_log(tmp_path / name, entries)

    return [
        write('one', 'adamw', 1.9, 1.5),
        write('two', 'adamcpr', 1.7, 1.0),
        write('three', 'adamwn', 1.8, 0.5),
    ]


def load(tmp_path, entries):
    (run,) = figures.load_all([write_log(tmp_path / 'run', entries)])
    return run


def shows(path, colour):
    """Return whether the PNG has the expected size and a line's worth of pixels in `colour`."""
    picture = matplotlib.image.imread(path)
    height, width, _ = picture.shape
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    in_colour = np.isclose(picture[..., :3], rgb, atol=2 / 255).all(axis=-1)
    return width == 1200 and 600 <= height <= 800 and in_colour.sum() > 100


def finite_points(line):
    return np.isfinite(line.get_ydata()).sum()


def lines_in(ax, colour):
    return [line for line in ax.lines if line.get_color() == colour and finite_points(line)]


# ---------------------------------------------------------------------------- reading


def test_an_iteration_that_stands_twice_counts_once_with_its_later_line(tmp_path):
    run = load(tmp_path, train_losses([(0, 4), (10, 3), (20, 9), (10, 2)]))
    iters, values = run.series('train', 'loss')
    assert iters.tolist() == [0, 10, 20]
    assert values.tolist() == [4, 2, 9]


def test_null_infinite_and_absent_values_are_nan(tmp_path):
    run = load(tmp_path, train_losses(enumerate([None, np.nan, np.inf, 1e300])))
    assert np.isnan(run.series('train', 'loss')[1]).all()
    assert np.isnan(run.series('train', 'lr')[1]).all()
    assert [len(part) for part in run.series('eval', 'val_loss')] == [0, 0]


def test_kappa_is_nan_until_it_is_set(tmp_path):
    run = load(tmp_path, losses() + norms(bounded=True, iters=[300, 400, 500, 600]))
    iters, kappa = run.series('norms', 'kappa', C_FC)
    assert iters.tolist() == [300, 400, 500, 600]
    np.testing.assert_array_equal(kappa, [np.nan, np.nan, 7.5**2, 8.0**2])
    assert np.isnan(run.series('norms', 'kappa', WTE)[1]).all()


def test_growth_is_per_iteration_whatever_the_distance_of_the_log_points():
    iters, values = figures.growth(np.array([0.0, 10, 30, 40]), np.array([1.0, 2, 6, 5]))
    assert iters.tolist() == [10, 30, 40]
    np.testing.assert_allclose(values, [0.1, 0.2, -0.1])


def test_smoothing_keeps_a_constant_and_leaves_out_nan():
    values = np.full(100, 3.0)
    values[[0, 40, 99]] = np.nan
    np.testing.assert_allclose(figures.smooth(values), 3.0)
    assert len(figures.smooth(np.array([]))) == 0


def test_a_legend_names_the_optimizer_unless_the_folder_does(tmp_path):
    def name(folder, optimizer):
        entries = [{'kind': 'config', 'config': {'optimizer': optimizer}}, *losses()]
        return figures.load_all([write_log(tmp_path / folder, entries)])[0].name

    assert name('out', 'adamcpr') == 'out (AdamCPR)'
    assert name('gpt2-cpr', 'adamcpr') == 'gpt2-cpr'
    assert name('char_wn', 'adamwn') == 'char_wn'
    assert name('out-adamwn', 'adamw') == 'out-adamwn (AdamW)'


def test_runs_in_folders_of_the_same_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ('a', 'b'):
        write_log(tmp_path / folder / 'out', losses())
    assert [run.name for run in figures.load_all(['a/out', 'b/out/'])] == ['a/out', 'b/out']


def test_runs_whose_names_are_too_long_to_differ_are_numbered(tmp_path):
    name = 'a-long-name-of-{}-that-no-legend-has-room-for'
    folders = [tmp_path / name.format('one'), tmp_path / name.format('two')]
    for folder in folders:
        write_log(folder, [{'kind': 'eval', 'iter': 0, 'train_loss': 1.0, 'val_loss': 1.0}])
    assert [run.name[:2] for run in figures.load_all(folders)] == ['1:', '2:']


@pytest.mark.parametrize(
    'damaged',
    [
        {},
        {'kind': None},
        {'kind': ['train'], 'iter': 5, 'loss': 9},
        {'kind': 'train', 'loss': 9},
        {'kind': 'train', 'iter': None, 'loss': 9},
        {'kind': 'train', 'iter': '5', 'loss': 9},
        {'kind': 'train', 'iter': [5], 'loss': 9},
        {'kind': 'train', 'iter': 10**400, 'loss': 9},
        {'kind': 'train', 'iter': 5, 'loss': 'high'},
        {'kind': 'train', 'iter': 5},
        {'kind': 'eval', 'iter': 5},
        {'kind': 'eval', 'iter': 5, 'val_loss': {}},
        {'kind': 'norms', 'iter': 5, 'ratio': '1', 'tensors': {}},
        {'kind': 'norms', 'iter': 5, 'ratio': 1, 'tensors': []},
        {'kind': 'norms', 'iter': 5, 'ratio': 1, 'tensors': {WTE: 5}},
        {'kind': 'config', 'config': 'all'},
        {'kind': 'config', 'config': {'optimizer': 7}},
    ],
)
def test_an_entry_that_is_damaged_is_left_out_with_a_word(tmp_path, capsys, damaged):
    sound = [*losses(), *norms()]
    expected = load(tmp_path, sound)
    assert capsys.readouterr().err == ''
    run = load(tmp_path, [damaged, *sound, damaged])
    assert run == expected
    note = f'note: {tmp_path}/run/log.jsonl: 2 of its {len(sound) + 2} entries are damaged'
    assert capsys.readouterr().err == f'{note} and left out\n'


def test_values_of_a_tensor_that_are_no_numbers_are_nan(tmp_path):
    odd = {'norm': 'x', 'ratio': [], 'kappa': 10**400, 'lagmul': {}}
    entry = {'kind': 'norms', 'iter': 5, 'ratio': 1.0, 'tensors': {WTE: odd}}
    run = load(tmp_path, [entry, *losses()])
    for key in odd:
        assert np.isnan(run.series('norms', key, WTE)[1]).all()
    plot.main([str(tmp_path / 'run')])


# ---------------------------------------------------------------------------- choosing the tensor


def test_the_tensor_with_the_largest_lagmul_is_shown(runs):
    assert figures.choose_tensor(figures.load_all(runs)) == C_PROJ


def test_without_a_bound_at_work_the_largest_tensor_that_is_no_embedding_is_shown(tmp_path, runs):
    assert figures.choose_tensor(figures.load_all(runs[:1])) == C_FC
    early = load(tmp_path, losses() + norms(bounded=True, iters=[0, 100]))
    assert figures.choose_tensor([early]) == C_FC


def test_a_tensor_is_chosen_by_its_name_or_a_unique_part(runs):
    for wanted in (WTE, 'wte'):
        assert figures.choose_tensor(figures.load_all(runs), wanted) == WTE


# ---------------------------------------------------------------------------- drawing


def test_one_run_is_drawn_into_its_own_folder(runs, capsys):
    plot.main([runs[1]])
    paths = [os.path.join(runs[1], name) for name in ('loss.png', 'ratio.png', 'tensor.png')]
    assert capsys.readouterr().out.split() == paths
    assert shows(paths[0], figures.BLUE)
    kinds = 'wte', 'mlp.c_fc', 'mlp.c_proj'
    for colour in (figures.BLACK, *(figures.KINDS[kind] for kind in kinds)):
        assert shows(paths[1], colour)
    assert shows(paths[2], figures.BLUE)
    assert sorted(os.listdir(runs[1])) == ['log.jsonl', 'loss.png', 'ratio.png', 'tensor.png']


def test_several_runs_are_laid_over_each_other_in_plots(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plot.main(runs[:2])
    assert sorted(os.listdir('plots')) == ['loss.png', 'ratio.png', 'tensor.png']
    plot.main([*runs, '--out=elsewhere/pictures', '--tensor=h.1.mlp'])
    for name in ('loss.png', 'ratio.png', 'tensor.png'):
        for colour in figures.COLOURS[:3]:
            assert shows(f'elsewhere/pictures/{name}', colour)


def test_the_loss_picture_has_each_run_and_its_final_validation_loss(runs):
    (ax,) = figures.loss_figure(figures.load_all(runs)).axes
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[:3] == ['1.900   one (AdamW)', '1.700   two (AdamCPR)', '1.800   three (AdamWN)']
    for colour in figures.COLOURS[:3]:
        training, validation = lines_in(ax, colour)
        assert validation.get_linewidth() > training.get_linewidth()


def test_the_ratio_picture_has_every_tensor_of_one_run_and_the_totals_of_several(runs):
    (ax,) = figures.norms_figure(figures.load_all(runs[:1]), figures.RATIO).axes
    assert len(ax.lines) == 1 + 3
    (ax,) = figures.norms_figure(figures.load_all(runs), figures.RATIO).axes
    assert len([line for line in ax.lines if line.get_linestyle() == '-']) == 3


def test_the_ratio_picture_marks_where_bounds_were_set(runs):
    (ax,) = figures.norms_figure(figures.load_all(runs), figures.RATIO).axes
    marked = [line for line in ax.lines if line.get_marker() == '|' and finite_points(line)]
    assert [(line.get_color(), list(line.get_xdata())) for line in marked] == [
        (figures.VERMILLION, [500, 500])  # two tensors of the AdamCPR run
    ]
    assert {*marked[0].get_ydata()} == {1.5}


def test_the_step_picture_has_length_and_angle_where_the_log_has_them(tmp_path):
    records = norms()
    for record in records[:-1]:  # no step follows the last iteration
        for entry in (record, *record['tensors'].values()):
            entry |= {'step': 0.02, 'angle': 1.1}
    write_log(tmp_path / 'run', losses() + records)
    plot.main([str(tmp_path / 'run')])
    assert shows(tmp_path / 'run' / 'step.png', figures.BLACK)
    runs = figures.load_all([str(tmp_path / 'run')])
    for ax, value in zip(figures.norms_figure(runs, figures.STEP).axes, (0.02, 1.1), strict=True):
        assert len(ax.lines) == 1 + 3
        assert all(line.get_ydata()[0] == value for line in ax.lines)


def test_the_tensor_picture_has_squared_norm_bound_growth_lambda_and_loss(runs):
    norm_ax, growth_ax, lambda_ax, loss_ax = figures.tensor_figure(
        figures.load_all(runs[1:2]), C_FC
    ).axes
    norm, kappa = norm_ax.lines
    np.testing.assert_allclose(norm.get_ydata()[[0, -1]], [25, 100])
    assert kappa.get_linestyle() == '--'
    assert finite_points(kappa) == 6  # from iteration 500 on
    assert finite_points(growth_ax.lines[0]) == 10
    np.testing.assert_allclose(lambda_ax.lines[0].get_ydata()[-1], 5e-3)
    assert finite_points(loss_ax.lines[0]) == 11


def test_a_bound_on_something_else_than_the_squared_norm_is_not_drawn_with_it(tmp_path):
    config = {'kind': 'config', 'config': {'reg_function': 'l1'}}
    run = load(tmp_path, [config, *losses(), *norms(bounded=True)])
    assert len(figures.tensor_figure([run], C_FC).axes[0].lines) == 1


def test_a_run_has_the_same_colour_in_every_picture(tmp_path, runs):
    short = write_log(tmp_path / 'short', losses(iters=range(0, 50, 10)))
    _, run = figures.load_all([short, runs[0]])
    assert len(lines_in(figures.loss_figure([run]).axes[0], figures.VERMILLION)) == 3
    assert len(lines_in(figures.tensor_figure([run], C_FC).axes[0], figures.VERMILLION)) == 1


def test_a_loss_that_blows_up_does_not_flatten_the_others(tmp_path):
    diverged = {'kind': 'eval', 'iter': 1100, 'val_loss': None}
    run = load(tmp_path, [*losses(), *train_losses([(1010, 1e37)]), diverged])
    (ax,) = figures.loss_figure([run]).axes
    low, high = ax.get_ylim()
    assert 1.4 < low < 1.7 < 2.5 < high < 3.5
    plot.main([str(tmp_path / 'run')])
    assert shows(tmp_path / 'run' / 'loss.png', figures.BLUE)


def test_a_run_that_logged_only_evaluations_is_drawn(tmp_path):
    run = load(tmp_path, [entry for entry in losses() if entry['kind'] == 'eval'])
    assert len(lines_in(figures.loss_figure([run]).axes[0], figures.BLUE)) == 1


def test_a_log_of_one_iteration_shows_points(tmp_path):
    run = load(tmp_path, losses(iters=range(1)) + norms(iters=range(1)))
    drawn = (
        figures.loss_figure([run]),
        figures.norms_figure([run], figures.RATIO),
        figures.tensor_figure([run], C_FC),
    )
    for figure in drawn:
        points = [line for ax in figure.axes for line in ax.lines if finite_points(line)]
        assert points and all(line.get_marker() == 'o' for line in points)
    plot.main([str(tmp_path / 'run')])
    for name, colour in [
        ('loss', figures.BLUE),
        ('ratio', figures.BLACK),
        ('tensor', figures.BLUE),
    ]:
        assert shows(tmp_path / 'run' / f'{name}.png', colour)


@pytest.mark.parametrize('name', ['a\udcffb', 'a\x01b', '数', 'x' * 250])
def test_names_that_the_font_does_not_have_are_drawn(tmp_path, capsys, name):
    optimizer = {'kind': 'config', 'config': {'optimizer': name}}
    entries = [entry for entry in norms() if entry['kind'] == 'norms']
    for entry in entries:
        entry['tensors'][name] = entry['tensors'][C_FC]
    out_dir = write_log(tmp_path / name, [optimizer, *losses(), *entries])
    plot.main([out_dir, f'--out={tmp_path}/pictures', f'--tensor={name}'])
    assert shows(tmp_path / 'pictures' / 'tensor.png', figures.BLUE)
    assert capsys.readouterr().err == ''


def test_a_run_without_norms_is_noted_and_left_out(tmp_path, runs, capsys):
    short = write_log(tmp_path / 'short', losses())
    plot.main([short])
    out = capsys.readouterr().out
    assert 'note: short has no norms' in out
    assert sorted(os.listdir(short)) == ['log.jsonl', 'loss.png']
    plot.main([short, runs[0], f'--out={tmp_path}/both'])
    assert 'note: short has no norms' in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / 'both')) == ['loss.png', 'ratio.png', 'tensor.png']


def test_watching_draws_as_soon_as_there_is_a_loss_and_again_when_the_log_has_grown(
    tmp_path, monkeypatch, capsys
):
    """The log changes while plot.py sleeps. Without a change nothing is drawn."""
    out = tmp_path / 'run'
    out.mkdir()
    longer = losses(iters=range(0, 2001, 10))
    logs = iter([norms(), norms() + losses(), None, norms() + longer])
    drawn = []

    def sleep(_):
        drawn.append(capsys.readouterr().out.count('loss.png'))
        if len(drawn) > 4:
            raise KeyboardInterrupt
        entries = next(logs)
        if entries is not None:
            write_log(out, entries)

    monkeypatch.setattr(plot.time, 'sleep', sleep)
    plot.main([str(out), '--watch'])
    assert drawn == [0, 0, 1, 0, 1]


# ---------------------------------------------------------------------------- mistakes


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        plot.main(argv)
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ''
    assert err.startswith('error: ') and err.count('\n') == 1
    return err


def test_a_mistake_in_the_arguments_is_one_line_with_the_usage(runs, capsys):
    for argv in ([], [runs[0], '--colour=red'], [runs[0], '--out'], [runs[0], '--tens=wte']):
        assert 'usage: python plot.py OUT_DIR...' in error_of(argv, capsys)


def test_a_folder_without_a_log_is_named(tmp_path, runs, capsys):
    assert 'nowhere' in error_of([runs[0], str(tmp_path / 'nowhere')], capsys)


def test_a_folder_that_is_not_there_is_not_watched(tmp_path, capsys):
    error = error_of(['--watch', str(tmp_path / 'nowhere')], capsys)
    assert f'there is no folder {tmp_path}/nowhere' in error


def test_a_log_without_a_loss_is_named(tmp_path, capsys):
    early = write_log(tmp_path / 'early', [{'kind': 'config', 'config': {}}, *norms()])
    assert 'early/log.jsonl has no loss yet' in error_of([early], capsys)


def test_an_unknown_tensor_gets_the_nearest_names(runs, capsys):
    assert C_FC in error_of([runs[0], '--tensor=h.0.mlp.cfc.weight'], capsys)
    assert os.listdir(runs[0]) == ['log.jsonl']


def test_an_ambiguous_tensor_gets_the_names_it_is_part_of(runs, capsys):
    err = error_of([runs[0], '--tensor=mlp'], capsys)
    assert C_FC in err and C_PROJ in err and WTE not in err


def test_a_place_that_cannot_be_written_is_named_and_left_alone(tmp_path, runs, capsys):
    log = f'{runs[0]}/log.jsonl'
    before = Path(log).read_text()
    assert log in error_of([runs[0], f'--out={log}'], capsys)
    assert Path(log).read_text() == before
    (tmp_path / 'out' / 'loss.png').mkdir(parents=True)
    assert 'out/loss.png' in error_of([runs[0], f'--out={tmp_path}/out'], capsys)
    assert os.listdir(tmp_path / 'out') == ['loss.png']


# ---------------------------------------------------------------------------- the command


def plot_py(*argv):
    displays = 'DISPLAY', 'WAYLAND_DISPLAY'
    headless = {name: value for name, value in os.environ.items() if name not in displays}
    command = [sys.executable, 'plot.py', *argv]
    return subprocess.run(command, cwd=ROOT, env=headless, capture_output=True, text=True)


def test_the_command_draws_without_a_display(runs):
    done = plot_py(runs[0])
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.split() == [f'{runs[0]}/{name}.png' for name in ('loss', 'ratio', 'tensor')]


@pytest.mark.parametrize('closed', ['pipe', 'disk'])
def test_the_pictures_are_drawn_where_their_names_cannot_be_printed(runs, closed):
    reader, writer = os.pipe()
    os.close(reader)
    stdout = writer if closed == 'pipe' else os.open('/dev/full', os.O_WRONLY)
    env = {**os.environ, 'PYTHONUNBUFFERED': ''}
    options = {'cwd': ROOT, 'env': env, 'stdout': stdout, 'stderr': subprocess.PIPE, 'text': True}
    done = subprocess.run([sys.executable, 'plot.py', runs[0]], **options)
    assert sorted(os.listdir(runs[0])) == ['log.jsonl', 'loss.png', 'ratio.png', 'tensor.png']
    if closed == 'pipe':
        assert (done.returncode, done.stderr) == (141, '')
    else:
        assert done.returncode == 2 and done.stderr.count('\n') == 1
        assert done.stderr.startswith('error: standard output: No space left on device')


def test_the_command_ends_with_status_2_and_no_traceback(tmp_path):
    done = plot_py(str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith('error: there is no log.jsonl') and done.stderr.count('\n') == 1
