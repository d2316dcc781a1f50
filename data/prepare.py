"""From text to a prepared data set: tokenizers, and train.bin, val.bin and meta.json written whole or not at all.

train.bin and val.bin are flat token ids, little-endian uint16; meta.json says what they are (see write_dataset).
data/NAME/prepare.py finds the text; data/tokens.py reads the result.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np

from runtime import fail


class CharTokenizer:
    """One id a character: its place in `itos`, a list of characters."""

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
            raise ValueError(f'the character {unknown!r} (U+{ord(unknown):04X}) is not in the vocabulary')
        return ids

    def encode(self, text):
        return self.encode_text(text).tolist()

    def decode(self, ids):
        return ''.join(self.itos[i] for i in ids)


class GPT2Tokenizer:
    """GPT-2's byte pair encoding. Fails where tiktoken neither has the vocabulary in its cache nor can download it."""

    meta = {'tokenizer': 'gpt2', 'vocab_size': 50257}

    def __init__(self):
        import tiktoken  # here, because character-level runs do without it

        try:
            self.encoding = tiktoken.get_encoding('gpt2')
        except (OSError, ValueError) as e:  # no network (requests' errors are OSErrors), or a damaged download
            fail(
                f"the GPT-2 vocabulary is not in tiktoken's cache and could not be downloaded ({type(e).__name__}); "
                'connect this machine once, or set TIKTOKEN_CACHE_DIR to the cache folder of a machine that has it'
            )

    def encode_text(self, text):
        """The ids of `text`, an int32 array; '<|endoftext|>' in it is text like any other."""
        return np.array(self.encoding.encode_ordinary(text), dtype=np.int32)

    def encode(self, text):
        """The ids of `text`, a prompt: '<|endoftext|>' in it is the token that ends a document."""
        return self.encoding.encode(text, allowed_special={'<|endoftext|>'})

    def decode(self, ids):
        # A model's vocabulary is often padded (nanoGPT: 50304), and the ids added stand for no text.
        return self.encoding.decode([i for i in ids if i < self.meta['vocab_size']])


def tokenizer(meta):
    """The tokenizer of a data set: encode(str) -> list of ids, decode(list of ids) -> str.

    `meta`: what meta.json holds; None, a data set without meta.json, means GPT-2's encoding as in nanoGPT.
    """
    name = 'gpt2' if meta is None else meta['tokenizer']
    if name == 'gpt2':
        return GPT2Tokenizer()
    if name == 'char':
        return CharTokenizer(meta['itos'])
    fail(f"meta.json names the tokenizer '{name}'; known are 'char' and 'gpt2'")


def write_dataset(folder, train_ids, val_ids, meta):
    """Write train.bin, val.bin and meta.json to `folder`. Fails where the disk does not let it, leaving what was there.

    train_ids, val_ids: arrays of token ids, (tokens,) each.
    meta: the tokenizer's own, and under 'source' a dict that says what the data was made from; the dtype and the
    numbers of tokens are added here.
    """
    folder = Path(folder)
    if meta['vocab_size'] > 1 << 16:
        fail(f'{meta["vocab_size"]} different tokens do not fit the 16 bits that {folder} has for each')
    meta = {**meta, 'dtype': 'uint16', 'train_tokens': len(train_ids), 'val_tokens': len(val_ids)}
    contents = {
        'train.bin': np.asarray(train_ids, dtype='<u2'),
        'val.bin': np.asarray(val_ids, dtype='<u2'),
        'meta.json': json.dumps(meta, indent=1).encode(),
    }
    temporary = {name: folder / f'{name}.tmp' for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, content in contents.items():
                with open(temporary[name], 'wb') as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
        except BaseException:
            for path in temporary.values():
                path.unlink(missing_ok=True)
            raise
        # From here to the last rename meta.json.tmp stands without a meta.json: so a reader knows, should this
        # process be killed now, that the .bin files may be of two makings.
        (folder / 'meta.json').unlink(missing_ok=True)
        for name in contents:
            os.replace(temporary[name], folder / name)
    except OSError as e:
        fail(f'cannot write the data set to {folder} ({e.strerror or e}); mend that and run this again')
    counts = f'train {len(train_ids):,}, val {len(val_ids):,}'
    print(f'{os.path.relpath(folder)}: vocabulary {meta["vocab_size"]:,}, tokens: {counts}')


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

    def error(self, message):
        fail(f'{message}; --help lists what there is')
