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
  paper) and offline PPO have it in the loss, as kl_penalty of losses.py; HALOs' offline PPO adds kl_coef mean(pi - ref) there.
* Offline, the old policy is the reference and values aim at discounted sums of rewards, as in HALOs; else at A + V.
* GRPO is a mean over tokens, as in HALOs and DAPO; with --per_answer over answers of their token means, as in its paper.
"""

import guard

guard.watch(__name__)  # before the heavy imports

import math
import time
from functools import partial

import numpy as np
import torch

import card
import checkpoint
import fsdp
import generate
import log
import lora
import losses
import parallel
import score
import toy
from configurator import UserError, configure, main_rank
from data import microbatches, pack_probe, steps
from examples import Examples
from load import (
    add_value_head,
    can_pack,
    check_positions,
    check_same_tokens,
    drop_value_head,
    fingerprints,
    load_model,
    load_reward,
    load_tokenizer,
)
from model import core, set_attention
from tokenise import load_examples

# model and data
model = 'toy'  # hub id, local folder, or 'toy'
ref_model: str | None = None  # the reference; None: the model as it is before training
reward_model: str | None = None  # what scores answers: a folder of reward.py, or gold (of the toy world)
critic = 'head'  # what estimates values: head (on the policy's trunk), own (a copy of the model), or a model folder
data = 'toy'  # where the prompts come from: hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
eval_data: str | None = None  # None: the test split of data, or a part of it held out
noise_rate = 0.0  # offline: fraction of training pairs whose labels are flipped
data_fraction = 1.0  # use this fraction of the training examples
num_turns = 1  # sharegpt: answers taken from a conversation
max_length = 512  # offline: tokens of prompt and answer
max_prompt_length = 256  # a longer prompt is cut to this
truncation = 'start'  # which end a too long prompt loses: start or end
skip_bad_rows = False  # count unreadable rows instead of stopping
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
max_tokens = 16384  # tokens of one microbatch of one rank: what the memory holds
lr = 1e-6  # learning rate
lr_schedule = 'constant'  # after warm-up: constant, linear or cosine to zero
warmup_steps = 10  # optimizer steps of linear warm-up
optimizer = 'AdamW'  # AdamW, RMSprop or SGD
weight_decay = 0.0  # the optimizer's
max_grad_norm = 1.0  # gradients are clipped to this norm
skip_bad_steps = 0  # leave out a step whose loss or gradient is not finite, so many times in a run; then stop
seed = 0  # of the order of prompts, the answers, the minibatches
# LoRA
lora_rank: int | None = None  # train adapters of this rank instead of the model's weights
lora_alpha = 16.0  # their output is multiplied by alpha / rank
lora_dropout = 0.0  # inside the adapters, in training; depends on the number of ranks
lora_targets: str | None = None  # linear layers that get one, such as 'q_proj,v_proj'; None: all in the blocks
# sampling
max_new_tokens = 128  # length of an answer
sample_batch = 128  # answers that one rank samples side by side
# evaluation and output
out_dir = 'out/ppo'  # everything the run leaves behind
eval_every: int | None = 19968  # evaluate after so many answers; None: only at start and end
n_eval_examples = 256  # how many held-out prompts are answered
do_first_eval = True  # evaluate before training
n_eval_model_samples = 16  # how many of these answers go into samples.jsonl
log_every = 1  # print a line after so many answers
save_every: int | None = None  # write a checkpoint after so many answers
keep_last = 2  # checkpoints that are kept
resume = True  # continue from the newest checkpoint of out_dir
wandb: str | None = None  # a Weights & Biases project to log to
tensorboard = False  # log to tensorboard, too
# machine
dtype = 'float32'  # compute type: float32 or bfloat16 (weights, gradients and sums stay float32)
pack = True  # no padding
share_prefix = True  # with group_size above 1: compute the prompt of a group once
compile = False  # torch.compile the transformer blocks
activation_checkpointing = False  # recompute activations: less memory, a third slower
cpu_offload = False  # weights and optimizer in the CPU's memory; changes nothing where there is no GPU
tp = 1  # tensor parallel: so many neighbouring ranks hold a block together, FSDP does the rest
device_map: str | None = None  # 'balanced': one process without torchrun spreads the model over its GPUs
attn: str | None = None  # attention on padded batches, such as sdpa, eager, flash_attention_2; None: packed
trust_remote_code = False  # run code that comes with a model
config = configure(globals())

# ---- what the options mean together ----

if loss not in ('ppo', 'grpo'):
    raise UserError(f'loss must be one of ppo, grpo, not {loss!r}: dpo.py has the losses on preferences')
config.ignored([] if offline else ['noise_rate', 'max_length'], 'answers are sampled, not taken from the data')
config.ignored(['missing_eos_penalty', 'group_size'] if offline else [], 'offline, answers come from the data')
if loss == 'grpo':
    config.ignored(['critic', 'vf_coef', 'value_clip', 'gamma', 'lam', 'whiten'], 'grpo has no critic')
else:
    config.ignored(['per_answer'], 'it belongs to grpo')
config.ignored([] if group_size > 1 else ['share_prefix'], 'there is one answer to a prompt')
if offline and loss == 'grpo':
    raise UserError('--offline goes with --loss=ppo: grpo compares several answers to one prompt, and samples them')
if loss == 'grpo' and group_size < 2:
    raise UserError('grpo compares the answers to one prompt: set --group_size to 2 or more')
if reward_model is None and not offline:
    raise UserError(
        'nothing scores the answers: give --reward_model=FOLDER (from reward.py), or gold for the toy world'
    )
if reward_model == 'gold' and {data, eval_data or data} != {'toy'}:
    raise UserError('--reward_model=gold is known for --data=toy alone: give a folder of reward.py')
if not (0 <= gamma <= 1 and 0 <= lam <= 1):
    raise UserError(f'gamma and lam must lie between 0 and 1, not {gamma} and {lam}')
group = 1 if offline else group_size
if batch_size % group or minibatch_size % group or minibatch_size > batch_size:
    raise UserError(f'batch_size {batch_size} and minibatch_size {minibatch_size} must be multiples of group_size {group}, '
                    'and a minibatch no larger than the batch')  # fmt: skip
kl_in_loss = offline or loss == 'grpo'

# ---- set-up ----

adapters = lora.options(config)
parallel.check(config)
rank, world, device = fsdp.setup(tp)
guard.begin(out_dir, config, resume)
models = fingerprints(config)  # in the background, for what the run and its checkpoints say of themselves
tokenizer = load_tokenizer(model, trust_remote_code)
load = partial(load_examples, tokenizer=tokenizer, seed=seed, max_prompt_length=max_prompt_length, truncation=truncation,
               num_turns=num_turns, skip_bad_rows=skip_bad_rows, whole=eval_data is not None)  # fmt: skip
# so that prompts are cut, whatever the answers
load_prompts = partial(load, task='prompts', max_length=max_prompt_length + 2)
load_train = partial(load, task='singles', max_length=max_length) if offline else load_prompts
train = fsdp.first_of_host(lambda: load_train(data, 'train', data_fraction=data_fraction))
train = train.flip(noise_rate, seed) if noise_rate and offline else train
held_out = fsdp.first_of_host(lambda: load_prompts(eval_data or data, 'test')).select(slice(n_eval_examples))
for prompts_only in [held_out] + [train] * (not offline):
    prompts_only.left_out.pop('answers cut', None)  # their answers are not used
total = min(n_epochs * len(train) * group, n_examples or math.inf) // group * group
log.say(f'data: {len(train)} training and {len(held_out)} evaluation examples; left out or changed: {train.changes()}')
if not total:
    raise UserError(f'n_examples {n_examples} is less than one group of {group} answers')

others = {'reference': ref_model, 'critic': None if loss == 'grpo' or critic in ('head', 'own') else critic}
for role, name in others.items():
    if name:
        check_same_tokens(tokenizer, name, f'the {role} {name}', model, trust_remote_code)
plain = dict(tokenizer=tokenizer, trust_remote_code=trust_remote_code)
build_policy = partial(load_model, model, seed=seed, adapters=adapters, **plain)


def build(**how):
    """The policy, for ppo with a value head, or with a critic that lives inside it: one optimizer, one checkpoint.

    Beside adapters, head or critic train as they are."""
    m = build_policy(**how)
    if loss == 'grpo':
        return m
    name = model if critic == 'own' else critic
    return add_value_head(m, None if critic == 'head' else load_reward(name, new_head=True, seed=seed, **plain, **how))


shard = partial(fsdp.shard, device=device, dtype=dtype, cpu_offload=cpu_offload, device_map=device_map)
policy = shard(build, compile=compile, activation_checkpointing=activation_checkpointing)
stop = generate.stop_tokens(policy, tokenizer)  # whatever of these ends an answer is trained on as it was sampled
if adapters:
    log.say(lora.describe(policy))
torch.manual_seed(seed * 1_000_003 + rank)  # of the adapters' dropout: nothing else draws from it
optim = fsdp.make_optimizer(optimizer, policy, lr, weight_decay)
longest = max(train.longest() if offline else 0, *(x.longest_prompt() + max_new_tokens for x in (train, held_out)))
check_positions(policy, longest, 'prompts with their answers')  # before it has to read them
pack = can_pack(policy, *pack_probe(train, device), log.say, wanted=pack and attn is None)
ref = policy  # which, where its adapters are off, is the model as it was
if not adapters or ref_model:
    ref = shard(partial(load_model, ref_model or model, seed=seed, **plain), train=False)
for m in filter(None, (policy, ref, getattr(core(policy), 'critic', None))):
    check_positions(m, longest, 'prompts with their answers')
    set_attention(m, pack, attn)
judge = None
if reward_model not in (None, 'gold'):
    judge, judge_tokenizer = score.load_scorer(reward_model, device, dtype=dtype, device_map=device_map,
                                               trust_remote_code=trust_remote_code)  # fmt: skip
    check_same_tokens(tokenizer, judge_tokenizer, f'the reward model {reward_model}', model)
cut = partial(microbatches, rank=rank, world=world, max_tokens=max_tokens, share_prefix=share_prefix, pad=not pack,
              device=device)  # fmt: skip
guard.check_room(config, policy, policy.token_logps, train, total, pack, [ref, judge])

# ---- a round of answers ----


def sample(prompts, seeds):
    """Answers of the policy, sampled from their own seeds, the work shared among the ranks: all ids that came, an end among them."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))[rank::world]  # of similar length, side by side
    rows = []
    with fsdp.unsharded(policy), guard.memory_for('sampled answers do not fit; lower sample_batch or max_new_tokens'):
        for part in (order[i : i + sample_batch] for i in range(0, len(order), sample_batch)):
            asked, keys = [prompts[i] for i in part], [seeds[i] for i in part]
            found = generate.generate(policy, tokenizer, asked, keys, max_new_tokens=max_new_tokens, keep_end=True)
            rows += zip(part, found, strict=True)
    answers = dict(row for part in fsdp.gather_objects(rows) for row in part)
    return [answers[i] for i in range(len(prompts))]


