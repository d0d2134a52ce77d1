"""Check before the first step that a run fits on the disk and into memory, and choose max_tokens='auto'.

training.py calls bytes_per_token() and choose_max_tokens() for max_tokens='auto', and check_room() for every run. There config
are the options of the run, train its Examples, packed whether microbatches have no padding."""

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
from hf.parts import blocks, core
from hf.quantize import count_packed_weights
from model import Head
from runtime import ranks
from runtime.files import say
from text.examples import counted

MOMENTS = {'AdamW': 2, 'RMSprop': 1, 'SGD': 0}  # float32 numbers that the optimizer keeps for each trained weight
# choices for max_tokens='auto'; larger microbatches are not faster
BUDGETS = [1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
SAVE_AFTER = 15 * 60  # seconds between checkpoints with save_every='auto'


def check_room(run, frozen_models=()):
    """Check disk and memory for a training.Run, and print a note on examples that are longer than max_tokens. Collective.

    frozen_models: those in memory besides the policy; None and the policy itself do not count. Returns whether checkpoints of
    save_every='auto' fit on the disk. Raises UserError if the model does not fit, or checkpoints that --save_every asks for."""
    config = run.config
    policy = run.policy
    # the exported model lacks ppo.py's value head and critic, which are in its checkpoints
    not_exported = {'critic', 'value_head'}
    exported = [p for name, p in policy.named_parameters() if not_exported.isdisjoint(name.split('.'))]
    bytes_each = 4 if config['save_dtype'] == 'float32' else 2
    # 4-bit weights are exported unpacked; as buffers, parameters() lacks them
    model_bytes = bytes_each * (_count(exported) + count_packed_weights(policy))
    # a checkpoint has the trained weights and the optimizer state, in float32
    numbers_each = 1 + MOMENTS.get(config['optimizer'], 2)
    checkpoint_bytes = 4 * numbers_each * _count(policy.parameters(), only_trained=True)
    checkpoints_fit = ranks.shared(lambda: _check_disk(config, model_bytes, checkpoint_bytes, run.total))

    # only for a CPU: if its memory is full, the system kills the process silently, where a GPU raises an error
    if not torch.cuda.is_available():
        frozen = [model for model in frozen_models if model is not None and model is not policy]
        _check_memory(run, sum(_count(model.parameters()) for model in frozen))
    # tokens that each training example takes in a microbatch, (n,)
    lengths = tokens_taken(run.train.widths, config.get('share_prefix', True), pad=not run.packed)
    too_long = lengths[lengths > run.max_tokens]
    if len(too_long):
        limit = f'max_tokens={run.max_tokens} (the longest: {too_long.max()})'
        say(f'note: longer than {limit}: {counted(len(too_long), "examples")}, each in a microbatch of its own')
    return checkpoints_fit


def _count(parameters, only_trained=False):
    """Return the total number of elements of parameters, or only of those that are trained."""
    return sum(p.numel() for p in parameters if p.requires_grad or not only_trained)


def _check_disk(config, model_bytes, checkpoint_bytes, total):
    """Return whether out_dir's disk has room for the model and the checkpoints of a run of total examples.

    Raises UserError if the model does not fit, or checkpoints that save_every asks for. With 'auto' it only warns."""
    out_dir = config['out_dir']
    every = config['save_every']  # examples between checkpoints, 0 or None for none, or 'auto': not known yet
    num_saves = 0
    if every == 'auto':
        num_saves = total
    elif every:
        # - 1: at the end of the run the model is written, and no checkpoint
        num_saves = (total - 1) // every
    num_present = len([entry for entry in Path(out_dir).glob('checkpoints/*') if entry.name.isdigit()])
    # + 1: an old checkpoint is deleted only after the new one is complete
    num_at_once = min(config['keep_last'] + 1, num_saves)
    num_to_come = max(0, num_at_once - num_present)
    free = shutil.disk_usage(out_dir).free
    if model_bytes + num_to_come * checkpoint_bytes <= free:
        return True
    text = f'{out_dir} lies on a disk with {_size(free)} free: the model takes {_size(model_bytes)}'
    if num_to_come:
        text += f', and checkpoints take {_size(checkpoint_bytes)} each ({num_to_come} to come)'
    # with 'auto', a run that is too short for checkpoints needs room for its model only
    if every != 'auto' or model_bytes > free:
        raise UserError(f'{text}; make room, or choose another --out_dir')
    say(f'warning: {text}: however long this run is, it writes no checkpoint')
    return False


def _check_memory(run, frozen):
    """Print the memory that all ranks on this machine need for a run; warn, with advice, if it has less.

    frozen: number of parameters of the models that are not trained."""
    tokens, is_step = _largest_batch(run.config, run.train, run.packed, run.max_tokens)
    needs_of_rank = _estimate_for(run.config, run.policy, run.bytes_per_token(), frozen, tokens, is_step)
    needs = {name: number * _ranks_here() for name, number in needs_of_rank.items() if number}
    total = sum(needs.values())
    available = machine_memory()
    parts = ', '.join(f'{name} {_size(number)}' for name, number in needs.items())
    if is_step:
        # 'gradients' are those beyond the activations
        parts = parts.replace('gradients', 'more gradients')
        parts = parts.replace('activations', 'activations, then gradients in their place')
    text = f'a microbatch of up to {tokens:,} tokens takes about {_size(total)} ({parts}), of the {_size(available)} of this machine'
    choice = f'max_tokens={run.max_tokens} (auto): ' if run.config['max_tokens'] == 'auto' else ''
    text = f'memory: {choice}{text}'
    if total <= available:
        say(text)
        return
    # only activations shrink with the microbatch, which holds at least the longest example
    share_that_fits = 1 - (total - available) / needs['activations']
    tokens_that_fit = max(int(run.train.lengths.max()), int(tokens * share_that_fits))
    advice = f'lower --max_tokens to {tokens_that_fit:,}, which changes no result, or try --activation_checkpointing or --lora_rank'
    say(f'warning: {text}: the system may kill this process; {advice}')


def estimate(policy, per_token, tokens, *, optimizer, dtype, world_size=1, shard='none', frozen=0, is_step=False):
    """Return the memory needed by one rank as name -> bytes: activations, weights, gradients, optimizer etc.

    policy: may be on the meta device; per_token: bytes of activations per token; tokens: of a microbatch; shard: none, grads
    or full, as in training.py; frozen: number of parameters of other models, in the compute dtype; is_step: the microbatch is a
    whole step. 'buffers' are a chunk of logits, and weights gathered by FSDP or copied to bfloat16; 'gradients' are left out as far
    as they take the place of activations."""
    bytes_each = 2 if dtype == 'bfloat16' else 4  # of a number in the compute dtype
    num_trained = _count(policy.parameters(), only_trained=True)
    # buffers: 4-bit weights, say
    not_trained = [p for p in policy.parameters() if not p.requires_grad] + list(policy.buffers())
    fixed_bytes = sum(x.numel() * x.element_size() for x in not_trained)
    # FSDP ('grads', 'full') divides everything but activations and buffers among the ranks
    num_shards = 1 if shard == 'none' else world_size
    gradients = 4 * num_trained / num_shards
    activations = per_token * tokens
    # backward of the only microbatch frees activations while it makes gradients; later ones begin beside gradients
    gradients_beside = max(0, gradients - activations) if is_step else gradients
    needs = {
        'activations': activations,
        'weights': (4 * num_trained + fixed_bytes) / num_shards,
        'gradients': gradients_beside,
        'optimizer': MOMENTS.get(optimizer, 2) * gradients,
        'reference': bytes_each * frozen / num_shards,
        'buffers': 0,
    }
    # with an LM head: the logits that model.Head has in memory at once, and the gradient of its weight
    head = core(policy).get_output_embeddings()
    if head is not None:
        vocab_size, hidden_size = head.weight.shape
        max_logits = Head.max_logits(head.weight.device)
        # Head takes the tokens of a microbatch in chunks; none is larger than the first, a slice from 0
        first_chunk = Head.chunks(int(tokens), vocab_size, max_logits)[0]
        # each chunk makes a gradient of the whole head weight. Both exist in float32, and also in bfloat16 if that is computed in
        bytes_of_copies = 4 + 2 if bytes_each == 2 else 4
        needs['buffers'] = bytes_of_copies * vocab_size * (first_chunk.stop + hidden_size)
    # a replica that trains in bfloat16 has copies of its weights
    if shard == 'none' and bytes_each == 2:
        needs['buffers'] += bytes_each * num_trained
    elif num_shards > 1 or bytes_each == 2:
        # before the policy is sharded, as in an estimate, count the blocks that FSDP will shard
        fsdp_blocks = [m for m in sharded.fsdp_modules(policy) if m is not policy]
        block_sizes = [_count(block.parameters()) for block in fsdp_blocks or blocks(policy)]
        # parameters outside of the blocks, such as the embedding, stay gathered; so does the current block, with its gradients, and
        # the next block, which is gathered early
        gathered = _count(policy.parameters()) - sum(block_sizes) + 3 * max(block_sizes)
        if shard == 'grads':
            gathered += sum(block_sizes)
        needs['buffers'] += bytes_each * gathered
    return needs


def save_every_of(step_ends, step, total):
    """Return save_every for 'auto': about SAVE_AFTER seconds worth of examples, or 0 if the run ends before that. Collective.

    step_ends: times at which steps ended; before the fourth, save_every stays 'auto'. step: the last. total: examples of the run."""
    if len(step_ends) < 4:
        return 'auto'
    # of a step: the median, measured on rank 0 so that all ranks agree
    seconds = ranks.shared(lambda: float(np.median(np.diff(step_ends))))
    num_steps = max(1, round(SAVE_AFTER / max(seconds, 1e-3)))
    examples_of_a_step = step.seen - step.first
    every = num_steps * examples_of_a_step
    if every >= total - step.seen:
        return 0
    say(f'note: a checkpoint every {every:,} examples, about 15 minutes; --save_every=0: none')
    return every


def choose_mode(model, mode, train, half, device, cpu_offload):
    """Return mode; for 'auto', 'none' (a whole model on each rank) if that fills at most a quarter of its memory, else 'full'."""
    if mode != 'auto':
        return mode
    if ranks.tp_size() > 1 or cpu_offload:
        return 'full'
    if dist.get_world_size() == 1:
        return 'none'
    trained = _count(model.parameters(), only_trained=True) if train else 0
    frozen = _count(model.parameters()) - trained
    # bytes: a trained weight, its gradient and AdamW's two moments are float32; frozen weights may be bfloat16 (half)
    needed = 16 * trained + (2 if half else 4) * frozen
    if device.type == 'cuda':
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = machine_memory() / _ranks_here()
    return 'none' if needed <= available / 4 else 'full'


def choose_max_tokens(config, policy, per_token, train, packed, n_frozen):
    """Return the largest of BUDGETS whose microbatches fit into every rank's free memory, or the smallest. Collective.

    per_token: bytes of activations per token; n_frozen: number of models of the policy's size that are still to be loaded."""
    free = free_memory()
    frozen = n_frozen * _count(policy.parameters())
    # fill this share of it: CPU allocators hold up to a third more than the tensors need, and a GPU nine tenths full is slower
    usable = (0.85 if next(policy.parameters()).is_cuda else 0.7) * free

    def bytes_to_come(max_tokens):
        needs = _estimate_for(config, policy, per_token, frozen, *_largest_batch(config, train, packed, max_tokens))
        # the policy's weights are in memory already
        return sum(needs.values()) - needs['weights']

    fitting = [max_tokens for max_tokens in BUDGETS if bytes_to_come(max_tokens) <= usable]
    # the smallest of the ranks' choices: ranks has only the maximum, so negate them
    (negative,) = ranks.largest([-max(fitting, default=BUDGETS[0])])
    max_tokens = -negative
    # on a CPU, check_room() prints the details
    if torch.cuda.is_available():
        sizes = f'each rank will take about {_size(bytes_to_come(max_tokens))} more, where {_size(free)} are free'
        say(f'memory: max_tokens={max_tokens} (auto): {sizes}')
    return max_tokens


def _estimate_for(config, policy, per_token, frozen, tokens, is_step):
    """Return estimate() for a microbatch of this many tokens, with the options of this run: config, a dict."""
    options = {'optimizer': config['optimizer'], 'dtype': config['dtype'], 'frozen': frozen, 'is_step': is_step}
    options['world_size'] = dist.get_world_size()
    options['shard'] = getattr(policy, 'shard_mode', 'full')
    return estimate(policy, per_token, tokens, **options)


def _largest_batch(config, train, packed, max_tokens):
    """Return (tokens of the largest microbatch, whether it is a whole step): max_tokens, the longest example, or less in small steps."""
    lengths = tokens_taken(train.widths, config.get('share_prefix', True), pad=not packed)
    # an example longer than max_tokens is a microbatch of its own
    longest = int(lengths.max())
    tokens = max(max_tokens, longest)
    # a step of ppo.py has minibatch_size answers, and not batch_size examples; with padding, a step takes more than its tokens
    if 'minibatch_size' in config or not packed:
        return tokens, False
    # the largest step has the batch_size longest examples. It has some of them again if it is larger than the data, or if it
    # reaches into the next epoch
    batch_size, n_examples = config['batch_size'], len(lengths)
    crosses_epochs = config.get('n_epochs', 1) > 1 and n_examples % batch_size > 0
    max_copies = math.ceil(batch_size / n_examples) + crosses_epochs
    largest_step = int(np.sort(np.tile(lengths, max_copies))[-batch_size:].sum())
    _, world_size = ranks.data_rank()
    # examples are not divided, so a rank may have one more than its share
    largest_share = largest_step if world_size == 1 else largest_step // world_size + longest
    largest = max(longest, largest_share)
    return min(tokens, largest), largest <= tokens


def bytes_per_token(policy, forward, train, packed):
    """Measure and return the bytes of activations per token that are kept for backward.

    forward(batch): the policy's training forward, run here on the example of median length."""
    median = int(np.argsort(train.lengths, kind='stable')[len(train) // 2])
    device = next(policy.parameters()).device
    batch = pack([train[median]], [0], pad=not packed, device=device)
    # dropout must not advance the training RNG, on a GPU its own
    devices = [batch.ids.device] if batch.ids.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), sharded.unsharded(policy):
        kept = _kept_bytes(lambda: forward(batch))
        # with activation checkpointing, backward recomputes one block at a time: add the activations of an average block, those of
        # a forward without checkpointing divided by the number of blocks. hf/lean.py has made the forward of each such block
        # partial(checkpointed, its own forward)
        checkpointed = {}
        for m in policy.modules():
            if getattr(m.forward, 'func', None) is lean.checkpointed:
                checkpointed[m] = m.forward
        for block, recomputing in checkpointed.items():
            block.forward = recomputing.args[0]
        if checkpointed:
            kept += _kept_bytes(lambda: forward(batch)) / len(checkpointed)
        for block, recomputing in checkpointed.items():
            block.forward = recomputing
    return kept / batch.ids.numel()


def _kept_bytes(function):
    """Call function and return the bytes of the tensors it creates that are still alive at its end, result included."""
    created = {}  # address of a storage (the memory behind tensors) -> (weak reference to it, bytes)

    # storages of all tensors in nested values, as in created
    def storages(values):
        by_address = {}
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                storage = sharded.local(value).untyped_storage()
                by_address[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return by_address

    # sees every tensor operation, including those that build the autograd graph
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            # views and in-place results share the storage of an argument
            input_storages = storages((args, kwargs))
            for address, storage in storages(out).items():
                if address not in input_storages:
                    created[address] = storage
            return out

    with Watch():
        result = function()  # noqa: F841 keeps the result alive while it is counted
    return sum(size for reference, size in created.values() if not reference.expired())


def bfloat16_costs():
    """Return the time of a bfloat16 matmul on this CPU relative to float32, below 1 if it has bfloat16 instructions."""

    def seconds(dtype):
        matrix = torch.ones(256, 256, dtype=dtype)
        # best of five, in the CPU time of this thread: others on the machine do not count
        return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=5, timer=time.thread_time))

    return seconds(torch.bfloat16) / seconds(torch.float32)


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
    """Return the bytes of this machine's memory, or of this process's cgroup if less; free: only what is not in use.

    /proc/self/cgroup has a line `0::/user.slice` for version 2, or one like `4:cpu,memory:/docker/1f` for version 1."""
    size = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    available = re.search(r'MemAvailable:\s*(\d+)', _read('/proc/meminfo'))
    if free and available:
        size = 1024 * int(available[1])
    sizes = [size]
    # of cgroups: mount point, and the files that hold limit and usage
    version_2 = ('/sys/fs/cgroup', 'memory.max', 'memory.current')
    version_1 = ('/sys/fs/cgroup/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes')
    groups = []  # (folder, name of the file with its limit, name of that with its usage)
    # (start, path): ('0:', 'user.slice') and ('4:cpu,memory', 'docker/1f')
    for start, path in re.findall(r'^(0:|\d+:[^:]*\bmemory\b[^:]*):/(.*)', _read('/proc/self/cgroup'), re.M):
        root, *names = version_2 if start == '0:' else version_1
        group = Path(root, path)
        # limits of parents apply, too; inside a container only the root may be visible
        groups += [(folder, *names) for folder in (group, *group.parents)]
    for folder, limit_file, usage_file in groups:
        # without a limit the file holds 'max' or is missing
        with contextlib.suppress(ValueError, TypeError):
            size = int(_read(folder / limit_file))
            if free:
                # file caches count as in use, but can be reclaimed
                cached = re.search(r'^(?:total_)?inactive_file (\d+)', _read(folder / 'memory.stat'), re.M)
                size += int(cached[1]) - int(_read(folder / usage_file))
            sizes.append(size)
    return min(sizes)


def _read(file):
    """Return the text of a file, or '' if it cannot be read."""
    with contextlib.suppress(OSError):
        return Path(file).read_text()
    return ''


def _size(number):
    """Format a number of bytes, such as 1.2 GB or 3.4 MB."""
    return f'{number / 1e9:.1f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'
