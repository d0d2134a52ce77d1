"""Divergences of the policy from the reference at one position: TDPO's KL, and the risk measures of Ra-DPO (arXiv:2505.20359).

log_pi, log_ref: log-probs (..., V) of policy and reference. Each function returns (D, mass): the divergence D (...,) and
mass = -dD / dlog_pi (..., V), by how much D falls if the policy raises the log-prob of a token. model.Head sums D over the
tokens of an answer: the columns div_w and div_l of losses.py."""

from functools import partial

import torch


def kl(log_pi, log_ref):
    """Return KL(reference || policy) and its mass -dKL / dlog_pi, the reference's probabilities."""
    p = log_ref.exp()
    return (p * (log_ref - log_pi)).sum(-1), p


def cvar(log_pi, log_ref, *, mu):
    """Return D, the mean of Z = log_ref - log_pi in the tail of largest Z with reference probability mu, and -dD / dlog_pi."""
    z = log_ref - log_pi
    mass = _worst(z.detach(), log_ref.exp(), mu) / mu
    return (mass * z).sum(-1), mass


def _worst(z, p, mu, bins=4096):
    """Return the part of each token's probability p in the worst tail: tokens with the largest z, until their p sum to mu.

    z, p, result: (..., V). Without a sort: a histogram of p over z finds the bin where the tail ends, and a second one refines it
    to 2e-7 of the range of z. Tokens of one bin get the same share of their p."""
    exact_p = p.double()
    low, high = z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)
    for _ in range(2):
        width = ((high - low) / bins).clamp(min=1e-30)
        # bins 1 to bins go from high down to low; bin 0: all above, bins + 1: all below. NaN: any bin, the result is NaN anyway
        bin_index = ((high - z) / width).add_(1).nan_to_num_(0)
        bin_index = bin_index.clamp_(0, bins + 1).long()
        bin_p = exact_p.new_zeros(*p.shape[:-1], bins + 2).scatter_add_(-1, bin_index, exact_p)
        cumulative_p = bin_p.cumsum(-1)
        last_bin = (cumulative_p < mu).sum(-1, keepdim=True).clamp(max=bins + 1)
        # next, refine this bin, and one more on each side because of rounding
        high = high - (last_bin - 2) * width
        low = high - 3 * width
    # share of each bin in the tail: all of the bins before the last one, a part of that, nothing after it
    left_of_mu = mu - cumulative_p + bin_p  # mu minus the p of all bins before
    share = (left_of_mu / bin_p.clamp(min=1e-30)).clamp_(0, 1)
    return share.to(p.dtype).gather(-1, bin_index).mul_(p)


def erm(log_pi, log_ref, *, mu):
    """Return D = (1 / mu) log mean exp(mu Z) under the reference, Z = log_ref - log_pi, and -dD / dlog_pi. mu -> 0 is the KL."""
    terms = log_ref + mu * (log_ref - log_pi)
    return terms.logsumexp(-1) / mu, terms.softmax(-1)


def released(log_pi, log_ref, *, mu, parts=2):
    """Return D as Ra-DPO's released code computes it, which is no risk measure, and -dD / dlog_pi.

    D sums p Z, p = exp(log_ref), over tokens whose Z = log_ref - log_pi exceeds the 1 - mu quantile of their vocabulary part."""
    z = log_ref - log_pi
    p = log_ref.exp()
    # the last part takes the remainder
    size, rest = divmod(z.shape[-1], parts)
    sizes = [size] * (parts - 1) + [size + rest]
    counts = []
    for part in z.detach().split(sizes, -1):
        quantile = part.quantile(1 - mu, dim=-1, keepdim=True)
        counts.append(part > quantile)
    mass = p * torch.cat(counts, -1)
    return (mass * z).sum(-1), mass


RISKS = {'cvar': cvar, 'erm': erm, 'released': released}


def divergence_of(loss, risk, mu):
    """Return the divergence of a loss with these options: a risk measure for Ra-DPO, else the KL."""
    return partial(RISKS[risk], mu=mu) if loss.startswith('radpo') else kl
