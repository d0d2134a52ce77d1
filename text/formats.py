"""Read the column layouts that people use into prompts and answers.

unified() gives a row's columns our names and parses its chats. The first Layout whose columns the row has then reads it:
read(row, task) returns a list of examples (described in sources.py). Readers in OF_ALL_ROWS need the whole dataset:
read(rows, task) yields (row, its examples or a ValueError). task: 'pairs', 'singles', 'sft', 'prompts' or None.
Readers raise ValueError for invalid rows and LeftOut for valid rows that a rule excludes.
To add a layout, write a reader and add a row to READERS."""

import json
import os
import re
from collections import Counter, defaultdict, namedtuple
from functools import lru_cache, partial
from itertools import chain, combinations, compress, dropwhile, pairwise
from operator import itemgetter

from text import messages
from text.messages import ASSISTANT, answer, are_texts, as_chat, as_list, ask, field, message, said, text_or_chat

NUMBER = int | float
MINUS_ONE = 'verdicts of -1, as ties'
DIFFERENT = 'chosen and rejected have different prompts'
UNTRAINED = 'answers of weight 0, which are not to be trained on'
UNTHOUGHT = 'note: thoughts in a column of their own, which answers to a prompt of text cannot have'
FOR_TESTS = 'note: rows that are for tests, as their column {!r} says'
JUDGES = 'note: rows that the column {!r} may judge, which is not read'
AS_LIST = 'note: answers that are lists in JSON or Python, as texts: if each has several answers, write lists in .jsonl'
NO_TEXT = 'note: rows whose {!r} is a word such as nan or None: if it means nothing, leave it empty'
NO_QUESTION = 'note: examples with an empty question'
LACKING = 'note: rows that lack one of the columns {}, by which others are read: they are read by what they have'
CONTRADICTED = 'note: pairs whose scores or margin rate the rejected answer higher than the chosen one'
LATER = 'messages behind a first question, which go on from an answer'
WHOLE = 'note: texts of several turns in the form of a chat template, learnt whole: as messages only the answers are'
LINES = 'note: texts that begin with a time and a name, as lines of a chat: each is learnt by itself, and as messages only answers are'
UNASKED = 'note: conversations that lose what precedes the first question or follows the last answer to train on'

# fmt: off
# columns with the question; the first one present is used
QUESTIONS = 'prompt question instruction problem query input'.split()
# columns that hold the question if none of those and no chat does
ASKING = ('user_prompt user_input user_message user_query user_question user_request request question_text prompt_text human inputs '
          'context').split()
# columns with more context for a question
ABOUT = ('context history options choices article passage starter_code chat_history conversation_history dialogue_history '
         'dialog_history previous_messages instructions').split()
# columns that are each one of a question's options: A and B, option_a, opb, choice1, ans0, mc_answer1
OPTION = re.compile(r'((op|opt|option|choice|ans|mc_answer|ending)[_ ]?[a-e0-5]|[a-e])', re.IGNORECASE)
# columns with texts that a question is about, or with names of files, or numbers
DOCUMENTS = 'document documents passages contexts ctxs body story paragraph premise article passage preamble sql_context'.split()
# columns with the answer, best first: next to a full solution, 'answer' is only its last line
ANSWERS = 'response completion output generation solution answer'.split()
# columns with an answer that may be meant in place of another one
BETTER = re.compile('(corrected|edited|revised|improved|preferred|expected|reference)_?(response|output|completion)|expected|ideal')
THOUGHTS = (*messages.REASONING, 'complex_cot', 'cot')  # columns with the thought behind the answer
# an unknown column whose name contains one of these may be an answer
LIKE_ANSWERS = 'chosen rejected response completion output answer reply target'.split()
CHATS = 'messages conversations conversation context_messages trajectory'.split()
LABELS = 'good label kto_tag desirable is_safe is_correct is_good is_desirable thumbs_up liked upvoted'.split()
TEXTS = {*QUESTIONS, *ABOUT, *ANSWERS, 'system'}
# the names that --columns accepts
COLUMNS = ('prompt question system chosen rejected response label messages text margin tools '
           'response_a response_b response_0 response_1 response_2 winner').split()
# the two answers of a pair by other names: chosen_response and rejected_response, response_chosen, preferred_output, ...
SIDES = [sides.split('/') for sides in (
    'chosen/rejected accepted/rejected selected/rejected preferred/non_preferred chosen/reject preferred/dispreferred winning/losing '
    'win/lose better/worse best/worst y_w/y_l').split()]
# and with a word that is a label by itself
LABELLED_SIDES = [['good', 'bad'], ['correct', 'incorrect']]
SIDE_NAMES = '{} {}_response response_{} {}_answer answer_{} {}_output {}_completion {}_text text_{} {}_conversations {}_messages'.split()
# their name=our name; an entry applies if a row has all its columns
RENAMED = []
for name in SIDE_NAMES:
    for good, bad in SIDES if name == '{}' else SIDES + LABELLED_SIDES:
        RENAMED.append({name.format(good): 'chosen', name.format(bad): 'rejected'})
for entry in (
    'response_j=chosen response_k=rejected, pos_resp=chosen neg_resp=rejected, response=chosen rejected_response=rejected, '
    'messages=chosen rejected_messages=rejected, system_prompt=system, system_message=system, input_text=input, '
    'answer=chosen rejected_answer=rejected, real=chosen generated=rejected, '
    'messages=messages rejected_message=rejected_response, contents=prompt completions=completions, '
    'messages=messages functions=tools, inputs=input targets=output, input=input target=output, '
    'definition=instruction input=input output=output, human=instruction assistant=response, '
    'user=instruction assistant=response, reasoning_content=reasoning_content content=response, r1_solution_1=response, '
    'generated_solution=response, output_text=response, model_a_name=model_a, model_b_name=model_b, model_0_name=model_0, '
    'model_1_name=model_1, model_2_name=model_2, system_instruction=system, '
    'model_a_response=response_a model_b_response=response_b, model_1_response=response_1 model_2_response=response_2, '
    'assistant_a=response_a assistant_b=response_b'
).split(','):
    RENAMED.append(dict(names.split('=') for names in entry.split()))
# known columns that may hold a chat in place of a text -> our name for it
RENAMED_CHATS = {'input': 'messages', 'context': 'prompt', 'query': 'prompt', 'contents': 'messages'}
# pairs of columns with two answers to compare: response_a and response_b, response_0 and response_1, ...
STEMS = ('response_ response answer_ answer completion_ completion conversation_ conv_ output_ output candidate_ candidate '
         'messages_').split()
COMPARED = [(stem + first, stem + second) for stem in STEMS for first, second in ('ab', '01', '12')]
# columns with their scores, which tell the better one, too
SCORED = []
for one, two in COMPARED:
    for form in ('score_{1}', '{0}_rating', '{0}_score'):
        SCORED.append((one, two, form.format(one, one[-1]), form.format(two, two[-1])))
# columns with the verdict: the name or number of the better answer, or a number whose sign says which one is better
BY_NAME = ('winner verdict chosen_model_name preferred preference better_response_id safer_response_id overall_response choice label '
           'better_response human_preference human_choice better best preferred_response selected vote judgment judgement').split()
VERDICTS = [*BY_NAME, 'preference_strength', 'overall_preference']
# such a verdict: model_a, [[b]], 1, 1.0, a>>b, 'a is slightly better'; but -1 is no 1
VERDICT = re.compile(r'((model|response|answer|completion|conversation|assistant|output|option)[ _-]?[(]?)?([ab012]|first|second|left|right)(\.0|>+.|'
                     r'[ -]is([ -](much|far|clearly|slightly|significantly|somewhat|marginally|a (bit|little|lot)))?[ -]better)?')
YES, NO = 'true yes y 1 1.0'.split(), 'false no n 0 0.0'.split()  # words of flags and of labels
FLAGS = [*YES, *NO, '-1', '-1.0']  # values of which one says the contrary of others
GOOD = 'good desirable chosen positive pos correct safe pass passed accept accepted like liked up thumbs_up upvote helpful 👍'.split()
BAD = ('bad undesirable rejected negative neg incorrect poor wrong failed fail reject unsafe harmful toxic dislike disliked '
       'down thumbs_down thumbsdown downvote unhelpful unacceptable 👎').split()
