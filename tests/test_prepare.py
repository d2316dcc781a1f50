"""Test the prepare scripts for the user's text: nanoGPT's bytes, each format, and mistakes."""

import gzip
import io
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import tiktoken.load
from conftest import ROOT
from tiktoken_ext.openai_public import r50k_pat_str

from data.tokenizers import tokenizer
from data.tokens import TokenData, read_meta
from data.writer import hold

TEXTS = [f'Document {i}\n\n  of{" words" * (i % 50)}, éÿ 数 <|endoftext|>' for i in range(150)]
TEXTS.append('')


@pytest.fixture
def prepare(monkeypatch, capsys, tmp_path, bpe_file):
    """Return prepare('text', ...), which runs data/text/prepare.py into tmp_path/out.

    It returns (status, standard error).
    """

    def run(name, *arguments, out='out'):
        script = str(ROOT / 'data' / name / 'prepare.py')
        given = [*map(str, arguments), '--out_dir', str(tmp_path / out)]
        if not {'--tokenizer', '--bpe_file'} & {*given}:
            given += ['--bpe_file', str(bpe_file)]
        monkeypatch.setattr(sys, 'argv', [script, *given])
        monkeypatch.setattr(sys, 'path', sys.path.copy())
        capsys.readouterr()
        try:
            runpy.run_path(script, run_name='__main__')
            status = 0
        except SystemExit as e:
            status = e.code
        return status, capsys.readouterr().err

    return run


def write_parquet(path, texts, column='text', **columns):
    pyarrow.parquet.write_table(pyarrow.table({column: texts, **columns}), path, row_group_size=40)
    return path


def nanogpt(path, folder, bpe_file):
    """Return {file: bytes} of nanoGPT's recipe.

    It splits with datasets and ends each document's encode_ordinary with the end-of-text token.
    """
    ranks = tiktoken.load.load_tiktoken_bpe(str(bpe_file))
    vocabulary = {'mergeable_ranks': ranks, 'special_tokens': {'<|endoftext|>': 50256}}
    encoding = tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, **vocabulary)
    loaded = datasets.load_dataset('parquet', data_files=str(path), cache_dir=str(folder))
    split = loaded['train'].train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    split['val'] = split.pop('test')
    files = {}
    for name, part in split.items():
        ids = [i for text in part['text'] for i in [*encoding.encode_ordinary(text), 50256]]
        files[f'{name}.bin'] = np.array(ids, dtype=np.uint16).tobytes()
    return files


def test_openwebtext_is_byte_for_byte_nanogpts(prepare, tmp_path, bpe_file):
    path = write_parquet(tmp_path / 'a.parquet', TEXTS, source=['x'] * len(TEXTS))
    assert prepare('openwebtext', '--data_files', path) == (0, '')
    for name, content in nanogpt(path, tmp_path / 'cache', bpe_file).items():
        assert (tmp_path / 'out' / name).read_bytes() == content
    files = ['gpt2.tiktoken', 'meta.json', 'train.bin', 'val.bin']
    assert sorted(os.listdir(tmp_path / 'out')) == files
    data = TokenData(tmp_path / 'out', 8)
    decode = tokenizer(data.meta, data.folder).decode  # from the folder alone
    text = decode(data.splits['val'])
    assert text.removesuffix('<|endoftext|>') in TEXTS


def test_every_format_gives_the_same_tokens(prepare, tmp_path):
    whole = write_parquet(tmp_path / 'whole.parquet', TEXTS, 'body')
    parts = tmp_path / 'parts'
    parts.mkdir()
    write_parquet(parts / '1.parquet', TEXTS[:70], 'body')
    write_parquet(parts / '2.parquet', TEXTS[70:], 'body')
    lines = ''.join(json.dumps({'body': text, 'id': i}) + '\n' for i, text in enumerate(TEXTS))
    (tmp_path / 'lines.jsonl').write_text(lines)
    (tmp_path / 'array.json').write_text(json.dumps([{'body': text} for text in TEXTS]))
    (tmp_path / 'lines.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    bins = {}
    for name in (whole.name, 'parts/*.parquet', 'lines.jsonl', 'array.json', 'lines.jsonl.gz'):
        options = '--data_files', tmp_path / name, '--text_column', 'body', '--val_share', 0.1
        assert prepare('openwebtext', *options) == (0, ''), name
        files = tmp_path / 'out' / 'train.bin', tmp_path / 'out' / 'val.bin'
        bins[name] = [file.read_bytes() for file in files]
    assert all(content == bins[whole.name] for content in bins.values())
    assert len(bins[whole.name][1]) > 100


def test_the_benchmark_times_both_recipes_and_compares_their_files(tmp_path, bpe_file):
    path = write_parquet(tmp_path / 'a.parquet', ['many words ' * 500] * 20)
    command = [sys.executable, 'bench.py', '--what=prepare', '--repeats=1']
    command += [f'--data_files={path}', f'--bpe_file={bpe_file}']
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
    assert 'byte for byte the same: yes' in outcome.stdout and 'peak memory' in outcome.stdout


def test_local_files_are_prepared_without_asking_the_network(prepare, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(datasets.config, 'HF_UPDATE_DOWNLOAD_COUNTS', True)
    monkeypatch.setattr(datasets.load, 'get_session', lambda: asked.append('a download count'))
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in TEXTS))
    assert prepare('openwebtext', '--data_files', tmp_path / 'a.jsonl') == (0, '') and not asked


