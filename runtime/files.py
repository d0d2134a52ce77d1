"""Files that survive a kill, a full disk, a loss of power, and a second process in the same folder.

A file or folder that must be whole is written under another name and then renamed. Rows are appended, and wait in memory if the
disk is full. It also has say(), by which the ranks print a line once."""

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

# the open file that holds the lock on this process's folder
_lock = None
# path -> bytes that could not be appended to it yet
_kept = {}
# around append(): the thread that writes checkpoints calls it, too
_one_at_a_time = threading.RLock()


def say(text):
    """Print a line, once whatever the number of ranks."""
    if main_rank():
        print(text, flush=True)


# prints the same text once in a process: policy, reference and export load one model, and would say the same of it
say_once = functools.cache(say)


@contextlib.contextmanager
def writing(path):
    """Raise UserError if the work inside cannot write, for a full disk or a missing permission. path: what the error names."""
    try:
        yield
    except Exception as error:
        # safetensors reports an OSError inside an error of its own
        is_of_system = isinstance(error, OSError) or 'os error' in str(error)
        if not is_of_system:
            raise
        one_line = ' '.join(str(error).split())[:200]
        reason = getattr(error, 'strerror', None) or one_line
        raise UserError(f'cannot write {path}: {reason}') from None


def lock(folder):
    """Make a folder if need be, and keep other processes out of it until unlock(), or until this one ends in whatever way.

    Raises UserError if another process has it, or if it cannot be written. A file system without locks gets a note only."""
    global _lock
    unlock()
    with writing(f'to {folder}'):
        Path(folder).mkdir(parents=True, exist_ok=True)
        # the lock lasts as long as this file is open
        _lock = open(Path(folder) / '.lock', 'a')
    # for two seconds, since a process that was just killed may take a moment to go
    for _attempt in range(10):
        try:
            # LOCK_NB: raise BlockingIOError instead of waiting for the other process
            fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.2)
        except OSError as error:
            say(f'note: {folder} cannot be locked ({error.strerror}): see to it that no second run uses it')
            return
    raise UserError(f'another run is using {folder}: wait for its end, or choose another --out_dir')


def unlock():
    """Give back the folder that lock() has taken, if any."""
    global _lock
    if _lock:
        _lock.close()
        _lock = None


def append(path, text):
    """Append whole lines to a file. If the disk is full, warn once and keep them in memory, behind those that wait already.

    The next call for this path, or append_kept(), tries again: missing rows alone must not end a run."""
    path = Path(path)
    with _one_at_a_time:
        waiting = _kept.pop(path, b'')
        rest = waiting + text.encode()
        try:
            # without a buffer write() returns how many bytes are in the file, even if the disk is full after some of them
            with open(path, 'ab', buffering=0) as file:
                while rest:
                    written = file.write(rest)
                    rest = rest[written:]
        except OSError as error:
            _kept[path] = rest
            is_new = not waiting
            if is_new:
                say(f'warning: cannot write {path}: {error.strerror}: its rows are kept in memory until there is room')


def append_kept():
    """Append the lines that wait in memory. Raises UserError if there is still no room for them; they go on waiting then."""
    for path in list(_kept):
        append(path, '')
        # append() has put back what found no room
        if path in _kept:
            rows = _kept[path].count(b'\n')
            raise UserError(f'cannot write {path}: {rows} rows wait for room')


def cut_rows(path, keep):
    """Rewrite a .jsonl file with only those rows for which keep(row) is true: after a resume, those before its checkpoint.

    A last line that was half written when the run died goes, too. Raises UserError for any other damaged line."""
    if not path.exists():
        return
    lines = path.read_text(errors='replace').splitlines()
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            if keep(json.loads(line)):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            is_last = number == len(lines)
            if not is_last:
                raise UserError(f'{path}, line {number} is damaged: mend it, or choose another --out_dir') from None
    replace_text(path, ''.join(line + '\n' for line in kept))


def sync(path):
    """Have the system bring a file, or the names in a folder, to the disk, so that a loss of power does not cost it.

    Does nothing if there is no such file."""
    if Path(path).exists():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def replace_text(path, text):
    """Write a text file so that at any moment it holds all of the old text or all of the new. Raises UserError."""
    # a rename is done at once, or not at all
    temporary = Path(f'{path}.tmp')
    with writing(path):
        temporary.write_text(text, 'utf-8')
        sync(temporary)
        temporary.replace(path)


def move_folder(temporary, folder):
    """Rename a folder once everything in it has reached the disk. If folder exists, it is replaced. Raises OSError."""
    for path in (*temporary.rglob('*'), temporary):
        sync(path)
    # a folder with files in it cannot be renamed over
    make_room(folder)
    temporary.rename(folder)
    # the new name, too
    sync(folder.parent)


def make_room(path):
    """Free a path for a folder of a run: remove a folder that is there; move a link or a file aside, with a note.

    A run puts only folders there, so a link or a file is somebody else's. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    # lexists: also a link that leads nowhere
    elif os.path.lexists(path):
        aside = path.with_name(f'{path.name}.aside{time.time_ns()}')
        path.rename(aside)
        say(f'note: {path} was there, and is not of this run: it is {aside.name} now')


def file_hash(path):
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()