GRADES = {*BAD, 'good', 'correct', 'positive'}  # values that judge
# what columns say of a row: (why it is left out, columns, words that say so). The last five are of pairs; '' may turn a pair round
UNUSED = 'rows that a flag marks as not to be used'
STATES = 'status review_status state'.split()
JUDGED = [*VERDICTS, *STATES, 'outcome', 'result', 'majority']
MARKS = [
    (UNUSED, 'skip skipped exclude excluded discard discarded ignore ignored deleted is_deleted removed invalid'.split(), YES),
    (UNUSED, 'valid is_valid usable keep include'.split(), NO),
    (UNUSED, STATES, 'discarded skipped invalid'.split()),
    (UNUSED, STATES, ['rejected']),
    ('tie', 'tie is_tie tied draw equal is_equal no_preference'.split(), YES),
    ('tie', JUDGED, ['tie']),
    ('', 'flip flipped is_flipped label_flipped swap swapped is_swapped order_swapped reversed rejected_is_better'.split(), YES),
    ('', JUDGED, ['rejected']),
]
# columns that tell the split of a row, and what they say of one for tests
SPLITS = 'split data_split dataset_split set subset fold partition type'.split()
HELD_OUT = 'test testing validation valid val dev eval held_out heldout holdout'.split()
EITHER_SPLIT = ['train', *HELD_OUT]
TEST_FLAGS = 'is_test is_eval is_validation is_holdout held_out'.split()
# columns that few rows need; tables and programs write NOTHING where there is no text
ADDED, NOTHING = 'input context system'.split(), 'nan none null n/a <noinput>'.split()
# what notes say of columns that have one of these words
NOTED = [(FOR_TESTS, SPLITS, HELD_OUT), (FOR_TESTS, TEST_FLAGS, YES), (NO_TEXT, ADDED, NOTHING)]
# columns with the scores of two answers, the higher the better, and with what may judge a single one
RATED = re.compile('score|rating|reward|grade', re.IGNORECASE)
JUDGING = re.compile(f'{RATED.pattern}|rank|quality|feedback|thumb|vote|prefer|toxic|harm|helpful|correct|accept', re.IGNORECASE)
PERSONAS = 'persona character rubric rubrics criteria criterion principle principles'.split()  # columns with what an answer should be like
WRITERS = 'user username sender from speaker'.split()  # columns with who has written a text
CLASSES = (*LABELS, *'labels label_text label_name class sentiment emotion intent polarity stars rating'.split())
# columns that link rows: with the id of the row before, and of the conversation that rows may be parts of
PARENTS = re.compile(r'parent|(in_)?(reply|response)_to|(parent|(in_)?(reply|response)_to|prev(ious)?)_(\w+_)?id')
THREADS = re.compile(r'(conv(ersation)?|dialog(ue)?|chat|thread|session|ticket)_(uu)?(id|ts)')
NULL_SAYS = (*LABELS, *VERDICTS, 'output_1')  # columns where null has a meaning: not labelled, or no winner
# columns with lists of answers, and with lists of their scores
MANY = 'generations responses completions outputs all_generated_responses samples answers'.split()
SCORES = 'correctness_math_verify correctness_llama correctness is_corrects scores ratings rating rewards all_rm_scores'.split()
# in lists of objects, fields with an answer, and with its score
ITEM_ANSWERS = 'completion answer response text'.split()
ITEM_SCORES = 'rank fine-grained_score overall_score score pm_score rating reward'.split()
# markers between a prompt and its answer in one text, in order of preference; the first are those of chat templates
TEMPLATE_MARKERS = ('<|im_start|>assistant\n', '<|start_header_id|>assistant<|end_header_id|>\n\n', '<start_of_turn>model\n',
                    '<|assistant|>\n', '[/INST]', ' ASSISTANT:')
# how a whole text begins that a chat template has written
TURN_START = r'\[INST\]|<\|(?:im_start|start_header_id|user|system)\|>|<start_of_turn>|USER:'
TEMPLATE_TEXT = re.compile(rf'\s*(<s>|<bos>|<\|begin_of_text\|>)?\s*({TURN_START})')
# how a line of an exported chat begins: [12/1/24, 10:00] Name:
CHAT_LINE = re.compile(r'\[?\d{1,4}[./-]\d{1,2}[./-]\d{2,4},?\s\d{1,2}[:.]\d\d[^\]:]{0,9}(:\d\d)?[^\]:]{0,9}\]?\s(-\s)?[^:]{1,40}:\s')
TURN_MARKERS = (ASSISTANT, *TEMPLATE_MARKERS, '### Assistant:', '### Response:', '\nAssistant:', '\nAnswer:', '\nA:',
                '\nTL;DR:')
# fmt: on


class LeftOut(Exception):
    """Raised for a valid row that a rule excludes; the message is the reason."""


Layout = namedtuple('Layout', 'name columns read')  # columns: a frozenset of the columns that a row must have


def each(rows, read):
    """Yield (row, read(row)) for every row; (row, ValueError) if it is invalid, (row, [{'drop': reason}]) if it is left out."""
    for row in rows:
        try:
            # the line of the file could not be parsed (readers.py)
            if row.error:
                raise ValueError(row.error)
            yield row, read(row)
        except LeftOut as reason:
            yield row, [{'drop': str(reason)}]
        except ValueError as error:
            yield row, error
        # unexpected nesting, such as a thousand levels, or a list in place of a text
        except (RecursionError, TypeError, LookupError, AttributeError) as error:
            yield row, ValueError(f'its columns cannot be read ({error})')


def parse_any(raw, task=None, columns=None, judges=()):
    """Return the examples of a raw row in any layout. columns: {our name: column}, or None to detect them. judges: of unread_texts()."""
    row = unified(raw, columns)
    given = frozenset(row)
    layout = layout_of(given)
    if layout.read in OF_ALL_ROWS:
        raise ValueError(f'a row of the layout {layout.name} among others')
    check_flags(row, is_pair=layout.read in (read_pair, read_compared) and task != 'prompts')
    examples = [example if 'drop' in example else _completed(example, row) for example in layout.read(row, task)]
    # a text to learn has no question; of a chat, the last message is one
    if layout.read is not read_text:
        prompts = [example['prompt'] for example in examples if 'prompt' in example]
        questions = [prompt if isinstance(prompt, str) else prompt[-1:] for prompt in prompts]
        examples += [{'drop': NO_QUESTION}] * sum(map(messages.is_empty, questions))
    examples += [{'drop': note.format(spelled(column, raw))} for note, column in marks_of(row, chain(NOTED, judges))]
    examples += [{'drop': note} for note, columns, words in judges if not words and not given.issuperset(columns)]
    # tables may have a list of answers as one text
    answers = [row[name] for name in ('chosen', 'rejected', *ANSWERS) if isinstance(row.get(name), str)]
    if any(text.startswith(('["', "['")) for text in answers):
        examples.append({'drop': AS_LIST})
    return examples


def check_flags(row, is_pair):
    """Raise LeftOut for a row that is marked as not to be used or as a tie, ValueError for a pair that a flag may turn round."""
    for reason, column in marks_of(row, MARKS if is_pair else MARKS[:3]):
        if reason:
            raise LeftOut(reason)
        doubt = f'{column!r} may mean that the two answers have changed places'
        raise ValueError(f'{doubt}: if they have not, name the columns that count with --columns')


def marks_of(row, marks):
    """Yield (reason, column) for each column of a row that has one of the words. marks: [(reason, columns, words)]."""
    for reason, columns, words in marks:
        for column in filter(row.__contains__, columns):
            # without words the mark is of rows that lack a column, see unread_texts()
            if words and str(row[column]).strip().lower() in words:
                yield reason, column


def _completed(example, row):
    """Return an example with its row's tools and system message, or {'drop': UNTRAINED} if an answer has the weight 0."""
    answers = [example[key] for key in ('chosen', 'rejected', 'response') if key in example]
    # read_message keeps a weight only if it is 0
    if any(isinstance(chat, list) and 'weight' in chat[0] for chat in answers):
        return {'drop': UNTRAINED}
    # chat templates must not see the weights; the turns are copied, for example['turns'] may have the same dicts
    prompt = example['prompt']
    if isinstance(prompt, list):
        example['prompt'] = [{key: value for key, value in turn.items() if key != 'weight'} for turn in prompt]
    if row.get('tools'):
        example['tools'] = field(row, 'tools', list)
    if not row.get('system'):
        return example
    # a prompt that a chat template has already written may contain the system message
    system = field(row, 'system')
    text = prompt if isinstance(prompt, str) else ''
    if text.endswith(TURN_MARKERS) and system.strip() in text:
        return example
    if text.endswith(TEMPLATE_MARKERS):
        raise ValueError("the prompt is written by a chat template already, without the message in 'system'")
    if not prompt:
        raise ValueError("there is a 'system' message and no question behind it")
    # as_chats turns texts into chats; it adds none to a chat that has a system message, which must then say the same
    example = messages.as_chats(example, system)
    if example['prompt'][0]['content'].strip() != system.strip():
        raise ValueError("the column 'system' and the system message of the chat are not the same")
    return example


