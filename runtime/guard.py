"""What can end a run early (signals, full disks, NaN), and how it ends without losing progress. errors.py has its messages.

A signal exits at once while there is nothing to lose. During training the run finishes its step, saves, and exits with
code 75 (130 after Ctrl-C); the same command resumes it. A second Ctrl-C exits at once.

Scripts import this module first and call watch(), so torch etc. are imported inside the functions."""

import ast
import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
import types
from pathlib import Path

from configurator import UserError, configure, main_rank
from runtime import files, log
from runtime.files import say

# exit codes of a run that was stopped and has saved; with several signals, on any ranks, the larger code wins
SAVED = 75  # after SIGTERM, SIGUSR1 or SIGHUP: start the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # after Ctrl-C, as in a shell
PAUSE = 20  # seconds between attempts to write a checkpoint that must not be lost
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_stage = 'loading'  # 'loading': nothing to lose; 'training': unsaved steps; 'over': all is written, ignore signals
_code = 0  # exit code requested by the signals so far; 0: no signal
_progress = None  # for scripts without steps: function that returns a sentence about what is kept


# ---- startup and signals ----


def watch(name):
    """Set up signal handling and validate the command line before heavy imports; no-op unless name is '__main__'."""
    if name != '__main__':
        return
    # open a stream that the shell has closed (>&-): the next file would get its number, and all that is printed
    for stream_name in ('stdin', 'stdout', 'stderr'):
        if getattr(sys, stream_name) is None:
            stream = open(os.devnull, 'r' if stream_name == 'stdin' else 'w')
            os.set_inheritable(stream.fileno(), True)  # children need it, too
            setattr(sys, stream_name, stream)
            setattr(sys, f'__{stream_name}__', stream)
    # on a GPU: less fragmented memory when batch sizes vary. Keep the user's setting (new or old name), if any
    if 'PYTORCH_CUDA_ALLOC_CONF' not in os.environ:
        os.environ.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')

    # nohup: a run that outlives its terminal
    global SIGNALS
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        SIGNALS = SIGNALS[:3]

    # a thread waits for the SIGNALS (SIGTERM, SIGUSR1, SIGINT, SIGHUP), which all others block: the main thread may be in C code for
    # minutes (such as a rendezvous), where Python runs no handlers
    def listen():
        while True:
            on_signal(signal.sigwait(SIGNALS))

    # in a forked child, which has no such thread, signals do what they do in any program
    def restore_defaults():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    # these handlers are for user code inside unblocked() only
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: on_signal(received))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=listen, daemon=True).start()
    os.register_at_fork(after_in_child=restore_defaults)
    # python -c has no file to read options from
    script = getattr(sys.modules['__main__'], '__file__', None)
    if script:
        check_early(script)


@contextlib.contextmanager
def unblocked():
    """Context manager that unblocks the signals that watch() has blocked, around user code: its child processes would inherit that."""
    blocked_before = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def on_signal(number):
    """Handle a stop signal: exit at once, or set _code, an exit code, so that the training loop stops after this step."""
    global _code
    if _stage == 'over':  # all is written
        return
    # an earlier Ctrl-C has set _code. torchrun forwards the second one as SIGTERM; the others come from a scheduler or a terminal
    is_second_interrupt = _code == INTERRUPTED and number in (signal.SIGINT, signal.SIGTERM)
    exits_now = is_second_interrupt or _stage == 'loading'  # nothing to lose yet
    is_first_signal = _code == 0
    _code = max(_code, INTERRUPTED if number == signal.SIGINT else SAVED)  # 130 or 75
    message = 'stopping after this step (Ctrl-C twice: at once, without saving)'
    if is_second_interrupt:
        message = 'stopped at once: steps since the last checkpoint are lost'
    elif exits_now:
        message = 'stopped'
    # os.write, because print could deadlock if the main thread holds the lock of stderr. A terminal or a reader may be gone
    with contextlib.suppress(OSError):
        if main_rank() and (exits_now or is_first_signal):
            os.write(2, f'\n{signal.Signals(number).name}: {message}\n'.encode())
        if exits_now and main_rank() and _progress:
            os.write(1, f'{_progress()}\n'.encode())
    if exits_now:
        os._exit(_code)


def on_stop(progress):
    """Set progress(), which returns the sentence to print when a signal ends a script that has no training steps."""
    global _progress
    _progress = progress


def asked_here():
    """Return whether this process has received a stop signal. Other ranks may not have; stop_asked() is collective."""
    return _code != 0


def stop_asked():
    """Return the largest exit code requested by a signal on any rank, or 0. UserError if a checkpoint has failed. Collective."""
    from runtime import checkpoint, ranks

    code, any_failed = ranks.largest([_code, int(checkpoint.failed())])
    if any_failed:
        checkpoint.wait()  # raises the error, on all ranks
    return code


def check_early(script):
    """Validate the command line of a script without running its slow imports. Exits on --help; raises UserError."""
    source = Path(script).read_text('utf-8')
    # the script's own call: configure(globals()) or configure(globals(), shared=training). Scripts that pass other arguments
    # (plot.py, report.py) check their command line later
    call = re.search(r'configure\(globals\(\)(?:, shared=(\w+))?\)', source)
    if not call:
        return
    # make that call with stand-ins for globals() and for the shared module: configure() only reads the source at their __file__
    script_globals = {'__file__': script, '__doc__': ast.get_docstring(ast.parse(source))}
    name = call[1]  # of the shared module; None if there is none
    shared = name and types.SimpleNamespace(__file__=Path(script).with_name(f'{name}.py'))
    configure(script_globals, shared=shared, early=True)


