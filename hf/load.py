"""Models and tokenizers from the hub or a folder, and whether they suit each other and packing. Raises UserError."""

import contextlib
import copy
import hashlib
import math
import os
import re
import threading
import traceback
from pathlib import Path

import torch
import transformers

from configurator import UserError, main_rank
from hf import lora
from hf.check import check_adapter, check_files, check_safe, check_sizes, own_code, wants_code
from hf.ties import describe_ties
from model import core, register_attention, set_attention
from runtime import guard
from runtime.files import say

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer of a hub id, a local folder, or 'toy'. Raises UserError."""
    if name == 'toy':
        from text import toy

        return toy.tokenizer()
    if not os.path.exists(name) and (name.count('/') != 1 or name.startswith(('.', '/'))):
        raise UserError(f'there is no model folder {name!r}, so no tokenizer: train it first, or name another one')
    check_sizes(name)
    check_safe(name, trust_remote_code, weights=False)
    check_adapter(name, hub=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises OSError, ValueError, KeyError and its own for a missing tokenizer
        raise UserError(
            f'no tokenizer in {name!r} ({_first_line(error)}): beside the model there must be a whole tokenizer.json'
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f'the tokenizer of {name!r} has no end-of-text token: set eos_token in its tokenizer_config.json'
        )
    return tokenizer


def content(folder):
    """A hash of a folder's weights and config, so that what two models gave never mixes; None for a hub id, or 'toy'."""
    digest = hashlib.sha256()
    for file in sorted([*Path(folder).glob('*.safetensors'), *Path(folder).glob('config.json')]):
        with open(file, 'rb') as stream:
            digest.update(hashlib.file_digest(stream, 'sha256').digest())
    return digest.hexdigest()[:16] if Path(folder).is_dir() else None


# options of the training scripts that name a model, the values that name none, and the files that decide what a folder holds
MODELS = ('model', 'ref_model', 'reward_model', 'critic')
NO_MODEL = (None, 'toy', 'gold', 'head', 'own')
DECISIVE = ('.safetensors', '.json', '.model', '.txt', '.jinja', '.py')


def fingerprints(config):
    """Begin to hash the models that options name. Returns a function that waits for it and returns option -> {file: SHA-256},
    or {'commit': hash} for a hub id that has been loaded by then.

    Every byte is read, once, on rank 0, in a thread: the time is that of tokenising and loading, which want the same files. The
    other ranks get nothing. Raises UserError, when it is called, where a file cannot be read."""
    names = {option: config.get(option) for option in MODELS}
    names = {option: name for option, name in names.items() if name not in NO_MODEL and main_rank()}
    folders = {name: {} for name in names.values() if os.path.isdir(name)}
    failed = []

    def work():
        try:
            for name, found in folders.items():
                for file in sorted(Path(name).iterdir()):
                    if file.suffix in DECISIVE and file.is_file():
                        with open(file, 'rb') as stream:
                            found[file.name] = hashlib.file_digest(stream, 'sha256').hexdigest()
        except OSError as error:
            failed.append(f'cannot read the model {name!r}: {error.strerror or error}')

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result():
        thread.join()
        if failed:
            raise UserError(failed[0])
        commits = {name: getattr(_read.get(name), '_commit_hash', None) for name in names.values()}
        known = {name: {'commit': commit} for name, commit in commits.items() if commit} | folders
        return {option: known[name] for option, name in names.items() if name in known}

    return result


def load_model(name: str, *, empty: bool = False, tokenizer=None, trust_remote_code: bool = False, seed: int = 0,
               adapters: dict | None = None, device_map: str | None = None, grow: bool = False):  # fmt: skip
    """A causal LM in float32 and eval mode (dropout off), on the CPU; empty: without weights. Raises UserError.

    adapters: None, or lora.options; device_map: None, or how from_pretrained spreads the model over this process's GPUs;
    grow: give tokens that the tokenizer has and the model has not an embedding, the mean of all others."""
    register_attention()
    check_safe(name, trust_remote_code)
    _check_map(name, device_map)
    try:
        if name == 'toy':
            from text import toy

            config = toy.model_config()
        else:
            config = _read_config(name, trust_remote_code)
        if _is_classifier(config):
            raise UserError(f'{name!r} is a reward model: a language model is needed here')
        if empty or name == 'toy':
            with torch.device('meta') if empty else contextlib.nullcontext(), torch.random.fork_rng():
                torch.manual_seed(seed)
                model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, trust_remote_code=trust_remote_code
                )
            if name != 'toy':
                model.generation_config = _generation_config(name, model.generation_config)
        else:
            check_files(name, config)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **({'device_map': device_map} if device_map else {}),
            )
            _check_complete(name, info['missing_keys'])
            _say_unused(name, info['unexpected_keys'])
            if describe_ties(model):
                _note(f'note: the config of {name!r} says that its head is its embedding, but its file has a head of its own: '
                      'that is used, and the exported config says so')  # fmt: skip
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'cannot load the model {name!r}: {_first_line(error)}') from None
    if grow:
        _grow(model, len(tokenizer))
    if tokenizer is not None:
        check_tokenizer(tokenizer, model, name)
    _check_map(name, device_map, model)
    return model.eval() if adapters is None else lora.add(model.eval(), **adapters, seed=seed)


