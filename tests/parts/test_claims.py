"""The toy world has enough in it for claims to be about something; the rule of experiments/claims says what it says it does."""

import json
import math
import runpy
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

from configurator import UserError
from experiments.claims import __main__ as claims
from experiments.claims import grid as claims_grid
from experiments.claims import report as claims_report
from experiments.claims import rules as claims_rules
from experiments.claims import trial as claims_run
from experiments.claims.rules import HOLDS, NOT, OPEN
from hf import load
from text import toy

SETTINGS = {name: {'beta': 1.0, 'lr': 1e-3} for name in claims_grid.SEARCHES}
FULL = claims_grid.Grid(claims_grid.FULL, SETTINGS)

# ---- the toy world ----


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
    gaps = sorted(abs(claims_run.gap(p)) for p in pairs)
    assert gaps[400] < 0.2 < 0.5 < gaps[2000] < 1.0 < 1.5 < gaps[3600]  # deciles and median
    assert abs(statistics.correlation(gold, words)) < 0.03
    longer = [len(p['chosen'].split()) - len(p['rejected'].split()) for p in pairs]
    assert abs(statistics.correlation([claims_run.gap(p) for p in pairs], longer)) < 0.05
    right = statistics.mean(claims_run.gap(p) > 0 for p in pairs)
    assert 0.75 < right < 0.9  # labels are noisy, as a judge's are


def test_toy_prompts_matter_and_its_writers_are_imperfect():
    answers = [p['chosen'] for p in toy.pairs('train', 500)]
    scores = [[toy.gold(f'Review of the {place}:', a) for place in toy.PLACES] for a in answers]
    assert statistics.mean(len(set(s)) > 1 for s in scores) > 0.95
    assert statistics.mean(max(s) - min(s) for s in scores) > 0.5
    own = [toy.gold(p['prompt'], p['chosen']) for p in toy.pairs('train', 2000)]
    assert statistics.mean(own) < 0.5 < 1.5 == toy.gold('Review of the train:', ' the seat was very great .')


def test_training_pairs_of_a_kind():
    low, high = claims_run.training_pairs('low', 7, 200), claims_run.training_pairs('high', 7, 200)
    assert max(abs(claims_run.gap(p)) for p in low) < 0.5 and min(abs(claims_run.gap(p)) for p in high) > 1.2
    mixed = claims_run.training_pairs('mixed', 7, 200)
    assert sum(abs(claims_run.gap(p)) < 0.5 for p in mixed) == 100 and mixed != claims_run.training_pairs(
        'mixed', 8, 200
    )
    assert {abs(claims_run.gap(p)) > 1.2 for p in mixed[:20]} == {True, False}  # shuffled
    assert all(claims_run.gap(p) > 0 for p in claims_run.held_out_pairs())


# ---- the rule ----


@pytest.mark.parametrize(
    'differences, better, word',
    [
        ([0.10, 0.12, 0.11], True, HOLDS),  # 0.11 -+ 2.92 x 0.0058
        ([0.10, -0.10, 0.15], True, OPEN),
        ([0.01, 0.02, 0.0], True, NOT),  # 0.01 + 2.92 x 0.0058 is below 0.05
        ([-0.3, -0.2, -0.25], True, NOT),
        ([0.01, 0.012, 0.011], True, HOLDS),  # small, but surely there
        ([-0.01, 0.0, -0.02], False, HOLDS),  # as good as: surely not worse by 0.05
        ([-0.3, -0.2, -0.25], False, NOT),
        ([-0.06, 0.05, -0.1], False, OPEN),
        ([0.1, None, 0.1], True, OPEN),
        ([0.1], True, OPEN),
    ],
)
def test_verdict(differences, better, word):
    assert claims_rules.verdict(differences, 'gold', better) == word


