"""A model that fsdp.py has sharded by FSDP2, or replicated: which weights are gathered, and methods that gather them.

A replica that trains in bfloat16 gathers nothing: where FSDP gathers weights, it swaps its bfloat16 copies in (half.py)."""

import contextlib
import types

import torch
import torch.distributed as dist

from configurator import UserError


def add_method(model, function):
    """Make function(model, ...) a method of the model. FSDP gathers the root module's parameters for it, as it does for forward."""

    def with_copies(model, *args, **options):
        model.half_copies.swap_in()
        return function(model, *args, **options)

    setattr(model, function.__name__, types.MethodType(with_copies if half_copies(model) else function, model))
    if model in fsdp_modules(model):
        dist.fsdp.register_fsdp_forward_method(model, function.__name__)


def reshard(model):
    """Free all gathered weights: model.parameters() are then this rank's shards again, as the optimizer needs them."""
    for module in fsdp_modules(model):
        # not module.reshard: fsdp.shard has made this function a method of the root, which would call itself
        type(module).reshard(module)
    if copies := half_copies(model):
        copies.swap_out()


def abandon_backward(model):
    """Clear what a backward that ended in an error leaves behind. Otherwise later ones would give no gradients, or wrong ones."""
    if fsdp_modules(model):
        # what FSDP runs at the end of a backward, and otherwise would not run again: it takes the broken one for unfinished
        model._get_fsdp_state()._root_post_backward_final_callback()


def check_trained(model, optimizer):
    """Raise UserError where an optimizer trains what is no parameter of the model, neither averaged nor saved, or a weight in bfloat16."""
    model.reshard()
    own = set(map(id, model.parameters()))
    trained = [p for group in optimizer.param_groups for p in group['params']]
    if not own.issuperset(map(id, trained)):
        advice = 'let the function that load_policy() takes add it to the model'
        raise UserError(f'the optimizer trains a parameter that the policy does not have: {advice}')
    if {p.dtype for p in trained} >= {torch.bfloat16, torch.float32}:
        advice = 'freeze for a while after load_policy(), not in the function that it takes'
        raise UserError('the optimizer trains bfloat16 weights beside float32: ' + advice)


def fsdp_modules(model):
    """Return the modules of a model that FSDP shards; an empty list for a model without FSDP."""
    return [m for m in model.modules() if hasattr(m, 'unshard')]


def half_copies(model):
    """Return the HalfCopies of a replica that trains in bfloat16, or None."""
    return getattr(model, 'half_copies', None)


def be_root(model, unused):
    """Do nothing. As a method of model, it makes model FSDP's root, or swaps bfloat16 copies in.

    unused: torch 2.11's FSDP on CUDA wants an argument."""


@contextlib.contextmanager
def unsharded(model):
    """Within the block, keep all weights gathered: generation is several times faster, and ranks need not run in step."""
    modules = fsdp_modules(model)
    try:
        # FSDP takes the first module that runs as its root: run the model, as generation may start inside of PEFT's
        if modules or half_copies(model):
            model.be_root(None)
        for m in modules:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        yield
    finally:
        # as fsdp.shard has set it: a forward reshards the blocks, unless they stay gathered, but never the root
        for m in modules:
            is_resharded = m is not model and not model.stays_gathered
            m.set_reshard_after_forward(is_resharded, recurse=False)
        reshard(model)


def local(tensor):
    """Return this rank's shard of a DTensor. A plain tensor is returned as it is."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor
