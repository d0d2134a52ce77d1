"""Runs ppo.py many times in one launch, for test_ppo.py:  torchrun --nproc_per_node=N tests/ppo_runs.py FOLDER

One process also makes FOLDER/sft (a quickly trained toy model) and FOLDER/reference (the same, shaken), and the short runs
of TOY. Every case of LAW trains one round, its gradients of every step kept in FOLDER/<N>/<case>-<max_tokens>.safetensors."""

import contextlib
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fsdp  # noqa: E402
from load import load_model, load_tokenizer  # noqa: E402

COMMON = ['--max_new_tokens=40', '--lr=5e-4', '--warmup_steps=0', '--max_prompt_length=32']
ONE, MANY = 4096, 110  # tokens of a microbatch: a whole minibatch, or a few answers
ROUND = ['--n_examples=24', '--batch_size=24', '--minibatch_size=12', '--ppo_epochs=2', '--n_eval_examples=4', '--seed=3',
         '--max_grad_norm=0.5', '--do_first_eval=false']  # fmt: skip
LAW = {
    'ppo': ['--reward_model=gold', '--missing_eos_penalty=0.5', '--max_new_tokens=12'],
    'own': ['--reward_model=gold', '--critic=own', '--group_size=2', '--vf_coef=1.0'],
    'grpo': ['--loss=grpo', '--group_size=4', '--reward_model=gold', '--kl_coef=0.3'],
    'per_answer': ['--loss=grpo', '--group_size=6', '--reward_model=gold', '--per_answer', '--pack=false'],
    'offline': ['--offline', '--kl_coef=0.3', '--clip=0.5', '--value_clip=None'],
}
TOY = {
    'ppo': ['--reward_model=gold', '--n_examples=768', '--ppo_epochs=2'],
    'grpo': ['--reward_model=gold', '--n_examples=768', '--ppo_epochs=2', '--loss=grpo', '--group_size=8'],
    'offline': ['--offline', '--n_examples=2560', '--ppo_epochs=1', '--clip=0.5'],
}
RESUME = ['--reward_model=gold', '--n_examples=72', '--batch_size=24', '--minibatch_size=12', '--save_every=24', '--keep_last=9',
          '--eval_every=48', '--n_eval_examples=6', '--lr_schedule=cosine', '--optimizer=AdamW']  # fmt: skip


def run(script, *flags):
    given = {flag.partition('=')[0]: flag for flag in flags}  # the last of two counts
    sys.argv = [script, *given.values()]
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        runpy.run_path(str(ROOT / script), run_name='script')


def recorded(file, *flags):
    """Run ppo.py, and keep the gradients of every step as (step).(parameter)."""
    update, kept = fsdp.update, {}

    def keep(model, optimizer, lr, scale, max_norm, **more):
        model.reshard()
        step = len({name.partition('.')[0] for name in kept})
        for name, p in model.named_parameters():
            if p.grad is not None:
                kept[f'{step}.{name}'] = (
                    p.grad.full_tensor() if hasattr(p.grad, 'full_tensor') else p.grad
                ).detach().clone() * scale
        return update(model, optimizer, lr, scale, max_norm, **more)

    fsdp.update = keep
    try:
        run('ppo.py', *COMMON, *flags)
    finally:
        fsdp.update = update
    if dist.get_rank() == 0:
        save_file(kept, file)


def prepare(folder):
    run('sft.py', '--n_examples=3072', '--batch_size=32', '--lr=1e-2', '--lr_schedule=cosine', '--warmup_steps=10',
        '--do_first_eval=false', '--n_eval_examples=8', f'--out_dir={folder}/sft-run')  # fmt: skip
    shutil.copytree(f'{folder}/sft-run/model', f'{folder}/sft')
    tokenizer = load_tokenizer(f'{folder}/sft')
    model = load_model(f'{folder}/sft', tokenizer=tokenizer)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * p.std() * torch.randn_like(p) if p.dim() > 1 else 0
    model.save_pretrained(f'{folder}/reference')
    tokenizer.save_pretrained(f'{folder}/reference')


def resume(folder, *flags):
    """An uninterrupted run, and the same run taken up again from its first checkpoint."""
    whole, resumed = f'{folder}/whole', f'{folder}/resumed'
    run('ppo.py', *COMMON, *RESUME, *flags, f'--out_dir={whole}')
    if dist.get_rank() == 0:
        shutil.copytree(whole, resumed)
        shutil.rmtree(f'{resumed}/model')
        config = Path(f'{resumed}/config.json')
        config.write_text(config.read_text().replace(f'{whole}"', f'{resumed}"'))
        for checkpoint in Path(f'{resumed}/checkpoints').iterdir():
            if checkpoint.name > f'{24:010d}':
                shutil.rmtree(checkpoint)
    dist.barrier()
    run('ppo.py', *COMMON, *RESUME, *flags, f'--out_dir={resumed}')


def main(folder):
    world = int(os.environ['WORLD_SIZE'])
    if world == 1:
        prepare(folder)
    start = [f'--model={folder}/sft']
    Path(f'{folder}/{world}').mkdir(exist_ok=True)
    for name, flags in LAW.items():
        for size in (ONE, MANY):
            out = f'{folder}/{world}/{name}-{size}'
            recorded(f'{out}.safetensors', *start, f'--ref_model={folder}/reference', *ROUND, *flags,
                     f'--max_tokens={size}', f'--out_dir={out}')  # fmt: skip
    if world == 1:
        for name, flags in TOY.items():
            run('ppo.py', *start, *COMMON, '--batch_size=256', '--minibatch_size=64', '--lr=1e-3', '--n_eval_examples=128',
                *flags, f'--out_dir={folder}/toy-{name}')  # fmt: skip
    else:
        resume(f'{folder}/resume', *start)


main(*sys.argv[1:])
fsdp.leave()
