"""Tokenised examples as flat arrays. tokenise.py creates them, data.py packs them into batches."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from configurator import UserError

# a plural at the beginning of a reason, perhaps behind an adjective; its group 1 lacks the s
NOUNS = 'answer|conversation|example|folder|label|margin|message|pair|panel|prompt|rank|row|run|single|tie|time|tool|verdict'
NOUN = re.compile(rf'^((\w+ )?({NOUNS}))s\b')


def counted(count, noun):
    """Return a count and its noun, given as a plural: '1 pair of answers', '2,000 pairs of answers'."""
    # \1: the first group of NOUN, which lacks the s
    words = NOUN.sub(r'\1', noun) if count == 1 else noun
    return f'{count:,} {words}'


def in_words(left_out):
    """Return a Counter of reasons as a text, and a list of those that are notes.

    {'rows cut': 1, 'tie': 2, 'note: no chats': 3} -> ('1 row cut, 2 ties', ['note: no chats (3 times)']); {} -> ('nothing', [])."""
    counts = []
    notes = []
    # unary + drops zero counts
    for reason, count in (+left_out).items():
        if reason.startswith('note: '):
            notes.append(f'{reason} ({count:,} times)' if count > 1 else reason)
        else:
            # a number needs a plural behind it: '2 ties', '2 times the same prompt again'
            noun = 'ties' if reason == 'tie' else re.sub('^same', 'times the same', reason)
            counts.append(counted(count, noun))
    return ', '.join(counts) or 'nothing', notes


@dataclass(eq=False)
class Examples:
    """n tokenised prompts with one or two answers each. Methods that change something return new Examples."""

    ids: np.ndarray  # tokens of all prompts and answers; ~id in an answer is not trained on (later user turns)
    spans: np.ndarray  # (n, 1 + answers, 2) start and end in ids: prompt, then each answer
    good: np.ndarray  # (n,) bool label of single answers, for KTO
    uid: np.ndarray  # (n,) uint64 hash of the text; seeds random draws
    left_out: Counter  # reason -> number of examples dropped or truncated
    ref: np.ndarray | None = None  # (n, answers) cached log-probs of the reference model
    margin: np.ndarray | None = None  # (n,) optional margins of pairs, for reward.py

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        """Return (prompt ids, [answer ids, ...]) of example i."""
        prompt, *answers = [self.ids[start:end] for start, end in self.spans[i]]
        return prompt, answers

    @classmethod
    def of(cls, items):
        """Make Examples from [(prompt ids, [answer ids, ...])]; all items need the same number of answers."""
        pieces = [piece for prompt, answers in items for piece in (prompt, *answers)]
        spans = spans_of([len(piece) for piece in pieces], parts=len(pieces) // len(items))
        # placeholders: all labels good, the example's number for a hash
        good = np.ones(len(items), bool)
        uid = np.arange(len(items), dtype=np.uint64)
        return cls(np.concatenate(pieces), spans, good, uid, left_out=Counter())

    @cached_property
    def widths(self):
        """(n, 1 + answers) number of tokens of each prompt and answer."""
        return self.spans[..., 1] - self.spans[..., 0]

    @cached_property
    def lengths(self):
        """(n,) number of tokens of each example: prompt plus all answers."""
        return self.widths.sum(1)

    def longest(self, mixed=False):
        """Return the maximum length of prompt plus answer: of the same example, or (mixed) of any two examples."""
        prompts = self.widths[:, 0]
        answers = self.widths[:, 1:].max(1, initial=0)
        if mixed:
            return int(prompts.max(initial=0) + answers.max(initial=0))
        return int((prompts + answers).max(initial=0))

    def longest_prompt(self):
        """Return the number of tokens of the longest prompt."""
        return int(self.widths[:, 0].max(initial=0))

    def select(self, rows):
        """Return the examples at rows (slice, mask or indices); ids keeps the tokens of all examples."""
        columns = {name: getattr(self, name) for name in 'spans good uid ref margin'.split()}
        # ref and margin may be None
        return replace(self, **{name: column[rows] for name, column in columns.items() if column is not None})

    def flip(self, rate, seed):
        """Swap chosen and rejected (for single answers: good and bad) in a random fraction of the examples."""
        # the draw depends on uid and seed alone, so a higher rate flips a superset; margins stay
        is_flipped = uniform_hash(self.uid, seed) < rate
        left_out = self.left_out + Counter({'labels flipped': int(is_flipped.sum())})
        # single answers; two that were made from one pair share its uid, so they flip together
        if self.spans.shape[1] == 2:
            return replace(self, good=self.good ^ is_flipped, left_out=left_out)
        # columns: prompt, chosen, rejected
        swapped_spans = self.spans[:, [0, 2, 1]]
        spans = np.where(is_flipped[:, None, None], swapped_spans, self.spans)
        ref = self.ref
        if ref is not None:
            ref = np.where(is_flipped[:, None], ref[:, ::-1], ref)
        return replace(self, spans=spans, ref=ref, left_out=left_out)

    def first_answers(self):
        """Return the prompts with their first answers only (the chosen ones of pairs), for SFT."""
        return replace(self, spans=self.spans[:, :2])

    def control(self, good, bad):
        """Append the token id `good` or `bad` to each prompt, by the label of its only answer (conditional SFT)."""
        if not len(self):
            return self  # Examples.of needs an item
        items = []
        for i, token in enumerate(np.where(self.good, good, bad)):
            prompt, answers = self[i]
            items.append((np.append(prompt, token), answers))
        # the new tokens shift all spans; labels and hashes stay
        longer = Examples.of(items)
        return replace(self, ids=longer.ids, spans=longer.spans)

    def keep(self, frac_good, frac_bad, seed):
        """Randomly keep these fractions of the good and the bad single answers. Raises UserError if none is left."""
        # the two answers of a pair share a uid; adding the label draws them independently
        own_uid = self.uid + self.good.astype(np.uint64)
        fractions = np.where(self.good, frac_good, frac_bad)
        # seed + 1: flip draws with seed
        return self.drawn(uniform_hash(own_uid, seed + 1) < fractions, 'frac_good or frac_bad')

    def drawn(self, is_drawn, option):
        """Return the examples of a mask that follows from an option, and count the others. Raises UserError if none is left."""
        if not is_drawn.any():
            raise UserError(f'no train examples are left: raise {option}')
        not_drawn = Counter({f'examples not drawn, by {option}': int((~is_drawn).sum())})
        return replace(self.select(is_drawn), left_out=self.left_out + not_drawn)

    @cached_property
    def prompt_hashes(self):
        """(n,) hash of each prompt; comparable within this process only."""
        prompts = [self.ids[start:end] for start, end in self.spans[:, 0]]
        return np.array([hash(ids.tobytes()) for ids in prompts], np.int64)

    def mismatched(self, rows, max_length, more):
        """Return the prompts at rows (those of one step), each with an answer to a different prompt, for KTO's KL estimate z.

        Examples have one answer each. The answer comes from the next example of the step with a different prompt, else of
        self, else of the Examples `more`; if all prompts are equal, from any other example."""

        def donors(place):
            """Yield (Examples, rows of them that may give the answer for rows[place], perhaps none), the best first."""
            row = rows[place]
            own_prompt = self.prompt_hashes[row]
            # 1. with another prompt, of this step. np.roll begins with the example itself, which [1:] drops, then the next one
            step_others = np.roll(rows, -place)[1:]
            yield self, step_others[self.prompt_hashes[step_others] != own_prompt]
            # 2. with another prompt, of self, from the next one on; 3. of more
            others = np.roll(np.arange(len(self)), -row)[1:]
            yield self, others[self.prompt_hashes[others] != own_prompt]
            yield more, np.flatnonzero(more.prompt_hashes != own_prompt)
            # 4. all prompts are equal: any other example
            yield self, others
            yield more, np.arange(len(more))

        items = []
        for place, row in enumerate(rows):
            donor, donor_row = next((donor, found[0]) for donor, found in donors(place) if len(found))
            _, (answer,) = donor[donor_row]
            prompt, _ = self[row]
            # truncate to max_length, but keep at least one token
            room = max(1, max_length - len(prompt))
            items.append((prompt, [answer[:room]]))
        return Examples.of(items)

    def content(self):
        """Return a hash of the examples: tokens, order, labels and margins."""
        digest = hashlib.sha256()
        # the widths separate the examples; b'-' stands for no margins
        for column in (self.widths, self.good, self.margin):
            digest.update(b'-' if column is None else np.ascontiguousarray(column))
        # stretches of pieces that follow one another, and not all of ids: select() may have removed examples
        pieces = self.spans.reshape(-1, 2)
        is_apart = pieces[1:, 0] != pieces[:-1, 1]
        begins = np.flatnonzero(is_apart) + 1
        for stretch in np.split(pieces, begins):
            if len(stretch):
                start = stretch[0, 0]
                end = stretch[-1, 1]
                digest.update(self.ids[start:end])
        return digest.hexdigest()


def spans_of(widths, parts):
    """Return the (n, parts, 2) start and end of n * parts consecutive pieces. widths: (n * parts,) their lengths."""
    widths = np.asarray(widths, np.int64)
    ends = np.cumsum(widths)
    return np.stack((ends - widths, ends), 1).reshape(-1, parts, 2)


GOLDEN_STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of splitmix64


def uniform_hash(uid, seed):
    """Return a pseudorandom float in [0, 1] for each uint64 uid, which depends on uid and seed alone."""
    # number `seed` of the generator splitmix64 that starts at uid; it takes a step before its number 0
    offset = (seed + 1) * GOLDEN_STEP % 2**64
    return splitmix64(uid + np.uint64(offset)).astype(np.float64) / 2**64


def splitmix64(x):
    """Mix uint64s into pseudorandom uint64s (a bijection), with the constants of splitmix64."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bos_of(tokenizer):
    """Return the BOS id if the tokenizer adds it to texts, else None."""
    bos = tokenizer.bos_token_id
    return bos if tokenizer('a')['input_ids'][:1] == [bos] else None
