"""A whole model on every rank that trains in bfloat16: float32 weights for the optimizer, bfloat16 copies for forward and backward.

FSDP does the same for a sharded model. On a single rank its hooks would only cost time."""

import weakref
from functools import partial

import torch

from hf.parts import blocks


class HalfCopies:
    """The bfloat16 copies of a model's trained weights. swap_in() puts the copies into the modules, swap_out() the weights.

    Backward adds the gradient of a copy to .grad of its weight, in float32, and frees it. At its end it swaps out, so that
    between backward and the next forward the model has weights."""

    def __init__(self, model):
        trained = [p for p in model.parameters() if p.requires_grad]
        # weight -> its copy; a tied weight has one copy
        self.copies = {weight: torch.nn.Parameter(weight.detach().bfloat16()) for weight in trained}
        self.places = []  # (parameters of a module by name, name, weight): where a weight is used
        self.are_in = False
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight in self.copies:
                    self.places.append((module._parameters, name, weight))
        self.__setstate__({})

    def __setstate__(self, state):
        """Take state, of a deep copy, and let autograd call _add_gradient: hooks are not copied."""
        vars(self).update(state)
        for weight, copy in self.copies.items():
            # a proxy, because copy and hook would keep each other for good
            hook = partial(HalfCopies._add_gradient, weakref.proxy(self), weight)
            copy.register_post_accumulate_grad_hook(hook)

    def _add_gradient(self, weight, copy):
        """Move the gradient of a copy, which is complete, to its weight. At the end of the backward, swap out."""
        grad = copy.grad
        copy.grad = None
        has_hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
        if has_hooks:
            weight.backward(grad.float())  # calls these hooks
        elif weight.grad is None:
            weight.grad = grad.float()
        else:
            weight.grad += grad
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(self.swap_out)

    def swap_in(self, *unused):
        """Update the copies, also in requires_grad, and let the modules compute with them. unused: a forward hook's arguments."""
        if self.are_in:
            return
        with torch.no_grad():
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))
        for parameters, name, weight in self.places:
            parameters[name] = self.copies[weight].requires_grad_(weight.requires_grad)
        self.required_grad = {weight: weight.requires_grad for weight in self.copies}
        self.are_in = True

    def swap_out(self):
        """Let the modules have the weights again, as optimizer, checkpoints and export need them."""
        if not self.are_in:
            return
        self.are_in = False
        for parameters, name, weight in self.places:
            parameters[name] = weight
        # what has been frozen meanwhile, by way of a copy, stays so; of weights frozen by themselves the copies know nothing
        for weight, copy in self.copies.items():
            if copy.requires_grad != self.required_grad[weight]:
                weight.requires_grad_(copy.requires_grad)


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
