"""From text (sources.py) to token ids: prompt and answers apart, joined as ids, truncated, counted, cached on disk.

Every answer ends with the end of text, cut or not; BOS stands only where the tokenizer itself would put one."""

import hashlib
import json
import math
from array import array
from collections import Counter, deque
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
# examples that --n_examples draws from, where it asks for a tenth of them or fewer
ENOUGH = 20_000
# examples, and characters, that are tokenised together
CHUNK, CHARACTERS = 512, 2**22
NEEDS = {  # task -> what its rows have beside a prompt
    'pairs': 'chosen and rejected',
    'singles': 'a response and whether it is good (label), or chosen and rejected',
    'sft': 'an answer',
}


class Part(NamedTuple):
    """What an example is made of: a prompt and its answers, as text or chat, and what is known of them."""

    prompt: str | list
    answers: list
    good: bool
    uid: int  # a hash of the text
    margin: float | None = None
    conversation: list | None = None  # whose answers are all trained on


def load_examples(data, split, tokenizer, task, *, max_length, max_prompt_length, truncation='start', undivided=False,
                  num_turns=1, skip_bad_rows=False, columns=None, chat=False, system=None, last_turn_only=False,
                  data_fraction=1.0, seed=0, cache=True, margins=False, enough=None):  # fmt: skip
    """Tokenised examples of 'hh', 'hh+shp', 'hh:PATH', 'toy', a hub id, a file or folder; cached on disk by content.

    task: 'pairs', 'singles' (KTO, made from pairs if need be) or 'sft'. max_length, max_prompt_length: tokens; where the
    whole is too long, the prompt loses its start (or end: truncation), then answers are cut before their end of text.
    undivided: a single file is all for this split. chat: texts become chats, behind the message system. last_turn_only: of a
    conversation, sft trains on the last answer alone. margins: keep the margins of pairs. enough: {'train': count, 'test':
    count}, None for all: the first so many are taken, and the rest is not tokenised. Raises UserError."""
    if wrong := no_room(max_length, max_prompt_length):
        raise UserError(wrong)
    reading = {'undivided': undivided, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    writing = {'chat': chat, 'system': system, 'last_turn_only': last_turn_only, 'margins': margins}
    names, enough, lengths = data.split('+'), enough or {}, (max_length, max_prompt_length, truncation)

    # the cache belongs to all that the tokens depend on; of a hub dataset whose commit nobody knows, to its rows
    stamps = [sources.fingerprint(source, split) for source in names]
    known = None not in stamps
    if not known:
        stamps = [content_hash(row) for row in _rows(names, split, task, reading, Counter())]
    key = [8, stamps, names, task, reading, lengths, writing, *_tokenizer_stamp(tokenizer)]
    # a file of all rows, or else of enough of them
    examples = None
    if cache:
        examples = _read_cache(_cache_file(key, split, {})) or _read_cache(_cache_file(key, split, enough))
    if not examples:
        # what is held out of the same rows is tokenised with them
        both = cache and known and split == 'train' and not undivided and all(map(sources.divides, names))
        parts, left_out = ('train', 'test') if both else (split,), Counter()
        rows = _rows(names, split, task, reading, left_out, both)
        found, whole = tokenise_parts(
            rows, parts, tokenizer, task, lengths, enough, skip_bad_rows=skip_bad_rows, **writing
        )
        # how many are held out is an option; that training draws from fewer is not
        if not whole and 'train' in parts:
            say(f'note: the first {enough["train"]:,} training examples are enough: the others are not read')
        # what was left out in reading counts for both
        rows.close()
        for part, made in found.items():
            made.left_out.update(left_out)
            if cache:
                _write_cache(_cache_file(key, part, {} if whole else enough), made)
        examples = found[split]
    examples = examples.select(slice(enough.get(split)))

    # so that the exported tokenizer writes chats as in training
    if NO_TEMPLATE in examples.left_out:
        tokenizer.chat_template = PLAIN_CHAT
    # by another hash than that of flip: else the kept pairs would be the flipped ones
    if data_fraction < 1:
        examples = examples.select(uniform_hash(examples.uid, seed + 2) < data_fraction)
    if not len(examples) and split == 'train':
        raise sources.vanished(data, split, examples.left_out)
    return examples


def _rows(names, split, task, reading, left_out, both=False):
    """The examples of all sources, in order. Raises UserError where one of them gives nothing to train on."""
    with progress(None, ' examples', 'reading') as bar:
        for source in names:
            reasons, unused, used = Counter(), Counter(), False
            try:
                for row in sources.read_examples(source, split, reasons, task=task, both=both, **reading):
                    used = used or (not row.held_out and bool(as_parts(row, task, unused)))
                    bar.update()
                    yield row
            finally:
                left_out.update(reasons)
            # a held-out part may be empty, nothing else
            if not used and (split == 'train' or reading['undivided']):
                raise sources.vanished(source, split, reasons + unused)


def source_rows(examples, data, split, task, *, chat, system, **reading):
    """{uid: (prompt, text or chat; the row as it was read, with all its columns)} of Examples that load_examples has made.

    reading: undivided, num_turns, skip_bad_rows, columns."""
    wanted, found = set(examples.uid.tolist()), {}
    for row in _rows(data.split('+'), split, task, reading, Counter()) if wanted else ():
        shown = as_chats(row, system) if chat or system else row
        for part in as_parts(shown, task, Counter()):
            if part.uid in wanted:
                found.setdefault(part.uid, (part.prompt, row.raw))
        if len(found) == len(wanted):
            break
    return found


# ---- rows to ids ----


def tokenise(rows, tokenizer, task, max_length, max_prompt_length, truncation, left_out, margins=False, **writing):
    """Examples from rows of text or chat; what cannot be used is counted in left_out.

    margins: if any pair has a margin, all get one, 0 where there is none, which is counted. writing: skip_bad_rows (count
    the rows that the chat template refuses, instead of raising UserError); chat, system, last_turn_only of load_examples."""
    lengths = max_length, max_prompt_length, truncation
    found, _ = tokenise_parts(rows, ['train'], tokenizer, task, lengths, {}, margins=margins, **writing)
    left_out.update(found['train'].left_out)
    return found['train'].with_(left_out=+left_out)


def tokenise_parts(rows, parts, tokenizer, task, lengths, enough, margins=False, **writing):
    """({part: Examples}, whether all rows were read): rows are of the last of the parts where they are .held_out.

    enough: {part: count}: where all parts have so many, the rest is not read."""
    made, whole = {part: _Making() for part in parts}, True
    wanted = [(made[part].uid, enough.get(part)) for part in parts]
    limits = Limits.of(tokenizer, *lengths)
    for chunk, ids in _encoded(_render_rows(rows, made, tokenizer, task, **writing), tokenizer):
        for making, texts, part in chunk:
            making.add(part, [next(ids) for _ in texts], limits)
        if all(count is not None and len(found) >= count for found, count in wanted):
            whole = False
            break
    return {part: making.examples(task, margins) for part, making in made.items()}, whole


def _render_rows(rows, made, tokenizer, task, skip_bad_rows=False, chat=False, system=None, last_turn_only=False):
    """(its part's _Making, marked texts of the prompt and the answers, its Part) of all that can be used.

    Of a conversation that trains as a whole, texts are its segments (turns.py)."""
    seen, makings = set(), list(made.values())
    has_template = tokenizer.chat_template not in (None, PLAIN_CHAT)
    for row in rows:
        making = makings[-1] if len(makings) == 2 and row.held_out else makings[0]
        left_out = making.left_out
        row = as_chats(row, system) if chat or system else row
        parts = as_parts(row, task, left_out, last_turn_only)
        try:
            # one demonstration a prompt and answer, however many pairs it is in
            if task in ('sft', 'prompts') and parts and parts[0].uid in seen:
                left_out['same prompt again' if task == 'prompts' else 'same demonstration again'] += 1
                continue
            found = [item for part in parts for item in _texts_of(part, row.get('tools'), tokenizer, left_out)]
        except Refused as error:
            _bad_row(error, row, skip_bad_rows, left_out)
            continue
        seen.update(part.uid for part in parts)
        # texts that show no turns
        if has_template and parts and isinstance(parts[0].prompt, str) and isinstance(parts[0].answers[0], str):
            left_out[NO_CHAT] += bool(parts[0].prompt) and not parts[0].prompt.endswith(TURN_MARKERS)
        left_out['empty answers'] += sum(texts is None for texts, _ in found)
        yield from ((making, texts, part) for texts, part in found if texts is not None)


def _texts_of(part, tools, tokenizer, left_out):
    """[(texts, part)] of a Part: one, or of a conversation that cannot be one sequence, one for each answer."""
    chat, alone = part.conversation or [], part._replace(conversation=None)
    answers = [i for i, turn in enumerate(chat) if is_trained(turn)]
    # one answer is written as in sampling, unless the template marks it
    if len(answers) < 2 and not (answers and turns.marks_answers(tokenizer, tools)):
        return [(render(part.prompt, part.answers, tools, tokenizer, left_out), alone)]
    segments = turns.segments(chat, tools, tokenizer, left_out)
    if segments is not None:
        return [(segments, part)] if segments else []
    left_out[turns.APART] += 1
    return [(render(chat[:i], [chat[i : i + 1]], tools, tokenizer, left_out), alone) for i in answers]


def _encoded(items, tokenizer):
    """(chunk of what _render_rows gives, an iterator over the ids of its texts): the next is read while a thread encodes one."""
    with ThreadPoolExecutor(1) as pool:
        encoding = deque()
        for chunk in _chunks(items):
            texts = [text for _, texts, _ in chunk for text in texts]
            encoding.append((chunk, pool.submit(encode_texts, texts, tokenizer)))
            if len(encoding) == 2:
                before, ids = encoding.popleft()
                yield before, iter(ids.result())
        for before, ids in encoding:
            yield before, iter(ids.result())


def _chunks(items):
    """Lists of items, which end with so many examples or characters."""
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        size += sum(map(len, item[1]))
        if len(chunk) == CHUNK or size > CHARACTERS:
            yield chunk
            chunk, size = [], 0
    yield chunk


class _Making:
    """Examples in the making: arrays that grow, of four bytes a token."""

    def __init__(self):
        self.left_out = Counter()
        self.ids, self.widths, self.good, self.uid = array('i'), array('q'), array('b'), array('Q')
        self.margins = array('f')  # NaN: none

    def add(self, part, ids, limits):
        """Keep an example: its Part, and the ids of its texts, cut to the limits; count it where nothing is left of it."""
        prompt, *answers = ids
        if part.conversation:
            prompt, *answers = fit_conversation(prompt, answers, limits, self.left_out)
        elif any(answer in ([], [limits.eos]) for answer in answers):
            self.left_out['empty answers'] += 1
            return
        else:
            prompt, answers = fit(prompt, answers, limits, self.left_out)
        # texts that differ may be cut to the same tokens
        if len(answers) == 2 and answers[0] == answers[1]:
            self.left_out['pairs with equal answers'] += 1
        elif [] not in answers:
            for piece in (prompt, *answers):
                self.ids.extend(piece)
                self.widths.append(len(piece))
            self.good.append(part.good)
            self.uid.append(part.uid)
            self.margins.append(math.nan if part.margin is None else part.margin)

    def examples(self, task, margins):
        """All of them as Examples. margins: whether to keep these."""
        margin = np.asarray(self.margins)
        missing = np.isnan(margin)
        if margins and not missing.all():
            self.left_out['pairs without a margin, taken as 0'] += int(missing.sum())
            margin = np.nan_to_num(margin)
        else:
            self.left_out['margins, which only reward.py uses'] += int((~missing).sum())
            margin = None
        # the answers behind prompts are not trained on
        if task == 'prompts':
            del self.left_out[THOUGHTLESS]
        spans = spans_of(self.widths, 3 if task == 'pairs' else 2)
        good, uid = np.array(self.good, bool), np.asarray(self.uid)
        return Examples(np.asarray(self.ids), spans, good, uid, +self.left_out, margin=margin)


def _bad_row(error, row, skip_bad_rows, left_out):
    """Count a row that cannot be written as text. Raises UserError unless such rows are to be skipped."""
    if skip_bad_rows:
        left_out[f'bad rows: {error}'] += 1
    elif where := getattr(row, 'where', ''):
        advice = f'mend it, or leave such rows out with --skip_bad_rows ({HELP})'
        raise UserError(f'{where}: {error}; {advice}') from None
    else:
        raise UserError(str(error)) from None


def encode(prompt, answer, tokenizer, max_length, max_prompt_length, truncation, left_out):
    """(prompt ids, answer ids) of one text or chat, as tokenise has them; an empty answer is the end of text alone."""
    try:
        texts = render(prompt, [answer], None, tokenizer, left_out, blank=True)
    except Refused as error:
        raise UserError(str(error)) from None
    prompt, answer = encode_texts(texts, tokenizer)
    limits = Limits.of(tokenizer, max_length, max_prompt_length, truncation)
    prompt, (answer,) = fit(prompt, [answer], limits, left_out)
    return prompt, answer


def tokenise_prompts(prompts, tokenizer, longest, truncation, left_out, skip_bad_rows=False):
    """The ids of prompts as they are in training; one of more than `longest` tokens is cut, and counted.

    prompts: texts, chats, or rows with 'prompt' and perhaps 'tools'. skip_bad_rows: None for one that the chat template
    refuses, which is counted; else UserError."""
    limits, texts = Limits.of(tokenizer, longest, longest, truncation), []
    for row in prompts:
        row = row if isinstance(row, dict) else {'prompt': row}
        try:
            texts += render(row['prompt'], [], row.get('tools'), tokenizer, left_out)
        except Refused as error:
            _bad_row(error, row, skip_bad_rows, left_out)
            texts.append(None)
    ids = iter(encode_texts([text for text in texts if text is not None], tokenizer))
    return [None if text is None else cut(begin(next(ids), limits), limits, left_out) for text in texts]


# ---- what a task takes of a row ----


def as_parts(row, task, left_out, last_turn_only=False):
    """The Parts of a row, as the task needs them; none, counted, where it has no such thing."""
    prompt, answers = row['prompt'], _answers(row, task, left_out)
    if answers is None:
        return []
    tools = [row['tools']] if row.get('tools') else []
    uid = content_hash(prompt, answers, *tools)
    if any(map(is_empty, answers)):
        left_out['empty answers'] += 1
        return []
    if len(answers) == 1:
        # of a conversation, all answers are trained on
        whole = row.get('turns') if task == 'sft' and not last_turn_only else None
        return [Part(prompt, answers, row.get('good', True), uid, conversation=whole)]

    chosen, rejected = answers
    if chosen == rejected:
        left_out['pairs with equal answers'] += 1
        return []
    if task == 'pairs':
        return [Part(prompt, answers, True, uid, row.get('margin'))]
    # a pair for KTO is one good and one bad answer
    return [Part(prompt, [chosen], True, uid), Part(prompt, [rejected], False, uid)]


def _answers(row, task, left_out):
    """The answers of a row that the task uses; None, counted, where it has none for it."""
    answer = row.get('chosen', row.get('response'))
    if task == 'prompts':
        # anything will do: a template may need an answer to write the prompt
        dot = '.' if isinstance(row['prompt'], str) else said('.')
        return [dot if answer is None or is_empty(answer) else answer]
    if task != 'sft' and 'chosen' in row:
        return [row['chosen'], row['rejected']]
    if task == 'sft' and not row.get('good', True):
        left_out['bad answers, which are no demonstrations'] += 1
        return None
    if answer is not None and (task == 'sft' or (task == 'singles' and 'good' in row)):
        return [answer]
    have = 'a prompt and a response' if 'response' in row else 'a prompt'
    left_out[f'rows with {have} only, where {task} needs {NEEDS[task]}'] += 1
    return None


# ---- the cache on disk ----


def _tokenizer_stamp(tokenizer):
    """What decides a tokenizer's ids, json-able. PLAIN_CHAT counts as no template: a run sets it where there was none."""
    model = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.get_vocab())
    template = tokenizer.chat_template if tokenizer.chat_template != PLAIN_CHAT else None
    return model, template, tokenizer.eos_token_id


