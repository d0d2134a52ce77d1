"""From texts and chats to what the tokenizer reads: the chat template, and the special tokens that somebody has written.

A special token that somebody has written into a text is text. So a text is a list of pieces: every second one is such a
token, which tokenise writes as text; in the others the tokenizer finds its special tokens, as the template wrote them."""

import contextlib
import os
import re
import resource
import signal
import threading
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

from configurator import UserError
from text.messages import LONGEST, REASONING, message

PLAIN_CHAT = (  # for tokenizers without a chat template: Anthropic's format, as in the original DPO code
    "{% for m in messages %}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' if m.role == 'assistant' else "
    "'\n\n' }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)

# a chat template is a program that came with the model: what it may take for one chat
TEMPLATE_LENGTH, TEMPLATE_SECONDS, TEMPLATE_BYTES = 1_000_000, 2, 2**30

NO_TEMPLATE = 'note: no chat template in the tokenizer, so chats are written as Human: / Assistant:'
KEPT = 'special tokens in a text, kept as text'
THOUGHTLESS = 'answers without a thought, behind a prompt that opens one: an empty thought'


class Refused(Exception):
    """What is wrong with one row, so that the chat template cannot write it."""


def render(prompt, answers, tools, tokenizer, left_out, blank=False):
    """Prompt and answers, each as a list of pieces; None where an answer says nothing that the template writes (unless
    blank may be). Raises Refused where the template refuses them.

    Texts are as they are. Of chats, prompt and answer are what the template makes of the whole, with four differences:
    prompt and answer become tokens apart, as in sampling; line breaks that a template writes after the end of a turn are
    not part of the answer; tokenise adds the end of text where the template ends a turn with something else, or with
    nothing; and where the template's prompt opens a thought, an answer without one closes it."""
    special = special_of(tokenizer)
    if isinstance(prompt, str) and all(isinstance(a, str) for a in answers):
        if tools:
            left_out['tools beside texts, which only chats can have'] += 1
        return _plain_pieces(prompt, answers, special, left_out)
    if template_of(tokenizer, tools) == PLAIN_CHAT:
        left_out[NO_TEMPLATE] = 1
    prompt, *answers = [without_ends(chat, special, left_out) for chat in _as_chats(prompt, answers)]
    texts = _write_all(prompt, answers, tools, tokenizer, left_out)
    if _unwritten(prompt, answers, tools, texts, tokenizer, left_out) and not blank:
        return None
    return as_pieces(
        texts, [prompt, answers, tools], lambda value: _write_all(*value, tokenizer, Counter()), special, left_out
    )


def as_pieces(texts, value, write_again, special, left_out):
    """Texts that the template has written of value as lists of pieces: every second piece is a special token of value's own.

    write_again(value) -> the same texts of another value."""
    said = '\n'.join(_strings(value))
    if not special.pattern.search(said):
        return [[text] for text in texts]

    # written once more with marks around those tokens, to tell them from the template's own
    mark = next(chr(c) for c in range(0xF0000, 0xFFFFE) if chr(c) not in said)
    pieces = [text.split(mark) for text in write_again(_mark(value, special, mark))]
    sound = all(len(p) % 2 and all(special.pattern.fullmatch(token) for token in p[1::2]) for p in pieces)
    if not sound or [''.join(p) for p in pieces] != texts:
        left_out['special tokens in a text, read as tokens: the chat template changes them'] += 1
        return [[text] for text in texts]
    left_out[KEPT] += sum(len(p) > 1 for p in pieces)
    return pieces


def _as_chats(prompt, answers):
    """Prompt and answers as lists of messages: a text beside chats is a user's, or the assistant's, message."""
    chats = [[message('user', prompt)] if isinstance(prompt, str) else prompt]
    return chats + [[message('assistant', text)] if isinstance(text, str) else text for text in answers]


class Special:
    """A tokenizer's special tokens as regular expressions.

    pattern: any of them; last: one at a text's end; stop: one that ends a turn or a text; tail: those at a text's end."""

    def __init__(self, tokens, bos, stops):
        # the longest first; of no tokens, nothing
        choice, stop = (
            '|'.join(map(re.escape, sorted(words, key=len, reverse=True))) or '(?!)' for words in (tokens, stops)
        )
        self.pattern, self.last = re.compile(choice), re.compile(rf'(?:{choice})\s*\Z')
        self.stop, self.tail, self.bos = re.compile(stop), re.compile(rf'(?:(?:{stop})\s*)+\Z'), bos


def special_of(tokenizer):
    """The Special of a tokenizer and its chat template."""
    state = len(tokenizer), tokenizer.eos_token, tokenizer.bos_token, repr(tokenizer.chat_template)
    return _special_in(tokenizer, state)


@lru_cache(maxsize=8)
def _special_in(tokenizer, _):
    added = tokenizer.added_tokens_decoder
    tokens = {token.content for token in added.values() if token.special} | {tokenizer.eos_token}
    stops = {tokenizer.eos_token}
    try:
        template_of(tokenizer)
    except UserError:  # said where there is a chat that needs it
        return Special(tokens, tokenizer.bos_token or '', stops)
    with contextlib.suppress(Refused):
        # what the template writes around turns is special too, whatever the tokenizer says; a thought's marks are not
        roles = ('user', 'one'), ('assistant', 'zebra'), ('user', 'two')
        text = write([message(role, said) for role, said in roles], None, tokenizer)
        written = set(tokenizer(text, add_special_tokens=False)['input_ids'])
        tokens |= {token.content for i, token in added.items() if i in written and token.content.strip()}
        behind = Special(tokens, '', ()).pattern.match(text.rpartition('zebra')[2].lstrip())
        stops |= {behind[0]} if behind else set()
    return Special(tokens, tokenizer.bos_token or '', stops)


def _plain_pieces(prompt, answers, special, left_out):
    """The pieces of a prompt and answers that are texts.

    Their special tokens are text, but for a BOS before the prompt and ends behind the answers, and unless the prompt (or,
    without one, the answer) begins or ends with one: then a chat template, or its author, has written it."""
    bos = special.bos if special.bos and prompt.startswith(special.bos) else ''
    begin = prompt.removeprefix(bos) or ''.join(answers[:1])
    ready = special.pattern.match(begin) or special.last.search(prompt.removeprefix(bos))
    pieces = [[prompt] if ready else _cut_out(prompt.removeprefix(bos), special, bos)]
    for text in answers:
        tail = special.tail.search(text)
        body, tail = (text[: tail.start()], tail[0]) if tail else (text, '')

        # each end once, and no line breaks between or behind them
        end = ''.join(dict.fromkeys(special.stop.findall(tail)))
        left_out['answers that brought an end of turn: it is there once'] += tail != end
        pieces.append([body + end] if ready else _cut_out(body, special, '', end))
    if ready:
        left_out['texts that begin or end with a special token: theirs are read as tokens'] += 1
    left_out[KEPT] += sum(len(p) > 1 for p in pieces)
    return pieces


def _cut_out(text, special, before='', behind=''):
    """The pieces of a text: every second one is a special token that is written in it."""
    pieces, position = [], 0
    for found in special.pattern.finditer(text):
        pieces += [text[position : found.start()], found[0]]
        position = found.end()
    pieces.append(text[position:])
    pieces[0], pieces[-1] = before + pieces[0], pieces[-1] + (behind if len(pieces) > 1 else '')
    return pieces if len(pieces) > 1 else [pieces[0] + behind]


def without_ends(chat, special, left_out):
    """The messages of a chat; the assistant's without the end of turn that the template writes once more."""
    turns = []
    for turn in chat:
        if special.pattern.search(turn['role']):
            raise Refused(f'there is a special token in the role {turn["role"][:60]!r}')
        tail = special.tail.search(turn['content']) if turn['role'] == 'assistant' else None
        if tail:
            left_out['answers that brought an end of turn: it is there once'] += 1
            turn = turn | {'content': turn['content'][: tail.start()]}
        turns.append(turn)
    return turns


def _strings(value):
    """All strings of a json-able value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value if isinstance(value, list) else value.values():
            yield from _strings(item)


def _mark(value, special, mark):
    """A json-able value with this mark before and behind every special token in its strings; roles stay."""
    if isinstance(value, str):
        return special.pattern.sub(lambda found: mark + found[0] + mark, value)
    if isinstance(value, list):
        return [_mark(item, special, mark) for item in value]
    if isinstance(value, dict):
        return {key: item if key == 'role' else _mark(item, special, mark) for key, item in value.items()}
    return value


# ---- the chat template ----


def template_of(tokenizer, tools=None):
    """The text of the chat template that applies to a chat with or without tools. Raises UserError where it is none."""
    found = tokenizer.chat_template
    if not found:
        return PLAIN_CHAT
    if isinstance(found, dict):
        name = 'tool_use' if tools and 'tool_use' in found else 'default'
        names = ', '.join(map(str, found))[:200]
        if name not in found:
            wrong = f'the tokenizer has several chat templates ({names}) and none of the name default'
            raise UserError(f'{wrong}: give one of them that name in the model folder')
        found = found[name]
    if not isinstance(found, str):
        kind = type(found).__name__
        raise UserError(f"the tokenizer's chat template is not a text but a {kind}: mend it in the model folder")
    if len(found) > TEMPLATE_LENGTH:
        limit = f'{TEMPLATE_LENGTH:,} are the limit'
        raise UserError(f"the tokenizer's chat template has {len(found):,} characters, and {limit}")
    return found


@contextlib.contextmanager
def _limits():
    """Raise TimeoutError or MemoryError in what takes longer, or more memory, than a chat template may.

    The time is the processor's for this thread; threads other than the main one have no limit, nor has memory outside Linux."""
    main, soft, hard = threading.current_thread() is threading.main_thread(), *resource.getrlimit(resource.RLIMIT_AS)
    table = Path('/proc/self/statm')
    used = int(table.read_text().split()[0]) * resource.getpagesize() if main and table.exists() else None
    if not main or used is None:
        yield
        return

    begun = time.thread_time()

    # the timer counts what all threads do
    def stop(*_):
        if time.thread_time() - begun >= TEMPLATE_SECONDS:
            raise TimeoutError

    limits = [used + TEMPLATE_BYTES] + [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    before = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS, TEMPLATE_SECONDS / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def write(chat, tools, tokenizer, **how):
    """What the chat template makes of a chat. Raises Refused where it refuses it, UserError where it does so always."""
    template = template_of(tokenizer, tools)
    try:
        with _limits():
            text = tokenizer.apply_chat_template(
                [_with_thoughts(turn) for turn in chat], tools=tools, chat_template=template, tokenize=False, **how
            )
    except TimeoutError:
        raise UserError(f'the chat template does not end: it was stopped after {TEMPLATE_SECONDS} seconds') from None
    except MemoryError:
        raise UserError(f'the chat template takes more than {TEMPLATE_BYTES / 2**30:.0f} GiB for one chat') from None
    except Exception as error:  # templates are programs and raise what they like
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        if type(error).__name__ == 'TemplateSyntaxError':
            raise UserError(f'the chat template refuses all examples: it is not valid Jinja: {reason}') from None
        raise Refused(f'the chat template refuses an example: {reason}') from None
    if len(text) > 2 * LONGEST:
        raise UserError(f'the chat template makes {len(text):,} characters of one chat; {2 * LONGEST:,} are the limit')
    return text


def _with_thoughts(turn):
    """A message with its thoughts in both fields that templates look for, whichever they are in. (As transformers 5.23.)"""
    thoughts = next((turn[key] for key in REASONING if turn.get(key) is not None), None)
    return turn if thoughts is None else {'thinking': thoughts, **turn, 'reasoning_content': thoughts}


def _joined(prompt, answer):
    """A prompt and an answer as one chat; the answer goes on with what the prompt has begun of it."""
    begun = prompt[-1]
    if not answer or {begun['role'], answer[0]['role']} != {'assistant'}:
        return prompt + answer
    return [*prompt[:-1], {**begun, **answer[0], 'content': begun['content'] + answer[0]['content']}, *answer[1:]]


def _write_all(prompt, answers, tools, tokenizer, left_out):
    """The texts of a prompt that asks for an answer, and of the answers behind it. Raises Refused."""
    # with the header of an answer, or in the midst of the one that it has begun
    how = 'continue_final_message' if prompt[-1]['role'] == 'assistant' else 'add_generation_prompt'
    texts = [write(prompt, tools, tokenizer, **{how: True})]
    for answer in answers:
        whole = write(_joined(prompt, answer), tools, tokenizer)
        text = whole.removeprefix(texts[0])
        if not whole.startswith(texts[0]):
            text = _behind_a_thought(texts[0], whole, answer, left_out)
        texts.append(text.rstrip('\n'))
    return texts


def _behind_a_thought(start, whole, answer, left_out):
    """The text of an answer behind a prompt that opens a thought, where the template does not write it so.

    The answer's own thought, which may be empty, its end, and what the template writes of the rest. Raises Refused where
    that is not the difference."""
    opens = re.search(r'<([\w:]*think\w*|thought|reasoning)>\s*\Z', start)
    head = start[: opens.start()] if opens else None
    if head is None or not whole.startswith(head):
        asked = start[len(os.path.commonprefix([start, whole])) :][:60]
        wrong = 'the chat template writes an answered chat differently from the prompt it asks to continue'
        raise Refused(f'{wrong}: where that has {asked!r} it has something else')
    rest, end = whole[len(head) :], f'</{opens[1]}>'
    if rest.startswith(f'<{opens[1]}>'):  # it writes the thought, with other white space
        return rest.removeprefix(f'<{opens[1]}>').lstrip()

    # the template leaves the thought out, or there is none: in sampling it comes first all the same
    turn = answer[0]
    inline, mark, _ = turn['content'].rpartition(end)
    thought = next((turn[key] for key in REASONING if turn.get(key)), inline if mark else '')
    thought = str(thought).strip().removeprefix(f'<{opens[1]}>').strip()
    left_out[THOUGHTLESS] += not thought
    return f'{thought}\n{end}\n\n{rest.lstrip()}'


# ---- what the chat template does not write ----


def _unwritten(prompt, answers, tools, texts, tokenizer, left_out):
    """Count what the template does not write of a chat. Returns whether an answer says nothing that it writes."""

    def prompt_of(turns):
        return _write_all(turns, [], tools, tokenizer, Counter())[0]

    def answer_of(turns):
        return _write_all(prompt, [turns], tools, tokenizer, Counter())[1]

    blank = False
    for turns, text, write in zip([prompt, *answers], texts, [prompt_of] + [answer_of] * len(answers), strict=True):
        left_out['messages whose content the chat template changes or leaves out'] += sum(
            turn['content'].strip() not in text for turn in turns
        )
        count_fields(turns, text, write, left_out)
        bare = [message(turn['role'], turn['content']) for turn in turns]
        silent = turns is not prompt and not any(turn['content'].strip() for turn in turns)
        blank = blank or (silent and write(bare) == text)
    if tools:
        without = _write_all(prompt, [], None, tokenizer, Counter())[0]
        left_out['tools, which the chat template does not write'] += without == texts[0]
    return blank


def count_fields(turns, text, write, left_out):
    """Count the fields of messages that make no difference to the text."""

    def same(indices, name):
        less = [{k: v for k, v in turn.items() if k != name or i not in indices} for i, turn in enumerate(turns)]
        try:
            return write(less) == text
        except Refused:  # the template cannot do without
            return False

    for name in sorted({name for turn in turns for name in turn} - {'role', 'content'}):
        holders = [i for i, turn in enumerate(turns) if turn.get(name) not in (None, '', [], {})]
        if same(holders, name):
            missing = len(holders)
        else:
            missing = sum(same([i], name) for i in holders) if len(holders) > 1 else 0
        left_out[f'messages with {name!r}, which the chat template does not write'] += missing