@lru_cache(1000)
def layout_of(columns):
    """Return the first Layout that fits a unified row's columns, a frozenset. Raises ValueError, with the nearest, if none does."""
    for layout in LAYOUTS:
        if layout.columns <= columns:
            return layout
    # the layout of whose columns the row has the largest share
    nearest = max(LAYOUTS, key=lambda layout: len(layout.columns & columns) / len(layout.columns))
    hint = f'; the nearest layout, {nearest.name}, has {", ".join(sorted(nearest.columns))}'
    has_a_column = not nearest.columns.isdisjoint(columns)
    raise ValueError(f"'prompt' is missing, and no other column is known{hint if has_a_column else ''}")


def spelled(plain, names):
    """Return the first of the names that has this plain_name, or else the plain_name."""
    return next((name for name in names if plain_name(name) == plain), plain)


@lru_cache(1000)
def plain_name(name):
    """Return a column's name as the lists above have it: 'Response A', 'response-a' -> 'response_a', 'isSafe' -> 'is_safe'."""
    return re.sub('[ -]|(?<=[a-z])(?=[A-Z][a-z])', '_', name.strip()).lower()


def plain(row):
    """Return a row, with its names in the one spelling of plain_name, as a dict. Names that would be the same stay as they are."""
    plain_row = {plain_name(name): value for name, value in row.items()}
    if len(plain_row) == len(row):
        return plain_row
    counts = Counter(map(plain_name, row))
    plain_row = {}
    for name, value in row.items():
        plain_one = plain_name(name)
        plain_row[plain_one if counts[plain_one] == 1 else name] = value
    return plain_row


def unified(row, columns=None):
    """Return a copy of a row with our column names, every chat as a list of messages, and no null columns.

    columns: {our name: column of the row}; if given, only these are read. Raises ValueError."""
    row = plain(row)
    if columns:
        row = {name: row.get(column, row.get(plain_name(column))) for name, column in columns.items()}
    # 'data' next to 'id' is a chat (UltraChat)
    chat_columns = [*CHATS, 'data'] if 'id' in row else CHATS
    row = {name: messages.as_messages(value, must_be_chat=name in chat_columns) for name, value in row.items()}
    # nulls stay where they mean "not labelled" or "no winner"; NaN, which is not equal to itself, is one of ADDED
    filled = {}
    for name, value in row.items():
        is_null = value is None or (name in ADDED and value != value)
        if is_null and name not in NULL_SAYS:
            continue
        if value and messages.MEDIA(name):
            raise ValueError(f'{name!r} would be lost: only text is read')
        filled[name] = value
    row = dict(zip(rename_columns(tuple(filled)), filled.values(), strict=True))
    # these change the row in place
    _find_chat(row)
    _unpack(row)
    _parse_tools(row)
    return row


def _find_chat(row):
    """Give a row's system message and chat the names 'system' (a text) and 'messages' (or 'prompt'), in place."""
    # Gemini: the system message is one, perhaps without a role
    system = row.get('system')
    parts = as_list(system)
    if system and all(isinstance(part, dict) for part in parts):
        turns = [messages.read_message({'role': 'system'} | part) for part in parts]
        row['system'] = '\n'.join(turn['content'] for turn in turns)
    # OpenAI's preference format has the chat and its tools in 'input', NeMo Gym in the other one
    for name in ('input', 'responses_create_params'):
        if isinstance(row.get(name), dict):
            row |= unified(row.pop(name))
    for name, our_name in RENAMED_CHATS.items():
        if isinstance(row.get(name), list) and row[name] and our_name not in row:
            row[our_name] = row.pop(name)
    # if a column is known, no other one needs to be the chat
    if not KNOWN.isdisjoint(row.keys() - {'system', 'tools', 'turns', *ABOUT, *DOCUMENTS}):
        return
    # otherwise it is the only column with messages, or the one with one of these names
    chats = []
    for name, value in row.items():
        turns = value if isinstance(value, list) else []
        if turns and all(isinstance(turn, dict) and turn.keys() & {'role', 'from'} for turn in turns):
            chats.append(name)
    name = chats[0] if len(chats) == 1 else first_of(('items', 'dialogue', 'data'), chats)
    if name:
        row['messages'] = row.pop(name)


def _parse_tools(row):
    """Replace the tools of a row, which may be JSON as a whole or one by one, by a list, in place. Raises ValueError."""
    tools = row.pop('tools', None) or []
    # parse_literal gives None for a text that is no JSON, and for 'null', which means no tools
    if isinstance(tools, str):
        tools = messages.parse_literal(tools) if tools.strip() != 'null' else []
    if are_texts(tools):
        tools = [messages.parse_literal(text) for text in tools]
    if tools is None or None in tools:
        raise ValueError("'tools' has a text that is no JSON")
    if tools:
        row['tools'] = tools


@lru_cache(1000)
def rename_columns(columns):
    """Return a tuple of column names, renamed by every entry {their name: our name} of RENAMED that applies."""
    for names in RENAMED:
        # all of their names must be there, and none of ours, so that no two columns get one name
        new_names = set(names.values()) - names.keys()
        if names.keys() <= set(columns) and new_names.isdisjoint(columns):
            columns = tuple(names.get(name, name) for name in columns)
    return columns


def _unpack(row):
    """Move question, answers, scores and template settings out of the objects that data sets keep them in, in place."""
    # a text is the question if nothing else asks
    asks = first_of(ASKING, row)
    if isinstance(row.get(asks), str) and not first_of((*QUESTIONS, *CHATS, 'text'), row):
        row['question'] = row.pop(asks)
    _unpack_scored(row)
    # a single number or text in such a column does not score a list of answers
    for name in SCORES:
        if not isinstance(row.get(name, []), list):
            del row[name]
    # Arena's newer votes: a list of {'user', 'model_side_a', 'model_side_b'}, each a message, or beside it the two conversations
    if {'full_conversation', 'winner'} <= row.keys() and 'conversation_a' not in row:
        for side in 'ab':
            turns = [turn[key] for turn in row['full_conversation'] for key in ('user', f'model_side_{side}')]
            # as_messages makes a list of each message
            row[f'conversation_{side}'] = list(chain.from_iterable(map(messages.as_messages, turns)))
    # WebGPT: {'full_text': question, ...}
    if isinstance(row.get('question'), dict):
        row['question'] = row['question'].get('full_text', row['question'])
    # SQuAD: several answers that mean the same, of which the first is used; ChatQA: a list of one, beside a chat
    answers = row.get('answers')
    if isinstance(answers, dict) and answers.keys() == {'text', 'answer_start'}:
        row['answer'] = next(iter(row.pop('answers')['text']), '')
    elif are_texts(answers, 1) and 'messages' in row:
        [row['answer']] = row.pop('answers')
    # ms-swift: the chat ends with the chosen answer, the rejected one has its own column
    if isinstance(row.get('rejected_response'), str | list) and isinstance(row.get('messages'), list):
        chat = row['chosen'] = row.pop('messages')
        row['rejected'] = chat[:-1] + said(row.pop('rejected_response'))
    # CarperAI's answers are texts in the column 'label'; a label is a single word
    is_text = isinstance(row.get('label'), str) and ' ' in row['label'].strip()
    if is_text and 'prompt' in row and layout_of(frozenset(row)).read is read_prompt:
        row['completion'] = row.pop('label')
    # SmolTalk 2: {'custom_instructions': system message, 'xml_tools' or 'python_tools': tools} for the chat template
    template_args = row.get('chat_template_kwargs')
    if isinstance(template_args, dict):
        for name, our_name in (('custom_instructions', 'system'), ('xml_tools', 'tools'), ('python_tools', 'tools')):
            if template_args.get(name):
                row.setdefault(our_name, template_args[name])


