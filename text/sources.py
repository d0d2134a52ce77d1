"""The datasets, and how their rows become examples. To add a dataset, write get_foo(split, path) -> (rows, parse).

rows: the raw rows of the hub dataset, or of the local file or folder `path`. parse(row) returns a list of examples:
  {'prompt', 'chosen', 'rejected'}, with 'margin', a number, if the data says by how much chosen is better;
  {'prompt', 'response'}, with 'good': bool for KTO, or 'turns': all messages of a conversation, whose answers are trained
  on unless their 'weight' is 0;
  {'prompt'};  {'drop': reason} for a row that the dataset's rules exclude. formats.py adds 'repeats': whether the answers
  began with the prompt, which is then removed; absent if that is unknown.
Texts are strings in Anthropic's format ('\\n\\nHuman: ...\\n\\nAssistant:', then ' answer') or lists of messages. parse
raises ValueError for an invalid row. It may also be None (formats.py detects the layout by the columns) or a Layout."""

import os
import re
from collections import Counter
from contextlib import suppress
from functools import partial
from glob import glob
from itertools import chain, islice
from textwrap import shorten
from typing import NamedTuple

from configurator import UserError
from runtime.files import check_file, file_hash, say_once
from runtime.values import did_you_mean, looked_in
from text import files, formats, toy
from text.examples import in_words
from text.files import ENDINGS, HELP, content_hash
from text.formats import Layout, each
from text.messages import DoubtfulCode, answer, ask, field, message
from text.readers import Row, read_rows

# how many rows to look at to detect the layout, whether answers repeat prompts, and whether all rows are bad
LOOK_AHEAD = 100
REPEATED = 'note: answers that repeated their prompt, which was taken off'
TEXT = str | list  # a list of messages
TYPES = {'prompt': TEXT, 'chosen': TEXT, 'rejected': TEXT, 'response': TEXT, 'good': int, 'margin': int | float | None}
# winner: a column that says which of two answers is better
SAY_WHICH = (
    "say which column is which: --columns='prompt=NAME, chosen=NAME, rejected=NAME', 'prompt=NAME, response=NAME, label=NAME', "
    "'prompt=NAME, response_a=NAME, response_b=NAME, winner=NAME', 'messages=NAME' or 'text=NAME'"
)


def load_rows(source, split, **options):
    """Return (list of all examples, Counter of reasons why rows were left out). options: of read_examples."""
    left_out = Counter()
    return list(read_examples(source, split, left_out, **options)), left_out


def read_examples(source, split, left_out, *, undivided=False, num_turns=1, skip_bad_rows=False, task=None, columns=None,
                  both=False):  # fmt: skip
    """Yield the examples of one source: 'hh', 'hh:PATH', 'toy', a hub id, a file or a folder. Raises UserError.

    An example is a Row; .where is its file and line. left_out: Counter, updated with reasons for rows left out; reasons
    that begin with 'note: ' count examples that are kept. num_turns: for ShareGPT, answers per conversation.
    A source without a test split is divided by a hash of the prompt, unless undivided. both: yield both parts; the
    example's .held_out is then True for the test part, and None if the source is not divided.
    task: 'pairs', 'singles', 'sft' or 'prompts'; if a prompt has several answers, 'sft' takes the best.
    columns: 'prompt=question, ...' reads only these columns. skip_bad_rows: count bad rows instead of raising."""
    rows, parse, has_no_test_part = _opened(source, split, num_turns, undivided)
    examples = _valid(_parsed(rows, parse, task, columns), source, left_out, skip_bad_rows)
    for example in _unmixed(examples, left_out, skip_bad_rows):
        if has_no_test_part and not undivided:
            # hold out one in twenty prompts, by their hash; of messages, only role and content count
            prompt = example['prompt']
            if not isinstance(prompt, str):
                prompt = [message(turn['role'], turn['content']) for turn in prompt]
            example.held_out = content_hash(prompt) % 20 == 0
            is_in_split = example.held_out == (split == 'test')
            if not both and not is_in_split:
                continue
        yield example


