"""From tokenised examples to microbatches: which examples a step takes, how they are cut up, and packing. No text, no model.

An example is a prompt and its answers (two for a pair, one for SFT and KTO), as token ids. A step's examples are divided into
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
    """Yield (first, rows) of every step: the number of examples taken before it, and the rows (of n examples) that it takes.

    The steps take the examples numbered from start to total - 1, where numbers go on from one epoch to the next. Each epoch has
    all rows in a random order of its own, or without shuffle in their own order."""

    @functools.lru_cache(maxsize=1)
    def order_of(epoch):
        if not shuffle:
            return np.arange(n)
        return np.random.default_rng((seed, epoch)).permutation(n)

    # a row depends on its number alone, so a resumed run takes the same rows
    for first in range(start, total, batch_size):
        numbers = range(first, min(first + batch_size, total))
        rows = [order_of(number // n)[number % n] for number in numbers]
        yield first, np.array(rows)


def plan(lengths, world, max_tokens):
    """Divide a step into microbatches. Returns [rank][microbatch] -> list of slots: places of examples in the step, each once.

    lengths: tokens of each example. Every rank gets equally many microbatches. Each has at most max_tokens tokens, or a single
    longer example, or no example at all if there are too few."""
    # the fewest microbatches that a rank can do with; -(-a // b) rounds up
    tokens = sum(min(int(n), max_tokens) for n in lengths)
    count = max(1, -(-tokens // (world * max_tokens)))
    # one microbatch more on every rank, until all examples fit
    bins = None
    while bins is None:
        bins = _fill_bins(lengths, world * count, max_tokens)
        count += 1

    # dealt out by size, so that the ranks compute their heaviest microbatches at the same time
    bins.sort(key=lambda item: (-item[0], item[1]))
    dealt = [sorted(slots) for _, _, slots in bins]
    return [dealt[rank::world] for rank in range(world)]


def _fill_bins(lengths, n_bins, max_tokens):
    """Put each example, the longest first, into the emptiest bin (microbatch). Returns None if one of them overflows.

    lengths: tokens of each example. Returns a list of (tokens, number, slots), where slots are places of examples in the step."""
    bins = [(0, number, []) for number in range(n_bins)]  # a heap: the emptiest bin is on top
    for slot in sorted(range(len(lengths)), key=lambda slot: -lengths[slot]):
        tokens, number, slots = heapq.heappop(bins)
        tokens += int(lengths[slot])
        # a single example may be longer
        if slots and tokens > max_tokens:
            return None
        slots.append(slot)
        heapq.heappush(bins, (tokens, number, slots))
    return bins


def plan_padded(widths, world, max_tokens):
    """Divide a step into padded microbatches. Returns the same as plan.

    widths: tokens of each example with its own padding. In a microbatch every example takes as many tokens as the widest one, so
    examples of similar width go together."""
    # the widest first: a bin is as wide as its first example
    bins = [[]]
    for slot in sorted(range(len(widths)), key=lambda slot: -widths[slot]):
        last = bins[-1]
        if last and (len(last) + 1) * widths[last[0]] > max_tokens:
            bins.append([])
        bins[-1].append(slot)

    # every rank gets equally many: the fullest bin is halved until that holds, even if one half is empty
    while len(bins) % world:
        fullest = max(bins, key=len)
        middle = max(1, len(fullest) // 2)
        bins.append(fullest[middle:])
        del fullest[middle:]
    # the ranks compute their heaviest microbatches at the same time; an empty one weighs nothing
    bins.sort(key=lambda slots: -len(slots) * widths[slots[0]] if slots else 0)
    return [[sorted(slots) for slots in bins[rank::world]] for rank in range(world)]


def make_batches(examples: Examples, rows, rank, world, max_tokens, *, share_prefix=True, pad=False, device='cpu'):
    """Return (this rank's Batches of the step with these rows, tokens on all ranks, the same with padding). Options: see pack."""
    # (step,) tokens of each example: a prompt counts once, or if it is not shared, once for each answer
    widths = examples.widths[rows]  # (step, 1 + answers)
    answers = widths.shape[1] - 1
    lengths = examples.lengths[rows]
    if pad or not share_prefix:
        lengths = lengths + (answers - 1) * widths[:, 0]

    # which examples go together: every rank makes the same plan of all ranks
    if pad:
        padded = answers * (widths[:, 0] + widths[:, 1:].max(1))
        plans = plan_padded(padded, world, max_tokens)
        not_empty = [slots for of_rank in plans for slots in of_rank if slots]
        allocated = sum(len(slots) * int(padded[slots].max()) for slots in not_empty)
    else:
        plans = plan(lengths, world, max_tokens)
        allocated = int(lengths.sum())

    # this rank's microbatches; one without slots is a filler, and has no cached log-probs
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
    """One step, ready to be computed."""

    first: int  # number of examples taken before this step
    rows: np.ndarray  # which rows of examples it takes
    batches: list  # this rank's microbatches, as Batches
    tokens: int  # its tokens on all ranks
    allocated: int  # the same with padding
    labels: dict = field(default_factory=dict)  # name -> column in step order: good (KTO) or margin (reward.py)
    examples: Examples | None = None  # all examples of its split
    max_tokens: int = 0  # the limit that its microbatches were made with

    @property
    def seen(self):
        """The number of examples taken after this step."""
        return self.first + len(self.rows)


@dataclass
class Batch:
    """A microbatch of A answers with N predicted tokens, made by pack. A place is an index into the flattened ids."""

    ids: torch.Tensor  # packed: (1, T) one row of all prompts and answers; padded: (A, T) a row for each answer
    predict_at: torch.Tensor  # (N,) the place of the token before each answer token
    target: torch.Tensor  # (N,) the answer tokens that are predicted
    answer: torch.Tensor  # (N,) the number, 0 to A - 1, of the answer that each belongs to
    offset: torch.Tensor  # (N,) its index in that answer
    n: torch.Tensor  # (A,) how many tokens of each answer are predicted
    last: torch.Tensor  # (A,) the place of each answer's last token
    slot: list  # the place of each example in the step; -1: a filler, which does not count
    real: torch.Tensor  # (examples,) whether each counts
    longest: int  # tokens of the longest answer
    position: torch.Tensor | None = None  # packed: (1, T) the position of each token in its own sequence
    mask: torch.Tensor | None = None  # padded: (A, T) 1 for tokens, 0 for padding
    # packed: (tokens of a prompt, tokens of each answer that shares it) of each group; padded: an empty list
    groups: list = field(default_factory=list)
    varlen: Varlen | None = None  # packed on a GPU: the groups as its kernel wants them
    ref: torch.Tensor | None = None  # (A,) the reference's log-probs, if they are cached

    @functools.cached_property
    def blocks(self):
        """The groups as a list of Blocks, for attention that computes block after block."""
        return make_blocks(self.groups)

    def sum(self, values):
        """Sum values (N,) of tokens over each answer: (A,). The rest of the batch does not change the order of the additions."""
        # (A, longest): a row for each answer, with zeros behind the shorter ones
        table = values.new_zeros(len(self.n), self.longest)
        return table.index_put((self.answer, self.offset), values).sum(1)


def pack(examples, slots, *, share_prefix=True, pad=False, filler=2, device='cpu'):
    """Return a Batch of examples (prompt, answers), on the device. slots: the place of each example in the step.

    pad: one padded row for each answer. share_prefix=False: one copy of the prompt for each answer. filler: without examples,
    make one up with so many answers, which does not count: the rank must still run its passes, as the other ranks wait."""
    if not examples:
        one_token = np.array([0])
        examples, slots = [(one_token, [one_token] * filler)], [-1]
    # a group is a prompt and the answers that share its copy
    groups = examples
    if pad or not share_prefix:
        groups = [(prompt, [answer]) for prompt, answers in examples for answer in answers]

    # put all pieces into one flat row: a prompt, its answers, the next prompt ...
    pieces = []
    prompt_of = []  # of each piece: which piece is its prompt; a prompt is its own
    for prompt, answers in groups:
        prompt_of += [len(pieces)] * (1 + len(answers))
        pieces += [prompt, *answers]
    ids, prompt_of = np.concatenate(pieces), np.array(prompt_of)
    sizes = np.array([len(piece) for piece in pieces])
    is_answer = prompt_of != np.arange(len(pieces))
    arrays = _predicted(ids, sizes, prompt_of)
    # ~id, which is negative, stands for an id that is seen, but not predicted
    ids = np.where(ids < 0, ~ids, ids)

    if pad:
        # pieces are prompt, answer, prompt, answer ...: each two of them become one row
        lengths = sizes[0::2] + sizes[1::2]
        mask = np.arange(lengths.max()) < lengths[:, None]
        padded_ids = np.zeros(mask.shape, int)
        padded_ids[mask] = ids
        arrays |= {'ids': padded_ids, 'mask': mask}
        # places in the flat row become places in the flattened padded rows
        for name in ('predict_at', 'last'):
            arrays[name] = np.flatnonzero(mask)[arrays[name]]
    else:
        # the positions of each answer go on from its prompt
        first_position = np.where(is_answer, sizes[prompt_of], 0)
        arrays |= {'ids': ids[None], 'position': (np.repeat(first_position, sizes) + _count_up(sizes))[None]}
    tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    real = torch.tensor(slots) >= 0
    batch = Batch(**tensors, slot=list(slots), real=real, longest=int(sizes[is_answer].max()))
    if not pad:
        batch.groups = [(len(prompt), tuple(map(len, answers))) for prompt, answers in groups]
        if torch.device(device).type == 'cuda':
            batch.varlen = Varlen(batch.groups)
    return move(batch, device)


def _predicted(ids, sizes, prompt_of):
    """Return the columns of a Batch that say which answer tokens are predicted: predict_at, target, answer, offset, n and last.

    ids: the flat row of all pieces; sizes: tokens of each piece; prompt_of: the number of the piece that is its prompt."""
    is_answer = prompt_of != np.arange(len(sizes))
    ends = np.cumsum(sizes)
    # for each answer token: the number of its answer, its index in that answer, and its place in ids
    lengths = sizes[is_answer]
    answer, offset = np.repeat(np.arange(len(lengths)), lengths), _count_up(lengths)
    place = (ends[is_answer] - lengths)[answer] + offset

    # leave out tokens that are only seen, such as the user's later turns: they are stored as ~id, which is negative
    trained = ids[place] >= 0
    answer, offset, place = answer[trained], offset[trained], place[trained]
    # an answer's first token is predicted at the prompt's last one, any other at the token before it
    prompt_end = ends[prompt_of[is_answer]][answer]
    predict_at = np.where(offset == 0, prompt_end, place) - 1
    of_tokens = {'predict_at': predict_at, 'target': ids[place], 'answer': answer, 'offset': offset}
    of_answers = {'n': np.bincount(answer, minlength=len(lengths)), 'last': ends[is_answer] - 1}
    return of_tokens | of_answers


def _count_up(sizes):
    """Return 0, 1, ..., size - 1 for each of the sizes, one after the other, as one array."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def move(value, device):
    """Move a tensor, or all tensors inside a list, tuple, dictionary, Batch or Varlen, to a device, and return the result.

    A list or tuple is made again; a dictionary or an object is changed in place. Tensors go to a GPU from pinned memory, so that
    the calling thread does not wait for the copy."""
    if isinstance(value, torch.Tensor):
        if torch.device(device).type == 'cuda' and not value.is_cuda:
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if isinstance(value, list | tuple):
        # a NamedTuple takes its parts one by one, but its _make takes a list
        make = getattr(value, '_make', type(value))
        return make([move(part, device) for part in value])
    # numbers and the like have no parts
    parts = value if isinstance(value, dict) else getattr(value, '__dict__', {})
    for name, part in parts.items():
        parts[name] = move(part, device)
    return value


def pack_probe(examples, device):
    """Return two Batches of the same two examples, packed and padded. A model must give both the same log-probs (hf/probe.py)."""
    longest = int(examples.lengths.argmax())
    two = [examples[0], examples[longest]]
    return [pack(two, [0, 1], pad=pad, device=device) for pad in (False, True)]


# ---- what attention has to know of the groups in a row ----


class Block:
    """Neighbouring groups of a row whose attention is computed together: several small ones under one mask, or a large one."""

    def __init__(self, groups):
        self.groups = groups
        self.is_one_piece = len(groups) > 1  # else its prompt and its answers are pieces
        # tokens of each piece
        sizes = [size for prompt, answers in groups for size in (prompt, *answers)]
        self.sizes = [sum(sizes)] if self.is_one_piece else sizes
        self.masks = {}  # (window, device) -> mask, made once for all layers

    def mask(self, window, device):
        """Return a mask (T, T): each token sees the tokens of its prompt and answer so far, at most window positions back."""
        if (window, device) not in self.masks:
            mask = torch.from_numpy(self._make_mask(window))
            self.masks[window, device] = move(mask, device)
        return self.masks[window, device]

    def _make_mask(self, window):
        """Return the mask as an array: mask[i, j] says whether token i sees token j."""
        tokens = []  # (group, piece, position) of each; piece 0 is the prompt, the others are answers
        for group, (prompt, answers) in enumerate(self.groups):
            for piece, size in enumerate((prompt, *answers)):
                begin = prompt if piece > 0 else 0
                tokens += [(group, piece, position) for position in range(begin, begin + size)]
        group, piece, position = np.array(tokens).T
        back = position[:, None] - position  # how far j lies before i
        is_of_prompt_or_answer = (piece == 0) | (piece[:, None] == piece)
        mask = (group[:, None] == group) & is_of_prompt_or_answer & (back >= 0)
        if window:
            mask &= back < window
        return mask


# the most tokens of a block of several groups: with more, what the mask leaves out costs more than a further call of attention
SMALL = 96


def make_blocks(groups):
    """Return the Blocks of groups, in row order: as many groups together as have SMALL tokens, or one larger group alone."""
    blocks = []  # lists of groups
    tokens = SMALL  # of the last block; it begins as if full, so that the first group begins a block
    for prompt, answers in groups:
        size = prompt + sum(answers)
        tokens += size
        if tokens > SMALL:
            blocks.append([])
            tokens = size
        blocks[-1].append((prompt, answers))
    return [Block(block) for block in blocks]


if __name__ == '__main__':
    from text import show

    show.main()
