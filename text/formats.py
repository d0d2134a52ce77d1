"""Columns as people have them -> prompt and answers. A new layout is one row of LAYOUTS and one function.

A row is normalised (unified), its columns name a layout, and the layout's function makes examples of it, as sources.py
describes them: read(row, task) -> list. One that is marked with @of_all_rows needs the whole source:
read(rows, task) -> (row, its examples or the ValueError) of all rows. ValueError: a row is not what it should be;
LeftOut(reason): it is sound, and a rule leaves it out. task: 'pairs', 'singles', 'sft', 'prompts', or None."""

import difflib
import json
import os
import re
from functools import cache
from itertools import combinations
from operator import itemgetter
from typing import NamedTuple

from text.messages import (
    ASSISTANT,
    DIALOGUES,
    REASONING,
    ROLES,
    alternating,
    answer,
    are_texts,
    as_chat,
    as_messages,
    ask,
    check_size,
    checked,
    dialogue,
    field,
    message,
    said,
    strip_html,
    text_or_chat,
)

NUMBER = int | float
DIFFERENT = 'chosen and rejected have different prompts'
UNTRAINED = 'answers of weight 0, which are not to be trained on'

# ---- the names that people use ----

# fmt: off
# the columns that may ask: the first one there is
QUESTIONS = ('prompt', 'question', 'instruction', 'problem', 'query', 'input')
# what an instruction or a question is about, written behind it
ADDED = ('input', 'context')
ANSWERS = ('response', 'completion', 'output', 'answer', 'solution', 'label')
# in the name of a column that nobody knows
LIKE_ANSWERS = ('chosen', 'rejected', 'response', 'completion', 'output', 'answer', 'reply', 'target', 'solution')
CHATS = ('messages', 'conversations', 'conversation', 'context_messages', 'trajectory')
LABELS = ('good', 'label', 'kto_tag', 'desirable', 'is_safe')
# what --columns may name
COLUMNS = ('prompt', 'question', 'system', 'chosen', 'rejected', 'response', 'label', 'messages', 'margin', 'tools')
# other names, which stand together -> ours
RENAMED = (
    {'chosen_response': 'chosen', 'rejected_response': 'rejected'},
    {'preferred_output': 'chosen', 'non_preferred_output': 'rejected'},
    {'response_j': 'chosen', 'response_k': 'rejected'},
    {'response': 'chosen', 'rejected_response': 'rejected'},
    {'messages': 'chosen', 'rejected_messages': 'rejected'},
    {'system_prompt': 'system'},
)
# two answers that somebody has compared, and the columns that say which is better: by name or number, or by sign
COMPARED = (
    ('response_a', 'response_b'), ('response_0', 'response_1'), ('response_1', 'response_2'),
    ('response1', 'response2'), ('answer_a', 'answer_b'), ('completion_a', 'completion_b'),
    ('conversation_a', 'conversation_b'),
)
BY_NAME = ('winner', 'preferred', 'preference', 'better_response_id', 'safer_response_id')
BY_SIGN = ('preference_strength', 'overall_preference')
# what such a name may have before the letter or the number
SIDE = re.compile(r'(model|response|answer|completion|conversation|assistant|output|option)?[ _-]?([ab012])')
# where a null is not the same as no such column
NULL_SAYS = (*LABELS, *BY_NAME, *BY_SIGN, 'output_1')
# lists of answers, and of their scores
MANY = ('generations', 'responses', 'completions', 'outputs', 'all_generated_responses')
SCORES = ('correctness_math_verify', 'correctness_llama', 'scores', 'ratings', 'rating', 'rewards', 'all_rm_scores')
# behind the last of these, in a text, stands the answer; the first that a pair has is taken
TURN_MARKERS = (
    ASSISTANT, '<|im_start|>assistant\n', '<|start_header_id|>assistant<|end_header_id|>\n\n',
    '<start_of_turn>model\n', '<|assistant|>\n', '[/INST]', '### Assistant:', '### Response:', '\nAssistant:',
    ' ASSISTANT:', '\nAnswer:', '\nA:', '\nTL;DR:',
)
# fmt: on


