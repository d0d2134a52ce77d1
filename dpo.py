"""Train a language model on preferences, with any loss of losses.py, on one process or many.

    python dpo.py config/drdpo_toy.py --model=out/sft_toy/model
    torchrun --nproc_per_node=4 dpo.py config/drdpo_hh.py --model=out/sft_hh/model

Order of one step: the columns of every example (log-probs of its answers under policy and reference) -> the step's
statistic, if the loss has one -> loss and weight of every example -> one gradient, the weighted mean over the whole step.
It is the same on any number of ranks and microbatches. Counts are in examples, but for warmup_steps.
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
from configurator import UserError, configure, main_rank
from data import microbatches, pack_probe, prefetch, steps
from examples import Examples
from load import can_pack, check_heads, check_positions, check_same_tokens, fingerprints, load_model, load_tokenizer
from model import set_attention
from reference import cached_logps
from spec import Spec
from tokenise import load_examples

# model and data
model = 'toy'  # hub id, local folder, or 'toy'
ref_model: str | None = None  # the reference; None: the model as it is before training
data = 'toy'  # hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
eval_data: str | None = None  # None: the test split of data, or a part of it held out
noise_rate = 0.0  # fraction of training pairs whose labels are flipped
data_fraction = 1.0  # use this fraction of the training examples
frac_good = 1.0  # kto, kto_zero: keep this fraction of the good answers
frac_bad = 1.0  # kto, kto_zero: keep this fraction of the bad answers
num_turns = 1  # sharegpt: answers taken from a conversation
max_length = 512  # tokens of prompt and answer
max_prompt_length = 256  # a prompt is cut to this if the whole is too long
truncation = 'start'  # which end a too long prompt loses: start or end
skip_bad_rows = False  # count unreadable rows instead of stopping
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
max_tokens = 16384  # tokens of one microbatch of one rank: what the memory holds
lr = 5e-7  # learning rate
lr_schedule = 'constant'  # after warm-up: constant, linear or cosine to zero
warmup_steps = 150  # steps of linear warm-up
optimizer = 'AdamW'  # AdamW, RMSprop or SGD
weight_decay = 0.0  # the optimizer's
max_grad_norm = 10.0  # gradients are clipped to this norm
skip_bad_steps = 0  # leave out a step whose loss or gradient is not finite, so many times in a run; then stop
seed = 0  # of the data order, the flips, the statistics, the samples
# LoRA
lora_rank: int | None = None  # train adapters of this rank instead of the model's weights
lora_alpha = 16.0  # their output is multiplied by alpha / rank
lora_dropout = 0.0  # inside the adapters, in training; depends on the number of ranks
lora_targets: str | None = None  # linear layers that get one, such as 'q_proj,v_proj'; None: all in the blocks
# evaluation and output
out_dir = 'out/dpo'  # everything the run leaves behind
eval_every: int | None = 19968  # evaluate after so many examples; None: only at start and end
n_eval_examples = 256  # how many held-out examples
do_first_eval = True  # evaluate before training
sample_during_eval = False  # sample answers of policy and reference into samples.jsonl
n_eval_model_samples = 16  # how many answers of each model
max_new_tokens = 128  # length of a sample
temperature = 1.0  # of the samples; 0: greedy
top_p = 1.0  # of the samples
log_every = 1  # print a line after so many examples
save_every: int | None = None  # write a checkpoint after so many examples
keep_last = 2  # checkpoints that are kept
resume = True  # continue from the newest checkpoint of out_dir
wandb: str | None = None  # a Weights & Biases project to log to
tensorboard = False  # log to tensorboard, too
# machine
dtype = 'float32'  # compute type: float32 or bfloat16 (weights, gradients and sums stay float32)
pack = True  # no padding
share_prefix = True  # compute the prompt of a pair once
cache_ref = False  # reference log-probs from a file, computed once: pays from the second epoch or run on
compile = False  # torch.compile the transformer blocks
activation_checkpointing = False  # recompute activations: less memory, a third slower
cpu_offload = False  # weights and optimizer in the CPU's memory; changes nothing where there is no GPU
tp = 1  # tensor parallel: so many neighbouring ranks hold a block together, FSDP does the rest
device_map: str | None = None  # 'balanced': one process without torchrun spreads the model over its GPUs
attn: str | None = None  # attention on padded batches, such as sdpa, eager, flash_attention_2; None: packed
trust_remote_code = False  # run code that comes with a model
config = configure(globals())
if not sample_during_eval:
    config.ignored(config.given('n_eval_model_samples max_new_tokens temperature top_p'), 'sample_during_eval is off')

spec = Spec(config)  # what the loss asks for: its signature says
beta_prime, importance, sft_coef = (spec.options[name] for name in ('beta_prime', 'importance', 'sft_coef'))

# ---- set-up ----

adapters = lora.options(config)
parallel.check(config)
rank, world, device = fsdp.setup(tp)
if batch_size < max(world, 2 if loss == 'kto' else 1):
    raise UserError(f'batch_size {batch_size} is too small: one example for each of {world} ranks, two for kto')
guard.begin(out_dir, config, resume)
models = fingerprints(config)  # in the background, for what the run and its checkpoints say of themselves
tokenizer = load_tokenizer(model, trust_remote_code)
if ref_model and spec.needs_ref:
    check_same_tokens(tokenizer, ref_model, f'the reference {ref_model}', model, trust_remote_code)
load = partial(load_examples, tokenizer=tokenizer, task='pairs' if spec.paired else 'singles', seed=seed,
               max_length=max_length, max_prompt_length=max_prompt_length, truncation=truncation, num_turns=num_turns,
               skip_bad_rows=skip_bad_rows, whole=eval_data is not None)  # fmt: skip
train = fsdp.first_of_host(lambda: load(data, 'train', data_fraction=data_fraction))
held_out = fsdp.first_of_host(lambda: load(eval_data or data, 'test')).select(slice(n_eval_examples))
build = partial(load_model, model, tokenizer=tokenizer, trust_remote_code=trust_remote_code, seed=seed,
                adapters=adapters)  # fmt: skip
shard = partial(fsdp.shard, device=device, dtype=dtype, cpu_offload=cpu_offload, device_map=device_map)
policy = shard(build, compile=compile, activation_checkpointing=activation_checkpointing)
if adapters:
    log.say(lora.describe(policy))
torch.manual_seed(seed * 1_000_003 + rank)  # of the adapters' dropout: nothing else draws from it
optim = fsdp.make_optimizer(optimizer, policy, lr, weight_decay)
longest = min(max_length, max(x.longest(mixed=loss == 'kto') for x in (train, held_out)))
check_positions(policy, longest, 'the examples')
if sample_during_eval:
    check_positions(policy, held_out.longest_prompt() + max_new_tokens, 'samples')
pack = can_pack(policy, *pack_probe(train, device), log.say, wanted=pack and attn is None)
set_attention(policy, pack, attn)
# without max_tokens yet: the cache's pass keeps no activations and takes more of them
cut = partial(microbatches, rank=rank, world=world, share_prefix=share_prefix, pad=not pack, device=device)


def load_reference():
    if adapters and ref_model is None:
        return policy  # which is the reference where its adapters are off
    m = shard(build_ref, train=False)
    check_positions(m, longest, 'the examples')
    set_attention(m, pack, attn)
    return m


build_ref = partial(load_model, ref_model or model, tokenizer=tokenizer, trust_remote_code=trust_remote_code, seed=seed)
ref = load_reference() if spec.needs_ref and not cache_ref else None
if spec.divergence:
    check_heads(policy, ref)
if cache_ref:
    if sample_during_eval:
        log.say("note: with --cache_ref the reference is not there to be sampled: samples are the policy's, without kl")
    cached = partial(cached_logps, build_ref, load_reference, cut=partial(cut, max_tokens=4 * max_tokens), dtype=dtype)
    train, held_out = cached(train), cached(held_out) if len(held_out) else held_out
cut = partial(cut, max_tokens=max_tokens)
train = train.flip(noise_rate, seed) if noise_rate else train
train = train if spec.paired else train.keep(frac_good, frac_bad, seed)
if loss == 'kto' and len(train) == 1:
    raise UserError(f'kto compares an answer with that of another example, and the training data {data!r} has one only')
if loss == 'kto' and len(set(train.prompts)) == 1:
    log.say('note: all examples have one prompt, so the z of kto is estimated from other answers to it')
total = min(n_epochs * len(train), n_examples or math.inf)
log.say(f'data: {len(train)} training and {len(held_out)} evaluation examples; left out or changed: {train.changes()}')
log.say_too_long(train.lengths, max_tokens)
guard.check_room(config, policy, policy.response_logps, train, total, pack, [ref])

# ---- one step ----


def answer_columns(batch):
    """pi, ref, div, n of every answer of a microbatch, (A,) each."""
    with torch.no_grad(), lora.adapters_off(ref):
        reference = ref.hidden_and_head(batch) if spec.divergence else None
        ref_logps = batch.ref  # cached, or None
        if ref is not None and not spec.divergence:
            ref_logps = ref.response_logps(batch)[0]
    out = policy.response_logps(batch, spec.divergence, reference)
    if spec.divergence:
        return {'pi': out[0], 'ref': out[2], 'div': out[1], 'n': batch.n.float()}
    ref_logps = torch.zeros_like(out[0]) if ref_logps is None else ref_logps  # no reference: the loss does not read it
    return {'pi': out[0], 'ref': ref_logps, 'n': batch.n.float()}


def forward(batch):
    """The columns of a microbatch, (examples,) each: for pairs, x of the answers becomes x_w and x_l."""
    columns = answer_columns(batch)
    if spec.paired:
        columns = {f'{k}_{side}': v[i::2] for k, v in columns.items() for i, side in enumerate('wl')}
    return columns


def loss_and_weight(columns, place, extra):
    """l and w of losses.py for the examples of a microbatch; extra: columns of the whole step, in step order."""
    # a filler has place -1, so it reads the last row; its loss counts nothing
    more = {k: v[place].to(device, torch.bool if k == 'good' else torch.float32) for k, v in extra.items()}
    own, columns = columns, columns | more  # a statistic may put other values in the place of some columns
    l = spec.call(spec.fn, columns)
    if importance:
        l = l * spec.call(losses.importance, own)
    if sft_coef:
        l = l + sft_coef * losses.sft(own['pi_w'], own['n_w'])
    return l, columns.get('weight', torch.ones_like(l))


def prepare(examples, first, index):
    """Everything about a step that can be known before it: microbatches, thumbs, counts. Runs ahead, in a thread."""
    batches, tokens, allocated = cut(examples, index)
    mismatched = cut(examples.mismatched(index, longest, train), np.arange(len(index)))[0] if loss == 'kto' else []
    thumbs = {} if spec.paired else {'good': torch.from_numpy(examples.good[index])}
    return (first, index, batches, mismatched, thumbs), tokens, allocated


def gather(parts, batches, total):
    """Columns of this rank's microbatches -> columns of the whole step, in step order, equal on every rank."""
    joined = {k: torch.cat([columns[k] for columns in parts]) for k in parts[0]}
    return fsdp.gather_columns(joined, [p for batch in batches for p in batch.place], total)


