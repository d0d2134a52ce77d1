"""Turn rows of text into tokenised Examples, cached on disk. Training scripts call load_examples.

A raw row becomes an example (a Row), then Parts, then texts, then token ids, then an item of Examples:
sources.read_examples -> as_parts -> chat.render or turns.segments -> encode_texts -> Builder.add, fit.
No token spans the border of prompt and answer. Every answer ends with EOS, even if truncated."""

import math
import os
import re
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError
from runtime import cache
from runtime.files import file_hash, say, say_once
from runtime.log import progress
from text import sources, turns
from text.chat import MARK, NO_TEMPLATE, PLAIN_CHAT, THOUGHTLESS, UNMARK, Refused, puts_space, render
from text.examples import Examples, bos_of, spans_of, uniform_hash
from text.files import content_hash
from text.formats import TURN_MARKERS
from text.messages import as_chats, is_empty, is_trained, said
from text.readers import HELP

NO_CHAT = 'note: texts beside a chat template, which --chat would apply'
ENOUGH = 20_000  # training.py tokenises only the first ENOUGH examples if a run uses at most a tenth of them
# a chunk for the tokenizer is full at this number of examples or above this number of characters
CHUNK, CHARACTERS = 512, 2**22
NEEDS = {  # task -> what a row needs besides its prompt
    'pairs': 'chosen and rejected',
    'singles': 'a response and whether it is good (label), or chosen and rejected',
    'sft': 'an answer',
}


class Part(NamedTuple):
    """One untokenised example; prompt and answers are texts or chats."""

    prompt: str | list
    answers: list  # [chosen, rejected] for a pair, else [answer]
    good: bool
    uid: int  # hash of the text; both single answers made from one pair share it
    margin: float | None = None
    conversation: list | None = None  # all messages, if SFT trains on every answer of a conversation


class Limits(NamedTuple):
    """The BOS and EOS of a tokenizer, and how to truncate."""

    bos: int | None  # None if the tokenizer adds none
    eos: int
    max_length: int  # tokens of prompt plus answer
    max_prompt_length: int  # tokens of the prompt if the example exceeds max_length
    truncation: str  # which end of the prompt to cut: 'start' or 'end'

    @classmethod
    def of(cls, tokenizer, *lengths):
        """Make the Limits of a tokenizer. lengths: max_length, max_prompt_length, truncation."""
        return cls(bos_of(tokenizer), tokenizer.eos_token_id, *lengths)


