"""One trial of experiments/claims: train with a script of this repository, in this process, then measure the model on the toy world.

A trial is {'script', 'data', 'seed', 'options'}; options None is the SFT model itself. Its result is one line of results.jsonl.
"""

import contextlib
import io
import json
import os
import random
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import model as models
from configurator import UserError
from data import make_batches
from experiments import ROOT
from hf import generate
from hf.load import load_model, load_tokenizer
from text import tokenise, toy
from text.examples import Examples

N_PAIRS = 2560  # training pairs of a trial: 40 steps of 64
COMMON = {  # of every trial on pairs
    'n_epochs': 1, 'batch_size': 64, 'lr_schedule': 'linear', 'warmup_steps': 4, 'n_eval_examples': 0, 'do_first_eval': False,
    'max_length': 64, 'max_prompt_length': 16, 'log_every': 10**6,
}  # fmt: skip
COMMON_ONLINE = {  # of every trial with sampled answers, as in config/ppo_toy.py and config/grpo_toy.py
    'data': 'toy', 'reward_model': 'gold', 'batch_size': 256, 'minibatch_size': 64, 'lr_schedule': 'linear', 'max_new_tokens': 48,
    'n_eval_examples': 0, 'do_first_eval': False, 'log_every': 10**6,
}  # fmt: skip
LOW, HIGH = 0.5, 1.2  # a pair has a low gap below the first, a high gap above the second


def gap(pair):
    """Gold reward of the chosen answer minus that of the rejected one."""
    return toy.gold(pair['prompt'], pair['chosen']) - toy.gold(pair['prompt'], pair['rejected'])


