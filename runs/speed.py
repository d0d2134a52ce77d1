"""The speed table: bench.py over shapes, batch sizes and threads, beside TRL and the original code's layout.

    pip install trl==1.16.0     # beside requirements.txt, in an environment of its own
    python runs/speed.py --hh=PATH/hh_harmless.jsonl.gz --tokenizer=FOLDER [--shapes='14m 70m 70m-4k'] [--out=runs/speed.json]

Ours and TRL's microbatches are 8 pairs or 1,024 tokens. The times of a line come from one interleaved process; peak memory of each variant from a process of its own. keep=True tells
glibc's allocator to keep freed memory: without it page faults cost the padded layouts more than the products do. Resumable: what
stands in --out is not measured again. Prints the ratios to what is required; exit code 1 if one is missed.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

hh: str | None = None  # HH pairs: a .jsonl.gz file of Anthropic/hh-rlhf
tokenizer: str | None = None  # a folder with the tokenizer of the Pythia models
shapes = '14m 70m-4k 70m'  # which, in order
batch_sizes = '8 64'  # pairs of a step
cores = '1 2'  # CPU threads
n_steps = 2  # timed steps of each variant
keep = False  # let the allocator keep freed memory
memory = True  # measure peak memory, too: one more process a variant
limit_s = 3000  # seconds for one line
out = 'runs/speed.json'  # where the numbers are kept

ROOT = Path(__file__, '../..').resolve()  # a call: configure() takes what stands above it for options
sys.path.insert(0, str(ROOT))
from configurator import UserError, configure  # noqa: E402

configure(globals())
if not hh or not tokenizer:
    raise UserError('give --hh=FILE and --tokenizer=FOLDER')

SHAPES = {
    '14m': ['--model=pythia-14m'],
    '70m': ['--model=pythia-70m'],
    '70m-4k': ['--model=pythia-70m', '--vocabulary=4096'],
}
VARIANTS = 'padded trl trl_fastest trl_cuda head cached'
REQUIRED = [  # (ours, theirs, at least this ratio)
    ('head', 'trl', 4.3), ('head', 'padded', 3.0), ('cached', 'trl_fastest', 4.0), ('head', 'trl_cuda', 2.4),
]  # fmt: skip
numbers = json.loads(Path(out).read_text()) if Path(out).exists() else {}


def bench(*flags):
    """The rows of a bench.py run: variant -> row."""
    env = {**os.environ, 'TQDM_DISABLE': '1', 'PYTHONWARNINGS': 'ignore'}
    if keep:
        env |= {'MALLOC_MMAP_THRESHOLD_': '8589934592', 'MALLOC_TRIM_THRESHOLD_': '17179869184'}
    with tempfile.TemporaryDirectory() as folder:
        file = f'{folder}/rows.json'
        command = [
            sys.executable,
            str(ROOT / 'bench.py'),
            f'--out={file}',
            f'--tokenizer={tokenizer}',
            f'--data=hh:{hh}',
            *flags,
        ]
        done = subprocess.run(command, env=env, timeout=limit_s, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f'{" ".join(command)} failed: {done.stderr.strip()[-500:]}')
        return {row['variant']: row for row in json.loads(Path(file).read_text())['rows']}


missed = 0
for size in batch_sizes.split():
    for count in cores.split():
        for shape in shapes.split():
            name = f'{shape}, batch {size}, {count} threads' + (', memory kept' if keep else '')
            flags = [*SHAPES[shape], f'--batch_size={size}', f'--threads={count}', '--max_tokens=1024']
            if name not in numbers:
                rows = bench(*flags, f'--n_steps={n_steps}', f'--variants={VARIANTS}')
                for variant in ('padded', 'trl', 'head', 'cached') if memory else ():
                    rows[variant]['peak_memory_gb_alone'] = bench(*flags, '--n_steps=1', f'--variants={variant}')[
                        variant
                    ]['peak_memory_gb']
                numbers[name] = rows
                Path(out).write_text(json.dumps(numbers, indent=1) + '\n')
            rows = numbers[name]
            cells = [f'{v} {r["pairs_per_second"]:.2f}' + (f' / {r["peak_memory_gb_alone"]:.1f} GB' if 'peak_memory_gb_alone' in r else '')
                     for v, r in rows.items()]  # fmt: skip
            print(f'{name}: ' + ', '.join(cells), flush=True)
            for ours, theirs, least in REQUIRED:
                ratio = rows[ours]['pairs_per_second'] / rows[theirs]['pairs_per_second']
                missed += ratio < least
                print(
                    f'    {ours} against {theirs}: x {ratio:.1f}, required {least}{" - MISSED" if ratio < least else ""}'
                )
            if 'peak_memory_gb_alone' in rows['trl']:
                ratio = rows['head']['peak_memory_gb_alone'] / rows['trl']['peak_memory_gb_alone']
                missed += ratio > 2 / 3
                print(
                    f'    peak memory against trl: x {ratio:.2f}, required 0.67{" - MISSED" if ratio > 2 / 3 else ""}'
                )
sys.exit(missed > 0)