def _unmixed(examples, left_out, skip_bad_rows):
    """Yield examples without 'repeats' (whether formats.py took the prompt off the answers), which must be the same in all.

    Answers that begin with their prompt repeat it only if all of the first do so: 'Hi there' to 'Hi' is no repetition."""
    head = list(islice(examples, LOOK_AHEAD))
    must_repeat = {example['repeats'] for example in head if 'repeats' in example} == {True}
    for example in chain(head, examples):
        repeats = example.pop('repeats', None)  # None: unknown
        if repeats is not None and repeats != must_repeat:
            mixed = 'answers that begin with their prompt among others that do not: all or none must'
            if not skip_bad_rows:
                raise UserError(f'{example.where}: {mixed}; mend it, or leave it out with --skip_bad_rows ({HELP})')
            left_out[f'bad rows: {mixed}'] += 1
            continue
        if repeats:
            left_out[REPEATED] += 1
        yield example


def _opened(source, split, num_turns=1, undivided=False):
    """Return (rows, parse, has_no_test_part) of a source, for split 'train' or 'test'.

    parse: as the functions get_foo return it. has_no_test_part: 'test' gives the rows of training, too."""
    getter, path, hub_id = locate(source)
    name, config, named_split = files.named_part(source)
    # a dataset of this file
    if getter:
        if named_split:
            raise UserError(f'{source!r}: the reader {name!r} chooses the split itself: leave [{named_split}] out')
        rows, parse = getter(split, path)
        rows = (row if isinstance(row, Row) else Row(row) for row in rows)
        if parse is parse_sharegpt:
            parse = partial(parse, num_turns=num_turns)
        return rows, parse, _lacks_test_part(getter, path)
    # splits: {split: its files}
    if path:
        splits = files.folder_splits(path, config)
    else:
        splits, _commit = files.hub_files(hub_id, name=config)
    # undivided: read the split in brackets, or else the one called `split`, whatever it is for
    if undivided and not named_split and split in splits:
        named_split = split
    # train is named_split if there is one
    train, test = files.choose_splits(splits, named_split, name)
    is_train = split == 'train' or test is None or (undivided and named_split)
    chosen = train if is_train else test
    files.check_no_sides(splits[chosen])
    its_files = splits[chosen] if path else None  # None: read_rows downloads them
    return read_rows(hub_id, chosen, its_files, name=config), None, test is None


def _lacks_test_part(getter, path):
    """Return whether a dataset of this file has no test split, or its files at `path` (None: the hub) have none."""
    train, test = 'train', 'test'
    is_of_hub = isinstance(getter, HubDataset)
    if is_of_hub:
        path, train, test = getter.local_path(path), getter.train, getter.test
    if not path or not test:
        return test is None
    # local_files gives the files of training for a test part that is not there
    try:
        return files.local_files(path, train) == files.local_files(path, test)
    except UserError:
        # several splits: a HubDataset reads that of its name, or refuses; a function may read them all
        return not is_of_hub


def divides(source):
    """Return whether a source has no test split, so that a part of its rows is held out."""
    _, _, has_no_test_part = _opened(source, 'train')
    return has_no_test_part


def joined(data):
    """Return the sources that data joins by +. A file or folder with a + in its path, also behind hh:, is one source."""
    found, names = [], data.split('+')
    while names:
        # as many names as are a path together, or else one
        together = ['+'.join(names[:count]) for count in range(len(names), 1, -1)]
        source = next(filter(_is_path, together), names[0])
        found.append(source)
        names = names[source.count('+') + 1 :]
    return found


def _is_path(source):
    """Return whether a source is a file, a folder or a pattern, perhaps behind the name of a reader."""
    with suppress(UserError):
        _getter, path, _hub_id = locate(source)
        return path is not None
    return False


