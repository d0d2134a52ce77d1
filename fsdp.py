"""Everything distributed, for torchrun or a single process: collectives, replicas or FSDP2, gradients and the optimizer step."""

import contextlib
import math
import os
import sys
import types
from functools import cache, partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from configurator import UserError
from hf import lean, probe
from hf.parallel import tensor_parallel
from hf.ties import tie_as, ties
from model import blocks, core, hidden_and_head, response_logps, set_attention
from rl.heads import response_scores, token_logps
from runtime import guard, room
from runtime.rmsprop import RMSprop

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


def in_groups():
    """Return whether tensor parallelism is on. The ranks of a group must then generate in step."""
    return _tp_size > 1


@cache
def _mesh(device_type, tp, replicated, group):
    """Return a DeviceMesh of all ranks: ('dp',), or if replicated ('copies', 'dp') with a single rank in dp; plus 'tp' if tp > 1."""
    # FSDP shards over dp. group, the default process group, is only a cache key: a new group needs a new mesh
    n = dist.get_world_size() // tp
    sizes = {'copies': n, 'dp': 1} if replicated else {'dp': n}
    if tp > 1:
        sizes['tp'] = tp
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


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


def gather_columns(columns, slots, total):
    """Combine each rank's columns into those of the whole step, on every rank. Returns name -> (total,) float64 CPU tensor.

    columns: name -> (k,) tensor, same names on all ranks. slots: index in the step of each example; -1: a filler, left out."""
    names = sorted(columns)
    # stacked into one (names, k) tensor: a single device-to-host copy
    own_values = torch.stack([columns[name].detach().double() for name in names]).cpu()
    slots = torch.as_tensor(slots, dtype=torch.long)
    # all ranks of a tensor-parallel group have the same columns: count only the first rank's
    counts = (slots >= 0) & (dist.get_rank() % _tp_size == 0)
    # every rank fills in its own slots and leaves zeros elsewhere: the sum over ranks is the whole step
    table = torch.zeros(len(names), total, dtype=torch.float64)
    table[:, slots[counts]] = own_values[:, counts]
    dist.all_reduce(table)
    return dict(zip(names, table, strict=True))


def smallest(values):
    """Return the smallest element of a tensor over all ranks, as a 0-d tensor."""
    least = values.min()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return least


def largest(numbers):
    """Return the elementwise maximum over all ranks of a list of integers. It runs on the CPU: no wait for the GPU."""
    table = torch.tensor(numbers)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return table.tolist()


# ---- models ----


@guard.memory_for('a model does not fit; try --dtype=bfloat16, --cpu_offload or more GPUs, or a smaller one')
def shard(build, device, *, dtype='float32', train=True, mode='auto', cpu_offload=False, device_map=None, **options):
    """Load a model on rank 0 and replicate or shard it over all ranks. Raises UserError if it then computes other log-probs.

    build(empty): make the transformers model on the CPU, without weights if empty. dtype: compute dtype; weights that train stay
    float32. train=False: freeze it. mode: none, grads, full or auto (training.py's option shard). cpu_offload: keep weights and
    optimizer on the CPU. device_map: build(device_map=...) spreads the model over this process's GPUs. options: of _recompute."""
    half = dtype == 'bfloat16'
    by_fsdp = False
    expected_numbers = None  # what the loaded model computes for a probe; None: no need to compare
    if device_map is not None:
        mode, model = 'none', build(device_map=device_map)
    else:
        # full: the loaded model; None on all ranks but 0
        full = on_one_rank(partial(build, empty=False))
        mode = shared(partial(_choose_mode, full, mode, train, half, device, cpu_offload))
        # the weight file, not the config, says which parameters are tied
        tied = shared(partial(ties, full))
        # FSDP keeps the float32 master weights of bfloat16 training, even for replicas
        by_fsdp = mode != 'none' or (half and train)
        if by_fsdp or dist.get_world_size() > 1:
            expected_numbers = shared(partial(probe.measure_loaded, full))
        # FSDP shards an empty model and fills it afterwards; replicas on other ranks start empty, too
        model = build(empty=True) if by_fsdp or full is None else full
        tie_as(model, tied)
        if not by_fsdp:
            _replicate(model, device, tied, half)
    if not train:
        model.requires_grad_(False)
    _recompute(model, **options)
    model.shard_mode = mode
    if by_fsdp:
        _distribute(model, full, device, half, cpu_offload)
    model.reshard = types.MethodType(_reshard, model)
    for method in (response_logps, hidden_and_head, response_scores, token_logps, _begin):
        add_method(model, method)
    if expected_numbers is not None:
        probe.compare(model, expected_numbers, device, half)
    set_attention(model, packed=True)
    return model


