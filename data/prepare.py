"""Turn text into a data set: tokenize it and write train.bin, val.bin and meta.json.

train.bin and val.bin are flat token ids in little-endian uint16, or uint32 for a vocabulary of more
than 65,536 tokens. meta.json describes them (see write_dataset). Either all files are written, or
none. data/NAME/prepare.py finds the text, and data/tokens.py reads the result.
"""

import argparse
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

from data.tokens import read_meta
from runtime import fail

BPE_FILE = 'gpt2.tiktoken'  # in a data set's folder: the vocabulary that it was made with
DOCUMENTS_A_TASK = 64  # for a thread: some hundredths of a second of work
PROGRESS_SECONDS = 2.0  # of work that a kill may cost


class CharTokenizer:
    """Encode each character as its index in `itos`, a list of characters."""

    end = None  # no end-of-text token

    def __init__(self, itos):
        self.itos = list(itos)
        self.meta = {'tokenizer': 'char', 'vocab_size': len(self.itos), 'itos': self.itos}
        self.ids = np.full(0x110000, -1, dtype=np.int32)  # code point -> id
        self.ids[[ord(c) for c in self.itos]] = np.arange(len(self.itos))

    def encode_text(self, text):
        """Return the ids of `text`, an int32 array (len(text),).

        Raises ValueError that names a character without an id.
        """
        points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = self.ids[points]
        if ids.size and ids.min() < 0:
            point = points[ids.argmin()]
            unknown = f'{chr(point)!r} (U+{point:04X})'
            raise ValueError(f'the character {unknown} is not in the vocabulary')
        return ids

    def encode(self, text):
        return self.encode_text(text).tolist()

    def decode(self, ids):
        return ''.join(self.itos[i] for i in ids)


