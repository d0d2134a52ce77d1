"""Reinforcement learning from a reward: PPO, its offline one-step variant, and GRPO, on one process or many.

    python ppo.py config/ppo_toy.py
    torchrun --nproc_per_node=4 ppo.py config/ppo_hh.py

Training goes in rounds. A round samples batch_size answers from the policy (offline: it takes labelled answers of the data, scored
+1 or -1), computes their log-probs under policy and reference, values, scores and advantages, and then trains on them in
ppo_epochs passes. Each minibatch is one optimizer step; its gradient is the sum over its answer tokens, divided once by their
number, on any number of ranks and microbatches. All counts but warmup_steps are in examples, which here are answers.

Where this departs from papers and other code:
* Answers are sampled at temperature 1 without top-p: from the policy that is trained, so that ratios start at 1.
* Online PPO has the KL to the reference in its rewards, token by token, as Ziegler et al. (1909.08593) do. GRPO (as in its
  paper) and offline PPO have it in the loss, as kl_penalty of rl/formulas.py; HALOs' offline PPO adds kl_coef mean(pi - ref) there.
* Offline, the old policy is the reference and values aim at discounted sums of rewards, as in HALOs; else at A + V.
* GRPO is a mean over tokens, as in HALOs and DAPO; with --per_answer over answers of their token means, as in its paper.
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
from data import move, steps
from hf import generate
from hf.load import add_value_head, check_same_tokens, drop_value_head, load_model, load_reward
from model import core
from rl import formulas, reward_functions, rollout
from rl.rewards import Reward
from runtime import checkpoint, log

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
warmup_steps = 10  # optimizer steps of linear warm-up
max_grad_norm = 1.0  # gradients are clipped to this norm
seed = 0  # of the order of prompts, the answers, the minibatches
share_prefix = True  # with group_size above 1: compute the prompt of a group once
# sampling and output
max_new_tokens = 128  # length of an answer
sample_batch = 128  # answers that one rank samples side by side
n_eval_model_samples = 16  # how many of the answers to held-out prompts go into samples.jsonl
out_dir = 'out/ppo'  # everything the run leaves behind
config = configure(globals(), shared=training)

# ---- what the options mean together ----

# options without effect: an error on the command line, a note in a config file
if loss not in ('ppo', 'grpo'):
    raise UserError(f'loss must be one of ppo, grpo, not {loss!r}: dpo.py has the losses on preferences')
if offline:
    config.ignored(['missing_eos_penalty', 'group_size'], 'offline, answers come from the data')
else:
    config.ignored(['noise_rate', 'max_length'], 'answers are sampled, not taken from the data')
if loss == 'grpo':
    config.ignored(['critic', 'vf_coef', 'value_clip', 'gamma', 'lam', 'whiten'], 'grpo has no critic')
else:
    config.ignored(['per_answer'], 'it belongs to grpo')
if group_size == 1:
    config.ignored(['share_prefix'], 'there is one answer to a prompt')

# what cannot be
if offline and loss == 'grpo':
    raise UserError('--offline goes with --loss=ppo: grpo compares several answers to one prompt, and samples them')
if loss == 'grpo' and group_size < 2:
    raise UserError('grpo compares the answers to one prompt: set --group_size to 2 or more')
reward_parts = reward_functions.parts_of_options(config, training.eval_data)
both_fractions = 0 <= gamma <= 1 and 0 <= lam <= 1
if not both_fractions:
    raise UserError(f'gamma and lam must lie between 0 and 1, not {gamma} and {lam}')
per_prompt = 1 if offline else group_size  # answers to a prompt
whole_groups = batch_size % per_prompt == 0 and minibatch_size % per_prompt == 0
if not whole_groups or minibatch_size > batch_size:
    sizes = f'batch_size {batch_size} and minibatch_size {minibatch_size}'
    raise UserError(f'{sizes} must be multiples of group_size {per_prompt}, and a minibatch no larger than the batch')
kl_in_loss = offline or loss == 'grpo'  # online PPO has the KL penalty in the rewards instead

# ---- set-up ----

# the ranks meet, out_dir is taken
run = training.begin(config)
world = run.world
device = run.device
tokenizer = run.tokenizer

# an example of the task 'prompts' has a short answer, too, which nothing reads: 2 leaves room for one token and its end
prompts_only = {'task': 'prompts', 'max_length': max_prompt_length + 2}
for_train = {'task': 'singles'} if offline else prompts_only
run.load_data(train=for_train, held_out=prompts_only)
if not offline:
    # such answers do not matter, nor that they were cut
    run.train.left_out.pop('answers cut', None)
elif noise_rate:
    run.train = run.train.flip(noise_rate, seed)
run.say_data(per_prompt)
train, held_out, total = run.train, run.held_out, run.total
if not total:
    raise UserError(f'n_examples {n_examples} is less than one group of {per_prompt} answers')

# reference and critic must read the policy's tokens
if ref_model:
    check_same_tokens(tokenizer, ref_model, f'the reference {ref_model}', model, training.trust_remote_code)
if loss == 'ppo' and critic not in ('head', 'own'):
    check_same_tokens(tokenizer, critic, f'the critic {critic}', model, training.trust_remote_code)
build_policy = partial(load_model, model, adapters=run.adapters, **run.model_options())


def build(**options):
    """Return the policy, loaded with these options of load_model. With ppo its value head, or its critic, is a part of it.

    So one optimizer and one checkpoint serve both."""
    lm = build_policy(**options)
    if loss == 'grpo':
        return lm
    if critic == 'head':
        return add_value_head(lm)
    critic_name = model if critic == 'own' else critic
    # new_head: it may be a language model, whose head gives way to one with a single output
    critic_model = load_reward(critic_name, new_head=True, **run.model_options(), **options)
    return add_value_head(lm, critic_model)


run.load_policy(build)
policy = run.policy
stop_ids = generate.stop_tokens(policy, tokenizer)  # ids that end an answer; the one that was sampled is trained on

# the longest sequence: a prompt with the answer that may be sampled to it, or with that of the data
longest = max(examples.longest_prompt() + max_new_tokens for examples in (train, held_out))
if offline:
    longest = max(longest, train.longest())
called = 'prompts with their answers'
# with adapters the policy itself can be the reference: without them it is the model as it was
has_own_ref = bool(ref_model or not run.adapters)
inner_critic = getattr(core(policy), 'critic', None)
run.choose_attention(
    longest, called, share_prefix, forward=policy.token_logps, critic=inner_critic, frozen=int(has_own_ref)
)
ref = policy
if has_own_ref:
    ref = run.load_frozen(partial(load_model, ref_model or model, **run.model_options()), longest, called)

# the reward, whose functions see the rows of their prompts; offline, it scores held-out prompts alone
scorer = Reward(reward_parts, config, run.max_tokens, tokenizer, device)
scorer.read_rows(train=None if offline else train, test=held_out)
run.check_room(ref, *(reward_model for reward_model, _ in scorer.reward_models.values()))

# ---- a round: rollout, scores, KL penalty, advantages ----


def make_round(first, rows):
    """Get the answers of a round, sampled or of the data, and compute scores and advantages. Return a rollout.Round.

    first: number of answers before it. rows: its prompts, as rows of the training set. Every rank calls this. If a signal
    comes, sampling ends early and answers are cut short: the caller must not train on them."""
    # 1. the rollout. The k-th answer of a run has the seed (seed + 1) * 2**32 + k, so that runs of other seeds share none
    if offline:
        examples = train.select(rows)
    else:
        first_seed = (seed + 1) * 2**32 + first
        examples = rollout.sample(run, train, rows, answers_each=per_prompt, first_seed=first_seed)

    # 2. log-probs of the answers' tokens under policy and reference, and values. PPO's ratios are to `old`, the policy that gave
    # the answers; nobody knows who wrote those of the data, and the reference stands in
    tokens, answers = rollout.measure(run, ref, examples, stop_ids)
    tokens['old'] = tokens['ref'] if offline else tokens['pi']

    # 3. the score of each answer: offline +1 or -1, as it is labelled
    if offline:
        scores = torch.from_numpy(np.where(examples.good, 1.0, -1.0))
        answers['score'] = scores
        metrics = {'length/train': answers['n'].double().mean().item(), 'score/train': scores.mean().item()}
    else:
        answers |= scorer.score_columns(examples, 'train', train.uid[rows], ends=stop_ids)
        # the log has scores without the penalty
        metrics = rollout.describe(run, examples, tokens, answers, 'train')
        scores = answers['score'] - missing_eos_penalty * ~answers['ended']

    # 4. the advantage of each token: with grpo that of its answer, compared with the other answers to the prompt
    if loss == 'grpo':
        groups = scores.view(-1, per_prompt)  # (prompts, answers to each)
        advantages = formulas.group_advantage(groups).view(-1)
        tokens['advantage'] = advantages.repeat_interleave(answers['n'])
        # a group of equal scores teaches nothing
        has_equal_scores = groups.std(1) == 0
        metrics['equal_groups/train'] = has_equal_scores.double().mean().item()
    else:
        tokens['advantage'], tokens['target'] = advantages_and_targets(tokens, scores, answers['n'])
        # how much of the targets the values know: 1 is all, 0 no more than a constant does (or all targets are equal)
        spread = tokens['target'].var(correction=0).item()
        unexplained = (tokens['target'] - tokens['value']).var(correction=0).item()
        metrics['explained_variance/train'] = 1 - unexplained / spread if spread else 0.0
    return rollout.Round(first, rows, examples, tokens, answers, metrics)


def advantages_and_targets(tokens, scores, n):
    """Return the advantages of PPO, and the targets of the values, as columns of tokens: (tokens,) float64 each.

    tokens: columns pi, ref and value of the round's tokens. scores, n (answers,): score of each answer, and its tokens."""
    # tables with a row for each answer, (answers, longest); a table[mask] is the column of tokens again
    mask = torch.arange(int(n.max())) < n[:, None]
    value = torch.zeros(mask.shape, dtype=torch.float64)
    value[mask] = tokens['value']

    # the reward of each token: online its KL penalty, and for an answer's last token the answer's score as well
    rewards = torch.zeros_like(value)
    if not kl_in_loss:
        rewards[mask] = -kl_coef * (tokens['pi'] - tokens['ref'])
    every_answer = torch.arange(len(n))
    rewards[every_answer, n - 1] += scores

    # values aim at advantage + value; offline with lam = 1, which makes that the discounted sum of the rewards to come
    advantage = formulas.gae(rewards, value, mask, gamma=gamma, lam=lam)
    target = value + advantage
    if offline:
        target = value + formulas.gae(rewards, value, mask, gamma=gamma, lam=1.0)
    if whiten:
        advantage = formulas.whiten(advantage, mask)
    return advantage[mask], target[mask]


