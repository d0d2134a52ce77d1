"""The configurator, sentence by sentence of its design: order, names, types, config files, help, notes, errors."""

import contextlib
import importlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, python, sentence
from hypothesis import example, given, settings
from hypothesis import strategies as st

import configurator
from configurator import UserError
from runtime import guard, values

SCRIPT = '''"""What the script is for."""
from configurator import UserError, configure

rate = 1e-6  # how fast
steps = 10  # how many
name = 'toy'  # which one
flag = False  # a switch
on = True  # another
# ---- more in a box ----
limit: int | None = None  # how far
share: float | None = 0.5  # which part
note: str | None = None  # anything
sure: bool | None = None  # yes, no or unknown
size: int | float = 2  # how large
config = configure(globals())
double = 2 * steps
'''
DEFAULTS = {'rate': 1e-6, 'steps': 10, 'name': 'toy', 'flag': False, 'on': True, 'limit': None, 'share': 0.5, 'note': None,
            'sure': None, 'size': 2}  # fmt: skip
PARSE = settings(max_examples=150, deadline=None, database=None)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to work in; the hook that configure installs goes when the test ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.delenv('RANK', raising=False)


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    """run(*argv) -> the globals of the script after it has run with these arguments."""
    path = tmp_path_factory.mktemp('script') / 'script.py'
    path.write_text(SCRIPT)

    def run(*argv):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', [str(path), *argv])
            patch.setattr(sys, 'excepthook', sys.excepthook)
            return runpy.run_path(str(path), run_name='script')

    return run


def file(text, path='config.py'):
    Path(path).write_text(text)
    return path


def same(a, b):
    return type(a) is type(b) and a == b


@pytest.mark.parametrize('argv', ['a.py b.py --rate=3', 'a.py --rate=3 b.py', '--rate=3 a.py b.py'])
def test_files_in_their_order_then_flags_wherever_they_stand(script, argv):
    file('rate = 1.0\nsteps = 1\nname = "a"\n', 'a.py')
    file('rate = 2.0\nsteps = 2\n', 'b.py')
    scope = script(*argv.split())
    config = scope['config']
    assert config == DEFAULTS | {'rate': 3.0, 'steps': 2, 'name': 'a'}
    assert scope['double'] == 4  # what is derived follows
    assert all(same(scope[name], value) for name, value in config.items())
    assert config.origin == dict.fromkeys(DEFAULTS, 'default') | dict(rate='command line', steps='b.py', name='a.py')
    # argv may be handed over
    scope = {'__file__': file(SCRIPT, 'script.py'), **DEFAULTS}
    assert configurator.configure(scope, ['--steps=3']) == DEFAULTS | {'steps': 3} and scope['steps'] == 3


# ---- names, types, values ----

