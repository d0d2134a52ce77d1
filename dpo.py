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
from hf import lora, reference
from hf.load import check_same_tokens, load_model
from hf.probe import check_heads
from rl.divergences import divergence_of
from runtime import errors, metrics
from runtime.objective import objective_of
from runtime.prefetch import move

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
warmup_steps = 150  # optimizer steps of linear warm-up; unless it is set, at most a tenth of the run
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

# ---- the loss: its signature says what it asks for ----

objective = objective_of(config, losses.LOSSES, losses.STATISTICS)
paired, needs_ref = objective.paired, objective.needs_ref
is_mixed = objective.is_mixed  # kto: its statistic wants prompts with answers to other prompts
beta_prime = objective.options['beta_prime']
divergence = divergence_of(loss, risk, mu) if objective.has_divergence else None  # from the reference, at each position

# ---- set-up ----

run = training.Run(config)  # process group, out_dir, tokenizer
if ref_model and needs_ref:
    check_same_tokens(run.tokenizer, ref_model, f'the reference {ref_model}', model, training.trust_remote_code)
run.load_data(task='pairs' if paired else 'singles')  # text/tokenise.py: load_examples
run.load_policy(partial(load_model, model, adapters=run.adapters, **run.model_options()))
longest = min(max_length, max(run.train.longest(mixed=is_mixed), run.held_out.longest(mixed=is_mixed)))
# a policy with adapters is its own reference while they are switched off
ref_is_policy = run.adapters and ref_model is None
ref_is_loaded = needs_ref and not cache_ref and not ref_is_policy
run.set_batching(longest, share_prefix=share_prefix, n_models=int(ref_is_loaded))

# the reference model, or with cache_ref its log-probs from a file; then it runs only if there is no such file yet
ref_adapters = lora.reference_options(config, run.adapters)
build_ref = partial(load_model, ref_model or model, adapters=ref_adapters, **run.model_options())
make_ref = (lambda: run.policy) if ref_is_policy else partial(run.load_frozen, build_ref)
ref = make_ref() if needs_ref and not cache_ref else None
if divergence:
    check_heads(run.policy, ref)
if cache_ref and needs_ref:
    reference.use_cache(run, build_ref, make_ref, every_row=not paired)

# label flips and fractions depend on a hash of each example, so they are the same in every run
run.train = run.train.flip(noise_rate, seed)
if not paired:
    run.train = run.train.keep(frac_good, frac_bad, seed)
if is_mixed and len(run.train) == 1:
    raise UserError(f'{loss} compares an answer with that of another example, and {data!r} has one only to train on')
run.count_data()
run.check_room(ref)

# ---- one step ----


def measure(batch, as_pairs=paired):
    """Run policy and reference on a microbatch of A answers and return its columns, a dict of (A,) tensors.

    pi: log-prob under the policy (with graph); n: number of tokens; ref: log-prob under the reference, if any; div: divergence,
    if the loss has one. as_pairs: split into chosen and rejected, pi_w and pi_l, n_w and n_l, ... of shape (A / 2,)."""
    # run ref, the reference model, if there is one. Functions of model.py are methods of both models, see fsdp.shard
    ref_hidden, ref_logps = None, batch.ref  # batch.ref: log-probs read from a file by cache_ref, else None
    with torch.no_grad(), lora.adapters_off(ref):  # ref may be the policy itself, without its adapters
        if divergence:
            ref_hidden = ref.hidden_and_head(batch)  # response_logps makes log-probs of it, position by position
        elif ref is not None:
            (ref_logps,) = ref.response_logps(batch)

    # run the policy. With a divergence, the result has two more rows: divergences and the reference's log-probs
    pi, *more_rows = run.policy.response_logps(batch, divergence, ref_hidden)
    columns = {'pi': pi, 'n': batch.n.float()}
    if divergence:
        columns['div'], ref_logps = more_rows
    if ref_logps is not None:
        columns['ref'] = ref_logps
    if not as_pairs:
        return columns
    of_pairs = {}  # answers alternate, in the order of Examples: chosen, rejected, chosen, rejected, ...
    for name, values in columns.items():
        of_pairs[f'{name}_w'] = values[0::2]
        of_pairs[f'{name}_l'] = values[1::2]
    return of_pairs


def step_statistic(step, by_batch=None):
    """Call the loss's statistic on the whole step. Returns (more columns for the loss, (examples,) each; the statistic's new state).

    Those of beta_dpo are beta and weight, and its state is the running mean and std of margins, {'mean': 0.2, 'std': 1.1}.
    by_batch: the columns of this rank's microbatches, if measured already."""
    measured_step, suffix = step, ''
    # kto's statistic asks for other columns, pi_kl and ref_kl: those of the step's prompts, each with an answer to another prompt
    if is_mixed:
        mismatched = step.examples.mismatched(step.rows, longest, more=run.train)
        measured_step, suffix = run.make_step(mismatched, np.arange(len(mismatched))), '_kl'
    if by_batch is None:
        with torch.no_grad():
            by_batch = [measure(batch) for batch in measured_step.batches]

    # all ranks see the columns of the whole step, so they compute the same statistic
    gathered = fsdp.gather(by_batch, measured_step)
    inputs = {f'{name}{suffix}': values for name, values in gathered.items()}
    inputs['generator'] = torch.Generator().manual_seed(seed * 1_000_003 + step.first)  # a different seed every step
    inputs['state'] = run.state['statistic']
    statistic, new_state = objective.call(objective.statistic, inputs)
    return {name: values.float().expand(len(step.rows)) for name, values in statistic.items()}, new_state


