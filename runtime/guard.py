"""Signals, full disks, bad numbers and too little memory: what can end a run early, and how it ends without loss.

A signal (SIGTERM, SIGUSR1, Ctrl-C) ends a process at once as long as nothing can be lost. Once there are steps, the run finishes its
step, saves, and leaves with code 75 (130 after Ctrl-C); the same command continues it. A second Ctrl-C does not wait for the step.

Scripts import this file first and call watch(). So it imports nothing heavy: functions import torch where they use it. A
training run then calls begin(), boundary() after every step, export() and end()."""

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

# exit codes of a run that was stopped and has saved. Of several signals, on any ranks, the one with the larger code counts
SAVED = 75  # after SIGTERM or SIGUSR1: start the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # after Ctrl-C, the shell's own code for it
PAUSE = 20  # seconds between two tries to write a checkpoint that must not be lost
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_stage = 'loading'  # nothing can be lost; 'training': steps can; 'over': everything is written, and signals are ignored
_code = 0  # the exit code that a signal to this process asks for; 0: no signal has come
_progress = None  # of a script without steps: a function that returns a sentence about what is kept


# ---- signals ----


def watch(name):
    """Obey signals from now on, and check the command line, before a script imports anything heavy. Raises UserError.

    name: the script's __name__. Does nothing unless it is '__main__'. Also sets how torch will allocate a GPU's memory."""
    if name != '__main__':
        return
    # memory that grows in place gets no holes between batches of different sizes. torch reads this once, when it is imported; a
    # user may have set it under this name, or under the older one
    if 'PYTORCH_CUDA_ALLOC_CONF' not in os.environ:
        os.environ.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')

    # all threads block signals, and one waits for them: the main thread may be inside C code for minutes, as in a rendezvous,
    # where python runs no handler. These handlers run only inside of unblocked()
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: on_signal(received))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_listen, daemon=True).start()
    os.register_at_fork(after_in_child=_as_any_process)

    # with python -c there is no file to read options from
    script = getattr(sys.modules['__main__'], '__file__', None)
    if script:
        check_early(script)


def _listen():
    """Wait for signals for ever, in a thread of its own, and obey each."""
    while True:
        on_signal(signal.sigwait(SIGNALS))


def _as_any_process():
    """Undo watch() in a forked child, where no thread listens: there a signal does what it does in any process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def unblocked():
    """Let signals reach the main thread while the user's own code runs, as a context manager.

    A process that this code starts inherits the blocked signals. Without this, no signal could end it."""
    blocked_before = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def on_signal(number):
    """Handle a stop signal: exit at once if nothing can be lost or on a second Ctrl-C, else request a stop after this step.

    The training loop sees the request through stop_asked(). Writes to stderr what happens next."""
    global _code
    if _stage == 'over':
        return
    # torchrun forwards a second Ctrl-C as SIGTERM; SIGUSR1 comes from a cluster scheduler, not from an impatient user
    is_second_interrupt = _code == INTERRUPTED and number != signal.SIGUSR1
    exits_now = is_second_interrupt or _stage == 'loading'
    is_first_signal = _code == 0
    _code = max(_code, INTERRUPTED if number == signal.SIGINT else SAVED)

    message = 'stopping after this step (Ctrl-C twice: at once, without saving)'
    if is_second_interrupt:
        message = 'stopped at once: steps since the last checkpoint are lost'
    elif exits_now:
        message = 'stopped'
    # os.write, because print could deadlock while the main thread holds its lock
    if main_rank() and (exits_now or is_first_signal):
        os.write(2, f'\n{signal.Signals(number).name}: {message}\n'.encode())
    if main_rank() and exits_now and _progress:
        os.write(1, f'{_progress()}\n'.encode())
    if exits_now:
        os._exit(_code)


def on_stop(progress):
    """Set what is printed when a signal ends a script without steps: the sentence that progress() returns about what is kept.

    Such a script never calls boundary(), so a signal always ends it at once."""
    global _progress
    _progress = progress


def asked_here():
    """Return whether a signal has told this process to stop. Ranks may differ: stop_asked() gives all of them one answer."""
    return _code != 0


def stop_asked():
    """Return the exit code that signals to any of the ranks ask for, or 0. Call it on all ranks together; all get the same.

    Raises UserError, on all ranks, if the checkpoint that is being written has failed."""
    import fsdp
    from runtime import checkpoint

    code, any_failed = fsdp.largest([_code, int(checkpoint.failed())])
    # wait() raises the error
    if any_failed:
        checkpoint.wait()
    return code


# ---- the first second, and the last ----


def check_early(script):
    """Validate the command line against a script's options without running its slow imports.

    script: path of the script. Prints the help and exits on --help; raises UserError for an invalid command line."""
    source = Path(script).read_text('utf-8')
    # scripts that pass configure() only part of the command line (plot.py, report.py) do not match and are checked later
    call = re.search(r'configure\(globals\(\)(?:, shared=(\w+))?\)', source)
    if not call:
        return
    # configure() parses the options from the source at __file__, so stand-ins with a __file__ replace the unimported modules
    script_globals = {'__file__': script, '__doc__': ast.get_docstring(ast.parse(source))}
    shared_name = call[1]
    shared_module = None
    if shared_name:
        shared_module = types.SimpleNamespace(__file__=Path(script).with_name(f'{shared_name}.py'))
    configure(script_globals, shared=shared_module, early=True)


def tell_torchrun(error):
    """Write an exception to torchrun's error file, so that torchrun reports it as the cause; no-op without torchrun."""
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if not path:
        return
    kind = 'error' if isinstance(error, UserError) else type(error).__name__
    # torchrun expects the text in a nested 'message'
    details = {'message': f'{kind}: {error}', 'extraInfo': {'timestamp': str(int(time.time()))}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({'message': details}))


