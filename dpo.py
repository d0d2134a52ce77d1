"""Train a language model on preferences, with any loss of losses.py, on one process or many.

    python dpo.py config/drdpo_toy.py --model=out/sft_toy/model
    torchrun --nproc_per_node=4 dpo.py config/drdpo_hh.py --model=out/sft_hh/model

One step: columns of every example (log-probs of its answers under policy and reference) -> the step's statistic, if the loss has
one -> loss and weight of every example -> one gradient, that of the weighted mean loss over the whole step. The result does not
depend on the number of ranks or microbatches. The length and rhythm of a run are counted in examples, except warmup_steps.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

from functools import partial

import numpy as np
import torch

import fsdp
import losses
import training
from configurator import UserError, configure
from data import move
from hf import lora
from hf.load import check_same_tokens, load_model
from hf.probe import check_heads
from hf.reference import cached_logps
from model import RISKS, kl
from runtime import check_loss, log, metrics
from text.examples import Examples

# model and data
model = 'toy'  # hub id, local folder, or 'toy'
ref_model: str | None = None  # the reference; None: the model as it is before training
data = 'toy'  # hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
noise_rate = 0.0  # fraction of training pairs whose labels are flipped
frac_good = 1.0  # kto, kto_zero: keep this fraction of the good answers
frac_bad = 1.0  # kto, kto_zero: keep this fraction of the bad answers
max_length = 512  # tokens of prompt and answer
max_prompt_length: int | None = None  # a prompt is cut to this if the whole is too long; None: half of max_length
# loss
loss = 'dpo'  # dpo, drdpo, ipo, kto, ...: the README's table, or losses.LOSSES
beta = 0.1  # strength of the pull towards the reference; simpo, cpo: scale of the margin
label_smoothing: float | None = None  # e of cdpo, robust, exo (None: 0.1) and of drdpo, aot (None: 0)
reference_free = False  # a reference that gives every answer log-prob 0
average = True  # ipo: log-ratios per token
beta_prime: float | None = None  # Dr. DPO's weight exp(-loss / beta') on any loss; None: 1 for drdpo, else off
rho = 0.2  # beta_dpo: fraction of pairs filtered out
a = 0.6  # beta_dpo: how far beta follows the margins
alpha = 0.5  # tdpo2, radpo2: weight of the divergence
risk = 'cvar'  # radpo1, radpo2: cvar, erm or released
mu = 0.98  # radpo1, radpo2: tail mass of cvar, risk aversion of erm, confidence level of released
w_good = 1.0  # kto, kto_zero: weight of good answers
w_bad = 1.0  # kto, kto_zero: weight of bad answers
delta = 1.0  # slic: margin
lam = 0.1  # slic, orpo: weight of the second term; dpop: of the penalty (its paper: 50)
gamma = 1.0  # simpo: target margin
tau = 0.05  # discopop: temperature
sft_coef = 0.0  # adds this times the chosen answer's NLL per token
importance = False  # multiplies the loss by exp(log-ratio of the rejected answer), no gradient
importance_max = 10.0  # the most that this factor can be
# steps
n_epochs = 1  # passes over the data
n_examples: int | None = None  # stop after so many examples; None: n_epochs decides
batch_size = 64  # examples of one optimizer step, all ranks together
lr = 5e-7  # learning rate
warmup_steps = 150  # steps of linear warm-up
seed = 0  # of the data order, the flips, the statistics, the samples
share_prefix = True  # compute the prompt of a pair once
cache_ref = False  # reference log-probs from a file, computed once: pays from the second epoch or run on
# output and samples
out_dir = 'out/dpo'  # everything the run leaves behind
sample_during_eval = False  # sample answers of policy and reference into samples.jsonl
n_eval_model_samples = 16  # how many answers of each model
max_new_tokens = 128  # length of a sample
temperature = 1.0  # of the samples; 0: greedy
top_p = 1.0  # of the samples
config = configure(globals(), shared=training)

# ---- what the loss asks for: its signature says ----

# the formula, and for some losses a function that first computes a statistic over the whole step
loss_fn, statistic_fn = check_loss.find(loss, losses.LOSSES, losses.STATISTICS, config)
inputs = check_loss.inputs(loss_fn, statistic_fn)  # the names of their parameters
paired = bool({'pi_w', 'ratio_w'} & inputs)  # False: single answers, each labelled good or bad
has_ratio = bool({'ratio', 'ratio_w'} & inputs)  # a log-ratio of policy and reference
has_risk = loss.startswith('radpo')
# for losses with a divergence of policy from reference at each position: (n, V) log-probs of both -> (n,), mass (n, V)
divergence = None
if 'div_w' in inputs:
    divergence = partial(RISKS[risk], mu=mu) if has_risk else kl

# ---- what the options mean together ----

# for each option that only some losses use: whether this one does
every_input = check_loss.inputs(*losses.LOSSES.values(), *losses.STATISTICS.values())
uses = {name: name in inputs for name in every_input}
# these are not in the formulas' signatures
uses |= {'reference_free': has_ratio and not divergence, 'sft_coef': paired, 'risk': has_risk, 'mu': has_risk}
uses |= dict.fromkeys(('importance', 'importance_max'), has_ratio and paired)
uses |= dict.fromkeys(('frac_good', 'frac_bad'), not paired)

# an option without effect is an error on the command line; in a config file it is ignored, with a note
config.ignored([name for name in config if not uses.get(name, True)], f'the loss {loss} does not use it')
importance = importance and uses['importance']
sft_coef = sft_coef if uses['sft_coef'] else 0.0
needs_ref = has_ratio and not (reference_free and uses['reference_free'])
config.ignored([] if importance else ['importance_max'], 'importance is off')
config.ignored([] if needs_ref else ['ref_model'], 'there is no reference')

# defaults that depend on the loss
if label_smoothing is None or not uses['label_smoothing']:
    label_smoothing = 0.1 if loss in ('cdpo', 'robust', 'exo') else 0.0
if beta_prime is None and loss == 'drdpo':
    beta_prime = 1.0

# invalid combinations: error message -> whether it applies
too_smooth = not 0 <= label_smoothing < 0.5 or (loss == 'exo' and label_smoothing == 0)
mistakes = {
    f'label_smoothing must lie between 0 and 0.5 (exo: above 0), not {label_smoothing}': too_smooth,
    f'mu must lie between 0 and 1 for the risk {risk}, not {mu}': has_risk and risk != 'erm' and mu > 1,
    '--importance is a ratio to the reference: leave out --reference_free': importance and not needs_ref,
    f'--cache_ref: the loss {loss} has no reference to cache': cache_ref and not needs_ref,
    f'--cache_ref: the loss {loss} needs the live reference': cache_ref and (divergence or loss == 'kto'),
    'kto compares examples of a step with one another: batch_size must be 2 or more': loss == 'kto' and batch_size < 2,
}
for sentence, is_so in mistakes.items():
    if is_so:
        raise UserError(sentence)

# ---- set-up ----

# process group and out_dir; then data and policy
run = training.begin(config)
if ref_model and needs_ref:
    check_same_tokens(run.tokenizer, ref_model, f'the reference {ref_model}', model, training.trust_remote_code)
run.load_data(task='pairs' if paired else 'singles')
run.load_policy(partial(load_model, model, adapters=run.adapters, **run.model_options()))
mixed = loss == 'kto'  # its KL estimate pairs prompts with answers to other prompts
longest = min(max_length, max(run.train.longest(mixed), run.held_out.longest(mixed)))
# a policy with adapters is its own reference while they are switched off
is_policy = run.adapters and ref_model is None
is_loaded = needs_ref and not cache_ref and not is_policy
run.choose_attention(longest, share_prefix=share_prefix, frozen=int(is_loaded))

# the reference model, or with cache_ref its log-probs from a file; then it is loaded only if there is no such file yet
ref_options = {'adapters': lora.reference_options(config, run.adapters), **run.model_options()}
build_ref = partial(load_model, ref_model or model, **ref_options)
make_ref = (lambda: run.policy) if is_policy else partial(run.load_frozen, build_ref, longest)
ref = make_ref() if needs_ref and not cache_ref else None
if divergence:
    check_heads(run.policy, ref)
if cache_ref:
    # the pass that fills the cache keeps no activations, so microbatches can be larger
    larger = partial(run.make_batches, max_tokens=4 * run.max_tokens)
    # only the rows that this run trains on; for single answers those are not known yet, so all rows
    used = run.used_rows() if paired else slice(None)
    for examples, rows in ((run.train, used), (run.held_out, slice(None))):
        if len(examples):
            cached_logps(build_ref, make_ref, examples, larger, training.dtype, rows)
if cache_ref and sample_during_eval:
    log.say("note: with --cache_ref the reference is not there to be sampled: samples are the policy's, without kl")

# label flips and fractions depend on a hash of each example, so they are the same in every run
run.train = run.train.flip(noise_rate, seed)
if not paired:
    run.train = run.train.keep(frac_good, frac_bad, seed)
if loss == 'kto' and len(run.train) == 1:
    raise UserError(f'kto compares an answer with that of another example, and the training data {data!r} has one only')
run.say_data()
run.check_room(ref)

# ---- one step ----


def measure(batch, paired=paired):
    """Run policy and reference on a microbatch of A answers and return its columns, a dict of (A,) tensors.

    pi: log-prob under the policy (with graph); n: number of tokens; ref: log-prob under the reference, if any; div: divergence,
    if the loss has one. Pairs are split into chosen and rejected: pi_w and pi_l, n_w and n_l, ... of shape (A / 2,)."""
    # reference (its methods are functions of model.py, see fsdp.shard): cached, or a forward pass; for a divergence its hidden states
    reference, ref_logps = None, batch.ref
    with torch.no_grad(), lora.adapters_off(ref):
        if divergence:
            reference = ref.hidden_and_head(batch)
        elif ref is not None:
            (ref_logps,) = ref.response_logps(batch)

    # policy: (1, A) log-probs, or (3, A) with divergences and the reference's log-probs
    pi, *with_divergence = run.policy.response_logps(batch, divergence, reference)
    columns = {'pi': pi, 'n': batch.n.float()}
    if divergence:
        columns['div'], ref_logps = with_divergence
    if ref_logps is not None:
        columns['ref'] = ref_logps
    if not paired:
        return columns
    # answers alternate, in the order of Examples: chosen, rejected, chosen, rejected, ...
    chosen = {f'{name}_w': values[0::2] for name, values in columns.items()}
    rejected = {f'{name}_l': values[1::2] for name, values in columns.items()}
    return chosen | rejected


def call(fn, columns):
    """Call a function of losses.py with the options, columns and log-ratios that its signature asks for.

    Columns override options of the same name: beta_dpo's statistic provides its own beta."""
    known = {**config, 'label_smoothing': label_smoothing, **columns}
    for name, log_probs in columns.items():
        if name.startswith('pi'):
            # without a reference the log-ratio is the policy's log-prob
            ref_log_probs = columns.get(name.replace('pi', 'ref'), 0.0)
            known[name.replace('pi', 'ratio')] = log_probs - ref_log_probs
    return check_loss.call(fn, known)


