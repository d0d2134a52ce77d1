"""Read the texts and chats in a row's fields, whatever form they have, and convert texts to chats and back."""

import ast
import html
import json
import re
from contextlib import suppress
from copy import copy
from functools import lru_cache

LONGEST = 10_000_000  # most characters of a text, or of all messages of a chat
ASSISTANT = '\n\nAssistant:'
# the beginning of a chat that was written as JSON or as a Python literal, and a message anywhere in it
SERIALIZED_CHAT = re.compile(r"""\s*+(?:\[\s*+)?\{\s*["'](role|content|from|value|messages)["']:""")
SERIALIZED_ROLE = re.compile(r"""["'](role|from)["']:\s*["'](user|human|system|assistant|gpt)["']""")
REASONING = ('reasoning_content', 'thinking', 'reasoning')  # fields for a message's thoughts
# other names of the field 'weight', where they are true or false, 1 or 0 (AgentInstruct, axolotl, XTuner, slime)
TRAINS = 'loss train training train_on_turn need_calculate_loss trainable loss_mask step_loss_mask calculate_loss compute_loss'.split()
# fields with such names may say so, too, but not whether true or false is trained on
MASK = lru_cache(1000)(re.compile('mask|loss|train|learn|ignore|supervis|target|weights', re.IGNORECASE).search)
# fields that may stand in place of an answer's content (function_calls: OLMo 3)
BESIDE = ('tool_calls', 'function_calls', *REASONING)
# fields of an object with a question and its answer, and those of a message with who speaks, and what
EXCHANGES = 'input/output human/assistant user/assistant prompt/response question/answer query/response instruction/output'.split()
ROLE_FIELDS = 'role from speaker author sender'.split()  # from, value: ShareGPT; parts: Gemini
CONTENT_FIELDS = 'content value parts text message utterance'.split()
UNSPACED = re.compile('[\u3040-\u30ff\u3400-\u9fff]{2}')  # about one word, in languages without spaces
# columns, and fields of messages, that cannot be read: image_path, videos, audio_bytes, ...
MEDIA = lru_cache(1000)(
    re.compile('(image|img|video|audio)s?(_?(path|file|byte)s?)?|image_id|attachments', re.IGNORECASE).fullmatch
)
# a role as written, in lower case -> the role that chat templates know
ROLES = {name: role for role, names in {
    'user': 'user human prompter question',
    'assistant': 'assistant gpt chatgpt model bot chatbot ai bing bard function_call tool_call',
    'tool': 'tool observation tool_response function_response',
    'system': 'system', 'developer': 'developer', 'function': 'function', 'ipython': 'ipython',
}.items() for name in names.split()}  # fmt: skip
# speakers in a dialogue that is one text -> their role
ASKERS = 'human user prompter instruction 用户 问 ユーザー 사용자'.split()
REPLIERS = 'assistant ai bot chatbot gpt chatgpt model response 助手 答 アシスタント 어시스턴트'.split()
SPEAKERS = dict.fromkeys(ASKERS, 'user') | dict.fromkeys(REPLIERS, 'assistant') | {'system': 'system'}
# how such a text begins: a sign or none, a speaker, a colon; '### Human:', '<BOT>:', '**User:**' (group 2 is for these), 'User:'
# (signs are short, and what precedes the first # is skipped for good: a long row of signs would else take minutes)
BEGINNING = re.compile(rf'\s*?(?:Below is an instruction[^#]*+)?(\n\n|(\*\*)|[^\w\s]{{1,9}} ?|)(?:(system)|{"|".join(ASKERS)})'
                       r'( ?[^\w\s]{0,9}[:：](?(2)(?:\*\*)?))', re.IGNORECASE)  # fmt: skip


def _object(fields):
    """Return a JSON object of [(name, value)]. Raises LookupError if two have one name, of which json keeps the last alone."""
    found = dict(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        twice = next(name for name in names if names.count(name) > 1)
        raise LookupError(f'two fields of an object are called {twice[:24]!r}')
    return found


JSON = json.JSONDecoder(object_pairs_hook=_object)


class DoubtfulCode(ValueError):
    """A value that makes those of other rows doubtful, too: such rows cannot be left out one by one."""


def field(row, key, kind=str):
    """Return row[key], of the type kind. ValueError if it is missing, another type, over LONGEST, not finite, or no UTF-8."""
    # what is missing is of no type, not even None; bool is a subclass of int, and no number
    value = row.get(key, ...) if isinstance(row, dict) else ...
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f'{key!r} is missing or of the wrong type')
    # NaN fails every comparison
    if isinstance(value, int | float) and not abs(value) < 1e30:
        raise ValueError(f'{key!r} is not a finite number')
    if not isinstance(value, str | list):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > LONGEST:
        raise ValueError(f'{key!r} has {len(text):,} characters; the limit is {LONGEST:,}')
    # JSON can contain half a surrogate pair, which no tokenizer accepts
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'{key!r} has half a surrogate pair in it') from None
    return value