_noted = set()  # what was said of a model before: policy, reference and export load the same one


def _note(text):
    if text not in _noted:
        _noted.add(text)
        say(text)


# configs by name: the export at the end of a run needs them, and the folder may be gone by then
_read, _generation = {}, {}


def _read_config(name, trust_remote_code):
    """The config of a folder or hub id. Raises UserError where it names code of its own, even if it could do without, or is
    that of quantised weights."""
    if os.path.exists(name) or name not in _read:
        raw = transformers.PretrainedConfig.get_config_dict(name)[0]
        if not trust_remote_code and (what := own_code(raw)):
            raise UserError(wants_code(name, 'config.json', what))
        _read[name] = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    config = copy.deepcopy(_read[name])
    if quantised := getattr(config, 'quantization_config', None):
        options = quantised if isinstance(quantised, dict) else quantised.to_dict()
        known = (n for n in (4, 8) if options.get(f'load_in_{n}bit') or options.get('bits') == n)
        bits = next((f'{n} bit' for n in known), 'few bits')
        raise UserError(
            f'{name!r} holds quantised weights ({options.get("quant_method", "bitsandbytes")}, {bits}), which are neither '
            'trained nor exported here: name the model that they were made from, or a copy of model.dequantize()'
        )
    return config


def _say_unused(name, unused):
    """Say which weights of a file the model does not have: perhaps the config is another model's."""
    if unused:
        some = ', '.join(sorted(unused)[:3])
        _note(f'note: {len(unused)} weights in {name!r} are not used, since its config has no place for them: {some}')


def _check_map(name, device_map, model=None):
    """Raise UserError where a device map cannot be had, or has left a part of the model out of the GPUs."""
    if device_map and name == 'toy':
        raise UserError('device_map spreads what is read from a model folder or the hub: the toy model is made here')
    places = {str(p.device) for p in model.parameters()} if device_map and model is not None else set()
    if places & ({'cpu', 'meta'} if torch.cuda.is_available() else {'meta'}):
        raise UserError(f'the model {name!r} does not fit on the GPUs of this machine with device_map={device_map}')


def _check_complete(name, missing):
    """Raise UserError where a folder lacks weights: transformers would make them up at random."""
    if missing:
        raise UserError(f'{name!r} lacks weights: {", ".join(sorted(missing)[:3])}')


def add_value_head(model, critic=None):
    """Give a causal LM what estimates values for token_logps: a scalar head, zero at first, or a whole reward model.

    Both train, whatever else of the model does."""
    inner = core(model)
    if critic is not None:
        inner.critic = critic
    else:
        head = inner.get_output_embeddings()
        inner.value_head = torch.nn.Linear(head.weight.shape[1], 1, device=head.weight.device)
        torch.nn.init.zeros_(inner.value_head.weight)
        torch.nn.init.zeros_(inner.value_head.bias)
    return model


def drop_value_head(model):
    """Take away again what add_value_head gave, so that the model can be exported as the causal LM that it is."""
    for name in ('critic', 'value_head'):
        if hasattr(core(model), name):
            delattr(core(model), name)


