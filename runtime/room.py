"""Before the first step: whether the disk has room for what a run leaves, and a CPU's memory for what it takes.

Nothing heavy is imported up here: guard.py, which scripts import first, is used beside this."""

import contextlib
import os
import re
import shutil
import time
from functools import partial
from pathlib import Path

from configurator import UserError
from runtime.files import say

MOMENTS = {'AdamW': 2, 'RMSprop': 1, 'SGD': 0}  # numbers of the optimizer for each weight that trains
# what max_tokens='auto' chooses from: larger microbatches make nothing faster
BUDGETS = [1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
SAVE_AFTER = 15 * 60  # seconds between two checkpoints with save_every='auto'
# the part of the free memory that it fills: a CPU's allocator keeps up to a third more than the tensors take
SAFE = {'cuda': 0.9, 'cpu': 0.7}


def check_room(config, policy, per_token, train, total, packed, max_tokens, others=()):
    """Before the first step: refuse a disk that cannot hold what the run will leave, and say on a CPU what memory it takes.

    config: the script's options; per_token() -> bytes_per_token of the policy's pass that trains; train: the Examples; total: how
    many of them; max_tokens: of a microbatch; others: more models in memory, or None. On all ranks together. Returns whether the
    checkpoints of a long run would fit, too. Raises UserError."""
    import torch

    import fsdp
    from hf.quantize import packed_weights

    # bytes, of all ranks together; weights and moments are float32, of 4 bytes
    trained = 4 * sum(p.numel() for p in policy.parameters() if p.requires_grad)
    # ppo's value head or critic is in checkpoints, but not in the model that it leaves
    left = [p for name, p in policy.named_parameters() if not {'critic', 'value_head'} & set(name.split('.'))]
    size = 4 if config['save_dtype'] == 'float32' else 2
    model = size * (sum(p.numel() for p in left) + packed_weights(policy))
    checkpoint = trained * (1 + MOMENTS[config['optimizer']])
    fits = fsdp.shared(lambda: _check_disk(config, model, checkpoint, total))
    # a GPU says by itself when it is full; a CPU's system kills
    if not torch.cuda.is_available():
        _check_memory(config, policy, per_token(), train, packed, others, max_tokens)
    return fits


def _check_disk(config, model, checkpoint, total):
    """Whether the disk of out_dir has room for the model and for the checkpoints that may be kept, in bytes.

    Raises UserError where they will surely not fit: with save_every='auto' a short run has no checkpoints."""
    out_dir, every = config['out_dir'], config['save_every']
    # one more than are kept, since an old one goes when the new one is complete; none at the very end
    count = 0
    if every:
        count = min(config['keep_last'] + 1, total if every == 'auto' else (total - 1) // every)
    there = len([f for f in Path(out_dir).glob('checkpoints/*') if f.name.isdigit()])
    more = max(0, count - there)
    free = shutil.disk_usage(out_dir).free
    if model + more * checkpoint <= free:
        return True

    what = f'the model takes {_size(model)}'
    if more:
        what += f', and {more} checkpoints take {_size(checkpoint)} each'
    text = f'{out_dir} lies on a disk with {_size(free)} free: {what}'
    if every != 'auto' or model > free:
        raise UserError(f'{text}; make room, or choose another --out_dir')
    say(f'warning: {text}: however long this run is, it writes no checkpoint')
    return False


def estimate(policy, per_token, tokens, *, optimizer, dtype, ranks=1, shard='none', frozen=0, device=None):
    """Bytes that one rank needs: {'activations', 'weights', 'gradients', 'optimizer', 'reference', 'buffers'}.

    policy: the model that trains, which may be without weights, on the meta device; per_token: its bytes_saved; tokens: of a
    microbatch. shard: none, grads or full, as in training.py. frozen: parameters of other models. device: where it will run, if not
    where policy is. buffers: a chunk of logits, weights that FSDP has gathered."""
    import model as models

    compute = 2 if dtype == 'bfloat16' else 4
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    fixed = sum(p.numel() for p in policy.parameters()) - trained
    # buffers hold what 4-bit layers have for weights
    frozen_here = [p for p in policy.parameters() if not p.requires_grad] + list(policy.buffers())
    held = sum(x.numel() * x.element_size() for x in frozen_here)
    # gradients and moments are cut over the ranks wherever anything is, weights that are gathered until backward are whole
    parts = 1 if shard == 'none' else ranks
    needs = {
        'activations': per_token * tokens,
        'weights': (4 * trained + held) / parts,
        'gradients': 4 * trained / parts,
        'optimizer': 4 * MOMENTS[optimizer] * trained / parts,
        'reference': compute * frozen / parts,
    }

    # a chunk of logits, its copy in the compute type, and the head's gradient beside the one that it is added to
    buffers, head = 0, models.core(policy).get_output_embeddings()
    if head is not None:
        words, width = head.weight.shape
        most = 2**27 if (device or head.weight.device).type == 'cuda' else 2**23  # as in Head.logits
        rows = models.Head.chunks(int(tokens), words, most)[0].stop
        buffers += 4 * words * (rows + width)
        if compute == 2:
            buffers += 2 * words * (rows + width)
    # FSDP, which also casts: the root stays gathered, and two blocks at a time, one of them with its gradients
    if parts > 1 or compute == 2:
        inner = [m for m in policy.modules() if hasattr(m, 'unshard') and m is not policy]
        blocks = [sum(p.numel() for p in block.parameters()) for block in inner or models.blocks(policy)]
        root = trained + fixed - sum(blocks)
        gathered = root + 3 * max(blocks)
        if shard == 'grads':
            gathered += sum(blocks)
        buffers += compute * gathered
    return needs | {'buffers': buffers}


def choose_max_tokens(config, policy, per_token, train, packed, frozen):
    """The largest of BUDGETS whose microbatches fit beside what is still to come, the same on all ranks; the least if none does.

    per_token: the policy's bytes_per_token; frozen: parameters of models that are not loaded yet."""
    import fsdp

    needs = _needs(config, policy, per_token, frozen)
    free, safe = free_memory(), SAFE[next(policy.parameters()).device.type]

    def to_come(size):
        """Bytes, beside the policy itself, which is there already."""
        found = needs(_most_tokens(config, train, packed, size))
        return sum(found.values()) - found['weights']

    fitting = [size for size in BUDGETS if free is None or to_come(size) <= safe * free]
    (least,) = fsdp.largest([-max(fitting, default=BUDGETS[0])])
    of_what = f', where {_size(free)} are free' if free else ''
    say(f'memory: max_tokens={-least} (auto): each rank will take about {_size(to_come(-least))} more{of_what}')
    return -least


def _needs(config, policy, per_token, frozen):
    """tokens of a microbatch -> the estimate of one rank."""
    import torch.distributed as dist

    how = {'ranks': dist.get_world_size(), 'shard': getattr(policy, 'shard_mode', 'full'), 'frozen': frozen}
    return partial(estimate, policy, per_token, optimizer=config['optimizer'], dtype=config['dtype'], **how)


def _most_tokens(config, train, packed, max_tokens):
    """Tokens of the largest microbatch of one rank: where whole steps are smaller, no more than their longest examples."""
    import torch.distributed as dist

    longest = int(train.lengths.max())
    tokens = max(max_tokens, longest)
    if packed and 'minibatch_size' not in config:
        copies = 1 if config.get('share_prefix', True) else 2  # of a prompt
        largest_step = int(sum(sorted(train.lengths)[-config['batch_size'] :])) * copies
        tokens = min(tokens, max(longest, largest_step // dist.get_world_size()))
    return tokens


def _check_memory(config, policy, per_token, train, packed, others, max_tokens):
    """Say what a run takes of this machine's memory, part by part, and warn where the machine has less."""
    here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # ranks on this machine
    frozen = 0
    for other in others:
        if other is not None and other is not policy:
            frozen += sum(p.numel() for p in other.parameters())
    tokens = _most_tokens(config, train, packed, max_tokens)
    needs = _needs(config, policy, per_token, frozen)(tokens)

    # bytes on this machine
    takes = {name: number * here for name, number in needs.items() if number}
    activations, total = takes['activations'], sum(takes.values())
    has = machine_memory()
    parts = ', '.join(f'{name} {_size(number)}' for name, number in takes.items())
    text = f'memory: a microbatch of up to {tokens:,} tokens takes about {_size(total)} ({parts})'
    if has:
        text += f', of the {_size(has)} of this machine'
    if not has or total <= has:
        return say(text)
    fits = int(tokens * (1 - (total - has) / activations))
    advice = f'lower --max_tokens to {fits:,}, which changes no result, or try --activation_checkpointing'
    if fits < int(train.lengths.max()):
        advice = 'try --activation_checkpointing, shorter examples (--max_length), --lora_rank, or a smaller model'
    say(f'warning: {text}: the system may kill this process; {advice}')


def bytes_per_token(policy, forward, train, packed):
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
    device = next(policy.parameters()).device
    batch = pack([train[middle]], [0], pad=not packed, device=device)
    # a draw of the adapters' dropout would change what training draws
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), fsdp.unsharded(policy):
        made = _made_and_kept(lambda: forward(batch))
    return made / batch.ids.numel()


def _made_and_kept(function):
    """Bytes of all tensors that function() makes and that are still there when it has returned, its value among them."""
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    import fsdp

    def storages(values):
        # with tensor parallelism: this rank's part
        tensors = [fsdp.local(x) for x in tree_leaves(values) if isinstance(x, Tensor)]
        return {s._cdata: s for s in (x.untyped_storage() for x in tensors)}

    class Watch(TorchDispatchMode):
        made = {}  # of a storage: (weak reference, bytes)

        def __torch_dispatch__(self, operation, types, args=(), options=None):
            out = operation(*args, **(options or {}))
            # a view, or what is written in place, is not new
            known = storages((args, options))
            for key, storage in storages(out).items():
                if key not in known:
                    self.made[key] = StorageWeakRef(storage), storage.nbytes()
            return out

    with Watch() as watch:
        value = function()
    total = sum(size for storage, size in watch.made.values() if not storage.expired())
    del value
    return total


def bfloat16_costs():
    """How many times longer than in float32 the CPU takes for a matrix product in bfloat16: below 1 where it can do that by itself."""
    import torch

    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, tries = torch.ones(256, 256, dtype=dtype), []
        for _ in range(5):
            start = time.perf_counter()
            x @ x
            tries.append(time.perf_counter() - start)
        times[dtype] = min(tries)
    return times[torch.bfloat16] / times[torch.float32]


def free_memory():
    """Bytes that this rank can still take: of its GPU, or its share of what is free on this machine; None: not known."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = machine_memory(free=True)
    return free and free // int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def machine_memory(free=False):
    """Bytes of memory of this machine, or of the control group of this process where that has less; None: not known.

    free: without what is in use; files that are only cached in memory count as free."""
    pages = 'SC_AVPHYS_PAGES' if free else 'SC_PHYS_PAGES'
    try:
        limits = [os.sysconf('SC_PAGE_SIZE') * os.sysconf(pages)]
        if free:
            found = re.search(r'MemAvailable:\s*(\d+)', Path('/proc/meminfo').read_text())
            limits = [1024 * int(found[1])] if found else limits
    except (ValueError, OSError):
        return None
    groups = ''
    with contextlib.suppress(OSError):
        groups = Path('/proc/self/cgroup').read_text()
    for line in groups.splitlines():
        # version 2 has one tree for everything, and names no controllers; version 1 has a tree for memory
        _, controllers, path = line.split(':', 2)
        root, name, usage = Path('/sys/fs/cgroup'), 'memory.max', 'memory.current'
        if controllers:
            root, name, usage = root / 'memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes'
        if controllers and 'memory' not in controllers.split(','):
            continue
        # a group has no more than any that it lies in; a container may see its own as the root
        group = root / path.lstrip('/')
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / name).read_text())
                if free:
                    cached = re.search(r'^(?:total_)?inactive_file (\d+)', (folder / 'memory.stat').read_text(), re.M)
                    limit += int(cached[1]) - int((folder / usage).read_text())
                limits.append(limit)
    return min(limits)


def _size(number):
    """Bytes for people: 1.2 GB."""
    return f'{number / 1e9:.1f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'
