"""Every formula of losses.py and every divergence of model.py: hand-worked numbers, limits, extremes, gradients.

The hand-worked pair, used wherever nothing else is said:
  pi_w = -10, pi_l = -14, ref_w = -11, ref_l = -12, so a = 1, r = -2, d = 3; n_w = 4, n_l = 8; D_w = 0.4, D_l = 1
  beta = 0.5: beta a = 0.5, beta r = -1, h = beta d = 1.5
"""

import ast
import inspect
import itertools
import math
import re
from functools import partial
from math import exp, expm1, log, log1p
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import with_ratios

import losses
import model
from rl import formulas

PAIR = {
    **{'pi_w': -10.0, 'pi_l': -14.0, 'ref_w': -11.0, 'ref_l': -12.0},
    **{'n_w': 4.0, 'n_l': 8.0, 'div_w': 0.4, 'div_l': 1.0, 'shift': 0.0},
}
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


def names(fn):
    return [p.name for p in inspect.signature(fn).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]


def wanted(name):
    """The columns that a loss is called with here."""
    return [k for k in names(losses.LOSSES[name]) if (name, k) != ('kto_zero', 'z')]


def call(name, columns, **keywords):
    """A loss by its name, given the columns that its signature asks for; log-ratios are made from the log-probs."""
    columns = with_ratios(columns)
    return losses.LOSSES[name](*(columns[k] for k in wanted(name)), **keywords)


def evaluate(name, given=None, dtype=torch.float64, leaves=(), **changes):
    """(loss, {name: input}) of a row of HAND; given replaces inputs, changes replaces hyper-parameters."""
    values = (GOOD if name in KTO else PAIR) | (given or {})
    inputs = [
        k
        for x in wanted(name)
        for k in ((x.replace('ratio', 'pi'), x.replace('ratio', 'ref')) if 'ratio' in x else (x,))
    ]
    x = {k: torch.as_tensor(values[k], dtype=torch.bool if k == 'good' else dtype).reshape(-1) for k in inputs}
    x = {k: v.clone().requires_grad_() if k in leaves else v for k, v in x.items()}
    return call(name, x, **HAND[name][0] | changes), x


def margins(*d, dtype=torch.float64):
    """(ratio_w, ratio_l) of pairs that have these d, the rejected answer's 0."""
    return torch.tensor(d, dtype=dtype), torch.zeros(len(d), dtype=dtype)


def slopes(fn, *values):
    """Gradient of a scalar function of scalars."""
    x = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in values]
    grads = torch.autograd.grad(fn(*x).sum(), x, allow_unused=True, materialize_grads=True)
    return [g.item() for g in grads]


# ---- hand-worked numbers ----


def test_every_loss_has_a_row():
    assert set(HAND) == set(losses.LOSSES)


@pytest.mark.parametrize('name', HAND)
def test_hand_worked(name):
    assert evaluate(name)[0].item() == pytest.approx(HAND[name][1], rel=1e-12)


def test_hand_worked_other_branches():
    """ipo with sums: (3 - 1)^2 = 4. hinge beyond the margin: 1 - 0.5 * 3 < 0. slic beyond it: 0.1 * 10 only.
    kto of a bad answer with a = 1, z = 0.4: 2 (1 - S(0.5 (0.4 - 1))) = 2 S(0.3)."""
    assert evaluate('ipo', average=False)[0].item() == 4
    assert evaluate('hinge', beta=0.5)[0].item() == 0
    assert evaluate('slic', delta=1.0)[0].item() == 1
    assert evaluate('kto', {'good': False})[0].item() == pytest.approx(2 * S(0.3))
    assert evaluate('kto_zero', {'good': False})[0].item() == pytest.approx(2 * S(0.5))


def test_dpop():
    """pi_w = -13: a = -2, r = -2, d = 0; lam = 5: 0.5 * (0 - 5 * 2) = -5. d loss / d a = -S(5) * 0.5 * (1 + 5)."""
    l, x = evaluate('dpop', {'pi_w': -13.0}, leaves=['pi_w'])
    l.sum().backward()
    assert l.item() == pytest.approx(L(-5.0))
    assert x['pi_w'].grad.item() == pytest.approx(-3 * S(5.0))


