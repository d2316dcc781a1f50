"""Test data/: complete data sets or none, batches that are pure functions, and mistakes."""

import base64
import fcntl
import gc
import http.client
import io
import json
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import torch

from data import tokens
from data.pystdlib_char.prepare import collect, prepare
from data.tokenizers import CharTokenizer, GPT2Tokenizer, read_text, tokenizer
from data.tokens import TokenData, prefetch, read_meta, to_device
from data.writer import hold, write_dataset

ROOT = Path(__file__).parents[1]
CHAR = CharTokenizer(['\n', ' ', 'a', 'b', 'é', '𝄞'])


def write(folder, train, val=range(6), vocab_size=6):
    """A data set of the ids given, written as any other."""
    write_dataset(folder, {'train': [train], 'val': [val]}, Ids(vocab_size), {})
    return folder


class Ids:
    """A tokenizer whose texts are token ids already."""

    end = vocabulary = None

    def __init__(self, vocab_size):
        itos = [chr(0x10000 + i) for i in range(vocab_size)]
        self.meta = {'tokenizer': 'char', 'vocab_size': vocab_size, 'itos': itos}

    def encode_text(self, ids):
        return np.array(ids)


@pytest.fixture
def numbered(tmp_path):
    """A data set whose token at position i is i, so that a token says where it was read."""
    return write(tmp_path / 'numbered', range(1000), range(107), vocab_size=1000)


@pytest.fixture
def fails(capsys):
    """Calls a function and gives back the one line that it fails with."""

    def call(function, *args, **kwargs):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            function(*args, **kwargs)
        return error_line(e.value.code, capsys.readouterr().err)

    return call


def error_line(status, stderr):
    assert status == 2, stderr
    assert stderr.startswith('error: ') and stderr.count('\n') == 1, stderr
    return stderr


# Batches


def test_batch_is_a_pure_function_of_split_seed_and_index(tmp_path):
    write(tmp_path, range(1000), range(1000), vocab_size=1000)
    first, again = TokenData(tmp_path, 16), TokenData(tmp_path, 16)
    first.batch('train', 1, 5, 4)  # what was read before must not matter
    x, y = first.batch('train', 1, 7, 4)
    x2, y2 = again.batch('train', 1, 7, 4)
    assert torch.equal(x, x2) and torch.equal(y, y2)
    for other in (('train', 1, 8, 4), ('train', 2, 7, 4), ('val', 1, 7, 4)):
        assert not torch.equal(x, first.batch(*other)[0])


def test_batch_is_the_same_set_however_rows_divide_it(numbered):
    data = TokenData(numbered, 16)
    x, y = data.batch('train', 1, 7, 8)
    for parts in ([slice(0, 8)], [slice(0, 4), slice(4, 8)], [slice(i, None, 3) for i in range(3)]):
        divided = [data.batch('train', 1, 7, 8, rows) for rows in parts]
        sequences = {tuple(row.tolist()) for xs, _ in divided for row in xs}
        assert sum(len(xs) for xs, _ in divided) == 8
        assert sequences == {tuple(row.tolist()) for row in x}


def test_batch_gives_int64_sequences_and_the_next_token_of_each(numbered):
    x, y = TokenData(numbered, 16).batch('train', 1, 0, 5)
    assert x.shape == y.shape == (5, 16) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(16))


def test_batch_draws_from_every_position_that_has_a_target_up_to_the_last_token(tmp_path):
    data = TokenData(write(tmp_path, range(10), range(10), vocab_size=10), 7)
    x, y = data.batch('train', 1, 0, 200)
    assert set(x[:, 0].tolist()) == {0, 1, 2} and y.max() == 9


def test_a_split_of_one_block_and_its_target_is_enough(tmp_path):
    data = TokenData(write(tmp_path, range(6)), 5)
    assert data.batch('train', 1, 0, 2)[0].tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize('block_size', [1, 7, 53, 105, 106])
@pytest.mark.parametrize('batch_size', [1, 4, 1000])
def test_sequential_makes_every_token_but_the_first_a_target_exactly_once(
    numbered, block_size, batch_size
):
    data = TokenData(numbered, block_size)
    batches = list(data.sequential('val', batch_size))
    assert [t for _, y in batches for t in y.flatten().tolist()] == list(range(1, 107))
    for x, y in batches:
        assert torch.equal(y, x + 1) and y.is_contiguous() and x.dtype == y.dtype == torch.int64
    full = [x for x, _ in batches if x.shape[1] == block_size]
    assert all(len(x) == batch_size for x in full[:-1]) and len(full[-1]) <= batch_size
    rest = [x for x, _ in batches[len(full) :]]
    assert len(rest) <= 1 and all(x.shape == (1, 106 % block_size) for x in rest)


