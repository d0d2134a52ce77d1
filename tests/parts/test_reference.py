"""The reference cache: exact, shared, found out when damaged, refused where a loss needs more than log-probs."""

import gc
import math
import re
import weakref

import numpy as np
import pytest
import torch
from helpers import metrics, run_script, write_jsonl
from safetensors.numpy import load_file

import training
from hf import reference
from hf.load import load_model
from text import toy
from text.examples import Examples

FLAGS = ['--data=train.jsonl', '--eval_data=test.jsonl', '--n_examples=24', '--batch_size=8', '--n_eval_examples=8', '--lr=1e-3',
         '--warmup_steps=0', '--noise_rate=0.3', '--data_fraction=0.5']  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs dpo.py in a folder of its own; returns its training rows."""
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'two/new'))  # neither is there
    monkeypatch.chdir(tmp_path)
    for split in ('train', 'test'):
        write_jsonl(f'{split}.jsonl', toy.pairs(split, 200))

    def go(name, *flags):
        run_script('dpo.py', *FLAGS, *flags, f'--out_dir={tmp_path / name}')
        return [{k: v for k, v in row.items() if k != 'split'} for row in metrics(tmp_path / name)]

    return go


def caches(tmp_path):
    return sorted((tmp_path / 'two/new').glob('reference-*.safetensors'))


@pytest.mark.parametrize('loss', ['dpo', 'kto_zero'])
def test_same_numbers_as_the_live_reference(run, tmp_path, loss):
    runs = [run('live', f'--loss={loss}'), run('cached', f'--loss={loss}', '--cache_ref')]
    # at step 0 margins, and so accuracies, are rounding errors
    live, cached = ([{k: v for k, v in row.items() if 'accuracies' not in k} for row in rows] for rows in runs)
    assert len(cached) == len(live) == 6
    for row, expected in zip(cached, live, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len(caches(tmp_path)) == 2  # training and evaluation


def test_terms_on_top_of_the_formula(run, tmp_path, capsys):
    """Both log-ratios are -log 2, so DPO's loss is log 2 and the importance 1/2; NLL 2 over 4 tokens, half of it added.

    The line `step 0` has these terms on both sides: what the loss is, and what it must be."""
    scope = run_script('dpo.py', *FLAGS, '--loss=dpo', '--importance', '--sft_coef=0.5', f'--out_dir={tmp_path}/run')
    said = re.search(r'step 0: .* loss (\S+) \(dpo of a policy that is its reference: (\S+)\)', capsys.readouterr().out)
    loss, wanted = map(float, said.groups())
    assert loss == pytest.approx(wanted, abs=2e-6) and loss > 1
    measured = {'pi_w': -2.0, 'ref_w': math.log(2) - 2, 'n_w': 4.0, 'pi_l': -3.0, 'ref_l': math.log(2) - 3, 'n_l': 5.0}
    measured = {name: torch.tensor([value]) for name, value in measured.items()}
    loss, weight = scope['loss_and_weight'](measured, {}, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(2) / 2 + 0.25, abs=1e-6) and weight.item() == 1


def test_shared_between_runs_and_losses_and_keyed_by_content(run, tmp_path, capsys):
    scope = run_script('dpo.py', *FLAGS, '--cache_ref', f'--out_dir={tmp_path / "first"}')
    assert 'not kept' not in capsys.readouterr().out
    unused, rows = np.isnan(scope['run'].train.ref), len(scope['run'].train)
    assert unused.shape == (rows, 2) and (~unused).all(1).sum() == 24 and unused.all(1).sum() == rows - 24
    assert 60 < rows < 140  # about half of 200
    assert sorted(len(load_file(file)['logps']) for file in caches(tmp_path)) == [8, 24]
    times = [file.stat().st_mtime_ns for file in caches(tmp_path)]
    again = run('second', '--loss=ipo', '--beta=0.3', '--cache_ref')
    assert [file.stat().st_mtime_ns for file in caches(tmp_path)] == times
    assert 'read from' in capsys.readouterr().out and len(again) == 6
    # a damaged file is found out
    one, two = caches(tmp_path)
    content, logps = one.read_bytes(), load_file(one)['logps'].tolist()
    a_bit_has_changed = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    for i, damaged in enumerate((content[:-9], a_bit_has_changed, two.read_bytes())):
        one.write_bytes(damaged)
        assert run(f'again{i}', '--loss=ipo', '--beta=0.3', '--cache_ref') == again
        assert 'damaged or belongs to something else' in capsys.readouterr().out
        assert load_file(one)['logps'].tolist() == logps
    run('other', '--cache_ref', '--seed=1')  # other weights
    assert len(caches(tmp_path)) == 4


def test_the_reference_is_freed(run, monkeypatch, capsys):
    """It refers to itself, so that it would stay in memory until the collector comes by. Its numbers serve, though no file keeps them."""
    made, left, load, steps = [], [], training.Run.load_frozen, training.Run.steps

    def watched(*args, **options):
        model = load(*args, **options)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(training.Run, 'load_frozen', watched)
    monkeypatch.setattr(training.Run, 'steps', lambda run: left.extend(r for r in made if r()) or steps(run))
    monkeypatch.setattr('runtime.cache.write', lambda *args: 'disk full')
    gc.disable()
    try:
        run('freed', '--cache_ref')
    finally:
        gc.enable()
    assert len(made) == 2 and not left
    notes = re.findall(r'the reference log-probs are not kept: .* \(disk full\)', capsys.readouterr().out)
    assert len(notes) == 1


def test_a_file_belongs_to_weights_tokens_borders_and_type():
    """Two pairs of the same ids differ where the prompt ends. The factor of an adapter's output is in no weight."""
    pairs = [([5, 6], [[7, 8], [9]]), ([5], [[6, 7, 8], [9]]), ([5, 6], [[7, 8], [10]])]
    examples, model = [Examples.of([pair]) for pair in pairs], load_model('toy')
    keys = [reference._key(model, one, dtype) for one in examples for dtype in ('float32', 'bfloat16')]
    keys.append(reference._key(load_model('toy', seed=1), examples[0], 'float32'))
    for alpha in (4.0, 400.0):
        adapted = load_model('toy', adapters={'rank': 2, 'alpha': alpha, 'dropout': 0.0, 'targets': None})
        keys.append(reference._key(adapted, examples[0], 'float32'))
    assert len(set(keys)) == 9 and keys[0] == reference._key(load_model('toy'), examples[0], 'float32')