# ---- minibatches: one optimizer step each ----


def token_losses(pi, value, columns):
    """Return the policy loss and the value loss of each of N answer tokens, (N,) each. All arguments are of these tokens.

    pi, value: log-probs and values under the policy as it is now; value is None without a critic, and its loss then 0.
    columns: the round's old, ref, advantage and, with a critic, value and target."""
    old, advantage = columns['old'], columns['advantage']
    if kl_in_loss:
        policy_loss = formulas.grpo(pi, old, columns['ref'], advantage, clip=clip, kl_coef=kl_coef)
    else:
        policy_loss = formulas.ppo(pi, old, advantage, clip=clip)
    if value is None:
        return policy_loss, torch.zeros_like(policy_loss)
    # None or 0: values move freely, as with an infinite limit
    limit = value_clip or math.inf
    return policy_loss, formulas.value_loss(value, columns['value'], columns['target'], value_clip=limit)


def run_minibatch(batches, this_round, rows):
    """Do forward and backward of one minibatch. Return sums over its answer tokens on all ranks: name -> float.

    batches: this rank's microbatches. rows: the minibatch's examples in this_round, a rollout.Round. The policy's gradients are
    left as the sum over the tokens of weight times gradient, divided by the number of ranks. The sums: loss and value_loss, by
    the same weights; clipped, how many ratios are beyond the clip; approx_kl, from the policy now to the one that answered."""
    sums = {}
    # columns of all tokens of the round, (tokens,) each, where the model is
    round_columns = move({name: column.float() for name, column in this_round.tokens.items()}, device)
    for batch in batches:
        # this microbatch's tokens in them. A filler has the slot -1: it reads the last token's numbers, and its weight is 0
        slots = rollout.token_slots(batch, rows, this_round.answers['start'], per_prompt)
        is_real = slots >= 0
        columns = {name: column[slots] for name, column in round_columns.items()}
        pi, *values = policy.token_logps(batch)  # (1, N), or (2, N) with a critic
        value = values[0] if values else None
        policy_loss, value_loss = token_losses(pi, value, columns)

        # every token counts 1; with --per_answer every answer does, and its tokens share that
        weight = torch.ones_like(pi)
        if per_answer:
            weight = 1 / batch.n[batch.answer]
        weight = weight * is_real
        total_loss = policy_loss + vf_coef * value_loss
        (weight * total_loss).sum().backward()

        # for the log: how far the policy has moved since the answers were sampled; approx_kl is formulas.kl_penalty(old, pi)
        ratio = (pi - columns['old']).detach().exp()
        is_clipped = (ratio - 1).abs() > clip
        approx_kl = ratio - 1 - ratio.log()
        to_add = {'loss': weight * policy_loss, 'value_loss': weight * value_loss}
        to_add |= {'clipped': is_real * is_clipped, 'approx_kl': is_real * approx_kl}
        for name, column in to_add.items():
            sums[name] = sums.get(name, 0) + column.detach().double().sum().view(1)  # (1,)

    # each rank puts its sums into its row of (world,) columns, which are then summed up
    by_rank = fsdp.gather_columns(sums, slots=[run.rank], total=world)
    return {name: column.sum().item() for name, column in by_rank.items()}