def keep_data(data, out):
    """Raise UserError if `out`, to be written, is no file, or one of the files of `data`, which may join several sources."""
    check_file(out)
    for source in joined(data):
        _, path, _ = locate(source)
        may_overwrite = path and os.path.exists(out)
        if may_overwrite and any(os.path.samefile(out, file) for file in files.data_files(path)):
            raise UserError(f'--out={out} is a file of the data: name another file')


def locate(source):
    """Return (getter, local path, hub id) of one source; what does not apply is None. Raises UserError if nothing is found.

    'hh' -> (get_hh, None, its hub id), 'hh:FILE' -> (get_hh, FILE, None), './FILE' -> (None, FILE, None),
    'owner/name' -> (None, None, 'owner/name')."""
    source, _, _ = files.named_part(source)  # without its config and [split]
    name, _, path = source.partition(':')
    # the functions get_foo of this module
    getter = globals().get(f'get_{name}')
    if getter and path:
        path = os.path.expanduser(path)
        files.data_files(path)  # raises UserError if it has no files
        return getter, path, None
    if getter:
        if os.path.exists(name):
            # once, although a source is opened for training and again for evaluation
            say_once(f'note: {name!r} is the dataset of that name, not what lies in ./{name}: for that write ./{name}')
        return getter, None, getattr(getter, 'hub_id', None)
    # no reader: a file, a folder or a pattern of files
    local_path = os.path.expanduser(source)
    if os.path.exists(local_path) or glob(local_path, recursive=True):
        return None, local_path, None
    looks_like_path = source.lower().endswith(ENDINGS) or source.startswith(('~', '.', '/')) or '*' in source
    if source.count('/') == 1 and not looks_like_path:
        return None, None, source
    readers = sorted(n.removeprefix('get_') for n in globals() if n.startswith('get_'))
    known = ', '.join(readers) + did_you_mean(source, readers)
    wrong = f'data {source!r} is no file or folder{looked_in(source) or " here"} and no hub id (owner/name)'
    raise UserError(f'{wrong}: correct it ({HELP}), or name one of the known datasets: {known}')


def fingerprint(source):
    """Return a hash of a source's name and content, or None for hub data without a commit. Raises UserError."""
    _, path, hub_id = locate(source)
    # toy.py always generates the same rows
    content = 'generated' if source == 'toy' else None
    if hub_id:
        content = files.hub_commit(hub_id)
    if path:
        # the README says which files belong to which split
        readme = os.path.join(path, 'README.md')
        found = files.data_files(path)
        if os.path.exists(readme):
            found.append(readme)
        try:
            content = [(os.path.relpath(file, path), file_hash(file)) for file in found]
        except OSError as error:
            raise UserError(f'cannot read {error.filename or path}: {error.strerror}') from None
    return content_hash(source, content) if content else None


def nothing_left(source, split, left_out):
    """Return the UserError for a source without any examples left."""
    reasons, _ = in_words(left_out)
    return UserError(f'no {split} examples are left in data {source!r}; left out: {reasons} ({HELP})')


def _parsed(rows, parse, task, columns):
    """Return an iterator of (row, its examples or a ValueError) for all rows. Raises UserError. parse: a function of one row, a
    Layout, or None to detect the layout. columns: the option --columns, which replaces parse."""
    if parse is None or columns:
        rows = iter(rows)
        head = list(islice(rows, LOOK_AHEAD))
        rows = chain(head, rows)
        parse = _parse_for(head, task, _parse_option(columns))
    return parse.read(rows, task) if isinstance(parse, Layout) else each(rows, parse)


