"""From text (sources.py) to token ids: prompt and answers apart, joined as ids, truncated, counted, cached on disk.

Every answer ends with the end of text, cut or not; BOS stands only where the tokenizer itself would put one."""

import hashlib
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

import sources
from configurator import UserError
from examples import Examples, uniform_hash
from log import say

PLAIN_CHAT = (  # for tokenizers without a chat template: Anthropic's format, as in the original DPO code
    "{% for m in messages %}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' if m.role == 'assistant' else "
    "'\n\n' }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)

NO_TEMPLATE = 'note: no chat template in the tokenizer, so chats are written as Human: / Assistant:'


def load_examples(data, split, tokenizer, task, *, max_length, max_prompt_length, truncation='start', whole=False,
                  num_turns=1, skip_bad_rows=False, data_fraction=1.0, seed=0, cache=True, margins=False):  # fmt: skip
    """Tokenised examples of 'hh', 'hh+shp', 'hh:PATH', 'toy', a hub id, a file or folder; cached on disk by content.

    task: 'pairs', 'singles' (KTO, made from pairs if need be) or 'sft'. max_length, max_prompt_length: tokens; where the
    whole is too long, the prompt loses its start (or end: truncation), then answers are cut before their end of text.
    whole: a single file is all for this split. margins: keep the margins of pairs. Raises UserError."""
    if max_length < max_prompt_length + 2:
        raise UserError(
            f'max_length {max_length} leaves no room for an answer behind max_prompt_length {max_prompt_length}'
        )
    options = [split, task, max_length, max_prompt_length, truncation, whole, num_turns, skip_bad_rows, margins]
    stamps, rows, left_out = [sources.fingerprint(source, split) for source in data.split('+')], None, Counter()

    def read():
        found = []
        for source in data.split('+'):
            more, out = sources.load_rows(source, split, whole=whole, num_turns=num_turns, skip_bad_rows=skip_bad_rows)
            found += more
            left_out.update(out)
        return found

    if None in stamps:  # a hub dataset: only its rows tell what is in it
        rows = read()
        stamps = [sources.content_hash(rows)]
    tokenizer_stamp = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.get_vocab())
    template = tokenizer.chat_template if tokenizer.chat_template != PLAIN_CHAT else None
    key = json.dumps([4, stamps, options, tokenizer_stamp, template, tokenizer.eos_token_id])
    folder = Path(os.environ.get('NANOPREF_CACHE', Path.home() / '.cache' / 'nanopref'))
    file = folder / f'tokens-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors'
    examples = _read_cache(file) if cache else None
    if examples is None:
        rows = read() if rows is None else rows
        examples = tokenise(rows, tokenizer, task, max_length, max_prompt_length, truncation, left_out, margins)
        if cache:
            _write_cache(file, examples)
    if NO_TEMPLATE in examples.left_out:
        tokenizer.chat_template = PLAIN_CHAT  # so that the exported tokenizer writes chats as in training
    if data_fraction < 1:  # not by the hash of flip: the kept pairs would be the flipped ones
        examples = examples.select(uniform_hash(examples.uid, seed + 2) < data_fraction)
    if not len(examples) and split == 'train':
        raise UserError(
            f'no {split} examples are left in data {data!r}; left out: {dict(examples.left_out) or "nothing"}'
        )
    return examples


