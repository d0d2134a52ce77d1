"""Checks that only a GPU can make, one line a check: PASS, FAIL, SKIP or INFO, the seconds so far, a name, and numbers.

    python -m experiments.gpu_check --only='versions kernel models resume every_loss scripts memory step'
    python -m experiments.gpu_check --only='checkpointing speed'
    python -m experiments.gpu_check --device=cpu --out=/tmp/check      # the same code without a GPU

It needs torch 2.11 or newer and transformers; no datasets, no tiktoken, no network. Exit code 1 where a check has failed.
"""

import copy
import gc
import importlib.util
import itertools
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from configurator import UserError, configure
from experiments import ROOT, read_rows, write_rows

only = ''  # names of checks; none: all
device = 'cuda'  # or cpu
out = 'out/gpu_check'  # what it leaves; emptied first
sizes = '160m 410m 1.4b 2.8b'  # speed: pythia shapes, in order
at_once = 12  # scripts that run at the same time
config = configure(globals())
gpu = device == 'cuda'

# before torch is imported: what it sees, and how its allocator works
if not gpu:
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
OUT = Path(out).absolute()
os.environ |= {'NANOPREF_CACHE': str(OUT / 'cache'), 'TQDM_DISABLE': '1', 'HF_HUB_OFFLINE': '1'}

import numpy as np
import torch
import transformers

import fsdp
import losses
import model as models
from data import pack
from hf import attention
from runtime import ranks
from text import toy

BEGAN = time.time()
failed = []
MODEL, PAIRS, HELD_OUT = OUT / 'model', OUT / 'pairs.jsonl', OUT / 'held_out.jsonl'
# shapes of examples: tokens of the prompt, then of each answer
SHAPES = {
    'pairs': [(70, 50, 33), (111, 41, 51), (3, 8, 1)],
    'short': [(1, 4, 3), (1, 1, 1), (6, 1, 1)],
    'triples': [(150, 30, 4, 260), (1, 2, 1, 1)],
    'long': [(256, 256, 200)] * 3,
}
# architectures, and options that make the attention of each special
ARCHITECTURES = {
    'GPTNeoX': {'hidden_size': 320, 'num_attention_heads': 4},  # heads of 80, as Pythia-2.8B has
    'Llama': {'hidden_size': 512, 'num_attention_heads': 8, 'num_key_value_heads': 2},
    'Mistral': {'hidden_size': 512, 'num_attention_heads': 8, 'num_key_value_heads': 4, 'sliding_window': 64},
    'Qwen3': {'hidden_size': 256, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 128},
    'Gemma3Text': {'hidden_size': 256, 'num_attention_heads': 2, 'num_key_value_heads': 1, 'head_dim': 256,
                   'sliding_window': 64, 'layer_types': ['sliding_attention', 'full_attention'] * 2},
}  # fmt: skip


def say(word, name, text):
    """Print a line. word: PASS, FAIL, SKIP, INFO, or whether the check has passed."""
    if not isinstance(word, str):
        word = 'PASS' if word else 'FAIL'
    if word == 'FAIL':
        failed.append(name)
    seconds = time.time() - BEGAN
    print(f'{word:4s} {seconds:5.0f}s {name:36s} {text}', flush=True)


def far(a, b):
    """Return how far tensor a is from b: the norm of the difference, in norms of b; infinity where it is not a number."""
    a, b = (x.detach().double().cpu() for x in (a, b))
    off = ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
    return math.inf if math.isnan(off) else off  # max() would pass over NaN


def random_examples(rng, words, shapes):
    """Return examples of random tokens in these shapes. words: size of the vocabulary."""
    draw = partial(rng.integers, 1, words)
    return [(draw(prompt), [draw(n) for n in answers]) for prompt, *answers in shapes]


