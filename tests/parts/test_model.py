"""Log-probs of packed answers, and their gradients, against the model's own padded forward, for many architectures.

The other side of each comparison is a few lines here that know no packing: `dense_logps` and `plain_logps`. The models
have two layers and random weights, large enough that a wrong mask, position, scale or soft cap shows in the first digits."""

import copy
import gc
import inspect
import json
import math
import types
import weakref
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
import transformers as hf
from helpers import own_head, tensors
from torch.utils._python_dispatch import TorchDispatchMode

import data
import fsdp
import model
from configurator import UserError
from hf import attention, export, lean, load, lora, parts, probe, sharded, ties
from rl import divergences
from runtime import ranks, room
from runtime.rmsprop import rmsprop_
from text import toy

# fmt: off
VOCAB = 61
NONE = {'bos_token_id': None, 'eos_token_id': None, 'pad_token_id': None}
BASE = {'vocab_size': VOCAB, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 4,
        'max_position_embeddings': 64, **NONE}
GROUPED = BASE | {'num_key_value_heads': 2}
SLIDING = GROUPED | {'sliding_window': 4}  # shorter than most answers below
ALTERNATING = SLIDING | {'layer_types': ['sliding_attention', 'full_attention']}
OLD = {'vocab_size': VOCAB, 'n_embd': 16, 'n_layer': 2, 'n_head': 4, 'n_positions': 64, **NONE}
EXPERTS = {'num_experts_per_tok': 2, 'moe_intermediate_size': 8, 'shared_expert_intermediate_size': 8}
PACKED = {
    'gpt_neox': BASE, 'gpt2': OLD, 'llama': GROUPED, 'qwen2': GROUPED, 'mistral': SLIDING,
    'qwen2 sliding': SLIDING | {'model_type': 'qwen2', 'use_sliding_window': True, 'max_window_layers': 1},
    'qwen3': GROUPED | {'head_dim': 8}, 'gemma': GROUPED | {'head_dim': 8},
    'gemma2': ALTERNATING | {'head_dim': 8, 'query_pre_attn_scalar': 5, 'attn_logit_softcapping': 0.5,
                             'final_logit_softcapping': 0.7},
    'gemma3_text': ALTERNATING | {'head_dim': 8, 'query_pre_attn_scalar': 5},
    'phi': BASE, 'phi3': SLIDING,  # phi's head has a bias
    'mixtral': GROUPED | {'num_local_experts': 4, 'num_experts_per_tok': 2}, 'qwen2_moe': GROUPED | EXPERTS | {'num_experts': 4},
    'cohere': GROUPED | {'logit_scale': 0.3},
    'granite': GROUPED | {'logits_scaling': 3.0, 'attention_multiplier': 0.4, 'residual_multiplier': 0.5},
}
NOT_PACKED = {  # and why
    'gptj': (OLD | {'rotary_dim': 2}, 'takes no attention'),
    'gpt_neo': ({'vocab_size': VOCAB, 'hidden_size': 16, 'num_layers': 2, 'num_heads': 4, 'window_size': 4,
                 'attention_types': [[['global', 'local'], 1]], **NONE}, 'takes no attention'),
    'bloom': ({'vocab_size': VOCAB, 'hidden_size': 16, 'n_layer': 2, 'n_head': 4, **NONE}, 'takes no attention'),
    'falcon': ({'vocab_size': VOCAB, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 4, **NONE}, 'takes no attention'),
    'stablelm': (GROUPED, 'not handed on'),
    'gpt_oss': (ALTERNATING | {'head_dim': 8, 'num_local_experts': 4, 'num_experts_per_tok': 2}, 'it has sinks'),
    'phimoe': (SLIDING | {'num_local_experts': 4, 'num_experts_per_tok': 2}, 'off by'),  # a window that it does not tell
    'lfm2': (GROUPED | {'layer_types': ['conv', 'full_attention']}, 'layers of type conv'),
}
ALL = PACKED | {name: options for name, (options, _) in NOT_PACKED.items()}
# lengths of the prompt and its answers
PAIRS = [(5, (7, 3)), (1, (1, 9)), (12, (1, 1)), (2, (20, 4))]
SINGLES = [(5, (7,)), (1, (1,)), (1, (12,)), (9, (2,))]
LATER = [(5, (1, 9)), (2, (3, 4))]  # the longest sequence is a second answer's
TRIPLES = [(6, (8, 2, 5)), (1, (1, 1, 3))]
LAYOUTS = {'shared': {}, 'apart': {'share_prefix': False}, 'padded': {'pad': True}}
# fmt: on


def config(name):
    return hf.AutoConfig.for_model(**{'model_type': name} | ALL[name])


