"""The datasets: where examples come from. Adding one is adding a get_foo(split, path) -> (rows, parse).

rows are the raw rows as the hub, or the local file or folder `path`, has them; parse(row) -> list of examples, each one of
  {'prompt', 'chosen', 'rejected'}, perhaps with 'margin', a number: by how much the chosen one is better;
  {'prompt', 'response'}, with 'good': bool for KTO, or with 'turns', all messages of a conversation, where every answer in it
  is trained on but those of weight 0;
  {'prompt'};  {'drop': reason} for what the dataset's rules leave out.
A row that is not what it should be makes parse raise ValueError(reason). Texts are strings in Anthropic's format
('\\n\\nHuman: ...\\n\\nAssistant:', then ' answer') or lists of chat messages. Where parse is None, the columns decide (formats.py);
where one row is not enough, it is a Layout.
"""

import hashlib
import os
from collections import Counter
from contextlib import suppress
from functools import cache, partial
from glob import glob
from itertools import chain, islice
from textwrap import shorten
from typing import NamedTuple

from configurator import UserError
from runtime.log import say
from runtime.values import looked_in
from text import files, formats
from text.examples import in_words
from text.files import ENDINGS, HELP, Row, content_hash, data_files, hub_splits, read_rows
from text.formats import Layout, each
from text.messages import answer, ask, field, message

# without a test split, the prompts whose hash is 0 modulo this are held out
HELD_OUT = 20
# the first rows: whether they have a layout, whether their answers repeat the prompt, whether all are bad
LOOK_AHEAD = 100
KNOWN = (
    'known are prompt (or question, instruction, query) with chosen and rejected, or with response (completion, output) '
    "and perhaps good (label); messages; text: say which is which: --columns='prompt=NAME, chosen=NAME, rejected=NAME'"
)
MIXED = 'answers that begin with their prompt among others that do not: all or none must'
# once, though a source is read for training and for evaluation
_note = cache(say)
REPEATED = 'note: answers that repeated their prompt, which was taken off'


def load_rows(source, split, **options):
    """(list of all examples, Counter of reasons) of one source: see read_examples."""
    left_out = Counter()
    return list(read_examples(source, split, left_out, **options)), left_out


def read_examples(source, split, left_out, *, undivided=False, num_turns=1, skip_bad_rows=False, task=None, columns=None,
                  both=False):  # fmt: skip
    """The examples of one source ('hh', 'hh:PATH', 'toy', a hub id, a file or folder), one by one.

    split: 'train' or 'test'. A single file, or a dataset without a test split, is divided by a hash of the prompt unless
    undivided. left_out: a Counter that says what was left out, when all are read; reasons that begin with 'note: ' are of
    examples that stay. An example's .where is the file and line it comes from. task: 'pairs', 'singles', 'sft' or 'prompts';
    of a dataset with many answers to a prompt, sft takes the best. both: of a divided source, all examples; .held_out of each
    says which part it is of, and is None where the source has a test split. columns: 'prompt=question, ...' reads these columns alone.
    Raises UserError for an unreadable source and, unless skip_bad_rows, for a bad row."""
    rows, parse, no_test_part = _opened(source, split, num_turns, undivided)
    found = _parsed(rows, parse, task, columns_of(columns))
    examples = _agreeing(_sound(found, source, left_out, skip_bad_rows), left_out, skip_bad_rows)
    divided = no_test_part and not undivided
    for example in examples:
        example.held_out = _held_out(example) if divided else None
        if both or not divided or example.held_out == (split == 'test'):
            yield example


