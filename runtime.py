"""Set up what all scripts share: the device, its number format, arguments and the error line."""

import argparse
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from textwrap import shorten

import torch

# Dense bfloat16 / float16 tensor-core peaks in FLOP/s, from the vendors' data sheets.
# The first key that occurs in the device's name counts, so longer keys stand first.
PEAK_FLOPS = {
    'GB200': 2500e12,
    'B200': 2250e12,
    'H200': 989e12,
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'H100': 989e12,
    'H800': 989e12,
    'A100': 312e12,
    'A800': 312e12,
    'A40': 150e12,
    'A30': 165e12,
    'A10G': 70e12,
    'A10': 125e12,
    'L40S': 362e12,
    'L40': 181e12,
    'L4': 121e12,
    'V100': 125e12,
    'T4': 65e12,
    'RTX 5090': 209.5e12,
    'RTX 4090': 165.2e12,
    'RTX 4080': 97.5e12,
    'RTX 3090': 71e12,
    'MI300X': 1307e12,
    'MI250X': 383e12,
}

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def fail(message):
    """Print `message` as one line on standard error and exit with status 2.

    The message says what the user got wrong and what to do.
    """
    if os.environ.get('RANK', '0') != '0':
        time.sleep(2)  # if rank 0 fails too, torchrun ends this process before it repeats the line
    words = ' '.join(_shortened(word) for word in str(message).split())  # a path may be long
    print('error: ' + shorten(words, 600), file=sys.stderr, flush=True)
    sys.exit(2)  # not `raise SystemExit`: parallel.py notes the status


# what reading a file or a setting, and writing one, may raise
REFUSED = (OSError, ValueError, OverflowError, MemoryError, RecursionError)
NO_MEMORY = ("can't allocate memory", 'out of memory', 'Storage size calculation overflowed')


@contextmanager
def border(remedy=None):
    """Answer what the system, a file or a setting refuses by one `error:` line and status 2.

        with border():
            main()

    Everything that a script does runs within it. It converts REFUSED and torch's RuntimeErrors
    about memory; any other exception is a bug and keeps its traceback. NANONORM_TRACEBACK=1 in the
    environment shows the traceback of what is converted. It flushes standard output: a full disk
    is an error, a closed pipe (`| head`) ends the script without a word, as Ctrl-C does.

    remedy: what to do, for the end of the line.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (*REFUSED, RuntimeError) as e:
        reason = _reason(e)
        if reason is None:
            raise
        if os.environ.get('NANONORM_TRACEBACK') == '1':
            traceback.print_exc()
        if isinstance(e, OSError) and not _can_flush(sys.stdout):
            reason = f'standard output: {reason}'
        if isinstance(e, BrokenPipeError):
            _can_flush(sys.stderr)
            sys.exit(128 + signal.SIGPIPE)
        fail(f'{reason}; {remedy or "NANONORM_TRACEBACK=1 shows where it happened"}')


def _reason(error):
    """Return what the user is told of `error`, None if border() must not convert it."""
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


def _can_flush(stream):
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


@dataclass
class Runtime:
    device: str  # as torch.device takes it: 'cuda', 'cuda:1', 'mps', 'cpu'
    device_type: str  # 'cuda', 'mps' or 'cpu'
    dtype: str  # 'float32', 'bfloat16' or 'float16': what matrix products are computed in
    peak_flops: float | None  # of this device in FLOP/s, for MFU; None if unknown

    def autocast(self):
        if self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(device_type=self.device_type, dtype=DTYPES[self.dtype])

    def synchronize(self):
        if self.device_type != 'cpu':
            getattr(torch, self.device_type).synchronize()


def _fastest_device():
    if torch.cuda.is_available():
        return 'cuda'
    return 'mps' if torch.backends.mps.is_available() else 'cpu'


def setup(device='auto', dtype='auto', seed=1337):
    """Choose device and dtype, seed the generators, allow TF32, and return the Runtime.

    device: 'auto' takes cuda, then mps, then cpu.
    dtype: 'auto' takes bfloat16 on a GPU that supports it, float16 on other GPUs, else float32.
    Fails if the device is not available, or the dtype or seed is not allowed.
    """
    if device == 'auto':
        device = _fastest_device()
    try:
        torch.empty(0, device=device)  # the only sure test of a device
    except Exception as e:  # its type depends on the device
        reason = str(e).strip().splitlines()[0]
        problem = f"device='{device}' cannot be used here ({reason})"
        fail(f'{problem}; this machine has --device={_fastest_device()}')
    device_type = torch.device(device).type
    if device_type not in ('cuda', 'mps', 'cpu'):
        fail(f"device='{device}' is of a kind that is not supported; use cuda, mps or cpu")
    if not 0 <= seed < 1 << 63:
        fail(f'seed={seed} must be at least 0 and less than 2**63')
    if dtype == 'auto':
        dtype = 'float32'
        if device_type == 'cuda':
            dtype = 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'
    if dtype not in DTYPES:
        fail(f"dtype='{dtype}' is not one of 'auto', {', '.join(repr(name) for name in DTYPES)}")

    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    peak = None
    if device_type == 'cuda':
        name = torch.cuda.get_device_name(device)
        peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    return Runtime(device, device_type, dtype, peak)
