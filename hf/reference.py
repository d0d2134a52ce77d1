"""The reference's log-probs, computed once and kept on disk: the same file serves every run, epoch, loss and rank.

A file belongs to the content of the reference's weights and of the tokenised examples; the reference itself is loaded only
where there is no such file. float32 log-probs equal the live ones up to rounding."""

import gc
import hashlib

import numpy as np
import torch

import fsdp
from hf.lora import adapters_off
from runtime import cache, guard, log
from runtime.files import say


def cached_logps(build, make, examples, make_batches, dtype, rows=slice(None)):
    """Examples with .ref, float32 (n, answers): log-prob sums under the reference, from the cache or computed now.

    rows: of the examples that a run uses; the others get NaN. build(empty) -> the reference on the CPU, make() -> the sharded
    one, make_batches(examples, rows) -> microbatches."""
    used = examples.select(rows)

    def look():
        key = _key(build(empty=False), used, dtype)
        file = cache.path_of('reference', key)
        found = cache.read(file, lambda arrays, metadata: metadata == _metadata(key, arrays['logps']))
        if found:
            return key, file, found[0]['logps']
        if file.exists():
            say(f'note: {file} is damaged or belongs to something else: computing the reference log-probs anew')
        return key, file, None

    def keep():
        failure = cache.write(file, {'logps': logps}, _metadata(key, logps))
        if failure:
            say(f'note: the reference log-probs are not kept: cannot write {file} ({failure})')

    # rank 0 looks for the file, and writes it, if that can be
    key, file, logps = fsdp.shared(look)
    if logps is None:
        logps = _compute(make(), used, make_batches)
        gc.collect()  # a model holds itself by the methods that fsdp.py adds: without this its memory stays taken
        fsdp.on_one_rank(keep)
    else:
        say(f'reference log-probs of {len(used)} examples: read from {file}')
    examples.ref = np.full((len(examples), logps.shape[1]), np.nan, np.float32)
    examples.ref[rows] = logps
    return examples


def _metadata(key, logps):
    """What a cache file says of itself: what it belongs to, and a hash of its contents."""
    return {'key': key, 'sha256': hashlib.sha256(logps).hexdigest()}


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
def _compute(model, examples, make_batches):
    """The log-probs from the model, 512 examples at a time: (n, answers), float32, the same on every rank."""
    answers = examples.spans.shape[1] - 1
    out = np.zeros((len(examples), answers), np.float32)
    bar = log.progress(len(examples), ' examples', 'reference')
    for first in range(0, len(examples), 512):
        rows = np.arange(first, min(first + 512, len(examples)))
        batches, *_ = make_batches(examples, rows)
        with adapters_off(model):
            logps = torch.cat([model.response_logps(batch)[0].view(-1, answers) for batch in batches])
        # a column an answer, from all ranks
        slots = [slot for batch in batches for slot in batch.slot]
        columns = fsdp.gather_columns(dict(enumerate(logps.T)), slots, len(rows))
        for answer, column in columns.items():
            out[rows, answer] = column
        bar.update(len(rows))
    bar.close()
    return out
