"""The losses against golden vectors: numbers from the original authors' code, with its gradients.

$GOLDEN names a file of them; by default the full set beside the repository if it is there, else golden_small.json here.
A group of the file is either checked by its function in CHECKS or skipped for a reason; the table at the end counts both.
Values, losses of single examples, implicit rewards and gradients agree to 1e-9 max(1, |golden|), float32 cases to 1e-5.
Nothing depends on how many cases there are or on their numbers: the hyper-parameters of a case say what it is.

The originals hand the mean, sum or log-mean-exp of a microbatch to backward; here a step is sum_i w_i l_i / sum_i w_i.
Where theirs is another reduction it is applied outside the formula. Other departures are notes under the table.
"""

import copy
import inspect
import json
import math
import os
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import with_ratios

import losses
import model
from rl import formulas

HERE = Path(__file__).resolve().parent
SMALL, FULL = HERE / 'golden_small.json', HERE.parents[2] / 'shared/golden/losses_golden.json'
PATH = Path(os.environ.get('GOLDEN') or (FULL if FULL.exists() else SMALL))
GOLDEN = json.loads(PATH.read_text())
USED = set()  # names of losses.LOSSES that some case went through


class Skip(Exception):
    """This case is not compared; the message says why."""


# ---- reading a case ----


def numbers(x):
    """Nested lists of numbers and of 'NaN', 'Infinity', '-Infinity' -> the same with floats."""
    return [numbers(y) for y in x] if isinstance(x, list) else float(x)


def read(case, arrays, leaves):
    """Input arrays of a case -> tensors, of which the leaves require gradients; token ids and labels stay integers."""
    x, real = {}, torch.float32 if case.get('dtype') == 'float32' else torch.float64
    for name, value in arrays.items():
        if name == 'prompt_id':
            continue
        dtype = torch.long if name in ('labels', 'input_ids', 'attention_mask') else real
        x[name] = torch.tensor(numbers(value), dtype=dtype).requires_grad_(name in leaves)
    return x


def open_case(case, note):
    """(what to compare with, input tensors, hyper-parameters)."""
    gold = case
    if case.get('do_not_copy'):
        if 'clean' not in case:
            raise Skip('the authors call for no such formula: their result is wrong and has no clean counterpart')
        note('cases in which the original is wrong or undefined: compared with their clean block')
        gold = case['clean']
    return gold, read(case, GOLDEN['inputs'][case['input']], gold.get('grads', {})), case['hyper']


def columns(x):
    """Input tensors -> pi_w, ref_l, n_w and so on, as losses.py names them; token log-probs are summed under masks."""
    c = {}
    for side, s in (('chosen', 'w'), ('rejected', 'l')):
        mask = x.get(f'{side}_mask', torch.empty(0))
        for who, p in (('policy', 'pi'), ('reference', 'ref')):
            if f'{who}_{side}_logps' in x:
                value = x[f'{who}_{side}_logps']
                c[f'{p}_{s}'] = value if value.ndim == 1 else (value * mask).sum(1)
        n = mask.sum(1) if mask.ndim == 2 else torch.ones_like(c[f'pi_{s}'])
        c[f'n_{s}'] = x.get(f'{side}_lengths', n)
    return c


def from_logits(x, who='policy', labels=None, divergence=None):
    """Sums over the labels of every row, through the LM head of model.py with the identity as its matrix, and counts."""
    labels = x['labels'] if labels is None else labels
    keep = labels[:, 1:] != -100
    logits = x[f'{who}_logits'][:, :-1][keep]
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    reference = (x['reference_logits'][:, :-1][keep], (eye, None)) if divergence else None
    out = model.Head.apply(logits, eye, None, labels[:, 1:][keep], SimpleNamespace(), divergence, reference)
    row = keep.nonzero()[:, 0]
    return [out.new_zeros(len(keep)).index_add(0, row, tokens) for tokens in out], keep.sum(1)


def columns_from_logits(x, divergence=None):
    """The same columns for rows [chosen; rejected] of logits."""
    sums, n = from_logits(x, divergence=divergence)
    both = {'pi': sums[0], 'n': n, 'ref': sums[2] if divergence else from_logits(x, 'reference')[0][0]}
    both |= {'div': sums[1]} if divergence else {}
    return {f'{k}_{s}': v.chunk(2)[i] for k, v in both.items() for i, s in enumerate('wl')}


