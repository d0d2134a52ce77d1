"""The trials that experiments/claims makes. A trial is described in trial.py.

Like for like: both sides have the same beta, learning rate, pairs and flips, and differ in the one thing that the paper changes. Both tuned:
each side has the best of twelve settings, its own options (beta', a) included, for the very metric of the claim, on a seed that is not
reported. The score is the gold reward minus PRICE times the KL to the SFT model.
"""

import itertools
import json
from functools import partial
from types import SimpleNamespace

SEARCH_SEED = 0
PRICE = 0.25  # gold reward that a nat of KL costs
FLIPS = (0.0, 0.4)  # cDPO and robust DPO are told the true share
METHODS = {
    'dpo': {'loss': 'dpo'},
    # like for like, under flips; 'dpo quarter' is DPO at a quarter of the beta
    'drdpo 1': {'loss': 'drdpo', 'beta_prime': 1.0},
    'drdpo 4': {'loss': 'drdpo', 'beta_prime': 4.0},
    'dpo quarter': {'loss': 'dpo'},
    'cdpo': {'loss': 'cdpo', 'label_smoothing': 0.4},
    'robust': {'loss': 'robust', 'label_smoothing': 0.4},
    # over beta, on pairs of mixed gap
    'beta_dpo': {'loss': 'beta_dpo', 'rho': 0.2, 'a': 0.6},
    # reward against KL
    'tdpo1': {'loss': 'tdpo1'},
    'tdpo2': {'loss': 'tdpo2', 'alpha': 0.5},
    'radpo1': {'loss': 'radpo1', 'risk': 'cvar', 'mu': 0.98},
    'radpo2': {'loss': 'radpo2', 'risk': 'cvar', 'mu': 0.98, 'alpha': 0.5},
    # good to bad answers; the weights keep both sides' sums equal, as the KTO paper advises; a batch of 128 answers is one of 64 pairs
    'kto 1:1': {'loss': 'kto', 'batch_size': 128},
    'kto 1:4': {'loss': 'kto', 'batch_size': 128, 'frac_good': 0.25, 'w_good': 4.0},
    'kto 1:10': {'loss': 'kto', 'batch_size': 128, 'frac_good': 0.1, 'w_good': 10.0},
    'simpo': {'loss': 'simpo', 'gamma': 0.5},
    'orpo': {'loss': 'orpo'},
    'ppo': {'loss': 'ppo', 'n_examples': 4096, 'ppo_epochs': 2, 'lr': 1e-3},
    'grpo': {'loss': 'grpo', 'n_examples': 4096, 'ppo_epochs': 2, 'lr': 1e-3, 'group_size': 8},
}
ONLINE = ('ppo', 'grpo')

# the searches: metrics to choose by, pairs, options that stay, and axes whose product is twelve settings
LRS = (1e-4, 3e-4, 1e-3)
NOISE = {'noise_rate': FLIPS[-1]}
WIDE, BOTH = ('accuracy', 'score'), {'beta': (0.1, 0.3, 1.0, 3.0), 'lr': LRS}
SEARCHES = {
    'flips dpo': (WIDE, 'all', METHODS['dpo'] | NOISE, BOTH),
    'flips drdpo': (WIDE, 'all', {'loss': 'drdpo'} | NOISE, {'beta': (0.3, 3.0), 'beta_prime': (1.0, 4.0), 'lr': LRS}),
    'flips cdpo': (('score',), 'all', METHODS['cdpo'] | NOISE, BOTH),
    'flips robust': (('score',), 'all', METHODS['robust'] | NOISE, BOTH),
    'flips ipo': (('score',), 'all', {'loss': 'ipo', 'average': False} | NOISE, {'beta': (0.03, 0.1, 0.3, 1.0), 'lr': LRS}),
    'mixed dpo': (('score',), 'mixed', METHODS['dpo'], BOTH),
    'mixed beta_dpo': (('score',), 'mixed', {'loss': 'beta_dpo', 'rho': 0.2}, {'beta': (0.1, 1.0), 'a': (0.1, 0.6), 'lr': LRS}),
    'clean dpo': (('score',), 'all', METHODS['dpo'], BOTH),
    'clean kto': (('score',), 'all', METHODS['kto 1:1'], BOTH),
    'clean simpo': (('score',), 'all', METHODS['simpo'], {'beta': (3.0, 10.0, 30.0, 100.0), 'lr': LRS}),
    'clean orpo': (('score',), 'all', METHODS['orpo'], {'lam': (0.3, 1.0, 3.0, 10.0), 'lr': LRS}),
}  # fmt: skip

