"""What the folders of runs hold, read for plot.py and report.py: options, metrics, samples; curves and where they differ."""

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from runtime.log import NEUTRAL
from runtime.values import looked_in
from text import toy

DRAWN = ('loss', 'rewards', 'logps', 'kl', 'gold', 'score')  # groups of metrics
# options that say most of a run; a name begins with those of them that differ
FIRST = 'loss beta beta_prime label_smoothing lr batch_size n_epochs n_examples noise_rate seed model data'.split()

# title, meaning, metrics as group/name; of two metrics the second is drawn dashed
SAMPLED_KL = ('KL', 'KL(policy || reference) on its own samples, nats an answer', ['kl/samples'])
# in its place, where no run has sampled
CHOSEN_KL = (
    'KL, as if chosen answers came from the reference',
    'mean of log reference - log policy, nats an answer',
    ['kl/chosen'],
)
# log-probs of chosen and rejected answers lie far apart, so each has an axis of its own
PANELS = [
    ('loss', 'thin: training steps, smoothed; points: held-out examples', ['loss']),
    ('reward accuracy', 'share of pairs with the higher reward on the chosen answer', ['rewards/accuracies']),
    ('reward margin', 'chosen minus rejected implicit reward', ['rewards/margins']),
    ('rewards', 'chosen (solid, filled) and rejected (dashed, open)', ['rewards/chosen', 'rewards/rejected']),
    ('log-probs of chosen answers', 'nats an answer, of held-out ones if there are two evaluations', ['logps/chosen']),
    ('log-probs of rejected answers', 'likewise', ['logps/rejected']),
    ('reward of samples', 'mean of sampled answers, of the reward model or gold', ['score']),
    SAMPLED_KL,
]


class Run(NamedTuple):
    """What a run's folder holds: options by name, rows of metrics.jsonl, rows of samples.jsonl."""

    options: dict
    rows: list
    samples: list
    folder: Path


class Curve(NamedTuple):
    """A metric in one split: examples seen, values there; (examples, value) of those too far off; how many are no numbers."""

    examples: list
    values: list
    far: list
    gaps: int


# ---- reading ----


def read(folder):
    """The Run of a folder. Raises UserError."""
    options = read_options(folder)
    rows = lines(folder / 'metrics.jsonl', {'split': str, 'counters/examples': int})
    if not any(row['split'] in ('train', 'eval') for row in rows):
        raise UserError(f'{folder} has no steps in its metrics.jsonl yet')
    kinds = {'examples': int, 'generator': str, 'prompt': str, 'response': str}
    return Run(options, rows, lines(folder / 'samples.jsonl', kinds), folder)


def read_options(folder):
    """The options of a run by name. Raises UserError where a folder has none."""
    if not folder.is_dir():
        raise UserError(f'there is no folder {folder}{looked_in(folder)}')
    try:
        return dict(json.loads((folder / 'config.json').read_text())['config'])
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json, so it is no run's out_dir") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{folder}/config.json is damaged') from None


def lines(file, kinds):
    """The rows of a .jsonl, none where it does not exist; the last one may be half written.

    kinds: what each row has, and of which type. Raises UserError for other rows, and for a metric that is no number."""
    try:
        texts = file.read_text().splitlines() if file.exists() else []
    except (OSError, UnicodeDecodeError):
        raise UserError(f'{file} is damaged') from None
    rows = []
    for number, text in enumerate(texts, 1):
        try:
            row = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            if number < len(texts):
                raise UserError(f'{file}, line {number} is damaged') from None
            print(f'note: the last line of {file} is not complete')
            continue
        wrong = [name for name, kind in kinds.items() if not isinstance(row.get(name), kind)]
        if 'split' in kinds:
            wrong += [name for name, value in row.items() if is_drawn(name) and not is_number(value)]
        if wrong:
            raise UserError(f'{file} has a row without a proper {wrong[0]}: it is damaged, or of something else')
        rows.append(row)
    return rows


def is_drawn(metric):
    """Whether a metric, such as loss/train or rewards_train/margins, may be in a panel."""
    group = metric.replace('_', '/').partition('/')[0]
    return group in DRAWN


def is_number(value):
    """Whether a value can be drawn; nan, of a run that went wrong, is no point. matplotlib fails on larger numbers."""
    return isinstance(value, int | float) and not abs(value) > 1e300


# ---- names ----