def step_statistic(step, backward):
    """Compute the statistic over a step (such as the mean margin for beta_dpo) that its loss needs before the gradient.

    Returns (columns of the statistic, (examples of the step,) each; its new state, a dict; measured columns or None). If the
    step is a single microbatch, it is measured with a graph and returned, so that backward need not repeat the forward pass."""
    batches, suffix = step.batches, ''
    # kto estimates its KL on prompts paired with answers to other prompts: columns pi_kl, ref_kl
    if mixed:
        others = step.examples.mismatched(step.rows, longest, more=run.train)
        batches, *_ = run.make_batches(others, np.arange(len(others)))
        suffix = '_kl'
    reusable = backward and len(batches) == 1 and not mixed
    with torch.set_grad_enabled(reusable):
        parts = [measure(batch) for batch in batches]

    # all ranks see the columns of the whole step, so they compute the same statistic
    gathered = training.gather(parts, batches, len(step.rows))
    columns = {f'{name}{suffix}': values for name, values in gathered.items()}
    columns['generator'] = torch.Generator().manual_seed(seed * 1_000_003 + step.first)  # a different seed every step
    columns['state'] = run.state['statistic']
    given, new_state = call(statistic_fn, columns)
    given = {name: values.float() for name, values in given.items()}
    return given, new_state, parts[0] if reusable else None


