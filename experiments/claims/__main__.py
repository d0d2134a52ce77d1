"""The papers' claims, tried on the toy world with its gold reward, on several seeds with an SFT model each.

    python -m experiments.claims                     # or make claims: the whole grid into out/claims
    python -m experiments.claims --quick             # fewer trials, half the examples, into out/claims_quick
    python -m experiments.claims --seeds='11 12 13'  # other seeds, into the same files
    python -m experiments.claims --search            # find the settings of both-tuned claims anew, on a seed that is not reported
    python -m experiments.claims --report            # write the report again from what is there

experiments/claims/record has what --out_dir=experiments/claims/record left there; with that docs/evidence.md is written, too. Resumable:
every finished trial is a line of results.jsonl, and is not made again. Settings are those of settings.json, here or else in the record.
"""

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from configurator import UserError, configure
from experiments import ROOT
from experiments.claims.grid import FULL, QUICK, SEARCH_SEED, SEARCHES, Grid, best_of, key, search_trials
from experiments.claims.report import write, write_page
from experiments.claims.trial import run_trial, train_reference
from runtime.files import append, append_kept, cut_rows, read_lines

seeds = '1 2 3 4 5'  # of the SFT model, the pairs, their order, the flips and the samples; 0 is the search's
quick = False  # a small grid, half the examples, and unless given: three seeds, 256 samples
search = False  # the search for settings instead of the grid
report = False  # only write the report from the trials that are there
workers = 2  # processes side by side, one thread each
n_samples = 512  # answers that a model is judged by
out_dir: str | None = None  # where results go; None: out/claims, or out/claims_quick

RECORD = ROOT / 'experiments/claims/record'


def read_results(file):
    """Return the results in a file, by key of their trial. Removes a last line that a crash has cut short."""
    cut_rows(file, keep=lambda row: True)
    return dict(read_lines(file, lambda row: (key(row), row), 'delete that line: the trial is made again'))


def run(trials, file, work):
    """Run the trials that are not in the file yet, several side by side, and append each result when it is there."""
    results = read_results(file)
    left = [trial for trial in trials if results.get(key(trial), {}).get('n_samples') != n_samples]
    print(f'{len(trials)} trials, {len(trials) - len(left)} of them done already: {file}', flush=True)
    if not left:
        return
    began = time.time()
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) as pool:
        list(pool.map(partial(train_reference, work), sorted({trial['seed'] for trial in left})))
        waiting = [pool.submit(run_trial, trial, work, n_samples) for trial in left]
        for i, future in enumerate(as_completed(waiting), 1):
            result = future.result()
            append(file, json.dumps(result) + '\n')
            options = result['options'] or {}
            setting = ' '.join(f'{name}={value}' for name, value in options.items())
            said = result.get('error') or 'gold {gold:+.3f}  acc {accuracy:.3f}  kl {kl:.3f}'.format(**result)
            minutes = (time.time() - began) / i * (len(left) - i) / 60
            done = f'{i:4d}/{len(left)}  seed {result["seed"]}'
            print(f'{done}  {setting:60s}  {said}  {minutes:.0f} min left', flush=True)
    append_kept()  # raises UserError if the disk is still full


if __name__ == '__main__':
    config = configure(globals())
    if quick:
        seeds = '1 2 3' if config.origin['seeds'] == 'default' else seeds
        n_samples = 256 if config.origin['n_samples'] == 'default' else n_samples
    chosen = [int(word) for word in seeds.split() if word.isdecimal()]
    if not chosen or len(set(chosen)) < len(seeds.split()):
        raise UserError(f"seeds must be different whole numbers, such as '1 2 3', not {seeds!r}")
    if SEARCH_SEED in chosen and not search:
        raise UserError(f'seed {SEARCH_SEED} has chosen the settings: report others')
    out = Path(out_dir or f'out/claims{"_quick" if quick else ""}').resolve()
    work = out / 'work'  # the SFT model, the pairs, the cache of tokens
    work.mkdir(parents=True, exist_ok=True)
    os.environ['OMP_NUM_THREADS'] = '1'  # the workers inherit it
    os.environ.setdefault('NANOPREF_CACHE', str(work / 'cache'))
    settings, results = out / 'settings.json', out / 'results.jsonl'
    if search:
        config.report_unused(['seeds', 'quick', 'report'], 'the search has one seed and one size')
        trials = [trial for name in SEARCHES for trial in search_trials(name)]
        run(trials, out / 'search.jsonl', work)
        rows = read_results(out / 'search.jsonl')
        found = {name: best_of(name, rows) for name in SEARCHES}
        settings.write_text(json.dumps(found, indent=1) + '\n')
        print(f'{settings}:\n{settings.read_text()}')
        sys.exit()
    found = settings if settings.exists() else RECORD / 'settings.json'
    axes = QUICK if quick else FULL
    grid = Grid(settings=json.loads(found.read_text()), **axes)
    if not report:
        run(grid.trials(chosen), results, work)
    write(grid, chosen, read_results(results), out)
    if out == RECORD and not quick:
        write_page(out, ROOT / 'docs/evidence.md')
