"""Files and folders as people have them: formats and compressions, splits and configs, what a broken download says."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from configurator import UserError
from runtime import cache
from tests.helpers import assistant, user, write_data, write_jsonl
from text import files, readers, sources
from text.files import hub_commit

ROWS = [{'prompt': f'q "{i}",\n', 'response': f'ä{i}', 'good': bool(i % 2)} for i in range(200)]
ALL = [row['response'] for row in ROWS]


def write(folder, files, ending='.jsonl'):
    """Write {name: rows} into a folder, and the folders that the names need. Returns the folder, as a string."""
    for name, rows in files.items():
        path = Path(folder, name + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_data(path, rows)
    return str(folder)


def answers(source, split='train', **options):
    return [row['response'] for row in sources.load_rows(source, split, **options)[0]]


def refused(source, says, **options):
    """The one sentence, which says this, with which a source is refused."""
    with pytest.raises(UserError, match=says) as info:
        sources.load_rows(str(source), 'train', **options)
    assert '\n' not in str(info.value)
    return str(info.value)


# ---- formats ----


@pytest.mark.parametrize('ending', [e for e in files.ENDINGS if '.txt' not in e])
def test_every_format_and_compression(tmp_path, ending):
    found = sources.load_rows(write(tmp_path, {'data': ROWS}, ending) + f'/data{ending}', 'train', undivided=True)[0]
    assert found == ROWS
    # a quoted line break makes two lines of one row
    assert int(found[1].where.rpartition(' ')[2]) == (4 if ending.startswith(('.csv', '.tsv')) else 2)
    (tmp_path / 'LICENSE.TXT').write_text('free')
    in_capitals = (tmp_path / f'data{ending}').rename(tmp_path / f'DATA{ending.upper()}')
    assert answers(str(in_capitals), undivided=True) == answers(str(tmp_path), undivided=True) == ALL
    without_a_name = in_capitals.rename(tmp_path / ending)
    assert answers(str(without_a_name), undivided=True) == ALL


@pytest.mark.parametrize('name, content, rows, lines', [
    ('data.txt', 'one\n\ntwo\r\nthree\rfour', [{'text': x} for x in ('one', 'two', 'three', 'four')], [1, 3, 4, 5]),
    # what is text, and what a number
    ('data.csv', '\ufeffPrompt,response_a,Answer2,label,score_A,note,zip\n1,7,8,True,0.5,,007\n2,9,9,false,-3,x,1\n',
     [{'Prompt': '1', 'response_a': '7', 'Answer2': '8', 'label': True, 'score_A': 0.5, 'note': None, 'zip': '007'},
      {'Prompt': '2', 'response_a': '9', 'Answer2': '9', 'label': False, 'score_A': -3, 'note': 'x', 'zip': '1'}], [2, 3]),
    # an empty line counts as a line; a row that is cut short does not make numbers of the answers before it
    ('data.csv', 'prompt,response,n\n1,2,3\n\n4,5,6\n7\n', [{'prompt': '1', 'response': '2', 'n': 3},
     {'prompt': '4', 'response': '5', 'n': 6}, {'prompt': '7'}], [2, 4, 5]),
    ('data.csv', 'prompt,n\na,1٣\n', [{'prompt': 'a', 'n': '1٣'}], [2]),  # digits of other scripts are text
    # a table without a row is read; the name of a folder says nothing of the delimiter
    ('a.tsv/b.csv', 'prompt,response\n', [], []),
    ('a.tsv/b.csv', 'prompt,response\n1,2\n', [{'prompt': '1', 'response': '2'}], [2]),
])  # fmt: skip
def test_lines_of_text_and_the_kinds_of_the_columns_of_a_table(tmp_path, name, content, rows, lines):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    found = list(sources.read_rows(None, 'train', str(file)))
    assert [list(row.items()) for row in found] == [list(row.items()) for row in rows]
    assert [int(row.where.split()[-1]) for row in found] == lines
    assert [bool(row.error) for row in found] == [row == {'prompt': '7'} for row in rows]


def test_a_list_in_json_is_read_one_by_one(tmp_path):
    """So is a file with a row a line."""
    path, lines = tmp_path / 'data.json', ''.join(json.dumps(row) + '\n' for row in ROWS)
    for text in (json.dumps(ROWS), '\ufeff ' + json.dumps(ROWS, indent=1) + '\n', lines, ' [ ]'):
        path.write_text(text)
        assert list(sources.read_rows(None, 'train', str(path))) == (ROWS if len(text) > 9 else [])
    path.write_text(json.dumps([{'text': 'x' * 10_000}] * 500))
    tracemalloc.start()
    assert sum(1 for _ in sources.read_rows(None, 'train', str(path))) == 500
    assert tracemalloc.get_traced_memory()[1] < 2.1 * path.stat().st_size
    tracemalloc.stop()


IMAGE = [user([{'type': 'image_url', 'image_url': {'url': 'x'}}]), assistant('a')]
OF_ROWS = [  # what is wrong with a row, or all of them
    ('a.csv', b'text,b\nx,y,z\n', 'line 2: not as many cells as columns .3, 2.; .*; the only row cannot be read; mend the file'),
    ('a.csv', b'text,b\nx,y\nz\n', "line 3: not as many cells as columns .1, 2.; found: 'text' .text.; mend it, or leave"),
    ('a.csv', b'text\nx\n\xe4\n', 'line 3: not valid UTF-8'),
    ('a.csv', b'prompt;chosen;rejected\nq;a;b\n', "; the only row cannot be read; its columns are separated by ';': in a .csv it"),
    ('a.csv', b'prompt;chosen;rejected\nq, r;a;b\nq;a;b\n', "first 2 rows can be read; its columns are separated by ';'"),
    ('a.tsv', b'prompt\tresponse\nq\t\xe9\n', 'not valid UTF-8: save the file as UTF-8; .*cannot be read; mend the file'),
    ('a.txt', b'x\n\xe4\n', 'line 2: not valid UTF-8'),
    *(('a.jsonl', '{"prompt": "é", "response": "a"}'.encode(code), 'line 1: not valid UTF-8: save the file as UTF-8; ')
      for code in ('latin-1', 'utf-16')),
    ('a.json', b'{"text": "a"}\n{"text": \n', 'a.json, line 2: not valid JSON'),
    ('a.jsonl', b'{"text": "a", "b": {"c": 1, "d": 2, "c": 1}}\n', "line 1: not valid JSON .two fields of an object are called 'c'.; "),
    *(('a.json', text, 'row 1: not an object with named fields') for text in (b'3', b'null', b'"a"')),
]  # fmt: skip
OF_FILES = [  # what is wrong with a file, whether or not bad rows are left out
    *((f'a.{end}', b'text\n' + b'x' * 1000, 'line 2 is longer than 999 characters') for end in ('txt', 'csv')),
    ('a.jsonl.gz', gzip.compress(b' ' * 1000, mtime=0), 'line 1 is longer than 999 characters'),
    ('a.json', b'[{"a": 1},\n {"a": }]', 'a.json: line 2: not valid JSON: Expecting value'),
    ('a.json', b'[{"text": "a", "text": "b"}]', "cannot read .*a.json: two fields of an object are called 'text'"),
    ('a.jsonl.xz', lzma.compress(b'{"text": "a"}\n') + bytes(8), 'it is damaged, .* or padded with zeros: xz -d unpacks it then'),
    ('a.json', b'[{"text": "\xe4"}]', 'cannot read .*a.json: .*or not UTF-8'), ('a.json', b'[' * 100_000, 'cannot read'),
    ('a.json.gz', gzip.compress(b'[{"text": "a"}]', mtime=0)[:-6], 'cannot read'), ('a.jsonl.gz', b'not gzip', 'cannot read'),
    ('a.jsonl.gz', gzip.compress(b'', mtime=0)[:10] + b'\xff' * 30, 'cannot read'),
    ('a.csv', b'text,b\nx,y\n"x\ny,z', '/a.csv, line 3: not a valid table .unexpected end of data.*cut short'),
    ('a.csv', b'text,b,b\nx,y,z\n', 'line 1: two columns have one name'),
    ('a.csv', 'text\nx\n'.encode('utf-16'), 'line 1: .* or it is not valid UTF-8: save the file as UTF-8'),
    *(('a.txt', page + b'>\n<p>Sign in</p>\n', '^[^ ]*a.txt is a web page by its first bytes: fetch the data again')
      for page in (b'<!DOCTYPE html', b'\n<HTML')),
    *((name, start + b'x' * 50, f'{name} is a {kind} by its first bytes: {fix}') for name, start, kind, fix in (
        ('a.jsonl', b'\x1f\x8b', '.gz', 'let its name end so'), ('a.csv', b'BZh9', '.bz2', 'let'), ('a.json', b'\xfd7zXZ', '.xz', 'let'),
        ('a.tsv', b'(\xb5/\xfd', '.zst', 'let'), ('a.json', b'PAR1', '.parquet', 'let'), ('a.parquet', b'ARROW1', '.arrow', 'let'),
        ('a.csv', b'PK\3\4', '.zip', 'unpack or convert it'), ('a.txt', b'{"text": ', 'json', 'let'), ('a.txt', b' [{"text": ', 'json', 'let'))),
    ('a.arrow', b'', 'cannot read .*a.arrow: .*cut short'), ('a.parquet', b'', 'cannot read'), ('a.parquet', b'PAR1 not really', 'cannot read'),
    *((name, b'{"text": "a"}', f'/{name}: data files end in .jsonl, .*: convert it to one of them') for name in ('a.zip', 'a')),
]  # fmt: skip


@pytest.mark.parametrize('row, words', [
    ({'messages': IMAGE}, 'image_url'), ({'prompt': 'q', 'response': 'a', 'good': 'maybe'}, "'good' is neither"),
    ({'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'margin': 'big'}, "'margin' is missing or of the wrong type"),
    ({'messages': [{'content': 'q'}, assistant('a')]}, "'role' is missing")])  # fmt: skip
def test_a_value_that_is_wrong_in_all_rows(tmp_path, row, words):
    """It may be the value, or the layout."""
    path = write_jsonl(tmp_path / 'a.jsonl', [row])
    refused(path, f'{words}.*; mend what is wrong, or, if it is the layout, say which column is which: --columns=')


def test_a_file_that_is_one_row_of_all_values(tmp_path):
    """As pandas writes it; where objects hold the texts, --columns cannot name them."""
    rows = {'prompt': ['q', 'r'], 'response': ['a', 'b']}
    columns = {name: {'0': 'a', '1': 'b'} for name in rows}
    for whole in (rows, {'train': [rows], 'test': [rows]}, columns, rows | {'response': {'0': 'a'}}):
        (tmp_path / 'a.json').write_text(json.dumps(whole))
        assert '--columns' not in refused(
            tmp_path / 'a.json', "on a line of its own or in a list .pandas: orient='records'."
        )
    with_object = write_jsonl(tmp_path / 'a.jsonl', [{'id': 'x', 'body': {'prompt': 'q'}}])
    refused(with_object, "; write an object's fields as columns first")
    assert 'fields as columns' not in refused(write_jsonl(tmp_path / 'a.jsonl', [{'id': 'x'}]), '--columns')


@pytest.mark.parametrize('name, content, says', OF_ROWS + OF_FILES, ids=str)
def test_files_that_are_no_data(tmp_path, name, content, says, monkeypatch):
    """One sentence, which names the file once, and does not blame the columns."""
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(readers, 'LONGEST', 999)
    for skip in (False, True) if (name, content, says) in OF_FILES else (False,):
        message = refused(tmp_path / name, says, skip_bad_rows=skip)
        assert message.count(str(tmp_path)) == 1 and '--columns' not in message and 'layout' not in message


@pytest.mark.parametrize('end', ['parquet', 'arrow'])
def test_two_columns_with_one_name(tmp_path, end):
    import pyarrow.parquet

    table = pyarrow.table([['x'], ['y']], names=['text', 'text'])
    if end == 'parquet':
        pyarrow.parquet.write_table(table, tmp_path / 'a.parquet')
    else:
        with pyarrow.ipc.new_file(tmp_path / 'a.arrow', table.schema) as file:
            file.write_table(table)
    refused(tmp_path / f'a.{end}', f'a.{end}: two columns have one name: rename them')


def test_other_columns_in_a_half_of_the_rows_are_counted(tmp_path):
    rows = [ROWS[0], {'frage': 'a'}, ROWS[1], {'frage': 1}] * 60
    says = r"line {}: .*of the 101 rows from there on, 51 are bad: 26 with 'frage' .text.; 25 with 'frage' .number.; mend it"
    for line in (2, 1):
        refused(write_jsonl(tmp_path / 'data.jsonl', rows[2 - line :]), says.format(line))
    (tmp_path / 'a.json').write_text('{"data": []}')
    refused(tmp_path / 'a.json', "a.json, row 1: .*found: 'data' .list.")


@pytest.mark.parametrize('indent', [None, 2])
def test_an_object_that_holds_the_rows(tmp_path, indent):
    """Whole, or a single row; of two lists none is meant, and messages are no rows."""
    chat = {'messages': [user('q'), assistant('a')], 'id': ['x']}
    talk = {'conversations': [{'from': 'human', 'value': 'q'}]}
    two = {'train': ROWS, 'test': ROWS}
    for content, rows in (
        ({'data': ROWS, 'tags': ['x']}, ROWS),
        (chat, [chat]),
        (talk, [talk]),
        (two, [two]),
        ({'data': []}, [{'data': []}]),
    ):
        (tmp_path / 'a.json').write_text(json.dumps(content, indent=indent))
        assert list(sources.read_rows(None, 'train', str(tmp_path / 'a.json'))) == rows
    # a row a line, of which the first is broken
    (tmp_path / 'a.json').write_text('{"a": 1,\n{"a": 2}\n')
    assert [bool(row.error) for row in sources.read_rows(None, 'train', str(tmp_path / 'a.json'))] == [True, False]


@pytest.mark.parametrize('ending', '.jsonl .json .jsonl.gz .jsonl.bz2 .jsonl.xz .jsonl.zst .parquet .arrow'.split())
def test_pointers_and_truncated_downloads_are_named(tmp_path, ending):
    path = Path(write(tmp_path, {'data': ROWS}, ending), f'data{ending}')
    whole = path.read_bytes()
    pointer = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'
    lfs = 'is a git-lfs pointer by its first bytes: fetch the data with: git lfs pull'
    for content, says in ((whole[: len(whole) * 2 // 3], 'cut short'), (pointer, lfs)):
        path.write_bytes(content)
        assert str(path) in refused(path, says)


def test_content_hash():
    assert files.content_hash('a', 'b') == files.content_hash('a', 'b') < 2**64
    hashes = [('a', 'b'), ('ab',), ('b', 'a'), ('a', ['b']), ('a', 'b', ''), (['a', 'b'],), ('é',), ('\ud800',)]
    assert len({files.content_hash(*x) for x in hashes}) == len(hashes)
    assert files.content_hash({'a': 1, 'b': 2}) == files.content_hash({'b': 2, 'a': 1})
    # so the held-out part is the same on every machine, always
    assert (files.content_hash('p'), files.content_hash('é')) == (0x9715B4127127EFDE, 0xAFFD0BBB7816103E)


# ---- folders ----


def divided(source):
    """Whether a source gives all rows, once, a part of them for testing."""
    train, test = answers(source), answers(source, 'test')
    return test and len(test) < 25 and sorted(train + test) == sorted(ALL)


def test_a_cache_without_a_home(monkeypatch):
    """An empty NANOPREF_CACHE is none; a process without a home says which variable is missing."""
    monkeypatch.setenv('NANOPREF_CACHE', '')
    monkeypatch.setenv('HOME', '/somewhere')
    assert cache.path_of('tokens', 'ab') == Path('/somewhere/.cache/nanopref/tokens-ab.safetensors')
    monkeypatch.setattr(cache.os.path, 'expanduser', lambda path: path)
    with pytest.raises(UserError, match='set NANOPREF_CACHE'):
        cache.path_of('tokens', 'ab')


def test_home_and_patterns(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write(tmp_path / 'mine', {'part-0': ROWS[:20], 'part-1': ROWS[20:]})
    for source in ('~/mine', '~/mine/part-*.jsonl', '~/mine/part-[01].jsonl', f'{tmp_path}/mine/**/*.jsonl'):
        assert divided(source), source
        assert sources.fingerprint(source)
    refused('~/mine/none-*.jsonl', 'no file or folder')
    assert divided(write(tmp_path, {'a:b': ROWS}) + '/a:b.jsonl')
    write(tmp_path, {'a+b': ROWS, 'a+b.jsonl+c': ROWS})
    monkeypatch.chdir(tmp_path)
    for joined in (
        ['~/a+b.jsonl'],
        ['hh', 'shp'],
        ['hh:~/a+b.jsonl'],
        ['hh:a+b.jsonl[test]'],
        ['shp:a+*.jsonl'],
        ['hh:a', 'b'],
        ['hh', 'shp:mine'],
        ['owner/name', 'hh'],
        ['a+b.jsonl', 'hh'],
        ['a+b.jsonl+c.jsonl', 'hh'],  # the longest that there is
        ['hh', 'shp:a+b.jsonl', '~/a+b.jsonl', 'a'],
        ['hh', ''],
    ):
        assert sources.joined('+'.join(joined)) == joined


@pytest.mark.parametrize('held_out', ['test', 'validation', 'valid', 'dev', 'val'])
def test_a_folder_as_the_hub_has_it(tmp_path, held_out, capsys):
    write(tmp_path, {f'data/train-0000{i}-of-00002': ROWS[i::2] for i in range(2)}, '.parquet')
    assert divided(write(tmp_path, {'notes': [{'response': 'no data'}]}))
    write(tmp_path, {f'data/{held_out}-00000-of-00001': ROWS[:3]}, '.parquet')
    assert answers(str(tmp_path)) == ALL[::2] + ALL[1::2] and answers(str(tmp_path), 'test') == ALL[:3]
    assert divided(f'{tmp_path}[train]') is False and divided(str(tmp_path / 'data/train*'))
    assert answers(f'{tmp_path}[{held_out}]', undivided=True) == ALL[:3]
    # shards that git-annex has not fetched
    (tmp_path / 'data/train-00002-of-00003.parquet').symlink_to('not fetched')
    assert answers(str(tmp_path)) == ALL[::2] + ALL[1::2]
    assert 'note: links to nothing, which are left out, or out' in capsys.readouterr().out
    refused(f'{tmp_path}[tests]', rf"no split 'tests'; there are train, {held_out}|{held_out}, train: say which")


@pytest.mark.parametrize('names', [
    'data/train-00000-of-00002 data/train-00001-of-00002 data/validation-00000-of-00001',
    'data/train_sft-00000-of-00001 data/test_sft-00000-of-00001', 'math-00000-of-00001 code-00000-of-00001',
    'train test', 'train eval extra', 'a b', 'train/a train/b test/a', 'my_train my_dev', 'training-set testing',
    'helpful/train helpful/test harmless/train', 'latest values trainer', 'train2 test2', 'train/data validation/data',
    'x-train-1 x-valid-1', 'latest_train train-00000 test', 'test', 'dev/train', 'train/test', 'train/data/easy-00000-of-00001 test/data/easy-00000-of-00001', 'default/train/0000 default/test/0000', 'part-00000 part-00001',
])  # fmt: skip
def test_splits_as_datasets_tells_them(tmp_path_factory, monkeypatch, names):
    data_files = pytest.importorskip('datasets.data_files')
    # datasets looks at the names of the folders above, too
    folder = write(tmp_path_factory.mktemp('latest test of training'), dict.fromkeys(names.split(), ROWS[:1]))
    monkeypatch.chdir(folder)
    theirs = data_files.DataFilesDict.from_patterns(data_files.get_data_patterns('.'), base_path='.')
    ours = {split: sorted(map(os.path.abspath, found)) for split, found in files.folder_splits(folder).items()}
    assert ours == {str(split): sorted(map(os.path.abspath, found)) for split, found in theirs.items()}


def test_links_out_of_a_folder_are_named(tmp_path, capsys):
    """Not in the hub's cache, where a snapshot has links to files beside it."""
    blob = Path(write(tmp_path / 'hub/blobs', {'x': ROWS}), 'x.jsonl')
    for folder, is_named in (('hub/snapshots/c0ffee', False), ('mine', True)):
        link = tmp_path / folder / 'data/rows.jsonl'
        link.parent.mkdir(parents=True)
        link.symlink_to(blob)
        (link.parent / 'same.jsonl').symlink_to('rows.jsonl')
        assert len(answers(str(link.parents[1]), undivided=True)) == 2 * len(ROWS)
        out = capsys.readouterr().out
        assert (
            f'out of the folder {link.parents[1]} (2): {link.parent}/' in out and f' to {blob}\n' in out
        ) is is_named


