"""Time and memory of reading and tokenising rows, ours and that of datasets.map with the same tokenizer, in turns.

    python -m experiments.speed.tokenise --rows 10000 100000 --rounds=2 --tokenizer=FOLDER

A row is a pair of about 500 tokens. Each measurement is a process of its own, with empty caches; then ours starts again
from its cache. Memory is the most that the process and its children hold together beyond what imports take: private, and with
what is mapped from files, in bytes a token."""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {'max_length': 4096, 'max_prompt_length': 2048}


def write_rows(path, count):
    """Pairs of words of the toy world, as many tokens as real ones have."""
    from text import toy

    rng = random.Random(0)
    with open(path, 'w') as stream:
        for i in range(count):
            prompt, chosen, rejected = (' '.join(rng.choices(toy.WORDS, k=k)) for k in (80, 190, 190))
            row = {
                'prompt': f'\n\nHuman: {i} {prompt}\n\nAssistant:',
                'chosen': f' {chosen}',
                'rejected': f' {rejected}',
            }
            stream.write(json.dumps(row) + '\n')


def ours(path, tokenizer):
    """The number of tokens, after load_examples."""
    from text.tokenise import load_examples

    found = [load_examples(path, split, tokenizer, 'pairs', **LIMITS) for split in ('train', 'test')]
    return sum(int(examples.lengths.sum()) for examples in found)


def theirs(path, tokenizer):
    """The number of tokens, after datasets.map in as many processes as there are cores."""
    import datasets

    def encode(rows):
        return {name: tokenizer(rows[name])['input_ids'] for name in ('prompt', 'chosen', 'rejected')}

    rows = datasets.load_dataset('json', data_files=path, split='train')
    rows = rows.map(encode, batched=True, num_proc=os.cpu_count(), remove_columns=rows.column_names)
    return sum(len(ids) for batch in rows.iter(1000) for column in batch.values() for ids in column) + 2 * len(rows)


def memory():
    """(private, all) bytes of this process and its children."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [process.memory_info() for process in processes if process.is_running()]
    return sum(m.rss - m.shared for m in found), sum(m.rss for m in found)


def cpu_seconds():
    """Seconds of processors that this process and its children that ended have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(r.ru_utime + r.ru_stime for r in used)


def measure(how, path, folder):
    """Print [seconds, those of all processors, tokens, private bytes, all bytes] of one way, beyond what imports take."""
    import datasets  # noqa: F401, both start with all imports done

    import text.tokenise  # noqa: F401
    from hf.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    before, most, done = memory(), [0, 0], threading.Event()

    def watch():
        while not done.wait(0.1):
            try:
                most[:] = map(max, most, memory())
            except psutil.Error:  # a child has just ended
                continue

    watcher = threading.Thread(target=watch, daemon=True)  # an error here must not leave it behind
    watcher.start()
    start, used = time.time(), cpu_seconds()
    tokens = {'ours': ours, 'again': ours, 'theirs': theirs}[how](path, tokenizer)
    seconds, used = time.time() - start, cpu_seconds() - used
    done.set()
    watcher.join()
    print(json.dumps([seconds, used, tokens, *(max(0, m - b) for m, b in zip(most, before, strict=True))]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rows', type=int, nargs='+', default=[10_000])
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--ways', nargs='+', default=['ours', 'again', 'theirs'])
    parser.add_argument('--tokenizer', default='toy', help='a folder with one, or toy')
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure, options.tokenizer)
    for count in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(f'{folder}/rows.jsonl', count)
            for number in range(options.rounds):
                cache = {'NANOPREF_CACHE': f'{folder}/ours{number}', 'HF_DATASETS_CACHE': f'{folder}/theirs{number}'}
                for how in options.ways:
                    command = [sys.executable, '-m', __spec__.name, f'--tokenizer={options.tokenizer}']
                    command += ['--measure', how, f'{folder}/rows.jsonl']
                    how_run = {'cwd': ROOT, 'env': os.environ | cache, 'stdout': subprocess.PIPE, 'text': True}
                    out = subprocess.run(command, **how_run)
                    if out.returncode:
                        sys.exit(f'{how} stopped: the lines above say why')
                    seconds, used, tokens, private, everything = json.loads(out.stdout.splitlines()[-1])
                    print(f'{count:>9,} rows  {how:<6} {seconds:7.1f} s ({used:.1f} of processors)  {tokens / seconds / 1e6:6.2f} M tokens/s  '
                          f'{private / tokens:5.1f} bytes/token private, {everything / tokens:5.1f} with maps', flush=True)  # fmt: skip


if __name__ == '__main__':
    main()
