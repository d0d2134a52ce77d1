"""The claims about flipped labels without a network: a log-linear policy on the toy world's pairs, with exact gold reward and KL.

    python -m experiments.claims.loglinear     # twenty seeds in a minute: record/loglinear.md, loglinear.png

The policy of a prompt chooses among 300 answers: log pi(y) = log pi_ref(y) + theta . f(y) + constant. f counts the answer's words (plain
and after "very"), and its aspects by place. So d, the log-ratio of a pair, is theta . (f_w - f_l), and gold reward and KL are sums.

Of one pair, labelled rightly with probability p, the gradients cancel at h = beta d with p c(h) = (1 - p) c(-h). c is the size of a
gradient: S(-h) for DPO, S(-h) S(h)^(1/b') for Dr. DPO; S is the sigmoid, b' is beta'. So h* = logit(p) / (1 - 1/b'): where b' <= 1 there is no
finite optimum, and nothing stops the margin. At b' = 1 c is even, so a flipped pair keeps its share of the gradient instead of gaining.
"""

import functools
import itertools
from pathlib import Path

import numpy as np

from configurator import configure
from text import toy

n_seeds = 20  # each with its own pairs, flips and order
out_dir = 'experiments/claims/record'  # where loglinear.md and loglinear.png go

N_TRAIN, N_TEST, N_ANSWERS, BATCH = 2560, 2000, 300, 64
FLIPS = (0.0, 0.2, 0.4)
STEPS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # learning rates of Adam, one epoch: 40 steps
BETA = 0.1
# at equal settings, name: (beta', factor of beta); beta' infinity is DPO
METHODS = {
    'DPO': (np.inf, 1.0), "Dr. DPO, beta' 1": (1.0, 1.0), "Dr. DPO, beta' 4": (4.0, 1.0), 'DPO, beta / 4': (np.inf, 0.25),
}  # fmt: skip
# both tuned, 24 settings each: (beta', beta), times the six step sizes
TUNED = {
    'DPO': [(np.inf, beta) for beta in (0.03, 0.1, 0.3, 1.0)],
    'Dr. DPO': [(beta_prime, beta) for beta_prime in (1.0, 4.0) for beta in (0.1, 1.0)],
}
TUNING_SEEDS = range(1000, 1005)  # not reported


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def size(h, beta_prime):
    """c(h): the size of a pair's gradient, up to a factor common to the step. beta_prime infinity: DPO."""
    return sigmoid(-h) * sigmoid(h) ** (1 / beta_prime)


def optimum(p, beta_prime):
    """h* of a pair that is labelled rightly with probability p > 1/2; infinite for beta' <= 1."""
    return np.inf if beta_prime <= 1 else np.log(p / (1 - p)) / (1 - 1 / beta_prime)


# ---- the world, as features ----


def features(prompt, answers):
    """f of answers to one prompt: (answers, features)."""
    words, aspects, places = list(toy.VALUES), toy.ASPECTS, list(toy.PLACES)
    place = places.index(prompt.removeprefix('Review of the ').removesuffix(':'))
    out = np.zeros((len(answers), 2 * len(words) + len(places) * len(aspects)))
    for row, answer in zip(out, answers, strict=True):
        for aspect, very, word in toy._clauses(answer):
            row[words.index(word) + very * len(words)] += 1
            row[2 * len(words) + place * len(aspects) + aspects.index(aspect)] += 1
    return out


@functools.lru_cache(1)
def answer_sets():
    """Of every place: f (answers, features) and gold reward (answers,) of the answers that the policy chooses among."""
    prompts = [f'Review of the {place}:' for place in toy.PLACES]
    rng = toy.random.Random('log-linear answers')
    sets = [[toy.demonstration(prompt, rng) for _ in range(N_ANSWERS)] for prompt in prompts]
    gold = [np.array([toy.gold(prompt, y) for y in answers]) for prompt, answers in zip(prompts, sets, strict=True)]
    return [features(prompt, answers) for prompt, answers in zip(prompts, sets, strict=True)], gold


