"""Measure a DPO step: pairs/s, tokens/s, padding, memory and model FLOPs, for variants that add one optimization each.

    python -m tools.bench --model=pythia-70m --data=synthetic --batch_size=8
    python -m tools.bench --model=models/pythia-70m --data=hh:data/hh_harmless.jsonl.gz --out=bench.json
    python -m tools.bench --model=pythia-14m --variants='padded trl trl_fastest trl_cuda head cached'   # beside TRL 1.16, if installed
    torchrun --nproc_per_node=2 -m tools.bench --model=pythia-14m

Variants are cumulative: `padded` is the original DPO code (padded rows, prompts repeated, logits at every position); the next ones
pack rows, share prompts, compute logits at answer tokens only, and cache the reference. Loss and gradient are the same. trl,
trl_fastest and trl_cuda are TRL's trainer. In each round every variant is built, warmed up by the largest step, timed on the same pairs
and freed, one at a time; every other round runs backwards, to cancel slow drift of the machine. The figures are medians. On a CPU
all of them, TRL's too, run in a process that keeps freed memory (runtime/ranks.py), as our scripts do.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import contextlib
import ctypes
import gc
import inspect
import json
import math
import re
import resource
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers

import fsdp
import losses
import model as models
from configurator import UserError, configure, main_rank
from data import make_batches
from hf import attention, load, sharded
from rl import divergences
from runtime import errors, ranks, room
from runtime.files import check_file, replace_text, say
from runtime.log import per_second, progress
from text.examples import Examples
from text.sources import keep_data
from tools import limits

# model and data
model = 'pythia-70m'  # a published shape with random weights (pythia-14m to pythia-2.8b, llama-8b), or a model folder
tokenizer: str | None = None  # a tokenizer folder, for real data with a published shape
vocabulary: int | None = None  # another vocabulary size for a published shape; token ids are taken modulo it
data = 'synthetic'  # synthetic (lengths like HH), or what dpo.py reads
prompt_tokens: int | None = None  # synthetic: tokens of every prompt; None: log-normal lengths like those of HH
answer_tokens: int | None = None  # synthetic: tokens of every answer; None: as for prompts
seed = 0  # of weights and data
# the step
loss = 'dpo'  # a pair loss without batch statistics; tdpo and radpo only with --variants=head
batch_size = 8  # pairs of a step, all ranks together
max_tokens = 16384  # tokens of a microbatch
optimizer = 'AdamW'  # AdamW, RMSprop or SGD
dtype = 'float32'  # float32 or bfloat16
shard = 'auto'  # how ranks share the model, as in training.py: auto, none, grads or full
# the measurement
variants = 'padded packed shared head cached'  # cumulative, in this order; also: trl, trl_fastest, trl_cuda
n_steps = 5  # timed steps of each variant, over all rounds
rounds = 2  # how often each variant is built and freed; use more on a noisy machine
threads: int | None = None  # CPU threads; None: torch decides
wall = False  # always measure wall-clock time; False: CPU time if there is one process with one CPU thread
peak_tflops: float | None = None  # peak of the GPU in bfloat16, for the MFU; None: from its data sheet
out: str | None = None  # also write the table to this file, as JSON
config = configure(globals())

SHAPES = {  # width, layers, heads: the published Pythia suite
    'pythia-14m': (128, 6, 4), 'pythia-70m': (512, 6, 8), 'pythia-160m': (768, 12, 12), 'pythia-410m': (1024, 24, 16),
    'pythia-1b': (2048, 16, 8), 'pythia-1.4b': (2048, 24, 16), 'pythia-2.8b': (2560, 32, 32), 'llama-8b': (4096, 32, 32),
}  # fmt: skip
VARIANTS = 'padded packed shared head cached trl trl_fastest trl_cuda'.split()  # the first five are cumulative
PADDED_PAIRS = 8  # pairs of a padded microbatch, all ranks together
LEARNING_RATE = 1e-6  # so small that the model hardly changes; the cost is the same at any value
# arguments of the losses; the cost is the same at any value
LOSS_OPTIONS = {'beta': 0.1, 'label_smoothing': 0.1, 'average': True, 'alpha': 0.5, 'gamma': 1.0, 'lam': 0.1, 'tau': 0.05, 'delta': 1}  # fmt: skip
# lengths of synthetic prompts, chosen and rejected answers, log-normal as in HH: (median, sigma, maximum) in tokens
LENGTHS = [(85, 0.8, 256), (27, 0.9, 200), (33, 0.9, 200)]

# check the options
names = variants.split()
has_trl = any(name.startswith('trl') for name in names)
loss_fn = losses.LOSSES.get(loss)
loss_args = inspect.signature(loss_fn).parameters if loss_fn else {}
has_ratio = 'ratio_w' in loss_args  # needs the reference
has_divergence = 'div_w' in loss_args
if not names or set(names) - set(VARIANTS):
    raise UserError(f'variants must be some of {", ".join(VARIANTS)}, not {variants!r}')
# pair losses take *_w (chosen) and *_l (rejected) arguments
if not (has_ratio or 'pi_w' in loss_args) or loss in losses.STATISTICS:
    raise UserError(f'only losses on pairs without a statistic of the step are measured, not {loss!r}')
if has_divergence and names != ['head']:
    raise UserError(f'{loss} needs the whole distribution of the live reference: only --variants=head measures it')
if has_trl and (loss != 'dpo' or batch_size % min(PADDED_PAIRS, batch_size)):
    raise UserError(f'TRL is measured with --loss=dpo, and a batch_size that is a multiple of {PADDED_PAIRS}')
# fail before the measurement, not after it
if out and not Path(out).absolute().parent.is_dir():
    raise UserError(f'cannot write {out}: there is no such folder')
if out:
    check_file(out)
if out and data != 'synthetic':
    keep_data(data, out)
rank, world_size, device = ranks.setup()
on_gpu = device.type == 'cuda'
if has_trl:
    if world_size > 1:
        raise UserError('TRL is measured in one process')
    from experiments.trl.variant import TrlVariant
if threads:
    torch.set_num_threads(threads)


def build(empty=False):
    """Return the model in eval mode: a published shape with random weights, or a model folder. empty: on the meta device."""
    if model not in SHAPES:
        return load.load_model(model, empty=empty)
    attention.register_attention()
    width, depth, heads = SHAPES[model]
    sizes = {'hidden_size': width, 'num_hidden_layers': depth, 'num_attention_heads': heads}
    if model == 'llama-8b':
        sizes |= {'intermediate_size': 14336, 'num_key_value_heads': 8, 'rope_theta': 500000.0}
        shape = transformers.LlamaConfig(vocab_size=vocabulary or 128256, **sizes)
    else:
        shape = transformers.GPTNeoXConfig(vocab_size=vocabulary or 50304, intermediate_size=4 * width, **sizes)
    # initialize on the GPU, which is much faster than on the CPU
    with torch.device('meta' if empty else device):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(shape).eval()


def full_head(net, batch):
    """Return the log-probs (A,) of the A answers of a data.Batch as the original DPO code does: from logits at every position."""
    head = models.core(net).get_output_embeddings()
    hidden = models.last_hidden_states(net, batch).flatten(0, 1)  # (positions, hidden_size)
    logps = head(hidden).float().log_softmax(-1)  # (positions, vocab_size)
    # of the answer tokens: the position before each, and its id
    token_logps = logps[batch.predict_at].gather(1, batch.target[:, None])
    return batch.sum(token_logps.squeeze(1))


class Variant:
    """A way to compute a DPO step. load() builds the models for a round, step() runs and times a step, free() drops the models."""

    def __init__(self, name):
        """Switch on the optimizations of a variant, one of the first five VARIANTS, which has those of all before it, too."""
        enabled = VARIANTS[: VARIANTS.index(name) + 1]
        self.name = name
        self.pad = 'packed' not in enabled  # a row for each answer, padded to the longest; else one packed row
        self.share = 'shared' in enabled  # both answers share one copy of the prompt
        self.head = 'head' in enabled  # logits at answer tokens only
        self.cached = 'cached' in enabled  # load() computes the reference's log-probs, and step() reads them
        # measured in all rounds so far
        self.times = []  # seconds of each timed step
        self.passes = []  # if cached: seconds of the reference's forward pass for each of these steps
        self.tokens = 0  # of all batches, without padding
        self.allocated = 0  # the same with padding
        self.peak = 0.0  # measured memory of the largest step, in GB
        self.estimate = 0.0  # the same as room.estimate() has it

    @errors.on_full_memory('lower batch_size or max_tokens')
    def load(self, examples, steps):
        """Build policy, reference and optimizer. Time the reference if its log-probs are cached. steps: rows of examples of each step."""
        self.policy = self.build_model(train=True)
        self.ref = self.build_model(train=False)
        self.torch_optimizer = fsdp.make_optimizer(optimizer, self.policy, lr=LEARNING_RATE, weight_decay=0.0)
        forward = partial(self.logps, self.policy)
        self.per_token = room.bytes_per_token(self.policy, forward, examples, packed=not self.pad)
        self.ref_logps = {}  # indices of a step -> [log-probs (A,) of each microbatch]
        if not self.cached:
            return
        for rows in steps:
            batches = self.batches(examples, rows)
            start = clock()
            with torch.no_grad():
                self.ref_logps[tuple(rows)] = [self.logps(self.ref, batch) for batch in batches]
            self.passes.append(clock() - start)
        self.ref = None
        release()

    def build_model(self, train):
        """Build and shard the policy (train=True) or the reference, in the dtype and mode of the options."""
        built = fsdp.shard(build, device, dtype=dtype, mode=shard, train=train)
        # as built.full_head(batch), also of a sharded model
        sharded.add_method(built, full_head)
        attention.set_attention(built, packed=not self.pad)
        return built

    def free(self):
        """Drop the models and the optimizer."""
        del self.policy, self.ref, self.torch_optimizer

    def logps(self, net, batch):
        """Return the log-probs (A,) of the A answers of a microbatch."""
        return net.response_logps(batch)[0] if self.head else net.full_head(batch)

    def batches(self, examples, rows):
        """Return this rank's microbatches of the step on examples[rows], and count their tokens."""
        # padded: a fixed number of pairs at a time, of any length; packed: as many tokens as allowed
        num_pairs = PADDED_PAIRS if self.pad else len(rows)
        token_limit = 10**9 if self.pad else max_tokens
        options = {'share_prefix': self.share, 'pad': self.pad, 'device': device}
        batches = []
        for start in range(0, len(rows), num_pairs):
            chunk = rows[start : start + num_pairs]
            new_batches, tokens, allocated = make_batches(examples, chunk, rank, world_size, token_limit, **options)
            batches += new_batches
            self.tokens += tokens
            self.allocated += allocated
        return batches

    def columns(self, batch, ref_logps):
        """Return the loss's arguments, {name: (pairs,)}: *_w of chosen, *_l of rejected answers.

        ref_logps: those from the cache, (A,) for A answers, two a pair; None: run the reference, if the loss needs it."""
        values = {'n': batch.n.float()}  # name -> (A,)
        if has_divergence:
            with torch.no_grad():
                reference = self.ref.hidden_and_head(batch)
            # a row of (3, A) each
            pi, divergence, ref_logps = self.policy.response_logps(batch, divergences.kl, reference)
            values |= {'pi': pi, 'div': divergence}
        else:
            if has_ratio and ref_logps is None:
                with torch.no_grad():
                    ref_logps = self.logps(self.ref, batch)
            values['pi'] = self.logps(self.policy, batch)
        if ref_logps is not None:
            values['ratio'] = values['pi'] - ref_logps
        # answers alternate: chosen, rejected, chosen, rejected, ...
        chosen = {f'{name}_w': value[0::2] for name, value in values.items()}
        rejected = {f'{name}_l': value[1::2] for name, value in values.items()}
        return chosen | rejected

    @errors.on_full_memory('lower batch_size or max_tokens')
    def step(self, examples, rows):
        """Run one optimizer step (forward, backward, update) on examples[rows]; record its time, and memory (measured, estimated)."""
        batches = self.batches(examples, rows)
        ref_logps = self.ref_logps[tuple(rows)] if self.cached else [None] * len(batches)
        reset_peak()
        start = clock()
        for batch, batch_ref_logps in zip(batches, ref_logps, strict=True):
            arguments = LOSS_OPTIONS | self.columns(batch, batch_ref_logps)
            pair_losses = loss_fn(**{name: arguments[name] for name in loss_args})
            # batch.real is 0 for the filler batches of ranks that have no pairs
            (pair_losses * batch.real).sum().backward()
        # update() averages over ranks; the scale turns the average of sums into the mean over all pairs
        fsdp.update(self.policy, self.torch_optimizer, lr=LEARNING_RATE, scale=world_size / len(rows), max_norm=10.0)
        self.times.append(clock() - start)
        self.peak = max(self.peak, peak_memory())
        # what models, optimizer and the largest microbatch should take; cached variants have freed the reference
        # tokens, and those through the head
        sizes = max((batch.ids.numel(), batch.target.numel()) for batch in batches)
        n_frozen = self.ref.num_parameters() if self.ref else 0
        needs = room.estimate(config, self.policy, self.per_token, n_frozen, *sizes, is_step=len(batches) == 1)
        self.estimate = max(self.estimate, gb_without_model + sum(needs.values()) / 1e9)


