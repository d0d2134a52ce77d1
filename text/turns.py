"""A whole conversation as one sequence, of which every answer is trained on (sft.py).

The user's turns are seen and not trained on. A template that marks answers itself ({% generation %}) is taken at its word.
Elsewhere an answer is what the template writes behind the prompt that asks for it, its end of turn included."""

import re
from typing import NamedTuple

from text import chat

GENERATION = re.compile(r'\{%-?\s*generation\s*-?%\}')
APART = 'note: conversations that the chat template does not write as one text: an example for each answer'


class Segment(NamedTuple):
    """A part of a conversation's text: a list of pieces (see chat.py), and whether it is trained on."""

    pieces: list
    trained: bool


def is_trained(turn):
    """Whether a message is an answer that is trained on."""
    return turn['role'] == 'assistant' and turn.get('weight') != 0


def marks_answers(tokenizer, tools):
    """Whether the chat template itself says what is an answer."""
    return bool(GENERATION.search(chat.template_of(tokenizer, tools)))


def segments(turns, tools, tokenizer, left_out):
    """The Segments of a conversation up to its last trained answer, none if there is no such; None where the template does
    not write it as one text.

    turns: messages; an assistant's message of weight 0 is only seen. Raises Refused where the template refuses it."""
    special = chat.special_of(tokenizer)
    if chat.template_of(tokenizer, tools) == chat.PLAIN_CHAT:
        left_out[chat.NO_TEMPLATE] = 1
    trained = [is_trained(turn) for turn in turns if turn['role'] == 'assistant']
    turns = [{key: value for key, value in turn.items() if key != 'weight'} for turn in turns]
    turns = chat.without_ends(turns, special, left_out)

    def cut(turns, tools):
        """(the whole text, its parts: seen, trained on, seen ...), None for the parts where it cannot be cut."""
        whole = chat.write(turns, tools, tokenizer)
        spans = _spans(turns, tools, tokenizer, whole, special)
        if spans is None or len(spans) != len(trained):
            return whole, None
        texts, position = [], 0
        for (start, end), is_used in zip(spans, trained, strict=True):
            if is_used:
                texts += [whole[position:start], whole[start:end]]
                position = end
        return whole, texts

    # an answer of which the template writes nothing would train its end alone
    for i, turn in enumerate(turns):
        bare = {key: turn[key] for key in ('role', 'content')}
        if turn['role'] == 'assistant' and not turn['content'].strip() and turn != bare:
            without = [*turns[:i], bare, *turns[i + 1 :]]
            silent = chat.write(without, tools, tokenizer) == chat.write(turns, tools, tokenizer)
            trained[sum(t['role'] == 'assistant' for t in turns[:i])] &= not silent
            left_out['empty answers'] += silent
    if not any(trained):
        return []

    whole, texts = cut(turns, tools)
    if texts is None:
        return None
    # what the template does not write is counted
    unwritten = sum(turn['content'].strip() not in whole for turn in turns)
    left_out['messages whose content the chat template changes or leaves out'] += unwritten
    chat.count_fields(turns, whole, lambda less: chat.write(less, tools, tokenizer), left_out)
    if tools:
        same = chat.write(turns, None, tokenizer) == whole
        left_out['tools, which the chat template does not write'] += same

    pieces = chat.as_pieces(texts, [turns, tools], lambda value: cut(*value)[1] or [], special, left_out)
    return [Segment(piece, i % 2 == 1) for i, piece in enumerate(pieces)]


def _spans(turns, tools, tokenizer, whole, special):
    """(start, end) in the text of every answer, its end of turn included; None where they cannot be told."""
    template = chat.template_of(tokenizer, tools)
    if marks_answers(tokenizer, tools):
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            [turns],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        return spans[0]

    spans = []
    for i in (i for i, turn in enumerate(turns) if turn['role'] == 'assistant'):
        start = chat.write(turns[:i], tools, tokenizer, add_generation_prompt=True)
        if not whole.startswith(start):
            return None
        # usually the text goes on as it would if the conversation ended here
        answered = chat.write(turns[: i + 1], tools, tokenizer).rstrip('\n')
        if len(answered) >= len(start) and whole.startswith(answered):
            spans.append((len(start), len(answered)))
            continue
        # if not (a template that leaves thoughts out of earlier answers): up to the end of turn behind its content
        content = turns[i]['content'].strip()
        at = whole.find(content, len(start))
        if at < 0 or not content:
            return None
        stop = re.compile(rf'\s*(?:{special.stop.pattern})').match(whole, at + len(content))
        spans.append((len(start), stop.end() if stop else at + len(content)))
    return spans
