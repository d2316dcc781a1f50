"""Run by test_parallel.py under torchrun: what an engine communicates, and what it keeps where.

    torchrun --nproc_per_node=2 tests/helpers/engine_worker.py ENGINE SHARD_SIZE

Rank 0 prints a JSON object. `gathers` and `scatters` count the all-gathers and reduce-scatters of
an iteration, `groups` the groups of parameters that are gathered together. `gathered` has, after
each micro-step, how many of the groups are whole. `error` is the gradients' largest difference from
those of one process. The others have the largest share of a tensor that this process keeps: of
gradients, of moments, and of parameters after a step and after an evaluation.
"""

import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cpr import AdamW
from model import GPT, GPTConfig
from runtime.device import setup
from runtime.distributed import start

MICRO_STEPS = 3


class Calls(TorchDispatchMode):
    """The names of the operations that are called within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def largest_share(tensors):
    parts = [(x.to_local() if isinstance(x, DTensor) else x).numel() / x.numel() for x in tensors]
    return max(parts)


def main(engine, shard_size):
    rt = setup('cpu', 'float32')
    ranks = start(engine, 'cpu')
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=32))
    alone = copy.deepcopy(model)
    compiled = ranks.wrap(model, rt, shard_size=shard_size)
    params, opt = list(model.parameters()), AdamW(model)
    groups = [m for m in model.modules() if isinstance(m, FSDPModule)]
    tokens, gathered = torch.randint(32, (ranks.world_size, MICRO_STEPS, 2, 16)), []
    with Calls() as calls:
        for i, x in enumerate(tokens[ranks.rank]):
            with ranks.micro_step(last=i == MICRO_STEPS - 1):
                compiled(x, x)[1].backward()
            gathered.append(sum(not isinstance(next(m.parameters()), DTensor) for m in groups))
    for x in tokens.flatten(0, 1):
        (alone(x, x)[1] / ranks.world_size).backward()
    pairs = zip(params, alone.parameters(), strict=True)
    error = max((p.grad.full_tensor() - q.grad).abs().max().item() for p, q in pairs)
    gradients = largest_share([p.grad for p in params])
    opt.step()
    after_step = largest_share(model.parameters())
    with torch.no_grad():
        compiled(x, x)
    found = dict(
        groups=len(groups),
        gathers=sum('allgather' in name for name in calls.names),
        scatters=sum('reduce_scatter' in name for name in calls.names),
        gathered=gathered,
        error=error,
        gradients=gradients,
        moments=largest_share([opt.state[p]['exp_avg'] for p in params]),
        after_step=after_step,
        after_evaluation=largest_share(model.parameters()),
    )
    print(json.dumps(found))
    ranks.close()


main(sys.argv[1], int(sys.argv[2]))
