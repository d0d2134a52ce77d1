"""Draw the curves of runs side by side: loss, accuracy, margins, log-probs, KL, and gold reward against KL. One PNG.

    python -m tools.plot out/dpo_toy out/drdpo_toy --out=plot.png

Options are given as --name=value; every other word is the folder of a run.
Thin lines are training steps, smoothed; points are evaluations of held-out examples. A run is named by its folder and by the
options in which the runs differ. The last panel needs evaluations with --sample_during_eval on the toy world, whose gold
reward is known, or ppo.py's metric gold/eval.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import math
import statistics
import sys
from pathlib import Path

import numpy as np

from configurator import UserError, configure
from tools.runs import gold, labels, panels_of, read, smoothed, value_of

out = 'plot.png'  # the picture; its ending decides the format (png, pdf, svg)
smooth = 0.04  # training curves: mean over this fraction of a run's steps; 0: every step as it is
width = 13.0  # inches
config = configure(globals(), [word for word in sys.argv[1:] if word.startswith('-')])
folders = [Path(word) for word in sys.argv[1:] if not word.startswith('-')]


def frontier(run):
    """Return the points (KL, gold reward) of a run, one for each evaluation that has both.

    The gold reward is the metric gold/eval of ppo.py, or else the mean over the evaluation's samples of the policy."""
    # a row of metrics.jsonl for each evaluation
    points = []
    evaluations = [row for row in run.rows if row['split'] == 'eval']
    for row in evaluations:
        kl = value_of(row, 'eval', 'kl/samples')
        reward = value_of(row, 'eval', 'gold')
        # its samples are known by the number of training examples so far
        rewards_of_samples = []
        for sample in run.samples:
            is_of_row = sample['examples'] == row['counters/examples']
            if is_of_row and sample['generator'] == 'policy' and gold(sample) is not None:
                rewards_of_samples.append(gold(sample))
        if reward is None and rewards_of_samples:
            reward = statistics.fmean(rewards_of_samples)
        if kl is not None and reward is not None:
            points.append((kl, reward))
    return points


def draw(runs):
    """Draw all panels of the runs into one picture, write it to --out, and print how much is in it.

    Raises UserError if there is nothing to draw, without matplotlib, and if the picture cannot be written."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('plot.py needs a package that is not installed: pip install matplotlib') from None
    # a backend that needs no screen; it must be chosen before pyplot is imported
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    # all panels that show anything, three in a row; gold reward against KL comes last
    panels = panels_of(runs)
    frontiers = [frontier(run) for run in runs]
    has_frontier = any(frontiers)
    count = len(panels) + has_frontier  # True is 1
    if not count:
        raise UserError('these runs have no metric that is drawn')
    plt.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True})
    plt.rcParams.update({'grid.alpha': 0.25, 'axes.titlesize': 11, 'axes.titleweight': 'bold'})
    columns = min(3, count)
    rows = math.ceil(count / 3)
    # inches; the legend has a line for each run
    size = width, 3.3 * rows + 0.25 * len(runs)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained')

    # every run has its colour in all panels
    palette = plt.get_cmap('tab10' if len(runs) <= 10 else 'tab20').colors
    colours = [palette[i % len(palette)] for i in range(len(runs))]
    for axis, panel in zip(axes.flat, panels, strict=False):
        for curve in panel.curves:
            draw_curve(axis, curve, colours[curve.run])
        entitle(axis, panel.title, panel.meaning, 'training examples')
    if has_frontier:
        draw_frontiers(axes.flat[len(panels)], frontiers, colours)
    for unused in axes.flat[count:]:
        unused.remove()

    # the legend: which colour is which run; two $ in a name would be read as mathematics
    names = [name.replace('$', r'\$') for name in labels(runs)]
    named = zip(names, colours, strict=True)
    handles = [plt.Line2D([], [], color=colour, marker='o', label=name) for name, colour in named]
    figure.legend(handles=handles, loc='outside lower center', frameon=False)
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'cannot write {out}: {reason}') from None
    print(f'{out}: {len(runs)} runs, {count} panels')


def draw_frontiers(axis, frontiers, colours):
    """Draw the points of frontier of each run, joined by a line, into the panel of gold reward against KL."""
    for points, colour in zip(frontiers, colours, strict=True):
        # a run without points draws an empty line
        kls, rewards = np.array(points).reshape(-1, 2).T
        axis.plot(kls, rewards, color=colour, marker='o', linewidth=1, alpha=0.8)
    xlabel = 'KL(policy || reference), nats an answer'
    entitle(axis, 'gold reward against KL', 'mean of sampled answers, an evaluation a point', xlabel)


def draw_curve(axis, curve, colour):
    """Draw a Curve: a smoothed line for training steps, points for evaluations, joined by a line if there are three or more.

    Curves that look the same take turns, so that each is seen: every one draws other dashes of the line, and a smaller point
    upon the point of the one before."""
    number, size = curve.place
    is_second = curve.metric == 1
    linestyle = '--' if is_second else '-'
    if size > 1:
        # matplotlib's (offset, (dash, gap)): a dash of 6, and a gap for the dashes of the others
        linestyle = (6 * number, (6, 6 * (size - 1)))
    look = {'color': colour, 'linestyle': linestyle}
    if curve.split == 'train':
        values = smoothed(curve.values, smooth)
        axis.plot(curve.examples, values, linewidth=1, alpha=0.6, **look)
        return
    look['linewidth'] = 1.5 if len(curve.examples) > 2 else 0
    look['markersize'] = 5 + 3 * (size - 1 - number)
    # open points for a panel's second metric
    if is_second:
        look['markerfacecolor'] = 'white'
    axis.plot(curve.examples, curve.values, marker='o', **look)


def entitle(axis, title, meaning, xlabel):
    """Write a panel's title, below it the line with its meaning, and the label of its x axis."""
    axis.set(xlabel=xlabel)
    # numbers in full: a power of ten above the axis would stand in the line with the meaning
    axis.ticklabel_format(useOffset=False, scilimits=(-9, 9))
    axis.set_title(title, loc='left', pad=17)
    text = axis.text(0, 1.025, meaning, transform=axis.transAxes, fontsize=8, color='0.4', va='bottom')
    # the layout does not look at it, so that a long line makes no column wider
    text.set_in_layout(False)


if not folders:
    raise UserError("name the folders to draw, a run's --out_dir each: python -m tools.plot out/a out/b")
draw([read(folder) for folder in folders])
