"""The rows of one file, whatever its format and however it is compressed: each knows its file, and its row or line there."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from pathlib import Path

from configurator import UserError

# a format, and perhaps how it is compressed
FORMATS = ('.jsonl', '.ndjson', '.json', '.parquet', '.csv', '.tsv', '.arrow', '.txt')
PACKED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': None}
ENDINGS = FORMATS + tuple(f + packed for f in FORMATS if f not in ('.parquet', '.arrow') for packed in PACKED)
HELP = 'see README, "Data of your own"'
CUT = 'perhaps a download that was cut short'
NUMBER = re.compile(r'-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|[Tt]rue|[Ff]alse|TRUE|FALSE')
# columns of a table that are text, whatever stands in them, also with a side behind: response_a, answer1, human_ref_B
TEXTS = {'prompt', 'question', 'instruction', 'query', 'input', 'context', 'system', 'response', 'completion', 'output', 'answer', 'chosen',
         'rejected', 'text', 'history', 'human_ref', 'chosen_response', 'rejected_response', 'problem', 'solution', 'inputs', 'targets'}  # fmt: skip
SIDE = re.compile(r'_?(\d|[a-z]|[A-Z])$')
# how a byte is read that is not UTF-8
BROKEN = re.compile('[\udc80-\udcff]')


class Row(dict):
    """A row, or an example, that knows where it stands ('file, line n'), and why it could not be read, if so.

    An example knows whether it is held out (None: its source is not divided), and the row that it was made of."""

    where = error = ''
    held_out = raw = None

    @classmethod
    def of(cls, raw, where, error=''):
        """A row as it was read, which need not be an object; error: why it could not be."""
        sound = isinstance(raw, dict)
        row = cls(raw if sound else {})
        row.where, row.error = where, error or ('' if sound else 'not an object with named fields')
        return row


def read_file(file):
    """The rows of one file. Raises UserError where it cannot be read."""
    if not file.endswith(ENDINGS):
        raise UserError(f'{file}: data files end in {", ".join(FORMATS)}: convert it to one of them ({HELP})')
    kind = next(suffix for suffix in reversed(Path(file).suffixes) if suffix not in PACKED)
    try:
        with open(file, 'rb') as stream:
            head = stream.read(40).lstrip().lower()
        if head.startswith(b'version https://git-lfs'):
            raise UserError(f'{file} is a git-lfs pointer, not the data: fetch it with: git lfs pull')
        # lines of any other text are rows of a .txt
        if head.startswith((b'<!doctype html', b'<html')):
            raise UserError(f'{file} is a web page, not the data: fetch it again, perhaps after a login')
        yield from READERS[kind](file)
    except UserError:
        raise
    except Exception as error:  # each library has errors of its own
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip('.')
        line = f'line {error.lineno}: not valid JSON: ' if isinstance(error, json.JSONDecodeError) else ''
        said = f'{line}{said}; it is damaged, {CUT}, or not UTF-8'
        raise UserError(f'cannot read {file}: {getattr(error, "strerror", None) or said}') from None


def _opened(file):
    """A file's bytes, without their compression."""
    opener = PACKED.get(Path(file).suffix, open)
    if opener:
        return opener(file, 'rb')
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file, compression='zstd'))


# ---- a reader a format ----


def _read_parquet(file):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        yield from _rows_of(file, table.iter_batches(1000))


def _read_arrow(file):
    """The rows of an arrow file, a stream as save_to_disk writes it, or a file with a table of contents."""
    import pyarrow

    with pyarrow.memory_map(file) as source:
        if source.read(6) == b'ARROW1':
            table = pyarrow.ipc.open_file(source)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
        yield from _rows_of(file, batches)


def _rows_of(file, batches):
    """The rows of batches of pyarrow."""
    rows = (raw for batch in batches for raw in batch.to_pylist())
    for number, raw in enumerate(rows, 1):
        yield Row.of(unfilled(raw), f'{file}, row {number}')


def unfilled(raw):
    """A row of a columnar file without the nulls inside its columns: there every message has the fields of all others."""
    return {key: _without_nulls(value) for key, value in raw.items()}


def _without_nulls(value):
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _read_json(file):
    """The rows of a list, or of a file with one object a line after all, as SHP's files have them."""
    with _opened(file) as stream:
        if not stream.peek(100).lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'['):
            yield from _read_lines(file)
            return
        for number, raw in enumerate(json.loads(stream.read().decode('utf-8-sig')), 1):
            yield Row.of(raw, f'{file}, row {number}')


def _read_lines(file):
    """The rows of a file with one object a line; a line that is none becomes a row with an error."""
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f'{file}, line {number}'
            try:
                yield Row.of(json.loads(line.decode('utf-8-sig')), where)
            except (ValueError, RecursionError) as wrong:
                end = '' if line.endswith(b'\n') else f', {CUT}'
                yield Row.of({}, where, f'not valid JSON ({getattr(wrong, "msg", wrong)}){end}')


def _read_text(file):
    """A row a line of text."""
    with _opened(file) as stream:
        for number, line in enumerate(io.TextIOWrapper(stream, 'utf-8-sig', 'surrogateescape'), 1):
            if line.strip():
                yield Row.of({'text': line.rstrip('\r\n')}, f'{file}, line {number}', _broken(line))


def _broken(text):
    return 'not valid UTF-8' if BROKEN.search(text) else ''


def _read_table(file):
    """The rows of a table; a column is of numbers if all of its cells are, and an empty cell is null."""
    # a first reading for the kinds of the columns
    texts = set()
    for _, cells, _ in _cells(file):
        texts |= {name for name, cell in cells.items() if cell and not NUMBER.fullmatch(cell)}
    texts |= {name for name in cells if name.lower() in TEXTS or SIDE.sub('', name.lower()) in TEXTS}
    for line, cells, error in _cells(file):
        raw = {name: cell if name in texts or not cell else json.loads(cell.lower()) for name, cell in cells.items()}
        yield Row.of(raw, f'{file}, line {line}', error)


def _cells(file):
    """(line, {column: text, or None where it is empty}, what is wrong) of the rows of a table. Raises UserError if it is none."""
    csv.field_size_limit(2**30)
    with _opened(file) as stream:
        text = io.TextIOWrapper(stream, 'utf-8-sig', 'surrogateescape', newline='')
        table = csv.reader(text, delimiter='\t' if '.tsv' in file else ',', strict=True)
        line, names = 1, next(table, [])
        if len(set(names)) < len(names) or _broken(''.join(names)):
            raise UserError(f'{file}, line 1: two columns have one name, or a name is not valid UTF-8: rename them')
        try:
            line = table.line_num + 1
            for row in filter(None, table):
                error = _broken(''.join(row))
                if len(row) != len(names):
                    error = f'{len(row)} cells, and the table has {len(names)} columns'
                # a column without a name is a numbering
                yield line, {name: cell or None for name, cell in zip(names, row, strict=False) if name}, error
                line = table.line_num + 1
        except csv.Error as error:
            raise UserError(f'{file}, line {line}: not a valid table ({error}), {CUT}') from None


READERS = {'.jsonl': _read_lines, '.ndjson': _read_lines, '.json': _read_json, '.parquet': _read_parquet,
           '.csv': _read_table, '.tsv': _read_table, '.arrow': _read_arrow, '.txt': _read_text}  # fmt: skip
