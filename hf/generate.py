"""Sampling answers from a model. The noise of an answer comes from its own seed, so no answer depends on its batch."""

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
from hf.lora import adapters_off
from model import core, padded_attention
from runtime import guard
from runtime.files import append
from text.examples import splitmix64

# Rows of ended answers are given to the next prompts when one row in REFILL_SHARE has ended, and at least REFILL_AFTER tokens were
# sampled since the last time: doing so costs as much time as one or two tokens.
REFILL_SHARE = 4
REFILL_AFTER = 8

# ---- for the scripts ----


def sample(model, tokenizer, prompts, seeds, **settings):
    """Sample an answer to every prompt from a sharded model. All ranks call this together, and share the work.

    prompts: lists of ids; seeds: a number for each. settings: as in generate. Returns, on every rank, the answers to all prompts
    in their order, as lists of ids."""
    # dealt out by length, so that prompts of similar length go side by side and all ranks have as much to do
    rank, world = fsdp.data_rank()
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    numbers = longest_first[rank::world]
    own_prompts = [prompts[i] for i in numbers]
    own_seeds = [seeds[i] for i in numbers]
    with fsdp.unsharded(model):
        own_answers = generate(model, tokenizer, own_prompts, own_seeds, **settings)

    # number of the prompt -> answer, of all ranks
    own = dict(zip(numbers, own_answers, strict=True))
    answers = {}
    for answers_of_rank in fsdp.gather_objects(own):
        answers |= answers_of_rank
    return [answers.get(i) for i in range(len(prompts))]


