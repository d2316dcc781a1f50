"""Write a data set: tokenize documents into train.bin, val.bin and meta.json.

train.bin and val.bin are flat token ids in little-endian uint16, or uint32 for a vocabulary of more
than 65,536 tokens. meta.json describes them (see write_dataset). Either all files are written, or
none. data/NAME/prepare.py finds the text, and data/tokens.py reads the result.
"""

import fcntl
import hashlib
import json
import os
import pickle
import signal
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.tokenizers import BPE_FILE
from runtime.errors import fail
from runtime.files import write

DOCUMENTS_A_TASK = 64  # for a thread: some hundredths of a second of work
PROGRESS_SECONDS = 2.0  # of work that a kill may cost


@contextmanager
def hold(folder):
    """Make `folder` and lock it. Fails if another process has it or it cannot be written.

    On an error the empty folders that were made here are removed.
    """
    made, lock = [], None
    try:
        for path in reversed([Path(folder), *Path(folder).parents]):
            try:
                path.mkdir()
                made.append(path)
            except OSError:
                if not path.exists():
                    raise
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock), os.stat(folder)):  # another process remade it
                raise BlockingIOError
        except BlockingIOError:
            made = []  # the other process uses these folders
            fail(f'another process is preparing {folder}; wait until it is done')
        tempfile.TemporaryFile(dir=folder).close()  # fail now rather than after hours of reading
    except BaseException as e:
        _release(lock, made)
        if isinstance(e, OSError):
            _fail_to_write(folder, e)
        raise
    try:
        yield
    except BaseException:
        _release(lock, made)
        raise
    _release(lock, [])


def _release(lock, folders):
    """Remove those of `folders` that are empty, the deepest first, then release hold's lock."""
    for path in reversed(folders):
        try:
            path.rmdir()
        except OSError:  # not empty
            break
    if lock is not None:
        os.close(lock)


def _fail_to_write(folder, error):
    problem = f'cannot write the data set to {folder} ({error.strerror or error})'
    fail(f'{problem}; fix that and run this again')


def write_dataset(
    folder, documents, tokenizer, source, end_of_text=False, fingerprint=None, held=False
):
    """Tokenize with all cores and write train.bin, val.bin and meta.json to `folder`.

    documents: {'train': ..., 'val': ...}. Each is a sequence of texts, or an object with a length
        whose slices are lists of texts. Several threads slice it as they need the texts.
    tokenizer: has encode_text(), end, meta and vocabulary, as those in data/tokenizers.py.
    source: a dict for meta.json that describes where the data comes from.
    end_of_text: end each document with the tokenizer's end-of-text token.
    fingerprint: a string that identifies `documents`. With it an interrupted call leaves its
        progress in *.tmp files, and the same call resumes from there.
    held: the caller is within hold(folder).

    A character-level data set also gets meta.pkl for nanoGPT's sample.py. One whose tokenizer has
    its vocabulary from a file gets a copy of it. Raises the ValueError of a slice or of the
    tokenizer. Fails if the disk refuses. In both cases what was in the folder stays as it was.
    """
    with nullcontext() if held else hold(folder):
        _write_held(Path(folder), documents, tokenizer, source, end_of_text, fingerprint)


