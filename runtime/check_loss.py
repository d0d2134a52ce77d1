"""Is a loss of losses.py ready to train? Its signature is checked, and its values and slopes are shown, in a second.

python losses.py my_loss --beta=0.2
"""

import inspect
import math
import sys
from pathlib import Path

import torch

from configurator import UserError, configure

PAIRS = set('ratio_w ratio_l pi_w pi_l n_w n_l div_w div_l'.split())
SINGLES = set('ratio pi n div good'.split())
# nats between the answers, or against the reference
MARGINS = [-1000.0, -20.0, -5.0, -1.0, 0.0, 1.0, 5.0, 20.0, 1000.0]


def inputs(*functions):
    """The names of the columns and options that these functions take; None among them takes nothing."""
    return {name for fn in functions if fn for name in inspect.signature(fn).parameters}


def call(fn, known):
    """fn(...) with what its signature names, of the columns and options in known."""
    return fn(**{name: known[name] for name in inputs(fn) if name in known})


def find(name, losses, statistics, options):
    """(the loss of this name, the statistic of its step or None). Raises UserError where it cannot train with these options."""
    if name not in losses:
        raise UserError(f'loss must be one of {", ".join(losses)}, not {name!r}')
    fn, statistic = losses[name], statistics.get(name)
    # what has a default may be missing, and a statistic gives columns and options of its own
    for p in inspect.signature(fn).parameters.values():
        if statistic or p.default is not p.empty:
            continue
        is_option = p.kind is p.KEYWORD_ONLY
        if is_option and p.name not in options:
            what = f'{p.name!r}, which is no option: declare it in dpo.py, as in {p.name} = 1.0'
            raise UserError(f'the loss {name} asks for {what}')
        if not is_option and p.name not in PAIRS | SINGLES:
            known = 'those at the top of losses.py, and options after a *'
            raise UserError(f'the loss {name} asks for the column {p.name!r}, and there are only {known}')
    columns = inputs(fn)
    if PAIRS.isdisjoint(columns) == SINGLES.isdisjoint(columns):
        raise UserError(
            f'the loss {name} must ask for columns of pairs or of single answers, not for neither, nor both'
        )
    return fn, statistic


def table(name, fn, statistic, options):
    """Rows of a loss, float32: [margin, loss, slope in the chosen answer, slope in the rejected], or with one slope."""
    margin = torch.tensor(MARGINS)
    # both answers of a pair move away from the reference, or the single one does
    ratios = {'_w': margin / 2, '_l': -margin / 2}
    if PAIRS.isdisjoint(inputs(fn)):
        ratios = {'': margin}
    columns = {'good': torch.ones_like(margin, dtype=torch.bool)}
    for side, ratio in ratios.items():
        columns[f'ratio{side}'] = ratio.requires_grad_()
        columns[f'pi{side}'] = ratio.clamp(max=20.0) - 20.01
        columns[f'n{side}'] = torch.full_like(ratio, 10.0)
        columns[f'div{side}'] = torch.full_like(ratio, 0.3)

    # of a whole step, as in dpo.py
    if statistic:
        more = {'state': {}, 'generator': torch.Generator().manual_seed(0), 'ratio_kl': columns.get('ratio')}
        given, _ = call(statistic, options | columns | more)
        columns |= {key: values.detach().float() for key, values in given.items()}
    values = call(fn, options | columns)
    if not isinstance(values, torch.Tensor) or values.shape != margin.shape:
        raise UserError(f'the loss {name} must return a number for each example, ({len(margin)},), not {values!r:.100}')
    slopes = torch.autograd.grad(values.sum(), list(ratios.values()), allow_unused=True, materialize_grads=True)
    return torch.stack([margin, values, *slopes], 1).tolist()


def main(losses, statistics):
    """Check the one of these losses that the command line names, with the options of dpo.py; show its table."""
    name, *flags = sys.argv[1:] or ['']
    config = configure({'__file__': Path(__file__).parents[1] / 'dpo.py'}, argv=flags)
    fn, statistic = find(name, losses, statistics, config)
    # the losses that smooth have defaults of their own for it
    if config['label_smoothing'] is None:
        config['label_smoothing'] = 0.1
    rows = table(name, fn, statistic, config)

    # a pair has two slopes, a single answer one
    slopes = 'slope chosen  slope rejected' if len(rows[0]) == 4 else 'slope'
    print(f'{"margin":>10s} {"loss":>12s} {slopes}')
    for margin, *numbers in rows:
        print(f'{margin:10.1f} ' + ' '.join(f'{value:12.5g}' for value in numbers))
    for margin, *numbers in rows:
        if not all(map(math.isfinite, numbers)):
            at = f'at a margin of {margin:.0f} nats: see losses.log1mexp'
            raise UserError(f'the loss {name} or its slope is not finite {at}')
    print(f'{name} can train: python dpo.py --loss={name}')
