"""One made-up example, to see whether a sharded model still gives what the loaded one gives."""

import functools

import numpy as np
import torch

from configurator import UserError
from data import pack
from model import core, set_attention
from rl.heads import response_scores, token_logps
from runtime.log import say


def measure(model, device):
    """Log-probs (with values, where there are some) of every answer token, or scores: (rows, N), float32, on the CPU."""
    ids = np.random.default_rng(0).integers(core(model).get_input_embeddings().num_embeddings, size=12)
    batch = pack([(ids[:4], [ids[4:8], ids[8:]])], [0], pad=True, device=device)
    function = response_scores if hasattr(core(model), 'score') else token_logps
    forward = getattr(model, function.__name__, functools.partial(function, model))
    set_attention(model, packed=False)
    # compiled blocks would be compiled for this one batch
    with torch.no_grad(), torch.compiler.set_stance('force_eager'):
        return forward(batch).float().cpu()


def measure_loaded(model):
    """measure of a model on the CPU, or None where it cannot run there."""
    try:
        return measure(model, 'cpu')
    except Exception as error:  # some have kernels for a GPU only; can_pack says what fails there as well
        say(f'note: the loaded model was not compared with the sharded one: {type(error).__name__} on the CPU')


def compare(model, expected, device, half):
    """Raise UserError where the sharded model gives other numbers than the loaded one gave (expected).

    half: in bfloat16 the difference may be rounding, so it is a warning."""
    found = measure(model, device)
    model.reshard()
    error = ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
    if error <= (0.1 if half else 0.01):
        return
    name = type(core(model)).__name__.removeprefix('FSDP')  # the prefix that sharding gives it
    text = f'the sharded {name} gives other log-probs than the loaded one: off by {error:.1%}'
    if not half:
        raise UserError(f'{text}; start it in one process without torchrun, in float32, and report this')
    say(f'warning: {text}, more than bfloat16 should cost: compare with --dtype=float32')