def randomise(net, seed=0):
    """Weights far from zero, and no bias or norm left as it starts, so that all of them matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator) + ('norm' in name and 'weight' in name))
    return net


def tiny(name, seed=0, dtype=torch.float32, settings=None):
    attention.register_attention()
    net = hf.AutoModelForCausalLM.from_config(settings or config(name), dtype=torch.float32)
    net = randomise(net, seed).to(dtype).eval()
    net.set_attn_implementation('packed')
    net.response_logps = types.MethodType(model.response_logps, net)
    return net


def examples(shape):
    rng = np.random.default_rng(0)
    return [(rng.integers(0, VOCAB, p), [rng.integers(0, VOCAB, n) for n in a]) for p, a in shape]


def pack(shape, **options):
    return data.pack(examples(shape), list(range(len(shape))), **options)


def rows_of(shape):
    return [(prompt, answer) for prompt, answers in examples(shape) for answer in answers]


def dense_logps(net, shape=PAIRS):
    """The model's own log-probs, padded on the right: for each answer those of the positions that predict it."""
    rows = rows_of(shape)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor([*p, *a]) for p, a in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(p) + len(a)] for p, a in rows])
    before, exact = net.config._attn_implementation, net.dtype == torch.float64
    net.set_attn_implementation('sdpa' if exact else 'eager')  # eager attention has a float32 softmax
    logits = net(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    net.set_attn_implementation(before)
    logits = logits if exact else logits.float()
    return [logits[i, len(p) - 1 : len(p) + len(a) - 1].log_softmax(-1) for i, (p, a) in enumerate(rows)]


def plain_logps(net, shape=PAIRS):
    rows = zip(dense_logps(net, shape), rows_of(shape), strict=True)
    return torch.stack([x[range(len(a)), a].sum() for x, (_, a) in rows])


def gradients(net, values):
    """Of a random linear combination of the values, w.r.t. every parameter, as one vector."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
    total, parameters = (weights * values).sum(), list(net.parameters())
    grads = torch.autograd.grad(total, parameters, materialize_grads=True, allow_unused=True)
    return torch.cat([g.flatten() for g in grads])


def assert_close(values, expected, tolerance=1e-5):
    assert values.shape == expected.shape and values.isfinite().all()
    assert ((values - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all(), (values - expected).abs().max()


def assert_same_direction(grads, expected, tolerance=1e-5):
    assert expected.norm() > 0.1
    assert (grads - expected).norm() <= tolerance * expected.norm(), (grads - expected).norm() / expected.norm()


# packed = padded = the model's own forward
CASES = [(name, layout, shape) for name in PACKED for layout in LAYOUTS for shape in ('pairs', 'singles', 'triples')]
CASES += [(name, 'padded', 'pairs') for name in NOT_PACKED]


@pytest.mark.parametrize(('name', 'layout', 'shape'), CASES)
def test_log_probs_and_gradients(name, layout, shape):
    net, shape = tiny(name), {'pairs': PAIRS, 'singles': SINGLES, 'triples': TRIPLES}[shape]
    expected = plain_logps(net, shape)
    expected_grads = gradients(net, expected)
    batch = pack(shape, **LAYOUTS[layout])
    attention.set_attention(net, packed=layout != 'padded')
    values = net.response_logps(batch)
    assert values.dtype == torch.float32 and values.shape == (1, len(expected))
    assert_close(values[0], expected)
    assert_same_direction(gradients(net, values[0]), expected_grads)
    assert batch.n.tolist() == [len(answer) for _, answer in rows_of(shape)]
    if layout == 'padded':
        assert batch.mask.sum(1).tolist() == [len(p) + len(a) for p, a in rows_of(shape)]


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_filler_changes_nothing(layout):
    net = tiny('gpt_neox')
    attention.set_attention(net, packed=layout != 'padded')
    for filler in (1, 2):
        batch = data.pack([], [], filler=filler, **LAYOUTS[layout])
        values = net.response_logps(batch)[0]
        assert batch.slot == [-1] and values.isfinite().all()
        assert batch.n.tolist() == [1] * filler and len(batch.target) == len(values) == filler
        (values.sum() * batch.real).sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in net.parameters())  # zero, but it took part


PROBED = data.Examples.of(examples([(6, (9, 4)), (3, (5, 8))]))
LAYOUTS_PROBED = probe.two_layouts(PROBED, 'cpu')


def can_pack(net, **options):
    said = []
    with mock.patch.object(probe, 'say', said.append):
        found = probe.can_pack(net, PROBED, 'cpu', **options)
    assert len(said) <= 1
    return found, *said


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', ALL)
def test_blocks_and_whether_they_can_be_packed(name, dtype):
    net = tiny(name, dtype=dtype)
    blocks, head = parts.blocks(net), net.get_output_embeddings()
    assert len(blocks) == 2 and len({type(block) for block in blocks}) == 1
    outside = [m for m in net.modules() if isinstance(m, torch.nn.Embedding) or m is head]
    rest = {*net.parameters()} - {p for module in [*blocks, *outside] for p in module.parameters()}
    assert sum(p.numel() for p in rest) <= 4 * 16  # norms at both ends
    before = net.config._attn_implementation
    found, *said = can_pack(net)
    assert found == (name in PACKED) == (not said) and net.config._attn_implementation == before
    if not found:
        assert 'cannot be packed' in said[0] and NOT_PACKED[name][1] in said[0]
        # phimoe's window shows in the numbers alone
        assert (probe.deviation(net, *LAYOUTS_PROBED)[0] == math.inf) == (name != 'phimoe')


@pytest.fixture
def register():
    """Register another function in place of packed_attention, for a while."""
    yield partial(hf.AttentionInterface.register, 'packed')
    attention.register_attention()


@pytest.mark.parametrize(('error', 'raised'), [
    (RuntimeError('CUDA error: device-side assert triggered'), RuntimeError), (ImportError('no kernel'), ImportError),
    (MemoryError('out of memory'), UserError),  # a sentence wherever it happens
    (ValueError('unknown mask'), None), (RuntimeError('shapes do not match'), None),
    (None, TypeError),  # 'NoneType' object is not callable: a bug of ours
])  # fmt: skip
def test_what_is_not_the_fault_of_the_architecture_is_raised(error, raised, register, monkeypatch):
    net = tiny('llama')
    if error is None:
        monkeypatch.setattr(attention, '_attend', None)
    else:
        register(mock.Mock(side_effect=error))
    if raised is None:
        found, said = can_pack(net)
        assert not found and str(error) in said
    else:
        with pytest.raises(raised, match=str(error)):
            can_pack(net)


@pytest.mark.parametrize(('name', 'option', 'wrong', 'most'), [
    # everything is seen
    ('llama', 'packed', lambda batch: mock.Mock(bundles=[attention.Bundle([(1, (batch.ids.numel() - 1,))])]), math.inf),
    ('mistral', 'sliding_window', lambda _: None, math.inf), ('gemma2', 'softcap', lambda _: None, math.inf),
    ('llama', 'scaling', lambda scaling: 1.02 * scaling, 0.01),
])  # fmt: skip
def test_a_wrong_attention_is_noticed(name, option, wrong, most, register):
    net = tiny(name)
    assert probe.deviation(net, *LAYOUTS_PROBED)[0] < 1e-6
    register(lambda *args, **rest: attention.packed_attention(*args, **rest | {option: wrong(rest[option])}))
    assert 2e-4 < probe.deviation(net, *LAYOUTS_PROBED)[0] < most
    assert not can_pack(net)[0]


@pytest.mark.parametrize('name', ['cohere', 'granite'])
def test_an_unknown_head_is_an_error(name, monkeypatch):
    net = tiny(name)
    assert can_pack(net, wanted=False) == (False,)
    monkeypatch.setattr(model, 'scale_and_cap', lambda config: (1.0, None))
    for wanted in (True, False):  # with --pack=false, too
        with pytest.raises(UserError, match=type(net).__name__):
            can_pack(net, wanted=wanted)


FACTORS = {'long_factor': [4.0, 9.0], 'short_factor': [1.0, 1.5]}  # one for each pair of a head's 4 dimensions
SCALED = {
    'longrope': ('phi3', {'rope_type': 'longrope', 'original_max_position_embeddings': 20, **FACTORS}, 20),
    'dynamic': ('llama', {'rope_type': 'dynamic', 'factor': 2.0}, 64),
    'old name': ('phi3', {'type': 'su', 'original_max_position_embeddings': 20, **FACTORS}, 20),
    'linear': ('llama', {'rope_type': 'linear', 'factor': 2.0}, math.inf),
    'yarn': ('llama', {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}, math.inf),
    'llama3': ('llama', {'rope_type': 'llama3', 'factor': 4.0, 'original_max_position_embeddings': 16, 'low_freq_factor': 1.0,
                         'high_freq_factor': 4.0}, math.inf),
    'by layer': ('gemma3_text', {'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
                                 'full_attention': {'rope_type': 'dynamic', 'factor': 2.0, 'rope_theta': 1e4}}, 64),
}  # fmt: skip


def scaled(which):
    name, rope, limit = SCALED[which]
    rope = dict(rope) if 'full_attention' in rope or 'type' in rope else {'rope_theta': 1e4, **rope}
    own = {'original_max_position_embeddings': 20} if name == 'phi3' else {}  # counts for more than the one in rope
    return hf.AutoConfig.for_model(**config(name).to_dict() | own | {'rope_parameters': rope}), limit


@pytest.mark.parametrize('which', SCALED)
def test_results_do_not_depend_on_the_longest_sequence(which):
    """A short example's log-probs beside a long one: where rotary scaling would change them, the long one is refused."""
    settings, limit = scaled(which)
    net, short = tiny(which, settings=settings), (4, (5, 6))

    def beside(tokens):
        with torch.no_grad():
            return net.response_logps(pack([short, (4, (tokens - 4, 3))]))[0][:2]

    alone = net.response_logps(pack([short]))[0]
    for tokens in [30, 80] if limit == math.inf else [limit]:
        probe.check_positions(net, tokens, 'the examples')
        assert_close(beside(tokens), alone)
    assert probe.max_sequence_length(net) == min(limit, net.config.max_position_embeddings)
    if limit < math.inf:
        assert (beside(limit + 60) - alone).abs().max() > 1e-2
        with pytest.raises(UserError, match=f'beyond {limit} tokens .* longest sequence .* take {limit + 1} tokens'):
            probe.check_positions(net, limit + 1, 'the examples')


def test_models_of_no_use(monkeypatch):
    """Too few positions, another head, or a forward that fails."""
    net, other = tiny('gpt2'), tiny('llama')
    # attention of which answers of a packed batch would see one another, and nobody would notice
    other.set_attn_implementation('sdpa')
    with pytest.raises(UserError, match=r'set_attention\(model, packed=True\)'):
        other.response_logps(pack(PAIRS))
    other.response_logps(pack(PAIRS, pad=True))
    probe.check_positions(net, 64, 'the examples')
    with pytest.raises(UserError, match='has 64 positions, and the examples take 65 tokens'):
        probe.check_positions(net, 65, 'the examples')
    # tables that are no embedding, where a forward beyond them ends with an error of its own
    small = {'vocab_size': 8, 'n_positions': 16, 'n_embd': 32, 'n_layer': 1, 'n_head': 4, 'rotary_dim': 4, **NONE}
    mpt = {'vocab_size': 8, 'max_seq_len': 16, 'd_model': 16, 'n_layers': 1, 'n_heads': 2}
    for name, sizes in {'gptj': small, 'codegen': small, 'ctrl': small, 'mpt': mpt}.items():
        config = hf.AutoConfig.for_model(name, **sizes)
        table = hf.AutoModelForCausalLM.from_config(config)
        probe.check_positions(table, 16, 'the examples')
        assert probe.max_sequence_length(table) == 16
        table(input_ids=torch.zeros((1, 16), dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError)):
            table(input_ids=torch.zeros((1, 17), dtype=torch.long))
        with pytest.raises(UserError, match='has 16 positions, and the examples take 17 tokens'):
            probe.check_positions(table, 17, 'the examples')
    probe.check_positions(other, 10**6, 'the examples')  # rotary: it can be longer than it has been
    probe.check_heads(net, other)
    other.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(UserError, match='policy and reference predict'):
        probe.check_heads(net, other)
    monkeypatch.setattr(hf.LlamaModel, 'forward', mock.Mock(side_effect=ValueError('only on Tuesdays')))
    with pytest.raises(UserError, match='LlamaForCausalLM cannot be trained here: its forward says only on Tuesdays'):
        can_pack(other)


@pytest.mark.parametrize('half', [False, True])
def test_scaled_rotary_positions_when_sharded(half, saved, device):
    settings, limit = scaled('longrope')
    build, shape = saved(settings), [(4, (5, 6)), (4, (limit - 4, 3))]
    net = fsdp.shard(build, device, cpu_offload=True, dtype='bfloat16' if half else 'float32')
    assert_close(net.response_logps(pack(shape))[0], plain_logps(build(), shape), 0.1 if half else 1e-5)


DIVERGENCES = {'kl': divergences.kl, 'cvar': divergences.cvar(0.6), 'erm': divergences.erm(0.9)}
DIVERGENCES['released'] = divergences.released(0.7)
# not released, which is not continuous, with Gemma 2, which has no float64 forward to compare with
OF_MODELS = [(n, d) for n in ('llama', 'gpt_neox', 'phi', 'cohere', 'gemma2') for d in DIVERGENCES][:-1]


@pytest.mark.parametrize('layout', [{}, {'pad': True}], ids=['shared', 'padded'])
@pytest.mark.parametrize(('name', 'which'), OF_MODELS)
def test_divergences(name, which, layout):
    dtype, tolerance = (torch.float32, 1e-5) if name == 'gemma2' else (torch.float64, 5e-7)
    policy, ref = (tiny(name, seed=seed, dtype=dtype) for seed in (0, 1))
    divergence, both = DIVERGENCES[which], zip(dense_logps(policy), dense_logps(ref), strict=True)
    expected = torch.stack([divergence(x, y.detach())[0].sum() for x, y in both])
    expected = torch.stack([plain_logps(policy), expected])
    batch = pack(PAIRS, **layout)
    for net in (policy, ref):
        attention.set_attention(net, packed='pad' not in layout)
    with torch.no_grad():
        reference, ref_logps = model.hidden_and_head(ref, batch), ref.response_logps(batch)[0]
    values = policy.response_logps(batch, divergence, reference)
    assert values.shape == (3, expected.shape[1])
    assert_close(values[:2], expected, tolerance)
    assert_close(values[2], ref_logps, tolerance)
    assert_same_direction(gradients(policy, values[:2]), gradients(policy, expected), tolerance)
    assert not values[2].detach().equal(values[0].detach()) and all(p.grad is None for p in ref.parameters())


def cut_into(size, monkeypatch):
    """Head's chunks of so many positions. Returns the arguments that it asks for them with."""
    asked = []

    def chunks(n, vocabulary, most):
        asked.append((n, vocabulary))
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    monkeypatch.setattr(model.Head, 'chunks', staticmethod(chunks))
    return asked


def test_chunks_add_up_in_float32(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).bfloat16().requires_grad_() for n in (1000, 7))
    bias = torch.randn(7, generator=generator).bfloat16().requires_grad_()
    target = torch.randint(0, 2, (1000,), generator=generator)
    expected = (hidden.float() @ weight.float().T + bias.float()).log_softmax(1)[range(1000), target]
    wanted = torch.autograd.grad(expected.sum(), (weight, bias))
    cut_into(1, monkeypatch)
    (values,) = model.Head.apply(hidden, weight, bias, target, hf.LlamaConfig(), None, None)
    assert values.dtype == torch.float32
    assert_close(values, expected, 0.02)
    for found, grad in zip(torch.autograd.grad(values.sum(), (weight, bias)), wanted, strict=True):
        assert found.dtype == torch.bfloat16
        assert_same_direction(found.float(), grad.float(), 0.005)


