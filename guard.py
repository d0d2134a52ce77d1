"""What can end a run early, and how it then ends without loss: signals, another run in its folder, numbers that are not finite,
too little memory. All collectives are in fsdp.py and checkpoint.py; this decides, says and leaves."""

import contextlib
import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

import card
import checkpoint
import fsdp
from configurator import UserError, main_rank
from log import check_names, check_out_dir, say, sync, writing

SAVED = 75  # exit code after SIGTERM or SIGUSR1: saved, start the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # exit code after Ctrl-C: saved, too

_code = 0  # the exit code that a signal to this process asks for
_training = False  # whether there are steps that a checkpoint must save
_lock = None  # the open file that holds the lock on out_dir


def begin(out_dir, config, resume):
    """Heed signals from now on, and take out_dir for this run alone. Raises UserError where it cannot be had."""
    global _code, _training
    _code, _training = 0, False
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _heed)
    before, made = sys.excepthook, [f for f in (Path(out_dir), *Path(out_dir).parents) if not f.exists()]
    sys.excepthook = lambda *error: (_tidy(out_dir, made), before(*error))
    fsdp.on_one_rank(lambda: _take(out_dir, config, resume))


def _tidy(out_dir, made):
    """A run that fails before it writes anything leaves no folder behind. made: the folders that were not there."""
    with contextlib.suppress(OSError):
        if made and main_rank() and os.listdir(out_dir) == ['.lock']:
            os.remove(Path(out_dir) / '.lock')
            for folder in made:
                folder.rmdir()


def _heed(number, frame):
    """The signal handler: before the first step nothing can be lost, so leave at once; then, at the end of a step."""
    global _code
    # torchrun turns a second Ctrl-C into SIGTERM
    again = _code == INTERRUPTED and number in (signal.SIGINT, signal.SIGTERM)
    asked = INTERRUPTED if number == signal.SIGINT else SAVED
    if again or not _training:
        why = 'stopped at once: steps since the last checkpoint are lost' if again else 'stopped before the first step'
        _write(f'{signal.Signals(number).name}: {why}')
        os._exit(_code or asked)
    if not _code:
        hint = ' (Ctrl-C again: at once, without saving)' if asked == INTERRUPTED else ''
        _write(f'{signal.Signals(number).name}: stopping after this step{hint}')
    _code = max(_code, asked)


def _write(text):
    if main_rank():
        os.write(2, f'\n{text}\n'.encode())  # print may be what the signal has interrupted


def _take(out_dir, config, resume):
    """Lock out_dir, and check that it suits this run. The system drops the lock when the process ends, however it does."""
    global _lock
    if _lock:
        _lock.close()
    check_names(out_dir, resume)
    model = Path(out_dir) / 'model'
    if model.exists() and not (model / 'README.md').exists():
        card.write(out_dir)  # of a finished run: older versions could be killed before they wrote it
    check_out_dir(out_dir, config, resume)  # before anything is made there, and again when nobody else can change it
    with writing(f'to out_dir {out_dir}'):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        _lock = open(Path(out_dir) / '.lock', 'a')
    for _attempt in range(10):  # a process that was just killed may take a moment to go
        try:
            fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.2)
        except OSError as error:  # some network file systems
            say(f'note: {out_dir} cannot be locked ({error.strerror}): see to it that no second run uses it')
            break
    else:
        raise UserError(f'another run is using {out_dir}: wait for its end, or choose another --out_dir')
    check_out_dir(out_dir, config, resume)


def asked_here():
    """Whether this process has been told to stop. Ranks may differ: for work whose result is thrown away if any has."""
    return _code != 0


def stop_asked():
    """Whether any rank has been told to stop: the same answer on all, which call this together.

    Also raises UserError, on all, if the checkpoint that is being written has failed."""
    code, failed = fsdp.largest([_code, int(checkpoint.failed())])
    if failed:
        checkpoint.wait()
    return code


def boundary(save, close, saved=False):
    """Call it after every step: does what signals have asked for, on all ranks together. save() begins a checkpoint, unless
    one of this step is saved already; close() has the trackers write what they hold."""
    global _training
    _training = True
    if code := stop_asked():
        if not saved:
            save()
        checkpoint.wait()
        close()
        say('saved: the same command continues from here')
        fsdp.leave(code)


def end():
    """Wait for the last checkpoint, and give signals and out_dir back."""
    global _lock
    checkpoint.wait()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if _lock:
        _lock.close()
        _lock = None


# ---- numbers and memory ----


def finite(columns):
    """Whether all columns of a step (name -> tensor) hold numbers only, no NaN and no infinity."""
    return all(bool(values.isfinite().all()) for values in columns.values())


def bad_step(out_dir, state, allowed, first, index, uid, norm, columns):
    """A step whose loss or gradient is not finite, called before the weights are touched, on all ranks.

    Writes the offending examples with their columns to out_dir/bad_step.jsonl: their place in the step, index in the training
    set, and uid, the hash of their text. Where the columns are finite and the gradient is not, that is the whole step. Counts
    in state['bad_steps'], and raises UserError beyond the allowed number."""
    broken = torch.stack([~values.isfinite() for values in columns.values()]).any(0)
    places = broken.nonzero().flatten().tolist() or list(range(len(index)))
    what = 'loss' if broken.any() else 'gradient'
    file = Path(out_dir) / 'bad_step.jsonl'

    def write():
        with writing(file), open(file, 'a') as stream:
            for i in places:
                row = {
                    'examples': first + len(index),
                    'what': what,
                    'place': i,
                    'index': int(index[i]),
                    'uid': int(uid[i]),
                }
                row |= {name: values[i].item() for name, values in columns.items()} | {'grad_norm': norm}
                row = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}
                stream.write(json.dumps(row) + '\n')
        sync(file)

    fsdp.on_one_rank(write)
    state['bad_steps'] += 1
    where = f'the {what} of the step from {first} to {first + len(index)} examples is not finite'
    those = f'{len(places)} of its examples are in {file}'
    if state['bad_steps'] > allowed:
        count = f' ({allowed} such steps were skipped before)' if allowed else ''
        raise UserError(f'{where}{count}; {those}: look at them, lower the learning rate, or allow --skip_bad_steps')
    say(f'warning: {where}: skipped, {state["bad_steps"]} of {allowed} allowed; {those}')


@contextlib.contextmanager
def memory(batches, max_tokens):
    """Around the work on microbatches: say what to lower where it does not fit the GPU, on whichever rank it happens."""
    try:
        yield
    except torch.OutOfMemoryError:
        longest = max(batch.ids.numel() for batch in batches)
        alone = all(len(batch.place) == 1 for batch in batches)
        lower = 'max_length, since one example fills it' if alone else 'max_tokens, which changes no result'
        error = UserError(f'the GPU is out of memory: the longest microbatch has {longest} tokens (max_tokens={max_tokens}); lower '
                          f'{lower}; then try --activation_checkpointing, --dtype=bfloat16 or more GPUs')  # fmt: skip
        error.of_this_rank = True
        raise error from None