def _parse_for(head, task, column_of):
    """Return a function of one row, or the Layout, that reads rows which begin with `head`. Raises UserError.

    column_of: the option --columns, {our name: column}; {}: the columns decide, and a note names those that may be missed."""
    found_columns = dict.fromkeys(chain(*head))
    for column in column_of.values():
        if found_columns and formats.plain_name(column) not in map(formats.plain_name, found_columns):
            raise UserError(f'--columns: there is no column {column!r}; there are {", ".join(found_columns)}')
    layout = None if column_of else _first_layout(head)
    # a few layouts compare all rows; of the others, parse_any finds that of each row by itself
    if layout and layout.read in formats.OF_ALL_ROWS:
        return layout
    verdicts = layout.columns.intersection(formats.BY_NAME) if layout else [column_of.get('winner', '')]
    # prompts need no verdict
    if task != 'prompts' and (problem := formats.signs_among(head, verdicts)):
        raise UserError(f'{head[0].where}: {problem} ({HELP})')
    # columns that ask or answer may have names that are not known
    unread, judges = formats.unread_texts(head, layout) if layout else ([], [])
    if unread:
        advice = f'{SAY_WHICH}; if they link rows, write what is said before an answer into its row'
        say_once(f'note: columns not read: {", ".join(unread)}; if they ask or answer, or judge, {advice}')
    return partial(formats.parse_any, task=task, columns=column_of, judges=judges)


def _parse_option(columns):
    """Return the option --columns as {our name: column}: 'prompt=question' -> {'prompt': 'question'}. Raises UserError."""
    column_of = {}
    for assignment in columns.split(',') if columns else []:
        name, _, column = assignment.partition('=')
        name, column = name.strip(), column.strip()
        if name not in formats.COLUMNS or not column or name in column_of:
            advice = f"write 'prompt=question, chosen=good'; names are {', '.join(formats.COLUMNS)}, each once"
            raise UserError(f'--columns: cannot read {assignment.strip()!r}: {advice}')
        column_of[name] = column
    return column_of


def _first_layout(rows):
    """Return the Layout of the first row that fits one, or None."""
    # each() gives an error in place of the layout for a row that fits none
    layouts = each(rows, lambda row: formats.layout_of(frozenset(formats.unified(row))))
    return next((layout for _, layout in layouts if isinstance(layout, Layout)), None)


def describe(source):
    """Return a phrase about how a source is read: by which dataset's reader, or by which layout and columns."""
    rows, parse, _ = _opened(source, 'train')
    head = list(islice(rows, LOOK_AHEAD))
    if not head:
        return f'nothing, there are no rows in {source}'
    if parse:
        return f'the reader {source.partition(":")[0]!r}'
    layout = _first_layout(head)
    known = f'{layout.name}, told by {", ".join(sorted(layout.columns))}' if layout else 'no known layout'
    found_columns = ', '.join(dict.fromkeys(chain(*head))) or 'none'
    return f'{known} (columns: {found_columns})'


def _valid(parsed_rows, source, left_out, skip_bad_rows):
    """Yield the examples of all valid rows as Rows, and count the others in left_out. Raises UserError for a bad row.

    parsed_rows: iterator of (row, its examples or a ValueError)."""
    any_valid = False
    for row, examples in parsed_rows:
        if isinstance(examples, Exception):
            if not skip_bad_rows or isinstance(examples, DoubtfulCode):
                raise UserError(_refusal(row, examples, any_valid, parsed_rows, source)) from None
            left_out[f'bad rows: {examples}'] += 1
            continue
        any_valid = any_valid or bool(examples)
        # of a get_foo that somebody has added
        if not isinstance(examples, list) or not all(map(_is_example, examples)):
            raise UserError(f'{row.where}: no examples as text/sources.py describes them: {examples!r:.200}')
        for example in examples:
            if 'drop' in example:
                left_out[example['drop']] += 1
                continue
            example = Row(example)
            # for error messages: tokenise may find out later that the chat template refuses the row
            example.where, example.raw = row.where, row
            yield example


def _is_example(example):
    """Return whether a value that parse() gave is an example as this file's docstring describes them."""
    if not isinstance(example, dict) or example.keys().isdisjoint(('drop', 'prompt')):
        return False
    known = TYPES.keys() & example.keys()
    is_label_valid = example.get('good', True) in (True, False)  # 1 and 0, too
    return is_label_valid and all(isinstance(example[name], TYPES[name]) for name in known)


