"""File operations that survive a kill, a full disk, a power loss, and a second process in the same folder."""

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
from runtime.values import printable

_lock = None  # open file that holds the lock on this process's folder
_kept = {}  # path -> bytes not yet appended, because the disk is full
_append_lock = threading.RLock()  # append() is also called from the checkpoint thread


def say(text):
    """Print a line on the main rank only. An error, such as that of a full disk behind stdout, is ignored."""
    if main_rank():
        with contextlib.suppress(OSError):
            print(printable(text), flush=True)


# once per process, for messages about a model that is loaded several times (policy, reference, export)
say_once = functools.cache(say)


@contextlib.contextmanager
def writing(path):
    """Context manager: turn an OSError inside, such as a full disk, into a UserError that names path."""
    try:
        yield
    except Exception as error:
        # safetensors wraps OSErrors in its own exception
        if not isinstance(error, OSError) and 'os error' not in str(error):
            raise
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())[:200]
        if isinstance(error, FileExistsError):
            reason = f'{error.filename} is no folder, but a file or a link to nothing'
        raise UserError(f'cannot write {path}: {reason}') from None


def check_file(path):
    """Raise UserError if a path to read or write is there and no file: opening a pipe may take for ever, and a device must stay."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'{path} is no file, but a folder, a pipe or a device: name a file')


@contextlib.contextmanager
def reading(place, advice):
    """Context manager: turn the errors of a damaged or edited file of ours, which is read inside, into a UserError with the advice.

    place: the file, or a line of it. A UserError inside is a predicate: 'answers a prompt that is not in the data any more'."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{place} {error}') from None
    except OSError as error:
        raise UserError(f'cannot read {place}: {error.strerror}: {advice}') from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # such as checked() raises; the words of others are about Python
        reason = f' ({error})' if type(error) is ValueError else ''
        raise UserError(f'{place} is damaged{reason}: {advice}') from None


def read_json(path, check, advice):
    """Return check(the value in a JSON file of ours); check refuses it by raising an error. UserError with the advice."""
    check_file(path)
    with reading(path, advice):
        return check(json.loads(Path(path).read_text('utf-8')))


def checked(row, kinds):
    """Return an object of a file of ours. kinds: {field: type}; what is missing is None. Raises ValueError for a field of another type."""
    for name, kind in kinds.items():
        value = row.get(name)
        # true and false are integers to Python
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f'{name!r} is {value!r:.60}')
    return row


def lock(folder):
    """Lock a folder, made if needed, until unlock() or the end of this process. UserError if another process holds the lock."""
    global _lock
    unlock()
    with writing(f'to {folder}'):
        Path(folder).mkdir(parents=True, exist_ok=True)
        _lock = open(f'{folder}/.lock', 'a')  # closing this file releases the lock
    for _attempt in range(10):  # retry for two seconds: a killed process may take a moment to exit
        try:
            fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # LOCK_NB: raise BlockingIOError instead of waiting
            return
        except BlockingIOError:
            time.sleep(0.2)
        except OSError as error:
            say(f'note: {folder} cannot be locked ({error.strerror}): see to it that no second run uses it')
            return
    raise UserError(f'another run is using {folder}: wait for its end, or choose another --out_dir')


def unlock():
    """Release the lock taken by lock(), if any."""
    global _lock
    if _lock:
        _lock.close()
    _lock = None


def append(path, text):
    """Append text, rows that end in a line break, to a file. If that fails (a full disk), warn, and keep them for the next call."""
    path = Path(path)
    with _append_lock:
        waiting = _kept.pop(path, b'')  # rows that earlier calls could not write come first
        rest = waiting + text.encode()
        try:
            # unbuffered: write() returns the number of bytes written, possibly fewer than given on a full disk
            with open(path, 'ab', buffering=0) as file:
                while rest:
                    written = file.write(rest)
                    rest = rest[written:]
        except OSError as error:
            _kept[path] = rest
            if not waiting:  # if rows were waiting before, the user has been warned
                say(f'warning: cannot write {path}: {error.strerror}: its rows are kept in memory until there is room')


def append_kept():
    """Write the rows that append() has kept in memory. Raises UserError if the disk is still full; then they stay there."""
    for path in list(_kept):
        # nothing new: append() writes what is kept for path, and keeps again what it cannot write
        append(path, '')
        if path in _kept:
            rows = _kept[path].count(b'\n')
            raise UserError(f'cannot write {path}: rows that wait for room: {rows}')


def read_lines(path, parse, advice):
    """Return [parse(row) of each complete line of a .jsonl file], [] if there is none. A note tells of an incomplete last line.

    parse refuses a row by raising an error. UserError with the number of a refused or damaged line, and the advice."""
    check_file(path)
    if not path.is_file():
        return []
    parsed = []
    # every complete line ends with a line break, so the last piece is empty unless a kill interrupted a write
    *lines, incomplete = path.read_bytes().split(b'\n')
    for number, line in enumerate(lines, start=1):
        with reading(f'{path}, line {number},', advice):
            parsed.append(parse(json.loads(line)))
    if incomplete:
        say(f'note: the last line of {path} was not written to its end: it is left out')
    return parsed


def cut_rows(path, keep):
    """Rewrite a .jsonl file, if there is one, with only the complete rows for which keep(row) is true. UserError if one is damaged."""
    if not path.is_file():
        return
    advice = 'delete that line, or choose another --out_dir'
    lines = read_lines(path, lambda row: json.dumps(row) + '\n' if keep(row) else '', advice)  # '' for a row that goes
    content = ''.join(lines)
    if path.read_bytes() != content.encode():
        replace_text(path, content)


def sync(path):
    """Flush a file, or the entries of a folder, to disk (fsync). No-op if path does not exist."""
    if Path(path).exists():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


@contextlib.contextmanager
def replacing(path):
    """Context manager: yield a name to write a file under, which then becomes path. If that fails, path stays as it was. UserError."""
    check_file(path)
    temporary = Path(f'{path}.tmp')
    with writing(path):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def replace_text(path, text):
    """Write a text file atomically: at any time it has either the old or the new content. Raises UserError."""
    with replacing(path) as temporary:
        temporary.write_text(text, 'utf-8')


def move_folder(temporary, folder):
    """Rename a folder after flushing all its files to disk; replaces an existing folder. Raises OSError."""
    for path in (*temporary.rglob('*'), temporary):
        sync(path)
    clear_path(folder)  # rename() cannot replace a folder that is not empty
    temporary.rename(folder)
    sync(folder.parent)  # flush the new name, too


def clear_path(path):
    """Make way for a new folder at path: delete an old folder; rename a file or symlink, which is not ours. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # lexists: includes broken symlinks
        aside = path.with_name(f'{path.name}.aside{time.time_ns()}')
        path.rename(aside)
        say(f'note: {path} was there, and is not of this run: it is {aside.name} now')


def file_hash(path):
    """Return the SHA-256 hex digest of a file."""
    with open(path, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()
