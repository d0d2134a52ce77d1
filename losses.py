"""Every loss of nanopref: this file is the specification. It knows no model, no mask and no rank.

A loss takes columns, one number per example, as positional arguments of shape (B,), and hyper-parameters as keywords:
  pi_w, pi_l, ref_w, ref_l   log-prob of the chosen (w) and the rejected (l) answer, summed over its tokens, under the
                             policy and the reference (a loss that names no ref_* never runs a reference model)
  n_w, n_l, div_w, div_l     number of answer tokens; divergence (model.py) summed over the answer's positions
  pi, ref, n, good           the same for single answers, with a thumb up (good = True) or down
It returns (B,) losses. Below, a = pi_w - ref_w, r = pi_l - ref_l, d = a - r, S = sigmoid, L(x) = -log S(x), e = smoothing.
A training step minimises sum_i w_i l_i / sum_i w_i over all its examples, wherever they sit; w is detached, and 1 unless
said otherwise. What else depends on the whole step is a statistic. New loss: a function, and its name in LOSSES below.
"""

# fmt: off
import torch
from torch import sigmoid
from torch.nn.functional import logsigmoid


def dpo(pi_w, pi_l, ref_w, ref_l, *, beta):
    """L(beta d). DPO, arXiv:2305.18290 eq. 7; with the weight drdpo_weight it is Dr. DPO."""
    return -logsigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l)))

def cdpo(pi_w, pi_l, ref_w, ref_l, *, beta, label_smoothing):
    """(1 - e) L(beta d) + e L(-beta d): labels are wrong with probability e. Mitchell's cDPO note, eq. 3."""
    h = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)

def robust(pi_w, pi_l, ref_w, ref_l, *, beta, label_smoothing):
    """[(1 - e) L(beta d) - e L(-beta d)] / (1 - 2e): unbiased under flips, unbounded below. arXiv:2403.00409."""
    h = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    return (-(1 - label_smoothing) * logsigmoid(h) + label_smoothing * logsigmoid(-h)) / (1 - 2 * label_smoothing)

def ipo(pi_w, pi_l, ref_w, ref_l, n_w, n_l, *, beta, average):
    """(d - 1 / (2 beta))^2, a and r per token if average (as the authors run it). arXiv:2310.12036 eq. 17."""
    a, r = pi_w - ref_w, pi_l - ref_l
    d = a / n_w - r / n_l if average else a - r
    return (d - 1 / (2 * beta)) ** 2

def tdpo1(pi_w, pi_l, ref_w, ref_l, div_w, div_l, *, beta):
    """L(beta (d - (D_l - D_w))), D the KL (TDPO1, arXiv:2404.11999) or a risk (Ra-DPO1, 2505.20359)."""
    return -logsigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l) - (div_l - div_w)))

def tdpo2(pi_w, pi_l, ref_w, ref_l, div_w, div_l, *, beta, alpha):
    """L(beta (d - alpha (D_l - sg D_w))), no gradient through D_w. arXiv:2404.11999; Ra-DPO2 2505.20359."""
    return -logsigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l) - alpha * (div_l - div_w.detach())))

def hinge(pi_w, pi_l, ref_w, ref_l, *, beta):
    """max(0, 1 - beta d). RSO, arXiv:2309.06657."""
    return torch.relu(1 - beta * ((pi_w - ref_w) - (pi_l - ref_l)))

def dpop(pi_w, pi_l, ref_w, ref_l, *, beta, lam):
    """L(beta (d - lam max(0, -a))): the chosen answer may not become less likely. DPO-positive, arXiv:2402.13228."""
    a, r = pi_w - ref_w, pi_l - ref_l
    return -logsigmoid(beta * (a - r - lam * torch.relu(-a)))

def exo(pi_w, pi_l, ref_w, ref_l, *, beta, label_smoothing):
    """KL(Bernoulli S(beta d) || Bernoulli 1 - e), needs e > 0. EXO, arXiv:2402.00856."""
    h = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    e = torch.as_tensor(label_smoothing, dtype=h.dtype)
    return sigmoid(h) * (logsigmoid(h) - (1 - e).log()) + sigmoid(-h) * (logsigmoid(-h) - e.log())

def nca(pi_w, pi_l, ref_w, ref_l, *, beta):
    """L(beta a) + L(-beta a) / 2 + L(-beta r) / 2. NCA, arXiv:2402.05369."""
    a, r = beta * (pi_w - ref_w), beta * (pi_l - ref_l)
    return -logsigmoid(a) - logsigmoid(-a) / 2 - logsigmoid(-r) / 2

