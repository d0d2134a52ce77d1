"""Checkpoints of a sharded run, which a run on any number of ranks resumes from.

Safetensors and json only. Every folder is written beside its place, brought to the disk and renamed, so that none is ever half
there; a checkpoint also lists the size and SHA-256 of its files, so that what happens to them later is seen on resume. What the run is
made of (options, hashes of models and data) stands in config.json and in every checkpoint, and must be the same on resume.
Checkpoints are written in the background, from a copy in the CPU's memory, while training goes on."""

import functools
import json
import re
import shutil
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from configurator import Config, UserError
from fsdp import gather_objects, local, on_one_rank, shared
from runtime.files import file_hash, make_room, move_folder, replace_text, say, say_once, sync, writing
from runtime.log import NEUTRAL, WRITTEN, differences, recorded

NUMBER = re.compile('[0-9]{10,}')  # the name of a checkpoint: its examples
_pending = None  # the checkpoint that is being written: (thread, {'error': why it could not be})


# ---- which run it is of ----


def identify(config, models, train, held_out):
    """What this run is made of, json-able and the same on all ranks: its script, the options that matter, and contents.

    contents: hashes of the models, which models() returns (load.fingerprints), and of the tokens of both Examples. Raises
    UserError where ranks have read different data."""
    data = {'training examples': train.content(), 'evaluation examples': held_out.content()}
    for rank, other in enumerate(gather_objects(data)):
        differing = [name for name in data if other[name] != data[name]]
        if differing:
            what = f'rank {rank} has read other {differing[0]} than rank {dist.get_rank()}'
            raise UserError(f'{what}: all hosts must see the same files')
    options = Config({k: v for k, v in config.items() if k not in NEUTRAL})
    options.origin = config.origin
    contents = shared(models) | data
    return {'script': Path(sys.argv[0]).name, 'options': options, 'contents': contents}


def _check_same(what, before, run):
    """Raise UserError where before is another run than run; say what an older version did not write down of it.

    what: begins the sentence."""
    changes = differences(before, run)
    if changes:
        what = f'{what} a different run ({", ".join(changes[:3])})'
        raise UserError(f'{what}: put back what it began with, or choose another --out_dir')
    older = f'note: {what} a run of an older version'
    unknown = ', '.join(sorted(run['contents'].keys() - before['contents'].keys()))
    if unknown:
        say(f'{older}, which kept no hash of {unknown}: not checked')
    added = ', '.join(sorted(run['options'].keys() - before['options'].keys()))
    if added:
        say(f'{older}, without the options {added}: taken at their defaults')


def _check_checkpoint(out_dir, folder, run):
    """Raise UserError where a checkpoint is of another run, or nothing says which run it is of."""
    before = json.loads((folder / 'state.json').read_text()).get('run')
    if before is not None:
        return _check_same(f'the checkpoint {folder} is of', before, run)
    older = f'the checkpoint {folder} is of an older version, which did not write down its run'
    if not (Path(out_dir) / 'config.json').exists():
        raise UserError(f'{older}, nor does {out_dir}/config.json: put that back, or choose another --out_dir')
    say(f'note: {older}: that it is this one is not checked')


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
    """out_dir/checkpoints/<examples>/: weights and optimizer (safetensors), state and every rank's RNG (json), manifest.

    Returns as soon as everything is copied; the rest happens in a thread, and wait() or the next save() raises UserError if it
    failed. Once it is complete out_dir/latest names it, and all but the newest keep_last are removed. state: json-able."""
    global _pending
    wait()
    folder = Path(out_dir) / 'checkpoints' / f'{examples:010d}'

    def free_name():
        with writing(folder):
            make_room(folder.with_suffix('.tmp'))

    on_one_rank(free_name)
    # copies of everything, for training goes on to change it
    tensors = _tensors(model, optimizer)
    if model.shard_mode == 'none':
        # all ranks have all of it: each writes some of the tensors, of all sizes
        by_size = sorted(tensors, key=lambda name: tensors[name].numel())
        mine = set(by_size[dist.get_rank() :: dist.get_world_size()])
        tensors = {name: tensor for name, tensor in tensors.items() if name in mine}
    copies = {name: tensor.to('cpu', copy=True) for name, tensor in tensors.items()}
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    rng = {'cpu': torch.get_rng_state().tolist(), 'cuda': cuda}
    text = json.dumps({**state, 'examples': examples})
    group, outcome = _own_group(dist.group.WORLD), {'error': None}

    def work():
        try:
            error = _write(folder, copies, json.loads(text), rng, keep_last, group)
        except BaseException as e:  # a rank is gone, or a bug: neither may pass unseen
            error = f'{type(e).__name__}: {e}'
        if error:
            after = 'older ones are kept, and the same command continues from the newest of them'
            outcome['error'] = f'cannot write the checkpoint {folder}: {error}; {after}'

    _pending = threading.Thread(target=work, daemon=True), outcome
    _pending[0].start()


