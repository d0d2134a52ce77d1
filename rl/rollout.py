"""The answers of one round of ppo.py, sampled or read from the data, and the numbers that training needs for them.

A token column has one number per answer token of the round, answer after answer. An answer column has one number per answer.
run is a training.Run. All ranks call these functions together and get the same results."""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

import fsdp
from hf import generate
from hf.lora import adapters_off
from rl import formulas
from rl.rewards import texts
from runtime import errors, metrics
from runtime.prefetch import move
from text import toy
from text.examples import Examples


@dataclass
class Round:
    """The answers of a round of ppo.py, and all that training needs to know about them; equal on all ranks."""

    first: int  # number of answers before this round
    rows: np.ndarray  # (examples,) of its prompts in run.train
    examples: Examples  # one example is a prompt with all its answers
    tokens: dict  # token columns by name: old, pi, ref, advantage; with a critic value and target
    answers: dict  # answer columns by name: n, start, ended, score ...
    metrics: dict  # name -> float, for the log

    @property
    def seen(self):
        """Number of answers up to the end of this round."""
        return self.first + len(self.answers['n'])

    def minibatches(self, size, passes, seed):
        """Yield arrays of `size` example indices, the last of a pass perhaps smaller; every pass has all, in an order of its own."""
        n_examples = len(self.examples)
        for number in range(passes):
            # rounds differ in self.first
            order = np.random.default_rng((seed, self.first, number)).permutation(n_examples)
            for start in range(0, n_examples, size):
                yield order[start : start + size]


def sample(run, rows, *, answers_each, first_seed):
    """Sample `answers_each` answers to each of the prompts at these rows of run.train from the policy. Return them as Examples.

    Answer k has seed first_seed + k, on any number of ranks and after any resume. Answers keep their end token."""
    prompts = [prompt.tolist() for prompt, _ in run.train.select(rows)]
    repeated = [prompt for prompt in prompts for _ in range(answers_each)]  # one for each answer
    seeds = range(first_seed, first_seed + len(repeated))
    # sample_batch: how many answers a rank samples side by side
    settings = {'max_new_tokens': run.config.max_new_tokens, 'max_rows': run.config.sample_batch}
    with errors.on_full_memory('sampled answers do not fit; lower sample_batch or max_new_tokens'):
        answers = iter(generate.sample(run.policy, run.tokenizer, repeated, seeds, keep_end=True, **settings))
    # the next answers are those to the next prompt
    return Examples.of([(prompt, list(islice(answers, answers_each))) for prompt in prompts])


def token_indices(batch, rows, starts, per_prompt):
    """Return the indices in the round's token columns of the N answer tokens of a microbatch: (N,), -1 for filler tokens.

    rows: the numbers of the step's examples in the round. starts: where each answer of the round begins in the columns, (answers,)."""
    slot = np.array(batch.slot)  # of each example of the microbatch: its index in rows; -1: a filler
    starts_by_example = starts.view(-1, per_prompt)  # (examples of the round, per_prompt)
    starts_here = starts_by_example[rows[slot]]  # (examples of the microbatch, per_prompt)
    # here rows[-1] has stood for a filler
    starts_here[slot < 0] = -1
    # batch.answer: for each token, the number of its answer in the microbatch; batch.offset: its index in that answer
    start = move(starts_here.flatten(), batch.answer.device)[batch.answer]  # (N,)
    return torch.where(start >= 0, start + batch.offset, -1)


def token_columns(run, model, examples, starts, name, values=False):
    """Run a model over all examples without gradient. Return token columns by name, (tokens,) float64 each, of all ranks together.

    These are log-probs, called `name`, and with values=True, if there is a critic, 'value'. starts: as for token_indices."""
    lengths = examples.widths[:, 1:]  # (examples, answers per prompt); column 0 is the prompt
    n_examples, per_prompt = lengths.shape
    # all examples are one step, of which this rank runs some microbatches
    rows = np.arange(n_examples)
    batches = run.make_step(examples, rows).batches
    parts = []
    indices = []
    for batch in batches:
        with torch.no_grad(), errors.on_full_memory_of(batches, run.max_tokens):
            parts.append(model.token_logps(batch, values=values))  # (1, N): log-probs; or (2, N): and values
        indices.append(token_indices(batch, rows, starts, per_prompt))
    # a row for each name. strict=False: without a critic there is but one row, and 'value' is left out
    columns = dict(zip([name, 'value'], torch.cat(parts, 1), strict=False))
    return fsdp.gather_columns(columns, torch.cat(indices).cpu(), int(lengths.sum()))