def texts(examples):
    """(prompt, answer) of every answer, as text."""
    return [(tokenizer.decode(prompt), tokenizer.decode(answer, skip_special_tokens=True))
            for prompt, answers in examples for answer in answers]  # fmt: skip


def token_places(batch, index, start, n):
    """Of the N answer tokens of a microbatch: their places among all tokens of the round, on the CPU; -1: a filler's."""
    answer = torch.tensor([index[p] * n + i if p >= 0 else -1 for p in batch.place for i in range(n)])[batch.row.cpu()]
    return torch.where(answer >= 0, start[answer] + batch.column.cpu(), -1)


def columns(m, examples, start, names):
    """Columns of every answer token of the examples under a model, flat, equal on all ranks, without gradient.

    names: of the rows of token_logps; a model without a value head has only the first, and only that is computed if only
    that is named."""
    n, parts, places = examples.spans.shape[1] - 1, [], []
    index = np.arange(len(examples))
    batches, *_ = cut(examples, index)
    for batch in batches:
        with torch.no_grad(), guard.memory(batches, max_tokens):
            parts.append(m.token_logps(batch, len(names) > 1))
        places += token_places(batch, index, start, n).tolist()
    joined = dict(zip(names, torch.cat(parts, 1), strict=False))
    return fsdp.gather_columns(joined, places, int(start[-1]))