# fmt: off
REFUSED_FLAGS = [
    ('--stpes=3', "'stpes'; did you mean steps?", 'command line'), ('--Rate=3', "'Rate'; did you mean rate?"),
    ('--zzzz=3', "'zzzz'; --help"), ('--double=3', "'double'"),  # derived, below the call
    ('--config=3', "'config'"), ('--__file__=x', "'__file__'"),
    ('--rate=1 --steps=2 --rate=1', '--rate is given twice'),
    # only a switch goes without a value
    *((f'--{name} 0.1', f'--{name} needs a value: --{name}=value') for name in ('name', 'note', 'rate', 'limit')),
    ('--flag rate=0.1', "'rate=0.1' is neither a config file (.py) nor an option: one word, --name=value"),
    # what is no config file
    *((path, path) for path in ('missing.py', 'folder.py', 'binary.py', '', 'toy', 'data.json')),
    # what is no flag
    *((flag, flag, '--name=value') for flag in ('-rate=3', '-', '--', '--=3')),
    *((f'--name={text}', 'characters that are no text') for text in ('a\0b', '\ud800')),
    # passwords
    *((f'--name={text}', 'password') for text in ('http://user:secret@host/v1', 'hf://secret@y')),
    # types
    *((f'--{text}', 'rate must be float, not', 'the command line: ') for text in ('rate=fast', 'rate=', 'rate=true', 'rate=none', 'rate=nan')),
    *((f'--steps={text}', 'steps must be int, not', text) for text in ('1.0', '1e3', 'true', 'none')),
    ('--share=nan', 'share must be float or None, not'), ('--limit=2.5', 'limit must be int or None, not'),
    ('--flag=2', 'flag must be true or false, not'), ('--flag=none', 'flag must be true or false, not'), ('--sure=maybe', 'sure must be true or false or None, not'),
]
VALUES = [
    ('--rate=1', 1.0), ('--rate=-1e-3', -1e-3), ('--rate=inf', math.inf), ('--steps=-4', -4),
    ('--name=a=b==c', 'a=b==c'), ('--name=', ''), ('--name=1', '1'), ('--name=true', 'true'), ('--name=é ü', 'é ü'),
    ('--name=None', 'None'),  # a name that may not be None is text
    ('--name=--rate=3', '--rate=3'), ('--note=none', None), ('--note=1', '1'),
    ('--name=~/x', os.path.expanduser('~/x')),  # as bash leaves it
    ('--flag', True), ('--flag=True', True), ('--on=false', False),
    ('--limit=5', 5), ('--limit=none', None), ('--share=null', None), ('--share=1', 1.0),
    ('--size=3', 3), ('size = 3', 3), ('size = 2.5', 2.5), ('--sure', True), ('--sure=false', False), ('--sure=none', None),
    # config files
    ('rate = 1', 1.0), ('rate = 2**62', 2.0**62), ('rate = float("inf")', math.inf), ('share = None', None), ('limit = 3', 3), ('flag = True', True),
    ('note = None', None), ('note = "none"', 'none'), ('name = "x"; name = "y"', 'y'),
]
REFUSED_FILES = [  # text, line, words
    ('rate = 1.0\n\nstpes = 3\n', 3, "'stpes'", 'did you mean steps?'),
    ('steps = 3\ndouble = 6\n', 2, "'double'"), ('from math import sqrt\n', 1, "'sqrt'", 'in a config file begin with _'),
    ('rate = "x"\nsteps = len(rate)\n', 1, 'rate must be float'),  # where it is assigned, not where it is read
    ('rate = 1\nsteps = = 2\n', 2, 'SyntaxError'),
    ('rate = 1\n  steps = 2\n', 2, 'IndentationError'), ('rate = 1\0', 1, 'null bytes'),
    ('rate = 1\nsteps = 1 // 0\n', 2, 'ZeroDivisionError'),
    ('import no_such_module_anywhere\n', 1, 'no_such_module_anywhere'),
    ('def _f():\n    raise ValueError("so\\nthere")\n\nrate = _f()\n', 4, 'ValueError', 'so there'),
    ('rate = 1\nassert False\n', 2, 'AssertionError'),
    ('rate = 1\nsteps: 3\n', 2, "'steps: 3' sets nothing"),
    ('rate = 1\nexec("1 +")\n', 2, 'SyntaxError'),
    ('rate = 1\nreturn\n', 2, 'SyntaxError'),
    # it cannot end the script as if all had gone well
    *((f'rate = 1.0\n{text}\n', 2) for text in ('raise SystemExit', 'exit()')),
    ('steps = 2**63', 1, 'no machine'),
    *((f'rate = {number}', 1, 'rate must be float') for number in ('2**63', '-(2**63)')),
    *((f'note = {text!r}', 1, 'characters that are no text') for text in ('a\0b', '\ud800')),
    *((f'\n{text}', 2, 'rate must be float, not') for text in ("rate = '1e-3'", 'rate = True', 'rate = None', 'rate = float("nan")',
                                                              'rate = 1j', 'rate = -10 ** 400', 'class rate: pass')),
    *((f'\n{text}', 2, 'steps must be int, not') for text in ('steps = True', 'steps = 1.0', 'steps = "1"', 'steps = None')),
    ('share = "0.5"', 1, 'share must be float or None, not'), ('limit = False', 1, 'limit must be int or None, not'),
    ('flag = 1', 1, 'flag must be true or false, not'), ('sure = 0', 1, 'sure must be true or false or None, not'),
    *((text, 1, 'name must be str, not') for text in ('name = 1', 'name = b"x"', 'def name(): pass', 'from math import pi as name')),
]
KNOWN = [  # what values an option of this name can have
    ('lr', 0.0, None), ('lr', -1e-9, 'must be at least 0, not -1e-09'), ('lr', math.inf, 'must be a finite number, not inf'),
    ('max_grad_norm', math.inf, None),  # no clipping
    ('max_grad_norm', 0.0, 'must be above 0, not 0.0'), ('temperature', -math.inf, 'must be at least 0'),
    ('batch_size', 1, None), ('batch_size', 0, 'must be at least 1, not 0'), ('seed', 2**32, 'must be at least 0 and at most 4294967295'),
    ('seed', 2**32 - 1, None), ('top_p', 0.0, 'must be above 0 and at most 1, not 0.0'),
    ('attn', None, None), ('dtype', 'float16', "must be one of float32, bfloat16, not 'float16'"),
    ('attn', 'x', "must be one of sdpa, eager, flash_attention_2, flash_attention_3, not 'x'"),
    ('against', '', 'is empty'), ('ref_model', '', 'is empty'), ('data', '', 'is empty'), ('judge_model', '', 'is empty'), ('out_dir', 'None', 'is None: give it a name'), ('system', 'None', None), ('system', '', None), ('save_every', 'auto', None), ('save_every', 'epoch_3', None), ('n', 10**9, 'must be at least 1 and at most 100000'), ('save_every', 'epoch_0', "must be a number or auto or epoch_N, not 'epoch_0'"), ('max_tokens', 'all', "must be a number or auto, not 'all'"),
]
# fmt: on


