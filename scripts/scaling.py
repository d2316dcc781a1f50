"""Compute the tables of docs/scaling.md: bytes moved and time an iteration on H200s, on paper.

    python scripts/scaling.py

Times are bytes over published bandwidths and FLOPs over the published peak: bounds that no run goes
below, not measurements. Collectives are counted as NCCL does them: inside a node by NVLink, between
nodes once a node, spread over its 8 network cards.
"""

from dataclasses import dataclass

HBM = 4.8e12  # bytes/s, H200 data sheet
NVLINK = 450e9  # bytes/s a direction and GPU, H200 data sheet: 900 GB/s both ways
NETWORK = 50e9  # bytes/s a direction and GPU: one 400 Gb/s card for each, as in a DGX H200
PEAK = 989e12  # FLOP/s, bfloat16 without sparsity
MEMORY = 141e9  # bytes
HOP = 5e-6  # s, assumed: a hop of a small message's way through the tree of an all-reduce
TOKENS = 16384  # a GPU and micro-step
MODELS = {'GPT-2 1.5B': (1.56e9, 48), '70B': (70e9, 80)}  # parameters, layers
HEADER = [
    'GPUs',
    'engine',
    'memory, GB',
    'NVLink, GB',
    'network, GB',
    'communication, ms',
    'a further micro-step, ms',
    'update, ms',
    'the constraint adds, bytes',
    'the constraint adds, ms',
]


@dataclass
class Cost:
    """What an iteration of one micro-step costs each GPU. Traffic: (NVLink, network) in bytes."""

    memory: float
    traffic: tuple[float, float]
    further: tuple[float, float]  # of another micro-step
    updated: float  # parameters
    sums: int  # bytes that the constraint adds to the all-reduce of the gradients' norm


def collective(full, gpus, passes):
    """Traffic of `passes` of reduce-scatter or all-gather of `full` bytes."""
    node, nodes = min(gpus, 8), max(gpus // 8, 1)
    return passes * full * (node - 1) / node, passes * full / 8 * (nodes - 1) / nodes


def together(*traffics):
    return tuple(map(sum, zip(*traffics, strict=True)))


def engine(name, n, layers, gpus):
    """The Cost of n parameters. name: 'ddp', or 'zero' or 'fsdp' with an optional shard size."""
    kind, _, shards = name.partition(', shards of ')
    if kind == 'ddp':  # an all-reduce of the gradients
        return Cost(16 * n, collective(4 * n, gpus, 2), (0, 0), n, 0)
    shards = int(shards or gpus)
    copies = gpus // shards
    gather, reduction = collective(2 * n, shards, 1), collective(4 * n, shards, 1)
    # copies of a shard are on different nodes
    average = (0, 2 * 4 * n / shards * (copies - 1) / copies)
    # a block's gradient in bfloat16, and in float32 where it is reduced
    memory = 16 * n / shards + 6 * n / layers
    # l2's sums are two float64 for each of a layer's four matrices and the two embeddings
    sums = 16 * (4 * layers + 2)
    if kind == 'zero':
        traffic = together(gather, reduction, average)
        return Cost(2 * n + memory, traffic, reduction, n / shards, sums)
    step = together(gather, gather, reduction)
    return Cost(2 * n / layers + memory, together(step, average), step, n / shards, sums)


def seconds(traffic):
    nvlink, network = traffic
    return max(nvlink / NVLINK, network / NETWORK)


def ms(seconds):
    return f'{seconds * 1e3:,.1f}' if seconds >= 1e-4 or not seconds else f'{seconds * 1e3:.3f}'


def row(gpus, name, cost):
    if cost.memory > MEMORY:
        fits_not = f'{cost.memory / 1e9:,.0f}: does not fit'
        return [f'{gpus:,}', name, fits_not] + [''] * (len(HEADER) - 3)
    # clipping needs the all-reduce in any case: the constraint lengthens its message
    added = f'{2 * cost.sums / NETWORK * 1e3:.5f}' if cost.sums else '0'
    return [
        f'{gpus:,}',
        name,
        f'{cost.memory / 1e9:,.1f}',
        *(f'{size / 1e9:,.1f}' for size in cost.traffic),
        ms(seconds(cost.traffic)),
        ms(seconds(cost.further)),
        ms(32 * cost.updated / HBM),
        f'{cost.sums:,}',
        added,
    ]


def table(header, rows):
    print('\n| ' + ' | '.join(header) + ' |')
    print('|---' * len(header) + '|')
    for cells in rows:
        print('| ' + ' | '.join(cells) + ' |')


def main():
    for model, (n, layers) in MODELS.items():
        compute = ms(6 * n * TOKENS / PEAK)
        print(f'\n**{model}**, {TOKENS:,} tokens a GPU: forward and backward {compute} ms at peak')
        rows = []
        for gpus in (8, 64, 1024):
            names = ['ddp', 'zero', 'fsdp']
            names += ['zero, shards of 8', 'fsdp, shards of 8'] if gpus > 8 else []
            rows += [row(gpus, name, engine(name, n, layers, gpus)) for name in names]
        table(HEADER, rows)
    hops = {gpus: 2 * (gpus - 1).bit_length() for gpus in (8, 64, 1024)}
    rows = [[f'{gpus:,}', str(n), f'{n * HOP * 1e3:.2f}'] for gpus, n in hops.items()]
    table(['GPUs', 'hops of a small all-reduce', 'ms at 5 us a hop'], rows)


if __name__ == '__main__':
    main()
