"""What a loss of losses.py asks for, read off its signature, and what a step with it reports."""

import inspect
from functools import partial

import losses
from configurator import UserError
from risks import RISKS, kl

# options that belong to some losses only: one that the chosen loss does not use is not silently ignored
SPECIAL = ('beta label_smoothing reference_free average rho a alpha risk mu w_good w_bad delta lam gamma tau sft_coef importance '
           'importance_max frac_good frac_bad').split()  # fmt: skip


def arguments(fn, kind):
    """The names of a function's columns (positional) or options (keyword-only)."""
    return [p.name for p in inspect.signature(fn).parameters.values() if p.kind == kind]


COLUMN, OPTION = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


class Spec:
    """One loss and its options. paired: trains on pairs, else on single answers; needs_ref: on a reference's log-probs;
    divergence: a function of risks.py, or None; statistic: of losses.STATISTICS, or None."""

    def __init__(self, config):
        loss, o = config['loss'], dict(config)
        if loss not in losses.LOSSES:
            raise UserError(f'loss must be one of {", ".join(losses.LOSSES)}, not {loss!r}')
        self.fn, self.statistic, self.options = losses.LOSSES[loss], losses.STATISTICS.get(loss), o
        self.columns = set(arguments(self.fn, COLUMN))
        self.paired, has_ref = 'pi_w' in self.columns, bool({'ref', 'ref_w'} & self.columns)
        self.divergence = None
        if 'div_w' in self.columns:
            self.divergence = partial(RISKS[o['risk']], mu=o['mu']) if loss.startswith('radpo') else kl
        self.uses = {name for fn in (self.fn, self.statistic) if fn for name in arguments(fn, OPTION)}
        self.uses |= {'risk', 'mu'} if loss.startswith('radpo') else set()
        self.uses |= {'sft_coef'} if self.paired else {'frac_good', 'frac_bad'}
        self.uses |= {'reference_free'} if has_ref and not self.divergence else set()
        self.uses |= {'importance', 'importance_max'} if self.paired and has_ref else set()
        unused = [name for name in SPECIAL if name not in self.uses]
        config.ignored(unused, f'the loss {loss} does not use it')
        off = {'importance': False, 'sft_coef': 0.0, 'reference_free': False, 'label_smoothing': None}
        o |= {name: value for name, value in off.items() if name in unused}
        config.ignored([] if o['importance'] else ['importance_max'], 'importance is off')
        if o['label_smoothing'] is None:
            o['label_smoothing'] = 0.1 if loss in ('cdpo', 'robust', 'exo') else 0.0
        if not 0 <= o['label_smoothing'] < 0.5 or (loss == 'exo' and o['label_smoothing'] == 0):
            raise UserError(f'label_smoothing must lie between 0 and 0.5 (exo: above 0), not {o["label_smoothing"]}')
        if loss.startswith('radpo') and o['risk'] != 'erm' and o['mu'] > 1:
            raise UserError(f'mu must lie between 0 and 1 for the risk {o["risk"]}, not {o["mu"]}')
        if o['beta_prime'] is None and loss == 'drdpo':
            o['beta_prime'] = 1.0
        self.needs_ref = has_ref and not o['reference_free']
        config.ignored([] if self.needs_ref else ['ref_model'], 'there is no reference')
        if o['importance'] and not self.needs_ref:
            raise UserError('--importance is a ratio to the reference: leave out --reference_free')
        if o['cache_ref'] and (self.divergence or not self.needs_ref or loss == 'kto'):
            why = (
                'needs the live reference, not one number an answer' if self.needs_ref else 'has no reference to cache'
            )
            raise UserError(f'--cache_ref: the loss {loss} {why}')
        self.reward_of = ['ref'] * has_ref + ['div'] * bool(self.divergence)
        self.reward_of += ['n'] * ('n_l' in self.columns and (loss != 'ipo' or o['average']))

    def call(self, fn, columns, **more):
        """fn on the columns and options that its signature names; columns given by a statistic replace options."""
        named = {**self.options, **columns, **more}
        return fn(**{name: named[name] for kind in (COLUMN, OPTION) for name in arguments(fn, kind) if name in named})

    def reward(self, c):
        """The loss's own implicit reward of answers with the columns c."""
        scale = {k: self.options[k] for k in ('beta', 'alpha') if k in self.uses}
        return losses.reward(c['pi'], **{k: c[k] for k in self.reward_of}, **scale)

    def summary(self, whole, split):
        """Metrics of the columns of a step, or of an evaluation: name -> float."""
        l, w, beta_prime = whole['loss'], whole['weight'], self.options['beta_prime']
        value = (w * l).sum() / w.sum()
        if (
            beta_prime
        ):  # the objective whose gradient the weights give: -beta' log of the weighted mean of exp(-l / beta')
            value = -beta_prime * ((w.log() - l / beta_prime).logsumexp(0) - w.sum().log())
        if self.paired:
            chosen, rejected = ({k[:-2]: v for k, v in whole.items() if k.endswith(side)} for side in ('_w', '_l'))
            right = self.reward(chosen) > self.reward(rejected)
        else:
            chosen, rejected = ({k: v[whole['good'] == side] for k, v in whole.items()} for side in (True, False))
            right = (self.reward(whole) > self.options['beta'] * whole['z']) == whole['good']
        metrics = {f'loss/{split}': value}
        for side, c in (('chosen', chosen), ('rejected', rejected)):
            metrics |= {f'rewards_{split}/{side}': self.reward(c).mean(), f'logps_{split}/{side}': c['pi'].mean(),
                        f'length_{split}/{side}': c['n'].mean()}  # fmt: skip
            if self.needs_ref:  # estimates of KL(reference || policy), as if the answers came from the reference
                gap = c['ref'] - c['pi']
                metrics |= {f'kl_{split}/{side}': gap.mean(), f'kl_{split}/{side}_per_token': gap.sum() / c['n'].sum()}
            if self.divergence:
                metrics[f'divergence_{split}/{side}_per_token'] = c['div'].sum() / c['n'].sum()
        metrics[f'rewards_{split}/margins'] = self.reward(chosen).mean() - self.reward(rejected).mean()
        metrics[f'rewards_{split}/accuracies'] = right.double().mean()
        if self.paired and self.needs_ref:
            right = chosen['pi'] - chosen['ref'] > rejected['pi'] - rejected['ref']
            metrics[f'logratio_{split}/accuracies'] = right.double().mean()
        return {k: round(v.item(), 10) for k, v in metrics.items() if v == v}
