"""From text (sources.py) to token ids: prompt and answers apart, joined as ids, truncated, counted, cached on disk.

Every answer ends with the end of text, cut or not; BOS stands only where the tokenizer itself would put one. Rows stream through in
chunks, and the ids go into a file of the cache, so that a million rows take no more memory than a thousand."""

import contextlib
import hashlib
import heapq
import json
import os
from collections import Counter
from functools import cache
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import UserError
from runtime import files
from runtime.log import say
from text import sources, turns
from text.chat import NO_TEMPLATE, PLAIN_CHAT, THOUGHTLESS, Refused, render
from text.examples import Examples, uniform_hash
from text.files import HELP, Row, content_hash
from text.formats import TURN_MARKERS
from text.messages import REASONING, as_chat, message

NEEDS = {  # task -> what its rows have beside a prompt
    'pairs': 'chosen and rejected',
    'singles': 'a response and whether it is good (label), or chosen and rejected',
    'sft': 'an answer',
}
NO_CHAT = 'note: texts beside a chat template, which --chat would apply'
CHUNK = 512  # rows that are tokenised together
FEW = 10_000  # so many rows are all tokenised, however few of them a run needs


class Part(NamedTuple):
    """What an example is made of: a prompt and its answers, as text or chat, and what is known of them."""

    prompt: str | list
    answers: list
    good: bool
    uid: int  # a hash of the text
    margin: float | None = None
    turns: list | None = None  # a conversation, of which every answer is trained on


class Limits(NamedTuple):
    """Tokens of an example. truncation: which end a prompt loses, start or end."""

    max_length: int
    max_prompt_length: int
    truncation: str = 'start'


# ---- data as a run asks for it ----

_spare = {}  # cache file -> Examples of the other split, which came with the same reading


def load_examples(data, split, tokenizer, task, *, max_length, max_prompt_length, truncation='start', undivided=False,
                  num_turns=1, skip_bad_rows=False, columns=None, chat=False, system=None, last_turn_only=False,
                  data_fraction=1.0, seed=0, needed=None, cache=True, margins=False):  # fmt: skip
    """Tokenised examples of 'hh', 'hh+shp', 'hh:PATH', 'toy', a hub id, a file or folder; cached on disk by content.

    task: 'pairs', 'singles' (KTO, made from pairs if need be) or 'sft'. max_length, max_prompt_length: tokens; where the
    whole is too long, the prompt loses its start (or end: truncation), then answers are cut before their end of text.
    undivided: a single file is all for this split. chat: texts become chats, behind the message system. last_turn_only: of a
    conversation only the last answer is trained on. needed: so many examples will do; of many more, some are drawn by hash.
    margins: keep the margins of pairs. Raises UserError."""
    if max_length < max_prompt_length + 2:
        room = f'max_length {max_length} leaves no room for an answer'
        raise UserError(f'{room} behind max_prompt_length {max_prompt_length}')
    names = data.split('+')
    reading = {'undivided': undivided, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows}
    reading |= {'columns': columns, 'task': task}
    how = {'limits': Limits(max_length, max_prompt_length, truncation), 'skip_bad_rows': skip_bad_rows}
    how |= {'margins': margins, 'chat': chat, 'system': system, 'last_turn_only': last_turn_only}
    if needed is not None:
        needed = int(max(needed, FEW) / data_fraction)

    # the cache belongs to all that the tokens depend on; of a hub dataset whose commit nobody knows, its rows tell what is in it
    stamps = [sources.fingerprint(source, split) for source in names]
    if None in stamps:
        stamps = [content_hash(list(_read(names, split, Counter(), reading)))]
    common = [8, stamps, reading, how, *_tokenizer_stamp(tokenizer)]

    def file_of(part):
        key = json.dumps([*common, part, needed if part == 'train' else None])
        return files.cache_file('tokens', hashlib.sha256(key.encode()).hexdigest())

    # in the cache, or at hand since the other split was read
    examples = _spare.pop(file_of(split), None)
    if examples is None and cache:
        examples = _read_cache(file_of(split))
    if examples is None:
        options = how | {'seed': seed, 'needed': needed, 'cache': cache}
        _spare.update(_tokenised(names, split, reading, tokenizer, task, options, file_of))
        examples = _spare.pop(file_of(split))

    # so that the exported tokenizer writes chats as in training
    if NO_TEMPLATE in examples.left_out:
        tokenizer.chat_template = PLAIN_CHAT
    # by another hash than that of flip: else the kept pairs would be the flipped ones
    if data_fraction < 1:
        examples = examples.select(uniform_hash(examples.uid, seed + 2) < data_fraction)
    if not len(examples) and split == 'train':
        raise sources.vanished(data, split, examples.left_out)
    return examples


