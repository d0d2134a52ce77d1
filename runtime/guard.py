"""What can end a run early, and how it then ends without loss. Collectives are in fsdp.py; this decides, says and leaves.

A signal (SIGTERM, SIGUSR1, Ctrl-C) ends a process at once as long as nothing can be lost. Once there are steps, the run finishes its
step, saves, and leaves with code 75 (130 after Ctrl-C): the same command continues. A second Ctrl-C does not wait.

Scripts import this first and call watch(), so nothing heavy is imported up here: functions import torch where they use it."""

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

SAVED = 75  # exit code after SIGTERM or SIGUSR1: saved, start the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # exit code after Ctrl-C: saved, too
PAUSE = 20  # seconds between two tries to write what cannot be lost
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_stage = 'loading'  # nothing can be lost; 'training': steps can; 'over': everything is written, and signals are ignored
_code = 0  # the exit code that a signal to this process asks for
_progress = None  # () -> a sentence about what is kept, for whoever stops a script that trains nothing


# ---- signals ----


def watch(name):
    """Heed signals from now on, and check the command line, where name is '__main__': before a script imports anything heavy."""
    if name != '__main__':
        return
    # torch reads it once: memory of a GPU that grows in place has no holes between batches of different sizes
    if 'PYTORCH_CUDA_ALLOC_CONF' not in os.environ:  # the older name
        os.environ.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')
    # a thread waits for them: the main thread may be inside C code for minutes, such as a rendezvous
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: on_signal(number))  # inside unblocked
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_listen, daemon=True).start()
    os.register_at_fork(after_in_child=_as_any_process)
    # python -c has no file to read
    script = getattr(sys.modules['__main__'], '__file__', None)
    if script:
        check_early(script)


def _listen():
    """Wait for signals, which are blocked in all other threads."""
    while True:
        on_signal(signal.sigwait(SIGNALS))


def _as_any_process():
    """In a forked child a signal does what it does in any process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def unblocked():
    """Around the user's own code: a process that it starts inherits what is blocked here, and could not be ended by a signal."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def on_signal(number):
    """Do what a signal asks: leave at once where nothing can be lost or a second Ctrl-C comes, else at the end of a step."""
    global _code
    if _stage == 'over':
        return
    # torchrun turns a second Ctrl-C into SIGTERM
    hurry = _code == INTERRUPTED and number != signal.SIGUSR1
    leave, first = hurry or _stage == 'loading', not _code
    _code = max(_code, INTERRUPTED if number == signal.SIGINT else SAVED)
    answer = 'stopping after this step (Ctrl-C twice: at once, without saving)'
    if leave:
        answer = 'stopped at once: steps since the last checkpoint are lost' if hurry else 'stopped'

    # not print, which may be what the main thread is in
    if main_rank() and (leave or first):
        os.write(2, f'\n{signal.Signals(number).name}: {answer}\n'.encode())
    if leave and _progress and main_rank():
        os.write(1, f'{_progress()}\n'.encode())
    if leave:
        os._exit(_code)


def on_stop(progress):
    """For a script without steps, which a signal always ends at once. progress() -> a sentence about what is kept."""
    global _progress
    _progress = progress


def asked_here():
    """Whether this process has been told to stop. Ranks may differ: for work whose result is thrown away if any has."""
    return _code != 0


def stop_asked():
    """The exit code that a signal to any rank asks for, or 0: the same answer on all, which call this together.

    Also raises UserError, on all, if the checkpoint that is being written has failed."""
    import fsdp
    from runtime import checkpoint

    code, failed = fsdp.largest([_code, int(checkpoint.failed())])
    if failed:
        checkpoint.wait()
    return code


# ---- the first second, and the last ----


def check_early(script):
    """Check the command line against the source of a script before its imports, which take seconds; or print its help."""
    source = Path(script).read_text('utf-8')
    # plot.py gives the call words of its own choice
    call = re.search(r'configure\(globals\(\)(?:, shared=(\w+))?\)', source)
    if call:
        module = call[1] and types.SimpleNamespace(__file__=Path(script).with_name(f'{call[1]}.py'))
        doc = ast.get_docstring(ast.parse(source))
        configure({'__file__': script, '__doc__': doc}, shared=module, early=True)


