"""Everything distributed: set-up, sharding (FSDP2), reductions. What a run writes with it is in checkpoint.py.

The same code runs under torchrun on NCCL or gloo, and in one process without torchrun (a group of one). A group of ranks
sees one model: what the scripts compute does not depend on how many there are.
"""

import contextlib
import math
import os
import sys
import types

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from configurator import UserError
from model import core, hidden_and_head, response_logps, response_scores, set_attention


def setup():
    """Join torchrun's process group, or make a group of one. Returns (rank, world size, device)."""
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
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def leave():
    """End the process at once. An ordinary exit can abort: gloo's threads want the interpreter while it goes away."""
    dist.barrier()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


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
    table = torch.zeros(len(names), total, dtype=torch.float64)
    table[:, place[place >= 0]] = torch.stack([columns[n].detach().double().cpu() for n in names])[:, place >= 0]
    dist.all_reduce(table)
    return dict(zip(names, table, strict=True))


def smallest(values):
    """The smallest element of a tensor over all ranks."""
    least = values.min()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return least


# ---- models ----


def shard(build, device, *, dtype='float32', train=True, compile=False, activation_checkpointing=False):
    """A sharded model on every rank, with the weights that build(empty=False) read on rank 0 alone.

    build(empty) -> transformers model on the CPU, without weights if empty. dtype: 'float32', or 'bfloat16' for compute
    (and for the reference's weights) with float32 master weights, gradients and reductions."""
    full = on_one_rank(lambda: build(empty=False))
    model = build(empty=True)
    model.requires_grad_(train)
    if activation_checkpointing:
        enable = 'activation_checkpointing_enable'  # its name since transformers 5.20
        getattr(model, enable, getattr(model, 'gradient_checkpointing_enable', None))()
    half = dtype == 'bfloat16'
    if half and not train:
        for p in model.parameters():  # not model.to: rotary frequencies must stay float32
            p.data = p.data.to(torch.bfloat16)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    for block in blocks(model):
        if activation_checkpointing:
            block.training = True  # the block alone: its dropout layers stay in eval mode
        if compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device=device)
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
    for method in (response_logps, hidden_and_head, response_scores):
        add_method(model, method)
    set_attention(model, packed=True)
    return model


def add_method(model, function):
    """model.function(...) as a forward of the root: outside of one, parts of a sharded model see no gathered parameters."""
    setattr(model, function.__name__, types.MethodType(function, model))
    register_fsdp_forward_method(model, function.__name__)


def blocks(model):
    """The transformer blocks, by the class names that the model itself declares."""
    names = set(core(model)._no_split_modules or [])
    return [m for m in core(model).modules() if type(m).__name__ in names]


@contextlib.contextmanager
def unsharded(model):
    """Keep all parameters gathered: generation is several times faster, and ranks need not generate in step."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    try:
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


def update(model, optimizer, lr, scale, max_norm):
    """One optimizer step on scale times the gradients, clipped to max_norm. Returns the norm before clipping.

    scale: number of ranks / sum of the weights, since FSDP has averaged over ranks sums of weighted gradients."""
    model.reshard()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = (norm.full_tensor() if hasattr(norm, 'full_tensor') else norm).item() * scale
    if not math.isfinite(norm):
        raise UserError(f'the gradient norm is {norm}: lower the learning rate, or look for broken examples')
    torch._foreach_mul_(grads, scale * min(1.0, max_norm / (norm + 1e-6)))
    for group in optimizer.param_groups:
        group['lr'] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