def bco(pi_w, pi_l, ref_w, ref_l, *, beta):
    """L(beta a) + L(-beta r), without the paper's running shift. BCO, arXiv:2404.04656."""
    return -logsigmoid(beta * (pi_w - ref_w)) - logsigmoid(-beta * (pi_l - ref_l))

def sppo(pi_w, pi_l, ref_w, ref_l, *, beta):
    """(a - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2. SPPO with hard labels, arXiv:2405.00675."""
    return (pi_w - ref_w - 1 / (2 * beta)) ** 2 + (pi_l - ref_l + 1 / (2 * beta)) ** 2

def apo_zero(pi_w, pi_l, ref_w, ref_l, *, beta):
    """1 - S(beta a) + S(beta r): chosen up, rejected down. APO, arXiv:2408.06266."""
    return sigmoid(-beta * (pi_w - ref_w)) + sigmoid(beta * (pi_l - ref_l))

def apo_down(pi_w, pi_l, ref_w, ref_l, *, beta):
    """S(beta a) + 1 - S(beta d): both down, rejected more. APO, arXiv:2408.06266."""
    return sigmoid(beta * (pi_w - ref_w)) + sigmoid(-beta * ((pi_w - ref_w) - (pi_l - ref_l)))

def discopop(pi_w, pi_l, ref_w, ref_l, *, beta, tau):
    """(1 - u) L(h) + u exp(-h), h = beta d, u = S(h / tau), in a form that cannot overflow for tau <= 1. arXiv:2406.08414."""
    h = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    return -sigmoid(-h / tau) * logsigmoid(h) + (logsigmoid(h / tau) - h).exp()

def sigmoid_norm(pi_w, pi_l, ref_w, ref_l, n_w, n_l, *, beta):
    """L(beta (a / n_w - r / n_l)): DPO per token. Tulu 3, arXiv:2411.15124."""
    return -logsigmoid(beta * ((pi_w - ref_w) / n_w - (pi_l - ref_l) / n_l))

def slic(pi_w, pi_l, *, delta, lam):
    """max(0, delta - pi_w + pi_l) - lam pi_w. SLiC-HF, arXiv:2305.10425."""
    return torch.relu(delta - pi_w + pi_l) - lam * pi_w

def simpo(pi_w, pi_l, n_w, n_l, *, beta, gamma):
    """L(beta (pi_w / n_w - pi_l / n_l) - gamma). SimPO, arXiv:2405.14734."""
    return -logsigmoid(beta * (pi_w / n_w - pi_l / n_l) - gamma)

def orpo(pi_w, pi_l, n_w, n_l, *, lam):
    """NLL per token + lam L(log odds_w - log odds_l), odds of the mean token prob. ORPO, arXiv:2403.07691."""
    p, q = pi_w / n_w, pi_l / n_l
    return -p - lam * logsigmoid((p - q) - (_log1mexp(p) - _log1mexp(q)))

def cpo(pi_w, pi_l, n_w, *, beta):
    """L(beta (pi_w - pi_l)) + NLL per token of the chosen answer. CPO, arXiv:2401.08417."""
    return -logsigmoid(beta * (pi_w - pi_l)) - pi_w / n_w

