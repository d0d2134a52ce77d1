"""The distributed part of a step: replicas or FSDP2, sums over ranks, the optimizer's update. One process is a group of one.

A replica is a whole model on each rank (shard_mode none). half: computed in bfloat16; weights that train are float32 all the same."""

import math
import types
from functools import cache, partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hf import lean, probe
from hf.attention import set_attention
from hf.half import HalfCopies, round_to_half
from hf.parallel import tensor_parallel
from hf.parts import blocks, core
from hf.sharded import add_method, be_root, reshard
from hf.ties import tie_as, ties
from model import hidden_and_head, response_logps
from rl.heads import response_scores, token_logps
from runtime import errors, ranks, room
from runtime.rmsprop import RMSprop

# ---- numbers of a step: every rank has to call these ----


def gather(by_batch, step):
    """Gather the columns of a Step over all ranks: name -> (examples,), in step order. by_batch: those of each of step.batches."""
    # index in the step of each example, -1 for a filler
    slots = [slot for batch in step.batches for slot in batch.slot]
    of_this_rank = {name: torch.cat([columns[name] for columns in by_batch]) for name in by_batch[0]}
    return gather_columns(of_this_rank, slots, len(step.rows))


def gather_columns(columns, slots, total):
    """Combine each rank's part of some columns into the whole, on every rank. Returns name -> (total,) float64 CPU tensor.

    columns: name -> (k,) tensor, same names on all ranks. slots: (k,) where in the whole each number belongs; -1: it is left out."""
    names = sorted(columns)
    # stacked into one (names, k) tensor: a single device-to-host copy
    own_values = torch.stack([columns[name].detach().double() for name in names]).cpu()
    slots = torch.as_tensor(slots, dtype=torch.long)
    # all ranks of a tensor-parallel group have the same columns: count only the first rank's
    is_counted = (slots >= 0) & (dist.get_rank() % ranks.tp_size() == 0)
    # every rank fills in its own slots and leaves zeros elsewhere: the sum over ranks is the whole
    table = torch.zeros(len(names), total, dtype=torch.float64)
    table[:, slots[is_counted]] = own_values[:, is_counted]
    dist.all_reduce(table)
    return dict(zip(names, table, strict=True))


def smallest(values):
    """Return the smallest element of a tensor over all ranks, as a 0-d tensor."""
    least = values.min()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return least


# ---- a model on all ranks ----


@errors.on_full_memory('a model does not fit; try --dtype=bfloat16, --cpu_offload or more GPUs, or a smaller one')
def shard(build, device, *, dtype='float32', train=True, mode='auto', cpu_offload=False, device_map=None, **options):
    """Load a model on rank 0 and replicate or shard it over all ranks. Raises UserError if it then computes other log-probs.

    build(empty): make the transformers model on the CPU, without weights if empty. dtype: compute dtype; weights that train stay
    float32. train=False: freeze it. mode: none (replicas), grads, full or auto (training.py's option shard). cpu_offload: weights and
    optimizer stay on the CPU. device_map: spread it over the GPUs of this only process. options: activation_checkpointing."""
    half = dtype == 'bfloat16'
    # 1. load it. loaded_outputs: of rank 0's model for a made-up example, to compare with; None: that model is used itself
    loaded_outputs = None
    if device_map is not None:
        mode, model = 'none', build(device_map=device_map)
    else:
        # loaded: the model with its weights on rank 0, None on the other ranks, which hear mode, tied and outputs from rank 0
        loaded = ranks.on_rank_0(partial(build, empty=False))
        mode = ranks.from_rank_0(partial(room.choose_mode, loaded, mode, train, half, device, cpu_offload))
        # tied: name of a parameter -> name of the one whose tensor it shares, as the weight file (not the config) has it
        tied = ranks.from_rank_0(partial(ties, loaded))
        if mode != 'none' or (half and train) or dist.get_world_size() > 1:
            loaded_outputs = ranks.from_rank_0(partial(probe.outputs_of_loaded, loaded))
        # FSDP shards an empty model and then fills it (_distribute); replicas on the other ranks start empty, too
        model = build(empty=True) if mode != 'none' or loaded is None else loaded
        tie_as(model, tied)
    # 2. freeze it, and let backward recompute activations, if wanted
    if not train:
        model.requires_grad_(False)
    lean.checkpoint_activations(model, **options)
    # 3. divide it among the ranks, or copy it to them
    model.shard_mode = mode
    if mode != 'none':
        _distribute(model, loaded, device, half, cpu_offload)
    elif device_map is None:
        _replicate(model, device, tied, half)
    # 4. make these functions its methods, in which FSDP gathers weights, and compare it with the model that rank 0 loaded
    model.reshard = types.MethodType(reshard, model)
    for function in (response_logps, hidden_and_head, response_scores, token_logps, be_root):
        add_method(model, function)
    if loaded_outputs is not None:
        probe.check_outputs(model, loaded_outputs, device, half)
    set_attention(model, packed=True)  # until Run.set_batching has tried whether the model can do it
    return model