@pytest.mark.parametrize('weight_trains', [True, False])
def test_a_head_whose_bias_is_frozen(weight_trains):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5), torch.randn(11)
    weight.requires_grad_(weight_trains)
    target = torch.arange(7)
    ours = model.Head.apply(hidden, weight, bias, target, config('llama'), None, None).sum()
    plain = F.linear(hidden, weight, bias).log_softmax(1).gather(1, target[:, None]).sum()
    sources = [hidden, weight][: 1 + weight_trains]
    torch.testing.assert_close(torch.autograd.grad(ours, sources), torch.autograd.grad(plain, sources))


def keep(logits, monkeypatch):
    monkeypatch.setattr(model.Head, 'keeps', staticmethod(lambda n, weight: logits))


def test_logits_that_are_kept_change_no_bit(monkeypatch):
    """Of five chunks: backward need not compute them again, a second backward must."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(100, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    write, products, found = model._write_logits, [], []
    monkeypatch.setattr(model, '_write_logits', lambda *args: (products.append(1), write(*args)))
    cut_into(20, monkeypatch)
    for logits, again in ((False, 5), (True, 0)):
        keep(logits, monkeypatch)
        products.clear()
        values = model.Head.apply(hidden, weight, None, torch.arange(100) % 50, config('llama'), None, None)
        for products_so_far in (5 + again, 10 + again):
            found.append((values, *torch.autograd.grad(values.sum(), (hidden, weight), retain_graph=True)))
            assert len(products) == products_so_far
    # a hidden state without gradient, as a reference model's, keeps none
    products.clear()
    values = model.Head.apply(hidden.detach(), weight, None, torch.arange(100) % 50, config('llama'), None, None)
    values.sum().backward()
    assert len(products) == 10
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize('tied', [False, True])
def test_no_tensor_of_tokens_times_vocabulary(tied, monkeypatch):
    """Only answers reach the head, a chunk at a time."""
    vocabulary, hidden, size = 32_768, 8, 4
    options = GROUPED | {'vocab_size': vocabulary, 'hidden_size': hidden, 'tie_word_embeddings': tied}
    net, batch = tiny('llama', settings=hf.LlamaConfig(**options)), pack([(200, (30, 20)), (150, (10, 40))])

    def largest():
        with Largest() as found:
            net.response_logps(batch).sum().backward()
        return found.numel

    assert largest() == len(batch.target) * vocabulary < batch.ids.numel() * vocabulary / 4
    asked = cut_into(size, monkeypatch)
    keep(False, monkeypatch)
    assert largest() == vocabulary * max(hidden, size)  # the weight's gradient
    # recomputed in backward
    assert [n for n, _ in asked if n > size] == [100, 100] and {v for _, v in asked} == {vocabulary}


@pytest.fixture(scope='module')
def device():
    return ranks.setup()[2]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """saved(config or its name, **changes of it) -> build as fsdp.shard wants it, of a folder build.args[0]."""

    def save(settings, **changes):
        folder = tmp_path_factory.mktemp('model')
        settings = config(settings) if isinstance(settings, str) else settings
        settings.update(changes)
        randomise(hf.AutoModelForCausalLM.from_config(settings)).save_pretrained(folder)
        return partial(load.load_model, str(folder))

    return save


def same_grads(net, batch):
    net.zero_grad()
    values = net.response_logps(batch)
    (values * torch.linspace(-1, 2, values.shape[1])).sum().backward()
    if hasattr(net, 'reshard'):
        net.reshard()
    grads = {name: p.grad for name, p in net.named_parameters()}
    return values.detach(), {name: g.full_tensor() if hasattr(g, 'full_tensor') else g for name, g in grads.items()}


# one process in float32 uses FSDP only where cpu_offload asks for it
@pytest.mark.parametrize('name', ['gpt_neox', 'llama', 'gpt2', 'gemma2', 'stablelm', 'gpt_oss', 'lfm2'])
def test_sharded_model_is_the_plain_one(name, saved, device):
    build, packed = saved(name), name in PACKED
    plain, net = build(), fsdp.shard(build, device, cpu_offload=True)
    plain.response_logps = types.MethodType(model.response_logps, plain)
    assert can_pack(net)[0] == packed
    for each in (plain, net):
        attention.set_attention(each, packed)
    batch = pack(PAIRS, pad=not packed)
    values, grads = same_grads(net, batch)
    expected, expected_grads = same_grads(plain, batch)
    assert values.equal(expected)
    for key, grad in expected_grads.items():
        assert_close(grads[key], torch.zeros_like(grads[key]) if grad is None else grad, 1e-6)


@pytest.mark.parametrize('name', ['gpt_neox', 'llama', 'gpt2', 'gemma3_text'])
def test_bfloat16(name, saved, device):
    build, batch = saved(name), pack(PAIRS)
    policy, ref = (fsdp.shard(build, device, dtype='bfloat16', train=train) for train in (True, False))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {(p.dtype, p.requires_grad) for p in ref.parameters()} == {(torch.bfloat16, False)}
    assert can_pack(policy)[0]
    with torch.no_grad():
        expected, reference = ref.response_logps(batch), ref.hidden_and_head(batch)
    values, grads = same_grads(policy, batch)
    assert values.dtype == torch.float32 and values.equal(expected)  # rewards of exactly 0 at step 0
    both = policy.response_logps(batch, divergences.kl, reference)
    assert both[0].equal(both[2]) and not both[1].any()
    assert {g.dtype for g in grads.values()} == {torch.float32}
    wide, wide_grads = same_grads(fsdp.shard(build, device, cpu_offload=True), batch)
    assert not values.equal(wide)
    assert_close(values, wide, 0.1)
    flat, wide_flat = (torch.cat([g.flatten() for g in x.values()]) for x in (grads, wide_grads))
    assert torch.cosine_similarity(flat, wide_flat, 0) > 0.99


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('checkpointing', [False, True, 'selective'])
def test_replicas_in_bfloat16_compute_as_fsdp_does(saved, device, rank, checkpointing):
    """Bit for bit. After a backward, and beside what is frozen, there is float32 alone."""

    def adapted(empty=False):
        net = saved('llama', tie_word_embeddings=True)(empty=empty)
        options = {'rank': rank, 'alpha': 4, 'dropout': 0.0, 'targets': None}
        return lora.adapt(net, None, options, empty=empty) if rank else net

    def trained(mode):
        net = fsdp.shard(adapted, device, dtype='bfloat16', mode=mode, activation_checkpointing=checkpointing)
        optimizer = fsdp.make_optimizer('AdamW', net, 0.01, 0.1)
        norms = []
        for _ in range(2):
            for pairs in (PAIRS, PAIRS[:1]):
                net.response_logps(pack(pairs))[0].square().sum().backward()
            norms.append(fsdp.update(net, optimizer, 0.01, 0.1, 1.0))
        return net, norms

    (replica, norms), (by_fsdp, expected) = map(trained, ('none', 'full'))
    weights = {name: getattr(p, 'full_tensor', lambda p=p: p)() for name, p in by_fsdp.named_parameters()}
    assert norms == expected and not sharded.fsdp_modules(replica)
    assert all(p.equal(weights[name]) for name, p in replica.named_parameters())
    kinds = {(p.dtype, p.requires_grad) for p in replica.parameters()}
    frozen = {(torch.bfloat16, False)} if rank else set()
    assert kinds == {(torch.float32, True)} | frozen
    # any forward swaps the copies in, of the model inside PEFT's wrapper, too, and a backward swaps them out
    attention.set_attention(replica, packed=False)
    forwards = (replica, parts.core(replica), lambda ids: replica.response_logps(pack(PAIRS, pad=True))[0])
    for forward in forwards:
        found = forward(pack(PAIRS, pad=True).ids)
        assert {p.dtype for p in replica.parameters()} == {torch.bfloat16}
        getattr(found, 'logits', found).sum().backward()
        assert {(p.dtype, p.requires_grad) for p in replica.parameters()} == kinds
        assert all(p.grad is not None for p in replica.parameters() if p.requires_grad)


def fork(saved, device, rank=None, change=lambda net: None):
    """A replica in bfloat16, and AdamW."""

    def build(empty=False):
        net = saved('llama')(empty=empty)
        options = {'rank': rank, 'alpha': 4, 'dropout': 0.0, 'targets': None}
        net = lora.adapt(net, None, options, empty=empty) if rank else net
        change(net)
        return net

    net = fsdp.shard(build, device, dtype='bfloat16', mode='none')
    return net, fsdp.make_optimizer('AdamW', net, 0.01, 0.0)


def steps_by(net, optimizer, own=None):
    """Take a step, own() for the update, and return the names of weights that have changed."""
    net.reshard()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.response_logps(pack(PAIRS))[0].square().mean().backward()
    own() if own else fsdp.update(net, optimizer, 0.01, 1.0, 1.0)
    net.reshard()
    return {name for name, p in net.named_parameters() if not p.equal(before[name])}


@pytest.mark.parametrize('are_in', [False, True])
def test_a_fork_freezes_weights_of_a_bfloat16_replica(are_in, saved, device):
    """Of weights or copies, whichever it finds, and it may train them again. PEFT's disable_adapter freezes, too."""
    net, optimizer = fork(saved, device)
    weights = dict(net.named_parameters())
    every = set(weights)
    first = {name for name in every if 'layers.0' in name}
    for wanted, expected in ((False, every - first), (True, every)):
        if are_in:
            net.response_logps(pack(PAIRS))
        for name in first:
            net.get_parameter(name).requires_grad = wanted
        assert steps_by(net, optimizer) == steps_by(net, optimizer) == expected
    # or the weights themselves, while copies are in their places
    net.response_logps(pack(PAIRS))
    for name in first:
        weights[name].requires_grad = False
    assert steps_by(net, optimizer) == steps_by(net, optimizer) == every - first
    adapted, optimizer = fork(saved, device, rank=2)
    with adapted.disable_adapter(), torch.no_grad():
        adapted.response_logps(pack(PAIRS))
    trained = steps_by(adapted, optimizer) | steps_by(adapted, optimizer)
    assert trained == {name for name, p in adapted.named_parameters() if p.requires_grad} != set()
    # what was frozen when it was loaded stays so
    net, optimizer = fork(saved, device, change=lambda net: net.model.layers[0].requires_grad_(False))
    sharded.check_trained(net, optimizer)
    net.requires_grad_(True)
    with pytest.raises(UserError, match='trains bfloat16 weights beside float32'):
        sharded.check_trained(net, fsdp.make_optimizer('AdamW', net, 0.01, 0.0))