def text_or_chat(row, key):
    """Return row[key]: a string, or a list of messages as read_message returns them. Raises ValueError."""
    # the answer to a sum may be a number
    if key == 'answer' and isinstance(row.get(key), int | float):
        return str(field(row, key, int | float))
    value = field(row, key, (str, list))
    if are_texts(value, 1):
        [value] = value
    if isinstance(value, str):
        # as_messages has already parsed every chat that is complete
        if SERIALIZED_CHAT.match(value) and SERIALIZED_ROLE.search(value):
            raise ValueError(f'{key!r} begins as a chat in JSON does, and cannot be read as one')
        return value
    if are_texts(value):
        raise ValueError(f'{key!r} is a list of texts: write a row for each, or messages with a role and content')
    turns = [read_message(turn) for turn in value]
    if key == 'prompt' and not turns:
        raise ValueError("'prompt' has no messages")
    # all other keys are answers, which may be empty
    if key != 'prompt' and turns and turns[-1]['role'] != 'assistant':
        raise no_answer_error(key, turns[-1]['role'])
    return turns


def no_answer_error(key, last_role):
    """Return the ValueError for a chat that should end with an answer and ends with another role."""
    return ValueError(f'{key!r} does not end with an answer, but with a message of the role {last_role[:24]!r}')


def read_message(turn):
    """Return a copy of a message: 'role', 'content', other fields, 'weight': 0 of an untrained answer alone. Raises ValueError."""
    if not isinstance(turn, dict):
        no_object = 'a message is no object with a role and content'
        raise ValueError(f'{no_object}: write {{"role": "user", "content": TEXT}}, or a text in place of the list')
    if isinstance(turn.get('replies'), list | dict) and turn['replies']:
        raise ValueError("a message has 'replies': a tree in one row is not read, a row for each message is")
    turn = {key: value for key, value in turn.items() if value is not None}
    role_name = next((name for name in ROLE_FIELDS if name in turn), 'role')
    content_name = next((name for name in CONTENT_FIELDS if name in turn), 'content')
    our_names = {role_name: 'role', content_name: 'content'}
    turn = {our_names.get(key, key): value for key, value in turn.items()}
    written_role = field(turn, 'role')
    role = ROLES.get(written_role.strip().lower().replace(' ', '_').replace('-', '_'))
    # messages with 'role' may have roles of their own chat template
    if role_name != 'role' and role is None:
        raise ValueError(f'a message is from {written_role[:24]!r}; known are {", ".join(ROLES)}')
    role = role or written_role
    weight = turn.pop('weight', 1)
    if weight not in (0, 1):
        raise ValueError(f"the 'weight' of a message is {weight!r}: 1 is trained on, 0 is not, and there is no other")
    # TRAINS: other names of 'weight'; a field that is not true, false, 1 or 0 means something else, and stays
    for name in TRAINS:
        if turn.get(name) in (0, 1):
            weight = min(weight, turn.pop(name))
    if role == 'assistant' and not weight:
        turn['weight'] = 0
    if isinstance(turn.get('function_call'), dict):
        turn['tool_calls'] = [{'type': 'function', 'function': turn.pop('function_call')}]
    if isinstance(turn.get('tool_calls'), str):
        turn['tool_calls'] = parse_literal(turn['tool_calls'] or '[]')
        field(turn, 'tool_calls', list)  # raises an error if it is no list
    for name in turn:
        if MEDIA(name) and turn[name]:
            raise ValueError(f'{name!r} of a message would be lost: only text is read')
    # a message with a tool call or a thought (a field of BESIDE) needs no content
    if any(turn.get(key) for key in BESIDE):
        turn.setdefault('content', '')
    if isinstance(turn.get('content'), list):
        turn['content'] = ''.join(map(_text_of_part, turn['content']))
    return turn | message(role, field(turn, 'content'))


def _text_of_part(part):
    """Return the text of a part of a message's content: a string, or {'type': 'text', 'text': string}. Raises ValueError."""
    # what is neither a dict nor a string is rejected by field()
    part = part if isinstance(part, dict) else {'text': part}
    # Gemini flags thoughts
    kind = 'thought' if part.get('thought') else part.get('type')
    if kind not in (None, 'text', 'input_text', 'output_text'):
        raise ValueError(f'a message has a part of the type {str(kind)[:24]!r}, and only text is read')
    return field(part, 'text')


def has_words(text, count):
    """Return whether a text has at least `count` words; two characters of Chinese or Japanese in a row count as one."""
    return len(text.split()) >= count or len(UNSPACED.findall(text)) >= count