def test_to_device_keeps_the_values(numbered):
    x, y = TokenData(numbered, 16).batch('train', 1, 0, 5)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    moved = to_device((x, y), device)
    assert torch.equal(moved[0].cpu(), x) and torch.equal(moved[1].cpu(), y)
    assert moved[0].device.type == device


# Prefetching


def test_prefetch_yields_in_order_and_ahead_of_the_consumer():
    made = []
    batches = prefetch(lambda i: made.append(i) or i * i, first=3, depth=2)
    assert [next(batches) for _ in range(4)] == [9, 16, 25, 36]
    deadline = time.monotonic() + 5
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [3, 4, 5, 6, 7, 8]  # the four that were taken, and depth more
    batches.close()


@pytest.mark.parametrize('error', [ValueError('no'), SystemExit(2)])
def test_prefetch_raises_what_make_raised_where_its_result_would_have_come(error):
    made = []

    def make(i):
        made.append(i)
        if i == 2:
            raise error
        return i

    batches = prefetch(make, first=0, depth=3)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(type(error)) as e:
        next(batches)
    assert e.value is error and made == [0, 1, 2]
    assert next(batches, 'ended') == 'ended'


@pytest.mark.parametrize('leave', ['close', 'del'])
def test_prefetch_leaves_no_thread_behind(leave):
    before = set(threading.enumerate())
    batches = prefetch(lambda i: i, first=0)
    next(batches)
    assert set(threading.enumerate()) - before
    if leave == 'close':
        batches.close()
    else:
        del batches
        gc.collect()
    assert not set(threading.enumerate()) - before  # one of another test may have ended


def test_prefetch_does_not_keep_an_interpreter_from_leaving():
    script = (
        'from data.tokens import prefetch\n'
        'batches = prefetch(lambda i: i, 0)\n'
        'next(batches)\n'
        'raise SystemExit(7)'
    )
    assert subprocess.run([sys.executable, '-c', script], cwd=ROOT, timeout=20).returncode == 7


# Tokenizers


def test_char_tokenizer_round_trips():
    text = 'ab é𝄞\n ba'
    ids = CHAR.encode(text)
    assert ids[:3] == [2, 3, 1] and all(type(i) is int for i in ids)
    assert CHAR.decode(ids) == text and CHAR.encode('') == [] and CHAR.decode([]) == ''
    assert tokenizer(json.loads(json.dumps(CHAR.meta))).encode(text) == ids


@pytest.mark.parametrize('character', ['c', '\U0010ffff', '\udc80'])
def test_char_tokenizer_names_the_character_that_it_does_not_know(character):
    with pytest.raises(ValueError, match='is not in the vocabulary') as e:
        CHAR.encode(f'ab{character}a')
    assert repr(character) in str(e.value)


def test_gpt2_tokenizer_knows_the_end_of_a_document_in_prompts_and_skips_padding_ids(bpe_file):
    gpt2 = tokenizer(None, bpe_file=bpe_file)
    ids = gpt2.encode('aé<|endoftext|>b')
    assert ids == [*gpt2.encode('aé'), 50256, 98]
    assert gpt2.decode(ids + [50257, 50303]) == 'aé<|endoftext|>b'
    assert 50256 not in gpt2.encode_text('a<|endoftext|>')  # in a data set it is text


def test_the_grouped_pattern_cuts_as_tiktokens_own(bpe_file):
    openai_public = pytest.importorskip('tiktoken_ext.openai_public')
    theirs = regex_of(openai_public.r50k_pat_str, bpe_file)
    ours = GPT2Tokenizer(bpe_file)
    white = ['  ', ' ', '\n\n', '\n', '\t', '\x1c', '\u3000']
    pieces = [*white, "it's", " I'LL", "'s", 'a', 'é', '数', '12', '½', '...']
    rng = np.random.default_rng(0)
    for _ in range(2000):
        text = ''.join(pieces[i] for i in rng.integers(len(pieces), size=12))
        assert ours.encode_text(text).tolist() == theirs.encode_ordinary(text), repr(text)


