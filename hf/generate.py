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

# the rows change when a share of them has ended, and this many tokens were sampled: a change costs one or two tokens' time
SHARE, LEAST = 4, 8

# ---- for the scripts ----


def sample(model, tokenizer, prompts, seeds, **settings):
    """Sample an answer to every prompt (lists of ids) from a sharded model, the work shared among the ranks.

    settings: as in generate. Returns, on every rank, lists of ids."""
    # this rank's prompts, those of similar length side by side
    rank, world = fsdp.data_rank()
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    mine = longest_first[rank::world]
    with fsdp.unsharded(model):
        found = generate(model, tokenizer, [prompts[i] for i in mine], [seeds[i] for i in mine], **settings)

    # those of all ranks, in their order
    answers = {}
    for of_rank in fsdp.gather_objects(dict(zip(mine, found, strict=True))):
        answers |= of_rank
    return [answers.get(i) for i in range(len(prompts))]


def write(file, tokenizer, prompts, answers, examples_seen, columns=None):
    """Append answers, (model's name, number of the prompt, ids) each, to a samples.jsonl.

    columns: (name, number) -> what else its row says."""
    lines = []
    for name, i, answer in answers:
        row = {'examples': examples_seen, 'generator': name, 'sample': i}
        row |= {'prompt': tokenizer.decode(prompts[i]), 'response': tokenizer.decode(answer)}
        if columns:
            row |= columns[name, i]
        lines.append(json.dumps(row) + '\n')
    append(file, ''.join(lines))


@guard.memory_for('sampled answers do not fit beside the model; lower n_eval_model_samples or max_new_tokens')
def sample_held_out(run, models, n, seen, measure=None, **settings):
    """Sample answers of models (name -> sharded model) to the first n held-out prompts, into out_dir/samples.jsonl.

    The one called reference answers without adapters, if it has any. A row has the answer's tokens, its end among them.
    measure(prompts, their answers) -> {column: (n,) numbers} adds others. settings: as in generate. Returns what measure gave:
    name -> columns."""
    # kto makes two examples of a pair, with one prompt: the good one stands for both
    asked = run.held_out.select(run.held_out.good).select(slice(n))
    prompts = [prompt for prompt, _ in asked]
    first = run.config.seed * 1_000_003
    seeds = range(first, first + len(prompts))
    measured, columns, shown = {}, {}, []
    for name, model in sorted(models.items()):
        with adapters_off(model if name == 'reference' else None):
            answers = sample(model, run.tokenizer, prompts, seeds, keep_end=True, **settings)
        if measure and prompts:
            measured[name] = measure(prompts, answers)

        # what is known of every answer
        stop = stop_tokens(model, run.tokenizer)
        for i, answer in enumerate(answers):
            shown.append((name, i, without_end(answer, stop)))
            columns[name, i] = {'tokens': len(answer)}
            for column, values in measured.get(name, {}).items():
                columns[name, i][column] = round(values[i].item(), 6)
    file = f'{run.config.out_dir}/samples.jsonl'
    fsdp.on_one_rank(lambda: write(file, run.tokenizer, prompts, shown, seen, columns))
    return measured


# ---- one process ----


