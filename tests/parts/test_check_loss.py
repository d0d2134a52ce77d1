"""python losses.py NAME: a loss is checked before it trains."""

import math
import re

import pytest
import torch
from helpers import LOSSES, ROOT, parse, read_jsonl, refused, run_script, sentence, write_jsonl
from ties import same_runs

import losses
from configurator import UserError
from runtime import metrics, objective
from runtime.objective import MARGINS, objective_of, try_out
from tests import forks


@pytest.mark.parametrize('name', LOSSES)
def test_every_loss_is_ready(name, monkeypatch):
    """By hand: dpo at a margin of 5, beta 0.1, is L(0.5), with slopes -+ 0.1 S(-0.5)."""
    found = objective_of(parse(f'dpo.py --loss={name}', monkeypatch), losses.LOSSES, losses.STATISTICS)
    rows = try_out(found)
    assert all(math.isfinite(value) for row in rows for value in row)
    assert [row[0] for row in rows] == MARGINS == [-margin for margin in reversed(MARGINS)]
    assert found.call(lambda ratio_w: ratio_w, {'pi_w': 2.0}) == 2  # no reference
    if name == 'dpo':
        assert rows[6] == pytest.approx((5, 0.474077, -0.0377541, 0.0377541), rel=1e-5)


# fmt: off
@pytest.mark.parametrize('fn, words', [
    (lambda ratio_w, ratio_l, *, bta: ratio_w, "asks for 'bta', which is no option: add bta = 1.0 to dpo.py"),
    (lambda ratio_w, ratio_r, *, beta: ratio_w, "asks for the column 'ratio_r', and there are only those at the top of losses.py"),
    (lambda ratio_w, pi, *, beta: ratio_w, 'must ask for columns of pairs, or for those of single answers'),
    (lambda *, beta: torch.zeros(1), 'must ask for columns of pairs'),
    (lambda ratio_w: ratio_w.mean(), 'must return a number for each example, .9,., and .1,. of one alone, not tensor'),
    *((fn, 'must return a number for each example') for fn in (lambda ratio_w: ratio_w.squeeze(), lambda ratio_w: [ratio_w])),
    (lambda ratio_w: ratio_w.detach(), 'has no gradient: .* without detach'),
    (lambda ratio_w: undefined(ratio_w), "the loss mine fails: NameError: name 'undefined' is not defined"),  # noqa: F821
    # a mean, a rank, the number of examples, chance: other ones on two ranks, or in two microbatches
    *((fn, 'depends on others of its microbatch, or on chance: what it needs of the whole step belongs into a function of STATISTICS')
      for fn in (lambda ratio_w: ratio_w - ratio_w.mean().detach(), lambda ratio_w: ratio_w * ratio_w.argsort(),
                 lambda ratio_w: ratio_w / len(ratio_w), lambda ratio_w: ratio_w * torch.rand(len(ratio_w)))),
    # dpo.py's gamma is 1
    (lambda ratio_w, *, gamma=0.5: gamma * ratio_w, "has a default for 'gamma', as has dpo.py: set the option instead"),
])
# fmt: on
def test_mistakes_are_told_before_a_model_is_loaded(fn, words, tmp_path, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, 'mine', fn)
    sentence = refused('dpo.py', '--loss=mine', '--model=nowhere', '--data=nowhere', f'--out_dir={tmp_path}/run')
    assert re.search(words, sentence) and not (tmp_path / 'run').exists()


def centred(ratio_w, ratio_l, center, *, beta):
    return losses.dpo(ratio_w - center, ratio_l, beta=beta)


# fmt: off
@pytest.mark.parametrize('statistic, words', [
    (lambda ratio_w, state, generator, *, kappa: ({}, state), "asks for 'kappa', which is no option"),
    (lambda ratio_kl, state, generator: ({}, state), 'compares pairs, and its statistic asks for ratio_kl'),
    (lambda ratio_w, state, generator: ({'center': ratio_w.mean()}, {'m': ratio_w.mean()}), 'must be a dict of numbers, such as'),
    (lambda ratio_w, state, generator: ({'center': ratio_w[:2]}, state), 'the loss mine fails: RuntimeError: The expanded size'),
    (lambda ratio_w, state, generator: {'center': ratio_w}, 'the loss mine fails: ValueError: not enough values'),
])
# fmt: on
def test_mistakes_of_a_statistic(statistic, words, monkeypatch):
    config = parse('dpo.py --loss=mine', monkeypatch)
    with pytest.raises(UserError, match=words):
        objective_of(config, losses.LOSSES | {'mine': centred}, {'mine': statistic})


