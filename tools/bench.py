"""Measure a DPO step: pairs/s, tokens/s, padding, memory and model FLOPs, for variants that add one idea after the other.

    python -m tools.bench --model=pythia-70m --data=synthetic --batch_size=8
    python -m tools.bench --model=models/pythia-70m --data=hh:data/hh_harmless.jsonl.gz --out=bench.json
    python -m tools.bench --model=pythia-14m --variants='padded trl trl_fastest trl_cuda head cached'   # beside TRL 1.16, if installed
    torchrun --nproc_per_node=2 -m tools.bench --model=pythia-14m

All variants take turns in one process, step by step, on the same pairs; the figures are medians. `padded` is the layout of the
original DPO code: both answers with their prompts, padded, logits at every position. Loss and gradient are the same in all.
trl, trl_fastest and trl_cuda are TRL's own trainer (experiments/trl/variant.py). Padded batches go through in microbatches of 8 pairs.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import collections
import contextlib
import inspect
import json
import math
import re
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import fsdp
import losses
import model as models
from configurator import UserError, configure, main_rank
from data import make_batches
from hf import load
from runtime.files import writing
from runtime.log import per_second
from text.examples import Examples

model = 'pythia-70m'  # a published shape with random weights (pythia-14m to pythia-2.8b, llama-8b), or a model folder
tokenizer: str | None = None  # a tokenizer folder, for real data with a published shape
vocabulary: int | None = None  # another vocabulary size for a published shape: ids are taken modulo it
data = 'synthetic'  # synthetic (lengths like HH), or what dpo.py reads
loss = 'dpo'  # a loss on pairs without a statistic of the step; tdpo and radpo only with --variants=head
batch_size = 8  # pairs of a step, all ranks together
max_tokens = 16384  # tokens of a microbatch
prompt_tokens: int | None = None  # synthetic: tokens of every prompt; None: log-normal lengths like those of HH
answer_tokens: int | None = None  # synthetic: tokens of every answer; None: as for prompts
n_steps = 5  # timed steps of each variant
variants = 'padded packed shared head cached'  # in order: each adds its idea to the one before; also: compile, trl, trl_fastest, trl_cuda
optimizer = 'AdamW'  # AdamW, RMSprop or SGD
dtype = 'float32'  # float32 or bfloat16
threads: int | None = None  # CPU threads; None: torch decides
wall = False  # wall-clock time on one CPU thread, too, not CPU time; several processes have it always
peak_tflops = 790.0  # what the GPU gives in bfloat16, for the utilisation
seed = 0  # of weights and data
out: str | None = None  # write the table as json, too
config = configure(globals())

SHAPES = {  # width, layers, heads: the published Pythia suite
    'pythia-14m': (128, 6, 4), 'pythia-70m': (512, 6, 8), 'pythia-160m': (768, 12, 12), 'pythia-410m': (1024, 24, 16),
    'pythia-1b': (2048, 16, 8), 'pythia-1.4b': (2048, 24, 16), 'pythia-2.8b': (2560, 32, 32), 'llama-8b': (4096, 32, 32),
}  # fmt: skip
KNOWN = ['padded', 'packed', 'shared', 'head', 'cached', 'compile', 'trl', 'trl_fastest', 'trl_cuda']
PADDED = 8  # pairs of a padded microbatch, of all ranks
# of the losses; which value it is costs nothing
OPTIONS = {'beta': 0.1, 'label_smoothing': 0.1, 'average': True, 'alpha': 0.5, 'gamma': 1.0, 'lam': 0.1, 'tau': 0.05}
OPTIONS['delta'] = 1.0
LENGTHS = (
    (math.log(85), 0.8, 256),
    (math.log(27), 0.9, 200),
    (math.log(33), 0.9, 200),
)  # log-normal, as HH's, and the most

names = variants.split()
beside_trl = any(name.startswith('trl') for name in names)
loss_fn = losses.LOSSES.get(loss)
columns_of = inspect.signature(loss_fn).parameters if loss_fn else {}
if not names or set(names) - set(KNOWN):
    raise UserError(f'variants must be some of {", ".join(KNOWN)}, not {variants!r}')
if not {'pi_w', 'ratio_w'} & set(columns_of) or loss in losses.STATISTICS:
    raise UserError(
        f'losses on pairs without a statistic of the step are measured, not {loss!r}: its step costs the same'
    )
if 'div_w' in columns_of and set(names) & {'padded', 'packed', 'shared', 'cached', 'compile'}:
    raise UserError(f'{loss} needs the whole distribution of the live reference: only --variants=head measures it')
if beside_trl and (loss != 'dpo' or batch_size % min(PADDED, batch_size)):
    raise UserError(f'TRL is measured with --loss=dpo, and a batch_size that is a multiple of {PADDED}')
# now, not after the measurement
if out and (not Path(out).absolute().parent.is_dir() or Path(out).is_dir()):
    raise UserError(f'cannot write {out}: there is no such folder, or it is one')
rank, world, device = fsdp.setup()
on_gpu = device.type == 'cuda'
if world > 1 and beside_trl:
    raise UserError('TRL is measured in one process')
if threads:
    torch.set_num_threads(threads)

# ---- a model, and pairs ----


def build(empty=False):
    """The model: random weights in a published shape, or a folder's."""
    if model not in SHAPES:
        return load.load_model(model, empty=empty)
    models.register_attention()
    width, layers, heads = SHAPES[model]
    sizes = {'hidden_size': width, 'num_hidden_layers': layers, 'num_attention_heads': heads}
    if model == 'llama-8b':
        sizes |= {'intermediate_size': 14336, 'num_key_value_heads': 8, 'rope_theta': 500000.0}
        shape = transformers.LlamaConfig(vocab_size=vocabulary or 128256, **sizes)
    else:
        shape = transformers.GPTNeoXConfig(vocab_size=vocabulary or 50304, intermediate_size=4 * width, **sizes)
    with torch.device('meta' if empty else 'cpu'):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(shape).eval()


