"""Everything distributed: set-up, models on many ranks (replicated, or sharded by FSDP2), reductions. checkpoint.py writes them.

The same code runs under torchrun on NCCL or gloo, and in one process without torchrun (a group of one). A group of ranks
sees one model: what the scripts compute does not depend on how many there are."""

import contextlib
import functools
import math
import os
import sys
import types

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

_tp = 1  # ranks that share the matrices of a block, and their data: neighbours


def setup(tp=1):
    """Join torchrun's process group, or make a group of one. Returns (rank, number of ranks, device).

    tp: ranks that hold one copy of the model's blocks together, and count as one: they get the same data. Raises UserError."""
    global _tp
    device = _own_device()
    if not dist.is_initialized():
        store, rank, world = dist.HashStore(), 0, 1
        if 'RANK' in os.environ:
            store, rank, world = next(rendezvous('env://'))
            # torch 2.13's agent keeps one store over restarts: without a name for each, ranks can find the addresses of dead ones
            # and hang. Several agents count restarts each for itself: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the way
            one_agent = os.environ.get('GROUP_WORLD_SIZE') == '1'
            again = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if one_agent else '0'
            store = dist.PrefixStore(f'start{again}', store)
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    # neighbours share the matrices of a block
    world = dist.get_world_size()
    if world % tp:
        raise UserError(f'tp={tp} needs a multiple of {tp} ranks, and there are {world}: see --nproc_per_node')
    _tp = tp
    return *data_rank(), device


def _own_device():
    """The device of this process: a GPU for each process of a host; on a CPU they share its cores. Raises UserError."""
    local_rank, local_world = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if not torch.cuda.is_available():
        if 'OMP_NUM_THREADS' not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
        return torch.device('cpu')
    gpus = torch.cuda.device_count()
    if local_world > gpus:
        more = f'{local_world} processes are started on a machine with {gpus} GPUs, and each needs its own'
        error = UserError(f'{more}: start with --nproc_per_node={gpus}')
        error.of_this_rank = local_rank == 0  # one of this machine says it
        raise error
    device = torch.device('cuda', local_rank)
    torch.cuda.set_device(device)
    return device


def data_rank():
    """(rank, number of ranks), where those that share their data count as one: as setup has returned them."""
    return dist.get_rank() // _tp, dist.get_world_size() // _tp


def in_groups():
    """Whether there are tensor-parallel groups, whose ranks have to generate in step."""
    return _tp > 1


