"""LoRA (arXiv 2106.09685): adapters of low rank beside a model's linear layers. They train, the model stays as it is.

So the policy without its adapters is the model before training, its own reference: a second one is not loaded. PEFT makes the
adapters, and is imported where they are wanted. Dropout is off everywhere else; lora_dropout acts inside the adapters, in
forwards that record a graph, and then a step is no longer the same on another number of ranks or microbatches."""

import contextlib
import warnings

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from configurator import UserError
from model import blocks, core


def options(config):
    """What load_model's adapters= takes, from a script's lora_ options; None where lora_rank is None."""
    if config['lora_rank'] is None:
        config.ignored(['lora_alpha', 'lora_dropout', 'lora_targets'], 'there is no --lora_rank')
        return None
    return {name: config[f'lora_{name}'] for name in ('rank', 'alpha', 'dropout', 'targets')}


def add(model, *, rank, alpha, dropout, targets, seed, fully_trained=()):
    """Put adapters into the blocks of a model: a PeftModel whose other weights are frozen. Raises UserError.

    rank, alpha: x -> layer(x) + alpha / rank * B A x, where B begins as 0 and A is drawn from seed; targets: names of linear
    layers, such as 'q_proj v_proj', or None for all; fully_trained: names of modules outside the blocks that train without adapters."""
    try:
        import peft
    except ImportError:
        raise UserError('--lora_rank needs peft: pip install peft, or leave it out to train all weights') from None
    # linear layers in the blocks, by the last part of their paths
    inside = {m for block in blocks(model) for m in block.modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    last_names = {path: path.rpartition('.')[2] for path, _ in model.named_modules()}
    known = sorted({last_names[path] for path, m in model.named_modules() if m in inside})
    wanted = known
    if targets is not None:
        wanted = targets.replace(',', ' ').split()
    if not wanted or not set(wanted) <= set(known):
        there = f'the linear layers in the blocks of {type(model).__name__} are {" ".join(known) or "none"}'
        raise UserError(f'cannot put adapters on {targets or "any layer"!r}: {there}')
    # what has such a name outside the blocks gets no adapter
    outside = [path for path, m in model.named_modules() if last_names[path] in wanted and m not in inside]

    more = {'exclude_modules': outside or None, 'modules_to_save': list(fully_trained) or None}
    more['fan_in_fan_out'] = any(isinstance(m, Conv1D) for m in inside)  # GPT-2's layers have their weights transposed
    generates = hasattr(model, 'prepare_inputs_for_generation')
    more['task_type'] = 'CAUSAL_LM' if generates else 'SEQ_CLS'
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted, **more)
    # PEFT calls what transformers has renamed, and warns of it
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, settings).eval()
    # the model stays in eval mode: dropout is on where a graph is recorded
    for name, module in model.named_modules():
        if name.endswith('lora_dropout.default') and dropout:
            module.forward = lambda x: F.dropout(x, dropout, training=torch.is_grad_enabled())
    return model


def present(model):
    """Whether the model has adapters."""
    return core(model) is not model


@contextlib.contextmanager
def adapters_off(model):
    """The model as it was before training, bit by bit, for a while. A model without adapters, or None, stays what it is."""
    modules = [] if model is None else model.modules()
    layers = [m for m in modules if hasattr(m, 'lora_A')]
    # PEFT's own context also turns requires_grad off and on, in whichever copy FSDP shows just then
    for m in layers:
        m._disable_adapters = True
    try:
        yield
    finally:
        for m in layers:
            m._disable_adapters = False


def merge(model, weights, folder):
    """Put trained weights (name -> tensor) into a freshly made PeftModel and write it as an adapter folder.

    PeftModel.from_pretrained takes the folder. Returns the transformers model that has the adapters added to its weights."""
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.merge_and_unload()


def describe(model):
    """One line for the screen: how many weights train, in which layers."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    every = sum(p.numel() for p in model.parameters())
    layers = sorted({n.rpartition('.')[2] for n, m in core(model).named_modules() if hasattr(m, 'lora_A')})
    # what trains without adapters, such as a reward model's head
    others = [name.removeprefix('base_model.model.') for name in trained if '.lora_' not in name]
    fully_trained = sorted({name.partition('.')[0] for name in others})
    also = f', and {" ".join(fully_trained)} whole' if fully_trained else ''
    return f'LoRA: {sum(trained.values()):,} of {every:,} weights train, on {" ".join(layers)}{also}'
