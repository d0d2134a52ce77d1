"""The metrics of preference training in dpo.py and reward.py; their names do not depend on the loss."""

import math

import losses


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


def of_dpo(objective, columns, split):
    """Return the metrics of dpo.py (name -> float) from the columns of a step or an evaluation.

    objective: a runtime.objective.Objective; split: 'train' or 'eval'."""
    loss, weight = columns['loss'], columns['weight']
    mean_loss = (weight * loss).sum() / weight.sum()
    beta_prime = objective.options['beta_prime']
    if beta_prime:
        # the objective whose gradient the weights of Dr. DPO give: -beta' log mean exp(-loss / beta')
        log_mean = (weight.log() - loss / beta_prime).logsumexp(0) - weight.sum().log()
        mean_loss = -beta_prime * log_mean

    # accuracy: pairs whose chosen reward is higher; single answers on the right side of kto's z (or of 0)
    if objective.paired:
        chosen, rejected = (answers_of(objective, columns, side) for side in ('_w', '_l'))
        is_right = chosen['reward'] > rejected['reward']
    else:
        is_good, answers = columns['good'], answers_of(objective, columns, '')
        chosen = {name: values[is_good] for name, values in answers.items()}
        rejected = {name: values[~is_good] for name, values in answers.items()}
        is_right = (answers['reward'] > objective.options['beta'] * columns.get('z', 0.0)) == is_good
    found = of_preferences(split, mean_loss, chosen, rejected, is_right)
    # unlike rewards, plain log-ratios are comparable across losses
    if objective.paired and objective.needs_ref:
        accuracy = (chosen['ratio'] > rejected['ratio']).double().mean()
        found |= numbers({f'logratio_{split}/accuracies': accuracy})
    return found


def answers_of(objective, columns, side):
    """Return the columns of one side, without its suffix, plus their log-ratios and implicit rewards.

    side: '_w' for chosen answers, '_l' for rejected ones, '' for single answers."""
    answers = {name.removesuffix(side): values for name, values in columns.items() if name.endswith(side)}
    answers['ratio'] = answers['pi'] - answers.get('ref', 0.0)
    # the reward is the quantity that this loss compares: scaled by beta, with its divergence, or per token
    parts = {name: objective.options[name] for name in ('beta', 'alpha') if objective.uses[name]}
    if objective.has_divergence:
        parts['div'] = answers['div']
    if objective.is_per_token:
        parts['n'] = answers['n']
    answers['reward'] = losses.reward(answers['ratio'], **parts)
    return answers


def numbers(metrics):
    """Convert name -> scalar tensor to name -> float, rounded to ten decimals, without NaN (means of no examples)."""
    floats = {name: value.item() for name, value in metrics.items()}
    return {name: round(number, 10) for name, number in floats.items() if not math.isnan(number)}


def say_first_step(objective, columns, found, say):
    """Print loss and rewards before the first step and what this loss should be; warn if rewards are not 0 where policy and
    reference are the same model. columns, found: columns and metrics of the step; say(sentence): prints it."""
    # a step without, say, rejected answers has no such metric
    chosen, rejected = (found.get(f'rewards_train/{side}', 0.0) for side in ('chosen', 'rejected'))
    said = f'step 0: rewards {chosen:.6f}, {rejected:.6f}; loss {columns["loss"].mean():.6f}'
    if objective.needs_ref:
        said += f' ({objective.name} of a policy that is its reference: {objective.loss_of_reference(columns):.6f})'
    say(said)
    if explanation := meaning(objective.name, objective.paired, objective.needs_ref):
        say(explanation)
    options = objective.options
    is_rounded = options['dtype'] == 'bfloat16' or options['tf32']
    allowed = 1e-2 if is_rounded else 1e-4
    is_same_model = objective.needs_ref and options['ref_model'] is None
    if is_same_model and max(abs(chosen), abs(rejected)) > allowed:
        say('warning: policy and reference are one model, so the rewards should be 0 before the first step')


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