def _tokenised(names, split, reading, tokenizer, task, options, file_of):
    """{cache file: Examples} of a split, and of the other one, where a source has to be divided and was read for both."""
    needed, cache = options.pop('needed'), options.pop('cache')
    collectors, left_out = {}, Counter()

    def collector(part):
        if part not in collectors:
            file, enough = file_of(part) if cache else None, needed if part == 'train' else None
            collectors[part] = Collector(tokenizer, task, file=file, needed=enough, **options)
        return collectors[part]

    try:
        for row in _read(names, split, left_out, reading, both=len(names) == 1):
            collector('test' if row.held_out else 'train').add(row)
        collector(split)  # which may be empty
        return {file_of(part): found.finish(left_out) for part, found in collectors.items()}
    except BaseException:
        for found in collectors.values():
            found.ids.discard()
        raise


def _read(names, split, left_out, reading, both=False):
    """The examples of all sources, one by one, as text or chat. Raises UserError for a source that has none.

    both: a source that has to be divided gives its training and its held-out examples; row.held_out says which it is."""
    for source in names:
        useful, reasons, unused = False, Counter(), Counter()
        for row in sources.read_examples(source, split, reasons, both=both, **reading):
            if not useful and row.held_out == (split == 'test'):
                useful = bool(as_parts(row, reading['task'], unused))
            yield row
        # a held-out part may be empty, nothing else
        if not useful and (split == 'train' or reading['undivided']):
            raise sources.vanished(source, split, reasons + unused)
        left_out.update(reasons)


def _tokenizer_stamp(tokenizer):
    """What decides a tokenizer's ids, json-able. PLAIN_CHAT counts as no template: a run sets it where there was none."""
    model = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.get_vocab())
    template = tokenizer.chat_template if tokenizer.chat_template != PLAIN_CHAT else None
    return model, template, tokenizer.eos_token_id


# ---- from rows to ids ----


def tokenise(rows, tokenizer, task, max_length, max_prompt_length, truncation, left_out, margins=False,
             skip_bad_rows=False, **how):  # fmt: skip
    """Examples from rows of text or chat; what cannot be used is counted in left_out.

    margins: if any pair has a margin, all get one, 0 where there is none, which is counted. skip_bad_rows: count the rows
    that the chat template refuses, instead of raising UserError. how: further options of Collector."""
    limits = Limits(max_length, max_prompt_length, truncation)
    collector = Collector(tokenizer, task, limits=limits, margins=margins, skip_bad_rows=skip_bad_rows, **how)
    collector.left_out = left_out
    for row in rows:
        collector.add(row)
    return collector.finish(Counter())


