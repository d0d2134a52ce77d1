"""Tied parameters, such as an LM head that is the embedding. The loaded model says what is tied; its config may be wrong."""

import torch

from hf.parts import core


def ties(model):
    """Return name -> first name of the same tensor, for every tied parameter: {'lm_head.weight': 'model.embed_tokens.weight'}."""
    first_names = {}  # parameter -> name
    tied = {}
    # with remove_duplicate=False, a tied parameter is listed under each of its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first_name = first_names.setdefault(parameter, name)
        if first_name != name:
            tied[name] = first_name
    return tied


def tie_as(model, wanted):
    """Tie the parameters in wanted (a dict as from ties()) and untie all others, in place. Updates the config, too."""
    unwanted = ties(model).keys() - wanted.keys()
    separate(model, unwanted)
    for name, first_name in wanted.items():
        _set_parameter(model, name, model.get_parameter(first_name))
    correct_tie_config(model)


def separate(model, names):
    """Untie the parameters of these names, in place: each gets its own copy of the tensor."""
    for name in names:
        shared = model.get_parameter(name)
        _set_parameter(model, name, torch.nn.Parameter(shared.detach().clone(), shared.requires_grad))


def _set_parameter(model, name, parameter):
    """Set the parameter with this dotted name."""
    owner, _, attribute = name.rpartition('.')
    setattr(model.get_submodule(owner), attribute, parameter)


def correct_tie_config(model):
    """Correct a config that ties head and embedding where the model does not. Returns whether it did."""
    inner = core(model)
    head = inner.get_output_embeddings()
    embedding = inner.get_input_embeddings()
    if head is None or head.weight is embedding.weight:
        return False
    # multimodal models have a second config for text; otherwise both are the same object
    configs = [inner.config, inner.config.get_text_config()]
    wrong = [config for config in configs if getattr(config, 'tie_word_embeddings', False)]
    for config in wrong:
        config.tie_word_embeddings = False
        # transformers' own record of ties, made when the model was created
        inner.all_tied_weights_keys = ties(inner)
    return bool(wrong)
