"""A real pretrained model, SmolLM2-135M-Instruct: what holds for tiny random ones holds for it, and its answers make sense.

NANOPREF_REAL_MODEL names its folder; else it is the one that `make real` leaves. Nothing is downloaded here."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import ROOT, metrics, run_script, same_bits, write_jsonl

import data
import model as models
from experiments.claims.trial import columns
from hf import attention
from hf.generate import generate, stop_tokens
from hf.load import load_model, load_reward, load_tokenizer, separate_pad
from rl import divergences
from rl.heads import response_scores
from text.tokenise import load_examples, tokenise_prompts

FOLDER = Path(os.environ.get('NANOPREF_REAL_MODEL', ROOT / 'out/real/SmolLM2-135M-Instruct'))
pytestmark = pytest.mark.skipif(
    not (FOLDER / 'model.safetensors').exists(),
    reason='there is no SmolLM2-135M-Instruct: make real makes it, or NANOPREF_REAL_MODEL names its folder',
)
PAIRS = [
    {'prompt': 'How do I keep bread fresh?', 'chosen': 'Keep it in a paper bag, away from light.', 'rejected': 'No idea, just buy another one.'},
    {'prompt': 'Name a river in France.', 'chosen': 'The Loire is the longest of them.', 'rejected': 'Rivers are boring. Ask me something else!'},
]  # fmt: skip


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp('pairs') / 'pairs.jsonl', PAIRS)


@pytest.fixture(scope='module')
def examples(pairs):
    """The pairs as tokens, in the model's chat template."""
    options = {'max_length': 128, 'max_prompt_length': 64, 'chat': True, 'undivided': True}
    return load_examples(pairs, 'train', load_tokenizer(str(FOLDER)), 'pairs', **options)


@pytest.fixture(scope='module')
def original():
    return load_model(str(FOLDER))


@torch.no_grad()
def packed_and_padded(model, examples, function):
    """function(model, batch) of the examples packed, and padded."""
    items, found = [examples[i] for i in range(len(examples))], []
    for pad in (False, True):
        attention.set_attention(model, packed=not pad)
        found.append(function(model, data.pack(items, range(len(items)), pad=pad)))
    return found


def train(pairs, out_dir, *flags):
    """One step of Dr. DPO on the pairs, before which rewards are 0. Returns the model that it leaves."""
    lengths = '--batch_size=2 --chat --max_length=128 --max_prompt_length=64 --n_eval_examples=0 --warmup_steps=0'
    options = ['--loss=drdpo', f'--model={FOLDER}', f'--data={pairs}', f'--eval_data={pairs}', f'--out_dir={out_dir}']
    run_script('dpo.py', *lengths.split(), *options, *flags)
    (check,) = metrics(out_dir, 'check')
    assert check['rewards_train/chosen'] == check['rewards_train/rejected'] == 0
    assert check['loss/train'] == pytest.approx(0.693147, abs=1e-6)
    return load_model(str(out_dir / 'model'))


def test_a_step(pairs, examples, original, tmp_path):
    """An exact KL(reference || policy) of 0 to itself, and above 0 after it; the saved model is read again bit for bit."""
    trained = train(pairs, tmp_path / 'run', '--lr=1e-5')
    for either in (trained, original):
        attention.set_attention(either, True)
    assert columns(original, original, examples, divergences.kl)[1].abs().max() == 0
    assert (columns(trained, original, examples, divergences.kl)[1] > 0).all()
    trained.save_pretrained(tmp_path / 'again')
    assert same_bits(tmp_path / 'again', tmp_path / 'run/model')


def test_answers(original):
    """In its chat template it knows the capital of France, and ends its answer."""
    tokenizer = load_tokenizer(str(FOLDER))
    chat = [{'role': 'user', 'content': 'What is the capital of France?'}]
    prompts = tokenise_prompts([chat], tokenizer, 128, 'start', Counter())
    (answer,) = generate(original, tokenizer, prompts, [0], max_new_tokens=24, temperature=0, keep_end=True)
    assert 'Paris' in tokenizer.decode(answer)
    assert len(answer) < 24 and answer[-1] in stop_tokens(original, tokenizer)


def test_adapters_merge(pairs, examples, original, tmp_path):
    """The merged model gives what PEFT makes of the model and the adapter."""
    import peft

    merged = train(pairs, tmp_path / 'run', '--lora_rank=4', '--lr=1e-3')
    adapted = peft.PeftModel.from_pretrained(load_model(str(FOLDER)), str(tmp_path / 'run/adapter')).eval()
    three = merged, adapted, original
    ours, theirs, before = (packed_and_padded(either, examples, models.response_logps)[0] for either in three)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    assert (ours - before).abs().max() > 0.01


def test_packed_is_padded(examples, original):
    """Log-probs, and the scores of a new scalar head."""
    packed, padded = packed_and_padded(original, examples, models.response_logps)
    assert torch.allclose(packed, padded, rtol=1e-4, atol=1e-3) and (packed < -5).all()
    scorer = load_reward(str(FOLDER), separate_pad(load_tokenizer(str(FOLDER))), new_head=True)
    packed, padded = packed_and_padded(scorer, examples, response_scores)
    assert packed.shape == (2 * len(PAIRS),) and packed.std() > 0
    assert torch.allclose(packed, padded, rtol=1e-4, atol=1e-4)
