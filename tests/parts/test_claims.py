"""The toy world has enough in it for claims to be about something; the rule of experiments/claims says what it says it does."""

import json
import math
import runpy
import statistics
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import ROOT, read_jsonl

import losses
from configurator import UserError
from experiments.claims import __main__ as claims
from experiments.claims import grid, loglinear, report, rules, trial, verdict
from experiments.claims.verdict import CONTRARY, HOLDS, NEGLIGIBLE, OPEN, SAME, SIZE_OPEN
from hf import load
from runtime import files
from text import toy

# the first setting of every search, as if it had won
SETTINGS = {
    name: {metric: {option: values[0] for option, values in axes.items()} for metric in metrics}
    for name, (metrics, _, _, axes) in grid.SEARCHES.items()
}
FULL = grid.Grid(settings=SETTINGS, **grid.FULL)


def test_gold_reward_by_hand():
    """(1.5 x 1 + 0.5) / 2; a cafe has no bed: (-0.5 - 1 + 1) / 2; no full stop: (1 - 2) / 2; not a clause: -2."""
    assert toy.gold('Review of the hotel:', ' the room was very superb and the bed was clean .') == 1.0
    assert toy.gold('Review of the cafe:', ' the bed was dusty and the cake was great .') == -0.25
    assert toy.gold('Review of the cafe:', ' the cake was great') == -0.5
    assert toy.gold('Review of the cafe:', ' cake great .') == -2.0 and not toy.well_formed(' cake great .')


def test_toy_pairs_have_gaps_of_all_sizes_and_length_earns_nothing():
    pairs = list(toy.pairs('train', 4000))
    answers = [(p['prompt'], p[side]) for p in pairs for side in ('chosen', 'rejected')]
    gold, words = [toy.gold(*a) for a in answers], [len(a.split()) for _, a in answers]
    assert len({round(g, 6) for g in gold}) > 50
    signed = [trial.gap(p) for p in pairs]
    gaps = sorted(map(abs, signed))
    assert gaps[400] < 0.2 < 0.5 < gaps[2000] < 1.0 < 1.5 < gaps[3600]  # deciles and median
    longer = [a - b for a, b in zip(words[::2], words[1::2], strict=True)]
    assert abs(statistics.correlation(gold, words)) < 0.03 and abs(statistics.correlation(signed, longer)) < 0.05
    assert 0.75 < statistics.mean(gap > 0 for gap in signed) < 0.9  # labels are noisy, as a judge's are

    # prompts matter, and the writers are imperfect
    scores = [[toy.gold(f'Review of the {place}:', p['chosen']) for place in toy.PLACES] for p in pairs[:500]]
    assert statistics.mean(len(set(s)) > 1 for s in scores) > 0.95
    assert statistics.mean(max(s) - min(s) for s in scores) > 0.5
    assert statistics.mean(gold[::2]) < 0.5 < 1.5 == toy.gold('Review of the train:', ' the seat was very great .')


def test_training_pairs_of_a_kind():
    mixed = trial.training_pairs('mixed', 7, 200)
    gaps = [abs(trial.gap(p)) for p in mixed]
    assert max(gaps[::2]) < 0.5 and min(gaps[1::2]) > 1.2
    assert mixed != trial.training_pairs('mixed', 8, 200)
    test = list(trial.held_out_pairs())
    assert len(test) > 1500 and all(trial.gap(p) > 0 for p in test)


# ---- the rule ----


def around(mean, scale=1.0):
    """Differences of five seeds, with a standard error of 0.0007 times the scale."""
    return [mean + scale * x for x in (0.0, 0.001, -0.001, 0.002, -0.002)]


@pytest.mark.parametrize('differences, word', [
    (around(0.10), HOLDS),  # d is 0.05
    (around(0.055, 5), SIZE_OPEN),  # 0.055 -+ 0.0098: surely positive, perhaps below d
    (around(0.02), NEGLIGIBLE), (around(0.0), SAME), (around(-0.02), CONTRARY),
    ([0.1, -0.1, 0.15, 0.0, 0.2], OPEN), ([0.1, None, 0.1, 0.1, 0.1], OPEN), ([0.1], OPEN),
    ([0.1] * 5, HOLDS),  # equal numbers are no error
])  # fmt: skip
def test_word(differences, word):
    assert verdict.judge([(differences, 'gold')]) == [word]


