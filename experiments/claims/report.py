"""The report of experiments/claims: verdicts and all numbers from the trials that are there, and their place in docs/evidence.md."""

import re
import statistics

from experiments import mean_and_error, table
from experiments.claims import verdict
from experiments.claims.grid import PRICE, key, value
from experiments.claims.rules import judged, settings_of
from experiments.claims.verdict import CONTRARY, HOLDS, SMALLEST, WORDS

END = '<!-- end of claims -->'
METRICS = 'score gold kl accuracy margin h_std flipped_share kl_chosen kl_rejected well_formed length'.split()
EQUAL, TUNED = 'Equal settings, one thing changed:', 'Both tuned for the metric of the claim, by as many trials:'


def interval(found):
    """Return 'mean [lower, upper]' of the differences by seed, with the plain 95% interval, and how many seeds are missing."""
    numbers = [x for x in found if x is not None]
    if not numbers:
        return 'no numbers'
    text = f'{statistics.mean(numbers):+.3f}'
    if len(numbers) > 1:
        text += ' [{:+.3f}, {:+.3f}]'.format(*verdict.confidence(numbers))
    missing = len(found) - len(numbers)
    return f'{text}, {missing} seeds missing' if missing else text


def verdict_tables(rows):
    """Return a table of the claims at equal settings and one of the tuned ones. Only what holds and what is contrary is bold."""
    lines = {EQUAL: [], TUNED: []}
    for claim, found, word in rows:
        shown = f'**{word}**' if word in (HOLDS, CONTRARY) else word
        kind = TUNED if claim.settings.startswith('tuned') else EQUAL
        of_claim = [claim.words, claim.measured, claim.settings]
        lines[kind].append([*of_claim, interval(found), SMALLEST[claim.unit], shown])
    head = ['claim', 'measured', 'settings', 'difference [95%]', 'd', 'verdict']
    return ''.join(f'{title}\n\n{table(head, part)}' for title, part in lines.items() if part)


def number_table(trials, results):
    """Return a table with a row a setting: 'mean (standard error)' of each metric, and how many trials failed or are missing."""
    groups = {}  # (loss, setting in words) -> results, None where one is missing
    for trial in trials:
        setting = {'pairs': trial['data'], **(trial['options'] or {'loss': 'the SFT model'})}
        loss = setting.pop('loss')
        words = ', '.join(f'{option} {value}' for option, value in setting.items() if value)
        groups.setdefault((loss, words), []).append(results.get(key(trial)))

    rows = []
    for (loss, words), found in groups.items():
        done = [row for row in found if row and 'error' not in row]
        missing = found.count(None)
        failed = len(found) - len(done) - missing
        words = ', '.join(filter(None, [words, failed and f'{failed} failed', missing and f'{missing} missing']))
        cells = []
        for metric in METRICS:
            measured = [row for row in done if metric == 'score' or metric in row]
            cells.append(mean_and_error([value(row, metric) for row in measured]))
        rows.append([loss, words, *cells])
    return table(['loss', 'setting', *METRICS], sorted(rows))


def write(grid, seeds, results, out):
    """Write results.md into the folder out, and print the verdicts."""
    rows = judged(grid, seeds, results)
    trials = grid.trials(seeds)
    used = [results[key(trial)] for trial in trials if key(trial) in results]
    failed = sum('error' in row for row in used)
    commits = ', '.join(sorted({row['commit'] for row in used}))
    minutes = sum(row['cpu_seconds'] for row in used) / 60
    n_samples = '/'.join(sorted({str(row['n_samples']) for row in used}))
    words = [word for _, _, word in rows]
    counts = ', '.join(f'{word}: {words.count(word)}' for word in WORDS)
    found = []
    for name, metrics in grid.settings.items():
        found += [[name, metric, settings_of(best)] for metric, best in metrics.items()]
    text = f"""# The papers' claims on the toy world

Written by `experiments/claims`; the raw results are in `results.jsonl`. {len(used)} of {len(trials)} trials, seeds {', '.join(map(str, seeds))},
commits {commits}, {minutes:.0f} minutes of one core, {n_samples} samples a model. {failed} trials failed. {counts}.

## Verdicts

{verdict_tables(rows)}The rule, fixed before these runs (`experiments/claims/verdict.py`):

```
{verdict.__doc__[verdict.__doc__.index('The rule.') :]}```

## Settings found

The best of twelve on seed 0 (`search.jsonl`), the same number for every method.

{table(['search', 'by', 'found'], found)}## All numbers

Means over seeds, with their standard error. gold: the best possible is 1.5. kl: of the policy from the SFT model, nats an answer.
score: gold minus {PRICE} kl. accuracy: on held-out pairs labelled by the gold reward itself; margin: mean over standard deviation of their
d. h_std: of beta d on the training pairs; flipped_share: of flipped pairs in the gradient, after training. kl_chosen, kl_rejected: KL(SFT
model || policy) on held-out answers.

{number_table(trials, results)}"""
    (out / 'results.md').write_text(text.rstrip() + '\n')

    # and what matters most, on the screen
    print(f'{out}/results.md')
    for claim, differences, word in rows:
        print(f'  {word:20s}  {interval(differences):32s}  {claim.words}')


def write_page(out, page):
    """Put the verdicts between the markers of docs/evidence.md."""
    text, report = page.read_text(), (out / 'results.md').read_text()
    begin = re.search('<!-- claims: .*-->', text)
    if not begin or END not in text:
        raise SystemExit(f'{page} has no markers <!-- claims: ... --> and {END}')
    verdicts = report[report.index('## Verdicts') : report.index('The rule, fixed')].removeprefix('## Verdicts\n\n')
    size = re.search(r'\d+ of \d+ trials, seeds \d+(, \d+)*', report).group()
    body = f'{size}, each seed with its own SFT model. The difference is paired, with its 95% interval.\n\n{verdicts}'
    before, after = text[: begin.end()], text[text.index(END) :]
    page.write_text(f'{before}\n{body.rstrip()}\n{after}')