class Collector:
    """Tokenised examples as they grow: rows are added one by one, and tokenised in chunks."""

    def __init__(self, tokenizer, task, *, limits, margins=False, skip_bad_rows=False, chat=False, system=None,
                 last_turn_only=True, file=None, needed=None, seed=0):  # fmt: skip
        """file: of the cache. needed: of many more rows, about so many are used. The others: see load_examples."""
        self.tokenizer, self.task, self.limits, self.margins = tokenizer, task, limits, margins
        self.skip_bad_rows, self.chat, self.system, self.last_turn_only = skip_bad_rows, chat, system, last_turn_only
        self.has_template = tokenizer.chat_template not in (None, PLAIN_CHAT)
        self.needed, self.seed, self.left_out = needed, seed, Counter()
        self.file, self.ids = file, Ids(file)
        self.drawn, self.rows = [], 0  # a heap of the rows to use, where only some are needed
        self.waiting, self.seen, self.kept, self.widths = [], set(), [], []
        self.bar = tqdm(desc='tokenising', unit=' rows', disable=None, leave=False, delay=1)

    def add(self, row):
        """One more row, as sources.read_examples gives it."""
        self.rows += 1
        self.bar.update()
        if self.needed is None:
            self._tokenise_later(row)
            return
        # those with the smallest hashes are used; the heap's first has the largest hash of them
        uid = np.array([content_hash(row['prompt'])], np.uint64)
        item = (-float(uniform_hash(uid, self.seed + 3)[0]), self.rows, row)
        if len(self.drawn) < self.needed:
            heapq.heappush(self.drawn, item)
        else:
            heapq.heappushpop(self.drawn, item)

    def finish(self, reasons):
        """The Examples of all rows, which are then in the cache. reasons: Counter of what reading has left out."""
        for _, _, row in sorted(self.drawn, key=lambda item: item[1]):
            self._tokenise_later(row)
        if self.drawn:
            self.left_out['rows beyond what n_examples needs'] += self.rows - len(self.drawn)
        self._tokenise()
        self.bar.close()

        # where each prompt and answer begins and ends in the flat array
        edges = np.concatenate(([0], np.cumsum(np.array(self.widths, np.int64).reshape(-1))))
        spans = np.stack((edges[:-1], edges[1:]), 1).reshape(-1, 3 if self.task == 'pairs' else 2, 2)
        good = np.array([part.good for part in self.kept], bool)
        uid = np.array([part.uid for part in self.kept], np.uint64)
        margin = _margins(self.kept, self.margins, self.left_out)
        # the answers behind prompts are not trained on
        if self.task == 'prompts':
            del self.left_out[THOUGHTLESS]
        left_out = self.left_out
        left_out.update(reasons)
        examples = Examples(self.ids.array(), spans, good, uid, +left_out, margin=margin)
        if self.file:
            _write_cache(self.file, examples, self.ids)
        return examples

    def _tokenise_later(self, row):
        self.waiting.append(as_chats(row, self.system) if self.chat or self.system else row)
        if len(self.waiting) == CHUNK:
            self._tokenise()

    def _tokenise(self):
        """The ids of the rows that wait."""
        items = [item for row in self.waiting for item in self._written(row)]
        self.waiting = []
        encoded = iter(_encode([text for texts, _, _ in items for text in texts], self.tokenizer, self.left_out))
        for texts, trained, part in items:
            pieces = self._fitted(list(islice(encoded, len(texts))), trained)
            if pieces:
                self.ids.append(pieces)
                self.widths.append([len(piece) for piece in pieces])
                self.kept.append(part._replace(prompt=None, answers=None, turns=None))

    def _written(self, row):
        """[(texts, trained, Part)] of a row; none, counted, where it cannot be used.

        texts: of the prompt and the answers, each a list of pieces. trained: of a conversation, whose texts are its segments,
        whether each is trained on; else None."""
        left_out = self.left_out
        try:
            parts = as_parts(row, self.task, left_out, self.last_turn_only)
            # one demonstration a prompt and answer, however many pairs it is in
            if self.task in ('sft', 'prompts') and parts and parts[0].uid in self.seen:
                left_out['same prompt again' if self.task == 'prompts' else 'same demonstration again'] += 1
                return []
            written = [item for part in parts for item in self._texts(part, row.get('tools'))]
        except Refused as error:
            _bad_row(error, row, self.skip_bad_rows, left_out)
            return []
        self.seen.update(part.uid for part in parts)
        return written

    def _texts(self, part, tools):
        """The items of _written of one Part: of a conversation that cannot be one sequence, one for each answer."""
        if part.turns:
            segments = turns.segments(part.turns, tools, self.tokenizer, self.left_out)
            if segments is not None:
                return [([segment.pieces for segment in segments], [segment.trained for segment in segments], part)]
            self.left_out[turns.APART] += 1
            answers = [i for i, turn in enumerate(part.turns) if turns.is_trained(turn)]
            chats = [(part.turns[:i], [part.turns[i : i + 1]]) for i in answers]
        else:
            chats = [(part.prompt, part.answers)]
            plain = all(isinstance(text, str) for text in (part.prompt, *part.answers))
            plain = plain and not part.prompt.endswith(TURN_MARKERS)
            self.left_out[NO_CHAT] += plain and bool(part.prompt) and self.has_template
        texts = [render(prompt, answers, tools, self.tokenizer, self.left_out) for prompt, answers in chats]
        self.left_out['empty answers'] += texts.count(None)
        return [(text, None, part) for text in texts if text is not None]

    def _fitted(self, ids, trained):
        """[prompt, answers] as ids that fit; None, counted, where nothing is left to train on."""
        first, eos = _first(self.tokenizer), self.tokenizer.eos_token_id
        if trained:
            return _fit_conversation(ids, trained, first, eos, self.limits, self.left_out)
        p, *a = ids
        if any(x in ([], [eos]) for x in a):
            self.left_out['empty answers'] += 1
            return None
        p, a = _fit(p, a, first, eos, self.limits, self.left_out)
        # texts that differ may be cut to the same tokens
        if len(a) == 2 and a[0] == a[1]:
            self.left_out['pairs with equal answers'] += 1
            return None
        return [p, *a]


