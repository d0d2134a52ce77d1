"""Win rates from verdicts: with an interval, at equal length, and what the order of presentation did to a judge.

label.py calls this file for its report, feedback/score.py for its accuracies. A win is 1, a loss 0, a tie one half. Pairs
of one prompt are not independent. So the pairs of a prompt are a cluster, and standard errors are over clusters.
"""

import numpy as np

Z = 1.96  # standard errors on either side of a 95% interval
ENOUGH = 30  # prompts; with fewer, a standard error says little, and length cannot be told from quality


def mean(wins, clusters=None):
    """Return (mean, standard error) of the numbers wins (n,).

    clusters (n,) names the cluster of each number; None makes every number a cluster of its own. Both results are None if
    there are no numbers. The error alone is None if there is only one cluster. For C clusters it is
    sqrt(C / (C - 1) sum_c (sum_{i in c} (w_i - mean))^2) / n, the usual error of a mean if every cluster has one member."""
    wins = np.asarray(wins, float)
    n = len(wins)
    if n == 0:
        return None, None
    average = wins.mean()
    deviations = wins[:, None] - average  # (n, 1)
    variance_of_sum = _variance_of_sum(deviations, clusters).item()
    return float(average), _root(variance_of_sum / n**2)


def interval(wins, clusters=None):
    """Return [low, high], Wilson's 95% interval for the mean of the numbers wins (n,), or None if there are none.

    The numbers lie between 0 and 1; clusters is as in mean. Wilson's formula is about coins, and asks how many were thrown. In
    doubt, the members of a cluster count as one coin: for clusters of m_c members, the number is Kish's effective size,
    (sum_c m_c)^2 / sum_c m_c^2. With ENOUGH clusters the standard error of mean can be trusted, and may show that there are
    more. test_winrate.py measures how often such intervals hold the truth."""
    p, error = mean(wins, clusters)
    if p is None:
        return None
    sizes = np.bincount(_cluster_numbers(clusters, len(wins)))
    coins = sizes.sum() ** 2 / (sizes**2).sum()
    # the variance of one coin; other numbers from 0 to 1 with this mean, such as ties, vary less
    coin_variance = p * (1 - p)
    # so many coins have this error; an error of 0 only says that all numbers so far were alike
    if len(sizes) >= ENOUGH and error:
        coins = max(coins, coin_variance / error**2)

    # Wilson's formula, in which Z^2 / n stands four times
    shift = Z**2 / coins
    scale = 1 + shift
    middle = (p + shift / 2) / scale
    half_width = np.sqrt(shift * coin_variance + shift**2 / 4) / scale
    ends = [middle - half_width, middle + half_width]
    # rounding may go beyond 0 or 1
    return np.clip(ends, 0, 1).tolist()


def interval_of_fit(rate, error):
    """Return [low, high], the 95% interval of length_controlled's rate, or None if its error is None.

    It is symmetric in log odds, so that both ends lie between 0 and 1."""
    if error is None:
        return None
    log_odds = np.log(rate / (1 - rate))
    # the slope of the log odds is 1 / (rate (1 - rate))
    reach = Z * error / (rate * (1 - rate))
    ends = np.array([log_odds - reach, log_odds + reach])
    return _sigmoid(ends).tolist()


