"""Supervised fine-tuning: the first half of the pipeline, whose model is the reference of dpo.py.

    python sft.py config/sft_toy.py
    torchrun --nproc_per_node=4 sft.py config/sft_hh.py

The loss of a step is the mean over its answer tokens, on any number of ranks. Counts are in examples, but for warmup_steps.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

from functools import partial

import torch

import fsdp
import losses
import training
from configurator import UserError, configure
from hf.load import load_model
from runtime import metrics

# model and data
model = 'toy'  # hub id, local folder, or 'toy'
data = 'toy'  # hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
noise_rate = 0.0  # train on the rejected answer of this fraction of pairs, as the original noise experiments do
control_tokens = False  # both answers of a pair, behind prompts that end with <|good|> or <|bad|> (conditional SFT)
last_turn_only = False  # train on the last answer of a conversation alone, not on all of them
max_length = 512  # tokens of prompt and answer
max_prompt_length: int | None = None  # a prompt is cut to this if the whole is too long; None: half of max_length
# steps
n_epochs = 1  # passes over the data
n_examples: int | None = None  # stop after so many examples; None: n_epochs decides
batch_size = 64  # examples of one optimizer step, all ranks together
lr = 5e-7  # learning rate
warmup_steps = 150  # optimizer steps of linear warm-up; unless it is set, at most a tenth of the run
seed = 0  # of the data order and the samples
# output and samples
out_dir = 'out/sft'  # everything the run leaves behind
sample_during_eval = False  # sample answers into samples.jsonl
n_eval_model_samples = 16  # how many
max_new_tokens = 128  # length of a sample
temperature = 1.0  # of the samples; 0: greedy
top_p = 1.0  # of the samples
config = configure(globals(), shared=training)

# ---- what the options mean together ----

if control_tokens or noise_rate:
    config.report_unused(['last_turn_only'], 'a pair has one answer to its prompt, the last')
if config.lora_rank and control_tokens:
    raise UserError('control_tokens need embeddings that train, and lora_rank freezes them: leave out one of the two')

# special tokens, as in HALOs' csft: one id each, whatever stands before and after them
CONTROL = ['<|good|>', '<|bad|>']

# ---- set-up ----

run = training.Run(config)
if control_tokens:
    # both answers of a pair are examples, with room for the control token
    run.tokenizer.add_tokens(CONTROL, special_tokens=True)
    good, bad = run.tokenizer.convert_tokens_to_ids(CONTROL)
    run.load_data(task='singles', max_length=max_length - 1, max_prompt_length=max_prompt_length - 1)
    run.train = run.train.flip(noise_rate, seed).control(good, bad)
    run.held_out = run.held_out.control(good, bad)
elif noise_rate:
    run.load_data(train={'task': 'pairs'}, held_out={'task': 'sft'}, last_turn_only=last_turn_only)
    run.train = run.train.flip(noise_rate, seed).first_answers()
else:
    run.load_data(task='sft', last_turn_only=last_turn_only)
run.count_data()
run.load_policy(partial(load_model, model, adapters=run.adapters, grow=control_tokens, **run.model_options()))
run.set_batching(longest=max(run.train.longest(), run.held_out.longest()))
run.check_room()

# ---- one step ----


def run_step(step, backward=False):
    """Run forward, and optionally backward, on one step. Returns its columns, (examples,) each, in step order.

    After backward and fsdp.average_gradients, gradients are those of the loss summed over all answer tokens / number of ranks."""
    # microbatch by microbatch: log-probs, loss, gradient
    by_batch = []
    for batch in step.batches:
        with torch.set_grad_enabled(backward):
            (pi,) = run.policy.response_logps(batch)  # (A,): log-prob of each answer
            loss = losses.sft(pi, batch.n)
        # losses are per token, so weight each answer by its number of tokens, and a filler (batch.real is False) by 0
        if backward:
            (batch.n * loss * batch.real).sum().backward()
        by_batch.append({'loss': loss, 'pi': pi, 'n': batch.n})
    return fsdp.gather(by_batch, step)


def summary(columns, split):
    """Return metrics (name -> float) from the columns of a step or an evaluation. split: 'train' or 'eval'."""
    loss, n = columns['loss'], columns['n']
    found = {f'loss/{split}': (n * loss).sum() / n.sum()}
    found[f'logps_{split}/chosen'] = columns['pi'].mean()
    found[f'length_{split}/chosen'] = n.mean()
    return metrics.floats(found)


# ---- training ----

sample = partial(run.sample, {'policy': run.policy})  # (seen) -> {}, no metrics
evaluate = partial(run.evaluate, run_step=run_step, summary=summary, sample=sample)
run.start()
if run.eval_due_at_start():
    evaluate(run.seen)
for step in run.steps():  # data.py: steps, then make_batches
    columns = run.within_memory(run_step, step, backward=True)
    run.update(step, columns, weight=columns['n'].sum())  # fsdp.py: update, by gradient / weight
    run.log_step(step, summary(columns, 'train'))
    if run.eval_due(step):
        evaluate(step.seen)
    run.finish_step(step)
evaluate(run.total)
run.finish(leave=__name__ == '__main__')
