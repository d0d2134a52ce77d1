"""Save and load checkpoints of a distributed run, which can resume on any number of ranks.

out_dir/checkpoints/N/ is the run after N examples: weights and optimizer state (*.safetensors), state.json, and
manifest.json with the size and SHA-256 of all other files. save() copies everything to CPU memory and returns.
A background thread writes the copy to N.tmp, and renames the folder once it is complete and flushed to disk."""

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
from runtime.files import append_kept, checked, clear_path, file_hash, move_folder, replace_text, say, sync, writing
from runtime.log import NEUTRAL, RUN, check_same, recorded
from runtime.ranks import PATIENCE, from_rank_0, gather_objects, on_rank_0, on_ranks

NUMBER = re.compile('[0-9]{10,}')  # name of a checkpoint folder: number of examples, zero-padded to ten digits
_writer = ThreadPoolExecutor(1)
_pending = None  # future of _write() for the checkpoint being written
# process group of the writer thread, whose collectives must not interleave with those of training: one for each dist.group.WORLD
_writer_group = functools.cache(lambda default_group: dist.new_group(backend='gloo', timeout=PATIENCE))


def identify(config, hash_models, train, held_out):
    """Return a JSON-serializable dict by which a run recognises its checkpoints, see check_same(). UserError if ranks' data differ.

    hash_models(): returns option -> hashes of its model; train, held_out: Examples. Collective; the same on all ranks."""
    data_hashes = {'training examples': train.content(), 'evaluation examples': held_out.content()}
    for other_rank, other_hashes in enumerate(gather_objects(data_hashes)):
        if other_hashes != data_hashes:
            ranks_differ = f'rank {other_rank} has read other data than rank {dist.get_rank()}'
            raise UserError(f'{ranks_differ}: all hosts must see the same files')
    options = Config({name: value for name, value in config.items() if name not in NEUTRAL})
    options.origin = config.origin  # check_same() wants to know which options are defaults
    return {'script': Path(sys.argv[0]).name, 'options': options, 'contents': from_rank_0(hash_models) | data_hashes}


def _live_tensors(model, optimizer):
    """Return name -> tensor of the optimizer's weights (tied ones by their first name) and state: no copies, load() writes into them.

    Also of model.kept, a dict of tensors that somebody has added, such as an EMA."""
    # after a forward without backward the root module shows unsharded parameters, which the optimizer does not own
    model.reshard()
    tensors = {f'kept.{name}': tensor for name, tensor in getattr(model, 'kept', {}).items()}
    trained = {p for group in optimizer.param_groups for p in group['params']}
    for name, p in model.named_parameters():
        if p not in trained:
            continue
        tensors[f'model.{name}'] = p.detach()
        for key, value in optimizer.state[p].items():
            # an optimizer of the user's may count steps in a Python number: make it a tensor, into which load() can write
            if isinstance(value, int | float):
                value = optimizer.state[p][key] = torch.tensor(float(value), dtype=torch.float64)
            # a tensor without dimensions (AdamW's step count) cannot be saved: use a view of shape (1,)
            if value.dim() == 0:
                value = value[None]
            tensors[f'optimizer.{name}.{key}'] = value
    return tensors


def save(out_dir, seen, model, optimizer, state, keep_last):
    """Start writing a checkpoint to out_dir/checkpoints; return once all data is copied. Collective.

    seen: number of examples so far; state: JSON-serializable dict to save along with weights, optimizer and RNG states. All but the
    newest keep_last checkpoints are deleted. UserError if the previous one failed; if this one fails, wait() or the next save() raises."""
    global _pending
    wait()
    folder = Path(out_dir) / 'checkpoints' / f'{seen:010d}'

    def remove_unfinished():  # delete the N.tmp folders of checkpoints that were interrupted
        with writing(folder):
            for unfinished in list(folder.parent.glob('*.tmp')):
                if NUMBER.fullmatch(unfinished.stem):
                    clear_path(unfinished)

    on_rank_0(remove_unfinished)
    tensors = _live_tensors(model, optimizer)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    # replicas hold the same tensors: each rank saves some of them, dealt out by size to balance the load
    if model.shard_mode == 'none':
        by_size = sorted(tensors, key=lambda name: tensors[name].numel())
        tensors = {name: tensors[name] for name in by_size[dist.get_rank() :: dist.get_world_size()]}
    # copy, because training changes the tensors while the thread writes
    copies = {name: tensor.to('cpu', copy=True) for name, tensor in tensors.items()}
    cuda_rng = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    rng_of_ranks = gather_objects({'cpu': torch.get_rng_state().tolist(), 'cuda': cuda_rng})
    state_text = json.dumps({**state, 'examples': seen, 'rng': rng_of_ranks})
    _pending = _writer.submit(_write, folder, copies, shapes, state_text, keep_last, _writer_group(dist.group.WORLD))


