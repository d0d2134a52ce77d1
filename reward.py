"""Train a reward model on pairs: the Bradley-Terry model with a scalar head on the last token of an answer.

    python reward.py config/reward_toy.py
    torchrun --nproc_per_node=4 reward.py config/reward_hh.py

The loss of a step is the mean over its pairs, on any number of ranks and microbatches. Where rows have
a `margin`, the chosen score should be higher by that much. The result is a folder that transformers'
AutoModelForSequenceClassification reads. Counts are in examples, but for warmup_steps.
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
import log
import lora
import losses
import parallel
from configurator import UserError, configure
from data import microbatches, pack_probe, prefetch, steps
from load import can_pack, check_positions, fingerprints, load_reward, load_tokenizer, separate_pad
from model import set_attention
from tokenise import load_examples

# model and data
model = 'toy'  # hub id or folder of a language model or a reward model, or 'toy'
data = 'toy'  # hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
eval_data: str | None = None  # None: the test split of data, or a part of it held out
noise_rate = 0.0  # fraction of training pairs whose labels are flipped
data_fraction = 1.0  # use this fraction of the training examples
num_turns = 1  # sharegpt: answers taken from a conversation
max_length = 512  # tokens of prompt and answer
max_prompt_length = 256  # a prompt is cut to this if the whole is too long
truncation = 'start'  # which end a too long prompt loses: start or end
skip_bad_rows = False  # count unreadable rows instead of stopping
# loss
center_coef = 0.0  # weight of the squared sum of both scores, which keeps them near 0 (its paper: 0.01)
label_smoothing = 0.0  # probability that a label is wrong
# steps
n_epochs = 1  # passes over the data
n_examples: int | None = None  # stop after so many examples; None: n_epochs decides
batch_size = 64  # examples of one optimizer step, all ranks together
max_tokens = 16384  # tokens of one microbatch of one rank: what the memory holds
lr = 1e-5  # learning rate
lr_schedule = 'constant'  # after warm-up: constant, linear or cosine to zero
warmup_steps = 150  # steps of linear warm-up
optimizer = 'AdamW'  # AdamW, RMSprop or SGD
weight_decay = 0.0  # the optimizer's
max_grad_norm = 10.0  # gradients are clipped to this norm
skip_bad_steps = 0  # leave out a step whose loss or gradient is not finite, so many times in a run; then stop
seed = 0  # of the new head, the data order, the flips
# LoRA
lora_rank: int | None = None  # train adapters of this rank instead of the model's weights; the head trains as it is
lora_alpha = 16.0  # their output is multiplied by alpha / rank
lora_dropout = 0.0  # inside the adapters, in training; depends on the number of ranks
lora_targets: str | None = None  # linear layers that get one, such as 'q_proj,v_proj'; None: all in the blocks
# evaluation and output
out_dir = 'out/reward'  # everything the run leaves behind
eval_every: int | None = 19968  # evaluate after so many examples; None: only at start and end
n_eval_examples = 256  # how many held-out examples
do_first_eval = True  # evaluate before training
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
compile = False  # torch.compile the transformer blocks
activation_checkpointing = False  # recompute activations: less memory, a third slower
cpu_offload = False  # weights and optimizer in the CPU's memory; changes nothing where there is no GPU
tp = 1  # tensor parallel: so many neighbouring ranks hold a block together, FSDP does the rest
device_map: str | None = None  # 'balanced': one process without torchrun spreads the model over its GPUs
attn: str | None = None  # attention on padded batches, such as sdpa, eager, flash_attention_2; None: packed
trust_remote_code = False  # run code that comes with a model
config = configure(globals())

# ---- set-up ----

adapters = lora.options(config)
parallel.check(config)
rank, world, device = fsdp.setup(tp)
if batch_size < world:
    raise UserError(f'batch_size {batch_size} is smaller than the {world} ranks')
if not 0 <= label_smoothing < 0.5:
    raise UserError(f'label_smoothing must lie between 0 and 0.5, not {label_smoothing}')
guard.begin(out_dir, config, resume)
models = fingerprints(config)  # in the background, for what the run and its checkpoints say of themselves
tokenizer = separate_pad(load_tokenizer(model, trust_remote_code))
load = partial(load_examples, tokenizer=tokenizer, task='pairs', margins=True, seed=seed, max_length=max_length,
               max_prompt_length=max_prompt_length, truncation=truncation, num_turns=num_turns,
               skip_bad_rows=skip_bad_rows, whole=eval_data is not None)  # fmt: skip
train = fsdp.first_of_host(lambda: load(data, 'train', data_fraction=data_fraction))
held_out = fsdp.first_of_host(lambda: load(eval_data or data, 'test')).select(slice(n_eval_examples))
train = train.flip(noise_rate, seed) if noise_rate else train
total = min(n_epochs * len(train), n_examples or math.inf)
log.say(f'data: {len(train)} training and {len(held_out)} evaluation examples; left out or changed: {train.changes()}')
log.say_too_long(train.lengths, max_tokens)

build = partial(load_reward, model, tokenizer, new_head=True, trust_remote_code=trust_remote_code, seed=seed,
                adapters=adapters)  # fmt: skip
policy = fsdp.shard(build, device, dtype=dtype, compile=compile, activation_checkpointing=activation_checkpointing,
                    cpu_offload=cpu_offload, device_map=device_map)  # fmt: skip
if adapters:
    log.say(lora.describe(policy))
torch.manual_seed(seed * 1_000_003 + rank)  # of the adapters' dropout: nothing else draws from it
optim = fsdp.make_optimizer(optimizer, policy, lr, weight_decay)
check_positions(policy, max(train.longest(), held_out.longest()), 'the examples')
pack = can_pack(policy, *pack_probe(train, device), log.say, wanted=pack and attn is None)
set_attention(policy, pack, attn)
guard.check_room(config, policy, policy.response_scores, train, total, pack)
cut = partial(
    microbatches, rank=rank, world=world, max_tokens=max_tokens, share_prefix=share_prefix, pad=not pack, device=device
)

# ---- one step ----


def prepare(examples, first, index):
    """Everything about a step that can be known before it: microbatches, margins, counts. Runs ahead, in a thread."""
    batches, tokens, allocated = cut(examples, index)
    margin = torch.zeros(len(index)) if examples.margin is None else torch.from_numpy(examples.margin[index])
    return first, index, batches, margin, tokens, allocated


def run_step(n, batches, margin, training):
    """The columns of a step, in step order. If training, the gradients are then the sum over its pairs / number of ranks."""
    parts = []
    for batch in batches:
        with torch.set_grad_enabled(training):
            scores = policy.response_scores(batch)
            s_w, s_l = scores[::2], scores[1::2]
            l = losses.bradley_terry(
                s_w, s_l, margin[batch.place].to(device), center_coef=center_coef, label_smoothing=label_smoothing
            )
        if training:
            real = torch.tensor(batch.place, device=device) >= 0
            (l * real).sum().backward()
        parts.append({'loss': l, 's_w': s_w, 's_l': s_l, 'n_w': batch.n[::2], 'n_l': batch.n[1::2]})
    joined = {k: torch.cat([columns[k] for columns in parts]) for k in parts[0]}
    return fsdp.gather_columns(joined, [p for batch in batches for p in batch.place], n)


def summary(whole, split):
    """Metrics of the columns of a step, or of an evaluation: name -> float. The rewards are the scores."""
    s_w, s_l = whole['s_w'], whole['s_l']
    metrics = {f'loss/{split}': whole['loss'].mean(), f'rewards_{split}/chosen': s_w.mean(), f'rewards_{split}/rejected': s_l.mean(),
               f'rewards_{split}/mean': (s_w + s_l).mean() / 2, f'rewards_{split}/margins': (s_w - s_l).mean(),
               f'rewards_{split}/accuracies': (s_w > s_l).double().mean(),
               f'length_{split}/chosen': whole['n_w'].mean(), f'length_{split}/rejected': whole['n_l'].mean()}  # fmt: skip
    return {k: round(v.item(), 10) for k, v in metrics.items()}


def evaluate(examples_seen):
    """Metrics of the held-out examples."""
    if not len(held_out) or examples_seen <= state['evaluated']:
        return
    work = prefetch(prepare(held_out, *s) for s in steps(len(held_out), batch_size, len(held_out), seed, shuffle=False))
    parts = []
    for _, index, batches, margin, *_ in work:
        with guard.memory(batches, max_tokens):
            parts.append(run_step(len(index), batches, margin, training=False))
        if guard.stop_asked():
            return  # an evaluation that was cut short is done again after the resume
    logger.row('eval', examples_seen, summary({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, 'eval'))
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
logger.say(f'{"resuming" if start else "training"} on {world} ranks: {total} examples, {batch_size} a step')
if do_first_eval and not start:
    evaluate(0)
elif start and log.crossed(eval_every, start - batch_size, start, total):
    evaluate(start)  # unless it was complete
n_steps = -(-total // batch_size)
clock = time.time()
schedule = steps(len(train), batch_size, total, seed, start)
for first, index, batches, margin, tokens, allocated in prefetch(prepare(train, *s) for s in schedule):
    waited, n = time.time() - clock, len(index)
    rate = lr * log.schedule(first // batch_size, n_steps, warmup_steps, lr_schedule)
    with guard.memory(batches, max_tokens):
        whole = run_step(n, batches, margin, training=True)
        scale = world / n if guard.finite(whole) else math.nan
        norm = fsdp.update(policy, optim, rate, scale, max_grad_norm, strict=False)
    if not math.isfinite(norm):
        guard.bad_step(out_dir, state, skip_bad_steps, first, index, train.uid[index], norm, whole)
    seen = first + n
    elapsed, clock = time.time() - clock, time.time()
    metrics = summary(whole, 'train')
    metrics |= {'grad_norm': norm, 'lr': rate, 'examples_per_second': log.per_second(n, elapsed), 'padding_share': 1 - tokens / allocated,
                'tokens_per_second': log.per_second(tokens, elapsed),
                'data_wait_per_second': log.per_second(waited, elapsed),
                'counters/step_examples': n}  # fmt: skip
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
guard.export(policy, tokenizer, partial(build, quiet=True), f'{out_dir}/model', partial(card.write, out_dir))
logger.close()
guard.end()
log.say(f'done: {out_dir}/model')
if __name__ == '__main__':
    fsdp.leave()
