"""Encode texts to token ids, add BOS and EOS, and truncate. tokenise.py calls this."""

import re
from typing import NamedTuple

from text.chat import MARK, UNMARK


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


def bos_of(tokenizer):
    """Return the BOS id if the tokenizer adds it to texts, else None."""
    bos = tokenizer.bos_token_id
    return bos if tokenizer('a')['input_ids'][:1] == [bos] else None


def add_bos(prompt, limits):
    """Return a prompt's ids with BOS in front, added unless it is there. For a tokenizer without BOS: unchanged, or [EOS] if empty."""
    if limits.bos is None:
        # an empty prompt becomes EOS: the first answer token needs a token to be predicted from
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


def fit(prompt, answers, limits, left_out):
    """Return (prompt, answers), lists of ids, with BOS and EOS and truncated to the limits (counted in left_out)."""
    eos = limits.eos
    prompt = add_bos(prompt, limits)
    # the chat template may have written EOS already
    answers = [answer if answer[-1:] == [eos] else [*answer, eos] for answer in answers]
    longest_answer = max(len(answer) for answer in answers)
    if len(prompt) + longest_answer <= limits.max_length:
        return prompt, answers
    prompt = truncate_prompt(prompt, limits, left_out)
    room = limits.max_length - len(prompt)
    for i, answer in enumerate(answers):
        if len(answer) > room:
            left_out['answers cut'] += 1
            answers[i] = [*answer[: room - 1], eos]
    return prompt, answers


def fit_conversation(prompt, segments, limits, left_out):
    """Return (prompt, answer), the ids of a conversation truncated to the limits.

    segments: lists of ids after the prompt, alternately trained (assistant) and untrained (user), the last one trained. answer: all
    segments joined, with untrained tokens stored as ~id; [] if no trained token fits. left_out: Counter of what was cut."""
    eos = limits.eos
    prompt = add_bos(prompt, limits)
    answer = []
    for i, segment in enumerate(segments):
        is_trained = i % 2 == 0
        answer += segment if is_trained else [~token for token in segment]
    # close with EOS, unless it is there: some templates write a newline after it, so look at the last two tokens
    if eos not in answer[-2:]:
        answer.append(eos)
    if len(prompt) + len(answer) > limits.max_length:
        prompt = truncate_prompt(prompt, limits, left_out)
    room = limits.max_length - len(prompt)
    if len(answer) <= room:
        return prompt, answer
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
    return prompt, answer


def encode_texts(texts, tokenizer):
    """Return the token ids of each text; adds no BOS or EOS. chat.py has marked special tokens written by users."""
    unmarked = [text for text in texts if MARK not in text]
    unmarked_ids = []
    if unmarked and tokenizer.is_fast:
        # this call turns off truncation and padding, which the faster encode_batch_fast would apply
        tokenizer(unmarked[0], add_special_tokens=False)
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(unmarked, add_special_tokens=False)
        unmarked_ids = [encoding.ids for encoding in encodings]
    elif unmarked:
        unmarked_ids = tokenizer(unmarked, add_special_tokens=False)['input_ids']
    next_ids = iter(unmarked_ids)
    return [_encode_marked(text, tokenizer) if MARK in text else next(next_ids) for text in texts]


def _encode_marked(text, tokenizer):
    """Return the token ids of a text; special tokens between marks are encoded as ordinary text."""
    # re.split puts the marked pieces at odd positions
    pieces = re.split(f'{MARK}([^{MARK}{UNMARK}]*){UNMARK}', text)
    ids = []
    for i, piece in enumerate(pieces):
        # remove unpaired marks, whose counterpart the chat template has cut off
        piece = piece.replace(MARK, '').replace(UNMARK, '')
        was_marked = i % 2 == 1
        encode = _encode_as_text if was_marked else _encode_with_specials
        piece_ids = _encode_inside(encode, piece, tokenizer) if i else encode(piece, tokenizer)
        # Unigram may have the special token in its vocabulary, too: split it after the first letter
        if was_marked and tokenizer.convert_tokens_to_ids(piece) in piece_ids:
            piece_ids = _encode_inside(encode, piece[:1], tokenizer) + _encode_inside(encode, piece[1:], tokenizer)
        ids += piece_ids
    return ids


def _encode_inside(encode, text, tokenizer):
    """Return encode(text, tokenizer) without the space that some tokenizers add at the start of a text."""
    # encode the text after a newline, then remove the newline's ids
    newline = encode('\n', tokenizer)
    ids = encode('\n' + text, tokenizer)
    if ids[: len(newline)] == newline:
        return ids[len(newline) :]
    # fallback: the tokenizer merged the newline with the text
    return encode(text, tokenizer)


def _encode_with_specials(text, tokenizer):
    """Return the ids of a text in which special tokens are recognized."""
    return tokenizer(text, add_special_tokens=False)['input_ids'] if text else []


def _encode_as_text(text, tokenizer):
    """Return the ids of a text in which special and other added tokens are encoded as ordinary text."""
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
