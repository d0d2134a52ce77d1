"""Sampling answers from a model. The noise of an answer comes from its own seed, so no answer depends on its batch."""

import json
import math

import numpy as np
import torch
import transformers

import fsdp
from configurator import UserError
from hf.lora import adapters_off
from model import core, padded_attention
from runtime import guard
from runtime.files import append
from text.examples import splitmix64

# ---- for the scripts ----


@guard.memory_for('sampled answers do not fit beside the model; lower n_eval_model_samples or max_new_tokens')
def sample(models, tokenizer, prompts, *, rank, world, seed, **settings):
    """Sample one answer of every model (name -> sharded model) to every prompt, the work shared among the ranks.

    The one called reference answers without adapters, if it has any. settings: as in generate. Returns, on every rank,
    (name, number of the prompt, answer ids), sorted."""
    mine = range(rank, len(prompts), world)  # this rank's prompts
    asked = [prompts[i] for i in mine]
    seeds = [seed * 1_000_003 + i for i in mine]
    answers = {}  # (name, number of the prompt) -> ids
    for name, model in models.items():
        without_adapters = model if name == 'reference' else None
        with fsdp.unsharded(model), adapters_off(without_adapters):
            found = generate(model, tokenizer, asked, seeds, **settings) if mine else []
        answers |= {(name, i): answer for i, answer in zip(mine, found, strict=True)}
    # those of all ranks; ranks of a tensor-parallel group have the same
    everywhere = {}
    for part in fsdp.gather_objects(answers):
        everywhere |= part
    return sorted((name, i, answer) for (name, i), answer in everywhere.items())


def write(file, tokenizer, prompts, answers, examples_seen, columns=None):
    """Append answers, (model's name, number of the prompt, ids) each, to a samples.jsonl.

    columns: (name, number) -> what else its row says."""
    lines = []
    for name, i, answer in answers:
        row = {'examples': examples_seen, 'generator': name, 'sample': i}
        row |= {'prompt': tokenizer.decode(prompts[i]), 'response': tokenizer.decode(answer)}
        row |= (columns or {}).get((name, i), {})
        lines.append(json.dumps(row) + '\n')
    append(file, ''.join(lines))


def sample_held_out(run, models, n, seen, measure=None, **settings):
    """Sample answers of models (name -> sharded model) to the first n held-out prompts, into out_dir/samples.jsonl.

    A row has the answer's tokens, its end among them. measure(prompts, their answers) -> {column: (n,) numbers} adds others.
    settings: as in generate. Returns what measure gave: name -> columns."""
    # kto makes two examples of a pair, with one prompt: the good one stands for both
    asked = run.held_out.select(run.held_out.good).select(slice(n))
    prompts = [prompt for prompt, _ in asked]
    settings |= {'rank': run.rank, 'world': run.world, 'seed': run.config.seed}
    answers = sample(models, run.tokenizer, prompts, keep_end=True, **settings)

    # what is known of every answer
    measured, columns = {}, {}
    for name in models:
        ids = {i: answer for who, i, answer in answers if who == name}
        columns |= {(name, i): {'tokens': len(answer)} for i, answer in ids.items()}
        if measure and ids:
            measured[name] = measure([prompts[i] for i in ids], list(ids.values()))
        for column, values in measured.get(name, {}).items():
            for i, value in zip(ids, values.tolist(), strict=True):
                columns[name, i][column] = round(value, 6)

    stop = {name: stop_tokens(model, run.tokenizer) for name, model in models.items()}
    shown = [(name, i, without_end(answer, stop[name])) for name, i, answer in answers]
    file = f'{run.config.out_dir}/samples.jsonl'
    fsdp.on_one_rank(lambda: write(file, run.tokenizer, prompts, shown, seen, columns))
    return measured


# ---- one process ----


