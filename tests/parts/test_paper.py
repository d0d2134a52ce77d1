"""The procedures for a cluster: every command they would run parses, with and without stand-ins; what is missing is said at once."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, RUN, parse

NAMES = ['drdpo_hh', 'beta_dpo_hh', 'radpo_hh', 'rlaif_sharegpt']
TRAINS = ('sft.py', 'dpo.py')


def run(name, **settings):
    unset = {'GPUS', 'JUDGE', 'JUDGE_MODEL', 'DRY', 'PRINT', 'FLIPS', 'BETAS', 'LOSSES'}
    environment = {k: v for k, v in os.environ.items() if k not in unset} | {'PYTHON': sys.executable} | settings
    command = ['bash', f'experiments/papers/{name}.sh']
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize('settings', [{'GPUS': '4'}, {'GPUS': '1', 'JUDGE': 'none'}, {'DRY': '1'}], ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_commands_parse(name, settings, monkeypatch):
    found = run(name, PRINT='1', **settings)
    if name == 'rlaif_sharegpt' and settings.get('JUDGE') == 'none':
        assert found.returncode == 2 and 'judge makes the training data' in found.stderr
        return
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f'{name}: expected, computed, not measured') and '1 x H200' in found.stdout
    used, folders = [], []
    for command in re.findall(r'^\$ (.*)', found.stdout, re.M):
        script = next(w for w in command.split() if re.fullmatch(r'\w+\.py|experiments\.\S+', w))
        used.append(script)
        on_four = settings.get('GPUS') == '4' and script in (*TRAINS, 'sample.py')
        assert ('nproc_per_node=4' in command) == on_four
        if script in RUN:
            config = parse(command, monkeypatch)
            folders.append(config['out_dir'])
            if script in TRAINS and 'DRY' in settings:
                assert config['n_examples'] <= 64 and config['dtype'] == 'float32'
    assert used[0] == 'sft.py' and used[-1] == 'experiments.papers.row' and {'dpo.py', 'sample.py'} <= set(used)
    assert ('label.py' in used) == (settings.get('JUDGE') != 'none')
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize('settings, words', [
    ({'GPUS': '0'}, 'no GPU here'), ({'GPUS': '1'}, 'JUDGE'), ({'GPUS': '1', 'JUDGE': 'http://x'}, 'JUDGE_MODEL'),
])  # fmt: skip
def test_what_is_missing_is_said(settings, words):
    found = run('drdpo_hh', **settings)
    assert found.returncode == 2 and words in found.stderr and 'done' not in found.stdout


@pytest.mark.parametrize('script', ['ai_feedback', 'papers/drdpo_hh', 'papers/smollm2_flips'])
def test_arguments_are_refused(script):
    """They would do nothing: all is set by variables."""
    command = ['timeout', '20', 'bash', f'experiments/{script}.sh', '--data=hh']
    found = subprocess.run(command, cwd=ROOT, env=os.environ | {'PRINT': '1'}, capture_output=True, text=True)
    assert found.returncode == 2 and 'takes variables' in found.stderr


@pytest.mark.parametrize('script, target', [
    ('ai_feedback.sh', 'labels report.json'), ('papers/paper.sh', '$OUT/labels/report.json'),
])  # fmt: skip
def test_verdicts_that_are_missing_are_asked_for_again(tmp_path, script, target):
    """label.py leaves a report also where requests have failed: a step with one is not done."""
    step = re.search(r'^step\(\) \{.*?\n\}', (ROOT / 'experiments' / script).read_text(), re.M | re.S)[0]
    report = tmp_path / 'labels/report.json'
    report.parent.mkdir()
    for failed, again in ((None, True), (3, True), (0, False)):
        if failed is not None:
            report.write_text(json.dumps({'failed': failed}, indent=1))
        lines = f'OUT={tmp_path}\nPRINT=0\n{step}\nstep {target} echo run\n'
        done = subprocess.run(['bash', '-euc', lines], capture_output=True, text=True)
        assert done.returncode == 0 and bool(re.search('^run', done.stdout, re.M)) == again, done