def clock():
    """Return the time in seconds, after waiting for the GPU: wall-clock time, or CPU time (see --wall)."""
    if on_gpu:
        torch.cuda.synchronize()
    # CPU time ignores other work on the machine
    one_thread = not on_gpu and torch.get_num_threads() == 1
    if one_thread and world_size == 1 and not wall:
        return time.process_time()
    return time.perf_counter()


def reset_peak():
    """Reset the peak memory of the GPU, and of the process if Linux allows it."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        # 5 resets VmHWM, see man proc
        Path('/proc/self/clear_refs').write_text('5')


def peak_memory():
    """Return the peak memory in GB since reset_peak(), of the GPU, or else of the process."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 1e9
    # Linux: a line such as `VmHWM:  123456 kB`
    with contextlib.suppress(OSError, TypeError):
        status = Path('/proc/self/status').read_text()
        return int(re.search(r'VmHWM:\s*(\d+)', status)[1]) / 1e6
    # fallback: the peak since the process started
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def release():
    """Return freed memory to the GPU and the system, so that it does not count for the next variant."""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    # glibc only: other C libraries have no malloc_trim
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


# ---- measure ----

# indices of the pairs of each step, (n_steps, batch_size)
steps = np.arange(n_steps * batch_size).reshape(-1, batch_size)
meta_model = build(empty=True)
rng = np.random.default_rng(seed)
if data == 'synthetic':
    fixed_lengths = [prompt_tokens, answer_tokens, answer_tokens]
    num_ids = min(meta_model.config.vocab_size, 4096)  # ids that every shape in SHAPES has
    pairs = []
    for _ in range(steps.size):
        lengths = []
        for fixed, (median, sigma, most) in zip(fixed_lengths, LENGTHS, strict=True):
            drawn = rng.lognormal(math.log(median), sigma)
            lengths.append(fixed or int(np.clip(drawn, 2, most)))
        prompt, *answers = [rng.integers(0, num_ids, length) for length in lengths]
        pairs.append((prompt, answers))
    examples = Examples.of(pairs)