@pytest.mark.parametrize('case', REFUSED_FLAGS)
def test_flags_that_are_refused(script, case):
    Path('folder.py').mkdir()
    Path('binary.py').write_bytes(b'\xff\xfe\x00rate')
    message = sentence(script, *case[0].split(' '))
    assert all(word in message for word in case[1:]) and 'secret' not in message


@pytest.mark.parametrize('text, value', VALUES)
def test_values_are_read_by_type(script, text, value):
    """Of flags, and of config files."""
    name = text.strip('-').replace(' ', '=').partition('=')[0]
    scope = script(text if text.startswith('--') else file(text))
    assert same(scope[name], value) and same(scope['config'][name], value)
    assert scope['config'] == DEFAULTS | {name: value}


@pytest.mark.parametrize('case', REFUSED_FILES)
def test_config_files_that_are_refused(script, case):
    message = sentence(script, file(case[0]))
    assert all(word in message for word in (f'config.py, line {case[1]}:', *case[2:])), message
    assert message.count(', line ') == 1  # python's own words name it once more


@pytest.mark.parametrize('name, value, words', KNOWN)
def test_values_of_known_options(name, value, words):
    found = values.problem(name, value)
    assert found is None if words is None else found.startswith(words)


def test_a_config_file_may_compute(script):
    text = '''\ufeff"""What this reproduces."""
import math
import os as system
_tokens = 4096
def _half(x):
    return x // 2

steps = _half(_tokens)
rate = math.sqrt(steps) / 2 ** 5
for i in range(3):
    steps += i
del i
note = __file__
name = system.path.join('a', 'b')
flag = steps > 2000
if flag:
    limit = [x for x in (3, 4)][-1]
'''
    scope = script(file(text))
    set_here = dict(steps=2051, rate=math.sqrt(2048) / 32, name='a/b', flag=True, limit=4, note='config.py')
    assert scope['config'] == DEFAULTS | set_here and '_tokens' not in scope and 'math' not in scope


@pytest.mark.parametrize('variable', values.SECRETS)
def test_no_option_holds_a_key(script, monkeypatch, variable):
    monkeypatch.setenv(variable, 'sentinel-0123')
    for argument in (f'--name=see {variable} sentinel-0123', file('note = "sentinel-0123"')):
        message = sentence(script, argument)
        assert f'the key of {variable}' in message and 'sentinel' not in message


# ---- help, options without effect ----


