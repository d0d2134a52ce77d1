"""The needs of a loss of losses.py, with the options of a run: columns, a reference, a statistic, terms on top of it."""

import inspect
from typing import NamedTuple

import torch

from configurator import UserError
from runtime.hub import first_line
from runtime.values import NAMES_ELSEWHERE, did_you_mean

# column arguments of losses of pairs and of single answers, described in losses.py
PAIRS = set('ratio_w ratio_l pi_w pi_l n_w n_l div_w div_l'.split())
SINGLES = set('ratio pi n div good'.split())
# where try_out() tries a loss: log-ratio of the chosen minus that of the rejected answer, or of a single answer, in nats
MARGINS = [-1000.0, -20.0, -5.0, -1.0, 0.0, 1.0, 5.0, 20.0, 1000.0]


def parameter_names(*functions):
    """Return the set of all parameter names of these functions, such as {'ratio_w', 'ratio_l', 'beta'} for dpo. Skips None."""
    return {name for fn in functions if fn for name in inspect.signature(fn).parameters}


def call(fn, known):
    """Call fn with the entries of known (name -> column or option) that match its parameters."""
    return fn(**{name: known[name] for name in parameter_names(fn) if name in known})


def _find(name, losses, statistics, options):
    """Return (function, per-step statistic or None, whether it compares pairs) of a loss, from name -> function. UserError if wrong."""
    if name not in losses:
        hint = did_you_mean(name, losses)
        in_file = next(iter(losses.values())).__globals__  # names of losses.py
        # not for sft, a function there that is a script here
        if name not in NAMES_ELSEWHERE and inspect.isfunction(in_file.get(name)):
            hint = f': the function {name} of losses.py has to be in LOSSES to be one'
        raise UserError(f'loss must be one of {", ".join(losses)}, not {name!r}{hint}')
    fn = losses[name]
    statistic = statistics.get(name)
    _check_parameters(name, fn, options, may_add=statistic is not None)
    if statistic:
        _check_parameters(name, statistic, options, may_add=True)
    takes_pairs = not PAIRS.isdisjoint(parameter_names(fn))
    takes_singles = not SINGLES.isdisjoint(parameter_names(fn))
    if takes_pairs == takes_singles:
        raise UserError(f'the loss {name} must ask for columns of pairs, or for those of single answers')
    if takes_pairs and statistic and 'ratio_kl' in parameter_names(statistic):
        raise UserError(f'the loss {name} compares pairs, and its statistic asks for ratio_kl, of single answers')
    return fn, statistic, takes_pairs


def _check_parameters(name, fn, options, may_add):
    """Raise UserError if fn, of the loss `name`, takes options or columns that do not exist. may_add: a statistic adds columns."""
    for key, p in inspect.signature(fn).parameters.items():
        has_default = p.default is not p.empty
        # in a signature, options stand after a *, columns before it
        if p.kind is p.KEYWORD_ONLY:
            if has_default and key in options:
                raise UserError(f'the loss {name} has a default for {key!r}, as has dpo.py: set the option instead')
            if not has_default and key not in options:
                raise UserError(f'the loss {name} asks for {key!r}, which is no option: add {key} = 1.0 to dpo.py')
            continue
        if not (has_default or may_add or key in PAIRS | SINGLES):
            known = 'those at the top of losses.py, and options after a *; docs/code.md says how to add one'
            raise UserError(f'the loss {name} asks for the column {key!r}, and there are only {known}')


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
    is_mixed: bool  # its statistic asks for ratio_kl, log-ratios of prompts with answers to other prompts
    is_per_token: bool = False  # it compares means over tokens

    def call(self, fn, columns):
        """Call fn, a function of losses.py, with the options, columns and log-ratios (ratio_w = pi_w - ref_w) that it asks for."""
        known = {**self.options, **columns}  # a column overrides the option of its name, such as beta of beta_dpo
        for name, log_probs in columns.items():
            if name.startswith('pi'):
                suffix = name.removeprefix('pi')  # '_w', '_l', '_kl', or '' for single answers
                # without a reference the log-ratio is the policy's log-prob
                ref_log_probs = columns.get(f'ref{suffix}', 0.0)
                known[f'ratio{suffix}'] = log_probs - ref_log_probs
        return call(fn, known)

    def as_reference(self, columns):
        """Return the columns that a step of these columns would have if the reference were equal to the policy."""
        # ref_w = pi_w, ref_l = pi_l, ...: then call() makes log-ratios of 0
        columns = columns | {name.replace('pi', 'ref'): x for name, x in columns.items() if name.startswith('pi')}
        if self.statistic:
            # kto's log-ratios of answers to other prompts, ratio_kl, are 0, too; a first step has no state of earlier ones
            columns['ratio_kl'] = torch.zeros_like(columns['loss'])
            new_columns, _state = self.call(self.statistic, columns | {'state': {}, 'generator': torch.Generator()})
            columns |= new_columns
        return columns


