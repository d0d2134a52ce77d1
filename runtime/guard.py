"""What can end a run early, and how it then ends without loss: signals, another run in its folder, numbers that are not finite,
too little memory. All collectives are in fsdp.py and checkpoint.py; this decides, says and leaves. room.py looks ahead at the disk.

Scripts import this first and call watch(), so that signals are heeded while everything else is imported. So nothing heavy is
imported up here: functions import torch and what needs it where they use it."""

import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from configurator import UserError, main_rank
from runtime import files
from runtime.files import say
from runtime.log import check_names, check_out_dir

SAVED = 75  # exit code after SIGTERM or SIGUSR1: saved, start the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # exit code after Ctrl-C: saved, too
PAUSE = 20  # seconds between two tries to write what cannot be lost
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_code = 0  # the exit code that a signal to this process asks for
_stage = 'before'  # 'training': there are steps that a checkpoint must save; 'exporting'; 'over': all is written
_progress = None  # () -> a sentence about what is kept, for whoever stops a script that trains nothing
_before = {}  # signal -> what its handler was
_ends = None  # of the pipe that tells the listening thread of signals
_main = False  # whether the script is a process of its own
_lock = None  # the open file that holds the lock on out_dir


# ---- signals ----


def watch(name):
    """Heed signals from now on, where name is '__main__': as the first thing that a script does."""
    global _main
    if name == '__main__':
        _main = True
        _install()


def _install():
    """Have a thread of its own hear the signals: the main thread may be inside C code for minutes, such as a rendezvous."""
    global _ends
    if _ends:
        return
    _ends = os.pipe()
    os.set_blocking(_ends[1], False)
    signal.set_wakeup_fd(_ends[1], warn_on_full_buffer=False)
    for number in SIGNALS:
        # a handler must be there, or the system's own action would come first; it has nothing to do
        _before[number] = signal.signal(number, lambda *_: None)
    threading.Thread(target=_listen, args=(_ends[0],), daemon=True).start()


def _listen(end):
    """Read signals, a byte each, until the other end of the pipe is closed."""
    while heard := os.read(end, 1):
        if heard[0] in SIGNALS:
            on_signal(heard[0])
    os.close(end)


def _uninstall():
    """Give the signals back to whoever had them."""
    global _ends
    if not _ends:
        return
    signal.set_wakeup_fd(-1)
    for number, handler in _before.items():
        signal.signal(number, handler)
    os.close(_ends[1])
    _ends = None


def _hold():
    """Before a fork: let signals wait until the child has taken its hands off the pipe, which is its parent's."""
    if _ends:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_go():
    if _ends:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _in_child():
    """In the child the signals do what they do in any process: pools end their workers with them."""
    global _ends
    if _ends:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _let_go()
        _ends = None


os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_in_child)


def on_signal(number):
    """Do what a signal asks: before the first step nothing can be lost, so leave at once; then, at the end of a step."""
    global _code
    if _stage == 'over':
        return
    name = signal.Signals(number).name
    asked = INTERRUPTED if number == signal.SIGINT else SAVED

    # torchrun turns a second Ctrl-C into SIGTERM
    again = _code == INTERRUPTED and number in (signal.SIGINT, signal.SIGTERM)
    if again or _stage == 'before':
        _leave_at_once(name, again, _code or asked)

    # only the first signal is answered on the screen
    if not _code:
        hint = ' (Ctrl-C again: at once, without saving)' if asked == INTERRUPTED else ''
        what = 'stopping after this step' if _stage == 'training' else 'stopping as soon as the model is written'
        _write(f'{name}: {what}{hint}')
    _code = max(_code, asked)


def _leave_at_once(name, again, code):
    if again:
        _write(f'{name}: stopped at once: steps since the last checkpoint are lost')
    elif _lock:
        _write(f'{name}: stopped before the first step')
    else:
        _write(f'{name}: stopped')
    if _progress and main_rank():
        os.write(1, f'{_progress()}\n'.encode())
    os._exit(code)


def on_stop(progress):
    """For a script without steps, which a signal always ends at once. progress() -> a sentence about what is kept."""
    global _progress
    _progress = progress


def _write(text):
    if main_rank():
        os.write(2, f'\n{text}\n'.encode())  # print may be what the signal has interrupted


# ---- a run and its folder ----


