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
    names = set()
    for module in core(model).modules():
        names.update(getattr(module, '_no_split_modules', None) or [])
    # no block inside another: Mamba names a block and a part of it
    found = {}
    for path, module in core(model).named_modules():
        inside = any(path.startswith(f'{outer}.') for outer in found)
        if type(module).__name__ in names and not inside:
            found[path] = module
    return list(found.values())


# ---- attention over packed answers ----


def register_attention():
    """Make packed_attention known to transformers. Without a mask function of that name it makes no mask, and asks for none."""
    transformers.AttentionInterface.register('packed', packed_attention)


def packed_attention(module, query, key, value, mask, scaling=None, sliding_window=None, packed=None, **more):
    """Attention of a row of groups [prompt | answer | answer ...]: an answer sees its group's prompt and itself.

    query (1, H, T, D), key and value (1, H_kv, T, D); packed: a data.Batch. Returns (1, T, H, D), None. On CUDA in half
    precision one varlen kernel does it; elsewhere one small sdpa an answer, so that no answer pays for the others."""
    softcap = more.get('softcap')
    if packed is None or more.get('s_aux') is not None:
        raise NotImplementedError('the batch is not handed on to attention (StableLM), or it has sinks (GPT-OSS)')
    # one kernel, unless it lacks what this architecture needs
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and softcap is None and key.shape[-1] == value.shape[-1]:
        return _varlen_attention(query, key, value, scaling, sliding_window, packed.varlen)[None], None

    # (q, k, v) of each prompt and each answer in row order. split, not slices: its backward is one cat
    sizes = [size for prompt, answers in packed.groups for size in (prompt, *answers)]
    pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    out = []  # (1, H, n, D) each
    for _, answers in packed.groups:
        prompt_q, prompt_k, prompt_v = next(pieces)
        for i in range(len(answers)):
            q, k, v = next(pieces)
            # the prompt's keys and values come before each answer's, its own queries go with the first answer
            k = torch.cat((prompt_k, k), 2)
            v = torch.cat((prompt_v, v), 2)
            if i == 0:
                q = torch.cat((prompt_q, q), 2)
            out.append(_attend(q, k, v, scaling, sliding_window, softcap))
    return torch.cat(out, 2).transpose(1, 2), None


def _varlen_attention(query, key, value, scaling, sliding_window, layout):
    """What packed_attention returns, from one kernel for half precision on CUDA: (T, H, D). layout: data.Varlen."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    # keys and values: each answer with its prompt before it, grouped heads repeated
    repeat = q.shape[1] // k.shape[1]
    k, v = (x[layout.gather].repeat_interleave(repeat, 1) for x in (k, v))
    # how many tokens a query sees before its own (-1: all), and behind it
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    return varlen_attn(q, k, v, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, scale=scaling, window_size=window)


def _attend(q, k, v, scaling, window, softcap):
    """Causal attention of the last n positions of a sequence over all m of it: q (1, H, n, D), k and v (1, H_kv, m, D)."""
    n, m = q.shape[2], k.shape[2]
    before = m - n  # positions without a query
    # a mask (n, m), only where sdpa's is_causal, which counts from the first position on, does not do
    mask = None
    if before or softcap or (window and window < m):
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(before)
        if window:
            mask = mask.triu(before - window + 1)
    repeat = q.shape[1] // k.shape[1]  # queries' heads that share one of the keys'
    if not softcap:
        options = {'is_causal': mask is None, 'scale': scaling, 'enable_gqa': repeat > 1}
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    # a soft cap lies between the scores and their softmax, which sdpa does not offer: (n, m) scores of every head
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    scores = q @ k.mT * scale
    capped = softcap * torch.tanh(scores / softcap)
    weights = capped.masked_fill(~mask, float('-inf')).float().softmax(-1)
    return weights.to(v.dtype) @ v


def set_attention(model, packed, own=None):
    """Choose a model's attention from now on: packed_attention, or for padded batches the one of transformers called own.

    own None: the one chosen before, or sdpa, or eager where there is no sdpa (Gemma 2). Raises UserError."""
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
    """Sum the log-probs of the tokens of each of a batch's A answers: (1, A), float32. Backward computes the logits again.

    With a divergence (3, A): sums of log-probs, of divergences from the reference, and of the reference's log-probs. It is a
    function of (log_pi, log_ref), both (n, V) -> (n,), such as kl. reference: that model's hidden_and_head on the batch."""
    # where an answer token is predicted, and nowhere else: hidden (N, d)
    hidden, (weight, bias) = hidden_and_head(model, batch)
    device = hidden.device  # only a device map puts the targets, or the reference, elsewhere
    if reference is not None:
        ref_hidden, ref_head = reference
        reference = ref_hidden.to(device), [x if x is None else x.to(device) for x in ref_head]
    target = batch.target.to(device)
    # (1 or 3, N) numbers of tokens, and their sums over each answer
    tokens = Head.apply(hidden, weight, bias, target, core(model).config, divergence, reference)
    return torch.stack([batch.sum(row) for row in tokens.to(batch.ids.device)])


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
    inner = core(model)
    trunk = inner.base_model
    if trunk is inner:  # Llama 4 misnames its trunk
        trunk = inner.model
    # packed batches have positions and groups, padded ones a mask
    layout = {'attention_mask': batch.mask}
    if batch.groups:
        layout = {'position_ids': batch.position, 'packed': batch}
    return trunk(input_ids=batch.ids, use_cache=False, **layout).last_hidden_state


