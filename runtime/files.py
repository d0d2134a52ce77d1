"""Files that survive what can happen to a run: a kill, a full disk, a loss of power, a second process in the same folder.

Everything that is written whole is written beside its place and renamed. Rows are appended, and wait in memory for room."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path

from configurator import UserError, main_rank

_kept = {}  # path -> bytes that could not be appended to it yet
_one_at_a_time = threading.RLock()  # checkpoints are written in a thread


def say(text):
    """Print once, whatever the number of ranks."""
    if main_rank():
        print(text, flush=True)


say_once = functools.cache(say)  # where several do the same: policy, reference and export load one model


@contextlib.contextmanager
def writing(path):
    """Raise UserError where what is done inside cannot be written: a full disk, no permission."""
    try:
        yield
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror or error}') from None
    except Exception as error:  # safetensors wraps what the system says
        if 'os error' not in str(error):
            raise
        raise UserError(f'cannot write {path}: {" ".join(str(error).split())[:200]}') from None


def lock(file, busy):
    """Hold an exclusive lock on an open file until it is closed or the process ends, however it does.

    Raises UserError(busy) where another process holds it. A file system without locks gets a note, and no lock."""
    # a process that was just killed may take a moment to go
    for _attempt in range(10):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)
        except OSError as error:
            folder = Path(file.name).parent
            return say(f'note: {folder} cannot be locked ({error.strerror}): see to it that no second run uses it')
    raise UserError(busy)


def append(path, text):
    """Append whole lines to a file. Where that fails, on a full disk, say so once, keep them, and append them with the next.

    What a run has learnt is worth more than its rows: these alone must not end it."""
    path = Path(path)
    with _one_at_a_time:
        before = _kept.pop(path, b'')
        rest = before + text.encode()
        try:
            # without a buffer, so that what a write has taken is known
            with open(path, 'ab', buffering=0) as file:
                while rest:
                    rest = rest[file.write(rest) :]
        except OSError as error:
            _kept[path] = rest
            if not before:
                say(f'warning: cannot write {path}: {error.strerror}: its rows are kept in memory until there is room')


def append_kept():
    """Append what could not be written until now. Raises UserError where it still cannot, and goes on keeping it."""
    for path in list(_kept):
        append(path, '')
        if path in _kept:
            raise UserError(f'cannot write {path}: {_kept[path].count(bytes([10]))} rows wait for room')


def give_up_kept():
    """Append what could not be written until now, at the end of a process: what still cannot is lost, which is said."""
    try:
        append_kept()
    except UserError as error:
        say(f'warning: {error}, and are lost')
        _kept.clear()


def cut_rows(path, keep):
    """After a resume: keep the rows of a .jsonl for which keep(row), those that the checkpoint has seen.

    A last line that was half written when the run died goes as well. Raises UserError for any other damaged line."""
    if not path.exists():
        return
    lines = path.read_text(errors='replace').splitlines()
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            kept += [line] if keep(json.loads(line)) else []
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f'{path}, line {number} is damaged: mend it, or choose another --out_dir') from None
    replace_text(path, ''.join(line + '\n' for line in kept))


def sync(path):
    """Have a file, or the names in a folder, brought to the disk, so that it survives a machine that loses power."""
    path = Path(path)
    # rows that wait in memory belong to the file
    if path in _kept:
        append(path, '')
    if path in _kept:
        raise OSError(errno.ENOSPC, f'{path.name} cannot be written')
    if path.exists():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def replace_text(path, text):
    """Write a text file so that it holds either what was in it or all of the new text, whatever happens meanwhile."""
    temporary = Path(f'{path}.tmp')
    with writing(path):
        temporary.write_text(text, 'utf-8')
        sync(temporary)
        temporary.replace(path)


def move_folder(temporary, folder):
    """Rename a folder, over another one if need be, after everything in it has reached the disk."""
    for path in (*temporary.rglob('*'), temporary):
        sync(path)
    make_room(folder)
    temporary.rename(folder)
    sync(folder.parent)


def make_room(path):
    """Free a name of ours: a folder goes; a link or a file, which we do not put there, is moved aside. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        # the first free of .aside1, .aside2 ...
        names = (path.with_name(f'{path.name}.aside{n}') for n in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        path.rename(aside)
        say(f'note: {path} was there, and is not of this run: it is {aside.name} now')


def file_hash(path):
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()