def test_files_that_are_not_read(tmp_path, capsys):
    """A text beside other data is a licence; a file that no split has is named."""
    (tmp_path / 'data.txt').write_text('one')
    assert answers(str(tmp_path), undivided=True) == ['one']
    folder = write(tmp_path, dict.fromkeys(('train', 'test', 'notes'), ROWS[:3]))
    assert len(answers(folder)) == len(answers(folder, 'test')) == 3
    sources.keep_data(f'toy+{folder}', f'{folder}/new.jsonl')  # to be written
    with pytest.raises(UserError, match='is a file of the data'):
        sources.keep_data(f'toy+{folder}', f'{folder}/notes.jsonl')
    assert capsys.readouterr().out == f'note: not read, since other files are named train: {folder}/notes.jsonl\n'
    # the same rows twice, or a file about the data
    answers(write(folder, {'train': ROWS[:3]}, '.parquet'))
    said = f'note: train is read from .jsonl and .parquet files in {folder}: if they hold the same'
    assert said in capsys.readouterr().out
    # the last ending is the format
    answers(write(tmp_path / 'named', {'train-0.json': ROWS[:3], 'train-1': ROWS[3:6]}, '.parquet'))
    assert capsys.readouterr().out == ''
    Path(write(tmp_path / 'more', {'rows': ROWS}), 'about.json').write_text('{"license": "mit"}')
    refused(tmp_path / 'more', f'about.json.*or name the file that is meant: --data={tmp_path}/more/FILE; see README')


