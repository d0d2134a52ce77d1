"""The losses against golden vectors: numbers from the original authors' code, with its gradients.

$GOLDEN names a file of them; by default the full set beside the repository if it is there, else golden_small.json here.
A group of the file is either checked by its function in CHECKS or skipped for a reason.
Values, losses of single examples, implicit rewards and gradients agree to 1e-9 max(1, |golden|), float32 cases to 1e-5.
Nothing depends on how many cases there are or on their numbers: the hyper-parameters of a case say what it is.

The originals hand the mean, sum or log-mean-exp of a microbatch to backward; here a step is sum_i w_i l_i / sum_i w_i.
Where theirs is another reduction it is applied outside the formula. Other departures are comments.
"""

import contextlib
import copy
import inspect
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import LOSSES, with_ratios

import losses
import model
from rl import divergences, formulas

HERE = Path(__file__).resolve().parent
SMALL, FULL = HERE / 'golden_small.json', HERE.parents[2] / 'shared/golden/losses_golden.json'
PATH = Path(os.environ.get('GOLDEN') or (FULL if FULL.exists() else SMALL))
GOLDEN = json.loads(PATH.read_text())
USED = set()  # names of losses.LOSSES that some case went through


# what is not among the losses here: groups of the file, and options of cases
SKIPPED = {
    'trl_fdpo': 'f-divergences', 'trl_ld_dpo': 'weights of the tokens beyond the shorter answer', 'trl_wpo': "WPO's weights",
    'trl_aot_unpaired': 'unpaired AOT', 'halos_dpo_humanline': 'humanline clamping of token ratios',
    'ra_dpo_cal_risk': 'log-probs replaced by their quantiles, which are not log-probs',
    'humanline': 'humanline clamping of token ratios',
    'is_cal_risk_distribution_logps': 'log-probs replaced by their quantiles, which are not log-probs', 'use_weighting': "WPO's weights",
}  # fmt: skip


class Skip(Exception):
    """This case is not compared: the message says what is not among the losses here."""


# ---- reading a case ----


def numbers(x):
    """Nested lists of numbers and of 'NaN', 'Infinity', '-Infinity' -> the same with floats."""
    return [numbers(y) for y in x] if isinstance(x, list) else float(x)


def tensor(x, dtype=torch.float64):
    return torch.tensor(numbers(x), dtype=dtype)


def read(case, arrays, leaves):
    """Input arrays of a case -> tensors, of which the leaves require gradients; token ids and labels stay integers."""
    real = torch.float32 if case.get('dtype') == 'float32' else torch.float64
    kinds = {name: torch.long for name in ('labels', 'input_ids', 'attention_mask')}
    arrays = {name: value for name, value in arrays.items() if name != 'prompt_id'}
    return {name: tensor(value, kinds.get(name, real)).requires_grad_(name in leaves) for name, value in arrays.items()}


def open_case(case):
    """(what to compare with, input tensors, hyper-parameters). Where the original is wrong or undefined: the case's clean block."""
    gold, h = case, case['hyper']
    if case.get('do_not_copy'):
        if 'clean' not in case:
            raise Skip('a formula that the authors do not call for: their result is wrong and has no clean counterpart')
        gold = case['clean']
    for name in SKIPPED:
        if h.get(name):
            raise Skip(SKIPPED[name])
    return gold, read(case, GOLDEN['inputs'][case['input']], gold.get('grads', {})), h


SIDES = {'chosen': 'w', 'rejected': 'l'}


def columns(x):
    """Input tensors -> pi_w, ref_l, n_w and so on: sums of token log-probs under masks, or over the labels of logits."""
    if 'policy_logits' in x:
        return columns_from_logits(x)
    c = {}
    for side, s in SIDES.items():
        mask = x.get(f'{side}_mask', torch.empty(0))
        for who, p in (('policy', 'pi'), ('reference', 'ref')):
            if (value := x.get(f'{who}_{side}_logps')) is not None:
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
    reference = (x['reference_logits'][:, :-1][keep], eye, None) if divergence else None
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
    return fn(**{p: c[p] for p in inspect.signature(fn).parameters if p in c}, **keywords)


