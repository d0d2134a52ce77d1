"""Reinforcement learning from a reward: PPO, its offline one-step variant, and GRPO, on one process or many.

    python ppo.py config/ppo_toy.py
    torchrun --nproc_per_node=4 ppo.py config/ppo_hh.py

Each round samples batch_size answers from the policy (offline: takes labelled answers of the data, scored +1 or -1), computes
log-probs under policy and reference, values, scores and advantages, and trains on them for ppo_epochs passes. Each minibatch is
one optimizer step on the mean gradient over its answer tokens. All counts but warmup_steps are in examples, here answers.

Differences from papers and other code:
* Answers are sampled at temperature 1 without top-p, from the policy being trained, so ratios start at 1 (but for lora_dropout).
* Online PPO subtracts the per-token KL to the reference from the rewards, like Ziegler et al. (1909.08593). GRPO and offline PPO
  add kl_penalty of rl/formulas.py to the loss; HALOs' offline PPO adds kl_coef mean(pi - ref) there.
* Offline, the old policy is the reference, and value targets are discounted returns, as in HALOs; online they are A + V.
* GRPO averages over tokens, as in HALOs and DAPO; with --per_answer over the token means of answers, as in its paper.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import math
import time
from collections import Counter
from functools import partial

import numpy as np
import torch

import fsdp
import training
from configurator import UserError, configure
from data import steps
from hf import generate
from hf.load import add_value_head, check_same_tokens, load_model, load_reward
from rl import formulas, reward_functions, rollout
from rl.rewards import Reward
from runtime import errors
from runtime.files import say_once
from runtime.prefetch import move

# model and data
model = 'toy'  # hub id, local folder, or 'toy'
ref_model: str | None = None  # the reference; None: the model as it is before training
reward: str | None = None  # what scores: FILE.py:FUNCTION, a model folder, gold (toy world), or 'a.py:f + DIR*0.5'
reward_model: str | None = None  # the same, if it is one folder, or gold
reward_workers = 0  # processes that run each function, an answer a call; 0: in this process, all answers in one call
reward_timeout: float | None = None  # seconds that such a process may take for an answer; a late one scores 0
critic = 'head'  # what estimates values: head (on the policy's trunk), own (a copy of the model), or a model folder
data = 'toy'  # where the prompts come from: hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
noise_rate = 0.0  # offline: fraction of training pairs whose labels are flipped
max_length = 512  # offline: tokens of prompt and answer
max_prompt_length: int | None = None  # a longer prompt is cut to this; None: half of max_length
# loss
loss = 'ppo'  # ppo or grpo
offline = False  # one-step PPO on labelled answers of the data instead of sampled ones
group_size = 1  # answers sampled to one prompt; grpo compares them, so it needs two or more
kl_coef = 0.05  # strength of the pull towards the reference
clip = 0.2  # ratios are clipped to 1 - clip .. 1 + clip
value_clip: float | None = 0.2  # values move at most this far from the old ones; None: freely
vf_coef = 0.1  # weight of the value loss
gamma = 1.0  # discount from one token to the next
lam = 0.95  # lambda of generalised advantage estimation: 1 trusts the rewards, 0 the values
whiten = True  # give the advantages of a round mean 0 and variance 1
missing_eos_penalty = 0.0  # taken off the score of an answer that does not end within max_new_tokens
per_answer = False  # grpo: mean over answers of the means over their tokens, instead of the mean over all tokens
# steps
n_epochs = 1  # passes over the prompts
n_examples: int | None = None  # stop after so many answers; None: n_epochs decides
batch_size = 256  # answers of one round, all ranks together
minibatch_size = 64  # answers of one optimizer step, all ranks together
ppo_epochs = 4  # passes over the answers of a round
lr = 1e-6  # learning rate
warmup_steps = 10  # optimizer steps of linear warm-up; unless it is set, at most a tenth of the run
max_grad_norm = 1.0  # gradients are clipped to this norm
seed = 0  # of the order of prompts, the answers, the minibatches
share_prefix = True  # with group_size above 1: compute the prompt of a group once
# sampling and output
max_new_tokens = 128  # length of an answer
sample_batch = 128  # answers that one rank samples side by side
n_eval_model_samples = 16  # how many of the answers to held-out prompts go into samples.jsonl
out_dir = 'out/ppo'  # everything the run leaves behind
config = configure(globals(), shared=training)

# options without effect: an error on the command line, a note in a config file
if loss not in ('ppo', 'grpo'):
    raise UserError(f'loss must be one of ppo, grpo, not {loss!r}: dpo.py has the losses on preferences')
if offline:
    config.report_unused(['missing_eos_penalty', 'group_size'], 'offline, answers come from the data')
else:
    config.report_unused(['noise_rate', 'max_length'], 'answers are sampled, not taken from the data')
if loss == 'grpo':
    config.report_unused('critic vf_coef value_clip gamma lam whiten'.split(), 'grpo has no critic')
else:
    config.report_unused(['per_answer'], 'it belongs to grpo')
if group_size == 1:
    config.report_unused(['share_prefix'], 'there is one answer to a prompt')

if offline and loss == 'grpo':
    raise UserError('--offline goes with --loss=ppo: grpo compares several answers to one prompt, and samples them')
if loss == 'grpo' and group_size < 2:
    raise UserError('grpo compares the answers to one prompt: set --group_size to 2 or more')
reward_parts = reward_functions.parts_of_options(config, training.eval_data)
if not (0 <= gamma <= 1 and 0 <= lam <= 1):
    raise UserError(f'gamma and lam must lie between 0 and 1, not {gamma} and {lam}')
answers_per_prompt = 1 if offline else group_size
if batch_size % answers_per_prompt or minibatch_size % answers_per_prompt:
    sizes = f'batch_size {batch_size} and minibatch_size {minibatch_size} count answers'
    raise UserError(f'{sizes}: both must be multiples of group_size {group_size}, those to a prompt')
if n_examples and n_examples < answers_per_prompt:
    raise UserError(f'n_examples {n_examples} is less than one group of {answers_per_prompt} answers')
if minibatch_size > batch_size:
    raise UserError(f'minibatch_size {minibatch_size} is more than batch_size {batch_size}, the answers of a round')
kl_in_loss = offline or loss == 'grpo'  # online PPO has the KL penalty in the rewards instead

# ---- set-up ----

run = training.Run(config)  # initialises torch.distributed and claims out_dir

# examples of the task 'prompts' have a placeholder for an answer: 2 leaves room for its token and the end token
prompts_only = {'task': 'prompts', 'max_length': max_prompt_length + 2}
run.load_data(train={'task': 'singles'} if offline else prompts_only, held_out=prompts_only)
if not offline:
    run.train.left_out.pop('answers cut', None)  # only placeholders were cut
else:
    run.train = run.train.flip(noise_rate, seed)
run.count_data(answers_per_prompt)
train = run.train
held_out = run.held_out
total = run.total

# reference and critic must use the policy's token ids
if ref_model:
    check_same_tokens(run.tokenizer, ref_model, f'the reference {ref_model}', model, training.trust_remote_code)
if loss == 'ppo' and critic not in ('head', 'own'):
    check_same_tokens(run.tokenizer, critic, f'the critic {critic}', model, training.trust_remote_code)
build_policy = partial(load_model, model, adapters=run.adapters, **run.model_options())


def build(**options):
    """Load the policy, for ppo with its critic inside: one optimizer and checkpoint for both. options: from fsdp.shard, such as empty."""
    language_model = build_policy(**options)
    if loss == 'grpo':
        return language_model
    if critic == 'head':
        return add_value_head(language_model)
    # a critic of its own: a whole model. new_head: replace the head of a language model by one with a single output
    critic_name = model if critic == 'own' else critic
    critic_model = load_reward(critic_name, new_head=True, **run.model_options(), **options)
    return add_value_head(language_model, critic_model)


run.load_policy(build)
policy = run.policy
stop_ids = generate.stop_tokens(policy, run.tokenizer)  # token ids that end an answer

# longest prompt plus answer, sampled or (offline) from the data
longest = max(examples.longest_prompt() + max_new_tokens for examples in (train, held_out))
if offline:
    longest = max(longest, train.longest())
# with adapters, the policy without them serves as the reference
has_own_ref = bool(ref_model or not run.adapters)
run.set_batching(longest, 'prompts with their answers', share_prefix, forward=policy.token_logps, n_models=has_own_ref)
ref = policy
if has_own_ref:
    ref = run.load_frozen(partial(load_model, ref_model or model, **run.model_options()))

# reward functions get the data rows of the prompts; offline, only held-out answers are scored
scorer = Reward(reward_parts, config, run.max_tokens, run.tokenizer, run.device, longest)
scorer.read_rows(train=None if offline else train, test=held_out)
reward_models = [loaded for loaded, _tokenizer in scorer.reward_models.values()]
run.check_room(ref, *reward_models)


def make_round(first, rows):
    """Sample (offline: read) the answers of a round and compute scores and advantages. Return a rollout.Round.

    first: number of answers before the round. rows: of its prompts in train, the same on all ranks, which call it together."""
    # 1. answers. Answer k of a run has seed (seed + 1) * 2**32 + k, so runs with different --seed share none
    if offline:
        examples = train.select(rows)
    else:
        first_seed = (seed + 1) * 2**32 + first
        examples = rollout.sample(run, rows, answers_each=answers_per_prompt, first_seed=first_seed)
        # a signal cuts answers short: save and exit here, and the resumed run repeats the round. Before the first, nothing is to be saved
        run.obey_signals(first, saved=first == 0)

    # name -> (tokens,), of all answer tokens: log-probs pi and ref, with a critic value. name -> (answers,): n (tokens), ended, start
    tokens, answers = rollout.measure(run, ref, examples, stop=stop_ids)
    # old: log-probs under the policy that wrote the answers; offline it is unknown, and the reference stands in for it
    tokens['old'] = tokens['ref'] if offline else tokens['pi']

    # 2. scores, (answers,): offline the labels
    if offline:
        labels = np.where(examples.good, 1.0, -1.0)
        scores = answers['score'] = torch.from_numpy(labels)
        metrics = {'length/train': answers['n'].double().mean().item(), 'score/train': scores.mean().item()}
    else:
        # adds score, and score_NAME of each reward if there are several
        answers |= scorer.score_columns(examples, 'train', train.uid[rows], ends=stop_ids)
        metrics = rollout.describe(run, examples, tokens, answers, 'train')
        # in the columns, which are logged, scores are without the penalty
        scores = answers['score'] - missing_eos_penalty * ~answers['ended']

    metrics |= add_advantages(tokens, scores, answers['n'])  # 3. advantages
    return rollout.Round(first, rows, examples, tokens, answers, metrics)


def add_advantages(tokens, scores, n):
    """Add 'advantage' and, for a critic, its 'target' to the token columns of a round, (tokens,) each. Return a metric of them.

    scores, n: score and number of tokens of each answer, (answers,)."""
    if loss == 'grpo':
        groups = scores.view(-1, answers_per_prompt)  # (prompts, answers per prompt)
        of_answers = formulas.group_advantage(groups).view(-1)
        tokens['advantage'] = of_answers.repeat_interleave(n)  # a token gets that of its answer
        equal_share = (groups.std(1) == 0).double().mean().item()  # such groups give no gradient
        if equal_share == 1:
            say_once('note: all answers to a prompt have the same score, for each prompt of a round: nothing to learn')
        return {'equal_groups/train': equal_share}
    tokens['advantage'], tokens['target'] = rollout.advantages_and_targets(config, tokens, scores, n)
    # of value as a prediction of target: 1 is perfect, 0 as good as a constant
    variance = tokens['target'].var(correction=0)
    residual = (tokens['target'] - tokens['value']).var(correction=0)
    return {'explained_variance/train': (1 - residual / variance).item() if variance else 0.0}


def token_losses(pi, value, columns):
    """Return the policy loss and the value loss of each of N answer tokens, (N,) each.

    pi, value: log-probs and values of the current policy, (N,). value is None without a critic; the value loss is then 0.
    columns, (N,) each, fixed during the round: old and ref (log-probs of the policy at its start and of the reference),
    advantage, and with a critic value (its values at the start) and target."""
    old = columns['old']
    advantage = columns['advantage']
    if kl_in_loss:
        policy_loss = formulas.grpo(pi, old, columns['ref'], advantage, clip=clip, kl_coef=kl_coef)
    else:
        policy_loss = formulas.ppo(pi, old, advantage, clip=clip)
    if value is None:
        return policy_loss, torch.zeros_like(policy_loss)
    limit = value_clip or math.inf  # None or 0: no clipping
    return policy_loss, formulas.value_loss(value, columns['value'], columns['target'], value_clip=limit)


def run_minibatch(step, this_round):
    """Run forward and backward of a minibatch. Return sums over its answer tokens on all ranks: name -> float.

    step: a data.Step whose rows are examples of this_round, a rollout.Round. Sums: loss and value_loss (weighted), clipped (number
    of clipped ratios), approx_kl (estimate of KL(sampling policy || current one)). Gradients of the weighted loss accumulate
    as the sum over all tokens, divided by the number of ranks."""
    sums = Counter()  # of this rank
    # name -> (tokens,): all tokens of the round
    round_columns = move({name: column.float() for name, column in this_round.tokens.items()}, run.device)
    for batch in step.batches:
        # (N,): where the microbatch's answer tokens are in round_columns. A filler's have -1: they take the last token's, and weight 0
        indices = rollout.token_indices(batch, step.rows, this_round.answers['start'], answers_per_prompt)
        is_real = indices >= 0
        columns = {name: column[indices] for name, column in round_columns.items()}
        pi, *values = policy.token_logps(batch)  # rows (N,): log-probs and, with a critic, values
        value = values[0] if values else None
        # the ratio of a filler could be infinite, and 0 times that is no number
        pi = torch.where(is_real, pi, columns['old'])
        policy_loss, value_loss = token_losses(pi, value, columns)

        weight = is_real.to(pi.dtype)  # all tokens weigh the same, or with per_answer all answers
        if per_answer:
            weight = weight / batch.n[batch.answer]
        (weight * (policy_loss + vf_coef * value_loss)).sum().backward()

        # how far the policy has moved since sampling; a filler has not
        is_clipped = torch.expm1(pi - columns['old']).abs() > clip
        approx_kl = formulas.kl_penalty(columns['old'], pi)
        terms = {'loss': weight * policy_loss, 'value_loss': weight * value_loss}
        terms |= {'clipped': is_clipped, 'approx_kl': approx_kl}
        for name, column in terms.items():
            sums[name] += column.detach().double().sum().view(1)  # (1,)
    # add up over ranks: each rank's sum is one number of a column, (ranks,)
    by_rank = fsdp.gather_columns(sums, slots=[run.rank], total=run.world_size)
    return {name: column.sum().item() for name, column in by_rank.items()}


def train_round(this_round):
    """Run all optimizer steps of a rollout.Round. Return metrics: means over answer tokens, the last finite grad_norm, the last lr.

    Steps with a non-finite loss or gradient leave the weights alone, count in no mean, and go to bad_step.jsonl."""
    # optimizer steps of earlier rounds: the learning rate depends on them
    steps_before = steps_per_round * (this_round.first // batch_size)
    n_tokens = 0  # of all good steps
    totals = Counter()  # sums over these tokens, of what run_minibatch returns
    grad_norm = math.nan
    # rows: indices in this_round.examples, each of which is a prompt with all its answers
    minibatches = this_round.minibatches(minibatch_size // answers_per_prompt, ppo_epochs, seed)
    for number, rows in enumerate(minibatches, start=steps_before):
        step = run.make_step(this_round.examples, rows, this_round.first)
        with errors.on_full_memory_of(step.batches, run.max_tokens):
            sums = run_minibatch(step, this_round)
        # numbers of each answer for bad_step.jsonl, (answers,); the loss is known for the whole step only
        numbers = (answers_per_prompt * rows[:, None] + np.arange(answers_per_prompt)).flatten()
        columns = {name: this_round.answers[name][numbers].double() for name in ('score', 'n')}
        columns['loss'] = torch.full_like(columns['n'], sums['loss'])
        n = int(columns['n'].sum())
        total_weight = len(columns['n']) if per_answer else n
        # (answers,): index of each answer's prompt in train
        train_rows = np.repeat(this_round.rows[rows], answers_per_prompt)
        if not run.update(step, columns, total_weight, number=number, rows=train_rows):
            continue

        grad_norm = run.norm
        n_tokens += n
        # divided by total_weight, the weighted sums are the step's means: these count once for each of its n tokens
        for name in ('loss', 'value_loss'):
            sums[name] = sums[name] * n / total_weight
        totals.update(sums)  # Counter.update adds
    if loss == 'grpo':
        totals.pop('value_loss', None)  # always 0; missing if all steps were bad
    means = {f'{name}/train': total / max(1, n_tokens) for name, total in totals.items()}
    return means | {'grad_norm': grad_norm, 'lr': run.rate}


@errors.on_full_memory('sampled answers do not fit; lower sample_batch or max_new_tokens')
def evaluate(seen):
    """Sample an answer to every held-out prompt, log metrics, and append the first answers to samples.jsonl.

    seen: number of answers trained on so far. No-op without held-out prompts, or if a run before a resume logged it already."""
    if not len(held_out) or seen <= run.state['evaluated']:
        return
    metrics = {}  # filled by measure(), which is not called after a stop signal: then nothing is logged

    def measure(examples):
        """Fill in metrics of Examples of n answers. Return more fields for samples.jsonl, (n,) each: logratio and scores."""
        tokens, columns = rollout.measure(run, ref, examples, stop=stop_ids)
        if reward_parts:  # offline there may be none
            columns |= scorer.score_columns(examples, 'test', held_out.uid, ends=stop_ids)
        metrics.update(rollout.describe(run, examples, tokens, columns, 'eval'))
        return {name: column for name, column in columns.items() if name.startswith(('logratio', 'score'))}

    # sample_batch: how many answers a rank samples side by side
    settings = {'n_written': n_eval_model_samples, 'max_new_tokens': max_new_tokens, 'max_rows': sample_batch}
    generate.sample_held_out(run, {'policy': policy}, held_out, seen, measure, **settings)
    run.log_evaluation(seen, metrics)


method = f'{loss} offline' if offline else loss
n_rounds = math.ceil(total / batch_size)
steps_per_round = ppo_epochs * math.ceil(batch_size / minibatch_size)
run.start(method, f'answers, {batch_size} a round, {minibatch_size} a step', n_steps=n_rounds * steps_per_round)
if run.eval_due_at_start():
    evaluate(run.seen)
run.clock = time.perf_counter()
prompts_per_round = batch_size // answers_per_prompt  # steps() counts prompts, everything else answers
prompts_seen = run.seen // answers_per_prompt
for first_prompt, rows in steps(len(train), prompts_per_round, total // answers_per_prompt, seed, start=prompts_seen):
    this_round = make_round(first_prompt * answers_per_prompt, rows)
    run.obey_signals(this_round.first, saved=this_round.first == 0)  # the scores may have taken minutes
    sampling_seconds = time.perf_counter() - run.clock
    metrics = this_round.metrics | train_round(this_round)
    n = this_round.answers['n']  # tokens of each answer
    run.log_row(metrics, this_round.seen, len(n), int(n.sum()), sampling_share=sampling_seconds)
    if run.eval_due(this_round):
        evaluate(this_round.seen)
    run.finish_step(this_round)
evaluate(total)

run.finish(build_policy, leave=__name__ == '__main__')  # export the language model without its critic
