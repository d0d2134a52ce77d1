"""Flipped labels without a network: a log-linear policy on the toy world's pairs, with exact gold reward and KL.

    python -m experiments.claims.loglinear     # twenty seeds in a minute: record/loglinear.md, loglinear.png

The policy of a prompt chooses among 300 answers: log pi(y) = log pi_ref(y) + theta . f(y) + constant. f counts the answer's words (plain
and after "very"), and its aspects by place. So d, the log-ratio of a pair, is theta . (f_w - f_l), and gold reward and KL are sums.

Of one pair, labelled rightly with probability p, the gradients cancel at h = beta d with p c(h) = (1 - p) c(-h). c is the size of a
gradient: S(-h) for DPO, S(-h) S(h)^(1/b') for Dr. DPO; S is the sigmoid, b' is beta'. So h* = logit(p) / (1 - 1/b'): where b' <= 1 there is no
finite optimum, and nothing stops the margin. At b' = 1 c is even, so a flipped pair keeps its share of the gradient instead of gaining.
"""

import functools
import itertools
import random
from pathlib import Path

import numpy as np

from configurator import configure
from experiments import table
from experiments.claims.report import interval
from experiments.claims.trial import gap
from text import toy

n_seeds = 20  # each with its own pairs, flips and order
out_dir = 'experiments/claims/record'  # where loglinear.md and loglinear.png go

N_TRAIN, N_TEST, N_ANSWERS, BATCH, BETA = 2560, 2000, 300, 64, 0.1
FLIPS = (0.0, 0.2, 0.4)
STEPS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # learning rates of Adam, one epoch: 40 steps
# at equal settings, (beta', factor of beta); beta' infinity is DPO
METHODS = {
    'DPO': (np.inf, 1.0),
    "Dr. DPO, beta' 1": (1.0, 1.0),
    "Dr. DPO, beta' 4": (4.0, 1.0),
    'DPO, beta / 4': (np.inf, 0.25),
}
# both tuned, 24 settings each: (beta', beta), times the six step sizes; on seeds that are not reported
TUNED = {
    'DPO': [(np.inf, beta) for beta in (0.03, 0.1, 0.3, 1.0)],
    'Dr. DPO': [(beta_prime, beta) for beta_prime in (1.0, 4.0) for beta in (0.1, 1.0)],
}
TUNING_SEEDS = range(1000, 1005)


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def size(h, beta_prime):
    """Return c(h), the size of a pair's gradient, up to a factor common to the step. beta_prime infinity: DPO."""
    return sigmoid(-h) * sigmoid(h) ** (1 / beta_prime)


def features(prompt, answers):
    """Return f of the answers to one prompt: (answers, features)."""
    words, aspects, places = list(toy.VALUES), toy.ASPECTS, list(toy.PLACES)
    place = places.index(prompt.removeprefix('Review of the ').removesuffix(':'))
    of_place = 2 * len(words) + place * len(aspects)  # where the counts of this place's aspects begin
    out = np.zeros((len(answers), 2 * len(words) + len(places) * len(aspects)))
    for row, answer in zip(out, answers, strict=True):
        for aspect, very, word in toy._clauses(answer):
            row[words.index(word) + very * len(words)] += 1
            row[of_place + aspects.index(aspect)] += 1
    return out


@functools.lru_cache(1)
def answer_sets():
    """Return for every place f (answers, features) and gold reward (answers,) of the answers that the policy chooses among."""
    rng, sets = random.Random('log-linear answers'), []
    for prompt in (f'Review of the {place}:' for place in toy.PLACES):
        answers = [toy.demonstration(prompt, rng) for _ in range(N_ANSWERS)]
        gold = np.array([toy.gold(prompt, answer) for answer in answers])
        sets.append((features(prompt, answers), gold))
    return sets


@functools.lru_cache(64)
def world(seed):
    """Return f_w - f_l (pairs, features) of the training pairs of a seed, and of its test pairs, labelled by the gold reward."""
    parts = []
    for split, n in (('train', N_TRAIN), ('test', N_TEST)):
        differences = []
        for pair in toy.pairs(f'log-linear {split} {seed}', n):
            chosen, rejected = features(pair['prompt'], [pair['chosen'], pair['rejected']])
            sign = 1.0 if split == 'train' else np.sign(gap(pair))
            if sign:
                differences.append(sign * (chosen - rejected))
        parts.append(np.array(differences))
    return parts


def train(x, flipped, beta, beta_prime, lr, order):
    """Train for one epoch of Adam. Returns theta, and the flipped pairs' share of the gradient, its mean over the run.

    x: f_w - f_l of the training pairs, flips included; flipped: which are (pairs,); order: the rows of each step."""
    theta, first, second = np.zeros((3, x.shape[1]))
    shares = []
    for t, rows in enumerate(order, 1):
        h = beta * x[rows] @ theta
        # the weights of Dr. DPO are over the whole step
        share = sigmoid(h) ** (1 / beta_prime)
        gradient = -beta * (share / share.sum() * sigmoid(-h)) @ x[rows]
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        sizes = size(h, beta_prime)
        shares.append(sizes[flipped[rows]].sum() / sizes.sum())
        scale = (second / (1 - 0.999**t)) ** 0.5 + 1e-8
        theta = theta - lr * (first / (1 - 0.9**t)) / scale
    return theta, np.mean(shares)


def exact(theta):
    """Return gold reward and KL(policy || reference), expectations over all answers; the mean over prompts."""
    numbers = []
    for f, gold in answer_sets():
        score = f @ theta - (f @ theta).max()
        log_ratio = score - np.log(np.exp(score).mean())
        p = np.exp(log_ratio) / len(score)
        numbers.append((p @ gold, p @ log_ratio))
    return np.mean(numbers, axis=0)


