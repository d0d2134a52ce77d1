"""Columns and messages as people have them -> prompt and answers. A new layout is one row of LAYOUTS and one function.

A function reads a normalised row (see unified) and returns a list of examples, as sources.py describes them. It raises
ValueError for a row that is not what it should be, and LeftOut(reason) for a sound one that a rule leaves out. Texts are
strings in Anthropic's format ('\\n\\nHuman: ...\\n\\nAssistant:', then ' answer') or lists of chat messages."""

import json
import math
import os
import re

NUMBER = (int, float)
# characters of a text, or of all messages of a chat
LONGEST = 10_000_000
DIFFERENT = 'chosen and rejected have different prompts'

# ---- the names that people use ----

ASSISTANT = '\n\nAssistant:'
# the columns that may ask: the first one there is
QUESTIONS = ('prompt', 'question', 'instruction', 'query', 'input')
# what an instruction or a question is about, written behind it
ADDED = ('input', 'context')
ANSWERS = ('response', 'completion', 'output', 'answer')
CHATS = ('messages', 'conversations', 'conversation')
LABELS = ('good', 'label')
# where a null is not the same as no such column
NULL_SAYS = (*LABELS, 'preference', 'output_1')
# the fields that a message's thoughts stand in
REASONING = ('reasoning_content', 'thinking', 'reasoning')
ROLES = {
    **dict.fromkeys(('user', 'human', 'prompter', 'question'), 'user'),
    **dict.fromkeys(('assistant', 'gpt', 'chatgpt', 'model', 'bot', 'chatbot', 'ai'), 'assistant'),
    **{role: role for role in ('system', 'developer', 'tool', 'function', 'ipython')},
}
# behind the last of these, in a text, stands the answer; the first that a pair has is taken
TURN_MARKERS = (
    ASSISTANT,
    '<|im_start|>assistant\n',
    '<|start_header_id|>assistant<|end_header_id|>\n\n',
    '<start_of_turn>model\n',
    '<|assistant|>\n',
    '[/INST]',
    '### Assistant:',
    '### Response:',
    '\nAssistant:',
    ' ASSISTANT:',
    '\nAnswer:',
    '\nA:',
    '\nTL;DR:',
)


class LeftOut(Exception):
    """A sound row that a rule leaves out: its message is the reason."""


# ---- any row ----


def parse_any(row):
    """The examples of a row in any layout that LAYOUTS knows, told apart by its columns: the first that fits."""
    row = unified(row)
    read = next((read for columns, read in LAYOUTS if columns <= row.keys()), None)
    if read is None:
        raise ValueError("'prompt' is missing, and no other column is known")
    try:
        return [example if 'drop' in example else _complete(example, row) for example in read(row)]
    except LeftOut as reason:
        return [{'drop': str(reason)}]


def unified(row):
    """A row without nulls, where a chat is a list of {'role', 'content'}, whatever it was written as.

    A null stays in columns where it says something, such as that nobody has labelled an answer, or preferred one."""
    return {key: _as_messages(value) for key, value in row.items() if value is not None or key in NULL_SAYS}


def _as_messages(value):
    """A list of {'from', 'value'}, or a single message, as a list of {'role', 'content'}; anything else as it is."""
    if isinstance(value, dict) and ('role' in value or 'from' in value):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_as_message(turn) if isinstance(turn, dict) and 'role' not in turn else turn for turn in value]


def _as_message(turn):
    if not isinstance(turn.get('from'), str) or 'value' not in turn:
        return turn
    if turn['from'].strip().lower() not in ROLES:
        raise ValueError(f'a message is from {turn["from"][:24]!r}; known are {", ".join(ROLES)}')
    more = {k: v for k, v in turn.items() if k not in ('from', 'value')}
    return {'role': turn['from'], 'content': turn['value'], **more}


