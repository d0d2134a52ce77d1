"""Supervised fine-tuning: the first half of the pipeline, whose model is the reference of dpo.py.

    python sft.py config/sft_toy.py
    torchrun --nproc_per_node=4 sft.py config/sft_hh.py

The loss of a step is the mean over its answer tokens, on any number of ranks. Counts are in examples, but for warmup_steps.
"""

import guard

guard.watch(__name__)  # before the heavy imports

import math
import time
from functools import partial

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
from load import can_pack, check_positions, fingerprints, load_model, load_tokenizer
from model import set_attention
from tokenise import load_examples

# model and data
model = 'toy'  # hub id, local folder, or 'toy'
data = 'toy'  # hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
eval_data: str | None = None  # None: the test split of data, or a part of it held out
noise_rate = 0.0  # train on the rejected answer of this fraction of pairs, as the original noise experiments do
control_tokens = False  # both answers of a pair, behind prompts that end with <|good|> or <|bad|> (conditional SFT)
data_fraction = 1.0  # use this fraction of the training examples
num_turns = 1  # sharegpt: answers taken from a conversation
max_length = 512  # tokens of prompt and answer
max_prompt_length = 256  # a prompt is cut to this if the whole is too long
truncation = 'start'  # which end a too long prompt loses: start or end
skip_bad_rows = False  # count unreadable rows instead of stopping
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
seed = 0  # of the data order and the samples
# LoRA
lora_rank: int | None = None  # train adapters of this rank instead of the model's weights
lora_alpha = 16.0  # their output is multiplied by alpha / rank
lora_dropout = 0.0  # inside the adapters, in training; depends on the number of ranks
lora_targets: str | None = None  # linear layers that get one, such as 'q_proj,v_proj'; None: all in the blocks
# evaluation and output
out_dir = 'out/sft'  # everything the run leaves behind
eval_every: int | None = 19968  # evaluate after so many examples; None: only at start and end
n_eval_examples = 256  # how many held-out examples
do_first_eval = True  # evaluate before training
sample_during_eval = False  # sample answers into samples.jsonl
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

# special tokens, as in HALOs' csft: one id each, whatever stands before and after them
CONTROL = ['<|good|>', '<|bad|>']

# ---- set-up ----

adapters = lora.options(config)
if adapters and control_tokens:
    raise UserError('control_tokens need embeddings that train, and lora_rank freezes them: leave out one of the two')
parallel.check(config)
rank, world, device = fsdp.setup(tp)
if batch_size < world:
    raise UserError(f'batch_size {batch_size} is smaller than the {world} ranks')
guard.begin(out_dir, config, resume)
models = fingerprints(config)  # in the background, for what the run and its checkpoints say of themselves
tokenizer = load_tokenizer(model, trust_remote_code)
if control_tokens:
    tokenizer.add_tokens(CONTROL, special_tokens=True)
load = partial(load_examples, tokenizer=tokenizer, seed=seed, max_length=max_length - control_tokens,
               max_prompt_length=max_prompt_length - control_tokens, truncation=truncation, num_turns=num_turns,
               skip_bad_rows=skip_bad_rows, whole=eval_data is not None)  # fmt: skip
task = 'singles' if control_tokens else 'pairs' if noise_rate else 'sft'
train = fsdp.first_of_host(lambda: load(data, 'train', task=task, data_fraction=data_fraction))
train = train.flip(noise_rate, seed).first_answers() if noise_rate else train
task = 'singles' if control_tokens else 'sft'
held_out = fsdp.first_of_host(lambda: load(eval_data or data, 'test', task=task)).select(slice(n_eval_examples))
if control_tokens:
    train, held_out = (x.control(*tokenizer.convert_tokens_to_ids(CONTROL)) for x in (train, held_out))
total = min(n_epochs * len(train), n_examples or math.inf)
log.say(f'data: {len(train)} training and {len(held_out)} evaluation examples; left out or changed: {train.changes()}')
log.say_too_long(train.lengths, max_tokens)

build = partial(load_model, model, tokenizer=tokenizer, trust_remote_code=trust_remote_code, seed=seed,
                adapters=adapters, grow=control_tokens)  # fmt: skip
policy = fsdp.shard(build, device, dtype=dtype, compile=compile, activation_checkpointing=activation_checkpointing,
                    cpu_offload=cpu_offload, device_map=device_map)  # fmt: skip
if adapters:
    log.say(lora.describe(policy))
torch.manual_seed(seed * 1_000_003 + rank)  # of the adapters' dropout: nothing else draws from it
optim = fsdp.make_optimizer(optimizer, policy, lr, weight_decay)
check_positions(policy, max(train.longest(), held_out.longest()), 'the examples')
if sample_during_eval:
    check_positions(policy, held_out.longest_prompt() + max_new_tokens, 'samples')
