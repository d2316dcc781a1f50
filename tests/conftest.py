"""Fixtures for the tests of the scripts: run one as its user does, on a small data set."""

import base64
import os
import runpy
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import processes
from helpers.hub import only_this_machine

# set before triton, datasets or transformers are imported; the scripts' processes inherit it
os.environ['OMP_NUM_THREADS'] = '1'  # of processes: threads that wait spin
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # run the kernels on the CPU
os.environ['HF_HUB_OFFLINE'] = '1'

from data.tokenizers import CharTokenizer  # noqa: E402
from data.writer import write_dataset  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)  # the scripts are run from the checkout
processes.install()

TINY = [
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=16',
    '--block_size=16',
    '--batch_size=4',
    '--compile=False',
    '--gradient_accumulation_steps=1',
    '--device=cpu',
    '--eval_iters=2',
    '--max_iters=8',
    '--eval_interval=4',
    '--learning_rate=1e-2',
    '--warmup_iters=2',
    '--lr_decay_iters=8',
    '--norm_log_interval=2',
]

LONGEST = ['test_parallel.py', 'test_train.py', 'test_compare.py', 'test_hub.py', 'test_papers.py']


def pytest_collection_modifyitems(items):
    """Start the longest files first: a long one at the end keeps one worker busy, others idle."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: on tiny tensors, waiting for the others costs more than the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket, 'getaddrinfo', only_this_machine(socket.getaddrinfo))


@pytest.fixture(autouse=True, scope='session')
def interpreter_rounds_to_bfloat16():
    """Round to nearest, ties to even, as GPUs do. Triton's interpreter truncates."""
    if os.environ.get('TRITON_INTERPRET') != '1' or find_spec('triton') is None:
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding):
        if source.name == 'fp32' and target.name == 'bf16':
            rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return rounded.view(torch.uint16).numpy()
        return convert(data, source, target, rounding)

    interpreter._convert_float = convert_float


class Outcome:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def script(monkeypatch, capsys):
    """Return script('train.py', '--key=value', ...), which runs a script in this process.

    A new process would spend seconds on imports.
    """
    changed = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE

    def run(name, *arguments):
        handlers = {number: signal.getsignal(number) for number in changed}
        hook = sys.excepthook
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / name), run_name='__main__')
        except SystemExit as e:
            status = e.code or 0
        except Exception as e:
            if sys.excepthook is hook:
                raise
            with pytest.raises(SystemExit) as answered:  # as the interpreter would
                sys.excepthook(type(e), e, e.__traceback__)
            status = answered.value.code
        finally:
            sys.excepthook = hook
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """Return the folder of a character data set of written-out sums, which a model can learn."""
    folder = tmp_path_factory.mktemp('data') / 'sums'
    sums = [f'{a}+{b}={a + b}\n' for a in range(50) for b in range(50)]
    tokenizer = CharTokenizer(sorted(set(''.join(sums))))
    documents = {'train': [''.join(sums[::7] + sums[1::7])], 'val': [''.join(sums[2::7])]}
    write_dataset(folder, documents, tokenizer, {})
    return folder


@pytest.fixture(scope='session')
def bpe_file(tmp_path_factory):
    """Return a vocabulary as large as GPT-2's, which would need a download.

    It has all bytes and 50,000 pairs of bytes.
    """
    path = tmp_path_factory.mktemp('bpe') / 'gpt2.tiktoken'
    tokens = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(50000)]
    lines = [base64.b64encode(token) + b' %d\n' % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b''.join(lines))
    return path
