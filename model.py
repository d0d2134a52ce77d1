"""Inside a transformers model: attention over packed answers, log-probs of answers, divergences. hf/load.py loads models.

Training on preferences needs one function of this file, response_logps(model, batch): the sum of log-probs of every answer of a
packed microbatch (data.py). It applies the LM head only where an answer token is predicted, in chunks of positions, and backward
computes their logits again: a (tokens, vocabulary) tensor of a whole microbatch never exists. Collectives are in fsdp.py.
"""

import contextlib

import torch
import torch.nn.functional as F
import transformers

from configurator import UserError
from hf import varlen


def core(model):
    """Return the transformers model inside a PEFT wrapper, or the model itself if it has no wrapper."""
    return model.get_base_model() if hasattr(model, 'get_base_model') else model


def blocks(model):
    """Return the list of a model's transformer blocks, in order. Their class names are declared in _no_split_modules."""
    # any part of the model, such as a critic inside it, may declare its own
    class_names = set()
    for module in core(model).modules():
        class_names.update(getattr(module, '_no_split_modules', None) or ())
    # only the outermost ones: Mamba declares a block and a part of it
    found = {}
    for path, module in core(model).named_modules():
        is_inside_block = any(path.startswith(f'{block_path}.') for block_path in found)
        if type(module).__name__ in class_names and not is_inside_block:
            found[path] = module
    return list(found.values())


# ---- attention over packed answers ----


def register_attention():
    """Register packed_attention with transformers as 'packed'. For a name that it does not know, transformers makes no mask."""
    transformers.AttentionInterface.register('packed', packed_attention)


def packed_attention(module, query, key, value, mask, scaling=None, sliding_window=None, packed=None, **options):
    """Return the attention output of a row of groups [prompt | answer | answer ...], as (1, T, H, D), and None for its weights.

    Each answer sees its group's prompt and itself. query (1, H, T, D), key and value (1, H_kv, T, D); packed: the data.Batch. On
    CUDA in half precision one kernel computes all of it; elsewhere each answer, and each block of small groups, calls sdpa.
    Raises NotImplementedError for an architecture that cannot be packed: hf/probe.py then chooses padded batches."""
    softcap = options.get('softcap')
    if packed is None or options.get('s_aux') is not None:
        raise NotImplementedError('the batch is not handed on to attention (StableLM), or it has sinks (GPT-OSS)')
    # the kernel has no soft cap, and wants heads of keys and of values to have one size
    half = query.dtype in (torch.bfloat16, torch.float16)
    has_one_size = key.shape[-1] == value.shape[-1]
    if query.is_cuda and half and softcap is None and has_one_size:
        return varlen.attention(query, key, value, scaling, sliding_window, packed.varlen)[None], None

    # (q, k, v) of each piece: a block of small groups is one piece, a large group's prompt and answers are one each
    sizes = [size for block in packed.blocks for size in block.sizes]
    # split at once, since its backward is one cat
    pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    out = []  # (1, H, n, D) each
    for block in packed.blocks:
        if block.is_one_piece:
            q, k, v = next(pieces)
            mask = block.mask(sliding_window, q.device)
            out.append(_attend(q, k, v, mask, scaling, softcap))
            continue
        # the prompt's keys and values stand before those of each answer; its queries go with the first answer
        prompt_q, prompt_k, prompt_v = next(pieces)
        for number in range(1, len(block.sizes)):
            q, answer_k, answer_v = next(pieces)
            if number == 1:
                q = torch.cat((prompt_q, q), 2)
            k = torch.cat((prompt_k, answer_k), 2)
            v = torch.cat((prompt_v, answer_v), 2)
            mask = _causal(q.shape[2], k.shape[2], sliding_window, q.device)
            out.append(_attend(q, k, v, mask, scaling, softcap))
    return torch.cat(out, 2).transpose(1, 2), None


def _causal(n, m, window, device):
    """Return a mask (n, m): which of m positions the last n see. None where sdpa's is_causal says the same, which is faster."""
    n_before = m - n  # positions that are seen, but have no query here
    window_cuts = window and window < m
    if n_before == 0 and not window_cuts:
        return None
    mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(n_before)
    return mask.triu(n_before - window + 1) if window_cuts else mask


def _attend(q, k, v, mask, scaling, softcap):
    """Return the attention of q (1, H, n, D) over k and v (1, H_kv, m, D): (1, H, n, D). mask (n, m), or None for causal."""
    # each head of keys and values serves so many heads of queries
    repeat = q.shape[1] // k.shape[1]
    if not softcap:
        options = {'is_causal': mask is None, 'scale': scaling, 'enable_gqa': repeat > 1}
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    # a soft cap lies between scores and softmax, where sdpa has no place for it: make the scores (1, H, n, m) here
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.mT * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    weights = scores.masked_fill(~mask, float('-inf')).float().softmax(-1)
    return weights.to(v.dtype) @ v


