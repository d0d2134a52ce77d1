"""Columns as people have them -> prompt and answers. A new layout is one row of LAYOUTS and one function.

A row is normalised (unified), its columns name a layout, and the layout's function read(row, task) makes a list of
examples, as sources.py describes them. Where one row does not tell its examples (OF_ALL_ROWS), read(rows, task) yields
(row, its examples or the ValueError). ValueError: a row is not what it should be; LeftOut(reason): it is sound, and a
rule leaves it out. task: 'pairs', 'singles', 'sft', 'prompts', or None."""

import json
import os
import re
from collections import namedtuple
from itertools import chain, combinations
from operator import itemgetter

from text import messages
from text.messages import ASSISTANT, answer, are_texts, as_chat, ask, field, message, said, text_or_chat

NUMBER = int | float
DIFFERENT = 'chosen and rejected have different prompts'
UNTRAINED = 'answers of weight 0, which are not to be trained on'
UNASKED = 'note: conversations that lose what precedes the first question or follows the last answer to train on'

# ---- the names that people use ----

# fmt: off
# the columns that may ask: the first one there is
QUESTIONS = ('prompt', 'question', 'instruction', 'problem', 'query', 'input')
# what an instruction or a question is about, written behind it
ADDED = ('input', 'context')
# more that a question may be about
ABOUT = ('context', 'history', 'options', 'choices', 'article', 'passage')
# beside a solution, an answer is its last line
ANSWERS = ('response', 'completion', 'output', 'solution', 'answer', 'label')
# in the name of a column that nobody knows
LIKE_ANSWERS = ('chosen', 'rejected', 'response', 'completion', 'output', 'answer', 'reply', 'target')
CHATS = ('messages', 'conversations', 'conversation', 'context_messages', 'trajectory')
LABELS = ('good', 'label', 'kto_tag', 'desirable', 'is_safe')
# what --columns may name
COLUMNS = ('prompt', 'question', 'system', 'chosen', 'rejected', 'response', 'label', 'messages', 'text', 'margin', 'tools')
# what is no text
MEDIA = ('image', 'images', 'video', 'videos', 'audio', 'audios')
# other names, which stand together -> ours
RENAMED = (
    {'chosen_response': 'chosen', 'rejected_response': 'rejected'}, {'response_j': 'chosen', 'response_k': 'rejected'},
    {'preferred_output': 'chosen', 'non_preferred_output': 'rejected'}, {'accepted': 'chosen', 'rejected': 'rejected'},
    {'response': 'chosen', 'rejected_response': 'rejected'}, {'messages': 'chosen', 'rejected_messages': 'rejected'},
    {'chosen_conversations': 'chosen', 'rejected_conversations': 'rejected'},
    {'system_prompt': 'system'}, {'system_message': 'system'}, {'messages': 'messages', 'functions': 'tools'},
    {'definition': 'instruction', 'inputs': 'input', 'targets': 'output'},
    {'definition': 'instruction', 'input': 'input', 'output': 'output'},
    {'inputs': 'input', 'targets': 'output'}, {'input': 'input', 'target': 'output'},
    {'human': 'instruction', 'assistant': 'response'}, {'user': 'instruction', 'assistant': 'response'},
    {'r1_solution_1': 'response'}, {'generated_solution': 'response'},
)
# where a chat may stand (if no other column is known: items, dialogue, data), and is then
OTHERWISE = {'input': 'messages', 'items': 'messages', 'dialogue': 'messages', 'data': 'messages', 'context': 'prompt', 'query': 'prompt'}
# two answers that somebody has compared, and the columns that say which is better: by name or number, or by sign; or scores
STEMS = ('response_', 'response', 'answer_', 'completion_', 'conversation_', 'output_')
COMPARED = [(stem + one, stem + two) for stem in STEMS for one, two in ('ab', '01', '12')]
BY_NAME = ('winner', 'preferred', 'preference', 'better_response_id', 'safer_response_id', 'label')
BY_SIGN = ('preference_strength', 'overall_preference')
# how a verdict names a side (a number may be a fraction, and a text), and how it says that there is none
SIDE = re.compile(r'(model|response|answer|completion|conversation|assistant|output|option)?[ _-]?([ab012])(\.0|>+.)?')
TIE = re.compile(r'|none|nan|-1(\.0)?|equal|draw|.=.|.*tie.*|.*both.*')
# where a null is not the same as no such column
NULL_SAYS = (*LABELS, *BY_NAME, *BY_SIGN, 'output_1')
# lists of answers, and of their scores
MANY = ('generations', 'responses', 'completions', 'outputs', 'all_generated_responses')
SCORES = ('correctness_math_verify', 'correctness_llama', 'scores', 'ratings', 'rating', 'rewards', 'all_rm_scores')
# behind the last of these, in a text, stands the answer; the first that a pair has is taken
TURN_MARKERS = (ASSISTANT, '<|im_start|>assistant\n', '<|start_header_id|>assistant<|end_header_id|>\n\n', '<start_of_turn>model\n',
                '<|assistant|>\n', '[/INST]', '### Assistant:', '### Response:', '\nAssistant:', ' ASSISTANT:', '\nAnswer:', '\nA:',
                '\nTL;DR:')
