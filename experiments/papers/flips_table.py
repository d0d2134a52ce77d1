"""The table of smollm2_flips.sh: accuracy on all held-out pairs, paired differences over seeds with their 95% interval, and the verdict
of experiments/claims/verdict.py.  python -m experiments.papers.flips_table OUT 'SEEDS' 'FLIPS'"""

import json
import sys
from pathlib import Path

from experiments.claims import verdict
from experiments.claims.report import interval, table


def accuracy(file):
    """The last evaluation's accuracy, or None where the run is missing."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return next((row['rewards_eval/accuracies'] for row in reversed(rows) if row['split'] == 'eval'), None)


def main(out, seeds, flips):
    results, rows, found = Path(out) / 'results', [], []
    for rate in flips.split():
        by_method = {
            m: [accuracy(results / f'{m}-{rate}-{s}.jsonl') for s in seeds.split()] for m in ('dpo', 'drdpo', 'quarter')
        }
        for ours, theirs in (('drdpo', 'dpo'), ('quarter', 'dpo'), ('drdpo', 'quarter')):
            both = zip(by_method[ours], by_method[theirs], strict=True)
            found.append([None if None in two else two[0] - two[1] for two in both])
            rows.append(
                [rate, ours, interval(by_method[ours]), theirs, interval(by_method[theirs]), interval(found[-1])]
            )
    verdicts = verdict.judge([(differences, 'accuracy') for differences in found])
    head = ['flips', 'ours', 'accuracy', 'theirs', 'accuracy', 'difference [95%]', 'verdict']
    text = table(head, [[*row, decided.word] for row, decided in zip(rows, verdicts, strict=True)])
    (Path(out) / 'table.md').write_text(text)
    print(f'{text}{out}/table.md')


if __name__ == '__main__':
    if len(sys.argv) != 4:
        sys.exit("usage: python -m experiments.papers.flips_table OUT 'SEEDS' 'FLIPS'")
    main(*sys.argv[1:])