def differing(runs):
    """The names of the options in which runs differ, those that say most of them first. A script may lack an option."""
    values = {}  # name -> all values
    for run in runs:
        for key in run.options.keys() - NEUTRAL - {'out_dir'}:
            values.setdefault(key, set()).add(json.dumps(run.options[key]))
    order = dict.fromkeys(key for run in runs for key in run.options)
    differ = [key for key in order if len(values.get(key, ())) > 1]
    return sorted(differ, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))


def labels(runs):
    """A name for each run: its folder, and up to five of the options in which the runs differ."""
    differ, names = differing(runs), []
    folders = [run.folder.name for run in runs]
    for run in runs:
        told = [f'{key}={run.options[key]}' for key in differ if run.options.get(key) is not None]
        if len(told) > 5:
            told = [*told[:5], '...']
        name = run.folder.name if folders.count(run.folder.name) == 1 else str(run.folder)
        names.append(f'{name}: {", ".join(told)}' if told else name)
    return names


# ---- curves ----


def curve(rows, split, metric):
    """The Curve of a metric, written as group/name, in the rows of a split."""
    # its name in a row: loss/train, rewards_train/margins
    group, slash, name = metric.partition('/')
    key = f'{group}_{split}/{name}' if slash else f'{group}/{split}'
    found = [(row['counters/examples'], row[key]) for row in rows if row['split'] == split and key in row]
    numbers = [(seen, value) for seen, value in found if math.isfinite(value)]
    low, high = bounds([value for _, value in numbers])
    near = [(seen, value) for seen, value in numbers if low <= value <= high]
    far = [(seen, value) for seen, value in numbers if not low <= value <= high]
    return Curve([seen for seen, _ in near], [value for _, value in near], far, len(found) - len(numbers))


def bounds(values):
    """(low, high) of the values that can share an axis: infinite, unless a few far ones would make the others a flat line."""
    if len(values) < 5:
        return -math.inf, math.inf
    # how far most of them reach, and three times as much on either side
    first, *_, last = statistics.quantiles(values, n=10, method='inclusive')
    low, high = first - 3 * (last - first), last + 3 * (last - first)
    near = [value for value in values if low <= value <= high]
    flat = max(values) - min(values) > 3 * (max(near) - min(near)) > 0
    return (low, high) if flat else (-math.inf, math.inf)


def smoothed(values, fraction):
    """Means over a window, of a fraction of all values, that ends at each value, so that no step knows the future."""
    size = max(1, round(fraction * len(values)))
    sums = [0.0, *itertools.accumulate(values)]
    ends = range(1, len(values) + 1)
    return [(sums[end] - sums[max(0, end - size)]) / min(end, size) for end in ends]


def panels_of(runs):
    """The PANELS that have a curve of any run; for the KL of samples, where there is none, that of chosen answers."""
    found = [panel for panel in PANELS if any(curves_of(panel, runs))]
    if SAMPLED_KL not in found and any(curves_of(CHOSEN_KL, runs)):
        found.append(CHOSEN_KL)
    return found


def curves_of(panel, runs):
    """Yield (number of the metric, split, number of the run, its Curve, place among twins) of a panel's curves with points."""
    for metric, name in enumerate(panel[2]):
        evaluated = any(len(curve(run.rows, 'eval', name).examples) > 1 for run in runs)
        for split in ('train', 'eval'):
            # log-probs of a step tell of its answers' lengths, and hide how little those of the same answers change
            if split == 'train' and evaluated and name.startswith('logps'):
                continue
            curves = [curve(run.rows, split, name) for run in runs]
            for run, (found, place) in enumerate(zip(curves, twins(curves), strict=True)):
                if found.examples or found.gaps:
                    yield metric, split, run, found, place


def twins(curves):
    """(number, size) of each curve in its group: curves that cannot be told apart in one picture are a group."""
    values = [value for curve in curves for value in curve.values]
    near = 0.004 * (max(values) - min(values)) if values else 0.0
    groups = []
    for curve in curves:
        for group in groups:
            same = group[0].examples == curve.examples
            if same and all(abs(a - b) <= near for a, b in zip(group[0].values, curve.values, strict=True)):
                group.append(curve)
                break
        else:
            groups.append([curve])
    # the objects themselves: two equal curves are two
    places = {id(curve): (i, len(group)) for group in groups for i, curve in enumerate(group)}
    return [places[id(curve)] for curve in curves]


def gold(row):
    """The gold reward of a row of samples.jsonl; None outside of the toy world."""
    place = row['prompt'].removeprefix('Review of the ').removesuffix(':')
    return toy.gold(row['prompt'], row['response']) if place in toy.PLACES else None