def train_round(this_round):
    """Do all optimizer steps of a rollout.Round. Return their metrics by name: means over the answer tokens of all passes.

    grad_norm and lr are those of the last step. A step whose loss or gradient is not finite changes no weights, counts in no
    mean, and is written down (count_bad_step)."""
    steps_before = steps_a_round * (this_round.first // batch_size)
    n_tokens = 0
    totals = Counter()
    of_last_step = {'grad_norm': math.nan}
    # a minibatch takes whole examples: a prompt with all its answers
    minibatches = this_round.minibatches(minibatch_size // per_prompt, ppo_epochs, seed)
    for number, rows in enumerate(minibatches, start=steps_before):
        rate = lr * log.schedule(number, n_rounds * steps_a_round, warmup_steps, training.lr_schedule)
        of_last_step['lr'] = rate
        batches, *_ = run.make_batches(this_round.examples, rows)
        lengths = this_round.by_example('n')[rows]  # (examples, answers to each)
        n = int(lengths.sum())
        total_weight = lengths.numel() if per_answer else n
        with run.memory(batches):
            sums = run_minibatch(batches, this_round, rows)
            # times world, because gradients are divided by it; NaN tells update to leave the weights alone
            is_finite = math.isfinite(sums['loss'])
            scale = world / total_weight if is_finite else math.nan
            norm = fsdp.update(policy, run.optimizer, rate, scale, max_grad_norm)
        if not math.isfinite(norm):
            count_bad_step(this_round, rows, sums['loss'], norm)
            continue

        # the step's losses are sums / total_weight; times n, they can be added up and divided by tokens in the end, as the others
        of_last_step['grad_norm'] = norm
        n_tokens += n
        for name in ('loss', 'value_loss'):
            sums[name] = sums[name] * n / total_weight
        totals.update(sums)  # a Counter's update adds

    if loss == 'grpo':
        totals.pop('value_loss', None)
    means = {f'{name}/train': value / max(1, n_tokens) for name, value in totals.items()}
    return means | of_last_step


def count_bad_step(this_round, rows, loss_sum, norm):
    """Count a step that was not finite, and write its answers into bad_step.jsonl. Raises UserError if there were too many.

    rows: the step's examples in this_round. loss_sum, norm: its loss and its gradient's norm, one of which is not finite."""
    # a number for each answer; of the loss only the sum over the step is known
    columns = {name: this_round.by_example(name)[rows].double().flatten() for name in ('score', 'n')}
    columns['loss'] = torch.full((len(columns['n']),), loss_sum)
    # the row in the training set of each answer's prompt
    train_rows = np.repeat(this_round.rows[rows], per_prompt)
    uids = train.uid[train_rows]
    allowed = training.skip_bad_steps
    guard.bad_step(out_dir, run.state, allowed, this_round.first, train_rows, uids, norm, columns)


# ---- evaluation ----


def evaluate(seen):
    """Sample an answer to each held-out prompt, log metrics of all of them, and write the first ones into samples.jsonl.

    seen: number of answers that the policy was trained on. Nothing is done if there are no held-out prompts, or if the log has
    this evaluation already: run.log_evaluation puts `seen` into run.state['evaluated'], which a resumed run has, too."""
    is_logged = seen <= run.state['evaluated']
    if not len(held_out) or is_logged:
        return

    # the same seeds at each evaluation. 1_000_003 is any number above that of the prompts, so that no two --seed share one
    first_seed = seed * 1_000_003
    all_rows = range(len(held_out))
    examples = rollout.sample(run, held_out, all_rows, answers_each=1, first_seed=first_seed)
    tokens, answers = rollout.measure(run, ref, examples, stop_ids)
    if reward_parts:
        answers |= scorer.score_columns(examples, 'test', held_out.uid, ends=stop_ids)
    # a signal has cut the answers short: nothing is logged, and the resumed run evaluates again
    if guard.stop_asked():
        return

    # the first n_eval_model_samples answers for people to read, without the token that ends them
    prompts, for_people, columns = [], [], {}
    numbers = rollout.of_answers(tokens, answers)
    for i, (prompt, (answer,)) in enumerate(examples):
        prompts.append(prompt.tolist())
        for_people.append(('policy', i, generate.without_end(answer.tolist(), stop_ids)))
        columns['policy', i] = numbers[i]
    for_people = for_people[:n_eval_model_samples]
    file = f'{out_dir}/samples.jsonl'
    fsdp.on_one_rank(partial(generate.write, file, tokenizer, prompts, for_people, seen, columns))
    # all of them for the log
    run.log_evaluation(seen, rollout.describe(run, examples, tokens, answers, 'eval'))


# ---- training ----

method = f'{loss} offline ' if offline else f'{loss} '
run.start(method, f'answers, {batch_size} a round, {minibatch_size} a step')
if run.eval_due_at_start():
    evaluate(run.seen)
# the last round may be smaller, and so may the last minibatch of a pass
n_rounds = math.ceil(total / batch_size)
steps_a_round = ppo_epochs * math.ceil(batch_size / minibatch_size)
run.clock = time.time()
# steps counts prompts, everything else answers
prompts_a_round = batch_size // per_prompt
rounds = steps(len(train), prompts_a_round, total // per_prompt, seed, start=run.seen // per_prompt)
for first_prompt, rows in rounds:
    this_round = make_round(first_prompt * per_prompt, rows)
    # if a signal has come, save and leave: the resumed run makes this round again. Before the first round nothing needs saving
    is_first = this_round.first == 0
    run.obey_signals(this_round.first, saved=is_first)
    sampled = time.time()
    metrics = this_round.metrics | train_round(this_round)

    # a row of metrics.jsonl for the round: speeds count everything since the last one
    now = time.time()
    elapsed = now - run.clock
    sampling = sampled - run.clock
    run.clock = now
    n = this_round.answers['n']  # tokens of each answer
    metrics['counters/step_examples'] = len(n)
    metrics['examples_per_second'] = log.per_second(len(n), elapsed)
    metrics['tokens_per_second'] = log.per_second(int(n.sum()), elapsed)
    metrics['sampling_share'] = log.per_second(sampling, elapsed)
    if training.skip_bad_steps:
        metrics['counters/bad_steps'] = run.state['bad_steps']
    run.logger.row('train', this_round.seen, metrics)
    if run.eval_due(this_round):
        evaluate(this_round.seen)
    run.finish_step(this_round)
evaluate(total)

# the exported model is the language model, without its critic
run.obey_signals(total)
checkpoint.wait()
drop_value_head(policy)
run.finish(build_policy)
if __name__ == '__main__':
    fsdp.leave()
