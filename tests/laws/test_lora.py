"""Adapters: off they are the reference, on they train by the same laws as whole models, and what is written loads elsewhere."""

import math
import sys
from functools import partial

import peft
import pytest
import torch
import transformers
from helpers import launch, metrics, read_jsonl, run_script, same_bits, tensors, tiny_model
from ties import same_runs, same_weights

import data
import fsdp
from configurator import UserError
from hf import lora, parts
from hf.load import load_model
from rl import divergences
from runtime import ranks

COMMON = ['--batch_size=12', '--n_examples=24', '--n_eval_examples=8', '--do_first_eval=false', '--warmup_steps=1',
          '--max_grad_norm=0.5', '--seed=3', '--max_length=64', '--max_prompt_length=32']  # fmt: skip
ADAM = ['--lr=1e-2', '--lora_rank=4']
DPO, SFT, REWARD = ([script, *COMMON, *ADAM] for script in ('dpo.py', 'sft.py', 'reward.py'))
PPO = ['ppo.py', *(flag for flag in COMMON if not flag.startswith('--max_length')), *ADAM, '--reward_model=gold',
       '--minibatch_size=6', '--ppo_epochs=2', '--max_new_tokens=6', '--model=llama']  # fmt: skip
GRPO = [*PPO, '--loss=grpo', '--group_size=3', '--kl_coef=0.3']
GRPO[GRPO.index('--reward_model=gold')] = '--reward_model=one/reward/model'  # gold gives every answer of a tiny model 0
MANY, SAMPLE = '--max_tokens=150', ['--sample_during_eval', '--n_eval_model_samples=3', '--max_new_tokens=6']
CASES = {
    'dpo': [*DPO, '--model=llama', '--save_every=12'],
    'tdpo2': [*DPO, '--model=llama', '--loss=tdpo2'],
    'cached': [*DPO, '--model=gpt_neox', '--cache_ref', '--lora_targets=query_key_value,dense'],
    'sft': [*SFT, '--model=gpt2', '--optimizer=RMSprop', '--lora_alpha=2'],
    'reward': [*REWARD, '--model=llama', '--center_coef=0.1', '--save_every=12'],
    'ppo': [*PPO, '--save_every=12'],
    'grpo': GRPO,  # after reward
    'on': [*DPO, '--model=one/dpo/adapter', '--save_every=12'],  # after dpo
}
ALONE = {  # one process
    'samples': [*DPO, '--model=llama', *SAMPLE],
    'samples_before': [*DPO[:-2], '--lr=0.0', '--lora_rank=4', '--model=llama', *SAMPLE],
    'padded': [*DPO, '--model=llama', '--pack=false'],
    'two_models': [*DPO, '--model=llama', '--loss=tdpo2', '--ref_model=llama'],
    'uncached': [*DPO, '--model=gpt_neox', '--lora_targets=query_key_value,dense'],
    'half': [*DPO, '--model=llama', '--dtype=bfloat16'],
    'mapped': [*DPO, '--model=llama', '--device_map=balanced'],
    'ppo_eager': [*PPO, '--attn=eager', '--activation_checkpointing'],
    'ppo_two_models': [*PPO, '--ref_model=llama'],
    'ppo_own': [*PPO, '--critic=own', '--save_every=12'],
    'ppo_on': [*PPO, '--model=one/dpo/adapter'],
    'reward_on': [*REWARD, '--model=one/reward/adapter'],
    'on_cached': [*CASES['on'], '--cache_ref'],
    'on_half': [*CASES['on'], '--dtype=bfloat16'],
    'on_samples': [*CASES['on'], *SAMPLE],
    'on_two_models': [*CASES['on'], '--ref_model=one/dpo/model'],
}
# without --lora_rank adapters are merged: the same as the models that runs have left
for kind in ('adapter', 'model'):
    ALONE[f'whole_{kind}'] = [*DPO[:-1], f'--model=one/dpo/{kind}', f'--ref_model=one/dpo/{kind}']
    ALONE[f'grpo_{kind}'] = [w.replace('reward/model', f'reward/{kind}') for w in GRPO]
    ALONE[f'reward_{kind}'] = [*REWARD[:-1], f'--model=one/reward/{kind}']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Every case on one process, and on two ranks in several microbatches; and five that died and went on."""
    folder = tmp_path_factory.mktemp('lora')
    for name in ('llama', 'gpt_neox', 'gpt2'):
        tiny_model(folder / name, name)

    def command(run, words, *flags):
        paths = ('--model=', '--ref_model=', '--reward_model=one')
        given = {w.partition('=')[0]: w for w in words}
        words = [w.replace('=', f'={folder}/') if w.startswith(paths) else w for w in given.values()]
        return [*words, *flags, f'--out_dir={folder}/{run}']

    one = [command(f'one/{name}', words) for name, words in (CASES | ALONE).items()]
    launch(0, one, folder)
    two = [command(f'two/{name}', words, '--shard=full', MANY) for name, words in CASES.items()]
    two += [command('two/dropout', CASES['dpo'], '--lora_dropout=0.3', MANY)]
    for name, flags in (('dpo', []), ('dropout', ['--lora_dropout=0.3']), ('reward', []), ('ppo', []), ('on', [])):
        two += [['cut', f'{folder}/two/{name}', f'{folder}/two/{name}_resumed', 12]]
        flags = [*flags, MANY, f'--shard={"none" if name == "dropout" else "full"}']
        two += [command(f'two/{name}_resumed', CASES.get(name, CASES['dpo']), *flags)]
    launch(2, two, folder)
    return folder


def adapter(run):
    return tensors(run / 'adapter')


BY_ANOTHER_WAY = {'padded': 'dpo', 'mapped': 'dpo', 'ppo_eager': 'ppo', 'cached': 'uncached', 'on_two_models': 'on',
                  'on_cached': 'on'}  # fmt: skip


@pytest.mark.parametrize(('run', 'other'), [(f'two/{case}', f'one/{case}') for case in CASES] + [
    (f'one/{case}', f'one/{base}') for case, base in BY_ANOTHER_WAY.items()])  # fmt: skip
def test_sharding_law(runs, run, other):
    """As tests/test_law.py, for adapters: norms, metrics, and the adapters after the last step."""
    same_runs(runs / run, runs / other, rel=5e-4, abs=5e-5)
    theirs = adapter(runs / other)
    assert all(w.norm() > 0 for w in theirs.values())
    same_weights(adapter(runs / run), theirs, 1e-5)


def answers(run, name):
    return [row['response'] for row in read_jsonl(run / 'samples.jsonl') if row['generator'] == name]


def test_adapters_off_are_a_second_model(runs):
    """IDENTICAL compares the numbers with those of a reference loaded beside the policy."""
    one = runs / 'one'
    gaps = [row['kl_train/samples'] for row in metrics(one / 'ppo', 'train')]
    assert gaps[0] == 0 != gaps[1]
    assert [row['rewards_train/margins'] for row in metrics(one / 'dpo')[:2]] == [0, 0]
    # the reference's samples are those of the model before training; the policy's are others by now
    before = answers(one / 'samples_before', 'policy')
    assert before == answers(one / 'samples_before', 'reference') == answers(one / 'samples', 'reference')
    assert before != answers(one / 'samples', 'policy')
    assert metrics(one / 'samples')[-1]['kl_eval/samples'] > 0.1


def test_an_adapter_goes_on(runs):
    """Its reference is what it was: before the first step nothing differs, and then as if that lay beside it as a model."""
    one = runs / 'one'
    for case in ('on', 'on_half', 'on_cached'):
        (row,) = metrics(one / case, 'check')
        # the cache was made in larger microbatches
        rounding = 1e-6 if case == 'on_cached' else 0
        assert max(abs(row[f'rewards_train/{side}']) for side in ('chosen', 'rejected')) <= rounding
        assert row['loss/train'] == pytest.approx(math.log(2), rel=1e-6)
    # it begins where the other run has ended
    assert answers(one / 'samples', 'policy') == answers(one / 'on_samples', 'reference')
    gaps = [row['kl_train/samples'] for row in metrics(one / 'ppo_on', 'train')]
    assert gaps[0] == 0 != gaps[1]
    again, ended = (metrics(one / case)[0]['loss/train'] for case in ('reward_on', 'reward_model'))
    assert again == pytest.approx(ended, rel=1e-5)


IDENTICAL = {f'two/{case}_resumed': f'two/{case}' for case in ('dpo', 'dropout', 'reward', 'ppo', 'on')}
# an adapter merged as a model to train, as reference and reward model: what the folder with the merged weights gives
IDENTICAL |= {f'one/{case}_adapter': f'one/{case}_model' for case in ('whole', 'grpo', 'reward')}
# policy and reference in one model, or in two
IDENTICAL |= {'one/tdpo2': 'one/two_models', 'one/ppo': 'one/ppo_two_models'}


@pytest.mark.parametrize('run', IDENTICAL)
def test_same_bits(runs, run):
    ours, theirs = runs / run, runs / IDENTICAL[run]
    assert metrics(ours) == metrics(theirs) and same_bits(ours / 'model', theirs / 'model')
    assert same_bits(ours / 'adapter', theirs / 'adapter')


def test_half_precision_and_dropout(runs):
    found = [row['rewards_train/chosen'] for row in metrics(runs / 'one/half', 'check')]
    assert found == [0.0] and all(w.dtype == torch.float32 for w in adapter(runs / 'one/half').values())
    # dropout is in training only
    plain, dropped = metrics(runs / 'two/dpo'), metrics(runs / 'two/dropout')
    assert dropped[0] == plain[0]  # the check before the first step
    assert dropped[1]['rewards_train/margins'] == 0  # B is 0: whatever A's input is
    assert dropped[1]['grad_norm'] != plain[1]['grad_norm']


PARTS = {'two/dpo': None, 'two/reward': 'score', 'two/ppo': 'value_head', 'one/ppo_own': 'critic'}


@pytest.mark.parametrize('run', PARTS)
def test_checkpoint_holds_what_trains(runs, run):
    names, whole = tensors(runs / run / 'checkpoints', '*/*.safetensors').keys(), PARTS[run]
    others = {name for name in names if 'lora_' not in name}
    assert names > others and bool(others) == bool(whole) and all(f'.{whole}.' in name for name in others)
    assert {name.partition('.')[0] for name in names} == {'model', 'optimizer'}


WRITTEN = {'two/dpo': 'llama', 'two/cached': 'gpt_neox', 'two/sft': 'gpt2', 'two/reward': 'llama',
           'one/ppo_own': 'llama'}  # fmt: skip


@pytest.mark.parametrize('case', WRITTEN)
def test_what_is_written(runs, case):
    """The adapter folder on the base model, by PEFT, gives the merged folder's logits, which are not the base's."""
    load, n, base = transformers.AutoModelForCausalLM.from_pretrained, 2, WRITTEN[case]
    if case == 'two/reward':  # without a pad token, transformers scores one answer at a time
        load, n = partial(transformers.AutoModelForSequenceClassification.from_pretrained, num_labels=1), 1
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (n, 24))
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(load(runs / base), runs / case / 'adapter').eval()(ids).logits
        merged, plain = (load(folder).eval()(ids).logits for folder in (runs / case / 'model', runs / base))
    assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max().clamp(min=1)
    assert (merged - plain).abs().max() > 1e-3
    layers = {name.split('.')[-3] for name in adapter(runs / case)}
    assert base != 'gpt_neox' or layers == {'query_key_value', 'dense'}
    assert (runs / case / 'model/tokenizer.json').exists()


OPTIONS = {'rank': 4, 'alpha': 16.0, 'dropout': 0.0, 'targets': None}


def trained(policy):
    for name, p in policy.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(p.data, 0.0, 0.1)
    return policy


def test_adapters_off_equal_the_base_exactly(tmp_path):
    device = ranks.setup()[2]
    build = partial(load_model, tiny_model(tmp_path, 'llama'))
    policy = trained(fsdp.shard(partial(build, adapters=OPTIONS), device, cpu_offload=True))
    base = fsdp.shard(build, device, train=False, cpu_offload=True)
    prompt, answers = torch.arange(5, 8).numpy(), [torch.arange(8, 12).numpy(), torch.arange(12, 14).numpy()]
    batch = data.pack([(prompt, answers)], [0])
    with torch.no_grad():
        expected = base.response_logps(batch, divergences.kl, base.hidden_and_head(batch))
        assert not policy.response_logps(batch)[0].equal(expected[0])
        with lora.adapters_off(policy):
            assert policy.response_logps(batch)[0].equal(expected[0])
            reference = policy.hidden_and_head(batch)
    ours = policy.response_logps(batch, divergences.kl, reference)
    assert ours[2].equal(expected[0]) and (ours[1] > 0.01).all()
    ours[0].sum().backward()
    for name, p in policy.named_parameters():
        moves = p.grad is not None and p.grad.full_tensor().abs().sum() > 0
        assert moves == p.requires_grad == ('lora_' in name), name
    # frozen weights are kept in the compute type; adapters are drawn from the seed
    build = partial(build, adapters=OPTIONS)
    for name, p in fsdp.shard(build, device, dtype='bfloat16', mode='full').named_parameters():
        assert p.requires_grad == ('lora_' in name)
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    a, b, c = (dict(build(seed=seed).named_parameters()) for seed in (1, 1, 2))
    key = next(k for k in a if 'lora_A' in k)
    assert a[key].equal(b[key]) and not a[key].equal(c[key])


def test_head_beside_the_adapters(tmp_path):
    """A reward model's head trains as it is, and is in the adapter folder and the merged model. Layers beside the blocks get none."""
    base = tiny_model(tmp_path / 'base', 'llama')
    net = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    net.other = torch.nn.ModuleDict({'q_proj': torch.nn.Linear(2, 2)})
    wrapped = trained(lora.adapt(net, None, OPTIONS))
    assert not any('other' in name for name, p in wrapped.named_parameters() if p.requires_grad)
    weights = {n: p.detach() + 0.5 for n, p in wrapped.named_parameters() if p.requires_grad}
    (head,) = (n for n in weights if 'lora_' not in n)
    # what a script reads is what trains
    assert 'score' in head and parts.core(wrapped).score.weight is wrapped.get_parameter(head)
    lora.write(wrapped, weights, tmp_path / 'adapter')
    assert wrapped.merge_and_unload().score.weight.equal(weights[head])
    assert any('score' in name for name in adapter(tmp_path))


