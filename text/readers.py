"""The rows of one file, whatever its format and however it is compressed: each knows its file, and its row or line there."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from functools import cache
from itertools import chain
from pathlib import Path

from configurator import UserError

# a format, and perhaps how it is compressed
FORMATS = ('.jsonl', '.ndjson', '.json', '.parquet', '.csv', '.tsv', '.arrow', '.txt')
PACKED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': None}
ENDINGS = FORMATS + tuple(f + packed for f in FORMATS if f not in ('.parquet', '.arrow') for packed in PACKED)
HELP = 'see README, "Data of your own"'
READ_ERRORS = (OSError, EOFError, ValueError, RecursionError, NotImplementedError, ImportError, csv.Error, zlib.error,
               lzma.LZMAError)  # fmt: skip
# as gzip, lzma, zstd, parquet and arrow say that something is missing at the end
CUT = re.compile(
    r'end-of-stream|truncated|magic bytes not found|too small|Not an Arrow file|null or length 0|Expected to (be able to )?read|file size is',
    re.I,
)
NUMBER = re.compile(r'-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|[Tt]rue|[Ff]alse|TRUE|FALSE')
# columns of a table that are text, whatever stands in them
TEXTS = {'prompt', 'question', 'instruction', 'query', 'input', 'context', 'system', 'response', 'completion', 'output', 'answer', 'chosen',
         'rejected', 'text', 'history', 'human_ref', 'chosen_response', 'rejected_response', 'problem', 'solution'}  # fmt: skip
SIDE = re.compile(r'_?(\d|[a-z]|[A-Z])$')  # of response_a, answer1, human_ref_B
BLANK = re.compile(r'[ \t\n\r]*')
SURROGATE = re.compile('[\udc80-\udcff]')
BROKEN = 'not valid UTF-8'
# of a list in JSON, so many characters are read at a time
PIECE = 2**20


class Row(dict):
    """A row, or an example, that knows where it stands ('file, line n'), and why it could not be read, if so."""

    where = error = ''
    # of an example: whether it is of the part for testing; None where its source is not divided
    held_out = None
    # of an example: the row that it was made of, with all its columns
    raw = None

    @classmethod
    def of(cls, raw, where, error=''):
        """A row as it was read, which need not be an object; error: why it could not be."""
        row = cls(raw if isinstance(raw, dict) else {})
        row.where, row.error = where, error
        if not error and not isinstance(raw, dict):
            row.error = 'not an object with named fields'
        return row


def read_file(file):
    """The rows of one file. Raises UserError where it cannot be read."""
    packed = Path(file).suffix if file.endswith(tuple(PACKED)) else ''
    kind = Path(file.removesuffix(packed)).suffix
    if not file.endswith(ENDINGS):
        raise UserError(f'{file}: data files end in {", ".join(FORMATS)}: convert it to one of them ({HELP})')
    try:
        with open(file, 'rb') as stream:
            head = stream.read(40).lstrip().lower()
        if head.startswith(b'version https://git-lfs'):
            raise UserError(f'{file} is a git-lfs pointer, not the data: fetch it with: git lfs pull')
        if head.startswith((b'<!doctype', b'<html')):
            raise UserError(f'{file} is a web page, not the data: fetch it again, perhaps after a login')
        yield from READERS[kind](file)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f'{file}, line {error.lineno}: not valid JSON ({error.msg}){_cut(error)}') from None
    except UnicodeDecodeError as error:
        raise UserError(f'cannot read {file}: it is not UTF-8 ({error.reason}): convert it') from None
    except READ_ERRORS as error:
        said = getattr(error, 'strerror', None) or str(error).strip() or type(error).__name__
        reason = said.splitlines()[0][:300].rstrip('.')
        more = ': it is damaged, or a download that was cut short' if CUT.search(said) else ''
        raise UserError(f'cannot read {file}: {reason}{more}') from None


def _opened(file):
    """A file's bytes, without their compression."""
    opener = PACKED.get(Path(file).suffix, open)
    if opener:
        return opener(file, 'rb')
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file, compression='zstd'))


def _read_parquet(file):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        yield from _rows_of_batches(file, table.iter_batches(1000))


def _read_arrow(file):
    """The rows of an arrow file, a stream as save_to_disk writes it, or a file with a table of contents."""
    import pyarrow

    with pyarrow.memory_map(file) as source:
        if source.read(6) == b'ARROW1':
            table = pyarrow.ipc.open_file(source)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
        yield from _rows_of_batches(file, batches)


def _rows_of_batches(file, batches):
    pieces = (batch.slice(at, 1000) for batch in batches for at in range(0, len(batch), 1000))
    for number, raw in enumerate(chain.from_iterable(piece.to_pylist() for piece in pieces), 1):
        yield Row.of(unfilled(raw), f'{file}, row {number}')


def _read_json(file):
    """The rows of a .json file: a list of them, or a row a line after all, as SHP's files have them."""
    with _opened(file) as stream:
        start = stream.read(1000).removeprefix(b'\xef\xbb\xbf').lstrip()[:1]
    with _opened(file) as stream:
        text = io.TextIOWrapper(stream, 'utf-8-sig')
        if start == b'[':
            for number, raw in enumerate(_items(text), 1):
                yield Row.of(raw, f'{file}, row {number}')
            return
        first, second = next(filter(str.strip, text), ''), next(filter(str.strip, text), '')
        if second and first.rstrip().endswith('}'):
            yield from _read_lines(file)
            return
        content = json.loads(first + second + text.read())
    kind = f'an object of {", ".join(list(content)[:9])}' if isinstance(content, dict) else 'a single value'
    raise UserError(f'{file}: not a list of rows but {kind}: write the list of rows alone, or a row a line ({HELP})')


