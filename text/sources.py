"""The datasets: where examples come from. Adding one is adding a get_foo(split, path) -> (rows, parse).

rows are the raw rows as the hub, or the local file or folder `path`, has them; parse(row) -> list of examples, each one of
  {'prompt', 'chosen', 'rejected'}, with 'sft' where the SFT target is not simply the chosen answer, and 'margin', a number,
  where it is known by how much the chosen one is better;
  {'prompt', 'response'}, with 'good': bool for KTO, or with 'turns', all messages of a conversation, where every answer in it
  is trained on but those of weight 0;
  {'prompt'};  {'drop': reason} for what the dataset's rules leave out.
A row that is not what it should be makes parse raise ValueError(reason). Texts are strings in Anthropic's format
('\\n\\nHuman: ...\\n\\nAssistant:', then ' answer') or lists of chat messages. Where the task decides what becomes of a row, or one
row is not enough, parse is a Layout of formats.py.
"""

import difflib
import hashlib
import os
import re
from collections import Counter
from contextlib import suppress
from functools import cache, partial
from glob import glob
from itertools import chain, islice
from textwrap import shorten

from configurator import UserError
from runtime.log import say
from runtime.values import looked_in
from text import files
from text.examples import in_words
from text.files import ENDINGS, HELP, Row, content_hash, data_files, hub_splits, read_rows
from text.formats import (
    COLUMNS,
    LIKE_ANSWERS,
    QUESTIONS,
    Layout,
    each,
    layout_of,
    of_all_rows,
    parse_annotation,
    parse_any,
    parse_dialogues,
    read_shp,
    read_stack_exchange,
    read_trees,
    unified,
)
from text.messages import answer, ask, field, message

# without a test split, the prompts whose hash is 0 modulo this are held out
HELD_OUT = 20
NO_TEST_SPLIT = {'se', 'sharegpt', 'annotations'}
# named dataset -> where the hub has it
HUB = {
    'hh': 'Anthropic/hh-rlhf',
    'hh_helpful': 'Anthropic/hh-rlhf',
    'hh_harmless': 'Anthropic/hh-rlhf',
    'shp': 'stanfordnlp/SHP',
    'se': 'HuggingFaceH4/stack-exchange-preferences',
    'sharegpt': 'anon8231489123/ShareGPT_Vicuna_unfiltered',
    'imdb': 'insub/imdb_prefix20_forDPO_gpt2-large-imdb-FT_siebert_sentiment-roberta-large-english',
    'oasst': 'OpenAssistant/oasst1',
    'ultrafeedback': 'HuggingFaceH4/ultrafeedback_binarized',
    'ultrafeedback_hybrid': 'wzhouad/gemma-2-ultrafeedback-hybrid',
    'ultrachat': 'HuggingFaceH4/ultrachat_200k',
    'alpaca_eval': 'tatsu-lab/alpaca_eval',
}
# rows behind a first bad one, to see whether all are so
LOOK_AHEAD = 100
KNOWN = (
    'known are prompt (or question, instruction, query) with chosen and rejected, or with response (completion, output) '
    'and perhaps good (label); messages; text'
)
RENAME = "rename the columns, or say which is which: --columns='{}'"
MIXED = 'the answers of {} rows begin with their prompt, of {} they do not: all or none must'
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


def _opened(source, split, num_turns, undivided=False):
    """(rows, parse, whether a part of them has to be held out, for want of a test split) of a source; parse None: any."""
    getter, path, hub_id = locate(source)
    _, config, wanted = files.named_part(source)
    if getter:
        name = re.split(r'[:\[]', source)[0]
        more = {'num_turns': num_turns} if name == 'sharegpt' else {}
        if wanted:
            raise UserError(f'{source!r}: the reader {name!r} chooses the split itself: leave [{wanted}] out')
        return *getter(split, path, **more), name in NO_TEST_SPLIT or (bool(path) and not files.has_test_part(path))

    # the split that is meant, and the one to test on, if there is any
    splits = files.folder_splits(path, config) if path else dict.fromkeys(hub_splits(hub_id, *filter(None, [config])))
    named = split if undivided and not wanted and split in splits else wanted
    train, held_out = files.choose_splits(splits, named, source)
    chosen = train if split == 'train' or held_out is None or (undivided and named) else held_out
    more = {'name': config} if config else {}
    return read_rows(hub_id, chosen, splits[chosen], **more), None, held_out is None


def divides(source):
    """Whether a source has no test split, so that a part of its rows is held out."""
    return _opened(source, 'train', 1)[2]


