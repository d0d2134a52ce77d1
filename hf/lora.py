"""LoRA adapters (arXiv 2106.09685): new ones that train, and saved ones, in PEFT's format, in the place of a model.

They train beside linear layers, and the model stays as it is. So the policy without its adapters is the model before training, its
own reference: a second one is not loaded. A saved adapter that goes on has a frozen copy beside it, and that is the reference.
lora_dropout acts inside the adapters, in forwards that record a graph: a step is then not the same on another number of ranks."""

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

COPY = 'reference'  # PEFT's name for the frozen copy; the adapter that trains is 'default'
CONFIG, WEIGHTS, BASE_HASH = 'adapter_config.json', 'adapter_model.safetensors', 'base_model.sha256'
# the options of a saved adapter: must be one of these, PEFT heeds them or they change nothing; any other must be off
KNOWN = {
    'peft_type': ('LORA',),
    'task_type': (None, 'CAUSAL_LM', 'SEQ_CLS'),
    'init_lora_weights': (None, True, False, 'gaussian'),
}
TAKEN = set('alpha_pattern auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode layers_pattern '
            'layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save peft_version qalora_group_size r '
            'rank_pattern target_modules use_rslora'.split())  # fmt: skip
OFF = (None, False, 'none', [], {})
WAY_OUT = 'name the whole model (of a run: the folder model beside it), or merge it with PEFT: merge_and_unload()'

# ---- saved adapters ----


class Saved(NamedTuple):
    """An adapter that can be used here."""

    name: str  # a folder, or a hub id
    folder: Path
    base: str  # the model that it belongs to: a folder, or a hub id
    options: dict  # its adapter_config.json
    rank: int
    scores: bool  # whether it makes a reward model, not a language model


_found = {}  # by name: the export at the end of a run needs them, and the folder may be gone by then


def find(name):
    """The adapter that a folder or a hub id holds, as Saved; None where it holds none. Raises UserError where it is of no use."""
    if os.path.exists(name) or name not in _found:
        file = hub.file_of(name, CONFIG)
        _found[name] = _read(name, Path(file)) if file else None
    return _found[name]


def adapter_and_base(name):
    """(The adapter under this name or None, the model that it belongs to or name itself)."""
    saved = find(name)
    return saved, saved.base if saved else name


def _read(name, file):
    """The Saved of an adapter_config.json. Raises UserError where the adapter is of another kind, or its model is missing."""
    options, folder = hub.read_dict(name, CONFIG), file.parent
    rank, alpha, base = options.get('r'), options.get('lora_alpha'), options.get('base_model_name_or_path')
    has_rank = type(rank) is int and rank > 0
    if not has_rank or type(alpha) not in (int, float) or type(base) is not str or not base:
        raise UserError(f'{CONFIG} of the adapter {name!r} does not say its r, its lora_alpha and its model: {WAY_OUT}')
    # kinds that compute something else, or that have changed their base model before training
    odd = []
    for key, value in (dict.fromkeys(KNOWN) | options).items():
        if key not in TAKEN and value not in KNOWN.get(key, OFF):
            odd.append(f'{key}={value!r}'[:100])
    if odd:
        raise UserError(f'the adapter {name!r} has {", ".join(odd)}, which is not supported here: {WAY_OUT}')
    if hub.file_of(name, WEIGHTS) is None:
        raise UserError(f'the adapter {name!r} has no {WEIGHTS}: save it as safetensors')

    # a path counts from the working directory, as it does for PEFT, or else from the adapter's folder
    beside = os.path.normpath(folder / base)
    if not os.path.exists(base) and os.path.exists(beside):
        base = beside
    try:
        hub.check_there(base)
    except UserError as error:
        raise UserError(f'the model of the adapter {name!r} is missing: {error}') from None
    return Saved(name, folder, base, options, rank, scores=options.get('task_type') == 'SEQ_CLS')


def weights_hash(folder):
    """Hash a folder's weights and config, of an adapter its model's, too: what two models gave never mixes. None: no folder."""
    if not folder or not os.path.isdir(folder):
        return None
    saved, base = adapter_and_base(folder)
    patterns = ('*.safetensors', 'config.json', CONFIG)
    files = sorted(file for pattern in patterns for file in Path(folder).glob(pattern))
    hashes = ''.join(file_hash(file) for file in files) + (saved and weights_hash(base) or '')
    return hashlib.sha256(bytes.fromhex(hashes)).hexdigest()[:16]


