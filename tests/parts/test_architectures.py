"""dpo.py as a user runs it, on a tiny random model of every family: one step, the model folder, and what is said on screen.

What a step must do is computed here from the plain transformers model, one unpadded sequence at a time: the weights in
out_dir/model are those before it minus lr times the gradient of the DPO loss, and that folder loads with nothing but
transformers. Whether log-probs and gradients are right for every layout is test_model.py's."""

import contextlib
import io
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from test_model import ALTERNATING, BASE, EXPERTS, GROUPED, NONE, OLD, SLIDING, randomise

import model
from configurator import UserError
from text import toy

ROOT = Path(__file__).resolve().parents[2]
BETA, LR = 0.3, 0.5
PACKED = {
    'gpt2': OLD,
    'gpt_neox': BASE,
    'llama': GROUPED,
    'qwen2': GROUPED | {'tie_word_embeddings': True},
    'qwen3': GROUPED | {'head_dim': 8},
    'mistral': SLIDING,
    'gemma2': ALTERNATING | {'head_dim': 8, 'query_pre_attn_scalar': 5, 'attn_logit_softcapping': 0.5,
                             'final_logit_softcapping': 0.7, 'tie_word_embeddings': True},
    'gemma3_text': ALTERNATING | {'head_dim': 8, 'query_pre_attn_scalar': 5, 'tie_word_embeddings': True},
    'phi3': SLIDING,
    'mixtral': GROUPED | {'num_local_experts': 4, 'num_experts_per_tok': 2},
    'qwen3_moe': GROUPED | EXPERTS | {'num_experts': 4, 'head_dim': 8},
}  # fmt: skip
PADDED = {
    'gptj': OLD | {'rotary_dim': 2},
    'gpt_oss': ALTERNATING | {'head_dim': 8, 'num_local_experts': 4, 'num_experts_per_tok': 2},
    'lfm2': GROUPED | {'layer_types': ['conv', 'full_attention']},
    'llama4_text': GROUPED | {'head_dim': 4, 'num_local_experts': 2, 'num_experts_per_tok': 1, 'interleave_moe_layer_step': 2,
                              'intermediate_size_mlp': 24, 'attention_chunk_size': 4},
    'mamba': {'hidden_size': 16, 'num_hidden_layers': 2, 'state_size': 4, **NONE},  # each block holds a mixer, both named
    'mamba2': {'hidden_size': 16, 'num_hidden_layers': 2, 'state_size': 4, 'num_heads': 4, 'head_dim': 8, 'n_groups': 1, **NONE},
    'mpt': {'d_model': 16, 'n_heads': 4, 'n_layers': 2, **NONE},  # fails without a mask
    'recurrent_gemma': GROUPED | {'lru_width': 16, 'attention_window_size': 4, 'head_dim': 4},  # its own name for a soft cap
    'jamba': GROUPED | {'num_experts': 2, 'num_experts_per_tok': 1, 'mamba_d_state': 4, 'use_mamba_kernels': False,
                        'attn_layer_period': 2, 'attn_layer_offset': 1, 'mamba_dt_rank': 2},
}  # fmt: skip
ANSWERS = [(' clean', ' dusty and dull and horrid .'), (' the room was very clean and the bed was fine .', ' no'),
           (' superb', ' the music was rotten'), (' fine and great and nice and clean .', ' plain .')]  # fmt: skip
ROWS = [{'prompt': f'Review of the {place}:' * (i + 1), 'chosen': chosen, 'rejected': rejected}
        for i, (place, (chosen, rejected)) in enumerate(zip(toy.PLACES, ANSWERS, strict=False))]  # fmt: skip


@pytest.fixture(scope='module', autouse=True)
def one_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def make(folder, name, options):
    """A folder with a tiny random model of this architecture and the toy tokenizer."""
    settings = hf.AutoConfig.for_model(**{'model_type': name} | options | {'vocab_size': 512})
    randomise(hf.AutoModelForCausalLM.from_config(settings)).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)


