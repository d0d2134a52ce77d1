"""What the folders of runs hold, read for plot.py and report.py: options, metrics, samples; curves and where they differ."""

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from runtime.log import NEUTRAL
from text import toy

DRAWN = ('loss', 'rewards', 'logps', 'kl', 'gold')  # groups of metrics
# options that say most of a run; a name begins with those of them that differ
FIRST = 'loss beta beta_prime label_smoothing lr batch_size n_epochs n_examples noise_rate seed model data'.split()


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
        raise UserError(f'there is no folder {folder}')
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
    """The names of the options in which runs differ, those that say most of them first."""
    keys = dict.fromkeys(key for run in runs for key in run.options if key not in NEUTRAL | {'out_dir'})
    differ = [key for key in keys if len({json.dumps(run.options.get(key)) for run in runs}) > 1]
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
    ends = range(1, len(values) + 1)
    return [statistics.fmean(values[max(0, end - size) : end]) for end in ends]


def gold(row):
    """The gold reward of a row of samples.jsonl; None outside of the toy world."""
    place = row['prompt'].removeprefix('Review of the ').removesuffix(':')
    return toy.gold(row['prompt'], row['response']) if place in toy.PLACES else None