def _fill(model, saved, name='default'):
    """Put the weights of a saved adapter into the adapter of this name of a PeftModel. Raises UserError where they do not fit."""
    import peft

    result = peft.set_peft_model_state_dict(model, load_file(hub.file_of(saved.name, WEIGHTS)), adapter_name=name)
    missing = [key for key in result.missing_keys if f'.{name}.' in key]
    for what, keys in ('lacks', missing), ('has, without a place in its model,', result.unexpected_keys):
        if keys:
            raise UserError(f'the adapter {saved.name!r} {what} weights: {", ".join(sorted(keys)[:3])}')
    # another model of the same shape fits as well
    trained_on = saved.folder / BASE_HASH
    if name == 'default' and trained_on.exists() and trained_on.read_text() != weights_hash(saved.base):
        other = f'is not the model that the adapter {saved.name} was trained on'
        say_once(f'warning: {saved.base} {other}: its weights differ')


def merge(model, saved, empty):
    """The model with its adapter merged into the weights, all of which train. empty: it has no weights, so nothing changes."""
    say_once(f'adapter: {saved.name}, rank {saved.rank}, is merged into its model {saved.base}')
    if empty:
        return model
    settings = _settings(model, saved)
    settings.task_type = None  # a classifier may have an adapter that was made for a language model
    wrapped = _peft_model(model, settings, seed=0)
    # what changes a head must not change the embedding that it is, nor the other way round
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(hasattr(layer, 'lora_A') or hasattr(layer, 'modules_to_save') for layer in ends):
        separate(wrapped)
    _fill(wrapped, saved)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that head and embedding are two now, which the config will say
        model = wrapped.merge_and_unload()
    describe_ties(model)
    return model.requires_grad_(True)


def _peft_model(model, settings, seed, copy=None):
    """A PeftModel in eval mode, its adapter drawn from seed. settings: PEFT's; copy: the name of a second adapter."""
    import peft

    settings.inference_mode = False
    # PEFT calls what transformers has renamed, and warns of it
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*gradient_checkpointing. is deprecated')
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, settings)
        if copy:
            model.add_adapter(copy, settings)
            model.set_adapter('default')  # the copy does not train
    return model.eval()


# ---- adapters that train ----


def options(config):
    """What load_model's adapters= takes, from a script's lora_ options; None where lora_rank is None. Raises UserError."""
    quantize.check(config)
    if config['lora_rank'] is None:
        config.ignored(['lora_alpha', 'lora_dropout', 'lora_targets'], 'there is no --lora_rank')
        return None
    # a saved one goes on with the rank, alpha and layers that it has
    saved = find(config['model'])
    if saved and config['lora_rank'] != saved.rank:
        ways = f'--lora_rank={saved.rank} goes on with it, and without --lora_rank it is merged and all weights train'
        raise UserError(f'the adapter {saved.name!r} has rank {saved.rank}: {ways}; for a new adapter {WAY_OUT}')
    if saved:
        config.ignored(['lora_alpha', 'lora_targets'], f'the adapter {saved.name!r} goes on with its own')
        config['lora_alpha'] = float(saved.options['lora_alpha'])
    names = ('rank', 'alpha', 'dropout', 'targets')
    return {name: config[f'lora_{name}'] for name in names} | {'quantize': config['quantize']}


def of_reference(config, adapters):
    """What load_model's adapters= takes for the reference: what the policy has, where that is not the model as it is."""
    differs = config['quantize'] or find(config['model'])
    return adapters if differs and config['ref_model'] is None else None


def adapt(model, saved, adapters, *, seed=0, empty=False, **_others):
    """The model in eval mode, with what adapters= of load_model asks for. Raises UserError.

    None: a saved adapter is merged. Else a PeftModel whose adapters train, the saved one or new ones, and the head of a reward
    model: x -> layer(x) + alpha / rank * B A x, where B begins as 0 and A is drawn from seed; targets: names of linear layers in
    the blocks, such as 'q_proj v_proj', or None for all. empty: the model has no weights."""
    model.eval()
    if not adapters:
        return merge(model, saved, empty) if saved else model
    scores, dropout = hasattr(model, 'score'), adapters['dropout']
    settings = _settings(model, saved, adapters)
    settings.lora_dropout = dropout
    settings.task_type = 'SEQ_CLS' if scores else 'CAUSAL_LM'
    # of a saved adapter of a language model a frozen copy lies beside it
    model = _peft_model(model, settings, seed, copy=COPY if saved and not scores else None)
    if saved:
        _check_goes_on(core(model), saved)
        if not empty:
            for name in model.peft_config:
                _fill(model, saved, name)
        reference = '' if scores else ', and the reference is what it is now'
        say_once(f'adapter: {saved.name}, rank {saved.rank}, goes on in its model {saved.base}{reference}')
    # the model stays in eval mode: dropout is on where a graph is recorded
    for name, module in model.named_modules():
        if name.endswith('lora_dropout.default') and dropout:
            module.forward = lambda x: F.dropout(x, dropout, training=torch.is_grad_enabled())
    return quantize.quantize(model) if adapters.get('quantize') else model