def as_chats(row, system):
    """A row whose texts are chats, behind a system message unless it is None."""
    answers = [key for key in ('chosen', 'rejected', 'response', 'sft') if isinstance(row.get(key), str)]
    changed = {key: [message('assistant', row[key].strip())] for key in answers}
    for key in ('prompt', 'turns'):
        if key in row:
            chat = as_chat(row[key])
            has_system = bool(chat) and chat[0]['role'] == 'system'
            changed[key] = chat if has_system or not system else [message('system', system), *chat]
    new = Row(row | changed)
    new.where = getattr(row, 'where', '')
    return new


def _margins(parts, wanted, left_out):
    """The margins of pairs as an array, 0 where one has none; None where no pair has one, or none are wanted."""
    known = sum(part.margin is not None for part in parts)
    if not known:
        return None
    if not wanted:
        left_out['margins, which only reward.py uses'] += known
        return None
    left_out['pairs without a margin, taken as 0'] += len(parts) - known
    return np.array([part.margin or 0.0 for part in parts], np.float32)


def _bad_row(error, row, skip_bad_rows, left_out):
    """Count a row that cannot be written as text. Raises UserError unless such rows are to be skipped."""
    if not skip_bad_rows:
        where = getattr(row, 'where', '')
        advice = f'; mend it, or leave such rows out with --skip_bad_rows ({HELP})' if where else ''
        raise UserError(f'{where}{": " * bool(where)}{error}{advice}') from None
    left_out[f'bad rows: {error}'] += 1


def encode(prompt, answer, tokenizer, max_length, max_prompt_length, truncation, left_out):
    """(prompt ids, answer ids) of one text or chat, as tokenise has them; an empty answer is the end of text alone."""
    try:
        texts = render(prompt, [answer], None, tokenizer, left_out, blank=True)
    except Refused as error:
        raise UserError(str(error)) from None
    p, a = _encode(texts, tokenizer, left_out)
    first, eos = _first(tokenizer), tokenizer.eos_token_id
    p, a = _fit(p, [a], first, eos, Limits(max_length, max_prompt_length, truncation), left_out)
    return p, a[0]


