"""Write and read checkpoints of large models as folders: each process writes its shards.

The format is torch.distributed.checkpoint's. A folder holds each parameter as model.NAME and each
optimizer state as optimizer.NAME.STATE. Its run.pt holds the rest of ckpt.pt. The file .metadata
is written last: a folder that has it is complete.
"""

import glob
import os
import warnings

import torch

RUN = 'run.pt'
warnings.filterwarnings('ignore', 'torch.distributed is')  # "disabled", as in one process


def dcp():
    """Return torch.distributed.checkpoint, whose import takes seconds."""
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint


def folders(out_dir):
    """Return the complete checkpoint folders in `out_dir`, the newest first."""
    complete = glob.glob(os.path.join(glob.escape(out_dir), 'ckpt-*', '.metadata'))
    numbers = {f: f.rpartition('-')[2] for f in map(os.path.dirname, complete)}
    numbers = {f: int(number) for f, number in numbers.items() if number.isdecimal()}
    return sorted(numbers, key=numbers.get, reverse=True)


def damage(folder):
    """Return why the tensors in `folder` cannot be read, or None.

    Finds files that are missing or too short. It does not read the tensors' bytes.
    """
    try:
        for info in dcp().FileSystemReader(folder).read_metadata().storage_data.values():
            path = os.path.join(folder, info.relative_path)
            if os.path.getsize(path) < info.offset + info.length:
                return f'{path} is cut off'
    except Exception as e:  # what unpickling raises depends on where the damage is
        return str(e) or type(e).__name__


def save(folder, model, states, group=None):
    """Start to write this rank's tensors, from a copy in host memory. Pass the result to finish().

    states: {i: {state: tensor}} as optimizer.state_dict() has it. group: a process group of all
    ranks that training does not use. None writes in this process alone, before it returns, and
    raises OSError if the disk refuses.
    """
    params, names = dict(model.named_parameters()), optimizer_names(model)
    tensors = _named(params, {names[i]: state for i, state in states.items()})
    if group is None:
        try:
            return dcp().save(tensors, checkpoint_id=folder, no_dist=True)
        except dcp().CheckpointException as e:  # it is no Exception
            raise OSError(str(_first_failure(e))) from e
    return dcp().async_save(tensors, checkpoint_id=folder, process_group=group)


def finish(pending):
    """Return when what save() returned is done. Raises OSError if the disk refused."""
    try:
        pending.result()
    except dcp().CheckpointException as e:
        raise OSError(str(_first_failure(e))) from e


def _first_failure(error):
    return next(iter(error.failures.values()))[0]


def read(folder, model, no_dist=False):
    """Fill the model's parameters from `folder` in place and return the optimizer's state.

    Of a DTensor, each rank reads its shard.
    no_dist: read in this process alone. Otherwise every rank must call it.
    Returns {i: {state: tensor}}, where i numbers the parameters as optimizer.state_dict() does.
    Raises OSError if the tensors cannot be read.
    """
    params, states = dict(model.named_parameters()), {}
    metadata = dcp().FileSystemReader(folder).read_metadata().state_dict_metadata
    for key, info in metadata.items():
        kind, _, rest = key.partition('.')
        name, _, state = rest.rpartition('.')
        if kind == 'optimizer':
            like, dtype = params[name].detach(), info.properties.dtype
            if info.size == like.shape:
                values = torch.zeros_like(like, dtype=dtype)
            else:
                values = torch.empty(info.size, dtype=dtype, device=like.device)
            states.setdefault(name, {})[state] = values
    try:
        dcp().load(_named(params, states), checkpoint_id=folder, no_dist=no_dist)
    except dcp().CheckpointException as e:
        failure = _first_failure(e)
        reason = type(failure).__name__
        if reason != 'UnpicklingError':  # whose text advises weights_only=False
            reason += f': {failure}'.partition('\n')[0]
        problem = f'the tensors in {folder} cannot be read ({reason})'
        raise OSError(f'{problem}; restore it or start anew') from e
    return {i: states[name] for i, name in enumerate(optimizer_names(model)) if name in states}


def _named(params, states):
    """Return {name in a folder: tensor} of {name: parameter} and {name: {state: tensor}}."""
    named = {f'model.{name}': p.detach() for name, p in params.items()}
    return named | {
        f'optimizer.{name}.{k}': v for name, state in states.items() for k, v in state.items()
    }


def optimizer_names(model):
    """Return the parameters' names in the order of the optimizer's state.

    The optimizer has two groups: first the tensors of two or more dimensions, then the others.
    """
    named = list(model.named_parameters())
    return [name for name, p in named if p.dim() >= 2] + [name for name, p in named if p.dim() < 2]
