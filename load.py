"""Models and tokenizers from the hub or a folder, and whether they suit each other and packing. Raises UserError."""

import contextlib
import copy
import hashlib
import json
import math
import os
import re
from pathlib import Path

import torch
import transformers

import guard
import lora
from configurator import UserError
from log import say
from model import core, register_attention, set_attention

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer of a hub id, a local folder, or 'toy'. Raises UserError."""
    if name == 'toy':
        import toy

        return toy.tokenizer()
    if not os.path.exists(name) and (name.count('/') != 1 or name.startswith(('.', '/'))):
        raise UserError(f'there is no model folder {name!r}, so no tokenizer: train it first, or name another one')
    _check_safe(name, trust_remote_code, weights=False)
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


def load_model(name: str, *, empty: bool = False, tokenizer=None, trust_remote_code: bool = False, seed: int = 0,
               adapters: dict | None = None, device_map: str | None = None, grow: bool = False):  # fmt: skip
    """A causal LM in float32 and eval mode (dropout off), on the CPU; empty: without weights. Raises UserError.

    adapters: None, or lora.options; device_map: None, or how from_pretrained spreads the model over this process's GPUs;
    grow: give tokens that the tokenizer has and the model has not an embedding, the mean of all others."""
    register_attention()
    _check_safe(name, trust_remote_code)
    _check_map(name, device_map)
    try:
        if name == 'toy':
            import toy

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
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **({'device_map': device_map} if device_map else {}),
            )
            _check_complete(name, info['missing_keys'])
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


def _check_safe(name, trust_remote_code, weights=True):
    """Raise UserError for a model folder that asks to run code of its own, or has its weights in pickles, which can run code."""
    folder = Path(name)
    if name == 'toy' or not folder.is_dir():
        return  # a hub id: _read_config and transformers see to it
    for file in () if trust_remote_code else sorted(folder.glob('*config.json')):
        options = None
        with contextlib.suppress(OSError, ValueError, RecursionError):  # a broken file has an error of its own
            options = json.loads(file.read_text('utf-8'))
        if isinstance(options, dict) and _own_code(options):
            raise UserError(_wants_code(name, file.name))
    pickles = sorted(f.name for ending in ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl') for f in folder.glob(ending))
    if weights and pickles and not any(folder.glob('*.safetensors')):
        raise UserError(f'{name!r} has its weights in {pickles[0]}, a pickle, which can run any code when it is read: '
                        'convert it to safetensors where you trust it')  # fmt: skip


# configs by name: the export at the end of a run needs them, and the folder may be gone by then
_read, _generation = {}, {}


def _own_code(options):
    return any(options.get(key) for key in ('auto_map', 'custom_pipelines'))


def _wants_code(name, where):
    return f'{name!r} comes with code of its own ({where}): read it, and pass --trust_remote_code if you want it to run'


def _read_config(name, trust_remote_code):
    """The config of a folder or hub id. Raises UserError where it names code of its own, even if it could do without."""
    if os.path.exists(name) or name not in _read:
        _read[name] = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    config = copy.deepcopy(_read[name])
    if not trust_remote_code and _own_code(vars(config)):
        raise UserError(_wants_code(name, 'config.json'))
    return config


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
    _check_safe(name, trust_remote_code)
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
    if not trained and not empty and not quiet:
        gone = ', '.join(sorted(info.get('unexpected_keys', ()))) or 'its own'
        say(
            f'a reward model from the language model {name!r}: a new scalar head, drawn from seed {seed}, replaces {gone}'
        )
    if rows > old and not empty and not quiet:
        say(f'the embedding has one row more, for the pad token {tokenizer.pad_token}')
    _check_map(name, device_map, model)
    return model.eval() if adapters is None else lora.add(model.eval(), **adapters, seed=seed, whole=['score'])


def _is_classifier(config):
    return (config.architectures or [''])[0].endswith('ForSequenceClassification')


def _reward_config(name, tokenizer, new_head, trust_remote_code):
    """The config of load_reward's model: one output. Raises UserError where name is no reward model that can be read here."""
    if name == 'toy':
        import toy

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
    except (
        OSError,
        TypeError,
        ValueError,
    ):  # none, or one that the library does not take: from_pretrained passes it over
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
    if len(tokenizer) > rows:
        raise UserError(
            f'the tokenizer has {len(tokenizer)} ids but the model {name!r} embeds {rows}: they do not belong together'
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


@guard.memory_for('the two examples that try the model out do not fit; lower max_length, or try --dtype=bfloat16')
@torch.no_grad()
def packing_error(model, batch, padded):
    """Largest relative difference between response_logps (for a reward model response_scores) of a batch and what the
    model's own forward gives for the same, padded.

    Infinite where the architecture takes no attention from outside (GPT-J, BLOOM), does not hand it the batch, fails without
    a mask (MPT), or runs on from one answer into the next (convolutions, linear attention). Raises UserError where it cannot
    run padded either."""
    config, before = core(model).config, core(model).config._attn_implementation
    scoring = is_reward(model)
    other_layers = set(getattr(config, 'layer_types', None) or ()) - {'full_attention', 'sliding_attention'}
    try:
        set_attention(model, packed=bool(batch.groups))
        if batch.groups and (config._attn_implementation != 'packed' or other_layers):
            return math.inf
        ours = model.response_scores(batch) if scoring else model.response_logps(batch)[0]
        set_attention(model, packed=False)
        # a score is read at the last id that is not pad
        filler = config.get_text_config().pad_token_id if scoring else 0
        ids = padded.ids.masked_fill(padded.mask == 0, filler)
        logits = model(input_ids=ids, attention_mask=padded.mask, use_cache=False).logits.float()
    except Exception as error:  # whatever an architecture raises that does not know what it was given
        if guard.out_of_memory(error):
            raise
        if batch.groups:
            return math.inf
        raise UserError(f'{_name(model)} cannot be trained here: its forward says {_first_line(error)}') from None
    finally:
        core(model).set_attn_implementation(before)
    if scoring:
        plain = logits[:, 0]
    else:
        logps = logits.log_softmax(-1).flatten(0, 1)[padded.index]
        plain = padded.sum(logps.gather(1, padded.target[:, None])[:, 0])
    return ((ours - plain).abs() / plain.abs().clamp(min=1)).max().item()


def can_pack(model, packed, padded, say, wanted=True):
    """Whether packed batches are wanted and give this architecture's own log-probs, up to rounding. If they do not, say so;
    if padded ones do not either, its head does what _post does not know: raise UserError."""
    error = packing_error(model, packed, padded) if wanted else math.inf
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
        say('note: this architecture cannot be packed: batches are padded instead')
    return False


def check_positions(model, length, what):
    """Raise UserError where length tokens are more than a model with learned position embeddings has positions for."""
    learned = any(
        isinstance(module, torch.nn.Embedding) and re.search('wpe|position', name)
        for name, module in core(model).named_modules()
    )
    most = getattr(core(model).config.get_text_config(), 'max_position_embeddings', None)
    if learned and most and length > most:
        raise UserError(
            f'{_name(model)} has {most} positions, and {what} take {length} tokens: lower max_length or max_new_tokens'
        )


def _name(model):
    return type(core(model)).__name__.removeprefix('FSDP')  # the prefix that sharding gives it


def _first_line(error: Exception) -> str:
    """What went wrong, on one line."""
    text = ' '.join(str(error).split())[:200]
    return text if ' ' in text else f'{type(error).__name__} {text}'.strip()