def regex_of(pattern, bpe_file):
    ranks = tiktoken.load.load_tiktoken_bpe(str(bpe_file))
    return tiktoken.Encoding('theirs', pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def test_a_vocabulary_that_is_not_gpt2s_is_named(bpe_file, tmp_path, fails):
    lines = bpe_file.read_bytes().splitlines(keepends=True)
    (tmp_path / 'short').write_bytes(b''.join(lines[:100]))
    (tmp_path / 'prose').write_text('no vocabulary\n')
    lines[7] = base64.b64encode(b'abc') + b' 7\n'  # the byte 7 cannot be encoded
    (tmp_path / 'byteless').write_bytes(b''.join(lines))
    for name in ('missing', '.'):
        assert f'{tmp_path / name} cannot be read' in fails(GPT2Tokenizer, tmp_path / name)
    for name in ('short', 'prose', 'byteless'):
        assert f"{tmp_path / name} is not GPT-2's vocabulary" in fails(
            GPT2Tokenizer, tmp_path / name
        )


@pytest.fixture
def other_bpe_file(bpe_file, tmp_path):
    """Return a vocabulary with the ranks of the bytes a and b exchanged."""
    lines = bpe_file.read_bytes().splitlines(keepends=True)
    lines[97], lines[98] = base64.b64encode(b'b') + b' 97\n', base64.b64encode(b'a') + b' 98\n'
    (tmp_path / 'other.tiktoken').write_bytes(b''.join(lines))
    return tmp_path / 'other.tiktoken'


def test_a_vocabulary_that_was_replaced_under_its_name_is_read_anew(
    bpe_file, other_bpe_file, tmp_path, monkeypatch
):
    for folder, source in (('one', bpe_file), ('two', other_bpe_file)):
        (tmp_path / folder).mkdir()
        shutil.copy(source, tmp_path / folder / 'gpt2.tiktoken')
        monkeypatch.chdir(tmp_path / folder)
        gpt2 = GPT2Tokenizer('gpt2.tiktoken')  # the same relative name in another folder
        assert gpt2.encode('a') == [97 if folder == 'one' else 98]
    shutil.copy(bpe_file, 'gpt2.tiktoken')
    assert GPT2Tokenizer('gpt2.tiktoken').encode('a') == [97]
    write_dataset(tmp_path / 'set', {'train': ['aab'], 'val': ['a b']}, gpt2, {})
    kept = tokenizer(read_meta(tmp_path / 'set'), tmp_path / 'set')  # those that the ids are of
    assert kept.decode(TokenData(tmp_path / 'set').splits['train'].tolist()) == 'aab'


def test_gpt2_tokenizer_without_cache_and_network_says_what_to_do(monkeypatch, fails):
    def get_encoding(name):
        raise ConnectionError('no network')

    monkeypatch.setattr('tiktoken.get_encoding', get_encoding)
    error = fails(GPT2Tokenizer)
    assert 'TIKTOKEN_CACHE_DIR' in error and '--bpe_file' in error


def test_an_unknown_tokenizer_is_named(fails):
    assert "'klingon'" in fails(tokenizer, {'tokenizer': 'klingon'})


def test_character_level_work_does_not_need_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)  # importing it raises ImportError
    fresh = runpy.run_path(ROOT / 'data/tokenizers.py')
    assert fresh['tokenizer']({'tokenizer': 'char', 'itos': ['a']}).encode('a') == [0]


# Writing


FILES = ['meta.json', 'meta.pkl', 'train.bin', 'val.bin']


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_data_set_reads_as_it_was_written(tmp_path, capsys):
    ids = Ids(65536)
    write_dataset(tmp_path, {'train': [[1, 2], [65535]], 'val': [[0, 65534]]}, ids, {'text': 'x'})
    assert 'train 3, val 2' in capsys.readouterr().out
    assert (tmp_path / 'train.bin').read_bytes() == b'\x01\x00\x02\x00\xff\xff'
    data = TokenData(tmp_path)
    assert data.splits['train'].tolist() == [1, 2, 65535]
    assert data.splits['val'].tolist() == [0, 65534]
    written = {'source': {'text': 'x'}, 'dtype': 'uint16', 'train_tokens': 3, 'val_tokens': 2}
    assert data.meta == {**ids.meta, **written}
    assert sorted(contents(tmp_path)) == FILES


def test_a_vocabulary_beyond_16_bits_is_written_and_read_in_32(tmp_path):
    write(tmp_path, [1, 70000, 2, 3], [65536, 4], vocab_size=70001)
    assert (tmp_path / 'val.bin').read_bytes() == b'\x00\x00\x01\x00\x04\x00\x00\x00'
    data = TokenData(tmp_path, 1)
    assert data.splits['train'].tolist() == [1, 70000, 2, 3] and data.meta['dtype'] == 'uint32'
    assert data.batch('train', 1, 0, 50)[0].max() == 70000


