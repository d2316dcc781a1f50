"""Prepare 25,000 characters of tiny Shakespeare for training and 20,000 for validation.

    python data/shakespeare_scarce/prepare.py [--input FILE]

A small model reads this text dozens of times in seconds and overfits, so regularization counts.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(os.path.abspath(__file__)).parents[2]))

from data.shakespeare_char.prepare import read_shakespeare
from data.tokenizers import CharTokenizer
from data.writer import write_dataset
from runtime.errors import Arguments, border

FOLDER = Path(os.path.abspath(__file__)).parent


def main():
    documents, source, _ = read_shakespeare(Arguments(__doc__))
    train, val = documents['train'][0], documents['val'][0]
    char = CharTokenizer(sorted(set(train + val)))  # the vocabulary of shakespeare_char
    source['split'] = 'the first 25,000 characters, and 20,000 from nine tenths of the text on'
    write_dataset(FOLDER, {'train': [train[:25000]], 'val': [val[:20000]]}, char, source)


if __name__ == '__main__':
    with border():
        main()
