"""Measure a DPO step: pairs/s, tokens/s, padding, memory and model FLOPs, for variants that add one idea after the other.

    python -m tools.bench --model=pythia-70m --data=synthetic --batch_size=8
    python -m tools.bench --model=models/pythia-70m --data=hh:data/hh_harmless.jsonl.gz --out=bench.json
    python -m tools.bench --model=pythia-14m --variants='padded trl trl_fastest trl_cuda head cached'   # beside TRL 1.16, if installed
    torchrun --nproc_per_node=2 -m tools.bench --model=pythia-14m

One variant is in memory at a time. In each round all of them take their turn on the same pairs: built, warmed up by one step, timed,
freed again; the next round goes backwards, so that a machine that slows down slows all alike. The figures are medians. `padded` is the
layout of the original DPO code: both answers with their prompts, padded, logits at every position; 8 pairs go through at a time. The
others pack, share prompts, leave out logits, and cache the reference. Loss and gradient are the same in all. trl, trl_fastest and
trl_cuda are TRL's own trainer (experiments/trl/variant.py).
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
from hf import load
from runtime import room
from runtime.files import writing
from runtime.log import per_second, progress
from text.examples import Examples
from tools import limits

model = 'pythia-70m'  # a published shape with random weights (pythia-14m to pythia-2.8b, llama-8b), or a model folder
tokenizer: str | None = None  # a tokenizer folder, for real data with a published shape
vocabulary: int | None = None  # another vocabulary size for a published shape: ids are taken modulo it
data = 'synthetic'  # synthetic (lengths like HH), or what dpo.py reads
loss = 'dpo'  # a loss on pairs without a statistic of the step; tdpo and radpo only with --variants=head
batch_size = 8  # pairs of a step, all ranks together
max_tokens = 16384  # tokens of a microbatch
prompt_tokens: int | None = None  # synthetic: tokens of every prompt; None: log-normal lengths like those of HH
answer_tokens: int | None = None  # synthetic: tokens of every answer; None: as for prompts
n_steps = 5  # timed steps of each variant, in all
rounds = 2  # times that each variant is built and freed: more where the machine is noisy
variants = 'padded packed shared head cached'  # in order: each adds its idea to the one before; also: trl, trl_fastest, trl_cuda
optimizer = 'AdamW'  # AdamW, RMSprop or SGD
dtype = 'float32'  # float32 or bfloat16
shard = 'auto'  # what several processes hold, as in training.py: auto, none, grads or full
threads: int | None = None  # CPU threads; None: torch decides
wall = False  # always measure wall-clock time; False: CPU time, where there is one process on one CPU thread
estimate_for: float | None = None  # GB of a card: only print what a step needs beside it, from shapes alone
peak_tflops: float | None = None  # what the GPU gives in bfloat16, for the utilisation; None: its data sheet
seed = 0  # of weights and data
out: str | None = None  # write the table as json, too
config = configure(globals())

SHAPES = {  # width, layers, heads: the published Pythia suite
    'pythia-14m': (128, 6, 4), 'pythia-70m': (512, 6, 8), 'pythia-160m': (768, 12, 12), 'pythia-410m': (1024, 24, 16),
    'pythia-1b': (2048, 16, 8), 'pythia-1.4b': (2048, 24, 16), 'pythia-2.8b': (2560, 32, 32), 'llama-8b': (4096, 32, 32),
}  # fmt: skip
# the first five add their ideas to one another, in this order
KNOWN = ['padded', 'packed', 'shared', 'head', 'cached', 'trl', 'trl_fastest', 'trl_cuda']
# pairs of a padded microbatch, of all ranks together
PADDED = 8
# a step costs the same at any learning rate, and this one hardly changes the model
LEARNING_RATE = 1e-6
# options of the losses; a step costs the same at any value
OPTIONS = {'beta': 0.1, 'label_smoothing': 0.1, 'average': True, 'alpha': 0.5, 'gamma': 1.0, 'lam': 0.1, 'tau': 0.05, 'delta': 1}  # fmt: skip
# synthetic prompts, chosen and rejected answers have log-normal lengths, as HH's: median, sigma, and the largest, in tokens
LENGTHS = [(85, 0.8, 256), (27, 0.9, 200), (33, 0.9, 200)]

# ---- what the options mean together ----

names = variants.split()
has_trl = any(name.startswith('trl') for name in names)
# the columns of losses.py that the loss asks for; of an unknown loss none
loss_fn = losses.LOSSES.get(loss)
inputs = inspect.signature(loss_fn).parameters if loss_fn else {}
has_ratio = 'ratio_w' in inputs
has_divergence = 'div_w' in inputs
takes_pairs = has_ratio or 'pi_w' in inputs
if not names or set(names) - set(KNOWN):
    raise UserError(f'variants must be some of {", ".join(KNOWN)}, not {variants!r}')
if not takes_pairs or loss in losses.STATISTICS:
    kind = 'losses on pairs without a statistic of the step'
    raise UserError(f'{kind} are measured, not {loss!r}: its step costs the same')
if has_divergence and names != ['head']:
    raise UserError(f'{loss} needs the whole distribution of the live reference: only --variants=head measures it')
if has_trl and (loss != 'dpo' or batch_size % min(PADDED, batch_size)):
    raise UserError(f'TRL is measured with --loss=dpo, and a batch_size that is a multiple of {PADDED}')
if estimate_for and model not in SHAPES:
    raise UserError('--estimate_for is for a published shape')
# found out now, and not after the measurement
if out:
    has_folder = Path(out).absolute().parent.is_dir()
    if Path(out).is_dir() or not has_folder:
        raise UserError(f'cannot write {out}: there is no such folder, or it is one')
rank, world, device = fsdp.setup()
on_gpu = device.type == 'cuda'
# TRL is imported only if it is asked for
if has_trl:
    if world > 1:
        raise UserError('TRL is measured in one process')
    from experiments.trl.variant import TrlVariant
if threads:
    torch.set_num_threads(threads)

# ---- a model, and pairs ----


def build(empty=False, layers=None):
    """Return the model in evaluation mode: a published shape with random weights, or the model of a folder.

    empty: without weights, on the meta device. layers: build a published shape with only this many layers."""
    if model not in SHAPES:
        return load.load_model(model, empty=empty)
    models.register_attention()
    width, depth, heads = SHAPES[model]
    sizes = {'hidden_size': width, 'num_hidden_layers': layers or depth, 'num_attention_heads': heads}
    # llama-8b has Llama 3's proportions, the others are Pythias
    if model == 'llama-8b':
        sizes |= {'intermediate_size': 14336, 'num_key_value_heads': 8, 'rope_theta': 500000.0}
        shape = transformers.LlamaConfig(vocab_size=vocabulary or 128256, **sizes)
    else:
        shape = transformers.GPTNeoXConfig(vocab_size=vocabulary or 50304, intermediate_size=4 * width, **sizes)
    # a GPU draws random weights in seconds, the CPU in minutes
    where = 'meta' if empty else device
    with torch.device(where):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(shape).eval()


def real_pairs(count):
    """Return Examples: `count` pairs of --data in random order, repeated if the data has fewer.

    With --vocabulary their lengths are real, and their ids are taken modulo the vocabulary. Raises UserError without a tokenizer."""
    from text.tokenise import load_examples

    if not tokenizer and model in SHAPES:
        raise UserError(f'{model} has no tokenizer for --data={data}: give the folder of one with --tokenizer')
    options = {'tokenizer': load.load_tokenizer(tokenizer or model), 'max_length': 512, 'max_prompt_length': 256}
    pairs = fsdp.first_of_host(lambda: load_examples(data, 'train', task='pairs', **options))
    if vocabulary:
        pairs.ids = pairs.ids % vocabulary
    order = np.random.default_rng(seed).permutation(len(pairs))
    # np.resize repeats the order until there are enough
    return pairs.select(np.resize(order, count))


def synthetic_pairs(count):
    """Return Examples: `count` pairs of random tokens, with the lengths that the options fix, or with those of LENGTHS."""
    rng = np.random.default_rng(seed)
    fixed_lengths = [prompt_tokens, answer_tokens, answer_tokens]
    # a token is one of these ids from 0, which every published shape has
    count_of_ids = min(vocabulary or 4096, 4096)
    pairs = []
    for _ in range(count):
        # all lengths are drawn, so that fixing one of them does not change the others
        drawn = [np.clip(rng.lognormal(math.log(median), sigma), 2, most) for median, sigma, most in LENGTHS]
        lengths = [fixed or int(length) for fixed, length in zip(fixed_lengths, drawn, strict=True)]
        prompt, *answers = [rng.integers(0, count_of_ids, length) for length in lengths]
        pairs.append((prompt, answers))
    return Examples.of(pairs)


# ---- the variants ----


def full_head(net, batch):
    """Return the log-probs (A,) of the answers as the original code computes them: from logits at every position."""
    head = models.core(net).get_output_embeddings()
    hidden = models.body(net, batch).flatten(0, 1)  # (positions, width)
    logps = head(hidden).float().log_softmax(-1)  # (positions, vocabulary)
    # of the answers' tokens alone, then their sum for each answer
    of_tokens = logps[batch.predict_at].gather(1, batch.target[:, None])
    return batch.sum(of_tokens.squeeze(1))


class Variant:
    """A way to compute a step: load() builds its models for a round, step() computes and measures a step, free() drops them.

    pad: each answer has a padded row of its own, with its prompt; if not, all are packed into one row. share: the answers of a
    pair share one copy of their prompt. head: logits at the answers' tokens alone. cached: the reference runs in load(), once.
    times: seconds of each timed step, in all rounds. passes: seconds that the reference took for the same steps if it is cached,
    else empty. tokens, allocated: tokens of all steps without and with padding. peak: the most GB of any step; estimate: the
    same, as room.estimate expects it."""

    def __init__(self, name):
        """Select the optimizations of a variant. Variants are cumulative: each adds one to all the previous ones in KNOWN."""
        enabled = KNOWN[: KNOWN.index(name) + 1]
        self.name = name
        self.pad = 'packed' not in enabled
        self.share = 'shared' in enabled
        self.head = 'head' in enabled
        self.cached = 'cached' in enabled
        self.times, self.passes = [], []
        self.tokens = self.allocated = 0
        self.peak = self.estimate = 0.0

    @guard.memory_for('lower batch_size or max_tokens')
    def load(self, examples, steps):
        """Build policy, reference and optimizer, which are the same in each round.

        steps (k, batch_size): the places in examples of the pairs of each step to come. A cached variant also runs and times the
        reference on them, and drops it: later epochs and runs do without that pass, and without the reference in memory."""
        self.policy = self.model(train=True)
        self.ref = self.model(train=False)
        self.torch_optimizer = fsdp.make_optimizer(optimizer, self.policy, lr=LEARNING_RATE, weight_decay=0.0)
        forward = partial(self.logps, self.policy)
        self.per_token = room.bytes_per_token(self.policy, forward, examples, packed=not self.pad)
        # rows of a step -> the reference's log-probs, (A,) for each microbatch
        self.ref_logps = {}
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

    def model(self, train):
        """Return the policy if train is true, else the reference, sharded and ready for this variant's batches."""
        built = fsdp.shard(build, device, dtype=dtype, mode=shard, train=train)
        fsdp.add_method(built, full_head)
        models.set_attention(built, packed=not self.pad)
        return built

    def free(self):
        """Drop what load() has built."""
        del self.policy, self.ref, self.torch_optimizer

    def logps(self, net, batch):
        """Return the log-probs (A,) of a microbatch's answers under a model that self.model has made."""
        if not self.head:
            return net.full_head(batch)
        # one row, for no divergence is asked for
        (logps,) = net.response_logps(batch)
        return logps

    def batches(self, examples, rows):
        """Return this rank's microbatches of the step on examples[rows], and count its tokens."""
        if self.pad:
            # PADDED pairs at a time, as gradient accumulation does, however long they are
            pairs_at_a_time, most_tokens = PADDED, 10**9
        else:
            pairs_at_a_time, most_tokens = len(rows), max_tokens
        options = {'share_prefix': self.share, 'pad': self.pad, 'device': device}
        batches = []
        for start in range(0, len(rows), pairs_at_a_time):
            together = rows[start : start + pairs_at_a_time]
            new_batches, tokens, allocated = make_batches(examples, together, rank, world, most_tokens, **options)
            batches += new_batches
            self.tokens += tokens
            self.allocated += allocated
        return batches

    def columns(self, batch, ref_logps):
        """Return the columns of losses.py for a microbatch: name -> (pairs,).

        ref_logps: the reference's log-probs (A,) if they are cached, or None: then it runs here, if the loss asks for it."""
        of_answers = {'n': batch.n.float()}  # name -> (A,)
        if has_divergence:
            with torch.no_grad():
                reference = self.ref.hidden_and_head(batch)
            pi, divergence, ref_logps = self.policy.response_logps(batch, models.kl, reference)
            of_answers |= {'pi': pi, 'div': divergence}
        else:
            if has_ratio and ref_logps is None:
                with torch.no_grad():
                    ref_logps = self.logps(self.ref, batch)
            of_answers['pi'] = self.logps(self.policy, batch)
        if ref_logps is not None:
            of_answers['ref'] = ref_logps
            of_answers['ratio'] = of_answers['pi'] - ref_logps

        # the answers of all pairs stand one behind the other: chosen, rejected, chosen, rejected ...
        columns = {}
        for name, values in of_answers.items():
            columns[f'{name}_w'] = values[0::2]
            columns[f'{name}_l'] = values[1::2]
        return columns

    @guard.memory_for('lower batch_size or max_tokens')
    def step(self, examples, rows):
        """Run and measure one optimizer step (forward, backward, update) on examples[rows].

        Appends the seconds to self.times; self.peak and self.estimate (GB) keep the maximum over all steps."""
        batches = self.batches(examples, rows)
        # None: columns() runs the reference if the loss needs it
        ref_logps = self.ref_logps[tuple(rows)] if self.cached else [None] * len(batches)
        reset_peak()
        start = clock()
        for batch, batch_ref_logps in zip(batches, ref_logps, strict=True):
            arguments = OPTIONS | self.columns(batch, batch_ref_logps)
            pair_losses = loss_fn(**{name: arguments[name] for name in inputs})
            # batch.real is 0 for the filler batches of ranks that have no pairs
            (pair_losses * batch.real).sum().backward()
        # update() averages over ranks; the scale turns the average of sums into the mean over all pairs
        fsdp.update(self.policy, self.torch_optimizer, lr=LEARNING_RATE, scale=world / len(rows), max_norm=10.0)
        self.times.append(clock() - start)
        self.peak = max(self.peak, peak_memory())
        self.estimate = max(self.estimate, self.estimated_memory(batches))

    def estimated_memory(self, batches):
        """Return the GB that room.estimate expects a step with these microbatches to need, without having seen it."""
        largest = max(batch.ids.numel() for batch in batches)
        frozen = 0
        # a cached variant has no reference any more
        if self.ref is not None:
            frozen = sum(parameter.numel() for parameter in self.ref.parameters())
        options = {'ranks': world, 'shard': self.policy.shard_mode, 'frozen': frozen}
        needs = room.estimate(self.policy, self.per_token, largest, optimizer=optimizer, dtype=dtype, **options)
        return gb_without_model + sum(needs.values()) / 1e9


