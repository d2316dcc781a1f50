"""Reading a prepared data set: batches that follow from the seed and their number alone, made ahead of their use."""

import io
import json
import pickle
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import torch

from runtime import fail

SPLITS = ('train', 'val')
CHECKED_AT_OPEN = 1 << 26  # tokens of each split: 128 MB


class TokenData:
    """The two splits of the data set in `folder`, mapped into memory, and `meta`, what its meta.json says.

    meta is None where there is neither meta.json nor nanoGPT's meta.pkl: the tokens are then GPT-2's, as nanoGPT's
    OpenWebText has them.
    block_size: tokens in a sequence; batch() and sequential() need it.
    vocab_size: how many ids the model knows; where it is not said, the data set's own number counts.
    Fails where the data set is not prepared, damaged, shorter than block_size + 1 tokens, or has ids >= vocab_size.
    """

    def __init__(self, folder, block_size=None, vocab_size=None):
        self.folder = Path(folder)
        self.block_size = block_size
        missing = [name for name in ('train.bin', 'val.bin') if not (self.folder / name).is_file()]
        unfinished = (self.folder / 'meta.json.tmp').exists() and not (
            self.folder / 'meta.json'
        ).exists()
        if missing or unfinished:
            _fail_unprepared(self.folder)
        self.meta = read_meta(self.folder)
        self.dtype = np.dtype((self.meta or {}).get('dtype', 'uint16')).newbyteorder('<')
        self.vocab_size = vocab_size or (self.meta or {}).get('vocab_size', 1 << 16)
        self.splits = {split: self._open(split) for split in SPLITS}

    def _open(self, split):
        path = self.folder / f'{split}.bin'
        length, rest = divmod(path.stat().st_size, self.dtype.itemsize)
        if rest:
            odd = 'an odd number of' if self.dtype.itemsize == 2 else f'{path.stat().st_size}'
            fail(
                f'{path} has {odd} bytes and is no list of {self.dtype.name} tokens; {_remedy(self.folder)}'
            )
        needed = (self.block_size or 1) + 1
        if length < needed:
            fail(
                f'{path} has {length} tokens, a block of {needed - 1} needs {needed}; lower block_size or add text'
            )
        expected = (self.meta or {}).get(f'{split}_tokens', length)
        if length != expected:
            fail(
                f'{path} has {length} tokens where meta.json says {expected}; {_remedy(self.folder)}'
            )
        try:
            tokens = np.memmap(path, dtype=self.dtype, mode='r').view(
                np.ndarray
            )  # a plain array is cheaper to slice
        except OSError as e:
            fail(f'cannot read {path} ({e.strerror or e})')
        self._check(split, tokens[:CHECKED_AT_OPEN])
        return tokens

    def _check(self, split, tokens):
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            path = self.folder / f'{split}.bin'
            fail(
                f'{path} has the token {largest}, the vocabulary ends at {self.vocab_size - 1}: '
                f'{_remedy(self.folder)}, or use the data set that the model was made for'
            )

    def batch(self, split, seed, index, size, rows=slice(None)):
        """Sequences number `rows` of the batch number `index`, which has `size` of them, drawn at random.

        Returns x and y, int64 tensors (rows, block_size); y is x one token later. A pure function of its arguments:
        the whole batch follows from (split, seed, index), `rows` only says which part of it to read, so that it is
        the same set of sequences however processes and micro-steps divide it. An evaluation on the training split
        takes another seed than the training, or it gets the very batches that were trained on.
        """
        tokens = self.splits[split]
        entropy = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
        starts = np.random.default_rng(entropy).integers(len(tokens) - self.block_size, size=size)
        sequences = np.stack([tokens[i : i + self.block_size + 1] for i in starts[rows]])
        return self._tensors(split, sequences[:, :-1], sequences[:, 1:])

    def sequential(self, split, batch_size):
        """Yields x and y that cover the split once: every token but the first is a target exactly once.

        int64 tensors (batch_size, block_size), one with fewer rows, and one of shape (1, rest) for what is left.
        """
        tokens = self.splits[split]
        whole = (len(tokens) - 1) // self.block_size * self.block_size
        step = batch_size * self.block_size
        shape = (-1, self.block_size)
        for start in range(0, whole, step):
            end = min(start + step, whole)
            yield self._tensors(
                split, tokens[start:end].reshape(shape), tokens[start + 1 : end + 1].reshape(shape)
            )
        if whole < len(tokens) - 1:
            yield self._tensors(split, tokens[None, whole:-1], tokens[None, whole + 1 :])

    def _tensors(self, split, x, y):
        self._check(split, x)
        self._check(split, y)
        return torch.from_numpy(x.astype(np.int64)), torch.from_numpy(y.astype(np.int64))


