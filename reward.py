"""Train a reward model on pairs: the Bradley-Terry model with a scalar head on the last token of an answer.

    python reward.py config/reward_toy.py
    torchrun --nproc_per_node=4 reward.py config/reward_hh.py

The loss of a step is the mean over its pairs, on any number of ranks and microbatches. Where rows have
a `margin`, the chosen score should be higher by that much. The result is a folder that transformers'
AutoModelForSequenceClassification reads. Counts are in examples, but for warmup_steps.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

from functools import partial

import torch

import fsdp
import training
from configurator import UserError, configure
from hf.load import load_reward, separate_pad
from rl import formulas
from runtime import metrics
from runtime.prefetch import move

# model and data
model = 'toy'  # hub id or folder of a language model or a reward model, or 'toy'
data = 'toy'  # hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
noise_rate = 0.0  # fraction of training pairs whose labels are flipped
max_length = 512  # tokens of prompt and answer
max_prompt_length: int | None = None  # a prompt is cut to this if the whole is too long; None: half of max_length
# loss
center_coef = 0.0  # weight of the squared sum of both scores, which keeps them near 0 (its paper: 0.01)
label_smoothing = 0.0  # probability that a label is wrong
# steps
n_epochs = 1  # passes over the data
n_examples: int | None = None  # stop after so many examples; None: n_epochs decides
batch_size = 64  # examples of one optimizer step, all ranks together
lr = 1e-5  # learning rate
warmup_steps = 150  # optimizer steps of linear warm-up; unless it is set, at most a tenth of the run
seed = 0  # of the new head, the data order, the flips
share_prefix = True  # compute the prompt of a pair once
# output
out_dir = 'out/reward'  # everything the run leaves behind
config = configure(globals(), shared=training)
if not 0 <= label_smoothing < 0.5:
    raise UserError(f'label_smoothing must lie between 0 and 0.5, not {label_smoothing}')

# ---- set-up ----

run = training.Run(config)
# a score is read at the end of text, so that must not be the pad token
run.tokenizer = separate_pad(run.tokenizer)
run.load_data(task='pairs', margins=True)
run.train = run.train.flip(noise_rate, seed)
run.count_data()
run.load_policy(partial(load_reward, model, new_head=True, adapters=run.adapters, **run.model_options()))
longest = max(run.train.longest(), run.held_out.longest())
run.set_batching(longest, share_prefix=share_prefix, forward=run.policy.response_scores)
run.check_room()

# ---- one step ----


def run_step(step, backward=False):
    """Run forward, and optionally backward, on one step. Returns its columns, (pairs,) each, in step order.

    After backward and fsdp.average_gradients, gradients are those of the loss summed over the step's pairs / number of ranks."""
    # target gap between the two scores, (pairs,)
    step_margin = step.labels.get('margin', torch.zeros(len(step.rows)))
    # microbatch by microbatch: scores, loss, gradient
    by_batch = []
    for batch in step.batches:
        with torch.set_grad_enabled(backward):
            scores = run.policy.response_scores(batch)  # (A,): chosen, rejected, chosen, ...
            s_w, s_l = scores[::2], scores[1::2]
            margin = move(step_margin[batch.slot], run.device)
            loss = formulas.bradley_terry(s_w, s_l, margin, center_coef=center_coef, label_smoothing=label_smoothing)
        if backward:
            (loss * batch.real).sum().backward()  # real: False for the filler of a rank without examples
        n_w, n_l = batch.n[::2], batch.n[1::2]  # tokens
        by_batch.append({'loss': loss, 's_w': s_w, 's_l': s_l, 'n_w': n_w, 'n_l': n_l})
    return fsdp.gather(by_batch, step)


def summary(columns, split):
    """Return metrics (name -> float) from the columns of a step or an evaluation. split: 'train' or 'eval'."""
    s_w, s_l = columns['s_w'], columns['s_l']
    chosen = {'reward': s_w, 'n': columns['n_w']}
    rejected = {'reward': s_l, 'n': columns['n_l']}
    found = metrics.of_preferences(split, columns['loss'].mean(), chosen, rejected, is_right=s_w > s_l)
    return found | metrics.floats({f'rewards_{split}/mean': (s_w + s_l).mean() / 2})


# ---- training ----

evaluate = partial(run.evaluate, run_step=run_step, summary=summary)
run.start()
if run.eval_due_at_start():
    evaluate(run.seen)
for step in run.steps():  # data.py: steps, then make_batches
    columns = run.within_memory(run_step, step, backward=True)
    run.update(step, columns, weight=len(step.rows))  # fsdp.py: update, by gradient / weight
    run.log_step(step, summary(columns, 'train'))
    if run.eval_due(step):
        evaluate(step.seen)
    run.finish_step(step)
evaluate(run.total)
run.finish(leave=__name__ == '__main__')
