"""Selective activation checkpointing: recompute norms and MLP activations in backward instead of saving their outputs.

Outputs of matmuls and attention are saved as usual. A norm or activation records a Recipe of its output, and
saved_tensors_hooks make later layers save the Recipe instead of the output. torch's own selective checkpointing
dispatches every operation, which takes three times as long."""

import inspect
from functools import partial

import torch

from model import blocks, core

# source of the MLP forward of Llama and about a hundred other architectures in transformers
GATED = 'self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))'


class Recipe:
    """An output that can be recomputed as function(*inputs). Holds the inputs until backward, instead of the output."""

    def __init__(self, function, inputs):
        self.function, self.output = function, None
        # detached leaves, so that Recompute.backward differentiates this function alone
        self.inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        # autograd's counters of in-place changes
        self.versions = [x._version for x in self.inputs]

    def recompute(self):
        """Return the output with a graph from self.inputs. Cached, as several layers may have saved this output."""
        if self.output is None:
            if self.versions != [x._version for x in self.inputs]:
                raise RuntimeError('this model changes its activations in place: leave out selective checkpointing')
            with torch.enable_grad():
                self.output = self.function(*self.inputs)
        return self.output


class Recompute(torch.autograd.Function):
    """Compute a Recipe's output without saving any tensor for backward, where the output is recomputed."""

    @staticmethod
    def forward(ctx, recipe, num_inputs, *tensors):
        """Return the output. tensors: num_inputs inputs of recipe.function, then the parameters that it uses."""
        ctx.recipe = recipe
        ctx.parameters = tensors[num_inputs:]
        return recipe.function(*tensors[:num_inputs])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Return the gradients of forward's arguments, given the gradient of the output."""
        recipe = ctx.recipe
        output = recipe.recompute()
        # all layers that saved the output have run their backward: free it
        recipe.output = None
        tensors = [*recipe.inputs, *ctx.parameters]
        gradients = iter(torch.autograd.grad(output, [x for x in tensors if x.requires_grad], grad))
        # None for recipe and num_inputs
        return None, None, *(next(gradients) if x.requires_grad else None for x in tensors)


class Lean:
    """Selective checkpointing of one block: replaces forward methods inside it, in place."""

    def __init__(self, block):
        # data_ptr of an output -> (output, Recipe); filled during the block's forward
        self.recipes = {}
        for name, module in block.named_modules():
            last = name.rpartition('.')[2]
            is_activation = last.startswith('act') and 'drop' not in last
            # named_modules() lists an MLP before its act_fn, so act_fn.forward has not been replaced yet
            if is_activation or 'Norm' in type(module).__name__:
                module.forward = partial(self.call, module.forward, module)
            elif GATED in inspect.getsource(type(module).forward):
                module.forward = partial(self.gated, module, module.act_fn.forward)
        block.forward = partial(self.run, block.forward)

    def run(self, forward, *args, **options):
        """Run the block's forward, saving Recipes instead of recomputable tensors if gradients are enabled."""
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                return forward(*args, **options)
        finally:
            self.recipes.clear()

    def call(self, function, module, *inputs, **options):
        """Return function(*inputs), to be recomputed in backward. module: owns the parameters that the function uses."""
        # only plain tensors can be detached leaves of a Recipe
        plain = not options and all(type(x) is torch.Tensor for x in inputs)
        if not plain or not torch.is_grad_enabled():
            return function(*inputs, **options)
        recipe = Recipe(function, inputs)
        output = Recompute.apply(recipe, len(inputs), *inputs, *module.parameters())
        # keep a reference to the output, so that its address is not reused during this forward
        self.recipes[output.data_ptr()] = output, recipe
        return output

    def gated(self, mlp, act, x):
        """Run an MLP of the form GATED, recomputing act(gate) * up in backward. act: the original mlp.act_fn.forward."""
        product = self.call(lambda gate, up: act(gate) * up, mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x))
        return mlp.down_proj(product)

    def pack(self, tensor):
        """Return what autograd saves for a tensor: (recipe, shape) if it is a recipe's output, else the tensor."""
        if type(tensor) is not torch.Tensor or tensor.data_ptr() not in self.recipes:
            return tensor
        # same address, so either a reshaped output, or only a part of it
        output, recipe = self.recipes[tensor.data_ptr()]
        is_whole = tensor.numel() == output.numel() and tensor.dtype == output.dtype
        both_contiguous = tensor.is_contiguous() and output.is_contiguous()
        return (recipe, tensor.shape) if is_whole and both_contiguous else tensor

    def unpack(self, saved):
        """Return the tensor for which pack returned saved."""
        if isinstance(saved, torch.Tensor):
            return saved
        recipe, shape = saved
        return recipe.recompute().detach().view(shape)


def recompute(model, activation_checkpointing=False):
    """Turn on activation checkpointing, in place: for whole blocks (True), for cheap operations ('selective'), or not at all."""
    if activation_checkpointing == 'selective':
        for block in blocks(model):
            Lean(block)
    elif activation_checkpointing:
        inner = core(model)
        # transformers 5.20 renamed the method, and warns of the old name
        renamed = hasattr(inner, 'activation_checkpointing_enable')
        enable = inner.activation_checkpointing_enable if renamed else inner.gradient_checkpointing_enable
        enable()
        # transformers checkpoints only blocks in training mode, but models here stay in eval mode. block.train() would also turn
        # on the dropout inside the block, so set the block's own flag only
        for block in blocks(model):
            block.training = True
