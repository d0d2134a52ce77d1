"""Log-probs of packed answers, computed inside a transformers model. hf/attention.py has its attention, hf/load.py loads models.

Training calls response_logps(model, batch): the summed log-prob of every answer of a packed microbatch (data.Batch). The LM head
is applied where an answer token is predicted, in chunks, and again in backward: all logits at once exist only if they are few."""

import torch

from hf.attention import packed_layout
from hf.parts import core, scale_and_cap, trunk
from runtime.prefetch import move


def response_logps(model, batch, divergence=None, reference=None):
    """Return the log-probs of a batch's A answers, summed over the tokens of each: (1, A), float32.

    divergence: a function of rl/divergences.py; reference: the reference model's hidden_and_head(batch). With both, the result is
    (3, A): log-probs under this model, summed divergences from the reference, log-probs under the reference."""
    hidden, weight, bias = hidden_and_head(model, batch)
    # a model spread over several GPUs (--device_map) may have its head on another one than the batch and the reference
    target, reference = move((batch.target, reference), hidden.device)
    # (1 or 3, N): the same numbers for each token
    token_values = Head.apply(hidden, weight, bias, target, core(model).config, divergence, reference)
    return torch.stack([batch.sum(row) for row in token_values.to(batch.ids.device)])


def hidden_and_head(model, batch):
    """Return the hidden states (N, d) that predict a batch's N answer tokens, and the LM head's weight (V, d) and bias or None."""
    # FSDP gathers the head's weight only if this, or response_logps around it, is called as the model's method (sharded.add_method)
    head = core(model).get_output_embeddings()
    hidden = last_hidden_states(model, batch).to(head.weight.device).flatten(0, 1)
    predict_at = batch.predict_at.to(hidden.device)  # indices into the flattened batch
    return hidden[predict_at], head.weight, head.bias


def last_hidden_states(model, batch):
    """Return the last hidden states of a batch, (rows, T, d): the model's output before the LM head."""
    # only a packed batch has groups; transformers hands it on to packed_attention (hf/attention.py): each answer sees its prompt and itself
    layout = packed_layout(model, batch) if batch.groups else {'attention_mask': batch.mask}
    return trunk(model)(input_ids=batch.ids, use_cache=False, **layout).last_hidden_state


def wide_dtype(x):
    """Return the dtype for log-probs and sums of x: float32, or float64 if x is float64."""
    return torch.promote_types(x.dtype, torch.float32)