@functools.lru_cache(64)
def world(seed):
    """The pairs of a seed: f_w - f_l of training (pairs, features) and of test, which the gold reward itself labels."""
    parts = []
    for split, n in (('train', N_TRAIN), ('test', N_TEST)):
        pairs = list(toy.pairs(f'log-linear {split} {seed}', n))
        both = np.array([features(p['prompt'], [p['chosen'], p['rejected']]) for p in pairs])
        gap = np.array([toy.gold(p['prompt'], p['chosen']) - toy.gold(p['prompt'], p['rejected']) for p in pairs])
        difference = both[:, 0] - both[:, 1]
        parts.append(difference if split == 'train' else (difference * np.sign(gap)[:, None])[gap != 0])
    return parts


# ---- one run ----


def train(x, beta, beta_prime, lr, order):
    """theta after one epoch of Adam. x: f_w - f_l of the training pairs, flips included; order: rows, a step in a row."""
    theta, first, second = np.zeros((3, x.shape[1]))
    for t, rows in enumerate(order, 1):
        h = beta * x[rows] @ theta
        # the weights of Dr. DPO are over the whole step
        share = sigmoid(h) ** (1 / beta_prime)
        share /= share.sum()
        gradient = -beta * (share * sigmoid(-h)) @ x[rows]

        # Adam, with its usual momenta
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        theta = theta - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)) ** 0.5 + 1e-8)
    return theta


def run(seed, flips, beta, beta_prime, lr):
    """Train and measure one policy: a dictionary of numbers."""
    x, test = world(seed)
    rng = np.random.default_rng(seed)
    flipped = rng.random(len(x)) < flips
    x = np.where(flipped[:, None], -x, x)
    theta = train(x, beta, beta_prime, lr, rng.permutation(len(x)).reshape(-1, BATCH))
    margin, h = test @ theta, beta * x @ theta
    sizes = size(h, beta_prime)
    gold, kl = exact(theta)
    return {
        # a margin of exactly 0 is half right
        'accuracy': (margin > 0).mean() + (margin == 0).mean() / 2,
        'gold': gold,
        'kl': kl,
        'h_std': h.std(),
        'margin': margin.mean() / margin.std(),
        'flipped_share': sizes[flipped].sum() / sizes.sum(),
    }


def exact(theta):
    """Gold reward and KL(policy || reference), summed over all answers; the mean over prompts."""
    golds, kls = [], []
    for f, gold in zip(*answer_sets(), strict=True):
        score = f @ theta
        log_ratio = score - score.max() - np.log(np.exp(score - score.max()).mean())
        p = np.exp(log_ratio) / len(score)
        golds.append(p @ gold)
        kls.append(p @ log_ratio)
    return np.mean(golds), np.mean(kls)


# ---- all runs, the table and the plot ----


def mean_se(values):
    """'+0.123 (0.004)': mean and standard error."""
    return f'{np.mean(values):+.3f} ({np.std(values, ddof=1) / len(values) ** 0.5:.3f})'


def equal_settings(seeds):
    """{(method, flips, step): [result of each seed]} at equal beta and step size."""
    found = {}
    for seed in seeds:
        for (name, (beta_prime, factor)), flips, lr in itertools.product(METHODS.items(), FLIPS, STEPS):
            found.setdefault((name, flips, lr), []).append(run(seed, flips, BETA * factor, beta_prime, lr))
    return found


def tuned(seeds):
    """Rows (method, flips, setting, accuracy, settings within 0.02 of the best): each method at its best of 24 on other seeds."""
    rows = []
    for flips, (name, settings) in itertools.product(FLIPS, TUNED.items()):
        grid = list(itertools.product(settings, STEPS))
        score = np.zeros(len(grid))
        for seed in TUNING_SEEDS:
            score += [run(seed, flips, beta, b, lr)['accuracy'] for (b, beta), lr in grid]
        score /= len(TUNING_SEEDS)
        (beta_prime, beta), lr = grid[score.argmax()]
        best = [run(seed, flips, beta, beta_prime, lr)['accuracy'] for seed in seeds]
        setting = f'beta {beta:g}, step {lr:g}' + (f", beta' {beta_prime:g}" if name != 'DPO' else '')
        rows.append(
            (name, f'{flips:.0%}', setting, mean_se(best), f'{(score > score.max() - 0.02).sum()} of {len(grid)}')
        )
    return rows