# fmt: on


class LeftOut(Exception):
    """A sound row that a rule leaves out: its message is the reason."""


# the columns that a row must have, and how it is read
Layout = namedtuple('Layout', 'name columns read')

# ---- any row ----


def each(rows, read):
    """(row, its examples or the ValueError) of every row."""
    for row in rows:
        try:
            if row.error:
                raise ValueError(row.error)
            yield row, read(row)
        except LeftOut as reason:
            yield row, [{'drop': str(reason)}]
        except ValueError as error:
            yield row, error
        # nested a thousand deep, or a list where a text should be
        except (RecursionError, TypeError, LookupError, AttributeError) as error:
            yield row, ValueError(f'its columns cannot be read ({error})')


def parse_any(row, task=None, columns=None):
    """The examples of a row in any layout that LAYOUTS knows; columns: as in unified."""
    row = unified(row, columns)
    layout = layout_of(row)
    if layout.read in OF_ALL_ROWS:
        raise ValueError(f'a row of the layout {layout.name} among others')
    return [_complete(example, row) for example in layout.read(row, task)]


def layout_of(row):
    """The Layout of a normalised row. Raises ValueError where its columns fit none, and names the nearest."""
    for layout in LAYOUTS:
        if layout.columns <= row.keys():
            return layout
    shares = [len(layout.columns & row.keys()) / len(layout.columns) for layout in LAYOUTS]
    nearest = LAYOUTS[shares.index(max(shares))]
    hint = f'; the nearest layout, {nearest.name}, has {", ".join(sorted(nearest.columns))}' if any(shares) else ''
    raise ValueError(f"'prompt' is missing, and no other column is known{hint}")


def unified(row, columns=None):
    """A row without nulls, with our names, where a chat is a list of {'role', 'content'}, whatever it was written as.

    columns: our name -> its column, where the user says so; no other column counts then. A null stays in columns where it
    says something, such as that nobody has labelled an answer, or preferred one."""
    if columns:
        row = {name: row.get(column) for name, column in columns.items()}
    # a table's Prompt is prompt, unless two columns would have one name
    plain = {name.lower() if name.lower() in KNOWN else name: value for name, value in row.items()}
    row = plain if len(plain) == len(row) else row
    in_turn = (*CHATS, 'data') if 'id' in row else CHATS
    row = {k: messages.as_messages(v, k in in_turn) for k, v in row.items()}
    row = {k: v for k, v in row.items() if v is not None or k in NULL_SAYS}
    seen = next((name for name in MEDIA if row.get(name)), None)
    if seen:
        raise ValueError(f'{seen!r} would be lost: only text is read')
    for names in RENAMED:
        if names.keys() <= row.keys() and row.keys().isdisjoint(names.values() - names.keys()):
            row = {names.get(key, key): value for key, value in row.items()}

    # OpenAI's preferences, and chats that are called otherwise
    if isinstance(row.get('input'), dict):
        row |= unified(row.pop('input'))
    unknown = KNOWN.isdisjoint(row.keys() - {'system', 'tools'})
    for name, ours in OTHERWISE.items():
        if row.get(name) and isinstance(row[name], list) and ours not in row and (unknown or name in KNOWN):
            row[ours] = row.pop(name)
    # WebGPT's questions; one of SQuAD's answers, which say the same; ms-swift's pairs, whose good answer ends the chat
    if isinstance(row.get('question'), dict):
        row['question'] = row['question'].get('full_text', row['question'])
    if isinstance(row.get('answers'), dict) and row['answers'].keys() == {'text', 'answer_start'}:
        row['answer'] = next(iter(row.pop('answers')['text']), '')
    if isinstance(row.get('rejected_response'), str) and isinstance(row.get('messages'), list):
        row['chosen'] = row.pop('messages')
        row['rejected'] = [*row['chosen'][:-1], *said(row.pop('rejected_response'))]
    # what SmolTalk 2 tells its template
    told = row.get('chat_template_kwargs')
    for name, ours in (('custom_instructions', 'system'), ('xml_tools', 'tools'), ('python_tools', 'tools')):
        if isinstance(told, dict) and told.get(name):
            row.setdefault(ours, told[name])
    # tools as JSON, all of them or each
    if isinstance(row.get('tools'), str):
        row['tools'] = json.loads(row['tools'] or 'null')
    if are_texts(row.get('tools')):
        row['tools'] = list(map(messages.loaded, row['tools']))
        if None in row['tools']:
            raise ValueError("'tools' has a text that is no JSON")
    return row


