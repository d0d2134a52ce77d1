"""What a loss of losses.py asks for, with the options of a run: columns, a reference, a statistic, terms on top of it."""

import inspect
from typing import NamedTuple

import torch

from configurator import UserError
from runtime.values import did_you_mean

# column arguments of losses of pairs and of single answers, described in losses.py
PAIRS = set('ratio_w ratio_l pi_w pi_l n_w n_l div_w div_l'.split())
SINGLES = set('ratio pi n div good'.split())


def inputs(*functions):
    """Return the set of all parameter names of these functions, such as {'ratio_w', 'ratio_l', 'beta'} for dpo. Skips None."""
    return {name for fn in functions if fn for name in inspect.signature(fn).parameters}


def call(fn, known):
    """Call fn with the entries of known (name -> column or option) that match its parameters."""
    return fn(**{name: known[name] for name in inputs(fn) if name in known})


def find(name, losses, statistics, options):
    """Return (loss function, its per-step statistic or None) for a loss name. losses, statistics: name -> function.

    Raises UserError if there is no such loss, or if it takes unknown options or columns."""
    if name not in losses:
        raise UserError(f'loss must be one of {", ".join(losses)}, not {name!r}{did_you_mean(name, losses)}')
    fn = losses[name]
    statistic = statistics.get(name)
    for p in inspect.signature(fn).parameters.values():
        has_default = p.default is not p.empty
        # a loss with a statistic also takes its columns, whose names are not known here
        if statistic or has_default:
            continue
        # in a signature, options stand after a *, columns before it
        is_option = p.kind is p.KEYWORD_ONLY
        if is_option and p.name not in options:
            advice = f'declare it in dpo.py, as in {p.name} = 1.0'
            raise UserError(f'the loss {name} asks for {p.name!r}, which is no option: {advice}')
        if not is_option and p.name not in PAIRS | SINGLES:
            known = 'those at the top of losses.py, and options after a *'
            raise UserError(f'the loss {name} asks for the column {p.name!r}, and there are only {known}')

    takes_pairs = not PAIRS.isdisjoint(inputs(fn))
    takes_singles = not SINGLES.isdisjoint(inputs(fn))
    if takes_pairs == takes_singles:
        wanted = 'columns of pairs or of single answers, not for neither, nor both'
        raise UserError(f'the loss {name} must ask for {wanted}')
    return fn, statistic


class Objective(NamedTuple):
    """A loss of losses.py with the options of a run, and what its signature says that it asks for."""

    name: str
    fn: object  # the formula
    statistic: object  # for some losses, a function that first computes a statistic over the whole step; else None
    options: dict  # those of the run, with this loss's defaults; terms that it cannot have are off
    uses: dict  # name of an option that only some losses use -> whether this loss does
    paired: bool  # it compares pairs; False: single answers, each labelled good or bad
    needs_ref: bool  # it compares policy and reference, so its rewards are log-ratios
    has_divergence: bool  # it takes the divergence of the policy from the reference, at each position
    is_per_token: bool  # it compares means over tokens

    def call(self, fn, columns):
        """Call fn, a function of losses.py, with the options, columns and log-ratios that its signature asks for.

        Log-ratios come from the columns: ratio_w = pi_w - ref_w. A column overrides the option of its name: beta of beta_dpo."""
        known = {**self.options, **columns}
        for name, log_probs in columns.items():
            if name.startswith('pi'):
                # without a reference the log-ratio is the policy's log-prob
                ref_log_probs = columns.get(name.replace('pi', 'ref'), 0.0)
                known[name.replace('pi', 'ratio')] = log_probs - ref_log_probs
        return call(fn, known)

    def loss_of_reference(self, columns):
        """Return the mean loss that a step would have if the reference were equal to the policy. columns: those of the step."""
        # ref_w = pi_w, ref_l = pi_l, ...: all log-ratios are 0
        ref_as_policy = {name.replace('pi', 'ref'): x for name, x in columns.items() if name.startswith('pi')}
        # only the loss aot takes a shift; then it is 0, too
        no_shift = {'shift': torch.zeros_like(columns['loss'])}
        return self.call(self.fn, no_shift | columns | ref_as_policy).mean()


