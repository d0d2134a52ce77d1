# fmt: off
"""Every loss of nanopref: this file is the specification. It knows no model, no mask and no rank.
A loss maps columns, one number per example (B,), to (B,) losses; keyword arguments are hyper-parameters. Columns:
  ratio_w, ratio_l        log-ratio of the chosen (w) and the rejected (l) answer: its log-prob, summed over its tokens,
                          under the policy minus under the reference. A loss without ratios runs no reference
  pi_w, pi_l, n_w, n_l    the policy's log-prob alone; the number of answer tokens
  div_w, div_l            divergence of the policy from the reference, summed over the answer's positions (rl/divergences.py)
  ratio, pi, n, good      the same for single answers, with a label: good, or bad (good = False)
Below, a = ratio_w, r = ratio_l, d = a - r, S = sigmoid, L(x) = -log S(x), e = label_smoothing; sg: no gradient. A step
minimises sum_i w_i loss_i / sum_i w_i over all its examples; w has no gradient, and is 1 unless said. Add yours to LOSSES."""
import torch
from torch.nn.functional import logsigmoid


# ---- losses that compare the two answers of a pair with a reference ----
def dpo(ratio_w, ratio_l, *, beta):
    """L(beta d). DPO, arXiv:2305.18290 eq. 7; with the weight drdpo_weight it is Dr. DPO."""
    return -logsigmoid(beta * (ratio_w - ratio_l))

def cdpo(ratio_w, ratio_l, *, beta, label_smoothing):
    """(1 - e) L(beta d) + e L(-beta d): labels are wrong with probability e. Mitchell's cDPO note, eq. 3."""
    h = beta * (ratio_w - ratio_l)
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)

def robust(ratio_w, ratio_l, *, beta, label_smoothing):
    """[(1 - e) L(beta d) - e L(-beta d)] / (1 - 2e): unbiased under flips, unbounded below. arXiv:2403.00409."""
    h = beta * (ratio_w - ratio_l)
    return (-(1 - label_smoothing) * logsigmoid(h) + label_smoothing * logsigmoid(-h)) / (1 - 2 * label_smoothing)

def ipo(ratio_w, ratio_l, n_w, n_l, *, beta, average):
    """(d - 1 / (2 beta))^2, ratios per token if average (as the authors run it). arXiv:2310.12036 eq. 17."""
    d = ratio_w / n_w - ratio_l / n_l if average else ratio_w - ratio_l
    return (d - 1 / (2 * beta)) ** 2

def tdpo1(ratio_w, ratio_l, div_w, div_l, *, beta):
    """L(beta (d - (D_l - D_w))), D the KL (TDPO1, arXiv:2404.11999) or a risk (Ra-DPO1, 2505.20359)."""
    return -logsigmoid(beta * (ratio_w - ratio_l - (div_l - div_w)))

def tdpo2(ratio_w, ratio_l, div_w, div_l, *, beta, alpha):
    """L(beta (d - alpha (D_l - sg D_w))). TDPO2, arXiv:2404.11999; Ra-DPO2, 2505.20359."""
    return -logsigmoid(beta * (ratio_w - ratio_l - alpha * (div_l - div_w.detach())))

def aot(ratio_w, ratio_l, shift, *, beta, label_smoothing):
    """(1 - e) L(h) + e L(-h), h = beta (d + shift): margins meet the reference's in sorted order. AOT, arXiv:2406.05882."""
    return cdpo(ratio_w + shift, ratio_l, beta=beta, label_smoothing=label_smoothing)

def hinge(ratio_w, ratio_l, *, beta):
    """max(0, 1 - beta d). RSO, arXiv:2309.06657."""
    return torch.relu(1 - beta * (ratio_w - ratio_l))

def dpop(ratio_w, ratio_l, *, beta, lam):
    """L(beta (d - lam max(0, -a))): the chosen answer may not become less likely. DPO-positive, arXiv:2402.13228."""
    return -logsigmoid(beta * (ratio_w - ratio_l - lam * torch.relu(-ratio_w)))

def exo(ratio_w, ratio_l, *, beta, label_smoothing):
    """KL(Bernoulli S(beta d) || Bernoulli 1 - e), needs e > 0. EXO, arXiv:2402.00856."""
    h = beta * (ratio_w - ratio_l)
    e = torch.as_tensor(label_smoothing, dtype=h.dtype)  # for its log
    return torch.sigmoid(h) * (logsigmoid(h) - (1 - e).log()) + torch.sigmoid(-h) * (logsigmoid(-h) - e.log())