def _log1mexp(x):
    """log(1 - exp(x)) for x <= 0, finite in value and gradient: x is kept a little below 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps ** 2)
    near = x > -0.6931471805599453  # each branch sees only arguments it can take, or its gradient would be NaN
    return torch.where(near, (-torch.expm1(x.where(near, -1.0))).log(), torch.log1p(-x.where(~near, -1.0).exp()))

def sft(pi, n):
    """NLL per token; with weight n a step is the mean over its tokens."""
    return -pi / n

def kto(pi, ref, good, z=0.0, *, beta, w_good, w_bad):
    """good: w_good (1 - S(beta (a - z))); bad: w_bad (1 - S(beta (z - r))). KTO, arXiv:2402.01306."""
    h = beta * (pi - ref - z)
    return torch.where(good, w_good * sigmoid(-h), w_bad * sigmoid(h))

def bradley_terry(s_w, s_l, margin, *, center_coef, label_smoothing=0.0):
    """(1 - e) L(h) + e L(-h) + center_coef (s_w + s_l)^2, h = s_w - s_l - margin, on the scores of a reward model.
    arXiv:2203.02155; margin: 2307.09288; centred scores: 2312.09244."""
    h = s_w - s_l - margin
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h) + center_coef * (s_w + s_l) ** 2

def drdpo_weight(losses, shift, *, beta_prime):
    """w of Dr. DPO, -beta' log mean exp(-l / beta'), arXiv:2407.07880 eq. 12; any shift common to the step cancels."""
    return ((shift - losses) / beta_prime).clamp(max=80).exp()

def importance(pi_l, ref_l, *, importance_max):
    """exp(r), no gradient, at most importance_max: multiplies the loss as if y_l came from the policy. 2402.12366."""
    return (pi_l - ref_l).detach().exp().clamp(max=importance_max)

# ---- statistics of a whole step: (columns in step order, state, generator) -> (columns, new state) ----

def beta_dpo_statistic(pi_w, pi_l, ref_w, ref_l, state, generator, *, beta, a, rho):
    """beta_t = max(beta (1 + a (mean of the kept d - m)), 1e-3); weight 1 for kept pairs, else 0. arXiv:2407.08639.
    m and s: running mean and std of d, momentum 0.9, this step included, starting at the first step's own."""
    d = (pi_w - ref_w) - (pi_l - ref_l)
    now = {'mean': d.mean().item(), 'std': d.std().item() if len(d) > 1 and d.min() < d.max() else 0.0}
    state = {k: 0.9 * state[k] + 0.1 * now[k] if state else now[k] for k in now}
    keep = keep_near(d, state['mean'], state['std'] if now['std'] else 0.0, generator, rho=rho)
    beta_t = beta * (1 + a * (d[keep].mean() - state['mean']))
    return {'beta': beta_t.clamp(min=1e-3).expand_as(d), 'weight': keep.to(d.dtype)}, state

def keep_near(d, mean, std, generator, *, rho):
    """Mask of round(B (1 - rho)) >= 1 pairs, drawn without replacement with weight exp(-(d - mean)^2 / (2 std^2)).
    The largest log weight + Gumbel noise is such a draw, and cannot underflow. std = 0 keeps every pair."""
    if std == 0:
        return torch.ones_like(d, dtype=torch.bool)
    noise = torch.rand(d.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    score = -(((d.double() - mean) / std) ** 2) / 2 - (-noise.log()).log()
    kept = score.topk(max(1, round(len(d) * (1 - rho)))).indices
    return torch.zeros_like(d, dtype=torch.bool).index_fill(0, kept, True)

def kto_statistic(pi_kl, ref_kl, state, generator):
    """z = max(0, mean log-ratio of mismatched answers, y_{i+1} given x_i): an estimate of KL(policy || reference)."""
    return {'z': (pi_kl - ref_kl).mean().clamp(min=0).expand_as(pi_kl)}, state

def aot_statistic(pi_w, pi_l, ref_w, ref_l, state, generator):
    """Pair the policy's margins, sorted, with the reference's: AOT is then cdpo. arXiv:2406.05882."""
    rank = (pi_w - pi_l).argsort().argsort()
    return {'ref_w': (ref_w - ref_l).sort().values[rank], 'ref_l': torch.zeros_like(ref_l)}, state

def reward(pi, ref=0.0, n=1.0, div=0.0, *, beta=1.0, alpha=1.0):
    """The implicit reward of one answer, from whatever of these the loss itself uses: what it compares is reported."""
    return beta * (pi - ref + alpha * div) / n

# ---- reinforcement learning, for ppo.py: one number per answer token, under policy, sampling policy (old) and reference ----

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
    advantages, later, next_value = torch.zeros_like(values), torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = later = delta + gamma * lam * later
        next_value = values[:, t]
    return advantages * mask

def whiten(x, mask):
    """(x - mean) / sqrt(variance + 1e-8) over everything under the mask, 0 elsewhere; population variance."""
    kept = x[mask]
    return (x - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt() * mask

# ---- the table of names ----

LOSSES = {f.__name__: f for f in (
    dpo, cdpo, robust, ipo, tdpo1, tdpo2, kto, slic, hinge, dpop, exo, nca, bco, sppo, apo_zero, apo_down, discopop,
    sigmoid_norm, simpo, orpo, cpo)} | {
    'drdpo': cdpo,  # weighted by drdpo_weight, as every loss is when beta_prime is set
    'beta_dpo': dpo, 'aot': cdpo,  # their statistics replace beta, or ref_w and ref_l
    'radpo1': tdpo1, 'radpo2': tdpo2,  # with a risk measure in place of the KL
    'kto_zero': kto}  # z = 0
STATISTICS = {'beta_dpo': beta_dpo_statistic, 'kto': kto_statistic, 'aot': aot_statistic}