def load_examples(data, split, tokenizer, task, *, max_length, max_prompt_length, truncation='start', undivided=False,
                  num_turns=1, skip_bad_rows=False, columns=None, chat=False, system=None, last_turn_only=False,
                  data_fraction=1.0, seed=0, cache=True, margins=False, enough=None):  # fmt: skip
    """Return the tokenised Examples of a split ('train' or 'test') of data such as 'hh+shp', a hub id or a file.

    task: 'pairs', 'singles' (KTO; a pair makes two), 'sft' or 'prompts'. max_length, max_prompt_length: in tokens; long
    examples lose the start ('end': the end) of the prompt, then the ends of the answers. undivided, num_turns,
    skip_bad_rows, columns: for sources.read_examples. chat: turn texts into chats. system: system message to prepend.
    last_turn_only: SFT trains on a conversation's last answer only. data_fraction: fraction to keep, by a text hash.
    margins: keep the pairs' margins. enough: {'train': count, 'test': count}, to stop there; None: read all.
    Sets tokenizer.chat_template to PLAIN_CHAT if chats need one and it has none. Raises UserError."""
    limits = Limits.of(tokenizer, max_length, max_prompt_length, truncation)
    read_args = {'undivided': undivided, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    render_args = {'skip_bad_rows': skip_bad_rows, 'chat': chat, 'system': system, 'last_turn_only': last_turn_only}
    names = sources.joined(data)
    enough = {name: count for name, count in (enough or {}).items() if count is not None}
    # sources without a fingerprint, which stands for all their rows, are hashed row by row
    hashes = [sources.fingerprint(source) for source in names]
    is_fingerprinted = None not in hashes
    if not is_fingerprinted:
        hashes = [content_hash(row) for row in _read_sources(names, split, task, read_args, Counter())]
    # the cache key has all that the tokens depend on
    key = content_hash(hashes, names, task, read_args, limits, render_args, margins, *_code_and_tokenizer(tokenizer))
    examples = _read_cache(key, split, enough) if cache else None
    if examples is None:
        # tokenise and cache both splits in one pass, if test is a part of the train rows and the key stands for all rows
        can_cache_both = cache and is_fingerprinted and split == 'train' and not undivided
        both = can_cache_both and all(map(sources.divides, names))
        splits = ['train', 'test'] if both else [split]
        left_out = Counter()
        rows = _read_sources(names, split, task, read_args, left_out, both=both)
        tokenised, is_complete = tokenise_splits(rows, splits, tokenizer, task, limits, enough, margins, **render_args)
        rows.close()  # ends its progress bar
        for name, its_examples in tokenised.items():
            its_examples.left_out.update(left_out)
            if cache:
                _write_cache(key, name, {} if is_complete else enough, its_examples)
        examples = tokenised[split]
    # a cache file may have more examples than are wanted now
    examples = examples.select(slice(enough.get(split)))
    # an evaluation takes the first examples: mix those of several sources, by a hash
    if split == 'test' and len(names) > 1:
        examples = examples.select(uniform_hash(examples.uid, 0).argsort(kind='stable'))
    # the tokenizer that is saved with the model must format chats as in training
    if NO_TEMPLATE in examples.left_out:
        tokenizer.chat_template = PLAIN_CHAT
    # seed + 2: Examples.flip hashes with seed, and would flip exactly the pairs that are kept
    if data_fraction < 1 and len(examples):
        examples = examples.drawn(uniform_hash(examples.uid, seed + 2) < data_fraction, 'data_fraction')
    if not len(examples) and split == 'train':
        raise sources.nothing_left(data, split, examples.left_out)
    return examples


def _code_and_tokenizer(tokenizer):
    """Return hashes of all files in text/, which somebody may have changed, and the tokenizer's vocabulary and template."""
    code = [file_hash(path) for path in sorted(Path(__file__).parent.glob('*.py'))]
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.get_vocab())
    # load_examples sets PLAIN_CHAT where there was no template: same tokens, so the same key
    template = tokenizer.chat_template if tokenizer.chat_template != PLAIN_CHAT else None
    return code, vocabulary, template


def _read_sources(names, split, task, read_args, left_out, both=False):
    """Yield the untokenised examples (Rows) of all sources. Raises UserError if a source has none that is usable.

    read_args: of sources.read_examples. both: yield training rows and those held out for testing. left_out: Counter of skipped rows."""
    with progress(None, ' examples', 'reading') as bar:
        for source in names:
            left_out_before = left_out.copy()
            unusable = Counter()  # why the rows before the first usable one are not
            is_usable = False
            for row in sources.read_examples(source, split, left_out, task=task, both=both, **read_args):
                if not is_usable and not row.held_out:
                    is_usable = bool(as_parts(row, task, unusable))
                bar.update()
                yield row
            # a part that is held out may have no usable row; undivided: nothing is held out
            if not is_usable and (split == 'train' or read_args['undivided']):
                raise sources.nothing_left(source, split, left_out - left_out_before + unusable)


def source_rows(examples, data, split, task, *, chat, system, **read_args):
    """Return {uid: (prompt, raw row with all columns)} of Examples that load_examples made with these arguments."""
    # read the data again: Examples have only tokens, and the reward functions of ppo.py may want other columns
    wanted = set(examples.uid.tolist())
    found = {}
    not_counted = Counter()  # what is left out was counted the first time
    for row in _read_sources(sources.joined(data), split, task, read_args, not_counted):
        example = as_chats(row, system) if chat or system else row
        # a pair is one part, or two for a task of single answers
        for part in as_parts(example, task, not_counted):
            # setdefault: the first of several equal rows counts
            if part.uid in wanted:
                found.setdefault(part.uid, (part.prompt, row.raw))
        if len(found) == len(wanted):
            break
    return found


# ---- from a row to an item of Examples ----


def tokenise(rows, tokenizer, task, lengths, left_out, margins=False, **render_args):
    """Return the Examples of rows of text or chat. lengths: (max_length, max_prompt_length, truncation). left_out: Counter of reasons
    for skipped rows. margins: keep the pairs' margins, 0 if missing. render_args: skip_bad_rows, chat, system, last_turn_only."""
    limits = Limits.of(tokenizer, *lengths)
    tokenised, _ = tokenise_splits(rows, ['train'], tokenizer, task, limits, {}, margins, **render_args)
    examples = tokenised['train']
    left_out.update(examples.left_out)
    return examples


