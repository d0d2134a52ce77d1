"""Tokenised examples as flat arrays. tokenise.py creates them, data.py packs them into batches."""

import hashlib
import math
import re
from array import array
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from configurator import UserError
from text.chat import THOUGHTLESS

# a plural at the beginning of a reason, perhaps behind an adjective; its group 1 lacks the s
NOUNS = 'answer|conversation|folder|label|margin|message|pair|panel|prompt|row|run|tie|time|tool|verdict'
NOUN = re.compile(rf'^((\w+ )?({NOUNS}))s\b')


def counted(count, noun):
    """Return a count and its noun, given as a plural: '1 pair of answers', '2,000 pairs of answers'."""
    words = NOUN.sub(r'\1', noun) if count == 1 else noun
    return f'{count:,} {words}'


def in_words(left_out):
    """Format the Counter left_out {reason: count} as ('COUNT REASON, ...' or 'nothing', list of 'note: ' reasons)."""
    counts, notes = [], []
    # unary + drops zero counts
    for reason, count in (+left_out).items():
        if reason.startswith('note: '):
            notes.append(f'{reason} ({count:,} times)')
        else:
            # formats.py counts 'tie'; 'same prompt again' needs a noun before it
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
        # placeholders: all labels good, uids 0 to n - 1
        good = np.ones(len(items), bool)
        uid = np.arange(len(items), dtype=np.uint64)
        return cls(np.concatenate(pieces), spans, good, uid, Counter())

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
        arrays = {name: getattr(self, name) for name in ('spans', 'good', 'uid', 'ref', 'margin')}
        # ref and margin may be None
        selected = {name: array[rows] for name, array in arrays.items() if array is not None}
        return replace(self, **selected)

    def flip(self, rate, seed):
        """Swap chosen and rejected (for single answers: good and bad) in a random fraction of the examples."""
        # the draw depends on uid and seed alone, so a higher rate flips a superset; margins stay
        is_flipped = uniform_hash(self.uid, seed) < rate
        left_out = self.left_out + Counter({'labels flipped': int(is_flipped.sum())})
        is_single = self.spans.shape[1] == 2
        # two single answers made from one pair share its uid, so they flip together
        if is_single:
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
        return replace(self, spans=self.spans[:, :2], ref=None, margin=None)

    def control(self, good, bad):
        """Append the token id `good` or `bad` to each prompt, by the label of its answer (conditional SFT)."""
        if not len(self):
            return self
        items = []
        for i, token in enumerate(np.where(self.good, good, bad)):
            prompt, answers = self[i]
            items.append((np.append(prompt, token), answers))
        # rebuild the flat arrays, since the new tokens shift all spans
        longer = Examples.of(items)
        return replace(self, ids=longer.ids, spans=longer.spans, ref=None, margin=None)

    def keep(self, frac_good, frac_bad, seed):
        """Randomly keep these fractions of the good and the bad single answers. Raises UserError if none is left."""
        # the two answers of a pair share a uid; adding the label draws them independently
        own_uid = self.uid + self.good.astype(np.uint64)
        fractions = np.where(self.good, frac_good, frac_bad)
        # seed + 1: flip draws with seed
        is_kept = uniform_hash(own_uid, seed + 1) < fractions
        if not is_kept.any():
            raise UserError('no train examples are left: raise frac_good or frac_bad')
        return self.select(is_kept)

    @cached_property
    def prompt_hashes(self):
        """(n,) hash of each prompt; comparable within this process only."""
        return np.array([hash(self.ids[start:end].tobytes()) for start, end in self.spans[:, 0]], np.int64)

    def mismatched(self, rows, max_length, more):
        """Return the prompts at rows (one step), each with an answer to a different prompt, for KTO's KL estimate z.

        Examples have one answer each. The answer comes from the next example of the step with a different prompt, else of
        self, else of the Examples `more`; if all prompts are equal, from any other example."""

        def donors(place, row):
            """Yield (examples, candidate rows) for the example rows[place], best first; the candidates may be empty."""
            own_prompt = self.prompt_hashes[row]
            # np.roll: the candidates start after this example and wrap around
            in_step = np.roll(rows, -place)[1:]
            yield self, in_step[self.prompt_hashes[in_step] != own_prompt]
            in_self = np.roll(np.arange(len(self)), -row)[1:]
            yield self, in_self[self.prompt_hashes[in_self] != own_prompt]
            yield more, np.flatnonzero(more.prompt_hashes != own_prompt)
            # fallback: any other example
            yield self, in_self
            yield more, np.arange(len(more))

        items = []
        for place, row in enumerate(rows):
            donor, donor_rows = next((examples, found) for examples, found in donors(place, row) if len(found))
            _, (answer,) = donor[donor_rows[0]]
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
        # not all of ids, which may have tokens of examples that select() removed
        for start, end in self.spans.reshape(-1, 2).tolist():
            digest.update(self.ids[start:end])
        return digest.hexdigest()


