"""The package nanonorm: what is installed, and that docs/optimizers.md runs where it is installed.

The scripts of that page run in a folder of a user whose own modules are called as ours, beside
Hugging Face's package `kernels`.
"""

import ast
import importlib
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

import nanonorm

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / 'docs' / 'optimizers.md').read_text()
SCRIPTS = dict(re.findall(r'```python\n# (\w+\.py)\n(.*?)```', PAGE, re.DOTALL))
NEEDS = {
    'with_accelerate.py': ['accelerate'],
    'with_lightning.py': ['lightning'],
    'with_pytorch_cpr.py': ['pytorch_cpr'],
    'with_trainer.py': ['transformers', 'accelerate'],
}

# one process for all: importing torch takes longer than any of them
RUN = """
import contextlib, io, json, runpy, sys, traceback
with contextlib.suppress(ImportError):
    import kernels
printed = {}
for name in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(name, run_name='__main__')
        except BaseException:
            traceback.print_exc(file=out)
    printed[name] = out.getvalue()
modules = {n: sys.modules[n].__file__ for n in ('nanonorm', 'kernels') if n in sys.modules}
print(json.dumps({'printed': printed, 'modules': modules}))
"""


def run(*command, **options):
    """Return what a command prints, where it must succeed within its time."""
    options = {'capture_output': True, 'text': True, 'timeout': 300, **options}
    outcome = subprocess.run([sys.executable, *map(str, command)], **options)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


def has_kernels_of_hugging_face():
    return any(d.name == 'kernels' for d in metadata.distributions())


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """Return a folder into which pip has installed the checkout."""
    for package in ('pip', 'hatchling'):
        pytest.importorskip(package, reason=f'building the package needs {package}')
    folder = tmp_path_factory.mktemp('site-packages')
    offline = ('--no-build-isolation', '--no-deps', '--no-index', '--no-compile')
    run('-m', 'pip', 'install', '-q', *offline, '--target', folder, ROOT)
    return folder


@pytest.fixture(scope='module')
def user(tmp_path_factory, installed):
    """Return a function that makes a user's folder: the scripts, and modules called as ours."""

    def make(*modules):
        folder = tmp_path_factory.mktemp('user')
        for name, code in SCRIPTS.items():
            (folder / name).write_text(code)
        for name in modules:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("raise RuntimeError('the user has a module of this name')\n")
        environment = {**os.environ, 'PYTHONPATH': str(installed), 'OMP_NUM_THREADS': '1'}
        environment.pop('TRITON_INTERPRET', None)
        return {'cwd': folder, 'env': environment}

    return make


@pytest.fixture(scope='module')
def outcome(user):
    """Return what the scripts print, those whose packages are here, and where modules came from."""
    here = [name for name in SCRIPTS if all(map(util.find_spec, NEEDS.get(name, [])))]
    where = user('model.py', 'cpr.py', 'shards.py', 'tensors.py')
    return json.loads(run('-c', RUN, *here, **where).splitlines()[-1])


def test_only_the_optimizers_are_installed_under_one_name(installed):
    found = {str(p.relative_to(installed)) for p in installed.rglob('*') if p.is_file()}
    kernels = {f'nanonorm/{p.relative_to(ROOT)}' for p in (ROOT / 'kernels').glob('*.py')}
    (info,) = installed.glob('*.dist-info')
    assert {f for f in found if not f.startswith(info.name)} == {
        'nanonorm/__init__.py',
        'nanonorm/cpr.py',
        *kernels,
    }
    about = metadata.PathDistribution(info)
    assert about.version == nanonorm.__version__
    assert [r for r in about.requires if 'extra' not in r] == ['torch>=2.11']


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_scripts_of_the_page_run_beside_modules_called_as_ours(name, outcome, installed):
    if name not in outcome['printed']:
        pytest.skip(f'needs {" and ".join(NEEDS[name])}')
    assert outcome['modules']['nanonorm'] == str(installed / 'nanonorm' / '__init__.py')
    printed = outcome['printed'][name]
    assert 'Traceback' not in printed
    assert re.search(r'(bound\w*|norm|by)\D+[1-9]', printed.splitlines()[-1]), printed
    assert SCRIPTS[name].count('\n') < 40


def test_trainer_trains_beside_the_kernels_of_hugging_face(outcome):
    if not has_kernels_of_hugging_face():
        pytest.skip('Hugging Face kernels is not installed')
    if 'with_trainer.py' not in outcome['printed']:
        pytest.skip('needs transformers and accelerate')
    assert outcome['modules']['kernels'].endswith('site-packages/kernels/__init__.py')
    assert '10 matrices bounded' in outcome['printed']['with_trainer.py']


def test_two_processes_of_fsdp2_print_what_one_does(user, outcome):
    where = user('kernels/__init__.py', 'dtensor.py')
    launch = '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'
    assert run(*launch, 'with_fsdp.py', **where) == outcome['printed']['with_fsdp.py']


@pytest.mark.parametrize('first', ['cpr', 'nanonorm', 'nanonorm.cpr'])
def test_in_the_checkout_both_names_give_the_same_classes(first, monkeypatch):
    for name in [n for n in sys.modules if n.partition('.')[0] in ('cpr', 'nanonorm')]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module(first)
    names = {name: importlib.import_module(name) for name in ('cpr', 'nanonorm.cpr', 'nanonorm')}
    assert names['cpr'] is names['nanonorm.cpr']
    for name in nanonorm.__all__:
        cls = getattr(names['nanonorm'], name)
        assert cls is getattr(names['cpr'], name) is pickle.loads(pickle.dumps(cls))


def test_in_the_checkout_transformers_finds_the_kernels_of_hugging_face():
    """A folder `kernels` with __init__.py would be found first."""
    if not has_kernels_of_hugging_face():
        pytest.skip('Hugging Face kernels is not installed')
    transformers = pytest.importorskip('transformers')
    assert transformers.GPT2LMHeadModel and hasattr(
        importlib.import_module('kernels'), 'get_kernel'
    )


@pytest.mark.parametrize('name', nanonorm.__all__)
def test_the_page_has_every_argument_and_its_default(name):
    told, true = {}, {}
    for table in PAGE.split('\n\n'):
        if table.startswith(('| all', f'| `{name}`')):
            for row in table.splitlines()[2:]:
                names, defaults = (cell.replace('`', '') for cell in row.split('|')[1:3])
                if not names.strip().startswith('or '):
                    values = ast.literal_eval(f'({defaults},)')
                    told.update(zip(names.replace(' ', '').split(','), values, strict=True))
    for cls in getattr(nanonorm, name).__mro__[1::-1]:  # a class has the last word
        parameters = inspect.signature(cls.__init__).parameters
        true |= {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    if true['order'] is None:  # AdamW and AdamH have only one
        del true['order']
    assert told == true