def objective_of(config, losses, statistics):
    """Return the Objective of a run with these options. losses, statistics: name -> function.

    An option without effect is a UserError on the command line, and ignored in a config file, with a note. Options that
    exclude one another are a UserError."""
    name = config.loss
    fn, statistic = find(name, losses, statistics, config)
    asks_for = inputs(fn, statistic)
    paired = bool({'pi_w', 'ratio_w'} & asks_for)
    has_ratio = bool({'ratio', 'ratio_w'} & asks_for)
    has_divergence = 'div_w' in asks_for
    has_risk = name.startswith('radpo')
    every_input = inputs(*losses.values(), *statistics.values())
    uses = {option: option in asks_for for option in every_input}
    # options that are in no signature
    uses |= {'reference_free': has_ratio and not has_divergence, 'sft_coef': paired, 'risk': has_risk, 'mu': has_risk}
    uses |= dict.fromkeys(('importance', 'importance_max'), has_ratio and paired)
    uses |= dict.fromkeys(('frac_good', 'frac_bad'), not paired)

    options = dict(config)
    options['importance'] = config.importance and uses['importance']
    options['sft_coef'] = config.sft_coef if uses['sft_coef'] else 0.0
    needs_ref = has_ratio and not (config.reference_free and uses['reference_free'])
    unused = [option for option in config if not uses.get(option, True)]
    config.report_unused(unused, f'the loss {name} does not use it')
    if not options['importance']:
        config.report_unused(['importance_max'], 'importance is off')
    if not paired:
        config.report_unused(['share_prefix'], 'there is one answer to a prompt')
    if not needs_ref:
        config.report_unused(['ref_model'], 'there is no reference')

    # defaults that depend on the loss
    if config.label_smoothing is None or not uses['label_smoothing']:
        options['label_smoothing'] = 0.1 if name in ('cdpo', 'robust', 'exo') else 0.0
    if config.beta_prime is None and name == 'drdpo':
        options['beta_prime'] = 1.0
    _reject_conflicts(name, options, needs_ref, has_divergence, has_risk)
    # a mistake in a new formula is told here, before any model is loaded
    from runtime import check_loss

    check_loss.table(name, fn, statistic, options)
    is_per_token = 'n_l' in asks_for and (name != 'ipo' or config.average)
    return Objective(name, fn, statistic, options, uses, paired, needs_ref, has_divergence, is_per_token)


def _reject_conflicts(name, options, needs_ref, has_divergence, has_risk):
    """Raise UserError for options that make no sense together."""
    smoothing, risk, mu = options['label_smoothing'], options['risk'], options['mu']
    bad_smoothing = not 0 <= smoothing < 0.5 or (name == 'exo' and smoothing == 0)
    is_alone = name == 'kto' and options['batch_size'] < 2
    # the cache has log-probs of the data's answers: no divergences, and none of the mismatched answers of kto
    needs_live_ref = has_divergence or name == 'kto'
    mistakes = {  # message -> whether it applies
        f'label_smoothing must lie between 0 and 0.5 (exo: above 0), not {smoothing}': bad_smoothing,
        f'mu must lie between 0 and 1 for the risk {risk}, not {mu}': has_risk and risk != 'erm' and mu > 1,
        '--importance is a ratio to the reference: leave out --reference_free': options['importance'] and not needs_ref,
        f'--cache_ref: the loss {name} has no reference to cache': options['cache_ref'] and not needs_ref,
        f'--cache_ref: the loss {name} needs the live reference': options['cache_ref'] and needs_live_ref,
        'kto compares examples of a step with one another: batch_size must be 2 or more': is_alone,
    }
    for sentence, is_so in mistakes.items():
        if is_so:
            raise UserError(sentence)
