"""Compile the kernels for GPUs that need not be there, and count compilations over a schedule; JSON on stdout.

Run by tests/test_fused.py in a process of its own, because a process that runs kernels in Triton's interpreter cannot
compile them.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cpr import AdamCPR, AdamW, AdamWN
from kernels import fused

FP32, BF16 = tl.float32, tl.bfloat16
INTEGERS = ('n', 'chunks', 'last', 'j0', 'count', 'every', 'seed')
POINTERS = {
    'addresses': 'i64',
    'numel': 'i64',
    'owner': 'i32',
    'first': 'i32',
    'numbers': 'i32',
    'proceed': 'i1',
    'kappa_set': 'i1',
    'skipped_steps': 'i64',
}
NUMBERS = (
    'lr',
    'rest',
    'rest1',
    'rest2',
    'log_beta1',
    'log_beta2',
    'log_ema_decay',
    'eps',
    'rate',
    'mu',
    'warm_start',
    'max_norm',
    'target',
)


def adam(theta=FP32, moment=FP32, reg='l2', stochastic=False, keep=False):
    return fused._adam, dict(
        THETA=theta,
        GRAD=theta,
        MOMENT=moment,
        REG=reg,
        SUMS=True,
        STOCHASTIC=stochastic,
        KEEP=keep,
        LR='number',
    )


def kernels():
    """(name, kernel, constants, warps, whether it streams memory) of what a step launches."""
    yield 'adam float32', *adam(), 4, True
    yield 'adam float32, after', *adam(keep=True), 4, True
    yield 'adam float32, std', *adam(reg='std'), 4, True
    yield 'adam bfloat16', *adam(theta=BF16), 4, True
    yield 'adam bfloat16, stochastic', *adam(theta=BF16, stochastic=True), 4, True
    yield (
        'adam bfloat16, moments too, stochastic',
        *adam(theta=BF16, moment=BF16, stochastic=True),
        4,
        True,
    )
    yield 'correct float32', fused._correct, dict(THETA=FP32, REG='l2', STOCHASTIC=False), 4, True
    yield (
        'correct bfloat16, stochastic',
        fused._correct,
        dict(THETA=BF16, REG='l2', STOCHASTIC=True),
        4,
        False,
    )
    yield 'sums float32', fused._sums, dict(ROW=1, DTYPE=FP32, REG='l2', samples=None), 4, True
    yield 'clip', fused._clip, dict(grad_scale=None, found_inf=None), 8, False
    yield 'clip, all given', fused._clip, dict(), 8, False
    yield (
        'clip, not measured',
        fused._clip,
        dict(parts=None, grad_scale=None, found_inf=None),
        8,
        False,
    )
    yield (
        'constrain std',
        fused._constrain,
        dict(
            THETA=FP32,
            REG='std',
            METHOD='warm_start',
            LR='scalar',
            ema=None,
            ema_error=None,
            ema_last=None,
            ema_growth=None,
        ),
        4,
        False,
    )
    yield (
        'steer by tensors',
        fused._steer,
        dict(THETA=BF16, TARGET='vector', INIT='vector'),
        4,
        False,
    )
    yield (
        'constrain',
        fused._constrain,
        dict(THETA=FP32, REG='l2', METHOD='inflection_point', LR='number'),
        4,
        False,
    )
    yield 'steer', fused._steer, dict(THETA=FP32, TARGET='number', INIT='vector'), 4, False


def compiled(kernel, constants, warps, arch):
    names = list(inspect.signature(kernel.fn).parameters)
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = 'constexpr'
        elif name in INTEGERS:
            signature[name] = 'i32'
        elif (
            name in NUMBERS
            and constants.get({'lr': 'LR', 'target': 'TARGET'}.get(name), 'number') == 'number'
        ):
            signature[name] = 'fp32'
        else:
            signature[name], attributes[i,] = (
                '*' + POINTERS.get(name, 'fp32'),
                [['tt.divisibility', 16]],
            )
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget('cuda', arch, 32), options={'num_warps': warps})


def full_block_path(ptx):
    """The basic blocks with 16-byte accesses: what a chunk runs through that is whole and aligned."""
    blocks = re.split(r'^\$L__BB\w+:|\bbra\b', ptx, flags=re.MULTILINE)
    return '\n'.join(block for block in blocks if re.search(r'\.global\S*\.v4\.b32', block))


def figures(binary):
    """What the assembly says of a kernel: PTX for the width of accesses, the GPU's own for registers and memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'kernel.cubin'
        path.write_bytes(binary.asm['cubin'])
        tools = triton.knobs.nvidia

        def tool(knob, *arguments):
            return subprocess.run(
                [knob.path, *arguments, str(path)], capture_output=True, text=True, check=True
            ).stdout

        usage, sass = tool(tools.cuobjdump, '--dump-resource-usage'), tool(tools.nvdisasm, '-c')
    path = full_block_path(binary.asm['ptx'])
    accesses = re.findall(r'\b(?:ld|st)\.global\S*', path)
    return {
        'registers': int(re.search(r'REG:(\d+)', usage)[1]),
        'stack': int(re.search(r'STACK:(\d+)', usage)[1]),
        'local': int(re.search(r'LOCAL:(\d+)', usage)[1])
        + len(re.findall(r'\b(?:LDL|STL)\b', sass)),
        'sass_wide': len(re.findall(r'\b(?:LDG|STG)\S*\.128', sass)),
        'wide_loads': sum(x.startswith('ld') and '.v4.b32' in x for x in accesses),
        'wide_stores': sum(x.startswith('st') and '.v4.b32' in x for x in accesses),
        'narrow': sum('.v4.b32' not in x for x in accesses),
        'barriers': path.count('bar.sync'),
    }


class NoGPU:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compilations():
    """How many kernels are compiled in the first two steps of each optimizer, and in the twenty after them."""
    triton.runtime.driver.set_active(NoGPU())
    count = [0]
    triton.knobs.runtime.jit_post_compile_hook = lambda **_: count.__setitem__(0, count[0] + 1)

    def compile_only(kernel, programs, t, *args, num_warps=4, **flags):
        kernel.warmup(
            len(t.params), t.chunk_of[-1], *args, num_warps=num_warps, grid=(programs,), **flags
        )

    fused._launch, fused.INTERPRETED = compile_only, True
    counts = {}
    for name, make in {
        'adamw': lambda p: AdamW(p, impl='triton', max_grad_norm=1.0),
        'adamcpr': lambda p: AdamCPR(p, impl='triton', reg_by_lr=True, max_grad_norm=1.0),
        'adamwn': lambda p: AdamWN(p, impl='triton', order='before', max_grad_norm=1.0),
    }.items():
        params = [torch.nn.Parameter(torch.ones(n, 16)) for n in (1, 16, 700)]
        optimizer, seen = make(params), []
        for i in range(22):
            for p in params:
                p.grad = torch.ones_like(p)
            for group in optimizer.param_groups:
                group['lr'] = [0.0, 1.0, 0.5, 16.0, 1e-3, 3e-4][i % 6]
                group['ratio'] = 1.0 + i / 16
            optimizer.step()
            seen.append(count[0])
        counts[name] = [seen[1], seen[-1] - seen[1]]
        count[0] = 0
    return counts


if __name__ == '__main__':
    table = []
    for name, kernel, constants, warps, streams in kernels():
        for arch in (80, 90, 100):
            row = figures(compiled(kernel, constants, warps, arch))
            table.append({'kernel': name, 'arch': arch, 'streams': streams, **row})
    print(json.dumps({'kernels': table, 'compilations': compilations()}))