def _opened(source, split, num_turns=1, undivided=False):
    """(rows, parse, whether a part of them has to be held out, for want of a test split) of a source."""
    getter, path, hub_id = locate(source)
    name, config, wanted = files.named_part(source)
    if getter:
        if wanted:
            raise UserError(f'{source!r}: the reader {name!r} chooses the split itself: leave [{wanted}] out')
        rows, parse = getter(split, path)
        if parse is parse_sharegpt:
            parse = partial(parse, num_turns=num_turns)
        no_test_split = getattr(getter, 'test', split) is None
        return rows, parse, no_test_split or (bool(path) and not files.has_test_part(path))

    # the split that is meant, and the one to test on, if there is any
    splits = files.folder_splits(path, config) if path else dict.fromkeys(hub_splits(hub_id, config))
    if undivided and not wanted and split in splits:
        wanted = split
    train, held_out = files.choose_splits(splits, wanted, source)
    trains = split == 'train' or held_out is None or (undivided and wanted)
    chosen = train if trains else held_out
    return read_rows(hub_id, chosen, splits[chosen], name=config), None, held_out is None


def divides(source):
    """Whether a source has no test split, so that a part of its rows is held out."""
    return _opened(source, 'train')[2]


def columns_of(text):
    """{our name: column} of 'prompt=question, chosen=good'; None of None. Raises UserError."""
    columns = {}
    for part in text.split(',') if text else ():
        name, _, column = (x.strip() for x in part.partition('='))
        if name not in formats.COLUMNS or not column or name in columns:
            known = f'names are {", ".join(formats.COLUMNS)}, each once'
            raise UserError(f"--columns: cannot read {part.strip()!r}: write 'prompt=question, chosen=good'; {known}")
        columns[name] = column
    return columns or None


def locate(source):
    """(getter, local path, hub id) of one source, each None where there is no such: what is read, and what it is known by."""
    source = files.named_part(source)[0]
    name, _, path = source.partition(':')
    getter = globals().get(f'get_{name}')
    path, local = os.path.expanduser(path), os.path.expanduser(source)
    if path:
        data_files(path)  # raises if there is none
    if getter and not path and os.path.exists(name):
        _note(f'note: {name!r} is the dataset of that name, not what lies in ./{name}: for that write ./{name}')
    if getter:
        return getter, path or None, None if path else getattr(getter, 'hub_id', None)
    if os.path.exists(local) or glob(local, recursive=True):
        return None, local, None
    if source.endswith(ENDINGS) or source.count('/') != 1 or source.startswith(('~', '.', '/')) or '*' in source:
        known = ', '.join(sorted(n.removeprefix('get_') for n in globals() if n.startswith('get_')))
        wrong = f'data {source!r} is no file or folder{looked_in(source) or " here"} and no hub id (owner/name)'
        raise UserError(f'{wrong}: correct it ({HELP}), or name one of the known datasets: {known}')
    return None, None, source


def fingerprint(source, split):
    """A string that changes with the content of a source, or None where that cannot be told without reading it all.

    Of files: their names and contents. Of a hub dataset: its commit, at which it is also read."""
    _, path, hub_id = locate(source)
    digest = hashlib.sha256(source.encode())
    commit = files.hub_commit(hub_id) if hub_id else None
    if path:
        files.add_to_digest(digest, path)
    digest.update(f'{hub_id}@{commit}'.encode())
    return digest.hexdigest() if path or commit or source == 'toy' else None


def vanished(source, split, left_out):
    """The error for a source of which no example is left."""
    return UserError(f'no {split} examples are left in data {source!r}; left out: {in_words(left_out)[0]} ({HELP})')


# ---- from rows to examples ----


def _parsed(rows, parse, task, columns):
    """(row, its examples or the ValueError) of all rows. parse: of one row, or a Layout; None: what the columns say."""
    if parse is None or columns:
        rows = iter(rows)
        head = list(islice(rows, LOOK_AHEAD))
        rows = chain(head, rows)
        there = dict.fromkeys(name for row in head for name in row)
        for column in (columns or {}).values():
            if there and column not in there:
                raise UserError(f'--columns: there is no column {column!r}; there are {", ".join(there)}')
        # a row that alone tells its examples may have another layout than the first one
        layout = None if columns else _first_layout(head)
        parse = partial(formats.parse_any, task=task, columns=columns)
        if layout and layout.read in formats.OF_ALL_ROWS:
            parse = layout
    return parse.read(rows, task) if isinstance(parse, Layout) else each(rows, parse)


