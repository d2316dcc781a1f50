"""Test README.md and docs/: commands run, or at least name what exists, and links lead somewhere.

Commands run in a copy of the checkout, in this process, with `shortened` arguments appended. Those
that need a GPU, a network or minutes are only checked: script, options and config files exist.
"""

import importlib.util
import itertools
import math
import re
import shlex
import shutil
import string

import pyarrow
import pytest
import torch.distributed.run
from conftest import ROOT, TINY
from pyarrow import parquet

from compare import train_settings
from configurator import configure

PAGES = [*sorted((ROOT / 'docs').glob('*.md')), ROOT / 'README.md']  # data.md comes first
LINKING = [*PAGES, ROOT / 'results' / 'README.md', ROOT / 'results' / 'optimizer.md']
PYTHON = ('python', 'python3', '.venv/bin/python', '$(BIN)/python')
PROGRAMS = ('source', 'pip', '.venv/bin/pip', 'tensorboard')  # nothing of ours is in their words
MAKEFILE = (ROOT / 'Makefile').read_text()
CHECKED_ONLY = {  # a part of the command: why it does not run
    '--init_from=gpt2': 'downloads GPT-2',
    'eval_gpt2': 'downloads GPT-2',
    'finetune': 'downloads GPT-2',
    '--wandb_log': 'starts a service',
    '--watch': 'does not end',
    '../nanoGPT': 'has no checkpoint of nanoGPT',
    'bench.py': 'measures for minutes',
    'compare.py': 'starts a process for each run',
    'plot.py results/cpr_figure1': 'draws runs of compare.py; test_papers.py runs it',
    'scripts/compare_parallel.py': 'takes minutes',
    '-m ': 'a package, not a script of ours',
    'ckpt-000100': 'needs several processes',
}
HUB = 'data/openwebtext/prepare.py'  # without --data_files


