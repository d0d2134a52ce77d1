"""What makes a step cheap: no wait for the device per microbatch, memory that does not follow the vocabulary, and bench.py."""

import gc
import itertools
import json
import platform
import shutil
import sys
import time
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import ROOT, refused, run_script, tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fsdp
from configurator import UserError
from experiments import real
from hf import attention
from tests import forks
from tools import limits


class Waits(TorchDispatchMode):
    """Counts the operations for which the host has to wait on a GPU: a number read out, or a size that depends on values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        name = fn.overloadpacket.__name__
        indices = args[1] if 'index' in name and isinstance(args[1], list | tuple) else ()
        masked = any(x is not None and x.dtype == torch.bool for x in indices)
        if masked or name in ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal'):
            self.seen.append(name)
        return fn(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Notes the calls that copy to or from the device and wait. Models are left out: there .to is for device maps alone."""

    FILES = 'data dpo fsdp ppo reward rollout training objective prefetch attention'.split()

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, fn, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, file = fn.__name__, Path(sys._getframe(1).f_code.co_filename).stem
        brings = any(isinstance(x, torch.device | torch.Tensor) for x in (*args[1:], kwargs.get('device')))
        waits = name in ('cpu', 'item', 'numpy') or (name in ('to', 'tensor', 'as_tensor') and brings)
        if file in self.FILES and waits and not kwargs.get('non_blocking'):
            self.seen.append(name)
        return fn(*args, **kwargs)


def steps_of(loss, folder):
    """(number of microbatches, fn) of a step in one microbatch, and of the same in eight: fn() does it, with its update."""
    flags = ['--n_examples=8', '--batch_size=8', '--n_eval_examples=0', f'--out_dir={folder / "run"}']
    script = run_script('dpo.py', f'--loss={loss}', *flags)
    run = script['run']
    for max_tokens in (100_000, 40):
        run.max_tokens = max_tokens
        step = run.make_step(run.train, script['np'].arange(8))

        def do(step=step):
            script['run_step'](step, backward=True)
            script['fsdp'].update(run.policy, run.optimizer, 0.0, 1.0, 1.0)

        yield len(step.batches), do


# the columns of the step (with a statistic twice), the norm, and the shift of Dr. DPO
WAITS = {'dpo': 'cpu item', 'drdpo': 'cpu cpu item', 'tdpo2': 'cpu item', 'kto': 'cpu cpu item'}


@pytest.mark.parametrize('loss', WAITS)
def test_no_wait_per_microbatch(loss, tmp_path):
    """Eight microbatches wait as often as one, twice or three times: forward, loss and backward only queue work."""
    counts = []
    for batches, do in steps_of(loss, tmp_path):
        with Waits() as waits, Copies() as copies:
            do()
        counts.append((batches, waits.seen))
        assert ' '.join(copies.seen) == WAITS[loss]
    assert counts[0][0] == 1 and counts[1][0] > 3
    assert counts[0][1] == counts[1][1], counts


@pytest.mark.skipif(not torch.cuda.is_available(), reason='counts what a GPU waits for')
@pytest.mark.parametrize('loss', WAITS)
def test_waits_of_a_gpu(loss, tmp_path):
    for _, do in steps_of(loss, tmp_path):
        do()  # what is made at the first use
        torch.cuda.set_sync_debug_mode('warn')
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            do()
        torch.cuda.set_sync_debug_mode('default')
        waits = [str(w.message) for w in seen if 'synchronizing' in str(w.message)]
        assert len(waits) == len(WAITS[loss].split()), [(w.filename, w.lineno) for w in seen]


MEMORY = """
import os, sys
import numpy as np, torch, transformers
from data import pack
from hf.attention import register_attention, set_attention
from model import response_logps
torch.set_num_threads(1)
register_attention()
transformers.LlamaForCausalLM  # is imported once
for words in (4096, 131072):
    if os.fork() == 0:
        break
    if os.wait()[1]:
        sys.exit('failed')
else:
    sys.exit()
config = transformers.LlamaConfig(vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                                  num_attention_heads=2, tie_word_embeddings=True)
model = transformers.AutoModelForCausalLM.from_config(config).eval()
set_attention(model, packed=True)
rng = np.random.default_rng(0)
batch = pack([(rng.integers(0, 4096, 960), [rng.integers(0, 4096, 32) for _ in 'wl']) for _ in range(16)], range(16))
def memory(field):
    return int(next(x for x in open('/proc/self/status') if x.startswith(field)).split()[1]) / 1e6
model(torch.zeros(1, 8, dtype=torch.long), packed=pack([(np.zeros(4, int), [np.zeros(4, int)])], [0]))  # what loads late
before = memory('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
response_logps(model, batch).sum().backward()
print(words, batch.ids.numel(), memory('VmHWM') - before, config.vocab_size * config.hidden_size * 4 / 1e9)
"""


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='peak memory of a process is read from /proc')
def test_memory_hardly_follows_the_vocabulary():
    """A step of 16k packed tokens: 131,072 words take less than 1.5 times the memory of 4,096, plus the head's gradients."""
    done = forks.python('-c', MEMORY)
    assert done.returncode == 0, done.stderr
    peak = {}
    for line in done.stdout.splitlines():
        words, tokens, used, head = map(float, line.split())
        peak[words] = used
        assert tokens > 16000
    # the head's gradient, once in the making and once accumulated with the embedding's
    assert peak[131072] < 1.5 * peak[4096] + 3 * head, (peak, head)


