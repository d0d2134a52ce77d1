"""LoRA adapters (arXiv 2106.09685) through PEFT and in its file format, either new or saved by an earlier run.

The base model is frozen, so the reference is the policy without adapters or, if a saved adapter is trained further, with a frozen
copy of it. With lora_dropout results depend on the ranks and on max_tokens. Passes without gradients have no dropout."""

import contextlib
import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from configurator import UserError
from hf import quantize
from hf.parts import blocks, core
from hf.ties import correct_tie_config, separate, ties
from runtime import hub
from runtime.files import file_hash, say_once

FROZEN_COPY = 'reference'  # PEFT's name of the frozen copy; the trained adapter is 'default'
# file names: the first two are PEFT's, the last is ours and holds weights_hash() of the base model at training time
CONFIG_FILE = 'adapter_config.json'
WEIGHTS_FILE = 'adapter_model.safetensors'
BASE_HASH_FILE = 'base_model.sha256'
ALLOWED_VALUES = {  # supported values of options in adapter_config.json; a missing option counts as None
    'peft_type': ('LORA',),
    'task_type': (None, 'CAUSAL_LM', 'SEQ_CLS'),
    'init_lora_weights': (None, True, False, 'gaussian'),
}
# options that may have any value: PEFT applies them, or they have no effect
ANY_VALUE = set('alpha_pattern auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode layers_pattern '
                'layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save peft_version qalora_group_size r '
                'rank_pattern target_modules use_rslora'.split())  # fmt: skip
# values that switch off any other option, which would enable an unsupported kind of adapter
DISABLED = (None, False, 'none', [], {})
WAY_OUT = 'name the whole model (of a run: the folder model beside it), or merge it with PEFT: merge_and_unload()'


class SavedAdapter(NamedTuple):
    """A saved adapter whose config is supported and whose base model exists."""

    name: str  # hub id or folder, as given by the user
    folder: Path
    base: str  # hub id or folder of the base model
    options: dict  # contents of adapter_config.json
    rank: int
    is_reward: bool  # trained on a reward model, not on a language model


_found = {}  # cache of find_adapter: the export at the end of a run asks again, and the folder may be gone by then


def find_adapter(name):
    """Return the adapter in a folder or of a hub id as a SavedAdapter, or None. Raises UserError if it is unsupported."""
    # a folder that is there is read anew each time, as it may have changed
    if os.path.exists(name) or name not in _found:
        file = hub.file_of(name, CONFIG_FILE)
        _found[name] = _read_adapter(name, Path(file)) if file else None
    return _found[name]


def adapter_and_base(name):
    """Return (SavedAdapter, name of its base model) if name is an adapter, else (None, name)."""
    saved = find_adapter(name)
    return saved, saved.base if saved else name


def _read_adapter(name, file):
    """Return the SavedAdapter whose adapter_config.json is file. Raises UserError if it is incomplete or unsupported."""
    options = hub.read_dict(name, CONFIG_FILE)
    rank = options.get('r')
    alpha = options.get('lora_alpha')
    base = options.get('base_model_name_or_path')
    has_rank = type(rank) is int and rank > 0
    has_base = type(base) is str and base != ''
    if not (has_rank and has_base and type(alpha) in (int, float)):
        raise UserError(f'{CONFIG_FILE} of {name!r} does not say its r, its lora_alpha and its model: {WAY_OUT}')
    if unsupported := _unsupported(options):
        raise UserError(f'the adapter {name!r} has {", ".join(unsupported)}, which is not supported here: {WAY_OUT}')
    if hub.file_of(name, WEIGHTS_FILE) is None:
        raise UserError(f'the adapter {name!r} has no {WEIGHTS_FILE}: save it as safetensors')
    # a relative path is meant from the working directory, as PEFT does, or else from the adapter's folder
    sibling = os.path.normpath(file.parent / base)
    if not os.path.exists(base) and os.path.exists(sibling):
        base = sibling
    try:
        hub.check_exists(base)
    except UserError as error:
        raise UserError(f'the model of the adapter {name!r} is missing: {error}') from None
    if hub.file_of(base, CONFIG_FILE):
        raise UserError(f'the model of the adapter {name!r} is itself an adapter, {base!r}: {WAY_OUT}')
    return SavedAdapter(name, file.parent, base, options, rank, is_reward=options.get('task_type') == 'SEQ_CLS')