def _items(text):
    """The items of a text file with a JSON list, which is read a piece at a time. Raises JSONDecodeError."""
    decode, piece, lines = json.JSONDecoder().raw_decode, text.read(PIECE), 0
    # behind the opening bracket, or behind a list that is empty
    at = BLANK.match(piece).end() + 1
    first = BLANK.match(piece, at).end()
    closed = piece[first : first + 1] == ']'
    at = first + 1 if closed else at
    while not closed:
        try:
            item, end = decode(piece, BLANK.match(piece, at).end())
            end = BLANK.match(piece, end).end()
            if piece[end : end + 1] not in (',', ']'):
                raise json.JSONDecodeError("Expecting ',' delimiter", piece, end)
        except json.JSONDecodeError as error:
            # it may go on in the next piece
            more = text.read(max(PIECE, len(piece) - at))
            if not more:
                error.lineno += lines
                raise
            lines += piece.count('\n', 0, at)
            piece, at = piece[at:] + more, 0
        else:
            yield item
            at, closed = end + 1, piece[end] == ']'
    piece += text.read(PIECE)
    if piece[at:].strip():
        error = json.JSONDecodeError('Extra data', piece, at)
        error.lineno += lines
        raise error


def _read_lines(file):
    """The rows of a file with one object a line; a line that is none becomes a row with an error."""
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f'{file}, line {number}'
            try:
                raw = json.loads(line.decode('utf-8-sig' if number == 1 else 'utf-8'))
            except (ValueError, RecursionError) as error:
                yield Row.of({}, where, f'not valid JSON ({getattr(error, "msg", error)}){_cut(error)}')
            else:
                yield Row.of(raw, where)


def _read_text(file):
    """A row a line of text."""
    with _opened(file) as stream:
        for number, line in enumerate(io.TextIOWrapper(stream, 'utf-8-sig', 'surrogateescape'), 1):
            if line.strip():
                yield Row.of(
                    {'text': line.rstrip('\r\n')}, f'{file}, line {number}', BROKEN if SURROGATE.search(line) else ''
                )


@cache
def _is_text(column):
    """Whether a column of a table is text, whatever stands in it: one of TEXTS, or a side of it."""
    return column in TEXTS or SIDE.sub('', column) in TEXTS


def _read_table(file):
    """The rows of a table; a column is of numbers if all of its cells are, and an empty cell is null."""
    # a first reading for the kinds of the columns
    texts = set()
    for _, cells, _ in _cells(file):
        texts |= {name for name, cell in cells.items() if cell and not NUMBER.fullmatch(cell)}
        texts |= {name for name in cells if _is_text(name)}
    for line, cells, error in _cells(file):
        raw = {name: cell if name in texts or not cell else json.loads(cell.lower()) for name, cell in cells.items()}
        yield Row.of(raw, f'{file}, line {line}', error)


def _cells(file):
    """(line, {column: text, or None where it is empty}, what is wrong) of the rows of a table. Raises UserError if it is none."""
    csv.field_size_limit(2**30)
    delimiter, line = '\t' if '.tsv' in Path(file).suffixes else ',', 1
    with _opened(file) as stream:
        text = io.TextIOWrapper(stream, 'utf-8-sig', 'surrogateescape', newline='')
        table = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(table, [])
            twice = [name for name in names if name and names.count(name) > 1]
            if twice or any(map(SURROGATE.search, names)):
                problem = f'{names.count(twice[0])} columns are called {twice[0]!r}: rename them' if twice else BROKEN
                raise UserError(f'{file}, line 1: {problem}')
            line = table.line_num + 1
            for row in filter(None, table):
                error = BROKEN if any(map(SURROGATE.search, row)) else ''
                if len(row) != len(names):
                    error = f'{len(row)} cells, and the table has {len(names)} columns'
                # a column without a name is a numbering
                yield line, {name: cell or None for name, cell in zip(names, row, strict=False) if name}, error
                line = table.line_num + 1
        except csv.Error as error:
            raise UserError(f'{file}, line {line}: not a valid table ({error}){_cut(error)}') from None


def _cut(error):
    """What to say of JSON, or of a table, that ends too early."""
    early = isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip())
    if early or 'Unterminated' in str(error) or 'unexpected end of data' in str(error):
        return ', which ends too early, as a download that was cut short'
    return ''


READERS = {'.jsonl': _read_lines, '.ndjson': _read_lines, '.json': _read_json, '.parquet': _read_parquet,
           '.csv': _read_table, '.tsv': _read_table, '.arrow': _read_arrow, '.txt': _read_text}  # fmt: skip


def unfilled(raw):
    """A row of a columnar file without the nulls inside its lists: there every message has the fields of all others."""
    return {key: _without_nulls(value) if isinstance(value, list) else value for key, value in raw.items()}


def _without_nulls(value):
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
