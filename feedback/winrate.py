"""Win rates from verdicts: with an interval, at equal length, and what the order of presentation did to a judge.

A win is 1, a loss 0, a tie one half. Pairs of one prompt are not independent, so errors are of whole prompts (clusters).
"""

import numpy as np

Z = 1.96  # standard errors on either side of a 95% interval
ENOUGH = 30  # prompts; with fewer, a standard error says little, and length cannot be told from quality


def mean(wins, clusters=None):
    """(mean, standard error) of numbers (n,); clusters (n,): which of them belong together. None where there are too few.

    The error is sqrt(c / (c - 1) sum_c (sum_{i in c} (w_i - mean))^2) / n: the usual one where clusters have one member."""
    wins = np.asarray(wins, float)
    n = len(wins)
    if not n:
        return None, None
    average = wins.mean()
    squares = _outer_products(wins[:, None] - average, clusters)[0, 0]  # of a 1 by 1 matrix
    return float(average), _root(squares / n**2)


def interval(wins, clusters=None):
    """[low, high], the 95% interval of Wilson for the mean of numbers from 0 to 1 (n,); None where there are none.

    Up to ENOUGH clusters it is as wide as if pairs of a cluster told one thing together: the number that counts is Kish's,
    (sum m)^2 / sum m^2 of their sizes m, and 0, 1/2 or 1 vary at most as coins do. With more clusters the standard error of
    mean is trusted where it says that pairs of a cluster, or ties, told more. Coverage is measured in test_winrate.py."""
    p, error = mean(wins, clusters)
    if p is None:
        return None
    _, sizes = np.unique(np.arange(len(wins)) if clusters is None else clusters, return_counts=True)
    n = sizes.sum() ** 2 / (sizes**2).sum()
    if len(sizes) >= ENOUGH and error:
        n = max(n, p * (1 - p) / error**2)
    half = Z / (1 + Z**2 / n) * np.sqrt(p * (1 - p) / n + (Z / n / 2) ** 2)
    middle = (p + Z**2 / n / 2) / (1 + Z**2 / n)
    return [max(0.0, float(middle - half)), min(1.0, float(middle + half))]


def interval_of_fit(rate, error):
    """[low, high], the 95% interval of length_controlled's rate, symmetric in log odds; None where there is no error."""
    if error is None:
        return None
    odds = np.log(rate / (1 - rate)) + np.array([-Z, Z]) * error / (rate * (1 - rate))
    return (1 / (1 + np.exp(-odds))).tolist()


def length_controlled(wins, difference, clusters=None):
    """(win rate between answers of equal length, its standard error, b), or (None, None, None) without a finite fit.

    The logistic regression P(win) = sigmoid(a + b tanh(difference / s)), difference (n,) the length of the first answer
    minus that of the second, s its root mean square; b is what length earns. Maximum likelihood by Newton's method, ties
    as half a win and half a loss. The rate is sigmoid(a): difference 0. Its error is the delta method's, from the
    clustered sandwich covariance. There is no finite fit where length, or nothing at all, separates wins from losses.
    (AlpacaEval 2, 2404.04475, has this form of the length term, and a term for how hard an instruction is.)"""
    none = None, None, None
    wins, difference = np.asarray(wins, float), np.asarray(difference, float)
    if not len(wins):
        return none
    # a column for a, and one for b if any lengths differ: x (n, k), k 1 or 2
    x = np.ones((len(wins), 1))
    if difference.any():
        s = np.sqrt((difference**2).mean())
        x = np.stack([np.ones_like(wins), np.tanh(difference / s)], 1)
    beta = np.zeros(x.shape[1])  # a, b
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ beta))
        information = (x * (p * (1 - p))[:, None]).T @ x  # (k, k)
        # also where the difference is always the same
        if np.abs(beta).max() > 15 or np.linalg.cond(information) > 1e12:
            return none
        step = np.linalg.solve(information, x.T @ (wins - p))
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            break
    else:
        return none
    # the rate is sigmoid(a), whose slope is rate (1 - rate): so much of a's error is the rate's
    inverse = np.linalg.inv(information)
    covariance = inverse @ _outer_products(x * (wins - p)[:, None], clusters) @ inverse  # of beta
    rate = float(1 / (1 + np.exp(-beta[0])))
    error = _root(rate**2 * (1 - rate) ** 2 * covariance[0, 0])
    return rate, error, float(beta[1]) if len(beta) == 2 else 0.0


def orders(verdicts):
    """What two orders of presentation tell of a judge. verdicts (n, 2): the preference (1: first answer, 2: second, 1.5:
    tie) when the first answer was shown first, and when it was shown second; only pairs with two clear verdicts.

    Returns {'shown_first': (n,) the share of a pair's verdicts for what was shown first, ties half, 'agreement': (n,)
    whether a pair was judged alike in both orders}. Without position bias the mean of shown_first is 1/2."""
    straight, swapped = np.asarray(verdicts, float).reshape(-1, 2).T
    return {'shown_first': (2 - straight + swapped - 1) / 2, 'agreement': straight == swapped}


def _outer_products(scores, clusters):
    """Sum over clusters of the outer products of their summed scores (n, k), times c / (c - 1): (k, k). nan for one cluster."""
    _, number = np.unique(np.arange(len(scores)) if clusters is None else clusters, return_inverse=True)  # (n,) from 0
    sums = np.zeros((number.max() + 1, scores.shape[1]))
    np.add.at(sums, number, scores)
    c = len(sums)
    return sums.T @ sums * (c / (c - 1) if c > 1 else np.nan)


def _root(variance):
    """Its square root, or None of nan. Rounding may make 0 a little less."""
    return None if np.isnan(variance) else float(np.sqrt(max(variance, 0.0)))