def real_pairs(count):
    """As many pairs of the data, in random order; with vocabulary real lengths, the ids folded into fewer words."""
    from text.tokenise import load_examples

    if not tokenizer and model in SHAPES:
        raise UserError(f'{model} has no tokenizer for --data={data}: give the folder of one with --tokenizer')
    options = {'tokenizer': load.load_tokenizer(tokenizer or model), 'max_length': 512, 'max_prompt_length': 256}
    found = fsdp.first_of_host(lambda: load_examples(data, 'train', task='pairs', **options))
    if vocabulary:
        found.ids = found.ids % vocabulary
    order = np.random.default_rng(seed).permutation(len(found))
    return found.select(np.resize(order, count))


def synthetic_pairs(count):
    """As many pairs of random tokens."""
    rng, items = np.random.default_rng(seed), []
    words = min(vocabulary or 4096, 4096)
    for _ in range(count):
        lengths = [int(np.clip(rng.lognormal(mean, sigma), 2, most)) for mean, sigma, most in LENGTHS]
        lengths = [prompt_tokens or lengths[0], *(answer_tokens or n for n in lengths[1:])]
        prompt, *answers = (rng.integers(0, words, n) for n in lengths)
        items.append((prompt, answers))
    return Examples.of(items)


# ---- the variants ----


def full_head(m, batch):
    """Log-probs as the original code computes them: logits at every position, then the answers' tokens."""
    hidden, head = models.hidden_states(m, batch)
    logits = F.linear(hidden.flatten(0, 1), *head).float().log_softmax(-1)
    return batch.sum(logits[batch.predict_at].gather(1, batch.target[:, None])[:, 0])


