"""Every formula of losses.py and every divergence of model.py: hand-worked numbers, limits, extremes, gradients.

The hand-worked pair, used wherever nothing else is said:
  pi_w = -10, pi_l = -14, ref_w = -11, ref_l = -12, so a = 1, r = -2, d = 3; n_w = 4, n_l = 8; D_w = 0.4, D_l = 1
  beta = 0.5: beta a = 0.5, beta r = -1, h = beta d = 1.5
"""

import inspect
import itertools
import math
import re
from functools import partial
from math import exp, expm1, log, log1p
from types import SimpleNamespace

import pytest
import torch
from helpers import with_ratios

import losses
import model
from configurator import UserError
from rl import divergences, formulas

PAIR = {'pi_w': -10.0, 'pi_l': -14.0, 'ref_w': -11.0, 'ref_l': -12.0, 'n_w': 4.0, 'n_l': 8.0, 'div_w': 0.4, 'div_l': 1.0,
        'shift': 0.0}  # fmt: skip
double = partial(torch.tensor, dtype=torch.float64)
GOOD = {'pi': -10.0, 'ref': -11.0, 'n': 4.0, 'good': True, 'z': 0.4}


def S(x):
    return 1 / (1 + exp(-x))


def L(x):
    return log1p(exp(-x))


