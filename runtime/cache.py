"""The user's cache of tokenised examples and reference log-probs: memory-mapped safetensors files."""

import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from configurator import UserError


def path_of(kind, key):
    """Return the path of a cache file. key: a hash of all that its contents depend on. UserError without a home."""
    folder = os.path.expanduser(os.environ.get('NANOPREF_CACHE') or '~/.cache/nanopref')
    if folder.startswith('~'):  # a process without a home, as in some containers
        raise UserError('there is no home folder to keep tokens in: set NANOPREF_CACHE to a folder')
    return Path(folder) / f'{kind}-{key[:32]}.safetensors'


def read(file):
    """Return the (arrays, extra) that write() was given for a file, or None if it is missing, damaged or copied from another name."""
    with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        # 'pt': torch's reader memory-maps the file; the reader of numpy would copy it
        with safe_open(file, 'pt') as content:
            arrays = {name: content.get_tensor(name).numpy() for name in content.keys()}  # noqa: SIM118
            extra, checksum = json.loads(content.metadata()['extra'])
        if checksum == _checksum(file, arrays, extra):  # a bit may have flipped on the disk
            return arrays, extra
    return None


def write(file, arrays, extra=None):
    """Write a cache file atomically; return None, or why that failed. arrays: {name: contiguous numpy array}; extra: a JSON value."""
    # a single entry, since safetensors writes several in any order: the same contents shall give the same file
    metadata = {'extra': json.dumps([extra, _checksum(file, arrays, extra)])}
    # a name of its own: other processes, also of other machines, may write the same file
    temporary = file.with_suffix(f'.{uuid.uuid4().hex}')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, temporary, metadata)
        temporary.rename(file)
        return None
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return getattr(error, 'strerror', None) or str(error)


def _checksum(file, arrays, extra):
    """Return a hash of a cache file's contents and of its name, which stands for the key. extra: JSON values beside the arrays."""
    digest = hashlib.sha256(json.dumps([file.name, extra]).encode())
    for name, array in sorted(arrays.items()):
        digest.update(name.encode())
        digest.update(array)
    return digest.hexdigest()