def tokenise_splits(rows, splits, tokenizer, task, limits, enough, margins, **render_args):
    """Tokenise rows; return ({split: Examples}, whether all rows were read).

    splits: one, or ['train', 'test']: then the second gets the rows whose .held_out is true. enough: {split: count}, to stop
    when every split has so many examples; if one has no count, all rows are read. margins: keep those of pairs."""
    builders = {split: Builder(limits) for split in splits}
    rendered = _render_rows(rows, list(builders.values()), tokenizer, task, **render_args)
    is_complete = True
    for encoded_chunk in _encode_in_chunks(rendered, tokenizer):
        for builder, ids, part in encoded_chunk:
            builder.add(part, ids)
        if all(len(builders[split].uid) >= enough.get(split, math.inf) for split in splits):
            is_complete = False
            if 'train' in splits:
                say(f'note: the first {enough["train"]:,} training examples are enough: the others are not read')
            break
    return {split: builder.examples(task, margins) for split, builder in builders.items()}, is_complete


def _render_rows(rows, builders, tokenizer, task, skip_bad_rows=False, chat=False, system=None, last_turn_only=False):
    """Write chats by the chat template, leave texts as they are; yield (builder, texts, Part) for each example. Raises UserError.

    texts: [prompt, *answers], or a conversation's segments. skip_bad_rows: count rows that the template rejects, do not raise."""
    seen_uids = set()
    has_template = tokenizer.chat_template not in (None, PLAIN_CHAT)
    for row in rows:
        # the builder of the row's split: of two, the second is for the test split; a plain dict has no .held_out
        builder = builders[-1] if getattr(row, 'held_out', False) else builders[0]
        left_out = builder.left_out
        example = as_chats(row, system) if chat or system else row
        parts = as_parts(example, task, left_out, last_turn_only)
        if not parts:
            continue
        if task in ('sft', 'prompts') and parts[0].uid in seen_uids:
            left_out['same prompt again' if task == 'prompts' else 'same demonstration again'] += 1
            continue
        rendered = []  # of all parts: (texts, Part), where texts is None if the answer is empty
        try:
            for part in parts:
                rendered += _render_part(part, row.get('tools'), tokenizer, left_out)
        except Refused as error:
            _skip_or_raise(error, row, skip_bad_rows, left_out)
            continue
        # only now, since a rejected row yields no example
        seen_uids.update(part.uid for part in parts)
        # texts without turn markers beside a chat template: the user may have forgotten --chat
        prompt, answers, *_ = parts[0]
        may_need_chat = has_template and isinstance(prompt, str) and isinstance(answers[0], str) and prompt != ''
        left_out[NO_CHAT] += may_need_chat and not prompt.endswith(TURN_MARKERS)
        left_out['empty answers'] += sum(texts is None for texts, _ in rendered)
        yield from ((builder, texts, part) for texts, part in rendered if texts is not None)


def as_parts(row, task, left_out, last_turn_only=False):
    """Return the Parts that a task makes from a row: one, two (a pair for KTO), or none (the reason is counted).

    row: an example as in sources.py, such as {'prompt', 'chosen', 'rejected'}; row['turns']: all messages of a conversation."""
    prompt = row['prompt']
    answers = _answers_for(row, task, left_out)
    if not answers:
        return []
    if any(map(is_empty, answers)):
        left_out['empty answers'] += 1
        return []
    # tools only if there are any: rows without them keep the hash that they had before tools were supported
    tools = [row['tools']] if row.get('tools') else []
    uid = content_hash(prompt, answers, *tools)
    if len(answers) == 1:
        conversation = row.get('turns') if task == 'sft' and not last_turn_only else None
        # one message after a chat is a conversation, too, for templates that mark which tokens are trained
        are_chats = isinstance(prompt, list) and isinstance(answers[0], list)
        is_turn = are_chats and len(answers[0]) == 1 and prompt and prompt[-1]['role'] != 'assistant'
        if task == 'sft' and not conversation and is_turn:
            conversation = [*(turn | {'weight': 0} for turn in prompt), *answers[0]]
        return [Part(prompt, answers, row.get('good', True), uid, conversation=conversation)]
    chosen, rejected = answers
    if chosen == rejected:
        left_out['pairs with equal answers'] += 1
        return []
    if task == 'pairs':
        return [Part(prompt, answers, good=True, uid=uid, margin=row.get('margin'))]
    return [Part(prompt, [chosen], good=True, uid=uid), Part(prompt, [rejected], good=False, uid=uid)]