def test_bounds_by_hand():
    """0, 1, 2: mean 1, standard deviation 1, error 1 / sqrt 3, times 2.92."""
    mean, error, lower, upper = claims_rules.bounds([0.0, 1.0, 2.0])
    assert (mean, error) == (1.0, pytest.approx(3**-0.5)) and [1 - lower, upper - 1] == pytest.approx(
        [2.92 / 3**0.5] * 2
    )


def test_above_compares_frontiers_where_both_are():
    """In sqrt(KL): ours rises from (1, 0.2) to (3, 0.6), theirs from (0, 0) to (2, 0.2): between 1 and 2 on average 0.15 more."""
    ours, theirs = [(9.0, 0.6), (1.0, 0.2)], [(0.0, 0.0), (4.0, 0.2)]
    assert [claims_rules.above(ours, theirs), claims_rules.above(theirs, ours)] == pytest.approx([0.15, -0.15])
    with pytest.raises(KeyError):
        claims_rules.above([(9.0, 0.6), (16.0, 0.7)], theirs)


def made_up(grid, seeds):
    """Results by formula: Dr. DPO keeps its reward under flips, robust does as DPO does, frontiers of TDPO2 and PPO are higher by 0.2."""
    results = {}
    for i, trial in enumerate(grid.trials(seeds)):
        o, noise = trial['options'] or {'loss': 'sft'}, 0.002 * math.sin(i)
        rate = o.get('noise_rate', 0.0) if o['loss'] != 'drdpo' else 0.0
        kl = 1 / o.get('beta', o.get('kl_coef', 1.0)) if trial['options'] else 0.0
        gold = 0.3 * kl**0.5 - rate + 0.2 * (o['loss'] in ('tdpo2', 'radpo2', 'ppo')) + noise
        results[claims_grid.key(trial)] = dict(
            trial, gold=gold, kl=kl, accuracy=0.9 - rate + noise, kl_chosen=kl, kl_rejected=kl * (0.5 if 'radpo' in o['loss'] else 1),
            well_formed=1.0, length=16.0, seconds=1.0, commit='abc', n_samples=8)  # fmt: skip
    return results


def test_report_of_made_up_results(tmp_path, capsys):
    results = made_up(FULL, [1, 2, 3])
    lost = claims_grid.key(FULL.other('orpo', 2))
    del results[lost]
    failed = claims_grid.key(FULL.other('simpo', 3))
    results[failed] = {
        k: results[failed][k] for k in ('script', 'data', 'seed', 'options', 'seconds', 'commit', 'n_samples')
    } | {'error': 'nan'}
    words = {claim.words: word for claim, word, _ in claims_report.verdicts(FULL, [1, 2, 3], results)}

    def said(start):
        found = [word for claim, word in words.items() if claim.startswith(start)]
        assert len(found) == 1, start
        return found[0]

    assert said('Dr. DPO is more accurate') == said('Dr. DPO is better') == said('Dr. DPO loses less') == HOLDS
    assert said('robust DPO is better') == said('cDPO is better') == NOT
    assert said('TDPO2 gets more reward than DPO') == HOLDS and said('TDPO1 gets more reward than DPO') == NOT
    assert said('Ra-DPO2 CVaR 0.98 gets more reward than TDPO2') == NOT
    assert said('Ra-DPO1 ERM 1 stays nearer to the reference than TDPO1') == HOLDS  # a quarter of the sum saved
    assert said('KTO with 1:10') == said('KTO is as good') == HOLDS
    assert said('SimPO') == said('ORPO') == OPEN
    assert said('PPO') == HOLDS and said('GRPO') == NOT
    claims_report.write(FULL, [1, 2, 3], results, tmp_path)
    text = (tmp_path / 'results.md').read_text()
    assert f'{len(results)} of {len(results) + 1} trials, seeds 1, 2, 3' in text and '1 trials failed' in text
    assert '1 failed' in text and '1 missing' in text and claims_rules.__doc__.splitlines()[-1] in text
    assert f'{HOLDS}: {sum(w == HOLDS for w in words.values())}' in text
    assert (tmp_path / 'flips.png').exists() == (tmp_path / 'frontier.png').exists()