def test_splits_of_one_folder_are_not_mixed(tmp_path, monkeypatch):
    write(tmp_path, {'train_prefs': ROWS, 'train_sft': ROWS[:2], 'test_prefs': ROWS[:3], 'other': ROWS[:1]})
    refused(tmp_path, r"several splits; there are test_prefs, train_prefs, train_sft: say which: .*\[train_prefs\]'")
    # where one is for training, any name will do
    one = write(tmp_path / 'one', {'train_dpo': ROWS, 'test': ROWS[:3]})
    for source in (f'{tmp_path}[train_prefs]', one):
        assert answers(source) == ALL and answers(source, 'test') == ALL[:3]
    # so does a reader of one's own, which leaves the rest of the options
    assert len(list(sources.read_rows(None, 'test', one))) == 3
    # a named reader divides what has no test part, whatever the files are called: it must not evaluate on training rows
    halves = {'validation-0': ROWS[:9], 'validation-1': ROWS[9:]}
    for there in ({'test': ROWS}, halves, {'train_sft': ROWS, 'test_prefs': ROWS}):
        assert divided('hh:' + write(tmp_path / '+'.join(there), there)), there.keys()
    # and reads the test part as it is, where it cannot be said which split is for training; also in the folder of its own name
    clear = {'train_prefs': ROWS, 'train_sft': ROWS[:2], 'test': ROWS[:9]}
    assert answers('hh:' + write(tmp_path / 'clear', clear), 'test') == ALL[:9]
    write(tmp_path / 'clone/helpful-base', {'train': ROWS})
    write(tmp_path / 'clone/harmless-base', {'train': ROWS[:2], 'test': ROWS[:3]})
    assert divided(f'hh_helpful:{tmp_path}/clone')
    # a function that reads all splits has the same rows for both, where it cannot be said which split is for training: divided
    splits = {'train_prefs': ROWS[:9], 'train_sft': ROWS[9:], 'test_prefs': ROWS[:1]}
    write(tmp_path / 'all', splits)

    def get_all(split, path):
        return readers.read_rows(None, split, files.data_files(path)), lambda row: [row]

    monkeypatch.setattr(sources, 'get_all', get_all, raising=False)
    source = f'all:{tmp_path}/all'
    train, test = [{row['prompt'] for row in sources.load_rows(source, split)[0]} for split in ('train', 'test')]
    assert test and len(train | test) == len(ALL) and not train & test
    # and otherwise takes each as it is
    asked = [{'instruction': text} for text in ALL]
    halves = {'train': asked[:9], 'test': asked[9:]}
    source = 'alpaca_eval:' + write(tmp_path / 'halves', halves)
    assert [len(sources.load_rows(source, split)[0]) for split in ('train', 'test')] == [9, len(ALL) - 9]


