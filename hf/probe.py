"""Whether a loaded model does here what it does in transformers: packed, sharded, and at the lengths of a run."""

import math
import re
import traceback
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
    return type(core(model)).__name__.removeprefix('FSDP')  # the prefix that sharding gives it


def _is_reward(model):
    return hasattr(core(model), 'score')


def _difference(found, expected):
    """The largest relative difference of two tensors, absolute where what is expected is less than 1."""
    return ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()


# ---- packed ----


def can_pack(model, packed, padded, say, wanted=True):
    """Whether packed batches are wanted and give this architecture's own log-probs or scores, up to rounding; if not, say so.

    packed, padded: Batches of the same examples. Raises UserError where padded ones give others, too: then the head does what
    model.Head does not know."""
    error, reason = packing(model, packed, padded) if wanted else (math.inf, '')
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())  # as the forward has left them: gathered
    rough = half or torch.get_float32_matmul_precision() != 'highest'
    limit = 0.03 if rough else 1e-4
    if error <= limit:
        return True
    error, off = packing(model, padded, padded)
    if error > limit:
        what = 'scores' if _is_reward(model) else 'log-probs'
        raise UserError(f'{_name(model)} gives other {what} by its own head, which does what ours does not know: {off}')
    if wanted:
        say(f'note: this architecture cannot be packed ({reason}): batches are padded instead')
    return False


@guard.memory_for('the two examples that try the model out do not fit; lower max_length, or try --dtype=bfloat16')
@torch.no_grad()
def packing(model, batch, padded):
    """(Largest relative difference between log-probs or scores of a batch and what the model's own forward gives for the same,
    padded; why packing is not possible if that is too large).

    Infinite where the architecture takes no attention from outside (GPT-J, BLOOM), does not hand it the batch, fails without
    a mask (MPT), or runs on from one answer into the next (convolutions, linear attention). Raises UserError where it cannot
    run padded either."""
    config, is_packed = core(model).config, bool(batch.groups)
    other_layers = set(getattr(config, 'layer_types', None) or ()) - {'full_attention', 'sliding_attention'}
    if is_packed and other_layers:
        return math.inf, f'it has layers of type {" ".join(sorted(other_layers))}'
    try:
        with padded_attention(model):
            plain = _own_numbers(model, padded)
            set_attention(model, is_packed)
            if is_packed and config._attn_implementation != 'packed':
                return math.inf, 'it takes no attention from outside'
            ours = model.response_scores(batch) if _is_reward(model) else model.response_logps(batch)[0]
    except Exception as error:  # whatever an architecture raises that does not know what it was given
        if guard.out_of_memory(error) or (is_packed and _is_ours(error)):
            raise
        if is_packed:
            return math.inf, first_line(error)
        raise UserError(f'{_name(model)} cannot be trained here: its forward says {first_line(error)}') from None
    error = _difference(ours, plain)
    return error, f'{"scores" if _is_reward(model) else "log-probs"} would be off by {error:.1%}'


def _own_numbers(model, padded):
    """Log-probs or scores of a padded batch by the model's own logits."""
    # a score is read at the last id that is not pad
    filler = core(model).config.get_text_config().pad_token_id if _is_reward(model) else 0
    ids = padded.ids.masked_fill(padded.mask == 0, filler)
    logits = model(input_ids=ids, attention_mask=padded.mask, use_cache=False).logits.float()
    if _is_reward(model):
        return logits[:, 0]
    logps = logits.log_softmax(-1).flatten(0, 1)[padded.predict_at]
    return padded.sum(logps.gather(1, padded.target[:, None])[:, 0])


def _is_ours(error):
    """Whether what a packed forward raised says nothing of the architecture: the machine fails, or this code has a bug."""
    if isinstance(error, MemoryError | ImportError | OSError) or 'CUDA error' in str(error):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    here = raised_in.is_relative_to(Path(__file__).parents[1]) and 'site-packages' not in raised_in.parts
    bugs = TypeError | NameError | AttributeError | LookupError | AssertionError | ArithmeticError
    return here and isinstance(error, bugs)


