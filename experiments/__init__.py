import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from configurator import UserError
from runtime.files import reading, replace_text

ROOT = Path(__file__).resolve().parent.parent  # of the repository


def read_rows(file):
    """Return the rows of a .jsonl file."""
    with reading(file, 'mend it'):
        return [json.loads(line) for line in Path(file).read_text('utf-8').splitlines()]


def write_rows(file, rows):
    """Write a .jsonl file, whole or not at all; makes its folder, too."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, ''.join(json.dumps(row) + '\n' for row in rows))


def evaluations(folder):
    """Return the evaluations in the metrics.jsonl of a run's folder, in order."""
    return [row for row in read_rows(Path(folder) / 'metrics.jsonl') if row['split'] == 'eval']


def table(head, rows):
    """Return a Markdown table and an empty line."""
    lines = [head, ['---'] * len(head), *rows]
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines) + '\n'


def mean_and_error(numbers):
    """Return 'mean (standard error)'; for a single number just that number, for none an empty text."""
    if len(numbers) < 2:
        return ''.join(f'{x:.3f}' for x in numbers)
    error = statistics.stdev(numbers) / len(numbers) ** 0.5
    return f'{statistics.mean(numbers):.3f} ({error:.3f})'


def used():
    """Return (CPU seconds of the commands that this process ran and that have ended, GB of the largest process, this one included)."""
    of_children, of_this = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
    unit = 1e9 if sys.platform == 'darwin' else 1e6  # macOS counts bytes, Linux kilobytes
    cpu_seconds = of_children.ru_utime + of_children.ru_stime
    return cpu_seconds, max(of_children.ru_maxrss, of_this.ru_maxrss) / unit


def run(*command, limit=None, **environment):
    """Run a command of this Python from the repository's root, quietly, within limit seconds. Raises UserError if it fails."""
    command = [str(word) for word in command]
    settings = {'cwd': ROOT, 'env': os.environ | environment, 'timeout': limit}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **settings)
    if done.returncode:
        begin, reason = ' '.join(command[:2]), done.stderr.strip()[-2000:]
        raise UserError(f'{begin} ... ended with {done.returncode}: {reason}')