def _complete(example, row):
    """An example with its row's system message and tools; what to drop, where an answer has the weight 0."""
    answers = [key for key in ('chosen', 'rejected', 'response') if key in example]
    turns = [turn for key in answers if isinstance(example[key], list) for turn in example[key]]
    if any(turn.get('weight') == 0 for turn in turns):
        return {'drop': 'answers of weight 0, which are not to be trained on'}

    # the weight is for the trainer, not for the template
    for key in ('prompt', *answers):
        if isinstance(example[key], list):
            example[key] = [{k: v for k, v in turn.items() if k != 'weight'} for turn in example[key]]

    # a system message goes before, unless a text that is formatted already has it
    system = next((field(row, key) for key in ('system', 'system_prompt') if row.get(key) not in (None, '')), '')
    written = isinstance(example['prompt'], str) and example['prompt'].endswith(TURN_MARKERS)
    if system and not (written and system.strip() in example['prompt']):
        example |= _under_system(example, system, answers)
    tools = _tools(row)
    return example | {'tools': tools} if tools else example


def _under_system(example, system, answers):
    """An example's prompt and answers as chats that begin with this system message."""
    if example['prompt'] in ('', []):
        raise ValueError("there is a 'system' message and no question behind it")
    prompt = as_chat(example['prompt'])
    if prompt[0]['role'] == 'system' and prompt[0]['content'].strip() != system.strip():
        raise ValueError("the column 'system' and the system message of the chat are not the same")
    if prompt[0]['role'] != 'system':
        prompt = [message('system', system), *prompt]
    chats = {'prompt': prompt}
    for key in answers:
        text = example[key]
        chats[key] = [message('assistant', text.strip())] if isinstance(text, str) else text
    return chats


