"""Check before the first step that a run fits on the disk and into memory, and choose max_tokens='auto'.

training.py calls bytes_per_token() and choose_max_tokens() for max_tokens='auto', and check_room() for every run, a training.Run."""

import contextlib
import math
import os
import re
import shutil
import time
import timeit
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import UserError
from data import pack, tokens_taken
from hf import lean, sharded
from hf.parts import core
from hf.quantize import count_4bit_weights
from model import Head
from runtime import ranks
from runtime.files import say
from runtime.log import per_second
from text.examples import counted

MOMENTS = {'AdamW': 2, 'RMSprop': 1, 'SGD': 0}  # float32 numbers that the optimizer keeps for each trained weight
# choices for max_tokens='auto'; larger microbatches are not faster
BUDGETS = [1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
SAVE_AFTER = 15 * 60  # seconds between checkpoints with save_every='auto'


def check_room(run, frozen_models=()):
    """Check disk and memory for a training.Run; note examples above max_tokens. UserError if the disk is too small. Collective.

    frozen_models: those that do not train; None and the policy itself do not count. Returns whether checkpoints fit on the disk."""
    # 'epoch_2', every second epoch, becomes a number of examples
    save_every = str(run.config['save_every'])
    if save_every.startswith('epoch_'):
        run.save_every = run.config['save_every'] = int(save_every.removeprefix('epoch_')) * run.epoch
    model_bytes, checkpoint_bytes = _bytes_on_disk(run.policy, run.config)
    checkpoints_fit = ranks.from_rank_0(lambda: _check_disk(run.config, model_bytes, checkpoint_bytes, run.total))
    # only for a CPU: if its memory is full, the system kills the process silently, where a GPU raises an error
    if not torch.cuda.is_available():
        frozen = [model for model in frozen_models if model is not None and model is not run.policy]
        _check_memory(run, sum(_count(model.parameters()) for model in frozen))
    lengths = _lengths(run)
    too_long = lengths[lengths > run.max_tokens]
    if len(too_long):
        limit = f'max_tokens={run.max_tokens} (the longest: {too_long.max()})'
        say(f'note: longer than {limit}: {counted(len(too_long), "examples")}, each in a microbatch of its own')
    return checkpoints_fit


def _bytes_on_disk(policy, config):
    """Return (bytes of the exported model, bytes of a checkpoint)."""
    not_exported = {'critic', 'value_head'}  # ppo.py's value head and critic are in checkpoints only
    exported = [p for name, p in policy.named_parameters() if not_exported.isdisjoint(name.split('.'))]
    bytes_each = 4 if config['save_dtype'] == 'float32' else 2
    # 4-bit weights are exported unpacked; they are buffers, which parameters() lacks
    model_bytes = bytes_each * (_count(exported) + count_4bit_weights(policy))
    # a checkpoint has the trained weights and their optimizer state, in float32
    numbers_each = 1 + MOMENTS.get(config['optimizer'], 2)
    return model_bytes, 4 * numbers_each * _count(policy.parameters(), only_trained=True)


def _count(parameters, only_trained=False):
    """Return the total number of elements of parameters, or only of those that are trained."""
    return sum(p.numel() for p in parameters if p.requires_grad or not only_trained)


def _widths(run):
    """Return the tokens of each training example's prompt and of each of its answers, at most, (n, 1 + answers)."""
    config = run.config
    if run.task != 'prompts':
        return run.train.widths
    # ppo.py has yet to sample the answers, of up to so many tokens
    prompts = run.train.widths[:, :1]
    return np.pad(prompts, ((0, 0), (0, config['group_size'])), constant_values=config['max_new_tokens'])


def _lengths(run):
    """Return the most tokens that each training example takes in a microbatch, (n,). Scripts without share_prefix share prompts."""
    return tokens_taken(_widths(run), run.config.get('share_prefix', True), pad=not run.packed)


def _check_disk(config, model_bytes, checkpoint_bytes, total):
    """Return whether out_dir's disk has room for model and checkpoints. If not: UserError, or for the checkpoints of 'auto' a warning."""
    out_dir = config['out_dir']
    every = config['save_every']  # examples between checkpoints; 0 or None: no checkpoints; 'auto': chosen later
    n_saves = 0
    if every == 'auto':
        n_saves = total  # as many as there can be
    elif every:
        n_saves = (total - 1) // every  # - 1: at the end of the run the model is written, and no checkpoint
    n_present = len([entry for entry in Path(out_dir).glob('checkpoints/*') if entry.name.isdigit()])
    # + 1: an old checkpoint is deleted only after the new one is complete
    n_at_once = min(config['keep_last'] + 1, n_saves)
    n_to_come = max(0, n_at_once - n_present)
    free = shutil.disk_usage(out_dir).free
    if model_bytes + n_to_come * checkpoint_bytes <= free:
        return True
    text = f'{out_dir} lies on a disk with {_size(free)} free: the model takes {_size(model_bytes)}'
    if n_to_come:
        text += f', and checkpoints take {_size(checkpoint_bytes)} each ({n_to_come} to come)'
    if every != 'auto' or model_bytes > free:
        raise UserError(f'{text}; make room, or choose another --out_dir')
    say(f'warning: {text}: however long this run is, it writes no checkpoint')
    return False


def _check_memory(run, frozen):
    """Print the memory that all ranks here need for a training.Run; warn if there is less. frozen: parameters of untrained models."""
    needs_of_rank, tokens, is_step = _estimate_of_run(run, run.max_tokens, frozen)
    # name, such as 'activations' -> bytes
    needs = {name: number * _ranks_here() for name, number in needs_of_rank.items() if number}
    total = sum(needs.values())
    available = machine_memory()
    parts = ', '.join(f'{name} {_size(number)}' for name, number in needs.items())
    if is_step:
        parts = parts.replace('gradients', 'more gradients')  # 'gradients' are those beyond the activations
        parts = parts.replace('activations', 'activations, then gradients in their place')
    choice = f'max_tokens={run.max_tokens} (auto): ' if run.config['max_tokens'] == 'auto' else ''
    sizes = f'takes about {_size(total)} ({parts}), of the {_size(available)} of this machine'
    text = f'memory: {choice}a microbatch of up to {tokens:,} tokens {sizes}'
    if total <= available:
        say(text)
        return
    # advise fewer tokens: activations must shrink by what is missing; the longest example is never divided
    share_that_fits = 1 - (total - available) / needs['activations']
    tokens_that_fit = max(int(_lengths(run).max()), int(tokens * share_that_fits))
    advice = f'lower --max_tokens to {tokens_that_fit:,}, which changes no result, or try --activation_checkpointing or --lora_rank'
    say(f'warning: {text}: the system may kill this process; {advice}')


def _estimate_of_run(run, max_tokens, frozen):
    """Return (estimate() for the largest microbatch of a training.Run, its tokens, whether it is a rank's whole step)."""
    tokens, is_step = _largest_batch(run, max_tokens)
    widths = _widths(run)
    predicted = int(tokens * widths[:, 1:].sum() / widths.sum())
    return estimate(run.config, run.policy, run.bytes_per_token(), frozen, tokens, predicted, is_step), tokens, is_step


def estimate(config, policy, per_token, frozen, tokens, predicted, is_step):
    """Return the memory that one rank needs, as name -> bytes: activations, weights, gradients, optimizer, reference, buffers.

    config: for dtype and optimizer; per_token: bytes of activations per token; frozen: number of parameters of other models, held
    in the compute dtype; tokens: of a microbatch, and those through the head; is_step: the microbatch is a whole step."""
    bytes_each = 2 if config['dtype'] == 'bfloat16' else 4  # of a number in the compute dtype
    n_trained = _count(policy.parameters(), only_trained=True)
    # buffers: 4-bit weights, say
    not_trained = [p for p in policy.parameters() if not p.requires_grad] + list(policy.buffers())
    fixed_bytes = sum(x.nbytes for x in not_trained)
    # FSDP ('grads', 'full') divides everything but activations and buffers among the ranks
    n_shards = 1 if policy.shard_mode == 'none' else dist.get_world_size()
    gradients = 4 * n_trained / n_shards
    activations = per_token * tokens
    # the backward of a step's only microbatch frees activations while it makes gradients, which take their place
    gradients_beside = max(0, gradients - activations) if is_step else gradients
    return {
        'activations': activations,
        'weights': (4 * n_trained + fixed_bytes) / n_shards,
        'gradients': gradients_beside,
        'optimizer': MOMENTS.get(config['optimizer'], 2) * gradients,
        'reference': bytes_each * frozen / n_shards,
        'buffers': _head_bytes(policy, predicted, bytes_each) + _copied_bytes(policy, bytes_each, n_shards),
    }


def _head_bytes(policy, predicted, bytes_each):
    """Return the bytes of logits, and of their head's gradient, that model.Head holds at once for so many tokens; 0 without head."""
    head = core(policy).get_output_embeddings()
    if head is None:
        return 0
    vocab_size, hidden_size = head.weight.shape
    # Head takes the tokens in chunks (slices), of which the first is the largest
    first_chunk = Head.chunks(predicted, vocab_size, Head.max_logits(head.weight.device))[0]
    # each chunk makes a gradient of the whole head weight. Both exist in float32, and also in bfloat16 if that is computed in
    bytes_of_copies = 4 + 2 if bytes_each == 2 else 4
    return _kept_bytes_of_head(head, predicted) + bytes_of_copies * vocab_size * (first_chunk.stop + hidden_size)


def _kept_bytes_of_head(head, predicted):
    """Return the bytes of the logits of so many tokens that model.Head keeps for backward; 0 without head."""
    keeps = head is not None and Head.keeps(predicted, head.weight)
    return 4 * len(head.weight) * predicted if keeps else 0


def _copied_bytes(policy, bytes_each, n_shards):
    """Return the bytes of weights that replicas copy to bfloat16, or FSDP gathers. n_shards: over so many ranks it divides them."""
    if n_shards == 1 and bytes_each == 4:
        return 0
    if policy.shard_mode == 'none':
        return bytes_each * _count(policy.parameters(), only_trained=True)
    block_sizes = [_count(m.parameters()) for m in sharded.fsdp_modules(policy) if m is not policy]
    # mode 'grads' keeps all parameters gathered; 'full' those outside of the blocks, such as the embedding
    gathered = _count(policy.parameters())
    if policy.shard_mode == 'full':
        gathered -= sum(block_sizes)
    # the current block, its gradients, and the next block, which is gathered early
    return bytes_each * (gathered + 3 * max(block_sizes))


def save_every_of(step_ends, step, total):
    """Return save_every for 'auto': the examples of about SAVE_AFTER seconds, or 0 if the run ends before that. Collective.

    Returns 'auto' before the fourth step. step_ends: times; step: the last (from `first` to `seen` examples); total: of the run."""
    if len(step_ends) < 4:
        return 'auto'
    # measured on rank 0, so that all ranks agree
    seconds_of_a_step = ranks.from_rank_0(lambda: float(np.median(np.diff(step_ends))))
    n_steps = max(1, round(SAVE_AFTER / max(seconds_of_a_step, 1e-3)))
    examples_of_a_step = step.seen - step.first
    every = n_steps * examples_of_a_step
    if every >= total - step.seen:
        return 0
    say(f'note: a checkpoint every {every:,} examples, about 15 minutes; --save_every=0: none')
    return every


def choose_mode(model, mode, train, half, device, cpu_offload):
    """Return how ranks share a model: mode, or for 'auto' either 'none' (a whole one on each) or 'full' (each holds a part).

    It is 'none' if that fills at most a quarter of the memory. train: it is to be trained; half: its frozen weights are bfloat16."""
    if mode != 'auto':
        return mode
    if ranks.tp_size() > 1 or cpu_offload:
        return 'full'
    if dist.get_world_size() == 1:
        return 'none'
    trained = _count(model.parameters(), only_trained=True) if train else 0
    frozen = _count(model.parameters()) - trained
    # bytes: a trained weight, its gradient and AdamW's two moments are float32
    needed = 16 * trained + (2 if half else 4) * frozen
    if device.type == 'cuda':
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = machine_memory() / _ranks_here()
    return 'none' if needed <= available / 4 else 'full'


def choose_max_tokens(run, n_models):
    """Return the largest of BUDGETS whose microbatches fit into every rank's free memory, or the smallest. Collective.

    n_models: number of frozen models of the policy's size that are still to be loaded."""
    free = free_memory()
    frozen = n_models * _count(run.policy.parameters())
    # a GPU that is nine tenths full is slower; CPU allocators hold up to a third more than the tensors need
    usable = free * (0.85 if next(run.policy.parameters()).is_cuda else 0.7)

    def bytes_to_come(max_tokens):
        needs, _tokens, _is_step = _estimate_of_run(run, max_tokens, frozen)
        return sum(needs.values()) - needs['weights']  # the policy's weights are in memory already

    fitting = [budget for budget in BUDGETS if bytes_to_come(budget) <= usable]
    choice = max(fitting, default=BUDGETS[0])
    # all ranks take the smallest choice: minus the largest of the negative ones
    max_tokens = -ranks.largest([-choice])[0]
    if torch.cuda.is_available():  # on a CPU, check_room() prints the details
        sizes = f'each rank will take about {_size(bytes_to_come(max_tokens))} more, where {_size(free)} are free'
        say(f'memory: max_tokens={max_tokens} (auto): {sizes}')
    return max_tokens


def _largest_batch(run, max_tokens):
    """Return (the most tokens that a microbatch can have, whether such a microbatch is the rank's whole step)."""
    config = run.config
    lengths = _lengths(run)
    longest = int(lengths.max())  # an example longer than max_tokens is a microbatch of its own
    tokens = max(max_tokens, longest)
    # leave it at that in ppo.py, where a step has not batch_size examples, and with padding, where it takes more than its tokens
    if 'minibatch_size' in config or not run.packed:
        return tokens, False
    # the largest step: the batch_size longest examples, some again if it exceeds the data or reaches into the next epoch
    n_examples = len(lengths)
    n_epochs = config.get('n_epochs', 1)
    batch_size = min(config['batch_size'], n_epochs * n_examples)
    crosses_epochs = n_epochs > 1 and n_examples % batch_size > 0
    max_copies = math.ceil(batch_size / n_examples) + crosses_epochs
    step_tokens = int(np.sort(np.tile(lengths, max_copies))[-batch_size:].sum())
    _, world_size = ranks.data_rank()
    if world_size > 1:
        # of one rank: examples are not divided, so it may have one more than its share
        step_tokens = step_tokens // world_size + longest
    return min(tokens, step_tokens), step_tokens <= tokens


def bytes_per_token(policy, forward, train, packed):
    """Measure the bytes of activations per token that forward(batch), the policy's training forward, keeps for backward."""
    median = int(np.argsort(train.lengths, kind='stable')[len(train) // 2])
    device = next(policy.parameters()).device
    batch = pack([train[median]], [0], pad=not packed, device=device)
    # block -> forward: with activation checkpointing, hf/lean.py has made that partial(checkpointed, the block's own forward)
    checkpointed = {m: m.forward for m in policy.modules() if getattr(m.forward, 'func', None) is lean.checkpointed}
    devices = [device] if batch.ids.is_cuda else []  # dropout must not advance the training RNG, on a GPU its own
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), sharded.unsharded(policy):
        kept = _kept_bytes(lambda: forward(batch))
        # then backward recomputes one block at a time: add what an average block keeps in a forward without checkpointing
        for block, recomputing in checkpointed.items():
            block.forward = recomputing.args[0]
        if checkpointed:
            kept += _kept_bytes(lambda: forward(batch)) / len(checkpointed)
        for block, recomputing in checkpointed.items():
            block.forward = recomputing
    # logits do not grow with the tokens for long: estimate() counts them apart
    kept -= _kept_bytes_of_head(core(policy).get_output_embeddings(), len(batch.target))
    return kept / batch.ids.numel()


def _kept_bytes(function):
    """Call function and return the bytes of the tensors it creates that are still alive at its end, result included."""
    created = {}  # address of a storage -> (weak reference to it, bytes)

    # the storages (the memory) behind all tensors in nested values, by address; of a DTensor the local part
    def storages(values):
        tensors = [sharded.local_shard(value) for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
        return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}

    class Watch(TorchDispatchMode):  # torch calls this in place of every tensor operation
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            old = storages((args, kwargs))  # views and in-place results share the storage of an argument
            for address, storage in storages(out).items():
                if address not in old:
                    created[address] = StorageWeakRef(storage), storage.nbytes()
            return out

    with Watch():
        result = function()  # noqa: F841 keeps the result alive while it is counted
    return sum(size for reference, size in created.values() if not reference.expired())


def bfloat16_slowdown():
    """Return how many times as long a bfloat16 matmul takes on this CPU as one in float32: below 1 with bfloat16 instructions.

    NaN if the clock is too coarse, as where the system counts in ticks."""

    def seconds(dtype):
        matrix = torch.ones(256, 256, dtype=dtype)
        # best of five, in the CPU time of this thread: others on the machine do not count
        return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=5, timer=time.thread_time))

    return per_second(seconds(torch.bfloat16), seconds(torch.float32))