def step(l, w=1.0):
    """The project's reduction of a step."""
    w = torch.ones_like(l) * w
    return (w * l).sum() / w.sum()


def no_reference(c):
    return c | {'ref_w': torch.zeros_like(c['pi_w']), 'ref_l': torch.zeros_like(c['pi_l'])}


def compared_losses(case, l):
    """Losses, and the original's scalar: the trainers of Ra-DPO sum over the microbatch, all others average."""
    return {'losses': l, 'scalar': step(l) * (len(l) if case['group'].startswith(('radpo_', 'ra_dpo')) else 1)}


def rewards(c, *, ref=True, n=False, div=False, **keywords):
    """Implicit rewards of both sides, under the names of the golden outputs."""
    found = {}
    for side, s in SIDES.items():
        ratio = c[f'pi_{s}'] - c[f'ref_{s}'] if ref else c[f'pi_{s}']
        per, divergence = c[f'n_{s}'] if n else 1.0, c[f'div_{s}'] if div else 0.0
        found[f'{side}_rewards'] = losses.reward(ratio, per, divergence, **keywords)
    return found


# ---- one function per family of originals: (case, inputs, hyper-parameters) -> what to compare ----


def dpo_family(case, x, h):
    """DPO's own code, its forks, dpo-rlaif, and the DPO and cDPO of HALOs and Ra-DPO; IPO of sums, Dr. DPO."""
    c, beta, ipo = columns(x), h['beta'], h.get('ipo') or h.get('name') == 'ipo'
    e = h.get('label_smoothing', h.get('epsilon', h.get('robust_eps', 0.0)))
    ours = {'policy_chosen_logps': c['pi_w'], 'policy_rejected_logps': c['pi_l']}
    if h.get('reference_free'):  # the original's rewards still use the reference, ours do not; rewards not compared
        c = no_reference(c)
    else:
        ours |= rewards(c, beta=beta)
    if ipo:
        l = loss('ipo', c, beta=beta, average=False)
    elif e or 'beta_prime' in h:
        l = loss('drdpo' if 'beta_prime' in h else 'cdpo', c, beta=beta, label_smoothing=e)
    else:
        l = loss('dpo', c, beta=beta)
    if h.get('robust_eps') and not ipo:  # the original is cDPO divided by beta
        l = l / beta
    if h.get('importance_correction') and not ipo:  # without an upper limit
        l = l * losses.importance(c['pi_l'] - c['ref_l'], importance_max=math.inf)
    if h.get('sft_reg'):  # of the summed log-prob, ours of the mean per token: checked with n = 1
        l = l + h['sft_reg'] * losses.sft(c['pi_w'], torch.ones_like(c['pi_w']))
    ours |= compared_losses(case, l)
    if 'beta_prime' in h and h.get('mode_loss') != 'mean':
        b, fixed = h['beta_prime'], l.detach()
        # scalar: Dr. DPO's log-mean-exp outside the formula; gradient: our weighted mean, whose value differs
        ours['scalar'] = -b * (torch.logsumexp(-l / b, 0) - math.log(len(l)))
        ours['gradient_of'] = step(l, losses.drdpo_weight(fixed, fixed.min(), beta_prime=b))
    return ours


def beta_dpo(case):
    h = case['hyper']
    if h.get('momentum', 0.9) != 0.9 or h.get('beta_min', 1e-3) != 1e-3:
        raise Skip('another momentum than 0.9, or another floor than 1e-3')
    # the stored masks are injected, and the state starts at the zeros of the original: ours starts at the first step
    state = {'mean': float(h.get('initial_mean', 0)), 'std': float(h.get('initial_std', 0))}
    for gold in case['steps']:
        x, out = read(case, gold['inputs'], gold['grads']), gold['outputs']
        c = columns(x)
        ratios = [(c[f'pi_{s}'] - c[f'ref_{s}']).detach() for s in 'wl']
        mask = tensor(out['keep_mask']) != 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, 'rand', lambda shape, **_: torch.full(shape, 0.5, dtype=torch.float64))
            d, mean, std = ratios[0] - ratios[1], out['gap_mean'], out['gap_std']
            likely = losses.keep_near(d, mean, std, None, rho=1 - mask.double().mean().item())
            patch.setattr(losses, 'keep_near', lambda *args, mask=mask, **keywords: mask)
            options = {'beta': h['beta'], 'a': h['a'], 'rho': h['filter_ratio']}
            values, state = losses.STATISTICS['beta_dpo'](*ratios, state, None, **options)
        weights = tensor(out['sampling_weights'])
        assert likely.all() or weights[likely].min() >= weights[~likely].max()  # equal noise keeps the likeliest pairs
        l = loss('beta_dpo', c, beta=values['beta'])
        ours = {'losses': l, 'scalar': step(l, values['weight']), 'beta_used': values['beta'][0]}
        ours |= {'gap_mean': state['mean'], 'gap_std': state['std']} | rewards(c, beta=h['beta'])
        yield gold, x, ours


