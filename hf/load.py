"""Load models and tokenizers from a hub id, a local folder, or 'toy'. Unusable ones raise UserError."""

import contextlib
import copy
import functools
import json
import logging
import os
import re
from pathlib import Path

import torch
import transformers
from huggingface_hub import get_local_safetensors_metadata

from configurator import UserError, main_rank
from hf import lora
from hf.attention import register_attention
from hf.parts import core
from hf.ties import correct_tie_config
from runtime import hub
from runtime.files import file_hash, say_once
from runtime.values import MODELS, NO_MODEL
from text import toy

# parts of transformers warnings to hide; this file and probe.py report whatever matters to the user
HARMLESS = (
    'LOAD REPORT',
    'The tied weights mapping and config for this model',
    'does not support setting its attention implementation dynamically',
    'without finding the associated sub-model',
    'generation flags are not valid and may be ignored',
    'sequence length is longer than the specified maximum',
    'right-padding was detected',  # in the cache of a prompt of one token
)
# caches of _read_config, by model name: the export at the end of a run needs them again, and the folder may be gone by then
_configs = {}
_generation_configs = {}


def concerns_user(record):
    """Return whether to show a transformers log record: only on the main rank, and not if it matches HARMLESS."""
    return main_rank() and not any(part in record.getMessage() for part in HARMLESS)


for handler in logging.getLogger('transformers').handlers:
    handler.addFilter(concerns_user)
transformers.utils.logging.disable_progress_bar()


def as_user_error(load_fn):
    """Decorate load_fn(name, ...) to turn any library exception into a one-line UserError that names the model."""

    @functools.wraps(load_fn)
    def wrapper(name, *args, **options):
        try:
            return load_fn(name, *args, **options)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f'cannot load the model {name!r}: {hub.first_line(error)}') from None

    return wrapper


@as_user_error
def load_model(name, *, tokenizer=None, adapters=None, grow=False, **options):
    """Load a causal LM, or a LoRA adapter with its base model, on the CPU, in float32 and eval mode. Raises UserError.

    tokenizer: one with ids beyond the model's embedding is a UserError; with grow=True, these ids get new rows instead
    adapters: from lora.adapter_options(), to train adapters; None to train the model, with a saved adapter merged
    options: empty (no weights, on the meta device), trust_remote_code, seed (of new weights), device_map"""
    saved, base = lora.adapter_and_base(name)
    config = _read_config(base, **options)
    if _is_classifier(config, base) or (saved and saved.is_reward):
        raise UserError(f'{name!r} is a reward model: a language model is needed here')
    model = _make_model(transformers.AutoModelForCausalLM, base, config, **options)
    if _generation_configs.get(base):  # set by _read_config
        model.generation_config = copy.deepcopy(_generation_configs[base])
    # the config may tie head and embedding although the file has both. An empty model has read no file
    if not options.get('empty') and correct_tie_config(model):
        say_once(f'note: {base!r} has a head of its own, although its config ties head and embedding: the head is kept')
    # before adding rows, as saved adapters have the shapes of the file
    model = lora.adapt(model, saved, adapters, **options)
    if grow:
        _add_rows(model, len(tokenizer))
    if tokenizer is not None:
        check_tokenizer(tokenizer, model, name)
    return model


