"""The numbers of tests/parts/trl_grpo_numbers.json: the loss of TRL's GRPOTrainer, and its gradient, on fixed token log-probs.

    python -m experiments.trl.grpo tests/parts/trl_grpo_numbers.json    (needs TRL 1.16)

Its _compute_loss runs as it is; a stand-in for the trainer hands it the log-probs instead of a model's. Advantages are given.
TRL's loss types: bnpo is a mean over tokens, grpo over answers of their token means."""

import json
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch


def main(file):
    import trl
    from trl.trainer.grpo_trainer import GRPOTrainer

    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 2, 7, 1, 4, 6])
    mask = (torch.arange(7) < lengths[:, None]).double()
    pi, old, ref = (-4 * torch.rand(6, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    old = pi + 0.5 * (old - pi)
    advantage = torch.randn(6, generator=generator, dtype=torch.float64)
    cases = []
    for kind, beta, clip in (('bnpo', 0.04, 0.2), ('bnpo', 0.0, 0.1), ('grpo', 0.04, 0.2), ('grpo', 0.5, 0.3)):
        leaf = pi.clone().requires_grad_()

        def logps(*args, leaf=leaf, **kwargs):
            return leaf, torch.zeros_like(leaf), None

        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=logps, aux_loss_enabled=False, top_entropy_quantile=1.0, loss_type=kind,
            off_policy_mask_threshold=None, importance_sampling_level='token', beta=beta, epsilon_low=clip, epsilon_high=clip,
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None), use_vllm=False, model=SimpleNamespace(training=True),
            vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
            _metrics={'train': defaultdict(list)},
            accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x),
        )  # fmt: skip
        ids = torch.zeros(6, 1, dtype=torch.long)
        inputs = {'prompt_ids': ids, 'prompt_mask': ids, 'completion_ids': torch.zeros(6, 7, dtype=torch.long),
                  'completion_mask': mask, 'advantages': advantage, 'old_per_token_logps': old, 'ref_per_token_logps': ref}  # fmt: skip
        value = GRPOTrainer._compute_loss(trainer, None, inputs)
        (slope,) = torch.autograd.grad(value, leaf)
        cases.append(
            {
                'per_answer': kind == 'grpo',
                'kl_coef': beta,
                'clip': clip,
                'loss': value.item(),
                'gradient': slope.tolist(),
            }
        )
    numbers = {'peer': f'pip trl=={trl.__version__}, GRPOTrainer._compute_loss', 'lengths': lengths.tolist(), 'pi': pi.tolist(),
               'old': old.tolist(), 'ref': ref.tolist(), 'advantage': advantage.tolist(), 'cases': cases}  # fmt: skip
    with open(file, 'w') as stream:
        json.dump(numbers, stream)
        stream.write('\n')


if __name__ == '__main__':
    main(sys.argv[1])
