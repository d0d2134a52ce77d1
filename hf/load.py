"""From a hub id or a folder to a model and its tokenizer. All raise UserError.

Which folders are refused, and why, is in check.py; whether a loaded model suits packing and a run's lengths, in probe.py."""

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import re
import threading
from collections import Counter
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from configurator import UserError, main_rank
from hf import adapter, check, lora, quantize
from hf.ties import describe_ties
from model import core, register_attention
from runtime.files import file_hash, say_once
from runtime.values import MODELS, NO_MODEL
from text import toy

# parts of what transformers warns of and no user need know, and why; all else that it warns of is shown, by the main rank
HARMLESS = {
    'LOAD REPORT': 'which weights are missing or not used is refused, or said, by _check_weights',
    'The tied weights mapping and config for this model': 'a head of its own beside the embedding is said by load_model',
    'does not support setting its attention implementation dynamically': 'batches that cannot be packed are said by can_pack',
    'without finding the associated sub-model': 'the same: can_pack compares what comes out',
    'generation flags are not valid and may be ignored': 'answers are sampled as the options of the scripts say',
    'sequence length is longer than the specified maximum': 'texts are cut to max_length, and check_positions refuses longer ones',
}


def concerns_user(record):
    """Whether a message of transformers, a LogRecord, is to be shown."""
    return main_rank() and not any(part in record.getMessage() for part in HARMLESS)


transformers.utils.logging.get_logger()  # now its root has the handler that writes
for handler in logging.getLogger('transformers').handlers:
    handler.addFilter(concerns_user)
transformers.utils.logging.disable_progress_bar()

# ---- from a name to a model ----


def load_model(
    name, *, empty=False, tokenizer=None, trust_remote_code=False, seed=0, adapters=None, device_map=None, grow=False
):
    """Load a causal LM in float32 and eval mode (dropout off), on the CPU. Raises UserError.

    name: a hub id, a folder, or 'toy', whose weights are drawn from seed; empty: no weights, on the meta device; tokenizer: it
    must have no ids beyond the model's; grow: such ids get embeddings instead; adapters: None, or lora.options; device_map:
    None, or how from_pretrained spreads the model over this process's GPUs."""
    with _one_sentence(name):
        saved, base = _base(name)
        config = _read_config(base, trust_remote_code, device_map)
        if check.is_classifier(config) or (saved and saved.scores):
            raise UserError(f'{name!r} is a reward model: a language model is needed here')
        auto = transformers.AutoModelForCausalLM
        model, missing, unused = _make(auto, base, config, empty, seed, trust_remote_code, device_map)
        _check_weights(base, missing, unused)

        # an empty model has no file that says how to sample, or that its head is not its embedding
        if empty and base != 'toy':
            model.generation_config = _generation_config(base, model.generation_config)
        if not empty and describe_ties(model):
            say_once(f'note: the config of {base!r} says that its head is its embedding, but its file has a head of its own: '
                  'that is used, and the exported config says so')  # fmt: skip
    model = _adapt(model, saved, adapters, empty, seed)
    if grow:
        _grow(model, len(tokenizer))
    if tokenizer is not None:
        check_tokenizer(tokenizer, model, name)
    check.check_placed(name, device_map, model)
    return model


