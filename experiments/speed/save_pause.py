"""How long a checkpoint holds up training: written in the background (what the scripts do) against waiting until it is on disk.

python -m experiments.speed.save_pause --model=models/pythia-160m"""

import shutil
import statistics
import tempfile
import time
from functools import partial

import torch

import fsdp
from configurator import configure, main_rank
from hf import load
from runtime import checkpoint, ranks

model = 'toy'  # hub id, local folder, or 'toy'
n_steps = 3  # how many checkpoints
folder: str | None = None  # on which disk; None: the temporary folder's
config = configure(globals())

rank, world, device = ranks.setup()
policy = fsdp.shard(partial(load.load_model, model), device)
optimizer = fsdp.make_optimizer('AdamW', policy, 1e-4, 0.0)
for p in policy.parameters():
    p.grad = torch.zeros_like(p)
optimizer.step()
optimizer.zero_grad()
out = ranks.gather_objects(tempfile.mkdtemp(dir=folder))[0]
pauses, totals = [], []
for i in range(n_steps):
    ranks.gather_objects(None)
    began = time.perf_counter()
    checkpoint.save(out, i, policy, optimizer, {}, 1)
    pauses.append(time.perf_counter() - began)
    checkpoint.wait()
    totals.append(time.perf_counter() - began)
began = time.perf_counter()
newest = checkpoint.latest(out)
checked = time.perf_counter() - began
checkpoint.load(newest, policy, optimizer)
loaded = time.perf_counter() - began - checked
if main_rank():
    size = sum(f.stat().st_size for f in newest.iterdir()) / 1e9
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    print(f'{millions:.0f} M parameters, {size:.2f} GB on disk, {world} processes, {n_steps} saves')
    print(f'pause, in the background  {statistics.median(pauses):6.2f} s (largest {max(pauses):.2f})')
    print(f'pause, waiting            {statistics.median(totals):6.2f} s (largest {max(totals):.2f})')
    print(f'on resume: check the sums {checked:6.2f} s, load {loaded:.2f} s')
    shutil.rmtree(out)
ranks.leave()
