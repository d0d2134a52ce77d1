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
    """Evaluate a loss and its gradient in float32 at each of MARGINS; return one row (list of floats) per margin.

    fn, statistic: the loss and its per-step statistic or None, from find(). Rows of pair losses are [margin, loss, d loss /
    d ratio_w, d loss / d ratio_l], those of single-answer losses [margin, loss, d loss / d ratio]. Raises UserError if the loss
    does not return one number per example."""
    margin = torch.tensor(MARGINS)
    # pair losses take *_w (chosen) and *_l (rejected) arguments; single-answer losses have no suffix
    ratios = {'': margin}
    if not PAIRS.isdisjoint(inputs(fn)):
        ratios = {'_w': margin / 2, '_l': -margin / 2}
    columns = {'good': torch.ones_like(margin, dtype=torch.bool)}
    for suffix, ratio in ratios.items():
        columns[f'ratio{suffix}'] = ratio.requires_grad_()
        # the reference log-prob is -20.01; the clamp keeps the policy log-prob below 0
        columns[f'pi{suffix}'] = ratio.clamp(max=20.0) - 20.01
        # typical values: ten tokens per answer, a divergence of 0.3 nats
        columns[f'n{suffix}'] = torch.full_like(ratio, 10.0)
        columns[f'div{suffix}'] = torch.full_like(ratio, 0.3)

    # treat the examples as the first step of a run, as dpo.py does
    if statistic:
        step_inputs = {'state': {}, 'generator': torch.Generator().manual_seed(0)}
        # kto: log-ratios of mismatched answers
        step_inputs['ratio_kl'] = columns.get('ratio')
        new_columns, _state = call(statistic, options | columns | step_inputs)
        columns |= {column: values.detach().float() for column, values in new_columns.items()}

    # columns override options of the same name
    losses = call(fn, options | columns)
    if not isinstance(losses, torch.Tensor) or losses.shape != margin.shape:
        expected = f'a number for each example, ({len(margin)},)'
        raise UserError(f'the loss {name} must return {expected}, not {losses!r:.100}')
    # rows are independent, so the gradient of the sum holds every row's slope; unused inputs get slope 0
    slopes = torch.autograd.grad(losses.sum(), list(ratios.values()), allow_unused=True, materialize_grads=True)
    return torch.stack([margin, losses, *slopes], dim=1).tolist()


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
