"""Cost curves: pairs/s of `padded`, `head` and `cached` against batch size, prompt share, vocabulary, length and processes.

    python -m experiments.speed.curves [--model=pythia-14m] [--n_steps=3]

Synthetic pairs, one CPU thread a process; every line is one interleaved run of tools.bench. CPU seconds, but for the lines on
processes, where waiting for one another counts: these need a quiet machine. About ten minutes."""

import re

from configurator import configure
from experiments import bench_rows, table

model = 'pythia-14m'  # a shape of tools.bench
n_steps = 3  # timed steps of each variant

config = configure(globals())
VARIANTS = ['padded', 'head', 'cached']
# the flags of each point; --ranks=N is the number of processes, and for launching alone
CURVES = {
    'batch size': ['--batch_size=2', '--batch_size=8', '--batch_size=32'],
    'prompt share (of 320 tokens)': [
        '--prompt_tokens=304 --answer_tokens=8', '--prompt_tokens=240 --answer_tokens=40',
        '--prompt_tokens=160 --answer_tokens=80', '--prompt_tokens=80 --answer_tokens=120',
    ],
    'vocabulary': ['--vocabulary=4096', '--vocabulary=16384', '--vocabulary=50304'],
    'length of prompt = of answer': [f'--prompt_tokens={n} --answer_tokens={n} --batch_size=4' for n in (32, 128, 256, 512)],
    'processes': ['--wall --ranks=1', '--ranks=2'],
}  # fmt: skip
head = table(['', *VARIANTS, 'padding of padded'], []).rstrip()
print(f'{model}, synthetic pairs; pairs/s (ratio to padded)\n{head}')
for title, points in CURVES.items():
    for point in points:
        flags, _, ranks = point.partition('--ranks=')
        common = f'--model={model}', '--threads=1', f'--n_steps={n_steps}', f'--variants={" ".join(VARIANTS)}'
        rows = bench_rows(*flags.split(), *common, ranks=ranks)
        cells = [f'{row["pairs_per_second"]:.2f} (x {row["ratio"]:.1f})' for row in rows.values()]
        name = f'{title}: ' + ', '.join(re.findall(r'=(\d+)', point))
        print('|', ' | '.join([name, *cells, f'{rows["padded"]["padding_share"]:.0%}']), '|', flush=True)
