"""Inside a transformers model: attention over packed answers, log-probs of answers, divergences. load.py makes one.

Training on preferences needs one function, response_logps(model, batch): log-prob sums of every answer in a packed microbatch
(data.py), float32, with the LM head applied only where an answer token is predicted, in chunks that are recomputed in
backward, so that no (tokens, vocabulary) tensor of the whole microbatch ever exists. A reward model needs response_scores.
No collectives here: fsdp.py.
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
    """The transformer blocks, by the class names that the model itself (and a critic inside it) declares; none inside another
    (Mamba names both)."""
    names = {name for m in core(model).modules() for name in getattr(m, '_no_split_modules', None) or []}
    found = {}
    for name, m in core(model).named_modules():
        if type(m).__name__ in names and not any(name.startswith(f'{outer}.') for outer in found):
            found[name] = m
    return list(found.values())


def ties(model):
    """Parameters with two names: {name: the earlier name of the same tensor}, such as a head that is the embedding."""
    first, found = {}, {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in first:
            found[name] = first[id(p)]
        first.setdefault(id(p), name)
    return found


def tie_as(model, wanted):
    """Make the names in wanted (as ties returns them), and no others, share a tensor, in place; the config then says so."""
    for name in ties(model).keys() - wanted.keys():
        shared = model.get_parameter(name)
        _put(model, name, torch.nn.Parameter(torch.empty_like(shared), shared.requires_grad))
    for name, source in wanted.items():
        _put(model, name, model.get_parameter(source))
    describe_ties(model)


def _put(model, name, parameter):
    owner, _, last = name.rpartition('.')
    setattr(model.get_submodule(owner), last, parameter)


def describe_ties(model):
    """Have the config of a model whose head is not its embedding say so: what reads it later would tie the two. Returns
    whether it said otherwise."""
    inner = core(model)
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    configs = {id(c): c for c in (inner.config, inner.config.get_text_config())}.values()
    wrong = [c for c in configs if getattr(c, 'tie_word_embeddings', False)]
    if head is None or head.weight is embedding.weight or not wrong:
        return False
    for c in wrong:
        c.tie_word_embeddings = False
    # what transformers noted when it made the model, and reads when it saves it
    inner.all_tied_weights_keys = ties(inner)
    return True


# ---- attention over packed answers ----


def register_attention():
    """Make packed_attention known to transformers. Without a mask function of that name it makes no mask, and asks for none."""
    transformers.AttentionInterface.register('packed', packed_attention)


@torch.compiler.disable  # it would be compiled anew for every layout of a row
def packed_attention(
    module, query, key, value, mask, scaling=None, sliding_window=None, softcap=None, packed=None, s_aux=None, **_
):
    """Attention of a row of groups [prompt | answer | answer ...]: an answer sees its group's prompt and itself.

    query (1, H, T, D), key and value (1, H_kv, T, D); packed: a data.Batch. Returns (1, T, H, D), None. On CUDA in half
    precision one varlen kernel does it; elsewhere one small sdpa an answer, so that no answer pays for the others."""
    if packed is None or s_aux is not None:
        raise NotImplementedError('the batch is not handed on to attention (StableLM), or it has sinks (GPT-OSS)')
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and softcap is None and key.shape[-1] == value.shape[-1]:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        seq = packed.varlen
        k, v = (x[seq.gather].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # grouped heads
        out = varlen_attn(q, k, v, seq.cu_q, seq.cu_k, seq.max_q, seq.max_k, scale=scaling, window_size=window)
        return out[None], None
    sizes = [size for prompt, answers in packed.groups for size in (prompt, *answers)]
    q, k, v = (iter(x.split(sizes, dim=2)) for x in (query, key, value))  # split, not slices: its backward is one cat
    out = []
    for _, answers in packed.groups:
        prompt_q, prompt_k, prompt_v = next(q), next(k), next(v)
        for i in range(len(answers)):
            q_i = next(q) if i else torch.cat((prompt_q, next(q)), 2)
            k_i, v_i = torch.cat((prompt_k, next(k)), 2), torch.cat((prompt_v, next(v)), 2)
            out.append(_attend(q_i, k_i, v_i, scaling, sliding_window, softcap))
    return torch.cat(out, 2).transpose(1, 2), None


def _attend(q, k, v, scaling, window, softcap):
    """Causal attention of the last q.shape[2] positions of a sequence over all of it."""
    n, m = q.shape[2], k.shape[2]
    mask = None
    if n < m or softcap or (window and window < m):
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        if window:
            mask = mask.triu(m - n - window + 1)
    if not softcap:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa)
    repeat = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeat, 1).mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float('-inf'))
    return scores.float().softmax(-1).to(v.dtype) @ v.repeat_interleave(repeat, 1)


# ---- log-probs, divergences and scores of answers ----


def response_logps(model, batch, divergence=None, reference=None):
    """Log-prob sums of the A answers of a batch -> (1, A), or (3, A) with a divergence: log-probs, divergences, and the
    reference's log-probs. float32; under autograd the logits are recomputed in backward.

    divergence: a function of (log_pi, log_ref), both (n, V) -> (n,), such as risks.kl; reference: the reference model's
    hidden_and_head on the same batch."""
    hidden, head = hidden_and_head(model, batch)
    target = batch.target.to(hidden.device)  # only a device map puts it, or the reference, elsewhere
    if reference is not None:
        (states, head_ref), device = reference, hidden.device
        reference = states.to(device), [x if x is None else x.to(device) for x in head_ref]
    tokens = _Head.apply(hidden, *head, target, core(model).config, divergence, reference).to(batch.ids.device)
    return torch.stack([batch.sum(row) for row in tokens])


def token_logps(model, batch, values=True):
    """Log-probs of the N answer tokens of a batch; where the model has a value head (load.py) and unless values is false, also
    the values of the states in which they were chosen. (1, N) or (2, N), float32; the logits are recomputed in backward."""
    inner = core(model)
    hidden, head = hidden_and_head(model, batch)
    logps = _Head.apply(hidden, *head, batch.target.to(hidden.device), inner.config, None, None).to(batch.ids.device)
    if values and hasattr(inner, 'critic'):  # a reward model that is a part of the policy
        value = _scores_at(inner.critic, batch, batch.index)
    elif values and hasattr(inner, 'value_head'):
        value = _scalar(inner.value_head, hidden).to(batch.ids.device)
    else:
        return logps
    return torch.cat((logps, value[None]))


def response_scores(model, batch):
    """Scores of the A answers of a batch under a reward model: its head on the last token of each answer. (A,), float32."""
    return _scores_at(model, batch, batch.last)


def _scores_at(model, batch, places):
    """A reward model's head on the hidden states of a batch at some places of its flat rows: (places,), float32."""
    head = core(model).score
    hidden = body(model, batch).to(head.weight.device).flatten(0, 1)  # only a device map puts it elsewhere
    return _scalar(head, hidden[places.to(hidden.device)]).to(batch.ids.device)


