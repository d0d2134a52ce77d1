"""What a sharded run writes: checkpoints, which a run on any number of ranks resumes from, and a Hugging Face folder.

Safetensors and json only. Every folder is written beside its place, brought to the disk and renamed, so that none is ever half
there; a checkpoint also lists the size and SHA-256 of its files, so that what happens to them later is seen on resume.
Checkpoints are written in the background, from a copy in the CPU's memory, while training goes on."""

import functools
import hashlib
import json
import shutil
import threading
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import lora
from configurator import UserError
from fsdp import gather_objects, on_one_rank
from log import replace_text, say, sync, writing

_pending = None  # the checkpoint that is being written: (thread, {'error': why it could not be})


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
    on_one_rank(lambda: shutil.rmtree(folder.with_suffix('.tmp'), ignore_errors=True))
    copies = {name: tensor.to('cpu', copy=True) for name, tensor in _tensors(model, optimizer).items()}
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    rng = {'cpu': torch.get_rng_state().tolist(), 'cuda': cuda}
    group, outcome = _own_group(dist.group.WORLD), {'error': None}
    text = json.dumps({**state, 'examples': examples})  # now: the script goes on to change it

    def work():
        try:
            outcome['error'] = _write(folder, copies, json.loads(text), rng, keep_last, group)
        except BaseException as error:  # a rank is gone, or a bug: neither may pass unseen
            outcome['error'] = f'{type(error).__name__}: {error}'
        if outcome['error']:
            outcome['error'] = (
                f'cannot write the checkpoint {folder}: {outcome["error"]}; older ones are kept, and the same '
            )
            outcome['error'] += 'command continues from the newest of them'

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
    temporary, rank, files, error = folder.with_suffix('.tmp'), dist.get_rank(), {}, None
    try:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(copies, storage_writer=writer, process_group=group)
        copies.clear()
        files = {f.name: _describe(f, to_disk=True) for f in temporary.glob(f'shard-{rank + 1:05d}-*')}
    except (dcp.api.CheckpointException, OSError) as e:
        error = _reason(e)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (files, rng, error), group=group)
    errors = [message for *_, message in parts if message]

    def finish():
        (temporary / 'state.json').write_text(json.dumps({**state, 'rng': [r for _, r, _ in parts]}))
        files = {name: f for found, *_ in parts for name, f in found.items()}
        files['state.json'] = _describe(temporary / 'state.json', to_disk=True)
        (temporary / 'manifest.json').write_text(json.dumps(files, indent=1))
        for name in (
            'metrics.jsonl',
            'samples.jsonl',
            'bad_step.jsonl',
        ):  # a checkpoint must not outlive what led to it
            sync(folder.parent.parent / name)
        _move(temporary, folder)
        replace_text(folder.parent.parent / 'latest', f'checkpoints/{folder.name}\n')
        for old in [f for f in _folders(folder.parent) if f.name <= folder.name][keep_last:]:
            shutil.rmtree(old)

    if rank == 0 and not errors:
        try:
            finish()
        except OSError as e:
            errors = [_reason(e)]
    verdict = [errors[0] if errors else None]
    dist.broadcast_object_list(verdict, 0, group=group)
    if rank == 0 and verdict[0]:
        shutil.rmtree(temporary, ignore_errors=True)
    return verdict[0]


def _reason(error):
    """What happened, in a few words."""
    for failure in getattr(error, 'failures', {}).values():  # of a CheckpointException: rank -> (exception, traceback)
        error = failure[0]
    return getattr(error, 'strerror', None) or f'{type(error).__name__}: {error}'.strip().splitlines()[0][:200]


def _describe(file, to_disk=False):
    """[size, SHA-256] of a file; to_disk: after the disk has it."""
    if to_disk:
        sync(file)
    with open(file, 'rb') as stream:
        return [file.stat().st_size, hashlib.file_digest(stream, 'sha256').hexdigest()]


def _move(temporary, folder):
    """Rename a folder, over another one if need be, after everything in it has reached the disk."""
    for path in (*temporary.rglob('*'), temporary):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync(folder.parent)


