"""Checkpoints of a sharded run, which a run on any number of ranks resumes from.

out_dir/checkpoints/N/, after N examples, holds weights and optimizer (safetensors), state.json, and manifest.json: size and SHA-256 of
the others. It is written in the background, from a copy in the CPU's memory, and gets its name when all of it is on the disk."""

import functools
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from configurator import Config, UserError
from fsdp import gather_objects, local, on_one_rank, on_ranks, shared
from runtime.files import append_kept, file_hash, make_room, move_folder, replace_text, say, sync, writing
from runtime.log import NEUTRAL, check_same, recorded

NUMBER = re.compile('[0-9]{10,}')  # the name of a checkpoint: its examples
_writer = ThreadPoolExecutor(1)
_pending = None  # the future of the checkpoint that is being written


def identify(config, models, train, held_out):
    """What this run is made of, json-able and the same on all ranks: its script, the options that matter, and contents.

    contents: hashes of the models, which models() returns (load.fingerprints), and of the tokens of both Examples. Raises
    UserError where ranks have read different data."""
    data = {'training examples': train.content(), 'evaluation examples': held_out.content()}
    for rank, other in enumerate(gather_objects(data)):
        if other != data:
            raise UserError(
                f'rank {rank} has read other data than rank {dist.get_rank()}: all hosts must see the same files'
            )
    options = Config({name: value for name, value in config.items() if name not in NEUTRAL})
    options.origin = config.origin
    return {'script': Path(sys.argv[0]).name, 'options': options, 'contents': shared(models) | data}


# ---- writing ----


def _tensors(model, optimizer):
    """name -> the live tensors of trained weights and optimizer, tied ones once: loading writes into them."""
    tensors = {}
    mine = local if model.shard_mode == 'none' else (lambda tensor: tensor)
    model.reshard()  # after a forward without backward the root still shows its gathered parameters, not the optimizer's
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors[f'model.{name}'] = mine(p.detach())
            for key, value in optimizer.state[p].items():
                tensors[f'optimizer.{name}.{key}'] = mine(value) if value.dim() else value[None]
    return tensors


@functools.cache
def _own_group(everybody):
    """A gloo group for the thread that writes: in the default group its collectives would mix with those of training."""
    return dist.new_group(backend='gloo')


def save(out_dir, examples, model, optimizer, state, keep_last):
    """Begin to write a checkpoint of weights, optimizer, state (json-able) and every rank's random numbers.

    Returns as soon as everything is copied; wait() or the next save() raises UserError if the rest fails. Once it is complete
    out_dir/latest names it, and all but the newest keep_last are removed."""
    global _pending
    wait()
    folder = Path(out_dir) / 'checkpoints' / f'{examples:010d}'

    def clear():
        # what a killed run has left half written
        with writing(folder):
            for half in {folder.with_suffix('.tmp'), *folder.parent.glob('*.tmp')}:
                if NUMBER.fullmatch(half.stem):
                    make_room(half)

    on_one_rank(clear)
    tensors = _tensors(model, optimizer)
    if model.shard_mode == 'none':
        # all ranks have all of it: each writes some of the tensors, of all sizes
        by_size = sorted(tensors, key=lambda name: tensors[name].numel())
        tensors = {name: tensors[name] for name in by_size[dist.get_rank() :: dist.get_world_size()]}
    # copies of everything, for training goes on to change it
    copies = {name: tensor.to('cpu', copy=True) for name, tensor in tensors.items()}
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    rng = gather_objects({'cpu': torch.get_rng_state().tolist(), 'cuda': cuda})
    text = json.dumps({**state, 'examples': examples, 'rng': rng})
    _pending = _writer.submit(_write, folder, copies, text, keep_last, _own_group(dist.group.WORLD))


def failed():
    """Whether this rank knows by now that the checkpoint being written has failed; then let all ranks call wait()."""
    return _pending is not None and _pending.done() and _pending.exception() is not None


def wait():
    """Wait until the checkpoint being written is complete. On all ranks together. Raises UserError."""
    global _pending
    pending, _pending = _pending, None
    if pending:
        on_ranks(True, pending.result)


def _write(folder, copies, state, keep_last, group):
    """Runs on all ranks, in their threads: every rank writes its shard, then rank 0 does the rest. Raises UserError."""
    temporary, first = folder.with_suffix('.tmp'), dist.get_rank() == 0
    try:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(copies, storage_writer=writer, process_group=group)
        copies.clear()
        if first:
            _complete(temporary, folder, state, keep_last)
    except BaseException as error:  # a full disk, a rank that is gone, or a bug: none may pass unseen
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        # a CheckpointException has those of the ranks: rank -> (exception, traceback)
        causes = [failure[0] for failure in getattr(error, 'failures', {}).values()]
        cause = [error, *causes][-1]
        reason = getattr(cause, 'strerror', None) or f'{cause}'.partition('\n')[0]
        after = 'older ones are kept, and the same command continues from the newest of them'
        raise UserError(f'cannot write the checkpoint {folder}: {reason}; {after}') from None