def reward_model(case, x, h):
    margin = x['margin'] if h.get('use_margin') else torch.zeros_like(x['chosen_scores'])
    coef = h.get('center_rewards_coefficient') or 0.0
    l = formulas.bradley_terry(x['chosen_scores'], x['rejected_scores'], margin, center_coef=coef)
    return compared_losses(case, l)


# fmt: off
TRL = {  # loss_type -> (our name, its hyper-parameters beside beta: name here -> name there)
    'sigmoid': ('dpo', {}), 'hinge': ('hinge', {}), 'ipo': ('ipo', {}), 'robust': ('robust', {'label_smoothing': 'label_smoothing'}),
    'exo_pair': ('exo', {'label_smoothing': 'label_smoothing'}), 'nca_pair': ('nca', {}), 'bco_pair': ('bco', {}),
    'sppo_hard': ('sppo', {}), 'aot': ('aot', {'label_smoothing': 'label_smoothing'}), 'apo_zero': ('apo_zero', {}),
    'apo_down': ('apo_down', {}), 'discopop': ('discopop', {'tau': 'discopop_tau'}), 'sigmoid_norm': ('sigmoid_norm', {}),
}
# fmt: on
AVERAGE = {'ipo': {'average': True}}


def trl_dpo(case, x, h):
    """TRL's DPOTrainer: one loss type, or a weighted sum of several."""
    if h.get('f_divergence_type', 'reverse_kl') != 'reverse_kl' or h.get('ld_alpha') is not None:
        raise Skip('f-divergences and length-desensitised sums')
    c, scalar = columns(x), 0.0
    kinds = h['loss_type'] if isinstance(h['loss_type'], list) else [h['loss_type']]
    for kind, weight in zip(kinds, h.get('loss_weights') or [1.0] * len(kinds), strict=True):
        if kind == 'sft':
            # sft: TRL repeats the token mean of the batch in every row; ours is the mean weighted by tokens
            value = step(losses.sft(c['pi_w'], c['n_w']), c['n_w'])
            l = value.expand_as(c['pi_w'])
        elif kind in TRL:
            name, taken = TRL[kind]
            keywords = {ours: h[theirs] for ours, theirs in taken.items()} | AVERAGE.get(kind, {})
            fixed = {k: v.detach() for k, v in with_ratios(c).items()}
            four = [fixed[k] for k in ('pi_w', 'pi_l', 'ratio_w', 'ratio_l')]
            given = losses.STATISTICS['aot'](*four, {}, None)[0] if kind == 'aot' else {}
            l = loss(name, c | given, beta=h['beta'], **keywords)
            value = step(l)
            l = l[(four[0] - four[1]).argsort()] if kind == 'aot' else l  # TRL's rows come sorted
        else:
            raise Skip(kind)
        scalar = scalar + weight * value
    ours = {'scalar': scalar, 'losses': l}
    # of ipo and sigmoid_norm, TRL's rewards are summed over tokens, ours are per token as the loss; not compared
    return ours if {'ipo', 'sigmoid_norm'} & set(kinds) else ours | rewards(c, beta=h['beta'])


