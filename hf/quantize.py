"""--quantize=4bit (QLoRA, arXiv 2305.14314): frozen linear layers of a PeftModel as 4-bit NF4, by bitsandbytes.

FSDP does not shard the 4-bit weights, as they are buffers. Embeddings, head and norms are not quantized."""

import logging
import math

import torch
from transformers.pytorch_utils import Conv1D

from configurator import UserError
from hf.parts import blocks

WEIGHTS_A_SCALE = 64  # so many weights share a scale; bitsandbytes calls them a block
NF4_OPTIONS = {'blocksize': WEIGHTS_A_SCALE, 'quant_type': 'nf4'}


def check(config):
    """Raise UserError if --quantize conflicts with other options of a run, or if bitsandbytes does not work here."""
    if config['quantize'] is None:
        return
    if config['lora_rank'] is None:
        raise UserError('--quantize=4bit: weights of 4 bits do not train; add --lora_rank=16, or leave it out')
    if config['device_map']:
        raise UserError('quantize and device_map do not go together: leave one of them out')
    # silence the warning that bitsandbytes could not fetch a CPU kernel from the hub
    logging.getLogger('bitsandbytes.backends.cpu.ops').setLevel(logging.ERROR)
    # try a small matrix: bitsandbytes may be missing, too old, or without a library for this machine
    try:
        from bitsandbytes.functional import quantize_4bit

        quantize_4bit(torch.ones(WEIGHTS_A_SCALE, WEIGHTS_A_SCALE), **NF4_OPTIONS)
    except Exception as error:
        wanted = f'bitsandbytes ({" ".join(str(error).split())[:100]})'
        raise UserError(f'--quantize=4bit needs {wanted}: pip install bitsandbytes, or leave it out') from None


class Linear4bit(torch.nn.Module):
    """A frozen 4-bit copy of a torch.nn.Linear. Computes in the dtype of its input."""

    def __init__(self, layer):
        from bitsandbytes.functional import quantize_4bit

        super().__init__()
        self.shape = layer.weight.shape
        self.bias = layer.bias
        weight = layer.weight.data
        if weight.is_meta:
            # buffers without values, of the same shapes: two weights a byte, 64 weights a scale
            codes = weight.new_empty((math.ceil(weight.numel() / 2), 1), dtype=torch.uint8)
            scales = weight.new_empty(math.ceil(weight.numel() / WEIGHTS_A_SCALE))
            levels = weight.new_empty(16)
        else:
            codes, state = quantize_4bit(weight, **NF4_OPTIONS)
            scales, levels = state.absmax, state.code
        self.register_buffer('codes', codes)
        self.register_buffer('scales', scales)
        self.register_buffer('levels', levels)  # the 16 values of a 4-bit code, before scaling

    def state(self, dtype):
        """Return the QuantState that bitsandbytes needs to unpack the weights to dtype."""
        from bitsandbytes.functional import QuantState

        return QuantState(self.scales, shape=self.shape, code=self.levels, dtype=dtype, **NF4_OPTIONS)

    def forward(self, x):
        from bitsandbytes import matmul_4bit

        # bitsandbytes needs the bias in the dtype of x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return matmul_4bit(x, self.codes.t(), self.state(x.dtype), bias=bias)

    def dequantized(self):
        """Return a torch.nn.Linear with the unpacked weights in float32, and with the same bias."""
        from bitsandbytes.functional import dequantize_4bit

        out_features, in_features = self.shape
        layer = torch.nn.Linear(in_features, out_features, bias=False)
        layer.weight.data = dequantize_4bit(self.codes, self.state(torch.float32))
        layer.bias = self.bias
        return layer


def quantize(model):
    """Replace the linear layers in the blocks of a PeftModel, except its adapters, by our Linear4bit, in place. Returns the model."""
    for block in blocks(model):
        for path, parent in list(block.named_modules()):  # a list, as the loop replaces modules
            for name, layer in parent.named_children():
                if isinstance(layer, Conv1D):
                    raise UserError('--quantize=4bit: the layers of GPT-2 are no torch.nn.Linear: leave it out')
                # layers of adapters have a parent lora_A or lora_B
                if isinstance(layer, torch.nn.Linear) and 'lora_' not in path:
                    setattr(parent, name, Linear4bit(layer))
    return model


def dequantize(model):
    """Replace each Linear4bit of a model by a float32 torch.nn.Linear with the unpacked weights. Returns the model."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, Linear4bit):
                setattr(parent, name, layer.dequantized())
    return model


def count_4bit_weights(model):
    """Return the number of 4-bit weights of a model; as buffers they are missing from model.parameters()."""
    return sum(module.shape.numel() for module in model.modules() if isinstance(module, Linear4bit))