def columns_of(text):
    """{our name: column} of 'prompt=question, chosen=good'; None of None. Raises UserError."""
    if not text:
        return None
    columns = {}
    for part in text.split(','):
        name, equals, column = (x.strip() for x in part.partition('='))
        if name not in COLUMNS or not equals or not column or name in columns:
            near = difflib.get_close_matches(name, COLUMNS, 1)
            hint = (
                f'did you mean {near[0]}?' if near and near[0] != name else f'names are {", ".join(COLUMNS)}, each once'
            )
            raise UserError(f"--columns: cannot read {part.strip()!r}: write 'prompt=question, chosen=good'; {hint}")
        columns[name] = column
    return columns


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
        return getter, path or None, None if path else HUB.get(name)
    if os.path.exists(local) or glob(local, recursive=True):
        return None, local, None
    if source.endswith(ENDINGS) or source.count('/') != 1 or source.startswith(('~', '.', '/')) or '*' in source:
        known = ', '.join(sorted(n.removeprefix('get_') for n in globals() if n.startswith('get_')))
        raise UserError(
            f'data {source!r} is no file or folder{looked_in(source) or " here"} and no hub id (owner/name): correct it ({HELP}), or '
            f'name one of the known datasets: {known}'
        )
    return None, None, source


def fingerprint(source, split):
    """A string that changes with the content of a source, or None where that cannot be told without reading it all.

    Of files: their names and contents. Of a hub dataset: its commit, at which it is also read."""
    _, path, hub_id = locate(source)
    if source == 'toy':
        return 'toy 1'
    digest = hashlib.sha256(source.encode())
    if path:
        files.add_to_digest(digest, path)
        return digest.hexdigest()
    commit = files.hub_commit(hub_id) if hub_id else None
    digest.update(f'{hub_id}@{commit}'.encode())
    return digest.hexdigest() if commit else None


def vanished(source, split, left_out):
    """The error for a source of which no example is left."""
    return UserError(f'no {split} examples are left in data {source!r}; left out: {in_words(left_out)[0]} ({HELP})')


@cache
def _note(text):
    say(text)  # once, though a source is read for training and for evaluation


# ---- from rows to examples ----


def _parsed(rows, parse, task, columns):
    """(row, its examples or the ValueError) of all rows. parse: of one row, or a Layout; None: what the columns say."""
    rows = iter(rows)
    if parse is None or columns:
        first = list(islice(rows, LOOK_AHEAD))
        rows = chain(first, rows)
        _check_columns(first, columns or {})
        parse = None if columns else _first_layout(first)
        # a row that alone tells its examples may have another layout than the first one
        if parse is None or not parse.of_all_rows:
            return each(rows, partial(parse_any, task=task, columns=columns))
    if not isinstance(parse, Layout):
        return each(rows, parse)
    return parse.read(rows, task) if parse.of_all_rows else each(rows, partial(parse.read, task=task))


def _first_layout(rows):
    """The layout of the first row that has one; None where none has."""
    for row in rows:
        with suppress(ValueError, RecursionError):
            return layout_of(unified(row))
    return None


def _check_columns(rows, columns):
    """Raise UserError where none of these rows has a column that --columns names."""
    there = list(dict.fromkeys(name for row in rows for name in row))
    for name, column in columns.items():
        if there and column not in there:
            near = difflib.get_close_matches(column, there, 1)
            hint = f'did you mean {near[0]}? ' if near else ''
            known = ', '.join(there)
            raise UserError(f'--columns: {name}={column}, and there is no column {column!r}; {hint}there are {known}')


def describe(source):
    """By which reader or columns a source is read, and which columns stay unread, for the screen."""
    rows, parse, _ = _opened(source, 'train', 1)
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
                raise UserError(_refusal(row, examples, any_sound, islice(found, LOOK_AHEAD), source)) from None
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


def _refusal(row, error, any_sound, behind, source):
    """The sentence on a bad row. any_sound: whether a good one came before; behind: the next rows, to see which are so too."""
    bad = f'{row.where}: {error}' + (f'; found: {_columns(row)}' if row else '')
    # one bad row among good ones is to be mended; if all are bad, it is the layout
    layouts, looked_at = _bad_layouts(row, behind)
    count = layouts.total()
    if any_sound or count < looked_at:
        counted = '; '.join(f'{n} with {shorten(names, 90)}' for names, n in layouts.most_common(2))
        many = f'; of the {looked_at} rows from there on, {count} are bad: {counted}' if count > 1 else ''
        return f'{bad}{many}; mend it, or leave such rows out with --skip_bad_rows ({HELP})'
    name = source.partition(':')[0]
    if row.error:
        fits = 'a row is a JSON object with named fields'
    elif f'get_{name}' in globals():
        fits = f'the reader {name!r} is for another one; without {name + ":"!r} the columns decide'
    else:
        fits = f'{KNOWN}: {RENAME.format(_mapping(row))}'
    return f'{bad}; none of the first {looked_at} rows can be read, so it is the layout: {fits} ({HELP})'


