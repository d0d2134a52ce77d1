"""From rows of text to tokenised Examples, cached on disk. Training scripts call load_examples.

A row goes through: sources.read_examples -> as_parts -> chat.render or turns.segments -> ids.encode_texts -> _Builder.add.
Prompt and answers are tokenised apart. Every answer ends with the end of text, even if it was cut; a BOS stands before the
prompt only if the tokenizer itself puts one there.
"""

import hashlib
import json
import math
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from configurator import UserError
from runtime import cache
from runtime.log import progress, say
from runtime.values import no_room
from text import sources, turns
from text.chat import NO_TEMPLATE, PLAIN_CHAT, THOUGHTLESS, Refused, render
from text.examples import Examples, spans_of, uniform_hash
from text.files import HELP, content_hash
from text.formats import TURN_MARKERS
from text.ids import Limits, begin, cut, encode_texts, fit, fit_conversation
from text.messages import as_chats, is_empty, is_trained, said

NO_CHAT = 'note: texts beside a chat template, which --chat would apply'
# a run that takes at most a tenth of so many examples draws them from the first so many (training.py)
ENOUGH = 20_000
# a chunk that is tokenised at once ends with so many examples, or characters
CHUNK, CHARACTERS = 512, 2**22
NEEDS = {  # task -> what its rows have beside a prompt
    'pairs': 'chosen and rejected',
    'singles': 'a response and whether it is good (label), or chosen and rejected',
    'sft': 'an answer',
}
# the arrays of Examples that a cache file holds; margin only if there is one
CACHED = ('ids', 'spans', 'good', 'uid', 'margin')


class Part(NamedTuple):
    """What a task makes one example of: a prompt and its answers, each a text or a chat, and what is known of them."""

    prompt: str | list
    answers: list  # chosen and rejected of a pair, or else one
    good: bool
    uid: int  # a hash of the text; the two single answers that are made of a pair have the same
    margin: float | None = None
    conversation: list | None = None  # all messages of a conversation, if each answer in it is trained on