def _add_rows(model, n_tokens):
    """Let a causal LM, in place, embed and predict at least n_tokens tokens. New rows are the mean of the old ones."""
    old_rows = core(model).get_input_embeddings().num_embeddings
    model.resize_token_embeddings(max(n_tokens, old_rows), mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for p in layer.parameters():  # weight and, of some heads, bias
            p.data[old_rows:] = p.data[:old_rows].mean(0)


@as_user_error
def load_reward(name, tokenizer, *, new_head=False, adapters=None, **options):
    """Load a sequence classifier with one output on the CPU, in float32 and eval mode. Raises UserError.

    tokenizer: as from separate_pad(). new_head: accept a causal LM, too, and replace its head. adapters, options: as for load_model"""
    saved, base = lora.adapter_and_base(name)
    config = _read_config(base, **options)
    is_lm = not _is_classifier(config, base)
    # the adapter of a reward model has the head that its base model, a language model, lacks
    has_head = not is_lm or (saved and saved.is_reward)
    if not (has_head or new_head):
        raise UserError(f'{name!r} is no reward model but a language model: train one from it with reward.py')
    if not is_lm:
        _check_classifier(name, config, tokenizer)
    config.num_labels = 1
    text_config = config.get_text_config()
    # separate_pad may have added a pad token, with the first id behind all others: the embedding needs a row more for it
    old_rows = text_config.vocab_size
    pad_id = tokenizer.pad_token_id
    needs_pad_row = pad_id == old_rows == len(tokenizer) - 1
    # from_pretrained rejects a pad id without a row, so it is set after loading; the toy model has the row
    text_config.pad_token_id = pad_id if name == 'toy' else None
    # a language model gets a random head; that of a reward model's adapter takes its place in lora.adapt()
    model = _make_model(transformers.AutoModelForSequenceClassification, base, config, is_lm=is_lm, **options)
    if needs_pad_row:
        embedding = model.resize_token_embeddings(old_rows + 1, mean_resizing=False)
        embedding.weight.data[old_rows:] = 0.0
    # not text_config: the model holds its own copy of the config
    model.config.get_text_config().pad_token_id = pad_id
    check_tokenizer(tokenizer, model, name)
    if not hasattr(model, 'score'):
        raise UserError(f'{type(model).__name__} has no head of the name score: it cannot be a reward model here')
    if not has_head and not options.get('empty'):
        added = f'a new scalar head, drawn from seed {options.get("seed", 0)}'
        if needs_pad_row:
            added += f', and one row more for the pad token {tokenizer.pad_token}'
        say_once(f'a reward model from the language model {name!r}: {added}')
    return lora.adapt(model, saved, adapters, **options)


def _check_classifier(name, config, tokenizer):
    """Raise UserError unless the config of a sequence classifier is that of a reward model."""
    if config.architectures and config.num_labels != 1:  # a config without architectures may lack num_labels, too
        raise UserError(f'{name!r} has {config.num_labels} outputs; a reward model has one')
    # transformers reads the score at the last token that is not the pad token: here, not at the end of text
    if config.get_text_config().pad_token_id == tokenizer.eos_token_id:
        problem = 'pads with its end of text, and was read one token before that: train it on with another pad_token_id'
        raise UserError(f'{name!r} {problem}')


def _read_config(name, *, trust_remote_code=False, empty=False, **_others):
    """Return a copy of a model's config. Fills _configs and _generation_configs. Raises UserError if the model is unusable."""
    if name == 'toy':
        return toy.model_config()
    # a folder may have changed since it was read; a hub id, or a folder that is gone, stays as it was read first.
    # An empty model is for the export of one that was loaded before: it has the config that was read for that one
    may_have_changed = os.path.exists(name) and not empty
    if name in _configs and not may_have_changed:
        return copy.deepcopy(_configs[name])
    hub.check_exists(name)
    if os.path.isdir(name) and not os.path.exists(f'{name}/config.json'):
        raise UserError(f'{name!r} has no config.json, so it is no model folder: name another, or fetch it again')
    if not trust_remote_code:
        _check_code(name)
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if getattr(config, 'quantization_config', None):
        kind = dict(config.quantization_config).get('quant_method', 'bitsandbytes')
        way_out = 'name the model they were made from, or a copy of model.dequantize()'
        raise UserError(f'{name!r} holds quantised weights ({kind}), which do not train here: {way_out}')
    _configs[name] = config
    _generation_configs[name] = _read_generation_config(name)
    return copy.deepcopy(config)


def _read_generation_config(name):
    """Return a model's GenerationConfig, such that the export can save it; None if transformers finds none or cannot parse it."""
    try:
        config = transformers.GenerationConfig.from_pretrained(name)
    except (OSError, TypeError, ValueError):
        return None
    if isinstance(config.pad_token_id, int) and config.pad_token_id < 0:  # some models use -1 for no pad token
        config.pad_token_id = None
    try:
        config.validate(strict=True)
        return config
    except (TypeError, ValueError):
        say_once(f'note: the generation config of {name!r} contradicts itself: only its token ids are kept')
        token_ids = {key: getattr(config, key) for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
        return transformers.GenerationConfig(**token_ids)


def _make_model(auto, name, config, *, is_lm=False, empty=False, trust_remote_code=False, seed=0, device_map=None):
    """Create a model by a transformers auto class and load its weights. Raises UserError if some are missing or out of room.

    is_lm: make a reward model of a language model: no LM head, but a score head, drawn from seed. empty: on the meta device."""
    register_attention()
    options = {'dtype': torch.float32, 'trust_remote_code': trust_remote_code}
    context = torch.device('meta') if empty else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), context:
        torch.manual_seed(seed)
        if empty or name == 'toy':
            model = auto.from_config(config, **options)
        else:
            _check_files(name, config)
            options |= {'use_safetensors': True, 'output_loading_info': True, 'device_map': device_map}
            options |= {'ignore_mismatched_sizes': True}  # lists them as mismatched_keys, for our own message
            model, info = auto.from_pretrained(name, config=config, **options)
            _check_loaded(name, info, is_lm)
    # device_map offloads to the CPU or the disk (meta tensors) what the GPUs cannot hold
    offload_devices = {'cpu', 'meta'} if torch.cuda.is_available() else {'meta'}
    if device_map and offload_devices & {p.device.type for p in model.parameters()}:
        raise UserError(f'the model {name!r} does not fit on the GPUs of this machine with device_map={device_map}')
    return model


def _check_loaded(name, info, gets_new_head):
    """Raise UserError if weights are missing or of another shape, and note those that are not used. info: from_pretrained's account."""
    for key, in_file, in_config in sorted(info['mismatched_keys']):  # the first, if there is one
        shapes = f'{key} is {tuple(in_file)} in the file and {tuple(in_config)} by its config.json'
        raise UserError(f'{name!r} has weights of other shapes than its config says: {shapes}')
    missing = sorted(info['missing_keys'])
    unexpected = sorted(info['unexpected_keys'])
    if gets_new_head:
        # a language model's file: as intended, it lacks score.weight, and its LM head is not used; the rest is of numbered layers
        missing = [key for key in missing if not key.startswith('score.')]
        unexpected = [key for key in unexpected if re.search(r'\.\d+\.', f'.{key}')]
    if missing:
        raise UserError(f'{name!r} lacks weights: {", ".join(missing[:3])}')
    if unexpected:
        some = ', '.join(unexpected[:3])
        say_once(f'note: weights in {name!r} that its config has no layer for are not used ({len(unexpected)}): {some}')


def _is_classifier(config, name):
    """Return whether a model is a sequence classifier: by its config or, if that names no architecture, by its weights."""
    if config.architectures:
        return config.architectures[0].endswith('ForSequenceClassification')
    if name == 'toy':  # has no files
        return False
    # the index of sharded weights, which may not have been downloaded yet
    weights = hub.read_dict(name, 'model.safetensors.index.json').get('weight_map')
    if not weights:
        metadata = _weights_on_disk(name)
        weights = metadata.weight_map if metadata else {}
    return 'score.weight' in weights


def _check_code(name):
    """Raise UserError if a model's config files request custom code or an attention kernel from the hub."""

    def check(options, file):
        for key, value in options.items():
            # auto_map: {'AutoModelForCausalLM': 'FILE.CLASS' in the model's folder}
            code = 'code of its own' if key == 'auto_map' and value else None
            # transformers takes an attn_implementation with a slash for the hub id of a kernel
            if key.endswith('_implementation') and '/' in json.dumps(value):
                code = f'{key} {value!r}, a kernel from the hub'
            if code:
                raise UserError(f'{name!r} comes with {code} ({file}): read it, then run it with --trust_remote_code')
            if isinstance(value, dict):
                check(value, file)

    for file in ('config.json', 'tokenizer_config.json'):
        check(hub.read_dict(name, file), file)


def _check_files(name, config):
    """Raise UserError unless all weights of a model are .safetensors files directly in its folder."""
    # the config may name a file: the weights, or their index, {'weight_map': {name of a weight: its file}}
    file_in_config = getattr(config, 'transformers_weights', None)
    index = file_in_config if str(file_in_config).endswith('.json') else 'model.safetensors.index.json'
    files = list(hub.read_dict(name, index).get('weight_map', {}).values())
    if file_in_config:
        files.insert(0, file_in_config)
    for file in map(str, files):  # reject paths, which could point outside the folder
        if not re.fullmatch(r'[^/\\]+\.safetensors(\.index\.json)?', file):
            source = f'the index or config.json of {name!r} names {file[:100]!r}'
            raise UserError(f'{source}: weights must be .safetensors files in the same folder')
    # without such files transformers would read a pickle, or ask a bot to convert the hub's repository
    if os.path.isdir(name):
        has_weights = any(Path(name).glob('*.safetensors'))
        has_pickle = any(Path(name).glob('*.bin')) or any(Path(name).glob('*.pt*'))
    else:
        # if the hub cannot be reached, from_pretrained will say whether its cache has them
        has_weights = files or not hub.reachable() or hub.has_file(name, 'model.safetensors')
        has_pickle = True
    if not has_weights:
        way_out = 'convert it from a pickle, which can run any code' if has_pickle else 'fetch its weights'
        raise UserError(f'{name!r} has no .safetensors file: {way_out}')


def add_value_head(model, critic=None):
    """Add a trainable value estimator to a causal LM and return it. critic: a reward model; None: a zero linear head."""
    inner = core(model)
    # the name of the submodule to add; rl/heads.py looks for one of these two
    inner.value_estimator = 'value_head' if critic is None else 'critic'
    if critic is None:
        weight = inner.get_output_embeddings().weight  # (vocabulary, hidden size)
        critic = torch.nn.Linear(weight.shape[1], 1, device=weight.device)
        for p in critic.parameters():
            torch.nn.init.zeros_(p)
    setattr(inner, inner.value_estimator, critic)
    return model


@contextlib.contextmanager
def without_value_head(model):
    """Within the block, the model lacks what add_value_head may have added, so that it is exported as a plain causal LM."""
    inner = core(model)
    name = getattr(inner, 'value_estimator', None)  # set by add_value_head
    added = inner._modules.pop(name, None)
    try:
        yield
    finally:
        if added is not None:
            inner._modules[name] = added


def load_tokenizer(name, trust_remote_code=False):
    """Return a tokenizer; for an adapter without one, the tokenizer of its base model. Raises UserError."""
    if name == 'toy':
        return toy.tokenizer()
    adapter, base = lora.adapter_and_base(name)
    # of an adapter on the hub, adapter.folder has only files that have been asked for: file_of asks for this one
    has_tokenizer = adapter and (hub.file_of(name, 'tokenizer_config.json') or any(adapter.folder.glob('*token*')))
    if not has_tokenizer:
        name = base
    hub.check_exists(name)
    if not trust_remote_code:
        _check_code(name)
    # transformers would read a chat template of any size into memory
    for file in Path(name).rglob('*.jinja'):
        size = file.stat().st_size
        if size > 4_000_000:
            raise UserError(f'{file} has {size:,} bytes, the limit is 4,000,000: is it a chat template?')
    # a missing tokenizer raises OSError, ValueError, KeyError or exceptions of the tokenizers library
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f'no tokenizer in {name!r} ({hub.first_line(error)}): it needs a tokenizer.json') from None
    # of a folder without its files, transformers makes a tokenizer that reads every text as nothing
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise UserError(f'no tokenizer in {name!r} (it has no words but special ones): it needs a tokenizer.json')
    # where the hub fails for a moment, transformers goes on without the template
    lacks_template = tokenizer.chat_template is None and not os.path.isdir(name)
    if lacks_template and hub.reachable() and hub.has_file(name, 'chat_template.jinja'):
        raise UserError(f'the chat template of {name!r} did not come from the hub: start again')
    if tokenizer.eos_token_id is None:
        raise UserError(f'the tokenizer of {name!r} has no end of text: set eos_token in its tokenizer_config.json')
    return tokenizer