def test_sft_is_a_token_mean():
    """Answers of 2 and 8 tokens with log-probs -4 and -6: mean over tokens 10 / 10 = 1, not (2 + 0.75) / 2."""
    pi, n = torch.tensor([-4.0, -6.0]), torch.tensor([2.0, 8.0])
    assert losses.sft(pi, n).tolist() == [2.0, 0.75]
    assert ((losses.sft(pi, n) * n).sum() / n.sum()).item() == 1


def test_bradley_terry():
    """Scores 2 and 0.5 with margin 1: L(0.5) + 0.01 * 2.5^2."""
    l = formulas.bradley_terry(*torch.tensor([[2.0], [0.5], [1.0]], dtype=torch.float64), center_coef=0.01)
    assert l.item() == pytest.approx(L(0.5) + 0.0625)


def test_importance():
    """exp(r) = exp(-2); exp(1000) is cut at the limit; no gradient."""
    x = torch.tensor([-14.0, 1000.0], requires_grad=True)
    w = losses.importance(x - torch.tensor([-12.0, 0.0]), importance_max=10.0)
    assert w.tolist() == pytest.approx([exp(-2), 10.0]) and not w.requires_grad


def test_reward():
    """0.5 * (-10 + 11 + 0.5 * 0.4) / 4 = 0.15; with the log-prob alone it is the log-prob."""
    assert losses.reward(1.0, 4.0, 0.4, beta=0.5, alpha=0.5) == pytest.approx(0.15)
    assert losses.reward(-10.0) == -10.0


# ---- limits ----


@pytest.mark.parametrize('other', ['cdpo', 'robust', 'drdpo', 'aot'])
def test_without_label_noise_it_is_dpo(other):
    assert evaluate(other, label_smoothing=0.0, beta=0.5)[0].item() == pytest.approx(L(1.5), rel=1e-12)


def test_tdpo_limits():
    """TDPO2 with alpha = 0, and both with zero divergences, are DPO."""
    assert evaluate('tdpo2', alpha=0.0)[0].item() == pytest.approx(L(1.5))
    for name in ('tdpo1', 'tdpo2'):
        assert evaluate(name, {'div_w': 0.0, 'div_l': 0.0})[0].item() == pytest.approx(L(1.5))


def test_reference_free_is_a_reference_of_zeros():
    """pi_w - pi_l = 4."""
    assert evaluate('dpo', {'ref_w': 0.0, 'ref_l': 0.0})[0].item() == pytest.approx(L(2.0))


def test_kto_with_baseline_zero_is_kto_zero():
    zero, _ = evaluate('kto_zero')
    assert torch.equal(evaluate('kto', {'z': 0.0})[0], zero) and not torch.equal(evaluate('kto')[0], zero)


def test_tdpo2_has_no_gradient_through_the_chosen_divergence():
    """TDPO1: d loss / d D_w = -beta S(-1.2), d D_l the opposite. TDPO2: 0 and alpha beta S(-1.35)."""
    fixed = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)  # a, r
    first = slopes(partial(losses.tdpo1, *fixed, beta=0.5), 0.4, 1.0)
    second = slopes(partial(losses.tdpo2, *fixed, beta=0.5, alpha=0.5), 0.4, 1.0)
    assert first == pytest.approx([-0.5 * S(-1.2), 0.5 * S(-1.2)])
    assert second == pytest.approx([0.0, 0.25 * S(-1.35)])


# ---- Dr. DPO's weight ----


def normalized(l, shift, beta_prime):
    w = losses.drdpo_weight(l, torch.as_tensor(shift), beta_prime=beta_prime)
    return w / w.sum()


def test_drdpo_weight_by_hand():
    """l = (1, 3), beta' = 2: e^(-1/2) and e^(-3/2), so the weights are S(1) and S(-1): high losses count less."""
    l = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert losses.drdpo_weight(l, 0.0, beta_prime=2.0).tolist() == pytest.approx([exp(-0.5), exp(-1.5)])
    assert normalized(l, 0.0, 2.0).tolist() == pytest.approx([S(1.0), S(-1.0)])


