"""python losses.py NAME: a loss is checked before it trains."""

import math
import re

import pytest
import torch
from helpers import LOSSES, parse, refused

import losses
from configurator import UserError
from runtime import objective
from tests import forks

OPTIONS = {'beta': 0.1, 'label_smoothing': 0.1, 'average': True, 'alpha': 0.5, 'w_good': 1.0, 'w_bad': 1.0, 'delta': 1.0, 'lam': 0.1,
           'gamma': 1.0, 'tau': 0.05, 'a': 0.6, 'rho': 0.2}  # fmt: skip


@pytest.mark.parametrize('name', LOSSES)
def test_every_loss_is_ready(name):
    """By hand: dpo at a margin of 5, beta 0.1, is L(0.5), with slopes -+ 0.1 S(-0.5)."""
    rows = objective.table(name, *objective.find(name, losses.LOSSES, losses.STATISTICS, OPTIONS), OPTIONS)
    assert all(math.isfinite(value) for row in rows for value in row)
    assert [row[0] for row in rows] == objective.MARGINS
    if name == 'dpo':
        assert rows[6] == pytest.approx((5, 0.474077, -0.0377541, 0.0377541), rel=1e-5)


# fmt: off
WRONG = [
    (lambda ratio_w, ratio_l, *, bta: ratio_w, "asks for 'bta', which is no option: declare it in dpo.py, as in bta = 1.0"),
    (lambda ratio_w, ratio_r, *, beta: ratio_w, "asks for the column 'ratio_r', and there are only those at the top of losses.py"),
    (lambda ratio_w, pi, *, beta: ratio_w, 'must ask for columns of pairs or of single answers, not for neither, nor both'),
    (lambda *, beta: torch.zeros(1), 'must ask for columns of pairs'),
]
# fmt: on


@pytest.mark.parametrize('fn, words', WRONG, ids=range(len(WRONG)))
def test_mistakes(fn, words):
    with pytest.raises(UserError, match=words):
        objective.find('mine', {'mine': fn}, {}, OPTIONS)


MISTAKES = [
    (lambda ratio_w: ratio_w.mean(), 'must return a number for each example, .9,., not tensor'),
    (lambda ratio_w: ratio_w.detach(), 'has no gradient: .* without detach'),
    (lambda ratio_w: undefined(ratio_w), "the loss mine fails: NameError: name 'undefined' is not defined"),  # noqa: F821
]


@pytest.mark.parametrize('fn, words', MISTAKES)
def test_mistakes_of_a_formula(fn, words, tmp_path, monkeypatch):
    """Told by losses.py and by dpo.py, before a model is loaded."""
    with pytest.raises(UserError, match=words):
        objective.table('mine', fn, None, OPTIONS)
    monkeypatch.setitem(losses.LOSSES, 'mine', fn)
    sentence = refused('dpo.py', '--loss=mine', '--model=nowhere', '--data=nowhere', f'--out_dir={tmp_path}/run')
    assert re.search(words, sentence) and not (tmp_path / 'run').exists()


# a loss, whether it compares pairs, and whether it asks for the divergence
NEW = [
    (lambda pi_l, n_l: -(pi_l / n_l), True, False),
    (lambda ratio_l, div_l: ratio_l + div_l, True, True),
    (lambda ratio, div, *, beta: beta * ratio * div, False, True),
]


@pytest.mark.parametrize('fn, paired, has_divergence', NEW, ids=range(len(NEW)))
def test_any_column_says_what_a_loss_asks_for(fn, paired, has_divergence, monkeypatch):
    config = parse('dpo.py --loss=mine', monkeypatch)
    found = objective.objective_of(config, losses.LOSSES | {'mine': fn}, losses.STATISTICS)
    assert (found.paired, found.has_divergence, found.needs_ref) == (paired, has_divergence, has_divergence)


def test_as_a_script():
    done = forks.python('losses.py', 'kto', '--beta=0.5')
    assert done.returncode == 0 and done.stdout.endswith('kto can train: python dpo.py --loss=kto\n')
    assert done.stdout.startswith('    margin         loss slope\n')
    # as dpo.py would call it: without label smoothing, and with no option that it does not use
    done = forks.python('losses.py', 'drdpo', '--beta=0.5')
    assert done.stdout.startswith('    margin         loss slope chosen  slope rejected\n')
    assert re.search('^ +0.0 +0.69315 +-0.25 +0.25$', done.stdout, re.M), done.stdout
    done = forks.python('losses.py', 'dpo', '--gamma=3')
    assert done.returncode == 2 and '--gamma has no effect: the loss dpo does not use it' in done.stderr
    done = forks.python('losses.py')
    assert done.returncode == 2 and done.stderr.startswith('error: name a loss: python losses.py dpo --beta=0.2')
    done = forks.python('losses.py', 'ktoo')
    assert done.returncode == 2 and done.stderr.startswith('error: loss must be one of dpo, ')
