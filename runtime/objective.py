"""What a loss of losses.py asks for, with the options of a run: columns, a reference, a statistic, terms on top of it."""

import inspect
from typing import NamedTuple

import torch

from configurator import UserError
from runtime.hub import first_line
from runtime.values import did_you_mean

# column arguments of losses of pairs and of single answers, described in losses.py
PAIRS = set('ratio_w ratio_l pi_w pi_l n_w n_l div_w div_l'.split())
SINGLES = set('ratio pi n div good'.split())
# where table() tries a loss: log-ratio of the chosen minus that of the rejected answer, or of a single answer, in nats
MARGINS = [-1000.0, -20.0, -5.0, -1.0, 0.0, 1.0, 5.0, 20.0, 1000.0]


def inputs(*functions):
    """Return the set of all parameter names of these functions, such as {'ratio_w', 'ratio_l', 'beta'} for dpo. Skips None."""
    return {name for fn in functions if fn for name in inspect.signature(fn).parameters}


def call(fn, known):
    """Call fn with the entries of known (name -> column or option) that match its parameters."""
    return fn(**{name: known[name] for name in inputs(fn) if name in known})


def _find(name, losses, statistics, options):
    """Return (loss function, its per-step statistic or None, whether it compares pairs) for a loss name.

    losses, statistics: name -> function. Raises UserError if there is no such loss, or if it takes unknown options or columns."""
    if name not in losses:
        hint = did_you_mean(name, losses)
        in_file = next(iter(losses.values())).__globals__  # names of losses.py
        if inspect.isfunction(in_file.get(name)):
            hint = f': the function {name} of losses.py has to be in LOSSES to be one'
        raise UserError(f'loss must be one of {", ".join(losses)}, not {name!r}{hint}')
    fn = losses[name]
    statistic = statistics.get(name)
    parameters = list(inspect.signature(fn).parameters.values())
    if statistic:
        parameters += inspect.signature(statistic).parameters.values()
    for p in parameters:
        # in a signature, options stand after a *, columns before it
        is_option = p.kind is p.KEYWORD_ONLY
        has_default = p.default is not p.empty
        if is_option and p.name in options and has_default:
            advice = 'leave it out there, and set the option'
            raise UserError(f'the loss {name} has a default for {p.name!r}, and dpo.py has its own: {advice}')
        # a default stands in for what is missing
        if is_option and p.name not in options and not has_default:
            advice = f'declare it in dpo.py, as in {p.name} = 1.0'
            raise UserError(f'the loss {name} asks for {p.name!r}, which is no option: {advice}')
        # a statistic adds columns, whose names are not known here
        if not (is_option or statistic or has_default or p.name in PAIRS | SINGLES):
            known = 'those at the top of losses.py, and options after a *; docs/code.md says how to add one'
            raise UserError(f'the loss {name} asks for the column {p.name!r}, and there are only {known}')

    takes_pairs = not PAIRS.isdisjoint(inputs(fn))
    takes_singles = not SINGLES.isdisjoint(inputs(fn))
    if takes_pairs == takes_singles:
        wanted = 'columns of pairs or of single answers, not for neither, nor both'
        raise UserError(f'the loss {name} must ask for {wanted}')
    if takes_pairs and statistic and 'ratio_kl' in inputs(statistic):
        raise UserError(f'the loss {name} compares pairs, and its statistic asks for ratio_kl, of single answers')
    return fn, statistic, takes_pairs


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
    is_mixed: bool  # its statistic asks for ratio_kl, log-ratios of prompts with answers to other prompts

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
        log_probs = {name: x for name, x in columns.items() if name.startswith('pi')}
        columns = columns | {name.replace('pi', 'ref'): x for name, x in log_probs.items()}
        # and so are those of kto's statistic, ratio_kl. The state is that of a first step
        if self.statistic:
            no_ratio = torch.zeros_like(columns['loss'])
            columns |= {'ratio_kl': no_ratio, 'state': {}, 'generator': torch.Generator()}
            new_columns, _state = self.call(self.statistic, columns)
            columns |= new_columns
        return self.call(self.fn, columns).mean()


