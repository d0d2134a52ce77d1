"""Inside a transformers model: attention over packed answers, log-probs of answers, divergences. hf/load.py makes one.

Training on preferences needs one function, response_logps(model, batch): log-prob sums of every answer in a packed microbatch
(data.py), float32. The LM head is applied only where an answer token is predicted, in chunks that backward computes again, so
that no (tokens, vocabulary) tensor of the whole microbatch ever exists. No collectives here: fsdp.py.
"""

import contextlib

import torch
import torch.nn.functional as F
import transformers

from configurator import UserError
from hf import varlen


def core(model):
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, 'get_base_model') else model


def blocks(model):
    """The transformer blocks, by the class names that the model itself (and a critic inside it) declares."""
    # every class that any part of the model calls a block
    names = {name for m in core(model).modules() for name in getattr(m, '_no_split_modules', None) or ()}
    # no block inside another: Mamba names a block and a part of it
    found = {}
    for path, module in core(model).named_modules():
        inside = any(path.startswith(f'{outer}.') for outer in found)
        if type(module).__name__ in names and not inside:
            found[path] = module
    return list(found.values())


# ---- attention over packed answers ----


def register_attention():
    """Make packed_attention known to transformers, which makes no mask for an attention of this name."""
    transformers.AttentionInterface.register('packed', packed_attention)


def packed_attention(module, query, key, value, mask, scaling=None, sliding_window=None, packed=None, **more):
    """Attention of a row of groups [prompt | answer | answer ...]: an answer sees its group's prompt and itself.

    query (1, H, T, D), key and value (1, H_kv, T, D); packed: a data.Batch. Returns (1, T, H, D), None. On CUDA in half
    precision one varlen kernel does it; elsewhere one small sdpa an answer, so that no answer pays for the others."""
    if packed is None or more.get('s_aux') is not None:
        raise NotImplementedError('the batch is not handed on to attention (StableLM), or it has sinks (GPT-OSS)')
    # one kernel, unless it lacks what this architecture needs
    softcap = more.get('softcap')
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and softcap is None and key.shape[-1] == value.shape[-1]:
        return varlen.attention(query, key, value, scaling, sliding_window, packed.varlen)[None], None

    # (q, k, v) of each block of small groups, and of each prompt and answer of a large one; the backward of split is one cat
    sizes = [size for block in packed.blocks for size in block.sizes]
    pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    # (1, H, n, D) each
    out = []
    for block in packed.blocks:
        q, prompt_k, prompt_v = next(pieces)
        if block.is_one_piece:
            mask = block.mask(sliding_window, q.device)
            out.append(_attend(q, prompt_k, prompt_v, mask, scaling, softcap))
        # the prompt's keys and values come before each answer's, its own queries go with the first answer
        for number in range(1, len(block.sizes)):
            answer_q, answer_k, answer_v = next(pieces)
            q = torch.cat((q, answer_q), 2) if number == 1 else answer_q
            k = torch.cat((prompt_k, answer_k), 2)
            v = torch.cat((prompt_v, answer_v), 2)
            mask = _causal(q.shape[2], k.shape[2], sliding_window, q.device)
            out.append(_attend(q, k, v, mask, scaling, softcap))
    return torch.cat(out, 2).transpose(1, 2), None


def _causal(n, m, window, device):
    """Which of m keys the last n positions see: (n, m). None where sdpa's is_causal says it, which is faster."""
    # positions without a query
    before = m - n
    if not before and not (window and window < m):
        return None
    mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(before)
    return mask.triu(before - window + 1) if window else mask