# name -> (hyper-parameters, the loss of the pair above). A loss without a row fails test_every_loss_has_a_row.
HAND = {
    'dpo': ({'beta': 0.5}, L(1.5)),  # 0.2014
    'cdpo': ({'beta': 0.5, 'label_smoothing': 0.1}, 0.9 * L(1.5) + 0.1 * L(-1.5)),  # L(-x) = L(x) + x: 0.3514
    'drdpo': ({'beta': 0.5, 'label_smoothing': 0.0}, L(1.5)),
    'aot': ({'beta': 0.5, 'label_smoothing': 0.2}, L(1.5) + 0.2 * 1.5),
    'beta_dpo': ({'beta': 0.25}, L(0.75)),
    'robust': ({'beta': 0.5, 'label_smoothing': 0.1}, (0.9 * L(1.5) - 0.1 * L(-1.5)) / 0.8),
    # average: a / n_w - r / n_l = 1/4 + 2/8 = 0.5; 0.5 - 1 / (2 * 0.5) = -0.5, squared 0.25
    'ipo': ({'beta': 0.5, 'average': True}, 0.25),
    'tdpo1': ({'beta': 0.5}, L(1.2)),  # 3 - (1 - 0.4) = 2.4, times 0.5
    'tdpo2': ({'beta': 0.5, 'alpha': 0.5}, L(1.35)),  # 3 - 0.5 * 0.6 = 2.7, times 0.5
    'radpo1': ({'beta': 1.0}, L(2.4)),
    'radpo2': ({'beta': 1.0, 'alpha': 0.25}, L(2.85)),  # 3 - 0.25 * 0.6
    'hinge': ({'beta': 0.25}, 0.25),  # 1 - 0.25 * 3
    'dpop': ({'beta': 0.5, 'lam': 5.0}, L(1.5)),  # a = 1 > 0: no penalty; test_dpop has the other side
    # Bernoulli S = S(1.5) = 0.8176 against 0.9: KL = S log(S / 0.9) + (1 - S) log((1 - S) / 0.1)
    'exo': ({'beta': 0.5, 'label_smoothing': 0.1}, S(1.5) * log(S(1.5) / 0.9) + S(-1.5) * log(S(-1.5) / 0.1)),
    'nca': ({'beta': 0.5}, L(0.5) + L(-0.5) / 2 + L(1.0) / 2),
    'bco': ({'beta': 0.5}, L(0.5) + L(1.0)),
    'sppo': ({'beta': 0.25}, 1.0),  # 1 / (2 * 0.25) = 2: (1 - 2)^2 + (-2 + 2)^2
    'apo_zero': ({'beta': 0.5}, 1 - S(0.5) + S(-1.0)),
    'apo_down': ({'beta': 0.5}, S(0.5) + 1 - S(1.5)),
    'discopop': ({'beta': 0.5, 'tau': 0.5}, (1 - S(3.0)) * L(1.5) + S(3.0) * exp(-1.5)),  # h / tau = 3
    'sigmoid_norm': ({'beta': 2.0}, L(1.0)),  # 2 * (1/4 + 2/8)
    'slic': ({'delta': 5.0, 'lam': 0.1}, 2.0),  # max(0, 5 + 10 - 14) = 1, plus 0.1 * 10
    'simpo': ({'beta': 2.0, 'gamma': 0.5}, L(-2.0)),  # -10/4 + 14/8 = -0.75, times 2, minus 0.5
    # p = -10/4 = -2.5, q = -14/8 = -1.75; log odds = p - log(1 - e^p)
    'orpo': ({'lam': 0.2}, 2.5 + 0.2 * L(-0.75 - log(-expm1(-2.5)) + log(-expm1(-1.75)))),
    'cpo': ({'beta': 0.5}, L(2.0) + 2.5),  # pi_w - pi_l = 4; 10 / 4
    'kto': ({'beta': 0.5, 'w_good': 1.5, 'w_bad': 2.0}, 1.5 * (1 - S(0.3))),  # 0.5 * (1 - 0.4)
    'kto_zero': ({'beta': 0.5, 'w_good': 1.5, 'w_bad': 2.0}, 1.5 * (1 - S(0.5))),
}
KTO = ('kto', 'kto_zero')
NO_DIV, NO_REF = {'div_w': 0.0, 'div_l': 0.0}, {'ref_w': 0.0, 'ref_l': 0.0}
# fmt: off
OTHERWISE = [  # name, changed columns, changed hyper-parameters, the loss: other branches, and limits
    ('ipo', {}, {'average': False}, 4.0),  # of sums: (3 - 1)^2
    ('hinge', {}, {'beta': 0.5}, 0.0),  # beyond the margin: 1 - 0.5 * 3 < 0
    ('slic', {}, {'delta': 1.0}, 1.0),  # beyond it: 0.1 * 10 only
    ('dpop', {'pi_w': -13.0}, {}, L(-5.0)),  # a = -2, r = -2, d = 0; lam = 5: 0.5 * (0 - 5 * 2)
    ('kto', {'good': False}, {}, 2 * S(0.3)),  # of a bad answer with a = 1, z = 0.4: 2 (1 - S(0.5 (0.4 - 1)))
    ('kto_zero', {'good': False}, {}, 2 * S(0.5)),
    ('kto', {'z': 0.0}, {}, HAND['kto_zero'][1]),
    *((name, {}, {'label_smoothing': 0.0, 'beta': 0.5}, L(1.5)) for name in ('cdpo', 'robust', 'drdpo', 'aot')),
    ('tdpo2', {}, {'alpha': 0.0}, L(1.5)),  # is DPO, as without divergences
    ('tdpo1', NO_DIV, {}, L(1.5)),
    ('tdpo2', NO_DIV, {}, L(1.5)),
    ('dpo', NO_REF, {}, L(2.0)),  # reference_free: pi_w - pi_l = 4
    # tau = 2, h = -20: (1 - S(-10)) L(-20) + S(-10) exp(20), about 20 + exp(10)
    ('discopop', NO_REF | {'pi_w': -20.0, 'pi_l': 0.0}, {'beta': 1.0, 'tau': 2.0}, (1 - S(-10.0)) * L(-20.0) + S(-10.0) * exp(20.0)),
]
SLOPES = [  # name, changed columns, changed hyper-parameters, the derivative in some columns
    # no gradient through the chosen divergence
    ('tdpo2', {}, {}, {'div_w': 0.0, 'div_l': 0.25 * S(-1.35)}),
    # p = -1e-18, q = -1: L is about the inverse odds ratio, e^(q - p) (1 - e^p) / (1 - e^q) = -p e^-1 / (1 - e^-1);
    # hence the derivative of lam L in p is far from 0; the NLL adds -1
    ('orpo', {'pi_w': -1e-18, 'pi_l': -1.0, 'n_w': 1.0, 'n_l': 1.0}, {'lam': 0.5}, {'pi_w': -1 - 0.5 * exp(-1) / (1 - exp(-1))}),
    # L(-2000) = 2000: the form must not be log(sigmoid)
    ('dpo', NO_REF | {'pi_w': -2000.0, 'pi_l': 0.0}, {'beta': 1.0}, {'pi_w': -1.0}),
]
# fmt: on


def wanted(name):
    """The columns that a loss is called with here."""
    parameters = inspect.signature(losses.LOSSES[name]).parameters.values()
    return [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD and (name, p.name) != ('kto_zero', 'z')]


def call(name, columns, **keywords):
    """A loss by its name, given the columns that its signature asks for; log-ratios are made from the log-probs."""
    columns = with_ratios(columns)
    return losses.LOSSES[name](*(columns[k] for k in wanted(name)), **keywords)


def evaluate(name, given=None, dtype=torch.float64, leaves=(), **changes):
    """(loss, {name: input}) of a row of HAND; given replaces inputs, changes replaces hyper-parameters."""
    values = (GOOD if name in KTO else PAIR) | (given or {})
    x = {}
    for k in [name.replace('ratio', who) for name in wanted(name) for who in ('pi', 'ref')]:
        x[k] = torch.as_tensor(values[k], dtype=torch.bool if k == 'good' else dtype).reshape(-1).clone()
        x[k].requires_grad_(k in leaves)
    return call(name, x, **HAND[name][0] | changes), x


