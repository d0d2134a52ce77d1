"""experiments/slurm.sh with stand-ins for Slurm's commands and torchrun on the PATH: what it starts, when it requeues. And sh for bash."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from helpers import ROOT

TOOLS = {
    'scontrol': 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> $LOG/requeued; fi',
    'srun': 'shift; exec "$@"',  # one node is enough: the whole step is this process and its children
    'scancel': 'echo "$@" >> $LOG/signalled; kill -USR1 $(cat $LOG/agent) $(cat $LOG/worker)',
    # torchrun dies of a signal that it does not know, and makes 1 of any code of its worker
    'torchrun': 'echo "$@" > $LOG/torchrun; echo $$ > $LOG/agent; "$LOG/worker.py" & wait $!; [ $? -eq 0 ] || exit 1',
}
WORKER = """#!/usr/bin/env python3
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
open(os.environ['LOG'] + '/worker.tmp', 'w').write(str(os.getpid()))
os.rename(os.environ['LOG'] + '/worker.tmp', os.environ['LOG'] + '/worker')
time.sleep(float(os.environ['SECONDS_OF_WORK']))
sys.exit(int(os.environ['CODE']))
"""


def start(folder, seconds, code, *command):
    """Start slurm.sh in a folder, with a worker that ends with this code after so many seconds."""
    for name, body in TOOLS.items():
        (folder / name).write_text(f'#!/usr/bin/env bash\n{body}\n')
    (folder / 'worker.py').write_text(WORKER)
    for file in folder.iterdir():
        file.chmod(0o755)
    environment = {'PATH': f'{folder}:{os.environ["PATH"]}', 'LOG': str(folder), 'SECONDS_OF_WORK': str(seconds),
                   'CODE': str(code), 'SLURM_JOB_ID': '41', 'SLURM_NNODES': '2', 'SLURM_GPUS_ON_NODE': '4',
                   'SLURM_JOB_NODELIST': 'node[7-8]'}  # fmt: skip
    return subprocess.Popen(['bash', str(ROOT / 'experiments/slurm.sh'), *command], cwd=folder, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


@pytest.mark.parametrize('code', [0, 3])
def test_a_run_that_ends_by_itself_is_not_requeued(tmp_path, code):
    job = start(tmp_path, 0, code)
    assert job.wait(30) == 2 and job.stderr.read().startswith('error: give it to Slurm, with a script')
    job = start(tmp_path, 0, code, 'dpo.py', 'config/x.py', '--a=b c')
    assert job.wait(30) == (code and 1) and not (tmp_path / 'requeued').exists()
    words = '--nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_id=41-0 --rdzv_endpoint=node7:20041 dpo.py config/x.py --a=b c'
    assert (tmp_path / 'torchrun').read_text() == words + '\n'


def test_the_warning_saves_and_requeues(tmp_path):
    job = start(tmp_path, 60, 0, 'dpo.py')
    deadline = time.time() + 30
    while not (tmp_path / 'worker').exists() and time.time() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 1 and 'goes back into the queue' in said
    told = [(tmp_path / name).read_text() for name in ('signalled', 'requeued')]
    assert told == ['--signal=USR1 41.0\n', 'requeue 41\n']


@pytest.mark.skipif(not shutil.which('dash'), reason='no sh other than bash here')
@pytest.mark.parametrize('script', sorted(ROOT.glob('experiments/**/*.sh')), ids=lambda path: path.name)
def test_sh_instead_of_bash(script, tmp_path):
    """Each script runs under a plain sh, or says before it does anything that it needs bash. Here python only writes down its words."""
    (tmp_path / 'python').write_text('#!/bin/sh\necho "$@" >> "$CALLS"\n')
    (tmp_path / 'python').chmod(0o755)
    calls = tmp_path / 'calls'
    environment = {'PATH': f'{tmp_path}:/usr/bin:/bin', 'CALLS': str(calls), 'OUT': str(tmp_path / 'out')}
    how = {'env': environment, 'cwd': tmp_path, 'timeout': 60}
    # slurm.sh takes the script that it runs
    arguments = ['dpo.py'] if script.name == 'slurm.sh' else []
    done = subprocess.run(['dash', script, *arguments], capture_output=True, text=True, **how)
    if script.name == 'ai_feedback.sh':
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert calls.read_text().startswith('sft.py config/sft_toy.py --model=toy')
        return
    assert (done.returncode, done.stdout) == (2, '') and not calls.exists()
    assert done.stderr == f'error: this script needs bash: bash {script}\n'
