"""End a run early, at a signal, a full disk or NaN, without losing progress. errors.py has its messages.

A signal exits at once while there is nothing to lose. During training the run finishes its step, saves, and exits with
code 75 (130 after Ctrl-C); the same command resumes it. A second Ctrl-C exits at once. Scripts import this module first, and
call watch(): torch etc. are imported inside the functions."""

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


def watch(name):
    """Set up a script before its heavy imports: streams, GPU memory, signals. Answer --help and refuse mistyped options at once.

    Does nothing unless name is '__main__'."""
    if name != '__main__':
        return
    # replace a stream that the shell has closed (>&-): the next open file would get its number, and all that is printed
    for stream_name in ('stdin', 'stdout', 'stderr'):
        if getattr(sys, stream_name) is None:
            stream = open(os.devnull, 'r' if stream_name == 'stdin' else 'w')
            os.set_inheritable(stream.fileno(), True)  # children need it, too
            setattr(sys, stream_name, stream)
            setattr(sys, f'__{stream_name}__', stream)
    # a terminal that has no é shows \xe9; a notebook's stream cannot be set
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors='backslashreplace')
    # on a GPU: less fragmented memory when batch sizes vary. Keep the user's setting (new or old name), if any
    if 'PYTORCH_CUDA_ALLOC_CONF' not in os.environ:
        os.environ.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')
    _listen()
    # python -c has no file to read options from
    script = getattr(sys.modules['__main__'], '__file__', None)
    if script:
        check_early(script)


def _listen():
    """Have a thread call on_signal(): the main thread may be in C code for minutes (a rendezvous), where Python runs no handlers."""
    global SIGNALS
    # nohup ignores SIGHUP, the last of SIGNALS, so that a run outlives its terminal
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        SIGNALS = SIGNALS[:3]

    def listen():
        while True:
            on_signal(signal.sigwait(SIGNALS))

    # in a forked child, which has no such thread, signals do what they do in any program
    def restore_defaults():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    # these handlers run inside unblocked() only
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: on_signal(received))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=listen, daemon=True).start()
    os.register_at_fork(after_in_child=restore_defaults)


@contextlib.contextmanager
def unblocked():
    """Context manager for user code: unblock SIGNALS, since the child processes that it may start would inherit blocked ones."""
    blocked_before = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def on_signal(number):
    """Handle a stop signal: exit at once, or set the exit code with which the training loop stops after this step."""
    global _code
    if _stage == 'over':
        return
    # _code is still that of earlier signals. torchrun forwards a second Ctrl-C as SIGTERM
    is_first_signal = _code == 0
    is_second_interrupt = _code == INTERRUPTED and number in (signal.SIGINT, signal.SIGTERM)
    exits_now = is_second_interrupt or _stage == 'loading'
    _code = max(_code, INTERRUPTED if number == signal.SIGINT else SAVED)
    message = f'{signal.Signals(number).name}: stopping after this step (Ctrl-C twice: at once, without saving)'
    if is_second_interrupt:
        message = 'SIGINT again: stopped at once: steps since the last checkpoint are lost'
    elif exits_now:
        message = f'{signal.Signals(number).name}: stopped'
    # os.write: print could deadlock, if the main thread holds the lock of stderr. OSError: nobody reads any more
    with contextlib.suppress(OSError):
        if main_rank():
            if exits_now or is_first_signal:
                os.write(2, f'\n{message}\n'.encode())
            if exits_now and _progress:
                os.write(1, f'{_progress()}\n'.encode())
    if exits_now:
        os._exit(_code)


def on_stop(progress):
    """Have a signal print the sentence that progress() returns before it ends the script. For scripts without training steps."""
    global _progress
    _progress = progress


def stop_asked_here():
    """Return whether this process has received a stop signal. Other ranks may not have; stop_asked() is collective."""
    return _code != 0


def stop_asked():
    """Return the largest exit code requested by a signal on any rank, or 0. UserError if a checkpoint has failed. Collective."""
    from runtime import checkpoint, ranks

    code, any_failed = ranks.largest([_code, int(checkpoint.failed())])
    # wait() raises the failed checkpoint's error, on all ranks
    if any_failed:
        checkpoint.wait()
    return code


def check_early(script):
    """Validate the command line of a script without running its slow imports. Exits on --help; raises UserError."""
    source = Path(script).read_text('utf-8')
    # find the script's own call: configure(globals()) or configure(globals(), shared=training). Scripts that pass other arguments
    # (plot.py, report.py) check their command line later
    call = re.search(r'configure\(globals\(\)(?:, shared=(\w+))?\)', source)
    if not call:
        return
    # make the same call here. configure() parses the source at __file__, so neither the script nor the shared module has to run
    script_globals = {'__file__': script, '__doc__': ast.get_docstring(ast.parse(source))}
    module_file = Path(script).resolve().with_name(f'{call[1]}.py')
    shared = types.SimpleNamespace(__file__=module_file) if call[1] else None
    configure(script_globals, shared=shared, early=True)
    os.getcwd()  # raises an error that errors.py explains
    if sys.flags.optimize > 1:
        raise UserError('transformers needs the docstrings that python -OO (PYTHONOPTIMIZE=2) drops: leave it out')


