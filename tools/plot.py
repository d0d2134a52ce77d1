"""Plot the curves of runs into one picture: loss, accuracy, margins, log-probs, KL, and gold reward against KL.

    python -m tools.plot out/dpo_toy out/drdpo_toy --out=plot.png

Arguments without dashes are run folders. Thin lines are training steps, smoothed; points are evaluations on held-out examples. The
legend names a run by its folder and the options in which the runs differ. The last panel needs evaluations with
--sample_during_eval on the toy world, whose gold reward is known, or ppo.py's metric gold/eval."""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import math
import os
import statistics
import textwrap
from pathlib import Path

import numpy as np

from configurator import UserError, configure
from runtime.files import replacing, say
from text.examples import counted
from tools.runs import arguments, gold, labels, panels_of, read, smoothed, value_of

# the picture
out = 'plot.png'  # the extension decides the format (png, pdf, svg)
smooth = 0.04  # moving average of training curves, as a fraction of the run's steps; 0: none
width = 13.0  # inches
flags, folders = arguments()
config = configure(globals(), flags)


def entitle(axis, title, subtitle, xlabel):
    """Set a panel's title, its subtitle, and the label of the x axis."""
    axis.set(xlabel=xlabel)
    # no power of ten above the axis, where it would overlap the subtitle
    axis.ticklabel_format(useOffset=False, scilimits=(-9, 9))
    # a long subtitle must not reach into the next panel: wrap it, by the option --width
    subtitle = textwrap.fill(subtitle, round(5 * width))
    axis.set_title(title, loc='left', pad=17 + 10 * subtitle.count('\n'))
    text = axis.text(0, 1.025, subtitle, transform=axis.transAxes, fontsize=8, color='0.4', va='bottom')
    # a long subtitle must not widen its column
    text.set_in_layout(False)


if not folders:
    raise UserError("name the folders to draw, a run's --out_dir each: python -m tools.plot out/a out/b")
runs = [read(folder) for folder in folders]
os.environ['MPLBACKEND'] = 'Agg'  # headless; a wrong name there would be an error
try:
    import matplotlib.pyplot as plt
except ImportError:
    raise UserError('plot.py needs a package that is not installed: pip install matplotlib') from None

panels = panels_of(runs)
# the (KL, gold reward) of each evaluation that has both, for each run
frontiers = []
for run in runs:
    # without ppo.py's metric gold/eval: the mean over the policy's samples at that evaluation
    sample_rewards = {}  # training examples before the evaluation -> gold rewards
    for sample in run.samples:
        reward = gold(sample) if sample['generator'] == 'policy' else None
        if reward is not None:
            sample_rewards.setdefault(sample['examples'], []).append(reward)
    points = []
    for row in run.rows:
        kl = value_of(row, 'eval', 'kl/samples')
        reward = value_of(row, 'eval', 'gold')
        rewards = sample_rewards.get(row['counters/examples'])
        if reward is None and rewards:
            reward = statistics.fmean(rewards)
        if kl is not None and reward is not None:
            points.append((kl, reward))
    frontiers.append(points)
num_panels = len(panels) + any(frontiers)
if not num_panels:
    raise UserError('these runs have no metric that is drawn')

plt.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True})
plt.rcParams.update({'grid.alpha': 0.25, 'axes.titlesize': 11, 'axes.titleweight': 'bold'})
rows = math.ceil(num_panels / 3)
# inches; the legend has a line for each run
size = width, 3.3 * rows + 0.25 * len(runs)
figure, axes = plt.subplots(rows, min(3, num_panels), figsize=size, squeeze=False, layout='constrained')
palette = plt.get_cmap('tab10' if len(runs) <= 10 else 'tab20').colors
colors = [palette[i % len(palette)] for i in range(len(runs))]

for axis, (title, subtitle, curves) in zip(axes.flat, panels, strict=False):
    for curve in curves:
        points = smoothed(curve.points, smooth) if curve.split == 'train' else curve.points
        examples, values = np.array(points).reshape(-1, 2).T  # also without any
        # curve.extra: earlier runs are wider and lie below later ones, so that identical curves are all visible
        is_second = curve.metric == 1
        style = {'color': colors[curve.run], 'linestyle': '--' if is_second else '-'}
        if curve.split == 'train':
            axis.plot(examples, values, linewidth=1 + curve.extra, alpha=0.6, **style)
            continue
        # points for evaluations, joined if there are more than two; hollow for the panel's second metric
        style['linewidth'] = 1.5 + curve.extra if len(examples) > 2 else 0
        style['markersize'] = 5 + 3 * curve.extra
        if is_second:
            style['markerfacecolor'] = 'white'
        axis.plot(examples, values, marker='o', **style)
    entitle(axis, title, subtitle, 'training examples')

if any(frontiers):
    axis = axes.flat[len(panels)]
    for points, color in zip(frontiers, colors, strict=True):
        # reshape: a run without points draws an empty line
        kls, rewards = np.array(points).reshape(-1, 2).T
        axis.plot(kls, rewards, color=color, marker='o', linewidth=1, alpha=0.8)
    xlabel = 'KL(policy || reference), nats an answer'
    entitle(axis, 'gold reward against KL', 'mean of sampled answers, an evaluation a point', xlabel)
for unused in axes.flat[num_panels:]:
    unused.remove()

# escape $, which would start math mode; replace lone surrogates (of file names that are not UTF-8), which have no glyph
names = [name.replace('$', r'\$').encode('utf-8', 'replace').decode() for name in labels(runs)]
handles = []
for color, name in zip(colors, names, strict=True):
    handles.append(plt.Line2D([], [], color=color, marker='o', label=name))
figure.legend(handles=handles, loc='outside lower center', frameon=False)
# a name without an extension: the name of the file that is written
out = out if Path(out).suffix else f'{out}.png'
with replacing(out) as temporary:
    try:
        figure.savefig(temporary, format=Path(out).suffix[1:], dpi=110)
    except ValueError as error:  # an unknown format
        raise UserError(f'cannot write {out}: {error}') from None
say(f'{out}: {counted(len(runs), "runs")}, {counted(num_panels, "panels")}')
