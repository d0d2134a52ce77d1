"""Load models and tokenizers by name: a hub id, a folder, or 'toy'. Those that cannot be used raise UserError.

Whether a loaded model suits packing and a run's lengths is checked afterwards, in probe.py."""

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

# parts of warnings of transformers that need not reach the user: where they matter, this file or probe.py says so
HARMLESS = (
    'LOAD REPORT',
    'The tied weights mapping and config for this model',
    'does not support setting its attention implementation dynamically',
    'without finding the associated sub-model',
    'generation flags are not valid and may be ignored',
    'sequence length is longer than the specified maximum',
)


def concerns_user(record):
    """Return whether to show a message (a logging.LogRecord) of transformers: if it is not HARMLESS, and on one rank only."""
    return main_rank() and not any(part in record.getMessage() for part in HARMLESS)


# the first logger that is asked for adds the handler that writes
transformers.utils.logging.get_logger()
for handler in logging.getLogger('transformers').handlers:
    handler.addFilter(concerns_user)
transformers.utils.logging.disable_progress_bar()

# ---- from a name to a model ----


def one_sentence(load):
    """Decorate a function of a model's name: every error of a library in it becomes a UserError of one sentence."""

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

    name: a hub id, a folder, or 'toy', of a model or of an adapter; tokenizer: refused if it has ids beyond the model's, or
    with grow the model gets rows for them; adapters: None, or what lora.options returns; how: empty, trust_remote_code, seed
    and device_map, as in _make_model."""
    saved, base = lora.adapter_and_base(name)
    config = _read_config(base, **how)
    if _is_classifier(config) or (saved and saved.scores):
        raise UserError(f'{name!r} is a reward model: a language model is needed here')
    model = _make_model(transformers.AutoModelForCausalLM, base, config, **how)
    if _generation_configs.get(base):
        model.generation_config = copy.deepcopy(_generation_configs[base])
    # describe_ties corrects a config that contradicts the file; an empty model has read no file
    if not how.get('empty') and describe_ties(model):
        own = 'its head is its embedding, but its file has a head of its own'
        say_once(f'note: the config of {base!r} says that {own}: that is used, and the exported config says so')
    # adapters first: a saved one that is merged fits the rows of the file
    model = lora.adapt(model, saved, adapters, **how)
    if grow:
        _grow(model, len(tokenizer))
    if tokenizer is not None:
        check_tokenizer(tokenizer, model, name)
    return model


@one_sentence
def load_reward(name, tokenizer, *, new_head=False, adapters=None, **how):
    """Load a reward model, a sequence classifier with one output, in float32 and eval mode, on the CPU. Raises UserError.

    tokenizer: as separate_pad returns it. new_head: a causal LM is taken, too, and gets a new head with one output in the
    place of its own. The rest as in load_model."""
    saved, base = lora.adapter_and_base(name)
    config = _read_config(base, **how)
    is_classifier = _is_classifier(config)
    has_head = is_classifier or bool(saved and saved.scores)
    _check_reward(name, config, tokenizer, takes_language_model=new_head or has_head)
    config.num_labels = 1

    # a pad token that separate_pad has added may be the one id that has no row in the embedding: it gets a row of zeros
    text_config = config.get_text_config()
    n_rows, pad = text_config.vocab_size, tokenizer.pad_token_id
    pad_lacks_row = pad == n_rows == len(tokenizer) - 1
    is_from_file = name != 'toy' and not how.get('empty')
    if is_from_file:
        # transformers refuses a pad token without a row, so the file is read without
        text_config.pad_token_id = None
    else:
        text_config.pad_token_id = pad
        text_config.vocab_size = n_rows + int(pad_lacks_row)
    model = _make_model(transformers.AutoModelForSequenceClassification, base, config, not is_classifier, **how)
    if is_from_file and pad_lacks_row:
        embedding = model.resize_token_embeddings(n_rows + 1, mean_resizing=False)
        embedding.weight.data[n_rows:] = 0.0
    # the model has a copy of the config above
    model.config.get_text_config().pad_token_id = pad
    check_tokenizer(tokenizer, model, name)
    if not hasattr(model, 'score'):
        raise UserError(f'{type(model).__name__} has no head of the name score: it cannot be a reward model here')
    if not has_head and not how.get('empty'):
        new = f'a new scalar head, drawn from seed {how.get("seed", 0)}'
        if pad_lacks_row:
            new += f', and one row more for the pad token {tokenizer.pad_token}'
        say_once(f'a reward model from the language model {name!r}: {new}')
    return lora.adapt(model, saved, adapters, **how)


# what was read, by name: the export at the end of a run needs it again, and the folder may be gone by then
_configs, _generation_configs = {}, {}


def _read_config(name, *, trust_remote_code=False, **_others):
    """Return a copy of the config of a hub id, a folder or 'toy'. It is remembered, and so is the generation config beside it."""
    if name == 'toy':
        return toy.model_config()
    if os.path.exists(name) or name not in _configs:
        hub.check_there(name)
        if not trust_remote_code:
            _check_code(name)
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if getattr(config, 'quantization_config', None):
            kind = dict(config.quantization_config).get('quant_method', 'bitsandbytes')
            way = 'name the model that they were made from, or a copy of model.dequantize()'
            raise UserError(f'{name!r} holds quantised weights ({kind}), which do not train here: {way}')
        _configs[name] = config
        _generation_configs[name] = _read_generation_config(name)
    return copy.deepcopy(_configs[name])


def _read_generation_config(name):
    """Return the GenerationConfig of a model, or None if it has none that transformers can read."""
    usable = None
    with contextlib.suppress(OSError, TypeError, ValueError):
        found = transformers.GenerationConfig.from_pretrained(name)
        # of one whose options contradict one another only the tokens are usable: the export could not write it again
        tokens = {key: getattr(found, key) for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
        usable = transformers.GenerationConfig(**tokens)
        found.validate(strict=True)
        usable = found
    return usable


def _make_model(auto, name, config, new_head=False, *, empty=False, trust_remote_code=False, seed=0, device_map=None):
    """Make a model of an auto class of transformers, with the weights of its file. Raises UserError where they do not fit it.

    new_head: the file is a language model's, whose head is not read; the new one is drawn from seed. empty: no weights, on
    the meta device. device_map: None, or how from_pretrained spreads the model over the GPUs of this process."""
    register_attention()
    options = {'dtype': torch.float32, 'trust_remote_code': trust_remote_code}
    device = torch.device('meta') if empty else contextlib.nullcontext()
    missing, unexpected = set(), set()
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(seed)
        if empty or name == 'toy':
            model = auto.from_config(config, **options)
        else:
            _check_files(name, config)
            options |= {'use_safetensors': True, 'output_loading_info': True, 'device_map': device_map}
            model, info = auto.from_pretrained(name, config=config, **options)
            missing, unexpected = set(info['missing_keys']), set(info['unexpected_keys'])
    # where the GPUs are too small, transformers puts the rest on the CPU, or leaves it on the disk
    outside = {'cpu', 'meta'} if torch.cuda.is_available() else {'meta'}
    if device_map and outside & {p.device.type for p in model.parameters()}:
        raise UserError(f'the model {name!r} does not fit on the GPUs of this machine with device_map={device_map}')

    # the file lacks a new head, and its old one, whose name has no number of a block, has no place any more
    if new_head:
        missing = {key for key in missing if not key.startswith('score.')}
        unexpected = {key for key in unexpected if re.search(r'\.\d+\.', f'.{key}')}
    if missing:
        raise UserError(f'{name!r} lacks weights: {", ".join(sorted(missing)[:3])}')
    if unexpected:
        unused = f'{len(unexpected)} weights in {name!r} are not used, for its config has no place for them'
        say_once(f'note: {unused}: {", ".join(sorted(unexpected)[:3])}')
    return model


# ---- what is refused ----


def _is_classifier(config):
    return (config.architectures or [''])[0].endswith('ForSequenceClassification')


def _check_reward(name, config, tokenizer, takes_language_model):
    """Raise UserError where a config is not of a reward model with one output, nor of a language model that is taken, too."""
    wrong = None
    if not _is_classifier(config):
        if not takes_language_model:
            wrong = 'is no reward model but a language model: train one from it with reward.py'
    elif config.num_labels != 1:
        wrong = f'has {config.num_labels} outputs; a reward model has one'
    # transformers reads the score at the last token that is not padding
    elif config.get_text_config().pad_token_id == tokenizer.eos_token_id:
        wrong = 'pads with its end of text, and was read one token before that: train it on with another pad_token_id in its config'
    if wrong:
        raise UserError(f'{name!r} {wrong}')


def _check_code(name):
    """Raise UserError where a model's config files ask for code: the model's own, or a kernel from the hub."""

    def check(options, file):
        for key, value in options.items():
            code = None
            if key == 'auto_map' and value:
                code = 'code of its own'
            # a slash in attn_implementation and its like: transformers takes it for the hub id of a kernel
            if key.endswith('_implementation') and '/' in json.dumps(value):
                code = f'{key} {value!r}, a kernel from the hub'
            if code:
                way = 'read it, and pass --trust_remote_code if you want it to run'
                raise UserError(f'{name!r} comes with {code} ({file}): {way}')
            if isinstance(value, dict):
                check(value, file)

    for file in ('config.json', 'tokenizer_config.json'):
        check(hub.read_dict(name, file), file)


def _check_files(name, config):
    """Raise UserError where a model's weights are not safetensors files right in its folder."""
    # a config may name the file of weights, or the index of several files
    named = getattr(config, 'transformers_weights', None)
    index = named if str(named).endswith('.json') else 'model.safetensors.index.json'
    files = list(hub.read_dict(name, index).get('weight_map', {}).values())
    if named:
        files.insert(0, named)
    # a path could lead out of the folder, to files of somebody else
    for file in map(str, files):
        if not re.fullmatch(r'[^/\\]+\.safetensors(\.index\.json)?', file):
            wanted = 'weights must be .safetensors files in the same folder'
            raise UserError(f'the index or config.json of {name!r} names {file[:100]!r}: {wanted}')
    # without such a file transformers would take a pickle
    if os.path.isdir(name) and not any(Path(name).glob('*.safetensors')):
        pickle = 'a pickle, which can run any code when it is read'
        raise UserError(f'{name!r} has no .safetensors file: convert it where you trust it, if it has {pickle}')


