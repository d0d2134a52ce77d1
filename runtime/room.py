"""Before the first step: whether the disk has room for what a run leaves, and a CPU's memory for what it takes.

Nothing heavy is imported up here: guard.py, which scripts import first, is used beside this."""

import contextlib
import os
import re
import shutil
import timeit
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

    # bytes of all ranks; ppo's value head or critic is in checkpoints, but not in the model that it leaves
    left = [p for name, p in policy.named_parameters() if not {'critic', 'value_head'} & set(name.split('.'))]
    model = (4 if config['save_dtype'] == 'float32' else 2) * (_count(left) + packed_weights(policy))
    checkpoint = 4 * _count(policy.parameters(), trains=True) * (1 + MOMENTS[config['optimizer']])
    fits = fsdp.shared(lambda: _check_disk(config, model, checkpoint, total))
    # a GPU says by itself when it is full; a CPU's system kills
    if not torch.cuda.is_available():
        frozen = sum(_count(other.parameters()) for other in others if other is not None and other is not policy)
        tokens = _most_tokens(config, train, packed, max_tokens)
        chosen = f'max_tokens={max_tokens} (auto): ' if config['max_tokens'] == 'auto' else ''
        needs = _needs(config, policy, per_token(), frozen, tokens)
        _check_memory(needs, f'{chosen}a microbatch of up to {tokens:,} tokens', tokens, int(train.lengths.max()))
    return fits


def _count(parameters, trains=None):
    """How many numbers parameters have together; trains: only those that train (True), or are frozen (False)."""
    return sum(p.numel() for p in parameters if trains in (None, p.requires_grad))


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
    what = f', and {more} checkpoints take {_size(checkpoint)} each' if more else ''
    text = f'{out_dir} lies on a disk with {_size(free)} free: the model takes {_size(model)}{what}'
    if every != 'auto' or model > free:
        raise UserError(f'{text}; make room, or choose another --out_dir')
    say(f'warning: {text}: however long this run is, it writes no checkpoint')
    return False


def _check_memory(needs, what, tokens, longest):
    """Say what the ranks of this machine take of its memory, and warn where it has less. needs: the estimate of one rank for a
    microbatch (what) of so many tokens; longest: tokens of the longest example."""
    here, has = int(os.environ.get('LOCAL_WORLD_SIZE', 1)), machine_memory()
    takes = {name: number * here for name, number in needs.items() if number}
    total = sum(takes.values())
    parts = ', '.join(f'{name} {_size(number)}' for name, number in takes.items())
    text = f'memory: {what} takes about {_size(total)} ({parts})'
    text += f', of the {_size(has)} of this machine'
    if total <= has:
        return say(text)
    fits = max(longest, int(tokens * (1 - (total - has) / takes['activations'])))
    advice = (
        f'lower --max_tokens to {fits:,}, which changes no result, or try --activation_checkpointing or --lora_rank'
    )
    say(f'warning: {text}: the system may kill this process; {advice}')


def estimate(policy, per_token, tokens, *, optimizer, dtype, ranks=1, shard='none', frozen=0, device=None):
    """Bytes that one rank needs: {'activations', 'weights', 'gradients', 'optimizer', 'reference', 'buffers'}.

    policy: the model that trains, which may be without weights, on the meta device; per_token: its bytes_saved; tokens: of a
    microbatch. shard: none, grads or full, as in training.py. frozen: parameters of other models. device: where it will run, if not
    where policy is. buffers: a chunk of logits, weights that FSDP has gathered."""
    import fsdp
    import model as models

    compute = 2 if dtype == 'bfloat16' else 4
    trained = _count(policy.parameters(), trains=True)
    # buffers hold what 4-bit layers have for weights
    fixed = [*(p for p in policy.parameters() if not p.requires_grad), *policy.buffers()]
    held = sum(x.numel() * x.element_size() for x in fixed)
    # gradients and moments are cut over the ranks wherever anything is, weights that are gathered until backward are whole
    parts = 1 if shard == 'none' else ranks
    needs = {
        'activations': per_token * tokens,
        'weights': (4 * trained + held) / parts,
        'gradients': 4 * trained / parts,
        'optimizer': 4 * MOMENTS[optimizer] * trained / parts,
        'reference': compute * frozen / parts,
        'buffers': 0,
    }

    # a chunk of logits, its copy in the compute type, and the head's gradient beside the one that it is added to
    head = models.core(policy).get_output_embeddings()
    if head is not None:
        words, width = head.weight.shape
        most = 2**27 if (device or head.weight.device).type == 'cuda' else 2**23  # as in Head.logits
        rows = models.Head.chunks(int(tokens), words, most)[0].stop
        needs['buffers'] += (6 if compute == 2 else 4) * words * (rows + width)
    # FSDP, which also casts: the root stays gathered, and two blocks at a time, one of them with its gradients
    if parts > 1 or compute == 2:
        inner = [m for m in policy.modules() if hasattr(m, 'unshard') and m is not policy]
        blocks = [_count(block.parameters()) for block in inner or models.blocks(policy)]
        root = _count(policy.parameters()) - sum(blocks)
        gathered = root + 3 * max(blocks) + (sum(blocks) if fsdp.stays_gathered(policy, shard) else 0)
        needs['buffers'] += compute * gathered
    return needs


