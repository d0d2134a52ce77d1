"""The reference's log-probs, computed once and kept on disk: the same file serves every run, epoch, loss and rank.

A file belongs to the content of the reference's weights and of the tokenised examples; the reference itself is loaded only
where there is no such file. float32 log-probs equal the live ones up to rounding."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import fsdp
import guard
from configurator import main_rank
from log import say
from lora import adapters_off


def cached_logps(build, make, examples, cut, dtype):
    """Examples with .ref, float32 (n, answers): log-prob sums under the reference, from the cache or computed now.

    build(empty) -> the reference on the CPU, make() -> the sharded reference, cut(examples, index) -> microbatches."""
    key = fsdp.gather_objects(fsdp.on_one_rank(lambda: _key(build(empty=False), examples, dtype)))[0]
    folder = Path(os.environ.get('NANOPREF_CACHE', Path.home() / '.cache' / 'nanopref'))
    file = folder / f'reference-{key[:32]}.safetensors'
    logps = fsdp.gather_objects(fsdp.on_one_rank(lambda: _read(file, key, len(examples))))[0]
    if logps is None:
        logps = _compute(make(), examples, cut)
        fsdp.on_one_rank(lambda: _write(file, key, logps))
    else:
        say(f'reference log-probs of {len(examples)} examples: read from {file}')
    examples.ref = logps
    return examples


def _key(model, examples, dtype):
    """A hash of the weights and of the examples' tokens; dtype, since log-probs depend on it."""
    digest = hashlib.sha256(f'1 {dtype} {model.config.to_json_string()}'.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    for array in (examples.ids, examples.spans):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


@guard.memory_for('the pass that caches the reference takes microbatches of 4 x max_tokens; lower max_tokens')
@torch.no_grad()
def _compute(model, examples, cut):
    answers = examples.spans.shape[1] - 1
    out = np.zeros((len(examples), answers), np.float32)
    bar = tqdm(total=len(examples), desc='reference', unit='ex', disable=not main_rank())
    for first in range(0, len(examples), 512):
        index = np.arange(first, min(first + 512, len(examples)))
        batches, *_ = cut(examples, index)
        with adapters_off(model):
            parts = [model.response_logps(batch)[0].view(-1, answers) for batch in batches]
        columns = {f'{i}': torch.cat([p[:, i] for p in parts]) for i in range(answers)}
        whole = fsdp.gather_columns(columns, [p for batch in batches for p in batch.place], len(index))
        out[index] = torch.stack([whole[f'{i}'] for i in range(answers)], 1).float().numpy()
        bar.update(len(index))
    bar.close()
    return out


def _read(file, key, n):
    """The (n, answers) log-probs in a cache file, or None where there is none, or a damaged or foreign one."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, 'np') as f:
            logps = f.get_tensor('logps')
            digest = hashlib.sha256(logps).hexdigest()
            if f.metadata()['key'] == key and f.metadata()['sha256'] == digest and len(logps) == n:
                return logps
    except (OSError, SafetensorError, KeyError, TypeError):
        pass
    say(f'note: {file} is damaged or belongs to something else: computing the reference log-probs anew')
    return None


def _write(file, key, logps):
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    temporary = file.with_suffix(f'.{os.getpid()}')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({'logps': logps}, temporary, {'key': key, 'sha256': hashlib.sha256(logps).hexdigest()})
        temporary.rename(file)
    except (OSError, SafetensorError) as error:  # the run goes on: it has them in memory
        say(
            f'note: the reference log-probs are not kept: cannot write {file} ({getattr(error, "strerror", None) or error})'
        )