def _saved_shapes(reader):
    """Return name -> shape of the tensors in a checkpoint. reader: a HuggingFaceStorageReader of its folder."""
    saved = reader.read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in saved.items()}


def failed():
    """Return whether this rank's pending checkpoint has failed. If so, call wait() on all ranks to raise the error."""
    return _pending is not None and _pending.done() and _pending.exception() is not None


def wait():
    """Wait for the pending checkpoint, if any. Raises UserError on all ranks if it failed on any. Collective."""
    global _pending
    pending = _pending
    _pending = None  # reset first, so that the error is raised only once
    if pending:
        # result() waits, and raises the error of _write(), which on_ranks() then raises on the other ranks, too
        on_ranks(True, pending.result)


def _write(folder, copies, shapes, state_text, keep_last, group):
    """Write a checkpoint to folder: all ranks save their tensors, then rank 0 completes it. Runs in a background thread of each rank.

    copies: name -> CPU tensor, emptied once written; shapes: of all ranks' tensors; state_text: state.json; group: of these threads."""
    temporary = folder.with_suffix('.tmp')
    is_first_rank = dist.get_rank() == 0
    try:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(copies, storage_writer=writer, process_group=group)
        copies.clear()  # free the copies, as large as the model, before rank 0 spends seconds on hashing
        if is_first_rank:
            _complete(temporary, folder, shapes, state_text)
            _delete_old(folder, keep_last)
    # BaseException: DCP's CheckpointException is not a subclass of Exception
    except BaseException as error:
        if is_first_rank:
            shutil.rmtree(temporary, ignore_errors=True)
        # a CheckpointException has failures, rank -> (error, traceback): give the reason of one of them
        causes = [error, *(failure for failure, _traceback in getattr(error, 'failures', {}).values())]
        first_line, _, _ = str(causes[-1]).partition('\n')
        reason = getattr(causes[-1], 'strerror', None) or first_line
        advice = 'older ones are kept, and the same command continues from the newest of them'
        raise UserError(f'cannot write the checkpoint {folder}: {reason}; {advice}') from None


def _complete(temporary, folder, shapes, state_text):
    """Check the tensors that all ranks have saved in a temporary folder, add the other files, and rename it to folder: it is a checkpoint."""
    # each host may have a disk of its own
    if _saved_shapes(HuggingFaceStorageReader(str(temporary))) != shapes:
        raise OSError('it lacks what other ranks have written: all hosts must see one out_dir')
    (temporary / 'state.json').write_text(state_text)
    (temporary / 'manifest.json').write_text(json.dumps(_manifest_of(temporary), indent=1))
    # first put the logs on the disk: a run that resumes from here does not write their rows again
    out_dir = folder.parent.parent
    append_kept()  # rows that a full disk has held back; UserError if it is still full
    for name in ('metrics.jsonl', 'samples.jsonl', 'bad_step.jsonl'):
        sync(out_dir / name)
    move_folder(temporary, folder)
    replace_text(out_dir / 'latest', f'checkpoints/{folder.name}\n')


def _delete_old(folder, keep_last):
    """Delete all checkpoints but folder and the newest before it, keep_last together."""
    # those of more examples (their names have as many digits) do not count: the run has resumed from before them, so they are damaged
    newest_first = [path for path in _folders(folder.parent.parent) if path.name <= folder.name]
    for old in newest_first[keep_last:]:
        shutil.rmtree(old, ignore_errors=True)  # best effort: a symlink cannot be removed this way


def _manifest_of(folder):
    """Return file name -> [size, SHA-256] for all files in a checkpoint folder except manifest.json."""
    files = [file for file in folder.iterdir() if file.name != 'manifest.json']
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(file_hash, files)
        return {file.name: [file.stat().st_size, digest] for file, digest in zip(files, hashes, strict=True)}


