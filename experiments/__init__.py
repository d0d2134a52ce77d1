import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository


def read_rows(file):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in Path(file).read_text('utf-8').splitlines()]


def evaluations(run):
    """The rows of evaluations in a run's metrics.jsonl, the last one last."""
    return [row for row in read_rows(Path(run) / 'metrics.jsonl') if row['split'] == 'eval']


def table(head, rows):
    """A markdown table, and an empty line."""
    lines = [head, ['---'] * len(head), *rows]
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines) + '\n'


def mean_and_error(numbers):
    """'mean (standard error)'; of a single number itself alone, of none nothing."""
    if len(numbers) < 2:
        return ''.join(f'{x:.3f}' for x in numbers)
    return f'{statistics.mean(numbers):.3f} ({statistics.stdev(numbers) / len(numbers) ** 0.5:.3f})'


def used():
    """(CPU seconds, GB of the largest) of all commands that have ended so far: other work on the machine does not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1e9 if sys.platform == 'darwin' else 1e6  # macOS counts bytes, Linux kilobytes
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit


def bench_rows(*flags, limit=None, **environment):
    """The rows of a run of tools.bench, variant -> row; within limit seconds. Raises UserError."""
    from configurator import UserError

    environment = os.environ | {'TQDM_DISABLE': '1', 'PYTHONWARNINGS': 'ignore'} | environment
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'rows.json')
        command = [sys.executable, '-m', 'tools.bench', *flags, f'--out={file}']
        done = subprocess.run(command, env=environment, cwd=ROOT, timeout=limit, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f'{" ".join(command[1:])} failed: {done.stderr.strip()[-500:]}')
        return {row['variant']: row for row in json.loads(file.read_text())['rows']}
