"""Checkpoints of a sharded run, from which a run on any number of ranks can resume.

out_dir/checkpoints/N/ holds what a run is after N examples: weights and optimizer (*.safetensors), state.json, and manifest.json,
which lists the size and the SHA-256 of every other file. save() copies all of this into the CPU's memory and returns. A thread
writes the copy into N.tmp, and renames that folder to N once it is complete and on the disk.

training.py calls identify() and latest() before the first step, then load() if there is a checkpoint, and save() in between."""

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

NUMBER = re.compile('[0-9]{10,}')  # a checkpoint folder's name: its number of examples, padded with zeros to ten digits
_writer = ThreadPoolExecutor(1)
_pending = None  # the future of the checkpoint that is being written


def identify(config, models, train, held_out):
    """Return a description of this run, by which a resumed run recognises its own checkpoints. Call it on all ranks together.

    models() returns hashes of the models. train and held_out are the Examples. The description can be written as json and is the
    same on all ranks: 'script' (a file name), 'options' (a Config without the options that may change), and 'contents' (hashes
    of models and examples). Raises UserError if ranks have read different data."""
    data_hashes = {'training examples': train.content(), 'evaluation examples': held_out.content()}
    for other_rank, other_hashes in enumerate(gather_objects(data_hashes)):
        if other_hashes != data_hashes:
            ranks = f'rank {other_rank} has read other data than rank {dist.get_rank()}'
            raise UserError(f'{ranks}: all hosts must see the same files')

    # the comparison asks origin which options have only their default
    options = Config({name: value for name, value in config.items() if name not in NEUTRAL})
    options.origin = config.origin
    return {'script': Path(sys.argv[0]).name, 'options': options, 'contents': shared(models) | data_hashes}


# ---- writing ----


def _live_tensors(model, optimizer):
    """Return name -> tensor of the trained weights and the optimizer's numbers: the tensors in use, not copies of them.

    load() writes into these tensors. Weights that are tied to one another appear once, under their first name."""
    # after a forward without backward the root still shows its gathered parameters, which are not the ones of the optimizer
    model.reshard()
    # a DTensor is written shard by shard; a replica has all of each tensor, and is written as plain tensors
    is_replica = model.shard_mode == 'none'
    tensors = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        weight = p.detach()
        tensors[f'model.{name}'] = local(weight) if is_replica else weight
        for key, value in optimizer.state[p].items():
            # AdamW's count of steps has no dimension, which the file format cannot hold: give it one
            if value.dim() == 0:
                value = value[None]
            elif is_replica:
                value = local(value)
            tensors[f'optimizer.{name}.{key}'] = value
    return tensors


def save(out_dir, examples, model, optimizer, state, keep_last):
    """Begin to write the checkpoint after so many examples: weights, optimizer, state and every rank's random state.

    Returns as soon as all of it is copied; a thread writes the copy. When it is complete, out_dir/latest names it, and all but
    the newest keep_last checkpoints are removed. state: a json-able dict. Call it on all ranks together. Raises UserError if the
    checkpoint before this one has failed, or if the folder cannot be prepared. If the thread fails, wait() or the next save()
    raises its UserError."""
    global _pending
    wait()
    folder = Path(out_dir) / 'checkpoints' / f'{examples:010d}'
    on_one_rank(lambda: _remove_unfinished(folder))

    # replicas have the same tensors: each rank writes some of the large and some of the small ones
    tensors = _live_tensors(model, optimizer)
    if model.shard_mode == 'none':
        by_size = sorted(tensors, key=lambda name: tensors[name].numel())
        names_of_this_rank = by_size[dist.get_rank() :: dist.get_world_size()]
        tensors = {name: tensors[name] for name in names_of_this_rank}

    # training goes on to change the tensors while the thread writes
    copies = {name: tensor.to('cpu', copy=True) for name, tensor in tensors.items()}
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    rng_of_ranks = gather_objects({'cpu': torch.get_rng_state().tolist(), 'cuda': cuda})
    state_text = json.dumps({**state, 'examples': examples, 'rng': rng_of_ranks})
    _pending = _writer.submit(_write, folder, copies, state_text, keep_last, _own_group(dist.group.WORLD))


