"""A model that fsdp.py has sharded by FSDP2, or replicated: which weights are gathered, and methods that gather them.

A replica that trains in bfloat16 has half_copies, HalfCopies (half.py), which are swapped in where FSDP gathers weights."""

import contextlib
import types

import torch
import torch.distributed as dist

from configurator import UserError


def add_method(model, function):
    """Make function(model, ...) a method of the model. It runs with the weights gathered, or the bfloat16 copies in, as forward does."""

    def method(model, *args, **options):
        if copies := getattr(model, 'half_copies', None):
            copies.swap_in()
        return function(model, *args, **options)

    setattr(model, function.__name__, types.MethodType(method, model))
    if fsdp_modules(model):
        dist.fsdp.register_fsdp_forward_method(model, function.__name__)


def reshard(model):
    """Free all gathered weights: model.parameters() are then this rank's shards again, as the optimizer needs them."""
    for module in fsdp_modules(model):
        # FSDP's own method, by the class: on the root, module.reshard is this function (see fsdp.shard)
        type(module).reshard(module)
    if copies := getattr(model, 'half_copies', None):
        copies.swap_out()


def abandon_backward(model):
    """Clean up after a backward that ended in an error. Otherwise later ones would give no gradients, or wrong ones."""
    if fsdp_modules(model):
        # FSDP does this at the end of every backward; the error has kept it from doing so
        model._get_fsdp_state()._root_post_backward_final_callback()


def check_trained(model, optimizer):
    """Raise UserError if an optimizer trains a parameter that the model lacks, or bfloat16 weights beside float32 ones."""
    model.reshard()
    trained = {p for group in optimizer.param_groups for p in group['params']}
    if trained - set(model.parameters()):  # nothing would average or save it
        advice = 'let the function that load_policy() takes add it to the model'
        raise UserError(f'the optimizer trains a parameter that the policy does not have: {advice}')
    # weights that were frozen when the model was loaded are bfloat16, too coarse to train
    dtypes = {p.dtype for p in trained}
    if torch.bfloat16 in dtypes and torch.float32 in dtypes:
        advice = 'freeze for a while after load_policy(), not in the function that it takes'
        raise UserError(f'the optimizer trains bfloat16 weights beside float32: {advice}')


def fsdp_modules(model):
    """Return the modules of a model that FSDP shards; an empty list for a model without FSDP."""
    return [module for module in model.modules() if hasattr(module, 'unshard')]


def be_root(model, unused):
    """Do nothing: as a method, by add_method(), its call makes the model FSDP's root or swaps copies in. FSDP wants an argument."""


@contextlib.contextmanager
def unsharded(model):
    """Within the block, keep all weights gathered: generation is several times faster, and ranks need not run in step."""
    modules = fsdp_modules(model)
    try:
        # FSDP takes the first module that runs as its root. Generation may start inside of PEFT's wrapper: run the wrapper first
        if modules or getattr(model, 'half_copies', None):
            model.be_root(None)
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        # again as fsdp.shard has set it: with stays_gathered (shard=grads) no forward frees weights, otherwise only those of blocks
        for module in modules:
            is_block = module is not model
            module.set_reshard_after_forward(is_block and not model.stays_gathered, recurse=False)
        reshard(model)


def local_shard(tensor):
    """Return this rank's shard of a DTensor. A plain tensor is returned as it is."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor
