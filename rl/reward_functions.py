"""Reward functions of your own: --reward=my_rewards.py:exact_match, alone or in a weighted sum.

    def exact_match(prompts, responses, rows):
        return [float(response.strip() == row['answer']) for response, row in zip(responses, rows)]

prompts: text or messages, as the data has them; responses: text; rows: each prompt's row, a dict of all its columns. A function
gives a number for every response. It runs in this process, on all answers of a round at once, or in worker processes, one answer
a call, within a time limit. This file is a worker's script, too, so it imports no torch.
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
    """One summand of --reward. name: in the log. what: a function's name, or a model; file: the function's, None of a model."""

    name: str
    weight: float
    what: str
    file: str | None = None

    def __str__(self):
        return f'{self.what} of {self.file}' if self.file else self.what


class Failed(Exception):
    """Why a function gives no number, as a sentence without its subject."""


# ---- the option ----


def asked_for(config, eval_data):
    """The Parts that --reward or --reward_model of ppo.py asks for. Raises UserError."""
    reward, model = config.reward, config.reward_model
    if reward and model:
        raise UserError(f"--reward and --reward_model both score: write one sum, --reward='{reward} + {model}'")
    if not (reward or model or config.offline):
        hint = '--reward=FILE.py:FUNCTION, or --reward_model=FOLDER (of reward.py), or gold for the toy world'
        raise UserError(f'nothing scores the answers: give {hint}')
    parts = parse(reward or model) if reward or model else []
    models = [part.what for part in parts if not part.file]
    if 'gold' in models and {config.data, eval_data or config.data} != {'toy'}:
        raise UserError('the reward gold is known for --data=toy alone: give a function, or a folder of reward.py')
    # a resumed run checks that the files of a reward model are the same
    if len(models) == 1:
        config['reward_model'] = models[0]
    if len(models) == len(parts):
        config.ignored(['reward_workers', 'reward_timeout'], 'no function of your own is in --reward')
    return parts


def parse(text):
    """The Parts of 'a.py:f*1 + b.py:g*0.2 + out/reward/model'. Raises UserError."""
    parts = []
    for term in text.split('+'):
        what, star, weight = term.partition('*')
        what = what.strip()
        try:
            weight = float(weight) if star else 1.0
        except ValueError:
            weight = math.nan
        if not what or not math.isfinite(weight):
            raise UserError(f"--reward: cannot read {term.strip()!r}: write 'a.py:f*1 + b.py:g*0.2 + out/reward/model'")
        parts.append(_part(what, weight))

    # names in the log are different ones
    names = [part.name for part in parts]
    for i, part in enumerate(parts):
        if names.count(part.name) > 1:
            parts[i] = part._replace(name=f'{part.name}_{i + 1}')
        # one rank calls the functions, and says their mistakes now
        if part.file and main_rank():
            load(part.file, part.what)
    return parts


def _part(what, weight):
    """The Part of FILE.py:FUNCTION, whose file lies here or in the project's folder, or of a model. Raises UserError."""
    if '.py:' not in f'{what}:':
        # a run's folder stands for the model in it
        inside = f'{what}/model'
        what = inside if os.path.exists(f'{inside}/config.json') else what
        return Part(Path(what.removesuffix('/model')).name, weight, what)
    file, _, name = what.partition('.py:')
    file = file.removesuffix('.py') + '.py'
    path = Path(file).expanduser()
    places = [place for place in (Path.cwd() / path, ROOT / path) if place.is_file()]
    if not places:
        here = f'there is no file {file} in {Path.cwd()}'
        raise UserError(f'--reward: {here}: give its path from there, or the whole path')
    if not name.isidentifier():
        raise UserError(f'--reward: say which function of {file}: {file}:NAME')
    return Part(name, weight, name, str(places[0]))


@cache
def load(file, name):
    """The function of this name in a file, which may import its neighbours. Raises UserError."""
    # neighbours come behind our own modules, which no name of theirs must hide
    site.addsitedir(os.path.dirname(os.path.abspath(file)))
    spec = importlib.util.spec_from_file_location(f'reward {file}', file)
    module = sys.modules.get(spec.name)
    if module is None:
        # a dataclass looks for its module there while the file is read
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            with guard.unblocked():
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[spec.name]
            raise UserError(f'--reward: cannot load {file}: {_explained(error, file)}') from None

    function = getattr(module, name, None)
    if not callable(function):
        own = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != '_']
        raise UserError(f'--reward: {file} has no function {name}; it has {", ".join(own) or "none"}')
    return function


# ---- one call ----


