"""Read and write files of sampled answers and of verdicts, and form the pairs of answers that label.py judges.

sample.py writes samples.jsonl (a row per answer) and model_outputs.json (AlpacaEval's format), label.py verdicts.jsonl (a row
per verdict). .jsonl files are append-only, so a killed run resumes where it stopped. Rank r > 0 appends to samples-r.jsonl."""

import json
import os
from collections import Counter, defaultdict
from itertools import combinations
from math import comb
from pathlib import Path

from configurator import UserError
from runtime import files
from text.examples import counted
from text.messages import ASSISTANT, answer, ask, field, instruction, text_or_chat
from text.sources import read_rows


def append(path, rows, sync=True):
    """Append rows (dicts) to a .jsonl file. sync: make them survive a power failure, not only a kill. Raises UserError."""
    # default=str: write values that are not JSON types as their str()
    lines = [json.dumps(row, default=str) + '\n' for row in rows]
    with files.writing(path), open(path, 'a', encoding='utf-8') as file:
        file.write(''.join(lines))
        # flush hands the rows to the operating system, fsync writes them to disk
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_back(path, key_of):
    """Return {key_of(row): row} for the rows of a .jsonl file, or {} if there is no file. The first row with a key wins.

    key_of may refuse a row by an error. Raises UserError with the number of a damaged line."""
    rows = {}
    advice = 'delete that line; the command makes it anew'
    for key, row in files.read_lines(path, lambda row: (key_of(row), row), advice):
        rows.setdefault(key, row)
    return rows


def raise_if_missing(failed, what):
    """Raise UserError if any request failed. failed: Counter of error messages; what: a plural noun, such as 'answers'."""
    if failed:
        [(reason, times)] = failed.most_common(1)
        missing = f'{counted(failed.total(), what)} missing ({counted(times, "times")}: {reason})'
        raise UserError(f'{missing}: run the same command to ask again')


def collect(out_dir, wanted):
    """Merge samples.jsonl and other ranks' samples-NUMBER.jsonl into the first, sorted. Return {(prompt index, sample): row}.

    wanted(index, sample): the fields that this row must have, or None if the run has no such answer. Raises UserError for other rows."""

    def key_of(row):
        key = field(row, 'index', int), field(row, 'sample', int)
        # these raise if the row has no such text
        field(row, 'response')
        field(row, 'finish', str | None)
        expected = wanted(*key)
        if expected is None or not expected.items() <= row.items():
            raise UserError('answers a prompt that is not in the data any more: choose another --out_dir')
        return key

    merged = Path(out_dir) / 'samples.jsonl'
    rank_files = sorted(path for path in Path(out_dir).glob('samples-*.jsonl') if path.stem[8:].isdecimal())
    rows = {}
    for path in (merged, *rank_files):
        # if two files have the same answer, the first file's stays: the right operand of | wins
        rows = read_back(path, key_of) | rows
    rows = dict(sorted(rows.items()))
    # without answers, no file is made: out_dir stays free for a corrected command
    if rows or merged.exists():
        files.replace_text(merged, ''.join(json.dumps(row) + '\n' for row in rows.values()))
    # safe to delete only after the merged file is on disk
    for path in rank_files:
        path.unlink()
    return rows


def write_model_outputs(out_dir, rows):
    """Write AlpacaEval's model_outputs.json: the first answer to each prompt, stripped. rows: {(prompt index, sample): row}."""
    outputs = []
    for row in rows.values():
        if row['sample'] == 0:
            output = {'instruction': instruction(row['prompt']), 'output': row['response'].strip()}
            outputs.append(output | {'generator': row['generator']})
    files.replace_text(Path(out_dir) / 'model_outputs.json', json.dumps(outputs, indent=1))


