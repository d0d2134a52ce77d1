"""Reinforcement learning from a reward: PPO, its offline one-step variant, and GRPO, on one process or many.

    python ppo.py config/ppo_toy.py
    torchrun --nproc_per_node=4 ppo.py config/ppo_hh.py

A round: answers sampled from the policy (offline: labelled answers of the data, +1 and -1) -> scores -> log-probs under
policy and reference, values -> advantages -> ppo_epochs passes over the round, one gradient a minibatch. That gradient is
the sum over the minibatch's answer tokens divided once by their number, the advantages are whitened over the whole round:
both are the same on any number of ranks and microbatches. Counts are in examples, which here are answers, but for
warmup_steps.

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
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import fsdp
import training
from configurator import UserError, configure
from data import steps
from feedback import score
from hf import generate, lora
from hf.load import add_value_head, check_same_tokens, drop_value_head, load_model, load_reward
from hf.probe import check_positions
from model import core, set_attention
from rl import formulas, rollout
from runtime import checkpoint, log
from text import toy
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

# options without effect, which is said
if loss not in ('ppo', 'grpo'):
    raise UserError(f'loss must be one of ppo, grpo, not {loss!r}: dpo.py has the losses on preferences')
config.ignored([] if offline else ['noise_rate', 'max_length'], 'answers are sampled, not taken from the data')
config.ignored(['missing_eos_penalty', 'group_size'] if offline else [], 'offline, answers come from the data')
if loss == 'grpo':
    config.ignored(['critic', 'vf_coef', 'value_clip', 'gamma', 'lam', 'whiten'], 'grpo has no critic')
else:
    config.ignored(['per_answer'], 'it belongs to grpo')
config.ignored([] if group_size > 1 else ['share_prefix'], 'there is one answer to a prompt')

# what cannot be
if offline and loss == 'grpo':
    raise UserError('--offline goes with --loss=ppo: grpo compares several answers to one prompt, and samples them')
if loss == 'grpo' and group_size < 2:
    raise UserError('grpo compares the answers to one prompt: set --group_size to 2 or more')
if reward_model is None and not offline:
    raise UserError(
        'nothing scores the answers: give --reward_model=FOLDER (from reward.py), or gold for the toy world'
    )
if reward_model == 'gold' and {data, training.eval_data or data} != {'toy'}:
    raise UserError('--reward_model=gold is known for --data=toy alone: give a folder of reward.py')
if not (0 <= gamma <= 1 and 0 <= lam <= 1):
    raise UserError(f'gamma and lam must lie between 0 and 1, not {gamma} and {lam}')
group = 1 if offline else group_size
if batch_size % group or minibatch_size % group or minibatch_size > batch_size:
    sizes = f'batch_size {batch_size} and minibatch_size {minibatch_size}'
    raise UserError(f'{sizes} must be multiples of group_size {group}, and a minibatch no larger than the batch')
kl_in_loss = offline or loss == 'grpo'

# ---- set-up ----

# the ranks meet, out_dir is taken
run = training.begin(config)
rank, world, device, tokenizer = run.rank, run.world, run.device, run.tokenizer

# where answers are sampled, those of the data are not used: then prompts are cut as if there were none
prompts_only = {'task': 'prompts', 'max_length': max_prompt_length + 2}
run.load_data(train={'task': 'singles'} if offline else prompts_only, held_out=prompts_only)
for examples in [run.held_out] + [run.train] * (not offline):
    examples.left_out.pop('answers cut', None)

# a pair's answers flip together
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
    """The policy, for ppo with a value head, or with a critic that lives inside it: one optimizer, one checkpoint.

    Beside adapters, head or critic train as they are."""
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

# what scores the answers, besides the toy world itself
judge = None
if reward_model not in (None, 'gold'):
    how = {name: config[name] for name in ('dtype', 'device_map', 'trust_remote_code')}
    judge, judge_tokenizer = score.load_scorer(reward_model, device, **how)
    check_same_tokens(tokenizer, judge_tokenizer, f'the reward model {reward_model}', model)
run.check_room(policy.token_logps, ref, judge)

# ---- a round of answers ----


@dataclass
class Round:
    """Sampled (or, offline, labelled) answers with all that training needs to know of them, equal on all ranks.

    tokens: name -> (tokens,) column of all answer tokens, one answer after the other; answers: name -> (answers,) column."""

    first: int  # answers before it
    rows: np.ndarray  # of its prompts in the training set
    examples: Examples
    tokens: dict
    answers: dict
    metrics: dict

    @property
    def seen(self):
        """Answers after it."""
        return self.first + len(self.answers['n'])


def texts(examples):
    """(prompt, answer) of every answer, as text."""
    both = [(prompt, answer) for prompt, answers in examples for answer in answers]
    return [(tokenizer.decode(prompt), tokenizer.decode(answer, skip_special_tokens=True)) for prompt, answer in both]


def scores(examples):
    """Scores of every answer, as the reward model or the toy world gives them: (answers,), equal on all ranks."""
    if reward_model == 'gold':
        return torch.tensor([toy.gold(*text) for text in texts(examples)], dtype=torch.float64)
    items = [(prompt, answer) for prompt, answers in examples for answer in answers]
    return torch.from_numpy(score.scores(judge, judge_tokenizer, items, training.max_tokens, ends=stop)).double()


def measure(examples):
    """(columns of the answer tokens under policy and reference, columns of the answers)."""
    # every rank measures its part of the answers, and gets the columns of all
    n = torch.tensor([len(answer) for _, answers in examples for answer in answers])
    starts = n.cumsum(0) - n  # slot of each answer's first token among all tokens
    tokens = rollout.token_columns(run, policy, examples, starts, ['pi', 'value'])
    with lora.adapters_off(ref):
        tokens |= rollout.token_columns(run, ref, examples, starts, ['ref'])
    # an answer has ended if its last token is one that ends answers
    last = examples.ids[examples.spans[:, 1:, 1].reshape(-1) - 1]
    ended = torch.from_numpy(np.isin(last, list(stop)))
    return tokens, {'n': n, 'start': starts, 'ended': ended}


def describe(examples, tokens, answers, split):
    """Metrics of sampled answers: name -> float."""
    gap = tokens['pi'] - tokens['ref']
    found = {
        f'kl_{split}/samples': gap.sum() / len(answers['n']),
        f'kl_{split}/samples_per_token': gap.mean(),
        f'entropy/{split}': -tokens['pi'].mean(),
        f'length/{split}': answers['n'].double().mean(),
        f'ended/{split}': answers['ended'].double().mean(),
    }
    if 'score' in answers:
        found[f'score/{split}'] = answers['score'].mean()
    if data == 'toy':
        both = texts(examples)
        found[f'gold/{split}'] = torch.tensor([toy.gold(*text) for text in both]).double().mean()
        found[f'well_formed/{split}'] = torch.tensor([toy.well_formed(answer) for _, answer in both]).double().mean()
    return {name: round(value.item(), 10) for name, value in found.items()}


def make_round(first, rows):
    """The Round that begins after first answers, on the prompts at rows of the training set."""
    # the answers: labelled ones, or sampled from the policy as it is now
    if offline:
        examples = train.select(rows)
    else:
        prompts = [train[i][0].tolist() for i in rows for _ in range(group)]
        seeds = [(seed + 1) * 2**32 + first + i for i in range(len(prompts))]
        ids = rollout.sample(run, prompts, seeds, max_new_tokens, sample_batch)
        examples = Examples.of([(prompts[i], ids[i : i + group]) for i in range(0, len(ids), group)])

    # what is known of them, and what they score
    tokens, answers = measure(examples)
    answers['score'] = torch.from_numpy(examples.good * 2.0 - 1) if offline else scores(examples)
    found = {'length/train': answers['n'].double().mean().item(), 'score/train': answers['score'].mean().item()}
    if not offline:
        found |= describe(examples, tokens, answers, 'train')

    # what an answer is worth, and from there what each of its tokens is worth
    reward = answers['score'] - missing_eos_penalty * ~answers['ended'] * (not offline)
    tokens['old'] = tokens['ref'] if offline else tokens['pi']
    if loss == 'grpo':
        groups = reward.view(-1, group)
        tokens['advantage'] = formulas.group_advantage(groups).view(-1).repeat_interleave(answers['n'])
        found['equal_groups/train'] = (groups.std(1) == 0).double().mean().item()
    else:
        tokens |= critique(tokens, reward, answers)
        spread = tokens['target'].var(correction=0).item()
        left = (tokens['target'] - tokens['value']).var(correction=0).item()
        found['explained_variance/train'] = 1 - left / spread if spread else 0.0
    return Round(first, rows, examples, tokens, answers, found)


def critique(tokens, reward, answers):
    """Advantages of tokens and targets of their values, from the answers' rewards, the KL to the reference and the values."""
    # a table (answers, longest); the true places of mask are in the order of the tokens
    mask = torch.arange(int(answers['n'].max())) < answers['n'][:, None]
    value, rewards = (torch.zeros(mask.shape, dtype=torch.float64) for _ in range(2))
    value[mask] = tokens['value']
    if not kl_in_loss:
        rewards[mask] = -kl_coef * (tokens['pi'] - tokens['ref'])
    rewards[torch.arange(len(mask)), answers['n'] - 1] += reward  # at the last token

    # values aim at what came: advantage + value, offline at the discounted rewards themselves
    advantage = formulas.gae(rewards, value, mask, gamma=gamma, lam=lam)
    gain = formulas.gae(rewards, value, mask, gamma=gamma, lam=1.0) if offline else advantage
    target = value + gain
    if whiten:
        advantage = formulas.whiten(advantage, mask)
    return {'advantage': advantage[mask], 'target': target[mask]}


