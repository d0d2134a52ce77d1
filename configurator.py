"""Configuration without a framework: a script's constants, then python config files, then --key=value, all checked.

    lr = 1e-6                    # learning rate
    model: str | None = None     # None is allowed because the annotation says so
    config = configure(globals())

Only names that the script declares above that call may be set. A user's mistake is a UserError: one sentence, exit code 2.
"""

import ast
import contextlib
import difflib
import math
import os
import re
import sys
import traceback
import types

# what values make sense, for whichever of these options a script has: [low, high], or the choices
RANGES = {
    (0, math.inf): 'skip_bad_steps lr warmup_steps weight_decay n_eval_examples temperature retries center_coef kl_coef '
                   'vf_coef missing_eos_penalty w_good w_bad sft_coef alpha delta lam',
    (0, 2**32 - 1): 'seed',  # multiples of it seed generators that take 64 bits
    (0, 1): 'noise_rate data_fraction frac_good frac_bad smooth',
    (0, 0.99): 'rho',
    (0, 0.9): 'lora_dropout',
    (1e-9, 1): 'top_p',
    (1e-9, math.inf): 'max_grad_norm beta_prime lora_alpha clip value_clip beta tau mu importance_max peak_tflops',
    (1e-3, 1e6): 'timeout',
    (1, 1000): 'concurrency threads width',
    (1, math.inf): 'batch_size max_tokens n_epochs n_examples eval_every save_every keep_last log_every max_length '
                   'max_prompt_length max_new_tokens num_turns n_eval_model_samples n_steps prompt_tokens '
                   'answer_tokens vocabulary n lora_rank tp minibatch_size ppo_epochs '
                   'group_size sample_batch',
}  # fmt: skip
RANGED = ' '.join(RANGES.values()).split()
CHOICES = {'dtype': ('float32', 'bfloat16'), 'truncation': ('start', 'end'), 'optimizer': ('AdamW', 'RMSprop', 'SGD'),
           'lr_schedule': ('constant', 'linear', 'cosine'), 'risk': ('cvar', 'erm', 'released'),
           'attn': (None, 'sdpa', 'eager', 'flash_attention_2', 'flash_attention_3'),
           'device_map': (None, 'balanced', 'balanced_low_0', 'sequential'),
           'split': (None, 'train', 'test'), 'gold': (None, 'toy')}  # fmt: skip