class LeftOut(Exception):
    """A sound row that a rule leaves out: its message is the reason."""


class Layout(NamedTuple):
    """A row of LAYOUTS: a name, the columns that a row must have, and how it is read."""

    name: str
    columns: frozenset
    read: object

    @property
    def of_all_rows(self):
        return hasattr(self.read, 'of_all_rows')


# ---- any row ----


def parse_any(row, task=None, columns=None):
    """The examples of a row in any layout that LAYOUTS knows; columns: as in unified."""
    row = unified(row, columns)
    layout = layout_of(row)
    if layout.of_all_rows:
        raise ValueError(f'a row of the layout {layout.name} among others')
    try:
        return [example if 'drop' in example else _complete(example, row) for example in layout.read(row, task)]
    except LeftOut as reason:
        return [{'drop': str(reason)}]


def layout_of(row):
    """The Layout of a normalised row. Raises ValueError where its columns fit none."""
    layout = _layout_of(frozenset(row))
    if layout is None:
        raise ValueError(f"'prompt' is missing, and no other column is known{_nearest(row)}")
    return layout


@cache
def _layout_of(columns):
    return next((layout for layout in LAYOUTS if layout.columns <= columns), None)


def _nearest(row):
    """The layout that lacks least of these columns, for a message; nothing where none is near."""

    def fit(layout):
        return sum(bool(difflib.get_close_matches(name, row, 1, 0.75)) for name in layout.columns) / len(layout.columns)

    layout = max(LAYOUTS, key=fit)
    if fit(layout) < 0.5:
        return ''
    return f'; the nearest layout, {layout.name}, has {", ".join(sorted(layout.columns))}'


def unified(row, columns=None):
    """A row without nulls, with our names, where a chat is a list of {'role', 'content'}, whatever it was written as.

    columns: our name -> its column, where the user says so; no other column counts then. A null stays in columns where it
    says something, such as that nobody has labelled an answer, or preferred one."""
    if columns:
        row = {name: row.get(column) for name, column in columns.items()}
    row = {k: as_messages(v, in_turn=k in CHATS) for k, v in row.items() if v is not None or k in NULL_SAYS}
    for names in RENAMED:
        if names.keys() <= row.keys() and row.keys().isdisjoint(names.values()):
            row = {names.get(key, key): value for key, value in row.items()}

    # OpenAI's preferences, HelpSteer 3's context, and what SmolTalk 2 tells its template
    told = row.get('chat_template_kwargs')
    if isinstance(row.get('input'), dict):
        row |= unified(row.pop('input'))
    if isinstance(row.get('input'), list) and 'messages' not in row:
        row['messages'] = row.pop('input')
    if isinstance(row.get('context'), list) and 'prompt' not in row:
        row['prompt'] = row.pop('context')
    if isinstance(told, dict) and told.get('custom_instructions'):
        row.setdefault('system', told['custom_instructions'])
    return row


def _complete(example, row):
    """An example with its row's system message and tools; what to drop, where an answer has the weight 0."""
    answers = [key for key in ('chosen', 'rejected', 'response') if key in example]
    if any('weight' in turn for key in answers if isinstance(example[key], list) for turn in example[key]):
        return {'drop': UNTRAINED}

    # the weight is for the trainer, not for the template
    if isinstance(example['prompt'], list):
        example['prompt'] = [{k: v for k, v in turn.items() if k != 'weight'} for turn in example['prompt']]

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
    prompt, first = as_chat(example['prompt']), [message('system', system)]
    if prompt[0]['role'] == 'system' and prompt[0]['content'].strip() != system.strip():
        raise ValueError("the column 'system' and the system message of the chat are not the same")
    if prompt[0]['role'] == 'system':
        first = []
    chats = {'prompt': first + prompt}
    for key in answers:
        text = example[key]
        chats[key] = said(text) if isinstance(text, str) else text
    if 'turns' in example:
        chats['turns'] = first + example['turns']
    return chats


