"""The speed table: tools/bench.py over shapes, batch sizes and threads, beside TRL and the original code's layout.

    pip install trl==1.16.0     # beside requirements.txt, in an environment of its own
    python -m experiments.speed.table --hh=PATH/hh_harmless.jsonl.gz --tokenizer=FOLDER [--shapes='14m 70m 70m-4k']
    python -m experiments.speed.table --report     # the tables of what --out holds, without measuring; writes the README's

Ours and TRL's microbatches are 8 pairs or 1,024 tokens. The times of a line come from one interleaved process: CPU seconds on one thread,
wall-clock seconds on more. Each peak of memory comes from a process of its own. Numbers that are in --out are not measured again.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path

from configurator import UserError, configure
from experiments import run, table

hh: str | None = None  # HH pairs: a .jsonl.gz file of Anthropic/hh-rlhf
tokenizer: str | None = None  # a folder with the tokenizer of the Pythia models
shapes = '14m 70m-4k 70m'  # which, in order
batch_sizes = '8 64'  # pairs of a step
cores = '1 2'  # CPU threads
n_steps = 2  # timed steps of each variant
out = 'experiments/speed/table.json'  # where the numbers are kept
report = False  # measure nothing: print the tables of what is there, and write the README's
readme = 'README.md'  # which; its lines between the markers are replaced

config = configure(globals())
SHAPES = {'14m': '--model=pythia-14m', '70m': '--model=pythia-70m', '70m-4k': '--model=pythia-70m --vocabulary=4096'}
VARIANTS = 'padded trl trl_fastest trl_cuda head cached'
COMPARED = [('head', 'trl'), ('head', 'padded'), ('cached', 'trl_fastest'), ('head', 'trl_cuda')]  # ours, theirs
WORDS = {
    'trl': 'TRL 1.16, its defaults', 'trl_fastest': 'TRL, no checkpointing, precomputed reference',
    'trl_cuda': 'TRL, no checkpointing, the scoring it has on CUDA', 'padded': "the original code's layout",
    'head': 'nanopref', 'cached': 'nanopref, cached reference',
}  # fmt: skip
numbers = json.loads(Path(out).read_text()) if Path(out).exists() else {}


def bench(*flags):
    """Run tools.bench. Returns variant -> row. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        files = f'--tokenizer={tokenizer}', f'--data=hh:{hh}', f'--out={folder}/rows.json'
        run('-m', 'tools.bench', *files, *flags, limit=3000, TQDM_DISABLE='1', PYTHONWARNINGS='ignore')
        return {row['variant']: row for row in json.loads(Path(folder, 'rows.json').read_text())['rows']}


def cell(row):
    gb = row.get('peak_memory_gb_alone')
    return f'{row["pairs_per_second"]:.2f}' + (f', {gb:.1f} GB' if gb else '')


def write_report():
    """Print all numbers, and write the README's: batch 8 on one thread as a table; of all lines the smallest and largest ratios."""
    rows, every_ratio = [], []
    for name, found in sorted(numbers.items()):
        speed = {variant: row['pairs_per_second'] for variant, row in found.items()}
        ratios = [speed[ours] / speed[theirs] for ours, theirs in COMPARED]
        every_ratio.append(ratios)
        rows.append([name, *(cell(found[variant]) for variant in WORDS), *(f'{ratio:.1f}' for ratio in ratios)])
    print(table(['', *WORDS, *map(' / '.join, COMPARED)], rows).rstrip())

    first = {name.partition(',')[0]: found for name, found in numbers.items() if name.endswith(', batch 8, 1 threads')}
    titles = [f'Pythia-{shape}'.replace('-4k', ', 4k words') for shape in first]
    shown = f'| | {" | ".join(titles)} |\n|---|{"---|" * len(titles)}\n'
    for variant, words in WORDS.items():
        shown += f'| {words} | {" | ".join(cell(found[variant]) for found in first.values())} |\n'
    # a name is SHAPE, batch N, M threads
    _, _, sizes, threads, _ = zip(*(name.replace(',', '').split() for name in numbers), strict=True)
    sizes, threads = (' and '.join(sorted(set(words), key=int)) for words in (sizes, threads))
    span = [f'{min(column):.1f} to {max(column):.1f}' for column in zip(*every_ratio, strict=True)]
    shown += f"""
Over all {len(numbers)} runs on these shapes (batch {sizes}, threads {threads}; `experiments/LOG.md`): {span[0]} times as fast as
TRL's defaults, {span[1]} times the original layout, {span[3]} times TRL with its CUDA scoring; with a cached
reference, {span[2]} times TRL's fastest setting with a precomputed one.
"""
    text = Path(readme).read_text()
    start, end = text.index('\n', text.index('<!-- speed:')) + 1, text.index('<!-- end of speed')
    Path(readme).write_text(text[:start] + shown + text[end:])


if report:
    write_report()
    sys.exit()
if not hh or not tokenizer:
    raise UserError('give --hh=FILE and --tokenizer=FOLDER')
for size, count, shape in itertools.product(batch_sizes.split(), cores.split(), shapes.split()):
    name = f'{shape}, batch {size}, {count} threads'
    if name not in numbers:
        # all variants in one process, then the memory of each in a process of its own
        flags = *SHAPES[shape].split(), f'--batch_size={size}', f'--threads={count}', '--max_tokens=1024'
        rows = bench(*flags, f'--n_steps={n_steps}', f'--variants={VARIANTS}')
        for variant in ('padded', 'trl', 'head', 'cached'):
            alone = bench(*flags, '--n_steps=1', f'--variants={variant}')
            rows[variant]['peak_memory_gb_alone'] = alone[variant]['peak_memory_gb']
        numbers[name] = rows
        Path(out).write_text(json.dumps(numbers, indent=1) + '\n')
    cells = [f'{variant} {cell(row)}' for variant, row in numbers[name].items()]
    print(f'{name}: {"; ".join(cells)}', flush=True)
