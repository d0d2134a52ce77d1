"""What papers claim, as differences that can be measured on the toy world. verdict.py has the rule that decides. Fixed before any reported run."""

import statistics
from functools import partial
from typing import NamedTuple

from experiments.claims import verdict
from experiments.claims.grid import FLIPS, ONLINE, SEARCHES, Grid, key, name_of, value

PAPERS = {'cdpo': 'cDPO note', 'robust': '2403.00409', 'ipo': '2310.12036', 'drdpo': '2407.07880'}
BETWEEN = 'gold reward between the frontiers'


class Claim(NamedTuple):
    """One claim: the paper's words in ours, what is measured, the settings of both sides, difference(seed) -> float, and its unit (a key
    of verdict.SMALLEST)."""

    words: str
    measured: str
    settings: str
    difference: object
    unit: str = 'score'


def differences(claim, seeds):
    """A claim's difference on every seed; None where a run is missing or has failed."""
    found = []
    for seed in seeds:
        try:
            found.append(claim.difference(seed))
        except KeyError:
            found.append(None)
    return found


def judged(grid, seeds, results):
    """[(claim, differences, verdict)] of all claims, decided together."""
    every = list(claims(grid, results))
    found = [differences(claim, seeds) for claim in every]
    verdicts = verdict.judge([(numbers, claim.unit) for numbers, claim in zip(found, every, strict=True)])
    return list(zip(every, found, verdicts, strict=True))


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
        return value(result, metric)

    def equal(self, ours, theirs, flips, cells, seed, metric='accuracy'):
        """Ours minus theirs at equal beta and lr: the mean over cells (beta, lr)."""
        gains = []
        for beta, lr in cells:
            trials = [self.grid.equal(method, beta, lr, flips, seed) for method in (ours, theirs)]
            gains.append(self.value(trials[0], metric) - self.value(trials[1], metric))
        return statistics.mean(gains)

    def over_betas(self, method, seed):
        """The score at every beta, on pairs of mixed gap."""
        return [self.value(self.grid.mixed(method, beta, seed), 'score') for beta in self.grid.mixed_betas]

    def narrower(self, seed):
        """By how much beta-DPO's range of scores over beta is smaller than DPO's."""
        ours, theirs = (self.over_betas(method, seed) for method in ('beta_dpo', 'dpo'))
        return max(theirs) - min(theirs) - (max(ours) - min(ours))

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

    def gain(self, ours, theirs, metric, seed):
        """A metric of one tuned method above that of another."""
        ours, theirs = (self.value(self.grid.tuned(name, metric, seed), metric) for name in (ours, theirs))
        return ours - theirs


def claims(grid: Grid, results):
    """The claims, in the order of the report. results: key of a trial -> result; a KeyError is a missing or failed run."""
    measured = Measured(grid, results)
    yield from _equal_claims(measured, grid)
    yield from _beta_claims(measured, grid)
    yield from _frontier_claims(measured, grid)
    yield from _tuned_claims(measured, grid)


def listed(numbers):
    return ', '.join(f'{x:g}' for x in numbers)


def _equal_claims(measured, grid):
    """Flipped labels, one thing changed."""
    cells = grid.cells()
    settings = f'equal: beta {listed(grid.like_betas)} x lr {listed(grid.like_lrs)}'

    def claim(ours, theirs, flips, paper):
        words = f'{name_of(ours)} is more accurate than {name_of(theirs)}, {flips:.0%} flips ({paper})'
        difference = partial(measured.equal, ours, theirs, flips, cells)
        return Claim(words, 'accuracy, mean over settings', settings, difference, 'accuracy')

    most = FLIPS[-1]
    for name in grid.like:
        paper = PAPERS[name.split()[0]] if name.split()[0] in PAPERS else 'the control'
        for flips in reversed(grid.flips_of(name)):
            if name != 'dpo' and (flips or name.startswith('drdpo')):
                yield claim(name, 'dpo', flips, paper)
    if 'dpo quarter' in grid.like:
        yield claim('drdpo 1', 'dpo quarter', most, 'more than a smaller beta')

    def loses_less(seed):
        return measured.equal('drdpo 1', 'dpo', most, cells, seed) - measured.equal('drdpo 1', 'dpo', 0.0, cells, seed)

    words = f'{name_of("drdpo 1")} loses less than DPO from 0 to {most:.0%} flips ({PAPERS["drdpo"]})'
    yield Claim(words, 'accuracy, mean over settings', settings, loses_less, 'accuracy')


