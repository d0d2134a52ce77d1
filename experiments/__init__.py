import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository


def bench_rows(*flags, ranks=None, limit=None, **environment):
    """The rows of a run of tools.bench, variant -> row; on so many ranks, within limit seconds. Raises UserError."""
    from configurator import UserError

    environment = os.environ | {'TQDM_DISABLE': '1', 'PYTHONWARNINGS': 'ignore'} | environment
    torchrun = ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', '--master_port=29541'] if ranks else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'rows.json')
        command = [sys.executable, *torchrun, '-m', 'tools.bench', *flags, f'--out={file}']
        done = subprocess.run(command, env=environment, cwd=ROOT, timeout=limit, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f'{" ".join(command[1:])} failed: {done.stderr.strip()[-500:]}')
        return {row['variant']: row for row in json.loads(file.read_text())['rows']}