def objective_of(config, losses, statistics):
    """Return the Objective of a run with these options. losses, statistics: name -> function.

    Raises UserError for options without effect or that exclude one another, and for a loss that fails when it is tried out."""
    name = config.loss
    fn, statistic, paired = _find(name, losses, statistics, config)
    asks_for = inputs(fn, statistic)
    has_ratio = not asks_for.isdisjoint(('ratio', 'ratio_w', 'ratio_l'))
    has_divergence = not asks_for.isdisjoint(('div', 'div_w', 'div_l'))
    has_risk = name.startswith('radpo')
    # option -> whether this loss uses it: first the options in the signature of any loss, then those in none
    uses = {option: option in asks_for for option in inputs(*losses.values(), *statistics.values())}
    # a divergence is one from the reference, so such a loss cannot go without
    uses |= {'reference_free': has_ratio and not has_divergence, 'risk': has_risk, 'mu': has_risk, 'sft_coef': paired}
    uses |= dict.fromkeys(('importance', 'importance_max'), has_ratio and paired)
    uses |= dict.fromkeys(('frac_good', 'frac_bad'), not paired)

    # terms that this loss cannot have are off, and what the user has not set gets the default of this loss
    options = dict(config)
    options['importance'] = config.importance and uses['importance']
    options['sft_coef'] = config.sft_coef if uses['sft_coef'] else 0.0
    needs_ref = has_ratio and not (config.reference_free and uses['reference_free'])
    if config.label_smoothing is None or not uses['label_smoothing']:
        options['label_smoothing'] = 0.1 if name in ('cdpo', 'robust', 'exo') else 0.0
    if config.beta_prime is None and name == 'drdpo':
        options['beta_prime'] = 1.0

    # try the loss on made-up examples: this raises UserError if it fails; check_loss.py prints the same table
    table(name, fn, statistic, options)
    found = {'needs_ref': needs_ref, 'has_divergence': has_divergence, 'is_mixed': 'ratio_kl' in asks_for}
    found['is_per_token'] = _is_per_token(fn, statistic, options)
    objective = Objective(name, fn, statistic, options, uses, paired, **found)
    # an option without effect is refused on the command line, and noted where a config file sets it
    unused = [option for option in config if not uses.get(option, True)]
    config.report_unused(unused, f'the loss {name} does not use it')
    if not options['importance']:
        config.report_unused(['importance_max'], 'importance is off')
    if not paired:
        config.report_unused(['share_prefix'], 'there is one answer to a prompt')
    if not needs_ref:
        config.report_unused(['ref_model'], 'there is no reference')
    _reject_conflicts(objective)
    return objective


def _reject_conflicts(objective):
    """Raise UserError for options that make no sense together."""
    name, options, needs_ref = objective.name, objective.options, objective.needs_ref
    smoothing = options['label_smoothing']
    risk, mu = options['risk'], options['mu']
    importance = options['importance']
    cache = options['cache_ref']
    bad_smoothing = not 0 <= smoothing < 0.5 or (name == 'exo' and smoothing == 0)
    bad_mu = objective.uses['mu'] and risk != 'erm' and mu > 1
    is_alone = objective.is_mixed and options['batch_size'] < 2
    # the cache has log-probs of the data's answers: no divergences, and none of the mismatched answers of kto
    not_in_cache = objective.has_divergence or objective.is_mixed
    mistakes = [  # (whether it is made, message)
        (bad_smoothing, f'label_smoothing must lie between 0 and 0.5 (exo: above 0), not {smoothing}'),
        (bad_mu, f'mu must lie between 0 and 1 for the risk {risk}, not {mu}'),
        (importance and not needs_ref, '--importance is a ratio to the reference: leave out --reference_free'),
        (cache and not needs_ref, f'--cache_ref: the loss {name} has no reference to cache'),
        (cache and not_in_cache, f'--cache_ref: the loss {name} needs the live reference'),
        (is_alone, f'{name} compares examples of a step with one another: batch_size must be 2 or more'),
    ]
    for is_made, message in mistakes:
        if is_made:
            raise UserError(message)