def measure(run, ref, examples, stop):
    """Compute log-probs and values of the answers. Return (token columns, answer columns), dicts by name.

    ref: the reference; may be the policy itself, which then runs without its adapters. stop: token ids that end an answer.
    Token columns: pi, ref (log-probs of policy and reference) and, with a critic, value. Answer columns: n (number of tokens),
    start (index of the first token in the token columns), ended (whether the last token is in stop), logratio (sum of pi - ref)."""
    # column 0 of widths is the prompt
    n = torch.from_numpy(examples.widths[:, 1:].flatten()).long()
    start = n.cumsum(0) - n
    tokens = token_columns(run, run.policy, examples, start, name='pi', values=True)
    with adapters_off(ref):
        tokens |= token_columns(run, ref, examples, start, name='ref')
    # spans: (examples, 1 + answers, 2), begin and exclusive end
    ends = examples.spans[:, 1:, 1].flatten()
    last_tokens = examples.ids[ends - 1]
    ended = torch.from_numpy(np.isin(last_tokens, list(stop)))
    # the tokens of all answers lie one after the other: sum over each answer, of n tokens
    logratio = torch.segment_reduce(tokens['pi'] - tokens['ref'], 'sum', lengths=n)
    return tokens, {'n': n, 'start': start, 'ended': ended, 'logratio': logratio}


def advantages_and_targets(config, tokens, scores, n):
    """Return PPO's advantages and value targets of all answer tokens of a round, (tokens,) float64 each.

    config: options of ppo.py. tokens: token columns pi, ref and value. scores, n: score and length of each answer, (answers,)."""
    # (answers, longest) tables; table[mask] flattens one back to (tokens,)
    mask = torch.arange(int(n.max())) < n[:, None]
    value = torch.zeros(mask.shape, dtype=torch.float64)
    value[mask] = tokens['value']
    # reward per token: the KL penalty (offline, it is in the loss), plus the score at the last token
    rewards = torch.zeros_like(value)
    if not config.offline:
        rewards[mask] = -config.kl_coef * (tokens['pi'] - tokens['ref'])
    rewards[torch.arange(len(n)), n - 1] += scores

    advantage = formulas.gae(rewards, value, mask, gamma=config.gamma, lam=config.lam)
    target = value + advantage
    if config.offline:
        # the discounted return, which is value + advantage for lam = 1
        target = value + formulas.gae(rewards, value, mask, gamma=config.gamma, lam=1.0)
    if config.whiten:
        advantage = formulas.whiten(advantage, mask)
    return advantage[mask], target[mask]


def describe(run, examples, tokens, answers, split):
    """Return log metrics of sampled answers, of which entropy and KL are estimates. tokens, answers: columns. split: train or eval."""
    found = {f'entropy/{split}': -tokens['pi'].mean(), f'length/{split}': answers['n'].double().mean()}
    for name, column in answers.items():
        if name.startswith(('ended', 'score', 'late')):
            found[f'{name}/{split}'] = column.double().mean()
    if run.config.data == 'toy':
        pairs = texts(examples, run.tokenizer)
        gold = [toy.gold(*pair) for pair in pairs]
        well_formed = [toy.well_formed(answer) for _, answer in pairs]
        found[f'gold/{split}'] = np.mean(gold)
        found[f'well_formed/{split}'] = np.mean(well_formed)
    kl = metrics.of_samples(answers['logratio'], answers['n'], split)
    return kl | metrics.floats(found)