def test_save_to_disk(tmp_path):
    datasets = pytest.importorskip('datasets')
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / 'one', num_shards=2)
    # what map leaves there is no data, nor what older versions wrote
    (tmp_path / 'one/dataset_infos.json').write_text('{}')
    datasets.load_from_disk(tmp_path / 'one').map(lambda row: row, load_from_cache_file=False)
    assert list((tmp_path / 'one').glob('cache-*.arrow'))
    parts = {'train_sft': whole, 'test_sft': whole.select(range(3)), 'train_gen': whole.select([5])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / 'dict')
    assert divided(str(tmp_path / 'one'))
    assert answers(f'{tmp_path}/dict[train_sft]') == ALL and answers(f'{tmp_path}/dict[train_sft]', 'test') == ALL[:3]
    refused(tmp_path / 'dict', r"several splits; there are .*train_gen.*: say which: --data='.*dict\[train_")


README = """---
license: mit
configs:
- config_name: easy
  data_files:
  - split: train
    path: [easy/a.jsonl, "easy/b*.jsonl"]
  - split: test
    path: easy/held.jsonl
- config_name: hard
  data_files: hard/*
- config_name: both
  data_dir: easy
- config_name: gone
  data_files: [gone/*.jsonl]
---
# Mine
"""


def test_a_readme_names_only_files_of_its_folder(tmp_path):
    write_jsonl(tmp_path / 'private.jsonl', [{'prompt': 'a', 'response': 'b'}])
    folder = tmp_path / 'given'
    folder.mkdir()
    for entry in ({'data_files': '../private.jsonl'}, {'data_files': [{'path': ['x/../../*.jsonl']}]},
                  {'data_files': str(tmp_path / '*')}, {'data_dir': '..'}):  # fmt: skip
        (folder / 'README.md').write_text(f'---\nconfigs: {json.dumps([entry])}\n---\n')
        with pytest.raises(UserError, match='which is outside of the folder'):
            files.folder_splits(str(folder))
    # lists of lists of the same, nine to the power of eleven: not a name
    names = ['a: &a [x, x, x, x, x, x, x, x, x]']
    names += [f'{new}: &{new} [{", ".join([f"*{old}"] * 9)}]' for old, new in pairwise('abcdefghijk')]
    write_jsonl(folder / 'train.jsonl', [{'prompt': 'a', 'response': 'b'}])
    (folder / 'README.md').write_text('\n'.join(['---', *names, 'configs: [{data_files: *k}]', '---', '']))
    assert files.folder_splits(str(folder)) == {'train': [str(folder / 'train.jsonl')]}