def gradients(loss, x):
    """name -> gradient of the sum of a loss in those inputs that require one."""
    leaves = {k: v for k, v in x.items() if v.requires_grad}
    slopes = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, slopes, strict=True))


def margins(*d):
    """(ratio_w, ratio_l) of pairs that have these d, the rejected answer's 0."""
    return double(d), torch.zeros(len(d), dtype=torch.float64)


# ---- hand-worked numbers, limits ----


def test_every_loss_has_a_row():
    assert set(HAND) == set(losses.LOSSES)


@pytest.mark.parametrize(
    'name, columns, changes, expected', [*((name, {}, {}, loss) for name, (_, loss) in HAND.items()), *OTHERWISE]
)
def test_hand_worked(name, columns, changes, expected):
    assert evaluate(name, columns, **changes)[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('name, columns, changes, expected', SLOPES)
def test_hand_worked_slopes(name, columns, changes, expected):
    found = gradients(*evaluate(name, columns, leaves=list(expected), **changes))
    assert {k: slope.item() for k, slope in found.items()} == pytest.approx(expected)


def test_what_is_no_loss_of_pairs():
    """sft, the reward model's loss, the importance of a rejected answer, and rewards."""
    # answers of 2 and 8 tokens with log-probs -4 and -6: mean over tokens 10 / 10 = 1, not (2 + 0.75) / 2
    pi, n = torch.tensor([-4.0, -6.0]), torch.tensor([2.0, 8.0])
    assert losses.sft(pi, n).tolist() == [2.0, 0.75]
    assert ((losses.sft(pi, n) * n).sum() / n.sum()).item() == 1
    # scores 2 and 0.5 with margin 1: L(0.5) + 0.01 * 2.5^2
    scores = double([2.0, 0.5, 1.0])
    assert formulas.bradley_terry(*scores, center_coef=0.01).item() == pytest.approx(L(0.5) + 0.0625)
    # L(-0.5) = L(0.5) + 0.5
    smoothed = formulas.bradley_terry(*scores, center_coef=0, label_smoothing=0.1).item()
    assert smoothed == pytest.approx(L(0.5) + 0.1 * 0.5)
    # advantages of answers of one token, all of them: reward less value
    one, two = double([[1.0], [2.0]]), double([[0.5], [3.0]])
    assert formulas.gae(one, two, one > 0, gamma=0.9, lam=0.5).tolist() == [[0.5], [-1.0]]
    # exp(r) = exp(-2); exp(1000) is cut at the limit; no gradient
    x = torch.tensor([-14.0, 1000.0], requires_grad=True)
    w = losses.importance(x - torch.tensor([-12.0, 0.0]), importance_max=10.0)
    assert w.tolist() == pytest.approx([exp(-2), 10.0]) and not w.requires_grad
    # 0.5 * (-10 + 11 + 0.5 * 0.4) / 4 = 0.15; with the log-prob alone it is the log-prob
    assert losses.reward(1.0, 4.0, 0.4, beta=0.5, alpha=0.5) == pytest.approx(0.15) and losses.reward(-10.0) == -10.0


def normalized(loss, shift, beta_prime):
    w = losses.drdpo_weight(torch.as_tensor(loss), torch.as_tensor(shift), beta_prime=beta_prime)
    return w / w.sum()


def test_drdpo_weight_by_hand():
    """l = (1, 3), beta' = 2: e^(-1/2) and e^(-3/2), so the weights are S(1) and S(-1): high losses count less. A shift
    cancels, and with an infinite beta' it is the mean. Nor does anything overflow in float32."""
    l = double([1.0, 3.0])
    assert losses.drdpo_weight(l, 0.0, beta_prime=2.0).tolist() == pytest.approx([exp(-0.5), exp(-1.5)])
    assert normalized(l, 1e-9, 1e9).tolist() == pytest.approx([0.5, 0.5], abs=1e-8)
    for shift in (-5.0, 0.0, 0.2, 30.0):
        assert normalized(l, shift, 2.0).tolist() == pytest.approx([S(1.0), S(-1.0)])
    # measured from the smallest, or from a shift 4000 too high
    l = torch.tensor([0.0, 1.0, 4000.0])
    for shift in (0.0, 4000.0):
        assert normalized(l + shift, shift, 0.5).tolist() == pytest.approx([S(2.0), S(-2.0), 0.0])
    assert losses.drdpo_weight(l, torch.tensor(4000.0), beta_prime=0.5).isfinite().all()


# ---- beta-DPO's statistic ----


def beta_statistic(d, state=None, seed=0, **keywords):
    keywords = {'beta': 0.1, 'a': 0.6, 'rho': 0.0} | keywords
    return losses.beta_dpo_statistic(*margins(*d), state or {}, torch.Generator().manual_seed(seed), **keywords)


def test_beta_dpo_statistic_by_hand(monkeypatch):
    """d = (1, 2, 3): mean 2, std 1, which start the state; beta_t = beta. Then d = (3, 5): mean 4, std sqrt 2;
    m = 0.9 * 2 + 0.1 * 4 = 2.2, s = 0.9 + 0.1 sqrt 2; beta_t = 0.1 (1 + 0.6 (4 - 2.2)) = 0.208.
    Only the pairs kept set beta: d = (1, 2, 3, 10), m = 4, kept (1, 10): 0.1 (1 + 2 (5.5 - 4)) = 0.4."""
    values, state = beta_statistic([1, 2, 3])
    assert state == pytest.approx({'mean': 2.0, 'std': 1.0}) and values['beta'].tolist() == pytest.approx([0.1] * 3)
    before = dict(state)
    values, after = beta_statistic([3, 5], state)
    assert state == before, 'the state that was passed in must not change: evaluation passes it too'
    assert after == pytest.approx({'mean': 2.2, 'std': 0.9 + 0.1 * math.sqrt(2)})
    assert values['beta'].tolist() == pytest.approx([0.208] * 2) and values['weight'].tolist() == [1, 1]
    keep = torch.tensor([True, False, False, True])
    monkeypatch.setattr(losses, 'keep_near', lambda *args, **keywords: keep)
    values, _ = beta_statistic([1, 2, 3, 10], a=2.0, rho=0.5)
    assert values['beta'].tolist() == pytest.approx([0.4] * 4) and values['weight'].tolist() == [1, 0, 0, 1]


# fmt: off
@pytest.mark.parametrize('d, state, options, beta', [
    # m = 0.9 * 13/3 + 0.1 = 4: 0.1 (1 + 40 (1 - 4)) < 0, and the floor is 1e-3
    ([1.0, 1.0], {'mean': 13 / 3, 'std': 1.0}, {'a': 40.0}, 1e-3),
    # without a and rho it is dpo
    ([-4.0, 1.0, 2.0, 9.0], {'mean': 1.0, 'std': 3.0}, {'a': 0.0}, 0.1),
    # one pair, or equal pairs, as at step 0 where policy = reference: std 0, nothing is filtered, nothing is NaN
    *((d, state, {'a': 0.0, 'rho': 0.5}, 0.1) for d in ([2.0], [2.0] * 3) for state in ({}, {'mean': 1.0, 'std': 1.0})),
])
# fmt: on
def test_beta_dpo_keeps_all(d, state, options, beta):
    values, after = beta_statistic(d, state, **options)
    assert values['beta'].tolist() == pytest.approx([beta] * len(d)) and values['weight'].tolist() == [1] * len(d)
    assert math.isfinite(after['mean'] + after['std']) and not values['beta'].requires_grad
    if d[0] == 2 and state:
        assert after == pytest.approx({'mean': 1.1, 'std': 0.9})


def keep_near(d, mean, std, rho):
    return losses.keep_near(double(d), mean, std, torch.Generator().manual_seed(0), rho=rho)


def test_how_many_are_kept():
    """round(B (1 - rho)), at least one: 10 (1 - 0.9) is 0.9999999999999998 in floating point, and keeps one. Which ones follows
    the generator."""
    for size, rho, kept in (10, 0.9, 1), (10, 0.2, 8), (7, 0.3, 5), (8, 0.0, 8), (4, 0.99, 1), (1, 0.9, 1):
        assert keep_near(range(size), 0.0, 2.0, rho).sum() == kept
    # 100 to 107 standard deviations away exp() is 0 for all; the nearest are still the ones kept
    assert keep_near(range(100, 108), 0.0, 1.0, 0.5).tolist() == [True] * 4 + [False] * 4
    assert keep_near(range(100, 108), 0.0, 1e-200, 0.5).sum() == 4
    masks = [beta_statistic(range(20), seed=seed, rho=0.5)[0]['weight'] for seed in (0, 0, 1)]
    assert masks[0].equal(masks[1]) and not masks[0].equal(masks[2])


# of three pairs, of weights 1, U and V, the third stays out if the others come in either order
U, V = exp(-0.5), exp(-2.0)
T = 1 + U + V
# fmt: off
DRAWN = [  # pairs, mean, std, rho, which pair is watched, how often it is kept, draws
    # 4000 draws: standard deviation sqrt(0.62 * 0.38 / 4000) = 0.0077; 0.005 where it is S(2)
    ([0.0, 1.0], 0.0, 1.0, 1 / 2, 0, S(0.5), 4000),  # weights 1 and e^(-1/2)
    ([0.0, 1.0], 1.0, 0.5, 1 / 2, 1, S(2.0), 4000),  # around mean 1 the pair at 1 is likelier; std 0.5 doubles the distance
    # 0.7761; with noise of the wrong sign it is 0.738. 8000 draws: standard deviation 0.0047
    ([0.0, 1.0, 2.0], 0.0, 1.0, 1 / 3, 2, 1 - (1 / T) * (U / (U + V)) - (U / T) * (1 / (1 + V)), 8000),
]
# fmt: on
@pytest.mark.parametrize('d, mean, std, rho, which, expected, draws', DRAWN)
def test_keep_near_draws_near_pairs_more_often(d, mean, std, rho, which, expected, draws):
    """Without replacement, one after the other; to four standard deviations."""
    generator, d = torch.Generator().manual_seed(0), torch.tensor(d)
    kept = sum(losses.keep_near(d, mean, std, generator, rho=rho)[which].item() for _ in range(draws)) / draws
    assert kept == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / draws))


