"""Parse command lines, and answer a mistake by one `error:` line and status 2.

NANONORM_TRACEBACK=1 in the environment also shows the traceback of what became such a line.
"""

import argparse
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from textwrap import shorten


def fail(message):
    """Print `message` as one line on standard error and exit with status 2.

    The message says what the user got wrong and what to do.
    """
    if os.environ.get('RANK', '0') != '0':
        time.sleep(2)  # if rank 0 fails too, torchrun ends this process before it repeats the line
    words = ' '.join(_shortened(word) for word in str(message).split())  # a path may be long
    print('error: ' + shorten(words, 600), file=sys.stderr, flush=True)
    sys.exit(2)  # not `raise SystemExit`: distributed.py notes the status


# what reading a file or a setting, and writing one, may raise
REFUSED = (OSError, ValueError, OverflowError, MemoryError, RecursionError)
NO_MEMORY = ("can't allocate memory", 'out of memory', 'Storage size calculation overflowed')


@contextmanager
def border(remedy=None):
    """Answer what the system, a file or a setting refuses by one `error:` line and status 2.

        with border():
            main()

    Everything that a script does runs within it. It converts REFUSED and torch's RuntimeErrors
    about memory; any other exception is a bug and keeps its traceback. It flushes standard output:
    a full disk is an error, a closed pipe (`| head`) ends the script without a word, as Ctrl-C
    does.

    remedy: what to do, for the end of the line.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BaseException as e:
        _answer(e, remedy)
        raise


def border_from_here():
    """Answer as border() does whatever the script does from here to its end.

    Until the script catches signals, Ctrl-C ends the process: nothing is to be saved yet.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    show = sys.excepthook

    def hook(kind, error, trace):
        _answer(error)
        show(kind, error, trace)

    sys.excepthook = hook


def _answer(error, remedy=None):
    """Exit as border() does on `error`, or return if border() does not convert it."""
    if isinstance(error, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    reason = _reason(error)
    if reason is None:
        return
    if os.environ.get('NANONORM_TRACEBACK') == '1':
        traceback.print_exception(error)
    if isinstance(error, OSError) and not can_flush(sys.stdout):
        reason = f'standard output: {reason}'
    if isinstance(error, BrokenPipeError):
        can_flush(sys.stderr)
        sys.exit(128 + signal.SIGPIPE)
    if remedy or ';' not in reason:  # else the message says already what to do
        reason += f'; {remedy or "NANONORM_TRACEBACK=1 shows where it happened"}'
    fail(reason)


def _reason(error):
    """Return what the user is told of `error`, None if it is a bug."""
    text = ' '.join(str(error).split())
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return f'there is not enough memory ({_shortened(text or "MemoryError")})'
    if isinstance(error, RecursionError):
        return 'something is nested too deeply'
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            return error.strerror
        return f'{_shortened(str(error.filename))}: {error.strerror}'
    if isinstance(error, REFUSED):
        return _shortened(text or type(error).__name__)
    return None


def _shortened(text, most=200):
    return text if len(text) <= most else f'{text[: most // 2]} ... {text[-most // 2 :]}'


def can_flush(stream):
    """Return whether `stream` can be written. If not, discard what it holds and will get."""
    try:
        if stream is not None:
            stream.flush()
        return True
    except OSError:
        with suppress(OSError, ValueError):  # a test's stream has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False


class Arguments(argparse.ArgumentParser):
    """Parse a script's arguments; --help prints its docstring. Fails on wrong arguments."""

    def __init__(self, doc, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=form, **options)

    def error(self, message):
        usage = f'; usage: {self.usage}' if self.usage else ''
        fail(f'{message}{usage}; --help lists what there is')
