"""A whole model on every rank that trains in bfloat16: float32 weights for the optimizer, bfloat16 copies for forward and backward.

FSDP does the same for a sharded model. On a single rank its hooks would only cost time: half of a step of a small model."""

from functools import partial

import torch

from hf.parts import blocks


class HalfCopies:
    """The bfloat16 copies of a model's trained weights. swap_in() puts the copies into the modules, swap_out() the weights.

    Backward adds the gradient of a copy to .grad of its weight, in float32, and frees it."""

    def __init__(self, model):
        self.copies = {}  # weight -> its copy; a tied weight has one copy
        self.places = []  # (parameters of a module by name, name, weight): where a weight is used
        self.are_in = False
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is None or not weight.requires_grad:
                    continue
                self.places.append((module._parameters, name, weight))
                if weight not in self.copies:
                    self.copies[weight] = torch.nn.Parameter(weight.detach().bfloat16())
                    self.copies[weight].register_post_accumulate_grad_hook(partial(_add_gradient, weight))

    def swap_in(self, *unused):
        """Copy the weights and let the modules compute with the copies. unused: what a forward hook is given."""
        if self.are_in:
            return
        with torch.no_grad():
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))
        for parameters, name, weight in self.places:
            parameters[name] = self.copies[weight]
        self.are_in = True

    def swap_out(self):
        """Let the modules have the weights again, as optimizer, checkpoints and export need them."""
        self.are_in = False
        for parameters, name, weight in self.places:
            parameters[name] = weight

    def drop_gradients(self):
        """Forget what a backward that ended in an error has not added to the weights."""
        for copy in self.copies.values():
            copy.grad = None


def _add_gradient(weight, copy):
    """Move the gradient of a copy to its weight. Autograd calls this as soon as the copy's gradient is complete."""
    if weight.grad is None:
        weight.grad = copy.grad.float()
    else:
        weight.grad += copy.grad
    copy.grad = None


def round_to_half(model):
    """Round a model's weights, and what goes into its blocks, to bfloat16, in place. Weights that train stay float32 tensors.

    Unrounded, a weight halfway between two bfloat16 numbers, common in fp16 files, would jump to the other one with the first
    update, however small. Buffers stay as they are: XGLM adds float32 positions to the input of its first block."""
    for p in model.parameters():
        rounded = p.data.bfloat16()
        p.data = rounded.to(p.dtype) if p.requires_grad else rounded
    for block in blocks(model):
        block.register_forward_pre_hook(_round_hidden)


def _round_hidden(block, inputs):
    """Forward hook of a block: round its first input."""
    if inputs and isinstance(inputs[0], torch.Tensor):
        return inputs[0].bfloat16(), *inputs[1:]
    return inputs