def test_the_configs_of_a_readme(tmp_path, capsys):
    write(tmp_path, {'easy/a': ROWS[:20], 'easy/b1': ROWS[20:], 'easy/held': ROWS[:2], 'hard/x': ROWS})
    (tmp_path / 'README.md').write_text(README)
    refused(tmp_path, 'has several configs; there are easy, hard, both, gone: say which: --data=.*:CONFIG')
    assert answers(f'{tmp_path}:easy') == ALL and answers(f'{tmp_path}:easy', 'test') == ALL[:2]
    assert divided(f'{tmp_path}:hard') and answers(f'{tmp_path}:easy[test]', undivided=True) == ALL[:2]
    refused(f'{tmp_path}:soft', "no config 'soft'; there are easy, hard, both")
    assert sorted(answers(f'{tmp_path}:both', undivided=True)) == sorted(ALL + ALL[:2])
    refused(f'{tmp_path}:gone', "none of the files that its README names for the config 'gone': fetch them")
    (tmp_path / 'README.md').write_text(README.replace('gone\n', 'default\n'))
    refused(tmp_path, "none of the files that its README names for the config 'default': fetch them")
    (tmp_path / 'README.md').write_text(README)
    # what the README says is of the fingerprint
    before = sources.fingerprint(f'{tmp_path}:easy')
    (tmp_path / 'README.md').write_text(README.replace('easy/held', 'easy/a'))
    assert sources.fingerprint(f'{tmp_path}:easy') != before
    # the one that the hub would take, and patterns that fit more than data
    (tmp_path / 'README.md').write_text(README.replace('hard/*', '"hard/**"\n  default: true'))
    (tmp_path / 'hard/LICENSE').write_text('free')
    assert divided(str(tmp_path))
    unread = f'note: the header of {tmp_path}/README.md cannot be read'
    missing = f"note: {tmp_path} has none of the files that its README names for the config 'default'"
    for header, said in (
        ('configs: [1, 2]', unread), ('configs: {a: b}', unread), (': : [', unread), ('configs: [{data_files: 3}]', missing), ('a: b', ''),
    ):  # fmt: skip
        (tmp_path / 'README.md').write_text(f'---\n{header}\n---\n')
        files.say_once.cache_clear()
        assert ALL[5] in answers(str(tmp_path), undivided=True) and said in capsys.readouterr().out
    two = 'configs: [{config_name: a, data_files: gone/*}, {config_name: b, data_files: hard/*}]'
    (tmp_path / 'README.md').write_text(f'---\n{two}\n---\n')
    refused(f'{tmp_path}:a', "none of the files that its README names for the config 'a': fetch them")
    write(tmp_path / 'far', {'off/away/a': ROWS})
    (tmp_path / 'README.md').write_text('---\nconfigs: [{config_name: default, data_files: far/**/*.jsonl}]\n---\n')
    assert answers(str(tmp_path), undivided=True) == ALL