def free_memory():
    """Return the bytes available to this rank: free GPU memory, or its share of the machine's free memory."""
    if torch.cuda.is_available():
        free, _total = torch.cuda.mem_get_info()
        # torch reuses memory that is reserved but not allocated
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return machine_memory(free=True) // _ranks_here()


def _ranks_here():
    """Return the number of ranks on this machine, which share its memory."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def machine_memory(free=False):
    """Return the bytes of this machine's memory, or of this process's cgroup if less; free: only what is not in use."""
    size = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    available = re.search(r'MemAvailable:\s*(\d+)', _read('/proc/meminfo'))
    if free and available:
        size = 1024 * int(available[1])
    sizes = [size]
    for folder, limit_file, usage_file in _cgroups():
        # skip a group without a limit: its file holds 'max' or is missing
        with contextlib.suppress(ValueError, TypeError):
            size = int(_read(folder / limit_file))
            if free:
                # file caches count as in use, but can be reclaimed
                cached = re.search(r'^(?:total_)?inactive_file (\d+)', _read(folder / 'memory.stat'), re.M)
                size += int(cached[1]) - int(_read(folder / usage_file))
            sizes.append(size)
    return min(sizes)


def _cgroups():
    """Return (folder, name of the file with its memory limit, name of that with its usage) of each cgroup of this process."""
    groups = []
    # a line is like 0::/user.slice (cgroups of version 2) or 4:cpu,memory:/docker/1f (version 1)
    for line in _read('/proc/self/cgroup').splitlines():
        number, controllers, path = line.split(':', 2)
        if number == '0':
            root, *names = '/sys/fs/cgroup', 'memory.max', 'memory.current'
        elif 'memory' in controllers.split(','):
            root, *names = '/sys/fs/cgroup/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes'
        else:
            continue
        group = Path(root, path.lstrip('/'))
        # limits of parents apply, too; inside a container only the root may be visible
        groups += [(folder, *names) for folder in (group, *group.parents)]
    return groups


def _read(file):
    """Return the text of a file, or '' if it cannot be read."""
    with contextlib.suppress(OSError):
        return Path(file).read_text()
    return ''


def _size(number):
    """Format a number of bytes, such as 1.2 GB or 3.4 MB."""
    return f'{number / 1e9:.1f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'