def _tools(row):
    """The column tools, a list of descriptions of functions or that as JSON; None where it has nothing."""
    tools = row.get('tools')
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise ValueError("'tools' is neither a list of tools nor one in JSON") from None
    if tools in (None, '', []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is neither a list of tools nor one in JSON")
    _measure('tools', tools)
    return tools


# ---- layouts ----


def read_pair(row):
    """Two answers to one prompt, which has a column, or stands before both."""
    prompt, chosen, rejected = asked(row), text_or_chat(row, 'chosen'), text_or_chat(row, 'rejected')
    if type(chosen) is not type(rejected):
        raise ValueError("'chosen' is text and 'rejected' is chat, or the reverse")
    more = {} if row.get('margin') is None else {'margin': margin(row)}
    # texts: what precedes a turn marker is the prompt, or else it may be repeated at the start of both
    if isinstance(chosen, str) and prompt is None:
        return [example | more for example in split_texts(row)]
    if isinstance(chosen, str):
        prompt, (chosen, rejected), repeats = without_prompt(prompt, chosen, rejected)
        pair = {'chosen': reply(row, prompt, chosen), 'rejected': reply(row, prompt, rejected)}
        return [{'prompt': prompt, **pair, **repeats, **more}]

    # chats: all turns before the last answer are the prompt, and must be the same for both
    if not chosen or not rejected:
        raise LeftOut('empty answers')
    if (chosen[0]['role'] == 'assistant') != (rejected[0]['role'] == 'assistant'):
        raise ValueError("only one of 'chosen' and 'rejected' begins with the prompt")
    chosen, rejected = whole_chat(prompt, chosen, 'chosen'), whole_chat(prompt, rejected, 'rejected')
    if len(chosen) == 1 or chosen[0] != rejected[0]:
        raise ValueError("'chosen' and 'rejected' do not begin with the same question")
    if chosen[:-1] != rejected[:-1]:
        raise LeftOut(DIFFERENT)
    return [{'prompt': chosen[:-1], 'chosen': chosen[-1:], 'rejected': rejected[-1:], **more}]


def split_texts(row):
    """The pair in two whole texts without a prompt of their own, if a turn marker says where the answers begin."""
    chosen, rejected = row['chosen'], row['rejected']
    common = os.path.commonprefix([chosen, rejected])
    marker = ASSISTANT if ASSISTANT in chosen else next((m for m in TURN_MARKERS if m in common), None)
    if marker is None:
        marker = "no turn marker (as '\\n\\nAssistant:')"
        raise ValueError(f'no column has the prompt, and {marker} shows where answers begin')
    return parse_dialogues(row, marker)


def parse_dialogues(row, marker=ASSISTANT):
    """Two dialogues that differ in their last answer; what precedes it is the prompt."""
    prompt, mark, chosen = field(row, 'chosen').rpartition(marker)
    other, _, rejected = field(row, 'rejected').rpartition(marker)
    if not mark:
        raise ValueError(f'no {marker!r} in the dialogue')
    # about 1 in 900 of HH
    if prompt != other:
        raise LeftOut(DIFFERENT)
    return [{'prompt': prompt + mark, 'chosen': chosen, 'rejected': rejected}]


def read_answer(row):
    """A prompt and an answer, which a label may call good or bad."""
    key = next(column for column in ANSWERS if column in row)
    prompt, response = asked(row), text_or_chat(row, key)
    if prompt is None:
        raise ValueError("'prompt' is missing")
    if isinstance(response, str):
        prompt, (response,), repeats = without_prompt(prompt, response)
        return [{'prompt': prompt, 'response': reply(row, prompt, response), **repeats, **thumb(row)}]
    if not response:
        raise LeftOut('empty answers')
    return _answered(row, whole_chat(prompt, response, key))


def _answered(row, turns):
    """The example of a conversation that ends with the answer."""
    return [{'prompt': turns[:-1], 'response': turns[-1:], **thumb(row)}]


def read_chat(row):
    """A conversation, of which the last turn is the answer."""
    key = next(column for column in CHATS if column in row)
    field(row, key, list)
    turns = text_or_chat(row, key)
    if len(turns) < 2:
        raise ValueError(f'{key!r} is not a question and its answer')
    return _answered(row, turns)


def read_text(row):
    """A text to learn as it stands."""
    text = field(row, 'text')
    nothing_lost(row, 'text', text)
    return [{'prompt': '', 'response': text}]


def read_prompt(row):
    """A prompt alone."""
    return [{'prompt': asked(row)}]


def parse_annotation(row):
    """AlpacaEval's annotations: preference below 1.5 means output_1, above it output_2; 0 and 1.5 are ties."""
    outputs = [field(row, 'output_' + x) for x in '12']
    # label.py keeps a prompt that is not '\n\nHuman: instruction\n\nAssistant:' as it is
    if 'prompt' in row:
        prompt = text_or_chat(row, 'prompt')
    else:
        prompt, outputs = ask(field(row, 'instruction')), [answer(x) for x in outputs]
    if row.get('preference') is None or row['preference'] != row['preference']:  # null or NaN
        return [{'drop': 'no verdict'}]
    preference = field(row, 'preference', NUMBER)
    if preference in (0, 1.5):
        return [{'drop': 'tie'}]
    if not 1 <= preference <= 2:
        raise ValueError("'preference' is not 0, null, or from 1 to 2")
    chosen, rejected = outputs if preference < 1.5 else outputs[::-1]
    return [{'prompt': prompt, 'chosen': chosen, 'rejected': rejected}]


def read_named(name):
    """A layout that one of the named datasets has, and whose reader does more than a row can tell."""

    def read(row):
        raise ValueError(f'these are columns of the dataset {name!r}: say so with --data={name}:PATH')

    return read


LAYOUTS = (  # columns -> how a row that has them all is read; the first that fits
    ({'preference', 'output_1'}, parse_annotation),
    ({'history', 'human_ref_A'}, read_named('shp')),
    ({'question', 'answers'}, read_named('se')),
    ({'message_id', 'parent_id'}, read_named('oasst')),
    ({'chosen'}, read_pair),
    ({'rejected'}, read_pair),
    ({'response'}, read_answer),
    ({'completion'}, read_answer),
    ({'messages'}, read_chat),
    ({'conversations'}, read_chat),
    ({'conversation'}, read_chat),
    ({'instruction', 'output'}, read_answer),
    ({'input', 'output'}, read_answer),
    ({'question', 'answer'}, read_answer),
    ({'text'}, read_text),
    ({'prompt'}, read_prompt),
    ({'question'}, read_prompt),
    ({'instruction'}, read_prompt),
    ({'query'}, read_prompt),
)


# ---- the parts of a row ----


def asked(row):
    """What the columns of a row ask: text that the answer goes on from, or chat; None where no column asks.

    The text of 'prompt', and whatever ends in a turn marker, stays text; a question or an instruction becomes a message."""
    column = next((c for c in QUESTIONS if c in row), None)
    # a conversation that ends with a question asks it
    if column is None:
        chat = next((c for c in CHATS if c in row), None)
        if chat is None:
            return None
        turns = text_or_chat({'prompt': field(row, chat, list)}, 'prompt')
        return None if turns[-1]['role'] == 'assistant' else turns
    prompt = text_or_chat(row, 'prompt') if column == 'prompt' else field(row, column)
    for more in ADDED if column in ('question', 'instruction') else ():
        prompt += '\n\n' + field(row, more) if row.get(more) else ''
    nothing_lost(row, column, prompt if isinstance(prompt, str) else '\n'.join(turn['content'] for turn in prompt))
    if column == 'prompt' or prompt.endswith(TURN_MARKERS):
        return prompt
    return [message('user', prompt)]


def nothing_lost(row, column, said):
    """Raise ValueError where another column asks, too, and what it says is not in the text `said` of this one."""
    for other in {*QUESTIONS, *ADDED, 'history'} - {column}:
        value = row.get(other)
        if value and not (isinstance(value, str) and value.strip() in said):
            raise ValueError(f'{other!r} asks something, too, which would be lost beside {column!r}')


def reply(row, prompt, text):
    """The text of an answer; behind a question that has become a message, a message, too."""
    return [message('assistant', text.strip())] if isinstance(prompt, list) and 'prompt' not in row else text


def thumb(row):
    """{'good': whether the answer is good}, if a column says so."""
    column = next((c for c in LABELS if c in row), None)
    if column is None:
        return {}
    value = row[column]
    if not isinstance(value, NUMBER) or value not in (0, 1):  # True and False are numbers, too
        raise ValueError(f'{column!r} is neither true (1) nor false (0)')
    return {'good': bool(value)}


def margin(row):
    """row['margin'], a finite number."""
    value = field(row, 'margin', NUMBER)
    if isinstance(value, bool) or not abs(value) < 1e30:  # NaN is not less than anything
        raise ValueError("'margin' is not a finite number")
    return float(value)


def without_prompt(prompt, *answers):
    """(prompt, answers without it, {'repeats': whether they all began with it}) of answers that are text.

    White space around the prompt may differ. Raises ValueError where only one of two answers repeats it."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]['content']
    bare = asked.strip()
    if not bare:
        return prompt, answers, {}
    if all(answer.startswith(asked) for answer in answers):
        return prompt, [answer[len(asked) :] for answer in answers], {'repeats': True}
    begins = [answer.lstrip().startswith(bare) for answer in answers]
    if all(begins):
        prompt = prompt.rstrip() if isinstance(prompt, str) else prompt
        return prompt, [answer.lstrip()[len(bare) :] for answer in answers], {'repeats': True}
    if any(begins):
        raise ValueError("only one of 'chosen' and 'rejected' begins with the prompt")
    return prompt, answers, {'repeats': False}


def whole_chat(prompt, answer, key):
    """All turns of a prompt (text, chat or None) and an answer, which may be what follows it, or the whole chat."""
    turns = [] if prompt is None else as_chat(prompt)
    if answer[0]['role'] == 'assistant':
        return turns + answer

    # the whole chat: it begins with the prompt, but for a system message that only one of them has
    system = [] if answer[0]['role'] == 'system' else [turn for turn in turns[:1] if turn['role'] == 'system']
    bare = [turn for turn in turns if turn['role'] != 'system']
    begins = [turn for turn in answer if turn['role'] != 'system'][: len(bare)] == bare
    if not begins and not isinstance(prompt, str):
        raise ValueError(f'{key!r} begins with a question that is not the prompt')
    # a prompt of text may be any of the questions of a longer chat
    if not begins and not any(prompt.strip() in turn['content'] for turn in answer[:-1] if turn['role'] == 'user'):
        raise LeftOut('answers to something else than the prompt')
    return system + answer


def text_or_chat(row, key):
    """row[key]: a string, or a list of chat messages, which end with the assistant's where it is an answer."""
    value = field(row, key, (str, list))
    _measure(key, value)
    if isinstance(value, str):
        return value
    turns = [_turn(turn) for turn in value]
    if key == 'prompt' and not turns:
        raise ValueError("'prompt' has no messages")
    if key != 'prompt' and turns and turns[-1]['role'] != 'assistant':
        raise ValueError(f'{key!r} does not end with an answer, but with a message of the role {turns[-1]["role"]!r}')
    return turns


def _turn(turn):
    """A chat message with all its fields, its role by the name that templates know."""
    role = field(turn, 'role')
    turn = {key: value for key, value in turn.items() if value is not None}

    # what only some messages have must be what it should be
    calls, weight = turn.get('tool_calls', []), turn.get('weight', 1)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("'tool_calls' is not a list of calls")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(
            f"the 'weight' of a message is {weight!r}: 1 is trained on and 0 is not, and there is no other"
        )

    # a call, or a thought, may stand alone
    alone = 'content' not in turn and any(turn.get(key) for key in ('tool_calls', *REASONING))
    content = '' if alone else field(turn, 'content')
    return turn | message(ROLES.get(role.strip().lower(), role), content)


def _measure(key, value):
    """Raise ValueError for text, messages or tools that are too long or cannot be written."""
    plain = isinstance(value, str)
    if not plain and not all(isinstance(item, dict) for item in value):
        return  # what is wrong with them is said elsewhere
    text = value if plain else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > LONGEST:
        raise ValueError(f'{key!r} has {len(text):,} characters; the limit is {LONGEST:,}')
    if not plain and any(set(item) - {'role', 'content'} for item in value):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f'{key!r} has half a surrogate pair in it') from None