# ---- what is new in a model ----


def add_value_head(model, critic=None):
    """Let a causal LM estimate values, as ppo.py needs, and return it. What is added trains, even where the LM is frozen.

    critic: a whole reward model that estimates them, or None for a new linear head with one output, zero at first."""
    inner = core(model)
    # rl/heads.py looks for one of these two names
    if critic is not None:
        inner.critic = critic
        return model
    weight = inner.get_output_embeddings().weight
    inner.value_head = torch.nn.Linear(weight.shape[1], 1, device=weight.device)
    for p in inner.value_head.parameters():
        torch.nn.init.zeros_(p)
    return model


def drop_value_head(model):
    """Take away what add_value_head has added, so that the model can be exported as the causal LM that it is."""
    for name in {'critic', 'value_head'} & core(model)._modules.keys():
        delattr(core(model), name)


@torch.no_grad()
def _grow(model, size):
    """Give embedding and head at least size rows, in place. New rows are the mean of the old ones."""
    old_size = core(model).get_input_embeddings().num_embeddings
    model.resize_token_embeddings(max(size, old_size), mean_resizing=False)
    # of the head the bias as well
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for rows in layer.parameters():
            rows[old_size:] = rows[:old_size].mean(0)


# ---- tokenizers ----

# bytes of a chat template's file
LONGEST_TEMPLATE = 4_000_000


