"""The cache folder: arrays in safetensors files, which are mapped, not read. Whoever reads one checks a digest of its own."""

import contextlib
import json
import mmap
import os
from pathlib import Path

import numpy as np

DTYPES = {'BOOL': np.bool_, 'I32': np.int32, 'I64': np.int64, 'U64': np.uint64, 'F32': np.float32, 'F64': np.float64}


def path_of(kind, key):
    """The path of a cache file in the user's cache folder. kind: begins its name; key: a string that decides its contents."""
    folder = Path(os.environ.get('NANOPREF_CACHE', Path.home() / '.cache' / 'nanopref'))
    return folder / f'{kind}-{key[:32]}.safetensors'


def read(file, valid):
    """(arrays, metadata) of a cache file, or None where there is none or it is damaged. The arrays are mapped, not read.

    valid(arrays, metadata) -> whether it is what it should be; whatever that raises for broken contents means no."""
    with contextlib.suppress(OSError, OverflowError, KeyError, ValueError, TypeError, AttributeError):
        with open(file, 'rb') as stream:
            content = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        start = 8 + int.from_bytes(content[:8], 'little')
        header, arrays = json.loads(bytes(content[8:start])), {}
        metadata = header.pop('__metadata__')
        for name, entry in header.items():
            begin, end = entry['data_offsets']
            flat = np.frombuffer(content[start + begin : start + end], DTYPES[entry['dtype']])
            arrays[name] = flat.reshape(entry['shape'])
        if valid(arrays, metadata):
            return arrays, metadata
    return None


def _save(path, arrays, metadata):
    """Write arrays as a .safetensors file, without a copy of them in memory."""
    header, offset = {'__metadata__': metadata}, 0
    # the widest first, so that each begins at a multiple of its width
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
    for name, array in arrays.items():
        dtype = next(key for key, value in DTYPES.items() if array.dtype == value)
        header[name] = {'dtype': dtype, 'shape': array.shape, 'data_offsets': (offset, offset + array.nbytes)}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as stream:
        stream.write(len(text).to_bytes(8, 'little') + text)
        for array in arrays.values():
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def write(file, arrays, metadata):
    """Write a cache file, whole or not at all. Returns None, or why it could not be written: no run ends for that."""
    temporary = file.with_suffix(f'.{os.getpid()}')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _save(temporary, arrays, metadata)
        temporary.rename(file)
    except OSError as error:
        return error.strerror or str(error)
    return None
