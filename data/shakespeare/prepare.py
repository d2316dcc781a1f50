"""Prepare tiny Shakespeare as GPT-2 tokens, for finetuning. The last 10 % is for validation.

python data/shakespeare/prepare.py [--input FILE] [--bpe_file FILE]
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(os.path.abspath(__file__)).parents[2]))

from data.prepare import Arguments, GPT2Tokenizer, write_dataset
from data.shakespeare_char.prepare import read_shakespeare

FOLDER = Path(os.path.abspath(__file__)).parent

if __name__ == '__main__':
    arguments = Arguments(__doc__)
    arguments.add_bpe_file()
    documents, source, args = read_shakespeare(arguments)
    write_dataset(FOLDER, documents, GPT2Tokenizer(args.bpe_file), source)
