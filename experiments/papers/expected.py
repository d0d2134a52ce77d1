"""Time and memory to expect of a whole procedure in this folder, computed, not measured:  python -m experiments.papers.expected drdpo_hh

FLOPs as bench.py counts them: 2 per weight and token forward, twice that backward, once more for a live reference; attention;
the LM head at answer tokens alone. Time: at 40% of what bench.py takes for a GPU's bfloat16 peak, scaled to an A100 by the
data sheets. Generation: 30 ms a step of 64 answers, on every GPU. The judge's time is not in it.
Memory of one GPU: 4 bytes a parameter each for weights, gradients and every optimizer state, 2 for the reference, all sharded;
2 for gathered weights of the policy; activations of 34 bytes a token, layer and unit of width (2205.05198), or 2 and one layer
with activation_checkpointing.
"""

import sys

PARTS = 0.4  # model FLOPs utilisation
GPUS = {'1 x H200': (1, 790e12, 141), '4 x A100 80GB': (4, 250e12, 80)}  # number, FLOP/s, GB
# width, layers, weights of the blocks, vocabulary
PYTHIA = (2560, 32, 32 * 12 * 2560**2, 50304)
LLAMA = (4096, 32, 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000)
# tokens of prompt, chosen and rejected answer. HH: 1,800 pairs of harmless-base by Pythia's tokenizer. The others: assumptions
HH, SHAREGPT, SAMPLED = (111, 41, 51), (40, 250, 0), (40, 200, 200)
HH_PAIRS, SHAREGPT_PROMPTS = 160_800, 90_000
SMOLLM2, HARMLESS_PAIRS = (576, 30, 30 * (576**2 * 8 // 3 + 3 * 576 * 1536), 49152), 42_500

# steps of a procedure: (name, model, kind, examples, lengths, optimizer states, checkpointing, answers sampled of how many tokens)
SFT_HH = ('sft', PYTHIA, 'sft', HH_PAIRS, HH, 1, False)
DPO_HH = ('dpo', PYTHIA, 'pairs', HH_PAIRS, HH, 1, False)
JUDGED = ('sample', PYTHIA, 'sample', 512, (111, 256, 0), 0, False)
STEPS = {
    'drdpo_hh': [(SFT_HH, 1), (DPO_HH, 10), (JUDGED, 10)],
    'beta_dpo_hh': [(SFT_HH, 1), (DPO_HH, 4), (JUDGED, 4)],
    'radpo_hh': [(SFT_HH, 1), (DPO_HH, 5), (JUDGED, 5)],
    'smollm2_flips': [
        (('sft', SMOLLM2, 'sft', HARMLESS_PAIRS, HH, 2, False), 5),
        (('dpo', SMOLLM2, 'pairs', HARMLESS_PAIRS, HH, 2, False), 45),
    ],
    'rlaif_sharegpt': [
        (('sft', LLAMA, 'sft', 9 * SHAREGPT_PROMPTS // 10, SHAREGPT, 1, True), 1),
        (('sample', LLAMA, 'sample', 2 * 20_000, (40, 256, 0), 0, False), 1),
        (('dpo', LLAMA, 'pairs', 3 * 20_000, SAMPLED, 1, True), 1),
        (('sample', LLAMA, 'sample', 805, (40, 512, 0), 0, False), 2),
    ],
}
MAX_TOKENS = 16384


def flops(shape, kind, lengths):
    """Model FLOPs of an example, as in bench.py."""
    width, layers, weights, vocabulary = shape
    p, w, r = lengths
    context = (p + w) ** 2 / 2 + (r * p + r**2 / 2 if kind == 'pairs' else 0)
    tokens, answers = (p + w + r, w + r) if kind == 'pairs' else (p + w, w)
    forward = 2 * weights * tokens + 4 * layers * width * context + 2 * width * vocabulary * answers
    return forward * (4 if kind == 'pairs' else 3)


def hours(step, gpus, peak):
    _, shape, kind, n, lengths, *_ = step
    if kind == 'sample':
        return n / 64 / gpus * lengths[1] * 0.03 / 3600
    return n * flops(shape, kind, lengths) / (gpus * peak * PARTS) / 3600


def gigabytes(step, gpus):
    """Of one GPU."""
    _, (width, layers, weights, vocabulary), kind, _, _, states, checkpointing = step
    parameters = weights + 2 * width * vocabulary
    if kind == 'sample':
        return 6 * parameters / 1e9
    sharded = parameters * (8 + 4 * states + (2 if kind == 'pairs' else 0)) / gpus
    gathered = parameters * (2 if gpus == 1 else 6 / layers) + 2 * 2 * width * vocabulary
    each = MAX_TOKENS * width
    return (sharded + gathered + each * (2 * layers + 34 if checkpointing else 34 * layers)) / 1e9


def main(name):
    print(
        f'expected of experiments/papers/{name}.sh, computed by experiments/papers/expected.py, not measured; the judge is not in it'
    )
    for machine, (gpus, peak, size) in GPUS.items():
        parts, total, most = [], 0.0, 0.0
        for step, times in STEPS[name]:
            spent = hours(step, gpus, peak)
            total, most = total + times * spent, max(most, gigabytes(step, gpus))
            parts.append(f'{times} x {step[0]} {spent:.1f} h' if times > 1 else f'{step[0]} {spent:.1f} h')
        print(f'  {machine:14s} {total:5.1f} h ({", ".join(parts)}), at most {most:.0f} of {size} GB a GPU')


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1] not in STEPS:
        sys.exit(f'usage: python -m experiments.papers.expected {"|".join(STEPS)}')
    main(sys.argv[1])
