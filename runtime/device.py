"""Set up the device, its number format and the seed."""

import re
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from runtime.errors import fail

# Dense bfloat16 / float16 tensor-core peaks in TFLOP/s, from the vendors' data sheets.
# The first that occurs in the device's name, as whole words, counts.
PEAKS = """
    GB200 2500, B200 2250, GH200 989, H200 989, H100 PCIe 756, H100 NVL 835, H100 989, H800 989,
    A100 312, A800 312, A40 150, A30 165, A10G 70, A10 125, L40S 362, L40 181, L4 121, V100 125,
    T4 65, RTX 5090 209.5, RTX 4090 165.2, RTX 4080 97.5, RTX 3090 71, MI300X 1307, MI250X 383
"""
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


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
    if device_type == 'cuda' and ':' in device:
        torch.cuda.set_device(device)  # for synchronize(), events and memory figures
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

    peak = peak_flops(torch.cuda.get_device_name(device)) if device_type == 'cuda' else None
    return Runtime(device, device_type, dtype, peak)


def peak_flops(name):
    """Return the FLOP/s of the device called `name`, None if it is not in PEAKS."""
    for peak in PEAKS.split(','):
        known, tera = peak.strip().rsplit(' ', 1)
        if re.search(rf'\b{known}\b', name):
            return float(tera) * 1e12
    return None
