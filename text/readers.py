"""Read the rows of data files of any supported format and compression, or of a hub dataset. files.py chooses which."""

import csv
import io
import json
import lzma
import re
from functools import partial
from itertools import islice
from pathlib import Path

from configurator import UserError
from text import files, messages
from text.files import ENDINGS, FORMATS, HELP, PACKED

CUT_SHORT = 'perhaps a download that was cut short'
LONGEST = 2**28  # characters of a line
FETCH, RENAME = 'fetch the data again, perhaps after a login', 'let its name end so'
NOT_UTF8 = 'not valid UTF-8: save the file as UTF-8'
# how other files begin, in lower case -> (what they are, which their names should tell, what to do)
MAGIC = {b'version https://git-lfs': ('git-lfs pointer', 'fetch the data with: git lfs pull'),
         b'<!doctype html': ('web page', FETCH), b'<html': ('web page', FETCH), b'pk\x03\x04': ('.zip', 'unpack or convert it'),
         b'\x1f\x8b': ('.gz', RENAME), b'bzh': ('.bz2', RENAME), b'\xfd7zxz': ('.xz', RENAME), b'(\xb5/\xfd': ('.zst', RENAME),
         b'par1': ('.parquet', RENAME), b'arrow1': ('.arrow', RENAME), b'{"': ('json', RENAME), b'[{"': ('json', RENAME)}  # fmt: skip
# table cells that are JSON once in lower case, or a list or an object, in JSON or as pandas writes them
# (?a: no digits of other scripts; s: a dot may be a line break)
NO_TEXT = re.compile(r'(?as)-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|[Tt]rue|[Ff]alse|TRUE|FALSE|\[.*\]|\{.*\}')
# table columns that stay text even if no cell is one, such as the answers to sums
TEXT_NAMES = set('prompt question instruction query input context system response completion output answer chosen rejected text '
                 'history human_ref chosen_response rejected_response problem solution inputs targets'.split())  # fmt: skip


class Row(dict):
    """A dict {column: value} of a raw row, or an example made from one, with a few attributes."""

    where = ''  # position for messages, such as 'FILE, line 3'
    error = ''  # why the row could not be read, or ''
    # set for examples only
    held_out = None  # whether it belongs to the test part of a divided source; None if the source is not divided
    raw = None  # the raw Row it was made from

    @classmethod
    def of(cls, raw, where, error=''):
        """Make a Row from a parsed value, with these attributes; if it is not a dict, the Row is empty and has an error."""
        is_object = isinstance(raw, dict)
        row = cls(raw if is_object else {})
        row.where = where
        row.error = error or ('' if is_object else 'not an object with named fields')
        return row


def read_rows(hub_id, split, path, **options):
    """Yield the Rows of local files, or of a split of the hub dataset hub_id if path is None. Raises UserError.

    path: a list of files; or a file or folder, of which files.local_files chooses those of the split, or of the most similar one.
    options: of files.hub_files, for the hub, which must have the split."""
    if path is not None:
        chosen = path if isinstance(path, list) else files.local_files(path, split)
        for file in chosen:
            yield from read_file(file)
        return
    splits, commit = files.hub_files(hub_id, **options)
    if split not in splits:
        raise UserError(f'{hub_id!r} on the hub has no split {split!r}; there are {", ".join(splits)}')
    for name in splits[split]:
        file = files.hub_download(hub_id, commit, name)
        for row in read_file(file):
            # messages name the file on the hub, not its path in the cache
            row.where = row.where.replace(file, f'{hub_id}/{name}', 1)
            yield row