def _tools(row):
    """The column tools, a list of descriptions of functions or that as JSON; None where it has nothing."""
    tools = row.get('tools') or None
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except (ValueError, RecursionError):
        tools = 'not JSON'
    if tools in (None, [], '') or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is neither a list of tools nor one in JSON")
    check_size('tools', tools)
    return tools


# ---- pairs ----


def read_pair(row, task=None):
    """Two answers to one prompt, which has a column, or stands before both."""
    if row.get('status') == 'tie':
        raise LeftOut('tie')
    # RewardBench 2 has lists of good and of bad answers; two good ones are no pair, and nothing is lost by that
    if are_texts(row.get('chosen')) and are_texts(row.get('rejected')):
        good = [(1, said(text)) for text in row['chosen']]
        bad = [(0, said(text)) for text in row['rejected']]
        return [example for example in ranked(asked_chat(row), good + bad, task) if 'drop' not in example]
    chosen, rejected = text_or_chat(row, 'chosen'), text_or_chat(row, 'rejected')
    if type(chosen) is not type(rejected):
        raise ValueError("'chosen' is text and 'rejected' is chat, or the reverse")
    more = {} if row.get('margin') is None else {'margin': margin(row)}
    prompt = asked(row, chosen)
    if isinstance(chosen, str):
        return [example | more for example in _pair_of_texts(row, prompt, chosen, rejected)]

    # chats: all turns before the last answer are the prompt, and must be the same for both
    if not chosen or not rejected:
        raise LeftOut('empty answers')
    if (chosen[0]['role'] == 'assistant') != (rejected[0]['role'] == 'assistant'):
        raise ValueError("only one of 'chosen' and 'rejected' begins with the prompt")
    chosen, rejected = whole_chat(prompt, chosen, 'chosen'), whole_chat(prompt, rejected, 'rejected')
    return [_pair_of_chats(chosen, rejected) | more]


def _pair_of_texts(row, prompt, chosen, rejected):
    """The pair in two texts: what precedes a turn marker is the prompt, or else it may be repeated at the start of both."""
    if prompt is None:
        common = os.path.commonprefix([chosen, rejected])
        marker = ASSISTANT if ASSISTANT in chosen else next((m for m in TURN_MARKERS if m in common), None)
        if marker is None:
            marker = "no turn marker (as '\\n\\nAssistant:')"
            raise ValueError(f'no column has the prompt, and {marker} shows where answers begin')
        return parse_dialogues(row, marker)
    prompt, (chosen, rejected), repeats = without_prompt(prompt, chosen, rejected)
    # Math-Step-DPO has steps that begin both answers; CarperAI's summaries have their mark in the answers
    begun = row.get('initial_reason_steps', '')
    if isinstance(prompt, str) and chosen.startswith('TL;DR:') and rejected.startswith('TL;DR:'):
        prompt = prompt.rstrip() + '\n\n'
    pair = {'chosen': reply(row, prompt, begun + chosen), 'rejected': reply(row, prompt, begun + rejected)}
    return [{'prompt': prompt, **pair, **repeats}]


def _pair_of_chats(chosen, rejected):
    """The pair in two whole conversations that differ in their last answer."""
    if len(chosen) < 2 or not rejected or chosen[0] != rejected[0]:
        raise ValueError("'chosen' and 'rejected' do not begin with the same question")
    if chosen[:-1] != rejected[:-1]:
        raise LeftOut(DIFFERENT)
    return {'prompt': chosen[:-1], 'chosen': chosen[-1:], 'rejected': rejected[-1:]}


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


