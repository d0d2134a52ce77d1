"""User-defined reward functions: --reward=my_rewards.py:exact_match, alone or in a weighted sum.

    def exact_match(prompts, responses, rows):
        return [float(response.strip() == row['answer']) for response, row in zip(responses, rows)]

The lists have one element per answer. prompts: text or chat messages, as in the data; responses: text; rows: dicts with all
columns of the prompt's data row. The function returns one number per response. It runs in this process, once per round with all
answers, or in worker processes, once per answer and with an optional time limit.
ppo.py (through rewards.py) and sample.py call parse(), then score(). Workers run this file as a script, so it avoids torch."""

import asyncio
import contextlib
import importlib.util
import inspect
import math
import os
import signal
import site
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from configurator import UserError, main_rank
from runtime import guard
from runtime.files import say
from runtime.values import SECRETS, looked_in

ROOT = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """One term of --reward: a function, or a reward model."""

    name: str  # name in the log
    weight: float
    function_or_model: str  # name of the function; or a model folder, hub id, or 'gold'
    file: str | None = None  # file of the function, by which it differs from a model: that has None

    def __str__(self):
        return f'{self.function_or_model} of {self.file}' if self.file else self.function_or_model


class Failed(Exception):
    """A call gave no usable number; the message says why, such as 'it returned None, where ...'."""


def parts_of_options(config, eval_data):
    """Return the Parts of ppo.py's --reward or --reward_model; [] if --offline has neither. UserError for invalid options.

    config: the run's Config. A single model becomes its option reward_model; several, or none, its attribute reward_models, a list."""
    reward = config.reward
    model = config.reward_model
    # given() returns those that the command line has: --reward there replaces a reward_model of a config file
    if reward and model and config.given('reward reward_model') == ['reward']:
        say(f'note: --reward={reward} scores, instead of the reward_model {model!r} of {config.origin["reward_model"]}')
        config['reward_model'] = model = None
    if reward and model:
        raise UserError(f"--reward and --reward_model both score: write one sum, --reward='{reward} + {model}'")
    text = reward or model
    if not text and not config.offline:
        hint = '--reward=FILE.py:FUNCTION, or --reward_model=FOLDER (of reward.py), or gold for the toy world'
        raise UserError(f'nothing scores the answers: give {hint}')
    parts = parse(text) if text else []

    models = [part.function_or_model for part in parts if not part.file]
    if 'gold' in models and {config.data, eval_data or config.data} != {'toy'}:
        raise UserError('the reward gold is known for --data=toy alone: give a function, or a folder of reward.py')
    # fingerprints() of hf/load.py hashes their files, so that a resumed run notices changes
    if len(models) == 1:
        config['reward_model'] = models[0]
    else:
        config.reward_models = models
    if len(models) == len(parts):
        config.report_unused(['reward_workers', 'reward_timeout'], 'no function of your own is in --reward')
    return parts


def parse(text):
    """Parse a sum such as 'a.py:f*1 + b.py:g*0.2 + out/reward/model' into Parts; the default weight is 1. Raises UserError."""
    parts = []
    for term in text.split('+'):
        scorer, star, weight_text = term.partition('*')
        scorer = scorer.strip()
        try:
            weight = float(weight_text) if star else 1.0
        except ValueError:
            weight = math.nan
        if not scorer or not math.isfinite(weight):
            raise UserError(f"--reward: cannot read {term.strip()!r}: write 'a.py:f*1 + b.py:g*0.2 + out/reward/model'")
        parts.append(_make_part(scorer, weight))
    names = [part.name for part in parts]
    for i, part in enumerate(parts):
        # number duplicate names by their place in the sum: f_1, f_3
        if names.count(part.name) > 1:
            parts[i] = part._replace(name=f'{part.name}_{i + 1}')
        # the result is needed later, and by rank 0 alone: load them now, so that mistakes in their files surface early
        if part.file and main_rank():
            load_function(part.file, part.function_or_model)
    return parts


def _make_part(scorer, weight):
    """Return the Part of a scorer: FILE.py:FUNCTION, a model folder or hub id, or 'gold'. Raises UserError."""
    # 'a.py:f' -> 'a.py', 'f'. A bare 'a.py' has no name, which is refused below; all else is a model
    before, colon, name = scorer.partition('.py:')
    file = f'{before}.py' if colon else scorer
    if not file.endswith('.py'):
        # the folder of a run stands for the model in it, and names it
        inside = f'{scorer}/model'
        model = inside if os.path.exists(f'{inside}/config.json') else scorer
        run_folder = Path(model.removesuffix('/model'))
        return Part(name=run_folder.name, weight=weight, function_or_model=model)

    path = Path(file).expanduser()
    # try the current folder, then the project's; an absolute path replaces either
    existing = [folder / path for folder in (Path.cwd(), ROOT) if (folder / path).is_file()]
    if not existing:
        raise UserError(f'--reward: there is no file {file}{looked_in(file)}: give its path from there, or in full')
    if not name.isidentifier():
        raise UserError(f'--reward: say which function of {file}: {file}:NAME')
    return Part(name=name, weight=weight, function_or_model=name, file=str(existing[0]))


