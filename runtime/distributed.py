"""The processes that torchrun starts, as one training run.

Without torchrun there is one process, no process group, and everything here does nothing. Gradients
and parameters travel by DistributedDataParallel and fully_shard, the few numbers that the processes
agree on by all_reduce and broadcast. Modules that take long to import are imported where they are
used, so that a single process starts without them.
"""

import atexit
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanonorm.kernels.tensors import local
from runtime.device import DTYPES
from runtime.errors import can_flush, fail


@dataclass
class Ranks:
    """This process among those of the run. `engine` is None without torchrun.

    'ddp': every process has parameters, gradients and optimizer state (DistributedDataParallel).
    'zero': each has a shard of gradients and optimizer state, and during an iteration all
        parameters: ZeRO-2 (fully_shard that keeps the parameters it has gathered).
    'fsdp': each has a shard of all three: ZeRO-3 (fully_shard).
    """

    engine: str | None = None
    rank: int = 0
    world_size: int = 1

    def wrap(self, model, rt, compile=False, shard_size=0):
        """Move `model` to the device of `rt`, a device.Runtime, and return what to call for it.

        For 'zero' and 'fsdp' the parameters become DTensors: make the optimizer afterwards.
        shard_size: the number of processes that hold one copy of the sharded tensors; 0: all.
        """
        self._net = model
        if self.engine in ('zero', 'fsdp'):
            self._shard(model, rt, compile, shard_size)
            return model
        model.to(rt.device)
        if self.engine == 'ddp':
            self._net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # with DistributedDataParallel inside, torch.compile lets its communication overlap
        return torch.compile(self._net) if compile else self._net

    def _shard(self, model, rt, compile, shard_size):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if rt.dtype == 'float16':
            fail(
                f"parallel='{self.engine}' cannot train in float16, whose gradient scaler must see "
                "all gradients; choose dtype='bfloat16' or parallel='ddp'"
            )
        if shard_size and self.world_size % shard_size:
            fail(
                f'fsdp_shard_size={shard_size} does not divide the {self.world_size} processes; '
                'choose one that does'
            )
        sizes = (self.world_size,)
        if 0 < shard_size < self.world_size:  # neighbors, so a node, share a copy
            sizes = (self.world_size // shard_size, shard_size)
        names = ('replicate', 'shard')[-len(sizes) :]
        mesh = init_device_mesh(rt.device_type, sizes, mesh_dim_names=names)
        precision = MixedPrecisionPolicy()
        if rt.dtype != 'float32':
            precision = MixedPrecisionPolicy(DTYPES[rt.dtype], reduce_dtype=torch.float32)
        for block in model.transformer.h:
            if compile:
                block.compile()
            again = self.engine == 'fsdp'  # gather the block's parameters anew for backward
            fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=again)
        fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
        # the logits are a view; nobody writes them in place
        warnings.filterwarnings('ignore', 'FSDP2-wrapped module')

        def reshard(*_):
            if not torch.is_grad_enabled():
                for module in model.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

        # an evaluation has no backward pass, which frees the gathered parameters in training
        model.register_forward_hook(reshard)

    def micro_step(self, last):
        """Return a context for the forward and backward pass of a micro-step.

        'ddp' averages gradients over the processes in the last micro-step of an iteration. 'zero'
        and 'fsdp' reduce-scatter them in each, and average them over copies of the shards in the
        last. 'zero' keeps the gathered parameters until then.
        """
        if self.engine in ('zero', 'fsdp'):
            self._net.set_reshard_after_backward(last or self.engine == 'fsdp')
            self._net.set_requires_all_reduce(last)
        return self._net.no_sync() if self.engine == 'ddp' and not last else nullcontext()

    def gather(self, value):
        """Copy the tensors in `value`, a nested dict, to host memory, whole: on rank 0, else None.

        Every rank must call it where there are DTensors. A tensor that occurs twice stays one.
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
            x = value.detach()
            x = x.full_tensor() if hasattr(x, 'device_mesh') else x
            known[id(value)] = value, x.to('cpu', copy=True) if self.rank == 0 else None
        return known[id(value)][1]

    def divide(self, total, name):
        """Return this process's share of `total`. Fails if equal shares are impossible."""
        if total % self.world_size:
            fail(
                f'{name}={total} counts over all {self.world_size} processes and cannot be divided '
                f'between them; choose a multiple of {self.world_size}'
            )
        return total // self.world_size

    def sum(self, x):
        """Return the sum of the tensor x over the ranks, the same bits on all of them."""
        x = x.clone()
        if self.engine:
            dist.all_reduce(x)
        return x

    def max(self, number):
        """Return the largest of the ranks' whole numbers. Waits for no accelerator."""
        x = torch.tensor(number)
        if self.engine:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x.item()

    def all_finite(self, model, loss):
        """Return whether the weights and the loss, 0-d, are finite numbers on every rank."""
        tensors = loss, *map(local, model.parameters())
        return not self.max(int(not all(x.isfinite().all() for x in tensors)))

    def from_rank0(self, question):
        """Return on every rank what question() returns on rank 0, such as which files exist."""
        answer = [question() if self.rank == 0 else None]
        if self.engine:
            dist.broadcast_object_list(answer)
        return answer[0]

    def mean_loss(self, batches, loss_of):
        """Return the mean loss a token over `batches`, each computed by one of the ranks.

        batches: yields (x, y), the same on every rank. loss_of(x, y): the mean loss of a batch,
        0-d. The number does not depend on how many ranks there are.
        """
        nats, tokens = [], []  # of every batch; 0 nats where another rank has it
        # a batch for each rank; in the last round some may have None, and repeat the first
        for several in zip_longest(*[iter(batches)] * self.world_size):
            loss = loss_of(*(several[self.rank] or several[0])).item()
            sizes = [y.numel() for _, y in filter(None, several)]
            nats += [loss * size if i == self.rank else 0.0 for i, size in enumerate(sizes)]
            tokens += sizes
        nats = self.sum(torch.tensor(nats, dtype=torch.float64))
        return nats.sum().item() / sum(tokens)

    _signal = 0  # the number of the last that this process has received

    def catch_signals(self):
        """Note SIGINT, SIGTERM and SIGUSR1 (SLURM's --signal=USR1@180) from now on.

        They no longer end the process: ask stop_signal(). Without torchrun, a second signal of the
        same kind does.
        """

        def note(number, _):
            self._signal = number
            if self.world_size == 1:  # torchrun repeats what a terminal or a cluster sends
                signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, note)

    def say(self, line):
        """Print a line. If nobody reads standard output any more, stop as on a signal: SIGPIPE.

        On Ctrl-C the other end of a pipe, such as `tee`, is gone before the checkpoint is written.
        """
        try:
            print(line, flush=True)
        except BrokenPipeError:
            can_flush(sys.stdout)
            self._signal = self._signal or signal.SIGPIPE

    def stop_signal(self):
        """Return the number of a signal that some rank has received, or 0."""
        return self.max(self._signal)

    def close(self):
        """End the run in good order. Every rank must call it; it may leave by sys.exit after."""
        if self.engine:
            dist.barrier()  # gloo aborts a process that leaves during another's last sum
            dist.destroy_process_group()
            _Ending.status = 0