def _remove_unfinished(folder):
    """Remove the .tmp folders of checkpoints that a killed run left half written, so that nothing is in the way of folder."""
    with writing(folder):
        for unfinished in {folder.with_suffix('.tmp'), *folder.parent.glob('*.tmp')}:
            # a .tmp of another name is somebody else's
            if NUMBER.fullmatch(unfinished.stem):
                make_room(unfinished)


@functools.cache
def _own_group(default_group):
    """Return a group of all ranks for the thread that writes, made once for each default group.

    In the default group the thread's collectives would mix with those of training."""
    return dist.new_group(backend='gloo')


def failed():
    """Return whether this rank knows that the checkpoint being written has failed. All ranks should call wait() then."""
    return _pending is not None and _pending.done() and _pending.exception() is not None


def wait():
    """Wait until the checkpoint being written, if any, is complete. Raises UserError if it fails. On all ranks together."""
    global _pending
    pending = _pending
    # forget it first: its error is raised once
    _pending = None
    # every rank waits for its own thread, and an error of any is raised on all
    if pending:
        on_ranks(True, pending.result)


def _write(folder, copies, state_text, keep_last, group):
    """Write the checkpoint; runs in a background thread on every rank. Raises UserError.

    Each rank saves its tensors (copies, emptied afterwards), then rank 0 adds the metadata and renames the folder."""
    temporary = folder.with_suffix('.tmp')
    is_first_rank = dist.get_rank() == 0
    try:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(copies, storage_writer=writer, process_group=group)
        # free the copies, as large as the model, before rank 0 spends seconds on hashing
        copies.clear()
        if is_first_rank:
            _complete(temporary, folder, state_text, keep_last)
    # BaseException: DCP's CheckpointException is not a subclass of Exception
    except BaseException as error:
        if is_first_rank:
            shutil.rmtree(temporary, ignore_errors=True)
        advice = 'older ones are kept, and the same command continues from the newest of them'
        raise UserError(f'cannot write the checkpoint {folder}: {_reason(error)}; {advice}') from None


def _reason(error):
    """Return in one line why writing a checkpoint has failed."""
    # a CheckpointException wraps the errors of ranks, as rank -> (error, traceback): one of them says why
    errors_of_ranks = list(getattr(error, 'failures', {}).values())
    if errors_of_ranks:
        error, _traceback = errors_of_ranks[-1]
    # an error of the system has a short text of its own
    first_line, _, _ = str(error).partition('\n')
    return getattr(error, 'strerror', None) or first_line


def _complete(temporary, folder, state_text, keep_last):
    """Add state and manifest to the tensors in temporary, rename it to folder, and keep only the newest keep_last checkpoints."""
    (temporary / 'state.json').write_text(state_text)
    (temporary / 'manifest.json').write_text(json.dumps(_manifest_of(temporary), indent=1))

    # flush the logs first (append_kept raises on a full disk): a resumed run does not rewrite rows from before its checkpoint
    out_dir = folder.parent.parent
    append_kept()
    for name in ('metrics.jsonl', 'samples.jsonl', 'bad_step.jsonl'):
        sync(out_dir / name)
    move_folder(temporary, folder)
    replace_text(out_dir / 'latest', f'checkpoints/{folder.name}\n')

    # newest first; skip later checkpoints, which are damaged if the run has resumed from an earlier one
    candidates = [path for path in _folders(out_dir) if path.name <= folder.name]
    for old in candidates[keep_last:]:
        # best effort: a symlink cannot be removed this way
        shutil.rmtree(old, ignore_errors=True)


def _manifest_of(folder):
    """Return name -> [size, SHA-256] of every file in a checkpoint folder, except the manifest itself."""
    files = [file for file in folder.iterdir() if file.name != 'manifest.json']
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(file_hash, files))
    return {file.name: [file.stat().st_size, digest] for file, digest in zip(files, hashes, strict=True)}


# ---- resuming ----


def _folders(out_dir):
    """Return the checkpoint folders of out_dir, newest first. Anything in there without a checkpoint's name is left out."""
    entries = Path(out_dir, 'checkpoints').glob('*')
    folders = [entry for entry in entries if NUMBER.fullmatch(entry.name) and entry.is_dir()]
    # zeros pad the names, so their order is that of their numbers
    return sorted(folders, reverse=True)