def trl_simpo_and_cpo(case, x, h):
    """TRL's CPOTrainer, on log-probs or from logits."""
    if h.get('alpha'):
        raise Skip("AlphaPO's transformed rewards")
    kind, beta, e, alpha = h['loss_type'], h['beta'], h.get('label_smoothing', 0.0), h.get('cpo_alpha', 0.0)
    c = columns(x)
    nll = step(losses.sft(c['pi_w'], c['n_w']), c['n_w'])
    plain, extra = no_reference(c), alpha * nll
    # without logits the log-probs are what the loss takes, means or sums
    if kind not in ('simpo', 'ipo') or 'policy_logits' not in x:
        plain |= {'n_w': torch.ones_like(c['pi_w']), 'n_l': torch.ones_like(c['pi_l'])}
    if kind == 'simpo':
        gamma = h['simpo_gamma']
        l = loss('simpo', plain, beta=beta, gamma=gamma)
        if e:  # ours has no label_smoothing: the smoothed half is simpo with the answers exchanged
            exchanged = {'pi_w': plain['pi_l'], 'pi_l': plain['pi_w'], 'n_w': plain['n_l'], 'n_l': plain['n_w']}
            l = (1 - e) * l + e * loss('simpo', exchanged, beta=beta, gamma=-gamma)
    elif kind in ('hinge', 'ipo'):
        l = loss(kind, plain, beta=beta, **AVERAGE.get(kind, {}))
    elif kind == 'sigmoid' and e:  # cpo with label_smoothing, which ours has not: cdpo without a reference
        l = loss('cdpo', plain, beta=beta, label_smoothing=e)
    elif kind == 'sigmoid':
        # cpo: TRL's NLL is cpo_alpha times the token mean of the batch, ours per token of an answer; made equal by n_w
        mean = c['n_w'].to(c['pi_w'].dtype).mean() / alpha if alpha else torch.tensor(math.inf)
        full = loss('cpo', plain | {'n_w': mean.expand_as(c['pi_w'])}, beta=beta)
        l, extra = full + c['pi_w'] / mean, -(c['pi_w'] / mean).mean()
        assert torch.allclose(step(full), step(l) + alpha * nll)
    else:
        raise Skip(kind)
    ours = {'losses': l, 'scalar': step(l) + extra, 'nll_loss': nll if alpha else 0.0}
    ours |= {'chosen_logps': plain['pi_w'] / plain['n_w'], 'rejected_logps': plain['pi_l'] / plain['n_l']}
    return ours | rewards(plain, ref=False, n=True, beta=beta)


def trl_orpo(case, x, h):
    c, nll = columns(x), 0.0
    # orpo: TRL's losses are the negative odds-ratio term; ours includes the NLL per token, taken off for this
    odds_ratio = loss('orpo', c, lam=h['beta']) - losses.sft(c['pi_w'], c['n_w'])
    if 'policy_logits' in x:
        # orpo from logits: TRL's NLL is a token mean over prompt and answer, added outside the formula
        everything = torch.where(x['attention_mask'] == 1, x['input_ids'], -100)
        (sums,), n = from_logits(x, labels=everything)
        half = len(n) // 2
        nll = step(losses.sft(sums[:half], n[:half]), n[:half])
    ours = {'losses': -odds_ratio, 'scalar': step(odds_ratio) + nll, 'nll_loss': nll}
    ours |= {'chosen_logps': c['pi_w'] / c['n_w'], 'rejected_logps': c['pi_l'] / c['n_l']}
    return ours | rewards(c, ref=False, n=True, beta=h['beta'])


