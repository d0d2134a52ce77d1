"""Inside a model, for reinforcement learning: log-probs and values of answer tokens, and a reward model's scores of answers.

As in model.py, these run inside the root module's forward only: fsdp.py registers token_logps and response_scores as such."""

import torch
import torch.nn.functional as F

from model import Head, body, core, hidden_and_head, wide


def token_logps(model, batch, values=True):
    """Log-probs of the N answer tokens of a batch; where the model has a value head (load.py) and unless values is false, also
    the values of the states in which they were chosen. (1, N) or (2, N), float32; the logits are recomputed in backward."""
    inner = core(model)
    hidden, head = hidden_and_head(model, batch)
    logps = Head.apply(hidden, *head, batch.target.to(hidden.device), inner.config, None, None).to(batch.ids.device)
    if values and hasattr(inner, 'critic'):  # a reward model that is a part of the policy
        value = scores_at(inner.critic, batch, batch.predict_at)
    elif values and hasattr(inner, 'value_head'):
        value = scalar(inner.value_head, hidden).to(batch.ids.device)
    else:
        return logps
    return torch.cat((logps, value[None]))


def response_scores(model, batch):
    """Scores of the A answers of a batch under a reward model: its head on the last token of each answer. (A,), float32."""
    return scores_at(model, batch, batch.last)


def scores_at(model, batch, places):
    """A reward model's head on the hidden states of a batch at some places of its flat rows: (places,), float32."""
    head = core(model).score
    hidden = body(model, batch).to(head.weight.device).flatten(0, 1)  # only a device map puts it elsewhere
    return scalar(head, hidden[places.to(hidden.device)]).to(batch.ids.device)


def scalar(head, hidden):
    """What a linear head of one output makes of hidden states: (n, d) -> (n,), float32."""
    bias = None if head.bias is None else head.bias.to(wide(hidden))
    column = F.linear(hidden.to(wide(hidden)), head.weight.to(wide(hidden)), bias)
    return column.sum(1)  # not [:, 0]: FSDP2 warns of views
