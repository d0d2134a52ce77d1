"""The answers of one round of ppo.py, sampled or read from the data, and the numbers of their tokens.

A "column of tokens" has one number for every answer token of the round, one answer behind the other; a "column of answers" has
one for every answer. In all functions, run is a training.Run. Every rank calls them together, and all get the same result."""

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
    """The answers of a round, with all that training needs to know of them. It is equal on all ranks."""

    first: int  # number of answers before this round
    rows: np.ndarray  # (examples,) rows of its prompts in the training set
    examples: Examples  # an example is a prompt with its answers
    tokens: dict  # name -> column of tokens: old, pi, ref, advantage; with a critic value and target
    answers: dict  # name -> column of answers: n, start, ended, score ...
    metrics: dict  # name -> float, for the log

    @property
    def seen(self):
        """Number of answers up to the end of this round."""
        return self.first + len(self.answers['n'])

    def by_example(self, name):
        """Return the column of answers of this name as a table (examples, answers to each)."""
        return self.answers[name].view(len(self.examples), -1)

    def minibatches(self, size, passes, seed):
        """Yield the minibatches of all passes over the round, each as the numbers of its `size` examples (the last: fewer).

        Each pass takes every example once, in an order of its own that depends on the seed and on the round."""
        n_examples = len(self.examples)
        for number in range(passes):
            rng = np.random.default_rng((seed, self.first, number))
            order = rng.permutation(n_examples)
            for start in range(0, n_examples, size):
                yield order[start : start + size]


def sample(run, source, rows, *, answers_each, first_seed):
    """Sample `answers_each` answers of the policy to each of the prompts at these rows of source. Return Examples of them.

    The k-th of all answers has the seed first_seed + k. So it depends neither on the number of ranks nor on where a run was
    resumed. An answer keeps the token that ended it. Raises UserError if memory is out."""
    prompts = []  # one for every answer
    for row in rows:
        prompt, _ = source[row]
        prompts += [prompt.tolist()] * answers_each
    # the noise of an answer comes from its seed alone
    seeds = range(first_seed, first_seed + len(prompts))
    settings = {'max_new_tokens': run.config.max_new_tokens, 'rows': run.config.sample_batch}
    with guard.memory_for('sampled answers do not fit; lower sample_batch or max_new_tokens'):
        answers = generate.sample(run.policy, run.tokenizer, prompts, seeds, keep_end=True, **settings)

    # the answers to one prompt stand side by side
    examples = []
    for start in range(0, len(prompts), answers_each):
        examples.append((prompts[start], answers[start : start + answers_each]))
    return Examples.of(examples)


def token_slots(batch, rows, starts, per_prompt):
    """Return the slots of a microbatch's N answer tokens: (N,) indices into the round's columns of tokens, on batch's device.

    The tokens of a filler, which a rank without work computes, get -1. rows: numbers, in the round, of the examples of the step
    that batch is a part of. starts (answers,): slot of the first token of every answer of the round. per_prompt: number of
    answers to a prompt."""
    # slots of the first tokens of the batch's answers: (examples, per_prompt)
    place_in_step = np.array(batch.slot)
    first = starts.view(-1, per_prompt)[rows[place_in_step]]
    # a filler's place is -1, which has picked the step's last example above
    is_filler = place_in_step < 0
    first[is_filler] = -1

    # (N,): from an answer's first token to each of its tokens
    first = move(first.flatten(), batch.answer.device)[batch.answer]
    slots = first + batch.offset
    return torch.where(first >= 0, slots, -1)