@functools.cache
def _mesh(device_type, tp, replicated, group):
    """The ranks of the default group as ('dp', 'tp'), or as ('dp',) without tensor parallelism. FSDP cuts a model over 'dp'.

    replicated: as ('copies', 'dp'), where every rank is a 'dp' of its own."""
    sizes = {'dp': dist.get_world_size() // tp}
    if replicated:
        sizes = {'copies': sizes['dp'], 'dp': 1}
    if tp > 1:
        sizes['tp'] = tp
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def leave(code=0):
    """End the process at once. An ordinary exit can abort: gloo's threads want the interpreter while it goes away."""
    # nobody leaves while another still sends
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- what one rank does, and all of them know ----


def gather_objects(value):
    """The values of all ranks, in rank order, on every rank: picklable, small, and needed seldom."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_ranks(mine, fn):
    """fn() on the ranks where mine is true; a UserError on any is raised on all. The others get None."""
    # its error goes to all of them, so that none waits for one that has gone
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


def shared(fn):
    """fn() on rank 0; its value, picklable, or its UserError on all ranks."""
    return gather_objects(on_one_rank(fn))[0]


def first_of_host(fn):
    """fn() on every rank, but first on one rank of every host: the others find what it has put into the cache."""
    first = int(os.environ.get('LOCAL_RANK', 0)) == 0
    before, after = on_ranks(first, fn), on_ranks(not first, fn)
    return before if first else after


def gather_columns(columns, slots, total):
    """Columns of this rank's examples -> the whole step's, in step order, equal on every rank.

    columns: name -> (k,) tensor, the same names on all ranks; slots: of the k examples in the step, -1 for fillers that do not
    count; total: number of examples of the step. Returns name -> (total,) float64 on the CPU."""
    names = sorted(columns)
    mine = torch.stack([columns[name].detach().double() for name in names]).cpu()  # one wait for the device
    slots = torch.as_tensor(slots, dtype=torch.long)
    # of a tensor-parallel group, whose ranks have the same columns, the first one counts
    counts = (slots >= 0) & (dist.get_rank() % _tp == 0)

    # every rank fills in its own slots; the sum over ranks is the whole step
    table = torch.zeros(len(names), total, dtype=torch.float64)
    table[:, slots[counts]] = mine[:, counts]
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
def shard(build, device, *, dtype='float32', train=True, mode='auto', cpu_offload=False, device_map=None, **options):
    """A model on all ranks, with the weights that build(empty=False) read on rank 0 alone.

    build(empty) -> transformers model on the CPU, without weights if empty. dtype: 'float32', or 'bfloat16' for compute
    (and for frozen weights) with float32 master weights, gradients and reductions. mode: the option shard of training.py; one
    process is a replica without others. cpu_offload: weights and optimizer stay in the memory of the CPU, if the device is
    another one. device_map: instead of all this, one process's build spreads the model. options: activation_checkpointing."""
    half, by_fsdp, measured = dtype == 'bfloat16', False, None
    if device_map is not None:
        mode, model = 'none', build(device_map=device_map)
    else:
        # rank 0 reads the weights, and decides; which parameters are one tensor depends on the file
        full = on_one_rank(lambda: build(empty=False))
        choices = (mode, train, half, device, cpu_offload)
        mode, tied = shared(lambda: (_choose_mode(full, *choices), ties(full)))
        # FSDP keeps the float32 copies of what computes in bfloat16; frozen weights have none
        by_fsdp = mode != 'none' or (half and train)
        if by_fsdp or dist.get_world_size() > 1:
            measured = shared(lambda: probe.measure_loaded(full))
        # the others begin without any, and so does what FSDP cuts
        model = build(empty=True) if by_fsdp or full is None else full
        tie_as(model, tied)
        if not by_fsdp:
            if half:
                _round_weights(model.parameters())
            _replicate(model, device, tied)

    if not train:
        model.requires_grad_(False)
    _recompute(model, **options)
    # what the scripts call becomes a forward of the root
    model.shard_mode = mode
    if by_fsdp:
        _distribute(model, full, device, half, cpu_offload)
    model.reshard = types.MethodType(_reshard, model)
    for method in (response_logps, hidden_and_head, response_scores, token_logps, _begin):
        add_method(model, method)
    # every rank must compute what rank 0 has measured on the whole
    if measured is not None:
        probe.compare(model, measured, device, half)
    set_attention(model, packed=True)
    return model


def _choose_mode(model, mode, train, half, device, cpu_offload):
    """For 'auto': 'none' if weights, gradients and AdamW's moments fit into a quarter of a rank's memory, else 'full'."""
    if mode != 'auto':
        return mode
    if _tp > 1 or cpu_offload:
        return 'full'
    # one process has nobody to share with
    if dist.get_world_size() == 1:
        return 'none'
    # bytes: a weight that trains has a gradient and two moments beside it, all in float32
    trained = sum(p.numel() for p in model.parameters() if train and p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    takes = 16 * trained + (2 if half else 4) * frozen
    if device.type == 'cuda':
        has = torch.cuda.get_device_properties(device).total_memory
    else:
        has = room.machine_memory() / int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return 'none' if takes <= has / 4 else 'full'


def _recompute(model, activation_checkpointing=False):
    """Have the blocks of a model compute activations again in backward: all (True), or the cheap ones ('selective')."""
    if activation_checkpointing == 'selective':
        lean.enable(model)
    elif activation_checkpointing:
        # the method has another name since transformers 5.20
        inner = core(model)
        older = getattr(inner, 'gradient_checkpointing_enable', None)
        getattr(inner, 'activation_checkpointing_enable', older)()
        # the block alone: its dropout layers stay in eval mode
        for block in blocks(model):
            block.training = True


def _replicate(model, device, tied):
    """Bring a model to the device, in place, with the weights and buffers of rank 0, from whose file it was made. tied: see ties."""
    if dist.get_rank() == 0:
        model.to(device)
    else:
        model.to_empty(device=device)
        tie_as(model, tied)  # leaving the meta device makes two tensors of one
    tensors = [*model.parameters(), *model.buffers()]
    assert len(set(gather_objects(len(tensors)))) == 1, 'the ranks would wait for one another for ever'
    for tensor in tensors:
        dist.broadcast(tensor.data, 0)


def _round_weights(parameters):
    """Change frozen weights to bfloat16, in place. Not by model.to, for rotary frequencies must stay float32."""
    for p in parameters:
        p.data = p.data.to(torch.bfloat16)


def _distribute(model, full, device, half, cpu_offload):
    """Give the empty model to FSDP, in place, and fill it from full, which rank 0 alone has."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    mesh = _mesh(device.type, _tp, model.shard_mode == 'none', dist.group.WORLD)
    settings, home = {'mesh': mesh['dp']}, device
    if half:
        # compute in bfloat16, sum gradients in float32
        settings['mp_policy'] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        # passes read weights rounded to bfloat16. One that lies between two such numbers, as fp16 files have many, would jump to the
        # other with the first update, however small: float32 copies begin rounded, too
        for p in full.parameters() if full else ():
            p.data = p.data.bfloat16().to(p.dtype)
        _round_weights(p for p in model.parameters() if not p.requires_grad)
    if cpu_offload:
        settings['offload_policy'] = CPUOffloadPolicy(pin_memory=device.type == 'cuda')
        home = torch.device('cpu')
    # block by block, so that one at a time is gathered; then what is left at the root
    if _tp > 1:
        tensor_parallel(model, mesh['tp'], mesh['dp'].size())
    model.stays_gathered = stays_gathered(model, model.shard_mode)
    for block in blocks(model):
        fully_shard(block, **settings, reshard_after_forward=not model.stays_gathered)
    fully_shard(model, **settings, reshard_after_forward=False)
    # a replica's copy in bfloat16 serves all microbatches of a step
    if model.shard_mode == 'none' and model.stays_gathered:
        model.set_reshard_after_backward(False)

    # weights and buffers of rank 0; the state dict lacks the non-persistent buffers, such as rotary frequencies
    model.to_empty(device=home)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full.state_dict() if full else {}, options=options)
    sources = dict(full.named_buffers(remove_duplicate=False)) if full else {}
    for name, buffer in model.named_buffers():
        if full:
            buffer.copy_(sources[name])
        dist.broadcast(buffer, 0)
    # FSDP brings parameters to the device, but not buffers
    for module in model.modules() if home != device else ():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def stays_gathered(model, mode):
    """Whether the blocks' weights stay gathered between forward and backward: cut ones with 'grads', and replicas' copies in
    bfloat16 with 'none'. Beside adapters, what is frozen would be there twice."""
    if mode == 'none':
        return all(p.requires_grad for p in model.parameters())
    return mode == 'grads'


def add_method(model, function):
    """model.function(...) as a forward of the root: outside of one, parts of a sharded model see no gathered parameters."""
    setattr(model, function.__name__, types.MethodType(function, model))
    # FSDP gathers the parameters around what it knows as a forward
    if model in _cut(model):
        dist.fsdp.register_fsdp_forward_method(model, function.__name__)


def _reshard(model):
    """Free what is gathered. After a forward without backward a module still shows that, and not the optimizer's parameters."""
    for module in _cut(model):
        type(module).reshard(module)


def _cut(model):
    """The modules of a model that FSDP cuts: in a replica in float32 none."""
    return [m for m in model.modules() if hasattr(m, 'unshard')]


def _begin(model, nothing):
    """A forward of nothing. FSDP takes the module whose forward runs first for the root; generation calls one inside PEFT's.

    nothing: on a GPU FSDP wants an argument."""


@contextlib.contextmanager
def unsharded(model):
    """Keep all parameters gathered: generation is several times faster, and ranks need not generate in step."""
    # gathered once, for all tokens to come; each goes back to what it was
    modules = _cut(model)
    try:
        if modules:
            model._begin(None)
        for m in modules:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        yield
    finally:
        for m in modules:
            m.set_reshard_after_forward(m is not model and not model.stays_gathered, recurse=False)
        _reshard(model)


# ---- the update ----


def make_optimizer(name, model, lr, weight_decay):
    """AdamW, SGD, or RMSprop (the original DPO code's choice: half of AdamW's memory), over the trainable parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    options = {'lr': lr, 'weight_decay': weight_decay}
    if name == 'RMSprop':
        return RMSprop(params, **options)
    if name == 'AdamW':
        options['fused'] = True
    return getattr(torch.optim, name)(params, **options)


def local(tensor):
    """This rank's part of a tensor: in a replica all of it."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def average_gradients(model):
    """Average the gradients of a step over all ranks, in place, after its last backward. Returns them: tensors or DTensors.

    FSDP has averaged already, in every backward. Replicas have only added up their own, and do it here."""
    model.reshard()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if model.shard_mode != 'none':
        return grads
    # a replica in bfloat16 is FSDP's on a mesh of one rank
    grads, world = [local(g) for g in grads], dist.get_world_size()
    if world > 1:
        # one bucket, one collective
        bucket = torch.cat([g.flatten() for g in grads]).div_(world)
        dist.all_reduce(bucket)
        for g, mean in zip(grads, bucket.split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view_as(g))
    return grads


def update(model, optimizer, lr, scale, max_norm):
    """One optimizer step on scale times the gradients, clipped to max_norm. Returns the norm before clipping.

    scale: number of ranks / sum of the weights, since gradients are averages over ranks of sums of weighted gradients. Where the
    norm is not finite, the weights stay what they are: the caller sees to it."""
    # gradients by mesh: with tensor parallelism there are two, without any sharding it is None
    groups = {}
    for grad in average_gradients(model):
        groups.setdefault(getattr(grad, 'device_mesh', None), []).append(grad)
    # the norm over all ranks and meshes
    norms = [torch.nn.utils.get_total_norm(grads) for grads in groups.values()]
    norms = [norm.full_tensor() if hasattr(norm, 'full_tensor') else norm for norm in norms]
    norm = math.hypot(*(norm.item() for norm in norms)) * scale

    if math.isfinite(norm):
        # divide by the weights and clip, in one product
        for grads in groups.values():
            torch._foreach_mul_(grads, scale * min(1.0, max_norm / (norm + 1e-6)))
        # the schedule is the caller's
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