else:
    from text.tokenise import load_examples

    if not tokenizer and model in SHAPES:
        raise UserError(f'{model} has no tokenizer for --data={data}: give the folder of one with --tokenizer')
    options = {'tokenizer': load.load_tokenizer(tokenizer or model), 'max_length': 512, 'max_prompt_length': 256}
    pairs = ranks.first_of_host(lambda: load_examples(data, 'train', task='pairs', **options))
    if vocabulary:
        pairs.ids = pairs.ids % vocabulary
    # in random order; np.resize repeats the order if it is too short
    examples = pairs.select(np.resize(rng.permutation(len(pairs)), steps.size))
# memory of the process itself; on a GPU only tensors count
gb_without_model = 0.0 if on_gpu else peak_memory()
card = torch.cuda.get_device_name() if on_gpu else f'CPU, {torch.get_num_threads()} threads'
# card_tflops is None for an unknown card: then there is no MFU
card_tflops, tflops_source = (peak_tflops, '--peak_tflops') if peak_tflops else limits.peak_of(card)
trl_options = {'step_pairs': min(PADDED_PAIRS, batch_size), 'tools': (clock, reset_peak, peak_memory), 'threads': threads,
               'half': dtype == 'bfloat16', 'optimizer': optimizer}  # fmt: skip