def token_columns(run, model, examples, starts, names):
    """Return columns of tokens of the examples under a model, without gradient: name -> (tokens,) float64.

    names: what to call the rows that model.token_logps returns, log-probs first. Values are computed if one is named 'value';
    a model without a critic returns none, and then the result has no column 'value'. starts: as in token_slots."""
    lengths = examples.widths[:, 1:]  # (examples, answers to each)
    n_examples, per_prompt = lengths.shape
    # this rank's share of the examples, all of which are one step here
    rows = np.arange(n_examples)
    batches, *_ = run.make_batches(examples, rows)
    wants_values = 'value' in names
    parts = []
    slots = []
    for batch in batches:
        with torch.no_grad(), run.memory(batches):
            parts.append(model.token_logps(batch, values=wants_values))  # (1 or 2, N)
        slots.append(token_slots(batch, rows, starts, per_prompt))

    # not strict: without a critic there is one row for two names
    columns = dict(zip(names, torch.cat(parts, 1), strict=False))
    n_tokens = int(lengths.sum())
    slots = torch.cat(slots).cpu()
    return fsdp.gather_columns(columns, slots, n_tokens)


def measure(run, ref, examples, stop):
    """Compute log-probs and values of the answers. Return (columns of tokens, columns of answers), both by name.

    Of tokens: pi (log-probs under the policy), ref (under the reference) and, with a critic, value. Of answers: n (number of
    tokens), start (slot of the first token) and ended (whether the last token is one of the ids in stop). ref: the reference;
    it may be the policy itself, which is the reference when its adapters are off."""
    # without the prompts' widths, which come first in each row
    n = torch.from_numpy(examples.widths[:, 1:].flatten()).long()
    start = n.cumsum(0) - n
    tokens = token_columns(run, run.policy, examples, start, ['pi', 'value'])
    with adapters_off(ref):
        tokens |= token_columns(run, ref, examples, start, ['ref'])
    # spans is (examples, 1 + answers, 2), the last axis begin and end; an end is the place behind the last token
    ends = examples.spans[:, 1:, 1].flatten()
    last_tokens = examples.ids[ends - 1]
    ended = torch.from_numpy(np.isin(last_tokens, list(stop)))
    return tokens, {'n': n, 'start': start, 'ended': ended}


def of_answers(tokens, answers):
    """Return a dict for each answer, as samples.jsonl has it: 'tokens' (their number), 'logratio' and its scores, if any.

    logratio: log-prob under the policy minus that under the reference, in nats. tokens, answers: columns by name, see measure;
    a column of answers whose name begins with 'score' is a score."""
    logratios = tokens['pi'] - tokens['ref']
    dicts = []
    # the round's column, cut into the answers
    for of_answer in logratios.split(answers['n'].tolist()):
        logratio = of_answer.sum().item()
        dicts.append({'tokens': len(of_answer), 'logratio': round(logratio, 6)})
    # scores are numbers of whole answers already
    for name, column in answers.items():
        if name.startswith('score'):
            for of_answer, score in zip(dicts, column.tolist(), strict=True):
                of_answer[name] = round(score, 6)
    return dicts


def describe(run, examples, tokens, answers, split):
    """Return metrics of sampled answers for the log: name -> float. On the toy world the gold reward is one of them.

    tokens, answers: columns by name, see measure; answers may have the columns of a Reward, too. split: 'train' or 'eval', which
    is part of the metrics' names."""
    logratio = tokens['pi'] - tokens['ref']
    # the policy has sampled the tokens: so the mean of -pi estimates its entropy, and the mean of pi - ref its KL to the reference
    found = {
        f'kl_{split}/samples': logratio.sum() / len(answers['n']),
        f'kl_{split}/samples_per_token': logratio.mean(),
        f'entropy/{split}': -tokens['pi'].mean(),
        f'length/{split}': answers['n'].double().mean(),
        f'ended/{split}': answers['ended'].double().mean(),
    }
    for name, column in answers.items():
        is_of_reward = name.startswith(('score', 'late'))
        if is_of_reward:
            found[f'{name}/{split}'] = column.mean()
    if run.config.data == 'toy':
        found |= toy_metrics(examples, run.tokenizer, split)
    return metrics.numbers(found)