def load_examples(data, split, tokenizer, task, *, max_length, max_prompt_length, truncation='start', undivided=False,
                  num_turns=1, skip_bad_rows=False, columns=None, chat=False, system=None, last_turn_only=False,
                  data_fraction=1.0, seed=0, cache=True, margins=False, enough=None):  # fmt: skip
    """Return the tokenised Examples of a split of data: of 'hh', 'hh+shp', 'hh:PATH', 'toy', a hub id, a file or a folder.

    split: 'train' or 'test'. task: 'pairs', 'singles' (KTO; a pair makes two), 'sft' or 'prompts'. max_length,
    max_prompt_length: tokens; if the whole is too long, the prompt loses its start (truncation 'end': its end), then answers
    are cut. undivided, num_turns, skip_bad_rows, columns: of sources.read_examples. chat: texts become chats. system: chats
    begin with this message. last_turn_only: sft trains on the last answer of a conversation, not on all. data_fraction: keep
    so many, drawn by a hash of text and seed. margins: keep those of pairs. enough: {'train': count, 'test': count}: tokenise
    only the first so many; None: all. A tokenizer without a chat template gets one if there are chats. Raises UserError."""
    problem = no_room(max_length, max_prompt_length)
    if problem:
        raise UserError(problem)
    reading = {'undivided': undivided, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    writing = {'chat': chat, 'system': system, 'last_turn_only': last_turn_only, 'margins': margins}
    lengths = max_length, max_prompt_length, truncation
    names = data.split('+')
    enough = enough or {}

    # the name of a cache file follows from all that the tokens depend on; without a hub dataset's commit, from its rows
    stamps = [sources.fingerprint(source, split) for source in names]
    is_stamped = None not in stamps
    if not is_stamped:
        stamps = [content_hash(row) for row in _read_sources(names, split, task, reading, Counter())]
    # 8: it grows when this code makes other tokens of the same text
    key = [8, stamps, names, task, reading, lengths, writing, *_tokenizer_stamp(tokenizer)]
    # with {} the file of all examples, which are enough for any count
    files = [_cache_file(key, split, count) for count in ({}, enough)]
    examples = _read_cache(files) if cache else None
    if examples is None:
        splits = [split]
        # the rows held out for testing are among those of 'train': evaluation will find them in the cache
        if cache and is_stamped and split == 'train' and not undivided and all(map(sources.divides, names)):
            splits = ['train', 'test']
        tokenised, is_all = _tokenise_sources(names, splits, tokenizer, task, reading, writing, lengths, enough)
        if cache:
            for name, its_examples in tokenised.items():
                _write_cache(_cache_file(key, name, {} if is_all else enough), its_examples)
        examples = tokenised[split]
    examples = examples.select(slice(enough.get(split)))
    # so that the exported tokenizer writes chats as in training
    if NO_TEMPLATE in examples.left_out:
        tokenizer.chat_template = PLAIN_CHAT
    # seed + 2: by the hash that flip uses, the pairs kept would be the pairs flipped
    if data_fraction < 1:
        examples = examples.select(uniform_hash(examples.uid, seed + 2) < data_fraction)
    if not len(examples) and split == 'train':
        raise sources.vanished(data, split, examples.left_out)
    return examples


def _tokenise_sources(names, splits, tokenizer, task, reading, writing, lengths, enough):
    """Read sources and return ({split: Examples}, whether these are all), for one split, or for 'train' and 'test' at once.

    The arguments are those of load_examples, in groups. What was left out in reading counts for each split."""
    left_out = Counter()
    rows = _read_sources(names, splits[0], task, reading, left_out, both=len(splits) == 2)
    options = {'skip_bad_rows': reading['skip_bad_rows'], **writing}
    tokenised, is_all = tokenise_splits(rows, splits, tokenizer, task, lengths, enough, **options)
    # that there are few examples for testing is an option; for training it is news
    if not is_all and 'train' in splits:
        say(f'note: the first {enough["train"]:,} training examples are enough: the others are not read')
    # end the reading, which now adds to left_out
    rows.close()
    for examples in tokenised.values():
        examples.left_out.update(left_out)
    return tokenised, is_all


def _read_sources(names, split, task, reading, left_out, both=False):
    """Yield the rows of all sources as examples of text, and show their number. Raises UserError if a source has none to train on.

    reading: options of sources.read_examples. left_out: a Counter, to which the reasons of a source are added when its reading
    ends or is stopped. both: of sources without a test split, yield the rows of train and of test."""
    with progress(None, ' examples', 'reading') as bar:
        for source in names:
            reasons, unusable = Counter(), Counter()
            is_usable = False
            try:
                for row in sources.read_examples(source, split, reasons, task=task, both=both, **reading):
                    # one row of use is enough, and it must be one to train on
                    if not is_usable and not row.held_out:
                        is_usable = bool(as_parts(row, task, unusable))
                    bar.update()
                    yield row
            finally:
                left_out.update(reasons)
            # rows that are held out for testing need not be usable
            if not is_usable and (split == 'train' or reading['undivided']):
                raise sources.vanished(source, split, reasons + unusable)


def source_rows(examples, data, split, task, *, chat, system, **reading):
    """Return {uid: (prompt, row)} for Examples that load_examples has made with these arguments.

    prompt: a text or chat. row: as it was read, with all its columns. reading: undivided, num_turns, skip_bad_rows, columns."""
    wanted = set(examples.uid.tolist())
    found = {}
    if not wanted:
        return found
    for row in _read_sources(data.split('+'), split, task, reading, Counter()):
        example = as_chats(row, system) if chat or system else row
        for part in as_parts(example, task, Counter()):
            # of equal examples, the first row counts
            if part.uid in wanted and part.uid not in found:
                found[part.uid] = part.prompt, row.raw
        if len(found) == len(wanted):
            break
    return found


# ---- rows to ids ----


def tokenise(rows, tokenizer, task, max_length, max_prompt_length, truncation, left_out, margins=False, **writing):
    """Return the Examples of rows of text or chat. The reasons for what cannot be used are added to the Counter left_out.

    margins: if any pair has a margin, all keep theirs; a missing one becomes 0, and is counted. writing: skip_bad_rows (count
    the rows that the chat template refuses, instead of raising UserError), and chat, system, last_turn_only of load_examples."""
    lengths = max_length, max_prompt_length, truncation
    tokenised, _ = tokenise_splits(rows, ['train'], tokenizer, task, lengths, {}, margins=margins, **writing)
    examples = tokenised['train']
    left_out.update(examples.left_out)
    examples.left_out = +left_out
    return examples


def tokenise_splits(rows, splits, tokenizer, task, lengths, enough, margins=False, **writing):
    """Return ({split: Examples}, whether all rows were read). Of two splits, the second gets the rows that are .held_out.

    lengths: max_length, max_prompt_length, truncation. enough: {split: count}: reading stops once every split has so many
    examples; without a count, or with None, all rows are read. margins, writing: as for tokenise."""
    builders = {split: _Builder() for split in splits}
    limits = Limits.of(tokenizer, *lengths)
    rendered = _render_rows(rows, list(builders.values()), tokenizer, task, **writing)
    is_all = True
    for encoded_chunk in _encoded(rendered, tokenizer):
        for builder, part, ids in encoded_chunk:
            builder.add(part, ids, limits)
        # what is read and not added by now is thrown away
        if all(builder.has(enough.get(split)) for split, builder in builders.items()):
            is_all = False
            break
    return {split: builder.examples(task, margins) for split, builder in builders.items()}, is_all


def _render_rows(rows, builders, tokenizer, task, skip_bad_rows=False, chat=False, system=None, last_turn_only=False):
    """Yield (builder, texts, part) for each example to be: its _Builder, its texts, marked for ids.py, and its Part.

    texts: the prompt and the answers, or the segments of a conversation (turns.py). Rows that cannot be used are counted in
    the builder's left_out. Raises UserError for one that the chat template refuses, unless skip_bad_rows."""
    seen_uids = set()
    has_template = tokenizer.chat_template not in (None, PLAIN_CHAT)
    for row in rows:
        # the second of two builders is for testing; if there is one, it is the first and the last
        builder = builders[-1] if getattr(row, 'held_out', False) else builders[0]
        left_out = builder.left_out
        example = as_chats(row, system) if chat or system else row
        parts = as_parts(example, task, left_out, last_turn_only)
        if not parts:
            continue
        # of several rows with the same prompt and first answer, these tasks take one
        if task in ('sft', 'prompts') and parts[0].uid in seen_uids:
            left_out['same prompt again' if task == 'prompts' else 'same demonstration again'] += 1
            continue
        rendered = []
        try:
            for part in parts:
                rendered += _texts_of(part, row.get('tools'), tokenizer, left_out)
        except Refused as error:
            _skip_or_raise(error, row, skip_bad_rows, left_out)
            continue
        # not before, since a row that is refused gives no example
        seen_uids.update(part.uid for part in parts)
        # perhaps --chat was forgotten
        if has_template and _is_text_without_turns(parts[0]):
            left_out[NO_CHAT] += 1
        left_out['empty answers'] += sum(texts is None for texts, _ in rendered)
        yield from ((builder, texts, part) for texts, part in rendered if texts is not None)


def _is_text_without_turns(part):
    """Whether a Part is a prompt and answer in plain words, to which a chat template could be applied."""
    prompt, answer = part.prompt, part.answers[0]
    if not prompt or not isinstance(prompt, str) or not isinstance(answer, str):
        return False
    return not prompt.endswith(TURN_MARKERS)


def _texts_of(part, tools, tokenizer, left_out):
    """Return (texts, Part) for each example that a Part becomes. texts: marked, or None if the answer is empty. Raises Refused.

    A conversation becomes one example, whose texts are its segments (turns.py). If the chat template cannot write that, each
    trained answer becomes an example, behind all messages before it."""
    conversation = part.conversation or []
    single = part._replace(conversation=None)
    trained = [i for i, turn in enumerate(conversation) if is_trained(turn)]
    # one answer is written as in sampling, unless the template itself says which tokens of it are trained on
    is_one_sequence = len(trained) > 1 or (trained and turns.marks_answers(tokenizer, tools))
    if not is_one_sequence:
        return [(render(part.prompt, part.answers, tools, tokenizer, left_out), single)]
    segments = turns.segments(conversation, tools, tokenizer, left_out)
    # [] means that all answers are empty, which is counted there; None that the template cannot write it so
    if segments is not None:
        return [(segments, part)] if segments else []
    left_out[turns.APART] += 1
    items = []
    for i in trained:
        before, answer = conversation[:i], conversation[i]
        items.append((render(before, [[answer]], tools, tokenizer, left_out), single))
    return items


def _encoded(items, tokenizer):
    """Yield lists of (builder, Part, ids) for the items of _render_rows, in order. A thread encodes a list meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting = []
        for chunk in _chunks(items):
            waiting.append(pool.submit(_encode_chunk, chunk, tokenizer))
            # one is encoded while the next one is read and rendered
            if len(waiting) == 2:
                yield waiting.pop(0).result()
        yield waiting.pop().result()


def _encode_chunk(chunk, tokenizer):
    """Return [(builder, Part, ids)] of a list of (builder, texts, Part). ids: a list of the token ids of each text."""
    all_texts = [text for _, texts, _ in chunk for text in texts]
    ids = iter(encode_texts(all_texts, tokenizer))
    return [(builder, part, [next(ids) for _ in texts]) for builder, texts, part in chunk]


def _chunks(items):
    """Yield the items of _render_rows in lists, as long as CHUNK and CHARACTERS say. There is one at least; it may be empty."""
    chunk, characters = [], 0
    for item in items:
        _, texts, _ = item
        chunk.append(item)
        # a few long texts fill a chunk, too
        characters += sum(map(len, texts))
        if len(chunk) == CHUNK or characters > CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    yield chunk


class _Builder:
    """Collects tokenised examples in arrays that grow, so that a token takes four bytes; a list of ints takes many more."""

    def __init__(self):
        self.left_out = Counter()
        self.ids = array('i')
        self.widths = array('q')  # tokens of each prompt and each answer
        self.good = array('b')
        self.uid = array('Q')
        self.margins = array('f')  # NaN: the example has none

    def has(self, count):
        """Whether there are so many examples. count None means all that there will be, which is never reached."""
        return count is not None and len(self.uid) >= count

    def add(self, part, ids, limits):
        """Add an example, cut to the limits, or count in left_out why nothing of it is left to train on.

        ids: those of the prompt and of each answer of the Part, or of each segment of its conversation."""
        prompt, *answers = ids
        if part.conversation:
            prompt, answer = fit_conversation(prompt, answers, limits, self.left_out)
            # no answer has room, which fit_conversation has counted
            if not answer:
                return
            answers = [answer]
        else:
            if any(answer in ([], [limits.eos]) for answer in answers):
                self.left_out['empty answers'] += 1
                return
            prompt, answers = fit(prompt, answers, limits, self.left_out)
        # cut, two answers may be the same
        if len(answers) == 2 and answers[0] == answers[1]:
            self.left_out['pairs with equal answers'] += 1
            return
        # spans are made of the widths at the end
        for piece in (prompt, *answers):
            self.ids.extend(piece)
            self.widths.append(len(piece))
        self.good.append(part.good)
        self.uid.append(part.uid)
        self.margins.append(math.nan if part.margin is None else part.margin)

    def examples(self, task, keep_margins):
        """Return all that was added as Examples. Margins are kept only if any example has one; the others get 0, counted."""
        margin = np.asarray(self.margins)
        is_missing = np.isnan(margin)
        if keep_margins and not is_missing.all():
            self.left_out['pairs without a margin, taken as 0'] += int(is_missing.sum())
            margin = np.nan_to_num(margin)
        else:
            # whoever has margins is told that they are not used
            self.left_out['margins, which only reward.py uses'] += int((~is_missing).sum())
            margin = None
        # the answers of the data are not trained on here; a Counter deletes a key that it does not have, too
        if task == 'prompts':
            del self.left_out[THOUGHTLESS]
        spans = spans_of(self.widths, parts=3 if task == 'pairs' else 2)
        good, uid = np.array(self.good, bool), np.asarray(self.uid)
        return Examples(np.asarray(self.ids), spans, good, uid, +self.left_out, margin=margin)


def _skip_or_raise(error, row, skip_bad_rows, left_out):
    """Count a row that the chat template refuses in left_out. Unless such rows are to be skipped, raise UserError instead."""
    if skip_bad_rows:
        left_out[f'bad rows: {error}'] += 1
        return
    where = getattr(row, 'where', '')
    if where:
        advice = f'mend it, or leave such rows out with --skip_bad_rows ({HELP})'
        raise UserError(f'{where}: {error}; {advice}') from None
    raise UserError(str(error)) from None


def encode(prompt, answer, tokenizer, max_length, max_prompt_length, truncation, left_out):
    """Return (prompt ids, answer ids) of one prompt and answer, texts or chats, as tokenise makes them. Raises UserError.

    An empty answer is allowed here: its ids are the end of text alone."""
    try:
        # blank: without it, an empty answer would give no texts
        texts = render(prompt, [answer], None, tokenizer, left_out, blank=True)
    except Refused as error:
        raise UserError(str(error)) from None
    prompt_ids, answer_ids = encode_texts(texts, tokenizer)
    limits = Limits.of(tokenizer, max_length, max_prompt_length, truncation)
    prompt_ids, (answer_ids,) = fit(prompt_ids, [answer_ids], limits, left_out)
    return prompt_ids, answer_ids


def tokenise_prompts(prompts, tokenizer, longest, truncation, left_out, skip_bad_rows=False):
    """Return a list with the ids of each prompt, as in training. One of more than `longest` tokens is cut and counted.

    prompts: texts, chats, or rows with 'prompt' and perhaps 'tools'. skip_bad_rows: a prompt that the chat template refuses
    gives None, and is counted; otherwise it raises UserError."""
    limits = Limits.of(tokenizer, longest, longest, truncation)
    texts = []  # None for a prompt that is refused
    for prompt in prompts:
        row = prompt if isinstance(prompt, dict) else {'prompt': prompt}
        try:
            texts += render(row['prompt'], [], row.get('tools'), tokenizer, left_out)
        except Refused as error:
            _skip_or_raise(error, row, skip_bad_rows, left_out)
            texts.append(None)
    # all texts are encoded in one call
    ids = iter(encode_texts([text for text in texts if text is not None], tokenizer))
    return [None if text is None else cut(begin(next(ids), limits), limits, left_out) for text in texts]


# ---- what a task takes of a row ----


def as_parts(row, task, left_out, last_turn_only=False):
    """Return the Parts of a row for a task: one, or two single answers of a pair. [] for a row of no use, which is counted."""
    prompt = row['prompt']
    answers = _answers(row, task, left_out)
    if answers is None:
        return []
    # tools count only if there are any, so that other examples keep the hash that they always had
    tools = [row['tools']] if row.get('tools') else []
    uid = content_hash(prompt, answers, *tools)
    if any(map(is_empty, answers)):
        left_out['empty answers'] += 1
        return []
    if len(answers) == 1:
        # sft trains on all answers of a conversation; other tasks, or last_turn_only, on its last one
        conversation = row.get('turns') if task == 'sft' and not last_turn_only else None
        return [Part(prompt, answers, row.get('good', True), uid, conversation=conversation)]

    chosen, rejected = answers
    if chosen == rejected:
        left_out['pairs with equal answers'] += 1
        return []
    if task == 'pairs':
        return [Part(prompt, answers, True, uid, row.get('margin'))]
    # a pair for KTO is one good and one bad answer
    return [Part(prompt, [chosen], True, uid), Part(prompt, [rejected], False, uid)]


def _answers(row, task, left_out):
    """Return the list of a row's answers that a task uses: one or two. None if the row has none for it, which is counted."""
    answer = row.get('chosen', row.get('response'))
    if task == 'prompts':
        # a template may need an answer to write the prompt: if there is none, anything will do
        if answer is None or is_empty(answer):
            answer = '.' if isinstance(row['prompt'], str) else said('.')
        return [answer]
    # sft takes the chosen answer of a pair, as a demonstration
    if 'chosen' in row and task != 'sft':
        return [row['chosen'], row['rejected']]
    if task == 'sft' and not row.get('good', True):
        left_out['bad answers, which are no demonstrations'] += 1
        return None
    has_label = 'good' in row
    if answer is not None and (task == 'sft' or (task == 'singles' and has_label)):
        return [answer]
    have = 'a prompt and a response' if 'response' in row else 'a prompt'
    left_out[f'rows with {have} only, where {task} needs {NEEDS[task]}'] += 1
    return None


# ---- the cache on disk ----


def _tokenizer_stamp(tokenizer):
    """Return (model, chat template, end of text), which decide the ids of a tokenizer; json-able."""
    # a slow tokenizer has no text that holds all of it
    model = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.get_vocab())
    # a run sets PLAIN_CHAT if there was no template: both write the same
    template = tokenizer.chat_template if tokenizer.chat_template != PLAIN_CHAT else None
    return model, template, tokenizer.eos_token_id


