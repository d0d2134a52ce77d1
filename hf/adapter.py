"""An adapter in a folder, in PEFT's format, where a model is named: its base model is found, and the adapter merged into it.

lora.py trains adapters, and goes on with a saved one. All raise UserError."""

import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import UserError
from hf import check
from hf.ties import describe_ties, separate
from runtime.files import say_once

WEIGHTS = 'adapter_model.safetensors'
# options of adapter_config.json that PEFT heeds when it loads one, or that change nothing; any other must be off
TAKEN = set('alpha_pattern auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode layers_pattern '
            'layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save peft_type peft_version qalora_group_size r '
            'rank_pattern target_modules task_type use_rslora'.split())  # fmt: skip
OFF = (None, False, 'none', [], {})


class Saved(NamedTuple):
    """An adapter that can be used here."""

    name: str  # a folder, or a hub id
    folder: Path
    base: str  # the model that it belongs to: a folder, or a hub id
    options: dict  # its adapter_config.json
    way_out: str  # the end of a sentence: how to have a whole model of it

    @property
    def rank(self):
        return self.options['r']

    @property
    def scores(self):
        """Whether it makes a reward model, not a language model."""
        return self.options.get('task_type') == 'SEQ_CLS'


_found = {}  # by name: the export at the end of a run needs them, and the folder may be gone by then


def find(name):
    """The adapter that a folder or a hub id holds, as Saved; None where it holds none. Raises UserError where it is of no use."""
    if os.path.exists(name) or name not in _found:
        file = check.file_of(name, 'adapter_config.json')
        _found[name] = _read(name, Path(file)) if file else None
    return _found[name]


def _read(name, file):
    """The Saved of an adapter_config.json. Raises UserError where the adapter is of another kind, or its model is missing."""
    options, folder = check.read_dict(file), file.parent
    if not options:
        raise UserError(f'{file} is not to be read: it must be an object in JSON')
    base, whole = options.get('base_model_name_or_path'), folder.with_name('model')
    way_out = (
        'merge it with peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(DIR)'
    )
    if (whole / 'config.json').is_file():
        way_out = f'name {str(whole)!r} beside it, which is the whole model with the adapter merged in'

    # kinds that compute something else, or that have changed their base model before training
    odd = {key: value for key, value in options.items() if key not in TAKEN and value not in OFF}
    if odd.get('init_lora_weights') in (True, 'gaussian'):
        del odd['init_lora_weights']
    known = {'peft_type': ('LORA',), 'task_type': (None, 'CAUSAL_LM', 'SEQ_CLS')}
    odd |= {key: options.get(key) for key in known if options.get(key) not in known[key]}
    if odd:
        what = ', '.join(f'{key}={value!r}'[:100] for key, value in odd.items())
        raise UserError(f'the adapter {name!r} has {what}, which is not supported here: {way_out}')
    if check.file_of(name, WEIGHTS) is None:
        raise UserError(f'the adapter {name!r} has no {WEIGHTS}: save it as safetensors, or {way_out}')
    rank, alpha = options.get('r'), options.get('lora_alpha')
    numbers = type(rank) is int and rank > 0 and type(alpha) in (int, float) and math.isfinite(alpha)
    if not numbers or not base or not isinstance(base, str):
        raise UserError(
            f'{file.name} of the adapter {name!r} does not say its r, its lora_alpha and its model: {way_out}'
        )

    # a path counts from the working directory, as it does for PEFT, or else from the adapter's folder
    beside = os.path.normpath(folder / base)
    if not os.path.exists(base) and os.path.exists(beside):
        base = beside
    try:
        check.check_there(base)
    except UserError as error:
        raise UserError(f'the model of the adapter {name!r} is missing: {error}; or {way_out}') from None
    if check.file_of(base, file.name):
        raise UserError(f'the adapter {name!r} belongs to {base!r}, which is an adapter, too: {way_out}')
    return Saved(name, folder, base, options, way_out)


def peft():
    """The library. Raises UserError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise UserError('adapters (--lora_rank, or a folder of one) need peft: pip install peft') from None
    return peft


def settings(saved):
    """PEFT's options of a saved adapter, to be trained."""
    options = peft().LoraConfig.from_pretrained(str(saved.folder))
    options.inference_mode = False
    return options


def wrap(model, options, seed, copy=None):
    """A PeftModel in eval mode, its adapter drawn from seed. options: PEFT's; copy: the name of a second adapter of the kind."""
    # PEFT calls what transformers has renamed, and warns of it
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*gradient_checkpointing. is deprecated')
        torch.manual_seed(seed)
        model = peft().get_peft_model(model, options)
        if copy:
            model.add_adapter(copy, options)
    return model.eval()


def fill(model, saved, name='default'):
    """Put the weights of a saved adapter into the adapter of this name of a PeftModel. Raises UserError where they do not fit."""
    from safetensors.torch import load_file

    weights = load_file(check.file_of(saved.name, WEIGHTS))
    result = peft().set_peft_model_state_dict(model, weights, adapter_name=name)
    wrong = {'lacks weights': [key for key in result.missing_keys if f'.{name}.' in key]}
    wrong['has weights without a place in its model'] = result.unexpected_keys
    for what, keys in wrong.items():
        if keys:
            raise UserError(f'the adapter {saved.name!r} {what}: {", ".join(sorted(keys)[:3])}')


def merge(model, saved, empty):
    """The model with its adapter merged into the weights, all of which train. empty: it has no weights, so nothing changes."""
    say_once(f'adapter: {saved.name}, rank {saved.rank}, is merged into its model {saved.base}')
    if empty:
        return model
    options = settings(saved)
    options.task_type = None  # a classifier may have an adapter that was made for a language model
    wrapped = wrap(model, options, seed=0)
    # what changes a head must not change the embedding that it is, nor the other way round
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(hasattr(layer, 'lora_A') or hasattr(layer, 'modules_to_save') for layer in ends):
        separate(wrapped)
    fill(wrapped, saved)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that head and embedding are two now, which the config will say
        model = wrapped.merge_and_unload()
    describe_ties(model)
    return model.requires_grad_(True)