def test_nanogpt_finds_its_meta_pkl_and_no_older_one_stays(tmp_path, bpe_file):
    write_dataset(tmp_path, {'train': ['ab'], 'val': ['b ']}, CHAR, {})
    meta = pickle.loads((tmp_path / 'meta.pkl').read_bytes())
    assert meta['vocab_size'] == 6
    assert ''.join(meta['itos'][meta['stoi'][c]] for c in 'ab é') == 'ab é'
    write_dataset(tmp_path, {'train': ['ab'], 'val': ['b ']}, GPT2Tokenizer(bpe_file), {})
    assert sorted(contents(tmp_path)) == ['gpt2.tiktoken', 'meta.json', 'train.bin', 'val.bin']
    write_dataset(tmp_path, {'train': ['ab'], 'val': ['b ']}, CHAR, {})
    assert sorted(contents(tmp_path)) == FILES


def test_documents_keep_their_order_over_all_threads(tmp_path, monkeypatch):
    monkeypatch.setattr('data.writer.cores', lambda: 3)
    documents = [[i] * (i % 7) for i in range(1000)]  # among them empty ones
    write_dataset(tmp_path, {'train': documents, 'val': [[1, 1]]}, Ids(1000), {})
    written = TokenData(tmp_path, None, 1000).splits['train'].tolist()
    assert written == [i for ids in documents for i in ids]


@pytest.mark.parametrize('moment', [1, 8, 20, 33])
def test_killed_at_work_it_goes_on_where_it_was(tmp_path, monkeypatch, moment):
    """A call that is killed while it slices its documents does not slice most of them again."""
    monkeypatch.setattr('data.writer.PROGRESS_SECONDS', 0)
    monkeypatch.setattr('data.writer.DOCUMENTS_A_TASK', 32)
    monkeypatch.setattr('data.writer.cores', lambda: 1)
    documents = {'train': [[i] for i in range(1000)], 'val': [[7]] * 40}  # 32 tasks and 2
    ids, asked = Ids(1000), tmp_path / 'asked'

    class Counted(list):
        def __getitem__(self, part):
            with open(asked, 'a') as f:
                f.write(f'{part.start}\n')
            if asked.read_text().count('\n') == moment:
                time.sleep(0.2)  # for the finished tasks to be written
                os._exit(9)
            return super().__getitem__(part)

    def work():
        counted = {split: Counted(texts) for split, texts in documents.items()}
        write_dataset(tmp_path / 'out', counted, ids, {}, fingerprint='x')

    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / 'out' / 'train.bin').exists()
    work()
    again = asked.read_text().count('\n') - moment
    assert 34 - moment < again <= 34 - moment + 5  # up to four tasks are ahead of what is written
    assert TokenData(tmp_path / 'out').splits['train'].tolist() == list(range(1000))
    assert sorted(contents(tmp_path / 'out')) == FILES


def test_what_was_begun_with_other_documents_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr('data.writer.cores', lambda: 1)
    monkeypatch.setattr('data.writer.PROGRESS_SECONDS', 0)

    class Broken(list):
        def __getitem__(self, part):
            if part.start >= 64:
                raise ValueError('row 64 has no text')
            return super().__getitem__(part)

    broken = {'train': Broken([[1]] * 100), 'val': [[1, 1]]}
    (tmp_path / 'mine.tmp').write_text('of the user')
    with pytest.raises(ValueError, match='row 64 has no text'):
        write_dataset(tmp_path, broken, Ids(5), {}, fingerprint='a')
    assert contents(tmp_path) == {'mine.tmp': b'of the user'}
    (tmp_path / 'mine.tmp').unlink()
    write_dataset(tmp_path, {'train': [[2]] * 100, 'val': [[2, 2]]}, Ids(5), {}, fingerprint='b')
    assert set(TokenData(tmp_path, None, 5).splits['train'].tolist()) == {2}
    assert sorted(contents(tmp_path)) == FILES


def interrupted(folder, tokenizer, monkeypatch):
    """Write a data set up to the moment when only the renaming is left."""
    with monkeypatch.context() as m:
        m.setattr('data.writer._commit', lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit, match='130'):
            write_dataset(folder, DOCUMENTS, tokenizer, {}, fingerprint='x')


DOCUMENTS = {'train': ['ab'] * 70, 'val': ['ba'] * 3}


def test_what_was_begun_with_another_vocabulary_is_not_gone_on_with(
    tmp_path, monkeypatch, bpe_file, other_bpe_file
):
    for name, first in (('mixed', bpe_file), ('pure', other_bpe_file)):
        interrupted(tmp_path / name, GPT2Tokenizer(first), monkeypatch)
        write_dataset(
            tmp_path / name, DOCUMENTS, GPT2Tokenizer(other_bpe_file), {}, fingerprint='x'
        )
    assert contents(tmp_path / 'mixed') == contents(tmp_path / 'pure')


