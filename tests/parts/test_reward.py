"""Reward models: scores as transformers gives them, margins, export, learning; tests/laws have its laws."""

import json
import types
from functools import partial

import numpy as np
import pytest
import torch
import transformers as hf
from helpers import metrics, run_script, tiny_model, write_jsonl

import data
import fsdp
from configurator import UserError
from feedback import score
from hf import attention, export, load, probe
from rl import heads
from runtime import ranks
from text import formats, tokenise, toy
from text.examples import Examples, in_words

EOS, FULL = toy.tokenizer().eos_token_id, len(toy.tokenizer())  # FULL: rows of an embedding without a spare one
CONFIGS = {'llama': {'tie_word_embeddings': True}, 'gpt_neox': {}, 'qwen2': {}, 'gpt2': {'vocab_size': FULL},
           'mistral': {'sliding_window': 4}}  # fmt: skip
# lengths of the prompt and its answers, without their ends
SHAPES = [(5, (7, 3)), (1, (2, 9)), (12, (1, 1)), (2, (20, 4))]
LAYOUTS = ({}, {'share_prefix': False}, {'pad': True})


@pytest.fixture(scope='module', autouse=True)
def process_group():
    ranks.setup()


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A folder of a language model for every architecture."""
    folder = tmp_path_factory.mktemp('models')
    for name, options in CONFIGS.items():
        tiny_model(folder / name, name, max_position_embeddings=64, **options)
    return folder


def builder(folder, **options):
    """(its tokenizer, a function that loads a reward model from a folder)."""
    tokenizer = load.separate_pad(load.load_tokenizer(str(folder)))
    return tokenizer, partial(load.load_reward, str(folder), tokenizer, **options)


def make(folder, **options):
    tokenizer, build = builder(folder, **options)
    return build(), tokenizer


def pairs():
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 300, p), [np.append(rng.integers(0, 300, n), EOS) for n in a]) for p, a in SHAPES]


def items():
    return [(prompt, answer) for prompt, answers in pairs() for answer in answers]


def plain_scores(net, tokenizer, items):
    """transformers' own scores, in one batch that its tokenizer pads."""
    ids = [[*map(int, p), *map(int, a)] for p, a in items]
    return net(**tokenizer.pad({'input_ids': ids}, return_tensors='pt'), use_cache=False).logits[:, 0]


# ---- scores ----


@pytest.mark.parametrize('name', CONFIGS)
def test_scores_and_gradients_are_those_of_transformers(folders, name):
    """Packed with shared prompts, packed, and padded: as AutoModelForSequenceClassification, batched and one by one."""
    net, tokenizer = make(folders / name, new_head=True)
    weights = torch.randn(8, generator=torch.Generator().manual_seed(1))

    def gradient(scores):
        grads = torch.autograd.grad((weights * scores).sum(), list(net.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    attention.set_attention(net, packed=False)
    expected = plain_scores(net, tokenizer, items())
    slope = gradient(expected)
    single = [net(input_ids=torch.tensor([[*p, *a]])).logits[0, 0].item() for p, a in items()]
    assert expected.tolist() == pytest.approx(single, abs=1e-5) and expected.std() > 0.01
    for options in LAYOUTS:
        batch = data.pack(pairs(), range(4), **options)
        assert (batch.ids.flatten()[batch.last] == EOS).all()
        attention.set_attention(net, packed='pad' not in options)
        scores = heads.response_scores(net, batch)
        assert scores.dtype == torch.float32 and scores._base is None  # FSDP2 cannot hook a view
        assert (scores - expected).abs().max() < 1e-5, options
        assert (gradient(scores) - slope).norm() < 1e-5 * slope.norm(), options


@pytest.mark.parametrize('name', CONFIGS)
def test_exported_folder_is_plain_transformers(folders, name, tmp_path, capsys):
    """load_reward -> shard -> export -> AutoModelForSequenceClassification and score.py: the same scores, also padded."""
    load.say_once.cache_clear()
    tokenizer, build = builder(folders / name, new_head=True, seed=7)
    net = fsdp.shard(build, torch.device('cpu'), cpu_offload=True)
    with torch.no_grad():
        ours = net.response_scores(data.pack(pairs(), range(4)))
    export.write_model(net, tokenizer, build, tmp_path / 'model')
    said = capsys.readouterr().out
    assert 'a new scalar head, drawn from seed 7' in said and ('one row more' in said) == (name == 'gpt2')

    # by transformers
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'model').eval()
    config = json.loads((tmp_path / 'model/config.json').read_text())
    assert config['architectures'] == [type(plain).__name__] and '"packed"' not in json.dumps(config)
    assert plain.config.num_labels == 1 and plain.config.pad_token_id == FULL != EOS
    with torch.no_grad():
        own = plain_scores(plain, hf.AutoTokenizer.from_pretrained(tmp_path / 'model'), items())
    assert (own - ours).abs().max() < 1e-5

    # by score.py, in one batch, in microbatches of a pair or less, for answers without their ends, and padded
    scorer, tokenizer = score.load_scorer(str(tmp_path / 'model'), torch.device('cpu'))
    assert 'padded' not in capsys.readouterr().out
    same = pytest.approx(own.tolist(), abs=1e-5)
    assert score.scores(scorer, tokenizer, items(), 4096).tolist() == same
    again = score.scores(scorer, tokenizer, [(p, a[:-1]) for p, a in items()[::-1]], 20)
    assert again.dtype == np.float32 and again[::-1].tolist() == same
    with pytest.raises(UserError, match='item 1: .*60 . 6 tokens.*64'):
        score.scores(scorer, tokenizer, [items()[0], (range(60), range(5))], 4096)
    # a rank without an answer takes part, and adds nothing to what the others have
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, 'data_rank', lambda: (1, 2))
        assert score.scores(scorer, tokenizer, items()[:1], 4096).tolist() == [0]
    attention.set_attention(scorer, packed=False)
    assert score.scores(scorer, tokenizer, items(), 40).tolist() == same


