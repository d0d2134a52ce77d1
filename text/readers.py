"""Read the rows of one data file, whatever its format and however it is compressed. files.py chooses the files.

read_file calls the reader of the format, which the file's ending tells. Each row knows its file, and its number or line there.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from functools import partial
from pathlib import Path

from configurator import UserError

FORMATS = ('.jsonl', '.ndjson', '.json', '.parquet', '.csv', '.tsv', '.arrow', '.txt')
# endings of compressed files and what opens them; python before 3.14 cannot open .zst, so pyarrow does
PACKED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': None}
# .parquet and .arrow files compress their content themselves
COMPRESSIBLE = [ending for ending in FORMATS if ending not in ('.parquet', '.arrow')]
ENDINGS = (*FORMATS, *(ending + packed for ending in COMPRESSIBLE for packed in PACKED))
# words that end messages to users
HELP = 'see README, "Data of your own"'
CUT = 'perhaps a download that was cut short'
# cells of a table that are no text; in lower case they are JSON. ASCII: of the digits of all scripts, json reads 0 to 9
NUMBER = re.compile(r'-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|[Tt]rue|[Ff]alse|TRUE|FALSE', re.ASCII)
# columns of a table that are text even if all of it looks like numbers, as the answers to sums
TEXTS = {'prompt', 'question', 'instruction', 'query', 'input', 'context', 'system', 'response', 'completion', 'output', 'answer', 'chosen',
         'rejected', 'text', 'history', 'human_ref', 'chosen_response', 'rejected_response', 'problem', 'solution', 'inputs', 'targets'}  # fmt: skip
# a column's name may end with the side of its answer: response_a, answer1, human_ref_B
SIDE = re.compile(r'_?(\d|[a-z]|[A-Z])$')
# a byte that is not UTF-8 is decoded ('surrogateescape') to one of these characters, which no text has
BROKEN = re.compile('[\udc80-\udcff]')


class Row(dict):
    """A row as it was read, or an example made of it, with a few attributes beside its columns."""

    where = ''  # 'FILE, line 3' or the like: where the row stands
    error = ''  # why the row could not be read; '' if it could
    # an example alone has these
    held_out = None  # whether it is kept for testing; None if the splits of its source decide that
    raw = None  # the Row that it was made of

    @classmethod
    def of(cls, raw, where, error=''):
        """Make a Row of a value that was read. A value that is no dict makes an empty Row with an error."""
        is_object = isinstance(raw, dict)
        row = cls(raw if is_object else {})
        row.where = where
        row.error = error
        if not is_object and not error:
            row.error = 'not an object with named fields'
        return row


def read_file(file):
    """Yield the Rows of one file. Raises UserError if the file cannot be read.

    A single bad row of a text format raises nothing: its Row has an error, so that it can be skipped."""
    if not file.endswith(ENDINGS):
        raise UserError(f'{file}: data files end in {", ".join(FORMATS)}: convert it to one of them ({HELP})')
    suffix = Path(file).suffix
    unpacked_name = file.removesuffix(suffix) if suffix in PACKED else file
    read_rows = next(READERS[ending] for ending in FORMATS if unpacked_name.endswith(ending))
    try:
        with open(file, 'rb') as stream:
            head = stream.read(40).lstrip().lower()
        if head.startswith(b'version https://git-lfs'):
            raise UserError(f'{file} is a git-lfs pointer, not the data: fetch it with: git lfs pull')
        # the reader of .txt files would take each line of a page for a row
        if head.startswith((b'<!doctype html', b'<html')):
            raise UserError(f'{file} is a web page, not the data: fetch it again, perhaps after a login')
        yield from read_rows(file)
    except UserError:
        raise
    except Exception as error:  # each library has errors of its own
        raise UserError(f'cannot read {file}: {_reason(error)}') from None


def _reason(error):
    """Return in words why a file cannot be read: the system's words (no permission), or else the library's and a guess."""
    if getattr(error, 'strerror', None):
        return error.strerror
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = lines[0][:300].rstrip('.')
    if isinstance(error, json.JSONDecodeError):
        said = f'line {error.lineno}: not valid JSON: {said}'
    return f'{said}; it is damaged, {CUT}, or not UTF-8'


def _opened(file):
    """Open a file and return a stream of its bytes, decompressed."""
    suffix = Path(file).suffix
    if suffix == '.zst':
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file, compression='zstd'))
    open_file = PACKED.get(suffix, open)
    return open_file(file, 'rb')


def _opened_text(file, newline=None):
    """Open a file as text, decompressed. newline='' keeps its line breaks. _utf8_error finds the bytes that are not UTF-8."""
    return io.TextIOWrapper(_opened(file), 'utf-8-sig', 'surrogateescape', newline=newline)


def _utf8_error(text):
    """Return what is wrong with a text that was not UTF-8, or '' if nothing is."""
    return 'not valid UTF-8' if BROKEN.search(text) else ''


# ---- tables of columns: parquet, arrow ----


def _read_parquet(file):
    """Yield the Rows of a .parquet file, a thousand in memory at a time."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        yield from _rows_of(file, table.iter_batches(1000))


