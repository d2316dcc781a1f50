"""Read a prepared data set. A batch depends only on the seed and its number."""

import io
import json
import pickle
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import torch

from runtime.errors import fail

SPLITS = ('train', 'val')
EVALUATION_SEED = 1 << 40  # above what people choose: every run is evaluated on the same batches
CHECKED_AT_OPEN = 1 << 26  # tokens of each split: 128 MB


class TokenData:
    """Map the two splits of the data set in `folder` into memory.

    block_size: tokens in a sequence; batch() and sequential() need it.
    vocab_size: how many ids the model has. By default that of a new model: the data set's, but
        50,304 for GPT-2's 50,257.
    The attribute meta is the content of meta.json or of nanoGPT's meta.pkl. It is None if there is
    neither: the tokens are then GPT-2's, as in nanoGPT's OpenWebText.
    Fails if the data set is not prepared, is damaged, has a split of fewer than block_size + 1
    tokens, or has ids >= vocab_size.
    """

    def __init__(self, folder, block_size=None, vocab_size=None):
        self.folder = Path(folder)
        self.block_size = block_size
        missing = [name for name in ('train.bin', 'val.bin') if not (self.folder / name).is_file()]
        has_meta = (self.folder / 'meta.json').exists()
        unfinished = (self.folder / 'meta.json.tmp').exists() and not has_meta
        if missing or unfinished:
            _fail_unprepared(self.folder)
        self.meta = read_meta(self.folder)
        self.dtype = np.dtype((self.meta or {}).get('dtype', 'uint16')).newbyteorder('<')
        size = (self.meta or {}).get('vocab_size', 50257)
        self.vocab_size = vocab_size or (50304 if size == 50257 else size)  # 64 * 786
        self.splits = {split: self._open(split) for split in SPLITS}

    def _open(self, split):
        path = self.folder / f'{split}.bin'
        remedy = _remedy(self.folder)
        length, rest = divmod(path.stat().st_size, self.dtype.itemsize)
        if rest:
            odd = 'an odd number of' if self.dtype.itemsize == 2 else f'{path.stat().st_size}'
            fail(f'{path} has {odd} bytes and is no list of {self.dtype.name} tokens; {remedy}')
        block = self.block_size or 1
        if length < block + 1:
            problem = f'{path} has {length} tokens, a block of {block} needs {block + 1}'
            fail(f'{problem}; lower block_size or add text')
        expected = (self.meta or {}).get(f'{split}_tokens', length)
        if length != expected:
            fail(f'{path} has {length} tokens where meta.json says {expected}; {remedy}')
        try:
            mapped = np.memmap(path, dtype=self.dtype, mode='r')
        except OSError as e:
            fail(f'cannot read {path} ({e.strerror or e}); {remedy}')
        tokens = mapped.view(np.ndarray)  # a plain array is cheaper to slice
        self._check(split, tokens[:CHECKED_AT_OPEN])
        return tokens

    def _check(self, split, tokens):
        largest = int(tokens.max())
        last = self.vocab_size - 1
        if largest > last:
            path = self.folder / f'{split}.bin'
            fail(
                f'{path} has the token {largest}, the vocabulary ends at {last}: '
                f'{_remedy(self.folder)}, or use the data set that the model was made for'
            )

    def batch(self, split, seed, index, size, rows=slice(None)):
        """Return the sequences `rows` of batch number `index`, drawn at random.

        split: 'train' or 'val'. size: sequences in the full batch. rows: a slice of it.
        Returns x and y, int64 tensors (rows, block_size); y is x one token later.

        The batch follows from (split, seed, index, size) alone, so processes and micro-steps can
        divide it in any way. An evaluation on the training split needs its own seed, or it reads
        the batches that were trained on.
        """
        tokens = self.splits[split]
        entropy = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
        starts = np.random.default_rng(entropy).integers(len(tokens) - self.block_size, size=size)
        sequences = np.stack([tokens[i : i + self.block_size + 1] for i in starts[rows]])
        return self._tensors(split, sequences[:, :-1], sequences[:, 1:])

    def sequential(self, split, batch_size):
        """Yield x and y that cover the split once: each token but the first is a target once.

        x and y are int64 tensors (batch_size, block_size). The last may have fewer rows, and is
        followed by one of shape (1, rest) if tokens are left.
        """
        tokens = self.splits[split]
        full = (len(tokens) - 1) // self.block_size * self.block_size  # tokens in full sequences
        step = batch_size * self.block_size
        shape = (-1, self.block_size)
        for start in range(0, full, step):
            end = min(start + step, full)
            x, y = tokens[start:end], tokens[start + 1 : end + 1]
            yield self._tensors(split, x.reshape(shape), y.reshape(shape))
        if full < len(tokens) - 1:
            yield self._tensors(split, tokens[None, full:-1], tokens[None, full + 1 :])

    def evaluation(self, split, batch_size, count):
        """Yield `count` batches at random, the same for every run: x and y as batch() returns them.

        If count is 0, yield all of 'val', and from 'train' as much.
        """
        if count == 0 and split == 'val':
            yield from self.sequential(split, batch_size)
            return
        tokens = batch_size * self.block_size
        for i in range(count or -(-len(self.splits['val']) // tokens)):
            yield self.batch(split, EVALUATION_SEED, i, batch_size)

    def _tensors(self, split, x, y):
        self._check(split, x)
        self._check(split, y)
        return torch.from_numpy(x.astype(np.int64)), torch.from_numpy(y.astype(np.int64))


def read_meta(folder):
    """Return the dict in folder/meta.json (see write_dataset in data/writer.py), or None.

    If only nanoGPT's meta.pkl is there, return the equivalent dict. Return None without either.
    """
    readers = {'meta.json': json.loads, 'meta.pkl': _meta_of_nanogpt}
    path = next((Path(folder) / name for name in readers if (Path(folder) / name).exists()), None)
    if path is None:
        return None
    try:
        meta = readers[path.name](path.read_bytes())
        sound = _is_sound(meta)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        problem = f'{path} does not describe a data set of 16- or 32-bit tokens'
        fail(f'{problem}; {_remedy(Path(folder))}')
    return meta


def _is_sound(meta):
    """Return whether the fields of `meta` that the program reads are of the expected types."""
    vocab_size, itos = meta['vocab_size'], meta.get('itos')
    lengths = [meta.get(f'{split}_tokens', 0) for split in SPLITS]
    sound = meta['dtype'] in ('uint16', 'uint32') and isinstance(meta['tokenizer'], str)
    sound = sound and all(type(number) is int for number in (vocab_size, *lengths))
    if meta['tokenizer'] == 'char':
        sound = sound and len(itos) == vocab_size and all(map(_is_character, itos))
    return sound and 0 < vocab_size <= 1 << 32


def _is_character(text):
    return isinstance(text, str) and len(text) == 1


class _PlainUnpickler(pickle.Unpickler):
    """Unpickle only containers, numbers and strings, because a pickle may call any function."""

    def find_class(self, module, name):
        raise ValueError(f'names {module}.{name}')


def _meta_of_nanogpt(pickled):
    """Return meta.json's dict for nanoGPT's meta.pkl of a character-level data set.

    pickled: a dict with 'vocab_size' and 'itos': {id: character}.
    """
    try:
        meta = _PlainUnpickler(io.BytesIO(pickled)).load()
    except Exception as e:  # arbitrary bytes may raise any type
        raise ValueError(str(e)) from e
    itos = [meta['itos'][i] for i in range(len(meta['itos']))]
    return {'tokenizer': 'char', 'vocab_size': meta['vocab_size'], 'itos': itos, 'dtype': 'uint16'}


def _remedy(folder):
    has_script = (folder / 'prepare.py').is_file()
    return f'run: python {folder / "prepare.py"}' if has_script else f'prepare {folder} again'


def _fail_unprepared(folder):
    holds_data_sets = folder.resolve() == Path(__file__).resolve().parent
    above = folder if holds_data_sets else folder.parent
    if folder.is_dir() and above != folder:
        fail(f'the data set {folder} is not prepared; {_remedy(folder)}')
    files = [*above.glob('*/prepare.py'), *above.glob('*/train.bin')]
    others = ', '.join(sorted({path.parent.name for path in files}))
    fail(f'there is no data set {folder}; those in {above}: {others or "none"}')


def prefetch(make, first, depth=2):
    """Yield make(first), make(first + 1), ... without end, and compute up to `depth` of them ahead.

    A thread calls make. An exception of make, SystemExit included, is raised in place of its
    result, and ends the calls. close() ends the thread.
    """
    broken = False

    def work(i):
        nonlocal broken
        if broken:  # make may print its error: do not print it twice
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
    """Copy the tensors of `batch` to `device`; to cuda, asynchronously."""
    if torch.device(device).type == 'cuda':
        return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)
    return tuple(tensor.to(device) for tensor in batch)
