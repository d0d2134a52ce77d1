"""Pairs of answers and what judges said of them: the files that label.py reads and writes."""

import fcntl
import json
import os
from collections import Counter
from itertools import combinations
from pathlib import Path

from configurator import UserError
from text.sources import ASSISTANT, answer, ask, field, instruction, read_rows, text_or_chat


def read_answers(path):
    """Rows {'prompt', 'instruction', 'response', 'generator', 'sample'} of a samples.jsonl or a model_outputs.json."""
    rows, numbers = [], Counter()
    for row in read_rows(None, 'train', path):
        try:
            if row.error:
                raise ValueError(row.error)
            if 'instruction' in row:
                text, response = field(row, 'instruction'), field(row, 'output')
                whole = text.startswith('\n\nHuman:') and text.endswith(
                    ASSISTANT
                )  # a dialogue: see sources.instruction
                prompt, response = (text, answer(response)) if whole else (ask(text), response)
            else:
                prompt, response = text_or_chat(row, 'prompt'), field(row, 'response')
            shown, generator = instruction(prompt), field({'generator': 'unnamed', **row}, 'generator')
            sample = field({'sample': numbers[shown, generator], **row}, 'sample', int)
        except ValueError as error:
            raise UserError(f'{row.where}: {error}: this is neither a samples.jsonl nor a model_outputs.json') from None
        numbers[shown, generator] += 1
        rows.append(
            {'prompt': prompt, 'instruction': shown, 'response': response, 'generator': generator, 'sample': sample}
        )
    if not rows:
        raise UserError(f'there are no answers in {path}')
    return rows


def make_pairs(answers, against=None):
    """(list of pairs, Counter of answers left out) from one file, or two.

    A pair: {'prompt': text or chat, 'instruction': what it asks, 'outputs': [first, second], 'generators': likewise,
    'question': number of the prompt}. One file: any two answers to a prompt, the lower sample number first. Two: the k-th
    answers to a prompt in both. Raises UserError where there is no pair."""
    first = _by_question(read_answers(answers))
    second = _by_question(read_answers(against)) if against else {}
    pairs, left_out = [], Counter()
    for number, (key, group) in enumerate(first.items()):
        others = second.pop(key, [])
        found = list(zip(group, others, strict=False) if against else combinations(group, 2))
        paired = min(len(group), len(others)) if against else len(group) * bool(found)
        left_out['answers without a counterpart'] += len(group) - paired
        left_out['answers of --against without a counterpart'] += max(0, len(others) - len(group))
        for a, b in found:
            plain = a['prompt'] == ask(a['instruction'])  # model_outputs.json has lost what the prompt really was
            pairs.append({'prompt': (b if plain else a)['prompt'], 'instruction': a['instruction'], 'question': number,
                          'outputs': [a['response'], b['response']], 'generators': [a['generator'], b['generator']]})  # fmt: skip
    left_out['answers of --against without a counterpart'] += sum(map(len, second.values()))
    if not pairs and against:
        raise UserError(f'no prompt of {answers} has an answer in {against}')
    if not pairs:
        raise UserError(f'no prompt in {answers} has two answers: sample with --n=2, or name --against=FILE')
    return pairs, left_out


def _by_question(rows):
    """(instruction, how often it was there before) -> its answers by sample number: a file may ask the same twice."""
    groups, seen = {}, Counter()
    for row in rows:
        who = row['instruction'], row['generator'], row['sample']
        groups.setdefault((row['instruction'], seen[who]), []).append(row)
        seen[who] += 1
    return {key: sorted(group, key=lambda row: row['sample']) for key, group in groups.items()}


def open_verdicts(out_dir):
    """(file to append to, its verdicts so far: (pair, order) -> row). A last line that a kill cut off is removed.

    Raises UserError where another process writes to it, or where a line is damaged."""
    path = Path(out_dir) / 'verdicts.jsonl'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, 'a+b')
    except OSError as error:
        raise UserError(f'cannot write to {path}: {error.strerror}') from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'another process is writing to {path}: wait for it, or choose another --out_dir') from None
    file.seek(0)
    *lines, rest = file.read().split(b'\n')  # rest: what has no end of line
    done = {}
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
            if row['preference'] not in (None, 1, 1.5, 2) or not isinstance(row.get('text', ''), str):
                raise ValueError(row)
            done[row['pair'], row['order']] = row
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f'{path}, line {i + 1}, is damaged: delete that line, and it will be judged again'
            ) from None
    if rest:
        print('note: the last verdict was not written to its end, and is taken again')
        file.truncate(sum(len(line) + 1 for line in lines))
    return file, done


def append(file, row, sync=True):
    """Add a verdict to the file of open_verdicts, safe from kill -9 when this returns; if sync, from a power cut, too."""
    try:
        file.write(json.dumps(row).encode() + b'\n')
        file.flush()
        if sync:
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f'cannot write to {file.name} ({error.strerror}): make room and run the same command again'
        ) from None


def annotation(pair, preference, annotator):
    """A row of AlpacaEval's annotations.json. 'prompt' is added where the instruction does not say what it was exactly."""
    row = {'instruction': pair['instruction']}
    for n in (1, 2):
        row |= {f'output_{n}': pair['outputs'][n - 1], f'generator_{n}': pair['generators'][n - 1]}
    row |= {'annotator': annotator, 'preference': preference}
    return row if pair['prompt'] == ask(pair['instruction']) else row | {'prompt': pair['prompt']}


def write_json(path, content):
    """Write it whole or not at all."""
    temporary = Path(path).with_suffix('.tmp')
    try:
        temporary.write_text(json.dumps(content, indent=1), encoding='utf-8')
        temporary.replace(path)
    except OSError as error:
        raise UserError(f'cannot write {path} ({error.strerror}): what was there before is as it was') from None