def loss_and_weight(measured, step_columns, slots):
    """Return loss and weight of each example in a microbatch, (examples,) each.

    measured: the microbatch's columns; step_columns: those of the whole step (statistic, labels); slots: each example's index
    in the step, -1 for a filler, whose loss is masked out later."""
    columns = measured | {name: move(values[slots], run.device) for name, values in step_columns.items()}
    # the formula, and optional terms on top of it
    loss = call(loss_fn, columns)
    if importance:
        loss = loss * call(losses.importance, columns)
    if sft_coef:
        loss = loss + sft_coef * losses.sft(measured['pi_w'], measured['n_w'])
    return loss, columns.get('weight', torch.ones_like(loss))


def run_step(step, backward=False, shift=None):
    """Run forward, and optionally backward, on one step. Returns (its columns in step order, new state of the statistic).

    After backward and fsdp.average_gradients, gradients are sum_i w_i grad loss_i over the step's examples, divided by the number
    of ranks; w is the column step_weight. shift: of the weights of Dr. DPO; None: the smallest loss of the first microbatch."""
    # 1. what depends on the whole step: the statistic, and the labels of single answers
    step_columns, new_state, already_measured = {}, run.state['statistic'], None
    if statistic_fn:
        step_columns, new_state, already_measured = step_statistic(step, backward)
    if not paired:
        step_columns['good'] = step.labels['good']

    # 2. microbatch by microbatch: columns, loss and weight, gradient
    parts = []
    for batch in step.batches:
        with torch.set_grad_enabled(backward):
            # already measured only if the step is a single microbatch
            measured = already_measured or measure(batch)
            loss, weight = loss_and_weight(measured, step_columns, batch.slot)
        step_weight = weight
        if beta_prime:
            # Dr. DPO: weights exp((shift - loss) / beta'). The shift cancels when weights are normalized; it avoids overflow
            if shift is None:
                shift = fsdp.smallest(torch.where(batch.real, loss.detach(), torch.inf))
            step_weight = weight * losses.drdpo_weight(loss.detach(), shift, beta_prime=beta_prime)
        if backward:
            (step_weight * loss * batch.real).sum().backward()
        parts.append(measured | {'loss': loss, 'weight': weight, 'step_weight': step_weight})

    # 3. columns of the whole step, for metrics and for normalizing by the sum of weights
    columns = training.gather(parts, step.batches, len(step.rows))
    if not paired:
        columns |= step_columns

    # rare: a later loss is so far below the shift that its weight exceeds e^20, and the squared gradient norm would overflow.
    # Discard the gradients and rerun the step with its smallest loss as the shift
    smallest = columns['loss'].min()
    if backward and beta_prime and smallest < shift.cpu() - 20 * beta_prime:
        run.optimizer.zero_grad(set_to_none=True)
        return run_step(step, backward, shift=smallest.to(shift))
    return columns, new_state


