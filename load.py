"""Models and tokenizers from the hub or a folder, and whether they suit each other and packing. Raises UserError."""

import contextlib
import math
import os

import torch
import transformers

from configurator import UserError
from model import core, register_attention, set_attention

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer of a hub id, a local folder, or 'toy'. Raises UserError."""
    if name == 'toy':
        import toy

        return toy.tokenizer()
    if not os.path.exists(name) and (name.count('/') != 1 or name.startswith(('.', '/'))):
        raise UserError(f'there is no model folder {name!r}, so no tokenizer: train it first, or give another --model')
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises OSError, ValueError, KeyError and its own for a missing tokenizer
        raise UserError(
            f'no tokenizer in {name!r} ({_first_line(error)}); put tokenizer.json beside the model'
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f'the tokenizer of {name!r} has no end-of-text token: set eos_token in its tokenizer_config.json'
        )
    return tokenizer


def load_model(
    name: str,
    *,
    empty: bool = False,
    tokenizer=None,
    trust_remote_code: bool = False,
    seed: int = 0,
    grow: bool = False,
):
    """A causal LM in float32 and eval mode (dropout off), on the CPU; empty: without weights. Raises UserError.

    grow: give tokens that the tokenizer has and the model has not an embedding, the mean of all others."""
    register_attention()
    try:
        if name == 'toy':
            import toy

            config = toy.model_config()
        else:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if empty or name == 'toy':
            with torch.device('meta') if empty else contextlib.nullcontext(), torch.random.fork_rng():
                torch.manual_seed(seed)
                model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, trust_remote_code=trust_remote_code
                )
            if name != 'toy':
                model.generation_config = _generation_config(name, model.generation_config)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise UserError(f'cannot load the model {name!r}: {_first_line(error)}') from None
    if grow:
        _grow(model, len(tokenizer))
    if tokenizer is not None:
        check_tokenizer(tokenizer, model, name)
    return model.eval()


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
    try:
        found = transformers.GenerationConfig.from_pretrained(name)
    except (
        OSError,
        TypeError,
        ValueError,
    ):  # none, or one that the library does not take: from_pretrained passes it over, too
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


@torch.no_grad()
def packing_error(model, batch, padded):
    """Largest relative difference between response_logps of a batch and of the model's own forward of the same, padded.

    Infinite where the architecture takes no attention from outside (GPT-J, BLOOM), does not hand it the batch, fails without
    a mask (MPT), or runs on from one answer into the next (convolutions, linear attention). Raises UserError where it cannot
    run padded either."""
    config, before = core(model).config, core(model).config._attn_implementation
    other_layers = set(getattr(config, 'layer_types', None) or ()) - {'full_attention', 'sliding_attention'}
    try:
        set_attention(model, packed=bool(batch.groups))
        if batch.groups and (config._attn_implementation != 'packed' or other_layers):
            return math.inf
        ours = model.response_logps(batch)[0]
        set_attention(model, packed=False)
        logits = model(input_ids=padded.ids, attention_mask=padded.mask, use_cache=False).logits.float().log_softmax(-1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture raises that does not know what it was given
        if batch.groups:
            return math.inf
        raise UserError(f'{_name(model)} cannot be trained here: its forward says {_first_line(error)}') from None
    finally:
        core(model).set_attn_implementation(before)
    plain = padded.sum(logits.flatten(0, 1)[padded.index].gather(1, padded.target[:, None])[:, 0])
    return ((ours - plain).abs() / plain.abs().clamp(min=1)).max().item()


def can_pack(model, packed, padded, say):
    """Whether packed batches give this architecture's own log-probs, up to rounding. If not, say so; if padded ones do not
    either, its head does what _post does not know: raise UserError."""
    error = packing_error(model, packed, padded)
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())  # as the forward has left them: gathered
    limit = 0.03 if half else 1e-4
    if error <= limit:
        return True
    error = packing_error(model, padded, padded)
    if error > limit:
        raise UserError(
            f'{_name(model)} does to its logits what _post in model.py does not know: log-probs would be off by {error:.1%}'
        )
    say('note: this architecture cannot be packed: batches are padded instead')
    return False


def _name(model):
    return type(core(model)).__name__.removeprefix('FSDP')  # the prefix that sharding gives it


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