# ---- bench.py ----

SMALL = ['tools/bench.py', '--model=pythia-14m', '--vocabulary=512', '--batch_size=4', '--n_steps=3']


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has mallopt')
def test_the_memory_of_freed_tensors_is_kept():
    """In a process of its own, in whose memory other tests have left no holes."""
    code = """import resource, torch
from runtime import ranks
ranks.setup()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(24)))"""
    # 64 MB filled and freed: the first ones map pages, some because a piece of their memory has found another use
    assert int(forks.python('-c', code).stdout) < 500  # of 16,384


def test_bench(tmp_path, monkeypatch, capsys):
    """In rounds, forwards and backwards, each variant is built, warmed up, timed and freed before the next one is built."""
    said, shard = [], fsdp.shard
    alive = weakref.WeakSet()
    gc.freeze()  # bench.py collects garbage for each variant, too: of what it has made

    def watched(*arguments, **options):
        gc.collect()
        said.append((len(alive), options.get('train', True)))
        model = shard(*arguments, **options)
        alive.add(model)
        return model

    monkeypatch.setattr(fsdp, 'shard', watched)
    flags = '--model=toy', '--batch_size=2', '--seed=5', '--peak_tflops=0.001', f'--out={tmp_path}/bench.json'
    script = run_script(*SMALL, *flags)
    # a policy, then its reference, in two rounds of five variants
    assert said == [(0, True), (1, False)] * 10
    counts = {run.name: (len(run.times), len(run.passes)) for run in script['runs']}
    assert counts == {'padded': (3, 0), 'packed': (3, 0), 'shared': (3, 0), 'head': (3, 0), 'cached': (3, 3)}
    tokens = script['examples'].widths[script['steps']].sum((1, 2))
    assert tokens[script['warm_up']] == tokens.max() > tokens.min()
    # the table, and what it says
    written = json.loads((tmp_path / 'bench.json').read_text())
    rows = {row['variant']: row for row in written['rows']}
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows) and 'MFU: of 0.001 TFLOP/s, --peak_tflops' in printed
    assert rows['padded']['ratio'] == 1 and all(row['mfu'] > 0 and row['peak_memory_gb'] > 0 for row in rows.values())
    assert rows['padded']['padding_share'] > 0.1 and all(rows[v]['padding_share'] == 0 for v in rows if v != 'padded')
    cost = [row['gflop_per_pair'] for row in rows.values()]
    assert cost[0] == cost[1] and cost[1] > cost[2] > cost[3] > cost[4]
    assert rows['cached']['pairs_per_second_with_cache_pass'] < rows['cached']['pairs_per_second']
    assert rows['head']['estimated_memory_gb'] > 0 and written['limit_pairs_per_second'] > 0


def test_bench_of_a_folder_and_of_a_divergence(tmp_path, capsys, monkeypatch):
    """A model with fewer words than a published shape."""
    once = '--batch_size=2', '--n_steps=1', '--variants=head'
    run_script('tools/bench.py', f'--model={tiny_model(tmp_path, "llama")}', *once)
    assert '\nhead ' in capsys.readouterr().out
    script = run_script(*SMALL, '--loss=tdpo2', *once)
    printed = capsys.readouterr().out
    assert '\nhead ' in printed and 'MFU' in printed.splitlines()[2] and 'MFU: ' not in printed
    script['build'].__globals__['model'] = 'llama-8b'  # another architecture takes --vocabulary, too
    assert script['build'](empty=True).config.vocab_size == 512
    monkeypatch.setattr(script['Path'], 'read_text', lambda _: '')  # a system without /proc
    assert 0.01 < script['peak_memory']() < 1000