def loss_and_weight(measured, step_columns, slots):
    """Return loss and weight of each example in a microbatch, (examples,) each.

    measured: columns of measure(batch). step_columns: columns of the whole step (statistic, labels). slots: index in the step of
    each example in the microbatch; -1 for a filler, which takes those of the step's last example: run_step masks its loss."""
    columns = measured | {name: move(values[slots], run.device) for name, values in step_columns.items()}
    # the formula of losses.py, called with what its signature names: columns, options, log-ratios (ratio_w = pi_w - ref_w)
    loss = objective.call(objective.fn, columns)
    if objective.options['importance']:
        loss = loss * objective.call(losses.importance, columns)
    if objective.options['sft_coef']:
        loss = loss + sft_coef * losses.sft(measured['pi_w'], measured['n_w'])
    return loss, columns.get('weight', torch.ones_like(loss))  # beta_dpo's statistic gives weights


def run_step(step, backward=False, shift=None):
    """Run forward, and optionally backward, on one step. Returns its columns, (examples,) each, in step order; sets step.new_state.

    After backward and fsdp.average_gradients, gradients are sum_i w_i grad loss_i over the step's examples, divided by the number
    of ranks; w is the column step_weight. shift: of Dr. DPO's weights, see below; None: the smallest loss of the first microbatch."""
    # 1. columns of the whole step: the statistic, and the labels of single answers
    step_columns, measured_before = {}, None
    if objective.statistic:
        # a single microbatch is measured once, for statistic and gradient (kto's statistic has microbatches of its own)
        if backward and len(step.batches) == 1 and not is_mixed:
            measured_before = [measure(step.batches[0])]
        step_columns, step.new_state = step_statistic(step, measured_before)
    if not paired:
        step_columns['good'] = step.labels['good']

    # 2. microbatch by microbatch: columns, loss and weight, gradient
    by_batch = []
    for batch in step.batches:
        with torch.set_grad_enabled(backward):
            measured = measured_before[0] if measured_before else measure(batch)
            loss, weight = loss_and_weight(measured, step_columns, batch.slot)
        step_weight = weight
        if beta_prime:
            # Dr. DPO: weights exp((shift - loss) / beta'). A shift common to the step avoids overflow, and cancels in its mean
            if shift is None:
                shift = fsdp.smallest(torch.where(batch.real, loss.detach(), torch.inf))
            step_weight = weight * losses.drdpo_weight(loss, shift, beta_prime=beta_prime)
        if backward:
            (step_weight.detach() * loss * batch.real).sum().backward()
        by_batch.append(measured | {'loss': loss, 'weight': weight, 'step_weight': step_weight})

    # 3. columns of the whole step, for metrics and for the sum of weights, by which run.update divides
    columns = step_columns | fsdp.gather(by_batch, step)

    # rare: the loss of a later microbatch is so far below the shift that its weight exceeds e^20. The squared gradient norm could
    # overflow: discard the gradients, and run the step again with its smallest loss as the shift
    smallest = columns['loss'].min()
    if backward and beta_prime and smallest < shift.cpu() - 20 * beta_prime:
        run.optimizer.zero_grad(set_to_none=True)
        return run_step(step, backward, shift=smallest.to(shift))
    return columns


# ---- evaluation ----

summary = partial(metrics.of_dpo, objective)  # (columns of a step or an evaluation, split) -> metrics


def log_ratios(examples):
    """Return the 'logratio' (log-probs of policy minus reference) and 'tokens' (lengths) of Examples of n answers, (n,) each."""
    step = run.make_step(examples, np.arange(len(examples)))
    with torch.no_grad(), errors.on_full_memory_of(step.batches, run.max_tokens):
        by_batch = [measure(batch, as_pairs=False) for batch in step.batches]
    columns = fsdp.gather(by_batch, step)
    return {'logratio': columns['pi'] - columns['ref'], 'tokens': columns['n'].long()}


def sample(seen):
    """Append answers of policy and reference to held-out prompts to samples.jsonl, after `seen` examples. Returns metrics.

    With a reference, the file has the log-ratio of each answer, and the metrics are the KL estimated from the policy's answers."""
    if not ref:
        return run.sample({'policy': run.policy}, seen)  # {}
    # name of the model -> what log_ratios has returned; {} after a stop signal
    measured = run.sample({'policy': run.policy, 'reference': ref}, seen, measure=log_ratios)
    return metrics.of_samples(**measured['policy']) if measured else {}


evaluate = partial(run.evaluate, run_step=run_step, summary=summary, sample=sample)

# ---- training ----


@torch.no_grad()
def check_first_step():
    """Log and print loss and rewards of the first step before training, and what they should be. UserError if no loss is finite."""
    columns = run.within_memory(run_step, next(run.steps()))  # training will take this step again
    if not columns['loss'].isfinite().any():
        raise UserError('before the first step the loss is no number: weights of the model or its reference are broken')
    found = summary(columns, 'train')
    run.logger.row('check', 0, found)
    metrics.say_first_step(objective, columns, found, loss_and_weight)
    run.policy.reshard()  # policy.parameters() are the trained weights again, of which somebody may take a mean


run.start(f'{loss}, weighted as Dr. DPO,' if beta_prime and loss != 'drdpo' else loss)
if not run.seen:
    check_first_step()
if run.eval_due_at_start():
    evaluate(run.seen)
for step in run.steps():  # data.py: steps, then make_batches
    columns = run.within_memory(run_step, step, backward=True)
    is_good = run.update(step, columns, weight=columns['step_weight'].sum())  # fsdp.py: update, by gradient / weight
    if is_good and objective.statistic:
        run.state['statistic'] = step.new_state
    run.log_step(step, summary(columns, 'train'))
    if run.eval_due(step):
        evaluate(step.seen)
    run.finish_step(step)
evaluate(run.total)
run.finish(leave=__name__ == '__main__')