def test_a_loss_with_a_statistic_of_its_own_trains(tmp_path, monkeypatch, capsys):
    """A number of the whole step will do for a column; and kto's statistic serves any loss that asks for its z. A weight of one's
    own has no gradient, and a metric may be a tensor."""
    weight, leaf, of_dpo = losses.drdpo_weight, torch.zeros(1, requires_grad=True), metrics.of_dpo
    monkeypatch.setattr(losses, 'drdpo_weight', lambda *columns, **keywords: weight(*columns, **keywords) * leaf.exp())
    monkeypatch.setattr(metrics, 'of_dpo', lambda *of: of_dpo(*of) | {'mine': torch.tensor(0.5)})
    mine = {'centred': centred, 'my_kto': lambda ratio, good, z, *, beta: losses.kto(ratio, good, z, beta=beta, w_good=2, w_bad=1)}
    center = lambda ratio_w, ratio_l, state, generator: ({'center': (ratio_w - ratio_l).mean()}, {'a': 1, 'b': 0.5})  # noqa: E731
    for name, statistic in (('centred', center), ('my_kto', losses.kto_statistic)):
        monkeypatch.setitem(losses.LOSSES, name, mine[name])
        monkeypatch.setitem(losses.STATISTICS, name, statistic)
        for size in (110, 4096):
            flags = f'--n_examples=24 --batch_size=12 --n_eval_examples=8 --max_tokens={size} --out_dir={tmp_path}/{name}-{size}'
            run_script('dpo.py', f'--loss={name}', '--beta_prime=2', '--lr=1e-3', '--warmup_steps=1', *flags.split())
        same_runs(*(tmp_path / f'{name}-{size}' for size in (110, 4096)), rel=5e-4, abs=5e-5)
    printed = capsys.readouterr().out
    assert 'loss 0.693147 (centred of a policy that is its reference: 0.693147)' in printed
    assert 'training centred, weighted as Dr. DPO, on 1 rank' in printed
    assert '(my_kto of a policy that is its reference: 0.' in printed and leaf.grad is None
    assert read_jsonl(tmp_path / 'centred-110/metrics.jsonl')[-1]['mine'] == 0.5


@pytest.mark.parametrize('fn, is_per_token', [
    (lambda ratio_w, ratio_l, n_w, n_l, *, beta: losses.dpo(ratio_w / n_w, ratio_l / n_l, beta=beta), True),
    # R-DPO: the difference of lengths is a penalty, and the rewards are sums
    (lambda ratio_w, ratio_l, n_w, n_l, *, beta: losses.dpo(ratio_w, ratio_l + n_l - n_w, beta=beta), False),
    (lambda ratio, n, *, beta, its_own=1.0: its_own * beta * ratio / n, True),
    *((losses.LOSSES[name], name in ('ipo', 'simpo', 'orpo', 'sigmoid_norm')) for name in LOSSES),
])  # fmt: skip
def test_rewards_are_per_token_where_the_loss_is(fn, is_per_token, monkeypatch):
    config = parse('dpo.py --loss=mine', monkeypatch)
    statistics = {'mine': losses.aot_statistic if fn is losses.aot else None}
    assert objective_of(config, losses.LOSSES | {'mine': fn}, statistics).is_per_token == is_per_token


def test_a_column_that_somebody_adds_is_tried(monkeypatch):
    """docs/code.md: its name goes into PAIRS. Here it is 0.3, a margin, too, and the log-probs of a margin of -1 are -20.51 and -19.51."""
    monkeypatch.setattr(objective, 'PAIRS', objective.PAIRS | {'tok_w', 'margin'})
    mine = objective.Objective('mine', lambda tok_w, margin, pi_l: tok_w - margin / 3 - pi_l, None, {}, {}, True, False, False, False)
    rows = try_out(mine)
    assert rows[3] == pytest.approx([-1, 0.2 + 19.51, 0, -1])


def test_a_loss_of_the_data_s_margins_trains(tmp_path, monkeypatch, capsys):
    """As docs/code.md says."""
    monkeypatch.setattr(objective, 'PAIRS', objective.PAIRS | {'margin'})
    monkeypatch.setitem(losses.LOSSES, 'mine', lambda ratio_w, ratio_l, margin, *, beta: losses.dpo(ratio_w, ratio_l + margin, beta=beta))
    script = (ROOT / 'dpo.py').read_text().replace("'pairs' if paired else 'singles'", "'pairs', margins=True")
    script = script.replace('    if not paired:\n        step_columns', "    step_columns['margin'] = step.labels['margin']\n    if not paired:\n        step_columns")
    (tmp_path / 'mine.py').write_text(script)
    data = write_jsonl(tmp_path / 'pairs.jsonl', [{'prompt': f'p{i}', 'chosen': 'a', 'rejected': 'b', 'margin': 3} for i in range(8)])
    run_script(tmp_path / 'mine.py', '--loss=mine', f'--data={data}', '--n_eval_examples=0', '--batch_size=4', f'--out_dir={tmp_path}/run')
    assert '0.854355 (mine of a policy that is its reference: 0.854355)' in capsys.readouterr().out  # -log sigmoid(-0.3)