@pytest.mark.parametrize('flags, words', [
    ('--loss=tdpo2', 'only --variants=head'),
    ('--loss=kto', 'losses on pairs'),
    ('--loss=typo', 'losses on pairs'),
    ('--variants=padded,fast', 'variants must be some of padded'),
    ('--data=hh:missing.jsonl', 'give the folder of one with --tokenizer'),
    ('--data=hh:missing.jsonl --tokenizer=nowhere/here', 'nowhere/here'),
])  # fmt: skip
def test_bench_refuses(flags, words, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert words in refused(*SMALL, *flags.split())


def test_the_data_is_not_overwritten(tmp_path):
    file = tmp_path / 'pairs.json'
    shutil.copy(ROOT / 'tests/parts/raw/annotations.json', file)
    chosen = ['experiments/papers/chosen.py', '--split=train']
    for words in (SMALL, chosen):
        assert 'is a file of the data' in refused(*words, f'--data={file}', f'--out={file}')


@pytest.mark.parametrize('card, peak', [
    ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756), ('NVIDIA H200', 989), ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA L40S', 362), ('NVIDIA L4', 121), ('NVIDIA A10G', None),
])  # fmt: skip
def test_the_data_sheet(card, peak):
    """What a utilisation is a share of goes by the card's name, and is named; of an unknown card it is asked for."""
    found, source = limits.peak_of(card)
    assert found == peak and ('the data sheet of the' if peak else 'give --peak_tflops') in source


def test_the_limit():
    """Of three layers, where a product of the forward takes a second, and both of the backward take one."""
    model = torch.nn.Sequential(*(torch.nn.Linear(*shape) for shape in ((3, 4), (4, 3), (3, 4))))
    model.config = SimpleNamespace(vocab_size=4)
    assert limits.products_alone(model, 5, 2, torch.float32, 'cpu', itertools.count().__next__) == 3 * (2 * 1 + 1)
    # GPT-2's layers are Conv1D: four in a block, and the head is Linear
    settings = transformers.GPT2Config(vocab_size=7, n_embd=4, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(settings)
    assert limits.products_alone(model, 5, 2, torch.float32, 'cpu', itertools.count().__next__) == 9 * (2 * 1 + 1)


def test_the_check_of_a_gpu_finds_a_wrong_kernel(tmp_path, monkeypatch, capsys):
    """Without a GPU the same code passes; where attention in bfloat16 goes wrong, the check says so."""
    for name in ('CUDA_VISIBLE_DEVICES', 'NANOPREF_CACHE', 'TQDM_DISABLE', 'HF_HUB_OFFLINE'):
        monkeypatch.setenv(name, '')
    script = run_script('experiments/gpu_check.py', '--device=cpu', f'--out={tmp_path}')
    # a tensor with a NaN is infinitely far, so that the largest of many distances shows it
    assert script['far'](torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])) == 1.25
    assert script['far'](torch.tensor([3.0, float('nan')]), torch.ones(2)) == float('inf')
    for name in ('triples', 'long'):
        del script['SHAPES'][name]
    script['kernel']()
    attend = attention._attend

    def wrong(q, *rest):
        out = attend(q, *rest)
        return out * 1.05 if q.dtype == torch.bfloat16 else out

    monkeypatch.setattr(attention, '_attend', wrong)
    script['kernel']()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith('PASS') and second.startswith('FAIL') and script['failed'] == ['attention in bfloat16']


def test_the_clock_of_real(capsys):
    """Time left goes by stages done, and by the share of the present one, at the pace of those done, or its own if it is slower."""
    clock = real.Clock({'model': 100, 'dpo': 200, 'answers': 100})

    def said(passed, text=''):
        clock.began = time.time() - passed
        clock.say(text)
        return capsys.readouterr().out.split(']')[0]

    clock.begin('model')
    assert said(10) == '[0:10, about 6:40 left'
    clock.began = time.time() - 200
    clock.begin('dpo')
    assert said(200) == '[3:20, about 10:00 left'  # 100 of 400 took 200
    assert said(300) == '[5:00, about 10:00 left'  # its reference's pass, before training
    assert said(400, 'train      32/64  loss 0.69') == '[6:40, about 6:40 left'
    assert said(900) == '[15:00, about 10:00 left'  # 300 of 400 would have taken 900, were it over
    clock.began = time.time() - 600
    clock.begin('answers')
    assert said(600) == '[10:00, about 3:20 left'


def test_results_of_real_are_of_one_run(tmp_path):
    settings = {'n_pairs': 8, 'data': 'x'}
    results = {'settings': settings, 'minutes': 1, 'peak_gb': 0.5}
    for wrong in (
        '{',
        '[]',
        json.dumps(results | {'minutes': '1'}),
        json.dumps(results | {'dpo': 'x'}),
        json.dumps({'settings': settings}),
    ):
        (tmp_path / 'results.json').write_text(wrong)
        with pytest.raises(UserError, match='results.json is damaged.*: delete it: the stages are done again'):
            real.load_results(tmp_path, settings)
    (tmp_path / 'results.json').write_text(json.dumps(results))
    assert real.load_results(tmp_path, settings)['settings'] == settings
    with pytest.raises(UserError, match='n_pairs 8 there and 9 here.*choose another --out_dir'):
        real.load_results(tmp_path, settings | {'n_pairs': 9})