def scores(examples):
    """Scores of every answer, as the reward model or the toy world gives them: (A,), equal on all ranks."""
    if reward_model == 'gold':
        return torch.tensor([toy.gold(*text) for text in texts(examples)], dtype=torch.float64)
    items = [(prompt, answer) for prompt, answers in examples for answer in answers]
    return torch.from_numpy(score.scores(judge, judge_tokenizer, items, max_tokens, ends=stop)).double()


def measure(examples):
    """Flat columns of the answer tokens of examples under policy and reference, and columns of the answers."""
    n = torch.tensor([len(answer) for _, answers in examples for answer in answers])
    # where each answer begins among all tokens; and, last, how many there are
    start = torch.cat((torch.zeros(1, dtype=torch.long), n.cumsum(0)))
    tokens = columns(policy, examples, start, ['pi', 'value'])
    with lora.adapters_off(ref):
        tokens |= columns(ref, examples, start, ['ref'])
    last = examples.ids[examples.spans[:, 1:, 1].reshape(-1) - 1]
    ended = torch.from_numpy(np.isin(last, list(stop)))
    return tokens, {'n': n, 'start': start, 'ended': ended}


def describe(examples, tokens, answers, split):
    """Metrics of sampled answers: name -> float."""
    gap = tokens['pi'] - tokens['ref']
    metrics = {f'kl_{split}/samples': gap.sum() / len(answers['n']),
               f'kl_{split}/samples_per_token': gap.mean(),
               f'entropy/{split}': -tokens['pi'].mean(), f'length/{split}': answers['n'].double().mean(),
               f'ended/{split}': answers['ended'].double().mean()}  # fmt: skip
    if 'score' in answers:
        metrics[f'score/{split}'] = answers['score'].mean()
    if data == 'toy':
        both = texts(examples)
        metrics[f'gold/{split}'] = torch.tensor([toy.gold(*text) for text in both]).double().mean()
        metrics[f'well_formed/{split}'] = torch.tensor([toy.well_formed(answer) for _, answer in both]).double().mean()
    return {k: round(v.item(), 10) for k, v in metrics.items()}