# ---- a run and its folder ----


def begin(out_dir, config, resume):
    """Take out_dir for this run alone, on all ranks together; from here until the first boundary() nothing can be lost.

    resume: whether it may hold an unfinished run. Raises UserError if it belongs to another run or cannot be written."""
    import fsdp

    # a process may do several runs, one after the other
    global _code, _stage
    _code = 0
    _stage = 'loading'

    def take():
        log.check_out_dir(out_dir, config, resume)
        log.check_names(out_dir)
        files.lock(out_dir)

    fsdp.on_one_rank(take)


def boundary(save, close, saved=False):
    """Save, close the trackers and end the process if a signal has asked for it. Call it after every step, on all ranks.

    save() begins a checkpoint of this step; saved says that this has been done. close() has the trackers write what they hold."""
    import fsdp

    global _stage
    _stage = 'training'
    code = stop_asked()
    if code:
        keep(save, saved)
        close()
        say('saved: the same command continues from here')
        fsdp.leave(code)


def keep(save, saved=False):
    """Write a checkpoint, again and again while that fails, because what was trained is only in memory. On all ranks together.

    save() begins a checkpoint; saved says that the first try has begun already. While it waits, Ctrl-C asks for one last try.
    Raises UserError if that fails, too."""
    import fsdp
    from runtime import checkpoint

    # not by stop_asked(), which raises an error if an earlier checkpoint has failed: that is one more reason to write this one
    (code_before,) = fsdp.largest([_code])
    has_warned = False
    is_last_try = False
    while True:
        try:
            if not saved:
                save()
            # further tries begin a checkpoint of their own
            saved = False
            checkpoint.wait()
            return
        except UserError as error:
            if is_last_try:
                raise UserError(f'{error}. Given up: what was trained since the last checkpoint is lost') from None
            if not has_warned:
                hint = f'make room; it is tried again every {PAUSE} seconds, until a signal (Ctrl-C) gives it up'
                say(f'warning: {error}. What was trained is kept in memory: {hint}')
            has_warned = True
        # all ranks ask together, every second. A new signal shows by a larger code than the one that brought the run here
        for _second in range(PAUSE):
            time.sleep(1)
            is_last_try = stop_asked() > code_before
            if is_last_try:
                break


def export(model, tokenizer, build, folder, card, dtype, save):
    """Append the rows that wait in memory, then call export.write_model with these arguments, and return its result.

    If the model cannot be written, what was trained is kept in a checkpoint, which save() begins, and UserError is raised. On all
    ranks together."""
    import fsdp
    from hf.export import write_model

    try:
        fsdp.on_one_rank(files.append_kept)
        return write_model(model, tokenizer, build, folder, card, dtype)
    except UserError as error:
        keep(save)
        raise UserError(f'{error}. What was trained is in a checkpoint: the same command writes the model') from None


def end():
    """Wait for the last checkpoint, unlock out_dir, and ignore signals: the process ends in a moment. Raises UserError."""
    from runtime import checkpoint

    global _stage
    checkpoint.wait()
    _stage = 'over'
    files.unlock()


# ---- numbers that are not finite ----


def finite(columns):
    """Return whether the columns of a step (name -> tensor) hold neither NaN nor infinity."""
    return all(bool(values.isfinite().all()) for values in columns.values())


