"""SFT, then every mode of ppo.py, on the toy world, for several seeds; prints the table of experiments/LOG.md.

    python -m experiments.papers.ppo_toy FOLDER [SEEDS]

ppo_reward: PPO against a reward model that reward.py has trained on the world's preferences, instead of against the gold reward."""

from pathlib import Path

from experiments import arguments, evaluations, mean_and_error, run, table, used

# a column, its number, and whether that of the evaluation before (0) or after (1); the KL before is 0
COLUMNS = [
    ('gold before', 'gold/eval', 0), ('after', 'gold/eval', 1),
    ('well-formed before', 'well_formed/eval', 0), ('after', 'well_formed/eval', 1),
    ('KL an answer', 'kl_eval/samples', 1), ('a token', 'kl_eval/samples_per_token', 1),
    ('tokens before', 'length/eval', 0), ('after', 'length/eval', 1),
]  # fmt: skip


def main(folder, seeds='0 1 2'):
    found = {}  # mode -> (evaluation before, after, CPU seconds) by seed
    for seed in seeds.split():
        here = Path(folder).resolve() / seed
        run('sft.py', 'config/sft_toy.py', f'--seed={seed}', f'--out_dir={here}/sft')
        common = [f'--seed={seed}', f'--model={here}/sft/model']
        run('reward.py', 'config/reward_toy.py', *common, f'--out_dir={here}/reward')
        for mode in ('ppo', 'grpo', 'ppo_offline', 'ppo_reward'):
            command = [f'config/{mode}_toy.py', *common]
            if mode == 'ppo_reward':
                command = ['config/ppo_toy.py', *common, f'--reward_model={here}/reward/model']
            began, _ = used()
            run('ppo.py', *command, f'--out_dir={here}/{mode}')
            before, after = evaluations(here / mode)
            found.setdefault(mode, []).append((before, after, used()[0] - began))
            print(mode, seed, f'gold {before["gold/eval"]:.3f} -> {after["gold/eval"]:.3f}', flush=True)

    # a row a mode: means over seeds
    rows = []
    for mode, runs in found.items():
        cells = [mean_and_error([numbers[i][name] for numbers in runs]) for _, name, i in COLUMNS]
        rows.append([mode, *cells, f'{max(seconds for *_, seconds in runs):.0f}'])
    print(table(['mode', *(words for words, *_ in COLUMNS), 'CPU s'], rows))


main(*arguments(__doc__))
