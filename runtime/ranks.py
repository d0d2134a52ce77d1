"""The processes of a run, started by torchrun or alone: process group, ranks, and what they tell one another.

A data rank is the tp neighbouring processes that hold a model together (tensor parallelism) and get the same data."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from configurator import UserError

_tp_size = 1  # tensor parallelism: number of neighbouring ranks that share the matrices of each block; set by setup


def setup(tp=1):
    """Join torchrun's process group, or create a group of one process. Returns (data rank, number of data ranks, device).

    tp: this many neighbouring ranks get the same data, and count as one data rank. UserError if it does not divide all ranks."""
    global _tp_size
    device = _own_device()
    if not dist.is_initialized():
        _join_process_group(device)
    world_size = dist.get_world_size()
    if world_size % tp:
        raise UserError(f'tp={tp} needs a multiple of {tp} ranks, and there are {world_size}: see --nproc_per_node')
    _tp_size = tp
    return *data_rank(), device


def _join_process_group(device):
    """Create the default process group: of all ranks that torchrun started, or without torchrun of this process alone."""
    # without torchrun
    store, rank, world_size = dist.HashStore(), 0, 1
    if 'RANK' in os.environ:
        store, rank, world_size = next(rendezvous('env://'))
        # torch 2.13's agent reuses its store after a restart, with the addresses of dead ranks, on which this one would hang: so use a
        # key prefix per restart. On several hosts counts can differ: there, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (a new store)
        has_one_agent = os.environ.get('GROUP_WORLD_SIZE') == '1'
        restarts = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if has_one_agent else '0'
        store = dist.PrefixStore(f'start{restarts}', store)
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def _own_device():
    """Return this process's device, its own GPU or else the CPU, and make it current. Raises UserError if GPUs are too few."""
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    local_world_size = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if not torch.cuda.is_available():
        # divide the cores among the processes of this host
        if 'OMP_NUM_THREADS' not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
        return torch.device('cpu')
    gpus = torch.cuda.device_count()
    if local_world_size > gpus:
        problem = f'{local_world_size} processes are started on a machine with {gpus} GPUs, and each needs its own'
        error = UserError(f'{problem}: start with --nproc_per_node={gpus}')
        # of_this_rank: print the error here. Normally only rank 0 prints, but it may be on another host
        error.of_this_rank = local_rank == 0
        raise error
    device = torch.device('cuda', local_rank)
    torch.cuda.set_device(device)
    return device


def data_rank():
    """Return (data rank, number of data ranks). The ranks of a tensor-parallel group share their data and count as one."""
    return dist.get_rank() // _tp_size, dist.get_world_size() // _tp_size


def tp_size():
    """Return how many neighbouring ranks hold a model together. Above 1, they must also generate in step."""
    return _tp_size


def leave(code=0):
    """Exit this process at once. A normal exit can crash: gloo's threads still use the interpreter while it shuts down."""
    # no rank may exit while another one still sends
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- collectives: every rank has to call these ----


def gather_objects(value):
    """Return the list of all ranks' values, in rank order, on every rank. Values are pickled, so they should be small."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_ranks(runs_here, fn):
    """Return fn() on ranks where runs_here is true, and None on the others. A UserError on one rank is raised on all of them."""
    result = error = None
    if runs_here:
        try:
            result = fn()
        except UserError as e:
            error = str(e)
    for message in gather_objects(error):
        if message is not None:
            raise UserError(message)
    return result


def on_one_rank(fn):
    """Return fn() on rank 0, and None on the other ranks. Its UserError is raised on all ranks."""
    return on_ranks(dist.get_rank() == 0, fn)


def shared(fn):
    """Call fn() on rank 0 and broadcast its result, which must be picklable. Its UserError is raised on all ranks."""
    return gather_objects(on_one_rank(fn))[0]


def first_of_host(fn):
    """Return fn() on every rank. One rank of each host runs first, so that the others find what fn has cached."""
    is_first = int(os.environ.get('LOCAL_RANK', 0)) == 0
    results = [on_ranks(is_first, fn), on_ranks(not is_first, fn)]
    return results[0] if is_first else results[1]


def largest(numbers):
    """Return the elementwise maximum over all ranks of a list of integers. It runs on the CPU: no wait for the GPU."""
    table = torch.tensor(numbers)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return table.tolist()