def _fit(p, a, first, eos, limits, left_out):
    """The ids of a prompt, and of its answers, with BOS and the end of text, cut to the lengths."""
    p = _begin(p, first, eos)
    a = [x if x[-1:] == [eos] else [*x, eos] for x in a]
    # too long: first the prompt is cut, then each answer to the room that is left
    if len(p) + max(map(len, a)) > limits.max_length:
        p = _cut_prompt(p, first, limits, left_out)
        room = limits.max_length - len(p)
        left_out['answers cut'] += sum(len(x) > room for x in a)
        a = [x if len(x) <= room else [*x[: room - 1], eos] for x in a]
    return p, a


def _cut_prompt(p, first, limits, left_out):
    """A prompt's ids, cut and counted if there are too many."""
    if len(p) <= limits.max_prompt_length:
        return p
    left_out['prompts cut'] += 1
    return _cut(p, limits.max_prompt_length, first, limits.truncation)


def _fit_conversation(ids, trained, first, eos, limits, left_out):
    """[prompt, answer] of a conversation's segments as ids, where a token that is only seen is ~id; None if nothing is left.

    The prompt is what comes before the first answer. A conversation that is too long loses its end."""
    prompt = _begin(ids[0], first, eos)
    # the rest is one answer: it ends with the end of text, and the user's words in it are only seen
    answer = []
    for segment, is_used in zip(ids[1:], trained[1:], strict=True):
        answer += segment if is_used else [~i for i in segment]
    answer += [] if answer[-1:] == [eos] else [eos]

    if len(prompt) + len(answer) > limits.max_length:
        prompt = _cut_prompt(prompt, first, limits, left_out)
        room = limits.max_length - len(prompt)
        if len(answer) > room:
            left_out['conversations cut'] += 1
            inside = answer[room - 1] >= 0 and answer[room] >= 0
            answer = answer[:room]
            # the cut is in an answer, which ends as one; or behind it, where the user's words train nothing
            if inside:
                answer[-1] = eos
            while answer and answer[-1] < 0:
                answer.pop()
    if not answer:
        left_out['conversations without an answer within max_length'] += 1
        return None
    return [prompt, answer]


def tokenise_prompts(prompts, tokenizer, longest, truncation, left_out, skip_bad_rows=False):
    """The ids of prompts as they are in training; one of more than `longest` tokens is cut, and counted.

    prompts: texts, chats, or rows with 'prompt' and perhaps 'tools'. skip_bad_rows: None for one that the chat template
    refuses, which is counted; else UserError."""
    # None stands for a row that cannot be written
    texts = []
    for row in prompts:
        row = row if isinstance(row, dict) else {'prompt': row}
        try:
            texts += render(row['prompt'], [], row.get('tools'), tokenizer, left_out)
        except Refused as error:
            _bad_row(error, row, skip_bad_rows, left_out)
            texts.append(None)
    ids = iter(_encode([text for text in texts if text is not None], tokenizer, left_out))
    first, eos = _first(tokenizer), tokenizer.eos_token_id
    found = [None if text is None else _begin(next(ids), first, eos) for text in texts]
    left_out['prompts cut'] += sum(len(p) > longest for p in found if p is not None)
    return [p if p is None or len(p) <= longest else _cut(p, longest, first, truncation) for p in found]


def _first(tokenizer):
    """BOS where the tokenizer itself would put one, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer('a')['input_ids'][:1] == [bos] else None


def _begin(prompt, first, eos):
    """A prompt's ids behind BOS, if it has one; an empty prompt is the end of text before."""
    if prompt and first in (None, prompt[0]):
        return prompt
    return [eos if first is None else first, *prompt]


def _cut(prompt, length, first, truncation):
    """The last (or, truncation 'end', the first) tokens of a prompt, BOS kept."""
    head = [] if first is None else prompt[:1]
    return [*head, *prompt[len(prompt) - length + len(head) :]] if truncation == 'start' else prompt[:length]