def compared(one, two, verdict):
    """A reader of two answers, or whole conversations, and the column that says which is better."""

    def read(row, task=None):
        if verdict in BY_SIGN:
            better = _by_sign(row, one, two, verdict)
        else:
            better = _by_name(row[verdict], (one, two))
        if better is None and task != 'prompts':
            raise LeftOut('tie')
        prompt, chats = asked(row), []
        for key in (two, one) if better == two else (one, two):
            found = text_or_chat(row, key)
            if not found:
                raise LeftOut('empty answers')
            # a count of tokens, say, is no part of a message
            found = (
                said(found) if isinstance(found, str) else [message(turn['role'], turn['content']) for turn in found]
            )
            chats.append(whole_chat(prompt and as_chat(prompt), found, key))
        # the better conversation needs no other with the same questions
        if task == 'sft' and len(chats[0]) > 1:
            return [{'prompt': chats[0][:-1], 'response': chats[0][-1:]}]
        return [_pair_of_chats(*chats)]

    return read


def _by_sign(row, one, two, verdict):
    """The better one by how much the second is better than the first; None for a tie."""
    strength = None if row[verdict] is None else field(row, verdict, NUMBER)
    if not strength:
        return None
    return one if strength < 0 else two


def _by_name(value, columns):
    """The column that a verdict names by its letter or number ('model_a', 'B', 1); None for a tie."""
    # a column with nulls in it has its numbers as fractions
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    name = str(value).strip().lower()
    if name in ('', 'none', 'nan', '-1', 'equal', 'draw') or 'tie' in name or 'both' in name:
        return None
    side = SIDE.fullmatch(name)
    found = [column for column in columns if side and column[-1] == side[2]]
    if not found:
        raise ValueError(f'{name[:24]!r} is neither of {" and ".join(columns)}, nor a tie')
    return found[0]


def read_votes(row, task=None):
    """LMSYS's votes as a table: questions and both sides' answers in JSON lists, and who has won in zeros and ones."""

    def texts(key):
        value = row[key]
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            raise ValueError(f'{key!r} is not a list of texts in JSON') from None
        if not are_texts(value):
            raise LeftOut('empty answers')
        return value

    chats = {}
    for side in 'ab':
        turns = zip(texts('prompt'), texts(f'response_{side}'), strict=False)
        chats[f'conversation_{side}'] = alternating([text for turn in turns for text in turn])
    won = [side for side in 'ab' if str(row[f'winner_model_{side}']) in ('1', '1.0', 'True')]
    return compared('conversation_a', 'conversation_b', 'winner')(chats | {'winner': ''.join(won)}, task)


def read_sides(row, task=None):
    """Arena's newer votes: turns that have the user's message and that of each side."""
    chats = {'conversation_a': [], 'conversation_b': []}
    for turn in field(row, 'full_conversation', list):
        for side in 'ab':
            for key in ('user', f'model_side_{side}'):
                chats[f'conversation_{side}'] += as_messages(field(turn, key, dict))
    return compared('conversation_a', 'conversation_b', 'winner')(chats | {'winner': row['winner']}, task)


def read_summaries(row, task=None):
    """openai/summarize_from_feedback's comparisons, with prompts as TRL writes them."""
    info = field(row, 'info', dict)
    texts = [answer(field(summary, 'text')) for summary in field(row, 'summaries', list)]
    if field(row, 'choice', int) not in (0, 1) or len(texts) != 2:
        raise ValueError("'choice' is neither 0 nor 1, or there are not two summaries")
    # a post of reddit, or an article of CNN or Daily Mail
    kind = 'post' if info.get('post') else 'article'
    text = field(info, kind).replace('\n\n', '\n')
    prompt = f'TITLE: {info.get("title") or ""}\n\n'
    if kind == 'post':
        prompt = f'SUBREDDIT: r/{info.get("subreddit") or ""}\n\n{prompt}POST: '
    rejected, chosen = texts if row['choice'] else texts[::-1]
    return [{'prompt': f'{prompt}{text}\n\nTL;DR:', 'chosen': chosen, 'rejected': rejected}]


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


# ---- answers with scores ----


