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


def sample(run, source, rows, each, first_seed, max_new_tokens, sample_batch):
    """Examples of the prompts at these rows of source, with `each` sampled answers of the policy to every prompt.

    Answer i, whose ids keep the token that ended it, has the seed first_seed + i, so it depends neither on the number of ranks,
    which share the work, nor on where a run was resumed."""
    prompts = [source[i][0].tolist() for i in rows for _ in range(each)]  # one for every answer
    # this rank's answers, to prompts of similar length side by side
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    mine = longest_first[run.rank :: run.world]
    work = [prompts[i] for i in mine], [first_seed + i for i in mine]
    settings = {'max_new_tokens': max_new_tokens, 'keep_end': True, 'rows': sample_batch}
    too_large = 'sampled answers do not fit; lower sample_batch or max_new_tokens'
    with fsdp.unsharded(run.policy), guard.memory_for(too_large):
        found = generate.generate(run.policy, run.tokenizer, *work, **settings)

    # those of all ranks, by number
    answers = {}
    for of_rank in fsdp.gather_objects(dict(zip(mine, found, strict=True))):
        answers |= of_rank
    groups = [[answers[i + k] for k in range(each)] for i in range(0, len(prompts), each)]
    return Examples.of(list(zip(prompts[::each], groups, strict=True)))


def token_slots(batch, rows, starts, per_prompt):
    """Slots, among all answer tokens of the round, of the N answer tokens of a microbatch: (N,), on its device; -1: a filler's.

    rows: of the step's examples in the round; starts (answers,): slot of each answer's first token; per_prompt: answers."""
    # (examples, per_prompt) numbers of the batch's answers among those of the round
    slot = np.array(batch.slot)[:, None]
    numbers = rows[slot] * per_prompt + np.arange(per_prompt)
    # (answers of the batch,) the slot of each one's first token; then (N,) of every token
    first = np.where(slot >= 0, starts.numpy()[numbers], -1)
    first = move(torch.from_numpy(first.reshape(-1)), batch.answer.device)[batch.answer]
    return torch.where(first >= 0, first + batch.offset, -1)


def token_columns(run, model, examples, starts, names):
    """name -> (tokens,) column of every answer token of the examples under a model, without gradient.

    names: of the rows of token_logps; values are computed if they are named and the model has a head for them."""
    lengths = examples.widths[:, 1:]  # (examples, answers)
    rows = np.arange(len(examples))
    # this rank's part of the tokens
    batches, *_ = run.make_batches(examples, rows)
    parts, slots = [], []
    for batch in batches:
        with torch.no_grad(), run.memory(batches):
            parts.append(model.token_logps(batch, len(names) > 1))
        slots.append(token_slots(batch, rows, starts, lengths.shape[1]))
    # a model without a head for values gives one row only
    joined = dict(zip(names, torch.cat(parts, 1), strict=False))
    return fsdp.gather_columns(joined, torch.cat(slots).cpu(), int(lengths.sum()))


def measure(run, policy, ref, examples, stop):
    """(columns of the answer tokens: pi, ref and, with a critic, value; columns of the answers: n, start and ended).

    n: an answer's tokens; start: the place of the first of them among all; ended: whether its last is one of stop."""
    n = torch.tensor([len(answer) for _, answers in examples for answer in answers])
    starts = n.cumsum(0) - n
    tokens = token_columns(run, policy, examples, starts, ['pi', 'value'])
    with adapters_off(ref):
        tokens |= token_columns(run, ref, examples, starts, ['ref'])
    ends = examples.spans[:, 1:, 1].reshape(-1)  # of the answers, behind their last tokens
    ended = torch.from_numpy(np.isin(examples.ids[ends - 1], list(stop)))
    return tokens, {'n': n, 'start': starts, 'ended': ended}


def of_answers(tokens, answers):
    """{'tokens', 'logratio' (policy to reference, nats), scores if there are any} of each answer: a list. Columns as measure's."""
    gaps = (tokens['pi'] - tokens['ref']).split(answers['n'].tolist())
    columns = {'tokens': answers['n'], 'logratio': torch.stack([gap.sum() for gap in gaps])}
    columns |= {name: values for name, values in answers.items() if name.startswith('score')}
    lists = {name: [round(value, 6) for value in values.tolist()] for name, values in columns.items()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def describe(examples, tokens, answers, split, *, tokenizer, toy):
    """Metrics of sampled answers: name -> float.

    tokens, answers: columns, as measure gives them; answers may have those of a Reward. toy: add what the toy world says."""
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
    if toy:
        found |= toy_metrics(examples, tokenizer, split)
    return metrics.numbers(found)
