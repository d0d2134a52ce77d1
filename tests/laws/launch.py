"""Runs scripts one after another on the ranks of one launch, which helpers.launch() starts.

The plan is a list of commands:
    script, flag ...                    run it
    'fails', file, script, flag ...     it must fail: its sentence goes into the file
    'gradients', file, script, flag ... keep the gradients of every step, before clipping, as '<step>.<parameter>'
    'steps', file, script, flag ...     count the collectives of every step, and how many different copies of what trains there are
    'cut', run, resumed, examples       copy a finished run as if it had died after so many examples
    'shake', model, other               copy a model folder with noise on its weights"""

import gc
import hashlib
import json
import logging
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fsdp
from configurator import UserError
from hf import sharded
from hf.load import load_model, load_tokenizer
from runtime import ranks
from tests.helpers import collect_garbage, cut_short, run_script, silent
from training import Run

# imported when first used: once here, before ranks are forked
WARM = Run, transformers.LlamaForCausalLM


def on_first_rank(fn, *arguments):
    """Call it on rank 0, while the others wait."""
    if int(os.environ.get('RANK', 0)) == 0:
        fn(*arguments)
    if dist.is_initialized():
        dist.barrier()


def fails(file, *command):
    with pytest.raises(UserError) as info:
        run_script(*command)
    Path(file).write_text(str(info.value))


def run_with_update(update, script, *flags):
    """Run a script with another function in the place of fsdp.update."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, 'update', update)
        run_script(script, *flags)


def gradients(file, *command):
    update, kept = fsdp.update, []

    def record(model, optimizer, lr, scale, max_norm, **more):
        fsdp.average_gradients(model)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        # replicas have no sharded tensors
        whole = {name: g.full_tensor() if hasattr(g, 'full_tensor') else g for name, g in found.items()}
        kept.append({name: scale * g.detach().clone() for name, g in whole.items()})
        return update(model, optimizer, lr, scale, max_norm, **more)

    run_with_update(record, *command)
    named = {f'{step}.{name}': g for step, found in enumerate(kept) for name, g in found.items()}
    on_first_rank(save_file, named, file)


class Collectives(TorchDispatchMode):
    """Counts what goes between ranks."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # a DTensor makes operations on plain tensors of this one, and those are counted
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        self.seen += function.namespace in ('c10d', '_c10d_functional') and 'wait' not in str(function)
        return function(*args, **(kwargs or {}))


def steps(file, *command):
    update, seen, copies, counter = fsdp.update, [], [], Collectives()

    def record(model, optimizer, *arguments):
        seen.append(counter.seen)
        norm = update(model, optimizer, *arguments)
        digest = hashlib.sha256()
        for p in model.parameters():
            for tensor in (p, *optimizer.state[p].values()):
                digest.update(sharded.local_shard(tensor).detach().numpy().tobytes())
        copies[:] = [digest.hexdigest()]
        return norm

    with counter:
        run_with_update(record, *command)
    collectives = [after - before for before, after in zip(seen, seen[1:], strict=False)]
    found = {'collectives': collectives, 'copies': len(set(ranks.gather_objects(copies[0])))}
    on_first_rank(Path(file).write_text, json.dumps(found))


def shake(folder, other):
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, tokenizer=tokenizer)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * p.std() * torch.randn_like(p) if p.dim() > 1 else 0
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)


def follow(plan):
    """Do what a plan says, in this process."""
    own = {'fails': fails, 'gradients': gradients, 'steps': steps}
    own |= {'cut': partial(on_first_rank, cut_short), 'shake': partial(on_first_rank, shake)}
    for command, *words in plan:
        collect_garbage()
        with silent():
            own[command](*words) if command in own else run_script(command, *words)


def rank(plan, said, environment):
    """Do it as one rank of several, in a process of its own. said: a file for what it has to say."""
    gc.freeze()
    os.environ.update(environment)
    with open(said, 'w') as file:
        os.dup2(file.fileno(), 2)
    # torch has a handler with a stream of its own
    logging.getLogger('torch.distributed.tensor._redistribute').addHandler(
        logging.StreamHandler(open(2, 'w', closefd=False))
    )
    follow(plan)
    ranks.leave()
