"""What the folders of runs hold, read for plot.py and report.py: options, metrics, samples; curves and where they differ."""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError
from runtime.log import NEUTRAL
from runtime.values import looked_in
from text import toy

# options that say most of a run; a name begins with those of them that differ
FIRST = 'loss beta beta_prime label_smoothing lr batch_size n_epochs n_examples noise_rate seed model data'.split()

# title, meaning, metrics as group/name; of two metrics the second is drawn dashed
# log-probs of chosen and rejected answers lie far apart, so each has an axis of its own
PANELS = [
    ('loss', 'thin: training steps, smoothed; points: held-out examples', ['loss']),
    ('reward accuracy', 'share of pairs with the higher reward on the chosen answer', ['rewards/accuracies']),
    ('reward margin', 'chosen minus rejected implicit reward', ['rewards/margins']),
    ('rewards', 'chosen (solid, filled) and rejected (dashed, open)', ['rewards/chosen', 'rewards/rejected']),
    ('log-probs of chosen answers', 'nats an answer, of held-out ones if there are two evaluations', ['logps/chosen']),
    ('log-probs of rejected answers', 'likewise', ['logps/rejected']),
    ('reward of samples', 'mean of sampled answers, of the reward model or gold', ['score']),
    ('KL', 'KL(policy || reference) on its own samples, nats an answer', ['kl/samples']),
    ('KL, as if chosen answers came from the reference', 'mean of log reference - log policy, nats an answer', ['kl/chosen']),
]  # fmt: skip


class Run(NamedTuple):
    """What a run's folder holds: options by name, rows of metrics.jsonl, rows of samples.jsonl."""

    options: dict
    rows: list
    samples: list
    folder: Path


class Curve(NamedTuple):
    """A metric of a run in one split. examples, values: its points; far: values too far off; gaps: how many are no numbers.

    metric, run: numbers of the panel's metric and of the run; place: (number, size) among curves that look the same."""

    split: str
    examples: list
    values: list
    far: list
    gaps: int
    metric: int = 0
    run: int = 0
    place: tuple = (0, 1)


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
    """The rows of a .jsonl, none where it does not exist. kinds: what each row has, and of which type. Raises UserError."""
    if not file.exists():
        return []
    rows = []
    try:
        *whole, rest = file.read_text().split('\n')
        for text in whole:
            row = dict(json.loads(text))
            if not all(isinstance(row[name], kind) for name, kind in kinds.items()):
                raise ValueError
            rows.append(row)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f'{file}, line {len(rows) + 1} is damaged, or the file is of something else') from None
    if rest:
        print(f'note: the last line of {file} is not complete')  # the run is writing it, or was killed
    return rows


def value_of(row, split, metric):
    """A metric, written as group/name, in a row of a split: a number, nan for anything else, None where there is none."""
    # its name in the row: loss/train, rewards_train/margins
    group, slash, name = metric.partition('/')
    value = row.get(f'{group}_{split}/{name}' if slash else f'{group}/{split}')
    # larger numbers cannot be drawn
    is_number = isinstance(value, int | float) and abs(value) < 1e300
    return value if value is None or is_number else math.nan


def gold(row):
    """The gold reward of a row of samples.jsonl; None outside of the toy world."""
    place = row['prompt'].removeprefix('Review of the ').removesuffix(':')
    return toy.gold(row['prompt'], row['response']) if place in toy.PLACES else None


# ---- names ----


def differing(runs):
    """The names of the options in which runs differ, those that say most of them first. A script may lack an option."""

    def differs(name):
        return len({json.dumps(run.options[name]) for run in runs if name in run.options}) > 1

    names = dict.fromkeys(name for run in runs for name in run.options)
    found = [name for name in names if name not in NEUTRAL | {'out_dir'} and differs(name)]
    return sorted(found, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def labels(runs):
    """A name for each run: its folder, and up to five of the options in which the runs differ."""
    found, folders = [], [run.folder.name for run in runs]
    for run in runs:
        name = run.folder.name if folders.count(run.folder.name) == 1 else str(run.folder)
        told = [f'{key}={run.options[key]}' for key in differing(runs) if run.options.get(key) is not None]
        if len(told) > 5:
            told[5:] = ['...']
        found.append(f'{name}: {", ".join(told)}' if told else name)
    return found


# ---- curves ----


def panels_of(runs):
    """(title, meaning, Curves) of every panel that has any; the KL of samples takes the place of that of chosen answers."""
    found = []
    for title, meaning, metrics in PANELS:
        curves = curves_of(metrics, runs)
        # what is not drawn
        far = [value for curve in curves for value in curve.far]
        gaps = sum(curve.gaps for curve in curves)
        if far:
            meaning += f'; outside: {len(far)}, such as {max(far, key=abs):.3g}'
        if gaps:
            meaning += f'; no numbers: {gaps}'
        found.append((title, meaning, curves))
    *others, of_samples, of_chosen = found
    last = of_samples if of_samples[2] else of_chosen
    return [panel for panel in (*others, last) if panel[2]]


def curves_of(metrics, runs):
    """The Curves of a panel's metrics that have a point or a gap: those of training steps, then of evaluations."""
    found = []
    for number, metric in enumerate(metrics):
        steps, evaluations = ([curve(run, split, metric) for run in runs] for split in ('train', 'eval'))
        # log-probs of a step tell of its answers' lengths, and hide how little those of the same answers change
        if metric.startswith('logps') and any(len(curve.examples) > 1 for curve in evaluations):
            steps = []
        for curves in (steps, evaluations):
            for i, (one, place) in enumerate(zip(curves, twins(curves), strict=True)):
                if one.examples or one.gaps:
                    found.append(one._replace(metric=number, run=i, place=place))
    return found


def curve(run, split, metric):
    """The Curve of a metric in the rows of a split."""
    rows = [row for row in run.rows if row['split'] == split]
    measured = [(row['counters/examples'], value_of(row, split, metric)) for row in rows]
    points = [(seen, value) for seen, value in measured if value is not None]
    numbers = [(seen, value) for seen, value in points if math.isfinite(value)]
    low, high = bounds([value for _, value in numbers])
    near = [(seen, value) for seen, value in numbers if low <= value <= high]
    far = [value for _, value in numbers if not low <= value <= high]
    return Curve(split, [seen for seen, _ in near], [value for _, value in near], far, len(points) - len(numbers))


def bounds(values):
    """(low, high) of the values that can share an axis: infinite, unless a few far ones would make the others a flat line."""
    if len(values) >= 5:
        # how far most of them reach, and three times as much on either side
        first, last = np.quantile(values, [0.1, 0.9])
        low, high = first - 3 * (last - first), last + 3 * (last - first)
        near = [value for value in values if low <= value <= high]
        if max(values) - min(values) > 3 * (max(near) - min(near)) > 0:
            return low, high
    return -math.inf, math.inf


def smoothed(values, fraction):
    """Means over a window, of a fraction of all values, that ends at each value, so that no step knows the future."""
    size = max(1, round(fraction * len(values)))
    sums = [0.0, *itertools.accumulate(values)]
    ends = range(1, len(values) + 1)
    return [(sums[end] - sums[max(0, end - size)]) / min(end, size) for end in ends]


def twins(curves):
    """(number, size) of each curve among those that cannot be told from it in one picture, itself included."""
    values = [value for curve in curves for value in curve.values]
    near = 0.004 * (max(values) - min(values)) if values else 0.0
    found = []
    for i, one in enumerate(curves):
        same = [other.examples == one.examples and np.allclose(other.values, one.values, 0, near) for other in curves]
        found.append((sum(same[:i]), sum(same)))
    return found
