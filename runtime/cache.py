"""The cache folder: arrays in safetensors files, which are mapped, not read. Whoever reads one checks a digest of its own."""

import contextlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def path_of(kind, key):
    """The path of a cache file in the user's cache folder. kind: begins its name; key: a string that decides its contents."""
    folder = Path(os.environ.get('NANOPREF_CACHE', Path.home() / '.cache' / 'nanopref'))
    return folder / f'{kind}-{key[:32]}.safetensors'


def read(file, valid):
    """(arrays, metadata) of a cache file, or None where there is none or it is damaged.

    valid(arrays, metadata) -> whether it is what it should be; an error that it raises for broken contents means no."""
    with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        # torch's reader maps the file, where numpy's copies it
        with safe_open(file, 'pt') as content:
            arrays = {name: content.get_tensor(name).numpy() for name in content.keys()}  # noqa: SIM118
            metadata = content.metadata()
        if valid(arrays, metadata):
            return arrays, metadata
    return None


def write(file, arrays, metadata):
    """Write a cache file, whole or not at all. Returns None, or why it could not be written: no run ends for that."""
    temporary = file.with_suffix(f'.{os.getpid()}')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, temporary, metadata)
        temporary.rename(file)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return getattr(error, 'strerror', None) or str(error)
    return None
