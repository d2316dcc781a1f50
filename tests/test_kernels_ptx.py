"""The Triton kernels as compiled for sm_90, executed instruction by instruction without a GPU.

The emulator is no part of the project. Without it the test skips.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT.parent / 'shared' / 'tools' / 'ptx'


@pytest.mark.skipif(not EMULATOR.is_dir(), reason='no emulator of PTX on this machine')
def test_compiled_kernels_compute_what_plain_torch_does_within_bounds_and_without_races():
    pytest.importorskip('triton')
    worker = ROOT / 'tests' / 'helpers' / 'ptx_worker.py'
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    command = [sys.executable, str(worker), str(EMULATOR)]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr  # an access out of bounds ends it
    seen = json.loads(outcome.stdout)
    assert seen['launches'] > 50 and not seen['races'] and not seen['divergent'], seen
    for name, difference in seen['differences'].items():
        tolerance = 2**-7 if 'bfloat16' in name else 2**-10 if 'float16' in name else 2e-6
        assert difference <= tolerance, (name, difference)
