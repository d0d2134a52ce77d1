"""The report of experiments/claims: verdicts, tables and plots from the trials that are there, and their place in the README."""

import itertools
import re
import statistics

from experiments.claims import rules
from experiments.claims.grid import FLIPS, ONLINE, PRICE, key, name_of, score
from experiments.claims.rules import HOLDS, NOT, OPEN, bounds, claims, judge

BEGIN, END = '<!-- claims: written by experiments/claims --report -->', '<!-- end of claims -->'


def table(head, rows):
    """A markdown table."""
    lines = [head, ['---'] * len(head), *rows]
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines) + '\n'


def cells(trials, results, metric, digits=3):
    """'mean (standard error)' of a metric over trials that differ in the seed; what failed or is missing is said."""
    found = [results.get(key(trial)) for trial in trials]
    values = [score(r) if metric == 'score' else r[metric] for r in found if r and 'error' not in r]
    counts = {'failed': sum('error' in r for r in found if r), 'missing': found.count(None)}
    lost = [f'{n} {what}' for what, n in counts.items() if n]
    text = f'{statistics.mean(values):.{digits}f}' if values else ''
    if len(values) > 1:
        text += f' ({statistics.stdev(values) / len(values) ** 0.5:.{digits}f})'
    return ', '.join(filter(None, [text, *lost]))


def verdicts(grid, seeds, results):
    """[(claim, verdict, 'mean (standard error)')] of all claims."""
    rows = []
    for claim in claims(grid, results):
        word, differences = judge(claim, seeds)
        there = [d for d in differences if d is not None]
        missing = len(differences) - len(there)
        number = f'{statistics.mean(there):+.3f}' if there else 'no numbers'
        number += f' ({bounds(there)[1]:.3f})' if len(there) > 1 else ''
        number += f', {missing} seeds missing' if missing else ''
        rows.append((claim, word, number))
    return rows


def verdict_table(rows):
    cells = [(claim.words, claim.measured, number, f'**{word}**') for claim, word, number in rows]
    return table(['claim', 'measured', 'difference (se)', 'verdict'], cells)


def flips_table(grid, seeds, results, metric):
    rows = []
    for method in FLIPS:
        trials = [[grid.flips(method, rate, seed) for seed in seeds] for rate in grid.rates]
        rows.append([name_of(method), *(cells(t, results, metric) for t in trials)])
    return table(['flipped labels', *(f'{rate:.0%}' for rate in grid.rates)], rows)


INTRODUCTION = """The toy world is small (one clause is right or wrong by a word, answers of 16 tokens, a model of 0.1 M parameters): what holds
here is a sign that method and code do what is said of them, and what does not is a finding about this world at these settings.
Numbers are means over seeds with their standard error. Gold reward: the best possible is 1.5. KL: of the policy from the
SFT model, nats an answer."""


def write(grid, seeds, results, out):
    """results.md and the plots, into the folder out."""
    judged = verdicts(grid, seeds, results)
    text = head(grid, seeds, results, judged)
    if (out / 'notes.md').exists():
        text += (out / 'notes.md').read_text() + '\n'
    for section in (flips_section, beta_section, frontier_section, others_section):
        text += section(grid, seeds, results)

    # the settings of every method
    text += '## Settings\n\nFound by `experiments/claims --search`, the best of twelve on seed 0 (`search.jsonl`).\n\n'
    rows = [[name, ', '.join(f'{k} {v:g}' for k, v in found.items())] for name, found in grid.settings.items()]
    text += table(['search', 'found'], rows)
    (out / 'results.md').write_text(text.rstrip() + '\n')
    plot(grid, seeds, results, out)

    # and what matters most, on the screen
    print(f'{out}/results.md, flips.png, frontier.png')
    for claim, word, number in judged:
        print(f'  {word:16s}  {number:32s}  {claim.words}')


