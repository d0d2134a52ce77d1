"""The metrics of preference training in dpo.py and reward.py; their names do not depend on the loss."""

import math


def of_preferences(split, loss, chosen, rejected, right):
    """Return the metrics of a training step or an evaluation as name -> float.

    split: 'train' or 'eval', part of the names; loss: scalar tensor; chosen, rejected: name -> tensor (examples,) with
    reward, n (answer tokens), and optionally pi, ref (log-probs) and div; right: mask of correctly ranked examples."""
    metrics = {f'loss/{split}': loss}
    for side, columns in {'chosen': chosen, 'rejected': rejected}.items():
        # means over examples; *_per_token: means over all tokens
        n = columns['n']
        metrics[f'rewards_{split}/{side}'] = columns['reward'].mean()
        metrics[f'length_{split}/{side}'] = n.mean()
        # reward models have no log-probs
        if 'pi' in columns:
            metrics[f'logps_{split}/{side}'] = columns['pi'].mean()
        # estimates of KL(reference || policy), assuming that the answers were sampled from the reference
        if 'ref' in columns:
            log_ratio = columns['ref'] - columns['pi']
            metrics[f'kl_{split}/{side}'] = log_ratio.mean()
            metrics[f'kl_{split}/{side}_per_token'] = log_ratio.sum() / n.sum()
        if 'div' in columns:
            metrics[f'divergence_{split}/{side}_per_token'] = columns['div'].sum() / n.sum()

    # a difference of means: the two sides may differ in their number of examples
    margin = chosen['reward'].mean() - rejected['reward'].mean()
    metrics[f'rewards_{split}/margins'] = margin
    metrics[f'rewards_{split}/accuracies'] = right.double().mean()
    return numbers(metrics)


def numbers(metrics):
    """Convert name -> scalar tensor to name -> float, rounded to ten decimals, without NaN (means of no examples)."""
    floats = {name: value.item() for name, value in metrics.items()}
    return {name: round(number, 10) for name, number in floats.items() if not math.isnan(number)}


def meaning(loss, paired, has_reference):
    """Return a note on what acc and margin on the screen mean, or None if they are those of a pair's rewards.

    loss: name; paired: the loss compares pairs; has_reference: rewards are log-ratios to a reference."""
    sentences = []
    # kto: good answers are right if their reward is above its reference point z, bad ones if it is below
    if not paired:
        acc = 'acc is the share of answers on the right side'
        sentences.append(f'{acc}, margin the mean reward of good less that of bad ones')
    if not has_reference:
        policy_alone = 'rewards, acc and margin are of the policy alone, and do not begin at 0'
        sentences.append(f'{loss} has no reference: {policy_alone}')
    if not sentences:
        return None
    return f'note: {"; ".join(sentences)}'
