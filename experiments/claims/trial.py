"""One trial of experiments/claims: train with a script of this repository, in this process, then measure the model on the toy world.

A trial is {'script', 'data', 'seed', 'options'}; options None is the SFT model itself. Its result is one line of results.jsonl.
"""

import contextlib
import io
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from functools import lru_cache, partial
from unittest import mock

import numpy as np
import torch

import losses
import model as models
from configurator import UserError
from data import make_batches
from experiments import ROOT, write_rows
from hf import attention, generate
from hf.load import load_model, load_tokenizer
from rl import divergences
from text import tokenise, toy
from text.examples import Examples

N_PAIRS = 2560  # training pairs of a trial: 40 steps of 64
QUIET = {'n_eval_examples': 0, 'do_first_eval': False, 'log_every': 10**6}
LENGTHS = {'max_length': 64, 'max_prompt_length': 16}
# of every trial on pairs
COMMON = QUIET | LENGTHS | {'n_epochs': 1, 'batch_size': 64, 'lr_schedule': 'linear', 'warmup_steps': 4}
# of every trial with sampled answers, as in config/ppo_toy.py and config/grpo_toy.py
COMMON_ONLINE = QUIET | {'data': 'toy', 'reward_model': 'gold', 'batch_size': 256, 'minibatch_size': 64,
                         'lr_schedule': 'linear', 'max_new_tokens': 48}  # fmt: skip
DIVERGE = ('tdpo1', 'tdpo2', 'radpo1', 'radpo2')  # these need the live reference, and are measured by forward KL
UNCACHED = (*DIVERGE, 'simpo', 'orpo', 'kto')  # without a reference, or with more of it than its log-probs
LOW, HIGH = 0.5, 1.2  # a pair has a low gap below the first, a high gap above the second
N_TEST = 1800  # held-out pairs; about 1,690 are left without ties


def gap(pair):
    """Return the gold reward of the chosen answer minus that of the rejected one."""
    return toy.gold(pair['prompt'], pair['chosen']) - toy.gold(pair['prompt'], pair['rejected'])


def training_pairs(kind, seed, n=N_PAIRS):
    """Return n toy pairs that belong to this seed. kind: all, or mixed, where gaps are low and high by turns."""
    if kind == 'all':
        return list(toy.pairs(f'claims {seed}', n))
    pairs = list(toy.pairs(f'claims {seed}', 4 * n))
    low = [pair for pair in pairs if abs(gap(pair)) < LOW]
    high = [pair for pair in pairs if abs(gap(pair)) > HIGH]
    found = [pair for both in zip(low, high, strict=False) for pair in both][:n]
    assert len(found) == n, f'{len(found)} of {n} pairs of kind {kind}'
    return found


def held_out_pairs():
    """Yield pairs that the gold reward itself labels, without noise; ties are left out."""
    for pair in toy.pairs('test', N_TEST):
        if g := gap(pair):
            yield pair if g > 0 else pair | {'chosen': pair['rejected'], 'rejected': pair['chosen']}


def write_pairs(work, name, make, *args):
    """Write the rows of make(*args) as data/NAME.jsonl, unless it exists. Returns the file."""
    file = work / 'data' / f'{name}.jsonl'
    if not file.exists():
        part = file.with_suffix(f'.{os.getpid()}')  # another process may be at it, too
        write_rows(part, make(*args))
        part.replace(file)
    return file


def train(script, out, options):
    """Run a script of this repository in this process, quietly. Raises its UserError."""
    flags = [f'--{name}={value}' for name, value in options.items()]
    argv, quiet = [script, *flags, f'--out_dir={out}'], io.StringIO()
    with mock.patch.object(sys, 'argv', argv), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        runpy.run_path(str(ROOT / script), run_name='script')


def reference_of(work, seed):
    """Return the folder of the SFT model that every trial of a seed starts from."""
    return work / f'sft-{seed}' / 'model'