def separate_pad(tokenizer):
    """Return a tokenizer with right padding and a pad token other than its EOS, changed in place, as reward models need it."""
    # transformers reads the score at the last token that is no padding: that has to be the EOS
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({'pad_token': '<|pad|>'})
    tokenizer.padding_side = 'right'
    return tokenizer


def check_tokenizer(tokenizer, model, name):
    """Raise UserError if the tokenizer has ids without a row in the model's embedding. name: the model's, for messages."""
    rows = core(model).get_input_embeddings().num_embeddings
    size = len(tokenizer)
    if size > rows:
        last = f'the last, {tokenizer.convert_ids_to_tokens(size - 1)}, has no row'
        way_out = 'remove such tokens, or use model.resize_token_embeddings and save_pretrained'
        raise UserError(f'the tokenizer has {size} ids but the model {name!r} embeds {rows}; {last}: {way_out}')


def check_same_tokens(tokenizer, other, other_role, policy_name, trust_remote_code=False):
    """Raise UserError if another model's tokenizer lacks a token of the policy's tokenizer, or gives it another id.

    other: that tokenizer, or the model's name. For messages: policy_name; other_role, such as 'the reference NAME'."""
    if isinstance(other, str):
        if other == policy_name:
            return
        lacks_tokenizer = Path(other).is_dir() and not any(Path(other).glob('*token*'))
        # but load_tokenizer finds one for an adapter, that of its base model
        if lacks_tokenizer and not lora.find_adapter(other):
            say_once(f'note: {other_role} comes without a tokenizer: it must read the tokens of {policy_name}')
            return
        other = load_tokenizer(other, trust_remote_code)
    other_ids = other.get_vocab()  # extra tokens of the other model do no harm
    wrong = [token for token, i in tokenizer.get_vocab().items() if other_ids.get(token) != i]
    if wrong:
        differences = f'such as {wrong[0]!r} ({len(wrong)} in all); both need the same tokenizer'
        raise UserError(f'{other_role} reads other tokens than the model {policy_name} writes: {differences}')


