"""Adapters of PEFT's in the place of a model: merged as PEFT computes them, and one sentence where they are of no use."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import refused, tensors, tiny_model

import fsdp
from configurator import UserError
from hf import adapter, check, load
from hf.ties import ties
from text import toy

RANK = {'rank': 4, 'alpha': 16.0, 'dropout': 0.0, 'targets': None}
IDS = torch.arange(5, 29).view(2, 12)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapter, '_found', {})
    adapter.say_once.cache_clear()
    fsdp.setup()


def write(kind='llama', reward=False, folder='run/adapter', **options):
    """A model './base', and an adapter of it that PEFT has written with all its weights drawn anew. Returns its logits."""
    tiny_model('base', kind, tie_word_embeddings=True)
    auto = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    extra = {'num_labels': 1, 'pad_token_id': 1} if reward else {}
    options = {'r': 4, 'target_modules': 'all-linear', 'task_type': 'SEQ_CLS' if reward else 'CAUSAL_LM'} | options
    model = peft.get_peft_model(auto.from_pretrained('base', **extra), peft.LoraConfig(**options)).eval()
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p.data, 0.0, 0.1)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS[:1] if reward else IDS).logits


KINDS = {
    'plain': {},
    'rslora, ranks and alphas': {'use_rslora': True, 'rank_pattern': {'q_proj': 2}, 'alpha_pattern': {'v_proj': 9}},
    'dropout': {'lora_dropout': 0.5, 'layers_to_transform': [1], 'target_modules': ['v_proj']},
    'gpt2': {'kind': 'gpt2', 'fan_in_fan_out': True, 'target_modules': ['c_attn', 'c_proj']},
    'whole modules': {'modules_to_save': ['embed_tokens', 'norm']},
    'whole head': {'modules_to_save': ['lm_head']},
    'head': {'target_modules': ['q_proj', 'lm_head']},
    'embedding': {'target_modules': ['q_proj', 'embed_tokens']},
}


@pytest.mark.parametrize('name', KINDS)
def test_merged_as_peft_computes(name, capsys):
    """The logits are the adapter's own, whatever it changes; the head stays the embedding only where it still is."""
    expected = write(**KINDS[name])
    model = load.load_model('run/adapter', tokenizer=load.load_tokenizer('run/adapter'))
    with torch.no_grad():
        assert (model(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    one = name not in ('whole modules', 'whole head', 'head', 'embedding')
    assert bool(ties(model)) == model.config.tie_word_embeddings == one
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    load.load_model('run/adapter', empty=True)
    assert capsys.readouterr().out.count('adapter: run/adapter, rank 4, is merged into its model base') == 1


@pytest.mark.parametrize('adapters', [None, RANK], ids=['merged', 'goes on'])
def test_reward_model(adapters, capsys):
    expected = write(reward=True)
    tokenizer = load.separate_pad(load.load_tokenizer('run/adapter'))
    model = load.load_reward('run/adapter', tokenizer, adapters=adapters)
    with torch.no_grad():
        assert model(IDS[:1]).logits.item() == pytest.approx(expected.item(), rel=1e-5)
    assert 'drawn from seed' not in capsys.readouterr().out
    # of a language model it is the base of a new one
    write(folder='lm/adapter')
    with pytest.raises(UserError, match='no reward model but a language model'):
        load.load_reward('lm/adapter', tokenizer)
    merged = load.load_model('lm/adapter')
    model = load.load_reward('lm/adapter', tokenizer, new_head=True)
    assert model.model.layers[1].mlp.up_proj.weight.equal(merged.model.layers[1].mlp.up_proj.weight)


def test_with_its_own_tokenizer():
    write()
    assert load.load_tokenizer('run/adapter').chat_template is None
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = 'mine'
    tokenizer.save_pretrained('run/adapter')
    assert load.load_tokenizer('run/adapter').chat_template == 'mine'


@pytest.mark.parametrize('options', [KINDS['whole head'], KINDS['head'], KINDS['embedding']])
def test_does_not_go_on_outside_the_blocks(options):
    write(**options)
    with pytest.raises(UserError, match='outside the blocks: leave out --lora_rank, which merges it'):
        load.load_model('run/adapter', adapters=RANK)


def change(**options):
    def damage():
        file = Path('run/adapter/adapter_config.json')
        file.write_text(json.dumps(json.loads(file.read_text()) | options))

    return damage


def weights(edit):
    def damage():
        from safetensors.torch import save_file

        found = tensors('run/adapter')
        edit(found)
        save_file(found, 'run/adapter/adapter_model.safetensors')

    return damage


HERE = 'which is not supported here: merge it with peft'
MISTAKES = {
    'DoRA': (change(use_dora=True), [], f'has use_dora=True, {HERE}'),
    'bias': (change(bias='lora_only'), [], f"has bias='lora_only', {HERE}"),
    'PiSSA': (change(init_lora_weights='pissa'), [], f"has init_lora_weights='pissa', {HERE}"),
    'another method': (change(peft_type='IA3'), [], f"has peft_type='IA3', {HERE}"),
    'another task': (change(task_type='TOKEN_CLS'), [], 'TOKEN_CLS'),
    'newer than this': (change(use_magic={'a': 1}), [], "use_magic={'a': 1}"),
    'its own revision': (change(revision='v2'), [], "revision='v2'"),
    'no model': (change(base_model_name_or_path=''), [], 'does not say its r, its lora_alpha and its model'),
    'no rank': (change(r=0), ['--lora_rank=4'], 'does not say its r'),
    'no alpha': (change(lora_alpha=None), ['--lora_rank=4'], 'does not say its r, its lora_alpha'),
    'damaged': (lambda: Path('run/adapter/adapter_config.json').write_text('{"r": 4,'), [], 'adapter_config.json is not to be read'),
    'model gone': (lambda: shutil.move('base', 'moved'), [], "model of the adapter 'run/adapter' is missing: there is no model folder"),
    'of an adapter': (change(base_model_name_or_path='run/adapter'), [], 'which is an adapter, too'),
    'a pickle': (lambda: shutil.move('run/adapter/adapter_model.safetensors', 'run/adapter/adapter_model.bin'), [], 'has no adapter_model.saf'),
    'a layer less': (weights(lambda w: w.pop(min(w))), [], 'lacks weights: base_model.model.model.layers.0.mlp.down_proj.lora_A'),
    'a layer more': (weights(lambda w: w.update({'base_model.model.x.lora_A.weight': torch.ones(2)})), [], 'without a place in its model'),
    'other sizes': (weights(lambda w: w.update({min(w): torch.ones(4, 7)})), [], "cannot load the model 'run/adapter': Error"),
    'no number': (weights(lambda w: w[min(w)].fill_(torch.nan)), [], 'before the first step the loss is no number: weights of the model'),
    'another rank': (change(), ['--lora_rank=8'], 'has rank 4: --lora_rank=4 goes on with it'),
    'its alpha': (change(), ['--lora_rank=4', '--lora_alpha=3'], "has no effect: the adapter 'run/adapter' goes on with its own"),
    'a reward model': (change(task_type='SEQ_CLS'), [], 'is a reward model: a language model is needed'),
}  # fmt: skip


@pytest.mark.parametrize('name', MISTAKES)
def test_one_sentence(name):
    damage, flags, words = MISTAKES[name]
    write()
    damage()
    said = refused('dpo.py', '--model=run/adapter', '--out_dir=out', *flags)
    assert words in said
    # a run of ours has the way out beside it
    if HERE in words:
        tiny_model('run/model', 'llama')
        said = refused('dpo.py', '--model=run/adapter', '--out_dir=out')
        assert "name 'run/model' beside it, which is the whole model" in said


def test_where_its_model_lies():
    """The path counts from the working directory, else from the adapter's folder."""
    expected = write()
    change(base_model_name_or_path='../../base')()
    assert adapter.find('run/adapter').base == 'base'
    model = load.load_model('run/adapter')
    with torch.no_grad():
        assert (model(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_of_a_hub(monkeypatch):
    """Adapter and model by hub ids: the files come from the hub's cache."""
    write()
    change(base_model_name_or_path='some/base')()
    monkeypatch.setattr(check.hub, 'reachable', lambda: False)
    places = {'some/adapter': 'run/adapter', 'some/base': 'base'}

    def cached(name, file):
        path = Path(places[name], file)
        return str(path) if path.exists() else None

    monkeypatch.setattr(check, '_hub_file', cached)
    found = adapter.find('some/adapter')
    assert (found.base, found.folder) == ('some/base', Path('run/adapter'))
    with pytest.raises(UserError, match="model of the adapter 'some/adapter' is missing.*its cache does not have it"):
        places['some/base'] = 'nowhere'
        monkeypatch.setattr(adapter, '_found', {})
        adapter.find('some/adapter')


def test_what_a_run_is_made_of():
    """Its hashes are of the adapter and of its model, so that neither changes unseen."""
    write()
    config = {'model': 'run/adapter'}
    before, content = load.fingerprints(config)(), load.content('run/adapter')
    assert {'adapter_model.safetensors', 'adapter_config.json', 'base/model.safetensors'} <= before['model'].keys()
    tiny_model('base', 'llama', tie_word_embeddings=False)
    after = load.fingerprints(config)()
    changed = {name for name, found in after['model'].items() if before['model'][name] != found}
    assert changed == {'base/model.safetensors', 'base/config.json'}
    assert load.content('run/adapter') != content