def objective_of(config, losses, statistics):
    """Return a run's Objective. losses, statistics: name -> function. UserError for options in vain or in conflict, or a failing loss."""
    name = config.loss
    fn, statistic, paired = _find(name, losses, statistics, config)
    asks_for = parameter_names(fn, statistic)
    has_ratio = not asks_for.isdisjoint(('ratio', 'ratio_w', 'ratio_l'))
    has_divergence = not asks_for.isdisjoint(('div', 'div_w', 'div_l'))
    has_risk = name.startswith('radpo')
    # option -> whether this loss uses it: those that the signature of any loss names, then those that act before or after a loss
    in_signatures = parameter_names(*losses.values(), *statistics.values())
    uses = {option: option in asks_for for option in in_signatures}
    uses |= {'sft_coef': paired, 'frac_good': not paired, 'frac_bad': not paired, 'risk': has_risk, 'mu': has_risk}
    uses |= dict.fromkeys(('importance', 'importance_max'), has_ratio and paired)
    # a divergence is one from the reference, so a loss that has one cannot go without reference
    uses['reference_free'] = has_ratio and not has_divergence
    options = _options_for(name, config, uses)
    needs_ref = has_ratio and not (config.reference_free and uses['reference_free'])
    is_mixed = 'ratio_kl' in asks_for
    objective = Objective(name, fn, statistic, options, uses, paired, needs_ref, has_divergence, is_mixed)
    try_out(objective)  # raises UserError if the loss fails; check_loss.py prints what it returns
    _check_options(config, objective)
    return objective._replace(is_per_token=_is_per_token(objective))


def _options_for(name, config, uses):
    """Return a run's options, with a loss's defaults for those left open (None), and with the terms off that the loss cannot have."""
    options = dict(config)
    options['importance'] = config.importance and uses['importance']
    options['sft_coef'] = config.sft_coef if uses['sft_coef'] else 0.0
    if config.label_smoothing is None or not uses['label_smoothing']:
        options['label_smoothing'] = 0.1 if name in ('cdpo', 'robust', 'exo') else 0.0
    if config.beta_prime is None and name == 'drdpo':
        options['beta_prime'] = 1.0
    return options


def _check_options(config, objective):
    """Raise UserError for options without effect (of a config file: print a note), and for those that make no sense together."""
    name = objective.name
    options = objective.options
    needs_ref = objective.needs_ref
    importance = options['importance']
    unused = [option for option in config if not objective.uses.get(option, True)]
    config.report_unused(unused, f'the loss {name} does not use it')
    if not importance:
        config.report_unused(['importance_max'], 'importance is off')
    if not objective.paired:
        config.report_unused(['share_prefix'], 'there is one answer to a prompt')
    if not needs_ref:
        config.report_unused(['ref_model', 'cache_ref'], 'there is no reference')

    smoothing = options['label_smoothing']
    bad_smoothing = not 0 <= smoothing < 0.5 or (name == 'exo' and smoothing == 0)
    bad_mu = objective.uses['mu'] and config.risk != 'erm' and config.mu > 1
    # is_mixed: kto gives the prompts of a step one another's answers
    is_alone = objective.is_mixed and options['batch_size'] < 2
    # the cache has log-probs of each prompt's own answers, and no divergences
    not_in_cache = objective.has_divergence or objective.is_mixed
    bad_cache = options['cache_ref'] and needs_ref and not_in_cache
    mistakes = [  # (whether it is made, message)
        (bad_smoothing, f'label_smoothing must lie between 0 and 0.5 (exo: above 0), not {smoothing}'),
        (bad_mu, f'mu must lie between 0 and 1 for the risk {config.risk}, not {config.mu}'),
        (importance and not needs_ref, '--importance is a ratio to the reference: leave out --reference_free'),
        (bad_cache, f'--cache_ref: the loss {name} needs the live reference'),
        (is_alone, f'{name} compares examples of a step with one another: batch_size must be 2 or more'),
    ]
    for is_made, message in mistakes:
        if is_made:
            raise UserError(message)


