"""Everything distributed: set-up, sharding (FSDP2), reductions. What a run writes with it is in checkpoint.py.

The same code runs under torchrun on NCCL or gloo, and in one process without torchrun (a group of one). A group of ranks
sees one model: what the scripts compute does not depend on how many there are.
"""

import contextlib
import functools
import math
import os
import sys
import types

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous

import guard
from configurator import UserError
from data import pack
from log import say
from model import (
    blocks,
    core,
    hidden_and_head,
    response_logps,
    response_scores,
    set_attention,
    tie_as,
    ties,
    token_logps,
)
from parallel import tensor_parallel

_tp = 1  # ranks that share the matrices of a block, and their data: neighbours


def setup(tp=1):
    """Join torchrun's process group, or make a group of one. Returns (rank, number of ranks, device).

    tp: ranks that hold one copy of the model's blocks together, and count as one: they get the same data. Raises UserError."""
    global _tp
    cuda = torch.cuda.is_available()
    local_rank, local_world = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    device = torch.device('cuda', local_rank) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
    elif 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    if not dist.is_initialized():
        backend = 'cpu:gloo,cuda:nccl' if cuda else 'gloo'
        if 'RANK' in os.environ:
            # torch 2.13's agent keeps one store over restarts: without a name for each, ranks can find the addresses of dead ones
            # and hang. Several agents count restarts each for itself: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the way
            again = (
                os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if os.environ.get('GROUP_WORLD_SIZE') == '1' else '0'
            )
            store, rank, world = next(rendezvous('env://'))
            dist.init_process_group(
                backend, store=dist.PrefixStore(f'start{again}', store), rank=rank, world_size=world
            )
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if (world := dist.get_world_size()) % tp:
        raise UserError(
            f'tp={tp} needs a multiple of {tp} ranks, and there are {world}: see --nproc_per_node of torchrun'
        )
    _tp = tp
    return *data_rank(), device


def data_rank():
    """(rank, number of ranks), where those that share their data count as one: as setup has returned them."""
    return dist.get_rank() // _tp, dist.get_world_size() // _tp


def in_groups():
    """Whether there are tensor-parallel groups, whose ranks have to generate in step."""
    return _tp > 1


