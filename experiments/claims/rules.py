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
from functools import partial
from typing import NamedTuple

from experiments.claims.grid import FLIPS, ONLINE, Grid, key, name_of, score

HOLDS, NOT, OPEN = 'holds', 'does not hold', 'cannot tell here'
# Student's t by degrees of freedom, from 1; more: 1.8
T95 = dict(enumerate((6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833), 1))
PAPERS = {'cdpo': 'cDPO note', 'robust': '2403.00409', 'ipo': '2310.12036', 'drdpo': '2407.07880'}
BETWEEN = 'gold reward between the frontiers'
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


class Measured:
    """What the claims compare, for one seed at a time. results: key of a trial -> result.

    A method raises KeyError where a run that it needs is missing or has failed."""

    def __init__(self, grid: Grid, results):
        self.grid, self.results = grid, results

    def value(self, trial, metric):
        """One metric of one trial."""
        result = self.results[key(trial)]
        if 'error' in result:
            raise KeyError(result['error'])
        return score(result) if metric == 'score' else result[metric]

    def flipped(self, method, metric, seed):
        """The mean over the rates of flipped labels, without 0."""
        rates = [rate for rate in self.grid.rates if rate]
        return statistics.mean(self.value(self.grid.flips(method, rate, seed), metric) for rate in rates)

    def fall(self, method, seed):
        """By how much the score falls from no flips to the most."""
        clean, worst = (self.grid.flips(method, rate, seed) for rate in (0.0, max(self.grid.rates)))
        return self.value(clean, 'score') - self.value(worst, 'score')

    def over_betas(self, method, seed):
        """The score at every beta, on pairs of mixed gap."""
        return [self.value(self.grid.beta(method, beta, 'mixed', seed), 'score') for beta in self.grid.betas]

    def beta_range(self, method, seed):
        """The largest minus the smallest of these scores."""
        scores = self.over_betas(method, seed)
        return max(scores) - min(scores)

    def frontier(self, method, seed):
        """(KL, gold) of the SFT model and of the method at every beta."""
        strengths = self.grid.pulls(method)
        trials = [self.grid.reference(seed), *(self.grid.pull(method, strength, seed) for strength in strengths)]
        return [(self.value(trial, 'kl'), self.value(trial, 'gold')) for trial in trials]

    def above(self, ours, theirs, seed):
        """The gold reward between two methods' frontiers."""
        return above(self.frontier(ours, seed), self.frontier(theirs, seed))

    def forward_kl(self, method, seed):
        """Forward KL on chosen and rejected answers, one number a beta."""
        trials = [self.grid.pull(method, beta, seed) for beta in self.grid.frontier_betas]
        return [self.value(trial, 'kl_chosen') + self.value(trial, 'kl_rejected') for trial in trials]

    def lower_kl(self, ours, theirs, seed):
        """The share by which our forward KL is lower, mean over beta."""
        pairs = zip(self.forward_kl(ours, seed), self.forward_kl(theirs, seed), strict=True)
        return statistics.mean(1 - a / b for a, b in pairs)

    def gain(self, ours, theirs, seed):
        """The score of one of the other methods above that of another."""
        ours, theirs = (self.value(self.grid.other(method, seed), 'score') for method in (ours, theirs))
        return ours - theirs


def claims(grid: Grid, results):
    """The claims, in the order of the report. results: key of a trial -> result; a KeyError is a missing or failed run."""
    measured = Measured(grid, results)
    yield from _flip_claims(measured, grid)
    yield from _beta_claims(measured)
    yield from _frontier_claims(measured, grid)
    yield from _other_claims(measured, grid)
    for name in ONLINE:
        words = f'{name_of(name)} on the gold reward is above DPO at the same KL'
        yield Claim(words, BETWEEN, partial(measured.above, name, 'dpo'), 'gold')


def _flip_claims(measured, grid):
    """Labels that are flipped."""

    def more(metric, method):
        return lambda seed: measured.flipped(method, metric, seed) - measured.flipped('dpo', metric, seed)

    flips = f'{min(rate for rate in grid.rates if rate):.0%} to {max(grid.rates):.0%} flipped labels'
    words = 'Dr. DPO is more accurate than DPO under flips (2407.07880)'
    yield Claim(words, f'accuracy, mean over {flips}', more('accuracy', 'drdpo'), 'accuracy')
    for name in FLIPS:
        if name != 'dpo':
            words = f'{name_of(name)} is better than DPO under flips ({PAPERS[name]})'
            yield Claim(words, f'score, mean over {flips}', more('score', name))
    words = 'Dr. DPO loses less than DPO by flips (2407.07880)'
    fall = f'fall of the score from 0 to {max(grid.rates):.0%} flips'
    yield Claim(words, fall, lambda seed: measured.fall('dpo', seed) - measured.fall('drdpo', seed))


def _beta_claims(measured):
    """beta-DPO on pairs of mixed gap."""

    def narrower(seed):
        return measured.beta_range('dpo', seed) - measured.beta_range('beta_dpo', seed)

    def better(seed):
        ours, theirs = (statistics.mean(measured.over_betas(method, seed)) for method in ('beta_dpo', 'dpo'))
        return ours - theirs

    words = 'beta-DPO depends less on beta than DPO (2407.08639)'
    yield Claim(words, 'largest minus smallest score over beta, mixed pairs', narrower)
    words = 'beta-DPO beats DPO on pairs of mixed gap (2407.08639)'
    yield Claim(words, 'score, mean over beta, mixed pairs', better)


def _frontier_claims(measured, grid):
    """Reward against KL: each method with what its paper starts from, where both are in the grid."""
    for name in grid.frontier:
        base = {'radpo1': 'tdpo1', 'radpo2': 'tdpo2'}.get(name.split()[0], 'dpo' if name.startswith('tdpo') else None)
        if base not in grid.frontier:
            continue
        paper = '2404.11999' if base == 'dpo' else '2505.20359'
        words = f'{name_of(name)} gets more reward than {name_of(base)} at the same KL ({paper})'
        yield Claim(words, BETWEEN, partial(measured.above, name, base), 'gold')
        words = f'{name_of(name)} stays nearer to the reference than {name_of(base)} ({paper})'
        less = 'forward KL on held-out pairs, same beta: share less'
        yield Claim(words, less, partial(measured.lower_kl, name, base), 'share')


def _other_claims(measured, grid):
    """Single answers, and losses without a reference."""
    if 'kto 1:1' in grid.others:
        words = 'KTO is as good as DPO without pairs (2402.01306)'
        yield Claim(words, 'score', partial(measured.gain, 'kto 1:1', 'dpo'), better=False)
    for name in grid.others:
        if name.startswith('kto') and name != 'kto 1:1':
            words = f'KTO with {name[4:]} good to bad answers is as good as with 1:1 (2402.01306)'
            yield Claim(words, 'score', partial(measured.gain, name, 'kto 1:1'), better=False)
    words = 'SimPO, without a reference, beats DPO (2405.14734)'
    yield Claim(words, 'score', partial(measured.gain, 'simpo', 'dpo'))
    words = 'ORPO, without a reference, is as good as DPO (2403.07691)'
    yield Claim(words, 'score', partial(measured.gain, 'orpo', 'dpo'), better=False)
