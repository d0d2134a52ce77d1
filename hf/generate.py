"""Sampling answers from a model. Each answer has its own random seed, so it does not depend on the rest of its batch."""

import contextlib
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import fsdp
from configurator import UserError
from hf.attention import padded_attention
from hf.lora import adapters_off
from model import core
from runtime import guard, ranks
from runtime.files import append
from text.examples import GOLDEN_STEP, splitmix64

# Rows of ended answers are refilled with new prompts once 1 / REFILL_SHARE of the rows have ended, and at least REFILL_AFTER
# tokens after the last refill: a refill takes as long as one or two tokens.
REFILL_SHARE = 4
REFILL_AFTER = 8


def sample(model, tokenizer, prompts, seeds, **settings):
    """Sample an answer to every prompt from a sharded model, split over all ranks. Return all answers (token ids) on every rank.

    prompts: lists of token ids. seeds: one int per prompt. settings: keyword arguments of generate()."""
    # deal the prompts out by length: similar lengths per batch, equal work per rank
    rank, world_size = ranks.data_rank()
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    indices = longest_first[rank::world_size]
    own_prompts = [prompts[i] for i in indices]
    own_seeds = [seeds[i] for i in indices]
    with fsdp.unsharded(model):
        own_answers = generate(model, tokenizer, own_prompts, own_seeds, **settings)

    answers = {}
    for rank_answers in ranks.gather_objects(dict(zip(indices, own_answers, strict=True))):
        answers |= rank_answers
    return [answers.get(i) for i in range(len(prompts))]


def write(file, tokenizer, prompts, answers, examples_seen, columns=None):
    """Append answers to a samples.jsonl.

    prompts: lists of token ids. answers: tuples (model name, prompt index, token ids). examples_seen: number of examples trained
    on, a field of each line. columns: {(model name, prompt index): dict of more fields}."""
    lines = []
    for name, i, answer in answers:
        row = {'examples': examples_seen, 'generator': name, 'sample': i}
        row['prompt'] = tokenizer.decode(prompts[i])
        row['response'] = tokenizer.decode(answer)
        if columns:
            row |= columns[name, i]
        lines.append(json.dumps(row) + '\n')
    append(file, ''.join(lines))


@guard.memory_for('sampled answers do not fit beside the model; lower n_eval_model_samples or max_new_tokens')
def sample_held_out(run, models, n, seen, measure=None, **settings):
    """Sample answers of several models to the first n held-out prompts, and append them to out_dir/samples.jsonl.

    run: a training.Run. models: name -> sharded model; 'reference' answers with its adapters off. seen: examples trained on.
    measure(prompts, answers) -> {column: (n,) tensor}, more fields for samples.jsonl. settings: keyword arguments of generate().
    Returns {model name: result of measure}, empty without measure. Raises UserError if memory runs out."""
    # kto has two examples per pair; the good ones have each prompt once
    good = run.held_out.select(run.held_out.good)
    prompts = [prompt for prompt, _ in good.select(slice(n))]
    # the same seeds at every evaluation; the factor exceeds the number of prompts, so different --seed never overlap
    first_seed = run.config.seed * 1_000_003
    seeds = range(first_seed, first_seed + len(prompts))
    measured = {}
    columns = {}
    to_write = []
    for name, model in sorted(models.items()):
        # adapters_off(None) is a no-op
        with adapters_off(model if name == 'reference' else None):
            answers = sample(model, run.tokenizer, prompts, seeds, keep_end=True, **settings)
        if measure and prompts:
            measured[name] = measure(prompts, answers)
        stop = stop_tokens(model, run.tokenizer)
        for i, answer in enumerate(answers):
            to_write.append((name, i, without_end(answer, stop)))
            columns[name, i] = {'tokens': len(answer)}
            for column, values in measured.get(name, {}).items():
                columns[name, i][column] = round(values[i].item(), 6)
    file = f'{run.config.out_dir}/samples.jsonl'
    ranks.on_one_rank(lambda: write(file, run.tokenizer, prompts, to_write, seen, columns))
    return measured


