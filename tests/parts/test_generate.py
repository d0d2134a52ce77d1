"""Sampling: an answer depends on its prompt and its seed alone, and follows the model's own distribution."""

import contextlib
import types

import numpy as np
import pytest
import torch
import transformers
from helpers import read_jsonl
from test_model import NONE, PACKED

import data
import fsdp
from configurator import UserError
from hf import attention, generate, sharded
from runtime import ranks

VOCAB, EOS = 13, 12
CONFIGS = {name: PACKED[name] | {'vocab_size': VOCAB} for name in ('llama', 'gpt_neox', 'gpt2', 'mistral', 'gemma2')}
MAMBA = NONE | {'vocab_size': VOCAB, 'hidden_size': 16, 'num_hidden_layers': 2, 'state_size': 4}
TOKENIZER = types.SimpleNamespace(eos_token_id=EOS, decode=lambda ids: ' '.join(map(str, ids)))
UNLIKELY = 1e-7  # so that no seed fails by chance
PROMPTS = [[3], [5, 1, 7, 2, 9, 9, 4], [8, 8], [1, 2, 3, 4]]


def build(name='llama', empty=False):
    attention.register_attention()
    with torch.device('meta' if empty else 'cpu'), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **(CONFIGS | {'mamba': MAMBA})[name])
        net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for p in net.parameters():
            torch.nn.init.normal_(p, 0.0, 0.3)
    if name != 'mamba':
        net.set_attn_implementation('packed')
    return net


def sample(net, prompts, seeds, max_new_tokens=12, **options):
    return generate.generate(net, TOKENIZER, prompts, seeds, max_new_tokens=max_new_tokens, **options)


