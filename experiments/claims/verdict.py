"""The rule that decides about a claim, fixed before any reported run.

The rule. A claim is a difference between two methods, positive where the paper says so, measured once for every seed. A seed has its
own SFT model, pairs and flips; both methods see the same ones. The smallest difference worth a name is d: 0.05 of gold reward or score,
0.01 of accuracy, a tenth of a KL. Student's t over the seeds gives a p-value for each of three questions; Holm's method at 5% answers
each question for all claims of the report together.
  not zero     the difference is not 0 (two-sided)
  above d      it is larger than d (two-sided)
  within d     it is between -d and d (the larger of the p-values of two one-sided tests)
From the answers follows one of six words:
  holds                not zero, and above d
  holds, size open     not zero, and positive; neither above d nor within d
  real but negligible  not zero, positive, and within d
  no difference        within d, and zero is possible
  contrary             not zero, and negative
  cannot tell          anything else; also fewer than two seeds, or a run that failed or is missing
Reports show the plain 95% interval of each claim: a word is never stronger than this interval allows.
"""

import functools
import math
import statistics

HOLDS, SIZE_OPEN, NEGLIGIBLE, SAME, CONTRARY, OPEN = WORDS = (
    'holds', 'holds, size open', 'real but negligible', 'no difference', 'contrary', 'cannot tell',
)  # fmt: skip
SMALLEST = {'score': 0.05, 'gold': 0.05, 'accuracy': 0.01, 'share': 0.1}
LEVEL = 0.05


def t_tail(t, df):
    """Return P(T > t) for Student's t with a whole number of degrees of freedom: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(abs(t) / math.sqrt(df))
    cos2 = math.cos(angle) ** 2

    # the series of both has (df - 1) // 2 or df // 2 terms, each a known multiple of the one before
    odd = df % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, df, 2):
        total += term
        term *= cos2 * k / (k + 1)

    inside = math.sin(angle) * total
    if odd:
        inside = (angle + inside) * 2 / math.pi
    tail = (1 - inside) / 2
    return tail if t >= 0 else 1 - tail


@functools.cache
def t_quantile(tail, df):
    """Return the t with P(T > t) = tail, for a tail below a half, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        if t_tail(middle, df) > tail:
            low = middle
        else:
            high = middle
    return high


def holm(p_values):
    """Return for each p-value whether Holm's method rejects: the smallest against LEVEL / n, the next against LEVEL / (n - 1) ..."""
    rejected = [False] * len(p_values)
    in_order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, i in enumerate(in_order):
        if p_values[i] > LEVEL / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def standard_error(differences):
    """Return the standard error of the mean, at least 1e-9: rounding must not make five equal differences infinitely sure."""
    return max(statistics.stdev(differences) / len(differences) ** 0.5, 1e-9)


def confidence(differences):
    """Return the plain 95% interval of the mean: (lower, upper)."""
    mean = statistics.fmean(differences)
    reach = t_quantile(LEVEL / 2, len(differences) - 1) * standard_error(differences)
    return mean - reach, mean + reach


def word_of(differences, is_not_zero, is_above, is_within):
    """Return the rule's word, from the answers to its three questions."""
    if not is_not_zero:
        return SAME if is_within else OPEN
    if statistics.fmean(differences) < 0:
        return CONTRARY
    if is_above:
        return HOLDS
    return NEGLIGIBLE if is_within else SIZE_OPEN


def judge(claims):
    """Return the words for all claims of a report. claims: [(differences by seed, None where a run is missing; unit)]."""
    # p-values of not zero, above d, within d; a claim without numbers still counts as one of the many: its p-values are 1
    p_values = []
    for differences, unit in claims:
        df, d = len(differences) - 1, SMALLEST[unit]
        if df < 1 or None in differences:
            p_values.append((1.0, 1.0, 1.0))
            continue
        mean, error = statistics.fmean(differences), standard_error(differences)
        not_zero = 2 * t_tail(abs(mean) / error, df)
        above = min(1.0, 2 * t_tail((mean - d) / error, df))
        p_values.append((not_zero, above, t_tail((d - abs(mean)) / error, df)))
    answers = map(holm, zip(*p_values, strict=True))
    together = zip(claims, *answers, strict=True)
    return [word_of(differences, *answer) for (differences, _), *answer in together]
