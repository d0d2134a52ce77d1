"""A whole conversation as one sequence, of which every answer is trained on (sft.py).

The user's turns are seen and not trained on. A template that marks answers itself ({% generation %}) is taken at its word.
Elsewhere an answer is what the template writes behind the prompt that asks for it, its end of turn included."""

import re

from text import chat
from text.messages import is_trained, message

APART = 'note: conversations that the chat template does not write as one text: an example for each answer'


def marks_answers(tokenizer, tools):
    """Whether the chat template itself says what is an answer."""
    return bool(re.search(r'\{%-?\s*generation\s*-?%\}', chat.template_of(tokenizer, tools)))


def segments(turns, tools, tokenizer, left_out):
    """The marked texts of a conversation up to its last trained answer, by turns only seen and trained on; none if there is
    no such answer; None where the template does not write it as one text.

    turns: messages; an assistant's message of weight 0 is only seen. Raises chat.Refused."""
    special = chat.special_of(tokenizer)
    if chat.template_of(tokenizer, tools) == chat.PLAIN_CHAT:
        left_out[chat.NO_TEMPLATE] = 1
    trained = [is_trained(turn) for turn in turns]
    turns = [{key: value for key, value in turn.items() if key != 'weight'} for turn in turns]
    turns, tools = chat.marked(turns, special, left_out), special.mark(tools)

    def write(turns, tools=tools):
        return chat.write(turns, tools, tokenizer)

    # an answer of which the template writes nothing would train its end alone
    whole = write(turns)
    answers = [i for i, turn in enumerate(turns) if turn['role'] == 'assistant']
    for i in answers:
        bare = message('assistant', turns[i]['content'])
        if bare['content'].strip() or turns[i] == bare:
            continue
        silent = write([*turns[:i], bare, *turns[i + 1 :]]) == whole
        trained[i] &= not silent
        left_out['empty answers'] += silent
    if not any(trained):
        return []

    # where each answer begins and ends
    if marks_answers(tokenizer, tools):
        spans = _marked_spans(turns, tools, tokenizer)
    else:
        spans = [_span(turns, i, whole, tools, tokenizer, special) for i in answers]
    if None in spans or len(spans) != len(answers):
        return None
    chat.count_unwritten(turns, tools, whole, write, left_out)

    texts, position = [], 0
    for i, (start, end) in zip(answers, spans, strict=True):
        if trained[i]:
            texts += [whole[position:start], whole[start:end]]
            position = end
    left_out[chat.KEPT] += sum(chat.MARK in text for text in texts)
    return texts


def _marked_spans(turns, tools, tokenizer):
    """(start, end) in the text of every answer, as the template marks them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat.template_of(tokenizer, tools)
    how = {'tools': tools, 'chat_template': template, 'return_assistant_tokens_mask': True}
    turns = [chat.with_thoughts(turn) for turn in turns]
    _, (spans,) = render_jinja_template([turns], **how, **tokenizer.special_tokens_map)
    return spans


def _span(turns, i, whole, tools, tokenizer, special):
    """(start, end) in the text of the answer turns[i], its end of turn included; None where that cannot be told."""
    start = chat.write(turns[:i], tools, tokenizer, add_generation_prompt=True)
    if not whole.startswith(start):
        return None
    # usually the text goes on as it would if the conversation ended here
    answered = chat.write(turns[: i + 1], tools, tokenizer).rstrip('\n')
    if len(answered) >= len(start) and whole.startswith(answered):
        return len(start), len(answered)

    # if not (a template that leaves thoughts out of earlier answers): up to the end of turn behind its content
    content = turns[i]['content'].strip()
    at = whole.find(content, len(start))
    if at < 0 or not content:
        return None
    end = at + len(content)
    stop = re.compile(rf'\s*(?:{special.stop.pattern})').match(whole, end)
    return len(start), stop.end() if stop else end
