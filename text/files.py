"""Where rows are read from: files, folders and hub datasets, as rows that know where they stand."""

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from functools import cache
from pathlib import Path

from configurator import UserError

ENDINGS = ('.jsonl', '.json', '.jsonl.gz', '.json.gz', '.parquet')
HELP = 'see README, "Data of your own"'
READ_ERRORS = (OSError, EOFError, ValueError, RecursionError, NotImplementedError, ImportError, zlib.error)


class Row(dict):
    """A row, or an example, that knows where it stands ('file, line n'), and why it could not be read, if so."""

    where = error = ''

    @classmethod
    def of(cls, raw, where, error=''):
        """A row as it was read, which need not be an object; error: why it could not be."""
        row = cls(raw if isinstance(raw, dict) else {})
        row.where, row.error = where, error
        if not error and not isinstance(raw, dict):
            row.error = 'not an object with named fields'
        return row


def read_rows(hub_id, split, path, undivided=False, **options):
    """Rows of a local file, of a local folder's files for this split (undivided: of all its files), or of a hub dataset."""
    if path is None:
        yield from _read_hub(hub_id, split, options)
        return
    for file in local_files(path, None if undivided else split):
        yield from _read_file(file)


def add_to_digest(digest, path):
    """Update a digest with a file, or a folder's data files: their names, which say what split each is of, and contents."""
    for file in data_files(path):
        digest.update(os.path.relpath(file, path).encode())
        try:
            with open(file, 'rb') as stream:
                digest.update(hashlib.file_digest(stream, 'sha256').digest())
        except OSError as error:
            raise UserError(f'cannot read {file}: {error.strerror}') from None


def content_hash(*parts) -> int:
    """A 64-bit hash of json-able values, the same in every process."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).digest(), 'big')


# ---- the hub ----


def _read_hub(hub_id, split, options):
    import datasets

    options = {name: value for name, value in options.items() if value is not None}
    # 'json' is no dataset: it reads files of any repository
    if hub_id != 'json':
        options |= _revision(hub_id)
    try:
        rows = datasets.load_dataset(hub_id, split=split, **options)
    except Exception as error:  # no network, no such dataset, no such split: the library's own words say which
        raise UserError(f'cannot load {hub_id!r}, split {split!r}, from the hub: {_reason(error)}') from None
    for number, raw in enumerate(rows, 1):
        yield Row.of(_unfilled(raw), f'{hub_id} [{split}], row {number}')


def hub_splits(hub_id):
    """The names of a hub dataset's splits."""
    import datasets

    try:
        return datasets.get_dataset_split_names(hub_id, **_revision(hub_id))
    except Exception as error:  # no network, no such dataset, no access
        raise UserError(f'cannot find {hub_id!r} on the hub: {_reason(error)}') from None


@cache
def hub_commit(hub_id):
    """The commit at which this process reads a hub dataset; None where nobody can say: no network, no such dataset."""
    try:
        import huggingface_hub

        return huggingface_hub.HfApi().dataset_info(hub_id, timeout=10).sha
    except Exception:  # the reader, which comes later, says what is wrong
        return None


def _revision(hub_id):
    commit = hub_commit(hub_id)
    return {} if commit is None else {'revision': commit}


def _reason(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# ---- files ----


def data_files(path):
    """A file itself, or all data files in a folder."""
    if not os.path.exists(path):
        raise UserError(f'there is no file or folder {path}')
    if os.path.isfile(path):
        return [path]
    return sorted(str(file) for file in Path(path).rglob('*') if file.name.endswith(ENDINGS) and file.is_file())


def local_files(path, split):
    """A file itself, or a folder's data files whose path names this split; None: all of them."""
    files = data_files(path)
    # of a single one, a part is held out
    if len(files) == 1:
        return files

    # train_prefs, where there is one, else train; latest.json is no test file
    for name in (split, split.partition('_')[0]) if split else ['']:
        named = [file for file in files if re.search(rf'(?<![a-z]){name}', file[len(path) :].lower())]
        if named:
            return named
    found = ', '.join(os.path.relpath(file, path)[:40] for file in files[:5]) or 'none at all'
    raise UserError(
        f'the folder {path} has no {split or "data"} file; found of data files: {found}; they end in {", ".join(ENDINGS)} '
        f'and have the split in their name: rename them, or name a single file ({HELP})'
    )


def _read_file(file):
    """The rows of one file. Raises UserError where it cannot be read."""
    if not file.endswith(ENDINGS):
        raise UserError(f'{file}: data files end in {", ".join(ENDINGS)}: convert it to one of them ({HELP})')
    try:
        if file.endswith('.parquet'):
            yield from _read_parquet(file)
            return
        with (gzip.open if file.endswith('.gz') else open)(file, 'rb') as stream:
            yield from _read_json(file, stream) if file.endswith(('.json', '.json.gz')) else _read_lines(file, stream)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f'{file}, line {error.lineno}: not valid JSON ({error.msg})') from None
    except READ_ERRORS as error:
        raise UserError(f'cannot read {file}: {getattr(error, "strerror", None) or error}') from None


def _read_parquet(file):
    import pyarrow.parquet

    for number, raw in enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1):
        yield Row.of(_unfilled(raw), f'{file}, row {number}')


def _read_json(file, stream):
    """The rows of a .json file: a list of them, or a row a line after all, as SHP's files have them."""
    # not json's own guess of an encoding
    text = stream.read().decode('utf-8-sig')
    first, *more = text.lstrip().split('\n', 1)
    if more and first.startswith('{') and first.rstrip().endswith('}'):
        yield from _read_lines(file, io.BytesIO(text.encode()))
        return
    content = json.loads(text)
    if not isinstance(content, list):
        raise UserError(f'{file}: not a list of rows')
    for number, raw in enumerate(content, 1):
        yield Row.of(raw, f'{file}, row {number}')


def _read_lines(file, stream):
    """The rows of a file with one object a line; a line that is none becomes a row with an error."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f'{file}, line {number}'
        try:
            raw = json.loads(line.decode('utf-8-sig' if number == 1 else 'utf-8'))
        except (ValueError, RecursionError) as error:
            yield Row.of({}, where, f'not valid JSON ({getattr(error, "msg", error)})')
        else:
            yield Row.of(raw, where)


def _unfilled(raw):
    """A row of a columnar file without the nulls inside its lists: there every message has the fields of all others."""
    return {key: _without_nulls(value) if isinstance(value, list) else value for key, value in raw.items()}


def _without_nulls(value):
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