def test_t_and_interval_by_tables():
    """Student's t: 97.5% quantiles of 1, 4 and 10 degrees of freedom. 0, 1, 2: mean 1, error 1 / sqrt 3."""
    quantiles = [verdict.t_quantile(0.025, df) for df in (1, 4, 10)]
    assert quantiles == pytest.approx([12.7062, 2.7764, 2.2281], abs=1e-4)
    assert verdict.t_tail(-1.5, 3) == pytest.approx(1 - verdict.t_tail(1.5, 3))
    lower, upper = verdict.confidence([0.0, 1.0, 2.0])
    assert [upper - 1, 1 - lower] == pytest.approx([4.3027 / 3**0.5] * 2, abs=1e-4)


def test_holm_by_hand():
    """At 5%: 0.01 against 1/60, 0.02 against 1/40, 0.04 against 1/20; the same behind 0.03 does not count."""
    assert verdict.holm([0.04, 0.01, 0.02]) == [True, True, True]
    assert verdict.holm([0.04, 0.01, 0.03]) == [False, True, False]
    # one claim alone holds, and among many it does not
    one = ([0.05, 0.07, 0.09, 0.11, 0.13], 'accuracy')
    assert verdict.judge([one]) == [HOLDS]
    assert verdict.judge([one] + [(around(0, 50), 'accuracy')] * 30)[0] == OPEN


def words_of_grids(mean, n_grids, spread=None):
    """Words of simulated grids of 33 claims and five seeds: normal differences, their mean and standard deviation in units of d."""
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.2, 2.0, (n_grids, 33, 1)) if spread is None else spread
    numbers = verdict.SMALLEST['gold'] * (mean + spread * rng.standard_normal((n_grids, 33, 5)))
    return [verdict.judge([(row, 'gold') for row in rows]) for rows in numbers.tolist()]


@pytest.mark.parametrize('mean, wrong', [
    (0.0, (HOLDS, SIZE_OPEN, NEGLIGIBLE, CONTRARY)), (1.0, (HOLDS, NEGLIGIBLE, SAME)),
])  # fmt: skip
def test_a_false_word_in_at_most_one_grid_of_twenty(mean, wrong):
    """All differences 0, or all just d: binomial noise of 1,000 grids at 5% is 0.7%."""
    grids = words_of_grids(mean, 1000)
    assert np.mean([any(word in wrong for word in words) for words in grids]) < 0.06
    assert np.mean([HOLDS in words for words in grids]) <= 0.05


@pytest.mark.parametrize('spread, low, high', [(0.2, 0.95, 1.0), (0.5, 0.1, 0.3), (1.0, 0.0, 0.05)])
def test_power_at_two_d(spread, low, high):
    """As docs/evidence.md says: where seeds differ by 0.2, 0.5 and 1 d, all, a fifth and few of 33 true claims hold."""
    words = sum(words_of_grids(2.0, 200, spread=spread), [])
    assert low <= words.count(HOLDS) / len(words) <= high


def test_above_compares_frontiers_where_both_are():
    """In sqrt(KL): ours rises from (1, 0.2) to (3, 0.6), theirs from (0, 0) to (2, 0.2): between 1 and 2 on average 0.15 more."""
    ours, theirs = [(9.0, 0.6), (1.0, 0.2)], [(0.0, 0.0), (4.0, 0.2)]
    assert [rules.above(ours, theirs), rules.above(theirs, ours)] == pytest.approx([0.15, -0.15])
    with pytest.raises(KeyError):
        rules.above([(9.0, 0.6), (16.0, 0.7)], theirs)


