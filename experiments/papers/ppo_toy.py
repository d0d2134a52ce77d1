"""SFT, then every mode of ppo.py, on the toy world, for several seeds; prints the table of experiments/LOG.md.

    python -m experiments.papers.ppo_toy FOLDER [SEEDS]

ppo_reward: PPO against a reward model that reward.py has trained on the world's preferences, instead of against the gold reward."""

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from experiments import ROOT


def launch(*command):
    subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def cpu_seconds():
    """Of all launched processes so far: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(folder, seeds='0 1 2'):
    rows, folder = {}, Path(folder).resolve()
    for seed in seeds.split():
        here, common = folder / seed, [f'--seed={seed}']
        launch('sft.py', 'config/sft_toy.py', *common, f'--out_dir={here}/sft')
        common += [f'--model={here}/sft/model']
        launch('reward.py', 'config/reward_toy.py', *common, f'--out_dir={here}/reward')
        modes = {'ppo': [], 'grpo': [], 'ppo_offline': [], 'ppo_reward': [f'--reward_model={here}/reward/model']}
        for mode, flags in modes.items():
            config = 'config/ppo_toy.py' if mode == 'ppo_reward' else f'config/{mode}_toy.py'
            began = cpu_seconds()
            launch('ppo.py', config, *common, *flags, f'--out_dir={here}/{mode}')
            took = cpu_seconds() - began
            found = [json.loads(line) for line in (here / mode / 'metrics.jsonl').read_text().splitlines()]
            before, after = (row for row in found if row['split'] == 'eval')
            rows.setdefault(mode, []).append((before, after, took))
            print(mode, seed, f'{before["gold/eval"]:.3f} -> {after["gold/eval"]:.3f}, {took:.0f} CPU s', flush=True)
    print(
        '| mode | gold before | after | well-formed before | after | KL an answer | a token | tokens before | after | CPU s |'
    )
    print('|---|---|---|---|---|---|---|---|---|---|')
    for mode, found in rows.items():
        cells = []
        for name in ('gold/eval', 'well_formed/eval', 'kl_eval/samples', 'kl_eval/samples_per_token', 'length/eval'):
            for i in (0, 1):
                values = [row[i][name] for row in found]
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float('nan')
                cells += [] if name.startswith('kl') and i == 0 else [f'{statistics.mean(values):.3f} ({error:.3f})']
        print('|', ' | '.join([mode, *cells, f'{max(row[2] for row in found):.0f}']), '|', flush=True)


main(*sys.argv[1:])
