"""Read the rows of data files of any supported format and compression, or of a hub dataset. files.py chooses which."""

import csv
import io
import json
import re
from datetime import datetime
from functools import partial
from pathlib import Path

from configurator import UserError
from text import files
from text.files import ENDINGS, FORMATS, HELP, PACKED

CUT_SHORT = 'perhaps a download that was cut short'
LONGEST = 2**28  # characters of a line
NOT_UTF8 = 'not valid UTF-8: save the file as UTF-8'
# table cells that are JSON once in lower case. re.ASCII: \d must not match the digits of other scripts
NUMBER = re.compile(r'-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|[Tt]rue|[Ff]alse|TRUE|FALSE', re.ASCII)
# table columns that stay text even if every cell is a number, such as the answers to sums
TEXT_NAMES = {'prompt', 'question', 'instruction', 'query', 'input', 'context', 'system', 'response', 'completion',
              'output', 'answer', 'chosen', 'rejected', 'text', 'history', 'human_ref', 'chosen_response',
              'rejected_response', 'problem', 'solution', 'inputs', 'targets'}  # fmt: skip


class Row(dict):
    """A dict {column: value} of a raw row, or an example made from one, with a few attributes."""

    where = ''  # position for messages, such as 'FILE, line 3'
    error = ''  # why the row could not be read, or ''
    # set for examples only
    held_out = None  # whether it belongs to the test part of a divided source; None if the source is not divided
    raw = None  # the raw Row it was made from

    @classmethod
    def of(cls, raw, where, error=''):
        """Make a Row from a parsed value; if that is not a dict, the Row is empty and has an error."""
        is_object = isinstance(raw, dict)
        row = cls(raw if is_object else {})
        row.where = where
        row.error = error or ('' if is_object else 'not an object with named fields')
        return row


def read_rows(hub_id, split, path, **options):
    """Yield the Rows of a split of local files, or of the hub dataset hub_id if path is None. Raises UserError.

    path: a list of files to read, or a file or folder, of which the split is read. options: of files.hub_files, for the hub."""
    if path is not None:
        for file in path if isinstance(path, list) else files.local_files(path, split):
            yield from read_file(file)
        return
    splits, commit = files.hub_files(hub_id, **options)
    if split not in splits:
        raise UserError(f'{hub_id!r} on the hub has no split {split!r}; there are {", ".join(splits)}')
    for name in splits[split]:
        file = files.hub_download(hub_id, commit, name)
        for row in read_file(file):
            # not its path in the cache
            row.where = row.where.replace(file, f'{hub_id}/{name}', 1)
            yield row


def read_file(file):
    """Yield the Rows of a file. Bad rows of text formats have row.error; an unreadable file raises UserError."""
    if not file.lower().endswith(ENDINGS):
        raise UserError(f'{file}: data files end in {", ".join(FORMATS)}: convert it to one of them ({HELP})')
    # the reader of data.jsonl.gz is that of .jsonl
    path = Path(file.lower())
    name = path.stem if path.suffix in PACKED else path.name
    read = READERS['.' + name.rpartition('.')[2]]
    try:
        with open(file, 'rb') as stream:
            head = stream.read(40).lstrip().lower()
        if head.startswith(b'version https://git-lfs'):
            raise UserError(f'{file} is a git-lfs pointer, not the data: fetch it with: git lfs pull')
        # a web page saved as .txt would be read as rows
        if head.startswith((b'<!doctype html', b'<html')):
            raise UserError(f'{file} is a web page, not the data: fetch it again, perhaps after a login')
        yield from read(file)
    except UserError:
        raise
    except Exception as error:  # every library has its own error classes
        # the OS's message, or else the first line of the parser's message and the likely causes
        reason = getattr(error, 'strerror', None)
        if not reason:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f'{lines[0][:300].rstrip(".")}; it is damaged, {CUT_SHORT}, or not UTF-8'
        if isinstance(error, json.JSONDecodeError):
            reason = f'line {error.lineno}: not valid JSON: {reason}'
        raise UserError(f'cannot read {file}: {reason}') from None


def _open(file):
    """Return a binary stream of a file's decompressed contents."""
    open_file = PACKED.get(Path(file).suffix.lower(), open)
    if isinstance(open_file, str):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file, compression=open_file))
    return open_file(file, 'rb')


def _open_text(file):
    """Return a decompressed text stream, whose line ends stay as they are; _utf8_error finds invalid bytes in its lines."""
    return io.TextIOWrapper(_open(file), 'utf-8-sig', 'surrogateescape', newline='')


def _lines(stream):
    """Yield (number from 1, line) of a stream. ValueError for a line that memory may not hold, as of a file packed for that."""
    number = 0
    while line := stream.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise ValueError(f'line {number} is longer than {LONGEST:,} characters')
        yield number, line


def _utf8_error(text):
    """Return the error message for a text with bytes that are not UTF-8, or ''."""
    # 'surrogateescape' has decoded such bytes to these characters
    return NOT_UTF8 if re.search('[\udc80-\udcff]', text) else ''