def length_controlled(wins, difference, clusters=None):
    """Return (win rate between answers of equal length, its standard error, length effect b).

    All three are None if there is no finite fit: without wins, or if length, or nothing at all, separates wins from losses.

    The fit is the logistic regression P(win) = sigmoid(a + b tanh(difference / s)). difference (n,) is the length of the first
    answer minus that of the second, and s is its root mean square. A tie counts as half a win and half a loss. Answers of
    equal length have difference 0, so the rate is sigmoid(a). b says how much length earns; it is 0 if no lengths differ. The
    error is the delta method's, from the sandwich covariance of a and b over clusters, which are as in mean.
    (AlpacaEval 2, 2404.04475, has this form of the length term, and one more term for how hard an instruction is.)"""
    wins = np.asarray(wins, float)
    difference = np.asarray(difference, float)
    if len(wins) == 0:
        return None, None, None
    # x (n, k): a column of ones for a, and a column for b if any lengths differ
    x = np.ones((len(wins), 1))
    lengths_differ = difference.any()
    if lengths_differ:
        s = np.sqrt((difference**2).mean())
        x = np.column_stack([x, np.tanh(difference / s)])

    fit = _fit_logistic(x, wins)
    if fit is None:
        return None, None, None
    beta, information, residuals = fit
    rate = float(_sigmoid(beta[0]))
    effect = float(beta[1]) if lengths_differ else 0.0

    # the sandwich: the variance of the score between two inverse informations
    inverse = np.linalg.inv(information)
    score_variance = _variance_of_sum(x * residuals[:, None], clusters)
    covariance = inverse @ score_variance @ inverse  # (k, k), of beta
    # the delta method: the rate changes by this much where a changes by 1
    slope = rate * (1 - rate)
    error = _root(slope**2 * covariance[0, 0])
    return rate, error, effect


def _fit_logistic(x, wins):
    """Fit P(win) = sigmoid(x @ beta) by maximum likelihood, with Newton's method.

    x is (n, k), wins (n,). Returns (beta (k,), information (k, k), residuals wins - P(win) (n,)), or None if the likelihood
    has no finite maximum."""
    beta = np.zeros(x.shape[1])
    for _ in range(50):
        p = _sigmoid(x @ beta)
        residuals = wins - p
        # log odds of 15 are a probability of 0.9999997: they are on their way to infinity
        if np.abs(beta).max() > 15:
            return None
        # a singular matrix: all lengths differ by the same, so its effect looks like a's
        variances = p * (1 - p)
        information = x.T * variances @ x
        if np.linalg.cond(information) > 1e12:
            return None
        step = np.linalg.solve(information, x.T @ residuals)
        beta = beta + step
        # too small a step to make information and residuals anew
        if np.abs(step).max() < 1e-10:
            return beta, information, residuals
    return None


def orders(verdicts):
    """Return what two orders of presentation tell of a judge: {'shown_first': (n,), 'agreement': (n,)}.

    verdicts (n, 2) holds the preference for each pair (1: its first answer, 2: its second, 1.5: a tie). Column 0 is from when
    the first answer was shown first, column 1 from when the second was. Every pair must have both verdicts.
    shown_first is the share of a pair's two verdicts that went to the answer shown first, where a tie counts as half. Its mean
    is 1/2 without position bias. agreement is True if both verdicts are the same."""
    # an empty list gets two columns, too
    table = np.asarray(verdicts, float).reshape(-1, 2)
    straight, swapped = table.T
    # 1 if the answer shown first won, 0 if it lost, 1/2 for a tie
    first_won_straight = 2 - straight
    first_won_swapped = swapped - 1
    shown_first = (first_won_straight + first_won_swapped) / 2
    agreement = straight == swapped
    return {'shown_first': shown_first, 'agreement': agreement}


def _sigmoid(x):
    """Return the logistic function of x, elementwise."""
    return 1 / (1 + np.exp(-x))


def _cluster_numbers(clusters, n):
    """Return the cluster of each of n members as a number from 0 (n,). None for clusters makes every member one of its own."""
    if clusters is None:
        return np.arange(n)
    _, numbers = np.unique(clusters, return_inverse=True)
    return numbers


def _variance_of_sum(scores, clusters):
    """Return the covariance matrix (k, k) of the sum of scores (n, k), whose mean is 0.

    Clusters are independent of one another, their members are not. One cluster alone tells no variance: the result is nan."""
    n, k = scores.shape
    numbers = _cluster_numbers(clusters, n)
    count = numbers.max() + 1
    # add up each cluster's scores: sums (count, k)
    sums = np.zeros((count, k))
    np.add.at(sums, numbers, scores)
    # unbiased, as n / (n - 1) makes a variance
    factor = count / (count - 1) if count > 1 else np.nan
    return sums.T @ sums * factor


def _root(variance):
    """Return the square root of a variance, or None if it is nan. Rounding may have made a variance of 0 a little negative."""
    if np.isnan(variance):
        return None
    return float(max(variance, 0.0)) ** 0.5
