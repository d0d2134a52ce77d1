"""Before the first step: whether the disk has room for what a run leaves, and the machine memory for what it takes.

training.py has bytes_per_token() measured, calls choose_max_tokens() if nobody has chosen, and then check_room(). Nothing heavy
is imported up here, because guard.py, which scripts import before anything else, imports this file."""

import contextlib
import os
import re
import shutil
import timeit
from pathlib import Path

from configurator import UserError
from runtime.files import say

MOMENTS = {'AdamW': 2, 'RMSprop': 1, 'SGD': 0}  # numbers that the optimizer keeps for each weight that trains
# what max_tokens='auto' chooses from: larger microbatches make nothing faster
BUDGETS = [1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
SAVE_AFTER = 15 * 60  # seconds between two checkpoints with save_every='auto'
# the part of the free memory that max_tokens='auto' fills: a CPU's allocator keeps up to a third more than the tensors take
SAFE = {'cuda': 0.9, 'cpu': 0.7}


def check_room(config, policy, per_token, train, total, packed, max_tokens, others=()):
    """Refuse a disk that cannot hold what the run will leave. On a CPU, also say or warn how much memory it takes.

    config: the script's options; per_token(), train, packed: see bytes_per_token; total: examples of the run; max_tokens: of a
    microbatch; others: further models in memory, or None. Returns whether the disk has room for the checkpoints, too: with
    save_every='auto' the run can go on without them. Call it on all ranks together. Raises UserError."""
    import torch

    import fsdp
    from hf.quantize import packed_weights

    # bytes of all ranks. The model that is left has no value head and no critic of ppo.py, but its checkpoints have
    left = []
    for name, p in policy.named_parameters():
        modules = name.split('.')
        if 'critic' not in modules and 'value_head' not in modules:
            left.append(p)
    bytes_each = 4 if config['save_dtype'] == 'float32' else 2
    model_bytes = bytes_each * (_count(left) + packed_weights(policy))
    # in float32: the weight itself, and what the optimizer keeps for it
    numbers_each = 1 + MOMENTS[config['optimizer']]
    checkpoint_bytes = 4 * numbers_each * _count(policy.parameters(), only_trained=True)
    checkpoints_fit = fsdp.shared(lambda: _check_disk(config, model_bytes, checkpoint_bytes, total))

    # a full GPU raises an error; with a full CPU memory the system kills the process without a word
    if not torch.cuda.is_available():
        tokens = _most_tokens(config, train, packed, max_tokens)
        subject = f'a microbatch of up to {tokens:,} tokens'
        if config['max_tokens'] == 'auto':
            subject = f'max_tokens={max_tokens} (auto): {subject}'
        further = [other for other in others if other is not None and other is not policy]
        frozen = sum(_count(other.parameters()) for other in further)
        needs = _needs(config, policy, per_token(), frozen, tokens)
        _check_memory(needs, subject, tokens, int(train.lengths.max()))
    return checkpoints_fit


def _count(parameters, only_trained=False):
    """Return how many numbers all parameters have together, or only those that train."""
    return sum(p.numel() for p in parameters if p.requires_grad or not only_trained)


def _check_disk(config, model_bytes, checkpoint_bytes, total):
    """Return whether the disk of out_dir has room for the model and for the checkpoints of a run of total examples.

    Raises UserError if the run needs more than there is. With save_every='auto' a short run writes no checkpoint, so checkpoints
    that do not fit are only warned of."""
    out_dir, every = config['out_dir'], config['save_every']
    # an old checkpoint goes when the new one is complete: for a moment there is one more than are kept. None is written at the end
    most = 0
    if every == 'auto':
        most = min(config['keep_last'] + 1, total)
    elif every:
        most = min(config['keep_last'] + 1, (total - 1) // every)
    present = len([entry for entry in Path(out_dir).glob('checkpoints/*') if entry.name.isdigit()])
    to_come = max(0, most - present)
    free = shutil.disk_usage(out_dir).free
    if model_bytes + to_come * checkpoint_bytes <= free:
        return True

    text = f'{out_dir} lies on a disk with {_size(free)} free: the model takes {_size(model_bytes)}'
    if to_come:
        text += f', and {to_come} checkpoints take {_size(checkpoint_bytes)} each'
    if every != 'auto' or model_bytes > free:
        raise UserError(f'{text}; make room, or choose another --out_dir')
    say(f'warning: {text}: however long this run is, it writes no checkpoint')
    return False


def _check_memory(needs, subject, tokens, longest):
    """Print what the ranks of this machine take of its memory together; warn, with advice, if it has less.

    needs: the estimate of one rank, for a microbatch of so many tokens; subject: begins the sentence, and names that microbatch;
    longest: tokens of the longest example."""
    ranks_here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    has = machine_memory()
    takes = {name: number * ranks_here for name, number in needs.items() if number}
    total = sum(takes.values())
    parts = ', '.join(f'{name} {_size(number)}' for name, number in takes.items())
    text = f'memory: {subject} takes about {_size(total)} ({parts}), of the {_size(has)} of this machine'
    if total <= has:
        say(text)
        return
    # activations shrink with the tokens of a microbatch, the other parts do not; no microbatch is smaller than an example
    share_that_fits = 1 - (total - has) / takes['activations']
    tokens_that_fit = max(longest, int(tokens * share_that_fits))
    options = 'try --activation_checkpointing or --lora_rank'
    advice = f'lower --max_tokens to {tokens_that_fit:,}, which changes no result, or {options}'
    say(f'warning: {text}: the system may kill this process; {advice}')


def estimate(policy, per_token, tokens, *, optimizer, dtype, ranks=1, shard='none', frozen=0, device=None):
    """Return the bytes that one rank needs: activations, weights, gradients, optimizer, reference, buffers -> bytes.

    policy: the model that trains, perhaps without weights, on the meta device; per_token: see bytes_per_token; tokens: of a
    microbatch; shard: none, grads or full, as in training.py; frozen: how many parameters other models have; device: where it
    will run, if not where policy is. Buffers are a chunk of logits, and the weights that FSDP has gathered."""
    bytes_each = 2 if dtype == 'bfloat16' else 4
    trained = _count(policy.parameters(), only_trained=True)
    # weights in 4 bits are buffers, not parameters
    fixed = [p for p in policy.parameters() if not p.requires_grad]
    fixed += policy.buffers()
    fixed_bytes = sum(x.numel() * x.element_size() for x in fixed)
    # with grads and with full each rank holds its part of all but activations and buffers
    ranks_that_share = 1 if shard == 'none' else ranks
    needs = {
        'activations': per_token * tokens,
        'weights': (4 * trained + fixed_bytes) / ranks_that_share,
        'gradients': 4 * trained / ranks_that_share,
        'optimizer': 4 * MOMENTS[optimizer] * trained / ranks_that_share,
        'reference': bytes_each * frozen / ranks_that_share,
        'buffers': _logits_bytes(policy, tokens, bytes_each, device),
    }
    # FSDP does the casting to bfloat16, too: then it gathers copies in bfloat16 even on a single rank
    if ranks_that_share > 1 or bytes_each == 2:
        needs['buffers'] += bytes_each * _count_gathered(policy, shard)
    return needs


def _logits_bytes(policy, tokens, bytes_each, device):
    """Return the bytes of a chunk of logits, and of a gradient of the output head; 0 without such a head.

    bytes_each: of a number in the compute type; the other arguments are those of estimate."""
    import model as models

    head = models.core(policy).get_output_embeddings()
    if head is None:
        return 0
    words, width = head.weight.shape
    # the largest number of logits in a chunk, as in Head.logits
    is_cuda = (device or head.weight.device).type == 'cuda'
    most = 2**27 if is_cuda else 2**23
    first_chunk = models.Head.chunks(int(tokens), words, most)[0]
    # both are there in float32, and once more in bfloat16 if that is the compute type. The head's gradient is one that is not
    # added to the others yet
    bytes_of_both_types = 6 if bytes_each == 2 else 4
    return bytes_of_both_types * words * (first_chunk.stop + width)


def _count_gathered(policy, shard):
    """Return how many numbers FSDP has gathered on a rank at its worst moment: weights, and a block's gradients."""
    import fsdp
    import model as models

    cut_by_fsdp = [m for m in policy.modules() if hasattr(m, 'unshard') and m is not policy]
    blocks = [_count(block.parameters()) for block in cut_by_fsdp or models.blocks(policy)]
    # the root, outside of the blocks, stays gathered
    gathered = _count(policy.parameters()) - sum(blocks)
    # so are two blocks at a time: the one at work, with its gradients, and the next one
    gathered += 3 * max(blocks)
    if fsdp.stays_gathered(policy, shard):
        gathered += sum(blocks)
    return gathered


def choose_max_tokens(config, policy, per_token, train, packed, frozen):
    """Return the largest of BUDGETS whose microbatches fit into the free memory of every rank; the smallest if none does.

    per_token: see bytes_per_token; frozen: parameters of models that are not loaded yet. Says on a GPU what it will take. The
    result is the same on all ranks, which call this together."""
    import torch

    import fsdp

    free = free_memory()
    usable = SAFE[next(policy.parameters()).device.type] * free

    def bytes_to_come(max_tokens):
        # the policy's weights are in memory already
        tokens = _most_tokens(config, train, packed, max_tokens)
        needs = _needs(config, policy, per_token, frozen, tokens)
        return sum(needs.values()) - needs['weights']

    fitting = [max_tokens for max_tokens in BUDGETS if bytes_to_come(max_tokens) <= usable]
    # the smallest over the ranks is the largest of the negative numbers
    (negative,) = fsdp.largest([-max(fitting, default=BUDGETS[0])])
    max_tokens = -negative
    # on a CPU check_room says it, with all parts
    if torch.cuda.is_available():
        takes = _size(bytes_to_come(max_tokens))
        sizes = f'each rank will take about {takes} more, where {_size(free)} are free'
        say(f'memory: max_tokens={max_tokens} (auto): {sizes}')
    return max_tokens


def _needs(config, policy, per_token, frozen, tokens):
    """Return the estimate of one rank in this run, for a microbatch of so many tokens."""
    import torch.distributed as dist

    options = {'optimizer': config['optimizer'], 'dtype': config['dtype'], 'frozen': frozen}
    options['ranks'] = dist.get_world_size()
    options['shard'] = getattr(policy, 'shard_mode', 'full')
    return estimate(policy, per_token, tokens, **options)


def _most_tokens(config, train, packed, max_tokens):
    """Return the tokens of a rank's largest microbatch: max_tokens, unless an example is longer or all steps are smaller."""
    import torch.distributed as dist

    longest = int(train.lengths.max())
    tokens = max(max_tokens, longest)
    # a step has at most its batch_size longest examples; ppo.py has steps of another size, minibatch_size
    if packed and 'minibatch_size' not in config:
        copies_of_prompt = 1 if config.get('share_prefix', True) else 2
        longest_examples = sorted(train.lengths)[-config['batch_size'] :]
        largest_step = int(sum(longest_examples)) * copies_of_prompt
        tokens = min(tokens, max(longest, largest_step // dist.get_world_size()))
    return tokens


def bytes_per_token(policy, forward, train, packed):
    """Measure how many bytes of activations one token keeps for backward, and return them.

    forward(batch) is the policy's pass that trains. It runs here on an example of train whose length is the median. packed:
    whether training packs its batches instead of padding them."""
    import torch

    import fsdp
    from data import pack

    by_length = sorted(range(len(train)), key=lambda i: train.lengths[i])
    example = train[by_length[len(train) // 2]]
    batch = pack([example], [0], pad=not packed, device=next(policy.parameters()).device)
    # the adapters' dropout draws numbers here: fork_rng sets the generator back, so that training draws what it would have drawn
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), fsdp.unsharded(policy):
        kept = _made_and_kept(lambda: forward(batch))
        # modules in training mode are the blocks that recompute their activations, all others are in eval mode. Backward holds
        # those of one block at a time: measure all blocks without recomputing, and add the share of one
        recomputing = [module for module in policy.modules() if module.training]
        for block in recomputing:
            block.training = False
        if recomputing:
            kept += _made_and_kept(lambda: forward(batch)) / len(recomputing)
        for block in recomputing:
            block.training = True
    return kept / batch.ids.numel()


def _made_and_kept(function):
    """Call function, and return the bytes of all tensors that it has made and that are left at its end, its result included."""
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    import fsdp

    def storages(values):
        """Return key -> (weak reference, bytes) of the memory behind all tensors in values."""
        by_key = {}
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                # with tensor parallelism: this rank's part
                storage = fsdp.local(value).untyped_storage()
                by_key[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return by_key

    made = {}  # as storages returns them

    class Watch(TorchDispatchMode):
        """Sees every operation on tensors, those of backward's graph included."""

        def __torch_dispatch__(self, operation, types, args=(), options=None):
            out = operation(*args, **(options or {}))
            # a view, and a result that is written in place, lie in the memory of an argument
            of_arguments = storages((args, options))
            for key, storage in storages(out).items():
                if key not in of_arguments:
                    made[key] = storage
            return out

    with Watch():
        result = function()  # noqa: F841 it is held until its bytes are counted
    return sum(size for reference, size in made.values() if not reference.expired())


def bfloat16_costs():
    """Return how long a bfloat16 matmul takes on this CPU relative to float32; below 1 if the CPU has bfloat16 instructions."""
    import torch

    def seconds(dtype):
        matrix = torch.ones(256, 256, dtype=dtype)
        # best of five: least disturbed by other processes
        return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=5))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def free_memory():
    """Return the bytes that this rank can still take: of its GPU, or as its share of what is free on this machine."""
    import torch

    if torch.cuda.is_available():
        free, _total = torch.cuda.mem_get_info()
        # torch gives what it has reserved and does not use to the next tensors
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return machine_memory(free=True) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def machine_memory(free=False):
    """Return the bytes of memory of this machine, or of this process's control group if that may take less.

    free: only those that are not in use; files that are merely cached in memory count as free."""
    size = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    available = re.search(r'MemAvailable:\s*(\d+)', _read('/proc/meminfo'))
    if free and available:
        size = 1024 * int(available[1])
    return min([size, *_group_sizes(free)])


def _group_sizes(free):
    """Return the bytes of memory that each control group around this process may take; [] if none has a limit.

    free: only those that are not in use, as in machine_memory."""
    # where versions 2 and 1 of control groups are mounted, and their files with the limit and with what is in use
    version_2 = ('/sys/fs/cgroup', 'memory.max', 'memory.current')
    version_1 = ('/sys/fs/cgroup/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes')
    sizes = []
    # lines such as `0::/user.slice` of version 2, and `4:cpu,memory:/docker/1f` of version 1
    for start, path in re.findall(r'^(0:|\d+:[^:]*\bmemory\b[^:]*):/(.*)', _read('/proc/self/cgroup'), re.M):
        root, limit_file, usage_file = version_2 if start == '0:' else version_1
        group = Path(root, path)
        # a group takes no more than any group that it lies in; inside a container only the root may be there to see
        for folder in (group, *group.parents):
            # where there is no limit, the file says 'max', or does not exist
            with contextlib.suppress(ValueError, TypeError):
                size = int(_read(folder / limit_file))
                if free:
                    cached = re.search(r'^(?:total_)?inactive_file (\d+)', _read(folder / 'memory.stat'), re.M)
                    size += int(cached[1]) - int(_read(folder / usage_file))
                sizes.append(size)
    return sizes


def _read(file):
    """Return the text of a file of the system, or '' if it cannot be read."""
    with contextlib.suppress(OSError):
        return Path(file).read_text()
    return ''


def _size(number):
    """Return bytes as a text for people, such as 1.2 GB or 3.4 MB."""
    return f'{number / 1e9:.1f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'