def _settings(model, saved, adapters=None):
    """PEFT's options of a saved adapter, or (None) of new ones."""
    import peft

    if saved:
        return peft.LoraConfig.from_pretrained(str(saved.folder))
    # linear layers in the blocks, by the last part of their paths
    inside = {m for block in blocks(model) for m in block.modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    last = {path: path.rpartition('.')[2] for path, _ in model.named_modules()}
    known = sorted({last[path] for path, m in model.named_modules() if m in inside})
    targets, wanted = adapters['targets'], known
    if targets is not None:
        wanted = targets.replace(',', ' ').split()
    if not wanted or set(wanted) - set(known):
        there = f'the linear layers in the blocks of {type(model).__name__} are {" ".join(known) or "none"}'
        raise UserError(f'cannot put adapters on {targets or "any layer"!r}: {there}')
    return peft.LoraConfig(
        r=adapters['rank'],
        lora_alpha=adapters['alpha'],
        target_modules=wanted,
        # what has such a name outside the blocks gets no adapter
        exclude_modules=[path for path, m in model.named_modules() if last[path] in wanted and m not in inside] or None,
        modules_to_save=['score'] if hasattr(model, 'score') else None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in inside),  # GPT-2's layers have their weights transposed
    )


def _check_goes_on(model, saved):
    """Refuse a saved adapter on what is outside the blocks, or without the head of a reward model, which trains whole."""
    inside = {m for block in blocks(model) for m in block.modules()}
    # the packed forward asks for no adapter on a head
    outside = [path for path, m in model.named_modules() if hasattr(m, 'lora_A') and m not in inside]
    outside += sorted({*(saved.options.get('modules_to_save') or ())} - {'classifier', 'score'})
    wrong = f'changes {outside[0]}, outside the blocks' if outside else None
    if hasattr(model, 'score') != saved.scores:
        wrong = 'is of a language model, and a reward model has another head'
    if wrong:
        raise UserError(f'the adapter {saved.name!r} {wrong}: leave out --lora_rank, which merges it')


def present(model):
    """Whether the model has adapters."""
    return core(model) is not model


@contextlib.contextmanager
def adapters_off(model):
    """The model (or None) before training, bit by bit, for a while: without adapters, or with the copy of one that goes on."""
    layers = [m for m in model.modules() if hasattr(m, 'lora_A')] if model else []
    # PEFT's own contexts also turn requires_grad off and on, in whichever copy FSDP shows just then
    for m in layers:
        m._disable_adapters, m._active_adapter = COPY not in m.lora_A, [COPY]
    try:
        yield
    finally:
        for m in layers:
            m._disable_adapters, m._active_adapter = False, ['default']


def write(model, weights, folder):
    """Load trained weights (name -> tensor) into a freshly made PeftModel, and write its adapter folder.

    The folder is PEFT's, with one file more: the hash of the base model's files, where that model is a folder here."""
    # the frozen weights are missing among the trained ones, and the model has them already
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    # the frozen copy that serves as the reference is not written
    model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=['default'])
    # a template of PEFT's that nobody has filled in
    (folder / 'README.md').unlink()
    base_hash = weights_hash(model.peft_config['default'].base_model_name_or_path)
    if base_hash is not None:
        (folder / BASE_HASH).write_text(base_hash)


def merged(model):
    """Return the transformers model inside a PeftModel, with its adapter merged into the weights. Changes model."""
    return quantize.dequantize(model).merge_and_unload()


def describe(model):
    """One line for the screen: how many weights train, in which layers."""
    trained, every = model.get_nb_trainable_parameters()
    every += quantize.packed_weights(model)
    layers = sorted({path.rpartition('.')[2] for path, m in model.named_modules() if hasattr(m, 'lora_A')})
    return f'LoRA: {trained:,} of {every:,} weights train, on {" ".join(layers)}'
