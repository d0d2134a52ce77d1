"""Files that survive a kill, a full disk, a loss of power, and a second process in the same folder.

A file that is written whole is written beside its place and renamed. Rows are appended, and wait in memory for room."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path

from configurator import UserError, main_rank

_lock = None  # the open file that holds the lock on this process's folder
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
    except Exception as error:
        # safetensors wraps what the system says
        if not isinstance(error, OSError) and 'os error' not in str(error):
            raise
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())[:200]
        raise UserError(f'cannot write {path}: {reason}') from None


def lock(folder):
    """Keep other processes out of a folder until unlock(), or until this one ends, however it does. Raises UserError."""
    global _lock
    unlock()
    with writing(f'to {folder}'):
        Path(folder).mkdir(parents=True, exist_ok=True)
        _lock = open(Path(folder) / '.lock', 'a')
    # a process that was just killed may take a moment to go
    for _attempt in range(10):
        try:
            return fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)
        except OSError as error:
            return say(f'note: {folder} cannot be locked ({error.strerror}): see to it that no second run uses it')
    raise UserError(f'another run is using {folder}: wait for its end, or choose another --out_dir')


def unlock():
    """Give back the folder that lock() has taken."""
    global _lock
    if _lock:
        _lock.close()
        _lock = None


def append(path, text):
    """Append whole lines to a file. Where the disk is full, say so once and keep them: rows alone must not end a run."""
    path = Path(path)
    with _one_at_a_time:
        waiting = _kept.pop(path, b'')
        rest = waiting + text.encode()
        try:
            # without a buffer, so that what a write has taken is known
            with open(path, 'ab', buffering=0) as file:
                while rest:
                    rest = rest[file.write(rest) :]
        except OSError as error:
            _kept[path] = rest
            if not waiting:
                say(f'warning: cannot write {path}: {error.strerror}: its rows are kept in memory until there is room')


def append_kept():
    """Append what could not be written until now. Raises UserError where it still cannot, and goes on keeping it."""
    for path in list(_kept):
        append(path, '')
        if path in _kept:
            rows = _kept[path].count(b'\n')
            raise UserError(f'cannot write {path}: {rows} rows wait for room')


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
    if Path(path).exists():
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
        aside = path.with_name(f'{path.name}.aside{time.time_ns()}')
        path.rename(aside)
        say(f'note: {path} was there, and is not of this run: it is {aside.name} now')


def file_hash(path):
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()
