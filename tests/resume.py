"""Runs, cuts short and resumes dpo.py, sft.py and reward.py, for test_resume.py:  torchrun --nproc_per_node=N tests/resume.py FOLDER

FOLDER/<case> is an uninterrupted run; FOLDER/<case>-resumed is what remains of it when it dies after 24 of 48 examples, and
is then run again. With a second folder, given by an earlier launch, its runs are resumed here, on another number of ranks."""

import contextlib
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fsdp  # noqa: E402

COMMON = ['--batch_size=12', '--n_examples=48', '--save_every=12', '--keep_last=9', '--eval_every=24', '--lr=1e-3',
          '--n_eval_examples=8', '--warmup_steps=3', '--lr_schedule=cosine', '--max_length=64', '--max_prompt_length=32']  # fmt: skip
CASES = {
    'dpo': ['dpo.py', '--loss=dpo', '--sample_during_eval', '--n_eval_model_samples=2', '--max_new_tokens=4'],
    'beta_dpo': ['dpo.py', '--loss=beta_dpo', '--a=0.01', '--optimizer=RMSprop'],
    'kto': ['dpo.py', '--loss=kto', '--max_tokens=200'],
    'sft': ['sft.py', '--optimizer=SGD'],
    'reward': ['reward.py', '--center_coef=0.1', '--max_tokens=200'],
}


def run(script, *flags):
    sys.argv = [script, *flags]
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        runpy.run_path(str(ROOT / script), run_name='script')


def main(folder, other=None):
    for name, (script, *flags) in CASES.items():
        whole, resumed = f'{folder}/{name}', f'{folder}/{name}-resumed'
        if other is None:
            run(script, *COMMON, *flags, f'--out_dir={whole}')
        if int(os.environ.get('RANK', 0)) == 0:
            shutil.copytree(f'{other or folder}/{name}', resumed)
            shutil.rmtree(f'{resumed}/model')
            config = Path(f'{resumed}/config.json')
            config.write_text(config.read_text().replace(f'{other or folder}/{name}"', f'{resumed}"'))
            for checkpoint in Path(f'{resumed}/checkpoints').iterdir():
                if checkpoint.name > f'{24:010d}':
                    shutil.rmtree(checkpoint)
        if dist.is_initialized():
            dist.barrier()
        run(script, *COMMON, *flags, f'--out_dir={resumed}')


main(*sys.argv[1:])
fsdp.leave()
