"""Tensor parallelism, alone and with FSDP, gives what one process gives; device_map, cpu_offload and attn change nothing else."""

import json

import pytest
import torch
import transformers
from helpers import launch, metrics, read_jsonl, run_script, same_bits, tensors, tiny_model
from test_lora import COMMON
from ties import same_runs, same_weights

from configurator import UserError
from runtime import room
from text import toy

MODELS = ('llama', 'qwen2', 'gpt_neox', 'qwen3', 'phi3')
ADAM = ['--lr=1e-3']
SGD = ['--optimizer=SGD', '--lr=0.3']  # GPT-NeoX's key bias has no gradient but rounding, which AdamW makes steps of
PPO = ['ppo.py', *(flag for flag in COMMON if not flag.startswith('--max_length')), *SGD, '--ppo_epochs=1', '--minibatch_size=12',
       '--max_new_tokens=6']  # fmt: skip
DPO, SFT = ['dpo.py', *COMMON], ['sft.py', *COMMON]
SAMPLE = ['--sample_during_eval', '--n_eval_model_samples=3', '--max_new_tokens=6', '--save_every=12']
LLAMA = [*DPO, *ADAM, '--model=llama']
CASES = {
    'qwen2': [*SFT, *ADAM, '--model=qwen2', '--pack=false'],
    'gpt_neox': [*SFT, *SGD, '--model=gpt_neox', '--activation_checkpointing', '--max_tokens=200'],
    'samples': [*LLAMA, *SAMPLE],
}
ALONE = {  # not with FSDP
    'qwen3': [*DPO, *ADAM, '--model=qwen3'],
    'phi3': [*DPO, *SGD, '--model=phi3'],
    'tdpo2': [*DPO, *ADAM, '--model=llama', '--loss=tdpo2', '--max_tokens=200'],
    'cached': [*DPO, *SGD, '--model=gpt_neox', '--cache_ref'],
    'reward': ['reward.py', *COMMON, *ADAM, '--model=llama'],
    'judged': [*PPO, '--model=llama', '--reward_model=judge', '--critic=own'],
}
VARIANTS = '--seed=3 --cpu_offload --device_map=balanced --attn=eager --attn=sdpa'.split()  # the first is as it was
WORLDS = {'tp2': (2, '--tp=2'), 'dp2tp2': (4, '--tp=2')}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Every case on one process, on two ranks and on four; and runs that are resumed elsewhere than they were begun."""
    folder = tmp_path_factory.mktemp('parallel')
    for name in (*MODELS, 'gpt2'):
        more = {'tie_word_embeddings': name == 'qwen2'} | ({'head_dim': 8} if name == 'qwen3' else {})
        tiny_model(folder / name, name, **more)
    classifier = transformers.AutoModelForSequenceClassification
    judge = classifier.from_pretrained(folder / 'llama', num_labels=1, pad_token_id=0)
    judge.save_pretrained(folder / 'judge')
    toy.tokenizer().save_pretrained(folder / 'judge')
    tiny_model(folder / 'three', 'llama', num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    tiny_model(folder / 'uneven', 'llama', intermediate_size=50)

    def command(where, name, words, *flags):
        words = [w.replace('model=', f'model={folder}/') for w in words]
        return [*words, *flags, f'--out_dir={folder}/{where}/{name}']

    for where in ('one', *WORLDS):
        world, *flags = WORLDS.get(where, (0,))
        cases = CASES | (ALONE if world < 4 else {})
        plan = [command(where, name, words, *flags) for name, words in cases.items()]
        if where == 'one':
            plan += [command(where, f'llama{flag}', LLAMA, flag) for flag in VARIANTS]
        for origin in ('one', where) if where != 'one' else ():
            run, again = f'{folder}/{origin}/samples', f'{folder}/{where}/from_{origin}'
            plan += [['cut', run, again, 12], command(where, f'from_{origin}', CASES['samples'], *flags)]
        for name in {'tp2': ('gpt2', 'three'), 'dp2tp2': ('uneven',)}.get(where, ()):
            plan += [['fails', folder / f'{name}.txt', *command(where, name, [*DPO, *ADAM, f'--model={name}'], *flags)]]
        launch(world, plan, folder)
    # torch has nothing to say on the screen
    assert all('sequential all_' not in said.read_text() for said in folder.glob('rank-*-of-*.txt'))
    return folder


def same(folder, other, limit=1e-5):
    same_runs(folder, other, rel=2e-4, abs=limit)
    ours, theirs = ([row.get('loss/train', 0) for row in metrics(run)] for run in (folder, other))
    assert ours == pytest.approx(theirs, abs=limit)
    same_weights(tensors(folder / 'model'), tensors(other / 'model'), limit)


@pytest.mark.parametrize(('run', 'other'), [
    *((f'{where}/{case}', f'one/{case}') for where in WORLDS for case in CASES), *((f'tp2/{c}', f'one/{c}') for c in ALONE),
    *((f'one/llama{flag}', f'one/llama{VARIANTS[0]}') for flag in VARIANTS[1:]),
])  # fmt: skip
def test_as_one_process(runs, run, other):
    """Losses, gradient norms (of clipped gradients) and metrics of every step, and the weights after the last."""
    norms = [row['grad_norm'] for row in metrics(runs / other) if 'grad_norm' in row]
    assert len(norms) == 2 and min(norms) > 0.5
    same(runs / run, runs / other)


@pytest.mark.parametrize('where', WORLDS)
def test_sampled_and_resumed(runs, where):
    """Samples are there once. Bit-exact where it was begun; to rounding where a run without tensor parallelism was begun."""
    ours, theirs = (read_jsonl(runs / w / 'samples/samples.jsonl') for w in (where, 'one'))
    # the same texts; log-ratios differ by rounding
    ratios, expected = ([row.pop('logratio') for row in rows] for rows in (ours, theirs))
    assert ours == theirs and len(ours) == 6 and ratios == pytest.approx(expected, abs=1e-4)
    whole, again = runs / where / 'samples', runs / where / f'from_{where}'
    assert metrics(whole) == metrics(again) and same_bits(whole / 'model', again / 'model')
    same(runs / where / 'from_one', runs / 'one/samples')


@pytest.mark.parametrize(('name', 'words'), [('gpt2', 'GPT2LMHeadModel has no tensor-parallel plan'), ('three', '3 attention heads'),
                                             ('uneven', 'do not divide by 4')])  # fmt: skip
def test_models_that_cannot_be_cut(runs, name, words):
    assert words in (runs / f'{name}.txt').read_text()
    assert not (runs / 'tp2' / name / 'model').exists()


@pytest.mark.parametrize(('flags', 'words'), [
    ('--tp=2', 'tp=2 needs a multiple of 2 ranks, not 1'), ('--tp=2 --lora_rank=2', 'tp and lora_rank do not go together'),
    ('--tp=0', 'tp must be at least 1'), ('--tp=2 --shard=none', 'tp needs shard=full'), ('--attn=moon', 'attn must be one of'),
    ('--cpu_offload --shard=grads', 'cpu_offload needs shard=full'), ('--attn=sdpa --pack', '--pack has no effect'),
    ('--attn=flash_attention_2', 'LlamaForCausalLM cannot use attention by flash_attention_2'),
    ('--shard=some', 'shard must be one of auto, none, grads, full'), ('--device_map=moon', 'device_map must be one of'),
    ('--device_map=balanced', 'the toy model is made here'), ('--device_map=balanced RANK=0', 'start without torchrun'),
    ('--device_map=balanced --dtype=bfloat16', 'device_map computes in float32'),
    ('--device_map=balanced --cpu_offload', '--cpu_offload has no effect'),
    ('--device_map=balanced --shard=none', '--shard has no effect'),
])  # fmt: skip
def test_sentences(tmp_path, monkeypatch, flags, words):
    if 'RANK=0' in flags:
        monkeypatch.setenv('RANK', '0')
    with pytest.raises(UserError, match=words):
        run_script(*DPO, *ADAM, f'--out_dir={tmp_path}/run', *flags.removesuffix('RANK=0').split())


@pytest.mark.parametrize(('ranks', 'gigabytes', 'half', 'train', 'mode'), [
    (1, 0.1, False, True, 'none'), (2, 1.29, False, True, 'none'), (2, 1.27, False, True, 'full'), (4, 1.29, False, True, 'full'),
    (2, 0.33, False, False, 'none'), (2, 0.31, False, False, 'full'), (2, 0.17, True, False, 'none'),
])  # fmt: skip
def test_which_models_are_replicated(monkeypatch, ranks, gigabytes, half, train, mode):
    """Ten million weights take 160 MB to train, and 40 or 20 MB if frozen: a quarter of a rank's memory must hold that."""
    model, device = torch.nn.Linear(10**4, 10**3, bias=False), torch.device('cpu')
    if ranks > 1:
        monkeypatch.setenv('LOCAL_WORLD_SIZE', f'{ranks}')
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: ranks)
    monkeypatch.setattr(room, 'machine_memory', lambda free=False: gigabytes * 1e9)
    assert room.free_memory() == gigabytes * 1e9 // ranks
    assert room.choose_mode(model, 'auto', train, half, device, False) == mode
    assert room.choose_mode(model, 'grads', train, half, device, False) == 'grads'
    assert room.choose_mode(model, 'auto', train, half, device, True) == 'full'


def test_device_map_reaches_transformers(monkeypatch, tmp_path):
    """Policy and reference are loaded with it, FSDP is not used, and what hangs on devices moves to the right one."""
    seen, load = [], transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, 'from_pretrained',
                        lambda *a, **k: seen.append(k.get('device_map')) or load(*a, **k))  # fmt: skip
    flags = [f'--model={tiny_model(tmp_path / "llama", "llama")}', '--device_map=balanced']
    scope = run_script(*DPO, *ADAM, f'--out_dir={tmp_path}/run', *flags)
    assert seen == ['balanced', 'balanced']
    policy = scope['run'].policy
    assert type(policy).__name__ == 'LlamaForCausalLM'
    assert {type(p) for p in policy.parameters()} == {torch.nn.Parameter}
    assert json.loads((tmp_path / 'run/config.json').read_text())['config']['device_map'] == 'balanced'
