"""Runs dpo.py many times in one launch, for test_law.py:  torchrun --nproc_per_node=N tests/law.py FOLDER MAX_TOKENS...

Each case of CASES trains 3 steps on the same toy pairs; its metrics and model land in FOLDER/<case>-<max_tokens>."""

import contextlib
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fsdp  # noqa: E402
import losses  # noqa: E402

COMMON = ['--batch_size=12', '--n_examples=36', '--n_eval_examples=16', '--do_first_eval=false', '--optimizer=AdamW',
          '--lr=1e-3', '--warmup_steps=1', '--max_grad_norm=0.5', '--seed=3', '--max_length=64', '--max_prompt_length=32']  # fmt: skip
CASES = {name: [f'--loss={name}'] for name in losses.LOSSES} | {
    'reference_free': ['--loss=dpo', '--reference_free'],
    'rlaif': ['--loss=dpo', '--importance', '--sft_coef=0.1', '--noise_rate=0.3'],
    'dr_ipo': ['--loss=ipo', '--beta=0.04', '--beta_prime=0.5'],  # losses of 156: exp(-312) is 0 in float32
    'dr_slic': [
        '--loss=slic',
        '--beta_prime=0.1',
    ],  # the smallest loss may come in any microbatch, by hundreds of beta'
    'dr_beta_dpo': ['--loss=beta_dpo', '--beta_prime=0.5', '--a=0.01'],
    'erm': ['--loss=radpo1', '--risk=erm', '--mu=0.5'],
    'released': ['--loss=radpo2', '--risk=released'],
    'separate_prompts': ['--loss=dpo', '--share_prefix=false'],
    'padded': ['--loss=dpo', '--pack=false'],
    'kto_uneven': ['--loss=kto', '--frac_bad=0.3', '--w_good=2.0'],
    'sft': [],  # sft.py
}


def main():
    folder, *sizes = sys.argv[1:]
    for name, flags in CASES.items():
        for size in sizes:
            script = 'dpo.py' if flags else 'sft.py'
            sys.argv = [script, *COMMON, *flags, f'--max_tokens={size}', f'--out_dir={folder}/{name}-{size}']
            with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                runpy.run_path(str(ROOT / script), run_name='script')


main()
fsdp.leave()
