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

import inspect
import json
import math
import resource
import statistics
import time
from functools import partial
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
    'pythia-1b': (2048, 16, 8), 'pythia-1.4b': (2048, 24, 16), 'pythia-2.8b': (2560, 32, 32),
}  # fmt: skip
KNOWN = ['padded', 'packed', 'shared', 'head', 'cached', 'compile', 'trl', 'trl_fastest', 'trl_cuda']
PADDED = 8  # pairs of a padded microbatch, of all ranks
OPTIONS = {
    'beta': 0.1,
    'label_smoothing': 0.1,
    'average': True,
    'alpha': 0.5,
    'gamma': 1.0,
    'lam': 0.1,
    'tau': 0.05,
    'delta': 1.0,
}
names = variants.split()
if not names or set(names) - set(KNOWN):
    raise UserError(f'variants must be some of {", ".join(KNOWN)}, not {variants!r}')
loss_fn = losses.LOSSES.get(loss)
columns_of = inspect.signature(loss_fn).parameters if loss_fn else {}
if not {'pi_w', 'ratio_w'} & set(columns_of) or loss in losses.STATISTICS:
    raise UserError(
        f'bench.py measures losses on pairs that need no statistic of the step, not {loss!r}: their step costs the same'
    )
if 'div_w' in columns_of and set(names) & {'padded', 'packed', 'shared', 'cached', 'compile'}:
    raise UserError(f'{loss} needs the whole distribution of the live reference: only --variants=head measures it')
if any(n.startswith('trl') for n in names) and (loss != 'dpo' or batch_size % min(PADDED, batch_size)):
    raise UserError(f'TRL is measured with --loss=dpo, and a batch_size that is a multiple of {PADDED}')

if out and (not Path(out).absolute().parent.is_dir() or Path(out).is_dir()):
    raise UserError(f'cannot write {out}: there is no such folder, or it is one')  # now, not after the measurement
rank, world, device = fsdp.setup()
if world > 1 and any(n.startswith('trl') for n in names):
    raise UserError('TRL is measured in one process')
if threads:
    torch.set_num_threads(threads)


def build(empty=False):
    """The model: random weights in a published shape, or a folder's."""
    if model not in (*SHAPES, 'llama-8b'):
        return load.load_model(model, empty=empty)
    models.register_attention()
    if model == 'llama-8b':
        shape = transformers.LlamaConfig(
            vocab_size=vocabulary or 128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0,
        )  # fmt: skip
    else:
        width, layers, heads = SHAPES[model]
        shape = transformers.GPTNeoXConfig(vocab_size=vocabulary or 50304, hidden_size=width, num_hidden_layers=layers,
                                           num_attention_heads=heads, intermediate_size=4 * width)  # fmt: skip
    with torch.device('meta' if empty else 'cpu'):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(shape).eval()


