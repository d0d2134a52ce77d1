"""Reinforcement learning from a reward: PPO, its offline one-step variant, and GRPO, on one process or many.

    python ppo.py config/ppo_toy.py
    torchrun --nproc_per_node=4 ppo.py config/ppo_hh.py

A round: answers sampled from the policy (offline: labelled answers of the data, +1 and -1) -> log-probs under policy and
reference, values -> scores -> KL penalty -> advantages -> ppo_epochs passes over the round, one gradient a minibatch: the sum
over its answer tokens, divided once by their number, on any number of ranks and microbatches. Counts are in examples, which here
are answers, but for warmup_steps.

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
reward_timeout: float | None = None  # seconds that a call of a function may take in such a process; then it gives 0
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
lam = 0.95  # of generalised advantage estimation: 1 trusts the rewards, 0 the values
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
parts = reward_functions.asked_for(config, training.eval_data)  # summands of the reward
if not (0 <= gamma <= 1 and 0 <= lam <= 1):
    raise UserError(f'gamma and lam must lie between 0 and 1, not {gamma} and {lam}')
group = 1 if offline else group_size  # answers to a prompt
if batch_size % group or minibatch_size % group or minibatch_size > batch_size:
    sizes = f'batch_size {batch_size} and minibatch_size {minibatch_size}'
    raise UserError(f'{sizes} must be multiples of group_size {group}, and a minibatch no larger than the batch')
kl_in_loss = offline or loss == 'grpo'  # else it is in the rewards

# ---- set-up ----

# the ranks meet, out_dir is taken
run = training.begin(config)
world, device, tokenizer = run.world, run.device, run.tokenizer

# sampling takes no answers from the data: prompts are cut as if the data had none, and no cut answer is reported
prompts_only = {'task': 'prompts', 'max_length': max_prompt_length + 2}
run.load_data(train={'task': 'singles'} if offline else prompts_only, held_out=prompts_only)
if not offline:
    run.train.left_out.pop('answers cut', None)
elif noise_rate:
    run.train = run.train.flip(noise_rate, seed)
run.say_data(group)
train, held_out, total = run.train, run.held_out, run.total
if not total:
    raise UserError(f'n_examples {n_examples} is less than one group of {group} answers')

# reference and critic must read the policy's tokens
if ref_model:
    check_same_tokens(tokenizer, ref_model, f'the reference {ref_model}', model, training.trust_remote_code)
if loss == 'ppo' and critic not in ('head', 'own'):
    check_same_tokens(tokenizer, critic, f'the critic {critic}', model, training.trust_remote_code)
build_policy = partial(load_model, model, adapters=run.adapters, **run.model_options())


def build(**how):
    """The policy. For ppo it holds its value head or critic, so that one optimizer and one checkpoint serve both."""
    lm = build_policy(**how)
    if loss == 'grpo':
        return lm
    if critic == 'head':
        return add_value_head(lm)
    name = model if critic == 'own' else critic
    return add_value_head(lm, load_reward(name, new_head=True, **run.model_options(), **how))


run.load_policy(build)
policy = run.policy
stop = generate.stop_tokens(policy, tokenizer)  # ids that end an answer; the one that was sampled is trained on

# the longest sequence: a prompt with the answer that may be sampled to it, or with that of the data
longest = max(examples.longest_prompt() + max_new_tokens for examples in (train, held_out))
if offline:
    longest = max(longest, train.longest())
what = 'prompts with their answers'
has_own_ref = bool(ref_model or not run.adapters)
inner = {'critic': getattr(core(policy), 'critic', None), 'frozen': int(has_own_ref)}
run.choose_attention(longest, what, share_prefix, forward=policy.token_logps, **inner)

# the reference: a model of its own, or the policy itself, which without its adapters is the model as it was
ref = policy
if has_own_ref:
    ref = run.load_frozen(partial(load_model, ref_model or model, **run.model_options()), longest, what)

# what scores the answers; functions see the rows of their prompts
judge = Reward(parts, config, run.max_tokens, tokenizer, device)
judge.read_rows(train=None if offline else train, test=held_out)
run.check_room(ref, *(reward_model for reward_model, _ in judge.judges.values()))

# ---- a round: rollout, scores, KL penalty, advantages ----


def make_round(first, rows):
    """The Round that begins after `first` answers, on the prompts at these rows of the training set."""
    # 1. the rollout: labelled answers of the data, or sampled ones
    if offline:
        examples = train.select(rows)
    else:
        examples = rollout.sample(run, train, rows, group, (seed + 1) * 2**32 + first)

    # 2. log-probs of their tokens under policy and reference, and values; `old` is the policy that has answered
    tokens, answers = rollout.measure(run, ref, examples, stop)
    tokens['old'] = tokens['ref'] if offline else tokens['pi']

    # 3. the score of each answer: offline +1 or -1, as it is labelled
    if offline:
        scored = answers['score'] = torch.from_numpy(np.where(examples.good, 1.0, -1.0))
        found = {'length/train': answers['n'].double().mean().item(), 'score/train': scored.mean().item()}
    else:
        answers |= judge(examples, 'train', train.uid[rows], stop)
        found = rollout.describe(run, examples, tokens, answers, 'train')
        scored = answers['score'] - missing_eos_penalty * ~answers['ended']

    # 4. the advantage of each token: grpo gives all tokens of an answer that of the answer in its group
    if loss == 'grpo':
        groups = scored.view(-1, group)  # (prompts, answers to each)
        of_answers = formulas.group_advantage(groups).view(-1)
        tokens['advantage'] = of_answers.repeat_interleave(answers['n'])
        found['equal_groups/train'] = (groups.std(1) == 0).double().mean().item()
    else:
        tokens['advantage'], tokens['target'] = advantages_and_targets(tokens, scored, answers['n'])
        spread = tokens['target'].var(correction=0).item()
        unexplained = (tokens['target'] - tokens['value']).var(correction=0).item()
        found['explained_variance/train'] = 1 - unexplained / spread if spread else 0.0
    return rollout.Round(first, rows, examples, tokens, answers, found)


def advantages_and_targets(tokens, scored, n):
    """The advantages, and the targets of the values, of all answer tokens: (tokens,) each. scored, n: (answers,)."""
    # tables (answers, longest); the places where mask is true are the tokens in their order
    mask = torch.arange(int(n.max())) < n[:, None]
    value = torch.zeros(mask.shape, dtype=torch.float64)
    value[mask] = tokens['value']

    # the KL penalty at every token, the answer's reward at its last
    rewards = torch.zeros_like(value)
    if not kl_in_loss:
        rewards[mask] = -kl_coef * (tokens['pi'] - tokens['ref'])
    rewards[torch.arange(len(n)), n - 1] += scored

    # values aim at advantage + value; offline at the discounted rewards themselves, which is lam = 1
    advantage = formulas.gae(rewards, value, mask, gamma=gamma, lam=lam)
    target = value + advantage
    if offline:
        target = value + formulas.gae(rewards, value, mask, gamma=gamma, lam=1.0)
    if whiten:
        advantage = formulas.whiten(advantage, mask)
    return advantage[mask], target[mask]


# ---- minibatches: one optimizer step each ----


def token_losses(pi, value, columns):
    """The policy loss and the value loss of N answer tokens. All columns are (N,); value is None without a critic."""
    old, advantage = columns['old'], columns['advantage']
    if kl_in_loss:
        policy_loss = formulas.grpo(pi, old, columns['ref'], advantage, clip=clip, kl_coef=kl_coef)
    else:
        policy_loss = formulas.ppo(pi, old, advantage, clip=clip)
    if value is None:
        return policy_loss, torch.zeros_like(policy_loss)
    most = value_clip or math.inf  # infinite: not clipped
    return policy_loss, formulas.value_loss(value, columns['value'], columns['target'], value_clip=most)


def run_minibatch(batches, answered, rows):
    """Forward and backward of the examples at these rows of a Round; batches are this rank's microbatches of them.

    Returns sums over all their tokens, by name. Afterwards the policy's gradients are the sum over the tokens of weight times
    gradient, divided by the number of ranks."""
    sums = {}
    # the round's columns, where the model is: (its answer tokens,) each
    known = move({name: values.float() for name, values in answered.tokens.items()}, device)
    for batch in batches:
        # the columns of this microbatch's tokens; a filler reads the last token's, and counts nothing
        slots = rollout.token_slots(batch, rows, answered.answers['start'], group)
        real = slots >= 0
        columns = {name: values[slots] for name, values in known.items()}
        pi, *values = policy.token_logps(batch)  # (1, N), or (2, N) with a critic
        policy_loss, value_loss = token_losses(pi, values[0] if values else None, columns)

        # every token counts the same, or every answer
        weight = 1 / batch.n[batch.answer] if per_answer else torch.ones_like(pi)
        weight = weight * real
        (weight * (policy_loss + vf_coef * value_loss)).sum().backward()

        # for the log: how far the policy has moved since the answers were sampled
        ratio = (pi - columns['old']).detach().exp()
        clipped = (ratio - 1).abs() > clip
        approx_kl = ratio - 1 - ratio.log()
        found = {'loss': weight * policy_loss, 'value_loss': weight * value_loss}
        found |= {'clipped': real * clipped, 'approx_kl': real * approx_kl}
        for name, column in found.items():
            sums[name] = sums.get(name, 0) + column.detach().double().sum().view(1)

    # over all ranks: each gives columns of one row
    return {name: values.sum().item() for name, values in fsdp.gather_columns(sums, [run.rank], world).items()}


def train_round(answered):
    """Do all optimizer steps of a Round. Returns metrics of them: means over its answer tokens."""
    steps_before = steps_a_round * (answered.first // batch_size)
    norm, n_tokens, totals = math.nan, 0, Counter()
    # in each pass over the round, minibatches in another order; a group of answers stays together
    for number, rows in enumerate(answered.minibatches(minibatch_size // group, ppo_epochs, seed), steps_before):
        rate = lr * log.schedule(number, n_rounds * steps_a_round, warmup_steps, training.lr_schedule)
        batches, *_ = run.make_batches(answered.examples, rows)
        lengths = answered.by_example('n')[rows]
        n = int(lengths.sum())
        weight = lengths.numel() if per_answer else n  # what the gradient is divided by
        with run.memory(batches):
            sums = run_minibatch(batches, answered, rows)
            scale = world / weight if math.isfinite(sums['loss']) else math.nan
            step_norm = fsdp.update(policy, run.optimizer, rate, scale, max_grad_norm)
        if not math.isfinite(step_norm):
            count_bad_step(answered, rows, sums['loss'], step_norm)
            continue

        # the losses become sums over tokens, as the others are: in the end all are means over tokens
        norm = step_norm
        n_tokens += n
        for name in ('loss', 'value_loss'):
            sums[name] = sums[name] * n / weight
        totals.update(sums)

    if loss == 'grpo':
        totals.pop('value_loss', None)
    means = {f'{name}/train': value / max(1, n_tokens) for name, value in totals.items()}
    return means | {'grad_norm': norm, 'lr': rate}


def count_bad_step(answered, rows, loss_sum, norm):
    """Count a step whose loss or gradient was not finite, and write down its answers. Raises UserError after too many."""
    # a number for each answer; the loss is that of the whole step
    known = {name: answered.by_example(name)[rows].double().flatten() for name in ('score', 'n')}
    known['loss'] = torch.full((len(known['n']),), loss_sum)
    at = np.repeat(answered.rows[rows], group)  # the row, in the training set, of each answer
    guard.bad_step(out_dir, run.state, training.skip_bad_steps, answered.first, at, train.uid[at], norm, known)


# ---- evaluation ----


def evaluate(seen):
    """Answer all held-out prompts, always from the same seeds, and log metrics; some answers go into samples.jsonl."""
    if not len(held_out) or seen <= run.state['evaluated']:
        return

    # one answer to each held-out prompt
    examples = rollout.sample(run, held_out, range(len(held_out)), 1, seed * 1_000_003)
    tokens, answers = rollout.measure(run, ref, examples, stop)
    if parts:
        answers |= judge(examples, 'test', held_out.uid, stop)
    if guard.stop_asked():
        return  # answers were cut short: it is done again after the resume

    # the first of them for people, all of them for the numbers
    prompts = [prompt.tolist() for prompt, _ in examples]
    shown = [generate.without_end(answer.tolist(), stop) for _, (answer,) in examples]
    named = [('policy', i, answer) for i, answer in enumerate(shown[:n_eval_model_samples])]
    columns = {('policy', i): row for i, row in enumerate(rollout.of_answers(tokens, answers))}
    fsdp.on_one_rank(lambda: generate.write(f'{out_dir}/samples.jsonl', tokenizer, prompts, named, seen, columns))
    run.log_evaluation(seen, rollout.describe(run, examples, tokens, answers, 'eval'))


# ---- training ----

run.start(f'{loss} {"offline " * offline}', f'answers, {batch_size} a round, {minibatch_size} a step')
if run.eval_due_at_start():
    evaluate(run.seen)
n_rounds = -(-total // batch_size)  # both rounded up
steps_a_round = ppo_epochs * -(-batch_size // minibatch_size)
run.clock = time.time()
for first_prompt, rows in steps(len(train), batch_size // group, total // group, seed, run.seen // group):
    answered = make_round(first_prompt * group, rows)
    # a round that was cut short is thrown away; before the first there is nothing to save
    run.obey_signals(answered.first, saved=not answered.first)
    sampled = time.time()
    found = answered.metrics | train_round(answered)

    # the row of this round: speeds count everything since the last one
    now = time.time()
    elapsed, sampling = now - run.clock, sampled - run.clock
    run.clock = now
    n = answered.answers['n']  # tokens of each answer
    found['counters/step_examples'] = len(n)
    found['examples_per_second'] = log.per_second(len(n), elapsed)
    found['tokens_per_second'] = log.per_second(int(n.sum()), elapsed)
    found['sampling_share'] = log.per_second(sampling, elapsed)
    if training.skip_bad_steps:
        found['counters/bad_steps'] = run.state['bad_steps']
    run.logger.row('train', answered.seen, found)
    if run.eval_due(answered):
        evaluate(answered.seen)
    run.finish_step(answered)
evaluate(total)

# what is exported is the language model, without its critic
run.obey_signals(total)
checkpoint.wait()
drop_value_head(policy)
run.finish(build_policy)
if __name__ == '__main__':
    fsdp.leave()
