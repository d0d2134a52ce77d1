"""Measure a DPO step: pairs/s, tokens/s, padding, memory and model FLOPs, for variants that add one idea after the other.

    python -m tools.bench --model=pythia-70m --data=synthetic --batch_size=8
    python -m tools.bench --model=models/pythia-70m --data=hh:data/hh_harmless.jsonl.gz --out=bench.json
    python -m tools.bench --model=pythia-14m --variants='padded trl trl_fastest trl_cuda head cached'   # beside TRL 1.16, if installed
    torchrun --nproc_per_node=2 -m tools.bench --model=pythia-14m

One variant is in memory at a time. In each round all of them take their turn on the same pairs: built, warmed up by one step, timed,
freed again; the next round goes backwards, so that a machine that slows down slows all alike. The figures are medians. `padded` is the
layout of the original DPO code: both answers with their prompts, padded, logits at every position. Loss and gradient are the same in
all. trl, trl_fastest and trl_cuda are TRL's own trainer (experiments/trl/variant.py). Padded batches go through 8 pairs at a time.
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
wall = False  # wall-clock time on one CPU thread, too, not CPU time; several processes have it always
estimate_for: float | None = None  # GB of a card: only print what a step needs beside it, from shapes alone
peak_tflops: float | None = None  # what the GPU gives in bfloat16, for the utilisation; None: its data sheet
seed = 0  # of weights and data
out: str | None = None  # write the table as json, too
config = configure(globals())

SHAPES = {  # width, layers, heads: the published Pythia suite
    'pythia-14m': (128, 6, 4), 'pythia-70m': (512, 6, 8), 'pythia-160m': (768, 12, 12), 'pythia-410m': (1024, 24, 16),
    'pythia-1b': (2048, 16, 8), 'pythia-1.4b': (2048, 24, 16), 'pythia-2.8b': (2560, 32, 32), 'llama-8b': (4096, 32, 32),
}  # fmt: skip
KNOWN = ['padded', 'packed', 'shared', 'head', 'cached', 'trl', 'trl_fastest', 'trl_cuda']
PADDED = 8  # pairs of a padded microbatch, of all ranks
# options of the losses; their values cost nothing
OPTIONS = {'beta': 0.1, 'label_smoothing': 0.1, 'average': True, 'alpha': 0.5, 'gamma': 1.0, 'lam': 0.1, 'tau': 0.05, 'delta': 1}  # fmt: skip
# tokens of prompt and answers are log-normal, as HH's: median, sigma, and the most
LENGTHS = [(85, 0.8, 256), (27, 0.9, 200), (33, 0.9, 200)]

# ---- what the options mean together ----

names = variants.split()
beside_trl = any(name.startswith('trl') for name in names)
loss_fn = losses.LOSSES.get(loss)
inputs = inspect.signature(loss_fn).parameters if loss_fn else {}
has_ratio, has_divergence = 'ratio_w' in inputs, 'div_w' in inputs
if not names or set(names) - set(KNOWN):
    raise UserError(f'variants must be some of {", ".join(KNOWN)}, not {variants!r}')
if not (has_ratio or 'pi_w' in inputs) or loss in losses.STATISTICS:
    kind = 'losses on pairs without a statistic of the step'
    raise UserError(f'{kind} are measured, not {loss!r}: its step costs the same')
if has_divergence and names != ['head']:
    raise UserError(f'{loss} needs the whole distribution of the live reference: only --variants=head measures it')
if beside_trl and (loss != 'dpo' or batch_size % min(PADDED, batch_size)):
    raise UserError(f'TRL is measured with --loss=dpo, and a batch_size that is a multiple of {PADDED}')
if estimate_for and model not in SHAPES:
    raise UserError('--estimate_for is for a published shape')
# now, not after the measurement
if out and (Path(out).is_dir() or not Path(out).absolute().parent.is_dir()):
    raise UserError(f'cannot write {out}: there is no such folder, or it is one')
rank, world, device = fsdp.setup()
on_gpu = device.type == 'cuda'
if beside_trl:
    if world > 1:
        raise UserError('TRL is measured in one process')
    from experiments.trl.variant import TrlVariant
if threads:
    torch.set_num_threads(threads)

# ---- a model, and pairs ----


def build(empty=False, layers=None):
    """The model: random weights in a published shape, or a folder's. empty: no weights, only shapes; layers: fewer of them."""
    if model not in SHAPES:
        return load.load_model(model, empty=empty)
    models.register_attention()
    width, depth, heads = SHAPES[model]
    sizes = {'hidden_size': width, 'num_hidden_layers': layers or depth, 'num_attention_heads': heads}
    if model == 'llama-8b':
        sizes |= {'intermediate_size': 14336, 'num_key_value_heads': 8, 'rope_theta': 500000.0}
        shape = transformers.LlamaConfig(vocab_size=vocabulary or 128256, **sizes)
    else:
        shape = transformers.GPTNeoXConfig(vocab_size=vocabulary or 50304, intermediate_size=4 * width, **sizes)
    with torch.device('meta' if empty else device):  # drawn on the GPU: seconds, not minutes
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(shape).eval()