@pytest.mark.parametrize('fn, paired, has_divergence', [
    (lambda pi_l, n_l: -(pi_l / n_l), True, False),
    (lambda ratio_l, div_l: ratio_l + div_l, True, True),
    (lambda ratio, div, *, beta: beta * ratio * div, False, True),
])  # fmt: skip
def test_any_column_says_what_a_loss_asks_for(fn, paired, has_divergence, monkeypatch):
    config = parse('dpo.py --loss=mine', monkeypatch)
    found = objective_of(config, losses.LOSSES | {'mine': fn}, losses.STATISTICS)
    assert (found.paired, found.has_divergence, found.needs_ref) == (paired, has_divergence, has_divergence)


@pytest.mark.parametrize('flags, per_token', [('dpo', False), ('simpo', True), ('ipo --average=true', True), ('ipo --average=false', False)])  # fmt: skip
def test_which_losses_are_per_token(flags, per_token, monkeypatch):
    config = parse(f'dpo.py --loss={flags}', monkeypatch)
    assert objective_of(config, losses.LOSSES, losses.STATISTICS).is_per_token == per_token


@pytest.mark.parametrize('flags, found', [
    ('kto --batch_size=2', {'label_smoothing': 0.0}), ('kto --batch_size=1', 'batch_size must be 2 or more'),
    ('cdpo', {'label_smoothing': 0.1}), ('cdpo --label_smoothing=0', {'label_smoothing': 0.0}), ('cdpo --label_smoothing=0.5', 'not 0.5'),
    ('exo --label_smoothing=0', 'exo: above 0'), ('exo --label_smoothing=0.4', {'label_smoothing': 0.4}),
    ('drdpo', {'beta_prime': 1.0, 'sft_coef': 0.0}), ('drdpo --beta_prime=2 --sft_coef=3', {'beta_prime': 2.0, 'sft_coef': 3.0}),
    ('radpo1 --mu=1', {'mu': 1.0}), ('radpo1 --mu=1.5', 'for the risk cvar, not 1.5'), ('radpo1 --risk=erm --mu=1.5', {'mu': 1.5}),
    ('simpo --cache_ref', '--cache_ref has no effect: there is no reference'), ('kto_zero --cache_ref', {'cache_ref': True}),
    *((f'{name} --cache_ref', 'needs the live reference') for name in ('kto', 'tdpo1')),
    (f'dpo {ROOT}/config/cdpo_toy.py', {'label_smoothing': 0.0}),  # the file has 0.1
    ('dpo --importance_max=3', 'importance_max has no effect: importance is off'),
    ('dpo --importance --reference_free', 'leave out --reference_free'), ('dpo --importance', {'importance': True}),
    *((words, 'has no effect: the loss ') for words in ('dpo --frac_good=0.5', 'tdpo1 --reference_free', 'simpo --reference_free')),
    ('kto --frac_good=0.5 --frac_bad=0.5', {'frac_good': 0.5}), ('kto --share_prefix=false', 'there is one answer to a prompt'),
    ('simpo --ref_model=x', '--ref_model has no effect: there is no reference'), ('robust', {'label_smoothing': 0.1}),
])  # fmt: skip
def test_options_of_a_loss(flags, found, monkeypatch):
    arguments = parse(f'dpo.py --loss={flags}', monkeypatch), losses.LOSSES, losses.STATISTICS
    if isinstance(found, str):
        assert found in sentence(objective_of, *arguments)
    else:
        assert found.items() <= objective_of(*arguments).options.items()


@pytest.mark.parametrize('words, status, printed', [
    ('kto --beta=0.5', 0, r'^    margin         loss slope\n(?s:.*)\nkto can train: python dpo.py --loss=kto\n$'),
    # as dpo.py would call it: without label smoothing, and with no option that it does not use
    ('drdpo --beta=0.5', 0, r'^    margin         loss slope chosen  slope rejected\n(?s:.*)\n +0.0 +0.69315 +-0.25 +0.25\n'),
    ('dpo --gamma=3', 2, '--gamma has no effect: the loss dpo does not use it'),
    ('dpo --lr=3', 2, '--lr has no effect: the table is of the loss alone'),
    # help lists what is not refused
    ('--help', 0, r'^python losses.py (?s:.*)\n\nloss\n(  --(beta|label_smoothing|average|rho|a|alpha|w_good|w_bad|delta|lam|gamma|tau) = .*\n){12}$'),
    ('', 2, '^error: name a loss: python losses.py dpo --beta=0.2'),
    ('ktoo', 2, "^error: loss must be one of dpo, .* not 'ktoo'; did you mean kto"),
    ('importance', 2, "kto_zero, not 'importance': the function importance of losses.py has to be in LOSSES to be one"),
])  # fmt: skip
def test_as_a_script(words, status, printed):
    done = forks.python('losses.py', *words.split())
    assert done.returncode == status and re.search(printed, done.stdout + done.stderr), done
