"""LoRA adapters (arXiv 2106.09685) of a model, by PEFT and in PEFT's format: new ones, and ones that an earlier run has saved.

Adapters train beside linear layers, and the model itself stays frozen. Without its adapters the policy is the model before
training, so it is its own reference. Where a saved adapter goes on training, a frozen copy of it serves as the reference.
Without --lora_rank a saved adapter is merged into its model. A step with lora_dropout depends on the number of ranks."""

import contextlib
import hashlib
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from configurator import UserError
from hf import quantize
from hf.ties import describe_ties, separate
from model import blocks, core
from runtime import hub
from runtime.files import file_hash, say_once

COPY = 'reference'  # PEFT's name of the frozen copy of an adapter; the adapter that trains is called 'default'
CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'  # PEFT's names of an adapter's two files
BASE_HASH = 'base_model.sha256'  # our own third file: the hash of the model that the adapter was trained on
# options of adapter_config.json that must have one of these values; one that is missing counts as None
ALLOWED_VALUES = {
    'peft_type': ('LORA',),
    'task_type': (None, 'CAUSAL_LM', 'SEQ_CLS'),
    'init_lora_weights': (None, True, False, 'gaussian'),
}
# options that may have any value: PEFT obeys them, or they change nothing
ANY_VALUE = set('alpha_pattern auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode layers_pattern '
                'layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save peft_version qalora_group_size r '
                'rank_pattern target_modules use_rslora'.split())  # fmt: skip
# any other option turns on another kind of adapter, unless it has one of these values
OFF = (None, False, 'none', [], {})
WAY_OUT = 'name the whole model (of a run: the folder model beside it), or merge it with PEFT: merge_and_unload()'

# ---- saved adapters ----


class Saved(NamedTuple):
    """A saved adapter that can be used here."""

    name: str  # a folder, or a hub id
    folder: Path
    base: str  # the model that it belongs to: a folder, or a hub id
    options: dict  # its adapter_config.json
    rank: int
    scores: bool  # whether it makes a reward model of its base, not a language model


_found = {}  # name -> Saved or None; the export at the end of a run asks again, and the folder may be gone by then


def find(name):
    """Return the adapter in a folder or of a hub id as Saved, or None if there is none. Raises UserError if it cannot be used."""
    if os.path.exists(name) or name not in _found:
        file = hub.file_of(name, CONFIG)
        _found[name] = _read(name, Path(file)) if file else None
    return _found[name]


def adapter_and_base(name):
    """Return (the adapter of this name, the name of its base model), or (None, name) where name is a model itself."""
    saved = find(name)
    base = saved.base if saved else name
    return saved, base


def _read(name, file):
    """Return the Saved of an adapter. name: its folder or hub id; file: the path of its adapter_config.json.

    Raises UserError where the adapter is incomplete or of another kind, or where its base model is missing."""
    options = hub.read_dict(name, CONFIG)
    rank, alpha, base = (options.get(key) for key in ('r', 'lora_alpha', 'base_model_name_or_path'))
    has_rank = type(rank) is int and rank > 0
    has_alpha = type(alpha) in (int, float)
    has_base = type(base) is str and base != ''
    if not (has_rank and has_alpha and has_base):
        raise UserError(f'{CONFIG} of the adapter {name!r} does not say its r, its lora_alpha and its model: {WAY_OUT}')
    # other kinds of adapters compute something else, or have changed their base model before training
    unsupported = []
    with_missing = dict.fromkeys(ALLOWED_VALUES) | options
    for key, value in with_missing.items():
        allowed_values = ALLOWED_VALUES.get(key, OFF)
        if key not in ANY_VALUE and value not in allowed_values:
            unsupported.append(f'{key}={value!r}'[:100])
    if unsupported:
        raise UserError(f'the adapter {name!r} has {", ".join(unsupported)}, which is not supported here: {WAY_OUT}')
    if hub.file_of(name, WEIGHTS) is None:
        raise UserError(f'the adapter {name!r} has no {WEIGHTS}: save it as safetensors')

    # a path of the base model counts from the working directory, as for PEFT, or else from the adapter's folder
    from_adapter = os.path.normpath(file.parent / base)
    if not os.path.exists(base) and os.path.exists(from_adapter):
        base = from_adapter
    try:
        hub.check_there(base)
    except UserError as error:
        raise UserError(f'the model of the adapter {name!r} is missing: {error}') from None
    return Saved(name, file.parent, base, options, rank, scores=options.get('task_type') == 'SEQ_CLS')


