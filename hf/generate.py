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
    (name, number of the prompt, answer ids) in that order."""
    mine = range(rank, len(prompts), world)
    asked, seeds = [prompts[i] for i in mine], [seed * 1_000_003 + i for i in mine]
    answers = {}
    for name, model in models.items():
        with fsdp.unsharded(model), adapters_off(model if name == 'reference' else None):
            found = generate(model, tokenizer, asked, seeds, **settings) if mine else []
        answers |= {(name, i): answer for i, answer in zip(mine, found, strict=True)}
    # ranks of a tensor-parallel group had the same
    everywhere = {key: answer for part in fsdp.gather_objects(answers) for key, answer in part.items()}
    return sorted((name, i, answer) for (name, i), answer in everywhere.items())


def write(file, tokenizer, prompts, answers, examples_seen):
    """Append the answers of sample to a samples.jsonl."""
    lines = []
    for name, i, answer in answers:
        row = {'examples': examples_seen, 'generator': name, 'sample': i}
        row |= {'prompt': tokenizer.decode(prompts[i]), 'response': tokenizer.decode(answer)}
        lines.append(json.dumps(row) + '\n')
    append(file, ''.join(lines))


def sample_held_out(run, models, n, seen, **settings):
    """Sample answers of models (name -> sharded model) to the first n held-out prompts, also into out_dir/samples.jsonl.

    settings: as in generate. Returns (prompts, answers as sample gives them, their end tokens kept)."""
    asked = run.held_out.select(run.held_out.good)  # of the two answers that kto makes of a pair, one
    prompts = [asked[i][0] for i in range(min(n, len(asked)))]
    settings |= {'rank': run.rank, 'world': run.world, 'seed': run.config.seed}
    answers = sample(models, run.tokenizer, prompts, keep_end=True, **settings)
    stop = {name: stop_tokens(model, run.tokenizer) for name, model in models.items()}
    shown = [(name, i, without_end(answer, stop[name])) for name, i, answer in answers]
    file = f'{run.config.out_dir}/samples.jsonl'
    fsdp.on_one_rank(lambda: write(file, run.tokenizer, prompts, shown, seen))
    return prompts, answers


# ---- one process ----


@torch.no_grad()
def generate(model, tokenizer, prompts, seeds, *, max_new_tokens, temperature=1.0, top_p=1.0, keep_end=False):
    """Sample an answer for each prompt (lists of ids), the noise of row i drawn from seeds[i]; temperature 0 is greedy.

    Returns lists of ids: with keep_end all that was sampled, the token that ended the answer (one of stop_tokens) last; else
    without that token. Under FSDP call it inside fsdp.unsharded, or equally often on all ranks."""
    # prompts padded on the left
    inner, stop, end = core(model), stop_tokens(model, tokenizer), tokenizer.eos_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(p)) + list(p) for p in prompts], device=inner.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=inner.device)

    # from scores to a token
    processors = transformers.LogitsProcessorList()
    if temperature > 0:
        processors.append(transformers.TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(transformers.TopPLogitsWarper(top_p))
        processors.append(_Draw(seeds, width))

    # our settings: a repetition penalty is not the model's; and no block trains, for recomputed activations get no KV cache
    own, training = inner.generation_config, [m for m in model.modules() if m.training]
    inner.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop), pad_token_id=end
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
    rows = out[:, width:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), None) for row in rows]
    answers = [row[:end] for row, end in zip(rows, ends, strict=True)]
    return answers if keep_end else [without_end(answer, stop) for answer in answers]


def stop_tokens(model, tokenizer):
    """The ids that end an answer: the tokenizer's end of text, and those that the model's generation config names."""
    own = core(model).generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def without_end(answer, stop):
    """An answer's ids without the one of `stop` that ends it, if one does."""
    return answer[:-1] if answer and answer[-1] in stop else answer


def stop_generating(ids, scores):
    """Stop where a signal asks for it, for the evaluation is thrown away. Not among tensor-parallel ranks: they stop together."""
    return torch.full((len(ids),), guard.asked_here() and not fsdp.in_groups(), device=ids.device)


class _Draw(transformers.LogitsProcessor):
    """Draws a token for every row and leaves it the only one with a score, so that the greedy choice is the sample.

    Adding Gumbel noise and taking the largest is sampling. First a block of about sqrt(V) tokens is drawn, by its total
    probability, then a token in it: 2 sqrt(V) noises a token instead of V, each a hash of the row's seed and its own place.
    Unlike inverting the cumulative distribution, where a rounding error in one probability moves the borders of all later
    tokens, another batch's rounding can only change a near tie, or a token on the edge of top_p."""

    def __init__(self, seeds, start):
        self.keys, self.start = splitmix64(np.array([seed % 2**64 for seed in seeds], np.uint64)), start
        self.grid = None

    def __call__(self, ids, scores):
        rows, vocabulary = scores.shape
        side = math.isqrt(vocabulary - 1) + 1
        if self.grid is None:  # one buffer for all steps: fresh memory costs a CPU as much as the arithmetic
            self.grid = scores.new_full((rows, side * side), -math.inf)
        self.grid[:, :vocabulary] = scores
        grid = self.grid.view(rows, side, side)
        noise = self.noise(ids.shape[1] - self.start, 2 * side).to(scores)

        # a block, then a token in it
        mass = grid.logsumexp(2)
        if mass.isnan().any():
            raise UserError("the model's scores are not numbers: its weights are broken, or too large for its type")
        block = (mass + noise[:, :side]).argmax(1)
        inside = (grid[torch.arange(rows), block] + noise[:, side:]).argmax(1)
        return scores.fill_(-math.inf).scatter_(1, (block * side + inside)[:, None], 0.0)

    def noise(self, step, n):
        """(rows, n) Gumbel noises of a step."""
        places = np.arange(step * n, (step + 1) * n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        uniform = ((splitmix64(self.keys[:, None] + places) >> np.uint64(11)) + 0.5) / 2**53
        return torch.from_numpy(-np.log(-np.log(uniform)))
