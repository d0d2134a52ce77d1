"""Attention over a packed row, in which each answer sees its prompt and itself: in bundles, or on CUDA by a varlen kernel.

A row is a list of groups, (tokens of a prompt, tokens of each answer that shares it): [prompt | answer | answer ...]."""

import contextlib
import inspect

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError
from hf.parts import core
from runtime.prefetch import move

MAX_BUNDLE_TOKENS = 96  # a larger mask wastes more work on masked entries than another attention call costs


def register_attention():
    """Register packed_attention with transformers as 'packed'. transformers builds no mask for a name that it does not know."""
    import transformers

    transformers.AttentionInterface.register('packed', packed_attention)


def set_attention(model, packed, for_padded=None):
    """Switch a model to packed_attention, or with packed=False to attention of transformers, for padded batches. UserError if it fails.

    for_padded: 'sdpa', 'eager' ..., remembered for later calls. None: that or, by default, sdpa if supported, else eager."""
    inner = core(model)
    if for_padded:
        inner.attention_if_padded = for_padded
    elif not hasattr(inner, 'attention_if_padded'):
        # some versions of transformers offer sdpa for Gemma 2, though sdpa has no soft cap
        has_cap = getattr(inner.config, 'attn_logit_softcapping', None) is not None
        inner.attention_if_padded = 'sdpa' if inner._supports_sdpa and not has_cap else 'eager'
    name = 'packed' if packed else inner.attention_if_padded
    try:
        inner.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise UserError(f'{type(inner).__name__} cannot use attention by {name}: {reason}') from None


@contextlib.contextmanager
def padded_attention(model):
    """Use attention for padded batches inside the with block."""
    before = core(model).config._attn_implementation
    set_attention(model, packed=False)
    try:
        yield
    finally:
        core(model).set_attn_implementation(before)


def packed_layout(model, batch):
    """Return the arguments of a model's forward for a packed batch, beside its ids. UserError if attention is not packed_attention."""
    if core(model).config._attn_implementation != 'packed':
        advice = 'call register_attention() and set_attention(model, packed=True) of hf/attention.py'
        raise UserError(f'answers of a packed batch see one another, without packed attention: {advice}')
    return {'position_ids': batch.position, 'packed': batch}


def packed_attention(module, query, key, value, mask, scaling=None, sliding_window=None, packed=None, **options):
    """Compute attention in a row of groups [prompt | answer | answer ...]: each answer sees itself and its group's prompt.

    Called by transformers, with mask None. query (1, H, T, D); key, value (1, H_kv, T, D); packed: the data.Batch of packed_layout().
    Returns (output (1, T, H, D), None). NotImplementedError if the architecture cannot be packed: hf/probe.py then pads batches."""
    softcap = options.get('softcap')
    if packed is None or options.get('s_aux') is not None:
        raise NotImplementedError('the batch is not handed on to attention (StableLM), or it has sinks (GPT-OSS)')
    # on CUDA in half precision a single kernel does it all. It needs keys and values of the same size, and has no soft cap
    is_half_precision = query.dtype in (torch.bfloat16, torch.float16)
    same_size = key.shape[-1] == value.shape[-1]
    if query.is_cuda and is_half_precision and softcap is None and same_size:
        return _attend_varlen(query, key, value, scaling, sliding_window, packed.varlen)[None], None
    # otherwise bundle by bundle. Split the whole row at once: in backward, that is a single cat
    sizes = [size for bundle in packed.bundles for size in bundle.sizes]
    pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)  # (q, k, v) of each piece
    outputs = []  # (1, n, H, D) each
    for bundle in packed.bundles:
        outputs += _attend_bundle(bundle, pieces, sliding_window, scaling, softcap)
    # selective activation checkpointing (hf/lean.py) gives modules this method: it does not keep the joined outputs for backward
    if hasattr(module, 'recomputed'):
        return module.recomputed(lambda *outputs: torch.cat(outputs, 1), *outputs), None
    return torch.cat(outputs, 1), None