def _complete(example, row):
    """An example with its row's system message and tools; what to drop, where an answer has the weight 0."""
    if 'drop' in example:
        return example
    answers = [example[key] for key in ('chosen', 'rejected', 'response') if key in example]
    if any(isinstance(chat, list) and 'weight' in chat[0] for chat in answers):
        return {'drop': UNTRAINED}
    # the weight is for the trainer, not for the template
    prompt = example['prompt']
    if isinstance(prompt, list):
        prompt = example['prompt'] = [{k: v for k, v in turn.items() if k != 'weight'} for turn in prompt]
    if row.get('tools'):
        example['tools'] = field(row, 'tools', list)

    # a system message goes before, once, unless a text that is formatted already has it
    if not row.get('system'):
        return example
    system = field(row, 'system')
    if isinstance(prompt, str) and prompt.endswith(TURN_MARKERS) and system.strip() in prompt:
        return example
    if not prompt:
        raise ValueError("there is a 'system' message and no question behind it")
    example = messages.as_chats(example, system)
    if example['prompt'][0]['content'].strip() != system.strip():
        raise ValueError("the column 'system' and the system message of the chat are not the same")
    return example


# ---- prompt and answers ----


def first_of(names, row):
    """The first of these names that is a column of the row, or None."""
    return next((name for name in names if name in row), None)


def asked(row, found=None):
    """What the columns of a row ask: text that the answer goes on from, or chat.

    The text of 'prompt', and whatever ends in a turn marker, stays text; a question or an instruction becomes a message.
    found: the answer, which may have the question in it: then None is right where no column asks."""
    column, chat = first_of(QUESTIONS, row), first_of(CHATS, row)
    # a conversation that ends with a question asks it
    if chat and column != 'prompt':
        turns = text_or_chat({'prompt': field(row, chat, list)}, 'prompt')
        return None if turns[-1]['role'] == 'assistant' else turns
    if column is None:
        if found is None:
            raise ValueError("'prompt' is missing")
        return None

    prompt = text_or_chat(row, 'prompt') if column == 'prompt' else field(row, column)
    if column in ('question', 'instruction'):
        for more in ADDED:
            prompt += '\n\n' + field(row, more) if row.get(more) else ''
    turns = [message('user', prompt)] if isinstance(prompt, str) else prompt
    # an answer that is the whole chat may have the question in it
    before = found[:-1] if isinstance(found, list) else []
    nothing_lost(row, column, '\n'.join(turn['content'] for turn in turns + before))
    if isinstance(prompt, str) and is_history(row.get('history')):
        return messages.alternating(chain.from_iterable(row['history'])) + turns
    return prompt if column == 'prompt' or prompt.endswith(TURN_MARKERS) else turns


def nothing_lost(row, column, text):
    """Raise ValueError where another column asks, too, and what it says is not in this text."""
    for other in (name for name in (*QUESTIONS, *ABOUT) if name != column and row.get(name)):
        parts = row[other] if isinstance(row[other], list) else [row[other]]
        kept = all(isinstance(part, str) and part.strip() in text for part in parts)
        if not kept and not is_history(row[other]):
            raise ValueError(f'{other!r} asks something, too, which would be lost beside {column!r}')


