"""The formulas of reward models and reinforcement learning: the specification of reward.py and ppo.py.

Contract, as in losses.py: columns are positional, hyper-parameters are keywords; no models, batches or ranks. A column has one
number per pair (bradley_terry) or per answer token. pi, old and ref are log-probs of a token under the policy being trained, the
policy that sampled the answer, and the reference."""

import torch
from torch.nn.functional import logsigmoid


def bradley_terry(s_w, s_l, margin, *, center_coef, label_smoothing=0.0):
    """Return the reward-model loss (pairs,): (1 - e) L(h) + e L(-h) + center_coef (s_w + s_l)^2, L(x) = -log sigmoid(x).

    h = s_w - s_l - margin. s_w, s_l: scores of the chosen and rejected answer. margin: required lead of the chosen one.
    e: label_smoothing, probability of a flipped label. arXiv:2203.02155; margin: 2307.09288; centred scores: 2312.09244."""
    h = s_w - s_l - margin
    loss_if_right = -logsigmoid(h)
    loss_if_flipped = -logsigmoid(-h)
    ranking = (1 - label_smoothing) * loss_if_right + label_smoothing * loss_if_flipped
    centring = (s_w + s_l) ** 2
    return ranking + center_coef * centring


def ppo(pi, old, advantage, *, clip):
    """Return the policy loss max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = exp(pi - old). PPO, arXiv:1707.06347 eq. 7."""
    rho = (pi - old).exp()
    clipped_rho = rho.clamp(1 - clip, 1 + clip)
    loss = -advantage * rho
    clipped_loss = -advantage * clipped_rho
    # pessimistic: no gain from leaving the clip range
    return torch.max(loss, clipped_loss)


def value_loss(value, old_value, target, *, value_clip):
    """Return max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2, R: target, c: value_clip. arXiv:2005.12729 sec. 3."""
    # c is infinity for no clipping
    change = (value - old_value).clamp(-value_clip, value_clip)
    clipped_value = old_value + change
    error = (value - target) ** 2
    clipped_error = (clipped_value - target) ** 2
    # pessimistic: no gain from moving beyond the clip
    return torch.max(error, clipped_error) / 2


def kl_penalty(pi, ref):
    """Return exp(ref - pi) - (ref - pi) - 1 >= 0; on sampled tokens it estimates KL(policy || ref). arXiv:2402.03300 eq. 4."""
    # expm1(x) = exp(x) - 1, but accurate near 0
    return torch.expm1(ref - pi) - (ref - pi)


def grpo(pi, old, ref, advantage, *, clip, kl_coef):
    """Return ppo() + kl_coef kl_penalty(). advantage: group_advantage() of the token's answer. arXiv:2402.03300 eq. 3."""
    policy_loss = ppo(pi, old, advantage, clip=clip)
    penalty = kl_penalty(pi, ref)
    return policy_loss + kl_coef * penalty


def group_advantage(scores, *, eps=1e-4):
    """Return (s - mean) / (population std + eps) of each row; scores: (prompts, answers per prompt). arXiv:2402.03300."""
    mean = scores.mean(1, keepdim=True)
    std = scores.std(1, correction=0, keepdim=True)
    # eps avoids 0 / 0 in a row of equal scores
    return (scores - mean) / (std + eps)


def gae(rewards, values, mask, *, gamma, lam):
    """Return the advantages A_t = delta_t + gamma lam A_(t+1), delta_t = r_t + gamma V_(t+1) - V_t. arXiv:1506.02438 eq. 16.

    All tensors are (answers, T): one answer per row, mask True at its tokens. V and A are 0 wherever mask is False."""
    rewards = rewards * mask
    values = values * mask
    advantages = torch.zeros_like(values)
    # backwards in time; (answers,) each
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        value = values[:, t]
        delta = rewards[:, t] + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = advantage
        next_advantage = advantage
        next_value = value
    return advantages * mask


def whiten(x, mask):
    """Return (x - mean) / sqrt(variance + 1e-8) where mask is True, else 0; mean and variance are over all of x[mask]."""
    kept = x[mask]
    mean = kept.mean()
    variance = kept.var(correction=0)
    # 1e-8 avoids a division by 0 if all elements are equal
    std = (variance + 1e-8).sqrt()
    return (x - mean) / std * mask