def make_round(first, index):
    """The examples of a round, flat columns of their tokens, of the answers, and metrics; equal on all ranks."""
    if offline:
        examples = train.select(index)
    else:
        prompts = [train[i][0].tolist() for i in index for _ in range(group)]
        ids = sample(prompts, [(seed + 1) * 2**32 + first + i for i in range(len(prompts))])
        examples = Examples.of([(prompts[i], ids[i : i + group]) for i in range(0, len(ids), group)])
    tokens, answers = measure(examples)
    answers['score'] = torch.from_numpy(examples.good * 2.0 - 1) if offline else scores(examples)
    metrics = {'length/train': answers['n'].double().mean().item(), 'score/train': answers['score'].mean().item()}
    if not offline:
        metrics |= describe(examples, tokens, answers, 'train')
    reward = answers['score'] - missing_eos_penalty * ~answers['ended'] * (not offline)
    tokens['old'] = tokens['ref'] if offline else tokens['pi']
    if loss == 'grpo':
        advantage = losses.group_advantage(reward.view(-1, group)).view(-1)
        tokens['advantage'] = advantage.repeat_interleave(answers['n'])
        metrics['equal_groups/train'] = (reward.view(-1, group).std(1) == 0).double().mean().item()
    else:
        tokens |= critique(tokens, reward, answers)
        spread = tokens['target'].var(correction=0).item()
        left = (tokens['target'] - tokens['value']).var(correction=0).item()
        metrics['explained_variance/train'] = 1 - left / spread if spread else 0.0
    return examples, tokens, answers, metrics