class GPT2Tokenizer:
    """Encode text with GPT-2's byte pair encoding.

    bpe_file: the vocabulary, 50,256 lines "base64 rank", the format of r50k_base.tiktoken. None
        uses tiktoken's cache or downloads it.
    Fails if the file is not such a vocabulary, or tiktoken cannot provide one.
    """

    end = 50256  # '<|endoftext|>'
    meta = {'tokenizer': 'gpt2', 'vocab_size': 50257}
    # Equivalent to GPT-2's pattern, 1.5 (prose) to 2 times (C sources) as fast as tiktoken's. The
    # alternatives without a look-ahead form one group, which the regex engine can hand to its
    # automaton. The look-ahead after white space has no negation.
    pattern = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?=\s|\z)|\s+"""

    def __init__(self, bpe_file=None):
        import tiktoken  # here: character-level runs do not need it
        from tiktoken.load import load_tiktoken_bpe

        self.bpe_file = bpe_file
        try:
            if bpe_file:
                ranks = load_tiktoken_bpe(str(bpe_file))
            else:
                ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks
            if sorted(ranks.values()) != list(range(self.end)):
                raise ValueError(f'{len(ranks):,} tokens')
        except (OSError, ValueError) as e:  # a damaged file, or no network: requests' OSErrors
            if bpe_file:
                fail(f"{bpe_file} is not GPT-2's vocabulary of 50,256 lines 'base64 rank' ({e})")
            fail(
                "the GPT-2 vocabulary is not in tiktoken's cache and could not be downloaded "
                f'({type(e).__name__}); name a copy with --bpe_file=gpt2.tiktoken, or set '
                'TIKTOKEN_CACHE_DIR to the cache folder of a machine that has it'
            )
        special = {'<|endoftext|>': self.end}
        self.encoding = tiktoken.Encoding(
            'gpt2', pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special
        )

    def encode_text(self, text):
        """Return the ids of `text`, a uint32 array, and treat '<|endoftext|>' as ordinary text."""
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def encode(self, text):
        """Return the ids of a prompt, a list, and treat '<|endoftext|>' as the token."""
        return self.encoding.encode(text, allowed_special={'<|endoftext|>'})

    def decode(self, ids):
        # a model's vocabulary may be padded (nanoGPT: 50304) with ids that have no text
        return self.encoding.decode([i for i in ids if i < self.meta['vocab_size']])


def tokenizer(meta, folder=None, bpe_file=None):
    """Return the tokenizer of a data set, a CharTokenizer or a GPT2Tokenizer.

    meta: the content of meta.json. None means GPT-2's encoding, as in nanoGPT.
    folder: the data set's folder, which may hold the vocabulary.
    bpe_file: the vocabulary's path, which takes precedence.
    """
    name = 'gpt2' if meta is None else meta['tokenizer']
    if name == 'gpt2':
        beside = Path(folder) / BPE_FILE if folder else None
        return GPT2Tokenizer(bpe_file or (beside if beside and beside.is_file() else None))
    if name == 'char':
        return CharTokenizer(meta['itos'])
    fail(f"meta.json names the tokenizer '{name}'; known are 'char' and 'gpt2'")


def check_vocabulary(vocab_size, meta, remedy):
    """Fail if a model of `vocab_size` tokens does not fit a data set's `meta`.

    The model may pad GPT-2's vocabulary. remedy: what the message advises.
    """
    known = meta['vocab_size']
    if vocab_size != known and not (meta['tokenizer'] == 'gpt2' and vocab_size > known):
        fail(f'the model has {vocab_size} tokens and its tokenizer {known}; {remedy}')


def tokenizer_of(path, checkpoint, bpe_file=None):
    """Return the tokenizer of the data set that the checkpoint at `path` was trained on.

    Looks for the data set in this program's data/ and, as nanoGPT has it, in data/ beside the
    out_dir. Fails if the data set does not fit the checkpoint's model.
    """
    name = checkpoint['config'].get('dataset', '')
    folders = [Path(__file__).parent / name, Path(path).absolute().parents[1] / 'data' / name]
    described = [f for f in folders if (f / 'meta.json').exists() or (f / 'meta.pkl').exists()]
    folder = (described or folders)[0]
    meta = read_meta(folder)
    remedy = f'prepare {folder} as it was when the model was trained'
    vocab_size = checkpoint['model_args']['vocab_size']
    check_vocabulary(vocab_size, meta or GPT2Tokenizer.meta, remedy)
    if meta is None:
        print(f"note: {folder} has no meta.json, its tokens are taken for GPT-2's", file=sys.stderr)
    return tokenizer(meta, folder, bpe_file)


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
    fail(f'{problem}; mend that and run this again')


def write_dataset(
    folder, documents, tokenizer, source, end_of_text=False, fingerprint=None, held=False
):
    """Tokenize with all cores and write train.bin, val.bin and meta.json to `folder`.

    documents: {'train': ..., 'val': ...}. Each is a sequence of texts, or an object with a length
        whose slices are lists of texts. Several threads slice it as they need the texts. The
        message of a ValueError from a slice is shown to the user.
    source: a dict for meta.json that describes where the data comes from.
    end_of_text: end each document with the tokenizer's end-of-text token.
    fingerprint: a string that identifies `documents`. With it an interrupted call leaves its
        progress in *.tmp files, and the same call resumes from there.
    held: the caller is within hold(folder).

    A character-level data set also gets meta.pkl for nanoGPT's sample.py. One whose tokenizer has
    its vocabulary from a file gets a copy of it. Fails if the disk refuses, and then leaves what
    was in the folder as it was.
    """
    with nullcontext() if held else hold(folder):
        _write_held(Path(folder), documents, tokenizer, source, end_of_text, fingerprint)


def _write_held(folder, documents, tokenizer, source, end_of_text, fingerprint):
    dtype = np.dtype('<u2' if tokenizer.meta['vocab_size'] <= 1 << 16 else '<u4')
    counts = {split: len(texts) for split, texts in documents.items()}
    identity = json.dumps([fingerprint, counts, tokenizer.meta, end_of_text])
    identity = hashlib.sha256(identity.encode()).hexdigest()
    try:
        # [documents done, tokens written]
        progress = {'identity': identity, 'train': [0, 0], 'val': [0, 0]}
        if fingerprint is not None:
            progress = _read_progress(folder, progress)
        end = tokenizer.end if end_of_text else None
        total = sum(counts.values())
        with tqdm(total=total, unit=' documents', disable=None, dynamic_ncols=True) as bar:
            for split, texts in documents.items():
                path = folder / f'{split}.bin'
                _write_split(path, texts, tokenizer, end, dtype, split, progress, bar)
        tokens = {f'{split}_tokens': progress[split][1] for split in documents}
        meta = {**tokenizer.meta, 'source': source, 'dtype': dtype.name, **tokens}
        _commit(folder, meta, getattr(tokenizer, 'bpe_file', None))
    except KeyboardInterrupt:
        next_time = 'starts anew' if fingerprint is None else 'goes on from here'
        print(f'\ninterrupted; the same command {next_time}', file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except (OSError, ValueError) as e:
        wrong_text = isinstance(e, ValueError)
        if wrong_text or fingerprint is None:  # the same call cannot resume
            for path in folder.glob('*.tmp'):
                if path.is_file():
                    path.unlink()
        if wrong_text:
            fail(e)
        _fail_to_write(folder, e)
    written = ', '.join(f'{split} {progress[split][1]:,}' for split in documents)
    print(f'{os.path.relpath(folder)}: vocabulary {meta["vocab_size"]:,}, tokens: {written}')


def _read_progress(folder, start):
    """Return the progress of an interrupted call with the same identity, or `start`."""
    try:
        before = json.loads((folder / 'progress.json.tmp').read_bytes())
        return before if before['identity'] == start['identity'] else start
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return start


def _write_split(path, texts, tokenizer, end, dtype, split, progress, bar):
    """Write the ids of `texts` to path.tmp, from progress[split] on, and keep progress on disk."""
    temporary = Path(f'{path}.tmp')
    done, tokens = progress[split]
    if done == len(texts) and not temporary.exists() and path.exists():
        return  # it was renamed already
    if not temporary.exists() or temporary.stat().st_size < tokens * dtype.itemsize:
        done, tokens = 0, 0
    bar.update(done)

    with open(temporary, 'r+b' if done else 'wb') as f:

        def keep():
            f.flush()
            os.fsync(f.fileno())  # the tokens must be on the disk before the progress is
            progress[split] = [done, tokens]
            _replace(path.parent / 'progress.json.tmp', json.dumps(progress).encode())

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
        parts, part = [], texts[start : start + DOCUMENTS_A_TASK]
        for text in part:
            parts.append(tokenizer.encode_text(text))
            if end is not None:
                parts.append([end])
        return len(part), np.concatenate(parts, dtype=dtype, casting='unsafe')

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


def _replace(path, content):
    """Write `content` (bytes) to `path`, or leave `path` as it is."""
    temporary = Path(f'{path}.new.tmp')
    with open(temporary, 'wb') as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _commit(folder, meta, bpe_file):
    """Rename the finished *.tmp files and remove the files of an older data set."""
    contents = {}
    if meta['tokenizer'] == 'char':
        ids = {c: i for i, c in enumerate(meta['itos'])}
        of_nanogpt = {'vocab_size': len(ids), 'itos': dict(enumerate(meta['itos'])), 'stoi': ids}
        contents['meta.pkl'] = pickle.dumps(of_nanogpt)
    if bpe_file:
        contents[BPE_FILE] = Path(bpe_file).read_bytes()
    contents['meta.json'] = json.dumps(meta, indent=1).encode()
    for name, content in contents.items():
        _replace(folder / f'{name}.tmp', content)
    # Until the last rename there is meta.json.tmp but no meta.json. If this process is killed here,
    # that tells a reader that the .bin files may not belong together.
    for name in ('meta.json', 'meta.pkl', BPE_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in ('train.bin', 'val.bin', *contents):
        if (folder / f'{name}.tmp').exists():  # else an interrupted call renamed it
            os.replace(folder / f'{name}.tmp', folder / name)
    (folder / 'progress.json.tmp').unlink()


def read_text(path):
    """Return the text of a UTF-8 file. Fails if it is missing, empty or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode('utf-8')
    except OSError as e:
        fail(f'cannot read {path} ({e.strerror or e}); name a text file')
    except UnicodeDecodeError as e:
        fail(f'{path} is not UTF-8 text (byte {e.start}); convert it, for example with iconv')
    if not text:
        fail(f'{path} is empty; name a file with text')
    return text


class Arguments(argparse.ArgumentParser):
    """Parse a script's arguments; --help prints its docstring. Fails on wrong arguments."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_bpe_file(self):
        text = "GPT-2's vocabulary, gpt2.tiktoken, in place of tiktoken's"
        self.add_argument('--bpe_file', metavar='FILE', help=text)

    def error(self, message):
        fail(f'{message}; --help lists what there is')
