"""Everything distributed: ranks, models on many of them (replicated, or sharded by FSDP2), sums over them, the optimizer step.

A script calls setup once, shard for each model, and update after every step. It runs under torchrun on NCCL or gloo, or as one
process without torchrun, and computes the same on any number of ranks. runtime/checkpoint.py writes sharded models to disk."""

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

_tp = 1  # tensor parallelism: so many neighbouring ranks share the matrices of a block, and get the same data; set by setup


def setup(tp=1):
    """Join torchrun's process group, or make a group of one, and return (data rank, number of data ranks, device).

    tp: number of neighbouring ranks that hold one copy of the model's blocks together. They get the same data, and so count as
    one data rank. Raises UserError where tp does not divide the number of ranks, or a host has more processes than GPUs."""
    global _tp
    device = _own_device()
    if not dist.is_initialized():
        _join_process_group(device)
    world = dist.get_world_size()
    if world % tp:
        raise UserError(f'tp={tp} needs a multiple of {tp} ranks, and there are {world}: see --nproc_per_node')
    _tp = tp
    return *data_rank(), device


def _join_process_group(device):
    """Make the default process group: of all ranks that torchrun has started, or without torchrun of this process alone."""
    store, rank, world = dist.HashStore(), 0, 1
    if 'RANK' in os.environ:
        store, rank, world = next(rendezvous('env://'))
        # torch 2.13's agent keeps the store when it restarts the ranks: without a prefix for each start, a rank could find the
        # address of a dead one there, and hang. Several agents may have counted their restarts differently, and would not agree
        # on a prefix: with them, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the way
        restarts = '0'
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            restarts = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        store = dist.PrefixStore(f'start{restarts}', store)
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def _own_device():
    """Return the device of this process: its own GPU, or the CPU where there is none, and make it torch's current device.

    On a CPU, set the number of threads: the processes of a host share its cores. Raises UserError if there are too few GPUs."""
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    local_world = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if not torch.cuda.is_available():
        if 'OMP_NUM_THREADS' not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
        return torch.device('cpu')
    gpus = torch.cuda.device_count()
    if local_world > gpus:
        problem = f'{local_world} processes are started on a machine with {gpus} GPUs, and each needs its own'
        error = UserError(f'{problem}: start with --nproc_per_node={gpus}')
        # usually rank 0 prints an error, but it may be on another host: so the first process of this one does
        error.of_this_rank = local_rank == 0
        raise error
    device = torch.device('cuda', local_rank)
    torch.cuda.set_device(device)
    return device


def data_rank():
    """Return (data rank, number of data ranks), as setup does: ranks that share their data count as one."""
    return dist.get_rank() // _tp, dist.get_world_size() // _tp


def in_groups():
    """Whether there are tensor-parallel groups, whose ranks must generate in step."""
    return _tp > 1


