"""Marked texts to token ids: special tokens that somebody has written stay text; BOS, end of text, and cuts to a length."""

import re
from typing import NamedTuple

from text.chat import MARK, UNMARK


class Limits(NamedTuple):
    """What ids begin and end with, and the lengths in tokens that they are cut to."""

    first: int | None
    eos: int
    max_length: int
    max_prompt_length: int
    truncation: str

    @classmethod
    def of(cls, tokenizer, max_length, max_prompt_length, truncation):
        return cls(first_of(tokenizer), tokenizer.eos_token_id, max_length, max_prompt_length, truncation)


def first_of(tokenizer):
    """BOS where the tokenizer itself would put one, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer('a')['input_ids'][:1] == [bos] else None


def begin(prompt, limits):
    """A prompt's ids behind BOS, if it has one; an empty prompt is the end of text before."""
    if prompt and limits.first in (None, prompt[0]):
        return prompt
    return [limits.eos if limits.first is None else limits.first, *prompt]


def cut(prompt, limits, left_out):
    """A prompt's last (or, truncation 'end', its first) max_prompt_length tokens, BOS kept."""
    too_many = len(prompt) - limits.max_prompt_length
    if too_many <= 0:
        return prompt
    left_out['prompts cut'] += 1
    if limits.truncation == 'end':
        return prompt[:-too_many]
    bos = 0 if limits.first is None else 1
    return prompt[:bos] + prompt[bos + too_many :]


def fit(prompt, answers, limits, left_out):
    """The ids of a prompt, and of its answers, with BOS and the end of text, cut to the lengths."""
    eos = limits.eos
    prompt = begin(prompt, limits)
    answers = [a if a[-1:] == [eos] else [*a, eos] for a in answers]
    # too long: first the prompt is cut, then each answer to the room that is left
    if len(prompt) + max(map(len, answers)) > limits.max_length:
        prompt = cut(prompt, limits, left_out)
        room = limits.max_length - len(prompt)
        left_out['answers cut'] += sum(len(a) > room for a in answers)
        answers = [a if len(a) <= room else [*a[: room - 1], eos] for a in answers]
    return prompt, answers


def fit_conversation(prompt, segments, limits, left_out):
    """(prompt, answer) of a conversation, where a token that is only seen is ~id; no answer, counted, if none has room.

    segments: ids behind the prompt, by turns trained on and only seen (turns.py). What is too long loses its end."""
    eos = limits.eos
    prompt = begin(prompt, limits)
    answer = [~token if i % 2 else token for i, segment in enumerate(segments) for token in segment]
    # a template may mark the line break behind its end of turn, too
    answer += [] if eos in answer[-2:] else [eos]
    if len(prompt) + len(answer) <= limits.max_length:
        return prompt, answer

    prompt = cut(prompt, limits, left_out)
    room = limits.max_length - len(prompt)
    if len(answer) > room:
        left_out['conversations cut'] += 1
        # what the user says at the end trains nothing; the last answer ends as any does
        trained = [i for i, token in enumerate(answer[:room]) if token >= 0]
        left_out['conversations without an answer within max_length'] += not trained
        answer = answer[: trained[-1] + 1] if trained else []
        if answer and eos not in answer[-2:]:
            answer = [*answer[: room - 1], eos]
    return prompt, answer


def encode_texts(texts, tokenizer):
    """The token ids of marked texts, all without a mark at once."""
    plain = [text for text in texts if MARK not in text]
    ids = iter(_encode_plain(plain, tokenizer) if plain else [])
    return [_encode_marked(text, tokenizer) if MARK in text else next(ids) for text in texts]


def _encode_plain(texts, tokenizer):
    """The token ids of texts, without special tokens around them."""
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False)['input_ids']
    # this way where each token begins in its text is not kept; the call before takes truncation and padding off
    tokenizer(texts[0], add_special_tokens=False)
    return [found.ids for found in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _encode_marked(text, tokenizer):
    """The token ids of a text with marks in it: what stands between two is text, whatever token it spells."""
    # every second piece was marked; a mark that the template has torn from its other is taken out
    pieces = re.split(f'{MARK}([^{MARK}{UNMARK}]*){UNMARK}', text)
    ids = []
    for i, piece in enumerate(pieces):
        piece = piece.replace(MARK, '').replace(UNMARK, '')
        encode = _encode_as_text if i % 2 else _encode_whole
        more = encode(piece, tokenizer) if i == 0 else _behind_a_line(encode, piece, tokenizer)
        # a special token may be a word of the model, too, as in Unigram: in two parts it is not
        if i % 2 and tokenizer.convert_tokens_to_ids(piece) in more:
            halves = piece[:1], piece[1:]
            more = [token for half in halves for token in _behind_a_line(encode, half, tokenizer)]
        ids += more
    return ids


def _behind_a_line(encode, text, tokenizer):
    """encode(text) behind a line break, which is taken away again: some tokenizers put a space before what begins a text."""
    line, ids = encode('\n', tokenizer), encode('\n' + text, tokenizer)
    return ids[len(line) :] if ids[: len(line)] == line else encode(text, tokenizer)


def _encode_whole(text, tokenizer):
    """The ids of a text with its special tokens."""
    return tokenizer(text, add_special_tokens=False)['input_ids'] if text else []


def _encode_as_text(text, tokenizer):
    """The ids of a text none of which is an added token, special or not."""
    if not tokenizer.is_fast:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    inner = tokenizer.backend_tokenizer
    if inner.normalizer is not None:
        text = inner.normalizer.normalize_str(text)
    words = [(text, None)] if inner.pre_tokenizer is None else inner.pre_tokenizer.pre_tokenize_str(text)
    return [token.id for word, _ in words for token in inner.model.tokenize(word)]
