"""Win rates: by hand, and from simulated judges whose coefficients are known."""

import math

import numpy as np
import pytest

from feedback import winrate


def test_mean_by_hand():
    """Wins 1 1 0 1/2: mean 5/8, squares of deviations 9/64 + 9/64 + 25/64 + 1/64 = 44/64, variance 44/64/3, error sqrt(44/192/4).

    Clusters {1, 1}, {0, 1/2}: sums of deviations 3/4 and -3/4; error sqrt(2/1 (9/16 + 9/16)) / 4 = 3/8."""
    assert winrate.mean([1, 1, 0, 0.5], range(4)) == pytest.approx((0.625, math.sqrt(44 / 192 / 4)))
    assert winrate.mean([1, 1, 0, 0.5], [7, 7, 3, 3]) == pytest.approx((0.625, 0.375))
    assert winrate.mean([], []) == (None, None) and winrate.mean([1], [4]) == (1.0, None)
    assert winrate.mean([1, 0], [4, 4]) == (0.5, None)


def test_interval_by_hand():
    """Eight wins: z^2 = 3.8416, low end 1 / (1 + z^2 / 8) = 0.676, high end 1. Prompts of 3 and 1 pairs count as 16 / 10."""
    assert winrate.interval([1] * 8, range(8)) == pytest.approx([8 / (8 + 3.8416), 1])
    assert winrate.interval([1] * 4, [5, 5, 5, 6]) == pytest.approx([1.6 / (1.6 + 3.8416), 1])
    assert winrate.interval([], []) is None
    # also where rounding would go beyond them
    ends = [winrate.interval([win] * n, range(n)) for n in range(1, 60) for win in (0, 1)]
    assert np.min(ends) >= 0 and np.max(ends) <= 1
    # two answers a prompt, of nearly all one wins: with 30 prompts it is their error that counts
    widths = [np.ptp(winrate.interval([1, 0] * (n - 2) + [1, 1, 0, 0], np.arange(2 * n) // 2)) for n in (29, 30)]
    assert widths[1] < widths[0] / 2
    # ties only: no error, but eight of them do not prove that nothing is better
    low, high = winrate.interval([0.5] * 8, range(8))
    assert low < 0.25 and high > 0.75


@pytest.mark.parametrize('n', [8, 40], ids=['8 prompts', '40 prompts'])
@pytest.mark.parametrize('kind', ['one pair a prompt', 'three alike', 'three apart', 'ties'])
def test_intervals_cover(kind, n):
    """400 worlds each: 95% intervals hold the truth in 91% of them or more, and tell more than nothing: mean + 1.96 errors holds
    a true 0.9 in 57% at eight prompts."""
    rng = np.random.default_rng(0)
    for p in (0.5, 0.7, 0.9):
        size = 3 if kind.startswith('three') else 1
        prompts = np.repeat(np.arange(n), size)
        # a coin a pair, or one for the three pairs of a prompt; of the ties four in ten
        coins = rng.random((400, n if kind == 'three alike' else n * size)) < p
        wins = coins[:, prompts] if kind == 'three alike' else coins * 1.0
        truth = p
        if kind == 'ties':
            wins = np.where(rng.random(wins.shape) < 0.4, 0.5, wins)
            truth = 0.2 + 0.6 * p
        found = np.array([winrate.interval(row, prompts) for row in wins])
        inside = (found[:, 0] <= truth) & (truth <= found[:, 1])
        assert inside.mean() > 0.91, (p, inside.mean())
        width = (found[:, 1] - found[:, 0]).mean()
        assert width < (0.6 if n == 8 else 0.31), (p, width)


def test_length_controlled_by_hand():
    """Differences +-d are tanh(+-1) = +-t. Wins 3 of 4 at +d, 1 of 2 at -d: log odds log 3 = a + b t and 0 = a - b t, so
    a = log(3)/2 and the rate sigmoid(a) = sqrt(3) / (1 + sqrt(3))."""
    rate, error, interval, b = winrate.length_controlled([1, 1, 1, 0, 1, 0], [5, 5, 5, 5, -5, -5], range(6))
    assert rate == pytest.approx(math.sqrt(3) / (1 + math.sqrt(3)))
    assert b == pytest.approx(math.log(3) / 2 / math.tanh(1))
    # the error: log odds of each group have the sandwich variance (1 / sum p (1-p))^2 sum of squared residuals
    by_group = [(3 * (1 / 4) ** 2 + (3 / 4) ** 2) / (4 * 3 / 16) ** 2, (2 * (1 / 2) ** 2) / (2 * 1 / 4) ** 2]
    error_of_a = math.sqrt(sum(by_group) / 4 * 6 / 5)
    assert error == pytest.approx(rate * (1 - rate) * error_of_a)
    ends = [math.log(3) / 2 + sign * 1.96 * error_of_a for sign in (-1, 1)]
    assert interval == pytest.approx([1 / (1 + math.exp(-end)) for end in ends])
    assert winrate.length_controlled([1, 0], [0, 0], [4, 4]) == (0.5, None, None, 0.0)


def test_ties_are_half_wins_and_equal_lengths_change_nothing():
    twice = winrate.length_controlled([1, 0, 1, 0, 1, 1, 1, 1], [3, 3, -2, -2, -2, -2, 4, 4], range(8))
    halves = winrate.length_controlled([0.5, 0.5, 1, 1], [3, -2, -2, 4], range(4))
    assert halves[0] == pytest.approx(twice[0]) and halves[3] == pytest.approx(twice[3])
    wins = [1, 1, 0, 0.5]
    rate, error, _, b = winrate.length_controlled(wins, [0] * 4, range(4))
    assert (rate, error) == pytest.approx(winrate.mean(wins, range(4))) and b == 0
    # ties alone: an error of 0 is no interval of no width
    assert winrate.length_controlled([0.5] * 40, [3, -2] * 20, range(40)) == (0.5, 0.0, None, 0.0)
    # a variance that rounds below zero
    assert winrate.length_controlled([0, 0.5, 1], [-2, 0, -2], range(3))[1] == pytest.approx(0, abs=1e-6)


def test_an_infinite_and_an_extreme_but_finite_fit():
    # no pairs, all won, separated, one difference, all won at equal lengths
    for wins, difference in (([], []), ([1, 1, 1], [1, -1, 2]), ([1, 1, 0, 0], [1, 2, -1, -2]), ([0, 1, 1], [3, 3, 3]),
                             ([1, 1, 1], [0, 0, 0])):  # fmt: skip
        assert winrate.length_controlled(wins, difference, range(len(wins))) == (None,) * 4, (wins, difference)
    # where nearly all was won
    rng = np.random.default_rng(3)
    difference = rng.normal(0, 100, 400)
    wins = rng.random(400) < 1 / (1 + np.exp(-(3 + 5 * np.tanh(difference / 100))))
    rate, error, _, b = winrate.length_controlled(wins, difference, range(400))
    assert abs(rate - 1 / (1 + math.exp(-3))) < 4 * error and 3 < b < 8


@pytest.mark.parametrize('size', [1, 3], ids=['pairs apart', 'three pairs a prompt'])
def test_known_coefficients_are_recovered(size):
    """200 worlds of 450 pairs: a = 0.4, b = 1.2. The mean of the estimates is right within its error, the errors are as large
    as the estimates scatter, and 95% intervals hold the truth 95% of the time. Three pairs of a prompt share a verdict's coin."""
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        prompts = np.repeat(np.arange(450 // size), size)
        difference = rng.normal(30, 100, 450)
        scaled = np.tanh(difference / np.sqrt((difference**2).mean()))
        coin = rng.random(450 // size)[prompts]
        wins = coin < 1 / (1 + np.exp(-(0.4 + 1.2 * scaled)))
        rate, error, interval, b = winrate.length_controlled(wins, difference, prompts)
        found.append((rate, error, *interval, b, *winrate.mean(wins, prompts)))
    rate, error, low, high, b, plain, plain_error = np.array(found).T
    truth = 1 / (1 + math.exp(-0.4))
    assert abs(rate.mean() - truth) < 3 * rate.std() / math.sqrt(200)
    assert abs(b.mean() - 1.2) < 3 * b.std() / math.sqrt(200) + 0.03  # maximum likelihood is a little biased outwards
    for mean_error, estimates in ((error.mean(), rate), (plain_error.mean(), plain)):
        assert mean_error == pytest.approx(estimates.std(), rel=0.15)
    assert 0.90 < (abs(rate - truth) < 1.96 * error).mean() < 0.99
    assert 0.90 < ((low < truth) & (truth < high)).mean() < 0.99
    assert plain.mean() > truth + 0.02  # the longer answers win more, which the plain rate takes for quality
