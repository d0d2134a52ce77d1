"""Frozen linear layers with weights of four bits, beside adapters that train (--quantize=4bit; QLoRA, arXiv 2305.14314).

bitsandbytes packs the weights as NF4, in blocks of 64 that share a scale. The packed weights are buffers, which FSDP does not
shard: every rank holds all of them. Embeddings, head and norms stay as they are."""

import logging
import math

import torch
from transformers.pytorch_utils import Conv1D

from configurator import UserError
from model import blocks

# so many weights share a scale
BLOCK = 64
# what each function of bitsandbytes is told
KIND = {'blocksize': BLOCK, 'quant_type': 'nf4'}


def check(config):
    """Raise UserError where --quantize does not go with a script's other options, or where bitsandbytes does not work here."""
    if config['quantize'] is None:
        return
    if config['lora_rank'] is None:
        raise UserError('--quantize=4bit: weights of 4 bits do not train; add --lora_rank=16, or leave it out')
    if config['device_map']:
        raise UserError('quantize and device_map do not go together: leave one of them out')
    # by itself bitsandbytes tries to fetch code for this CPU from the hub, and complains that it could not
    logging.getLogger('bitsandbytes.backends.cpu.ops').setLevel(logging.ERROR)
    # try it on a small matrix: it may be missing, be too old, or find no library for this machine
    try:
        from bitsandbytes.functional import quantize_4bit

        quantize_4bit(torch.ones(BLOCK, BLOCK), **KIND)
    except Exception as error:
        wanted = f'bitsandbytes ({" ".join(str(error).split())[:100]})'
        raise UserError(f'--quantize=4bit needs {wanted}: pip install bitsandbytes, or leave it out') from None


class Linear4bit(torch.nn.Module):
    """A frozen linear layer with weights of 4 bits, made from a torch.nn.Linear. It computes in the type of its input."""

    def __init__(self, layer):
        from bitsandbytes.functional import quantize_4bit

        super().__init__()
        self.shape, self.bias = layer.weight.shape, layer.bias
        weight = layer.weight.data
        if weight.is_meta:
            # no values yet: buffers of the same shapes, two weights a byte and a scale for each block
            packed = weight.new_empty((math.ceil(weight.numel() / 2), 1), dtype=torch.uint8)
            scales = weight.new_empty(math.ceil(weight.numel() / BLOCK))
            levels = weight.new_empty(16)
        else:
            packed, state = quantize_4bit(weight, **KIND)
            scales, levels = state.absmax, state.code
        # levels: the 16 numbers that four bits stand for, before a block's scale
        self.register_buffer('packed', packed)
        self.register_buffer('scales', scales)
        self.register_buffer('levels', levels)

    def state(self, dtype):
        """Return the QuantState with which bitsandbytes unpacks the weights into dtype."""
        from bitsandbytes.functional import QuantState

        return QuantState(self.scales, shape=self.shape, code=self.levels, dtype=dtype, **KIND)

    def forward(self, x):
        from bitsandbytes import matmul_4bit

        # the bias is kept in float32 or bfloat16, and bitsandbytes wants it in the type of x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return matmul_4bit(x, self.packed.t(), self.state(x.dtype), bias=bias)

    def dequantized(self):
        """Return a torch.nn.Linear with the float32 weights that the packed ones stand for."""
        from bitsandbytes.functional import dequantize_4bit

        # bias=False: the frozen bias is handed on, not made anew
        n_out, n_in = self.shape
        layer = torch.nn.Linear(n_in, n_out, bias=False)
        layer.weight.data = dequantize_4bit(self.packed, self.state(torch.float32))
        layer.bias = self.bias
        return layer


def quantize(model):
    """Replace the linear layers in the blocks of a PeftModel by Linear4bit, in place, and return the model.

    The adapters' own layers stay as they are. Raises UserError for GPT-2, whose layers are of another class."""
    for block in blocks(model):
        # a list, because the modules change on the way
        for path, parent in list(block.named_modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, Conv1D):
                    raise UserError('--quantize=4bit: the layers of GPT-2 are no torch.nn.Linear: leave it out')
                # lora_A and lora_B are the parents of the adapters' layers
                if isinstance(layer, torch.nn.Linear) and 'lora_' not in path:
                    setattr(parent, name, Linear4bit(layer))
    return model


def dequantize(model):
    """Replace each Linear4bit of a model by the torch.nn.Linear in float32 that it stands for, in place; return the model."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, Linear4bit):
                setattr(parent, name, layer.dequantized())
    return model


def packed_weights(model):
    """Return how many weights of a model are in 4 bits, and so are not among its parameters."""
    return sum(module.shape.numel() for module in model.modules() if isinstance(module, Linear4bit))
