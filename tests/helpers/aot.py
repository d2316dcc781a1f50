"""Compile the Triton kernels for GPUs that are not here; print what was found as JSON.

A process that runs kernels in Triton's interpreter cannot compile them, so test_kernels_gpu.py runs
this file as a process of its own.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from cpr import AdamCPR, AdamH, AdamW, AdamWN
from nanonorm.kernels import gpu
from nanonorm.kernels.bucket import Bucket

POINTERS = {
    'chunks': 'i64',
    'addresses': 'i64',
    'first': 'i64',
    'proceed': 'i1',
    'totals': 'fp64',
}
WIDTH = r'\.(?:v(?P<count>\d)\.)?[bfsu](?P<bits>\d+)'
ACCESS = re.compile(r'\b(?P<kind>ld|st)\.global\S*?' + WIDTH + r'\s')


def kernels():
    """(name, kernel, its constants) of what a step launches."""
    for dtype in gpu.DTYPES.values():
        for reg in ('l2', 'l1', 'huber') if dtype is tl.float32 else ('l2',):
            constants = dict(DTYPE=dtype, REG=reg)
            yield f'adam {dtype} {reg}', gpu._adam, constants
            yield f'correct {dtype} {reg}', gpu._correct, constants
            yield f'sums {dtype} {reg}', gpu._sums, dict(COLUMN=0, **constants)
        yield f'moments {dtype}', gpu._adam, dict(DTYPE=dtype, REG=None)
        yield f'apply {dtype}', gpu._apply, dict(DTYPE=dtype)
    yield 'totals', gpu._totals, {}


def compiled(kernel, constants, arch):
    names = list(inspect.signature(kernel.fn).parameters)
    pointers = {name: '*' + POINTERS.get(name, 'fp32') for name in names}
    source = ASTSource(
        fn=kernel,
        signature={**pointers, **dict.fromkeys(constants, 'constexpr')},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [['tt.divisibility', 16]] for i, n in enumerate(names) if n not in constants},
    )
    target, options = GPUTarget('cuda', arch, 32), {'num_warps': gpu.WARPS}
    return triton.compile(source, target=target, options=options)


def loops(ptx):
    """What every loop does, from its label to the branch back: bytes a lane accesses, barriers."""
    labels = {m[1]: m.end() for m in re.finditer(r'^(\$L__BB\w+):', ptx, re.MULTILINE)}
    found = []
    for branch in re.finditer(r'\bbra\S*\s+(\$L__BB\w+);', ptx):
        if labels[branch[1]] < branch.start():
            body = ptx[labels[branch[1]] : branch.start()]
            accesses = [
                (a['kind'], int(a['count'] or 1) * int(a['bits']) // 8)
                for a in ACCESS.finditer(body)
            ]
            found.append(
                {
                    'loads': [size for kind, size in accesses if kind == 'ld'],
                    'stores': [size for kind, size in accesses if kind == 'st'],
                    'barriers': len(re.findall(r'\bbar(?:rier)?\b', body)),
                }
            )
    return found


def memory(binary):
    """Registers of a thread and bytes that it spills, as the GPU's own assembler has it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'kernel.cubin'
        path.write_bytes(binary.asm['cubin'])
        command = [triton.knobs.nvidia.cuobjdump.path, '--dump-resource-usage', str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(n) for name, n in re.findall(r'(REG|STACK|LOCAL):(\d+)', usage)}
    return {'registers': used['REG'], 'spilled': used['STACK'] + used['LOCAL']}


class NoGPU:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compilations():
    """How many kernels each optimizer compiles in its first two steps, and in twenty after them."""
    triton.runtime.driver.set_active(NoGPU())
    count = [0]
    triton.knobs.runtime.jit_post_compile_hook = lambda **_: count.__setitem__(0, count[0] + 1)
    run = JITFunction.run
    JITFunction.run = lambda kernel, *args, **kwargs: run(
        kernel, *args, **kwargs | {'warmup': True}
    )
    gpu.INTERPRETED = True  # so that it takes tensors of the CPU
    Bucket.zeros = lambda bucket: []  # nothing is summed: AdamH must not ask for norms of 0
    common, counts = dict(impl='triton', max_grad_norm=1.0), {}
    for name, make in {
        'adamw': lambda p: AdamW(p, **common),
        'adamcpr': lambda p: AdamCPR(p, reg_by_lr=True, **common),
        'adamcpr after': lambda p: AdamCPR(p, reg_function='std', order='after', **common),
        'adamwn before': lambda p: AdamWN(p, order='before', **common),
        'adamh': lambda p: AdamH(p, **common),
    }.items():
        params = [torch.nn.Parameter(torch.ones(n, 16)) for n in (1, 16, 700)]
        optimizer, seen = make(params), []
        for i in range(22):
            for p in params:
                p.grad = torch.ones_like(p)
            for group in optimizer.param_groups:
                group['lr'] = [0.0, 1.0, 0.5, 16.0, 1e-3, 3e-4][i % 6]
                group['ratio'], group['ramp'] = 1.0 + i / 16, i / 22
            optimizer.step()
            seen.append(count[0])
        counts[name] = [seen[1], seen[-1] - seen[1]]
        count[0] = 0
    return counts


if __name__ == '__main__':
    table = []
    for name, kernel, constants in kernels():
        for arch in (80, 90, 100):
            binary = compiled(kernel, constants, arch)
            row = {'kernel': name, 'arch': arch, **memory(binary)}
            table.append({**row, 'loops': loops(binary.asm['ptx'])})
    print(json.dumps({'kernels': table, 'compilations': compilations()}))