def _unpack_scored(row):
    """Make two lists, answers and 'scores', of a list of objects that have an answer and its score each, in place."""
    many = [name for name in MANY if isinstance(row.get(name), list)]
    # other answers of the row are what counts
    if len(many) != 1 or first_of((*ANSWERS, *CHATS, 'chosen'), row):
        return
    [column] = many
    items = row[column]
    if not all(isinstance(item, dict) and first_of(ITEM_SCORES, item) for item in items):
        return
    # an empty list is one, too, in data sets of that kind: some rows of UltraFeedback have it
    if not items and not (column in ('answers', 'completions') and first_of(QUESTIONS, row)):
        return
    # Stack Exchange has HTML
    if any('pm_score' in item for item in items) and isinstance(row.get('question'), str):
        row['prompt'] = ask(messages.strip_html(row.pop('question')))
        items = [item | {'text': messages.strip_html(field(item, 'text'))} for item in items]
    row[column] = [messages.as_messages(item.get(first_of(ITEM_ANSWERS, item))) for item in items]
    row['scores'] = []
    for item in items:
        # as Nectar, UltraFeedback, NeMo RL and Gemini have them
        name = next((name for name in ITEM_SCORES if item.get(name) is not None), 'score')
        sign = -1 if name == 'rank' else 1  # the lowest rank is the best
        row['scores'].append(sign * field(item, name, NUMBER))


# ---- prompt and answers ----


def first_of(names, row):
    """Return the first of the names that is in the row (a column of it), or None."""
    return next((name for name in names if name in row), None)


def prompt_of(row, given_answer=None):
    """Return the prompt of a row: a list of messages, or text for the answer to continue. Raises ValueError if it has none.

    given_answer: an answer, text or chat, that may include its question: a row without a column for it then gives None."""
    column, chat_column = first_of(QUESTIONS, row), first_of(CHATS, row)
    if chat_column and column != 'prompt':
        # under the key 'prompt', text_or_chat also accepts a chat that does not end with an answer
        turns = text_or_chat({'prompt': field(row, chat_column, list)}, 'prompt')
        # a conversation that ends with a question is the prompt
        if turns[-1]['role'] != 'assistant':
            check_nothing_lost(row, chat_column, turns, texts_in=(*QUESTIONS, *DOCUMENTS))
            return turns
        # one that ends with an answer is none: then the given answer must begin with its question
        column = None
    if column is None:
        if given_answer is None:
            raise ValueError("'prompt' is missing")
        return None
    prompt = text_or_chat(row, 'prompt') if column == 'prompt' else field(row, column)
    if prompt == '-':
        raise LeftOut("questions that are only '-', in place of one that is elsewhere")
    # a 'prompt' such as 'Q: 2 + 2? A: 4', given '4', is a whole text: another column asks
    are_strings = isinstance(prompt, str) and isinstance(given_answer, str)
    if column == 'prompt' and are_strings and first_of(QUESTIONS[1:], row):
        if re.search(rf':\s*{re.escape(given_answer.strip())}\s*\Z', prompt):
            return prompt_of({name: value for name, value in row.items() if name != 'prompt'}, given_answer)
    # what these ask about may stand beside them
    if column in ('question', 'instruction'):
        parts = [prompt, *(field(row, added) for added in ('input', 'context') if row.get(added))]
        prompt = '\n\n'.join(filter(None, parts))
    turns = [message('user', prompt)] if isinstance(prompt, str) else prompt
    # what other columns ask may be in the earlier messages of a chat in the answer column
    earlier = given_answer[:-1] if isinstance(given_answer, list) else []
    named = [name for name in row if OPTION.fullmatch(name)]
    # a single column of that form, such as 'A', is no choice between options
    options = named if len(named) > 1 else []
    # LLaMA-Factory's history goes before a question that is a text
    continues = isinstance(prompt, str) and is_history(row.get('history'))
    history = messages.alternating(chain.from_iterable(row['history'])) if continues else []
    check_nothing_lost(row, column, history + turns + earlier, (*QUESTIONS, *ABOUT, *options))
    # only these are texts to continue; other questions become a user message
    is_to_continue = not history and (column == 'prompt' or prompt.endswith(TURN_MARKERS))
    return prompt if is_to_continue else history + turns


def check_nothing_lost(row, column, turns, names=(), texts_in=DOCUMENTS):
    """Raise ValueError if another column than `column`, which the messages `turns` are from, asks what is not in them.

    names: columns whose whole content must be in them. texts_in: columns that may also hold names or numbers."""
    text = '\n'.join(turn['content'] for turn in turns)
    found = []  # (column, its texts); a column may be in names and in texts_in
    for name in (*names, 'history') if is_history(row.get('history')) else names:
        value = row.get(name)
        if value and name != column:
            found.append((name, _texts_in(value) if is_history(value) else as_list(value)))
    found += [(name, _texts_in(row[name], min_words=4)) for name in texts_in if name in row]
    for name, parts in found:
        if any(str(part).strip() not in text for part in parts):
            raise ValueError(f'{name!r} asks something, too, which would be lost beside {column!r}')


def _texts_in(value, min_words=0):
    """Return all strings of at least min_words words in a JSON-like value, stripped."""
    if isinstance(value, str):
        return [value.strip()] if messages.has_words(value, min_words) else []
    parts = list(value.values()) if isinstance(value, dict) else value
    return [text for part in parts for text in _texts_in(part, min_words)] if isinstance(parts, list) else []


def is_history(value):
    """Return whether a value is LLaMA-Factory's history: a non-empty list of [question, answer]."""
    return isinstance(value, list) and bool(value) and all(are_texts(turn, 2) for turn in value)


def example_of(row, columns):
    """Return the example of a row: {'prompt', and every key of columns}, all texts or all chats; only behind a chat in the
    column 'prompt' text answers stay texts. columns: {'chosen', 'rejected' or 'response': its column}."""
    answers = {key: text_or_chat(row, column) for key, column in columns.items()}
    first_answer = next(iter(answers.values()))
    # None if no column asks: then the answers must begin with the prompt
    prompt = prompt_of(row, first_answer)
    if len(set(map(type, answers.values()))) > 1:
        raise ValueError("'chosen' is text and 'rejected' is chat, or the reverse")
    is_written = isinstance(prompt, str) and prompt.endswith(TEMPLATE_MARKERS)
    # behind a prompt that a chat template has written, single messages are texts
    if is_written and all(map(_is_plain_message, answers.values())):
        answers = {key: chat[0]['content'] for key, chat in answers.items()}
    elif isinstance(first_answer, list):
        return _example_of_chats(prompt, answers)
    if prompt is None:
        _check_no_other_asks(row, answers)
        return _split_at_marker(answers)
    prompt, answers, repeats = _take_off_question(prompt, answers)
    prompt, answers = _take_off_marker(prompt, answers)
    # Math-Step-DPO has the first steps of both answers in a column of their own
    first_steps = row.get('initial_reason_steps', '')
    answers = {key: first_steps + text for key, text in answers.items()}
    # if prompt_of made the question a message, the answers become messages, too
    if isinstance(prompt, list) and not isinstance(row.get('prompt'), list):
        answers = {key: said(text) for key, text in answers.items()}
    return {'prompt': prompt, **answers, **repeats}


def _is_plain_message(answer):
    """Return whether an answer is a chat of one message, which has nothing but its role and content."""
    return isinstance(answer, list) and len(answer) == 1 and answer[0].keys() == {'role', 'content'}


def _take_off_marker(prompt, answers):
    """Return (prompt, answers) without the marker that answers begin with in CarperAI's and DeepSpeed's data: it ends the prompt."""
    is_text = isinstance(prompt, str)
    for marker in ('TL;DR:', 'Assistant:') if is_text else ['Assistant:']:
        have_it = all(text.lstrip().startswith(marker) for text in answers.values())
        # a single answer to no dialogue may begin so by itself
        is_moved = len(answers) == 2 or (is_text and prompt.lstrip().startswith('Human:'))
        if have_it and is_moved:
            answers = {key: text.lstrip().removeprefix(marker) for key, text in answers.items()}
            # a chat's template writes its own
            if is_text and not prompt.endswith(TURN_MARKERS):
                prompt = f'{prompt.rstrip()}\n\n{marker}'
    return prompt, answers


