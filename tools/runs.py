"""Read run folders for plot.py and report.py: options, metrics and samples, and from them the names and curves of the runs."""

import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError
from runtime.files import checked, read_lines
from runtime.log import NEUTRAL, key_of, recorded
from runtime.values import looked_in
from text import toy

# options that labels show first, most important first
FIRST = 'loss beta beta_prime label_smoothing lr batch_size n_epochs n_examples noise_rate seed model data'.split()

# (title, subtitle, metrics as group/name); a second metric is dashed. Chosen and rejected log-probs are too far apart for one panel
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
    """The content of a run folder. options: {name: value}; rows: of metrics.jsonl; samples: rows of samples.jsonl."""

    options: dict
    rows: list
    samples: list
    folder: Path


class Curve(NamedTuple):
    """A metric of a run in one split ('train' or 'eval'), as points (examples, value).

    gaps: number of values that are not finite; metric: index in the panel; run: index; extra: added width."""

    split: str
    points: list
    gaps: int
    metric: int = 0
    run: int = 0
    extra: float = 0.0


def arguments():
    """Return the command line's words with a dash, flags, and the Paths of all others, the folders of runs."""
    words = sys.argv[1:]
    flags = [word for word in words if word.startswith('-')]
    return flags, [Path(word) for word in words if word not in flags]


def read(folder):
    """Return the Run in a folder. Raises UserError if it is not a run's out_dir, has no steps yet, or is damaged."""
    options = read_options(folder)
    advice = 'mend it, unless the file is of something else'
    row_types = {'split': str, 'counters/examples': int}
    rows = read_lines(folder / 'metrics.jsonl', partial(checked, kinds=row_types), advice)
    if not any(row['split'] in ('train', 'eval') for row in rows):
        wanted = 'wanted is the out_dir of a training script, or, in tools.report, of label.py'
        raise UserError(f'{folder} has no steps in its metrics.jsonl yet: {wanted}')
    sample_types = {'examples': int, 'generator': str, 'prompt': str, 'response': str, 'sample': int | None}
    sample_types |= dict.fromkeys(('tokens', 'logratio', 'score'), int | float | None)
    samples = read_lines(folder / 'samples.jsonl', partial(checked, kinds=sample_types), advice)
    return Run(options, rows, samples, folder)


def read_options(folder):
    """Return the options of a run, {name: value}, from its config.json. Raises UserError if it is missing or damaged."""
    if not folder.is_dir():
        raise UserError(f'there is no folder {folder}{looked_in(folder)}')
    run = recorded(folder)
    if not run:
        raise UserError(f'{folder} holds no run: wanted is the out_dir of one')
    return run['options']


def value_of(row, split, metric):
    """Return a metric, such as rewards/margins, of a row of metrics.jsonl: None if it is missing, NaN if it cannot be drawn."""
    value = row.get(key_of(metric, split))
    if value is None or (isinstance(value, int | float) and abs(value) < 1e300):
        return value
    return math.nan


def gold(row):
    """Return the gold reward of a row of samples.jsonl, or None if its prompt is not of the toy world, a review of a place."""
    prompt = row['prompt']
    return toy.gold(prompt, row['response']) if toy.place_of(prompt) in toy.PLACES else None


def differing(runs):
    """Return the names of options that differ between runs, those in FIRST first. A run that lacks an option does not count."""
    found = []
    names = dict.fromkeys(name for run in runs for name in run.options)
    for name in names:
        # compare as JSON, since lists are not hashable
        values = {json.dumps(run.options[name]) for run in runs if name in run.options}
        # NEUTRAL: options that do not change results
        if len(values) > 1 and name not in NEUTRAL:
            found.append(name)
    # sort by position in FIRST; the others follow in the order found
    return sorted(found, key=(FIRST + found).index)


def labels(runs):
    """Return a label for each run: its folder, and up to five options in which the runs differ."""
    found = []
    folders = [run.folder.name for run in runs]
    names = differing(runs)
    for run in runs:
        # the full path if the folder name is ambiguous
        label = str(run.folder) if folders.count(run.folder.name) > 1 else run.folder.name
        options = []
        for name in names:
            if run.options.get(name) is not None:
                options.append(f'{name}={run.options[name]}')
        # more would not fit into the legend
        if len(options) > 5:
            options[5:] = ['...']
        found.append(f'{label}: {", ".join(options)}' if options else label)
    return found


