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
    """Return D and -dD / dlog_pi. D: mean of Z = log_ref - log_pi over the largest Z that have reference probability mu together."""
    z = log_ref - log_pi
    mass = _worst(z.detach(), log_ref.exp(), mu) / mu
    return (mass * z).sum(-1), mass


def _worst(z, p, mu, bins=4096):
    """Return the part of each token's p that is in the worst tail: the tokens of largest z, as many as have sum mu of p.

    z, p, result: (..., V). z [3, 1, 2], p [0.2, 0.5, 0.3], mu 0.4 -> [0.2, 0, 0.2]. Faster than sorting: a histogram of p over z
    has the tail's end in one of its bins, and a second one divides that bin, to 2e-7 of z's range. A bin's tokens get one share."""
    exact_p = p.double()
    low, high = z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)
    for _ in range(2):
        # bins 1 to `bins` go from high down to low; bin 0 is all above, bins + 1 all below. NaN goes to any bin: the result is NaN
        width = ((high - low) / bins).clamp(min=1e-30)
        bin_index = ((high - z) / width).add_(1).nan_to_num_(0)
        bin_index = bin_index.clamp_(0, bins + 1).long()
        bin_p = exact_p.new_zeros(*p.shape[:-1], bins + 2).scatter_add_(-1, bin_index, exact_p)
        cumulative_p = bin_p.cumsum(-1)
        # the tail ends in the first bin whose cumulative p reaches mu
        last_bin = (cumulative_p < mu).sum(-1, keepdim=True).clamp(max=bins + 1)
        # the second histogram divides this bin, and one more on each side because of rounding
        high = high - (last_bin - 2) * width
        low = high - 3 * width
    # share of a bin that is in the tail: 1 before the last bin, a part of the last bin, 0 after it
    missing_p = mu - cumulative_p + bin_p  # mu minus the p of all bins before
    share = (missing_p / bin_p.clamp(min=1e-30)).clamp_(0, 1)
    return share.to(p.dtype).gather(-1, bin_index).mul_(p)


def erm(log_pi, log_ref, *, mu):
    """Return D = (1 / mu) log mean exp(mu Z), Z = log_ref - log_pi, mean under the reference, and -dD / dlog_pi. mu -> 0: the KL."""
    log_terms = log_ref + mu * (log_ref - log_pi)  # terms of the mean: p exp(mu Z), p = exp(log_ref)
    return log_terms.logsumexp(-1) / mu, log_terms.softmax(-1)


def released(log_pi, log_ref, *, mu, parts=2):
    """Return D as Ra-DPO's released code computes it, which is no risk measure, and -dD / dlog_pi.

    D sums p Z, p = exp(log_ref), over tokens whose Z = log_ref - log_pi exceeds the 1 - mu quantile of their vocabulary part."""
    z = log_ref - log_pi
    p = log_ref.exp()
    # the last part takes the remainder
    size, rest = divmod(z.shape[-1], parts)
    sizes = [size] * (parts - 1) + [size + rest]
    is_counted = []
    for part in z.detach().split(sizes, -1):
        quantile = part.quantile(1 - mu, dim=-1, keepdim=True)
        is_counted.append(part > quantile)
    mass = p * torch.cat(is_counted, -1)
    return (mass * z).sum(-1), mass


RISKS = {'cvar': cvar, 'erm': erm, 'released': released}


def divergence_of(loss, risk, mu):
    """Return the divergence of a loss with these options: a risk measure for Ra-DPO, else the KL."""
    return partial(RISKS[risk], mu=mu) if loss.startswith('radpo') else kl