def test_statistics_of_kto_and_aot():
    """kto: the mean of the log-ratios (2, -1) is 0.5; of (-2, 1) below 0, so 0. The same z for every example of the step.
    aot: policy margins (3, 1, 2) against reference margins (10, 30, 20): smallest with smallest, so (30, 10, 20).
    The shifts are 10 - 30, 30 - 10 and 20 - 20, and d becomes 3 - 30, 1 - 10 and 2 - 20."""
    for ratios, z in ([2.0, -1.0], 0.5), ([-2.0, 1.0], 0.0):
        columns, state = losses.kto_statistic(torch.tensor(ratios), {'some': 'state'}, None)
        assert columns['z'].tolist() == [z, z] and state == {'some': 'state'}
    pi_w, pi_l, ref_w, ref_l = double([[3.0, 1, 4], [0, 0, 2], [10, 31, 20], [0, 1, 0]])
    ratios = pi_w - ref_w, pi_l - ref_l
    shift = losses.aot_statistic(pi_w, pi_l, *ratios, {}, None)[0]['shift']
    assert shift.tolist() == [-20, 20, 0]
    ours = losses.aot(*ratios, shift, beta=0.5, label_smoothing=0.0)
    torch.testing.assert_close(ours, losses.dpo(*margins(-27.0, -9.0, -18.0), beta=0.5))