def kto(case, x, h):
    c, group = columns(x), case['group']
    c |= {k: torch.cat((c[f'{k}_w'], c[f'{k}_l'])) for k in ('pi', 'ref')}
    c['good'] = torch.arange(len(c['pi'])) < len(c['pi_w'])
    ratios = [x[f'policy_{side}_KL_logps'] - x[f'reference_{side}_KL_logps'] for side in ('chosen', 'rejected')]
    ratios = torch.cat([r for r in ratios if r.ndim == 2])  # (rows, tokens); an empty side has one dimension
    zero, ours = group == 'radpo_kto_zero' or h.get('loss_type') == 'apo_zero_unpaired', {}
    if h.get('tokenwise_KL'):
        # tokenwise_KL: the original's baseline, a maximum over tokens a row, goes in as z
        c['z'] = ratios.max(1).values.clamp(min=0)
    elif not zero:
        sums = ratios.sum(1)
        c['z'] = losses.STATISTICS['kto'](sums, {}, None)[0]['z']
        counted = int((sums != 0).sum())
        if group == 'halos_kto' and counted < len(sums):
            # halos_kto: the original's mean leaves out KL rows whose log-ratio is 0; ours times rows / rows counted
            c['z'] = c['z'] * len(sums) / max(1, counted)
        ours['KL'] = c['z'][0]
    weights = {'w_good': h['desirable_weight'], 'w_bad': h['undesirable_weight']}
    l = loss('kto_zero' if zero else 'kto', c, beta=h['beta'], **weights)
    scale = {'beta': h['beta'] if group == 'trl_kto' else 1.0}  # HALOs and Ra-DPO log the bare log-ratio
    return {**compared_losses(case, l), **ours, **rewards(c, **scale)}


def halos_per_token(case, x, h):
    """HALOs' IPO and SimPO: means over the tokens whose log-ratio, or log-prob, is not exactly 0; these counts go in as n."""
    c, ipo = columns(x), case['group'] == 'halos_ipo'
    if not case.get('do_not_copy'):
        for side, s in SIDES.items():
            value = x[f'policy_{side}_logps'] - (x[f'reference_{side}_logps'] if ipo else 0.0)
            c[f'n_{s}'] = (value * x[f'{side}_mask'] != 0).sum(1)
    if ipo:
        l = loss('ipo', c, beta=h['tau'], average=True)
    else:
        l = loss('simpo', c, beta=h['beta'], gamma=h['beta'] * h['gamma_beta_ratio'])
    return {**compared_losses(case, l), **rewards(c, ref=ipo, n=True, beta=1.0)}


def slic(case, x, h):
    c = columns(x)
    l = loss('slic', c, delta=h['beta'], lam=h['lambda_coef'])
    ours = compared_losses(case, l) | rewards(c, ref=False)
    if case['group'] == 'radpo_slic':
        # radpo_slic: the original's rewards are log-probs of tokens; ours, their sums, not compared
        del ours['chosen_rewards'], ours['rejected_rewards']
    return ours


def seq_logps(case, x, h):
    (sums,), n = from_logits(x)
    logps = sums / n if h['average'] else sums
    return {'logps': logps, 'scalar': logps.sum()}


def sft_from_logits(case, x, h):
    (sums,), n = from_logits(x)
    half = len(n) // 2
    pi, n = sums[:half], n[:half]
    # the original's loss is a sum per answer (n = 1); ours, a token mean, is e2e_sft_tokenmean
    if case['group'] == 'e2e_sft':
        return compared_losses(case, losses.sft(pi, torch.ones_like(pi)))
    return {'scalar': step(losses.sft(pi, n), n)}


def tdpo(case, x, h):
    """TDPO and Ra-DPO with the risk of its published code, from logits."""
    divergence = divergences.kl
    if 'confidence_level' in h:
        parts = 2 if h['is_split_risk_ratio'] else 1
        divergence = divergences.released(h['confidence_level'], parts)
    second = h.get('if_tdpo2') or h.get('if_ra_dpo2')
    c, kl = columns_from_logits(x, divergence), columns_from_logits(x, divergences.kl)
    name = ('radpo' if 'confidence_level' in h else 'tdpo') + ('2' if second else '1')
    l = loss(name, c, beta=h['beta'], **({'alpha': h['alpha']} if second else {}))
    # the original's rewards have no alpha, in version 2 neither; ours compared with alpha = 1
    ours = {**compared_losses(case, l), **rewards(c, div=True, beta=h['beta'])}
    for side, s in SIDES.items():
        ours[f'{side}_logps_margin'] = c[f'pi_{s}'] - c[f'ref_{s}']
        ours |= {f'{side}_position_kl': kl[f'div_{s}'], f'{side}_position_risk': c[f'div_{s}']}
    return ours


def gold_of(case):
    """The part of a case that holds the numbers to compare with; of a sequence, its last step."""
    return case['steps'][-1] if 'steps' in case else case['clean'] if case.get('do_not_copy') else case


