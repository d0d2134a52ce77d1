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

from configurator import UserError, configure
from runtime.log import NEUTRAL
from text import toy

out = 'plot.png'  # the picture; its ending decides the format (png, pdf, svg)
smooth = 0.04  # training curves: mean over this fraction of a run's steps; 0: every step as it is
width = 13.0  # inches
config = configure(globals(), [x for x in sys.argv[1:] if x.startswith('-')])
folders = [Path(x) for x in sys.argv[1:] if not x.startswith('-')]

# title, what it says, metrics as group/name (log-probs: chosen solid, rejected dashed)
PANELS = [
    ('loss', 'thin: training steps, smoothed; points: held-out examples', ['loss']),
    ('reward accuracy', 'share of pairs with the higher reward on the chosen answer', ['rewards/accuracies']),
    ('reward margin', 'chosen minus rejected implicit reward', ['rewards/margins']),
    ('log-probs', 'chosen (solid, filled) and rejected (dashed, open), nats an answer', ['logps/chosen', 'logps/rejected']),
    ('KL', 'KL(policy || reference) on its own samples, nats an answer', ['kl/samples']),
]  # fmt: skip
# in place of the last, where no run has sampled
NOT_SAMPLED = (
    'KL, as if chosen answers came from the reference',
    'mean of log reference - log policy, nats an answer',
    ['kl/chosen'],
)
DRAWN = ('loss', 'rewards', 'logps', 'kl', 'gold')  # groups of metrics

# ---- what a run left ----


def read(folder):
    """(options, rows of metrics.jsonl, rows of samples.jsonl) of a run's folder. Raises UserError."""
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
    texts = dict.fromkeys(('generator', 'prompt', 'response'), str)
    return options, rows, lines(folder / 'samples.jsonl', {'examples': int, **texts})


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
        for name in row if 'split' in kinds else ():
            drawn = name.replace('_', '/').partition('/')[0] in DRAWN
            # nan, of a run that went wrong, is no point; matplotlib fails on numbers that are larger
            if drawn and not (isinstance(row[name], int | float) and not abs(row[name]) > 1e300):
                wrong.append(name)
        if wrong:
            raise UserError(f'{file} has a row without a proper {wrong[0]}: it is damaged, or of something else')
        rows.append(row)
    return rows


def labels(runs):
    """A name for each run: its folder, and the options in which the runs differ."""
    keys = dict.fromkeys(k for options, *_ in runs for k in options if k not in NEUTRAL | {'out_dir'})
    differ = [k for k in keys if len({json.dumps(options.get(k)) for options, *_ in runs}) > 1]
    names = []
    for folder, (options, *_) in zip(folders, runs, strict=True):
        told = [f'{k}={options[k]}' for k in differ if options.get(k) is not None]
        more = ', ...' if len(told) > 5 else ''
        name = f'{folder.name}: {", ".join(told[:5])}{more}' if told else folder.name
        names.append(name.replace('$', r'\$'))  # else matplotlib reads mathematics
    return names


# ---- curves ----


def curve(rows, split, metric):
    """(examples, values) of a metric, written as group/name, in the rows of a split."""
    group, slash, name = metric.partition('/')
    key = f'{group}_{split}/{name}' if slash else f'{group}/{split}'
    found = [row for row in rows if row['split'] == split and key in row]
    return [row['counters/examples'] for row in found], [row[key] for row in found]


def smoothed(values):
    """Means over a window that ends at each value, so that no step knows the future."""
    size = max(1, round(smooth * len(values)))
    return [statistics.fmean(values[max(0, i + 1 - size) : i + 1]) for i in range(len(values))]


def frontier(rows, samples):
    """(KL, gold reward, its standard error) of the reference, if it was sampled, and of every evaluation with both."""
    scores = {}
    for row in samples:
        prompt = row['prompt'].removeprefix('Review of the ').removesuffix(':')
        if prompt in toy.PLACES:
            scores.setdefault((row['generator'], row['examples']), []).append(toy.gold(row['prompt'], row['response']))
    # the reference's answers are the same every time
    references = [values for (name, _), values in scores.items() if name == 'reference']
    points = [(0.0, *mean_and_error(values)) for values in references[:1]]
    for row in rows:
        # the metric is of all answers of ppo.py, not of some
        kl, measured = row.get('kl_eval/samples'), row.get('gold/eval')
        sampled = scores.get(('policy', row['counters/examples']))
        if kl is not None and measured is not None:
            points.append((kl, measured, 0.0))
        elif kl is not None and sampled:
            points.append((kl, *mean_and_error(sampled)))
    return points