def _complete(temporary, folder, state, keep_last):
    """Add state and manifest to the shards, give the folder its name, and remove the oldest checkpoints."""
    (temporary / 'state.json').write_text(state)
    manifest = json.dumps(_describe(temporary), indent=1)
    (temporary / 'manifest.json').write_text(manifest)
    # a checkpoint must not outlive the rows that led to it
    out_dir = folder.parent.parent
    append_kept()
    for name in ('metrics.jsonl', 'samples.jsonl', 'bad_step.jsonl'):
        sync(out_dir / name)
    move_folder(temporary, folder)
    replace_text(out_dir / 'latest', f'checkpoints/{folder.name}\n')
    # an old one that cannot be removed, such as a link, stays
    for old in [f for f in _folders(out_dir) if f.name <= folder.name][keep_last:]:
        shutil.rmtree(old, ignore_errors=True)


def _describe(folder):
    """name -> [size, SHA-256] of all that lies in a checkpoint, as its manifest lists it."""
    files = [file for file in folder.iterdir() if file.name != 'manifest.json']
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(file_hash, files))
    return {file.name: [file.stat().st_size, digest] for file, digest in zip(files, hashes, strict=True)}


# ---- resuming ----


def _folders(out_dir):
    """The checkpoint folders, newest first; whatever else lies there does not count."""
    found = Path(out_dir, 'checkpoints').glob('*')
    return sorted((f for f in found if NUMBER.fullmatch(f.name) and f.is_dir()), reverse=True)


def _damage(folder):
    """What is wrong with a checkpoint, or None: its folder must hold what its manifest lists, and nothing else."""
    try:
        manifest, found = json.loads((folder / 'manifest.json').read_text()), _describe(folder)
        for name in sorted(manifest.keys() | found.keys()):
            if manifest.get(name) != found.get(name):
                return f'{name} is not what its manifest says'
        examples = json.loads((folder / 'state.json').read_text())['examples']
        return None if examples == int(folder.name) else f'it is the checkpoint after {examples} examples'
    except OSError as error:
        return f'{Path(error.filename or folder).name}: {error.strerror}'
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return 'manifest.json cannot be read'


def latest(out_dir, run=None):
    """The newest complete checkpoint folder, the same on all ranks, or None where there is none. out_dir/latest is for people.

    run: of identify; raises UserError where config.json or that checkpoint is of another run. Damaged checkpoints are reported;
    where there are no others, UserError is raised: a run does not start over by itself."""
    return shared(lambda: _latest(out_dir, run))


def _latest(out_dir, run):
    """As latest, on one rank."""
    before = recorded(out_dir)
    if run and before:
        check_same(f'{out_dir} holds', before, run)
    damaged = []
    for folder in _folders(out_dir):
        reason = _damage(folder)
        if reason is None:
            break
        damaged.append(f'{folder} is damaged ({reason})')
    else:
        if damaged:
            raise UserError(f'no checkpoint is complete: {damaged[0]}; mend one, or delete {out_dir} to start over')
        return None
    if run:
        # older versions did not write down the run in a checkpoint
        there = json.loads((folder / 'state.json').read_text()).get('run', before)
        check_same(f'the checkpoint {folder} is of', there, run)
    for what in damaged:
        say(f'warning: the checkpoint {what}: going back to {folder.name}')
    return folder


def load(folder, model, optimizer):
    """Load a checkpoint, written on any number of ranks, into model and optimizer. Returns its state."""
    # a step of rate 0 makes the optimizer's tensors, to be loaded into; the scripts set the rate of every step anew
    model.reshard()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for group in optimizer.param_groups:
        group['lr'] = 0.0
    optimizer.step()
    optimizer.zero_grad()

    # names and shapes there and here
    reader = HuggingFaceStorageReader(str(folder))
    there = {name: tuple(tensor.size) for name, tensor in reader.read_metadata().state_dict_metadata.items()}
    if not any(name.startswith('optimizer.') for name in there):
        optimizer.state.clear()  # saved before the first step that changed the weights
    tensors = _tensors(model, optimizer)
    if there != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise UserError(f'the checkpoint {folder} is of another model or optimizer: choose another --out_dir')
    dcp.load(tensors, storage_reader=reader)

    # random draws go on where they were, if there are as many ranks
    state = json.loads((Path(folder) / 'state.json').read_text())
    rng, _ = state.pop('rng'), state.pop('run', None)
    if len(rng) == dist.get_world_size():
        mine = rng[dist.get_rank()]
        torch.set_rng_state(torch.tensor(mine['cpu'], dtype=torch.uint8))
        if mine['cuda'] and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(mine['cuda'], dtype=torch.uint8))
    return state