def tell_torchrun(error):
    """Leave the sentence where torchrun looks for the cause: it prints it at the end of its own report."""
    file = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if file:
        kind = 'error' if isinstance(error, UserError) else type(error).__name__
        what = {'message': f'{kind}: {error}', 'extraInfo': {'timestamp': str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({'message': what}))


# ---- a run and its folder ----


def begin(out_dir, config, resume):
    """Take out_dir for this run alone, on all ranks together. Raises UserError where it cannot be had."""
    import fsdp

    global _code, _stage
    _code, _stage = 0, 'loading'

    def take():
        log.check_out_dir(out_dir, config, resume)
        log.check_names(out_dir)
        files.lock(out_dir)

    fsdp.on_one_rank(take)


def boundary(save, close, saved=False):
    """Call it after every step: does what signals have asked for, on all ranks together. save() begins a checkpoint, unless
    one of this step is saved already; close() has the trackers write what they hold."""
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
    """Write a checkpoint, on all ranks together, again and again while that fails: what was trained is in this process alone.

    A signal that comes while it waits asks for one last try; then UserError is raised. saved: the first try has begun."""
    from runtime import checkpoint

    code, warned, given_up = stop_asked(), False, False
    while True:
        try:
            if not saved:
                save()
            saved = False
            return checkpoint.wait()
        except UserError as error:
            if given_up:
                raise UserError(f'{error}. Given up: what was trained since the last checkpoint is lost') from None
            if not warned:
                hint = f'make room; it is tried again every {PAUSE} seconds, until a signal (Ctrl-C) gives it up'
                say(f'warning: {error}. What was trained is kept in memory: {hint}')
            warned = True
        # all ranks ask together, every second, whether a new signal has come
        for _second in range(PAUSE):
            time.sleep(1)
            given_up = stop_asked() > code
            if given_up:
                break


def export(model, tokenizer, build, folder, card, dtype, save):
    """What export.write_model returns, once all rows are written. On all ranks together.

    Where the model cannot be written, what was trained is kept in a checkpoint, which save() begins. Raises UserError."""
    import fsdp
    from hf.export import write_model

    try:
        fsdp.on_one_rank(files.append_kept)
        return write_model(model, tokenizer, build, folder, card, dtype)
    except UserError as error:
        keep(save)
        raise UserError(f'{error}. What was trained is in a checkpoint: the same command writes the model') from None


def end():
    """Wait for the last checkpoint, and give out_dir back. A process that ends in a moment needs no signal for it."""
    from runtime import checkpoint

    global _stage
    checkpoint.wait()
    _stage = 'over'
    files.unlock()


# ---- numbers that are not finite ----


def finite(columns):
    """Whether all columns of a step (name -> tensor) hold numbers only, no NaN and no infinity."""
    return all(bool(values.isfinite().all()) for values in columns.values())


def bad_step(out_dir, state, allowed, first, rows, uid, norm, columns):
    """A step whose loss or gradient is not finite, called before the weights are touched, on all ranks.

    Writes the offending examples, or all of the step if only its gradient is bad, to out_dir/bad_step.jsonl: their place in the
    step, index in the training set (of rows), uid, the hash of their text, and columns. Counts in state['bad_steps'], and raises
    UserError beyond the allowed number."""
    import torch

    broken = torch.stack([~values.isfinite() for values in columns.values()]).any(0)
    what = 'loss' if broken.any() else 'gradient'
    slots = broken.nonzero().flatten().tolist() or range(len(rows))
    file, last = Path(out_dir) / 'bad_step.jsonl', first + len(rows)
    for slot in slots:
        row = {'examples': last, 'what': what, 'place': slot, 'index': int(rows[slot]), 'uid': int(uid[slot])}
        values = {name: column[slot].item() for name, column in columns.items()} | {'grad_norm': norm}
        # json has no word for what is not finite
        row |= {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        if main_rank():
            files.append(file, json.dumps(row) + '\n')

    # say it, or end here
    state['bad_steps'] += 1
    where = f'the {what} of the step from {first} to {last} examples is not finite'
    those = f'{len(slots)} of its examples are in {file}'
    if state['bad_steps'] > allowed:
        hint = f'lower the learning rate, or allow more than --skip_bad_steps={allowed}'
        raise UserError(f'{where}; {those}: look at them, {hint}')
    say(f'warning: {where}; {those}: skipped, {state["bad_steps"]} of {allowed} allowed')


# ---- too little memory ----


def out_of_memory(error):
    """Where there was no memory left, 'the GPU' or 'this machine', or None for an error of another kind."""
    text = str(error)
    if type(error).__name__ == 'OutOfMemoryError' or re.search('CUDA.*out of memory|CUBLAS_STATUS_ALLOC_FAILED', text):
        return 'the GPU'
    if isinstance(error, MemoryError) or re.search("can't allocate memory|Cannot allocate memory", text):
        return 'this machine'
    return None


def explained(error, advice):
    """The error itself, or where it says that memory is out or a result not reproducible, a UserError in its place.

    advice: what did not fit into memory; what to do."""
    # torch's own sentence begins with the name of the operation
    operation, differs, _ = str(error).partition(' does not have a deterministic implementation')
    if differs:
        what = f'--deterministic: on a GPU torch has no {operation} that gives the same bits each time'
        return UserError(f'{what}; leave it out (the risk cvar, and samples with top_p below 1, cannot have it)')
    where = out_of_memory(error)
    if where is None or isinstance(error, UserError):
        return error
    better = UserError(f'{where} is out of memory: {advice}')
    better.of_this_rank = True
    return better


@contextlib.contextmanager
def memory_for(advice):
    """Around work, or above a function that does it: where it does not fit into memory, a sentence with this advice."""
    try:
        yield
    except Exception as error:
        better = explained(error, advice)
        if better is error:
            raise
        raise better from None


def memory(batches, max_tokens):
    """Around the work on microbatches: say what to lower where it does not fit, on whichever rank it happens."""
    longest = max((batch.ids.numel() for batch in batches), default=0)
    alone = all(len(batch.slot) == 1 for batch in batches)
    lower = 'max_length, since one example fills it' if alone else 'max_tokens, which changes no result'
    advice = f'the longest microbatch has {longest} tokens (max_tokens={max_tokens}); lower {lower}'
    return memory_for(f'{advice}; then try --activation_checkpointing, --dtype=bfloat16 or more GPUs')