def test_readme_gets_the_verdicts_and_nothing_else_changes(tmp_path):
    claims_report.write(FULL, [1, 2], made_up(FULL, [1, 2]), tmp_path)
    readme = tmp_path / 'README.md'
    readme.write_text(f'before\n{claims_report.BEGIN}\nstale\n{claims_report.END}\nafter\n')
    claims_report.write_page(tmp_path, readme)
    once = readme.read_text()
    claims_report.write_page(tmp_path, readme)
    assert once == readme.read_text() and 'stale' not in once
    assert (
        once.startswith('before\n')
        and once.endswith('\nafter\n')
        and '| Dr. DPO |' in once
        and 'ERM' not in once
        and f'**{HOLDS}**' in once
    )


def test_the_page_says_what_the_record_says(tmp_path):
    record, page = ROOT / 'experiments/claims/record', (ROOT / 'docs/evidence.md').read_text()
    if not (record / 'results.jsonl').exists():
        pytest.skip('no record yet')
    (tmp_path / 'evidence.md').write_text(page)
    claims_report.write_page(record, tmp_path / 'evidence.md')
    assert (tmp_path / 'evidence.md').read_text() == page


def test_trials_are_whole_seeds_and_each_is_there_once():
    trials = FULL.trials([1, 2])
    assert len({claims_grid.key(t) for t in trials}) == len(trials) and len(trials) % 2 == 0
    assert [t['seed'] for t in trials] == sorted(t['seed'] for t in trials)
    assert all(len(claims_grid.search(name)) == 12 for name in claims_grid.SEARCHES)  # the same budget for all


# ---- running ----


def test_a_cut_line_is_taken_off(tmp_path):
    rows = [dict(t, gold=0.0) for t in FULL.trials([1])[:2]]
    file = tmp_path / 'results.jsonl'
    file.write_text(json.dumps(rows[0]) + '\n' + json.dumps(rows[1])[:-5])
    assert list(claims.read_results(file)) == [claims_grid.key(rows[0])]
    assert file.read_text() == json.dumps(rows[0]) + '\n'


def test_a_trial(tmp_path, monkeypatch):
    """From an untrained model: the reference itself has no KL; a trained one has; what a script refuses is recorded."""
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(claims_run, 'training_pairs', lambda kind, seed: list(toy.pairs(f'{kind} {seed}', 64)))
    model = tmp_path / 'sft' / 'model'
    load.load_model('toy').save_pretrained(model)
    toy.tokenizer().save_pretrained(model)
    same = claims_run.run_trial(FULL.reference(3), tmp_path, 12)
    assert same['kl'] == same['kl_chosen'] == 0 and -2.5 <= same['gold'] <= 1.5 and 0 < same['accuracy'] < 1
    trial = FULL.pull('tdpo2', 1.0, 3)
    moved = claims_run.run_trial(trial, tmp_path, 12)
    assert claims_grid.key(moved) == claims_grid.key(trial) and json.loads(json.dumps(moved)) == moved
    assert moved['kl'] > 0 and moved['kl_rejected'] > 0 and moved['commit'] and moved['seconds'] > 0
    again = claims_run.run_trial(trial, tmp_path, 12)
    assert {k: v for k, v in again.items() if 'seconds' not in k} == {
        k: v for k, v in moved.items() if 'seconds' not in k
    }
    refused = claims_run.run_trial(claims_grid.make(3, {'loss': 'nonsense'}), tmp_path, 12)
    assert 'loss must be one of' in refused['error'] and 'gold' not in refused


@pytest.mark.parametrize(
    'flag, sentence', [('--seeds=0 1', 'seed 0 has chosen'), ('--seeds=1 1', 'different'), ('--seed=1', 'seeds')]
)
def test_mistakes(flag, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['claims', flag, f'--out_dir={tmp_path}/out'])
    with pytest.raises(UserError, match=sentence):
        runpy.run_module('experiments.claims', run_name='__main__')
    assert not (tmp_path / 'out').exists()
