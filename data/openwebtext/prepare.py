r"""Prepare OpenWebText, or any other column of text, as GPT-2 tokens.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --dataset HuggingFaceFW/fineweb-edu \
        --config sample-10BT --out_dir data/fineweb
    python data/openwebtext/prepare.py --data_files 'corpus/*.parquet' --bpe_file gpt2.tiktoken

By default the text is Skylion007/openwebtext from the hub. train.bin and val.bin equal nanoGPT's
byte for byte. Local files are parquet, JSON (an array, or an object a line) or text (one document a
file). JSON and text may be compressed. A document is a row's text and ends with <|endoftext|>. The
split is datasets' train_test_split, shuffled.

After an interruption the same command resumes. Until it is done, an Arrow copy of the text lies in
the output folder, because the shuffled order needs random access to the documents.
"""

import copy
import errno
import glob
import importlib.util
import json
import mmap
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(os.path.abspath(__file__)).parents[2]))

from data.tokenizers import GPT2Tokenizer, add_bpe_file
from data.writer import cores, hold, write_dataset
from runtime.errors import Arguments, border, fail
from runtime.files import write

FOLDER = Path(os.path.abspath(__file__)).parent
FORMATS = {
    '.parquet': 'parquet',
    '.jsonl': 'json',
    '.json': 'json',
    '.txt': 'text',
    '.text': 'text',
}
COMPRESSED = {  # suffix -> package that reads it
    '.bz2': 'bz2',
    '.gz': 'gzip',
    '.lz4': 'lz4',
    '.xz': 'lzma',
    '.zst': 'zstandard',
}


class Texts:
    """Give random access to one column of Arrow stream files. A slice is a list of str.

    rows: the order of the texts. Raises ValueError if a row has no text or is not UTF-8.
    """

    def __init__(self, files, column):
        import pyarrow

        self.files = files
        self.chunks = []  # (Arrow array, the mapped file that holds it)
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
        """Return the Texts of `rows`, an int array, in that order."""
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
            try:
                texts.append(chunk[int(row - self.starts[number])].as_py())
            except UnicodeDecodeError as e:
                problem = f'the text in row {row} is not UTF-8 ({e.reason})'
                raise ValueError(f'{problem}; remove it') from e
            _release(mapped)
        return texts


def _release(mapped):
    """Return the pages read so far to the system, or the process ends up holding the corpus."""
    if hasattr(mmap, 'MADV_DONTNEED'):
        mapped.madvise(mmap.MADV_DONTNEED)