def _choose_mode(model, mode, train, half, device, cpu_offload):
    """Resolve mode 'auto': 'none' if a replica fills at most a quarter of a rank's memory, else 'full'."""
    if mode != 'auto':
        return mode
    if _tp_size > 1 or cpu_offload:
        return 'full'
    if dist.get_world_size() == 1:
        return 'none'
    trained = sum(p.numel() for p in model.parameters() if train and p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    # bytes: a trained weight, its gradient and AdamW's two moments are float32
    needed = 16 * trained + (2 if half else 4) * frozen
    if device.type == 'cuda':
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = room.machine_memory() / int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return 'none' if needed <= available / 4 else 'full'


def _recompute(model, activation_checkpointing=False):
    """Turn on activation checkpointing, in place: for whole blocks (True), for cheap operations ('selective'), or not at all."""
    if activation_checkpointing == 'selective':
        lean.enable(model)
    elif activation_checkpointing:
        inner = core(model)
        # transformers 5.20 renamed the method, and warns of the old name
        renamed = hasattr(inner, 'activation_checkpointing_enable')
        enable = inner.activation_checkpointing_enable if renamed else inner.gradient_checkpointing_enable
        enable()
        # transformers checkpoints only blocks in training mode, but models here stay in eval mode. block.train() would also turn
        # on the dropout inside the block, so set the block's own flag only
        for block in blocks(model):
            block.training = True


def _to_bfloat16(parameters):
    """Cast parameters in place. Not model.to: buffers, such as rotary frequencies, must stay float32."""
    for p in parameters:
        p.data = p.data.bfloat16()


def _replicate(model, device, tied, half):
    """Move a model to the device, in place, in bfloat16 if half, and broadcast rank 0's tensors. tied: name -> earlier name."""
    if half:
        _to_bfloat16(model.parameters())
    if dist.get_rank() == 0:
        model.to(device)
    else:
        # to_empty unties parameters
        model.to_empty(device=device)
        tie_as(model, tied)
    tensors = [*model.parameters(), *model.buffers()]
    assert len(set(gather_objects(len(tensors)))) == 1, 'the broadcasts would hang: ranks have different tensors'
    for tensor in tensors:
        dist.broadcast(tensor.data, 0)


def _distribute(model, full, device, half, cpu_offload):
    """Shard an empty model by FSDP, in place, and load the weights of full, which is None on all ranks but 0."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    # a replica is sharded over a mesh of one rank: FSDP then does mixed precision only
    is_replica = model.shard_mode == 'none'
    mesh = _mesh(device.type, _tp_size, is_replica, group=dist.group.WORLD)
    settings = {'mesh': mesh['dp']}
    shard_device = device
    if half:
        # compute in bfloat16, sum gradients in float32
        settings['mp_policy'] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        # Round the float32 master weights to bfloat16, too. Otherwise a weight halfway between two bfloat16 numbers, common in
        # fp16 files, would jump to the other one with the first update, however small
        if full is not None:
            for p in full.parameters():
                p.data = p.data.bfloat16().to(p.dtype)
        # frozen weights are never updated, so they need no float32 copy
        _to_bfloat16(p for p in model.parameters() if not p.requires_grad)
    if cpu_offload:
        settings['offload_policy'] = CPUOffloadPolicy(pin_memory=device.type == 'cuda')
        shard_device = torch.device('cpu')
    if _tp_size > 1:
        tensor_parallel(model, mesh['tp'], mesh['dp'].size())
    # a unit per block, so that one block is gathered at a time; the root unit has the rest, which backward needs first
    model.stays_gathered = stays_gathered(model, model.shard_mode)
    for block in blocks(model):
        fully_shard(block, **settings, reshard_after_forward=not model.stays_gathered)
    fully_shard(model, **settings, reshard_after_forward=False)
    # a replica's bfloat16 copy of the weights serves all microbatches of a step
    if is_replica and model.stays_gathered:
        model.set_reshard_after_backward(False)
    _fill(model, full, device, shard_device)


def _fill(model, full, device, shard_device):
    """Load the weights of full (None on all ranks but 0) into an empty sharded model. Buffers go to device."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model.to_empty(device=shard_device)
    weights = {} if full is None else full.state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    # the state dict lacks non-persistent buffers, such as rotary frequencies: broadcast all buffers
    for name, buffer in model.named_buffers():
        if full is not None:
            buffer.copy_(full.get_buffer(name))
        dist.broadcast(buffer, 0)
    # with cpu_offload, FSDP moves parameters to the device for each pass, but not buffers
    if shard_device != device:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)