runs = [TrlVariant(name, build, **trl_options) if name.startswith('trl') else Variant(name) for name in names]
rounds = min(rounds, n_steps) if len(runs) > 1 else 1
# warm up with the step of the most tokens: later ones then find all the memory that they need, as in a long run
warm_up = examples.widths[steps].sum((1, 2)).argmax()
bar = progress((n_steps + rounds) * len(runs), ' steps', 'bench')
for number, timed_steps in enumerate(np.array_split(steps, rounds)):
    steps_of_round = np.concatenate([steps[[warm_up]], timed_steps])
    # every other round runs backwards
    for run in runs[::-1] if number % 2 == 1 else runs:
        bar.set_description_str(run.name, refresh=False)
        run.load(examples, steps_of_round)
        for rows in steps_of_round:
            run.step(examples, rows)
            bar.update()
        # drop the time of the warm-up, the first step of the round; passes is empty without a cache
        for seconds in (run.times, run.passes):
            if seconds:
                del seconds[-len(steps_of_round)]
        run.free()
        release()
bar.close()

# the table
lengths = examples.widths.astype(float)  # (pairs, 3): tokens of prompt, chosen and rejected answer
table = []  # {column: value} of each variant: medians over its timed steps; TRL's have fewer columns
for run in runs:
    seconds = statistics.median(run.times)
    # per_second(a, b) is a / b, or NaN if the clock stood still
    speedups = map(per_second, runs[0].times, run.times)
    row = {'pairs_per_second': per_second(batch_size, seconds), 'ratio': statistics.median(speedups)}
    row['tokens_per_second'] = per_second(lengths.sum() / n_steps, seconds)
    row['peak_memory_gb'] = run.peak
    if isinstance(run, Variant):
        # room.estimate() assumes logits at answer tokens only
        if run.head:
            row['estimated_memory_gb'] = run.estimate
        row['padding_share'] = 1 - run.tokens / run.allocated
        # policy forward, policy backward (costs two forward passes), reference forward
        needs_reference = has_ratio and not run.cached
        passes = 1 + 2 + int(needs_reference)
        flops_per_pair = limits.flops(meta_model, lengths, share=run.share, head=run.head, passes=passes)
        row['gflop_per_pair'] = flops_per_pair / 1e9
        if card_tflops:
            row['mfu'] = per_second(flops_per_pair * batch_size, seconds) / world_size / card_tflops / 1e12
        if run.cached:
            with_pass = map(sum, zip(run.times, run.passes, strict=True))
            row['pairs_per_second_with_cache_pass'] = per_second(batch_size, statistics.median(with_pass))
    # JSON cannot hold other values
    finite = {name: float(value) for name, value in row.items() if math.isfinite(value)}
    table.append({'variant': run.name} | finite)