def load_reward(
    name, tokenizer, *, new_head=False, empty=False, trust_remote_code=False, seed=0, adapters=None, device_map=None
):
    """Load a reward model, a transformers sequence classifier with one output, in float32 and eval mode, on the CPU.

    new_head: a causal LM will do, whose head gives way to a scalar one that is drawn from seed; tokenizer: with a separate pad
    token, for which the embedding grows by a row if need be; the rest as in load_model: the head trains beside adapters.
    Raises UserError."""
    with _one_sentence(name):
        saved, base = _base(name)
        config = _read_config(base, trust_remote_code, device_map)
        trained = check.is_classifier(config)
        has_head = trained or bool(saved and saved.scores)
        check.check_reward(name, config, tokenizer, new_head or has_head)
        config.num_labels = 1

        # one row more for a pad token that is new, unless there is a spare one
        text = config.get_text_config()
        old, pad = text.vocab_size, tokenizer.pad_token_id
        rows = old + (pad == old == len(tokenizer) - 1)
        drawn = empty or name == 'toy'
        # while a file is read, none: an embedding cannot be made with a pad token that it has no row for
        text.vocab_size, text.pad_token_id = (rows, pad) if drawn else (old, None)
        auto = transformers.AutoModelForSequenceClassification
        model, missing, unused = _make(auto, base, config, empty, seed, trust_remote_code, device_map)
        if not drawn and rows > old:
            model.resize_token_embeddings(rows, mean_resizing=False).weight.data[old:] = 0.0
        model.config.get_text_config().pad_token_id = pad  # a copy of the config above
    check_tokenizer(tokenizer, model, name)
    if not hasattr(core(model), 'score'):
        raise UserError(f'{type(model).__name__} has no head of the name score: it cannot be a reward model here')

    # of a language model, the head is what is not in a numbered block
    head = set() if trained else {key for key in unused if not re.search(r'\.\d+\.', f'.{key}')}
    expected = set() if trained else {'score.weight', 'score.bias'}
    _check_weights(base, missing - expected, unused - head)
    if not has_head and not empty:
        gone = ', '.join(sorted(head)) or 'its own'
        scalar = f'a new scalar head, drawn from seed {seed}, replaces {gone}'
        say_once(f'a reward model from the language model {name!r}: {scalar}')
    if rows > old and not empty:
        say_once(f'the embedding of {name!r} has one row more, for the pad token {tokenizer.pad_token}')
    check.check_placed(name, device_map, model)
    return _adapt(model, saved, adapters, empty, seed, fully_trained=['score'])


def _base(name):
    """(The adapter under this name or None, the model that it belongs to or name itself)."""
    saved = adapter.find(name)
    return saved, saved.base if saved else name


def _adapt(model, saved, adapters, empty, seed, **more):
    """The model in eval mode, with its saved adapter merged or going on, or with new ones. adapters: of lora.options, or None."""
    model, how = model.eval(), dict(adapters or {})
    in_4bit = how.pop('quantize', None)
    with _one_sentence(saved and saved.name):
        if saved and not adapters:
            model = adapter.merge(model, saved, empty)
        elif saved:
            model = lora.go_on(model, saved, dropout=how['dropout'], seed=seed, empty=empty)
    if adapters and not saved:
        model = lora.add(model, **how, seed=seed, **more)
    return quantize.quantize(model) if in_4bit else model


def _make(auto, name, config, empty, seed, trust_remote_code, device_map):
    """(model, weights that its file lacks, weights of the file that it has no place for). What is drawn is drawn from seed."""
    register_attention()
    options = {'dtype': torch.float32, 'trust_remote_code': trust_remote_code}
    place = torch.device('meta') if empty else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), place:
        torch.manual_seed(seed)
        if empty or name == 'toy':
            return auto.from_config(config, **options), set(), set()
        check.check_files(name, config)
        options |= {'use_safetensors': True, 'output_loading_info': True, 'device_map': device_map}
        model, info = auto.from_pretrained(name, config=config, **options)
    return model, set(info['missing_keys']), set(info['unexpected_keys'])


def _check_weights(name, missing, unused):
    """Refuse a file without all weights, for transformers makes them up; say which of its weights have no place."""
    if missing:
        raise UserError(f'{name!r} lacks weights: {", ".join(sorted(missing)[:3])}')
    if unused:
        some = ', '.join(sorted(unused)[:3])
        lost = f'{len(unused)} weights in {name!r} are not used'
        say_once(f'note: {lost}, since its config has no place for them: {some}')