def run(*command):
    """Run a command of this Python from the repository's root. Returns (exit code, what it has printed, seconds)."""
    start = time.time()
    command = [sys.executable, *map(str, command)]
    # beside a GPU several run at the same time, and share the cores
    threads = {'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // at_once))} if gpu else {}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr, time.time() - start


def make_files():
    """Write a small model with grouped heads and a tokenizer of its own, and pairs of the toy world."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    shutil.rmtree(OUT, ignore_errors=True)
    for file, split, n in ((PAIRS, 'train', 400), (HELD_OUT, 'test', 64)):
        write_rows(file, toy.pairs(split, n))

    # byte pairs, learned from these pairs; no tiktoken, which the toy tokenizer needs
    end, learned = '<|endoftext|>', ByteLevelBPETokenizer()
    learned.train_from_iterator([PAIRS.read_text()], 500, min_frequency=0, show_progress=False, special_tokens=[end])
    tokenizer = Tokenizer.from_str(learned.to_str())
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(MODEL)
    llama(MODEL, hidden_size=256, intermediate_size=512, num_hidden_layers=4)


def random_model(architecture, **options):
    """Return a model with random weights. architecture: GPTNeoX, Llama ...; options: of its config."""
    torch.manual_seed(0)
    model_config = getattr(transformers, f'{architecture}Config')(**options)
    return transformers.AutoModelForCausalLM.from_config(model_config).eval()


def llama(folder, **options):
    """Write a small Llama into a folder."""
    options |= {'vocab_size': 512, 'num_attention_heads': 8, 'num_key_value_heads': 4}
    random_model('Llama', bos_token_id=None, eos_token_id=0, **options).save_pretrained(folder)


# ---- numbers: the kernel, whole models ----


def versions():
    """Say what this machine has."""
    card = torch.cuda.get_device_name() if gpu else 'no GPU'
    say('INFO', 'versions', f'torch {torch.__version__}, transformers {transformers.__version__}, {card}')


def kernel():
    """Compare packed_attention in bfloat16 on the device with float32 on the CPU: output and gradients."""
    rng, generator, found = np.random.default_rng(0), torch.Generator().manual_seed(0), []
    cases = [(8, 8, width, None) for width in (32, 64, 80, 96, 128, 256)]  # heads, of keys, width, window
    cases += [(8, kv, 64, None) for kv in (4, 1)]
    cases += [(8, 2, 64, window) for window in (1, 2, 17, 1000)]
    for (heads, kv, width, window), name in itertools.product(cases, SHAPES):
        if name == 'long' and not (gpu and width in (64, 80)):
            continue
        examples = random_examples(rng, 99, SHAPES[name])
        n = pack(examples, range(len(examples))).ids.numel()
        inputs = [torch.randn(1, h, n, width, generator=generator).bfloat16() for h in (heads, kv, kv)]
        slope = torch.randn(1, n, heads, width, generator=generator).bfloat16()
        attend = partial(attention_and_gradients, inputs, slope, examples, width**-0.5, window)
        exact, half = attend('cpu', torch.float32), attend(device, torch.bfloat16)
        for quantity in exact:
            # a window of one token has no gradient in queries and keys
            if exact[quantity].norm() > 1e-3 * slope.norm():
                found.append((far(half[quantity], exact[quantity]), quantity, heads, kv, width, window, name))
    off, *where = max(found)
    say(off < 0.02, 'attention in bfloat16', f'off by {off:.4f} at most, at {where}; {len(found)} compared')


def attention_and_gradients(inputs, slope, examples, scaling, window, on_device, dtype):
    """Return by name the output of packed_attention on a device in a dtype, and its gradients in queries, keys and values."""
    batch = pack(examples, range(len(examples)), device=on_device)
    qkv = [x.to(on_device, dtype).requires_grad_() for x in inputs]
    out, _ = attention.packed_attention(None, *qkv, None, scaling=scaling, sliding_window=window, packed=batch)
    out.backward(slope.to(on_device, dtype))
    return {'out': out} | {name: x.grad for name, x in zip(('dq', 'dk', 'dv'), qkv, strict=True)}


def logps_and_gradient(model, examples, on_device, dtype, packed):
    """Return the log-probs of the examples' answers, and one gradient of all weights."""
    model = copy.deepcopy(model).to(on_device)
    for p in model.parameters():  # not the rotary frequencies
        p.data = p.data.to(dtype)
    attention.set_attention(model, packed)
    batch = pack(examples, range(len(examples)), pad=not packed, device=on_device)
    logps = models.response_logps(model, batch)[0]
    logps.backward(torch.linspace(-1, 1, len(logps)).to(on_device))
    return logps, torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])


