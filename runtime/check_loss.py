"""Is a loss of losses.py ready to train? `python losses.py my_loss --beta=0.2` checks its signature, and shows values and slopes.

dpo.py uses the first part of this, too: it finds its loss, and calls it with the columns that it asks for."""

import inspect
import math
import sys
from pathlib import Path

import torch

from configurator import UserError, configure

# the columns that a loss may ask for, of pairs and of single answers: see losses.py
PAIRS = set('ratio_w ratio_l pi_w pi_l n_w n_l div_w div_l'.split())
SINGLES = set('ratio pi n div good'.split())
# in nats: log-ratio of the chosen answer minus that of the rejected one, or the log-ratio of a single answer
MARGINS = [-1000.0, -20.0, -5.0, -1.0, 0.0, 1.0, 5.0, 20.0, 1000.0]


def inputs(*functions):
    """Return the set of all parameter names of these functions. Any of them may be None, which has none."""
    names = set()
    for fn in functions:
        if fn is not None:
            names |= inspect.signature(fn).parameters.keys()
    return names


def call(fn, known):
    """Call fn with those entries of known (name -> column or option) that its signature names. Returns its result."""
    arguments = {name: known[name] for name in inputs(fn) if name in known}
    return fn(**arguments)


def find(name, losses, statistics, options):
    """Return the loss of this name, and the statistic of its step or None. losses and statistics: name -> function.

    Raises UserError if there is no such loss, or if it asks for a column or an option that does not exist. The arguments of a
    loss with a statistic are not checked, since the statistic makes some of them."""
    if name not in losses:
        known = ', '.join(losses)
        raise UserError(f'loss must be one of {known}, not {name!r}')
    fn = losses[name]
    statistic = statistics.get(name)
    for p in inspect.signature(fn).parameters.values():
        has_default = p.default is not p.empty
        if statistic or has_default:
            continue
        # losses.py puts options behind a *
        is_option = p.kind is p.KEYWORD_ONLY
        if is_option and p.name not in options:
            advice = f'declare it in dpo.py, as in {p.name} = 1.0'
            raise UserError(f'the loss {name} asks for {p.name!r}, which is no option: {advice}')
        is_known_column = p.name in PAIRS or p.name in SINGLES
        if not is_option and not is_known_column:
            known = 'those at the top of losses.py, and options after a *'
            raise UserError(f'the loss {name} asks for the column {p.name!r}, and there are only {known}')

    names = inputs(fn)
    takes_pairs = not PAIRS.isdisjoint(names)
    takes_singles = not SINGLES.isdisjoint(names)
    if takes_pairs == takes_singles:
        wanted = 'columns of pairs or of single answers, not for neither, nor both'
        raise UserError(f'the loss {name} must ask for {wanted}')
    return fn, statistic


def table(name, fn, statistic, options):
    """Try a loss on an example for each of MARGINS, in float32. Returns a row for each, as lists of numbers.

    A row of a pair is [margin, loss, slope in ratio_w, slope in ratio_l]; one of a single answer is [margin, loss, slope in
    ratio]. Raises UserError if the loss does not return a number for each example."""
    # the log-ratios: the two answers of a pair go opposite ways, half a margin each; names of single answers have no ending
    margin = torch.tensor(MARGINS)
    takes_pairs = not PAIRS.isdisjoint(inputs(fn))
    ratios = {'': margin}
    if takes_pairs:
        ratios = {'_w': margin / 2, '_l': -margin / 2}
    columns = {}
    columns['good'] = torch.ones_like(margin, dtype=torch.bool)
    for ending, ratio in ratios.items():
        ratio.requires_grad_()
        columns[f'ratio{ending}'] = ratio
        # as if the reference gave each answer a log-prob of -20.01. The policy's must stay below 0, so larger ratios count as 20
        columns[f'pi{ending}'] = ratio.clamp(max=20.0) - 20.01
        # ordinary values: answers of ten tokens, and a divergence of 0.3 nats
        columns[f'n{ending}'] = torch.full_like(ratio, 10.0)
        columns[f'div{ending}'] = torch.full_like(ratio, 0.3)

    # the statistic takes the rows for a step, the first one of a run; dpo.py calls it in the same way
    if statistic:
        of_step = {'state': {}}
        of_step['generator'] = torch.Generator().manual_seed(0)
        # kto: the log-ratios of mismatched answers
        of_step['ratio_kl'] = columns.get('ratio')
        made, _state = call(statistic, options | columns | of_step)
        for column, values in made.items():
            columns[column] = values.detach().float()

    # a column hides an option of its name
    losses = call(fn, options | columns)
    is_column = isinstance(losses, torch.Tensor) and losses.shape == margin.shape
    if not is_column:
        wanted = f'a number for each example, ({len(margin)},)'
        raise UserError(f'the loss {name} must return {wanted}, not {losses!r:.100}')
    # the sum has the slopes of all rows at once, since no row depends on another; one that is not used has slope 0
    inputs_of_slopes = list(ratios.values())
    slopes = torch.autograd.grad(losses.sum(), inputs_of_slopes, allow_unused=True, materialize_grads=True)
    rows = torch.stack([margin, losses, *slopes], dim=1)
    return rows.tolist()


def main(losses, statistics):
    """Check the loss that the command line names, with the options of dpo.py, and print its table. Raises UserError.

    losses and statistics: name -> function, those of losses.py."""
    name, *flags = sys.argv[1:] or ['']
    script = Path(__file__).parents[1] / 'dpo.py'
    config = configure({'__file__': script}, argv=flags)
    fn, statistic = find(name, losses, statistics, config)
    # None stands for a default that depends on the loss; 0.1 is a value that all of them can take
    if config['label_smoothing'] is None:
        config['label_smoothing'] = 0.1
    rows = table(name, fn, statistic, config)

    # a pair has two slopes, a single answer one
    is_of_pairs = len(rows[0]) == 4
    slopes = 'slope'
    if is_of_pairs:
        slopes = 'slope chosen  slope rejected'
    print(f'    margin         loss {slopes}')
    for margin, *numbers in rows:
        values = ' '.join(f'{value:12.5g}' for value in numbers)
        print(f'{margin:10.1f} {values}')
    for margin, *numbers in rows:
        is_finite = all(math.isfinite(value) for value in numbers)
        if not is_finite:
            hint = f'at a margin of {margin:.0f} nats: see losses.log1mexp'
            raise UserError(f'the loss {name} or its slope is not finite {hint}')
    print(f'{name} can train: python dpo.py --loss={name}')
