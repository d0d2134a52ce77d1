"""A small world whose answers can be checked: sums of two numbers of two digits, for sft.py and for ppo.py with a reward function.

    python -m experiments.sums out/sums
    python sft.py config/sft_sums.py
    python ppo.py config/grpo_sums.py

A sum is written as it is added by hand, the units first: 47+25=27. The demonstrations are by a careless writer: one in four is
right, the others are too large by ten. A model of them answers as carelessly, and finds out from the reward alone which of its
answers are right."""

import random
import sys
from pathlib import Path

from configurator import configure
from experiments import write_rows

SHARE_RIGHT, SLIP = 0.25, 10  # of the demonstrations; by how much the others are too large


def right(prompts, responses, rows):
    """Return 1 for each answer that is the right sum and nothing else, else 0: the reward function of config/grpo_sums.py."""
    return [float(response == row['answer']) for response, row in zip(responses, rows, strict=True)]


def row(a, b, column, slip=0):
    """Return a row with the prompt a+b= and in `column` the sum plus slip, its digits reversed."""
    total = str(a + b + slip)
    return {'prompt': f'{a}+{b}=', column: total[::-1]}


def write(folder):
    """Write demonstrations.jsonl, prompts.jsonl and held_out.jsonl: no held-out sum is among the others."""
    rng = random.Random(0)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(sums)
    held_out, known = sums[:256], sums[256:]
    demonstrations = [row(*pair, 'response', 0 if rng.random() < SHARE_RIGHT else SLIP) for pair in known]
    files = {'demonstrations': demonstrations}
    for name, part in (('prompts', known), ('held_out', held_out)):
        files[name] = [row(*pair, 'answer') for pair in part]  # the answer is for the reward alone
    for name, rows in files.items():
        write_rows(Path(folder) / f'{name}.jsonl', rows)


if __name__ == '__main__':
    configure(globals(), [word for word in sys.argv[1:] if word.startswith('-')])
    for folder in [word for word in sys.argv[1:] if not word.startswith('-')] or ['out/sums']:
        write(folder)
