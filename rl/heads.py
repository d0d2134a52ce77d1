"""Log-probs and values of answer tokens, and reward-model scores of answers.

fsdp.shard makes token_logps and response_scores methods of a sharded model, which gather its weights."""

import torch
import torch.nn.functional as F

from hf.parts import core
from model import Head, hidden_and_head, last_hidden_states, wide_dtype


def token_logps(model, batch, values=True):
    """Return log-probs of the N answer tokens of a batch, and the values of the states before them: (2, N), float32.

    (1, N), log-probs only, if `values` is False or if load.add_value_head() has added neither a critic nor a value head."""
    inner = core(model)
    device = batch.ids.device
    hidden, weight, bias = hidden_and_head(model, batch)  # hidden: (N, hidden_size)
    target = batch.target.to(hidden.device)
    # None, None: without a divergence, and without the reference that it would be from
    logps = Head.apply(hidden, weight, bias, target, inner.config, None, None).to(device)  # (1, N)
    if values and hasattr(inner, 'critic'):
        # a separate critic model, read at the token before each answer token
        value = scores_at(inner.critic, batch, batch.predict_at)
    elif values and hasattr(inner, 'value_head'):
        value = _scalar_head(inner.value_head, hidden).to(device)
    else:
        return logps
    return torch.cat((logps, value[None]))


def response_scores(model, batch):
    """Return a reward model's scores of the A answers of a batch, read at their last tokens: (A,), float32."""
    return scores_at(model, batch, batch.last)


def scores_at(model, batch, places):
    """Return a reward model's scores at these places, indices into batch.ids.flatten(): (places,), float32."""
    head = core(model).score
    # with a device map the head may be on another device than the batch
    hidden = last_hidden_states(model, batch).to(head.weight.device)
    hidden = hidden.flatten(0, 1)  # (rows * T, hidden_size)
    return _scalar_head(head, hidden[places.to(hidden.device)]).to(batch.ids.device)


def _scalar_head(head, hidden):
    """Apply a linear layer with one output in float32 (float64 for float64): (n, hidden_size) -> (n,)."""
    dtype = wide_dtype(hidden)
    bias = None if head.bias is None else head.bias.to(dtype)
    column = F.linear(hidden.to(dtype), head.weight.to(dtype), bias)  # (n, 1)
    # not column[:, 0]: FSDP2 warns about views
    return column.sum(1)
