"""The table of a procedure in this folder, from what its runs have left:  python -m experiments.papers.row out/paper/drdpo_hh

A row a run: accuracy and margin on the held-out pairs, KL on their answers, the judge's win rate (also at equal length)."""

import sys
from pathlib import Path

from experiments import evaluations, table
from runtime.files import read_json

# a column, its number in the last evaluation, and how it is written
NUMBERS = [
    ('accuracy', 'rewards_eval/accuracies', '.1%'),
    ('margin', 'rewards_eval/margins', '.3f'),
    ('KL on chosen', 'kl_eval/chosen', '.3f'),
    ('on rejected', 'kl_eval/rejected', '.3f'),
]


def percent(report, name):
    value, error = report.get(name), report.get(f'{name}_se')
    if value is None:
        return '-'
    return f'{value:.1%}' if error is None else f'{value:.1%} ({error:.1%})'


def main(folder):
    rows = []
    for metrics in sorted(Path(folder).glob('*/metrics.jsonl')):
        run = metrics.parent
        if run.name == 'sft':
            continue
        last = ([{}] + evaluations(run))[-1]
        cells = []
        for _, key, form in NUMBERS:
            cells.append(format(last[key], form) if key in last else '-')
        file = run / 'judged' / 'report.json'
        report = read_json(file, dict, 'label.py writes it anew') if file.exists() else {}
        rows.append([run.name, *cells, percent(report, 'win_rate'), percent(report, 'length_controlled')])
    text = table(['run', *(words for words, *_ in NUMBERS), 'win rate (se)', 'at equal length (se)'], rows)
    (Path(folder) / 'row.md').write_text(text)
    print(f'\n{text}{folder}/row.md')


if __name__ == '__main__':
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit('usage: python -m experiments.papers.row FOLDER, such as out/paper/drdpo_hh')
    main(sys.argv[1])
