"""Read the folders of runs for plot.py and report.py: options, metrics and samples, then names of the runs, then curves."""

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

# the options that say most about a run, the most telling ones first; the names of runs begin with them
FIRST = 'loss beta beta_prime label_smoothing lr batch_size n_epochs n_examples noise_rate seed model data'.split()

# (title, meaning, metrics as group/name); of two metrics the second is drawn dashed. Log-probs of chosen and rejected answers lie
# far apart, so each has a panel of its own. The last panel is shown only where the one before has no curves (panels_of).
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
    """The contents of a run's folder. options: name -> value; rows: of metrics.jsonl; samples: rows of samples.jsonl."""

    options: dict
    rows: list
    samples: list
    folder: Path


class Curve(NamedTuple):
    """A metric of a run in one split, 'train' or 'eval'.

    examples, values: the points, as two lists; far: values too far away to be drawn with them; gaps: how many values are no
    numbers. metric: 0 for the panel's first metric, 1 for its second; run: the place of the run in the list of runs.
    place: (number, size), if size curves look the same and this is the number-th of them, from 0."""

    split: str
    examples: list
    values: list
    far: list
    gaps: int
    metric: int = 0
    run: int = 0
    place: tuple = (0, 1)


class Panel(NamedTuple):
    """A picture with one or more Curves. meaning: a line below the title, which also says what is not drawn."""

    title: str
    meaning: str
    curves: list


# ---- reading ----


def read(folder):
    """Return the Run in a folder. Raises UserError if that is no run's out_dir, has no step yet, or is damaged."""
    options = read_options(folder)
    rows = read_rows(folder / 'metrics.jsonl', {'split': str, 'counters/examples': int})
    has_steps = any(row['split'] in ('train', 'eval') for row in rows)
    if not has_steps:
        raise UserError(f'{folder} has no steps in its metrics.jsonl yet')
    kinds = {'examples': int, 'generator': str, 'prompt': str, 'response': str}
    samples = read_rows(folder / 'samples.jsonl', kinds)
    return Run(options, rows, samples, folder)


def read_options(folder):
    """Return the options of a run as a dict, from its config.json. Raises UserError if there is none, or a damaged one."""
    if not folder.is_dir():
        raise UserError(f'there is no folder {folder}{looked_in(folder)}')
    try:
        record = json.loads((folder / 'config.json').read_text())
        return dict(record['config'])
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json, so it is no run's out_dir") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{folder}/config.json is damaged') from None


def read_rows(file, kinds):
    """Return the rows of a .jsonl file, or [] if it does not exist.

    kinds: the fields that every row must have -> their types. Prints a note if the last line is not complete, and leaves it
    out. Raises UserError with the number of a damaged line."""
    if not file.exists():
        return []
    rows = []
    try:
        # every complete line ends with a line break; a run may be writing the last one, or was killed
        *lines, incomplete = file.read_text().split('\n')
        for line in lines:
            row = dict(json.loads(line))
            if not all(isinstance(row[name], kind) for name, kind in kinds.items()):
                raise ValueError
            rows.append(row)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f'{file}, line {len(rows) + 1} is damaged, or the file is of something else') from None
    if incomplete:
        print(f'note: the last line of {file} is not complete')
    return rows


def value_of(row, split, metric):
    """Return a metric, as group/name, of a row of metrics.jsonl, as a number: nan for anything else, None if it is missing."""
    # in the rows, loss is loss/train, and rewards/margins is rewards_train/margins
    group, slash, name = metric.partition('/')
    key = f'{group}_{split}/{name}' if slash else f'{group}/{split}'
    value = row.get(key)
    if value is None:
        return None
    # larger numbers cannot be drawn
    is_number = isinstance(value, int | float) and abs(value) < 1e300
    return value if is_number else math.nan


def gold(row):
    """Return the toy world's gold reward of a row of samples.jsonl, or None if its prompt is not of the toy world."""
    prompt = row['prompt']
    place = prompt.removeprefix('Review of the ').removesuffix(':')
    if place not in toy.PLACES:
        return None
    return toy.gold(prompt, row['response'])


# ---- names ----


def differing(runs):
    """Return the names of the options in which runs differ: first those in FIRST, in its order, then the others.

    Options that change no result are left out. Only the runs that have an option are compared in it."""
    found = []
    names = [name for run in runs for name in run.options]
    # a dict keeps the names in order, each once
    for name in dict.fromkeys(names):
        # as json, for an option may be a list, which no set takes
        values = {json.dumps(run.options[name]) for run in runs if name in run.options}
        if len(values) > 1 and name not in NEUTRAL:
            found.append(name)
    telling = [name for name in FIRST if name in found]
    others = [name for name in found if name not in FIRST]
    return telling + others


