"""Prepare tiny Shakespeare as GPT-2 tokens, for finetuning. The last 10 % is for validation.

python data/shakespeare/prepare.py [--input FILE] [--bpe_file FILE]
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(os.path.abspath(__file__)).parents[2]))

from data.shakespeare_char.prepare import read_shakespeare
from data.tokenizers import GPT2Tokenizer, add_bpe_file
from data.writer import write_dataset
from runtime.errors import Arguments, border

FOLDER = Path(os.path.abspath(__file__)).parent


def main():
    arguments = Arguments(__doc__)
    add_bpe_file(arguments)
    documents, source, args = read_shakespeare(arguments)
    write_dataset(FOLDER, documents, GPT2Tokenizer(args.bpe_file), source)


if __name__ == '__main__':
    with border():
        main()
