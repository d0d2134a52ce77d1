"""Is a loss of losses.py ready to train? Its signature is checked, and its values and slopes are shown, in a second.

python losses.py my_loss --beta=0.2
"""

import inspect
import sys
from pathlib import Path

import torch

from configurator import UserError, configure

PAIRS = set('ratio_w ratio_l pi_w pi_l n_w n_l div_w div_l'.split())
SINGLES = set('ratio pi n div good'.split())
# nats between the answers, or against the reference
MARGINS = [-1000.0, -20.0, -5.0, -1.0, 0.0, 1.0, 5.0, 20.0, 1000.0]


def call(fn, known):
    """fn(...) with what its signature names, of the columns and options in known."""
    return fn(**{name: known[name] for name in inspect.signature(fn).parameters if name in known})


def mistake(name, fn, statistic, options):
    """What is wrong with the signature of a loss, as a sentence; None where it can train.

    statistic: that of its step, or None; options: of dpo.py."""
    positional, keywords = [], []
    for parameter in inspect.signature(fn).parameters.values():
        is_keyword = parameter.kind is parameter.KEYWORD_ONLY
        # what has a default may be missing
        if parameter.default is parameter.empty:
            (keywords if is_keyword else positional).append(parameter.name)

    # columns: of pairs or of single answers, and those that a statistic of the step gives
    kinds = [columns for columns in (PAIRS, SINGLES) if columns & set(positional)]
    unknown = [column for column in positional if column not in PAIRS | SINGLES]
    if unknown and not statistic:
        some = ' '.join(sorted(PAIRS)) + ', or ' + ' '.join(sorted(SINGLES))
        return f'the loss {name} asks for the column {unknown[0]!r}, and there is none: a loss has {some}, and options after a *'
    if len(kinds) != 1:
        return f'the loss {name} must ask for columns of pairs or of single answers: {" ".join(positional)} is neither, or both'
    missing = [option for option in keywords if option not in options and not statistic]
    if missing:
        return f'the loss {name} asks for {missing[0]!r}, which is no option: declare it in dpo.py, as in {missing[0]} = 1.0'
    return None


def table(name, fn, statistic, options):
    """Rows of a loss, float32, at MARGINS: (margin, loss, slope in the chosen answer, slope in the rejected), or with one slope."""
    margin = torch.tensor(MARGINS)
    paired = bool(PAIRS & set(inspect.signature(fn).parameters))
    # both answers move away from the reference, or one does
    leaves = [x.clone().requires_grad_() for x in ((margin / 2, -margin / 2) if paired else (margin,))]
    columns = {'good': torch.ones(len(margin), dtype=torch.bool)}
    for ratio, side in zip(leaves, ('_w', '_l') if paired else ('',), strict=True):
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
    slopes = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
    slopes = [torch.zeros_like(margin) if slope is None else slope for slope in slopes]
    return list(zip(MARGINS, values.tolist(), *(slope.tolist() for slope in slopes), strict=True))


def main(losses, statistics):
    """Check the one of these losses that the command line names, with the options of dpo.py; show its table."""
    name, *flags = sys.argv[1:] or ['']
    config = configure({'__file__': Path(__file__).parents[1] / 'dpo.py'}, argv=flags)
    if name not in losses:
        raise UserError(f'name a loss: python losses.py NAME, one of {", ".join(losses)}')
    loss = name, losses[name], statistics.get(name)
    if wrong := mistake(*loss, config):
        raise UserError(wrong)
    smooth = config['label_smoothing'] if config['label_smoothing'] is not None else 0.1
    rows = table(*loss, {**config, 'label_smoothing': smooth})

    # a pair has two slopes, a single answer one
    paired = len(rows[0]) == 4
    print(f'{"margin":>10s} {"loss":>12s} ' + ('slope chosen  slope rejected' if paired else 'slope'))
    for row in rows:
        print(f'{row[0]:10.1f} ' + ' '.join(f'{value:12.5g}' for value in row[1:]))
    broken = [row[0] for row in rows if not all(-float('inf') < value < float('inf') for value in row)]
    if broken:
        raise UserError(
            f'the loss {name} or its slope is not finite at a margin of {broken[0]:.0f} nats: see losses.log1mexp'
        )
    print(f'{name} can train: python dpo.py --loss={name}')
