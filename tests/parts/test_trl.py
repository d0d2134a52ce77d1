"""dpo.py against numbers that TRL's DPOTrainer gave (trl_numbers.json, made by experiments/trl/dpo.py --write), and reward.py
against those of its RewardTrainer (trl_reward_numbers.json, made by experiments/trl/reward.py --write).

The first run DPO in float32 on the same 32 toy pairs in the same order, for six steps, from weights that a formula gives: a
GPT-NeoX with SGD, in several microbatches, and a Llama with AdamW, in one; most steps clip the gradient. Needs no TRL.
"""

import json
from types import SimpleNamespace

import pytest
from helpers import run_script

from experiments.trl import dpo as compare_trl
from experiments.trl import reward as compare_trl_reward

NUMBERS = json.loads(compare_trl.NUMBERS.read_text())
REWARD_NUMBERS = json.loads(compare_trl_reward.NUMBERS.read_text())


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """What the experiments start as processes runs in this one."""
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    stand_in = SimpleNamespace(run=lambda command, **_: run_script(*command[1:]) and SimpleNamespace(returncode=0))
    monkeypatch.setattr(compare_trl, 'subprocess', stand_in)


@pytest.mark.parametrize('name', NUMBERS['runs'])
def test_every_step_is_what_trl_says(name, tmp_path):
    run = NUMBERS['runs'][name]
    compare_trl.toy_model(run['model'], tmp_path / 'model')
    compare_trl.write_pairs(NUMBERS['pairs'], tmp_path / 'pairs.jsonl')
    ours = compare_trl.with_nanopref(tmp_path / 'model', tmp_path / 'pairs.jsonl', tmp_path / 'out', run['options'])
    assert len(ours) == len(run['steps']) >= 5
    for step, (our, their) in enumerate(zip(ours, run['steps'], strict=True)):
        assert our == pytest.approx(their, rel=0, abs=1e-4), f'step {step + 1}'


@pytest.mark.parametrize('name', REWARD_NUMBERS['runs'])
def test_every_step_of_a_reward_model_is_what_trl_says(name, tmp_path):
    """With margins; the Llama with centred scores, too."""
    run = REWARD_NUMBERS['runs'][name]
    compare_trl_reward.toy_reward(run['model'], tmp_path / 'model')
    compare_trl.write_pairs(REWARD_NUMBERS['pairs'], tmp_path / 'pairs.jsonl')
    folders = tmp_path / 'model', tmp_path / 'pairs.jsonl', tmp_path / 'out'
    ours = compare_trl_reward.with_nanopref(*folders, run['options'])
    assert len(ours) == len(run['steps']) >= 5
    for step, (our, their) in enumerate(zip(ours, run['steps'], strict=True)):
        assert our == pytest.approx(their, rel=0, abs=1e-4), f'step {step + 1}'
