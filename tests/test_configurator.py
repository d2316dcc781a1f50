"""Test configurator.py: globals, config files, --key=value arguments, and mistakes in them."""

import ast

import pytest

from configurator import check, configure

SCRIPT = """# ---- settings
# input and output
out_dir = 'out'  # where it goes
eval_only = False  # evaluate once
# sizes
batch_size = 12
learning_rate = 6e-4  # the highest
_private = 1
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'script.py').write_text(SCRIPT)
    namespace = {'__file__': str(tmp_path / 'script.py')}
    exec(SCRIPT, namespace)
    return namespace


def config(text, name='c.py'):
    with open(name, 'w') as f:
        f.write(text)
    return name


def test_the_later_argument_wins_in_any_order(settings):
    path = config('batch_size = 3\nlearning_rate = 1e-2')
    configure(settings, ['--batch_size=5', path, '--learning_rate=0.5'])
    assert (settings['batch_size'], settings['learning_rate']) == (3, 0.5)
    configure(settings, [path, '--batch_size=5'])
    assert settings['batch_size'] == 5


def test_all_settings_and_those_given_are_returned(settings):
    path = config('batch_size = 12')  # set to its default is set all the same
    every, given = configure(settings, [path, '--out_dir=x'])
    assert every == dict(out_dir='x', eval_only=False, batch_size=12, learning_rate=6e-4)
    assert given == {'batch_size', 'out_dir'}


def test_a_config_file_may_import_compute_and_use_settings(settings):
    path = config(
        'import time\nfrom math import sqrt\n_two = int(sqrt(4))\nbatch_size = _two * batch_size\n'
        "learning_rate = batch_size / 10\nout_dir = 'run-' + str(len(time.asctime()))"
    )
    configure(settings, [path])
    expected = {'batch_size': 24, 'learning_rate': 2.4, 'out_dir': 'run-24'}
    assert {key: settings[key] for key in expected} == expected


def test_a_function_of_a_config_file_sees_what_the_file_assigns(settings):
    text = '_tokens = 48\ndef fitting(length): return _tokens // length * batch_size\n'
    path = config(text + 'batch_size = fitting(4)')
    configure(settings, [path])
    assert settings['batch_size'] == 144


def test_an_int_is_a_float_where_a_float_is_wanted(settings):
    configure(settings, ['--learning_rate=1'])
    assert settings['learning_rate'] == 1.0 and type(settings['learning_rate']) is float


@pytest.mark.parametrize('text', ['123', 'True', "it's = odd", ''])
def test_a_string_setting_takes_any_text(settings, text):
    configure(settings, [f'--out_dir={text}'])
    assert settings['out_dir'] == text


@pytest.mark.parametrize(
    'argument, says',
    [
        ('--batch_sise=3', "did you mean 'batch_size'?"),
        ('--zzzzz=3', '--help'),
        ('--batch_size=3.5', 'batch_size must be a whole number'),
        ('--batch_size=True', 'batch_size must be a whole number'),
        ('--batch_size=many', 'batch_size must be a whole number'),
        ('--batch_size=', 'batch_size must be a whole number'),
        ('--eval_only=1', 'eval_only must be True or False'),
        ('--eval_only=true', 'eval_only must be True or False'),
        ('--learning_rate=fast', 'learning_rate must be a number'),
        ('--_private=2', "unknown setting '_private'"),
        ('--eval_only', '--eval_only=VALUE'),
        ('nowhere.py', 'no config file'),
        ('batch_size=3', '--key=value'),
    ],
)
def test_a_mistake_on_the_command_line_is_one_error_line_and_status_2(
    settings, capsys, argument, says
):
    before = dict(settings)
    with pytest.raises(SystemExit) as e:
        configure(settings, [argument])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1 and says in err
    assert settings == before


@pytest.mark.parametrize(
    'text, says',
    [
        ('batch_sise = 3', "did you mean 'batch_size'?"),
        ("batch_size = 'a'", 'must be a whole number'),
        ('batch_size = [1]', 'must be a whole number'),
        ('out_dir = 3', 'must be a string'),
        ('batch_size = 1 / 0', 'ZeroDivisionError'),
        ('raise SystemExit', 'SystemExit'),
        ('batch_size = ', 'SyntaxError'),
    ],
)
def test_a_mistake_in_a_config_file_is_one_error_line_that_names_it(settings, capsys, text, says):
    with pytest.raises(SystemExit) as e:
        configure(settings, [config(text, 'mine.py')])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1
    assert says in err and 'mine.py' in err


def test_a_misspelt_config_file_is_answered_with_the_nearest(settings, capsys, tmp_path):
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'train_gpt2.py').write_text('')
    with pytest.raises(SystemExit):
        configure(settings, ['config/train_gtp2.py'])
    assert 'did you mean config/train_gpt2.py?' in capsys.readouterr().err


def test_help_lists_every_setting_with_default_and_comment(settings, capsys):
    with pytest.raises(SystemExit) as e:
        configure(settings, ['--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0
    assert "--out_dir='out'" in out and 'where it goes' in out and '--batch_size=12' in out
    assert 'sizes' in out and '_private' not in out


def test_help_of_each_script_lists_all_its_settings(script):
    for name in ('train.py', 'sample.py'):
        outcome = script(name, '--help')
        with open(name) as f:
            body = ast.parse(f.read()).body
        body = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
        calls = ['configure' in ast.dump(node) for node in body]
        settings = [node for node in body[: calls.index(True)] if isinstance(node, ast.Assign)]
        names = [target.id for node in settings for target in node.targets]
        assert outcome.status == 0 and len(names) > 10
        assert all(f'--{key}=' in outcome.out for key in names)


@pytest.mark.parametrize('name', ['bench.py', 'compare.py', 'export.py', 'plot.py', 'sample.py'])
def test_help_of_each_script_says_what_program_it_belongs_to(script, name):
    outcome = script(name, '--help')
    assert outcome.status == 0 and 'nanoNorm' in outcome.out and 'usage: ' in outcome.out


@pytest.mark.parametrize(
    'key, value, limit',
    [
        ('n', 0, '>= 1'),
        ('n', -1, '>= 0'),
        ('x', 1.0, 'in [0, 1)'),
        ('x', 1.1, 'in [0, 1]'),
        ('x', float('nan'), '>= 0'),
        ('x', float('inf'), '>= 0'),
        ('s', 'c', 'one of a b'),
        ('s', '', 'one of a b'),
    ],
)
def test_a_value_outside_its_limit_fails(capsys, key, value, limit):
    with pytest.raises(SystemExit) as e:
        check({key: value}, {limit: key})
    assert e.value.code == 2 and capsys.readouterr().err.startswith(f'error: {key}=')


def test_values_at_their_limits_pass():
    check(
        dict(n=1, m=0, x=0.0, y=1.0, s='b'),
        {'>= 1': 'n', '>= 0': 'm', 'in [0, 1)': 'x', 'in [0, 1]': 'y', 'one of a b': 's'},
    )