# ---- a run and its folder ----


def begin(out_dir, config, resume):
    """Reset the signal state and lock out_dir. resume: it may hold an unfinished run. Collective."""
    from runtime import ranks

    # one process may do several runs in a row
    global _code, _stage
    _code = 0
    _stage = 'loading'

    def take():
        log.check_out_dir(out_dir, config, resume)
        log.check_names(out_dir)
        files.lock(out_dir)
        # again: the run that held the lock may have ended while this one waited
        log.check_out_dir(out_dir, config, resume)

    ranks.on_one_rank(take)


def boundary(save, close, already_started=False):
    """If a signal has asked for it, save, close the trackers and exit. Collective; call it after every step.

    save(): starts a checkpoint of this step; already_started: save() has been called; close(): flushes the trackers."""
    from runtime import ranks

    global _stage
    _stage = 'training'  # from now on a signal waits for the end of the step
    code = stop_asked()
    if code:
        keep(save, already_started)
        close()
        say('saved: the same command continues from here')
        ranks.leave(code)


def keep(save, already_started=False):
    """Write a checkpoint, retrying every PAUSE seconds, since the latest steps exist only in memory. Collective.

    save(): starts a checkpoint; already_started: the caller has called it, for the first try. During the retries the first signal,
    and after others the first Ctrl-C, leaves one last try: raises UserError if that fails."""
    from runtime import checkpoint, ranks

    # largest exit code of a signal so far, on any rank: 0, SAVED or INTERRUPTED. Not stop_asked(): it would raise the error of an
    # earlier checkpoint, which is to be caught below, by save() or wait()
    (code_before,) = ranks.largest([_code])
    is_last_try = has_warned = False
    while True:
        try:
            if not already_started:
                save()
            already_started = False
            checkpoint.wait()
            return
        except UserError as error:
            if is_last_try:
                raise UserError(f'{error}. Given up: what was trained since the last checkpoint is lost') from None
            if not has_warned:
                hint = f'make room; saving is tried again every {PAUSE} seconds, until a signal (Ctrl-C) gives it up'
                say(f'warning: {error}. What was trained is kept in memory: {hint}')
            has_warned = True
        # sleep for PAUSE seconds, or until a signal with a larger exit code (stop_asked() returns that of all ranks)
        for _second in range(PAUSE):
            time.sleep(1)
            is_last_try = stop_asked() > code_before
            if is_last_try:
                break


def export(model, write, save):
    """Write log rows that wait for disk space, then export the model by write(), and return what that returns. Collective.

    If write() fails, write a checkpoint, which save() starts, and raise UserError."""
    from hf.load import without_value_head
    from runtime import ranks

    try:
        ranks.on_one_rank(files.append_kept)
        with without_value_head(model):
            return write()
    except UserError as error:
        keep(save)
        raise UserError(f'{error}. What was trained is in a checkpoint: the same command writes the model') from None


def end():
    """Unlock out_dir and ignore further signals. Called last, when model and checkpoints are written."""
    global _stage
    _stage = 'over'
    files.unlock()


# ---- errors and bad numbers ----


def finite(columns):
    """Return whether no tensor in columns (name -> tensor) holds NaN or infinity."""
    return all(bool(values.isfinite().all()) for values in columns.values())


def bad_step(run, first, rows, columns):
    """Count a step of a training.Run whose loss or gradient is not finite, and say so. Collective.

    first: examples before this step. Of its examples: rows (indices in run.train) and columns (name -> tensor). Appends those that
    are not finite, or all if only the gradient is not, to out_dir/bad_step.jsonl. UserError after more than --skip_bad_steps."""
    import torch

    # without step_weight: Dr. DPO's weights of all examples are no numbers where one loss is none
    own = columns.keys() - {'step_weight'}
    is_bad = torch.stack([~columns[name].isfinite() for name in own]).any(0)  # (examples,)
    quantity = 'loss' if is_bad.any() else 'gradient'
    # a gradient cannot be traced to single examples: record them all
    places = is_bad.nonzero().flatten().tolist() or range(len(rows))
    file = Path(run.config.out_dir) / 'bad_step.jsonl'
    last = first + len(rows)
    for place in places:
        index = int(rows[place])
        row = {'examples': last, 'what': quantity, 'place': place, 'index': index, 'uid': int(run.train.uid[index])}
        numbers = {name: values[place].item() for name, values in columns.items()}
        numbers['grad_norm'] = run.norm
        # JSON has no NaN or infinity: write them as strings
        for name, number in numbers.items():
            row[name] = number if math.isfinite(number) else str(number)
        if main_rank():
            files.append(file, json.dumps(row) + '\n')
    run.state['bad_steps'] += 1
    count = run.state['bad_steps']
    allowed = run.config.skip_bad_steps
    sentence = f'the {quantity} of the step from {first} to {last} examples is not finite'
    written = f'{file} has {len(places)} of its examples'
    if count > allowed:
        hint = f'lower the learning rate, or allow more than --skip_bad_steps={allowed}'
        raise UserError(f'{sentence}; {written}: look at them, {hint}')
    say(f'warning: {sentence}; {written}: skipped, {count} of {allowed} allowed')