# ---- the LM head: hidden states -> log-probs, never all logits at once ----


def wide(x):
    """The type that log-probs and sums of x are computed in: float32, or float64 if x is."""
    return torch.promote_types(x.dtype, torch.float32)


def _scale(config):
    """What some architectures multiply the head's output with: 1 for most."""
    factor = getattr(config, 'logit_scale', None) or 1.0  # Cohere
    divisor = getattr(config, 'logits_scaling', None) or 1.0  # Granite
    return factor / divisor


def _cap(config):
    """The soft cap of the logits, if the architecture has one (Gemma 2, RecurrentGemma)."""
    return getattr(config, 'final_logit_softcapping', None) or getattr(config, 'logits_soft_cap', None)


def _post(raw, config):
    """float32 logits from the head's output: scaled, and soft-capped."""
    logits = raw.to(wide(raw)) * _scale(config)
    cap = _cap(config)
    return cap * torch.tanh(logits / cap) if cap else logits


def _per_token(raw, rows, target, config, divergence, reference):
    """Head output (n, V) at some rows -> log-probs of their targets (n,); with a divergence also that, and the reference's."""
    logits = _post(raw, config)
    target = target[rows, None]  # (n, 1)
    if divergence is None:
        return (logits.gather(1, target).squeeze(1) - logits.logsumexp(1),)
    # both distributions in full, for these positions
    hidden, head = reference
    log_pi = logits.log_softmax(1)
    log_ref = _post(F.linear(hidden[rows], *head), config).log_softmax(1)
    return log_pi.gather(1, target).squeeze(1), divergence(log_pi, log_ref), log_ref.gather(1, target).squeeze(1)