# ---- what is measured ----


def clock():
    """Return the time in seconds, after the GPU has done all its work so far.

    In one process on one CPU thread it is CPU time, unless --wall, so that other work on the machine does not count."""
    if on_gpu:
        torch.cuda.synchronize()
    one_thread = not on_gpu and torch.get_num_threads() == 1
    if one_thread and world == 1 and not wall:
        return time.process_time()
    return time.perf_counter()


def reset_peak():
    """Begin a new peak of memory for peak_memory: of the GPU, and of the process's resident set if Linux allows it."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        # 5 resets VmHWM, see man proc
        Path('/proc/self/clear_refs').write_text('5')


def peak_memory():
    """Return the peak of memory since reset_peak in GB, of the GPU, or else of the process."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 1e9
    # Linux has a line such as `VmHWM:  123456 kB`
    with contextlib.suppress(OSError, TypeError):
        status = Path('/proc/self/status').read_text()
        return int(re.search(r'VmHWM:\s*(\d+)', status)[1]) / 1e6
    # elsewhere there is only the peak since the process began
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def release():
    """Give freed memory back to the GPU and to the system, so that the next variant's peak does not hold it."""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    # glibc keeps freed memory until it is told to; other C libraries have no such function
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def show_estimates():
    """Print for each size of a microbatch what memory a step needs, and whether a card of --estimate_for GB has it.

    The step has a live reference. All is computed from shapes and two small models, nothing is measured."""
    # the bytes that a token keeps for backward grow by the same with each layer: found from a model of one and of two
    bytes_of_token = []
    for layers in (1, 2):
        small = build(layers=layers).to(getattr(torch, dtype))
        models.set_attention(small, packed=True)
        forward = partial(models.response_logps, small)
        bytes_of_token.append(room.bytes_per_token(small, forward, examples, packed=True))
    with_one, with_two = bytes_of_token
    further_layers = shell.config.num_hidden_layers - 1
    per_token = with_one + further_layers * (with_two - with_one)

    frozen = sum(parameter.numel() for parameter in shell.parameters())
    options = {'ranks': world, 'shard': shard.replace('auto', 'none'), 'frozen': frozen, 'device': torch.device('cuda')}
    print(f'{model}, {optimizer}, {dtype}, live reference: GB of {estimate_for:g}')
    for tokens in room.BUDGETS:
        needs = room.estimate(shell, per_token, tokens, optimizer=optimizer, dtype=dtype, **options)
        total = sum(needs.values()) / 1e9
        fits = 'fits' if total <= room.SAFE['cuda'] * estimate_for else 'too much'
        parts = ', '.join(f'{name} {number / 1e9:.1f}' for name, number in needs.items())
        print(f'max_tokens {tokens:6d}: {total:6.1f}  {fits:8s}  ({parts})')


