"""From text to a prepared data set: tokenizers, and train.bin, val.bin and meta.json written whole or not at all.

train.bin and val.bin are flat token ids, little-endian uint16 (uint32 where the vocabulary needs it); meta.json says
what they are (see write_dataset). data/NAME/prepare.py finds the text; data/tokens.py reads the result.
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

BPE_FILE = 'gpt2.tiktoken'  # in the folder of a data set: the vocabulary that it was made with
DOCUMENTS_A_TASK = 64  # a thread is handed so many at a time: some hundredths of a second of work
PROGRESS_SECONDS = 2.0  # of work that a kill may cost


class CharTokenizer:
    """One id a character: its place in `itos`, a list of characters."""

    end = None  # there is no token for the end of a text

    def __init__(self, itos):
        self.itos = list(itos)
        self.meta = {'tokenizer': 'char', 'vocab_size': len(self.itos), 'itos': self.itos}
        self.ids = np.full(0x110000, -1, dtype=np.int32)  # from any code point to its id
        self.ids[[ord(c) for c in self.itos]] = np.arange(len(self.itos))

    def encode_text(self, text):
        """The ids of `text`, an int32 array (len(text),). Raises ValueError naming a character that has none."""
        points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = self.ids[points]
        if ids.size and ids.min() < 0:
            unknown = chr(points[ids.argmin()])
            raise ValueError(
                f'the character {unknown!r} (U+{ord(unknown):04X}) is not in the vocabulary'
            )
        return ids

    def encode(self, text):
        return self.encode_text(text).tolist()

    def decode(self, ids):
        return ''.join(self.itos[i] for i in ids)


class GPT2Tokenizer:
    """GPT-2's byte pair encoding, from `bpe_file` or as tiktoken finds it: in its cache, or by a download.

    bpe_file: 50,256 lines "base64 rank", as tiktoken keeps r50k_base.tiktoken; any file of that form will do.
    Fails where the file is none, or tiktoken neither has the vocabulary nor can download it.
    """

    end = 50256  # '<|endoftext|>'
    meta = {'tokenizer': 'gpt2', 'vocab_size': 50257}
    # GPT-2's pattern. The alternatives without a look-ahead form one group, which the regex engine can hand to its
    # automaton as a whole, and what must follow white space is said without a negation: the pieces are the same, and
    # they come 1.5 (prose) to 2 times (C sources) as fast as with the pattern that tiktoken has.
    pattern = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?=\s|\z)|\s+"""

    def __init__(self, bpe_file=None):
        import tiktoken  # here, because character-level runs do without it
        from tiktoken.load import load_tiktoken_bpe

        self.bpe_file = bpe_file
        try:
            ranks = (
                load_tiktoken_bpe(str(bpe_file))
                if bpe_file
                else tiktoken.get_encoding('gpt2')._mergeable_ranks
            )
            if sorted(ranks.values()) != list(range(self.end)):
                raise ValueError(f'{len(ranks):,} tokens')
        except (
            OSError,
            ValueError,
        ) as e:  # no network (requests' errors are OSErrors), or a damaged file
            if bpe_file:
                fail(f"{bpe_file} is not GPT-2's vocabulary of 50,256 lines 'base64 rank' ({e})")
            fail(
                f"the GPT-2 vocabulary is not in tiktoken's cache and could not be downloaded ({type(e).__name__}); "
                'name a copy with --bpe_file=gpt2.tiktoken, or set TIKTOKEN_CACHE_DIR to the cache folder of a machine '
                'that has it'
            )
        special = {'<|endoftext|>': self.end}
        self.encoding = tiktoken.Encoding(
            'gpt2', pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special
        )

    def encode_text(self, text):
        """The ids of `text`, a uint32 array; '<|endoftext|>' in it is text like any other."""
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def encode(self, text):
        """The ids of `text`, a prompt: '<|endoftext|>' in it is the token that ends a document."""
        return self.encoding.encode(text, allowed_special={'<|endoftext|>'})

    def decode(self, ids):
        # A model's vocabulary is often padded (nanoGPT: 50304), and the ids added stand for no text.
        return self.encoding.decode([i for i in ids if i < self.meta['vocab_size']])


