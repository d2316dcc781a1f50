"""Replace files and folders: a kill, a full disk or a power cut leaves the old one or the new."""

import os
import shutil
from contextlib import contextmanager


@contextmanager
def replacing(path):
    """Yield the name of a temporary file or folder beside `path`, which the block is to write.

        with replacing('ckpt.pt') as temporary:
            torch.save(checkpoint, temporary)

    At the end it is flushed to the disk and takes the name `path`. If the block or the disk raises,
    `path` stays as it is, and the temporary is removed.
    """
    temporary = f'{str(path).rstrip("/")}.tmp'
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    _fsync(os.path.dirname(os.path.abspath(path)))  # the new name must survive a power cut too


def write(path, content):
    """Write `content` (bytes) to `path`, or leave `path` as it is."""
    with replacing(path) as temporary, open(temporary, 'wb') as f:
        f.write(content)


def flush(path):
    """Return when a file, or every file below a folder, is on the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            _fsync(os.path.join(folder, name))
    if os.path.isfile(path):
        _fsync(path)


def remove(path):
    """Remove a file, or a folder with all that is in it, if there is one."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.unlink(path)


def _fsync(path):
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