def architectures():
    """Check that packed bfloat16 is no worse than padded bfloat16, and float32 on the device as on the CPU."""
    shapes = SHAPES['pairs'] + SHAPES['short'] + SHAPES['long'] * gpu
    examples = random_examples(np.random.default_rng(1), 999, shapes)
    attention.register_attention()
    sizes = {'vocab_size': 1000, 'num_hidden_layers': 4, 'intermediate_size': 512}
    ways = {'float32': (torch.float32, True), 'packed': (torch.bfloat16, True), 'padded': (torch.bfloat16, False)}
    for name, options in ARCHITECTURES.items():
        model = random_model(name, **sizes, **options)
        exact = logps_and_gradient(model, examples, 'cpu', torch.float32, True)
        logps, gradient = {}, {}
        for way, how in ways.items():
            found = logps_and_gradient(model, examples, device, *how)
            logps[way], gradient[way] = map(far, found, exact)
        passed = logps['float32'] < 1e-5 and gradient['float32'] < 1e-3
        for of, room in ((logps, 2e-3), (gradient, 5e-3)):
            passed &= of['packed'] < 1.3 * of['padded'] + room
        numbers = ', '.join(f'{way} {logps[way]:.1e} and {gradient[way]:.1e}' for way in ways)
        say(passed, f'model {name}', f'log-probs and gradient are off by: {numbers}')


# ---- scripts ----

DATA = [f'--data={PAIRS}', f'--eval_data={HELD_OUT}', '--warmup_steps=1']
BASE = [*DATA, f'--model={MODEL}']
HALF = [*BASE, '--dtype=bfloat16']
STEPS = ['--n_examples=16', '--batch_size=8', '--n_eval_examples=16']


def short_runs(runs):
    """Run scripts at the same time, and check that every number of their rows is finite and that they leave a model.

    runs: name -> (script, *flags)."""

    def go(name):
        code, text, seconds = run(*runs[name], f'--out_dir={OUT / name}')
        if code:
            return say(False, name, f'exit code {code}: {text.strip()[-400:]}')
        rows = [row for row in read_rows(OUT / name / 'metrics.jsonl') if row['split'] == 'train']
        numbers = [value for row in rows for value in row.values() if not isinstance(value, str)]
        finite = all(map(math.isfinite, numbers))
        moved = all(row['grad_norm'] > 0 for row in rows)
        shown = ' '.join(f'{row.get("loss/train", math.nan):.5f}' for row in rows)
        say(finite and moved and (OUT / name / 'model').exists(), name, f'{seconds:.0f} s, loss {shown}')

    with ThreadPoolExecutor(at_once if gpu else 1) as pool:
        list(pool.map(go, runs))


def every_loss():
    """Train two steps with every loss in bfloat16, in several microbatches."""
    flags = *HALF, *STEPS, '--max_tokens=300'
    short_runs({f'loss {loss}': ('dpo.py', *flags, f'--loss={loss}') for loss in losses.LOSSES})


def scripts():
    """Train with the other scripts, and with options that take other paths on a GPU."""
    options = """loss=dpo sample_during_eval activation_checkpointing activation_checkpointing=selective cache_ref
                 pack=false optimizer=RMSprop cpu_offload lora_rank=4 attn=eager""".split()
    runs = {f'dpo {option}': ('dpo.py', *HALF, *STEPS, f'--{option}') for option in options}
    runs |= {name: (f'{name}.py', *HALF, *STEPS) for name in ('reward', 'sft')}
    runs['dpo float32'] = 'dpo.py', *BASE, *STEPS
    if gpu:  # on a CPU it would be refused
        runs['dpo tf32'] = 'dpo.py', *BASE, *STEPS, '--tf32'
    if importlib.util.find_spec('bitsandbytes'):
        runs['dpo quantize'] = 'dpo.py', *HALF, *STEPS, '--lora_rank=4', '--quantize=4bit'
    short_runs(runs)
    # these need the reward model of above
    online = 'ppo.py', *HALF, *STEPS, f'--reward_model={OUT}/reward/model', '--max_new_tokens=16'
    grpo = '--minibatch_size=8', '--loss=grpo', '--group_size=4'
    short_runs({'ppo': (*online, '--minibatch_size=4'), 'grpo': (*online, *grpo)})


