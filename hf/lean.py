"""Less memory for activations: a block computes again in backward what it has not kept."""

import functools

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model import blocks


def recompute(model, selective):
    """Let the blocks of a model keep their inputs alone; selective: matrix products and attention, too."""
    options = {'use_reentrant': False}
    if selective:
        options['context_fn'] = functools.partial(create_selective_checkpoint_contexts, _choose)
    for block in blocks(model):
        block.recomputes = True
        block.forward = functools.partial(_forward, block, block.forward, options)


def _forward(block, forward, how, *args, **options):
    """A block's forward, perhaps to be done again. how: options of torch's checkpoint."""
    if not block.recomputes or not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, **how, **options)


def _choose(context, operation, *args, **options):
    """What torch does with the result of an operation."""
    return CheckpointPolicy.MUST_SAVE if _is_expensive(operation) else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_expensive(operation):
    """By its name: aten.addmm.default, aten._scaled_dot_product_flash_attention.default, torch_attn._varlen_attn.default ..."""
    return any(word in str(operation) for word in ('mm.', 'attention', 'attn'))