def is_history(value):
    """Whether these are LLaMA-Factory's earlier turns, each a question and its answer."""
    return isinstance(value, list) and bool(value) and all(are_texts(turn, 2) for turn in value)


def answered(row, columns):
    """The example of what a row asks and its answers: {'chosen', 'rejected' or 'response': its column} of texts or chats.

    An answer may have the prompt in it."""
    answers = {key: text_or_chat(row, column) for key, column in columns.items()}
    first, *others = answers.values()
    prompt = asked(row, first)
    if any(type(other) is not type(first) for other in others):
        raise ValueError("'chosen' is text and 'rejected' is chat, or the reverse")
    if isinstance(first, str):
        return _behind_text(row, prompt, answers)

    # all turns before the last answer are the prompt, and must be the same for both
    if not all(answers.values()):
        raise LeftOut('empty answers')
    if len({chat[0]['role'] == 'assistant' for chat in answers.values()}) > 1:
        raise ValueError("only one of 'chosen' and 'rejected' begins with the prompt")
    chats = {key: whole_chat(prompt, chat) for key, chat in answers.items()}
    before, *others = [chat[:-1] for chat in chats.values()]
    if not before or any(other[:1] != before[:1] for other in others):
        raise ValueError("'prompt' is missing: the answers do not begin with a question, or not with the same question")
    if any(other != before for other in others):
        raise LeftOut(DIFFERENT)
    return {'prompt': before} | {key: chat[-1:] for key, chat in chats.items()}


def whole_chat(prompt, answer):
    """All turns of a prompt (text, chat or None) and an answer, which may be what follows it, or the whole chat."""
    turns = [] if prompt is None else as_chat(prompt)
    if answer[0]['role'] == 'assistant':
        return turns + answer
    # the whole chat has all of the prompt in it, but for a system message, or the prompt has all of its questions
    asks = '\n'.join(turn['content'].strip() for turn in turns if turn['role'] != 'system')
    chat = '\n'.join(turn['content'].strip() for turn in answer[:-1])
    questions = [turn['content'].strip() for turn in answer[:-1] if turn['role'] == 'user']
    if asks not in chat and not (len(questions) > 1 and all(question in asks for question in questions)):
        raise LeftOut('answers to something else than the prompt')
    if turns and turns[0]['role'] == 'system' != answer[0]['role']:
        return turns[:1] + answer
    return answer


def _behind_text(row, prompt, answers):
    """The example of answers that are texts; in a pair, what precedes a turn marker is the prompt if no column asks."""
    if prompt is None:
        if len(answers) == 1:
            raise ValueError("'prompt' is missing")
        return _by_marker(**answers)

    # all answers may begin with the prompt, and white space around it may differ
    example = {}
    question = prompt.strip() if isinstance(prompt, str) else prompt[-1]['content'].strip()
    begins = {text.lstrip().startswith(question) for text in answers.values()}
    if question and len(begins) == 2:
        raise ValueError("only one of 'chosen' and 'rejected' begins with the prompt")
    if question:
        example['repeats'] = True in begins
    if example.get('repeats'):
        answers = {key: text.lstrip().removeprefix(question) for key, text in answers.items()}
        prompt = prompt.rstrip() if isinstance(prompt, str) else prompt

    # CarperAI's summaries have their mark in the answers; Math-Step-DPO has steps that begin both answers
    if isinstance(prompt, str) and len(answers) == 2 and all(text.startswith('TL;DR:') for text in answers.values()):
        prompt = prompt.rstrip() + '\n\n'
    answers = {key: row.get('initial_reason_steps', '') + text for key, text in answers.items()}
    # behind a question that has become a message, the answer is one, too
    if isinstance(prompt, list) and not isinstance(row.get('prompt'), list):
        answers = {key: said(text) for key, text in answers.items()}
    return {'prompt': prompt} | answers | example


def _by_marker(chosen, rejected):
    """The pair in two texts that differ in their last answer; what precedes it is the prompt."""
    common = os.path.commonprefix([chosen, rejected])
    marker = ASSISTANT if ASSISTANT in chosen else next((m for m in TURN_MARKERS if m in common), None)
    if marker is None:
        missing = r"no turn marker (as '\n\nAssistant:')"
        raise ValueError(f'no column has the prompt, and {missing} shows where answers begin')
    prompt, _, chosen = chosen.rpartition(marker)
    other, _, rejected = rejected.rpartition(marker)
    # about 1 in 900 of HH
    if prompt != other:
        raise LeftOut(DIFFERENT)
    return {'prompt': prompt + marker, 'chosen': chosen, 'rejected': rejected}