# ---- metrics ----


def answers_of(columns, side):
    """Return the columns of one side, without its suffix, plus their log-ratios and implicit rewards.

    side: '_w' for chosen answers, '_l' for rejected ones, '' for single answers."""
    answers = {name.removesuffix(side): values for name, values in columns.items() if name.endswith(side)}
    answers['ratio'] = answers['pi'] - answers.get('ref', 0.0)
    # the reward is the quantity that this loss compares: scaled by beta, with its divergence, or per token
    parts = {name: config[name] for name in ('beta', 'alpha') if uses[name]}
    if divergence:
        parts['div'] = answers['div']
    per_token = 'n_l' in inputs and (loss != 'ipo' or average)
    if per_token:
        parts['n'] = answers['n']
    answers['reward'] = losses.reward(answers['ratio'], **parts)
    return answers


def summary(columns, split):
    """Return metrics (name -> float) from the columns of a step or an evaluation. split: 'train' or 'eval'."""
    loss, weight = columns['loss'], columns['weight']
    objective = (weight * loss).sum() / weight.sum()
    if beta_prime:
        # the objective whose gradient the weights of Dr. DPO give: -beta' log mean exp(-loss / beta')
        log_mean = (weight.log() - loss / beta_prime).logsumexp(0) - weight.sum().log()
        objective = -beta_prime * log_mean

    # accuracy: pairs whose chosen reward is higher; single answers on the right side of kto's z (or of 0)
    if paired:
        chosen, rejected = answers_of(columns, '_w'), answers_of(columns, '_l')
        is_right = chosen['reward'] > rejected['reward']
    else:
        is_good, answers = columns['good'], answers_of(columns, '')
        chosen = {name: values[is_good] for name, values in answers.items()}
        rejected = {name: values[~is_good] for name, values in answers.items()}
        is_right = (answers['reward'] > beta * columns.get('z', 0.0)) == is_good
    found = metrics.of_preferences(split, objective, chosen, rejected, is_right)
    # unlike rewards, plain log-ratios are comparable across losses
    if paired and needs_ref:
        accuracy = (chosen['ratio'] > rejected['ratio']).double().mean()
        found |= metrics.numbers({f'logratio_{split}/accuracies': accuracy})
    return found


