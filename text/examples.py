"""Tokenised examples as flat arrays: what tokenise.py makes and data.py packs."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from configurator import UserError


def in_words(left_out):
    """Return (counts, notes) of a Counter of what was left out or changed, in words for the screen.

    counts: one text, 'nothing' if there are none. notes: a list of the reasons that begin with 'note: '."""
    counts, notes = [], []
    # + takes only what was counted at least once
    for reason, count in (+left_out).items():
        if reason.startswith('note: '):
            notes.append(f'{reason} ({count:,} times)')
        else:
            counts.append(f'{count:,} {reason}')
    in_one_text = ', '.join(counts)
    return in_one_text or 'nothing', notes


@dataclass(eq=False)
class Examples:
    """n tokenised examples, each a prompt with one answer or two, as flat arrays. Methods return new Examples."""

    ids: np.ndarray  # all tokens; in an answer, ~id is a token that is only seen, as of a user's later turn
    spans: np.ndarray  # (n, 1 + answers, 2) start and end, in ids, of the prompt and of each answer
    good: np.ndarray  # (n,) whether a single answer is good, for KTO
    uid: np.ndarray  # (n,) a hash of the text, by which flips and fractions are drawn
    left_out: Counter  # what was dropped or cut, and how often
    ref: np.ndarray | None = None  # (n, answers) the reference's log-probs, if they are cached
    margin: np.ndarray | None = None  # (n,) of pairs, for reward.py, if they have any

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        """Return (prompt ids, list of the ids of each answer) of example i."""
        pieces = [self.ids[start:end] for start, end in self.spans[i]]
        prompt = pieces[0]
        answers = pieces[1:]
        return prompt, answers

    @classmethod
    def of(cls, items):
        """Make Examples of (prompt, answers) items of ids, such as samples. Every item has the same number of answers."""
        pieces = []
        for prompt, answers in items:
            pieces += [prompt, *answers]
        widths = [len(piece) for piece in pieces]
        spans = spans_of(widths, parts=len(pieces) // len(items))
        # samples have no label, and none of them is drawn by a hash of its text
        good = np.ones(len(items), bool)
        uid = np.arange(len(items), dtype=np.uint64)
        return cls(np.concatenate(pieces), spans, good, uid, Counter())

    @cached_property
    def widths(self):
        """(n, 1 + answers) tokens of every prompt and answer."""
        return self.spans[..., 1] - self.spans[..., 0]

    @cached_property
    def lengths(self):
        """(n,) tokens of every example, its prompt once."""
        return self.widths.sum(1)

    def longest(self, mixed=False):
        """Return the tokens of the longest prompt and answer together: of one example, or if mixed of any two (mismatched)."""
        # (n,) the longest answer of each example
        longest_answers = self.widths[:, 1:].max(1, initial=0)
        if mixed:
            return self.longest_prompt() + int(longest_answers.max(initial=0))
        together = self.widths[:, 0] + longest_answers
        return int(together.max(initial=0))

    def longest_prompt(self):
        """Return the tokens of the longest prompt."""
        prompts = self.widths[:, 0]
        return int(prompts.max(initial=0))

    def select(self, rows):
        """Return the examples at these rows: a slice, a mask or numbers. The tokens of the others stay in ids."""
        selected = {}
        for name in ('spans', 'good', 'uid', 'ref', 'margin'):
            array = getattr(self, name)
            if array is not None:
                selected[name] = array[rows]
        return replace(self, **selected)

    def flip(self, rate, seed):
        """Swap chosen and rejected (of single answers: good and bad) in this fraction of the examples, drawn by their uid.

        What is flipped at one rate is flipped at any higher one, too. A flipped pair keeps its margin: whoever takes the worse
        answer for the better one is as sure of it."""
        is_flipped = uniform_hash(self.uid, seed) < rate
        n_flipped = int(is_flipped.sum())
        left_out = self.left_out + Counter({'labels flipped': n_flipped})
        is_pairs = self.spans.shape[1] == 3
        # two single answers that were made of a pair have its uid, and flip together
        if not is_pairs:
            return replace(self, good=self.good ^ is_flipped, left_out=left_out)
        # the prompt, then the rejected answer, then the chosen one
        swapped_spans = self.spans[:, [0, 2, 1]]
        spans = np.where(is_flipped[:, None, None], swapped_spans, self.spans)
        ref = self.ref
        if ref is not None:
            ref = np.where(is_flipped[:, None], ref[:, ::-1], ref)
        return replace(self, spans=spans, ref=ref, left_out=left_out)

    def first_answers(self):
        """Return the examples with their first answers alone, for SFT: of a pair, the chosen one."""
        spans = self.spans[:, :2]
        # these two are of pairs
        return replace(self, spans=spans, ref=None, margin=None)

    def control(self, good, bad):
        """Put a token behind every prompt that announces the answer: the id good or the id bad (conditional SFT)."""
        if not len(self):
            return self
        announced = np.where(self.good, good, bad)
        items = []
        for i, token in enumerate(announced):
            prompt, answers = self[i]
            items.append((np.append(prompt, token), answers))
        # all tokens behind the first prompt have moved, so the flat arrays are made anew
        longer = Examples.of(items)
        return replace(self, ids=longer.ids, spans=longer.spans, ref=None, margin=None)

    def keep(self, frac_good, frac_bad, seed):
        """Keep these fractions of the good and of the bad single answers, drawn by hash. Raises UserError if none is left."""
        # the two answers of a pair have one uid; with good added, they are drawn apart
        own_uid = self.uid + self.good.astype(np.uint64)
        fractions = np.where(self.good, frac_good, frac_bad)
        # not with seed, with which flip draws
        is_kept = uniform_hash(own_uid, seed + 1) < fractions
        kept = self.select(is_kept)
        if not len(kept):
            raise UserError('no train examples are left: raise frac_good or frac_bad')
        return kept

    def changes(self):
        """Return (counts, notes) of what was left out, cut or flipped, as in_words gives them."""
        return in_words(self.left_out)

    @cached_property
    def prompt_hashes(self):
        """(n,) a hash of every prompt: those of equal prompts are equal, in this process."""
        hashes = []
        for start, end in self.spans[:, 0]:
            prompt = self.ids[start:end]
            hashes.append(hash(prompt.tobytes()))
        return np.array(hashes, np.int64)

    def mismatched(self, rows, max_length, more):
        """Return Examples of the prompts at these rows, each with an answer to another prompt (for KTO's z).

        rows: those of a step; all examples have one answer. An answer is taken from the next example of the step with another
        prompt; else from the next one of this set, else from the first one of the Examples `more`. If all prompts are the same,
        it is taken from any other example. It is cut so that prompt and answer have max_length tokens."""

        def donors(slot, row):
            """Yield (set, its rows) to take an answer from, the best first; there may be no rows."""
            own_prompt = self.prompt_hashes[row]
            # rolled, so that those behind this example come first, and then those before it
            in_step = np.roll(rows, -slot)[1:]
            has_other_prompt = self.prompt_hashes[in_step] != own_prompt
            yield self, in_step[has_other_prompt]
            all_rows = np.arange(len(self))
            in_set = np.roll(all_rows, -row)[1:]
            has_other_prompt = self.prompt_hashes[in_set] != own_prompt
            yield self, in_set[has_other_prompt]
            yield more, np.flatnonzero(more.prompt_hashes != own_prompt)
            # whatever the prompt
            yield self, in_set
            yield more, np.arange(len(more))

        items = []
        for slot, row in enumerate(rows):
            # the first that has rows
            donor, donor_rows = next((donor, found) for donor, found in donors(slot, row) if len(found))
            prompt, _ = self[row]
            best_row = donor_rows[0]
            _, (answer,) = donor[best_row]
            # a prompt that fills all the room gets one token of it all the same
            room = max(1, max_length - len(prompt))
            items.append((prompt, [answer[:room]]))
        return Examples.of(items)

    def content(self):
        """Return a hash of the tokens that are trained on, with their order, labels and margins; select changes it."""
        digest = hashlib.sha256()
        # widths say where in the tokens each example begins
        for array in (self.widths, self.good, self.margin):
            # a mark stands for margins that are not there
            content = b'-' if array is None else np.ascontiguousarray(array)
            digest.update(content)
        # not all of ids: select leaves the tokens of other examples there
        for start, end in self.spans.reshape(-1, 2).tolist():
            digest.update(self.ids[start:end])
        return digest.hexdigest()


def spans_of(widths, parts):
    """Return (n, parts, 2): start and end of n * parts pieces that lie one behind the other. widths: their tokens."""
    widths = np.asarray(widths, np.int64)
    ends = np.cumsum(widths)
    starts = ends - widths
    # (n * parts, 2), then a row for each example
    spans = np.stack((starts, ends), 1)
    return spans.reshape(-1, parts, 2)


def uniform_hash(uid, seed):
    """Return a number in [0, 1) for each uint64 id. It looks random, and depends on the id and the seed alone (splitmix64)."""
    # 2**64 divided by the golden ratio: the step between seeds that splitmix64 has
    golden_step = 0x9E3779B97F4A7C15
    offset = (seed + 1) * golden_step % 2**64
    mixed = splitmix64(uid + np.uint64(offset))
    return mixed.astype(np.float64) / 2**64


def splitmix64(x):
    """Return uint64s that look random for uint64s such as 0, 1, 2; different ones for different ones (a bijection)."""
    # the shifts and factors are those of splitmix64
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
