"""Check that a packed or sharded model gives the numbers of transformers, and supports the sequence lengths of a run."""

import math
import re
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from data import pack
from hf.attention import padded_attention, set_attention
from hf.parts import core
from rl.heads import response_scores, token_logps
from runtime import errors
from runtime.hub import first_line
from runtime.log import say


def _name(model):
    """Return the model's class name, for messages, without the prefix added by FSDP."""
    return type(core(model)).__name__.removeprefix('FSDP')


def _is_reward(model):
    """Return whether it is a reward model, which has scores where a language model has log-probs."""
    return hasattr(core(model), 'score')


def _difference(found, expected):
    """Return the maximum error of a tensor: absolute where |expected| < 1, otherwise relative."""
    errors_in_units = (found - expected).abs() / expected.abs().clamp(min=1)
    return errors_in_units.max().item()


def can_pack(model, examples, device, wanted=True):
    """Return whether the model's log-probs or scores on packed batches are its own, up to rounding. Tries two of these Examples.

    If they are not, prints a note. The caller then pads batches, as it does if packing is not wanted: UserError if that fails, too."""
    packed, padded = two_layouts(examples, device)
    if wanted:
        max_error, reason = deviation(model, ours=packed, theirs=padded)
        if max_error <= _tolerance(model):
            return True
    # our own head may miss something, such as a logit scale under a new key of the model's config
    max_error, message = deviation(model, ours=padded, theirs=padded)
    if max_error > _tolerance(model):  # NaN, from broken weights, is not larger: the first step will say so
        raise UserError(f'the head of {_name(model)} does something that nanopref does not know: {message}')
    if wanted:
        say(f'note: this architecture cannot be packed ({reason}): batches are padded instead')
    return False


def two_layouts(examples, device):
    """Return the first and the longest of these Examples twice: [as a packed Batch, as a padded one]."""
    longest = int(examples.lengths.argmax())
    two = [examples[0], examples[longest]]
    return [pack(two, slots=[0, 1], pad=pad, device=device) for pad in (False, True)]


def _tolerance(model):
    """Return the largest _difference of log-probs or scores that rounding can explain. Call it after a forward."""
    # FSDP's shards are float32. A forward leaves gathered parameters, which have the dtype of its computations
    in_bfloat16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
    in_tf32 = torch.get_float32_matmul_precision() != 'highest'
    return 0.03 if in_bfloat16 or in_tf32 else 1e-4


@errors.on_full_memory('the two examples that try the model out do not fit; lower max_length, or try --dtype=bfloat16')
@torch.no_grad()
def deviation(model, ours, theirs):
    """Compare our log-probs or scores of the batch `ours` with those of the model's own forward on the batch `theirs`.

    ours: packed or padded; theirs: the same examples, padded. Returns (their _difference, what to say if that is too large). The
    difference is infinite if the model cannot run a packed batch. If it cannot run a padded one, raises UserError."""
    config = core(model).config
    is_packed = bool(ours.groups)  # only packed batches have groups
    # convolutions and linear attention would leak from one answer into the next
    layer_types = getattr(config, 'layer_types', None) or ()
    other_layers = set(layer_types) - {'full_attention', 'sliding_attention'}
    if is_packed and other_layers:
        return math.inf, f'it has layers of type {" ".join(sorted(other_layers))}'
    try:
        # set_attention changes it within the block, at whose end the present attention comes back
        with padded_attention(model):
            expected = _transformers_numbers(model, theirs)
            set_attention(model, is_packed)
            # architectures with hard-coded attention, such as GPT-J and BLOOM, keep their own
            if is_packed and config._attn_implementation != 'packed':
                return math.inf, 'it takes no attention from outside'
            found = model.response_scores(ours) if _is_reward(model) else model.response_logps(ours)[0]
    # a model's forward may raise anything: MPT's needs a mask, StableLM's drops our argument
    except Exception as error:
        if errors.out_of_memory(error):
            raise
        # on a padded batch it is of no use at all; on a packed one it cannot be packed, if the error is of the model
        if not is_packed:
            raise UserError(f'{_name(model)} cannot be trained here: its forward says {first_line(error)}') from None
        if not _is_of_model(error):
            raise
        return math.inf, first_line(error)
    max_error = _difference(found, expected)
    kind = 'scores' if _is_reward(model) else 'log-probs'
    return max_error, f'other {kind} than those of transformers, off by {max_error:.1%}'


def _is_of_model(error):
    """Return whether an error of a forward tells of the model, not of the machine or of a bug in a file of this project."""
    is_of_machine = isinstance(error, MemoryError | ImportError | OSError) or 'CUDA error' in str(error)
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_our_file = raised_in.is_relative_to(Path(__file__).parents[1]) and 'site-packages' not in raised_in.parts
    bugs = TypeError | NameError | AttributeError | LookupError | AssertionError | ArithmeticError
    return not is_of_machine and not (is_our_file and isinstance(error, bugs))


def _transformers_numbers(model, padded):
    """Return log-probs or scores of the A answers of a padded Batch, (A,), from the forward of transformers."""
    # transformers reads the score at the last token that is not pad_token_id; language models take any padding
    pad_id = core(model).config.get_text_config().pad_token_id if _is_reward(model) else 0
    ids = padded.ids.masked_fill(padded.mask == 0, pad_id)
    logits = model(input_ids=ids, attention_mask=padded.mask, use_cache=False).logits.float()
    if _is_reward(model):
        return logits[:, 0]
    # of the N answer tokens of all answers: target is their ids, predict_at the place before each in the flattened rows
    vocabulary_logps = logits.log_softmax(-1).flatten(0, 1)[padded.predict_at]  # (N, vocabulary)
    token_logps = vocabulary_logps.gather(1, padded.target[:, None])[:, 0]  # (N,)
    return padded.sum(token_logps)  # of the tokens of each answer