def row_of(run, lengths):
    """Return a variant's row of the table, with medians over its timed steps: {'variant': its name, name of a column: number}.

    lengths (pairs, 3): tokens of prompt, chosen and rejected answer, of all timed pairs. A TrlVariant has fewer columns, and a
    number that is not finite is left out."""
    seconds = statistics.median(run.times)
    # each step is compared with the same step of the first variant
    ratios = map(per_second, runs[0].times, run.times)
    row = {'pairs_per_second': per_second(batch_size, seconds), 'ratio': statistics.median(ratios)}
    tokens_of_step = lengths.sum() / n_steps
    row['tokens_per_second'] = per_second(tokens_of_step, seconds)
    row['peak_memory_gb'] = run.peak

    if isinstance(run, Variant):
        # the estimate does not know the gradients of logits at every position
        if run.head:
            row['estimated_memory_gb'] = run.estimate
        row['padding_share'] = 1 - run.tokens / run.allocated
        # the policy's backward costs as much as two forwards
        runs_reference = has_ratio and not run.cached
        passes = 4 if runs_reference else 3
        cost = limits.flops(shell, lengths, share=run.share, head=run.head, passes=passes)
        row['gflop_per_pair'] = cost / 1e9
        if peak:
            row['mfu'] = per_second(cost * batch_size, seconds) / world / peak / 1e12
        if run.cached:
            with_pass = [sum(both) for both in zip(run.times, run.passes, strict=True)]
            row['pairs_per_second_with_cache_pass'] = per_second(batch_size, statistics.median(with_pass))
    # json knows no infinity and no nan
    finite = {name: float(value) for name, value in row.items() if math.isfinite(value)}
    return {'variant': run.name} | finite


