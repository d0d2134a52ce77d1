"""Draw the curves of runs side by side: loss, accuracy, margins, log-probs, KL, and gold reward against KL. One PNG.

    python -m tools.plot out/dpo_toy out/drdpo_toy --out=plot.png

Options are given as --name=value; every other word is the folder of a run.
Thin lines are training steps, smoothed; points are evaluations of held-out examples. A run is named by its folder and by the
options in which the runs differ. The last panel needs evaluations with --sample_during_eval on the toy world, whose gold
reward is known, or ppo.py's metric gold/eval, which is drawn without an error.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from configurator import UserError, configure
from runtime.log import NEUTRAL
from text import toy

out = 'plot.png'  # the picture; its ending decides the format (png, pdf, svg)
smooth = 0.04  # training curves: mean over this fraction of a run's steps; 0: every step as it is
width = 13.0  # inches
config = configure(globals(), [x for x in sys.argv[1:] if x.startswith('-')])
folders = [Path(x) for x in sys.argv[1:] if not x.startswith('-')]

# title, meaning, metrics as group/name; of two metrics the second is drawn dashed
SAMPLED_KL = ('KL', 'KL(policy || reference) on its own samples, nats an answer', ['kl/samples'])
# in its place, where no run has sampled
CHOSEN_KL = (
    'KL, as if chosen answers came from the reference',
    'mean of log reference - log policy, nats an answer',
    ['kl/chosen'],
)
PANELS = [
    ('loss', 'thin: training steps, smoothed; points: held-out examples', ['loss']),
    ('reward accuracy', 'share of pairs with the higher reward on the chosen answer', ['rewards/accuracies']),
    ('reward margin', 'chosen minus rejected implicit reward', ['rewards/margins']),
    ('log-probs', 'chosen (solid, filled) and rejected (dashed, open), nats an answer', ['logps/chosen', 'logps/rejected']),
    SAMPLED_KL,
]  # fmt: skip
DRAWN = ('loss', 'rewards', 'logps', 'kl', 'gold')  # groups of metrics

# ---- what a run left ----


class Run(NamedTuple):
    """What a run's folder holds: options by name, rows of metrics.jsonl, rows of samples.jsonl."""

    options: dict
    rows: list
    samples: list


def read(folder):
    """The Run of a folder. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f'there is no folder {folder}')
    try:
        options = dict(json.loads((folder / 'config.json').read_text())['config'])
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json, so it is no run's out_dir") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{folder}/config.json is damaged') from None
    rows = lines(folder / 'metrics.jsonl', {'split': str, 'counters/examples': int})
    if not any(row['split'] in ('train', 'eval') for row in rows):
        raise UserError(f'{folder} has no steps in its metrics.jsonl yet')
    kinds = {'examples': int, 'generator': str, 'prompt': str, 'response': str}
    return Run(options, rows, lines(folder / 'samples.jsonl', kinds))


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


def labels(runs):
    """A name for each run: its folder, and up to five of the options in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.options if key not in NEUTRAL | {'out_dir'})
    differ = []
    for key in keys:
        values = {json.dumps(run.options.get(key)) for run in runs}
        if len(values) > 1:
            differ.append(key)

    names = []
    for folder, run in zip(folders, runs, strict=True):
        told = [f'{key}={run.options[key]}' for key in differ if run.options.get(key) is not None]
        if len(told) > 5:
            told = [*told[:5], '...']
        name = f'{folder.name}: {", ".join(told)}' if told else folder.name
        names.append(name.replace('$', r'\$'))  # else matplotlib reads mathematics
    return names


# ---- curves ----


def curve(rows, split, metric):
    """(examples, values) of a metric, written as group/name, in the rows of a split."""
    # its name in a row: loss/train, rewards_train/margins
    group, slash, name = metric.partition('/')
    key = f'{group}_{split}/{name}' if slash else f'{group}/{split}'
    found = [row for row in rows if row['split'] == split and key in row]
    return [row['counters/examples'] for row in found], [row[key] for row in found]


def smoothed(values):
    """Means over a window that ends at each value, so that no step knows the future."""
    size = max(1, round(smooth * len(values)))
    ends = range(1, len(values) + 1)
    return [statistics.fmean(values[max(0, end - size) : end]) for end in ends]


