"""Answers that a policy samples, and columns of their tokens: one number for every answer token of a round.

run is a training.Run; every rank calls these together, and all get the same."""

from dataclasses import dataclass

import numpy as np
import torch

import fsdp
from data import move
from hf import generate
from hf.lora import adapters_off
from rl.rewards import toy_metrics
from runtime import guard, metrics
from text.examples import Examples


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

    def by_example(self, name):
        """A column of answers as a table: (examples, answers of each)."""
        return self.answers[name].view(len(self.examples), -1)

    def minibatches(self, size, passes, seed):
        """Yield rows of `size` examples: in each pass all of them, in an order of its own."""
        for i in range(passes):
            order = np.random.default_rng((seed, self.first, i)).permutation(len(self.examples))
            for start in range(0, len(order), size):
                yield order[start : start + size]


def sample(run, source, rows, each, first_seed):
    """Examples of the prompts at these rows of source, with `each` sampled answers of the policy to every prompt.

    Answer i, whose ids keep the token that ended it, has the seed first_seed + i, so it depends neither on the number of ranks
    nor on where a run was resumed."""
    prompts = []  # one for every answer
    for row in rows:
        prompt, _ = source[row]
        prompts += [prompt.tolist()] * each
    seeds = range(first_seed, first_seed + len(prompts))
    settings = {'max_new_tokens': run.config.max_new_tokens, 'rows': run.config.sample_batch}
    with guard.memory_for('sampled answers do not fit; lower sample_batch or max_new_tokens'):
        answers = generate.sample(run.policy, run.tokenizer, prompts, seeds, keep_end=True, **settings)
    groups = range(0, len(prompts), each)
    return Examples.of([(prompts[i], answers[i : i + each]) for i in groups])


def token_slots(batch, rows, starts, per_prompt):
    """Slots, among all answer tokens of the round, of the N answer tokens of a microbatch: (N,), on its device; -1: a filler's.

    rows: of the step's examples in the round; starts (answers,): slot of each answer's first token; per_prompt: answers."""
    # (examples, per_prompt) slots of the first tokens of the batch's answers
    slot = np.array(batch.slot)
    first = starts.view(-1, per_prompt)[rows[slot]]
    first[slot < 0] = -1
    # (N,) of every token
    first = move(first.flatten(), batch.answer.device)[batch.answer]
    return torch.where(first >= 0, first + batch.offset, -1)


def token_columns(run, model, examples, starts, names):
    """name -> (tokens,) column of every answer token of the examples under a model, without gradient.

    names: of the rows of token_logps; values are computed if they are named and the model has a head for them."""
    lengths = examples.widths[:, 1:]  # (examples, answers)
    n_examples, per_prompt = lengths.shape
    rows = np.arange(n_examples)
    # this rank's part of the tokens
    batches, *_ = run.make_batches(examples, rows)
    parts, slots = [], []
    for batch in batches:
        with torch.no_grad(), run.memory(batches):
            parts.append(model.token_logps(batch, 'value' in names))
        slots.append(token_slots(batch, rows, starts, per_prompt))
    # a model without a head for values gives one row only
    joined = dict(zip(names, torch.cat(parts, 1), strict=False))
    return fsdp.gather_columns(joined, torch.cat(slots).cpu(), int(lengths.sum()))


def measure(run, ref, examples, stop):
    """(columns of the answer tokens: pi, ref and, with a critic, value; columns of the answers: n, start and ended).

    n: an answer's tokens; start: the place of the first of them among all; ended: whether its last is one of stop."""
    n = torch.from_numpy(examples.widths[:, 1:].flatten()).long()
    starts = n.cumsum(0) - n
    tokens = token_columns(run, run.policy, examples, starts, ['pi', 'value'])
    with adapters_off(ref):
        tokens |= token_columns(run, ref, examples, starts, ['ref'])
    ends = examples.spans[:, 1:, 1].reshape(-1)  # of the answers, behind their last tokens
    ended = torch.from_numpy(np.isin(examples.ids[ends - 1], list(stop)))
    return tokens, {'n': n, 'start': starts, 'ended': ended}


def of_answers(tokens, answers):
    """{'tokens', 'logratio' (policy to reference, nats), scores if there are any} of each answer: a list. Columns as measure's."""
    gaps = (tokens['pi'] - tokens['ref']).split(answers['n'].tolist())
    rows = [{'tokens': len(gap), 'logratio': round(gap.sum().item(), 6)} for gap in gaps]
    for name, values in answers.items():
        if name.startswith('score'):
            for row, value in zip(rows, values.tolist(), strict=True):
                row[name] = round(value, 6)
    return rows


def describe(run, examples, tokens, answers, split):
    """Metrics of sampled answers: name -> float. Columns as measure's; answers may have those of a Reward."""
    gap = tokens['pi'] - tokens['ref']
    found = {
        f'kl_{split}/samples': gap.sum() / len(answers['n']),
        f'kl_{split}/samples_per_token': gap.mean(),
        f'entropy/{split}': -tokens['pi'].mean(),
        f'length/{split}': answers['n'].double().mean(),
        f'ended/{split}': answers['ended'].double().mean(),
    }
    for name, values in answers.items():
        if name.startswith(('score', 'late')):
            found[f'{name}/{split}'] = values.mean()
    if run.config.data == 'toy':
        found |= toy_metrics(examples, run.tokenizer, split)
    return metrics.numbers(found)
