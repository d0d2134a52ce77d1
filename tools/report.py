"""Write a self-contained HTML report on runs: curves, last metrics, options that differ, samples, and judged pairs.

    python -m tools.report out/dpo_toy out/drdpo_toy out/label --out=report.html

Arguments without dashes are folders of training runs or of label.py. The page is report.html beside this file, with the data
inserted as JSON. It loads nothing from the network."""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import itertools
import json
import math
from functools import partial
from pathlib import Path

from configurator import UserError, configure
from feedback.answers import read_verdicts
from runtime.files import checked, read_json, replace_text, say
from runtime.log import SHOWN
from text.examples import counted
from tools.runs import arguments, differing, gold, labels, panels_of, read, read_options, smoothed, value_of

# the page, and what is drawn
out = 'report.html'  # the page
smooth = 0.04  # moving average of training curves, as a fraction of the run's steps; 0: none
max_points = 300  # of a curve; longer ones are thinned out
# what is shown at most
max_samples = 100  # sampled prompts of a run, newest first
max_pairs = 300  # judged pairs of a folder
max_letters = 5000  # longer texts are cut
flags, folders = arguments()
config = configure(globals(), flags)

# fields of annotations.json and of report.json, with their types
NUMBER = int | float | None
PAIR = dict.fromkeys('instruction output_1 output_2 generator_1 generator_2'.split(), str) | {'preference': NUMBER}
REPORT = dict.fromkeys('first second judge'.split(), str)
REPORT |= dict.fromkeys('pairs won lost ties unclear_replies failed'.split(), int)
for rate in 'win_rate length_controlled shown_first agreement'.split():
    REPORT |= {rate: NUMBER, f'{rate}_se': NUMBER, f'{rate}_interval': list | None}
ANEW = 'the same command of label.py writes it in its end'


def cut(text):
    """Return a text cut to the option max_letters, with a note of how much is missing."""
    missing = len(text) - max_letters
    return f'{text[:max_letters]} … ({missing} more characters)' if missing > 0 else text


def answer_of(who, text):
    """Return an answer as a dict for the page: who gave it, its text, cut, and its length before the cut."""
    return {'who': who, 'text': cut(text), 'letters': len(text)}


def cards_of(pairs):
    """Return the cards of judged pairs, rows of annotations.json, still without their verdicts. Raises ValueError."""
    cards = []
    for pair in pairs:
        checked(pair, PAIR)
        answers = [answer_of(pair[f'generator_{n}'], pair[f'output_{n}']) for n in (1, 2)]
        card = {'prompt': cut(pair['instruction']), 'preference': pair['preference'], 'orders': []}
        cards.append(card | {'answers': answers})
    return cards


if not folders:
    raise UserError("name the folders to show, a run's --out_dir each: python -m tools.report out/a out/b")
# a page in the place of a run's report.json or metrics.jsonl would be a loss
if Path(out).suffix.lower() not in ('.html', '.htm'):
    raise UserError(f'--out={out}: the page is an .html file')
# only label.py has the option judge_model
label_folders = [folder for folder in folders if 'judge_model' in read_options(folder)]
runs = [read(folder) for folder in folders if folder not in label_folders]

# curves, those of training smoothed, thinned out to at most max_points points: every n-th, counting from the last one
charts = []
for title, subtitle, drawn in panels_of(runs):
    curves = []
    for curve in drawn:
        points = smoothed(curve.points, smooth) if curve.split == 'train' else curve.points
        n = max(1, math.ceil(len(points) / max_points))
        shown = {'metric': curve.metric, 'run': curve.run, 'split': curve.split, 'extra': curve.extra}
        curves.append(shown | {'points': points[::-n][::-1]})
    charts.append({'title': title, 'meaning': subtitle, 'curves': curves})

