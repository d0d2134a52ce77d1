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
NOT_SAMPLED = (
    'KL, as if chosen answers came from the reference',
    'mean of log reference - log policy, nats an answer',
    ['kl/chosen'],
)


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
    rows = lines(folder / 'metrics.jsonl')
    if not any(row.get('split') in ('train', 'eval') for row in rows):
        raise UserError(f'{folder} has no steps in its metrics.jsonl yet')
    samples = lines(folder / 'samples.jsonl')
    check(rows, {'split': str, 'counters/examples': int}, folder / 'metrics.jsonl')
    check(samples, {'examples': int, 'generator': str, 'prompt': str, 'response': str}, folder / 'samples.jsonl')
    return options, rows, samples


def check(rows, kinds, file):
    """Raise UserError where a row lacks one of these, or has a metric that is no number."""
    for row in rows:
        wrong = [k for k, kind in kinds.items() if not isinstance(row.get(k), kind)]
        if 'split' in kinds:
            drawn = [
                k for k in row if k.replace('_', '/').partition('/')[0] in ('loss', 'rewards', 'logps', 'kl', 'gold')
            ]
            wrong += [
                k for k in drawn if not isinstance(row[k], int | float) or (row[k] == row[k] and abs(row[k]) > 1e300)
            ]
        if wrong:
            raise UserError(f'{file} has a row without a proper {wrong[0]}: it is damaged, or of something else')


def lines(file):
    """The rows of a .jsonl, none where it does not exist; the last one may be half written. Raises UserError."""
    rows = []
    try:
        texts = file.read_text().splitlines() if file.exists() else []
    except (OSError, UnicodeDecodeError):
        raise UserError(f'{file} is damaged') from None
    for number, text in enumerate(texts, 1):
        try:
            rows.append(dict(json.loads(text)))
        except (ValueError, TypeError, RecursionError):
            if number < len(texts):
                raise UserError(f'{file}, line {number} is damaged') from None
            print(f'note: the last line of {file} is not complete')
    return rows


def labels(runs):
    """A name for each run: its folder, and the options in which the runs differ."""
    keys = [k for k in dict.fromkeys(k for options, *_ in runs for k in options) if k not in NEUTRAL | {'out_dir'}]
    differ = [k for k in keys if len({json.dumps(options.get(k)) for options, *_ in runs}) > 1]
    names = []
    for folder, (options, *_) in zip(folders, runs, strict=True):
        told = [f'{k}={options[k]}' for k in differ if options.get(k) is not None]
        more = ', ...' if len(told) > 5 else ''
        names.append(f'{folder.name}: ' + ', '.join(told[:5]) + more if told else folder.name)
    return names


def curve(rows, split, metric):
    """(examples, values) of a metric, written as group/name, in the rows of a split."""
    group, _, name = metric.partition('/')
    key = f'{group}_{split}/{name}' if name else f'{group}/{split}'
    found = [(row['counters/examples'], row[key]) for row in rows if row.get('split') == split and key in row]
    return [x for x, _ in found], [y for _, y in found]


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
    points = []
    reference = next((values for (name, _), values in scores.items() if name == 'reference'), [])  # the same every time
    if reference:
        points.append((0.0, *mean_and_error(reference)))
    for row in rows:
        kl, measured = row.get('kl_eval/samples'), row.get('gold/eval')  # of all answers of ppo.py, not of some
        own = scores.get(('policy', row.get('counters/examples')))
        if kl is not None and (measured is not None or own):
            points.append((kl, measured, 0.0) if measured is not None else (kl, *mean_and_error(own)))
    return points


def mean_and_error(values):
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def entitle(axis, title, meaning):
    axis.set_title(title, loc='left', pad=17)
    axis.text(0, 1.025, meaning, transform=axis.transAxes, fontsize=8, color='0.4', va='bottom')


def draw(runs):
    """Write the picture."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('plot.py needs a package that is not installed: pip install matplotlib') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    def anywhere(panel):
        return any(curve(rows, split, m)[0] for _, rows, _ in runs for split in ('train', 'eval') for m in panel[2])

    panels = PANELS if anywhere(PANELS[-1]) else [*PANELS[:-1], NOT_SAMPLED]
    shown = [panel for panel in panels if anywhere(panel)]
    points = [frontier(rows, samples) for _, rows, samples in runs]
    count = len(shown) + any(points)
    if not count:
        raise UserError('these runs have no metric that is drawn')
    columns = min(3, count)
    down = -(-count // columns)
    names = [name.replace('$', r'\$') for name in labels(runs)]  # else matplotlib reads mathematics
    plt.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
                         'grid.alpha': 0.25, 'axes.titlesize': 11, 'axes.titleweight': 'bold'})  # fmt: skip
    figure, axes = plt.subplots(
        down, columns, figsize=(width, 3.3 * down + 0.25 * len(runs)), squeeze=False, layout='constrained'
    )
    axes, colours = list(axes.flat), plt.get_cmap('tab10' if len(runs) <= 10 else 'tab20').colors
    for axis, (title, meaning, metrics) in zip(axes, shown, strict=False):
        for i, (_, rows, _) in enumerate(runs):
            for j, metric in enumerate(metrics):
                look = {'color': colours[i % len(colours)], 'linestyle': ['-', '--'][j]}
                x, y = curve(rows, 'train', metric)
                axis.plot(x, smoothed(y), linewidth=1, alpha=0.6, **look)
                x, y = curve(rows, 'eval', metric)
                axis.plot(
                    x,
                    y,
                    marker='o',
                    markersize=5,
                    linewidth=1.5 * (len(x) > 2),
                    markerfacecolor=['auto', 'white'][j],
                    **look,
                )
        axis.set(xlabel='training examples')
        entitle(axis, title, meaning)
    if any(points):
        axis = axes[len(shown)]
        for i, found in enumerate(points):
            kl, gold, error = zip(*found, strict=True) if found else ((), (), ())
            look = {'color': colours[i % len(colours)]}
            axis.plot(kl, gold, linewidth=1, alpha=0.6, **look)
            axis.errorbar(kl, gold, error, fmt='none', alpha=0.35, **look)
            axis.scatter(kl, gold, [18 if j < len(kl) - 1 else 80 for j in range(len(kl))], **look)
        axis.set(xlabel='KL(policy || reference), nats an answer')
        entitle(axis, 'gold reward against KL', 'mean of sampled answers, standard error; large: the last ones')
    for axis in axes[count:]:
        axis.remove()
    handles = [
        plt.Line2D([], [], color=colours[i % len(colours)], marker='o', label=name) for i, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc='outside lower center', frameon=False)
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {out}: {getattr(error, "strerror", None) or error}') from None
    print(f'{out}: {len(runs)} runs, {count} panels')


if not folders:
    raise UserError(
        "name the folders to draw: python -m tools.plot out/a out/b; what they are called is a run's --out_dir"
    )
draw([read(folder) for folder in folders])