@torch.no_grad()
def generate(model, tokenizer, prompts, seeds, *, max_new_tokens, temperature=1.0, top_p=1.0, keep_end=False):
    """Sample an answer for each prompt (lists of ids). The noise of answer i comes from seeds[i]; temperature 0 is greedy.

    Returns lists of ids. An answer ends with one of stop_tokens, if it has not max_new_tokens before; that token is in it if
    keep_end. Under FSDP call it inside fsdp.unsharded, or equally often on all ranks."""
    inner, filler = core(model), tokenizer.eos_token_id
    stop = stop_tokens(model, tokenizer)
    width = max(map(len, prompts))  # prompts are padded on the left
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[filler] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * n + [1] * (width - n) for n in padding]
    ids, mask = (torch.tensor(rows, device=inner.device) for rows in (ids, mask))

    # what scores go through before the largest is taken: with temperature 0, nothing
    processors = transformers.LogitsProcessorList()
    if temperature > 0:
        processors.append(transformers.TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(transformers.TopPLogitsWarper(top_p))
        processors.append(_Draw(seeds, width))

    # not the model's settings, such as a repetition penalty; no block trains, for recomputed activations get no KV cache
    own = inner.generation_config
    training = [module for module in model.modules() if module.training]
    inner.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop), pad_token_id=filler
    )
    heeding = transformers.StoppingCriteriaList([stop_generating])
    options = {'logits_processor': processors, 'stopping_criteria': heeding, 'synced_gpus': False}
    try:
        for module in training:
            module.training = False
        with padded_attention(model):
            out = inner.generate(ids, attention_mask=mask, **options)
    finally:
        inner.generation_config = own
        for module in training:
            module.training = True

    # rows that ended before the longest are filled up behind their end
    answers = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in stop), len(row))
        answers.append(row[: end + 1] if keep_end else row[:end])
    return answers


def stop_tokens(model, tokenizer):
    """The ids that end an answer: the tokenizer's end of text, and those that the model's generation config names."""
    own = core(model).generation_config.eos_token_id  # an id, several, or None
    ids = own if isinstance(own, list) else [own]
    return {tokenizer.eos_token_id, *ids} - {None}


def without_end(answer, stop):
    """An answer's ids without the one of `stop` that ends it, if one does."""
    return answer[:-1] if answer and answer[-1] in stop else answer


def stop_generating(ids, scores):
    """(rows,) whether to stop: if a signal asks for it, except in a tensor-parallel group, whose ranks must stop together."""
    stop = guard.asked_here() and not fsdp.in_groups()
    return torch.full((len(ids),), stop, device=ids.device)


class _Draw(transformers.LogitsProcessor):
    """Draws a token for every row and leaves it the only one with a score, so that the greedy choice is the sample.

    Adding Gumbel noise and taking the largest is sampling. First a block of about sqrt(V) tokens is drawn, by its total
    probability, then a token in it: 2 sqrt(V) noises a token instead of V, each a hash of the row's seed and its own place.
    Unlike inverting the cumulative distribution, where a rounding error in one probability moves the borders of all later
    tokens, another batch's rounding can only change a near tie, or a token on the edge of top_p."""

    def __init__(self, seeds, start):
        self.keys = splitmix64(np.array([seed % 2**64 for seed in seeds], np.uint64))  # (rows,)
        self.start = start  # columns of the prompts
        self.grid = None  # one buffer for all steps: fresh memory costs a CPU as much as the arithmetic

    def __call__(self, ids, scores):
        rows, vocabulary = scores.shape
        # the vocabulary as `side` blocks of `side` tokens, the last ones filled up with impossible tokens
        side = math.isqrt(vocabulary - 1) + 1  # the root, rounded up
        if self.grid is None:
            self.grid = scores.new_full((rows, side * side), -math.inf)
        self.grid[:, :vocabulary] = scores
        grid = self.grid.view(rows, side, side)
        step = ids.shape[1] - self.start  # tokens sampled so far
        block_noise, token_noise = self.noise(step, 2 * side).to(scores).split(side, 1)

        # a block, then a token in it
        mass = grid.logsumexp(2)
        if mass.isnan().any():
            raise UserError("the model's scores are not numbers: its weights are broken, or too large for its type")
        block = (mass + block_noise).argmax(1)
        inside = (grid[torch.arange(rows), block] + token_noise).argmax(1)
        drawn = block * side + inside
        return scores.fill_(-math.inf).scatter_(1, drawn[:, None], 0.0)

    def noise(self, step, n):
        """(rows, n) Gumbel noises of a step. A row's are numbered through all steps; the constant is splitmix64's."""
        numbers = np.arange(step * n, (step + 1) * n, dtype=np.uint64)
        bits = splitmix64(self.keys[:, None] + numbers * np.uint64(0x9E3779B97F4A7C15))
        uniform = ((bits >> np.uint64(11)) + 0.5) / 2**53  # 53 of the bits; never 0
        return torch.from_numpy(-np.log(-np.log(uniform)))
