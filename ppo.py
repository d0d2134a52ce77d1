"""Reinforcement learning from a reward: PPO, its offline one-step variant, and GRPO, on one process or many.

    python ppo.py config/ppo_toy.py
    torchrun --nproc_per_node=4 ppo.py config/ppo_hh.py

A round: answers sampled from the policy (offline: labelled answers of the data, +1 and -1) -> log-probs under policy and
reference, values -> scores -> KL penalty -> advantages -> ppo_epochs passes over the round, one gradient a minibatch: the sum
over its answer tokens, divided once by their number. That, and whitening over the whole round, is the same on any number of
ranks and microbatches. Counts are in examples, which here are answers, but for warmup_steps.

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
from functools import partial

import numpy as np
import torch

import fsdp
import training
from configurator import UserError, configure
from data import steps
from hf import generate
from hf.load import add_value_head, check_same_tokens, drop_value_head, load_model, load_reward
from hf.probe import check_positions
from model import core, set_attention
from rl import formulas, rollout
from rl.rewards import load_judge, score_answers
from runtime import checkpoint, log
from text.examples import Examples

# model and data
model = 'toy'  # hub id, local folder, or 'toy'
ref_model: str | None = None  # the reference; None: the model as it is before training
reward_model: str | None = None  # what scores answers: a folder of reward.py, or gold (of the toy world)
critic = 'head'  # what estimates values: head (on the policy's trunk), own (a copy of the model), or a model folder
data = 'toy'  # where the prompts come from: hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
noise_rate = 0.0  # offline: fraction of training pairs whose labels are flipped
max_length = 512  # offline: tokens of prompt and answer
max_prompt_length = 256  # a longer prompt is cut to this
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
if reward_model is None and not offline:
    raise UserError('nothing scores the answers: give --reward_model=FOLDER (of reward.py), or gold for the toy world')
if reward_model == 'gold' and {data, training.eval_data or data} != {'toy'}:
    raise UserError('--reward_model=gold is known for --data=toy alone: give a folder of reward.py')
if not (0 <= gamma <= 1 and 0 <= lam <= 1):
    raise UserError(f'gamma and lam must lie between 0 and 1, not {gamma} and {lam}')
group = 1 if offline else group_size
if batch_size % group or minibatch_size % group or minibatch_size > batch_size:
    sizes = f'batch_size {batch_size} and minibatch_size {minibatch_size}'
    raise UserError(f'{sizes} must be multiples of group_size {group}, and a minibatch no larger than the batch')
kl_in_loss = offline or loss == 'grpo'  # else it is in the rewards

# ---- set-up ----

# the ranks meet, out_dir is taken
run = training.begin(config)
rank, world, device, tokenizer = run.rank, run.world, run.device, run.tokenizer
# where answers are sampled, those of the data are not used: then prompts are cut as if there were none
prompts_only = {'task': 'prompts', 'max_length': max_prompt_length + 2}
run.load_data(train={'task': 'singles'} if offline else prompts_only, held_out=prompts_only)
for examples in [run.held_out] + [run.train] * (not offline):
    examples.left_out.pop('answers cut', None)
if noise_rate and offline:
    run.train = run.train.flip(noise_rate, seed)
run.say_data(group)
train, held_out, total = run.train, run.held_out, run.total
if not total:
    raise UserError(f'n_examples {n_examples} is less than one group of {group} answers')

# whoever reads the answers must read the policy's tokens
others = {'reference': ref_model, 'critic': None if loss == 'grpo' or critic in ('head', 'own') else critic}
for role, name in others.items():
    if name:
        check_same_tokens(tokenizer, name, f'the {role} {name}', model, training.trust_remote_code)
build_policy = partial(load_model, model, adapters=run.adapters, **run.model_options())


def build(**how):
    """The policy, for ppo with a value head or a critic inside, trained as they are: one optimizer, one checkpoint."""
    lm = build_policy(**how)
    if loss == 'grpo':
        return lm
    if critic == 'head':
        return add_value_head(lm)
    name = model if critic == 'own' else critic
    return add_value_head(lm, load_reward(name, new_head=True, **run.model_options(), **how))


run.load_policy(build)
policy = run.policy
stop = generate.stop_tokens(policy, tokenizer)  # whatever of these ends an answer is trained on as it was sampled
longest = max(train.longest() if offline else 0, *(x.longest_prompt() + max_new_tokens for x in (train, held_out)))

# policy and reference read sequences of the same length; a critic inside the policy, too
what = 'prompts with their answers'
run.choose_attention(longest, what, share_prefix=share_prefix)
ref = policy  # which, where its adapters are off, is the model as it was
if not run.adapters or ref_model:
    ref = run.load_frozen(partial(load_model, ref_model or model, **run.model_options()), longest, what)
inside = getattr(core(policy), 'critic', None)
if inside is not None:
    check_positions(inside, longest, what)
    set_attention(inside, run.packed, training.attn)

# what scores the answers: a reward model, or None for the toy world itself
judge = load_judge(config, tokenizer, device)
score = partial(score_answers, tokenizer=tokenizer, judge=judge, max_tokens=training.max_tokens, ends=stop)
describe = partial(rollout.describe, tokenizer=tokenizer, toy=data == 'toy')
run.check_room(policy.token_logps, ref, judge[0] if judge else None)

# ---- a round: rollout, scores, KL penalty, advantages ----


def make_round(first, rows):
    """The Round that begins after `first` answers, on the prompts at these rows of the training set."""
    # the rollout: answers of the policy as it is now, each from its own seed, or those of the data
    if offline:
        examples = train.select(rows)
    else:
        prompts = [train[i][0].tolist() for i in rows for _ in range(group)]
        seeds = [(seed + 1) * 2**32 + first + i for i in range(len(prompts))]
        ids = rollout.sample(run, prompts, seeds, max_new_tokens, sample_batch)
        examples = Examples.of([(prompts[i], ids[i : i + group]) for i in range(0, len(ids), group)])

    # log-probs of their tokens under policy and reference, and values; the policy that ratios are to
    tokens, answers = rollout.measure(run, policy, ref, examples, stop)
    tokens['old'] = tokens['ref'] if offline else tokens['pi']

    # the scores
    answers['score'] = torch.from_numpy(examples.good * 2.0 - 1) if offline else score(examples)
    found = {'length/train': answers['n'].double().mean().item(), 'score/train': answers['score'].mean().item()}
    if not offline:
        found |= describe(examples, tokens, answers, 'train')

    # what an answer is worth, and from there what each of its tokens is worth
    reward = answers['score']
    if not offline:
        reward = reward - missing_eos_penalty * ~answers['ended']
    if loss == 'grpo':
        groups = reward.view(-1, group)
        tokens['advantage'] = formulas.group_advantage(groups).view(-1).repeat_interleave(answers['n'])
        found['equal_groups/train'] = (groups.std(1) == 0).double().mean().item()
    else:
        tokens['advantage'], tokens['target'] = advantages_and_targets(tokens, reward, answers)
        spread = tokens['target'].var(correction=0).item()
        left = (tokens['target'] - tokens['value']).var(correction=0).item()
        found['explained_variance/train'] = 1 - left / spread if spread else 0.0
    return rollout.Round(first, rows, examples, tokens, answers, found)


def advantages_and_targets(tokens, reward, answers):
    """What ppo and the critic learn from, two columns of the answer tokens: from rewards of answers, KL penalty and values."""
    # tables (answers, longest); the true places of mask are in the order of the tokens
    mask = torch.arange(int(answers['n'].max())) < answers['n'][:, None]
    value, rewards = (torch.zeros(mask.shape, dtype=torch.float64) for _ in range(2))
    value[mask] = tokens['value']

    # the KL penalty at every token, the answer's reward at its last
    if not kl_in_loss:
        rewards[mask] = -kl_coef * (tokens['pi'] - tokens['ref'])
    rewards[torch.arange(len(mask)), answers['n'] - 1] += reward

    # values aim at what came: advantage + value, offline at the discounted rewards themselves
    advantage = formulas.gae(rewards, value, mask, gamma=gamma, lam=lam)
    gain = formulas.gae(rewards, value, mask, gamma=gamma, lam=1.0) if offline else advantage
    target = value + gain
    if whiten:
        advantage = formulas.whiten(advantage, mask)
    return advantage[mask], target[mask]


# ---- minibatches: one optimizer step each ----


def token_losses(pi, value, c):
    """(policy loss, value loss) of the answer tokens of a microbatch, (N,) each. value: [] without a critic; c: columns."""
    if kl_in_loss:
        of_policy = formulas.grpo(pi, c['old'], c['ref'], c['advantage'], clip=clip, kl_coef=kl_coef)
    else:
        of_policy = formulas.ppo(pi, c['old'], c['advantage'], clip=clip)
    if not value:
        return of_policy, torch.zeros_like(of_policy)
    return of_policy, formulas.value_loss(value[0], c['value'], c['target'], value_clip=value_clip or math.inf)


def run_minibatch(batches, answered, rows):
    """Forward and backward of the examples at rows of a Round, in batches. Returns (weight, name -> sum over the minibatch).

    After it the policy's gradients are the sum over its tokens of weight times gradient, divided by the number of ranks."""
    per_prompt = answered.examples.spans.shape[1] - 1
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        # the columns of this microbatch's tokens; a filler's count nothing
        slots = rollout.token_slots(batch, rows, answered.answers['start'], per_prompt)
        real = (slots >= 0).to(device)
        c = {name: values[slots].to(device, torch.float32) for name, values in answered.tokens.items()}
        pi, *value = policy.token_logps(batch)
        of_policy, of_value = token_losses(pi, value, c)

        # every token counts the same, or every answer
        weight = 1 / batch.n[batch.answer] if per_answer else torch.ones_like(pi)
        weight = weight * real
        (weight * (of_policy + vf_coef * of_value)).sum().backward()

        # for the log: how far the policy has moved since the answers were sampled
        ratio = (pi - c['old']).detach().exp()
        moved = [real * ((ratio - 1).abs() > clip), real * (ratio - 1 - ratio.log())]
        parts = [weight * of_policy, weight * of_value, *moved]
        sums += torch.stack([x.detach().double().sum().cpu() for x in parts])

    # sums over all ranks, and the weight that the gradient is divided by
    names = ('loss', 'value_loss', 'clipped', 'approx_kl')
    of_ranks = fsdp.gather_columns({name: x[None] for name, x in zip(names, sums, strict=True)}, [rank], world)
    lengths = answered.by_example('n')[rows]
    total_weight = lengths.numel() if per_answer else int(lengths.sum())
    return total_weight, {name: values.sum().item() for name, values in of_ranks.items()}


