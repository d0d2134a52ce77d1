"""The formulas of reward models and reinforcement learning: the specification of reward.py and ppo.py.

The contract is that of losses.py: columns are positional, hyper-parameters are keywords; no model, no mask of a batch, no rank.
A column has one number per pair (bradley_terry) or per answer token. Its log-probs are those of the policy that trains (pi), of
the policy as it was when it sampled the answer (old), and of the reference (ref).
"""

import torch
from torch.nn.functional import logsigmoid


def bradley_terry(s_w, s_l, margin, *, center_coef, label_smoothing=0.0):
    """Return the loss (pairs,) of a reward model: (1 - e) L(h) + e L(-h) + center_coef (s_w + s_l)^2, L(x) = -log sigmoid(x).

    s_w, s_l: scores of the chosen and the rejected answer. h = s_w - s_l - margin; margin: the lead that the chosen one should
    have. e: label_smoothing, the probability that the label is wrong. The last term keeps scores near 0.
    arXiv:2203.02155; margin: 2307.09288; centred scores: 2312.09244."""
    h = s_w - s_l - margin
    if_right = -logsigmoid(h)
    if_flipped = -logsigmoid(-h)
    # the expected loss, over whether the label is right
    ranking = (1 - label_smoothing) * if_right + label_smoothing * if_flipped
    centring = (s_w + s_l) ** 2
    return ranking + center_coef * centring


def ppo(pi, old, advantage, *, clip):
    """Return the policy loss max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = exp(pi - old). PPO, arXiv:1707.06347 eq. 7."""
    rho = (pi - old).exp()
    clipped_rho = rho.clamp(1 - clip, 1 + clip)
    loss = -advantage * rho
    clipped_loss = -advantage * clipped_rho
    # the larger one: nothing is gained by moving out of the clip's range, and what is lost by it still counts
    return torch.max(loss, clipped_loss)


def value_loss(value, old_value, target, *, value_clip):
    """Return max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2. arXiv:2005.12729 sec. 3.

    R: target; c: value_clip, where infinity means no clipping."""
    change = (value - old_value).clamp(-value_clip, value_clip)
    clipped_value = old_value + change
    error = (value - target) ** 2
    clipped_error = (clipped_value - target) ** 2
    # the larger one, for the same reason
    worst = torch.max(error, clipped_error)
    return worst / 2


def kl_penalty(pi, ref):
    """Return exp(ref - pi) - (ref - pi) - 1 >= 0, which estimates KL(policy || reference). arXiv:2402.03300 eq. 4.

    The estimate holds for tokens that the policy has sampled."""
    # expm1 is exp(x) - 1, exact for the small differences that are usual here
    return torch.expm1(ref - pi) - (ref - pi)


def grpo(pi, old, ref, advantage, *, clip, kl_coef):
    """Return ppo + kl_coef kl_penalty, A the answer's group_advantage at each of its tokens. GRPO, arXiv:2402.03300 eq. 3."""
    policy_loss = ppo(pi, old, advantage, clip=clip)
    penalty = kl_penalty(pi, ref)
    return policy_loss + kl_coef * penalty


def group_advantage(scores, *, eps=1e-4):
    """Return (s - mean) / (std + eps) of each row: scores (prompts, n) of n answers to each prompt -> (prompts, n).

    The std is of the population; eps keeps it from 0 where all scores of a row are equal. arXiv:2402.03300."""
    mean = scores.mean(1, keepdim=True)
    std = scores.std(1, correction=0, keepdim=True)
    centred = scores - mean
    return centred / (std + eps)


def gae(rewards, values, mask, *, gamma, lam):
    """Return the advantages A_t = delta_t + gamma lam A_(t+1), delta_t = r_t + gamma V_(t+1) - V_t. arXiv:1506.02438 eq. 16.

    All are (answers, T): a row for each answer, whose tokens are where mask is True. V and A are 0 after an answer's last token,
    and the returned advantages are 0 wherever mask is False."""
    rewards = rewards * mask
    values = values * mask
    advantages = torch.zeros_like(values)
    # from the last token to the first: each needs the advantage and the value of the token after it, (answers,) each
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        reward = rewards[:, t]
        value = values[:, t]
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = advantage
        # t is the next token of the one before it
        next_advantage = advantage
        next_value = value
    return advantages * mask


def whiten(x, mask):
    """Return (x - mean) / sqrt(variance + 1e-8) where mask is True, and 0 elsewhere. x and mask have one shape.

    Mean and population variance are of the elements under the mask, all rows together."""
    kept = x[mask]
    mean = kept.mean()
    variance = kept.var(correction=0)
    # 1e-8: no division by 0 where all elements are equal
    std = (variance + 1e-8).sqrt()
    whitened = (x - mean) / std
    return whitened * mask