def _read_arrow(file):
    """Yield the Rows of an .arrow file in either of its two forms: a stream, which save_to_disk writes, or a file."""
    import pyarrow

    with pyarrow.memory_map(file) as source:
        # only the form with a table of contents begins with these letters
        if source.read(6) == b'ARROW1':
            table = pyarrow.ipc.open_file(source)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
        yield from _rows_of(file, batches)


def _rows_of(file, batches):
    """Yield the Rows of pyarrow's batches, numbered from 1."""
    # only one batch at a time becomes python's values, which take far more memory
    rows = (raw for batch in batches for raw in batch.to_pylist())
    for number, raw in enumerate(rows, 1):
        yield Row.of(without_inner_nulls(raw), f'{file}, row {number}')


def without_inner_nulls(raw):
    """Return a row of a columnar file without the nulls inside of its columns; a column that is null itself stays.

    In such a file all messages have the same fields, so a message without tool calls comes with 'tool_calls': None."""
    return {name: _without_nulls(value) for name, value in raw.items()}


def _without_nulls(value):
    """Return a json-able value in which no dict has a field that is None."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


# ---- lines: json, jsonl, text ----


def _read_json(file):
    """Yield the Rows of a .json file: of one list of objects, or of an object on each line, as the files of SHP are."""
    with _opened(file) as stream:
        # a list begins with [, perhaps behind a byte order mark and white space
        begins_list = stream.peek(100).lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'[')
        if begins_list:
            for number, raw in enumerate(json.loads(stream.read().decode('utf-8-sig')), 1):
                yield Row.of(raw, f'{file}, row {number}')
    if not begins_list:
        yield from _read_lines(file)


def _read_lines(file):
    """Yield the Rows of a file with a JSON object on each line; empty lines are passed over.

    A line that is not JSON gives an empty Row with an error."""
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            raw, error = {}, ''
            try:
                raw = json.loads(line.decode('utf-8-sig'))
            except (ValueError, RecursionError) as wrong:
                # msg: what json says, without the position; other errors have none
                error = f'not valid JSON ({getattr(wrong, "msg", wrong)})'
                is_last_line_cut = not line.endswith(b'\n')
                if is_last_line_cut:
                    error += f', {CUT}'
            yield Row.of(raw, f'{file}, line {number}', error)


def _read_text(file):
    """Yield a Row {'text': line} for each line of a .txt file; empty lines are passed over."""
    with _opened_text(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield Row.of({'text': line.rstrip('\r\n')}, f'{file}, line {number}', _utf8_error(line))


# ---- tables of text: csv, tsv ----


def _read_table(file, delimiter=','):
    """Yield the Rows of a .csv file, or of a .tsv file (its delimiter is a tab). An empty cell becomes None.

    A column becomes numbers (or true and false) if all of its cells look so and TEXTS does not have its name. The file is
    read twice: one cell that is text, however late, decides for its whole column."""
    text_columns = set()
    for _, cells, _ in _cells(file, delimiter):
        for name, cell in cells.items():
            is_text = cell is not None and not NUMBER.fullmatch(cell)
            if is_text or name.lower() in TEXTS or SIDE.sub('', name.lower()) in TEXTS:
                text_columns.add(name)

    for line, cells, error in _cells(file, delimiter):
        raw = {}
        for name, cell in cells.items():
            is_number = cell is not None and name not in text_columns
            raw[name] = json.loads(cell.lower()) if is_number else cell
        yield Row.of(raw, f'{file}, line {line}', error)


def _cells(file, delimiter):
    """Yield (line, cells, error) for every row of a table. Raises UserError if the file is no table.

    line: the number of the line that the row begins on. cells: {column: its text, or None if it is empty}. error: what is
    wrong with the row, or ''. A column without a name is a numbering and is left out."""
    # csv refuses longer cells; by itself it allows 128 KiB
    csv.field_size_limit(2**30)
    with _opened_text(file, newline='') as stream:
        table = csv.reader(stream, delimiter=delimiter, strict=True)
        names = next(table, [])
        if len(set(names)) < len(names) or _utf8_error(''.join(names)):
            raise UserError(f'{file}, line 1: two columns have one name, or a name is not valid UTF-8: rename them')
        line = table.line_num + 1
        try:
            for row in table:
                # an empty line is no row
                if row:
                    error = _utf8_error(''.join(row))
                    if len(row) != len(names):
                        error = f'{len(row)} cells, and the table has {len(names)} columns'
                    yield line, {name: cell or None for name, cell in zip(names, row, strict=False) if name}, error
                # line_num: lines read so far; a quoted cell may have several
                line = table.line_num + 1
        except csv.Error as error:
            raise UserError(f'{file}, line {line}: not a valid table ({error}), {CUT}') from None


READERS = {'.jsonl': _read_lines, '.ndjson': _read_lines, '.json': _read_json, '.parquet': _read_parquet,
           '.csv': _read_table, '.tsv': partial(_read_table, delimiter='\t'), '.arrow': _read_arrow, '.txt': _read_text}  # fmt: skip