def test_a_fork_steps_a_bfloat16_replica_by_itself(saved, device):
    """Without fsdp.update: gradients are with the weights after backward, and the next forward takes new weights."""
    net, optimizer = fork(saved, device)
    twin, known = fork(saved, device)

    def own():
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        net.zero_grad()

    for _ in range(3):
        net.response_logps(pack(PAIRS))[0].square().mean().backward()
        own()
        steps_by(twin, known)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert_close(p, q, 1e-5)


@pytest.mark.parametrize('kind', ['register_hook', 'register_post_accumulate_grad_hook'])
def test_a_fork_hooks_gradients_of_a_bfloat16_replica(kind, saved, device):
    net, _ = fork(saved, device)
    seen = []
    for p in net.parameters():
        hook = {
            'register_hook': lambda g: seen.append(g) or 0 * g,
            'register_post_accumulate_grad_hook': lambda p: seen.append(p.grad),
        }[kind]
        getattr(p, kind)(hook)
    expected = same_grads(fork(saved, device)[0], pack(PAIRS))[1]
    found = same_grads(net, pack(PAIRS))[1]
    assert {x.dtype for x in seen} == {torch.float32} and len(seen) == len(found)
    assert all(g.equal(0 * expected[name] if kind == 'register_hook' else expected[name]) for name, g in found.items())