NAMES = {'drdpo 1': "Dr. DPO (beta' 1)", 'drdpo 4': "Dr. DPO (beta' 4)", 'dpo quarter': 'DPO at beta / 4', 'drdpo': 'Dr. DPO', 'beta_dpo': 'beta-DPO',
         'dpo': 'DPO', 'cdpo': 'cDPO', 'robust': 'robust DPO', 'ipo': 'IPO', 'ppo': 'PPO', 'grpo': 'GRPO', 'simpo': 'SimPO', 'orpo': 'ORPO',
         'tdpo1': 'TDPO1', 'tdpo2': 'TDPO2', 'radpo1': 'Ra-DPO1 (CVaR 0.98)', 'radpo2': 'Ra-DPO2 (CVaR 0.98)'}  # fmt: skip


def name_of(method):
    """Return a method's name as papers write it."""
    return NAMES.get(method) or method.replace('kto', 'KTO')


def key(trial):
    """Return the identity of a trial, without its results. Rows of before 2026-11-26 have no sft: they belong to other models."""
    return json.dumps({k: trial.get(k) for k in ('script', 'data', 'sft', 'seed', 'options')}, sort_keys=True)


def value(result, metric):
    """Return one metric of a result. The score is the gold reward minus the price of the KL."""
    return result['gold'] - PRICE * result['kl'] if metric == 'score' else result[metric]