def ppo(case, x, h):
    """Whole PPO steps of HALOs and Ra-DPO: advantages from rewards and old values, policy and value loss."""
    mask, out = x['mask'].bool(), gold_of(case)['outputs']
    raw = formulas.gae(x['rewards'], x['old_values'], mask, gamma=h['gamma'], lam=h['lam'])
    to_go = formulas.gae(x['rewards'], x['old_values'], mask, gamma=h['gamma'], lam=1.0) + x['old_values'] * mask
    ours = {'advantages': formulas.whiten(raw, mask), 'returns': raw + x['old_values'] * mask}
    pi, old, value, old_value = (x[k][mask] for k in ('new_logps', 'old_logps', 'new_values', 'old_values'))
    advantage, target = ours['advantages'][mask], to_go[mask]
    if case['group'] == 'radpo_ppo':
        # radpo_ppo: their clip to [c, 1/c] applied outside the formula; their value target lacks its own reward
        rho, c = (pi - old).exp(), h['cliprange']
        policy = torch.max(-advantage * rho, -advantage * rho.clamp(c, 1 / c))
        target, sign = tensor(out['discounted_future_rewards'], pi.dtype)[mask], -1
    else:
        ours['discounted_future_rewards'], sign = to_go, 1
        policy = formulas.ppo(pi, old, advantage, clip=h['cliprange'])
    # ppo: their KL term, +-mean(new - old), is no penalty; added outside the formula with their sign
    ours['policy_loss'] = step(policy)
    ours['critic_loss'] = step(formulas.value_loss(value, old_value, target, value_clip=math.inf))
    kl = sign * step(pi - old)
    ours['scalar'] = ours['policy_loss'] + h['critic_coef'] * ours['critic_loss'] + h['KL_coef'] * kl
    return ours


def grpo(case, x, h):
    mask, prompts = x['mask'].bool(), GOLDEN['inputs'][case['input']]['prompt_id']
    advantage = torch.zeros_like(x['scores'])
    for name in set(prompts):
        rows = torch.tensor([name == other for other in prompts])
        advantage[rows] = formulas.group_advantage(x['scores'][None, rows], eps=0.01)[0]
    # halos_grpo: the ratio is against the reference there, so the reference is passed as the old policy, too
    pi, ref, a = x['policy_logps'][mask], x['reference_logps'][mask], advantage[:, None].expand_as(mask)[mask]
    l = formulas.grpo(pi, ref, ref, a, clip=h['epsilon'], kl_coef=h['beta'])
    return {'scalar': step(l), 'advantages': advantage, 'KL': step(formulas.kl_penalty(pi, ref))}


FAMILIES = {
    dpo_family: 'dpo dpo_reference_free cdpo ipo dr_dpo e2e_dpo rlaif_dpo halos_dpo halos_cdpo radpo_dpo radpo_cdpo',
    reward_model: 'rlaif_reward_model halos_bradley_terry trl_reward',
    trl_dpo: ' '.join(f'trl_{kind}' for kind in ('multi', 'sft', *TRL)),
    trl_simpo_and_cpo: 'trl_simpo trl_cpo e2e_cpo',
    trl_orpo: 'trl_orpo e2e_orpo',
    kto: 'trl_kto halos_kto radpo_kto radpo_kto_zero',
    halos_per_token: 'halos_ipo halos_simpo',
    slic: 'radpo_slic halos_slic',
    sft_from_logits: 'e2e_sft e2e_sft_tokenmean',
    tdpo: 'tdpo radpo_tdpo ra_dpo',
    ppo: 'halos_ppo radpo_ppo',
    **{grpo: 'halos_grpo', beta_dpo: 'beta_dpo', seq_logps: 'seq_logps'},
}
CHECKS = {group: family for family, groups in FAMILIES.items() for group in groups.split()}


# ---- comparing ----


def compare(case):
    """Triples (golden numbers, inputs, our numbers): one, or one of every step."""
    if case['group'] == 'beta_dpo':
        return beta_dpo(case)
    gold, x, h = open_case(case)
    return [(gold, x, CHECKS[case['group']](case, x, h))]