def blocks(page, *languages):
    """Return the fenced blocks of a page in these languages ('' for none)."""
    found = re.findall(r'^```(\w*)\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def commands(text):
    """Return the commands in lines of shell, each a list of words, without VARIABLE=VALUE."""
    found = []
    for line in text.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        for is_operator, group in itertools.groupby(words, lambda word: word == '&&'):
            command = list(itertools.dropwhile(lambda w: re.match('[A-Z_]+=', w), group))
            if command and not is_operator:
                found.append(command)
    return found


COMMANDS = {page: commands('\n'.join(blocks(page, '', 'sh'))) for page in PAGES}
ALL = [
    pytest.param(c, id=f'{p.stem}: {shlex.join(c)}')
    for p in PAGES
    for c in COMMANDS[p]
    if c[0] not in PROGRAMS
]
MAKE_TRAIN = [
    'python data/pystdlib_char/prepare.py',
    *re.search(r'^train:.*\n((?:\t.*\n)+)', MAKEFILE, re.MULTILINE).group(1).splitlines(),
]
WRITTEN = {name for page in PAGES for name in re.findall(r'^# (\w+\.py)$', page.read_text(), re.M)}


def split(command):
    """Return (script, its arguments), both None for a command without a script of ours."""
    for i, word in enumerate(command):
        if re.fullmatch(r'[\w/]+\.(py|sh)', word) and not word.startswith('config/'):
            return word, command[i + 1 :]
    return None, None


@pytest.fixture
def options(script):
    """Return a function that gives the options in a script's --help."""
    return lambda name: {'--help', *re.findall(r'--\w+', script(name, '--help').out)}


@pytest.mark.parametrize('command', ALL)
def test_what_a_command_names_exists(command, options):
    program, (name, arguments) = command[0], split(command)
    if program == 'make':
        assert re.search(f'^{command[1]}:', MAKEFILE, re.MULTILINE)
    elif program in PYTHON and command[1] == '-m':
        assert importlib.util.find_spec(command[2])
    elif program in PYTHON and command[1] == '-c':
        compile(command[2], 'command', 'exec')
    else:
        assert program in (*PYTHON, 'torchrun', 'bash', 'sbatch')
        assert (ROOT / name).is_file() or name in WRITTEN
        if program == 'torchrun':
            torch.distributed.run.parse_args(command[1:])  # raises SystemExit
        if name in WRITTEN:
            name, arguments = 'train.py', []
        known = options('train.py' if name.endswith('.sh') else name)
        if name == 'compare.py':  # quoted configs have settings of their own
            arguments = [word for argument in arguments for word in argument.split()]
            known |= options('train.py')
        for word in arguments:
            if word.startswith('--'):
                assert word.partition('=')[0] in known
            elif word.startswith('config/'):
                assert (ROOT / word).is_file()


def processes(command):
    """Return how many processes a command starts for train.py, 0 if it starts none."""
    words = shlex.join(command)
    if command[0] == 'sbatch':
        words = (ROOT / split(command)[0]).read_text()
    elif command[0] != 'torchrun' or split(command)[0] != 'train.py':
        return 0
    return math.prod(map(int, re.findall(r'--(?:nnodes|nproc_per_node)=(\d+)', words)))


@pytest.mark.parametrize('command', [c for c in ALL if processes(c.values[0])])
def test_the_processes_of_a_command_divide_its_micro_steps(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = split(command)[1]
    settings, _ = configure(train_settings()[0], arguments)
    assert settings['gradient_accumulation_steps'] % processes(command) == 0
    if 'gpt2' in shlex.join(command):
        tokens = 'gradient_accumulation_steps', 'batch_size', 'block_size'
        assert math.prod(settings[name] for name in tokens) == 491_520


def runs(command):
    if any(part in shlex.join(command) for part in CHECKED_ONLY):
        return False
    name, arguments = split(command)
    if name == HUB:
        return '--data_files' in arguments
    return command[0] in PYTHON and name not in WRITTEN and (name or command[1] == '-c')


counter = itertools.count(2)  # each training runs for one iteration more, so that resuming trains


def shortened(name, arguments, bpe_file):
    """Return the arguments with those appended that spare time and downloads."""
    small = [setting for setting in TINY if not setting.startswith('--max_iters')]
    added = {
        'train.py': [*small, f'--max_iters={next(counter)}', '--lr_decay_iters=9'],
        'sample.py': ['--num_samples=1', '--max_new_tokens=4'],
        'data/shakespeare/prepare.py': ['--input=notes.txt', f'--bpe_file={bpe_file}'],
        'data/shakespeare_char/prepare.py': ['--input=notes.txt'],
        'data/shakespeare_scarce/prepare.py': ['--input=notes.txt'],
        'data/text/prepare.py': [f'--bpe_file={bpe_file}'],
    }
    return [*arguments, *added.get(name, [])]


@pytest.fixture(scope='module')
def checkout(tmp_path_factory, bpe_file):
    """Return a copy of the checkout with the input files that the commands name."""
    path = tmp_path_factory.mktemp('docs') / 'nanonorm'
    ignored = shutil.ignore_patterns('.*', 'results', 'tests', 'out*', '*.bin', 'meta.*', '*.txt')
    shutil.copytree(ROOT, path, ignore=ignored)
    text = '\n'.join(f'{a} times {b} is {a * b}.' for a in range(60) for b in range(60))
    for folder in ('books', 'corpus'):
        (path / folder).mkdir()
    for name in ('notes.txt', 'books/one.txt', 'books/two.txt'):
        (path / name).write_text(string.printable.strip() + text)
    documents = pyarrow.table({'text': [text[i::500] for i in range(500)] * 8})
    for name in ('english.parquet', 'corpus/one.parquet'):
        parquet.write_table(documents, path / name)
    shutil.copyfile(bpe_file, path / 'gpt2.tiktoken')
    return path


@pytest.fixture
def run(checkout, script, bpe_file, monkeypatch, capsys):
    """Return run(command), which runs it in the copy and fails if it fails."""
    monkeypatch.chdir(checkout)
    monkeypatch.syspath_prepend(str(ROOT))  # and put sys.path back in the end

    def run(command):
        if command[1] == '-c':
            exec(command[2], {})
            return
        name, arguments = split(command)
        outcome = script(checkout / name, *shortened(name, arguments, bpe_file))
        assert outcome.status == 0, f'{shlex.join(command)}\n{outcome.err}'

    return run


def test_commands_run(run):
    """In one test, because later commands use what earlier ones wrote."""
    make_train = commands('\n'.join(MAKE_TRAIN))
    for command in [*make_train, *itertools.chain(*COMMANDS.values())]:
        if runs(command):
            run(command)


def slugs(page):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r'^#+ (.*)$', page.read_text(), re.MULTILINE)
    return [re.sub(r'[^\w -]', '', h.lower()).replace(' ', '-') for h in headings]


@pytest.mark.parametrize('page', LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_names_of_files_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        if not link.startswith('https://'):
            path, _, anchor = link.partition('#')
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in slugs(target), link
    for name in re.findall(r'`((?:\w+/)+\w+\.(?:py|sh|md))`', page.read_text()):
        assert (ROOT / name).is_file() or (page.parent / name).is_file(), name


def test_every_setting_in_the_table_exists(options):
    table = (ROOT / 'docs' / 'training.md').read_text().partition('## Settings')[2]
    names = re.findall(r'`(\w+)(?:=\w+)?`(?=[^|\n]*\|[^|\n]*\|$)', table, re.MULTILINE)
    assert len(names) > 20
    assert {f'--{name}' for name in names} <= options('train.py')


def test_readme_is_short():
    text = (ROOT / 'README.md').read_text()
    assert text.count('\n') <= 160 and len(text.encode()) <= 12_000