def write(file, tokenizer, prompts, answers, examples_seen, columns=None):
    """Append answers to a samples.jsonl, a line of json for each.

    prompts: lists of ids. answers: (the model's name, number of the prompt, ids of the answer) each. examples_seen: how many the
    model was trained on, for the lines. columns: {(name, number): dict of what else that answer's line says}."""
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

    run: a training.Run. models: name -> sharded model; the one called 'reference' answers without its adapters, if it has any.
    seen: examples trained on so far, for the file. measure(prompts, answers) -> {column: (n,) numbers of the answers}: columns that
    each line of the file gets beside 'tokens', the answer's length with its end. settings: as in generate.
    Returns {name of the model: what measure returned}, which is empty without measure. All ranks together. Raises UserError."""
    # kto makes two examples of a pair, with one prompt: those with the good answer have each prompt once
    good = run.held_out.select(run.held_out.good)
    prompts = [prompt for prompt, _ in good.select(slice(n))]
    # the same seeds at every evaluation; 1_000_003 is any number above that of the prompts, so that no two --seed share one
    first_seed = run.config.seed * 1_000_003
    seeds = range(first_seed, first_seed + len(prompts))
    measured = {}
    columns = {}
    to_write = []
    for name, model in sorted(models.items()):
        without_adapters = model if name == 'reference' else None
        with adapters_off(without_adapters):
            answers = sample(model, run.tokenizer, prompts, seeds, keep_end=True, **settings)
        if measure and prompts:
            measured[name] = measure(prompts, answers)

        # a line of the file for each answer
        stop = stop_tokens(model, run.tokenizer)
        for i, answer in enumerate(answers):
            to_write.append((name, i, without_end(answer, stop)))
            columns[name, i] = {'tokens': len(answer)}
            for column, values in measured.get(name, {}).items():
                columns[name, i][column] = round(values[i].item(), 6)
    file = f'{run.config.out_dir}/samples.jsonl'
    fsdp.on_one_rank(lambda: write(file, run.tokenizer, prompts, to_write, seen, columns))
    return measured


# ---- one process ----


@torch.no_grad()
def generate(
    model, tokenizer, prompts, seeds, *, max_new_tokens, temperature=1.0, top_p=1.0, keep_end=False, rows=None
):
    """Sample an answer to each prompt in this process. Return the answers as lists of ids.

    prompts: lists of ids. The noise of answer i comes from seeds[i]; temperature 0 is greedy. An answer ends with one of
    stop_tokens, which is returned with it if keep_end, or at max_new_tokens. rows: at most so many answers are in the making at
    a time (None: all); when some have ended, the next ones are begun. A signal ends all answers where they are. Under FSDP, call
    this inside fsdp.unsharded."""
    inner = core(model)
    stop = stop_tokens(model, tokenizer)
    n_rows = rows or len(prompts)
    refill = can_refill(inner)
    answers = [[] for _ in prompts]
    waiting = list(range(len(prompts)))  # numbers of the answers that are not begun yet
    active = []  # numbers of the answers in the making
    cache = None  # keys and values of these,
    cache_rows = []  # and the row in it of each
    with _sampling(model, eos_token_id=sorted(stop), pad_token_id=tokenizer.eos_token_id):
        while waiting or active:
            # free rows go to the next prompts; without refill all rows end together, and are free here
            n_free = n_rows - len(active)
            new = waiting[:n_free]
            waiting = waiting[n_free:]
            texts = [[*prompts[i], *answers[i]] for i in active + new]
            if refill:
                cache = _cache_for(inner, texts, cache, cache_rows)

            # sample tokens for all rows, until enough of them have ended
            active += new
            n_sampled = [len(answers[i]) for i in active]
            enough = max(1, len(active) // REFILL_SHARE) if refill else len(active)
            criteria = _stopping_criteria(inner, stop, max_new_tokens, n_sampled, enough)
            processors = _processors([seeds[i] for i in active], n_sampled, temperature, top_p)
            most = max_new_tokens - min(n_sampled)
            continuations = _generate(inner, texts, cache, most, criteria, processors)

            # the rows of answers that have not ended go on
            cache_rows = []
            for row, tokens in enumerate(continuations):
                if _extend(answers[active[row]], tokens, stop, max_new_tokens):
                    cache_rows.append(row)
            active = [active[row] for row in cache_rows]
            if _told_to_stop():
                break
    return answers if keep_end else [without_end(answer, stop) for answer in answers]


def _extend(answer, tokens, stop, max_new_tokens):
    """Append tokens to an answer, in place, up to its end. Return whether it has not ended.

    Behind the end there is filler, for a row that has ended waits for the others."""
    room = max_new_tokens - len(answer)
    for token in tokens[:room]:
        answer.append(token)
        if token in stop:
            return False
    return len(answer) < max_new_tokens


def _told_to_stop():
    """Return whether a signal asks this process to stop. In a tensor-parallel group it is always False: its ranks must go on in step."""
    return guard.asked_here() and not fsdp.in_groups()


@contextlib.contextmanager
def _sampling(model, **settings):
    """Inside the with block, let a model generate with these settings of a GenerationConfig. Then leave it as it was."""
    inner = core(model)
    # in place of the model's own config, which may have a repetition penalty or the like
    own_config = inner.generation_config
    inner.generation_config = transformers.GenerationConfig(do_sample=False, **settings)
    # all in eval mode: a block in training mode that recomputes activations gets no KV cache
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
    """Continue texts (lists of ids) by inner.generate, greedily. Return a list of up to n new ids for each.

    cache: keys and values of all but the last token of each text; None: there are none yet. criteria, processors: when
    to stop, and what happens to the scores of the next token before the largest is taken."""
    n_cached = 0 if cache is None else cache.get_seq_length()
    width = max(n_cached + 1, *map(len, texts))
    # texts are padded on the left, as their rows in the cache are
    pad = inner.generation_config.pad_token_id
    ids = []
    mask = []
    for text in texts:
        n_filler = width - len(text)
        ids.append([pad] * n_filler + list(text))
        mask.append([0] * n_filler + [1] * len(text))
    # the mask is of all columns, but ids in the cache are not given again
    ids = torch.tensor(ids, device=inner.device)[:, n_cached:]
    mask = torch.tensor(mask, device=inner.device)
    options = {'max_new_tokens': n, 'stopping_criteria': criteria, 'logits_processor': processors}
    if cache is not None:
        options['past_key_values'] = cache
    # not synced: ranks generate each for itself
    out = inner.generate(ids, attention_mask=mask, synced_gpus=False, **options)
    n_given = width - n_cached
    return out[:, n_given:].tolist()


def stop_tokens(model, tokenizer):
    """Return the set of ids that end an answer: the tokenizer's end of text, and those that the model's generation config names."""
    named = core(model).generation_config.eos_token_id  # an id, a list of them, or None
    ids = named if isinstance(named, list) else [named]
    return {tokenizer.eos_token_id, *ids} - {None}


def without_end(answer, stop):
    """Return an answer's ids without its last one, if that is one of the ids in stop."""
    has_end = bool(answer) and answer[-1] in stop
    return answer[:-1] if has_end else answer


