"""What is refused before a model is loaded: code of its own, pickles, adapters, weights that lie elsewhere. Raises UserError."""

import contextlib
import json
import re
from pathlib import Path

from configurator import UserError


def check_sizes(name):
    """Raise UserError where a folder's chat templates, or what else is read whole with its tokenizer, are far too large."""
    limits = {'*.jinja': 4_000_000, 'additional_chat_templates/*.jinja': 4_000_000, 'tokenizer_config.json': 64_000_000}
    for pattern, most in limits.items():
        for file in Path(name).glob(pattern):
            size = file.stat().st_size
            if size > most:
                raise UserError(f'{file} has {size:,} bytes, and {most:,} are the limit: is it what it should be?')


def check_safe(name, trust_remote_code, weights=True):
    """Raise UserError for a model folder that asks to run code of its own, or has its weights in pickles, which can run code."""
    folder = Path(name)
    if name == 'toy' or not folder.is_dir():
        return  # a hub id: _read_config in load.py and check_files see to it
    check_adapter(name)
    for file in () if trust_remote_code else sorted(folder.glob('*config.json')):
        options = None
        with contextlib.suppress(OSError, ValueError, RecursionError):  # a broken file has an error of its own
            options = json.loads(file.read_text('utf-8'))
        if isinstance(options, dict) and (what := own_code(options)):
            raise UserError(wants_code(name, file.name, what))
    pickles = sorted(f.name for ending in ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl') for f in folder.glob(ending))
    if weights and pickles and not any(folder.glob('*.safetensors')):
        raise UserError(f'{name!r} has its weights in {pickles[0]}, a pickle, which can run any code when it is read: '
                        'convert it to safetensors where you trust it')  # fmt: skip


def own_code(options):
    """How a config asks for code: 'code of its own', a kernel that is fetched from the hub, or None."""
    if any(options.get(key) for key in ('auto_map', 'custom_pipelines')):
        return 'code of its own'
    for key, value in options.items():
        # attn_implementation, experts_implementation: transformers takes what has a slash for the hub id of a kernel
        if key.endswith('_implementation') and '/' in json.dumps(value, default=str):
            return f'{key} {value!r}, a kernel from the hub'
        if isinstance(value, dict) and (what := own_code(value)):
            return what
    return None


def wants_code(name, where, what):
    return f'{name!r} comes with {what} ({where}): read it, and pass --trust_remote_code if you want it to run'


def check_adapter(name, hub=False):
    """Raise UserError for a LoRA adapter, to which transformers would fetch the base model that it names. hub: ask there, too."""
    file = Path(name) / 'adapter_config.json'
    if hub and not Path(name).is_dir():
        file = _hub_file(name, file.name)
    if file is None or not Path(file).is_file():
        return
    base = None
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
        base = json.loads(Path(file).read_text('utf-8')).get('base_model_name_or_path')
    merged = Path(name).with_name('model')
    way = "merge it: peft's AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)"
    if (merged / 'config.json').is_file():
        way = f'{str(merged)!r} beside it is the whole model, with the adapter merged in: name that'
    raise UserError(f'{name!r} is an adapter (of {base or "an unknown model"}), not a whole model: {way}')


def _hub_file(name, file):
    """The path of a small file of a hub id, or None where it has no such file."""
    from transformers.utils import cached_file

    options = ('gated_repo', 'missing_entries', 'connection_errors')
    with contextlib.suppress(OSError):  # what is wrong with the hub id is said where its config is read
        return cached_file(name, file, **{f'_raise_exceptions_for_{option}': False for option in options})
    return None


def check_files(name, config):
    """Raise UserError where the weights that a config or an index names are not safetensors files right beside it: others
    are pickles, which can run code, or files of somebody else."""
    folder = Path(name)
    named = getattr(config, 'transformers_weights', None)  # another name for the file of the weights, or for the index
    _check_shards(name, 'config.json', [named] if named else [], ('.safetensors', '.safetensors.index.json'))
    if folder.is_dir():
        indices = sorted(folder.glob('*.index.json'))
    else:
        usual = 'model.safetensors.index.json'
        found = _hub_file(name, named if named and named.endswith('.json') else usual)
        indices = [found] if found else []
    for index in map(Path, indices):
        shards = None
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            shards = json.loads(index.read_text('utf-8')).get('weight_map')
        # a pickle's index is not read; a broken one has an error of its own
        if isinstance(shards, dict) and index.name.endswith('.safetensors.index.json'):
            _check_shards(name, index.name, shards.values(), '.safetensors')


def _check_shards(name, where, shards, endings):
    for shard in shards:
        plain = isinstance(shard, str) and re.fullmatch(r'[^/\\\0]+', shard) and shard.endswith(endings)
        if not plain:
            raise UserError(
                f'{where} of {name!r} names {str(shard)[:100]!r}: weights must be .safetensors files in the same folder'
            )