def load_tokenizer(name, trust_remote_code=False):
    """Return the tokenizer of a hub id, a folder, or 'toy'; of an adapter without one, that of its model. Raises UserError."""
    if name == 'toy':
        return toy.tokenizer()
    # an adapter may come with a tokenizer of its own, or with none
    saved, base = lora.adapter_and_base(name)
    adapter_has_tokenizer = saved is not None and any(saved.folder.glob('*token*'))
    if not adapter_has_tokenizer:
        name = base
    hub.check_there(name)
    if not trust_remote_code:
        _check_code(name)
    # chat templates are read into memory whole
    for file in Path(name).rglob('*.jinja'):
        size, limit = file.stat().st_size, LONGEST_TEMPLATE
        if size > limit:
            raise UserError(f'{file} has {size:,} bytes, and {limit:,} are the limit: is it a chat template?')
    # without a tokenizer the library raises OSError, ValueError, KeyError or errors of its own
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        wanted = 'beside the model there must be a whole tokenizer.json'
        raise UserError(f'no tokenizer in {name!r} ({hub.first_line(error)}): {wanted}') from None
    if tokenizer.eos_token_id is None:
        raise UserError(f'the tokenizer of {name!r} has no end of text: set eos_token in its tokenizer_config.json')
    return tokenizer