def test_a_fork_copies_a_bfloat16_replica(saved, device):
    """As a reference it computes the same, and stays where it is; it may also train. Neither is kept for good."""
    net, optimizer = fork(saved, device)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        first = net.response_logps(pack(PAIRS))
        assert copied.response_logps(pack(PAIRS)).equal(first)
    assert steps_by(net, optimizer)
    with torch.no_grad():
        assert copied.response_logps(pack(PAIRS)).equal(first) and not net.response_logps(pack(PAIRS)).equal(first)
    optimizer = fsdp.make_optimizer('AdamW', copied, 0.01, 0.0)  # of the weights, though copies are in
    assert steps_by(copied, optimizer) == {name for name, _ in copied.named_parameters()}
    alive = [weakref.ref(each) for model in (net, copied) for each in (model.half_copies, model.lm_head.weight)]
    del net, copied, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


SIZES = {'vocab_size': VOCAB, 'd_model': 16, 'num_layers': 2, 'attention_heads': 4, 'ffn_dim': 24, **NONE}


@pytest.mark.parametrize('settings', [hf.XGLMConfig(**SIZES), hf.Olmo2Config(**GROUPED)])
def test_positions_in_float32_beside_bfloat16(settings, saved, device):
    """XGLM's are added to what its blocks take, OLMo's turn queries and keys: a replica, FSDP and a frozen model agree."""
    build = saved(settings)
    found = []
    for mode, train in (('full', True), ('none', True), ('none', False)):
        net = fsdp.shard(build, device, dtype='bfloat16', mode=mode, train=train)
        attention.set_attention(net, packed=False)
        found.append(net.response_logps(pack(PAIRS, pad=True))[0])
    assert found[0].equal(found[1]) and found[0].equal(found[2])


def test_a_sharded_model_takes_no_attention_either(saved, device, monkeypatch):
    """In bfloat16 the log-probs of answers that see one another may differ by less than is allowed."""
    monkeypatch.delattr(hf.GPTJForCausalLM, '_can_set_attn_implementation_cached_value', raising=False)
    net = fsdp.shard(saved('gptj'), device, dtype='bfloat16', mode='full')
    assert 'it takes no attention from outside' in can_pack(net)[-1]


def test_what_a_gpu_needs_of_fsdp_and_memory(saved, device):
    """torch 2.11 wants an argument in every forward there. What copies and gathered weights take is known beforehand."""
    policy, ref = (
        fsdp.shard(saved('llama'), device, dtype='bfloat16', train=train, mode='full') for train in (True, False)
    )
    assert sharded.fsdp_modules(ref) and sharded.fsdp_modules(policy)
    state = type(policy._get_fsdp_state())
    wrapped = {'autospec': True, 'side_effect': state._root_pre_forward}
    with mock.patch.object(state, '_root_pre_forward', **wrapped) as spy:
        with sharded.unsharded(policy):
            pass
        policy.response_logps(pack(PAIRS))[0].sum().backward()
    calls = [call.args[2:] for call in spy.call_args_list]
    assert len(calls) >= 2 and all(arguments or options for arguments, options in calls)
    policy.reshard()
    found = []
    for policy.shard_mode in ('full', 'grads', 'none'):
        found.append(
            room.estimate({'optimizer': 'SGD', 'dtype': 'bfloat16'}, policy, 0, 0, 1, 1, is_step=False)['buffers']
        )
    gathered, kept, copies = found
    in_blocks = [sum(p.numel() for p in each.parameters()) for each in sharded.fsdp_modules(policy)[1:]]
    assert kept - gathered == 2 * sum(in_blocks) and kept - copies == 2 * 3 * max(in_blocks)
    # somebody's own optimizer is taken for one with two moments
    configs = ({'optimizer': name, 'dtype': 'float32'} for name in ('Lion', 'AdamW'))
    own, known = (room.estimate(config, policy, 0, 0, 1, 1, is_step=False) for config in configs)
    assert own == known


def test_few_logits_are_kept_and_only_on_a_cpu(saved, device, monkeypatch):
    """Their memory is no part of what a token takes."""
    weights = [torch.empty(2**16, 1, device=kind) for kind in ('cpu', 'meta')]
    assert [model.Head.keeps(1024, weight) for weight in weights] == [True, False]
    assert not model.Head.keeps(1025, weights[0])
    policy, pairs = fsdp.shard(saved('llama'), device), data.Examples.of(examples([(3, (4, 9))]))
    per_token = partial(room.bytes_per_token, policy, policy.response_logps, pairs, packed=True)
    with monkeypatch.context() as patch:
        keep(False, patch)
        without = per_token()
    assert per_token() == without > 0


