"""Files of answers and of verdicts, which sample.py and label.py write and read; and the pairs of answers that are judged.

samples.jsonl has a row for each answer, model_outputs.json is AlpacaEval's format for answers, verdicts.jsonl has a row for
each verdict. Rows are appended as they come, so that a killed run goes on where it was. Rank 0 samples into samples.jsonl,
and rank r > 0 into samples-r.jsonl; when a run begins and when it ends, all rows are put into samples.jsonl, in order.
"""

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
    """Append rows (dicts) to a .jsonl file, which is made if it does not exist.

    When this returns, a kill cannot lose them; if sync is true, a power cut cannot, either. str() writes values that json does
    not know. Raises UserError if the file cannot be written."""
    lines = [json.dumps(row, default=str) + '\n' for row in rows]
    with files.writing(path), open(path, 'a', encoding='utf-8') as file:
        file.write(''.join(lines))
        # from here on the system has them, whatever happens to this process; fsync brings them to the disk
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_back(path, key_of):
    """Return the rows of a file that append has written, as a dict key_of(row) -> row; without a file it is empty.

    The first of several rows with one key counts. A last line that a kill has cut off is removed from the file, with a note.
    key_of may raise KeyError, TypeError or ValueError for a damaged row, or UserError with words of its own. Then, and for a
    line that is no json, raises UserError with the line's number."""
    rows = {}
    content = path.read_bytes() if path.exists() else b''
    # every whole line ends with a line break, so nothing follows the last one
    *lines, cut_off = content.split(b'\n')
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.setdefault(key_of(row), row)
        except UserError as error:
            raise UserError(f'{path}, line {number}, {error}') from None
        except (ValueError, KeyError, TypeError, RecursionError):
            advice = 'delete that line, and the same command makes it anew'
            raise UserError(f'{path}, line {number}, is damaged: {advice}') from None
    if cut_off:
        files.say(f'note: the last line of {path} was not written to its end: what it was to hold is done again')
        os.truncate(path, len(content) - len(cut_off))
    return rows


def read_text(path, name=None):
    """Return the text of a file that an option names. name: what messages call it, if not by its path. Raises UserError."""
    try:
        return Path(path).read_text('utf-8')
    except (OSError, ValueError) as error:
        # an OSError says why in words; a ValueError is about bytes that are no text
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'cannot read {name or path}{looked_in(path)}: {reason}') from None


def raise_if_missing(failed, what):
    """Raise UserError if any request has failed. failed: Counter of the reasons; what: a plural, such as 'answers'."""
    if failed:
        # the most frequent reason stands for all
        [(reason, times)] = failed.most_common(1)
        missing = f'{failed.total()} {what} are missing ({times} times: {reason})'
        raise UserError(f'{missing}: run the same command to ask again')


# ---- answers of sample.py ----


def collect(out_dir, wanted):
    """Put the rows of all ranks into one samples.jsonl, sorted, delete the ranks' own files, and return the rows.

    They are returned as a dict (index of the prompt, number of the sample) -> row. wanted(index, sample) returns the fields
    that such a row must have, with their values, or None if this run has no such answer. Raises UserError for a row that is
    damaged or belongs to another run; then no row has moved, and no file is deleted."""

    def key_of(row):
        """Return the key of a row that has all its fields; raise as read_back says."""
        key = field(row, 'index', int), field(row, 'sample', int)
        # these two lines only raise if something is missing
        field(row, 'response')
        row['finish']
        expected = wanted(*key)
        # row | expected is row again if it has all these values
        if expected is None or row | expected != row:
            raise UserError('answers a prompt that is not in the data any more: choose another --out_dir')
        return key

    folder = Path(out_dir)
    all_ranks = folder / 'samples.jsonl'
    of_ranks = sorted(folder.glob('samples-*.jsonl'))
    rows = {}
    for path in (all_ranks, *of_ranks):
        # two ranks may have written the same answer: the first one stays, since the right side of | wins
        rows = read_back(path, key_of) | rows
    rows = dict(sorted(rows.items()))
    files.replace_text(all_ranks, ''.join(json.dumps(row) + '\n' for row in rows.values()))
    # only now are their rows safe in the other file
    for path in of_ranks:
        path.unlink()
    return rows


def write_model_outputs(out_dir, rows):
    """Write AlpacaEval's model_outputs.json: the first answer to each prompt, stripped. rows: as collect returns them."""
    outputs = []
    for row in rows.values():
        # AlpacaEval compares one answer to each prompt
        if row['sample'] == 0:
            output = {'instruction': instruction(row['prompt']), 'output': row['response'].strip()}
            outputs.append(output | {'generator': row['generator']})
    files.replace_text(Path(out_dir) / 'model_outputs.json', json.dumps(outputs, indent=1))


# ---- pairs of answers ----


def read_answers(path):
    """Return the answers in a samples.jsonl or a model_outputs.json, a dict for each, in the order of the file.

    An answer: {'prompt': text or chat, 'instruction': what the prompt asks, as text, 'response', 'tools': those of the row or
    None, 'generator', 'sample': its number}. Raises UserError for a row of neither file, and if there are no answers."""
    answers = []
    answers_to = Counter()  # (instruction, generator) -> how many answers there are so far
    for row in read_rows(None, 'train', path):
        try:
            prompt, response = _prompt_and_response(row)
            entry = {'prompt': prompt, 'instruction': instruction(prompt), 'response': response}
            entry['tools'] = row.get('tools')
            # a row without these gets a name, and the next number among the answers to its prompt
            entry['generator'] = field({'generator': 'unnamed', **row}, 'generator')
            asked = entry['instruction'], entry['generator']
            entry['sample'] = field({'sample': answers_to[asked], **row}, 'sample', int)
        except ValueError as error:
            raise UserError(f'{row.where}: {error}: this is neither a samples.jsonl nor a model_outputs.json') from None
        answers_to[asked] += 1
        answers.append(entry)
    if not answers:
        raise UserError(f'there are no answers in {path}')
    return answers


