"""From text (sources.py) to token ids: prompt and answers apart, joined as ids, truncated, counted, cached on disk.

Every answer ends with the end of text, cut or not; BOS stands only where the tokenizer itself would put one."""

import hashlib
import json
import math
import mmap
import tempfile
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import UserError, main_rank
from runtime import files
from runtime.log import say
from text import sources
from text.chat import NO_TEMPLATE, PLAIN_CHAT, THOUGHTLESS, Refused, render
from text.examples import Examples, uniform_hash
from text.files import HELP, content_hash
from text.messages import REASONING, message

# rows that are tokenised together, and bytes of ids from which on they wait on the disk
CHUNK, SPILL = 512, 2**28
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


def load_examples(data, split, tokenizer, task, *, max_length, max_prompt_length, truncation='start', undivided=False,
                  num_turns=1, skip_bad_rows=False, columns=None, data_fraction=1.0, seed=0, cache=True, margins=False,
                  enough=None):  # fmt: skip
    """Tokenised examples of 'hh', 'hh+shp', 'hh:PATH', 'toy', a hub id, a file or folder; cached on disk by content.

    task: 'pairs', 'singles' (KTO, made from pairs if need be) or 'sft'. max_length, max_prompt_length: tokens; where the
    whole is too long, the prompt loses its start (or end: truncation), then answers are cut before their end of text.
    undivided: a single file is all for this split. margins: keep the margins of pairs. enough: {'train': count, 'test':
    count}, None for all: the first so many are taken, and the rest is not tokenised. Raises UserError."""
    if max_length < max_prompt_length + 2:
        raise UserError(
            f'max_length {max_length} leaves no room for an answer behind max_prompt_length {max_prompt_length}'
        )
    reading = {'undivided': undivided, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    limits = max_length, max_prompt_length, truncation
    names, enough = data.split('+'), enough or {}

    # the cache belongs to all that the tokens depend on
    stamps = [sources.fingerprint(source, split) for source in names]
    # of a hub dataset whose commit nobody knows, only its rows tell what is in it
    known = None not in stamps
    if not known:
        stamps = [content_hash(row) for row in _rows(names, split, task, reading, Counter())]

    def file_of(part, *more):
        key = [7, stamps, part, task, limits, reading, margins, *_tokenizer_stamp(tokenizer), *more]
        return files.cache_file('tokens', hashlib.sha256(json.dumps(key).encode()).hexdigest())

    examples = _read_cache(file_of(split)) if cache else None
    if examples is None and cache and enough:
        examples = _read_cache(file_of(split, enough))
    if examples is None:
        # what is held out of the same rows is tokenised with them
        both = cache and known and split == 'train' and not undivided and all(map(sources.divides, names))
        left_out, parts = Counter(), ('train', 'test') if both else (split,)
        rows = _rows(names, split, task, reading, left_out, both)
        found, whole = tokenise_parts(rows, parts, tokenizer, task, limits, margins, skip_bad_rows, enough)
        for part, made in found.items():
            made.left_out.update(left_out)
            if cache:
                _write_cache(file_of(part, *([] if whole else [enough])), made)
        examples = found[split]
        if not whole:
            say(f'note: the first {len(examples)} examples of {data} are enough: the others are not read')
    if enough:
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
    bar = tqdm(desc='reading', unit=' examples', disable=None if main_rank() else True, leave=False)
    for source in names:
        reasons, unused, used = Counter(), Counter(), False
        for row in sources.read_examples(source, split, reasons, task=task, both=both, **reading):
            used = used or (not row.held_out and bool(_as_texts(row, task, unused)))
            bar.update()
            yield row
        # a held-out part may be empty, nothing else
        if not used and (split == 'train' or reading['undivided']):
            raise sources.vanished(source, split, reasons + unused)
        left_out.update(reasons)
    bar.close()


def _tokenizer_stamp(tokenizer):
    """What decides a tokenizer's ids, json-able. PLAIN_CHAT counts as no template: a run sets it where there was none."""
    model = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.get_vocab())
    template = tokenizer.chat_template if tokenizer.chat_template != PLAIN_CHAT else None
    return model, template, tokenizer.eos_token_id