def training_pairs(kind, seed, n=N_PAIRS):
    """n pairs of the toy world that belong to this seed. kind: all, low (gap), high (gap), or mixed (half of each)."""
    wanted = {'all': lambda g: True, 'low': lambda g: g < LOW, 'high': lambda g: g > HIGH}
    source = [(abs(gap(pair)), pair) for pair in toy.pairs(f'claims {seed}', n if kind == 'all' else 4 * n)]
    if kind != 'mixed':
        found = [pair for g, pair in source if wanted[kind](g)][:n]
    else:
        found = [pair for k in ('low', 'high') for pair in [pair for g, pair in source if wanted[k](g)][: n // 2]]
        random.Random(seed).shuffle(found)
    assert len(found) == n, f'{len(found)} of {n} pairs of kind {kind}'
    return found


def held_out_pairs():
    """Pairs whose labels the gold reward itself decides, without noise; ties are left out."""
    for pair in toy.pairs('test', 600):
        if g := gap(pair):
            yield pair if g > 0 else pair | {'chosen': pair['rejected'], 'rejected': pair['chosen']}


def write_pairs(file, pairs):
    """A jsonl file, whole or not at all, written once."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f'.{os.getpid()}')
        part.write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
        part.replace(file)
    return file


def train(script, out, options):
    """Run a script of this repository in this process, quietly. Raises its UserError."""
    argv, sys.argv = sys.argv, [script, *(f'--{k}={v}' for k, v in options.items()), f'--out_dir={out}']
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(str(ROOT / script), run_name='script')
    finally:
        sys.argv = argv


def train_reference(work):
    """The SFT model that every trial starts from, trained once."""
    if not (work / 'sft' / 'model').exists():
        shutil.rmtree(work / 'sft', ignore_errors=True)
        train('sft.py', work / 'sft', {
            'model': 'toy', 'data': 'toy', 'n_epochs': 3, 'batch_size': 32, 'lr': 1e-2, 'lr_schedule': 'cosine',
            'warmup_steps': 20, 'n_eval_examples': 0, 'do_first_eval': False, 'log_every': 10**6,
        })  # fmt: skip
    return work / 'sft' / 'model'


def run_trial(trial, work, n_samples):
    """Train and measure. Returns the trial with its result; with 'error' where the script refused it."""
    torch.set_num_threads(1)
    work, began = Path(work), time.time()
    os.environ.setdefault('NANOPREF_CACHE', str(work / 'cache'))
    reference, out = work / 'sft' / 'model', work / f'run-{os.getpid()}'
    shutil.rmtree(out, ignore_errors=True)
    result = dict(trial, commit=commit(), n_samples=n_samples)
    cpu = time.process_time()
    try:
        if trial['options'] is not None:
            options = {'model': reference, 'seed': trial['seed']} | trial['options']
            if trial['script'] == 'ppo.py':
                options = COMMON_ONLINE | options
            else:
                file = work / 'data' / f'{trial["data"]}-{trial["seed"]}.jsonl'
                write_pairs(file, training_pairs(trial['data'], trial['seed']))
                test = write_pairs(work / 'data' / 'test.jsonl', held_out_pairs())
                options = COMMON | {'data': file, 'eval_data': test} | options
            train(trial['script'], out, options)
        trained = time.time()
        result |= measure(
            reference if trial['options'] is None else out / 'model', reference, work, n_samples, trial['seed']
        )
        result |= {'seconds_training': round(trained - began, 1)}
    except UserError as error:
        result['error'] = str(error)
    shutil.rmtree(out, ignore_errors=True)
    return result | {'seconds': round(time.time() - began, 1), 'cpu_seconds': round(time.process_time() - cpu, 1)}


def commit():
    """The commit that is checked out, with a + where files differ from it."""
    git = ['git', '-C', str(ROOT)]
    head = subprocess.run([*git, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        [*git, 'status', '--porcelain', '-uno', '--', '*.py'], capture_output=True, text=True
    ).stdout
    return head + '+' * bool(changed.strip())


# ---- measuring ----


@torch.no_grad()
def columns(policy, reference, examples, divergence):
    """(3, answers): log-probs, divergences summed over positions, the reference's log-probs; examples in order."""
    parts = []
    for first in range(0, len(examples), 64):
        rows = np.arange(first, min(first + 64, len(examples)))
        for batch in make_batches(examples, rows, 0, 1, 10**9)[0]:
            hidden = models.hidden_and_head(reference, batch)
            parts.append(models.response_logps(policy, batch, divergence, hidden))
    return torch.cat(parts, 1).double()


def measure(folder, reference_folder, work, n_samples, noise):
    """Gold reward, KL to the reference, accuracy on clean pairs: the same prompts for every model, the same noise for every model of a seed.

    kl: KL(policy || reference) of whole answers, summed exactly over the words at every position of the policy's own samples.
    kl_chosen, kl_rejected: KL(reference || policy), so summed over the positions of the held-out answers. accuracy: share of
    held-out pairs whose better answer has gained more probability (for the reference itself: has more probability a token)."""
    tokenizer = load_tokenizer(str(reference_folder))
    policy, reference = (load_model(str(f), tokenizer=tokenizer) for f in (folder, reference_folder))
    prompts = [f'Review of the {place}:' for place in sorted(toy.PLACES)]
    prompts = [prompts[i % len(prompts)] for i in range(n_samples)]
    ids = tokenizer(prompts, add_special_tokens=False)['input_ids']
    answers = []
    for i in range(0, n_samples, 256):
        seeds = [(noise + 1) * 10**9 + j for j in range(i, min(i + 256, n_samples))]
        answers += generate.generate(policy, tokenizer, ids[i : i + 256], seeds, max_new_tokens=40, keep_end=True)
    stop = generate.stop_tokens(policy, tokenizer)
    texts = [tokenizer.decode(generate.without_end(a, stop)) for a in answers]
    gold = [toy.gold(p, a) for p, a in zip(prompts, texts, strict=True)]
    for m in (policy, reference):
        models.set_attention(m, packed=True)
    own = Examples.of([(p, [a]) for p, a in zip(ids, answers, strict=True)])
    spent = columns(policy, reference, own, lambda log_pi, log_ref: models.kl(log_ref, log_pi))[1]
    test = write_pairs(work / 'data' / 'test.jsonl', held_out_pairs())
    limits = {'max_length': 64, 'max_prompt_length': 16, 'undivided': True}
    pairs = tokenise.load_examples(str(test), 'test', tokenizer, 'pairs', **limits)
    pi, forward, ref = columns(policy, reference, pairs, models.kl)
    n = torch.from_numpy(np.diff(pairs.spans[:, 1:], axis=2)[..., 0].reshape(-1)).double()
    gain = pi / n if folder == reference_folder else pi - ref
    return {
        'gold': round(statistics.mean(gold), 5), 'gold_se': round(statistics.stdev(gold) / n_samples**0.5, 5),
        'kl': round(spent.mean().item(), 5), 'accuracy': round((gain[::2] > gain[1::2]).double().mean().item(), 5),
        'kl_chosen': round(forward[::2].mean().item(), 5), 'kl_rejected': round(forward[1::2].mean().item(), 5),
        'well_formed': round(statistics.mean(map(toy.well_formed, texts)), 5),
        'length': round(statistics.mean(map(len, answers)), 3),
    }  # fmt: skip
