"""Inside a transformers model: attention over packed answers, log-probs of answers, divergences. hf/load.py makes one.

Training on preferences needs one function, response_logps(model, batch): log-prob sums of every answer in a packed microbatch
(data.py), float32, with the LM head applied only where an answer token is predicted, in chunks that are recomputed in
backward, so that no (tokens, vocabulary) tensor of the whole microbatch ever exists. No collectives here: fsdp.py.
"""

import contextlib

import torch
import torch.nn.functional as F
import transformers

from configurator import UserError


def core(model):
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, 'get_base_model') else model


def blocks(model):
    """The transformer blocks, by the class names that the model itself (and a critic inside it) declares."""
    # every class that any part of the model calls a block
    names = {name for m in core(model).modules() for name in getattr(m, '_no_split_modules', None) or []}
    found = {}
    for path, module in core(model).named_modules():
        # Mamba names a block and a part of it: none inside another
        inside = any(path.startswith(f'{outer}.') for outer in found)
        if type(module).__name__ in names and not inside:
            found[path] = module
    return list(found.values())


# ---- attention over packed answers ----


def register_attention():
    """Make packed_attention known to transformers. Without a mask function of that name it makes no mask, and asks for none."""
    transformers.AttentionInterface.register('packed', packed_attention)


@torch.compiler.disable  # it would be compiled anew for every layout of a row
def packed_attention(module, query, key, value, mask, scaling=None, sliding_window=None, packed=None, **more):
    """Attention of a row of groups [prompt | answer | answer ...]: an answer sees its group's prompt and itself.

    query (1, H, T, D), key and value (1, H_kv, T, D); packed: a data.Batch. Returns (1, T, H, D), None. On CUDA in half
    precision one varlen kernel does it; elsewhere one small sdpa an answer, so that no answer pays for the others."""
    softcap = more.get('softcap')
    if packed is None or more.get('s_aux') is not None:
        raise NotImplementedError('the batch is not handed on to attention (StableLM), or it has sinks (GPT-OSS)')
    # CUDA in half precision: one kernel
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and softcap is None and key.shape[-1] == value.shape[-1]:
        return _varlen_attention(query, key, value, scaling, sliding_window, packed.varlen)[None], None

    # one tensor for each prompt and each answer. split, not slices: its backward is one cat
    sizes = [size for prompt, answers in packed.groups for size in (prompt, *answers)]
    q, k, v = (iter(x.split(sizes, dim=2)) for x in (query, key, value))
    out = []
    for _, answers in packed.groups:
        prompt_q, prompt_k, prompt_v = next(q), next(k), next(v)
        for i in range(len(answers)):
            # the prompt's own queries go with the first answer; its keys and values come before each
            q_i = torch.cat((prompt_q, next(q)), 2) if i == 0 else next(q)
            k_i, v_i = torch.cat((prompt_k, next(k)), 2), torch.cat((prompt_v, next(v)), 2)
            out.append(_attend(q_i, k_i, v_i, scaling, sliding_window, softcap))
    return torch.cat(out, 2).transpose(1, 2), None


def _varlen_attention(query, key, value, scaling, sliding_window, layout):
    """The same by one kernel, in half precision on CUDA: (T, H, D). layout: data.Varlen."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    # keys and values: each answer with its prompt before it, grouped heads repeated
    repeat = q.shape[1] // k.shape[1]
    k, v = (x[layout.gather].repeat_interleave(repeat, 1) for x in (k, v))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # (-1, 0): causal
    return varlen_attn(q, k, v, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, scale=scaling, window_size=window)


def _attend(q, k, v, scaling, window, softcap):
    """Causal attention of the last q.shape[2] positions of a sequence over all of it."""
    # a mask only where causal attention from the first position on does not say it all
    n, m = q.shape[2], k.shape[2]
    mask = None
    if n < m or softcap or (window and window < m):
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        if window:
            mask = mask.triu(m - n - window + 1)
    if not softcap:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa)

    # a soft cap lies between the scores and their softmax, which sdpa does not offer
    repeat = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = q @ k.repeat_interleave(repeat, 1).mT * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float('-inf'))
    return scores.float().softmax(-1).to(v.dtype) @ v.repeat_interleave(repeat, 1)


def set_attention(model, packed, own=None):
    """Packed attention, or for padded batches own, from then on: by default sdpa, or eager where there is none (Gemma 2)."""
    # what padded batches use is remembered on the model
    inner = core(model)
    default = 'sdpa' if inner._supports_sdpa else 'eager'
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
    """Log-prob sums of the A answers of a batch -> (1, A), or (3, A) with a divergence: log-probs, divergences, and the
    reference's log-probs. float32; under autograd the logits are recomputed in backward.

    divergence: a function of (log_pi, log_ref), both (n, V) -> (n,), such as kl below; reference: the reference model's
    hidden_and_head on the same batch."""
    # where an answer token is predicted, and nowhere else
    hidden, head = hidden_and_head(model, batch)
    target = batch.target.to(hidden.device)  # only a device map puts it, or the reference, elsewhere
    if reference is not None:
        ref_hidden, ref_head = reference  # (N, d), and (weight, bias)
        ref_head = [x if x is None else x.to(hidden.device) for x in ref_head]
        reference = ref_hidden.to(hidden.device), ref_head
    tokens = Head.apply(hidden, *head, target, core(model).config, divergence, reference).to(batch.ids.device)
    return torch.stack([batch.sum(row) for row in tokens])


def hidden_and_head(model, batch):
    """Hidden states (N, d) that predict the N answer tokens, and the head's (weight, bias).

    Works inside the root module's forward only (fsdp.py registers response_logps and this as such)."""
    hidden, head = hidden_states(model, batch)
    return hidden.flatten(0, 1)[batch.predict_at.to(hidden.device)], head