def pairs():
    """Enough pairs for the timed steps: real ones, or random tokens with log-normal lengths fitted to HH."""
    count = batch_size * (n_steps + 1)
    if data != 'synthetic':
        from text.tokenise import load_examples

        if not tokenizer and model in (*SHAPES, 'llama-8b'):
            raise UserError(f'{model} has no tokenizer for --data={data}: give the folder of one with --tokenizer')
        tok = load.load_tokenizer(tokenizer or model)
        examples_of = partial(load_examples, data, tokenizer=tok, task='pairs', max_length=512, max_prompt_length=256)
        examples = fsdp.first_of_host(lambda: examples_of('train'))
        order = np.random.default_rng(seed).permutation(len(examples))
        if vocabulary:
            examples.ids = examples.ids % vocabulary  # real lengths, the ids folded into fewer words
        return examples.select(np.resize(order, count))
    rng = np.random.default_rng(seed)
    limits, items = ((math.log(85), 0.8, 256), (math.log(27), 0.9, 200), (math.log(33), 0.9, 200)), []
    for _ in range(count):
        lengths = [int(np.clip(rng.lognormal(m, s), 2, top)) for m, s, top in limits]
        lengths = [prompt_tokens or lengths[0], *(answer_tokens or n for n in lengths[1:])]
        prompt, *answers = (rng.integers(0, min(vocabulary or 4096, 4096), n) for n in lengths)
        items.append((prompt, answers))
    return Examples.of(items)


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
        self.make_batches = partial(
            make_batches, rank=rank, world=world, share_prefix=self.share, pad=self.pad, device=device
        )
        self.times, self.passes, self.peak = [], [], 0.0

    def logps(self, m, batch):
        return m.response_logps(batch)[0] if self.head else m.full_head(batch)

    def batches(self, examples, index):
        """(microbatches, real tokens, allocated tokens); padded: PADDED pairs at a time, as gradient accumulation does."""
        if not self.pad:
            return self.make_batches(examples, index, max_tokens=max_tokens)
        parts = [
            self.make_batches(examples, index[i : i + PADDED], max_tokens=10**9) for i in range(0, len(index), PADDED)
        ]
        return [b for batches, *_ in parts for b in batches], sum(p[1] for p in parts), sum(p[2] for p in parts)

    def columns(self, batch, ref):
        """The columns of losses.py, (pairs,) each. ref: cached log-probs of the answers, or None."""
        answers = {'n': batch.n.float()}
        if 'div_w' in columns_of:
            with torch.no_grad():
                reference = self.ref.hidden_and_head(batch)
            answers['pi'], answers['div'], answers['ref'] = self.policy.response_logps(batch, models.kl, reference)
        else:
            if ref is None and 'ratio_w' in columns_of:
                with torch.no_grad():
                    ref = self.logps(self.ref, batch)
            answers |= {'pi': self.logps(self.policy, batch)} | ({} if ref is None else {'ref': ref})
        if 'ref' in answers:
            answers['ratio'] = answers['pi'] - answers['ref']
        return {f'{k}_{side}': v[i::2] for k, v in answers.items() for i, side in enumerate('wl')}

    @guard.memory_for('all variants are in memory together; lower batch_size or max_tokens, or name fewer --variants')
    def step(self, examples, index):
        """One optimizer step. The time of a cached reference's pass is kept apart: later epochs and runs do not pay it."""
        batches, *_ = self.batches(examples, index)
        reset_peak()
        sync()
        start = clock()
        with torch.no_grad():
            cached = [self.logps(self.ref, b) for b in batches] if self.cached else [None] * len(batches)
        sync()
        self.passes.append(clock() - start)
        start = clock()
        for batch, ref in zip(batches, cached, strict=True):
            columns = self.columns(batch, ref)
            values = {**OPTIONS, **columns}
            loss_of = loss_fn(**{name: values[name] for name in columns_of})
            (loss_of * batch.real()).sum().backward()
        fsdp.update(self.policy, self.optimizer, 1e-6, world / len(index), 10.0)
        sync()
        self.times.append(clock() - start)
        self.peak = max(self.peak, peak_memory())


def clock():
    """Seconds; of the processor on one CPU thread of one process, so that other work on the machine does not count."""
    alone = device.type == 'cpu' and torch.get_num_threads() == 1 and world == 1 and not wall
    return time.process_time() if alone else time.perf_counter()


def sync():
    if device.type == 'cuda':
        torch.cuda.synchronize()


def reset_peak():
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            with open('/proc/self/clear_refs', 'w') as file:
                file.write('5')  # Linux: forget the peak of the resident set
        except OSError:
            pass


def peak_memory():
    """GB: of the GPU, or of the process since reset_peak (it holds all variants' weights)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        with open('/proc/self/status') as file:
            return int(next(line for line in file if line.startswith('VmHWM')).split()[1]) / 1e6
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def flops(shape, lengths, shared, head_only, cached):
    """Model FLOPs of a pair: 2 per weight and token forward, twice that backward, once for a live reference."""
    weights = sum(
        p.numel() for n, p in shell.named_parameters() if p.dim() == 2 and 'embed' not in n and 'lm_head' not in n
    )
    weights -= sum(
        p.numel() for n, p in shell.named_parameters() if n.endswith('wte.weight') or n.endswith('wpe.weight')
    )
    p, w, r = lengths.T
    tokens = p + w + r if shared else 2 * p + w + r
    context = (p + w) ** 2 / 2 + (r * p + r**2 / 2 if shared else (p + r) ** 2 / 2)
    heads = w + r if head_only else tokens
    forward = 2 * weights * tokens + 4 * shape.num_hidden_layers * shape.hidden_size * context
    forward = forward + 2 * shape.hidden_size * shape.vocab_size * heads
    return float((forward * (3 + (not cached))).mean())


def products_alone(tokens, predicted):
    """Seconds for the step's matrix products and nothing else: every linear layer, forward, and both backward products."""
    total = 0.0
    kind = torch.bfloat16 if dtype == 'bfloat16' else torch.float32
    linears = [m.weight.shape for m in shell.modules() if isinstance(m, torch.nn.Linear)]
    for (rows, columns), count in {s: linears.count(s) for s in linears}.items():
        n = predicted if rows == shell.config.vocab_size else tokens
        x, w = torch.randn(n, columns, dtype=kind, device=device), torch.randn(rows, columns, dtype=kind, device=device)
        y = torch.randn(n, rows, dtype=kind, device=device)
        spent = []
        for _ in range(3):
            sync()
            start = clock()
            x @ w.T
            sync()
            forward = clock() - start
            y @ w
            y.T @ x
            sync()
            spent.append(forward + clock() - start)  # the forward twice: policy and reference
        total += count * min(spent)
    return total


