"""From a hub id or a folder to a model and its tokenizer. All raise UserError.

Whether a loaded model suits packing and a run's lengths is in probe.py."""

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
from hf.ties import describe_ties
from model import core, register_attention
from runtime import hub
from runtime.files import file_hash, say_once
from runtime.values import MODELS, NO_MODEL
from text import toy

# parts of what transformers warns of and no user need know: where it matters, this file or probe.py says it
HARMLESS = (
    'LOAD REPORT',
    'The tied weights mapping and config for this model',
    'does not support setting its attention implementation dynamically',
    'without finding the associated sub-model',
    'generation flags are not valid and may be ignored',
    'sequence length is longer than the specified maximum',
)


def concerns_user(record):
    """Whether a message of transformers, a LogRecord, is to be shown."""
    return main_rank() and not any(part in record.getMessage() for part in HARMLESS)


transformers.utils.logging.get_logger()  # now its root has the handler that writes
for handler in logging.getLogger('transformers').handlers:
    handler.addFilter(concerns_user)
transformers.utils.logging.disable_progress_bar()

# ---- from a name to a model ----


def one_sentence(load):
    """Whatever a library raises in a function of a model's name becomes a UserError."""

    @functools.wraps(load)
    def loaded(name, *args, **options):
        try:
            return load(name, *args, **options)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f'cannot load the model {name!r}: {hub.first_line(error)}') from None

    return loaded


@one_sentence
def load_model(name, *, tokenizer=None, adapters=None, grow=False, **how):
    """Load a causal LM in float32 and eval mode (dropout off), on the CPU. Raises UserError.

    name: a hub id, a folder, or 'toy'; tokenizer: its ids must not go beyond the model's, unless the model shall grow;
    adapters: None, or lora.options; how: empty, trust_remote_code, seed and device_map, as in _make."""
    saved, base = lora.adapter_and_base(name)
    config = _read_config(base, **how)
    if _is_classifier(config) or (saved and saved.scores):
        raise UserError(f'{name!r} is a reward model: a language model is needed here')
    model = _make(transformers.AutoModelForCausalLM, base, config, **how)
    if _generation.get(base):
        model.generation_config = copy.deepcopy(_generation[base])
    if not how.get('empty') and describe_ties(model):
        own = 'its head is its embedding, but its file has a head of its own'
        say_once(f'note: the config of {base!r} says that {own}: that is used, and the exported config says so')
    model = lora.adapt(model, saved, adapters, **how)
    if grow:
        _grow(model, len(tokenizer))
    if tokenizer is not None:
        check_tokenizer(tokenizer, model, name)
    return model


@one_sentence
def load_reward(name, tokenizer, *, new_head=False, adapters=None, **how):
    """Load a reward model, a transformers sequence classifier with one output, in float32 and eval mode, on the CPU.

    new_head: a causal LM will do, whose head gives way to a scalar one; tokenizer: with a separate pad token, for which the
    embedding grows by a row if need be; the rest as in load_model. Raises UserError."""
    saved, base = lora.adapter_and_base(name)
    config = _read_config(base, **how)
    trained = _is_classifier(config)
    has_head = trained or bool(saved and saved.scores)
    _check_reward(name, config, tokenizer, new_head or has_head)
    config.num_labels = 1

    # one row more for a pad token that is new, unless there is a spare one; while a file is read, neither
    text = config.get_text_config()
    old, pad = text.vocab_size, tokenizer.pad_token_id
    rows = old + (pad == old == len(tokenizer) - 1)
    drawn = how.get('empty') or name == 'toy'
    text.vocab_size, text.pad_token_id = (rows, pad) if drawn else (old, None)
    model = _make(transformers.AutoModelForSequenceClassification, base, config, not trained, **how)
    if not drawn and rows > old:
        model.resize_token_embeddings(rows, mean_resizing=False).weight.data[old:] = 0.0
    model.config.get_text_config().pad_token_id = pad  # a copy of the config above
    check_tokenizer(tokenizer, model, name)
    if not hasattr(model, 'score'):
        raise UserError(f'{type(model).__name__} has no head of the name score: it cannot be a reward model here')
    if not has_head and not how.get('empty'):
        what = f'a new scalar head, drawn from seed {how.get("seed", 0)}'
        what += f', and one row more for the pad token {tokenizer.pad_token}' if rows > old else ''
        say_once(f'a reward model from the language model {name!r}: {what}')
    return lora.adapt(model, saved, adapters, **how)


# by name: the export at the end of a run needs them, and the folder may be gone by then
_read, _generation = {}, {}