@pytest.mark.parametrize('argv', ['--help', '--steps=3 -h', '--help missing.py --zzzz=1'])
def test_help_lists_every_option(script, capsys, argv):
    with pytest.raises(SystemExit, match='^0$'):
        script(*argv.split())
    out = capsys.readouterr().out
    assert out.startswith('What the script is for.') and 'int | None' in out and '\n\n\n  --rate' in out  # no heading
    assert '\n\nmore in a box\n  --limit' in out
    lines = [line for line in out.splitlines() if line.startswith('  --')]
    declared = [line for line in SCRIPT.splitlines() if '  # ' in line]
    for line, option, (name, default) in zip(lines, declared, DEFAULTS.items(), strict=True):
        assert f'--{name} = {default!r} ' in line and line.endswith(option.partition('  # ')[2])


@pytest.mark.parametrize('words', ['dpo.py', 'sample.py', '-m feedback.score'])
def test_every_option_says_what_it_is(words):
    """And with `| head`, when head has gone, there is no traceback."""
    lines = [line for line in python(*words.split(), '--help').stdout.splitlines() if line.startswith('  --')]
    assert len(lines) > 9 and not [line for line in lines if line.endswith(')  ')]
    read, write = os.pipe()
    os.close(read)
    command, env = [sys.executable, *words.split(), '--help'], os.environ | {'PYTHONUNBUFFERED': ''}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60, cwd=ROOT, env=env)
    os.close(write)
    assert done.returncode == 0 and not done.stderr


def test_every_option_has_a_heading():
    files = [*ROOT.glob('*.py'), *ROOT.glob('tools/*.py'), ROOT / 'text/show.py', ROOT / 'feedback/score.py']
    for file in files:
        options = configurator._declared({'__file__': file})
        assert not [name for name, option in options.items() if not option.heading], file
        assert 'out_dir' not in options or 'output' in options['out_dir'].heading, file


# options, rank -> what is printed, or what is raised
# fmt: off
IGNORED = [
    ('flag steps limit', '0', 'note: steps of config.py has no effect: the reason\n', None),  # a default is no mistake
    ('steps on', '0', 'note: steps of config.py has no effect: the reason\nnote: on of config.py has no effect: the reason\n', None),
    ('steps', '1', '', None),  # one rank says it
    ('flag rate', '1', '', '^--rate has no effect: the reason$'),
    ('name', '0', '', '^--name has no effect: the reason$'),  # set in both: the line on the screen counts
]
# fmt: on


@pytest.mark.parametrize('options, rank, printed, raised', IGNORED)
def test_ignored(script, capsys, monkeypatch, options, rank, printed, raised):
    config = script(file('steps = 3\nname = "x"\non = False\n'), '--rate=2', '--name=y')['config']
    monkeypatch.setenv('RANK', rank)
    with pytest.raises(UserError, match=raised) if raised else contextlib.nullcontext():
        config.report_unused(options.split(), 'the reason')
    assert capsys.readouterr().out == printed
    assert config.given('steps name rate limit') == ['name', 'rate']


# fmt: off
ENDS = [  # code, a flag, rank, exit code, what stderr begins with
    ('raise UserError("this is wrong")', '', '0', 2, 'error: this is wrong\n'),
    ('raise UserError("this is wrong")', '', '1', 2, ''),
    ('raise ValueError("a bug")', '', None, 1, 'Traceback'),
    ('raise FileNotFoundError("a bug of a library")', '', None, 1, 'Traceback'),
    ('raise MemoryError()', '', '1', 2, 'error: this machine is out of memory'),
    ('raise RuntimeError("CUDA error: out of memory")', '', None, 2, 'error: the GPU is out of memory'),
    ('raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [1.2.3.4]:9")', '', '0', 2, 'error: another rank has ended'),
    ('raise RuntimeError("a bug, or a download: Connection reset by peer")', '', None, 1, 'Traceback'),
    ('pass', '', None, 0, ''),
    ('pass', '--stpes=3', None, 2, "error: the command line: unknown option 'stpes'; did you mean steps?\n"),
]
# fmt: on