# upper bound: a step that takes only the time of its matrix products, with logits at answer tokens
prompts, chosen, rejected = lengths.sum(0) / n_steps / world_size  # tokens per step and rank
tokens = int(prompts + chosen + rejected)
predicted = int(chosen + rejected)
seconds = limits.products_alone(meta_model, tokens, predicted, getattr(torch, dtype), device, clock)
limit = per_second(batch_size, seconds)

machine = f'ranks {world_size}, {card}, {dtype}, torch {torch.__version__}'
say(f'{model}, {data}, {loss}, batch {batch_size}, {machine}')
say('mean tokens of a pair: prompt {:.0f}, answers {:.0f} and {:.0f}'.format(*lengths.mean(0)))
say('variant       pairs/s      x  tokens/s  padding  GFLOP/pair  peak GB  est. GB     MFU')
formats = {'pairs_per_second': '9.2f', 'ratio': '6.2f', 'tokens_per_second': '9.0f', 'padding_share': '8.1%',
           'gflop_per_pair': '11.1f', 'peak_memory_gb': '8.2f', 'estimated_memory_gb': '8.2f', 'mfu': '7.1%'}  # fmt: skip
for row in table:
    cells = [f'{row["variant"]:11s}']
    for name, form in formats.items():
        width = int(form.partition('.')[0])  # 9 for 9.2f
        cells.append(f'{row[name]:{form}}' if name in row else '-'.rjust(width))
    say(' '.join(cells))
    with_pass = row.get('pairs_per_second_with_cache_pass')
    if with_pass:
        say(f'{"+ its pass":11s} {with_pass:9.2f}  the pass that makes the cache counted, as in a first epoch')
say(f'{"limit":11s} {limit:9.2f}  if the matrix products of policy and live reference were all there is')
say('x: median of the ratio to the first variant, step by step. Peak memory: while this variant alone is loaded.')
if card_tflops:
    say(f'MFU: of {card_tflops} TFLOP/s, {tflops_source}')
elif on_gpu:
    say(f'MFU: {tflops_source}')
if out and main_rank():
    record = {'config': dict(config), 'rows': table}
    record['limit_pairs_per_second'] = limit if math.isfinite(limit) else None
    replace_text(out, json.dumps(record, indent=1))
if __name__ == '__main__':
    ranks.leave()
