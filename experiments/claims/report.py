"""The report of experiments/claims: verdicts, tables and a plot from the trials that are there, and their place in docs/evidence.md."""

import itertools
import re
import statistics

from experiments.claims import verdict
from experiments.claims.grid import BETA, FLIPS, PRICE, key, name_of, value
from experiments.claims.rules import judged
from experiments.claims.verdict import CONTRARY, HOLDS, SMALLEST, WORDS

BEGIN, END = '<!-- claims: written by experiments/claims --report -->', '<!-- end of claims -->'


def table(head, rows):
    """A markdown table."""
    lines = [head, ['---'] * len(head), *rows]
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines) + '\n'


def there(trials, results, metric):
    """A metric of those trials that are there and have not failed."""
    found = [results.get(key(trial)) for trial in trials]
    return [value(row, metric) for row in found if row and 'error' not in row]


def cells(trials, results, metric, digits=3):
    """'mean (standard error)' of a metric over trials that differ in the seed; what failed or is missing is said."""
    found = [results.get(key(trial)) for trial in trials]
    values = there(trials, results, metric)
    counts = {'failed': sum('error' in r for r in found if r), 'missing': found.count(None)}
    lost = [f'{n} {what}' for what, n in counts.items() if n]
    text = f'{statistics.mean(values):.{digits}f}' if values else ''
    if len(values) > 1:
        text += f' ({statistics.stdev(values) / len(values) ** 0.5:.{digits}f})'
    return ', '.join(filter(None, [text, *lost]))


def interval(found):
    """'mean [lower, upper]' of differences by seed, the plain 95% interval; missing seeds are said."""
    numbers = [x for x in found if x is not None]
    if not numbers:
        return 'no numbers'
    text = f'{statistics.mean(numbers):+.3f}'
    if len(numbers) > 1:
        _, (_, lower, upper) = verdict.p_values(numbers, 1.0)
        text += f' [{lower:+.3f}, {upper:+.3f}]'
    return text + f', {len(found) - len(numbers)} seeds missing' * (len(numbers) < len(found))


def verdict_table(rows):
    """Of every claim the measured difference, its settings, d, and the word; bold only what holds and what is contrary."""
    lines = []
    for claim, found, decided in rows:
        word = f'**{decided.word}**' if decided.word in (HOLDS, CONTRARY) else decided.word
        lines.append([claim.words, claim.measured, claim.settings, interval(found), SMALLEST[claim.unit], word])
    return table(['claim', 'measured', 'settings', 'difference [95%]', 'd', 'verdict'], lines)


def write(grid, seeds, results, out):
    """results.md and the plot, into the folder out."""
    rows = judged(grid, seeds, results)
    text = head(grid, seeds, results, rows)
    for section in (equal_section, beta_section, frontier_section, tuned_section):
        text += section(grid, seeds, results)
    (out / 'results.md').write_text(text.rstrip() + '\n')
    plot(grid, seeds, results, out / 'equal.png')

    # and what matters most, on the screen
    print(f'{out}/results.md, equal.png')
    for claim, found, decided in rows:
        print(f'  {decided.word:20s}  {interval(found):32s}  {claim.words}')


def head(grid, seeds, results, rows):
    """What was run, and the verdicts."""
    trials = grid.trials(seeds)
    used = [results[key(trial)] for trial in trials if key(trial) in results]
    failed = sum('error' in row for row in used)
    commits = ', '.join(sorted({row['commit'] for row in used}))
    minutes = sum(row['cpu_seconds'] for row in used) / 60
    n_samples = '/'.join(sorted({str(row['n_samples']) for row in used}))
    counts = ', '.join(f'{word}: {sum(v.word == word for _, _, v in rows)}' for word in WORDS)
    return f"""# The papers' claims on the toy world

Written by `experiments/claims`; the raw results are in `results.jsonl`. {len(used)} of {len(trials)} trials, seeds {', '.join(map(str, seeds))},
commits {commits}, {minutes:.0f} minutes of one core, {n_samples} samples a model. {failed} trials failed. {counts}.

The toy world is small: answers of 16 tokens, a model of 0.1 M parameters. What holds here is a sign that method and code do what
is said of them; what does not is a finding about this world at these settings. In the tables below, numbers are means over
seeds with their standard error. Gold reward: the best possible is 1.5. KL: of the policy from the SFT model, nats an answer.
Score: gold reward minus {PRICE} times the KL. Accuracy: on held-out pairs labelled by the gold reward itself.

## Verdicts

{verdict_table(rows)}The rule, fixed before these runs (`experiments/claims/verdict.py`):

```
{verdict.__doc__[verdict.__doc__.index('The rule.') :]}```

"""


def equal_section(grid, seeds, results):
    """All cells of the comparison at equal beta and learning rate, with what shows the mechanism."""
    text = "## Equal beta and learning rate\n\n'DPO at beta / 4' stands in the row of the beta that it is compared at.\n\n![](equal.png)\n\n"
    titles = {
        'accuracy': 'Accuracy', 'score': 'Score', 'flipped_share': 'Share of the gradient on flipped pairs after training',
        'h_std': 'Standard deviation of beta d on the training pairs', 'margin': 'Mean over standard deviation of d on held-out pairs',
    }  # fmt: skip
    for metric, title in titles.items():
        logged = metric in ('flipped_share', 'h_std')
        methods = [m for m in grid.like if not logged or 'dpo' in (m, m.split()[0]) or m.startswith('drdpo')]
        rows = []
        for flips, (beta, lr) in itertools.product(FLIPS[-1:] if metric == 'flipped_share' else FLIPS, grid.cells()):
            row = [f'{flips:.0%}', f'{beta:g}', f'{lr:g}']
            for method in methods:
                tried = flips in grid.flips_of(method)
                trials = [grid.equal(method, beta, lr, flips, seed) for seed in seeds]
                row.append(cells(trials, results, metric) if tried else '')
            rows.append(row)
        text += f'{title}\n\n' + table(['flips', 'beta', 'lr', *map(name_of, methods)], rows)
    return text


