"""Lower bounds on the cost of a DPO step, for tools/bench.py: model FLOPs, time of the matrix products, and peak FLOP/s of GPUs."""

import collections
import re

import torch
from transformers.pytorch_utils import Conv1D

# dense bfloat16 TFLOP/s from NVIDIA's data sheets; the first name that occurs in the card's name counts
DATA_SHEET = {'B200': 2250, 'H100 PCIe': 756, 'H100': 989, 'H200': 989, 'GH200': 989, 'A100': 312, 'L40S': 362, 'L4': 121,
              'RTX 4090': 165, 'RTX 3090': 71}  # fmt: skip


def peak_of(card):
    """Return (peak bfloat16 TFLOP/s, its source as text) of a GPU by name; (None, advice) for an unknown GPU."""
    for name, tflops in DATA_SHEET.items():
        # match whole words: an L40S is not an L4
        if re.search(rf'\b{name}\b', card):
            return tflops, f'the data sheet of the {name}'
    return None, f'no data sheet of {card} here: give --peak_tflops'


def flops(model, lengths, *, share, head, passes):
    """Return the mean FLOPs per pair of a step.

    model: may be on the meta device. lengths (pairs, 3): tokens of prompt, chosen and rejected answer. share: both answers
    share one copy of the prompt. head: logits at answer tokens only. passes: forward passes; a backward counts as two."""
    # skip embeddings, which are lookups, and the head, which is added below
    skipped = r'embed|lm_head|(wte|wpe)\.weight$'
    weights = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not re.search(skipped, name):
            weights += parameter.numel()
    prompt, chosen, rejected = lengths.T  # (pairs,) each
    tokens = prompt + chosen + rejected
    # causal attention: n tokens have about n^2 / 2 (query, key) pairs; rejected tokens attend to the prompt and to themselves
    attended = (prompt + chosen) ** 2 / 2 + rejected * prompt + rejected**2 / 2
    if not share:
        # the prompt is computed twice
        tokens += prompt
        attended += prompt**2 / 2
    head_tokens = chosen + rejected if head else tokens
    # 2 FLOPs per weight and token; 2 per channel for each attention score, and 2 for its part of the output
    shape = model.config
    layers = 2 * weights * tokens
    attention = 4 * shape.num_hidden_layers * shape.hidden_size * attended
    logits = 2 * shape.hidden_size * shape.vocab_size * head_tokens
    return float(((layers + attention + logits) * passes).mean())


def products_alone(model, tokens, predicted, dtype, device, clock):
    """Measure and return the seconds that the matrix products of linear layers take in a step with a live reference.

    model: its shapes count. tokens: of a step; predicted: those through the head. clock(): seconds, once all is done."""
    total = 0.0
    # measure each shape once
    counts = collections.Counter()  # (out_features, in_features) -> number of such layers
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            counts[module.weight.shape] += 1
        # the linear layer of GPT-2
        elif isinstance(module, Conv1D):
            counts[module.weight.T.shape] += 1
    for (out_features, in_features), count in counts.items():
        is_head = out_features == model.config.vocab_size
        rows = predicted if is_head else tokens
        options = {'dtype': dtype, 'device': device}
        x = torch.randn(rows, in_features, **options)
        weight = torch.randn(out_features, in_features, **options)
        grad = torch.randn(rows, out_features, **options)
        seconds = []
        for _ in range(3):
            start = clock()
            x @ weight.T  # forward
            middle = clock()
            grad @ weight  # gradient of x
            grad.T @ x  # gradient of weight
            end = clock()
            # forward of policy and reference, backward of the policy
            seconds.append(2 * (middle - start) + (end - middle))
        # the minimum, since the first run also loads kernels
        total += count * min(seconds)
    return total
