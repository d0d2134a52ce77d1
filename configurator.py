"""Configuration without a framework: a script's constants, then python config files, then --key=value, all checked.

    lr = 1e-6                    # learning rate
    model: str | None = None     # None is allowed because the annotation says so
    config = configure(globals())

Only names that the script declares above that call may be set. A user's mistake is a UserError: one sentence, exit code 2.
"""

import ast
import contextlib
import difflib
import glob
import os
import re
import sys
import traceback
import types
from typing import NamedTuple

from runtime.values import ELSEWHERE, GONE, conflict, looked_in, misplaced, problem, settle

_run_early = {}  # config file -> what it assigns, from the check before the imports


class UserError(ValueError):
    """A mistake of the user: what is wrong, where, what to do. Printed without a traceback, exit code 2."""


def _excepthook(kind, error, trace):
    """End with a sentence and code 2 after a user's mistake, or where memory is out; with a traceback after anything else."""
    from runtime import guard

    error = guard.explained(error, 'lower max_tokens or batch_size, or use a smaller model or a larger machine')
    guard.tell_torchrun(error)
    if not isinstance(error, UserError):
        return sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    # mostly every rank raises the same error, and one says it
    if main_rank() or getattr(error, 'of_this_rank', False):
        sys.__stderr__.write(f'error: {error}\n')
        sys.__stderr__.flush()
    # not sys.exit: threads of the process group can abort an ordinary exit, with another code
    os._exit(2)


def main_rank():
    """Whether this process is the one that talks to the user."""
    return os.environ.get('RANK', '0') == '0'


class Config(dict):
    """Option -> value, also as an attribute. origin: option -> 'default', 'command line', or the config file that set it last."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def given(self, options):
        """Those of these options (a text of names) that stand on the command line."""
        return [name for name in options.split() if self.origin[name] == 'command line']

    def ignored(self, options, why):
        """Options that have no effect in this run: an error on the command line, a printed note in a config file."""
        for name in options:
            origin = self.origin[name]
            if origin == 'command line':
                raise UserError(f'--{name} has no effect: {why}')
            if origin != 'default' and main_rank():
                print(f'note: {name} of {origin} has no effect: {why}')


class Option(NamedTuple):
    """One declared constant. types: names of the types it may have; heading: the comment above its group."""

    default: object
    types: list
    comment: str
    heading: str
    scope: dict  # the globals of the module that declares it


def configure(scope, argv=None, shared=None, early=False):
    """Override the constants of a script from config files and flags. Returns the resolved Config.

    scope: the script's globals(), updated in place. argv: sys.argv[1:] by default. shared: a module with further options, which
    is updated in place too; where both declare an option, the script's default holds. early: print no notes, for it is done
    again. Raises UserError."""
    sys.excepthook = _excepthook
    argv = sys.argv[1:] if argv is None else argv
    # what may be set at all: the script's own come first, and win
    options = _declared(scope)
    if shared:
        options = options | _declared(vars(shared)) | options
    if '--help' in argv or '-h' in argv:
        _print_help(scope.get('__doc__') or '', options)
        sys.exit(0)

    # the defaults, to be overridden
    config = Config({name: option.default for name, option in options.items()})
    config.origin = dict.fromkeys(options, 'default')
    # config files first, in their order
    for before, path in zip(['', *argv], argv, strict=False):
        if path.startswith('-'):
            continue
        if not path.endswith('.py'):
            raise UserError(misplaced(path, before))
        # a config file is run once, though the command line is checked twice
        found = _run_early.pop(path, None) or list(_read_file(path))
        if early:
            _run_early[path] = found
        for name, value, where in found:
            if _is_gone(name, value, options, where):
                continue
            config[name] = _check(name, value, options, where)
            config.origin[name] = path

    # then flags, wherever they stand; a value may contain =
    for flag in [word for word in argv if word.startswith('-')]:
        name, equals, text = flag.removeprefix('--').partition('=')
        if not flag.startswith('--') or not name:
            raise UserError(f'cannot read {flag!r}: options are written --name=value')
        if config.origin.get(name) == 'command line':
            raise UserError(f'--{name} is given twice')
        types = options[name].types if name in options else ['bool']
        if not equals and 'bool' not in types:
            raise UserError(f'--{name} needs a value: --{name}=value')
        value = _parse(text if equals else 'true', types)
        if _is_gone(name, value, options, 'the command line'):
            continue
        config[name] = _check(name, value, options, 'the command line')
        config.origin[name] = 'command line'

    # options that follow from others; then bare names in the script, and in the shared module
    notes = settle(config)
    for note in notes if main_rank() and not early else ():
        print(f'note: {note}', flush=True)
    if wrong := conflict(config):
        raise UserError(wrong)
    for name, option in options.items():
        option.scope[name] = config[name]
    return config


def _declared(scope):
    """The options of a module with these globals: name -> Option, in the order of its constants, which stand above its first
    call (config = configure(globals())), function or class."""
    with open(scope['__file__'], encoding='utf-8') as file:
        source = file.read()
    lines = source.splitlines()
    options, heading = {}, ''
    for node in ast.parse(source).body:
        # constants may stand between imports and calls without a value; anything else ends them
        is_constant = isinstance(node, ast.AnnAssign | ast.Assign) and not isinstance(node.value, ast.Call)
        if not is_constant and not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr):
            break
        if not is_constant:
            continue

        # names in capitals, and several names at once, are the script's own
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if not isinstance(target, ast.Name) or target.id.isupper():
            continue

        # its type is that of its default, or what the annotation allows
        name, default = target.id, ast.literal_eval(node.value)
        types = [type(default).__name__]
        if isinstance(node, ast.AnnAssign):
            types = ast.unparse(node.annotation).split(' | ')
        # a comment line above a constant heads the group that it opens
        above = lines[node.lineno - 2]
        if above.startswith('# '):
            heading = above.strip('# -')
        comment = lines[node.end_lineno - 1].partition('  # ')[2]
        options[name] = Option(default, types, comment, heading, scope)
    return options


def _print_help(doc, options):
    """Print every option with its default, types and comment, under the headings of the source."""
    lines = [doc.strip(), '', 'options, to be set in a config file or as --name=value:']
    heading = None
    for name, option in options.items():
        # a blank line and the heading before the first option of a group
        if option.heading != heading:
            heading = option.heading
            lines += ['', heading]
        types = ' | '.join(option.types)
        lines.append(f'  --{name} = {option.default!r} ({types})  {option.comment}')
    try:
        print('\n'.join(lines), flush=True)
    except BrokenPipeError:  # --help | head: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _read_file(path):
    """(name, value, 'file, line n') for every public name that a config file assigns."""
    try:
        with open(path, encoding='utf-8') as file:
            source = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', 'not a text file')
        # one of the project's own, from another folder; or one of nearly this name
        near = os.path.join(os.path.dirname(os.path.realpath(__file__)), path)
        if not os.path.exists(near):
            beside = glob.glob(os.path.join(os.path.dirname(path), '*.py'))
            near = (difflib.get_close_matches(path, beside, 1) or [''])[0]
        hint = f'; there is {near}' if near and not os.path.exists(path) else ''
        raise UserError(f'cannot read the config file {path}{looked_in(path)}: {reason}{hint}') from None

    # a config file is python: its public names are the options; whatever it can raise is the user's to mend
    names = {}
    try:
        exec(compile(source, path, 'exec'), names)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # the last line of this file that led to it; a syntax error has no frame there, but knows its line
        frames = traceback.extract_tb(error.__traceback__)
        led_to_it = [1] + [frame.lineno for frame in frames if frame.filename == path]
        knows_it = isinstance(error, SyntaxError) and error.filename == path
        line = error.lineno if knows_it else led_to_it[-1]
        words = str(getattr(error, 'msg', error)).split()
        message = ' '.join(words)
        raise UserError(f'{path}, line {line}: {type(error).__name__}: {message}') from None

    # the line where a name is assigned, defined or imported
    lines = {}
    for node in ast.walk(ast.parse(source)):
        fields = vars(node)
        name = fields.get('asname') or fields.get('id') or fields.get('name')
        # a name that is only read is not set here
        if name and not isinstance(fields.get('ctx'), ast.Load):
            lines[name] = node.lineno
    for name, value in names.items():
        if not name.startswith('_') and not isinstance(value, types.ModuleType):
            yield name, value, f'{path}, line {lines.get(name, 1)}'


def _parse(text, types):
    """The value that a flag's text means where these types are declared."""
    # None and switches by name
    if 'None' in types and text.lower() in ('none', 'null'):
        return None
    if 'bool' in types and text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    # numbers if they can be read as such, else text
    for kind in (int, float):
        if kind.__name__ in types:
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


