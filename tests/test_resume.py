"""A run that died continues as if it had not: bit-exactly on as many ranks, to rounding on another number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from ties import same_metrics

ROOT = Path(__file__).resolve().parent.parent
CASES = ['dpo', 'beta_dpo', 'kto', 'sft', 'reward']


def launch(world, *arguments):
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={world}', *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('resume')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('NANOPREF_CACHE', str(folder / 'cache'))
        launch(2, 'tests/resume.py', folder / 'two')
        launch(1, 'tests/resume.py', folder / 'one', folder / 'two')
    return folder


def rows(folder):
    text = (folder / 'metrics.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith('_per_second')} for line in text]


@pytest.mark.parametrize('case', CASES)
def test_bit_exact_on_as_many_ranks(runs, case):
    whole, resumed = runs / 'two' / case, runs / 'two' / f'{case}-resumed'
    assert rows(resumed) == rows(whole)
    assert [r['counters/examples'] for r in rows(whole) if r['split'] == 'train'] == [12, 24, 36, 48]
    assert [r['counters/examples'] for r in rows(whole) if r['split'] == 'eval'] == [0, 24, 48]
    if case == 'dpo':  # the samples of evaluations that are done again are there once
        assert (resumed / 'samples.jsonl').read_text() == (whole / 'samples.jsonl').read_text()
    a, b = (load_file(folder / 'model/model.safetensors') for folder in (whole, resumed))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize('case', CASES)
def test_to_rounding_on_another_number(runs, case):
    for row, other in zip(rows(runs / 'two' / case), rows(runs / 'one' / f'{case}-resumed'), strict=True):
        assert other.pop('split') == row.pop('split')
        same_metrics(other, row, rel=1e-3, abs=1e-4)


def test_checkpoints_hold_no_pickle(runs):
    names = {file.name for file in runs.rglob('*') if file.is_file() and 'checkpoints' in file.parts}
    assert names and all(name.endswith(('.safetensors', '.json')) for name in names)


def test_killed_run_continues(tmp_path, monkeypatch):
    """kill -9 as soon as a checkpoint exists; the next start finishes with the weights of an uninterrupted run."""
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    flags = [sys.executable, 'dpo.py', '--n_examples=384', '--batch_size=32', '--save_every=64', '--lr=1e-3']
    flags += ['--n_eval_examples=16', f'--out_dir={tmp_path / "run"}']
    process = subprocess.Popen(
        flags, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.time() + 120
    while not list(tmp_path.glob('run/checkpoints/*[0-9]')) and time.time() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / 'run/model').exists()
    subprocess.run(flags, cwd=ROOT, check=True, capture_output=True, timeout=120)
    subprocess.run(
        [*flags[:-1], f'--out_dir={tmp_path / "whole"}'], cwd=ROOT, check=True, capture_output=True, timeout=120
    )
    assert rows(tmp_path / 'run') == rows(tmp_path / 'whole')
    a, b = (load_file(tmp_path / name / 'model/model.safetensors') for name in ('run', 'whole'))
    assert all(a[k].equal(b[k]) for k in a)
    again = subprocess.run(flags, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and 'holds this run already (finished)' in again.stderr
    assert rows(tmp_path / 'run') == rows(tmp_path / 'whole')  # nothing was overwritten