def test_drdpo_gradient_is_that_of_the_log_mean_exp():
    d = torch.tensor([-3.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(d)
    l = losses.dpo(d, zero, beta=0.5)
    (expected,) = torch.autograd.grad(-0.7 * (torch.logsumexp(-l / 0.7, 0) - log(3)), d, retain_graph=True)
    (ours,) = torch.autograd.grad((normalized(l.detach(), 1.0, 0.7) * l).sum(), d)
    torch.testing.assert_close(ours, expected)


def test_drdpo_shift_cancels():
    l = torch.tensor([0.2, 1.0, 7.0], dtype=torch.float64)
    for shift in (-5.0, 0.0, 0.2, 30.0):
        torch.testing.assert_close(normalized(l, shift, 0.5), torch.softmax(-l / 0.5, 0))


def test_drdpo_does_not_overflow():
    """Losses of 0 to 4000 in float32, measured from the smallest, or from a shift 4000 too high."""
    l = torch.tensor([0.0, 1.0, 4000.0])
    assert normalized(l, 0.0, 0.5).tolist() == pytest.approx([S(2.0), S(-2.0), 0.0])
    assert losses.drdpo_weight(l, torch.tensor(4000.0), beta_prime=0.5).isfinite().all()
    assert normalized(l + 4000, 4000.0, 0.5).tolist() == pytest.approx([S(2.0), S(-2.0), 0.0])


def test_drdpo_with_infinite_beta_prime_is_the_mean():
    weights = normalized(torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64), 0.0, 1e9)
    assert weights.tolist() == pytest.approx([1 / 3] * 3, abs=1e-8)


# ---- beta-DPO's statistic ----


def beta_statistic(d, state=None, seed=0, **keywords):
    keywords = {'beta': 0.1, 'a': 0.6, 'rho': 0.0} | keywords
    return losses.beta_dpo_statistic(*margins(*d), state or {}, torch.Generator().manual_seed(seed), **keywords)


def test_beta_dpo_statistic_by_hand():
    """d = (1, 2, 3): mean 2, std 1, which start the state; beta_t = beta. Then d = (3, 5): mean 4, std sqrt 2;
    m = 0.9 * 2 + 0.1 * 4 = 2.2, s = 0.9 + 0.1 sqrt 2; beta_t = 0.1 (1 + 0.6 (4 - 2.2)) = 0.208."""
    values, state = beta_statistic([1, 2, 3])
    assert state == pytest.approx({'mean': 2.0, 'std': 1.0}) and values['beta'].tolist() == pytest.approx([0.1] * 3)
    before = dict(state)
    values, after = beta_statistic([3, 5], state)
    assert state == before, 'the state that was passed in must not change: evaluation passes it too'
    assert after == pytest.approx({'mean': 2.2, 'std': 0.9 + 0.1 * math.sqrt(2)})
    assert values['beta'].tolist() == pytest.approx([0.208] * 2) and values['weight'].tolist() == [1, 1]


def test_beta_dpo_of_kept_pairs(monkeypatch):
    """Only the pairs kept set beta: d = (1, 2, 3, 10), m = 4, kept (1, 10): 0.1 (1 + 2 (5.5 - 4)) = 0.4."""
    keep = torch.tensor([True, False, False, True])
    monkeypatch.setattr(losses, 'keep_near', lambda *args, **keywords: keep)
    values, _ = beta_statistic([1, 2, 3, 10], a=2.0, rho=0.5)
    assert values['beta'].tolist() == pytest.approx([0.4] * 4) and values['weight'].tolist() == [1, 0, 0, 1]


def test_beta_dpo_floor_and_gradient():
    """0.1 (1 + 40 (1 - 4)) < 0: the floor is 1e-3. beta_t and the weights carry no gradient."""
    values, _ = beta_statistic([1, 1], {'mean': 13 / 3, 'std': 1.0}, a=40.0)  # m = 0.9 * 13/3 + 0.1 = 4
    assert values['beta'].tolist() == pytest.approx([1e-3] * 2)


def test_beta_dpo_without_a_and_rho_is_dpo():
    values, _ = beta_statistic([-4, 1, 2, 9], {'mean': 1.0, 'std': 3.0}, a=0.0)
    assert values['beta'].tolist() == pytest.approx([0.1] * 4) and values['weight'].tolist() == [1] * 4


@pytest.mark.parametrize('d', [[2.0], [2.0, 2.0, 2.0]])
def test_beta_dpo_without_spread_keeps_all(d):
    """One pair, or equal pairs, as at step 0 where policy = reference: std 0, nothing is filtered, nothing is NaN."""
    for state in ({}, {'mean': 1.0, 'std': 1.0}):
        values, after = beta_statistic(d, state, rho=0.5)
        assert values['weight'].tolist() == [1] * len(d) and math.isfinite(after['mean'] + after['std'])
    assert after == pytest.approx({'mean': 1.1, 'std': 0.9})


def test_beta_dpo_mask_follows_the_generator():
    d = [0.1 * i for i in range(20)]
    masks = [beta_statistic(d, seed=seed, rho=0.5)[0]['weight'] for seed in (0, 0, 1)]
    assert masks[0].equal(masks[1]) and not masks[0].equal(masks[2])


@pytest.mark.parametrize(
    ('size', 'rho', 'kept'), [(10, 0.9, 1), (10, 0.2, 8), (7, 0.3, 5), (8, 0.0, 8), (4, 0.99, 1), (1, 0.9, 1)]
)
def test_keep_near_count(size, rho, kept):
    """round(B (1 - rho)), at least one: 10 (1 - 0.9) is 0.9999999999999998 in floating point, and keeps one."""
    d = torch.arange(size, dtype=torch.float64)
    assert losses.keep_near(d, 0.0, 2.0, torch.Generator().manual_seed(0), rho=rho).sum() == kept


def test_keep_near_keeps_near_pairs_more_often():
    """One of two pairs at 0 and 1 with mean 0, std 1: weights 1 and e^(-1/2), so the first with probability S(1/2).

    4000 draws: standard deviation sqrt(0.62 * 0.38 / 4000) = 0.0077, tolerance four of these."""
    generator, d = torch.Generator().manual_seed(0), torch.tensor([0.0, 1.0])
    first = sum(losses.keep_near(d, 0.0, 1.0, generator, rho=0.5)[0].item() for _ in range(4000)) / 4000
    assert first == pytest.approx(S(0.5), abs=0.031)


def test_keep_near_is_relative_to_the_mean():
    """The same draw around mean 1: the pair at 1 is the likelier one; std 0.5 doubles the distance: S(2)."""
    generator, d = torch.Generator().manual_seed(0), torch.tensor([0.0, 1.0])
    second = sum(losses.keep_near(d, 1.0, 0.5, generator, rho=0.5)[1].item() for _ in range(4000)) / 4000
    assert second == pytest.approx(S(2.0), abs=0.021)


def test_keep_near_draws_one_after_the_other():
    """Two of three pairs, of weights 1, u = e^(-1/2) and v = e^(-2) with sum t. The third stays out if the others come

    in either order: (1 / t) (u / (u + v)) + (u / t) (1 / (1 + v)) = 0.7761; with noise of the wrong sign it is 0.738.
    8000 draws: standard deviation 0.0047, tolerance four of these."""
    generator, d = torch.Generator().manual_seed(0), torch.tensor([0.0, 1.0, 2.0])
    u, v = exp(-0.5), exp(-2.0)
    t = 1 + u + v
    out = sum(not losses.keep_near(d, 0.0, 1.0, generator, rho=1 / 3)[2] for _ in range(8000)) / 8000
    assert out == pytest.approx((1 / t) * (u / (u + v)) + (u / t) * (1 / (1 + v)), abs=0.019)


def test_keep_near_when_every_weight_underflows():
    """100 to 107 standard deviations away exp() is 0 for all; the nearest are still the ones kept."""
    d = torch.arange(100.0, 108.0)
    keep = losses.keep_near(d, 0.0, 1.0, torch.Generator().manual_seed(0), rho=0.5)
    assert keep.tolist() == [True] * 4 + [False] * 4
    assert losses.keep_near(d, 0.0, 1e-200, torch.Generator().manual_seed(0), rho=0.5).sum() == 4


# ---- the other statistics ----


def test_kto_statistic():
    """Mean of the log-ratios (2, -1) is 0.5; of (-2, 1) below 0, so 0. The same z for every example of the step."""
    assert losses.kto_statistic(torch.tensor([2.0, -1.0]), {}, None)[0]['z'].tolist() == [0.5, 0.5]
    assert losses.kto_statistic(torch.tensor([-2.0, 1.0]), {}, None)[0]['z'].tolist() == [0.0, 0.0]
    assert losses.kto_statistic(torch.tensor([2.0, 4.0]), {'some': 'state'}, None)[1] == {'some': 'state'}


def aot_columns(*rows):
    """Columns of pairs given as (pi_w, pi_l, ref_w, ref_l)."""
    pi_w, pi_l, ref_w, ref_l = torch.tensor(rows, dtype=torch.float64).T
    return with_ratios({'pi_w': pi_w, 'pi_l': pi_l, 'ref_w': ref_w, 'ref_l': ref_l})


def aot_shift(c):
    return losses.aot_statistic(c['pi_w'], c['pi_l'], c['ratio_w'], c['ratio_l'], {}, None)[0]['shift']


def test_aot_statistic():
    """Policy margins (3, 1, 2) against reference margins (10, 30, 20): smallest with smallest, so (30, 10, 20).
    The shifts are 10 - 30, 30 - 10 and 20 - 20, and d becomes 3 - 30, 1 - 10 and 2 - 20."""
    c = aot_columns((3.0, 0.0, 10.0, 0.0), (1.0, 0.0, 31.0, 1.0), (4.0, 2.0, 20.0, 0.0))
    assert aot_shift(c).tolist() == [-20, 20, 0]
    ours = losses.aot(c['ratio_w'], c['ratio_l'], aot_shift(c), beta=0.5, label_smoothing=0.0)
    torch.testing.assert_close(ours, losses.dpo(*margins(-27.0, -9.0, -18.0), beta=0.5))


def test_aot_of_sorted_margins_is_cdpo():
    c = aot_columns((-3.0, 0.0, -1.0, 0.0), (1.0, 0.0, 0.5, 0.0), (4.0, 2.0, 2.0, 1.0))
    ratios, keywords = (c['ratio_w'], c['ratio_l']), {'beta': 0.5, 'label_smoothing': 0.1}
    torch.testing.assert_close(losses.aot(*ratios, aot_shift(c), **keywords), losses.cdpo(*ratios, **keywords))


# ---- extremes ----


def extreme_inputs(name):
    """Log-ratio margins up to +-2000, as sums of non-positive log-probs."""
    d = torch.tensor([-2000.0, -1000, -200, -100, -20, -1, 0, 1, 20, 100, 200, 1000, 2000])
    if name in KTO:
        good = torch.arange(len(d) * 2) < len(d)
        pi = (d.clamp(max=0) - 1).repeat(2)
        return {'pi': pi, 'ref': pi - d.repeat(2), 'good': good, 'z': torch.full_like(pi, 3.0)}
    pi_w, pi_l = d.clamp(max=0) - 1, (-d).clamp(max=0) - 1
    ones = torch.ones_like(d)
    ref = {'ref_w': -5 * ones, 'ref_l': -5 * ones}
    return {
        'pi_w': pi_w,
        'pi_l': pi_l,
        'n_w': 5 * ones,
        'n_l': 10 * ones,
        'div_w': ones,
        'div_l': 3 * ones,
        'shift': 0 * ones,
    } | ref


@pytest.mark.parametrize('name', HAND)
@pytest.mark.parametrize('beta', [0.1, 1.0])
def test_float32_at_extreme_margins(name, beta):
    """Value and gradient are finite in float32 and equal to those in float64.

    Every loss here is mathematically finite at these margins. discopop is so for tau <= 1, where exp(-h) is weighted by
    S(h / tau) <= exp(h / tau); a larger tau lets exp(-h) through, which is exp(1000) at tau = 2, h = -2000."""
    changes = {'beta': beta} if 'beta' in HAND[name][0] else {}
    results = []
    for dtype in (torch.float32, torch.float64):
        given = extreme_inputs(name)
        l, x = evaluate(name, given, dtype, leaves=[k for k in given if k.startswith('pi')], **changes)
        leaves = [v for v in x.values() if v.requires_grad]
        results.append([l.detach(), *torch.autograd.grad(l.sum(), leaves)])
    for single, double in zip(*results, strict=True):
        assert single.isfinite().all()
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_dpo_asymptote():
    """L(-2000) = 2000 with slope -1: the form must not be log(sigmoid)."""
    x = torch.tensor([-2000.0], requires_grad=True)
    zero = torch.zeros(1)
    l = losses.dpo(x, zero, beta=1.0)
    l.sum().backward()
    assert l.item() == 2000 and x.grad.item() == -1


def test_discopop_with_large_tau_is_as_large_as_the_formula():
    """h = -20, tau = 2: (1 - S(-10)) L(-20) + S(-10) exp(20), about 20 + exp(10)."""
    l = losses.discopop(*margins(-20.0), beta=1.0, tau=2.0)
    assert l.item() == pytest.approx((1 - S(-10.0)) * L(-20.0) + S(-10.0) * exp(20.0))


@pytest.mark.parametrize('p', [0.0, -1e-30, -1e-8, -0.5, -0.6931472, -0.7, -3.0, -200.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_orpo_of_certain_and_hopeless_answers(p, dtype):
    """Mean log-probs from 0 to -200 on either side: finite value and gradient."""
    for p_w, p_l in ((p, -1.0), (-1.0, p), (p, p)):
        x = [torch.tensor([v], dtype=dtype, requires_grad=True) for v in (p_w, p_l)]
        l = losses.orpo(*x, torch.ones(1), torch.ones(1), lam=0.5)
        grads = torch.autograd.grad(l.sum(), x)
        assert all(v.isfinite().all() for v in (l, *grads))


def test_orpo_gradient_of_a_certain_answer():
    """p = -1e-18, q = -1: L is about the inverse odds ratio, e^(q - p) (1 - e^p) / (1 - e^q) = -p e^-1 / (1 - e^-1).

    Hence the derivative of lam L in p is -lam e^-1 / (1 - e^-1), far from 0; the NLL adds -1."""
    grad = slopes(lambda p: losses.orpo(p, torch.full_like(p, -1.0), 1.0, 1.0, lam=0.5), -1e-18)
    assert grad[0] == pytest.approx(-1 - 0.5 * exp(-1) / (1 - exp(-1)))


def test_log1mexp():
    for x in (-1e-12, -1e-3, -0.5, -0.6931, -0.6932, -1.0, -30.0):
        (slope,) = slopes(losses.log1mexp, x)
        assert losses.log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(log(-expm1(x)), rel=1e-12)
        assert slope == pytest.approx(-exp(x) / -expm1(x), rel=1e-12)


@pytest.mark.parametrize('name', HAND)
def test_policy_equals_reference(name):
    """At the start of training value and gradient are finite for every loss."""
    same = {'ref_w': -10.0, 'ref_l': -14.0, 'div_w': 0.0, 'div_l': 0.0, 'ref': -10.0, 'z': 0.0}
    l, x = evaluate(name, same, torch.float32, leaves=['pi_w', 'pi_l', 'pi'])
    grads = torch.autograd.grad(l.sum(), [v for v in x.values() if v.requires_grad])
    assert all(v.isfinite().all() for v in (l, *grads)) and any(g.any() for g in grads)
    if name in ('dpo', 'cdpo', 'tdpo1', 'tdpo2', 'radpo1', 'radpo2', 'drdpo', 'beta_dpo', 'sigmoid_norm', 'dpop'):
        assert l.item() == pytest.approx(log(2))


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

REF = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()
PI = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64).log()
DIVERGENCES = {
    'kl': model.kl,
    'cvar': partial(model.cvar, mu=0.4),
    'erm': partial(model.erm, mu=2.0),
    'released': partial(model.released, mu=0.7),
    'released, unsplit': partial(model.released, mu=0.7, parts=1),
}


def test_kl_by_hand():
    """Z = log ref - log pi = (log 2, 0, -log 2, -log 2): KL(ref || pi) = (0.5 - 0.125 - 0.125) log 2 = log(2) / 4."""
    assert model.kl(PI, REF).item() == pytest.approx(log(2) / 4)


@pytest.mark.parametrize(
    ('mu', 'expected'),
    [(0.25, 1.0), (0.5, 1.0), (0.6, 0.5 / 0.6), (0.75, 0.5 / 0.75), (0.8, (0.5 - 0.05) / 0.8), (1.0, 0.25)],
)
def test_cvar_by_hand(mu, expected):
    """In units of log 2, the worst mass mu: 0.5 of Z = 1, then 0.25 of Z = 0, then 0.25 of Z = -1; mean over mu."""
    assert model.cvar(PI, REF, mu=mu).item() == pytest.approx(expected * log(2))


def test_erm_by_hand():
    """mu = 1: log(0.5 * 2 + 0.25 * 1 + 0.25 / 2) = log 1.375; mu = 2: log(0.5 * 4 + 0.25 + 0.25 / 4) / 2."""
    assert model.erm(PI, REF, mu=1.0).item() == pytest.approx(log(1.375))
    assert model.erm(PI, REF, mu=2.0).item() == pytest.approx(log(2.3125) / 2)


def test_released_by_hand():
    """pi = (1, 1, 2, 4) / 8, so Z = (2, 1, -1, -2) in units of log 2, with p = (4, 2, 1, 1) / 8.

    Unsplit, mu = 0.7: the quantile at 0.3 has rank 0.9, between -2 and -1: -1.1. Above it 1 + 1/4 - 1/8 = 9/8.
    Halves: (2, 1) has 1.3, above it 2, giving 1; (-1, -2) has -1.7, above it -1, giving -1/8. Together 7/8.
    The first three entries only: halves of 1 and 2; nothing is above itself in (2); (1, -1) has -0.4 and gives 1/4.
    Even mu = 1 drops the smallest: 9/8, not the KL, 7/8."""
    log_pi = torch.tensor([0.125, 0.125, 0.25, 0.5], dtype=torch.float64).log()
    assert model.released(log_pi, REF, mu=0.7, parts=1).item() == pytest.approx(9 / 8 * log(2))
    assert model.released(log_pi, REF, mu=0.7).item() == pytest.approx(7 / 8 * log(2))
    assert model.released(log_pi[:3], REF[:3], mu=0.7).item() == pytest.approx(1 / 4 * log(2))
    assert model.released(log_pi, REF, mu=1.0, parts=1).item() == pytest.approx(9 / 8 * log(2))


def random_log_probs(seed, rows=6, vocabulary=9):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)


def test_risk_limits():
    """CVaR with mu = 1 and ERM with mu -> 0 are the KL, as is `released` but for what lies at or under its quantile."""
    log_pi, log_ref = random_log_probs(0).log_softmax(-1)
    kl = model.kl(log_pi, log_ref)
    torch.testing.assert_close(
        kl, torch.nn.functional.kl_div(log_pi, log_ref, log_target=True, reduction='none').sum(-1)
    )
    torch.testing.assert_close(model.cvar(log_pi, log_ref, mu=1.0), kl)
    torch.testing.assert_close(model.erm(log_pi, log_ref, mu=1e-7), kl, rtol=1e-5, atol=1e-6)


def test_risk_grows_with_aversion():
    """CVaR falls with mu from the largest Z down to the KL; ERM rises with mu from the KL to the largest Z."""
    log_pi, log_ref = random_log_probs(1).log_softmax(-1)
    worst = (log_ref - log_pi).max(-1).values
    cvar = torch.stack([model.cvar(log_pi, log_ref, mu=mu) for mu in (1e-9, 0.01, 0.1, 0.3, 0.6, 0.9, 1.0)])
    erm = torch.stack([model.erm(log_pi, log_ref, mu=mu) for mu in (0.01, 0.1, 1.0, 10.0, 1000.0)])
    assert (cvar.diff(dim=0) <= 1e-12).all() and (cvar[0] - cvar[-1] > 0.1).all()
    assert (erm.diff(dim=0) >= -1e-12).all() and (erm <= worst + 1e-12).all()
    torch.testing.assert_close(cvar[0], worst)


@pytest.mark.parametrize('name', DIVERGENCES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_divergence_of_policy_and_itself(name, dtype):
    """Z = 0 everywhere: value 0, gradient finite; the same where a probability underflows to 0."""
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.0], [0.0, -2000.0, 5.0, 1.0]], dtype=dtype, requires_grad=True)
    value = DIVERGENCES[name](logits.log_softmax(-1), logits.detach().log_softmax(-1))
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert value.abs().max() < 1e-6 and grad.isfinite().all()