def separate_pad(tokenizer):
    """Give the tokenizer a pad token that is not its end of text, on the right: transformers reads a score at the last
    token that is not padding, and that must be the end of text."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({'pad_token': '<|pad|>'})
    tokenizer.padding_side = 'right'
    return tokenizer


def load_reward(name: str, tokenizer, *, new_head: bool = False, empty: bool = False, trust_remote_code: bool = False,
                seed: int = 0, adapters: dict | None = None, device_map: str | None = None, quiet: bool = False):  # fmt: skip
    """A reward model, a transformers sequence classifier with one output, in float32 and eval mode, on the CPU.

    name, adapters (the head trains beside them), device_map: as in load_model; new_head: it may be a causal LM, whose head
    gives way to a scalar one drawn from the seed; quiet: do not say so. tokenizer: with a separate pad token, whose row the
    embedding gets if it has none. Raises UserError."""
    register_attention()
    check_safe(name, trust_remote_code)
    _check_map(name, device_map)
    auto = transformers.AutoModelForSequenceClassification
    options = {'dtype': torch.float32, 'trust_remote_code': trust_remote_code}
    try:
        config = _reward_config(name, tokenizer, new_head, trust_remote_code)
        text, trained = config.get_text_config(), _is_classifier(config)
        rows = old = text.vocab_size
        if tokenizer.pad_token_id == old == len(tokenizer) - 1:  # a new pad token, for which there is no spare row
            rows = old + 1
        with torch.random.fork_rng(devices=[]), torch.device('meta') if empty else contextlib.nullcontext():
            torch.manual_seed(seed)
            if empty or name == 'toy':
                text.vocab_size, text.pad_token_id = rows, tokenizer.pad_token_id
                model, info = auto.from_config(config, **options), {}
            else:
                check_files(name, config)
                text.pad_token_id = None  # an embedding cannot be made with a pad token that it has no row for
                options |= {'use_safetensors': True, 'output_loading_info': True}
                options |= {'device_map': device_map} if device_map else {}
                model, info = auto.from_pretrained(name, config=config, **options)
                if rows > old:
                    model.resize_token_embeddings(rows, mean_resizing=False).weight.data[old:] = 0.0
                model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # a copy of the one above
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'cannot load the model {name!r}: {_first_line(error)}') from None
    check_tokenizer(tokenizer, model, name)
    if not is_reward(model):
        raise UserError(f'{type(model).__name__} has no head of the name score: it cannot be a reward model here')
    _check_complete(name, set(info.get('missing_keys', ())) - (set() if trained else {'score.weight', 'score.bias'}))
    # of a language model, the head is what is not in a numbered block
    others = {key for key in info.get('unexpected_keys', ()) if trained or re.search(r'\.\d+\.', f'.{key}')}
    _say_unused(name, others)
    if not trained and not empty and not quiet:
        gone = ', '.join(sorted(info.get('unexpected_keys', set()) - others)) or 'its own'
        say(
            f'a reward model from the language model {name!r}: a new scalar head, drawn from seed {seed}, replaces {gone}'
        )
    if rows > old and not empty and not quiet:
        say(f'the embedding has one row more, for the pad token {tokenizer.pad_token}')
    _check_map(name, device_map, model)
    return model.eval() if adapters is None else lora.add(model.eval(), **adapters, seed=seed, fully_trained=['score'])


def _is_classifier(config):
    return (config.architectures or [''])[0].endswith('ForSequenceClassification')


def _reward_config(name, tokenizer, new_head, trust_remote_code):
    """The config of load_reward's model: one output. Raises UserError where name is no reward model that can be read here."""
    if name == 'toy':
        from text import toy

        config = toy.model_config()
    else:
        config = _read_config(name, trust_remote_code)
    if not _is_classifier(config) and not new_head:
        raise UserError(f'{name!r} is no reward model but a language model: train one from it with reward.py')
    if _is_classifier(config) and config.num_labels != 1:
        raise UserError(f'the classifier {name!r} has {config.num_labels} outputs; a reward model has one')
    if _is_classifier(config) and config.get_text_config().pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f'{name!r} pads with its end of text, so its score was read one token before that; here it is read at the end of '
            'text: train it further with another pad_token_id in its config.json'
        )
    config.num_labels = 1
    return config