def tokenizer(meta, folder=None, bpe_file=None):
    """The tokenizer of a data set: encode(str) -> list of ids, decode(list of ids) -> str.

    meta: what meta.json holds; None, a data set without meta.json, means GPT-2's encoding as in nanoGPT.
    folder: of the data set, where the vocabulary may lie; bpe_file: the vocabulary, wherever it lies.
    """
    name = 'gpt2' if meta is None else meta['tokenizer']
    if name == 'gpt2':
        beside = Path(folder) / BPE_FILE if folder else None
        return GPT2Tokenizer(bpe_file or (beside if beside and beside.is_file() else None))
    if name == 'char':
        return CharTokenizer(meta['itos'])
    fail(f"meta.json names the tokenizer '{name}'; known are 'char' and 'gpt2'")


def check_vocabulary(vocab_size, meta, remedy):
    """Fail unless a model of `vocab_size` tokens goes with a data set's `meta`; GPT-2's vocabulary may be padded."""
    known = meta['vocab_size']
    if vocab_size != known and not (meta['tokenizer'] == 'gpt2' and vocab_size > known):
        fail(f'the model has {vocab_size} tokens and its tokenizer {known}; {remedy}')


def tokenizer_of(path, checkpoint, bpe_file=None):
    """The tokenizer of the data set that the checkpoint at `path` was trained on. Fails where the two do not fit.

    The data set is sought in this program's data/ and, as nanoGPT's folders lie, in data/ beside the out_dir.
    """
    name = checkpoint['config'].get('dataset', '')
    folders = [Path(__file__).parent / name, Path(path).absolute().parents[1] / 'data' / name]
    folder = next(
        (f for f in folders if (f / 'meta.json').exists() or (f / 'meta.pkl').exists()), folders[0]
    )
    meta = read_meta(folder)
    check_vocabulary(
        checkpoint['model_args']['vocab_size'],
        meta or GPT2Tokenizer.meta,
        f'prepare {folder} as it was when the model was trained',
    )
    if meta is None:
        print(f"note: {folder} has no meta.json, its tokens are taken for GPT-2's", file=sys.stderr)
    return tokenizer(meta, folder, bpe_file)


@contextmanager
def hold(folder):
    """Make `folder` and keep it to this process. Fails where another one prepares it, or it cannot be written.

    When it is left by an error, those folders are removed that were made here and are empty.
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
            if not os.path.samestat(
                os.fstat(lock), os.stat(folder)
            ):  # removed meanwhile, and made by another one
                raise BlockingIOError
        except BlockingIOError:
            made = []  # what is empty now is in use all the same
            fail(f'another process is preparing {folder}; wait until it is done')
        tempfile.TemporaryFile(dir=folder).close()  # now rather than after hours of reading
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
    """Give back hold's lock, after the last of `folders` were removed as far as they are empty."""
    for path in reversed(folders):
        try:
            path.rmdir()
        except OSError:  # something is in it: kept by this process, or another one's
            break
    if lock is not None:
        os.close(lock)


def _fail_to_write(folder, error):
    fail(
        f'cannot write the data set to {folder} ({error.strerror or error}); mend that and run this again'
    )


def write_dataset(
    folder, documents, tokenizer, source, end_of_text=False, fingerprint=None, held=False
):
    """Write train.bin, val.bin and meta.json to `folder`, tokenizing with all cores.

    documents: {'train': ..., 'val': ...}, each a sequence of texts, or an object with a length whose slices are lists
        of texts: only those being worked on are asked for, by several threads. What the slice raises as ValueError
        is told to the user.
    source: a dict that says in meta.json what the data was made from.
    end_of_text: end each document with the tokenizer's token for that.
    fingerprint: a string that is another whenever `documents` are others. With one, a call that was interrupted, by
        whatever, leaves what it did in *.tmp files, and the same call goes on from there.
    held: the caller is within hold(folder).

    Besides, meta.pkl for nanoGPT's sample.py where tokens are characters, and the vocabulary where the tokenizer has
    it from a file. Fails where the disk does not let it; what was in the folder then stays as it is.
    """
    with nullcontext() if held else hold(folder):
        _write_held(Path(folder), documents, tokenizer, source, end_of_text, fingerprint)