# ---- keys and values of several batches in one ----


def can_refill(inner):
    """Return whether rows can be taken out of a model's cache, and put together with those of another.

    They can if it has keys and values for each token, of all tokens or of a window. They cannot if it has states that mix tokens
    (Mamba), or chunks that are counted from a row's first column (Llama 4)."""
    # transformers' own marks of models that keep something else
    if inner._is_stateful or not inner._supports_default_dynamic_cache():
        return False
    if getattr(inner.config, 'attention_chunk_size', None):
        return False
    cache = transformers.DynamicCache(config=inner.config)
    kinds = {type(layer) for layer in cache.layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def _cache_for(inner, texts, cache, cache_rows):
    """Return a cache of all but the last token of each text. The first texts are in these rows of cache; it computes the others."""
    caches = []
    if cache_rows:
        caches.append((cache, cache_rows))
    new = texts[len(cache_rows) :]
    if new:
        caches.append(_prefill(inner, new))
    longest = max(map(len, texts))
    # a text of one token has nothing to cache; its row is one column of filler
    return _join(caches, width=max(1, longest - 1))


def _prefill(inner, texts):
    """Return (a cache of all tokens but the last of each text, the row of each text in it). Equal texts share a row."""
    rows = []
    row_of = {}  # text without its last token -> row
    for text in texts:
        known = tuple(text[:-1])
        rows.append(row_of.setdefault(known, len(row_of)))
    cache = transformers.DynamicCache(config=inner.config)
    # generate fills the cache; the one token that it samples is not used
    _generate(inner, list(row_of), cache, 1)
    return cache, rows


def _join(caches, width):
    """Return one cache with chosen rows of several: the first one, changed. caches: (cache, its chosen rows) each.

    width: columns of the joined cache, as many as its longest row has tokens. Rows are right-aligned: what is cut is filler."""
    joined, _ = caches[0]
    for number, layer in enumerate(joined.layers):
        # a layer with a window holds fewer
        longest = max(cache.layers[number].keys.shape[2] for cache, _ in caches)
        size = min(width, longest)
        for name in ('keys', 'values'):
            padded = []
            for cache, rows in caches:
                states = getattr(cache.layers[number], name)[rows]  # (rows, heads, tokens, d)
                # filler on the left; a negative number takes tokens away there
                n_filler = size - states.shape[2]
                padded.append(F.pad(states, (0, 0, n_filler, 0)))
            setattr(layer, name, torch.cat(padded))
        layer.cumulative_length = width
    return joined


# ---- one token ----


def _stopping_criteria(inner, stop, max_new_tokens, n_sampled, enough):
    """Return what tells transformers' generate, after every token, which rows have ended.

    A row has ended after an id in stop, or with max_new_tokens, of which it has n_sampled[row] already. All rows end together
    when `enough` of them have ended and REFILL_AFTER tokens were sampled, or when a signal comes."""
    stop = torch.tensor(sorted(stop), device=inner.device)
    left = max_new_tokens - torch.tensor(n_sampled, device=inner.device)
    sampled = []  # (rows,) tokens of each step

    def has_ended(ids, scores, **unused):
        sampled.append(ids[:, -1])
        met_stop = torch.isin(torch.stack(sampled), stop).any(0)
        is_full = left <= len(sampled)
        ended = met_stop | is_full
        if len(sampled) >= REFILL_AFTER:
            ended |= ended.sum() >= enough
        return ended | _told_to_stop()

    return transformers.StoppingCriteriaList([has_ended])


def _processors(seeds, n_sampled, temperature, top_p):
    """Return what changes the scores of the next token before the largest is taken: nothing at temperature 0, else a _Draw.

    seeds, n_sampled: of each row, its seed and how many tokens it has sampled already."""
    # temperature before top_p, as transformers has them
    processors = transformers.LogitsProcessorList()
    if temperature > 0:
        processors.append(transformers.TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(transformers.TopPLogitsWarper(top_p))
        processors.append(_Draw(seeds, n_sampled))
    return processors


class _Draw(transformers.LogitsProcessor):
    """Draws a token for every row and leaves it the only one with a score, so that the greedy choice is the sample.

    To add Gumbel noise to the scores and take the largest is to sample from their softmax; another batch's rounding can then only
    change a near tie. It is done twice: for one of about sqrt(V) blocks of tokens, by its total probability, then for a token in
    it. So a row needs 2 sqrt(V) noises a token instead of V. Each noise is a hash of the row's seed and of the noise's number."""

    def __init__(self, seeds, n_sampled):
        self.seeds = seeds
        # a seed may be negative or larger than 64 bits
        unsigned = [seed % 2**64 for seed in seeds]
        self.keys = splitmix64(np.array(unsigned, np.uint64))  # (rows,)
        self.step = np.array(n_sampled, np.uint64)  # (rows,) tokens sampled so far

    def __call__(self, ids, scores):
        """Return scores (rows, V), changed in place: 0 for the drawn token of each row, -infinity for all others."""
        n_rows, vocabulary = scores.shape
        # the vocabulary as `side` blocks of `side` tokens, the last ones filled up with impossible tokens
        side = math.isqrt(vocabulary - 1) + 1  # the root, rounded up
        n_filler = side * side - vocabulary
        blocks = F.pad(scores, (0, n_filler), value=-math.inf).view(n_rows, side, side)
        noise = self.noise(2 * side).to(scores.device, non_blocking=True)
        block_noise, token_noise = noise.split(side, 1)
        self.step += np.uint64(1)

        # a block, then a token in it
        block_scores = blocks.logsumexp(2)
        if block_scores.isnan().any():
            raise UserError("the model's scores are not numbers: its weights are broken, or too large for its type")
        block = (block_scores + block_noise).argmax(1)
        every_row = torch.arange(n_rows, device=block.device)
        token_scores = blocks[every_row, block]
        token = (token_scores + token_noise).argmax(1)
        drawn = block * side + token
        scores.fill_(-math.inf)
        return scores.scatter_(1, drawn[:, None], 0.0)

    def noise(self, n):
        """Return (rows, n) Gumbel noises of this step, float32. No two noises of a row, in all its steps, have the same number."""
        first = self.step * np.uint64(n)
        numbers = first[:, None] + np.arange(n, dtype=np.uint64)
        # splitmix64's own constant, by which it goes on from one number to the next
        counters = numbers * np.uint64(0x9E3779B97F4A7C15)
        bits = splitmix64(self.keys[:, None] + counters)
        # the upper 53 bits are all that a float64 can hold; with 0.5 added it is never 0, whose logarithm is infinite
        upper = bits >> np.uint64(11)
        uniform = (upper + 0.5) / 2**53
        gumbel = -np.log(-np.log(uniform))
        noise = torch.from_numpy(gumbel).float()
        # from pinned memory a GPU fetches it without holding up this process
        if torch.cuda.is_available():
            noise = noise.pin_memory()
        return noise