def _answers_for(row, task, left_out):
    """Return the answers that a task takes from a row: one, two (chosen and rejected), or none (the reason is counted)."""
    answer = row.get('chosen', row.get('response'))
    if task == 'prompts':
        # a placeholder, since some chat templates cannot render a prompt without an answer
        if answer is None or is_empty(answer):
            answer = '.' if isinstance(row['prompt'], str) else said('.')
        return [answer]
    if 'chosen' in row and task != 'sft':
        return [row['chosen'], row['rejected']]
    if task == 'sft' and not row.get('good', True):
        left_out['bad answers, which are no demonstrations'] += 1
        return []
    # SFT takes any good answer (of a pair: the chosen one), KTO an answer with a label
    is_taken = task == 'sft' or (task == 'singles' and 'good' in row)
    if is_taken and answer is not None:
        return [answer]
    have = 'a prompt and a response' if 'response' in row else 'a prompt'
    advice = ': --loss=kto takes labelled answers' if task == 'pairs' and 'good' in row else ''
    left_out[f'rows with {have} only, where {task} needs {NEEDS[task]}{advice}'] += 1
    return []


def _render_part(part, tools, tokenizer, left_out):
    """Return [(texts, Part)], one per example: chats by the template, texts only marked; None for an empty answer.

    texts: the segments if the Part has a conversation, else [prompt, *answers]. Raises Refused."""
    conversation = part.conversation or []
    trained = [i for i, turn in enumerate(conversation) if is_trained(turn)]
    plain = part._replace(conversation=None)  # for texts that are not segments
    if len(trained) > 1:
        segments = turns.segments(conversation, tools, tokenizer, left_out)
        if segments is not None:
            # []: all answers are empty (already counted)
            return [(segments, part)] if segments else []
        # the template cannot write the conversation as one text: an example per answer, behind all earlier messages
        left_out[turns.APART] += 1
        apart = [render(conversation[:i], [[conversation[i]]], tools, tokenizer, left_out) for i in trained]
        return [(texts, plain) for texts in apart]
    # a single answer is written as in sampling, unless the template marks which tokens are trained
    if trained and turns.marks_answers(tokenizer, tools):
        counts = Counter()
        segments = turns.segments(conversation, tools, tokenizer, counts)
        if segments is not None:
            left_out.update(counts)
            return [(segments, part)] if segments else []
    # the counts of segments that are None are dropped: render counts the same
    return [(render(part.prompt, part.answers, tools, tokenizer, left_out), plain)]


def _skip_or_raise(error, row, skip_bad_rows, left_out):
    """Count a row that the chat template rejected (skip_bad_rows), or raise UserError. Called while the error is handled."""
    if skip_bad_rows:
        left_out[f'bad rows: {error}'] += 1
        return
    # only a Row, not a plain dict, knows its file and line
    where = getattr(row, 'where', '')
    advice = f'mend it, or leave such rows out with --skip_bad_rows ({HELP})'
    raise UserError(f'{where}: {error}; {advice}' if where else str(error)) from None


def _encode_in_chunks(items, tokenizer):
    """Encode items (builder, texts, Part); yield lists of (builder, ids of each text, Part), in order."""

    def encode_chunk(chunk):
        all_texts = []
        before = []  # of each text: the one that it continues, '' for a beginning
        for _, texts, part in chunk:
            all_texts += texts
            last = ''
            for number, text in enumerate(texts):
                before.append(last)
                # answers continue their prompt (number 0), a segment of a conversation the last one that is not empty
                if number == 0 or part.conversation:
                    last = text or last
        ids = iter(encode_texts(all_texts, tokenizer, before))
        return [(builder, [next(ids) for _ in texts], part) for builder, texts, part in chunk]

    # a thread encodes a chunk while the next one is read and rendered here
    with ThreadPoolExecutor(1) as pool:
        futures = []  # of the chunks that are not yielded yet: the one that the thread encodes, and perhaps the next
        chunk, characters = [], 0
        for builder, texts, part in items:
            chunk.append((builder, texts, part))
            characters += sum(map(len, texts))
            if len(chunk) == CHUNK or characters > CHARACTERS:
                futures.append(pool.submit(encode_chunk, chunk))
                chunk, characters = [], 0
            if len(futures) > 1:
                yield futures.pop(0).result()
        yield from (future.result() for future in futures)
        yield encode_chunk(chunk)  # the rest