def test_memory_by_hand(saved, device, monkeypatch):
    """A model whose embeddings are frozen, on four ranks: weights, gradients and two moments in float32, a reference in bfloat16."""
    net = fsdp.shard(saved('llama'), device, mode='full')
    net.get_input_embeddings().requires_grad_(False)
    vocab, width = net.get_input_embeddings().weight.shape
    n = sum(p.numel() for p in net.parameters() if p.requires_grad)
    fixed = 4 * vocab * width + sum(x.nbytes for x in net.buffers())
    monkeypatch.setattr(room.dist, 'get_world_size', lambda: 4)
    config = {'optimizer': 'AdamW', 'dtype': 'bfloat16'}
    estimate = partial(room.estimate, config, net, 10, 100)
    needs = estimate(7, 5, is_step=False)
    sizes = [sum(p.numel() for p in block.parameters()) for block in sharded.fsdp_modules(net)[1:]]
    gathered = n + vocab * width - sum(sizes) + 3 * max(sizes)
    assert needs.pop('buffers') == 4 * (kept := vocab * 5) + 6 * (logits := vocab * (5 + width)) + 2 * gathered
    assert needs == {'activations': 70, 'weights': n + fixed / 4, 'gradients': n, 'optimizer': 2 * n, 'reference': 50}
    # backward of a step's only microbatch frees activations while it makes gradients
    assert [estimate(tokens, 5, is_step=True)['gradients'] for tokens in (7, n)] == [n - 70, 0]
    net.shard_mode, config['dtype'] = 'none', 'float32'
    needs = estimate(7, 5, is_step=False)
    assert (needs['buffers'], needs['gradients'], needs['reference']) == (4 * (kept + logits), 4 * n, 400)
    # on the disk: the model as it came in, checkpoints of what trains
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(room, '_check_disk', lambda config, *sizes: sizes)
    said = []
    monkeypatch.setattr(room, 'say', said.append)
    train = data.Examples.of(examples([(3, (4, 9)), (1, (2, 2)), (3, (2, 2))]))  # 16, 5 and 7 tokens
    config = {'save_dtype': None, 'optimizer': 'AdamW', 'save_every': 0}
    run = types.SimpleNamespace(
        config=config, policy=net, train=train, total=50, packed=True, task='pairs', max_tokens=7
    )
    sizes = room.check_room(run)
    assert sizes == (2 * (n + vocab * width), 12 * n, 50)
    words = 'longer than max_tokens=7 (the longest: 16): 1 example, each in a microbatch of its own'
    assert said == [f'note: {words}']


def test_bfloat16_begins_off_the_ties(saved, device):
    """Weights halfway between two numbers of bfloat16 stay put in a step of almost no learning rate."""
    build, batch = saved('llama'), pack(PAIRS)

    def on_ties(empty):
        net = build(empty=empty)
        for p in () if empty else net.parameters():
            p.data = ((p.data.view(torch.int32) & ~0xFFFF) | 0x8000).view(torch.float32)
        return net

    policy, ref = (fsdp.shard(on_ties, device, dtype='bfloat16', train=train) for train in (True, False))
    optimizer = fsdp.make_optimizer('AdamW', policy, 3e-9, 0.0)
    before, _ = same_grads(policy, batch)
    fsdp.update(policy, optimizer, 3e-9, 1.0, 1e9)
    with torch.no_grad():
        assert before.equal(ref.response_logps(batch))
        assert_close(policy.response_logps(batch), before, 1e-3)


@pytest.mark.parametrize(('dropout', 'mode'), [(0.0, 'none'), (0.1, 'full')])
@pytest.mark.parametrize('name', ['gpt2', 'llama', 'gpt_neox'])
def test_activation_checkpointing(name, dropout, mode, saved, device, register):
    keys = ('resid_pdrop', 'embd_pdrop', 'attn_pdrop') if name == 'gpt2' else ('attention_dropout',)
    build, counted = saved(name, **dict.fromkeys(keys, dropout)), mock.Mock(wraps=attention.packed_attention)
    results, kept = [], []
    for checkpointing in (False, True, 'selective'):
        net = fsdp.shard(build, device, cpu_offload=True, mode=mode, activation_checkpointing=checkpointing)
        kept.append(room.bytes_per_token(net, net.response_logps, data.Examples.of(examples(PAIRS)), packed=True))
        register(counted)
        counted.reset_mock()
        results += [same_grads(net, pack(PAIRS)) for _ in range(2)]
        attention.register_attention()
        assert counted.call_count == 2 * (4 if checkpointing is True else 2)  # two layers, recomputed in backward
        assert not any(m.training for m in net.modules() if isinstance(m, torch.nn.Dropout))
    # the second one of two layers is kept while backward recomputes it
    assert kept[0] / 2 < kept[1] < kept[0] and kept[2] < 0.65 * kept[0], kept
    for values, _ in results[1:]:
        assert values.equal(results[0][0])
    for _, grads in results[1:4]:
        assert all(grads[key].equal(grad) for key, grad in results[0][1].items())
    # the two ways through a norm meet in another order
    for _, grads in results[4:]:
        assert all((grads[key] - grad).norm() <= 1e-6 * grad.norm() + 1e-9 for key, grad in results[0][1].items())


def test_selective_checkpointing_copies_parts_of_activations_but_not_of_weights():
    block = lean.LeanBlock(torch.nn.Linear(2, 2))
    pack, output = block.pack_hook, block.recomputed(torch.exp, torch.ones(4, 8, requires_grad=True))
    assert pack(output)[1] == (4, 8) and pack(first := output[0]) is first
    weights = torch.nn.Parameter(torch.ones(4, 8))
    expert, values = weights[1], (2 * weights)[1]
    assert pack(expert) is expert and pack(2 * weights).shape == (4, 8)
    assert pack(values).equal(values) and pack(values).untyped_storage().nbytes() == values.nbytes


@pytest.mark.parametrize(('scale', 'max_norm'), [(0.5, 1e9), (2.0, 1.0), (1e-9, 1.0)])
def test_an_update_scales_and_clips(saved, device, scale, max_norm):
    net = fsdp.shard(saved('llama'), device)
    optimizer = fsdp.make_optimizer('SGD', net, 7.0, 0.0)
    net.response_logps(pack(PAIRS))[0].sum().backward()
    before, grads = zip(*((p.detach().double(), p.grad.double()) for p in net.parameters()), strict=True)
    norm = scale * torch.cat([grad.flatten() for grad in grads]).norm()
    assert fsdp.update(net, optimizer, 0.1, scale, max_norm) == pytest.approx(norm.item(), rel=1e-5)
    factor = 0.1 * scale * min(1.0, max_norm / norm.item())
    for p, old, grad in zip(net.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p.double(), old - factor * grad, rtol=1e-5, atol=1e-6)
        assert p.grad is None
    sharded.check_trained(net, optimizer)
    # a group of somebody's own, as LoRA+ has, keeps its share of the rate; but what it trains has to be the model's
    optimizer.add_param_group({'params': [torch.nn.Parameter(torch.ones(1))], 'lr': 14.0})
    for rate in (0.1, 0.05):
        fsdp.update(net, optimizer, rate, scale, max_norm)
        assert [group['lr'] for group in optimizer.param_groups] == [rate, 2 * rate]
    with pytest.raises(UserError, match='a parameter that the policy does not have'):
        sharded.check_trained(net, optimizer)