def ranked(prompt, scored, task):
    """The examples of a prompt and its (score, answer)s: for sft the best answer, else all pairs that are no ties."""
    if task == 'prompts':
        return [{'prompt': prompt}]
    if task == 'sft' and scored:
        return [{'prompt': prompt, 'response': max(scored, key=itemgetter(0))[1]}]
    examples = []
    for pair in combinations(scored, 2):
        (high, good), (low, bad) = sorted(pair, key=itemgetter(0), reverse=True)
        examples.append({'prompt': prompt, 'chosen': good, 'rejected': bad} if high > low else {'drop': 'tie'})
    return examples or [{'drop': 'fewer than two answers'}]


def read_stack_exchange(row, task=None):
    """HuggingFaceH4/stack-exchange-preferences: a question's answers by pm_score."""
    prompt, answers = ask(strip_html(field(row, 'question'))), field(row, 'answers', list)
    scored = [(field(x, 'pm_score', NUMBER), answer(strip_html(field(x, 'text')))) for x in answers]
    return ranked(prompt, scored, task)


def read_nectar(row, task=None):
    """berkeley-nest/Nectar: a prompt in Anthropic's format, and answers by rank, 1 the best."""
    prompt, answers = field(row, 'prompt').rstrip(), field(row, 'answers', list)
    scored = [(-field(x, 'rank', NUMBER), answer(field(x, 'answer'))) for x in answers]
    return ranked(prompt, scored, task)


def read_completions(row, task=None):
    """openbmb/UltraFeedback: four answers by their score, the mean of four aspects where there is one."""
    scored = []
    for found in field(row, 'completions', list):
        mean = isinstance(found, dict) and found.get('fine-grained_score') is not None
        key = 'fine-grained_score' if mean else 'overall_score'
        scored.append((field(found, key, NUMBER), said(field(found, 'response'))))
    return ranked(asked_chat(row), scored, task)


def scored(answers, scores):
    """A reader of a list of answers and one of their scores, which may be whether they are right."""

    def read(row, task=None):
        texts, known = field(row, answers, list), field(row, scores, list)
        if not are_texts(texts, len(known)) or not all(isinstance(score, NUMBER | None) for score in known):
            raise ValueError(f'{answers!r} and {scores!r} are not as many texts and numbers')
        if task == 'sft' and not any(score is not False for score in known):
            raise LeftOut('no right answer')
        pairs = [(score, said(text)) for score, text in zip(known, texts, strict=True) if score is not None]
        return ranked(asked_chat(row), pairs, task)

    return read


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
        # RecursionError: a row that is nested a thousand deep
        except (ValueError, RecursionError) as error:
            yield row, error


def grouped(rows, task, read):
    """The examples of answers that belong together by their prompt, wherever they stand; they come with its first row.

    read(row) -> (prompt, [(score, answer)])."""
    groups = {}  # prompt as JSON -> (first row, prompt, scored)
    for row, found in each(rows, read):
        if not isinstance(found, tuple):
            yield row, found
            continue
        prompt, scored = found
        known = groups.setdefault(json.dumps(prompt), (row, prompt, []))[2]
        known += [pair for pair in scored if pair not in known]
    for row, prompt, scored in groups.values():
        yield row, ranked(prompt, scored, task)


@of_all_rows
def read_shp(rows, task=None):
    """stanfordnlp/SHP: pairs with a score ratio of 2 or more; SFT on the best answer in a prompt's kept pairs."""

    def read(row):
        a = field(row, 'score_A', NUMBER), answer(field(row, 'human_ref_A'))
        b = field(row, 'score_B', NUMBER), answer(field(row, 'human_ref_B'))
        if field(row, 'labels', int) not in (0, 1):
            raise ValueError("'labels' is neither 0 nor 1")
        prompt = ask(field(row, 'history'))
        low, high = sorted((a[0], b[0]))
        if high < 2 * low:
            raise LeftOut('score ratio below 2')
        if task == 'sft':
            return prompt, [a, b]
        # 1: A is preferred
        good, bad = (a, b) if row['labels'] else (b, a)
        return [{'prompt': prompt, 'chosen': good[1], 'rejected': bad[1]}]

    return grouped(rows, task, read) if task == 'sft' else each(rows, read)