def hidden_states(model, batch):
    """Last hidden states of a batch (rows, T, d) and the head's (weight, bias)."""
    head = core(model).get_output_embeddings()
    return body(model, batch).to(head.weight.device), (head.weight, head.bias)


def body(model, batch):
    """Last hidden states of a batch, (rows, T, d)."""
    # the part below the head; packed batches have positions and groups, padded ones a mask
    inner = core(model)
    trunk = inner.model if inner.base_model is inner else inner.base_model  # Llama 4 misnames its own
    if batch.groups:
        out = trunk(input_ids=batch.ids, position_ids=batch.position, use_cache=False, packed=batch)
    else:
        out = trunk(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return out.last_hidden_state


# ---- the LM head: hidden states -> log-probs, never all logits at once ----


def wide(x):
    """The type that log-probs and sums of x are computed in: float32, or float64 if x is."""
    return torch.promote_types(x.dtype, torch.float32)


def _scale(config):
    """What some architectures multiply the head's output with (Cohere, Granite)."""
    return (getattr(config, 'logit_scale', None) or 1.0) / (getattr(config, 'logits_scaling', None) or 1.0)


def _cap(config):
    """The soft cap of the logits, if the architecture has one (Gemma 2, RecurrentGemma)."""
    return getattr(config, 'final_logit_softcapping', None) or getattr(config, 'logits_soft_cap', None)


def _post(raw, config):
    """float32 logits from the head's output: scaled, and soft-capped."""
    logits, cap = raw.to(wide(raw)) * _scale(config), _cap(config)
    return cap * torch.tanh(logits / cap) if cap else logits


def _per_token(raw, target, config, divergence, reference):
    """Head output (n, V) -> log-probs of the targets (n,), and with a reference's (hidden, head): divergences, its own."""
    logits = _post(raw, config)
    target = target[:, None]
    if divergence is None:
        return (logits.gather(1, target)[:, 0] - logits.logsumexp(1),)
    # both distributions in full, for this chunk of positions
    hidden, head = reference
    log_pi = logits.log_softmax(1)
    log_ref = _post(F.linear(hidden, *head), config).log_softmax(1)
    return log_pi.gather(1, target)[:, 0], divergence(log_pi, log_ref), log_ref.gather(1, target)[:, 0]


class Head(torch.autograd.Function):
    """LM head, log-softmax, gather and divergence by chunks of positions: one chunk of logits exists at a time.

    Without divergence and soft cap, all chunks share one buffer and everything happens in place: fresh memory costs a CPU
    as much as the matrix product."""

    @staticmethod
    def chunks(n, vocabulary, device):
        """Slices of n positions whose logits are small beside the model."""
        most = 2**27 if device.type == 'cuda' else 2**23
        size = max(1, most // vocabulary)
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    @staticmethod
    def logits(buffer, hidden, weight, bias, config):
        """Scaled logits of a chunk, in the buffer."""
        # the product goes into memory that is there already
        out = buffer[: len(hidden)]
        if weight.dtype == out.dtype:
            torch.mm(hidden, weight.T, out=out)
        else:
            out.copy_(hidden @ weight.T)
        # then bias and scale, in place
        if bias is not None:
            out += bias
        return out if _scale(config) == 1 else out.mul_(_scale(config))

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, config, divergence, reference):
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.rest = config, divergence, reference
        # plain: one buffer for the logits of all chunks
        plain = not divergence and not _cap(config)
        tokens = hidden.new_empty(3 if divergence else 1, len(target), dtype=wide(hidden))
        chunks = Head.chunks(len(target), len(weight), hidden.device)
        buffer = hidden.new_empty(chunks[0].stop if plain else 0, len(weight), dtype=wide(hidden))
        for rows in chunks:
            if plain:
                logits = Head.logits(buffer, hidden[rows], weight, bias, config)
                log_pi = torch.log_softmax(logits, 1, out=logits)
                tokens[0, rows] = log_pi.gather(1, target[rows, None])[:, 0]
            else:
                raw = F.linear(hidden[rows], weight, bias)
                ref = (reference[0][rows], reference[1]) if divergence else None
                tokens[:, rows] = torch.stack(_per_token(raw, target[rows], config, divergence, ref))
        return tokens

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, target = ctx.saved_tensors
        config, divergence, reference = ctx.rest
        plain = not divergence and not _cap(config)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=wide(weight)) if ctx.needs_input_grad[1] else None
        d_bias = 0.0 if bias is not None and ctx.needs_input_grad[2] else None
        chunks = Head.chunks(len(target), len(weight), hidden.device)
        buffer = hidden.new_empty(chunks[0].stop if plain else 0, len(weight), dtype=wide(hidden))
        for rows in chunks:
            # gradient of the logits: (one-hot - softmax) * grad, or by autograd over this chunk alone
            if plain:
                logits = Head.logits(buffer, hidden[rows], weight, bias, config)
                slope = grad[0, rows, None] * _scale(config)
                d_raw = torch.softmax(logits, 1, out=logits).mul_(-slope).scatter_add_(1, target[rows, None], slope)
            else:
                ref = (reference[0][rows], reference[1]) if divergence else None
                with torch.enable_grad():
                    raw = F.linear(hidden[rows].detach(), weight.detach(), bias).detach().requires_grad_()
                    values = _per_token(raw, target[rows], config, divergence, ref)
                (d_raw,) = torch.autograd.grad(values[:2], raw, tuple(grad[:2, rows]))

            # from there to hidden states and head; chunks add up in float32 whatever the compute type
            d_raw = d_raw.to(weight.dtype)
            d_hidden[rows] = d_raw @ weight
            if d_weight is not None and d_weight.dtype == weight.dtype:
                d_weight.addmm_(d_raw.T, hidden[rows])
            elif d_weight is not None:
                d_weight += d_raw.T @ hidden[rows]
            if d_bias is not None:
                d_bias = d_bias + d_raw.sum(0)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