# ---- one optimizer step ----


def token_losses(pi, value, c):
    """(policy loss, value loss) of the answer tokens of a microbatch, (N,) each. value: [] without a critic; c: columns."""
    # with the KL as a penalty in the loss, or (in the rewards already) without
    if kl_in_loss:
        of_policy = formulas.grpo(pi, c['old'], c['ref'], c['advantage'], clip=clip, kl_coef=kl_coef)
    else:
        of_policy = formulas.ppo(pi, c['old'], c['advantage'], clip=clip)
    if not value:
        return of_policy, torch.zeros_like(of_policy)
    near = math.inf if value_clip is None else value_clip
    return of_policy, formulas.value_loss(value[0], c['value'], c['target'], value_clip=near)


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
    lengths = answered.answers['n'].view(-1, per_prompt)[rows]
    total_weight = lengths.numel() if per_answer else int(lengths.sum())
    return total_weight, {name: values.sum().item() for name, values in of_ranks.items()}


def report_bad_step(answered, rows, norm, loss_sum):
    """A minibatch whose loss or gradient is not finite: count it, and write down its answers."""
    known = {
        name: answered.answers[name].double().view(len(answered.examples), -1)[rows].flatten()
        for name in ('score', 'n')
    }
    at = np.repeat(answered.rows[rows], len(known['n']) // len(rows))
    known['loss'] = torch.full((len(at),), loss_sum)  # of the whole step
    allowed = training.skip_bad_steps
    guard.bad_step(out_dir, run.state, allowed, answered.first, at, train.uid[at], norm, known)


def train_round(answered):
    """All optimizer steps of a Round. Returns metrics."""
    # a minibatch is so many examples: prompts with all their answers
    n_examples, size = len(answered.examples), minibatch_size // group
    done = n_updates * (answered.first // batch_size)
    lengths = answered.answers['n'].view(n_examples, -1)
    norm, n_tokens, totals = math.nan, 0, {}
    for epoch in range(ppo_epochs):
        order = np.random.default_rng((seed, answered.first, epoch)).permutation(n_examples)
        # another order in each pass, the same on every rank
        for start in range(0, n_examples, size):
            rows = order[start : start + size]
            rate = lr * log.schedule(done, n_rounds * n_updates, warmup_steps, training.lr_schedule)
            done += 1

            # forward, backward, and one optimizer step
            batches, *_ = run.make_batches(answered.examples, rows)
            with run.memory(batches):
                weight, sums = run_minibatch(batches, answered, rows)
                scale = world / weight if math.isfinite(sums['loss']) else math.nan
                found = fsdp.update(policy, run.optimizer, rate, scale, max_grad_norm)
            if not math.isfinite(found):
                report_bad_step(answered, rows, found, sums['loss'])
                continue

            # means over tokens, in the end
            norm, n = found, int(lengths[rows].sum())
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
    tokens, answers = measure(examples)
    if reward_model:
        answers['score'] = scores(examples)
    if guard.stop_asked():
        return  # answers were cut short: it is done again after the resume

    # the first of them for people, all of them for the numbers
    some = [('policy', i, generate.without_end(answer, stop)) for i, answer in enumerate(ids)]
    file = f'{out_dir}/samples.jsonl'
    fsdp.on_one_rank(lambda: generate.write(file, tokenizer, prompts, some[:n_eval_model_samples], seen))
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
    found |= {
        'examples_per_second': log.per_second(n_answers, elapsed),
        'tokens_per_second': log.per_second(n_tokens, elapsed),
        'sampling_share': log.per_second(sampling, elapsed),
        'counters/step_examples': n_answers,
    }
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
