"""Which models are refused before they are loaded: those with code of their own, pickles, weights that lie elsewhere, quantised
weights, classifiers that are no reward model. All raise UserError."""

import contextlib
import json
import os
import re
from pathlib import Path

from transformers.utils import cached_file

from configurator import UserError
from runtime import hub
from runtime.values import looked_in

# a file that cached_file cannot have is None here: what is wrong with a hub id is said where its config is read
QUIET = {f'_raise_exceptions_for_{what}': False for what in ('gated_repo', 'missing_entries', 'connection_errors')}


def first_line(error):
    """What an exception says, on one line."""
    text = ' '.join(str(error).split())[:200]
    return text if ' ' in text else f'{type(error).__name__} {text}'.strip()


def read_dict(file):
    """The dict of a JSON file, empty where there is none (None): a broken file has an error of its own where it is loaded."""
    found = {}
    with contextlib.suppress(OSError, TypeError, ValueError, RecursionError):
        found = json.loads(Path(file).read_text('utf-8'))
    return found if isinstance(found, dict) else {}


def file_of(name, file):
    """The path of a file of a folder or a hub id, or None where it has no such file."""
    if not os.path.exists(name):
        if not _may_be_hub_id(name):
            return None
        hub.reachable()  # where it is not, only its cache is asked from here on
    with contextlib.suppress(OSError):
        return cached_file(name, file, **QUIET)
    return None


def _may_be_hub_id(name):
    return name.count('/') == 1 and not name.startswith(('.', '/', '~'))


def check_there(name):
    """Refuse a name that is no folder here and cannot be a hub id, and a hub id that is neither at hand nor to be had."""
    if os.path.exists(name):
        return
    here = looked_in(name).strip() or 'on this machine'
    if not _may_be_hub_id(name):
        raise UserError(f'there is no model folder {name!r} {here}: train it first, or name another one')
    if not hub.reachable() and file_of(name, 'config.json') is None:
        why = 'the hub cannot be reached, and its cache does not have it'
        raise UserError(f'there is no folder {name!r} {here}, {why}: name a model folder')


def check_code(name):
    """Refuse configs that ask for code: of the model's own, or a kernel that is fetched from the hub."""

    def look(options):
        for key, value in options.items():
            what = 'code of its own' if key == 'auto_map' and value else None
            # attn_implementation and its like: transformers takes what has a slash for the hub id of a kernel
            if key.endswith('_implementation') and '/' in json.dumps(value):
                what = f'{key} {value!r}, a kernel from the hub'
            if what:
                way = 'read it, and pass --trust_remote_code if you want it to run'
                raise UserError(f'{name!r} comes with {what} ({file}): {way}')
            if isinstance(value, dict):
                look(value)

    for file in ('config.json', 'tokenizer_config.json'):
        look(read_dict(file_of(name, file)))


def check_files(name, config):
    """Refuse weights that are not safetensors files right in the folder: pickles can run code, others are somebody else's."""
    named = getattr(config, 'transformers_weights', None)
    index = file_of(name, named if str(named).endswith('.json') else 'model.safetensors.index.json')
    shards = list(read_dict(index).get('weight_map', {}).values())
    for shard in map(str, [named, *shards] if named else shards):
        if not re.fullmatch(r'[^/\\]+\.safetensors(\.index\.json)?', shard):
            wanted = 'weights must be .safetensors files in the same folder'
            raise UserError(f'the index or config.json of {name!r} names {shard[:100]!r}: {wanted}')
    if os.path.isdir(name) and not any(Path(name).glob('*.safetensors')):
        pickle = 'a pickle, which can run any code when it is read'
        raise UserError(f'{name!r} has no .safetensors file: convert it where you trust it, if it has {pickle}')


def is_classifier(config):
    """Whether a config is that of a sequence classifier, such as a reward model."""
    return (config.architectures or [''])[0].endswith('ForSequenceClassification')


def check_reward(name, config, tokenizer, new_head):
    """Refuse what is no reward model that can be read here. new_head: a language model will do."""
    wrong = None
    if not is_classifier(config):
        wrong = None if new_head else 'is no reward model but a language model: train one from it with reward.py'
    elif config.num_labels != 1:
        wrong = f'has {config.num_labels} outputs; a reward model has one'
    elif config.get_text_config().pad_token_id == tokenizer.eos_token_id:
        wrong = 'pads with its end of text, before which it was read: train it further with another pad_token_id in its config.json'
    if wrong:
        raise UserError(f'{name!r} {wrong}')
