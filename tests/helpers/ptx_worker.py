"""Take steps with the Triton kernels as compiled for sm_90, executed by an emulator of PTX.

tests/test_kernels_ptx.py runs it as a process: python ptx_worker.py FOLDER_OF_THE_EMULATOR. It
prints one JSON object: launches, races, divergent barriers, and each case's largest difference from
the same steps in plain PyTorch.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [sys.argv[1], str(Path(__file__).resolve().parents[2])]

import harness  # noqa: I001, E402  (before anything imports triton)
import torch  # noqa: E402

from cpr import AdamCPR, AdamH, AdamW, AdamWN  # noqa: E402
from nanonorm.kernels import gpu  # noqa: E402

SIZES = [1, 1023, 8192, 20000]
TABLES = {}  # address of a table on the device: kernels.tensors.Table


def touches(kernel, arguments):
    """What a launch may write among its arguments, and the tensors behind the table."""
    if kernel == '_totals':
        return {'totals'}, []
    t = TABLES[arguments['addresses'].data_ptr()]
    grads = [g for g in t.grads if g is not None]
    behind = [(f'theta {j}', p, kernel != '_sums') for j, p in enumerate(t.params)]
    behind += [(f'grad {j}', g, False) for j, g in enumerate(grads)]
    for name, moments in (('exp_avg', t.exp_avgs), ('exp_avg_sq', t.exp_avg_sqs)):
        known = [(f'{name} {j}', m, True) for j, m in enumerate(moments) if m is not None]
        behind += [(n, m, w and kernel == '_adam') for n, m, w in known]
    return {'sums'} & arguments.keys(), behind


class NotedTable(gpu.Tensors):
    def set_grads(self, grads):
        super().set_grads(grads)
        TABLES[self.addresses.data_ptr()] = self


gpu.Tensors, gpu.INTERPRETED = NotedTable, True
device = harness.install(touches, arch=90)


def weights(dtype):
    """A tensor of each size, and one that does not begin at a multiple of 16 bytes."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=g).to(dtype) for n in SIZES]
    memory = torch.randn(2050, generator=g).to(dtype)
    return [*tensors, memory[1:]]


def take_steps(make, impl, dtype):
    params = [torch.nn.Parameter(x) for x in weights(dtype)]
    options = {'lr': 1e-2, 'max_grad_norm': 1.0, 'impl': impl}
    optimizer = make([{'params': params, 'regularize': True}], **options)
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(dtype)
        if step == 1:  # skipped: nothing may change
            params[1].grad[5] = float('nan')
            before = [p.detach().clone() for p in params]
        optimizer.step()
        if step == 1:
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)), 'skipped'
    assert optimizer.skipped_steps == 1
    return params, optimizer


def cpr(reg_function, order):
    options = dict(kappa_init_method='dependent', kappa_init_param=0.9)
    return lambda p, **kw: AdamCPR(p, reg_function=reg_function, order=order, **options, **kw)


CASES = {
    'adamw': (lambda p, **kw: AdamW(p, weight_decay=0.3, **kw), torch.float32),
    'adamw bfloat16': (lambda p, **kw: AdamW(p, weight_decay=0.3, **kw), torch.bfloat16),
    'cpr l2 before': (cpr('l2', 'before'), torch.float32),
    'cpr std after': (cpr('std', 'after'), torch.float32),
    'cpr l1 before': (cpr('l1', 'before'), torch.float32),
    'cpr huber after, float16': (cpr('huber', 'after'), torch.float16),
    'wn before': (
        lambda p, **kw: AdamWN(p, rate=0.1, ratio=1.5, order='before', **kw),
        torch.float32,
    ),
    'wn global after': (lambda p, **kw: AdamWN(p, ratio=1.5, scope='global', **kw), torch.float32),
    'h': (lambda p, **kw: AdamH(p, **kw), torch.float32),
    'h bfloat16': (lambda p, **kw: AdamH(p, **kw), torch.bfloat16),
    'wn eps 0': (lambda p, **kw: AdamWN(p, ratio=1.5, eps=0.0, **kw), torch.float32),
}

differences = {}
for name, (make, dtype) in CASES.items():
    (ours, optimizer), (theirs, other) = (take_steps(make, i, dtype) for i in ('triton', 'torch'))
    found = []
    for p, q in zip(ours, theirs, strict=True):
        pairs = [(p.detach(), q.detach())]
        pairs += [(optimizer.state[p][k], other.state[q][k]) for k in ('exp_avg', 'exp_avg_sq')]
        for x, y in pairs:
            found.append((x.double() - y.double()).abs().max() / y.abs().max())
    differences[name] = torch.stack(found).max().item()  # nan if one of them is

# eps = 0 and gradients so small that their squares are subnormal: u is 1, not infinite
p = torch.nn.Parameter(torch.ones(4))
p.grad = torch.full((4,), 1e-18)
AdamW([p], lr=0.5, eps=0.0, weight_decay=0.0, impl='triton').step()
differences['tiny gradients'] = (p - 0.5).abs().max().item()

races = [str(race) for race in device.races]
divergent = [str(lanes) for lanes in device.divergent]
print(
    json.dumps(
        {
            'launches': len(device.launches),
            'races': races,
            'divergent': divergent,
            'differences': differences,
        }
    )
)