# ---- our side ----


def loss(name, c, **keywords):
    """A loss by its name in the table of names, given the columns that its signature asks for."""
    USED.add(name)
    fn, c = losses.LOSSES[name], with_ratios(c)
    wanted = [p for p in inspect.signature(fn).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    return fn(*(c[p.name] for p in wanted if p.name in c or p.default is p.empty), **keywords)


def step(l, w=1.0):
    """The project's reduction of a step."""
    w = torch.ones_like(l) * w
    return (w * l).sum() / w.sum()


def reduced(case, l):
    """The original's scalar: the trainers of Ra-DPO sum over the microbatch, all others average."""
    return step(l) * (len(l) if case['group'].startswith(('radpo_', 'ra_dpo')) else 1)


def no_reference(c):
    return c | {'ref_w': torch.zeros_like(c['pi_w']), 'ref_l': torch.zeros_like(c['pi_l'])}


def rewards(c, *, ref=True, n=False, div=False, **keywords):
    """Implicit rewards of both sides, under the names of the golden outputs."""
    return {
        f'{side}_rewards': losses.reward(
            c[f'pi_{s}'] - c[f'ref_{s}'] if ref else c[f'pi_{s}'],
            c[f'n_{s}'] if n else 1.0,
            c[f'div_{s}'] if div else 0.0,
            **keywords,
        )
        for side, s in (('chosen', 'w'), ('rejected', 'l'))
    }


# ---- one function per family of originals: (case, note) -> triples (golden, inputs, ours) ----


def dpo_family(case, note):
    """DPO's own code, its forks, and the DPO and cDPO of HALOs and Ra-DPO."""
    gold, x, h = open_case(case, note)
    if h.get('humanline'):
        raise Skip('humanline clamping of token ratios is not among the losses here')
    c = columns_from_logits(x) if 'policy_logits' in x else columns(x)
    ours = {'policy_chosen_logps': c['pi_w'], 'policy_rejected_logps': c['pi_l']}
    if h.get('reference_free'):
        note("reference_free: the original's rewards still use the reference, ours do not; rewards not compared")
        c = no_reference(c)
    else:
        ours |= rewards(c, beta=h['beta'])
    e = h.get('label_smoothing', h.get('epsilon', 0.0))
    if h.get('ipo') or h.get('name') == 'ipo':
        l = loss('ipo', c, beta=h['beta'], average=False)
    elif 'beta_prime' in h:
        l = loss('drdpo', c, beta=h['beta'], label_smoothing=e)
    elif e:
        l = loss('cdpo', c, beta=h['beta'], label_smoothing=e)
    else:
        l = loss('dpo', c, beta=h['beta'])
    ours |= {'losses': l, 'scalar': reduced(case, l)}
    if 'beta_prime' in h and h.get('mode_loss') != 'mean':
        b, fixed = h['beta_prime'], l.detach()
        note("scalar: Dr. DPO's log-mean-exp outside the formula; gradient: our weighted mean, whose value differs")
        ours['scalar'] = -b * (torch.logsumexp(-l / b, 0) - math.log(len(l)))
        ours['gradient_of'] = step(l, losses.drdpo_weight(fixed, fixed.min(), beta_prime=b))
    yield gold, x, ours


def rlaif_dpo(case, note):
    gold, x, h = open_case(case, note)
    c, e = columns(x), h.get('robust_eps', 0.0)
    if h.get('ipo'):
        l = loss('ipo', c, beta=h['beta'], average=False)
    elif e:
        note('robust_eps: the original is cDPO divided by beta; divided here as well, outside the formula')
        l = loss('cdpo', c, beta=h['beta'], label_smoothing=e) / h['beta']
    else:
        l = loss('dpo', c, beta=h['beta'])
    if h.get('importance_correction') and not h.get('ipo'):
        note('importance_correction: the original has no upper limit, so importance_max is infinite here')
        l = l * losses.importance(c['pi_l'] - c['ref_l'], importance_max=math.inf)
    if h.get('sft_reg'):
        note('sft_reg: the original takes the summed log-prob, ours the mean per token; checked with n = 1')
        l = l + h['sft_reg'] * losses.sft(c['pi_w'], torch.ones_like(c['pi_w']))
    yield gold, x, {'losses': l, 'scalar': step(l), **rewards(c, beta=h['beta'])}


def beta_dpo(case, note):
    h = case['hyper']
    if h.get('momentum', 0.9) != 0.9 or h.get('beta_min', 1e-3) != 1e-3:
        raise Skip('the momentum 0.9 and the floor 1e-3 are constants here')
    note(
        'the stored masks are injected, and the state starts at the zeros of the original: ours starts at the first step'
    )
    state = {'mean': float(h.get('initial_mean', 0)), 'std': float(h.get('initial_std', 0))}
    for gold in case['steps']:
        x, out = read(case, gold['inputs'], gold['grads']), gold['outputs']
        c = columns(x)
        ratios = [(c[f'pi_{s}'] - c[f'ref_{s}']).detach() for s in 'wl']
        mask = torch.tensor(numbers(out['keep_mask'])) != 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, 'rand', lambda shape, **_: torch.full(shape, 0.5, dtype=torch.float64))
            d, mean, std = ratios[0] - ratios[1], out['gap_mean'], out['gap_std']
            likely = losses.keep_near(d, mean, std, None, rho=1 - mask.double().mean().item())
            patch.setattr(losses, 'keep_near', lambda *args, mask=mask, **keywords: mask)
            values, state = losses.STATISTICS['beta_dpo'](
                *ratios, state, None, beta=h['beta'], a=h['a'], rho=h['filter_ratio']
            )
        weights = torch.tensor(numbers(out['sampling_weights']), dtype=torch.float64)
        assert likely.all() or weights[likely].min() >= weights[~likely].max()  # equal noise keeps the likeliest pairs
        l = loss('beta_dpo', c, beta=values['beta'])
        ours = {'losses': l, 'scalar': step(l, values['weight']), 'beta_used': values['beta'][0]}
        ours |= {'gap_mean': state['mean'], 'gap_std': state['std']} | rewards(c, beta=h['beta'])
        yield gold, x, ours