def _refusal(row, error, any_valid, following, source):
    """Return the message about a bad row: what is wrong with it, or, if all rows are bad, with the layout. any_valid: whether
    an earlier row was valid. following: iterator of the (row, examples or ValueError) after it."""
    text = f'{row.where}: {error}'
    if row:
        text += f'; found: {_columns(row)}'
    if isinstance(error, DoubtfulCode):
        return f'{text} ({HELP})'
    seen = [(row, error)]
    # a file that is broken further down must not hide this message
    with suppress(UserError):
        seen.extend(islice(following, LOOK_AHEAD))
    bad = [_columns(other) for other, examples in seen if isinstance(examples, Exception)]
    # a file about the data may lie among the data
    help_text = f'or name the file that is meant: --data={source}/FILE; {HELP}' if os.path.isdir(source) else HELP
    # among good rows, the bad ones are the user's to fix
    if any_valid or len(bad) < len(seen):
        if len(bad) > 1:
            most_common = Counter(bad).most_common(2)
            common = [f'{count} with {shorten(names, 90)}' for names, count in most_common]
            text += f'; of the {len(seen)} rows from there on, {len(bad)} are bad: {"; ".join(common)}'
        return f'{text}; mend it, or leave such rows out with --skip_bad_rows ({help_text})'
    text += f'; none of the first {len(seen)} rows can be read' if len(seen) > 1 else '; the only row cannot be read'
    return f'{text}; {_advice(row, source)} ({help_text})'


def _advice(row, source):
    """Return what to do about a file of bad rows alone, of which this is the first: what is probably wrong with the file."""
    # a table that was not split at its separators has a single column, named by all its names
    only_column = next(iter(row)) if len(row) == 1 else ''
    if separator := re.search(r'[;\t|,]', only_column):
        return f'its columns are separated by {separator[0]!r}: in a .csv it is a comma, in a .tsv a tab'
    kinds = set(map(type, row.values()))
    # pandas and `datasets` can write {column: all of its values}, or {'train': rows, 'test': rows}
    is_all_rows = row.where.lower().endswith('.json, row 1') and kinds <= {list, dict}
    # row.error: the line could not be parsed (readers.py)
    if is_all_rows or re.search('JSON|object', row.error):
        return "a row is a JSON object with named fields, on a line of its own or in a list (pandas: orient='records')"
    if row.error:
        return 'mend the file'
    # the reader of a HubDataset has a .parse if it expects one layout
    reader, _, _ = source.partition(':')
    if getattr(globals().get(f'get_{reader}'), 'parse', None):
        return f'so it is the layout: the reader {reader!r} is for another one; without {reader + ":"!r} the columns decide'
    inner = "; write an object's fields as columns first" if dict in kinds else ''
    return f'mend what is wrong, or, if it is the layout, {SAY_WHICH} (no other is read then){inner}'


def _columns(row):
    """Return a row's columns and their types as text, at most nine."""
    kinds = {str: 'text', list: 'list', dict: 'object', bool: 'true or false', type(None): 'null'}
    named = []
    for key, value in islice(row.items(), 9):
        kind = kinds.get(type(value), 'number')
        named.append(f'{str(key)[:24]!r} ({kind})')
    text = ', '.join(named) or 'no columns'
    if len(row) > 9:
        text += f' and {len(row) - 9} more'
    return text


class HubDataset(NamedTuple):
    """A get_foo(split, path) for a hub dataset or its local files. test: None if there is no test split."""

    hub_id: str
    parse: object = None
    train: str = 'train'
    test: str | None = 'test'
    options: dict = {}  # of files.hub_files

    def __call__(self, split, path=None):
        """Return (rows, parse) of split 'train' or 'test'; without a test split, both are all rows."""
        hub_split = self.train if split == 'train' else self.test or self.train
        path = self.local_path(path)
        # read_rows reads a list of files whole, without looking for a split in their names
        if path and self.test is None:
            path = files.data_files(path)
        return read_rows(self.hub_id, hub_split, path, **self.options), self.parse

    def local_path(self, path):
        """Return path, or the folder options['data_dir'] in it if that exists, as in a clone from the hub."""
        folder = os.path.join(path or '', self.options.get('data_dir', ''))
        return folder if path and os.path.isdir(folder) else path


