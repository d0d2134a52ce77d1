"""How fast sample.py generates, against plain batched model.generate: same rows, same batches, sampling on.

    OMP_NUM_THREADS=1 python -m experiments.speed.generate --model=PATH/pythia-14m
    OMP_NUM_THREADS=1 python -m experiments.speed.generate --model=PATH/pythia-14m --top_p=0.9

Both are run in turn, after one round that does not count, each time with other noise; the medians are of process time (all
threads of this process, whatever else the machine does). Ours is the model as sample.py has it: sharded, in a group of
one, gathered while it generates. With random weights no answer ends early, so that both generate the same number of tokens.
"""

import statistics
import time
from collections import Counter
from functools import partial

import torch

import fsdp
from configurator import configure
from hf import generate
from hf.load import load_model, load_tokenizer
from model import set_attention
from text import sources
from text.tokenise import tokenise_prompts

model = 'toy'  # hub id, local folder, or 'toy'
data = 'hh'  # where the prompts come from; toy with the toy model
n_examples = 64  # prompts
batch_size = 32  # rows of a batch
max_prompt_length = 128  # tokens
max_new_tokens = 32  # tokens
temperature = 0.7  # of both
top_p = 1.0  # of both
n_steps = 5  # rounds


config = configure(globals())
_, _, device = fsdp.setup()
tokenizer = load_tokenizer(model)
prompts = [row['prompt'] for row in sources.load_rows(data, 'test', undivided=True)[0][:n_examples]]
prompts = sorted(tokenise_prompts(prompts, tokenizer, max_prompt_length, 'start', Counter()), key=len, reverse=True)
batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
plain = load_model(model, tokenizer=tokenizer).to(device)
set_attention(plain, packed=False)
ours = fsdp.shard(partial(load_model, model, tokenizer=tokenizer), device, train=False)
eos = tokenizer.eos_token_id


def run_plain(batch, step):
    width = max(map(len, batch))
    ids = torch.tensor([[eos] * (width - len(p)) + p for p in batch], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
    torch.manual_seed(step)
    out = plain.generate(ids, attention_mask=mask, do_sample=True, temperature=temperature, top_p=top_p, top_k=0,
                         max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=eos)  # fmt: skip
    return out[:, width:].numel()


def run_ours(batch, step):
    seeds = [step * 1000 + i for i in range(len(batch))]
    settings = {'max_new_tokens': max_new_tokens, 'temperature': temperature, 'top_p': top_p}
    return sum(map(len, generate.generate(ours, tokenizer, batch, seeds, **settings)))


seconds = {run_plain: [], run_ours: []}
with fsdp.unsharded(ours), torch.no_grad():
    for step in range(n_steps + 1):
        for run, times in seconds.items():
            before = time.process_time()
            tokens = sum(run(batch, step) for batch in batches)
            times.append(time.process_time() - before)
            print(f'round {step}  {run.__name__[4:]:5s}  {times[-1]:7.2f} s  {tokens} tokens', flush=True)
plain_time, our_time = (statistics.median(times[1:]) for times in seconds.values())
print(f'{len(prompts)} rows, batches of {batch_size}, {max_new_tokens} tokens, top_p {top_p}: plain {plain_time:.2f} s, '
      f'ours {our_time:.2f} s, ratio {our_time / plain_time:.2f}')  # fmt: skip
fsdp.leave()