@contextlib.contextmanager
def _one_sentence(name):
    """Whatever transformers raises inside becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'cannot load the model {name!r}: {check.first_line(error)}') from None


# configs by name: the export at the end of a run needs them, and the folder may be gone by then
_read, _generation = {}, {}


def _read_config(name, trust_remote_code, device_map):
    """The config of a hub id, a folder or 'toy'. Raises UserError for what check.py refuses before it is loaded."""
    if name == 'toy':
        if device_map:
            raise UserError('device_map spreads what is read from a folder or the hub: the toy model is made here')
        return toy.model_config()
    check.check_safe(name, trust_remote_code)
    if os.path.exists(name) or name not in _read:
        check.check_there(name)
        raw = transformers.PretrainedConfig.get_config_dict(name)[0]
        check.check_code(name, 'config.json', {} if trust_remote_code else raw)
        _read[name] = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    config = copy.deepcopy(_read[name])
    check.check_quantised(name, config)
    return config


def _generation_config(name, default):
    """How a model wants to be sampled from: above all, which tokens end the answers of an instruct model."""
    if os.path.exists(name) or name not in _generation:
        _generation[name] = default
        # none, or one that the library does not take: from_pretrained passes it over, too
        with contextlib.suppress(OSError, TypeError, ValueError):
            found = transformers.GenerationConfig.from_pretrained(name)
            # one that could be read, but not written again, is left out except for its tokens
            tokens = {k: getattr(found, k) for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
            _generation[name] = transformers.GenerationConfig(**tokens)
            found.validate(strict=True)
            _generation[name] = found
    return copy.deepcopy(_generation[name])


# ---- what is new in a model ----


def add_value_head(model, critic=None):
    """Give a causal LM what estimates values for token_logps: a scalar head, zero at first, or critic, a whole reward model.

    Both train, whatever else of the model does."""
    inner = core(model)
    if critic is not None:
        inner.critic = critic
        return model
    head = inner.get_output_embeddings()
    inner.value_head = torch.nn.Linear(head.weight.shape[1], 1, device=head.weight.device)
    torch.nn.init.zeros_(inner.value_head.weight)
    torch.nn.init.zeros_(inner.value_head.bias)
    return model


def drop_value_head(model):
    """Take away again what add_value_head gave, so that the model can be exported as the causal LM that it is."""
    for name in {'critic', 'value_head'} & core(model)._modules.keys():
        delattr(core(model), name)


@torch.no_grad()
def _grow(model, size):
    """At least this many rows of the embedding and of the head, new ones with the mean of the old."""
    old = core(model).get_input_embeddings().num_embeddings
    if size <= old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for rows in (layer.weight, getattr(layer, 'bias', None)):
            if rows is not None:
                rows[old:] = rows[:old].mean(0)


# ---- tokenizers ----


def load_tokenizer(name, trust_remote_code=False):
    """Load the tokenizer of a hub id, a folder, or 'toy'. Raises UserError."""
    if name == 'toy':
        return toy.tokenizer()
    saved, base = _base(name)
    if not saved or not _has_tokenizer(saved.folder):
        name = base
    check.check_there(name)
    check.check_sizes(name)
    check.check_safe(name, trust_remote_code, weights=False)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises OSError, ValueError, KeyError and its own for a missing tokenizer
        whole = 'beside the model there must be a whole tokenizer.json'
        raise UserError(f'no tokenizer in {name!r} ({check.first_line(error)}): {whole}') from None
    if tokenizer.eos_token_id is None:
        raise UserError(f'the tokenizer of {name!r} has no end of text: set eos_token in its tokenizer_config.json')
    return tokenizer


def _has_tokenizer(folder):
    return any(Path(folder).glob('*token*'))


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
    if len(tokenizer) <= rows:
        return
    found = f'the tokenizer has {len(tokenizer)} ids but the model {name!r} embeds {rows}'
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not beyond.keys() <= tokenizer.added_tokens_decoder.keys():
        raise UserError(f'{found}: they do not belong together')
    some = ' '.join(beyond[i] for i in sorted(beyond)[:3])
    raise UserError(
        f'{found}: {len(beyond)} added later ({some}) have no row: take them out of the tokenizer, or give them rows with '
        f'model.resize_token_embeddings({len(tokenizer)}), model.save_pretrained(FOLDER), and copy the tokenizer there'
    )


def check_same_tokens(tokenizer, other, what, model, trust_remote_code=False):
    """Raise UserError where ids that the tokenizer of model writes mean other tokens to a reference, critic or reward model.

    other: its tokenizer, or its name, of a folder that may lack one; what: how to call it."""
    if isinstance(other, str):
        if other == model:
            return
        if Path(other).is_dir() and not _has_tokenizer(other) and not adapter.find(other):
            return say_once(f'note: {what} comes without a tokenizer: it must read the tokens of {model}')
        other = load_tokenizer(other, trust_remote_code)
    known = other.get_vocab()
    wrong = {i: token for token, i in tokenizer.get_vocab().items() if known.get(token) != i}
    if not wrong:
        return
    first = min(wrong)
    there = known.get(wrong[first], 'unknown')
    example = f'{wrong[first]!r}, which is {first} here and is {there} there'
    raise UserError(
        f'{what} reads other tokens than the model {model} writes: {len(wrong)} differ, such as {example}: name one with the '
        'same tokenizer'
    )


# ---- what a model folder holds ----

# the files that decide what a folder holds
DECISIVE = ('.safetensors', '.json', '.model', '.txt', '.jinja', '.py')


def content(folder):
    """Hash a folder's weights and config, so that what two models gave never mixes. None for a hub id, or 'toy'.

    An adapter is that and its model."""
    if not os.path.isdir(folder):
        return None
    saved, base = _base(folder)
    patterns = ('*.safetensors', 'config.json', 'adapter_config.json')
    files = sorted(file for pattern in patterns for file in Path(folder).glob(pattern))
    hashes = ''.join(file_hash(file) for file in files) + (saved and content(base) or '')
    return hashlib.sha256(bytes.fromhex(hashes)).hexdigest()[:16]


def kept_in(name):
    """What most weights of a model's file are, or else what its config says: 'float32', 'bfloat16' or 'float16'."""
    _, base = _base(name)
    file, index = (check.file_of(base, f'model.safetensors{end}') for end in ('', '.index.json'))
    if index and not file:
        shard = min(json.loads(Path(index).read_text())['weight_map'].values())
        file = Path(index).with_name(shard)
    found = str(getattr(_read.get(base), 'dtype', None)).removeprefix('torch.')
    if file:
        types = Counter()
        with safe_open(file, 'pt') as weights:
            for tensor in map(weights.get_slice, weights.keys()):
                types[tensor.get_dtype()] += math.prod(tensor.get_shape())
        found = {'BF16': 'bfloat16', 'F16': 'float16'}.get(types.most_common(1)[0][0])
    return found if found in ('bfloat16', 'float16') else 'float32'


