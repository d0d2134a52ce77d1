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
from typing import NamedTuple

HOLDS, SIZE_OPEN, NEGLIGIBLE, SAME, CONTRARY, OPEN = WORDS = (
    'holds', 'holds, size open', 'real but negligible', 'no difference', 'contrary', 'cannot tell',
)  # fmt: skip
SMALLEST = {'score': 0.05, 'gold': 0.05, 'accuracy': 0.01, 'share': 0.1}
LEVEL = 0.05


class Verdict(NamedTuple):
    """What the rule says of one claim: its word, and the mean and 95% interval of its differences (None without two seeds)."""

    word: str
    mean: float | None = None
    lower: float | None = None
    upper: float | None = None


def t_tail(t, df):
    """P(T > t) for Student's t with a whole number of degrees of freedom: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(abs(t) / math.sqrt(df))
    cos2 = math.cos(angle) ** 2

    # the series of both has (df - 1) // 2 or df // 2 terms, each a known multiple of the one before
    odd = df % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
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
    """The t with P(T > t) = tail, for a tail below a half, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > tail else (low, middle)
    return high


def holm(p_values, level=LEVEL):
    """For each p-value whether Holm's method rejects: the smallest against level / n, the next against level / (n - 1) ..."""
    rejected = [False] * len(p_values)
    in_order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, i in enumerate(in_order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def p_values(differences, d):
    """p-values of the three questions of the rule, and Verdict's mean and interval: ((zero, above, within), (mean, lower, upper))."""
    n = len(differences)
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    # rounding in the numbers must not make five equal differences infinitely sure
    error = max(deviation / n**0.5, 1e-9)
    zero = 2 * t_tail(abs(mean) / error, n - 1)
    above = min(1.0, 2 * t_tail((mean - d) / error, n - 1))
    within = t_tail((d - abs(mean)) / error, n - 1)
    reach = t_quantile(LEVEL / 2, n - 1) * error
    return (zero, above, within), (mean, mean - reach, mean + reach)


def word_of(mean, is_not_zero, is_above, is_within):
    """The rule's word from the answers to its three questions."""
    if not is_not_zero:
        return SAME if is_within else OPEN
    if mean < 0:
        return CONTRARY
    if is_above:
        return HOLDS
    return NEGLIGIBLE if is_within else SIZE_OPEN


def judge(claims):
    """The verdicts on all claims of a report together. claims: (differences by seed, None where a run is missing; unit)."""
    # a claim without numbers still counts as one of the many: its p-values are 1
    measured = []
    for differences, unit in claims:
        is_whole = len(differences) > 1 and None not in differences
        measured.append(p_values(differences, SMALLEST[unit]) if is_whole else ((1.0, 1.0, 1.0), None))
    answers = [holm(question) for question in zip(*(questions for questions, _ in measured), strict=True)]

    verdicts = []
    for (_, interval), *answer in zip(measured, *answers, strict=True):
        verdicts.append(Verdict(word_of(interval[0], *answer), *interval) if interval else Verdict(OPEN))
    return verdicts