@pytest.mark.parametrize(
    'damage',
    [
        lambda progress: b'',
        lambda progress: bytes(len(progress)),
        lambda progress: progress[:-5],
        lambda progress: b'[' * 100000,
        lambda progress: b'7',
        lambda progress: json.dumps({**json.loads(progress), 'train': None}).encode(),
        lambda progress: json.dumps({**json.loads(progress), 'train': [70, -1]}).encode(),
        lambda progress: json.dumps({**json.loads(progress), 'val': [9, 6]}).encode(),
        lambda progress: json.dumps({'identity': json.loads(progress)['identity']}).encode(),
    ],
)
def test_progress_that_a_power_cut_damaged_is_not_gone_on_with(tmp_path, monkeypatch, damage):
    interrupted(tmp_path, CHAR, monkeypatch)
    path = tmp_path / 'progress.json.tmp'
    path.write_bytes(damage(path.read_bytes()))
    write_dataset(tmp_path, DOCUMENTS, CHAR, {}, fingerprint='x')
    data = TokenData(tmp_path)
    assert CHAR.decode(data.splits['train']) == 'ab' * 70
    assert CHAR.decode(data.splits['val']) == 'ba' * 3 and sorted(contents(tmp_path)) == FILES


def test_two_processes_do_not_write_to_one_folder(tmp_path, fails):
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert 'another process is preparing' in fails(write, tmp_path, range(6))
    os.close(held)


@pytest.mark.parametrize('written', range(6))
def test_a_full_disk_leaves_the_data_set_that_was_there(tmp_path, monkeypatch, fails, written):
    write(tmp_path, range(6))
    before = contents(tmp_path)
    calls = iter(range(10))

    def fsync(fd):
        if next(calls) == written:
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fsync)
    assert 'No space left on device' in fails(write, tmp_path, [5] * 9)
    assert contents(tmp_path) == before


@pytest.mark.parametrize('old', [True, False])
@pytest.mark.parametrize('moment', range(22))
def test_a_kill_at_any_moment_leaves_a_whole_data_set_or_none(tmp_path, fails, old, moment):
    if old:
        write(tmp_path, [1] * 6, [2] * 6)
    calls = []
    child = os.fork()
    if child == 0:  # dies without cleaning up, at call number `moment` that changes the disk

        def dying(call):
            def wrapper(*args, **kwargs):
                calls.append(call)
                return os._exit(9) if len(calls) > moment else call(*args, **kwargs)

            return wrapper

        try:
            os.fsync, os.replace = dying(os.fsync), dying(os.replace)
            Path.unlink = dying(Path.unlink)
            write(tmp_path, [3] * 9, [4] * 9)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    if (tmp_path / 'meta.json').exists():
        data = TokenData(tmp_path)
        whole = [data.splits[split].tolist() for split in ('train', 'val')]
        assert whole in ([[[1] * 6, [2] * 6]] if old and moment < 18 else [[[3] * 9, [4] * 9]])
    else:
        assert 'is not prepared' in fails(TokenData, tmp_path)
        assert not old or moment >= 14  # until everything new is on the disk, the old one stands
    write(tmp_path, [5] * 9)  # and preparing again mends it
    assert TokenData(tmp_path).splits['train'].tolist() == [5] * 9
    assert sorted(contents(tmp_path)) == FILES


def test_a_folder_that_cannot_be_written_is_named(tmp_path, fails):
    (tmp_path / 'file').write_text('in the way')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        assert f'{folder} (Not a directory)' in fails(write, folder, range(6))


def test_folders_made_in_vain_are_removed_and_no_others(tmp_path, fails):
    (tmp_path / 'before').mkdir()
    for folder in ('a/b', 'before/c', 'before'):
        with pytest.raises(RuntimeError), hold(tmp_path / folder):
            raise RuntimeError
    with pytest.raises(RuntimeError), hold(tmp_path / 'a' / 'b'):
        write(tmp_path / 'a' / 'other', range(6))
        raise RuntimeError
    assert os.listdir(tmp_path / 'before') == [] and os.listdir(tmp_path / 'a') == ['other']
    assert sorted(contents(tmp_path / 'a' / 'other')) == FILES


# Reading what is not as it should be


