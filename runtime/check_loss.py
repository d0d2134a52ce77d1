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
    # what has a default may be missing
    needed = [p for p in inspect.signature(fn).parameters.values() if p.default is p.empty]
    columns = [p.name for p in needed if p.kind is not p.KEYWORD_ONLY]
    keywords = [p.name for p in needed if p.kind is p.KEYWORD_ONLY]

    # a statistic gives columns and options of its own
    unknown = [column for column in columns if column not in PAIRS | SINGLES]
    missing = [option for option in keywords if option not in options]
    if unknown and not statistic:
        some = f'{" ".join(sorted(PAIRS))}, or {" ".join(sorted(SINGLES))}'
        raise UserError(f'the loss {name} asks for the column {unknown[0]!r}: a loss has {some}, and options after a *')
    if PAIRS.isdisjoint(columns) == SINGLES.isdisjoint(columns):
        what = 'must ask for columns of pairs or of single answers'
        raise UserError(f'the loss {name} {what}: {" ".join(columns)} is neither, or both')
    if missing and not statistic:
        what = f'asks for {missing[0]!r}, which is no option: declare it in dpo.py, as in {missing[0]} = 1.0'
        raise UserError(f'the loss {name} {what}')
    return fn, statistic


def table(name, fn, statistic, options):
    """Rows of a loss, float32, at MARGINS: (margin, loss, slope in the chosen answer, slope in the rejected), or with one slope."""
    margin = torch.tensor(MARGINS)
    # both answers move away from the reference, or one does
    sides = {'_w': margin / 2, '_l': -margin / 2} if PAIRS & inputs(fn) else {'': margin}
    leaves = {side: x.clone().requires_grad_() for side, x in sides.items()}
    columns = {'good': torch.ones(len(margin), dtype=torch.bool)}
    for side, ratio in leaves.items():
        columns |= {f'ratio{side}': ratio, f'pi{side}': ratio.clamp(max=20.0) - 20.01}
        columns |= {f'n{side}': torch.full_like(margin, 10.0), f'div{side}': torch.full_like(margin, 0.3)}

    # of a whole step, as in dpo.py
    if statistic:
        more = {'state': {}, 'generator': torch.Generator().manual_seed(0), 'ratio_kl': columns.get('ratio')}
        given, _ = call(statistic, options | columns | more)
        columns |= {key: values.detach().float() for key, values in given.items()}
    values = call(fn, options | columns)
    if not isinstance(values, torch.Tensor) or values.shape != margin.shape:
        raise UserError(f'the loss {name} must return a number for each example, ({len(margin)},), not {values!r:.100}')
    slopes = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return list(zip(MARGINS, values.tolist(), *(slope.tolist() for slope in slopes), strict=True))


def main(losses, statistics):
    """Check the one of these losses that the command line names, with the options of dpo.py; show its table."""
    name, *flags = sys.argv[1:] or ['']
    config = configure({'__file__': Path(__file__).parents[1] / 'dpo.py'}, argv=flags)
    fn, statistic = find(name, losses, statistics, config)
    smooth = 0.1 if config['label_smoothing'] is None else config['label_smoothing']
    rows = table(name, fn, statistic, {**config, 'label_smoothing': smooth})

    # a pair has two slopes, a single answer one
    slopes = 'slope chosen  slope rejected' if len(rows[0]) == 4 else 'slope'
    print(f'{"margin":>10s} {"loss":>12s} {slopes}')
    for margin, *numbers in rows:
        print(f'{margin:10.1f} ' + ' '.join(f'{value:12.5g}' for value in numbers))
    for row in rows:
        if not all(map(math.isfinite, row)):
            at = f'at a margin of {row[0]:.0f} nats: see losses.log1mexp'
            raise UserError(f'the loss {name} or its slope is not finite {at}')
    print(f'{name} can train: python dpo.py --loss={name}')