def test_weights_and_statistics_have_no_gradient():
    x, zero = double([1.0, 3.0, 2.0], requires_grad=True), double([0.0] * 3)
    columns = losses.beta_dpo_statistic(x, zero, {}, torch.Generator(), beta=0.1, a=0.6, rho=0.2)[0]
    columns |= losses.kto_statistic(x, {}, None)[0] | losses.aot_statistic(x, zero, x / 2, zero, {}, None)[0]
    columns['of Dr. DPO'] = losses.drdpo_weight(x, x.min(), beta_prime=1.0)
    assert [name for name, values in columns.items() if values.requires_grad] == []


# ---- extremes ----


def extreme_inputs(name):
    """Log-ratio margins up to +-2000, as sums of non-positive log-probs; at 0, as at the first step, policy = reference."""
    d = torch.tensor([-2000.0, -1000, -200, -100, -20, -1, 0, 1, 20, 100, 200, 1000, 2000])
    if name in KTO:
        good = torch.arange(len(d) * 2) < len(d)
        pi = (d.clamp(max=0) - 1).repeat(2)
        return {'pi': pi, 'ref': pi - d.repeat(2), 'good': good, 'z': torch.full_like(pi, 3.0)}
    same = {'ref_w': -1, 'ref_l': -1, 'n_w': 5, 'n_l': 10, 'div_w': 1, 'div_l': 3, 'shift': 0}
    given = {k: torch.full_like(d, value) for k, value in same.items()}
    return given | {'pi_w': d.clamp(max=0) - 1, 'pi_l': (-d).clamp(max=0) - 1}


