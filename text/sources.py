"""The datasets: where examples come from. Adding one is adding a get_foo(split, path) -> (rows, parse).

rows are the raw rows as the hub, or the local file or folder `path`, has them; parse(row) -> list of examples, each one of
  {'prompt', 'chosen', 'rejected'}, with 'sft' where the SFT target is not simply the chosen answer, and 'margin', a number,
  where it is known by how much the chosen one is better;
  {'prompt', 'response'}, with 'good': bool for KTO;  {'prompt'};  {'drop': reason} for what the dataset's rules leave out.
A row that is not what it should be makes parse raise ValueError(reason). Texts are strings in Anthropic's format
('\\n\\nHuman: ...\\n\\nAssistant:', then ' answer') or lists of chat messages.
"""

import hashlib
import os
import re
from collections import Counter
from contextlib import suppress
from functools import cache
from html.parser import HTMLParser
from itertools import combinations, islice
from operator import itemgetter

from configurator import UserError
from runtime.log import say
from text import files
from text.files import ENDINGS, HELP, Row, content_hash, data_files, hub_splits, read_rows

# for callers that have not moved to text.formats yet
from text.formats import (  # noqa: F401
    ASSISTANT,
    LONGEST,
    NUMBER,
    REASONING,
    LeftOut,
    answer,
    as_chat,
    ask,
    field,
    instruction,
    message,
    parse_annotation,
    parse_any,
    parse_dialogues,
    text_or_chat,
)

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
REPEATED = 'note: answers that repeated their prompt, which was taken off'


def load_rows(source, split, *, undivided=False, num_turns=1, skip_bad_rows=False):
    """The examples of one source ('hh', 'hh:PATH', 'toy', a hub id, a file or folder) -> (list, Counter of reasons).

    split: 'train' or 'test'. A single file, or a dataset without a test split, is divided by a hash of the prompt unless
    undivided. The Counter says what was left out; reasons that begin with 'note: ' are of examples that stay. An example's
    .where is the file and line it comes from. Raises UserError for an unreadable source and, unless skip_bad_rows, for a bad
    row."""
    rows, parse, no_test_part = _opened(source, split, num_turns)
    examples, left_out = [], Counter()
    rows = iter(rows)
    for row in rows:
        # RecursionError: a row that is nested a thousand deep
        try:
            found = _parse(row, parse)
        except (ValueError, RecursionError) as error:
            if not skip_bad_rows:
                behind = None if examples or left_out else islice(rows, LOOK_AHEAD)
                raise UserError(_refusal(row, error, behind, parse, source)) from None
            left_out[f'bad rows: {error}'] += 1
            continue

        # every example knows its row, which tokenise names where a chat template refuses it
        for example in found:
            if 'drop' in example:
                left_out[example['drop']] += 1
                continue
            example = Row(example)
            example.where = row.where
            examples.append(example)
    examples = _agreeing(examples, left_out, skip_bad_rows)
    if no_test_part and not undivided:
        examples = [example for example in examples if _held_out(example) == (split == 'test')]
    return examples, left_out


def _opened(source, split, num_turns):
    """(rows, parse, whether a part of them has to be held out, for want of a test split) of a source."""
    getter, path, hub_id = locate(source)
    single_file = bool(path) and len(data_files(path)) == 1
    if getter:
        name = source.partition(':')[0]
        more = {'num_turns': num_turns} if name == 'sharegpt' else {}
        return *getter(split, path, **more), name in NO_TEST_SPLIT or single_file
    if path:
        return read_rows(None, split, path), parse_any, single_file
    no_test_split = 'test' not in hub_splits(hub_id)
    return read_rows(hub_id, 'train' if no_test_split else split, None), parse_any, no_test_split


