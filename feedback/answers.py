"""What sample.py and label.py know of answers: the files that hold them, pairs of them, and what judges said of the pairs.

samples.jsonl has a row an answer, model_outputs.json is AlpacaEval's, verdicts.jsonl has a row a verdict. Rows are appended as
they come, so that a killed run goes on where it was. Rank r > 0 samples into samples-r.jsonl; all are put into one file, in
order, when a run begins and ends."""

import json
import os
from collections import Counter
from itertools import combinations
from pathlib import Path

from configurator import UserError
from runtime import files
from runtime.values import looked_in
from text.files import read_rows
from text.messages import ASSISTANT, answer, ask, field, instruction, text_or_chat

# ---- what both scripts do ----


def append(path, rows, sync=True):
    """Add rows (json-able dicts) to a file, safe from kill -9 when this returns; if sync, from a power cut, too."""
    with files.writing(path), open(path, 'a', encoding='utf-8') as file:
        file.write(''.join(json.dumps(row, default=str) + '\n' for row in rows))
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_back(path, key_of):
    """key_of(row) -> row, of the rows that append has left in a file; a last line that a kill has cut off is removed.

    Raises UserError with the line where key_of raises KeyError, TypeError or ValueError; of a UserError with its words."""
    rows = {}
    *lines, unfinished = path.read_bytes().split(b'\n') if path.exists() else [b'']
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.setdefault(key_of(row), row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            damaged = 'is damaged: delete that line, and the same command makes it anew'
            what = error if isinstance(error, UserError) else damaged
            raise UserError(f'{path}, line {number}, {what}') from None
    if unfinished:
        files.say(f'note: the last line of {path} was not written to its end: what it was to hold is done again')
        os.truncate(path, path.stat().st_size - len(unfinished))
    return rows


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
        key = field(row, 'index', int), field(row, 'sample', int)
        field(row, 'response')
        row['finish']  # must be there
        expected = wanted(*key)
        if expected is None or row | expected != row:
            raise UserError('answers a prompt that is not in the data any more: choose another --out_dir')
        return key

    # a row that two ranks have written counts once
    folder = Path(out_dir)
    parts = sorted(folder.glob('samples-*.jsonl'))
    found = {}
    for path in (folder / 'samples.jsonl', *parts):
        found = read_back(path, key_of) | found
    found = dict(sorted(found.items()))
    files.replace_text(folder / 'samples.jsonl', ''.join(json.dumps(row) + '\n' for row in found.values()))
    for path in parts:
        path.unlink()
    return found


def write_model_outputs(out_dir, rows):
    """AlpacaEval's model_outputs.json: the first answer to each prompt, without white space around it. rows: of collect."""
    outputs = [
        {'instruction': instruction(row['prompt']), 'output': row['response'].strip(), 'generator': row['generator']}
        for row in rows.values()
        if row['sample'] == 0
    ]
    files.replace_text(Path(out_dir) / 'model_outputs.json', json.dumps(outputs, indent=1))


# ---- pairs of answers ----


def read_answers(path):
    """The answers of a samples.jsonl or a model_outputs.json: {'prompt', 'instruction', 'response', 'generator', 'sample',
    'tools'}. Raises UserError."""
    rows, numbers = [], Counter()
    for row in read_rows(None, 'train', path):
        try:
            prompt, response = _prompt_and_response(row)
            found = {'prompt': prompt, 'instruction': instruction(prompt), 'response': response}
            found['tools'] = row.get('tools')
            found['generator'] = field({'generator': 'unnamed', **row}, 'generator')
            # without a sample number, answers are numbered as they come
            who = found['instruction'], found['generator']
            found['sample'] = field({'sample': numbers[who], **row}, 'sample', int)
        except ValueError as error:
            raise UserError(f'{row.where}: {error}: this is neither a samples.jsonl nor a model_outputs.json') from None
        numbers[who] += 1
        rows.append(found)
    if not rows:
        raise UserError(f'there are no answers in {path}')
    return rows


def _prompt_and_response(row):
    """(prompt, response) of a row of either file. Raises ValueError."""
    if row.error:
        raise ValueError(row.error)
    if 'instruction' not in row:
        return text_or_chat(row, 'prompt'), field(row, 'response')
    # model_outputs.json: a dialogue stands there as it was asked, a single question without what goes around it
    prompt, response = field(row, 'instruction'), field(row, 'output')
    if prompt.startswith('\n\nHuman:') and prompt.endswith(ASSISTANT):
        return prompt, answer(response)
    return ask(prompt), response


def make_pairs(answers, against=None):
    """(list of pairs, Counter of what was left out) from one file of answers, or two.

    A pair: {'prompt': text or chat, 'instruction': what it asks, 'outputs': [first, second], 'generators': likewise,
    'question': number of the prompt}. One file: any two answers to a prompt, the lower sample number first. Two: the k-th
    answers to a prompt in both. Raises UserError where there is no pair."""
    ours = read_answers(answers)
    theirs = read_answers(against) if against else []
    groups, others = _by_question(ours), _by_question(theirs)
    pairs = []
    for number, (question, group) in enumerate(groups.items()):
        found = zip(group, others.get(question, []), strict=False) if against else combinations(group, 2)
        pairs += [_pair(first, second, number) for first, second in found]
    if not pairs and against:
        raise UserError(f'no prompt of {answers} has an answer in {against}')
    if not pairs:
        raise UserError(f'no prompt in {answers} has two answers: sample with --n=2, or name --against=FILE')

    # in two files, each pair takes an answer of each
    left_out = Counter({'tools, which no judge is shown': sum(bool(row['tools']) for row in ours + theirs)})
    if against:
        left_out['answers without a counterpart'] = len(ours) - len(pairs)
        left_out['answers of --against without a counterpart'] = len(theirs) - len(pairs)
    else:
        left_out['answers without a counterpart'] = sum(len(group) == 1 for group in groups.values())
    return pairs, left_out


def _by_question(rows):
    """Question -> its answers by sample number. A question is (instruction, how often it was asked before in this file)."""
    groups, seen = {}, Counter()
    for row in rows:
        # the same sample of the same generator once more: a file asks the same twice
        who = row['instruction'], row['generator'], row['sample']
        groups.setdefault((row['instruction'], seen[who]), []).append(row)
        seen[who] += 1
    return {question: sorted(group, key=lambda row: row['sample']) for question, group in groups.items()}


def _pair(first, second, number):
    """A pair, as make_pairs has it, of two answers to question `number`."""
    # model_outputs.json has lost what the prompt really was
    prompt = second['prompt'] if is_plain(first) else first['prompt']
    pair = {'prompt': prompt, 'instruction': first['instruction'], 'question': number}
    pair['outputs'] = [first['response'], second['response']]
    return pair | {'generators': [first['generator'], second['generator']]}


def is_plain(row):
    """Whether the prompt of an answer, or of a pair, is the single question that its instruction says."""
    return row['prompt'] == ask(row['instruction'])


# ---- what a judge says of them ----


def read_verdicts(path):
    """The verdicts in a file: (pair, order) -> row. Raises UserError for a damaged one."""

    def key_of(row):
        if row['preference'] not in (None, 1, 1.5, 2) or not isinstance(row.get('text', ''), str):
            raise ValueError
        return field(row, 'pair', int), field(row, 'order', int)

    return read_back(path, key_of)


def annotation(pair, preference, annotator):
    """A row of AlpacaEval's annotations.json. 'prompt' is added where the instruction does not say what it was exactly."""
    row = {'instruction': pair['instruction']}
    for n, (output, generator) in enumerate(zip(pair['outputs'], pair['generators'], strict=True), 1):
        row |= {f'output_{n}': output, f'generator_{n}': generator}
    row |= {'annotator': annotator, 'preference': preference}
    return row if is_plain(pair) else row | {'prompt': pair['prompt']}