def real_pairs(count):
    """So many pairs of the data, in random order; with --vocabulary real lengths, the ids folded into fewer words."""
    from text.tokenise import load_examples

    if not tokenizer and model in SHAPES:
        raise UserError(f'{model} has no tokenizer for --data={data}: give the folder of one with --tokenizer')
    options = {'tokenizer': load.load_tokenizer(tokenizer or model), 'max_length': 512, 'max_prompt_length': 256}
    found = fsdp.first_of_host(lambda: load_examples(data, 'train', task='pairs', **options))
    if vocabulary:
        found.ids = found.ids % vocabulary
    order = np.random.default_rng(seed).permutation(len(found))
    return found.select(np.resize(order, count))  # small data is repeated


def synthetic_pairs(count):
    """So many pairs of random tokens."""
    rng, items = np.random.default_rng(seed), []
    wanted = [prompt_tokens, answer_tokens, answer_tokens]
    for _ in range(count):
        # all are drawn, so that one fixed length does not change the others
        drawn = [np.clip(rng.lognormal(math.log(median), sigma), 2, most) for median, sigma, most in LENGTHS]
        lengths = [fixed or int(length) for fixed, length in zip(wanted, drawn, strict=True)]
        prompt, *answers = (rng.integers(0, min(vocabulary or 4096, 4096), n) for n in lengths)
        items.append((prompt, answers))
    return Examples.of(items)


# ---- the variants ----


def full_head(m, batch):
    """Log-probs (A,) as the original code computes them: logits at every position, then the answers' tokens."""
    head = models.core(m).get_output_embeddings()
    logps = head(models.body(m, batch).flatten(0, 1)).float().log_softmax(-1)  # (positions, vocabulary)
    of_tokens = logps[batch.predict_at].gather(1, batch.target[:, None])
    return batch.sum(of_tokens.squeeze(1))