def set_attention(model, packed, for_padded=None):
    """Make a model use packed_attention from now on, or if packed is false, an attention of transformers for padded batches.

    for_padded: its name; None: the one that was set before, or else sdpa or eager. Raises UserError if the model lacks it."""
    inner = core(model)
    if for_padded:
        inner.attention_if_padded = for_padded
    elif not hasattr(inner, 'attention_if_padded'):
        # some versions of transformers offer sdpa to Gemma 2, though sdpa lacks its soft cap
        has_cap = getattr(inner.config, 'attn_logit_softcapping', None) is not None
        inner.attention_if_padded = 'sdpa' if inner._supports_sdpa and not has_cap else 'eager'
    try:
        inner.set_attn_implementation('packed' if packed else inner.attention_if_padded)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise UserError(
            f'{type(inner).__name__} cannot use attention by {inner.attention_if_padded}: {reason}'
        ) from None


@contextlib.contextmanager
def padded_attention(model):
    """Let a model use attention for padded batches inside the with block: to generate, or to compare with."""
    before = core(model).config._attn_implementation
    set_attention(model, packed=False)
    try:
        yield
    finally:
        core(model).set_attn_implementation(before)


# ---- log-probs and divergences of answers ----


def response_logps(model, batch, divergence=None, reference=None):
    """Return the sum of the log-probs of the tokens of each of a batch's A answers: (1, A), float32.

    divergence: a function of (log_pi, log_ref) as below, such as kl. With it the result is (3, A): log-probs of the policy, the
    divergences from the reference, log-probs of the reference. reference: that model's hidden_and_head of the batch."""
    hidden, (weight, bias) = hidden_and_head(model, batch)
    # with a device map, targets and reference may be on another device
    device = hidden.device
    if reference is not None:
        ref_hidden, ref_head = reference
        # the head's bias may be None
        reference = [x if x is None else x.to(device) for x in (ref_hidden, *ref_head)]
    # (1 or 3, N): numbers of each token, and then their sums over each answer
    token_values = Head.apply(hidden, weight, bias, batch.target.to(device), core(model).config, divergence, reference)
    return torch.stack([batch.sum(row) for row in token_values.to(batch.ids.device)])


def hidden_and_head(model, batch):
    """Return the hidden states (N, d) that predict the N answer tokens, and the LM head as (weight, bias or None).

    It must run in a forward of the root module, where parameters are gathered: fsdp.add_method makes it one."""
    head = core(model).get_output_embeddings()
    hidden = body(model, batch).to(head.weight.device).flatten(0, 1)
    return hidden[batch.predict_at.to(hidden.device)], (head.weight, head.bias)


def body(model, batch):
    """Return the last hidden states of a batch, (rows, T, d): what the model computes before its head."""
    inner = core(model)
    trunk = inner.base_model
    # Llama 4 declares a wrong name for its trunk, and base_model is then the whole model
    if trunk is inner:
        trunk = inner.model
    # packed_attention finds the groups in the batch itself, which transformers hands on as the option packed
    if batch.groups:
        layout = {'position_ids': batch.position, 'packed': batch}
    else:
        layout = {'attention_mask': batch.mask}
    return trunk(input_ids=batch.ids, use_cache=False, **layout).last_hidden_state


# ---- the LM head: hidden states -> log-probs, never all logits at once ----


