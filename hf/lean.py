"""Lean activations: norms and the elementwise middle of an MLP are computed again in backward, not kept for it.

Matrix products and attention are kept. Model files stay as they are: the blocks' norms and activations are found by name and
structure, and whatever a layer behind them would keep of their output is made again. torch's own selective checkpointing goes
through every operation, which costs three times as much."""

import inspect
from functools import partial

import torch

from model import blocks

# as transformers writes the MLP of Llama and a hundred others
GATED = 'self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))'


class Recipe:
    """How an output is made again: function(*inputs), whose graph is kept until its gradient has been taken."""

    def __init__(self, function, inputs):
        self.function, self.output = function, None
        self.inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        self.versions = [x._version for x in self.inputs]

    def again(self):
        """The output, with a graph of its own that begins at self.inputs."""
        if self.output is None:
            if self.versions != [x._version for x in self.inputs]:
                raise RuntimeError('this model changes its activations in place: leave out selective checkpointing')
            with torch.enable_grad():
                self.output = self.function(*self.inputs)
        return self.output


class Again(torch.autograd.Function):
    """The output of a Recipe. Nothing between its inputs and its output is kept."""

    @staticmethod
    def forward(ctx, recipe, n_inputs, *tensors):
        """tensors: the inputs, then the parameters that the function reads by itself."""
        ctx.recipe, ctx.parameters = recipe, tensors[n_inputs:]
        return recipe.function(*tensors[:n_inputs])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """The gradients of all tensors."""
        recipe, output = ctx.recipe, ctx.recipe.again()
        recipe.output = None
        sources = [*recipe.inputs, *ctx.parameters]
        found = iter(torch.autograd.grad(output, [x for x in sources if x.requires_grad], grad))
        return None, None, *(next(found) if x.requires_grad else None for x in sources)


class Lean:
    """What one block makes again."""

    def __init__(self, block):
        self.recipes = {}  # address -> (output, Recipe), while the block's forward runs
        for name, module in block.named_modules():
            last = name.rpartition('.')[2]
            is_activation = last.startswith('act') and 'drop' not in last
            # a gated MLP comes before the activation inside it, which is then taken as it is
            if is_activation or 'Norm' in type(module).__name__:
                module.forward = partial(self.call, module.forward, module)
            elif GATED in inspect.getsource(type(module).forward):
                module.forward = partial(self.gated, module, module.act_fn.forward)
        block.forward = partial(self.run, block.forward)

    def run(self, forward, *args, **options):
        """The block's forward."""
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                return forward(*args, **options)
        finally:
            self.recipes.clear()

    def call(self, function, module, *inputs, **options):
        """function(*inputs), to be made again. module: whose parameters it reads."""
        plain = not options and all(type(x) is torch.Tensor for x in inputs)
        if not plain or not torch.is_grad_enabled():
            return function(*inputs, **options)
        recipe = Recipe(function, inputs)
        output = Again.apply(recipe, len(inputs), *inputs, *module.parameters())
        # while the output is held, nothing else gets its address
        self.recipes[output.data_ptr()] = output, recipe
        return output

    def gated(self, mlp, act, x):
        """The MLP of GATED."""
        product = self.call(lambda gate, up: act(gate) * up, mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x))
        return mlp.down_proj(product)

    def pack(self, tensor):
        """What is kept of a tensor for backward: itself, or (how it is made again, its shape)."""
        known = type(tensor) is torch.Tensor and self.recipes.get(tensor.data_ptr())
        if not known:
            return tensor
        output, recipe = known
        same = tensor.numel() == output.numel() and tensor.dtype == output.dtype
        exact = same and tensor.is_contiguous() and output.is_contiguous()
        return (recipe, tensor.shape) if exact else tensor

    def unpack(self, kept):
        """The tensor that pack was given."""
        if isinstance(kept, torch.Tensor):
            return kept
        recipe, shape = kept
        return recipe.again().detach().view(shape)


def enable(model):
    """Let the blocks of a model make their cheap activations again in backward."""
    for block in blocks(model):
        Lean(block)
