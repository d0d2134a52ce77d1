"""The law of the project: a step on 1, 2 or 4 ranks, in 1 or several microbatches, gives the same gradient.

For every loss: 3 steps of 12 toy pairs, in float32; gradient norms, metrics, the loss's state and the parameters after
the last step agree with those of one rank and one microbatch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from ties import same_metrics, same_weights

ROOT = Path(__file__).resolve().parent.parent
ONE, MANY = '4096', '110'  # tokens of a microbatch: the whole step, or two or three pairs
SHARDINGS = [(1, MANY), (2, ONE), (2, MANY), (4, ONE), (4, MANY)]
SPEED = ('_per_second', 'padding_share')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('law')
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'NANOPREF_CACHE': str(folder / 'cache')}
    for world in (1, 2, 4):
        command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={world}', 'tests/law.py']
        command += [str(folder / str(world)), ONE, MANY]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def cases():
    import ast

    tree = ast.parse((ROOT / 'tests/law.py').read_text())  # without running it
    import losses

    node = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == 'CASES')
    return [*losses.LOSSES, *(ast.literal_eval(key) for key in node.right.keys)]


def steps(folder):
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith((*SPEED, 'split'))} for row in rows]


@pytest.mark.parametrize('case', cases())
def test_sharding_law(runs, case):
    reference = runs / '1' / f'{case}-{ONE}'
    expected, weights = steps(reference), load_file(reference / 'model/model.safetensors')
    assert [row.get('grad_norm', 0) > 0 for row in expected] == [False] * (case != 'sft') + [True, True, True, False]
    for world, size in SHARDINGS:
        folder = runs / str(world) / f'{case}-{size}'
        for row, other in zip(expected, steps(folder), strict=True):
            same_metrics(other, row, rel=5e-4, abs=5e-5)
        others = load_file(folder / 'model/model.safetensors')
        same_weights(others, weights, 1e-5)
