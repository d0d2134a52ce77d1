"""The table of a procedure in this folder, from what its runs have left:  python -m experiments.papers.row out/paper/drdpo_hh

A row a run: accuracy and margin on the held-out pairs, KL on their answers, the judge's win rate (also at equal length)."""

import json
import sys
from pathlib import Path


def percent(report, name):
    value, error = report.get(name), report.get(name + '_se')
    if value is None:
        return '-'
    return f'{value:.1%}' + (f' ({error:.1%})' if error is not None else '')


def main(folder):
    rows = []
    for run in sorted(Path(folder).iterdir()):
        if not (run / 'metrics.jsonl').exists() or run.name == 'sft':
            continue
        lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
        last = next((row for row in reversed(lines) if row['split'] == 'eval'), {})
        report = (
            json.loads((run / 'judged' / 'report.json').read_text())
            if (run / 'judged' / 'report.json').exists()
            else {}
        )
        numbers = [
            last.get(f'{k}_eval/{x}')
            for k, x in (('rewards', 'accuracies'), ('rewards', 'margins'), ('kl', 'chosen'), ('kl', 'rejected'))
        ]
        formats = ('.1%', '.3f', '.3f', '.3f')
        cells = ['-' if x is None else f'{x:{f}}' for x, f in zip(numbers, formats, strict=True)]
        rows.append([run.name, *cells, percent(report, 'win_rate'), percent(report, 'length_controlled')])
    head = ['run', 'accuracy', 'margin', 'KL on chosen', 'on rejected', 'win rate (se)', 'at equal length (se)']
    text = ''.join(f'| {" | ".join(line)} |\n' for line in (head, ['---'] * len(head), *rows))
    (Path(folder) / 'row.md').write_text(text)
    print(f'\n{text}\n{folder}/row.md')


if __name__ == '__main__':
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit('usage: python -m experiments.papers.row FOLDER, such as out/paper/drdpo_hh')
    main(sys.argv[1])
