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

COMMAND_LINE = 'command line'  # the origin of an option that a flag has set
WORDS = {'none': None, 'null': None, 'true': True, 'false': False}  # how a flag writes these values


class UserError(ValueError):
    """A mistake of the user: what is wrong, where, and what to do. It is printed without a traceback; the exit code is 2."""


def _excepthook(kind, error, trace):
    """Print an uncaught error: a UserError, or a lack of memory, as a sentence with exit code 2; all others as a traceback."""
    from runtime import guard

    # a lack of memory becomes a UserError with this advice
    error = guard.explained(error, 'lower max_tokens or batch_size, or use a smaller model or a larger machine')
    guard.tell_torchrun(error)
    if not isinstance(error, UserError):
        return sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    # mostly every rank raises the same error, and rank 0 prints it; an error of another rank alone is marked
    if main_rank() or getattr(error, 'of_this_rank', False):
        sys.__stderr__.write(f'error: {error}\n')
        sys.__stderr__.flush()
    # not sys.exit: threads of the process group can abort an ordinary exit, with another code
    os._exit(2)


def main_rank():
    """Whether this process is the one that prints to the user: rank 0, or the only process."""
    return os.environ.get('RANK', '0') == '0'


class Config(dict):
    """Option -> value, also as an attribute. origin: option -> 'default', 'command line', or the config file that set it last."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def given(self, options):
        """Return the list of those options that stand on the command line. options: names in one text, separated by spaces."""
        return [name for name in options.split() if self.origin[name] == COMMAND_LINE]

    def ignored(self, options, why):
        """Report options without effect in this run: raise UserError for the command line, print a note for a config file."""
        for name in options:
            origin = self.origin[name]
            if origin == COMMAND_LINE:
                raise UserError(f'--{name} has no effect: {why}')
            if origin != 'default' and main_rank():
                print(f'note: {name} of {origin} has no effect: {why}')


class Option(NamedTuple):
    """One declared constant."""

    default: object
    types: list  # names of the types that it may have
    comment: str
    heading: str  # the comment above its group
    scope: dict  # the globals of the module that declares it


def configure(scope, argv=None, shared=None, early=False):
    """Override the constants of a script from config files and flags. Returns the Config, or exits after --help.

    scope: the script's globals(), updated in place. argv: sys.argv[1:] by default. shared: a module with further options, which
    is updated in place, too. early: print no notes, since configure will be called again. Raises UserError."""
    # from now on a UserError that nobody catches is printed as one sentence
    sys.excepthook = _excepthook
    argv = sys.argv[1:] if argv is None else argv
    options = _declared(scope)
    if shared:
        # an option that both declare is the script's
        for name, option in _declared(vars(shared)).items():
            options.setdefault(name, option)
    if '--help' in argv or '-h' in argv:
        _print_help(scope.get('__doc__') or '', options)
        sys.exit(0)

    # the defaults, then config files in their order, then flags, wherever they stand
    config = Config({name: option.default for name, option in options.items()})
    config.origin = dict.fromkeys(options, 'default')
    flags = [_read_flag(word, options) for word in argv if word.startswith('-')]
    files = [_read_file(word) for word in argv if not word.startswith('-')]
    for name, value, origin, where in [*itertools.chain(*files), *flags]:
        if origin == COMMAND_LINE and config.origin.get(name) == COMMAND_LINE:
            raise UserError(f'--{name} is given twice')
        config[name] = _check(name, value, options, where)
        config.origin[name] = origin

    # options that follow from others, and options that exclude one another
    notes = values.settle(config)
    if main_rank() and not early:
        for note in notes:
            print(f'note: {note}', flush=True)
    if problem := values.conflict(config):
        raise UserError(problem)

    # the constants of the script and of the shared module become these values
    for name, option in options.items():
        option.scope[name] = config[name]
    return config


def _declared(scope):
    """Return name -> Option of a module's lines `name: types = value  # comment`, down to its first call, function or class."""
    source = Path(scope['__file__']).read_text('utf-8')
    lines = ['', *source.splitlines()]  # so that lines[1] is the first, as in node.lineno
    options, heading = {}, ''
    for node in ast.parse(source).body:
        # the docstring, imports and calls without a result may stand between
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr):
            continue
        if not isinstance(node, ast.AnnAssign | ast.Assign) or isinstance(node.value, ast.Call):
            break
        # a name in capitals is a constant of the script, and no option
        match = re.fullmatch(r'([a-z]\w*)(?:: (.+?))? = (.+?)(?:  # (.*))?', lines[node.lineno])
        if not match:
            continue

        # without an annotation, the type is that of the default
        name, annotation, value, comment = match.groups()
        default = ast.literal_eval(value)
        allowed = annotation or type(default).__name__
        # a comment line above an option is the heading of the options from here on
        above = lines[node.lineno - 1]
        if above.startswith('# '):
            heading = above.strip('# -')
        options[name] = Option(default, allowed.split(' | '), comment or '', heading, scope)
    return options


