"""From examples (sources.py) to microbatches: tokenising, the order of steps, planning and packing. Pure: no ranks inside.

An example is a prompt and its answers (two for a pair, one for SFT and KTO), as token ids; every answer ends with the end
of text. A step's examples are cut into microbatches of at most max_tokens tokens without padding, where both answers of
a pair share one copy of the prompt:  [prompt | chosen | rejected] [prompt | chosen | rejected] ...
"""

import hashlib
import heapq
import json
import os
import queue
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import sources
from configurator import UserError

PLAIN_CHAT = (  # for tokenizers without a chat template: Anthropic's format, as in the original DPO code
    "{% for m in messages %}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' if m.role == 'assistant' else "
    "'\n\n' }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


class Examples:
    """Tokenised examples. ids: all tokens, flat; spans (n, 1 + answers, 2): start and end of the prompt and each answer;
    good (n,): thumbs up (KTO); uid (n,): a hash of the text; left_out: what was dropped or cut, and how often."""

    def __init__(self, ids, spans, good, uid, left_out):
        self.ids, self.spans, self.good, self.uid, self.left_out = ids, spans, good, uid, left_out

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        prompt, *answers = (self.ids[start:end] for start, end in self.spans[i])
        return prompt, answers

    @classmethod
    def of(cls, items):
        """From (prompt, answers) lists of ids, such as samples."""
        edges = np.cumsum([0] + [len(x) for prompt, answers in items for x in (prompt, *answers)])
        spans = np.stack((edges[:-1], edges[1:]), 1).reshape(len(items), -1, 2)
        ids = np.concatenate([x for prompt, answers in items for x in (prompt, *answers)])
        return cls(ids, spans, np.ones(len(items), bool), np.arange(len(items), dtype=np.uint64), Counter())

    @cached_property
    def lengths(self):
        """Tokens of every example, its prompt once."""
        return (self.spans[..., 1] - self.spans[..., 0]).sum(1)

    def select(self, index):
        return Examples(self.ids, self.spans[index], self.good[index], self.uid[index], self.left_out)

    def flip(self, rate, seed):
        """Swap the labels of this fraction of pairs, chosen by a hash of the pair: the sets are nested in the rate."""
        flipped = uniform_hash(self.uid, seed) < rate
        spans, good = self.spans.copy(), self.good.copy()
        if spans.shape[1] == 3:
            spans[flipped, 1:] = spans[flipped, :0:-1]
        else:  # the two answers of a pair have its uid, and flip together
            good[flipped] ^= True
        left_out = self.left_out + Counter({'labels flipped': int(flipped.sum())})
        return Examples(self.ids, spans, good, self.uid, left_out)

    def keep(self, frac_good, frac_bad, seed):
        """Keep this fraction of the good and of the bad single answers, chosen by hash."""
        u = uniform_hash(self.uid + self.good.astype(np.uint64), seed + 1)
        return self.select(u < np.where(self.good, frac_good, frac_bad))

    def mismatched(self, index):
        """Each of these examples' prompts with the answer of the next one that has another prompt (for KTO's z)."""
        spans = self.spans[index].copy()
        prompts = [self.ids[s:e].tobytes() for s, e in spans[:, 0]]
        for i in range(len(index)):
            others = [(i + k) % len(index) for k in range(1, len(index))]
            spans[i, 1] = self.spans[index[next((j for j in others if prompts[j] != prompts[i]), others[0])], 1]
        return Examples(self.ids, spans, self.good[index], self.uid[index], self.left_out)


def uniform_hash(uid, seed):
    """uint64 ids -> numbers in [0, 1) that look random and depend on nothing else but the seed (splitmix64)."""
    x = uid + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).astype(np.float64) / 2**64


# ---- text to tokens ----


