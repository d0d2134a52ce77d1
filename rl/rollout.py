"""Answers that a policy samples, and columns of their tokens: one number for every answer token of a round.

run is a training.Run; every rank calls these together, and all get the same."""

import numpy as np
import torch

import fsdp
from hf import generate
from runtime import guard


def sample(run, prompts, seeds, max_new_tokens, sample_batch):
    """An answer of the policy to each prompt, sampled from its own seed, the work shared among the ranks: all ids that came,
    an end token among them."""
    # prompts of similar length side by side
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))[run.rank :: run.world]
    found = []
    with (
        fsdp.unsharded(run.policy),
        guard.memory_for('sampled answers do not fit; lower sample_batch or max_new_tokens'),
    ):
        for start in range(0, len(order), sample_batch):
            part = order[start : start + sample_batch]
            asked, keys = [prompts[i] for i in part], [seeds[i] for i in part]
            settings = {'max_new_tokens': max_new_tokens, 'keep_end': True}
            found += zip(part, generate.generate(run.policy, run.tokenizer, asked, keys, **settings), strict=True)
    by_prompt = dict(item for part in fsdp.gather_objects(found) for item in part)
    return [by_prompt[i] for i in range(len(prompts))]


def token_slots(batch, rows, starts, per_prompt):
    """Slots, among all answer tokens of the round, of the N answer tokens of a microbatch, on the CPU; -1: a filler's.

    rows: of the step's examples in the round; starts (answers,): slot of each answer's first token; per_prompt: answers of an
    example."""
    numbers = []
    for slot in batch.slot:
        for i in range(per_prompt):
            numbers.append(rows[slot] * per_prompt + i if slot >= 0 else -1)
    answer = torch.tensor(numbers)[batch.answer.cpu()]
    return torch.where(answer >= 0, starts[answer] + batch.offset.cpu(), -1)


def token_columns(run, model, examples, starts, names):
    """name -> (tokens,) column of every answer token of the examples under a model, without gradient.

    names: of the rows of token_logps; a model without a value head has only the first, and only that is computed if only
    that is named."""
    per_prompt, rows = examples.spans.shape[1] - 1, np.arange(len(examples))
    batches, *_ = run.make_batches(examples, rows)
    parts, slots = [], []
    for batch in batches:
        with torch.no_grad(), run.memory(batches):
            parts.append(model.token_logps(batch, len(names) > 1))
        slots += token_slots(batch, rows, starts, per_prompt).tolist()
    joined = dict(zip(names, torch.cat(parts, 1), strict=False))
    return fsdp.gather_columns(joined, slots, int(examples.widths[:, 1:].sum()))