def tokenise(rows, tokenizer, task, max_length, max_prompt_length, truncation, left_out, margins=False,
             skip_bad_rows=False):  # fmt: skip
    """Examples from rows of text or chat; what cannot be used is counted in left_out.

    margins: if any pair has a margin, all get one, 0 where there is none, which is counted. skip_bad_rows: count the rows
    that the chat template refuses, instead of raising UserError."""
    limits = max_length, max_prompt_length, truncation
    found, _ = tokenise_parts(rows, ['train'], tokenizer, task, limits, margins, skip_bad_rows)
    left_out.update(found['train'].left_out)
    return found['train'].with_(left_out=+left_out)


def tokenise_parts(rows, parts, tokenizer, task, limits, margins=False, skip_bad_rows=False, enough=None):
    """({part: Examples}, whether all rows were read): rows are of the last of the parts where they are .held_out.

    limits: as tokenise has them. enough: {part: count}: where all parts have so many, the rest is not read."""
    made = {part: _Making(task) for part in parts}
    wanted = [(made[part], (enough or {}).get(part)) for part in parts]
    first, eos = _first(tokenizer), tokenizer.eos_token_id
    todo = _render_rows(rows, made, tokenizer, task, skip_bad_rows)
    for chunk, ids in _encoded(iter(lambda: list(islice(todo, CHUNK)), []), tokenizer):
        for making, texts, part in chunk:
            p, *a = islice(ids, len(texts))
            if any(x in ([], [eos]) for x in a):
                making.left_out['empty answers'] += 1
                continue
            p, a = _fit(p, a, first, eos, *limits, making.left_out)
            # texts that differ may be cut to the same tokens
            if len(a) == 2 and a[0] == a[1]:
                making.left_out['pairs with equal answers'] += 1
                continue
            making.add(part, [p, *a])
        if all(count is not None and len(making.uid) >= count for making, count in wanted):
            return {part: making.examples(margins) for part, making in made.items()}, False
    return {part: making.examples(margins) for part, making in made.items()}, True


class _Making:
    """Examples in the making: arrays that grow; the ids, where they are many, in a file."""

    def __init__(self, task):
        self.left_out, self.task = Counter(), task
        self.ids = tempfile.SpooledTemporaryFile(SPILL)  # noqa: SIM115, lives as long as the examples
        self.widths, self.good, self.uid = array('i'), array('b'), array('Q')
        self.margins = array('f')  # NaN: none

    def add(self, part, pieces):
        """Keep an example: its Part, and the ids of its prompt and answers."""
        with files.writing(tempfile.gettempdir()):
            self.ids.write(array('i', chain.from_iterable(pieces)))
        self.widths.extend(map(len, pieces))
        self.good.append(part.good)
        self.uid.append(part.uid)
        self.margins.append(math.nan if part.margin is None else part.margin)

    def examples(self, margins):
        """All of them as Examples. margins: whether to keep these."""
        on_disk = self.ids.tell() > SPILL
        self.ids.seek(0)
        ids = mmap.mmap(self.ids.fileno(), 0, access=mmap.ACCESS_READ) if on_disk else self.ids.read()
        # one flat array, and where each prompt and answer begins and ends in it
        edges = np.concatenate(([0], np.cumsum(np.array(self.widths, np.int64))))
        spans = np.stack((edges[:-1], edges[1:]), 1).reshape(-1, 3 if self.task == 'pairs' else 2, 2)
        good, uid = np.array(self.good, bool), np.array(self.uid, np.uint64)
        margin = _margins(np.array(self.margins, np.float32), margins, self.left_out)
        # the answers behind prompts are not trained on
        if self.task == 'prompts':
            del self.left_out[THOUGHTLESS]
        return Examples(np.frombuffer(ids, np.int32), spans, good, uid, +self.left_out, margin=margin)


