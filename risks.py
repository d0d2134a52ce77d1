"""Divergences of the policy from the reference at one position, for TDPO and Ra-DPO: (..., V) log-probs -> (...,).

Z = log ref - log pi, a random variable under the reference's distribution. Only kl, cvar and erm are risk measures of Z.
"""

import torch


def kl(log_pi, log_ref):
    """KL(reference || policy) at a position: (..., V) log-probs -> (...,). Z = log ref - log pi, averaged under ref."""
    return (log_ref.exp() * (log_ref - log_pi)).sum(-1)


def cvar(log_pi, log_ref, *, mu):
    """Mean of Z over the worst probability mass mu of the reference; mu = 1 is the KL. Ra-DPO, arXiv:2505.20359."""
    z, order = (log_ref - log_pi).sort(-1, descending=True)
    p = log_ref.exp().gather(-1, order)
    weight = (mu - (p.cumsum(-1) - p)).clamp(min=0).minimum(p)  # the atom at the border is shared
    return (weight * z).sum(-1) / mu


def erm(log_pi, log_ref, *, mu):
    """Entropic risk (1 / mu) log mean exp(mu Z) under the reference; mu -> 0 is the KL. Ra-DPO, arXiv:2505.20359."""
    return torch.logsumexp(log_ref + mu * (log_ref - log_pi), -1) / mu


def released(log_pi, log_ref, *, mu, parts=2):
    """What Ra-DPO's published code computes; not a risk measure, kept to reproduce published curves.

    In each half of the vocabulary, sum of p Z over Z above the unweighted (1 - mu) quantile; 0 where policy = reference."""
    z, p = log_ref - log_pi, log_ref.exp()
    size = z.shape[-1] // parts
    total = 0.0
    for part in [slice(i * size, (i + 1) * size if i < parts - 1 else None) for i in range(parts)]:
        above = z[..., part] > z[..., part].detach().quantile(1 - mu, dim=-1, keepdim=True)
        total = total + (p[..., part] * z[..., part] * above).sum(-1)
    return total


RISKS = {'cvar': cvar, 'erm': erm, 'released': released}