class Variant:
    """One way of computing a step; between load() and free() with a policy, its reference and optimizer."""

    def __init__(self, name):
        # every variant has its own idea and those of the variants before it
        ideas = KNOWN[: KNOWN.index(name) + 1]
        self.name = name
        self.pad, self.share = 'packed' not in ideas, 'shared' in ideas
        self.head, self.cached = 'head' in ideas, 'cached' in ideas
        # of every step: seconds, seconds of the pass that caches the reference; of all: tokens, and those with padding
        self.times, self.passes, self.tokens, self.allocated = [], [], 0, 0
        self.peak = self.estimate = 0.0  # GB, measured and as room.estimate knows them beforehand

    @guard.memory_for('lower batch_size or max_tokens')
    def load(self, examples, steps):
        """Build the models, the same in each round, for these steps (k, batch_size): rows of the examples."""
        self.policy, self.ref = self.model(train=True), self.model(train=False)
        self.optimizer = fsdp.make_optimizer(optimizer, self.policy, 1e-6, 0.0)
        self.per_token = room.bytes_per_token(self.policy, partial(self.logps, self.policy), examples, not self.pad)
        # the pass that caches the reference: later epochs and runs do not pay it, and have no reference in memory
        self.cache = {}
        if self.cached:
            for rows in steps:
                batches, start = self.batches(examples, rows), clock()
                with torch.no_grad():
                    self.cache[rows[0]] = [self.logps(self.ref, batch) for batch in batches]
                self.passes.append(clock() - start)
            self.ref = None
            release()

    def model(self, train):
        """The policy, or its reference."""
        built = fsdp.shard(build, device, dtype=dtype, mode=shard, train=train)
        fsdp.add_method(built, full_head)
        models.set_attention(built, not self.pad)
        return built

    def free(self):
        """Drop what load has built."""
        del self.policy, self.ref, self.optimizer

    def logps(self, m, batch):
        """(A,) log-probs of the answers under a model."""
        if not self.head:
            return m.full_head(batch)
        (logps,) = m.response_logps(batch)  # (1, A): no divergence
        return logps

    def batches(self, examples, rows):
        """The microbatches of a step; padded: PADDED pairs at a time, as gradient accumulation does."""
        size, most = (PADDED, 10**9) if self.pad else (len(rows), max_tokens)
        options = {'share_prefix': self.share, 'pad': self.pad, 'device': device}
        found = []
        for i in range(0, len(rows), size):
            batches, tokens, allocated = make_batches(examples, rows[i : i + size], rank, world, most, **options)
            found += batches
            self.tokens += tokens
            self.allocated += allocated
        return found

    def columns(self, batch, ref):
        """The columns of losses.py, (pairs,) each. ref: cached log-probs of the answers, or None."""
        answers = {'n': batch.n.float()}  # (A,) each: chosen, rejected, chosen, ...
        with torch.no_grad():
            if has_divergence:
                reference = self.ref.hidden_and_head(batch)
            elif ref is None and has_ratio:
                ref = self.logps(self.ref, batch)
        if has_divergence:
            answers['pi'], answers['div'], ref = self.policy.response_logps(batch, models.kl, reference)
        else:
            answers['pi'] = self.logps(self.policy, batch)
        if ref is not None:
            answers |= {'ref': ref, 'ratio': answers['pi'] - ref}
        sides = {'_w': 0, '_l': 1}
        return {name + side: values[first::2] for name, values in answers.items() for side, first in sides.items()}

    @guard.memory_for('lower batch_size or max_tokens')
    def step(self, examples, rows):
        """One optimizer step on these rows of the examples: forward, backward, update."""
        batches = self.batches(examples, rows)
        cached = self.cache.get(rows[0], [None] * len(batches))
        reset_peak()
        start = clock()
        for batch, ref in zip(batches, cached, strict=True):
            values = {**OPTIONS, **self.columns(batch, ref)}
            loss_of_pairs = loss_fn(**{name: values[name] for name in inputs})
            (loss_of_pairs * batch.real).sum().backward()
        fsdp.update(self.policy, self.optimizer, 1e-6, world / len(rows), 10.0)
        self.times.append(clock() - start)
        self.peak = max(self.peak, peak_memory())
        # what was known beforehand of the largest microbatch
        frozen = sum(p.numel() for p in self.ref.parameters()) if self.ref else 0
        tokens = max(batch.ids.numel() for batch in batches)
        how = {'ranks': world, 'shard': self.policy.shard_mode, 'frozen': frozen}
        needs = room.estimate(self.policy, self.per_token, tokens, optimizer=optimizer, dtype=dtype, **how)
        self.estimate = max(self.estimate, before + sum(needs.values()) / 1e9)


