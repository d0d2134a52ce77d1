"""What sample.py and label.py know of answers: the files that hold them, pairs of them, and what judges said of the pairs.

samples.jsonl has a row an answer, model_outputs.json is AlpacaEval's; verdicts.jsonl has a row a verdict. Rows are appended as
they come, so that a killed run goes on where it was. Rank r > 0 samples into samples-r.jsonl; when a run begins and ends,
all are put into one file and in order, so that the number of ranks does not show."""

import json
import os
from collections import Counter
from itertools import combinations
from pathlib import Path

from configurator import UserError
from runtime import files
from runtime.files import lock  # noqa: F401, lock is for both scripts
from runtime.values import looked_in
from text.files import read_rows
from text.messages import ASSISTANT, answer, ask, field, instruction, text_or_chat

# ---- what both scripts do ----


def append(path, rows, sync=True):
    """Add rows (json-able dicts) to a file, safe from kill -9 when this returns; if sync, from a power cut, too."""
    with files.writing(path), open(path, 'a', encoding='utf-8') as file:
        file.write(''.join(json.dumps(row) + '\n' for row in rows))
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_back(path, key_of):
    """Yield (words that say where, key_of(row), row) for the rows that append has left in a file.

    A last line that a kill has cut off is removed in the end. key_of raises ValueError, KeyError or TypeError for a damaged
    row; then UserError is raised."""
    if not path.exists():
        return
    *lines, unfinished = path.read_bytes().split(b'\n')
    for number, line in enumerate(lines, 1):
        where = f'{path}, line {number},'
        try:
            row = json.loads(line)
            key = key_of(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{where} is damaged: delete that line, and the same command makes it anew') from None
        yield where, key, row
    if unfinished:
        files.say(f'note: the last line of {path} was not written to its end: what it was to hold is done again')
        os.truncate(path, path.stat().st_size - len(unfinished))


def read_text(path, name=None):
    """The text of a file that an option names. name: what a message calls it. Raises UserError."""
    try:
        return Path(path).read_text('utf-8')
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'cannot read {name or path}{looked_in(path)}: {reason}') from None


def raise_if_missing(failed, what):
    """Raise UserError where requests have failed. failed: Counter of their reasons; what: a plural, as 'answers'."""
    for reason, times in failed.most_common(1):
        count = f'{failed.total()} {what} are missing ({times} times: {reason})'
        raise UserError(f'{count}: run the same command to ask again')


# ---- answers of sample.py ----


def collect(out_dir, wanted):
    """Put all ranks' rows into one samples.jsonl, in order of (index, sample). Returns them, (index, sample) -> row.

    wanted(index, sample) gives what such a row must contain, or None if there is no such answer in this run. Raises UserError
    for rows of something else."""

    def key_of(row):
        field(row, 'response')
        row['finish']  # must be there
        return field(row, 'index', int), field(row, 'sample', int)

    # the rows of all ranks, in whatever order they came
    found = {}
    file = Path(out_dir) / 'samples.jsonl'
    parts = sorted(file.parent.glob('samples-*.jsonl'))
    for path in (file, *parts):
        for where, key, row in read_back(path, key_of):
            expected = wanted(*key)
            has_all = expected is not None and row | expected == row
            if not has_all:
                raise UserError(f'{where} answers a prompt that is not in the data any more: choose another --out_dir')
            found.setdefault(key, row)

    # one file instead of all
    found = dict(sorted(found.items()))
    files.replace_text(file, ''.join(json.dumps(row) + '\n' for row in found.values()))
    for path in parts:
        path.unlink()
    return found


def write_model_outputs(out_dir, rows):
    """AlpacaEval's model_outputs.json: the first answer to each prompt, without white space around it. rows: of collect."""
    outputs = []
    for row in rows.values():
        if row['sample'] == 0:
            output = {'instruction': instruction(row['prompt']), 'output': row['response'].strip()}
            outputs.append(output | {'generator': row['generator']})
    files.replace_text(Path(out_dir) / 'model_outputs.json', json.dumps(outputs, indent=1))


# ---- pairs of answers ----


def read_answers(path):
    """The answers of a samples.jsonl or a model_outputs.json. Raises UserError.

    Rows {'prompt', 'instruction', 'response', 'generator', 'sample'}, and 'tools' where a prompt has some."""
    rows, numbers = [], Counter()
    for row in read_rows(None, 'train', path):
        try:
            found = _read_answer(row)
            # without a sample number, answers are numbered as they come
            who = found['instruction'], found['generator']
            found['sample'] = field({'sample': numbers[who], **row}, 'sample', int)
        except ValueError as error:
            raise UserError(f'{row.where}: {error}: this is neither a samples.jsonl nor a model_outputs.json') from None
        numbers[who] += 1
        if row.get('tools'):
            found['tools'] = row['tools']
        rows.append(found)
    if not rows:
        raise UserError(f'there are no answers in {path}')
    return rows


