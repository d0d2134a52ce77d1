"""The processes of a run, started by torchrun or alone: process group, ranks, and what they tell one another.

A data rank is the tp neighbouring processes that hold a model together (tensor parallelism) and get the same data."""

import contextlib
import ctypes
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from configurator import UserError

# how long ranks wait for one another, of which one may tokenise, hash or write alone. Where one dies, torchrun ends the others
PATIENCE = timedelta(hours=12)  # torch: 10 or 30 minutes
_tp_size = 1  # tensor parallelism: number of neighbouring ranks that share the matrices of each block; set by setup


def setup(tp=1, options=()):
    """Join torchrun's process group, or create a group of one process. Returns (data rank, number of data ranks, device).

    tp: this many neighbouring ranks count as one data rank. options: of the script, name -> value. UserError if ranks differ in them,
    if tp does not divide the number of ranks, or if this machine has fewer GPUs than processes."""
    global _tp_size
    device = _own_device()
    if not dist.is_initialized():
        store, rank, world_size = _meeting_place()
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    # each host has a command line and config file of its own: with two values of lr, say, copies of a model would drift apart
    ours = dict(options)
    for other_rank, theirs in enumerate(gather_objects(ours)):
        for name, here in ours.items():
            if theirs.get(name) != here:
                problem = f'{name} is {theirs.get(name)!r} on rank {other_rank}, and {here!r} on this one'
                raise UserError(f'{problem}: start the same command, with the same config file, on all hosts')
    world_size = dist.get_world_size()
    if world_size % tp:
        raise UserError(f'tp={tp} needs a multiple of {tp} ranks, not {world_size}: see --nproc_per_node')
    _tp_size = tp
    return *data_rank(), device


def _meeting_place():
    """Return (store by which the processes of a group find one another, rank, number of processes)."""
    if 'RANK' not in os.environ:  # without torchrun
        return dist.HashStore(), 0, 1
    missing = [name for name in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if missing:
        error = UserError(f'RANK is set, and {missing[0]} is not: start with torchrun, or unset RANK')
        error.of_this_rank = True  # nobody else may be there to print it
        raise error
    # a generator, whose first item is what the environment says now
    store, rank, world_size = next(rendezvous('env://'))
    # torchrun (torch 2.13) keeps its store when it restarts the processes. They would hang on addresses of dead ones in there: each
    # restart writes under a prefix of its own. Several hosts may count restarts differently, so they share one prefix, and need
    # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 to restart
    is_one_host = os.environ.get('GROUP_WORLD_SIZE') == '1'
    restarts = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if is_one_host else '0'
    return dist.PrefixStore(f'start{restarts}', store), rank, world_size


def _own_device():
    """Return this process's device: a GPU, made current (UserError if there are too few), or the CPU, whose cores processes divide."""
    local_rank = int(os.environ.get('LOCAL_RANK', 0))  # of this process on its own machine, as torchrun says
    local_world_size = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if not torch.cuda.is_available():
        if 'OMP_NUM_THREADS' not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
        # keep freed tensors' memory for the next ones: fresh pages take about 5% of a step. Other C libraries than glibc have no mallopt
        with contextlib.suppress(AttributeError, TypeError):
            mallopt = ctypes.CDLL(None).mallopt
            # parameters of malloc.h: M_TRIM_THRESHOLD, with -1 nothing goes back; M_MMAP_MAX, with 0 no tensor has a mapping of its own
            mallopt(-1, -1)
            mallopt(-4, 0)
        return torch.device('cpu')
    gpus = torch.cuda.device_count()
    if local_world_size > gpus:
        problem = f'each of {local_world_size} processes needs its own GPU, and the GPUs of this machine are {gpus}'
        error = UserError(f'{problem}: start with --nproc_per_node={gpus}')
        # errors.report() prints an error of_this_rank. Those of rank 0 are printed anyway, but it may be on another host
        error.of_this_rank = local_rank == 0
        raise error
    device = torch.device('cuda', local_rank)
    torch.cuda.set_device(device)
    return device


def data_rank():
    """Return (data rank, number of data ranks). With tp=2, the ranks 0 and 1 are data rank 0, the ranks 2 and 3 data rank 1."""
    return dist.get_rank() // _tp_size, dist.get_world_size() // _tp_size


def tp_size():
    """Return the size of a tensor-parallel group: so many neighbouring ranks hold a model together, and must generate in step."""
    return _tp_size


def leave(code=0):
    """Exit this process at once. A normal exit can crash: gloo's threads still use the interpreter while it shuts down."""
    dist.barrier()  # no rank may exit while another one still sends
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


def on_rank_0(fn):
    """Return fn() on rank 0, and None on the other ranks. Its UserError is raised on all ranks."""
    return on_ranks(dist.get_rank() == 0, fn)


def from_rank_0(fn):
    """Call fn() on rank 0 and return its result, which must be picklable, on all ranks. Its UserError is raised on all ranks."""
    return gather_objects(on_rank_0(fn))[0]


def first_of_host(fn):
    """Return fn() on every rank. One rank of each host runs first, so that the others find what fn has cached."""
    is_first = int(os.environ.get('LOCAL_RANK', 0)) == 0
    of_first = on_ranks(is_first, fn)
    of_others = on_ranks(not is_first, fn)
    return of_first if is_first else of_others


def largest(numbers):
    """Return the elementwise maximum over all ranks of a list of integers. Does not wait for the GPU, as it runs on the CPU."""
    table = torch.tensor(numbers)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return table.tolist()