# ---- what is measured ----


def clock():
    """Seconds, once the GPU has done its work.

    One process with one CPU thread has its processor's time, so that other work on the machine does not count."""
    if on_gpu:
        torch.cuda.synchronize()
    alone = not on_gpu and torch.get_num_threads() == 1 and world == 1 and not wall
    return time.process_time() if alone else time.perf_counter()


def reset_peak():
    """Forget the peak of memory: of the GPU, or where Linux can the process's resident set."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def peak_memory():
    """GB: of the GPU, or of the process since reset_peak."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 1e9
    # a line of Linux: `VmHWM:  123456 kB`
    with contextlib.suppress(OSError, TypeError):
        return int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def release():
    """Give freed memory back, so that the next variant's peak does not hold it."""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps some, and other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def show_estimates():
    """Print the memory of one step with a live reference on a card of estimate_for GB, by the tokens of a microbatch."""
    # what a token keeps: of the first layer and what is around the layers, and of each layer more
    found = []
    for layers in (1, 2):
        small = build(layers=layers).to(getattr(torch, dtype))
        models.set_attention(small, packed=True)
        found.append(room.bytes_per_token(small, partial(models.response_logps, small), examples, True))
    per_token = found[0] + (shell.config.num_hidden_layers - 1) * (found[1] - found[0])
    frozen = sum(p.numel() for p in shell.parameters())
    how = {'ranks': world, 'shard': shard.replace('auto', 'none'), 'frozen': frozen, 'device': torch.device('cuda')}
    print(f'{model}, {optimizer}, {dtype}, live reference: GB of {estimate_for:g}')
    for tokens in room.BUDGETS:
        needs = room.estimate(shell, per_token, tokens, optimizer=optimizer, dtype=dtype, **how)
        total = sum(needs.values()) / 1e9
        fits = 'fits' if total <= room.SAFE['cuda'] * estimate_for else 'too much'
        parts = ', '.join(f'{name} {number / 1e9:.1f}' for name, number in needs.items())
        print(f'max_tokens {tokens:6d}: {total:6.1f}  {fits:8s}  ({parts})')


def row_of(run, lengths):
    """A row of the table: medians over a variant's steps. lengths: (pairs, 3) tokens of prompt and answers."""
    seconds = statistics.median(run.times)
    ratios = map(per_second, runs[0].times, run.times)
    row = {'pairs_per_second': per_second(batch_size, seconds), 'ratio': statistics.median(ratios)}
    row['tokens_per_second'] = per_second(lengths.sum() / n_steps, seconds)
    row['peak_memory_gb'] = run.peak

    # what is known of our own variants only
    if isinstance(run, Variant):
        # logits at every position have gradients as large, which no forward shows
        if run.head:
            row['estimated_memory_gb'] = run.estimate
        row['padding_share'] = 1 - run.tokens / run.allocated
        live = not run.cached and has_ratio
        cost = limits.flops(shell, lengths, share=run.share, head=run.head, passes=3 + live)
        row['gflop_per_pair'] = cost / 1e9
        if peak:
            row['mfu'] = per_second(cost * batch_size, seconds) / world / peak / 1e12
        if run.cached:
            both = statistics.median(map(sum, zip(run.times, run.passes, strict=True)))
            row['pairs_per_second_with_cache_pass'] = per_second(batch_size, both)
    finite = {name: float(value) for name, value in row.items() if math.isfinite(value)}  # json knows no others
    return {'variant': run.name} | finite