def _is_gone(name, value, options, where):
    """Whether this is an option of older versions, with the value that changes nothing. Raises UserError for another value."""
    if name in options or name not in GONE:
        return False
    harmless, since, why = GONE[name]
    if value != harmless:
        raise UserError(f'{where}: {name} is gone since {since}: {why}; leave it out')
    return True


def _check(name, value, options, where):
    """The value, an int promoted to float where a float is declared. Raises UserError for an unknown name, a wrong type, or a
    value that makes no sense."""
    # a name that is not declared, with the nearest that is
    if name not in options:
        # or a name that other code has for one, such as learning_rate or loss.beta; either perhaps misspelt
        plain = name.rpartition('.')[2].replace('-', '_')
        theirs = {word: ours for word, ours in ELSEWHERE.items() if re.match(r'\w+', ours)[0] in options}
        near = plain if plain in options else ''.join(difflib.get_close_matches(plain, {*theirs, *options}, 1))
        hint = f'did you mean {near}?' if near else '--help lists the options'
        if plain in options or near in theirs:
            hint = f'here it is {theirs.get(near, plain)}'
        raise UserError(f'{where}: unknown option {name!r}; {hint}')

    # the type; NaN, which is not equal to itself, is no number either
    types = options[name].types
    if type(value) is int and 'int' not in types and 'float' in types and abs(value) < 10**300:
        value = float(value)
    kind = 'None' if value is None else type(value).__name__
    if kind not in types or value != value:
        raise UserError(f'{where}: {name} must be {" or ".join(types)}, not {value!r}')

    # the value: a range, a choice, no secret
    wrong = problem(name, value)
    if wrong:
        raise UserError(f'{where}: {name} {wrong}')
    return value