def as_list(value):
    """Return a list as it is, and any other value as a list of it."""
    return value if isinstance(value, list) else [value]


def are_texts(value, count=None):
    """Return whether a value is a non-empty list of strings, of length `count` if given."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(text, str) for text in value) and count in (None, len(value))


def as_messages(value, must_be_chat=False):
    """Return a chat in any form as a list of messages for read_message(); other values unchanged. must_be_chat: the column is
    known to hold chats, so that a text with speakers is one, too, or a list of texts, or of questions with answers."""
    if isinstance(value, str):
        value = _parse_chat(value, any_list=must_be_chat)
    if isinstance(value, dict) and value.keys() == {'messages'}:
        value = value['messages']
    # a list of messages that are each JSON
    if are_texts(value) and all(map(SERIALIZED_CHAT.match, value)):
        value = list(map(parse_literal, value))
    if isinstance(value, dict) and ('role' in value or 'from' in value):
        # {'role': [...], 'content': [...]}, a Sequence of `datasets`
        if all(isinstance(item, list) for item in value.values()):
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
        return [value]
    if not must_be_chat or not value:
        return value
    if isinstance(value, str):
        return dialogue(value) or value
    if are_texts(value):
        # perhaps each with its speaker: ['User: ...', 'Assistant: ...']
        return dialogue('\n'.join(value)) or alternating(value)
    # a question and its answer each
    if isinstance(value, list) and all(are_texts(exchange, 2) for exchange in value):
        return alternating(text for exchange in value for text in exchange)
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return _from_objects(value)
    return value


def _from_objects(parts):
    """Return the messages of objects that have each a question and its answer, or a text under the name of its role; else the objects."""
    # [{'user': question}, {'assistant': answer}, ...]
    if all(len(part) == 1 and ROLES.keys() >= part.keys() for part in parts):
        return [message(role, text) for part in parts for role, text in part.items()]
    for names in EXCHANGES:
        asks, replies = names.split('/')
        if not all({asks, replies} <= part.keys() for part in parts):
            continue
        # XTuner has the system message in the first exchange
        system = parts[0].get('system')
        turns = [message('system', system)] if system else []
        for exchange in parts:
            # the fields that say if the answer is trained on
            trains = {name: exchange[name] for name in TRAINS if name in exchange}
            turns += [message('user', exchange[asks]), message('assistant', exchange[replies]) | trains]
        return turns
    return parts


def _parse_chat(text, any_list):
    """Return the messages that a text holds in JSON or as a Python literal, or its list of strings; other text unchanged.

    any_list: try each text that begins with a bracket, not only those that begin with a message."""
    if not SERIALIZED_CHAT.match(text) and not (any_list and text.startswith('[')):
        return text
    parsed = parse_literal(text)
    turns = as_list(parsed)
    are_messages = all(map(_is_message, turns))
    return parsed if turns and (are_messages or are_texts(parsed)) else text


def _is_message(value):
    """Return whether a value is a message, or an object with messages, in any form."""
    if not isinstance(value, dict):
        return False
    forms = ('role content', 'role text', 'role parts', 'from value', 'messages')
    return any(value.keys() >= set(form.split()) for form in forms)


def parse_literal(text):
    """Return the value of a text in JSON or Python (pandas writes that to CSV), else None. Raises LookupError as _object does."""
    text = text.strip()
    for parse in (JSON.decode, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(text)
    # numpy prints an array of dicts without the commas between them
    with_commas = re.sub(r"\}\s+\{(?='(role|content|from|value)':)", '}, {', text)
    return parse_literal(with_commas) if with_commas != text else None


def ask(text):
    """Return a question as a prompt in Anthropic's format."""
    return '\n\nHuman: ' + text + ASSISTANT


def answer(text):
    """Return an answer as it follows ask()."""
    return ' ' + text.strip()


def message(role, text):
    return {'role': role, 'content': text}


def said(answer):
    """Return an answer as a list of messages: a text becomes one message of the assistant, a list stays."""
    return [message('assistant', answer.strip())] if isinstance(answer, str) else answer


def is_trained(turn):
    """Return whether a message is an answer that is trained on."""
    return turn['role'] == 'assistant' and turn.get('weight') != 0


def is_empty(answer):
    """Return whether an answer, text or chat, has no content, and no field of BESIDE in its place: a thought or tool call."""
    for turn in said(answer):
        if turn['content'].strip() or any(map(turn.get, BESIDE)):
            return False
    return True


def alternating(texts):
    """Return texts as messages of the user and the assistant in turn."""
    return [message('assistant' if i % 2 else 'user', text) for i, text in enumerate(texts)]