# ---- pairs ----


def read_pair(row, task=None):
    """Two answers to one prompt, which has a column, or stands before both."""
    if row.get('status') == 'tie':
        raise LeftOut('tie')
    # RewardBench 2 has lists of good and of bad answers; two good ones are no pair, and nothing is lost by that
    if are_texts(row.get('chosen')) and are_texts(row.get('rejected')):
        scored = [(1, said(text)) for text in row['chosen']] + [(0, said(text)) for text in row['rejected']]
        return [example for example in ranked(as_chat(asked(row)), scored, task) if 'drop' not in example]
    example = answered(row, {'chosen': 'chosen', 'rejected': 'rejected'})
    if 'margin' in row:
        example['margin'] = float(field(row, 'margin', NUMBER))
    return [example]


def read_compared(row, task=None):
    """Two answers, or whole conversations, and a column that says which is better."""
    columns = next(two for two in COMPARED if set(two) <= row.keys())
    better = _better(row, columns)
    if better is None and task != 'prompts':
        raise LeftOut('tie')
    good, bad = columns[::-1] if better == columns[1] else columns
    # the better conversation needs no other with the same questions
    wanted = {'response': good} if task == 'sft' else {'chosen': good, 'rejected': bad}
    # texts become chats, and the messages of two sides may differ in other fields
    for column in wanted.values():
        chat = [message(turn['role'], turn['content']) for turn in said(text_or_chat(row, column))]
        # MT-Bench has two turns, and a verdict of each
        row[column] = chat[:2] if row.get('turn') == 1 and len(chat) == 4 else chat
    return [answered(row, wanted)]


def _better(row, columns):
    """The column that a verdict names ('model_a', 'B', 1), or means by its sign; None for a tie."""
    verdict = first_of((*BY_NAME, *BY_SIGN), row)
    if verdict is None:
        one, two = (field(row, f'score_{column[-1]}', NUMBER) for column in columns)
        return columns[two > one] if one != two else None
    if verdict in BY_SIGN:
        return columns[field(row, verdict, NUMBER) > 0] if row[verdict] else None
    name = str(row[verdict]).strip().lower()
    side = SIDE.fullmatch(name)
    found = [column for column in columns if side and column.endswith(side[2])]
    if not found and not TIE.fullmatch(name):
        raise ValueError(f'{name[:24]!r} is neither of {" and ".join(columns)}, nor a tie')
    return found[0] if found else None


def read_votes(row, task=None):
    """LMSYS's votes as a table: questions and both sides' answers in JSON lists, and who has won in zeros and ones."""
    texts = [row[key] for key in ('prompt', 'response_a', 'response_b')]
    texts = [json.loads(value) if isinstance(value, str) else value for value in texts]
    if not all(map(are_texts, texts)):
        raise LeftOut('empty answers')
    questions, *answers = texts
    a, b = (messages.alternating(chain.from_iterable(zip(questions, side, strict=False))) for side in answers)
    won = [side for side in 'ab' if str(row[f'winner_model_{side}']) in ('1', '1.0', 'True')]
    return read_compared({'conversation_a': a, 'conversation_b': b, 'winner': ''.join(won)}, task)


def read_sides(row, task=None):
    """Arena's newer votes: turns that have the user's message and that of each side."""
    chats = {'winner': row['winner']}
    for side in 'ab':
        turns = [turn[key] for turn in row['full_conversation'] for key in ('user', f'model_side_{side}')]
        chats[f'conversation_{side}'] = list(chain.from_iterable(map(messages.as_messages, turns)))
    return read_compared(chats, task)


def read_summaries(row, task=None):
    """openai/summarize_from_feedback's comparisons, with prompts as TRL writes them."""
    info, choice = field(row, 'info', dict), field(row, 'choice', int)
    chosen, rejected = [answer(field(summary, 'text')) for summary in field(row, 'summaries', list)]
    if choice not in (0, 1):
        raise ValueError("'choice' is neither 0 nor 1")
    if choice:
        chosen, rejected = rejected, chosen
    # a post of reddit, or an article of CNN or Daily Mail
    text = field(info, 'post' if info.get('post') else 'article').replace('\n\n', '\n')
    prompt = f'TITLE: {info.get("title") or ""}\n\n'
    if info.get('post'):
        prompt = f'SUBREDDIT: r/{info.get("subreddit") or ""}\n\n{prompt}POST: '
    return [{'prompt': f'{prompt}{text}\n\nTL;DR:', 'chosen': chosen, 'rejected': rejected}]