def reward_model(case, note):
    gold, x, h = open_case(case, note)
    margin = x['margin'] if h.get('use_margin') else torch.zeros_like(x['chosen_scores'])
    coef = h.get('center_rewards_coefficient') or 0.0
    l = formulas.bradley_terry(x['chosen_scores'], x['rejected_scores'], margin, center_coef=coef)
    yield gold, x, {'losses': l, 'scalar': step(l)}


TRL = {  # loss_type -> (our name, our keywords from the hyper-parameters)
    'sigmoid': ('dpo', lambda h: {}),
    'hinge': ('hinge', lambda h: {}),
    'ipo': ('ipo', lambda h: {'average': True}),
    'robust': ('robust', lambda h: {'label_smoothing': h['label_smoothing']}),
    'exo_pair': ('exo', lambda h: {'label_smoothing': h['label_smoothing']}),
    'nca_pair': ('nca', lambda h: {}),
    'bco_pair': ('bco', lambda h: {}),
    'sppo_hard': ('sppo', lambda h: {}),
    'aot': ('aot', lambda h: {'label_smoothing': h['label_smoothing']}),
    'apo_zero': ('apo_zero', lambda h: {}),
    'apo_down': ('apo_down', lambda h: {}),
    'discopop': ('discopop', lambda h: {'tau': h['discopop_tau']}),
    'sigmoid_norm': ('sigmoid_norm', lambda h: {}),
}


