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
from tools.runs import curves_of, differing, gold, labels, panels_of, read, read_options, smoothed

out = 'report.html'  # the page
smooth = 0.04  # training curves: mean over this fraction of a run's steps; 0: every step as it is
max_points = 300  # of a curve; a longer one is thinned
max_samples = 100  # prompts of a run with their answers, the latest first
max_pairs = 300  # judged pairs of a folder
max_letters = 5000  # of a text
config = configure(globals(), [x for x in sys.argv[1:] if x.startswith('-')])
folders = [Path(x) for x in sys.argv[1:] if not x.startswith('-')]

# ---- runs ----


def chart(panel, runs):
    """A panel with its curves, for the page."""
    curves = []
    for metric, split, run, curve, place in curves_of(panel, runs):
        values = smoothed(curve.values, smooth) if split == 'train' else curve.values
        # every n-th point from the end, so that the last one stays
        step = -(-len(values) // max_points) or 1
        points = list(zip(curve.examples, values, strict=True))[::-step][::-1]
        curves.append({'metric': metric, 'split': split, 'run': run, 'points': points, 'place': place, 'far': curve.far, 'gaps': curve.gaps})  # fmt: skip
    return {'title': panel[0], 'meaning': panel[1], 'curves': curves}


def last_numbers(run):
    """Numbers of the last evaluation, or where there is none of the last step: short name -> number."""
    splits = [row['split'] for row in run.rows]
    split = 'eval' if 'eval' in splits else 'train'
    row = next(row for row in reversed(run.rows) if row['split'] == split)
    found = {'examples': row['counters/examples'], 'of': split}
    for name, short in SHOWN.items():
        # loss/eval, rewards_eval/margins
        group, _, rest = name.partition('/')
        value = row.get(f'{group}_{split}/{rest}' if rest else f'{group}/{split}')
        if value is not None and math.isfinite(value):
            found[short] = value
    return found


def cut(text):
    """A text for the page, and how much of it was left out."""
    more = len(text) - max_letters
    return text if more <= 0 else f'{text[:max_letters]} … ({more} more characters)'


def sample_rows(number, run):
    """(prompts with their answers, the latest evaluation first; how many were left out). number: of the run."""
    cards, beta = {}, run.options.get('beta')
    for row in run.samples:
        card = {'run': number, 'examples': row['examples'], 'prompt': cut(row['prompt']), 'answers': []}
        card = cards.setdefault((row['examples'], row.get('sample'), row['prompt']), card)
        answer = {'who': row['generator'], 'text': cut(row['response']), 'letters': len(row['response'])}
        answer |= {name: row[name] for name in ('tokens', 'logratio') if name in row}
        # the reward that is known: gold, of the reward model, or implicit in the log-ratio
        if 'score' in row:
            answer |= {'reward': row['score'], 'of': 'reward model'}
        elif gold(row) is not None:
            answer |= {'reward': gold(row), 'of': 'gold'}
        elif 'logratio' in row and isinstance(beta, int | float):
            answer |= {'reward': beta * row['logratio'], 'of': 'implicit'}
        card['answers'].append(answer)
    latest = sorted(cards.values(), key=lambda card: -card['examples'])  # in order of prompts otherwise
    return latest[:max_samples], max(0, len(latest) - max_samples)


def show_runs(runs):
    """All that the page shows of runs."""
    cards, left_out = [], 0
    for number, run in enumerate(runs):
        found, more = sample_rows(number, run)
        cards += found
        left_out += more
    # of a script without an option, nothing
    text = [{key: json.dumps(value) for key, value in run.options.items()} for run in runs]
    differ = [{'name': key, 'values': [options.get(key) for options in text]} for key in differing(runs)]
    numbers = [last_numbers(run) for run in runs]
    shown = {'names': labels(runs), 'charts': [chart(panel, runs) for panel in panels_of(runs)], 'numbers': numbers}
    return shown | {'options': differ, 'samples': cards, 'samples_left_out': left_out}


# ---- verdicts ----


def show_verdicts(folder):
    """All that the page shows of an out_dir of label.py. Raises UserError."""
    try:
        pairs, report = (json.loads((folder / name).read_text()) for name in ('annotations.json', 'report.json'))
        cards = [{'prompt': cut(pair['instruction']), 'preference': pair['preference'], 'orders': [],
                  'answers': [{'who': pair[f'generator_{n}'], 'text': cut(pair[f'output_{n}']),
                               'letters': len(pair[f'output_{n}'])} for n in (1, 2)]} for pair in pairs]  # fmt: skip
    except FileNotFoundError as error:
        raise UserError(f'{folder} has no {Path(error.filename).name} yet: label.py writes it in the end') from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f'annotations.json or report.json of {folder} is damaged') from None
    # what was said of each pair, in one order or both
    for (pair, order), row in sorted(read_verdicts(folder / 'verdicts.jsonl').items()):
        if pair < len(cards):
            said = {'order': order, 'preference': row['preference'], 'text': cut(row.get('text', ''))}
            cards[pair]['orders'].append(said | {'rewards': row.get('rewards')})
    return {
        'name': str(folder),
        'report': report,
        'pairs': cards[:max_pairs],
        'left_out': max(0, len(cards) - max_pairs),
    }


# ---- the page ----


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
