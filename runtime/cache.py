"""The cache folder of the user: arrays in safetensors files. Examples (text/tokenise.py) and the reference's log-probs are there.

A file is mapped into memory, not read: an array's pages come from the disk when they are used."""

import contextlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def path_of(kind, key):
    """Return the path of a cache file. kind: begins its name; key: a hash of everything that decides its contents."""
    # 32 of its digits are enough to tell files apart
    folder = Path(os.environ.get('NANOPREF_CACHE', Path.home() / '.cache' / 'nanopref'))
    return folder / f'{kind}-{key[:32]}.safetensors'


def read(file, valid):
    """Return (arrays, metadata) of a cache file, or None if there is none, or if it is damaged or not valid.

    valid(arrays, metadata) returns whether the contents are what they should be. Errors that it raises count as no."""
    with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        # 'pt': torch's reader maps the file, numpy's copies it
        with safe_open(file, 'pt') as content:
            arrays = {name: content.get_tensor(name).numpy() for name in content.keys()}  # noqa: SIM118
            metadata = content.metadata()
        # a file of another version may have the same name
        if valid(arrays, metadata):
            return arrays, metadata
    return None


def write(file, arrays, metadata):
    """Write a cache file, whole or not at all. Returns None, or the reason if it cannot be written: no run ends for that."""
    # a name of this process's own, for others may write the same file
    temporary = file.with_suffix(f'.{os.getpid()}')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, temporary, metadata)
        temporary.rename(file)
        return None
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return getattr(error, 'strerror', None) or str(error)