def weights_hash(folder):
    """Return a hash of a folder's weights and config, with those of an adapter's base model. None: folder is no folder here."""
    if not folder or not os.path.isdir(folder):
        return None
    files = [file for pattern in ('*.safetensors', 'config.json', CONFIG) for file in Path(folder).glob(pattern)]
    hashes = [file_hash(file) for file in sorted(files)]
    saved, base = adapter_and_base(folder)
    if saved:
        # None, and so left out, for a base on the hub
        hashes.append(weights_hash(base) or '')
    return hashlib.sha256(bytes.fromhex(''.join(hashes))).hexdigest()[:16]


def _load_weights(model, saved, adapter_name='default'):
    """Load a saved adapter into the adapter of this name of a PeftModel. Raises UserError where its weights do not fit.

    A warning says where the base model is not the one that the adapter was trained on: wherever shapes agree, it loads."""
    import peft

    weights = load_file(hub.file_of(saved.name, WEIGHTS))
    result = peft.set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
    # PEFT counts the base model's weights as missing, too: those of this adapter have its name in their path
    missing = [key for key in result.missing_keys if f'.{adapter_name}.' in key]
    for problem, keys in ('lacks', missing), ('has, without a place in its model,', result.unexpected_keys):
        if keys:
            raise UserError(f'the adapter {saved.name!r} {problem} weights: {", ".join(sorted(keys)[:3])}')
    # the hash is checked once, not for the frozen copy again; adapters of other programs come without one
    hash_file = saved.folder / BASE_HASH
    if adapter_name == 'default' and hash_file.exists() and hash_file.read_text() != weights_hash(saved.base):
        other = f'is not the model that the adapter {saved.name} was trained on'
        say_once(f'warning: {saved.base} {other}: its weights differ')


def _merge_saved(model, saved, empty):
    """Return the model with a saved adapter merged into its weights, which all train. empty: it has no weights to change yet."""
    say_once(f'adapter: {saved.name}, rank {saved.rank}, is merged into its model {saved.base}')
    if empty:
        return model
    settings = _settings(model, saved)
    # a reward model may begin from the adapter of a language model, which is made for another task
    settings.task_type = None
    wrapped = _peft_model(model, settings, seed=0)
    # where head and embedding are one tensor, an adapter on one of them must not change the other
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(hasattr(layer, 'lora_A') or hasattr(layer, 'modules_to_save') for layer in ends):
        separate(wrapped)
    _load_weights(wrapped, saved)
    # PEFT warns that head and embedding are two tensors now: that is meant, and describe_ties tells the config
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = wrapped.merge_and_unload()
    describe_ties(model)
    return model.requires_grad_(True)


def _peft_model(model, settings, seed, with_copy=False):
    """Return a PeftModel in eval mode, whose adapter trains and is drawn from seed. with_copy: with a second, frozen one, COPY.

    settings: a peft.LoraConfig, which is changed."""
    import peft

    # a saved LoraConfig says that its adapter is for inference, and PEFT would freeze it
    settings.inference_mode = False
    # PEFT calls a function that transformers has renamed, and warns of it
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*gradient_checkpointing. is deprecated')
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, settings)
        if with_copy:
            model.add_adapter(COPY, settings)
            model.set_adapter('default')  # only the active adapter trains
    return model.eval()


# ---- adapters that train ----


