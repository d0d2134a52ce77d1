"""What papers claim, as differences that can be measured on the toy world, and the rule that decides. Fixed before any reported run.

The rule. A claim is a difference between two methods, in the direction in which the paper says it is positive, measured once
for every seed; both methods see the same pairs, the same flips and the same sampling noise. The
score is the gold reward minus 0.25 times the KL. From the seeds' differences come a mean and a one-sided 95% confidence bound
on either side (Student's t). A claim has a threshold, 0 for "better than" and -d for "as good as", where d is the smallest
difference worth a name: 0.05 of gold reward or score, 0.01 of accuracy, a tenth of a KL.
  holds             the lower bound is above the threshold
  does not hold     it does not hold, and the upper bound is below the threshold + d
  cannot tell here  anything else; also fewer than two seeds, or a run that failed or is missing
"""

import statistics
from typing import NamedTuple

from experiments.claims.grid import FLIPS, ONLINE, Grid, key, name_of, score

HOLDS, NOT, OPEN = 'holds', 'does not hold', 'cannot tell here'
T95 = {
    1: 6.314,
    2: 2.920,
    3: 2.353,
    4: 2.132,
    5: 2.015,
    6: 1.943,
    7: 1.895,
    8: 1.860,
    9: 1.833,
}  # by degrees of freedom
SMALLEST = {'score': 0.05, 'gold': 0.05, 'accuracy': 0.01, 'share': 0.1}


class Claim(NamedTuple):
    """One claim: the paper's words in ours, what is measured, difference(seed) -> float, its unit (a key of SMALLEST), and
    whether it says better than (threshold 0) or as good as (threshold -d)."""

    words: str
    measured: str
    difference: object
    unit: str = 'score'
    better: bool = True


def bounds(differences):
    """(mean, standard error, lower, upper) of the seeds' differences; needs two or more."""
    n, mean = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / n**0.5
    reach = T95.get(n - 1, 1.8) * error
    return mean, error, mean - reach, mean + reach


def verdict(differences, unit='score', better=True):
    """The rule above. differences: one number a seed, None where a run is missing or failed."""
    if len(differences) < 2 or None in differences:
        return OPEN
    _, _, lower, upper = bounds(differences)
    threshold = 0.0 if better else -SMALLEST[unit]
    if lower > threshold:
        return HOLDS
    return NOT if upper < threshold + SMALLEST[unit] else OPEN


def judge(claim, seeds):
    """(verdict, differences) of a claim; a missing or failed run makes its seed's difference None."""
    differences = []
    for seed in seeds:
        try:
            differences.append(claim.difference(seed))
        except KeyError:
            differences.append(None)
    return verdict(differences, claim.unit, claim.better), differences


# ---- what is measured ----