def test_a_data_set_that_is_not_prepared_names_the_command(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('data/bard').mkdir(parents=True)
    Path('data/bard/prepare.py').touch()
    assert 'run: python data/bard/prepare.py' in fails(TokenData, 'data/bard', 4)
    write(Path('data/own'), range(6))
    error = fails(TokenData, 'data/brad', 4)
    assert 'there is no data set data/brad; those in data: bard, own' in error
    Path('data/bard/train.bin').write_bytes(b'\0' * 100)
    assert 'not prepared' in fails(TokenData, 'data/bard', 4)


@pytest.mark.parametrize('name', ['', '../data'])
def test_the_folder_of_all_data_sets_is_none_and_has_no_script_to_run(fails, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    said = fails(TokenData, os.path.join('data', name), 4)
    assert 'there is no data set' in said and 'openwebtext' in said and 'run: ' not in said
    assert 'run: ' not in tokens._remedy(Path('data', name))


def test_odd_length_is_named(numbered, fails):
    with open(numbered / 'train.bin', 'ab') as f:
        f.write(b'\0')
    assert 'train.bin has an odd number of bytes' in fails(TokenData, numbered, 16)


def test_a_split_shorter_than_a_block_and_its_target_is_named(numbered, fails):
    assert TokenData(numbered, 106)
    assert 'val.bin has 107 tokens' in fails(TokenData, numbered, 107)


@pytest.mark.parametrize('block_size', [None, 4])
def test_an_empty_split_is_named(tmp_path, fails, block_size):
    write(tmp_path, range(6), [])
    assert 'val.bin has 0 tokens' in fails(TokenData, tmp_path, block_size)


def test_a_split_of_another_length_than_meta_says_is_named(numbered, fails):
    os.truncate(numbered / 'train.bin', 1000)
    assert 'train.bin has 500 tokens where meta.json says 1000' in fails(TokenData, numbered, 16)


def test_ids_beyond_the_vocabulary_are_named_at_opening(numbered, fails):
    error = fails(TokenData, numbered, 16, vocab_size=999)
    assert 'train.bin has the token 999, the vocabulary ends at 998' in error
    meta = json.loads((numbered / 'meta.json').read_text())
    meta |= {'vocab_size': 500, 'itos': ['a'] * 500}
    (numbered / 'meta.json').write_text(json.dumps(meta))
    assert 'the vocabulary ends at 499' in fails(TokenData, numbered, 16)


def test_ids_beyond_the_vocabulary_are_named_when_they_are_first_read(numbered, fails, monkeypatch):
    monkeypatch.setattr(tokens, 'CHECKED_AT_OPEN', 10)
    data = TokenData(numbered, 16, vocab_size=50)
    assert 'vocabulary ends at 49' in fails(data.batch, 'train', 1, 0, 100)
    assert 'vocabulary ends at 49' in fails(list, data.sequential('val', 4))
    batches = prefetch(lambda i: data.batch('train', 1, i, 100), 0)
    assert 'vocabulary ends at 49' in fails(next, batches)
    last_target = TokenData(numbered, 106, vocab_size=106)
    assert 'vocabulary ends at 105' in fails(list, last_target.sequential('val', 1))


def test_no_meta_json_means_gpt2_tokens_as_in_nanogpt(numbered):
    (numbered / 'meta.json').unlink()
    (numbered / 'meta.pkl').unlink()
    data = TokenData(numbered, 16)
    assert data.meta is None and read_meta(numbered) is None
    assert data.batch('train', 1, 0, 2)[0].shape == (2, 16)


@pytest.mark.parametrize(
    'text',
    [
        '',
        '{"tokenizer": "char"',
        '[]',
        '\xff',
        '{"tokenizer": "gpt2", "dtype": "uint16"}',
        '{"tokenizer": "gpt2", "dtype": "float32", "vocab_size": 5}',
        '{"tokenizer": "char", "dtype": "uint16", "vocab_size": 5, "itos": ["a"]}',
        '{"tokenizer": "char", "dtype": "uint16", "vocab_size": 1, "itos": [1]}',
        '{"tokenizer": "gpt2", "dtype": "uint16", "vocab_size": 5.0}',
        '{"tokenizer": null, "dtype": "uint16", "vocab_size": 5}',
        '{"tokenizer": "gpt2", "dtype": "uint16", "vocab_size": 5, "train_tokens": "5"}',
    ],
)
def test_a_damaged_meta_json_is_named(numbered, fails, text):
    (numbered / 'meta.json').write_text(text, encoding='latin-1')
    assert 'meta.json does not describe' in fails(TokenData, numbered, 16)
    assert 'meta.json does not describe' in fails(read_meta, numbered)


def test_the_meta_pkl_of_nanogpt_is_read(tmp_path):
    """As nanoGPT's data/shakespeare_char/prepare.py writes it, beside uint16 tokens."""
    chars = sorted(set('hello world'))
    meta = {
        'vocab_size': 8,
        'itos': dict(enumerate(chars)),
        'stoi': {c: i for i, c in enumerate(chars)},
    }
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    for split in ('train', 'val'):
        np.array([meta['stoi'][c] for c in 'hello world'], dtype=np.uint16).tofile(
            tmp_path / f'{split}.bin'
        )
    data = TokenData(tmp_path, 4)
    assert data.vocab_size == 8 and tokenizer(data.meta).decode(data.splits['val']) == 'hello world'


@pytest.mark.parametrize(
    'meta',
    [
        'calls',
        'class',
        'cut',
        'text',
        [],
        {'vocab_size': 2},
        {'vocab_size': 1, 'itos': {0: 'ab'}},
        {'vocab_size': 3, 'itos': {0: 'a', 1: 'b'}},
        {'vocab_size': 1, 'itos': {5: 'a'}},
    ],
)
def test_a_meta_pkl_is_read_without_executing_it_and_named_where_it_is_none(tmp_path, fails, meta):
    class Calls:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)

    sound = {'vocab_size': 1, 'itos': {0: 'a'}}
    pickled = {
        'calls': pickle.dumps({**sound, 'stoi': Calls()}),
        'class': pickle.dumps({**sound, 'x': Path('x')}),
        'cut': pickle.dumps(sound)[:-3],
        'text': b'hello',
    }
    (tmp_path / 'meta.pkl').write_bytes(
        pickled[meta] if isinstance(meta, str) else pickle.dumps(meta)
    )
    assert 'meta.pkl does not describe' in fails(read_meta, tmp_path)
    assert not (tmp_path / 'executed').exists()


# The prepare scripts


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """Copy the scripts, so that running them leaves the data sets of this checkout alone."""
    root = tmp_path_factory.mktemp('checkout')
    names = 'pystdlib_char', 'shakespeare_char', 'shakespeare_scarce', 'shakespeare'
    scripts = [f'data/{name}/prepare.py' for name in (*names, 'text', 'openwebtext')]
    runtime = [f'runtime/{name}.py' for name in ('__init__', 'errors', 'files')]
    for path in (*runtime, 'data/tokenizers.py', 'data/tokens.py', 'data/writer.py', *scripts):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, root / path)
    return root