def test_the_words_of_labels(tmp_path):
    """`datasets` keeps them beside the numbers, in all its files; 0 may be good."""
    hub = pytest.importorskip('datasets')
    labels = {'label': hub.ClassLabel(names=['good', 'bad']), 'grade': hub.ClassLabel(names=['0', '1'])}
    labels['size'] = hub.ClassLabel(names=['1', 'many'])
    features = hub.Features(prompt=hub.Value('string'), response=hub.Value('string'), **labels)
    rows = [{'prompt': f'p{i}', 'response': 'r', 'label': i % 2, 'grade': 1, 'size': 1} for i in range(4)]
    rows.append({'prompt': 'p', 'response': 'r', 'label': None})
    table = hub.Dataset.from_list(rows, features=features)
    table.to_parquet(str(tmp_path / 'a.parquet'))
    table.save_to_disk(str(tmp_path / 'saved'))
    for path in ('a.parquet', 'saved'):
        found, _ = sources.load_rows(str(tmp_path / path), 'train', undivided=True, skip_bad_rows=True)
        raw = [(row['good'], row.raw['grade'], row.raw['size']) for row in found[:4]]
        assert raw == [(True, 1, 'many'), (False, 1, 'many')] * 2


# ---- the hub ----


HUB = ['train_prefs', 'train_sft', 'test_prefs', 'test_sft']


