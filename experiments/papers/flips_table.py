"""The table of smollm2_flips.sh: accuracy on all held-out pairs, paired differences over seeds with their 95% interval, and the verdict
of experiments/claims/verdict.py.  python -m experiments.papers.flips_table OUT 'SEEDS' 'FLIPS'"""

import sys
from pathlib import Path

from experiments import read_rows, table
from experiments.claims import verdict
from experiments.claims.report import interval

COMPARED = [('drdpo', 'dpo'), ('quarter', 'dpo'), ('drdpo', 'quarter')]  # ours, theirs


def accuracy(file):
    """Return the accuracy of the last evaluation, or None if the run is missing."""
    rows = read_rows(file) if file.exists() else []
    return next((row['rewards_eval/accuracies'] for row in reversed(rows) if row['split'] == 'eval'), None)


def main(out, seeds, flips):
    results, rows, found = Path(out) / 'results', [], []
    for rate in flips.split():
        accuracies = {}
        for method in ('dpo', 'drdpo', 'quarter'):
            accuracies[method] = [accuracy(results / f'{method}-{rate}-{seed}.jsonl') for seed in seeds.split()]
        for ours, theirs in COMPARED:
            pairs = zip(accuracies[ours], accuracies[theirs], strict=True)
            found.append([None if None in (a, b) else a - b for a, b in pairs])
            sides = [ours, interval(accuracies[ours]), theirs, interval(accuracies[theirs])]
            rows.append([rate, *sides, interval(found[-1])])
    words = verdict.judge([(differences, 'accuracy') for differences in found])
    head = ['flips', 'ours', 'accuracy', 'theirs', 'accuracy', 'difference [95%]', 'verdict']
    lines = [[*row, word] for row, word in zip(rows, words, strict=True)]
    text = table(head, lines)
    (Path(out) / 'table.md').write_text(text)
    print(f'{text}{out}/table.md')


if __name__ == '__main__':
    if len(sys.argv) != 4:
        sys.exit("usage: python -m experiments.papers.flips_table OUT 'SEEDS' 'FLIPS'")
    main(*sys.argv[1:])