def _read_config(name, *, trust_remote_code=False, **_others):
    """The config of a hub id, a folder or 'toy', for the caller to change; how it wants to be sampled from is in _generation."""
    if name == 'toy':
        return toy.model_config()
    if os.path.exists(name) or name not in _read:
        hub.check_there(name)
        if not trust_remote_code:
            _check_code(name)
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if getattr(config, 'quantization_config', None):
            kind = dict(config.quantization_config).get('quant_method', 'bitsandbytes')
            way = 'name the model that they were made from, or a copy of model.dequantize()'
            raise UserError(f'{name!r} holds quantised weights ({kind}), which do not train here: {way}')
        _read[name], _generation[name] = config, None
        # a model may have none, or one that the library does not take: from_pretrained passes it over, too
        with contextlib.suppress(OSError, TypeError, ValueError):
            found = transformers.GenerationConfig.from_pretrained(name)
            # of one that can be read, but not written again, its tokens
            tokens = {k: getattr(found, k) for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
            _generation[name] = transformers.GenerationConfig(**tokens)
            found.validate(strict=True)
            _generation[name] = found
    return copy.deepcopy(_read[name])


def _make(auto, name, config, new_head=False, *, empty=False, trust_remote_code=False, seed=0, device_map=None):
    """A model, read from its file; what is not in it is drawn from seed.

    new_head: the file has another head; empty: no weights, on the meta device; device_map: None, or how from_pretrained spreads
    the model over this process's GPUs."""
    register_attention()
    options = {'dtype': torch.float32, 'trust_remote_code': trust_remote_code}
    place = torch.device('meta') if empty else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), place:
        torch.manual_seed(seed)
        if empty or name == 'toy':
            model, info = auto.from_config(config, **options), {'missing_keys': (), 'unexpected_keys': ()}
        else:
            _check_files(name, config)
            options |= {'use_safetensors': True, 'output_loading_info': True, 'device_map': device_map}
            model, info = auto.from_pretrained(name, config=config, **options)
    outside = {'cpu', 'meta'} if torch.cuda.is_available() else {'meta'}
    if device_map and outside & {p.device.type for p in model.parameters()}:
        raise UserError(f'the model {name!r} does not fit on the GPUs of this machine with device_map={device_map}')

    # of a language model, the head is what is not in a numbered block
    lacking = {key for key in info['missing_keys'] if not (new_head and key.startswith('score.'))}
    unused = {key for key in info['unexpected_keys'] if not new_head or re.search(r'\.\d+\.', f'.{key}')}
    if lacking:
        raise UserError(f'{name!r} lacks weights: {", ".join(sorted(lacking)[:3])}')
    if unused:
        some = ', '.join(sorted(unused)[:3])
        say_once(f'note: {len(unused)} weights in {name!r} are not used, for its config has no place for them: {some}')
    return model


# ---- what is refused ----


def _is_classifier(config):
    return (config.architectures or [''])[0].endswith('ForSequenceClassification')


def _check_reward(name, config, tokenizer, new_head):
    """Refuse what is no reward model that can be read here. new_head: a language model will do."""
    wrong = None
    if not _is_classifier(config):
        wrong = None if new_head else 'is no reward model but a language model: train one from it with reward.py'
    elif config.num_labels != 1:
        wrong = f'has {config.num_labels} outputs; a reward model has one'
    elif config.get_text_config().pad_token_id == tokenizer.eos_token_id:
        wrong = 'pads with its end of text, and was read one token before that: train it on with another pad_token_id in its config'
    if wrong:
        raise UserError(f'{name!r} {wrong}')


def _check_code(name):
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
        look(hub.read_dict(name, file))


def _check_files(name, config):
    """Refuse weights that are not safetensors files right in the folder: pickles can run code, others are somebody else's."""
    named = getattr(config, 'transformers_weights', None)
    index = named if str(named).endswith('.json') else 'model.safetensors.index.json'
    shards = list(hub.read_dict(name, index).get('weight_map', {}).values())
    for shard in map(str, [named, *shards] if named else shards):
        if not re.fullmatch(r'[^/\\]+\.safetensors(\.index\.json)?', shard):
            wanted = 'weights must be .safetensors files in the same folder'
            raise UserError(f'the index or config.json of {name!r} names {shard[:100]!r}: {wanted}')
    if os.path.isdir(name) and not any(Path(name).glob('*.safetensors')):
        pickle = 'a pickle, which can run any code when it is read'
        raise UserError(f'{name!r} has no .safetensors file: convert it where you trust it, if it has {pickle}')


# ---- what is new in a model ----


def add_value_head(model, critic=None):
    """Give a causal LM what estimates values for token_logps: a scalar head, zero at first, or critic, a whole reward model.

    Both train, whatever else of the model does."""
    inner = core(model)
    if critic is not None:
        inner.critic = critic
        return model
    weight = inner.get_output_embeddings().weight
    inner.value_head = torch.nn.Linear(weight.shape[1], 1, device=weight.device)
    for p in inner.value_head.parameters():
        torch.nn.init.zeros_(p)
    return model


def drop_value_head(model):
    """Take away again what add_value_head gave, so that the model can be exported as the causal LM that it is."""
    for name in {'critic', 'value_head'} & core(model)._modules.keys():
        delattr(core(model), name)