def _folders(parent):
    """The checkpoint folders, newest first."""
    return sorted((f for f in Path(parent).glob('*') if f.name.isdigit()), reverse=True)


def _damage(folder, rank=0, world=1):
    """What is wrong with a checkpoint, or None; of the files in its manifest this looks at every world-th."""
    try:
        manifest = json.loads((folder / 'manifest.json').read_text())
        for name in sorted(manifest)[rank::world]:
            size, digest = manifest[name]
            if (folder / name).stat().st_size != size:
                return f'{name} has {(folder / name).stat().st_size} bytes instead of {size}'
            if _describe(folder / name) != [size, digest]:
                return f'the contents of {name} have changed'
    except OSError as error:
        return f'{Path(error.filename or folder).name}: {error.strerror}'
    except (ValueError, TypeError, AttributeError):
        return 'manifest.json cannot be read'


def _put_aside(folder):
    with writing(folder):
        shutil.rmtree(folder.with_suffix('.damaged'), ignore_errors=True)
        folder.rename(folder.with_suffix('.damaged'))


def latest(out_dir):
    """The newest complete checkpoint folder, the same on all ranks, or None where there is none.

    Removes what a killed run has left half written. Damaged checkpoints are reported and put aside as <examples>.damaged, and
    UserError is raised if there are no others: a run does not start over by itself. out_dir/latest is for people."""

    def clean():
        for path in (*Path(out_dir).glob('*.tmp'), *Path(out_dir).glob('checkpoints/*.tmp')):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return _folders(Path(out_dir) / 'checkpoints')

    with writing(out_dir):
        folders = gather_objects(on_one_rank(clean))[0]
    damaged = []
    for folder in folders:
        found = gather_objects(_damage(folder, dist.get_rank(), dist.get_world_size()))
        if not any(found):
            break
        damaged.append((folder, next(filter(None, found))))
    else:
        if damaged:
            what = f'{damaged[0][0]}: {damaged[0][1]}'
            raise UserError(f'no checkpoint of {out_dir} is complete ({what}): delete {out_dir} to start over')
        return None
    for bad, why in damaged:
        say(f'warning: the checkpoint {bad} is damaged ({why}): going back to {folder.name}')
        on_one_rank(lambda bad=bad: _put_aside(bad))
    return folder


def load(folder, model, optimizer):
    """Load a checkpoint, written on any number of ranks, into model and optimizer. Returns its state."""
    model.reshard()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for group in optimizer.param_groups:
        group['lr'] = 0.0  # the scripts set the rate of every step anew
    optimizer.step()  # makes the optimizer's tensors, to be loaded into
    optimizer.zero_grad()
    reader = HuggingFaceStorageReader(str(folder))
    if not any(name.startswith('optimizer.') for name in reader.read_metadata().state_dict_metadata):
        optimizer.state.clear()  # saved before the first step that changed the weights
    dcp.load(_tensors(model, optimizer), storage_reader=reader)
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
    wait()
    model.reshard()
    few = lora.present(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=few)
    weights = get_model_state_dict(model, options=options)
    unique = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}

    def write():
        temporary, adapter = Path(f'{folder}.tmp'), Path(folder).with_name('adapter')
        shutil.rmtree(temporary, ignore_errors=True)
        if few:
            merged = lora.merge(build(empty=False), weights, adapter.with_suffix('.tmp'))
            _move(adapter.with_suffix('.tmp'), adapter)
            merged.save_pretrained(temporary)
        else:
            shell = build(empty=True)  # saving through the sharded model would write its changed class name
            shell.all_tied_weights_keys = {}
            shell.save_pretrained(temporary, state_dict={k: v for k, v in weights.items() if k in unique})
        tokenizer.save_pretrained(temporary)
        _move(temporary, Path(folder))

    def guarded():
        try:
            with writing(folder):
                write()
        except UserError:
            # what is half written would take the room that the next try needs
            for name in (Path(folder).name, 'adapter'):
                shutil.rmtree(Path(folder).with_name(f'{name}.tmp'), ignore_errors=True)
            raise

    on_one_rank(guarded)
