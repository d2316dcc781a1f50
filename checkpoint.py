"""Reading and writing ckpt.pt: always whole, whatever kills the process while it is written.

Beside it stand the checkpoints before it, ckpt.1.pt the younger, ckpt.2.pt the older, as many as are kept.
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
    """Write `checkpoint` (a dict that torch.load(weights_only=True) accepts) to `path`, or leave `path` as it is.

    The bytes go to a temporary file beside it, are flushed to the disk, and only then take the name: a kill or a
    full disk at any moment leaves the previous checkpoint. keep: how many there are to be then, this one included;
    None: `path` is no run's, what stands beside it is left alone. Raises OSError where it could not be written.
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
    """(number, file) of the checkpoints before `path`, the younger first.

    They are numbered without a gap, but that a kill in _move_on leaves one of one: ckpt.5000.pt is somebody's own.
    """
    found, i = [], 1
    while any(os.path.exists(_older(path, j)) for j in (i, i + 1)):
        if os.path.exists(_older(path, i)):
            found.append((i, _older(path, i)))
        i += 1
    return found


def _move_on(path, keep):
    """ckpt.1.pt becomes ckpt.2.pt and so on; ckpt.pt gets the name ckpt.1.pt besides its own, so that it always is."""
    for i, old in _before(path):
        if i >= keep:  # of a time when more were kept
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
    """Writes the checkpoints of a run to `path`, the last `keep` of them, in a thread of its own.

    save() and wait() raise OSError where the checkpoint saved last could not be written.
    """

    def __init__(self, path, keep):
        self.path, self.keep, self.pending = path, keep, None
        self.pool = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')

    def save(self, checkpoint):
        """Have `checkpoint` written, once the one before is. Its tensors must not be written from here on."""
        self.wait()
        self.pending = self.pool.submit(save, self.path, checkpoint, self.keep)

    def wait(self):
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def folders(path):
    """The checkpoint folders beside `path` (folders.py) that were written to their end, the newest first."""
    beside = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), 'ckpt-*', '.metadata'))
    numbered = {f: f.rpartition('-')[2] for f in map(os.path.dirname, beside)}
    return sorted(
        (f for f in numbered if numbered[f].isdecimal()),
        key=lambda f: int(numbered[f]),
        reverse=True,
    )


def all_of(path):
    """The checkpoints of the run whose newest file is `path`: it, those before it, and folders; the newest first."""
    files = [f for f in (path, *(old for _, old in _before(path))) if os.path.isfile(f)]
    beside = folders(path)
    if (
        files
        and beside
        and os.path.getmtime(os.path.join(beside[0], '.metadata')) < os.path.getmtime(files[0])
    ):
        return files + beside
    return beside + files


def newest(path):
    """(the newest whole checkpoint of the run whose file is `path`, {newer one: why it cannot be used}).

    Reads files through: torch.load would take a tensor's bytes as they are. Fails where all there are are damaged.
    """
    reasons = {}
    for candidate in all_of(path):
        reason = damage(candidate)
        if reason is None:
            return candidate, reasons
        reasons[candidate] = reason
    for damaged, reason in reasons.items():
        fail(
            f'{damaged} is not a readable checkpoint, it may be cut off ({reason}); restore it or start anew'
        )
    return path, {}  # there is none: what load() says of it is all there is to say


def damage(path):
    """Why the checkpoint at `path` cannot be used, or None. Reads a file through, of a folder's parts the lengths."""
    if os.path.isdir(path):
        import folders  # here, because only a run that has folders needs what they are made with

        return folders.damage(path)
    try:
        with zipfile.ZipFile(path) as z:
            broken = z.testzip()
    except Exception as e:  # what zipfile raises depends on where the damage is
        return str(e) or type(e).__name__
    return broken and f'{broken} in it does not have the checksum that was written'


def put_aside(path):
    """Make room for another run's checkpoints: the newest there is becomes NAME.old, those before it go."""
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
    """Have `used` be the newest checkpoint, `path` if it is a file: the `damaged` ones become NAME.damaged."""
    for name in damaged:
        _remove(f'{name}.damaged')
        os.replace(name, f'{name}.damaged')
    if os.path.isfile(used):
        os.replace(used, path)


def is_at(path):
    """Whether there is a file, which may be a checkpoint, or a checkpoint folder."""
    return os.path.isfile(path) or os.path.isfile(os.path.join(path, 'run.pt'))


def load(path, checked=False):
    """The dict that save() wrote, or nanoGPT; of a folder (folders.py) what is not in its parts: no 'model', no
    'optimizer'. Fails where there is none or it is damaged. checked: newest() has found it whole."""
    in_parts = os.path.isdir(path)
    if not is_at(path):
        fail(
            f'there is no checkpoint at {path}; train one first, or use --init_from=auto to start where there is none'
        )
    reason = None if checked else damage(path)
    if reason:
        fail(
            f'{path} is not a readable checkpoint, it may be cut off ({reason}); take another, or start anew'
        )
    path = os.path.join(path, 'run.pt') if in_parts else path
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        model = {} if in_parts else checkpoint['model']
        missing = {'model_args', 'iter_num', 'best_val_loss', 'config'} - checkpoint.keys()
        for key in {'model', 'model_args', 'config'} & checkpoint.keys():
            checkpoint[key].items()
    except (
        Exception
    ) as e:  # what torch.load raises on a damaged file depends on where the damage is
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if isinstance(
            e, pickle.UnpicklingError
        ):  # whose advice, to load what it may be all the same, is none for here
            reason = 'it does not hold what torch.save writes of tensors'
        fail(
            f'{path} is not a readable checkpoint, it may be cut off ({reason}); restore it or start anew'
        )
    if missing:
        fail(f'{path} lacks {", ".join(sorted(missing))}: it is not a checkpoint of train.py')
    # torch.compile puts its name before each parameter's; nanoGPT saves the compiled model's names at times
    if not in_parts:
        checkpoint['model'] = {
            name.removeprefix('_orig_mod.'): tensor for name, tensor in model.items()
        }
    return checkpoint


def load_model(path):
    """The GPT of the checkpoint at `path`, and what load() gives. Fails where they are none, or do not fit."""
    saved = load(path)
    if 'model' not in saved:
        fail(f'{path} is in parts; make one file of it: python folders.py {path} ckpt.pt')
    try:
        model = GPT(GPTConfig(**saved['model_args']))
        model.load_state_dict(saved['model'])
    except (TypeError, ValueError, RuntimeError) as e:
        reason = shorten(str(e), 160)  # torch lists every tensor that does not fit
        fail(
            f'{path} does not hold a model of this program ({reason}); use the program that trained it'
        )
    return model, saved