def bad_step(out_dir, state, allowed, first, rows, uid, norm, columns):
    """Record a step whose loss or gradient is not finite, instead of its update. Call it on all ranks together.

    allowed: how many such steps a run may have. first: examples before this step. Of each example of the step, rows has the index
    in the training set, uid the hash of its text, and columns (name -> tensor) its numbers. norm: of the gradient.

    Appends the examples whose numbers are not finite to out_dir/bad_step.jsonl; all of the step if only the gradient is not.
    Adds 1 to state['bad_steps']. Raises UserError if these are more than allowed; else prints a warning."""
    import torch

    is_bad = torch.stack([~values.isfinite() for values in columns.values()]).any(0)  # (examples,)
    slots = is_bad.nonzero().flatten().tolist()
    what = 'loss'
    # no single example is to blame for the gradient
    if not slots:
        what = 'gradient'
        slots = range(len(rows))

    file = Path(out_dir) / 'bad_step.jsonl'
    last = first + len(rows)
    for slot in slots:
        row = {'examples': last, 'what': what, 'place': slot, 'index': int(rows[slot]), 'uid': int(uid[slot])}
        numbers = {name: values[slot].item() for name, values in columns.items()}
        numbers['grad_norm'] = norm
        # json has no number for NaN and infinity: they become texts
        for name, number in numbers.items():
            row[name] = number if math.isfinite(number) else str(number)
        if main_rank():
            files.append(file, json.dumps(row) + '\n')

    # warn, or end the run
    state['bad_steps'] += 1
    sentence = f'the {what} of the step from {first} to {last} examples is not finite'
    written = f'{len(slots)} of its examples are in {file}'
    if state['bad_steps'] > allowed:
        hint = f'lower the learning rate, or allow more than --skip_bad_steps={allowed}'
        raise UserError(f'{sentence}; {written}: look at them, {hint}')
    say(f'warning: {sentence}; {written}: skipped, {state["bad_steps"]} of {allowed} allowed')


# ---- too little memory ----


def out_of_memory(error):
    """Return which memory an error says is full, 'the GPU' or 'this machine', or None for an error of another kind."""
    text = str(error)
    # torch's class is known by its name, since torch may not be imported
    if type(error).__name__ == 'OutOfMemoryError' or re.search('CUDA.*out of memory|CUBLAS_STATUS_ALLOC_FAILED', text):
        return 'the GPU'
    if isinstance(error, MemoryError) or re.search("can't allocate memory|Cannot allocate memory", text):
        return 'this machine'
    return None


def explained(error, advice):
    """Return a UserError to raise in place of an error that memory is full or that --deterministic cannot be had.

    Any other error is returned itself. advice: ends the sentence about memory, with what did not fit and what to lower. A UserError about memory gets the mark
    of_this_rank, for other ranks may have enough: the rank that raises it prints it, whichever it is."""
    # torch's own sentence begins with the name of the operation
    operation, is_about_determinism, _ = str(error).partition(' does not have a deterministic implementation')
    if is_about_determinism:
        mistake = f'--deterministic: on a GPU torch has no {operation} that gives the same bits each time'
        return UserError(f'{mistake}; leave it out (the risk cvar, and samples with top_p below 1, cannot have it)')
    # a UserError that quotes such a text is a sentence already
    full_memory = out_of_memory(error)
    if full_memory is None or isinstance(error, UserError):
        return error
    user_error = UserError(f'{full_memory} is out of memory: {advice}')
    user_error.of_this_rank = True
    return user_error


@contextlib.contextmanager
def memory_for(advice):
    """Raise a UserError with this advice if the work inside does not fit into memory. A context manager, and a decorator."""
    try:
        yield
    except Exception as error:
        to_raise = explained(error, advice)
        if to_raise is error:
            raise
        raise to_raise from None


def memory(batches, max_tokens):
    """Return a memory_for() to put around the work on these microbatches, whose advice says which option to lower."""
    longest = max((batch.ids.numel() for batch in batches), default=0)
    # a smaller max_tokens does not make a microbatch of one example smaller
    one_example_each = all(len(batch.slot) == 1 for batch in batches)
    to_lower = 'max_tokens, which changes no result'
    if one_example_each:
        to_lower = 'max_length, since one example fills it'
    advice = f'the longest microbatch has {longest} tokens (max_tokens={max_tokens}); lower {to_lower}'
    return memory_for(f'{advice}; then try --activation_checkpointing, --dtype=bfloat16 or more GPUs')