def parse_sharegpt(row, num_turns):
    """Return an example for each of the first num_turns answers; its prompt is everything before the answer."""
    turns = [(field(turn, 'from'), field(turn, 'value')) for turn in field(row, 'conversations', list)]
    if any(re.search(r'</?s>|<\|endoftext\|>', text) for _, text in turns):
        return [{'drop': 'special token in the text'}]
    prompt, examples = '', []
    # ask() and answer() write Anthropic's format; a last question without an answer is not used
    exchanges = zip(turns[::2], turns[1::2], strict=False)
    for (asker, question), (replier, reply) in exchanges:
        # long chats are split into pieces, which may begin with an answer
        if (asker, replier) != ('human', 'gpt') or len(examples) == num_turns:
            break
        prompt += ask(question)
        examples.append({'prompt': prompt, 'response': answer(reply)})
        prompt += answer(reply)
    return examples or [{'drop': 'does not begin with human, gpt'}]


def parse_ultrachat(row):
    """Return the first question and answer of a conversation."""
    first_two = field(row, 'messages', list)[:2]
    turns = [message(field(turn, 'role'), field(turn, 'content')) for turn in first_two]
    if [turn['role'] for turn in turns] != ['user', 'assistant']:
        return [{'drop': 'does not begin with user, assistant'}]
    return [{'prompt': turns[:1], 'response': turns[1:]}]


# fmt: off
get_hh = HubDataset('Anthropic/hh-rlhf')
get_hh_helpful = HubDataset('Anthropic/hh-rlhf', options={'data_dir': 'helpful-base'})
get_hh_harmless = HubDataset('Anthropic/hh-rlhf', options={'data_dir': 'harmless-base'})
get_shp = HubDataset('stanfordnlp/SHP')
get_se = HubDataset('HuggingFaceH4/stack-exchange-preferences', test=None)
get_sharegpt = HubDataset('anon8231489123/ShareGPT_Vicuna_unfiltered', parse_sharegpt, test=None,
                          options={'data_files': 'ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json'})
get_imdb = HubDataset('insub/imdb_prefix20_forDPO_gpt2-large-imdb-FT_siebert_sentiment-roberta-large-english',
                      partial(formats.parse_any, columns={'prompt': 'text', 'chosen': 'chosen', 'rejected': 'rejected'}))
get_oasst = HubDataset('OpenAssistant/oasst1', Layout('oasst', '', partial(formats.read_trees, language='en')), test='validation')
get_ultrafeedback = HubDataset('HuggingFaceH4/ultrafeedback_binarized', None, 'train_prefs', 'test_prefs')
get_ultrafeedback_hybrid = HubDataset('wzhouad/gemma-2-ultrafeedback-hybrid')
get_ultrachat = HubDataset('HuggingFaceH4/ultrachat_200k', parse_ultrachat, 'train_sft', 'test_sft')
# fmt: on


def get_toy(split, path=None):
    """Return (rows, parse) of the pairs that toy.py generates."""
    if path:
        raise UserError(f'the toy world has no files: --data=toy, or --data={path}')
    return toy.pairs(split, 6000 if split == 'train' else 600), lambda row: [dict(row)]


def get_alpaca_eval(split, path=None):
    """Return (rows, parse) of AlpacaEval's instructions, for sampling only."""
    # on the hub its JSON file, since there is a loading script
    found = path or [files.hub_download('tatsu-lab/alpaca_eval', None, 'alpaca_eval.json')]
    return read_rows(None, split, found), lambda row: [{'prompt': ask(field(row, 'instruction'))}]


def get_annotations(split, path=None):
    """Return (rows, parse) of AlpacaEval's annotations.json, a local file."""
    if path is None:
        raise UserError('annotations is a local file: --data=annotations:PATH')
    return read_rows(None, split, path), None