@of_all_rows
def read_rated(rows, task=None):
    """HelpSteer and HelpSteer 2: an answer a row, with its ratings; the answers to a prompt are compared by helpfulness."""

    def read(row):
        row = unified(row)
        return asked_chat(row), [(field(row, 'helpfulness', NUMBER), said(field(row, 'response')))]

    return grouped(rows, task, read)


@of_all_rows
def read_trees(rows, task=None, language=None):
    """OpenAssistant: each ranked answer against the next better one, after the conversation so far; for sft the best one.

    language: only messages in this one."""
    rows = list(rows)
    # what stands above a message, and which answer is the next better one; broken rows are reported by read
    by_id, by_rank = {}, {}
    for row in rows:
        identity, parent, rank = (row.get(key) for key in ('message_id', 'parent_id', 'rank'))
        if not isinstance(identity, str) or not isinstance(parent, str | None):
            continue
        by_id[identity] = row
        if parent and isinstance(rank, int) and language in (None, row.get('lang')):
            by_rank[parent, rank] = row

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
        if language and field(row, 'lang') != language:
            raise LeftOut('not English')
        identity, role = field(row, 'message_id'), field(row, 'role')
        if role not in ('prompter', 'assistant'):
            raise ValueError("'role' is neither prompter nor assistant")
        if task == 'prompts' or role == 'prompter':
            return [{'prompt': above(identity)}] if role == 'prompter' and task == 'prompts' else []
        if row.get('rank') is None:
            raise LeftOut('an answer without a rank')
        rank, parent = field(row, 'rank', int), field(row, 'parent_id')
        mine = [message('assistant', field(row, 'text'))]
        # rank 0, the best, takes part as the better one of rank 1
        if rank == 0:
            return [{'prompt': above(parent), 'response': mine}] if task == 'sft' else []
        if task == 'sft':
            raise LeftOut('answers that are not the best')
        # the better one of the pair has the same parent
        better = by_rank.get((parent, rank - 1))
        if better is None:
            raise LeftOut('no answer of the next better rank')
        return [{'prompt': above(parent), 'chosen': [message('assistant', field(better, 'text'))], 'rejected': mine}]

    return each(rows, read)


# ---- single answers, conversations, texts, prompts ----


def read_answer(row, task=None):
    """A prompt and an answer, which a label may call good or bad."""
    key = next(column for column in ANSWERS if column in row)
    # LLaMA-Factory's older pairs: the good and the bad output
    if are_texts(row[key], 2):
        chosen, rejected = row.pop(key)
        return read_pair(row | {'chosen': chosen, 'rejected': rejected}, task)
    response = text_or_chat(row, key)
    prompt = asked(row, response)
    # a label that is a text is the answer itself
    more = {} if key == 'label' else thumb(row)
    if isinstance(response, str):
        if prompt is None:
            raise ValueError("'prompt' is missing")
        prompt, (response,), repeats = without_prompt(prompt, response)
        example = {'prompt': prompt, 'response': reply(row, prompt, response), **repeats, **more}
        # the answers of a history are trained on, too, as LLaMA-Factory does
        return [_every_answer(example)] if _is_history(row.get('history')) else [example]
    if not response:
        raise LeftOut('empty answers')
    turns = whole_chat(prompt, response, key)
    if len(turns) < 2:
        raise ValueError("'prompt' is missing")
    return [{'prompt': turns[:-1], 'response': turns[-1:], **more}]


def read_label(row, task=None):
    """CarperAI's summaries, where the label is a text, the answer; any other label says nothing without an answer."""
    if not isinstance(row['label'], str):
        return read_prompt(row, task)
    _no_other_answer(row, task)
    return read_answer(row, task)


def read_solution(row, task=None):
    """DeepMath: a question and three correct solutions, of which the first is taken."""
    return read_answer({'question': row['question'], 'answer': row['r1_solution_1']}, task)