@pytest.mark.parametrize(('name', 'tied'), [('llama', True), ('llama', False), ('gpt_neox', False), ('gpt2', True)])
def test_export(name, tied, saved, device, tmp_path):
    build = saved(name, tie_word_embeddings=tied)
    net, batch = fsdp.shard(build, device, cpu_offload=True), pack(PAIRS)
    optimizer = fsdp.make_optimizer('SGD', net, 0.1, 0.0)
    net.response_logps(batch)[0].sum().backward()
    fsdp.update(net, optimizer, 0.1, 1.0, 1.0)
    with torch.no_grad():
        expected = net.response_logps(batch)  # and leaves the root's parameters gathered
    tokenizer, out = toy.tokenizer(), tmp_path / 'model'
    for _ in range(2):  # the second time over the first
        export.write_model(net, tokenizer, build, out)
    assert {file.name for file in tmp_path.iterdir()} == {'model'}
    assert {file.suffix for file in out.iterdir()} <= {'.safetensors', '.json', '.jinja', '.txt'}
    # what transformers makes of it (test_architectures.py: what it finds missing)
    loaded, names = hf.AutoModelForCausalLM.from_pretrained(out), tensors(out).keys()
    assert names == tensors(build.args[0]).keys() and ('lm_head.weight' in names) == (name == 'llama' and not tied)
    net.reshard()
    weights = {key: p.full_tensor() for key, p in net.named_parameters()}
    assert all(p.equal(weights[key]) for key, p in loaded.named_parameters())
    assert any(not p.equal(q) for p, q in zip(loaded.parameters(), build().parameters(), strict=True))
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    # and we
    again, text = load.load_model(str(out)), 'Review of the hotel: the room was rotten, naïve\n'
    again.set_attn_implementation('packed')
    assert model.response_logps(again, batch).equal(expected)
    assert load.load_tokenizer(str(out)).encode(text) == tokenizer.encode(text)


SHARDED = {'alone': {}, 'sharded': {'cpu_offload': True}, 'half': {'dtype': 'bfloat16'}}
SHARDED['mapped'] = {'device_map': 'balanced'}
ADAPTERS = {'rank': 2, 'alpha': 4.0, 'dropout': 0.0, 'targets': None}


@pytest.fixture(scope='module')
def with_own_head(saved):
    """with_own_head(name) -> (build, log-probs of PAIRS by the plain model with the file's head)."""

    def save(name):
        build = saved(name, tie_word_embeddings=True)
        own_head(build.args[0])
        plain = hf.AutoModelForCausalLM.from_pretrained(build.args[0], dtype=torch.float32, attn_implementation='eager')
        assert plain.get_output_embeddings().weight is not plain.get_input_embeddings().weight
        return build, plain_logps(plain.eval()).detach()

    return save


@pytest.mark.parametrize(('name', 'how', 'adapters'), [
    *(('llama', how, None) for how in SHARDED), ('gpt2', 'sharded', None), ('gemma2', 'half', None),
    ('llama', 'alone', ADAPTERS), ('llama', 'sharded', ADAPTERS),
])  # fmt: skip
def test_the_head_of_the_file_is_the_head(name, how, adapters, with_own_head, device, tmp_path, capsys):
    build, expected = with_own_head(name)
    build = partial(build, adapters=adapters)
    tolerance = 0.1 if how == 'half' else 1e-5  # half precision begins with rounded weights
    net = fsdp.shard(build, device, **SHARDED[how])
    with torch.no_grad(), lora.adapters_off(net):
        assert_close(net.response_logps(pack(PAIRS))[0], expected, tolerance)
    assert 'a head of its own' in capsys.readouterr().out
    export.write_model(net, toy.tokenizer(), build, tmp_path / 'model')  # merged: B is still 0
    assert json.loads((tmp_path / 'model/config.json').read_text())['tie_word_embeddings'] is False
    assert_close(plain_logps(load.load_model(str(tmp_path / 'model'))), expected, tolerance)
    assert not capsys.readouterr().out


@pytest.mark.parametrize('how', ['alone', 'sharded'])
def test_the_head_of_the_file_grows_beside_the_embedding(how, with_own_head, device):
    build, expected = with_own_head('llama')
    net = fsdp.shard(partial(build, tokenizer=range(VOCAB + 2), grow=True), device, **SHARDED[how])
    hidden, weight, _ = net.hidden_and_head(pack(PAIRS))
    weight = weight.detach()
    assert len(weight) == VOCAB + 2
    assert_close(weight[VOCAB:], weight[:VOCAB].mean(0).expand(2, -1))
    logps = F.linear(hidden, weight[:VOCAB]).log_softmax(1).gather(1, pack(PAIRS).target[:, None])[:, 0]
    assert_close(pack(PAIRS).sum(logps), expected)


def test_a_sharded_model_that_is_another_is_found_out(with_own_head, device, monkeypatch, capsys):
    build, _ = with_own_head('llama')
    monkeypatch.setattr(fsdp, 'tie_as', lambda model, wanted: None)  # as if it followed the config, not the file
    fsdp.shard(build, device, dtype='bfloat16', mode='full')
    assert 'warning: the sharded LlamaForCausalLM gives other log-probs' in capsys.readouterr().out
    with pytest.raises(UserError, match='LlamaForCausalLM gives other log-probs than the loaded one: off by'):
        fsdp.shard(build, device, cpu_offload=True)
    # as MiniMax's forward multiplies
    monkeypatch.setattr(probe, '_outputs', lambda *_: torch.ones(2, 2) @ torch.ones(2, 2).bfloat16())
    with pytest.raises(UserError, match='LlamaForCausalLM does not compute in bfloat16 .*: --dtype=float32'):
        probe.check_outputs(build(empty=False), None, device, in_bfloat16=True)
    # ties follow what was loaded
    both = (hf.LlamaConfig(**GROUPED, tie_word_embeddings=tied) for tied in (True, False))
    tied, apart = map(hf.AutoModelForCausalLM.from_config, both)
    wanted = ties.ties(tied)
    assert wanted == {'lm_head.weight': 'model.embed_tokens.weight'} and ties.ties(apart) == {}
    ties.tie_as(tied, {})
    ties.tie_as(apart, wanted)
    assert ties.ties(tied) == {} and ties.ties(apart) == wanted and not tied.config.tie_word_embeddings


