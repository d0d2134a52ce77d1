"""Disk cache of the reference model's log-probs (--cache_ref), shared by all runs, losses and numbers of ranks.

The key is a hash of the reference's weights and the examples' tokens. Cached and live log-probs agree up to rounding."""

import gc
import hashlib
import os
from functools import partial

import numpy as np
import torch

import fsdp
from data import steps
from hf.lora import adapters_off
from runtime import cache, errors, log, ranks
from runtime.files import say, say_once
from text.examples import counted


def use_cache(run, build, make_sharded, every_row):
    """Set .ref of run.train and run.held_out to the reference's log-probs of all answers, from a file or by a pass over the reference.

    run: a training.Run. .ref: (examples, answers of each) float32; NaN in rows that are not cached. All ranks call this together.
    build(empty): builds the reference on the CPU, to hash it; make_sharded(): returns it sharded, called if there is no file
    every_row: cache all training rows; otherwise only those that this run trains on, fewer with a small --n_examples"""
    config = run.config
    n = len(run.train)
    all_rows = train_rows = slice(None)
    if not every_row:
        total = min(n, config.n_examples or n)  # the first epoch is enough: later ones visit no other rows
        first_epoch = steps(n, config.batch_size, total, config.seed)
        train_rows = np.unique(np.concatenate([rows for _, rows in first_epoch]))
    for examples, rows in ((run.train, train_rows), (run.held_out, all_rows)):
        if len(examples):
            logps = _read_or_compute(run, build, make_sharded, examples.select(rows))
            examples.ref = np.full((len(examples), logps.shape[1]), np.nan, np.float32)
            examples.ref[rows] = logps
    if config.sample_during_eval:
        say("note: with --cache_ref the reference is not there to be sampled: samples are the policy's, without kl")


def _read_or_compute(run, build, make_sharded, examples):
    """Return the reference's log-probs of all answers of examples, (examples, answers of each). Arguments as for use_cache."""
    # rank 0 hashes the reference and reads the file; all ranks get the result
    file, logps = ranks.from_rank_0(partial(_look_up, build, examples, run.config.dtype))
    if logps is not None:
        say(f'reference log-probs of {counted(len(examples), "examples")}: read from {file}')
        return logps
    logps = _compute(run, make_sharded(), examples)
    # its methods refer to the sharded model (fsdp.shard): only a collection frees its memory
    gc.collect()
    if failure := ranks.on_rank_0(partial(cache.write, file, {'logps': logps})):  # the run goes on without a file
        say_once(f'note: the reference log-probs are not kept: cannot write to {file.parent} ({failure})')
    return logps


def _look_up(build, examples, dtype):
    """Return (cache file, log-probs or None if it is missing or damaged). Builds the reference, see use_cache, to hash it."""
    file = cache.path_of('reference', _key(build(empty=False), examples, dtype))
    if content := cache.read(file):
        arrays, _extra = content
        return file, arrays['logps']
    if os.path.exists(file):  # not file.exists(), which raises for a closed folder
        say(f'note: {file} is damaged or belongs to something else: computing the reference log-probs anew')
    return file, None


def _key(model, examples, dtype):
    """Return a hash of everything that determines the log-probs: weights, config, tokens and compute dtype."""
    # 2: version of the file format
    digest = hashlib.sha256(f'2 {dtype} {model.config.to_json_string()}'.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    # the factor of a LoRA layer, {adapter: alpha / rank}, is neither a weight nor in the config
    for module in model.modules():
        scaling = getattr(module, 'scaling', None)
        if isinstance(scaling, dict):
            digest.update(repr(sorted(scaling.items())).encode())
    # all token ids, and the spans of each prompt and answer in them
    for array in (examples.ids, examples.spans):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


@errors.on_full_memory('the pass that caches the reference takes microbatches of 4 x max_tokens; lower max_tokens')
@torch.no_grad()
def _compute(run, model, examples):
    """Return the log-probs of all answers under a sharded model: (examples, answers of each), float32, the same on every rank."""
    n_answers = examples.spans.shape[1] - 1  # spans has a column for the prompt and one per answer
    result = np.zeros((len(examples), n_answers), np.float32)
    bar = log.progress(len(examples), ' examples', 'reference')
    for start in range(0, len(examples), 512):
        rows = np.arange(start, min(start + 512, len(examples)))
        # this rank's microbatches of them; this pass keeps no activations, so they can be larger
        step = run.make_step(examples, rows, max_tokens=4 * run.max_tokens)
        # response_logps returns (1, answers of the batch), in the order of its examples
        with adapters_off(model):
            tables = [model.response_logps(batch).view(-1, n_answers) for batch in step.batches]
        by_batch = [dict(enumerate(table.T)) for table in tables]  # {0: of first answers, 1: of second ones}
        columns = fsdp.gather(by_batch, step)  # of all ranks together
        result[rows] = torch.stack(list(columns.values()), dim=1)
        bar.update(len(rows))
    bar.close()
    return result