def read_chat(row, task=None):
    """A conversation: all its answers are trained on, and the last one is the response."""
    key = next(column for column in CHATS if column in row)
    turns = [checked(turn) for turn in field(row, key, list)]
    check_size(key, turns)
    if turns and turns[-1]['role'] != 'assistant':
        # the answer may have a column of its own
        if any(isinstance(row.get(column), (str, list)) for column in ANSWERS):
            return read_answer(row, task)
        if turns[-1]['role'] not in ROLES.values():
            text_or_chat(row, key)  # says that this is no answer
        if task == 'prompts' or (task is None and len(turns) == 1):
            return [{'prompt': turns}]

    # an empty answer is no demonstration; one that has a label stays, for the label is its own
    good = thumb(row)
    if task != 'prompts' and not good and any(map(_filled, turns)):
        turns = [turn | {'weight': 0} if turn['role'] == 'assistant' and not _filled(turn) else turn for turn in turns]

    # as FastChat does: what precedes the first question, and what follows the last answer, is left out
    first = next((i for i, turn in enumerate(turns) if turn['role'] != 'assistant'), len(turns))
    last = max((i for i, turn in enumerate(turns) if _trained(turn)), default=-1)
    if first >= last:
        untrained = any('weight' in turn for turn in turns)
        raise LeftOut(UNTRAINED if untrained else 'conversations without a question and its answer')
    notes = [{'drop': 'note: conversations that begin with an answer, which is left out'}] if first else []
    if last < len(turns) - 1:
        notes.append({'drop': 'note: conversations that go on behind the last answer to train on: left out'})
    example = {'prompt': turns[first:last], 'response': [turns[last]], **good}
    return [example if 'good' in example else _every_answer(example), *notes]


def _trained(turn):
    return turn['role'] == 'assistant' and turn.get('weight') != 0


def _filled(turn):
    """Whether a message is an answer that says something, or calls a tool."""
    said_or_called = turn['content'].strip() or any(turn.get(key) for key in ('tool_calls', *REASONING))
    return turn['role'] == 'assistant' and bool(said_or_called)


def _every_answer(example):
    """An example with 'turns', all its messages, where it has more answers to train on than the last one."""
    turns = [*example['prompt'], *example['response']]
    return example | {'turns': turns} if sum(map(_trained, turns)) > 1 else example


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
    _no_other_answer(row, task)
    return [{'prompt': asked(row)}]


def _no_other_answer(row, task):
    """Raise ValueError where an answer is wanted, and a column that nobody knows is called like one."""
    # a solution, the last word, may be there for a reward alone
    words = LIKE_ANSWERS if task else LIKE_ANSWERS[:-1]
    for name, value in row.items() if task != 'prompts' else ():
        if value and isinstance(value, str | list) and any(word in name.lower() for word in words):
            raise ValueError(f'{name!r} may be an answer, and is no column that is known beside a prompt')


# fmt: off
LAYOUTS = [Layout(name, frozenset(columns.split()), read) for name, columns, read in (
    # the first whose columns a row has
    ('AlpacaEval annotations', 'preference output_1', parse_annotation),
    ('SHP', 'history human_ref_A human_ref_B labels', read_shp),
    ('Stack Exchange', 'question answers', read_stack_exchange),
    ('Nectar', 'prompt answers', read_nectar),
    ('OpenAssistant', 'message_id text role', read_trees),
    ('summaries', 'info summaries choice', read_summaries),
    ('arena', 'prompt response_a response_b winner_model_a winner_model_b', read_votes),
    *[('comparison', f'{one} {two} {verdict}', compared(one, two, verdict))
      for verdict in (*BY_NAME, *BY_SIGN) for one, two in COMPARED],
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
    ('answer', 'prompt answer', read_answer),
    ('answer', 'instruction answer', read_answer),
    ('answer', 'query answer', read_answer),
    ('answer', 'prompt label', read_label),
    ('DeepMath', 'question r1_solution_1', read_solution),
    *[('scored answers', f'{answers} {scores}', scored(answers, scores)) for answers in MANY for scores in SCORES],
    ('UltraFeedback', 'instruction completions', read_completions),
    ('answer', 'question answer', read_answer),
    ('answer', 'problem solution', read_answer),
    ('text', 'text', read_text),
    *[('prompt', column, read_prompt) for column in QUESTIONS],
)]
# fmt: on


