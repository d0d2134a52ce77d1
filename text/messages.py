"""Texts and chat messages: what is in a row's field, whatever it was written as, and how the one becomes the other."""

import ast
import json
import math
import re
from contextlib import suppress
from html.parser import HTMLParser

# characters of a text, or of all messages of a chat
LONGEST = 10_000_000
ASSISTANT = '\n\nAssistant:'
# how a chat in JSON begins, or in python's form, and what is in it
CHAT = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value|messages)["']:""")
CUT = re.compile(r"""["'](role|from)["']:\s*["'](user|human|system|assistant|gpt)["']""")
# numpy writes none between the items of an array
NO_COMMA = re.compile(r"\}\s+\{(?='(role|content|from|value)':)")
# the fields that a message's thoughts stand in
REASONING = ('reasoning_content', 'thinking', 'reasoning')
ROLES = {
    **dict.fromkeys(('user', 'human', 'prompter', 'question'), 'user'),
    **dict.fromkeys(('assistant', 'gpt', 'chatgpt', 'model', 'bot', 'chatbot', 'ai', 'bing', 'bard'), 'assistant'),
    **{role: role for role in ('system', 'developer', 'tool', 'function', 'ipython')},
    'observation': 'tool',
    'function_call': 'assistant',
}
# how a dialogue that is one text begins -> what begins its turns, and who speaks then
DIALOGUES = {
    '\n\nHuman:': r'\n\n(Human|Assistant):',
    '### Human:': r'### (Human|Assistant):',
    '### Instruction:': r'### (Instruction|Response):',
    'Below is an instruction': r'### (Instruction|Response):',
}
SPEAKERS = {'Human': 'user', 'Instruction': 'user', 'User': 'user', 'Assistant': 'assistant', 'Response': 'assistant'}

# ---- what is in a row ----


def field(row, key, kind=str):
    """row[key], which must be of this kind. Raises ValueError."""
    value = row.get(key, ...) if isinstance(row, dict) else ...
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):  # True is an int, for python
        raise ValueError(f'{key!r} is missing or of the wrong type')
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{key!r} is not a finite number')
    # json can write it, no tokenizer can read it
    if isinstance(value, str) and not _can_be_written(value):
        raise ValueError(f'{key!r} has half a surrogate pair in it')
    return value


def text_or_chat(row, key):
    """row[key]: a string, or a list of chat messages, which end with the assistant's where it is an answer."""
    value = field(row, key, (str, list))
    check_size(key, value)
    if isinstance(value, str):
        # whole ones are messages by now
        if CHAT.match(value) and CUT.search(value):
            raise ValueError(f'{key!r} begins as a chat in JSON does, and cannot be read as one')
        return value
    turns = [checked(turn) for turn in value]
    if key == 'prompt' and not turns:
        raise ValueError("'prompt' has no messages")
    if key != 'prompt' and turns and turns[-1]['role'] != 'assistant':
        role = turns[-1]['role'][:24]
        raise ValueError(f'{key!r} does not end with an answer, but with a message of the role {role!r}')
    return turns


def checked(turn):
    """A chat message with all its fields, its role by the name that templates know, and its weight only where it is 0."""
    role = field(turn, 'role')
    turn = {key: value for key, value in turn.items() if value is not None}

    # what only some messages have must be what it should be
    calls, weight = turn.get('tool_calls', []), turn.pop('weight', 1)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("'tool_calls' is not a list of calls")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(
            f"the 'weight' of a message is {weight!r}: 1 is trained on and 0 is not, and there is no other"
        )
    role = ROLES.get(role.strip().lower(), role)
    if role == 'assistant' and not weight:
        turn['weight'] = 0

    # a call, or a thought, may stand alone
    alone = 'content' not in turn and any(turn.get(key) for key in ('tool_calls', *REASONING))
    content = '' if alone else field(turn, 'content')
    return turn | message(role, content)


def check_size(key, value):
    """Raise ValueError for text, messages or tools that are too long or cannot be written."""
    plain = isinstance(value, str)
    if not plain and not all(isinstance(item, dict) for item in value):
        return  # what is wrong with them is said elsewhere
    text = value if plain else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > LONGEST:
        raise ValueError(f'{key!r} has {len(text):,} characters; the limit is {LONGEST:,}')
    if not plain and any(set(item) - {'role', 'content'} for item in value) and not _can_be_written(text):
        raise ValueError(f'{key!r} has half a surrogate pair in it')


def _can_be_written(text):
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def are_texts(value, count=None):
    """Whether this is a list of texts: of so many, or of any."""
    sound = isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
    return sound and count in (None, len(value))


# ---- any form of a chat ----


def as_messages(value, in_turn=False):
    """Any form of a chat as a list of {'role', 'content'}; anything else as it is.

    Forms: a list of {'from', 'value'}; a single message; these as JSON, or in {'messages'}; and, where this must be a chat
    (in_turn), texts, or {'input', 'output'}, of the user and the assistant in turn. Raises ValueError."""
    if isinstance(value, str) and (CHAT.match(value) or (in_turn and value.startswith('['))):
        value = _from_json(value)
    if isinstance(value, dict) and value.keys() == {'messages'}:
        value = value['messages']
    if isinstance(value, dict) and ('role' in value or 'from' in value):
        value = [value]
    if not isinstance(value, list):
        return value
    if in_turn and value and all(isinstance(turn, dict) and {'input', 'output'} <= turn.keys() for turn in value):
        value = [turn[side] for turn in value for side in ('input', 'output')]
    if in_turn and are_texts(value):
        return alternating(value)
    return [_as_message(turn) if isinstance(turn, dict) else turn for turn in value]