def read_annotation(row, task=None):
    """AlpacaEval's annotations: preference below 1.5 means output_1, above it output_2; 0 and 1.5 are ties."""
    outputs, verdict = [field(row, 'output_1'), field(row, 'output_2')], row['preference']
    # label.py keeps a prompt that is not '\n\nHuman: instruction\n\nAssistant:' as it is
    if 'prompt' in row:
        prompt = text_or_chat(row, 'prompt')
    else:
        prompt, outputs = ask(messages.instruction(asked(row))), [answer(x) for x in outputs]
    # null or NaN
    if verdict is None or verdict != verdict:
        raise LeftOut('no verdict')
    if field(row, 'preference', NUMBER) in (0, 1.5):
        raise LeftOut('tie')
    if not 1 <= verdict <= 2:
        raise ValueError("'preference' is not 0, null, or from 1 to 2")
    return [{'prompt': prompt, 'chosen': outputs[verdict > 1.5], 'rejected': outputs[verdict < 1.5]}]


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
    html = [(field(found, 'pm_score', NUMBER), field(found, 'text')) for found in field(row, 'answers', list)]
    scored = [(score, answer(messages.strip_html(text))) for score, text in html]
    return ranked(ask(messages.strip_html(field(row, 'question'))), scored, task)


def read_nectar(row, task=None):
    """berkeley-nest/Nectar: a prompt in Anthropic's format, and answers by rank, 1 the best."""
    scored = [(-field(found, 'rank', NUMBER), answer(field(found, 'answer'))) for found in field(row, 'answers', list)]
    return ranked(field(row, 'prompt').rstrip(), scored, task)


def read_completions(row, task=None):
    """openbmb/UltraFeedback: four answers by their score, the mean of four aspects where there is one."""
    scored = []
    for found in field(row, 'completions', list):
        score = 'overall_score' if found.get('fine-grained_score') is None else 'fine-grained_score'
        scored.append((field(found, score, NUMBER), said(field(found, 'response'))))
    return ranked(as_chat(asked(row)), scored, task)


def read_scored(row, task=None):
    """A list of answers and one of their scores, which may be whether they are right."""
    answers, scores = next((a, s) for a in MANY for s in SCORES if {a, s} <= row.keys())
    texts, known = field(row, answers, list), field(row, scores, list)
    if not are_texts(texts, len(known)) or not all(isinstance(score, NUMBER | None) for score in known):
        raise ValueError(f'{answers!r} and {scores!r} are not as many texts and numbers')
    if task == 'sft' and all(score is False for score in known):
        raise LeftOut('no right answer')
    scored = [(score, said(text)) for score, text in zip(known, texts, strict=True) if score is not None]
    return ranked(as_chat(asked(row)), scored, task)


def grouped(rows, task, read):
    """The examples of answers that belong together by their prompt, wherever they stand; they come with its first row.

    read(row) -> (prompt, [(score, answer)])."""
    groups = {}  # prompt as JSON -> (first row, prompt, scored)
    for row, found in each(rows, read):
        if not isinstance(found, tuple):
            yield row, found
            continue
        prompt, scored = found
        _, _, known = groups.setdefault(json.dumps(prompt), (row, prompt, []))
        known += [pair for pair in scored if pair not in known]
    for row, prompt, scored in groups.values():
        yield row, ranked(prompt, scored, task)


def read_shp(rows, task=None):
    """stanfordnlp/SHP: pairs with a score ratio of 2 or more; SFT on the best answer in a prompt's kept pairs."""

    def read(row):
        scored = [(field(row, f'score_{x}', NUMBER), answer(field(row, f'human_ref_{x}'))) for x in 'AB']
        low, high = sorted(score for score, _ in scored)
        if high < 2 * low:
            raise LeftOut('score ratio below 2')
        prompt = ask(field(row, 'history'))
        return (prompt, scored) if task == 'sft' else ranked(prompt, scored, task)

    return grouped(rows, task, read)


