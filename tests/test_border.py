"""Test runtime/errors.py: what the system refuses is one line, and a bug keeps its traceback."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

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


@pytest.mark.parametrize('command', [['-c', PRINT.format(size=100_000)], ['plot.py', '--help']])
def test_a_reader_that_has_gone_ends_a_script_without_a_word(command):
    reader, writer = os.pipe()
    os.close(reader)
    status, err = written_to(writer, *command)
    os.close(writer)
    assert (status, err) == (141, '')
