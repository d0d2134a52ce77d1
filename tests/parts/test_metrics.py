"""The metrics of dpo.py by hand, for losses with a reference, without one, and of single answers."""

import re

import pytest
import torch

import losses
from runtime import metrics
from runtime.objective import Objective


def objective(name, *, paired=True, needs_ref=True, divergence=False, per_token=False, **options):
    options = {'beta': 0.1, 'beta_prime': None} | options
    uses = {'beta': True, 'alpha': 'alpha' in options}
    functions = losses.LOSSES[name], losses.STATISTICS.get(name)
    return Objective(name, *functions, options, uses, paired, needs_ref, divergence, False, per_token)


def columns(**values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


PAIRS = columns(loss=[0.5, 0.7], weight=[1.0, 3.0], pi_w=[-6, -2], pi_l=[-8, -1], n_w=[3, 1], n_l=[2, 2])
REF = columns(ref_w=[-7, -2], ref_l=[-7, -3])
SINGLES = columns(loss=[1] * 3, weight=[1] * 3, pi=[-6, -2, -4.8], ref=[-7, -3, -5], n=[3, 1, 2], z=[0.5] * 3)
SINGLES |= {'good': torch.tensor([True, False, True])}


def test_pairs_with_their_reference():
    """Log-ratios are 1 and 0 of chosen answers, -1 and 2 of rejected ones. With a divergence, it is a part of the rewards."""
    expected = {
        'loss/eval': 0.65, 'logratio_eval/accuracies': 0.5, 'rewards_eval/accuracies': 0.5, 'rewards_eval/margins': 0,
        'rewards_eval/chosen': 0.05, 'logps_eval/chosen': -4, 'kl_eval/chosen': -0.5, 'kl_eval/chosen_per_token': -1 / 4, 'length_eval/chosen': 2,
        'rewards_eval/rejected': 0.05, 'logps_eval/rejected': -4.5, 'kl_eval/rejected': -0.5, 'kl_eval/rejected_per_token': -1 / 4, 'length_eval/rejected': 2,
    }  # fmt: skip
    assert metrics.of_dpo(objective('dpo'), PAIRS | REF, 'eval') == pytest.approx(expected)
    asked = objective('tdpo2', divergence=True, alpha=0.5)
    found = metrics.of_dpo(asked, PAIRS | REF | columns(div_w=[2.0, 8.0], div_l=[1.0, 2.0]), 'eval')
    expected |= {'divergence_eval/chosen_per_token': 2.5, 'divergence_eval/rejected_per_token': 3 / 4}
    expected |= {'rewards_eval/chosen': 0.3, 'rewards_eval/rejected': 0.125, 'rewards_eval/margins': 0.175}
    assert found == pytest.approx(expected | {'rewards_eval/accuracies': 1})


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
    found = metrics.of_dpo(objective('kto', paired=False), SINGLES, 'train')
    assert found['rewards_train/accuracies'] == pytest.approx(1 / 3)
    assert (found['rewards_train/chosen'], found['rewards_train/rejected']) == pytest.approx((0.06, 0.1))
    # around 0, where the loss has no z
    without = {name: values for name, values in SINGLES.items() if name != 'z'}
    found = metrics.of_dpo(objective('kto_zero', paired=False), without, 'train')
    assert found['rewards_train/accuracies'] == pytest.approx(2 / 3)
    # without a bad one there is nothing to say of them
    good = {name: values[SINGLES['good']] for name, values in SINGLES.items()}
    found = metrics.of_dpo(objective('kto', paired=False), good, 'train')
    assert found['rewards_train/accuracies'] == 0.5 and not any(
        'rejected' in name or 'margin' in name for name in found
    )


def test_answers_that_are_equal():
    """As before the first step: no pair is right, and of single answers at kto's z the bad ones are."""
    same = {'ref_w': PAIRS['pi_w'], 'ref_l': PAIRS['pi_l']}
    found = metrics.of_dpo(objective('dpo'), PAIRS | same, 'eval')
    assert found['rewards_eval/accuracies'] == found['logratio_eval/accuracies'] == 0
    found = metrics.of_dpo(
        objective('kto', paired=False), SINGLES | {'ref': SINGLES['pi'], 'z': columns(z=[0] * 3)['z']}, 'eval'
    )
    assert found['rewards_eval/accuracies'] == pytest.approx(1 / 3)


def test_samples():
    """Of 1 and 3 tokens: the mean of an answer, and of a token."""
    found = metrics.of_samples(torch.tensor([1.0, 2.0]), torch.tensor([1, 3]))
    assert found == {'kl_eval/samples': 1.5, 'kl_eval/samples_per_token': 0.75}


OF_REF = r'; loss 0.600000 \(dpo of a policy that is its reference: 0.693147\)\n'
WARNING = 'warning: policy and reference are one model, so the rewards should be 0 before the first step\n'
ALONE = 'note: simpo has no reference: rewards, acc and margin are of the policy alone, not 0 at first\n'
ACC = r'; loss 1.000000 \(kto .* 0.500000\)\nnote: acc is the share of answers on the right side, margin the mean reward of good .*\n'


@pytest.mark.parametrize('name, options, chosen, printed', [  # chosen: reward of the chosen answers; that of the others is 0
    ('dpo', {}, 0.0, OF_REF), ('dpo', {}, -2e-4, OF_REF + WARNING), ('dpo', {'tf32': True}, 2e-4, OF_REF),
    ('dpo', {'dtype': 'bfloat16'}, 2e-4, OF_REF), ('dpo', {'dtype': 'bfloat16'}, 0.02, OF_REF + WARNING),
    ('dpo', {'ref_model': 'x'}, 2.0, OF_REF), ('dpo', {'tf32': True}, -0.02, OF_REF + WARNING),
    ('simpo', {}, -3.0, '; loss 0.600000\n' + ALONE), ('kto', {}, 0.0, ACC),
])  # fmt: skip
def test_what_is_said_of_the_first_step(name, options, chosen, printed, capsys):
    options = {'dtype': 'float32', 'tf32': False, 'ref_model': None, 'w_good': 1.0, 'w_bad': 1.0} | options
    of_step = SINGLES if name == 'kto' else PAIRS | REF  # the z of its reference is 0
    asked = objective(name, paired=name != 'kto', needs_ref=name != 'simpo', **options)
    # a step of single answers may lack good or bad ones
    found = {} if name == 'kto' else {'rewards_train/chosen': chosen, 'rewards_train/rejected': -1e-9}

    # stands in for the function of dpo.py, which test_reference.py tries
    def loss_and_weight(measured, *others):
        return asked.call(asked.fn, measured), None

    metrics.say_first_step(asked, of_step, found, loss_and_weight)
    assert re.fullmatch(f'step 0: rewards {chosen:.6f}, 0.000000{printed}', capsys.readouterr().out)
