"""Runs reward.py many times in one launch, for test_reward.py:  torchrun --nproc_per_node=N tests/reward_law.py FOLDER DATA SIZES

Each case of CASES trains 2 steps on the pairs of the file DATA, once for each number of tokens in a microbatch. The gradient
of every step lands in FOLDER/<case>-<size>.pt, whole and as it is given to the optimizer, before clipping."""

import contextlib
import os
import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fsdp  # noqa: E402

COMMON = ['--batch_size=12', '--n_examples=24', '--n_eval_examples=16', '--do_first_eval=false', '--lr=1e-3', '--warmup_steps=1',
          '--max_grad_norm=0.5', '--seed=3', '--max_length=64', '--max_prompt_length=32']  # fmt: skip
CASES = {
    'everything': ['--center_coef=0.3', '--label_smoothing=0.1', '--noise_rate=0.3'],
    'separate_prompts': ['--center_coef=0.3', '--share_prefix=false'],
    'padded': ['--center_coef=0.3', '--pack=false'],
}
update, gradients = fsdp.update, []


def whole(x):
    return x.full_tensor() if hasattr(x, 'full_tensor') else x  # one process has no sharded tensors


def record(model, optimizer, lr, scale, max_norm, **more):
    """fsdp.update, after a copy of the gradients."""
    model.reshard()
    gradients.append({name: scale * whole(p.grad) for name, p in model.named_parameters()})
    return update(model, optimizer, lr, scale, max_norm, **more)


def main(folder, data, *sizes):
    fsdp.update = record
    for name, flags in CASES.items():
        for size in sizes:
            out = f'{folder}/{name}-{size}'
            sys.argv = ['reward.py', *COMMON, *flags, f'--data={data}', f'--max_tokens={size}', f'--out_dir={out}']
            with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                runpy.run_path(str(ROOT / 'reward.py'), run_name='script')
            if int(os.environ.get('RANK', 0)) == 0:
                torch.save(gradients, f'{out}.pt')
            gradients.clear()


main(*sys.argv[1:])
fsdp.leave()