@pytest.mark.parametrize('source, there, train, test', [
    ('o/n', ['train', 'validation'], ('train', {}), ('validation', {})),
    ('o/n[train_prefs]', HUB, ('train_prefs', {}), ('test_prefs', {})),
    ('o/n:c', ['train', 'test'], ('train', {'name': 'c'}), ('test', {'name': 'c'})),
    ('o/n:c.1[train_sft]', HUB, ('train_sft', {'name': 'c.1'}), ('test_sft', {'name': 'c.1'})),
    ('o/n', ['prefs'], ('prefs', {}), ('prefs', {})),
])  # fmt: skip
def test_splits_and_configs_of_the_hub(hub, source, there, train, test):
    hub.splits = there
    for split in ('train', 'test'):
        sources.load_rows(source, split)
    assert [call[:3] for call in hub.asked] == [('o/n', *train), ('o/n', *test)]
    refused('o/n[nothing]', "no split 'nothing'; there are")


def test_what_the_hub_asks_to_choose(hub):
    def refuse(*_, **__):
        raise ValueError("Config name is missing.\nPick one among the available configs: ['easy', 'hard']\nExample")

    hub.splits = HUB
    refused('o/n', r"o/n has several splits; there are train_prefs, .*say which: --data='o/n\[train_prefs\]'")
    refused('hh[x]', r"the reader 'hh' chooses the split itself: leave \[x\] out")
    hub.load_dataset_builder = refuse
    refused('o/m', r"available configs: .'easy', 'hard'.*--data='o/m:CONFIG'")


