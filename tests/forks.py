"""Processes that need not import torch and transformers, which takes a new python three to five seconds.

They are forked by a helper that was itself forked when the test files had been imported and no test had run: so it has no
threads, no process group and nothing patched."""

import atexit
import gc
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_helper = None  # our end of the pipe to it


def begin():
    """Fork the helper. It ends with this process."""
    global _helper
    _helper, here = multiprocessing.Pipe()
    if os.fork():
        here.close()
        return
    _helper.close()
    try:
        while True:
            function, *arguments = here.recv()
            here.send(function(*arguments))
    finally:
        os._exit(0)  # also where the pipe is closed


def _ask(*call):
    """Have a function called by the helper. Returns what it returns."""
    _helper.send(call)
    return _helper.recv()


def together(jobs, seconds=500):
    """Run jobs, each (function, argument, ...), in a process each, until all have ended or one has failed. Returns exit codes."""
    return _ask(_run, jobs, seconds)


class Popen:
    """What subprocess.Popen(['python', *words], ...) is, so far as tests ask for it. It leads a session of its own."""

    def __init__(self, words, cwd, env, log):
        self.returncode = None
        self.pid = _ask(_fork, (_alone, words, str(cwd), env, [log, log]))

    def poll(self):
        if self.returncode is None:
            self.returncode = _ask(_ended, self.pid)
        return self.returncode

    def wait(self, seconds=500):
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.poll()

    def send_signal(self, number):
        os.kill(self.pid, number)


def python(*words, cwd=ROOT, **environment):
    """Do what `python WORDS` does in a process of its own. Returns a CompletedProcess, with its text."""
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    words = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ('out', 'err')]
        (code,) = together([(_python, words, str(cwd), environment, said)])
        return subprocess.CompletedProcess(words, code, *(file.read_text() for file in said))


def _fork(job):
    """Do a job in a new process. Returns its id."""
    pid = os.fork()
    if not pid:
        function, *arguments = job
        os._exit(_exit_code(function, arguments))
    return pid


def _ended(pid):
    """Return the exit code of a child, or None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _run(jobs, seconds):
    codes, deadline = dict.fromkeys(map(_fork, jobs)), time.monotonic() + seconds
    # one that fails leaves the others waiting for it; they may also wait for each other
    while None in codes.values() and not any(codes.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
        for pid in [pid for pid, code in codes.items() if code is None]:
            codes[pid] = _ended(pid)
    for pid in [pid for pid, code in codes.items() if code is None]:
        os.kill(pid, 9)
        codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return list(codes.values())


def _exit_code(function, arguments):
    """Call it, and end as an interpreter does. Returns the exit code."""
    atexit._clear()
    code = 0
    try:
        function(*arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr, flush=True)
    return 1


def _alone(*arguments):
    """Call _python in a session of its own."""
    os.setsid()
    _python(*arguments)


def _python(words, folder, environment, said):
    """Run a script, -m MODULE or -c CODE, with the modules of this project imported anew."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, '__file__', None) or ''
        if file.startswith(str(ROOT)) and 'site-packages' not in file:
            del sys.modules[name]
    gc.enable()
    # what pytest has put in the place of python's own
    for number, file in enumerate(said, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdin, sys.stdout = open(os.devnull), open(1, 'w', closefd=False)
    sys.stderr = open(2, 'w', buffering=1, errors='backslashreplace', closefd=False)
    logging.getLogger('transformers').handlers[0].setStream(sys.stderr)
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    warnings.showwarning = warnings._showwarning_orig

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    first, *rest = words
    sys.argv = [first, *rest[1:]] if first in ('-m', '-c') else words
    others = [path for path in sys.path if 'site-packages' in path or not path.startswith(str(ROOT))]
    sys.path[:] = [os.path.dirname(os.path.abspath(first)) if first.endswith('.py') else '', *others]
    if first == '-m':
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    elif first == '-c':
        exec(compile(rest[0], '<string>', 'exec'), vars(sys.modules['__main__']))
    else:
        runpy.run_path(first, run_name='__main__')
