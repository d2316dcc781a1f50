"""The processes that torchrun starts, as one run: who they are, the model spread over them, and what they agree on.

Started without torchrun there is one process, no process group, and everything here does nothing. What moves tensors
is torch.distributed's: DistributedDataParallel, ZeroRedundancyOptimizer, fully_shard, and all_reduce and broadcast of a
few numbers. Of those, what takes long to import is imported where it is used: one process starts without it.
"""

import functools
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import shards
from runtime import DTYPES, fail


@dataclass
class Ranks:
    """This process among its like. `engine` is None where it is alone, outside of torchrun."""

    engine: str | None = None  # 'ddp', 'zero' or 'fsdp'
    rank: int = 0
    world_size: int = 1

    def wrap(self, model, rt, compile=False, shard_size=0):
        """What to call in place of `model`, on the device of `rt`, a runtime.Runtime. Makes DTensors of an fsdp
        model's parameters: before the optimizer is made.

        shard_size: fsdp's processes that share one copy of the parameters; 0: all do.
        """
        if rt.dtype == 'float16' and self.engine in ('zero', 'fsdp'):
            fail(
                f"dtype='float16' needs every rank to see all gradients: with parallel='{self.engine}' take bfloat16"
            )
        self._net = model
        if self.engine == 'fsdp':
            self._spread(model, rt, compile, shard_size)
            return model
        model.to(rt.device)
        if self.engine:
            self._net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return (
            torch.compile(self._net) if compile else self._net
        )  # with DDP inside, its communication overlaps

    def _spread(self, model, rt, compile, shard_size):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if shard_size and self.world_size % shard_size:
            fail(
                f'fsdp_shard_size={shard_size} does not divide the {self.world_size} processes; choose one that does'
            )
        sizes = (self.world_size,)
        if (
            0 < shard_size < self.world_size
        ):  # each of replicate * shard processes; a node's are next to each other
            sizes = (self.world_size // shard_size, shard_size)
        mesh = init_device_mesh(
            rt.device_type, sizes, mesh_dim_names=('replicate', 'shard')[-len(sizes) :]
        )
        precision = MixedPrecisionPolicy()
        if rt.dtype != 'float32':
            precision = MixedPrecisionPolicy(
                param_dtype=DTYPES[rt.dtype], reduce_dtype=torch.float32
            )
        for block in model.transformer.h:
            if compile:
                block.compile()
            fully_shard(block, mesh=mesh, mp_policy=precision)
        fully_shard(model, mesh=mesh, mp_policy=precision)
        # training's backward spreads the parameters outside of the blocks again, an evaluation has none
        model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else model.reshard())

    @contextmanager
    def micro_step(self, last):
        """A context for forward and backward: the gradients are summed over the ranks in the last of an iteration."""
        if self.engine == 'fsdp':
            self._net.set_requires_gradient_sync(last)
        with nullcontext() if last or self.engine not in ('ddp', 'zero') else self._net.no_sync():
            yield

    def optimizer(self, make, opt):
        """`opt`, made by make(params), or for zero a ZeroRedundancyOptimizer of the same that divides its parameters.

        Options of its groups that are one value a parameter are divided with them.
        """
        self._opt = opt
        if self.engine != 'zero':
            return opt
        from torch.distributed.optim import ZeroRedundancyOptimizer

        groups = [part for group in opt.param_groups for part in _uniform(group)]
        if sum(len(group['params']) for group in groups) < self.world_size:
            fail(
                f"parallel='zero' has fewer tensors than the {self.world_size} processes; use 'ddp'"
            )
        return ZeroRedundancyOptimizer(
            groups, functools.partial(make, process_group=dist.group.WORLD)
        )

    def optimizer_state(self, opt):
        """opt.state_dict() of all parameters, as it is in one process; of zero on rank 0 alone, of fsdp in parts."""
        if self.engine != 'zero':
            return opt.state_dict()
        opt.consolidate_state_dict(to=0)
        if self.rank > 0:
            return {}
        params = [p for group in opt.param_groups for p in group['params']]
        of = {id(params[i]): state for i, state in opt.state_dict()['state'].items()}
        order = [p for group in self._opt.param_groups for p in group['params']]
        return {
            'state': {i: of[id(p)] for i, p in enumerate(order) if id(p) in of},
            'param_groups': self.param_groups(),
        }

    def param_groups(self):
        """The 'param_groups' of optimizer_state."""
        return self._opt.state_dict()['param_groups']

    def load_optimizer(self, opt, state):
        """Have `opt` go on from `state`, the 'state' of optimizer_state's: each process takes what is its own."""
        order = [p for group in self._opt.param_groups for p in group['params']]
        place = {id(p): i for i, p in enumerate(order)}
        own = self.local(opt)
        places = [place[id(p)] for group in own.param_groups for p in group['params']]
        own.load_state_dict(
            {
                'state': {k: state[i] for k, i in enumerate(places) if i in state},
                'param_groups': own.state_dict()['param_groups'],
            }
        )

    def local(self, opt):
        """The optimizer of this process's parameters: opt itself, or what zero's has inside."""
        return opt.optim if self.engine == 'zero' else opt

    def parts(self, model, opt):
        """{name: tensor} of what this process has of parameters and states, as folders.py writes them."""
        import folders

        params = dict(model.named_parameters())
        states = {name: self.local(opt).state.get(p, {}) for name, p in params.items()}
        return folders.tensors(params, states)

    def read_parts(self, folder, model, opt):
        """Fill model's parameters from `folder`; returns the states there of this process's parameters, as
        load_optimizer takes them."""
        import folders

        params = dict(model.named_parameters())
        own = {id(p) for group in self.local(opt).param_groups for p in group['params']}
        states = folders.read(folder, params, {name for name, p in params.items() if id(p) in own})
        return {
            i: states[name]
            for i, name in enumerate(folders.optimizer_names(model))
            if name in states
        }

    def scalars(self, opt, params, names):
        """For each of params a dict of those states among the 0-d `names` that some rank has of it, as numbers."""
        states = [self.local(opt).state.get(p, {}) for p in params]
        table = torch.tensor(
            [[[float(k in s), s[k].item() if k in s else 0.0] for k in names] for s in states]
        )
        if self.engine == 'zero':  # each has its own
            table = self.sum(table)
        return [
            {k: value for k, (there, value) in zip(names, row, strict=True) if there}
            for row in table.tolist()
        ]

    def gather(self, value):
        """`value`, which may be a dict of dicts of tensors, in host memory, the tensors whole: on rank 0, else None.

        Every rank must call it where there are DTensors in it. A tensor that occurs twice, as a tied weight, stays one.
        """
        return self._gather(value, {})

    def _gather(self, value, known):
        if isinstance(value, dict):
            return {k: self._gather(v, known) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._gather(v, known) for v in value)
        if not torch.is_tensor(value):
            return value
        if id(value) not in known:
            whole = value.detach()
            whole = whole.full_tensor() if hasattr(whole, 'device_mesh') else whole
            known[id(value)] = value, whole.to('cpu', copy=True) if self.rank == 0 else None
        return known[id(value)][1]

    def share(self, total, name):
        """This process's part of `total`. Fails where the processes cannot have equal parts."""
        if total % self.world_size:
            fail(
                f'{name}={total} cannot be divided between {self.world_size} processes: it is the number of all; '
                f'choose a multiple of {self.world_size}'
            )
        return total // self.world_size

    def sum(self, x):
        """The sum of the tensor x over the ranks: a new tensor, the same bits on all of them."""
        x = x.clone()
        if self.engine:
            dist.all_reduce(x)
        return x

    def max(self, number):
        """The largest of the ranks' whole numbers. Waits for the other hosts, but for no accelerator."""
        x = torch.tensor(number)
        if self.engine:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x.item()

    def ask_first(self, question):
        """What question() returns on rank 0, on every rank: what files there are must be seen by one."""
        answer = [question() if self.rank == 0 else None]
        if self.engine:
            dist.broadcast_object_list(answer)
        return answer[0]

    def close(self):
        if self.engine:
            dist.barrier()  # gloo aborts a process that leaves while another is still at its last sum
            dist.destroy_process_group()