def _attend(q, k, v, mask, scaling, softcap):
    """Attention of q (1, H, n, D) over k and v (1, H_kv, m, D), where mask (n, m) says; None: causal."""
    # so many heads of queries share one of keys
    repeat = q.shape[1] // k.shape[1]
    if not softcap:
        how = {'is_causal': mask is None, 'scale': scaling, 'enable_gqa': repeat > 1}
        return F.scaled_dot_product_attention(q, k, v, mask, **how)

    # a soft cap lies between the scores and their softmax, which sdpa does not offer: (n, m) scores of every head
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    scores = q @ k.mT * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    weights = scores.masked_fill(~mask, float('-inf')).float().softmax(-1)
    return weights.to(v.dtype) @ v


def set_attention(model, packed, own=None):
    """Choose a model's attention from now on: packed_attention, or for padded batches the one of transformers called own.

    own None: the one chosen before, or sdpa, or eager where sdpa does not do (Gemma 2). Raises UserError."""
    # what padded batches use is remembered on the model
    inner = core(model)
    # some versions of transformers offer sdpa to architectures whose soft cap it lacks
    has_cap = getattr(inner.config, 'attn_logit_softcapping', None) is not None
    default = 'sdpa' if inner._supports_sdpa and not has_cap else 'eager'
    inner.padded_attention = own or getattr(inner, 'padded_attention', default)
    try:
        inner.set_attn_implementation('packed' if packed else inner.padded_attention)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise UserError(f'{type(inner).__name__} cannot use attention by {inner.padded_attention}: {reason}') from None


@contextlib.contextmanager
def padded_attention(model):
    """The architecture's own attention for a while: to generate, or to compare with."""
    before = core(model).config._attn_implementation
    set_attention(model, packed=False)
    try:
        yield
    finally:
        core(model).set_attn_implementation(before)


# ---- log-probs and divergences of answers ----


def response_logps(model, batch, divergence=None, reference=None):
    """Sum the log-probs of the tokens of each of a batch's A answers: (1, A), float32. Backward computes the logits again.

    With a divergence (3, A): sums of log-probs, of divergences from the reference, and of the reference's log-probs. It is a
    function of (log_pi, log_ref), both (n, V) -> (n,), such as kl. reference: that model's hidden_and_head on the batch."""
    hidden, (weight, bias) = hidden_and_head(model, batch)
    # only a device map puts the targets, or the reference, elsewhere
    device = hidden.device
    if reference is not None:
        ref_hidden, ref_head = reference
        reference = [x if x is None else x.to(device) for x in (ref_hidden, *ref_head)]
    # (1 or 3, N) numbers of tokens, and their sums over each answer
    tokens = Head.apply(hidden, weight, bias, batch.target.to(device), core(model).config, divergence, reference)
    return torch.stack([batch.sum(row) for row in tokens.to(batch.ids.device)])


def hidden_and_head(model, batch):
    """Hidden states (N, d) that predict the N answer tokens, and the head's (weight, bias).

    Works inside the root module's forward only (fsdp.py registers response_logps and this as such)."""
    head = core(model).get_output_embeddings()
    hidden = body(model, batch).to(head.weight.device).flatten(0, 1)
    return hidden[batch.predict_at.to(hidden.device)], (head.weight, head.bias)


def body(model, batch):
    """Last hidden states of a batch, (rows, T, d)."""
    inner = core(model)
    # Llama 4 misnames its trunk
    trunk = inner.model if inner.base_model is inner else inner.base_model
    # packed batches have positions and groups, padded ones a mask
    layout = {'attention_mask': batch.mask}
    if batch.groups:
        layout = {'position_ids': batch.position, 'packed': batch}
    return trunk(input_ids=batch.ids, use_cache=False, **layout).last_hidden_state


# ---- the LM head: hidden states -> log-probs, never all logits at once ----


def wide(x):
    """The type that log-probs and sums of x are computed in: float32, or float64 if x is."""
    return torch.promote_types(x.dtype, torch.float32)


def _scale_and_cap(config):
    """(factor of the head's output, soft cap of the logits or None), as some architectures have them."""
    # Cohere and Granite
    factor = getattr(config, 'logit_scale', None) or 1.0
    divisor = getattr(config, 'logits_scaling', None) or 1.0
    # Gemma 2 and RecurrentGemma
    cap = getattr(config, 'final_logit_softcapping', None) or getattr(config, 'logits_soft_cap', None)
    return factor / divisor, cap


