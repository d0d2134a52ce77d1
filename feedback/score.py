"""Scores of answers under a reward model (reward.py): for label.py, ppo.py and your own code."""

from functools import partial
from typing import NamedTuple

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


class Group(NamedTuple):
    """Answers to one prompt, which share its computation. slots: the answers' numbers among all items."""

    prompt: np.ndarray
    answers: list
    slots: list

    @property
    def tokens(self):
        return len(self.prompt) + sum(map(len, self.answers))


def load_scorer(name, device, *, dtype='float32', device_map=None, trust_remote_code=False):
    """(the sharded reward model of a folder or hub id, its tokenizer), after fsdp.setup. Raises UserError."""
    tokenizer = separate_pad(load_tokenizer(name, trust_remote_code))
    build = partial(load_reward, name, tokenizer, trust_remote_code=trust_remote_code)
    model = fsdp.shard(build, device, dtype=dtype, train=False, device_map=device_map)
    # packed, where that changes no score of two made-up pairs of different lengths
    a, b, c = np.random.default_rng(0).integers(len(tokenizer), size=(3, 20))
    end = tokenizer.eos_token_id
    first = a, [[*b, end], [*c[:5], end]]
    second = b[:7], [[*c[:9], end], [*a, end]]
    packed, padded = pack_probe(Examples.of([first, second]), device)
    set_attention(model, can_pack(model, packed, padded, say))
    return model, tokenizer


@guard.memory_for('answers do not fit beside the reward model; lower max_tokens, which changes no score')
@torch.no_grad()
def scores(model, tokenizer, items, max_tokens, ends=()) -> np.ndarray:
    """Scores (n,), float32, of n answers: equal on every rank, and every rank must call this.

    items: n of (prompt ids, answer ids); where an answer lacks its end of text, that is appended, as in training. ends: other
    ids that end an answer, at which its score is read, such as the end of a turn. max_tokens: tokens of one microbatch of one
    rank. Raises UserError for an item that is longer than the model reads."""
    padded = core(model).config._attn_implementation != 'packed'
    # padded batches have a row for every answer: no answer joins a group of 0 tokens
    group_tokens = 0 if padded else max_tokens
    groups = _groups(items, tokenizer.eos_token_id, ends, room(model), group_tokens)

    # this rank's microbatches, as lists of groups
    lengths = np.array([group.tokens for group in groups])
    rank, world = fsdp.data_rank()
    make_plan = plan_padded if padded else plan
    found, slots = [], []
    for numbers in make_plan(lengths, world, max_tokens)[rank]:
        mine = [groups[number] for number in numbers]
        examples = [(group.prompt, group.answers) for group in mine]
        batch = pack(examples, numbers, pad=padded, filler=1, device=core(model).device)
        found.append(model.response_scores(batch))
        slots += [slot for group in mine for slot in group.slots] or [-1]  # a rank without work has a filler

    # the scores of all ranks, in the order of the items
    columns = fsdp.gather_columns({'score': torch.cat(found)}, slots, len(items))
    values = columns['score'].float().numpy()
    if not np.isfinite(values).all():
        raise UserError("the reward model's scores are not numbers: its weights are broken, or too large for its type")
    return values


def _groups(items, eos, ends, limit, max_tokens):
    """The items as Groups of at most max_tokens, those of one prompt side by side. limit: tokens that the model reads."""
    by_prompt = {}  # prompt -> its groups
    for slot, (prompt, answer) in enumerate(items):
        prompt, answer = np.asarray(prompt, np.int64), np.asarray(answer, np.int64)
        if not len(answer) or answer[-1] not in {eos, *ends}:
            answer = np.append(answer, eos)
        if not len(prompt) or len(prompt) + len(answer) > limit:
            sizes = f'{len(prompt)} + {len(answer)} tokens'
            takes = f'the reward model takes a prompt and at most {limit} in all'
            raise UserError(f'item {slot}: prompt and answer have {sizes}, where {takes}')
        # into its prompt's last group, or a new one where that is full
        groups = by_prompt.setdefault(prompt.tobytes(), [])
        if not groups or groups[-1].tokens + len(answer) > max_tokens:
            groups.append(Group(prompt, [], []))
        groups[-1].answers.append(answer)
        groups[-1].slots.append(slot)
    return [group for groups in by_prompt.values() for group in groups]
