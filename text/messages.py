"""Texts and chat messages: what is in a row's field, whatever it was written as, and how the one becomes the other."""

import ast
import html
import json
import re
from contextlib import suppress
from copy import copy

# characters of a text, or of all messages of a chat
LONGEST = 10_000_000
ASSISTANT = '\n\nAssistant:'
# how a chat in JSON begins, or in python's form, and what is in it
CHAT = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value|messages)["']:""")
CUT = re.compile(r"""["'](role|from)["']:\s*["'](user|human|system|assistant|gpt)["']""")
# a question and its answer in one object
EXCHANGES = (('input', 'output'), ('human', 'assistant'))
# the fields that a message's thoughts stand in
REASONING = ('reasoning_content', 'thinking', 'reasoning')
# what an answer may have beside its content, or in its place
BESIDE = ('tool_calls', *REASONING)
ROLES = {name: role for role, names in {
    'user': 'user human prompter question',
    'assistant': 'assistant gpt chatgpt model bot chatbot ai bing bard function_call',
    'tool': 'tool observation',
    'system': 'system', 'developer': 'developer', 'function': 'function', 'ipython': 'ipython',
}.items() for name in names.split()}  # fmt: skip
# how a dialogue that is one text begins -> what begins its turns, and who speaks then
DIALOGUES = {
    '\n\nHuman:': r'\n\n(Human|Assistant):',
    '### Human:': r'### (Human|Assistant):',
    '### Instruction:': r'### (Instruction|Response):',
    'Below is an instruction': r'### (Instruction|Response):',
}
# an HTML tag's slash and name; quotes in it may hold a >
TAG = re.compile(r"""<(/?)([a-zA-Z]\w*)(?:[^<>"']|"[^"]*"|'[^']*')*>""")
BLOCKS = {'p', 'pre', 'ul', 'ol', 'blockquote', 'div', 'hr', 'table', 'tr', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6'}

# ---- what is in a row ----


def field(row, key, kind=str):
    """row[key], which must be of this kind. Raises ValueError; also for texts and lists too long or impossible to write."""
    value = row.get(key, ...) if isinstance(row, dict) else ...
    # True is an int, for python
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f'{key!r} is missing or of the wrong type')
    if isinstance(value, int | float) and not abs(value) < 1e30:
        raise ValueError(f'{key!r} is not a finite number')
    if not isinstance(value, str | list):
        return value

    # json can write half a surrogate pair, and no tokenizer can read it
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > LONGEST:
        raise ValueError(f'{key!r} has {len(text):,} characters; the limit is {LONGEST:,}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'{key!r} has half a surrogate pair in it') from None
    return value


def text_or_chat(row, key):
    """row[key]: a string, or a list of chat messages, which end with the assistant's where it is an answer."""
    value = field(row, key, (str, list))
    if isinstance(value, str):
        # whole ones are messages by now
        if CHAT.match(value) and CUT.search(value):
            raise ValueError(f'{key!r} begins as a chat in JSON does, and cannot be read as one')
        return value
    turns = [checked(turn) for turn in value]
    last = turns[-1]['role'] if turns else 'none'
    if key == 'prompt' and not turns:
        raise ValueError("'prompt' has no messages")
    if key != 'prompt' and last not in ('assistant', 'none'):
        raise ValueError(f'{key!r} does not end with an answer, but with a message of the role {last[:24]!r}')
    return turns


def checked(turn):
    """A chat message as {'role', 'content'} with all its other fields, and its weight only where it is 0. Raises ValueError.

    Its role gets the name that templates know. It may be written as {'from', 'value'}, its content as a list of texts."""
    if not isinstance(turn, dict):
        raise ValueError('a message is no object with a role and content')
    names = {'from': 'role', 'value': 'content'} if turn.get('role') is None else {}
    if 'text' in turn and not names and turn.get('content') is None:
        names = {'text': 'content'}
    turn = {names.get(key, key): value for key, value in turn.items() if value is not None}
    role = field(turn, 'role')
    if names and role.strip().lower() not in ROLES:
        raise ValueError(f'a message is from {role[:24]!r}; known are {", ".join(ROLES)}')
    role = ROLES.get(role.strip().lower(), role)
    weight = turn.pop('weight', 1)
    if weight not in (0, 1):
        raise ValueError(f"the 'weight' of a message is {weight!r}: 1 is trained on, 0 is not, and there is no other")
    if role == 'assistant' and not weight:
        turn['weight'] = 0

    # a call, or a thought, may stand alone
    if any(turn.get(key) for key in BESIDE):
        turn.setdefault('content', '')
    if isinstance(turn.get('content'), list):
        turn['content'] = ''.join(map(_text_of, turn['content']))
    return turn | message(role, field(turn, 'content'))


def _text_of(part):
    """The text of a part of a message's content: a string, or {'type': 'text', 'text'}."""
    part = part if isinstance(part, dict) else {'text': part}
    if part.get('type') not in (None, 'text'):
        raise ValueError(f'a message has a part of the type {str(part["type"])[:24]!r}, and only text is read')
    return field(part, 'text')


def are_texts(value, count=None):
    """Whether this is a list of texts: of so many, or of any."""
    sound = isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
    return sound and count in (None, len(value))


# ---- any form of a chat ----


def as_messages(value, in_turn=False):
    """Any form of a chat as a list of messages, which checked() takes; anything else as it is.

    Forms: a single message; messages as JSON, or in {'messages'}; and, where this must be a chat (in_turn), texts, or
    EXCHANGES, of the user and the assistant in turn."""
    if isinstance(value, str) and (CHAT.match(value) or (in_turn and value.startswith('['))):
        value = _from_json(value)
    if isinstance(value, dict) and value.keys() == {'messages'}:
        value = value['messages']
    if isinstance(value, dict) and ('role' in value or 'from' in value):
        value = [value]
    if not in_turn or not isinstance(value, list):
        return value
    for sides in EXCHANGES:
        if value and all(isinstance(turn, dict) and set(sides) <= turn.keys() for turn in value):
            # XTuner has the system message in the first one
            begin = [message('system', value[0]['system'])] if value[0].get('system') else []
            return begin + alternating([turn[side] for turn in value for side in sides])
    return alternating(value) if are_texts(value) else value


def loaded(text):
    """What a text says in JSON, or in python's form, which pandas writes in a csv; None where it is neither."""
    # numpy writes no comma between the items of an array
    with_commas = re.sub(r"\}\s+\{(?='(role|content|from|value)':)", '}, {', text)
    for read, form in ((json.loads, text), (ast.literal_eval, text), (ast.literal_eval, with_commas)):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(form.strip())


def _from_json(text):
    """The messages in a text, if it is JSON of such; else the text."""
    value = loaded(text)
    turns = value if isinstance(value, list) else [value]
    forms = ({'role', 'content'}, {'from', 'value'}, {'messages'})
    sound = all(isinstance(turn, dict) and any(form <= turn.keys() for form in forms) for turn in turns)
    return value if turns and (sound or are_texts(turns)) else text


# ---- from texts to messages and back ----


def ask(text):
    return '\n\nHuman: ' + text + ASSISTANT


def answer(text):
    return ' ' + text.strip()


def message(role, text):
    return {'role': role, 'content': text}


def said(answer):
    """An answer as a list of messages: a text is one."""
    return [message('assistant', answer.strip())] if isinstance(answer, str) else answer


def is_trained(turn):
    """Whether a message is an answer that is trained on."""
    return turn['role'] == 'assistant' and turn.get('weight') != 0


def is_empty(answer):
    """Whether an answer, text or chat, neither says nor thinks anything, nor calls a tool."""
    return not any(turn['content'].strip() or any(turn.get(key) for key in BESIDE) for turn in said(answer))


def alternating(texts):
    """Texts as messages of the user and the assistant in turn."""
    return [message('assistant' if i % 2 else 'user', text) for i, text in enumerate(texts)]


def dialogue(text, marks):
    """The messages of a text whose turns begin with these marks, a regular expression; what precedes them is no turn."""
    _, *parts = re.split(marks, text)
    roles = ['assistant' if who in ('Assistant', 'Response') else 'user' for who in parts[::2]]
    return [message(role, text.strip()) for role, text in zip(roles, parts[1::2], strict=True)]


def as_chat(prompt):
    """A prompt, text or chat, as chat messages: the reverse of Human: / Assistant:, or else one user's message."""
    if not isinstance(prompt, str):
        return prompt
    # HelpSteer's longer prompts have marks behind the first question
    if '<extra_id_1>' in prompt:
        return dialogue(f'<extra_id_1>User\n{prompt}', r'\s*<extra_id_1>(User|Assistant)\n')
    marks = DIALOGUES['\n\nHuman:']
    turns = dialogue(prompt, marks)
    if not turns or re.split(marks, prompt)[0].strip():
        return [message('user', prompt)]
    return turns[:-1] if turns[-1] == message('assistant', '') else turns


def as_chats(example, system=None):
    """A copy of an example whose texts are chats, behind a system message if there is one and it has none."""
    example = copy(example)
    for key in ('chosen', 'rejected', 'response'):
        if key in example:
            example[key] = said(example[key])
    for key in ('prompt', 'turns'):
        if key in example:
            chat = as_chat(example[key])
            begins = bool(chat) and chat[0]['role'] == 'system'
            example[key] = chat if begins or not system else [message('system', system), *chat]
    return example


def instruction(prompt):
    """What a prompt asks, as AlpacaEval has it: of a single question its text alone, else the whole dialogue."""
    if isinstance(prompt, str):
        text = prompt.removeprefix('\n\nHuman: ').removesuffix(ASSISTANT)
        return text if ask(text) == prompt and ASSISTANT not in text else prompt
    turns = [turn for turn in prompt if turn['role'] != 'system']
    return turns[0]['content'] if len(turns) == 1 else '\n\n'.join(f'{t["role"]}: {t["content"]}' for t in turns)


def strip_html(markup):
    """The text of HTML: paragraphs, list items, <code> tags and the text of links; all other tags go."""
    text, in_pre = '', False
    before, *pieces = TAG.split(re.sub('(?s)<!--.*?-->', '', markup))
    slashes, tags, texts = ['', *pieces[::3]], ['', *map(str.lower, pieces[1::3])], [before, *pieces[2::3]]
    for slash, tag, data in zip(slashes, tags, texts, strict=True):
        if tag == 'pre':
            in_pre = not slash
        # a paragraph may open a list item
        if tag in BLOCKS and (slash or not text.endswith('\n- ')):
            text = text.rstrip() + '\n\n'
        elif tag == 'li' and not slash:
            text = text.rstrip() + '\n- '
        text += {'code': f'<{slash}code>', 'br': '\n'}.get(tag, '')

        # outside code blocks, white space means nothing
        data = html.unescape(data)
        if not in_pre:
            data = re.sub(r'\s+', ' ', data)
            data = data.lstrip() if text[-1:] in ('', ' ', '\n') else data
        text += data
    return text.strip()