# ---- divergences of the policy from the reference at one position, for TDPO and Ra-DPO: (..., V) log-probs -> (...,) ----
# Z = log ref - log pi, a random variable under the reference's distribution. Only kl, cvar and erm are risk measures of it.


def kl(log_pi, log_ref):
    """KL(reference || policy) at a position: (..., V) log-probs -> (...,). Z = log ref - log pi, averaged under ref."""
    return (log_ref.exp() * (log_ref - log_pi)).sum(-1)


def cvar(log_pi, log_ref, *, mu):
    """Mean of Z over the worst probability mass mu of the reference; mu = 1 is the KL. Ra-DPO, arXiv:2505.20359."""
    z, order = (log_ref - log_pi).sort(-1, descending=True)
    p = log_ref.exp().gather(-1, order)
    before = p.cumsum(-1) - p
    weight = (mu - before).clamp(min=0).minimum(p)  # the atom at the border is shared
    return (weight * z).sum(-1) / mu


def erm(log_pi, log_ref, *, mu):
    """Entropic risk (1 / mu) log mean exp(mu Z) under the reference; mu -> 0 is the KL. Ra-DPO, arXiv:2505.20359."""
    return torch.logsumexp(log_ref + mu * (log_ref - log_pi), -1) / mu


def released(log_pi, log_ref, *, mu, parts=2):
    """What Ra-DPO's published code computes; not a risk measure, kept to reproduce published curves.

    In each half of the vocabulary, sum of p Z over Z above the unweighted (1 - mu) quantile; 0 where policy = reference."""
    z, p = log_ref - log_pi, log_ref.exp()
    size = z.shape[-1] // parts
    total = 0.0
    for i in range(parts):
        # the last part has the rest
        part = slice(i * size, (i + 1) * size if i < parts - 1 else None)
        threshold = z[..., part].detach().quantile(1 - mu, dim=-1, keepdim=True)
        above = z[..., part] > threshold
        total = total + (p[..., part] * z[..., part] * above).sum(-1)
    return total


RISKS = {'cvar': cvar, 'erm': erm, 'released': released}