def critique(tokens, reward, answers):
    """Advantages of tokens and targets of their values, from the answers' rewards, the KL to the reference and the values."""
    # (A, T), its true places in the order of tokens
    mask = torch.arange(int(answers['n'].max())) < answers['n'][:, None]
    rewards, value = (torch.zeros(mask.shape, dtype=torch.float64) for _ in range(2))
    value[mask] = tokens['value']
    rewards[mask] = 0.0 * tokens['pi'] if kl_in_loss else -kl_coef * (tokens['pi'] - tokens['ref'])
    rewards[torch.arange(len(mask)), answers['n'] - 1] += reward
    advantage = losses.gae(rewards, value, mask, gamma=gamma, lam=lam)
    target = value + (losses.gae(rewards, value, mask, gamma=gamma, lam=1.0) if offline else advantage)
    advantage = losses.whiten(advantage, mask) if whiten else advantage
    return {'advantage': advantage[mask], 'target': target[mask]}


# ---- one optimizer step ----


def run_minibatch(batches, examples, tokens, answers, index):
    """Forward and backward of the examples at index, in batches. Returns (weight, sums over the minibatch: name -> float).

    After it the policy's gradients are the sum over its tokens of weight times gradient, divided by the number of ranks."""
    n = examples.spans.shape[1] - 1
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        at = token_places(batch, index, answers['start'], n)
        real = (at >= 0).to(device)
        c = {k: v[at].to(device, torch.float32) for k, v in tokens.items()}
        pi, *value = policy.token_logps(batch)
        if kl_in_loss:
            l = losses.grpo(pi, c['old'], c['ref'], c['advantage'], clip=clip, kl_coef=kl_coef)
        else:
            l = losses.ppo(pi, c['old'], c['advantage'], clip=clip)
        v = torch.zeros_like(l)
        if value:
            v = losses.value_loss(
                value[0], c['value'], c['target'], value_clip=math.inf if value_clip is None else value_clip
            )
        weight = (1 / batch.n[batch.row] if per_answer else torch.ones_like(l)) * real
        (weight * (l + vf_coef * v)).sum().backward()
        rho = (pi - c['old']).detach().exp()
        stats = [weight * l, weight * v, real * ((rho - 1).abs() > clip), real * (rho - 1 - rho.log())]
        sums += torch.stack([x.detach().double().sum().cpu() for x in stats])
    names = ('loss', 'value_loss', 'clipped', 'approx_kl')
    parts = fsdp.gather_columns({k: x[None] for k, x in zip(names, sums, strict=True)}, [rank], world)
    chosen = answers['n'].view(-1, n)[index]
    return chosen.numel() if per_answer else int(chosen.sum()), {k: v.sum().item() for k, v in parts.items()}