def spans_of(widths, parts):
    """Return the (n, parts, 2) start and end of n * parts consecutive pieces. widths: (n * parts,) their lengths."""
    widths = np.asarray(widths, np.int64)
    ends = np.cumsum(widths)
    spans = np.stack((ends - widths, ends), 1)
    return spans.reshape(-1, parts, 2)


GOLDEN_STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of splitmix64


def uniform_hash(uid, seed):
    """Return a pseudorandom float in [0, 1) for each uint64 uid, which depends on uid and seed alone (splitmix64)."""
    offset = (seed + 1) * GOLDEN_STEP % 2**64
    mixed = splitmix64(uid + np.uint64(offset))
    return mixed.astype(np.float64) / 2**64


def splitmix64(x):
    """Mix uint64s into pseudorandom uint64s (a bijection), with the constants of splitmix64."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Limits(NamedTuple):
    """The BOS and EOS of a tokenizer, and how to truncate."""

    bos: int | None  # None if the tokenizer adds none
    eos: int
    max_length: int  # tokens of prompt plus answer
    max_prompt_length: int  # tokens of the prompt if the example exceeds max_length
    truncation: str  # which end of the prompt to cut: 'start' or 'end'

    @classmethod
    def of(cls, tokenizer, *lengths):
        """Make the Limits of a tokenizer. lengths: max_length, max_prompt_length, truncation."""
        return cls(bos_of(tokenizer), tokenizer.eos_token_id, *lengths)


def bos_of(tokenizer):
    """Return the BOS id if the tokenizer adds it to texts, else None."""
    bos = tokenizer.bos_token_id
    return bos if tokenizer('a')['input_ids'][:1] == [bos] else None


def add_bos(prompt, limits):
    """Return a prompt's ids with BOS in front, added unless it is there. For a tokenizer without BOS: unchanged, or [EOS] if empty."""
    if limits.bos is None:
        # an empty prompt becomes EOS: the first answer token needs a token to be predicted from
        return prompt or [limits.eos]
    # the chat template may have written BOS already
    return prompt if prompt[:1] == [limits.bos] else [limits.bos, *prompt]


def truncate_prompt(prompt, limits, left_out):
    """Return a prompt's ids truncated to max_prompt_length, keeping BOS; left_out counts truncated prompts."""
    excess = len(prompt) - limits.max_prompt_length
    if excess <= 0:
        return prompt
    left_out['prompts cut'] += 1
    if limits.truncation == 'end':
        return prompt[:-excess]
    num_bos = 0 if limits.bos is None else 1
    return prompt[:num_bos] + prompt[num_bos + excess :]


def fit(prompt, answers, limits, left_out):
    """Return (prompt, answers), lists of ids, with BOS and EOS and truncated to the limits (counted in left_out)."""
    eos = limits.eos
    prompt = add_bos(prompt, limits)
    # the chat template may have written EOS already
    answers = [answer if answer[-1:] == [eos] else [*answer, eos] for answer in answers]
    longest_answer = max(len(answer) for answer in answers)
    if len(prompt) + longest_answer <= limits.max_length:
        return prompt, answers
    prompt = truncate_prompt(prompt, limits, left_out)
    room = limits.max_length - len(prompt)
    for i, answer in enumerate(answers):
        if len(answer) > room:
            left_out['answers cut'] += 1
            answers[i] = [*answer[: room - 1], eos]
    return prompt, answers


