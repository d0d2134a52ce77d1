"""Reward functions of your own: --reward=my_rewards.py:exact_match, alone or in a weighted sum.

    def exact_match(prompts, responses, rows):
        return [float(response.strip() == row['answer']) for response, row in zip(responses, rows)]

The three lists have an element for each answer. prompts: text or messages, as the data has them; responses: text; rows: the prompt's
row, a dict of all its columns. A function returns a number for every response. It runs in this process, in one call for all answers
of a round, or in worker processes, one answer a call, where a call can have a time limit.

ppo.py (by way of rewards.py) and sample.py call parse, then score. Worker processes run this file as a script: so it imports no
torch, which would take seconds.
"""

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

ROOT = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """One summand of --reward: a function, or a reward model."""

    name: str  # what the log calls it
    weight: float
    function_or_model: str  # the function's name; or a model's folder or hub id, or 'gold'
    file: str | None = None  # the function's file; None: this is a model

    @property
    def is_function(self):
        """Whether this is a function of the user's own, not a model."""
        return self.file is not None

    def __str__(self):
        """How messages call it."""
        if self.is_function:
            return f'{self.function_or_model} of {self.file}'
        return self.function_or_model


class Failed(Exception):
    """A function gives no number. The message says why, such as 'it returned None, where ...'."""


# ---- the option ----


def parts_of_options(config, eval_data):
    """Return the Parts that ppo.py's --reward or --reward_model names. Without both, which --offline allows, they are [].

    If one Part is a model, config.reward_model is set to it. Raises UserError for options that do not go together, such as
    --reward_timeout without a function."""
    reward = config.reward
    model = config.reward_model
    text = reward or model
    if reward and model:
        raise UserError(f"--reward and --reward_model both score: write one sum, --reward='{reward} + {model}'")
    if not text and not config.offline:
        hint = '--reward=FILE.py:FUNCTION, or --reward_model=FOLDER (of reward.py), or gold for the toy world'
        raise UserError(f'nothing scores the answers: give {hint}')
    parts = parse(text) if text else []

    # the gold reward is defined for the toy world's prompts alone
    models = [part.function_or_model for part in parts if not part.is_function]
    data_sets = {config.data}
    if eval_data:
        data_sets.add(eval_data)
    if 'gold' in models and data_sets != {'toy'}:
        raise UserError('the reward gold is known for --data=toy alone: give a function, or a folder of reward.py')
    # checkpoints keep hashes of the files that this option names: a resumed run is refused if they have changed
    if len(models) == 1:
        config['reward_model'] = models[0]
    has_function = len(models) < len(parts)
    if not has_function:
        config.ignored(['reward_workers', 'reward_timeout'], 'no function of your own is in --reward')
    return parts


def parse(text):
    """Return the Parts of a sum such as 'a.py:f*1 + b.py:g*0.2 + out/reward/model'. A weight that is not given is 1.

    Files of functions are loaded here already, so that a mistake in them ends the run early. Raises UserError."""
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
        # where two have one name, it gets the part's place in the sum behind it: f_1, f_3
        if names.count(part.name) > 1:
            parts[i] = part._replace(name=f'{part.name}_{i + 1}')
        # rank 0 alone calls functions, so it alone loads them
        if part.is_function and main_rank():
            load_function(part.file, part.function_or_model)
    return parts


def _make_part(scorer, weight):
    """Return the Part of a scorer: FILE.py:FUNCTION, or a model's folder or hub id, or 'gold'. Raises UserError.

    A relative FILE.py is looked for in the current folder, then in the project's."""
    # with a colon added, because FILE.py without a function is a file, too: it is refused below
    is_function = '.py:' in f'{scorer}:'
    if not is_function:
        # the folder of a training run stands for the model in it
        inside = f'{scorer}/model'
        model = inside if os.path.exists(f'{inside}/config.json') else scorer
        name = Path(model.removesuffix('/model')).name
        return Part(name, weight, model)

    file, _, name = scorer.partition('.py:')
    file = file.removesuffix('.py') + '.py'
    path = Path(file).expanduser()
    existing = [place for place in (Path.cwd() / path, ROOT / path) if place.is_file()]
    if not existing:
        here = f'there is no file {file} in {Path.cwd()}'
        raise UserError(f'--reward: {here}: give its path from there, or the whole path')
    if not name.isidentifier():
        raise UserError(f'--reward: say which function of {file}: {file}:NAME')
    return Part(name, weight, name, str(existing[0]))


@cache
def load_function(file, name):
    """Return the function of this name in a file. A file is run once, whatever the number of its functions. Raises UserError."""
    # the file may import its neighbours. addsitedir puts their folder last in the search path, so that none hides a module of ours
    site.addsitedir(os.path.dirname(os.path.abspath(file)))
    spec = importlib.util.spec_from_file_location(f'reward {file}', file)
    module = sys.modules.get(spec.name)
    if module is None:
        module = importlib.util.module_from_spec(spec)
        # before the file is run, because a dataclass in it looks for its own module there
        sys.modules[spec.name] = module
        try:
            with guard.unblocked():
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[spec.name]
            raise UserError(f'--reward: cannot load {file}: {_explained(error, file)}') from None

    function = getattr(module, name, None)
    if not callable(function):
        others = [other for other, value in vars(module).items() if inspect.isfunction(value) and other[0] != '_']
        raise UserError(f'--reward: {file} has no function {name}; it has {", ".join(others) or "none"}')
    return function


# ---- one call ----


