"""Sampling answers from a model. Each answer has its own random seed, so it does not depend on the rest of its batch."""

import contextlib
import itertools
import json
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from configurator import UserError
from hf import sharded
from hf.attention import padded_attention
from hf.lora import adapters_off
from hf.parts import core
from runtime import guard, ranks
from runtime.files import append, say_once
from text.chat import decode_answer
from text.examples import GOLDEN_STEP, Examples, splitmix64

# a refill takes as long as sampling one or two tokens
REFILL_SHARE = 4  # rows of ended answers are refilled with new prompts once 1 / REFILL_SHARE of all rows have ended
REFILL_AFTER = 8  # but not before so many tokens


def sample(model, tokenizer, prompts, seeds, **settings):
    """Sample an answer to every prompt from a sharded model, as generate() does, split over all ranks. Every rank returns them all."""
    # deal the prompts out to the ranks by length: similar lengths per batch, equal work per rank
    rank, world_size = ranks.data_rank()
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    indices = longest_first[rank::world_size]
    prompts_here = [prompts[i] for i in indices]
    seeds_here = [seeds[i] for i in indices]
    with sharded.unsharded(model):
        answers_here = generate(model, tokenizer, prompts_here, seeds_here, **settings)
    answers = {}  # index of the prompt -> answer
    for answers_of_rank in ranks.gather_objects(dict(zip(indices, answers_here, strict=True))):
        answers |= answers_of_rank
    return [answers[i] for i in range(len(prompts))]


def sample_held_out(run, models, examples, seen, measure=None, n_written=None, **settings):
    """Sample answers of models, {name: sharded model}, to the prompts of held-out Examples, and append them to out_dir/samples.jsonl.

    run: a training.Run, which has trained on `seen` examples. measure(Examples of n answers): returns {column: (n,) tensor},
    more fields of the file, or is None. n_written: how many answers of each model are written, None for all. settings: options of
    generate(). Returns {name: result of measure}. After a stop signal, which cuts answers short, writes nothing and returns {}."""
    tokenizer = run.tokenizer
    prompts = [prompt for prompt, _ in examples]
    # the same at every evaluation; the factor exceeds the number of prompts, so that runs of another --seed share none
    first_seed = run.config.seed * 1_000_003
    seeds = range(first_seed, first_seed + len(prompts))
    is_from_policy = settings.get('temperature', 1) == settings.get('top_p', 1) == 1
    if measure and not is_from_policy:
        why = "at this temperature and top_p the samples are not the policy's own"
        say_once(f'note: kl_eval/samples is a mean log-ratio and no KL: {why}')
    measured = {}  # stays empty without measure
    lines = []  # of samples.jsonl
    for name, model in sorted(models.items()):
        # the reference may be the policy itself, without its adapters; the policy keeps them: adapters_off(None) does nothing
        with adapters_off(model if name == 'reference' else None):
            answers = sample(model, tokenizer, prompts, seeds, keep_end=True, **settings)
        if guard.stop_asked():
            return {}
        if measure and prompts:
            pairs = [(prompt, [answer]) for prompt, answer in zip(prompts, answers, strict=True)]
            measured[name] = measure(Examples.of(pairs))
        stop = stop_tokens(model, tokenizer)
        for row in _rows_of(answers[:n_written], prompts, stop, tokenizer, measured.get(name, {})):
            lines.append(json.dumps({'examples': seen, 'generator': name} | row) + '\n')
    ranks.on_rank_0(lambda: append(f'{run.config.out_dir}/samples.jsonl', ''.join(lines)))
    return measured


def _rows_of(answers, prompts, stop, tokenizer, columns):
    """Yield a row of samples.jsonl, a dict, for each answer (token ids). columns: more fields, name -> (answers,) tensor."""
    for i, answer in enumerate(answers):
        row = {'sample': i, 'prompt': tokenizer.decode(prompts[i])}
        row['response'] = decode_answer(without_end(answer, stop), prompts[i], tokenizer)
        row['tokens'] = len(answer)
        yield row | {name: round(values[i].item(), 6) for name, values in columns.items()}


