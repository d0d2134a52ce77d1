"""From texts and chats to what the tokenizer reads: the chat template, and the special tokens that somebody has written.

A special token that somebody has written into a text is text. It is put between two marks, and ids.py encodes what stands
between them as text. Elsewhere the tokenizer finds its special tokens, as the template wrote them."""

import contextlib
import os
import re
import resource
import signal
import threading
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from text.messages import REASONING, message

PLAIN_CHAT = (  # for tokenizers without a chat template: Anthropic's format, as in the original DPO code
    "{% for m in messages %}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' if m.role == 'assistant' else "
    "'\n\n' }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
# a chat template is a program that came with the model: its length, the time of all processors for one chat, and the memory
TEMPLATE_LENGTH, TEMPLATE_SECONDS, TEMPLATE_BYTES = 1_000_000, 20, 2**30
# before and behind a special token that is text: characters for private use, which no text has
MARK, UNMARK = '\U000f0000', '\U000f0001'

NO_TEMPLATE = 'note: no chat template in the tokenizer, so chats are written as Human: / Assistant:'
KEPT = 'special tokens in a text, kept as text'
ENDED = 'answers that brought an end of turn: it is there once'
THOUGHTLESS = 'answers without a thought, behind a prompt that opens one: an empty thought'


class Refused(Exception):
    """What is wrong with one row, so that the chat template cannot write it."""


def render(prompt, answers, tools, tokenizer, left_out, blank=False):
    """Prompt and answers as marked texts; None where an answer says nothing that the template writes (unless blank may be).

    Texts are as they are. Of chats, prompt and answer are what the template makes of the whole, with four differences:
    prompt and answer become tokens apart, as in sampling; line breaks that a template writes after the end of a turn are
    not part of the answer; tokenise adds the end of text where the template ends a turn with something else, or with
    nothing; and where the template's prompt opens a thought, an answer without one closes it. Raises Refused."""
    special = special_of(tokenizer)
    if isinstance(prompt, str) and all(isinstance(text, str) for text in answers):
        left_out['tools beside texts, which only chats can have'] += bool(tools)
        texts = _plain(prompt, answers, special, left_out)
        left_out[KEPT] += sum(MARK in text for text in texts)
        return texts

    # a text beside chats is a user's, or the assistant's, message
    prompt = [message('user', prompt)] if isinstance(prompt, str) else prompt
    answers = [[message('assistant', text)] if isinstance(text, str) else text for text in answers]
    prompt, tools = marked(prompt, special, left_out), special.mark(tools)
    answers = [marked(answer, special, left_out) for answer in answers]
    if template_of(tokenizer, tools) == PLAIN_CHAT:
        left_out[NO_TEMPLATE] = 1
    texts = _write_all(prompt, answers, tools, tokenizer, left_out)

    # count what the template does not write
    def prompt_again(turns, tools):
        return _write_all(turns, [], tools, tokenizer, Counter())[0]

    def answer_again(turns, _=None):
        return _write_all(prompt, [turns], tools, tokenizer, Counter())[1]

    count_unwritten(prompt, tools, texts[0], prompt_again, left_out)
    for turns, text in zip(answers, texts[1:], strict=True):
        count_unwritten(turns, None, text, answer_again, left_out)
        if blank or any(turn['content'].strip() for turn in turns):
            continue
        bare = [message(turn['role'], turn['content']) for turn in turns]
        if answer_again(bare) == text:
            return None
    left_out[KEPT] += sum(MARK in text for text in texts)
    return texts


# ---- special tokens that somebody has written ----


class Special(NamedTuple):
    """A tokenizer's special tokens, as regular expressions."""

    any: re.Pattern
    stop: re.Pattern  # one that ends a turn or a text
    tail: re.Pattern  # those at a text's end
    bos: str

    def mark(self, value):
        """A json-able value with marks around the special tokens in its strings; marks that it has are taken out."""
        if isinstance(value, str):
            return self.any.sub(rf'{MARK}\g<0>{UNMARK}', value.replace(MARK, '').replace(UNMARK, ''))
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        return value

    def split(self, text):
        """(a text, the ends of turn behind it)"""
        tail = self.tail.search(text)
        return (text[: tail.start()], tail[0]) if tail else (text, '')


def _any_of(words):
    """A regular expression of any of these words, the longest first; of no words, of nothing."""
    return re.compile('|'.join(map(re.escape, sorted(words, key=len, reverse=True))) or '(?!)')


def special_of(tokenizer):
    """The Special of a tokenizer and its chat template."""
    template = repr(tokenizer.chat_template)
    return _special_in(tokenizer, len(tokenizer), tokenizer.eos_token, tokenizer.bos_token, template)


@lru_cache(maxsize=8)
def _special_in(tokenizer, *_):
    added = tokenizer.added_tokens_decoder
    tokens = {token.content for token in added.values() if token.special} | {tokenizer.eos_token}
    stops = {tokenizer.eos_token}
    # what the template writes around turns is special too, whatever the tokenizer says; a thought's marks are not
    chat = [message('user', 'one'), message('assistant', 'zebra'), message('user', 'two')]
    # a template that is of no use is named where there is a chat that needs it
    with contextlib.suppress(Refused, UserError):
        text = write(chat, None, tokenizer)
        written = set(tokenizer(text, add_special_tokens=False)['input_ids'])
        tokens |= {token.content for i, token in added.items() if i in written and token.content.strip()}
        behind = _any_of(tokens).match(text.rpartition('zebra')[2].lstrip())
        if behind:
            stops.add(behind[0])
    stop = _any_of(stops)
    return Special(_any_of(tokens), stop, re.compile(rf'(?:(?:{stop.pattern})\s*)+\Z'), tokenizer.bos_token or '')


def _plain(prompt, answers, special, left_out):
    """A prompt and answers that are texts, marked: a BOS before the prompt and ends behind the answers stay tokens.

    So do all where the prompt (or, without one, the answer) begins or ends with one: then a chat template, or its author,
    has written them."""
    bos = special.bos if prompt.startswith(special.bos) else ''
    body = prompt.removeprefix(bos)
    written = special.any.match(body or ''.join(answers[:1])) or re.search(rf'(?:{special.any.pattern})\s*\Z', body)
    left_out['texts that begin or end with a special token: theirs are read as tokens'] += bool(written)
    mark = str if written else special.mark

    texts = [bos + mark(body)]
    for answer in answers:
        body, tail = special.split(answer)
        # each end once, and no line breaks between or behind them
        end = ''.join(dict.fromkeys(special.stop.findall(tail)))
        left_out[ENDED] += tail != end
        texts.append(mark(body) + end)
    return texts


def marked(chat, special, left_out):
    """The messages of a chat, marked; the assistant's without the end of turn that the template writes once more."""
    turns = []
    for turn in chat:
        if special.any.search(turn['role']):
            raise Refused(f'there is a special token in the role {turn["role"][:60]!r}')
        if turn['role'] == 'assistant':
            content, tail = special.split(turn['content'])
            left_out[ENDED] += bool(tail)
            turn = turn | {'content': content}
        turns.append(special.mark(turn))
    return turns


# ---- the chat template ----


def template_of(tokenizer, tools=None):
    """The text of the chat template that applies to a chat with or without tools. Raises UserError where there is none."""
    if not tokenizer.chat_template:
        return PLAIN_CHAT
    try:
        found = tokenizer.get_chat_template(tools=tools or None)
    except ValueError:
        found = tokenizer.chat_template  # several, none of the name default
    if isinstance(found, str) and len(found) <= TEMPLATE_LENGTH:
        return found
    wanted = f'a text of at most {TEMPLATE_LENGTH:,} characters, or several with one of the name default'
    there = f'{type(found).__name__} of {len(str(found)):,} characters, {str(found)[:60]!r}'
    raise UserError(f"the tokenizer's chat template is not {wanted}, but {there}: mend it in the model folder")


@contextlib.contextmanager
def _limits():
    """Raise TimeoutError or MemoryError in what takes longer, or more memory, than a chat template may.

    Threads other than the main one have no limit, nor has anything outside Linux."""
    table = Path('/proc/self/statm')  # its first number: pages of memory
    if threading.current_thread() is not threading.main_thread() or not table.exists():
        yield
        return

    def stop(*_):
        raise TimeoutError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = int(table.read_text().split()[0]) * resource.getpagesize() + TEMPLATE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (allowed if soft == resource.RLIM_INFINITY else min(allowed, soft), hard))
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def write(chat, tools, tokenizer, **how):
    """What the chat template makes of a chat. Raises Refused where it refuses it, UserError where it does so always."""
    template, chat = template_of(tokenizer, tools), [with_thoughts(turn) for turn in chat]
    try:
        with _limits():
            return tokenizer.apply_chat_template(chat, tools=tools, chat_template=template, tokenize=False, **how)
    except TimeoutError:
        raise UserError(f'the chat template does not end: it was stopped after {TEMPLATE_SECONDS} seconds') from None
    except MemoryError:
        raise UserError(f'the chat template takes more than {TEMPLATE_BYTES / 2**30:.0f} GiB for one chat') from None
    except Exception as error:  # templates are programs and raise what they like
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise Refused(f'the chat template refuses an example: {reason}') from None