def table(head, rows):
    """A markdown table."""
    lines = [head, ['---'] * len(head), *rows]
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines) + '\n'


def difference(found, name, flips, lr, metric='accuracy'):
    """A method's metric minus DPO's, a number a seed."""
    return np.array(
        [a[metric] - b[metric] for a, b in zip(found[name, flips, lr], found['DPO', flips, lr], strict=True)]
    )


def report(found, tuned_rows, n):
    """The text of loglinear.md."""
    text = f'# A log-linear policy under flipped labels\n\nWritten by `experiments/claims/loglinear.py`. {n} seeds, standard errors over them.\n\n'
    text += f'## Equal settings\n\nbeta {BETA:g}, 40 steps of Adam. Accuracy minus that of DPO at the same beta and step size.\n\n'
    others = list(METHODS)[1:]
    columns = [
        'flips',
        'step',
        'DPO: std of beta d',
        'DPO: accuracy',
        *others,
        *(f'{m}: gold' for m in others[:1]),
        *(f'{m}: KL' for m in others[:1]),
    ]
    rows = []
    for flips, lr in itertools.product(FLIPS, STEPS):
        dpo = found['DPO', flips, lr]
        row = [
            f'{flips:.0%}',
            f'{lr:g}',
            f'{np.mean([r["h_std"] for r in dpo]):.2f}',
            f'{np.mean([r["accuracy"] for r in dpo]):.3f}',
        ]
        row += [mean_se(difference(found, name, flips, lr)) for name in others]
        row += [mean_se(difference(found, others[0], flips, lr, metric)) for metric in ('gold', 'kl')]
        rows.append(row)
    text += table(columns, rows)

    # where the mechanism shows
    flips = FLIPS[-1]
    text += f'Share of the gradient on flipped pairs after training, {flips:.0%} flips.\n\n'
    rows = [
        [f'{lr:g}', *(f'{np.mean([r["flipped_share"] for r in found[m, flips, lr]]):.3f}' for m in METHODS)]
        for lr in STEPS
    ]
    text += table(['step', *METHODS], rows)
    text += '## Both tuned\n\nThe best of 24 settings by accuracy on five other seeds.\n\n'
    return text + table(['loss', 'flips', 'found', 'accuracy', 'settings within .02 of the best'], tuned_rows)


def plot(found, path):
    """The difference in accuracy from DPO against the step size, a panel a method and a line a share of flips."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    others = list(METHODS)[1:]
    figure, axes = plt.subplots(1, len(others), figsize=(9, 2.8), sharey=True)
    for axis, name in zip(axes, others, strict=True):
        for flips in FLIPS:
            values = [difference(found, name, flips, lr) for lr in STEPS]
            errors = [1.96 * v.std(ddof=1) / len(v) ** 0.5 for v in values]
            axis.errorbar(STEPS, [v.mean() for v in values], errors, marker='.', capsize=2, label=f'{flips:.0%} flips')
        axis.axhline(0, color='k', linewidth=0.6)
        axis.set(xscale='log', title=f'{name}, minus DPO', xlabel='step size')
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('accuracy')
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main():
    configure(globals())
    out, seeds = Path(out_dir), range(1, n_seeds + 1)
    out.mkdir(parents=True, exist_ok=True)
    found = equal_settings(seeds)
    text = report(found, tuned(seeds), n_seeds)
    (out / 'loglinear.md').write_text(text.rstrip() + '\n')
    plot(found, out / 'loglinear.png')
    print(text)


if __name__ == '__main__':
    main()