def head(grid, seeds, results, judged):
    """What was run, and the verdicts."""
    trials = grid.trials(seeds)
    used = [results[key(trial)] for trial in trials if key(trial) in results]
    failed = sum('error' in row for row in used)
    commits = ', '.join(sorted({row['commit'] for row in used}))
    minutes = sum(row['seconds'] for row in used) / 60
    n_samples = '/'.join(sorted({str(row['n_samples']) for row in used}))
    counts = ', '.join(f'{word}: {sum(w == word for _, w, _ in judged)}' for word in (HOLDS, OPEN, NOT))
    return f"""# The papers' claims on the toy world

Written by `experiments/claims`; the raw results are in `results.jsonl`. {len(used)} of {len(trials)} trials, seeds {', '.join(map(str, seeds))},
commits {commits}, {minutes:.0f} minutes of one process, {n_samples} samples a model.
{failed} trials failed. {counts}.

{INTRODUCTION} Score: gold reward minus {PRICE} times the KL. Accuracy: on held-out pairs labelled by the gold reward itself.

## Verdicts

{verdict_table(judged)}A verdict on one claim in twenty that are not so is expected by chance. The rule, fixed before these runs (`experiments/claims/rules.py`):

```
{rule()}```

"""


def flips_section(grid, seeds, results):
    """A table of the methods under flipped labels for each of four metrics."""
    text = "## Flipped labels\n\nOne epoch, the settings of each method's search at 20% flips.\n\n![](flips.png)\n\n"
    for metric, title in (('gold', 'Gold reward'), ('accuracy', 'Accuracy'), ('kl', 'KL'), ('score', 'Score')):
        text += f'{title}\n\n' + flips_table(grid, seeds, results, metric)
    return text


def beta_section(grid, seeds, results):
    """DPO and beta-DPO over beta, on pairs of different gaps."""
    pairs = 'mixed: half low gaps (below 0.5), half high gaps (above 1.2)'
    text = f'## beta-DPO\n\nAt the learning rate of DPO. {pairs}.\n\n'
    for metric, title in (('gold', 'Gold reward'), ('kl', 'KL'), ('score', 'Score')):
        rows = []
        for kind, method in itertools.product(grid.beta_kinds, ('dpo', 'beta_dpo')):
            trials = [[grid.beta(method, beta, kind, seed) for seed in seeds] for beta in grid.betas]
            rows.append([kind, name_of(method), *(cells(t, results, metric) for t in trials)])
        text += f'{title}\n\n' + table(['pairs', 'loss', *(f'beta {b:g}' for b in grid.betas)], rows)
    return text


def frontier_section(grid, seeds, results):
    """Reward and both KLs of every method at every strength."""
    metrics = ('gold', 'kl', 'kl_chosen', 'kl_rejected')
    rows = []
    for method in (*grid.frontier, *grid.online):
        for strength in grid.pulls(method):
            trials = [grid.pull(method, strength, seed) for seed in seeds]
            rows.append([name_of(method), f'{strength:g}', *(cells(trials, results, metric) for metric in metrics)])
    columns = ['method', 'beta or kl_coef', 'gold reward', 'KL', 'forward KL, chosen', 'forward KL, rejected']
    about = 'The last two columns: KL(reference || policy) over the held-out answers.'
    return f'## Reward against KL\n\n{about}\n\n![](frontier.png)\n\n' + table(columns, rows)


def others_section(grid, seeds, results):
    """The SFT model, single answers, and losses without a reference."""
    metrics = ('score', 'gold', 'kl', 'accuracy', 'well_formed', 'length')
    trials = {'the SFT model': [grid.reference(seed) for seed in seeds]}
    trials |= {name_of(method): [grid.other(method, seed) for seed in seeds] for method in grid.others}
    rows = [[name, *(cells(found, results, metric) for metric in metrics)] for name, found in trials.items()]
    columns = ['method', 'score', 'gold reward', 'KL', 'accuracy', 'well-formed', 'tokens']
    return '## Single answers, and no reference\n\nEach at the settings of its search.\n\n' + table(columns, rows)


def rule():
    """The rule in the words of rules.py."""
    return rules.__doc__[rules.__doc__.index('The rule.') :]


