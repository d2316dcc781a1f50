"""OpenWebText, or any other column of text, as GPT-2 tokens: byte for byte the train.bin and val.bin of nanoGPT.

    python data/openwebtext/prepare.py                                  Skylion007/openwebtext, from the hub
    python data/openwebtext/prepare.py --dataset HuggingFaceFW/fineweb-edu --config sample-10BT --out_dir data/fineweb
    python data/openwebtext/prepare.py --data_files 'corpus/*.parquet' --bpe_file gpt2.tiktoken

Local files are parquet, JSON (an array, or an object a line) or text (a file is a document); the last two may be
compressed. A document is a row's text and ends with <|endoftext|>; the split is datasets' train_test_split, shuffled.
Interrupted, the same command goes on where it was. Until it is done an Arrow copy of the text lies in the output
folder, since the shuffled order needs each document at any time.
"""

import copy
import errno
import glob
import importlib.util
import mmap
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(os.path.abspath(__file__)).parents[2]))

from data.prepare import Arguments, GPT2Tokenizer, cores, hold, write_dataset
from runtime import fail

FOLDER = Path(os.path.abspath(__file__)).parent
FORMATS = {
    '.parquet': 'parquet',
    '.jsonl': 'json',
    '.json': 'json',
    '.txt': 'text',
    '.text': 'text',
}
COMPRESSED = {
    '.bz2': 'bz2',
    '.gz': 'gzip',
    '.lz4': 'lz4',
    '.xz': 'lzma',
    '.zst': 'zstandard',
}  # and what reads it


class Texts:
    """The texts in one column of Arrow stream files, in the order of `rows`; a slice of it is a list of str.

    ValueError where a row has none.
    """

    def __init__(self, files, column):
        import pyarrow

        self.files = files
        self.chunks = []  # (Arrow array, the file in memory that it lies in)
        for path in files:
            with open(path, 'rb') as f:
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            for batch in pyarrow.ipc.open_stream(pyarrow.py_buffer(mapped)):
                if batch.column(column).null_count:
                    raise ValueError(f"rows without a text in the column '{column}'; remove them")
                self.chunks.append((batch.column(column), mapped))
                _release(mapped)
        self.starts = np.cumsum([0, *(len(chunk) for chunk, _ in self.chunks)])
        self.rows = np.arange(self.starts[-1])

    def select(self, rows):
        """The texts number `rows` of these files, an int array, in that order."""
        selected = copy.copy(self)
        selected.rows = rows
        return selected

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, part):
        texts = []
        for row in self.rows[part]:
            number = np.searchsorted(self.starts, row, side='right') - 1
            chunk, mapped = self.chunks[number]
            texts.append(chunk[int(row - self.starts[number])].as_py())
            _release(mapped)
        return texts


def _release(mapped):
    """Give the pages that were read back to the system: else the process comes to hold the whole corpus."""
    if hasattr(mmap, 'MADV_DONTNEED'):
        mapped.madvise(mmap.MADV_DONTNEED)


def load(cache, data_files=None, dataset=None, config=None, column='text'):
    """The Texts of local files (`data_files`, a pattern), or else of a data set on the hub.

    cache: folder for their Arrow copy; one that is there already is used again. ValueError where they cannot be had.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises, too
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    options = dict(split='train', cache_dir=str(cache))
    if data_files is None:
        where = dataset
        try:
            found = datasets.load_dataset(dataset, config, num_proc=cores(), **options)
        except Exception as e:  # the hub, its client and every format have their own
            raise ValueError(
                f'{where} cannot be loaded from the hub ({_reason(e)}); --data_files=PATTERN takes local '
                'files'
            ) from e
    else:
        where = data_files
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = (
            False  # local files are nobody's to count, over the network least
        )
        files = sorted(os.path.abspath(path) for path in glob.glob(data_files, recursive=True))
        if not files:
            raise ValueError(f'no file is called {data_files}; a pattern needs quotes in the shell')
        kind = _format(files)
        try:
            if kind == 'parquet':
                changed = [os.stat(path).st_mtime_ns for path in files]
                kwargs = {'files': files, 'changed': changed, 'column': column}
                found = datasets.Dataset.from_generator(
                    _parquet_rows, gen_kwargs=kwargs, writer_batch_size=100, **options
                )
            else:
                options |= {'sample_by': 'document'} if kind == 'text' else {}
                found = datasets.load_dataset(kind, data_files=files, **options)
        except (
            Exception
        ) as e:  # of datasets, of the readers it uses and of the disk, often one within another
            cause = _cause(e)
            if getattr(cause, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ValueError(
                    f'{cache} cannot be written ({os.strerror(cause.errno)}); it takes as much room as '
                    'the text, beside the token files: free some, or give another --out_dir'
                ) from e
            where = next(
                (path for path in files if not _is_readable(kind, path, column, options)), where
            )
            raise ValueError(f'{where} cannot be read ({_reason(e)})') from e
    types = {
        name: str(field.type)
        for name, field in zip(found.column_names, found.features.arrow_schema, strict=True)
    }
    _check_column(column, types, where)
    return Texts([part['filename'] for part in found.cache_files], column)


def _format(files):
    """The one of FORMATS' values that all `files` have, by their names."""
    kinds = set()
    for path in files:
        stem, suffix = os.path.splitext(path)
        compressed = suffix in COMPRESSED
        kind = FORMATS.get(os.path.splitext(stem)[1] if compressed else suffix)
        if kind is None or (compressed and kind == 'parquet'):
            raise ValueError(
                f'{path} is of no known format; its name must end with {", ".join(FORMATS)}, all but '
                f'parquet perhaps followed by {", ".join(COMPRESSED)}'
            )
        if compressed and importlib.util.find_spec(COMPRESSED[suffix]) is None:
            raise ValueError(
                f'{path} needs a package that is not installed; run: pip install {COMPRESSED[suffix]}'
            )
        kinds.add(kind)
    if len(kinds) > 1:
        raise ValueError(
            f'the files are {" and ".join(sorted(kinds))}; prepare files of one format at a time'
        )
    return kinds.pop()