def curve(points, at):
    """The gold reward at sqrt(KL) = at, on straight lines between (sqrt(KL), gold) points in order of KL."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0) if x1 > x0 else max(y0, y1)
    raise KeyError(at)


def above(ours, theirs, steps=20):
    """Mean difference of two frontiers, lists of (KL, gold), over the sqrt(KL) that both reach. KeyError if there is none."""
    ours, theirs = (sorted((kl**0.5, gold) for kl, gold in points) for points in (ours, theirs))
    low, high = max(ours[0][0], theirs[0][0]), min(ours[-1][0], theirs[-1][0])
    if low >= high:
        raise KeyError('the frontiers share no range of KL')
    grid = [low + (high - low) * (i + 0.5) / steps for i in range(steps)]
    return statistics.mean(curve(ours, x) - curve(theirs, x) for x in grid)


def claims(grid: Grid, results):
    """The claims, in the order of the report. results: key of a trial -> result; a KeyError is a missing or failed run."""

    def value(trial, metric):
        result = results[key(trial)]
        if 'error' in result:
            raise KeyError(result['error'])
        return score(result) if metric == 'score' else result[metric]

    def flipped(method, metric, seed):
        return statistics.mean(value(grid.flips(method, r, seed), metric) for r in grid.rates if r)

    def fall(method, metric, seed):
        return value(grid.flips(method, 0.0, seed), metric) - value(grid.flips(method, max(grid.rates), seed), metric)

    def over_betas(method, seed):
        return [value(grid.beta(method, b, 'mixed', seed), 'score') for b in grid.betas]

    def frontier(method, seed):
        """(KL, gold) of the SFT model and of the method at every beta."""
        trials = [grid.reference(seed), *(grid.pull(method, x, seed) for x in grid.pulls(method))]
        return [(value(t, 'kl'), value(t, 'gold')) for t in trials]

    def forward(method, seed):
        """Forward KL on chosen and rejected answers, one number a beta."""
        trials = [grid.pull(method, x, seed) for x in grid.frontier_betas]
        return [value(t, 'kl_chosen') + value(t, 'kl_rejected') for t in trials]

    def lower_kl(ours, theirs, seed):
        pairs = zip(forward(ours, seed), forward(theirs, seed), strict=True)
        return statistics.mean(1 - a / b for a, b in pairs)

    def other(method, seed):
        return value(grid.other(method, seed), 'score')

    flips = f'{min(r for r in grid.rates if r):.0%} to {max(grid.rates):.0%} flipped labels'
    yield Claim('Dr. DPO is more accurate than DPO under flips (2407.07880)', f'accuracy, mean over {flips}',
                lambda s: flipped('drdpo', 'accuracy', s) - flipped('dpo', 'accuracy', s), 'accuracy')  # fmt: skip
    for name in FLIPS:
        if name != 'dpo':
            paper = {'cdpo': 'cDPO note', 'robust': '2403.00409', 'ipo': '2310.12036', 'drdpo': '2407.07880'}[name]
            yield Claim(f'{name_of(name)} is better than DPO under flips ({paper})', f'score, mean over {flips}',
                        lambda s, name=name: flipped(name, 'score', s) - flipped('dpo', 'score', s))  # fmt: skip
    yield Claim('Dr. DPO loses less than DPO by flips (2407.07880)', f'fall of the score from 0 to {max(grid.rates):.0%} flips',
                lambda s: fall('dpo', 'score', s) - fall('drdpo', 'score', s))  # fmt: skip
    yield Claim('beta-DPO depends less on beta than DPO (2407.08639)', 'largest minus smallest score over beta, mixed pairs',
                lambda s: _range(over_betas('dpo', s)) - _range(over_betas('beta_dpo', s)))  # fmt: skip
    yield Claim('beta-DPO beats DPO on pairs of mixed gap (2407.08639)', 'score, mean over beta, mixed pairs',
                lambda s: statistics.mean(over_betas('beta_dpo', s)) - statistics.mean(over_betas('dpo', s)))  # fmt: skip
    for name in grid.frontier:
        base = {'radpo1': 'tdpo1', 'radpo2': 'tdpo2'}.get(name.split()[0], 'dpo' if name.startswith('tdpo') else None)
        if base not in grid.frontier:
            continue
        paper = '2404.11999' if base == 'dpo' else '2505.20359'
        yield Claim(f'{name_of(name)} gets more reward than {name_of(base)} at the same KL ({paper})', 'gold reward between the frontiers',
                    lambda s, a=name, b=base: above(frontier(a, s), frontier(b, s)), 'gold')  # fmt: skip
        yield Claim(f'{name_of(name)} stays nearer to the reference than {name_of(base)} ({paper})', 'forward KL on held-out pairs, same beta: share less',
                    lambda s, a=name, b=base: lower_kl(a, b, s), 'share')  # fmt: skip
    if 'kto 1:1' in grid.others:
        yield Claim('KTO is as good as DPO without pairs (2402.01306)', 'score',
                    lambda s: other('kto 1:1', s) - other('dpo', s), better=False)  # fmt: skip
    for name in grid.others:
        if name.startswith('kto') and name != 'kto 1:1':
            yield Claim(f'KTO with {name[4:]} good to bad answers is as good as with 1:1 (2402.01306)', 'score',
                        lambda s, name=name: other(name, s) - other('kto 1:1', s), better=False)  # fmt: skip
    yield Claim(
        'SimPO, without a reference, beats DPO (2405.14734)',
        'score',
        lambda s: other('simpo', s) - other('dpo', s),
    )
    yield Claim('ORPO, without a reference, is as good as DPO (2403.07691)', 'score',
                lambda s: other('orpo', s) - other('dpo', s), better=False)  # fmt: skip
    for name in ONLINE:
        yield Claim(f'{name_of(name)} on the gold reward is above DPO at the same KL', 'gold reward between the frontiers',
                    lambda s, name=name: above(frontier(name, s), frontier('dpo', s)), 'gold')  # fmt: skip


def _range(values):
    return max(values) - min(values)
