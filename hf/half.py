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
        self.uses = []  # (parameters of a module by name, name, weight): the weight has this name in this module
        self.are_in = False
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight in self.copies:
                    self.uses.append((module._parameters, name, weight))
        self._register_hooks()

    def __setstate__(self, state):
        """Fill a deep copy of this object with state, its attributes. Called by copy.deepcopy, which copies no hooks of tensors."""
        vars(self).update(state)
        self._register_hooks()

    def _register_hooks(self):
        """Let autograd call _add_gradient(weight, copy) when the gradient of a copy is complete."""
        # the hook belongs to the copy, and the copy to self: a weak reference to self lets all of them be freed
        add_gradient = partial(HalfCopies._add_gradient, weakref.proxy(self))
        for weight, copy in self.copies.items():
            copy.register_post_accumulate_grad_hook(partial(add_gradient, weight))

    def _add_gradient(self, weight, copy):
        """Move the complete gradient of a copy to its weight. Lets autograd call swap_out at the end of this backward."""
        grad = copy.grad
        copy.grad = None
        has_hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
        if has_hooks:
            weight.backward(grad.float())  # adds to weight.grad, and calls a user's hooks
        elif weight.grad is None:
            weight.grad = grad.float()
        else:
            weight.grad += grad
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(self.swap_out)

    def swap_in(self, *unused):
        """Update the copies from the weights, and let the modules compute with them. unused: the arguments of a forward hook."""
        if self.are_in:
            return
        with torch.no_grad():
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))  # destinations, sources
        for parameters, name, weight in self.uses:
            parameters[name] = self.copies[weight].requires_grad_(weight.requires_grad)
        self.required_grad = {weight: weight.requires_grad for weight in self.copies}  # as it is now, for swap_out
        self.are_in = True

    def swap_out(self):
        """Let the modules have the weights again, as optimizer, checkpoints and export need them."""
        if not self.are_in:
            return
        self.are_in = False
        for parameters, name, weight in self.uses:
            parameters[name] = weight
        # model.requires_grad_() has reached only the copies while they were in: pass on what it has changed
        for weight, copy in self.copies.items():
            if copy.requires_grad != self.required_grad[weight]:
                weight.requires_grad_(copy.requires_grad)


def round_to_half(model):
    """Round a model's weights, in place, and all that goes into its blocks to bfloat16. Weights that train stay float32 tensors."""
    # a weight halfway between two bfloat16 numbers, common in fp16 files, would else jump with its first update, however small
    for p in model.parameters():
        rounded = p.data.bfloat16()
        p.data = rounded.to(p.dtype) if p.requires_grad else rounded

    def round_hidden(block, inputs):
        if inputs and isinstance(inputs[0], torch.Tensor):
            return inputs[0].bfloat16(), *inputs[1:]
        return inputs

    # buffers stay float32: XGLM, for one, adds positions from one to the input of its first block
    for block in blocks(model):
        block.register_forward_pre_hook(round_hidden)