class _Answer(NamedTuple):
    """An answer that generate() samples."""

    prompt: list  # token ids
    seed: int
    tokens: list  # token ids so far


@torch.no_grad()
def generate(
    model, tokenizer, prompts, seeds, *, max_new_tokens, temperature=1.0, top_p=1.0, keep_end=False, max_rows=None
):
    """Sample an answer to each prompt in this process. Return lists of token ids.

    prompts: lists of token ids. seeds: one int per answer. temperature: 0 is greedy. keep_end: keep the stop token at the end of
    an answer. max_rows: batch size, None for all prompts; rows of ended answers are refilled with waiting prompts. A stop signal
    cuts all answers short. Under FSDP, call it inside sharded.unsharded()."""
    inner = core(model)
    stop = stop_tokens(model, tokenizer)
    n_rows = max_rows or len(prompts)
    refill = can_refill(inner)
    answers = [_Answer(prompt, seed, tokens=[]) for prompt, seed in zip(prompts, seeds, strict=True)]
    waiting = answers  # not started
    active = []  # in progress, a row of the batch each
    cache = None  # KV cache of those in progress, and the row in it of each
    cache_rows = []
    with _generation_mode(model, eos_token_id=sorted(stop), pad_token_id=tokenizer.eos_token_id):
        while waiting or active:
            # start new answers in the free rows, behind those in the cache
            n_free = n_rows - len(active)
            active += waiting[:n_free]
            waiting = waiting[n_free:]
            sequences = [[*answer.prompt, *answer.tokens] for answer in active]
            if refill:
                cache = _cache_for(inner, sequences, cache, cache_rows)
            # sample until `enough` rows have ended: without refill, all of them
            n_sampled = [len(answer.tokens) for answer in active]
            enough = max(1, len(active) // REFILL_SHARE) if refill else len(active)
            criteria = _stopping_criteria(inner, stop, max_new_tokens, n_sampled, enough)
            processors = _processors([answer.seed for answer in active], n_sampled, temperature, top_p)
            n_left = max_new_tokens - min(n_sampled)
            continuations = _generate(inner, sequences, cache, n_left, criteria, processors)
            # go on with the rows that have not ended
            cache_rows = []
            for row, tokens in enumerate(continuations):
                if _extend(active[row].tokens, tokens, stop, max_new_tokens):
                    cache_rows.append(row)
            active = [active[row] for row in cache_rows]
            if _stop_asked():
                break
    return [answer.tokens if keep_end else without_end(answer.tokens, stop) for answer in answers]


def _extend(answer, tokens, stop, max_new_tokens):
    """Append tokens to an answer in place, up to its stop token or max_new_tokens. Return whether the answer goes on."""
    for token in tokens[: max_new_tokens - len(answer)]:
        answer.append(token)
        if token in stop:  # behind a stop token is only padding
            return False
    return len(answer) < max_new_tokens


def _stop_asked():
    """Return whether a signal asks this process to stop. False in tensor-parallel groups, whose ranks must stay in step."""
    return guard.stop_asked_here() and ranks.tp_size() == 1


@contextlib.contextmanager
def _generation_mode(model, **settings):
    """Within the block, the model has padded attention and a GenerationConfig of these settings."""
    inner = core(model)
    config_before = inner.generation_config  # that of the model may have a repetition penalty etc.
    inner.generation_config = transformers.GenerationConfig(do_sample=False, **settings)
    try:
        with padded_attention(model):
            yield
    finally:
        inner.generation_config = config_before


def _generate(inner, sequences, cache, max_new_tokens, criteria=None, processors=None):
    """Continue sequences (lists of token ids) with transformers' greedy generate(). Return only the new ids, padded at the end.

    cache: as from _cache_for(), an empty one to fill, or None. criteria, processors: of transformers, or None."""
    n_cached = 0 if cache is None else cache.get_seq_length()
    # pad on the left, as the cache is padded. n_cached + 1: generate() needs at least one column that is not cached
    width = max(n_cached + 1, *map(len, sequences))
    pad_id = inner.generation_config.pad_token_id
    padded = [[pad_id] * (width - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    # generate() wants the ids of the columns that are not cached, but the mask of all columns
    ids = torch.tensor(padded, device=inner.device)[:, n_cached:]
    mask = torch.tensor(mask, device=inner.device)
    options = {'max_new_tokens': max_new_tokens, 'stopping_criteria': criteria, 'logits_processor': processors}
    if cache is not None:
        options['past_key_values'] = cache
    # synced_gpus=False: every rank generates independently
    out = inner.generate(ids, attention_mask=mask, synced_gpus=False, **options)
    return out[:, ids.shape[1] :].tolist()


def stop_tokens(model, tokenizer):
    """Return the set of token ids that end an answer: the tokenizer's end of sequence and those of the model's generation config."""
    eos = core(model).generation_config.eos_token_id  # an id, a list of ids, or None
    ids = eos if isinstance(eos, list) else [eos]
    return {tokenizer.eos_token_id, *ids} - {None}


def without_end(answer, stop):
    """Return the token ids of an answer, without the last one if it is in the set stop."""
    return answer[:-1] if answer and answer[-1] in stop else answer


def can_refill(inner):
    """Return whether _cache_for() can merge this model's caches: of keys and values of all tokens or of a window."""
    # Mamba holds a state that mixes all tokens
    if inner._is_stateful or not inner._supports_default_dynamic_cache():
        return False
    # Llama 4 attends in chunks that it counts from a row's first column, padding included
    if getattr(inner.config, 'attention_chunk_size', None):
        return False
    empty_cache = transformers.DynamicCache(config=inner.config)
    layer_types = {type(layer) for layer in empty_cache.layers}
    return layer_types.issubset({DynamicLayer, DynamicSlidingWindowLayer})


def _cache_for(inner, sequences, old_cache, old_rows):
    """Return a KV cache with a row for each sequence (a list of token ids): of all its tokens but the last, padded on the left.

    old_rows: rows of old_cache that hold this already for the first sequences. For all others it is computed here."""
    caches = [(old_cache, old_rows)] if old_rows else []  # (a cache, its rows that go into the result, in order)
    new = sequences[len(old_rows) :]
    if new:
        # equal ones, for several answers to a prompt, are computed once
        row_of = {}  # sequence without its last token -> row of new_cache
        rows = [row_of.setdefault(tuple(sequence[:-1]), len(row_of)) for sequence in new]
        new_cache = transformers.DynamicCache(config=inner.config)
        # called to fill new_cache: the token that it generates is thrown away
        _generate(inner, list(row_of), new_cache, max_new_tokens=1)
        caches.append((new_cache, rows))
    # at least one column, of padding if all sequences have one token
    return _merge(caches, width=max(1, max(map(len, sequences)) - 1))


def _merge(caches, width):
    """Put rows of KV caches, [(cache, its rows)], below one another into the first cache, padded on the left to width columns."""
    merged, _ = caches[0]
    for i, layer in enumerate(merged.layers):
        # sliding-window layers hold fewer columns
        n_held = max(cache.layers[i].keys.shape[2] for cache, _ in caches)
        n_columns = min(width, n_held)
        for name in ('keys', 'values'):
            padded = []
            for cache, rows in caches:
                states = getattr(cache.layers[i], name)[rows]  # (rows, heads, columns, head_dim)
                # add columns of padding on the left; where n_pad is negative, this removes some
                n_pad = n_columns - states.shape[2]
                padded.append(F.pad(states, (0, 0, n_pad, 0)))
            setattr(layer, name, torch.cat(padded))
        # sliding-window layers read it: the number of columns so far, with those that have left the window
        layer.cumulative_length = width
    return merged


def _stopping_criteria(inner, stop, max_new_tokens, n_sampled, enough):
    """Return the StoppingCriteriaList that ends a row at a stop token or at max_new_tokens, and all at a signal or once `enough` end."""
    stop = torch.tensor(sorted(stop), device=inner.device)
    # (rows,); n_sampled: tokens of each row's answer so far
    n_left = max_new_tokens - torch.tensor(n_sampled, device=inner.device)
    step_numbers = itertools.count(1)

    def has_ended(ids, scores, **unused):  # called after every step; returns (rows,) bool
        step = next(step_numbers)
        # an ended row goes on with its padding, a stop token
        ended = torch.isin(ids[:, -1], stop) | (n_left <= step)
        if step >= REFILL_AFTER:
            ended |= ended.sum() >= enough  # all rows, if so many have ended
        return ended | _stop_asked()

    return transformers.StoppingCriteriaList([has_ended])


def _processors(seeds, n_sampled, temperature, top_p):
    """Return the LogitsProcessorList by which greedy decoding samples. n_sampled: the number of each row's tokens so far."""
    if temperature == 0:
        return transformers.LogitsProcessorList([_checked])
    # temperature before top_p, as in transformers
    processors = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        processors.append(transformers.TopPLogitsWarper(top_p))
    processors.append(_Draw(seeds, n_sampled))
    return processors


def _checked(ids, scores):
    """Logits processor: return scores as they are. UserError if one is NaN: the argmax would mean nothing."""
    if scores.isnan().any():
        raise UserError("the model's scores are not numbers: its weights are broken, or too large for its type")
    return scores


class _Draw(transformers.LogitsProcessor):
    """Draw a token for every row and mask all others, so that greedy decoding returns the sample.

    Gumbel-max: the argmax of scores + Gumbel noise is a sample from their softmax, and rounding changes it only at a near tie.
    The vocabulary of V tokens is cut into about sqrt(V) sections. A section is drawn by its total probability, then a token
    of it, which takes 2 sqrt(V) noises instead of V. Each noise is a hash of the row's seed and a counter."""

    def __init__(self, seeds, n_sampled):
        self.seeds = seeds  # read by tests; they may be negative or exceed 64 bits
        self.keys = splitmix64(np.array([seed % 2**64 for seed in seeds], np.uint64))  # (rows,)
        self.step = np.array(n_sampled, np.uint64)  # (rows,) tokens sampled so far

    def __call__(self, ids, scores):
        """Return scores (rows, vocab_size), changed in place: 0 for each row's drawn token, -inf for all others."""
        n_rows, vocab_size = scores.shape
        # view the vocabulary as `side` sections of `side` tokens, padded with impossible tokens
        side = math.isqrt(vocab_size - 1) + 1  # sqrt, rounded up
        n_added = side * side - vocab_size
        padded = F.pad(scores, (0, n_added), value=-math.inf)
        sections = padded.view(n_rows, side, side)
        noise = self.noise(2 * side).to(scores.device, non_blocking=True)
        section_noise, token_noise = noise.split(side, 1)  # (rows, side) each
        self.step += 1
        # draw a section for each row, then a token of this section
        section_scores = _checked(ids, sections.logsumexp(2))  # (rows, side)
        section = (section_scores + section_noise).argmax(1)  # (rows,)
        token_scores = sections[torch.arange(n_rows, device=section.device), section]  # (rows, side)
        token_in_section = (token_scores + token_noise).argmax(1)  # (rows,)
        drawn = section * side + token_in_section
        scores.fill_(-math.inf)
        return scores.scatter_(1, drawn[:, None], 0.0)

    def noise(self, n):
        """Return (rows, n) float32 Gumbel noise for this step. Step s of a row uses the counters s * n to s * n + n - 1."""
        counters = self.step[:, None] * n + np.arange(n, dtype=np.uint64)  # (rows, n)
        states = self.keys[:, None] + counters * GOLDEN_STEP
        # keep 53 of the 64 bits, as many as a float64 has; + 0.5 avoids log(0)
        upper_bits = splitmix64(states) >> 11
        uniform = (upper_bits + 0.5) / 2**53  # in (0, 1)
        noise = torch.from_numpy(-np.log(-np.log(uniform))).float()
        # pinned memory makes the copy to the GPU asynchronous
        return noise.pin_memory() if torch.cuda.is_available() else noise
