"""Prepare tiny Shakespeare (1.1 MB of plays) as characters. The last 10 % is for validation.

python data/shakespeare_char/prepare.py [--input FILE]
"""

import http.client
import os
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(os.path.abspath(__file__)).parents[2]))

from data.tokenizers import CharTokenizer, read_text
from data.writer import write_dataset
from runtime.errors import Arguments, border, fail

FOLDER = Path(os.path.abspath(__file__)).parent
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def read_shakespeare(arguments):
    """Parse the command line and return (documents, source, args).

    The text is downloaded, or read from --input FILE.
    """
    text = 'a UTF-8 text to use in place of the download'
    arguments.add_argument('--input', metavar='FILE', help=text)
    args = arguments.parse_args()
    path = args.input
    if path is not None:
        text = read_text(path)
    else:
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                text = response.read().decode('utf-8')
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as e:
            remedy = 'fetch it elsewhere and name the local copy with --input FILE'
            fail(f'cannot download {URL} ({e}); {remedy}')
    cut = int(len(text) * 0.9)
    source = {'text': path or URL, 'split': 'the first 90 % of the characters, the rest'}
    return {'train': [text[:cut]], 'val': [text[cut:]]}, source, args


def main():
    documents, source, _ = read_shakespeare(Arguments(__doc__))
    char = CharTokenizer(sorted(set(documents['train'][0] + documents['val'][0])))
    write_dataset(FOLDER, documents, char, source)


if __name__ == '__main__':
    with border():
        main()