def load_examples(data, split, tokenizer, task, *, max_length, max_prompt_length, truncation='start', whole=False,
                  num_turns=1, skip_bad_rows=False, data_fraction=1.0, seed=0, cache=True):  # fmt: skip
    """Tokenised examples of 'hh', 'hh+shp', 'hh:PATH', 'toy', a hub id, a file or folder; cached on disk by content.

    task: 'pairs', 'singles' (KTO, made from pairs if need be) or 'sft'. max_length, max_prompt_length: tokens; where the
    whole is too long, the prompt loses its start (or end: truncation), then answers are cut before their end of text.
    whole: a single file is all for this split. Raises UserError."""
    options = [split, task, max_length, max_prompt_length, truncation, whole, num_turns, skip_bad_rows]
    stamp = [sources.fingerprint(source, split) for source in data.split('+')] if cache else [None]
    tokenizer_stamp = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.get_vocab())
    key = json.dumps([1, stamp, options, tokenizer_stamp, tokenizer.chat_template, tokenizer.eos_token_id])
    folder = Path(os.environ.get('NANOPREF_CACHE', Path.home() / '.cache' / 'nanopref'))
    file = folder / f'tokens-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors'
    examples = None if None in stamp else _read_cache(file)
    if examples is None:
        rows, left_out = [], Counter()
        for source in data.split('+'):
            more, out = sources.load_rows(source, split, whole=whole, num_turns=num_turns, skip_bad_rows=skip_bad_rows)
            rows += more
            left_out += out
        examples = tokenise(rows, tokenizer, task, max_length, max_prompt_length, truncation, left_out)
        if None not in stamp:
            _write_cache(file, examples)
    if not len(examples) and split == 'train':
        raise UserError(
            f'no {split} examples are left in data {data!r}; left out: {dict(examples.left_out) or "nothing"}'
        )
    return examples.select(uniform_hash(examples.uid, seed) < data_fraction) if data_fraction < 1 else examples


def tokenise(rows, tokenizer, task, max_length, max_prompt_length, truncation, left_out):
    """Examples from rows of text or chat; what cannot be used is counted in left_out."""
    parts = [part for row in rows for part in _as_texts(row, task, left_out)]
    if task == 'sft':  # one demonstration a prompt and answer, however many pairs it is in
        parts = list({part[3]: part for part in parts}.values())
    texts = [text for prompt, answers, *_ in parts for text in _render(prompt, answers, tokenizer, left_out)]
    ids = tokenizer(texts, add_special_tokens=False)['input_ids'] if texts else []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and tokenizer('a')['input_ids'][:1] == [bos]
    flat, spans, good, uid = [], [], [], []
    position = total = 0
    for _, answers, thumb, key in parts:
        p, *a = ids[position : position + 1 + len(answers)]
        position += 1 + len(answers)
        if (adds_bos and p[:1] != [bos]) or not p:
            p = [bos if adds_bos else eos, *p]
        a = [x if x[-1:] == [eos] else [*x, eos] for x in a]
        if min(map(len, a)) < 2:
            left_out['empty answers'] += 1
            continue
        if len(p) + max(map(len, a)) > max_length:
            if len(p) > max_prompt_length:
                left_out['prompts cut'] += 1
                p = p[-max_prompt_length:] if truncation == 'start' else p[:max_prompt_length]
            room = max_length - len(p)
            left_out['answers cut'] += sum(len(x) > room for x in a)
            a = [x if len(x) <= room else [*x[: room - 1], eos] for x in a]
        if len(a) == 2 and a[0] == a[1]:
            left_out['pairs with equal answers'] += 1
            continue
        edges = np.cumsum([total, len(p), *map(len, a)])
        total = int(edges[-1])
        flat.extend(p)
        for x in a:
            flat.extend(x)
        spans.append(np.stack((edges[:-1], edges[1:]), 1))
        good.append(thumb)
        uid.append(key)
    spans = np.array(spans, np.int64).reshape(len(spans), -1, 2)
    return Examples(np.array(flat, np.int32), spans, np.array(good, bool), np.array(uid, np.uint64), left_out)


def _as_texts(row, task, left_out):
    """(prompt, answers, good, uid) of a row, as the task needs them; none, counted, where the row has no such thing."""
    prompt = row['prompt']
    if 'chosen' in row and task == 'sft':
        target = row.get('sft', row['chosen'])
        return [(prompt, [target], True, sources.content_hash(prompt, target))]
    if 'chosen' in row:
        answers = [row['chosen'], row['rejected']]
        uid = sources.content_hash(prompt, answers)
        if answers[0] == answers[1]:
            left_out['pairs with equal answers'] += 1
            return []
        return (
            [(prompt, answers, True, uid)]
            if task == 'pairs'
            else [(prompt, [a], a is answers[0], uid) for a in answers]
        )
    if 'response' in row and (task == 'sft' or (task == 'singles' and 'good' in row)):
        answer = row['response']
        return [(prompt, [answer], row.get('good', True), sources.content_hash(prompt, answer))]
    left_out[f'rows without what {task} needs'] += 1
    return []