@torch.no_grad()
def generate(
    model, tokenizer, prompts, seeds, *, max_new_tokens, temperature=1.0, top_p=1.0, keep_end=False, rows=None
):
    """Sample an answer to each prompt in this process. Return lists of token ids.

    prompts: lists of token ids. seeds: one int per answer. temperature: 0 is greedy. keep_end: keep the stop token at the end of
    an answer. rows: maximum batch size, None for all; rows of ended answers are refilled with waiting prompts. A stop signal
    truncates all answers. Under FSDP, call it inside fsdp.unsharded()."""
    inner = core(model)
    stop = stop_tokens(model, tokenizer)
    n_rows = rows or len(prompts)
    refill = can_refill(inner)
    answers = [[] for _ in prompts]
    # indices of answers: not started, and in progress
    waiting = list(range(len(prompts)))
    active = []
    # KV cache, and the row in it of each active answer
    cache, cache_rows = None, []
    with _generation_mode(model, eos_token_id=sorted(stop), pad_token_id=tokenizer.eos_token_id):
        while waiting or active:
            # start new answers in the free rows
            n_free = n_rows - len(active)
            new = waiting[:n_free]
            waiting = waiting[n_free:]
            active += new
            texts = [[*prompts[i], *answers[i]] for i in active]
            if refill:
                cache = _cache_for(inner, texts, cache, cache_rows)

            # sample until enough rows have ended: without refill, all of them
            n_sampled = [len(answers[i]) for i in active]
            enough = max(1, len(active) // REFILL_SHARE) if refill else len(active)
            criteria = _stopping_criteria(inner, stop, max_new_tokens, n_sampled, enough)
            processors = _processors([seeds[i] for i in active], n_sampled, temperature, top_p)
            n_left = max_new_tokens - min(n_sampled)
            continuations = _generate(inner, texts, cache, n_left, criteria, processors)

            # keep the rows that have not ended
            cache_rows = []
            for row, tokens in enumerate(continuations):
                if _extend(answers[active[row]], tokens, stop, max_new_tokens):
                    cache_rows.append(row)
            active = [active[row] for row in cache_rows]
            if _stop_asked():
                break
    return answers if keep_end else [without_end(answer, stop) for answer in answers]


def _extend(answer, tokens, stop, max_new_tokens):
    """Append tokens to an answer in place, up to its stop token or max_new_tokens. Return whether the answer goes on."""
    for token in tokens[: max_new_tokens - len(answer)]:
        answer.append(token)
        # the rest is padding
        if token in stop:
            return False
    return len(answer) < max_new_tokens


def _stop_asked():
    """Return whether a signal asks this process to stop. False in tensor-parallel groups, whose ranks must stay in step."""
    return guard.asked_here() and not ranks.tp_size() > 1


@contextlib.contextmanager
def _generation_mode(model, **settings):
    """Within the block, keep the model in eval mode with padded attention and a GenerationConfig of these settings."""
    inner = core(model)
    # hide the model's own config, which may have a repetition penalty etc.
    own_config = inner.generation_config
    inner.generation_config = transformers.GenerationConfig(do_sample=False, **settings)
    # eval mode, because activation checkpointing in training mode disables the KV cache
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with padded_attention(model):
            yield
    finally:
        inner.generation_config = own_config
        for module in in_training:
            module.training = True


def _generate(inner, texts, cache, n, criteria=None, processors=None):
    """Continue texts (lists of token ids) by up to n tokens with transformers' greedy generate(). Return new ids, padded.

    cache: a Cache of all but the last token of each text, an empty Cache to fill, or None. criteria, processors: a
    StoppingCriteriaList and a LogitsProcessorList."""
    n_cached = 0 if cache is None else cache.get_seq_length()
    width = max(n_cached + 1, *map(len, texts))
    # left padding, as in the cache
    pad_id = inner.generation_config.pad_token_id
    ids, mask = [], []
    for text in texts:
        n_pad = width - len(text)
        ids.append([pad_id] * n_pad + list(text))
        mask.append([0] * n_pad + [1] * len(text))
    # the mask covers the cached columns, the ids do not
    ids = torch.tensor(ids, device=inner.device)[:, n_cached:]
    mask = torch.tensor(mask, device=inner.device)
    options = {'max_new_tokens': n, 'stopping_criteria': criteria, 'logits_processor': processors}
    if cache is not None:
        options['past_key_values'] = cache
    # synced_gpus=False: every rank generates independently
    out = inner.generate(ids, attention_mask=mask, synced_gpus=False, **options)
    # generate() repeats its input columns
    return out[:, ids.shape[1] :].tolist()


def stop_tokens(model, tokenizer):
    """Return the set of token ids that end an answer: the tokenizer's end of text and those of the model's generation config."""
    eos = core(model).generation_config.eos_token_id  # an id, a list of ids, or None
    ids = eos if isinstance(eos, list) else [eos]
    return {tokenizer.eos_token_id, *ids} - {None}


def without_end(answer, stop):
    """Return the token ids of an answer, without the last one if it is in the set stop."""
    return answer[:-1] if answer and answer[-1] in stop else answer


def can_refill(inner):
    """Return whether finished rows of a model's cache can be replaced: dropped, and merged with rows of another cache.

    True for per-token keys and values, also with sliding windows. False for states that mix tokens (Mamba) and for chunks that
    count from a row's first column, padding included (Llama 4)."""
    if inner._is_stateful or not inner._supports_default_dynamic_cache():
        return False
    if getattr(inner.config, 'attention_chunk_size', None):
        return False
    cache = transformers.DynamicCache(config=inner.config)
    layer_types = {type(layer) for layer in cache.layers}
    return layer_types.issubset({DynamicLayer, DynamicSlidingWindowLayer})


def _cache_for(inner, texts, cache, cache_rows):
    """Return a cache of all but the last token of each text: cache[cache_rows] for the first texts, prefilled for the others."""
    caches = [(cache, cache_rows)] if cache_rows else []
    new = texts[len(cache_rows) :]
    if new:
        # equal texts share a row
        row_of = {}  # text without its last token -> row
        rows = [row_of.setdefault(tuple(text[:-1]), len(row_of)) for text in new]
        prefilled = transformers.DynamicCache(config=inner.config)
        # fills the cache; the sampled token is discarded
        _generate(inner, list(row_of), prefilled, 1)
        caches.append((prefilled, rows))
    longest = max(map(len, texts))
    # at least one column, of padding if all texts have one token
    return _merge(caches, width=max(1, longest - 1))


def _merge(caches, width):
    """Merge rows of several caches, right-aligned, into the first cache, in place, and return it.

    caches: tuples (cache, rows to keep). width: columns of the merged cache; only padding is cut off."""
    merged, _ = caches[0]
    for i, layer in enumerate(merged.layers):
        # sliding-window layers hold fewer columns
        longest = max(cache.layers[i].keys.shape[2] for cache, _ in caches)
        size = min(width, longest)
        for name in ('keys', 'values'):
            padded = []
            for cache, rows in caches:
                states = getattr(cache.layers[i], name)[rows]  # (rows, heads, tokens, head_dim)
                # pad on the left; a negative number crops
                n_pad = size - states.shape[2]
                padded.append(F.pad(states, (0, 0, n_pad, 0)))
            setattr(layer, name, torch.cat(padded))
        layer.cumulative_length = width
    return merged


def _stopping_criteria(inner, stop, max_new_tokens, n_sampled, enough):
    """Return the StoppingCriteriaList that ends a row at a stop token, or at max_new_tokens, n_sampled earlier ones included.

    All rows end together once `enough` rows have ended and REFILL_AFTER tokens were sampled, or when a signal arrives."""
    stop = torch.tensor(sorted(stop), device=inner.device)
    n_left = max_new_tokens - torch.tensor(n_sampled, device=inner.device)
    sampled = []  # (rows,) tokens of each step

    # called after every step; returns (rows,) bool
    def has_ended(ids, scores, **unused):
        sampled.append(ids[:, -1])
        met_stop = torch.isin(torch.stack(sampled), stop).any(0)
        ended = met_stop | (n_left <= len(sampled))
        if len(sampled) >= REFILL_AFTER:
            ended |= ended.sum() >= enough
        return ended | _stop_asked()

    return transformers.StoppingCriteriaList([has_ended])


def _processors(seeds, n_sampled, temperature, top_p):
    """Return the LogitsProcessorList that makes greedy decoding sample, given each row's seed and number of tokens so far."""
    processors = transformers.LogitsProcessorList()
    # 0 is greedy; temperature before top_p, as in transformers
    if temperature > 0:
        processors.append(transformers.TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(transformers.TopPLogitsWarper(top_p))
        processors.append(_Draw(seeds, n_sampled))
    return processors


class _Draw(transformers.LogitsProcessor):
    """Draw a token for every row and mask all others, so that greedy decoding returns the sample.

    Gumbel-max: the argmax of scores + Gumbel noise is a sample from their softmax, and rounding changes it only at a near tie.
    Draw one of about sqrt(V) blocks of tokens by its total probability, then a token in it: that takes 2 sqrt(V) noises instead
    of V, the vocabulary size. Each noise is a hash of the row's seed and a counter."""

    def __init__(self, seeds, n_sampled):
        # seeds may be negative or exceed 64 bits
        unsigned = [seed % 2**64 for seed in seeds]
        self.seeds = seeds  # read by tests
        self.keys = splitmix64(np.array(unsigned, np.uint64))  # (rows,)
        self.step = np.array(n_sampled, np.uint64)  # (rows,) tokens sampled so far

    def __call__(self, ids, scores):
        """Return scores (rows, vocab_size), changed in place: 0 for each row's drawn token, -inf for all others."""
        n_rows, vocab_size = scores.shape
        # view the vocabulary as side x side, padded with impossible tokens
        side = math.isqrt(vocab_size - 1) + 1  # sqrt, rounded up
        blocks = F.pad(scores, (0, side * side - vocab_size), value=-math.inf).view(n_rows, side, side)
        noise = self.noise(2 * side).to(scores.device, non_blocking=True)
        block_noise, token_noise = noise.split(side, 1)
        self.step += np.uint64(1)

        block_scores = blocks.logsumexp(2)
        if block_scores.isnan().any():
            raise UserError("the model's scores are not numbers: its weights are broken, or too large for its type")
        block = (block_scores + block_noise).argmax(1)
        token_scores = blocks[torch.arange(n_rows, device=block.device), block]
        token = (token_scores + token_noise).argmax(1)
        drawn = block * side + token
        scores.fill_(-math.inf)
        return scores.scatter_(1, drawn[:, None], 0.0)

    def noise(self, n):
        """Return (rows, n) float32 Gumbel noise for this step; a row never reuses a counter in later steps."""
        first = self.step * np.uint64(n)
        counters = first[:, None] + np.arange(n, dtype=np.uint64)
        states = self.keys[:, None] + counters * np.uint64(GOLDEN_STEP)
        # 53 bits fit a float64; + 0.5 avoids log(0)
        upper_bits = splitmix64(states) >> np.uint64(11)
        uniform = (upper_bits + 0.5) / 2**53
        noise = torch.from_numpy(-np.log(-np.log(uniform))).float()
        # pinned memory makes the copy to the GPU asynchronous
        return noise.pin_memory() if torch.cuda.is_available() else noise
