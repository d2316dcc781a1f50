"""A script's settings are its plain globals; config files and --key=value on the command line override them.

    python train.py config/train_char_cpr.py --batch_size=32 --compile=False

Arguments count in the order given, the later one wins. A config file is Python: assignments to settings, which may use
the ones that stand before them. A value must have the type of the setting's default; an int is taken for a float.
"""

import ast
import difflib
import io
import math
import os
import sys
import tokenize
import types

from runtime import fail


def configure(namespace, argv=None):
    """Override the settings in `namespace` (a script's globals()) from `argv` (sys.argv[1:]) in place.

    The settings are the names without a leading underscore whose values are bool, int, float or str. Prints them and
    leaves with status 0 on --help; fails on an unknown setting, a value of another type, a config file that is not
    there or does not run. Returns (settings, given): all settings by name, and the names that argv or a file set.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = {
        k: v
        for k, v in namespace.items()
        if not k.startswith('_') and type(v) in (bool, int, float, str)
    }
    if '--help' in argv or '-h' in argv:
        print(_help(namespace['__file__'], settings))
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
    """A value from the command line: what it means depends on the setting's type."""


def _run(path, settings):
    """The names that the config file at `path` assigns; it sees the settings as they are so far."""
    if not os.path.isfile(path):
        known = (
            [os.path.join('config', f) for f in os.listdir('config')]
            if os.path.isdir('config')
            else []
        )
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
        hint = f'; did you mean {close[0]}?' if close else '; settings are written --key=value'
        fail(f"there is no config file '{path}'{hint}")
    assigned = {}  # a module's assignments go to its locals: here they are exactly what the file sets
    with open(path, encoding='utf-8') as f:
        try:
            exec(compile(f.read(), path, 'exec'), dict(settings), assigned)
        except (Exception, SystemExit) as e:  # whatever the user's file raises
            fail(f'config file {path} does not run: {type(e).__name__}: {e}')
    return {
        key: value
        for key, value in assigned.items()
        if not key.startswith('_')
        and not isinstance(value, types.ModuleType)
        and not callable(value)
    }


def _checked(key, value, settings, source):
    """`value` as a value of setting `key`, or a failure that says what it should have been."""
    if key not in settings:
        close = difflib.get_close_matches(key, settings, n=1)
        fail(
            f"unknown setting '{key}' in {source}"
            + (f"; did you mean '{close[0]}'?" if close else '; --help lists all settings')
        )
    wanted = type(settings[key])
    if isinstance(value, _Text):
        text, value = value, str(value)
        if wanted is not str:
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                pass  # not a literal: a string, which the check below refuses
    if wanted is float and type(value) is int:
        value = float(str(value))  # one too large becomes infinite, which check() refuses
    if type(value) is not wanted:
        kind = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a string'}[
            wanted
        ]
        fail(
            f'{key}={value!r} in {source}: {key} must be {kind}, like its default {settings[key]!r}'
        )
    return value


def check(settings, limits):
    """Fail on the first setting that breaks its limit, or is not a finite number.

    limits: {'>= 1' | '>= 0' | 'in [0, 1)' | 'in [0, 1]' | 'one of A B ...': names of settings, separated by blanks}
    """
    holds = {
        '>= 1': lambda x: x >= 1,
        '>= 0': lambda x: x >= 0,
        'in [0, 1)': lambda x: 0 <= x < 1,
        'in [0, 1]': lambda x: 0 <= x <= 1,
    }
    for key, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            fail(f'{key}={value} must be a finite number')
    for limit, keys in limits.items():
        choices = limit.removeprefix('one of ').split() if limit.startswith('one of ') else None
        for key in keys.split():
            value = settings[key]
            if not (value in choices if choices else holds[limit](value)):
                fail(f'{key}={value!r} must be {limit}')


def _help(script, settings):
    """Every setting with its default and the comment beside it, under the headings that stand in the source."""
    with open(script, encoding='utf-8') as f:
        source = f.read()
    comments = {
        t.start[0]: (t.start[1], t.string.lstrip('# ').strip())
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    lines = [
        f'usage: python {os.path.basename(script)} [CONFIG_FILE | --key=value] ...   the later one wins',
        '',
    ]
    shown = set()
    for node in ast.parse(source).body:
        names = [
            t.id
            for t in getattr(node, 'targets', [])
            if isinstance(t, ast.Name) and t.id in settings
        ]
        if not names or names[0] in shown:
            continue
        shown.update(names)
        if (
            comments.get(node.lineno - 1, (1, ''))[0] == 0
        ):  # a line of its own above a setting heads the next ones
            lines += ['', comments[node.lineno - 1][1]]
        note = comments.get(node.end_lineno, (0, ''))[1]
        lines += [f'  --{name}={settings[name]!r}'.ljust(44) + note for name in names]
    return '\n'.join(line.rstrip() for line in lines)