@pytest.mark.parametrize(('flags', 'words'), [
    ('--lora_rank=2 --lora_targets=q_proj,nothing', 'the linear layers in the blocks of LlamaForCausalLM are down_proj gate'),
    ('--lora_rank=2 --lora_targets=lm_head', "cannot put adapters on 'lm_head'"), ('--lora_rank=0', 'lora_rank must be at least 1'),
    ('--lora_rank=2 --lora_targets=', 'cannot put adapters on '), ('--lora_alpha=2', '--lora_alpha has no effect: there is no --lora_'),
    ('--quantize=4bit', 'weights of 4 bits do not train; add --lora_rank'),
    ('--quantize=4bit --lora_rank=2 --device_map=balanced', 'quantize and device_map do not go together'),
    ('--lora_rank=2 --lora_dropout=1', 'lora_dropout must be at least 0 and at most 0.9'),
    ('--lora_rank=2 --quantize=4bit', 'needs bitsandbytes .*: pip install bitsandbytes, or leave it out'),
    ('--lora_rank=2', 'adapters need a package that is not installed: pip install peft'),
])  # fmt: skip
def test_sentences(tmp_path, monkeypatch, flags, words):
    # as if these were not installed
    for name in ('bitsandbytes.functional', *['peft'] * ('peft' in words)):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=words):
        run_script('dpo.py', *COMMON, f'--out_dir={tmp_path}/run', *flags.split())
