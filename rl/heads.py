"""Inside a model, for reinforcement learning: log-probs and values of answer tokens, and a reward model's scores of answers.

As in model.py, these run inside the root module's forward only: fsdp.py registers token_logps and response_scores as such."""

import torch
import torch.nn.functional as F

from model import Head, body, core, hidden_and_head, wide


def token_logps(model, batch, values=True):
    """Log-probs of the N answer tokens of a batch, and the values of the states in which they were chosen: (2, N), float32.

    (1, N), log-probs alone, if values is false or the model has no value head (hf/load.py). Backward computes the logits again."""
    inner, device = core(model), batch.ids.device
    hidden, (weight, bias) = hidden_and_head(model, batch)  # (N, d)
    target = batch.target.to(hidden.device)
    logps = Head.apply(hidden, weight, bias, target, inner.config, None, None).to(device)
    # the critic is a reward model inside the policy; a value head reads the policy's own hidden states
    if values and hasattr(inner, 'critic'):
        value = scores_at(inner.critic, batch, batch.predict_at)
    elif values and hasattr(inner, 'value_head'):
        value = scalar(inner.value_head, hidden).to(device)
    else:
        return logps
    return torch.cat((logps, value[None]))


def response_scores(model, batch):
    """Scores of the A answers of a batch under a reward model: its head on the last token of each answer. (A,), float32."""
    return scores_at(model, batch, batch.last)


def scores_at(model, batch, places):
    """A reward model's head on the hidden states of a batch at some places of its flat rows: (places,), float32."""
    head = core(model).score
    # only a device map puts head and batch on different devices
    hidden = body(model, batch).to(head.weight.device).flatten(0, 1)  # (rows * T, d)
    return scalar(head, hidden[places.to(hidden.device)]).to(batch.ids.device)


def scalar(head, hidden):
    """What a linear head of one output makes of hidden states: (n, d) -> (n,), float32."""
    dtype = wide(hidden)
    bias = None if head.bias is None else head.bias.to(dtype)
    column = F.linear(hidden.to(dtype), head.weight.to(dtype), bias)  # (n, 1)
    return column.sum(1)  # not [:, 0]: FSDP2 warns of views
