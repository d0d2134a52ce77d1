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


def load_model(name: str, *, empty: bool = False, tokenizer=None, trust_remote_code: bool = False, seed: int = 0):
    """A causal LM in float32 and eval mode (dropout off), on the CPU; empty: without weights. Raises UserError."""
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
                _own_stop_tokens(model, name)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise UserError(f'cannot load the model {name!r}: {_first_line(error)}') from None
    if tokenizer is not None:
        check_tokenizer(tokenizer, model, name)
    return model.eval()


def _own_stop_tokens(model, name):
    """What from_config does not read: the tokens that end an answer, where generation_config.json has its own."""
    with contextlib.suppress(OSError):
        own = transformers.GenerationConfig.from_pretrained(name).eos_token_id
        if own is not None:
            model.generation_config.eos_token_id = own


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

    Infinite where the architecture takes no attention from outside (GPT-J, BLOOM), does not hand it the batch, or runs on
    from one answer into the next (convolutions, linear attention)."""
    config, before = core(model).config, core(model).config._attn_implementation
    other_layers = set(getattr(config, 'layer_types', None) or ()) - {'full_attention', 'sliding_attention'}
    try:
        set_attention(model, packed=bool(batch.groups))
        if batch.groups and (config._attn_implementation != 'packed' or other_layers):
            return math.inf
        ours = model.response_logps(batch)[0]
        set_attention(model, packed=False)
        logits = model(input_ids=padded.ids, attention_mask=padded.mask, use_cache=False).logits.float().log_softmax(-1)
    except NotImplementedError:
        return math.inf
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
        name = type(core(model)).__name__
        raise UserError(
            f'{name} does to its logits what _post in model.py does not know: log-probs would be off by {error:.1%}'
        )
    say('note: this architecture cannot be packed: batches are padded instead')
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