def _render_rows(rows, made, tokenizer, task, skip_bad_rows):
    """(its part's _Making, texts of the prompt and the answers, each a list of pieces, its Part) of all that can be used."""
    seen, (training, *testing) = set(), made.values()
    for row in rows:
        making = testing[0] if testing and row.held_out else training
        left_out = making.left_out
        try:
            found = _as_texts(row, task, left_out)
            # one demonstration a prompt and answer, however many pairs it is in
            if task in ('sft', 'prompts') and found and found[0].uid in seen:
                left_out['same prompt again' if task == 'prompts' else 'same demonstration again'] += 1
                continue
            texts = [render(part.prompt, part.answers, row.get('tools'), tokenizer, left_out) for part in found]
        except Refused as error:
            _bad_row(error, row, skip_bad_rows, left_out)
            continue
        if task in ('sft', 'prompts'):
            seen.update(part.uid for part in found)
        left_out['empty answers'] += texts.count(None)
        yield from ((making, text, part) for text, part in zip(texts, found, strict=True) if text is not None)


def _encoded(chunks, tokenizer):
    """(chunk, an iterator over the ids of its texts) of all chunks; the next one is read while one is encoded in a thread."""

    def encode(chunk):
        return iter(_encode([text for _, texts, _ in chunk for text in texts], tokenizer, chunk[0][0].left_out))

    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for chunk in chunks:
            ids = pool.submit(encode, chunk)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = chunk, ids
        if waiting:
            yield waiting[0], waiting[1].result()


def _margins(margins, wanted, left_out):
    """The margins of pairs, 0 where one has none (NaN); None where no pair has one, or none are wanted."""
    missing = np.isnan(margins)
    if missing.all():
        return None
    if not wanted:
        left_out['margins, which only reward.py uses'] += int((~missing).sum())
        return None
    left_out['pairs without a margin, taken as 0'] += int(missing.sum())
    return np.where(missing, np.float32(0), margins)


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
    p, a = _fit(p, [a], first, eos, max_length, max_prompt_length, truncation, left_out)
    return p, a[0]


def _fit(p, a, first, eos, max_length, max_prompt_length, truncation, left_out):
    """The ids of a prompt, and of its answers, with BOS and the end of text, cut to the lengths."""
    p = _begin(p, first, eos)
    a = [x if x[-1:] == [eos] else [*x, eos] for x in a]
    # too long: first the prompt is cut, then each answer to the room that is left
    if len(p) + max(map(len, a)) > max_length:
        if len(p) > max_prompt_length:
            left_out['prompts cut'] += 1
            p = _cut(p, max_prompt_length, first, truncation)
        room = max_length - len(p)
        left_out['answers cut'] += sum(len(x) > room for x in a)
        a = [x if len(x) <= room else [*x[: room - 1], eos] for x in a]
    return p, a


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


def _as_texts(row, task, left_out):
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
    return [Part(prompt, answers, row.get('good', True), uid, margin)]


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


def _read_cache(file):
    """The Examples in a cache file, or None where there is none or it is damaged."""

    def valid(arrays, metadata):
        left_out, digest = json.loads(metadata['left_out'])
        return digest == _digest(arrays, left_out)

    found = files.read_cache(file, valid)
    if found is None:
        if file.exists():
            say(f'note: {file} is damaged: tokenising anew')
        return None
    arrays, metadata = found
    return Examples(**arrays, left_out=Counter(json.loads(metadata['left_out'])[0]))


def _write_cache(file, examples):
    names = ['ids', 'spans', 'good', 'uid'] + ['margin'] * (examples.margin is not None)
    arrays = {name: np.ascontiguousarray(getattr(examples, name)) for name in names}
    left_out = [examples.left_out, _digest(arrays, examples.left_out)]
    failure = files.write_cache(file, arrays, {'left_out': json.dumps(left_out)})
    if failure:
        say(f'note: tokens are not cached: {failure}')


def _digest(arrays, left_out):
    """A hash of what a cache file holds: a changed bit would train on other tokens."""
    digest = hashlib.sha256(json.dumps(left_out).encode())
    for name in ('ids', 'spans', 'good', 'uid', 'margin'):
        digest.update(np.ascontiguousarray(arrays[name]) if name in arrays else b'-')
    return digest.hexdigest()