class OnCuda(torch.Tensor):
    """A float32 tensor on the CPU that says it is in half precision on CUDA."""

    is_cuda = True
    dtype = torch.bfloat16


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch documents, one sequence at a time: causal masks are aligned at the end."""
    query, key, value = (x.as_subclass(torch.Tensor) for x in (query, key, value))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q[0] == cu_seq_k[0] == 0
    assert cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key) == len(value)
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out, most = [], window_size[0] if window_size[0] >= 0 else math.inf
    sizes_q, sizes_k = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    for q, k, v in zip(query.split(sizes_q), key.split(sizes_k), value.split(sizes_k), strict=True):
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        scores = scale * torch.einsum('ihd, jhd -> hij', q, k)
        weights = scores.masked_fill((distance < 0) | (distance > most), -math.inf).softmax(-1)
        out.append(torch.einsum('hij, jhd -> ihd', weights, v))
    return torch.cat(out)


@pytest.mark.parametrize('shape', [PAIRS, LATER, SINGLES, TRIPLES], ids=['pairs', 'later', 'singles', 'triples'])
@pytest.mark.parametrize('window', [None, 1, 4, 100])
@pytest.mark.parametrize(('heads', 'old'), [(2, False), (2, True), (4, False)])
def test_the_kernel_gets_what_the_loop_computes(heads, old, window, shape, monkeypatch):
    """And what it computes with every group in a bundle of its own. Of 4 heads of queries two share a key's, or none."""
    calls = []

    def called(*args, enable_gqa=False, **kwargs):
        grouped = {'enable_gqa': True} if enable_gqa else {}
        inspect.signature(real).bind(*args, **grouped, **kwargs)
        calls.append(enable_gqa)
        return varlen_attn(*args, **grouped, **kwargs)

    def called_old(*args, scale, window_size):
        return called(*args, scale=scale, window_size=window_size)

    real = torch.nn.attention.varlen.varlen_attn
    # before torch 2.13 the real one is old, too
    old = old or 'enable_gqa' not in inspect.signature(real).parameters
    monkeypatch.setattr(torch.nn.attention.varlen, 'varlen_attn', called_old if old else called)
    batch = pack(shape)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, batch.ids.numel(), 8, generator=generator) for h in (4, heads, heads))
    options = {'scaling': 0.3, 'sliding_window': window, 'packed': batch}
    loop, _ = attention.packed_attention(None, q, k, v, None, **options)
    assert loop.shape == (1, batch.ids.numel(), 4, 8) and not calls
    # each answer by itself, as in large groups
    monkeypatch.setattr(attention, 'MAX_BUNDLE_TOKENS', 0)
    alone, _ = attention.packed_attention(None, q, k, v, None, **options | {'packed': pack(shape)})
    assert_close(alone, loop, 1e-6)
    batch.varlen = attention.Varlen(batch.groups)
    # a tensor that lies about its type cannot be read by words
    monkeypatch.setattr(attention, '_rows', lambda x, index: x.as_subclass(torch.Tensor)[index])
    out, weights = attention.packed_attention(None, *(x.as_subclass(OnCuda) for x in (q, k, v)), None, **options)
    assert calls == [heads == 2 and not old] and weights is None
    assert_close(out, loop, 1e-6)


@pytest.mark.parametrize('width', [8, 80, 6])  # of heads; words of 16 bytes do not fit into the last one
@pytest.mark.parametrize('strided', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_gathered_keys(dtype, strided, width):
    """Rows, and the sums of their gradients, as by plain indexing: keys lie as a rotary embedding leaves them, values inside qkv."""
    layout, n = attention.Varlen([(3, (2, 4)), (5, (1,)), (2, (2, 1, 3))]), 3 + 6 + 6 + 2 + 6
    x = torch.randn(1, n, 4, 3 * width).to(dtype)
    x = x[..., 2 * width :] if strided else x[..., :width].transpose(1, 2).contiguous().transpose(1, 2)
    ours, plain = (x[0].detach().requires_grad_() for _ in range(2))
    gathered = attention.CopyPrompts.apply(ours, layout)
    assert torch.equal(gathered, plain[layout.key_tokens])
    slope = torch.randn_like(gathered.float()).to(dtype)
    gathered.backward(slope)
    plain.double()[layout.key_tokens].backward(slope.double())
    assert_close(ours.grad.float(), plain.grad.float(), 0.02 if dtype == torch.bfloat16 else 1e-6)
    # heads that do not begin at a word of 16 bytes, though rows do
    odd = torch.randn(n, 4, 9).to(dtype)[..., :8]
    assert torch.equal(attention.CopyPrompts.apply(odd, layout), odd[layout.key_tokens])
    assert attention.Varlen([(3, (2,)), (5, (1,))]).key_tokens is None


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_rmsprop_by_one_kernel(weight_decay):
    """Twenty steps as torch takes them, of gradients whose size changes."""
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((30, 7), (17,))]
    ours = [p.detach().clone() for p in theirs]
    squares = [torch.zeros_like(p) for p in ours]
    optimizer = torch.optim.RMSprop(theirs, lr=1e-2, weight_decay=weight_decay)
    for i in range(20):
        for p in theirs:
            p.grad = torch.randn_like(p) * 10 ** (i % 4 - 2)
        grads = [p.grad.clone() for p in theirs]
        rmsprop_(ours, grads, squares, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=weight_decay)
        optimizer.step()
    for p, q, square in zip(theirs, ours, squares, strict=True):
        assert_close(q, p.detach(), 1e-6)
        assert_close(square, optimizer.state[p]['square_avg'], 1e-6)


def test_what_is_summed_over_ranks(monkeypatch):
    """As each of two ranks does it, of which the first alone counts where they hold a model together."""
    reduced, values = [], torch.tensor([5.0, 6.0])
    monkeypatch.setattr(fsdp.dist, 'all_reduce', lambda x, op=None: reduced.append(op) or x.add_(1))
    monkeypatch.setattr(fsdp.dist, 'get_world_size', lambda: 2)
    for rank, tp, whole in ((0, 1, [1, 6, 1]), (1, 1, [1, 6, 1]), (0, 2, [1, 6, 1]), (1, 2, [1, 1, 1])):
        monkeypatch.setattr(fsdp.dist, 'get_rank', lambda rank=rank: rank)
        monkeypatch.setattr(ranks, 'tp_size', lambda tp=tp: tp)
        found = fsdp.gather_columns({'b': values, 'a': -values}, [1, -1], 3)
        assert found['b'].tolist() == whole and found['a'].tolist() == [2 - x for x in whole]
    assert fsdp.smallest(values) == 6 and reduced[-1] == fsdp.dist.ReduceOp.MIN
    net = torch.nn.Linear(2, 1)
    for mode, mean in (('full', [4.0, 8.0]), ('none', [3.0, 5.0])):
        net.reshard, net.shard_mode, net.weight.grad = lambda: None, mode, torch.tensor([[4.0, 8.0]])
        assert [grad.tolist() for grad in fsdp.average_gradients(net)] == [[mean]] == [net.weight.grad.tolist()]


@pytest.mark.parametrize('world, dtype, train, compared', [(1, 'float32', True, 0), (2, 'float32', True, 1), (1, 'bfloat16', True, 1), (1, 'bfloat16', False, 0)])  # fmt: skip
def test_a_model_is_compared_with_the_loaded_one_where_it_has_moved(world, dtype, train, compared, monkeypatch):
    """To other ranks, or into FSDP."""
    found, device = [], ranks.setup()[2]
    monkeypatch.setattr(probe, 'check_outputs', lambda *arguments: found.append(arguments))
    monkeypatch.setattr(fsdp, 'dist', types.SimpleNamespace(**vars(fsdp.dist) | {'get_world_size': lambda: world}))
    net = fsdp.shard(lambda empty: tiny('llama'), device, dtype=dtype, train=train, mode='none')
    assert len(found) == compared and net.shard_mode == 'none'


@pytest.mark.parametrize('tp, sizes', [(1, {'dp': 8}), (2, {'dp': 4, 'tp': 2})])
def test_meshes_of_eight_ranks(tp, sizes, monkeypatch):
    monkeypatch.setattr(fsdp, 'dist', types.SimpleNamespace(get_world_size=lambda: 8))
    mesh = lambda _, sizes, mesh_dim_names: dict(zip(mesh_dim_names, sizes, strict=True))  # noqa: E731
    monkeypatch.setattr(fsdp, 'init_device_mesh', mesh)
    assert fsdp._mesh.__wrapped__('cpu', tp, None) == sizes
