"""The metrics that training on preferences reports: the same names whatever the loss, for dpo.py and reward.py."""


def of_preferences(split, loss, chosen, rejected, right):
    """Metrics of the columns of a step, or of an evaluation: name -> float.

    loss: what the step minimises, one number. chosen, rejected: columns of the two sides, (examples,) each: reward, n, and
    where there are such pi, ref and div. right: mask of the examples whose rewards are in the right order."""
    metrics = {f'loss/{split}': loss}
    for side, c in (('chosen', chosen), ('rejected', rejected)):
        tokens = c['n'].sum()
        metrics[f'rewards_{split}/{side}'] = c['reward'].mean()
        metrics[f'length_{split}/{side}'] = c['n'].mean()
        if 'pi' in c:
            metrics[f'logps_{split}/{side}'] = c['pi'].mean()
        if 'ref' in c:  # estimates of KL(reference || policy), as if the answers came from the reference
            gap = c['ref'] - c['pi']
            metrics[f'kl_{split}/{side}'] = gap.mean()
            metrics[f'kl_{split}/{side}_per_token'] = gap.sum() / tokens
        if 'div' in c:
            metrics[f'divergence_{split}/{side}_per_token'] = c['div'].sum() / tokens
    metrics[f'rewards_{split}/margins'] = chosen['reward'].mean() - rejected['reward'].mean()
    metrics[f'rewards_{split}/accuracies'] = right.double().mean()
    return numbers(metrics)


def numbers(metrics):
    """name -> tensor of one number, as floats of ten decimals. The mean of nothing, which is no number, is left out: a step
    may have no good answer, or no bad one."""
    return {name: round(value.item(), 10) for name, value in metrics.items() if value == value}