@pytest.mark.parametrize('code, flag, rank, status, err', ENDS)
def test_exit_code_and_stderr(code, flag, rank, status, err):
    environment = {'PYTHONPATH': ROOT, 'PYTHONUNBUFFERED': ''} | ({'RANK': rank, 'WORLD_SIZE': 2} if rank else {})
    path = Path(file(f'{SCRIPT}print("before")\n{code}\n', 'x.py')).resolve()
    began = time.monotonic()
    done = python(path, *flag.split(), **environment)
    # torchrun stops all ranks as soon as one ends: a rank that prints nothing lets rank 0 print first
    assert rank != '1' or err or time.monotonic() - began > 2
    assert done.returncode == status and done.stdout == 'before\n' * (not flag)  # what was printed is not lost
    assert done.stderr.startswith(err) and ('a bug' in done.stderr or done.stderr.count('\n') <= 1)
    assert err or not done.stderr


def test_a_typo_ends_the_script_at_once(tmp_path):
    """Before the heavy imports; torchrun finds the sentence in the file from which it copies the cause."""
    record = tmp_path / 'error.json'
    done = python('-X', 'importtime', 'dpo.py', '--lrr=3', TORCHELASTIC_ERROR_FILE=record)
    assert (done.returncode, 'torch' in done.stderr) == (2, False)
    sentence = "error: the command line: unknown option 'lrr'; did you mean lr?"
    assert done.stderr.endswith(f'{sentence}\n') and json.loads(record.read_text())['message']['message'] == sentence


@pytest.mark.parametrize('command, says', [
    ('{python} -OO {root}/dpo.py', 'transformers needs the docstrings that python -OO'),
    ('rmdir {here} && {python} {root}/dpo.py nowhere.py', 'the working directory has been deleted'),
    ('cd {root}/tools && {python} plot.py', 'python -m tools.plot, tools.report or tools.bench'),
])  # fmt: skip
def test_where_nothing_can_start_a_sentence_says_so(command, says, tmp_path):
    command = command.format(python=sys.executable, root=ROOT, here=tmp_path)
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(f'error: .*{says}.*\n', done.stderr), done.stderr


def test_closed_streams_are_opened():
    """Else the first file would get the number of one of them, here as the exit code, and whatever is printed."""
    code = 'import os; from runtime import guard; guard.watch("__main__"); print(1); children = os.system("echo"); '
    code += 'raise SystemExit(children or os.open(".", os.O_RDONLY))'
    for closed in ('>&-', '<&- >&- 2>&-'):
        assert 2 < subprocess.run(f"exec {sys.executable} -c '{code}' {closed}", shell=True, cwd=ROOT).returncode < 20


# ---- any input ----

TEXT = st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), max_size=8)
NAMES = st.sampled_from([*DEFAULTS, 'stpes', 'help', '_x', 'double'])
WRITTEN = st.one_of(TEXT, st.sampled_from(['', '1', '-1.5', 'nan', 'none', 'true', '1' * 5000, '1e999', '=', '--']))
FLAGS = st.builds(lambda dashes, name, equals, value: dashes + name + equals + value,
                  st.sampled_from(['--', '-', '---', '']), NAMES | TEXT, st.sampled_from(['=', '', '==']), WRITTEN)  # fmt: skip
PRINTED = st.text().filter(lambda text: '\0' not in text and not re.search('://[^/?#]*@', text))
INTEGERS = st.integers(1 - 2**63, 2**63 - 1)
TYPES = {
    'rate': st.floats(allow_nan=False), 'steps': INTEGERS, 'name': PRINTED, 'flag': st.booleans(), 'on': st.booleans(),
    'limit': st.none() | INTEGERS, 'share': st.none() | st.floats(allow_nan=False), 'sure': st.none() | st.booleans(),
    'note': st.none() | PRINTED.filter(lambda text: text.lower() not in ('none', 'null')),
}  # fmt: skip


@PARSE
@given(st.lists(st.one_of(FLAGS, TEXT, st.sampled_from(['good.py', 'bad.py', 'missing.py', '.'])), max_size=4))
@example(['--rate=' + '9' * 400])
@example(['x' * 5000])
def test_any_command_line_is_read_or_refused(script, argv):
    file('steps = 3\n', 'good.py')
    file('steps = "3"\n', 'bad.py')
    try:
        scope = script(*argv)
    except (UserError, SystemExit) as error:
        assert error.args or '--help' in argv or '-h' in argv
        return
    also = {'limit': int, 'share': type(None), 'note': str, 'sure': bool}
    for name, default in DEFAULTS.items():
        assert type(scope[name]) in (type(default), also.get(name))
        assert same(scope[name], scope['config'][name]) and scope[name] == scope[name]