# the metrics of each run's last evaluation, or of its last training step, by their short names
numbers = []
for run in runs:
    split = 'eval' if any(row['split'] == 'eval' for row in run.rows) else 'train'
    last = [row for row in run.rows if row['split'] == split][-1]
    shown = {'examples': last['counters/examples'], 'split': split}
    for metric, short_name in SHOWN.items():
        value = value_of(last, split, metric)
        if value is not None and math.isfinite(value):
            shown[short_name] = value
    numbers.append(shown)

# options that differ, as JSON: None if a script has no such option; the value None becomes 'null'
options = []
for name in differing(runs):
    values = [json.dumps(run.options[name]) if name in run.options else None for run in runs]
    options.append({'name': name, 'values': values})

# a card for each prompt sampled during a run, with the answers of policy and reference
samples = []
num_skipped = 0
for number, run in enumerate(runs):
    cards = {}
    beta = run.options.get('beta')
    for row in run.samples:
        # policy and reference share a card; examples: training examples before the evaluation
        key = row['examples'], row.get('sample'), row['prompt']
        if key not in cards:
            cards[key] = {'run': number, 'examples': row['examples'], 'prompt': cut(row['prompt']), 'answers': []}
        answer = answer_of(row['generator'], row['response'])
        answer |= {name: row[name] for name in ('tokens', 'logratio') if name in row}
        gold_reward = gold(row)
        # prefer the score of a reward model, then the toy world's gold reward, then what it is in DPO: losses that divide by
        # the length or add a divergence have other implicit rewards, and those without a reference no logratio
        if 'score' in row:
            answer |= {'reward': row['score'], 'reward_source': 'score'}
        elif gold_reward is not None:
            answer |= {'reward': gold_reward, 'reward_source': 'gold'}
        elif 'logratio' in row and isinstance(beta, int | float):
            answer |= {'reward': beta * row['logratio'], 'reward_source': 'beta * log-ratio'}
        cards[key]['answers'].append(answer)
    # newest evaluations first; the sort is stable: prompts of an evaluation keep their order
    newest_first = sorted(cards.values(), key=lambda card: -card['examples'])
    samples += newest_first[:max_samples]
    num_skipped += len(newest_first[max_samples:])

# of each folder of label.py: its report, and max_pairs pairs with their verdicts
verdicts = []
for folder in label_folders:
    cards = read_json(folder / 'annotations.json', cards_of, ANEW)
    report = read_json(folder / 'report.json', partial(checked, kinds=REPORT), ANEW)
    # text: reply of an endpoint; rewards: of both answers, from a reward model
    keys = itertools.product(range(len(cards)), (1, 2))
    for (pair, order), row in sorted(read_verdicts(folder / 'verdicts.jsonl', keys).items()):
        verdict = {'order': order, 'preference': row['preference'], 'text': cut(row.get('text') or '')}
        cards[pair]['orders'].append(verdict | {'rewards': row.get('rewards')})
    shown = {'name': str(folder), 'report': report, 'pairs': cards[:max_pairs]}
    verdicts.append(shown | {'left_out': len(cards[max_pairs:])})

# the page
names = labels(runs)
data = {'names': names, 'charts': charts, 'numbers': numbers, 'options': options}
# the names without options; a folder's own name may have a colon
data['folders'] = [name.split(': ')[0] for name in names]
data |= {'samples': samples, 'samples_left_out': num_skipped, 'verdicts': verdicts}
try:
    text = json.dumps(data, allow_nan=False, ensure_ascii=False)
except ValueError:
    raise UserError('a sample or a verdict has a number that is infinite or none: its file is damaged') from None
# escape <, so that no </script> in a text ends the script element with the data
text = text.replace('<', '\\u003c')
# replace lone surrogates by question marks, since they crash browsers
text = text.encode('utf-8', 'replace').decode()
template = Path(__file__).with_suffix('.html').read_text('utf-8')
replace_text(out, template.replace('{{data}}', text))
say(f'{out}: {counted(len(runs), "runs")}, {counted(len(label_folders), "folders of verdicts")}')