@cache
def load_function(file, name):
    """Return the function of this name in a file; a file is executed only once. Raises UserError."""
    # let the file import its neighbours; addsitedir appends, so that their names do not shadow our modules
    site.addsitedir(os.path.dirname(os.path.abspath(file)))
    spec = importlib.util.spec_from_file_location(f'reward {file}', file)
    module = sys.modules.get(spec.name)
    if module is None:
        module = importlib.util.module_from_spec(spec)
        # dataclasses need their module in sys.modules during execution
        sys.modules[spec.name] = module
        try:
            with _user_code():
                spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[spec.name]
            raise UserError(f'--reward: cannot load {file}: {_explained(error, file)}') from None

    function = getattr(module, name, None)
    if not callable(function):
        others = [other for other, value in vars(module).items() if inspect.isfunction(value) and other[0] != '_']
        raise UserError(f'--reward: {file} has no function {name}; it has {", ".join(others) or "none"}')
    try:
        inspect.signature(function).bind('prompts', 'responses', 'rows')
    except TypeError:
        own = f'{name}{inspect.signature(function)} of {file}'
        raise UserError(f'--reward: {own} is called as {name}(prompts, responses, rows): give it these three') from None
    except ValueError:
        pass  # some functions of C have no signature
    return function


@contextlib.contextmanager
def _user_code():
    """Within it, signals are unblocked, and os._exit is an error; at its end, current folder and torch's gradient mode are as before."""
    # both contexts change nothing at the start of the block: they restore at its end what the user's code has changed
    folder = contextlib.chdir('.')
    torch = sys.modules.get('torch')  # None in workers, which do not import it
    gradients = torch.set_grad_enabled(torch.is_grad_enabled()) if torch else contextlib.nullcontext()
    process = os.getpid()
    exit_at_once = os._exit

    def refuse(status):
        # so end children that the user's code has forked, and this process after a signal; else the run would seem to be done
        if os.getpid() != process or guard.stop_asked_here():
            exit_at_once(status)
        raise SystemExit(f'os._exit({status}) would end the run')

    os._exit = refuse
    try:
        with guard.unblocked(), folder, gradients:
            yield
    finally:
        os._exit = exit_at_once
        # a child that the user's code has forked must not go on here, as a second run
        if os.getpid() != process:
            os._exit(1)


def call(part, prompts, responses, rows):
    """Call a part's function on n answers in this process. Return n floats. Raises Failed."""
    function = load_function(part.file, part.function_or_model)
    try:
        with _user_code():
            result = function(prompts, responses, rows)
            if inspect.iscoroutine(result):
                result = asyncio.run(result)
    except BaseException as error:
        raise Failed(_explained(error, part.file)) from None
    # convert numpy arrays and tensors to lists, and numpy and tensor scalars to numbers
    values = result.tolist() if hasattr(result, 'tolist') else result
    if not isinstance(values, list | tuple) or len(values) != len(responses):
        raise Failed(f'it returned {shorten(repr(result), 60)}, where a list of {len(responses)} numbers is wanted')
    values = [value.item() if hasattr(value, 'item') else value for value in values]
    for value in values:
        # not math.isfinite, which raises for an int beyond a float's range; NaN fails the comparison
        is_finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
        if not is_finite:
            shown = 'an integer beyond all floats' if isinstance(value, int) else shorten(repr(value), 60)
            raise Failed(f'it returned {shown}, where a finite number is wanted')
    return [float(value) for value in values]


def _explained(error, file):
    """Describe an exception: type, message, and the innermost line of the user's file in its traceback, if any."""
    message = shorten(f'{type(error).__name__}: {error}', 300)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if not frames:
        return message
    return f'{message} (line {frames[-1].lineno}: {shorten(frames[-1].line, 100)})'