def options(config):
    """Return the adapters that a script's options ask for: None without lora_rank, else a dict for load_model.

    The dict has rank, alpha, dropout, targets and quantize. Where a saved adapter goes on, its alpha is put into config.
    Raises UserError where options do not go together."""
    quantize.check(config)
    if config['lora_rank'] is None:
        config.ignored(['lora_alpha', 'lora_dropout', 'lora_targets'], 'there is no --lora_rank')
        return None
    # a saved adapter goes on with the rank, alpha and layers that it has
    saved = find(config['model'])
    if saved and config['lora_rank'] != saved.rank:
        ways = f'--lora_rank={saved.rank} goes on with it, and without --lora_rank it is merged and all weights train'
        raise UserError(f'the adapter {saved.name!r} has rank {saved.rank}: {ways}; for a new adapter {WAY_OUT}')
    if saved:
        config.ignored(['lora_alpha', 'lora_targets'], f'the adapter {saved.name!r} goes on with its own')
        config['lora_alpha'] = float(saved.options['lora_alpha'])
    adapters = {name: config[f'lora_{name}'] for name in ('rank', 'alpha', 'dropout', 'targets')}
    adapters['quantize'] = config['quantize']
    return adapters


def of_reference(config, adapters):
    """Return the adapters to load the reference with: None for a plain model, or the policy's.

    The policy's are needed where it begins from more than a plain model: weights of 4 bits, or a saved adapter. Adapters_off
    then makes of both models what the policy began from."""
    begins_plain = not config['quantize'] and not find(config['model'])
    if begins_plain or config['ref_model'] is not None:
        return None
    return adapters


def adapt(model, saved, adapters, *, seed=0, empty=False, **_others):
    """Return a model in eval mode, with its adapters: the last step of loading. Raises UserError where they do not fit.

    saved: the Saved that load_model was asked for, or None; adapters: what options returned; empty: the model has no weights.
    Without adapters a saved one is merged. With adapters a PeftModel is returned, in which the saved one or new ones train,
    and the head of a reward model: x -> layer(x) + alpha / rank * B A x, where B begins as 0 and A is drawn from seed."""
    model.eval()
    if not adapters:
        return _merge_saved(model, saved, empty) if saved else model
    dropout = adapters['dropout']
    scores = hasattr(model, 'score')
    settings = _settings(model, saved, adapters)
    settings.lora_dropout = dropout
    settings.task_type = 'SEQ_CLS' if scores else 'CAUSAL_LM'
    # a frozen copy of a saved adapter becomes the reference; reward models train without one
    with_copy = saved is not None and not scores
    model = _peft_model(model, settings, seed, with_copy)
    if saved:
        _check_can_go_on(core(model), saved)
        if not empty:
            for adapter_name in model.peft_config:
                _load_weights(model, saved, adapter_name)
        reference = ', and the reference is what it is now' if with_copy else ''
        say_once(f'adapter: {saved.name}, rank {saved.rank}, goes on in its model {saved.base}{reference}')

    def drop(x):
        """Dropout in training only, where a graph is recorded: the model itself stays in eval mode."""
        return F.dropout(x, dropout, training=torch.is_grad_enabled())

    if dropout:
        for path, module in model.named_modules():
            if path.endswith('lora_dropout.default'):
                module.forward = drop
    return quantize.quantize(model) if adapters.get('quantize') else model


