"""Reward functions of your own: --reward=my_rewards.py:exact_match, alone or in a weighted sum.

    def exact_match(prompts, responses, rows):
        return [float(response.strip() == row['answer']) for response, row in zip(responses, rows)]

prompts: text or messages, as the data has them; responses: text; rows: each prompt's row, a dict of all its columns. A function
gives a number for every response. It runs in this process, on all answers of a round at once, or in worker processes, one answer
a call, within a time limit. This file is a worker's script, too, so it imports no torch.
"""

import asyncio
import importlib.util
import inspect
import linecache
import math
import os
import queue
import signal
import site
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from configurator import UserError

ROOT = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """One summand of --reward. name: in the log. what: a function's name, or a model; file: the function's, None of a model."""

    name: str
    weight: float
    what: str
    file: str | None = None

    def __str__(self):
        return f'{self.what} of {self.file}' if self.file else self.what


class Asked(NamedTuple):
    """What a function is told of an answer's prompt: text or messages, and the row of the data, which knows where it stands."""

    prompt: str | list
    row: dict


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
        what, star, weight = (word.strip() for word in term.rpartition('*'))
        what, weight = (what, weight) if star else (weight, '1')
        try:
            weight = float(weight)
        except ValueError:
            weight = math.nan
        if not what or not math.isfinite(weight):
            raise UserError(f"--reward: cannot read {term.strip()!r}: write 'a.py:f*1 + b.py:g*0.2 + out/reward/model'")
        file, colon, name = what.rpartition(':')
        if what.endswith('.py') or file.endswith('.py'):
            parts.append(_function_part(file if colon else what, name if colon else '', weight))
            continue
        # a run's folder stands for the model in it
        inside = f'{what}/model'
        what = inside if os.path.exists(f'{inside}/config.json') else what
        parts.append(Part(Path(what.removesuffix('/model')).name, weight, what))

    # names in the log are different ones
    names = [part.name for part in parts]
    for i, part in enumerate(parts):
        if names.count(part.name) > 1:
            parts[i] = part._replace(name=f'{part.name}_{i + 1}')
    return parts


def _function_part(file, name, weight):
    """The Part of a function, whose file lies here, or in the project's folder."""
    path = Path(file).expanduser()
    places = [place for place in (Path.cwd() / path, ROOT / path) if place.is_file()]
    if not places:
        raise UserError(
            f'--reward: there is no file {file} in {Path.cwd()}: give its path from there, or the whole path'
        )
    if not name.isidentifier():
        raise UserError(f'--reward: say which function of {file}: {file}:NAME')
    return Part(name, weight, name, str(places[0]))


@cache
def load(part):
    """The function of a Part. Its file may import its neighbours. Raises UserError."""
    # behind our own modules, which a neighbour's name must not hide
    site.addsitedir(os.path.dirname(os.path.abspath(part.file)))
    spec = importlib.util.spec_from_file_location(f'reward {part.file}', part.file)
    module = sys.modules.get(spec.name)
    if module is None:
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[spec.name]
            raise UserError(f'--reward: cannot load {part.file}: {_explained(error, part.file)}') from None

    # a function that takes three things
    function = getattr(module, part.what, None)
    if not callable(function):
        own = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != '_']
        raise UserError(f'--reward: {part.file} has no function {part.what}; it has {", ".join(own) or "none"}')
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError:
        takes = f'{part.what}{inspect.signature(function)}'
        raise UserError(f'--reward: {takes} of {part.file} must take (prompts, responses, rows)') from None
    except ValueError:
        pass  # a builtin does not say what it takes
    return function


def load_all(parts):
    """Load the functions among Parts, so that a mistake in one is said before anything else is loaded."""
    for part in parts:
        if part.file:
            load(part)


# ---- one call ----


def call(part, prompts, responses, rows):
    """The numbers that a function gives for these answers. Raises Failed."""
    try:
        found = load(part)(prompts, responses, rows)
        if inspect.isawaitable(found):
            found = asyncio.run(_awaited(found))
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError):
            raise
        raise Failed(_explained(error, part.file)) from None
    return _numbers(found, len(responses))


async def _awaited(found):
    return await found


def _numbers(found, n):
    """n floats of what a function has returned: a list, tuple, array or tensor of finite numbers."""
    values = found.tolist() if hasattr(found, 'tolist') else found
    if not isinstance(values, list | tuple):
        raise Failed(f'it returned {_shown(found)}, where a list of {n} numbers is wanted')
    if len(values) != n:
        raise Failed(f'it returned {len(values)} numbers for {n} answers')
    for value in values:
        # numbers of numpy and torch become those of python
        value = value.item() if hasattr(value, 'item') else value
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Failed(f'it returned {_shown(value)}, where a finite number is wanted')
    return [float(value) for value in values]


