"""Parameters with two names, such as a head that is the embedding: every copy of a model shares what the loaded one shares.

A config may say that they are tied where the file has two tensors, so what was loaded decides, not the config."""

import torch

from model import core


def ties(model):
    """Parameters with two names: {name: the earlier name of the same tensor}, such as a head that is the embedding."""
    first, found = {}, {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first.setdefault(p, name) != name:
            found[name] = first[p]
    return found


def tie_as(model, wanted):
    """Make the names in wanted (as ties returns them), and no others, share a tensor, in place; the config then says so."""
    separate(model, ties(model).keys() - wanted.keys())
    for name, source in wanted.items():
        _put(model, name, model.get_parameter(source))
    describe_ties(model)


def separate(model, names=None):
    """Give these names of ties, or all, a tensor of their own, with the same values, in place."""
    for name in ties(model) if names is None else names:
        shared = model.get_parameter(name)
        _put(model, name, torch.nn.Parameter(shared.detach().clone(), shared.requires_grad))


def _put(model, name, parameter):
    owner, _, last = name.rpartition('.')
    setattr(model.get_submodule(owner), last, parameter)


def describe_ties(model):
    """Have the config of a model whose head is not its embedding say so: what reads it later would tie the two.

    Returns whether it said otherwise."""
    inner = core(model)
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    configs = {id(c): c for c in (inner.config, inner.config.get_text_config())}.values()
    wrong = [c for c in configs if getattr(c, 'tie_word_embeddings', False)]
    if head is None or head.weight is embedding.weight or not wrong:
        return False
    for c in wrong:
        c.tie_word_embeddings = False
    # what transformers noted when it made the model, and reads when it saves it
    inner.all_tied_weights_keys = ties(inner)
    return True
