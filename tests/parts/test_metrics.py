"""The metrics of dpo.py by hand, for losses with a reference, without one, and of single answers."""

import pytest
import torch

import losses
from runtime import metrics
from runtime.objective import Objective


def objective(name, *, paired=True, needs_ref=True, per_token=False, **options):
    options = {'beta': 0.1, 'beta_prime': None} | options
    return Objective(
        name, losses.LOSSES[name], None, options, {'beta': True, 'alpha': False}, paired, needs_ref, False, per_token
    )


def columns(**values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


PAIRS = columns(
    loss=[0.5, 0.7], weight=[1.0, 3.0], pi_w=[-6.0, -2.0], pi_l=[-8.0, -1.0], n_w=[3.0, 1.0], n_l=[2.0, 2.0]
)
REF = columns(ref_w=[-7.0, -2.0], ref_l=[-7.0, -3.0])


def test_pairs_with_their_reference():
    """Log-ratios are 1 and 0 of chosen answers, -1 and 2 of rejected ones."""
    found = metrics.of_dpo(objective('dpo'), PAIRS | REF, 'eval')
    expected = {
        'loss/eval': 0.65,
        'rewards_eval/chosen': 0.05,
        'rewards_eval/rejected': 0.05,
        'rewards_eval/margins': 0,
    }
    expected |= {'rewards_eval/accuracies': 0.5, 'logratio_eval/accuracies': 0.5, 'length_eval/chosen': 2}
    expected |= {'logps_eval/rejected': -4.5, 'kl_eval/chosen': -0.5, 'kl_eval/chosen_per_token': -1 / 4}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_pairs_without_a_reference():
    """The reward of simpo is beta times the log-prob of a token, and nothing tells of a KL."""
    found = metrics.of_dpo(objective('simpo', needs_ref=False, per_token=True), PAIRS, 'train')
    assert found['rewards_train/chosen'] == pytest.approx(0.1 * (-2 - 2) / 2)
    assert found['rewards_train/rejected'] == pytest.approx(0.1 * (-4 - 0.5) / 2)
    assert found['rewards_train/accuracies'] == 0.5 and not [name for name in found if 'kl' in name or 'ratio_' in name]


def test_the_loss_of_drdpo():
    """-beta' log of the weighted mean of exp(-loss / beta')."""
    found = metrics.of_dpo(objective('drdpo', beta_prime=2.0), PAIRS | REF, 'train')
    mean = (torch.tensor(-0.25).exp() + 3 * torch.tensor(-0.35).exp()) / 4
    assert found['loss/train'] == pytest.approx(-2 * mean.log().item(), rel=1e-6)


def test_single_answers():
    """A good answer is right above kto's z, a bad one below: log-ratios 1, 1, 0.2 around z = 0.5, the second one bad."""
    singles = columns(
        loss=[1.0, 1.0, 1.0], weight=[1.0, 1.0, 1.0], pi=[-6.0, -2.0, -4.8], ref=[-7.0, -3.0, -5.0], n=[3.0, 1.0, 2.0]
    )
    singles |= {'good': torch.tensor([True, False, True]), 'z': torch.full((3,), 0.5, dtype=torch.float64)}
    found = metrics.of_dpo(objective('kto', paired=False), singles, 'train')
    assert found['rewards_train/accuracies'] == pytest.approx(1 / 3)
    assert found['rewards_train/chosen'] == pytest.approx(0.06) and found['rewards_train/rejected'] == pytest.approx(
        0.1
    )


def test_the_kl_of_samples():
    found = metrics.of_samples(logratio=torch.tensor([1.0, 3.0]), tokens=torch.tensor([1, 7]))
    assert found == {'kl_eval/samples': 2, 'kl_eval/samples_per_token': 0.5}