def device_of_rank(device):
    """Return the setting `device` for this process: under torchrun, one GPU each."""
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
        return f'cuda:{local_rank}'
    if device not in ('cuda', 'cpu'):
        fail(f"device='{device}' is for one process; take 'cuda', one GPU a process, or 'cpu'")
    return device


def start(engine, device_type):
    """Join the processes that torchrun started and return Ranks. Without torchrun, do nothing.

    From here on only rank 0 prints, and the process leaves without the interpreter's destructors.
    """
    if 'RANK' not in os.environ:
        return Ranks()
    rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    _Ending.prepare()
    store = None
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # torchrun's store outlives the processes: after a restart they must not find the addresses
        # of their predecessors in it
        host, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        restart = f'restart {os.environ["TORCHELASTIC_RESTART_COUNT"]}'
        store = dist.PrefixStore(restart, dist.TCPStore(host, port, is_master=False))
    # numbers that the processes agree on go by gloo: NCCL would make them wait for the GPU
    backend = 'cpu:gloo,cuda:nccl' if device_type == 'cuda' else 'gloo'
    place = dict(rank=rank, world_size=world_size) if store else {}
    dist.init_process_group(backend, store=store, **place)
    if rank > 0:
        sys.stdout = open(os.devnull, 'w')
    return Ranks(engine, rank, world_size)


class _Ending:
    """The end of a process of torchrun: by os._exit, after everything that atexit has to do.

    The interpreter's own end can abort such a process: a thread of gloo may still free a tensor
    while the interpreter is taken down (https://github.com/pytorch/pytorch/pull/179291). atexit
    does not know the status to leave with, so sys.exit and sys.excepthook note it here.
    """

    status = None  # to leave with; a script that ends before Ranks.close has failed

    @classmethod
    def prepare(cls):
        if cls.status is None:
            sys.exit, sys.excepthook = cls.exit, cls.hook(sys.excepthook)
            atexit.register(cls.leave)
        cls.status = 1

    @classmethod
    def exit(cls, code=None):
        cls.status = code if isinstance(code, int) else int(code is not None)
        raise SystemExit(code)

    @classmethod
    def hook(cls, excepthook):
        def hook(kind, error, traceback):
            cls.status = 1
            if issubclass(kind, dist.DistError) or 'by peer' in str(error):
                # a peer is gone, says why, and torchrun ends this process before it says this
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(10)
            excepthook(kind, error, traceback)

        return hook

    @classmethod
    def leave(cls):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a closed pipe or file
                stream.flush()
        os._exit(cls.status)