def train_round(answered):
    """All optimizer steps of a Round. Returns metrics."""
    done = n_updates * (answered.first // batch_size)
    norm, n_tokens, totals = math.nan, 0, {}
    # in each pass over the round, minibatches in another order; a group of answers stays together
    for number, rows in enumerate(answered.minibatches(minibatch_size // group, ppo_epochs, seed), done):
        rate = lr * log.schedule(number, n_rounds * n_updates, warmup_steps, training.lr_schedule)
        batches, *_ = run.make_batches(answered.examples, rows)
        with run.memory(batches):
            weight, sums = run_minibatch(batches, answered, rows)
            scale = world / weight if math.isfinite(sums['loss']) else math.nan
            found = fsdp.update(policy, run.optimizer, rate, scale, max_grad_norm)

        # a loss or gradient that is not finite: count it, and write down its answers, with the loss of the whole step
        if not math.isfinite(found):
            known = {name: answered.by_example(name)[rows].double().flatten() for name in ('score', 'n')}
            known['loss'] = torch.full((len(known['n']),), sums['loss'])
            at = np.repeat(answered.rows[rows], len(known['n']) // len(rows))
            allowed = training.skip_bad_steps
            guard.bad_step(out_dir, run.state, allowed, answered.first, at, train.uid[at], found, known)
            continue

        # means over tokens, in the end
        norm, n = found, int(answered.by_example('n')[rows].sum())
        sums['loss'], sums['value_loss'] = sums['loss'] * n / weight, sums['value_loss'] * n / weight
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
        n_tokens += n
    shown = [name for name in totals if name != 'value_loss' or loss == 'ppo']
    return {f'{name}/train': totals[name] / max(1, n_tokens) for name in shown} | {'grad_norm': norm, 'lr': rate}


# ---- evaluation ----


def evaluate(seen):
    """Metrics of answers to held-out prompts, always from the same seeds; some of them into samples.jsonl."""
    if not len(held_out) or seen <= run.state['evaluated']:
        return

    # one answer to each held-out prompt
    prompts = [held_out[i][0].tolist() for i in range(len(held_out))]
    seeds = [seed * 1_000_003 + i for i in range(len(prompts))]
    ids = rollout.sample(run, prompts, seeds, max_new_tokens, sample_batch)
    examples = Examples.of([(prompt, [answer]) for prompt, answer in zip(prompts, ids, strict=True)])
    tokens, answers = rollout.measure(run, policy, ref, examples, stop)
    if reward_model:
        answers['score'] = score(examples)
    if guard.stop_asked():
        return  # answers were cut short: it is done again after the resume

    # the first of them for people, all of them for the numbers
    some = [('policy', i, generate.without_end(answer, stop)) for i, answer in enumerate(ids[:n_eval_model_samples])]
    fsdp.on_one_rank(lambda: generate.write(f'{out_dir}/samples.jsonl', tokenizer, prompts, some, seen))
    run.log_evaluation(seen, describe(examples, tokens, answers, 'eval'))


# ---- training ----

run.start(f'{loss} {"offline " if offline else ""}', f'answers, {batch_size} a round, {minibatch_size} a step')
if run.eval_due_at_start():
    evaluate(run.seen)
n_rounds, n_updates = -(-total // batch_size), ppo_epochs * -(-batch_size // minibatch_size)
run.clock = time.time()
for first_prompt, rows in steps(len(train), batch_size // group, total // group, seed, run.seen // group):
    answered = make_round(first_prompt * group, rows)
    # a round that was cut short is thrown away; before the first there is nothing to save
    run.heed(answered.first, saved=not answered.first)
    sampled = time.time()
    found = answered.metrics | train_round(answered)

    # the row of this round
    now = time.time()
    elapsed, sampling, run.clock = now - run.clock, sampled - run.clock, now
    n_answers, n_tokens = len(answered.answers['n']), int(answered.answers['n'].sum())
    found['counters/step_examples'] = n_answers
    amounts = {'examples_per_second': n_answers, 'tokens_per_second': n_tokens, 'sampling_share': sampling}
    found |= {name: log.per_second(amount, elapsed) for name, amount in amounts.items()}
    if training.skip_bad_steps:
        found['counters/bad_steps'] = run.state['bad_steps']
    run.logger.row('train', answered.seen, found)
    if run.eval_due(answered):
        evaluate(answered.seen)
    run.finish_step(answered)
evaluate(total)
run.heed(total)
checkpoint.wait()
drop_value_head(policy)
run.finish(build_policy)
if __name__ == '__main__':
    fsdp.leave()