def fingerprints(config):
    """Begin to hash the models that options name. Returns a function that waits for it and returns option -> {file: SHA-256},
    or {'commit': hash} for a hub id that has been loaded by then.

    Rank 0 alone reads every byte once, in a thread, while tokenising and loading want the same files. UserError: unreadable."""
    named = {option: config.get(option) for option in MODELS if main_rank()}
    names = {option: name for option, name in named.items() if name not in NO_MODEL}
    # an adapter has files of its own, and those of its model
    parts, failed = [], []  # (name, folder or hub id, what its files' names begin with)
    for name in set(names.values()):
        saved, base = _base(name)
        parts += [(name, saved.folder, ''), (name, base, 'base/')] if saved else [(name, name, '')]
    found = {name: {} for name, *_ in parts}

    def work():
        for name, place, prefix in parts:
            try:
                files = sorted(Path(place).iterdir()) if os.path.isdir(place) else []
                for file in files:
                    if file.suffix in DECISIVE and file.is_file():
                        found[name][prefix + file.name] = file_hash(file)
            except OSError as error:
                failed.append(f'cannot read the model {name!r}: {error.strerror or error}')

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result():
        thread.join()
        if failed:
            raise UserError(failed[0])
        for name, place, prefix in parts:
            commit = getattr(_read.get(place), '_commit_hash', None)
            if commit and not os.path.isdir(place):
                found[name][f'{prefix}commit'] = commit
        return {option: found[name] for option, name in names.items() if found[name] or os.path.isdir(name)}

    return result
