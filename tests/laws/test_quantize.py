"""Frozen weights of 4 bits beside adapters: they are what they stand for, in every forward, on any number of ranks, and in the export."""

import copy

import pytest
import torch
from helpers import launch, metrics, same_bits, tensors, tiny_model
from test_lora import COMMON, trained
from ties import same_runs, same_weights

import data
import fsdp
from configurator import UserError
from hf import lora, quantize
from hf.load import load_model
from runtime import ranks

pytest.importorskip('bitsandbytes', reason='bitsandbytes is not installed: pip install bitsandbytes')
ADAPTERS = {'rank': 4, 'alpha': 16.0, 'dropout': 0.0, 'targets': 'q_proj v_proj', 'quantize': '4bit'}
DPO = ['dpo.py', *COMMON, '--n_examples=36', '--lr=1e-2', '--lora_rank=4', '--quantize=4bit', '--save_every=12']


@pytest.mark.parametrize('bias', [True, False])
def test_layer(bias):
    """Forward and backward of the layer that it stands for, whose weights are near those that it was made from."""
    torch.manual_seed(0)
    whole, x = torch.nn.Linear(40, 24, bias=bias), torch.randn(7, 40, requires_grad=True)
    layer = quantize.Linear4bit(whole)
    same = layer.dequantized()
    error = (same.weight - whole.weight).norm() / whole.weight.norm()
    assert 0.02 < error < 0.15 and layer.codes.numel() == whole.weight.numel() / 2
    ours, expected = layer(x), same(x)
    (grad,), (expected_grad,) = (torch.autograd.grad(out.square().sum(), x) for out in (ours, expected))
    assert ours.allclose(expected, atol=1e-6) and grad.allclose(expected_grad, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_log_probs(tmp_path):
    """The packed forward gives those of the dequantised model, adapters on or off; all linear layers of the blocks are in 4 bits."""
    device = ranks.setup()[2]
    with pytest.raises(UserError, match='the layers of GPT-2 are no torch.nn.Linear'):
        load_model(tiny_model(tmp_path / 'gpt2', 'gpt2'), adapters=ADAPTERS | {'targets': None})
    base = tiny_model(tmp_path / 'llama', 'llama')
    loaded = trained(load_model(base, adapters=ADAPTERS))
    assert quantize.count_4bit_weights(loaded) == sum(v.numel() for k, v in tensors(base).items() if 'proj' in k)
    whole = quantize.dequantize(copy.deepcopy(loaded))
    batch = data.pack([(torch.arange(5, 9).numpy(), [torch.arange(9, 20).numpy(), torch.arange(30, 34).numpy()])], [0])
    found = []
    for build in (lambda empty: loaded, lambda empty: whole, lambda empty: load_model(base)):
        policy = fsdp.shard(build, device)
        with torch.no_grad():
            on = policy.response_logps(batch)[0]
            with lora.adapters_off(policy):
                found.append((on, policy.response_logps(batch)[0]))
    (ours, ours_off), (same, same_off), (_, before) = found
    assert ours.allclose(same, rtol=1e-5) and ours_off.allclose(same_off, rtol=1e-5)
    assert 1e-4 < ((ours_off - before) / before).abs().max() < 0.2 and not ours.allclose(ours_off, rtol=1e-3)


RUNS = {'one': '--save_dtype=float32', 'half': '--dtype=bfloat16', 'cached': '--cache_ref', 'none': '--shard=none',
        'full': '--shard=full', 'again': '--shard=full'}  # fmt: skip


def test_runs(tmp_path):
    """The same on one rank and two, cut or copied; resumed bit for bit; and the export is what was trained."""
    base = tiny_model(tmp_path / 'base', 'llama')
    plan = {name: [*DPO, f'--model={base}', flag, f'--out_dir={tmp_path}/{name}'] for name, flag in RUNS.items()}
    for name in ('full', 'again'):
        plan[name].append('--max_tokens=150')
    launch(0, [plan[name] for name in ('one', 'half', 'cached')], tmp_path)
    cut = ['cut', tmp_path / 'full', tmp_path / 'again', 24]
    launch(2, [plan['none'], plan['full'], cut, plan['again']], tmp_path)
    for name in RUNS:
        (row,) = metrics(tmp_path / name, 'check')
        rounding = 1e-6 if name == 'cached' else 0  # the cache was made in larger microbatches
        assert max(abs(row['rewards_train/chosen']), abs(row['rewards_train/rejected'])) <= rounding
    for name in ('cached', 'none', 'full'):
        same_runs(tmp_path / name, tmp_path / 'one', rel=5e-4, abs=5e-5)
        same_weights(tensors(tmp_path / name / 'adapter'), tensors(tmp_path / 'one/adapter'), 1e-5)
    assert metrics(tmp_path / 'again') == metrics(tmp_path / 'full')
    assert all(same_bits(tmp_path / 'again' / part, tmp_path / 'full' / part) for part in ('adapter', 'model'))
    assert {v.dtype for v in tensors(tmp_path / 'none/model').values()} == {torch.bfloat16}
    # what goes on from the adapter computes what the merged model does
    ids = torch.arange(5, 29).view(2, 12)
    policy = load_model(str(tmp_path / 'one/adapter'), adapters=ADAPTERS)
    with torch.no_grad():
        merged = load_model(str(tmp_path / 'one/model'))(ids).logits
        assert (policy(ids).logits - merged).abs().max() <= 1e-5 * merged.abs().max()
