"""From marked texts (chat.py) to token ids, with BOS and the end of text, cut to a length. tokenise.py calls this.

A special token that stands in somebody's text is encoded as text: only the chat template may write special tokens.
"""

import re
from typing import NamedTuple

from text.chat import MARK, UNMARK


class Limits(NamedTuple):
    """What the ids of an example begin and end with, and how many they may be."""

    first: int | None  # BOS; None if the tokenizer puts none before a text
    eos: int
    max_length: int  # tokens of prompt and answer
    max_prompt_length: int  # tokens of the prompt, if the whole is too long
    truncation: str  # which end of the prompt is cut: 'start' or 'end'

    @classmethod
    def of(cls, tokenizer, max_length, max_prompt_length, truncation):
        """Make the Limits for a tokenizer."""
        return cls(first_of(tokenizer), tokenizer.eos_token_id, max_length, max_prompt_length, truncation)


def first_of(tokenizer):
    """Return the id of BOS if the tokenizer puts one before a text, else None."""
    bos = tokenizer.bos_token_id
    return bos if tokenizer('a')['input_ids'][:1] == [bos] else None


def begin(prompt, limits):
    """Return a prompt's ids with BOS before them, once. Without BOS, an empty prompt becomes the end of text.

    The first token of an answer is predicted from the one before it, so that there must be one."""
    if limits.first is None:
        return prompt or [limits.eos]
    # a chat template may have written BOS itself
    return prompt if prompt[:1] == [limits.first] else [limits.first, *prompt]


def cut(prompt, limits, left_out):
    """Return a prompt's ids, cut to max_prompt_length and counted if they are more. They lose their start, but BOS stays.

    With truncation 'end' they lose their end."""
    too_many = len(prompt) - limits.max_prompt_length
    if too_many <= 0:
        return prompt
    left_out['prompts cut'] += 1
    if limits.truncation == 'end':
        return prompt[:-too_many]
    # the start is cut behind BOS, if there is one
    n_bos = 0 if limits.first is None else 1
    return prompt[:n_bos] + prompt[n_bos + too_many :]


def fit(prompt, answers, limits, left_out):
    """Return (prompt, answers), the ids with BOS and the end of text, cut to the limits. What is cut is counted in left_out."""
    eos = limits.eos
    prompt = begin(prompt, limits)
    # a chat template may have written the end of text itself
    answers = [answer if answer[-1:] == [eos] else [*answer, eos] for answer in answers]
    longest_answer = max(len(answer) for answer in answers)
    if len(prompt) + longest_answer <= limits.max_length:
        return prompt, answers
    # first the prompt is cut, then each answer to the room that is left
    prompt = cut(prompt, limits, left_out)
    room = limits.max_length - len(prompt)
    cut_answers = []
    for answer in answers:
        if len(answer) > room:
            left_out['answers cut'] += 1
            answer = [*answer[: room - 1], eos]
        cut_answers.append(answer)
    return prompt, cut_answers


def fit_conversation(prompt, segments, limits, left_out):
    """Return (prompt, answer), the ids of a conversation cut to the limits. The answer is [], counted, if none has room.

    segments: lists of ids behind the prompt, the first trained on, the second only seen, and so on (turns.py). The answer
    is all of them together, and a token that is only seen is stored as ~id."""
    eos = limits.eos
    prompt = begin(prompt, limits)
    answer = []
    for i, segment in enumerate(segments):
        is_trained = i % 2 == 0
        answer += segment if is_trained else [~token for token in segment]
    # eos may be the last token but one: a template may mark the line break behind it as part of the answer
    if eos not in answer[-2:]:
        answer.append(eos)
    if len(prompt) + len(answer) > limits.max_length:
        prompt = cut(prompt, limits, left_out)
    room = limits.max_length - len(prompt)
    if len(answer) <= room:
        return prompt, answer

    left_out['conversations cut'] += 1
    # the answer ends with the last trained token that has room: a user's words behind it train nothing
    trained = [i for i, token in enumerate(answer[:room]) if token >= 0]
    if not trained:
        left_out['conversations without an answer within max_length'] += 1
        return prompt, []
    answer = answer[: trained[-1] + 1]
    if eos not in answer[-2:]:
        answer = [*answer[: room - 1], eos]
    return prompt, answer


# ---- texts to ids ----


def encode_texts(texts, tokenizer):
    """Return a list of the token ids of each marked text. All texts without a mark are encoded in one call, which is faster."""
    unmarked = [text for text in texts if MARK not in text]
    ids = iter(_encode_unmarked(unmarked, tokenizer))
    return [_encode_marked(text, tokenizer) if MARK in text else next(ids) for text in texts]


def _encode_unmarked(texts, tokenizer):
    """Return a list of the token ids of each text, without BOS or other special tokens around them."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False)['input_ids']
    # encode_batch_fast does not keep where in the text a token begins. It would cut and pad as the tokenizer's file says: this
    # call turns that off
    tokenizer(texts[0], add_special_tokens=False)
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _encode_marked(text, tokenizer):
    """Return the token ids of a text with marks: what stands between two marks is text, even if it spells a special token."""
    # every second piece stood between marks
    between_marks = f'{MARK}([^{MARK}{UNMARK}]*){UNMARK}'
    pieces = re.split(between_marks, text)
    ids = []
    for i, piece in enumerate(pieces):
        # a mark that is still there is alone: the template has cut the text at the other one
        piece = piece.replace(MARK, '').replace(UNMARK, '')
        was_marked = i % 2 == 1
        encode = _encode_as_text if was_marked else _encode_with_specials
        piece_ids = _encode_inside(encode, piece, tokenizer) if i else encode(piece, tokenizer)
        # Unigram may have a special token among its words, too; its first letter and the rest are other words
        if was_marked and tokenizer.convert_tokens_to_ids(piece) in piece_ids:
            piece_ids = _encode_inside(encode, piece[:1], tokenizer) + _encode_inside(encode, piece[1:], tokenizer)
        ids += piece_ids
    return ids


def _encode_inside(encode, text, tokenizer):
    """Return the ids that encode(text, tokenizer) gives for a piece from inside a text.

    Some tokenizers put a space before the first word of a text. So the piece is encoded behind a line break, whose ids are
    taken away again. If they cannot be told from those of the piece, the piece is encoded alone."""
    # compared, since a tokenizer may also merge the line break with the piece
    line = encode('\n', tokenizer)
    ids = encode('\n' + text, tokenizer)
    if ids[: len(line)] == line:
        return ids[len(line) :]
    return encode(text, tokenizer)


def _encode_with_specials(text, tokenizer):
    """Return the ids of a text; a special token that it spells is one token."""
    return tokenizer(text, add_special_tokens=False)['input_ids'] if text else []


def _encode_as_text(text, tokenizer):
    """Return the ids of a text; a special or other added token that it spells is text."""
    if not tokenizer.is_fast:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    # what the Rust tokenizer does, without its search for added tokens
    inner = tokenizer.backend_tokenizer
    if inner.normalizer is not None:
        text = inner.normalizer.normalize_str(text)
    words = [text]
    if inner.pre_tokenizer is not None:
        words = [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in inner.model.tokenize(word)]