def test_a_text_file_is_a_document(prepare, tmp_path):
    for i in range(10):
        (tmp_path / f'{i}.txt').write_text(f'two\nlines {i}\n')
    assert prepare('openwebtext', '--data_files', tmp_path / '*.txt', '--val_share', 0.2) == (0, '')
    meta = read_meta(tmp_path / 'out')
    tokens = np.fromfile(tmp_path / 'out' / 'train.bin', dtype='<u2')
    assert meta['source']['documents'] == 10 and (tokens == 50256).sum() == 8


def test_another_seed_and_share_divide_otherwise(prepare, tmp_path):
    path = write_parquet(tmp_path / 'a.parquet', TEXTS)
    sizes = {}
    for share, seed in ((0.1, 1), (0.1, 2), (0.5, 1)):
        prepare('openwebtext', '--data_files', path, '--val_share', share, '--seed', seed)
        tokens = np.fromfile(tmp_path / 'out' / 'val.bin', dtype='<u2')
        sizes[share, seed] = tokens.tobytes(), (tokens == 50256).sum()
    assert [count for _, count in sizes.values()] == [16, 16, 76]
    assert len({content for content, _ in sizes.values()}) == 3


def parquet_bytes(*arguments, **columns):
    file = io.BytesIO()
    write_parquet(file, *arguments, **columns)
    return file.getvalue()


OTHER_COLUMN = parquet_bytes(TEXTS, 'body', id=list(range(151)))
NUMBERS = parquet_bytes([1, 2, 3])
A_ROW_WITHOUT_TEXT = parquet_bytes(['a', None, 'b', 'c'] * 9)
NO_ROWS = parquet_bytes(pyarrow.array([], pyarrow.string()))
ONE_ROW = parquet_bytes(['only one'])
GOOD = parquet_bytes(TEXTS)
LINE, HALF_A_LINE = b'{"text": "x"}\n', b'{"text": \n'
GZIPPED = gzip.compress(LINE)
without_lz4 = pytest.mark.skipif(bool(find_spec('lz4')), reason='lz4 is installed')
NOT_THERE = "the column 'text' of {p}/a.parquet is not there; --text_column=NAME takes one of text"


@pytest.mark.parametrize(
    'files, says',
    [
        ({'a.parquet': OTHER_COLUMN}, 'error: ' + NOT_THERE + ': body'),
        ({'a.parquet': NUMBERS}, "error: the column 'text' of {p}/a.parquet holds int64"),
        ({'a.parquet': A_ROW_WITHOUT_TEXT}, 'rows without a text'),
        ({'a.parquet': NO_ROWS}, 'there are no rows'),
        ({'a.parquet': ONE_ROW}, 'two splits'),
        ({'a.parquet': GOOD, 'b.parquet': GOOD[:999]}, '{p}/b.parquet cannot be read'),
        ({'a.txt': b'text', 'b.txt': b'caf\xe9'}, '{p}/b.txt cannot be read (UnicodeDecodeError'),
        ({'a.jsonl': LINE, 'b.jsonl': HALF_A_LINE}, '{p}/b.jsonl cannot be read'),
        ({'a.jsonl.gz': GZIPPED, 'b.jsonl.gz': GZIPPED[:9]}, '{p}/b.jsonl.gz cannot be read'),
        pytest.param({'a.jsonl.lz4': b''}, 'run: pip install lz4', marks=without_lz4),
        ({'a.jsonl': b'{"text": "caf\xe9"}\n' * 40}, 'is not UTF-8'),
        ({}, 'no file is called'),
        ({'a.csv': b'text\nx\n'}, 'a.csv is of no known format'),
        ({'a.txt': b'x', 'b.json': b'x'}, 'json and text'),
    ],
)
def test_a_mistake_about_the_text_ends_in_one_line_and_leaves_nothing(
    prepare, tmp_path, files, says
):
    corpus = tmp_path / 'corpus'
    corpus.mkdir()
    for name, content in files.items():
        (corpus / name).write_bytes(content)
    status, err = prepare('openwebtext', '--data_files', corpus / '*')
    assert status == 2 and err.startswith('error: ') and err.count('\n') == 1, err
    assert says.format(p=corpus) in err
    assert not (tmp_path / 'out').exists()