pack = can_pack(policy, *pack_probe(train, device), log.say, wanted=pack and attn is None)
set_attention(policy, pack, attn)
guard.check_room(config, policy, policy.response_logps, train, total, pack)
cut = partial(microbatches, rank=rank, world=world, max_tokens=max_tokens, pad=not pack, device=device)

# ---- one step ----


def run_step(index, batches, training):
    """The columns of a step, in step order. If training, the gradients are then the sum over its tokens / number of ranks."""
    parts = []
    for batch in batches:
        with torch.set_grad_enabled(training):
            pi = policy.response_logps(batch)[0]
            l = losses.sft(pi, batch.n)
        if training:
            real = torch.tensor(batch.place, device=device) >= 0
            (batch.n * l * real).sum().backward()
        parts.append({'loss': l, 'pi': pi, 'n': batch.n})
    joined = {k: torch.cat([columns[k] for columns in parts]) for k in parts[0]}
    return fsdp.gather_columns(joined, [p for batch in batches for p in batch.place], len(index))


def summary(whole, split):
    """Metrics of the columns of a step, or of an evaluation: name -> float."""
    metrics = {f'loss/{split}': (whole['n'] * whole['loss']).sum() / whole['n'].sum(),
               f'logps_{split}/chosen': whole['pi'].mean(), f'length_{split}/chosen': whole['n'].mean()}  # fmt: skip
    return {k: round(v.item(), 10) for k, v in metrics.items()}


def evaluate(examples_seen):
    """Metrics of the held-out examples; optional samples, one row each in samples.jsonl."""
    if not len(held_out) or examples_seen <= state['evaluated']:
        return
    plan = steps(len(held_out), batch_size, len(held_out), seed, shuffle=False)
    work = prefetch((index, cut(held_out, index)[0]) for _, index in plan)
    parts = []
    for index, batches in work:
        with guard.memory(batches, max_tokens):
            parts.append(run_step(index, batches, training=False))
        if guard.stop_asked():
            return  # an evaluation that was cut short is done again after the resume
    if sample_during_eval:
        sample(examples_seen)
    if not guard.stop_asked():
        logger.row('eval', examples_seen, summary({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, 'eval'))
        state['evaluated'] = examples_seen


def sample(examples_seen):
    """Answers to held-out prompts, one row each in samples.jsonl."""
    asked = held_out.select(held_out.good)  # with control tokens, the good kind of answer
    prompts = [asked[i][0] for i in range(min(n_eval_model_samples, len(asked)))]
    answers = generate.sample({'policy': policy}, tokenizer, prompts, rank=rank, world=world, seed=seed, top_p=top_p,
                              max_new_tokens=max_new_tokens, temperature=temperature)  # fmt: skip
    if main_rank():
        generate.write(f'{out_dir}/samples.jsonl', tokenizer, prompts, answers, examples_seen)


# ---- training ----


def save(seen):
    checkpoint.save(out_dir, seen, policy, optim, state | {'run': run}, keep_last)


run = checkpoint.identify(config, models, train, held_out)
latest = checkpoint.latest(out_dir, run) if resume else None
state = checkpoint.load(latest, policy, optim) if latest else {'examples': 0, 'evaluated': -1, 'bad_steps': 0}
start = state.pop('examples')
fsdp.on_one_rank(lambda: log.claim_out_dir(out_dir, config, run['contents']))
logger = log.Log(out_dir, total, start, log_every, wandb, tensorboard, state['evaluated'])
logger.say(f'{"resuming" if start else "training"} on {world} ranks: {total} examples, {batch_size} a step')
if do_first_eval and not start:
    evaluate(0)
elif start and log.crossed(eval_every, start - batch_size, start, total):
    evaluate(start)  # unless it was complete
n_steps = -(-total // batch_size)
clock = time.time()
schedule = steps(len(train), batch_size, total, seed, start)
for first, index, (batches, tokens, allocated) in prefetch((first, i, cut(train, i)) for first, i in schedule):
    waited = time.time() - clock
    rate = lr * log.schedule(first // batch_size, n_steps, warmup_steps, lr_schedule)
    with guard.memory(batches, max_tokens):
        whole = run_step(index, batches, training=True)
        scale = world / whole['n'].sum().item() if guard.finite(whole) else math.nan
        norm = fsdp.update(policy, optim, rate, scale, max_grad_norm, strict=False)
    if not math.isfinite(norm):
        guard.bad_step(out_dir, state, skip_bad_steps, first, index, train.uid[index], norm, whole)
    seen = first + len(index)
    elapsed, clock = time.time() - clock, time.time()
    metrics = summary(whole, 'train')
    metrics |= {'grad_norm': norm, 'lr': rate, 'examples_per_second': log.per_second(len(index), elapsed), 'padding_share': 1 - tokens / allocated,
                'tokens_per_second': log.per_second(tokens, elapsed),
                'data_wait_per_second': log.per_second(waited, elapsed),
                'counters/step_examples': len(index)}  # fmt: skip
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
