"""Configuration without a framework: a script's constants, then Python config files, then --key=value, all checked.

    lr = 1e-6                    # learning rate
    model: str | None = None     # the annotation allows None
    config = configure(globals())

Only names declared above the call to configure are options. A user's mistake is a UserError: one sentence, exit code 2."""

import ast
import contextlib
import itertools
import os
import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

from runtime import values

COMMAND_LINE = 'command line'  # origin of options set by a flag
WORDS = {'none': None, 'null': None, 'true': True, 'false': False}  # spellings of these values in flags, lower case


class UserError(ValueError):
    """A user's mistake: what is wrong, where, and what to do. Printed without a traceback; exit code 2."""


def main_rank():
    """Return whether this process is the one that prints to the user: rank 0, the only process, or one whose rank is no number."""
    rank = os.environ.get('RANK', '0')
    return rank == '0' or not rank.isdecimal()


class Config(dict):
    """Option -> value, also as attributes. origin: option -> 'default', 'command line' or the config file that set it last."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def given(self, options):
        """Return the names in options, a space-separated string, that were set on the command line."""
        return [name for name in options.split() if self.origin[name] == COMMAND_LINE]

    def report_unused(self, options, why):
        """Report options without effect: raise UserError if set on the command line, print a note if set in a config file."""
        for name in options:
            origin = self.origin[name]
            if origin == COMMAND_LINE:
                raise UserError(f'--{name} has no effect: {why}')
            if origin != 'default' and main_rank():
                print(f'note: {name} of {origin} has no effect: {why}')


class Option(NamedTuple):
    default: object
    types: list  # names of the allowed types
    comment: str
    heading: str  # of its group in --help
    scope: dict  # globals of the module that declares it


def configure(scope, argv=None, shared=None, early=False, listed=None):
    """Override a script's constants, its globals() in scope, by config files and flags. Returns a Config; exits after --help.

    shared: a module with more options. early: print no notes, as a second call will. listed: what --help lists, if not all. UserError."""
    from runtime import errors  # late: it imports this file

    sys.excepthook = errors.report
    argv = sys.argv[1:] if argv is None else argv
    own_options = _declared(scope)
    shared_options = _declared(vars(shared)) if shared else {}
    # the script's own come first in --help, and last here: they replace shared ones of the same name
    options = own_options | shared_options | own_options
    if '--help' in argv or '-h' in argv:
        shown = {name: options[name] for name in options if name in (listed or options)}
        _print_help(scope.get('__doc__') or '', shown)
        sys.exit(0)
    # precedence: defaults, config files in order, flags (also those before a file)
    config = Config({name: option.default for name, option in options.items()})
    config.origin = dict.fromkeys(options, 'default')
    flags = [_read_flag(word, options) for word in argv if word.startswith('-')]
    files = [_read_file(word, options) for word in argv if not word.startswith('-')]
    for name, value, origin, where in [*itertools.chain(*files), *flags]:
        if origin == COMMAND_LINE and config.origin.get(name) == COMMAND_LINE:
            raise UserError(f'--{name} is given twice')
        config[name] = _check(name, value, options, where)
        config.origin[name] = origin
    # fill in options that depend on others, then reject conflicts
    notes = values.settle(config)
    if main_rank() and not early:
        for note in notes:
            print(f'note: {note}', flush=True)
    if problem := values.wrong_environment() or values.conflict(config):
        raise UserError(problem)
    for name, option in options.items():
        option.scope[name] = config[name]  # the constant itself
    return config


def _declared(scope):
    """Return name -> Option: the lines `name: types = value  # comment` at the top of a module, above its first function or `x = call()`.

    scope: the module's globals. `a: int | None = 3  # size` -> {'a': Option(3, ['int', 'None'], 'size', heading, scope)}"""
    source = Path(scope['__file__']).read_text('utf-8')
    lines = ['', *source.splitlines()]  # node.lineno counts from 1
    options, heading = {}, ''
    for node in ast.parse(source).body:
        # skip the docstring, imports and bare calls; stop at the first function, class, or assignment of a call's result
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr):
            continue
        if not isinstance(node, ast.AnnAssign | ast.Assign) or isinstance(node.value, ast.Call):
            break
        # name: types = value  # comment. Names in capitals are no options
        match = re.fullmatch(r'([a-z]\w*)(?:: (.+?))? = (.+?)(?:  # (.*))?', lines[node.lineno])
        if not match:
            continue
        name, annotation, value, comment = match.groups()
        default = ast.literal_eval(value)
        allowed = annotation or type(default).__name__
        # a comment line above an option is the heading of all options from here on
        line_above = lines[node.lineno - 1]
        if line_above.startswith('# '):
            heading = line_above.strip('# -')
        options[name] = Option(default, allowed.split(' | '), comment or '', heading, scope)
    return options