def test_the_place_of_the_last_token(folders, monkeypatch):
    """An answer of one token is predicted by the prompt. The check at the start compares with transformers' own forward."""
    one = data.pack([([5, 6], [[7], [8], [9, 10]])], [0])
    assert one.last.tolist() == [2, 3, 5]
    net, _ = make(folders / 'llama', new_head=True)
    net.response_scores = types.MethodType(heads.response_scores, net)
    batches = [data.pack(pairs(), range(4), pad=pad) for pad in (False, True)]
    monkeypatch.setattr(probe, 'two_layouts', lambda *_: batches)
    assert probe.can_pack(net, None, 'cpu')
    for batch in batches:
        batch.last -= 1
    with pytest.raises(UserError, match='other scores'):
        probe.can_pack(net, None, 'cpu')


def test_padded_scores_in_bfloat16(folders):
    """Packing that nobody wants is tried with the tolerance of the type that the forward computes in."""
    _, build = builder(folders / 'llama', new_head=True)
    for mode in ('none', 'full'):
        net = fsdp.shard(build, torch.device('cpu'), dtype='bfloat16', mode=mode)
        assert not probe.can_pack(net, Examples.of(pairs()), 'cpu', wanted=False)


# ---- heads ----


def test_heads(folders, tmp_path, capsys):
    """A new one depends on the seed alone; a trained one is kept."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    drawn = [make(folders / 'qwen2', new_head=True, seed=s)[0].score.weight for s in (1, 1, 2)]
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2]) and torch.get_rng_state().equal(state)
    assert 'a new scalar head, drawn from seed 2' in capsys.readouterr().out
    net, tokenizer = make(folders / 'gpt2', new_head=True)
    net.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()
    again, saved = make(tmp_path, seed=9)
    assert again.score.weight.equal(net.score.weight) and len(saved) == len(tokenizer) == FULL + 1
    assert net.get_input_embeddings().weight[FULL].eq(0).all() and 'new' not in capsys.readouterr().out
    # also where the config says nothing of it
    config = json.loads((tmp_path / 'config.json').read_text())
    for key in ('architectures', 'id2label', 'label2id'):
        del config[key]
        (tmp_path / 'config.json').write_text(json.dumps(config))
        assert make(tmp_path)[0].score.weight.equal(net.score.weight) and 'new' not in capsys.readouterr().out
    with pytest.raises(UserError, match='is a reward model: a language model is needed here'):
        load.load_model(str(tmp_path))


def without(net, name):
    return {key: value for key, value in net.state_dict().items() if key != name}


def test_what_is_no_reward_model_and_no_language_model(folders, tmp_path):
    """dpo.py and sft.py would train from a head that transformers makes up."""
    with pytest.raises(UserError, match='no reward model but a language model'):
        make(folders / 'llama')
    for key, value, lost, words in [
        ('num_labels', 2, None, '2 outputs'),
        ('pad_token_id', EOS, None, 'one token before that'),
        ('use_cache', False, 'score.weight', 'lacks weights: score.weight'),
    ]:
        net, tokenizer = make(folders / 'llama', new_head=True)
        tokenizer.save_pretrained(tmp_path)
        setattr(net.config, key, value)
        net.save_pretrained(tmp_path, state_dict=without(net, lost))
        with pytest.raises(UserError, match=words):
            make(tmp_path, new_head=True)
    for name in 'qwen2', 'gpt2':
        make(folders / name, new_head=True)[0].save_pretrained(tmp_path)
        with pytest.raises(UserError, match='is a reward model: a language model is needed'):
            load.load_model(str(tmp_path))
    net = hf.AutoModelForCausalLM.from_pretrained(folders / 'qwen2')
    net.save_pretrained(tmp_path, state_dict=without(net, 'lm_head.weight'))
    with pytest.raises(UserError, match='lacks weights: lm_head.weight'):
        load.load_model(str(tmp_path))


def test_pad_tokens():
    """The tokenizer's own if it is not the end of text, else a new one; always on the right."""
    for pad, expected in ('!', toy.tokenizer().convert_tokens_to_ids('!')), (None, FULL), ('<|endoftext|>', FULL):
        tokenizer = toy.tokenizer()
        tokenizer.pad_token, tokenizer.padding_side = pad, 'left'
        assert load.separate_pad(tokenizer).pad_token_id == expected and tokenizer.padding_side == 'right'
        assert tokenizer('Review of!').input_ids == toy.tokenizer()('Review of!').input_ids