def trl_dpo(case, note):
    """TRL's DPOTrainer: one loss type, or a weighted sum of several."""
    gold, x, h = open_case(case, note)
    if h.get('f_divergence_type', 'reverse_kl') != 'reverse_kl' or h.get('ld_alpha') is not None:
        raise Skip('f-divergences and length-desensitised sums are not among the losses here')
    if h.get('use_weighting'):
        raise Skip("WPO's weights are not among the losses here")
    c, scalar = columns(x), 0.0
    kinds = h['loss_type'] if isinstance(h['loss_type'], list) else [h['loss_type']]
    for kind, weight in zip(kinds, h.get('loss_weights') or [1.0] * len(kinds), strict=True):
        if kind == 'sft':
            note('sft: TRL repeats the token mean of the batch in every row; ours is the mean weighted by tokens')
            value = step(losses.sft(c['pi_w'], c['n_w']), c['n_w'])
            l = value.expand_as(c['pi_w'])
        elif kind in TRL:
            name, keywords = TRL[kind]
            fixed = {k: v.detach() for k, v in with_ratios(c).items()}
            four = [fixed[k] for k in ('pi_w', 'pi_l', 'ratio_w', 'ratio_l')]
            given = losses.STATISTICS['aot'](*four, {}, None)[0] if kind == 'aot' else {}
            l = loss(name, c | given, beta=h['beta'], **keywords(h))
            value = step(l)
            l = l[(four[0] - four[1]).argsort()] if kind == 'aot' else l  # TRL's rows come sorted
        else:
            raise Skip(f'{kind} is not among the losses here')
        scalar = scalar + weight * value
    ours = {'scalar': scalar, 'losses': l}
    if {'ipo', 'sigmoid_norm'} & set(kinds):
        note(
            "ipo, sigmoid_norm: TRL's rewards are summed over tokens, ours are per token as the loss; rewards not compared"
        )
    else:
        ours |= rewards(c, beta=h['beta'])
    yield gold, x, ours


def trl_simpo_and_cpo(case, note):
    """TRL's CPOTrainer, on log-probs or from logits."""
    gold, x, h = open_case(case, note)
    if h.get('alpha'):
        raise Skip("AlphaPO's transformed rewards are not among the losses here")
    kind, beta, e, alpha = h['loss_type'], h['beta'], h.get('label_smoothing', 0.0), h.get('cpo_alpha', 0.0)
    logits = 'policy_logits' in x
    c = columns_from_logits(x) if logits else columns(x)
    nll = step(losses.sft(c['pi_w'], c['n_w']), c['n_w'])
    plain, extra = no_reference(c), alpha * nll
    if (
        kind not in ('simpo', 'ipo') or not logits
    ):  # without logits the log-probs are what the loss takes, means or sums
        plain |= {'n_w': torch.ones_like(c['pi_w']), 'n_l': torch.ones_like(c['pi_l'])}
    if kind == 'simpo':
        gamma = h['simpo_gamma']
        l = loss('simpo', plain, beta=beta, gamma=gamma)
        if e:
            note('label_smoothing with simpo: ours has none; the smoothed half is simpo with the answers exchanged')
            exchanged = {'pi_w': plain['pi_l'], 'pi_l': plain['pi_w'], 'n_w': plain['n_l'], 'n_l': plain['n_w']}
            l = (1 - e) * l + e * loss('simpo', exchanged, beta=beta, gamma=-gamma)
    elif kind == 'hinge':
        l = loss('hinge', plain, beta=beta)
    elif kind == 'ipo':
        l = loss('ipo', plain, beta=beta, average=True)
    elif kind == 'sigmoid' and e:
        note('label_smoothing with cpo: ours has none; compared with cdpo without a reference')
        l = loss('cdpo', plain, beta=beta, label_smoothing=e)
    elif kind == 'sigmoid':
        note(
            "cpo: TRL's NLL is cpo_alpha times the token mean of the batch, ours per token of an answer; made equal by n_w"
        )
        mean = c['n_w'].to(c['pi_w'].dtype).mean() / alpha if alpha else torch.tensor(math.inf)
        full = loss('cpo', plain | {'n_w': mean.expand_as(c['pi_w'])}, beta=beta)
        l, extra = full + c['pi_w'] / mean, -(c['pi_w'] / mean).mean()
        assert torch.allclose(step(full), step(l) + alpha * nll)
    else:
        raise Skip(f'{kind} is not among the losses here')
    ours = {'losses': l, 'scalar': step(l) + extra, 'nll_loss': nll if alpha else 0.0}
    ours |= {'chosen_logps': plain['pi_w'] / plain['n_w'], 'rejected_logps': plain['pi_l'] / plain['n_l']}
    yield gold, x, ours | rewards(plain, ref=False, n=True, beta=beta)


