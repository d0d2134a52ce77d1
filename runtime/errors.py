"""How a run ends at an error: in one sentence for a user's mistake or full memory, and how torchrun hears of it."""

import contextlib
import errno
import json
import os
import re
import sys
import time
from pathlib import Path

from configurator import UserError, main_rank
from runtime.values import printable


def report(kind, error, trace):
    """Print a UserError or full memory as one sentence (exit code 2), other errors as a traceback. The arguments of sys.excepthook."""
    # these two return a UserError for errors that they know, and others as they are
    error = explained(error, 'lower max_tokens or batch_size, or use a smaller model or a larger machine')
    error = _of_circumstances(error)
    is_explained = isinstance(error, UserError)
    # tell torchrun what ends this process, in the form that it expects
    torchrun_file = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if torchrun_file:
        name = 'error' if is_explained else type(error).__name__
        details = {'message': f'{name}: {error}', 'extraInfo': {'timestamp': str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(torchrun_file).write_text(json.dumps({'message': details}))
    if not is_explained:
        return sys.__excepthook__(kind, error, trace)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # most errors are raised on every rank: rank 0 prints them. of_this_rank marks an error that this rank may have alone
    if main_rank() or getattr(error, 'of_this_rank', False):
        sys.__stderr__.write(f'error: {printable(str(error))}\n')
        sys.__stderr__.flush()
    else:
        time.sleep(2)  # torchrun stops all ranks as soon as one has ended: let rank 0 print first
    os._exit(2)  # not sys.exit: threads of the process group can abort a normal exit and change the exit code


def _of_circumstances(error):
    """Return a UserError in place of an error of the disk, the file system, another rank or a library in Rust, or else error."""
    # print() to a full disk: the error names no file
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        return UserError(f'cannot print: {error.strerror}')
    # getcwd() raises this one; libraries that raise one with a message of their own give it no number
    if isinstance(error, FileNotFoundError) and error.errno and not error.filename:
        return UserError('the working directory has been deleted: change to one that is there')
    # exists() raises these: a folder without permission, or a name that is too long
    if isinstance(error, OSError) and error.filename and error.errno in (errno.EACCES, errno.ENAMETOOLONG):
        return UserError(f'cannot use {error.filename}: {error.strerror}')
    # words of gloo and NCCL when another rank has ended
    of_another_rank = re.search('by peer|Broken pipe|remote process exited', str(error))
    if of_another_rank and isinstance(error, RuntimeError) and os.environ.get('WORLD_SIZE', '1') != '1':
        time.sleep(2)  # let that rank print its own error first
        reason, _, _ = str(error).partition('\n')
        way_out = 'what it printed, or the report of torchrun, says why; if none does, it is the network'
        return UserError(f'another rank has ended: {way_out} ({reason[:300]})')
    # such as tokenizers, on a pattern of a tokenizer.json that takes too many tries
    if type(error).__name__ == 'PanicException':
        reason = ' '.join(str(error).split())[:200]
        return UserError(f'a library cannot go on ({reason}): see to the files that it reads, such as tokenizer.json')
    return error


def out_of_memory(error):
    """Return which memory ran out, 'the GPU' or 'this machine', or None if error is of another kind."""
    text = str(error)
    # compare the class name, to avoid importing torch
    if type(error).__name__ == 'OutOfMemoryError' or re.search('CUDA.*out of memory|CUBLAS_STATUS_ALLOC_FAILED', text):
        return 'the GPU'
    if isinstance(error, MemoryError) or re.search("can't allocate memory|Cannot allocate memory", text):
        return 'this machine'
    return None


def explained(error, advice):
    """Return a UserError in place of an error of full memory or of --deterministic; return any other error as it is.

    advice: what did not fit and what to lower. With full memory, of_this_rank = True: print it here, as others may have enough."""
    # torch says 'OPERATION does not have a deterministic implementation, but ...'
    operation, found, _ = str(error).partition(' does not have a deterministic implementation')
    if found:
        mistake = f'--deterministic: on a GPU torch has no {operation} that gives the same bits each time'
        return UserError(f'{mistake}; leave it out (samples with top_p below 1 cannot have it)')
    full_memory = out_of_memory(error)  # 'the GPU', 'this machine' or None
    # a UserError may quote such an error, but has its advice already
    if full_memory and not isinstance(error, UserError):
        error = UserError(f'{full_memory} is out of memory: {advice}')
        error.of_this_rank = True
    return error


@contextlib.contextmanager
def on_full_memory(advice):
    """Context manager and decorator: turn an out-of-memory error inside into a UserError that ends with advice."""
    try:
        yield
    except Exception as error:
        to_raise = explained(error, advice)
        if to_raise is error:
            raise
        raise to_raise from None


def can_split(error, batches):
    """Return whether error is of full memory, see explained(), and one of these microbatches has several examples."""
    return hasattr(error, 'of_this_rank') and any(len(batch.slot) > 1 for batch in batches)


def on_full_memory_of(batches, max_tokens):
    """Return an on_full_memory() context for work on these data.Batches, with advice on which option to lower."""
    longest = max((batch.ids.numel() for batch in batches), default=0)
    # a microbatch of a single example cannot be split; slot has an entry for each example
    are_single = all(len(batch.slot) == 1 for batch in batches)
    to_lower = 'max_length, since one example fills it' if are_single else 'max_tokens, which changes no result'
    advice = f'the longest microbatch has {longest} tokens (max_tokens={max_tokens}); lower {to_lower}'
    return on_full_memory(f'{advice}; then try --activation_checkpointing, --dtype=bfloat16 or more GPUs')
