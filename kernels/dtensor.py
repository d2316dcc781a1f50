"""DTensors, which FSDP2's fully_shard makes: their shards, possibly empty, and sums over them."""

import torch

from .tensors import local, sum_dtype


def shard_groups(x):
    """The process groups over which x is sharded: one a mesh dimension that does not replicate."""
    sharded = enumerate(x.placements) if hasattr(x, 'device_mesh') else ()
    return tuple(x.device_mesh.get_group(i) for i, p in sharded if not p.is_replicate())


def sharded_like(p, x):
    """x with the placements of p, a DTensor: cuts a whole tensor, adds up what is partial."""
    placements = getattr(p, 'placements', None)
    if x.shape != p.shape or getattr(x, 'placements', None) == placements:
        return x
    if hasattr(x, 'redistribute'):
        return x.redistribute(p.device_mesh, placements)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, p.device_mesh, placements, src_data_rank=None)


def all_reduce_(tensors, groups):
    """Replace {name: tensor}, of one dtype, by their sums over the processes of `groups`."""
    vector = torch.cat([x.reshape(-1) for x in tensors.values()])
    for group in groups:
        torch.distributed.all_reduce(vector, group=group)
    sums = vector.split([x.numel() for x in tensors.values()])
    for name, x in zip(list(tensors), sums, strict=True):
        tensors[name] = x.view(tensors[name].shape)


def square_sums(tensors):
    """sum(x ** 2) of each whole tensor, (len(tensors),). Every process must call it."""
    shards = (local(x.detach()) for x in tensors)  # one by one: their squares take memory
    sums = torch.stack([x.float().square().sum(dtype=sum_dtype(x.device)) for x in shards])
    kinds = [shard_groups(x) for x in tensors]
    for groups in dict.fromkeys(kinds):
        members = [j for j, kind in enumerate(kinds) if kind == groups]
        shards = {'sums': sums[members]}
        all_reduce_(shards, groups)
        sums[members] = shards['sums']
    return sums