def dialogue(text):
    """Return the messages of a text that begins with a speaker who asks, and in which another one answers; [] of other texts."""
    first = BEGINNING.match(text)
    if first is None:
        return []
    sign = re.escape(first[1]) or r'(?:\A|\n)'  # a speaker without a sign stands at the beginning of a line
    colon = re.escape(first[4])
    speakers = re.findall(rf'(?i){sign}({"|".join(SPEAKERS)}){colon}', text)
    # the first speaker of each role: of others the text may speak
    names = {SPEAKERS[name.lower()]: name for name in reversed(speakers)}
    if not {'user', 'assistant'} <= names.keys():
        return []
    # 'System:' within a dialogue is a part of a text
    if not first[3]:
        names.pop('system', None)
    return split_dialogue(text, rf'{sign}({"|".join(names.values())}){colon}')


def split_dialogue(text, turn_pattern):
    """Return the messages of a dialogue in one text. turn_pattern: of the markers that begin a turn, with the speaker as group 1."""
    # [text before the first marker, speaker, text, speaker, text, ...]
    _, *parts = re.split(turn_pattern, text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [message(SPEAKERS[speaker.lower()], text.strip()) for speaker, text in turns]


def as_chat(prompt):
    """Return a prompt as a list of messages: a dialogue with speakers is split, other text is one question."""
    if not isinstance(prompt, str):
        return prompt
    # HelpSteer's dialogues have no marker before the first question
    if '<extra_id_1>' in prompt:
        return split_dialogue(f'<extra_id_1>User\n{prompt}', r'\s*<extra_id_1>(User|Assistant)\n')
    turn_pattern = r'\n\n(Human|Assistant):'
    if not re.match(rf'\s*?{turn_pattern}', prompt):
        # other speakers, and the marker of the answer to come
        turns = dialogue(prompt)
        return turns[:-1] if turns[-1:] == [message('assistant', '')] else [message('user', prompt)]
    turns = split_dialogue(prompt, turn_pattern)
    # the marker at the end, of the answer to come, is no message
    if turns[-1] == message('assistant', ''):
        turns.pop()
    return turns


def as_chats(example, system=None):
    """Return a copy of an example with all its texts as chats. system: a system message for a chat that has none."""
    example = copy(example)
    for key in example.keys() & {'chosen', 'rejected', 'response'}:
        example[key] = said(example[key])
    for key in example.keys() & {'prompt', 'turns'}:
        chat = as_chat(example[key])
        has_system = bool(chat) and chat[0]['role'] == 'system'
        if system and not has_system:
            chat = [message('system', system), *chat]
        example[key] = chat
    return example


def instruction(prompt):
    """Return a prompt, a text or messages, as AlpacaEval's instruction: its only question, or the whole dialogue as text."""
    if isinstance(prompt, str):
        text = prompt.removeprefix('\n\nHuman: ').removesuffix(ASSISTANT)
        # ask() gives the prompt back
        is_single_question = ask(text) == prompt and ASSISTANT not in text
        return text if is_single_question else prompt
    turns = [turn for turn in prompt if turn['role'] != 'system']
    if len(turns) == 1:
        return turns[0]['content']
    return '\n\n'.join(f'{turn["role"]}: {turn["content"]}' for turn in turns)


def strip_html(markup):
    """Return the text of HTML. Paragraphs, list items, line breaks and <code> tags stay, other tags are removed."""
    text = ''  # so far
    in_pre = False
    blocks = 'p pre ul ol blockquote div hr table tr h1 h2 h3 h4 h5 h6'.split()
    # a tag, with groups for its slash and name; quoted attributes may contain >
    tag_pattern = r"""<(/?)([a-zA-Z]\w*)(?:[^<>"']|"[^"]*"|'[^']*')*>"""
    without_comments = re.sub('(?s)<!--.*?-->', '', markup)
    # [slash, name, text after this tag, slash, name, ...]; the text before the first tag gets '', '' for slash and name
    pieces = ['', '', *re.split(tag_pattern, without_comments)]
    slashes, tags, texts = pieces[::3], pieces[1::3], pieces[2::3]
    for slash, tag, after in zip(slashes, tags, texts, strict=True):
        tag = tag.lower()
        if tag == 'pre':
            in_pre = not slash
        # a paragraph at the start of a list item stays on its line
        starts_item = not slash and text.endswith('\n- ')
        if tag in blocks and not starts_item:
            text = text.rstrip() + '\n\n'
        elif tag == 'li' and not slash:
            text = text.rstrip() + '\n- '
        text += {'code': f'<{slash}code>', 'br': '\n'}.get(tag, '')
        after = html.unescape(after)
        # collapse white space outside of <pre>: a space, or nothing behind other white space
        if not in_pre:
            after = re.sub(r'\s+', ' ', after)
            if text.endswith((' ', '\n')):
                after = after.lstrip()
        text += after
    return text.strip()
