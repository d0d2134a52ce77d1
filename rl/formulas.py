"""The formulas of reward models and reinforcement learning: the specification of reward.py and ppo.py.

The contract is that of losses.py: columns are positional, hyper-parameters are keywords; no model, no mask of a batch, no rank.
A column has one number per pair (bradley_terry) or per answer token, under the policy (pi), the policy that has sampled the
answer (old) and the reference (ref).
"""

import torch
from torch.nn.functional import logsigmoid


def bradley_terry(s_w, s_l, margin, *, center_coef, label_smoothing=0.0):
    """(1 - e) L(h) + e L(-h) + center_coef (s_w + s_l)^2, h = s_w - s_l - margin, on the scores of a reward model.
    arXiv:2203.02155; margin: 2307.09288; centred scores: 2312.09244."""
    h = s_w - s_l - margin
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h) + center_coef * (s_w + s_l) ** 2


def ppo(pi, old, advantage, *, clip):
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = exp(pi - old). PPO, arXiv:1707.06347 eq. 7."""
    rho = (pi - old).exp()
    return torch.max(-advantage * rho, -advantage * rho.clamp(1 - clip, 1 + clip))


def value_loss(value, old_value, target, *, value_clip):
    """max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2; c infinite: not clipped. arXiv:2005.12729 sec. 3."""
    near = old_value + (value - old_value).clamp(-value_clip, value_clip)
    return torch.max((value - target) ** 2, (near - target) ** 2) / 2


def kl_penalty(pi, ref):
    """exp(ref - pi) - (ref - pi) - 1 >= 0: estimates KL(policy || reference) on the policy's tokens. 2402.03300 eq. 4."""
    return torch.expm1(ref - pi) - (ref - pi)


def grpo(pi, old, ref, advantage, *, clip, kl_coef):
    """ppo + kl_coef kl_penalty, A the answer's group_advantage at each of its tokens. GRPO, arXiv:2402.03300 eq. 3."""
    return ppo(pi, old, advantage, clip=clip) + kl_coef * kl_penalty(pi, ref)


def group_advantage(scores, *, eps=1e-4):
    """(s - mean) / (std + eps) in every row, the n answers of one prompt: (prompts, n) -> the same. arXiv:2402.03300."""
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, correction=0, keepdim=True) + eps)


def gae(rewards, values, mask, *, gamma, lam):
    """A_t = delta_t + gamma lam A_(t+1), delta_t = r_t + gamma V_(t+1) - V_t, V = 0 after the end. arXiv:1506.02438 eq. 16.
    All (A, T): a row for an answer, mask True at its tokens; 0 elsewhere."""
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    # (A,): A_(t+1) and V_(t+1)
    later = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = delta + gamma * lam * later
        advantages[:, t] = later
        next_value = values[:, t]
    return advantages * mask


def whiten(x, mask):
    """(x - mean) / sqrt(variance + 1e-8) over everything under the mask, 0 elsewhere; population variance."""
    kept = x[mask]
    return (x - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt() * mask