def _take_off_question(prompt, answers):
    """Return (prompt, answers, {'repeats': whether all answers had the question in them, which was then taken off}). answers:
    {key: text}. An empty question gives {}. Raises ValueError if only one answer begins with it."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]['content']
    # white space after the question is part of the answers, but for the line break behind a marker of a chat template
    question = asked.lstrip() if asked.endswith(TEMPLATE_MARKERS) else asked.strip()
    if not question:
        return prompt, answers, {}
    repeats = [text.lstrip().startswith(question) for text in answers.values()]
    if len(set(repeats)) == 2:
        raise ValueError("only one of 'chosen' and 'rejected' begins with the prompt")
    if repeats[0]:
        answers = {key: text.lstrip().removeprefix(question) for key, text in answers.items()}
        prompt = prompt[: prompt.index(question) + len(question)] if isinstance(prompt, str) else prompt
    # or the whole conversation, with its speakers, stands in each answer
    elif all(_has_question(text, question) for text in answers.values()):
        repeats = [True]
        answers = _split_at_marker(answers)
        whole_prompt = answers.pop('prompt')
        # but perhaps without the prompt's system message
        if isinstance(prompt, str) or all(turn['content'].strip() in whole_prompt for turn in prompt):
            prompt = whole_prompt
    return prompt, answers, {'repeats': repeats[0]}


def _has_question(text, question):
    """Return whether a text begins as a conversation does, and has this question in it, with the marker of an answer behind it."""
    begins = messages.BEGINNING.match(text) or TEMPLATE_TEXT.match(text) or re.match(r'\s*Q(uestion)?:', text)
    # the question may end in the marker
    _, found, after = text.partition(question) if begins else ('', '', '')
    return bool(found) and first_of(TURN_MARKERS, question + after) is not None


def _example_of_chats(prompt, answers):
    """Return the example of answers {key: chat}: each continues the prompt (text, chat or None) or repeats it."""
    if not all(answers.values()):
        raise LeftOut('empty answers')
    if len({chat[0]['role'] == 'assistant' for chat in answers.values()}) > 1:
        raise ValueError("only one of 'chosen' and 'rejected' begins with the prompt")
    turns = [] if prompt is None else as_chat(prompt)
    chats = {key: _joined(turns, chat) for key, chat in answers.items()}
    # all turns before the last answer are the prompt, which both answers must share (a single one: the same twice)
    prompts = [chat[:-1] for chat in chats.values()]
    prompt, other_prompt = prompts[0], prompts[-1]
    if not prompt or other_prompt[:1] != prompt[:1]:
        raise ValueError("'prompt' is missing: the answers do not begin with a question, or not with the same question")
    if other_prompt != prompt:
        raise LeftOut(DIFFERENT)
    return {'prompt': prompt, **{key: chat[-1:] for key, chat in chats.items()}}


def _joined(prompt, chat):
    """Return the whole conversation of a prompt and an answer, both lists of messages; the answer may repeat the prompt."""
    if chat[0]['role'] == 'assistant':
        return prompt + chat
    # it may repeat the last question alone
    if prompt and chat[0] == prompt[-1]:
        return prompt + chat[1:]
    # the prompt, without its system message, must be in the chat; or all questions of the chat, if several, in the prompt
    prompt_text = '\n'.join(turn['content'].strip() for turn in prompt if turn['role'] != 'system')
    chat_text = '\n'.join(turn['content'].strip() for turn in chat[:-1])
    questions = [turn['content'].strip() for turn in chat[:-1] if turn['role'] == 'user']
    prompt_has_questions = len(questions) > 1 and all(question in prompt_text for question in questions)
    if prompt_text not in chat_text and not prompt_has_questions:
        raise LeftOut('answers to something else than the prompt')
    # the chat's own system message goes before that of the prompt
    if chat[0]['role'] == 'system':
        return chat
    return [turn for turn in prompt[:1] if turn['role'] == 'system'] + chat


def _check_no_other_asks(row, answers):
    """Raise ValueError if texts without a column for their prompt are a single one, or if a column such as 'prompts' may be the prompt."""
    if len(answers) == 1:
        raise ValueError("'prompt' is missing")
    for name in [name for name in row if any(word in name for word in QUESTIONS)]:
        text = str(row[name]).strip()
        if messages.has_words(text, 3) and text not in answers['chosen']:
            raise ValueError(f"{name!r} may ask: --columns='prompt={name}, chosen=chosen, rejected=rejected'")


def _split_at_marker(answers):
    """Return the example of texts {key: text} that begin with the prompt: each is split at its last turn marker. Raises ValueError."""
    # HH has ASSISTANT in both texts, even if the prompts before it differ
    common = os.path.commonprefix(list(answers.values()))
    has_assistant = any(ASSISTANT in text for text in answers.values())
    marker = ASSISTANT if has_assistant else first_of(TURN_MARKERS, common)
    if marker is None:
        missing = r"no turn marker (as '\n\nAssistant:')"
        raise ValueError(f'no column has the prompt, and {missing} shows where answers begin')
    example = {}
    for key, text in answers.items():
        prompt, _, example[key] = text.rpartition(marker)
        # about 1 in 900 pairs of HH has two prompts
        if example.setdefault('prompt', prompt + marker) != prompt + marker:
            raise LeftOut(DIFFERENT)
    return example


# ---- pairs ----


def read_pair(row, task):
    """Read two answers, 'chosen' and 'rejected', to one prompt: a column, or the common beginning of both."""
    # RewardBench 2 has lists of good and bad answers: every good one with every bad one, without {'drop': 'tie'} of two good
    if are_texts(row.get('chosen')) and are_texts(row.get('rejected')):
        scored = [(1, said(text)) for text in row['chosen']]
        scored += [(0, said(text)) for text in row['rejected']]
        examples = rank_answers(as_chat(prompt_of(row)), scored, task)
        return [example for example in examples if 'drop' not in example]
    # or both are names of the columns that have the answers
    names = [plain_name(row[side][:99]) for side in ('chosen', 'rejected') if isinstance(row.get(side), str)]
    are_columns = len(names) == 2 and set(names) <= row.keys()
    if are_columns and not any(map(OPTION.fullmatch, names)):
        row['chosen'], row['rejected'] = [row[name] for name in names]
    example = example_of(row, {'chosen': 'chosen', 'rejected': 'rejected'})
    if 'margin' in row:
        example['margin'] = float(field(row, 'margin', NUMBER))
    # (score of the chosen answer, score of the rejected one), or the margin and 0
    scores = [(example.get('margin'), 0)]
    for name in filter(RATED.search, row):
        for sides in SIDES:
            other = name.replace(*sides)
            scores.append((row[name], row.get(other)))
    are_numbers = [isinstance(a, NUMBER) and isinstance(b, NUMBER) for a, b in scores]
    is_contradicted = any(a < b for a, b in compress(scores, are_numbers))
    return [example, {'drop': CONTRADICTED}] if is_contradicted else [example]


def read_compared(row, task):
    """Read two answers or conversations, such as 'response_a' and 'response_b', and a column that tells the better one."""
    columns = next(pair for pair in COMPARED if set(pair) <= row.keys())
    # lead: by how much the second answer is better (negative: the first), 0 for a tie
    verdict_column = first_of(VERDICTS, row)
    if task == 'prompts':
        lead = -1  # prompts need no verdict
    elif verdict_column in BY_NAME:
        lead = _lead_by_name(row, verdict_column, columns)
    elif verdict_column:
        lead = field(row, verdict_column, NUMBER) if row[verdict_column] else 0  # null is a tie
    else:
        # SCORED: (first answer, second answer, their scores)
        *columns, first_score, second_score = next(names for names in SCORED if set(names) <= row.keys())
        lead = field(row, second_score, NUMBER) - field(row, first_score, NUMBER)
    if not lead:
        raise LeftOut('tie')
    chosen, rejected = columns[::-1] if lead > 0 else columns
    # SFT takes the better conversation even if the other one has different questions
    wanted = {'response': chosen} if task == 'sft' else {'chosen': chosen, 'rejected': rejected}
    chats = {}
    for column in wanted.values():
        # only role and content: other fields may differ between the sides
        chat = [message(turn['role'], turn['content']) for turn in said(text_or_chat(row, column))]
        # MT-Bench judges each of two turns; the verdict on turn 1 is about the first exchange
        is_first_of_two = row.get('turn') == 1 and len(chat) == 4
        chats[column] = chat[:2] if is_first_of_two else chat
    return [example_of(row | chats, wanted)]


def _lead_by_name(row, verdict_column, columns):
    """Return 1 if the verdict names the second of two columns, -1 if the first, and 0 for a tie. Raises ValueError."""
    sides = [column[-1] for column in columns]  # ['a', 'b'], ['0', '1'] or ['1', '2']
    verdict = str(row[verdict_column]).strip(' []().').lower()
    named = VERDICT.fullmatch(verdict)
    # or the name of one of the models, if they are different
    models = [str(row.get(f'model_{side}', '?')).lower() for side in sides]
    if named:
        # a and b are the first and the second answer, also of response_1 and response_2
        names = dict(zip(['a', 'b', 'first', 'second', 'left', 'right'], sides * 3, strict=True))
        side = names.get(named[3], named[3])
    else:
        side = sides[models.index(verdict)] if models.count(verdict) == 1 else ''
    if side in sides:
        return 1 if side == sides[1] else -1
    if named:
        # 0 beside response_1 and response_2: whether 1 is the first or the second is not clear in any row
        doubt = f'is no number of {" and ".join(columns)}, so other rows may count otherwise, too'
        mend = "write one of these names, or tie, there, or name the answers: --columns='response_0=NAME, response_1=NAME ...'"
        raise messages.DoubtfulCode(f'{verdict[:24]!r} {doubt}: {mend}')
    if verdict in ('-1', '-1.0'):
        raise LeftOut(MINUS_ONE)
    if not re.fullmatch(r'|none|nan|equal|draw|neither|.*same|.=.|.*(tie|both).*', verdict):
        raise ValueError(f'{verdict[:24]!r} is neither of {" and ".join(columns)}, nor a tie')
    return 0


def signs_among(rows, names):
    """Return a sentence if the verdicts on two answers in one of these columns are 1 and -1 alone, which name no answer, or None."""
    for name in names:
        verdicts = set()
        for row in map(plain, rows):
            verdict = row.get(plain_name(name))
            verdicts.add(str(verdict).removesuffix('.0'))
        if verdicts - {'None'} == {'1', '-1'}:
            advice = 'write the name of the better one there, or tie, or call the column preference_strength (below 0: the first is better)'
            return f'{name!r} is 1 and -1 alone, which names neither of two answers: {advice}'
    return None


def read_votes(row, task):
    """Read LMSYS's votes: questions and answers of two models, each a list, its JSON or a text, and a 1 in 'winner_model_a' or b."""
    lists = []
    for value in map(row.get, ('prompt', 'response_a', 'response_b')):
        if isinstance(value, str):
            value = json.loads(value) if value.startswith('[') else [value]
        lists.append(value)
    # an answer may be null
    if not all(map(are_texts, lists)):
        raise LeftOut('empty answers')
    if len(set(map(len, lists))) > 1:
        raise ValueError("'prompt', 'response_a' and 'response_b' are not as many questions and answers")
    questions, *answers_of_sides = lists
    comparison = {'winner': ''}  # '' stays for a tie
    for side, answers in zip('ab', answers_of_sides, strict=True):
        exchanges = zip(questions, answers, strict=True)
        comparison[f'conversation_{side}'] = messages.alternating(chain.from_iterable(exchanges))
        if str(row[f'winner_model_{side}']) in ('1', '1.0', 'True'):
            comparison['winner'] += side
    return read_compared(comparison, task)