def run_step(first, index, batches, mismatched, thumbs, state, training, shift=None):
    """Forward (and backward, if training) of one step. Returns (its columns in step order, the new state).

    After it the policy's gradients are the sum of w_i grad l_i, divided by the number of ranks. shift: of Dr. DPO's weights."""
    extra, forwarded, new = dict(thumbs), {}, dict(state)
    if spec.statistic:
        # one microbatch: the pass that trains serves the statistic as well, and its graph is kept in `forwarded`
        once = training and len(batches) == 1 and not mismatched
        with torch.set_grad_enabled(once):
            parts = [forward(batch) for batch in mismatched or batches]
        forwarded = parts[0] if once else {}
        whole = gather(parts, mismatched or batches, len(index))
        whole |= {f'{k}_kl': v for k, v in whole.items()} if mismatched else {}
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        values, new['statistic'] = spec.call(spec.statistic, whole, state=state['statistic'], generator=generator)
        extra |= values
    parts = []
    for batch in batches:
        with torch.set_grad_enabled(training):
            columns = forwarded or forward(batch)
            l, w = loss_and_weight(columns, batch.place, extra)
        real = torch.tensor(batch.place, device=device) >= 0
        if beta_prime and shift is None:  # any constant of the step cancels that keeps the weights inside float range
            shift = fsdp.smallest(torch.where(real, l.detach(), torch.inf))
        step_weight = w * losses.drdpo_weight(l.detach(), shift, beta_prime=beta_prime) if beta_prime else w
        if training:
            (step_weight * l * real).sum().backward()
        parts.append(columns | {'loss': l, 'weight': w, 'step_weight': step_weight})
    more = {} if spec.paired else {'good': thumbs['good'], 'z': extra.get('z', torch.zeros(len(index)))}
    whole = gather(parts, batches, len(index)) | more
    # A much smaller loss than the shift gives weights of e^20 and more, whose squares in the norm overflow: rare, done again.
    low = whole['loss'].min()
    overflows = bool(beta_prime) and low < shift.cpu() - 20 * beta_prime
    if training and overflows:
        optim.zero_grad(set_to_none=True)
        return run_step(first, index, batches, mismatched, thumbs, state, training, shift=low.to(shift))
    return whole, new