class Builder:
    """Collects tokenised examples in typed arrays, which take 4 bytes per token instead of a list's 36."""

    def __init__(self, limits):
        self.limits = limits  # the Limits that examples are truncated to
        self.left_out = Counter()  # reason -> examples left out or changed
        self.ids = array('i')
        self.widths = array('q')  # tokens of each prompt and each answer
        self.good = array('b')  # this and the next two: a value for each example
        self.uid = array('Q')
        self.margins = array('f')  # NaN: no margin

    def add(self, part, ids):
        """Truncate and add an example, or count why it is unusable. ids: [prompt ids, answer or segment ids, ...]."""
        prompt, *answers = ids
        if part.conversation:
            prompt, answers = fit_conversation(prompt, answers, self.limits, self.left_out)
            # no answer fits (already counted)
            if not answers:
                return
        else:
            if any(answer in ([], [self.limits.eos]) for answer in answers):
                self.left_out['empty answers'] += 1
                return
            prompt, answers = fit(prompt, answers, self.limits, self.left_out)
        # truncation can make two answers equal
        if len(answers) == 2 and answers[0] == answers[1]:
            self.left_out['pairs with equal answers'] += 1
            return
        for piece in (prompt, *answers):
            self.ids.extend(piece)
            self.widths.append(len(piece))
        self.good.append(part.good)
        self.uid.append(part.uid)
        self.margins.append(math.nan if part.margin is None else part.margin)

    def examples(self, task, keep_margins):
        """Return everything added as Examples. keep_margins: keep margins if there are any; missing ones become 0."""
        margin = np.asarray(self.margins)
        is_missing = np.isnan(margin)
        if keep_margins and not is_missing.all():
            self.left_out['pairs without a margin, taken as 0'] += int(is_missing.sum())
            margin = np.nan_to_num(margin)
        else:
            self.left_out['margins, which only reward.py uses'] += int((~is_missing).sum())
            margin = None
        # it counts answers, and those of 'prompts' are placeholders; a Counter ignores del of a missing key
        if task == 'prompts':
            del self.left_out[THOUGHTLESS]
        # an example has the widths of prompt, chosen and rejected, or of prompt and answer
        spans = spans_of(self.widths, parts=3 if task == 'pairs' else 2)
        ids = np.asarray(self.ids)
        good = np.array(self.good, bool)
        uid = np.asarray(self.uid)
        return Examples(ids, spans, good, uid, left_out=+self.left_out, margin=margin)  # unary + drops zero counts


# ---- token ids, BOS, EOS and lengths ----


def encode_texts(texts, tokenizer, before=None):
    """Return the token ids of each text, without BOS and EOS; what stands between marks is encoded as ordinary text.

    before: the texts that they continue ('': none): a tokenizer that puts a space before every text must not put one there."""
    if before is None or not puts_space(tokenizer):
        return _encode_all(texts, tokenizer)
    # a text's ids are those of the whole (the text before it, and the text) without those of the text before it
    wholes = [start + text for start, text in zip(before, texts, strict=True)]
    different = list(dict.fromkeys([*before, *wholes]))
    ids_of = dict(zip(different, _encode_all(different, tokenizer), strict=True))
    all_ids = []
    for start, text, whole in zip(before, texts, wholes, strict=True):
        whole_ids, start_ids = ids_of[whole], ids_of[start]
        if whole_ids[: len(start_ids)] == start_ids:
            all_ids.append(whole_ids[len(start_ids) :])
        # a token of the whole goes over the border, and a prompt must be the same without an answer
        else:
            all_ids.append(_encode_marked(text, tokenizer, at_start=False))
    return all_ids


