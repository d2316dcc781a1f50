"""Who imports whom, read from the sources: no circle, no script, optimizers that stand alone."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

SCRIPTS = {'train', 'sample', 'compare', 'plot', 'bench', 'export'}
FOLDERS = '', 'kernels/', 'runtime/', 'data/', 'data/*/'


def modules(root):
    """{name: path} of the project's modules; 'kernels' stands for its __init__.py."""
    paths = [path for folder in FOLDERS for path in root.glob(f'{folder}*.py')]
    names = ('.'.join(path.relative_to(root).with_suffix('').parts) for path in paths)
    return {n.removesuffix('.__init__'): p for n, p in zip(names, paths, strict=True)}


def imports(name, path):
    """The names that a module imports, those within its functions too. 'a.b' for `from a import b`.

    The package nanonorm has the project's folder as its own, so nanonorm.cpr is cpr.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = name.split('.')[: -node.level] if node.level else []
            source = '.'.join([*above, *filter(None, [node.module])])
            found = [f'{source}.{alias.name}'.lstrip('.') for alias in node.names]
        else:
            continue
        yield from (each.removeprefix('nanonorm.') for each in found)


def graph(root):
    """{module: modules of the project that it imports}"""
    known, edges = modules(root), {}
    for name, path in known.items():
        every = {*imports(name, path)} - {name}
        edges[name] = {n for each in every for n in (each, each.rpartition('.')[0]) if n in known}
    return edges


def test_no_module_imports_one_that_imports_it():
    TopologicalSorter(graph(ROOT)).prepare()


def test_a_circle_would_be_found(tmp_path):
    (tmp_path / 'runtime').mkdir()
    (tmp_path / 'model.py').write_text('def f():\n    from runtime import log\n')
    (tmp_path / 'runtime' / 'log.py').write_text('import model\n')
    with pytest.raises(CycleError):
        TopologicalSorter(graph(tmp_path)).prepare()


def test_nothing_imports_a_script():
    edges = graph(ROOT)
    assert SCRIPTS <= edges.keys()
    found = {(name, script) for name, others in edges.items() for script in others & SCRIPTS}
    assert not found


def test_the_optimizers_import_nothing_of_the_project_but_their_kernels():
    theirs = {name for name in modules(ROOT) if name.partition('.')[0] in ('cpr', 'kernels')}
    assert len(theirs) > 5
    others = {'cpr', 'kernels', 'torch', 'numpy', 'numba', 'triton', *sys.stdlib_module_names}
    for name in theirs:
        roots = {each.partition('.')[0] for each in imports(name, modules(ROOT)[name])}
        assert roots <= others, name


def test_no_function_has_the_name_of_what_its_module_imports():
    for name, path in modules(ROOT).items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        imported = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        aliases = {alias.asname or alias.name for node in imported for alias in node.names}
        assert not functions & aliases, name