def call(part, prompts, responses, rows):
    """Call a part's function on n answers, in this process. Return its n numbers as floats. Raises Failed."""
    function = load_function(part.file, part.function_or_model)
    try:
        with guard.unblocked():
            result = function(prompts, responses, rows)
            # the function may be an async one
            if inspect.iscoroutine(result):
                result = asyncio.run(result)
    except (Exception, SystemExit) as error:
        raise Failed(_explained(error, part.file)) from None

    # an array of numpy, or a tensor, becomes a list, and so do numbers of theirs in a list
    values = result.tolist() if hasattr(result, 'tolist') else result
    if not isinstance(values, list | tuple) or len(values) != len(responses):
        raise Failed(f'it returned {shorten(repr(result), 60)}, where a list of {len(responses)} numbers is wanted')
    values = [value.item() if hasattr(value, 'item') else value for value in values]
    for value in values:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Failed(f'it returned {shorten(repr(value), 60)}, where a finite number is wanted')
    return [float(value) for value in values]


def _explained(error, file):
    """Return an exception in words: its kind, its message, and the last line of the user's file in its traceback, if any."""
    message = shorten(f'{type(error).__name__}: {error}', 300)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if not frames:
        return message
    last = frames[-1]
    return f'{message} (line {last.lineno}: {shorten(last.line, 100)})'


# ---- all answers of a round ----


def score(part, prompts, responses, rows, workers=None):
    """Score n answers by a part's function. Return two lists of n: the numbers, and whether each call was late, whose number is 0.

    workers: the part's Workers, which call the function once for each answer. None: it is called in this process, once for all
    answers, and never late. Raises UserError, which names the first row at which the function fails."""
    # a row of the data is a dict that also knows its place in the file; functions get plain ones
    plain_rows = [dict(row) for row in rows]
    if workers:
        results = workers.threads.map(workers.ask, prompts, responses, plain_rows)
    else:
        try:
            return call(part, prompts, responses, plain_rows), [False] * len(rows)
        except Failed as error:
            failed_together = error
        # call it again, for one answer after the other, to find the row at which it fails
        results = map(partial(call_alone, part), prompts, responses, plain_rows)

    numbers, late = [], []
    for prompt, row, result in zip(prompts, rows, results, strict=True):
        if isinstance(result, Failed):
            where = getattr(row, 'where', '')
            if not where:
                where = f'prompt {shorten(str(prompt), 80)!r}'
            # a KeyError is most often a misspelt column
            hint = ''
            if 'KeyError' in str(result):
                hint = f'; its columns are {", ".join(map(str, row))}'
            raise UserError(f'--reward: {part} fails at {where}: {result}{hint}')
        is_late = result is None
        number = 0.0 if is_late else result
        numbers.append(number)
        late.append(is_late)
    # without workers this line is reached only after the call for all answers has failed
    if not workers:
        raise UserError(f'--reward: {part}: {failed_together}; no answer alone makes it fail')
    return numbers, late


def call_alone(part, prompt, response, row):
    """Call a part's function on one answer. Return its number, or (not raise) the Failed that says why there is none."""
    try:
        (number,) = call(part, [prompt], [response], [row])
        return number
    except Failed as error:
        return error


class Workers:
    """n processes that call a part's function, one answer a call. Each has a thread here, which runs ask and waits for it.

    timeout: seconds that a call may take; None: any number."""

    def __init__(self, part, n, timeout):
        self.part, self.timeout = part, timeout
        self.threads = ThreadPoolExecutor(n)
        # every thread sees a .worker of its own here: (its process, the pipe to it)
        self.of_thread = threading.local()

    def ask(self, prompt, response, row):
        """Have this thread's process call the function. Return its number, None if it is late, or a Failed.

        A thread without a process starts one. A process that is late is killed."""
        if not getattr(self.of_thread, 'worker', None):
            self.of_thread.worker = self._start_worker()
        process, pipe = self.of_thread.worker
        try:
            pipe.send((prompt, response, row))
            if pipe.poll(self.timeout):
                return pipe.recv()
            result = None
        except (EOFError, OSError):
            # the function has ended the process, by os._exit or a crash
            result = Failed(f'its process has ended with code {process.wait()}')

        # kill the process and all that it has started; the thread's next answer gets a new one
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.of_thread.worker = None
        return result

    def _start_worker(self):
        """Start a process that runs _work. Return (process, our end of the pipe to it) once it has loaded the function."""
        ours, theirs = Pipe()
        # it starts in the project's folder, where python finds our modules; _work then goes to the current folder
        command = [sys.executable, '-m', 'rl.reward_functions', str(theirs.fileno()), os.getcwd()]
        command += [self.part.file, self.part.function_or_model]
        # a session of its own: Ctrl-C does not reach it, and ask can kill it with all that it has started
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, start_new_session=True)
        theirs.close()
        # wait for 'ready', so that loading does not count as time of the first call. EOFError: it has ended, which ask will see
        with contextlib.suppress(EOFError):
            ours.recv()
        return process, ours


def _work(fd, folder, file, name):
    """Run a worker process: answer calls of function `name` in file, in this folder, until the pipe (number fd) closes."""
    pipe = Connection(int(fd))
    part = Part(name, 1.0, name, file)
    parent = os.getppid()
    # runtime/guard.py blocks some signals in the parent, and a child inherits that
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    os.chdir(folder)

    def end_with_parent():
        # a process whose parent was killed gets another parent
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    # in a thread, because the function may never return
    threading.Thread(target=end_with_parent, daemon=True).start()
    load_function(file, name)
    pipe.send('ready')
    with contextlib.suppress(EOFError):
        while True:
            prompt, response, row = pipe.recv()
            pipe.send(call_alone(part, prompt, response, row))


if __name__ == '__main__':
    # not _work of this module, which is __main__ here: the parent could not unpickle a Failed of __main__
    from rl import reward_functions

    reward_functions._work(*sys.argv[1:])
