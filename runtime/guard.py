"""What can end a run early, and how it then ends without loss. Collectives are in fsdp.py; this decides, says and leaves.

* A signal (SIGTERM, SIGUSR1, Ctrl-C) ends a process at once as long as nothing can be lost. Once there are steps, the run finishes
  its step, saves, and leaves with code 75 (130 after Ctrl-C): the same command continues. A second Ctrl-C does not wait.
* A step whose loss or gradient is not finite leaves the weights alone. Its examples go to bad_step.jsonl; the run ends, unless
  skip_bad_steps allows one more such step.
* Where the disk is full, what was trained is kept in memory until it can be written. Where memory is out, a sentence says what to lower.

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
from runtime import files
from runtime.files import say
from runtime.log import check_names, check_out_dir

SAVED = 75  # exit code after SIGTERM or SIGUSR1: saved, start the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # exit code after Ctrl-C: saved, too
PAUSE = 20  # seconds between two tries to write what cannot be lost
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# the stages of a process, and what it answers to the first signal; in the first two it then leaves at once
ANSWERS = {'loading': 'stopped', 'begun': 'stopped before the first step', 'training': 'stopping after this step',
           'exporting': 'stopping as soon as the model is written'}  # fmt: skip
_stage = 'loading'  # or 'over': everything is written, and signals are ignored
_code = 0  # the exit code that a signal to this process asks for
_progress = None  # () -> a sentence about what is kept, for whoever stops a script that trains nothing
_pipe = None  # (end to read, end to write): brings signals to the thread that listens
_lock = None  # the open file that holds the lock on out_dir


# ---- signals ----


def watch(name):
    """Heed signals from now on, and check the command line, where name is '__main__': before a script imports anything heavy."""
    global _pipe
    if name != '__main__' or _pipe:
        return
    # torch reads it once: memory of a GPU that grows in place has no holes between batches of different sizes
    if 'PYTORCH_CUDA_ALLOC_CONF' not in os.environ:  # the older name
        os.environ.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')
    # a thread of its own hears them: the main thread may be inside C code for minutes, such as a rendezvous
    _pipe = os.pipe()
    os.set_blocking(_pipe[1], False)
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    for number in SIGNALS:
        # a handler must be there, or the system's own action would come first; it has nothing to do
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_listen, args=(_pipe[0],), daemon=True).start()
    # after a fork, signals wait until the child has taken its hands off the pipe
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
        after_in_child=_leave_signals_to_the_system,
    )
    # python -c has no file to read
    script = getattr(sys.modules['__main__'], '__file__', None)
    if script:
        check_early(script)


def _listen(end):
    """Read signals, a byte each."""
    while True:
        number = os.read(end, 1)[0]
        if number in SIGNALS:
            on_signal(number)


def _leave_signals_to_the_system():
    """In a forked child a signal does what it does in any process, since pools end their workers so."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def on_signal(number):
    """Do what a signal asks: leave at once where nothing can be lost, else at the end of a step."""
    global _code
    if _stage == 'over':
        return
    asked = INTERRUPTED if number == signal.SIGINT else SAVED
    answer = ANSWERS[_stage]
    leave = _stage in ('loading', 'begun')
    # torchrun turns a second Ctrl-C into SIGTERM
    if _code == INTERRUPTED and number in (signal.SIGINT, signal.SIGTERM):
        answer, leave = 'stopped at once: steps since the last checkpoint are lost', True
    elif asked == INTERRUPTED and not leave:
        answer += ' (Ctrl-C again: at once, without saving)'

    # only the first signal is answered; print may be what it has interrupted
    if main_rank() and (leave or not _code):
        os.write(2, f'\n{signal.Signals(number).name}: {answer}\n'.encode())
    if leave:
        if _progress and main_rank():
            os.write(1, f'{_progress()}\n'.encode())
        os._exit(_code or asked)
    _code = max(_code, asked)


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
    tree = ast.parse(Path(script).read_text('utf-8'))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        # plot.py gives the call words of its own choice
        if getattr(call.func, 'id', '') != 'configure' or len(call.args) != 1:
            continue
        shared = None
        for keyword in call.keywords:
            shared = types.SimpleNamespace(__file__=Path(script).with_name(f'{keyword.value.id}.py'))
        configure({'__file__': script, '__doc__': ast.get_docstring(tree)}, shared=shared, early=True)


def tell_torchrun(error):
    """Leave the sentence where torchrun looks for the cause: it prints it at the end of its own report."""
    file = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if file:
        kind = 'error' if isinstance(error, UserError) else type(error).__name__
        what = {'message': f'{kind}: {error}', 'extraInfo': {'timestamp': str(int(time.time()))}}
        with contextlib.suppress(OSError), open(file, 'w', encoding='utf-8') as record:
            json.dump({'message': what}, record)


# ---- a run and its folder ----


def begin(out_dir, config, resume):
    """Take out_dir for this run alone, on all ranks together. Raises UserError where it cannot be had."""
    import fsdp

    global _code, _stage
    _code, _stage = 0, 'begun'
    # a run that fails before it writes anything leaves no folder behind
    made = [folder for folder in (Path(out_dir), *Path(out_dir).parents) if not folder.exists()]

    def tidy():
        with contextlib.suppress(OSError):
            if made and main_rank() and os.listdir(out_dir) == ['.lock']:
                os.remove(Path(out_dir) / '.lock')
                for folder in made:
                    folder.rmdir()

    before = sys.excepthook
    sys.excepthook = lambda *error: (tidy(), before(*error))
    fsdp.on_one_rank(lambda: lock_out_dir(out_dir, config, resume))


