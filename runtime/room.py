"""Before the first step: whether the disk has room for what a run leaves, and a CPU's memory for what it takes.

Nothing heavy is imported up here: guard.py, which scripts import first, is used beside this."""

import contextlib
import os
import shutil
from pathlib import Path

from configurator import UserError
from runtime.files import say


def check_room(config, policy, forward, train, total, packed, others=()):
    """Before the first step: refuse a disk that cannot hold what the run will leave, and say on a CPU what memory it takes.

    config: the script's options; forward(batch) -> a tensor, the pass of the policy that trains; train: the Examples; total:
    how many of them; others: more models in memory, or None. On all ranks together. Raises UserError."""
    import torch

    import fsdp
    from hf.quantize import packed_weights

    # bytes, of all ranks together; weights, moments and gradients are float32, of 4 bytes; not in the model that is left
    moments = {'AdamW': 2, 'RMSprop': 1, 'SGD': 0}[config['optimizer']]
    trained = 4 * sum(p.numel() for p in policy.parameters() if p.requires_grad)
    # ppo's value head or critic is in checkpoints, but not in the model that it leaves
    left = [p for name, p in policy.named_parameters() if not {'critic', 'value_head'} & set(name.split('.'))]
    size = 4 if config['save_dtype'] == 'float32' else 2
    model = size * (sum(p.numel() for p in left) + packed_weights(policy))
    checkpoint = trained * (1 + moments)
    fsdp.on_one_rank(lambda: _check_disk(config, model, checkpoint, total))

    # what stays in a CPU's memory: a checkpoint's arrays, gradients, and weights that do not train
    if not torch.cuda.is_available():
        frozen = [p for p in policy.parameters() if not p.requires_grad] + list(policy.buffers())
        for other in others:
            if other is not None and other is not policy:
                frozen += other.parameters()
        state = checkpoint + trained + sum(p.numel() * p.element_size() for p in frozen)
        _check_memory(config, policy, forward, train, packed, state)


def _check_disk(config, model, checkpoint, total):
    """Raise UserError where the disk of out_dir has no room for the model, and for the checkpoints that will be kept. In bytes."""
    out_dir, every = config['out_dir'], config['save_every']
    # one more than are kept, since an old one goes when the new one is complete; none at the very end
    count = 0
    if every:
        count = min(config['keep_last'] + 1, (total - 1) // every)
    there = len([f for f in Path(out_dir).glob('checkpoints/*') if f.name.isdigit()])
    more = max(0, count - there)
    free = shutil.disk_usage(out_dir).free
    if model + more * checkpoint > free:
        what = f'the model takes {_size(model)}'
        if more:
            what += f', and {more} checkpoints take {_size(checkpoint)} each'
        where = f'{out_dir} lies on a disk with {_size(free)} free'
        raise UserError(f'{where}: {what}; make room, or choose another --out_dir')


def _check_memory(config, policy, forward, train, packed, state):
    """Say what the largest microbatch takes, and warn where the machine has less. state: bytes of what stays, on all ranks."""
    import torch.distributed as dist

    per_token = _bytes_per_token(policy, forward, train, packed)
    ranks = dist.get_world_size()
    here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # ranks on this machine
    # tokens of the largest microbatch; where whole steps are smaller, no more than their longest examples
    longest = int(train.lengths.max())
    tokens = max(config['max_tokens'], longest)
    if packed and 'minibatch_size' not in config:
        copies = 1 if config.get('share_prefix', True) else 2  # of a prompt
        largest_step = int(sum(sorted(train.lengths)[-config['batch_size'] :])) * copies
        tokens = min(tokens, max(longest, largest_step // ranks))

    # bytes on this machine, where ranks have copies of the model or share one
    parts = 1 if policy.shard_mode == 'none' else ranks
    state = state / parts * here
    activations = per_token * tokens * here
    has = machine_memory()
    takes = f'takes about {_size(activations)}, weights, gradients and optimizer {_size(state)}'
    text = f'memory: a microbatch of up to {tokens:,} tokens {takes}'
    if has:
        text += f', of the {_size(has)} of this machine'
    if not has or state + activations <= has:
        return say(text)
    fits = int((has - state) / (per_token * here))
    advice = f'lower --max_tokens to {fits:,}, which changes no result, or try --activation_checkpointing'
    if fits < longest:
        advice = 'try --activation_checkpointing, shorter examples (--max_length), --lora_rank, or a smaller model'
    say(f'warning: {text}: the system may kill this process; {advice}')


def _bytes_per_token(policy, forward, train, packed):
    """Bytes that one token keeps for backward: those of a forward, and of the one block that is recomputed just then, if any is."""
    saved = bytes_saved(policy, forward, train, packed)
    # blocks that recompute are known by their training mode, for sharding has renamed their class
    recomputing = [module for module in policy.modules() if module.training]
    if recomputing:
        for block in recomputing:
            block.training = False
        saved += bytes_saved(policy, forward, train, packed) / len(recomputing)
        for block in recomputing:
            block.training = True
    return saved


def bytes_saved(policy, forward, train, packed):
    """Bytes that one token's forward keeps for backward, from a forward of one example of ordinary length."""
    import torch

    import fsdp
    from data import pack

    by_length = sorted(range(len(train)), key=lambda i: train.lengths[i])
    middle = by_length[len(train) // 2]
    batch = pack([train[middle]], [0], pad=not packed)
    kept = {}  # address -> storage: while it is held, nothing else gets its address

    def storage_of(tensor):
        return fsdp.local(tensor).untyped_storage()  # with tensor parallelism: of this rank's part

    def note(tensor):
        storage = storage_of(tensor)
        kept[storage.data_ptr()] = storage
        return tensor

    # a draw of the adapters' dropout would change what training draws
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), fsdp.unsharded(policy):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            forward(batch)
        # the weights are there anyway
        for p in policy.parameters():
            kept.pop(storage_of(p).data_ptr(), None)
        return sum(storage.nbytes() for storage in kept.values()) / batch.ids.numel()


def machine_memory():
    """Bytes of memory of this machine, or of the control group of this process where that has less; None: not known."""
    try:
        limits = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    except (ValueError, OSError):
        return None
    groups = ''
    with contextlib.suppress(OSError):
        groups = Path('/proc/self/cgroup').read_text()
    for line in groups.splitlines():
        # version 2 has one tree for everything, and names no controllers; version 1 has a tree for memory
        _, controllers, path = line.split(':', 2)
        root, name = Path('/sys/fs/cgroup'), 'memory.max'
        if controllers:
            root, name = root / 'memory', 'memory.limit_in_bytes'
        if controllers and 'memory' not in controllers.split(','):
            continue
        # a group has no more than any that it lies in; a container may see its own as the root
        group = root / path.lstrip('/')
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text()))
    return min(limits)


def _size(number):
    """Bytes for people: 1.2 GB."""
    return f'{number / 1e9:.1f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'