# ---- the parts of a row ----


def asked(row, found=()):
    """What the columns of a row ask: text that the answer goes on from, or chat; None where no column asks.

    The text of 'prompt', and whatever ends in a turn marker, stays text; a question or an instruction becomes a message.
    found: the answer, which, as a chat, may have the question in it."""
    column = next((c for c in QUESTIONS if c in row), None)
    chat = next((c for c in CHATS if c in row), None)
    # a conversation that ends with a question asks it
    if chat and column != 'prompt':
        turns = text_or_chat({'prompt': field(row, chat, list)}, 'prompt')
        return None if turns[-1]['role'] == 'assistant' else turns
    if column is None:
        return None
    prompt = text_or_chat(row, 'prompt') if column == 'prompt' else field(row, column)
    for more in ADDED if column in ('question', 'instruction') else ():
        prompt += '\n\n' + field(row, more) if row.get(more) else ''
    turns = [turn for part in (prompt, found) if isinstance(part, list) for turn in part]
    nothing_lost(row, column, '\n'.join([str(prompt), *(turn['content'] for turn in turns)]))
    if isinstance(prompt, str) and _is_history(row.get('history')):
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


def nothing_lost(row, column, text):
    """Raise ValueError where another column asks, too, and what it says is not in this text."""
    for other in {*QUESTIONS, *ADDED, 'history'} - {column}:
        value = row.get(other)
        if value and not (isinstance(value, str) and value.strip() in text) and not _is_history(value):
            raise ValueError(f'{other!r} asks something, too, which would be lost beside {column!r}')


def _is_history(value):
    """Whether these are LLaMA-Factory's earlier turns, each a question and its answer."""
    return isinstance(value, list) and bool(value) and all(are_texts(turn, 2) for turn in value)


def reply(row, prompt, text):
    """The text of an answer; behind a question that has become a message, a message, too."""
    return said(text) if isinstance(prompt, list) and not isinstance(row.get('prompt'), list) else text


def thumb(row):
    """{'good': whether the answer is good}, if a column says so."""
    column = next((c for c in LABELS if c in row), None)
    if column is None:
        return {}
    value = row[column]
    # a table has them as text
    if isinstance(value, str):
        value = {'true': 1, 'false': 0, '1': 1, '0': 0}.get(value.lower())
    if not isinstance(value, NUMBER) or value not in (0, 1):  # True and False are numbers, too
        raise ValueError(f'{column!r} is neither true (1) nor false (0)')
    return {'good': bool(value)}


def margin(row):
    """row['margin'], a finite number."""
    value = field(row, 'margin', NUMBER)
    if not abs(value) < 1e30:
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
    if not answer or answer[0]['role'] == 'assistant':
        return turns + answer

    # the whole chat: it begins with the prompt, but for a system message that only one of them has
    system = [] if answer[0]['role'] == 'system' else [turn for turn in turns[:1] if turn['role'] == 'system']
    bare = [turn for turn in turns if turn['role'] != 'system']
    if [turn for turn in answer if turn['role'] != 'system'][: len(bare)] == bare:
        return system + answer
    if not isinstance(prompt, str):
        raise ValueError(f'{key!r} begins with a question that is not the prompt')
    # a prompt of text may be any of the questions of a longer chat, or all of them
    questions = [turn['content'].strip() for turn in answer[:-1] if turn['role'] == 'user']
    joined = len(questions) > 1 and all(text in prompt for text in questions)
    if not joined and not any(prompt.strip() in text for text in questions):
        raise LeftOut('answers to something else than the prompt')
    return system + answer