def _weights_on_disk(name):
    """Return what the headers of a model's .safetensors files say (weight_map, parameter_count ...), or None."""
    file = hub.file_of(name, 'model.safetensors') or hub.file_of(name, 'model.safetensors.index.json')
    return get_local_safetensors_metadata(Path(file).parent) if file else None


def stored_dtype(name):
    """Return the dtype of most weights on disk: 'bfloat16', 'float16', or else 'float32', also if there is no file."""
    _saved, base = lora.adapter_and_base(name)
    metadata = _weights_on_disk(base)
    if metadata is None:
        return 'float32'
    counts = metadata.parameter_count  # count weights, not tensors: the many small norms often have another dtype
    most_common = max(counts, key=counts.get)
    return {'BF16': 'bfloat16', 'F16': 'float16'}.get(most_common, 'float32')


def fingerprints(config):
    """Return {option: model_hashes()} of all models that a run's config names, to detect changes on resume."""
    hashes_of = {}
    for option in MODELS:  # model, ref_model, ...
        name = config.get(option)
        if name in NO_MODEL:  # None, 'toy' ...
            continue
        hashes = model_hashes(name)
        if hashes or os.path.isdir(name):  # a folder with no file to hash is recorded, too, as {}
            hashes_of[option] = hashes
    # the models in a sum, --reward='DIR1 + DIR2*0.5', are listed by rl/reward_functions.py: {'reward': {'DIR1/FILE': hash, ...}}
    names = [name for name in getattr(config, 'reward_models', ()) if name not in NO_MODEL]
    hashes = {f'{name}/{file}': digest for name in names for file, digest in model_hashes(name).items()}
    if hashes:
        hashes_of['reward' if config.get('reward') else 'reward_model'] = hashes
    return hashes_of


def model_hashes(name):
    """Return {file: SHA-256} of a model's folder, or of what has been loaded of a hub id. An adapter's base model: base/FILE."""
    folder = hub.folder_of(name)
    # the files that define a model; in the cache of the hub, only those that load_model reads, as other programs may fetch more
    pattern = r'.+\.(safetensors|json|model|txt|jinja|py)'
    if not os.path.isdir(name):
        pattern = r'(adapter_)?(config\.json|model.*\.safetensors)|.+\.py'
    hashes = {}
    for file in sorted(folder.iterdir()) if folder else []:
        if re.fullmatch(pattern, file.name) and file.is_file():
            hashes[file.name] = file_hash(file)
    saved, base = lora.adapter_and_base(name)
    if saved:
        hashes |= {f'base/{file}': digest for file, digest in model_hashes(base).items()}
    return hashes