def as_parts(row, task, left_out, last_turn_only=False):
    """The Parts of a row, as the task needs them; none, counted, where it has no such thing."""
    prompt, answers = row['prompt'], _answers(row, task, left_out)
    if answers is None:
        return []
    uid = content_hash(prompt, answers, *([row['tools']] if row.get('tools') else []))
    if any(map(_blank, answers)):
        left_out['empty answers'] += 1
        return []
    if len(answers) == 2 and answers[0] == answers[1]:
        left_out['pairs with equal answers'] += 1
        return []

    # a pair for KTO is one good and one bad answer
    if len(answers) == 2 and task != 'pairs':
        return [Part(prompt, [answer], good, uid) for answer, good in zip(answers, (True, False), strict=True)]
    margin = row.get('margin') if task == 'pairs' else None
    # a conversation with several answers trains on all of them
    conversation = None
    if task == 'sft' and 'turns' in row and not last_turn_only:
        conversation = row['turns'] if sum(map(turns.is_trained, row['turns'])) > 1 else None
    return [Part(prompt, answers, row.get('good', True), uid, margin, conversation)]


def _answers(row, task, left_out):
    """The answers of a row that the task uses; None, counted, where it has none for it."""
    good = row.get('good', True)
    alone = task in ('sft', 'prompts')
    if 'chosen' in row and not alone:
        return [row['chosen'], row['rejected']]
    if 'response' in row and task == 'sft' and not good:
        left_out['bad answers, which are no demonstrations'] += 1
        return None
    answer = None
    if 'chosen' in row:
        answer = row.get('sft', row['chosen'])
    elif 'response' in row and (alone or (task == 'singles' and 'good' in row)):
        answer = row['response']

    # behind a prompt alone anything will do: a template may need an answer to write the prompt
    if task == 'prompts' and (answer is None or _blank(answer)):
        return ['.' if isinstance(row['prompt'], str) else [message('assistant', '.')]]
    if answer is not None:
        return [answer]
    have = 'a prompt and a response' if 'response' in row else 'a prompt'
    left_out[f'rows with {have} only, where {task} needs {NEEDS[task]}'] += 1
    return None


def _blank(answer):
    """Whether an answer, text or chat, says nothing."""
    if isinstance(answer, str):
        return not answer.strip()
    calls_or_thoughts = ('tool_calls', *REASONING)
    return not any(turn['content'].strip() or any(turn.get(key) for key in calls_or_thoughts) for turn in answer)


# ---- from pieces of text to ids ----


def _encode(texts, tokenizer, left_out):
    """The token ids of texts, each a list of pieces."""
    # all that are of one piece at once
    single = [pieces[0] for pieces in texts if len(pieces) == 1]
    ids = iter(tokenizer(single, add_special_tokens=False)['input_ids'] if single else [])
    return [next(ids) if len(pieces) == 1 else _encode_pieces(pieces, tokenizer, left_out) for pieces in texts]


def _encode_pieces(pieces, tokenizer, left_out):
    """The token ids of pieces in a row, each encoded behind a line break that is taken away again: some tokenizers put a
    space before what begins a text. (The same as sanitize_control_tokens of transformers 5.23.)"""

    def as_tokens(text):
        return tokenizer(text, add_special_tokens=False)['input_ids']

    def as_text(text):
        return _ids_of_text(text, tokenizer)

    def behind_line(encoder, text):
        more = encoder('\n' + text)
        return more[len(line) :] if more[: len(line)] == line else encoder(text)

    # every second piece is a special token that is written as text
    ids, line = as_tokens(pieces[0]), as_tokens('\n')
    for i, piece in enumerate(pieces[1:], 1):
        if not piece:
            continue
        if i % 2 == 0:
            ids = ids + behind_line(as_tokens, piece)
            continue
        token, more = tokenizer.convert_tokens_to_ids(piece), behind_line(as_text, piece)
        # a word of the model, too, as in Unigram: in two parts it is not
        if token in more:
            more = behind_line(as_text, piece[:1]) + behind_line(as_text, piece[1:])
        left_out['special tokens in a text, for which this tokenizer has no other ids'] += token in more
        ids = ids + more
    return ids