def _print_help(doc, options):
    """Print a script's docstring, and every option with its default, types and comment, under the headings of the source."""
    lines = [doc.strip(), '', 'options, to be set in a config file or as --name=value:']
    # options are in the order of the source, so those of one heading are neighbours
    for heading, group in itertools.groupby(options.items(), key=lambda item: item[1].heading):
        lines += ['', heading]
        for name, option in group:
            lines.append(f'  --{name} = {option.default!r} ({" | ".join(option.types)})  {option.comment}')
    try:
        print('\n'.join(lines), flush=True)
    except BrokenPipeError:
        # --help | head: nobody reads on, so what Python flushes at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _read_file(path):
    """Run a config file. Returns [(name, value, path, 'path, line n')] of its public names. Raises UserError for any failure."""
    if not path.endswith('.py'):
        raise UserError(f'{path!r} is neither a config file (.py) nor an option: one word, --name=value')
    try:
        source = Path(path).read_text('utf-8')
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', 'not a text file')
        raise UserError(f'cannot read the config file {path}{values.looked_in(path)}: {reason}') from None

    # run one statement after the other, to know the line of each assignment and of an error
    names, settings, line = {}, {}, 1
    absent = object()  # is no value of a name
    try:
        for statement in ast.parse(source, path).body:
            before, line = dict(names), statement.lineno
            exec(compile(ast.Module([statement], []), path, 'exec'), names)
            for name, value in names.items():
                is_private = name.startswith('_') or isinstance(value, types.ModuleType)
                is_new = value is not before.get(name, absent)
                if is_new and not is_private:
                    settings[name] = (name, value, path, f'{path}, line {line}')
    # a config file may raise anything, even SystemExit
    except BaseException as error:
        if isinstance(error, SyntaxError) and error.filename == path:
            line = error.lineno
        message = ' '.join(str(getattr(error, 'msg', error)).split())
        raise UserError(f'{path}, line {line}: {type(error).__name__}: {message}') from None
    return list(settings.values())


def _read_flag(word, options):
    """Return (name, value, 'command line', 'the command line') of a flag --name=value, or --name for a switch that is on."""
    name, equals, text = word.removeprefix('--').partition('=')
    if not word.startswith('--') or not name:
        raise UserError(f'cannot read {word!r}: options are written --name=value')
    # the types of an unknown name do not matter: it is refused
    allowed = options[name].types if name in options else ['bool']
    if not equals and 'bool' not in allowed:
        raise UserError(f'--{name} needs a value: --{name}=value')
    if not equals:
        text = 'true'

    # a word for None, true or false; or else a number, an int if possible; or else text
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
    """Return the name of a value's type, as annotations write it."""
    return 'None' if value is None else type(value).__name__


def _check(name, value, options, where):
    """Return the value, an int as a float where that is declared. Raises UserError for an unknown name or an impossible value."""
    if name not in options:
        raise UserError(f'{where}: unknown option {name!r}; {_hint(name, options)}')
    # a huge int is no float: it keeps its type, which is refused below
    allowed = options[name].types
    if type(value) is int and 'int' not in allowed and 'float' in allowed and abs(value) < 2**63:
        value = float(value)
    # NaN alone is not equal to itself
    is_nan = value != value
    if _kind(value) not in allowed or is_nan:
        raise UserError(f'{where}: {name} must be {" or ".join(allowed)}, not {value!r}')
    # its range or its choices; and it must hold no secret
    if problem := values.problem(name, value):
        raise UserError(f'{where}: {name} {problem}')
    return value


def _hint(name, options):
    """Return a hint for an unknown name: the option most like it, or the one that other code calls so, such as learning_rate."""
    # other code may write loss.beta, or max-length
    plain = name.rpartition('.')[2].replace('-', '_')
    ours_by_theirs = values.names_elsewhere(options)
    matches = difflib.get_close_matches(plain, {*ours_by_theirs, *options}, n=1)
    if not matches:
        return '--help lists the options'
    nearest = matches[0]
    if nearest in ours_by_theirs or nearest == plain:
        return f'here it is {ours_by_theirs.get(nearest, plain)}'
    return f'did you mean {nearest}?'
