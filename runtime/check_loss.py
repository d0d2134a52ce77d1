"""Check that a loss of losses.py can train: `python losses.py my_loss --beta=0.2` prints its values and slopes."""

import math
import sys
from pathlib import Path

import torch

from configurator import UserError, configure
from runtime import guard
from runtime.hub import first_line
from runtime.objective import PAIRS, call, inputs, objective_of

# log-ratio of the chosen minus that of the rejected answer, or log-ratio of a single answer, in nats
MARGINS = [-1000.0, -20.0, -5.0, -1.0, 0.0, 1.0, 5.0, 20.0, 1000.0]


def table(name, fn, statistic, options):
    """Evaluate a loss and its gradient in float32 at each of MARGINS; return one row (list of floats) per margin.

    fn, statistic: the loss and its per-step statistic or None. Rows are [margin, loss, d loss / d ratio_w, d loss / d
    ratio_l] for losses of pairs, [margin, loss, d loss / d ratio] for losses of single answers. Raises UserError if the
    loss does not return one number per example."""
    margin = torch.tensor(MARGINS)
    # arguments of a loss of pairs end in _w (chosen) or _l (rejected), such as ratio_w; those of single answers do not
    ratios = {'': margin}
    if not PAIRS.isdisjoint(inputs(fn)):
        ratios = {'_w': margin / 2, '_l': -margin / 2}
    columns = {'good': torch.ones_like(margin, dtype=torch.bool)}
    for suffix, ratio in ratios.items():
        ratio.requires_grad_()
        columns[f'ratio{suffix}'] = ratio
        # the policy's log-prob is that of the reference, -20.01, plus the log-ratio; the clamp keeps it below 0
        columns[f'pi{suffix}'] = ratio.clamp(max=20.0) - 20.01
        # typical values: ten tokens per answer, a divergence of 0.3 nats
        columns[f'n{suffix}'] = torch.full_like(ratio, 10.0)
        columns[f'div{suffix}'] = torch.full_like(ratio, 0.3)
    # treat the rows as the examples of a run's first step
    if statistic:
        step_inputs = {'state': {}, 'generator': torch.Generator().manual_seed(0)}
        # log-ratios of answers to other prompts (kto); any numbers do here
        step_inputs['ratio_kl'] = columns.get('ratio')
        new_columns, _state = call(statistic, options | columns | step_inputs)
        columns |= {column: values.detach().float() for column, values in new_columns.items()}
    try:
        # columns override options of the same name
        losses = call(fn, options | columns)
    except Exception as error:  # whatever a mistake in somebody's formula raises
        raise UserError(f'the loss {name} fails: {type(error).__name__}: {first_line(error)}') from None
    if not isinstance(losses, torch.Tensor) or losses.shape != margin.shape:
        expected = f'a number for each example, ({len(margin)},)'
        raise UserError(f'the loss {name} must return {expected}, not {losses!r:.100}')
    if not losses.requires_grad:
        advice = 'it must be computed from the columns that it asks for, without detach'
        raise UserError(f'the loss {name} has no gradient: {advice}')
    # rows are independent, so the gradient of the sum holds every row's slope; an input that the loss does not use has slope 0
    slopes = torch.autograd.grad(losses.sum(), list(ratios.values()), allow_unused=True, materialize_grads=True)
    return torch.stack([margin, losses, *slopes], dim=1).tolist()


def main(losses, statistics):
    """Check the loss named on the command line and print its table. losses, statistics: name -> function.

    Other arguments are options of dpo.py. Raises UserError if no loss is named, or if the loss or a slope is not finite."""
    guard.watch('__main__')
    words = sys.argv[1:]  # such as my_loss --beta=0.2
    name = next((word for word in words if not word.startswith('-')), None)
    flags = [word for word in words if word != name]
    usage = f'python losses.py dpo --beta=0.2 checks a loss; there are {", ".join(losses)}'
    script = Path(__file__).parents[1] / 'dpo.py'
    config = configure({'__file__': script, '__doc__': usage}, argv=flags)
    if name is None:
        raise UserError(f'name a loss: {usage}')
    config['loss'] = name
    objective = objective_of(config, losses, statistics)
    rows = table(name, objective.fn, objective.statistic, objective.options)
    # losses of pairs have two slopes: rows are [margin, loss, slope, slope]
    slopes = 'slope chosen  slope rejected' if len(rows[0]) == 4 else 'slope'
    print(f'    margin         loss {slopes}')
    for margin, *numbers in rows:
        values = ' '.join(f'{value:12.5g}' for value in numbers)
        print(f'{margin:10.1f} {values}')
    for margin, *numbers in rows:
        if not all(math.isfinite(value) for value in numbers):
            hint = f'at a margin of {margin:.0f} nats: see losses.log1mexp'
            raise UserError(f'the loss {name} or its slope is not finite {hint}')
    print(f'{name} can train: python dpo.py --loss={name}')
