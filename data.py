"""From tokenised examples (examples.py) to microbatches: the order of steps, planning and packing. No text, no model.

An example is a prompt and its answers (two for a pair, one for SFT and KTO), as token ids. A step's examples are cut into
microbatches of at most max_tokens tokens without padding, where both answers of a pair share one copy of the prompt:
    [prompt | chosen | rejected] [prompt | chosen | rejected] ...
"""

import heapq
import queue
import threading
from dataclasses import dataclass, field

import numpy as np
import torch

import guard
from examples import Examples

# ---- which examples, when ----


def steps(n, batch_size, total, seed, start=0, shuffle=True):
    """Yield (first, indices) of every step from example count start to total: epochs without replacement, end to end."""
    epoch, order = -1, None
    for first in range(start, total, batch_size):
        index = []
        for j in range(first, min(first + batch_size, total)):
            if j // n != epoch:
                epoch = j // n
                order = np.random.default_rng((seed, epoch)).permutation(n) if shuffle else np.arange(n)
            index.append(order[j % n])
        yield first, np.array(index)


def plan(lengths, world, max_tokens):
    """Cut a step into microbatches: [rank][microbatch] -> places in the step, every rank as many microbatches.

    A microbatch holds at most max_tokens tokens, or one example that is longer. Places appear once; a microbatch may be
    empty where there are fewer examples than microbatches. Longest first into the emptiest: nearly equal loads."""
    count = max(1, -(-sum(min(int(n), max_tokens) for n in lengths) // (world * max_tokens)))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while True:
        bins = [(0, b, []) for b in range(world * count)]
        fits = True
        for i in order:
            load, b, places = heapq.heappop(bins)
            fits = fits and (not places or load + lengths[i] <= max_tokens)
            places.append(i)
            heapq.heappush(bins, (load + int(lengths[i]), b, places))
        if fits:
            break
        count += 1
    bins.sort(key=lambda item: (-item[0], item[1]))
    return [[sorted(bins[m * world + rank][2]) for m in range(count)] for rank in range(world)]


def plan_padded(widths, world, max_tokens):
    """As plan, for padded batches, where every example is as wide as the widest beside it: similar widths side by side."""
    bins, order = [], sorted(range(len(widths)), key=lambda i: -widths[i])
    for i in order:
        if bins and (len(bins[-1]) + 1) * widths[bins[-1][0]] <= max_tokens:
            bins[-1].append(i)
        else:
            bins.append([i])
    while len(bins) % world or not bins:  # every rank as many: the fullest is split in two
        fullest = max(bins, key=len, default=[])
        bins.append(fullest[len(fullest) // 2 :] if len(fullest) > 1 else [])
        del fullest[len(fullest) - len(bins[-1]) :]
    bins.sort(key=lambda places: -len(places) * widths[places[0]] if places else 0)
    return [[sorted(places) for places in bins[rank::world]] for rank in range(world)]


def microbatches(examples: Examples, index, rank, world, max_tokens, *, share_prefix=True, pad=False, device='cpu'):
    """(this rank's Batches of the examples at index, real tokens of all ranks, tokens with padding of all ranks)."""
    answers = examples.spans.shape[1] - 1
    lengths = examples.lengths[index]
    if pad or not share_prefix:
        lengths = lengths + (answers - 1) * (examples.spans[index, 0, 1] - examples.spans[index, 0, 0])
    if pad:
        each = examples.spans[index, :, 1] - examples.spans[index, :, 0]
        widths = answers * (each[:, 0] + each[:, 1:].max(1))
        plans = plan_padded(widths, world, max_tokens)
        allocated = sum(len(places) * int(widths[places].max()) for plan in plans for places in plan if places)
    else:
        plans, allocated = plan(lengths, world, max_tokens), int(lengths.sum())
    packs = []
    for places in plans[rank]:
        items = [examples[index[i]] for i in places]
        packs.append(pack(items, places, share_prefix=share_prefix, pad=pad, filler=answers, device=device))
        if examples.ref is not None:
            ref = examples.ref[index[places]].reshape(-1) if places else np.zeros(answers, np.float32)
            packs[-1].ref = torch.from_numpy(np.ascontiguousarray(ref)).to(device, non_blocking=True)
    return packs, int(lengths.sum()), allocated


# ---- microbatches ----


@dataclass
class Batch:
    """A packed microbatch of A answers with N predicted tokens. Packed: ids and position (1, T), groups of (prompt length,
    answer lengths). Padded: ids and mask (A, T), no groups."""

    ids: torch.Tensor
    index: torch.Tensor  # (N,) place, in the flattened ids, of the token before each answer token
    target: torch.Tensor  # (N,) the answer tokens
    row: torch.Tensor  # (N,) which answer
    column: torch.Tensor  # (N,) which token of it
    n: torch.Tensor  # (A,) answer lengths
    last: torch.Tensor  # (A,) place, in the flattened ids, of the last token of each answer
    place: list  # of each example in the step; -1: a filler that does not count
    longest: int  # tokens of the longest answer
    position: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    groups: list = field(default_factory=list)
    varlen: object = None
    ref: torch.Tensor | None = None  # (A,) the reference's log-probs, where they are cached

    def sum(self, values):
        """(N,) per-token values -> (A,) sums, in an order that does not depend on what else is in the batch."""
        table = values.new_zeros(len(self.n), self.longest)
        return table.index_put((self.row, self.column), values).sum(1)


def pack(examples, place, *, share_prefix=True, pad=False, filler=2, device='cpu'):
    """A Batch of (prompt, answers) examples. pad: one padded row an answer; share_prefix=False: a prompt for each answer.

    An empty list makes a filler example with this many answers, so that its rank can take part in the collectives."""
    if not examples:
        examples, place = [(np.array([0]), [np.array([0])] * filler)], [-1]
    if pad or not share_prefix:
        groups = [(prompt, [answer]) for prompt, answers in examples for answer in answers]
    else:
        groups = examples
    width = max(len(p) + len(a[0]) for p, a in groups) if pad else 0
    ids, position, index, target, row, column, n, last, shape = [], [], [], [], [], [], [], [], []
    start = 0
    for prompt, answers in groups:
        p = len(prompt)
        ids.append(prompt)
        position.append(np.arange(p))
        first = start + p
        for answer in answers:
            k = len(answer)
            ids.append(answer)
            position.append(np.arange(p, p + k))
            index.append(np.concatenate(([start + p - 1], np.arange(first, first + k - 1))))
            target.append(answer)
            row.append(np.full(k, len(n)))
            column.append(np.arange(k))
            n.append(k)
            first += k
            last.append(first - 1)
        if pad:
            ids.append(np.zeros(start + width - first))
        shape.append((p, tuple(map(len, answers))))
        start = start + width if pad else first

    def tensor(parts):
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device, non_blocking=True)

    batch = Batch(tensor(ids)[None], tensor(index), tensor(target), tensor(row), tensor(column),
                  torch.tensor(n, device=device), torch.tensor(last, device=device), list(place), max(n))  # fmt: skip
    if pad:
        batch.ids = batch.ids.view(-1, width)
        ends = torch.tensor([p + a[0] for p, a in shape], device=device)
        batch.mask = (torch.arange(width, device=device) < ends[:, None]).long()
    else:
        batch.position, batch.groups = tensor(position)[None], shape
        batch.varlen = Varlen(shape, device) if torch.device(device).type == 'cuda' else None
    return batch


def pack_probe(examples, device):
    """The first and the longest example, packed and padded: to see whether a model gives both the same log-probs."""
    two = [examples[0], examples[int(examples.lengths.argmax())]]
    return [pack(two, [0, 1], pad=pad, device=device) for pad in (False, True)]


class Varlen:
    """What the CUDA kernel needs: queries in row order; keys gathered so that each answer has its prompt before it."""

    def __init__(self, groups, device):
        gather, q, k, start = [], [], [], 0
        for p, answers in groups:
            first = start + p
            for i, n in enumerate(answers):
                gather += [np.arange(start, start + p), np.arange(first, first + n)]
                q.append(n if i else p + n)
                k.append(p + n)
                first += n
            start = first
        self.gather = torch.from_numpy(np.concatenate(gather)).to(device)
        self.cu_q, self.cu_k = (torch.tensor([0, *np.cumsum(x)], dtype=torch.int32, device=device) for x in (q, k))
        self.max_q, self.max_k = max(q), max(k)


def prefetch(iterator, depth=2):
    """The items of an iterator, prepared ahead in a thread; its exceptions are raised here."""
    items = queue.Queue(depth)

    def work():
        try:
            for item in iterator:
                items.put((item, None))
            items.put((None, None))
        except BaseException as error:
            items.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        item, error = items.get()
        if error is not None:
            raise guard.explained(error, 'the next batches do not fit beside this one; lower max_tokens')
        if item is None:
            return
        yield item