def read_file(file):
    """Yield the Rows of a file. Bad rows of text formats have row.error; an unreadable file raises UserError."""
    if not file.lower().endswith(ENDINGS):
        raise UserError(f'{file}: data files end in {", ".join(FORMATS)}: convert it to one of them ({HELP})')
    read = READERS[files.format_of(file)]
    try:
        with open(file, 'rb') as stream:
            head = stream.read(40).lstrip().lower()
        for magic, (kind, advice) in MAGIC.items():
            if head.startswith(magic) and kind not in Path(file.lower()).name:
                raise UserError(f'{file} is a {kind} by its first bytes: {advice}')
        yield from read(file)
    except UserError:
        raise
    except Exception as error:  # every library has its own error classes
        # the OS's message, or else the first line of the parser's message and the likely causes
        reason = getattr(error, 'strerror', None)
        if not reason:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f'{lines[0][:300].rstrip(".")}; it is damaged, {CUT_SHORT}, or not UTF-8'
            if file.lower().endswith('.xz'):
                reason += ', or padded with zeros: xz -d unpacks it then'
        if isinstance(error, json.JSONDecodeError):
            reason = f'line {error.lineno}: not valid JSON: {reason}'
        raise UserError(f'cannot read {file}: {reason}') from None


def _open(file):
    """Return a binary stream of a file's decompressed contents."""
    # PACKED has a function to open it, or the name that pyarrow has for the compression
    opener = PACKED.get(Path(file).suffix.lower(), open)
    if isinstance(opener, str):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file, compression=opener))
    stream = opener(file, 'rb')
    # by itself, lzma takes a damaged stream of several for the end of the file, without an error
    if opener is lzma.open:
        stream._buffer.raw._trailing_error = ()
    return stream


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
    if '\0' in text:
        return 'a NUL is in it, as in UTF-16: save the file as UTF-8, or take the NUL out'
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
        if len(set(schema.names)) < len(schema.names):
            raise UserError(f'{file}: two columns have one name: rename them')
        words_of = _label_words(schema)
        # convert one batch at a time, since Python objects need far more memory
        rows = (raw for batch in batches for raw in batch.to_pylist())
        for number, raw in enumerate(rows, 1):
            for name, words in words_of.items():
                label = raw.get(name)
                if isinstance(label, int) and 0 <= label < len(words):
                    raw[name] = words[label]
            values = {name: _as_json(value) for name, value in raw.items()}  # a column that is None stays
            yield Row.of(values, f'{file}, row {number}')


def _label_words(schema):
    """Return {column: words} for columns of label numbers; `datasets` keeps their words in a schema's metadata: 0 may be 'good'."""
    metadata = json.loads((schema.metadata or {}).get(b'huggingface', '{}'))
    features = (metadata.get('info') or {}).get('features') or {}
    words_of = {}
    for name, feature in features.items():
        words = feature.get('names') if isinstance(feature, dict) else None
        # words that are digits themselves, such as grades, are left out: such columns stay numbers
        if words and not all(map(str.isdecimal, words)):
            words_of[name] = words
    return words_of


def _as_json(value):
    """Return a value of a columnar file as JSON has it, without the None fields: such files give all messages the same fields."""
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items() if item is not None}
    # text that its writer has not marked as such; field() refuses bytes that are none
    if isinstance(value, bytes):
        return value.decode('utf-8', 'surrogateescape')
    # times (WildChat's messages have some), and what else JSON has no form for
    return value if isinstance(value, str | int | float | None) else str(value)


def _read_json(file):
    """Yield the Rows of a .json file: a list of objects, an object with such a list, a single one, or one per line (as in SHP)."""
    with _open(file) as stream:
        # skip a byte order mark and white space
        is_list = stream.peek(100).lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'[')
    # the first lines of an object over several lines, such as {"data": [, are no rows by themselves
    first_lines = [] if is_list else list(islice(_read_lines(file), 2))
    is_object = len(first_lines) == 1 or [bool(row.error) for row in first_lines] == [True, True]
    if not is_list and not is_object:
        yield from _read_lines(file)
        return
    with _open(file) as stream:
        value = messages.JSON.decode(stream.read().decode('utf-8-sig'))
    for number, raw in enumerate(value if is_list else _rows_of(value), 1):
        yield Row.of(raw, f'{file}, row {number}')


