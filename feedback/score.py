"""Scores of answers under a reward model (reward.py): for label.py, ppo.py and your own code."""

from functools import partial

import numpy as np
import torch

import fsdp
from configurator import UserError
from data import pack, pack_probe, plan, plan_padded
from hf.load import load_reward, load_tokenizer, separate_pad
from hf.probe import can_pack, room
from model import core, set_attention
from runtime import guard
from runtime.log import say
from text.examples import Examples


def load_scorer(name, device, *, dtype='float32', device_map=None, trust_remote_code=False):
    """(the sharded reward model of a folder or hub id, its tokenizer), after fsdp.setup. Raises UserError."""
    tokenizer = separate_pad(load_tokenizer(name, trust_remote_code))
    build = partial(load_reward, name, tokenizer, trust_remote_code=trust_remote_code)
    model = fsdp.shard(build, device, dtype=dtype, train=False, device_map=device_map)
    a, b, c = np.random.default_rng(0).integers(len(tokenizer), size=(3, 20))
    end = [tokenizer.eos_token_id]
    probe = Examples.of([(a, [[*b, *end], [*c[:5], *end]]), (b[:7], [[*c[:9], *end], [*a, *end]])])
    set_attention(model, can_pack(model, *pack_probe(probe, device), say))
    return model, tokenizer


@guard.memory_for('answers do not fit beside the reward model; lower max_tokens, which changes no score')
@torch.no_grad()
def scores(model, tokenizer, items, max_tokens, ends=()) -> np.ndarray:
    """Scores (n,), float32, of n answers: equal on every rank, and every rank must call this.

    items: n of (prompt ids, answer ids); where an answer lacks its end of text, that is appended, as in training. ends: other
    ids that end an answer, at which its score is read, such as the end of a turn. The answers of one prompt share its
    computation. max_tokens: tokens of one microbatch of one rank. Raises UserError for an
    item that is longer than the model reads."""
    eos, groups = tokenizer.eos_token_id, {}
    ends = {eos, *ends}
    padded = core(model).config._attn_implementation != 'packed'
    limit = room(model)
    for i, (prompt, answer) in enumerate(items):
        prompt, answer = (np.asarray(x, np.int64) for x in (prompt, answer))
        answer = answer if len(answer) and answer[-1] in ends else np.append(answer, eos)
        if not len(prompt) or len(prompt) + len(answer) > limit:
            raise UserError(f'item {i}: prompt and answer have {len(prompt)} + {len(answer)} tokens, where the reward model '
                            f'takes a prompt and at most {limit} in all')  # fmt: skip
        prompt_groups = groups.setdefault(prompt.tobytes(), [])
        if not prompt_groups or padded or prompt_groups[-1]['tokens'] + len(answer) > max_tokens:
            prompt_groups.append({'prompt': prompt, 'answers': [], 'place': [], 'tokens': len(prompt)})
        group = prompt_groups[-1]
        group['answers'].append(answer)
        group['place'].append(i)
        group['tokens'] += len(answer)
    groups = [group for same_prompt in groups.values() for group in same_prompt]
    rank, world = fsdp.data_rank()
    found, place = [], []
    lengths = np.array([group['tokens'] for group in groups])
    for chosen in (plan_padded if padded else plan)(lengths, world, max_tokens)[rank]:
        mine = [groups[g] for g in chosen]
        batch = pack(
            [(g['prompt'], g['answers']) for g in mine], chosen, pad=padded, filler=1, device=core(model).device
        )
        found.append(model.response_scores(batch))
        place += [i for g in mine for i in g['place']] or [-1]
    values = fsdp.gather_columns({'score': torch.cat(found)}, place, len(items))['score'].float().numpy()
    if not np.isfinite(values).all():
        raise UserError(
            "the reward model's scores are not numbers (nan): its weights are broken, or too large for its type"
        )
    return values
