"""Read and write ckpt.pt. The file is complete at any moment, even if the process is killed.

Older checkpoints stand beside it: ckpt.1.pt is the youngest of them, ckpt.2.pt the next.
"""

import glob
import os
import pickle
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from textwrap import shorten

import torch

from model import GPT, GPTConfig
from runtime import fail


def save(path, checkpoint, keep=None):
    """Write `checkpoint` to `path`, or leave `path` as it is.

    The bytes go to a temporary file, are flushed to the disk, and only then take the name.
    A kill or a full disk leaves the previous checkpoint in place.

    checkpoint: a dict that torch.load(weights_only=True) accepts.
    keep: the number of checkpoints to keep, this one included. None leaves older files alone.
    Raises OSError if the file cannot be written.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        if keep is not None:
            _move_on(path, keep)
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


def _older(path, i):
    stem, extension = os.path.splitext(path)
    return f'{stem}.{i}{extension}' if i else path


def _before(path):
    """Return (number, file) of each checkpoint before `path`, the youngest first.

    The numbers run from 1 with gaps of at most one, which a kill in _move_on leaves.
    A file beyond a larger gap, such as ckpt.5000.pt, belongs to the user.
    """
    found, i = [], 1
    while any(os.path.exists(_older(path, j)) for j in (i, i + 1)):
        if os.path.exists(_older(path, i)):
            found.append((i, _older(path, i)))
        i += 1
    return found


def _move_on(path, keep):
    """Rename ckpt.1.pt to ckpt.2.pt and so on, and link ckpt.pt as ckpt.1.pt.

    A link, because ckpt.pt must exist at any moment.
    """
    for i, old in _before(path):
        if i >= keep:  # left from a run that kept more
            os.unlink(old)
    for i in reversed(range(1, keep)):
        if i > 1 and os.path.exists(_older(path, i - 1)):
            os.replace(_older(path, i - 1), _older(path, i))
        elif i == 1 and os.path.exists(path):
            try:
                os.link(path, f'{path}.link')
                os.replace(f'{path}.link', _older(path, 1))
            except OSError:  # a file system without links
                shutil.copyfile(path, _older(path, 1))


class Writer:
    """Write a run's checkpoints to `path` in a thread, and keep the last `keep` of them.

    save() and wait() raise OSError if the previous checkpoint could not be written.
    """

    def __init__(self, path, keep):
        self.path, self.keep, self.pending = path, keep, None
        self.pool = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')

    def save(self, checkpoint):
        """Write `checkpoint` in the background, after the previous one is written.

        The caller must not change its tensors afterwards.
        """
        self.wait()
        self.pending = self.pool.submit(save, self.path, checkpoint, self.keep)

    def wait(self):
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def folders(path):
    """Return the complete checkpoint folders (folders.py) beside `path`, the newest first."""
    beside = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), 'ckpt-*', '.metadata'))
    numbered = {f: f.rpartition('-')[2] for f in map(os.path.dirname, beside)}
    return sorted(
        (f for f in numbered if numbered[f].isdecimal()),
        key=lambda f: int(numbered[f]),
        reverse=True,
    )


def all_of(path):
    """Return all checkpoints of a run, files and folders, the newest first.

    path: the run's newest file.
    """
    files = [f for f in (path, *(old for _, old in _before(path))) if os.path.isfile(f)]
    beside = folders(path)
    if files and beside:
        completed = os.path.getmtime(os.path.join(beside[0], '.metadata'))
        if completed < os.path.getmtime(files[0]):
            return files + beside
    return beside + files


def newest(path):
    """Return (a run's newest intact checkpoint, {newer checkpoint: why it cannot be used}).

    Reads each file through, because torch.load does not verify the checksums of tensors.
    Fails if every checkpoint is damaged.
    """
    reasons = {}
    for candidate in all_of(path):
        reason = damage(candidate)
        if reason is None:
            return candidate, reasons
        reasons[candidate] = reason
    for damaged, reason in reasons.items():
        fail(_unreadable(damaged, reason))
    return path, {}  # there is no checkpoint: load() says so


def _unreadable(path, reason):
    problem = f'{path} is not a readable checkpoint, it may be cut off ({reason})'
    return f'{problem}; restore it or start anew'


def damage(path):
    """Return why the checkpoint at `path` cannot be used, or None.

    Reads a file through. Of a folder's tensor files it checks only the lengths.
    """
    if os.path.isdir(path):
        import folders  # here: only runs with folders need torch.distributed.checkpoint

        return folders.damage(path)
    try:
        with zipfile.ZipFile(path) as z:
            broken = z.testzip()
    except Exception as e:  # what zipfile raises depends on where the damage is
        return str(e) or type(e).__name__
    return broken and f'{broken} in it does not have the checksum that was written'


def put_aside(path):
    """Make room for another run: rename the newest checkpoint to NAME.old, delete the others."""
    for i, old in enumerate(all_of(path)):
        if i == 0:
            _remove(f'{old}.old')
            os.replace(old, f'{old}.old')
        else:
            _remove(old)


def _remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.unlink(path)


def put_in_place(path, used, damaged):
    """Make `used` the newest checkpoint and rename each of `damaged` to NAME.damaged.

    If `used` is a file it becomes `path`.
    """
    for name in damaged:
        _remove(f'{name}.damaged')
        os.replace(name, f'{name}.damaged')
    if os.path.isfile(used):
        os.replace(used, path)


def is_at(path):
    """Return whether `path` is a file or a checkpoint folder."""
    return os.path.isfile(path) or os.path.isfile(os.path.join(path, 'run.pt'))


def load(path, checked=False):
    """Return the dict that save() or nanoGPT wrote.

    Of a folder (folders.py) the dict lacks 'model' and 'optimizer', whose tensors lie elsewhere.
    checked: newest() has found the checkpoint intact.
    Fails if there is no checkpoint or it is damaged.
    """
    is_folder = os.path.isdir(path)
    if not is_at(path):
        fail(f'there is no checkpoint at {path}; train one first, or start with --init_from=auto')
    reason = None if checked else damage(path)
    if reason:
        fail(_unreadable(path, reason))
    path = os.path.join(path, 'run.pt') if is_folder else path
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        model = {} if is_folder else checkpoint['model']
        missing = {'model_args', 'iter_num', 'best_val_loss', 'config'} - checkpoint.keys()
        for key in {'model', 'model_args', 'config'} & checkpoint.keys():
            checkpoint[key].items()
    except Exception as e:  # its type depends on where the damage is
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if isinstance(e, pickle.UnpicklingError):  # torch's message advises weights_only=False
            reason = 'it does not hold what torch.save writes of tensors'
        fail(_unreadable(path, reason))
    if missing:
        fail(f'{path} lacks {", ".join(sorted(missing))}: it is not a checkpoint of train.py')
    # nanoGPT may save the names of the compiled model, which torch.compile prefixes
    if not is_folder:
        checkpoint['model'] = {k.removeprefix('_orig_mod.'): v for k, v in model.items()}
    return checkpoint


def load_model(path):
    """Return the GPT of the checkpoint at `path`, and the dict that load() returns.

    Fails if the checkpoint is a folder, cannot be read, or does not fit a GPT.
    """
    saved = load(path)
    if 'model' not in saved:
        fail(f'{path} is a folder; convert it: python export.py {path} ckpt.pt --to=file')
    try:
        model = GPT(GPTConfig(**saved['model_args']))
        model.load_state_dict(saved['model'])
    except (TypeError, ValueError, RuntimeError) as e:
        reason = shorten(str(e), 160)  # torch lists every tensor that does not fit
        problem = f'{path} does not hold a model of this program ({reason})'
        fail(f'{problem}; use the program that trained it')
    return model, saved
