"""The tables of docs/scaling.md: bytes moved and time a step on H200s, on paper.

    python scripts/scaling.py

Times are bytes over published bandwidths and FLOPs over the published peak: bounds that no run goes below, not
measurements. Collectives are counted as NCCL does them between nodes: inside a node by NVLink, between nodes once a
node, spread over its 8 network cards.
"""

HBM = 4.8e12  # bytes/s, H200 data sheet
NVLINK = 450e9  # bytes/s a direction and GPU, H200 data sheet: 900 GB/s both ways
NETWORK = 50e9  # bytes/s a direction and GPU: one 400 Gb/s card for each, as in a DGX H200
PEAK = 989e12  # FLOP/s, bfloat16 without sparsity
MEMORY = 141e9  # bytes
HOP = 5e-6  # s, assumed: a hop of a small message's way through the tree of an all-reduce
TOKENS = 16384  # a GPU and step
MODELS = {  # parameters, layers, largest unit that fsdp gathers at a time: a block
    'GPT-2 1.5B': (1.56e9, 48),
    '70B': (70e9, 80),
}


def collective(full, gpus, passes):
    """(bytes through NVLink, bytes through the network) of each GPU: `passes` of reduce-scatter or all-gather."""
    node, nodes = min(gpus, 8), max(gpus // 8, 1)
    return passes * full * (node - 1) / node, passes * full / 8 * (nodes - 1) / nodes


def engine(name, n, layers, gpus):
    """memory, NVLink bytes, network bytes, parameters updated here, bytes of the constraint's sums: of each GPU."""
    tensors = 4 * layers  # that AdamCPR regularizes
    nodes = max(gpus // 8, 1)
    if name == 'ddp':
        return 16 * n, *collective(4 * n, gpus, 2), n, 0
    if name == 'zero':  # the gradients' all-reduce, and a broadcast of every parameter
        return 8 * n + 8 * n / gpus, *collective(4 * n, gpus, 3), n / gpus, 0
    if (
        name == 'fsdp'
    ):  # gathers in bfloat16 for forward and backward, a reduce-scatter of the gradients in float32
        gathers, reduction = collective(2 * n, gpus, 2), collective(4 * n, gpus, 1)
        nvlink, network = (g + r for g, r in zip(gathers, reduction, strict=True))
        return 16 * n / gpus + 2 * n / layers, nvlink, network, n / gpus, 8 * tensors
    # fsdp within a node, replicated over nodes: the network carries the all-reduce of an eighth of the gradients
    nvlink = collective(2 * n, 8, 2)[0] + collective(4 * n, 8, 1)[0]
    return (
        16 * n / 8 + 2 * n / layers,
        nvlink,
        2 * 4 * n / 8 * (nodes - 1) / nodes,
        n / 8,
        8 * tensors,
    )


def ms(seconds):
    return f'{seconds * 1e3:,.1f}' if seconds >= 1e-4 else f'{seconds * 1e3:.3f}'


def main():
    for model, (n, layers) in MODELS.items():
        print(
            f'\n**{model}**, {TOKENS:,} tokens a GPU: forward and backward {ms(6 * n * TOKENS / PEAK)} ms at peak\n'
        )
        print(
            '| GPUs | engine | memory, GB | NVLink, GB | network, GB | communication, ms | update, ms | '
            'the constraint adds, bytes | the constraint adds, ms |'
        )
        print('|---' * 9 + '|')
        for gpus in (8, 64, 1024):
            for name in ('ddp', 'zero', 'fsdp') + (('fsdp, shards of 8',) if gpus > 8 else ()):
                memory, nvlink, network, updated, sums = engine(name, n, layers, gpus)
                seconds = max(nvlink / NVLINK, network / NETWORK)
                if memory > MEMORY:
                    print(f'| {gpus:,} | {name} | {memory / 1e9:,.0f}: does not fit | | | | | | |')
                    continue
                # clipping needs the all-reduce in any case: what the constraint adds to it is the length of its message
                print(
                    f'| {gpus:,} | {name} | {memory / 1e9:,.1f} | {nvlink / 1e9:,.1f} | {network / 1e9:,.1f} | '
                    f'{ms(seconds)} | {ms(32 * updated / HBM)} | {sums:,} | '
                    f'{f"{2 * sums / NETWORK * 1e3:.5f}" if sums else "0"} |'
                )
    hops = {gpus: 2 * (gpus - 1).bit_length() for gpus in (8, 64, 1024)}
    print('\n| GPUs | hops of a small all-reduce | ms at 5 us a hop |\n|---|---|---|')
    for gpus, count in hops.items():
        print(f'| {gpus:,} | {count} | {count * HOP * 1e3:.2f} |')


if __name__ == '__main__':
    main()