def _scalar(head, hidden):
    """What a linear head of one output makes of hidden states: (n, d) -> (n,), float32."""
    bias = None if head.bias is None else head.bias.to(wide(hidden))
    column = F.linear(hidden.to(wide(hidden)), head.weight.to(wide(hidden)), bias)
    return column.sum(1)  # not [:, 0]: FSDP2 warns of views


def body(model, batch):
    """Last hidden states of a batch, (rows, T, d)."""
    inner = core(model)
    trunk = inner.model if inner.base_model is inner else inner.base_model  # Llama 4 misnames its own
    if batch.groups:
        out = trunk(input_ids=batch.ids, position_ids=batch.position, use_cache=False, packed=batch)
    else:
        out = trunk(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return out.last_hidden_state


def hidden_states(model, batch):
    """Last hidden states of a batch (rows, T, d) and the head's (weight, bias)."""
    head = core(model).get_output_embeddings()
    return body(model, batch).to(head.weight.device), (head.weight, head.bias)


def hidden_and_head(model, batch):
    """Hidden states (N, d) that predict the N answer tokens, and the head's (weight, bias).

    Works inside the root module's forward only (fsdp.py registers response_logps and this as such)."""
    hidden, head = hidden_states(model, batch)
    return hidden.flatten(0, 1)[batch.index.to(hidden.device)], head


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
    if divergence is None:
        return (logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1),)
    hidden, head = reference
    log_pi, log_ref = logits.log_softmax(1), _post(F.linear(hidden, *head), config).log_softmax(1)
    at_target = (x.gather(1, target[:, None])[:, 0] for x in (log_pi, log_ref))
    return next(at_target), divergence(log_pi, log_ref), next(at_target)


