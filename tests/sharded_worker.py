"""Run by test_parallel.py under torchrun: optimizers on spread and on divided tensors beside the same on whole ones.

Rank 0 prints one line a case: its name, the largest relative difference of weights, states and gradient norm.
"""

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from cpr import AdamCPR, AdamW, AdamWN

SHAPES = [(7, 6), (1, 5), (8, 4), (3, 2, 2), (6,)]  # uneven in four parts, some parts empty
STEPS = 10  # the sixth has a gradient that is not finite


def same_start(scale=1.0):
    generator = torch.Generator().manual_seed(3)
    return [scale * (torch.randn(shape, generator=generator) + 0.3) for shape in SHAPES]


def gradient(step, j):
    generator = torch.Generator().manual_seed(100 * step + j)
    return torch.randn(SHAPES[j], generator=generator) * (
        float('inf') if step == 5 and j == 1 else 1.0
    )


def difference(ours, theirs):
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert torch.equal(ours.isnan(), theirs.isnan())
    scale = theirs.nan_to_num(0).abs().max().clamp(min=1e-3)
    return ((ours - theirs).nan_to_num(0, 0, 0).abs().max() / scale).item()


def on_dtensors(cls, options, mesh, placements):
    whole = [torch.nn.Parameter(x) for x in same_start()]
    spread = [torch.nn.Parameter(distribute_tensor(x, mesh, placements)) for x in same_start()]
    reference, opt = cls(whole, **{**options, 'impl': 'torch'}), cls(spread, **options)
    worst = 0.0
    for step in range(STEPS):
        for j, (p, q) in enumerate(zip(whole, spread, strict=True)):
            p.grad = gradient(step, j)
            q.grad = distribute_tensor(gradient(step, j), mesh, placements)
        reference.step()
        opt.step()
        if options.get('max_grad_norm', 0.0) is not None:
            worst = max(worst, difference(opt.grad_norm, reference.grad_norm))
        for p, q in zip(whole, spread, strict=True):
            worst = max(worst, difference(q.detach().full_tensor(), p.detach()))
            assert reference.state[p].keys() == opt.state[q].keys()
            for name, value in reference.state[p].items():
                ours = opt.state[q][name]
                worst = max(
                    worst,
                    difference(ours.full_tensor() if hasattr(ours, 'full_tensor') else ours, value),
                )
    assert (
        opt.skipped_steps
        == reference.skipped_steps
        == (1 if options.get('max_grad_norm', 0.0) is not None else 0)
    )

    # a state dict of whole tensors goes into an optimizer of DTensors
    other = cls([torch.nn.Parameter(q.detach().clone()) for q in spread], **options)
    other.load_state_dict(reference.state_dict())
    for p, q in zip(whole, other.param_groups[0]['params'], strict=True):
        assert torch.equal(other.state[q]['exp_avg'].full_tensor(), reference.state[p]['exp_avg'])
    return worst


def divided(cls, options):
    """The same with ZeroRedundancyOptimizer: each rank has some of the tensors."""
    whole, ours = ([torch.nn.Parameter(x) for x in same_start()] for _ in range(2))
    reference = cls(whole, **options)
    groups = [{'params': ours[:4]}, {'params': ours[4:], 'regularize': False}]
    opt = ZeroRedundancyOptimizer(
        groups, functools.partial(cls, process_group=dist.group.WORLD, **options)
    )
    worst = 0.0
    for step in range(STEPS):
        for j, (p, q) in enumerate(zip(whole, ours, strict=True)):
            p.grad, q.grad = gradient(step, j), gradient(step, j)
            if step == STEPS - 1 and j > 0:  # all but one rank are left without a gradient
                p.grad = q.grad = None
        reference.step()
        opt.step()
        worst = max(worst, difference(opt.optim.grad_norm, reference.grad_norm))
        for p, q in zip(whole, ours, strict=True):
            worst = max(worst, difference(q.detach(), p.detach()))
    assert opt.optim.skipped_steps == reference.skipped_steps
    return worst


def main():
    dist.init_process_group('gloo')
    ranks = dist.get_world_size()
    flat = init_device_mesh('cpu', (ranks,))
    grid = init_device_mesh('cpu', (2, ranks // 2), mesh_dim_names=('replicate', 'shard'))
    impl = os.environ.get('IMPL', 'torch')
    cases = {}
    for order in ('before', 'after'):
        for reg_function in ('l2', 'l1', 'std', 'huber'):
            cases[f'cpr {reg_function} {order}'] = (
                AdamCPR,
                dict(
                    kappa_init_method='dependent',
                    kappa_init_param=0.7,
                    reg_function=reg_function,
                    order=order,
                    lr=0.05,
                ),
            )
        cases[f'cpr warm_start {order}'] = (
            AdamCPR,
            dict(
                kappa_init_method='warm_start',
                kappa_init_param=4,
                order=order,
                lr=0.05,
                kappa_update=3.0,
            ),
        )
        cases[f'cpr inflection_point {order}'] = (
            AdamCPR,
            dict(reg_step_size=2, reg_ema_decay=0.0, order=order, lr=0.05),
        )
        for scope in ('tensor', 'global'):
            cases[f'wn {scope} {order}'] = (
                AdamWN,
                dict(rate=0.3, ratio=1.5, scope=scope, order=order, lr=0.05),
            )
    cases['adamw'] = AdamW, dict(lr=0.05, weight_decay=0.5, max_grad_norm=1.0)
    if impl != 'torch':
        cases = {
            name: cases[name]
            for name in ('cpr l2 before', 'cpr std before', 'cpr std after', 'wn global after')
        }
    for number, (name, (cls, options)) in enumerate(cases.items()):
        options = {'max_grad_norm': 2.0, 'impl': impl, **options}
        mesh, placements = ((grid, (Replicate(), Shard(0))), (flat, (Shard(0),)))[number % 2]
        lines = [f'{name}: {on_dtensors(cls, options, mesh, placements)}']
        if impl == 'torch':
            lines.append(f'{name}, divided: {divided(cls, options)}')
        if dist.get_rank() == 0:
            print(*lines, sep='\n', flush=True)
    dist.barrier()  # gloo aborts a process that leaves while another is still at its last sum
    dist.destroy_process_group()
    # A thread of gloo may still be letting go of its last tensor, and if the interpreter is being taken down then, the
    # process aborts (https://github.com/pytorch/pytorch/pull/179291): so it is not taken down.
    sys.stdout.flush()
    os._exit(0)


main()