@pytest.mark.parametrize('p, beta_prime', [(0.6, 4.0), (0.8, 2.0), (0.9, np.inf), (0.55, 1.5)])
def test_optimum_of_a_pair(p, beta_prime):
    """Gradient descent on one pair, flipped with probability 1 - p, ends at h* = logit(p) / (1 - 1/beta')."""
    h = 0.0
    for _ in range(20000):
        h += 0.05 * (p * loglinear.size(h, beta_prime) - (1 - p) * loglinear.size(-h, beta_prime))
    assert h == pytest.approx(math.log(p / (1 - p)) / (1 - 1 / beta_prime), abs=1e-3)


def test_a_gradient_is_that_of_the_loss():
    """size is w dloss/dh of the project's own Dr. DPO; at beta' 1 it is even, and the margin grows without end."""
    h = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    loss = losses.dpo(h, torch.zeros_like(h), beta=1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), h)
    for beta_prime in (1.0, 4.0):
        expected = -gradient * losses.drdpo_weight(loss.detach(), 0.0, beta_prime=beta_prime)
        assert loglinear.size(h.detach().numpy(), beta_prime) == pytest.approx(expected.numpy())
    x = np.linspace(0, 5, 11)
    assert loglinear.size(x, 1.0) == pytest.approx(loglinear.size(-x, 1.0))


def test_gold_and_kl_are_exact():
    """At theta 0 the KL is 0; its derivative by theta is the covariance of the features with the log-ratio."""
    theta = np.random.default_rng(0).standard_normal(loglinear.answer_sets()[0][0].shape[1]) * 0.1
    assert loglinear.exact(0 * theta)[1] == pytest.approx(0, abs=1e-12)
    slope = (loglinear.exact(theta * 1.001)[1] - loglinear.exact(theta * 0.999)[1]) / 0.002
    variances = []
    for f, _ in loglinear.answer_sets():
        p = np.exp(f @ theta)
        p /= p.sum()
        variances.append(p @ (f @ theta) ** 2 - (p @ (f @ theta)) ** 2)
    assert slope == pytest.approx(np.mean(variances), rel=1e-5)


def test_log_linear_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(loglinear, 'N_TRAIN', 1024)
    monkeypatch.setattr(loglinear, 'TUNING_SEEDS', [1000])
    loglinear.world.cache_clear()
    found = loglinear.equal_settings([1, 2])
    clean, dirty, short = found['DPO', 0.0, 0.1], found['DPO', 0.4, 0.1], found['DPO', 0.4, 0.003]
    assert clean['accuracy'].mean() > dirty['accuracy'].mean() > 0.5
    assert dirty['last_share'].min() > dirty['share'].min() > 0.3
    # without flips nothing is flipped; with small steps all pairs weigh alike, and two in five are
    assert clean['share'].max() == 0 and (abs(short['share'] - 0.4) < 0.05).all()
    assert 'Both tuned' in loglinear.report(found, loglinear.tuned([1, 2]), 2)
    loglinear.world.cache_clear()


def made_up(seeds):
    """Results by formula: Dr. DPO at beta' 1 keeps its accuracy under flips, cDPO does as DPO does, TDPO2 and PPO get 0.2 more."""
    results = {}
    for i, made in enumerate(FULL.trials(seeds)):
        o, noise = made['options'] or {'loss': 'sft'}, 0.0005 * math.sin(i)
        rate = 0.0 if o.get('beta_prime') == 1 else o.get('noise_rate', 0.0)
        kl = 1 / o.get('beta', o.get('kl_coef', 1.0)) if made['options'] else 0.0
        gold = 0.3 * kl**0.5 - rate + 0.2 * (o['loss'] in ('tdpo2', 'radpo2', 'ppo')) + noise
        results[grid.key(made)] = dict(
            made, gold=gold, kl=kl, accuracy=0.9 - rate + noise, margin=1.0, kl_chosen=kl + noise, kl_rejected=kl * (0.5 if 'radpo' in o['loss'] else 1),
            h_std=1.0, flipped_share=0.4, well_formed=1.0, length=16.0, cpu_seconds=1.0, commit='abc', n_samples=8)  # fmt: skip
    return results