def show(rows, lengths, limit):
    """Print the table."""
    where = card if on_gpu else f'CPU, {torch.get_num_threads()} threads'
    print(f'{model}, {data}, {loss}, batch {batch_size}, {world} ranks, {where}, {dtype}, torch {torch.__version__}')
    print('mean tokens of a pair: prompt {:.0f}, answers {:.0f} and {:.0f}'.format(*lengths.mean(0)))
    print('variant       pairs/s      x  tokens/s  padding  GFLOP/pair  peak GB  est. GB     MFU')
    formats = {'pairs_per_second': '9.2f', 'ratio': '6.2f', 'tokens_per_second': '9.0f', 'padding_share': '8.1%',
               'gflop_per_pair': '11.1f', 'peak_memory_gb': '8.2f', 'estimated_memory_gb': '8.2f', 'mfu': '7.1%'}  # fmt: skip
    for row in rows:
        print(f'{row["variant"]:11s}', end='')
        for name, form in formats.items():
            width = int(form.partition('.')[0])
            cell = f'{row[name]:{form}}' if name in row else '-'
            print(f' {cell:>{width}s}', end='')
        print()
        both = row.get('pairs_per_second_with_cache_pass')
        if both:
            print(f'{"+ its pass":11s} {both:9.2f}  the pass that makes the cache counted, as in a first epoch')
    print(f'{"limit":11s} {limit:9.2f}  if the matrix products of policy and live reference were all there is')
    print('x: median of the ratio to the first variant, step by step. Peak memory: while this variant alone is loaded.')
    if peak or on_gpu:
        print(f'MFU: of {peak} TFLOP/s, {source}' if peak else f'MFU: {source}')


# ---- the measurement ----

steps = np.arange((n_steps + 1) * batch_size).reshape(-1, batch_size)  # rows of each step's pairs; the first warms up
examples = synthetic_pairs(steps.size) if data == 'synthetic' else real_pairs(steps.size)
shell = build(empty=True)  # the shapes of the model's weights
if estimate_for:
    show_estimates()
    fsdp.leave()
before = 0.0 if on_gpu else peak_memory()  # GB of the process without a model
card = torch.cuda.get_device_name() if on_gpu else 'this CPU'
peak, source = (peak_tflops, '--peak_tflops') if peak_tflops else limits.peak_of(card)
trl_options = {'step_pairs': min(PADDED, batch_size), 'tools': (clock, reset_peak, peak_memory), 'threads': threads,
               'half': dtype == 'bfloat16', 'optimizer': optimizer}  # fmt: skip
runs = [TrlVariant(name, build, **trl_options) if name.startswith('trl') else Variant(name) for name in names]

# a round: every variant by itself, on the same steps
rounds = min(rounds, n_steps) if len(runs) > 1 else 1
bar = progress((n_steps + rounds) * len(runs), ' steps', 'bench')
for number, timed in enumerate(np.array_split(steps[1:], rounds)):
    of_round = np.concatenate([steps[:1], timed])
    for run in reversed(runs) if number % 2 else runs:
        bar.set_description_str(run.name, refresh=False)
        run.load(examples, of_round)
        for rows in of_round:
            run.step(examples, rows)
            bar.update()
        # the step that warms up does not count
        for seconds in (run.times, run.passes):
            del seconds[-len(of_round) : 1 - len(of_round)]
        run.free()
        release()
bar.close()

# the table, without the pairs of the first step
lengths = examples.widths[batch_size:].astype(float)  # (pairs, 3): prompt and answers
table = [row_of(run, lengths) for run in runs]
of_step = lengths.sum(0) / n_steps / world  # tokens of prompts, chosen and rejected answers on a rank
tokens, predicted = int(of_step.sum()), int(of_step[1:].sum())
alone = limits.products_alone(shell, tokens, predicted, getattr(torch, dtype), device, clock)
limit = per_second(batch_size, alone)
if main_rank():
    show(table, lengths, limit)
    if out:
        found = {'config': dict(config), 'rows': table}
        found['limit_pairs_per_second'] = limit if math.isfinite(limit) else None
        with writing(out):
            Path(out).write_text(json.dumps(found, indent=1))
if __name__ == '__main__':
    fsdp.leave()