def fit_conversation(prompt, segments, limits, left_out):
    """Return (prompt, [answer]), the ids of a conversation truncated to the limits; (prompt, []) if no trained token fits.

    segments: lists of ids after the prompt, alternately trained (assistant) and untrained (user), the last one trained. answer: all
    segments joined, with untrained tokens stored as ~id. left_out: Counter of what was cut."""
    eos = limits.eos
    prompt = add_bos(prompt, limits)
    answer = []
    for i, segment in enumerate(segments):
        is_trained = i % 2 == 0
        answer += segment if is_trained else [~token for token in segment]
    # close with EOS, unless it is there: some templates write a newline after it, so look at the last two tokens
    if eos not in answer[-2:]:
        answer.append(eos)
    if len(prompt) + len(answer) > limits.max_length:
        prompt = truncate_prompt(prompt, limits, left_out)
    room = limits.max_length - len(prompt)
    if len(answer) <= room:
        return prompt, [answer]
    left_out['conversations cut'] += 1
    # drop everything after the last trained token that fits (~id is negative)
    trained = [i for i, token in enumerate(answer[:room]) if token >= 0]
    if not trained:
        left_out['conversations without an answer within max_length'] += 1
        return prompt, []
    answer = answer[: trained[-1] + 1]
    # EOS replaces the last token if there is no room for one more
    if eos not in answer[-2:]:
        answer = [*answer[: room - 1], eos]
    return prompt, [answer]


class Builder:
    """Collects tokenised examples in typed arrays, which take 4 bytes per token instead of a list's 36."""

    def __init__(self, limits):
        self.limits = limits
        self.left_out = Counter()
        self.ids = array('i')
        self.widths = array('q')  # tokens of each prompt and each answer
        self.good = array('b')
        self.uid = array('Q')
        self.margins = array('f')  # NaN: no margin

    def add(self, part, ids):
        """Truncate and add an example, or count why it is unusable. ids: [prompt ids, answer or segment ids, ...]."""
        prompt, *answers = ids
        if part.conversation:
            prompt, answers = fit_conversation(prompt, answers, self.limits, self.left_out)
            # no answer fits (already counted)
            if not answers:
                return
        else:
            if any(answer in ([], [self.limits.eos]) for answer in answers):
                self.left_out['empty answers'] += 1
                return
            prompt, answers = fit(prompt, answers, self.limits, self.left_out)
        # truncation can make two answers equal
        if len(answers) == 2 and answers[0] == answers[1]:
            self.left_out['pairs with equal answers'] += 1
            return
        for piece in (prompt, *answers):
            self.ids.extend(piece)
            self.widths.append(len(piece))
        self.good.append(part.good)
        self.uid.append(part.uid)
        self.margins.append(math.nan if part.margin is None else part.margin)

    def examples(self, task, keep_margins):
        """Return everything added as Examples. keep_margins: keep margins if there are any; missing ones become 0."""
        margin = np.asarray(self.margins)
        is_missing = np.isnan(margin)
        if keep_margins and not is_missing.all():
            self.left_out['pairs without a margin, taken as 0'] += int(is_missing.sum())
            margin = np.nan_to_num(margin)
        else:
            self.left_out['margins, which only reward.py uses'] += int((~is_missing).sum())
            margin = None
        # about answers, which prompts do not use; a Counter ignores del of a missing key
        if task == 'prompts':
            del self.left_out[THOUGHTLESS]
        spans = spans_of(self.widths, parts=3 if task == 'pairs' else 2)
        arrays = np.asarray(self.ids), spans, np.array(self.good, bool), np.asarray(self.uid)
        return Examples(*arrays, +self.left_out, margin=margin)