def write_page(out, page):
    """Put the verdicts, the flips table and the plots between the markers of docs/evidence.md."""
    text, report = page.read_text(), (out / 'results.md').read_text()
    begin = re.search('<!-- claims: .*-->', text)
    if not begin or END not in text:
        raise SystemExit(f'{page} has no markers {BEGIN} and {END}')
    verdict = report[report.index('| claim |') : report.index('A verdict on one claim')].splitlines(True)
    # of Ra-DPO one risk measure; the others: results.md
    verdict = ''.join(row for row in verdict if not re.match(r'\| Ra-DPO. (?!CVaR 0.98)', row))
    flips = report[report.index('| flipped labels |') : report.index('Accuracy\n\n|')]
    first, size = text[: begin.start()], re.search(r'\d+ of \d+ trials, seeds \d+(, \d+)*', report)
    plots = '![gold reward under flipped labels](../experiments/claims/record/flips.png)\n![reward against KL](../experiments/claims/record/frontier.png)\n\n'
    body = f'{verdict}{plots}Gold reward under flipped labels (standard error over seeds; {size.group()}):\n\n{flips}'
    page.write_text(f'{first}{begin.group()}\n{body.rstrip()}\n{text[text.index(END) :]}')


def plot(grid, seeds, results, out):
    """flips.png: gold reward against flips; frontier.png: gold reward against KL. Without matplotlib: a sentence."""
    try:
        import matplotlib
    except ImportError:
        print('note: no plots without matplotlib (pip install matplotlib)')
        return
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    plot_flips(plt, grid, seeds, results, out / 'flips.png')
    plot_frontier(plt, grid, seeds, results, out / 'frontier.png')


def points(trials, results, metric):
    """(mean, standard error) of a metric over the trials that are there, or None."""
    values = [r[metric] for r in (results.get(key(t)) for t in trials) if r and 'error' not in r]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return (statistics.mean(values), error) if values else None


def plot_flips(plt, grid, seeds, results, path):
    """Gold reward and accuracy of every method against the share of flipped labels."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    titles = {'gold': 'gold reward', 'accuracy': 'accuracy on clean held-out pairs'}
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for method in FLIPS:
            found = []
            for rate in grid.rates:
                point = points([grid.flips(method, rate, seed) for seed in seeds], results, metric)
                if point:
                    found.append((100 * rate, *point))
            if found:
                axis.errorbar(*zip(*found, strict=True), marker='o', markersize=4, capsize=3, label=name_of(method))
        axis.set(xlabel='flipped labels, %', title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_frontier(plt, grid, seeds, results, path):
    """Gold reward against KL, a line a method."""
    figure, axis = plt.subplots(figsize=(8, 5.5))
    colours = plt.get_cmap('tab20').colors
    lines = {'dpo': ':', 'tdpo': '-.', 'radp': '--'}
    for i, method in enumerate((*grid.frontier, *grid.online)):
        trials = [[grid.pull(method, strength, seed) for seed in seeds] for strength in grid.pulls(method)]
        there = [t for t in trials if points(t, results, 'kl')]
        found = sorted((points(t, results, 'kl')[0], *points(t, results, 'gold')) for t in there)
        if found:
            style = {'linestyle': lines.get(method[:4], '-'), 'marker': 's' if method in ONLINE else 'o'}
            style |= {'markersize': 4, 'capsize': 2, 'color': colours[i % 20], 'label': name_of(method)}
            axis.errorbar(*zip(*found, strict=True), **style)
    start = points([grid.reference(seed) for seed in seeds], results, 'gold')
    if start:
        axis.plot([0], [start[0]], 'k*', markersize=10, clip_on=False, label='SFT model')

    # KL grows with the square of the distance, so the axis is its root
    axis.set_xscale('function', functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    axis.set_xlim(left=0)
    axis.set(xlabel='KL(policy || SFT model), nats an answer (square-root axis)', ylabel='gold reward')
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