def differences(case):
    """Sentences about what does not agree in a case."""
    found = []
    tolerance = 1e-5 if case.get('dtype') == 'float32' else 1e-9
    for gold, x, ours in compare(case):
        pairs = {k: (ours[k], v) for k, v in gold['outputs'].items() if k in ours}
        assert 'scalar' in pairs and ('losses' in pairs) == ('losses' in gold['outputs']), 'not all of it is compared'
        # where policy = reference the gradient may depend on rounding: values only
        wanted = gold['grads'] if 'gradient_depends_on_rounding' not in case.get('flags', []) else {}
        if wanted:
            value, leaves = ours.get('gradient_of', ours['scalar']), [x[k] for k in wanted]
            slopes = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
            pairs |= {f'gradient of {k}': (mine, wanted[k]) for k, mine in zip(wanted, slopes, strict=True)}
        for name, (mine, theirs) in pairs.items():
            mine = torch.as_tensor(mine, dtype=torch.float64).detach()
            theirs = tensor(theirs)
            assert mine.shape == theirs.shape, f'{case["id"]} {name}'
            near = (mine - theirs).abs() <= tolerance * theirs.abs().clamp(min=1)
            near |= (mine == theirs) | theirs.isnan()  # infinities; a NaN of theirs says nothing
            if not near.all():
                found.append(f'{case["id"]} {name}: {mine[~near][:3].tolist()} against {theirs[~near][:3].tolist()}')
    return found


def cases(group):
    return [case | {'group': group} for case in GOLDEN['groups'][group]['cases']]


def compared(group):
    """(case, its differences) of those that are not skipped."""
    for case in cases(group):
        with contextlib.suppress(Skip):
            yield case, differences(case)


@pytest.mark.parametrize('group', GOLDEN['groups'])
def test_group(group):
    """A group of which nothing is compared is skipped, for a known reason."""
    if group not in CHECKS:
        pytest.skip(f'{SKIPPED.get(group, "unknown group")}: not among the losses here')
    found = list(compared(group))
    assert not (wrong := [text for _, texts in found for text in texts]), '\n'.join(wrong[:10])
    if not found:
        pytest.skip('no case of it is among the losses here')


def shifted(x, by):
    """x with its first finite number moved, and whether there was one."""
    if not isinstance(x, list):
        return (x + by * max(1.0, abs(x)), True) if math.isfinite(float(x)) else (x, False)
    for i, y in enumerate(x):
        y, done = shifted(y, by)
        if done:
            return x[:i] + [y] + x[i + 1 :], True
    return x, False


@pytest.mark.parametrize('group', [group for group in GOLDEN['groups'] if group in CHECKS])
def test_a_wrong_number_is_noticed(group):
    """Whatever is compared can fail: the scalar, the losses and every gradient of a case, moved by 1e-6, must."""
    case, _ = next(compared(group), (None, None))
    if case is None:
        pytest.skip('nothing is compared in this group')
    by = 1e-3 if case.get('dtype') == 'float32' else 1e-6
    kinds = [('outputs', 'scalar'), ('outputs', 'losses')]
    if 'gradient_depends_on_rounding' not in case.get('flags', []):
        kinds += [('grads', name) for name in gold_of(case)['grads']]
    moved = 0
    for kind, name in kinds:
        wrong = copy.deepcopy(case)
        if name in gold_of(wrong)[kind]:
            gold_of(wrong)[kind][name], done = shifted(gold_of(wrong)[kind][name], by)
            moved += done
            assert differences(wrong) or not done, f'{case["id"]}: a wrong {kind} {name} went unnoticed'
    assert moved


def test_small_file_has_every_loss(monkeypatch):
    """The committed subset agrees too, and takes every checked group and every loss.

    But for dpop, which has no original code in it, and losses of somebody's own."""
    monkeypatch.setattr(sys.modules[__name__], 'GOLDEN', json.loads(SMALL.read_text()))
    USED.clear()
    assert not (found := [text for group in CHECKS for case in cases(group) for text in differences(case)]), found[:10]
    assert USED | {'dpop'} >= set(LOSSES)
    assert SMALL.stat().st_size <= 200_000
