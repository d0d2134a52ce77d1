"""The papers' claims, as differences that can be measured on the toy world. verdict.py has the rule that decides. Fixed before any reported run."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from experiments.claims import verdict
from experiments.claims.grid import FLIPS, METHODS, ONLINE, Grid, key, make, name_of, value

MOST = FLIPS[-1]
# at equal beta and learning rate, by accuracy: ours, theirs, flips, paper
EQUAL = [
    ('drdpo 1', 'dpo', MOST, '2407.07880'), ('drdpo 1', 'dpo', 0.0, '2407.07880'), ('drdpo 4', 'dpo', MOST, '2407.07880'),
    ('drdpo 4', 'dpo', 0.0, '2407.07880'), ('dpo quarter', 'dpo', MOST, 'the control'), ('drdpo 1', 'dpo quarter', MOST, 'against the control'),
    ('cdpo', 'dpo', MOST, 'cDPO note'), ('robust', 'dpo', MOST, '2403.00409'),
]  # fmt: skip
# reward against KL: ours, theirs, paper
FRONTIERS = [('tdpo1', 'dpo', '2404.11999'), ('tdpo2', 'dpo', '2404.11999'), ('radpo1', 'tdpo1', '2505.20359'),
             ('radpo2', 'tdpo2', '2505.20359')]  # fmt: skip
# both tuned for the metric: ours, theirs, metric, paper
TUNED = [
    ('flips drdpo', 'flips dpo', 'accuracy', '2407.07880'), ('flips drdpo', 'flips dpo', 'score', '2407.07880'),
    ('flips cdpo', 'flips dpo', 'score', 'cDPO note'), ('flips robust', 'flips dpo', 'score', '2403.00409'),
    ('flips ipo', 'flips dpo', 'score', '2310.12036'), ('mixed beta_dpo', 'mixed dpo', 'score', '2407.08639'),
    ('clean kto 1:1', 'clean dpo', 'score', '2402.01306'), ('clean kto 1:4', 'clean kto 1:1', 'score', '2402.01306'),
    ('clean kto 1:10', 'clean kto 1:1', 'score', '2402.01306'), ('clean simpo', 'clean dpo', 'score', '2405.14734'),
    ('clean orpo', 'clean dpo', 'score', '2403.07691'),
]  # fmt: skip
WHERE = {'flips': f'{MOST:.0%} flips', 'mixed': 'pairs of mixed gap', 'clean': 'no flips'}


class Claim(NamedTuple):
    words: str  # the paper's claim, in ours
    measured: str
    settings: str  # of both sides
    difference: Callable  # (seed) -> float; KeyError where a run is missing or has failed
    unit: str  # a key of verdict.SMALLEST


def judged(grid, seeds, results):
    """Decide about all claims together. Returns [(claim, differences by seed, the rule's word)].

    A difference is None where a run is missing. Of a small grid's claims those without any difference are left out."""
    rows = []
    for claim in claims(grid, results):
        differences = []
        for seed in seeds:
            try:
                differences.append(claim.difference(seed))
            except KeyError:
                differences.append(None)
        if grid.cut == 1 or set(differences) != {None}:
            rows.append((claim, differences))
    words = verdict.judge([(differences, claim.unit) for claim, differences in rows])
    return [(*row, word) for row, word in zip(rows, words, strict=True)]


def above(ours, theirs):
    """Return the mean difference of two frontiers, lists of (KL, gold), over the sqrt(KL) that both reach. KeyError if none is."""
    x, ours = np.array(sorted(ours)).T
    u, theirs = np.array(sorted(theirs)).T
    x, u = np.sqrt(x), np.sqrt(u)
    low = max(x[0], u[0])
    high = min(x[-1], u[-1])
    if low >= high:
        raise KeyError('the frontiers share no range of KL')
    # on straight lines, at the middles of twenty parts
    at = low + (high - low) * (np.arange(20) + 0.5) / 20
    more = np.interp(at, x, ours) - np.interp(at, u, theirs)
    return float(np.mean(more))


class Measured(NamedTuple):
    """The quantities that the claims compare, ours minus theirs, for one seed at a time.

    A method raises KeyError where a run that it needs is missing or has failed."""

    grid: Grid
    results: dict  # key of a trial -> result

    def value(self, trial, metric):
        """Return one metric of one trial."""
        result = self.results[key(trial)]
        if 'error' in result:
            raise KeyError(result['error'])
        return value(result, metric)

    def equal(self, ours, theirs, flips, cells, seed):
        """Return the difference in accuracy at equal beta and lr: the mean over cells (beta, lr)."""
        gains = []
        for beta, lr in cells:
            a, b = (self.grid.equal(method, beta, lr, flips, seed) for method in (ours, theirs))
            gains.append(self.value(a, 'accuracy') - self.value(b, 'accuracy'))
        return statistics.mean(gains)

    def loses_less(self, seed):
        """Return by how much more DPO loses than Dr. DPO of its accuracy, from no flips to the most."""
        flipped, clean = (self.equal('drdpo 1', 'dpo', flips, self.grid.cells(), seed) for flips in (MOST, 0.0))
        return flipped - clean

    def mixed(self, summary, seed):
        """Summarise the scores at every beta, on pairs of mixed gap. Returns the summary of beta-DPO minus that of DPO."""
        ours, theirs = (
            summary([self.value(self.grid.mixed(method, beta, seed), 'score') for beta in self.grid.mixed_betas])
            for method in ('beta_dpo', 'dpo')
        )
        return ours - theirs

    def above(self, ours, theirs, seed):
        """Return the gold reward between two methods' frontiers. A frontier is the SFT model, and the method at every beta."""
        frontiers = []
        for method in (ours, theirs):
            pulls = [self.grid.pull(method, strength, seed) for strength in self.grid.pulls(method)]
            trials = [make(seed, None), *pulls]  # from the SFT model on
            frontiers.append([(self.value(trial, 'kl'), self.value(trial, 'gold')) for trial in trials])
        return above(*frontiers)

    def nearer(self, ours, theirs, seed):
        """Return the share by which our forward KL on held-out answers is lower than theirs, the mean over beta."""
        shares = []
        for beta in self.grid.frontier_betas:
            trials = [self.grid.pull(method, beta, seed) for method in (ours, theirs)]
            a, b = (self.value(trial, 'kl_chosen') + self.value(trial, 'kl_rejected') for trial in trials)
            shares.append(1 - a / b)
        return statistics.mean(shares)

    def gain(self, ours, theirs, metric, seed):
        """Return the difference in a metric between two tuned methods."""
        a, b = (self.grid.tuned(name, metric, seed) for name in (ours, theirs))
        return self.value(a, metric) - self.value(b, metric)


def listed(numbers):
    return ', '.join(f'{x:g}' for x in numbers)


def settings_of(options):
    """Return options that a search has found in words."""
    return ', '.join(f'{option} {x:g}' for option, x in options.items())


def claims(grid: Grid, results):
    """Yield the claims, in the order of the report. results: key of a trial -> result."""
    measured = Measured(grid, results)
    # one thing changed, under flips
    measure = 'accuracy, mean over settings'
    settings = f'equal: beta {listed(grid.like_betas)} x lr {listed(grid.like_lrs)}'
    for ours, theirs, flips, paper in EQUAL:
        words = f'{name_of(ours)} is more accurate than {name_of(theirs)}, {flips:.0%} flips ({paper})'
        yield Claim(words, measure, settings, partial(measured.equal, ours, theirs, flips, grid.cells()), 'accuracy')
    words = f'{name_of("drdpo 1")} loses less than DPO from 0 to {MOST:.0%} flips (2407.07880)'
    yield Claim(words, measure, settings, measured.loses_less, 'accuracy')

    # beta-DPO in its own units, and over beta
    own = grid.own_units()
    settings = f'equal: beta {own[0][0]:g} x lr {listed(grid.like_lrs)}; a 0.6, rho 0.2'
    words = 'beta-DPO is more accurate than DPO, no flips (2407.08639)'
    yield Claim(words, measure, settings, partial(measured.equal, 'beta_dpo', 'dpo', 0.0, own), 'accuracy')
    settings = f'equal: beta {listed(grid.mixed_betas)}, lr {grid.mixed_lr:g}; a 0.6, rho 0.2'
    words = 'beta-DPO depends less on beta than DPO (2407.08639)'
    measure = 'largest minus smallest score over beta, mixed gap'
    narrowness = partial(measured.mixed, lambda scores: min(scores) - max(scores))
    yield Claim(words, measure, settings, narrowness, 'score')
    words = 'beta-DPO beats DPO on pairs of mixed gap (2407.08639)'
    yield Claim(words, 'score, mean over beta', settings, partial(measured.mixed, statistics.mean), 'score')

    # reward against KL
    betas, between = f'beta {listed(grid.frontier_betas)}, lr {grid.frontier_lr:g}', 'gold reward between the frontiers'
    for ours, theirs, paper in FRONTIERS:
        words = f'{name_of(ours)} gets more reward than {name_of(theirs)} at the same KL ({paper})'
        yield Claim(words, between, f'equal: {betas}', partial(measured.above, ours, theirs), 'gold')
        words = f'{name_of(ours)} stays nearer to the reference than {name_of(theirs)} ({paper})'
        less = 'forward KL on held-out pairs, same beta: share less'
        yield Claim(words, less, f'equal: {betas}', partial(measured.nearer, ours, theirs), 'share')
    for name in ONLINE:
        words = f'{name_of(name)} on the gold reward is above DPO at the same KL'
        settings = f'kl_coef {listed(grid.kl_coefs)}, lr {METHODS[name]["lr"]:g}; DPO: {betas}; neither tuned'
        yield Claim(words, between, settings, partial(measured.above, name, 'dpo'), 'gold')

    # both sides tuned for the metric of the claim
    for ours, theirs, metric, paper in TUNED:
        found, against = (settings_of(grid.setting(name, metric)) for name in (ours, theirs))
        kind, method = ours.split(maxsplit=1)
        other = theirs.split(maxsplit=1)[1]
        settings, how = f'tuned for {metric}: {found}; against {against}', ', both tuned'
        # the other shares of good answers have the settings that KTO 1:1 has found: that share alone is changed
        if other.startswith('kto'):
            settings, how = f'equal: {found}, tuned for {name_of(other)}', ''
        better = 'more accurate' if metric == 'accuracy' else 'better'
        words = f'{name_of(method)} is {better} than {name_of(other)}{how}, {WHERE[kind]} ({paper})'
        yield Claim(words, metric, settings, partial(measured.gain, ours, theirs, metric), metric)
