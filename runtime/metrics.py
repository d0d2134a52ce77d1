"""The metrics that training on preferences reports: the same names whatever the loss, for dpo.py and reward.py."""

import math


def of_preferences(split, loss, chosen, rejected, right):
    """Metrics of the columns of a step, or of an evaluation: name -> float.

    loss: what the step minimises, one number. chosen, rejected: columns of the two sides, (examples,) each: reward, n (answer
    tokens), and where there are such pi, ref and div. right: mask of the examples whose rewards are in the right order."""
    metrics = {f'loss/{split}': loss}
    for side, columns in {'chosen': chosen, 'rejected': rejected}.items():
        n = columns['n']
        metrics[f'rewards_{split}/{side}'] = columns['reward'].mean()
        metrics[f'length_{split}/{side}'] = n.mean()
        if 'pi' in columns:
            metrics[f'logps_{split}/{side}'] = columns['pi'].mean()
        # estimates of KL(reference || policy), as if the answers came from the reference
        if 'ref' in columns:
            gap = columns['ref'] - columns['pi']
            metrics[f'kl_{split}/{side}'] = gap.mean()
            metrics[f'kl_{split}/{side}_per_token'] = gap.sum() / n.sum()
        if 'div' in columns:
            metrics[f'divergence_{split}/{side}_per_token'] = columns['div'].sum() / n.sum()
    metrics[f'rewards_{split}/margins'] = chosen['reward'].mean() - rejected['reward'].mean()
    metrics[f'rewards_{split}/accuracies'] = right.double().mean()
    return numbers(metrics)


def numbers(metrics):
    """name -> tensor of one number, as floats of ten decimals. The mean of nothing, which is nan, is left out."""
    floats = {name: value.item() for name, value in metrics.items()}
    return {name: round(number, 10) for name, number in floats.items() if not math.isnan(number)}


def meaning(loss, paired, has_reference):
    """What the screen's acc and margin are, where they are not those of a pair's rewards; None where they are."""
    words = []
    if not paired:
        words.append(
            'acc is the share of answers on the right side, margin the mean reward of good less that of bad ones'
        )
    if not has_reference:
        words.append(f'{loss} has no reference: rewards, acc and margin are of the policy alone, and do not begin at 0')
    return f'note: {"; ".join(words)}' if words else None
