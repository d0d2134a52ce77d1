"""Selective activation checkpointing: recompute norms and MLP activations in backward instead of saving their outputs.

Outputs of matmuls and attention are saved as usual. A norm or activation records a Recipe of its output, and saved_tensors_hooks
make later layers save the Recipe instead. torch's own way, which dispatches every operation, takes three times as long."""

import inspect
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from hf.parts import blocks


class Recipe:
    """How to recompute an output, function(*inputs). Holds the inputs until backward, instead of the output."""

    def __init__(self, function, inputs):
        self.function = function
        self.output = None  # set by recompute()
        # detach them from the graph, so that Recompute.backward differentiates this function alone
        self.inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        # torch counts a tensor's in-place changes: recompute() refuses inputs that have changed
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
    """Compute a Recipe's output. Autograd saves nothing for it: backward recomputes the output."""

    @staticmethod
    def forward(ctx, recipe, n_inputs, *tensors):
        """Return the output. tensors: n_inputs inputs of recipe.function, then its parameters, so that autograd asks for their gradients."""
        ctx.recipe = recipe
        ctx.parameters = tensors[n_inputs:]
        return recipe.function(*tensors[:n_inputs])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Return the gradients of forward's arguments, given the gradient of the output."""
        recipe = ctx.recipe
        output = recipe.recompute()
        recipe.output = None  # all layers that saved the output have run their backward: free it
        tensors = [*recipe.inputs, *ctx.parameters]
        wanted = [x for x in tensors if x.requires_grad]
        gradients = iter(torch.autograd.grad(output, wanted, grad))
        gradients_or_none = [next(gradients) if x.requires_grad else None for x in tensors]
        return None, None, *gradients_or_none  # None for recipe and n_inputs


class LeanBlock:
    """Selective checkpointing of one block: replaces the forward of the block, its norms, activations and MLP, in place.

    recipes: data_ptr of an output -> (output, Recipe), for the outputs that the running forward has made so far."""

    def __init__(self, block):
        self.recipes = {}
        # source of the MLP's forward in Llama and about a hundred other architectures of transformers
        gated = 'self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))'
        for path, module in block.named_modules():
            module.recomputed = self.recomputed  # packed_attention calls it
            # activations are called act, act_fn ..., such as layers.0.mlp.act_fn, but act_dropout is none
            name = path.rpartition('.')[2]
            is_activation = name.startswith('act') and 'drop' not in name
            is_norm = 'Norm' in type(module).__name__
            if is_activation or is_norm:
                module.forward = partial(self.recomputed, module.forward, module=module)
            # named_modules() lists an MLP before its act_fn: run_gated_mlp gets the activation's own forward, not yet replaced
            elif gated in inspect.getsource(type(module).forward):
                module.forward = partial(self.run_gated_mlp, module, module.act_fn.forward)
        block.forward = partial(self.run_block, block.forward)

    def run_block(self, forward, *args, **options):
        """Run the block's own forward; if gradients are enabled, autograd saves Recipes in place of outputs that have one."""
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack_hook, self.unpack_hook):
                return forward(*args, **options)
        finally:
            # only pack_hook() looks them up, and it has put those that backward needs into the graph
            self.recipes.clear()

    def recomputed(self, function, *inputs, module=None, **options):
        """Return function(*inputs), and record a Recipe to recompute it in backward. module: has the function's parameters, if any."""
        # a Recipe detaches its inputs, which works for plain tensors only
        has_plain_inputs = not options and all(type(x) is torch.Tensor for x in inputs)
        if not has_plain_inputs or not torch.is_grad_enabled():
            return function(*inputs, **options)
        recipe = Recipe(function, inputs)
        parameters = module.parameters() if module else ()
        output = Recompute.apply(recipe, len(inputs), *inputs, *parameters)
        # pack_hook() finds the recipe by the output's address, which is not reused while the output is kept here
        self.recipes[output.data_ptr()] = output, recipe
        return output

    def run_gated_mlp(self, mlp, act, x):
        """Return down_proj(act(gate_proj(x)) * up_proj(x)), recomputing act(gate) * up in backward. act: mlp.act_fn's own forward."""
        gate = mlp.gate_proj(x)
        up = mlp.up_proj(x)
        product = self.recomputed(lambda gate, up: act(gate) * up, gate, up, module=mlp.act_fn)
        return mlp.down_proj(product)

    def pack_hook(self, tensor):
        """Return what autograd saves for a tensor: (recipe, shape) if it is a recipe's output, else the tensor or a copy."""
        if type(tensor) is not torch.Tensor:
            return tensor
        if tensor.data_ptr() in self.recipes:
            # the tensor starts where an output does: it is this output, perhaps in another shape, or a part of it
            output, recipe = self.recipes[tensor.data_ptr()]
            is_whole = tensor.numel() == output.numel() and tensor.dtype == output.dtype
            both_contiguous = tensor.is_contiguous() and output.is_contiguous()
            return (recipe, tensor.shape) if is_whole and both_contiguous else tensor
        # a small view, say of a fused query_key_value, would keep its whole base: save a copy. Weights (leaves) stay anyway
        is_view = tensor._base is not None and not tensor._base.is_leaf
        if is_view and tensor.untyped_storage().nbytes() >= 2 * tensor.nbytes:
            return tensor.data.clone()
        return tensor

    def unpack_hook(self, saved):
        """Return the tensor for which pack_hook() returned saved."""
        if isinstance(saved, torch.Tensor):
            return saved
        recipe, shape = saved
        return recipe.recompute().detach().view(shape)


def checkpointed(forward, *args, **options):
    """Return forward(*args, **options). With gradients enabled, backward computes its activations again instead of saving them."""
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, **options)


def checkpoint_activations(model, activation_checkpointing=False):
    """Turn on activation checkpointing, in place: for whole blocks (True), for cheap operations ('selective'), or not at all."""
    for block in blocks(model):
        if activation_checkpointing == 'selective':
            LeanBlock(block)
        elif activation_checkpointing:
            block.forward = partial(checkpointed, block.forward)