def failed():
    """Whether this rank knows by now that the checkpoint being written has failed; then let all ranks call wait()."""
    return _pending is not None and _pending[1]['error'] is not None


def wait():
    """Wait until the checkpoint being written is complete. On all ranks together. Raises UserError."""
    global _pending
    if _pending is None:
        return
    (thread, outcome), _pending = _pending, None
    thread.join()
    if outcome['error']:
        raise UserError(outcome['error'])


def _write(folder, copies, state, rng, keep_last, group):
    """Runs on all ranks, in their threads. Returns None, or why the checkpoint could not be written: the same on all."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    # every rank writes and describes its own shard
    temporary, rank, files, error = folder.with_suffix('.tmp'), dist.get_rank(), {}, None
    try:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(copies, storage_writer=writer, process_group=group)
        copies.clear()
        for file in temporary.glob(f'shard-{rank + 1:05d}-*'):
            sync(file)
            files[file.name] = _describe(file)
    except (dcp.api.CheckpointException, OSError) as e:
        error = _reason(e)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (files, rng, error), group=group)

    # rank 0 does the rest, and all hear how it went
    verdict = [next((error for *_, error in parts if error), None)]
    if rank == 0 and not verdict[0]:
        state['rng'] = [rng for _, rng, _ in parts]
        manifest = {name: described for files, *_ in parts for name, described in files.items()}
        try:
            _complete(folder, state, manifest, keep_last)
        except OSError as e:
            verdict = [_reason(e)]
    dist.broadcast_object_list(verdict, 0, group=group)
    if rank == 0 and verdict[0]:
        shutil.rmtree(temporary, ignore_errors=True)
    return verdict[0]


def _complete(folder, state, manifest, keep_last):
    """Add state and manifest to the shards, give the folder its name, and remove the oldest. Raises OSError."""
    temporary, out_dir = folder.with_suffix('.tmp'), folder.parent.parent
    state_file = temporary / 'state.json'
    state_file.write_text(json.dumps(state))
    sync(state_file)
    manifest['state.json'] = _describe(state_file)
    (temporary / 'manifest.json').write_text(json.dumps(manifest, indent=1))
    # a checkpoint must not outlive the rows that led to it
    for name in ('metrics.jsonl', 'samples.jsonl', 'bad_step.jsonl'):
        sync(out_dir / name)
    move_folder(temporary, folder)
    replace_text(out_dir / 'latest', f'checkpoints/{folder.name}\n')
    # an old one that cannot be removed, such as a link, stays: the run goes on
    for old in [f for f in _folders(folder.parent) if f.name <= folder.name][keep_last:]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            say_once(f'note: the old checkpoint {old} cannot be removed: {error.strerror or error}')


def _describe(file):
    """[size, SHA-256] of a file, as in the manifest."""
    return [file.stat().st_size, file_hash(file)]


def _reason(error):
    """What happened, in a few words."""
    for failure in getattr(error, 'failures', {}).values():  # of a CheckpointException: rank -> (exception, traceback)
        error = failure[0]
    return getattr(error, 'strerror', None) or f'{type(error).__name__}: {error}'.strip().splitlines()[0][:200]


# ---- resuming ----


def _folders(parent):
    """The checkpoint folders, newest first; whatever else lies there does not count."""
    return sorted((f for f in Path(parent).glob('*') if NUMBER.fullmatch(f.name) and f.is_dir()), reverse=True)


def _damage(folder, rank=0, world=1):
    """What is wrong with a checkpoint, or None; of the files in its manifest this looks at every world-th."""
    try:
        manifest = json.loads((folder / 'manifest.json').read_text())
        # whatever ends in .safetensors would be read, so a file too many is damage as well
        extra = sorted({str(f.relative_to(folder)) for f in folder.rglob('*')} - {*manifest.keys(), 'manifest.json'})
        if extra:
            return f'{extra[0]} is not in its manifest'
        if 'state.json' not in manifest or not any(name.endswith('.safetensors') for name in manifest):
            return 'manifest.json does not list a whole checkpoint'
        for name in sorted(manifest)[rank::world]:
            if _describe(folder / name) != manifest[name]:
                return f'the contents of {name} have changed'
        examples = json.loads((folder / 'state.json').read_text())['examples']
        if examples != int(folder.name):
            return f'it is the checkpoint after {examples} examples, under another name'
    except OSError as error:
        return f'{Path(error.filename or folder).name}: {error.strerror}'
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return 'manifest.json cannot be read'


def _clean(out_dir):
    """Remove what a killed run has left half written in its out_dir: names of ours alone, no links, and nothing on a first run."""
    folder = Path(out_dir)
    if not (folder / 'config.json').exists():
        return
    files = [folder / f'{name}.tmp' for name in ('config.json', *WRITTEN)]
    for path in files + [f for f in folder.glob('checkpoints/*.tmp') if NUMBER.fullmatch(f.stem)]:
        if path.exists() and not path.is_symlink():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def latest(out_dir, run=None):
    """The newest complete checkpoint folder, the same on all ranks, or None where there is none. run: of identify, or None to take
    any: raises UserError where config.json or that checkpoint is of another run.

    Removes what a killed run has left half written. Damaged checkpoints are reported and put aside as <examples>.damaged, and
    UserError is raised if there are no others: a run does not start over by itself. out_dir/latest is for people."""

    def begin():
        before = recorded(out_dir) if run else None
        if before:
            _check_same(f'{out_dir} holds', before, run)
        with writing(out_dir):
            _clean(out_dir)
        return _folders(Path(out_dir) / 'checkpoints')

    folders = shared(begin)
    # all ranks look at a part of each, from the newest to the first that is whole
    damaged = {}
    for folder in folders:
        found = gather_objects(_damage(folder, dist.get_rank(), dist.get_world_size()))
        if not any(found):
            break
        damaged[folder] = next(filter(None, found))
    if not folders:
        return None
    if len(damaged) == len(folders):
        what = f'no checkpoint of {out_dir} is complete ({folders[0]}: {damaged[folders[0]]})'
        raise UserError(f'{what}: mend one, or delete {out_dir} to start over')
    if run:
        on_one_rank(lambda: _check_checkpoint(out_dir, folder, run))
    for bad, why in damaged.items():
        say(f'warning: the checkpoint {bad} is damaged ({why}): going back to {folder.name}')

    def put_aside():
        for bad in damaged:
            with writing(bad):
                make_room(bad.with_suffix('.damaged'))
                bad.rename(bad.with_suffix('.damaged'))

    on_one_rank(put_aside)
    return folder


def load(folder, model, optimizer):
    """Load a checkpoint, written on any number of ranks, into model and optimizer. Returns its state."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

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
    here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if wrong:
        what = f'{wrong[0]} has the shape {there.get(wrong[0])} there and {here.get(wrong[0])} here'
        raise UserError(f'the checkpoint {folder} is of another model or optimizer ({what}): choose another --out_dir')
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