def lock_out_dir(out_dir, config, resume):
    """Lock out_dir, and check that it suits this run. The system drops the lock when the process ends, however it does."""
    from hf import export

    global _lock
    if _lock:
        _lock.close()
    check_names(out_dir, resume)
    # older versions could be killed between the model of a finished run and its card
    model = Path(out_dir) / 'model'
    if model.exists() and not (model / 'README.md').exists():
        export.write_card(out_dir)
    # before anything is made there, and again when nobody else can change it
    check_out_dir(out_dir, config, resume)
    with files.writing(f'to out_dir {out_dir}'):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        _lock = open(Path(out_dir) / '.lock', 'a')
    files.lock(_lock, f'another run is using {out_dir}: wait for its end, or choose another --out_dir')
    check_out_dir(out_dir, config, resume)


def boundary(save, close, saved=False):
    """Call it after every step: does what signals have asked for, on all ranks together. save() begins a checkpoint, unless
    one of this step is saved already; close() has the trackers write what they hold."""
    import fsdp
    from runtime import checkpoint

    global _stage
    _stage = 'training'
    code = stop_asked()
    if not code:
        return

    def write():
        nonlocal saved
        if not saved:
            save()
        saved = False  # where it fails, the next try begins anew
        checkpoint.wait()

    until_written(write)
    close()
    say('saved: the same command continues from here')
    fsdp.leave(code)


def until_written(write):
    """write(), on all ranks together, again and again while it fails: what was trained is in this process alone.

    A signal that comes while it waits asks for one last try; then the UserError is raised."""
    code, warned, given_up = stop_asked(), False, False
    while True:
        try:
            return write()
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
    """What export.write_model returns, after it and rows that wait for room have succeeded. On all ranks together.

    save() begins a checkpoint, which the same command goes on from where the model cannot be written."""
    import fsdp
    from hf.export import write_model
    from runtime import checkpoint

    global _stage
    _stage, kept = 'exporting', False

    def keep():
        nonlocal kept
        if not kept:
            save()
            checkpoint.wait()
            kept = True
            say('what was trained is in a checkpoint: the same command writes the model')

    def write():
        fsdp.on_one_rank(files.append_kept)
        try:
            return write_model(model, tokenizer, build, folder, card, dtype)
        except UserError:
            with contextlib.suppress(UserError):
                keep()
            raise

    return until_written(write)


def end():
    """Wait for the last checkpoint, and give out_dir back. A process that ends in a moment needs no signal for it."""
    from runtime import checkpoint

    global _lock, _stage
    checkpoint.wait()
    _stage = 'over'
    if _lock:
        _lock.close()
        _lock = None


# ---- numbers that are not finite ----


def finite(columns):
    """Whether all columns of a step (name -> tensor) hold numbers only, no NaN and no infinity."""
    return all(bool(values.isfinite().all()) for values in columns.values())


def bad_step(out_dir, state, allowed, first, rows, uid, norm, columns):
    """A step whose loss or gradient is not finite, called before the weights are touched, on all ranks.

    Writes the offending examples with their columns to out_dir/bad_step.jsonl: their place in the step, index in the training
    set (of rows), and uid, the hash of their text. Where the columns are finite and the gradient is not, that is the whole
    step. Counts in state['bad_steps'], and raises UserError beyond the allowed number."""
    import torch

    import fsdp

    broken = torch.stack([~values.isfinite() for values in columns.values()]).any(0)
    what = 'loss' if broken.any() else 'gradient'
    slots = broken.nonzero().flatten().tolist() or list(range(len(rows)))
    last = first + len(rows)
    file = Path(out_dir) / 'bad_step.jsonl'

    def write():
        text = ''
        for slot in slots:
            row = {'examples': last, 'what': what, 'place': slot, 'index': int(rows[slot]), 'uid': int(uid[slot])}
            values = {name: column[slot].item() for name, column in columns.items()} | {'grad_norm': norm}
            # json has no word for what is not finite
            row |= {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
            text += json.dumps(row) + '\n'
        files.append(file, text)
        # where that has failed, append has said so
        with contextlib.suppress(OSError):
            files.sync(file)

    fsdp.on_one_rank(write)
    state['bad_steps'] += 1

    # say it, or end here
    where = f'the {what} of the step from {first} to {last} examples is not finite'
    those = f'{len(slots)} of its examples are in {file}'
    if state['bad_steps'] > allowed:
        count = f' ({allowed} such steps were skipped before)' if allowed else ''
        raise UserError(f'{where}{count}; {those}: look at them, lower the learning rate, or allow --skip_bad_steps')
    say(f'warning: {where}: skipped, {state["bad_steps"]} of {allowed} allowed; {those}')


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
        cannot = 'the risk cvar, and samples with top_p below 1, cannot have it'
        return UserError(f'{what}; leave --deterministic out ({cannot})')
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