class Head(torch.autograd.Function):
    """LM head, log-softmax, gather and divergence by chunks of positions: one chunk of logits exists at a time."""

    @staticmethod
    def chunks(n, vocabulary, most):
        """Slices of n positions that have at most so many logits together, or one position each."""
        size = max(1, most // vocabulary)
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    @staticmethod
    def logits(policy, reference, config):
        """Yield (rows, logits (n, V), blocks) of every chunk; a block is (its rows, its logits, the reference's or None).

        policy and reference are (hidden, weight, bias), reference perhaps None. Matrix products are made by chunks, in a shared
        buffer: fresh memory costs a CPU as much as the product. What copies the logits does so by blocks, an eighth or less."""
        hidden, weight, _ = policy
        most, most_of_block = (2**27, 2**24) if hidden.is_cuda else (2**23, 2**19)
        chunks = Head.chunks(len(hidden), len(weight), most)
        sides = [policy, reference] if reference else [policy]
        buffers = [hidden.new_empty(chunks[0].stop, len(weight), dtype=wide(hidden)) for _ in sides]
        for rows in chunks:
            # all logits of this chunk
            n = rows.stop - rows.start
            for buffer, (x, *head) in zip(buffers, sides, strict=True):
                _write_logits(buffer[:n], x[rows], *head, config)
            # which of them each block has
            blocks = []
            for block in Head.chunks(n, len(weight), most_of_block):
                at = slice(rows.start + block.start, rows.start + block.stop)
                blocks.append((at, buffers[0][block], buffers[1][block] if reference else None))
            yield rows, buffers[0][:n], blocks

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, config, divergence, reference):
        """hidden (N, d), weight (V, d), bias (V,) or None, target (N,) -> log-probs of the targets (1, N).

        With a divergence (3, N): also the divergences, and the reference's log-probs."""
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.rest = config, divergence, reference
        tokens = hidden.new_empty(3 if divergence else 1, len(target), dtype=wide(hidden))
        for _, _, blocks in Head.logits((hidden, weight, bias), reference, config):
            for at, logits, ref_logits in blocks:
                log_pi = torch.log_softmax(logits, 1, out=logits)
                tokens[0, at] = log_pi.gather(1, target[at, None]).squeeze(1)
                if divergence:
                    log_ref = torch.log_softmax(ref_logits, 1, out=ref_logits)
                    tokens[1, at], _ = divergence(log_pi, log_ref)
                    tokens[2, at] = log_ref.gather(1, target[at, None]).squeeze(1)
        return tokens

    @staticmethod
    def backward(ctx, grad):
        """grad (1 or 3, N) of what forward returned -> gradients of hidden, weight and bias; logits are made again."""
        hidden, weight, bias, target = ctx.saved_tensors
        config, divergence, reference = ctx.rest
        _, weight_trains, bias_trains, *_ = ctx.needs_input_grad
        # filled chunk by chunk; the head's add up in float32 whatever the compute type
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=wide(weight)) if weight_trains else None
        d_bias = torch.zeros_like(bias, dtype=wide(bias)) if bias_trains else None
        for rows, d_logits, blocks in Head.logits((hidden, weight, bias), reference, config):
            for at, logits, ref_logits in blocks:
                _to_gradient(logits, target[at], grad[:, at], config, divergence, ref_logits)
            # from there to hidden states and head
            d_raw = d_logits.to(weight.dtype)
            d_hidden[rows] = d_raw @ weight
            if weight_trains and d_weight.dtype == weight.dtype:
                d_weight.addmm_(d_raw.T, hidden[rows])
            elif weight_trains:
                d_weight += d_raw.T @ hidden[rows]
            if bias_trains:
                d_bias += d_logits.sum(0)
        if weight_trains:
            d_weight = d_weight.to(weight.dtype)
        if bias_trains:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