def train_reference(work, seed):
    """Train the SFT model of a seed on demonstrations of its own, unless that is done."""
    torch.set_num_threads(1)
    model = reference_of(work, seed)
    if not (model / 'config.json').exists():
        shutil.rmtree(model.parent, ignore_errors=True)
        file = write_pairs(work, f'sft-{seed}', toy.pairs, f'claims sft {seed}')
        options = QUIET | {'n_epochs': 3, 'batch_size': 32, 'lr': 1e-2, 'lr_schedule': 'cosine', 'warmup_steps': 20}
        options |= {'model': 'toy', 'data': file, 'eval_data': 'toy', 'seed': seed}
        train('sft.py', model.parent, options)


def run_trial(trial, work, n_samples):
    """Train and measure. Returns the trial with its result, or with 'error' if the script refused it."""
    torch.set_num_threads(1)
    began, cpu = time.time(), time.process_time()
    folder, out = reference_of(work, trial['seed']), work / f'run-{os.getpid()}'
    shutil.rmtree(out, ignore_errors=True)
    result = dict(trial, commit=commit(), n_samples=n_samples)
    try:
        if trial['options'] is not None:
            train(trial['script'], out, all_options(trial, work))
            folder = out / 'model'
        result |= measure(trial, folder, work, n_samples)
    except UserError as error:
        result['error'] = str(error)
    shutil.rmtree(out, ignore_errors=True)
    seconds, cpu_seconds = time.time() - began, time.process_time() - cpu
    return result | {'seconds': round(seconds, 1), 'cpu_seconds': round(cpu_seconds, 1)}


def data_file(trial, work):
    """Return the file of a trial's training pairs."""
    return write_pairs(work, f'{trial["data"]}-{trial["seed"]}', training_pairs, trial['data'], trial['seed'])


def test_file(work):
    return write_pairs(work, 'test', held_out_pairs)


def all_options(trial, work):
    """Return every option that a trial's script gets."""
    options = {'model': reference_of(work, trial['seed']), 'seed': trial['seed']} | trial['options']
    if trial['script'] == 'ppo.py':
        return COMMON_ONLINE | options
    options = COMMON | {'data': data_file(trial, work), 'eval_data': test_file(work)} | options
    if options['loss'] not in UNCACHED:
        options['cache_ref'] = True
    return options


@lru_cache(1)
def commit():
    """Return the commit that is checked out, with a + if .py files differ from it."""
    commands = 'git rev-parse --short HEAD', 'git status --porcelain -uno -- *.py'
    done = [subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True) for command in commands]
    head, changed = (process.stdout.strip() for process in done)
    return head + '+' * bool(changed)


KNOWN = {}  # log-probs under references, of this process


@torch.no_grad()
def columns(policy, reference, examples, divergence):
    """Return (3, answers): log-probs, divergences summed over positions, the reference's log-probs; examples in order.

    Without a divergence (1, answers): the log-probs alone."""
    parts = []
    for first in range(0, len(examples), 64):
        rows = np.arange(first, min(first + 64, len(examples)))
        (batch,), *_ = make_batches(examples, rows, 0, 1, 10**9)
        hidden = models.hidden_and_head(reference, batch) if divergence else None
        parts.append(models.response_logps(policy, batch, divergence, hidden))
    return torch.cat(parts, 1).double()


def ratios(policy, reference, examples):
    """Return the log-ratios (answers,). The reference's log-probs are computed once a process; its folder is its name."""
    key = (reference.name_or_path, hash(examples.ids.tobytes()))
    if key not in KNOWN:
        KNOWN[key] = columns(reference, None, examples, None)[0]
    return columns(policy, None, examples, None)[0] - KNOWN[key]


