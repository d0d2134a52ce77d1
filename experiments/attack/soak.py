"""Kill runs with kill -9 at random moments, start them again, and see that nothing is lost and nothing differs.

    python -m experiments.attack.soak --kills=20 --seed=0

Every case is trained once without interruption. Then the same command is run in another folder and killed, processes and all, a random
time after its first step (now and then after its start) or, half of the time, at a random point of a save, of sampling, of the writing
of a file or of the reference cache; after `per_run` kills it may finish. A kill is survived if the run ends with the metrics.jsonl,
samples.jsonl and model of the uninterrupted one, byte for byte but for speeds. Exit code 0 if all are."""

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from configurator import configure
from experiments import ROOT

kills = 20  # how many at least
seed = 0  # of the moments
per_run = 3  # kills before a run may finish
losses = 'dpo beta_dpo kto'  # taken in turns
processes = '1 2 1 2 4'  # likewise
folder: str | None = None  # where to work; None: a temporary folder, removed if all survive
config = configure(globals())

COMMON = """--batch_size=16 --n_examples=640 --save_every=48 --eval_every=144 --n_eval_examples=16 --lr=1e-3 --warmup_steps=2
            --sample_during_eval --n_eval_model_samples=4 --max_new_tokens=8 --data_fraction=0.1 --max_length=64 --max_prompt_length=32"""
# a moment has come when such a file, below the folder of the run, was changed just now
MOMENTS = {'save': 'out/checkpoints/*.tmp', 'sampling': 'out/samples.jsonl', 'temporary file': 'out/*.tmp',
           'new checkpoint': 'out/checkpoints/*', 'reference': 'cache/reference-*'}  # fmt: skip


def is_new(file):
    """Return whether a file was changed in the last second."""
    with contextlib.suppress(OSError):  # it may be gone meanwhile
        return time.time() - file.stat().st_mtime < 1
    return False


def size(path):
    return path.stat().st_size if path.exists() else 0


def start(loss, world, out, cache):
    """Start a run on so many processes, in a session of its own. Its text goes beside its folder."""
    command = [sys.executable]
    if world > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world}']
    command += ['dpo.py', *COMMON.split(), f'--loss={loss}', f'--out_dir={out}']
    if loss != 'kto':
        command.append('--cache_ref')
    environment = os.environ | {'NANOPREF_CACHE': str(cache), 'OMP_NUM_THREADS': '1'}
    with open(out.parent / f'{out.name}.txt', 'a') as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def metrics(out):
    """Return the whole rows of a run's metrics.jsonl, without speeds, which differ."""
    text = (out / 'metrics.jsonl').read_text() if size(out / 'metrics.jsonl') else ''
    rows = [json.loads(line) for line in text.split('\n')[:-1]]
    return [{k: v for k, v in row.items() if not k.endswith('_per_second')} for row in rows]


def difference(out, unbroken):
    """Return where a run differs from the unbroken one, or None."""
    for found, expected in itertools.zip_longest(metrics(out), metrics(unbroken)):
        if found != expected:
            return f'rows differ: {found} and {expected}'
    for name in ('samples.jsonl', 'model/model.safetensors'):
        if not (out / name).exists() or (out / name).read_bytes() != (unbroken / name).read_bytes():
            return f'{name} differs'
    return None


@functools.cache
def train_unbroken(loss, world, base):
    """Train without interruption. Returns (folder, seconds from the first step to the end)."""
    unbroken = base / f'{loss}-{world}'
    # a cache of its own: the reference's log-probs equal those of another number of processes to rounding only
    process = start(loss, world, unbroken, base / f'cache-{loss}-{world}')
    while process.poll() is None and not size(unbroken / 'metrics.jsonl'):
        time.sleep(0.01)
    began = time.time()
    assert process.wait() == 0, f'the uninterrupted run fails: {unbroken}.txt'
    return unbroken, time.time() - began


def wait_for_moment(process, work, rng, duration):
    """Wait until a run is to be killed, or has finished. Returns the name of the moment, or None for any."""
    moment = rng.choice([None] * len(MOMENTS) + list(MOMENTS))
    # counted from the first step, which comes late; now and then from the start
    rows, delay = work / 'out/metrics.jsonl', rng.uniform(0.0, 0.6) * duration
    written, since = size(rows), None
    if rng.random() < 0.15:
        since, delay = time.time(), delay + rng.uniform(0.0, 10.0)
    if moment == 'reference':
        since, delay = time.time(), 0.0
    while process.poll() is None:
        if since is None and size(rows) > written:
            since = time.time()
        if since is not None and time.time() - since >= delay:
            if moment is None or any(map(is_new, work.glob(MOMENTS[moment]))):
                time.sleep(rng.choice([0, 0.002, 0.01, 0.05]))
                break
        time.sleep(0.001)
    return moment


def train_killed(loss, world, work, rng, duration):
    """Start a run and kill it, per_run times, then let it finish. Returns (what was hit, exit code of the end)."""
    out, hits = work / 'out', []
    work.mkdir()
    while len(hits) < per_run and not (out / 'model').exists():
        process = start(loss, world, out, work / 'cache')
        moment = wait_for_moment(process, work, rng, duration)
        if process.poll() is not None:
            break  # it has finished before the moment came
        # with all processes below it, for torchrun puts its workers into sessions of their own
        parent = psutil.Process(process.pid)
        for one in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end meanwhile
                one.kill()
        process.wait()
        done = max((row['counters/examples'] for row in metrics(out)), default=0)
        hits.append(f'{done} examples ({moment or "any moment"})')
    # it may have finished just now: another start would rightly be refused
    code = 0 if (out / 'model').exists() else start(loss, world, out, work / 'cache').wait()
    return hits, code


def main():
    rng = random.Random(seed)
    base = Path(folder or tempfile.mkdtemp(prefix='soak-'))
    base.mkdir(parents=True, exist_ok=True)
    kinds, worlds = itertools.cycle(losses.split()), itertools.cycle(processes.split())
    done = survived = number = resumed = 0
    while done < kills:
        # the run without interruption, then the one that is killed, and what it has left
        loss, world = next(kinds), int(next(worlds))
        number += 1
        unbroken, duration = train_unbroken(loss, world, base)
        work = base / f'run{number}'
        hits, code = train_killed(loss, world, work, rng, duration)
        wrong = f'exit code {code}' if code else difference(work / 'out', unbroken)
        done += len(hits)
        print(f'{loss:9s} {world} processes, killed after {", ".join(hits) or "no examples"}: '
              f'{wrong or "as if nothing had happened"}', flush=True)  # fmt: skip
        resumed += (work / 'out.txt').read_text().count('resuming')  # the others came before the first checkpoint
        if wrong is None:
            survived += len(hits)
            shutil.rmtree(work)
    print(f'{survived} of {done} kills survived, {number} runs, {resumed} starts from a checkpoint, seed {seed}')
    if survived < done:
        print(f'see {base}')
    elif folder is None:
        shutil.rmtree(base)
    return int(survived < done)


if __name__ == '__main__':
    sys.exit(main())