def score(part, prompts, responses, rows, workers=None):
    """Score n answers with a Part's function, by its Workers or here. Return two lists: scores, and which of them timed out (score 0)."""
    # rows may be text.readers.Row, a dict subclass with a location; functions get plain dicts
    plain_rows = [dict(row) for row in rows]
    if workers:
        # a call for each answer; its result is None if it timed out
        results = workers.threads.map(workers.ask, prompts, responses, plain_rows)
        checked = _checked(part, prompts, rows, results)
        timed_out = [result is None for result in checked]
        return [0.0 if result is None else result for result in checked], timed_out
    # here one call for all answers, without time limit
    try:
        return call(part, prompts, responses, plain_rows), [False] * len(rows)
    except Failed as error:
        joint_failure = error
    # it failed: call it for one answer at a time, and _checked raises a UserError that names the row for which it fails
    one_by_one = map(partial(call_one, part), prompts, responses, plain_rows)
    _checked(part, prompts, rows, one_by_one)
    raise UserError(f'--reward: {part}: {joint_failure}; no answer alone makes it fail')


def _checked(part, prompts, rows, results):
    """Return the list of an iterator's results, one for each answer. Raises UserError at the first that is a Failed."""
    checked = []
    for prompt, row, result in zip(prompts, rows, results, strict=True):
        if isinstance(result, Failed):
            # where: a Row's file and line
            location = getattr(row, 'where', '') or f'prompt {shorten(str(prompt), 80)!r}'
            # a KeyError is usually a misspelt column
            columns = f'; its columns are {", ".join(map(str, row))}' if 'KeyError' in str(result) else ''
            raise UserError(f'--reward: {part} fails at {location}: {result}{columns}')
        checked.append(result)
    return checked


def call_one(part, prompt, response, row):
    """Call a part's function on one answer. Return its score, or the Failed exception as a value."""
    try:
        return call(part, [prompt], [response], [row])[0]
    except Failed as error:
        return error


class Workers:
    """n worker processes that call a Part's function, one answer at a time. Each belongs to a thread of its own of self.threads.

    timeout: seconds per call, None for no limit. local.worker: (process, pipe) of this thread, or None."""

    def __init__(self, part, n, timeout):
        self.part = part
        self.timeout = timeout
        self.threads = ThreadPoolExecutor(n)
        self.local = threading.local()

    def ask(self, prompt, response, row):
        """Call the function in this thread's worker, started on demand. Return its score, None if it timed out, or a Failed."""
        if not getattr(self.local, 'worker', None):
            self.local.worker = self._start_worker()
        process, pipe = self.local.worker
        try:
            pipe.send((prompt, response, row))
            if pipe.poll(self.timeout):
                return pipe.recv()
            result = None
        except (EOFError, OSError):
            # a crash in the function
            result = Failed(f'its process has ended with code {process.wait()}')
        # only after such a call: kill the worker and its children. The next call starts a new one
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.local.worker = None
        return result

    def _start_worker(self):
        """Start a process that runs _work(). Return (process, our end of its pipe) once it has loaded the function."""
        ours, theirs = Pipe()
        # start in the project folder, so that rl can be imported; _work changes to the current folder
        command = [sys.executable, '-m', 'rl.reward_functions', str(theirs.fileno()), os.getcwd()]
        command += [self.part.file, self.part.function_or_model]
        # what it runs need not see keys
        env = {name: value for name, value in os.environ.items() if name not in SECRETS}
        # a new session shields the worker from Ctrl-C, and makes it a process group that ask() can kill
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, env=env, start_new_session=True)
        theirs.close()
        # wait for 'ready', so that loading does not count as call time; on EOFError the worker died, which ask() handles
        with contextlib.suppress(EOFError):
            ours.recv()
        return process, ours


def _work(fd, folder, file, name):
    """Be a worker process: serve calls of function `name` in file from the pipe with this file descriptor, in the folder of the run."""
    pipe = Connection(int(fd))
    part = Part(name, weight=1.0, function_or_model=name, file=file)
    parent = os.getppid()
    # undo the inherited signal mask of runtime/guard.py
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    os.chdir(folder)

    def exit_with_parent():
        # orphans are adopted, so the parent id changes
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    # in a thread, because the function may never return
    threading.Thread(target=exit_with_parent, daemon=True).start()
    load_function(file, name)
    # at these errors the parent has closed the pipe or ended
    with contextlib.suppress(EOFError, ConnectionError):
        pipe.send('ready')
        while True:
            prompt, response, row = pipe.recv()
            pipe.send(call_one(part, prompt, response, row))


if __name__ == '__main__':
    # not this module's _work: the parent could not unpickle exceptions of __main__
    from rl import reward_functions

    reward_functions._work(*sys.argv[1:])
