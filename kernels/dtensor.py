"""DTensors, which FSDP2's fully_shard makes: their shards, possibly empty, and sums over them."""

import torch


def local(x):
    """This process's shard of a DTensor; any other tensor as it is."""
    return x.to_local() if hasattr(x, 'device_mesh') else x


def shard_groups(x):
    """The process groups over which x is sharded: one a mesh dimension that does not replicate."""
    sharded = enumerate(x.placements) if hasattr(x, 'device_mesh') else ()
    return tuple(x.device_mesh.get_group(i) for i, p in sharded if not p.is_replicate())


def sharded_like(p, value):
    """`value`, sharded as p is where p is a DTensor and value a whole tensor of its shape."""
    if not hasattr(p, 'device_mesh') or hasattr(value, 'device_mesh') or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


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
    sums = torch.stack([total(local(x.detach()).float().square()) for x in tensors])
    for groups in dict.fromkeys(map(shard_groups, tensors)):
        members = [j for j, x in enumerate(tensors) if shard_groups(x) == groups]
        shards = {'sums': sums[members]}
        all_reduce_(shards, groups)
        sums[members] = shards['sums']
    return sums


def total(x):
    """The sum of x, 0-d: in float64, where the device has that."""
    return x.sum(dtype=torch.float32 if x.device.type == 'mps' else torch.float64)
