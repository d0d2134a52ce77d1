"""Cost curves: pairs/s of `padded`, `head` and `cached` against batch size, prompt share, vocabulary, length and processes.

    python -m experiments.speed.curves [--model=pythia-14m] [--n_steps=3]

Synthetic pairs, one CPU thread a process; every line is one interleaved run of tools.bench. CPU seconds, but for the lines on
processes, where waiting for one another counts: these need a quiet machine. About ten minutes."""

from configurator import configure
from experiments import bench_rows

model = 'pythia-14m'  # a shape of tools.bench
n_steps = 3  # timed steps of each variant
only = ''  # the curve whose name begins so


config = configure(globals())
VARIANTS = ['padded', 'head', 'cached']
CURVES = {  # what changes -> the flags of each point
    'batch size': [[f'--batch_size={n}'] for n in (2, 8, 32)],
    'prompt share (of 320 tokens)': [
        [f'--prompt_tokens={320 - 2 * a}', f'--answer_tokens={a}'] for a in (8, 40, 80, 120)
    ],
    'vocabulary': [[f'--vocabulary={n}'] for n in (4096, 16384, 50304)],
    'length of prompt = of answer': [
        [f'--prompt_tokens={n}', f'--answer_tokens={n}', '--batch_size=4'] for n in (32, 128, 256, 512)
    ],
    'processes': [['--processes=1', '--wall'], ['--processes=2']],
}
print(f'{model}, synthetic pairs; pairs/s (ratio to padded)')
print('| | ' + ' | '.join(VARIANTS) + ' | padding of padded |\n|---|---|---|---|---|')
for title, points in CURVES.items():
    for flags in points if title.startswith(only) else []:
        ranks = [f.partition('=')[2] for f in flags if 'processes' in f]
        flags = [f for f in flags if 'processes' not in f]
        name = f'{title}: ' + (f'{ranks[0]}' if ranks else ', '.join(f.partition('=')[2] for f in flags if '=' in f))
        flags += [f'--model={model}', '--threads=1', f'--n_steps={n_steps}', f'--variants={" ".join(VARIANTS)}']
        rows = list(bench_rows(*flags, ranks=ranks[0] if ranks else None).values())
        cells = [f'{r["pairs_per_second"]:.2f} (x {r["ratio"]:.1f})' for r in rows]
        print(f'| {name} | ' + ' | '.join(cells) + f' | {rows[0]["padding_share"]:.0%} |', flush=True)
