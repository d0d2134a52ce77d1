"""What a sharded run writes: checkpoints, which a run on any number of ranks resumes from, and a Hugging Face folder.

Safetensors and json only; every folder is written beside its place and renamed, so that none is ever half there."""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import lora
from fsdp import gather_objects, on_one_rank


def _tensors(model, optimizer):
    """name -> the live tensors of trained weights and optimizer, tied ones once: loading writes into them."""
    tensors = {}
    model.reshard()  # after a forward without backward the root still shows its gathered parameters, not the optimizer's
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        tensors[f'model.{name}'] = p.detach()
        for key, value in optimizer.state[p].items():
            tensors[f'optimizer.{name}.{key}'] = value if value.dim() else value[None]
    return tensors


def save(out_dir, examples, model, optimizer, state, keep_last):
    """out_dir/checkpoints/<examples>/: weights and optimizer (safetensors), state and every rank's RNG (json).

    Written to a temporary folder and renamed; the newest keep_last are kept. state: a json-able dict."""
    folder = Path(out_dir) / 'checkpoints' / f'{examples:010d}'
    temporary = folder.with_suffix('.tmp')
    on_one_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
    dcp.save(_tensors(model, optimizer), storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    rng = gather_objects({'cpu': torch.get_rng_state().tolist(), 'cuda': cuda})

    def finish():
        (temporary / 'state.json').write_text(json.dumps({**state, 'examples': examples, 'rng': rng}))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        for old in sorted(p for p in folder.parent.iterdir() if p.suffix != '.tmp')[:-keep_last]:
            shutil.rmtree(old)

    on_one_rank(finish)


def latest(out_dir):
    """The newest complete checkpoint folder, or None."""
    return max((p for p in Path(out_dir).glob('checkpoints/*') if p.suffix != '.tmp'), default=None)


def load(folder, model, optimizer):
    """Load a checkpoint, written on any number of ranks, into model and optimizer. Returns its state."""
    model.reshard()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for group in optimizer.param_groups:
        group['lr'] = 0.0  # the scripts set the rate of every step anew
    optimizer.step()  # makes the optimizer's tensors, to be loaded into
    optimizer.zero_grad()
    dcp.load(_tensors(model, optimizer), storage_reader=HuggingFaceStorageReader(str(folder)))
    state = json.loads((Path(folder) / 'state.json').read_text())
    rng = state.pop('rng')
    if len(rng) == dist.get_world_size():
        mine = rng[dist.get_rank()]
        torch.set_rng_state(torch.tensor(mine['cpu'], dtype=torch.uint8))
        if mine['cuda'] and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(mine['cuda'], dtype=torch.uint8))
    return state


def export(model, tokenizer, build, folder):
    """Write a normal Hugging Face folder: safetensors, config, tokenizer. build as in shard.

    A model with adapters: they alone to the folder `adapter` beside it, and then the model with them merged into its weights."""
    model.reshard()
    few = lora.present(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=few)
    weights = get_model_state_dict(model, options=options)
    unique = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}

    def write():
        temporary = Path(f'{folder}.tmp')
        shutil.rmtree(temporary, ignore_errors=True)
        if few:
            adapter = Path(folder).with_name('adapter')
            merged = lora.merge(build(empty=False), weights, adapter.with_suffix('.tmp'))
            shutil.rmtree(adapter, ignore_errors=True)
            adapter.with_suffix('.tmp').rename(adapter)
            merged.save_pretrained(temporary)
        else:
            shell = build(empty=True)  # saving through the sharded model would write its changed class name
            shell.all_tied_weights_keys = {}
            shell.save_pretrained(temporary, state_dict={k: v for k, v in weights.items() if k in unique})
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    on_one_rank(write)