def labels(runs):
    """Return a name for each run: its folder, and the options in which the runs differ, at most five of them."""
    found = []
    folders = [run.folder.name for run in runs]
    names = differing(runs)
    for run in runs:
        # a folder's own name, or the whole path if two folders have that name
        is_unique = folders.count(run.folder.name) == 1
        label = run.folder.name if is_unique else str(run.folder)
        options = [f'{name}={run.options[name]}' for name in names if run.options.get(name) is not None]
        # more would not fit into a legend
        if len(options) > 5:
            options[5:] = ['...']
        if options:
            label += ': ' + ', '.join(options)
        found.append(label)
    return found


# ---- curves ----


def panels_of(runs):
    """Return the Panels that have any curves of these runs, in the order of PANELS."""
    panels = []
    for title, meaning, metrics in PANELS:
        curves = curves_of(metrics, runs)
        # say what is not drawn
        far = [value for curve in curves for value in curve.far]
        if far:
            farthest = max(far, key=abs)
            meaning += f'; outside: {len(far)}, such as {farthest:.3g}'
        gaps = sum(curve.gaps for curve in curves)
        if gaps:
            meaning += f'; no numbers: {gaps}'
        panels.append(Panel(title, meaning, curves))
    # the KL of samples is the better one: with it, that of chosen answers is left out
    *_, kl_of_samples, _ = panels
    if kl_of_samples.curves:
        panels.pop()
    return [panel for panel in panels if panel.curves]


def curves_of(metrics, runs):
    """Return the Curves of a panel's metrics that have a point or a gap: for each metric of training steps, then of evaluations."""
    found = []
    for number, metric in enumerate(metrics):
        by_split = {split: [curve(run, split, metric) for run in runs] for split in ('train', 'eval')}
        # Log-probs of a step depend on the lengths of its answers, and hide how little those of the same answers change. So
        # evaluations alone are drawn, if there are two or more.
        has_evaluations = any(len(one.examples) > 1 for one in by_split['eval'])
        if metric.startswith('logps') and has_evaluations:
            by_split['train'] = []
        for curves in by_split.values():
            for i, (one, place) in enumerate(zip(curves, twins(curves), strict=True)):
                if one.examples or one.gaps:
                    found.append(one._replace(metric=number, run=i, place=place))
    return found


def curve(run, split, metric):
    """Return the Curve of a metric of one run in a split. Its numbers in the panel keep their defaults."""
    gaps = 0
    # (training examples so far, value)
    points = []
    for row in run.rows:
        if row['split'] != split:
            continue
        value = value_of(row, split, metric)
        if value is None:
            continue
        if math.isfinite(value):
            points.append((row['counters/examples'], value))
        else:
            gaps += 1
    # one axis for the near ones; the far ones are only counted
    low, high = bounds([value for _, value in points])
    near = [(seen, value) for seen, value in points if low <= value <= high]
    far = [value for _, value in points if not low <= value <= high]
    examples = [seen for seen, _ in near]
    values = [value for _, value in near]
    return Curve(split, examples, values, far, gaps)


def bounds(values):
    """Return (low, high), between which values can share an axis.

    They are infinite, unless a few values lie so far away that all others would look like a flat line."""
    # of fewer values, none is an exception
    if len(values) >= 5:
        # most values, and three times their spread on either side
        first, last = np.quantile(values, [0.1, 0.9])
        margin = 3 * (last - first)
        low, high = first - margin, last + margin
        # without its far values, the curve is drawn more than three times as high
        near = [value for value in values if low <= value <= high]
        whole_range = max(values) - min(values)
        near_range = max(near) - min(near)
        if near_range > 0 and whole_range > 3 * near_range:
            return low, high
    return -math.inf, math.inf


def smoothed(values, fraction):
    """Return for each value the mean of a window that ends with it, so that no step knows of later ones.

    fraction: the size of the window as a share of all values; with 0 it is the value alone."""
    size = max(1, round(fraction * len(values)))
    # sums[k]: the sum of the first k values
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for end in range(1, len(values) + 1):
        start = max(0, end - size)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def twins(curves):
    """Return (number, size) for each curve: size curves look the same, itself included, and number of them come before it."""
    values = [value for one in curves for value in one.values]
    # what no eye can see: 0.4% of the picture's height
    invisible = 0.004 * (max(values) - min(values)) if values else 0.0
    found = []
    for i, one in enumerate(curves):
        looks_same = []
        for other in curves:
            same_steps = other.examples == one.examples
            looks_same.append(same_steps and np.allclose(other.values, one.values, rtol=0, atol=invisible))
        found.append((sum(looks_same[:i]), sum(looks_same)))
    return found
