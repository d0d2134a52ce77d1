"""Ways other than FSDP of putting a model on several devices: tensor parallelism, and one process with a device map.

Tensor parallelism cuts the matrices of a block over the ranks of a group, by the plan that the architecture publishes in
transformers. The ranks of a group see the same data; FSDP goes on over the groups. Embeddings and LM head stay whole."""

import os

from configurator import UserError
from model import core


def check(config):
    """Raise UserError where options of a script about devices and attention exclude one another."""
    if config['tp'] > 1 and config['lora_rank']:
        raise UserError('tp and lora_rank do not go together: adapters are small enough for FSDP alone')
    given = {'tp': config['tp'] > 1, 'cpu_offload': config['cpu_offload']}
    cuts_all = ' and '.join(name for name in given if given[name])
    if cuts_all and config['shard'] in ('none', 'grads'):
        raise UserError(f'{cuts_all} needs shard=full, where FSDP cuts everything: leave out shard={config["shard"]}')
    if config['attn']:
        config.ignored(['pack'] if config['pack'] else [], f'attention by {config["attn"]} works on padded batches')
    if config['device_map'] is None:
        return
    if 'RANK' in os.environ:
        raise UserError('device_map is for one process: start without torchrun, or leave device_map out to use FSDP')
    if config['dtype'] != 'float32':
        raise UserError('device_map computes in float32: leave dtype out, or use torchrun for bfloat16')
    cut = ['shard'] if config['shard'] != 'auto' else []
    config.ignored(['cpu_offload', *cut], 'device_map uses no FSDP')


def tensor_parallel(model, mesh, groups):
    """Cut the blocks of a model, in place, over the ranks of the 1-D mesh. groups: over how many FSDP will cut on.

    Raises UserError for an architecture without a plan, or one that these ranks do not divide."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    # a norm of each head sees (B, T, heads, d)
    of_heads = SequenceParallel(sequence_dim=2, use_local_output=True)
    styles = {
        'colwise': ColwiseParallel(),
        'rowwise': RowwiseParallel(),
        'colwise_gather_output': ColwiseParallel(output_layouts=Replicate()),
        'rowwise_split_input': RowwiseParallel(input_layouts=Replicate()),
        'replicated_with_grad_allreduce': of_heads,
    }
    inner, name, ranks = core(model).base_model, type(core(model)).__name__, mesh.size()
    config = inner.config
    plan = {key: style for key, style in (config.base_model_tp_plan or {}).items() if key.startswith('layers.')}
    if not plan or set(plan.values()) - styles.keys():
        raise UserError(
            f'{name} has no tensor-parallel plan in transformers that is supported here: leave out --tp, FSDP needs none'
        )

    # what the ranks must divide, and what FSDP must divide once more
    sizes = {'attention heads': (config.num_attention_heads, ranks)}
    sizes['key-value heads'] = (getattr(config, 'num_key_value_heads', None) or config.num_attention_heads, ranks)
    for path, module in inner.named_modules():
        style = plan.get('.'.join('*' if part.isdigit() else part for part in path.split('.')), '')
        if style.startswith('rowwise'):
            sizes[f'columns of {path}'] = module.weight.shape[1], ranks
        elif style.startswith('colwise'):
            sizes[f'rows of {path}'] = len(module.weight), ranks * groups
        elif style and tuple(module.weight.shape) != (getattr(config, 'head_dim', None),):
            raise UserError(f'{name} has norms across heads, which are not supported with --tp: leave it out')
    for what, (size, parts) in sizes.items():
        if size % parts:
            raise UserError(
                f'tp={ranks} on {ranks * groups} ranks: the {size} {what} of {name} do not divide by {parts}'
            )
    parallelize_module(inner, mesh, {key: styles[style] for key, style in plan.items()})
