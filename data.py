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

from text.examples import Examples

# ---- which examples, when ----


def steps(n, batch_size, total, seed, start=0, shuffle=True):
    """Yield (first, rows) of every step: how many examples were taken before it, and which of the n examples it takes.

    The steps go from example number start to total. Epochs follow each other without a gap, each in an order of its own."""
    order_of = -1  # the epoch that order belongs to
    for first in range(start, total, batch_size):
        rows = []
        for number in range(first, min(first + batch_size, total)):
            # an example's number decides its epoch and its place in it, wherever a run began
            epoch, place = divmod(number, n)
            if epoch != order_of:
                order_of = epoch
                order = np.random.default_rng((seed, epoch)).permutation(n) if shuffle else np.arange(n)
            rows.append(order[place])
        yield first, np.array(rows)


def plan(lengths, world, max_tokens):
    """Cut a step into microbatches: [rank][microbatch] -> list of slots (places of examples in the step).

    lengths: tokens of each example. Every rank gets equally many microbatches, each of at most max_tokens tokens, or of a
    single longer example; where examples are few, some are empty. Each slot appears once."""
    # each rank has at least this many microbatches (-(-a // b) rounds up)
    tokens = sum(min(int(n), max_tokens) for n in lengths)
    count = max(1, -(-tokens // (world * max_tokens)))
    longest_first = sorted(range(len(lengths)), key=lambda slot: -lengths[slot])

    # as few as possible: put the longest into the emptiest, and take one microbatch more where one overflows
    while True:
        bins = [(0, number, []) for number in range(world * count)]  # (tokens, number, slots), the emptiest on top
        fits = True
        for slot in longest_first:
            load, number, slots = heapq.heappop(bins)
            load += int(lengths[slot])
            if slots and load > max_tokens:
                fits = False
            slots.append(slot)
            heapq.heappush(bins, (load, number, slots))
        if fits:
            break
        count += 1

    # dealt out to the ranks by size, so that the heaviest are computed at the same time
    bins.sort(key=lambda item: (-item[0], item[1]))
    dealt = [sorted(slots) for _, _, slots in bins]
    return [dealt[rank::world] for rank in range(world)]


def plan_padded(widths, world, max_tokens):
    """As plan, for padded batches: there an example takes as many tokens as the widest one of its microbatch.

    widths: tokens of each example with its own padding. Examples of similar width go together."""
    # the widest first: a microbatch is as wide as its first example
    bins, width = [], 0
    for slot in sorted(range(len(widths)), key=lambda slot: -widths[slot]):
        if not bins or (len(bins[-1]) + 1) * width > max_tokens:
            bins.append([])
            width = widths[slot]
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
    prompts = widths[:, 0]
    answers = widths.shape[1] - 1
    lengths = examples.lengths[rows]
    if pad or not share_prefix:
        lengths = lengths + (answers - 1) * prompts

    # which examples go together; every rank makes the same plan
    if pad:
        padded = answers * (prompts + widths[:, 1:].max(1))
        plans = plan_padded(padded, world, max_tokens)
        filled = [slots for microbatches in plans for slots in microbatches if slots]
        allocated = sum(len(slots) * int(padded[slots].max()) for slots in filled)
    else:
        plans = plan(lengths, world, max_tokens)
        allocated = int(lengths.sum())

    # this rank's microbatches
    batches = []
    for slots in plans[rank]:
        items = [examples[rows[slot]] for slot in slots]
        batch = pack(items, slots, share_prefix=share_prefix, pad=pad, filler=answers, device=device)
        if examples.ref is not None:
            ref = np.zeros(answers, np.float32)  # of a filler
            if slots:
                ref = examples.ref[rows[slots]].reshape(-1)
            batch.ref = move(torch.from_numpy(np.ascontiguousarray(ref)), device)
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
    width = max(len(prompt) + len(answers[0]) for prompt, answers in groups)  # of padded rows

    # one group after the other in one flat row of ids; place: where in it the next piece begins
    pieces, position, shapes, place = [], [], [], 0
    n, first, before = [], [], []  # of each answer: its length, the place of its first token, and of its prompt's last
    for prompt, answers in groups:
        row_end = place + width
        pieces.append(prompt)
        position.append(np.arange(len(prompt)))
        place += len(prompt)
        prompt_last = place - 1
        for answer in answers:
            pieces.append(answer)
            position.append(len(prompt) + np.arange(len(answer)))  # every answer follows the prompt
            n.append(len(answer))
            first.append(place)
            before.append(prompt_last)
            place += len(answer)
        if pad:
            pieces.append(np.zeros(row_end - place, int))
            place = row_end
        shapes.append((len(prompt), tuple(map(len, answers))))

    # which of these tokens are predicted; ~id stands for a token that is only seen
    ids = np.concatenate(pieces)
    n, first, before = map(np.array, (n, first, before))
    arrays = predicted(ids, n, first, before)
    arrays['ids'] = np.where(ids < 0, ~ids, ids)[None]  # (1, T)
    arrays['last'] = first + n - 1

    # padded: a row for each answer, and a mask; packed: one row of all, and where its groups lie
    if pad:
        arrays['ids'] = arrays['ids'].reshape(-1, width)
        lengths = np.array([[prompt + answer] for prompt, (answer,) in shapes])  # (A, 1)
        arrays['mask'] = np.arange(width) < lengths
    else:
        arrays['position'] = np.concatenate(position)[None]
    for name, array in arrays.items():
        arrays[name] = torch.from_numpy(array.astype(np.int64))
    batch = Batch(**arrays, slot=list(slots), real=torch.tensor(slots) >= 0, longest=int(n.max()))
    if not pad:
        batch.groups = shapes
        if torch.device(device).type == 'cuda':
            batch.varlen = Varlen(shapes)
    return move(batch, device)


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


def predicted(ids, n, first, before):
    """Columns of a Batch that say which tokens are predicted, and where: those tokens of the answers that are trained on.

    n, first, before (A,): of each answer its length, the place of its first token in ids, and that of its prompt's last."""
    # of each answer token: which answer it belongs to, which token of it, where it lies
    answer = np.repeat(np.arange(len(n)), n)
    offset = np.concatenate([np.arange(k) for k in n])
    place = first[answer] + offset

    # without those that are only seen, as the user's later turns: they are stored as ~id, which is negative
    trained = ids[place] >= 0
    answer, offset, place = answer[trained], offset[trained], place[trained]
    # the first one is predicted at the prompt's end, the others at the token before them
    predict_at = np.where(offset == 0, before[answer], place - 1)
    counts = np.bincount(answer, minlength=len(n))
    return {'predict_at': predict_at, 'target': ids[place], 'answer': answer, 'offset': offset, 'n': counts}


def pack_probe(examples, device):
    """[packed, padded] Batches of the same two examples, to see whether a model gives both the same log-probs."""
    # an ordinary example, and the one that needs the most room
    longest = int(examples.lengths.argmax())
    two = [examples[0], examples[longest]]
    return [pack(two, [0, 1], pad=pad, device=device) for pad in (False, True)]


class Block:
    """Consecutive groups of a row whose attention is computed together: many small ones at once under a mask, or one large one.

    sizes: tokens of the pieces that it is cut into: all of it, or a large group's prompt and answers."""

    def __init__(self, groups):
        self.is_one_piece = len(groups) > 1
        sizes = [size for prompt, answers in groups for size in (prompt, *answers)]
        self.sizes = [sum(sizes)] if self.is_one_piece else sizes
        self.groups, self.masks = groups, {}  # (window, device) -> mask

    def mask(self, window, device):
        """Which tokens see which, (T, T): those of their prompt and answer so far, at most window positions back. Made once."""
        key = window, device
        if key not in self.masks:
            group, answer, position = [], [], []  # of each token; the answer 0 is the prompt
            for g, (prompt, answers) in enumerate(self.groups):
                group += [g] * (prompt + sum(answers))
                for number, (start, size) in enumerate([(0, prompt), *((prompt, size) for size in answers)]):
                    answer += [number] * size
                    position += range(start, start + size)
            group, answer, position = map(np.array, (group, answer, position))
            back = position[:, None] - position  # from a token to one that it sees
            mask = (group[:, None] == group) & (back >= 0) & ((answer == 0) | (answer[:, None] == answer))
            if window:
                mask &= back < window
            self.masks[key] = move(torch.from_numpy(mask), device)
        return self.masks[key]


SMALL = 96  # tokens of a block of several groups: more of them together waste more than a call of attention costs


def make_blocks(groups):
    """Blocks of groups in row order: small groups together, a large one alone."""
    blocks, some, tokens = [], [], 0
    for group in groups:
        size = group[0] + sum(group[1])
        if some and tokens + size > SMALL:
            blocks.append(Block(some))
            some, tokens = [], 0
        some.append(group)
        tokens += size
    return [*blocks, Block(some)]


class Varlen:
    """What the CUDA kernel needs: queries in row order; keys gathered so that each answer has its prompt before it.

    cu_q, cu_k (A + 1,): where each answer's queries and keys begin and end; max_q, max_k: the longest of them."""

    def __init__(self, groups):
        gather, start = [], 0
        n_queries, n_keys = [], []  # of each answer
        for prompt, answers in groups:
            prompt_places = np.arange(start, start + prompt)
            start += prompt
            for i, answer in enumerate(answers):
                gather += [prompt_places, np.arange(start, start + answer)]
                n_keys.append(prompt + answer)
                n_queries.append(answer if i else prompt + answer)  # the prompt's queries go with the first answer
                start += answer
        self.gather = torch.from_numpy(np.concatenate(gather))
        edges = [np.cumsum([0, *lengths]) for lengths in (n_queries, n_keys)]
        self.cu_q, self.cu_k = (torch.tensor(x, dtype=torch.int32) for x in edges)
        self.max_q, self.max_k = max(n_queries), max(n_keys)


if __name__ == '__main__':
    from text import show

    show.main()