def _shown(value):
    return f'{shorten(repr(value), 60)} ({type(value).__name__})' if value is not None else 'None'


def _explained(error, file):
    """An exception in words: its kind and message, and the last line of the user's file that led to it."""
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == file else (frames or [0])[-1]
    said = f'{type(error).__name__}: {getattr(error, "msg", None) or error}'
    code = linecache.getline(file, line).strip()
    return shorten(said, 300) + (f' (line {line}: {shorten(code, 100)})' if line else '')


# ---- all answers of a round ----


def score(part, asked, responses, workers=None):
    """(numbers, which were late, each (n,)) of the answers to what was asked, by a function. workers: Workers, or None: here.

    A late answer, beyond the time limit, gets 0. Raises UserError with the name of the row."""
    prompts, rows = [one.prompt for one in asked], [dict(one.row) for one in asked]
    if workers:
        found = list(workers.threads.map(workers.ask, prompts, responses, rows))
        for one, value in zip(asked, found, strict=True):
            if isinstance(value, Failed):
                raise _at(part, one, value)
        return [value or 0.0 for value in found], [value is None for value in found]
    try:
        return call(part, prompts, responses, rows), [False] * len(asked)
    except Failed as error:
        # which row it is: one after the other
        for one, prompt, response, row in zip(asked, prompts, responses, rows, strict=True):
            try:
                call(part, [prompt], [response], [row])
            except Failed as alone:
                raise _at(part, one, alone) from None
        raise UserError(f'--reward: {part}: {error}; no answer alone makes it fail') from None


def _at(part, one, error):
    """The UserError for an answer to what was asked."""
    where = getattr(one.row, 'where', '') or f'prompt {shorten(str(one.prompt), 80)!r}'
    columns = ', '.join(map(str, one.row))
    missing = f'; its columns are {columns}' if 'KeyError' in str(error) else ''
    return UserError(f'--reward: {part} fails at {where}: {error}{missing}')


class Workers:
    """Processes that run a function, one answer a call. timeout: seconds that a call may take; None: any."""

    def __init__(self, part, n, timeout):
        self.part, self.timeout = part, timeout
        self.threads = ThreadPoolExecutor(n)
        self.free = queue.SimpleQueue()
        for _ in range(n):
            self.free.put(None)  # a process is begun when it is needed

    def ask(self, prompt, response, row):
        """The number for an answer; None where it is late, Failed where there is none."""
        idle = self.free.get()
        worker = process, pipe = idle or self._begin()
        try:
            # a new one says when it has loaded the function: that does not count
            if not idle:
                pipe.recv()
            pipe.send((prompt, response, row))
            if not pipe.poll(self.timeout):
                worker = self._end(worker)
                return None
            return pipe.recv()
        except (EOFError, OSError):
            code = process.wait()
            worker = self._end(worker)
            return Failed(f'its process has ended with code {code}')
        finally:
            self.free.put(worker)

    def close(self):
        """End the processes that are free."""
        while not self.free.empty():
            worker = self.free.get()
            if worker:
                self._end(worker)

    def _begin(self):
        """(a new process, the pipe to it)."""
        ours, theirs = Pipe()
        # python begins in our folder, to find its imports there, and _work goes to where we are
        command = [sys.executable, '-m', 'rl.functions', str(theirs.fileno()), os.getcwd()]
        command += [self.part.file, self.part.what]
        # a session of its own: Ctrl-C is not for it, and what it has begun ends with it
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, start_new_session=True)
        theirs.close()
        return process, ours

    def _end(self, worker):
        """Kill a process and all that it has begun."""
        process, pipe = worker
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        pipe.close()


def _work(fd, folder, file, name):
    """What a worker process does until its pipe closes."""
    pipe, part, parent = Connection(int(fd)), Part(name, 1.0, name, file), os.getppid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())  # guard.py has blocked some in the parent
    os.chdir(folder)

    def watch():
        # an endless call does not outlive a parent that was killed
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        load(part)
    except UserError as error:
        sys.exit(f'error: {error}')
    pipe.send('ready')
    while True:
        try:
            prompt, response, row = pipe.recv()
        except EOFError:
            return
        try:
            (found,) = call(part, [prompt], [response], [row])
        except Failed as error:
            found = error
        pipe.send(found)


if __name__ == '__main__':
    # its classes are those that the parent knows
    from rl import functions

    functions._work(*sys.argv[1:])