def show(rows, lengths, limit):
    """Print the table. rows, lengths: as in row_of; limit: the pairs/s that no variant with a live reference can exceed."""
    where = card if on_gpu else f'CPU, {torch.get_num_threads()} threads'
    print(f'{model}, {data}, {loss}, batch {batch_size}, {world} ranks, {where}, {dtype}, torch {torch.__version__}')
    print('mean tokens of a pair: prompt {:.0f}, answers {:.0f} and {:.0f}'.format(*lengths.mean(0)))
    print('variant       pairs/s      x  tokens/s  padding  GFLOP/pair  peak GB  est. GB     MFU')
    formats = {'pairs_per_second': '9.2f', 'ratio': '6.2f', 'tokens_per_second': '9.0f', 'padding_share': '8.1%',
               'gflop_per_pair': '11.1f', 'peak_memory_gb': '8.2f', 'estimated_memory_gb': '8.2f', 'mfu': '7.1%'}  # fmt: skip
    for row in rows:
        print(f'{row["variant"]:11s}', end='')
        for name, form in formats.items():
            # a cell without a number has the same width: 9 for 9.2f
            width = int(form.partition('.')[0])
            cell = f'{row[name]:{form}}' if name in row else '-'
            print(f' {cell:>{width}s}', end='')
        print()
        with_pass = row.get('pairs_per_second_with_cache_pass')
        if with_pass:
            print(f'{"+ its pass":11s} {with_pass:9.2f}  the pass that makes the cache counted, as in a first epoch')
    print(f'{"limit":11s} {limit:9.2f}  if the matrix products of policy and live reference were all there is')
    print('x: median of the ratio to the first variant, step by step. Peak memory: while this variant alone is loaded.')
    if peak:
        print(f'MFU: of {peak} TFLOP/s, {peak_source}')
    elif on_gpu:
        print(f'MFU: {peak_source}')


