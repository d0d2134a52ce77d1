"""Configuration without a framework: a script's constants, then python config files, then --key=value, all checked.

    lr = 1e-6                    # learning rate
    model: str | None = None     # None is allowed because the annotation says so
    config = configure(globals())

Only names that the script declares above that call may be set. A user's mistake is a UserError: one sentence, exit code 2.
"""

import ast
import contextlib
import difflib
import itertools
import os
import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

from runtime import values

COMMAND_LINE = 'command line'  # the origin of a flag
WORDS = {'none': None, 'null': None, 'true': True, 'false': False}  # as a flag writes them


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
        return [name for name in options.split() if self.origin[name] == COMMAND_LINE]

    def ignored(self, options, why):
        """Options that have no effect in this run: an error on the command line, a printed note in a config file."""
        for name in options:
            origin = self.origin[name]
            if origin == COMMAND_LINE:
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
    # what may be set at all: the script's own options come first, and win
    options = _declared(scope)
    if shared:
        options = options | _declared(vars(shared)) | options
    if '--help' in argv or '-h' in argv:
        _print_help(scope.get('__doc__') or '', options)
        sys.exit(0)

    # the defaults, then config files in their order, then flags, wherever they stand
    config = Config({name: option.default for name, option in options.items()})
    config.origin = dict.fromkeys(options, 'default')
    flags = [_read_flag(word, options) for word in argv if word.startswith('-')]
    files = [_read_file(word) for word in argv if not word.startswith('-')]
    for name, value, origin, where in [*itertools.chain(*files), *flags]:
        if origin == COMMAND_LINE == config.origin.get(name):
            raise UserError(f'--{name} is given twice')
        config[name] = _check(name, value, options, where)
        config.origin[name] = origin

    # options that follow from others
    notes = values.settle(config)
    for note in notes if main_rank() and not early else ():
        print(f'note: {note}', flush=True)
    if wrong := values.conflict(config):
        raise UserError(wrong)

    # bare names in the script, and in the shared module
    for name, option in options.items():
        option.scope[name] = config[name]
    return config


def _declared(scope):
    """name -> Option of a module's lines `name: types = value  # comment`, down to its first call, function or class."""
    source = Path(scope['__file__']).read_text('utf-8')
    lines = ['', *source.splitlines()]  # counted from 1
    options, heading = {}, ''
    for node in ast.parse(source).body:
        # docstring, imports and calls without a value may stand between
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr):
            continue
        if not isinstance(node, ast.AnnAssign | ast.Assign) or isinstance(node.value, ast.Call):
            break
        # names in capitals are the script's own
        found = re.fullmatch(r'([a-z]\w*)(?:: (.+?))? = (.+?)(?:  # (.*))?', lines[node.lineno])
        if not found:
            continue

        # its types are those that the annotation allows, or that of its default
        name, annotation, value, comment = found.groups()
        default = ast.literal_eval(value)
        allowed = annotation or type(default).__name__
        # a comment line above an option heads the group that it opens
        above = lines[node.lineno - 1]
        if above.startswith('# '):
            heading = above.strip('# -')
        options[name] = Option(default, allowed.split(' | '), comment or '', heading, scope)
    return options


def _print_help(doc, options):
    """Print every option with its default, types and comment, under the headings of the source."""
    lines = [doc.strip(), '', 'options, to be set in a config file or as --name=value:']
    for heading, group in itertools.groupby(options.items(), key=lambda item: item[1].heading):
        lines += ['', heading]
        for name, option in group:
            lines.append(f'  --{name} = {option.default!r} ({" | ".join(option.types)})  {option.comment}')
    try:
        print('\n'.join(lines), flush=True)
    except BrokenPipeError:  # --help | head: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _read_file(path):
    """(name, value, file, 'file, line n') for every public name that a config file assigns."""
    if not path.endswith('.py'):
        raise UserError(f'{path!r} is neither a config file (.py) nor an option: one word, --name=value')
    try:
        source = Path(path).read_text('utf-8')
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', 'not a text file')
        raise UserError(f'cannot read the config file {path}{values.looked_in(path)}: {reason}') from None

    # it is python, and whatever it can raise is the user's to mend: one statement after the other, to know the line
    names, found, line = {}, {}, 1
    try:
        for statement in ast.parse(source, path).body:
            before, line = dict(names), statement.lineno
            exec(compile(ast.Module([statement], []), path, 'exec'), names)
            for name, value in names.items():
                is_private = name.startswith('_') or isinstance(value, types.ModuleType)
                if value is not before.get(name, names) and not is_private:
                    found[name] = name, value, path, f'{path}, line {line}'
    except BaseException as error:
        in_this_file = isinstance(error, SyntaxError) and error.filename == path
        line = error.lineno if in_this_file else line
        message = ' '.join(str(getattr(error, 'msg', error)).split())
        raise UserError(f'{path}, line {line}: {type(error).__name__}: {message}') from None
    return list(found.values())


def _read_flag(word, options):
    """(name, value, 'command line', 'the command line') of a flag. A switch without a value is on."""
    name, equals, text = word.removeprefix('--').partition('=')
    if not word.startswith('--') or not name:
        raise UserError(f'cannot read {word!r}: options are written --name=value')
    # the types of an unknown name do not matter: it is refused
    allowed = options[name].types if name in options else ['bool']
    if not equals and 'bool' not in allowed:
        raise UserError(f'--{name} needs a value: --{name}=value')
    if not equals:
        text = 'true'

    # None and switches by name, numbers if they can be read as such, else text
    value, lower = text, text.lower()
    for kind in (float, int):
        if kind.__name__ in allowed:
            with contextlib.suppress(ValueError):
                value = kind(text)
    if lower in WORDS and _kind(WORDS[lower]) in allowed:
        value = WORDS[lower]
    return name, value, COMMAND_LINE, f'the {COMMAND_LINE}'


def _kind(value):
    """The name of a value's type, as annotations write it."""
    return 'None' if value is None else type(value).__name__


def _check(name, value, options, where):
    """The value, an int promoted to float where a float is declared. Raises UserError for an unknown name, a wrong type, or a
    value that makes no sense."""
    # a name that is not declared: the nearest that is, or that other code has for one (learning_rate, loss.beta)
    if name not in options:
        plain = name.rpartition('.')[2].replace('-', '_')
        theirs = values.names_elsewhere(options)
        near = difflib.get_close_matches(plain, {*theirs, *options}, 1)
        hint = f'did you mean {near[0]}?' if near else '--help lists the options'
        if near and (near[0] in theirs or near[0] == plain):
            hint = f'here it is {theirs.get(near[0], plain)}'
        raise UserError(f'{where}: unknown option {name!r}; {hint}')

    # the type; NaN, which is not equal to itself, is no number either
    allowed = options[name].types
    if type(value) is int and 'int' not in allowed and 'float' in allowed and abs(value) < 2**63:
        value = float(value)
    if _kind(value) not in allowed or value != value:
        raise UserError(f'{where}: {name} must be {" or ".join(allowed)}, not {value!r}')

    # the value: a range, a choice, no secret
    if wrong := values.problem(name, value):
        raise UserError(f'{where}: {name} {wrong}')
    return value