def rows(margins):
    texts = toy.pairs('train', len(margins))
    return [row if m is None else row | {'margin': m} for row, m in zip(texts, margins, strict=True)]


def examples(path, task='pairs', **options):
    options = {'max_length': 64, 'max_prompt_length': 32, 'undivided': True, 'margins': True} | options
    return tokenise.load_examples(path, 'train', toy.tokenizer(), task, **options)


def test_margins_of_rows(tmp_path, monkeypatch):
    """Kept, through cache, selection and flips; 0 and counted where a row has none; counted where nothing uses them."""
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    file = write_jsonl(tmp_path / 'pairs.jsonl', rows([1, 0.5, None, -2.0, 3]))
    for _ in range(2):  # computed, then from the cache
        found = examples(file)
        assert found.margin.tolist() == [1, 0.5, 0, -2, 3] and found.margin.dtype == np.float32
        assert in_words(found.left_out) == ('1 pair without a margin, taken as 0', [formats.CONTRADICTED])  # of -2
    assert found.select(np.array([4, 1])).margin.tolist() == [3, 0.5]
    flipped = found.flip(0.99, 0)
    assert flipped.margin.tolist() == found.margin.tolist() and (flipped.spans != found.spans).any()
    for task in ('pairs', 'singles', 'sft'):
        other = examples(file, margins=False, task=task)
        assert other.margin is None
        assert in_words(other.left_out)[0] == ('4 margins, which only reward.py uses' if task == 'pairs' else 'nothing')
    assert examples(write_jsonl(tmp_path / 'none.jsonl', rows([None, None]))).margin is None


def test_bad_margins(tmp_path):
    file = tmp_path / 'pairs.jsonl'
    for bad in ('"1"', 'true', 'NaN', 'Infinity', '1' + '0' * 400, '[1]'):
        write_jsonl(file, rows([1, 12345]))
        file.write_text(file.read_text().replace('12345', bad))
        with pytest.raises(UserError, match="line 2: 'margin' is "):
            examples(str(file), cache=False)
        assert len(examples(str(file), cache=False, skip_bad_rows=True)) == 1, bad


def test_it_learns_the_toy_world(tmp_path, capsys):
    """From 3,000 pairs: well above chance (0.5; the best possible is 0.86), and the scores centred."""
    run_script('reward.py', '--lr=5e-3', '--lr_schedule=linear', '--warmup_steps=5', '--n_eval_examples=400',
               '--center_coef=0.01', '--seed=1', '--data_fraction=0.5', f'--out_dir={tmp_path}/run')  # fmt: skip
    before, after = metrics(tmp_path / 'run', 'eval')
    assert 0.4 < before['rewards_eval/accuracies'] < 0.6 and after['rewards_eval/accuracies'] > 0.7
    margin, mean, chosen, rejected = (
        after[f'rewards_eval/{name}'] for name in ('margins', 'mean', 'chosen', 'rejected')
    )
    assert margin > 0.5 > abs(mean)
    assert [margin, mean] == pytest.approx([chosen - rejected, (chosen + rejected) / 2], abs=1e-6)
    out = capsys.readouterr().out
    assert 'left out or changed: 3,016 examples not drawn, by data_fraction' in out and 'acc 0.' in out
