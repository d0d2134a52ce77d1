"""Everything distributed, and the only file with collectives: set-up, sharding (FSDP2), checkpoints, resume, export.

The same code runs under torchrun on NCCL or gloo, and in one process without torchrun (a group of one). A group of ranks
sees one model: what the scripts compute does not depend on how many there are.
"""

import contextlib
import json
import os
import shutil
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from configurator import UserError
from model import core, hidden_and_head, response_logps


def setup():
    """Join torchrun's process group, or make a group of one. Returns (rank, world size, device)."""
    cuda = torch.cuda.is_available()
    local_rank, local_world = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    device = torch.device('cuda', local_rank) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
    else:
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
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def on_ranks(mine, fn):
    """fn() on the ranks where mine is true; a UserError on any is raised on all. The others get None."""
    result = error = None
    if mine:
        try:
            result = fn()
        except UserError as e:
            error = str(e)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for message in errors:
        if message is not None:
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
    if len(place):
        table[:, place[place >= 0]] = torch.stack([columns[n].detach().double().cpu() for n in names])[:, place >= 0]
    dist.all_reduce(table)
    return dict(zip(names, table, strict=True))


def smallest(values):
    """The smallest element of a tensor over all ranks, some of which may have none."""
    least = values.min() if len(values) else values.new_tensor(float('inf'))
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
        model.gradient_checkpointing_enable()
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
    for method in (response_logps, hidden_and_head):
        setattr(model, method.__name__, types.MethodType(method, model))
        register_fsdp_forward_method(model, method.__name__)
    core(model).set_attn_implementation('packed')
    return model


def blocks(model):
    """The transformer blocks, by the class names that the model itself declares."""
    names = set(core(model)._no_split_modules or [])
    return [m for m in core(model).modules() if type(m).__name__ in names]


@contextlib.contextmanager
def unsharded(model):
    """Keep all parameters gathered: generation is several times faster, and ranks need not generate in step."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in modules:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    yield
    for m in modules:
        m.set_reshard_after_forward(m is not model, recurse=False)
        m.reshard()


def make_optimizer(name, model, lr, weight_decay):
    """AdamW or RMSprop (the original DPO code's choice: half of AdamW's memory) over the trainable parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    if name == 'RMSprop':
        return torch.optim.RMSprop(params, lr=lr, weight_decay=weight_decay)
    if name == 'AdamW':
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)
    if name == 'SGD':
        return torch.optim.SGD(params, lr=lr, weight_decay=weight_decay)
    raise UserError(f'optimizer must be AdamW, RMSprop or SGD, not {name!r}')


def scale_and_clip_(model, scale, max_norm):
    """Multiply the gradients (a mean over ranks of sums) by scale, clip them, and return their norm before clipping."""
    model.reshard()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = (norm.full_tensor() if hasattr(norm, 'full_tensor') else norm).item() * scale
    torch._foreach_mul_(grads, scale * min(1.0, max_norm / (norm + 1e-6)))
    return norm


# ---- checkpoints ----


def _tensors(model, optimizer):
    """name -> the live tensors of weights and optimizer, tied ones once: loading writes into them."""
    tensors = {}
    model.reshard()  # after a forward without backward the root still shows its gathered parameters, not the optimizer's
    for name, p in model.named_parameters():
        tensors[f'model.{name}'] = p.detach()
        for key, value in optimizer.state[p].items():
            tensors[f'optimizer.{name}.{key}'] = value if value.dim() else value[None]
    return tensors


def save_checkpoint(out_dir, examples, model, optimizer, state, keep_last):
    """out_dir/checkpoints/<examples>/: weights and optimizer (safetensors), state and every rank's RNG (json).

    Written to a temporary folder and renamed; the newest keep_last are kept. state: a json-able dict."""
    folder = Path(out_dir) / 'checkpoints' / f'{examples:010d}'
    temporary = folder.with_suffix('.tmp')
    on_one_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
    dcp.save(_tensors(model, optimizer), storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    rng = gather_objects({'cpu': torch.get_rng_state().tolist(), 'cuda': cuda})

    def finish():
        (temporary / 'state.json').write_text(json.dumps({**state, 'examples': examples, 'rng': rng}))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        for old in sorted(p for p in folder.parent.iterdir() if p.suffix != '.tmp')[:-keep_last]:
            shutil.rmtree(old)

    on_one_rank(finish)


def latest_checkpoint(out_dir):
    """The newest complete checkpoint folder, or None."""
    return max((p for p in Path(out_dir).glob('checkpoints/*') if p.suffix != '.tmp'), default=None)


def load_checkpoint(folder, model, optimizer):
    """Load a checkpoint, written on any number of ranks, into model and optimizer. Returns its state."""
    model.reshard()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for group in optimizer.param_groups:
        group['lr'] = 0.0  # the scripts set the rate of every step anew
    optimizer.step()  # makes the optimizer's tensors, to be loaded into
    optimizer.zero_grad()
    dcp.load(_tensors(model, optimizer), storage_reader=HuggingFaceStorageReader(str(folder)))
    state = json.loads((Path(folder) / 'state.json').read_text())
    rng = state.pop('rng')
    if len(rng) == dist.get_world_size():
        mine = rng[dist.get_rank()]
        torch.set_rng_state(torch.tensor(mine['cpu'], dtype=torch.uint8))
        if mine['cuda'] and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(mine['cuda'], dtype=torch.uint8))
    return state


def export(model, tokenizer, build, folder):
    """Write a normal Hugging Face folder: safetensors, config, tokenizer. build as in shard."""
    model.reshard()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    unique = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}

    def write():
        shell = build(empty=True)  # saving through the sharded model would write its changed class name
        shell.all_tied_weights_keys = {}
        temporary = Path(f'{folder}.tmp')
        shutil.rmtree(temporary, ignore_errors=True)
        shell.save_pretrained(temporary, state_dict={k: v for k, v in weights.items() if k in unique})
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    on_one_rank(write)
