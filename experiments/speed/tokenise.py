"""Reading and tokenising a file beside datasets.map with the same tokenizer: seconds, and peak memory above an idle process.

    python -m experiments.speed.tokenise --tokenizer=FOLDER --rows='10000 100000'

Rows are a prompt and an answer of random words. Each way runs in a process of its own, in turns; `again` is a second start from the cache.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from configurator import configure
from experiments import ROOT

tokenizer = 'toy'  # a folder with a tokenizer, or 'toy'
rows = '10000 100000'  # how many rows
words = 330  # of a row: about 500 tokens of Pythia's tokenizer
way: str | None = None  # what a process of its own does: idle, ours, again or datasets
file: str | None = None  # and with which file

WAYS = 'idle datasets ours again'.split()


def write_rows(path, count):
    """A file of so many rows; one vocabulary of 20,000 made-up words."""
    rng = random.Random(0)
    vocabulary = [''.join(rng.choices('etaoinshrdlucmfw', k=rng.randint(2, 7))) for _ in range(20_000)]
    with open(path, 'w') as stream:
        for i in range(count):
            text = ' '.join(rng.choices(vocabulary, k=words))
            cut = len(text) // 3
            stream.write(json.dumps({'prompt': f'{i} {text[:cut]}', 'response': text[cut:]}) + '\n')


def do():
    """One way, in this process. Prints its tokens."""
    import transformers

    from hf.load import load_tokenizer
    from text.tokenise import load_examples

    loaded = load_tokenizer(tokenizer)
    if way == 'datasets':
        import datasets

        def encode(batch):
            texts = [prompt + response for prompt, response in zip(batch['prompt'], batch['response'], strict=True)]
            return {'input_ids': loaded(texts)['input_ids']}

        source = datasets.load_dataset('json', data_files=file, split='train', cache_dir=f'{file}.cache')
        found = source.map(encode, batched=True, remove_columns=source.column_names)
        print(sum(len(ids) for ids in found['input_ids'][:100]))
    elif way != 'idle':
        limits = {'max_length': 4096, 'max_prompt_length': 2048, 'undivided': True}
        found = load_examples(file, 'train', loaded, 'sft', **limits)
        print(int(found.lengths.sum()), transformers.__version__)


def main():
    config = configure(globals())
    if way:
        do()
        return
    print(f'{"rows":>9s}  {"way":9s} {"seconds":>8s} {"CPU s":>8s} {"peak, MB":>9s} {"above idle, MB":>14s}')
    for count in map(int, rows.split()):
        with tempfile.TemporaryDirectory() as folder:
            path, idle = Path(folder, 'rows.jsonl'), 0
            write_rows(path, count)
            for name in WAYS:
                options = [f'--way={name}', f'--file={path}', f'--tokenizer={config.tokenizer}']
                environment = os.environ | {'NANOPREF_CACHE': f'{folder}/cache'}
                began = time.time()
                command = ['/usr/bin/env', sys.executable, '-m', 'experiments.speed.tokenise', *options]
                done = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                _, status, usage = os.wait4(done.pid, 0)
                seconds = time.time() - began
                if status:
                    sys.exit(f'{name} failed: python {" ".join(command[2:])}')
                peak = usage.ru_maxrss / 1024
                idle = peak if name == 'idle' else idle
                cpu = usage.ru_utime + usage.ru_stime
                print(f'{count:9,d}  {name:9s} {seconds:8.1f} {cpu:8.1f} {peak:9.0f} {peak - idle:14.0f}', flush=True)


if __name__ == '__main__':
    main()