def begin(out_dir, config, resume):
    """Prepare for a run: forget signals, check and lock out_dir. resume: it may hold this run, unfinished. Collective."""
    from runtime import ranks

    # one process may do several runs in a row
    global _code, _stage
    _code = 0
    _stage = 'loading'

    def check_and_lock():
        log.check_out_dir(out_dir, config, resume)
        files.lock(out_dir)
        # again: the run that held the lock may have ended while this one waited
        log.check_out_dir(out_dir, config, resume)

    ranks.on_rank_0(check_and_lock)


def obey_signals(save, close, already_started=False):
    """Call this after every step: if a signal has asked for it, save, close the trackers and exit. Collective.

    save(): starts a checkpoint of this step; already_started: it was due, so save() has been called; close(): closes the trackers."""
    from runtime import ranks

    global _stage
    # from now on a signal waits for the end of a step
    _stage = 'training'
    code = stop_asked()
    if code:
        save_persistently(save, already_started)
        close()
        say('saved: the same command continues from here')
        ranks.leave(code)


def save_persistently(save, already_started=False):
    """Write a checkpoint, retrying every PAUSE seconds, since the latest steps exist only in memory. Collective.

    save(): starts a checkpoint; already_started: it was called. A signal (after others: Ctrl-C) leaves one last try; then UserError."""
    from runtime import checkpoint, ranks

    # exit code of earlier signals, as from stop_asked(). That function would raise the error of a failed checkpoint here, and not
    # below, where it is caught
    (code_before,) = ranks.largest([_code])
    is_last_try = has_warned = False
    while True:
        try:
            if not already_started:
                save()
            already_started = False
            # raises UserError if the checkpoint fails
            checkpoint.wait()
            return
        except UserError as error:
            if is_last_try:
                raise UserError(f'{error}. Given up: the training since the last checkpoint is lost') from None
            if not has_warned:
                hint = f'make room; saving is tried again every {PAUSE} seconds, until a signal (Ctrl-C) gives it up'
                say(f'warning: {error}. The training is kept in memory: {hint}')
            has_warned = True
        # sleep, but no longer than until a signal with a larger exit code
        for _second in range(PAUSE):
            time.sleep(1)
            is_last_try = stop_asked() > code_before
            if is_last_try:
                break


def export(model, write, save):
    """Write waiting log rows, then return write(), which exports the model. If one fails, save() a checkpoint, then UserError."""
    from hf.load import without_value_head
    from runtime import ranks

    try:
        ranks.on_rank_0(files.append_kept)
        with without_value_head(model):
            return write()
    except UserError as error:
        save_persistently(save)
        raise UserError(f'{error}. The training is in a checkpoint: the same command writes the model') from None


def end():
    """Unlock out_dir and ignore further signals. Called last, when model and checkpoints are written."""
    global _stage
    _stage = 'over'
    files.unlock()


def bad_step(run, first, rows, columns):
    """Count a step of a training.Run whose loss or gradient is not finite, or whose weight is 0, and say so. Collective.

    first: examples before it; rows (n,): indices in run.train; columns: name -> (n,). UserError if more than --skip_bad_steps."""
    import torch

    # step_weight is NaN for all examples of a step if the loss of one is: it does not say which
    telling = columns.keys() - {'step_weight'}
    is_bad = torch.stack([~columns[name].isfinite() for name in telling]).any(0)  # (n,)
    quantity = 'loss' if is_bad.any() else 'gradient'
    state = 'not finite'
    if 'step_weight' in columns and not columns['step_weight'].any():
        quantity, state = 'weight', '0'
    # neither a gradient nor a weight can be traced to single examples: record them all
    slots = is_bad.nonzero().flatten().tolist() or range(len(rows))
    file = Path(run.config.out_dir) / 'bad_step.jsonl'
    last = min(first + run.config.batch_size, run.total)  # in ppo.py the end of its round
    for slot in slots:
        row = int(rows[slot])
        record = {'examples': last, 'what': quantity, 'place': slot, 'index': row, 'uid': int(run.train.uid[row])}
        numbers = {name: values[slot].item() for name, values in columns.items()}
        numbers['grad_norm'] = run.norm
        # JSON has no NaN or infinity: write them as strings
        record |= {name: number if math.isfinite(number) else str(number) for name, number in numbers.items()}
        if main_rank():
            files.append(file, json.dumps(record) + '\n')
    run.state['bad_steps'] += 1
    count = run.state['bad_steps']
    allowed = run.config.skip_bad_steps
    sentence = f'the {quantity} of a step from {first} to {last} examples is {state}'
    written = f'{file} has {len(slots)} of its examples'
    if count > allowed:
        advice = f'look at them, lower the learning rate, or allow more than --skip_bad_steps={allowed}'
        raise UserError(f'{sentence}; {written}: {advice}')
    say(f'warning: {sentence}; {written}: skipped, {count} of {allowed} allowed')
