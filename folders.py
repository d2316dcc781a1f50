"""Checkpoints as folders of torch.distributed.checkpoint, each process writing what it has: for large models.

    python folders.py out/ckpt-000100 ckpt.pt        into one file of whole tensors, as nanoGPT's
    python folders.py out/ckpt.pt out/ckpt-000100    and back

A folder holds the parameters as model.NAME, their optimizer states as optimizer.NAME.STATE, and in run.pt what else
ckpt.pt has. It is complete when it has its .metadata, which is written last.
"""

import os
import shutil
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp

import checkpoint
from model import GPT, GPTConfig
from runtime import fail

RUN = 'run.pt'


class Writer:
    """Writes the folders out_dir/ckpt-ITERATION of a run, the last `keep` of them, while training goes on.

    Made, and its methods called, on all ranks. save() and wait() raise OSError where the one saved last could not be
    written.
    """

    def __init__(self, out_dir, keep, rank):
        self.path = self.out_dir = out_dir
        self.keep, self.rank, self.pending = keep, rank, None
        self.group = torch.distributed.new_group(
            backend='gloo'
        )  # the thread that writes talks to its like, by itself

    def save(self, tensors, run):
        """Return when `tensors`, {name: tensor} of what this rank has, are copied to host memory. run: for run.pt."""
        self.wait()
        self.path = folder = os.path.join(self.out_dir, f'ckpt-{run["iter_num"]:06d}')
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # one that was cut off
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
    """Why `folder` cannot be read, or None: a file is not there or cut off. The bytes of its parts are not read."""
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
    """{name in a folder: tensor} for params {name: parameter} and their states {name: {state: tensor}}."""
    named = {f'model.{name}': p.detach() for name, p in params.items()}
    return named | {
        f'optimizer.{name}.{k}': v for name, state in states.items() for k, v in state.items()
    }


def read(folder, params, own=None, no_dist=False):
    """Fill params {name: parameter} from `folder`, in place; returns {name: state} of those named in `own` (None: all).

    Spread parameters and their states are read in parts. Every rank must call it, unless no_dist.
    """
    states = {}
    for key, metadata in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        kind, _, rest = key.partition('.')
        name, _, state = rest.rpartition('.')
        if kind == 'optimizer' and (own is None or name in own):
            like = params[name].detach()
            if metadata.size == like.shape:
                values = torch.zeros_like(like, dtype=metadata.properties.dtype)
            else:
                values = torch.empty(
                    metadata.size, dtype=metadata.properties.dtype, device=like.device
                )
            states.setdefault(name, {})[state] = values
    dcp.load(tensors(params, states), checkpoint_id=folder, no_dist=no_dist)
    return states


def optimizer_names(model):
    """The names of the parameters in the order of the optimizer's state: its two groups, tensors of two or more
    dimensions first."""
    named = list(model.named_parameters())
    return [name for name, p in named if p.dim() >= 2] + [name for name, p in named if p.dim() < 2]


def convert(source, target):
    """A folder into a file like ckpt.pt, or such a file into a folder."""
    if os.path.exists(target):
        fail(f'{target} is there already; remove it, or write to another place')
    saved = checkpoint.load(source)
    model = GPT(GPTConfig(**saved['model_args']))
    params, names = dict(model.named_parameters()), optimizer_names(model)
    if os.path.isdir(source):
        states = read(source, params, no_dist=True)
        saved['model'] = model.state_dict()  # lm_head.weight, too
        saved['optimizer'] = {
            'state': {i: states[name] for i, name in enumerate(names) if name in states},
            'param_groups': saved.pop('param_groups'),
        }
        checkpoint.save(target, saved)
    else:
        model.load_state_dict(saved.pop('model'))
        optimizer = saved.pop('optimizer')
        states = {names[i]: state for i, state in optimizer['state'].items()}
        temporary = f'{str(target).rstrip("/")}.tmp'
        os.makedirs(temporary)
        try:
            checkpoint.save(
                os.path.join(temporary, RUN), {**saved, 'param_groups': optimizer['param_groups']}
            )
            dcp.save(tensors(params, states), checkpoint_id=temporary, no_dist=True)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


if __name__ == '__main__':
    if len(sys.argv) != 3:
        fail('usage: python folders.py SOURCE TARGET, one of them a folder, the other a file')
    warnings.filterwarnings('ignore', 'torch.distributed is')  # disabled: as it should be
    try:
        convert(*sys.argv[1:])
    except (OSError, RuntimeError, KeyError, ValueError, dcp.CheckpointException) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
        fail(
            f'cannot make {sys.argv[2]} of {sys.argv[1]} ({reason}); see that there is room, and a checkpoint'
        )
    print(f'wrote {sys.argv[2]}')