def load(cache, data_files=None, dataset=None, config=None, column='text'):
    """Return the Texts of local files, or else of a data set on the hub.

    cache: folder for their Arrow copy; an existing copy is used again. data_files: a pattern.
    Raises ValueError if the texts cannot be loaded.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it also raises what it logs
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    options = dict(split='train', cache_dir=str(cache))
    if data_files is None:
        where = dataset
        try:
            found = datasets.load_dataset(dataset, config, num_proc=cores(), **options)
        except Exception as e:  # the hub, its client and each format raise their own types
            problem = f'{where} cannot be loaded from the hub ({_reason(e)})'
            raise ValueError(f'{problem}; --data_files=PATTERN takes local files') from e
    else:
        where = data_files
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a network request, even for local files
        found = filter(os.path.isfile, glob.glob(data_files, recursive=True))
        files = sorted(map(os.path.abspath, found))
        if not files:
            raise ValueError(f'no file is called {data_files}; a pattern needs quotes in the shell')
        kind = _format(files)
        try:
            if kind == 'parquet':
                changed = [os.stat(path).st_mtime_ns for path in files]
                kwargs = {'files': files, 'changed': changed, 'column': column}
                generate = datasets.Dataset.from_generator
                found = generate(_parquet_rows, gen_kwargs=kwargs, writer_batch_size=100, **options)
            else:
                options |= {'sample_by': 'document'} if kind == 'text' else {}
                found = datasets.load_dataset(kind, data_files=files, **options)
        except Exception as e:  # datasets, its readers and the disk raise their own types
            cause = _cause(e)
            if isinstance(cause, WrongColumn):
                raise WrongColumn(str(cause)) from e
            if getattr(cause, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ValueError(
                    f'{cache} cannot be written ({os.strerror(cause.errno)}); it takes as much '
                    'room as the text, beside the token files: free some, or give another --out_dir'
                ) from e
            unreadable = (f for f in files if not _is_readable(kind, f, column, options))
            problem = f'{next(unreadable, where)} cannot be read ({_reason(e)})'
            raise ValueError(f'{problem}; leave it out, or download it again') from e
    types = [str(field.type) for field in found.features.arrow_schema]
    types = dict(zip(found.column_names, types, strict=True))
    _check_column(column, types, where)
    return Texts([part['filename'] for part in found.cache_files], column)


def _format(files):
    """Return the format of `files`, a value of FORMATS. Raises ValueError if they differ."""
    kinds = set()
    for path in files:
        stem, suffix = os.path.splitext(path)
        compressed = suffix in COMPRESSED
        kind = FORMATS.get(os.path.splitext(stem)[1] if compressed else suffix)
        if kind is None or (compressed and kind == 'parquet'):
            raise ValueError(
                f'{path} is of no known format; its name must end with {", ".join(FORMATS)}, all '
                f'but parquet perhaps followed by {", ".join(COMPRESSED)}'
            )
        if compressed and importlib.util.find_spec(COMPRESSED[suffix]) is None:
            remedy = f'run: pip install {COMPRESSED[suffix]}'
            raise ValueError(f'{path} needs a package that is not installed; {remedy}')
        kinds.add(kind)
    if len(kinds) > 1:
        several = ' and '.join(sorted(kinds))
        raise ValueError(f'the files are {several}; prepare files of one format at a time')
    return kinds.pop()


def _parquet_rows(files, changed, column):
    """Yield rows for datasets to copy, because its parquet reader keeps whole row groups in memory.

    changed: the files' modification times. They are part of the key of datasets' cache.
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
                pyarrow.default_memory_pool().release_unused()  # parquet's pages leave large gaps


def _is_readable(kind, path, column, options):
    """Return whether `path` can be read to its end.

    The readers' errors do not say which of several files they mean.
    """
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


class WrongColumn(ValueError):
    """The text has no such column. The copy of it is sound."""


def _check_column(column, types, where):
    if types.get(column) not in ('string', 'large_string', 'string_view'):
        holds = f'holds {types[column]}' if column in types else 'is not there'
        names = [name for name, kind in types.items() if 'string' in kind]
        raise WrongColumn(
            f"the column '{column}' of {where} {holds}; --text_column=NAME takes one of text: "
            f'{", ".join(names) or "there is none"}'
        )


