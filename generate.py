"""Sampling answers from a model. The noise of an answer comes from its own seed, so no answer depends on its batch."""

import json

import torch
import transformers

import fsdp
import guard
from lora import adapters_off
from model import core, padded_attention


def sample(models, tokenizer, prompts, *, rank, world, seed, **settings):
    """One answer of every model (name -> sharded model) to every prompt, the work shared among the ranks.

    The one called reference answers without adapters, if it has any. settings: as in generate. Returns, on every rank, (name, number of the prompt, answer ids) in that order."""
    mine, rows = range(rank, len(prompts), world), []
    for name, model in models.items():
        seeds = [seed * 1_000_003 + i for i in mine]
        with fsdp.unsharded(model), adapters_off(model if name == 'reference' else None):
            answers = generate(model, tokenizer, [prompts[i] for i in mine], seeds, **settings) if mine else []
        rows += [(name, i, answer) for i, answer in zip(mine, answers, strict=True)]
    answers = {(name, i): answer for part in fsdp.gather_objects(rows) for name, i, answer in part}
    return sorted((*key, answer) for key, answer in answers.items())  # ranks of a tensor-parallel group had the same


def write(file, tokenizer, prompts, answers, examples_seen):
    """Append the answers of sample to a samples.jsonl."""
    with open(file, 'a') as stream:
        for name, i, answer in answers:
            row = {'examples': examples_seen, 'generator': name, 'sample': i}
            row |= {'prompt': tokenizer.decode(prompts[i]), 'response': tokenizer.decode(answer)}
            stream.write(json.dumps(row) + '\n')


class _Gumbel(transformers.LogitsProcessor):
    """Adding Gumbel noise and taking the largest is sampling; a generator a row makes a row independent of its batch."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, ids, scores):
        noise = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators]).to(scores.device)
        return scores.float().log_softmax(-1) - (-noise.clamp(min=1e-20).log()).log()


def _told(ids, scores):
    """Stop where a signal asks for it: the evaluation, cut short, is thrown away. Not among tensor-parallel ranks, which must
    stop together."""
    return torch.full((len(ids),), guard.asked_here() and not fsdp.in_groups(), device=ids.device)


@torch.no_grad()
def generate(model, tokenizer, prompts, seeds, *, max_new_tokens, temperature=1.0, top_p=1.0):
    """Sample an answer for each prompt (lists of ids), the noise of row i drawn from seeds[i]; temperature 0 is greedy.

    Returns lists of ids without the end of text. Under FSDP call it inside fsdp.unsharded, or equally often on all ranks."""
    inner = core(model)
    stop = {tokenizer.eos_token_id} | set(_as_list(inner.generation_config.eos_token_id))
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(p)) + list(p) for p in prompts], device=inner.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=inner.device)
    processors = transformers.LogitsProcessorList()
    if temperature > 0:
        processors.append(transformers.TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(transformers.TopPLogitsWarper(top_p))
        processors.append(_Gumbel(seeds))
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop), pad_token_id=tokenizer.eos_token_id
    )
    own, inner.generation_config = inner.generation_config, settings  # a repetition penalty there is not the model's
    told = transformers.StoppingCriteriaList([_told])
    with padded_attention(model):
        out = inner.generate(
            ids, attention_mask=mask, logits_processor=processors, stopping_criteria=told, synced_gpus=False
        )
    inner.generation_config = own
    answers = out[:, width:].tolist()
    return [a[: next((i for i, token in enumerate(a) if token in stop), len(a))] for a in answers]


def _as_list(x):
    return x if isinstance(x, list) else [] if x is None else [x]