# ---- sharded ----


def measure_loaded(model):
    """_measure of a model where it is, mostly on the CPU, or None where it cannot run there."""
    device = next(model.parameters()).device
    try:
        return _measure(model, device)
    except Exception as error:  # some have kernels for a GPU only; can_pack says what fails there as well
        say(f'note: the loaded model was not compared with the sharded one: {type(error).__name__} on {device}')


def _measure(model, device):
    """Log-probs (with values, where there are some) of the answers of a made-up example, or scores: (rows, N), on the CPU."""
    ids = np.random.default_rng(0).integers(core(model).get_input_embeddings().num_embeddings, size=12)
    batch = pack([(ids[:4], [ids[4:8], ids[8:]])], [0], pad=True, device=device)
    function = response_scores if _is_reward(model) else token_logps
    # once it is a method of the model, it gathers what is sharded
    forward = getattr(model, function.__name__, lambda batch: function(model, batch))
    set_attention(model, packed=False)
    with torch.no_grad():
        return forward(batch).float().cpu()


def compare(model, expected, device, half):
    """Raise UserError where the sharded model gives other numbers than the loaded one gave (expected).

    half: in bfloat16 the difference may be rounding, so it is a warning."""
    error = _difference(_measure(model, device), expected)
    model.reshard()
    if error <= (0.1 if half else 0.01):
        return
    text = f'the sharded {_name(model)} gives other log-probs than the loaded one: off by {error:.1%}'
    if not half:
        raise UserError(f'{text}; start it in one process without torchrun, in float32, and report this')
    say(f'warning: {text}, more than bfloat16 should cost: compare with --dtype=float32')


# ---- long, and compared with a reference ----


def check_positions(model, length, what):
    """Raise UserError where sequences (what) of length tokens are longer than the model reads.

    It has learned no more position embeddings, or its rotary scaling would depend on the rest of the batch."""
    embeddings = [name for name, m in core(model).named_modules() if isinstance(m, torch.nn.Embedding)]
    learned = any(re.search('wpe|position', name) for name in embeddings)
    too_long = f'{what} take {length} tokens: lower max_length or max_new_tokens'
    if learned and length > _positions(model):
        raise UserError(f'{_name(model)} has {_positions(model)} positions, and {too_long}')
    if length > _unscaled(model):
        why = 'encodes every position by the longest sequence of a batch, so results would depend on max_tokens'
        raise UserError(f'beyond {_unscaled(model)} tokens {_name(model)} {why}; {too_long}')


def room(model):
    """The most tokens of a sequence that this model reads as it was made to, or infinity."""
    return min(_positions(model), _unscaled(model))


def _positions(model):
    return getattr(core(model).config.get_text_config(), 'max_position_embeddings', None) or math.inf


def _unscaled(model):
    """The longest sequence up to which rotary scaling does not look at the longest one of a batch (dynamic, longrope does)."""
    config = core(model).config.get_text_config()
    found = getattr(config, 'rope_parameters', None) or getattr(config, 'rope_scaling', None) or {}
    limits = [math.inf]
    # one set of parameters, or one for each type of layer
    for rope in (rope for rope in [found, *found.values()] if isinstance(rope, dict)):
        kind = str(rope.get('rope_type') or rope.get('type'))
        if 'dynamic' in kind:
            limits.append(config.max_position_embeddings)
        elif kind in ('longrope', 'su') or 'long_mscale' in rope:
            original = rope.get('original_max_position_embeddings')
            original = original or getattr(config, 'original_max_position_embeddings', None)
            limits.append(original or config.max_position_embeddings)
    return min(limits)


def check_heads(policy, reference):
    """Raise UserError where a divergence has two vocabularies to compare."""
    ours, theirs = (len(core(m).get_output_embeddings().weight) for m in (policy, reference))
    if ours != theirs:
        raise UserError(f'policy and reference predict {ours} and {theirs} tokens: this loss compares them all')
