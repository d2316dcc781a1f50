"""Prepare your own text, files or folders of files, as GPT-2 tokens or characters.

    python data/text/prepare.py notes.txt books/
    python data/text/prepare.py books/ --tokenizer char --out_dir data/books

Each file is a UTF-8 document, which in GPT-2 tokens ends with <|endoftext|>. The files are
shuffled, and the last tenth of the bytes is for validation. Files and folders whose names start
with a dot are left out.
"""

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(os.path.abspath(__file__)).parents[2]))

from data.tokenizers import CharTokenizer, GPT2Tokenizer, add_bpe_file
from data.writer import write_dataset
from runtime.errors import Arguments, border, fail

FOLDER = Path(os.path.abspath(__file__)).parent


class Files:
    """Read the texts of `parts`, a list of (path, first byte, end). A slice is a list of str."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, part):
        texts = []
        for path, start, end in self.parts[part]:
            try:
                with open(path, 'rb') as f:
                    f.seek(start)
                    texts.append(f.read(end - start).decode('utf-8'))
            except UnicodeDecodeError as e:
                problem = f'{path} is not UTF-8 text (byte {start + e.start})'
                raise ValueError(f'{problem}; convert it with iconv, or leave it out') from e
            except OSError as e:
                raise ValueError(f'cannot read {path} ({e.strerror}); leave it out') from e
        return texts


def find(paths):
    """Return {path: bytes} of the files at and under `paths`, in order.

    Raises ValueError if a path is missing or there is no text.
    """
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f'there is no file or folder {path}; check the path')
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob('*') if not _is_hidden(file, path))
        for file in files:
            if file.is_file() and file.stat().st_size:
                found[os.path.abspath(file)] = file.stat().st_size
    if not found:
        raise ValueError(
            f'there is no text in {", ".join(map(str, paths))}; give files that contain text'
        )
    return found


def _is_hidden(file, folder):
    return any(name.startswith('.') for name in file.relative_to(folder).parts)


def split(sizes, seed, val_share):
    """Shuffle the files and return {'train': Files, 'val': Files}.

    The last val_share of the bytes, from the nearest character on, is for validation.
    """
    paths = [*sizes]
    paths = [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))]
    left = round(sum(sizes.values()) * (1 - val_share))  # bytes left for training
    train, val = [], []
    for path in paths:
        cut = min(max(left, 0), sizes[path])
        left -= sizes[path]
        if 0 < cut < sizes[path]:
            with open(path, 'rb') as f:
                f.seek(cut)
                while f.read(1)[0] & 0xC0 == 0x80 and cut < sizes[path] - 1:  # inside a character
                    cut += 1
        if cut > 0:
            train.append((path, 0, cut))
        if cut < sizes[path]:
            val.append((path, cut, sizes[path]))
    if not train or not val:
        raise ValueError('there is too little text for training and validation; give more')
    return {'train': Files(train), 'val': Files(val)}


def characters(documents):
    """Return the distinct characters, sorted."""
    known = set()
    for texts in documents.values():
        for i in range(len(texts)):
            known.update(texts[i : i + 1][0])
    return sorted(known)


def prepare(args):
    """Write the data set. Raises ValueError if the text is missing or wrong."""
    sizes = find(args.paths)
    documents = split(sizes, args.seed, args.val_share)
    char = args.tokenizer == 'char'
    tokenizer = CharTokenizer(characters(documents)) if char else GPT2Tokenizer(args.bpe_file)
    source = {
        'paths': args.paths,
        'files': len(sizes),
        'bytes': sum(sizes.values()),
        'split': f'by bytes, seed {args.seed}, validation {args.val_share}',
    }
    changed = [os.stat(path).st_mtime_ns for path in sizes]
    fingerprint = repr((documents['train'].parts, documents['val'].parts, changed))
    options = {'end_of_text': not char, 'fingerprint': fingerprint}
    write_dataset(args.out_dir, documents, tokenizer, source, **options)


def main():
    arguments = Arguments(__doc__)
    arguments.add_argument('paths', nargs='+', metavar='PATH')
    text = 'default: %(default)s'
    arguments.add_argument('--tokenizer', choices=('gpt2', 'char'), default='gpt2', help=text)
    add_bpe_file(arguments)
    text = 'of the shuffling; default: %(default)s'
    arguments.add_argument('--seed', type=int, default=2357, help=text)
    text = 'of the bytes; default: %(default)s'
    arguments.add_argument('--val_share', type=float, default=0.1, help=text)
    text = 'default: beside this script'
    arguments.add_argument('--out_dir', type=Path, default=FOLDER, metavar='FOLDER', help=text)
    args = arguments.parse_args()
    if not 0 < args.val_share < 1:
        fail(f'--val_share={args.val_share} must lie between 0 and 1')
    if args.seed < 0:
        fail(f'--seed={args.seed} must not be negative')
    try:
        prepare(args)
    except ValueError as e:
        fail(e)


if __name__ == '__main__':
    with border():
        main()
