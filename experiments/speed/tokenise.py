"""Time and memory of reading and tokenising rows, ours and that of datasets.map with the same tokenizer, in turns.

    python -m experiments.speed.tokenise --rows='10000 100000' --rounds=2 --tokenizer=FOLDER

A row is a pair of about 500 tokens. Each measurement is a process of its own, with empty caches; then ours starts again
from its cache. Memory is the most that the process and its children hold together beyond what imports take: private, and with
what is mapped from files, in bytes a token."""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time

import datasets
import psutil

from configurator import configure
from experiments import ROOT
from hf.load import load_tokenizer
from text import toy
from text.tokenise import load_examples

rows = '10000'  # how many; several in turns
rounds = 2  # measurements of each way
ways = 'ours again theirs'  # in turns
tokenizer = 'toy'  # a folder with one, or toy
only_measure: str | None = None  # measure this way here, in this process, and print its numbers
file = 'rows.jsonl'  # with these rows

LIMITS = {'max_length': 4096, 'max_prompt_length': 2048}


def write_rows(path, count):
    """Pairs of words of the toy world, as many tokens as real ones have."""
    rng = random.Random(0)
    with open(path, 'w') as stream:
        for i in range(count):
            prompt, chosen, rejected = (' '.join(rng.choices(toy.WORDS, k=k)) for k in (80, 190, 190))
            prompt = f'\n\nHuman: {i} {prompt}\n\nAssistant:'
            stream.write(json.dumps({'prompt': prompt, 'chosen': f' {chosen}', 'rejected': f' {rejected}'}) + '\n')


def ours(tokens):
    """The number of tokens, after load_examples."""
    found = [load_examples(file, split, tokens, 'pairs', **LIMITS) for split in ('train', 'test')]
    return sum(int(examples.lengths.sum()) for examples in found)


def theirs(tokens):
    """The number of tokens, after datasets.map in as many processes as there are cores."""

    def encode(batch):
        return {name: tokens(batch[name])['input_ids'] for name in ('prompt', 'chosen', 'rejected')}

    found = datasets.load_dataset('json', data_files=file, split='train')
    found = found.map(encode, batched=True, num_proc=os.cpu_count(), remove_columns=found.column_names)
    return sum(len(ids) for batch in found.iter(1000) for column in batch.values() for ids in column) + 2 * len(found)


def memory():
    """(private, all) bytes of this process and its children."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [process.memory_info() for process in processes if process.is_running()]
    return sum(m.rss - m.shared for m in found), sum(m.rss for m in found)


def measure(way):
    """[seconds, those of all processors, tokens, private bytes, all bytes] of one way, beyond what imports take."""
    loaded = load_tokenizer(tokenizer)
    before, most, done = memory(), [0, 0], threading.Event()

    def watch():
        while not done.wait(0.1):
            try:
                most[:] = map(max, most, memory())
            except psutil.Error:  # a child has just ended
                continue

    watcher = threading.Thread(target=watch, daemon=True)  # an error here must not leave it behind
    watcher.start()
    began, used = time.time(), sum(os.times()[:4])  # of processors: its own, and those of children that have ended
    tokens = theirs(loaded) if way == 'theirs' else ours(loaded)
    seconds, used = time.time() - began, sum(os.times()[:4]) - used
    done.set()
    watcher.join()
    return [seconds, used, tokens, *(max(0, m - b) for m, b in zip(most, before, strict=True))]


def measure_elsewhere(way, path, cache):
    """The same in a process of its own. path: the rows; cache: where it keeps what it has read."""
    command = [sys.executable, '-m', 'experiments.speed.tokenise', f'--tokenizer={tokenizer}']
    command += [f'--only_measure={way}', f'--file={path}']
    environment = os.environ | {'NANOPREF_CACHE': f'{cache}/ours', 'HF_DATASETS_CACHE': f'{cache}/theirs'}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f'{way} stopped: the lines above say why')
    return json.loads(done.stdout.splitlines()[-1])


def main():
    configure(globals())
    if only_measure:
        return print(json.dumps(measure(only_measure)))
    for count in map(int, rows.split()):
        with tempfile.TemporaryDirectory() as folder:
            path = f'{folder}/rows.jsonl'
            write_rows(path, count)
            for number in range(rounds):
                for way in ways.split():
                    seconds, used, tokens, private, everything = measure_elsewhere(way, path, f'{folder}/{number}')
                    print(f'{count:>9,} rows  {way:<6} {seconds:7.1f} s ({used:.1f} of processors)  {tokens / seconds / 1e6:6.2f} M tokens/s  '
                          f'{private / tokens:5.1f} bytes/token private, {everything / tokens:5.1f} with maps', flush=True)  # fmt: skip


if __name__ == '__main__':
    main()