def make(seed, options, cut=1, data='all'):
    """Return a trial. options None: the SFT model itself. cut: train on 1 / cut of the examples."""
    trial = {'script': 'dpo.py', 'data': data, 'sft': seed, 'seed': seed, 'options': options}
    if options is None:
        return trial | {'script': None, 'data': None}
    if options['loss'] in ONLINE:
        options = options | {'n_examples': options['n_examples'] // cut}
        return trial | {'script': 'ppo.py', 'data': 'toy', 'options': options}
    if cut > 1:
        trial['options'] = options | {'n_examples': 2560 // cut}
    return trial


def search_trials(name):
    """Return the twelve trials of a search, on the seed that is not reported."""
    _, data, fixed, axes = SEARCHES[name]
    settings = itertools.product(*axes.values())
    return [make(SEARCH_SEED, fixed | dict(zip(axes, values, strict=True)), data=data) for values in settings]


def best_of(name, results):
    """Return {metric: {option: value}} of the best trials of a finished search. results: key of a trial -> result."""
    metrics, _, _, axes = SEARCHES[name]
    done = [row for trial in search_trials(name) if 'error' not in (row := results[key(trial)])]
    best = {metric: max(done, key=partial(value, metric=metric)) for metric in metrics}
    return {metric: {option: row['options'][option] for option in axes} for metric, row in best.items()}


FULL = {
    'like': ('dpo', 'drdpo 1', 'drdpo 4', 'dpo quarter', 'cdpo', 'robust'), 'like_betas': (0.1, 1.0), 'like_lrs': (1e-4, 3e-4, 1e-3),
    'mixed_betas': (0.03, 0.1, 0.3, 1.0), 'mixed_lr': 3e-4,
    'frontier': ('dpo', 'tdpo1', 'tdpo2', 'radpo1', 'radpo2'), 'frontier_betas': (0.5, 1.0, 4.0), 'frontier_lr': 1e-3,
    'others': ('dpo', 'kto 1:1', 'kto 1:4', 'kto 1:10', 'simpo', 'orpo'), 'online': ONLINE, 'kl_coefs': (0.15, 0.5, 1.5),
    'cut': 1,  # train on 1 / cut of the examples
}  # fmt: skip
QUICK = FULL | {
    'like': ('dpo', 'drdpo 1'), 'like_betas': (0.1,), 'like_lrs': (1e-3,), 'mixed_betas': (0.1, 1.0),
    'frontier': ('dpo', 'tdpo2'), 'frontier_betas': (0.5, 4.0), 'others': ('dpo', 'kto 1:1', 'simpo'), 'online': (), 'cut': 2,
}  # fmt: skip


class Grid(SimpleNamespace):
    """The trials of a grid, by what they are for: Grid(settings=search -> metric -> {option: value} found, **FULL), or QUICK."""

    def cells(self):
        """Return all (beta, lr) of the comparisons at equal settings."""
        return list(itertools.product(self.like_betas, self.like_lrs))

    def equal(self, method, beta, lr, flips, seed):
        """Return a trial at this beta and lr. 'dpo quarter' trains with a quarter of this beta."""
        options = METHODS[method] | {'beta': beta, 'lr': lr}
        if method == 'dpo quarter':
            options['beta'] = beta / 4
        if flips:
            options['noise_rate'] = flips
        return make(seed, options, self.cut)

    def mixed(self, method, beta, seed):
        """Return a trial of beta-DPO or DPO on pairs of mixed gap."""
        return make(seed, METHODS[method] | {'beta': beta, 'lr': self.mixed_lr}, self.cut, 'mixed')

    def pull(self, method, strength, seed):
        """Return the trial of a point on a frontier. strength: beta for losses on pairs, kl_coef online."""
        options = {'beta': strength, 'lr': self.frontier_lr}
        if method in ONLINE:
            options = {'kl_coef': strength}
        return make(seed, METHODS[method] | options, self.cut)

    def pulls(self, method):
        return self.kl_coefs if method in ONLINE else self.frontier_betas

    def setting(self, name, metric):
        """Return what a search has found for a metric. KTO's is for all shares of good answers."""
        kind, method = name.split()[:2]
        return self.settings[f'{kind} {method}'][metric]

    def tuned(self, name, metric, seed):
        """Return the trial of a method ('flips drdpo', 'clean kto 1:4') at what its search has found for the metric."""
        kind, method = name.split(maxsplit=1)
        fixed = METHODS[method] if kind == 'clean' else SEARCHES[name][2]
        return make(seed, fixed | self.setting(name, metric), self.cut, 'mixed' if kind == 'mixed' else 'all')

    def trials(self, seeds):
        """Return all trials, each once, seed by seed: a run that is stopped early has whole seeds."""
        every = {}
        noisy = [name for name in SEARCHES if not name.startswith('clean')]
        tuned = [(name, metric) for name in noisy for metric in SEARCHES[name][0]]
        tuned += [(f'clean {method}', 'score') for method in self.others]
        for seed in seeds:
            trials = [make(seed, None)]
            for method in self.like:
                # cDPO and robust DPO believe in flips, so they are tried with flips only
                for flips in FLIPS[-1:] if method in ('cdpo', 'robust') else FLIPS:
                    trials += [self.equal(method, beta, lr, flips, seed) for beta, lr in self.cells()]
            trials += [self.equal('beta_dpo', beta, lr, 0.0, seed) for beta, lr in self.own_units()]
            for method in ('dpo', 'beta_dpo'):
                trials += [self.mixed(method, beta, seed) for beta in self.mixed_betas]
            for method in (*self.frontier, *self.online):
                trials += [self.pull(method, strength, seed) for strength in self.pulls(method)]
            trials += [self.tuned(name, metric, seed) for name, metric in tuned]
            every |= {key(trial): trial for trial in trials}
        return list(every.values())

    def own_units(self):
        """Return all (beta, lr) of beta-DPO in its own units: the smallest beta."""
        return [(min(self.like_betas), lr) for lr in self.like_lrs]