@cache
def _mesh(device_type, tp, replicated, group):
    """Return all ranks as a DeviceMesh with the dimensions ('dp', 'tp'), or ('dp',) if tp is 1. FSDP shards over 'dp'.

    replicated: 'dp' has one rank, and comes after a dimension 'copies' with all of them. group: the default process group, which
    is a part of the cache's key: a new group needs a new mesh."""
    sizes = {'dp': dist.get_world_size() // tp}
    if replicated:
        sizes = {'copies': sizes['dp'], 'dp': 1}
    if tp > 1:
        sizes['tp'] = tp
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def leave(code=0):
    """End this process at once. An ordinary exit can abort: gloo's threads use the interpreter while it shuts down."""
    # no rank leaves while another one still sends
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- what one rank does, and all of them know: every rank has to call these ----


def gather_objects(value):
    """Return the list of the values of all ranks, in rank order, on every rank. They are pickled, so they should be small."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_ranks(runs_here, fn):
    """Call fn() on the ranks where runs_here is true, and return its result there. The other ranks return None.

    A UserError on any rank is raised on all of them, so that none waits for a rank that has gone."""
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
    """Call fn() on rank 0, and return its result there. The other ranks return None. Its UserError is raised on all ranks."""
    return on_ranks(dist.get_rank() == 0, fn)


def shared(fn):
    """Call fn() on rank 0, and return its result, which must be picklable, on all ranks. Its UserError is raised on all."""
    return gather_objects(on_one_rank(fn))[0]


def first_of_host(fn):
    """Call fn() on every rank and return its result. One rank of each host comes first, and fills the cache for the others."""
    is_first = int(os.environ.get('LOCAL_RANK', 0)) == 0
    from_first = on_ranks(is_first, fn)
    from_other = on_ranks(not is_first, fn)
    return from_first if is_first else from_other


def gather_columns(columns, slots, total):
    """Return the columns of a whole step, equal on every rank, from those of each rank's own examples.

    columns: name -> (k,) tensor, the same names on all ranks. slots: the place of each of the k examples in the step; -1 is a
    filler, which is left out. total: number of examples of the step. Returns name -> (total,) float64 tensor on the CPU."""
    names = sorted(columns)
    # (names, k), in one tensor: so the CPU waits for the device only once
    own_values = torch.stack([columns[name].detach().double() for name in names]).cpu()
    slots = torch.as_tensor(slots, dtype=torch.long)
    # the ranks of a tensor-parallel group have the same columns, so only the first of them counts
    counts = (slots >= 0) & (dist.get_rank() % _tp == 0)

    # every rank fills in its own slots and leaves zeros elsewhere: the sum over ranks is the whole step
    table = torch.zeros(len(names), total, dtype=torch.float64)
    table[:, slots[counts]] = own_values[:, counts]
    dist.all_reduce(table)
    return dict(zip(names, table, strict=True))


def smallest(values):
    """Return the smallest element of a tensor, over all ranks, as a tensor of one number."""
    least = values.min()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return least


def largest(numbers):
    """Return a list with the largest over all ranks of each of a few integers. It is on the CPU: no wait for a device."""
    table = torch.tensor(numbers)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return table.tolist()


# ---- models ----


@guard.memory_for('a model does not fit; try --dtype=bfloat16, --cpu_offload or more GPUs, or a smaller one')
def shard(build, device, *, dtype='float32', train=True, mode='auto', cpu_offload=False, device_map=None, **options):
    """Return a model on all ranks, replicated or sharded, with packed attention and the weights that rank 0 alone reads.

    build(empty) -> a transformers model on the CPU, without weights if empty. dtype: 'float32', or 'bfloat16' for compute (and
    for frozen weights) with float32 master weights, gradients and sums. train=False freezes it. mode: the option shard of
    training.py. cpu_offload: weights and optimizer stay in the CPU's memory. device_map: build(device_map=device_map) spreads
    the model over the GPUs of one process, without FSDP. options: those of _recompute. Raises UserError where the sharded model
    computes other numbers than the one that rank 0 has read."""
    half = dtype == 'bfloat16'
    by_fsdp = False
    expected_numbers = None  # what the whole model computes; None: there is nothing to compare with
    if device_map is not None:
        mode = 'none'
        model = build(device_map=device_map)
    else:
        # rank 0 reads the weights and decides for all ranks; full is None on the others
        full = on_one_rank(partial(build, empty=False))
        mode = shared(partial(_choose_mode, full, mode, train, half, device, cpu_offload))
        # the weight file, not the config, says which parameters are one tensor
        tied = shared(partial(ties, full))
        # FSDP keeps the float32 master weights of training in bfloat16, for replicas, too
        by_fsdp = mode != 'none' or (half and train)
        if by_fsdp or dist.get_world_size() > 1:
            expected_numbers = shared(partial(probe.measure_loaded, full))
        # FSDP shards an empty model, and fills it afterwards; a replica on another rank begins empty, too
        model = build(empty=True) if by_fsdp or full is None else full
        tie_as(model, tied)
        if not by_fsdp:
            if half:
                _round_weights(model.parameters())
            _replicate(model, device, tied)

    if not train:
        model.requires_grad_(False)
    _recompute(model, **options)
    model.shard_mode = mode
    if by_fsdp:
        _distribute(model, full, device, half, cpu_offload)
    # the methods that scripts call
    model.reshard = types.MethodType(_reshard, model)
    for method in (response_logps, hidden_and_head, response_scores, token_logps, _begin):
        add_method(model, method)
    if expected_numbers is not None:
        probe.compare(model, expected_numbers, device, half)
    set_attention(model, packed=True)
    return model


def _choose_mode(model, mode, train, half, device, cpu_offload):
    """Return the mode itself, but for 'auto': 'none' if a replica fills at most a quarter of a rank's memory, else 'full'."""
    if mode != 'auto':
        return mode
    if _tp > 1 or cpu_offload:
        return 'full'
    # one process has nobody to share with
    if dist.get_world_size() == 1:
        return 'none'
    trained = sum(p.numel() for p in model.parameters() if train and p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    # bytes: a weight that trains has a gradient and AdamW's two moments beside it, all in float32
    needed = 16 * trained + (2 if half else 4) * frozen
    if device.type == 'cuda':
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = room.machine_memory() / int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return 'none' if needed <= available / 4 else 'full'


def _recompute(model, activation_checkpointing=False):
    """Make a model's blocks compute activations again in backward, in place: all (True), the cheap ones ('selective') or none."""
    if activation_checkpointing == 'selective':
        lean.enable(model)
    elif activation_checkpointing:
        inner = core(model)
        # transformers 5.20 has renamed this method, and warns of the older name
        if hasattr(inner, 'activation_checkpointing_enable'):
            inner.activation_checkpointing_enable()
        else:
            inner.gradient_checkpointing_enable()
        # transformers computes a block again only if block.training is set, but models are in eval mode here, without dropout.
        # block.train() would switch on the dropout layers inside it, too, so the flag of the block alone is set
        for block in blocks(model):
            block.training = True


def _replicate(model, device, tied):
    """Move a model to the device, in place, and copy rank 0's weights and buffers to the other ranks. tied: see hf.ties.ties."""
    if dist.get_rank() == 0:
        model.to(device)
    else:
        # to_empty makes two tensors of one that has two names
        model.to_empty(device=device)
        tie_as(model, tied)
    tensors = [*model.parameters(), *model.buffers()]
    assert len(set(gather_objects(len(tensors)))) == 1, 'the ranks would wait for one another for ever'
    for tensor in tensors:
        dist.broadcast(tensor.data, 0)


def _round_weights(parameters):
    """Change parameters to bfloat16, in place. model.to would change buffers, too, but rotary frequencies must stay float32."""
    for p in parameters:
        p.data = p.data.to(torch.bfloat16)


def _distribute(model, full, device, half, cpu_offload):
    """Shard an empty model by FSDP, in place, and fill it with the weights of full, which is None on all ranks but 0."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    mesh = _mesh(device.type, _tp, replicated=model.shard_mode == 'none', group=dist.group.WORLD)
    settings = {'mesh': mesh['dp']}
    home = device  # where the shards are kept
    if half:
        # compute in bfloat16, sum gradients in float32
        settings['mp_policy'] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        # Passes see weights rounded to bfloat16. A weight halfway between two such numbers, as fp16 files have many, would jump
        # to the other one with the first update, however small: so the float32 master weights begin rounded, too
        if full is not None:
            for p in full.parameters():
                p.data = p.data.bfloat16().to(p.dtype)
        _round_weights(p for p in model.parameters() if not p.requires_grad)
    if cpu_offload:
        settings['offload_policy'] = CPUOffloadPolicy(pin_memory=device.type == 'cuda')
        home = torch.device('cpu')
    if _tp > 1:
        tensor_parallel(model, mesh['tp'], mesh['dp'].size())

    # block by block, so that one block at a time is gathered; then the root has what is in no block
    model.stays_gathered = stays_gathered(model, model.shard_mode)
    for block in blocks(model):
        fully_shard(block, **settings, reshard_after_forward=not model.stays_gathered)
    fully_shard(model, **settings, reshard_after_forward=False)
    # a replica's bfloat16 copy of the weights then serves all microbatches of a step
    if model.shard_mode == 'none' and model.stays_gathered:
        model.set_reshard_after_backward(False)
    _fill(model, full, device, home)


def _fill(model, full, device, home):
    """Fill an empty sharded model, in place, from full (None on all ranks but 0). home keeps the shards, device the buffers."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model.to_empty(device=home)
    weights = {} if full is None else full.state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    # the state dict lacks non-persistent buffers, such as rotary frequencies: copy all buffers
    for name, buffer in model.named_buffers():
        if full is not None:
            buffer.copy_(full.get_buffer(name))
        dist.broadcast(buffer, 0)
    # with cpu_offload, FSDP brings parameters to the device for each pass, but no buffers
    if home != device:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)


def stays_gathered(model, mode):
    """Whether FSDP keeps the gathered weights of a block from its forward to its backward. With 'full' it does not.

    With 'none' they are a replica's copy in bfloat16. Beside adapters it is freed: frozen weights would be there twice."""
    if mode == 'none':
        return all(p.requires_grad for p in model.parameters())
    return mode == 'grads'


def add_method(model, function):
    """Make function a method of the model, and a forward of the root module, for which FSDP gathers its parameters."""
    setattr(model, function.__name__, types.MethodType(function, model))
    if model in _fsdp_modules(model):
        dist.fsdp.register_fsdp_forward_method(model, function.__name__)


def _reshard(model):
    """Free all gathered parameters. After a forward without backward, modules show them instead of the optimizer's shards."""
    for module in _fsdp_modules(model):
        # FSDP's own method, by the class: the name model.reshard is this function
        type(module).reshard(module)


def _fsdp_modules(model):
    """Return the modules of a model that FSDP shards; an empty list for a replica in float32."""
    return [m for m in model.modules() if hasattr(m, 'unshard')]


def _begin(model, nothing):
    """Run a forward of the root module that computes nothing, before generation runs one of a module inside PEFT's wrapper.

    FSDP takes the first module that runs for the root. nothing: on a GPU, some torch versions fail without an argument."""


@contextlib.contextmanager
def unsharded(model):
    """Keep all parameters gathered for a while: generation is several times faster, and ranks need not generate in step."""
    modules = _fsdp_modules(model)
    try:
        if modules:
            model._begin(None)
        for m in modules:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        yield
    finally:
        # back to what _distribute has set; the root alone never reshards after its forward
        for m in modules:
            m.set_reshard_after_forward(m is not model and not model.stays_gathered, recurse=False)
        _reshard(model)


# ---- the update ----


def make_optimizer(name, model, lr, weight_decay):
    """Return AdamW, SGD, or RMSprop (the original DPO code's choice: half of AdamW's memory) over the trainable parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    options = {'lr': lr, 'weight_decay': weight_decay}
    if name == 'RMSprop':
        return RMSprop(params, **options)
    if name == 'AdamW':
        return torch.optim.AdamW(params, fused=True, **options)
    return torch.optim.SGD(params, **options)


def local(tensor):
    """Return this rank's part of a sharded tensor, and a plain tensor, as replicas have, as it is."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def average_gradients(model):
    """Average the gradients of a step over all ranks, in place, after its last backward. Returns a list of tensors or DTensors.

    FSDP has averaged its own already, in every backward. The gradients of replicas are averaged here."""
    model.reshard()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if model.shard_mode != 'none':
        return grads
    # a replica in bfloat16 is FSDP's on a mesh of one rank, so its gradients are DTensors
    grads = [local(grad) for grad in grads]
    world = dist.get_world_size()
    if world > 1:
        # all gradients in one flat tensor, for one collective
        bucket = torch.cat([grad.flatten() for grad in grads]).div_(world)
        dist.all_reduce(bucket)
        for grad, mean in zip(grads, bucket.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
    return grads


def update(model, optimizer, lr, scale, max_norm):
    """Take an optimizer step on scale times the gradients, clipped to max_norm, and clear them. Returns the norm before clipping.

    scale: number of ranks / sum of the examples' weights, since gradients are averages over ranks of sums of weighted gradients.
    If the norm is not finite, the weights stay as they are, and the caller decides what to do."""
    # get_total_norm takes tensors of one mesh: with tensor parallelism there are two meshes, and replicas have None
    grads_by_mesh = {}
    for grad in average_gradients(model):
        mesh = getattr(grad, 'device_mesh', None)
        grads_by_mesh.setdefault(mesh, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(grads) for grads in grads_by_mesh.values()]
    # the norm of DTensors is one, too, and its full_tensor is the norm over all ranks
    norms = [norm.full_tensor() if hasattr(norm, 'full_tensor') else norm for norm in norms]
    total_norm = math.hypot(*(norm.item() for norm in norms)) * scale

    if math.isfinite(total_norm):
        # scale and clip in one product; 1e-6, as in torch's clip_grad_norm_, for a norm of 0
        factor = scale * min(1.0, max_norm / (total_norm + 1e-6))
        for grads in grads_by_mesh.values():
            torch._foreach_mul_(grads, factor)
        # the caller has the schedule of the learning rate
        for param_group in optimizer.param_groups:
            param_group['lr'] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total_norm