def choose_max_tokens(config, policy, per_token, train, packed, frozen):
    """The largest of BUDGETS whose microbatches fit beside what is still to come, the same on all ranks; the least if none does.

    per_token: the policy's bytes_per_token; frozen: parameters of models that are not loaded yet."""
    import torch

    import fsdp

    free, safe = free_memory(), SAFE[next(policy.parameters()).device.type]

    def to_come(size):
        """Bytes, beside the policy itself, which is there already."""
        needs = _needs(config, policy, per_token, frozen, _most_tokens(config, train, packed, size))
        return sum(needs.values()) - needs['weights']

    fitting = [size for size in BUDGETS if to_come(size) <= safe * free]
    (least,) = fsdp.largest([-max(fitting, default=BUDGETS[0])])
    # on a CPU check_room says it, with all parts
    if torch.cuda.is_available():
        takes = f'each rank will take about {_size(to_come(-least))} more, where {_size(free)} are free'
        say(f'memory: max_tokens={-least} (auto): {takes}')
    return -least


def _needs(config, policy, per_token, frozen, tokens):
    """The estimate of one rank for a microbatch of so many tokens."""
    import torch.distributed as dist

    how = {'ranks': dist.get_world_size(), 'shard': getattr(policy, 'shard_mode', 'full'), 'frozen': frozen}
    return estimate(policy, per_token, tokens, optimizer=config['optimizer'], dtype=config['dtype'], **how)


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


def bytes_per_token(policy, forward, train, packed):
    """Bytes that one token keeps for backward: those of a forward, and of the one block that is recomputed just then, if any is."""
    import torch

    import fsdp
    from data import pack

    # an example of ordinary length
    middle = sorted(range(len(train)), key=lambda i: train.lengths[i])[len(train) // 2]
    batch = pack([train[middle]], [0], pad=not packed, device=next(policy.parameters()).device)
    # a draw of the adapters' dropout would change what training draws
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), fsdp.unsharded(policy):
        kept = _made_and_kept(lambda: forward(batch))
        # blocks that recompute are known by their training mode, for sharding has renamed their class
        recomputing = [module for module in policy.modules() if module.training]
        for block in recomputing:
            block.training = False
        if recomputing:
            kept += _made_and_kept(lambda: forward(batch)) / len(recomputing)
        for block in recomputing:
            block.training = True
    return kept / batch.ids.numel()


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
        return {s._cdata: (StorageWeakRef(s), s.nbytes()) for s in (x.untyped_storage() for x in tensors)}

    made = {}  # of a storage: (weak reference, bytes)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), options=None):
            out = operation(*args, **(options or {}))
            # a view, or what is written in place, is not new
            known = storages((args, options))
            made.update({key: new for key, new in storages(out).items() if key not in known})
            return out

    with Watch():
        value = function()  # noqa: F841 it is held until its bytes are counted
    return sum(size for storage, size in made.values() if not storage.expired())


def bfloat16_costs():
    """How many times longer than in float32 the CPU takes for a matrix product in bfloat16: below 1 where it can do that by itself."""
    import torch

    def seconds(dtype):
        x = torch.ones(256, 256, dtype=dtype)
        return min(timeit.repeat(lambda: x @ x, number=1, repeat=5))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def free_memory():
    """Bytes that this rank can still take: of its GPU, or its share of what is free on this machine."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return machine_memory(free=True) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def machine_memory(free=False):
    """Bytes of memory of this machine, or of the control group of this process where that has less.

    free: without what is in use; files that are only cached in memory count as free."""
    limits = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    available = re.search(r'MemAvailable:\s*(\d+)', _read('/proc/meminfo'))
    if free and available:
        limits = [1024 * int(available[1])]
    # where control groups of versions 2 and 1 keep their limit and what they use
    two = '/sys/fs/cgroup', 'memory.max', 'memory.current'
    one = '/sys/fs/cgroup/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes'
    for version, path in re.findall(r'^(0:|\d+:[^:]*\bmemory\b[^:]*):/(.*)', _read('/proc/self/cgroup'), re.M):
        root, limit, usage = two if version == '0:' else one
        group = Path(root, path)
        # a group has no more than any that it lies in; a container may see its own as the root
        for folder in (group, *group.parents):
            with contextlib.suppress(ValueError, TypeError):  # 'max', or nothing
                left = int(_read(folder / limit))
                if free:
                    cached = re.search(r'^(?:total_)?inactive_file (\d+)', _read(folder / 'memory.stat'), re.M)
                    left += int(cached[1]) - int(_read(folder / usage))
                limits.append(left)
    return min(limits)


def _read(file):
    """The text of a file of the system, or nothing."""
    with contextlib.suppress(OSError):
        return Path(file).read_text()
    return ''


def _size(number):
    """Bytes for people: 1.2 GB."""
    return f'{number / 1e9:.1f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'