# ---- evaluation ----


def log_ratios(prompts, answers):
    """Return the log-ratios (policy minus reference, in nats) and token counts of n sampled answers, (n,) each."""
    examples = Examples.of([(prompt, [answer]) for prompt, answer in zip(prompts, answers, strict=True)])
    batches, *_ = run.make_batches(examples, np.arange(len(answers)))
    with torch.no_grad(), run.memory(batches):
        parts = [measure(batch, paired=False) for batch in batches]
    columns = training.gather(parts, batches, len(answers))
    return {'logratio': columns['pi'] - columns['ref'], 'tokens': columns['n'].long()}


def sample(seen):
    """Sample answers of policy and reference to held-out prompts into samples.jsonl. Returns KL metrics.

    Returns {} if there is no live reference, or no held-out prompt."""
    # both answer the same prompts, from the same seeds
    models = {'policy': run.policy, 'reference': ref} if ref else {'policy': run.policy}
    measured = run.sample(models, seen, ref and log_ratios)
    if 'policy' not in measured:
        return {}
    # the log-ratio of the policy's own samples, on average, is the KL
    ratio, tokens = measured['policy'].values()
    return {'kl_eval/samples': ratio.mean().item(), 'kl_eval/samples_per_token': (ratio.sum() / tokens.sum()).item()}


def evaluate(seen):
    """Log metrics on the held-out examples, and optionally samples. Does not change the statistic's state."""
    run.evaluate(seen, lambda step: run_step(step)[0], summary, sample)


# ---- training ----


@torch.no_grad()
def check_first_step():
    """Sanity check before training: log and print loss and rewards of the first step.

    Raises UserError if no loss is finite. Warns if rewards are not 0 although policy and reference are the same model."""
    columns, _ = run.compute(next(run.steps()), run_step)
    if not columns['loss'].isfinite().any():
        raise UserError('before the first step the loss is no number: weights of the model or its reference are broken')
    found = summary(columns, 'train')
    run.logger.row('check', 0, found)
    # a step without, say, rejected answers has no such metric
    chosen, rejected = (found.get(f'rewards_train/{side}', 0.0) for side in ('chosen', 'rejected'))
    said = f'step 0: rewards {chosen:.6f}, {rejected:.6f}; loss {columns["loss"].mean():.6f}'

    # the loss if the policy equaled its reference: replace the ref columns by the pi columns
    if needs_ref:
        policy_as_ref = {name.replace('pi', 'ref'): x for name, x in columns.items() if name.startswith('pi')}
        # an input of the loss aot, from its statistic; the other losses do not ask for it
        no_shift = {'shift': torch.zeros_like(columns['loss'])}
        expected = call(loss_fn, no_shift | columns | policy_as_ref).mean()
        said += f' ({loss} of a policy that is its reference: {expected:.6f})'
    run.logger.say(said)
    if explanation := metrics.meaning(loss, paired, needs_ref):
        run.logger.say(explanation)

    is_rounded = training.dtype == 'bfloat16' or training.tf32
    allowed = 1e-2 if is_rounded else 1e-4
    policy_is_ref = needs_ref and ref_model is None
    if policy_is_ref and max(abs(chosen), abs(rejected)) > allowed:
        run.logger.say('warning: policy and reference are one model, so the rewards should be 0 before the first step')


run.start(f'{loss} ')
if not run.seen:
    check_first_step()
if run.eval_due_at_start():
    evaluate(run.seen)
for step in run.steps():
    columns, new_state = run.compute(step, run_step, backward=True)
    if run.update(step, columns, weight=columns['step_weight'].sum()):
        run.state['statistic'] = new_state
    run.log_step(step, summary(columns, 'train'))
    if run.eval_due(step):
        evaluate(step.seen)
    run.finish_step(step)
evaluate(run.total)
run.finish()
if __name__ == '__main__':
    fsdp.leave()