@pytest.fixture
def run_script(checkout, monkeypatch):
    """Run a prepare script of the checkout in this process, which saves seconds of imports."""
    monkeypatch.setattr(sys, 'path', sys.path.copy())

    def call(name, *args):
        script = str(checkout / 'data' / name / 'prepare.py')
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        runpy.run_path(script, run_name='__main__')

    return call


def run_process(checkout, name, *args):
    """Run a prepare script of the checkout from another folder, with every download refused."""
    nobody = 'http://127.0.0.1:9'
    env = {**os.environ, 'http_proxy': nobody, 'https_proxy': nobody, 'no_proxy': ''}
    env |= {'TIKTOKEN_CACHE_DIR': str(checkout / 'cache'), 'PYTHONHASHSEED': '1'}
    command = [sys.executable, f'{checkout.name}/data/{name}/prepare.py', *args]
    return subprocess.run(command, cwd=checkout.parent, env=env, capture_output=True, text=True)


def test_pystdlib_char_is_the_same_every_time_and_more_than_5_mb(checkout, tmp_path):
    ran = run_process(checkout, 'pystdlib_char')
    assert ran.returncode == 0, ran.stderr
    assert 'vocabulary 96' in ran.stdout
    prepare(tmp_path, sysconfig.get_path('stdlib'))
    assert {'prepare.py', *contents(tmp_path)} == contents(checkout / 'data/pystdlib_char').keys()
    for name, content in contents(tmp_path).items():
        assert content == (checkout / 'data/pystdlib_char' / name).read_bytes()

    data = TokenData(tmp_path, 1024)
    train, val = len(data.splits['train']), len(data.splits['val'])
    assert train + val > 5e6 and 0.08 < val / (train + val) < 0.15
    text = tokenizer(data.meta).decode(data.splits['val'])
    assert 'def ' in text and 'import ' in text


def test_pystdlib_char_puts_a_file_on_one_side_by_its_path_alone(tmp_path):
    names = [f'{folder}/file{i}.py' for folder in 'ab' for i in range(100)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'# {name}\n')
    train, val, left_out = collect(tmp_path)
    assert sorted([*train, *val]) == sorted(names) and not left_out and 5 < len(val) < 40
    shutil.rmtree(tmp_path / 'b')
    fewer_train, fewer_val, _ = collect(tmp_path)
    assert list(fewer_train) == [name for name in train if name[0] == 'a']
    assert list(fewer_val) == [name for name in val if name[0] == 'a']


