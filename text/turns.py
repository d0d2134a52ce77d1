"""Write a whole conversation as one sequence in which every answer is trained on (sft.py).

If the template marks answers itself ({% generation %}), these are used. Otherwise an answer is what the template writes
after the prompt for it, up to and including the end of turn."""

import re
from functools import partial

from text import chat
from text.messages import is_trained, message

APART = 'note: conversations that the chat template does not write as one text: an example for each answer'


def marks_answers(tokenizer, tools):
    """Return whether the chat template marks the answers itself, with {% generation %}."""
    return bool(re.search(r'\{%-?\s*generation\s*-?%\}', chat.template_of(tokenizer, tools)))


def segments(turns, tools, tokenizer, left_out):
    """Return a conversation's text cut into [context, trained answer, context, trained answer, ...]; the rest is dropped.

    Returns [] if no answer is trained on, and None if the template cannot write the conversation as one text. Raises Refused.
    turns: messages; answers of weight 0 are context. left_out: Counter of reasons, updated. See chat.py for marks."""
    special = chat.special_of(tokenizer)
    if chat.template_of(tokenizer, tools) == chat.PLAIN_CHAT:
        left_out[chat.NO_TEMPLATE] = 1  # a flag, not a count
    # indices of turns; those of trained answers become fewer below
    answers = [i for i, turn in enumerate(turns) if turn['role'] == 'assistant']
    trained = {i for i in answers if is_trained(turns[i])}
    turns = [{key: value for key, value in turn.items() if key != 'weight'} for turn in turns]
    turns, tools = chat.marked(turns, special, left_out), special.mark(tools)
    write = partial(chat.write, tokenizer=tokenizer)
    full_text = write(turns, tools)
    # do not train on an answer without content if the template writes none of its other fields, such as tool calls
    for i in sorted(trained):
        content_only = message('assistant', turns[i]['content'])
        if content_only['content'].strip():
            continue
        if write([*turns[:i], content_only, *turns[i + 1 :]], tools) == full_text:
            left_out['empty answers'] += 1
            trained.discard(i)
    if not trained:
        # the fields that are lost
        chat.count_unwritten(turns, full_text, partial(write, tools=tools), left_out, tools)
        return []

    # spans: (start, end) of every answer in full_text
    if marks_answers(tokenizer, tools):
        spans = _spans_by_marks(turns, tools, tokenizer)
        # the prompt for an answer may be no beginning of full_text: it may open a thought that full_text lacks
        prompts = [write(turns[:i], tools, add_generation_prompt=True) for i in sorted(trained)]
        if not all(map(full_text.startswith, prompts)):
            return None
    else:
        spans = [_span(turns, i, tools, full_text, write, special.stop) for i in answers]
    if None in spans or len(spans) != len(answers):
        return None
    chat.count_unwritten(turns, full_text, partial(write, tools=tools), left_out, tools)
    texts = []
    done = 0  # full_text[:done] is in texts
    for i, (start, end) in zip(answers, spans, strict=True):
        # blank: an end of turn alone, behind a thought that the template leaves out, say
        content, _stops = special.split(full_text[start:end])
        is_blank = not content.strip()
        left_out['empty answers'] += is_blank and i in trained
        if i in trained and not is_blank:
            texts += [full_text[done:start], full_text[start:end]]
            done = end
    left_out[chat.KEPT] += sum(chat.MARK in text for text in texts)
    return texts


def _spans_by_marks(turns, tools, tokenizer):
    """Return the (start, end) of every answer in the conversation's text, as the chat template marks them."""
    # apply_chat_template calls this, too, for a list of chats, but returns only tokens
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [chat.with_thoughts(turn) for turn in turns]
    options = {'chat_template': chat.template_of(tokenizer, tools), 'return_assistant_tokens_mask': True}
    _texts, (spans,) = render_jinja_template([turns], tools=tools, **options, **tokenizer.special_tokens_map)
    return spans


def _span(turns, i, tools, full_text, write, stop):
    """Return (start, end) of the answer turns[i] and its end of turn (pattern: stop) in full_text = write(turns, tools), or None."""
    prompt_text = write(turns[:i], tools, add_generation_prompt=True)
    start = len(prompt_text)
    if not full_text.startswith(prompt_text):
        return None
    # usually the full text begins with the text up to this answer; a line break behind it is not trained on
    answered_text = write(turns[: i + 1], tools).rstrip('\n')
    if len(answered_text) >= start and full_text.startswith(answered_text):
        return start, len(answered_text)
    # a template may remove the thoughts of earlier answers: find the content and the end of turn after it
    content = turns[i]['content'].strip()
    content_start = full_text.find(content, start)
    if content_start < 0 or not content:
        return None
    content_end = content_start + len(content)
    end_of_turn = re.compile(rf'\s*(?:{stop.pattern})').match(full_text, content_end)
    return start, end_of_turn.end() if end_of_turn else content_end