def _read_columns(file):
    """Yield the Rows of a .parquet file, or of an .arrow file in stream format (save_to_disk) or file format."""
    import pyarrow.parquet

    is_parquet = file.lower().endswith('.parquet')
    # map .arrow files, whose batches are not compressed and may be large
    open_source = pyarrow.OSFile if is_parquet else pyarrow.memory_map
    with open_source(file) as source:
        if is_parquet:
            table = pyarrow.parquet.ParquetFile(source)
            schema = table.schema_arrow
            batches = table.iter_batches(1000)
        elif source.read(6) == b'ARROW1':  # magic bytes of the file format
            table = pyarrow.ipc.open_file(source)
            schema = table.schema
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
            schema = batches.schema
        # words: {column: words of its numbers}. `datasets` writes those of a label in the metadata: 0 may be 'good'
        metadata = schema.metadata or {}
        written = json.loads(metadata.get(b'huggingface', '{}'))
        features = (written.get('info') or {}).get('features') or {}
        kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
        words = {name: kind['names'] for name, kind in kinds.items() if kind.get('names')}
        # but words that are digits themselves, such as grades, are left out: such columns stay numbers
        words = {name: names for name, names in words.items() if not all(map(str.isdecimal, names))}
        # convert one batch at a time, since Python objects need far more memory
        rows = (raw for batch in batches for raw in batch.to_pylist())
        for number, raw in enumerate(rows, 1):
            for name in words:
                label = raw.get(name)
                if isinstance(label, int) and 0 <= label < len(words[name]):
                    raw[name] = words[name][label]
            yield Row.of(_without_inner_nulls(raw), f'{file}, row {number}')


def _without_inner_nulls(raw):
    """Return a row of a columnar file without the None fields inside its columns; columns that are None stay."""

    # columnar files give all messages the same fields: a message without tool calls has 'tool_calls': None
    def without_nulls(value):
        if isinstance(value, list):
            return [without_nulls(item) for item in value]
        if isinstance(value, dict):
            return {key: without_nulls(item) for key, item in value.items() if item is not None}
        # JSON has no times, and WildChat's messages have
        return value.isoformat() if isinstance(value, datetime) else value

    return {name: without_nulls(value) for name, value in raw.items()}


def _read_json(file):
    """Yield the Rows of a .json file: a list of objects, or one object per line (as in SHP)."""
    with _open(file) as stream:
        # skip a byte order mark and white space
        is_list = stream.peek(100).lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'[')
        if is_list:
            for number, raw in enumerate(json.loads(stream.read().decode('utf-8-sig')), 1):
                yield Row.of(raw, f'{file}, row {number}')
        else:
            yield from _read_lines(file)


def _read_lines(file):
    """Yield the Rows of a JSON-lines file. Blank lines are skipped; invalid JSON gives an empty Row with an error."""
    with _open(file) as stream:
        for number, line in _lines(stream):
            if not line.strip():
                continue
            raw, error = {}, ''
            try:
                raw = json.loads(line.decode('utf-8-sig'))
            except UnicodeDecodeError:
                error = NOT_UTF8
            except (ValueError, RecursionError) as wrong:
                # JSONDecodeError.msg: the message without the position
                error = f'not valid JSON ({getattr(wrong, "msg", wrong)})'
                # only the last line of a file can lack its newline
                if not line.endswith(b'\n'):
                    error += f', {CUT_SHORT}'
            yield Row.of(raw, f'{file}, line {number}', error)


def _read_text(file):
    """Yield a Row {'text': line} for each line of a .txt file except blank lines."""
    with _open_text(file) as stream:
        for number, line in _lines(stream):
            if line.strip():
                text = line.rstrip('\r\n')
                yield Row.of({'text': text}, where=f'{file}, line {number}', error=_utf8_error(line))


def _read_table(file, delimiter=','):
    """Yield the Rows of a .csv or .tsv file. Columns of numbers or booleans are converted; empty cells become None."""
    # read the file twice: one cell that is no number, or a name in TEXT_NAMES, makes the whole column text
    names, text_columns = set(), set()
    for _line, cells, _error in _cells(file, delimiter):
        names.update(cells)
        for name, cell in cells.items():
            if cell is not None and not NUMBER.fullmatch(cell):
                text_columns.add(name)
    for name in names:
        # without the suffix of one of two answers: response_a, answer1, human_ref_B
        stem = re.sub(r'_?[\da-z]$', '', name.lower())
        if name.lower() in TEXT_NAMES or stem in TEXT_NAMES:
            text_columns.add(name)
    for line, cells, error in _cells(file, delimiter):
        raw = {}
        for name, cell in cells.items():
            # a number, true or false
            is_json = cell is not None and name not in text_columns
            raw[name] = json.loads(cell.lower()) if is_json else cell
        yield Row.of(raw, f'{file}, line {line}', error)


def _cells(file, delimiter):
    """Yield (first line number, cells, error or '') for each row of a table. Raises UserError for malformed files.

    cells: {column: text, or None if empty}, without columns that have no name (row numbers written by pandas)."""
    # the default limit of a cell is 128 KiB
    csv.field_size_limit(2**30)
    with _open_text(file) as stream:
        table = csv.reader((line for _, line in _lines(stream)), delimiter=delimiter, strict=True)
        names = next(table, [])
        if len(set(names)) < len(names) or _utf8_error(''.join(names)):
            raise UserError(f'{file}, line 1: two columns have one name, or a name is not valid UTF-8: rename them')
        line = table.line_num + 1
        try:
            for row in table:
                if row:
                    error = _utf8_error(''.join(row))
                    if len(row) != len(names):
                        error = f'not as many cells as columns ({len(row)}, {len(names)})'
                    cells = {name: cell or None for name, cell in zip(names, row, strict=False)}
                    cells.pop('', None)
                    yield line, cells, error
                # line_num: lines read so far; quoted cells may contain newlines
                line = table.line_num + 1
        except csv.Error as error:
            raise UserError(f'{file}, line {line}: not a valid table ({error}), {CUT_SHORT}') from None


READERS = {'.jsonl': _read_lines, '.ndjson': _read_lines, '.json': _read_json, '.parquet': _read_columns,
           '.csv': _read_table, '.tsv': partial(_read_table, delimiter='\t'), '.arrow': _read_columns,
           '.txt': _read_text}  # fmt: skip
