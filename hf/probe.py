"""Checks that a loaded model does here what it does in transformers: packed, sharded, and with sequences as long as a run's.

training.py asks can_pack and check_positions, fsdp.py compares a sharded model with the loaded one. All may raise UserError."""

import math
import re
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from data import pack
from model import core, padded_attention, set_attention
from rl.heads import response_scores, token_logps
from runtime import guard
from runtime.hub import first_line
from runtime.log import say


def _name(model):
    """Return the class name of the model for messages, without the prefix FSDP that sharding gives it."""
    return type(core(model)).__name__.removeprefix('FSDP')


def _is_reward(model):
    return hasattr(core(model), 'score')


def _what(model):
    return 'scores' if _is_reward(model) else 'log-probs'


def _difference(found, expected):
    """Return the largest difference of two tensors, relative to the expected number, or absolute where that is below 1."""
    return ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()


# ---- packed ----


def can_pack(model, packed, padded, say, wanted=True):
    """Return whether to train on packed batches: it is wanted, and they give the model's own log-probs or scores up to rounding.

    packed, padded: Batches of the same examples; say: prints why packing is not possible. Where it is not, or is not wanted,
    padded batches are tried. Raises UserError where they give other numbers, too: then the model's own head does something
    that model.Head does not know."""
    if wanted:
        distance, reason = deviation(model, packed, padded)
        if distance <= _tolerance(model):
            return True
    distance, sentence = deviation(model, padded, padded)
    if distance > _tolerance(model):
        # such as scaling the logits, by an option of its config that model.Head does not read
        unknown = 'by its own head, which does what ours does not know'
        raise UserError(f'{_name(model)} gives other {_what(model)} {unknown}: {sentence}')
    if wanted:
        say(f'note: this architecture cannot be packed ({reason}): batches are padded instead')
    return False


def _tolerance(model):
    """Return the largest deviation that rounding can explain, for the type that a forward has just computed in."""
    # before the first forward FSDP shows float32 weights, and after it the gathered ones, which may be bfloat16
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())
    # on a GPU, float32 may be multiplied as TF32
    rough = half or torch.get_float32_matmul_precision() != 'highest'
    return 0.03 if rough else 1e-4


@guard.memory_for('the two examples that try the model out do not fit; lower max_length, or try --dtype=bfloat16')
@torch.no_grad()
def deviation(model, batch, padded):
    """Return how far our log-probs or scores of a batch are from those of the model's own forward: (distance, sentence).

    batch: packed or padded; padded: the same examples, for the model's own forward. The distance is that of _difference, or
    infinity where the model cannot run packed; the sentence says which. Raises UserError where it cannot run padded."""
    config = core(model).config
    is_packed = bool(batch.groups)
    # convolutions and linear attention run on from one answer into the next
    other_layers = set(getattr(config, 'layer_types', None) or ()) - {'full_attention', 'sliding_attention'}
    if is_packed and other_layers:
        return math.inf, f'it has layers of type {" ".join(sorted(other_layers))}'
    try:
        with padded_attention(model):
            expected = _own_numbers(model, padded)
            set_attention(model, is_packed)
            # some architectures have an attention of their own and ignore the request, such as GPT-J and BLOOM
            if is_packed and config._attn_implementation != 'packed':
                return math.inf, 'it takes no attention from outside'
            if _is_reward(model):
                ours = model.response_scores(batch)
            else:
                (ours,) = model.response_logps(batch)
    # an architecture may raise anything where it is handed no mask (MPT), or does not hand the batch on (StableLM)
    except Exception as error:
        if guard.out_of_memory(error) or (is_packed and _is_machine_or_bug(error)):
            raise
        if is_packed:
            return math.inf, first_line(error)
        raise UserError(f'{_name(model)} cannot be trained here: its forward says {first_line(error)}') from None
    distance = _difference(ours, expected)
    return distance, f'{_what(model)} would be off by {distance:.1%}'


def _own_numbers(model, padded):
    """Return log-probs or scores of a padded batch's A answers, (A,), from the logits of transformers' own forward."""
    # transformers reads a score at the last id that is not the pad token, so the filler has to be that
    filler = core(model).config.get_text_config().pad_token_id if _is_reward(model) else 0
    ids = padded.ids.masked_fill(padded.mask == 0, filler)
    logits = model(input_ids=ids, attention_mask=padded.mask, use_cache=False).logits.float()
    if _is_reward(model):
        return logits[:, 0]
    # (N, V) where one of the N answer tokens is predicted, then (N,) of these tokens, then (A,) sums of answers
    logps = logits.log_softmax(-1).flatten(0, 1)[padded.predict_at]
    target_logps = logps.gather(1, padded.target[:, None])[:, 0]
    return padded.sum(target_logps)