@PARSE
@given(st.fixed_dictionaries({}, optional=TYPES))
@example({'limit': 0, 'steps': -1, 'rate': -math.inf, 'note': '', 'name': 'None'})
def test_a_value_printed_as_a_flag_is_read_back(script, values):
    scope = script(*(f'--{name}={value}' for name, value in values.items()))
    assert all(same(scope[name], value) for name, value in (DEFAULTS | values).items())


SHARED = '''"""What scripts share."""
import math

# machine
threads = 1  # how many
dtype = 'float32'  # the type
out_dir = 'out/shared'  # where

def work():
    return threads
'''
OWN = '''"""A script."""
# model
size: int | None = None  # of the model
# output
out_dir = 'out/own'  # everything
config = configure(globals(), shared=shared)
'''


def test_shared_options_are_set_where_they_are_declared(tmp_path, monkeypatch, capsys):
    """A script's own default of one holds; help has the headings of the source."""
    file(SHARED, 'shared_options.py')
    file(OWN, 'script.py')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'shared_options', raising=False)
    shared = importlib.import_module('shared_options')

    def run(*argv):
        monkeypatch.setattr(sys, 'argv', ['script.py', *argv])
        return runpy.run_path('script.py', init_globals={'configure': configurator.configure, 'shared': shared})

    scope = run('--threads=3', '--size=7')
    config = scope['config']
    assert config == {'size': 7, 'out_dir': 'out/own', 'threads': 3, 'dtype': 'float32'}
    assert config.threads == shared.work() == 3 and not hasattr(config, 'lr') and 'threads' not in scope
    assert scope['size'] == 7 and scope['out_dir'] == 'out/own' and shared.out_dir == 'out/shared'
    assert run('--out_dir=x')['out_dir'] == 'x'
    assert 'out_dir is empty' in sentence(run, '--out_dir=')
    assert shared.work() == 1  # from the default of the source, not from what the last run has left
    assert 'dtype must be one of float32, bfloat16' in sentence(run, '--dtype=float16')
    assert 'did you mean threads' in sentence(run, '--thread=1')
    with pytest.raises(SystemExit):
        run('--help')
    lines = capsys.readouterr().out.splitlines()
    found = [line.split(' = ')[0].strip() for line in lines[lines.index('model') :] if line]
    assert found == ['model', '--size', 'output', '--out_dir', 'machine', '--threads', '--dtype']


# ---- words of other code, and what follows from other options ----

ELSEWHERE = {
    '--learning_rate=1': 'unknown option .learning_rate.; here it is lr$', '--num-train-epochs=1': 'here it is n_epochs$',
    '--learning_rat=1': 'did you mean lr.$', '--batch=1': 'did you mean batch_size.$', '--bata=1': 'did you mean beta or data.$',
    '--num_prompts=1': 'here it is n_examples$',
    '--dataset_path=x': 'did you mean data.$', '--reward_name=x': '--help lists the options ', '--system_pro=x': 'did you mean system.$',
    '--n_prompt=1': 'did you mean n_examples.$', '--bf16': 'here it is dtype=bfloat16$', '--loss.beta=1': 'here it is beta$',
    '--loss.mode_weight=1': r'here it is beta_prime \(beta-DPO: rho\)$', '--model.archive=x': 'here it is model$',
    '--hub_model_id=x': r'here it is out_dir \(its folder model is one for hf upload\)$', '--push_to_hub': 'here it is out_dir',
    '--llm=x': 'here it is model$', '--prompts=x': 'here it is data$', '--dataset_train_split=x': r'here it is data \(as in OWNER/NAME\[SPLIT\]\)$',
    '--deepspeed=x': r'here it is shard \(under torchrun\)$',
    '--trainer=x': r'here it is device_map=balanced .* tp=2 .* torchrun', '--prefs_path=x': 'here it is data$',
    '--per_device_train_batch_size=4': r'here it is batch_size \(of all GPUs and microbatches together\)$',
    '--beta 0.1': '--beta needs a value: --beta=value$',
    'loss.beta=0.1': r"'loss.beta=0.1' is neither a config file \(.py\) nor an option: one word, --name=value$",
    '--optimizer=adam': "must be one of AdamW, RMSprop, SGD, not 'adam'; did you mean AdamW.$",
    '--optimizer=zzz': "must be one of AdamW, RMSprop, SGD, not 'zzz'$",
    'config/dpo_toi.py': 'cannot read the config file config/dpo_toi.py in .* .did you mean config/dpo_toy.py..: No such file',
    'dpo_toy.py': 'cannot read the config file dpo_toy.py in .* .did you mean config/dpo_toy.py..: No such file',
    'config/xx.py': 'No such file or directory$',
    'README.md': r"'README.md' is neither .* one word, --name=value, such as --data=README.md$",
    'nosuch.jsonl': r"'nosuch.jsonl' is neither .* one word, --name=value$",
    '--max_length=1': 'max_length 1 leaves no room for an answer behind max_prompt_length 0: 3 will do$',
    '--max_length=200 --max_prompt_length=199': 'max_length 200 leaves no room for an answer behind max_prompt_length 199: 201 will do$',
}  # fmt: skip