def read_rated(rows, task=None):
    """HelpSteer and HelpSteer 2: an answer a row, with its ratings; the answers to a prompt are compared by helpfulness."""

    def read(row):
        row = unified(row)
        return as_chat(asked(row)), [(field(row, 'helpfulness', NUMBER), said(field(row, 'response')))]

    return grouped(rows, task, read)


def read_trees(rows, task=None, language=None):
    """OpenAssistant: each ranked answer against the next better one, after the conversation so far; for sft the best one.

    language: only messages in this one."""
    rows = list(rows)
    by_id = {str(row.get('message_id')): row for row in rows}
    by_rank = {str([row.get(key) for key in ('parent_id', 'lang', 'rank')]): row for row in rows}

    def above(message_id):
        """The conversation that ends with this message."""
        turns = []
        while message_id is not None:
            row = by_id.get(message_id)
            if row is None or len(turns) == 100:
                raise ValueError('the conversation above the answer is not whole')
            role = 'assistant' if row.get('role') == 'assistant' else 'user'
            turns.insert(0, message(role, field(row, 'text')))
            message_id = row.get('parent_id')
        return turns

    def read(row):
        if language and field(row, 'lang') != language:
            raise LeftOut('not English')
        if field(row, 'role') == 'prompter':
            return [{'prompt': above(field(row, 'message_id'))}] if task == 'prompts' else []
        if task == 'prompts':
            return []
        if row.get('rank') is None:
            raise LeftOut('an answer without a rank')
        rank, parent = field(row, 'rank', NUMBER), field(row, 'parent_id')
        mine = [message('assistant', field(row, 'text'))]

        # rank 0, the best, takes part as the better one of rank 1
        if rank == 0:
            return [{'prompt': above(parent), 'response': mine}] if task == 'sft' else []
        if task == 'sft':
            raise LeftOut('answers that are not the best')
        better = by_rank.get(str([parent, row.get('lang'), rank - 1]))
        if better is None:
            raise LeftOut('no answer of the next better rank')
        return [{'prompt': above(parent), 'chosen': [message('assistant', field(better, 'text'))], 'rejected': mine}]

    return each(rows, read)


# ---- single answers, conversations, texts, prompts ----


def read_answer(row, task=None):
    """A prompt and an answer, which a label may call good or bad."""
    key = first_of(ANSWERS, row)
    # LLaMA-Factory's older pairs: the good and the bad output
    if key == 'output' and are_texts(row[key], 2):
        chosen, rejected = row.pop(key)
        return read_pair(row | {'chosen': chosen, 'rejected': rejected}, task)
    # a label that is a text is the answer itself
    label = {} if key == 'label' else thumb(row)
    example = answered(row, {'response': key})
    # the answers of a history are trained on, too, as LLaMA-Factory does
    if is_history(row.get('history')) and isinstance(example['prompt'], list):
        return read_chat({'messages': example['prompt'] + example['response'], **label}, task)
    return [example | label]


def thumb(row):
    """{'good': whether the answer is good}, if a column says so; a table may have it as text."""
    column = first_of(LABELS, row)
    # Infinity-Instruct's labels are of other things
    if column is None or isinstance(row[column], list | dict):
        return {}
    value = str(row[column]).lower()
    if value not in ('true', 'false', '1', '0', '1.0', '0.0'):
        raise ValueError(f'{column!r} is neither true (1) nor false (0)')
    return {'good': value in ('true', '1', '1.0')}