def _cache_file(key, part, enough):
    """The cache file of a part. key: json-able; enough: {} if it is of all rows."""
    text = json.dumps([key, part, enough])
    return cache.path_of('tokens', hashlib.sha256(text.encode()).hexdigest())


def _read_cache(file):
    """The Examples in a cache file, or None where there is none or it is damaged."""

    def valid(arrays, metadata):
        left_out, digest = json.loads(metadata['left_out'])
        return digest == _digest(arrays, left_out)

    if found := cache.read(file, valid):
        arrays, metadata = found
        return Examples(**arrays, left_out=Counter(json.loads(metadata['left_out'])[0]))
    if file.exists():
        say(f'note: {file} is damaged: tokenising anew')
    return None


def _write_cache(file, examples):
    names = ['ids', 'spans', 'good', 'uid'] + ['margin'] * (examples.margin is not None)
    arrays = {name: np.ascontiguousarray(getattr(examples, name)) for name in names}
    left_out = [examples.left_out, _digest(arrays, examples.left_out)]
    failure = cache.write(file, arrays, {'left_out': json.dumps(left_out)})
    if failure:
        say(f'note: tokens are not cached: {failure}')


def _digest(arrays, left_out):
    """A hash of what a cache file holds: a changed bit would train on other tokens."""
    digest = hashlib.sha256(json.dumps(left_out).encode())
    for name in ('ids', 'spans', 'good', 'uid', 'margin'):
        digest.update(np.ascontiguousarray(arrays[name]) if name in arrays else b'-')
    return digest.hexdigest()
