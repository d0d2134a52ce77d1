"""How fast hf/generate.py samples, against plain batched model.generate: same prompts, same number of rows, same lengths.

    OMP_NUM_THREADS=1 python -m experiments.speed.generate --model=PATH/smollm2 --layers=4
    OMP_NUM_THREADS=1 python -m experiments.speed.generate --model=PATH/smollm2 --layers=4 --lengths=equal --top_p=0.9

An answer ends where it is made to: lengths are drawn from those of AlpacaEval's model outputs (--lengths=real), or all are
max_new_tokens (equal). Plain generation takes batch after batch; ours has as many rows at a time, and fills those that are
free. Both are run in turn, after one round that does not count, each time with other noise; the medians are of process time
(all threads of this process, whatever else the machine does).
"""

import statistics
import time
from collections import Counter
from functools import partial

import numpy as np
import torch
import transformers

import fsdp
from configurator import configure
from hf import generate, sharded
from hf.attention import set_attention
from hf.load import load_model, load_tokenizer
from runtime import ranks
from text import sources
from text.tokenise import tokenise_prompts

model = 'toy'  # hub id, local folder, or 'toy'
layers: int | None = None  # only the first so many blocks of the model; None: all
data = 'hh'  # where the prompts come from; toy with the toy model
n_examples = 128  # prompts
batch_size = 32  # rows at a time
max_prompt_length = 128  # tokens
max_new_tokens = 128  # tokens; lengths of answers scale with it
lengths = 'real'  # of answers: real (as of AlpacaEval's outputs, cut at 512 tokens) or equal
temperature = 0.7  # of both
top_p = 1.0  # of both
n_steps = 3  # rounds
config = configure(globals())

# tokens, by SmolLM2's tokenizer, of 797 outputs in AlpacaEval's annotations: the smallest, nine deciles, the largest
DECILES = [2, 27, 63, 89, 116, 164, 236, 330, 419, 524, 1301]

_, _, device = ranks.setup()
tokenizer = load_tokenizer(model)
rows = sources.load_rows(data, 'test', undivided=True)[0]
prompts = [rows[i % len(rows)]['prompt'] for i in range(n_examples)]
prompts = sorted(tokenise_prompts(prompts, tokenizer, max_prompt_length, 'start', Counter()), key=len, reverse=True)
eos = tokenizer.eos_token_id

# the length of each answer, with the token that ends it
quantiles = np.random.default_rng(0).permutation(n_examples) / (n_examples - 1)
drawn = np.interp(quantiles, np.linspace(0, 1, 11), DECILES).clip(max=512) * max_new_tokens / 512
length = np.full(n_examples, max_new_tokens)
if lengths == 'real':
    length = np.maximum(1, drawn.round().astype(int))


def build(**how):
    net = load_model(model, tokenizer=tokenizer, **how)
    blocks = next(module for module in net.modules() if isinstance(module, torch.nn.ModuleList))
    del blocks[layers or len(blocks) :]
    net.config.num_hidden_layers = len(blocks)
    # one type a layer, where a model has several
    if getattr(net.config, 'layer_types', None):
        net.config.layer_types = net.config.layer_types[: len(blocks)]
    return net


class MadeToEnd(transformers.LogitsProcessor):
    """Lets rows end at their lengths, and nowhere else."""

    def __init__(self, ends, sampled):
        self.ends, self.sampled = torch.tensor(ends), torch.tensor(sampled)  # (rows,) tokens

    def __call__(self, ids, scores):
        self.sampled = self.sampled + 1
        own = scores[:, eos].clone()
        scores[:, eos] = -torch.inf
        scores[self.sampled == self.ends] = -torch.inf
        scores[:, eos] = torch.where(self.sampled == self.ends, own, -torch.inf)
        return scores


def run_plain(step):
    """The tokens of all answers."""
    torch.manual_seed(step)
    tokens = 0
    for start in range(0, n_examples, batch_size):
        batch, ends = prompts[start : start + batch_size], length[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[eos] * (width - len(p)) + p for p in batch], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
        processors = transformers.LogitsProcessorList([MadeToEnd(ends, [0] * len(batch))])
        with_noise = {'do_sample': True, 'temperature': temperature, 'top_p': top_p, 'top_k': 0}
        ends_at = {'max_new_tokens': max_new_tokens, 'eos_token_id': eos, 'pad_token_id': eos}
        out = plain.generate(ids, attention_mask=mask, logits_processor=processors, **with_noise, **ends_at)[:, width:]
        tokens += int((out != eos).sum()) + len(batch)
    return tokens


def run_ours(step):
    """The tokens of all answers."""
    seeds = [step * n_examples + i for i in range(n_examples)]
    how = {'max_new_tokens': max_new_tokens, 'temperature': temperature, 'top_p': top_p, 'rows': batch_size}
    return sum(map(len, generate.generate(ours, tokenizer, prompts, seeds, keep_end=True, **how)))


own_processors = generate._processors


def processors_that_end(seeds, sampled, *options):
    """As generate has them, after one that makes rows end."""
    ends = length[np.array(seeds) % n_examples]
    return transformers.LogitsProcessorList([MadeToEnd(ends, sampled), *own_processors(seeds, sampled, *options)])


generate._processors = processors_that_end
plain = build().to(device)
set_attention(plain, packed=False)
ours = fsdp.shard(partial(build), device, train=False)
seconds = {run_plain: [], run_ours: []}
with sharded.unsharded(ours), torch.no_grad():
    for step in range(n_steps + 1):
        for run, times in seconds.items():
            before = time.process_time()
            tokens = run(step)
            times.append(time.process_time() - before)
            print(f'round {step}  {run.__name__[4:]:5s}  {times[-1]:7.2f} s  {tokens} tokens', flush=True)
plain_time, our_time = (statistics.median(times[1:]) for times in seconds.values())
print(f'{n_examples} prompts, {batch_size} rows, at most {max_new_tokens} tokens, {lengths} lengths, top_p {top_p}: '
      f'plain {plain_time:.2f} s, ours {our_time:.2f} s, plain / ours {plain_time / our_time:.2f}')  # fmt: skip
ranks.leave()
