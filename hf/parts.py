"""The parts of a transformers model: the model inside PEFT's wrapper, its trunk, its blocks, and what its config says of its head."""


def core(model):
    """Return the transformers model inside a PEFT wrapper, or the model itself if it has no wrapper."""
    return model.get_base_model() if hasattr(model, 'get_base_model') else model


def blocks(model):
    """Return the list of a model's transformer blocks, in order: modules of the classes declared in _no_split_modules."""
    class_names = set()  # any submodule may declare classes, such as a critic with blocks of its own
    for module in core(model).modules():
        class_names.update(getattr(module, '_no_split_modules', None) or ())
    block_at = {}  # path in the model -> block
    for path, module in core(model).named_modules():
        # no blocks inside blocks: Mamba declares a block and also a part of it. named_modules lists the outer one first
        is_inside_block = any(path.startswith(f'{block_path}.') for block_path in block_at)
        if type(module).__name__ in class_names and not is_inside_block:
            block_at[path] = module
    return list(block_at.values())


def trunk(model):
    """Return the model without its head."""
    inner = core(model)
    # Llama 4 declares a wrong name for its trunk, so its base_model is the whole model
    return inner.model if inner.base_model is inner else inner.base_model


def scale_and_cap(config):
    """Return (factor of the head's output, soft cap of the logits or None), read from a model's config."""
    factor = getattr(config, 'logit_scale', None) or 1.0  # Cohere multiplies, Granite divides
    factor *= getattr(config, 'lm_head_multiplier', None) or 1.0  # Falcon-H1
    divisor = getattr(config, 'logits_scaling', None) or 1.0
    # Gemma 2 and RecurrentGemma name the soft cap differently
    cap = getattr(config, 'final_logit_softcapping', None) or getattr(config, 'logits_soft_cap', None)
    return factor / divisor, cap