def read_summaries(row, task):
    """Read openai/summarize_from_feedback's pairs of summaries; the prompt has TRL's format."""
    info, choice = field(row, 'info', dict), field(row, 'choice', int)
    first, second = [answer(field(summary, 'text')) for summary in field(row, 'summaries', list)]
    if choice not in (0, 1):
        raise ValueError("'choice' is neither 0 nor 1")
    chosen, rejected = (second, first) if choice == 1 else (first, second)
    # a Reddit post, or an article of CNN or Daily Mail
    is_post = bool(info.get('post'))
    text = field(info, 'post' if is_post else 'article').replace('\n\n', '\n')
    prompt = f'TITLE: {info.get("title") or ""}\n\n'
    if is_post:
        prompt = f'SUBREDDIT: r/{info.get("subreddit") or ""}\n\n{prompt}POST: '
    return [{'prompt': f'{prompt}{text}\n\nTL;DR:', 'chosen': chosen, 'rejected': rejected}]


def read_annotation(row, task):
    """Read AlpacaEval's annotations: preference < 1.5 means output_1, > 1.5 output_2; 0 and 1.5 are ties."""
    first, second = field(row, 'output_1'), field(row, 'output_2')
    # label.py adds 'prompt' where the instruction alone does not tell it, and its outputs go on from it as they are
    if 'prompt' in row:
        prompt = text_or_chat(row, 'prompt')
    else:
        prompt = ask(messages.instruction(prompt_of(row)))
        first, second = answer(first), answer(second)
    preference = row['preference']
    # null, or NaN, which is not equal to itself
    if preference is None or preference != preference:
        raise LeftOut('no verdict')
    if field(row, 'preference', NUMBER) in (0, 1.5):
        raise LeftOut('tie')
    if not 1 <= preference <= 2:
        raise ValueError("'preference' is not 0, null, or from 1 to 2")
    chosen, rejected = (second, first) if preference > 1.5 else (first, second)
    return [{'prompt': prompt, 'chosen': chosen, 'rejected': rejected}]


# ---- answers with scores ----


def rank_answers(prompt, scored, task):
    """Return the examples of a prompt and its scored answers, [(score, answer)]."""
    if task == 'prompts':
        return [{'prompt': prompt}]
    # the answer with the highest score
    if task == 'sft' and scored:
        _, best = max(scored, key=itemgetter(0))
        return [{'prompt': prompt, 'response': best}]
    examples = []
    for pair in combinations(scored, 2):
        (low_score, rejected), (high_score, chosen) = sorted(pair, key=itemgetter(0))
        is_tie = high_score == low_score
        examples.append({'drop': 'tie'} if is_tie else {'prompt': prompt, 'chosen': chosen, 'rejected': rejected})
    return examples or [{'drop': 'fewer than two answers'}]


def read_scored(row, task):
    """Read a list of answers and a list of their scores: numbers, true or false (correct or not), or null (skipped)."""
    column, score_column = first_of(MANY, row), first_of(SCORES, row)
    answers, scores = field(row, column, list), field(row, score_column, list)
    # text_or_chat reads a column of a row, and its errors name the column
    answers = [text_or_chat({column: found}, column) for found in answers]
    # not all numbers are finite
    numbers = [score for score in scores if score is not None]
    are_finite = [isinstance(score, NUMBER) and abs(score) < 1e30 for score in numbers]
    if len(answers) != len(scores) or not all(are_finite):
        raise ValueError(f'{column!r} and {score_column!r} are not as many texts and numbers')
    if task == 'sft' and scores and all(score is False for score in scores):
        raise LeftOut('no right answer')
    prompt = prompt_of(row)
    # a dialogue in Anthropic's format, as Nectar has it, stays one
    is_dialogue = isinstance(prompt, str) and prompt.rstrip().endswith(ASSISTANT) and are_texts(answers)
    prompt = prompt.rstrip() if is_dialogue else as_chat(prompt)
    write = answer if is_dialogue else said
    scored = []
    for score, found in zip(scores, answers, strict=True):
        # null: skipped
        if score is not None:
            scored.append((score, write(found)))
    return rank_answers(prompt, scored, task)


def rank_groups(rows, task, read):
    """Yield (row, examples or ValueError): all rows' answers to a prompt are ranked. read(row): (prompt, [(score, answer)])."""
    groups = {}  # prompt as JSON -> (first row, prompt, scored answers)
    for row, found in each(rows, read):
        # a ValueError or [{'drop': reason}] that each() gives in place of what read() returns, a tuple
        if not isinstance(found, tuple):
            yield row, found
            continue
        prompt, scored = found
        _, _, all_scored = groups.setdefault(json.dumps(prompt), (row, prompt, []))
        all_scored += [pair for pair in scored if pair not in all_scored]
    # the examples of a group come with its first row
    for row, prompt, all_scored in groups.values():
        yield row, rank_answers(prompt, all_scored, task)


def read_shp(rows, task):
    """Read stanfordnlp/SHP: pairs with a score ratio of at least 2. SFT gets the best answer of all pairs with one prompt."""

    def read(row):
        scores = [field(row, f'score_{side}', NUMBER) for side in 'AB']
        answers = [answer(field(row, f'human_ref_{side}')) for side in 'AB']
        low, high = sorted(scores)
        if high < 2 * low:
            raise LeftOut('score ratio below 2')
        return ask(field(row, 'history')), list(zip(scores, answers, strict=True))

    # SFT compares the answers of all rows with one prompt, pairs only those of one row
    if task == 'sft':
        return rank_groups(rows, task, read)
    return each(rows, lambda row: rank_answers(*read(row), task))


def read_rated(rows, task):
    """Read HelpSteer and HelpSteer 2: one rated answer per row; the answers to a prompt are compared by helpfulness."""

    def read(row):
        # parse_any does this for readers of one row
        row = unified(row)
        scored = [(field(row, 'helpfulness', NUMBER), said(field(row, 'response')))]
        return as_chat(prompt_of(row)), scored

    return rank_groups(rows, task, read)