def train_round(first, examples, tokens, answers, places):
    """All optimizer steps of a round; places: of its prompts in the training set. Returns metrics."""
    done, size, n_tokens, totals, norm = n_updates * (first // batch_size), minibatch_size // group, 0, {}, math.nan
    for epoch in range(ppo_epochs):
        order = np.random.default_rng((seed, first, epoch)).permutation(len(examples))
        for i in range(0, len(order), size):
            index = order[i : i + size]
            rate = lr * log.schedule(done, n_rounds * n_updates, warmup_steps, lr_schedule)
            batches, *_ = cut(examples, index)
            with guard.memory(batches, max_tokens):
                weight, sums = run_minibatch(batches, examples, tokens, answers, index)
                scale = world / weight if math.isfinite(sums['loss']) else math.nan
                found = fsdp.update(policy, optim, rate, scale, max_grad_norm, strict=False)
            if not math.isfinite(found):
                known = {k: answers[k].double().view(len(examples), -1)[index].flatten() for k in ('score', 'n')}
                at = np.repeat(places[index], len(known['n']) // len(index))
                known['loss'] = torch.full((len(at),), sums['loss'])  # of the whole step
                guard.bad_step(out_dir, state, skip_bad_steps, first, at, train.uid[at], found, known)
                done += 1
                continue
            norm, n = found, int(answers['n'].view(len(examples), -1)[index].sum())
            sums['loss'], sums['value_loss'] = sums['loss'] * n / weight, sums['value_loss'] * n / weight
            totals = {k: totals.get(k, 0.0) + v for k, v in sums.items()}
            n_tokens, done = n_tokens + n, done + 1
    metrics = {f'{k}/train': v / max(1, n_tokens) for k, v in totals.items() if k != 'value_loss' or loss == 'ppo'}
    return metrics | {'grad_norm': norm, 'lr': rate}


# ---- evaluation ----


def evaluate(examples_seen):
    """Metrics of answers to held-out prompts, always from the same seeds; some of them into samples.jsonl."""
    if not len(held_out) or examples_seen <= state['evaluated']:
        return
    prompts = [held_out[i][0].tolist() for i in range(len(held_out))]
    ids = sample(prompts, [seed * 1_000_003 + i for i in range(len(prompts))])
    examples = Examples.of([(prompt, [answer]) for prompt, answer in zip(prompts, ids, strict=True)])
    tokens, answers = measure(examples)
    if reward_model:
        answers['score'] = scores(examples)
    if guard.stop_asked():
        return  # answers were cut short: it is done again after the resume
    if main_rank():
        some = [('policy', i, generate.without_end(answer, stop)) for i, answer in enumerate(ids)]
        generate.write(f'{out_dir}/samples.jsonl', tokenizer, prompts, some[:n_eval_model_samples], examples_seen)
    logger.row('eval', examples_seen, describe(examples, tokens, answers, 'eval'))
    state['evaluated'] = examples_seen


# ---- training ----


def save(seen):
    checkpoint.save(out_dir, seen, policy, optim, state | {'run': run}, keep_last)


run = checkpoint.identify(config, models, train, held_out)
latest = checkpoint.latest(out_dir, run) if resume else None
state = checkpoint.load(latest, policy, optim) if latest else {'examples': 0, 'evaluated': -1, 'bad_steps': 0}
start = state.pop('examples')
fsdp.on_one_rank(lambda: log.claim_out_dir(out_dir, config, run['contents']))
logger = log.Log(out_dir, total, start, log_every, wandb, tensorboard, state['evaluated'])
kind = f'{loss} {"offline " if offline else ""}on {world} ranks'
logger.say(
    f'{"resuming" if start else "training"} {kind}: {total} answers, {batch_size} a round, {minibatch_size} a step'
)
if do_first_eval and not start:
    evaluate(0)
elif start and log.crossed(eval_every, start - batch_size, start, total):
    evaluate(start)  # unless it was complete
n_rounds, n_updates = -(-total // batch_size), ppo_epochs * -(-batch_size // minibatch_size)
clock = time.time()
for first, index in steps(len(train), batch_size // group, total // group, seed, start // group):
    first, seen = first * group, (first + len(index)) * group
    examples, tokens, answers, metrics = make_round(first, index)
    # a round that was cut short is thrown away; before the first there is nothing to save
    guard.boundary(partial(save, first) if first else lambda: None, logger.close)
    sampled = time.time()
    metrics |= train_round(first, examples, tokens, answers, index)
    elapsed, sampling, clock = time.time() - clock, sampled - clock, time.time()
    metrics |= {'examples_per_second': log.per_second(seen - first, elapsed),
                'tokens_per_second': log.per_second(int(answers['n'].sum()), elapsed),
                'sampling_share': log.per_second(sampling, elapsed), 'counters/step_examples': seen - first}  # fmt: skip
    metrics |= {'counters/bad_steps': state['bad_steps']} if skip_bad_steps else {}
    logger.row('train', seen, metrics)
    due = [log.crossed(every, first, seen, total) for every in (eval_every, save_every)]
    if due[0]:
        evaluate(seen)
    if due[1]:
        save(seen)
    guard.boundary(partial(save, seen), logger.close, saved=due[1])
    clock = time.time() if any(due) else clock
evaluate(total)
guard.boundary(partial(save, total), logger.close)
checkpoint.wait()
drop_value_head(policy)
guard.export(policy, tokenizer, build_policy, f'{out_dir}/model', partial(card.write, out_dir))
logger.close()
guard.end()
log.say(f'done: {out_dir}/model')
if __name__ == '__main__':
    fsdp.leave()
