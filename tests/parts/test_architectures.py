"""dpo.py as a user runs it, on a tiny random model of every family: one step, the model folder, and what is said on screen.

What a step must do is computed here from the plain transformers model, one unpadded sequence at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers import metrics, run_script, write_jsonl
from test_model import ALL, GROUPED, NONE, PACKED, randomise

from hf import attention
from text import toy

BETA, LR = 0.3, 0.5
SMALL = {'hidden_size': 16, 'num_hidden_layers': 2, 'state_size': 4, **NONE}
# fmt: off
OTHERS = {
    'llama4_text': GROUPED | {'head_dim': 4, 'num_local_experts': 2, 'num_experts_per_tok': 1, 'interleave_moe_layer_step': 2,
                              'intermediate_size_mlp': 24, 'attention_chunk_size': 4},
    'mamba': SMALL,  # each block holds a mixer, both named
    'mpt': {'d_model': 16, 'n_heads': 4, 'n_layers': 2, **NONE},  # fails without a mask
    'recurrent_gemma': GROUPED | {'lru_width': 16, 'attention_window_size': 4, 'head_dim': 4},  # its own name for a soft cap
    'jamba': GROUPED | {'num_experts': 2, 'num_experts_per_tok': 1, 'mamba_d_state': 4, 'use_mamba_kernels': False,
                        'attn_layer_period': 2, 'attn_layer_offset': 1, 'mamba_dt_rank': 2},
}
NAMES = ['gpt2', 'gpt_neox', 'llama', 'qwen2', 'qwen3', 'mistral', 'gemma2', 'gemma3_text', 'phi3', 'mixtral', 'gptj', 'gpt_oss',
         'lfm2', *OTHERS]
TIED = ('qwen2', 'gemma2', 'gemma3_text')
ANSWERS = [(' clean', ' dusty and dull and horrid .'), (' the room was very clean and the bed was fine .', ' no'),
           (' superb', ' the music was rotten'), (' fine and great and nice and clean .', ' plain .')]
ROWS = [{'prompt': f'Review of the {place}:' * (i + 1), 'chosen': chosen, 'rejected': rejected}
        for i, (place, (chosen, rejected)) in enumerate(zip(toy.PLACES, ANSWERS, strict=False))]
# fmt: on


def plain_logp(net, tokenizer, prompt, answer):
    """log p(answer, end of text | prompt) from the model's own eager forward of this one sequence."""
    eos = [tokenizer.eos_token_id]
    p, a = (tokenizer(text, add_special_tokens=False)['input_ids'] for text in (prompt, answer))
    ids = torch.tensor([p + a + eos])
    logits = net(input_ids=ids, use_cache=False).logits[0, len(p) - 1 : -1].float()
    return logits.log_softmax(-1)[range(len(a) + 1), ids[0, len(p) :]].sum()


def step(folder):
    """(the model of folder/base after one step of DPO by hand, the size of that step, mean log-probs of chosen and rejected)."""
    options = {'dtype': torch.float32, 'attn_implementation': 'eager'}
    net = hf.AutoModelForCausalLM.from_pretrained(folder / 'base', **options).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / 'base')
    sides = [[plain_logp(net, tokenizer, row['prompt'], row[side]) for row in ROWS] for side in ('chosen', 'rejected')]
    w, l = map(torch.stack, sides)
    (-F.logsigmoid(BETA * ((w - w.detach()) - (l - l.detach())))).mean().backward()
    moved = [p for p in net.parameters() if p.grad is not None]
    with torch.no_grad():
        size = LR * torch.stack([p.grad.norm() for p in moved]).norm()
        for p in moved:
            p -= LR * p.grad
    return net, size, [w.mean().item(), l.mean().item()]


@pytest.mark.parametrize('name', NAMES)
def test_one_step_and_the_folder_it_leaves(name, tmp_path, capsys):
    settings = {'tie_word_embeddings': True} if name in TIED else {}
    config = hf.AutoConfig.for_model(name, **(ALL | OTHERS)[name] | settings | {'vocab_size': 512})
    randomise(hf.AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / 'base')
    toy.tokenizer().save_pretrained(tmp_path / 'base')
    # one SGD step on the four pairs
    file = write_jsonl(tmp_path / 'pairs.jsonl', ROWS)
    options = {'model': tmp_path / 'base', 'data': file, 'eval_data': file, 'beta': BETA, 'batch_size': 4, 'lr': LR,
               'warmup_steps': 0, 'optimizer': 'SGD', 'max_grad_norm': 1e9, 'out_dir': tmp_path / 'out'}  # fmt: skip
    policy = run_script('dpo.py', *(f'--{k}={v}' for k, v in options.items()))['run'].policy
    said = capsys.readouterr().out
    assert ('cannot be packed' in said) == (name not in PACKED), said
    rows = {row['split']: row for row in metrics(tmp_path / 'out')}
    row, before = rows['train'], rows['check']
    assert before['loss/train'] == pytest.approx(math.log(2), abs=2e-6) and 'reference: 0.693147)' in said
    assert max(abs(before[f'rewards_train/{side}']) for side in ('chosen', 'rejected')) < 1e-5
    expected, size, logps = step(tmp_path)
    assert [row['logps_train/chosen'], row['logps_train/rejected']] == pytest.approx(logps, rel=1e-5)
    assert row['grad_norm'] * LR == pytest.approx(size.item(), rel=1e-3) and size > 0.05
    # the folder
    options = {'attn_implementation': 'eager', 'output_loading_info': True}
    loaded, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / 'out/model', **options)
    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    assert type(loaded) is type(expected)
    gaps = [(p - q).norm() for p, q in zip(loaded.parameters(), expected.parameters(), strict=True)]
    assert torch.stack(gaps).norm() <= 1e-4 * size
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == bool(getattr(loaded.config, 'tie_word_embeddings', False))
    ids = torch.arange(30)[None]
    with torch.no_grad(), attention.padded_attention(policy):
        ours = policy(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        assert (loaded(ids, use_cache=False).logits - ours).abs().max() < 1e-4 * ours.abs().max()