def _damage(folder):
    """Return what is wrong with a checkpoint folder, or None if it holds exactly what its manifest lists."""
    try:
        manifest = json.loads((folder / 'manifest.json').read_text())
        present = _manifest_of(folder)
        for name in sorted(manifest.keys() | present.keys()):
            if manifest.get(name) != present.get(name):
                return f'{name} is not what its manifest says'
        # a whole checkpoint may have been copied over another one
        examples = json.loads((folder / 'state.json').read_text())['examples']
        if examples != int(folder.name):
            return f'it is the checkpoint after {examples} examples'
        return None
    except OSError as error:
        return f'{Path(error.filename or folder).name}: {error.strerror}'
    # json that is broken, or of another kind than a dict
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return 'manifest.json cannot be read'


def latest(out_dir, run=None):
    """Return the folder of the newest complete checkpoint, the same on all ranks, or None if out_dir has no checkpoint at all.

    The folders decide, for out_dir/latest is only a note for people. run: the result of identify(), if it is to be compared.
    Warns of each damaged checkpoint that is passed over. Raises UserError if all are damaged, since a run must not start over by
    itself, and if config.json or the checkpoint belongs to another run."""
    return shared(lambda: _newest_complete(out_dir, run))


def _newest_complete(out_dir, run):
    """Return the newest undamaged checkpoint folder or None, as latest() describes; runs on rank 0, whose disk decides."""
    recorded_run = recorded(out_dir)
    if run and recorded_run:
        check_same(f'{out_dir} holds', recorded_run, run)

    damaged = []
    # newest first
    for folder in _folders(out_dir):
        damage = _damage(folder)
        if damage is None:
            break
        damaged.append(f'{folder} is damaged ({damage})')
    # no break: there is no complete checkpoint
    else:
        if damaged:
            raise UserError(f'no checkpoint is complete: {damaged[0]}; mend one, or delete {out_dir} to start over')
        return None

    if run:
        # checkpoints of older versions do not describe their run: fall back to config.json
        state = json.loads((folder / 'state.json').read_text())
        check_same(f'the checkpoint {folder} is of', state.get('run', recorded_run), run)
    for problem in damaged:
        say(f'warning: the checkpoint {problem}: going back to {folder.name}')
    return folder


def load(folder, model, optimizer):
    """Load a checkpoint, written on any number of ranks, into model and optimizer, and set this rank's random state.

    Returns the state that save() was given, with 'examples' added and without 'run'. Call it on all ranks together. Raises
    UserError if names or shapes of the tensors are not those of this model and optimizer."""
    _make_optimizer_state(model, optimizer)
    reader = HuggingFaceStorageReader(str(folder))
    saved_tensors = reader.read_metadata().state_dict_metadata
    saved_shapes = {name: tuple(tensor.size) for name, tensor in saved_tensors.items()}
    # a checkpoint from before the first step that changed the weights has no optimizer state
    if not any(name.startswith('optimizer.') for name in saved_shapes):
        optimizer.state.clear()

    tensors = _live_tensors(model, optimizer)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if saved_shapes != shapes:
        raise UserError(f'the checkpoint {folder} is of another model or optimizer: choose another --out_dir')
    dcp.load(tensors, storage_reader=reader)

    state = json.loads((Path(folder) / 'state.json').read_text())
    state.pop('run', None)
    _restore_rng(state.pop('rng'))
    return state


def _make_optimizer_state(model, optimizer):
    """Have the optimizer make its tensors, into which a checkpoint can then be loaded, without changing the weights.

    It makes them in its first step, so this is a step of learning rate 0. Later steps set the rate anew."""
    model.reshard()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for group in optimizer.param_groups:
        group['lr'] = 0.0
    optimizer.step()
    optimizer.zero_grad()


def _restore_rng(rng_of_ranks):
    """Set the random state of this rank to the one in a checkpoint, if that was written by as many ranks as there are now."""
    if len(rng_of_ranks) != dist.get_world_size():
        return
    rng = rng_of_ranks[dist.get_rank()]
    torch.set_rng_state(torch.tensor(rng['cpu'], dtype=torch.uint8))
    if rng['cuda'] and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(rng['cuda'], dtype=torch.uint8))