def _folders(out_dir):
    """Return the checkpoint folders in out_dir, newest first."""
    entries = Path(out_dir, 'checkpoints').glob('*')
    folders = [entry for entry in entries if NUMBER.fullmatch(entry.name) and entry.is_dir()]
    return sorted(folders, reverse=True)  # zero-padded names sort as numbers


def _damage(folder):
    """Return what is wrong with a checkpoint folder, as a phrase, or None if its files match its manifest."""
    try:
        manifest = json.loads((folder / 'manifest.json').read_text())
        actual = _manifest_of(folder)
        for name in sorted(manifest.keys() | actual.keys()):
            if manifest.get(name) != actual.get(name):
                return f'{name} is not what its manifest says'
        # an intact checkpoint may have been copied into the wrong folder
        state = json.loads((folder / 'state.json').read_text())
        seen = state['examples']
        if 'run' in state:
            checked(state['run'], RUN)
        if seen != int(folder.name):
            return f'it is the checkpoint after {seen} examples'
        return None
    except OSError as error:
        return f'{Path(error.filename or folder).name}: {error.strerror}'
    # invalid JSON, or valid JSON of the wrong type
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return 'manifest.json or state.json cannot be read'


def latest(out_dir, run=None):
    """Return the newest undamaged checkpoint folder, or None if out_dir has no checkpoints. Warns of each one it skips. Collective.

    run: result of identify() to compare with, or None. Raises UserError if all are damaged, or if out_dir is of another run."""

    def look_on_disk():
        recorded_run = recorded(out_dir)
        if run and recorded_run:
            check_same(f'{out_dir} holds', recorded_run, run)

        problems = []  # of the checkpoints that are newer than the one to return
        for folder in _folders(out_dir):
            damage = _damage(folder)
            if damage:
                problems.append(f'{folder} is damaged ({damage})')
                continue
            if run:
                # checkpoints of older versions do not describe their run: fall back to config.json
                state = json.loads((folder / 'state.json').read_text())
                check_same(f'the checkpoint {folder} is of', state.get('run', recorded_run), run)
            for problem in problems:
                say(f'warning: the checkpoint {problem}: going back to {folder.name}')
            return folder
        if problems:  # do not silently start over
            raise UserError(f'no checkpoint is complete: {problems[0]}; mend one, or delete {out_dir} to start over')
        return None

    return from_rank_0(look_on_disk)


def _make_state(model, optimizer, saved):
    """Let an optimizer make the state tensors that are in a checkpoint with these names of tensors. Changes the weights, too."""
    for group in optimizer.param_groups:  # it makes them in its first step
        for p in group['params']:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    # now all parameters have state, but layers that never run had none when they were saved: drop theirs
    with_state = {name.rpartition('.')[0] for name in saved}  # optimizer.NAME.exp_avg -> optimizer.NAME
    for name, parameter in model.named_parameters():
        if f'optimizer.{name}' not in with_state:
            optimizer.state.pop(parameter, None)


def load(folder, model, optimizer):
    """Load a checkpoint into model and optimizer, and restore this rank's RNG state. UserError if its tensors differ. Collective.

    Returns the state passed to save(), plus 'examples', minus 'run'. With another number of ranks, RNG states stay as they are."""
    model.reshard()
    reader = HuggingFaceStorageReader(str(folder))
    saved_shapes = _saved_shapes(reader)
    _make_state(model, optimizer, saved_shapes)
    tensors = _live_tensors(model, optimizer)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if saved_shapes != shapes:
        raise UserError(f'the checkpoint {folder} is of another model or optimizer: choose another --out_dir')
    dcp.load(tensors, storage_reader=reader)
    state = json.loads((Path(folder) / 'state.json').read_text())
    state.pop('run', None)
    rng_of_ranks = state.pop('rng')
    if len(rng_of_ranks) == dist.get_world_size():
        rng = rng_of_ranks[dist.get_rank()]
        torch.set_rng_state(torch.tensor(rng['cpu'], dtype=torch.uint8))
        if rng['cuda'] and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(rng['cuda'], dtype=torch.uint8))
    return state
