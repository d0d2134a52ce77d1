"""Write one page of runs and of verdicts: curves, last numbers, options that differ, samples, judged pairs. It opens from disk.

    python -m tools.report out/dpo_toy out/drdpo_toy out/label --out=report.html

Options are given as --name=value; every other word is a folder: of a training script, or of label.py. The page is
report.html beside this file with the data in it. It asks no network for anything.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import json
import math
import sys
from pathlib import Path

from configurator import UserError, configure
from feedback.answers import read_verdicts
from runtime.files import replace_text
from runtime.log import SHOWN
from tools.runs import differing, gold, labels, panels_of, read, read_options, smoothed, value_of

out = 'report.html'  # the page
smooth = 0.04  # training curves: mean over this fraction of a run's steps; 0: every step as it is
max_points = 300  # of a curve; a longer one is thinned
max_samples = 100  # prompts of a run with their answers, the latest first
max_pairs = 300  # judged pairs of a folder
max_letters = 5000  # of a text
config = configure(globals(), [x for x in sys.argv[1:] if x.startswith('-')])
folders = [Path(x) for x in sys.argv[1:] if not x.startswith('-')]


def show_curve(curve):
    """A Curve for the page, with every n-th of its points, counted from the end, so that the last one stays."""
    values = smoothed(curve.values, smooth) if curve.split == 'train' else curve.values
    step = -(-len(values) // max_points) or 1
    points = list(zip(curve.examples, values, strict=True))[::-step][::-1]
    return {'metric': curve.metric, 'run': curve.run, 'split': curve.split, 'place': curve.place, 'points': points}


def last_numbers(run):
    """Numbers of the last evaluation, or where there is none of the last step: short name -> number."""
    splits = [row['split'] for row in run.rows]
    split = 'eval' if 'eval' in splits else 'train'
    row = next(row for row in reversed(run.rows) if row['split'] == split)
    found = {short: value_of(row, split, name) for name, short in SHOWN.items()}
    finite = {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
    return {'examples': row['counters/examples'], 'of': split} | finite


def answer_of(who, text, **more):
    """An answer for the page, its text cut."""
    return {'who': who, 'text': cut(text), 'letters': len(text)} | more


def cut(text):
    """A text for the page, and how much of it was left out."""
    more = len(text) - max_letters
    return text if more <= 0 else f'{text[:max_letters]} … ({more} more characters)'


def sample_cards(number, run):
    """Prompts of run `number` with their answers, the latest evaluation first."""
    cards, beta = {}, run.options.get('beta')
    for row in run.samples:
        card = {'run': number, 'examples': row['examples'], 'prompt': cut(row['prompt']), 'answers': []}
        card = cards.setdefault((row['examples'], row.get('sample'), row['prompt']), card)
        answer = answer_of(row['generator'], row['response'])
        answer |= {name: row[name] for name in ('tokens', 'logratio') if name in row}
        # the reward that is known: gold, of the reward model, or implicit in the log-ratio
        if 'score' in row:
            answer |= {'reward': row['score'], 'of': 'reward model'}
        elif gold(row) is not None:
            answer |= {'reward': gold(row), 'of': 'gold'}
        elif 'logratio' in row and isinstance(beta, int | float):
            answer |= {'reward': beta * row['logratio'], 'of': 'implicit'}
        card['answers'].append(answer)
    return sorted(cards.values(), key=lambda card: -card['examples'])  # in order of prompts otherwise


def show_runs(runs):
    """All that the page shows of runs."""
    cards = [sample_cards(number, run) for number, run in enumerate(runs)]
    charts = []
    for title, meaning, curves in panels_of(runs):
        charts.append({'title': title, 'meaning': meaning, 'curves': list(map(show_curve, curves))})
    # of a script without an option, nothing
    text = [{key: json.dumps(value) for key, value in run.options.items()} for run in runs]
    return {
        'names': labels(runs),
        'charts': charts,
        'numbers': [last_numbers(run) for run in runs],
        'options': [{'name': key, 'values': [options.get(key) for options in text]} for key in differing(runs)],
        'samples': [card for of_run in cards for card in of_run[:max_samples]],
        'samples_left_out': sum(len(of_run[max_samples:]) for of_run in cards),
    }


def show_verdicts(folder):
    """All that the page shows of an out_dir of label.py. Raises UserError."""
    cards = []
    try:
        pairs, report = (json.loads((folder / name).read_text()) for name in ('annotations.json', 'report.json'))
        for pair in pairs:
            answers = [answer_of(pair[f'generator_{n}'], pair[f'output_{n}']) for n in (1, 2)]
            card = {'prompt': cut(pair['instruction']), 'preference': pair['preference'], 'orders': []}
            cards.append(card | {'answers': answers})
    except FileNotFoundError as error:
        raise UserError(f'{folder} has no {Path(error.filename).name} yet: label.py writes it in the end') from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f'annotations.json or report.json of {folder} is damaged') from None
    # what was said of each pair, in one order or both
    for (pair, order), row in sorted(read_verdicts(folder / 'verdicts.jsonl').items()):
        if pair < len(cards):
            said = {'order': order, 'preference': row['preference'], 'text': cut(row.get('text', ''))}
            cards[pair]['orders'].append(said | {'rewards': row.get('rewards')})
    found = {'name': str(folder), 'report': report, 'pairs': cards[:max_pairs]}
    return found | {'left_out': len(cards[max_pairs:])}


def write(data):
    """Put the data into the template, where no text of it can end the script that holds it."""
    template = Path(__file__).with_suffix('.html').read_text('utf-8')
    try:
        text = json.dumps(data, allow_nan=False, ensure_ascii=False).replace('<', '\\u003c')
    except ValueError:
        raise UserError('a sample or a verdict has a number that is infinite or none: its file is damaged') from None
    text = text.encode('utf-8', 'replace').decode()  # half a character, of a broken answer, crashes browsers
    replace_text(out, template.replace('{{data}}', text))
    print(f'{out}: {len(data["names"])} runs, {len(data["verdicts"])} folders of verdicts')


if not folders:
    raise UserError("name the folders to show, a run's --out_dir each: python -m tools.report out/a out/b")
judged = [folder for folder in folders if 'judge_model' in read_options(folder)]
data = show_runs([read(folder) for folder in folders if folder not in judged])
write(data | {'verdicts': [show_verdicts(folder) for folder in judged]})
