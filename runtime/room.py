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

    sizes = _sizes(policy, config['optimizer'])
    fsdp.on_one_rank(lambda: _check_disk(config, sizes, total))
    if not torch.cuda.is_available():
        others = [m for m in others if m is not None and m is not policy]
        state = sizes['state'] + sum(p.numel() * p.element_size() for m in others for p in m.parameters())
        _check_memory(config, policy, forward, train, packed, state)


def _sizes(policy, optimizer):
    """Bytes of the exported model, of a checkpoint, and of weights, gradients and optimizer in memory, all ranks together."""
    moments = {'AdamW': 2, 'RMSprop': 1, 'SGD': 0}[optimizer]
    named = list(policy.named_parameters())
    # ppo's value head or critic is in checkpoints, but not in the model that it leaves
    left = [p for name, p in named if not {'critic', 'value_head'} & set(name.split('.'))]
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for _, p in named if not p.requires_grad)
    return {
        'model': 4 * sum(p.numel() for p in left),
        'checkpoint': 4 * trained * (1 + moments),
        'state': 4 * trained * (2 + moments) + frozen,
    }


def _check_disk(config, sizes, total):
    """Raise UserError where the disk of out_dir has no room for the model, and for the checkpoints that will be kept."""
    out_dir, every = config['out_dir'], config['save_every']
    # one more than are kept, since an old one goes when the new one is complete
    count = min(config['keep_last'] + 1, (total - 1) // every) if every else 0
    there = len([f for f in Path(out_dir).glob('checkpoints/*') if f.name.isdigit()])
    more = max(0, count - there)
    need, free = sizes['model'] + more * sizes['checkpoint'], shutil.disk_usage(out_dir).free
    if need > free:
        what = f'the model takes {_size(sizes["model"])}'
        if more:
            what += f', and {more} checkpoints take {_size(sizes["checkpoint"])} each'
        raise UserError(
            f'{out_dir} lies on a disk with {_size(free)} free: {what}; make room, or choose another --out_dir'
        )


def _check_memory(config, policy, forward, train, packed, state):
    """Say what the largest microbatch takes, and warn where the machine has less. state: bytes of what stays."""
    import torch.distributed as dist

    per_token = bytes_saved(policy, forward, train, packed)
    # activation checkpointing: a block's activations are there while backward is in it. Sharding renames the block's class
    recomputing = [module for module in policy.modules() if module.training]
    for block in recomputing:
        block.training = False
    if recomputing:
        per_token += bytes_saved(policy, forward, train, packed) / len(recomputing)
    for block in recomputing:
        block.training = True
    tokens = max(config['max_tokens'], int(train.lengths.max()))
    # where whole steps are smaller: no more than their longest examples
    ranks, here = dist.get_world_size(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if packed and 'minibatch_size' not in config:
        longest = sorted(train.lengths)[-config['batch_size'] :]
        most = int(sum(longest)) * (1 if config.get('share_prefix', True) else 2)
        tokens = min(tokens, max(int(longest[-1]), most // ranks))
    state, activations, has = state / ranks * here, per_token * tokens * here, machine_memory()
    text = f'a microbatch of up to {tokens:,} tokens takes about {_size(activations)}, weights, gradients and optimizer {_size(state)}'
    text += f', of the {_size(has)} of this machine' if has else ''
    if not has or state + activations <= has:
        return say(f'memory: {text}')
    fits = int((has - state) / (per_token * here))
    advice = f'lower --max_tokens to {fits:,}, which changes no result, or try --activation_checkpointing'
    if fits < train.lengths.max():
        advice = 'try --activation_checkpointing, shorter examples (--max_length), --lora_rank, or a smaller model'
    say(f'warning: memory: {text}: the system may kill this process; {advice}')


def bytes_saved(policy, forward, train, packed):
    """Bytes that one token's forward keeps for backward, from a forward of one example of ordinary length."""
    import torch

    import fsdp
    from data import pack

    middle = sorted(range(len(train)), key=lambda i: train.lengths[i])[len(train) // 2]
    batch = pack([train[middle]], [0], pad=not packed)
    own, kept = set(), {}

    def storage_of(tensor):
        # tensor parallelism: this rank's part
        return (tensor.to_local() if hasattr(tensor, 'to_local') else tensor).untyped_storage()

    def note(tensor):
        storage = storage_of(tensor)
        if storage.data_ptr() not in own:
            # the tensor goes along: while it lives, nothing else gets its address
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    # compiling for this one forward would take minutes
    eager = torch.compiler.set_stance('force_eager')
    # a draw of the adapters' dropout would change what training draws
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), fsdp.unsharded(policy), eager:
        own |= {storage_of(p).data_ptr() for p in policy.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            forward(batch)
    return sum(size for size, _ in kept.values()) / batch.ids.numel()


def machine_memory():
    """Bytes of memory of this machine, or of the control group of this process where that has less; None: not known."""
    try:
        limits = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    except (ValueError, OSError):
        return None
    with contextlib.suppress(OSError, ValueError):
        for line in Path('/proc/self/cgroup').read_text().splitlines():
            _, controllers, path = line.split(':', 2)
            # version 2 has one tree for everything, version 1 one for memory
            root, name = Path('/sys/fs/cgroup'), 'memory.max'
            if controllers and 'memory' not in controllers.split(','):
                continue
            if controllers:
                root, name = root / 'memory', 'memory.limit_in_bytes'
            # a group has no more than any that it lies in; a container may see its own as the root
            for folder in (root / path.lstrip('/'), *(root / path.lstrip('/')).parents):
                with contextlib.suppress(OSError, ValueError):
                    limits.append(int((folder / name).read_text()))
    return min(limits)


def _size(number):
    """Bytes for people: 1.2 GB."""
    return f'{number / 1e9:.1f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'