def read_answers(path, left_out):
    """Return the answers in a samples.jsonl or model_outputs.json, or in a folder's samples.jsonl, as a list of dicts in file order.

    Keys: prompt (text or chat), instruction (the prompt as plain text), response, tools (or None), model (its name), generator (the
    name, with the temperature where the file has several) and sample (number of the answer to its prompt). left_out: Counter,
    updated. Raises UserError for a row of another format, and if there are no answers."""
    file = f'{path}/samples.jsonl' if os.path.isdir(path) else path
    rows = list(read_rows(None, 'train', file))
    # a training run samples at each evaluation, after so many `examples`: the newest one counts
    evaluations = [row['examples'] for row in rows if isinstance(row.get('examples'), int)]
    newest = max(evaluations, default=None)
    has_temperatures = len({str(row.get('temperature')) for row in rows}) > 1
    answers = []
    num_answers = Counter()  # (prompt, generator) -> answers so far
    for row in rows:
        try:
            if row.error:
                raise ValueError(row.error)
            if 'instruction' in row:
                prompt, response = _from_model_outputs(row)
            else:
                prompt = text_or_chat(row, 'prompt')
                response = field(row, 'response')
            # rows without these two fields get a fixed name and the next number
            model = field({'generator': 'unnamed', **row}, 'generator')
            is_named = has_temperatures and row.get('temperature') is not None
            generator = f'{model} at {row["temperature"]}' if is_named else model
            key = str(prompt), generator
            sample = field({'sample': num_answers[key], **row}, 'sample', int)
        except ValueError as error:
            raise UserError(f'{row.where}: {error}: this is neither a samples.jsonl nor a model_outputs.json') from None
        if isinstance(row.get('examples'), int) and row['examples'] < newest:
            left_out['answers of earlier evaluations'] += 1
            continue
        num_answers[key] += 1
        entry = {'prompt': prompt, 'instruction': instruction(prompt), 'response': response, 'tools': row.get('tools')}
        answers.append(entry | {'model': model, 'generator': generator, 'sample': sample})
    if not answers:
        raise UserError(f'there are no answers in {path}')
    return answers


def _from_model_outputs(row):
    """Return (prompt, answer) of a row of model_outputs.json, as texts in Anthropic's format. Raises ValueError."""
    prompt = field(row, 'instruction')
    response = field(row, 'output')
    # as in text/formats.py, what an instruction is about may stand beside it
    if row.get('input'):
        prompt += '\n\n' + field(row, 'input')
    # a dialogue is written with its role markers, a single question without
    if prompt.startswith('\n\nHuman:') and prompt.endswith(ASSISTANT):
        # answer() adds the space after the last marker; behind a single question label.py adds it
        return prompt, answer(response)
    return ask(prompt), response


def make_pairs(answers_file, against_file=None):
    """Return (pairs, Counter of what is left out) of one file of answers (any two to a prompt, lower sample number first; if the file
    has several models, of two of them, in their order there), or of two files (the k-th answers to a prompt in each, of its first model).

    A pair is a dict: prompt (text or chat), instruction (the prompt as plain text), question (number of the prompt), outputs (two
    texts), generators (two names), perhaps tools. Raises UserError without pairs."""
    left_out = Counter()
    ours = read_answers(answers_file, left_out)
    theirs = read_answers(against_file, left_out) if against_file else []
    if against_file:
        ours, theirs = [_of_first_model(file, left_out) for file in (ours, theirs)]
    our_groups, their_groups = _by_question(ours, theirs)
    has_models = len({answer['model'] for answer in ours}) > 1
    pairs = []
    # a prompt that was asked twice has pairs of its own each time, but one number, since they are one cluster to an interval
    numbers = {}
    for question, group in our_groups.items():
        number = numbers.setdefault(group[0]['instruction'], len(numbers))
        # zip skips answers that have no counterpart
        matches = zip(group, their_groups.get(question, []), strict=False) if against_file else combinations(group, 2)
        if has_models:
            matches = [(first, second) for first, second in matches if first['model'] != second['model']]
        pairs += [_as_pair(*match, number) for match in matches]
    if not pairs and against_file:
        raise UserError(f'no prompt of {answers_file} has an answer in {against_file}')
    if not pairs:
        found = 'has two answers' + (' of its last evaluation' if left_out else '')
        raise UserError(f'no prompt in {answers_file} {found}: sample with --n=2, or name --against=FILE')
    if against_file:
        # each pair uses one answer of each file
        left_out['answers without a counterpart'] = len(ours) - len(pairs)
        left_out['answers of --against without a counterpart'] = len(theirs) - len(pairs)
    else:
        left_out['answers without a counterpart'] = sum(len(group) == 1 for group in our_groups.values())
        any_two = sum(comb(len(group), 2) for group in our_groups.values())
        left_out['pairs of answers of one model'] = any_two - len(pairs)
    return pairs, left_out