# they stay in the environment: no option may hold one, for options are printed and written down
SECRETS = ('NANOPREF_API_KEY', 'OPENAI_API_KEY', 'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'WANDB_API_KEY')


class UserError(ValueError):
    """A mistake of the user: what is wrong, where, what to do. Printed without a traceback, exit code 2."""


def _excepthook(kind, error, trace):
    if not issubclass(kind, UserError):
        import guard

        error = guard.explained(error, 'lower max_tokens or batch_size, or use a smaller model or a larger machine')
    if not isinstance(error, UserError):
        return sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    if main_rank() or hasattr(error, 'of_this_rank'):  # mostly every rank raises the same error; one says it
        sys.__stderr__.write(f'error: {error}\n')  # torch.distributed holds back what goes to sys.stderr
        sys.__stderr__.flush()
    os._exit(2)  # not sys.exit: threads of the process group can abort an ordinary exit, with another code


def main_rank():
    """Whether this process is the one that talks to the user."""
    return os.environ.get('RANK', '0') == '0'


class Config(dict):
    """Option -> value. origin: option -> 'default', 'command line', or the config file that set it last."""

    def given(self, options):
        """Those of these options (a text of names) that stand on the command line."""
        return [name for name in options.split() if self.origin[name] == 'command line']

    def ignored(self, options, why):
        """Options that have no effect in this run: an error on the command line, a printed note in a config file."""
        for name in options:
            if self.origin[name] == 'command line':
                raise UserError(f'--{name} has no effect: {why}')
            if self.origin[name] != 'default' and main_rank():
                print(f'note: {name} of {self.origin[name]} has no effect: {why}')


def configure(scope, argv=None):
    """Override the constants of a script from config files and flags. Returns the resolved Config.

    scope: the script's globals(), updated in place. argv: sys.argv[1:] by default. Raises UserError."""
    sys.excepthook = _excepthook
    argv = sys.argv[1:] if argv is None else argv
    options = _declared(scope['__file__'])
    if '--help' in argv or '-h' in argv:
        lines = [f'{(scope.get("__doc__") or "").strip()}\n\noptions, to be set in a config file or as --name=value:']
        for name, (allowed, comment) in options.items():
            lines.append(f'  --{name} = {scope[name]!r} ({" | ".join(allowed)})  {comment}')
        try:
            print('\n'.join(lines), flush=True)
        except BrokenPipeError:  # --help | head: whoever reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    config = Config({name: scope[name] for name in options})
    config.origin = dict.fromkeys(options, 'default')
    for path in [a for a in argv if not a.startswith('-')]:
        if not path.endswith('.py'):
            raise UserError(f'{path!r} is neither a config file (.py) nor an option (--name=value)')
        for name, value, where in _read_file(path):
            config[name] = _check(name, value, options, where)
            config.origin[name] = path
    for flag in [a for a in argv if a.startswith('-')]:
        name, equals, text = flag.removeprefix('--').partition('=')
        if not flag.startswith('--') or not name:
            raise UserError(f'cannot read {flag!r}: options are written --name=value')
        if config.origin.get(name) == 'command line':
            raise UserError(f'--{name} is given twice')
        if not equals and 'bool' not in options.get(name, (['bool'],))[0]:
            raise UserError(f'--{name} needs a value: --{name}=value')
        config[name] = _check(name, _parse(name, text if equals else 'true', options), options, 'the command line')
        config.origin[name] = 'command line'
    scope.update(config)
    return config


def _declared(path):
    """The options of a script: name -> (allowed type names, comment), from its constants above configure, in order."""
    with open(path, encoding='utf-8') as file:
        source = file.read()
    options = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            name, allowed = node.target.id, ast.unparse(node.annotation).split(' | ')
        elif isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
            name, allowed = node.targets[0].id, [type(ast.literal_eval(node.value)).__name__]
        elif isinstance(node, ast.Assign):
            break  # config = configure(globals())
        else:
            continue
        options[name] = allowed, source.splitlines()[node.end_lineno - 1].partition('  # ')[2]
    return options


def _read_file(path):
    """(name, value, 'file, line n') for every public name that a config file assigns."""
    try:
        with open(path, encoding='utf-8') as file:
            source = file.read()
    except (OSError, ValueError) as error:
        raise UserError(
            f'cannot read the config file {path}: {getattr(error, "strerror", "not a text file")}'
        ) from None
    names = {}
    try:
        exec(compile(source, path, 'exec'), names)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a config file can raise is the user's to mend
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else None
        for frame in traceback.extract_tb(error.__traceback__):
            line = frame.lineno if frame.filename == path else line
        reason = ' '.join(str(getattr(error, 'msg', error)).split())
        raise UserError(f'{path}, line {line or 1}: {type(error).__name__}: {reason}') from None
    lines = {}
    for node in ast.walk(ast.parse(source)):  # an assigned name, a function or class, an import
        if type(getattr(node, 'ctx', None)) is not ast.Load:
            name = getattr(node, 'asname', None) or getattr(node, 'id', None) or getattr(node, 'name', None)
            lines[name] = getattr(node, 'lineno', 1)
    for name, value in names.items():
        if not name.startswith('_') and not isinstance(value, types.ModuleType):
            yield name, value, f'{path}, line {lines.get(name, 1)}'


def _parse(name, text, options):
    """The value that a flag's text means under the option's declared types."""
    allowed = options[name][0] if name in options else ()
    if 'None' in allowed and text.lower() in ('none', 'null'):
        return None
    if 'bool' in allowed and text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    for kind in (int, float):
        if kind.__name__ in allowed:
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


def _check(name, value, options, where):
    """The value, an int promoted to float where a float is declared. Raises UserError for an unknown name or wrong type."""
    if name not in options:
        near = difflib.get_close_matches(name, options, 1)
        hint = f'did you mean {near[0]}?' if near else '--help lists the options'
        raise UserError(f'{where}: unknown option {name!r}; {hint}')
    allowed = options[name][0]
    if type(value) is int and 'int' not in allowed and 'float' in allowed and abs(value) < 10**300:
        value = float(value)
    if ('None' if value is None else type(value).__name__) not in allowed or value != value:
        raise UserError(f'{where}: {name} must be {" or ".join(allowed)}, not {value!r}')
    for (low, high), names in RANGES.items():
        if name in names.split() and type(value) in (int, float) and not low <= value <= high:
            raise UserError(f'{where}: {name} must lie between {low} and {high}, not {value}')
    if isinstance(value, float) and math.isinf(value) and name in RANGED and name != 'max_grad_norm':
        raise UserError(f'{where}: {name} must be a finite number, not {value}')
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f'{where}: {name} is an integer that no machine counts to')
    if isinstance(value, str):
        _check_text(name, value, where)
    if value not in CHOICES.get(name, (value,)):
        raise UserError(f'{where}: {name} must be one of {", ".join(c for c in CHOICES[name] if c)}, not {value!r}')
    return value


def _check_text(name, value, where):
    """Raise UserError for a text that no file name or tokenizer can hold, or that has a key in it; without showing that."""
    for variable in SECRETS:
        secret = os.environ.get(variable, '').strip()
        if len(secret) >= 8 and secret in value:
            raise UserError(
                f'{where}: {name} holds the key of {variable}; it stays in the environment, nothing else is needed'
            )
    if re.search(r'://[^/?#\s]*@', value):
        raise UserError(f'{where}: {name} has a name or a password in its address; a key belongs in the environment')
    if '\0' in value or re.search('[\ud800-\udfff]', value):
        raise UserError(f'{where}: {name} has characters that are no text')