class Head(torch.autograd.Function):
    """LM head, log-softmax, gather and divergence, in chunks of positions. Only the logits of one chunk exist, unless forward keeps all."""

    @staticmethod
    def chunks(n, vocab_size, max_logits):
        """Split n positions into slices of at most max_logits // vocab_size positions, but at least one."""
        size = max(1, max_logits // vocab_size)
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]

    @staticmethod
    def max_logits(device):
        """Return the maximum number of logits per chunk on a device."""
        return 2**27 if device.type == 'cuda' else 2**23

    @staticmethod
    def keeps(n, weight):
        """Return whether forward keeps the logits of n positions, so that backward need not compute them again.

        It does on a CPU, up to 268 MB: there the product takes a seventh of a small model's. On a GPU memory is dear, and products are not."""
        return weight.device.type == 'cpu' and n * len(weight) <= 2**26

    @staticmethod
    def logits(policy, reference, config, kept, are_ready=False):
        """Yield (rows, logits, pieces) for each chunk of the N positions: a slice of them, the policy's logits (n, V), its pieces.

        policy, reference: (hidden (N, d), weight (V, d), bias); reference may be None. A piece is (slice of the N positions, policy's
        logits, reference's logits or None), views of the chunk's. They may be overwritten: the next chunk reuses their memory. kept (N, V):
        memory for all of the policy's, or None; are_ready: they are there already."""
        hidden, weight, _bias = policy
        vocab_size = len(weight)
        # a chunk is as large as one matrix product may be; its pieces are smaller, because the caller computes with copies of them
        max_of_piece = 2**24 if hidden.is_cuda else 2**19
        chunks = Head.chunks(len(hidden), vocab_size, Head.max_logits(hidden.device))
        models = [policy, reference] if reference else [policy]
        # one buffer for each model and all chunks: on a CPU, fresh memory costs as much as the product
        buffers = [hidden.new_empty(chunks[0].stop, vocab_size, dtype=wide_dtype(hidden)) for _ in models]
        for rows in chunks:
            n = rows.stop - rows.start
            outs = [buffer[:n] for buffer in buffers]
            if kept is not None:
                outs[0] = kept[rows]
            for out, (model_hidden, *head) in zip(outs, models, strict=True):
                if not (are_ready and out is outs[0]):
                    _write_logits(out, model_hidden[rows], *head, config)
            pieces = []
            for in_chunk in Head.chunks(n, vocab_size, max_of_piece):
                piece_rows = slice(rows.start + in_chunk.start, rows.start + in_chunk.stop)
                ref_logits = outs[1][in_chunk] if reference else None
                pieces.append((piece_rows, outs[0][in_chunk], ref_logits))
            yield rows, outs[0], pieces

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, config, divergence, reference):
        """Return the targets' log-probs (1, N); with a divergence (3, N): log-probs, divergences, the reference's log-probs.

        hidden (N, d), weight (V, d), bias (V,) or None, target (N,). reference: its (hidden, weight, bias), or None."""
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.rest = config, divergence, reference
        ctx.tails = []  # of each piece: what divergence.mass has found by a search, so that backward need not search again
        n_values = 3 if divergence else 1
        values = hidden.new_empty(n_values, len(target), dtype=wide_dtype(hidden))
        ctx.kept = None
        # without gradients, as for the reference model, there is no backward
        if hidden.requires_grad and Head.keeps(len(target), weight):
            ctx.kept = hidden.new_empty(len(target), len(weight), dtype=wide_dtype(hidden))
        for _rows, _chunk_logits, pieces in Head.logits((hidden, weight, bias), reference, config, ctx.kept):
            for rows, logits, ref_logits in pieces:
                piece_target = target[rows, None]  # (n, 1)
                if divergence:
                    mass, tail = divergence.mass(logits, ref_logits)
                    ctx.tails.append(tail)
                log_pi = torch.log_softmax(logits, 1)
                values[0, rows] = log_pi.gather(1, piece_target).squeeze(1)
                if divergence:
                    log_ref = torch.log_softmax(ref_logits, 1, out=ref_logits)
                    values[1, rows] = divergence.value(log_pi, log_ref, mass)
                    values[2, rows] = log_ref.gather(1, piece_target).squeeze(1)
        return values

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of forward's arguments. grad (1 or 3, N): of its result; row 2 is for the reference, which is frozen."""
        hidden, weight, bias, target = ctx.saved_tensors
        config, divergence, reference = ctx.rest
        tails = iter(ctx.tails)
        _, weight_trains, bias_trains, *_ = ctx.needs_input_grad  # a bool for each argument of forward, hidden first
        # sum the head's gradients over chunks in float32, even if the compute type is bfloat16: autograd casts the result
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=wide_dtype(weight)) if weight_trains else None
        d_bias = torch.zeros_like(bias, dtype=wide_dtype(bias)) if bias_trains else None
        # a second backward (retain_graph) finds none: this one overwrites them
        kept, ctx.kept = ctx.kept, None
        all_logits = Head.logits((hidden, weight, bias), reference, config, kept, are_ready=kept is not None)
        for rows, chunk_logits, pieces in all_logits:
            # turn the chunk's logits into their gradient, piece by piece, in place
            for piece_rows, logits, ref_logits in pieces:
                mass = None  # a divergence adds h (pi * mass.sum() - mass) to the gradient, with h that of its value
                if divergence:
                    mass, _tail = divergence.mass(logits, ref_logits, next(tails))
                _to_gradient(logits, target[piece_rows], grad[:, piece_rows], config, mass)
            d_logits = chunk_logits.to(weight.dtype)
            d_hidden[rows] = d_logits @ weight
            # addmm_ saves the memory of the product, but wants a single dtype
            if weight_trains and d_weight.dtype == weight.dtype:
                d_weight.addmm_(d_logits.T, hidden[rows])
            elif weight_trains:
                d_weight += d_logits.T @ hidden[rows]
            if bias_trains:
                d_bias += chunk_logits.sum(0)
        return d_hidden, d_weight, d_bias, None, None, None, None  # none for target and the rest


def _write_logits(out, hidden, weight, bias, config):
    """Write the logits of hidden (n, d) into out (n, V), scaled and soft-capped as the model's config says."""
    scale, cap = scale_and_cap(config)
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


def _to_gradient(logits, target, grad, config, mass):
    """Replace logits (n, V), in place, by the loss gradient of the head's output, that before scale and soft cap.

    grad (1 or 3, n): its row 0 is the loss gradient g of the targets' log-probs, row 1 that of the divergences, h. The gradient of the
    logits is g (onehot(target) - pi) + h (pi * mass.sum() - mass). mass (n, V): of the divergence, overwritten here; or None."""
    scale, cap = scale_and_cap(config)
    # of logits = cap tanh(x / cap), the derivative by x; computed before logits are overwritten
    slope = 1 - (logits / cap) ** 2 if cap else 1
    grad_logps = grad[0, :, None]
    pi = torch.softmax(logits, 1, out=logits)  # logits and pi are one tensor now, which becomes the gradient
    if mass is None:
        pi.mul_(-grad_logps)
    else:
        mass.mul_(grad[1, :, None])  # h mass
        pi.mul_(mass.sum(1, keepdim=True) - grad_logps).sub_(mass)  # pi (h mass.sum() - g) - h mass
    logits.scatter_add_(1, target[:, None], grad_logps)
    if cap or scale != 1:
        logits *= slope * scale
