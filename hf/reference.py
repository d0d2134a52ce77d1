"""A cache on disk of the reference's log-probs, for --cache_ref: one file serves every run, epoch, loss and number of ranks.

The file belongs to the weights of the reference and to the tokens of the examples. Only where there is no such file is the
reference loaded, to compute it. The log-probs equal those of a live reference up to rounding in float32."""

import gc
import hashlib
from functools import partial

import numpy as np
import torch

import fsdp
from hf.lora import adapters_off
from runtime import cache, guard, log
from runtime.files import say


def cached_logps(build, make, examples, make_batches, dtype, rows=slice(None)):
    """Set examples.ref to the reference's log-prob sums of all answers, and return examples. All ranks call this together.

    examples.ref: float32 (n, answers), NaN outside rows, which the run does not use. build(empty) makes the reference on the
    CPU; make() returns the sharded one, and is called only where there is no cache file; make_batches(examples, rows)
    returns microbatches first; dtype: the type that the reference computes in."""
    used = examples.select(rows)
    key, file, logps = fsdp.shared(partial(_look_up, build, used, dtype))
    if logps is None:
        logps = _compute(make(), used, make_batches)
        # the model refers to itself by the methods that fsdp.py adds, so only this frees its memory
        gc.collect()
        fsdp.on_one_rank(partial(_keep, key, file, logps))
    else:
        say(f'reference log-probs of {len(used)} examples: read from {file}')
    examples.ref = np.full((len(examples), logps.shape[1]), np.nan, np.float32)
    examples.ref[rows] = logps
    return examples


def _look_up(build, examples, dtype):
    """Return (key, path of the cache file, its log-probs), with None for log-probs where the file is missing or damaged.

    Runs on rank 0. It loads the reference on the CPU for a moment, because the key depends on its weights."""
    key = _key(build(empty=False), examples, dtype)
    file = cache.path_of('reference', key)
    # read refuses a file whose metadata does not agree with its log-probs
    content = cache.read(file, lambda arrays, metadata: metadata == _metadata(key, arrays['logps']))
    if content is not None:
        arrays, _ = content
        return key, file, arrays['logps']
    if file.exists():
        say(f'note: {file} is damaged or belongs to something else: computing the reference log-probs anew')
    return key, file, None


def _keep(key, file, logps):
    """Write log-probs into the cache file, on rank 0. Where that fails there is a note, and the run goes on without the file."""
    failure = cache.write(file, {'logps': logps}, _metadata(key, logps))
    if failure:
        say(f'note: the reference log-probs are not kept: cannot write {file} ({failure})')


def _metadata(key, logps):
    """Return what a cache file says of itself, to find out damage: its key, and a hash of its log-probs."""
    return {'key': key, 'sha256': hashlib.sha256(logps).hexdigest()}


def _key(model, examples, dtype):
    """Return a hash of everything that the log-probs depend on: weights, config, tokens, and the type of the computation."""
    # 1 is the version of the file's format
    digest = hashlib.sha256(f'1 {dtype} {model.config.to_json_string()}'.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    # spans say where in ids each prompt and answer is
    for array in (examples.ids, examples.spans):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


@guard.memory_for('the pass that caches the reference takes microbatches of 4 x max_tokens; lower max_tokens')
@torch.no_grad()
def _compute(model, examples, make_batches):
    """Return the log-prob sums of all answers under a sharded model: (n, answers), float32, the same on every rank."""
    # spans has one column for the prompt, then one for each answer
    answers = examples.spans.shape[1] - 1
    out = np.zeros((len(examples), answers), np.float32)
    bar = log.progress(len(examples), ' examples', 'reference')
    # 512 examples at a time, whose microbatches are shared among the ranks
    for first in range(0, len(examples), 512):
        end = min(first + 512, len(examples))
        rows = np.arange(first, end)
        batches, *_ = make_batches(examples, rows)
        # a microbatch holds whole examples: (1, examples * answers) -> (examples, answers)
        with adapters_off(model):
            parts = [model.response_logps(batch).view(-1, answers) for batch in batches]
        logps = torch.cat(parts)
        # gather the examples of all ranks in their order, one column for each answer
        slots = [slot for batch in batches for slot in batch.slot]
        own_columns = dict(enumerate(logps.T))
        columns = fsdp.gather_columns(own_columns, slots, len(rows))
        for answer, column in columns.items():
            out[rows, answer] = column
        bar.update(len(rows))
    bar.close()
    return out
