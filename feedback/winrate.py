"""Win rates from verdicts: confidence intervals and length control.

label.py reports them, and feedback/score.py uses the intervals. A win is 1, a loss 0, a tie 1/2. Pairs with the same prompt are
correlated, so they form a cluster, and all standard errors are cluster-robust."""

import numpy as np

Z = 1.96  # normal quantile of a 95% interval
ENOUGH = 30  # fewest clusters for a standard error to be reliable


def mean(wins, clusters):
    """Return (mean, its cluster-robust standard error) of wins (n,), None if undefined. clusters (n,): labels, such as prompts."""
    wins = np.asarray(wins, float)
    n = len(wins)
    if n == 0:
        return None, None
    average = wins.mean()
    # C clusters: error = sqrt(C / (C - 1) sum_c (sum_{i in c} (w_i - mean))^2) / n, NaN for C = 1, of which _sqrt makes None
    variance_of_sum = _variance_of_sum(wins[:, None] - average, clusters).item()
    return float(average), _sqrt(variance_of_sum / n**2)


def interval(wins, clusters):
    """Return [low, high], the Wilson 95% interval for the mean of wins (n,) in [0, 1]; None if n is 0. clusters: as for mean()."""
    p, error = mean(wins, clusters)
    if p is None:
        return None
    _, sizes = np.unique(clusters, return_counts=True)
    # Wilson's sample size: Kish's effective size, for clusters of these sizes
    effective_n = sizes.sum() ** 2 / (sizes**2).sum()
    # variance of a coin flip, an upper bound for values in [0, 1]
    variance = p * (1 - p)
    # larger if the cluster-robust error of many clusters says so; an error of 0 only means that all values so far are equal
    if len(sizes) >= ENOUGH and error:
        effective_n = max(effective_n, variance / error**2)
    shift = Z**2 / effective_n
    scale = 1 + shift
    center = (p + shift / 2) / scale
    half_width = np.sqrt(shift * variance + shift**2 / 4) / scale
    # rounding may exceed [0, 1]
    return np.clip([center - half_width, center + half_width], 0, 1).tolist()


def length_controlled(wins, difference, clusters):
    """Return (win rate at equal length, its standard error, its interval, length effect b), or four None without a finite fit.

    wins (n,): 1, 0, or 1/2 for a tie. difference (n,): length of the first answer minus that of the second. clusters (n,): as for
    mean(). Fits P(win) = sigmoid(a + b tanh(difference / s)), like AlpacaEval 2 (2404.04475) without its instruction difficulty.
    There is no finite fit without pairs, if all are wins or all losses, if the difference alone predicts every win, or if it is the
    same (not 0) in all pairs. The interval is None if the fit is exact; with one cluster the error is None, too."""
    wins = np.asarray(wins, float)
    difference = np.asarray(difference, float)
    x = np.ones((len(wins), 1))  # intercept a
    lengths_differ = difference.any()
    if lengths_differ:
        s = np.sqrt((difference**2).mean())  # root mean square
        x = np.column_stack([x, np.tanh(difference / s)])  # slope b
    fit = _fit_logistic(x, wins) if len(wins) else None
    if fit is None:
        return None, None, None, None
    beta, information, residuals = fit
    rate = float(_sigmoid(beta[0]))
    effect = float(beta[1]) if lengths_differ else 0.0
    # sandwich covariance of beta (k, k): bread @ meat @ bread
    bread = np.linalg.inv(information)
    meat = _variance_of_sum(x * residuals[:, None], clusters)
    covariance = bread @ meat @ bread
    # delta method, with d rate / d a
    rate_per_a = rate * (1 - rate)
    error = _sqrt(rate_per_a**2 * covariance[0, 0])
    # an error of 0 only means that the fit is exact, such as to pairs that are all ties
    if error is None or error < 1e-6:
        return rate, error, None, effect
    # an interval that is symmetric in log odds
    log_odds = np.log(rate / (1 - rate))
    half_width = Z * error / rate_per_a
    interval = _sigmoid(np.array([log_odds - half_width, log_odds + half_width])).tolist()
    return rate, error, interval, effect


def _fit_logistic(x, wins):
    """Fit P(win) = sigmoid(x @ beta) by maximum likelihood (Newton's method). x (n, k), wins (n,).

    Returns (beta (k,), Fisher information (k, k), residuals wins - P(win) (n,)), or None if there is no finite maximum."""
    beta = np.zeros(x.shape[1])
    for _ in range(50):
        p = _sigmoid(x @ beta)
        residuals = wins - p
        # beta diverges: sigmoid(15) = 0.9999997
        if np.abs(beta).max() > 15:
            return None
        information = x.T * (p * (1 - p)) @ x
        # singular: all differences are equal, so b cannot be told from a
        if np.linalg.cond(information) > 1e12:
            return None
        step = np.linalg.solve(information, x.T @ residuals)
        beta = beta + step
        # converged; information and residuals are still accurate after such a small step
        if np.abs(step).max() < 1e-10:
            return beta, information, residuals
    return None


def _sigmoid(x):
    """Return the logistic function of x, elementwise."""
    return 1 / (1 + np.exp(-x))


def _variance_of_sum(scores, clusters):
    """Return the cluster-robust covariance (k, k) of the sum of zero-mean scores (n, k); NaN if there is only one cluster."""
    # ids (n,): clusters as integers from 0
    labels, ids = np.unique(clusters, return_inverse=True)
    count = len(labels)
    sums = np.zeros((count, scores.shape[1]))  # of each cluster
    np.add.at(sums, ids, scores)
    factor = count / (count - 1) if count > 1 else np.nan
    return sums.T @ sums * factor


def _sqrt(variance):
    """Return the square root of a variance as a float, or None for NaN. Slightly negative values (rounding) count as 0."""
    return None if np.isnan(variance) else float(max(variance, 0.0)) ** 0.5