def _cause(error):
    """Return the original exception, which datasets wraps in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error):
    error = _cause(error)
    return str(error) if type(error) is ValueError else f'{type(error).__name__}: {error}'


def prepare(folder, texts, tokenizer, source, seed=2357, val_share=0.0005):
    """Split `texts` as nanoGPT does and write the data set. The caller holds `folder`.

    Raises ValueError if there are too few texts for two splits.
    """
    import datasets

    rows = datasets.Dataset.from_dict({'row': texts.rows})
    try:
        split = rows.train_test_split(test_size=val_share, seed=seed, shuffle=True)
    except ValueError as e:
        problem = f'{len(texts)} documents cannot be divided into two splits'
        raise ValueError(f'{problem}; give more text, or raise --val_share') from e
    documents = {}
    for name, key in (('train', 'train'), ('val', 'test')):
        documents[name] = texts.select(np.asarray(split[key].with_format('numpy')[:]['row']))
    source |= {
        'documents': len(texts),
        'split': f'train_test_split(test_size={val_share}, seed={seed}, shuffle=True)',
    }
    # datasets names its copy after a hash of the files and their modification times
    copies = [os.path.relpath(path, folder) for path in texts.files]
    options = {'end_of_text': True, 'fingerprint': repr([source, copies]), 'held': True}
    write_dataset(folder, documents, tokenizer, source, **options)


class Copy:
    """The Arrow copy of the text in `folder`, which datasets makes and calls its cache.

    A power cut may leave files that are cut off, empty or zeroed. So text.json names the files of
    a finished copy, which are on the disk, and their sizes. Others are removed before datasets
    finds them, but for its downloads.
    """

    def __init__(self, folder):
        self.folder = folder
        self.list = folder / 'text.json'
        self.aside = folder.with_name('text.old.tmp')
        _remove(self.aside)
        self.found = folder.exists()  # an earlier call left something
        if self.found and not self._is_finished():
            for path in folder.iterdir():
                if path.name != 'downloads':
                    _remove(path)

    def _files(self):
        """Return {name: bytes}, without the downloads."""
        paths = [path for path in self.folder.rglob('*') if path.is_file() and path != self.list]
        names = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}
        return {name: size for name, size in names.items() if not name.startswith('downloads/')}

    def _is_finished(self):
        try:
            return json.loads(self.list.read_bytes()) == self._files()
        except (OSError, ValueError, RecursionError):
            return False

    def finish(self):
        """Flush the copy to the disk and note that it can be used again."""
        files = self._files()
        with suppress(OSError):  # a full disk: without the note the next call makes it anew
            for name in files:
                with open(self.folder / name, 'rb') as f:
                    os.fsync(f.fileno())
            write(self.list, json.dumps(files).encode())

    def load(self, *arguments):
        """Return load()'s Texts. Makes a copy anew if the one that was found cannot be read.

        Raises ValueError if the text cannot be loaded, and leaves what was found.
        """
        try:
            texts = load(self.folder, *arguments)
        except WrongColumn:
            raise
        except ValueError:
            if not self.found:
                raise
            texts = self._load_anew(arguments)
        self.finish()
        return texts

    def _load_anew(self, arguments):
        os.replace(self.folder, self.aside)
        try:
            return load(self.folder, *arguments)
        except BaseException:  # it was not the copy's fault
            _remove(self.folder)
            os.replace(self.aside, self.folder)
            raise
        finally:
            _remove(self.aside)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def main():
    arguments = Arguments(__doc__)
    text = 'on the hub; default: %(default)s'
    arguments.add_argument('--dataset', default='Skylion007/openwebtext', help=text)
    text = 'of the data set on the hub, where it has several'
    arguments.add_argument('--config', help=text)
    text = 'local files in place of the hub, ** for any folder'
    arguments.add_argument('--data_files', metavar='PATTERN', help=text)
    text = 'default: %(default)s'
    arguments.add_argument('--text_column', default='text', metavar='NAME', help=text)
    add_bpe_file(arguments)
    text = 'of the split; default: %(default)s'
    arguments.add_argument('--seed', type=int, default=2357, help=text)
    text = 'of the documents; default: %(default)s'
    arguments.add_argument('--val_share', type=float, default=0.0005, help=text)
    text = 'default: beside this script'
    arguments.add_argument('--out_dir', type=Path, default=FOLDER, metavar='FOLDER', help=text)
    args = arguments.parse_args()
    if not 0 < args.val_share < 1:
        fail(f'--val_share={args.val_share} must lie between 0 and 1')
    if not 0 <= args.seed < 1 << 63:
        fail(f'--seed={args.seed} must be at least 0 and less than 2**63')
    gpt2 = GPT2Tokenizer(args.bpe_file)
    with hold(args.out_dir):  # no other process may use the copy meanwhile
        copied = Copy(args.out_dir / 'text.tmp')
        keep = copied.found  # the copy of another command, which may go on
        try:
            texts = copied.load(args.data_files, args.dataset, args.config, args.text_column)
            given = ('data_files',) if args.data_files else ('dataset', 'config')
            source = {name: getattr(args, name) for name in (*given, 'text_column')}
            keep = False  # from here on an error is the text's: the same command cannot go on
            prepare(args.out_dir, texts, gpt2, source, args.seed, args.val_share)
        except ValueError as e:
            if not keep:
                _remove(copied.folder)
            fail(e)
        _remove(copied.folder)


if __name__ == '__main__':
    with border():
        main()