def tokenise(rows, tokenizer, task, max_length, max_prompt_length, truncation, left_out, margins=False):
    """Examples from rows of text or chat; what cannot be used is counted in left_out.

    margins: if any pair has a margin, all get one, 0 where there is none, which is counted."""
    parts = [part for row in rows for part in _as_texts(row, task, left_out)]
    if task in ('sft', 'prompts'):  # one demonstration a prompt and answer, however many pairs it is in
        once = list({part[3]: part for part in parts}.values())
        if task == 'prompts' and len(once) < len(parts):
            left_out['same prompt again'] += len(parts) - len(once)
        parts = once
    texts = [text for prompt, answers, *_ in parts for text in _render(prompt, answers, tokenizer, left_out)]
    ids = tokenizer(texts, add_special_tokens=False)['input_ids'] if texts else []
    first, eos = _first(tokenizer), tokenizer.eos_token_id
    flat, spans, good, uid, margin = [], [], [], [], []
    position = total = 0
    for _, answers, thumb, key, by in parts:
        p, *a = ids[position : position + 1 + len(answers)]
        position += 1 + len(answers)
        if any(x in ([], [eos]) for x in a):
            left_out['empty answers'] += 1
            continue
        p, a = _fit(p, a, first, eos, max_length, max_prompt_length, truncation, left_out)
        if len(a) == 2 and a[0] == a[1]:
            left_out['pairs with equal answers'] += 1
            continue
        edges = np.cumsum([total, len(p), *map(len, a)])
        total = int(edges[-1])
        flat.extend(p)
        for x in a:
            flat.extend(x)
        spans.append(np.stack((edges[:-1], edges[1:]), 1))
        good.append(thumb)
        uid.append(key)
        margin.append(by)
    known = sum(by is not None for by in margin)
    if known and margins:
        left_out['pairs without a margin, taken as 0'] += len(margin) - known
    elif known:
        left_out['margins, which only reward.py uses'] += known
    margin = np.array([by or 0.0 for by in margin], np.float32) if known and margins else None
    spans = np.array(spans, np.int64).reshape(-1, 3 if task == 'pairs' else 2, 2)
    arrays = np.array(flat, np.int32), spans, np.array(good, bool), np.array(uid, np.uint64)
    return Examples(*arrays, +left_out, margin=margin)


def encode(prompt, answer, tokenizer, max_length, max_prompt_length, truncation, left_out):
    """(prompt ids, answer ids) of one text or chat, as tokenise has them; an empty answer is the end of text alone."""
    p, a = tokenizer(_render(prompt, [answer], tokenizer, left_out), add_special_tokens=False)['input_ids']
    first, eos = _first(tokenizer), tokenizer.eos_token_id
    p, a = _fit(p, [a], first, eos, max_length, max_prompt_length, truncation, left_out)
    return p, a[0]


def _fit(p, a, first, eos, max_length, max_prompt_length, truncation, left_out):
    """The ids of a prompt, and of its answers, with BOS and the end of text, cut to the lengths."""
    p = _begin(p, first, eos)
    a = [x if x[-1:] == [eos] else [*x, eos] for x in a]
    if len(p) + max(map(len, a)) > max_length:
        if len(p) > max_prompt_length:
            left_out['prompts cut'] += 1
            p = _cut(p, max_prompt_length, first, truncation)
        room = max_length - len(p)
        left_out['answers cut'] += sum(len(x) > room for x in a)
        a = [x if len(x) <= room else [*x[: room - 1], eos] for x in a]
    return p, a


def tokenise_prompts(prompts, tokenizer, longest, truncation, left_out):
    """The ids of prompts, text or chat, as they are in training; one of more than `longest` tokens is cut, and counted."""
    texts = [_render(prompt, [], tokenizer, left_out)[0] for prompt in prompts]
    first, eos = _first(tokenizer), tokenizer.eos_token_id
    ids = [_begin(p, first, eos) for p in tokenizer(texts, add_special_tokens=False)['input_ids']]
    left_out['prompts cut'] += sum(len(p) > longest for p in ids)
    return [p if len(p) <= longest else _cut(p, longest, first, truncation) for p in ids]


def _first(tokenizer):
    """BOS where the tokenizer itself would put one, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer('a')['input_ids'][:1] == [bos] else None


def _begin(prompt, first, eos):
    """A prompt's ids behind BOS, if it has one; an empty prompt is the end of text before."""
    return prompt if prompt and first in (None, prompt[0]) else [eos if first is None else first, *prompt]


def _cut(prompt, length, first, truncation):
    """The last (or, truncation 'end', the first) tokens of a prompt, BOS kept."""
    head = [] if first is None else prompt[:1]
    return [*head, *prompt[len(prompt) - length + len(head) :]] if truncation == 'start' else prompt[:length]


