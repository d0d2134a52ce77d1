"""Selective activation checkpointing: norms and the elementwise middle of an MLP are computed again in backward, not kept for it.

Matrix products and attention keep what they need. The norms and activations of a model's blocks are found by name and
structure, and record a Recipe; a layer behind them that would keep their output for backward keeps the Recipe instead. torch's
own selective checkpointing goes through every operation, which takes three times as long."""

import inspect
from functools import partial

import torch

from model import blocks

# as transformers writes the MLP of Llama and a hundred others
GATED = 'self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))'


class Recipe:
    """How to compute an output again: function(*inputs). It holds the inputs, and not the output, until backward."""

    def __init__(self, function, inputs):
        self.function, self.output = function, None
        # leaves of a graph of their own, of which Again.backward takes the gradients
        self.inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        # torch counts the changes of a tensor in place
        self.versions = [x._version for x in self.inputs]

    def again(self):
        """Return the output with a graph from self.inputs. It is computed once, and kept until backward has used it."""
        if self.output is None:
            if self.versions != [x._version for x in self.inputs]:
                raise RuntimeError('this model changes its activations in place: leave out selective checkpointing')
            with torch.enable_grad():
                self.output = self.function(*self.inputs)
        return self.output


class Again(torch.autograd.Function):
    """The output of a Recipe in the model's graph. Autograd keeps nothing of what lies between its inputs and its output."""

    @staticmethod
    def forward(ctx, recipe, n_inputs, *tensors):
        """Return the output. tensors: first n_inputs inputs of the function, then parameters that it reads from its module."""
        ctx.recipe = recipe
        ctx.parameters = tensors[n_inputs:]
        return recipe.function(*tensors[:n_inputs])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Compute the output again, and return the gradients of all tensors from grad, that of the output."""
        recipe = ctx.recipe
        output = recipe.again()
        # the layers behind have had their backward: nobody asks for this output any more
        recipe.output = None
        tensors = [*recipe.inputs, *ctx.parameters]
        gradients = iter(torch.autograd.grad(output, [x for x in tensors if x.requires_grad], grad))
        of_tensors = [next(gradients) if x.requires_grad else None for x in tensors]
        # recipe and n_inputs have none
        return None, None, *of_tensors


class Lean:
    """Selective checkpointing of one block: it replaces forward methods in the block, and holds the recipes of a forward."""

    def __init__(self, block):
        # address of an output -> (output, Recipe), while the block's forward runs
        self.recipes = {}
        for name, module in block.named_modules():
            last = name.rpartition('.')[2]
            is_activation = last.startswith('act') and 'drop' not in last
            # a gated MLP comes before its own activation, so it takes the activation's forward as the model has it
            if is_activation or 'Norm' in type(module).__name__:
                module.forward = partial(self.call, module.forward, module)
            elif GATED in inspect.getsource(type(module).forward):
                module.forward = partial(self.gated, module, module.act_fn.forward)
        block.forward = partial(self.run, block.forward)

    def run(self, forward, *args, **options):
        """Run the block's forward. If a graph is recorded, pack chooses what is kept of each tensor for backward."""
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                return forward(*args, **options)
        finally:
            self.recipes.clear()

    def call(self, function, module, *inputs, **options):
        """Return function(*inputs), to be computed again in backward. module: the one whose parameters the function reads."""
        # whatever is not a plain tensor could not be made a leaf for backward
        plain = not options and all(type(x) is torch.Tensor for x in inputs)
        if not plain or not torch.is_grad_enabled():
            return function(*inputs, **options)
        recipe = Recipe(function, inputs)
        output = Again.apply(recipe, len(inputs), *inputs, *module.parameters())
        # while the output is held here, no other tensor gets its address
        self.recipes[output.data_ptr()] = output, recipe
        return output

    def gated(self, mlp, act, x):
        """Run an MLP written as GATED, whose product of activation and up_proj is computed again. act: its plain activation."""

        def multiply(gate, up):
            return act(gate) * up

        product = self.call(multiply, mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x))
        return mlp.down_proj(product)

    def pack(self, tensor):
        """Return what autograd keeps of a tensor for backward: (recipe, shape) if it is a recipe's output, else the tensor."""
        if type(tensor) is not torch.Tensor or tensor.data_ptr() not in self.recipes:
            return tensor
        # the same address may be a part of the output; another shape of all of it will do
        output, recipe = self.recipes[tensor.data_ptr()]
        is_all = tensor.numel() == output.numel() and tensor.dtype == output.dtype
        in_order = tensor.is_contiguous() and output.is_contiguous()
        if is_all and in_order:
            return recipe, tensor.shape
        return tensor

    def unpack(self, kept):
        """Return the tensor that pack was given, from what pack has returned."""
        if isinstance(kept, torch.Tensor):
            return kept
        recipe, shape = kept
        return recipe.again().detach().view(shape)


def enable(model):
    """Turn selective checkpointing on for all blocks of a model, in place."""
    for block in blocks(model):
        Lean(block)