def field(row, key, kind=str):
    """row[key], which must be of this kind."""
    value = row.get(key, ...) if isinstance(row, dict) else ...
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):  # True is an int, for python
        raise ValueError(f'{key!r} is missing or of the wrong type')
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{key!r} is not a finite number')
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # json can write it, no tokenizer can read it
            raise ValueError(f'{key!r} has half a surrogate pair in it') from None
    return value


# ---- texts and messages ----


def ask(text):
    return '\n\nHuman: ' + text + ASSISTANT


def answer(text):
    return ' ' + text.strip()


def message(role, text):
    return {'role': role, 'content': text}


def as_chat(prompt):
    """A prompt, text or chat, as chat messages: the reverse of Human: / Assistant:, or else one user's message."""
    if not isinstance(prompt, str):
        return prompt
    # parts: who, what, who, what, ...
    before, *parts = re.split(r'\n\n(Human|Assistant):', prompt)
    if before.strip() or not parts:
        return [message('user', prompt)]
    roles = {'Human': 'user', 'Assistant': 'assistant'}
    turns = [message(roles[who], text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]
    return turns[:-1] if turns[-1] == message('assistant', '') else turns


def instruction(prompt):
    """What a prompt asks, as AlpacaEval has it: of a single question its text alone, else the whole dialogue."""
    if not isinstance(prompt, str):
        turns = [turn for turn in prompt if turn['role'] != 'system']
        return turns[0]['content'] if len(turns) == 1 else '\n\n'.join(f'{t["role"]}: {t["content"]}' for t in turns)
    text = prompt.removeprefix('\n\nHuman: ').removesuffix(ASSISTANT)
    return prompt if ASSISTANT in text or ask(text) != prompt else text
