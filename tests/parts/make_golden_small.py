"""Cut golden_small.json out of the full set of golden vectors.

    PYTHONPATH=.:tests python tests/parts/make_golden_small.py FULL.json

Of every group that test_golden.py checks it keeps the smallest case of each kind, a kind being what the hyper-parameters
and flags say apart from the size of numbers, and of those at most LIMIT, the most different first.
"""

import json
import sys
from pathlib import Path

import test_golden

LIMIT = 4
HERE = Path(__file__).resolve().parent


def kind(case):
    """What selects another branch: names and switches, which numbers are 0, typical or extreme inputs or ties."""
    values = {k: (v != 0 if isinstance(v, float | int) else str(v)) for k, v in case['hyper'].items()}
    inputs = case.get('input', '').split('_')[0]
    inputs = '' if inputs.startswith('logits') else inputs  # they are large
    return [*sorted(values.items()), ('do_not_copy', case.get('do_not_copy')), inputs, *case.get('flags', [])]


def size(case, inputs):
    return len(json.dumps(case)) + len(json.dumps(inputs.get(case.get('input'), '')))


def choose(cases, inputs):
    """The smallest case first, then the one least like those chosen (ties: the smallest)."""
    chosen = []
    while len(chosen) < LIMIT:
        left = [case for case in cases if all(kind(case) != kind(other) for other in chosen)]
        if not left:
            break
        new = {id(c): min((sum(k not in kind(o) for k in kind(c)) for o in chosen), default=0) for c in left}
        chosen.append(min(left, key=lambda c: (-new[id(c)], size(c, inputs))))
    return chosen


def main(path):
    full = test_golden.GOLDEN = json.loads(Path(path).read_text())
    small = {'format': full['format'], 'version': full['version'], 'inputs': {}, 'groups': {}}
    for name, group in full['groups'].items():
        if name in test_golden.CHECKS:
            kept = choose([case for case, _ in test_golden.compared(name)], full['inputs'])
            unused = ('check', 'float32', 'note', 'group')
            small['groups'][name] = {
                'peer': group['peer'],
                'function': group['function'],
                'cases': [{k: v for k, v in case.items() if k not in unused} for case in kept],
            }
            small['inputs'] |= {case['input']: full['inputs'][case['input']] for case in kept if 'input' in case}
    text = json.dumps(small, separators=(',', ':'))
    (HERE / 'golden_small.json').write_text(text + '\n')
    print(f'{len(text) // 1000} kB, {sum(len(g["cases"]) for g in small["groups"].values())} cases')


if __name__ == '__main__':
    main(sys.argv[1])