def with_thoughts(turn):
    """A message with its thoughts in both fields that templates look for, whichever they are in."""
    thoughts = next((turn[key] for key in REASONING if turn.get(key) is not None), None)
    return turn if thoughts is None else {'thinking': thoughts, **turn, 'reasoning_content': thoughts}


def _write_all(prompt, answers, tools, tokenizer, left_out):
    """The texts of a prompt that asks for an answer, and of the answers behind it. Raises Refused."""
    # with the header of an answer, or in the midst of the one that it has begun
    *before, last = prompt
    begun = last['role'] == 'assistant'
    asked = write(prompt, tools, tokenizer, add_generation_prompt=not begun, continue_final_message=begun)
    texts = [asked]
    for answer in answers:
        chat = prompt + answer
        if begun and answer and answer[0]['role'] == 'assistant':
            joined = last | answer[0] | {'content': last['content'] + answer[0]['content']}
            chat = [*before, joined, *answer[1:]]
        whole = write(chat, tools, tokenizer)
        text = whole.removeprefix(asked) if whole.startswith(asked) else _thought(asked, whole, answer, left_out)
        texts.append(text.rstrip('\n'))
    return texts


def _thought(asked, whole, answer, left_out):
    """The text of an answer behind a prompt that opens a thought, where the template does not write it so: the answer's own
    thought, which may be empty, its end, and what the template writes of the rest. Raises Refused where all else differs."""
    opens = re.search(r'<([\w:]*think\w*|thought|reasoning)>\s*\Z', asked)
    if not opens or not whole.startswith(asked[: opens.start()]):
        differs = asked[len(os.path.commonprefix([asked, whole])) :][:60]
        wrong = 'the chat template writes an answered chat differently from the prompt it asks to continue'
        raise Refused(f'{wrong}: where that has {differs!r} it has something else')
    begin, end, rest = f'<{opens[1]}>', f'</{opens[1]}>', whole[opens.start() :]
    # it writes the thought, with other white space
    if rest.startswith(begin):
        return rest.removeprefix(begin).lstrip()
    # the template leaves the thought out, or there is none: in sampling it comes first all the same
    inline, _, _ = answer[0]['content'].rpartition(end)
    thought = next((answer[0][key] for key in REASONING if answer[0].get(key)), inline)
    thought = str(thought).strip().removeprefix(begin).strip()
    left_out[THOUGHTLESS] += not thought
    return f'{thought}\n{end}\n\n{rest.lstrip()}'


def count_unwritten(turns, tools, text, write_again, left_out):
    """Count the contents that are not in the text, and the fields of messages, and tools, that make no difference to it.

    write_again(turns, tools) -> the text of others."""
    changed = sum(turn['content'].strip() not in text for turn in turns)
    left_out['messages whose content the chat template changes or leaves out'] += changed
    left_out['tools, which the chat template does not write'] += bool(tools) and write_again(turns, None) == text

    def same_without(name, holders):
        less = [{k: v for k, v in turn.items() if k != name or i not in holders} for i, turn in enumerate(turns)]
        try:
            return write_again(less, tools) == text
        except Refused:  # the template cannot do without
            return False

    # usually it writes a field of all messages, or of none
    for name in sorted({name for turn in turns for name in turn} - {'role', 'content'}):
        holders = [i for i, turn in enumerate(turns) if turn.get(name) not in (None, '', [], {})]
        if not same_without(name, holders):
            holders = [i for i in holders if same_without(name, [i])]
        left_out[f'messages with {name!r}, which the chat template does not write'] += len(holders)