@torch.no_grad()
def next_probs(net, ids):
    """The model's distribution after these ids, without a cache, padding, or generate."""
    before = net.config._attn_implementation
    net.set_attn_implementation('eager')
    logits = net(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    net.set_attn_implementation(before)
    return logits.float().softmax(-1)


@pytest.mark.parametrize('options', [{}, {'temperature': 0.7, 'top_p': 0.8}, {'temperature': 0.0}])
@pytest.mark.parametrize('name', CONFIGS)
def test_an_answer_depends_on_its_prompt_and_seed_alone(name, options):
    net, seeds = build(name), [11, 12, 13, 14]
    together = sample(net, PROMPTS, seeds, **options)
    assert together == [sample(net, [p], [s], **options)[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert together[::-1] == sample(net, PROMPTS[::-1], seeds[::-1], **options)
    greedy = options.get('temperature') == 0
    assert (sample(net, PROMPTS, [21, 22, 23, 24], **options) == together) == greedy
    assert len({*map(tuple, sample(net, [PROMPTS[1]] * 4, seeds, **options))}) == (1 if greedy else 4)
    for prompt, answer in zip(PROMPTS, together if greedy else (), strict=greedy):
        ids = list(prompt)
        while len(ids) - len(prompt) < 12 and ids[-1] != EOS:
            ids.append(int(next_probs(net, ids).argmax()))
        assert answer == [token for token in ids[len(prompt) :] if token != EOS]


def watch(net):
    shapes = []
    net.register_forward_pre_hook(lambda net, args, how: shapes.append(tuple(how['input_ids'].shape)), with_kwargs=True)
    return shapes


@pytest.mark.parametrize('name', [*CONFIGS, 'mamba'])
def test_rows_come_and_go(name, monkeypatch):
    """Answers are those of each prompt alone, in at most so many rows, of which few are of answers that have ended."""
    monkeypatch.setattr(generate, 'REFILL_AFTER', 1)
    net, prompts = build(name), PROMPTS * 6
    alone = [sample(net, [p], [s], keep_end=True)[0] for s, p in enumerate(prompts)]
    # every token is drawn from a row, and the cache spares all others; mamba's rows wait for one another
    drawn = sum(map(len, alone))
    shapes = watch(net)
    # of 5 rows each that ends is replaced at once, of 12 rows three at a time
    for n_rows, least, most in ((5, 1, 1.1), (12, 1.02, 1.12)):
        shapes.clear()
        assert sample(net, prompts, range(24), max_rows=n_rows, keep_end=True) == alone
        assert max(rows for rows, _ in shapes) == n_rows
        steps = sum(rows for rows, columns in shapes if columns == 1)
        assert name == 'mamba' or least * drawn <= steps < most * drawn
    # they stay until enough tokens were sampled, here more than an answer has
    monkeypatch.setattr(generate, 'REFILL_AFTER', 13)
    shapes.clear()
    assert sample(net, prompts, range(24), keep_end=True) == alone
    assert name == 'mamba' or {rows for rows, columns in shapes if columns == 1} == {24}


@pytest.mark.parametrize('before', ['packed', 'eager', 'sdpa'])
def test_one_prompt_of_many_answers_is_read_once(before):
    """And the model stays as it was."""
    net = build()
    net.set_attn_implementation(before)
    own, shapes = net.generation_config, watch(net)
    answers = sample(net, [PROMPTS[1]] * 6 + [PROMPTS[3]] * 6, range(12))
    assert shapes[:2] == [(2, len(PROMPTS[1]) - 1), (12, 1)]
    assert answers[5:7] == [sample(net, [PROMPTS[1]], [5])[0], sample(net, [PROMPTS[3]], [6])[0]]
    assert net.config._attn_implementation == before and net.generation_config is own and not net.training


@pytest.mark.parametrize('name', ['mamba', 'jamba', 'recurrent_gemma', 'llama4_text', 'lfm2', 'reformer'])
def test_caches_that_cannot_be_put_together(name):
    options = {'lfm2': {'layer_types': ['conv', 'full_attention']}, 'reformer': {'is_decoder': True}}.get(name, {})
    config = transformers.AutoConfig.for_model(name, num_hidden_layers=2, **options)
    with torch.device('meta'):
        assert not generate.can_refill(transformers.AutoModelForCausalLM.from_config(config))


def nucleus(p, temperature=1.0, top_p=1.0):
    """Temperature first, then the fewest tokens that hold top_p of the mass."""
    p = (p.log() / temperature).softmax(-1)
    order = p.argsort(descending=True)
    p[order[int((p[order].cumsum(0) < top_p).sum()) + 1 :]] = 0
    return p / p.sum()


def chance(counts, p):
    """The probability of a Pearson statistic this large or larger; tokens expected fewer than 5 times share one bin."""
    assert not counts[p == 0].any()
    rare = counts.sum() * p < 5
    counts, p = (torch.cat((x[~rare], x[rare].sum()[None])).double() for x in (counts, p))
    counts, expected = counts[p > 0], (counts.sum() * p)[p > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0).double()
    return torch.special.gammaincc(freedom / 2, statistic / 2) if freedom else 1.0


@pytest.mark.parametrize('options', [{}, {'temperature': 0.5}, {'temperature': 2.0}, {'temperature': 1.5, 'top_p': 0.6}])  # fmt: skip
@pytest.mark.parametrize('name', ['llama', 'gemma2'])
def test_samples_follow_the_model(name, options):
    n, net, prompt = 4000, build(name), PROMPTS[3]
    # a generation config's settings are not the model's
    net.generation_config.update(repetition_penalty=3.0, top_k=2, no_repeat_ngram_size=1, temperature=0.1)
    answers = sample(net, [prompt] * n, list(range(n)), max_new_tokens=2, **options)
    counts = torch.zeros(VOCAB, VOCAB)
    for answer in answers:
        token, then, *_ = [*answer, EOS, EOS]
        counts[token, then] += 1
    first, p = counts.sum(1), nucleus(next_probs(net, prompt), **options)
    assert p.max() < 0.9 and chance(first, p) > UNLIKELY
    token = int(first[:EOS].argmax())
    assert chance(counts[token], nucleus(next_probs(net, [*prompt, token]), **options)) > UNLIKELY


@pytest.mark.parametrize('vocabulary', [2, 3, 5, 26, 300])
def test_draws_follow_the_scores(vocabulary):
    """A block, then a token in it, is a draw from softmax(scores): every step anew, whatever the seeds look like."""
    n, rng = 20_000, torch.Generator().manual_seed(1)
    scores = torch.randn(vocabulary, generator=rng) * 2
    scores[1 : vocabulary // 2 : 2] = -torch.inf  # as top_p leaves them
    for seeds in (range(n), [2**40 * i + 7 for i in range(n)]):
        draw, p = generate._Draw(seeds, [0] * n), scores.softmax(0)
        rows = [draw(None, scores.expand(n, -1).clone()) for _ in range(2)]
        first, second = (row.argmax(1) for row in rows)
        assert chance(first.bincount(minlength=vocabulary), p) > UNLIKELY
        pairs = (first * vocabulary + second).bincount(minlength=vocabulary**2)
        assert chance(pairs, (p[:, None] * p).flatten()) > UNLIKELY  # steps are independent
    # of any size and sign, by their last 64 bits
    keys = generate._Draw([-1, 2**64 - 1, 2**64 + 5, 5], [0] * 4).keys
    assert keys[0] == keys[1] != keys[2] == keys[3]
    # of what is no number nothing is drawn, and nothing is the largest
    for processor in generate._processors([0], [0], 0, 1.0)[0], draw:
        with pytest.raises(UserError, match='scores are not numbers'):
            processor(None, torch.full((1, vocabulary), torch.nan))


def test_stops_at_the_end_of_text(monkeypatch):
    net = build()
    long = sample(net, PROMPTS * 8, range(32))
    assert any(len(answer) < 12 for answer in long) and any(len(answer) == 12 for answer in long)
    assert not any(EOS in answer for answer in long)
    stop = long[0][0]
    short = [answer[: answer.index(stop)] if stop in answer else answer for answer in long]
    assert any(stop in answer for answer in long[1:])
    for own in ([stop, EOS], stop):  # the model's own, such as the end of a turn
        net.generation_config.eos_token_id = own
        assert sample(net, PROMPTS * 8, range(32)) == short
        assert net.generation_config.eos_token_id == own
    # or at a signal, but not in a tensor-parallel group, whose ranks go on together
    monkeypatch.setattr(generate.guard, 'stop_asked_here', lambda: True)
    for size in (1, 2):
        monkeypatch.setattr(ranks, 'tp_size', lambda size=size: size)
        assert (sample(net, PROMPTS * 8, range(32), max_rows=20) == short) == (size == 2)


def test_sharded(tmp_path, monkeypatch, capsys):
    plain, net = build(), fsdp.shard(build, ranks.setup()[2], cpu_offload=True)
    modules = [m for m in net.modules() if hasattr(m, 'unshard')]

    def state():
        groups = [m._get_fsdp_state()._fsdp_param_group for m in modules]
        return [(g.is_sharded, g._reshard_after_forward) for g in groups]

    before = state()
    assert len(modules) == 3 and all(sharded for sharded, _ in before)
    with sharded.unsharded(net):
        assert not any(sharded for sharded, _ in state())
        assert sample(net, PROMPTS, range(4)) == sample(plain, PROMPTS, range(4))
        assert not any(sharded for sharded, _ in state())
    assert state() == before and net.config._attn_implementation == 'packed'
    # the work shared, prompts of similar length side by side
    seeds = [5 * 1_000_003 + i for i in range(4)]
    expected = sample(plain, PROMPTS, seeds)
    assert generate.sample(net, TOKENIZER, PROMPTS, seeds, max_new_tokens=12) == expected
    for r, mine in enumerate(([1, 0], [3], [2])):
        monkeypatch.setattr(ranks, 'data_rank', lambda r=r: (r, 3))
        monkeypatch.setattr(ranks, 'gather_objects', lambda answers: [dict.fromkeys(range(4)), answers])
        found = generate.sample(net, TOKENIZER, PROMPTS, seeds, max_new_tokens=12)
        assert found == [answer if i in mine else None for i, answer in enumerate(expected)]
    # of two models, in a file that is not there at first
    monkeypatch.setattr(ranks, 'data_rank', lambda: (0, 1))
    monkeypatch.setattr(ranks, 'gather_objects', lambda value: [value])
    run = types.SimpleNamespace(config=types.SimpleNamespace(seed=5, out_dir=tmp_path / 'run'), tokenizer=TOKENIZER)
    monkeypatch.setattr(generate, 'decode_answer', lambda ids, prompt_ids, tokenizer: tokenizer.decode(ids))
    switched = []
    monkeypatch.setattr(generate, 'adapters_off', lambda model: switched.append(model) or contextlib.nullcontext())
    for seen in (0, 64):
        models, examples = {'reference': net, 'policy': net}, [(prompt, []) for prompt in PROMPTS]
        assert generate.sample_held_out(run, models, examples, seen, max_new_tokens=12) == {}
        run.config.out_dir.mkdir(exist_ok=True)
    assert switched == [None, net] * 2
    lines = read_jsonl(tmp_path / 'run/samples.jsonl')
    assert [line['examples'] for line in lines] == [0] * 8 + [64] * 8
    tokens = [len(answer) for answer in sample(plain, PROMPTS, seeds, keep_end=True)]
    written = {'prompt': '5 1 7 2 9 9 4', 'response': ' '.join(map(str, expected[1])), 'tokens': tokens[1]}
    assert lines[5] == {'examples': 0, 'generator': 'reference', 'sample': 1, **written}
    # the mean of what is measured is a KL only on samples of the policy itself
    generate.say_once.cache_clear()
    generate.sample_held_out(run, {'policy': net}, [], 0, max_new_tokens=1, temperature=0.7)
    for settings in ({}, {'temperature': 1.0, 'top_p': 1.0}, {'temperature': 0.7}, {'top_p': 0.9}):
        generate.sample_held_out(run, {'policy': net}, examples, 0, lambda *_: {}, max_new_tokens=1, **settings)
        assert ('no KL' in capsys.readouterr().out) == (settings == {'temperature': 0.7})  # once

    # with a measure, of so many answers; nothing of no prompts, nor after a signal
    def measure(answers):
        return {'third': torch.tensor([len(answer) / 3 for _, (answer,) in answers])}

    options = {'measure': measure, 'n_written': 2, 'max_new_tokens': 12}
    found = generate.sample_held_out(run, {'policy': net}, examples, 70, **options)
    assert (found['policy']['third'] * 3).tolist() == tokens
    assert generate.sample_held_out(run, {'policy': net}, [], 80, **options) == {}
    monkeypatch.setattr(generate.guard, 'stop_asked', lambda: True)
    assert generate.sample_held_out(run, {'policy': net}, examples, 90, **options) == {}
    more = [line for line in read_jsonl(tmp_path / 'run/samples.jsonl') if line['examples'] >= 70]
    assert [(line['examples'], line['third']) for line in more] == [(70, round(n / 3, 6)) for n in tokens[:2]]


def test_a_trained_step_after_sampling():
    batch = data.pack([(np.array(PROMPTS[1]), [np.array(PROMPTS[3])])], [0])
    norms = []
    for sampling in (False, True):
        net = fsdp.shard(build, ranks.setup()[2], cpu_offload=True)
        optimizer = fsdp.make_optimizer('AdamW', net, 0.01, 0.0)
        for _ in range(2):
            net.response_logps(batch).sum().backward()
            norms.append(fsdp.update(net, optimizer, 0.01, 1.0, 1.0))
            if sampling:
                with sharded.unsharded(net):
                    sample(net, PROMPTS, range(4))
    assert norms[:2] == norms[2:] and norms[0] != norms[1]