examples = pairs()
shell = build(empty=True)
runs = []
for name in names:
    if name.startswith('trl'):
        from experiments.trl.variant import TrlVariant

        order = np.arange((n_steps + 1) * batch_size)
        step_pairs = min(PADDED, batch_size)
        runs.append(
            TrlVariant(name, build(), examples, order, batch_size, step_pairs, clock, reset_peak, peak_memory, threads)
        )
    else:
        runs.append(Variant(name))
bar = tqdm(total=(n_steps + 1) * len(runs), unit=' steps', disable=not main_rank(), leave=False)
for step in range(n_steps + 1):
    index = np.arange(step * batch_size, (step + 1) * batch_size)
    for run in runs[step % len(runs) :] + runs[: step % len(runs)]:
        bar.set_description(run.name)
        run.step(examples, index)
        bar.update()
bar.close()
lengths = (examples.spans[batch_size:, :, 1] - examples.spans[batch_size:, :, 0]).astype(float)
rows = []
for run in runs:
    seconds = statistics.median(run.times[1:])  # the first step warms up
    row = {'variant': run.name, 'pairs_per_second': per_second(batch_size, seconds),
           'tokens_per_second': per_second(lengths.sum() / n_steps, seconds),
           'ratio': statistics.median(per_second(a, b) for a, b in zip(runs[0].times[1:], run.times[1:], strict=True)),
           'peak_memory_gb': run.peak}  # fmt: skip
    if isinstance(run, Variant):
        cost = flops(shell.config, lengths, run.share, run.head, run.cached or 'ratio_w' not in columns_of)
        used = [
            run.batches(examples, np.arange(s * batch_size, (s + 1) * batch_size))[1:] for s in range(1, n_steps + 1)
        ]
        row |= {'padding_share': 1 - sum(t for t, _ in used) / sum(a for _, a in used), 'gflop_per_pair': cost / 1e9}
        if device.type == 'cuda':
            row['mfu'] = per_second(cost * batch_size, seconds) / world / peak_tflops / 1e12
        if run.cached:
            both = statistics.median(a + b for a, b in zip(run.times[1:], run.passes[1:], strict=True))
            row['pairs_per_second_with_cache_pass'] = per_second(batch_size, both)
    rows.append({k: v for k, v in row.items() if k == 'variant' or math.isfinite(v)})  # json knows no others
alone = products_alone(int(lengths.sum() / n_steps / world), int(lengths[:, 1:].sum() / n_steps / world))
limit = per_second(batch_size, alone)
if main_rank():
    where = torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    print(f'{model}, {data}, {loss}, batch {batch_size}, {world} ranks, {where}, {dtype}, torch {torch.__version__}')
    p, w, r = lengths.mean(0)
    print(f'mean tokens of a pair: prompt {p:.0f}, answers {w:.0f} and {r:.0f}')
    print('variant       pairs/s      x  tokens/s  padding  GFLOP/pair  peak GB     MFU')
    for r in rows:
        cells = [
            f'{r[k]:{f}}' if k in r else '-'
            for k, f in (('pairs_per_second', '.2f'), ('ratio', '.2f'), ('tokens_per_second', '.0f'), ('padding_share', '.1%'),
                         ('gflop_per_pair', '.1f'), ('peak_memory_gb', '.2f'), ('mfu', '.1%'))
        ]  # fmt: skip
        print('{:11s} {:>9s} {:>6s} {:>9s} {:>8s} {:>11s} {:>8s} {:>7s}'.format(r['variant'], *cells))
        if 'pairs_per_second_with_cache_pass' in r:
            print(
                f'{"+ its pass":11s} {r["pairs_per_second_with_cache_pass"]:9.2f}  the pass that makes the cache counted, as in a first epoch'
            )
    print(f'{"limit":11s} {limit:9.2f}  if the matrix products of policy and live reference were all there is')
    print(
        'x: median of the ratio to the first variant, step by step. Peak memory holds the weights of all variants of the run.'
    )
    if out:
        table = {'config': dict(config), 'rows': rows}
        table['limit_pairs_per_second'] = limit if math.isfinite(limit) else None
        try:
            Path(out).write_text(json.dumps(table, indent=1))
        except OSError as error:
            raise UserError(f'cannot write {out}: {error.strerror}') from None
if __name__ == '__main__':
    fsdp.leave()