def resume():
    """Check torchrun, step 0, the same run again, and a run that goes on from its middle; with and without --deterministic."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(resume_with, ('', '--deterministic') if gpu else ('',)))


def resume_with(option):
    """Check resuming with one more option of dpo.py; '': with none."""
    from safetensors.torch import load_file

    flags = f"""-m torch.distributed.run --nproc_per_node=1 --standalone dpo.py --loss=drdpo --n_examples=64 --batch_size=16
                --max_tokens=400 --save_every=32 --keep_last=5 --optimizer=RMSprop --lr=1e-4 --n_eval_examples=16 {option}"""
    first, repeated, resumed = folders = [OUT / f'resume{option}_{name}' for name in ('first', 'repeated', 'resumed')]

    def go(folder):
        """Run it into a folder, and say whether it began as it should. Returns whether it has ended well."""
        code, text, seconds = run(*flags.split(), *HALF, f'--out_dir={folder}')
        zero = re.search(r'step 0: rewards \S+, \S+; loss (\S+)', text)
        if folder == resumed:
            right = 'resuming' in text
        else:
            right = bool(zero) and abs(float(zero[1]) - math.log(2)) < 2e-3
            right = right and not re.search('cannot be packed|resuming', text)
        why = text.strip()[-600:] if code else ''
        say(right and not code, folder.name, f'{seconds:.0f} s, {zero and zero[0]} {why}')
        return not code

    with ThreadPoolExecutor(2 if gpu else 1) as pool:
        if not all(list(pool.map(go, (first, repeated)))):
            return
    # as if it had been killed after 32 examples
    shutil.copytree(first, resumed)
    shutil.rmtree(resumed / 'model')
    record = resumed / 'config.json'
    record.write_text(record.read_text().replace(f'{first}"', f'{resumed}"'))
    if not go(resumed):
        return

    # bit for bit on a CPU; on a GPU flash attention's backward adds up in any order, unless it is told not to
    whole, *others = (load_file(folder / 'model/model.safetensors') for folder in folders)
    for folder, weights in zip((repeated, resumed), others, strict=True):
        off = max(far(weights[name].float(), whole[name].float()) for name in whole)
        limit = 0 if option or not gpu else 1e-3
        say(off <= limit, f'{folder.name}, weights', f'off by {off:.1e}')


def memory():
    """Let GPU memory run out: one sentence and exit code 2, or with max_tokens=auto half of it, and the run goes on."""
    if not gpu:
        return say('SKIP', 'memory', 'only on a GPU')
    shutil.copytree(MODEL, OUT / 'wide')
    llama(OUT / 'wide', hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    # the process may take 3.2 GB, but the card shows all that it has free
    code = ('import sys, torch, runpy; torch.cuda.set_per_process_memory_fraction(3.2e9 / torch.cuda.mem_get_info()[1]); '
            "sys.argv = ['dpo.py', *sys.argv[1:]]; runpy.run_path('dpo.py', run_name='__main__')")  # fmt: skip
    flags = '--dtype=bfloat16', f'--model={OUT}/wide', '--n_examples=300', '--batch_size=300', '--n_eval_examples=0'

    def go(tokens):
        return run('-c', code, *DATA, *flags, f'--max_tokens={tokens}', f'--out_dir={OUT}/memory_{tokens}')

    with ThreadPoolExecutor() as pool:
        (status, text, _), auto = pool.map(go, (65536, 'auto'))
    passed = status == 2 and 'out of memory' in text and 'Traceback' not in text
    say(passed, 'no memory left', f'exit code {status}: {text.strip()[-250:]}')
    status, text, _ = auto
    lines = re.findall('^memory:.*', text, re.M)
    rest = text.strip()[-400:] if status else ''
    say(status == 0 and len(lines) > 1, 'memory, auto', f'exit code {status}: {lines} {rest}')


# ---- speed ----


def say_steps(shapes, ways, profiled=False):
    """Say time and memory of a step of each shape with each way of activation checkpointing. On a CPU small ones only run.

    shapes: (architecture, width, inner width, layers, heads). profiled: say also where the host waits, and which kernels take the time."""
    for (architecture, *shape), way in itertools.product(shapes, ways):
        width, inner, layers, heads = shape if gpu else (64, 128, 2, 4)
        name = f'{architecture}, width {width}, checkpointing {way}'
        take, tokens = make_step(architecture, way, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                                 num_attention_heads=heads)  # fmt: skip
        if not gpu:
            say('SKIP', name, 'it runs; times, memory, waits and kernels are of a GPU')
            continue
        before = torch.cuda.memory_allocated() / 1e9
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(5):
            start = time.time()
            take()
            torch.cuda.synchronize()
            seconds.append(time.time() - start)
        peak, held = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
        memory = f'{peak:.1f} GB at the peak, {peak - before:.1f} beside weights and optimizer, {held:.1f} held'
        say('INFO', name, f'{statistics.median(seconds):.3f} s, {tokens} tokens, {memory}')
        if profiled:
            say_waits_and_kernels(name, take)
        del take
        release()


def make_step(architecture, checkpointing, **sizes):
    """Return (a function that takes a step of DPO with a live reference and random weights of this shape, tokens of its batch)."""
    ranks.setup()
    attention.register_attention()

    def build(empty=False):
        with torch.device('meta' if empty else device):  # weights drawn on the GPU: fast
            return random_model(architecture, vocab_size=50304, **sizes)

    on_device = torch.device(device)
    policy = fsdp.shard(build, on_device, dtype='bfloat16', activation_checkpointing=checkpointing)
    reference = fsdp.shard(build, on_device, dtype='bfloat16', train=False)
    optimizer = fsdp.make_optimizer('RMSprop', policy, 1e-7, 0.0)
    examples = random_examples(np.random.default_rng(0), 4096, [(111, 41, 51)] * (40 if gpu else 2))
    batch = pack(examples, range(len(examples)), device=device)

    def take():
        with torch.no_grad():
            ref = reference.response_logps(batch)[0]
        ratio = policy.response_logps(batch)[0] - ref
        losses.dpo(ratio[::2], ratio[1::2], beta=0.1).sum().backward()
        fsdp.update(policy, optimizer, 1e-7, 1 / len(examples), 10.0)

    # warmed up, so that the optimizer's state is there
    for _ in range(2):
        take()
    return take, batch.ids.numel()


def release():
    """Give back memory that no tensor holds any more."""
    gc.collect()
    torch.cuda.empty_cache()


def say_waits_and_kernels(name, take):
    """Say where the host waits for the device in a step, and which kernels and operations take the most time on the device."""
    from torch.profiler import ProfilerActivity, profile

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        take()
        torch.cuda.set_sync_debug_mode('default')
    waits = [warning for warning in seen if 'synchron' in str(warning.message)]
    where = Counter(f'{Path(wait.filename).name}:{wait.lineno}' for wait in waits)
    # the gradient's norm, which decides whether the weights change
    say(len(waits) <= 2, f'host waits, {name}', f'{len(waits)}: {dict(where.most_common(6))}')

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        take()
        torch.cuda.synchronize()
    spent = profiler.key_averages().table(sort_by='self_cuda_time_total', row_limit=30, max_name_column_width=90)
    say('INFO', f'kernels, {name}', f'\n{spent}')


def speed():
    """Run tools.bench over shapes: pairs/s, MFU, peak memory, beside a plain padded loop."""
    flags = '--dtype=bfloat16 --n_steps=5 --rounds=1 --batch_size=64'
    if not gpu:
        flags = '--vocabulary=512 --threads=1 --n_steps=1 --batch_size=4'
    for size in sizes.split() if gpu else ['14m']:
        if time.time() - BEGAN > 440:  # seconds: a call ends after ten minutes
            say(False, f'speed, {size}', 'not measured: no time left')
            continue
        # 2.8B in 80 GB: half the state of AdamW, and 8,192 tokens at a time
        more = ['--optimizer=RMSprop', '--max_tokens=8192'] if size == '2.8b' else []
        shape = [f'--model=pythia-{size}', '--variants=padded head cached']
        code, text, seconds = run('-m', 'tools.bench', *shape, *flags.split(), *more)
        say(code == 0, f'speed, {size}', f'{seconds:.0f} s\n{text.strip()}')


CHECKS = {
    'versions': versions, 'kernel': kernel, 'models': architectures, 'resume': resume, 'every_loss': every_loss, 'scripts': scripts,
    'memory': memory,
    # Pythia-160M and 2.8B
    'step': partial(say_steps, [('GPTNeoX', 768, 3072, 12, 12), ('GPTNeoX', 2560, 10240, 32, 32)], [False], profiled=True),
    # Pythia-410M, and a Llama of a billion weights
    'checkpointing': partial(say_steps, [('GPTNeoX', 1024, 4096, 24, 16), ('Llama', 2048, 8192, 16, 32)], [False, 'selective', True]),
    'speed': speed,
}  # fmt: skip


def main():
    names = only.replace(',', ' ').split() or list(CHECKS)
    if set(names) - CHECKS.keys():
        raise UserError(f'--only takes some of {" ".join(CHECKS)}, not {only!r}')
    if gpu and not torch.cuda.is_available():
        raise UserError('there is no GPU here: --device=cpu runs the same code without one')
    make_files()
    for name in names:
        try:
            CHECKS[name]()
        except Exception as error:  # the next check runs whatever this one did
            say(False, name, f'{type(error).__name__}: {str(error).strip()[:600]}')
            traceback.print_exc()
        release()
    print(f'{len(failed)} failed: {", ".join(failed)}')
    sys.stdout.flush()
    os._exit(bool(failed))  # an ordinary exit can abort in gloo's threads


if __name__ == '__main__':
    main()
