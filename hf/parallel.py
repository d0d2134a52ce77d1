"""Tensor parallelism, which divides the matrices of each block among ranks, and what the options about devices mean."""

import logging
import os
import re

import torch

from configurator import UserError
from hf.parts import core
from runtime import room
from runtime.files import say


def check(config):
    """Raise UserError if options about devices and attention exclude one another. Reports options without effect."""
    uses_tp = config['tp'] > 1
    if uses_tp and config['lora_rank']:
        raise UserError('tp and lora_rank do not go together: adapters are small enough for FSDP alone')
    if uses_tp and config['activation_checkpointing'] == 'selective':
        raise UserError('--activation_checkpointing=selective does not go with --tp')
    if (uses_tp or config['cpu_offload']) and config['shard'] in ('none', 'grads'):
        option = 'tp' if uses_tp else 'cpu_offload'
        raise UserError(f'{option} needs shard=full, where FSDP cuts everything: leave out shard={config["shard"]}')
    if config['attn'] and config['pack']:  # with --pack=False batches are padded anyway
        config.report_unused(['pack'], f'attention by {config["attn"]} works on padded batches')
    # all that follows is about device_map, which spreads a model over the GPUs of one process
    if config['device_map'] is None:
        return
    if 'RANK' in os.environ:
        raise UserError('device_map is for one process: start without torchrun, or leave device_map out to use FSDP')
    if config['dtype'] != 'float32':
        raise UserError('device_map computes in float32: leave dtype out, or use torchrun for bfloat16')
    without_effect = ['cpu_offload'] if config['shard'] == 'auto' else ['cpu_offload', 'shard']
    config.report_unused(without_effect, 'device_map uses no FSDP')
    if config['model'] == 'toy':
        raise UserError('device_map spreads the model of a folder or of the hub: the toy model is made here')


def choose_arithmetic(config, device):
    """Apply --tf32 and --deterministic, and print a note if dtype is slow on this device."""
    on_gpu = device.type == 'cuda'
    in_float32 = config.dtype == 'float32'
    if config.tf32 and on_gpu and in_float32:
        torch.set_float32_matmul_precision('high')
    elif config.tf32:
        config.report_unused(['tf32'], 'it is for float32 on a GPU')
    if config.deterministic and on_gpu:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read by cuBLAS at the first matmul
        torch.use_deterministic_algorithms(True)
        # don't fill new tensors, which is slow: no code here reads uninitialized memory
        torch.utils.deterministic.fill_uninitialized_memory = False
    elif config.deterministic:
        config.report_unused(['deterministic'], 'it is for a GPU')
    # no advice to those who use device_map, as it computes in float32 only
    if on_gpu and in_float32 and config.device_map is None:
        say('note: on a GPU float32 attention takes each answer by itself: --dtype=bfloat16 is several times faster')
    if not on_gpu and not in_float32:
        slowdown = room.bfloat16_slowdown()
        if slowdown > 2:
            say(f'note: this CPU takes {slowdown:.0f} times as long for bfloat16 as for float32: --dtype=float32')


def tensor_parallel(model, mesh, n_meshes):
    """Divide the blocks of a model, in place, among the ranks of a 1-d mesh by transformers' tensor-parallel plan.

    n_meshes: FSDP later shards each part over so many meshes. UserError if there is no plan, or a size does not divide."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    styles = {  # style in transformers' plan -> torch's ParallelStyle
        'colwise': ColwiseParallel(),
        'rowwise': RowwiseParallel(),
        'colwise_gather_output': ColwiseParallel(output_layouts=Replicate()),
        'rowwise_split_input': RowwiseParallel(input_layouts=Replicate()),
        # a norm of each head: every rank has some of the heads of its input (B, T, heads, d)
        'replicated_with_grad_allreduce': SequenceParallel(sequence_dim=2, use_local_output=True),
    }
    # it warns that the gradient norm and the export take two sums each; their order is the same on all ranks
    logging.getLogger('torch.distributed.tensor._redistribute').setLevel(logging.ERROR)
    inner = core(model)
    # embedding and head are left to FSDP: {'layers.*.mlp.up_proj': 'colwise', ...}
    whole_plan = inner.base_model.config.base_model_tp_plan or {}
    plan = {path: style for path, style in whole_plan.items() if path.startswith('layers.')}
    if not plan or set(plan.values()) - styles.keys():
        problem = 'has no tensor-parallel plan in transformers that is supported here'
        raise UserError(f'{type(inner).__name__} {problem}: leave out --tp, FSDP needs none')
    _check_sizes(inner, plan, mesh.size(), n_meshes)
    parallelize_module(inner.base_model, mesh, {path: styles[style] for path, style in plan.items()})


def _check_sizes(model, plan, tp, n_meshes):
    """Raise UserError if heads or weights of a model do not divide into the parts that its plan makes of them. See tensor_parallel."""
    name = type(model).__name__
    config = model.base_model.config

    def check_divides(size, noun, parts=tp):
        if size % parts:
            raise UserError(f'tp={tp} on {tp * n_meshes} ranks: the {size} {noun} of {name} do not divide by {parts}')

    check_divides(config.num_attention_heads, 'attention heads')
    check_divides(getattr(config, 'num_key_value_heads', None) or config.num_attention_heads, 'key-value heads')
    head_shape = (getattr(config, 'head_dim', None),)
    for path, module in model.base_model.named_modules():
        path_in_plan = re.sub(r'\b\d+\b', '*', path)  # layers.0.mlp.up_proj -> layers.*.mlp.up_proj
        style = plan.get(path_in_plan, '')
        if style.startswith('rowwise'):
            check_divides(module.weight.shape[1], f'columns of {path}')
        elif style.startswith('colwise'):
            # torch's word for dividing the rows of a weight (dim 0), as FSDP does again with each part
            check_divides(len(module.weight), f'rows of {path}', parts=tp * n_meshes)
        # all others in the plan are norms, of which only those of a single head work
        elif style and tuple(module.weight.shape) != head_shape:
            raise UserError(f'{name} has norms across heads, which are not supported with --tp: leave it out')