def _mapping(row):
    """What --columns may say of a row in no known layout: the columns whose names are like ours; NAME where none is."""
    texts = [name for name, value in row.items() if isinstance(value, str) and not name.lower().endswith('id')]
    lists = [name for name, value in row.items() if isinstance(value, list)]

    def like(*words):
        """The first column of such a name, whose letters may be a little wrong."""
        near = (n for n in texts if difflib.get_close_matches(n.lower(), words, 1, 0.8))
        inside = (n for n in texts if any(word in n.lower() for word in words))
        return next(chain(near, inside), None)

    if not texts and lists:
        return f'messages={lists[0]}'
    chosen, rejected, response = like('chosen', 'accepted'), like('rejected'), like(*LIKE_ANSWERS)
    asked = like(*QUESTIONS)
    others = iter([name for name in texts if name not in (asked, chosen, rejected, response)])
    prompt = asked or next(others, 'NAME')
    if rejected:
        return f'prompt={prompt}, chosen={chosen or next(others, "NAME")}, rejected={rejected}'
    return f'prompt={prompt}, response={response or next(others, "NAME")}'


def _bad_layouts(row, behind):
    """(Counter of the columns of bad rows, how many rows were looked at): a bad one and those behind it."""
    layouts, looked_at = Counter([_columns(row) or 'no columns']), 1
    # the file may end in something broken
    with suppress(UserError):
        for other, examples in behind:
            looked_at += 1
            if isinstance(examples, Exception):
                layouts[_columns(other) or 'no columns'] += 1
    return layouts, looked_at


def _columns(row):
    """The columns of a row and what is in them, for a message."""
    kinds = {str: 'text', list: 'list', dict: 'object', bool: 'true or false', int: 'number', float: 'number'}
    named = [f'{str(key)[:24]!r} ({kinds.get(type(value), "null")})' for key, value in row.items()]
    return ', '.join(named[:9]) + (f' and {len(named) - 9} more' if len(named) > 9 else '')


def _agreeing(examples, left_out, skip_bad_rows):
    """The examples, if all answers of text repeat their prompt (which is off by now and counted) or none does.

    In a source where some do and others do not, those that do are bad rows: 'Hi' may begin an answer to 'Hi'. Examples wait
    while only such have come that do."""
    waiting, where, many, few = [], '', 0, 0
    for example in examples:
        # True: its answers began with the prompt; False: they did not; None: that cannot be told
        repeats = example.pop('repeats', None)
        where = where or (example.where if repeats else '')
        many, few = many + (repeats is True), few + (repeats is False)
        if many and few and not skip_bad_rows:
            rest = [other.get('repeats') for other in examples]
            many, few = many + rest.count(True), few + rest.count(False)
            error = f'{where}: {MIXED.format(many, few)}'
            raise UserError(f'{error}; mend it, or leave the {many} out with --skip_bad_rows ({HELP})')
        waiting.append((example, repeats))
        if few or not many:
            yield from (kept for kept, repeated in waiting if not repeated)
            waiting = []
    if few and many:
        left_out[f'bad rows: {MIXED.format(many, few)}'] += many
    elif many:
        left_out[REPEATED] = many
        yield from (kept for kept, _ in waiting)


def _held_out(example):
    """Whether a hash of the prompt holds an example out: of messages, only role and content count."""
    prompt = example['prompt']
    if not isinstance(prompt, str):
        prompt = [message(turn['role'], turn['content']) for turn in prompt]
    return content_hash(prompt) % HELD_OUT == 0


# ---- datasets ----


def get_toy(split, path=None):
    """The toy world's pairs (toy.py)."""
    if path:
        raise UserError(f'the toy world has no files: --data=toy, or --data={path}')
    from text import toy

    return map(Row, toy.pairs(split, 6000 if split == 'train' else 600)), lambda row: [dict(row)]


def get_hh(split, path=None, data_dir=None):
    """Anthropic/hh-rlhf: two dialogues that differ in their last answer; what precedes it is the prompt."""
    if path and data_dir and os.path.isdir(os.path.join(path, data_dir)):
        path = os.path.join(path, data_dir)

    return read_rows(HUB['hh'], split, path, data_dir=data_dir), parse_dialogues