def _write_held(folder, documents, tokenizer, source, end_of_text, fingerprint):
    dtype = np.dtype('<u2' if tokenizer.meta['vocab_size'] <= 1 << 16 else '<u4')
    counts = {split: len(texts) for split, texts in documents.items()}
    identity = json.dumps([fingerprint, counts, tokenizer.meta, end_of_text])
    identity = hashlib.sha256(identity.encode()).hexdigest()
    try:
        progress = {
            'identity': identity,
            'train': [0, 0],
            'val': [0, 0],
        }  # [documents done, tokens written]
        if fingerprint is not None:
            progress = _read_progress(folder, progress)
        end = tokenizer.end if end_of_text else None
        with tqdm(
            total=sum(counts.values()), unit=' documents', disable=None, dynamic_ncols=True
        ) as bar:
            for split, texts in documents.items():
                _write_split(
                    folder / f'{split}.bin', texts, tokenizer, end, dtype, split, progress, bar
                )
        tokens = {f'{split}_tokens': progress[split][1] for split in documents}
        meta = {**tokenizer.meta, 'source': source, 'dtype': dtype.name, **tokens}
        _commit(folder, meta, getattr(tokenizer, 'bpe_file', None))
    except KeyboardInterrupt:
        next_time = 'starts anew' if fingerprint is None else 'goes on from here'
        print(f'\ninterrupted; the same command {next_time}', file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except (OSError, ValueError) as e:
        wrong_text = isinstance(e, ValueError)
        if wrong_text or fingerprint is None:  # nothing can go on from here
            for path in folder.glob('*.tmp'):
                if path.is_file():
                    path.unlink()
        if wrong_text:
            fail(e)
        _fail_to_write(folder, e)
    print(
        f'{os.path.relpath(folder)}: vocabulary {meta["vocab_size"]:,}, tokens: '
        + ', '.join(f'{split} {progress[split][1]:,}' for split in documents)
    )


def _read_progress(folder, start):
    """What the call before came to, where it had the same identity, or else `start`."""
    try:
        before = json.loads((folder / 'progress.json.tmp').read_bytes())
        return before if before['identity'] == start['identity'] else start
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return start


def _write_split(path, texts, tokenizer, end, dtype, split, progress, bar):
    """Bring path.tmp from progress[split], which it keeps, to all of `texts`."""
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
            os.fsync(f.fileno())  # first the tokens, then the word that they are there
            progress[split] = [done, tokens]
            _replace(path.parent / 'progress.json.tmp', json.dumps(progress).encode())

        f.truncate(tokens * dtype.itemsize)
        f.seek(0, os.SEEK_END)
        started, before, kept = time.monotonic(), tokens, time.monotonic()
        for count, ids in _encode(texts, tokenizer, end, dtype, done):
            f.write(ids)
            done, tokens = done + count, tokens + len(ids)
            now = time.monotonic()
            bar.set_postfix_str(
                f'{(tokens - before) / (now - started):,.0f} tokens/s', refresh=False
            )
            bar.update(count)
            if now - kept > PROGRESS_SECONDS:
                keep()
                kept = now
        keep()


def _encode(texts, tokenizer, end, dtype, first):
    """Yields (number of documents, their ids) in the order of `texts`, from number `first` on.

    Threads are enough: tiktoken computes without Python's lock, and hands over an array that is not built under it.
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
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _replace(path, content):
    """Write `content` (bytes) to `path` as a whole, or leave `path` as it is."""
    temporary = Path(f'{path}.new.tmp')
    with open(temporary, 'wb') as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _commit(folder, meta, bpe_file):
    """Give the finished *.tmp files their names, and nothing of an older data set stays beside them."""
    contents = {}
    if meta['tokenizer'] == 'char':  # in nanoGPT's own form
        ids = {c: i for i, c in enumerate(meta['itos'])}
        of_nanogpt = {'vocab_size': len(ids), 'itos': dict(enumerate(meta['itos'])), 'stoi': ids}
        contents['meta.pkl'] = pickle.dumps(of_nanogpt)
    if bpe_file:
        contents[BPE_FILE] = Path(bpe_file).read_bytes()
    contents['meta.json'] = json.dumps(meta, indent=1).encode()
    for name, content in contents.items():
        _replace(folder / f'{name}.tmp', content)
    # From here to the last rename meta.json.tmp stands without a meta.json: so a reader knows, should this process be
    # killed now, that the .bin files may be of two makings.
    for name in ('meta.json', 'meta.pkl', BPE_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in ('train.bin', 'val.bin', *contents):
        if (folder / f'{name}.tmp').exists():  # the call before may have come as far as here
            os.replace(folder / f'{name}.tmp', folder / name)
    (folder / 'progress.json.tmp').unlink()


def read_text(path):
    """The text of a UTF-8 file. Fails where there is none, it is empty or it is not UTF-8."""
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
    """The parser of a prepare script, from its docstring: wrong arguments end as every other mistake does."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_bpe_file(self):
        text = (
            "GPT-2's vocabulary, gpt2.tiktoken, in place of the one that tiktoken has or downloads"
        )
        self.add_argument('--bpe_file', metavar='FILE', help=text)

    def error(self, message):
        fail(f'{message}; --help lists what there is')