def _is_machine_or_bug(error):
    """Return whether a packed forward has failed by the machine or a bug of ours, which says nothing of the architecture."""
    if isinstance(error, MemoryError | ImportError | OSError) or 'CUDA error' in str(error):
        return True
    # a bug of ours is an error of one of these types that a file of this project has raised
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_our_file = raised_in.is_relative_to(Path(__file__).parents[1]) and 'site-packages' not in raised_in.parts
    bugs = TypeError | NameError | AttributeError | LookupError | AssertionError | ArithmeticError
    return is_our_file and isinstance(error, bugs)


# ---- sharded ----


def measure_loaded(model):
    """Return _measure of a loaded model on the device where it is, mostly the CPU, or None with a note if it cannot run there."""
    device = next(model.parameters()).device
    try:
        return _measure(model, device)
    # some models have kernels for a GPU only; if there is another reason, can_pack will meet it as well
    except Exception as error:
        say(f'note: the loaded model was not compared with the sharded one: {type(error).__name__} on {device}')
        return None


def _measure(model, device):
    """Return scores (2,) of a made-up example, or log-probs (1, 8) of its answer tokens, with values (2, 8), on the CPU."""
    # a prompt of four random tokens, and two answers of four
    ids = np.random.default_rng(0).integers(core(model).get_input_embeddings().num_embeddings, size=12)
    prompt, answers = ids[:4], [ids[4:8], ids[8:]]
    batch = pack([(prompt, answers)], [0], pad=True, device=device)
    function = response_scores if _is_reward(model) else token_logps
    # a sharded model has this function as a method, which gathers its weights; a loaded one has not
    forward = getattr(model, function.__name__, partial(function, model))
    set_attention(model, packed=False)
    with torch.no_grad():
        return forward(batch).float().cpu()


def compare(model, expected, device, half):
    """Raise UserError where a sharded model gives other numbers than the loaded one gave: expected, from measure_loaded.

    half: the sharded model computes in bfloat16. Then rounding may be the cause, so it is a warning."""
    distance = _difference(_measure(model, device), expected)
    # give back what the forward has gathered
    model.reshard()
    limit = 0.1 if half else 0.01
    if distance <= limit:
        return
    text = f'the sharded {_name(model)} gives other log-probs than the loaded one: off by {distance:.1%}'
    if not half:
        raise UserError(f'{text}; start it in one process without torchrun, in float32, and report this')
    say(f'warning: {text}, more than bfloat16 should cost: compare with --dtype=float32')


# ---- long, and compared with a reference ----


def check_positions(model, length, what):
    """Raise UserError where sequences of length tokens are too long for the model. what: how the message calls them."""
    # learned positions have an embedding, which ends somewhere; rotary ones without scaling go on for ever
    embeddings = [name for name, module in core(model).named_modules() if isinstance(module, torch.nn.Embedding)]
    learns_positions = any(re.search('wpe|position', name) for name in embeddings)
    positions = _positions(model)
    unscaled = _unscaled(model)
    too_long = f'{what} take {length} tokens: lower max_length or max_new_tokens'
    if learns_positions and length > positions:
        raise UserError(f'{_name(model)} has {positions} positions, and {too_long}')
    if length > unscaled:
        why = 'encodes every position by the longest sequence of a batch, so results would depend on max_tokens'
        raise UserError(f'beyond {unscaled} tokens {_name(model)} {why}; {too_long}')


def room(model):
    """Return the number of tokens that a sequence of this model may have by its config, or infinity if there is no limit."""
    return min(_positions(model), _unscaled(model))


def _positions(model):
    """Return the number of positions that the config names, or infinity where it names none."""
    return getattr(core(model).config.get_text_config(), 'max_position_embeddings', None) or math.inf


def _unscaled(model):
    """Return the length up to which a rotary embedding does not depend on the longest sequence of a batch, or infinity.

    Beyond that length, scaling of the types dynamic and longrope encodes all positions of a batch in another way."""
    config = core(model).config.get_text_config()
    parameters = getattr(config, 'rope_parameters', None) or getattr(config, 'rope_scaling', None) or {}
    # they are one dict, or a dict of dicts, one for each type of layer
    ropes = [rope for rope in (parameters, *parameters.values()) if isinstance(rope, dict)]
    limits = [math.inf]
    for rope in ropes:
        kind = str(rope.get('rope_type') or rope.get('type'))
        if 'dynamic' in kind:
            limits.append(config.max_position_embeddings)
        elif kind in ('longrope', 'su') or 'long_mscale' in rope:
            original = rope.get('original_max_position_embeddings')
            original = original or getattr(config, 'original_max_position_embeddings', None)
            limits.append(original or config.max_position_embeddings)
    return min(limits)


def check_heads(policy, reference):
    """Raise UserError where policy and reference predict vocabularies of two sizes, which a divergence cannot compare."""
    ours, theirs = (len(core(model).get_output_embeddings().weight) for model in (policy, reference))
    if ours != theirs:
        raise UserError(f'policy and reference predict {ours} and {theirs} tokens: this loss compares them all')