def read_chat(row, task=None):
    """A conversation: all its answers are trained on, and the last one is the response."""
    key = first_of(CHATS, row)
    turns = [messages.checked(turn) for turn in field(row, key, list)]
    last = turns[-1]['role'] if turns else 'assistant'
    if last != 'assistant':
        # the answer may have a column of its own
        if any(isinstance(row.get(column), (str, list)) for column in ANSWERS):
            return read_answer(row, task)
        if last not in messages.ROLES.values():
            text_or_chat(row, key)  # says that this is no answer
        if task == 'prompts' or (task is None and len(turns) == 1):
            return [{'prompt': turns}]

    # an empty answer among others is no demonstration; one that has a label stays, for the label is its own
    good = thumb(row)
    answers = [turn for turn in turns if turn['role'] == 'assistant']
    if task != 'prompts' and not good and not messages.is_empty(answers):
        for turn in answers:
            if messages.is_empty([turn]):
                turn['weight'] = 0

    # as FastChat does: what precedes the first question, and what follows the last answer, is left out
    kept = turns.copy()
    while kept and kept[0]['role'] == 'assistant':
        kept.pop(0)
    while kept and not messages.is_trained(kept[-1]):
        kept.pop()
    if not kept:
        untrained = any('weight' in turn for turn in turns)
        raise LeftOut(UNTRAINED if untrained else 'conversations without a question and its answer')
    example = {'prompt': kept[:-1], 'response': kept[-1:], **good}
    if not good and sum(map(messages.is_trained, kept)) > 1:
        example['turns'] = kept
    return [example] if kept == turns else [example, {'drop': UNASKED}]


def read_text(row, task=None):
    """A text to learn as it stands; where it is a dialogue with marks, a conversation."""
    text = field(row, 'text')
    nothing_lost(row, 'text', text)
    for other in (*LIKE_ANSWERS, 'solution', 'summary', 'code'):
        if isinstance(row.get(other), str | list):
            raise ValueError(
                f"'text' may be what {other!r} answers: --columns='question=text, response={other}', or 'text=text'"
            )
    for start, marks in messages.DIALOGUES.items():
        if text.startswith(start):
            turns = messages.dialogue(text, marks)
            if {turn['role'] for turn in turns} == {'user', 'assistant'}:
                return read_chat({'messages': turns}, task)
    if task == 'prompts':
        raise ValueError("'text' is an answer, and no column asks: if it asks, --columns='question=text'")
    return [{'prompt': '', 'response': text}]


def read_prompt(row, task=None):
    """A prompt alone, or with CarperAI's label, which is a text, the answer."""
    for name, value in row.items():
        # without a task, a solution may be there for a reward alone
        like = any(word in name.lower() for word in LIKE_ANSWERS) or (task and 'solution' in name.lower())
        if task != 'prompts' and like and value and isinstance(value, str | list | dict):
            raise ValueError(f'{name!r} may be an answer, and is no column that is known beside a prompt')
    if 'prompt' in row and isinstance(row.get('label'), str):
        return read_answer(row, task)
    return [{'prompt': asked(row)}]


# fmt: off
# the first whose columns a row has; a comma stands between columns that do for one another
LAYOUTS = [Layout(name, frozenset(columns.split()), read) for name, several, read in (
    ('AlpacaEval annotations', 'preference output_1', read_annotation),
    ('SHP', 'history human_ref_A human_ref_B labels', read_shp),
    ('Stack Exchange', 'question answers', read_stack_exchange),
    ('Nectar', 'prompt answers', read_nectar),
    ('OpenAssistant', 'message_id text role', read_trees),
    ('summaries', 'info summaries choice', read_summaries),
    ('arena', 'prompt response_a response_b winner_model_a winner_model_b', read_votes),
    ('comparison', ','.join(f'{one} {two} {v}' for v in (*BY_NAME, *BY_SIGN) for one, two in COMPARED), read_compared),
    ('comparison', ','.join(f'{one} {two} score_{one[-1]} score_{two[-1]}' for one, two in COMPARED), read_compared),
    ('arena', 'full_conversation winner', read_sides),
    ('HelpSteer', 'prompt response helpfulness', read_rated),
    ('pair', 'chosen, rejected', read_pair),
    ('conversation', ','.join(CHATS), read_chat),
    ('answer', 'response, completion, instruction output, input output, prompt output', read_answer),
    ('answer', 'prompt answer, instruction answer, query answer', read_answer),
    ('scored answers', ','.join(f'{answers} {scores}' for answers in MANY for scores in SCORES), read_scored),
    ('UltraFeedback', 'instruction completions', read_completions),
    ('answer', 'question answer, problem solution, problem answer', read_answer),
    ('text', 'text', read_text),
    ('prompt', ','.join(QUESTIONS), read_prompt),
) for columns in several.split(',')]
# fmt: on
# all names that say something
KNOWN = frozenset(chain(COLUMNS, ADDED, ABOUT, LABELS, *RENAMED, *(layout.columns for layout in LAYOUTS)))
# of these, one row does not tell its examples
OF_ALL_ROWS = {read_shp, read_rated, read_trees}