def test_a_pattern_that_also_matches_folders_takes_the_files(prepare, tmp_path):
    folder = tmp_path / 'corpus' / 'folder'
    folder.mkdir(parents=True)
    (folder / 'a.parquet').write_bytes(GOOD)
    assert prepare('openwebtext', '--data_files', tmp_path / 'corpus' / '**')[0] == 0


@pytest.mark.parametrize('option, value', [('--val_share', '1.5'), ('--seed', '-1')])
def test_an_impossible_split_is_named(prepare, tmp_path, option, value):
    status, err = prepare('openwebtext', '--data_files', 'x.parquet', option, value)
    assert status == 2 and err.startswith(f'error: {option}={value}') and err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_a_failure_leaves_the_folder_that_another_process_made_meanwhile(
    prepare, tmp_path, monkeypatch
):
    others = tmp_path / 'out' / 'other' / 'train.bin.tmp'

    def load_dataset(*_, **__):
        others.parent.mkdir()
        others.touch()
        raise ConnectionError('the hub cannot be reached')

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    assert prepare('openwebtext', out='out/own')[0] == 2
    assert others.exists() and os.listdir(tmp_path / 'out') == ['other']


def test_a_folder_in_use_is_said_before_anything_is_read(prepare, tmp_path):
    path = write_parquet(tmp_path / 'a.parquet', TEXTS)
    with hold(tmp_path / 'out'):
        status, err = prepare('openwebtext', '--data_files', path)
        assert status == 2 and err.count('\n') == 1
        assert err.startswith('error: another process is preparing')
        assert os.listdir(tmp_path / 'out') == []
    assert prepare('openwebtext', '--data_files', path) == (0, '')


def test_a_folder_that_cannot_be_written_is_not_the_texts_fault(prepare, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / 'a.parquet', TEXTS)
    status, err = prepare('openwebtext', '--data_files', path, out='a.parquet')
    assert status == 2
    assert err.startswith(f'error: cannot write the data set to {path} (Not a directory)')

    def read_only(**_):  # a folder's mode does not stop root
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('tempfile.TemporaryFile', read_only)
    status, err = prepare('openwebtext', '--data_files', path)
    assert status == 2 and f'cannot write the data set to {tmp_path}/out (Permission denied)' in err
    assert not (tmp_path / 'out').exists()


def test_a_full_disk_keeps_what_was_done_and_the_same_command_goes_on(
    prepare, tmp_path, monkeypatch
):
    path = write_parquet(tmp_path / 'a.parquet', TEXTS)
    prepare('openwebtext', '--data_files', path, out='whole')
    fsync = os.fsync

    def full(fd):
        if os.readlink(f'/proc/self/fd/{fd}').endswith('val.bin.tmp'):
            raise OSError(28, 'No space left on device')
        fsync(fd)

    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        status, err = prepare('openwebtext', '--data_files', path)
    assert status == 2 and err.count('\n') == 1 and 'No space left on device' in err
    assert not (tmp_path / 'out' / 'train.bin').exists()
    kept = (tmp_path / 'out' / 'train.bin.tmp').stat().st_mtime_ns
    assert prepare('openwebtext', '--data_files', path) == (0, '')
    assert (tmp_path / 'out' / 'train.bin').stat().st_mtime_ns >= kept
    for name in os.listdir(tmp_path / 'whole'):
        assert (tmp_path / 'out' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


def test_no_room_for_the_copy_of_the_text_is_not_the_texts_fault(tmp_path, bpe_file):
    path = write_parquet(tmp_path / 'a.parquet', TEXTS * 20)

    def no_room():  # acts like a full disk for this process alone
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2,) * 2)

    command = [sys.executable, 'data/openwebtext/prepare.py', '--data_files', path]
    command += ['--bpe_file', bpe_file, '--out_dir', tmp_path / 'out']
    outcome = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, preexec_fn=no_room)
    assert outcome.returncode == 2, outcome.stderr
    cache = tmp_path / 'out' / 'text.tmp'
    assert outcome.stderr.startswith(f'error: {cache} cannot be written (File too large); ')
    assert outcome.stderr.count('\n') == 1 and not (tmp_path / 'out').exists()


