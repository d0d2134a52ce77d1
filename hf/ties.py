"""Parameters with two names, such as a head that is the embedding: every copy of a model shares what the loaded one shares.

A config may say that two parameters are tied where the file has two tensors. So the loaded model decides, not the config."""

import torch

from model import core


def ties(model):
    """Return name -> earlier name of the same tensor, for every parameter that has two names, such as a tied head."""
    first_name = {}  # parameter -> name
    tied = {}
    # with remove_duplicate=False, a parameter comes once for each of its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        earlier = first_name.setdefault(parameter, name)
        if earlier != name:
            tied[name] = earlier
    return tied


def tie_as(model, wanted):
    """Tie the names in wanted, and no others, in place. wanted: as ties returns it. The config is made to say the same."""
    too_many = ties(model).keys() - wanted.keys()
    separate(model, too_many)
    for name, source in wanted.items():
        _put(model, name, model.get_parameter(source))
    describe_ties(model)


def separate(model, names=None):
    """Give these names a tensor of their own with the same values, in place. None: all names in ties(model)."""
    if names is None:
        names = ties(model)
    for name in names:
        shared = model.get_parameter(name)
        _put(model, name, torch.nn.Parameter(shared.detach().clone(), shared.requires_grad))


def _put(model, name, parameter):
    """Put a parameter into the place that has this name (a dotted path)."""
    owner, _, last = name.rpartition('.')
    setattr(model.get_submodule(owner), last, parameter)


def describe_ties(model):
    """Make the config of a model whose head is not its embedding say so: otherwise whoever loads the model later ties the two.

    Returns whether the config said otherwise."""
    inner = core(model)
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    # no head, or a tied one: the config may say what it likes
    if head is None or head.weight is embedding.weight:
        return False
    # a model of text and images has a second config for its text; else both are one object
    configs = [inner.config, inner.config.get_text_config()]
    wrong = [config for config in configs if getattr(config, 'tie_word_embeddings', False)]
    if not wrong:
        return False
    for config in wrong:
        config.tie_word_embeddings = False
    # transformers has noted the ties here when it made the model, and reads them when it saves it
    inner.all_tied_weights_keys = ties(inner)
    return True
