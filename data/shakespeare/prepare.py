"""Shakespeare's plays in GPT-2's byte pair encoding, for finetuning: the first 90 % to train on, the rest to validate.

    python data/shakespeare/prepare.py [--input FILE]
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(os.path.abspath(__file__)).parents[2]))

from data.prepare import GPT2Tokenizer, write_dataset
from data.shakespeare_char.prepare import read_shakespeare

FOLDER = Path(os.path.abspath(__file__)).parent

if __name__ == '__main__':
    train, val, source = read_shakespeare(__doc__)
    gpt2 = GPT2Tokenizer()
    write_dataset(FOLDER, gpt2.encode_text(train), gpt2.encode_text(val), {**gpt2.meta, 'source': source})