def _first_layout(rows):
    """The layout of the first row that has one; None where none has."""
    found = each(rows, lambda row: formats.layout_of(formats.unified(row)))
    return next((layout for _, layout in found if isinstance(layout, Layout)), None)


def describe(source):
    """By which reader or columns a source is read, and which columns stay unread, for the screen."""
    rows, parse, _ = _opened(source, 'train')
    head = list(islice(rows, LOOK_AHEAD))
    layout = parse or _first_layout(head)
    if parse or not layout:
        return f'the reader {source.partition(":")[0]!r}'
    names = ', '.join(dict.fromkeys(name for row in head for name in row))
    return f'{layout.name}, told by {", ".join(sorted(layout.columns))} (columns: {names})'


def _sound(found, source, left_out, skip_bad_rows):
    """The examples of sound rows, which know where they stand; what is left out is counted."""
    any_sound = False
    for row, examples in found:
        if isinstance(examples, Exception):
            if not skip_bad_rows:
                raise UserError(_refusal(row, examples, any_sound, found, source)) from None
            left_out[f'bad rows: {examples}'] += 1
            continue
        any_sound = any_sound or bool(examples)
        for example in examples:
            if 'drop' in example:
                left_out[example['drop']] += 1
                continue
            # tokenise names the row where a chat template refuses it
            example = Row(example)
            example.where, example.raw = row.where, row
            yield example


def _refusal(row, error, any_sound, found, source):
    """The sentence on a bad row. any_sound: whether a good one came before; found: what comes behind it."""
    seen = [(row, error)]
    # the file may end in something broken
    with suppress(UserError):
        seen.extend(islice(found, LOOK_AHEAD))
    bad = [_columns(other) for other, examples in seen if isinstance(examples, Exception)]
    said = f'{row.where}: {error}'
    if row:
        said += f'; found: {_columns(row)}'

    # one bad row among good ones is to be mended; if all are bad, it is the layout
    if any_sound or len(bad) < len(seen):
        if len(bad) > 1:
            common = [f'{n} with {shorten(names, 90)}' for names, n in Counter(bad).most_common(2)]
            said += f'; of the {len(seen)} rows from there on, {len(bad)} are bad: {"; ".join(common)}'
        return f'{said}; mend it, or leave such rows out with --skip_bad_rows ({HELP})'
    name, fits = source.partition(':')[0], KNOWN
    if row.error:
        fits = 'a row is a JSON object with named fields'
    elif getattr(globals().get(f'get_{name}'), 'parse', None):
        fits = f'the reader {name!r} is for another one; without {name + ":"!r} the columns decide'
    return f'{said}; none of the first {len(seen)} rows can be read, so it is the layout: {fits} ({HELP})'


def _columns(row):
    """The columns of a row and what is in them, for a message."""
    kinds = {str: 'text', list: 'list', dict: 'object', bool: 'true or false', int: 'number', float: 'number'}
    named = [f'{str(key)[:24]!r} ({kinds.get(type(value), "null")})' for key, value in row.items()]
    more = f' and {len(named) - 9} more' if len(named) > 9 else ''
    return ', '.join(named[:9]) + more or 'no columns'


def _agreeing(examples, left_out, skip_bad_rows):
    """The examples, if all answers of text repeat their prompt (which is off by now and counted) or none does.

    The first ones decide: 'Hi' may begin an answer to 'Hi'. Others are bad rows."""
    head = list(islice(examples, LOOK_AHEAD))
    # True: its answers began with the prompt; False: they did not; None: that cannot be told
    told = {example['repeats'] for example in head if 'repeats' in example}
    for example in chain(head, examples):
        repeats = example.pop('repeats', None)
        if repeats is not None and repeats != (told == {True}):
            if not skip_bad_rows:
                raise UserError(f'{example.where}: {MIXED}; mend it, or leave it out with --skip_bad_rows ({HELP})')
            left_out[f'bad rows: {MIXED}'] += 1
            continue
        if repeats:
            left_out[REPEATED] += 1
        yield example