def _made_up(objective):
    """Make an example for each of MARGINS, to try a loss on. Returns (their columns, the log-ratios among these, with gradients)."""
    margin = torch.tensor(MARGINS)
    # names of columns of pairs end in _w (chosen) or _l (rejected), such as ratio_w; those of single answers do not
    ratios = {'_w': margin / 2, '_l': -margin / 2} if objective.paired else {'': margin}
    # 0.3 nats for divergences, and for any column that somebody has added to PAIRS or SINGLES; the others are replaced
    columns = dict.fromkeys(PAIRS | SINGLES, torch.full_like(margin, 0.3, requires_grad=True))
    columns['good'] = torch.ones_like(margin, dtype=torch.bool)
    for suffix, ratio in ratios.items():
        columns[f'ratio{suffix}'] = ratio.requires_grad_()
        # a log-prob is below 0: the reference's is -20.01, and the policy's this plus the log-ratio, at most -0.01
        columns[f'pi{suffix}'] = ratio.clamp(max=20.0) - 20.01
        columns[f'n{suffix}'] = torch.full_like(ratio, 10.0)
    if objective.statistic:
        # take the examples for the first step of a run. ratio_kl: log-ratios of answers to other prompts, for which any numbers do
        step_inputs = {'state': {}, 'generator': torch.Generator().manual_seed(0), 'ratio_kl': margin}
        new_columns, state = call(objective.statistic, objective.options | columns | step_inputs)
        for column, values in new_columns.items():
            columns[column] = values.detach().float().expand(len(margin))
        types = set(map(type, state.values()))
        if not types <= {int, float}:
            raise TypeError('the state of its statistic must be a dict of numbers, such as d.mean().item()')
    return columns, list(ratios.values())


@torch.no_grad()
def _is_per_token(objective):
    """Return whether a loss compares means over tokens: answers of twice the tokens and log-probs are the same to it."""
    fn = objective.fn
    if parameter_names(fn).isdisjoint(('n', 'n_w', 'n_l')):
        return False
    columns, _ = _made_up(objective)
    known = objective.options | columns
    # all columns but the label are sums over tokens
    doubled = {name: 2 * columns[name] for name in (PAIRS | SINGLES) - {'good'}}
    return torch.allclose(call(fn, known), call(fn, known | doubled))


def try_out(objective):
    """Compute a loss and its gradient in float32 at each of MARGINS, before any model is loaded; return a row of floats for each.

    Rows are [margin, loss, d loss / d ratio_w, d loss / d ratio_l], of single answers [margin, loss, d loss / d ratio]. UserError if
    the loss fails, lacks a gradient, or mixes examples."""
    name = objective.name
    fn = objective.fn
    try:
        columns, ratios = _made_up(objective)
        known = objective.options | columns  # columns override options of the same name
        losses = call(fn, known)
        alone = []  # the same, of one example at a time
        for i in range(len(MARGINS)):
            example = {key: x[i : i + 1].detach() for key, x in columns.items()}
            alone.append(call(fn, known | example))
    except Exception as error:  # a mistake in somebody's formula may raise anything
        raise UserError(f'the loss {name} fails: {type(error).__name__}: {first_line(error)}') from None
    is_column = isinstance(losses, torch.Tensor) and losses.shape == (len(MARGINS),)
    if not is_column or alone[0].shape != (1,):
        wanted = f'a number for each example, ({len(MARGINS)},), and (1,) of one alone'
        raise UserError(f'the loss {name} must return {wanted}, not {losses!r:.60}')
    if not losses.requires_grad:
        raise UserError(f'the loss {name} has no gradient: compute it from columns that it asks for, without detach')
    if not torch.allclose(torch.cat(alone), losses, rtol=1e-4, atol=1e-5, equal_nan=True):
        advice = 'what it needs of the whole step belongs into a function of STATISTICS'
        raise UserError(f'the loss {name} of an example depends on others of its microbatch, or on chance: {advice}')
    # examples are independent, so the gradient of the sum holds the slope of each. It is 0 for a log-ratio that the loss does not use
    slopes = torch.autograd.grad(losses.sum(), ratios, allow_unused=True, materialize_grads=True)
    return torch.stack([torch.tensor(MARGINS), losses, *slopes], dim=1).tolist()