def begin(out_dir, config, resume):
    """Heed signals from now on, and take out_dir for this run alone. Raises UserError where it cannot be had."""
    import fsdp

    global _code, _stage
    _code, _stage = 0, 'before'
    _install()
    before = sys.excepthook
    made = [folder for folder in (Path(out_dir), *Path(out_dir).parents) if not folder.exists()]
    sys.excepthook = lambda *error: (_tidy(out_dir, made), before(*error))
    fsdp.on_one_rank(lambda: lock_out_dir(out_dir, config, resume))


def _tidy(out_dir, made):
    """A run that fails before it writes anything leaves no folder behind. made: the folders that were not there."""
    with contextlib.suppress(OSError):
        if made and main_rank() and os.listdir(out_dir) == ['.lock']:
            os.remove(Path(out_dir) / '.lock')
            for folder in made:
                folder.rmdir()


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


def asked_here():
    """Whether this process has been told to stop. Ranks may differ: for work whose result is thrown away if any has."""
    return _code != 0


def stop_asked():
    """Whether any rank has been told to stop: the same answer on all, which call this together.

    Also raises UserError, on all, if the checkpoint that is being written has failed."""
    import fsdp
    from runtime import checkpoint

    code, failed = fsdp.largest([_code, int(checkpoint.failed())])
    if failed:
        checkpoint.wait()
    return code


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
                hint = 'make room, or mend what else is wrong'
                until = f'it is tried again every {PAUSE} seconds, until a signal (Ctrl-C) gives it up'
                say(f'warning: {error}. What was trained is kept in memory: {hint}; {until}')
            warned = True
        # all ranks ask together, every second, whether a new signal has come
        for _second in range(PAUSE):
            time.sleep(1)
            given_up = stop_asked() > code
            if given_up:
                break


def export(model, tokenizer, build, folder, card=None):
    """export.write_model, and rows that wait for room, until they have succeeded. On all ranks together."""
    import fsdp
    from hf.export import write_model

    global _stage
    _stage = 'exporting'

    def write():
        fsdp.on_one_rank(files.append_kept)
        write_model(model, tokenizer, build, folder, card)

    until_written(write)


def end():
    """Wait for the last checkpoint, and give signals and out_dir back."""
    from runtime import checkpoint

    global _lock, _stage
    checkpoint.wait()
    # everything is written: a process that ends in a moment needs no signal for it
    _stage = 'over'
    if not _main:
        _uninstall()
    if _lock:
        _lock.close()
        _lock = None


# ---- what a step may meet: numbers that are not finite, too little memory ----


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
    slots = broken.nonzero().flatten().tolist() or list(range(len(rows)))
    what = 'loss' if broken.any() else 'gradient'
    last = first + len(rows)
    file = Path(out_dir) / 'bad_step.jsonl'

    def write():
        lines = []
        for slot in slots:
            row = {'examples': last, 'what': what, 'place': slot, 'index': int(rows[slot]), 'uid': int(uid[slot])}
            row |= {name: values[slot].item() for name, values in columns.items()}
            row['grad_norm'] = norm
            # json has no word for what is not finite
            row = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            lines.append(json.dumps(row) + '\n')
        files.append(file, ''.join(lines))
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


def out_of_memory(error):
    """Where there was no memory left, 'the GPU' or 'this machine', or None for an error of another kind."""
    text = str(error)
    if type(error).__name__ == 'OutOfMemoryError' or re.search('CUDA.*out of memory|CUBLAS_STATUS_ALLOC_FAILED', text):
        return 'the GPU'
    if isinstance(error, MemoryError) or re.search("can't allocate memory|Cannot allocate memory", text):
        return 'this machine'
    return None


def explained(error, advice):
    """The error itself, or where it says that memory is out, a UserError in its place. advice: what did not fit; what to do."""
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


@contextlib.contextmanager
def memory(batches, max_tokens):
    """Around the work on microbatches: say what to lower where it does not fit, on whichever rank it happens."""
    longest = max((batch.ids.numel() for batch in batches), default=0)
    alone = all(len(batch.slot) == 1 for batch in batches)
    lower = 'max_length, since one example fills it' if alone else 'max_tokens, which changes no result'
    advice = f'the longest microbatch has {longest} tokens (max_tokens={max_tokens}); lower {lower}'
    with memory_for(f'{advice}; then try --activation_checkpointing, --dtype=bfloat16 or more GPUs'):
        yield