def locate(source):
    """(getter, local path, hub id) of one source, each None where there is no such: what is read, and what it is known by."""
    name, _, path = source.partition(':')
    getter = globals().get(f'get_{name}')
    if path:
        data_files(path)  # raises if there is none
    if getter and not path and os.path.exists(name):
        _note(f'note: {name!r} is the dataset of that name, not what lies in ./{name}: for that write ./{name}')
    if getter:
        return getter, path or None, None if path else HUB.get(name)
    if os.path.exists(source):
        return None, source, None
    if source.endswith(ENDINGS) or source.count('/') != 1:
        known = ', '.join(sorted(n.removeprefix('get_') for n in globals() if n.startswith('get_')))
        raise UserError(
            f'data {source!r} is no file or folder here and no hub id (owner/name): correct it ({HELP}), or name one of '
            f'the known datasets: {known}'
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
    reasons = dict(+left_out) or 'nothing'
    return UserError(f'no {split} examples are left in data {source!r}; left out: {reasons} ({HELP})')


@cache
def _note(text):
    say(text)  # once, though a source is read for training and for evaluation


# ---- from rows to examples ----


def _parse(row, parse):
    """The examples of a row; raises ValueError where it could not be read, or makes none."""
    if row.error:
        raise ValueError(row.error)
    try:
        return parse(row)
    except LeftOut as reason:
        return [{'drop': str(reason)}]


def _refusal(row, error, behind, parse, source):
    """The sentence on a bad row. behind: the next rows, to see whether all are so; None where a good one came before."""
    bad = f'{row.where}: {error}' + (f'; found: {_columns(row)}' if row else '')
    # one bad row among good ones is to be mended; if all are bad, it is the layout
    looked_at = 0 if behind is None else _all_bad(behind, parse)
    if not looked_at:
        return f'{bad}; mend it, or leave such rows out with --skip_bad_rows ({HELP})'
    name = source.partition(':')[0]
    if row.error:
        fits = 'a row is a JSON object with named fields'
    elif f'get_{name}' in globals():
        fits = f'the reader {name!r} is for another one; without {name + ":"!r} the columns decide'
    else:
        fits = f'{KNOWN}: rename the columns'
    return f'{bad}; none of the first {looked_at} rows can be read, so it is the layout: {fits} ({HELP})'


def _all_bad(rows, parse):
    """How many rows there are with the bad one before them, if none of them can be read; else 0."""
    count = 1
    try:
        for row in rows:
            try:
                _parse(row, parse)
                return 0
            except (ValueError, RecursionError):
                count += 1
    except UserError:  # the file ends in something broken
        pass
    return count


def _columns(row):
    """The columns of a row and what is in them, for a message."""
    kinds = {str: 'text', list: 'list', dict: 'object', bool: 'true or false', int: 'number', float: 'number'}
    named = [f'{str(key)[:24]!r} ({kinds.get(type(value), "null")})' for key, value in row.items()]
    return ', '.join(named[:6]) + (f' and {len(named) - 6} more' if len(named) > 6 else '')


def _agreeing(examples, left_out, skip_bad_rows):
    """The examples, if all answers of text repeat their prompt (which is off by now and counted) or none does.

    In a source where some do and others do not, those that do are bad rows: 'Hi' may begin an answer to 'Hi'."""
    # True: its answers began with the prompt; False: they did not; None: that cannot be told
    repeats = [example.pop('repeats', None) for example in examples]
    many, few = repeats.count(True), repeats.count(False)
    if not many:
        return examples
    if not few:
        left_out[REPEATED] = many
        return examples
    error = f'the answers of {many} rows begin with their prompt, of {few} they do not: all or none must'
    if not skip_bad_rows:
        where = examples[repeats.index(True)].where
        raise UserError(f'{where}: {error}; mend it, or leave the {many} out with --skip_bad_rows ({HELP})')
    left_out[f'bad rows: {error}'] += many
    return [example for example, repeat in zip(examples, repeats, strict=True) if not repeat]


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


def shp_pair(row):
    """[(prompt, (score, chosen), (score, rejected))], or [] where neither score is at least twice the other."""
    a, b = ((field(row, 'score_' + x, NUMBER), answer(field(row, 'human_ref_' + x))) for x in 'AB')
    if field(row, 'labels', int) not in (0, 1):
        raise ValueError("'labels' is neither 0 nor 1")
    good, bad = (a, b) if row['labels'] else (b, a)  # 1: A is preferred
    return [(ask(field(row, 'history')), good, bad)] if max(a[0], b[0]) >= 2 * min(a[0], b[0]) else []


def get_shp(split, path=None):
    """stanfordnlp/SHP: pairs with a score ratio of 2 or more; SFT on the best answer in a prompt's kept pairs."""
    # the best answer of each prompt is known after a first reading; broken rows are reported on the second
    best = {}  # prompt -> (score, answer), the first of the highest
    for row in read_rows(HUB['shp'], split, path):
        with suppress(ValueError):
            for prompt, good, bad in shp_pair(row):
                best[prompt] = max(best.get(prompt, good), good, bad, key=itemgetter(0))

    def parse(row):
        return [
            {'prompt': prompt, 'chosen': good[1], 'rejected': bad[1], 'sft': best[prompt][1]}
            for prompt, good, bad in shp_pair(row)
        ] or [{'drop': 'score ratio below 2'}]

    return read_rows(HUB['shp'], split, path), parse


class Stripper(HTMLParser):
    """Strips HTML: .text keeps paragraphs, list items, <code> tags and the text of links; all other tags go."""

    blocks = {'p', 'pre', 'ul', 'ol', 'blockquote', 'div', 'hr', 'table', 'tr', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6'}
    text, pre = '', False

    def handle_starttag(self, tag, attrs):
        self.pre = self.pre or tag == 'pre'
        if tag in self.blocks and not self.text.endswith('\n- '):  # '\n- ': a paragraph may open a list item
            self.text = self.text.rstrip() + '\n\n'
        elif tag == 'li':
            self.text = self.text.rstrip() + '\n- '
        self.text += {'code': '<code>', 'br': '\n'}.get(tag, '')

    def handle_endtag(self, tag):
        self.pre = self.pre and tag != 'pre'
        self.text = self.text.rstrip() + '\n\n' if tag in self.blocks else self.text + '</code>' * (tag == 'code')

    def handle_data(self, data):
        if not self.pre:  # outside code blocks, white space means nothing
            data = re.sub(r'\s+', ' ', data)
            data = data.lstrip() if self.text[-1:] in ('', ' ', '\n') else data
        self.text += data


def strip_html(html):
    stripper = Stripper()
    try:
        stripper.feed(html)
        stripper.close()
    except AssertionError as error:  # the library's word for what it cannot read
        raise ValueError(f'broken HTML ({error})') from None
    return stripper.text.strip()


def get_se(split, path=None):
    """HuggingFaceH4/stack-exchange-preferences: all pairs of a question's answers by pm_score; SFT on the best one."""

    def parse(row):
        prompt, answers = ask(strip_html(field(row, 'question'))), field(row, 'answers', list)
        answers = [(field(x, 'pm_score', NUMBER), answer(strip_html(field(x, 'text')))) for x in answers]
        best = max(answers, key=itemgetter(0), default=(0, ''))[1]
        pairs = [sorted(pair, key=itemgetter(0), reverse=True) for pair in combinations(answers, 2)]
        return [
            {'prompt': prompt, 'chosen': good, 'rejected': bad, 'sft': best} if high > low else {'drop': 'tie'}
            for (high, good), (low, bad) in pairs
        ] or [{'drop': 'fewer than two answers'}]

    return read_rows(HUB['se'], 'train', path, undivided=True), parse


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
    rows = list(read_rows(HUB['oasst'], {'train': 'train', 'test': 'validation'}[split], path))

    # what stands above a message, and which answer is the next better one; broken rows are reported by parse
    by_id, by_rank = {}, {}
    for row in rows:
        with suppress(ValueError):
            parent, by_id[field(row, 'message_id')] = field(row, 'parent_id', (str, type(None))), row
            if field(row, 'lang') == 'en' and parent:
                by_rank[parent, field(row, 'rank', int)] = row

    def parse(row):
        if field(row, 'lang') != 'en':
            return [{'drop': 'not English'}]
        if field(row, 'role') not in ('prompter', 'assistant'):
            raise ValueError("'role' is neither prompter nor assistant")
        if row['role'] == 'assistant' and row.get('rank') is None:
            return [{'drop': 'an answer without a rank'}]
        # what is asked stands above the answers; rank 0, the best, takes part as the better one of rank 1
        if row['role'] == 'prompter' or field(row, 'rank', int) == 0:
            return []
        # the better one of the pair has the same parent
        turns, parent = [], field(row, 'parent_id')
        better = by_rank.get((parent, field(row, 'rank', int) - 1))
        if better is None:
            return [{'drop': 'no answer of the next better rank'}]

        # the conversation so far, from its end up
        while parent is not None:
            if parent not in by_id or len(turns) == 100:
                raise ValueError('the conversation above the answer is not whole')
            role = 'assistant' if by_id[parent].get('role') == 'assistant' else 'user'
            turns.insert(0, message(role, field(by_id[parent], 'text')))
            parent = by_id[parent].get('parent_id')
        chosen, rejected = ([message('assistant', field(x, 'text'))] for x in (better, row))
        return [{'prompt': turns, 'chosen': chosen, 'rejected': rejected}]

    return rows, parse


def parse_ultrafeedback(row):
    chosen, rejected = field(row, 'chosen', list), field(row, 'rejected', list)
    if not chosen or not rejected or chosen[:-1] != rejected[:-1]:
        raise ValueError('chosen and rejected have different prompts')
    for answered in (chosen[-1], rejected[-1]):
        if field(answered, 'role') != 'assistant':
            raise ValueError("'chosen' or 'rejected' does not end with an answer")
    if [field(turn, 'content') for turn in chosen[:-1]] != [field(row, 'prompt')]:
        return [{'drop': 'answers to something else than the prompt'}]
    chosen, rejected = ([message('assistant', field(x[-1], 'content'))] for x in (chosen, rejected))
    return [{'prompt': [message('user', field(row, 'prompt'))], 'chosen': chosen, 'rejected': rejected}]


def get_ultrafeedback(split, path=None):
    """HuggingFaceH4/ultrafeedback_binarized: the best of four answers, by GPT-4, against one of the other three."""
    return read_rows(HUB['ultrafeedback'], split + '_prefs', path), parse_ultrafeedback


def get_ultrafeedback_hybrid(split, path=None):
    """wzhouad/gemma-2-ultrafeedback-hybrid: the same fields."""
    return read_rows(HUB['ultrafeedback_hybrid'], split, path), parse_ultrafeedback


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
