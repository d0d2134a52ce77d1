"""From tokenised examples to microbatches: which examples a step takes, how the step is split, and packing. No text, no model.

An example is a prompt and its answers (two for a pair, one for SFT and KTO), as token ids. Each microbatch has at most max_tokens
tokens, and is a single row without padding, in which the answers of a pair share one copy of their prompt:
    [prompt | chosen | rejected] [prompt | chosen | rejected] ...
The slot of an example is its index in the step; its row, that in the Examples that the step takes it from."""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import functools
import heapq
import math
from dataclasses import dataclass, field

import numpy as np
import torch

from hf.attention import Varlen, bundles_of
from runtime.prefetch import move
from text.examples import Examples


def steps(n, batch_size, total, seed, start=0, shuffle=True):
    """Yield (first, rows) for each step: the number of examples taken before it, and its rows (of n). shuffle: anew in each epoch."""

    @functools.lru_cache(maxsize=1)
    def order_of(epoch):
        if not shuffle:
            return np.arange(n)
        return np.random.default_rng((seed, epoch)).permutation(n)

    # examples start to total - 1, counted through all epochs: a row depends on this number alone, so a resumed run takes the same rows
    for first in range(start, total, batch_size):
        numbers = range(first, min(first + batch_size, total))
        rows = [order_of(number // n)[number % n] for number in numbers]
        yield first, np.array(rows)


def plan(lengths, world_size, max_tokens):
    """Split a step into microbatches, the same number on every rank. Returns [rank][microbatch] -> list of slots.

    lengths: tokens of each example. An example longer than max_tokens gets its own microbatch.
    plan([5, 3, 4], world_size=2, max_tokens=8) -> [[[1, 2]], [[0]]]: rank 0 has examples 1 and 2, rank 1 has example 0."""
    # each rank needs at least so many microbatches for all tokens (a longer example counts as max_tokens)
    n_tokens = sum(min(int(n), max_tokens) for n in lengths)
    per_rank = max(1, math.ceil(n_tokens / (world_size * max_tokens)))
    # add one on every rank until all examples fit
    while (bins := _fill_bins(lengths, world_size * per_rank, max_tokens)) is None:
        per_rank += 1
    # deal them out, heaviest first, so that all ranks run their heaviest microbatches at the same time
    return [bins[rank::world_size] for rank in range(world_size)]


def _fill_bins(lengths, n_bins, max_tokens):
    """Put examples, longest first, into the emptiest bin. Returns the slots in each bin, heaviest first; None if one overflows."""
    bins = [(0, number, []) for number in range(n_bins)]  # (tokens, number, slots); a heap: the emptiest first
    longest_first = sorted(range(len(lengths)), key=lambda slot: -lengths[slot])
    for slot in longest_first:
        tokens, number, slots = heapq.heappop(bins)
        tokens += int(lengths[slot])
        if slots and tokens > max_tokens:  # an example alone in its bin may exceed max_tokens
            return None
        slots.append(slot)
        heapq.heappush(bins, (tokens, number, slots))
    bins.sort(key=lambda bin: (-bin[0], bin[1]))
    return [sorted(slots) for _tokens, _number, slots in bins]


def plan_padded(lengths, world_size, max_tokens):
    """Split a step into padded microbatches. lengths: tokens of each example, padded. Returns [rank][microbatch] -> slots, as plan()."""
    # a microbatch pads all its examples to its longest: fill bin after bin, the longest first, so that those in a bin are alike
    bins = [[]]  # slots
    longest_first = sorted(range(len(lengths)), key=lambda slot: -lengths[slot])
    for slot in longest_first:
        last_bin = bins[-1]
        # the first example of a bin is its longest
        if last_bin and (len(last_bin) + 1) * lengths[last_bin[0]] > max_tokens:
            bins.append([])
        bins[-1].append(slot)
    # split the fullest bin until all ranks get the same number, even if half of it is empty
    while len(bins) % world_size:
        fullest = max(bins, key=len)
        middle = max(1, len(fullest) // 2)
        bins.append(fullest[middle:])
        del fullest[middle:]
    # deal them out, heaviest first and empty ones last, so that all ranks run their heaviest microbatches at the same time
    bins.sort(key=lambda slots: -len(slots) * lengths[slots[0]] if slots else 0)
    return [[sorted(slots) for slots in bins[rank::world_size]] for rank in range(world_size)]


def tokens_taken(widths, share_prefix=True, pad=False):
    """Return the tokens that each example takes in a microbatch, (n,). widths: (n, 1 + answers), tokens of prompt and answers.

    share_prefix: the answers share one copy of the prompt. pad: each answer has its own row, as wide as the example's widest."""
    prompts, answers = widths[:, 0], widths[:, 1:]
    n_answers = answers.shape[1]
    if pad:
        return n_answers * (prompts + answers.max(1))
    copies = 1 if share_prefix else n_answers
    return copies * prompts + answers.sum(1)


def make_batches(examples: Examples, rows, rank, world_size, max_tokens, *, share_prefix=True, pad=False, device='cpu'):
    """Pack a step, these rows of examples. Returns (this rank's Batches, number of tokens on all ranks, that number with padding)."""
    widths = examples.widths[rows]  # (n, 1 + answers): tokens of the prompt and of each answer
    n_answers = widths.shape[1] - 1
    lengths = tokens_taken(widths, share_prefix and not pad)  # (n,): tokens of each example, without padding
    n_tokens = n_allocated = int(lengths.sum())  # two equal numbers, unless padding is allocated, too
    # every rank plans for all ranks, so they agree without talking
    if pad:
        padded_lengths = tokens_taken(widths, pad=True)
        plans = plan_padded(padded_lengths, world_size, max_tokens)
        not_empty = [slots for microbatches in plans for slots in microbatches if slots]
        # in a microbatch, each example is as long as the longest
        n_allocated = sum(len(slots) * int(padded_lengths[slots].max()) for slots in not_empty)
    else:
        plans = plan(lengths, world_size, max_tokens)

    batches = []
    for slots in plans[rank]:
        items = [examples[row] for row in rows[slots]]  # (prompt ids, [ids of each answer]) each
        batch = pack(items, slots, share_prefix=share_prefix, pad=pad, filler=n_answers, device=device)
        # the reference's log-probs, if --cache_ref has read them. The filler of an empty microbatch has none
        if examples.ref is not None:
            ref = examples.ref[rows[slots]] if slots else np.zeros(n_answers, np.float32)
            batch.ref = move(torch.from_numpy(ref.flatten()), device)
        batches.append(batch)
    return batches, n_tokens, n_allocated


@dataclass
class Step:
    """One step: this rank's microbatches, and facts about the whole step."""

    first: int  # number of examples taken before this step
    rows: np.ndarray  # rows of its examples in `examples`
    batches: list  # this rank's Batches
    n_tokens: int  # on all ranks
    n_allocated: int  # that number plus padding
    labels: dict  # name -> column of the step: good (KTO) or margin (reward.py)
    examples: Examples  # the training or held-out examples
    max_tokens: int  # limit of its microbatches
    new_state: dict | None = None  # of the loss's statistic after this step, see dpo.py

    @property
    def seen(self):
        """Return the number of examples taken after this step."""
        return self.first + len(self.rows)


@dataclass
class Batch:
    """A microbatch of A answers with N predicted tokens, made by pack. A place is an index into the flattened ids."""

    ids: torch.Tensor  # packed: (1, T), all prompts and answers in a row; padded: (A, T), a row for each answer
    # (N,) places whose logits predict the tokens: the token before each; for an answer's first one, the prompt's last token
    predict_at: torch.Tensor
    target: torch.Tensor  # (N,) ids of the predicted tokens, all in answers
    answer: torch.Tensor  # (N,) number of the answer that each belongs to, 0 to A - 1
    offset: torch.Tensor  # (N,) index of each in its answer
    n: torch.Tensor  # (A,) number of predicted tokens of each answer
    last: torch.Tensor  # (A,) place of each answer's last token
    slot: list  # index of each example in the step; -1: a filler, which does not count
    real: torch.Tensor  # (examples,) False for a filler
    longest: int  # tokens of the longest answer
    position: torch.Tensor | None = None  # packed: (1, T) position of each token in its own sequence
    mask: torch.Tensor | None = None  # padded: (A, T) 1 for tokens, 0 for padding
    groups: list = field(default_factory=list)  # packed: (tokens of a prompt, (tokens of each answer that shares it))
    bundles: list = field(default_factory=list)  # packed: the groups as Bundles, which attention computes one by one
    varlen: Varlen | None = None  # packed on a GPU: the groups in the format of the CUDA kernel
    ref: torch.Tensor | None = None  # (A,) cached log-probs of the reference

    def sum(self, values):
        """Sum values (N,), one per predicted token, over the tokens of each answer. Returns (A,)."""
        # (A, longest), a row for each answer, padded with zeros: so a sum does not depend on the other answers, not even by rounding
        table = values.new_zeros(len(self.n), self.longest)
        return table.index_put((self.answer, self.offset), values).sum(1)


def pack(examples, slots, *, share_prefix=True, pad=False, filler=2, device='cpu'):
    """Make a Batch of examples, a list of (prompt, [answer, ...]) in token ids, with these slots.

    share_prefix=False: each answer has its own copy of the prompt. pad: and a row of its own, padded to the longest. filler: number
    of answers of the example, slot -1, that replaces an empty list: others wait for a rank without data, so it runs, too."""
    if not examples:
        one_token = np.array([0])
        examples, slots = [(one_token, [one_token] * filler)], [-1]
    # a group is a copy of a prompt with the answers that share it, such as a whole example
    groups = examples
    if pad or not share_prefix:
        groups = [(prompt, [answer]) for prompt, answers in examples for answer in answers]
    sizes = [(len(prompt), tuple(map(len, answers))) for prompt, answers in groups]  # their tokens: [(2, (2, 1)), ...]
    arrays = _concatenate(groups)
    if pad:
        arrays = _pad(arrays, lengths=[prompt + answer for prompt, (answer,) in sizes])
    else:
        arrays |= {'ids': arrays['ids'][None], 'position': arrays['position'][None]}  # one row
    tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    longest = max(answer for _, answers in sizes for answer in answers)
    batch = Batch(**tensors, slot=list(slots), real=torch.tensor(slots) >= 0, longest=longest)
    # what packed_attention needs: without it, answers in a row would see one another
    if not pad:
        batch.groups = sizes
        batch.bundles = bundles_of(sizes)
        if torch.device(device).type == 'cuda':
            batch.varlen = Varlen(sizes)
    return move(batch, device)


def _pad(arrays, lengths):
    """Return the arrays of a padded Batch from those of a packed one: (A, T) tables with a row for each group, a prompt and its answer.

    lengths: tokens of each group, (A,). A place in the packed row becomes one in the flattened table."""
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids = np.zeros(mask.shape, int)
    ids[mask] = arrays['ids']
    place = np.flatnonzero(mask)  # of each token of the packed row
    padded = arrays | {'ids': ids, 'mask': mask, 'predict_at': place[arrays['predict_at']]}
    padded['last'] = place[arrays['last']]
    del padded['position']  # that of a padded token is its column
    return padded


def _concatenate(groups):
    """Return the arrays of a packed Batch, name -> (T,), (N,) or (A,), of a list of (prompt, [answer, ...]).

    For the prompt [7, 8] with the answers [1, 2] and [3]: ids [7, 8, 1, 2, 3], position [0, 1, 2, 3, 2], predict_at [1, 2, 1],
    target [1, 2, 3], answer [0, 0, 1], offset [0, 1, 0], n [2, 1], last [3, 4]."""
    parts = {name: [] for name in 'ids position predict_at target answer offset n last'.split()}
    end = 0  # number of tokens so far
    for prompt, answers in groups:
        parts['ids'].append(prompt)
        parts['position'].append(np.arange(len(prompt)))
        end += len(prompt)
        prompt_last = end - 1
        for answer in map(np.asarray, answers):
            # tokens that are context only, such as the user's later turns, are stored as ~id, which is negative
            is_predicted = answer >= 0
            offset = np.flatnonzero(is_predicted)
            # a token is predicted at the token before it, an answer's first one at the prompt's last
            place_before = end - 1 + np.arange(len(answer))
            place_before[:1] = prompt_last
            parts['ids'].append(np.where(is_predicted, answer, ~answer))
            parts['position'].append(len(prompt) + np.arange(len(answer)))
            parts['predict_at'].append(place_before[offset])
            parts['target'].append(answer[offset])
            # its number: so many answers have an n by now
            parts['answer'].append(np.full(len(offset), len(parts['n'])))
            parts['offset'].append(offset)
            parts['n'].append([len(offset)])
            end += len(answer)
            parts['last'].append([end - 1])
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


if __name__ == '__main__':
    from text import show

    show.main()