class Variant:
    """A policy, its reference and optimizer, and one way of computing a step."""

    def __init__(self, name):
        self.name, level = name, KNOWN.index(name)
        self.pad, self.share, self.head, self.cached = level < 1, level >= 2, level >= 3, level >= 4
        self.policy = fsdp.shard(build, device, dtype=dtype, compile=level >= 5)
        self.ref = fsdp.shard(build, device, dtype=dtype, train=False)
        for m in (self.policy, self.ref):
            fsdp.add_method(m, full_head)
            models.set_attention(m, not self.pad)
        self.optimizer = fsdp.make_optimizer(optimizer, self.policy, 1e-6, 0.0)
        self.times, self.passes, self.peak = [], [], 0.0

    def logps(self, m, batch):
        return m.response_logps(batch)[0] if self.head else m.full_head(batch)

    def batches(self, examples, rows):
        """(microbatches, real tokens, allocated tokens); padded: PADDED pairs at a time, as gradient accumulation does."""
        size, most = (PADDED, 10**9) if self.pad else (len(rows), max_tokens)
        found, tokens = [], np.zeros(2)
        for i in range(0, len(rows), size):
            options = {'share_prefix': self.share, 'pad': self.pad, 'device': device}
            batches, *counts = make_batches(examples, rows[i : i + size], rank, world, most, **options)
            found += batches
            tokens += counts
        return found, *tokens

    def columns(self, batch, ref):
        """The columns of losses.py, (pairs,) each. ref: cached log-probs of the answers, or None."""
        answers = {'n': batch.n.float()}
        if 'div_w' in columns_of:
            with torch.no_grad():
                reference = self.ref.hidden_and_head(batch)
            answers['pi'], answers['div'], ref = self.policy.response_logps(batch, models.kl, reference)
        else:
            if ref is None and 'ratio_w' in columns_of:
                with torch.no_grad():
                    ref = self.logps(self.ref, batch)
            answers['pi'] = self.logps(self.policy, batch)
        if ref is not None:
            answers |= {'ref': ref, 'ratio': answers['pi'] - ref}
        return {f'{name}_{side}': x[i::2] for name, x in answers.items() for i, side in enumerate('wl')}

    @guard.memory_for('all variants are in memory together; lower batch_size or max_tokens, or name fewer --variants')
    def step(self, examples, rows):
        """One optimizer step. The time of a cached reference's pass is kept apart: later epochs and runs do not pay it."""
        batches, *_ = self.batches(examples, rows)
        reset_peak()
        start = clock()
        with torch.no_grad():
            cached = [self.logps(self.ref, batch) if self.cached else None for batch in batches]
        self.passes.append(clock() - start)
        start = clock()
        for batch, ref in zip(batches, cached, strict=True):
            values = {**OPTIONS, **self.columns(batch, ref)}
            loss_of = loss_fn(**{name: values[name] for name in columns_of})
            (loss_of * batch.real()).sum().backward()
        fsdp.update(self.policy, self.optimizer, 1e-6, world / len(rows), 10.0)
        self.times.append(clock() - start)
        self.peak = max(self.peak, peak_memory())


# ---- what is measured ----


def clock():
    """Seconds, once the GPU has done its work; of the processor on one CPU thread of one process, so that other work on the
    machine does not count."""
    if on_gpu:
        torch.cuda.synchronize()
    alone = not on_gpu and torch.get_num_threads() == 1 and world == 1 and not wall
    return time.process_time() if alone else time.perf_counter()