def test_pystdlib_char_leaves_out_tests_packages_and_what_is_not_printable_ascii(tmp_path):
    left_out = 'test', 'json/tests', 'idlelib/idle_test', 'site-packages/x', '__pycache__'
    for name in (*left_out, 'json'):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / 'a.py').write_text('x = 1\n')
    (tmp_path / 'latin.py').write_bytes(b'# -*- coding: latin-1 -*-\n# \xe9\n')
    (tmp_path / 'feed.py').write_text('x = 1\n\f\n')
    (tmp_path / '_sysconfigdata__linux.py').write_text('x = 1\n')
    (tmp_path / 'gone.py').symlink_to(tmp_path / 'nowhere.py')
    train, val, not_ascii = collect(tmp_path)
    assert [*train, *val] == ['json/a.py'] and not_ascii == 2


def test_pystdlib_char_without_sources_says_so(tmp_path, fails):
    assert 'no Python sources' in fails(prepare, tmp_path / 'new', tmp_path)
    assert not (tmp_path / 'new').exists()


TO_BE = 'To be, or not to be: that is the question: é\r\n' * 10


def test_shakespeare_char_splits_a_local_copy_90_to_10(checkout, run_script, tmp_path):
    (tmp_path / 'input.txt').write_bytes(TO_BE.encode())
    run_script('shakespeare_char', '--input', tmp_path / 'input.txt')
    data = TokenData(checkout / 'data/shakespeare_char', 8)
    train, val = (tokenizer(data.meta).decode(data.splits[split]) for split in ('train', 'val'))
    assert train + val == TO_BE and len(train) == len(TO_BE) * 9 // 10
    assert data.meta['itos'] == sorted(set(TO_BE))
    assert data.meta['source']['text'] == str(tmp_path / 'input.txt')


def test_shakespeare_scarce_is_part_of_shakespeare_char(checkout, run_script, tmp_path):
    text = ''.join(f'{i} men of Rome\n' for i in range(20000))
    (tmp_path / 'input.txt').write_text(text)
    decoded = {}
    for name in ('shakespeare_scarce', 'shakespeare_char'):
        run_script(name, '--input', tmp_path / 'input.txt')
        data = TokenData(checkout / 'data' / name, 8)
        decode = tokenizer(data.meta).decode
        decoded[name] = decode(data.splits['train']), decode(data.splits['val'])
    train, val = decoded['shakespeare_char']
    assert decoded['shakespeare_scarce'] == (train[:25000], val[:20000])


def test_shakespeare_encodes_the_download_with_gpt2(checkout, run_script, monkeypatch, bpe_file):
    monkeypatch.setattr(urllib.request, 'urlopen', lambda url, timeout: io.BytesIO(TO_BE.encode()))
    run_script('shakespeare', '--bpe_file', bpe_file)
    data = TokenData(checkout / 'data/shakespeare', 8)
    decode = tokenizer(data.meta, data.folder).decode
    train, val = decode(data.splits['train']), decode(data.splits['val'])
    assert train + val == TO_BE and data.meta['vocab_size'] == 50257
    assert data.vocab_size == 50304


@pytest.mark.parametrize('name', ['shakespeare_char', 'shakespeare'])
@pytest.mark.parametrize('error', [URLError('no network'), http.client.IncompleteRead(b'To be')])
def test_shakespeare_without_a_network_names_input(
    checkout, run_script, fails, monkeypatch, name, error
):
    def urlopen(url, timeout):
        raise error

    monkeypatch.setattr(urllib.request, 'urlopen', urlopen)
    before = contents(checkout / 'data' / name)
    assert '--input FILE' in fails(run_script, name)
    assert contents(checkout / 'data' / name) == before


def test_shakespeare_without_the_gpt2_vocabulary_says_what_to_do(checkout, tmp_path):
    (tmp_path / 'input.txt').write_text(TO_BE)
    before = contents(checkout / 'data/shakespeare')
    ran = run_process(checkout, 'shakespeare', '--input', tmp_path / 'input.txt')
    assert 'TIKTOKEN_CACHE_DIR' in error_line(ran.returncode, ran.stderr)
    assert contents(checkout / 'data/shakespeare') == before


def test_an_unreadable_input_is_named(tmp_path, fails):
    (tmp_path / 'empty.txt').touch()
    (tmp_path / 'latin.txt').write_bytes('é'.encode('latin-1'))
    assert 'missing.txt' in fails(read_text, tmp_path / 'missing.txt')
    assert 'is empty' in fails(read_text, tmp_path / 'empty.txt')
    assert 'is not UTF-8' in fails(read_text, tmp_path / 'latin.txt')
    assert 'Is a directory' in fails(read_text, tmp_path)


@pytest.mark.parametrize(
    'name', ['pystdlib_char', 'shakespeare_char', 'shakespeare', 'text', 'openwebtext']
)
def test_a_wrong_argument_is_named(run_script, fails, name):
    assert '--inptu' in fails(run_script, name, '--inptu', 'x')