def nca(ratio_w, ratio_l, *, beta):
    """L(beta a) + L(-beta a) / 2 + L(-beta r) / 2. NCA, arXiv:2402.05369."""
    return -logsigmoid(beta * ratio_w) - logsigmoid(-beta * ratio_w) / 2 - logsigmoid(-beta * ratio_l) / 2

def bco(ratio_w, ratio_l, *, beta):
    """L(beta a) + L(-beta r), without the paper's running shift. BCO, arXiv:2404.04656."""
    return -logsigmoid(beta * ratio_w) - logsigmoid(-beta * ratio_l)

def sppo(ratio_w, ratio_l, *, beta):
    """(a - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2. SPPO with hard labels, arXiv:2405.00675."""
    return (ratio_w - 1 / (2 * beta)) ** 2 + (ratio_l + 1 / (2 * beta)) ** 2

def apo_zero(ratio_w, ratio_l, *, beta):
    """1 - S(beta a) + S(beta r): chosen up, rejected down. APO, arXiv:2408.06266."""
    return torch.sigmoid(-beta * ratio_w) + torch.sigmoid(beta * ratio_l)

def apo_down(ratio_w, ratio_l, *, beta):
    """S(beta a) + 1 - S(beta d): both down, rejected more. APO, arXiv:2408.06266."""
    return torch.sigmoid(beta * ratio_w) + torch.sigmoid(-beta * (ratio_w - ratio_l))

def discopop(ratio_w, ratio_l, *, beta, tau):
    """(1 - u) L(h) + u exp(-h), h = beta d, u = S(h / tau), in a form without overflow (tau <= 1). arXiv:2406.08414."""
    h = beta * (ratio_w - ratio_l)
    return -torch.sigmoid(-h / tau) * logsigmoid(h) + (logsigmoid(h / tau) - h).exp()  # u exp(-h) = exp(log u - h)

def sigmoid_norm(ratio_w, ratio_l, n_w, n_l, *, beta):
    """L(beta (a / n_w - r / n_l)): DPO per token. Tulu 3, arXiv:2411.15124."""
    return -logsigmoid(beta * (ratio_w / n_w - ratio_l / n_l))
# ---- losses without a reference ----
def slic(pi_w, pi_l, *, delta, lam):
    """max(0, delta - pi_w + pi_l) - lam pi_w. SLiC-HF, arXiv:2305.10425."""
    return torch.relu(delta - pi_w + pi_l) - lam * pi_w

def simpo(pi_w, pi_l, n_w, n_l, *, beta, gamma):
    """L(beta (pi_w / n_w - pi_l / n_l) - gamma). SimPO, arXiv:2405.14734."""
    return -logsigmoid(beta * (pi_w / n_w - pi_l / n_l) - gamma)

def orpo(pi_w, pi_l, n_w, n_l, *, lam):
    """NLL per token + lam L(log odds_w - log odds_l), odds of the mean token prob. ORPO, arXiv:2403.07691."""
    p_w, p_l = pi_w / n_w, pi_l / n_l  # logs of the mean token probs; log odds = p - log(1 - exp(p))
    return -p_w - lam * logsigmoid((p_w - p_l) - (log1mexp(p_w) - log1mexp(p_l)))