@pytest.mark.parametrize('name', DIVERGENCES)
def test_divergence_of_distant_distributions(name):
    """Where the policy gives the reference's favourite a log-prob of -2000, Z and the divergence are large, not inf."""
    logits = torch.tensor([[-2000.0, 0.0, 1.0, 2.0]], requires_grad=True)
    value = DIVERGENCES[name](logits.log_softmax(-1), torch.tensor([[0.0, -2000.0, -3.0, -4.0]]).log_softmax(-1))
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all() and grad.isfinite().all()


# ---- the LM head that turns hidden states into log-probs and divergences ----

CONFIGS = {
    'plain': {},
    'soft cap': {'final_logit_softcapping': 3.0},
    'scale': {'logit_scale': 0.3},
    'inverse scale and cap': {'logits_scaling': 2.0, 'final_logit_softcapping': 3.0},
}


def head_inputs(bias):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (7, 3), (5, 3), (7, 3)] + [(7,), (7,)] * bias
    hidden, weight, ref_hidden, ref_weight, *b = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    leaves = [x.requires_grad_() for x in (hidden, weight, *b[:1])]
    return leaves, torch.tensor([0, 6, 3, 3, 1]), (ref_hidden, (ref_weight, b[1] if bias else None))


def cut_into(size, monkeypatch):
    pieces = [slice(i, min(i + size, 5)) for i in range(0, 5, size)]
    monkeypatch.setattr(model.Head, 'chunks', staticmethod(lambda n, vocabulary, device: pieces))