def trl_orpo(case, note):
    gold, x, h = open_case(case, note)
    c, nll = columns(x) if 'policy_logits' not in x else columns_from_logits(x), 0.0
    note("orpo: TRL's losses are the negative odds-ratio term; ours includes the NLL per token, taken off for this")
    odds_ratio = loss('orpo', c, lam=h['beta']) - losses.sft(c['pi_w'], c['n_w'])
    if 'policy_logits' in x:
        note("orpo from logits: TRL's NLL is a token mean over prompt and answer, added outside the formula")
        everything = torch.where(x['attention_mask'] == 1, x['input_ids'], -100)
        (sums,), n = from_logits(x, labels=everything)
        half = len(n) // 2
        nll = step(losses.sft(sums[:half], n[:half]), n[:half])
    ours = {'losses': -odds_ratio, 'scalar': step(odds_ratio) + nll, 'nll_loss': nll}
    ours |= {'chosen_logps': c['pi_w'] / c['n_w'], 'rejected_logps': c['pi_l'] / c['n_l']}
    yield gold, x, ours | rewards(c, ref=False, n=True, beta=h['beta'])


def kto(case, note):
    gold, x, h = open_case(case, note)
    c, group = columns(x), case['group']
    c |= {k: torch.cat((c[f'{k}_w'], c[f'{k}_l'])) for k in ('pi', 'ref')}
    c['good'] = torch.arange(len(c['pi'])) < len(c['pi_w'])
    ratios = [x[f'policy_{side}_KL_logps'] - x[f'reference_{side}_KL_logps'] for side in ('chosen', 'rejected')]
    ratios = torch.cat([r for r in ratios if r.ndim == 2])  # (rows, tokens); an empty side has one dimension
    zero, ours = group == 'radpo_kto_zero' or h.get('loss_type') == 'apo_zero_unpaired', {}
    if h.get('tokenwise_KL'):
        note("tokenwise_KL: the original's baseline, a maximum over tokens a row, goes in as z")
        c['z'] = ratios.max(1).values.clamp(min=0)
    elif not zero:
        sums = ratios.sum(1)
        c['z'] = losses.STATISTICS['kto'](sums, {}, None)[0]['z']
        counted = int((sums != 0).sum())
        if group == 'halos_kto' and counted < len(sums):
            note(
                "halos_kto: the original's mean leaves out KL rows whose log-ratio is 0; ours times rows / rows counted"
            )
            c['z'] = c['z'] * len(sums) / max(1, counted)
        ours['KL'] = c['z'][0]
    weights = {'w_good': h['desirable_weight'], 'w_bad': h['undesirable_weight']}
    l = loss('kto_zero' if zero else 'kto', c, beta=h['beta'], **weights)
    scale = {'beta': h['beta'] if group == 'trl_kto' else 1.0}  # HALOs and Ra-DPO log the bare log-ratio
    yield gold, x, {'losses': l, 'scalar': reduced(case, l), **ours, **rewards(c, **scale)}


def halos_per_token(case, note):
    """HALOs' IPO and SimPO: means over the tokens whose log-ratio, or log-prob, is not exactly 0."""
    gold, x, h = open_case(case, note)
    c, ipo = columns(x), case['group'] == 'halos_ipo'
    if not case.get('do_not_copy'):
        for side, s in (('chosen', 'w'), ('rejected', 'l')):
            value = x[f'policy_{side}_logps'] - (x[f'reference_{side}_logps'] if ipo else 0.0)
            n = (value * x[f'{side}_mask'] != 0).sum(1)
            if not n.equal(c[f'n_{s}'].long()):
                note(
                    'per-token means: the original does not count tokens whose value is exactly 0; its counts go in as n'
                )
            c[f'n_{s}'] = n
    if ipo:
        l = loss('ipo', c, beta=h['tau'], average=True)
    else:
        l = loss('simpo', c, beta=h['beta'], gamma=h['beta'] * h['gamma_beta_ratio'])
    yield gold, x, {'losses': l, 'scalar': step(l), **rewards(c, ref=ipo, n=True, beta=1.0)}


def slic(case, note):
    gold, x, h = open_case(case, note)
    c = columns(x)
    l = loss('slic', c, delta=h['beta'], lam=h['lambda_coef'])
    ours = {'losses': l, 'scalar': reduced(case, l)} | rewards(c, ref=False)
    if case['group'] == 'radpo_slic':
        note("radpo_slic: the original's rewards are log-probs of tokens; ours, their sums, not compared")
        del ours['chosen_rewards'], ours['rejected_rewards']
    yield gold, x, ours


