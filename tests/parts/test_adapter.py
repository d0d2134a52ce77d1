"""Adapters of PEFT's in the place of a model: merged as PEFT computes them, and one sentence where they are of no use."""

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import refused, tensors, tiny_model
from safetensors.torch import save_file

from configurator import Config, UserError
from hf import load, lora
from hf.ties import ties
from runtime import hub, ranks
from text import toy

RANK = {'rank': 4, 'alpha': 16.0, 'dropout': 0.0, 'targets': None}
IDS, CONFIG = torch.arange(5, 29).view(2, 12), Path('run/adapter/adapter_config.json')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lora, '_found', {})
    lora.say_once.cache_clear()
    ranks.setup()


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


def change(**options):
    CONFIG.write_text(json.dumps(json.loads(CONFIG.read_text()) | options))


def same_logits(model, expected):
    with torch.no_grad():
        assert (model(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


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
    same_logits(model, expected)
    outside = name in ('whole modules', 'whole head', 'head', 'embedding')
    assert bool(ties(model)) == model.config.tie_word_embeddings == (not outside)
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    # as transformers saves it, too
    model.save_pretrained('merged')
    same_logits(transformers.AutoModelForCausalLM.from_pretrained('merged'), expected)
    load.load_model('run/adapter', empty=True)
    assert capsys.readouterr().out.count('adapter: run/adapter, rank 4, is merged into its model base') == 1
    # it goes on inside the blocks alone
    if outside:
        with pytest.raises(UserError, match='outside the blocks: leave out --lora_rank, which merges it'):
            load.load_model('run/adapter', adapters=RANK)


@pytest.mark.parametrize('adapters', [None, RANK], ids=['merged', 'goes on'])
def test_reward_model(adapters, capsys):
    expected = write(reward=True)
    tokenizer = load.separate_pad(load.load_tokenizer('run/adapter'))
    model = load.load_reward('run/adapter', tokenizer, adapters=adapters)
    assert model(IDS[:1]).logits.item() == pytest.approx(expected.item(), rel=1e-5)
    assert 'drawn from seed' not in capsys.readouterr().out
    with pytest.raises(UserError, match='is a reward model: a language model is needed'):
        load.load_model('run/adapter')
    # of a language model it is the base of a new one
    write(folder='lm/adapter')
    with pytest.raises(UserError, match='no reward model but a language model'):
        load.load_reward('lm/adapter', tokenizer)
    both = load.load_model('lm/adapter'), load.load_reward('lm/adapter', tokenizer, new_head=True)
    merged, reward = (model.model.layers[1].mlp.up_proj.weight for model in both)
    assert reward.equal(merged)


def test_its_files():
    """Its tokenizer comes first; its model's path counts from the working directory, else from its folder; hashes are of both."""
    expected = write()
    assert load.load_tokenizer('run/adapter').chat_template is None
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = 'mine'
    tokenizer.save_pretrained('run/adapter')
    assert load.load_tokenizer('run/adapter').chat_template == 'mine'
    change(base_model_name_or_path='../../base')
    assert lora.find_adapter('run/adapter').base == 'base'
    same_logits(load.load_model('run/adapter'), expected)

    config = {'model': 'run/adapter'}
    before, content = load.fingerprints(config)['model'], lora.weights_hash('run/adapter')
    assert {'adapter_model.safetensors', 'adapter_config.json', 'base/model.safetensors'} <= before.keys()
    tiny_model('base', 'llama', tie_word_embeddings=False)
    after = load.fingerprints(config)['model']
    assert {name for name in after if before[name] != after[name]} == {'base/model.safetensors', 'base/config.json'}
    assert lora.weights_hash('run/adapter') != content


UNSUPPORTED = {'use_dora': True, 'bias': 'lora_only', 'init_lora_weights': 'pissa', 'peft_type': 'IA3', 'task_type': 'TOKEN_CLS',
               'use_magic': {'a': 1}}  # fmt: skip
INCOMPLETE = {'base_model_name_or_path': '', 'r': 0, 'lora_alpha': None}
MISSING = {'gone': "model of the adapter 'run/adapter' is missing: there is no model folder 'gone'",
           'run/adapter': "the model of the adapter 'run/adapter' is itself an adapter"}  # fmt: skip


def test_refused():
    """In a sentence each: options, then weights, then what goes on."""

    def said():
        with pytest.raises(UserError) as info:
            load.load_model('run/adapter')
        assert '\n' not in str(info.value)
        return str(info.value)

    write()
    good, incomplete = CONFIG.read_text(), 'does not say its r, its lora_alpha and its model'
    unsupported = 'has {}={!r}, which is not supported here: name the whole model'.format
    cases = [(key, value, unsupported(key, value)) for key, value in UNSUPPORTED.items()]
    cases += [(key, value, incomplete) for key, value in INCOMPLETE.items()]
    cases += [('base_model_name_or_path', base, words) for base, words in MISSING.items()]
    for key, value, words in cases:
        change(**{key: value})
        assert words in said()
        CONFIG.write_text(good)
    CONFIG.write_text(good[:20])
    assert incomplete in said()
    CONFIG.write_text(good)

    file, good = Path('run/adapter/adapter_model.safetensors'), tensors('run/adapter')
    first = min(good)
    for weights, words in (
        ({k: w for k, w in good.items() if k != first}, 'lacks weights: ' + first.removesuffix('.weight')),
        (good | {'base_model.model.x.lora_A.weight': torch.ones(2)}, 'without a place in its model'),
        (good | {first: torch.ones(4, 7)}, "the adapter 'run/adapter' does not fit base: size mismatch"),
    ):
        save_file(weights, file)
        assert words in said()
    dpo = 'dpo.py', '--model=run/adapter', '--out_dir=out'
    # the base model's own embedding beside the adapter, as PEFT saves it where that was resized: an export would lose it
    embedding = 'model.embed_tokens.weight'
    save_file(good | {f'base_model.model.{embedding}': tensors('base')[embedding] + 1}, file)
    assert 'outside the blocks' in refused(*dpo, '--lora_rank=4')
    save_file(good | {first: good[first].fill_(torch.nan)}, file)
    assert 'before the first step the loss is no number: weights of the model' in refused(*dpo)
    assert 'has rank 4: --lora_rank=4 goes on with it' in refused(*dpo, '--lora_rank=8')
    words = "has no effect: the adapter 'run/adapter' goes on with its own"
    assert words in refused(*dpo, '--lora_rank=4', '--lora_alpha=3')
    file.rename(file.with_suffix('.bin'))
    assert 'has no adapter_model.saf' in said()


def test_of_a_hub(monkeypatch):
    write()
    change(base_model_name_or_path='some/base')
    monkeypatch.setattr(hub, 'reachable', lambda: False)
    places = {'some/adapter': 'run/adapter', 'some/base': 'base'}
    monkeypatch.setattr(hub, 'file_of', lambda name, file: next(map(str, Path(places[name]).glob(file)), None))
    found = lora.find_adapter('some/adapter')
    assert (found.base, found.folder) == ('some/base', Path('run/adapter'))
    # the cache has no more than what has been asked for: of an adapter's tokenizer nothing before
    toy.tokenizer().save_pretrained('run/adapter')
    Path('cache').mkdir()

    def fetch(name, file):
        found = Path(places[name], file)
        if not found.exists():
            return None
        return shutil.copy(found, 'cache') if name == 'some/adapter' else str(found)

    monkeypatch.setattr(hub, 'file_of', fetch)
    monkeypatch.setattr(lora, '_found', {})
    asked = []
    monkeypatch.setattr(
        load.transformers.AutoTokenizer, 'from_pretrained', lambda name, **_: asked.append(name) or toy.tokenizer()
    )
    load.load_tokenizer('some/adapter')
    assert asked == ['some/adapter'] and lora.content_of('some/adapter') == 'cache+base'
    assert lora.content_of('some/base') == 'base'
    places['some/base'] = 'nowhere'
    monkeypatch.setattr(lora, '_found', {})
    with pytest.raises(UserError, match="model of the adapter 'some/adapter' is missing.*its cache does not have it"):
        lora.find_adapter('some/adapter')


def test_a_model_of_the_same_shape_is_another(capsys):
    """Our adapters know the content of the model that they were trained on."""
    tiny_model('base', 'llama')
    model = load.load_model('base', adapters=RANK)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in weights.values())
    assert re.fullmatch(rf'LoRA: {count:,} of [\d,]+ weights train, on down_proj gate_proj .*', lora.describe(model))
    lora.write(model, weights, Path('run/adapter'))
    assert not Path('run/adapter/README.md').exists()
    load.load_model('run/adapter')
    assert 'was trained on' not in capsys.readouterr().out
    tiny_model('base', 'llama', initializer_range=0.3)
    load.load_model('run/adapter', adapters=RANK)
    assert 'warning: base is not the model that the adapter run/adapter was trained on' in capsys.readouterr().out
    # a frozen copy only where it is the reference
    assert load.load_model('run/adapter', adapters=RANK).peft_config.keys() == {'default', 'reference'}
    assert load.load_model('run/adapter', adapters=RANK | {'keeps_copy': False}).peft_config.keys() == {'default'}
    unset = 'quantize', 'lora_alpha', 'lora_dropout', 'lora_targets'
    options = dict.fromkeys(unset) | {'model': 'toy', 'lora_rank': 2}
    for ref_model, keeps in (({'ref_model': None}, True), ({'ref_model': 'base'}, False), ({}, False)):
        assert lora.adapter_options(Config(options | ref_model))['keeps_copy'] == keeps


@pytest.mark.parametrize(('options', 'expected'), [
    ({}, None), ({'quantize': '4bit'}, RANK), ({'model': 'saved'}, RANK), ({'quantize': '4bit', 'ref_model': 'other'}, None),
])  # fmt: skip
def test_the_reference_is_built_with_adapters_where_the_policy_starts_as_another_model(options, expected, monkeypatch):
    """With 4-bit weights or a saved adapter. Its cached log-probs have the key of what is built."""
    monkeypatch.setattr(lora, 'find_adapter', lambda name: name == 'saved')
    assert lora.reference_options({'quantize': None, 'model': 'toy', 'ref_model': None} | options, RANK) is expected