def device_of_rank(device):
    """The setting `device` for this process: each that torchrun starts on a machine takes a GPU of its own."""
    if 'RANK' not in os.environ:
        return device
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cuda' and torch.cuda.is_available():
        local_rank, gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if local_rank >= gpus:
            fail(
                f'this machine has {gpus} GPUs for more processes than that; start torchrun with '
                f'--nproc_per_node={gpus}, or train with --device=cpu'
            )
        torch.cuda.set_device(local_rank)
        return f'cuda:{local_rank}'
    if device not in ('cuda', 'cpu'):
        fail(
            f"device='{device}' is no choice for several processes; take 'cuda', one GPU each, or 'cpu'"
        )
    return device


def start(engine, device_type):
    """Join the processes that torchrun started: returns Ranks. Alone, where it did not start this one.

    From here on only rank 0 prints, and a rank that fails because another did leaves it to that one to say why.
    """
    if 'RANK' not in os.environ:
        return Ranks()
    rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    store = None
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # torchrun's store outlives the processes, which after a restart must not take their predecessors' addresses
        store = dist.TCPStore(
            os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False
        )
        store = dist.PrefixStore(f'restart {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    # numbers that the hosts agree on go by gloo: asking a GPU for them would make it wait
    backend = 'cpu:gloo,cuda:nccl' if device_type == 'cuda' else 'gloo'
    dist.init_process_group(
        backend, store=store, **(dict(rank=rank, world_size=world_size) if store else {})
    )
    if rank > 0:
        sys.stdout = open(os.devnull, 'w')
    sys.excepthook = _quiet_about_others(sys.excepthook)
    return Ranks(engine, rank, world_size)


def _quiet_about_others(excepthook):
    """An excepthook for a rank: what fails because a peer is gone is that peer's to explain, and torchrun's to end."""

    def hook(kind, error, traceback):
        if issubclass(kind, dist.DistError) or 'by peer' in str(error):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)  # torchrun, seeing the peer gone, ends this process before
        excepthook(kind, error, traceback)

    return hook


def _uniform(group):
    """`group` as several whose options are the same for each of their parameters: no list of one value a parameter."""
    lists = {
        k: v
        for k, v in group.items()
        if k != 'params' and (isinstance(v, list) or torch.is_tensor(v) and v.dim())
    }
    together = {}
    for i, p in enumerate(group['params']):
        values = {k: v[i].item() if torch.is_tensor(v) else v[i] for k, v in lists.items()}
        together.setdefault(tuple(values.values()), {**group, **values, 'params': []})[
            'params'
        ].append(p)
    return list(together.values())


def largest_gradients(model, count=3):
    """The `count` tensors with the largest gradient norms, not-finite ones first, as text: 'NAME 1.2e+03, ...'."""
    names, grads = zip(
        *((name, p.grad) for name, p in model.named_parameters() if p.grad is not None), strict=True
    )
    norms = dict(zip(names, shards.regularizer(grads, 'l2').sqrt().tolist(), strict=True))
    largest = sorted(norms, key=lambda name: (math.isfinite(norms[name]), -norms[name]))[:count]
    return ', '.join(f'{name} {norms[name]:.3g}' for name in largest)