# ---- the measurement ----

# (steps, batch_size): the places in examples of each step's pairs; the first step is there to warm up
steps = np.arange((n_steps + 1) * batch_size).reshape(-1, batch_size)
examples = synthetic_pairs(steps.size) if data == 'synthetic' else real_pairs(steps.size)
# the model without weights, of which only shapes are asked
shell = build(empty=True)
if estimate_for:
    show_estimates()
    fsdp.leave()
# what the process itself has in memory; a GPU counts tensors alone
gb_without_model = 0.0 if on_gpu else peak_memory()
card = torch.cuda.get_device_name() if on_gpu else 'this CPU'
# TFLOP/s of the card, and who says so; no utilisation is shown if nobody does
if peak_tflops:
    peak, peak_source = peak_tflops, '--peak_tflops'
else:
    peak, peak_source = limits.peak_of(card)
# what experiments/trl/variant.py takes of this file
trl_options = {'step_pairs': min(PADDED, batch_size), 'tools': (clock, reset_peak, peak_memory), 'threads': threads,
               'half': dtype == 'bfloat16', 'optimizer': optimizer}  # fmt: skip
runs = [TrlVariant(name, build, **trl_options) if name.startswith('trl') else Variant(name) for name in names]

# a round: every variant by itself, on the same steps
rounds = min(rounds, n_steps) if len(runs) > 1 else 1
bar = progress((n_steps + rounds) * len(runs), ' steps', 'bench')
for number, timed_steps in enumerate(np.array_split(steps[1:], rounds)):
    steps_of_round = np.concatenate([steps[:1], timed_steps])
    goes_backwards = number % 2 == 1
    runs_in_order = runs[::-1] if goes_backwards else runs
    for run in runs_in_order:
        bar.set_description_str(run.name, refresh=False)
        run.load(examples, steps_of_round)
        for rows in steps_of_round:
            run.step(examples, rows)
            bar.update()
        # forget the figures of the round's first step, which was the warm-up; without a cache there are no passes
        for seconds in (run.times, run.passes):
            if seconds:
                del seconds[-len(steps_of_round)]
        run.free()
        release()
bar.close()

# the table, without the pairs of the first step
lengths = examples.widths[batch_size:].astype(float)  # (pairs, 3): prompt, chosen and rejected answer
rows_of_table = [row_of(run, lengths) for run in runs]
# the limit: a step in the time of its matrix products; only tokens of answers go through the head
prompts, chosen, rejected = lengths.sum(0) / n_steps / world  # tokens of a step on a rank
tokens = int(prompts + chosen + rejected)
predicted = int(chosen + rejected)
seconds = limits.products_alone(shell, tokens, predicted, getattr(torch, dtype), device, clock)
limit = per_second(batch_size, seconds)
if main_rank():
    show(rows_of_table, lengths, limit)
    # the same as json, with the options that led to it
    if out:
        record = {'config': dict(config), 'rows': rows_of_table}
        record['limit_pairs_per_second'] = limit if math.isfinite(limit) else None
        with writing(out):
            Path(out).write_text(json.dumps(record, indent=1))
if __name__ == '__main__':
    fsdp.leave()
