"""The procedures for a cluster: every command they would run parses, with and without stand-ins; what is missing is said at once."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, RUN, parse

from experiments.papers import expected

NAMES = ['drdpo_hh', 'beta_dpo_hh', 'radpo_hh', 'rlaif_sharegpt']


def run(name, **settings):
    unset = {'GPUS', 'JUDGE', 'JUDGE_MODEL', 'DRY', 'PRINT', 'FLIPS', 'BETAS', 'LOSSES'}
    environment = {k: v for k, v in os.environ.items() if k not in unset} | {'PYTHON': sys.executable} | settings
    return subprocess.run(
        ['bash', f'experiments/papers/{name}.sh'], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize('settings', [{'GPUS': '4'}, {'GPUS': '1', 'JUDGE': 'none'}, {'DRY': '1'}], ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_commands_parse(name, settings, monkeypatch):
    found = run(name, PRINT='1', **settings)
    if name == 'rlaif_sharegpt' and settings.get('JUDGE') == 'none':
        assert found.returncode == 2 and 'judge makes the training data' in found.stderr
        return
    assert found.returncode == 0, found.stderr
    assert 'not measured' in found.stdout and '1 x H200' in found.stdout
    commands = [line[2:] for line in found.stdout.splitlines() if line.startswith('$ ')]
    used, folders = [], []
    for command in commands:
        script = next(w for w in command.split() if re.fullmatch(r'\w+\.py|experiments\.\S+', w))
        used.append(script)
        assert ('nproc_per_node=4' in command) == (
            settings.get('GPUS') == '4' and script in ('sft.py', 'dpo.py', 'sample.py')
        )
        if script in RUN:
            config = parse(command, monkeypatch)
            folders.append(config['out_dir'])
            if script in ('sft.py', 'dpo.py') and 'DRY' in settings:
                assert config['n_examples'] <= 64 and config['dtype'] == 'float32'
    assert used[0] == 'sft.py' and used[-1] == 'experiments.papers.row' and {'dpo.py', 'sample.py'} <= set(used)
    assert ('label.py' in used) == (settings.get('JUDGE') != 'none')
    assert len(set(folders)) == len(folders)


def test_what_is_missing_is_said():
    found = run('drdpo_hh', GPUS='0')
    assert found.returncode == 2 and 'no GPU here' in found.stderr
    found = run('drdpo_hh', GPUS='1')
    assert found.returncode == 2 and 'JUDGE' in found.stderr and 'done' not in found.stdout
    assert run('drdpo_hh', GPUS='1', JUDGE='http://x').returncode == 2  # and its name


def test_expected_by_hand():
    """One layer of width 1 with 10 weights and a vocabulary of 3; a prompt of 2 tokens, answers of 1 and 2.

    Forward: 2 x 10 x 5 + 4 x (3 ^ 2 / 2 + 2 x 2 + 2 ^ 2 / 2) + 2 x 3 x 3 = 100 + 42 + 18; three times that and the reference."""
    assert expected.flops(expected.Shape(1, 1, 10, 3), 'pairs', (2, 1, 2)) == 4 * 160
    assert expected.flops(expected.Shape(1, 1, 10, 3), 'sft', (2, 1, 0)) == 3 * (60 + 18 + 6)


@pytest.mark.parametrize('script', ['ai_feedback.sh', 'papers/paper.sh'])
def test_verdicts_that_are_missing_are_asked_for_again(tmp_path, script):
    """label.py leaves a report also where requests have failed: a step with one is not done."""
    text = (ROOT / 'experiments' / script).read_text()
    body = text[text.index('step() {') :]
    body = body[: body.index('\n}') + 2]
    call = (
        'step labels report.json echo run'
        if script == 'ai_feedback.sh'
        else f'step {tmp_path}/labels/report.json echo run'
    )
    (tmp_path / 'labels').mkdir()
    for failed, again in ((3, True), (0, False), (None, True)):
        report = tmp_path / 'labels/report.json'
        report.write_text(json.dumps({'failed': failed}, indent=1)) if failed is not None else report.unlink()
        lines = f'OUT={tmp_path}\nPRINT=0\n{body}\n{call}\n'
        done = subprocess.run(['bash', '-euc', lines], capture_output=True, text=True)
        assert done.returncode == 0 and bool(re.search('^run', done.stdout, re.M)) == again, done
