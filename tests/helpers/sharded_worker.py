"""Run by test_parallel.py under torchrun: optimizers on DTensors beside the same on whole tensors.

    torchrun --nproc_per_node=4 tests/helpers/sharded_worker.py IMPL [NAME OF A CASE ...]

Rank 0 prints a line a case: its name, and the largest relative difference of weights, states and
gradient norm. IMPL is the `impl` that updates the shards; the reference has 'torch'.
"""

import sys
from operator import mul
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from cpr import AdamCPR, AdamH, AdamW, AdamWN
from runtime.distributed import start

SHAPES = [(7, 6), (1, 5), (8, 4), (3, 2, 2), (6,)]  # four uneven shards, some of them empty
SHAPES += [(2, 3), (3, 2)]  # an ordinary tensor, and a DTensor that every rank has whole
STEPS = 10  # the sixth has a gradient that is not finite


def same_start():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) + 0.3 for shape in SHAPES]


def gradient(step, j):
    generator = torch.Generator().manual_seed(100 * step + j)
    grad = torch.randn(SHAPES[j], generator=generator)
    return grad * torch.inf if step == 5 and j == 1 else grad


def shard(x, mesh, placements):
    return distribute_tensor(x, mesh, placements, src_data_rank=None)  # every rank has x


def placed(j, x, mesh, placements):
    """Return x as the parameter of SHAPES[j] is: sharded, but for the last two."""
    if j < 5:
        return shard(x, mesh, placements)
    return x.clone() if j == 5 else shard(x, mesh, [Replicate()] * mesh.ndim)


def difference(ours, theirs, scale=None):
    """Return the largest of this rank's elements, relative to the largest of scale (theirs)."""
    ours, theirs = ours.detach(), theirs.detach().double()
    scale = (theirs if scale is None else scale).nan_to_num(0).abs().max().clamp(min=1e-3)
    if hasattr(ours, 'to_local'):
        theirs = shard(theirs, ours.device_mesh, ours.placements).to_local()
        ours = ours.to_local()
    ours = ours.double()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    differences = (ours - theirs).nan_to_num(0, 0, 0).abs() / scale
    return differences.max().item() if differences.numel() else 0.0


reductions = []  # the calls of all_reduce


def counted(*args, all_reduce=torch.distributed.all_reduce, **options):
    reductions.append(args)
    return all_reduce(*args, **options)


def compare(cls, options, impl, mesh, placements):
    whole = [torch.nn.Parameter(x) for x in same_start()]
    sharded = [placed(j, x, mesh, placements) for j, x in enumerate(same_start())]
    sharded = [torch.nn.Parameter(x) for x in sharded]
    reference, opt = cls(whole, impl='torch', **options), cls(sharded, impl=impl, **options)
    if cls is AdamWN:
        for optimizer, params in ((reference, whole), (opt, sharded)):
            optimizer.param_groups[0]['ramp'] = 0.6
            if optimizer.scope == 'tensor':
                optimizer.set_ratios({params[0]: 0.5})
    worst = 0.0
    for step in range(STEPS):
        for j, (p, q) in enumerate(zip(whole, sharded, strict=True)):
            p.grad = gradient(step, j)
            q.grad = placed(j, p.grad, mesh, placements)
        reference.step()
        reductions.clear()
        opt.step()
        # the sums for the norm of the gradients, and in order 'before' those for R with them
        decisions = [1 + (b.measures_R and opt.order != 'before') for b in opt._buckets]
        groups = [len(b.shard_groups) for b in opt._buckets]
        assert step == 0 or len(reductions) == sum(map(mul, decisions, groups))
        worst = max(worst, difference(opt.grad_norm, reference.grad_norm))
        for p, q in zip(whole, sharded, strict=True):
            worst = max(worst, difference(q, p))
            assert reference.state[p].keys() == opt.state[q].keys()
            for name, value in reference.state[p].items():
                # a growth is a difference of averages, and rounds as they do
                scale = reference.state[p]['ema'] if name == 'ema_growth' else None
                worst = max(worst, difference(opt.state[q][name], value, scale))
    assert opt.skipped_steps == reference.skipped_steps == 1

    # a state dict of whole tensors goes into an optimizer of DTensors
    copies = [torch.nn.Parameter(q.detach().clone()) for q in sharded]
    other = cls(copies, impl=impl, **options)
    other.load_state_dict(reference.state_dict())
    for p, q in zip(whole, copies, strict=True):
        assert difference(other.state[q]['exp_avg'], reference.state[p]['exp_avg']) == 0
    return worst


def cases():
    """Yield (name, class, options)."""
    dependent = dict(kappa_init_method='dependent', kappa_init_param=0.7)
    warm_start = dict(kappa_init_method='warm_start', kappa_init_param=4, kappa_update=3.0)
    for order in ('before', 'after'):
        common = dict(order=order, lr=0.05, max_grad_norm=2.0)
        for reg_function in ('l2', 'l1', 'std', 'huber'):
            options = dict(reg_function=reg_function, **dependent, **common)
            yield f'cpr {reg_function} {order}', AdamCPR, options
        yield f'cpr warm_start {order}', AdamCPR, {**warm_start, **common}
        options = dict(reg_step_size=2, reg_ema_decay=0.0, **common)
        yield f'cpr inflection_point {order}', AdamCPR, options
        for scope in ('tensor', 'global'):
            options = dict(rate=0.3, ratio=1.5, scope=scope, **common)
            yield f'wn {scope} {order}', AdamWN, options
    yield 'adamw', AdamW, dict(lr=0.05, weight_decay=0.5, max_grad_norm=1.0)
    yield 'h', AdamH, dict(lr=0.05, step_scale=2.0, max_grad_norm=1.0)


def main(impl, *names):
    ranks = start('fsdp', 'cpu')
    torch.distributed.all_reduce = counted
    flat = init_device_mesh('cpu', (ranks.world_size,))
    grid = init_device_mesh('cpu', (2, ranks.world_size // 2))
    meshes = (grid, (Replicate(), Shard(0))), (flat, (Shard(0),))
    for number, (name, cls, options) in enumerate(cases()):
        if name in (names or [name]):
            worst = torch.tensor(compare(cls, options, impl, *meshes[number % 2]))
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
            print(f'{name}: {worst.item()}')
    ranks.close()


main(*sys.argv[1:])
