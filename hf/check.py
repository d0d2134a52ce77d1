"""Which models are refused before they are loaded: code of their own, pickles, weights that lie elsewhere, quantised weights,
classifiers that are no reward model. All raise UserError."""

import contextlib
import json
import os
import re
from pathlib import Path

import torch

from configurator import UserError
from runtime import hub
from runtime.values import looked_in

PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')


def first_line(error):
    """What an exception says, on one line."""
    text = ' '.join(str(error).split())[:200]
    return text if ' ' in text else f'{type(error).__name__} {text}'.strip()


def read_dict(file):
    """The dict of a JSON file, or an empty one: a broken file has an error of its own where it is loaded."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(Path(file).read_text('utf-8'))
        if isinstance(found, dict):
            return found
    return {}


def file_of(name, file):
    """The path of a file of a folder or a hub id, or None where it has no such file."""
    if os.path.exists(name):
        path = os.path.join(name, file)
        return path if os.path.isfile(path) else None
    if not _may_be_hub_id(name):
        return None
    hub.reachable()  # where it is not, only its cache is asked from here on
    return _hub_file(name, file)


def _may_be_hub_id(name):
    return name.count('/') == 1 and not name.startswith(('.', '/', '~'))


def _hub_file(name, file):
    """The path of a small file of a hub id, or None where it has no such file."""
    from transformers.utils import cached_file

    options = ('gated_repo', 'missing_entries', 'connection_errors')
    with contextlib.suppress(OSError):  # what is wrong with the hub id is said where its config is read
        return cached_file(name, file, **{f'_raise_exceptions_for_{option}': False for option in options})
    return None


def check_there(name):
    """Refuse a name that is no folder here and cannot be a hub id, and a hub id that is neither at hand nor to be had."""
    if os.path.exists(name):
        return
    here = looked_in(name).strip() or 'on this machine'
    if not _may_be_hub_id(name):
        raise UserError(f'there is no model folder {name!r} {here}: train it first, or name another one')
    if not hub.reachable() and _hub_file(name, 'config.json') is None:
        cached = 'its cache does not have it'
        raise UserError(
            f'there is no folder {name!r} {here}, the hub cannot be reached, and {cached}: name a model folder'
        )


# ---- what would run code, or read what it should not ----


def check_sizes(name):
    """Refuse a folder whose chat templates, or what else is read whole with its tokenizer, are far too large."""
    for pattern, most in {'*.jinja': 4_000_000, 'tokenizer_config.json': 64_000_000}.items():
        for file in Path(name).rglob(pattern):
            size = file.stat().st_size
            if size > most:
                raise UserError(f'{file} has {size:,} bytes, and {most:,} are the limit: is it what it should be?')


def check_safe(name, trust_remote_code, weights=True):
    """Refuse a folder that asks to run code of its own, or has its weights in pickles, which can run code.

    A hub id passes: check_code and check_files see to it. weights: False where a tokenizer alone is read."""
    folder = Path(name)
    if not folder.is_dir():
        return
    for file in () if trust_remote_code else sorted(folder.glob('*config.json')):
        check_code(name, file.name, read_dict(file))
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if weights and pickles and not any(folder.glob('*.safetensors')):
        danger = 'which can run any code when it is read: convert it to safetensors where you trust it'
        raise UserError(f'{name!r} has its weights in {pickles[0]}, a pickle, {danger}')


def check_code(name, where, options):
    """Refuse the options of a config file that ask for code: of the model's own, or a kernel that is fetched from the hub."""
    what = 'code of its own' if options.get('auto_map') or options.get('custom_pipelines') else None
    for key, value in options.items():
        if isinstance(value, dict):
            check_code(name, where, value)
        # attn_implementation, experts_implementation: transformers takes what has a slash for the hub id of a kernel
        if key.endswith('_implementation') and '/' in json.dumps(value, default=str):
            what = f'{key} {value!r}, a kernel from the hub'
    if what:
        way = 'read it, and pass --trust_remote_code if you want it to run'
        raise UserError(f'{name!r} comes with {what} ({where}): {way}')


def check_files(name, config):
    """Refuse weights that a config or an index names and that are not safetensors files right beside it.

    Others are pickles, which can run code, or files of somebody else."""
    # another name for the file of the weights, or for the index
    named = getattr(config, 'transformers_weights', None)
    if named:
        _check_shard(name, 'config.json', named, ('.safetensors', '.safetensors.index.json'))
    if Path(name).is_dir():
        indices = sorted(Path(name).glob('*.safetensors.index.json'))
    else:
        usual = 'model.safetensors.index.json'
        found = _hub_file(name, named if named and named.endswith('.json') else usual)
        indices = [Path(found)] if found else []
    for index in indices:
        shards = read_dict(index).get('weight_map')
        for shard in shards.values() if isinstance(shards, dict) else ():
            _check_shard(name, index.name, shard, '.safetensors')


def _check_shard(name, where, shard, endings):
    plain = isinstance(shard, str) and re.fullmatch(r'[^/\\\0]+', shard)
    if not plain or not shard.endswith(endings):
        wanted = 'weights must be .safetensors files in the same folder'
        raise UserError(f'{where} of {name!r} names {str(shard)[:100]!r}: {wanted}')


# ---- what cannot be trained here ----


def is_classifier(config):
    """Whether a config is that of a sequence classifier, such as a reward model."""
    return (config.architectures or [''])[0].endswith('ForSequenceClassification')


def check_quantised(name, config):
    """Refuse quantised weights."""
    quantised = getattr(config, 'quantization_config', None)
    if not quantised:
        return
    options = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = options.get('quant_method', 'bitsandbytes')
    raise UserError(
        f'{name!r} holds quantised weights ({method}), which are neither trained nor exported here: name the model that they '
        'were made from, or a copy of model.dequantize()'
    )


def check_reward(name, config, tokenizer, new_head):
    """Refuse what is no reward model that can be read here. new_head: a language model will do."""
    if not is_classifier(config) and not new_head:
        raise UserError(f'{name!r} is no reward model but a language model: train one from it with reward.py')
    if not is_classifier(config):
        return
    if config.num_labels != 1:
        raise UserError(f'the classifier {name!r} has {config.num_labels} outputs; a reward model has one')
    if config.get_text_config().pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f'{name!r} pads with its end of text, so its score was read one token before that; here it is read at the end of '
            'text: train it further with another pad_token_id in its config.json'
        )


def check_placed(name, device_map, model):
    """Refuse a device map that has left a part of the model out of the GPUs."""
    outside = {'cpu', 'meta'} if torch.cuda.is_available() else {'meta'}
    if device_map and outside & {str(p.device) for p in model.parameters()}:
        raise UserError(f'the model {name!r} does not fit on the GPUs of this machine with device_map={device_map}')
