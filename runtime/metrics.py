"""The metrics that training on preferences reports: the same names whatever the loss, for dpo.py and reward.py."""

import math


def of_preferences(split, loss, chosen, rejected, right):
    """Return the metrics of a step or of an evaluation, name -> float. split: train or eval, which is in their names.

    loss: what the step minimises, one number. chosen, rejected: name -> column (examples,) of the two sides: reward, n (answer
    tokens), and perhaps pi, ref (log-probs) and div. right: mask of the examples whose rewards are in the right order."""
    metrics = {f'loss/{split}': loss}
    for side, columns in {'chosen': chosen, 'rejected': rejected}.items():
        # a mean over examples, unless the name says per token: then one over all tokens
        n = columns['n']
        metrics[f'rewards_{split}/{side}'] = columns['reward'].mean()
        metrics[f'length_{split}/{side}'] = n.mean()
        # a reward model has scores alone
        if 'pi' in columns:
            metrics[f'logps_{split}/{side}'] = columns['pi'].mean()
        # estimates of KL(reference || policy), as if the answers came from the reference
        if 'ref' in columns:
            log_ratio = columns['ref'] - columns['pi']
            metrics[f'kl_{split}/{side}'] = log_ratio.mean()
            metrics[f'kl_{split}/{side}_per_token'] = log_ratio.sum() / n.sum()
        if 'div' in columns:
            per_token = columns['div'].sum() / n.sum()
            metrics[f'divergence_{split}/{side}_per_token'] = per_token

    # the sides need not have the same number of examples, so this is a difference of means
    margin = chosen['reward'].mean() - rejected['reward'].mean()
    metrics[f'rewards_{split}/margins'] = margin
    metrics[f'rewards_{split}/accuracies'] = right.double().mean()
    return numbers(metrics)


def numbers(metrics):
    """Turn name -> tensor of one number into name -> float, rounded to ten decimals. Leave out NaN, the mean of no examples."""
    floats = {}
    for name, value in metrics.items():
        number = value.item()
        if not math.isnan(number):
            floats[name] = round(number, 10)
    return floats


def meaning(loss, paired, has_reference):
    """Return a note on what acc and margin on the screen are, or None if they are those of a pair's rewards.

    loss: its name; paired: whether it is one of pairs; has_reference: whether rewards are log-ratios to a reference."""
    sentences = []
    # kto: a single answer is right if its reward is on its own side of z
    if not paired:
        acc = 'acc is the share of answers on the right side'
        sentences.append(f'{acc}, margin the mean reward of good less that of bad ones')
    if not has_reference:
        policy_alone = 'rewards, acc and margin are of the policy alone, and do not begin at 0'
        sentences.append(f'{loss} has no reference: {policy_alone}')
    if not sentences:
        return None
    return f'note: {"; ".join(sentences)}'