def _print_help(doc, options):
    """Print a script's docstring, then its options (name -> Option) with default, types and comment, grouped by heading."""
    lines = [doc.strip(), '', 'options, as --name=value, or in a config file where the script takes one:']
    # no sort: options of a heading are neighbours in the source
    for heading, group in itertools.groupby(options.items(), key=lambda item: item[1].heading):
        lines += ['', heading]
        for name, option in group:
            lines.append(f'  --{name} = {option.default!r} ({" | ".join(option.types)})  {option.comment}')
    try:
        print('\n'.join(lines), flush=True)
    except BrokenPipeError:
        # --help | head: discard what Python flushes at exit, which would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _source_of(path, options):
    """Return the text of a config file. Raises UserError if path is none, or if it cannot be read."""
    if not path.endswith('.py') or (os.path.exists(path) and not os.path.isfile(path)):
        example = f', such as --data={path}' if 'data' in options and os.path.exists(path) else ''
        raise UserError(f'{path!r} is neither a config file (.py) nor an option: one word, --name=value{example}')
    try:
        return Path(path).read_text('utf-8-sig')  # some editors of Windows begin a file with a byte-order mark
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', 'no text in UTF-8')
        # a name alone may be one of the folder config
        folder = None if os.path.dirname(path) else 'config'
        raise UserError(f'cannot read the config file {path}{values.looked_in(path, folder)}: {reason}') from None


def _read_file(path, options):
    """Run a config file. Returns [(name, value, path, where, for errors)] of what it sets: ('lr', 1e-6, 'my.py', 'my.py, line 3')."""
    source = _source_of(path, options)
    # run it statement by statement, to know the line of each assignment or error
    namespace = {'__file__': path}  # variables of the file
    settings = {}  # name -> what is returned for it
    line = 1
    try:
        for statement in ast.parse(source, path).body:
            line = statement.lineno
            if isinstance(statement, ast.AnnAssign) and statement.value is None:  # such as lr: 1e-6
                raise ValueError(f'{ast.unparse(statement)!r} sets nothing: write = for :')
            before = dict(namespace)
            exec(compile(ast.Module([statement], []), path, 'exec'), namespace)
            for name, value in namespace.items():
                is_private = name.startswith('_') or isinstance(value, types.ModuleType)
                is_unchanged = name in before and value is before[name]
                if not is_private and not is_unchanged:
                    settings[name] = (name, value, path, f'{path}, line {line}')
    # BaseException: a config file may raise anything, even SystemExit
    except BaseException as error:
        if isinstance(error, SyntaxError) and error.filename == path:
            line = error.lineno
        message = ' '.join(str(getattr(error, 'msg', error)).split())
        raise UserError(f'{path}, line {line}: {type(error).__name__}: {message}') from None
    return [setting for name, setting in settings.items() if name in namespace]  # del takes a name back


def _read_flag(word, options):
    """Return (name, value, origin, where, for errors) of a flag: ('lr', 1e-6, COMMAND_LINE, 'the command line')."""
    name, equals, text = word.removeprefix('--').partition('=')
    if not word.startswith('--') or not name:
        raise UserError(f'cannot read {word!r}: options are written --name=value')
    # an unknown name passes here, with or without a value: _check rejects it
    allowed = options[name].types if name in options else ['bool']
    if not equals and 'bool' not in allowed:
        raise UserError(f'--{name} needs a value: --{name}=value')
    text = text if equals else 'true'  # --chat is --chat=true
    # each of these replaces the one before, if the option allows it: the text, a float, an int, a word for None, True or False
    value = text
    for kind in (float, int):
        if kind.__name__ in allowed:
            with contextlib.suppress(ValueError):
                value = kind(text)
    lower = text.lower()
    if lower in WORDS and _kind(WORDS[lower]) in allowed:
        value = WORDS[lower]
    return name, value, COMMAND_LINE, f'the {COMMAND_LINE}'


def _kind(value):
    """Return the name of a value's type as annotations write it: 'None' for None."""
    return 'None' if value is None else type(value).__name__


def _check(name, value, options, where):
    """Return an option's value, converted from int to float if necessary. Raises UserError if name or value is invalid."""
    if name not in options:
        raise UserError(f'{where}: unknown option {name!r}; {values.hint(name, options)}')
    allowed = options[name].types
    # a larger int may not fit into a float: it stays an int, and is rejected below
    wants_float = 'float' in allowed and 'int' not in allowed
    if type(value) is int and wants_float and abs(value) < 2**63:
        value = float(value)
    # NaN is not equal to itself
    if _kind(value) not in allowed or value != value:
        kinds = ' or '.join(allowed).replace('bool', 'true or false')
        raise UserError(f'{where}: {name} must be {kinds}, not {value!r}')
    # range, choices, and no secrets such as API keys
    if problem := values.problem(name, value):
        raise UserError(f'{where}: {name} {problem}')
    return value