class _Head(torch.autograd.Function):
    """LM head, log-softmax, gather and divergence by chunks of positions: one chunk of logits exists at a time.

    Without divergence and soft cap, all chunks share one buffer and everything happens in place: fresh memory costs a CPU
    as much as the matrix product."""

    @staticmethod
    def chunks(n, vocabulary, device):
        size = max(1, (2**27 if device.type == 'cuda' else 2**23) // vocabulary)
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    @staticmethod
    def logits(buffer, hidden, weight, bias, config):
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
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.rest = config, divergence, reference
        plain = not divergence and not _cap(config)
        tokens = hidden.new_empty(3 if divergence else 1, len(target), dtype=wide(hidden))
        chunks = _Head.chunks(len(target), len(weight), hidden.device)
        buffer = hidden.new_empty(chunks[0].stop if plain else 0, len(weight), dtype=wide(hidden))
        for rows in chunks:
            if plain:
                logits = _Head.logits(buffer, hidden[rows], weight, bias, config)
                tokens[0, rows] = torch.log_softmax(logits, 1, out=logits).gather(1, target[rows, None])[:, 0]
            else:
                ref = (reference[0][rows], reference[1]) if divergence else None
                values = _per_token(F.linear(hidden[rows], weight, bias), target[rows], config, divergence, ref)
                tokens[:, rows] = torch.stack(values)
        return tokens

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, target = ctx.saved_tensors
        config, divergence, reference = ctx.rest
        plain = not divergence and not _cap(config)
        d_hidden = torch.empty_like(hidden)
        d_bias = 0.0 if bias is not None and ctx.needs_input_grad[2] else None
        d_weight = torch.zeros_like(weight, dtype=wide(weight)) if ctx.needs_input_grad[1] else None
        chunks = _Head.chunks(len(target), len(weight), hidden.device)
        buffer = hidden.new_empty(chunks[0].stop if plain else 0, len(weight), dtype=wide(hidden))
        for rows in chunks:
            if plain:  # (one-hot - softmax) * grad
                logits = _Head.logits(buffer, hidden[rows], weight, bias, config)
                slope = grad[0, rows, None] * _scale(config)
                d_raw = torch.softmax(logits, 1, out=logits).mul_(-slope).scatter_add_(1, target[rows, None], slope)
            else:
                ref = (reference[0][rows], reference[1]) if divergence else None
                with torch.enable_grad():
                    raw = F.linear(hidden[rows].detach(), weight.detach(), bias).detach().requires_grad_()
                    values = _per_token(raw, target[rows], config, divergence, ref)
                (d_raw,) = torch.autograd.grad(values[:2], raw, tuple(grad[:2, rows]))
            d_raw = d_raw.to(weight.dtype)
            d_hidden[rows] = d_raw @ weight
            if d_weight is not None and d_weight.dtype == weight.dtype:
                d_weight.addmm_(d_raw.T, hidden[rows])
            elif d_weight is not None:  # chunks add up in float32 whatever the compute type
                d_weight += d_raw.T @ hidden[rows]
            if d_bias is not None:
                d_bias = d_bias + d_raw.sum(0)
        d_weight = d_weight if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


def set_attention(model, packed, own=None):
    """Packed attention, or for padded batches own, from then on: by default sdpa, or eager where there is none (Gemma 2)."""
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