def _write_logits(out, hidden, weight, bias, config):
    """Write the logits, scaled and soft-capped, into out: hidden (n, d) -> (n, V)."""
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
    """Replace logits (n, V) by the gradient of grad[0] . log-probs of the targets + grad[1] . divergences, before scale and cap.

    Of a log-prob it is one-hot - pi. Of a divergence it is pi * sum(mass) - mass, with its mass as below."""
    scale, cap = _scale_and_cap(config)
    # of the soft cap, before the logits are overwritten
    slope = 1 - (logits / cap) ** 2 if cap else 1
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


# ---- divergences of the policy from the reference at one position, for TDPO and Ra-DPO ----
# (..., V) log-probs of both -> their values D (...,), and mass (..., V) = -dD / dlog_pi: which words D pulls up, and how much


def kl(log_pi, log_ref):
    """KL(reference || policy) at a position: the mean of Z = log ref - log pi under the reference."""
    p = log_ref.exp()
    return (p * (log_ref - log_pi)).sum(-1), p


def cvar(log_pi, log_ref, *, mu):
    """Mean of Z = log ref - log pi over its worst mass mu under the reference; mu = 1 is the KL. Ra-DPO, arXiv:2505.20359."""
    z = log_ref - log_pi
    mass = _worst(z.detach(), log_ref.exp(), mu) / mu
    return (mass * z).sum(-1), mass


def _worst(z, p, mu, bins=4096):
    """How much of each word's probability p belongs to the worst mass mu, that of the largest z: all, a part at the border, none.

    Without a sort. The words are counted in bins by z, and those around the border again: in the second round a bin is 2e-7 of
    the range of z, and whatever lies in the border's own bin counts in part."""
    low, high = z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)
    exact_p = p.double()
    for _ in range(2):
        width = ((high - low) / bins).clamp(min=1e-30)
        # 0: above this round's bins, bins + 1: below them; where z is no number the divergence is none, whatever the bin
        bin = ((high - z) / width).add_(1).nan_to_num_(0).clamp_(0, bins + 1).long()
        in_bin = exact_p.new_zeros(*p.shape[:-1], bins + 2).scatter_add_(-1, bin, exact_p)
        up_to = in_bin.cumsum(-1)
        # the border's bin, and one more on each side for the rounding
        border = (up_to < mu).sum(-1, keepdim=True).clamp(max=bins + 1)
        high = high - (border - 2) * width
        low = high - 3 * width
    share = ((mu - up_to + in_bin) / in_bin.clamp(min=1e-30)).clamp_(0, 1)
    return share.to(p.dtype).gather(-1, bin).mul_(p)


def erm(log_pi, log_ref, *, mu):
    """(1 / mu) log mean exp(mu Z), Z = log ref - log pi, under the reference; mu -> 0 is the KL. Ra-DPO, arXiv:2505.20359."""
    terms = log_ref + mu * (log_ref - log_pi)
    return terms.logsumexp(-1) / mu, terms.softmax(-1)


def released(log_pi, log_ref, *, mu, parts=2):
    """What Ra-DPO's published code computes; not a risk measure, kept to reproduce published curves.

    In each half of the vocabulary, sum of p Z over Z = log ref - log pi above its unweighted (1 - mu) quantile."""
    z, p = log_ref - log_pi, log_ref.exp()
    # the last part gets the rest of the vocabulary
    size, rest = divmod(z.shape[-1], parts)
    sizes = [size] * (parts - 1) + [size + rest]
    above = []
    for z_part in z.detach().split(sizes, -1):
        above.append(z_part > z_part.quantile(1 - mu, dim=-1, keepdim=True))
    mass = p * torch.cat(above, -1)
    return (mass * z).sum(-1), mass


RISKS = {'cvar': cvar, 'erm': erm, 'released': released}