def _attend_bundle(bundle, pieces, window, scaling, softcap):
    """Return the attention outputs of a Bundle, a list of (1, n, H, D). pieces: iterator over (q, k, v); takes those of the bundle."""
    if bundle.is_one_piece:
        q, k, v = next(pieces)
        return [_attend(q, k, v, bundle.mask(window, q.device), scaling, softcap)]
    # the first piece is the prompt; each other one is an answer, which sees the prompt's keys and its own
    prompt_q, prompt_k, prompt_v = next(pieces)
    outputs = []
    for number in range(1, len(bundle.sizes)):
        q, k, v = next(pieces)
        # the prompt's queries are computed once, with those of the first answer
        q = torch.cat((prompt_q, q), 2) if number == 1 else q
        k = torch.cat((prompt_k, k), 2)
        v = torch.cat((prompt_v, v), 2)
        mask = _causal(q.shape[2], k.shape[2], window, q.device)
        outputs.append(_attend(q, k, v, mask, scaling, softcap))
    return outputs


def _causal(n, m, window, device):
    """Return the causal mask (n, m) of n queries, the last n of m positions: True for the keys that a query sees.

    window: a query sees at most this many keys; None or 0: all. Returns None for a plain square mask: sdpa has is_causal for that."""
    n_before = m - n  # keys before the first query
    is_limited = window and window < m
    if n_before == 0 and not is_limited:
        return None
    mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(n_before)
    return mask.triu(n_before - window + 1) if is_limited else mask


def _attend(q, k, v, mask, scaling, softcap):
    """Return the attention output (1, n, H, D). q (1, H, n, D); k, v (1, H_kv, m, D); mask (n, m), or None for causal."""
    repeat = q.shape[1] // k.shape[1]  # query heads per key-value head (grouped-query attention)
    if not softcap:
        options = {'is_causal': mask is None, 'scale': scaling, 'enable_gqa': repeat > 1}
        return F.scaled_dot_product_attention(q, k, v, mask, **options).transpose(1, 2)
    # sdpa cannot cap the scores before softmax: compute them here, (1, H, n, m)
    k = k.repeat_interleave(repeat, 1)
    v = v.repeat_interleave(repeat, 1)
    scores = q @ k.mT * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, float('-inf'))
    weights = scores.float().softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def bundles_of(groups):
    """Split groups, in order, into Bundles of at most MAX_BUNDLE_TOKENS tokens. A larger group gets its own Bundle."""
    bundles = []  # a list of groups each
    tokens = MAX_BUNDLE_TOKENS  # of the last bundle; as if it were full, so that the first group starts one
    for prompt, answers in groups:
        size = prompt + sum(answers)
        tokens += size
        if tokens > MAX_BUNDLE_TOKENS:
            bundles.append([])
            tokens = size
        bundles[-1].append((prompt, answers))
    return [Bundle(bundle) for bundle in bundles]


class Bundle:
    """Consecutive groups of a packed row, cut into pieces. sizes: tokens of each piece.

    Several small groups are one piece, under a mask. The pieces of a single group are its prompt and each of its answers."""

    def __init__(self, groups):
        self.groups = groups
        self.is_one_piece = len(groups) > 1
        sizes = [size for prompt, answers in groups for size in (prompt, *answers)]
        self.sizes = [sum(sizes)] if self.is_one_piece else sizes
        self.masks = {}  # (window, device) -> mask, shared by all layers

    def mask(self, window, device):
        """Return the mask (T, T), cached: query i sees the keys j of its prompt and its answer for which 0 <= i - j < window."""
        if (window, device) in self.masks:
            return self.masks[window, device]
        tokens = []  # (group, part, position) of each token; part 0 is the prompt, others are answers
        for group, (prompt, answers) in enumerate(self.groups):
            for part, size in enumerate((prompt, *answers)):
                start = prompt if part > 0 else 0
                tokens += [(group, part, position) for position in range(start, start + size)]
        group, part, position = np.array(tokens).T
        # i - j of all pairs, in positions: x[:, None] is of the queries i, x of the keys j
        distance = position[:, None] - position
        same_group = group[:, None] == group
        in_prompt_or_answer = (part == 0) | (part[:, None] == part)
        mask = same_group & in_prompt_or_answer & (distance >= 0)
        if window:
            mask &= distance < window
        mask = move(torch.from_numpy(mask), device)
        self.masks[window, device] = mask
        return mask