@pytest.mark.parametrize('name', HAND)
@pytest.mark.parametrize('beta', [0.1, 1.0])
def test_float32_at_extreme_margins(name, beta):
    """Value and gradient are finite in float32 and equal to those in float64.

    Every loss here is mathematically finite at these margins. discopop is so for tau <= 1, where exp(-h) is weighted by
    S(h / tau) <= exp(h / tau); a larger tau lets exp(-h) through, which is exp(1000) at tau = 2, h = -2000."""
    changes = {'beta': beta} if 'beta' in HAND[name][0] else {}
    given, results = extreme_inputs(name), []
    for dtype in (torch.float32, torch.float64):
        loss, x = evaluate(name, given, dtype, leaves=[k for k in given if k.startswith('pi')], **changes)
        results.append([loss.detach(), *gradients(loss, x).values()])
    for short, long in zip(*results, strict=True):
        assert short.isfinite().all()
        torch.testing.assert_close(short.double(), long, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_orpo_of_certain_and_hopeless_answers(dtype):
    """Mean log-probs from 0 to -200 on either side: finite value and gradient."""
    for p in (0.0, -1e-30, -1e-8, -0.5, -0.6931472, -0.7, -3.0, -200.0):
        given = {'pi_w': [p, -1.0, p], 'pi_l': [-1.0, p, p], 'n_w': [1.0] * 3, 'n_l': [1.0] * 3}
        loss, x = evaluate('orpo', given, dtype, leaves=['pi_w', 'pi_l'], lam=0.5)
        assert all(v.isfinite().all() for v in (loss, *gradients(loss, x).values())), p
    x = double([-1e-12, -1e-3, -0.5, -0.6931, -0.6932, -1.0, -30.0], requires_grad=True)
    value = losses.log1mexp(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert value.tolist() == pytest.approx([log(-expm1(v)) for v in x.tolist()], rel=1e-12)
    assert slope.tolist() == pytest.approx([-exp(v) / -expm1(v) for v in x.tolist()], rel=1e-12)


@pytest.mark.parametrize('name', HAND)
def test_gradient_is_the_derivative(name):
    """Finite differences in every input but D_w of the losses that stop its gradient, and lengths."""
    leaves = ['pi_w', 'pi_l', 'ref_w', 'ref_l', 'pi', 'ref', 'z', 'div_l', *(['div_w'] if name[-1] == '1' else [])]
    base = GOOD if name in KTO else PAIR
    # two examples off every kink: the pair above, and one whose chosen answer has become less likely
    given = {k: torch.tensor([v, v - 2.3] if k in ('pi_w', 'pi') else [v, v]) for k, v in base.items()}
    _, x = evaluate(name, given, leaves=leaves)
    free = [k for k, v in x.items() if v.requires_grad]
    fixed = {k: v for k, v in x.items() if k not in free}

    def fn(*values):
        return call(name, fixed | dict(zip(free, values, strict=True)), **HAND[name][0])

    assert torch.autograd.gradcheck(fn, [x[k] for k in free])


# ---- divergences ----

REF = double([0.5, 0.25, 0.125, 0.125]).log()
PI = double([0.25, 0.25, 0.25, 0.25]).log()
LOG_PI = double([0.125, 0.125, 0.25, 0.5]).log()
DIVERGENCES = {'kl': divergences.kl, 'cvar': divergences.cvar(0.4), 'erm': divergences.erm(2.0)}
DIVERGENCES |= {'released': divergences.released(0.7), 'released, unsplit': divergences.released(0.7, parts=1)}
# fmt: off
BY_HAND = [  # divergence, log-probs of the policy, how many of them, the value in units of log 2
    # Z = log ref - log pi = (1, 0, -1, -1): KL(ref || pi) = 0.5 - 0.125 - 0.125
    *((d, PI, 4, 0.25) for d in (divergences.kl, divergences.divergence_of('tdpo1', 'erm', 2.0))),
    # the worst mass mu: 0.5 of Z = 1, then 0.25 of Z = 0, then 0.25 of Z = -1; mean over mu
    *((divergences.cvar(mu), PI, 4, value) for mu, value in (
        (0.25, 1.0), (0.5, 1.0), (0.6, 0.5 / 0.6), (0.75, 0.5 / 0.75), (0.8, (0.5 - 0.05) / 0.8), (1.0, 0.25))),
    # log(0.5 * 2 + 0.25 * 1 + 0.25 / 2); log(0.5 * 4 + 0.25 + 0.25 / 4) / 2
    (divergences.divergence_of('radpo1', 'erm', 1.0), PI, 4, log(1.375) / log(2)),
    (divergences.erm(2.0), PI, 4, log(2.3125) / 2 / log(2)),
    # pi = (1, 1, 2, 4) / 8, so Z = (2, 1, -1, -2), with p = (4, 2, 1, 1) / 8. Unsplit, mu = 0.7: the quantile at 0.3 has
    # rank 0.9, between -2 and -1: -1.1. Above it 1 + 1/4 - 1/8
    (divergences.released(0.7, parts=1), LOG_PI, 4, 9 / 8),
    # halves: (2, 1) has 1.3, above it 2, giving 1; (-1, -2) has -1.7, above it -1, giving -1/8
    (divergences.released(0.7), LOG_PI, 4, 7 / 8),
    # three entries, p = (4, 2, 1) / 7: halves of 1 and 2; nothing is above itself in (2); (1, -1) has -0.4 and gives 2/7
    (divergences.released(0.7), LOG_PI, 3, 2 / 7),
    # even mu = 1 drops the smallest: it is not the KL, 7/8
    (divergences.released(1.0, parts=1), LOG_PI, 4, 9 / 8),
]
# fmt: on


@pytest.mark.parametrize('divergence, log_pi, entries, expected', BY_HAND)
def test_divergence_by_hand(divergence, log_pi, entries, expected):
    found, _ = divergence(log_pi[:entries], REF[:entries])
    assert found.item() == pytest.approx(expected * log(2))


def random_log_probs(seed, rows=6, vocabulary=9):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)


def test_risks_between_the_kl_and_the_largest_z():
    """CVaR falls with mu from the largest Z down to the KL, which ERM is for mu -> 0, and rises from there."""
    log_pi, log_ref = random_log_probs(1).log_softmax(-1)
    kl, worst = divergences.kl(log_pi, log_ref)[0], (log_ref - log_pi).max(-1).values
    plain = torch.nn.functional.kl_div(log_pi, log_ref, log_target=True, reduction='none').sum(-1)
    cvar = torch.stack([divergences.cvar(mu)(log_pi, log_ref)[0] for mu in (1e-9, 0.01, 0.1, 0.3, 0.6, 0.9, 1.0)])
    erm = torch.stack([divergences.erm(mu)(log_pi, log_ref)[0] for mu in (1e-7, 0.01, 0.1, 1.0, 10.0, 1000.0)])
    torch.testing.assert_close(torch.stack((kl, cvar[-1], cvar[0])), torch.stack((plain, kl, worst)))
    torch.testing.assert_close(erm[0], kl, rtol=1e-5, atol=1e-6)
    assert (cvar.diff(dim=0) <= 1e-6).all() and (cvar[0] - cvar[-1] > 0.1).all()
    assert (erm[1:].diff(dim=0) >= -1e-12).all() and (erm[1:] <= worst + 1e-12).all()


@pytest.mark.parametrize('name', DIVERGENCES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_divergence_at_extremes(name, dtype):
    """Of policy and itself Z = 0 everywhere: value 0, gradient finite, also where a probability underflows to 0. Where the
    policy gives the reference's favourite a log-prob of -2000, Z and the divergence are large, not infinite."""
    own = [[0.3, -1.2, 2.0, 0.0], [0.0, -2000.0, 5.0, 1.0]]
    logits = torch.tensor([*own, [-2000.0, 0.0, 1.0, 2.0]], dtype=dtype, requires_grad=True)
    reference = torch.tensor([*own, [0.0, -2000.0, -3.0, -4.0]], dtype=dtype)
    value, _ = DIVERGENCES[name](logits.log_softmax(-1), reference.log_softmax(-1))
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert value[:2].abs().max() < 1e-6 and value.isfinite().all() and grad.isfinite().all()


def test_a_divergence_with_another_mass_than_its_value_is_refused(monkeypatch):
    monkeypatch.setitem(divergences.RISKS, 'chi2', lambda mu: divergences.kl._replace(
        value=lambda log_pi, log_ref, mass: (mass * torch.expm1(log_ref - log_pi)).sum(-1)))  # fmt: skip
    with pytest.raises(UserError, match='the mass of chi2 .* is not minus the slope of its value'):
        divergences.divergence_of('radpo1', 'chi2', 1.0)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_mass_and_broken_logits(name):
    """The mass is the slope. What is not finite gives no number nor an error: a bad step, which skip_bad_steps may leave out."""
    log_pi, log_ref = random_log_probs(2).log_softmax(-1)
    log_pi.requires_grad_()
    value, mass = DIVERGENCES[name](log_pi, log_ref)
    torch.testing.assert_close(mass, -torch.autograd.grad(value.sum(), log_pi)[0])
    for broken in (math.nan, -math.inf):
        logits, reference = random_log_probs(4, rows=3, vocabulary=7)
        logits[1, 2] = broken
        value, _ = DIVERGENCES[name](logits.log_softmax(-1), reference.log_softmax(-1))
        assert value.isfinite().tolist() == [True, False, True]


def by_sorting(z, p, mu):
    """The worst mass by its definition: all of the words with the largest z, until mu is full."""
    order = z.argsort(-1, descending=True)
    sorted_p = p.gather(-1, order)
    mass = (mu - (sorted_p.cumsum(-1) - sorted_p)).clamp(min=0).minimum(sorted_p)
    return torch.zeros_like(p).scatter(-1, order, mass)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('mu', [0.01, 0.3, 0.98, 1.0])
def test_worst_mass_is_that_of_a_sort(mu, dtype):
    logits, reference = random_log_probs(3, rows=40, vocabulary=5000) * 2
    reference[0] = logits[0]  # Z = 0 everywhere
    reference[1, 3] = -2000.0  # far outside of all others
    if dtype == torch.float64:
        reference[39] = logits[39] + 1e-7 * reference[39]  # nearly equal everywhere
    logits[2:10], reference[2:10] = logits[2:10].round(), reference[2:10].round()  # many ties
    log_pi, log_ref = (x.log_softmax(-1).to(dtype) for x in (logits, reference))
    z, p = log_ref - log_pi, log_ref.softmax(-1)
    found, tail = divergences.cvar(mu).mass(log_pi, log_ref)
    mass, expected = found * mu, by_sorting(z.double(), p.double(), mu)
    assert (mass >= 0).all() and (mass <= p * (1 + 1e-6)).all()
    assert found.equal(divergences.cvar(mu).mass(log_pi, log_ref, tail)[0])
    torch.testing.assert_close(mass.double().sum(-1), expected.sum(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close((mass * z).double().sum(-1), (expected * z).sum(-1), rtol=0, atol=3e-6)
    # of words that tie at the border any may count
    torch.testing.assert_close(mass[10:].double(), expected[10:], rtol=0, atol=1e-6)


# ---- the LM head that turns hidden states into log-probs and divergences ----

CONFIGS = {'plain': {}, 'scale': {'logit_scale': 0.3}, 'multiplier': {'lm_head_multiplier': 2.0}}
CONFIGS['soft cap'] = {'final_logit_softcapping': 3.0}
CONFIGS['inverse scale and cap'] = {'logits_scaling': 2.0, 'final_logit_softcapping': 3.0}


def plainly(hidden, weight, bias, config):
    """Log-probs of the whole vocabulary in one piece, from the formulas."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    factor = config.get('logit_scale', 1.0) * config.get('lm_head_multiplier', 1.0)
    logits = logits * factor / config.get('logits_scaling', 1.0)
    cap = config.get('final_logit_softcapping')
    return (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)


def cut(sizes, n, vocabulary, most):
    return [slice(i, min(i + sizes[most], n)) for i in range(0, n, sizes[most])]


@pytest.mark.parametrize('with_bias', [False, True], ids=['no bias', 'bias'])
@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('name', [None, *DIVERGENCES])
def test_head(name, config, with_bias, monkeypatch):
    """Values and gradients as plain autograd has them in one piece, in chunks of 1, 2 and all 5 positions, and their blocks."""
    generator, (divergence, config) = torch.Generator().manual_seed(0), (DIVERGENCES.get(name), CONFIGS[config])
    shapes = [(5, 3), (7, 3), (7,), (5, 3), (7, 3), (7,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if not with_bias:
        tensors[2] = tensors[5] = None
    policy, (hidden, *head) = tensors[:3], tensors[3:]
    leaves = [x.requires_grad_() for x in policy if x is not None]

    # in one piece
    rows, target = torch.arange(5), torch.tensor([0, 6, 3, 3, 1])
    log_pi, log_ref = plainly(*policy, config), plainly(hidden, *head, config)
    expected = [log_pi[rows, target]]
    if divergence:
        expected += [divergence(log_pi, log_ref)[0], log_ref[rows, target]]
    upstream = torch.linspace(0.5, 2.0, 10, dtype=torch.float64).view(2, 5)[: len(expected)]
    wanted = torch.autograd.grad(sum((u * e).sum() for u, e in zip(upstream, expected, strict=False)), leaves)

    # in chunks, of which blocks of one position
    for size in (1, 2, 5):
        monkeypatch.setattr(model.Head, 'chunks', staticmethod(partial(cut, {2**23: size, 2**19: 1})))
        reference = (hidden, *head) if divergence else None
        out = model.Head.apply(*policy, target, SimpleNamespace(**config), divergence, reference)
        torch.testing.assert_close(out, torch.stack(expected))
        with monkeypatch.context() as backward:
            backward.setattr(divergences, 'find_tail', None)  # forward has found cvar's
            found = torch.autograd.grad((upstream * out[: len(upstream)]).sum(), leaves)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_chunks_cover_everything():
    for n, vocabulary in itertools.product((0, 1, 5, 100), (7, 2**23, 2**30)):
        pieces = model.Head.chunks(n, vocabulary, 2**23)
        assert [i for piece in pieces for i in range(n)[piece]] == list(range(n))


SPECIFICATION = dict.fromkeys((*losses.LOSSES.values(), formulas.bradley_terry))


@pytest.mark.parametrize('fn', SPECIFICATION, ids=lambda fn: fn.__name__)
def test_specification(fn):
    """An equation and its source. No *args or **kwargs; columns are positional without a default (but z), options are keywords."""
    assert re.search(r'\b[LS]\(|\^2|max\(0|KL\(', fn.__doc__), 'an equation'
    assert re.search(r'\d{4}\.\d{5}|note, eq', fn.__doc__), 'an arXiv number or a named note'
    columns = (*PAIR, *GOOD, 'ratio', 'ratio_w', 'ratio_l')
    for p in inspect.signature(fn).parameters.values() if fn in losses.LOSSES.values() else ():
        assert p.kind == (p.POSITIONAL_OR_KEYWORD if p.name in columns else p.KEYWORD_ONLY)
        assert p.default is p.empty or p.name == 'z'
