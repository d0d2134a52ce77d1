"""Write chats as text with the tokenizer's chat template, and mark special tokens that came from the data.

A special token in the data must stay plain text. It is put between MARK and UNMARK, and encode_texts() of tokenise.py encodes
what stands between them as text. Special tokens that the template wrote are unmarked, and become tokens."""

import contextlib
import os
import re
import resource
import signal
import threading
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from text.messages import LONGEST, REASONING, ROLES, message

# for tokenizers without a chat template: Anthropic's format, as in the original DPO code
PLAIN_CHAT = (
    "{% for m in messages %}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' if m.role == 'assistant' else "
    "'\n\n' }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
# a chat template is a program from the hub, so its length, CPU time for one chat, and memory are limited
TEMPLATE_LENGTH, TEMPLATE_SECONDS, TEMPLATE_BYTES = 1_000_000, 20, 2**30
MARK, UNMARK = '\U000f0000', '\U000f0001'  # private-use characters around a special token that came from the data

NO_TEMPLATE = 'note: no chat template in the tokenizer, so chats are written as Human: / Assistant:'
KEPT = 'special tokens in a text, kept as text'
ENDED = 'answers that brought an end of turn: it is there once'
THOUGHTLESS = 'answers without a thought, behind a prompt that opens one: an empty thought'


class OutOfTime(BaseException):
    """Raised in a template that takes too long. No Exception, for Jinja catches those of what it computes beforehand."""


class Refused(Exception):
    """Raised for a row that the chat template cannot write; the message is the reason."""


def render(prompt, answers, tools, tokenizer, left_out, blank=False):
    """Return [prompt, *answers] as marked texts, or None if the template writes nothing of an answer. Raises Refused.

    prompt, answers: each a text or a list of messages. left_out: Counter of reasons, updated. blank: allow empty answers."""
    if all(isinstance(text, str) for text in (prompt, *answers)):
        left_out['tools beside texts, which only chats can have'] += bool(tools)
        texts = _mark_texts(prompt, answers, special_of(tokenizer), left_out)
    else:
        texts = _render_chats(prompt, answers, tools, tokenizer, left_out, blank)
    if texts is not None:
        left_out[KEPT] += sum(MARK in text for text in texts)
    return texts


def _render_chats(prompt, answers, tools, tokenizer, left_out, blank):
    """Return what render() returns, of chats: the prompt as the template writes it, and of an answer what it writes behind that."""
    # if only some are chats, texts become messages
    prompt = [message('user', prompt)] if isinstance(prompt, str) else prompt
    answers = [[message('assistant', text)] if isinstance(text, str) else text for text in answers]
    if not prompt:
        raise Refused('there is no message before the answer')
    # what looks like a special token in the data is marked
    special = special_of(tokenizer)
    prompt = marked(prompt, special, left_out)
    tools = special.mark(tools)
    answers = [marked(answer, special, left_out) for answer in answers]
    if template_of(tokenizer, tools) == PLAIN_CHAT:
        left_out[NO_TEMPLATE] = 1  # a flag, not a count
    # the prompt's text ends where an answer begins, or goes on if the last message is the assistant's
    has_begun = prompt[-1]['role'] == 'assistant'
    options = {'add_generation_prompt': not has_begun, 'continue_final_message': has_begun}
    write_prompt = partial(write, tools=tools, tokenizer=tokenizer, **options)
    prompt_text = write_prompt(prompt)
    texts = [_write_answer(prompt, answer, prompt_text, tools, tokenizer, left_out) for answer in answers]

    def write_other_answer(answer):
        # Counter(): the thoughts of the answers are counted already
        return _write_answer(prompt, answer, prompt_text, tools, tokenizer, Counter())

    count_unwritten(prompt, prompt_text, write_prompt, left_out, tools)
    for answer, text in zip(answers, texts, strict=True):
        count_unwritten(answer, text, write_other_answer, left_out)
        has_content = any(turn['content'].strip() for turn in answer)
        if blank or has_content:
            continue
        # the answer has only other fields, such as tool calls: it is empty if the template writes none of them
        content_only = [message(turn['role'], turn['content']) for turn in answer]
        if write_other_answer(content_only) == text:
            return None
    return [prompt_text, *texts]


class Special(NamedTuple):
    """A tokenizer's special tokens, as regular expressions."""

    any: re.Pattern
    stop: re.Pattern  # EOS or the end of a turn
    bos: str  # '' if the tokenizer has none

    def mark(self, value):
        """Return a JSON-like value with marks around the special tokens in its strings; existing marks are removed."""
        if isinstance(value, str):
            return self.any.sub(rf'{MARK}\g<0>{UNMARK}', value.replace(MARK, '').replace(UNMARK, ''))
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        return value

    def split(self, text):
        """Return (text without the stop tokens at its end, these tokens and the white space between them)."""
        tail = re.search(rf'(?:(?:{self.stop.pattern})\s*)+\Z', text)
        return (text[: tail.start()], tail[0]) if tail else (text, '')


def _any_of(words):
    """Return a pattern that matches any of the words, longest first."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile('|'.join(map(re.escape, longest_first)))


def special_of(tokenizer):
    """Return the Special of a tokenizer and its chat template, from a cache."""
    # the other arguments tell the cache if somebody has edited the tokenizer
    template = repr(tokenizer.chat_template)
    return _special_in(tokenizer, len(tokenizer), tokenizer.eos_token, tokenizer.bos_token, template)


@lru_cache(maxsize=8)
def _special_in(tokenizer, *_keys_of_cache):
    """Return the Special of a tokenizer: its special tokens, EOS, and the added tokens that the chat template writes."""
    added = tokenizer.added_tokens_decoder  # token id -> added token
    tokens = {token.content for token in added.values() if token.special} | {tokenizer.eos_token}
    stops = {tokenizer.eos_token}
    # some tokenizers do not flag their turn markers as special, so write a chat (without thoughts) and see which it has.
    # zebra: a word that no template has, to find the end of the turn behind it
    chat = [message('user', 'one'), message('assistant', 'zebra'), message('user', 'two')]
    # a broken template is reported later, and only if there are chats
    with contextlib.suppress(Refused, UserError):
        text = write(chat, None, tokenizer)
        written_ids = set(tokenizer(text, add_special_tokens=False)['input_ids'])
        written_tokens = {added[token_id].content for token_id in added.keys() & written_ids}
        tokens |= {content for content in written_tokens if content.strip()}
        _, _, after_answer = text.rpartition('zebra')
        end_of_turn = _any_of(tokens).match(after_answer.lstrip())
        if end_of_turn:
            stops.add(end_of_turn[0])
    return Special(_any_of(tokens), _any_of(stops), tokenizer.bos_token or '')


def _mark_texts(prompt, answers, special, left_out):
    """Return [prompt, *answers], all texts, with their special tokens marked, except a leading BOS and stops at the end."""
    bos = special.bos if prompt.startswith(special.bos) else ''
    prompt_body = prompt.removeprefix(bos)
    # a template has written a prompt (if empty: a first answer) that begins or ends with a special token: it means tokens
    begins_special = special.any.match(prompt_body or ''.join(answers[:1]))
    ends_special = re.search(rf'(?:{special.any.pattern})\s*\Z', prompt_body)
    is_formatted = bool(begins_special or ends_special)
    left_out['texts that begin or end with a special token: theirs are read as tokens'] += is_formatted
    # str leaves texts unchanged
    mark = str if is_formatted else special.mark
    texts = [bos + mark(prompt_body)]
    for answer in answers:
        body, stops = special.split(answer)
        # keep each stop token once, without line breaks
        kept_stops = ''.join(dict.fromkeys(special.stop.findall(stops)))
        left_out[ENDED] += stops != kept_stops
        texts.append(mark(body) + kept_stops)
    return texts


def marked(chat, special, left_out):
    """Return a chat with its special tokens (a Special) marked, and without stop tokens at the end of answers. Raises Refused."""
    turns = []
    for turn in chat:
        if special.any.search(turn['role']):
            raise Refused(f'there is a special token in the role {turn["role"][:60]!r}')
        # the template writes the end of the turn
        if turn['role'] == 'assistant':
            content, tail = special.split(turn['content'])
            left_out[ENDED] += bool(tail)
            turn = turn | {'content': content}
        turns.append(special.mark(turn))
    return turns


def template_of(tokenizer, tools=None):
    """Return the source of the chat template for a chat with these tools, or PLAIN_CHAT. Raises UserError."""
    if not tokenizer.chat_template:
        return PLAIN_CHAT
    try:
        template = tokenizer.get_chat_template(tools=tools or None)
    except ValueError:
        # a dict of templates without a default
        template = tokenizer.chat_template
    if isinstance(template, str) and len(template) <= TEMPLATE_LENGTH:
        return template
    expected = f'a text of at most {TEMPLATE_LENGTH:,} characters, or several with one of the name default'
    found = f'{type(template).__name__} of {len(str(template)):,} characters, {str(template)[:60]!r}'
    raise UserError(f"the tokenizer's chat template is not {expected}, but {found}: mend it in the model folder")


@contextlib.contextmanager
def _limits():
    """Raise OutOfTime or MemoryError in the body if it exceeds the CPU time or memory of a chat template."""
    memory_use = Path('/proc/self/statm')
    in_main_thread = threading.current_thread() is threading.main_thread()
    # no limits outside the main thread, where signals cannot be handled, and outside Linux
    if not in_main_thread or not memory_use.exists():
        yield
        return

    def raise_timeout(*_):
        raise OutOfTime

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # the template may add TEMPLATE_BYTES to the address space, whose size in pages is the first number
    num_pages = int(memory_use.read_text().split()[0])
    allowed = num_pages * resource.getpagesize() + TEMPLATE_BYTES
    if soft != resource.RLIM_INFINITY:
        allowed = min(allowed, soft)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    # the virtual timer counts CPU time
    old_handler = signal.signal(signal.SIGVTALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old_handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def write(chat, tools, tokenizer, **options):
    """Return a chat as text, written by the chat template. options: for apply_chat_template. Raises Refused if the template
    cannot write this chat, and UserError if it can write none, or exceeds a limit."""
    template = template_of(tokenizer, tools)
    options |= {'tools': tools, 'chat_template': template, 'tokenize': False}
    text = _apply_template(chat, tokenizer, options)
    if len(text) > 2 * LONGEST:
        raise UserError(f'the chat template writes {len(text):,} characters for one chat, more than {2 * LONGEST:,}')
    # a template knows a role that is not one of ROLES if it compares with it: the role stands in quotes there
    roles = {turn['role'] for turn in chat}.difference(ROLES.values())
    unquoted = []
    for role in sorted(roles):
        in_quotes = rf"""["']{re.escape(role)}["']"""
        if not re.search(in_quotes, template):
            unquoted.append(role)
    # or if it writes the role, which is then in the text of the chat without its contents
    if unquoted:
        without_contents = [turn | {'content': '-'} for turn in chat]
        text_without_contents = _apply_template(without_contents, tokenizer, options)
    for role in unquoted:
        if role not in text_without_contents:
            raise Refused(f'a message has the unknown role {role[:24]!r}; known are {", ".join(ROLES)}')
    return text


def _apply_template(chat, tokenizer, options):
    """Return apply_chat_template(chat, **options), within _limits(); errors as in write()."""
    turns = [with_thoughts(turn) for turn in chat]
    try:
        with _limits():
            return tokenizer.apply_chat_template(turns, **options)
    except OutOfTime:
        raise UserError(f'the chat template does not end: it was stopped after {TEMPLATE_SECONDS} seconds') from None
    except MemoryError:
        raise UserError(f'the chat template takes more than {TEMPLATE_BYTES / 2**30:.0f} GiB for one chat') from None
    # a template may raise any exception
    except Exception as error:
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        # no row can be written then
        if any(kind.__name__ == 'TemplateSyntaxError' for kind in type(error).__mro__):
            name, line = tokenizer.name_or_path, error.lineno
            raise UserError(f'the chat template of {name!r} has a mistake in line {line}: {reason}') from None
        raise Refused(f'the chat template refuses an example: {reason}') from None


def with_thoughts(turn):
    """Return a message with its thoughts in both fields that templates read, whichever of REASONING they stand in."""
    thoughts = next((turn[key] for key in REASONING if turn.get(key) is not None), None)
    if thoughts is None:
        return turn
    return {'thinking': thoughts, **turn, 'reasoning_content': thoughts}


def _write_answer(prompt, answer, prompt_text, tools, tokenizer, left_out):
    """Return an answer as the template writes it behind prompt_text, its text of the prompt; no line breaks at the end.

    Raises Refused if the text of the whole chat does not begin with prompt_text, except for a thought (<think>) that the
    prompt opens at its end: the answer is then the thought (left_out counts empty ones), its end tag, and the rest."""
    *earlier, last = prompt
    chat = prompt + answer
    # an answer that the prompt has begun becomes one message with its beginning
    if last['role'] == 'assistant' and answer and answer[0]['role'] == 'assistant':
        content = last['content'] + answer[0]['content']
        chat = [*earlier, {**last, **answer[0], 'content': content}, *answer[1:]]
    full_text = write(chat, tools, tokenizer)
    if full_text.startswith(prompt_text):
        return full_text.removeprefix(prompt_text).rstrip('\n')

    # prompt_text ends with an opened thought, and the whole chat is the same up to there
    tag = re.search(r'<([\w:]*think\w*|thought|reasoning)>\s*\Z', prompt_text)
    if not tag or not full_text.startswith(prompt_text[: tag.start()]):
        num_equal = len(os.path.commonprefix([prompt_text, full_text]))
        wrong = 'the chat template writes an answered chat differently from the prompt it asks to continue'
        raise Refused(f'{wrong}: where that has {prompt_text[num_equal:][:60]!r} it has something else')
    open_tag, end_tag = f'<{tag[1]}>', f'</{tag[1]}>'
    rest = full_text[tag.start() :]
    # the template writes the thought, only with other white space after the tag
    if rest.startswith(open_tag):
        return rest.removeprefix(open_tag).lstrip().rstrip('\n')
    # the template drops thoughts, but in sampling the model writes one first: add it back, from a field or the content
    first = answer[0]
    thought_in_content, _, _ = first['content'].rpartition(end_tag)
    thought = next((first[key] for key in REASONING if first.get(key)), thought_in_content)
    thought = str(thought).strip().removeprefix(open_tag).strip()
    left_out[THOUGHTLESS] += not thought
    return f'{thought}\n{end_tag}\n\n{rest.lstrip()}'.rstrip('\n')


def count_unwritten(turns, text, write_again, left_out, tools=None):
    """Count in left_out what the template does not write of messages, and of tools if given. text: of write_again(turns)."""
    num_changed = sum(turn['content'].strip() not in text for turn in turns)
    left_out['messages whose content the chat template changes or leaves out'] += num_changed
    tools_unwritten = bool(tools) and write_again(turns, tools=None) == text
    left_out['tools, which the chat template does not write'] += tools_unwritten

    def is_same_without(name, indices):
        """Return whether the text is the same without this field of the turns at these indices: it is not written."""
        reduced = [dict(turn) for turn in turns]
        for i in indices:
            del reduced[i][name]
        try:
            return write_again(reduced) == text
        # the template needs the field
        except Refused:
            return False

    names = {name for turn in turns for name in turn} - {'role', 'content'}
    for name in sorted(names):
        values = [turn.get(name) for turn in turns]
        unwritten = [i for i, value in enumerate(values) if value not in (None, '', [], {})]
        # usually the template writes this field of no message; if it does, try them one by one
        if not is_same_without(name, unwritten):
            unwritten = [i for i in unwritten if is_same_without(name, [i])]
        left_out[f'messages with {name!r}, which the chat template does not write'] += len(unwritten)


def puts_space(tokenizer):
    """Return whether a tokenizer puts a space before every text, as that of Llama 2 does."""
    ids = tokenizer('a', add_special_tokens=False)['input_ids']
    tokens = tokenizer.convert_ids_to_tokens(ids)
    # a space is '▁' in the tokens of SentencePiece, and 'Ġ' in byte-level ones
    return bool(tokens) and str(tokens[0]).startswith(('▁', 'Ġ'))


def decode_answer(ids, prompt_ids, tokenizer, **options):
    """Return an answer's text as it goes on behind its prompt: alone, it may lose a space at its beginning."""
    if not puts_space(tokenizer):
        return tokenizer.decode(ids, **options)
    prompt = tokenizer.decode(prompt_ids, **options)
    whole = tokenizer.decode([*prompt_ids, *ids], **options)
    # a prompt that is cut within a character is no beginning of the whole
    return whole.removeprefix(prompt) if whole.startswith(prompt) else tokenizer.decode(ids, **options)
