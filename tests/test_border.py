"""Test runtime/errors.py: what the system refuses is one line, and a bug keeps its traceback."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

from runtime.errors import border


@pytest.fixture
def refused(capsys):
    """Return refused(function), which runs it within border() and returns its `error:` line."""

    def run(function):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e, border():
            function()
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1, err
        return err

    return run


@pytest.mark.parametrize(
    'path, says',
    [
        ('no/such/file', 'no/such/file: No such file'),
        ('.', 'Is a directory'),
        ('x' * 5000, 'File name too long'),
        ('a\0b', 'embedded null byte'),
        ('a\ud800b', 'surrogates not allowed'),
    ],
)
def test_a_path_that_cannot_be_read_is_one_line(refused, path, says):
    assert says in refused(lambda: open(path).read())


@pytest.mark.parametrize(
    'wrong, says',
    [
        (lambda: float(10**400), 'too large'),
        (lambda: int('9' * 5000), 'limit'),
        (lambda: bytearray(1 << 62), 'not enough memory'),
        (lambda: torch.empty(1 << 55), 'not enough memory'),
        (lambda: torch.empty(1 << 40, 1 << 40), 'not enough memory'),
        (lambda: __import__('json').loads('[' * 100000), 'nested too deeply'),
    ],
)
def test_a_value_that_is_too_large_is_one_line(refused, wrong, says):
    assert says in refused(wrong)


@pytest.mark.parametrize('bug', [KeyError('loss'), TypeError('len'), RuntimeError('shapes')])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)) as e, border():
        raise bug
    assert e.value is bug


def test_a_variable_shows_the_traceback_and_the_caller_may_say_what_to_do(monkeypatch, capsys):
    monkeypatch.setenv('NANONORM_TRACEBACK', '1')
    with pytest.raises(SystemExit, match='2'), border('mend that'):
        open('no/such/file')
    err = capsys.readouterr().err
    assert err.startswith('Traceback') and 'test_border.py' in err
    assert err.splitlines()[-1] == 'error: no/such/file: No such file or directory; mend that'


def test_ctrl_c_ends_without_a_word(capsys):
    with pytest.raises(SystemExit, match='130'), border():
        raise KeyboardInterrupt
    assert capsys.readouterr() == ('', '')


def written_to(stdout, *command):
    """Run a command whose standard output is `stdout`: (exit status, standard error)."""
    env = {**os.environ, 'PYTHONUNBUFFERED': ''}
    options = {'cwd': ROOT, 'env': env, 'stdout': stdout, 'stderr': subprocess.PIPE}
    done = subprocess.run([sys.executable, *map(str, command)], **options)
    return done.returncode, done.stderr.decode()


PRINT = 'from runtime.errors import border\nwith border():\n    print("x" * {size})\n'


@pytest.mark.parametrize('size', [1, 100_000])  # within the buffer, and beyond it
def test_a_full_disk_below_standard_output_is_one_line(size):
    with open('/dev/full', 'w') as full:
        status, err = written_to(full, '-c', PRINT.format(size=size))
    assert status == 2 and err.startswith('error: ') and 'No space left on device' in err
    assert err.count('\n') == 1


@pytest.mark.parametrize(
    'command', [['-c', PRINT.format(size=100_000)], ['plot.py', '--help'], ['train.py', '--help']]
)
def test_a_reader_that_has_gone_ends_a_script_without_a_word(command):
    reader, writer = os.pipe()
    os.close(reader)
    status, err = written_to(writer, *command)
    os.close(writer)
    assert (status, err) == (141, '')


@pytest.fixture
def refused_by_train(script, dataset, tmp_path):
    """Return refused(arguments), which runs train.py and returns its one `error:` line."""

    def run(*arguments):
        settings = (
            *TINY,
            f'--dataset={dataset}',
            f'--out_dir={tmp_path / "out"}',
            '--init_from=auto',
        )
        outcome = script('train.py', *settings, *arguments)
        assert outcome.status == 2, outcome.out
        assert outcome.err.startswith('error: ') and outcome.err.count('\n') == 1, outcome.err
        return outcome.err

    return run


@pytest.mark.parametrize(
    'argument, says',
    [
        ('--batch_size=1' + 15 * '0', 'not enough memory'),
        ('--block_size=9999999999', 'block_size'),
        ('--n_embd=99999999998', 'not enough memory'),
        ('--warmup_iters=1' + 400 * '0', 'warmup_iters must be less than 2**63'),
        ('--optimizer=adamcpr --reg_step_size=1' + 30 * '0', 'reg_step_size must be less than'),
        ('--optimizer=adamcpr --kappa_init_param=1' + 400 * '0', 'must be a finite number'),
        ('--max_iters=1' + 5000 * '0', 'max_iters'),
        ('--dataset=' + 300 * 'x', 'File name too long'),
        ('--dataset=a\0b', 'null byte'),
        ('--out_dir=' + 5000 * 'x', 'File name too long'),
        ('--out_dir=a\0b', 'null byte'),
        ('--out_dir=a\ud800b', 'surrogates not allowed'),
        ('--init_from=' + 5000 * 'x', 'init_from'),
        (5000 * 'x' + '.py', 'no config file'),
        ('.', 'no config file'),
    ],
    ids=lambda x: x[:40].encode('ascii', 'replace').decode(),
)
def test_a_setting_that_the_system_refuses_is_one_line_of_train_py(
    refused_by_train, argument, says
):
    assert says in refused_by_train(*argument.split(' '))


@pytest.mark.parametrize(
    'text, says',
    [
        ('raise BaseException', 'wrong.py does not run: BaseException'),
        ('raise GeneratorExit', 'wrong.py does not run: GeneratorExit'),
        ('import sys; sys.exit(0)', 'wrong.py does not run: SystemExit'),
        ('batch_size = 10**5000', 'batch_size must be less than'),
        ('learning_rate = 10**5000', 'learning_rate=inf must be a finite number'),
        ('def f(): f()\nf()', 'wrong.py does not run: RecursionError'),
        ('x = ' + 5000 * '[', 'wrong.py does not run: '),
        ('\0', 'wrong.py does not run: '),
    ],
    ids=lambda text: text[:20],
)
def test_a_config_file_that_goes_wrong_is_one_line_of_train_py(
    refused_by_train, tmp_path, text, says
):
    (tmp_path / 'wrong.py').write_text(text)
    assert says in refused_by_train(tmp_path / 'wrong.py')


def test_a_config_file_in_other_letters_is_one_line_of_train_py(refused_by_train, tmp_path):
    (tmp_path / 'wrong.py').write_bytes(b'batch_size = 1  # \xff')
    assert 'utf-8' in refused_by_train(tmp_path / 'wrong.py')


@pytest.mark.parametrize('iteration', ['null', '"three"', '[1]', 5000 * '[' + 5000 * ']', '1e999'])
def test_a_damaged_log_is_one_line_of_train_py_or_none(script, dataset, tmp_path, iteration):
    settings = *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}', '--init_from=auto'
    assert script('train.py', *settings).status == 0
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write(f'{{"kind": "train", "iter": {iteration}}}\n')
    outcome = script('train.py', *settings, '--max_iters=10')
    assert outcome.status in (0, 2) and 'Traceback' not in outcome.err
    assert outcome.err.count('error: ') == outcome.err.count('\n') == outcome.status // 2