@torch.no_grad()
def generate(
    model, tokenizer, prompts, seeds, *, max_new_tokens, temperature=1.0, top_p=1.0, keep_end=False, rows=None
):
    """Sample an answer for each prompt (lists of ids). The noise of answer i comes from seeds[i]; temperature 0 is greedy.

    At most `rows` answers are in the making at a time (None: all); those that have ended make room for others. Returns lists of
    ids. An answer ends with one of stop_tokens, if it has not max_new_tokens before; that token is in it if keep_end. Under
    FSDP call it inside fsdp.unsharded."""
    inner, stop = core(model), stop_tokens(model, tokenizer)
    rows, refill = rows or len(prompts), can_refill(inner)
    answers = [[] for _ in prompts]
    waiting = list(range(len(prompts)))
    active, cache, kept = [], None, []  # numbers of the answers in the making, and their rows in the cache
    with _sampling(model, eos_token_id=sorted(stop), pad_token_id=tokenizer.eos_token_id):
        while waiting or active:
            # free rows go to the next prompts; if caches cannot be put together, all are free
            free = rows - len(active)
            new, waiting = waiting[:free], waiting[free:]
            texts = [[*prompts[i], *answers[i]] for i in active + new]
            if refill:
                parts = [(cache, kept)] if active else []
                parts += [_prefill(inner, texts[len(active) :])] if new else []
                cache = _join(parts, max(1, *(len(text) - 1 for text in texts)))
            active += new

            # tokens for all of them, until enough have ended
            taken = [len(answers[i]) for i in active]
            enough = max(1, len(active) // SHARE) if refill else len(active)
            ends = _ends(inner, stop, max_new_tokens, taken, enough)
            draw = _processors([seeds[i] for i in active], taken, temperature, top_p)
            found = _generate(inner, texts, cache, max_new_tokens - min(taken), ends, draw)

            # rows that ended before the others are filled up behind their end
            kept = []
            for row, tokens in enumerate(found):
                answer = answers[active[row]]
                for token in tokens[: max_new_tokens - len(answer)]:
                    answer.append(token)
                    if token in stop:
                        break
                if answer[-1] not in stop and len(answer) < max_new_tokens:
                    kept.append(row)
            active = [active[row] for row in kept]
            if _told_to_stop():
                break
    return answers if keep_end else [without_end(answer, stop) for answer in answers]


def _told_to_stop():
    """Whether a signal asks to stop: not heeded in a tensor-parallel group, whose ranks must stop together."""
    return guard.asked_here() and not fsdp.in_groups()


@contextlib.contextmanager
def _sampling(model, **settings):
    """Let a model generate for a while, with settings of a GenerationConfig, and leave it as it was."""
    inner = core(model)
    # not the model's own settings, such as a repetition penalty; no block trains, for recomputed activations get no KV cache
    own = inner.generation_config
    training = [module for module in model.modules() if module.training]
    inner.generation_config = transformers.GenerationConfig(do_sample=False, **settings)
    model.eval()
    try:
        with padded_attention(model):
            yield
    finally:
        inner.generation_config = own
        for module in training:
            module.training = True


def _generate(inner, texts, cache, n, ends=None, draw=None):
    """Continue texts (lists of ids) with model.generate: lists of up to n new ids.

    cache: None, or all but the last token of each text; ends, draw: its stopping criteria and processors of scores."""
    cached = 0 if cache is None else cache.get_seq_length()
    width = max(cached + 1, *map(len, texts))
    # texts are padded on the left
    ids, mask = [], []
    for text in texts:
        filler = width - len(text)
        ids.append([inner.generation_config.pad_token_id] * filler + list(text))
        mask.append([0] * filler + [1] * len(text))
    ids = torch.tensor(ids, device=inner.device)[:, cached:]
    mask = torch.tensor(mask, device=inner.device)
    options = {'max_new_tokens': n, 'stopping_criteria': ends, 'logits_processor': draw, 'synced_gpus': False}
    if cache is not None:
        options['past_key_values'] = cache
    out = inner.generate(ids, attention_mask=mask, **options)
    return out[:, width - cached :].tolist()


def stop_tokens(model, tokenizer):
    """The ids that end an answer: the tokenizer's end of text, and those that the model's generation config names."""
    own = core(model).generation_config.eos_token_id  # an id, several, or None
    ids = own if isinstance(own, list) else [own]
    return {tokenizer.eos_token_id, *ids} - {None}


def without_end(answer, stop):
    """An answer's ids without the one of `stop` that ends it, if one does."""
    return answer[:-1] if answer and answer[-1] in stop else answer


# ---- keys and values of several batches in one ----


def can_refill(inner):
    """Whether a model's cache is keys and values by token alone, of all tokens or a window, so that rows can come and go."""
    if inner._is_stateful or not inner._supports_default_dynamic_cache():
        return False
    layers = transformers.DynamicCache(config=inner.config).layers
    chunked = getattr(inner.config, 'attention_chunk_size', None)
    return not chunked and {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


def _prefill(inner, texts):
    """(a cache of all tokens but the last of each text, the row of each text in it). Equal texts share a row."""
    found, rows = {}, []  # a text -> its row
    for text in texts:
        known = tuple(text[:-1])
        rows.append(found.setdefault(known, len(found)))
    cache = transformers.DynamicCache(config=inner.config)
    _generate(inner, list(found), cache, 1)  # the token that comes is not used
    return cache, rows


def _join(parts, width):
    """One cache of the chosen rows of several, (cache, rows) each, with states of the last `width` places of each row."""
    joined, _ = parts[0]
    for number, layer in enumerate(joined.layers):
        # a layer with a window holds fewer
        size = min(width, max(cache.layers[number].keys.shape[2] for cache, _ in parts))
        for name in ('keys', 'values'):
            padded = []
            for cache, rows in parts:
                states = getattr(cache.layers[number], name)[rows]
                padded.append(F.pad(states, (0, 0, size - states.shape[2], 0)))
            setattr(layer, name, torch.cat(padded))
        layer.cumulative_length = width
    return joined


# ---- one token ----


def _ends(inner, stop, most, taken, enough):
    """What ends rows, for generate: a stop token or `most` tokens, of which a row has `taken`; enough ends, or a signal, end all."""
    stop = torch.tensor(sorted(stop), device=inner.device)
    left = most - torch.tensor(taken, device=inner.device)
    sampled = []

    def ended(ids, scores, **more):
        sampled.append(ids[:, -1])
        gone = torch.isin(torch.stack(sampled), stop).any(0) | (left <= len(sampled))
        if len(sampled) >= LEAST:
            gone |= gone.sum() >= enough
        return gone | _told_to_stop()

    return transformers.StoppingCriteriaList([ended])


def _processors(seeds, taken, temperature, top_p):
    """What scores go through before the largest is taken: with temperature 0, nothing. taken: tokens sampled so far, a row."""
    processors = transformers.LogitsProcessorList()
    if temperature > 0:
        processors.append(transformers.TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(transformers.TopPLogitsWarper(top_p))
        processors.append(_Draw(seeds, taken))
    return processors


class _Draw(transformers.LogitsProcessor):
    """Draws a token for every row and leaves it the only one with a score, so that the greedy choice is the sample.

    Adding Gumbel noise and taking the largest is sampling, in which another batch's rounding can only change a near tie. First a
    block of about sqrt(V) tokens is drawn, by its total probability, then a token in it: 2 sqrt(V) noises a token instead of V,
    each a hash of the row's seed and its own place."""

    def __init__(self, seeds, taken):
        self.seeds = seeds
        self.keys = splitmix64(np.array([seed % 2**64 for seed in seeds], np.uint64))  # (rows,)
        self.step = np.array(taken, np.uint64)  # (rows,) tokens sampled so far

    def __call__(self, ids, scores):
        rows, vocabulary = scores.shape
        # the vocabulary as `side` blocks of `side` tokens, the last ones filled up with impossible tokens
        side = math.isqrt(vocabulary - 1) + 1  # the root, rounded up
        grid = F.pad(scores, (0, side * side - vocabulary), value=-math.inf).view(rows, side, side)
        block_noise, token_noise = self.noise(2 * side).to(scores.device, non_blocking=True).split(side, 1)
        self.step += np.uint64(1)

        # a block, then a token in it
        mass = grid.logsumexp(2)
        if mass.isnan().any():
            raise UserError("the model's scores are not numbers: its weights are broken, or too large for its type")
        block = (mass + block_noise).argmax(1)
        inside = (grid[torch.arange(rows, device=block.device), block] + token_noise).argmax(1)
        drawn = block * side + inside
        return scores.fill_(-math.inf).scatter_(1, drawn[:, None], 0.0)

    def noise(self, n):
        """(rows, n) Gumbel noises of this step. A row's are numbered through all steps; the constant is splitmix64's."""
        first = self.step * np.uint64(n)
        numbers = first[:, None] + np.arange(n, dtype=np.uint64)
        bits = splitmix64(self.keys[:, None] + numbers * np.uint64(0x9E3779B97F4A7C15))
        uniform = ((bits >> np.uint64(11)) + 0.5) / 2**53  # 53 of the bits; never 0
        noise = torch.from_numpy(-np.log(-np.log(uniform))).float()
        # from pinned memory a GPU fetches it without holding up this process
        return noise.pin_memory() if torch.cuda.is_available() else noise
