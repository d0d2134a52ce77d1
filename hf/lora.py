"""LoRA (arXiv 2106.09685): adapters of low rank beside a model's linear layers. They train, the model stays as it is.

So the policy without its adapters is the model before training, its own reference: a second one is not loaded. A saved adapter that
goes on is not the model alone: a frozen copy of it lies beside it in every layer, and that is the reference. PEFT makes the adapters,
and is imported where they are wanted. Dropout is off everywhere else; lora_dropout acts inside the adapters, in forwards that record
a graph, and then a step is no longer the same on another number of ranks or microbatches."""

import contextlib

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from configurator import UserError
from hf import adapter, quantize
from model import blocks, core
from runtime.files import say_once

COPY = 'reference'  # PEFT's name for the frozen copy; the adapter that trains is 'default'


def options(config):
    """What load_model's adapters= takes, from a script's lora_ options; None where lora_rank is None. Raises UserError."""
    quantize.check(config)
    if config['lora_rank'] is None:
        config.ignored(['lora_alpha', 'lora_dropout', 'lora_targets'], 'there is no --lora_rank')
        return None
    saved = adapter.find(config['model'])
    if saved:
        # it goes on with the rank, alpha and layers that it has
        if config['lora_rank'] != saved.rank:
            ways = (
                f'--lora_rank={saved.rank} goes on with it, and without --lora_rank it is merged and all weights train'
            )
            has = f'the adapter {saved.name!r} has rank {saved.rank}'
            raise UserError(f'{has}: {ways}; for a new adapter {saved.way_out}')
        config.ignored(['lora_alpha', 'lora_targets'], f'the adapter {saved.name!r} goes on with its own')
        config['lora_alpha'] = float(saved.options['lora_alpha'])
    names = ('rank', 'alpha', 'dropout', 'targets')
    return {name: config[f'lora_{name}'] for name in names} | {'quantize': config['quantize']}


def of_reference(config, adapters):
    """What load_model's adapters= takes for the reference: what the policy has, where that is not the model as it is."""
    differs = config['quantize'] or adapter.find(config['model'])
    return adapters if differs and config['ref_model'] is None else None


def add(model, *, rank, alpha, dropout, targets, seed, fully_trained=()):
    """Put new adapters into the blocks of a model: a PeftModel whose other weights are frozen. Raises UserError.

    rank, alpha: x -> layer(x) + alpha / rank * B A x, where B begins as 0 and A is drawn from seed; targets: names of linear
    layers, such as 'q_proj v_proj', or None for all; fully_trained: names of modules outside the blocks that train without adapters."""
    peft = adapter.peft()
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
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=wanted, **more)
    return _wrap(model, settings, dropout, seed)


def go_on(model, saved, *, dropout, seed, empty=False):
    """Put a saved adapter into a model, where it trains, as add does with a new one; of a language model also its frozen copy.

    empty: the model has no weights. Raises UserError where the adapter does not fit, or changes what is outside the blocks."""
    settings, inner = adapter.settings(saved), model
    scores = hasattr(model, 'score')
    model = _wrap(model, settings, dropout, seed, copy=None if scores else COPY)

    # the head of a reward model trains whole; the packed forward asks for no adapter on any other head
    inside = {m for block in blocks(inner) for m in block.modules()}
    outside = [path for path, m in inner.named_modules() if hasattr(m, 'lora_A') and m not in inside]
    outside += sorted(set(settings.modules_to_save or ()) - {'classifier', 'score'})
    wrong = f'changes {outside[0]}, outside the blocks' if outside else None
    if scores != saved.scores:
        wrong = 'is of a language model, and a reward model has another head'
    if wrong:
        raise UserError(f'the adapter {saved.name!r} {wrong}: leave out --lora_rank, which merges it')

    # twice the same weights, of which one does not train
    for name in () if empty else model.peft_config:
        adapter.fill(model, saved, name)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and f'.{COPY}.' not in name)
    reference = '' if scores else ', and the reference is what it is now'
    say_once(f'adapter: {saved.name}, rank {saved.rank}, goes on in its model {saved.base}{reference}')
    return model


def _wrap(model, settings, dropout, seed, copy=None):
    """A PeftModel with these settings: adapter.wrap, and dropout inside the adapters."""
    settings.lora_dropout = dropout
    generates = hasattr(model, 'prepare_inputs_for_generation')
    settings.task_type = 'CAUSAL_LM' if generates else 'SEQ_CLS'
    model = adapter.wrap(model, settings, seed, copy)
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
    """The model as it was before training, bit by bit, for a while: without adapters, or with the copy of one that goes on.

    A model without adapters, or None, stays what it is."""
    modules = [] if model is None else model.modules()
    layers = [m for m in modules if hasattr(m, 'lora_A')]
    # PEFT's own contexts also turn requires_grad off and on, in whichever copy FSDP shows just then
    for m in layers:
        m._disable_adapters, m._active_adapter = COPY not in m.lora_A, [COPY]
    try:
        yield
    finally:
        for m in layers:
            m._disable_adapters, m._active_adapter = False, ['default']


def merge(model, weights, folder):
    """Put trained weights (name -> tensor) into a freshly made PeftModel and write it as an adapter folder.

    PeftModel.from_pretrained takes the folder. Returns the transformers model that has the adapters added to its weights."""
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=['default'])
    return quantize.dequantize(model).merge_and_unload()


def describe(model):
    """One line for the screen: how many weights train, in which layers."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    every = sum(p.numel() for name, p in model.named_parameters() if f'.{COPY}.' not in name)
    packed = quantize.packed_weights(model)
    layers = sorted({n.rpartition('.')[2] for n, m in core(model).named_modules() if hasattr(m, 'lora_A')})
    # what trains without adapters, such as a reward model's head
    others = [name.removeprefix('base_model.model.') for name in trained if '.lora_' not in name]
    fully_trained = sorted({name.partition('.')[0] for name in others})
    also = f', and {" ".join(fully_trained)} whole' if fully_trained else ''
    in_4bit = f'; {packed:,} that do not are in 4 bits' if packed else ''
    return f'LoRA: {sum(trained.values()):,} of {every + packed:,} weights train, on {" ".join(layers)}{also}{in_4bit}'