def seq_logps(case, note):
    gold, x, h = open_case(case, note)
    (sums,), n = from_logits(x)
    logps = sums / n if h['average'] else sums
    yield gold, x, {'logps': logps, 'scalar': logps.sum()}


def sft_from_logits(case, note):
    gold, x, _ = open_case(case, note)
    (sums,), n = from_logits(x)
    half = len(n) // 2
    pi, n = sums[:half], n[:half]
    if case['group'] == 'e2e_sft':
        note("e2e_sft: the original's loss is a sum per answer (n = 1); ours, a token mean, is e2e_sft_tokenmean")
        l = losses.sft(pi, torch.ones_like(pi))
        yield gold, x, {'losses': l, 'scalar': step(l)}
    else:
        yield gold, x, {'scalar': step(losses.sft(pi, n), n)}


def tdpo(case, note):
    """TDPO and Ra-DPO with the risk of its published code, from logits."""
    gold, x, h = open_case(case, note)
    if h.get('is_cal_risk_distribution_logps'):
        raise Skip('log-probs replaced by their quantiles are not log-probs: not among the losses here')
    divergence = model.kl
    if 'confidence_level' in h:
        parts = 2 if h['is_split_risk_ratio'] else 1
        divergence = partial(model.RISKS['released'], mu=h['confidence_level'], parts=parts)
    second = h.get('if_tdpo2') or h.get('if_ra_dpo2')
    c, kl = columns_from_logits(x, divergence), columns_from_logits(x, model.kl)
    name = ('radpo' if 'confidence_level' in h else 'tdpo') + ('2' if second else '1')
    l = loss(name, c, beta=h['beta'], **({'alpha': h['alpha']} if second else {}))
    if second:
        note("version 2: the original's rewards have no alpha; ours compared with alpha = 1")
    ours = {'losses': l, 'scalar': reduced(case, l), **rewards(c, div=True, beta=h['beta'])}
    for side, s in (('chosen', 'w'), ('rejected', 'l')):
        ours[f'{side}_logps_margin'] = c[f'pi_{s}'] - c[f'ref_{s}']
        ours |= {f'{side}_position_kl': kl[f'div_{s}'], f'{side}_position_risk': c[f'div_{s}']}
    yield gold, x, ours


def ppo(case, note):
    """Whole PPO steps of HALOs and Ra-DPO: advantages from rewards and old values, policy and value loss."""
    gold, x, h = open_case(case, note)
    mask, out = x['mask'].bool(), gold['outputs']
    raw = formulas.gae(x['rewards'], x['old_values'], mask, gamma=h['gamma'], lam=h['lam'])
    to_go = formulas.gae(x['rewards'], x['old_values'], mask, gamma=h['gamma'], lam=1.0) + x['old_values'] * mask
    ours = {'advantages': formulas.whiten(raw, mask), 'returns': raw + x['old_values'] * mask}
    pi, old, value, old_value = (x[k][mask] for k in ('new_logps', 'old_logps', 'new_values', 'old_values'))
    advantage, target = ours['advantages'][mask], to_go[mask]
    if case['group'] == 'radpo_ppo':
        note('radpo_ppo: their clip to [c, 1/c] applied outside the formula; their value target lacks its own reward')
        rho, c = (pi - old).exp(), h['cliprange']
        policy = torch.max(-advantage * rho, -advantage * rho.clamp(c, 1 / c))
        target, sign = torch.tensor(numbers(out['discounted_future_rewards']), dtype=pi.dtype)[mask], -1
    else:
        ours['discounted_future_rewards'], sign = to_go, 1
        policy = formulas.ppo(pi, old, advantage, clip=h['cliprange'])
    note('ppo: their KL term, +-mean(new - old), is no penalty; added outside the formula with their sign')
    ours['policy_loss'] = step(policy)
    ours['critic_loss'] = step(formulas.value_loss(value, old_value, target, value_clip=math.inf))
    kl = sign * step(pi - old)
    ours['scalar'] = ours['policy_loss'] + h['critic_coef'] * ours['critic_loss'] + h['KL_coef'] * kl
    yield gold, x, ours


