"""What a step must cost: model FLOPs of a pair, its matrix products alone, what the card's data sheet promises. For bench.py."""

import collections
import re

import torch

# TFLOP/s of bfloat16 products without sparsity, from NVIDIA's data sheets: the first that is in the card's name counts
DATA_SHEET = {'B200': 2250, 'H100 PCIe': 756, 'H100': 989, 'H200': 989, 'GH200': 989, 'A100': 312, 'L40S': 362, 'L4': 121,
              'RTX 4090': 165, 'RTX 3090': 71}  # fmt: skip


def peak_of(card):
    """(TFLOP/s that a card of this name gives in bfloat16, where that is from): (None, what to do) where it is not known."""
    for name, tflops in DATA_SHEET.items():
        if re.search(rf'\b{name}\b', card):
            return tflops, f'the data sheet of the {name}'
    return None, f'no data sheet of {card} here: give --peak_tflops'


def flops(model, lengths, *, share, head, passes):
    """Model FLOPs of a pair: 2 per weight and token in each forward.

    model: its shapes; lengths: (pairs, 3) tokens of prompt and answers; share: both answers share a prompt; head: only where an
    answer token is predicted; passes: forwards, of which a backward counts two."""
    # the weights of matrix products, without embeddings; the head is counted by itself
    outside = r'embed|lm_head|(wte|wpe)\.weight$'
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and not re.search(outside, name))

    # tokens, and pairs of tokens that attend; the second answer's prompt is computed once more where it is not shared
    prompt, chosen, rejected = lengths.T  # (pairs,) each
    tokens = prompt + chosen + rejected
    attended = (prompt + chosen) ** 2 / 2 + rejected * prompt + rejected**2 / 2
    if not share:
        tokens = tokens + prompt
        attended = attended + prompt**2 / 2
    in_head = chosen + rejected if head else tokens

    shape = model.config
    forward = 2 * weights * tokens + 4 * shape.num_hidden_layers * shape.hidden_size * attended
    forward = forward + 2 * shape.hidden_size * shape.vocab_size * in_head
    return float((forward * passes).mean())


def products_alone(model, tokens, predicted, dtype, device, clock):
    """Seconds, by clock(), for a step's matrix products and nothing else: every linear layer, forward, and both backward products.

    The forward counts twice, for policy and reference. tokens, predicted: rows of the layers, and of the head."""
    total = 0.0
    linears = collections.Counter(m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear))
    for (outputs, inner), count in linears.items():
        n = predicted if outputs == model.config.vocab_size else tokens
        shapes = (n, inner), (outputs, inner), (n, outputs)
        x, w, y = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
        spent = []
        for _ in range(3):
            start = clock()
            x @ w.T
            middle = clock()
            y @ w
            y.T @ x
            forward, backward = middle - start, clock() - middle
            spent.append(2 * forward + backward)
        total += count * min(spent)
    return total
