"""Tokenised examples as flat arrays: what tokenise.py makes and data.py packs."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from configurator import UserError


def in_words(left_out):
    """A Counter of what was left out or changed, as words for the screen: (its counts, or 'nothing'; the notes in it)."""
    counts, notes = [], []
    for what, n in (+left_out).items():
        if what.startswith('note: '):
            notes.append(f'{what} ({n:,} times)')
        else:
            counts.append(f'{n:,} {what}')
    return ', '.join(counts) or 'nothing', notes


@dataclass(eq=False)
class Examples:
    """Tokenised examples, as flat arrays. Flips and fractions are chosen by a hash of the text alone."""

    ids: np.ndarray  # all tokens; ~id: of an answer, only seen and not trained on, as the user's later turns
    spans: np.ndarray  # (n, 1 + answers, 2) start and end, in ids, of the prompt and of each answer
    good: np.ndarray  # (n,) thumbs up, for KTO
    uid: np.ndarray  # (n,) a hash of the text
    left_out: Counter  # what was dropped or cut, and how often
    ref: np.ndarray | None = None  # (n, answers) the reference's log-probs, where they are cached
    margin: np.ndarray | None = None  # (n,) of pairs, for reward.py, if they have any

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        """(prompt ids, list of the answers' ids) of example i."""
        prompt, *answers = (self.ids[start:end] for start, end in self.spans[i])
        return prompt, answers

    @classmethod
    def of(cls, items):
        """From n (prompt, answers) of ids, such as samples; every item has as many answers."""
        parts = [part for prompt, answers in items for part in (prompt, *answers)]
        spans = spans_of([len(part) for part in parts], len(parts) // len(items))
        uid = np.arange(len(items), dtype=np.uint64)
        return cls(np.concatenate(parts), spans, np.ones(len(items), bool), uid, Counter())

    def with_(self, **changes):
        """The same examples with some of their arrays replaced."""
        return replace(self, **changes)

    @cached_property
    def widths(self):
        """(n, 1 + answers) tokens of every prompt and answer."""
        return self.spans[..., 1] - self.spans[..., 0]

    @cached_property
    def lengths(self):
        """(n,) tokens of every example, its prompt once."""
        return self.widths.sum(1)

    def longest(self, mixed=False):
        """Tokens of the longest prompt with one of its answers; mixed: of the longest prompt and the longest answer of all."""
        answers = self.widths[:, 1:].max(1, initial=0)  # (n,) the longest of each example
        if mixed:
            return self.longest_prompt() + int(answers.max(initial=0))
        return int((self.widths[:, 0] + answers).max(initial=0))

    def longest_prompt(self):
        """Tokens of the longest prompt."""
        return int(self.widths[:, 0].max(initial=0))

    def select(self, rows):
        """The examples at these rows: a slice, a mask or numbers."""
        columns = {name: getattr(self, name) for name in ('spans', 'good', 'uid', 'ref', 'margin')}
        chosen = {name: column[rows] for name, column in columns.items() if column is not None}
        return self.with_(**chosen)

    def flip(self, rate, seed):
        """Swap the labels of this fraction of pairs, chosen by a hash of the pair: the sets are nested in the rate.

        A flipped pair keeps its margin: whoever takes the worse answer for the better one is as sure of it."""
        flipped = uniform_hash(self.uid, seed) < rate
        changes = {'left_out': self.left_out + Counter({'labels flipped': int(flipped.sum())})}
        # a pair swaps its answers; the two single answers made of a pair have its uid, and flip together
        if self.spans.shape[1] == 3:
            swapped = self.spans[:, [0, 2, 1]]
            changes['spans'] = np.where(flipped[:, None, None], swapped, self.spans)
            if self.ref is not None:
                changes['ref'] = np.where(flipped[:, None], self.ref[:, ::-1], self.ref)
        else:
            changes['good'] = self.good ^ flipped
        return self.with_(**changes)

    def first_answers(self):
        """The chosen answers alone, for SFT."""
        return self.with_(spans=self.spans[:, :2], ref=None, margin=None)

    def control(self, good, bad):
        """Put a token at the end of every prompt that says which answer follows: the id good, or the id bad (conditional SFT)."""
        if not len(self):
            return self
        ends = np.where(self.good, good, bad)
        items = [(np.append(prompt, end), answers) for (prompt, answers), end in zip(self, ends, strict=True)]
        longer = Examples.of(items)
        return self.with_(ids=longer.ids, spans=longer.spans, ref=None, margin=None)

    def keep(self, frac_good, frac_bad, seed):
        """Keep these fractions of the good and of the bad single answers, chosen by hash."""
        # the two answers of a pair, which have one uid, are drawn apart
        own_uid = self.uid + self.good.astype(np.uint64)
        fractions = np.where(self.good, frac_good, frac_bad)
        kept = self.select(uniform_hash(own_uid, seed + 1) < fractions)
        if not len(kept):
            raise UserError('no train examples are left: raise frac_good or frac_bad')
        return kept

    def changes(self):
        """What was left out, cut or flipped, as in_words has it."""
        return in_words(self.left_out)

    @cached_property
    def prompts(self):
        """(n,) hash of every example's prompt: equal prompts have equal ones in this process."""
        return np.array([hash(self.ids[start:end].tobytes()) for start, end in self.spans[:, 0]], np.int64)

    def mismatched(self, rows, max_length, more):
        """Each of these examples' prompts with an answer to another prompt (for KTO's z), cut to max_length tokens in all.

        It is that of the next example of the step which has another prompt; where all of the step share theirs, of the next
        one of this set, then of the first one of the set `more`. Where there is one prompt only: of another example."""

        def candidates(slot, row):
            """(a set, rows of it to take an answer from), the best first."""
            own = self.prompts[row]
            # the others of the step, and of this set: those behind it, then those before it
            step = np.roll(rows, -slot)[1:]
            yield self, step[self.prompts[step] != own]
            rest = np.roll(np.arange(len(self)), -row)[1:]
            yield self, rest[self.prompts[rest] != own]
            yield more, np.flatnonzero(more.prompts != own)
            yield self, rest
            yield more, np.arange(len(more))

        items = []
        for slot, row in enumerate(rows):
            source, others = next(found for found in candidates(slot, row) if len(found[1]))
            prompt, _ = self[row]
            _, (answer,) = source[others[0]]
            # the answer gets the room that the prompt leaves, and one token at least
            items.append((prompt, [answer[: max(1, max_length - len(prompt))]]))
        return Examples.of(items)

    def content(self):
        """A hash of the tokens that are trained on, their order, labels and margins; what select has left out does not count."""
        digest = hashlib.sha256()
        for array in (self.widths, self.good, self.margin):
            digest.update(b'-' if array is None else np.ascontiguousarray(array))
        for start, end in self.spans.reshape(-1, 2).tolist():
            digest.update(self.ids[start:end])
        return digest.hexdigest()


def spans_of(widths, parts):
    """(n, parts, 2) start and end of n * parts pieces of these widths that lie one behind the other."""
    edges = np.concatenate(([0], np.cumsum(np.asarray(widths, np.int64))))
    return np.stack((edges[:-1], edges[1:]), 1).reshape(-1, parts, 2)


def uniform_hash(uid, seed):
    """uint64 ids -> numbers in [0, 1) that look random and depend on nothing else but the seed (splitmix64)."""
    step = np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    return splitmix64(uid + step).astype(np.float64) / 2**64


def splitmix64(x):
    """uint64 -> uint64 that looks random: a bijection that counters can go into."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