def read_meta(folder):
    """What folder/meta.json holds, a dict (data/prepare.py's write_dataset), or None where there is none.

    Where nanoGPT's meta.pkl is there instead, the same dict for the characters that it holds.
    """
    readers = {'meta.json': json.loads, 'meta.pkl': _meta_of_nanogpt}
    path = next((Path(folder) / name for name in readers if (Path(folder) / name).exists()), None)
    if path is None:
        return None
    try:
        meta = readers[path.name](path.read_bytes())
        sound = meta['dtype'] in ('uint16', 'uint32') and meta['vocab_size'] > 0
        if meta['tokenizer'] == 'char':
            sound = sound and len(meta['itos']) == meta['vocab_size']
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        fail(
            f'{path} does not describe a data set of 16- or 32-bit tokens; {_remedy(Path(folder))}'
        )
    return meta


class _PlainUnpickler(pickle.Unpickler):
    """Makes the containers, numbers and strings of Python and nothing else: a pickle may name any function to call."""

    def find_class(self, module, name):
        raise ValueError(f'names {module}.{name}')


def _meta_of_nanogpt(pickled):
    """meta.json's dict for the meta.pkl of a character-level data set: {'vocab_size', 'itos': {id: character}, ...}."""
    try:
        meta = _PlainUnpickler(io.BytesIO(pickled)).load()
    except (
        Exception
    ) as e:  # bytes that are no pickle make the unpickler raise what they happen to lead to
        raise ValueError(str(e)) from e
    itos = [meta['itos'][i] for i in range(len(meta['itos']))]
    if not all(isinstance(c, str) and len(c) == 1 for c in itos):
        raise ValueError('itos is not made of characters')
    return {'tokenizer': 'char', 'vocab_size': meta['vocab_size'], 'itos': itos, 'dtype': 'uint16'}


def _holds_data_sets(folder):
    """Whether this is data/ itself, whose prepare.py is no script."""
    return folder.resolve() == Path(__file__).resolve().parent


def _remedy(folder):
    has_script = (folder / 'prepare.py').is_file() and not _holds_data_sets(folder)
    return f'run: python {folder / "prepare.py"}' if has_script else f'prepare {folder} again'


def _fail_unprepared(folder):
    above = folder if _holds_data_sets(folder) else folder.parent
    if folder.is_dir() and above != folder:
        fail(f'the data set {folder} is not prepared; {_remedy(folder)}')
    others = {
        path.parent.name for name in ('prepare.py', 'train.bin') for path in above.glob(f'*/{name}')
    }
    fail(f'there is no data set {folder}; those in {above}: {", ".join(sorted(others)) or "none"}')


def prefetch(make, first, depth=2):
    """Yields make(first), make(first + 1), ... without end; a thread makes up to `depth` of them ahead of their use.

    What make raises, SystemExit included, is raised where its result would have come, and nothing is made after it.
    close() ends the thread.
    """
    broken = False

    def work(i):
        nonlocal broken
        if (
            broken
        ):  # nobody will ask for this result, and the same complaint must not be printed again
            return None
        try:
            return make(i)
        except BaseException:
            broken = True
            raise

    pool = ThreadPoolExecutor(1, thread_name_prefix='prefetch')
    try:
        ahead = deque(pool.submit(work, first + i) for i in range(depth))
        for i in count(first + depth):
            result = ahead.popleft().result()
            ahead.append(pool.submit(work, i))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def to_device(batch, device):
    """The tensors of `batch` on `device`; on cuda the copy runs while the caller goes on."""
    if torch.device(device).type == 'cuda':
        return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)
    return tuple(tensor.to(device) for tensor in batch)