def reset_peak():
    """Forget the peak of memory: of the GPU, or where Linux can the process's resident set."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path('/proc/self/clear_refs').write_text('5')


def peak_memory():
    """GB: of the GPU, or of the process since reset_peak (it holds all variants' weights)."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 1e9
    with contextlib.suppress(OSError, StopIteration):
        status = Path('/proc/self/status').read_text().splitlines()
        return int(next(line for line in status if line.startswith('VmHWM')).split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def flops(run, lengths):
    """Model FLOPs of a pair: 2 per weight and token forward, twice that backward, once for a live reference."""
    named = [(n, p) for n, p in shell.named_parameters() if p.dim() == 2]
    weights = sum(p.numel() for n, p in named if not re.search(r'embed|lm_head|(wte|wpe)\.weight$', n))
    shape, (p, w, r) = shell.config, lengths.T
    # the second answer's prompt is computed once more where it is not shared
    tokens = p + w + r + (0 if run.share else p)
    context = (p + w) ** 2 / 2 + r * p + r**2 / 2 + (0 if run.share else p**2 / 2)
    forward = 2 * weights * tokens + 4 * shape.num_hidden_layers * shape.hidden_size * context
    forward = forward + 2 * shape.hidden_size * shape.vocab_size * (w + r if run.head else tokens)
    live = not run.cached and 'ratio_w' in columns_of
    return float((forward * (3 + live)).mean())


def products_alone(tokens, predicted):
    """Seconds for the step's matrix products and nothing else: every linear layer, forward, and both backward products."""
    total = 0.0
    how = {'dtype': getattr(torch, dtype), 'device': device}
    linears = collections.Counter(m.weight.shape for m in shell.modules() if isinstance(m, torch.nn.Linear))
    for (rows, columns), count in linears.items():
        n = predicted if rows == shell.config.vocab_size else tokens
        x, w, y = (torch.randn(shape, **how) for shape in ((n, columns), (rows, columns), (n, rows)))
        spent = []
        for _ in range(3):
            start = clock()
            x @ w.T
            middle = clock()
            y @ w
            y.T @ x
            spent.append(clock() - start + middle - start)  # the forward twice: policy and reference
        total += count * min(spent)
    return total


def row_of(run, lengths):
    """What a variant's steps give, without the first, which warms up."""
    seconds = statistics.median(run.times[1:])
    ratios = [per_second(a, b) for a, b in zip(runs[0].times[1:], run.times[1:], strict=True)]
    row = {'pairs_per_second': per_second(batch_size, seconds), 'ratio': statistics.median(ratios)}
    row |= {'tokens_per_second': per_second(lengths.sum() / n_steps, seconds), 'peak_memory_gb': run.peak}
    if isinstance(run, Variant):
        cost = flops(run, lengths)
        used = np.array([run.batches(examples, rows)[1:] for rows in steps[1:]]).sum(0)  # real tokens, with padding
        row |= {'padding_share': 1 - used[0] / used[1], 'gflop_per_pair': cost / 1e9}
        if on_gpu:
            row['mfu'] = per_second(cost * batch_size, seconds) / world / peak_tflops / 1e12
        if run.cached:
            both = statistics.median(a + b for a, b in zip(run.times[1:], run.passes[1:], strict=True))
            row['pairs_per_second_with_cache_pass'] = per_second(batch_size, both)
    return {'variant': run.name} | {k: float(v) for k, v in row.items() if math.isfinite(v)}  # json knows no others


def show(rows, lengths, limit):
    """Print the table."""
    where = torch.cuda.get_device_name() if on_gpu else f'CPU, {torch.get_num_threads()} threads'
    print(f'{model}, {data}, {loss}, batch {batch_size}, {world} ranks, {where}, {dtype}, torch {torch.__version__}')
    print('mean tokens of a pair: prompt {:.0f}, answers {:.0f} and {:.0f}'.format(*lengths.mean(0)))
    print('variant       pairs/s      x  tokens/s  padding  GFLOP/pair  peak GB     MFU')
    columns = {'pairs_per_second': '.2f', 'ratio': '.2f', 'tokens_per_second': '.0f', 'padding_share': '.1%'}
    columns |= {'gflop_per_pair': '.1f', 'peak_memory_gb': '.2f', 'mfu': '.1%'}
    for row in rows:
        cells = [f'{row[k]:{form}}' if k in row else '-' for k, form in columns.items()]
        print('{:11s} {:>9s} {:>6s} {:>9s} {:>8s} {:>11s} {:>8s} {:>7s}'.format(row['variant'], *cells))
        both = row.get('pairs_per_second_with_cache_pass')
        if both:
            print(f'{"+ its pass":11s} {both:9.2f}  the pass that makes the cache counted, as in a first epoch')
    print(f'{"limit":11s} {limit:9.2f}  if the matrix products of policy and live reference were all there is')
    print(
        'x: median of the ratio to the first variant, step by step. Peak memory holds the weights of all variants of the run.'
    )


# ---- the measurement ----

steps = np.arange((n_steps + 1) * batch_size).reshape(-1, batch_size)
examples = synthetic_pairs(steps.size) if data == 'synthetic' else real_pairs(steps.size)
shell = build(empty=True)
runs = []
for name in names:
    if name.startswith('trl'):
        from experiments.trl.variant import TrlVariant

        how = batch_size, min(PADDED, batch_size), clock, reset_peak, peak_memory, threads
        runs.append(TrlVariant(name, build(), examples, steps.flatten(), *how))
    else:
        runs.append(Variant(name))

# another variant begins each step
bar = tqdm(total=steps.shape[0] * len(runs), unit=' steps', disable=not main_rank(), leave=False)
for step, index in enumerate(steps):
    first = step % len(runs)
    for run in runs[first:] + runs[:first]:
        bar.set_description(run.name)
        run.step(examples, index)
        bar.update()
bar.close()

spans = examples.spans[batch_size:]
lengths = (spans[:, :, 1] - spans[:, :, 0]).astype(float)  # (pairs, prompt and answers)
rows = [row_of(run, lengths) for run in runs]
a_step = lengths.sum(0) / n_steps / world
limit = per_second(batch_size, products_alone(int(a_step.sum()), int(a_step[1:].sum())))
if main_rank():
    show(rows, lengths, limit)
    if out:
        table = {'config': dict(config), 'rows': rows}
        table['limit_pairs_per_second'] = limit if math.isfinite(limit) else None
        with writing(out):
            Path(out).write_text(json.dumps(table, indent=1))
if __name__ == '__main__':
    fsdp.leave()