def test_the_commit_of_a_hub_dataset(monkeypatch, tmp_path):
    """Where the hub cannot be reached, the one that was read last; None where it does not say."""
    monkeypatch.setenv('NANOPREF_CACHE', f'{tmp_path}/of a new/machine')
    seen = []
    for there, sha in ((True, 'a'), (False, 'b'), (True, None)):
        monkeypatch.setattr(files.hub, 'reachable', lambda there=there: there)
        known = {('o/n', 10): SimpleNamespace(sha=sha)} if sha else {}
        monkeypatch.setattr('huggingface_hub.HfApi.dataset_info', lambda _, name, timeout, it=known: it[name, timeout])
        hub_commit.cache_clear()
        seen.append(hub_commit('o/n'))
        if seen == ['a']:
            files._remember('a', 'o/n')
    assert seen == ['a', 'a', None]


def test_linked_folders_are_read_once(tmp_path):
    """One outside as well; in circles no link leads."""
    write(tmp_path, {'data/v1/a': ROWS[:2], 'elsewhere/b': ROWS[2:4]})
    for name, target in {'latest': 'v1', 'self': '.', 'v1/up': '..', 'b': '../elsewhere'}.items():
        (tmp_path / 'data' / name).symlink_to(target)
    assert sorted(answers(str(tmp_path / 'data'))) == ALL[:4]


@pytest.mark.parametrize(
    'ending, packed', [('bz2', bz2.compress), ('xz', partial(lzma.compress, preset=0)), ('gz', gzip.compress)]
)
def test_streams_of_a_packed_file(tmp_path, ending, packed):
    """One after another, as pbzip2 and xz write them; a damaged one, or the beginning of one, is no end of the file."""
    first, second = (packed(json.dumps(row).encode() + b'\n') for row in ROWS[:2])
    file = tmp_path / f'a.jsonl.{ending}'
    file.write_bytes(first + second)
    assert answers(str(file), undivided=True) == ALL[:2]
    for damaged in (b'\1\2\3\4' + second[4:], second[:-20], second[:5], second[:20] + b'\0' + second[21:]):
        file.write_bytes(first + damaged)
        refused(file, f'cannot read .*a.jsonl.{ending}: ')
    many = [{'text': 'x' * 100 + str(i)} for i in range(3000)]
    file.write_bytes(b''.join(packed(json.dumps(row).encode() + b'\n') for row in many))
    assert [row['text'] for row in sources.read_rows(None, 'train', str(file))] == [row['text'] for row in many]


@pytest.mark.parametrize(
    'names',
    ['chosen rejected', 'data/good data/bad', 'data/Winner-1 data/loser-1', 'pos/a neg/a', 'x_correct.y x_incorrect.y'],
)
def test_two_sides_are_no_one_source(tmp_path, hub, names):
    """Answers of a file called rejected would be learnt like those of one called chosen."""
    one, two = names.split()
    write(tmp_path, {one: ROWS[:3], two: ROWS[3:6]})
    for source in (tmp_path, f'{tmp_path}/**/*.jsonl'):
        refused(
            source,
            'may be two sides of pairs: make pairs, or name one, or A.B',
        )
    assert answers(f'{tmp_path}/{two}.jsonl', undivided=True) == ALL[3:6]


def test_other_names_have_no_sides(tmp_path):
    write(
        tmp_path,
        {name: ROWS[i : i + 1] for i, name in enumerate(('goods', 'bads', 'unsafe', 'my_chosen', 'a_incorrect'))},
    )
    assert sorted(answers(str(tmp_path), undivided=True)) == sorted(ALL[:5])


def test_numbers_alone_tell_no_split_and_the_only_config_is_taken(tmp_path):
    for names, splits in (('data part', ['train']), ('easy hard', ['easy', 'hard'])):
        folder = write(tmp_path / names, {f'data/{name}-00000-of-00001': ROWS[:1] for name in names.split()})
        assert sorted(files.folder_splits(folder)) == splits
    Path(folder, 'README.md').write_text('---\nconfigs: [{config_name: one, data_files: data/easy*}]\n---\n')
    assert files.folder_splits(folder) == {'train': [f'{folder}/data/easy-00000-of-00001.jsonl']}


def test_files_of_a_reader_by_split(tmp_path):
    """Whose names here are others than the reader's."""
    path = write(tmp_path, {'train_sft': ROWS[:2], 'validation': ROWS[2:4]})
    for split, name in {'train': 'train_sft', 'test': 'validation', 'validation': 'validation'}.items():
        assert [Path(file).name.partition('.')[0] for file in files.local_files(path, split)] == [name]