def _render(prompt, answers, tokenizer, left_out):
    """The texts of prompt and answers: as they are, or through the tokenizer's chat template."""
    if isinstance(prompt, str) and all(isinstance(a, str) for a in answers):
        return [prompt, *answers]
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT
        left_out['note: no chat template in the tokenizer, so chats are written as Human: / Assistant:'] = 1
    as_chat = [[{'role': role, 'content': text}] if isinstance(text, str) else text
               for role, text in [('user', prompt), *(('assistant', a) for a in answers)]]  # fmt: skip
    try:
        start = tokenizer.apply_chat_template(as_chat[0], tokenize=False, add_generation_prompt=True)
        whole = [tokenizer.apply_chat_template(as_chat[0] + a, tokenize=False) for a in as_chat[1:]]
    except Exception as error:  # templates are programs and raise what they like
        raise UserError(f'the chat template refuses an example: {str(error)[:200]}') from None
    if not all(text.startswith(start) for text in whole):
        raise UserError('the chat template writes an answered chat differently from the prompt it asks to continue')
    return [start, *(text[len(start) :].rstrip('\n') for text in whole)]


def _read_cache(file):
    """The Examples in a cache file, or None where there is none or it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, 'np') as f:
            arrays = {k: f.get_tensor(k) for k in ('ids', 'spans', 'good', 'uid')}
            return Examples(*arrays.values(), Counter(json.loads(f.metadata()['left_out'])))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _write_cache(file, examples):
    from safetensors.numpy import save_file

    arrays = {k: np.ascontiguousarray(getattr(examples, k)) for k in ('ids', 'spans', 'good', 'uid')}
    temporary = file.with_suffix(f'.{os.getpid()}')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, temporary, {'left_out': json.dumps(examples.left_out)})
        temporary.rename(file)
    except OSError as error:
        print(f'note: tokens are not cached: {error}')


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
    count = max(1, -(-int(sum(lengths)) // (world * max_tokens)))
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


def microbatches(examples, index, rank, world, max_tokens, *, share_prefix=True, pad=False, device='cpu'):
    """(this rank's Batches of the examples at index, real tokens of all ranks, tokens with padding of all ranks)."""
    answers = examples.spans.shape[1] - 1
    lengths = examples.lengths[index]
    if pad or not share_prefix:
        lengths = lengths + (answers - 1) * (examples.spans[index, 0, 1] - examples.spans[index, 0, 0])
    plans = plan(lengths, world, max_tokens)
    allocated = int(lengths.sum())
    if pad:
        widths = [
            max(len(p) + len(x) for i in m for p, a in [examples[index[i]]] for x in a) for r in plans for m in r if m
        ]
        allocated = sum(answers * len(m) * w for m, w in zip([m for r in plans for m in r if m], widths, strict=True))
    packs = [pack([examples[index[i]] for i in places], places, share_prefix=share_prefix, pad=pad, filler=answers,
                  device=device) for places in plans[rank]]  # fmt: skip
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
    place: list  # of each example in the step; -1: a filler that does not count
    tokens: int  # real ones, for the speed
    position: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    groups: list = field(default_factory=list)
    varlen: object = None

    def sum(self, values):
        """(N,) per-token values -> (A,) sums, in an order that does not depend on what else is in the batch."""
        table = values.new_zeros(len(self.n), int(self.column.max()) + 1)
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
    ids, position, index, target, row, column, n, shape = [], [], [], [], [], [], [], []
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
        if pad:
            ids.append(np.zeros(start + width - first))
        shape.append((p, tuple(map(len, answers))))
        start = start + width if pad else first

    def tensor(parts):
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device, non_blocking=True)

    batch = Batch(tensor(ids)[None], tensor(index), tensor(target), tensor(row), tensor(column),
                  torch.tensor(n, device=device), list(place), sum(map(len, ids)))  # fmt: skip
    if pad:
        batch.ids = batch.ids.view(-1, width)
        ends = torch.tensor([p + a[0] for p, a in shape], device=device)
        batch.mask = (torch.arange(width, device=device) < ends[:, None]).long()
    else:
        batch.position, batch.groups = tensor(position)[None], shape
        batch.varlen = Varlen(shape, device) if torch.device(device).type == 'cuda' else None
    return batch


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
            raise error
        if item is None:
            return
        yield item