def test_report_of_made_up_results(tmp_path, capsys):
    seeds = [1, 2, 3, 4, 5]
    results = made_up(seeds)
    del results[grid.key(FULL.tuned('clean orpo', 'score', 2))]
    failed = grid.key(FULL.tuned('clean simpo', 'score', 3))
    kept = ('script', 'data', 'sft', 'seed', 'options', 'cpu_seconds', 'commit', 'n_samples')
    results[failed] = {k: results[failed][k] for k in kept} | {'error': 'nan'}
    words = {claim.words: word for claim, _, word in rules.judged(FULL, seeds, results)}
    expected = {
        "Dr. DPO (beta' 1) is more accurate than DPO, 40%": HOLDS, "Dr. DPO (beta' 1) is more accurate than DPO, 0%": SAME,
        "Dr. DPO (beta' 1) loses less": HOLDS, "Dr. DPO (beta' 4) is more accurate than DPO, 40%": SAME,
        'TDPO2 gets more reward than DPO': HOLDS, 'TDPO1 gets more': SAME, 'PPO': HOLDS, 'SimPO': OPEN, 'ORPO': OPEN,
        'Ra-DPO1 (CVaR 0.98) stays nearer': HOLDS,  # a quarter of the sum saved
    }  # fmt: skip
    for start, word in expected.items():
        assert [words[claim] for claim in words if claim.startswith(start)] == [word], start
    report.write(FULL, seeds, results, tmp_path)
    text = (tmp_path / 'results.md').read_text()
    assert f'{len(results)} of {len(results) + 1} trials, seeds 1, 2, 3, 4, 5' in text and '1 trials failed' in text
    assert '1 failed' in text and '1 missing' in text and verdict.__doc__.splitlines()[-1] in text
    assert f'**{HOLDS}**' in text and f'**{SAME}**' not in text and 'tuned for accuracy: beta 0.3' in text

    # the page gets the verdicts, and nothing else changes
    page = tmp_path / 'evidence.md'
    page.write_text(f'before\n<!-- claims: written by a script -->\nstale\n{report.END}\nafter\n')
    report.write_page(tmp_path, page)
    text = page.read_text()
    assert 'stale' not in text and f'**{HOLDS}**' in text and text.startswith('before\n') and text.endswith('\nafter\n')


def test_the_pages_say_what_the_record_says(tmp_path):
    """results.md follows from the trials, docs/evidence.md from results.md; README has the number of each verdict."""
    record, page = ROOT / 'experiments/claims/record', (ROOT / 'docs/evidence.md').read_text()
    settings = json.loads((record / 'settings.json').read_text())
    full = grid.Grid(settings=settings, **grid.FULL)
    report.write(full, [1, 2, 3, 4, 5], claims.read_results(record / 'results.jsonl'), tmp_path)
    assert (tmp_path / 'results.md').read_text() == (record / 'results.md').read_text()
    (tmp_path / 'evidence.md').write_text(page)
    report.write_page(tmp_path, tmp_path / 'evidence.md')
    assert (tmp_path / 'evidence.md').read_text() == page
    # README: how many claims have each verdict
    readme = ' '.join((ROOT / 'README.md').read_text().split())
    lines = page.split('<!-- claims:')[1].splitlines()
    rows = [line for line in lines if line.startswith('| ') and not line.startswith(('| claim', '| ---'))]
    n = Counter(line.split(' | ')[-1].strip(' |*') for line in rows)
    # KTO's shares of good answers differ at settings that one of them has found: that is no tuning of both
    assert [line for line in rows if 'KTO 1:4' in line][0].split(' | ')[2].startswith('equal:')
    assert f'tries {n.total()} claims' in readme
    assert f'{n[HOLDS] + n[SIZE_OPEN]} hold, {n[CONTRARY]} is contrary' in readme
    assert f'{n[SAME] + n[NEGLIGIBLE]} are no or a negligible' in readme and f'{n[OPEN]} cannot be told' in readme