def wide(x):
    """Return the dtype for log-probs and sums of x: float32, or float64 if x is float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _scale_and_cap(config):
    """Return (the factor that multiplies the head's output, the soft cap of the logits or None), as the config says."""
    # Cohere has a factor, Granite a divisor
    factor = getattr(config, 'logit_scale', None) or 1.0
    divisor = getattr(config, 'logits_scaling', None) or 1.0
    # the soft cap's names in Gemma 2 and in RecurrentGemma
    cap = getattr(config, 'final_logit_softcapping', None) or getattr(config, 'logits_soft_cap', None)
    return factor / divisor, cap


class Head(torch.autograd.Function):
    """LM head, log-softmax, gather and divergence in chunks of positions: the logits of one chunk exist at a time."""

    @staticmethod
    def chunks(n, vocabulary, most):
        """Return slices that cut n positions into chunks. Each has one position, or more with at most so many logits (most)."""
        size = max(1, most // vocabulary)
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    @staticmethod
    def logits(policy, reference, config):
        """Yield (rows, logits (n, V), pieces) of every chunk. policy: (hidden, weight, bias); reference: the same, or None.

        rows: the chunk's slice of all N positions. pieces: the chunk cut into smaller ones, each as (its slice of all positions,
        its logits, the reference's logits or None). The caller may overwrite logits: the next chunk is written over them."""
        hidden, weight, _ = policy
        # the most logits of a chunk, which is one matrix product, and of a piece, whose logits may be copied
        most_of_chunk, most_of_piece = (2**27, 2**24) if hidden.is_cuda else (2**23, 2**19)
        chunks = Head.chunks(len(hidden), len(weight), most_of_chunk)
        models = [policy, reference] if reference else [policy]
        # all chunks share a buffer: on a CPU, fresh memory costs as much as the product
        buffers = [hidden.new_empty(chunks[0].stop, len(weight), dtype=wide(hidden)) for _ in models]
        for rows in chunks:
            n = rows.stop - rows.start
            for buffer, (model_hidden, *head) in zip(buffers, models, strict=True):
                _write_logits(buffer[:n], model_hidden[rows], *head, config)
            pieces = []
            for piece in Head.chunks(n, len(weight), most_of_piece):
                at = slice(rows.start + piece.start, rows.start + piece.stop)
                ref_logits = buffers[1][piece] if reference else None
                pieces.append((at, buffers[0][piece], ref_logits))
            yield rows, buffers[0][:n], pieces

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, config, divergence, reference):
        """Return the log-probs of the targets (1, N); with a divergence (3, N): then also it, and the reference's log-probs.

        hidden (N, d), weight (V, d), bias (V,) or None, target (N,). reference: (hidden, weight, bias) of that model, or None."""
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.rest = config, divergence, reference
        values = hidden.new_empty(3 if divergence else 1, len(target), dtype=wide(hidden))
        for _, _, pieces in Head.logits((hidden, weight, bias), reference, config):
            for at, logits, ref_logits in pieces:
                log_pi = torch.log_softmax(logits, 1, out=logits)
                values[0, at] = log_pi.gather(1, target[at, None]).squeeze(1)
                if divergence:
                    log_ref = torch.log_softmax(ref_logits, 1, out=ref_logits)
                    values[1, at], _ = divergence(log_pi, log_ref)
                    values[2, at] = log_ref.gather(1, target[at, None]).squeeze(1)
        return values

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of hidden, weight and bias, from grad (1 or 3, N), that of forward's result."""
        hidden, weight, bias, target = ctx.saved_tensors
        config, divergence, reference = ctx.rest
        _, weight_trains, bias_trains, *_ = ctx.needs_input_grad
        # each chunk fills its rows of d_hidden, and adds to the head's gradients, in float32 whatever the compute type
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=wide(weight)) if weight_trains else None
        d_bias = torch.zeros_like(bias, dtype=wide(bias)) if bias_trains else None
        for rows, logits_of_chunk, pieces in Head.logits((hidden, weight, bias), reference, config):
            # the pieces are views of logits_of_chunk, so this makes all of it the gradient
            for at, logits, ref_logits in pieces:
                _to_gradient(logits, target[at], grad[:, at], config, divergence, ref_logits)
            d_logits = logits_of_chunk.to(weight.dtype)
            d_hidden[rows] = d_logits @ weight
            # addmm_ needs no memory for the product, but one dtype
            if weight_trains and d_weight.dtype == weight.dtype:
                d_weight.addmm_(d_logits.T, hidden[rows])
            elif weight_trains:
                d_weight += d_logits.T @ hidden[rows]
            if bias_trains:
                d_bias += logits_of_chunk.sum(0)
        if weight_trains:
            d_weight = d_weight.to(weight.dtype)
        if bias_trains:
            d_bias = d_bias.to(bias.dtype)
        # the other four arguments of forward have no gradient
        return d_hidden, d_weight, d_bias, None, None, None, None


def _write_logits(out, hidden, weight, bias, config):
    """Write the logits of hidden (n, d) into out (n, V), scaled and soft-capped as the config says."""
    scale, cap = _scale_and_cap(config)
    if weight.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    else:
        out.copy_(hidden @ weight.T)
    if bias is not None:
        out += bias
    if scale != 1:
        out *= scale
    if cap:
        out.div_(cap).tanh_().mul_(cap)