# ---- evaluation ----


def evaluate(examples_seen):
    """Metrics of the held-out examples, with the state of training as it is; optional samples into samples.jsonl."""
    if not len(held_out) or examples_seen <= state['evaluated']:
        return
    work = (prepare(held_out, *step) for step in steps(len(held_out), batch_size, len(held_out), 0, shuffle=False))
    parts = []
    for step, *_ in prefetch(work):
        with guard.memory(step[2], max_tokens):
            parts.append(run_step(*step, state, training=False)[0])
        if guard.stop_asked():
            return  # an evaluation that was cut short is done again after the resume
    metrics = spec.summary({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, 'eval')
    if sample_during_eval:
        metrics |= sample(examples_seen)
    if not guard.stop_asked():
        logger.row('eval', examples_seen, metrics)
        state['evaluated'] = examples_seen


def sample(examples_seen):
    """Answers of policy and reference to held-out prompts, one row each in samples.jsonl; KL(policy || reference) on them."""
    asked = held_out.select(held_out.good)  # of the two answers that kto makes of a pair, one
    prompts = [asked[i][0] for i in range(min(n_eval_model_samples, len(asked)))]
    models = {'policy': policy, 'reference': ref} if ref else {'policy': policy}
    answers = generate.sample(models, tokenizer, prompts, rank=rank, world=world, seed=seed, temperature=temperature,
                              max_new_tokens=max_new_tokens, top_p=top_p, keep_end=True)  # fmt: skip
    if main_rank():
        stop = {name: generate.stop_tokens(m, tokenizer) for name, m in models.items()}
        shown = [(name, i, generate.without_end(answer, stop[name])) for name, i, answer in answers]
        generate.write(f'{out_dir}/samples.jsonl', tokenizer, prompts, shown, examples_seen)
    if not ref or not prompts:
        return {}
    own = Examples.of([(prompts[i], [answer]) for name, i, answer in answers if name == 'policy'])
    batches, *_ = cut(own, np.arange(len(own)))
    with torch.no_grad(), guard.memory(batches, max_tokens):
        parts = [answer_columns(batch) for batch in batches]
    whole = gather(parts, batches, len(own))
    gap = whole['pi'] - whole['ref']
    return {'kl_eval/samples': gap.mean().item(), 'kl_eval/samples_per_token': (gap.sum() / whole['n'].sum()).item()}


# ---- training ----


def save(seen):
    checkpoint.save(out_dir, seen, policy, optim, state | {'run': run}, keep_last)


run = checkpoint.identify(config, models, train, held_out)
latest = checkpoint.latest(out_dir, run) if resume else None
fresh = {'statistic': {}, 'examples': 0, 'evaluated': -1, 'bad_steps': 0}
state = checkpoint.load(latest, policy, optim) if latest else fresh
start = state.pop('examples')
fsdp.on_one_rank(lambda: log.claim_out_dir(out_dir, config, run['contents']))
logger = log.Log(out_dir, total, start, log_every, wandb, tensorboard, state['evaluated'])
logger.say(f'{"resuming" if start else "training"} {loss} on {world} ranks: {total} examples, {batch_size} a step')
if not start:
    _, first_index = next(steps(len(train), batch_size, total, seed))
    first_step = prepare(train, 0, first_index)[0]
    with guard.memory(first_step[2], max_tokens):
        before, _ = run_step(*first_step, state, training=False)
    check = spec.summary(before, 'train')
    rewards = [check.get(f'rewards_train/{side}', 0.0) for side in ('chosen', 'rejected')]  # kto: a step may lack one
    logger.say(
        f'step 0: rewards {rewards[0]:.6f}, {rewards[1]:.6f}; loss {before["loss"].mean():.6f} (dpo: log 2 = 0.693147)'
    )
    logger.row('check', 0, check)
    if spec.needs_ref and ref_model is None and max(map(abs, rewards)) > (1e-2 if dtype == 'bfloat16' else 1e-4):
        logger.say('warning: the rewards should be 0 before the first step, because policy and reference are one model')
    if do_first_eval:
        evaluate(0)
elif log.crossed(eval_every, start - batch_size, start, total):
    evaluate(start)  # unless it was complete

n_steps = -(-total // batch_size)
clock = time.time()
for step, tokens, allocated in prefetch(prepare(train, *s) for s in steps(len(train), batch_size, total, seed, start)):
    waited = time.time() - clock
    first, index, *_ = step
    rate = lr * log.schedule(first // batch_size, n_steps, warmup_steps, lr_schedule)
    with guard.memory(step[2], max_tokens):
        whole, new_state = run_step(*step, state, training=True)
        # NaN: update leaves the weights alone and returns a norm that is not finite
        weight = whole['step_weight'].sum().item() if guard.finite(whole) else math.nan
        norm = fsdp.update(policy, optim, rate, world / (weight or math.nan), max_grad_norm, strict=False)
    if math.isfinite(norm):
        state = new_state
    else:
        guard.bad_step(out_dir, state, skip_bad_steps, first, index, train.uid[index], norm, whole)
    seen = first + len(index)
    elapsed, clock = time.time() - clock, time.time()
    metrics = spec.summary(whole, 'train')
    metrics |= {'grad_norm': norm, 'lr': rate, 'examples_per_second': log.per_second(len(index), elapsed), 'padding_share': 1 - tokens / allocated,
                'tokens_per_second': log.per_second(tokens, elapsed),
                'data_wait_per_second': log.per_second(waited, elapsed),
                'counters/step_examples': len(index)}  # fmt: skip
    metrics |= {f'state/{k}': v for k, v in state['statistic'].items()}
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
guard.export(policy, tokenizer, build, f'{out_dir}/model', partial(card.write, out_dir))
logger.close()
guard.end()
log.say(f'done: {out_dir}/model')
if __name__ == '__main__':
    fsdp.leave()
