"""From tokenised examples to microbatches: which examples a step takes, how the step is split, and packing. No text, no model.

An example is a prompt and its answers (two for a pair, one for SFT and KTO), as token ids. Each microbatch has at most max_tokens
tokens, and is a single row without padding, in which the answers of a pair share one copy of their prompt:
    [prompt | chosen | rejected] [prompt | chosen | rejected] ..."""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import functools
import heapq
from dataclasses import dataclass, field

import numpy as np
import torch

from hf.attention import Varlen, blocks_of
from runtime.prefetch import move
from text.examples import Examples


def steps(n, batch_size, total, seed, start=0, shuffle=True):
    """Yield (first, rows) for each step: the number of examples taken before it, and the rows (of n examples) that it takes.

    start, total: take examples number start to total - 1; the second epoch begins at n. shuffle: each epoch in a new random order."""

    @functools.lru_cache(maxsize=1)
    def order_of(epoch):
        if not shuffle:
            return np.arange(n)
        return np.random.default_rng((seed, epoch)).permutation(n)

    # a row depends on the example's number alone, so a resumed run takes the same rows
    for first in range(start, total, batch_size):
        numbers = range(first, min(first + batch_size, total))
        rows = [order_of(number // n)[number % n] for number in numbers]
        yield first, np.array(rows)


def plan(lengths, world_size, max_tokens):
    """Split a step into microbatches, the same number on every rank. Returns [rank][microbatch] -> list of slots.

    lengths: tokens of each example; slot: its index in the step. An example longer than max_tokens gets its own microbatch.
    plan([5, 3, 4], world_size=2, max_tokens=8) -> [[[1, 2]], [[0]]]: rank 0 has examples 1 and 2, rank 1 has example 0."""
    # start with as many per rank as the tokens need at least; -(-a // b) rounds up
    tokens = sum(min(int(n), max_tokens) for n in lengths)
    per_rank = max(1, -(-tokens // (world_size * max_tokens)))
    # add one on every rank until all examples fit
    while (bins := _fill_bins(lengths, world_size * per_rank, max_tokens)) is None:
        per_rank += 1
    # a bin is (tokens, number, slots). Deal them out, heaviest first: all ranks run their heaviest microbatches at the same time
    bins.sort(key=lambda item: (-item[0], item[1]))
    return [[sorted(slots) for _, _, slots in bins[rank::world_size]] for rank in range(world_size)]


def _fill_bins(lengths, n_bins, max_tokens):
    """Put examples, longest first, into the emptiest bin. Returns [(tokens, bin number, slots)], or None if a bin overflows."""
    bins = [(0, number, []) for number in range(n_bins)]  # a heap: the emptiest bin first
    longest_first = sorted(range(len(lengths)), key=lambda slot: -lengths[slot])
    for slot in longest_first:
        tokens, number, slots = heapq.heappop(bins)
        tokens += int(lengths[slot])
        # an example alone in its bin may exceed max_tokens
        if slots and tokens > max_tokens:
            return None
        slots.append(slot)
        heapq.heappush(bins, (tokens, number, slots))
    return bins


def plan_padded(widths, world_size, max_tokens):
    """Split a step into padded microbatches: [rank][microbatch] -> list of slots. widths: tokens that each example takes alone."""
    # fill bin after bin with slots. Similar widths go together, because a microbatch pads all its examples to the widest one
    bins = [[]]
    widest_first = sorted(range(len(widths)), key=lambda slot: -widths[slot])
    for slot in widest_first:
        last = bins[-1]
        # the first example of a bin is its widest
        if last and (len(last) + 1) * widths[last[0]] > max_tokens:
            bins.append([])
        bins[-1].append(slot)
    # split the fullest bin until all ranks get the same number, even if half of it is empty
    while len(bins) % world_size:
        fullest = max(bins, key=len)
        middle = max(1, len(fullest) // 2)
        bins.append(fullest[middle:])
        del fullest[middle:]
    # deal them out by size, so that all ranks run their heaviest microbatches at the same time
    bins.sort(key=lambda slots: -len(slots) * widths[slots[0]] if slots else 0)
    return [[sorted(slots) for slots in bins[rank::world_size]] for rank in range(world_size)]


def tokens_taken(widths, share_prefix=True, pad=False):
    """Return the tokens that each example takes in a microbatch, (n,). widths: (n, 1 + answers) of prompt and answers."""
    prompts, answers = widths[:, 0], widths[:, 1:]
    n_answers = answers.shape[1]
    if pad:
        return n_answers * (prompts + answers.max(1))  # a row for each answer, all as wide as the widest
    copies = 1 if share_prefix else n_answers
    return copies * prompts + answers.sum(1)


def make_batches(examples: Examples, rows, rank, world_size, max_tokens, *, share_prefix=True, pad=False, device='cpu'):
    """Pack a step, the given rows of examples. Returns (this rank's Batches, tokens on all ranks, tokens plus padding).

    A slot is the index of an example in the step: the example at rows[slot]. Prompts that are not shared count for each answer."""
    widths = examples.widths[rows]  # (step, 1 + answers) tokens of the prompt and of each answer
    n_answers = widths.shape[1] - 1
    lengths = tokens_taken(widths, share_prefix and not pad)  # (step,) of each example, without padding
    # every rank plans for all ranks, so they agree without talking
    if pad:
        padded_lengths = tokens_taken(widths, pad=True)
        plans = plan_padded(padded_lengths, world_size, max_tokens)
        not_empty = [slots for microbatches in plans for slots in microbatches if slots]
        allocated = sum(len(slots) * int(padded_lengths[slots].max()) for slots in not_empty)
    else:
        plans = plan(lengths, world_size, max_tokens)
        allocated = int(lengths.sum())

    batches = []
    for slots in plans[rank]:
        items = [examples[row] for row in rows[slots]]
        batch = pack(items, slots, share_prefix=share_prefix, pad=pad, filler=n_answers, device=device)
        # the reference's log-probs, if cached; pack has put a filler, which has none, into an empty microbatch
        if examples.ref is not None:
            ref = examples.ref[rows[slots]] if slots else np.zeros(n_answers, np.float32)
            batch.ref = move(torch.from_numpy(ref.flatten()), device)
        batches.append(batch)
    return batches, int(lengths.sum()), allocated


@dataclass
class Step:
    """One step: this rank's microbatches, and facts about the whole step."""

    first: int  # number of examples taken before this step
    rows: np.ndarray  # rows of its examples in `examples`
    batches: list  # this rank's Batches
    tokens: int  # number of tokens on all ranks
    allocated: int  # that number plus padding
    labels: dict  # name -> column of the step: good (KTO) or margin (reward.py)
    examples: Examples  # the training or held-out examples
    max_tokens: int  # limit of its microbatches

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
    # packed: for each copy of a prompt, (tokens of the prompt, tokens of each answer that shares it); padded: empty
    groups: list = field(default_factory=list)
    varlen: Varlen | None = None  # packed on a GPU: the groups in the format of the CUDA kernel
    ref: torch.Tensor | None = None  # (A,) cached log-probs of the reference

    @functools.cached_property
    def blocks(self):
        """The groups as Blocks, which attention computes one by one on a CPU."""
        return blocks_of(self.groups)

    def sum(self, values):
        """Sum values (N,), one per predicted token, over the tokens of each answer. Returns (A,)."""
        # a row for each answer, padded with zeros: other answers do not change its order of additions
        table = values.new_zeros(len(self.n), self.longest)
        return table.index_put((self.answer, self.offset), values).sum(1)


def pack(examples, slots, *, share_prefix=True, pad=False, filler=2, device='cpu'):
    """Make a Batch of a list of examples, (prompt, [answer, ...]) each, token ids. slots: index of each example in the step.

    pad: a padded row for each answer. share_prefix=False: a copy of the prompt for each answer. filler: number of answers of the
    dummy example that replaces an empty list. A rank without data must still run its passes, because the others wait for it."""
    if not examples:
        one_token = np.array([0])
        examples, slots = [(one_token, [one_token] * filler)], [-1]
    # a group is a copy of a prompt with the answers that share it
    groups = examples
    if pad or not share_prefix:
        groups = [(prompt, [answer]) for prompt, answers in examples for answer in answers]

    # concatenate all pieces: a prompt, its answers, the next prompt, ... prompt_of: for each piece, the index of its prompt's piece.
    # A pair with prompt [7, 8] and answers [1, 2], [3]: ids [7, 8, 1, 2, 3], sizes [2, 2, 1], prompt_of [0, 0, 0]
    pieces, prompt_of = [], []
    for prompt, answers in groups:
        prompt_of += [len(pieces)] * (1 + len(answers))
        pieces += [prompt, *answers]
    ids, prompt_of = np.concatenate(pieces), np.array(prompt_of)
    sizes = np.array([len(piece) for piece in pieces])
    is_answer = prompt_of != np.arange(len(pieces))
    # tokens of an answer that are context only, such as the user's later turns, are ~id (negative): _predicted skips them
    arrays = _predicted(ids, sizes, is_answer, prompt_of)
    ids = np.where(ids < 0, ~ids, ids)  # without the marks

    if pad:
        # one row for each prompt and its answer
        lengths = sizes[0::2] + sizes[1::2]
        mask = np.arange(lengths.max()) < lengths[:, None]
        padded_ids = np.zeros(mask.shape, int)
        padded_ids[mask] = ids
        arrays |= {'ids': padded_ids, 'mask': mask}
        # place in the concatenated ids -> place in the padded ones
        padded_place = np.flatnonzero(mask)
        for name in ('predict_at', 'last'):
            arrays[name] = padded_place[arrays[name]]
    else:
        # an answer's positions continue those of its prompt: [0, 1, 2, 3, 2] in the example above
        first_position = np.where(is_answer, sizes[prompt_of], 0)
        index_in_piece = np.concatenate([np.arange(size) for size in sizes])
        position = np.repeat(first_position, sizes) + index_in_piece
        arrays |= {'ids': ids[None], 'position': position[None]}
    tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    longest = int(sizes[is_answer].max())
    batch = Batch(**tensors, slot=list(slots), real=torch.tensor(slots) >= 0, longest=longest)
    if not pad:
        batch.groups = [(len(prompt), tuple(map(len, answers))) for prompt, answers in groups]
        if torch.device(device).type == 'cuda':
            batch.varlen = Varlen(batch.groups)
    return move(batch, device)


def _predicted(ids, sizes, is_answer, prompt_of):
    """Return a Batch's arrays about predicted tokens: name -> array. Places are indices into ids, the concatenated pieces.

    sizes (tokens), is_answer, prompt_of (index of its prompt's piece): of each piece. Prompt [7, 8] with answers [1, 2] and [3],
    ids [7, 8, 1, 2, 3], gives predict_at [1, 2, 1], target [1, 2, 3], answer [0, 0, 1], offset [0, 1, 0], n [2, 1], last [3, 4]."""
    # all answer tokens: the number of their answer, their index in it, their place
    ends = np.cumsum(sizes)
    answer_ends = ends[is_answer]
    lengths = sizes[is_answer]
    answer = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.concatenate([np.arange(length) for length in lengths])
    answer_starts = answer_ends - lengths
    place = answer_starts[answer] + offset
    # drop the tokens that are context only: stored as ~id, which is negative
    is_predicted = ids[place] >= 0
    answer, offset, place = answer[is_predicted], offset[is_predicted], place[is_predicted]
    # an answer's first token is predicted at the prompt's last token, any other at the token before it
    prompt_last = ends[prompt_of[is_answer]] - 1
    predict_at = np.where(offset == 0, prompt_last[answer], place - 1)
    of_tokens = {'predict_at': predict_at, 'target': ids[place], 'answer': answer, 'offset': offset}
    return of_tokens | {'n': np.bincount(answer, minlength=len(lengths)), 'last': answer_ends - 1}


if __name__ == '__main__':
    from text import show

    show.main()