def _as_texts(row, task, left_out):
    """(prompt, answers, good, uid, margin) of a row, as the task needs them; none, counted, where it has no such thing."""
    prompt = row['prompt']
    anything = '.' if isinstance(prompt, str) else [{'role': 'assistant', 'content': '.'}]  # behind a prompt alone
    if 'chosen' in row:
        answers = [row.get('sft', row['chosen'])] if task in ('sft', 'prompts') else [row['chosen'], row['rejected']]
    elif 'response' in row and task == 'sft' and not row.get('good', True):
        left_out['bad answers, which are no demonstrations'] += 1
        return []
    elif 'response' in row and (task in ('sft', 'prompts') or (task == 'singles' and 'good' in row)):
        answers = [row['response']]
    elif task == 'prompts':
        answers = [anything]
    else:
        left_out[f'rows without what {task} needs'] += 1
        return []
    if task == 'prompts' and _blank(answers[0]):
        answers = [anything]
    uid = sources.content_hash(prompt, answers)
    if any(map(_blank, answers)):
        left_out['empty answers'] += 1
        return []
    if len(answers) == 1 or task == 'pairs':
        return [(prompt, answers, row.get('good', True), uid, row.get('margin') if task == 'pairs' else None)]
    if answers[0] == answers[1]:
        left_out['pairs with equal answers'] += 1
        return []
    return [(prompt, [answer], i == 0, uid, None) for i, answer in enumerate(answers)]


def _blank(answer):
    """Whether an answer, text or chat, says nothing."""
    return not (answer if isinstance(answer, str) else ''.join(turn['content'] for turn in answer)).strip()


def _render(prompt, answers, tokenizer, left_out):
    """The texts of prompt and answers: as they are, or through the tokenizer's chat template.

    Together they are what the template makes of the whole chat, with three differences: prompt and answer become tokens
    apart, as in sampling; line breaks that a template writes after the end of a turn are not part of the answer; and
    tokenise adds the end of text where the template ends a turn with something else, or with nothing."""
    if isinstance(prompt, str) and all(isinstance(a, str) for a in answers):
        return [prompt, *answers]
    template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_CHAT  # of several, the default
    if template == PLAIN_CHAT:
        left_out[NO_TEMPLATE] = 1
    as_chat = [[{'role': role, 'content': text}] if isinstance(text, str) else text
               for role, text in [('user', prompt), *(('assistant', a) for a in answers)]]  # fmt: skip
    try:
        write = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
        start = write(as_chat[0], add_generation_prompt=True)
        whole = [write(as_chat[0] + a) for a in as_chat[1:]]
    except Exception as error:  # templates are programs and raise what they like
        raise UserError(f'the chat template refuses an example: {" ".join(str(error).split())[:200]}') from None
    if not all(text.startswith(start) for text in whole):
        raise UserError('the chat template writes an answered chat differently from the prompt it asks to continue')
    return [start, *(text[len(start) :].rstrip('\n') for text in whole)]


def _read_cache(file):
    """The Examples in a cache file, or None where there is none or it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, 'np') as f:
            arrays = {k: f.get_tensor(k) for k in ('ids', 'spans', 'good', 'uid')}
            margin = f.get_tensor('margin') if 'margin' in f.keys() else None  # noqa: SIM118, not a dict
            left_out, digest = json.loads(f.metadata()['left_out'])
            if digest == _digest([*arrays.values(), margin], left_out):
                return Examples(*arrays.values(), Counter(left_out), margin=margin)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        pass
    say(f'note: {file} is damaged: tokenising anew')
    return None


def _digest(arrays, left_out):
    """A hash of what a cache file holds: a changed bit would train on other tokens."""
    digest = hashlib.sha256(json.dumps(left_out).encode())
    for array in arrays:
        digest.update(b'-' if array is None else np.ascontiguousarray(array))
    return digest.hexdigest()


def _write_cache(file, examples):
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    names = ['ids', 'spans', 'good', 'uid'] + ['margin'] * (examples.margin is not None)
    arrays = {k: np.ascontiguousarray(getattr(examples, k)) for k in names}
    temporary = file.with_suffix(f'.{os.getpid()}')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        digest = _digest([*arrays.values()] + [None] * (examples.margin is None), examples.left_out)
        save_file(arrays, temporary, {'left_out': json.dumps([examples.left_out, digest])})
        temporary.rename(file)
    except (OSError, SafetensorError) as error:
        say(f'note: tokens are not cached: {error}')