def test_ctrl_c_says_that_the_same_command_resumes(prepare, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / 'a.parquet', TEXTS)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr('data.writer._commit', interrupted)
        status, err = prepare('openwebtext', '--data_files', path)
    assert status == 130 and 'the same command resumes here' in err and 'Traceback' not in err
    assert prepare('openwebtext', '--data_files', path) == (0, '')


def test_what_was_interrupted_does_not_go_on_with_another_text(prepare, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / 'a.parquet', TEXTS)
    with monkeypatch.context() as m:
        m.setattr('data.writer._commit', lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert prepare('openwebtext', '--data_files', path)[0] == 130
    write_parquet(path, [text.upper() for text in TEXTS])  # as many rows as before
    assert prepare('openwebtext', '--data_files', path) == (0, '')
    prepare('openwebtext', '--data_files', path, out='whole')
    for name in os.listdir(tmp_path / 'whole'):
        assert (tmp_path / 'out' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


def interrupt(prepare, path, monkeypatch):
    """Run the script up to the moment when only the renaming is left."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr('data.writer._commit', interrupted)
        assert prepare('openwebtext', '--data_files', path)[0] == 130


def test_an_intact_copy_of_the_text_is_used_again(prepare, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / 'a.parquet', TEXTS)
    interrupt(prepare, path, monkeypatch)
    (copy,) = (tmp_path / 'out').rglob('*.arrow')
    made = copy.stat().st_mtime_ns
    interrupt(prepare, path, monkeypatch)
    assert copy.stat().st_mtime_ns == made
    status, err = prepare('openwebtext', '--data_files', path, '--text_column', 'wrong')
    assert status == 2 and "the column 'wrong'" in err and copy.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    'name, damage, noted',
    [
        ('*.arrow', lambda content: b'', True),
        ('*.arrow', lambda content: content[: len(content) // 2], True),
        ('*.arrow', lambda content: bytes(len(content)), False),
        ('dataset_info.json', lambda content: b'', True),
        ('dataset_info.json', lambda content: content[:20], False),
        ('text.json', lambda content: b'[[[', True),
    ],
)
def test_a_copy_of_the_text_that_a_power_cut_damaged_is_made_anew(
    prepare, tmp_path, monkeypatch, name, damage, noted
):
    path = write_parquet(tmp_path / 'a.parquet', TEXTS)
    prepare('openwebtext', '--data_files', path, out='whole')
    interrupt(prepare, path, monkeypatch)
    (file,) = (tmp_path / 'out' / 'text.tmp').rglob(name)
    file.write_bytes(damage(file.read_bytes()))
    if not noted:  # the power went before the copy was finished
        (tmp_path / 'out' / 'text.tmp' / 'text.json').unlink()
    assert prepare('openwebtext', '--data_files', path) == (0, '')
    assert sorted(os.listdir(tmp_path / 'out')) == sorted(os.listdir(tmp_path / 'whole'))
    for name in os.listdir(tmp_path / 'whole'):
        assert (tmp_path / 'out' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


@pytest.mark.parametrize('option', ['--out_dir', '--bpe_file', '--data_files'])
@pytest.mark.parametrize('value', ['x' * 5000, 'a\0b', 'a\ud800b'])
def test_a_path_that_cannot_be_is_one_line(prepare, tmp_path, option, value):
    status, err = prepare('openwebtext', '--data_files', 'x.txt', option, value, out='out')
    assert status == 2 and err.startswith('error: ') and err.count('\n') == 1


@pytest.mark.parametrize('closed', ['pipe', 'disk'])
def test_a_data_set_is_whole_where_its_report_cannot_be_printed(tmp_path, closed):
    (tmp_path / 'one.txt').write_text('some text ' * 100)
    command = [sys.executable, 'data/text/prepare.py', tmp_path / 'one.txt', '--tokenizer', 'char']
    reader, writer = os.pipe()
    os.close(reader)
    stdout = writer if closed == 'pipe' else os.open('/dev/full', os.O_WRONLY)
    options = {'cwd': ROOT, 'stdout': stdout, 'stderr': subprocess.PIPE, 'text': True}
    outcome = subprocess.run([*command, '--out_dir', tmp_path / 'out'], **options)
    assert TokenData(tmp_path / 'out', 8)
    if closed == 'pipe':
        assert (outcome.returncode, outcome.stderr) == (141, '')
    else:
        assert outcome.returncode == 2 and 'No space left' in outcome.stderr
        assert outcome.stderr.count('\n') == 1


def test_a_hub_without_a_network_says_what_to_do(prepare, tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError('the hub cannot be reached')

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    status, err = prepare('openwebtext')
    assert status == 2 and err.count('\n') == 1
    assert 'Skylion007/openwebtext' in err and '--data_files' in err
    assert not (tmp_path / 'out').exists()


# -- the user's files


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / 'library'
    (folder / 'shelf').mkdir(parents=True)
    (folder / '.git').mkdir()
    for i in range(20):
        place = folder / 'shelf' if i % 2 else folder
        (place / f'{i}.txt').write_text(f'Book {i}: ' + 'é' * (i + 1) * 10 + '\n')
    (folder / '.git' / 'config').write_bytes(b'\xff')
    (folder / 'empty.txt').touch()
    return folder


def test_text_takes_every_file_once_in_one_split_or_cut_in_two(prepare, tmp_path, library):
    assert prepare('text', library, library / 'shelf' / '1.txt') == (0, '')
    data = TokenData(tmp_path / 'out', 8)
    decode = tokenizer(data.meta, data.folder).decode
    train, val = decode(data.splits['train']), decode(data.splits['val'])
    books = train.split('<|endoftext|>')[:-1] + val.split('<|endoftext|>')[:-1]
    written = [path.read_text() for path in library.glob('**/[0-9]*.txt')]
    assert sorted(books) != sorted(written)
    assert sorted(''.join(books)) == sorted(''.join(written))
    assert len(set(written) & set(books)) == 19  # one is cut where the validation text starts
    assert 0.07 < len(val.encode()) / len((train + val).encode()) < 0.13


def test_text_by_characters_of_one_file_is_its_beginning_and_its_end(prepare, tmp_path):
    (tmp_path / 'one.txt').write_text('aé数' * 100)
    assert prepare('text', tmp_path / 'one.txt', '--tokenizer', 'char') == (0, '')
    data = TokenData(tmp_path / 'out', 8)
    train, val = (tokenizer(data.meta).decode(data.splits[split]) for split in ('train', 'val'))
    assert train + val == 'aé数' * 100 and 28 <= len(val) <= 31
    assert data.meta['itos'] == ['a', 'é', '数']


@pytest.mark.parametrize('tokens', [['--tokenizer', 'char'], []])
def test_a_file_that_is_not_utf_8_is_named(prepare, tmp_path, library, tokens):
    (library / 'shelf' / 'latin.txt').write_bytes('é'.encode('latin-1') * 9)
    status, err = prepare('text', library, *tokens, out='new/out')
    assert status == 2 and err.count('\n') == 1
    assert f'{library}/shelf/latin.txt is not UTF-8 text (byte 0)' in err
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
    'name, says',
    [
        ('nowhere', 'there is no'),
        ('empty', 'there is no text in'),
        ('tiny', 'too little'),
    ],
)
def test_no_text_is_said(prepare, tmp_path, name, says):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'tiny').write_text('x')
    status, err = prepare('text', tmp_path / name)
    assert status == 2 and says in err and err.count('\n') == 1 and not (tmp_path / 'out').exists()


def test_the_shared_corpus_is_byte_for_byte_nanogpts(prepare, tmp_path):
    shared = Path(ROOT, '..', 'shared', 'data')
    if not (shared / 'english.parquet').exists():
        pytest.skip(f'{shared} is not there')
    text, vocabulary = shared / 'english.parquet', shared / 'gpt2.tiktoken'
    prepare('openwebtext', '--data_files', text, '--bpe_file', vocabulary)
    for name, content in nanogpt(text, tmp_path / 'cache', vocabulary).items():
        assert (tmp_path / 'out' / name).read_bytes() == content
