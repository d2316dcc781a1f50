"""Prepare Python's standard library as a character-level data set: no network needed.

    python data/pystdlib_char/prepare.py

The text is the sources of the interpreter that runs this script, about 10 MB, without tests, IDLE
and installed packages. The hash of a file's path decides its place and its split, so a file has
the same split in every version of Python.

Files with characters other than printable ASCII and newlines are left out, about 3 % of them.
The vocabulary is therefore the same 96 characters everywhere, and losses can be compared.
"""

import hashlib
import os
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(os.path.abspath(__file__)).parents[2]))

from data.tokenizers import CharTokenizer
from data.writer import write_dataset
from runtime.errors import Arguments, border, fail

FOLDER = Path(os.path.abspath(__file__)).parent
LEFT_OUT = {
    'test',
    'tests',
    'idle_test',
    'idlelib',
    'site-packages',
    'dist-packages',
    '__pycache__',
}


def collect(stdlib):
    """Return the sources under `stdlib`: train, val, number of files left out.

    train and val are {path: text}, in the order of the data set.
    """
    paths = {}
    for path in Path(stdlib).rglob('*.py'):
        relative = path.relative_to(stdlib)
        built = path.name.startswith('_sysconfigdata')  # written by the build: differs by machine
        if path.is_file() and not built and LEFT_OUT.isdisjoint(relative.parts):
            paths[hashlib.sha256(relative.as_posix().encode()).hexdigest()] = path
    train, val, left_out = {}, {}, 0
    for digest, path in sorted(paths.items()):
        try:
            text = path.read_text(encoding='ascii')
        except UnicodeDecodeError:
            text = None
        if text is None or not text.replace('\n', '').isprintable():
            left_out += 1
        else:
            side = val if int(digest, 16) * 10 >= 9 << 256 else train
            side[path.relative_to(stdlib).as_posix()] = text
    return train, val, left_out


def prepare(folder, stdlib):
    train, val, left_out = collect(stdlib)
    if not train or not val:
        problem = f'there are no Python sources in {stdlib}'
        fail(f'{problem}; run this with a Python that comes with them')
    train_text, val_text = ''.join(train.values()), ''.join(val.values())
    version = platform.python_version()
    files, characters = len(train) + len(val), len(train_text) + len(val_text)
    print(f'Python {version}: {files} files, {characters:,} characters; {left_out} files left out')

    source = {
        'text': "the Python standard library's sources",
        'python': version,
        'files': files,
        'files_left_out': left_out,
        'split': 'validation: the files with sha256(path) in the last tenth of its range',
    }
    char = CharTokenizer(sorted(set(train_text + val_text)))
    write_dataset(folder, {'train': [train_text], 'val': [val_text]}, char, source)


if __name__ == '__main__':
    with border():
        Arguments(__doc__).parse_args()
        prepare(FOLDER, sysconfig.get_path('stdlib'))