def _made_up(fn, statistic, options):
    """Return (columns of made-up examples, one for each of MARGINS; the log-ratios of these, to differentiate)."""
    # inputs(fn) are its parameter names, of which PAIRS are columns of pairs
    is_paired = not PAIRS.isdisjoint(inputs(fn))
    margin = torch.tensor(MARGINS)
    # names of columns of pairs end in _w (chosen) or _l (rejected), such as ratio_w; those of single answers do not
    ratios = {'_w': margin / 2, '_l': -margin / 2} if is_paired else {'': margin}
    # typical values: a divergence of 0.3 nats, and that for any column which somebody has added to PAIRS or SINGLES
    columns = dict.fromkeys(PAIRS | SINGLES, torch.full_like(margin, 0.3, requires_grad=True))
    columns['good'] = torch.ones_like(margin, dtype=torch.bool)
    for suffix, ratio in ratios.items():
        columns[f'ratio{suffix}'] = ratio.requires_grad_()
        # a log-prob is below 0: the reference's is -20.01, and the policy's this plus the log-ratio, at most -0.01
        columns[f'pi{suffix}'] = ratio.clamp(max=20.0) - 20.01
        columns[f'n{suffix}'] = torch.full_like(ratio, 10.0)
    # treat the rows as the examples of a run's first step. ratio_kl are kto's log-ratios of answers to other prompts: any numbers do
    if statistic:
        generator = torch.Generator().manual_seed(0)
        step_inputs = {'state': {}, 'generator': generator, 'ratio_kl': margin}
        new_columns, state = call(statistic, options | columns | step_inputs)
        for column, values in new_columns.items():
            columns[column] = values.detach().float().expand(len(margin))
        types = set(map(type, state.values()))
        if not types <= {int, float}:
            raise TypeError('the state of its statistic must be a dict of numbers, such as d.mean().item()')
    return columns, list(ratios.values())


@torch.no_grad()
def _is_per_token(fn, statistic, options):
    """Return whether a loss compares means over tokens: twice the tokens with twice the log-probs are the same to it."""
    if inputs(fn).isdisjoint(('n', 'n_w', 'n_l')):
        return False
    columns, _ = _made_up(fn, statistic, options)
    once = call(fn, options | columns)
    names = (PAIRS | SINGLES) - {'good'}
    columns |= {name: 2 * columns[name] for name in names}
    return torch.allclose(once, call(fn, options | columns))


def table(name, fn, statistic, options):
    """Try a loss and its gradient in float32 at each of MARGINS, before any model is loaded; return a row of floats for each.

    fn, statistic: the loss and its per-step statistic or None. Rows are [margin, loss, d loss / d ratio_w, d loss / d
    ratio_l] for losses of pairs, [margin, loss, d loss / d ratio] for losses of single answers. Raises UserError if the
    loss fails, or does not return one number per example, with a gradient, whatever the other examples are."""
    try:
        columns, ratios = _made_up(fn, statistic, options)
        # columns override options of the same name
        losses = call(fn, options | columns)
        alone = []  # the same, of one example at a time
        for i in range(len(MARGINS)):
            example = {key: x[i : i + 1].detach() for key, x in columns.items()}
            alone.append(call(fn, options | example))
    except Exception as error:  # whatever a mistake in somebody's formula raises
        raise UserError(f'the loss {name} fails: {type(error).__name__}: {first_line(error)}') from None
    is_column = isinstance(losses, torch.Tensor) and losses.shape == (len(MARGINS),)
    if not is_column or alone[0].shape != (1,):
        expected = f'a number for each example, ({len(MARGINS)},), and (1,) of one alone'
        raise UserError(f'the loss {name} must return {expected}, not {losses!r:.60}')
    if not losses.requires_grad:
        advice = 'it must be computed from the columns that it asks for, without detach'
        raise UserError(f'the loss {name} has no gradient: {advice}')
    if not torch.allclose(torch.cat(alone), losses, rtol=1e-4, atol=1e-5, equal_nan=True):
        advice = 'what it needs of the whole step belongs into a function of STATISTICS'
        raise UserError(f'the loss {name} of an example depends on others of its microbatch, or on chance: {advice}')
    # rows are independent, so the gradient of the sum holds every row's slope; an input that the loss does not use has slope 0
    slopes = torch.autograd.grad(losses.sum(), ratios, allow_unused=True, materialize_grads=True)
    return torch.stack([torch.tensor(MARGINS), losses, *slopes], dim=1).tolist()
