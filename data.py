"""From tokenised examples to microbatches: the order of steps, planning and packing. No text, no model.

An example is a prompt and its answers (two for a pair, one for SFT and KTO), as token ids. A step's examples are cut into
microbatches of at most max_tokens tokens without padding, where both answers of a pair share one copy of the prompt:
    [prompt | chosen | rejected] [prompt | chosen | rejected] ...
"""

import functools
import heapq
from dataclasses import dataclass, field

import numpy as np
import torch

from hf.varlen import Varlen
from text.examples import Examples

# ---- which examples, when ----


def steps(n, batch_size, total, seed, start=0, shuffle=True):
    """Yield (first, rows) of every step: how many examples were taken before it, and which of the n examples it takes.

    The steps go from example number start to total. Epochs follow each other without a gap, each in an order of its own."""

    @functools.lru_cache(maxsize=1)
    def order(epoch):
        return np.random.default_rng((seed, epoch)).permutation(n) if shuffle else np.arange(n)

    # an example's number decides its epoch and its place in it, wherever a run began
    for first in range(start, total, batch_size):
        numbers = range(first, min(first + batch_size, total))
        yield first, np.array([order(number // n)[number % n] for number in numbers])


def plan(lengths, world, max_tokens):
    """Cut a step into microbatches: [rank][microbatch] -> list of slots (places of examples in the step), each once.

    lengths: tokens of each example. Every rank gets equally many microbatches, each of at most max_tokens tokens, or of a
    single longer example; where examples are few, some are empty."""
    # each rank has at least this many microbatches (-(-a // b) rounds up)
    tokens = sum(min(int(n), max_tokens) for n in lengths)
    count = max(1, -(-tokens // (world * max_tokens)))
    longest_first = sorted(range(len(lengths)), key=lambda slot: -lengths[slot])

    # put the longest into the emptiest; where one overflows, begin again with one microbatch more
    fits = False
    while not fits:
        fits = True
        bins = [(0, number, []) for number in range(world * count)]  # (tokens, number, slots), the emptiest on top
        for slot in longest_first:
            load, number, slots = heapq.heappop(bins)
            load += int(lengths[slot])
            if slots and load > max_tokens:
                fits = False
            slots.append(slot)
            heapq.heappush(bins, (load, number, slots))
        count += 1

    # dealt out to the ranks by size, so that the heaviest are computed at the same time
    bins.sort(key=lambda item: (-item[0], item[1]))
    dealt = [sorted(slots) for _, _, slots in bins]
    return [dealt[rank::world] for rank in range(world)]


def plan_padded(widths, world, max_tokens):
    """As plan, for padded batches: there an example takes as many tokens as the widest one of its microbatch.

    widths: tokens of each example with its own padding. Examples of similar width go together."""
    # the widest first: a microbatch is as wide as its first example
    bins = []
    for slot in sorted(range(len(widths)), key=lambda slot: -widths[slot]):
        if not bins or (len(bins[-1]) + 1) * widths[bins[-1][0]] > max_tokens:
            bins.append([])
        bins[-1].append(slot)

    # every rank gets equally many: the fullest is halved until that holds
    while len(bins) % world or not bins:
        fullest = max(bins, key=len, default=[])
        middle = max(1, len(fullest) // 2)
        bins.append(fullest[middle:])
        del fullest[middle:]
    # the heaviest at the same time on all ranks; an empty one weighs nothing
    bins.sort(key=lambda slots: -len(slots) * widths[slots[0]] if slots else 0)
    return [[sorted(slots) for slots in bins[rank::world]] for rank in range(world)]


def make_batches(examples: Examples, rows, rank, world, max_tokens, *, share_prefix=True, pad=False, device='cpu'):
    """(this rank's Batches of a step, the step's tokens on all ranks, the same with padding). rows: of its examples."""
    # tokens of each example (step,): with as many copies of its prompt as answers, where they do not share one
    widths = examples.widths[rows]  # (step, 1 + answers)
    answers = widths.shape[1] - 1
    lengths = examples.lengths[rows]
    if pad or not share_prefix:
        lengths = lengths + (answers - 1) * widths[:, 0]

    # which examples go together; every rank makes the same plan
    if pad:
        padded = answers * (widths[:, 0] + widths[:, 1:].max(1))
        plans = plan_padded(padded, world, max_tokens)
        allocated = sum(len(slots) * int(padded[slots].max()) for mine in plans for slots in mine if slots)
    else:
        plans = plan(lengths, world, max_tokens)
        allocated = int(lengths.sum())

    # this rank's microbatches; a filler has no log-probs in the cache
    batches = []
    for slots in plans[rank]:
        items = [examples[row] for row in rows[slots]]
        batch = pack(items, slots, share_prefix=share_prefix, pad=pad, filler=answers, device=device)
        if examples.ref is not None:
            ref = examples.ref[rows[slots]] if slots else np.zeros(answers, np.float32)
            batch.ref = move(torch.from_numpy(ref.flatten()), device)
        batches.append(batch)
    return batches, int(lengths.sum()), allocated


# ---- microbatches ----


@dataclass
class Step:
    """One step, ready to be computed. labels: columns known before it, in step order (good: KTO; margin: reward.py)."""

    first: int  # examples before it
    rows: np.ndarray  # of its examples
    batches: list  # this rank's microbatches
    tokens: int  # of all ranks
    allocated: int  # the same with padding
    labels: dict = field(default_factory=dict)
    examples: Examples | None = None  # the set that its rows are of
    max_tokens: int = 0  # of its microbatches

    @property
    def seen(self):
        """Examples after it."""
        return self.first + len(self.rows)


@dataclass
class Batch:
    """A packed microbatch of A answers with N predicted tokens. Packed: ids and position (1, T), groups of (prompt length,
    answer lengths). Padded: ids and mask (A, T), no groups."""

    ids: torch.Tensor
    predict_at: torch.Tensor  # (N,) place, in the flattened ids, of the token before each answer token
    target: torch.Tensor  # (N,) the answer tokens
    answer: torch.Tensor  # (N,) which answer each belongs to
    offset: torch.Tensor  # (N,) which token of it
    n: torch.Tensor  # (A,) tokens of the answers that are trained on
    last: torch.Tensor  # (A,) place, in the flattened ids, of the last token of each answer
    slot: list  # of each example in the step; -1: a filler that does not count
    real: torch.Tensor  # (examples,) whether each counts
    longest: int  # tokens of the longest answer
    position: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    groups: list = field(default_factory=list)
    varlen: object = None
    ref: torch.Tensor | None = None  # (A,) the reference's log-probs, where they are cached

    @functools.cached_property
    def blocks(self):
        """The groups in Blocks, for attention without one kernel for all."""
        return make_blocks(self.groups)

    def sum(self, values):
        """(N,) per-token values -> (A,) sums, in an order that does not depend on what else is in the batch."""
        table = values.new_zeros(len(self.n), self.longest)
        return table.index_put((self.answer, self.offset), values).sum(1)


def pack(examples, slots, *, share_prefix=True, pad=False, filler=2, device='cpu'):
    """A Batch of (prompt, answers) examples. pad: one padded row an answer; share_prefix=False: a prompt for each answer.

    slots: the examples' places in the step. No examples: a filler with this many answers, for the rank joins collectives."""
    if not examples:
        one = np.array([0])
        examples, slots = [(one, [one] * filler)], [-1]
    # a group is a prompt and the answers that share its copy; here every answer has its own copy, or none has
    groups = examples
    if pad or not share_prefix:
        groups = [(prompt, [answer]) for prompt, answers in examples for answer in answers]

    # one piece after the other in one flat row: a prompt, its answers, the next prompt ...
    pieces, prompt_of = [], []  # prompt_of: which piece is the prompt of each
    for prompt, answers in groups:
        prompt_of += [len(pieces)] * (1 + len(answers))
        pieces += [prompt, *answers]
    ids, prompt_of = np.concatenate(pieces), np.array(prompt_of)
    sizes = np.array([len(piece) for piece in pieces])
    arrays = _predicted(ids, sizes, prompt_of)
    ids = np.where(ids < 0, ~ids, ids)
    is_answer = prompt_of != np.arange(len(pieces))

    # packed: that one row, in which every answer follows its prompt; padded: a row for each answer
    if pad:
        lengths = sizes[0::2] + sizes[1::2]
        mask = np.arange(lengths.max()) < lengths[:, None]
        arrays |= {'ids': np.zeros(mask.shape, int), 'mask': mask}
        arrays['ids'][mask] = ids
        # places are those in the padded rows, one behind the other
        for name in ('predict_at', 'last'):
            arrays[name] = np.flatnonzero(mask)[arrays[name]]
    else:
        begins = np.where(is_answer, sizes[prompt_of], 0)
        arrays |= {'ids': ids[None], 'position': (np.repeat(begins, sizes) + _count_up(sizes))[None]}
    tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    batch = Batch(**tensors, slot=list(slots), real=torch.tensor(slots) >= 0, longest=int(sizes[is_answer].max()))
    if not pad:
        batch.groups = [(len(prompt), tuple(map(len, answers))) for prompt, answers in groups]
        if torch.device(device).type == 'cuda':
            batch.varlen = Varlen(batch.groups)
    return move(batch, device)


def _predicted(ids, sizes, prompt_of):
    """Columns of a Batch that say which tokens are predicted, and where: those tokens of the answers that are trained on.

    sizes: tokens of each piece of ids; prompt_of: which piece is its prompt."""
    is_answer = prompt_of != np.arange(len(sizes))
    ends = np.cumsum(sizes)
    # of each token of the answers: which answer it belongs to, which token of it, and its place in ids
    n = sizes[is_answer]
    answer, offset = np.repeat(np.arange(len(n)), n), _count_up(n)
    place = (ends[is_answer] - n)[answer] + offset

    # without those that are only seen, as the user's later turns: they are stored as ~id, which is negative
    trained = ids[place] >= 0
    answer, offset, place = answer[trained], offset[trained], place[trained]
    # the first one is predicted at the prompt's end, the others at the token before them
    prompt_end = ends[prompt_of[is_answer]][answer]
    predict_at = np.where(offset == 0, prompt_end, place) - 1
    found = {'predict_at': predict_at, 'target': ids[place], 'answer': answer, 'offset': offset}
    return found | {'n': np.bincount(answer, minlength=len(n)), 'last': ends[is_answer] - 1}


def _count_up(sizes):
    """0, 1, ... of each of the sizes, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def move(value, device):
    """Bring a tensor, or all tensors in a list, tuple, dictionary, Batch or Varlen, to a device. Returns what then holds them.

    To a GPU they go from pinned memory, so that the thread which calls this does not wait for the copy."""
    if isinstance(value, torch.Tensor):
        if torch.device(device).type == 'cuda' and not value.is_cuda:
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if isinstance(value, list | tuple):
        make = getattr(value, '_make', type(value))  # the former of a NamedTuple
        return make([move(part, device) for part in value])
    # objects keep their identity; numbers and the like have nothing to move
    parts = value if isinstance(value, dict) else getattr(value, '__dict__', {})
    for name, part in parts.items():
        parts[name] = move(part, device)
    return value


def pack_probe(examples, device):
    """[packed, padded] Batches of the same two examples, to see whether a model gives both the same log-probs."""
    # an ordinary example, and the one that needs the most room
    two = [examples[0], examples[int(examples.lengths.argmax())]]
    return [pack(two, [0, 1], pad=pad, device=device) for pad in (False, True)]


# ---- what attention has to know of the groups in a row ----


class Block:
    """Consecutive groups of a row whose attention is computed together: many small ones at once under a mask, or one large one.

    sizes: tokens of the pieces that it is cut into: all of it, or a large group's prompt and answers."""

    def __init__(self, groups):
        self.groups = groups
        self.is_one_piece = len(groups) > 1
        sizes = [size for prompt, answers in groups for size in (prompt, *answers)]
        self.sizes = [sum(sizes)] if self.is_one_piece else sizes
        self.masks = {}  # made once for all layers

    def mask(self, window, device):
        """Which tokens see which, (T, T): those of their prompt and answer so far, at most window positions back."""
        if (window, device) not in self.masks:
            self.masks[window, device] = move(torch.from_numpy(self._mask(window)), device)
        return self.masks[window, device]

    def _mask(self, window):
        """As mask, for numpy."""
        tokens = []  # (group, answer, position) of each; the answer 0 is the prompt
        for group, (prompt, answers) in enumerate(self.groups):
            for answer, size in enumerate((prompt, *answers)):
                begin = prompt if answer else 0
                tokens += [(group, answer, position) for position in range(begin, begin + size)]
        group, answer, position = np.array(tokens).T
        # from a token to one that it sees
        back = position[:, None] - position
        mask = (group[:, None] == group) & (back >= 0) & ((answer == 0) | (answer[:, None] == answer))
        if window:
            mask &= back < window
        return mask


SMALL = 96  # tokens of a block of several groups: more of them together waste more than a call of attention costs


def make_blocks(groups):
    """Blocks of groups in row order: small groups together, a large one alone."""
    # tokens of the block that is filled: the first group begins one
    blocks, tokens = [], SMALL
    for group in groups:
        size = group[0] + sum(group[1])
        tokens += size
        if tokens > SMALL:
            blocks.append([])
            tokens = size
        blocks[-1].append(group)
    return list(map(Block, blocks))


if __name__ == '__main__':
    from text import show

    show.main()