def _ids_of_text(text, tokenizer):
    """The ids of a text none of which is an added token, special or not."""
    if not tokenizer.is_fast:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    inner, words = tokenizer.backend_tokenizer, [text]
    if inner.normalizer is not None:
        words = [inner.normalizer.normalize_str(text)]
    if inner.pre_tokenizer is not None:
        words = [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(words[0])]
    return [token.id for word in words for token in inner.model.tokenize(word)]


# ---- the cache on disk ----


@cache
def _not_cached(reason):
    say(f'note: tokens are not cached: {reason}')  # once


class Ids:
    """Token ids as they grow: in a file beside the cache's, or in memory where there is none or the disk does not take them."""

    def __init__(self, file):
        self.parts, self.stream, self.count = [], None, 0
        if file:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self.path = file.with_suffix(f'.{os.getpid()}.ids')
                self.stream = open(self.path, 'wb')
            except OSError as error:
                _not_cached(error)

    def append(self, pieces):
        """More ids, a list of lists."""
        array = np.fromiter(chain.from_iterable(pieces), np.int32)
        try:
            if self.stream:
                self.stream.write(array)
        except OSError as error:  # a full disk: what is written so far goes on in memory
            _not_cached(error)
            self.parts = [self._from_file()]
        if not self.stream:
            self.parts.append(array)
        self.count += len(array)

    def _from_file(self):
        """What the file holds, in memory; there is no file any more."""
        with contextlib.suppress(OSError):
            self.stream.close()
        self.stream = None
        array = np.fromfile(self.path, np.int32)[: self.count]
        self.path.unlink(missing_ok=True)
        return array

    def array(self):
        """All ids, (tokens,) int32: a memory map of the file where there is one."""
        if self.stream:
            try:
                self.stream.close()
                return np.memmap(self.path, np.int32, 'r') if self.count else np.zeros(0, np.int32)
            except OSError as error:
                _not_cached(error)
                self.parts = [self._from_file()]
        return np.concatenate(self.parts) if self.parts else np.zeros(0, np.int32)

    def keep(self, file):
        """Give the file of ids its name in the cache."""
        self.path.replace(file.with_suffix('.ids'))

    def discard(self):
        """Remove the file; what is mapped stays readable."""
        if self.stream:
            self.path.unlink(missing_ok=True)


def _write_cache(file, examples, ids):
    """Write a cache: the ids in a file of their own, which is memory-mapped, the rest beside it."""
    if not ids.stream:
        return
    names = ['spans', 'good', 'uid'] + ['margin'] * (examples.margin is not None)
    arrays = {name: np.ascontiguousarray(getattr(examples, name)) for name in names}
    digest = _digest([examples.ids, *arrays.values()], examples.left_out)
    reason = files.write_cache(file, arrays, {'left_out': json.dumps([examples.left_out, digest])})
    if reason:
        _not_cached(reason)
        ids.discard()
    else:
        ids.keep(file)


def _read_cache(file):
    """The Examples in a cache, or None where there is none or it is damaged."""
    if not file.exists():
        return None
    ids = np.zeros(0, np.int32)
    with contextlib.suppress(OSError, ValueError):  # an empty file cannot be mapped
        ids = np.memmap(file.with_suffix('.ids'), np.int32, 'r')

    def valid(arrays, metadata):
        left_out, digest = json.loads(metadata['left_out'])
        return digest == _digest(
            [ids, *(arrays[name] for name in ('spans', 'good', 'uid', 'margin') if name in arrays)], left_out
        )

    found = files.read_cache(file, valid)
    if found is None:
        return say(f'note: {file} is damaged: tokenising anew')
    arrays, metadata = found
    return Examples(ids, **arrays, left_out=Counter(json.loads(metadata['left_out'])[0]))


def _digest(arrays, left_out):
    """A hash of what a cache holds: a changed bit would train on other tokens."""
    digest = hashlib.blake2b(json.dumps(left_out).encode(), digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