def log1mexp(x):
    """log(1 - exp(x)) for x <= 0, accurate near 0 and far from it, finite in value and gradient."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps ** 2)  # below 0, where the logarithm is infinite
    is_near = x > -0.6931471805599453  # log(1/2). -1 replaces what a formula cannot take: its gradient would be NaN
    return torch.where(is_near, (-torch.expm1(x.where(is_near, -1.0))).log(), torch.log1p(-x.where(~is_near, -1.0).exp()))

def cpo(pi_w, pi_l, n_w, *, beta):
    """L(beta (pi_w - pi_l)) + NLL per token of the chosen answer. CPO, arXiv:2401.08417."""
    return -logsigmoid(beta * (pi_w - pi_l)) - pi_w / n_w

# ---- losses on single answers ----
def sft(pi, n):
    """NLL per token; with weight n a step is the mean over its tokens."""
    return -pi / n

def kto(ratio, good, z=0.0, *, beta, w_good, w_bad):
    """good: w_good (1 - S(beta (ratio - z))); bad: w_bad (1 - S(beta (z - ratio))). KTO, arXiv:2402.01306."""
    h = beta * (ratio - z)
    return torch.where(good, w_good * torch.sigmoid(-h), w_bad * torch.sigmoid(h))

# ---- what goes on top of any loss, and what a loss reports ----
def drdpo_weight(losses, shift, *, beta_prime):
    """w of Dr. DPO, -beta' log mean exp(-loss / beta'), arXiv:2407.07880 eq. 12; a shift common to the step cancels."""
    return ((shift - losses).detach() / beta_prime).clamp(max=80).exp()

def importance(ratio_l, *, importance_max):
    """sg exp(r), at most importance_max: multiplies the loss as if y_l came from the policy. arXiv:2402.12366."""
    return ratio_l.detach().exp().clamp(max=importance_max)

def reward(ratio, n=1.0, div=0.0, *, beta=1.0, alpha=1.0):
    """The implicit reward of an answer, from whatever of these its loss itself uses: what it compares is reported."""
    return beta * (ratio + alpha * div) / n

# ---- statistics of a whole step: (its columns, the last step's state or {}, generator) -> (more columns, new state), no gradient ----
def beta_dpo_statistic(ratio_w, ratio_l, state, generator, *, beta, a, rho):
    """beta of the step: max(0.001, beta (1 + a (mean of the kept d - mean))); weight: 1 if keep_near keeps a pair. arXiv:2407.08639.
    state: running mean and std of d, 0.9 times the last step's plus 0.1 times this one's; at first, its own."""
    d = (ratio_w - ratio_l).detach()
    now = {'mean': d.mean().item(), 'std': d.std().item() if d.min() < d.max() else 0.0}  # 0: one pair, or equal ones
    state = {name: 0.9 * state[name] + 0.1 * now[name] for name in now} if state else now
    keep = keep_near(d, state['mean'], state['std'] if now['std'] else 0.0, generator, rho=rho)
    beta_t = beta * (1 + a * (d[keep].mean() - state['mean']))
    return {'beta': beta_t.clamp(min=1e-3).expand_as(d), 'weight': keep.to(d.dtype)}, state

def keep_near(d, mean, std, generator, *, rho):
    """Mask (B,) of round(B (1 - rho)) >= 1 pairs, drawn without replacement, weights exp(-((d - mean) / std)^2 / 2); std 0: of all."""
    if std == 0:
        return torch.ones_like(d, dtype=torch.bool)
    # the k largest log weights, each plus Gumbel noise -log(-log u), are such a draw, in which no weight underflows
    u = torch.rand(d.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)  # log(0) is infinite
    score = -(((d.double() - mean) / std) ** 2) / 2 - (-u.log()).log()
    kept = score.topk(max(1, round(len(d) * (1 - rho)))).indices
    return torch.zeros_like(d, dtype=torch.bool).index_fill(0, kept, True)

def kto_statistic(ratio_kl, state, generator):
    """z = max(0, mean log-ratio of mismatched answers, y_{i+1} given x_i): an estimate of KL(policy || reference)."""
    return {'z': ratio_kl.detach().mean().clamp(min=0).expand_as(ratio_kl)}, state

def aot_statistic(pi_w, pi_l, ratio_w, ratio_l, state, generator):
    """shift: a pair's reference margin minus the one that has the rank of its policy margin. A margin is pi_w - pi_l.
    Policy margins (3, 1), reference margins (10, 30): the larger 30 goes to the first pair, so shift = (10 - 30, 30 - 10)."""
    ref_margin = (pi_w - ratio_w - (pi_l - ratio_l)).detach()  # pi - ratio: the reference's log-prob
    rank = (pi_w - pi_l).argsort().argsort()  # (B,): 0 for the pair with the smallest policy margin
    return {'shift': ref_margin - ref_margin.sort().values[rank]}, state

LOSSES = {f.__name__: f for f in (dpo, cdpo, robust, ipo, tdpo1, tdpo2, aot, hinge, dpop, exo, nca, bco, sppo, apo_zero,
    apo_down, discopop, sigmoid_norm, slic, simpo, orpo, cpo, kto)}
# drdpo is weighted, beta_dpo's statistic replaces beta, radpo has a risk measure as D, kto_zero has z = 0
LOSSES |= {'drdpo': cdpo, 'beta_dpo': dpo, 'radpo1': tdpo1, 'radpo2': tdpo2, 'kto_zero': kto}
STATISTICS = {'beta_dpo': beta_dpo_statistic, 'kto': kto_statistic, 'aot': aot_statistic}
if __name__ == '__main__':  # python losses.py my_loss: is it ready?
    from runtime import check_loss
    check_loss.main(LOSSES, STATISTICS)