def _beta_claims(measured, grid):
    """beta-DPO in its own units, and over beta on pairs of mixed gap."""
    own = grid.own_units()
    settings = f'equal: beta {own[0][0]:g} x lr {listed(grid.like_lrs)}; a 0.6, rho 0.2'
    difference = partial(measured.equal, 'beta_dpo', 'dpo', 0.0, own)
    words = 'beta-DPO is more accurate than DPO, no flips (2407.08639)'
    yield Claim(words, 'accuracy, mean over settings', settings, difference, 'accuracy')
    settings = f'equal: beta {listed(grid.mixed_betas)}, lr {grid.mixed_lr:g}; a 0.6, rho 0.2'

    def better(seed):
        ours, theirs = (statistics.mean(measured.over_betas(method, seed)) for method in ('beta_dpo', 'dpo'))
        return ours - theirs

    words = 'beta-DPO depends less on beta than DPO (2407.08639)'
    yield Claim(words, 'largest minus smallest score over beta, mixed pairs', settings, measured.narrower)
    words = 'beta-DPO beats DPO on pairs of mixed gap (2407.08639)'
    yield Claim(words, 'score, mean over beta, mixed pairs', settings, better)


def _frontier_claims(measured, grid):
    """Reward against KL: each method with what its paper starts from, where both are in the grid."""
    betas = f'beta {listed(grid.frontier_betas)}, lr {grid.frontier_lr:g}'
    for name in grid.frontier:
        base = {'radpo1': 'tdpo1', 'radpo2': 'tdpo2', 'tdpo1': 'dpo', 'tdpo2': 'dpo'}.get(name)
        if base not in grid.frontier:
            continue
        paper = '2404.11999' if base == 'dpo' else '2505.20359'
        words = f'{name_of(name)} gets more reward than {name_of(base)} at the same KL ({paper})'
        yield Claim(words, BETWEEN, f'equal: {betas}', partial(measured.above, name, base), 'gold')
        words = f'{name_of(name)} stays nearer to the reference than {name_of(base)} ({paper})'
        less = 'forward KL on held-out pairs, same beta: share less'
        yield Claim(words, less, f'equal: {betas}', partial(measured.lower_kl, name, base), 'share')
    for name in grid.online:
        words = f'{name_of(name)} on the gold reward is above DPO at the same KL'
        settings = f'kl_coef {listed(grid.kl_coefs)}, lr {ONLINE[name]["lr"]:g}; DPO: {betas}; neither tuned'
        yield Claim(words, BETWEEN, settings, partial(measured.above, name, 'dpo'), 'gold')


def _tuned_claims(measured, grid):
    """Both sides tuned for the metric of the claim."""

    def claim(ours, theirs, metric, paper, where):
        sides = [', '.join(f'{k} {v:g}' for k, v in grid.setting(name, metric).items()) for name in (ours, theirs)]
        settings = f'tuned for {metric}: {sides[0]}; against {sides[1]}'
        words = [name_of(name.split(maxsplit=1)[1]) for name in (ours, theirs)]
        difference = partial(measured.gain, ours, theirs, metric)
        better = 'more accurate' if metric == 'accuracy' else 'better'
        words = f'{words[0]} is {better} than {words[1]}, both tuned, {where} ({paper})'
        return Claim(words, metric, settings, difference, metric)

    where = f'{FLIPS[-1]:.0%} flips'
    for name, (metrics, *_) in SEARCHES.items():
        if name.startswith('flips') and name != 'flips dpo':
            for metric in metrics:
                yield claim(name, 'flips dpo', metric, PAPERS[name.split()[1]], where)
    yield claim('mixed beta_dpo', 'mixed dpo', 'score', '2407.08639', 'mixed pairs')
    papers = {'kto': '2402.01306', 'simpo': '2405.14734', 'orpo': '2403.07691'}
    for name in grid.others:
        if name != 'dpo':
            few = name.startswith('kto') and name != 'kto 1:1'
            base = 'clean kto 1:1' if few else 'clean dpo'
            yield claim(f'clean {name}', base, 'score', papers[name.split()[0]], 'no flips')