def outputs_of_loaded(model):
    """Return an unsharded model's outputs for a made-up example, for check_outputs(); None with a note if it cannot run."""
    device = next(model.parameters()).device
    try:
        return _outputs(model, device)
    # some models have GPU kernels only; any other failure will show up again in can_pack
    except Exception as error:
        say(f'note: the loaded model was not compared with the sharded one: {type(error).__name__} on {device}')
        return None


def _outputs(model, device):
    """Return a model's outputs for a made-up example, on the CPU: scores (2,), log-probs (1, 8), or log-probs and values (2, 8)."""
    # a prompt and two answers, of four random tokens each
    vocab_size = core(model).get_input_embeddings().num_embeddings
    prompt, *answers = np.random.default_rng(0).integers(vocab_size, size=12).reshape(3, 4)
    batch = pack([(prompt, answers)], slots=[0], pad=True, device=device)
    function = response_scores if _is_reward(model) else token_logps
    # a sharded model has the function as a method that gathers its weights (fsdp.shard)
    forward = getattr(model, function.__name__, partial(function, model))
    set_attention(model, packed=False)
    with torch.no_grad():
        return forward(batch).float().cpu()


def check_outputs(model, expected, device, in_bfloat16):
    """Raise UserError if a sharded model gives other scores or log-probs than expected; in bfloat16 only warn.

    expected: those of the same model before it was sharded, from outputs_of_loaded(), for the same made-up example."""
    try:
        max_error = _difference(_outputs(model, device), expected)
    except RuntimeError as error:
        # such as MiniMax, whose forward multiplies float32 by bfloat16
        if not (in_bfloat16 and re.search('dtype|scalar type', str(error))):
            raise
        raise UserError(f'{_name(model)} does not compute in bfloat16 ({first_line(error)}): --dtype=float32') from None
    model.reshard()
    limit = 0.1 if in_bfloat16 else 0.01  # of the expected value, or of 1 where that is smaller
    if max_error <= limit:
        return
    kind = 'scores' if _is_reward(model) else 'log-probs'
    text = f'the sharded {_name(model)} gives other {kind} than the loaded one: off by {max_error:.1%}'
    if not in_bfloat16:
        raise UserError(f'{text}; start it in one process without torchrun, in float32, and report this')
    say(f'warning: {text}, more than bfloat16 should cost: compare with --dtype=float32')


def check_positions(model, length, noun):
    """Raise UserError if sequences of length tokens are too long for the model. noun: of the sequences, for the message."""
    inner = core(model)
    embeddings = [name for name, module in inner.named_modules() if isinstance(module, torch.nn.Embedding)]
    tables = [name for name in embeddings if re.search('wpe|position', name)]
    # the tables of GPT-J, CodeGen and CTRL are buffers; MPT makes one in each forward
    tables += [name for name, _ in inner.named_buffers() if name.endswith(('embed_positions', 'pos_encoding'))]
    has_table = tables or inner.config.model_type == 'mpt'
    max_positions, max_unscaled = _length_limits(model)
    too_long = f'{noun} take {length} tokens: lower max_length or max_new_tokens'
    # without a table of positions, as with rotary embeddings, a model may go beyond its max_positions
    if has_table and length > max_positions:
        raise UserError(f'{_name(model)} has {max_positions} positions, and {too_long}')
    if length > max_unscaled:
        why = 'encodes every position by the longest sequence of a batch, so results would depend on max_tokens'
        raise UserError(f'beyond {max_unscaled} tokens {_name(model)} {why}; {too_long}')


def max_sequence_length(model):
    """Return the maximum sequence length in tokens according to the model's config, infinity if it sets no limit."""
    return min(_length_limits(model))


def _length_limits(model):
    """Return (positions by the config, longest sequence whose results do not depend on its batch), in tokens; infinity for no limit."""
    config = core(model).config.get_text_config()
    # max_seq_len: MPT's name
    max_positions = getattr(config, 'max_position_embeddings', None) or getattr(config, 'max_seq_len', None) or math.inf
    unscaled = [math.inf]
    # options of RoPE: {'rope_type': 'dynamic', ...}, or such a dict for each type of layer: {'full_attention': {...}, ...}
    options = getattr(config, 'rope_parameters', None) or getattr(config, 'rope_scaling', None) or {}
    for rope in [each for each in (options, *options.values()) if isinstance(each, dict)]:
        rope_type = str(rope.get('rope_type') or rope.get('type'))
        # beyond some length, both of these kinds scale all positions of a batch by its longest sequence
        if 'dynamic' in rope_type:
            unscaled.append(max_positions)
        elif rope_type in ('longrope', 'su') or 'long_mscale' in rope:
            key = 'original_max_position_embeddings'
            unscaled.append(rope.get(key) or getattr(config, key, None) or max_positions)
    return max_positions, min(unscaled)


def check_heads(policy, reference):
    """Raise UserError if policy and reference have different vocabulary sizes, as divergences compare all tokens."""
    ours, theirs = (len(core(model).get_output_embeddings().weight) for model in (policy, reference))
    if ours != theirs:
        raise UserError(f'policy and reference predict {ours} and {theirs} tokens: this loss compares them all')