def _rows_of(value):
    """Return the only list of objects (but for messages) that a JSON object has in it, or else the value as the only row."""
    values = value.values() if isinstance(value, dict) else []
    lists = [inner for inner in values if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
    if len(lists) == 1 and lists[0][0].keys().isdisjoint(('role', 'from')):
        return lists[0]
    return [value]


def _read_lines(file):
    """Yield the Rows of a JSON-lines file. Blank lines are skipped; invalid JSON gives an empty Row with an error."""
    with _open(file) as stream:
        for number, line in _lines(stream):
            if not line.strip():
                continue
            raw, error = {}, ''
            try:
                raw = messages.JSON.decode(line.decode('utf-8-sig'))
            except UnicodeDecodeError:
                error = NOT_UTF8
            except (ValueError, LookupError, RecursionError) as wrong:
                # .msg of a JSONDecodeError is the message without the position
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
                yield Row.of({'text': line.rstrip('\r\n')}, f'{file}, line {number}', _utf8_error(line))


def _read_table(file, delimiter=','):
    """Yield the Rows of a .csv or .tsv file. Columns of numbers, booleans, lists or objects are converted; empty cells become None."""
    text_columns = _text_columns(file, delimiter)
    for line, cells, error in _cells(file, delimiter):
        for name, cell in cells.items():
            if not cell or name in text_columns:
                continue
            try:
                value = messages.parse_literal(cell if cell[0] in '[{' else cell.lower())
            except LookupError as wrong:
                value, error = None, error or str(wrong)
            # one in brackets may be a text nevertheless
            cells[name] = cell if value is None else value
        yield Row.of(cells, f'{file}, line {line}', error)


def _text_columns(file, delimiter):
    """Return the names of a table's columns that stay text: those for texts by their names, and those with a cell of text."""
    names, found = set(), set()
    # this reads the whole file, which is read again: one cell of text makes the whole column text
    for _line, cells, _error in _cells(file, delimiter):
        names.update(cells)
        found.update(name for name, cell in cells.items() if cell and not NO_TEXT.fullmatch(cell))
    for name in names:
        # it may end in the mark of one of two answers: response_a, answer1, human_ref_B
        stem = re.sub(r'(_?\d|_[a-z])$', '', name.lower())
        if name.lower() in TEXT_NAMES or stem in TEXT_NAMES:
            found.add(name)
    return found


def _cells(file, delimiter):
    """Yield (number of its first line, {column: text, None if empty}, error or '') for each row of a table. Raises UserError."""
    csv.field_size_limit(2**30)  # of one cell, in bytes; the default is 128 KiB
    with _open_text(file) as stream:
        table = csv.reader((line for _, line in _lines(stream)), delimiter=delimiter, strict=True)
        names = next(table, [])
        if len(set(names)) < len(names) or _utf8_error(''.join(names)):
            raise UserError(f'{file}, line 1: two columns have one name: rename them; or it is {NOT_UTF8}')
        # the first line of the next row; line_num counts the lines read so far, of which a quoted cell may take several
        line = table.line_num + 1
        try:
            for row in table:
                if row:
                    error = _utf8_error(''.join(row))
                    if len(row) != len(names):
                        error = f'not as many cells as columns ({len(row)}, {len(names)})'
                    cells = {name: cell or None for name, cell in zip(names, row, strict=False)}
                    # a column without a name: row numbers, as pandas writes them
                    cells.pop('', None)
                    yield line, cells, error
                line = table.line_num + 1
        except csv.Error as error:
            raise UserError(f'{file}, line {line}: not a valid table ({error}), {CUT_SHORT}') from None


READERS = {'.jsonl': _read_lines, '.ndjson': _read_lines, '.json': _read_json, '.parquet': _read_columns,
           '.csv': _read_table, '.tsv': partial(_read_table, delimiter='\t'), '.arrow': _read_columns,
           '.txt': _read_text}  # fmt: skip
