"""The type of the weights that a run leaves is that of those that came in; training and checkpoints are in float32."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import metrics, run_script, tensors, tiny_model
from safetensors.torch import save_file

from hf import export, load

STEPS = ['--batch_size=12', '--n_examples=24', '--n_eval_examples=8', '--do_first_eval=false', '--warmup_steps=1', '--lr=1e-2',
         '--max_length=64', '--max_prompt_length=32', '--save_every=12']  # fmt: skip


def base(folder, dtype, **options):
    tiny_model(folder, 'llama')
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    Path(folder, 'model.safetensors').unlink()
    model.save_pretrained(folder, **options)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, small_toy):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'float64'])
def test_what_came_in(dtype):
    """Read from the file, whatever the config says; of mixed types that of most weights, not of most tensors."""
    for name, options in {'one': {}, 'shards': {'max_shard_size': '20KB'}, 'mixed': {}}.items():
        base(name, getattr(torch, dtype), **options)
        config = Path(name, 'config.json')
        config.write_text(json.dumps(json.loads(config.read_text()) | {'dtype': 'float32'}))
    mixed = {key: w.float() if w.dim() == 1 else w for key, w in tensors('mixed').items()}
    save_file(mixed | {f'x{i}': torch.ones(2) for i in range(30)}, 'mixed/model.safetensors')
    expected = {'float64': 'float32'}.get(dtype, dtype)
    assert [load.stored_dtype(name) for name in ('one', 'shards', 'mixed', 'toy')] == [*[expected] * 3, 'float32']


@pytest.mark.parametrize(('dtype', 'step'), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_random_rounding(dtype, step):
    """What lies on the grid stays; a move of a tenth of a step is kept on average, by the same weights each time."""
    begun = (1 + torch.arange(16) * step).repeat(20_000) * torch.tensor([1, -1, 0.125, -8]).repeat(80_000)
    grid = begun.to(dtype).float()
    generator = torch.Generator()
    assert export.rounded(grid, dtype, generator.manual_seed(0)).float().equal(grid)
    moved = grid * (1 + 0.1 * step)
    assert moved.to(dtype).float().equal(grid)
    found = export.rounded(moved, dtype, generator.manual_seed(0))
    kept = (found.float() - grid).double().sum() / (moved - grid).double().sum()
    assert found.dtype == dtype and kept == pytest.approx(1, abs=0.05)
    assert found.equal(export.rounded(moved, dtype, generator.manual_seed(0)))
    assert export.rounded(moved, torch.float32, generator) is moved
    assert export.rounded(torch.arange(3), dtype, generator).dtype == torch.int64


def test_runs_leave_what_came_in(monkeypatch, capsys):
    """Rounded once, at the end; a run that goes on from it begins with policy and reference equal."""
    monkeypatch.setattr(export, 'LARGEST_FILE', '20KB')
    base('base', torch.bfloat16)
    run_script('sft.py', *STEPS, '--model=base', '--out_dir=half')
    assert 'done: half/model, rounded to bfloat16 (a new run with --save_dtype=float32' in capsys.readouterr().out
    run_script('sft.py', *STEPS, '--model=base', '--out_dir=whole', '--save_dtype=float32')
    assert capsys.readouterr().out.endswith('done: whole/model\n')
    half, whole = tensors('half/model'), tensors('whole/model')
    assert metrics('half') == metrics('whole') and half.keys() == whole.keys()
    for name, value in whole.items():
        assert value.dtype == torch.float32 and not value.equal(value.bfloat16().float()), name
        assert half[name].dtype == torch.bfloat16 and half[name].float().allclose(value, rtol=2**-7, atol=0), name
    checkpoint = tensors('half/checkpoints', '*/*.safetensors').values()
    assert {v.dtype for v in checkpoint if v.dim() > 1} == {torch.float32}
    # several files with an index, and a config and a card that say the type
    assert len(list(Path('half/model').glob('model-0*.safetensors'))) > 2
    assert json.loads(Path('half/model/config.json').read_text())['dtype'] == 'bfloat16'
    assert 'trained in float32, and are kept in bfloat16' in Path('half/model/README.md').read_text()
    # the next in the chain: a reference of its own, or adapters
    for name, flag in {'pair': '--ref_model=half/model', 'lora': '--lora_rank=2'}.items():
        run_script('dpo.py', *STEPS, '--model=half/model', f'--out_dir={name}', flag)
        (row,) = metrics(name, 'check')
        assert row['rewards_train/chosen'] == row['rewards_train/rejected'] == 0
        assert {v.dtype for v in tensors(f'{name}/model').values()} == {torch.bfloat16}
    assert {v.dtype for v in tensors('lora/adapter').values()} == {torch.float32}


@pytest.mark.parametrize('flags', [[], ['--lora_rank=2']], ids=['all', 'adapters'])
def test_a_weight_that_does_not_fit_becomes_no_infinity(flags, capsys):
    """float16 ends at 65504: the model is kept in float32 then, and that is said where the type is."""
    base('base', torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained('base')
    model.get_input_embeddings().weight.data[-1, 0] = 65510.0  # of a word that no text has; rounded up, now and then
    model.save_pretrained('base')
    run_script('sft.py', *STEPS, '--model=base', '--out_dir=run', '--save_dtype=float16', *flags)
    said, found = capsys.readouterr().out, 'embed_tokens.weight has a weight of 65510, and torch.float16 ends at 65504'
    assert f'{found}: the model is kept in float32' in said and said.endswith('done: run/model\n')
    assert {value.dtype for value in tensors('run/model').values()} == {torch.float32}
    assert 'are kept in float32' in Path('run/model/README.md').read_text()


def test_what_transformers_keeps_in_float32_is_not_rounded():
    """DeepSeek V3's bias at the experts' scores: between 4 and 8, bfloat16 numbers are 1/32 apart, and that chooses other experts."""
    names = 'vocab_size hidden_size intermediate_size moe_intermediate_size kv_lora_rank q_lora_rank'
    sizes = dict.fromkeys(names.split(), 32)
    sizes |= dict.fromkeys('qk_rope_head_dim qk_nope_head_dim v_head_dim n_routed_experts'.split(), 4)
    sizes |= dict.fromkeys('num_hidden_layers num_attention_heads num_key_value_heads n_group'.split(), 1)
    config = transformers.DeepseekV3Config(first_k_dense_replace=0, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    bias = torch.tensor([7.01, 7.0, 7.03, 6.99])
    model.model.layers[0].mlp.gate.e_score_correction_bias.copy_(bias)
    export._save_weights(model, model.state_dict(), torch.bfloat16, 'run')
    found = tensors('run')
    assert found.pop('model.layers.0.mlp.gate.e_score_correction_bias').equal(bias)
    assert {weights.dtype for weights in found.values()} == {torch.bfloat16}
    assert json.loads(Path('run/config.json').read_text())['dtype'] == 'bfloat16'


def test_only_the_value_head_of_ppo_is_left_out():
    model, own = load.load_model('toy'), load.load_model('toy')
    own.value_head = torch.nn.Linear(2, 1)
    load.add_value_head(model)
    for net, left in ((model, False), (own, True)):
        with load.without_value_head(net):
            assert hasattr(net, 'value_head') == left
        assert hasattr(net, 'value_head')
