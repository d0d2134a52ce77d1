"""Write one page of runs and of verdicts: curves, last numbers, options that differ, samples, judged pairs. It opens from disk.

    python -m tools.report out/dpo_toy out/drdpo_toy out/label --out=report.html

Options are given as --name=value; every other word is a folder: of a training script, or of label.py. The page is
report.html beside this file with the data in it, as one object of json. It asks no network for anything.
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
config = configure(globals(), [word for word in sys.argv[1:] if word.startswith('-')])
folders = [Path(word) for word in sys.argv[1:] if not word.startswith('-')]


def show_curve(curve):
    """Return a Curve as a dict for the page, with at most max_points of its points."""
    values = smoothed(curve.values, smooth) if curve.split == 'train' else curve.values
    points = list(zip(curve.examples, values, strict=True))
    # every n-th point, counted from the last one, so that it stays
    n = max(1, math.ceil(len(points) / max_points))
    from_last = points[::-n]
    shown = {'metric': curve.metric, 'run': curve.run, 'split': curve.split, 'place': curve.place}
    return shown | {'points': from_last[::-1]}


def last_numbers(run):
    """Return the numbers of a run's last evaluation, or of its last step if it has none: short name -> number.

    Two more fields say what they are of: 'examples' trained on so far, and 'of', which is 'eval' or 'train'."""
    # read() has seen to it that there is a row of one of the two
    splits = [row['split'] for row in run.rows]
    split = 'eval' if 'eval' in splits else 'train'
    last = [row for row in run.rows if row['split'] == split][-1]
    numbers = {'examples': last['counters/examples'], 'of': split}
    for metric, short_name in SHOWN.items():
        value = value_of(last, split, metric)
        if value is not None and math.isfinite(value):
            numbers[short_name] = value
    return numbers


def answer_of(who, text):
    """Return an answer for the page: who gave it, its text, cut, and how many letters it has uncut."""
    return {'who': who, 'text': cut(text), 'letters': len(text)}


def cut(text):
    """Return a text cut to max_letters; a text that is longer then says how much is missing."""
    missing = len(text) - max_letters
    if missing <= 0:
        return text
    return f'{text[:max_letters]} … ({missing} more characters)'


def sample_cards(number, run):
    """Return a card for each prompt that was sampled at an evaluation of a run, with all its answers, the latest first.

    number: the place of the run among all runs."""
    cards = {}
    beta = run.options.get('beta')
    for row in run.samples:
        # the answers of policy and reference to one prompt are on one card
        key = row['examples'], row.get('sample'), row['prompt']
        if key not in cards:
            cards[key] = {'run': number, 'examples': row['examples'], 'prompt': cut(row['prompt']), 'answers': []}
        answer = answer_of(row['generator'], row['response'])
        for name in ('tokens', 'logratio'):
            if name in row:
                answer[name] = row[name]
        # the best reward that is known: of the reward model, else gold, else the one that DPO means
        if 'score' in row:
            answer |= {'reward': row['score'], 'of': 'reward model'}
        elif gold(row) is not None:
            answer |= {'reward': gold(row), 'of': 'gold'}
        elif 'logratio' in row and isinstance(beta, int | float):
            answer |= {'reward': beta * row['logratio'], 'of': 'implicit'}
        cards[key]['answers'].append(answer)
    # sorted() keeps the order of the prompts of one evaluation
    return sorted(cards.values(), key=lambda card: -card['examples'])


def show_runs(runs):
    """Return the page's data on the runs: their names, charts, last numbers, differing options and samples."""
    # a chart for each panel
    charts = []
    for panel in panels_of(runs):
        curves = [show_curve(curve) for curve in panel.curves]
        charts.append({'title': panel.title, 'meaning': panel.meaning, 'curves': curves})
    # a row of the table of options for each one in which the runs differ
    options = []
    for name in differing(runs):
        # a script without the option has None, while an option that is None is written null
        values = [json.dumps(run.options[name]) if name in run.options else None for run in runs]
        options.append({'name': name, 'values': values})
    # of each run the first max_samples cards
    samples = []
    left_out = 0
    for number, run in enumerate(runs):
        cards = sample_cards(number, run)
        samples += cards[:max_samples]
        left_out += len(cards[max_samples:])
    return {
        'names': labels(runs),
        'charts': charts,
        'numbers': [last_numbers(run) for run in runs],
        'options': options,
        'samples': samples,
        'samples_left_out': left_out,
    }


def show_verdicts(folder):
    """Return the page's data on an out_dir of label.py: its report, and its first max_pairs pairs with what the judge said.

    Raises UserError if label.py has not ended there yet, or if a file is damaged."""
    # a card for each pair; what the judge said of it comes below
    cards = []
    try:
        pairs = json.loads((folder / 'annotations.json').read_text())
        report = json.loads((folder / 'report.json').read_text())
        for pair in pairs:
            answers = [answer_of(pair[f'generator_{n}'], pair[f'output_{n}']) for n in (1, 2)]
            card = {'prompt': cut(pair['instruction']), 'preference': pair['preference'], 'orders': []}
            cards.append(card | {'answers': answers})
    except FileNotFoundError as error:
        raise UserError(f'{folder} has no {Path(error.filename).name} yet: label.py writes it in the end') from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f'annotations.json or report.json of {folder} is damaged') from None
    # an endpoint says a text, in one order or in both, and a reward model two rewards
    verdicts = read_verdicts(folder / 'verdicts.jsonl')
    for (pair, order), row in sorted(verdicts.items()):
        # a pair that annotations.json does not have is not shown
        if pair < len(cards):
            said = {'order': order, 'preference': row['preference'], 'text': cut(row.get('text', ''))}
            said['rewards'] = row.get('rewards')
            cards[pair]['orders'].append(said)
    left_out = len(cards[max_pairs:])
    return {'name': str(folder), 'report': report, 'pairs': cards[:max_pairs], 'left_out': left_out}


def write(data):
    """Write the page, which is the template with the data in it, to --out, and print how much it shows.

    Raises UserError for data with a number that json does not know, and if the page cannot be written."""
    template = Path(__file__).with_suffix('.html').read_text('utf-8')
    try:
        text = json.dumps(data, allow_nan=False, ensure_ascii=False)
    except ValueError:
        raise UserError('a sample or a verdict has a number that is infinite or none: its file is damaged') from None
    # no </script> in an answer may end the script that holds the data
    text = text.replace('<', '\\u003c')
    # half a surrogate pair, which a broken answer may have, crashes browsers: it becomes a question mark
    text = text.encode('utf-8', 'replace').decode()
    replace_text(out, template.replace('{{data}}', text))
    print(f'{out}: {len(data["names"])} runs, {len(data["verdicts"])} folders of verdicts')


if not folders:
    raise UserError("name the folders to show, a run's --out_dir each: python -m tools.report out/a out/b")
# of all scripts, label.py alone has this option
of_label = [folder for folder in folders if 'judge_model' in read_options(folder)]
runs = [read(folder) for folder in folders if folder not in of_label]
data = show_runs(runs)
data['verdicts'] = [show_verdicts(folder) for folder in of_label]
write(data)