def measure(trial, folder, work, n_samples):
    """Measure a model: gold reward, KL, accuracy ... All models get the same prompts and test pairs, those of a seed the same noise.

    kl: KL(policy || reference) of whole answers, summed exactly over the words at every position of the policy's own samples.
    accuracy: share of held-out pairs whose better answer has gained more probability (for the reference itself: has more
    probability a token). margin: mean of the held-out log-ratio d over its standard deviation. kl_chosen, kl_rejected: KL(reference
    || policy), summed over the positions of the first 500 pairs' answers."""
    reference_folder, options = reference_of(work, trial['seed']), trial['options'] or {'loss': None}
    tokenizer = load_tokenizer(str(reference_folder))
    policy, reference = (load_model(str(f), tokenizer=tokenizer) for f in (folder, reference_folder))
    result = sampled(policy, reference, tokenizer, trial['seed'], n_samples)

    # the held-out pairs; a model that is the reference itself has no ratios
    examples_of = partial(tokenise.load_examples, tokenizer=tokenizer, task='pairs', undivided=True, **LENGTHS)
    pairs = examples_of(str(test_file(work)), 'test')
    if options['loss'] is None:
        tokens = torch.from_numpy(np.diff(pairs.spans[:, 1:], axis=2).reshape(-1))
        gain = columns(policy, None, pairs, None)[0] / tokens
    else:
        gain = ratios(policy, reference, pairs)
    margin = gain[::2] - gain[1::2]
    result |= {'accuracy': (margin > 0).double().mean(), 'margin': margin.mean() / margin.std()}
    if options['loss'] in ('dpo', *DIVERGE):
        forward = columns(policy, reference, pairs.select(slice(500)), divergences.kl)[1]
        result |= {'kl_chosen': forward[::2].mean(), 'kl_rejected': forward[1::2].mean()}
    if options['loss'] in ('dpo', 'drdpo'):
        trained_on = examples_of(str(data_file(trial, work)), 'train')
        result |= gradient_shares(policy, reference, trained_on, trial['seed'], options)
    return {name: round(float(x), 5) for name, x in result.items()}


def sampled(policy, reference, tokenizer, seed, n_samples):
    """Return gold, gold_se, kl, well_formed and length of n_samples answers that the policy samples."""
    places = sorted(toy.PLACES)
    prompts = [f'Review of the {places[i % len(places)]}:' for i in range(n_samples)]
    ids = tokenizer(prompts, add_special_tokens=False)['input_ids']
    answers = []
    seeds = range((seed + 1) * 10**9, (seed + 1) * 10**9 + n_samples)
    for i in range(0, n_samples, 256):
        batch = slice(i, i + 256)
        answers += generate.generate(policy, tokenizer, ids[batch], seeds[batch], max_new_tokens=40, keep_end=True)
    stop = generate.stop_tokens(policy, tokenizer)
    texts = [tokenizer.decode(generate.without_end(answer, stop)) for answer in answers]
    gold = [toy.gold(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]

    return {
        'gold': statistics.mean(gold), 'gold_se': statistics.stdev(gold) / n_samples**0.5,
        'kl': kl_on_samples(policy, reference, ids, answers), 'well_formed': statistics.mean(map(toy.well_formed, texts)),
        'length': statistics.mean(map(len, answers)),
    }  # fmt: skip


def kl_on_samples(policy, reference, prompts, answers):
    """Return KL(policy || reference) in nats an answer, the mean over the policy's own answers, one to each prompt (token ids)."""
    for either in (policy, reference):
        attention.set_attention(either, packed=True)
    examples = Examples.of([(prompt, [answer]) for prompt, answer in zip(prompts, answers, strict=True)])
    reverse_kl = divergences.kl._replace(value=lambda log_pi, log_ref, mass: divergences.kl(log_ref, log_pi)[0])
    return columns(policy, reference, examples, reverse_kl)[1].mean().item()


def gradient_shares(policy, reference, pairs, seed, options):
    """Return h_std, the standard deviation of h = beta d on the training pairs, and the flipped pairs' share of the gradient.

    flipped_share is of the sizes of dloss/dh, times Dr. DPO's weights; before training it is flipped_pairs, their share of pairs."""
    seen = pairs.flip(options.get('noise_rate', 0.0), seed)
    flipped = torch.from_numpy((seen.spans != pairs.spans).any((1, 2)))
    gain = ratios(policy, reference, pairs)
    d = (gain[::2] - gain[1::2]) * torch.where(flipped, -1.0, 1.0)
    h = options['beta'] * d
    size = torch.sigmoid(-h)
    if options['loss'] == 'drdpo':
        size *= losses.drdpo_weight(-torch.nn.functional.logsigmoid(h), 0.0, beta_prime=options.get('beta_prime', 1.0))
    share = size[flipped].sum() / size.sum()
    return {'h_std': h.std(), 'flipped_share': share, 'flipped_pairs': flipped.double().mean()}
