"""The metrics of preference training in dpo.py and reward.py; their names do not depend on the loss."""

import math

import losses
from runtime.files import say
from runtime.log import key_of


def of_preferences(split, loss, chosen, rejected, is_right):
    """Return the metrics of a training step or an evaluation as name -> float.

    split: 'train' or 'eval', part of the names; loss: scalar; is_right: mask of correctly ranked examples. chosen, rejected: name ->
    tensor (examples,): reward, n (tokens), and if there are any, pi, ref (log-probs of policy and reference), div (divergence)."""
    metrics = {'loss': loss}
    for side, columns in {'chosen': chosen, 'rejected': rejected}.items():
        n = columns['n']  # means over examples; *_per_token: means over all tokens
        metrics[f'rewards/{side}'] = columns['reward'].mean()
        metrics[f'length/{side}'] = n.mean()
        if 'pi' in columns:  # reward models have no log-probs
            metrics[f'logps/{side}'] = columns['pi'].mean()
        # estimates of KL(reference || policy), as if the answers were samples of the reference
        if 'ref' in columns:
            ref_to_policy = columns['ref'] - columns['pi']
            metrics[f'kl/{side}'] = ref_to_policy.mean()
            metrics[f'kl/{side}_per_token'] = ref_to_policy.sum() / n.sum()
        if 'div' in columns:
            metrics[f'divergence/{side}_per_token'] = columns['div'].sum() / n.sum()

    # a difference of means: the two sides may differ in their number of examples
    metrics['rewards/margins'] = metrics['rewards/chosen'] - metrics['rewards/rejected']
    metrics['rewards/accuracies'] = is_right.double().mean()
    return floats({key_of(name, split): value for name, value in metrics.items()})


def of_dpo(objective, columns, split):
    """Return dpo.py's metrics, name -> float. columns: name -> tensor (examples,), of a step or evaluation; split: 'train' or 'eval'."""
    if objective.paired:
        chosen = answers_of(objective, columns, '_w')
        rejected = answers_of(objective, columns, '_l')
        is_right = chosen['reward'] > rejected['reward']
    else:
        answers = answers_of(objective, columns, '')
        is_good = columns['good']
        chosen = {name: values[is_good] for name, values in answers.items()}
        rejected = {name: values[~is_good] for name, values in answers.items()}
        # good answers shall have a reward above this, bad ones below; z is kto's estimate of the KL
        threshold = objective.options['beta'] * columns.get('z', 0.0)
        is_right = (answers['reward'] > threshold) == is_good
    # what a step minimises: the weighted mean loss, or with a beta_prime Dr. DPO's -beta' log mean exp(-loss / beta')
    loss = columns['loss']
    weight = columns['weight']
    beta_prime = objective.options['beta_prime']
    if beta_prime:
        log_mean = (weight.log() - loss / beta_prime).logsumexp(0) - weight.sum().log()
        mean_loss = -beta_prime * log_mean
    else:
        mean_loss = (weight * loss).sum() / weight.sum()
    metrics = of_preferences(split, mean_loss, chosen, rejected, is_right)
    # the rewards of losses differ in their formulas; plain log-ratios can be compared
    if objective.paired and objective.needs_ref:
        accuracy = (chosen['ratio'] > rejected['ratio']).double().mean()
        metrics |= floats({f'logratio_{split}/accuracies': accuracy})
    return metrics


def of_samples(logratio, tokens, split='eval'):
    """Return the KL from n samples of the policy. logratio (n,): their log-prob less that of the reference; tokens (n,): lengths."""
    per_token = logratio.sum() / tokens.sum()
    return floats({f'kl_{split}/samples': logratio.mean(), f'kl_{split}/samples_per_token': per_token})


def answers_of(objective, columns, side):
    """Return the columns of a side ('_w': chosen answers, '_l': rejected, '': single), pi_w as 'pi', say, plus 'ratio' and 'reward'."""
    answers = {name.removesuffix(side): values for name, values in columns.items() if name.endswith(side)}
    answers['ratio'] = answers['pi'] - answers.get('ref', 0.0)
    # the arguments of reward() besides the log-ratio: those that the loss's own formula has
    terms = {name: objective.options[name] for name in ('beta', 'alpha') if objective.uses[name]}
    if objective.has_divergence:
        terms['div'] = answers['div']
    if objective.is_per_token:
        terms['n'] = answers['n']
    answers['reward'] = losses.reward(answers['ratio'], **terms)
    return answers


def floats(metrics):
    """Convert name -> scalar tensor to name -> float, rounded to ten decimals. Leaves out NaN, the mean of no examples."""
    numbers = {name: value.item() for name, value in metrics.items()}
    return {name: round(number, 10) for name, number in numbers.items() if not math.isnan(number)}


def say_first_step(objective, columns, metrics, loss_and_weight):
    """Print loss and rewards before the first step, and what this loss should be. Warns if rewards should be 0, and are not."""
    # a step of single answers may have no chosen or no rejected one, and then no such metric
    chosen = metrics.get('rewards_train/chosen', 0.0)
    rejected = metrics.get('rewards_train/rejected', 0.0)
    sentence = f'step 0: rewards {chosen:z.6f}, {rejected:z.6f}; loss {columns["loss"].mean():.6f}'
    if objective.needs_ref:
        loss, _weight = loss_and_weight(objective.as_reference(columns), {}, ())
        sentence += f' ({objective.name} of a policy that is its reference: {loss.mean():.6f})'
    say(sentence)
    # say what acc and margin on the screen mean, if they are not of pairs or not relative to a reference
    if not objective.paired:
        say('note: acc is the share of answers on the right side, margin the mean reward of good less that of bad ones')
    if not objective.needs_ref:
        say(f'note: {objective.name} has no reference: rewards, acc and margin are of the policy alone, not 0 at first')
    options = objective.options
    is_coarse = options['dtype'] == 'bfloat16' or options['tf32']
    tolerance = 1e-2 if is_coarse else 1e-4
    is_same_model = objective.needs_ref and options['ref_model'] is None
    if is_same_model and max(abs(chosen), abs(rejected)) > tolerance:
        say('warning: policy and reference are one model, so the rewards should be 0 before the first step')