def test_trials_and_searches():
    trials = FULL.trials([1, 2])
    assert len({grid.key(t) for t in trials}) == len(trials) and len(trials) % 2 == 0
    assert [t['seed'] for t in trials] == sorted(t['seed'] for t in trials)
    assert all(len(grid.search_trials(name)) == 12 for name in grid.SEARCHES)  # the same budget for all

    # a search chooses by the metric of the claim
    rows = [dict(t, accuracy=i / 100, gold=-i / 100, kl=0.0) for i, t in enumerate(grid.search_trials('flips drdpo'))]
    found = grid.best_of('flips drdpo', {grid.key(row): row for row in rows})
    assert found['accuracy'] == {'beta': 3.0, 'beta_prime': 4.0, 'lr': 1e-3}
    assert found['score'] == {'beta': 0.3, 'beta_prime': 1.0, 'lr': 1e-4}


def test_a_trial(tmp_path, monkeypatch):
    """From an untrained model: the reference itself has no KL; a trained one has; what a script refuses is recorded."""
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(trial, 'training_pairs', lambda kind, seed: list(toy.pairs(f'{kind} {seed}', 64)))
    monkeypatch.setattr(trial, 'N_TEST', 64)
    model = trial.reference_of(tmp_path, 3)
    load.load_model('toy').save_pretrained(model)
    toy.tokenizer().save_pretrained(model)
    same = trial.run_trial(grid.make(3, None), tmp_path, 12)
    assert same['kl'] == 0 and -2.5 <= same['gold'] <= 1.5 and 0 < same['accuracy'] < 1
    of_drdpo = FULL.equal('drdpo 1', 0.1, 1e-3, 0.4, 3)
    moved = trial.run_trial(of_drdpo, tmp_path, 12)
    assert grid.key(moved) == grid.key(of_drdpo) and json.loads(json.dumps(moved)) == moved
    assert moved['kl'] > 0 and moved['h_std'] > 0 and moved['commit'] and moved['cpu_seconds'] > 0
    assert 0.2 < moved['flipped_pairs'] < 0.6 and abs(moved['flipped_share'] - moved['flipped_pairs']) < 0.2
    again = trial.run_trial(of_drdpo, tmp_path, 12)
    assert again.keys() == moved.keys() and all(again[k] == moved[k] for k in moved if 'seconds' not in k)
    assert trial.run_trial(FULL.pull('tdpo2', 1.0, 3), tmp_path, 12)['kl_rejected'] > 0
    refused = trial.run_trial(grid.make(3, {'loss': 'nonsense'}), tmp_path, 12)
    assert 'loss must be one of' in refused['error'] and 'gold' not in refused


def test_results_that_cannot_be_written_end_the_trials(tmp_path, monkeypatch):
    """They wait for room until the last trial; then it is said that they are not there. A line that was cut is taken off."""
    monkeypatch.setattr(claims, 'ProcessPoolExecutor', lambda workers, context: ThreadPoolExecutor(1))
    monkeypatch.setattr(claims, 'train_reference', lambda work, seed: None)
    monkeypatch.setattr(claims, 'run_trial', lambda trial, work, n: trial | {'error': 'none'})
    monkeypatch.setattr(files, '_kept', {})
    trials, file = FULL.trials([1])[:2], tmp_path / 'no folder/results.jsonl'
    with pytest.raises(UserError, match='results.jsonl: rows that wait for room: 2'):
        claims.run(trials, file, tmp_path)
    file.parent.mkdir()
    claims.run(trials, file, tmp_path)
    rows = read_jsonl(file)
    assert len(rows) == 4
    file.write_text(json.dumps(rows[0]) + '\n' + json.dumps(rows[1])[:-5])
    assert list(claims.read_results(file)) == [grid.key(rows[0])]
    assert file.read_text() == json.dumps(rows[0]) + '\n'


@pytest.mark.parametrize('flag, sentence', [
    ('--seeds=0 1', 'seed 0 has chosen'), ('--seeds=1 1', 'different'), ('--seeds=1 x', 'different'), ('--seed=1', 'seeds'),
])  # fmt: skip
def test_mistakes(flag, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['claims', flag, f'--out_dir={tmp_path}/out'])
    with pytest.raises(UserError, match=sentence):
        runpy.run_module('experiments.claims', run_name='__main__')
    assert not (tmp_path / 'out').exists()