def _encode_all(texts, tokenizer):
    """Return the token ids of each text by itself; see encode_texts()."""
    unmarked = [text for text in texts if MARK not in text]
    ids_of_unmarked = []
    if unmarked and tokenizer.is_fast:
        # this call turns off truncation and padding, which the faster encode_batch_fast would apply
        tokenizer(unmarked[0], add_special_tokens=False)
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(unmarked, add_special_tokens=False)
        ids_of_unmarked = [encoding.ids for encoding in encodings]
    elif unmarked:
        ids_of_unmarked = tokenizer(unmarked, add_special_tokens=False)['input_ids']
    next_ids = iter(ids_of_unmarked)
    return [_encode_marked(text, tokenizer) if MARK in text else next(next_ids) for text in texts]


def _encode_marked(text, tokenizer, at_start=True):
    """Return the ids of a text; its special tokens between marks are encoded as text. at_start: see _encode_piece()."""
    # re.split puts the marked pieces at odd positions
    pieces = re.split(f'{MARK}([^{MARK}{UNMARK}]*){UNMARK}', text)
    ids = []
    for i, piece in enumerate(pieces):
        # remove unpaired marks, whose counterpart the chat template has cut off
        piece = piece.replace(MARK, '').replace(UNMARK, '')
        as_text = i % 2 == 1
        piece_ids = _encode_piece(piece, tokenizer, as_text, at_start=at_start and i == 0)
        # Unigram may have the special token in its vocabulary, too: split it after the first letter
        if as_text and tokenizer.convert_tokens_to_ids(piece) in piece_ids:
            piece_ids = _encode_piece(piece[:1], tokenizer, as_text) + _encode_piece(piece[1:], tokenizer, as_text)
        ids += piece_ids
    return ids


def _encode_piece(text, tokenizer, as_text, at_start=False):
    """Return the ids of a piece of a text. as_text: also encode special and other added tokens as ordinary text. at_start:
    allow the space that some tokenizers add at the start of a text."""
    if not at_start:
        # encode the piece after a newline, then remove the newline's ids, unless the tokenizer merged it with the text
        newline = _encode_piece('\n', tokenizer, as_text, at_start=True)
        ids = _encode_piece('\n' + text, tokenizer, as_text, at_start=True)
        if ids[: len(newline)] == newline:
            return ids[len(newline) :]
    if not text:
        return []
    if not as_text:
        return tokenizer(text, add_special_tokens=False)['input_ids']
    if not tokenizer.is_fast:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    # the steps of the Rust tokenizer, without its search for added tokens
    inner = tokenizer.backend_tokenizer
    if inner.normalizer is not None:
        text = inner.normalizer.normalize_str(text)
    words = [text]
    if inner.pre_tokenizer is not None:
        words = [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in inner.model.tokenize(word)]


def fit(prompt, answers, limits, left_out):
    """Return (prompt, answers), lists of ids, with BOS and EOS and truncated to the Limits (counted in left_out)."""
    eos = limits.eos
    prompt = add_bos(prompt, limits)
    # the chat template may have written EOS already
    answers = [answer if answer[-1:] == [eos] else [*answer, eos] for answer in answers]
    longest_answer = max(map(len, answers))
    if len(prompt) + longest_answer <= limits.max_length:
        return prompt, answers
    prompt = truncate_prompt(prompt, limits, left_out)
    room = limits.max_length - len(prompt)  # positive: runtime/values.py refuses lengths that leave none
    for i, answer in enumerate(answers):
        if len(answer) > room:
            left_out['answers cut'] += 1
            answers[i] = [*answer[: room - 1], eos]
    return prompt, answers


def fit_conversation(prompt, segments, limits, left_out):
    """Return (prompt, [answer]), the ids of a conversation truncated to the Limits; (prompt, []) if no trained token fits.

    segments: lists of ids, in turn trained (assistant) and not (user). answer: all of them joined, with untrained tokens as ~id."""
    eos = limits.eos
    prompt = add_bos(prompt, limits)
    answer = []
    for i, segment in enumerate(segments):
        is_answer = i % 2 == 0
        answer += segment if is_answer else [~token for token in segment]
    # close with EOS, unless it is there: some templates write a newline after it, so look at the last two tokens
    if eos not in answer[-2:]:
        answer.append(eos)
    if len(prompt) + len(answer) > limits.max_length:
        prompt = truncate_prompt(prompt, limits, left_out)
    room = limits.max_length - len(prompt)  # positive: runtime/values.py refuses lengths that leave none
    if len(answer) <= room:
        return prompt, [answer]
    left_out['conversations cut'] += 1
    # drop everything after the last trained token that fits (~id is negative)
    trained = [i for i, token in enumerate(answer[:room]) if token >= 0]
    if not trained:
        left_out['conversations without an answer within max_length'] += 1
        return prompt, []
    answer = answer[: trained[-1] + 1]
    # EOS replaces the last token if there is no room for one more
    if eos not in answer[-2:]:
        answer = [*answer[: room - 1], eos]
    return prompt, [answer]


