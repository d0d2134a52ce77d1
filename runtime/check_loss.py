"""Check that a loss of losses.py can train: `python losses.py my_loss --beta=0.2` prints its values and slopes."""

import math
import sys
from pathlib import Path

from configurator import UserError, configure
from runtime import guard
from runtime.files import say
from runtime.objective import objective_of, parameter_names, try_out


def main(losses, statistics):
    """Print values and slopes of the loss named on the command line; UserError if one is not finite. Arguments: name -> function."""
    guard.watch('__main__')  # losses.py, which calls this, is the script
    words = sys.argv[1:]  # such as my_loss --beta=0.2
    name = next((word for word in words if not word.startswith('-')), None)
    flags = [word for word in words if word != name]
    usage = f'python losses.py dpo --beta=0.2 checks a loss; there are {", ".join(losses)}'
    # the options are those of dpo.py; help has this text, and lists those that the formulas of the losses have
    script = Path(__file__).parents[1] / 'dpo.py'
    listed = parameter_names(*losses.values(), *statistics.values())
    config = configure({'__file__': script, '__doc__': usage}, argv=flags, listed=listed)
    if name is None:
        raise UserError(f'name a loss: {usage}')
    config['loss'] = name
    objective = objective_of(config, losses, statistics)
    unused = config.keys() - parameter_names(objective.fn, objective.statistic)
    config.report_unused(sorted(unused), 'the table is of the loss alone')
    rows = try_out(objective)
    # rows are [margin, loss, slope] or, for losses of pairs, [margin, loss, slope, slope]
    slopes = 'slope chosen  slope rejected' if objective.paired else 'slope'
    say(f'    margin         loss {slopes}')
    for margin, *numbers in rows:
        values = ' '.join(f'{value:12.5g}' for value in numbers)
        say(f'{margin:10.1f} {values}')
    broken = [row[0] for row in rows if not all(map(math.isfinite, row))]
    if broken:
        raise UserError(f'the loss {name} or its slope is not finite at margin {broken[0]:.0f}: see losses.log1mexp')
    say(f'{name} can train: python dpo.py --loss={name}')