def stays_gathered(model, mode):
    """Return whether FSDP keeps a block's weights gathered between forward and backward."""
    # in mode 'none' they are a bfloat16 copy; it is freed if some weights are frozen, which would be in memory twice
    if mode == 'none':
        return all(p.requires_grad for p in model.parameters())
    return mode == 'grads'


def add_method(model, function):
    """Bind function to the model as a method. FSDP gathers the root module's parameters for it, as it does for forward."""
    setattr(model, function.__name__, types.MethodType(function, model))
    if model in fsdp_modules(model):
        dist.fsdp.register_fsdp_forward_method(model, function.__name__)


def _reshard(model):
    """Free all gathered parameters. After a forward without backward, modules hold them instead of the optimizer's shards."""
    for module in fsdp_modules(model):
        # FSDP's own method, which model.reshard hides
        type(module).reshard(module)


def fsdp_modules(model):
    """Return the modules of a model that FSDP shards; an empty list for a model without FSDP."""
    return [m for m in model.modules() if hasattr(m, 'unshard')]


def _begin(model, unused):
    """Run an empty forward of the root module. unused: on CUDA, torch 2.11's FSDP indexes the forward's arguments."""


@contextlib.contextmanager
def unsharded(model):
    """Keep all parameters gathered in the with block. Generation is several times faster, and ranks need not run in step."""
    modules = fsdp_modules(model)
    try:
        # FSDP takes the first module that runs as its root, but generation may start inside PEFT's wrapper
        if modules:
            model._begin(None)
        for m in modules:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        yield
    finally:
        # restore what _distribute has set: the root never reshards after forward
        for m in modules:
            m.set_reshard_after_forward(m is not model and not model.stays_gathered, recurse=False)
        _reshard(model)


def make_optimizer(name, model, lr, weight_decay):
    """Return AdamW, SGD, or RMSprop (of the original DPO code; half of AdamW's memory) over the trainable parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    classes = {'AdamW': partial(torch.optim.AdamW, fused=True), 'RMSprop': RMSprop, 'SGD': torch.optim.SGD}
    return classes[name](params, lr=lr, weight_decay=weight_decay)


def local(tensor):
    """Return this rank's shard of a DTensor. A plain tensor is returned as it is."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def average_gradients(model):
    """Average a step's gradients over all ranks, in place, and return the list of them: tensors, or DTensors if sharded."""
    # free the gathered weights: the parameters are then the shards again, which have the gradients
    model.reshard()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    # FSDP has averaged them in backward
    if model.shard_mode != 'none':
        return grads
    # a replica has whole gradients; in bfloat16 they are DTensors over one rank
    grads = [local(grad) for grad in grads]
    world_size = dist.get_world_size()
    if world_size > 1:
        # one flat bucket, for a single all-reduce
        bucket = torch.cat([grad.flatten() for grad in grads]).div_(world_size)
        dist.all_reduce(bucket)
        for grad, mean in zip(grads, bucket.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
    return grads


def update(model, optimizer, lr, scale, max_norm):
    """Multiply the gradients by scale, clip them to max_norm, step and clear them. Returns the norm before clipping.

    scale: number of ranks / sum of example weights. If the norm is not finite, the step is skipped: weights do not change."""
    # get_total_norm wants tensors of one mesh: tensor parallelism has two meshes, a replica none
    grads_by_mesh = {}
    for grad in average_gradients(model):
        mesh = getattr(grad, 'device_mesh', None)
        grads_by_mesh.setdefault(mesh, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(grads) for grads in grads_by_mesh.values()]
    # the norm of DTensors is a DTensor; full_tensor reduces it over all ranks
    norms = [norm.full_tensor() if hasattr(norm, 'full_tensor') else norm for norm in norms]
    total_norm = math.hypot(*(norm.item() for norm in norms)) * scale
    if math.isfinite(total_norm):
        # scale and clip in one multiplication; 1e-6 as in clip_grad_norm_, for a norm of 0
        factor = scale * min(1.0, max_norm / (total_norm + 1e-6))
        for grads in grads_by_mesh.values():
            torch._foreach_mul_(grads, factor)
        for param_group in optimizer.param_groups:
            param_group['lr'] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total_norm