def _write_held(folder, documents, tokenizer, source, end_of_text, fingerprint):
    dtype = np.dtype('<u2' if tokenizer.meta['vocab_size'] <= 1 << 16 else '<u4')
    counts = {split: len(texts) for split, texts in documents.items()}
    vocabulary = hashlib.sha256(tokenizer.vocabulary or b'').hexdigest()
    made_from = json.dumps([fingerprint, counts, tokenizer.meta, vocabulary, end_of_text])
    try:
        progress = Progress(folder, made_from, counts, resume=fingerprint is not None)
        end = tokenizer.end if end_of_text else None
        total = sum(counts.values())
        with tqdm(total=total, unit=' documents', disable=None, dynamic_ncols=True) as bar:
            for split, texts in documents.items():
                _write_split(folder, split, texts, tokenizer, end, dtype, progress, bar)
        tokens = {f'{split}_tokens': progress.tokens(split) for split in documents}
        meta = {**tokenizer.meta, 'source': source, 'dtype': dtype.name, **tokens}
        _commit(folder, meta, tokenizer.vocabulary)
    except KeyboardInterrupt:
        next_time = 'starts again' if fingerprint is None else 'resumes here'
        print(f'\ninterrupted; the same command {next_time}', file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except ValueError:  # the text is wrong: the same call cannot resume
        _remove_temporary(folder)
        raise
    except OSError as e:
        if fingerprint is None:
            _remove_temporary(folder)
        _fail_to_write(folder, e)
    written = ', '.join(f'{split} {progress.tokens(split):,}' for split in documents)
    print(f'{os.path.relpath(folder)}: vocabulary {meta["vocab_size"]:,}, tokens: {written}')


def _remove_temporary(folder):
    """Remove the unfinished files, except meta.json.tmp: see _commit."""
    for name in ('train.bin', 'val.bin', 'meta.pkl', BPE_FILE, 'progress.json'):
        (folder / f'{name}.tmp').unlink(missing_ok=True)


class Progress:
    """Keep on disk how many documents of each split are done, and how many tokens they are.

    made_from: a string that identifies the call. What another call left is not used.
    counts: {split: number of documents}.
    resume: continue what the same call left.
    """

    def __init__(self, folder, made_from, counts, resume):
        self.path = folder / 'progress.json.tmp'
        self.identity = hashlib.sha256(made_from.encode()).hexdigest()
        self.done = {split: [0, 0] for split in counts}  # [documents, tokens]
        before = self._read() if resume else {}
        if before.get('identity') == self.identity:
            done = {split: before.get(split) for split in counts}
            if all(_is_progress(done[split], count) for split, count in counts.items()):
                self.done = done

    def _read(self):
        """Return the dict on disk, {} if there is none or it is damaged."""
        try:
            before = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return before if isinstance(before, dict) else {}

    def tokens(self, split):
        return self.done[split][1]

    def keep(self, split, documents, tokens):
        self.done[split] = [documents, tokens]
        write(self.path, json.dumps({'identity': self.identity, **self.done}).encode())


def _is_progress(done, documents):
    """Return whether `done` can be [documents done, tokens written] of that many documents."""
    numbers = isinstance(done, list) and [type(number) for number in done] == [int, int]
    return numbers and 0 <= done[0] <= documents and done[1] >= 0


def _size(path):
    return path.stat().st_size if path.exists() else -1


def _write_split(folder, split, texts, tokenizer, end, dtype, progress, bar):
    """Write the ids of `texts` to SPLIT.bin.tmp, from where `progress` is, and keep it on disk."""
    path, temporary = folder / f'{split}.bin', folder / f'{split}.bin.tmp'
    done, tokens = progress.done[split]
    size = tokens * dtype.itemsize
    if done == len(texts) and not temporary.exists() and _size(path) == size:
        return  # an interrupted call renamed it
    if _size(temporary) < size:
        done, tokens = 0, 0
    bar.update(done)

    with open(temporary, 'r+b' if done else 'wb') as f:

        def keep():
            f.flush()
            os.fsync(f.fileno())  # the tokens must be on the disk before the progress is
            progress.keep(split, done, tokens)

        f.truncate(tokens * dtype.itemsize)
        f.seek(0, os.SEEK_END)
        started, before, kept = time.monotonic(), tokens, time.monotonic()
        for count, ids in _encode(texts, tokenizer, end, dtype, done):
            f.write(ids)
            done, tokens = done + count, tokens + len(ids)
            now = time.monotonic()
            speed = (tokens - before) / (now - started)
            bar.set_postfix_str(f'{speed:,.0f} tokens/s', refresh=False)
            bar.update(count)
            if now - kept > PROGRESS_SECONDS:
                keep()
                kept = now
        keep()


def _encode(texts, tokenizer, end, dtype, first):
    """Yield (number of documents, their ids) in the order of `texts`, from number `first` on.

    Threads suffice, because tiktoken encodes to an array without holding Python's lock.
    """

    def encode(start):
        ids, batch = [], texts[start : start + DOCUMENTS_A_TASK]
        for text in batch:
            ids.append(tokenizer.encode_text(text))
            if end is not None:
                ids.append([end])
        return len(batch), np.concatenate(ids, dtype=dtype, casting='unsafe')

    pool = ThreadPoolExecutor(cores())
    try:
        ahead = deque()
        for start in range(first, len(texts), DOCUMENTS_A_TASK):
            ahead.append(pool.submit(encode, start))
            if len(ahead) > 3 * cores():
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def cores():
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _commit(folder, meta, vocabulary):
    """Rename the finished *.tmp files and remove the files of an older data set."""
    contents = {}
    if meta['tokenizer'] == 'char':
        ids = {c: i for i, c in enumerate(meta['itos'])}
        of_nanogpt = {'vocab_size': len(ids), 'itos': dict(enumerate(meta['itos'])), 'stoi': ids}
        contents['meta.pkl'] = pickle.dumps(of_nanogpt)
    if vocabulary is not None:
        contents[BPE_FILE] = vocabulary
    contents['meta.json'] = json.dumps(meta, indent=1).encode()
    for name, content in contents.items():
        write(folder / f'{name}.tmp', content)
    # Until the last rename there is meta.json.tmp but no meta.json. If this process is killed here,
    # that tells a reader that the .bin files may not belong together.
    for name in ('meta.json', 'meta.pkl', BPE_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in ('train.bin', 'val.bin', *contents):
        if (folder / f'{name}.tmp').exists():  # else an interrupted call renamed it
            os.replace(folder / f'{name}.tmp', folder / name)
    (folder / 'progress.json.tmp').unlink()
