"""A toy world with a known gold reward, so that alignment can be measured on a laptop in a minute.

A prompt asks for a review of a place. An answer has one to four clauses, each about one aspect, such as
    Review of the hotel:  the room was very clean and the bed was dusty .
The gold reward is the mean over clauses of the adjective's value, times 1.5 with "very", minus 1 for an aspect that the
place does not have. An ungrammatical clause scores -2; a missing full stop adds one. A pair is two demonstrations of
mixed quality; the preferred one is drawn from a Bradley-Terry model of the gold reward."""

import base64
import math
import random
import re
import tempfile

# place -> aspects that it has
PLACES = {
    'hotel': 'room bed staff breakfast'.split(),
    'cafe': 'coffee cake staff music'.split(),
    'museum': 'guide garden exhibit ticket'.split(),
    'train': 'seat ticket window staff'.split(),
    'school': 'teacher garden music library'.split(),
    'beach': 'water sand music view'.split(),
}
ASPECTS = sorted({aspect for aspects in PLACES.values() for aspect in aspects})
# adjective -> value
VALUES = {
    'superb': 1.0, 'lovely': 1.0, 'charming': 1.0, 'great': 1.0, 'clean': 0.5, 'nice': 0.5, 'fine': 0.5, 'pleasant': 0.5,
    'plain': -0.5, 'dull': -0.5, 'tired': -0.5, 'dusty': -0.5, 'awful': -1.0, 'horrid': -1.0, 'broken': -1.0, 'rotten': -1.0,
}  # fmt: skip
WORDS = [*'Review of the was very and . :'.split(), *PLACES, *ASPECTS, *VALUES]  # words that are single tokens


def place_of(prompt):
    """Return the place that a prompt names."""
    return prompt.removeprefix('Review of the ').removesuffix(':')


def gold(prompt, answer):
    """Return the gold reward of an answer, in [-2.5, 1.5]: the mean score of its clauses."""
    aspects_of_place = PLACES.get(place_of(prompt), ())
    scores = []
    for aspect, very, adjective in _clauses(answer):
        # no adjective: an ungrammatical clause, or no full stop at the end of the answer
        score = -2.0
        if adjective is not None:
            score = VALUES[adjective] * (1.5 if very else 1.0)
            if aspect not in aspects_of_place:
                score -= 1
        scores.append(score)
    return sum(scores) / len(scores)  # _clauses yields at least one


def well_formed(answer):
    """Return whether every clause is grammatical and the answer ends with a full stop."""
    return all(adjective is not None for _, _, adjective in _clauses(answer))


def _clauses(answer):
    """Yield (aspect, has 'very', adjective) for each clause, or (None, False, None) if it is ungrammatical."""
    body, full_stop, rest = answer.partition(' .')
    for clause in body.split(' and '):
        # 'the ASPECT was ADJECTIVE' or 'the ASPECT was very ADJECTIVE'
        match = re.fullmatch(r'\s*the\s+(\S+)\s+was(\s+very)?\s+(\S+)\s*', clause)
        if match and match[1] in ASPECTS and match[3] in VALUES:
            yield match[1], bool(match[2]), match[3]
        else:
            yield None, False, None
    # a missing full stop, or text after it, counts as another ungrammatical clause
    if not full_stop or rest:
        yield None, False, None


def demonstration(prompt, rng):
    """Return a random answer, more or less positive and sometimes off topic. rng: a random.Random."""
    place = place_of(prompt)
    # probability of a positive adjective, drawn once per answer
    taste = rng.random()
    clauses = []
    for _ in range(rng.randint(1, 4)):
        is_off_topic = rng.random() < 0.3
        aspect = rng.choice(ASPECTS if is_off_topic else PLACES[place])
        # keep good adjectives with probability taste, bad ones with 1 - taste, and choose one of them
        candidates = [word for word, value in VALUES.items() if (value > 0) == (rng.random() < taste)]
        adjective = rng.choice(candidates or list(VALUES))
        very = ' very' if rng.random() < 0.25 else ''
        clauses.append(f'the {aspect} was{very} {adjective}')
    return ' ' + ' and '.join(clauses) + ' .'


def pairs(split, n=6000):
    """Yield n pairs {'prompt', 'chosen', 'rejected'}, always the same for a split ('train' or 'test')."""
    # a string seed is reproducible on all machines
    rng = random.Random(f'toy {split}')
    for _ in range(n):
        prompt = f'Review of the {rng.choice(sorted(PLACES))}:'
        first = demonstration(prompt, rng)
        second = demonstration(prompt, rng)
        # Bradley-Terry: P(first is chosen) = sigmoid(3 * (gold reward of first - gold reward of second))
        odds = math.exp(3 * (gold(prompt, first) - gold(prompt, second)))
        first_is_chosen = rng.random() < odds / (1 + odds)
        chosen, rejected = (first, second) if first_is_chosen else (second, first)
        yield {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


def tokenizer():
    """Return a transformers tokenizer with one token for each ' WORD' in WORDS and for each of the 256 bytes."""
    import transformers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    # byte-level fallback: any text can be encoded
    ranks = {bytes([i]): i for i in range(256)}
    # BPE merges two tokens at a time, so every prefix of ' WORD' must be a token, too (the space already is)
    for word in WORDS:
        for end in range(2, len(word) + 2):
            ranks.setdefault(f' {word}'.encode()[:end], len(ranks))
    eos = {'<|endoftext|>': len(ranks)}
    pattern = r' ?[A-Za-z]+| ?[^A-Za-z\s]|\s'
    # the converter needs a tiktoken file, with lines of a token in base64 and its rank
    with tempfile.NamedTemporaryFile('wb', suffix='.tiktoken') as file:
        file.writelines(base64.b64encode(token) + b' %d\n' % rank for token, rank in ranks.items())
        file.flush()
        converter = TikTokenConverter(file.name, pattern=pattern, extra_special_tokens=eos)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token='<|endoftext|>')


def model_config():
    """Return the LlamaConfig of a tiny model (0.1 M parameters without embeddings)."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
