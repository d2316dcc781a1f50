"""Override a script's settings, its plain globals, from config files and --key=value arguments.

    python train.py config/train_char_cpr.py --batch_size=32 --compile=False

The last argument that sets a key wins. A config file is Python: it assigns settings and may use
those assigned before. A value must have the type of the setting's default, but an int may stand
for a float.
"""

import ast
import builtins
import difflib
import io
import math
import os
import sys
import tokenize
import types

from runtime.errors import fail


def configure(namespace, argv=None):
    """Override the settings in `namespace` from `argv`, in place.

    namespace: a script's globals(). Its settings are the bool, int, float and str values whose
    names have no leading underscore. argv: by default sys.argv[1:].
    Returns (settings, given): {name: value} of all settings, and the set of names that were given.

    On --help it prints the settings and exits with status 0. Fails on an unknown setting, a value
    of the wrong type, and a config file that is missing or does not run.
    """
    argv = sys.argv[1:] if argv is None else argv
    public = {k: v for k, v in namespace.items() if not k.startswith('_')}
    settings = {k: v for k, v in public.items() if type(v) in (bool, int, float, str)}
    if '--help' in argv or '-h' in argv:
        print(_help(namespace['__file__'], settings), flush=True)
        raise SystemExit(0)
    given = set()
    for argument in argv:
        overrides = _parse(argument) if argument.startswith('--') else _run(argument, settings)
        for key, value in overrides.items():
            settings[key] = _checked(key, value, settings, argument)
            given.add(key)
    namespace.update(settings)
    return settings, given


def _parse(argument):
    key, equals, text = argument[2:].partition('=')
    if not equals:
        fail(f"'{argument}' has no value; write --{key}=VALUE (--help lists all settings)")
    return {key: _Text(text)}


class _Text(str):
    """A value from the command line, still to be parsed by the setting's type."""


def _run(path, settings):
    """Run the config file at `path`, which sees `settings`, and return {name: value} it assigns."""
    if not os.path.isfile(path):
        files = os.listdir('config') if os.path.isdir('config') else []
        known = [os.path.join('config', f) for f in files]
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
        hint = f'; did you mean {close[0]}?' if close else '; settings are written --key=value'
        fail(f"there is no config file '{path}'{hint}")
    # the settings stand where builtins do: what is then in `assigned` is the file's own
    assigned = {'__builtins__': {**vars(builtins), **settings}}
    with open(path, encoding='utf-8') as f:
        try:
            exec(compile(f.read(), path, 'exec'), assigned)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # whatever the user's file raises
            fail(f'config file {path} does not run: {type(e).__name__}: {e}')
    public = {k: v for k, v in assigned.items() if not k.startswith('_')}
    return {k: v for k, v in public.items() if not (callable(v) or isinstance(v, types.ModuleType))}


def _checked(key, value, settings, source):
    """Return `value` converted to the type of setting `key`. Fails if it does not fit."""
    if key not in settings:
        close = difflib.get_close_matches(key, settings, n=1)
        hint = f"did you mean '{close[0]}'?" if close else '--help lists all settings'
        fail(f"unknown setting '{key}' in {source}; {hint}")
    wanted = type(settings[key])
    if isinstance(value, _Text):
        text, value = value, str(value)
        if wanted is not str:
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                pass  # no literal: the value stays a string, which the check below refuses
    if wanted is float and type(value) is int:
        # an int too large becomes infinite, which check() refuses
        value = float(value) if abs(value) < 1 << 1000 else math.inf
    if type(value) is not wanted:
        kinds = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a string'}
        expected = f'{kinds[wanted]}, like its default {settings[key]!r}'
        fail(f'{key}={value!r} in {source}: {key} must be {expected}')
    return value


def check(settings, limits):
    """Fail on the first setting that breaks its limit, is not finite or too large for 64 bits.

    limits: {limit: names of settings, separated by blanks}. A limit is '>= 1', '>= 0',
    '> 0', 'in [0, 1)', 'in [0, 1]' or 'one of A B ...'.
    """
    holds = {
        '>= 1': lambda x: x >= 1,
        '>= 0': lambda x: x >= 0,
        '> 0': lambda x: x > 0,
        'in [0, 1)': lambda x: 0 <= x < 1,
        'in [0, 1]': lambda x: 0 <= x <= 1,
    }
    for key, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            fail(f'{key}={value} must be a finite number')
        if type(value) is int and not -(1 << 63) < value < 1 << 63:
            fail(f'{key} must be less than 2**63')
    for limit, keys in limits.items():
        choices = limit.removeprefix('one of ').split() if limit.startswith('one of ') else None
        for key in keys.split():
            value = settings[key]
            if not (value in choices if choices else holds[limit](value)):
                fail(f'{key}={value!r} must be {limit}')


def adopt(settings, given, theirs, source):
    """Set the settings that shape a model to those of the model in `source`, in place.

    theirs: {name: value}, with further names. Fails where another value was given.
    """
    for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias'):
        value = theirs.get(key, settings[key])
        if key in given and settings[key] != value:
            problem = f'{key}={settings[key]} but {source} has {key}={value}'
            fail(f'{problem}; leave {key} out or start from scratch')
        settings[key] = value


def _help(script, settings):
    """Return the help text: what the script does, then each setting, its default and comment.

    The settings stand under the source's headings.
    """
    with open(script, encoding='utf-8') as f:
        source = f.read()
    comments = {
        t.start[0]: (t.start[1], t.string.lstrip('# ').strip())
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    name = os.path.basename(script)
    tree = ast.parse(source)
    summary = (ast.get_docstring(tree) or name).split('\n')[0]
    usage = f'usage: python {name} [CONFIG_FILE | --key=value] ...   the later one wins'
    lines = [summary, '', usage, '']
    shown = set()
    for node in tree.body:
        assigned = [t.id for t in getattr(node, 'targets', []) if isinstance(t, ast.Name)]
        names = [name for name in assigned if name in settings]
        if not names or names[0] in shown:
            continue
        shown.update(names)
        column, heading = comments.get(node.lineno - 1, (1, ''))
        if column == 0:  # a comment line above a setting is a heading
            lines += ['', heading]
        note = comments.get(node.end_lineno, (0, ''))[1]
        lines += [f'  --{name}={settings[name]!r}'.ljust(44) + note for name in names]
    return '\n'.join(line.rstrip() for line in lines)