def grpo(case, note):
    gold, x, h = open_case(case, note)
    if h.get('humanline'):
        raise Skip('humanline clamping of token ratios is not among the losses here')
    mask = x['mask'].bool()
    advantage = torch.zeros_like(x['scores'])
    for name in set(GOLDEN['inputs'][case['input']]['prompt_id']):
        rows = torch.tensor([name == other for other in GOLDEN['inputs'][case['input']]['prompt_id']])
        advantage[rows] = formulas.group_advantage(x['scores'][None, rows], eps=0.01)[0]
    note('halos_grpo: the ratio is against the reference there, so the reference is passed as the old policy, too')
    pi, ref, a = x['policy_logps'][mask], x['reference_logps'][mask], advantage[:, None].expand_as(mask)[mask]
    l = formulas.grpo(pi, ref, ref, a, clip=h['epsilon'], kl_coef=h['beta'])
    yield gold, x, {'scalar': step(l), 'advantages': advantage, 'KL': step(formulas.kl_penalty(pi, ref))}


CHECKS = {
    **dict.fromkeys(('dpo', 'dpo_reference_free', 'cdpo', 'ipo', 'dr_dpo', 'e2e_dpo'), dpo_family),
    **dict.fromkeys(('halos_dpo', 'halos_cdpo', 'radpo_dpo', 'radpo_cdpo'), dpo_family),
    **dict.fromkeys(('rlaif_reward_model', 'halos_bradley_terry', 'trl_reward'), reward_model),
    **dict.fromkeys(('trl_multi', 'trl_sft', *(f'trl_{kind}' for kind in TRL)), trl_dpo),
    **dict.fromkeys(('trl_simpo', 'trl_cpo', 'e2e_cpo'), trl_simpo_and_cpo),
    **dict.fromkeys(('trl_orpo', 'e2e_orpo'), trl_orpo),
    **dict.fromkeys(('trl_kto', 'halos_kto', 'radpo_kto', 'radpo_kto_zero'), kto),
    **dict.fromkeys(('halos_ipo', 'halos_simpo'), halos_per_token),
    **dict.fromkeys(('radpo_slic', 'halos_slic'), slic),
    **dict.fromkeys(('e2e_sft', 'e2e_sft_tokenmean'), sft_from_logits),
    **dict.fromkeys(('tdpo', 'radpo_tdpo', 'ra_dpo'), tdpo),
    'rlaif_dpo': rlaif_dpo,
    **dict.fromkeys(('halos_ppo', 'radpo_ppo'), ppo),
    'halos_grpo': grpo,
    'beta_dpo': beta_dpo,
    'seq_logps': seq_logps,
}
SKIPPED = {
    'trl_fdpo': 'f-divergences are not among the losses here',
    'trl_ld_dpo': 'weights of the tokens beyond the shorter answer are not among the losses here',
    'trl_wpo': "WPO's weights are not among the losses here",
    'trl_aot_unpaired': 'AOT here is the paired one',
    'halos_dpo_humanline': 'humanline clamping of token ratios is not among the losses here',
    'ra_dpo_cal_risk': 'log-probs replaced by their quantiles are not log-probs: no correct result exists',
}


# ---- comparing ----


def differences(case, note):
    """Sentences about what does not agree in a case."""
    found = []
    tolerance = 1e-5 if case.get('dtype') == 'float32' else 1e-9
    for gold, x, ours in CHECKS[case['group']](case, note):
        pairs = {k: (ours[k], v) for k, v in gold['outputs'].items() if k in ours}
        assert 'scalar' in pairs, 'a case without a scalar cannot be checked'
        if 'gradient_depends_on_rounding' in case.get('flags', []):
            note('cases whose gradient depends on rounding (policy = reference): values only')
        else:
            wanted = gold.get('grads', {})
            slopes = torch.autograd.grad(
                ours.get('gradient_of', ours['scalar']),
                [x[k] for k in wanted],
                allow_unused=True,
                materialize_grads=True,
            )
            pairs |= {f'gradient of {k}': (mine, wanted[k]) for k, mine in zip(wanted, slopes, strict=True)}
        for name, (mine, theirs) in pairs.items():
            mine = torch.as_tensor(mine, dtype=torch.float64).detach()
            theirs = torch.tensor(numbers(theirs), dtype=torch.float64)
            if mine.shape != theirs.shape:
                found.append(f'{case["id"]} {name}: shape {tuple(mine.shape)} against {tuple(theirs.shape)}')
                continue
            near = (mine - theirs).abs() <= tolerance * theirs.abs().clamp(min=1)
            near |= (mine == theirs) | theirs.isnan()  # infinities; a NaN of theirs says nothing
            if not near.all():
                found.append(f'{case["id"]} {name}: {mine[~near][:3].tolist()} against {theirs[~near][:3].tolist()}')
    return found