@functools.cache
def _mesh(device_type, tp, group):
    """The ranks of the default group as ('dp', 'tp'), or as ('dp',) without tensor parallelism."""
    shape = (dist.get_world_size() // tp, tp) if tp > 1 else (dist.get_world_size(),)
    return init_device_mesh(device_type, shape, mesh_dim_names=('dp', 'tp')[: len(shape)])


def leave(code=0):
    """End the process at once. An ordinary exit can abort: gloo's threads want the interpreter while it goes away."""
    dist.barrier()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def on_ranks(mine, fn):
    """fn() on the ranks where mine is true; a UserError on any is raised on all. The others get None."""
    result = error = None
    if mine:
        try:
            result = fn()
        except UserError as e:
            error = str(e)
    for message in filter(None, gather_objects(error)):
        raise UserError(message)
    return result


def on_one_rank(fn):
    """fn() on rank 0; its UserError is raised on all ranks. The others get None."""
    return on_ranks(dist.get_rank() == 0, fn)


def first_of_host(fn):
    """fn() on every rank, but first on one rank of every host: the others find what it has put into the cache."""
    first = int(os.environ.get('LOCAL_RANK', 0)) == 0
    before, after = on_ranks(first, fn), on_ranks(not first, fn)
    return before if first else after


def gather_objects(value):
    """The values of all ranks, in rank order, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_columns(columns, index, total):
    """Columns of this rank's examples -> the whole step's, in step order, equal on every rank.

    columns: name -> (k,) tensor, the same names on all ranks; index: the k places in the step, -1 for fillers that do not
    count; total: number of examples of the step. Returns name -> (total,) float64 on the CPU."""
    names = sorted(columns)
    place = torch.as_tensor(index, dtype=torch.long)
    if dist.get_rank() % _tp:
        place = torch.full_like(place, -1)  # the first rank of its tensor-parallel group has the same columns
    table = torch.zeros(len(names), total, dtype=torch.float64)
    table[:, place[place >= 0]] = torch.stack([columns[n].detach().double().cpu() for n in names])[:, place >= 0]
    dist.all_reduce(table)
    return dict(zip(names, table, strict=True))


def smallest(values):
    """The smallest element of a tensor over all ranks."""
    least = values.min()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return least


def largest(numbers):
    """The largest of each of a few integers over all ranks. On the CPU: no wait for the device."""
    table = torch.tensor(numbers)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return table.tolist()


# ---- models ----


@guard.memory_for('a model does not fit; try --dtype=bfloat16, --cpu_offload or more GPUs, or a smaller one')
def shard(build, device, *, dtype='float32', train=True, compile=False, activation_checkpointing=False, cpu_offload=False,
          device_map=None):  # fmt: skip
    """A sharded model on every rank, with the weights that build(empty=False) read on rank 0 alone.

    build(empty) -> transformers model on the CPU, without weights if empty. dtype: 'float32', or 'bfloat16' for compute
    (and for frozen weights) with float32 master weights, gradients and reductions. cpu_offload: weights and optimizer stay in
    the memory of the CPU, if the device is another one. device_map: instead of all this, one process's build spreads the model.
    One process in float32 needs no FSDP, which would copy every weight in each pass: the model stays what build made."""
    alone = dist.get_world_size() == 1 and dtype == 'float32' and not cpu_offload and device_map is None
    full = on_one_rank(lambda: build(empty=False)) if device_map is None else None
    model = full.to(device) if alone else build(empty=True) if device_map is None else build(device_map=device_map)
    if not train:
        model.requires_grad_(False)
    if activation_checkpointing:
        enable = 'activation_checkpointing_enable'  # its name since transformers 5.20
        getattr(core(model), enable, getattr(core(model), 'gradient_checkpointing_enable', None))()
        for block in blocks(model):
            block.training = True  # the block alone: its dropout layers stay in eval mode
    for block in blocks(model) if compile else ():
        block.compile()
    if alone or device_map is not None:
        model.reshard = lambda: None
    else:
        _distribute(model, full, device, dtype == 'bfloat16', cpu_offload)
    for method in (response_logps, hidden_and_head, response_scores, token_logps, _begin):
        add_method(model, method)
    if not alone and device_map is None:
        _compare(model, full, device, dtype == 'bfloat16')
    set_attention(model, packed=True)
    return model


def _compare(model, full, device, half):
    """Whether the sharded model still gives one made-up example what the loaded one, which rank 0 has, gives it: in float32 a
    difference is a UserError, in bfloat16, where one may be rounding, a warning."""

    def measure(m, device):
        """Log-probs (with values, where there are some) of every answer token, or scores: (rows, N), float32, on the CPU."""
        ids = np.random.default_rng(0).integers(core(m).get_input_embeddings().num_embeddings, size=12)
        batch = pack([(ids[:4], [ids[4:8], ids[8:]])], [0], pad=True, device=device)
        function = response_scores if hasattr(core(m), 'score') else token_logps
        forward = getattr(m, function.__name__, functools.partial(function, m))
        set_attention(m, packed=False)
        # compiled blocks would be compiled for this one batch
        with torch.no_grad(), torch.compiler.set_stance('force_eager'):
            return forward(batch).float().cpu()

    def before():
        try:
            return measure(full, 'cpu')
        except Exception as error:  # some have kernels for a GPU only; can_pack says what fails there as well
            say(f'note: the loaded model was not compared with the sharded one: {type(error).__name__} on the CPU')

    expected = gather_objects(on_one_rank(before))[0]
    if expected is None:
        return
    found = measure(model, device)
    model.reshard()
    error = ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
    if error <= (0.1 if half else 0.01):
        return
    name = type(core(model)).__name__.removeprefix('FSDP')  # the prefix that sharding gives it
    text = f'the sharded {name} gives other log-probs than the loaded one: off by {error:.1%}'
    if not half:
        raise UserError(f'{text}; start it in one process without torchrun, in float32, and report this')
    say(f'warning: {text}, more than bfloat16 should cost: compare with --dtype=float32')


def _distribute(model, full, device, half, cpu_offload):
    """Cut the empty model over the ranks, in place, and fill it from full, which rank 0 alone has."""
    # which parameters are one tensor depends on the file, which rank 0 alone has read
    tie_as(model, gather_objects(ties(full) if full else None)[0])
    for p in model.parameters() if half else ():  # not model.to: rotary frequencies must stay float32
        p.data = p.data if p.requires_grad else p.data.to(torch.bfloat16)
    mesh = _mesh(device.type, _tp, dist.group.WORLD)
    if _tp > 1:
        tensor_parallel(model, mesh['tp'], mesh['dp'].size())
    settings = {'mesh': mesh['dp'], 'mp_policy': MixedPrecisionPolicy()}
    if half:
        settings['mp_policy'] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    home = torch.device('cpu') if cpu_offload else device
    settings['offload_policy'] = CPUOffloadPolicy(device.type == 'cuda') if cpu_offload else OffloadPolicy()
    for block in blocks(model):
        fully_shard(block, **settings)
    fully_shard(model, **settings, reshard_after_forward=False)
    model.to_empty(device=home)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full.state_dict() if full else {}, options=options)
    sources = dict(full.named_buffers()) if full else {}
    for (
        name,
        buffer,
    ) in model.named_buffers():  # the state dict lacks the non-persistent ones, such as rotary frequencies
        if full:
            buffer.copy_(sources[name])
        dist.broadcast(buffer, 0)
    for module in model.modules() if home != device else ():  # FSDP brings parameters to the device, but not buffers
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def add_method(model, function):
    """model.function(...) as a forward of the root: outside of one, parts of a sharded model see no gathered parameters."""
    setattr(model, function.__name__, types.MethodType(function, model))
    register_fsdp_forward_method(model, function.__name__)


def _begin(model):
    """A forward of nothing. FSDP takes the module whose forward runs first for the root; generation calls one inside PEFT's."""


@contextlib.contextmanager
def unsharded(model):
    """Keep all parameters gathered: generation is several times faster, and ranks need not generate in step."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    try:
        if modules:
            model._begin()
        for m in modules:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        yield
    finally:
        for m in modules:
            m.set_reshard_after_forward(m is not model, recurse=False)
            m.reshard()


def make_optimizer(name, model, lr, weight_decay):
    """AdamW, SGD, or RMSprop (the original DPO code's choice: half of AdamW's memory), over the trainable parameters."""
    params, fused = [p for p in model.parameters() if p.requires_grad], {'fused': True} if name == 'AdamW' else {}
    return getattr(torch.optim, name)(params, lr=lr, weight_decay=weight_decay, **fused)


def update(model, optimizer, lr, scale, max_norm, strict=True):
    """One optimizer step on scale times the gradients, clipped to max_norm. Returns the norm before clipping.

    scale: number of ranks / sum of the weights, since FSDP has averaged over ranks sums of weighted gradients. Where the norm is
    not finite, the weights stay what they are, and it is a UserError; not strict: the caller sees to it."""
    model.reshard()
    groups = {}  # by mesh, with tensor parallelism there are two, or else by nothing
    for p in model.parameters():
        if p.grad is not None:
            groups.setdefault(getattr(p.grad, 'device_mesh', None), []).append(p.grad)
    norms = [torch.nn.utils.get_total_norm(grads) for grads in groups.values()]
    norm = math.hypot(*((n.full_tensor() if hasattr(n, 'full_tensor') else n).item() for n in norms)) * scale
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        if not strict:
            return norm
        raise UserError(f'the gradient norm is {norm}: lower the learning rate, or look for broken examples')
    for grads in groups.values():
        torch._foreach_mul_(grads, scale * min(1.0, max_norm / (norm + 1e-6)))
    for group in optimizer.param_groups:
        group['lr'] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