def call(part, prompts, responses, rows):
    """The numbers that a function gives for these answers. Raises Failed."""
    function = load(part.file, part.what)
    try:
        with guard.unblocked():
            found = function(prompts, responses, rows)
            if inspect.iscoroutine(found):
                found = asyncio.run(found)
    except (Exception, SystemExit) as error:
        raise Failed(_explained(error, part.file)) from None

    # numbers of numpy and torch become those of python
    values = found.tolist() if hasattr(found, 'tolist') else found
    if not isinstance(values, list | tuple) or len(values) != len(responses):
        raise Failed(f'it returned {shorten(repr(found), 60)}, where a list of {len(responses)} numbers is wanted')
    values = [value.item() if hasattr(value, 'item') else value for value in values]
    for value in values:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Failed(f'it returned {shorten(repr(value), 60)}, where a finite number is wanted')
    return [float(value) for value in values]


def _explained(error, file):
    """An exception in words: its kind and message, and the last line of the user's file that led to it."""
    said = shorten(f'{type(error).__name__}: {error}', 300)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f'{said} (line {frames[-1].lineno}: {shorten(frames[-1].line, 100)})' if frames else said


# ---- all answers of a round ----


def score(part, prompts, responses, rows, workers=None):
    """(numbers, which were late, each (n,)) of answers by a function. workers: Workers, or None: here.

    A late answer, beyond the time limit, gets 0. Raises UserError with the place of the row."""
    plain = [dict(row) for row in rows]
    if workers:
        one_by_one = workers.threads.map(workers.ask, prompts, responses, plain)
    else:
        try:
            return call(part, prompts, responses, plain), [False] * len(rows)
        except Failed as error:
            whole = error
        # again, one after the other, to find the row that fails
        one_by_one = map(partial(alone, part), prompts, responses, plain)

    found = []
    for prompt, row, value in zip(prompts, rows, one_by_one, strict=True):
        if isinstance(value, Failed):
            where = getattr(row, 'where', '') or f'prompt {shorten(str(prompt), 80)!r}'
            columns = f'; its columns are {", ".join(map(str, row))}' if 'KeyError' in str(value) else ''
            raise UserError(f'--reward: {part} fails at {where}: {value}{columns}')
        found.append(value)
    if not workers:
        raise UserError(f'--reward: {part}: {whole}; no answer alone makes it fail')
    return [value or 0.0 for value in found], [value is None for value in found]


def alone(part, prompt, response, row):
    """The number for one answer, or the Failed that says why there is none."""
    try:
        (number,) = call(part, [prompt], [response], [row])
        return number
    except Failed as error:
        return error


class Workers:
    """Processes that run a function, one answer a call. timeout: seconds that a call may take; None: any."""

    def __init__(self, part, n, timeout):
        self.part, self.timeout = part, timeout
        self.threads = ThreadPoolExecutor(n)
        self.own = threading.local()  # a thread's process, and the pipe to it

    def ask(self, prompt, response, row):
        """The number for an answer; None where it is late, Failed where there is none."""
        if not getattr(self.own, 'worker', None):
            self.own.worker = self._begin()
        process, pipe = self.own.worker
        try:
            pipe.send((prompt, response, row))
            if pipe.poll(self.timeout):
                return pipe.recv()
            found = None
        except (EOFError, OSError):
            found = Failed(f'its process has ended with code {process.wait()}')

        # it ends with all that it has begun, and the next answer gets a new one
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.own.worker = None
        return found

    def _begin(self):
        """(a new process, the pipe to it)."""
        ours, theirs = Pipe()
        # python begins in our folder, to find its imports there, and _work goes to where we are
        command = [sys.executable, '-m', 'rl.reward_functions', str(theirs.fileno()), os.getcwd()]
        command += [self.part.file, self.part.what]
        # a session of its own: Ctrl-C is not for it, and what it has begun ends with it
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, start_new_session=True)
        theirs.close()
        # it says when it has loaded the function, which takes time that is not the call's; or it has ended
        with contextlib.suppress(EOFError):
            ours.recv()
        return process, ours


def _work(fd, folder, file, name):
    """What a worker process does until its pipe closes."""
    pipe, part, parent = Connection(int(fd)), Part(name, 1.0, name, file), os.getppid()
    # guard.py has blocked some signals in the parent, which this process has inherited
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    os.chdir(folder)

    def watch():
        # an endless call does not outlive a parent that was killed
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    load(file, name)
    pipe.send('ready')
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(alone(part, *pipe.recv()))


if __name__ == '__main__':
    # its classes are those that the parent knows
    from rl import reward_functions

    reward_functions._work(*sys.argv[1:])