def head(leaves, target, config, divergence, reference):
    hidden, weight, bias = leaves if len(leaves) == 3 else (*leaves, None)
    return model.Head.apply(
        hidden, weight, bias, target, SimpleNamespace(**config), divergence, reference if divergence else None
    )


def plainly(hidden, weight, bias, config):
    """Log-probs of the whole vocabulary in one piece, from the formulas."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits * config.get('logit_scale', 1.0) / config.get('logits_scaling', 1.0)
    cap = config.get('final_logit_softcapping')
    return (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)


@pytest.mark.parametrize('bias', [False, True], ids=['no bias', 'bias'])
@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('name', [None, *DIVERGENCES])
def test_head(name, config, bias, monkeypatch):
    """Values as in one piece, and gradients that finite differences confirm, in chunks of 1, 2 and all 5 positions."""
    leaves, target, reference = head_inputs(bias)
    divergence, config = DIVERGENCES.get(name), CONFIGS[config]
    log_pi = plainly(*leaves, *([] if bias else [None]), config)
    log_ref = plainly(reference[0], *reference[1], config)
    rows = torch.arange(5)
    expected = [log_pi[rows, target]]
    expected += [divergence(log_pi, log_ref), log_ref[rows, target]] if divergence else []
    upstream = torch.linspace(0.5, 2.0, 10, dtype=torch.float64).view(2, 5)[: len(expected)]
    wanted = torch.autograd.grad(sum((u * e).sum() for u, e in zip(upstream, expected, strict=False)), leaves)
    for size in (1, 2, 5):
        cut_into(size, monkeypatch)
        out = head(leaves, target, config, divergence, reference)
        torch.testing.assert_close(out, torch.stack(expected))
        found = torch.autograd.grad((upstream * out[: len(upstream)]).sum(), leaves)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('size', [1, 2, 5])
@pytest.mark.parametrize('name', [None, *DIVERGENCES])
def test_head_by_finite_differences(name, size, monkeypatch):
    cut_into(size, monkeypatch)
    leaves, target, reference = head_inputs(bias=True)
    for config in CONFIGS.values():

        def fn(*values, config=config):
            return head(values, target, config, DIVERGENCES.get(name), reference)[:2]

        assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)


def test_chunks_cover_everything():
    for n, vocabulary in itertools.product((0, 1, 5, 100), (7, 2**23, 2**30)):
        pieces = model.Head.chunks(n, vocabulary, torch.device('cpu'))
        assert [i for piece in pieces for i in range(n)[piece]] == list(range(n))


# ---- the specification as a text ----


def test_losses_knows_nothing_but_torch():
    tree = ast.parse(Path(losses.__file__).read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found and all(name.split('.')[0] == 'torch' for name in found)


@pytest.mark.parametrize(
    'fn', dict.fromkeys((*losses.LOSSES.values(), formulas.bradley_terry)), ids=lambda fn: fn.__name__
)
def test_docstring_has_equation_and_source(fn):
    text = fn.__doc__ or ''
    assert re.search(r'\b[LS]\(|\^2|max\(0|KL\(', text), 'an equation'
    assert re.search(r'\d{4}\.\d{5}|note, eq', text), 'an arXiv number or a named note'


def test_signature_tells_what_a_loss_needs():
    """No *args or **kwargs; columns are positional without a default (but z), hyper-parameters are keyword-only."""
    for fn in losses.LOSSES.values():
        for p in inspect.signature(fn).parameters.values():
            assert p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            assert p.default is p.empty or p.name == 'z'
            columns = (*PAIR, *GOOD, 'ratio', 'ratio_w', 'ratio_l')
            assert (p.name in columns) == (p.kind == p.POSITIONAL_OR_KEYWORD)