class Varlen:
    """A packed row as the varlen kernel wants it: a sequence for each answer, with the keys of its prompt and its own.

    groups: [(tokens of a prompt, tokens of each answer that shares it)]. The example: [(2, (1, 2))], a prompt of 2 with answers of 1
    and 2, so a row of 5 tokens. Queries are in row order. A prompt's belong to its first answer.
    cu_q, cu_k: cumulative numbers of queries and keys: [0, 3, 5] and [0, 3, 7], as the prompt's keys come twice.
    key_tokens (K,): indices in the row, of the keys: [0, 1, 2, 0, 1, 3, 4]. None if no prompt is shared. copies: _copies(key_tokens)."""

    def __init__(self, groups):
        n_queries = []  # of each answer, which has those of its prompt if it is the first
        n_keys = []
        tokens = []  # arrays of indices in the row: the token of each key
        start = 0  # index in the row where the next prompt or answer starts
        for prompt, answers in groups:
            prompt_tokens = np.arange(start, start + prompt)
            start += prompt
            n_queries += [prompt + answers[0], *answers[1:]]
            n_keys += [prompt + answer for answer in answers]
            for answer in answers:
                tokens += [prompt_tokens, np.arange(start, start + answer)]
                start += answer
        self.key_tokens = None
        self.copies = []
        if any(len(answers) > 1 for _, answers in groups):
            key_tokens = np.concatenate(tokens)
            self.key_tokens = torch.from_numpy(key_tokens)
            self.copies = _copies(key_tokens)
        self.cu_q = torch.tensor(np.cumsum([0, *n_queries]), dtype=torch.int32)  # the kernel takes int32
        self.cu_k = torch.tensor(np.cumsum([0, *n_keys]), dtype=torch.int32)
        self.max_q = max(n_queries)
        self.max_k = max(n_keys)


def _copies(key_tokens):
    """Return [(tokens, their indices in key_tokens)]: first the first copy of every token, then all second copies, and so on.

    [0, 1, 2, 0, 1] -> [([0, 1, 2], [0, 1, 2]), ([0, 1], [3, 4])]. So no item has a token twice."""
    copies = []
    left = np.arange(len(key_tokens))  # indices that are in no item yet
    while len(left):
        tokens, first = np.unique(key_tokens[left], return_index=True)
        copies.append((torch.from_numpy(tokens), torch.from_numpy(left[first])))
        left = np.delete(left, first)
    return copies


def _attend_varlen(query, key, value, scaling, sliding_window, varlen):
    """Return the attention output (T, H, D) of a packed row. query (1, H, T, D); key, value (1, H_kv, T, D); varlen: a Varlen."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    if varlen.key_tokens is not None:
        k = CopyPrompts.apply(k, varlen)
        v = CopyPrompts.apply(v, varlen)
    # a query sees this many earlier tokens (-1: all), and 0 later ones
    n_before = -1 if sliding_window is None else sliding_window - 1
    options = {'scale': scaling, 'window_size': (n_before, 0)}
    # grouped-query attention: before torch 2.13, repeat the key and value heads
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1 and 'enable_gqa' in inspect.signature(varlen_attn).parameters:
        options['enable_gqa'] = True
    elif repeat > 1:
        k = k.repeat_interleave(repeat, 1)
        v = v.repeat_interleave(repeat, 1)
    return varlen_attn(q, k, v, varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k, **options)


class CopyPrompts(torch.autograd.Function):
    """Keys or values (T, H, D) -> (K, H, D), where each answer has a copy of its prompt before it. varlen: with key_tokens."""

    @staticmethod
    def forward(ctx, x, varlen):
        ctx.varlen = varlen
        return _rows(x, varlen.key_tokens)

    @staticmethod
    def backward(ctx, grad):
        """Return (T, H, D): the gradient (K, H, D), summed over the copies of each token. Autograd's own way would sort all keys."""
        # an item of copies: some tokens, each once, and the index in grad of a copy of each. The first item has all tokens of the row
        (_all_tokens, of_first_copies), *further_copies = ctx.varlen.copies
        total = _rows(grad.contiguous(), of_first_copies)
        for tokens, of_copies in further_copies:
            # += would do the same: no token comes twice here, so none overwrites another's sum
            total[tokens] = _rows(total, tokens) + _rows(grad, of_copies)
        return total, None  # none for varlen


def _rows(x, index):
    """Return x[index] for x (T, H, D). Copies words of 16 bytes where it can, which is three times as fast."""
    # a view as complex128 numbers, of 16 bytes each, needs whole ones in every row, and each row to start at one
    per_word = 16 // x.element_size()
    must_be_multiples = (x.storage_offset(), x.shape[-1], *x.stride()[:-1])
    if any(size % per_word for size in must_be_multiples):
        return x[index]
    words = x.view(torch.complex128)
    return words[index].view(x.dtype)
