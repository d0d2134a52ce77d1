"""The metrics of preference training in dpo.py and reward.py; their names do not depend on the loss."""

import math

import losses


def of_preferences(split, loss, chosen, rejected, is_right):
    """Return the metrics of a training step or an evaluation as name -> float.

    split: 'train' or 'eval', part of the names; loss: scalar tensor; chosen, rejected: name -> tensor (examples,) with
    reward, n (answer tokens), and optionally pi, ref (log-probs) and div; is_right: mask of correctly ranked examples."""
    metrics = {f'loss/{split}': loss}
    for side, columns in {'chosen': chosen, 'rejected': rejected}.items():
        # means over examples; *_per_token: means over all tokens
        n = columns['n']
        metrics[f'rewards_{split}/{side}'] = columns['reward'].mean()
        metrics[f'length_{split}/{side}'] = n.mean()
        if 'pi' in columns:  # reward models have no log-probs
            metrics[f'logps_{split}/{side}'] = columns['pi'].mean()
        # estimates of KL(reference || policy), as if the answers were samples of the reference
        if 'ref' in columns:
            ref_to_policy = columns['ref'] - columns['pi']
            metrics[f'kl_{split}/{side}'] = ref_to_policy.mean()
            metrics[f'kl_{split}/{side}_per_token'] = ref_to_policy.sum() / n.sum()
        if 'div' in columns:
            metrics[f'divergence_{split}/{side}_per_token'] = columns['div'].sum() / n.sum()

    # a difference of means: the two sides may differ in their number of examples
    margin = chosen['reward'].mean() - rejected['reward'].mean()
    metrics[f'rewards_{split}/margins'] = margin
    metrics[f'rewards_{split}/accuracies'] = is_right.double().mean()
    return numbers(metrics)


def of_dpo(objective, columns, split):
    """Return the metrics of dpo.py (name -> float) from the columns of a step or an evaluation.

    objective: a runtime.objective.Objective; split: 'train' or 'eval'."""
    loss, weight = columns['loss'], columns['weight']
    mean_loss = (weight * loss).sum() / weight.sum()
    beta_prime = objective.options['beta_prime']
    if beta_prime:
        # Dr. DPO minimises -beta' log mean exp(-loss / beta'), where mean is weighted, too
        log_mean = (weight.log() - loss / beta_prime).logsumexp(0) - weight.sum().log()
        mean_loss = -beta_prime * log_mean

    # a pair is right if the chosen answer has the higher reward
    if objective.paired:
        chosen, rejected = (answers_of(objective, columns, side) for side in ('_w', '_l'))
        is_right = chosen['reward'] > rejected['reward']
    else:
        # a single answer is right if it is good and its reward is above that of kto's z (other losses: 0), or bad and below
        is_good, answers = columns['good'], answers_of(objective, columns, '')
        chosen = {name: values[is_good] for name, values in answers.items()}
        rejected = {name: values[~is_good] for name, values in answers.items()}
        threshold = objective.options['beta'] * columns.get('z', 0.0)
        is_right = (answers['reward'] > threshold) == is_good
    metrics = of_preferences(split, mean_loss, chosen, rejected, is_right)
    # unlike rewards, plain log-ratios are comparable across losses
    if objective.paired and objective.needs_ref:
        accuracy = (chosen['ratio'] > rejected['ratio']).double().mean()
        metrics |= numbers({f'logratio_{split}/accuracies': accuracy})
    return metrics


def of_samples(logratio, tokens):
    """Return the KL of policy and reference (name -> float): the mean log-ratio of the policy's own samples.

    logratio, tokens: log-prob under the policy minus that under the reference, and length, of n samples, (n,) each."""
    per_token = logratio.sum() / tokens.sum()
    return {'kl_eval/samples': logratio.mean().item(), 'kl_eval/samples_per_token': per_token.item()}


def answers_of(objective, columns, side):
    """Return the columns of one side, pi_w as 'pi' and so on, plus log-ratios ('ratio') and implicit rewards ('reward').

    side: '_w' for chosen answers, '_l' for rejected ones, '' for single answers."""
    answers = {name.removesuffix(side): values for name, values in columns.items() if name.endswith(side)}
    answers['ratio'] = answers['pi'] - answers.get('ref', 0.0)
    # the reward is what this loss compares: the log-ratio, perhaps scaled by beta, with the divergence, or per token
    terms = {name: objective.options[name] for name in ('beta', 'alpha') if objective.uses[name]}
    if objective.has_divergence:
        terms['div'] = answers['div']
    if objective.is_per_token:
        terms['n'] = answers['n']
    answers['reward'] = losses.reward(answers['ratio'], **terms)
    return answers


def numbers(metrics):
    """Convert name -> scalar tensor to name -> float, rounded to ten decimals. Leaves out NaN, the mean of no examples."""
    floats = {name: value.item() for name, value in metrics.items()}
    return {name: round(number, 10) for name, number in floats.items() if not math.isnan(number)}


def say_first_step(objective, columns, metrics, say):
    """Print loss and rewards before the first step and what this loss should be; warn if rewards are not 0 where policy and
    reference are the same model. columns, metrics: of the first step; say(sentence): prints it."""
    # a step without rejected answers, say, has no such metric
    chosen, rejected = (metrics.get(f'rewards_train/{side}', 0.0) for side in ('chosen', 'rejected'))
    sentence = f'step 0: rewards {chosen:.6f}, {rejected:.6f}; loss {columns["loss"].mean():.6f}'
    if objective.needs_ref:
        sentence += f' ({objective.name} of a policy that is its reference: {objective.loss_of_reference(columns):.6f})'
    say(sentence)
    if note := note_on_accuracy(objective.name, objective.paired, objective.needs_ref):
        say(note)
    options = objective.options
    is_rounded = options['dtype'] == 'bfloat16' or options['tf32']
    allowed = 1e-2 if is_rounded else 1e-4
    is_same_model = objective.needs_ref and options['ref_model'] is None
    if is_same_model and max(abs(chosen), abs(rejected)) > allowed:
        say('warning: policy and reference are one model, so the rewards should be 0 before the first step')


def note_on_accuracy(loss, paired, has_reference):
    """Return a note on what acc and margin on the screen mean, or None if they are those of pairs' rewards to a reference.

    loss: name; paired: the loss compares pairs; has_reference: rewards are log-ratios to a reference."""
    sentences = []
    # the right side for a good answer is above kto's z, for a bad one below, see of_dpo
    if not paired:
        acc = 'acc is the share of answers on the right side'
        sentences.append(f'{acc}, margin the mean reward of good less that of bad ones')
    if not has_reference:
        policy_alone = 'rewards, acc and margin are of the policy alone, and do not begin at 0'
        sentences.append(f'{loss} has no reference: {policy_alone}')
    if not sentences:
        return None
    return f'note: {"; ".join(sentences)}'