def beta_section(grid, seeds, results):
    """DPO and beta-DPO over beta, on pairs of mixed gaps."""
    pairs = 'Half low gaps (below 0.5), half high gaps (above 1.2)'
    text = f'## beta-DPO on pairs of mixed gap\n\n{pairs}; lr {grid.mixed_lr:g}.\n\n'
    rows = []
    for metric, method in itertools.product(('score', 'gold', 'kl', 'accuracy'), BETA):
        trials = [[grid.mixed(method, beta, seed) for seed in seeds] for beta in grid.mixed_betas]
        rows.append([metric, name_of(method), *(cells(t, results, metric) for t in trials)])
    return text + table(['metric', 'loss', *(f'beta {b:g}' for b in grid.mixed_betas)], rows)


def frontier_section(grid, seeds, results):
    """Reward and both KLs of every method at every strength."""
    metrics = ('gold', 'kl', 'kl_chosen', 'kl_rejected')
    rows = []
    for method in (*grid.frontier, *grid.online):
        known = metrics if method in grid.frontier else metrics[:2]
        for strength in grid.pulls(method):
            trials = [grid.pull(method, strength, seed) for seed in seeds]
            numbers = [cells(trials, results, metric) if metric in known else '' for metric in metrics]
            rows.append([name_of(method), f'{strength:g}', *numbers])
    columns = ['method', 'beta or kl_coef', 'gold reward', 'KL', 'forward KL, chosen', 'forward KL, rejected']
    about = 'The last two columns: KL(reference || policy) over the first 500 held-out pairs.'
    return f'## Reward against KL\n\n{about}\n\n' + table(columns, rows)


def tuned_section(grid, seeds, results):
    """The SFT model, and every method at what its search has found for a metric."""
    metrics = ('score', 'gold', 'kl', 'accuracy', 'well_formed', 'length')
    rows = [['the SFT model', '', *(cells([grid.reference(seed) for seed in seeds], results, m) for m in metrics)]]
    for name, metric in grid.tuned_names():
        found = ', '.join(f'{k} {v:g}' for k, v in grid.setting(name, metric).items())
        trials = [grid.tuned(name, metric, seed) for seed in seeds]
        kind, method = name.split(maxsplit=1)
        rows.append([f'{kind}: {name_of(method)}', f'{metric}: {found}', *(cells(trials, results, m) for m in metrics)])
    columns = ['method', 'tuned for: found', 'score', 'gold reward', 'KL', 'accuracy', 'well-formed', 'tokens']
    about = f'The best of twelve settings on seed 0 (`search.jsonl`), the same number for every method. flips: {FLIPS[-1]:.0%} of the labels.'
    return f'## Both tuned\n\n{about}\n\n' + table(columns, rows)


def write_page(out, page):
    """Put the verdicts between the markers of docs/evidence.md."""
    text, report = page.read_text(), (out / 'results.md').read_text()
    begin = re.search('<!-- claims: .*-->', text)
    if not begin or END not in text:
        raise SystemExit(f'{page} has no markers {BEGIN} and {END}')
    verdicts = report[report.index('| claim |') : report.index('The rule, fixed')]
    size = re.search(r'\d+ of \d+ trials, seeds \d+(, \d+)*', report).group()
    body = f'{size}, each seed with its own SFT model. The difference is paired, with its 95% interval.\n\n{verdicts}'
    plot = '![Accuracy against DPO at equal settings](../experiments/claims/record/equal.png)\n'
    page.write_text(f'{text[: begin.start()]}{begin.group()}\n{body}{plot}{text[text.index(END) :]}')


def plot(grid, seeds, results, path):
    """equal.png: accuracy minus that of DPO at the same beta and learning rate. Without matplotlib: a sentence."""
    try:
        import matplotlib
    except ImportError:
        print('note: no plot without matplotlib (pip install matplotlib)')
        return
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    methods = [m for m in ('drdpo 1', 'drdpo 4', 'dpo quarter') if m in grid.like]
    figure, axes = plt.subplots(1, len(FLIPS), figsize=(9, 3), sharey=True)
    for axis, flips in zip(axes, FLIPS, strict=True):
        for shift, method in enumerate(methods):
            for i, (beta, lr) in enumerate(grid.cells()):
                pairs = [[grid.equal(m, beta, lr, flips, seed) for m in (method, 'dpo')] for seed in seeds]
                both = [there(pair, results, 'accuracy') for pair in pairs]
                found = [a - b for a, b in (two for two in both if len(two) == 2)]
                if len(found) > 1:
                    _, (mean, low, _) = verdict.p_values(found, 1.0)
                    label = name_of(method) if i == 0 else None
                    axis.errorbar(
                        [i + shift / 5 - 0.2],
                        [mean],
                        [mean - low],
                        fmt='o',
                        color=f'C{shift}',
                        capsize=2,
                        markersize=4,
                        label=label,
                    )
        axis.set_xticks(range(len(grid.cells())), [f'{beta:g}\n{lr:g}' for beta, lr in grid.cells()], fontsize=8)
        axis.axhline(0, color='k', linewidth=0.6)
        axis.set(title=f'{flips:.0%} flips', xlabel='beta, lr')
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('accuracy minus DPO, 95%')
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