def _held_out(example):
    """Whether a hash of the prompt holds an example out: of messages, only role and content count."""
    prompt = example['prompt']
    if not isinstance(prompt, str):
        prompt = [message(turn['role'], turn['content']) for turn in prompt]
    return content_hash(prompt) % HELD_OUT == 0


# ---- datasets ----


class HubDataset(NamedTuple):
    """A get_foo of a dataset of the hub, or of files of it that lie here.

    parse: as get_foo returns it. train, test: its splits; test None: there is none. options: what load_dataset is told."""

    hub_id: str
    parse: object = None
    train: str = 'train'
    test: str | None = 'test'
    options: dict = {}

    def __call__(self, split, path=None):
        part = self.train if split == 'train' or self.test is None else self.test
        folder = os.path.join(path or '', self.options.get('data_dir', ''))
        path = folder if path and os.path.isdir(folder) else path
        return read_rows(self.hub_id, part, path, undivided=self.test is None, **self.options), self.parse


def parse_sharegpt(row, num_turns):
    """A conversation's first num_turns answers, each after all before it."""
    turns = [(field(turn, 'from'), field(turn, 'value')) for turn in field(row, 'conversations', list)]
    if any(token in text for _, text in turns for token in ('<s>', '</s>', '<|endoftext|>')):
        return [{'drop': 'special token in the text'}]
    prompt, examples = '', []
    for (asker, question), (replier, reply) in zip(turns[::2], turns[1::2], strict=False):
        # pieces of long chats may begin with an answer
        if (asker, replier) != ('human', 'gpt') or len(examples) == num_turns:
            break
        prompt += ask(question)
        examples.append({'prompt': prompt, 'response': answer(reply)})
        prompt += answer(reply)
    return examples or [{'drop': 'does not begin with human, gpt'}]


def parse_imdb(row):
    """A review's first tokens and two sampled continuations, positive first."""
    prompt, chosen, rejected = (field(row, key) for key in ('text', 'chosen', 'rejected'))
    if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        raise ValueError("the answers do not begin with 'text'")
    return [{'prompt': prompt, 'chosen': chosen[len(prompt) :], 'rejected': rejected[len(prompt) :]}]


def parse_ultrachat(row):
    """The first exchange of a conversation."""
    turns = [message(field(turn, 'role'), field(turn, 'content')) for turn in field(row, 'messages', list)[:2]]
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
get_imdb = HubDataset('insub/imdb_prefix20_forDPO_gpt2-large-imdb-FT_siebert_sentiment-roberta-large-english', parse_imdb)
get_oasst = HubDataset('OpenAssistant/oasst1', Layout('oasst', '', partial(formats.read_trees, language='en')), test='validation')
get_ultrafeedback = HubDataset('HuggingFaceH4/ultrafeedback_binarized', None, 'train_prefs', 'test_prefs')
get_ultrafeedback_hybrid = HubDataset('wzhouad/gemma-2-ultrafeedback-hybrid')
get_ultrachat = HubDataset('HuggingFaceH4/ultrachat_200k', parse_ultrachat, 'train_sft', 'test_sft')
# fmt: on


def get_toy(split, path=None):
    """The toy world's pairs (toy.py)."""
    if path:
        raise UserError(f'the toy world has no files: --data=toy, or --data={path}')
    from text import toy

    return map(Row, toy.pairs(split, 6000 if split == 'train' else 600)), lambda row: [dict(row)]


def get_alpaca_eval(split, path=None):
    """tatsu-lab/alpaca_eval: instructions, for sampling only. The hub has a loading script there, so its json file is read."""
    file = 'hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json'
    rows = read_rows('json', 'train', path, undivided=True, data_files=file)
    return rows, lambda row: [{'prompt': ask(field(row, 'instruction'))}]


def get_annotations(split, path=None):
    """AlpacaEval's annotations.json: verdicts, of which ties are left out."""
    if path is None:
        raise UserError('annotations is a local file: --data=annotations:PATH')
    return read_rows(None, split, path), None