def _of_first_model(answers, left_out):
    """Return the answers (dicts of read_answers) of the model that the file names first. left_out: Counter, updated."""
    of_first = [row for row in answers if row['model'] == answers[0]['model']]
    left_out["answers of other models than a file's first"] += len(answers) - len(of_first)
    return of_first


def _as_pair(first, second, number):
    """Return the pair of two answers to the prompt of this number, as make_pairs describes it."""
    # model_outputs.json keeps the instruction only; the other file may have the original prompt, such as a chat
    asked = second if is_plain(first) else first
    pair = {'prompt': asked['prompt'], 'instruction': first['instruction'], 'question': number}
    if asked['tools']:
        pair['tools'] = asked['tools']
    pair['outputs'] = [first['response'], second['response']]
    pair['generators'] = [first['generator'], second['generator']]
    return pair


def _by_question(*files):
    """Group the answers of each file (dicts of read_answers) as {question: answers sorted by generator, as in the file, and sample}.

    A question is (instruction, its prompt if one generator of a file has several prompts of this instruction, which differ in their
    system messages, say, time). A file may ask it more than once; time: 0 for the answers to the first time, 1 to the second."""
    prompts = defaultdict(set)  # (file, instruction, generator) -> prompts
    for file, answers in enumerate(files):
        for row in answers:
            prompts[file, row['instruction'], row['generator']].add(str(row['prompt']))
    of_several = {text for (_, text, _), found in prompts.items() if len(found) > 1}
    for answers in files:
        groups = {}
        generators = list(dict.fromkeys(row['generator'] for row in answers))
        times_seen = Counter()  # (instruction, prompt or '', generator, sample) -> how often
        for row in answers:
            prompt = str(row['prompt']) if row['instruction'] in of_several else ''
            # samples 0, 1, 0, 1 of one generator: the second 0 and 1 answer the second time
            key = row['instruction'], prompt, row['generator'], row['sample']
            groups.setdefault((row['instruction'], prompt, times_seen[key]), []).append(row)
            times_seen[key] += 1
        for group in groups.values():
            group.sort(key=lambda row: (generators.index(row['generator']), row['sample']))
        yield groups


def is_plain(row):
    """Return whether the prompt of an answer or a pair is a single question that its instruction reproduces exactly."""
    return row['prompt'] == ask(row['instruction'])


def read_verdicts(path, keys):
    """Return the verdicts in a verdicts.jsonl as {(pair number, order): row}. Raises UserError for a damaged row.

    keys: all that there can be."""
    keys = set(keys)
    # only a judge's verdicts have a text, and only others rewards and cuts, for each of the two answers
    kinds = {'pair': int, 'order': int, 'text': str | None, 'rewards': list | None, 'cut': list | None}

    def key_of(row):
        key = files.checked(row, kinds)['pair'], row['order']
        if key not in keys:
            raise UserError(f'judges pair {key[0]} in order {key[1]}, which is not to be judged: delete that line')
        # 1.5 is a tie, None an unclear reply
        if row['preference'] not in (None, 1, 1.5, 2):
            raise ValueError(f"'preference' is {row['preference']!r:.60}")
        first, second = row.get('rewards') or (0, 0)
        files.checked({'rewards': first, 'and': second}, dict.fromkeys(('rewards', 'and'), int | float))
        first, second = row.get('cut') or ({}, {})
        for counts in (first, second):
            files.checked(counts, dict.fromkeys(counts, int))
        return key

    return read_back(path, key_of)