def _parquet_rows(files, changed, column):
    """Rows for datasets to keep; its own reader of parquet has whole row groups in memory, several times over.

    changed: times of the files' last change, so that datasets does not take an older copy for this one.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile, read_metadata

    if not sum(read_metadata(path).num_rows for path in files):
        raise ValueError('there are no rows')
    for path in files:
        with ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as f:
            _check_column(column, {field.name: str(field.type) for field in f.schema_arrow}, path)
            for batch in f.iter_batches(batch_size=64, columns=[column], use_threads=False):
                for text in batch.column(0):
                    yield {column: text.as_py()}
                pyarrow.default_memory_pool().release_unused()  # pages of parquet are large and leave large gaps


def _is_readable(kind, path, column, options):
    """Whether `path` alone can be read to its end: with many files, the readers do not say which one they mean."""
    import datasets

    try:
        if kind == 'parquet':
            rows = _parquet_rows([path], None, column)
        else:
            rows = datasets.load_dataset(kind, data_files=[path], streaming=True, **options)
        for _ in rows:
            pass
    except Exception:
        return False
    return True


def _check_column(column, types, where):
    if types.get(column) not in ('string', 'large_string', 'string_view'):
        holds = f'holds {types[column]}' if column in types else 'is not there'
        names = [name for name, kind in types.items() if 'string' in kind]
        raise ValueError(
            f"the column '{column}' of {where} {holds}; --text_column=NAME takes one of text: "
            f'{", ".join(names) or "there is none"}'
        )


def _cause(error):
    """What went wrong in the first place, without the wrapping of datasets."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error):
    error = _cause(error)
    return str(error) if type(error) is ValueError else f'{type(error).__name__}: {error}'


def prepare(folder, texts, tokenizer, source, seed=2357, val_share=0.0005):
    """Split `texts` as nanoGPT does and write the data set, within hold(folder).

    ValueError where there are too few for two splits.
    """
    import datasets

    rows = datasets.Dataset.from_dict({'row': texts.rows})
    try:
        split = rows.train_test_split(test_size=val_share, seed=seed, shuffle=True)
    except ValueError as e:
        raise ValueError(
            f'{len(texts)} documents cannot be divided into two splits; give more text, or raise '
            '--val_share'
        ) from e
    documents = {
        name: texts.select(np.asarray(split[theirs].with_format('numpy')[:]['row']))
        for name, theirs in (('train', 'train'), ('val', 'test'))
    }
    source |= {
        'documents': len(texts),
        'split': f'train_test_split(test_size={val_share}, seed={seed}, shuffle=True)',
    }
    # datasets names its copy after the files that it was made of and when they were changed
    copies = [os.path.relpath(path, folder) for path in texts.files]
    write_dataset(
        folder,
        documents,
        tokenizer,
        source,
        end_of_text=True,
        fingerprint=repr([source, copies]),
        held=True,
    )


if __name__ == '__main__':
    arguments = Arguments(__doc__)
    arguments.add_argument(
        '--dataset', default='Skylion007/openwebtext', help='on the hub; default: %(default)s'
    )
    arguments.add_argument('--config', help='of the data set on the hub, where it has several')
    arguments.add_argument(
        '--data_files', metavar='PATTERN', help='local files in place of the hub, ** for any folder'
    )
    arguments.add_argument(
        '--text_column', default='text', metavar='NAME', help='default: %(default)s'
    )
    arguments.add_bpe_file()
    arguments.add_argument(
        '--seed', type=int, default=2357, help='of the split; default: %(default)s'
    )
    arguments.add_argument(
        '--val_share', type=float, default=0.0005, help='of the documents; default: %(default)s'
    )
    arguments.add_argument(
        '--out_dir', type=Path, default=FOLDER, metavar='FOLDER', help='default: beside this script'
    )
    args = arguments.parse_args()
    if not 0 < args.val_share < 1 or args.seed < 0:
        fail(
            f'--val_share={args.val_share} must lie between 0 and 1, and --seed={args.seed} must not be negative'
        )
    gpt2 = GPT2Tokenizer(args.bpe_file)
    cache = args.out_dir / 'text.tmp'
    try:
        with hold(
            args.out_dir
        ):  # before the cache is looked at: two processes would read and write the same one
            new = not cache.exists()
            try:
                texts = load(cache, args.data_files, args.dataset, args.config, args.text_column)
                asked = (
                    ('data_files', 'text_column')
                    if args.data_files
                    else ('dataset', 'config', 'text_column')
                )
                source = {name: getattr(args, name) for name in asked}
                prepare(args.out_dir, texts, gpt2, source, args.seed, args.val_share)
            except ValueError as e:
                if new:
                    shutil.rmtree(cache, ignore_errors=True)
                fail(e)
            shutil.rmtree(cache)
    except KeyboardInterrupt:  # while the text is read; later write_dataset says what is kept
        raise SystemExit(128 + signal.SIGINT) from None
