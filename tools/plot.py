"""Draw the curves of runs side by side: loss, accuracy, margins, log-probs, KL, and gold reward against KL. One PNG.

    python -m tools.plot out/dpo_toy out/drdpo_toy --out=plot.png

Options are given as --name=value; every other word is the folder of a run.
Thin lines are training steps, smoothed; points are evaluations of held-out examples. A run is named by its folder and by the
options in which the runs differ. The last panel needs evaluations with --sample_during_eval on the toy world, whose gold
reward is known, or ppo.py's metric gold/eval.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import statistics
import sys
from pathlib import Path

import numpy as np

from configurator import UserError, configure
from tools.runs import gold, labels, panels_of, read, smoothed, value_of

out = 'plot.png'  # the picture; its ending decides the format (png, pdf, svg)
smooth = 0.04  # training curves: mean over this fraction of a run's steps; 0: every step as it is
width = 13.0  # inches
config = configure(globals(), [x for x in sys.argv[1:] if x.startswith('-')])
folders = [Path(x) for x in sys.argv[1:] if not x.startswith('-')]


def frontier(run):
    """(KLs, gold rewards) of the evaluations that have both: the reward is a metric of ppo.py, or the mean of the samples."""
    points = []
    for row in run.rows:
        if row['split'] != 'eval':
            continue
        answered = [one for one in run.samples if one['examples'] == row['counters/examples']]
        rewards = [gold(one) for one in answered if one['generator'] == 'policy' and gold(one) is not None]
        kl, reward = value_of(row, 'eval', 'kl/samples'), value_of(row, 'eval', 'gold')
        if reward is None and rewards:
            reward = statistics.fmean(rewards)
        if kl is not None and reward is not None:
            points.append((kl, reward))
    return points


def draw(runs):
    """Write the picture."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('plot.py needs a package that is not installed: pip install matplotlib') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    # the panels that have anything to show, three in a row; the frontiers come last
    panels = panels_of(runs)
    frontiers = [frontier(run) for run in runs]
    count = len(panels) + any(frontiers)
    if not count:
        raise UserError('these runs have no metric that is drawn')
    plt.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True})
    plt.rcParams.update({'grid.alpha': 0.25, 'axes.titlesize': 11, 'axes.titleweight': 'bold'})
    across, down = min(3, count), -(-count // 3)
    size = width, 3.3 * down + 0.25 * len(runs)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout='constrained')

    # every run its colour
    palette = plt.get_cmap('tab10' if len(runs) <= 10 else 'tab20').colors
    colours = [palette[i % len(palette)] for i in range(len(runs))]
    for axis, (title, meaning, curves) in zip(axes.flat, panels, strict=False):
        for curve in curves:
            draw_curve(axis, curve, colours[curve.run])
        entitle(axis, title, meaning, 'training examples')
    if any(frontiers):
        axis = axes.flat[len(panels)]
        for points, colour in zip(frontiers, colours, strict=True):
            axis.plot(*np.array(points).reshape(-1, 2).T, color=colour, marker='o', linewidth=1, alpha=0.8)
        kl = 'KL(policy || reference), nats an answer'
        entitle(axis, 'gold reward against KL', 'mean of sampled answers, an evaluation a point', kl)
    for unused in axes.flat[count:]:
        unused.remove()

    # which colour is which run
    names = [name.replace('$', r'\$') for name in labels(runs)]  # else matplotlib reads mathematics
    named = zip(names, colours, strict=True)
    handles = [plt.Line2D([], [], color=colour, marker='o', label=name) for name, colour in named]
    figure.legend(handles=handles, loc='outside lower center', frameon=False)
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {out}: {getattr(error, "strerror", None) or error}') from None
    print(f'{out}: {len(runs)} runs, {count} panels')


def draw_curve(axis, curve, colour):
    """One curve. Of `size` curves in one place each draws its `number`-th dash and a smaller point on the one before."""
    number, size = curve.place
    look = {'color': colour, 'linestyle': '--' if curve.metric else '-'}
    if size > 1:
        look['linestyle'] = (6 * number, (6, 6 * (size - 1)))
    if curve.split == 'train':
        axis.plot(curve.examples, smoothed(curve.values, smooth), linewidth=1, alpha=0.6, **look)
        return
    line = 1.5 if len(curve.examples) > 2 else 0
    point = {'marker': 'o', 'markersize': 5 + 3 * (size - 1 - number)}
    if curve.metric:
        point['markerfacecolor'] = 'white'
    axis.plot(curve.examples, curve.values, linewidth=line, **point, **look)


def entitle(axis, title, meaning, xlabel):
    """Write a panel's title, what it means, and what is on its x axis."""
    axis.set(xlabel=xlabel)
    # a power of ten above the axis would stand in what the panel means
    axis.ticklabel_format(useOffset=False, scilimits=(-9, 9))
    axis.set_title(title, loc='left', pad=17)
    text = axis.text(0, 1.025, meaning, transform=axis.transAxes, fontsize=8, color='0.4', va='bottom')
    text.set_in_layout(False)  # a long one makes no column wider


if not folders:
    raise UserError("name the folders to draw, a run's --out_dir each: python -m tools.plot out/a out/b")
draw([read(folder) for folder in folders])