def run(seed, flips, beta, beta_prime, lr):
    """Train and measure one policy. Returns a dictionary of numbers."""
    x, test = world(seed)
    rng = np.random.default_rng(seed)
    flipped = rng.random(len(x)) < flips
    x = np.where(flipped[:, None], -x, x)
    order = rng.permutation(len(x)).reshape(-1, BATCH)
    theta, share = train(x, flipped, beta, beta_prime, lr, order)
    margin, h = test @ theta, beta * x @ theta
    sizes = size(h, beta_prime)
    gold, kl = exact(theta)
    return {
        'accuracy': (margin > 0).mean() + (margin == 0).mean() / 2,  # a margin of exactly 0 is half right
        'gold': gold, 'kl': kl, 'h_std': h.std(), 'margin': margin.mean() / margin.std(),
        'share': share, 'last_share': sizes[flipped].sum() / sizes.sum(),
    }  # fmt: skip


def runs(seeds, *setting):
    """Do a run for every seed. Returns {metric: array by seed}."""
    found = [run(seed, *setting) for seed in seeds]
    return {metric: np.array([numbers[metric] for numbers in found]) for metric in found[0]}


def equal_settings(seeds):
    """Return {(method, flips, step size): {metric: array by seed}} for methods at equal beta and step size."""
    found = {}
    for (name, (beta_prime, factor)), flips, lr in itertools.product(METHODS.items(), FLIPS, STEPS):
        found[name, flips, lr] = runs(seeds, flips, BETA * factor, beta_prime, lr)
    return found


def tuned(seeds):
    """Return a table row for each share of flips: each method at its best of 24 settings on other seeds, and the difference."""
    rows = []
    for flips in FLIPS:
        row, best = [f'{flips:.0%}'], []
        for name, settings in TUNED.items():
            grid = [(beta, beta_prime, lr) for (beta_prime, beta), lr in itertools.product(settings, STEPS)]
            score = np.array([runs(TUNING_SEEDS, flips, *setting)['accuracy'].mean() for setting in grid])
            beta, beta_prime, lr = grid[score.argmax()]
            best.append(runs(seeds, flips, beta, beta_prime, lr)['accuracy'])
            words = f'beta {beta:g}, step {lr:g}'
            if name != 'DPO':
                words += f", beta' {beta_prime:g}"
            near = (score > score.max() - 0.02).sum()
            row += [words, f'{best[-1].mean():.3f}', f'{near} of {len(grid)}']
        rows.append([*row, interval(list(best[1] - best[0]))])
    return rows


def report(found, tuned_rows, n):
    """Return the text of loglinear.md."""
    others, rows = list(METHODS)[1:], []
    for flips, lr in itertools.product(FLIPS, STEPS):
        dpo = found['DPO', flips, lr]
        row = [f'{flips:.0%}', f'{lr:g}', f'{dpo["h_std"].mean():.2f}', f'{dpo["accuracy"].mean():.3f}']
        for name, metric in [*((name, 'accuracy') for name in others), (others[0], 'gold'), (others[0], 'kl')]:
            row.append(interval(list(found[name, flips, lr][metric] - dpo[metric])))
        for name in METHODS:
            means = {metric: values.mean() for metric, values in found[name, flips, lr].items()}
            row.append('{share:.3f}, {last_share:.3f}; {margin:.2f}'.format(**means))
        rows.append(row)
    columns = ['flips', 'step', 'DPO: std of beta d', 'DPO: accuracy', *others, f'{others[0]}: gold', 'KL']
    columns += [f'{name}: shares; margin' for name in METHODS]
    sides = [f'{name}: {what}' for name in TUNED for what in ('found', 'accuracy', 'within .02 of its best')]
    return f"""# A log-linear policy under flipped labels

Written by `experiments/claims/loglinear.py`: {n} seeds, paired differences from DPO with their 95% interval.

## Equal settings

beta {BETA:g}, 40 steps of Adam. Differences from DPO at the same beta and step size: in accuracy, and in gold reward and KL. The last columns:
the flipped pairs' share of the gradient, its mean over the run and after it; and the held-out margin's mean over its standard deviation.

{table(columns, rows)}## Both tuned

The best of 24 settings by accuracy on five other seeds; last, Dr. DPO minus DPO.

{table(['flips', *sides, 'difference'], tuned_rows)}"""


def plot(found, path):
    """Plot the difference in accuracy from DPO against the step size, a panel for each method, a line for each share of flips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout='tight')
    axes = figure.subplots(1, len(METHODS) - 1, sharey=True)
    for axis, name in zip(axes, list(METHODS)[1:], strict=True):
        for flips in FLIPS:
            ours, dpo = ([found[method, flips, lr]['accuracy'] for lr in STEPS] for method in (name, 'DPO'))
            gain = np.subtract(ours, dpo)  # (step sizes, seeds)
            errors = 1.96 * gain.std(1, ddof=1) / gain.shape[1] ** 0.5
            axis.errorbar(STEPS, gain.mean(1), errors, marker='.', capsize=2, label=f'{flips:.0%} flips')
        axis.axhline(0, color='k', linewidth=0.6)
        axis.set(xscale='log', title=f'{name}, minus DPO', xlabel='step size')
    axes[0].set_ylabel('accuracy')
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    configure(globals())
    out, seeds = Path(out_dir), range(1, n_seeds + 1)
    out.mkdir(parents=True, exist_ok=True)
    found = equal_settings(seeds)
    text = report(found, tuned(seeds), n_seeds)
    (out / 'loglinear.md').write_text(text.rstrip() + '\n')
    plot(found, out / 'loglinear.png')
    print(text)