def get_hh_helpful(split, path=None):
    return get_hh(split, path, data_dir='helpful-base')


def get_hh_harmless(split, path=None):
    return get_hh(split, path, data_dir='harmless-base')


def get_shp(split, path=None):
    """stanfordnlp/SHP: pairs with a score ratio of 2 or more; SFT on the best answer in a prompt's kept pairs."""
    return read_rows(HUB['shp'], split, path), Layout('SHP', '', read_shp)


def get_se(split, path=None):
    """HuggingFaceH4/stack-exchange-preferences: all pairs of a question's answers by pm_score; SFT on the best one."""
    return read_rows(HUB['se'], 'train', path, undivided=True), Layout('Stack Exchange', '', read_stack_exchange)


def get_sharegpt(split, path=None, num_turns=1):
    """ShareGPT, Vicuna's cleaned file: a conversation's first num_turns answers, each after all before it."""

    def parse(row):
        turns = [(field(turn, 'from'), field(turn, 'value')) for turn in field(row, 'conversations', list)]
        if any(token in value for _, value in turns for token in ('<s>', '</s>', '<|endoftext|>')):
            return [{'drop': 'special token in the text'}]

        # each answer behind all before it
        prompt, examples = '', []
        for (asker, question), (replier, reply) in zip(
            turns[: 2 * num_turns : 2], turns[1 : 2 * num_turns : 2], strict=False
        ):
            if (asker, replier) != ('human', 'gpt'):  # pieces of long chats may begin with an answer
                break
            examples.append({'prompt': prompt + ask(question), 'response': answer(reply)})
            prompt += ask(question) + answer(reply)
        return examples or [{'drop': 'does not begin with human, gpt'}]

    return read_rows(
        HUB['sharegpt'],
        'train',
        path,
        undivided=True,
        data_files='ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json',
    ), parse


def get_imdb(split, path=None):
    """insub/imdb_prefix20_forDPO_...: a review's first tokens and two sampled continuations, positive first."""

    def parse(row):
        prompt, chosen, rejected = (field(row, key) for key in ('text', 'chosen', 'rejected'))
        if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
            raise ValueError("the answers do not begin with 'text'")
        return [{'prompt': prompt, 'chosen': chosen[len(prompt) :], 'rejected': rejected[len(prompt) :]}]

    return read_rows(HUB['imdb'], split, path), parse


def get_oasst(split, path=None):
    """OpenAssistant/oasst1, English: each ranked answer against the next better one, after the conversation so far."""
    english = of_all_rows(partial(read_trees, language='en'))
    return read_rows(HUB['oasst'], {'train': 'train', 'test': 'validation'}[split], path), Layout('oasst', '', english)


def get_ultrafeedback(split, path=None):
    """HuggingFaceH4/ultrafeedback_binarized: the best of four answers, by GPT-4, against one of the other three."""
    return read_rows(HUB['ultrafeedback'], split + '_prefs', path), None


def get_ultrafeedback_hybrid(split, path=None):
    """wzhouad/gemma-2-ultrafeedback-hybrid: the same fields."""
    return read_rows(HUB['ultrafeedback_hybrid'], split, path), None


def get_ultrachat(split, path=None):
    """HuggingFaceH4/ultrachat_200k: the first exchange of each conversation."""

    def parse(row):
        turns = [message(field(turn, 'role'), field(turn, 'content')) for turn in field(row, 'messages', list)[:2]]
        if [turn['role'] for turn in turns] != ['user', 'assistant']:
            return [{'drop': 'does not begin with user, assistant'}]
        return [{'prompt': turns[:1], 'response': turns[1:]}]

    return read_rows(HUB['ultrachat'], split + '_sft', path), parse


def get_alpaca_eval(split, path=None):
    """tatsu-lab/alpaca_eval: instructions, for sampling only. (The hub has a loading script there, so its json file is read.)"""
    commit = None if path else files.hub_commit(HUB['alpaca_eval'])
    repository = HUB['alpaca_eval'] + (f'@{commit}' if commit else '')
    file = f'hf://datasets/{repository}/alpaca_eval.json'
    rows = read_rows('json', 'train', path, undivided=True, data_files=file)
    return rows, lambda row: [{'prompt': ask(field(row, 'instruction'))}]


def get_annotations(split, path=None):
    """AlpacaEval's annotations.json: preference below 1.5 means output_1, above it output_2; 0 and 1.5 are ties."""
    if path is None:
        raise UserError('annotations is a local file: --data=annotations:PATH')
    return read_rows(None, 'train', path, undivided=True), parse_annotation