def read_trees(rows, task, language=None):
    """Read OpenAssistant's trees of messages: each ranked answer is rejected, and the next better one is chosen, to the
    conversation above them. language: read only messages in this language; None: all."""
    rows = list(rows)
    by_id = {str(row.get('message_id')): row for row in rows}
    # [parent, language, rank] as text -> row; as text, since a bad row may have lists there
    by_rank = {str([row.get(key) for key in ('parent_id', 'lang', 'rank')]): row for row in rows}

    def read(row):
        if language and field(row, 'lang') != language:
            raise LeftOut('not English')
        is_question = field(row, 'role') == 'prompter'
        if is_question and task == 'prompts':
            return [{'prompt': _branch(field(row, 'message_id'), by_id)}]
        # no example, and nothing to count
        if is_question or task == 'prompts':
            return []
        if row.get('rank') is None:
            raise LeftOut('an answer without a rank')
        rank, parent = field(row, 'rank', NUMBER), field(row, 'parent_id')
        own_answer = [message('assistant', field(row, 'text'))]
        if task == 'sft':
            if rank != 0:
                raise LeftOut('answers that are not the best')
            return [{'prompt': _branch(parent, by_id), 'response': own_answer}]
        # the best answer is chosen in the example of the second best
        if rank == 0:
            return []
        better = by_rank.get(str([parent, row.get('lang'), rank - 1]))
        if better is None:
            raise LeftOut('no answer of the next better rank')
        better_answer = [message('assistant', field(better, 'text'))]
        return [{'prompt': _branch(parent, by_id), 'chosen': better_answer, 'rejected': own_answer}]

    return each(rows, read)


def _branch(message_id, by_id):
    """Return the turns of a tree from its root to this message. by_id: {message_id: row}. Raises ValueError."""
    turns = []
    while message_id is not None:
        row = by_id.get(message_id)
        # the limit ends cycles
        if row is None or len(turns) == 100:
            raise ValueError('the conversation above the answer is not whole')
        role = 'assistant' if row.get('role') == 'assistant' else 'user'
        turns.append(message(role, field(row, 'text')))
        message_id = row.get('parent_id')
    return turns[::-1]


# ---- single answers, conversations, texts, prompts ----


def read_answer(row, task):
    """Read a prompt and one answer, with its label as 'good' if there is one."""
    column = first_of(ANSWERS, row)
    # older LLaMA-Factory pairs: 'output' is [chosen, rejected]
    if column == 'output' and are_texts(row['output'], 2):
        row['chosen'], row['rejected'] = row.pop('output')
        return read_pair(row, task)
    label = label_of(row)
    better = [name for name in filter(BETTER.fullmatch, row) if isinstance(row[name], str)]
    if better and not label and task != 'prompts':
        raise ValueError(f"{better[0]!r} may be the better answer: --columns='prompt=NAME, response=NAME'")
    example = example_of(row, {'response': column})
    # a column of THOUGHTS has the thought behind the answer, if it is no flag ('reasoning': 'on') and no reason for a label
    texts = [row[name] for name in THOUGHTS if isinstance(row.get(name), str)]
    thoughts = [text for text in texts if messages.has_words(text, 3)]
    # an empty answer, which may have been cut off, stays empty
    may_take_one = isinstance(row[column], str) and row[column].strip() and '</think>' not in row[column]
    if thoughts and not label and may_take_one:
        # only messages have fields for thoughts
        if isinstance(example['prompt'], str):
            return [example, {'drop': UNTHOUGHT}]
        example['response'] = said(example['response'])
        example['response'][-1]['reasoning_content'] = thoughts[0]
    # prompt_of has put the history into the prompt: train on its answers, too, as LLaMA-Factory does
    if is_history(row.get('history')):
        return read_chat({'messages': example['prompt'] + example['response'], **label}, task)
    return [example | label]


def label_of(row):
    """Return {'good': bool} from the row's label column, or {} if the row has none. Raises ValueError."""
    column = first_of(LABELS, row)
    # Infinity-Instruct's labels are lists of topics
    if column is None or isinstance(row[column], list | dict):
        return {}
    # 'Thumbs up', and a thumb of any skin
    value = re.sub('[\U0001f3fb-\U0001f3ff]', '', plain_name(str(row[column])))
    if value not in (*YES, *NO, *GOOD, *BAD):
        raise ValueError(f'{column!r} is neither true (1) nor false (0), nor a word such as good or bad')
    return {'good': value in YES + GOOD}


def read_chat(row, task):
    """Read a conversation: {'prompt', 'response': last answer, 'turns': all messages, if several answers are trained on}."""
    column = first_of(CHATS, row)
    turns = [messages.read_message(turn) for turn in field(row, column, list)]
    _check_no_choice(row, turns)
    check_nothing_lost(row, column, turns)
    # a conversation that ends with a question is a prompt, or its answer has another column
    if turns and turns[-1]['role'] != 'assistant':
        if any(isinstance(row.get(name), str | list) for name in ANSWERS):
            return read_answer(row, task)
        # only users, systems and tools ask
        if turns[-1]['role'] not in messages.ROLES.values():
            raise messages.no_answer_error(column, turns[-1]['role'])
        if task == 'prompts' or (task is None and len(turns) == 1):
            return [{'prompt': turns}]
    label = label_of(row)
    # SFT takes a conversation that is labelled as good like one without a label
    if task == 'sft' and label.get('good'):
        label = {}
    # do not train on an empty answer; a label judges the whole conversation, and if all are empty, that is counted later
    answers = [turn for turn in turns if turn['role'] == 'assistant']
    empty = [turn for turn in answers if messages.is_empty([turn])]
    if task != 'prompts' and not label and len(empty) < len(answers):
        for turn in empty:
            turn['weight'] = 0
    # as FastChat does, begin with a question and end with an answer
    kept = list(dropwhile(lambda turn: turn['role'] == 'assistant', turns))
    while kept and not messages.is_trained(kept[-1]):
        kept.pop()
    if not kept:
        has_untrained = any('weight' in turn for turn in turns)
        raise LeftOut(UNTRAINED if has_untrained else 'conversations without a question and its answer')
    example = {'prompt': kept[:-1], 'response': kept[-1:], **label}
    num_trained = sum(map(messages.is_trained, kept))
    if num_trained > 1 and not label:
        example['turns'] = kept
    # UNASKED counts those that lose messages
    return [example] if kept == turns else [example, {'drop': UNASKED}]


def _check_no_choice(row, turns):
    """Raise ValueError if a flag may tell which answers to train on, or which of two answers in a row counts."""
    are_answers = [turn['role'] == 'assistant' for turn in turns]
    for name in filter(messages.MASK, chain(row, *compress(turns, are_answers))):
        # a column may list the flags of all messages, or of the answers
        flags = row[name] if isinstance(row.get(name), list) else [turn.get(name) for turn in turns]
        if len(flags) == len(turns):
            flags = list(compress(flags, are_answers))
        # axolotl's training_detail lists parts of an answer
        of_answers = [turn.get(name) for turn in compress(turns, are_answers)]
        are_parts = any(isinstance(value, list | dict) for value in of_answers)
        if are_parts or 0 < flags.count(True) < len(flags):
            raise ValueError(f"{name!r} may tell which answers to train on: give each a 'weight', 1 or 0")
    for before, turn in pairwise(turns):
        if not before['role'] == turn['role'] == 'assistant':
            continue
        for name, flag in before.items():
            if isinstance(flag, bool) and turn.get(name) is (not flag):
                raise ValueError(f'a question has two answers, and {name!r} is true of one: leave the other out')


def read_text(row, task):
    """Read a text: a conversation if it is a dialogue with known turn markers, else a response to an empty prompt."""
    text = field(row, 'text')
    check_nothing_lost(row, 'text', [message('user', text)], (*QUESTIONS, *ABOUT))
    for name in ('role', 'author', *WRITERS):
        if str(row.get(name)).lower() in messages.ROLES:
            raise ValueError(f"'text' is one message, as {name!r} says: write a chat a row, as 'messages'")
    # a text beside an answer may be its question
    for other in filter(row.__contains__, (*LIKE_ANSWERS, 'solution', 'summary', 'code', *chain(*COMPARED))):
        if isinstance(row[other], str | list):
            fix = f"--columns='question=text, response={other}', or 'text=text'"
            raise ValueError(f"'text' may be what {other!r} answers: {fix}")
    if turns := messages.dialogue(text):
        return read_chat({'messages': turns}, task)
    # a text that a chat template has written: a prompt and one answer if it has a single marker, and no turn behind it
    marker = first_of(TEMPLATE_MARKERS, text)
    is_chat = marker is not None and TEMPLATE_TEXT.match(text)
    if is_chat:
        question, _, reply = text.partition(marker)
        if not re.search(TURN_START, reply) and marker not in reply:
            return [{'prompt': question + marker, 'response': reply}]
    if task == 'prompts':
        raise ValueError("'text' is an answer, and no column asks: if it asks, --columns='question=text'")
    examples = [{'prompt': '', 'response': text}]
    if is_chat:
        examples.append({'drop': WHOLE})
    if CHAT_LINE.match(text):
        examples.append({'drop': LINES})
    return examples