def _cache_file(key, split, enough):
    """Return the path of the cache file of a split. key: json-able. enough: {} if the file has all examples."""
    text = json.dumps([key, split, enough])
    return cache.path_of('tokens', hashlib.sha256(text.encode()).hexdigest())


def _read_cache(files):
    """Return the Examples in the first of these cache files that is there and whole, or None. A note names a damaged one."""

    def is_whole(arrays, metadata):
        left_out, digest = json.loads(metadata['left_out'])
        return digest == _digest(arrays, left_out)

    for file in files:
        found = cache.read(file, is_whole)
        if found:
            arrays, metadata = found
            left_out, _ = json.loads(metadata['left_out'])
            return Examples(**arrays, left_out=Counter(left_out))
        if file.exists():
            say(f'note: {file} is damaged: tokenising anew')
    return None


def _write_cache(file, examples):
    """Write Examples to a cache file. If that fails, a note says so, and nothing else."""
    # safetensors takes arrays whose bytes lie in order, and no None
    arrays = {name: getattr(examples, name) for name in CACHED}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    left_out = [examples.left_out, _digest(arrays, examples.left_out)]
    failure = cache.write(file, arrays, {'left_out': json.dumps(left_out)})
    if failure:
        say(f'note: tokens are not cached: {failure}')


def _digest(arrays, left_out):
    """Return a hash of what a cache file holds, kept in it: a changed bit on the disk would train on other tokens."""
    digest = hashlib.sha256(json.dumps(left_out).encode())
    for name in CACHED:
        # a mark stands for an array that is not there
        content = np.ascontiguousarray(arrays[name]) if name in arrays else b'-'
        digest.update(content)
    return digest.hexdigest()
