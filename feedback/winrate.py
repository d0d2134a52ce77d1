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
    variance = _summed_variance(wins[:, None] - average, clusters).item() / n**2
    return float(average), _root(variance)


def interval(wins, clusters=None):
    """[low, high], the 95% interval of Wilson for the mean of numbers from 0 to 1 (n,); None where there are none.

    Up to ENOUGH clusters it is as wide as if pairs of a cluster told one thing together: the number that counts is Kish's,
    (sum m)^2 / sum m^2 of their sizes m, and 0, 1/2 or 1 vary at most as coins do. With more clusters the standard error of
    mean is trusted where it says that pairs of a cluster, or ties, told more. Coverage is measured in test_winrate.py."""
    p, error = mean(wins, clusters)
    if p is None:
        return None
    sizes = np.bincount(_numbered(clusters, len(wins)))
    n = sizes.sum() ** 2 / (sizes**2).sum()
    coin = p * (1 - p)
    if len(sizes) >= ENOUGH and error:
        n = max(n, coin / error**2)
    z = Z**2 / n
    middle = (p + z / 2) / (1 + z)
    half = np.sqrt(z * coin + z**2 / 4) / (1 + z)
    return np.clip([middle - half, middle + half], 0, 1).tolist()


def interval_of_fit(rate, error):
    """[low, high], the 95% interval of length_controlled's rate, symmetric in log odds; None where there is no error."""
    if error is None:
        return None
    odds, reach = np.log(rate / (1 - rate)), Z * error / (rate * (1 - rate))
    return _sigmoid(np.array([odds - reach, odds + reach])).tolist()


def length_controlled(wins, difference, clusters=None):
    """(win rate between answers of equal length, its standard error, b), or (None, None, None) without a finite fit.

    The logistic regression P(win) = sigmoid(a + b tanh(difference / s)), difference (n,) the length of the first answer
    minus that of the second, s its root mean square; b is what length earns. Maximum likelihood by Newton's method, ties
    as half a win and half a loss. The rate is sigmoid(a): difference 0. Its error is the delta method's, from the
    clustered sandwich covariance. There is no finite fit where length, or nothing at all, separates wins from losses.
    (AlpacaEval 2, 2404.04475, has this form of the length term, and a term for how hard an instruction is.)"""
    wins, difference = np.asarray(wins, float), np.asarray(difference, float)
    if not len(wins):
        return None, None, None
    # a column for a, and one for b if any lengths differ: x (n, k), k 1 or 2
    x = np.ones((len(wins), 1))
    if difference.any():
        s = np.sqrt((difference**2).mean())
        x = np.column_stack([x, np.tanh(difference / s)])

    beta = np.zeros(x.shape[1])  # a, b
    for _ in range(50):
        p = _sigmoid(x @ beta)
        information = x.T * (p * (1 - p)) @ x  # (k, k)
        # the second is so where the difference is always the same
        if np.abs(beta).max() > 15 or np.linalg.cond(information) > 1e12:
            return None, None, None
        step = np.linalg.solve(information, x.T @ (wins - p))
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            break
    else:
        return None, None, None

    # the rate is sigmoid(a), whose slope is rate (1 - rate): so much of a's error is the rate's
    inverse = np.linalg.inv(information)
    covariance = inverse @ _summed_variance(x * (wins - p)[:, None], clusters) @ inverse  # of beta
    rate = float(_sigmoid(beta[0]))
    error = _root((rate * (1 - rate)) ** 2 * covariance[0, 0])
    return rate, error, float(beta[1]) if len(beta) == 2 else 0.0


def orders(verdicts):
    """What two orders of presentation tell of a judge. verdicts (n, 2): the preference (1: first answer, 2: second, 1.5:
    tie) when the first answer was shown first, and when it was shown second; only pairs with two clear verdicts.

    Returns {'shown_first': (n,) the share of a pair's verdicts for what was shown first, ties half, 'agreement': (n,)
    whether a pair was judged alike in both orders}. Without position bias the mean of shown_first is 1/2."""
    straight, swapped = np.asarray(verdicts, float).reshape(-1, 2).T
    # 1 where the one shown first won
    in_order_1 = 2 - straight
    in_order_2 = swapped - 1
    return {'shown_first': (in_order_1 + in_order_2) / 2, 'agreement': straight == swapped}


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _numbered(clusters, n):
    """The clusters of n members as numbers from 0 (n,); None: a cluster each."""
    return np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1]


def _summed_variance(scores, clusters):
    """The variance (k, k) of the sum of scores (n, k) with mean 0, independent between clusters; nan for one cluster."""
    number = _numbered(clusters, len(scores))
    sums = np.zeros((number.max() + 1, scores.shape[1]))
    np.add.at(sums, number, scores)
    c = len(sums)
    return sums.T @ sums * (c / (c - 1) if c > 1 else np.nan)


def _root(variance):
    """Its square root, or None of nan. Rounding may make 0 a little less."""
    return None if np.isnan(variance) else float(max(variance, 0.0)) ** 0.5