def _replicate(model, device, tied, half):
    """Move a model to the device and broadcast rank 0's tensors. half: compute in bfloat16. tied: name -> name of the shared tensor."""
    if half:
        round_to_half(model)
    if dist.get_rank() == 0:
        model.to(device)
    else:
        model.to_empty(device=device)  # this unties parameters
        tie_as(model, tied)
    tensors = [*model.parameters(), *model.buffers()]
    assert len(set(ranks.gather_objects(len(tensors)))) == 1, 'the broadcasts would hang: ranks have different tensors'
    for tensor in tensors:
        dist.broadcast(tensor.data, 0)
    if half and any(p.requires_grad for p in model.parameters()):
        model.half_copies = HalfCopies(model)
        # a forward puts copies in the place of the weights, also one of the model inside of PEFT's wrapper, which generates
        for each in {model, core(model)}:
            each.register_forward_pre_hook(model.half_copies.swap_in)


def _distribute(model, loaded, device, half, cpu_offload):
    """Shard an empty model by FSDP, in place, and copy the weights of loaded, a model on rank 0, None on the other ranks."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    mesh = _mesh(device.type, ranks.tp_size(), group=dist.group.WORLD)
    settings = {'mesh': mesh['dp']}
    if half:
        # compute in bfloat16, sum gradients in float32. Inputs are not cast: OLMo's rotary angles, say, stay float32, as in a replica
        settings['mp_policy'] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        round_to_half(model)
        if loaded is not None:
            round_to_half(loaded)
    if cpu_offload:
        settings['offload_policy'] = CPUOffloadPolicy(pin_memory=device.type == 'cuda')
    if ranks.tp_size() > 1:
        tensor_parallel(model, mesh['tp'], mesh['dp'].size())
    # FSDP gathers the weights of a block for its forward, and frees them after it, but in mode grads keeps them for backward
    model.stays_gathered = model.shard_mode == 'grads'
    for block in blocks(model):
        fully_shard(block, **settings, reshard_after_forward=not model.stays_gathered)
    # weights outside of the blocks stay gathered, because backward needs them first
    home = type(model).__module__
    fully_shard(model, **settings, reshard_after_forward=False)
    # FSDP has given it another class. transformers reads in the module of its class whether it takes attention from outside
    type(model).__module__ = home
    _fill(model, loaded, device, shard_device=torch.device('cpu') if cpu_offload else device)


@cache
def _mesh(device_type, tp, group):
    """Return a DeviceMesh of all ranks, (dp 8) or with tp=2 (dp 4, tp 2): FSDP shards over dp. group is but a key of the cache."""
    sizes = {'dp': dist.get_world_size() // tp}
    if tp > 1:
        sizes['tp'] = tp
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _fill(model, loaded, device, shard_device):
    """Copy loaded, a model on rank 0, None elsewhere, into an empty sharded model: weights to shard_device, buffers to device."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model.to_empty(device=shard_device)
    weights = {} if loaded is None else loaded.state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    # a state dict lacks some buffers, such as rotary frequencies: broadcast them all
    for name, buffer in model.named_buffers():
        if loaded is not None:
            buffer.copy_(loaded.get_buffer(name))
        dist.broadcast(buffer, 0)
    # with cpu_offload, FSDP moves parameters to the device for each pass, but not buffers
    if shard_device != device:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)


# ---- the update ----


def make_optimizer(name, model, lr, weight_decay):
    """Return AdamW, SGD, or RMSprop (of the original DPO code; half of AdamW's memory) over the trainable parameters."""
    model.reshard()  # so that parameters() gives the weights that train: no gathered weights, no bfloat16 copies
    params = [p for p in model.parameters() if p.requires_grad]
    classes = {'AdamW': partial(torch.optim.AdamW, fused=True), 'RMSprop': RMSprop, 'SGD': torch.optim.SGD}
    return classes[name](params, lr=lr, weight_decay=weight_decay)


def average_gradients(model):
    """Average a step's gradients over all ranks, in place, and return the list of them: tensors, or DTensors if sharded."""
    # gathered weights have no gradients: free them, and model.parameters() are this rank's shards, which have
    model.reshard()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if model.shard_mode != 'none':  # sharded, not replicas: FSDP has averaged them in backward
        return grads
    if dist.get_world_size() > 1:
        # one flat bucket, for a single all-reduce
        bucket = torch.cat([grad.flatten() for grad in grads]).div_(dist.get_world_size())
        dist.all_reduce(bucket)
        for grad, mean in zip(grads, bucket.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
    return grads


def update(model, optimizer, lr, scale, max_norm):
    """Multiply the gradients by scale, clip them to max_norm, step and clear them. Returns the norm before clipping.

    scale: number of ranks / sum of example weights. If the norm is not finite, the step is skipped: weights do not change."""
    # group the gradients by mesh (tensor parallelism has two, a replica None), because get_total_norm takes one mesh at a time
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
        for group in optimizer.param_groups:
            # share, set in the first step: 1, or of a group made with a rate of its own, that rate over the optimizer's
            group.setdefault('share', group['lr'] / (optimizer.defaults['lr'] or 1.0))
            group['lr'] = lr * group['share']
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total_norm
