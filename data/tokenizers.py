"""Turn text into token ids and back, with the vocabulary of a data set or a checkpoint.

meta.json names a data set's tokenizer: 'char', whose vocabulary it holds, or 'gpt2'.
"""

import base64
import sys
from pathlib import Path

import numpy as np

from data.tokens import read_meta
from runtime.errors import fail

BPE_FILE = 'gpt2.tiktoken'  # in a data set's folder: the vocabulary that it was made with


class CharTokenizer:
    """Encode each character as its index in `itos`, a list of characters."""

    end = None  # no end-of-text token
    vocabulary = None  # meta.json has it

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

        self.vocabulary = None  # the bytes of bpe_file: what a data set keeps a copy of
        if bpe_file:
            try:
                self.vocabulary = Path(bpe_file).read_bytes()  # tiktoken would cache it by its path
                ranks = self._ranks(self.vocabulary)
            except OSError as e:
                fail(f'{bpe_file} cannot be read ({e.strerror}); give the path of a copy')
            except ValueError as e:
                fail(f"{bpe_file} is not GPT-2's vocabulary of 50,256 lines 'base64 rank' ({e})")
        else:
            try:
                ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks
            except (OSError, ValueError) as e:  # no network: requests' OSErrors; a damaged cache
                fail(
                    "the GPT-2 vocabulary is not in tiktoken's cache and could not be downloaded "
                    f'({type(e).__name__}); name a copy with --bpe_file=gpt2.tiktoken, or set '
                    'TIKTOKEN_CACHE_DIR to the cache folder of a machine that has it'
                )
        special = {'<|endoftext|>': self.end}
        self.encoding = tiktoken.Encoding(
            'gpt2', pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special
        )

    def _ranks(self, vocabulary):
        """Return {token: rank} of a vocabulary's bytes. Raises ValueError if it is not GPT-2's."""
        ranks = {}
        for number, line in enumerate(vocabulary.splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as e:
                raise ValueError(f"line {number} is not 'base64 rank'") from e
        if sorted(ranks.values()) != list(range(self.end)):
            raise ValueError(f'{len(ranks):,} tokens')
        if not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError('single bytes are missing')
        return ranks

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
    fail(f"meta.json names the tokenizer '{name}', not 'char' or 'gpt2'; prepare the data set anew")


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
    name = checkpoint['config'].get('dataset')
    if not isinstance(name, str):
        name = ''
    folders = [Path(__file__).parent / name, Path(path).absolute().parent.parent / 'data' / name]
    described = [f for f in folders if (f / 'meta.json').exists() or (f / 'meta.pkl').exists()]
    folder = (described or folders)[0]
    meta = read_meta(folder)
    remedy = f'prepare {folder} as it was when the model was trained'
    vocab_size = checkpoint['model_args']['vocab_size']
    check_vocabulary(vocab_size, meta or GPT2Tokenizer.meta, remedy)
    if meta is None:
        print(f"note: {folder} has no meta.json, its tokens are taken for GPT-2's", file=sys.stderr)
    return tokenizer(meta, folder, bpe_file)


def add_bpe_file(arguments):
    """Add --bpe_file to a script's Arguments."""
    text = "GPT-2's vocabulary, gpt2.tiktoken, in place of tiktoken's"
    arguments.add_argument('--bpe_file', metavar='FILE', help=text)


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