def frontier(rows, samples):
    """Points (KL, gold reward, its standard error): of the reference, if it was sampled, and of every evaluation with both."""
    # (who answered, examples seen before) -> gold rewards of the answers
    scores = {}
    for row in samples:
        place = row['prompt'].removeprefix('Review of the ').removesuffix(':')
        if place in toy.PLACES:
            gold = toy.gold(row['prompt'], row['response'])
            scores.setdefault((row['generator'], row['examples']), []).append(gold)

    # the reference's answers are the same every time
    references = [values for (name, _), values in scores.items() if name == 'reference']
    points = [(0.0, *mean_and_error(values)) for values in references[:1]]

    # of ppo.py a metric has the mean of all answers, of other scripts the samples are there
    for row in rows:
        kl, measured = row.get('kl_eval/samples'), row.get('gold/eval')
        sampled = scores.get(('policy', row['counters/examples']))
        if kl is not None and measured is not None:
            points.append((kl, measured, 0.0))
        elif kl is not None and sampled:
            points.append((kl, *mean_and_error(sampled)))
    return points


def mean_and_error(values):
    """(mean, its standard error) of numbers."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


# ---- the picture ----


def draw(runs):
    """Write the picture."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('plot.py needs a package that is not installed: pip install matplotlib') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    # the panels that have anything to show
    panels = PANELS
    if not has_curve(SAMPLED_KL, runs):
        panels = [CHOSEN_KL if panel is SAMPLED_KL else panel for panel in PANELS]
    panels = [panel for panel in panels if has_curve(panel, runs)]
    frontiers = [frontier(run.rows, run.samples) for run in runs]
    count = len(panels) + any(frontiers)
    if not count:
        raise UserError('these runs have no metric that is drawn')

    # a grid of them, three in a row
    plt.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True})
    plt.rcParams.update({'grid.alpha': 0.25, 'axes.titlesize': 11, 'axes.titleweight': 'bold'})
    across, down = min(3, count), -(-count // 3)
    size = width, 3.3 * down + 0.25 * len(runs)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout='constrained')
    axes = list(axes.flat)

    # every run its colour; the frontiers come last
    palette = plt.get_cmap('tab10' if len(runs) <= 10 else 'tab20').colors
    colours = [palette[i % len(palette)] for i in range(len(runs))]
    for axis, panel in zip(axes, panels, strict=False):
        draw_panel(axis, panel, runs, colours)
    if any(frontiers):
        draw_frontiers(axes[len(panels)], frontiers, colours)
    for unused in axes[count:]:
        unused.remove()

    # which colour is which run
    named = zip(labels(runs), colours, strict=True)
    handles = [plt.Line2D([], [], color=colour, marker='o', label=name) for name, colour in named]
    figure.legend(handles=handles, loc='outside lower center', frameon=False)
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {out}: {getattr(error, "strerror", None) or error}') from None
    print(f'{out}: {len(runs)} runs, {count} panels')


def has_curve(panel, runs):
    """Whether any run has a point of a panel."""
    _, _, metrics = panel
    for run in runs:
        for metric in metrics:
            for split in ('train', 'eval'):
                examples, _ = curve(run.rows, split, metric)
                if examples:
                    return True
    return False


def draw_panel(axis, panel, runs, colours):
    """The training curves and evaluations of a panel's metrics."""
    title, meaning, metrics = panel
    looks = [{'linestyle': '-', 'markerfacecolor': 'auto'}, {'linestyle': '--', 'markerfacecolor': 'white'}]
    for run, colour in zip(runs, colours, strict=True):
        for metric, look in zip(metrics, looks, strict=False):
            examples, values = curve(run.rows, 'train', metric)
            axis.plot(examples, smoothed(values), color=colour, linewidth=1, alpha=0.6, **look)
            examples, values = curve(run.rows, 'eval', metric)
            line = 1.5 if len(examples) > 2 else 0
            axis.plot(examples, values, color=colour, marker='o', markersize=5, linewidth=line, **look)
    entitle(axis, title, meaning, 'training examples')


def draw_frontiers(axis, frontiers, colours):
    """Gold reward against KL, a line a run: its points as frontier gives them."""
    for points, colour in zip(frontiers, colours, strict=True):
        kl, gold, error = zip(*points, strict=True) if points else ((), (), ())
        sizes = [18] * len(points)
        if points:
            sizes[-1] = 80
        axis.plot(kl, gold, color=colour, linewidth=1, alpha=0.6)
        axis.errorbar(kl, gold, error, color=colour, fmt='none', alpha=0.35)
        axis.scatter(kl, gold, sizes, color=colour)
    meaning = 'mean of sampled answers, standard error; large: the last ones'
    entitle(axis, 'gold reward against KL', meaning, 'KL(policy || reference), nats an answer')


def entitle(axis, title, meaning, xlabel):
    """Write a panel's title, what it means, and what is on its x axis."""
    axis.set(xlabel=xlabel)
    axis.set_title(title, loc='left', pad=17)
    axis.text(0, 1.025, meaning, transform=axis.transAxes, fontsize=8, color='0.4', va='bottom')


if not folders:
    raise UserError("name the folders to draw, a run's --out_dir each: python -m tools.plot out/a out/b")
draw([read(folder) for folder in folders])
