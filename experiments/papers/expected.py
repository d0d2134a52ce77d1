"""Time and memory to expect of a whole procedure in this folder, computed, not measured:  python -m experiments.papers.expected drdpo_hh

FLOPs as bench.py counts them: 2 per weight and token forward, twice that backward, once more for a live reference; attention;
the LM head at answer tokens alone. Time: at 40% of what bench.py takes for a GPU's bfloat16 peak, scaled to an A100 by the
data sheets. Generation: 30 ms a step of 64 answers, on every GPU. The judge's time is not in it.
Memory of one GPU: 4 bytes a parameter each for weights, gradients and every optimizer state, 2 for the reference, all sharded;
2 for gathered weights of the policy; activations of 34 bytes a token, layer and unit of width (2205.05198), or 2 and one layer
with activation_checkpointing.
"""

import sys
from collections import namedtuple

UTILISATION = 0.4  # of model FLOPs
MAX_TOKENS = 16384
# FLOP/s and GB of a card, and how many there are
MACHINES = {'1 x H200': (1, 790e12, 141), '4 x A100 80GB': (4, 250e12, 80)}


# a model; weights: those of its blocks
Shape = namedtuple('Shape', 'width layers weights vocabulary')
# of a procedure, done so many times. kind: sft, pairs or sample; lengths: tokens of prompt, chosen and rejected answer;
# states: of the optimizer
Step = namedtuple('Step', 'times name shape kind examples lengths states checkpointing', defaults=(0, False))
PYTHIA = Shape(2560, 32, 32 * 12 * 2560**2, 50304)
LLAMA = Shape(4096, 32, 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000)
SMOLLM2 = Shape(576, 30, 30 * (576**2 * 8 // 3 + 3 * 576 * 1536), 49152)
# HH: 1,800 pairs of harmless-base by Pythia's tokenizer. The others: assumptions
HH, SHAREGPT, SAMPLED = (111, 41, 51), (40, 250, 0), (40, 200, 200)
HH_PAIRS, HARMLESS_PAIRS, SHAREGPT_PROMPTS = 160_800, 42_500, 90_000


def on_hh(runs):
    """SFT on HH, then so many runs on its pairs, each judged by 512 answers."""
    return [
        Step(1, 'sft', PYTHIA, 'sft', HH_PAIRS, HH, 1),
        Step(runs, 'dpo', PYTHIA, 'pairs', HH_PAIRS, HH, 1),
        Step(runs, 'sample', PYTHIA, 'sample', 512, (111, 256, 0)),
    ]


STEPS = {
    'drdpo_hh': on_hh(10),
    'beta_dpo_hh': on_hh(4),
    'radpo_hh': on_hh(5),
    'smollm2_flips': [
        Step(5, 'sft', SMOLLM2, 'sft', HARMLESS_PAIRS, HH, 2),
        Step(45, 'dpo', SMOLLM2, 'pairs', HARMLESS_PAIRS, HH, 2),
    ],
    'rlaif_sharegpt': [
        Step(1, 'sft', LLAMA, 'sft', 9 * SHAREGPT_PROMPTS // 10, SHAREGPT, 1, True),
        Step(1, 'sample', LLAMA, 'sample', 2 * 20_000, (40, 256, 0)),
        Step(1, 'dpo', LLAMA, 'pairs', 3 * 20_000, SAMPLED, 1, True),
        Step(2, 'sample', LLAMA, 'sample', 805, (40, 512, 0)),
    ],
}


def flops(shape, kind, lengths):
    """Model FLOPs of an example, as in bench.py."""
    prompt, chosen, rejected = lengths
    answers, attended, passes = chosen, (prompt + chosen) ** 2 / 2, 3
    if kind == 'pairs':
        answers += rejected
        attended += rejected * prompt + rejected**2 / 2
        passes += 1  # the reference
    forward = 2 * shape.weights * (prompt + answers) + 4 * shape.layers * shape.width * attended
    return passes * (forward + 2 * shape.width * shape.vocabulary * answers)


def hours(step, gpus, peak):
    """Of one of the times that a step is done."""
    if step.kind == 'sample':
        return step.examples / 64 / gpus * step.lengths[1] * 0.03 / 3600
    return step.examples * flops(step.shape, step.kind, step.lengths) / (gpus * peak * UTILISATION) / 3600


def gigabytes(step, gpus):
    """Of one GPU."""
    shape = step.shape
    head = shape.width * shape.vocabulary
    parameters = shape.weights + 2 * head
    if step.kind == 'sample':
        return 6 * parameters / 1e9
    each = 8 + 4 * step.states + (2 if step.kind == 'pairs' else 0)
    gathered = 2 if gpus == 1 else 6 / shape.layers
    kept = 2 * shape.layers + 34 if step.checkpointing else 34 * shape.layers
    return (parameters * (each / gpus + gathered) + 4 * head + MAX_TOKENS * shape.width * kept) / 1e9


def main(name):
    print(f'expected of experiments/papers/{name}.sh, computed by experiments/papers/expected.py, not measured; '
          'the judge is not in it')  # fmt: skip
    for machine, (gpus, peak, size) in MACHINES.items():
        total, parts = 0.0, []
        for step in STEPS[name]:
            spent = hours(step, gpus, peak)
            total += step.times * spent
            times = f'{step.times} x ' if step.times > 1 else ''
            parts.append(f'{times}{step.name} {spent:.1f} h')
        most = max(gigabytes(step, gpus) for step in STEPS[name])
        print(f'  {machine:14s} {total:5.1f} h ({", ".join(parts)}), at most {most:.0f} of {size} GB a GPU')


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1] not in STEPS:
        sys.exit(f'usage: python -m experiments.papers.expected {"|".join(STEPS)}')
    main(sys.argv[1])
