"""Inside a model, for reinforcement learning: log-probs and values of answer tokens, and a reward model's scores of answers.

Like those of model.py, these functions need gathered parameters. So fsdp.py makes token_logps and response_scores methods of every
sharded model, which run as a forward of its root module."""

import torch
import torch.nn.functional as F

from model import Head, body, core, hidden_and_head, wide


def token_logps(model, batch, values=True):
    """Return log-probs of the N answer tokens of a batch and, if there is a critic, values of the states before them: float32.

    The result is (2, N): log-probs, values. It is (1, N), log-probs alone, if `values` is False or the model has neither a
    value head nor a critic (hf/load.py adds them). Backward computes the logits again instead of keeping them."""
    inner = core(model)
    device = batch.ids.device
    hidden, (weight, bias) = hidden_and_head(model, batch)  # hidden: (N, d)
    target = batch.target.to(hidden.device)
    # no divergence and no reference: log-probs alone
    logps = Head.apply(hidden, weight, bias, target, inner.config, None, None).to(device)
    if values and hasattr(inner, 'critic'):
        # a whole reward model inside the policy, read at the token before each answer token
        value = scores_at(inner.critic, batch, batch.predict_at)
    elif values and hasattr(inner, 'value_head'):
        # a head on the policy's own hidden states
        value = _apply_scalar_head(inner.value_head, hidden).to(device)
    else:
        return logps
    return torch.cat((logps, value[None]))


def response_scores(model, batch):
    """Return a reward model's scores of the A answers of a batch, read at the last token of each: (A,), float32."""
    return scores_at(model, batch, batch.last)


def scores_at(model, batch, places):
    """Return a reward model's scores at some tokens of a batch: (places,), float32.

    places: numbers of these tokens in the batch's ids, all rows put one behind the other."""
    head = core(model).score
    # with a device map the head may be on another device than the batch
    hidden = body(model, batch).to(head.weight.device)
    hidden = hidden.flatten(0, 1)  # (rows * T, d)
    chosen = hidden[places.to(hidden.device)]
    return _apply_scalar_head(head, chosen).to(batch.ids.device)


def _apply_scalar_head(head, hidden):
    """Return the outputs of a linear head with one output: hidden states (n, d) -> (n,), float32 (or float64 of float64)."""
    dtype = wide(hidden)
    bias = head.bias
    if bias is not None:
        bias = bias.to(dtype)
    column = F.linear(hidden.to(dtype), head.weight.to(dtype), bias)  # (n, 1)
    # the sum of one element is that element; FSDP2 would warn of the view that column[:, 0] is
    return column.sum(1)