class Head(torch.autograd.Function):
    """LM head, log-softmax, gather and divergence by chunks of positions: one chunk of logits exists at a time."""

    @staticmethod
    def chunks(n, vocabulary, device):
        """Slices of n positions whose logits are small beside the model."""
        most = 2**27 if device.type == 'cuda' else 2**23  # logits in a chunk
        size = max(1, most // vocabulary)
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    @staticmethod
    def begin(hidden, weight, config, divergence):
        """(chunks, a buffer that they share), or with a divergence or soft cap (chunks, None): _per_token makes all anew."""
        chunks = Head.chunks(len(hidden), len(weight), hidden.device)
        if divergence or _cap(config):
            return chunks, None
        # as long as the first chunk; shared, since fresh memory costs a CPU as much as the matrix product
        return chunks, hidden.new_empty(chunks[0].stop, len(weight), dtype=wide(hidden))

    @staticmethod
    def logits(buffer, hidden, weight, bias, config):
        """Scaled logits of a chunk, made in the buffer itself."""
        out = buffer[: len(hidden)]
        if weight.dtype == out.dtype:
            torch.mm(hidden, weight.T, out=out)
        else:
            out.copy_(hidden @ weight.T)
        if bias is not None:
            out += bias
        return out if _scale(config) == 1 else out.mul_(_scale(config))

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, config, divergence, reference):
        """hidden (N, d), weight (V, d), bias (V,) or None, target (N,) -> the rows of _per_token, (1 or 3, N)."""
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.rest = config, divergence, reference
        tokens = hidden.new_empty(3 if divergence else 1, len(target), dtype=wide(hidden))
        chunks, buffer = Head.begin(hidden, weight, config, divergence)
        for rows in chunks:
            if buffer is None:
                raw = F.linear(hidden[rows], weight, bias)
                tokens[:, rows] = torch.stack(_per_token(raw, rows, target, config, divergence, reference))
            else:
                logits = Head.logits(buffer, hidden[rows], weight, bias, config)
                log_pi = torch.log_softmax(logits, 1, out=logits)
                tokens[0, rows] = log_pi.gather(1, target[rows, None]).squeeze(1)
        return tokens

    @staticmethod
    def backward(ctx, grad):
        """grad (1 or 3, N) of what forward returned -> gradients of hidden, weight and bias; logits are made again."""
        hidden, weight, bias, target = ctx.saved_tensors
        config, divergence, reference = ctx.rest
        _, weight_trains, bias_trains, *_ = ctx.needs_input_grad
        # filled chunk by chunk; d_weight adds up in float32 whatever the compute type
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=wide(weight)) if weight_trains else None
        d_bias = torch.zeros_like(bias) if bias_trains else None
        chunks, buffer = Head.begin(hidden, weight, config, divergence)
        for rows in chunks:
            # gradient of the logits: by autograd over this chunk alone, or (one-hot - softmax) * grad
            if buffer is None:
                raw = F.linear(hidden[rows], weight, bias).requires_grad_()
                with torch.enable_grad():
                    values = _per_token(raw, rows, target, config, divergence, reference)
                # log-probs and divergences: the third, the reference's log-probs, has no gradient
                (d_raw,) = torch.autograd.grad(values[:2], raw, tuple(grad[:2, rows]))
            else:
                logits = Head.logits(buffer, hidden[rows], weight, bias, config)
                slope = grad[0, rows, None] * _scale(config)
                d_raw = torch.softmax(logits, 1, out=logits).mul_(-slope)
                d_raw.scatter_add_(1, target[rows, None], slope)
            # from there to hidden states and head
            d_raw = d_raw.to(weight.dtype)
            d_hidden[rows] = d_raw @ weight
            if weight_trains and d_weight.dtype == weight.dtype:
                d_weight.addmm_(d_raw.T, hidden[rows])
            elif weight_trains:
                d_weight += d_raw.T @ hidden[rows]
            if bias_trains:
                d_bias += d_raw.sum(0)
        d_weight = d_weight.to(weight.dtype) if weight_trains else None
        return d_hidden, d_weight, d_bias, None, None, None, None


# ---- divergences of the policy from the reference at one position, for TDPO and Ra-DPO: (..., V) log-probs -> (...,) ----


def kl(log_pi, log_ref):
    """KL(reference || policy) at a position: the mean of Z = log ref - log pi under the reference."""
    return (log_ref.exp() * (log_ref - log_pi)).sum(-1)


def cvar(log_pi, log_ref, *, mu):
    """Mean of Z = log ref - log pi over its worst mass mu under the reference; mu = 1 is the KL. Ra-DPO, arXiv:2505.20359."""
    z, order = (log_ref - log_pi).sort(-1, descending=True)
    p = log_ref.exp().gather(-1, order)
    before = p.cumsum(-1) - p  # the mass of what is worse
    # how much of each token's mass counts: all, a part at the border of mu, or nothing
    weight = (mu - before).clamp(min=0).minimum(p)
    return (weight * z).sum(-1) / mu


def erm(log_pi, log_ref, *, mu):
    """(1 / mu) log mean exp(mu Z), Z = log ref - log pi, under the reference; mu -> 0 is the KL. Ra-DPO, arXiv:2505.20359."""
    return torch.logsumexp(log_ref + mu * (log_ref - log_pi), -1) / mu


def released(log_pi, log_ref, *, mu, parts=2):
    """What Ra-DPO's published code computes; not a risk measure, kept to reproduce published curves.

    In each half of the vocabulary, sum of p Z over Z = log ref - log pi above its unweighted (1 - mu) quantile."""
    z, p = log_ref - log_pi, log_ref.exp()
    size, rest = divmod(z.shape[-1], parts)
    sizes = [size] * (parts - 1) + [size + rest]  # the last part gets the rest of the vocabulary
    total = 0.0
    for z_part, p_part in zip(z.split(sizes, -1), p.split(sizes, -1), strict=True):
        threshold = z_part.detach().quantile(1 - mu, dim=-1, keepdim=True)
        above = z_part > threshold
        total = total + (p_part * z_part * above).sum(-1)
    return total


RISKS = {'cvar': cvar, 'erm': erm, 'released': released}
