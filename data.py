"""From tokenised examples to microbatches: the order of steps, planning and packing. No text, no model.

An example is a prompt and its answers (two for a pair, one for SFT and KTO), as token ids. A step's examples are cut into
microbatches of at most max_tokens tokens without padding, where both answers of a pair share one copy of the prompt:
    [prompt | chosen | rejected] [prompt | chosen | rejected] ...
"""

import heapq
from dataclasses import dataclass, field

import numpy as np
import torch

from text.examples import Examples

# ---- which examples, when ----


def steps(n, batch_size, total, seed, start=0, shuffle=True):
    """Yield (first, rows) of every step from example count start to total: epochs without replacement, end to end."""
    epoch, order = -1, None
    # the count of an example decides its epoch and its place in it, wherever a run began
    for first in range(start, total, batch_size):
        rows = []
        for count in range(first, min(first + batch_size, total)):
            if count // n != epoch:
                epoch, order = count // n, np.arange(n)
                if shuffle:
                    order = np.random.default_rng((seed, epoch)).permutation(n)
            rows.append(order[count % n])
        yield first, np.array(rows)


def plan(lengths, world, max_tokens):
    """Cut a step into microbatches: [rank][microbatch] -> slots in the step, every rank as many microbatches.

    A microbatch holds at most max_tokens tokens, or one example that is longer. Slots appear once; a microbatch may be
    empty where there are fewer examples than microbatches. Longest first into the emptiest: nearly equal loads."""
    # at least so many microbatches a rank
    tokens = sum(min(int(n), max_tokens) for n in lengths)
    count = max(1, -(-tokens // (world * max_tokens)))
    order = sorted(range(len(lengths)), key=lambda slot: -lengths[slot])

    # as few microbatches a rank as possible: try, and take one more where one overflows
    while True:
        bins = [(0, number, []) for number in range(world * count)]
        fits = True
        for slot in order:
            load, number, slots = heapq.heappop(bins)
            fits = fits and (not slots or load + lengths[slot] <= max_tokens)
            slots.append(slot)
            heapq.heappush(bins, (load + int(lengths[slot]), number, slots))
        if fits:
            break
        count += 1

    # the heaviest ones are computed at the same time on all ranks
    bins.sort(key=lambda item: (-item[0], item[1]))
    return [[sorted(bins[m * world + rank][2]) for m in range(count)] for rank in range(world)]


def plan_padded(widths, world, max_tokens):
    """As plan, for padded batches, where every example is as wide as the widest beside it: similar widths side by side."""
    # the widest first: each bin is as wide as its first example
    bins, widest = [], 0
    for slot in sorted(range(len(widths)), key=lambda slot: -widths[slot]):
        if not bins or (len(bins[-1]) + 1) * widest > max_tokens:
            bins.append([])
            widest = widths[slot]
        bins[-1].append(slot)

    # every rank as many: the fullest is split in two
    while len(bins) % world or not bins:
        fullest = max(bins, key=len, default=[])
        middle = max(1, len(fullest) // 2)
        bins.append(fullest[middle:])
        del fullest[middle:]
    # the heaviest at the same time on all ranks
    bins.sort(key=lambda slots: -len(slots) * widths[slots[0]] if slots else 0)
    return [[sorted(slots) for slots in bins[rank::world]] for rank in range(world)]


def make_batches(examples: Examples, rows, rank, world, max_tokens, *, share_prefix=True, pad=False, device='cpu'):
    """(this rank's Batches of the examples at rows, real tokens of all ranks, tokens with padding of all ranks)."""
    # tokens of each example, with a prompt for each answer where it is not shared
    widths = examples.widths[rows]
    answers = widths.shape[1] - 1
    lengths = examples.lengths[rows]
    if pad or not share_prefix:
        lengths = lengths + (answers - 1) * widths[:, 0]

    # which examples go together; every rank makes the same plan
    if pad:
        padded = answers * (widths[:, 0] + widths[:, 1:].max(1))
        plans = plan_padded(padded, world, max_tokens)
        allocated = sum(len(slots) * int(padded[slots].max()) for plan in plans for slots in plan if slots)
    else:
        plans, allocated = plan(lengths, world, max_tokens), int(lengths.sum())

    # this rank's microbatches
    batches = []
    for slots in plans[rank]:
        items = [examples[rows[slot]] for slot in slots]
        batch = pack(items, slots, share_prefix=share_prefix, pad=pad, filler=answers, device=device)
        if examples.ref is not None:
            ref = np.zeros(answers, np.float32)  # of a filler
            if slots:
                ref = examples.ref[rows[slots]].reshape(-1)
            batch.ref = torch.from_numpy(np.ascontiguousarray(ref)).to(device, non_blocking=True)
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
    mismatched: list = field(default_factory=list)  # microbatches of Examples.mismatched, for KTO

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
    longest: int  # tokens of the longest answer
    position: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    groups: list = field(default_factory=list)
    varlen: object = None
    ref: torch.Tensor | None = None  # (A,) the reference's log-probs, where they are cached

    def sum(self, values):
        """(N,) per-token values -> (A,) sums, in an order that does not depend on what else is in the batch."""
        table = values.new_zeros(len(self.n), self.longest)
        return table.index_put((self.answer, self.offset), values).sum(1)

    def real(self):
        """(examples,) mask of the examples that count, which a filler does not."""
        return torch.tensor(self.slot, device=self.ids.device) >= 0


def pack(examples, slots, *, share_prefix=True, pad=False, filler=2, device='cpu'):
    """A Batch of (prompt, answers) examples. pad: one padded row an answer; share_prefix=False: a prompt for each answer.

    An empty list makes a filler example with this many answers, so that its rank can take part in the collectives."""
    if not examples:
        examples, slots = [(np.array([0]), [np.array([0])] * filler)], [-1]
    # a group is a prompt and the answers that share its copy
    groups = examples
    if pad or not share_prefix:
        groups = [(prompt, [answer]) for prompt, answers in examples for answer in answers]
    width = max(len(prompt) + len(answers[0]) for prompt, answers in groups)  # of padded rows

    # lay out one group after the other, in one flat row of ids
    pieces, position, shapes, start = [], [], [], 0
    n, first, before = [], [], []  # of each answer: its length, the place of its first token, and of its prompt's last
    for prompt, answers in groups:
        p = len(prompt)
        end = start + p
        pieces.append(prompt)
        position.append(np.arange(p))
        for answer in answers:
            k = len(answer)
            pieces.append(answer)
            position.append(np.arange(p, p + k))  # every answer follows the prompt
            n.append(k)
            first.append(end)
            before.append(start + p - 1)
            end += k
        if pad:
            pieces.append(np.zeros(start + width - end, int))
            end = start + width
        shapes.append((p, tuple(map(len, answers))))
        start = end

    # which of these tokens are predicted
    ids = np.concatenate(pieces)
    n, first, before = map(np.array, (n, first, before))
    arrays = predicted(ids, n, first, before)
    arrays |= {'ids': np.where(ids < 0, ~ids, ids)[None], 'last': first + n - 1}

    # padded: one row an answer, and a mask; packed: one row of all, and where its groups lie
    if pad:
        arrays['ids'] = arrays['ids'].reshape(-1, width)
        arrays['mask'] = np.arange(width) < [[p + sizes[0]] for p, sizes in shapes]
    else:
        arrays['position'] = np.concatenate(position)[None]
    for name, array in arrays.items():
        arrays[name] = torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)
    batch = Batch(**arrays, slot=list(slots), longest=int(n.max()))
    if not pad:
        batch.groups = shapes
        batch.varlen = Varlen(shapes, device) if torch.device(device).type == 'cuda' else None
    return batch


def predicted(ids, n, first, before):
    """Columns of a Batch that say which tokens are predicted, and where: of every answer all tokens that are trained on.

    n, first, before: of each answer its length, the place of its first token in ids, and that of its prompt's last."""
    # which answer a token belongs to, which token of it, where it lies
    answer = np.repeat(np.arange(len(n)), n)
    offset = np.concatenate([np.arange(k) for k in n])
    place = first[answer] + offset

    # a token that is only seen, as the user's later turns, is stored as ~id
    trained = ids[place] >= 0
    answer, offset, place = answer[trained], offset[trained], place[trained]
    # the first one is predicted at the prompt's end, the others at the token before them
    predict_at = np.where(offset == 0, before[answer], place - 1)
    counts = np.bincount(answer, minlength=len(n))
    return {'predict_at': predict_at, 'target': ids[place], 'answer': answer, 'offset': offset, 'n': counts}


def pack_probe(examples, device):
    """The first and the longest example, packed and padded: to see whether a model gives both the same log-probs."""
    # an ordinary example, and the one that needs the most room
    two = [examples[0], examples[int(examples.lengths.argmax())]]
    return [pack(two, [0, 1], pad=pad, device=device) for pad in (False, True)]


class Varlen:
    """What the CUDA kernel needs: queries in row order; keys gathered so that each answer has its prompt before it."""

    def __init__(self, groups, device):
        # q and k: lengths of what each answer asks, and of what it may look at
        gather, q, k, start = [], [], [], 0
        for p, answers in groups:
            end = start + p
            for i, n in enumerate(answers):
                gather += [np.arange(start, start + p), np.arange(end, end + n)]
                q.append(n if i else p + n)  # the prompt's queries go with the first answer
                k.append(p + n)
                end += n
            start = end
        self.gather = torch.from_numpy(np.concatenate(gather)).to(device)
        ends = [np.cumsum([0, *lengths]) for lengths in (q, k)]
        self.cu_q, self.cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ends)
        self.max_q, self.max_k = max(q), max(k)


if __name__ == '__main__':
    from text import show

    show.main()
