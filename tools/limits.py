"""Lower bounds of a step's cost, for tools/bench.py: the FLOPs of its model, and the time of its matrix products alone.

peak_of says what a GPU could do at most, which turns FLOPs into a utilisation (MFU).
"""

import collections
import re

import torch

# TFLOP/s of bfloat16 products without sparsity, from NVIDIA's data sheets; of two names in a card's name the first counts
DATA_SHEET = {'B200': 2250, 'H100 PCIe': 756, 'H100': 989, 'H200': 989, 'GH200': 989, 'A100': 312, 'L40S': 362, 'L4': 121,
              'RTX 4090': 165, 'RTX 3090': 71}  # fmt: skip


def peak_of(card):
    """Return (peak TFLOP/s in bfloat16, source of the figure in words) for the name of a GPU.

    For a card without a data sheet here, the peak is None, and the words say what to do."""
    for name, tflops in DATA_SHEET.items():
        # whole words: an L40S is no L4
        if re.search(rf'\b{name}\b', card):
            return tflops, f'the data sheet of the {name}'
    return None, f'no data sheet of {card} here: give --peak_tflops'


def flops(model, lengths, *, share, head, passes):
    """Return the mean FLOPs of a pair in one step: a product of matrices costs 2 FLOPs for each weight and token.

    model: its weights may be on the meta device, for only shapes are read. lengths (pairs, 3): tokens of prompt, chosen and
    rejected answer. share: the two answers share one copy of their prompt. head: the head predicts answer tokens alone, and
    not every token. passes: number of forward passes; a backward pass costs as much as two."""
    # embeddings are looked up, not multiplied; the head comes later, since it may see fewer tokens
    not_counted = r'embed|lm_head|(wte|wpe)\.weight$'
    weights = 0
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2
        if is_matrix and not re.search(not_counted, name):
            weights += parameter.numel()

    # Causal attention over n tokens has about n^2 / 2 pairs (query, key). Prompt and chosen answer are one such text; then the
    # rejected answer attends to the prompt and to itself.
    prompt, chosen, rejected = lengths.T  # (pairs,) each
    tokens = prompt + chosen + rejected
    of_chosen = (prompt + chosen) ** 2 / 2
    attended = of_chosen + rejected * prompt + rejected**2 / 2
    # a prompt that is not shared is computed once more, for the rejected answer
    if not share:
        tokens = tokens + prompt
        attended = attended + prompt**2 / 2
    in_head = chosen + rejected if head else tokens

    # each pair (query, key) costs 2 FLOPs a channel for its score, and 2 for its part of the output
    shape = model.config
    in_layers = 2 * weights * tokens
    in_attention = 4 * shape.num_hidden_layers * shape.hidden_size * attended
    in_logits = 2 * shape.hidden_size * shape.vocab_size * in_head
    forward = in_layers + in_attention + in_logits
    return float((forward * passes).mean())


def products_alone(model, tokens, predicted, dtype, device, clock):
    """Measure the seconds of a step's matrix products and nothing else, for policy and live reference.

    Every linear layer of the model has one forward product of each of the two models, and two backward products of the
    policy. model: only shapes are read. tokens: rows of the input of a layer; predicted: rows of the head's input.
    clock() -> seconds, when all work so far is done."""
    total = 0.0
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    # layers of the same shape take the same time: each shape is measured once
    counts = collections.Counter(linear.weight.shape for linear in linears)
    for (outputs, inputs), count in counts.items():
        is_head = outputs == model.config.vocab_size
        rows = predicted if is_head else tokens
        options = {'dtype': dtype, 'device': device}
        x = torch.randn(rows, inputs, **options)
        weight = torch.randn(outputs, inputs, **options)
        grad = torch.randn(rows, outputs, **options)
        # the fastest of three tries, for the first one also loads kernels
        seconds = []
        for _ in range(3):
            start = clock()
            x @ weight.T  # forward
            middle = clock()
            grad @ weight  # the gradient of x
            grad.T @ x  # the gradient of the weight
            end = clock()
            forward = middle - start
            backward = end - middle
            # policy and reference go forward, the policy alone goes backward
            seconds.append(2 * forward + backward)
        total += count * min(seconds)
    return total