def _prompt_and_response(row):
    """Return (prompt, response) of a row of samples.jsonl or model_outputs.json. Raises ValueError if it is of neither."""
    if row.error:
        raise ValueError(row.error)
    if 'instruction' not in row:
        return text_or_chat(row, 'prompt'), field(row, 'response')
    # model_outputs.json keeps a dialogue as it was asked, but of a single question only its words
    prompt = field(row, 'instruction')
    response = field(row, 'output')
    if prompt.startswith('\n\nHuman:') and prompt.endswith(ASSISTANT):
        return prompt, answer(response)
    return ask(prompt), response


def make_pairs(answers_file, against_file=None):
    """Return (list of pairs, Counter of what was left out) from one file of answers, or from two.

    With one file, any two answers to a prompt are a pair, the lower sample number first. With two, the k-th answers to a
    prompt in both files are a pair. A pair: {'prompt': text or chat, 'instruction': what it asks, as text,
    'question': number of the prompt, 'outputs': [first, second], 'generators': [first, second]}. Raises UserError if there
    is no pair."""
    ours = read_answers(answers_file)
    theirs = read_answers(against_file) if against_file else []
    our_groups = _by_question(ours)
    their_groups = _by_question(theirs)
    pairs = []
    for number, (question, group) in enumerate(our_groups.items()):
        # zip leaves out the answers that have no counterpart in the other file
        if against_file:
            two_by_two = zip(group, their_groups.get(question, []), strict=False)
        else:
            two_by_two = combinations(group, 2)
        pairs += [_pair(first, second, number) for first, second in two_by_two]
    if not pairs and against_file:
        raise UserError(f'no prompt of {answers_file} has an answer in {against_file}')
    if not pairs:
        raise UserError(f'no prompt in {answers_file} has two answers: sample with --n=2, or name --against=FILE')

    # counted here, and printed by label.py; with two files, each pair takes one answer of either file
    with_tools = sum(bool(row['tools']) for row in ours + theirs)
    left_out = Counter({'tools, which no judge is shown': with_tools})
    if against_file:
        left_out['answers without a counterpart'] = len(ours) - len(pairs)
        left_out['answers of --against without a counterpart'] = len(theirs) - len(pairs)
    else:
        left_out['answers without a counterpart'] = sum(len(group) == 1 for group in our_groups.values())
    return pairs, left_out


def _by_question(rows):
    """Group answers by the question that they answer: a dict question -> its answers, by sample number.

    A file may ask the same instruction several times. So a question is (instruction, how often it was asked before)."""
    groups = {}
    times_seen = Counter()
    for row in rows:
        # one generator gives a sample number twice only if it was asked twice
        sample = row['instruction'], row['generator'], row['sample']
        question = row['instruction'], times_seen[sample]
        groups.setdefault(question, []).append(row)
        times_seen[sample] += 1
    for group in groups.values():
        group.sort(key=lambda row: row['sample'])
    return groups


def _pair(first, second, number):
    """Return the pair, as in make_pairs, of two answers to question `number`."""
    # model_outputs.json keeps only the instruction: the other file may know the prompt as it really was
    prompt = second['prompt'] if is_plain(first) else first['prompt']
    pair = {'prompt': prompt, 'instruction': first['instruction'], 'question': number}
    pair['outputs'] = [first['response'], second['response']]
    pair['generators'] = [first['generator'], second['generator']]
    return pair


def is_plain(row):
    """Return whether the prompt of an answer, or of a pair, is a single question, whose words are its instruction."""
    return row['prompt'] == ask(row['instruction'])


# ---- what a judge says of them ----


def read_verdicts(path):
    """Return the verdicts in a file: (number of the pair, order) -> row. Raises UserError for a damaged row."""

    def key_of(row):
        """Return the key of a row whose preference and text are sound; raise as read_back says."""
        # None is the preference of an unclear reply, 1.5 a tie; a verdict of a reward model has no text
        is_preference = row['preference'] in (None, 1, 1.5, 2)
        is_text = isinstance(row.get('text', ''), str)
        if not is_preference or not is_text:
            raise ValueError
        return field(row, 'pair', int), field(row, 'order', int)

    return read_back(path, key_of)


def annotation(pair, preference, annotator):
    """Return a pair with its preference and judge as a row of AlpacaEval's annotations.json.

    Our own field 'prompt' is added if the instruction does not say what the prompt was exactly."""
    row = {'instruction': pair['instruction']}
    # AlpacaEval numbers the two answers from 1
    for n, (output, generator) in enumerate(zip(pair['outputs'], pair['generators'], strict=True), start=1):
        row[f'output_{n}'] = output
        row[f'generator_{n}'] = generator
    row['annotator'] = annotator
    row['preference'] = preference
    if not is_plain(pair):
        row['prompt'] = pair['prompt']
    return row