def read_prompt(row, task):
    """Read a prompt without an answer. Raises ValueError if an unknown column may be the answer and the task needs one."""
    # without a task, a solution may be for a reward function
    like_answers = (*LIKE_ANSWERS, 'solution') if task else LIKE_ANSWERS
    for name, value in row.items():
        has_content = value and isinstance(value, str | list | dict)
        if task != 'prompts' and has_content and any(word in name for word in like_answers):
            raise ValueError(f'{name!r} may be an answer, and is no column that is known beside a prompt')
    # of one user's questions (MT-Bench's texts, Arena-Hard's {'content': text}) the first is a prompt: the others follow its answer
    column = first_of((*QUESTIONS, 'turns'), row)
    questions = row[column] if column in ('prompt', 'turns') else None
    turns = questions if isinstance(questions, list) else []
    are_contents = [isinstance(turn, dict) and turn.keys() == {'content'} for turn in turns]
    if all(are_contents):
        questions = [turn['content'] for turn in turns]
    if are_texts(questions):
        first, *later = questions
        return [{'prompt': [message('user', first)]}] + [{'drop': LATER}] * len(later)
    if column == 'turns':
        raise ValueError("'turns' is no list of questions")
    return [{'prompt': prompt_of(row)}]


def unread_texts(rows, layout):
    """Return (columns that may ask, answer or judge, and that no example shows; marks: LACKING, without words; of splits; of others that judge).

    Such columns have texts in most rows, of four words if all are different, else of eight (a category or an id is shorter); both values of a
    flag; a grade; beside a pair a verdict such as 2 or 'B'; a text's class or writer; a persona; or a link to a row or conversation."""
    found = defaultdict(set)  # column -> its different short texts, and (row's number, long text)
    values = defaultdict(set)  # column -> its different numbers and words
    threads = defaultdict(set)  # (column, id of a conversation) -> how the prompts of its rows begin
    # read_scored reads, or refuses, every question: an example shows that of Stack Exchange without its HTML
    asked = QUESTIONS if layout.read is read_scored else []
    is_read = {*layout.columns, *asked, 'rejected', 'tools', *TEST_FLAGS}
    # prompts need none of the columns that may be answers
    parse = partial(parse_any, task='prompts' if layout.read is read_prompt else None)
    for number, (row, examples) in enumerate(each(rows, parse)):
        if isinstance(examples, ValueError) or 'drop' in examples[0]:
            continue
        row = plain(row)
        for name in filter(THREADS.fullmatch, filter(row.get, row)):
            # a text to learn has an empty prompt
            first_turn = as_chat(examples[0]['prompt'] or examples[0].get('response', ''))[:1]
            threads[name, str(row[name])].add(str(first_turn))
        shown = set(_texts_in(examples, min_words=4))
        for name, value in chain(row.items(), _inner_fields(examples[0], row, is_read)):
            if name in is_read or (name in LABELS and 'good' in examples[0]):
                continue
            # a list of flags or grades is about parts of the row: its answers, or several judges
            for part in as_list(value):
                if isinstance(part, NUMBER | str) and name not in TEXTS:
                    values[name].add(str(part).strip().lower())
            for text in _not_shown(value, shown):
                # the same long text counts in every row
                found[name].add((number, text) if messages.has_words(text, 8) else text)
    unread = [name for name, texts in found.items() if len(texts) > len(rows) / 2]
    unread += [name for (name, _), starts in threads.items() if len(starts) > 1]
    later = [(LACKING.format(', '.join(sorted(layout.columns))), layout.columns, [])]
    for name, its_values in values.items():
        if its_values.issubset(EITHER_SPLIT) and name not in SPLITS:
            later.append((FOR_TESTS, [name], HELD_OUT))
        if _may_judge(name, its_values, layout):
            unread.append(name)
        elif len(its_values) <= 10:
            words = GRADES.union(FLAGS) - its_values if its_values.issubset(FLAGS) else GRADES
            later.append((JUDGES, [name], words))
    return [spelled(name, chain(*rows)) for name in dict.fromkeys(unread)], later


def _not_shown(value, shown):
    """Return the texts in a column's value if none of them is among `shown`, the texts of the row's examples, else []."""
    # objects describe the row, unless they are messages
    if not isinstance(value, str) and not are_texts(value) and "'content'" not in str(value):
        return []
    texts = _texts_in(value, min_words=4)
    # a text is also shown if it is a part of an example's text, or the other way round: it is the whole row, say
    for text in texts[:5]:
        if any(text in part or part in text for part in shown):
            return []
    return texts if shown.isdisjoint(texts) else []


def _may_judge(name, its_values, layout):
    """Return whether a column of these words and numbers may say which answers are better, or what or whose a row's text is."""
    if name in PERSONAS or PARENTS.fullmatch(name) or GRADES & its_values:
        return True
    # both values of a flag
    if its_values.issubset(FLAGS) and its_values.intersection(YES) and its_values.difference(YES):
        return True
    if layout.read is read_pair:
        return name in JUDGED and any(map(VERDICT.fullmatch, its_values))
    if layout.read is read_text:
        return name in CLASSES or name in WRITERS
    # one answer of each row may be worse than another
    is_rating = JUDGING.search(name) and len(its_values) > 1
    return bool(is_rating) and layout.read in (read_answer, read_chat)


def _inner_fields(example, row, is_read):
    """Return [(phrase for the note, value)] of the fields of an example's messages, and of those in objects that may ask or answer."""
    fields = []
    for key, chat in example.items():
        if key == 'tools' or not isinstance(chat, list):
            continue
        for turn in chat:
            fields += [(f'{name} of messages', turn[name]) for name in turn if name != 'content']
    for column, value in row.items():
        if column in is_read:
            continue
        for part in as_list(value):
            names = TEXTS & part.keys() if isinstance(part, dict) else ()
            fields += [(f'{name} of {column}', part[name]) for name in sorted(names)]
    return fields


# fmt: off
# (name, sets of columns separated by commas, reader); the first layout with a set that the row has is used
READERS = (
    ('AlpacaEval annotations', 'preference output_1', read_annotation),
    ('SHP', 'history human_ref_a human_ref_b labels', read_shp),
    ('OpenAssistant', 'message_id text role', read_trees),
    ('summaries', 'info summaries choice', read_summaries),
    ('arena', 'prompt response_a response_b winner_model_a winner_model_b', read_votes),
    ('comparison', ','.join(f'{one} {two} {verdict}' for verdict in VERDICTS for one, two in COMPARED), read_compared),
    ('comparison', ','.join(map(' '.join, SCORED)), read_compared),
    ('HelpSteer', 'prompt response helpfulness', read_rated),
    ('pair', 'chosen, rejected', read_pair),
    ('conversation', ','.join(CHATS), read_chat),
    ('answer', 'response, completion', read_answer),
    ('answer', ','.join(f'{asks} {answers}' for asks in QUESTIONS for answers in ('output', 'generation')), read_answer),
    ('answer', 'prompt answer, instruction answer, query answer', read_answer),
    ('scored answers', ','.join(f'{answers} {scores}' for answers in MANY for scores in SCORES), read_scored),
    ('answer', ','.join(f'{asks} solution' for asks in QUESTIONS if asks != 'prompt'), read_answer),
    ('answer', 'question answer, problem answer, input answer', read_answer),
    ('text', 'text', read_text),
    ('prompt', ','.join((*QUESTIONS, 'turns')), read_prompt),
)
# fmt: on
LAYOUTS = []
for name, several, read in READERS:
    for columns in several.split(','):
        LAYOUTS.append(Layout(name, frozenset(columns.split()), read))
# every column name that has a meaning somewhere above
KNOWN = frozenset(chain(COLUMNS, ABOUT, DOCUMENTS, LABELS, THOUGHTS, *RENAMED, *(layout.columns for layout in LAYOUTS)))
OF_ALL_ROWS = {read_shp, read_rated, read_trees}  # readers that get all rows at once
