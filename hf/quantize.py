"""Four bits a weight in the frozen linear layers beside adapters (QLoRA, arXiv 2305.14314): NF4 in blocks of 64, by bitsandbytes.

The packed weights are buffers. FSDP does not cut those, so every rank holds all of them; embeddings, head and norms stay as they are."""

import logging

import torch
from transformers.pytorch_utils import Conv1D

from configurator import UserError
from model import blocks

BLOCK = 64  # weights that share a scale
KIND = {'blocksize': BLOCK, 'quant_type': 'nf4'}


def check(config):
    """Raise UserError where a script's option quantize does not go with others, or bitsandbytes cannot be had."""
    if config['quantize'] is None:
        return
    if config['lora_rank'] is None:
        raise UserError(
            '--quantize=4bit: weights of 4 bits do not train; add --lora_rank=16, or leave it out to train all'
        )
    if config['device_map']:
        raise UserError(
            'quantize and device_map do not go together: 4 bits a weight need fewer GPUs; leave one of them out'
        )
    # it says that it could not fetch code for this CPU from the hub, which nobody has asked for
    logging.getLogger('bitsandbytes.backends.cpu.ops').setLevel(logging.ERROR)
    try:
        Linear4bit(torch.nn.Linear(BLOCK, BLOCK))
    except Exception as error:  # it is missing, too old, or finds no library for this machine
        wanted = f'bitsandbytes ({" ".join(str(error).split())[:100]})'
        raise UserError(f'--quantize=4bit needs {wanted}: pip install bitsandbytes, or leave it out') from None


class Linear4bit(torch.nn.Module):
    """What a frozen linear layer computes, from weights of 4 bits, in the type of its input."""

    def __init__(self, layer):
        from bitsandbytes.functional import quantize_4bit

        super().__init__()
        self.shape, self.bias, weight = layer.weight.shape, layer.bias, layer.weight.data
        if weight.is_meta:
            # the same buffers without values
            packed = weight.new_empty((-(-weight.numel() // 2), 1), dtype=torch.uint8)
            scales, levels = weight.new_empty(-(-weight.numel() // BLOCK)), weight.new_empty(16)
        else:
            packed, state = quantize_4bit(weight, **KIND)
            scales, levels = state.absmax, state.code
        self.register_buffer('packed', packed)
        self.register_buffer('scales', scales)
        self.register_buffer('levels', levels)

    def state(self, dtype):
        """What bitsandbytes asks for beside the packed weights. dtype: of the weights that it makes of them."""
        from bitsandbytes.functional import QuantState

        return QuantState(self.scales, shape=self.shape, code=self.levels, dtype=dtype, **KIND)

    def forward(self, x):
        from bitsandbytes import matmul_4bit

        bias = None if self.bias is None else self.bias.to(x.dtype)
        return matmul_4bit(x, self.packed.t(), self.state(x.dtype), bias=bias)

    def dequantized(self):
        """A torch.nn.Linear in float32 that computes the same."""
        from bitsandbytes.functional import dequantize_4bit

        layer = torch.nn.Linear(self.shape[1], self.shape[0], bias=False)
        layer.weight.data, layer.bias = dequantize_4bit(self.packed, self.state(torch.float32)), self.bias
        return layer


def quantize(model):
    """Give the linear layers in the blocks of a PeftModel, all but the adapters' own, 4 bits a weight, in place."""
    for block in blocks(model):
        for path, parent in list(block.named_modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, Conv1D):
                    raise UserError('--quantize=4bit: the layers of GPT-2 are no torch.nn.Linear: leave it out')
                if isinstance(layer, torch.nn.Linear) and 'lora_' not in path:
                    setattr(parent, name, Linear4bit(layer))
    return model


def dequantize(model):
    """Give the layers of quantize whole weights again, in place: those that the packed ones stand for."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, Linear4bit):
                setattr(parent, name, layer.dequantized())
    return model


def packed_weights(model):
    """How many weights are in 4 bits, and not among the parameters."""
    return sum(m.shape.numel() for m in model.modules() if isinstance(m, Linear4bit))