def _to_gradient(logits, target, grad, config, divergence, ref_logits):
    """Replace logits (n, V), in place, by the loss's gradient with respect to the head's output, before scale and cap.

    grad (1 or 3, n): the loss's gradients of the targets' log-probs, and of the divergences if there are any. With respect to the
    logits, a log-prob has the gradient one-hot - pi. A divergence has pi * sum(mass) - mass, where its function returns the mass
    beside it. ref_logits is overwritten, too."""
    scale, cap = _scale_and_cap(config)
    # the soft cap's derivative, made before the logits are overwritten
    slope = 1 - (logits / cap) ** 2 if cap else 1
    # the terms with pi come first, those with one-hot at the end
    factor = -grad[0, :, None]
    if divergence:
        log_pi = torch.log_softmax(logits, 1, out=logits)
        log_ref = torch.log_softmax(ref_logits, 1, out=ref_logits)
        mass = divergence(log_pi, log_ref)[1].mul_(grad[1, :, None])
        log_pi.exp_().mul_(factor + mass.sum(1, keepdim=True)).sub_(mass)
    else:
        torch.softmax(logits, 1, out=logits).mul_(factor)
    logits.scatter_add_(1, target[:, None], grad[0, :, None])
    if cap or scale != 1:
        logits *= slope * scale


# ---- divergences of the policy from the reference at one position, for TDPO and Ra-DPO (arXiv:2505.20359) ----
# log_pi and log_ref are log-probs (..., V) of policy and reference. Each function returns a divergence D (...,), and its mass
# (..., V) = -dD / dlog_pi, which says how strongly D pulls up the probability of each word


def kl(log_pi, log_ref):
    """Return KL(reference || policy), and its mass -dKL / dlog_pi, which are the reference's probabilities."""
    p = log_ref.exp()
    return (p * (log_ref - log_pi)).sum(-1), p


def cvar(log_pi, log_ref, *, mu):
    """Return D, the mean of Z = log_ref - log_pi over the worst mass mu under the reference, and -dD / dlog_pi.

    The worst mass is that of the words with the largest Z, whose probabilities sum to mu. mu = 1 is the KL."""
    z = log_ref - log_pi
    mass = _worst(z.detach(), log_ref.exp(), mu) / mu
    return (mass * z).sum(-1), mass


def _worst(z, p, mu, bins=4096):
    """Return the part of each word's probability p in the worst mass mu: words with the largest z, until their p sum to mu.

    z, p, result: (..., V). It is all of p above a border in z, a share of p at the border, and 0 below. To find the border
    without a sort, a histogram sums p over z, and a second one looks closer at the border's bin, with bins as wide as 2e-7 of the
    range of z. All words of one bin get the same share."""
    exact_p = p.double()
    low, high = z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)
    for _ in range(2):
        width = ((high - low) / bins).clamp(min=1e-30)
        # bins 1, 2, ... begin at high; 0 has all above it, bins + 1 all below low. NaN may go anywhere: the result is NaN
        bin_of_word = ((high - z) / width).add_(1).nan_to_num_(0).clamp_(0, bins + 1).long()
        in_bin = exact_p.new_zeros(*p.shape[:-1], bins + 2).scatter_add_(-1, bin_of_word, exact_p)
        up_to_bin = in_bin.cumsum(-1)
        border_bin = (up_to_bin < mu).sum(-1, keepdim=True).clamp(max=bins + 1)
        # the second round covers this bin, and one more on each side for the rounding
        high = high - (border_bin - 2) * width
        low = high - 3 * width
    # what the bins before it have left of mu says how much of a bin lies within mu: all, a part, or nothing
    left_of_mu = mu - up_to_bin + in_bin
    share = (left_of_mu / in_bin.clamp(min=1e-30)).clamp_(0, 1)
    return share.to(p.dtype).gather(-1, bin_of_word).mul_(p)


def erm(log_pi, log_ref, *, mu):
    """Return D = (1 / mu) log mean exp(mu Z) under the reference, Z = log_ref - log_pi, and -dD / dlog_pi. mu -> 0 is the KL."""
    terms = log_ref + mu * (log_ref - log_pi)
    return terms.logsumexp(-1) / mu, terms.softmax(-1)


def released(log_pi, log_ref, *, mu, parts=2):
    """Return D as Ra-DPO's published code computes it, and -dD / dlog_pi. It is kept to reproduce the published curves.

    The vocabulary is cut into parts, and a word counts if its Z = log_ref - log_pi is above the 1 - mu quantile of its part. D is
    the sum of p Z over the words that count, where p is the reference's probability. All words of a part weigh the same in the
    quantile, whatever their p, and so D is no measure of risk."""
    z = log_ref - log_pi
    p = log_ref.exp()
    # the last part takes what a division leaves over
    size, rest = divmod(z.shape[-1], parts)
    sizes = [size] * (parts - 1) + [size + rest]
    counts = []
    for z_of_part in z.detach().split(sizes, -1):
        quantile = z_of_part.quantile(1 - mu, dim=-1, keepdim=True)
        counts.append(z_of_part > quantile)
    mass = p * torch.cat(counts, -1)
    return (mass * z).sum(-1), mass


RISKS = {'cvar': cvar, 'erm': erm, 'released': released}
