"""Tokenised examples as flat arrays: what tokenise.py makes and data.py packs. Flips and fractions are by hash."""

import hashlib
from collections import Counter
from functools import cached_property

import numpy as np

from configurator import UserError


class Examples:
    """Tokenised examples. ids: all tokens, flat; spans (n, 1 + answers, 2): start and end of the prompt and each answer;
    good (n,): thumbs up (KTO); uid (n,): a hash of the text; left_out: what was dropped or cut, and how often;
    ref (n, answers): the reference's log-probs, where they are cached; margin (n,): of pairs, for reward.py, if they have
    any."""

    def __init__(self, ids, spans, good, uid, left_out, ref=None, margin=None):
        self.ids, self.spans, self.good, self.uid, self.left_out = ids, spans, good, uid, left_out
        self.ref, self.margin = ref, margin

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

    def longest(self, mixed=False):
        """Tokens of the longest prompt with one of its answers; mixed: with the longest answer of all."""
        lengths = self.spans[..., 1] - self.spans[..., 0]
        prompts, answers = lengths[:, 0], lengths[:, 1:].max(1, initial=0)
        return int(self.longest_prompt() + answers.max(initial=0) if mixed else (prompts + answers).max(initial=0))

    def longest_prompt(self):
        return int((self.spans[:, 0, 1] - self.spans[:, 0, 0]).max(initial=0))

    def select(self, index):
        ref, margin = (None if x is None else x[index] for x in (self.ref, self.margin))
        return Examples(self.ids, self.spans[index], self.good[index], self.uid[index], self.left_out, ref, margin)

    def flip(self, rate, seed):
        """Swap the labels of this fraction of pairs, chosen by a hash of the pair: the sets are nested in the rate.

        A flipped pair keeps its margin: whoever takes the worse answer for the better one is as sure of it."""
        flipped = uniform_hash(self.uid, seed) < rate
        spans, good, ref = self.spans.copy(), self.good.copy(), self.ref
        if spans.shape[1] == 3:
            spans[flipped, 1:] = spans[flipped, :0:-1]
            ref = ref if ref is None else np.where(flipped[:, None], ref[:, ::-1], ref)
        else:  # the two answers of a pair have its uid, and flip together
            good[flipped] ^= True
        left_out = self.left_out + Counter({'labels flipped': int(flipped.sum())})
        return Examples(self.ids, spans, good, self.uid, left_out, ref, self.margin)

    def first_answers(self):
        """The chosen answers alone, for SFT."""
        return Examples(self.ids, self.spans[:, :2], self.good, self.uid, self.left_out)

    def control(self, good, bad):
        """Every prompt with a token at its end that says what follows: the id good, or the id bad (conditional SFT)."""
        ends = np.where(self.good, good, bad)
        items = (
            Examples.of([(np.append(self[i][0], end), self[i][1]) for i, end in enumerate(ends)]) if len(self) else self
        )
        return Examples(items.ids, items.spans, self.good, self.uid, self.left_out)

    def keep(self, frac_good, frac_bad, seed):
        """Keep this fraction of the good and of the bad single answers, chosen by hash."""
        u = uniform_hash(self.uid + self.good.astype(np.uint64), seed + 1)
        kept = self.select(u < np.where(self.good, frac_good, frac_bad))
        if not len(kept):
            raise UserError('no train examples are left: raise frac_good or frac_bad')
        return kept

    def content(self):
        """A hash of the tokens that are trained on, their order, labels and margins; what select has left out does not count."""
        digest = hashlib.sha256()
        for array in (self.spans[..., 1] - self.spans[..., 0], self.good, self.margin):
            digest.update(b'-' if array is None else np.ascontiguousarray(array))
        for start, end in self.spans.reshape(-1, 2).tolist():
            digest.update(self.ids[start:end])
        return digest.hexdigest()

    def changes(self):
        """What was left out, cut or flipped, for the screen."""
        return dict(+self.left_out) or 'nothing'

    @cached_property
    def prompts(self):
        """A hash of every example's prompt, (n,): equal prompts have equal ones in this process."""
        return np.array([hash(self.ids[start:end].tobytes()) for start, end in self.spans[:, 0]], np.int64)

    def mismatched(self, index, max_length, more=None):
        """Each of these examples' prompts with an answer to another prompt (for KTO's z), cut to max_length tokens in all.

        It is that of the next example of the step which has another prompt; where all of the step share theirs, of the next
        one of this set, then of the first one of the set `more`, if any. Where there is one prompt only: of another example."""
        more = self if more is None else more
        items = []
        for place, i in enumerate(index):
            # those behind it in the step, then from the step's beginning on
            source, step = self, np.roll(index, -place)[1:]
            others = step[self.prompts[step] != self.prompts[i]]
            if not len(others):
                rest = np.roll(np.arange(len(self)), -i)[1:]
                others = rest[self.prompts[rest] != self.prompts[i]]
            if not len(others):
                source, others = more, np.flatnonzero(more.prompts != self.prompts[i])
            # one prompt everywhere
            if not len(others):
                source, others = (self, rest) if len(rest) else (more, np.arange(len(more)))
            # an answer keeps one token at least
            prompt, (answer,) = self[i][0], source[others[0]][1]
            items.append((prompt, [answer[: max(1, max_length - len(prompt))]]))
        return Examples.of(items)


def uniform_hash(uid, seed):
    """uint64 ids -> numbers in [0, 1) that look random and depend on nothing else but the seed (splitmix64)."""
    return splitmix64(uid + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)).astype(np.float64) / 2**64


def splitmix64(x):
    """uint64 -> uint64 that looks random: a bijection that counters can go into."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
