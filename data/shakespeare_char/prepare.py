"""Shakespeare's plays (1.1 MB, "tiny Shakespeare"), character level: the first 90 % to train on, the rest to validate.

    python data/shakespeare_char/prepare.py [--input FILE]
"""

import http.client
import os
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(os.path.abspath(__file__)).parents[2]))

from data.prepare import Arguments, CharTokenizer, read_text, write_dataset
from runtime import fail

FOLDER = Path(os.path.abspath(__file__)).parent
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def read_shakespeare(doc):
    """What the command line asks for: (train text, val text, source), the text downloaded or from --input FILE."""
    arguments = Arguments(doc)
    arguments.add_argument('--input', metavar='FILE', help='a UTF-8 text to use in place of the download')
    path = arguments.parse_args().input
    if path is not None:
        text = read_text(path)
    else:
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                text = response.read().decode('utf-8')
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as e:
            fail(f'cannot download {URL} ({e}); fetch it elsewhere and name the local copy with --input FILE')
    cut = int(len(text) * 0.9)
    return text[:cut], text[cut:], {'text': path or URL, 'split': 'the first 90 % of the characters, the rest'}


if __name__ == '__main__':
    train, val, source = read_shakespeare(__doc__)
    char = CharTokenizer(sorted(set(train + val)))
    write_dataset(FOLDER, char.encode_text(train), char.encode_text(val), {**char.meta, 'source': source})
