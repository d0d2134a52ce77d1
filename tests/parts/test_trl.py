"""dpo.py and reward.py against numbers that TRL's trainers gave (trl_numbers.json, trl_reward_numbers.json: experiments/trl/steps.py --write).

In float32 on the same 32 toy pairs in the same order, for six steps, from weights that a formula gives: a GPT-NeoX with SGD, in several
microbatches, and a Llama with AdamW, in one; most steps clip the gradient. Needs no TRL."""

import json

import pytest
from helpers import run_script

from experiments import write_rows
from experiments.trl import steps

NUMBERS = {kind: json.loads(steps.KINDS[kind].numbers.read_text()) for kind in steps.KINDS}


@pytest.mark.parametrize('name', ['SGD', 'AdamW'])
@pytest.mark.parametrize('kind', steps.KINDS)
def test_every_step_is_what_trl_says(kind, name, tmp_path, monkeypatch):
    """Pairs for the reward model have margins, and its Llama has centred scores."""
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(steps, 'run', lambda *command, **_: run_script(*command))  # in this process
    run, compared = NUMBERS[kind]['runs'][name], steps.KINDS[kind]
    compared.model(run['model'], tmp_path / 'model')
    write_rows(tmp_path / 'pairs.jsonl', NUMBERS[kind]['pairs'])
    folders = tmp_path / 'model', tmp_path / 'pairs.jsonl', tmp_path / 'out'
    ours = steps.with_nanopref(compared, *folders, run['options'])
    assert len(ours) == len(run['steps']) >= 5
    for step, (our, their) in enumerate(zip(ours, run['steps'], strict=True)):
        assert our == pytest.approx(their, rel=0, abs=1e-4), f'step {step + 1}'


@pytest.mark.parametrize('off, agrees', [(0.0, True), (0.001, False), (float('nan'), False)])
def test_no_number_is_no_agreement(off, agrees, tmp_path, monkeypatch):
    kind = steps.KINDS['dpo']
    row = dict.fromkeys(kind.columns, 1.0)
    monkeypatch.setattr(steps, 'with_trl', lambda *_: ([row, row], []))
    monkeypatch.setattr(steps, 'with_nanopref', lambda *_: [row, row | {next(iter(kind.columns)): 1.0 + off}])
    monkeypatch.setattr(steps, 'order', lambda *_: [])
    found, _ = steps.compare(kind, 'SGD', NUMBERS['dpo']['pairs'], tmp_path)
    assert found == agrees