@pytest.mark.parametrize('argv', ELSEWHERE)
def test_what_people_type_is_answered_before_the_imports(argv, monkeypatch, capsys):
    """dpo.py itself is not imported: check_early reads its source and that of training.py."""
    monkeypatch.setattr(sys, 'argv', ['dpo.py', *argv.split()])
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=ELSEWHERE[argv]):
        guard.check_early(ROOT / 'dpo.py')
    assert not capsys.readouterr().out  # the script itself says later that max_prompt_length is half of --max_length


def test_a_linked_script(tmp_path, monkeypatch):
    """Shared options are those beside the script itself."""
    (tmp_path / 'linked.py').symlink_to(ROOT / 'dpo.py')
    monkeypatch.setattr(sys, 'argv', ['linked.py', '--tensorbord'])
    with pytest.raises(UserError, match='did you mean tensorboard'):
        guard.check_early(tmp_path / 'linked.py')


def test_names_of_other_code_are_those_of_options_here():
    scripts = 'dpo.py sft.py reward.py ppo.py sample.py label.py training.py'.split()
    known = {name for script in scripts for name in configurator._declared({'__file__': ROOT / script})}
    theirs = values.names_elsewhere(known)
    assert len(theirs) == sum(len(names.split()) for names in values.ELSEWHERE.values()) and not known & theirs.keys()


def test_options_that_follow_from_others(capsys):
    """A run's folder stands for its model, but not where it is a model itself, nor a name of ours that is a folder, too."""
    for folder in ('run/model', 'other/model', 'toy/model'):
        Path(folder).mkdir(parents=True)
        Path(folder, 'config.json').touch()
    Path('run/config.json').touch()
    Path('other/model.safetensors').touch()
    names = {'model': 'run', 'ref_model': 'other', 'critic': 'hub/id', 'reward_model': 'toy'}
    config = configurator.Config(names)
    assert values.settle(config) == ['model is run/model, the model that the run in run has left']
    assert config == names | {'model': 'run/model'}
    # and the prompt gets half of the length, which is said where that was asked for
    for origin, notes in {'default': [], 'a.py': ['max_prompt_length is 50, half of max_length']}.items():
        config = configurator.Config({'max_length': 100, 'max_prompt_length': None})
        config.origin = {'max_length': origin}
        assert values.settle(config) == notes and config['max_prompt_length'] == 50
    file('max_length = 100\nmax_prompt_length: int | None = None\n', 'script.py')
    configurator.configure({'__file__': 'script.py'}, ['--max_length=20'])
    assert capsys.readouterr().out == 'note: max_prompt_length is 10, half of max_length\n'
    with pytest.raises(SystemExit):
        configurator.configure({'__file__': 'script.py'}, ['--help'], listed=['max_length'])
    assert capsys.readouterr().out.splitlines()[-1] == '  --max_length = 100 (int)  '
