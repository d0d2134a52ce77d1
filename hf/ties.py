"""Tied parameters, such as an LM head that is the embedding. The loaded model says what is tied; its config may be wrong."""

import torch

from model import core


def ties(model):
    """Return name -> earlier name of the same tensor, for every tied parameter."""
    first_name = {}  # parameter -> name
    tied = {}
    # with remove_duplicate=False, a tied parameter is listed under each of its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        earlier = first_name.setdefault(parameter, name)
        if earlier != name:
            tied[name] = earlier
    return tied


def tie_as(model, wanted):
    """Tie the parameters in wanted (name -> earlier name) and untie all others, in place. Updates the config, too."""
    separate(model, ties(model).keys() - wanted.keys())
    for name, source in wanted.items():
        _put(model, name, model.get_parameter(source))
    correct_tie_config(model)


def separate(model, names=None):
    """Untie these parameters, in place: each gets its own copy of the tensor. None: all tied parameters."""
    for name in ties(model) if names is None else names:
        shared = model.get_parameter(name)
        _put(model, name, torch.nn.Parameter(shared.detach().clone(), shared.requires_grad))


def _put(model, name, parameter):
    """Set the parameter with this dotted name."""
    owner, _, attribute = name.rpartition('.')
    setattr(model.get_submodule(owner), attribute, parameter)


def correct_tie_config(model):
    """If head and embedding are separate but the config says tied, set it to untied. Returns whether the config was changed.

    Otherwise loading the saved model would tie them."""
    inner = core(model)
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    if head is None or head.weight is embedding.weight:
        return False
    # multimodal models have a second config for text; otherwise both are the same object
    configs = [inner.config, inner.config.get_text_config()]
    wrong = [config for config in configs if getattr(config, 'tie_word_embeddings', False)]
    if not wrong:
        return False
    for config in wrong:
        config.tie_word_embeddings = False
    # transformers' own record of ties, made when the model was created
    inner.all_tied_weights_keys = ties(inner)
    return True