def separate_pad(tokenizer):
    """Give a tokenizer a pad token that is not its end of text, let it pad on the right, and return it.

    transformers reads a score at the last token that is not padding, and that must be the end of text."""
    # most language models come without a pad token, or name their end of text as one
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({'pad_token': '<|pad|>'})
    tokenizer.padding_side = 'right'
    return tokenizer


def check_tokenizer(tokenizer, model, name):
    """Raise UserError where the tokenizer has ids for which the model (called name) has no row in its embedding."""
    rows = core(model).get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        last = f'the last, {tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)}, has no row'
        way = 'take such tokens out, or give them rows by model.resize_token_embeddings and save_pretrained'
        raise UserError(f'the tokenizer has {len(tokenizer)} ids but the model {name!r} embeds {rows}; {last}: {way}')


def check_same_tokens(tokenizer, other, what, model, trust_remote_code=False):
    """Raise UserError where another model would read the ids of the policy's tokenizer as other tokens.

    tokenizer: the policy's; model: the policy's name; other: the other model's tokenizer, or its name; what: how a message
    calls the other model, which is a reference, critic or reward model. A folder without a tokenizer only gets a note."""
    if isinstance(other, str):
        if other == model:
            return
        is_folder_without = Path(other).is_dir() and not any(Path(other).glob('*token*'))
        if is_folder_without and not lora.find(other):
            say_once(f'note: {what} comes without a tokenizer: it must read the tokens of {model}')
            return
        other = load_tokenizer(other, trust_remote_code)
    # the other model may know further tokens
    other_ids = other.get_vocab()
    wrong = [token for token, i in tokenizer.get_vocab().items() if other_ids.get(token) != i]
    if wrong:
        found = f'{what} reads other tokens than the model {model} writes: {len(wrong)} differ, such as {wrong[0]!r}'
        raise UserError(f'{found}: name one with the same tokenizer')


# ---- what a model folder holds ----

# the endings of files that decide what a folder holds
DECISIVE = ('.safetensors', '.json', '.model', '.txt', '.jinja', '.py')


def kept_in(name):
    """Return the type that most weights in a model's file have: 'float32', 'bfloat16' or 'float16'. 'float32' without a file."""
    _, base = lora.adapter_and_base(name)
    file = hub.file_of(base, 'model.safetensors') or hub.file_of(base, 'model.safetensors.index.json')
    if file is None:
        return 'float32'
    # counted in weights, not in tensors: norms are often kept in another type
    counts = get_local_safetensors_metadata(Path(file).parent).parameter_count
    most_common = max(counts, key=counts.get)
    return {'BF16': 'bfloat16', 'F16': 'float16'}.get(most_common, 'float32')


def fingerprints(config):
    """Return hashes of the models that the options of a config name, so that a resumed run can see whether they are the same.

    option -> {file: SHA-256} for a folder, {'commit': hash} for a hub id that has been loaded. Others are left out."""
    found = {}
    for option in MODELS:
        name = config.get(option)
        if name in NO_MODEL:
            continue
        saved, base = lora.adapter_and_base(name)
        if saved is None:
            hashes = _hashes(name)
        else:
            # files of the adapter, and files of its model under base/
            hashes = _hashes(saved.folder) | _hashes(base, prefix='base/')
        # a folder without such files is noted, too
        if hashes or os.path.isdir(name):
            found[option] = hashes
    return found


def _hashes(name, prefix=''):
    """Return {prefix + file: SHA-256} of a folder, {prefix + 'commit': hash} of a hub id, or {} where its commit is unknown."""
    if os.path.isdir(name):
        files = [file for file in sorted(Path(name).iterdir()) if file.suffix in DECISIVE and file.is_file()]
        return {prefix + file.name: file_hash(file) for file in files}
    # transformers notes the commit in the config that it has fetched
    commit = getattr(_configs.get(name), '_commit_hash', None)
    return {f'{prefix}commit': commit} if commit else {}