def panels_of(runs):
    """Return (title, subtitle, Curves) of each of PANELS that has a curve. The subtitle also counts the values that are not drawn."""
    panels = []
    for title, subtitle, metrics in PANELS:
        curves = curves_of(metrics, runs)
        # the KL on chosen answers is less accurate: leave it out if there is the panel of the KL on samples, which comes before
        has_better = metrics == ['kl/chosen'] and any(earlier == 'KL' for earlier, *_ in panels)
        if not curves or has_better:
            continue
        # leave out outliers, which would flatten the rest; gaps: number of values that are nan or infinite
        values = [[value for _, value in curve.points] for curve in curves]
        low, high = bounds(values)
        far = [value for value in itertools.chain(*values) if not low <= value <= high]
        for i, curve in enumerate(curves):
            near = [(x, value) for x, value in curve.points if low <= value <= high]
            curves[i] = curve._replace(points=near)
        if far:
            farthest = max(far, key=abs)
            subtitle += f'; outside: {len(far)}, such as {farthest:.3g}'
        gaps = sum(curve.gaps for curve in curves)
        if gaps:
            subtitle += f'; no numbers: {gaps}'
        panels.append((title, subtitle, curves))
    return panels


def curves_of(metrics, runs):
    """Return the non-empty Curves of a panel's metrics, ordered by metric, split ('train' first) and run."""
    found = []
    # added line widths, from at most 3 for the first run down to 0 for the last, which is drawn on top of the others
    extras = np.linspace(min(3, len(runs) - 1), 0, len(runs)).tolist()
    for number, metric in enumerate(metrics):
        train = [curve(run, 'train', metric) for run in runs]
        evaluations = [curve(run, 'eval', metric) for run in runs]
        # training log-probs vary with the lengths of the answers: draw only evaluations, if there are two or more
        if metric.startswith('logps') and any(len(one.points) > 1 for one in evaluations):
            train = []
        for curves in (train, evaluations):
            for i, one in enumerate(curves):
                if one.points or one.gaps:
                    found.append(one._replace(metric=number, run=i, extra=extras[i]))
    return found


def curve(run, split, metric):
    """Return the Curve of a metric of one run. The caller sets its fields metric, run and extra."""
    # (training examples so far, value); rows without this metric have no point
    rows = [row for row in run.rows if row['split'] == split]
    points = [(row['counters/examples'], value_of(row, split, metric)) for row in rows]
    points = [(x, value) for x, value in points if value is not None]
    finite = [(x, value) for x, value in points if math.isfinite(value)]
    return Curve(split, finite, gaps=len(points) - len(finite))


def bounds(curves):
    """Return (low, high), the range of values to draw in a panel of curves, each a list of values: infinite if none is an outlier."""
    near = []  # values of all curves without their outliers
    for values in curves:
        # of few values, none is an outlier
        if len(values) < 5:
            near += values
            continue
        # the 10% to 90% quantile range, widened by three times its size on either side
        first, last = np.quantile(values, [0.1, 0.9])
        margin = 3 * (last - first)
        near += [value for value in values if first - margin <= value <= last + margin]
    # one is left out only if the panel would become more than three times as high
    low = min(near, default=0.0)
    high = max(near, default=0.0)
    size = 3 * (high - low) or math.inf
    return high - size, low + size


def smoothed(points, fraction):
    """Return points (x, value) with the trailing moving averages of values. fraction: window, a share of all points; 0: no smoothing."""
    size = max(1, round(fraction * len(points)))
    # sums[k]: the sum of the first k values
    sums = np.cumsum([0.0, *(value for _, value in points)])
    ends = np.arange(1, len(points) + 1)
    starts = np.maximum(0, ends - size)
    averages = (sums[ends] - sums[starts]) / (ends - starts)
    return [(x, average) for (x, _), average in zip(points, averages.tolist(), strict=True)]