def train(folder, *flags):
    """dpo.py: one SGD step on the four pairs. Returns (its globals, what it printed)."""
    (folder / 'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
    options = {'model': folder / 'base', 'data': folder / 'pairs.jsonl', 'eval_data': folder / 'pairs.jsonl', 'beta': BETA,
               'batch_size': 4, 'lr': LR, 'warmup_steps': 0, 'optimizer': 'SGD', 'max_grad_norm': 1e9, 'out_dir': folder / 'out'}  # fmt: skip
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, 'argv', ['dpo.py', *(f'--{k}={v}' for k, v in options.items()), *flags])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        patch.setattr(torch, 'set_num_threads', lambda n: None)
        patch.setenv('NANOPREF_CACHE', str(folder / 'cache'))
        return runpy.run_path(str(ROOT / 'dpo.py'), run_name='script'), said.getvalue()


def plain_logp(net, tokenizer, prompt, answer):
    """log p(answer, end of text | prompt) from the model's own eager forward of this one sequence."""
    eos = [tokenizer.eos_token_id]
    p, a = (tokenizer(text, add_special_tokens=False)['input_ids'] for text in (prompt, answer))
    ids = torch.tensor([p + a + eos])
    logits = net(input_ids=ids, use_cache=False).logits[0, len(p) - 1 : -1].float()
    return logits.log_softmax(-1)[range(len(a) + 1), ids[0, len(p) :]].sum()


def step(folder):
    """(the model of folder/base after one step of DPO by hand, the size of that step, mean log-probs of chosen and rejected)."""
    net = hf.AutoModelForCausalLM.from_pretrained(
        folder / 'base', dtype=torch.float32, attn_implementation='eager'
    ).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / 'base')
    w, l = (torch.stack([plain_logp(net, tokenizer, row['prompt'], row[side]) for row in ROWS])
            for side in ('chosen', 'rejected'))  # fmt: skip
    (-F.logsigmoid(BETA * ((w - w.detach()) - (l - l.detach())))).mean().backward()
    with torch.no_grad():
        size = LR * torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()
        for p in net.parameters():
            p -= LR * (0 if p.grad is None else p.grad)
    return net, size, [w.mean().item(), l.mean().item()]


def check(folder, packed):
    done, said = train(folder)
    assert ('cannot be packed' in said) == (not packed), said
    rows = {row['split']: row for row in map(json.loads, (folder / 'out/metrics.jsonl').read_text().splitlines())}
    row, before = rows['train'], rows['check']
    assert before['loss/train'] == pytest.approx(math.log(2), abs=2e-6) and 'log 2 = 0.693147' in said
    assert max(abs(before[f'rewards_train/{side}']) for side in ('chosen', 'rejected')) < 1e-5
    expected, size, logps = step(folder)
    assert [row['logps_train/chosen'], row['logps_train/rejected']] == pytest.approx(logps, rel=1e-5)
    assert row['grad_norm'] * LR == pytest.approx(size.item(), rel=1e-3)
    assert size > 0.05

    loaded, info = hf.AutoModelForCausalLM.from_pretrained(
        folder / 'out/model', attn_implementation='eager', output_loading_info=True
    )
    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    assert type(loaded) is type(expected)
    wrong = torch.stack(
        [(p - q).norm() for p, q in zip(loaded.parameters(), expected.parameters(), strict=True)]
    ).norm()
    assert wrong <= 1e-4 * size, wrong / size
    ids = torch.arange(30)[None]
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == bool(getattr(loaded.config, 'tie_word_embeddings', False))
    with torch.no_grad(), model.padded_attention(done['run'].policy):
        ours = done['run'].policy(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        assert (loaded(ids, use_cache=False).logits - ours).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize('name', PACKED | PADDED)
def test_one_step_and_the_folder_it_leaves(name, tmp_path):
    make(tmp_path / 'base', name, (PACKED | PADDED)[name])
    check(tmp_path, packed=name in PACKED)


def test_a_model_that_cannot_run_says_so(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError('only on Tuesdays')

    make(tmp_path / 'base', 'llama', PACKED['llama'])
    monkeypatch.setattr(hf.LlamaModel, 'forward', fails)
    with pytest.raises(UserError, match='LlamaForCausalLM cannot be trained here: its forward says only on Tuesdays'):
        train(tmp_path)