def _unsupported(options):
    """Return ["peft_type='IA3'", ...], those options of an adapter_config.json that ask for something else than plain LoRA."""
    unsupported = []
    with_missing_as_none = dict.fromkeys(ALLOWED_VALUES) | options
    for key, value in with_missing_as_none.items():
        # an option in neither ANY_VALUE nor ALLOWED_VALUES is unknown here, and must be off
        allowed = ALLOWED_VALUES.get(key, DISABLED)
        if key not in ANY_VALUE and value not in allowed:
            unsupported.append(f'{key}={value!r}'[:100])
    return unsupported


def weights_hash(folder):
    """Return a hash of a folder's weights and configs, and those of an adapter's base model if it is a folder. None for a hub id."""
    if not folder or not os.path.isdir(folder):
        return None
    files = [file for pattern in ('*.safetensors', 'config.json', CONFIG_FILE) for file in Path(folder).glob(pattern)]
    hashes = [file_hash(file) for file in sorted(files)]
    saved, base = adapter_and_base(folder)
    if saved:
        hashes.append(weights_hash(base) or '')
    return hashlib.sha256(bytes.fromhex(''.join(hashes))).hexdigest()[:16]


def content_of(name):
    """Return weights_hash() of a folder, the commit of a hub id, or both of an adapter: 'HASH+COMMIT'. None if not found."""
    folder = hub.folder_of(name)
    if folder is None:
        return None
    content = weights_hash(name) or folder.name  # the cache of the hub has a folder for each commit
    saved, base = adapter_and_base(name)
    base_is_on_hub = saved and not os.path.isdir(base)
    return f'{content}+{content_of(base)}' if base_is_on_hub else content


def _load_weights(model, saved, adapter_name='default'):
    """Load a saved adapter into the adapter of this name in a PeftModel. UserError if they do not fit; warns of another base model."""
    import peft

    weights = load_file(hub.file_of(saved.name, WEIGHTS_FILE))
    try:
        result = peft.set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
    # a module that the adapter holds whole has another size here, such as an embedding that was resized for new tokens
    except RuntimeError as error:
        # the message is a heading, and then a line for each mismatch: keep the first of these
        mismatch = re.search(r'size mismatch.{,300}(?<!\.)', str(error))  # without the full stop
        if not mismatch:
            raise
        raise UserError(f'the adapter {saved.name!r} does not fit {saved.base}: {mismatch[0]}: {WAY_OUT}') from None
    # PEFT also lists the base model's keys as missing: keep only this adapter's
    missing = [key for key in result.missing_keys if f'.{adapter_name}.' in key]
    problem = 'lacks' if missing else 'has, without a place in its model,'
    keys = sorted(missing or result.unexpected_keys)
    if keys:
        raise UserError(f'the adapter {saved.name!r} {problem} weights: {", ".join(keys[:3])}')
    # not again for the frozen copy. Adapters written by other tools have no hash file
    hash_file = saved.folder / BASE_HASH_FILE
    if adapter_name == 'default' and hash_file.exists() and hash_file.read_text() != weights_hash(saved.base):
        say_once(f'warning: {saved.base} is not the model that the adapter {saved.name} was trained on')


def _peft_model(model, saved, adapters, *, task_type, seed=0, with_frozen_copy=False):
    """Return a PeftModel in eval mode whose adapter has new weights, drawn from seed, and trains.

    saved: the SavedAdapter whose options it gets, or None for those of adapters, from adapter_options(). With both, the dropout is
    that of adapters. task_type: 'CAUSAL_LM', 'SEQ_CLS' or None. with_frozen_copy: add a second adapter, FROZEN_COPY, to be loaded."""
    try:
        import peft
    except ImportError:
        raise UserError('adapters need a package that is not installed: pip install peft') from None

    lora_config = peft.LoraConfig.from_pretrained(str(saved.folder)) if saved else _new_config(model, adapters)
    lora_config.task_type = task_type
    if adapters:
        lora_config.lora_dropout = adapters['dropout']
    lora_config.inference_mode = False  # saved configs have inference_mode=True, which would freeze the adapter
    # PEFT triggers a deprecation warning of transformers, and says that it sees the transposed weights of GPT-2's Conv1D
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*gradient_checkpointing. is deprecated|fan_in_fan_out is set to False')
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, lora_config)
        if with_frozen_copy:
            model.add_adapter(FROZEN_COPY, lora_config)
            model.set_adapter('default')  # only the active adapter trains
    return model.eval()