def _settings(model, saved, adapters=None):
    """Return the peft.LoraConfig of a saved adapter or, where saved is None, of new adapters in the model's blocks.

    adapters: rank, alpha, and targets, which are names of linear layers such as 'q_proj v_proj', or None for all. Raises
    UserError where a target is no such layer."""
    import peft

    if saved:
        return peft.LoraConfig.from_pretrained(str(saved.folder))
    # a target is the last part of a layer's path, such as q_proj of model.layers.0.self_attn.q_proj
    linear = {m for block in blocks(model) for m in block.modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    last_part = {path: path.rpartition('.')[2] for path, _ in model.named_modules()}
    known = sorted({last_part[path] for path, module in model.named_modules() if module in linear})
    targets, wanted = adapters['targets'], known
    if targets is not None:
        wanted = targets.replace(',', ' ').split()
    if not wanted or set(wanted) - set(known):
        there = f'the linear layers in the blocks of {type(model).__name__} are {" ".join(known) or "none"}'
        raise UserError(f'cannot put adapters on {targets or "any layer"!r}: {there}')
    # PEFT looks at names alone, so layers outside the blocks that share a name are excluded by their paths
    outside = [path for path, module in model.named_modules() if last_part[path] in wanted and module not in linear]
    return peft.LoraConfig(
        r=adapters['rank'],
        lora_alpha=adapters['alpha'],
        target_modules=wanted,
        exclude_modules=outside or None,
        # the head of a reward model is new, and trains as a whole
        modules_to_save=['score'] if hasattr(model, 'score') else None,
        # GPT-2's linear layers (Conv1D) have their weights transposed
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear),
    )


def _check_can_go_on(model, saved):
    """Raise UserError where a saved adapter can be merged, but cannot go on training. model: the one inside the PeftModel.

    Outside the blocks it may change nothing but the head of a reward model, and a reward model needs the adapter's head."""
    inside = {module for block in blocks(model) for module in block.modules()}
    # an adapter on the head would have no effect: model.hidden_and_head reads the head's weight without calling the layer
    outside = [path for path, module in model.named_modules() if hasattr(module, 'lora_A') and module not in inside]
    # modules that train as a whole; PEFT adds these two names for the head of every reward model
    outside += sorted(set(saved.options.get('modules_to_save') or ()) - {'classifier', 'score'})
    problem = f'changes {outside[0]}, outside the blocks' if outside else None
    # the other way round, a reward model's adapter for a language model, load_model has refused before
    if hasattr(model, 'score') and not saved.scores:
        problem = 'is of a language model, and a reward model has another head'
    if problem:
        raise UserError(f'the adapter {saved.name!r} {problem}: leave out --lora_rank, which merges it')


def present(model):
    """Return whether the model has adapters, which makes it a PeftModel."""
    return core(model) is not model


@contextlib.contextmanager
def adapters_off(model):
    """For a while, let a model compute bit by bit what it computed before training: without adapters, or with the frozen COPY.

    A model without adapters stays as it is; None is taken, too."""
    layers = [module for module in model.modules() if hasattr(module, 'lora_A')] if model else []
    # set by hand: PEFT's own contexts also switch requires_grad, and under FSDP on gathered copies of the parameters
    for layer in layers:
        has_copy = COPY in layer.lora_A
        layer._disable_adapters = not has_copy
        layer._active_adapter = [COPY]
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters, layer._active_adapter = False, ['default']


def write(model, weights, folder):
    """Load trained weights (name -> tensor) into a freshly made PeftModel, and write its adapter into a folder."""
    # strict=False: the frozen weights are not among the trained ones
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=['default'])
    (folder / 'README.md').unlink()  # a form by PEFT, with nothing filled in
    # with it, _load_weights notices when the base model has changed; a base on the hub has no hash
    base_hash = weights_hash(model.peft_config['default'].base_model_name_or_path)
    if base_hash is not None:
        (folder / BASE_HASH).write_text(base_hash)


def merged(model):
    """Merge the adapter of a PeftModel into its weights, in place, and return the transformers model inside."""
    return quantize.dequantize(model).merge_and_unload()


def describe(model):
    """Return one line for the screen: how many weights of a PeftModel train, of how many, and in which layers."""
    trained, total = model.get_nb_trainable_parameters()
    # weights of 4 bits are no parameters: PEFT has not counted them
    total += quantize.packed_weights(model)
    layers = sorted({path.rpartition('.')[2] for path, module in model.named_modules() if hasattr(module, 'lora_A')})
    return f'LoRA: {trained:,} of {total:,} weights train, on {" ".join(layers)}'
