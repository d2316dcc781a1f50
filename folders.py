"""Write checkpoints of large models as folders: each process writes its shards.

The format is torch.distributed.checkpoint's. A folder holds each parameter as model.NAME and each
optimizer state as optimizer.NAME.STATE. Its run.pt holds the rest of ckpt.pt. The file .metadata
is written last: a folder that has it is complete.
"""

import os
import shutil
import warnings

import torch
import torch.distributed.checkpoint as dcp

import checkpoint

RUN = 'run.pt'
warnings.filterwarnings('ignore', 'torch.distributed is')  # "disabled", as in one process


class Writer:
    """Write the folders out_dir/ckpt-ITERATION in the background, and keep the last `keep` of them.

    Every rank must construct it and call its methods.
    save() and wait() raise OSError if the previous folder could not be written.
    """

    def __init__(self, out_dir, keep, rank):
        self.path = self.out_dir = out_dir
        self.keep, self.rank, self.pending = keep, rank, None
        # the writing threads need a group that training does not use
        self.group = torch.distributed.new_group(backend='gloo')

    def save(self, tensors, run):
        """Copy this rank's `tensors` to host memory, then write them in the background.

        tensors: {name: tensor}. run: a dict, the content of run.pt.
        """
        self.wait()
        self.path = folder = os.path.join(self.out_dir, f'ckpt-{run["iter_num"]:06d}')
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted save
            os.makedirs(folder)
            checkpoint.save(os.path.join(folder, RUN), run)
        self.pending = dcp.async_save(tensors, checkpoint_id=folder, process_group=self.group)

    def wait(self):
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except dcp.CheckpointException as e:
            raise OSError(str(next(iter(e.failures.values()))[0])) from e
        if self.rank == 0:
            for old in checkpoint.folders(os.path.join(self.out_dir, 'ckpt.pt'))[self.keep :]:
                shutil.rmtree(old)


def damage(folder):
    """Return why `folder` cannot be read, or None.

    Finds files that are missing or too short. It does not read the tensors' bytes.
    """
    try:
        for info in dcp.FileSystemReader(folder).read_metadata().storage_data.values():
            path = os.path.join(folder, info.relative_path)
            if os.path.getsize(path) < info.offset + info.length:
                return f'{path} is cut off'
        reason = checkpoint.damage(os.path.join(folder, RUN))
        return reason and f'{RUN}: {reason}'
    except Exception as e:  # what unpickling raises depends on where the damage is
        return str(e) or type(e).__name__


def tensors(params, states):
    """Return {name in a folder: tensor}.

    params: {name: parameter}. states: {name: {state: tensor}}.
    """
    named = {f'model.{name}': p.detach() for name, p in params.items()}
    return named | {
        f'optimizer.{name}.{k}': v for name, state in states.items() for k, v in state.items()
    }


def read(folder, model, no_dist=False):
    """Fill the model's parameters from `folder` in place and return the optimizer's state.

    Of a DTensor, each rank reads its shard.
    no_dist: read in this process alone. Otherwise every rank must call it.
    Returns {i: {state: tensor}}, where i numbers the parameters as optimizer.state_dict() does.
    """
    params, states = dict(model.named_parameters()), {}
    for key, metadata in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        kind, _, rest = key.partition('.')
        name, _, state = rest.rpartition('.')
        if kind == 'optimizer':
            like = params[name].detach()
            dtype = metadata.properties.dtype
            if metadata.size == like.shape:
                values = torch.zeros_like(like, dtype=dtype)
            else:
                values = torch.empty(metadata.size, dtype=dtype, device=like.device)
            states.setdefault(name, {})[state] = values
    dcp.load(tensors(params, states), checkpoint_id=folder, no_dist=no_dist)
    return {i: states[name] for i, name in enumerate(optimizer_names(model)) if name in states}


def optimizer_names(model):
    """Return the parameters' names in the order of the optimizer's state.

    The optimizer has two groups: first the tensors of two or more dimensions, then the others.
    """
    named = list(model.named_parameters())
    return [name for name, p in named if p.dim() >= 2] + [name for name, p in named if p.dim() < 2]