def cases(group):
    return [case | {'group': group} for case in GOLDEN['groups'][group]['cases']]


REPORT = defaultdict(lambda: {'checked': 0, 'skipped': Counter(), 'notes': set()})


@pytest.fixture(scope='module', autouse=True)
def table(request):
    """Prints what was compared, even though pytest captures output."""
    yield
    lines = [f'\n\ngolden vectors: {PATH.name}', f'{"group":22} checked skipped']
    for group, row in REPORT.items():
        reasons = '; '.join(row['skipped'])
        lines.append(f'{group:22} {row["checked"]:7} {row["skipped"].total():7}  {reasons}'.rstrip())
    checked, skipped = sum(r['checked'] for r in REPORT.values()), sum(r['skipped'].total() for r in REPORT.values())
    lines.append(f'{"all":22} {checked:7} {skipped:7}\nnotes')
    lines += [f'  {line}' for line in sorted(set().union(*(row['notes'] for row in REPORT.values())))]
    with request.config.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled():
        print('\n'.join(lines))


@pytest.mark.parametrize('group', GOLDEN['groups'])
def test_group(group):
    row, found = REPORT[group], []
    for case in cases(group):
        try:
            if group not in CHECKS:
                raise Skip(SKIPPED.get(group, 'unknown group'))
            found += differences(case, row['notes'].add)
            row['checked'] += 1
        except Skip as reason:
            row['skipped'][str(reason)] += 1
    assert not found, '\n'.join(found[:10])
    if not row['checked']:
        pytest.skip('; '.join(row['skipped']) or 'no cases')


def shifted(x, by):
    """x with its first finite number moved, and whether there was one."""
    if not isinstance(x, list):
        return (x + by * max(1.0, abs(x)), True) if math.isfinite(float(x)) else (x, False)
    for i, y in enumerate(x):
        y, done = shifted(y, by)
        if done:
            return x[:i] + [y] + x[i + 1 :], True
    return x, False


def silent(note):
    """For checks whose notes are not wanted in the table."""


def compared(group):
    """The cases of a group that are not skipped."""
    for case in cases(group):
        try:
            differences(case, silent)
        except Skip:
            continue
        yield case


@pytest.mark.parametrize('group', [group for group in GOLDEN['groups'] if group in CHECKS])
def test_a_wrong_number_is_noticed(group):
    """Whatever is compared can fail: the scalar, the losses and every gradient of a case, moved by 1e-6, must."""
    case = next(compared(group), None)
    if case is None:
        pytest.skip('nothing is compared in this group')
    by = 1e-3 if case.get('dtype') == 'float32' else 1e-6
    rounding = 'gradient_depends_on_rounding' in case.get('flags', [])
    moved = 0
    for kind, key in (('outputs', 'scalar'), ('outputs', 'losses'), *(('grads', k) for k in gold_of(case)['grads'])):
        wrong = copy.deepcopy(case)
        numbers_of_kind = gold_of(wrong)[kind]
        if key in numbers_of_kind and not (rounding and kind == 'grads'):
            numbers_of_kind[key], done = shifted(numbers_of_kind[key], by)
            moved += done
            assert differences(wrong, silent) or not done, f'{case["id"]}: a wrong {kind} {key} went unnoticed'
    assert moved


def gold_of(case):
    """The part of a case that holds the numbers to compare with; of a sequence, its last step."""
    return case['steps'][-1] if 'steps' in case else case['clean'] if case.get('do_not_copy') else case


def test_small_file_has_every_loss(monkeypatch):
    """The committed subset agrees too, and takes every checked group and every loss (dpop has no original code in it)."""
    monkeypatch.setattr(sys.modules[__name__], 'GOLDEN', json.loads(SMALL.read_text()))
    USED.clear()
    found = [text for group in CHECKS for case in cases(group) for text in differences(case, silent)]
    assert not found, '\n'.join(found[:10])
    assert set(losses.LOSSES) - USED == {'dpop'}
    assert SMALL.stat().st_size <= 200_000
