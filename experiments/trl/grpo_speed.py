"""GRPO on the toy world, ours beside TRL's GRPOTrainer: CPU seconds of a round, with the settings of config/grpo_toy.py.

    python -m experiments.trl.grpo_speed --model=out/sft_toy/model     # TRL 1.16 in the environment; ten minutes

Each side runs for few and for many rounds, in turns and in processes of their own; what many cost more, by round, has no start-up in it.
A round: 32 prompts, 8 answers each, two passes in minibatches of 64. TRL without activation checkpointing, which is its default."""

import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile

from configurator import configure
from experiments import ROOT

model = 'out/sft_toy/model'  # the model of sft_toy.py
few = 2  # rounds
many = 12  # rounds
repeats = 3  # of all


def train_with_trl(folder, rounds):
    """As many rounds of TRL's trainer, against the gold reward."""
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    from text import toy

    rng, places = random.Random(0), sorted(toy.PLACES)
    prompts = [{'prompt': f'Review of the {rng.choice(places)}:'} for _ in range(32 * rounds)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side='left')
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def gold(prompts, completions, **_):
        return list(map(toy.gold, prompts, completions))

    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=64, steps_per_generation=4, num_generations=8, num_iterations=2,
        max_completion_length=48, temperature=1.0, top_p=1.0, top_k=0, beta=0.1, epsilon=0.2, loss_type='bnpo', learning_rate=5e-4,
        lr_scheduler_type='linear', warmup_steps=0, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to='none',
        save_strategy='no', disable_tqdm=True, num_train_epochs=1, seed=0,
    )  # fmt: skip
    data = datasets.Dataset.from_list(prompts)
    GRPOTrainer(folder, gold, args=settings, train_dataset=data, processing_class=tokenizer).train()


def cpu_seconds(side, rounds):
    """What a run of one side has used."""
    command = ['-m', 'experiments.trl.grpo_speed', 'trl', model, str(rounds)]
    if side == 'ours':
        command = [
            'ppo.py',
            'config/grpo_toy.py',
            f'--model={model}',
            f'--n_examples={256 * rounds}',
            '--n_eval_examples=0',
        ]
        command += ['--do_first_eval=false', f'--out_dir={tempfile.mkdtemp()}']
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=os.environ | {'OMP_NUM_THREADS': '1'}, **quiet)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    if sys.argv[1:2] == ['trl']:  # a process of cpu_seconds
        return train_with_trl(sys.argv[2], int(sys.argv[3]))
    configure(globals())
    ratios = []
    for _ in range(repeats):
        spent = {(side, rounds): cpu_seconds(side, rounds) for rounds in (few, many) for side in ('trl', 'ours')}
        trl, ours = ((spent[side, many] - spent[side, few]) / (many - few) for side in ('trl', 'ours'))
        ratios.append(trl / ours)
        print(f'CPU seconds of a round: TRL {trl:.2f}, nanopref {ours:.2f}: x {ratios[-1]:.2f}', flush=True)
    print(f'x {statistics.median(ratios):.2f}, the median')


if __name__ == '__main__':
    main()