def adapter_options(config):
    """Return the adapter options of a run for adapt(), a dict, or None without --lora_rank. Raises UserError for conflicts.

    Keys: rank, alpha, dropout, targets, quantize, keeps_copy. config: the run's Config; gets the lora_alpha of a saved adapter."""
    quantize.check(config)
    if config['lora_rank'] is None:
        config.report_unused(['lora_alpha', 'lora_dropout', 'lora_targets'], 'there is no --lora_rank')
        return None
    # a saved adapter is trained further with its own rank and alpha, and on its own layers
    saved = find_adapter(config['model'])
    if saved and config['lora_rank'] != saved.rank:
        ways = f'--lora_rank={saved.rank} goes on with it, and without --lora_rank it is merged and all weights train'
        raise UserError(f'the adapter {saved.name!r} has rank {saved.rank}: {ways}; for a new adapter {WAY_OUT}')
    if saved:
        config.report_unused(['lora_alpha', 'lora_targets'], f'the adapter {saved.name!r} goes on with its own')
        config['lora_alpha'] = float(saved.options['lora_alpha'])
    lora_options = {name: config[f'lora_{name}'] for name in ('rank', 'alpha', 'dropout', 'targets')}
    # the reference is a frozen copy of a saved adapter, unless --ref_model names another one; sft.py and reward.py have none
    keeps_copy = 'ref_model' in config and config['ref_model'] is None
    return lora_options | {'quantize': config['quantize'], 'keeps_copy': keeps_copy}


def reference_options(config, adapters):
    """Return the adapter options to load the reference with: adapters, which are those of the policy, or None.

    A policy with adapters is its own reference, under adapters_off(): only --cache_ref loads it once more, to hash it."""
    # a new adapter starts as zero: without it the model is the same. A saved one changes the model, and so do 4-bit weights
    is_changed = config['quantize'] or find_adapter(config['model'])
    return adapters if is_changed and config['ref_model'] is None else None


def adapt(model, saved, adapters, *, seed=0, empty=False, **_others):
    """Return a loaded model in eval mode with its adapters. Raises UserError if they do not fit.

    saved: SavedAdapter or None. adapters: from adapter_options(), or None to merge a saved adapter. empty: no weights yet.
    With adapters, the result is a PeftModel that trains the saved adapter or a new one, and a reward model's head. A new
    adapter computes layer(x) + alpha / rank * B A x, where B starts as zero and A is drawn from seed."""
    model.eval()
    if not adapters:
        return _merged(model, saved, empty) if saved else model
    is_reward = hasattr(model, 'score')
    task_type = 'SEQ_CLS' if is_reward else 'CAUSAL_LM'  # for SEQ_CLS, PEFT also trains the head, whole
    # reward models, such as PPO's critic, have no reference
    with_frozen_copy = saved is not None and not is_reward and adapters.get('keeps_copy', True)
    model = _peft_model(model, saved, adapters, task_type=task_type, seed=seed, with_frozen_copy=with_frozen_copy)
    if saved:
        _check_trainable(core(model), saved)
        if not empty:
            for adapter_name in model.peft_config:
                _load_weights(model, saved, adapter_name)
        remark = ', and a frozen copy of it is the reference' if with_frozen_copy else ''
        say_once(f'adapter: {saved.name}, rank {saved.rank}, goes on in its model {saved.base}{remark}')
    # the model stays in eval mode, in which PEFT's dropout is off: replace it by one that is on whenever gradients are recorded
    dropout = adapters['dropout']
    for path, module in model.named_modules():
        if dropout and path.endswith('lora_dropout.default'):
            module.forward = lambda x: F.dropout(x, dropout, training=torch.is_grad_enabled())
    return quantize.quantize(model) if adapters.get('quantize') else model


def _merged(model, saved, empty):
    """Return the model with a SavedAdapter merged into its weights, which all train from now on. empty: no weights yet."""
    say_once(f'adapter: {saved.name}, rank {saved.rank}, is merged into its model {saved.base}')
    if empty:
        return model
    # no task: a language model's adapter may be merged into a new reward model
    wrapped = _peft_model(model, saved, adapters=None, task_type=None)
    # if the adapter changes head or embedding, untie them. In place of a changed one, PEFT has put a layer with such an attribute
    embedding_and_head = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(hasattr(layer, 'lora_A') or hasattr(layer, 'modules_to_save') for layer in embedding_and_head):
        separate(wrapped, ties(wrapped))
    _load_weights(wrapped, saved)
    # PEFT warns about untied weights, but correct_tie_config records them in the config
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        merged = wrapped.merge_and_unload()
    correct_tie_config(merged)
    return merged.requires_grad_(True)


