"""Two ways besides FSDP to put a model on several devices: tensor parallelism, and a device map in one process.

Tensor parallelism divides the matrices of a block among the ranks of a group, by the plan that transformers has for the
architecture. The ranks of a group get the same data, and FSDP shards over the groups. Embeddings and LM head are not divided."""

import os

from configurator import UserError
from model import core


def check(config):
    """Raise UserError if a script's options about devices and attention exclude one another. Notes those without effect."""
    # tensor parallelism and offloading
    if config['tp'] > 1 and config['lora_rank']:
        raise UserError('tp and lora_rank do not go together: adapters are small enough for FSDP alone')
    is_on = {'tp': config['tp'] > 1, 'cpu_offload': config['cpu_offload']}
    needs_full = ' and '.join(name for name in is_on if is_on[name])
    if needs_full and config['shard'] in ('none', 'grads'):
        raise UserError(f'{needs_full} needs shard=full, where FSDP cuts everything: leave out shard={config["shard"]}')
    # attention of transformers; with pack=False nothing is lost by it
    if config['attn'] and config['pack']:
        config.ignored(['pack'], f'attention by {config["attn"]} works on padded batches')

    # a device map
    if config['device_map'] is None:
        return
    if 'RANK' in os.environ:
        raise UserError('device_map is for one process: start without torchrun, or leave device_map out to use FSDP')
    if config['dtype'] != 'float32':
        raise UserError('device_map computes in float32: leave dtype out, or use torchrun for bfloat16')
    config.ignored(['cpu_offload'], 'device_map uses no FSDP')
    if config['shard'] != 'auto':
        config.ignored(['shard'], 'device_map uses no FSDP')
    if config['model'] == 'toy':
        raise UserError('device_map spreads the model of a folder or of the hub: the toy model is made here')


def tensor_parallel(model, mesh, groups):
    """Divide the blocks of a model, in place, among the ranks of a mesh of one dimension.

    groups: the number of such meshes, over which FSDP shards afterwards. Raises UserError if transformers has no plan for the
    architecture, or one with styles unknown here, or if its sizes do not divide by the number of ranks."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    # a norm of each head sees (B, T, heads, d), of which every rank has some heads
    norm_of_heads = SequenceParallel(sequence_dim=2, use_local_output=True)
    # a plan's word for how a matrix is divided -> torch's object that does it
    styles = {
        'colwise': ColwiseParallel(),
        'rowwise': RowwiseParallel(),
        'colwise_gather_output': ColwiseParallel(output_layouts=Replicate()),
        'rowwise_split_input': RowwiseParallel(input_layouts=Replicate()),
        'replicated_with_grad_allreduce': norm_of_heads,
    }
    inner = core(model).base_model
    config = inner.config
    name = type(core(model)).__name__
    # module path, with * for a block's number -> style; what lies outside of the blocks is left out
    whole_plan = config.base_model_tp_plan or {}
    plan = {path: style for path, style in whole_plan.items() if path.startswith('layers.')}
    if not plan or set(plan.values()) - styles.keys():
        hint = 'leave out --tp, FSDP needs none'
        raise UserError(f'{name} has no tensor-parallel plan in transformers that is supported here: {hint}')

    # words for a size -> (the size, by what it must divide)
    ranks = mesh.size()
    sizes = {'attention heads': (config.num_attention_heads, ranks)}
    key_value_heads = getattr(config, 'num_key_value_heads', None) or config.num_attention_heads
    sizes['key-value heads'] = (key_value_heads, ranks)
    for path, module in inner.named_modules():
        path_in_plan = '.'.join('*' if part.isdigit() else part for part in path.split('.'))
        style = plan.get(path_in_plan, '')
        if style.startswith('rowwise'):
            sizes[f'columns of {path}'] = (module.weight.shape[1], ranks)
        elif style.startswith('colwise'):
            # FSDP divides the rows of each rank once more
            sizes[f'rows of {path}'] = (len(module.weight), ranks * groups)
        elif style and tuple(module.weight.shape) != (getattr(config, 'head_dim', None),):
            raise UserError(f'{name} has norms across heads, which are not supported with --tp: leave it out')
    for what, (size, parts) in sizes.items():
        if size % parts:
            problem = f'the {size} {what} of {name} do not divide by {parts}'
            raise UserError(f'tp={ranks} on {ranks * groups} ranks: {problem}')
    parallelize_module(inner, mesh, {path: styles[style] for path, style in plan.items()})
