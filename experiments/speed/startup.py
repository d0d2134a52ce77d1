"""Where the time from command to first step goes: CPU and wall-clock seconds of each part of a start of dpo.py on the toy world.

python -m experiments.speed.startup"""

import time
from functools import partial

last = time.process_time(), time.perf_counter()


def lap(name):
    global last
    now = time.process_time(), time.perf_counter()
    print(f'{name:34s} {now[0] - last[0]:6.2f} CPU s {now[1] - last[1]:6.2f} s', flush=True)
    last = time.process_time(), time.perf_counter()


import numpy as np
import torch

lap('import torch')
import torch.distributed.tensor  # noqa: F401

lap('import DTensor (transformers does)')
import transformers  # noqa: F401

lap('import transformers')
import fsdp
import model  # noqa: F401
from hf import load

lap('import model, fsdp, load')
from data import make_batches
from hf import generate, probe, reference  # noqa: F401
from runtime import checkpoint, ranks  # noqa: F401
from text.tokenise import load_examples

lap('import the rest')
rank, world, device = ranks.setup()
lap('process group')
tokenizer = load.load_tokenizer('toy')
lap('tokenizer')
examples = load_examples('toy', 'train', tokenizer, 'pairs', max_length=512, max_prompt_length=256)
lap('examples (from the cache, if there)')
build = partial(load.load_model, 'toy', tokenizer=tokenizer)
policy = fsdp.shard(build, device)
lap('load and shard the policy')
reference_model = fsdp.shard(build, device, train=False)
lap('load and shard the reference')
optimizer = fsdp.make_optimizer('AdamW', policy, 1e-4, 0.0)
probe.can_pack(policy, examples, device, print)
lap('check that the model can be packed')
batches, *_ = make_batches(examples, np.arange(64), rank, world, 16384)
policy.response_logps(batches[0]).sum().backward()
fsdp.update(policy, optimizer, 1e-4, 1.0, 1.0)
lap('first step')
ranks.leave()
