"""Reading and writing ckpt.pt: always whole, whatever kills the process while it is written."""

import os

import torch

from runtime import fail


def save(path, checkpoint):
    """Write `checkpoint` (a dict that torch.load(weights_only=True) accepts) to `path`, or leave `path` as it is.

    The bytes go to a temporary file beside it, are flushed to the disk, and only then take the name: a kill or a
    full disk at any moment leaves the previous checkpoint. Raises OSError where it could not be written.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(e, RuntimeError):  # torch's zip writer wraps what the disk said
            raise OSError(str(e).splitlines()[0]) from e
        raise
    directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name itself must survive a power cut
    finally:
        os.close(directory)


def load(path):
    """The dict that save() wrote, or nanoGPT. Fails where there is none or it is damaged."""
    if not os.path.isfile(path):
        fail(f'there is no checkpoint at {path}; train one first, or use --init_from=auto to start where there is none')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        model = checkpoint['model']
        missing = {'model_args', 'iter_num', 'best_val_loss', 'config'} - checkpoint.keys()
        for key in {'model', 'model_args', 'config'} & checkpoint.keys():
            checkpoint[key].items()
    except Exception as e:  # what torch.load raises on a damaged file depends on where the damage is
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        fail(f'{path} is not a readable checkpoint, it may be cut off ({reason}); restore it or start anew')
    if missing:
        fail(f'{path} lacks {", ".join(sorted(missing))}: it is not a checkpoint of train.py')
    # torch.compile puts its name before each parameter's; nanoGPT saves the compiled model's names at times
    checkpoint['model'] = {name.removeprefix('_orig_mod.'): tensor for name, tensor in model.items()}
    return checkpoint