def _read_answer(row):
    """A row as read_answers has it, but for its number. Raises ValueError."""
    if row.error:
        raise ValueError(row.error)
    if 'instruction' not in row:
        # samples.jsonl
        prompt, response = text_or_chat(row, 'prompt'), field(row, 'response')
    else:
        # model_outputs.json: a dialogue stands there as it was asked, a single question without what goes around it
        prompt, response = field(row, 'instruction'), field(row, 'output')
        if prompt.startswith('\n\nHuman:') and prompt.endswith(ASSISTANT):
            response = answer(response)
        else:
            prompt = ask(prompt)
    generator = field({'generator': 'unnamed', **row}, 'generator')
    return {'prompt': prompt, 'instruction': instruction(prompt), 'response': response, 'generator': generator}


def make_pairs(answers, against=None):
    """(list of pairs, Counter of what was left out) from one file of answers, or two.

    A pair: {'prompt': text or chat, 'instruction': what it asks, 'outputs': [first, second], 'generators': likewise,
    'question': number of the prompt}. One file: any two answers to a prompt, the lower sample number first. Two: the k-th
    answers to a prompt in both. Raises UserError where there is no pair."""
    ours = read_answers(answers)
    theirs = read_answers(against) if against else []
    left_out = Counter()
    left_out['tools, which no judge is shown'] += sum('tools' in row for row in ours + theirs)

    # question by question
    pairs = []
    others_of = _by_question(theirs)
    for number, (key, group) in enumerate(_by_question(ours).items()):
        if against:
            others = others_of.pop(key, [])
            found = list(zip(group, others, strict=False))
            left_out['answers without a counterpart'] += len(group) - len(found)
            left_out['answers of --against without a counterpart'] += len(others) - len(found)
        else:
            found = list(combinations(group, 2))
            left_out['answers without a counterpart'] += 0 if found else len(group)
        pairs += [_pair(first, second, number) for first, second in found]

    # questions that ours do not answer
    left_out['answers of --against without a counterpart'] += sum(map(len, others_of.values()))
    if not pairs and against:
        raise UserError(f'no prompt of {answers} has an answer in {against}')
    if not pairs:
        raise UserError(f'no prompt in {answers} has two answers: sample with --n=2, or name --against=FILE')
    return pairs, left_out


def _pair(first, second, number):
    """A pair, as make_pairs has it, of two answers to question `number`."""
    # model_outputs.json has lost what the prompt really was
    prompt = second['prompt'] if is_plain(first) else first['prompt']
    return {
        'prompt': prompt,
        'instruction': first['instruction'],
        'question': number,
        'outputs': [first['response'], second['response']],
        'generators': [first['generator'], second['generator']],
    }


def _by_question(rows):
    """Question -> its answers by sample number. A question is (instruction, how often it was asked before in this file)."""
    groups, seen = {}, Counter()
    for row in rows:
        # the same sample of the same generator once more: a file asks the same twice
        who = row['instruction'], row['generator'], row['sample']
        question = row['instruction'], seen[who]
        groups.setdefault(question, []).append(row)
        seen[who] += 1
    return {question: sorted(group, key=lambda row: row['sample']) for question, group in groups.items()}


def as_trained(pair, k):
    """Answer k of a pair as dpo.py will read it from annotations.json."""
    text = pair['outputs'][k]
    return answer(text) if is_plain(pair) else text


def is_plain(row):
    """Whether the prompt of an answer, or of a pair, is the single question that its instruction says."""
    return row['prompt'] == ask(row['instruction'])


# ---- what a judge says of them ----


def read_verdicts(path):
    """The verdicts in a file: (pair, order) -> row. Raises UserError for a damaged one."""

    def key_of(row):
        is_known = row['preference'] in (None, 1, 1.5, 2)
        if not is_known or not isinstance(row.get('text', ''), str):
            raise ValueError(row)
        return field(row, 'pair', int), field(row, 'order', int)

    return {key: row for _, key, row in read_back(path, key_of)}


def annotation(pair, preference, annotator):
    """A row of AlpacaEval's annotations.json. 'prompt' is added where the instruction does not say what it was exactly."""
    row = {'instruction': pair['instruction']}
    for n, (output, generator) in enumerate(zip(pair['outputs'], pair['generators'], strict=True), 1):
        row |= {f'output_{n}': output, f'generator_{n}': generator}
    row |= {'annotator': annotator, 'preference': preference}
    return row if is_plain(pair) else row | {'prompt': pair['prompt']}