def _new_config(model, adapters):
    """Return the peft.LoraConfig of a new adapter on linear layers of the blocks. adapters: from adapter_options(). Raises UserError."""
    import peft

    in_blocks = {module for block in blocks(model) for module in block.modules()}
    known = set()  # names of linear layers in the blocks
    others = {}  # path of each other module -> its name
    for path, module in model.named_modules():
        name = path.rpartition('.')[2]  # layers.0.up_proj -> up_proj
        if module in in_blocks and isinstance(module, torch.nn.Linear | Conv1D):
            known.add(name)
        else:
            others[path] = name
    targets = adapters['targets']  # such as 'q_proj v_proj', or None for all linear layers
    wanted = sorted(known) if targets is None else targets.replace(',', ' ').split()
    if not wanted or not known.issuperset(wanted):
        choices = f'the linear layers in the blocks of {type(model).__name__} are {" ".join(sorted(known)) or "none"}'
        raise UserError(f'cannot put adapters on {targets or "any layer"!r}: {choices}')
    # PEFT finds layers by name, also outside of the blocks: exclude those by their full path
    excluded = [path for path, name in others.items() if name in wanted]
    layers = {'target_modules': wanted, 'exclude_modules': excluded or None}
    return peft.LoraConfig(r=adapters['rank'], lora_alpha=adapters['alpha'], **layers)


def _check_trainable(model, saved):
    """Raise UserError if a saved adapter cannot be trained further, only merged. model: the one inside the PeftModel."""
    # it may change blocks and, in a reward model, the head, which PEFT calls score and classifier
    in_blocks = {module for block in blocks(model) for module in block.modules()}
    # layers with LoRA: training would ignore that of the LM head, as it reads the head's weight without calling the layer
    adapted = [path for path, module in model.named_modules() if hasattr(module, 'lora_A') and module not in in_blocks]
    # weights of the model itself, of modules_to_save or of an embedding that was resized: the export would leave them out
    with safe_open(hub.file_of(saved.name, WEIGHTS_FILE), 'pt') as file:
        keys = sorted(file.keys())
    whole = [key for key in keys if not re.search(r'\.lora_|\.(score|classifier)\.', key)]
    outside = adapted + whole
    problem = f'changes {outside[0]}, outside the blocks' if outside else None
    # load_model has rejected the reverse, a reward model's adapter for a language model
    if hasattr(model, 'score') and not saved.is_reward:
        problem = 'is of a language model, and a reward model has another head'
    if problem:
        raise UserError(f'the adapter {saved.name!r} {problem}: leave out --lora_rank, which merges it')


@contextlib.contextmanager
def adapters_off(model):
    """Within the block, the model computes without its adapters or, if they have a frozen copy, with that. No-op for None."""
    layers = [module for module in model.modules() if hasattr(module, 'lora_A')] if model else []
    # PEFT's own context managers also change requires_grad, under FSDP on gathered copies of the parameters
    for layer in layers:
        has_copy = FROZEN_COPY in layer.lora_A  # name of an adapter -> its matrix A
        layer._disable_adapters = not has_copy
        layer._active_adapter = [FROZEN_COPY]  # of no effect if they are disabled
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
            layer._active_adapter = ['default']


def write(model, weights, folder):
    """Load trained weights (name -> tensor) into model, a PeftModel as from adapt(), and save its adapter to a folder (a Path)."""
    # strict=False: the frozen weights of the base model are not among them
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=['default'])
    (folder / 'README.md').unlink()  # PEFT's model card is an empty template
    # by this file _load_weights will notice a changed base model; the hash is None for one on the hub
    base_hash = weights_hash(model.peft_config['default'].base_model_name_or_path)
    if base_hash is not None:
        (folder / BASE_HASH_FILE).write_text(base_hash)


def describe(model):
    """Return a one-line summary of a PeftModel: its trainable and total weights, and its adapted layers."""
    trained, total = model.get_nb_trainable_parameters()
    total += quantize.count_4bit_weights(model)  # 4-bit weights are buffers, which PEFT does not count
    layers = {path.rpartition('.')[2] for path, module in model.named_modules() if hasattr(module, 'lora_A')}
    return f'LoRA: {trained:,} of {total:,} weights train, on {" ".join(sorted(layers))}'
