"""Columns and messages as people have them -> prompt and answers. A new layout is one row of LAYOUTS and one function.

A row is normalised (see unified), its columns name a layout, and the layout's function makes examples of it, as sources.py
describes them: read(row, task) -> list. A function that is marked with @of_all_rows needs the whole source:
read(rows, task) -> (row, list or ValueError) of each of them. It raises ValueError for a row that is not what it should be,
and LeftOut(reason) for a sound one that a rule leaves out. Texts are strings in Anthropic's format
('\\n\\nHuman: ...\\n\\nAssistant:', then ' answer') or lists of chat messages."""

import difflib
import json
import math
import os
import re
from functools import cache
from html.parser import HTMLParser
from itertools import combinations
from operator import itemgetter

NUMBER = (int, float)
# characters of a text, or of all messages of a chat
LONGEST = 10_000_000
DIFFERENT = 'chosen and rejected have different prompts'
NO_ANSWER = 'conversations without a question and its answer'

# ---- the names that people use ----

ASSISTANT = '\n\nAssistant:'
# the columns that may ask: the first one there is
QUESTIONS = ('prompt', 'question', 'instruction', 'problem', 'query', 'input')
# what an instruction or a question is about, written behind it
ADDED = ('input', 'context')
ANSWERS = ('response', 'completion', 'output', 'answer', 'solution', 'label')
CHATS = ('messages', 'conversations', 'conversation', 'context_messages', 'trajectory')
LABELS = ('good', 'label', 'kto_tag')
# where a null is not the same as no such column
NULL_SAYS = (*LABELS, 'preference', 'output_1')
# what --columns may name
COLUMNS = ('prompt', 'system', 'chosen', 'rejected', 'response', 'label', 'messages', 'margin')
# other names of columns, which stand together -> ours
RENAMED = (
    {'chosen_response': 'chosen', 'rejected_response': 'rejected'},
    {'preferred_output': 'chosen', 'non_preferred_output': 'rejected'},
    {'response_j': 'chosen', 'response_k': 'rejected'},
    {'system_prompt': 'system'},
)
# the two answers that somebody has compared
COMPARED = (
    ('response_a', 'response_b'),
    ('response_0', 'response_1'),
    ('response_1', 'response_2'),
    ('response1', 'response2'),
    ('answer_a', 'answer_b'),
    ('conversation_a', 'conversation_b'),
)
# the fields that a message's thoughts stand in
REASONING = ('reasoning_content', 'thinking', 'reasoning')
ROLES = {
    **dict.fromkeys(('user', 'human', 'prompter', 'question'), 'user'),
    **dict.fromkeys(('assistant', 'gpt', 'chatgpt', 'model', 'bot', 'chatbot', 'ai', 'bing', 'bard'), 'assistant'),
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
# who speaks in a dialogue that is one text, by how it begins; HelpSteer's begin with a question that has no mark
DIALOGUES = {
    '### Human:': r'### (Human|Assistant):',
    '\n\nHuman:': r'\n\n(Human|Assistant):',
    'Below is an instruction': r'### (Instruction|Response):',
    '### Instruction:': r'### (Instruction|Response):',
}
SPEAKERS = {'Human': 'user', 'Instruction': 'user', 'User': 'user', 'Assistant': 'assistant', 'Response': 'assistant'}


class LeftOut(Exception):
    """A sound row that a rule leaves out: its message is the reason."""


# ---- any row ----


def parse_any(row, task=None, columns=None):
    """The examples of a row in any layout that LAYOUTS knows, told apart by its columns: the first that fits.

    task: 'pairs', 'singles', 'sft', 'prompts' or None, for rows with more answers than one task needs."""
    row = unified(row, columns)
    return examples_of(row, layout_of(row), task)


def examples_of(row, layout, task):
    """The examples of a normalised row of this layout."""
    if layout.of_all_rows:
        raise ValueError(f'a row of the layout {layout.name} among others')
    try:
        found = layout.read(row, task)
        return [example if 'drop' in example else _complete(example, row) for example in found]
    except LeftOut as reason:
        return [{'drop': str(reason)}]


def layout_of(row):
    """The Layout of a normalised row. Raises ValueError where its columns fit none."""
    found = _layout(frozenset(row))
    if found is None:
        raise ValueError(f"'prompt' is missing, and no other column is known; {_nearest(row)}")
    return found


@cache
def _layout(columns):
    return next((layout for layout in LAYOUTS if layout.columns <= columns), None)


def _nearest(row):
    """A hint for columns that fit no layout: the layout that lacks least, and what to write."""

    def fit(layout):
        like = [difflib.get_close_matches(column, row, 1, 0.7) for column in layout.columns]
        return sum(map(bool, like)) / len(like)

    known = [layout for layout in LAYOUTS if layout.columns & {*COLUMNS, *QUESTIONS, *ANSWERS}]
    layout = max(known, key=fit)
    names = ' '.join(sorted(layout.columns))
    texts = [name for name, value in row.items() if isinstance(value, str)] or ['NAME']
    guess = ', '.join(f'{name}={text[:24]}' for name, text in zip(('prompt', 'response'), texts * 2, strict=False))
    return f"the nearest layout has {names}; write, say, --columns='{guess}'"


def unified(row, columns=None):
    """A row without nulls, with our names, where a chat is a list of {'role', 'content'}, whatever it was written as.

    columns: our name -> its column, where the user says so; no other column counts then. A null stays in columns where it
    says something, such as that nobody has labelled an answer, or preferred one."""
    if columns:
        row = {name: row.get(column) for name, column in columns.items()}
    row = {key: _as_messages(value, key) for key, value in row.items() if value is not None or key in NULL_SAYS}
    for names in RENAMED:
        if names.keys() <= row.keys() and not row.keys() & {*names.values()}:
            row = {names.get(key, key): value for key, value in row.items()}

    # OpenAI's preferences, HelpSteer3's context, and what SmolTalk 2 tells its template
    asked, context = row.get('input'), row.get('context')
    if isinstance(asked, dict) and 'messages' in asked:
        del row['input']
        row |= unified({key: asked.get(key) for key in ('messages', 'tools')})
    if isinstance(context, list) and 'prompt' not in row:
        row['prompt'] = row.pop('context')
    told = row.get('chat_template_kwargs')
    if isinstance(told, dict) and told.get('custom_instructions') and 'system' not in row:
        row['system'] = told['custom_instructions']
    return row


def _as_messages(value, key=''):
    """Any form of a chat as a list of {'role', 'content'}; anything else as it is.

    Forms: a list of {'from', 'value'}; a single message; texts in turn; {'input', 'output'} in turn; any of these as JSON."""
    if isinstance(value, str) and value.startswith(('[{"', "{'", '{"')) and ('"content"' in value or '"value"' in value):
        value = _from_json(value)
    if isinstance(value, dict) and ('role' in value or 'from' in value):
        value = [value]
    if isinstance(value, dict) and value.keys() == {'messages'}:
        value = value['messages']
    if not isinstance(value, list):
        return value
    if key in CHATS and value and all(isinstance(text, str) for text in value):
        return alternating(value)
    if key in CHATS and value and all(isinstance(turn, dict) and {'input', 'output'} <= turn.keys() for turn in value):
        return alternating([turn[side] for turn in value for side in ('input', 'output')])
    return [_as_message(turn) if isinstance(turn, dict) else turn for turn in value]


def _from_json(text):
    """The messages in a text, if it is JSON of such; else the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    turns = value if isinstance(value, list) else [value]
    sound = all(isinstance(turn, dict) and ({'role', 'content'} <= turn.keys() or 'from' in turn) for turn in turns)
    return value if turns and sound else text


def _as_message(turn):
    """A message with its role under our name, and content that is a list of texts as one text."""
    if 'role' not in turn and isinstance(turn.get('from'), str) and 'value' in turn:
        if turn['from'].strip().lower() not in ROLES:
            raise ValueError(f'a message is from {turn["from"][:24]!r}; known are {", ".join(ROLES)}')
        more = {k: v for k, v in turn.items() if k not in ('from', 'value')}
        turn = {'role': turn['from'], 'content': turn['value'], **more}
    if isinstance(turn.get('content'), list) and 'role' in turn:
        turn = turn | {'content': ''.join(_text_of(part) for part in turn['content'])}
    return turn


def _text_of(part):
    """The text of a part of a message's content: a string, or {'type': 'text', 'text'}."""
    if isinstance(part, str):
        return part
    kind = part.get('type') if isinstance(part, dict) else 'thing'
    if kind in (None, 'text') and isinstance(part.get('text'), str):
        return part['text']
    raise ValueError(f'a message has a part of the type {str(kind)[:24]!r}, and only text is read')


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
    system = field(row, 'system') if row.get('system') not in (None, '') else ''
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
    first = [] if prompt[0]['role'] == 'system' else [message('system', system)]
    chats = {key: [said(example[key])] if isinstance(example[key], str) else example[key] for key in answers}
    if 'turns' in example:
        chats['turns'] = first + example['turns']
    return {'prompt': first + prompt, **chats}


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


# ---- layouts: pairs ----


def read_pair(row, task=None):
    """Two answers to one prompt, which has a column, or stands before both."""
    if row.get('status') == 'tie':
        raise LeftOut('tie')
    if all(_texts(row.get(key)) for key in ('chosen', 'rejected')):
        return read_lists(row, task)
    chosen, rejected = text_or_chat(row, 'chosen'), text_or_chat(row, 'rejected')
    if type(chosen) is not type(rejected):
        raise ValueError("'chosen' is text and 'rejected' is chat, or the reverse")
    more = {} if row.get('margin') is None else {'margin': margin(row)}
    prompt = asked(row, chosen if isinstance(chosen, list) else ())
    # texts: what precedes a turn marker is the prompt, or else it may be repeated at the start of both
    if isinstance(chosen, str) and prompt is None:
        return [example | more for example in split_texts(row)]
    if isinstance(chosen, str):
        prompt, (chosen, rejected), repeats = without_prompt(prompt, chosen, rejected)
        begun = row.get('initial_reason_steps', '') if 'full_chosen' in row else ''
        # CarperAI's summaries begin with their own mark
        if isinstance(prompt, str) and chosen.startswith('TL;DR:') and rejected.startswith('TL;DR:'):
            prompt = prompt.rstrip() + '\n\n'
        pair = {key: reply(row, prompt, begun + x) for key, x in (('chosen', chosen), ('rejected', rejected))}
        return [{'prompt': prompt, **pair, **repeats, **more}]

    # chats: all turns before the last answer are the prompt, and must be the same for both
    if not chosen or not rejected:
        raise LeftOut('empty answers')
    if (chosen[0]['role'] == 'assistant') != (rejected[0]['role'] == 'assistant'):
        raise ValueError("only one of 'chosen' and 'rejected' begins with the prompt")
    chosen, rejected = whole_chat(prompt, chosen, 'chosen'), whole_chat(prompt, rejected, 'rejected')
    return [{**pair_of_chats(chosen, rejected), **more}]


def pair_of_chats(chosen, rejected):
    """The pair in two whole conversations that differ in their last answer."""
    if len(chosen) < 2 or not rejected or chosen[0] != rejected[0]:
        raise ValueError("'chosen' and 'rejected' do not begin with the same question")
    if chosen[:-1] != rejected[:-1]:
        raise LeftOut(DIFFERENT)
    return {'prompt': chosen[:-1], 'chosen': chosen[-1:], 'rejected': rejected[-1:]}


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


def read_lists(row, task):
    """Lists of good and of bad answers, as RewardBench 2 has them."""
    scored = [(score, [said(text)]) for score, key in ((1, 'chosen'), (0, 'rejected')) for text in row[key]]
    examples = ranked(asked_chat(row), scored, task)
    # two good ones are no pair, and nothing is lost by that
    return [example for example in examples if example.get('drop') != 'tie']


def compared(one, two, verdict):
    """A reader of two answers and the column that says which is better: its name or number, or a strength with a sign."""

    def read(row, task=None):
        value, prompt = row[verdict], asked(row)
        if verdict in ('preference_strength', 'overall_preference'):
            strength = field(row, verdict, NUMBER)
            better = one if strength < 0 else two if strength > 0 else None
        else:
            better = _named(value, (one, two))
        if better is None and task != 'prompts':
            raise LeftOut('tie')

        # an answer alone, or the whole conversation
        answers = []
        for key in (better, two if better == one else one) if better else (one, two):
            found = text_or_chat(row, key)
            answers.append(found if isinstance(found, list) else [*asked_chat(row), said(found)])
        if prompt is not None:
            answers = [whole_chat(prompt, chat, key) for chat in answers]
        return [pair_of_chats(*answers)]

    return read


def _named(value, columns):
    """The column that a verdict names by its last character ('model_a', 'B', 1); None for a tie."""
    name = str(value).strip().lower()
    if 'tie' in name or 'both' in name or name in ('', 'none', '-1', 'equal'):
        return None
    found = [column for column in columns if column[-1].lower() == name[-1]]
    if not found:
        raise ValueError(f'{name[:24]!r} is neither of {" and ".join(columns)}, nor a tie')
    return found[0]


def read_votes(row, task=None):
    """LMSYS's votes as a table: the questions and the answers of both sides in JSON lists, and who has won in 0 and 1."""
    questions = _json_texts(row, 'prompt')
    chats = {}
    for side in 'ab':
        replies = _json_texts(row, f'response_{side}')
        texts = [text for turn in zip(questions, replies, strict=False) for text in turn]
        chats[f'conversation_{side}'] = alternating(texts)
    won = [name for name in 'ab' if str(row[f'winner_model_{name}']) in ('1', '1.0', 'True')]
    return compared('conversation_a', 'conversation_b', 'winner')(chats | {'winner': ''.join(won)}, task)


def _json_texts(row, key):
    """A column of texts, as a list or as one in JSON."""
    value = row.get(key)
    try:
        texts = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        # broken surrogates are written as they are in some rows
        raise ValueError(f'{key!r} is not a list of texts in JSON') from None
    if not _texts(texts):
        raise LeftOut('empty answers')
    return texts


def read_sides(row, task=None):
    """Arena's newer votes: turns that have the user's message and that of each side."""
    chats = {'conversation_a': [], 'conversation_b': []}
    for turn in field(row, 'full_conversation', list):
        for side in 'ab':
            for key in ('user', f'model_side_{side}'):
                chats[f'conversation_{side}'] += _as_messages(field(turn, key, dict))
    return compared('conversation_a', 'conversation_b', 'winner')(chats | {'winner': row['winner']}, task)


def read_summaries(row, task=None):
    """openai/summarize_from_feedback's comparisons: prompts as TRL writes them, two summaries, and the index of the better."""
    info, (one, two) = field(row, 'info', dict), field(row, 'summaries', list)
    if field(row, 'choice', int) not in (0, 1):
        raise ValueError("'choice' is neither 0 nor 1")
    texts = [field(summary, 'text') for summary in (one, two)]
    title = f'TITLE: {info.get("title") or ""}\n\n'
    # a post of reddit, or an article of CNN or Daily Mail
    if info.get('post'):
        post = field(info, 'post').replace('\n\n', '\n')
        prompt = f'SUBREDDIT: r/{info.get("subreddit") or ""}\n\n{title}POST: {post}\n\nTL;DR:'
    else:
        article = field(info, 'article').replace('\n\n', '\n')
        prompt = f'{title}{article}\n\nTL;DR:'
    chosen, rejected = answer(texts[row['choice']]), answer(texts[1 - row['choice']])
    return [{'prompt': prompt, 'chosen': chosen, 'rejected': rejected}]


def parse_annotation(row, task=None):
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


# ---- layouts: answers with scores ----


def ranked(prompt, scored, task):
    """The examples of a prompt and its (score, answer)s: for sft the best answer, else all pairs that are no ties."""
    if task == 'prompts':
        return [{'prompt': prompt}]
    if task == 'sft' and scored:
        return [{'prompt': prompt, 'response': max(scored, key=itemgetter(0))[1]}]
    pairs = [sorted(pair, key=itemgetter(0), reverse=True) for pair in combinations(scored, 2)]
    return [
        {'prompt': prompt, 'chosen': good, 'rejected': bad} if high > low else {'drop': 'tie'}
        for (high, good), (low, bad) in pairs
    ] or [{'drop': 'fewer than two answers'}]


def read_stack_exchange(row, task=None):
    """HuggingFaceH4/stack-exchange-preferences: a question's answers by pm_score."""
    prompt, answers = ask(strip_html(field(row, 'question'))), field(row, 'answers', list)
    scored = [(field(x, 'pm_score', NUMBER), answer(strip_html(field(x, 'text')))) for x in answers]
    return ranked(prompt, scored, task)


def read_nectar(row, task=None):
    """berkeley-nest/Nectar: a prompt in Anthropic's format, and answers by rank, 1 the best."""
    prompt = field(row, 'prompt').rstrip()
    answers = field(row, 'answers', list)
    return ranked(prompt, [(-field(x, 'rank', NUMBER), answer(field(x, 'answer'))) for x in answers], task)


def read_completions(row, task=None):
    """openbmb/UltraFeedback: four answers by their score, the mean of four aspects where there is one."""
    scored = []
    for found in field(row, 'completions', list):
        key = next((k for k in ('fine-grained_score', 'overall_score') if found.get(k) is not None), None)
        # some have no score, which says nothing of the others
        if key is not None:
            scored.append((field(found, key, NUMBER), [said(field(found, 'response'))]))
    return ranked(asked_chat(row), scored, task)


def read_generations(row, task=None):
    """OpenR1-Math's answers: those that were found to be correct against the others; without a check all are equal."""
    texts = field(row, 'generations', list)
    checks = row.get('correctness_math_verify') or row.get('correctness_llama') or [True] * len(texts)
    scored = [(bool(right), [said(text)]) for right, text in zip(checks, texts, strict=True)]
    if task == 'sft' and not any(right for right, _ in scored):
        raise LeftOut('no correct answer')
    return ranked(asked_chat(row), scored, task)


def read_solutions(row, task=None):
    """DeepMath: a question and three correct solutions, of which the first is taken."""
    prompt = asked_chat(row)
    return [{'prompt': prompt} if task == 'prompts' else {'prompt': prompt, 'response': [said(field(row, 'r1_solution_1'))]}]


def shp_pair(row):
    """[(prompt, (score, chosen), (score, rejected))], or [] where neither score is at least twice the other."""
    a, b = ((field(row, 'score_' + x, NUMBER), answer(field(row, 'human_ref_' + x))) for x in 'AB')
    if field(row, 'labels', int) not in (0, 1):
        raise ValueError("'labels' is neither 0 nor 1")
    good, bad = (a, b) if row['labels'] else (b, a)  # 1: A is preferred
    return [(ask(field(row, 'history')), good, bad)] if max(a[0], b[0]) >= 2 * min(a[0], b[0]) else []


def of_all_rows(read):
    """Mark a reader that needs all rows of a source: read(rows, task) yields (row, examples or ValueError)."""
    read.of_all_rows = True
    return read


def each(rows, read):
    """(row, its examples or the ValueError) of every row."""
    for row in rows:
        try:
            if row.error:
                raise ValueError(row.error)
            yield row, read(row)
        except LeftOut as reason:
            yield row, [{'drop': str(reason)}]
        except (ValueError, RecursionError) as error:
            yield row, error


def grouped(rows, task, read):
    """The examples of answers that belong together by their prompts, wherever they stand: (row, examples or ValueError).

    read(row) -> [(prompt, [(score, answer)])]. A group's examples come with its first row."""
    groups = {}  # prompt as JSON -> (first row, prompt, scored)
    for row, found in each(rows, read):
        if isinstance(found, Exception) or not found or isinstance(found[0], dict):
            yield row, found
            continue
        for prompt, scored in found:
            group = groups.setdefault(json.dumps(prompt), (row, prompt, []))
            group[2].extend(pair for pair in scored if pair not in group[2])
    for row, prompt, scored in groups.values():
        yield row, ranked(prompt, scored, task)


@of_all_rows
def read_shp(rows, task=None):
    """stanfordnlp/SHP: pairs with a score ratio of 2 or more; SFT on the best answer in a prompt's kept pairs."""
    if task == 'sft':
        read = lambda row: [(prompt, [good, bad]) for prompt, good, bad in shp_pair(row)] or below
    else:
        read = lambda row: [{'prompt': p, 'chosen': good[1], 'rejected': bad[1]} for p, good, bad in shp_pair(row)] or below
    below = [{'drop': 'score ratio below 2'}]
    return grouped(rows, task, read) if task == 'sft' else each(rows, read)


@of_all_rows
def read_rated(rows, task=None):
    """HelpSteer and HelpSteer 2: an answer a row, with its ratings; the answers to a prompt are compared by helpfulness."""

    def read(row):
        row = unified(row)
        return [(asked_chat(row), [(field(row, 'helpfulness', NUMBER), [said(field(row, 'response'))])])]

    return grouped(rows, task, read)


@of_all_rows
def read_trees(rows, task=None, language=None):
    """OpenAssistant: each ranked answer against the next better one, after the conversation so far; for sft the best one.

    language: only messages in this one."""
    rows = list(rows)

    # what stands above a message, and which answer is the next better one; broken rows are reported by read
    by_id, by_rank = {}, {}
    for row in rows:
        if isinstance(row.get('message_id'), str):
            by_id[row['message_id']] = row
        if row.get('parent_id') and isinstance(row.get('rank'), int) and language in (None, row.get('lang')):
            by_rank[row['parent_id'], row['rank']] = row

    def above(parent):
        """The conversation that ends with this message."""
        turns = []
        while parent is not None:
            if parent not in by_id or len(turns) == 100:
                raise ValueError('the conversation above the answer is not whole')
            role = 'assistant' if by_id[parent].get('role') == 'assistant' else 'user'
            turns.insert(0, message(role, field(by_id[parent], 'text')))
            parent = by_id[parent].get('parent_id')
        return turns

    def read(row):
        field(row, 'message_id')
        parent = field(row, 'parent_id', (str, type(None))) if 'parent_id' in row else None
        if language and field(row, 'lang') != language:
            raise LeftOut('not English')
        if field(row, 'role') not in ('prompter', 'assistant'):
            raise ValueError("'role' is neither prompter nor assistant")
        if row['role'] == 'prompter':
            return [{'prompt': above(row['message_id'])}] if task == 'prompts' else []
        if task == 'prompts':
            return []
        if row.get('rank') is None:
            raise LeftOut('an answer without a rank')
        # rank 0, the best, takes part as the better one of rank 1
        rank = field(row, 'rank', int)
        if task == 'sft':
            best = [{'prompt': above(parent), 'response': [message('assistant', field(row, 'text'))]}]
            return best if rank == 0 else [{'drop': 'answers that are not the best'}]
        if rank == 0:
            return []
        # the better one of the pair has the same parent
        better = by_rank.get((parent, rank - 1))
        if better is None:
            raise LeftOut('no answer of the next better rank')
        chosen, rejected = ([message('assistant', field(x, 'text'))] for x in (better, row))
        return [{'prompt': above(parent), 'chosen': chosen, 'rejected': rejected}]

    return each(rows, read)


# ---- layouts: single answers, conversations, texts, prompts ----


def read_answer(row, task=None):
    """A prompt and an answer, which a label may call good or bad."""
    key = next(column for column in ANSWERS if column in row)
    # LLaMA-Factory's older pairs: the good and the bad output
    if _texts(row[key]) and len(row[key]) == 2:
        pair = dict(zip(('chosen', 'rejected'), row[key], strict=True))
        return read_pair({k: v for k, v in row.items() if k != key} | pair, task)
    response = text_or_chat(row, key)
    prompt = asked(row, response if isinstance(response, list) else ())
    # a label that is a text is the answer, one beside an answer says what it is worth
    worth = {} if key == 'label' else thumb(row)
    if isinstance(response, str):
        if prompt is None:
            raise ValueError("'prompt' is missing")
        prompt, (response,), repeats = without_prompt(prompt, response)
        example = {'prompt': prompt, 'response': reply(row, prompt, response), **repeats, **worth}
        # the answers of a history are trained on, too, as LLaMA-Factory does
        return [_every_answer(example)] if 'history' in row else [example]
    if not response:
        raise LeftOut('empty answers')
    turns = whole_chat(prompt, response, key)
    if len(turns) < 2:
        raise ValueError("'prompt' is missing")
    return [{'prompt': turns[:-1], 'response': turns[-1:], **worth}]


def read_label(row, task=None):
    """CarperAI's summaries, whose label is a text, which is the answer; any other label says nothing without one."""
    return read_answer(row, task) if isinstance(row['label'], str) else read_prompt(row, task)


def read_chat(row, task=None):
    """A conversation: all its answers are trained on, and the last one is the response."""
    key = next(column for column in CHATS if column in row)
    turns = [_turn(turn) for turn in field(row, key, list)]
    _measure(key, turns)
    if turns and turns[-1]['role'] != 'assistant':
        # the answer may have a column of its own
        if any(isinstance(row.get(column), (str, list)) for column in ANSWERS):
            return read_answer(row, task)
        if task == 'prompts' or (task is None and len(turns) == 1):
            return [{'prompt': turns}]

    # as FastChat does: what precedes the first question, and what follows the last answer, is left out
    notes, first = [], next((i for i, turn in enumerate(turns) if turn['role'] != 'assistant'), len(turns))
    last = max((i for i, turn in enumerate(turns) if _trained(turn)), default=-1)
    if first >= last:
        silent = any(turn['role'] == 'assistant' for turn in turns[first:])
        raise LeftOut('answers of weight 0, which are not to be trained on' if silent else NO_ANSWER)
    if first:
        notes.append({'drop': 'note: conversations that begin with an answer, which is left out'})
    if last < len(turns) - 1:
        notes.append({'drop': 'note: conversations that go on behind the last answer to train on: left out'})
    turns = turns[first : last + 1]
    example = {'prompt': turns[:-1], 'response': turns[-1:], **thumb(row)}
    return [example if 'good' in example else _every_answer(example), *notes]


def _trained(turn):
    return turn['role'] == 'assistant' and turn.get('weight') != 0


def _every_answer(example):
    """An example with 'turns', all messages, where more answers than the last one are trained on: of weight 0 are others."""
    turns = [*example['prompt'], *example['response']]
    if sum(map(_trained, turns)) < 2:
        return example
    turns = [turn if turn['role'] == 'assistant' and turn.get('weight') == 0 else _weightless(turn) for turn in turns]
    return example | {'turns': turns}


def _weightless(turn):
    return {key: value for key, value in turn.items() if key != 'weight'}


def read_text(row, task=None):
    """A text to learn as it stands; where it is a dialogue with marks, a conversation."""
    text = field(row, 'text')
    nothing_lost(row, 'text', text)
    marks = next((marks for start, marks in DIALOGUES.items() if text.startswith(start)), None)
    turns = dialogue(text, marks) if marks else []
    if {turn['role'] for turn in turns} != {'user', 'assistant'}:
        return [{'prompt': '', 'response': text}]
    return read_chat({'messages': turns}, task)


def read_prompt(row, task=None):
    """A prompt alone."""
    return [{'prompt': asked(row)}]


class Layout:
    """A row of LAYOUTS: a name, the columns that a row must have, and how it is read."""

    def __init__(self, name, columns, read):
        self.name, self.columns, self.read = name, frozenset(columns.split()), read
        self.of_all_rows = getattr(read, 'of_all_rows', False)


# fmt: off
LAYOUTS = [Layout(*row) for row in (  # the first whose columns a row has
    ('AlpacaEval annotations', 'preference output_1', parse_annotation),
    ('SHP', 'history human_ref_A human_ref_B labels', read_shp),
    ('Stack Exchange', 'question answers', read_stack_exchange),
    ('Nectar', 'prompt answers', read_nectar),
    ('OpenAssistant', 'message_id text role', read_trees),
    ('UltraFeedback', 'instruction completions', read_completions),
    ('summaries', 'info summaries choice', read_summaries),
    ('arena', 'prompt response_a response_b winner_model_a winner_model_b', read_votes),
    *[('comparison', f'{one} {two} {verdict}', compared(one, two, verdict))
      for verdict in ('winner', 'preferred', 'better_response_id', 'safer_response_id', 'preference_strength',
                      'overall_preference')
      for one, two in COMPARED],
    ('arena', 'full_conversation winner', read_sides),
    ('HelpSteer', 'prompt response helpfulness', read_rated),
    ('pair', 'chosen', read_pair),
    ('pair', 'rejected', read_pair),
    *[('conversation', column, read_chat) for column in CHATS],
    ('answer', 'response', read_answer),
    ('answer', 'completion', read_answer),
    ('answer', 'instruction output', read_answer),
    ('answer', 'input output', read_answer),
    ('answer', 'prompt output', read_answer),
    ('answer', 'prompt label', read_label),
    ('DeepMath', 'question r1_solution_1', read_solutions),
    ('OpenR1-Math', 'problem generations', read_generations),
    ('answer', 'question answer', read_answer),
    ('answer', 'problem solution', read_answer),
    ('text', 'text', read_text),
    *[('prompt', column, read_prompt) for column in QUESTIONS],
)]
# fmt: on


# ---- the parts of a row ----


def asked(row, whole=()):
    """What the columns of a row ask: text that the answer goes on from, or chat; None where no column asks.

    The text of 'prompt', and whatever ends in a turn marker, stays text; a question or an instruction becomes a message.
    whole: the messages of an answer that may have the question in it."""
    column = next((c for c in QUESTIONS if c in row), None)
    # a conversation that ends with a question asks it
    chat = next((c for c in CHATS if c in row), None)
    if column is None or (chat and column != 'prompt'):
        if chat is None:
            return None
        turns = text_or_chat({'prompt': field(row, chat, list)}, 'prompt')
        return None if turns[-1]['role'] == 'assistant' else turns
    prompt = text_or_chat(row, 'prompt') if column == 'prompt' else field(row, column)
    for more in ADDED if column in ('question', 'instruction') else ():
        prompt += '\n\n' + field(row, more) if row.get(more) else ''
    said_before = '\n'.join(turn['content'] for turn in whole)
    said_here = prompt if isinstance(prompt, str) else '\n'.join(turn['content'] for turn in prompt)
    nothing_lost(row, column, f'{said_here}\n{said_before}')
    if isinstance(prompt, str) and _pairs_of_texts(row.get('history')):
        return [*alternating([text for turn in row['history'] for text in turn]), message('user', prompt)]
    if column == 'prompt' or prompt.endswith(TURN_MARKERS):
        return prompt
    return [message('user', prompt)]


def asked_chat(row):
    """What a row asks, as chat messages. Raises ValueError where it asks nothing."""
    prompt = asked(row)
    if prompt is None:
        raise ValueError("'prompt' is missing")
    return as_chat(prompt)


def nothing_lost(row, column, said):
    """Raise ValueError where another column asks, too, and what it says is not in the text `said` of this one."""
    for other in {*QUESTIONS, *ADDED, 'history'} - {column}:
        value = row.get(other)
        if other == 'history' and _pairs_of_texts(value):
            continue
        if value and not (isinstance(value, str) and value.strip() in said):
            raise ValueError(f'{other!r} asks something, too, which would be lost beside {column!r}')


def _texts(value):
    """Whether this is a list of texts, and not an empty one."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _pairs_of_texts(value):
    return isinstance(value, list) and bool(value) and all(_texts(turn) and len(turn) == 2 for turn in value)


def reply(row, prompt, text):
    """The text of an answer; behind a question that has become a message, a message, too."""
    return [said(text)] if isinstance(prompt, list) and not isinstance(row.get('prompt'), list) else text


def thumb(row):
    """{'good': whether the answer is good}, if a column says so."""
    column = next((c for c in LABELS if c in row), None)
    if column is None:
        return {}
    value = row[column]
    # a table has them as text
    value = {'true': 1, 'false': 0, '1': 1, '0': 0}.get(value.lower(), value) if isinstance(value, str) else value
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
    # a prompt of text may be any of the questions of a longer chat, or all of them
    asked = [] if begins else [turn['content'].strip() for turn in answer[:-1] if turn['role'] == 'user']
    if not begins and not any(prompt.strip() in text for text in asked) and not all(text in prompt for text in asked):
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


def said(text):
    """The assistant's message with this text."""
    return message('assistant', text.strip())


def alternating(texts):
    """Texts as messages of the user and the assistant in turn."""
    return [message('assistant' if i % 2 else 'user', text) for i, text in enumerate(texts)]


def dialogue(text, marks):
    """The messages of a text in which these marks (a regular expression whose group is the speaker) begin turns.

    What stands before the first mark is a preamble, and no turn."""
    _, *parts = re.split(marks, text)
    return [message(SPEAKERS[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def as_chat(prompt):
    """A prompt, text or chat, as chat messages: the reverse of Human: / Assistant:, or else one user's message."""
    if not isinstance(prompt, str):
        return prompt
    # HelpSteer's longer prompts have NVIDIA's marks behind the first question
    if '<extra_id_1>' in prompt:
        return dialogue('<extra_id_1>User\n' + prompt, r'\s*<extra_id_1>(User|Assistant)\n')
    before = re.split(r'\n\n(Human|Assistant):', prompt, maxsplit=1)
    if before[0].strip() or len(before) == 1:
        return [message('user', prompt)]
    turns = dialogue(prompt, DIALOGUES['\n\nHuman:'])
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
    """The text of HTML, with its paragraphs, list items and code. Raises ValueError where it cannot be read."""
    stripper = Stripper()
    try:
        stripper.feed(html)
        stripper.close()
    except AssertionError as error:  # the library's word for what it cannot read
        raise ValueError(f'broken HTML ({error})') from None
    return stripper.text.strip()
