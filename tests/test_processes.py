"""Test that a forked process of the tests does what a Python that is started does."""

import os
import subprocess
import sys

import pytest
from helpers.processes import Popen, UsualPopen

SCRIPT = """
import atexit, os, signal, sys

class Loud:
    def __del__(self):
        print('destroyed')

loud = Loud()
atexit.register(print, 'at exit')
print(__name__, sys.argv, sys.path[0], os.getcwd(), os.environ['HERE'], sys.stdin.read())
print(os.getsid(0) == os.getpid(), signal.getsignal(signal.SIGINT), flush=True)
print('and an error', file=sys.stderr)
"""
ENDINGS = ['', 'sys.exit(7)', 'sys.exit("why")', 'raise KeyError(1)', 'os.kill(os.getpid(), 15)']


@pytest.mark.skipif(sys.platform != 'linux', reason='forks on Linux only')
@pytest.mark.parametrize('kind', ['script', '-c', '-m'])
@pytest.mark.parametrize('ending', ENDINGS)
def test_a_forked_process_does_what_one_that_is_started_does(tmp_path, kind, ending):
    (tmp_path / 'script.py').write_text(SCRIPT + ending)
    words = {'script': ['script.py'], '-c': ['-c', SCRIPT + ending], '-m': ['-m', 'script']}[kind]
    outcomes = []
    for start in (UsualPopen, Popen):
        process = start(
            [sys.executable, *words, '--of', 'it'],
            cwd=tmp_path,
            env={**os.environ, 'HERE': 'ä'},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=ending == '',
        )
        out, err = process.communicate('given', timeout=60)
        lines = err.splitlines()  # of a traceback, the first and the last
        outcomes.append((process.returncode, out, lines[:2], lines[-1]))
    assert outcomes[0] == outcomes[1]