def add_bos(prompt, limits):
    """Return a prompt's ids with BOS in front, unless it is there already or the tokenizer adds none; never an empty list."""
    if limits.bos is None:
        # [EOS] for an empty prompt: the first token of the answer needs one to be predicted from
        return prompt or [limits.eos]
    # the chat template may have written BOS already
    return prompt if prompt[:1] == [limits.bos] else [limits.bos, *prompt]


def truncate_prompt(prompt, limits, left_out):
    """Return a prompt's ids truncated to max_prompt_length, keeping BOS; left_out counts truncated prompts."""
    excess = len(prompt) - limits.max_prompt_length
    if excess <= 0:
        return prompt
    left_out['prompts cut'] += 1
    if limits.truncation == 'end':
        return prompt[:-excess]
    num_bos = 0 if limits.bos is None else 1
    return prompt[:num_bos] + prompt[num_bos + excess :]


def encode(prompt, answer, tools, tokenizer, lengths, left_out):
    """Return (prompt ids, answer ids) of one prompt and answer, as tokenise() makes them of rows. Raises UserError."""
    try:
        # blank: allow an empty answer, whose ids are EOS alone
        texts = render(prompt, [answer], tools, tokenizer, left_out, blank=True)
    except Refused as error:
        raise UserError(str(error)) from None
    prompt_ids, answer_ids = encode_texts(texts, tokenizer, before=['', texts[0]])
    prompt_ids, (answer_ids,) = fit(prompt_ids, [answer_ids], Limits.of(tokenizer, *lengths), left_out)
    return prompt_ids, answer_ids


def tokenise_prompts(prompts, tokenizer, longest, truncation, left_out, skip_bad_rows=False):
    """Return the ids of each prompt as in training. Those of more than `longest` tokens lose their start ('end' = truncation: their end).

    prompts: texts, chats or rows. UserError for a prompt that the chat template rejects; with skip_bad_rows, None in place of its ids.
    left_out counts both."""
    limits = Limits.of(tokenizer, longest, longest, truncation)  # the prompt may fill the whole length
    texts = []  # of each prompt; None if it is rejected
    for prompt in prompts:
        row = prompt if isinstance(prompt, dict) else {'prompt': prompt}
        try:
            texts += render(row['prompt'], [], row.get('tools'), tokenizer, left_out)  # a list of one text
        except Refused as error:
            _skip_or_raise(error, row, skip_bad_rows, left_out)
            texts.append(None)
    encoded = encode_texts([text for text in texts if text is not None], tokenizer)
    truncated = (truncate_prompt(add_bos(ids, limits), limits, left_out) for ids in encoded)
    return [None if text is None else next(truncated) for text in texts]


def _cache_file(key, split, enough):
    """Return the path of a split's cache file. key: hash of all else. enough: as in load_examples; {} for all examples."""
    return cache.path_of('tokens', f'{content_hash(key, split, enough):016x}')


def _read_cache(key, split, enough):
    """Return the Examples of a split from its cache file, or None. Prints a note about a damaged file."""
    # the file with all examples ({}) serves, too, if fewer are enough
    for counts in [{}, enough] if enough else [{}]:
        file = _cache_file(key, split, counts)
        if found := cache.read(file):
            arrays, left_out = found
            return Examples(**arrays, left_out=Counter(left_out))
        if os.path.exists(file):  # not file.exists(), which raises for a closed folder
            say(f'note: {file} is damaged: tokenising anew')
    return None


def _write_cache(key, split, enough, examples):
    """Write the Examples of a split to its cache file; print a note on failure."""
    columns = {name: getattr(examples, name) for name in 'ids spans good uid margin'.split()}
    # safetensors needs contiguous arrays and no None
    arrays = {name: np.ascontiguousarray(column) for name, column in columns.items() if column is not None}
    if failure := cache.write(_cache_file(key, split, enough), arrays, examples.left_out):
        say_once(f'note: tokens are not cached: {failure}')