@torch.no_grad()
def _grow(model, size):
    """At least this many rows of the embedding and of the head, new ones with the mean of the old."""
    old = core(model).get_input_embeddings().num_embeddings
    if size > old:
        model.resize_token_embeddings(size, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for rows in (layer.weight, getattr(layer, 'bias', None)):
                if rows is not None:
                    rows[old:] = rows[:old].mean(0)


def _generation_config(name, default):
    """How a model wants to be sampled from: above all, which tokens end the answers of an instruct model."""
    if name in _generation and not os.path.exists(name):
        return copy.deepcopy(_generation[name])
    found = _generation[name] = _read_generation_config(name, default)
    return copy.deepcopy(found)


def _read_generation_config(name, default):
    try:
        found = transformers.GenerationConfig.from_pretrained(name)
    # none, or one that the library does not take: from_pretrained passes it over
    except (OSError, TypeError, ValueError):
        return default
    try:
        found.validate(strict=True)
    except ValueError:  # it could be read, but not written again
        ids = {k: getattr(found, k) for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
        found = transformers.GenerationConfig(**ids)
    return found


def check_tokenizer(tokenizer, model, name: str):
    """Raise UserError when the tokenizer can produce ids that the model has no embedding for."""
    rows = core(model).get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    found = f'the tokenizer has {len(tokenizer)} ids but the model {name!r} embeds {rows}'
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if not {i for i, _ in beyond} <= tokenizer.added_tokens_decoder.keys():
        raise UserError(f'{found}: they do not belong together')
    some = ' '.join(token for _, token in beyond[:3])
    raise UserError(
        f'{found}: {len(beyond)} added later ({some}) have no row. If they belong to it, give it rows: model = AutoModelForCausalLM.'
        f'from_pretrained({name!r}); model.resize_token_embeddings({len(tokenizer)}); model.save_pretrained(FOLDER), and copy '
        'the tokenizer there; if not, take them out of the tokenizer'
    )


def check_same_tokens(tokenizer, other, what, model, trust_remote_code=False):
    """Raise UserError where ids that a model's tokenizer writes mean other tokens to a reference, critic or reward model.

    other: its tokenizer, or its name, of a folder that may lack one; what: how to call it."""
    if isinstance(other, str):
        if other == model:
            return
        if Path(other).is_dir() and not any(Path(other).glob('*token*')):
            return _note(f'note: {what} comes without a tokenizer: it must read the tokens of {model}')
        other = load_tokenizer(other, trust_remote_code)
    known = other.get_vocab()
    wrong = [(token, i) for token, i in tokenizer.get_vocab().items() if known.get(token) != i]
    if wrong:
        token, i = min(wrong, key=lambda item: item[1])
        there = f'is {known[token]} there' if token in known else 'is unknown there'
        raise UserError(
            f'{what} reads other tokens than the model {model} writes: {len(wrong)} differ, such as {token!r}, which is {i} here '
            f'and {there}: name one with the same tokenizer'
        )


def check_heads(policy, reference):
    """Raise UserError where a divergence has two vocabularies to compare."""
    rows = [len(core(m).get_output_embeddings().weight) for m in (policy, reference)]
    if rows[0] != rows[1]:
        raise UserError(
            f'policy and reference predict {rows[0]} and {rows[1]} tokens: this loss compares every one of them'
        )


def is_reward(model):
    """Whether a model scores answers, instead of predicting tokens."""
    return hasattr(core(model), 'score')


def packing_error(model, batch, padded):
    """Largest relative difference between response_logps (for a reward model response_scores) of a batch and what the
    model's own forward gives for the same, padded."""
    return _packing(model, batch, padded)[0]


@guard.memory_for('the two examples that try the model out do not fit; lower max_length, or try --dtype=bfloat16')
@torch.no_grad()
def _packing(model, batch, padded):
    """(packing_error, why packing is not possible if that is too large).

    Infinite where the architecture takes no attention from outside (GPT-J, BLOOM), does not hand it the batch, fails without
    a mask (MPT), or runs on from one answer into the next (convolutions, linear attention). Raises UserError where it cannot
    run padded either."""
    config, before = core(model).config, core(model).config._attn_implementation
    scoring = is_reward(model)
    other_layers = set(getattr(config, 'layer_types', None) or ()) - {'full_attention', 'sliding_attention'}
    try:
        set_attention(model, packed=bool(batch.groups))
        if batch.groups and config._attn_implementation != 'packed':
            return math.inf, 'it takes no attention from outside'
        if batch.groups and other_layers:
            return math.inf, f'it has layers of type {" ".join(sorted(other_layers))}'
        ours = model.response_scores(batch) if scoring else model.response_logps(batch)[0]
        set_attention(model, packed=False)
        # a score is read at the last id that is not pad
        filler = config.get_text_config().pad_token_id if scoring else 0
        ids = padded.ids.masked_fill(padded.mask == 0, filler)
        logits = model(input_ids=ids, attention_mask=padded.mask, use_cache=False).logits.float()
    except Exception as error:  # whatever an architecture raises that does not know what it was given
        if guard.out_of_memory(error) or (batch.groups and _is_ours(error)):
            raise
        if batch.groups:
            return math.inf, _first_line(error)
        raise UserError(f'{_name(model)} cannot be trained here: its forward says {_first_line(error)}') from None
    finally:
        core(model).set_attn_implementation(before)
    if scoring:
        plain = logits[:, 0]
    else:
        logps = logits.log_softmax(-1).flatten(0, 1)[padded.predict_at]
        plain = padded.sum(logps.gather(1, padded.target[:, None])[:, 0])
    error = ((ours - plain).abs() / plain.abs().clamp(min=1)).max().item()
    return error, f'{"scores" if scoring else "log-probs"} would be off by {error:.1%}'


def _is_ours(error):
    """Whether what a packed forward raised says nothing of the architecture: the machine fails, or this code has a bug."""
    machine = isinstance(error, MemoryError | ImportError | OSError) or 'CUDA error' in str(error)
    bug = isinstance(error, TypeError | NameError | AttributeError | LookupError | AssertionError | ArithmeticError)
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    here = raised_in.is_relative_to(Path(__file__).parents[1]) and 'site-packages' not in raised_in.parts
    return machine or (bug and here)


def can_pack(model, packed, padded, say, wanted=True):
    """Whether packed batches are wanted and give this architecture's own log-probs, up to rounding. If they do not, say so;
    if padded ones do not either, its head does what _post does not know: raise UserError."""
    error, reason = _packing(model, packed, padded) if wanted else (math.inf, '')
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())  # as the forward has left them: gathered
    limit = 0.03 if half else 1e-4
    if error <= limit:
        return True
    error = packing_error(model, padded, padded)
    if error > limit:
        if is_reward(model):
            raise UserError(f'{_name(model)} gives other scores than its head on the end of text: off by {error:.1%}')
        raise UserError(
            f'{_name(model)} does to its logits what _post in model.py does not know: log-probs would be off by {error:.1%}'
        )
    if wanted:
        say(f'note: this architecture cannot be packed ({reason}): batches are padded instead')
    return False


def check_positions(model, length, what):
    """Raise UserError where length tokens are more than a model with learned position embeddings has positions for, or than
    its rotary scaling reads in a way that does not depend on the rest of the batch."""
    learned = any(
        isinstance(module, torch.nn.Embedding) and re.search('wpe|position', name)
        for name, module in core(model).named_modules()
    )
    most = getattr(core(model).config.get_text_config(), 'max_position_embeddings', None)
    if learned and most and length > most:
        raise UserError(
            f'{_name(model)} has {most} positions, and {what} take {length} tokens: lower max_length or max_new_tokens'
        )
    if length > (most := _unscaled(model)):
        raise UserError(
            f'beyond {most} tokens {_name(model)} encodes every position by the longest sequence of a batch, so results would '
            f'depend on max_tokens; {what} take {length} tokens: lower max_length or max_new_tokens'
        )


def room(model):
    """The most tokens of a sequence that this model reads as it was made to, or infinity."""
    most = getattr(core(model).config.get_text_config(), 'max_position_embeddings', None)
    return min(most or math.inf, _unscaled(model))


def _unscaled(model):
    """The longest sequence that leaves the rotary scaling alone which looks at the longest sequence of a batch (dynamic,
    longrope); infinity where there is none such."""
    config = core(model).config.get_text_config()
    found = getattr(config, 'rope_parameters', None) or getattr(config, 'rope_scaling', None) or {}
    limits = [math.inf]
    # one set of parameters, or one for each type of layer
    for rope in [found, *found.values()]:
        kind = str((rope.get('rope_type') or rope.get('type')) if isinstance(rope, dict) else '')
        if 'dynamic' in kind:
            limits.append(config.max_position_embeddings)
        elif kind in ('longrope', 'su') or (kind and 'long_mscale' in rope):
            original = rope.get('original_max_position_embeddings')
            limits.append(
                original or getattr(config, 'original_max_position_embeddings', config.max_position_embeddings)
            )
    return min(limits)


def _name(model):
    return type(core(model)).__name__.removeprefix('FSDP')  # the prefix that sharding gives it


def _first_line(error: Exception) -> str:
    """What went wrong, on one line."""
    text = ' '.join(str(error).split())[:200]
    return text if ' ' in text else f'{type(error).__name__} {text}'.strip()