def mean_and_error(values):
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
    def anywhere(panel):
        return any(curve(rows, split, m)[0] for _, rows, _ in runs for split in ('train', 'eval') for m in panel[2])

    panels = PANELS if anywhere(PANELS[-1]) else [*PANELS[:-1], NOT_SAMPLED]
    shown = [panel for panel in panels if anywhere(panel)]
    frontiers = [frontier(rows, samples) for _, rows, samples in runs]
    count = len(shown) + any(frontiers)
    if not count:
        raise UserError('these runs have no metric that is drawn')

    # a grid of them, three in a row
    plt.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True})
    plt.rcParams.update({'grid.alpha': 0.25, 'axes.titlesize': 11, 'axes.titleweight': 'bold'})
    across, down = min(3, count), -(-count // 3)
    size = width, 3.3 * down + 0.25 * len(runs)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout='constrained')
    palette = plt.get_cmap('tab10' if len(runs) <= 10 else 'tab20').colors
    colours = [palette[i % len(palette)] for i in range(len(runs))]
    axes = list(axes.flat)
    for axis, panel in zip(axes, shown, strict=False):
        draw_panel(axis, panel, [rows for _, rows, _ in runs], colours)
    if any(frontiers):
        draw_frontiers(axes[len(shown)], frontiers, colours)
    for axis in axes[count:]:
        axis.remove()

    # which colour is which run
    named = zip(labels(runs), colours, strict=True)
    handles = [plt.Line2D([], [], color=colour, marker='o', label=name) for name, colour in named]
    figure.legend(handles=handles, loc='outside lower center', frameon=False)
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {out}: {getattr(error, "strerror", None) or error}') from None
    print(f'{out}: {len(runs)} runs, {count} panels')


def draw_panel(axis, panel, runs, colours):
    """The training curves and evaluations of a panel's metrics. runs: the rows of each."""
    title, meaning, metrics = panel
    looks = [{'linestyle': '-', 'markerfacecolor': 'auto'}, {'linestyle': '--', 'markerfacecolor': 'white'}]
    for rows, colour in zip(runs, colours, strict=True):
        for metric, look in zip(metrics, looks, strict=False):
            x, y = curve(rows, 'train', metric)
            axis.plot(x, smoothed(y), color=colour, linewidth=1, alpha=0.6, **look)
            x, y = curve(rows, 'eval', metric)
            line = 1.5 if len(x) > 2 else 0
            axis.plot(x, y, color=colour, marker='o', markersize=5, linewidth=line, **look)
    entitle(axis, title, meaning, 'training examples')


def draw_frontiers(axis, frontiers, colours):
    """Gold reward against KL, a line a run."""
    for found, colour in zip(frontiers, colours, strict=True):
        kl, gold, error = zip(*found, strict=True) if found else ((), (), ())
        sizes = [18] * (len(kl) - 1) + [80] * bool(kl)
        axis.plot(kl, gold, color=colour, linewidth=1, alpha=0.6)
        axis.errorbar(kl, gold, error, color=colour, fmt='none', alpha=0.35)
        axis.scatter(kl, gold, sizes, color=colour)
    meaning = 'mean of sampled answers, standard error; large: the last ones'
    entitle(axis, 'gold reward against KL', meaning, 'KL(policy || reference), nats an answer')


def entitle(axis, title, meaning, xlabel):
    axis.set(xlabel=xlabel)
    axis.set_title(title, loc='left', pad=17)
    axis.text(0, 1.025, meaning, transform=axis.transAxes, fontsize=8, color='0.4', va='bottom')


if not folders:
    raise UserError("name the folders to draw, a run's --out_dir each: python -m tools.plot out/a out/b")
draw([read(folder) for folder in folders])
