"""Divergences of the policy from the reference at one position: TDPO's KL, and the risk measures of Ra-DPO (arXiv:2505.20359).

log_pi, log_ref: log-probs (..., V) of policy and reference, Z = log_ref - log_pi. model.Head sums a divergence over the tokens of an
answer: the columns div_w and div_l of losses.py. Its forward needs the value of a Divergence, its backward the mass."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from configurator import UserError


class Divergence(NamedTuple):
    """A divergence D, by two functions.

    mass(logits, ref_logits, tail=None) -> (mass (..., V), tail). mass is -dD / dlog_pi: by how much D falls if the policy raises the
    log-prob of a token. Logits are log-probs plus any constant. tail: the Tail that an earlier call with the same logits has found
    and returned, so that this one need not search; always None for divergences without a tail.
    value(log_pi, log_ref, mass) -> D (...,): by default the sum of mass Z, which is the mean of Z if mass are probabilities."""

    mass: Callable
    value: Callable = lambda log_pi, log_ref, mass: (mass * (log_ref - log_pi)).sum(-1)

    def __call__(self, log_pi, log_ref):
        """Return (D (...,), mass (..., V))."""
        mass, _ = self.mass(log_pi, log_ref)
        return self.value(log_pi, log_ref, mass), mass


# KL(reference || policy): its mass are the reference's probabilities
kl = Divergence(lambda logits, ref_logits, tail=None: (ref_logits.softmax(-1), None))


def cvar(mu):
    """Return the Divergence whose D is the mean of Z over the largest Z that have reference probability mu together."""

    # p / mu of tokens in the tail, else 0, where p is the reference's probability
    def mass(logits, ref_logits, tail=None):
        z = (ref_logits - logits).detach()
        p = ref_logits.softmax(-1)
        tail = tail or find_tail(z, p, mu)
        # part of a token that counts: 1 if z > high, share if low < z <= high, else 0. torch.gt is faster with a result of floats
        is_above = torch.gt(z, tail.high, out=torch.empty_like(z))
        is_counted = torch.gt(z, tail.low, out=torch.empty_like(z))
        part = is_above.lerp_(is_counted, tail.share)  # is_above + share (is_counted - is_above)
        return p.mul_(part).div_(mu), tail

    return Divergence(mass)


class Tail(NamedTuple):
    """The tokens of largest z with sum mu of p: all tokens with z > high, and a share of those with low < z <= high. (..., 1) each."""

    low: torch.Tensor
    high: torch.Tensor
    share: torch.Tensor


def find_tail(z, p, mu, rounds=22):
    """Return the Tail of z and p, (..., V) each: which tokens have the largest z, taken until their p sum to mu.

    z [3, 1, 2], p [0.2, 0.5, 0.3], mu 0.4: all of the 3 and 2/3 of the 2, so low < 2 <= high < 3, and share is 2/3."""
    high = z.amax(-1, keepdim=True)
    low = z.amin(-1, keepdim=True)
    low = low.nextafter(low.new_tensor(-torch.inf))  # all z > low
    buffer = torch.empty_like(z)

    def p_above(threshold):
        return torch.gt(z, threshold, out=buffer).mul_(p).sum(-1, keepdim=True)

    # bisection, which is faster than sorting: 22 halvings leave a high - low of 2e-7 of the range of z
    for _ in range(rounds):
        middle = (low + high) / 2
        is_too_low = p_above(middle) >= mu
        low = torch.where(is_too_low, middle, low)
        high = torch.where(is_too_low, high, middle)
    above = p_above(high)
    p_between = p_above(low) - above
    share = (mu - above) / p_between.clamp(min=1e-30)
    return Tail(low, high, share.clamp(0, 1))  # clamp: against rounding


def erm(mu):
    """Return the Divergence D = (1 / mu) log mean exp(mu Z), mean under the reference. mu -> 0: the KL."""

    def log_terms(log_pi, log_ref):  # logarithms of the terms of the mean: p exp(mu Z), p = exp(log_ref)
        return log_ref + mu * (log_ref - log_pi)

    # -dD / dlog_pi: the share of a token's term in the mean
    def mass(logits, ref_logits, tail=None):
        return log_terms(logits, ref_logits).softmax(-1), None

    def value(log_pi, log_ref, mass):
        return log_terms(log_pi, log_ref).logsumexp(-1) / mu

    return Divergence(mass, value)


def released(mu, parts=2):
    """Return the Divergence that Ra-DPO's released code computes, which is no risk measure.

    The vocabulary is cut into equal parts. D sums p Z, p = exp(log_ref), over tokens whose Z exceeds the 1 - mu quantile of its part."""

    def mass(logits, ref_logits, tail=None):
        z = (ref_logits - logits).detach()
        size, rest = divmod(z.shape[-1], parts)
        sizes = [size] * (parts - 1) + [size + rest]  # the last part takes the remainder
        is_counted = []
        for part in z.split(sizes, -1):
            quantile = part.quantile(1 - mu, dim=-1, keepdim=True)
            is_counted.append(part > quantile)
        return ref_logits.softmax(-1) * torch.cat(is_counted, -1), None  # None: it has no Tail

    return Divergence(mass)


RISKS = {'cvar': cvar, 'erm': erm, 'released': released}


def divergence_of(loss, risk, mu):
    """Return the Divergence of a loss with these options: a risk measure for Ra-DPO, else the KL."""
    name = risk if loss.startswith('radpo') else 'kl'
    divergence = kl if name == 'kl' else RISKS[risk](mu)
    # model.Head trusts the mass, also that of a risk of your own: try it, on a few positions of a small vocabulary
    logits = torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_pi, log_ref = logits.log_softmax(-1)
    value, mass = divergence(log_pi.requires_grad_(), log_ref)
    (slope,) = torch.autograd.grad(value.sum(), log_pi)
    if not torch.allclose(mass, -slope):
        raise UserError(f'the mass of {name} in rl/divergences.py is not minus the slope of its value in log_pi')
    return divergence