@torch.no_grad()
def _grow(model, size):
    """At least this many rows of the embedding and of the head, new ones with the mean of the old."""
    old = core(model).get_input_embeddings().num_embeddings
    model.resize_token_embeddings(max(size, old), mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for rows in layer.parameters():
            rows[old:] = rows[:old].mean(0)


# ---- tokenizers ----


def load_tokenizer(name, trust_remote_code=False):
    """Load the tokenizer of a hub id, a folder, or 'toy'. Raises UserError."""
    if name == 'toy':
        return toy.tokenizer()
    saved, base = lora.adapter_and_base(name)
    if not saved or not list(saved.folder.glob('*token*')):
        name = base
    hub.check_there(name)
    if not trust_remote_code:
        _check_code(name)
    # they are read whole
    for file in Path(name).rglob('*.jinja'):
        if (size := file.stat().st_size) > LONGEST_TEMPLATE:
            raise UserError(
                f'{file} has {size:,} bytes, and {LONGEST_TEMPLATE:,} are the limit: is it a chat template?'
            )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises OSError, ValueError, KeyError and its own for a missing tokenizer
        whole = 'beside the model there must be a whole tokenizer.json'
        raise UserError(f'no tokenizer in {name!r} ({hub.first_line(error)}): {whole}') from None
    if tokenizer.eos_token_id is None:
        raise UserError(f'the tokenizer of {name!r} has no end of text: set eos_token in its tokenizer_config.json')
    return tokenizer


def separate_pad(tokenizer):
    """Give the tokenizer a pad token that is not its end of text, on the right.

    transformers reads a score at the last token that is not padding, and that must be the end of text."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({'pad_token': '<|pad|>'})
    tokenizer.padding_side = 'right'
    return tokenizer


def check_tokenizer(tokenizer, model, name):
    """Raise UserError where the tokenizer can produce ids that the model has no embedding for."""
    rows = core(model).get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        last = f'the last, {tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)}, has no row'
        way = 'take such tokens out, or give them rows by model.resize_token_embeddings and save_pretrained'
        raise UserError(f'the tokenizer has {len(tokenizer)} ids but the model {name!r} embeds {rows}; {last}: {way}')


def check_same_tokens(tokenizer, other, what, model, trust_remote_code=False):
    """Raise UserError where ids that the tokenizer of model writes mean other tokens to a reference, critic or reward model.

    other: its tokenizer, or its name, of a folder that may lack one; what: how to call it."""
    if isinstance(other, str):
        if other == model:
            return
        if Path(other).is_dir() and not list(Path(other).glob('*token*')) and not lora.find(other):
            return say_once(f'note: {what} comes without a tokenizer: it must read the tokens of {model}')
        other = load_tokenizer(other, trust_remote_code)
    known = other.get_vocab()
    wrong = [token for token, i in tokenizer.get_vocab().items() if known.get(token) != i]
    if wrong:
        found = f'{what} reads other tokens than the model {model} writes: {len(wrong)} differ, such as {wrong[0]!r}'
        raise UserError(f'{found}: name one with the same tokenizer')


# ---- what a model folder holds ----

LONGEST_TEMPLATE = 4_000_000  # bytes of a chat template's file
# the files that decide what a folder holds
DECISIVE = ('.safetensors', '.json', '.model', '.txt', '.jinja', '.py')


def kept_in(name):
    """What most weights of a model's file are: 'float32', 'bfloat16' or 'float16'."""
    _, base = lora.adapter_and_base(name)
    file = hub.file_of(base, 'model.safetensors') or hub.file_of(base, 'model.safetensors.index.json')
    if file is None:
        return 'float32'
    weights = get_local_safetensors_metadata(Path(file).parent).parameter_count
    return {'BF16': 'bfloat16', 'F16': 'float16'}.get(max(weights, key=weights.get), 'float32')


def fingerprints(config):
    """Hash the models that options name: option -> {file: SHA-256}, or {'commit': hash} for a hub id that has been loaded."""
    found = {}
    for option in MODELS:
        name = config.get(option)
        if name in NO_MODEL:
            continue
        # an adapter has files of its own, and those of its model
        saved, base = lora.adapter_and_base(name)
        hashes = _hashes(saved.folder) | _hashes(base, 'base/') if saved else _hashes(name)
        if hashes or os.path.isdir(name):
            found[option] = hashes
    return found


def _hashes(place, prefix=''):
    """name -> hash of each file of a folder that decides what it holds, or of the commit of a hub id."""
    if os.path.isdir(place):
        files = [file for file in sorted(Path(place).iterdir()) if file.suffix in DECISIVE and file.is_file()]
        return {prefix + file.name: file_hash(file) for file in files}
    commit = getattr(_read.get(place), '_commit_hash', None)
    return {f'{prefix}commit': commit} if commit else {}