def _from_json(text):
    """The messages in a text, if it is JSON of such, or python's form, which pandas writes in a csv; else the text."""
    python = text.lstrip('[{ \n').startswith("'")
    value = None
    for form in (text.strip(), NO_COMMA.sub('}, {', text.strip())) if python else (text,):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(form) if python else json.loads(form)
            break
    turns = value if isinstance(value, list) else [value]
    forms = ({'role', 'content'}, {'from', 'value'}, {'messages'})
    sound = all(isinstance(turn, dict) and any(form <= turn.keys() for form in forms) for turn in turns)
    return value if turns and (sound or are_texts(turns)) else text


def _as_message(turn):
    """A message as {'role', 'content'}, where content that is a list of texts is one text."""
    if 'role' not in turn and isinstance(turn.get('from'), str) and 'value' in turn:
        if turn['from'].strip().lower() not in ROLES:
            raise ValueError(f'a message is from {turn["from"][:24]!r}; known are {", ".join(ROLES)}')
        more = {k: v for k, v in turn.items() if k not in ('from', 'value')}
        turn = {'role': turn['from'], 'content': turn['value'], **more}
    if isinstance(turn.get('content'), list) and 'role' in turn:
        turn = turn | {'content': ''.join(map(_text_of, turn['content']))}
    return turn


def _text_of(part):
    """The text of a part of a message's content: a string, or {'type': 'text', 'text'}."""
    if isinstance(part, str):
        return part
    kind = part.get('type') if isinstance(part, dict) else type(part).__name__
    if kind in (None, 'text') and isinstance(part.get('text'), str):
        return part['text']
    raise ValueError(f'a message has a part of the type {str(kind)[:24]!r}, and only text is read')


# ---- from texts to messages and back ----


def ask(text):
    return '\n\nHuman: ' + text + ASSISTANT


def answer(text):
    return ' ' + text.strip()


def message(role, text):
    return {'role': role, 'content': text}


def said(text):
    """An answer as a list of one message."""
    return [message('assistant', text.strip())]


def alternating(texts):
    """Texts as messages of the user and the assistant in turn."""
    return [message('assistant' if i % 2 else 'user', text) for i, text in enumerate(texts)]


def dialogue(text, marks):
    """The messages of a text whose turns begin with these marks, a regular expression; what precedes them is no turn."""
    _, *parts = re.split(marks, text)
    return [message(SPEAKERS[who], text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]


def as_chat(prompt):
    """A prompt, text or chat, as chat messages: the reverse of Human: / Assistant:, or else one user's message."""
    if not isinstance(prompt, str):
        return prompt
    # HelpSteer's longer prompts have marks behind the first question
    if '<extra_id_1>' in prompt:
        return dialogue(f'<extra_id_1>User\n{prompt}', r'\s*<extra_id_1>(User|Assistant)\n')
    marks = DIALOGUES['\n\nHuman:']
    before, *parts = re.split(marks, prompt)
    if before.strip() or not parts:
        return [message('user', prompt)]
    turns = dialogue(prompt, marks)
    return turns[:-1] if turns[-1] == message('assistant', '') else turns


def instruction(prompt):
    """What a prompt asks, as AlpacaEval has it: of a single question its text alone, else the whole dialogue."""
    if not isinstance(prompt, str):
        turns = [turn for turn in prompt if turn['role'] != 'system']
        return turns[0]['content'] if len(turns) == 1 else '\n\n'.join(f'{t["role"]}: {t["content"]}' for t in turns)
    text = prompt.removeprefix('\n\nHuman: ').removesuffix(ASSISTANT)
    return prompt if ASSISTANT in text or ask(text) != prompt else text


class Stripper(HTMLParser):
    """Strips HTML: .text keeps paragraphs, list items, <code> tags and the text of links; all other tags go."""

    blocks = {'p', 'pre', 'ul', 'ol', 'blockquote', 'div', 'hr', 'table', 'tr', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6'}
    text, pre = '', False

    def handle_starttag(self, tag, attrs):
        self.pre = self.pre or tag == 'pre'
        if tag in self.blocks and not self.text.endswith('\n- '):  # '\n- ': a paragraph may open a list item
            self.text = self.text.rstrip() + '\n\n'
        elif tag == 'li':
            self.text = self.text.rstrip() + '\n- '
        self.text += {'code': '<code>', 'br': '\n'}.get(tag, '')

    def handle_endtag(self, tag):
        self.pre = self.pre and tag != 'pre'
        self.text = self.text.rstrip() + '\n\n' if tag in self.blocks else self.text + '</code>' * (tag == 'code')

    def handle_data(self, data):
        if not self.pre:  # outside code blocks, white space means nothing
            data = re.sub(r'\s+', ' ', data)
            data = data.lstrip() if self.text[-1:] in ('', ' ', '\n') else data
        self.text += data


def strip_html(html):
    """The text of HTML. Raises ValueError where it cannot be read."""
    stripper = Stripper()
    try:
        stripper.feed(html)
        stripper.close()
    except AssertionError as error:  # the library's word for what it cannot read
        raise ValueError(f'broken HTML ({error})') from None
    return stripper.text.strip()
