"""A small world whose answers can be checked: sums of two numbers of two digits, for sft.py and for ppo.py with a reward function.

    python -m experiments.sums out/sums
    python sft.py config/sft_sums.py
    python ppo.py config/grpo_sums.py

A sum is written as it is added by hand, the units first: 47+25=27. Who wrote the demonstrations was careless: of four answers
to a sum one is right, the others are wrong by ten or twenty. A model of them answers as carelessly, and finds out from the
reward alone which answers are right."""

import json
import random
import sys
from pathlib import Path

SLIPS = (-10, 10, 20)


def right(prompts, responses, rows):
    """1 for the right sum and nothing else, else 0: the reward function of config/grpo_sums.py."""
    return [float(response == row['answer']) for response, row in zip(responses, rows, strict=True)]


def row(a, b, column, slip=0):
    """A row whose column has the sum, wrong by slip."""
    return {'prompt': f'{a}+{b}=', column: str(a + b + slip)[::-1]}


def write(folder, seed=0):
    """Write demonstrations.jsonl, prompts.jsonl and held_out.jsonl: no held-out sum is among the others."""
    rng = random.Random(seed)
    sums = [(a, b) for a in range(10, 50) for b in range(10, 50)]
    rng.shuffle(sums)
    held_out, known = sums[:128], sums[128:]
    demonstrations = [row(*pair, 'response', slip) for pair in known for slip in (0, *SLIPS)]
    # prompts come with their answers, for the reward alone
    files = {'demonstrations': demonstrations}
    for name, part in (('prompts', known), ('held_out', held_out)):
        files[name] = [row(*pair, 'answer') for pair in part]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = [json.dumps(row) + '\n' for row in rows]
        (Path(folder) / f'{name}.jsonl').write_text(''.join(lines))


if __name__ == '__main__':
    write(*sys.argv[1:])
