"""Which trials experiments/claims makes: every claim's methods, over flips, beta, pairs and seeds. A trial is described in trial.py.

Every method is run with its own parameters as published (below), and with the learning rate and beta (or what takes its place)
that gave the highest score among twelve settings on a seed that is not reported: the same budget for every method. The score is
the gold reward minus PRICE times the KL to the SFT model: what all these methods maximise, at one price for all. Where beta
itself is varied, every method has the same betas, at the learning rate of DPO.
"""

import itertools
import json

SEARCH_SEED = 0
PRICE = 0.25  # gold reward that a nat of KL costs
# Dr. DPO with its published beta' = 1; cdpo and robust believe in 20% flips, the middle of the grid
FLIPS = {
    'dpo': {'loss': 'dpo'},
    'cdpo': {'loss': 'cdpo', 'label_smoothing': 0.2},
    'robust': {'loss': 'robust', 'label_smoothing': 0.2},
    'ipo': {'loss': 'ipo', 'average': False},
    'drdpo': {'loss': 'drdpo'},
}
BETA = {'dpo': {'loss': 'dpo'}, 'beta_dpo': {'loss': 'beta_dpo', 'rho': 0.2, 'a': 0.6}}
RISKS = [('cvar', 0.95), ('cvar', 0.98), ('erm', 0.95), ('erm', 1.0)]  # cvar with mu = 1 is the KL: TDPO
FRONTIER = {'dpo': {'loss': 'dpo'}, 'tdpo1': {'loss': 'tdpo1'}, 'tdpo2': {'loss': 'tdpo2', 'alpha': 0.5}} | {
    f'{loss} {risk} {mu:g}': {'loss': loss, 'risk': risk, 'mu': mu} | ({'alpha': 0.5} if loss == 'radpo2' else {})
    for loss in ('radpo1', 'radpo2') for risk, mu in RISKS
}  # fmt: skip
# good to bad answers; the weights keep both sides' sums equal, as the KTO paper advises; a batch of 128 answers is one of 64 pairs
KTO = {
    f'kto 1:{n}': {'loss': 'kto', 'batch_size': 128} | ({'frac_good': 1 / n, 'w_good': float(n)} if n > 1 else {})
    for n in (1, 4, 10)
}
OTHERS = {'dpo': {'loss': 'dpo'}, **KTO, 'simpo': {'loss': 'simpo', 'gamma': 0.5}, 'orpo': {'loss': 'orpo'}}
ONLINE = {
    'ppo': {'loss': 'ppo', 'n_examples': 4096, 'ppo_epochs': 2},
    'grpo': {'loss': 'grpo', 'n_examples': 4096, 'ppo_epochs': 2, 'group_size': 8},
}

FULL = {'rates': (0.0, 0.1, 0.2, 0.3, 0.4), 'betas': (0.25, 0.5, 1.0, 2.0, 4.0), 'beta_kinds': ('low', 'high', 'mixed'),
        'frontier': tuple(FRONTIER), 'frontier_betas': (0.5, 1.0, 2.0, 4.0), 'others': tuple(OTHERS), 'online': tuple(ONLINE),
        'kl_coefs': (0.15, 0.5, 1.5), 'cut': 1}  # fmt: skip
QUICK = FULL | {
    'rates': (0.0, 0.4), 'betas': (0.5, 4.0), 'beta_kinds': ('mixed',), 'frontier': ('dpo', 'tdpo2', 'radpo2 cvar 0.98'),
    'frontier_betas': (0.5, 4.0), 'others': ('dpo', 'kto 1:1', 'kto 1:10', 'simpo', 'orpo'), 'kl_coefs': (0.5,), 'cut': 2,
}  # fmt: skip

# the twelve settings of each method's search: six strengths a factor of three apart, two learning rates
STRENGTHS = {
    'ipo': ('beta', (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)), 'simpo': ('beta', (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)),
    'orpo': ('lam', (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)), 'ppo': ('kl_coef', (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    'grpo': ('kl_coef', (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
}  # fmt: skip
DEFAULT = ('beta', (0.1, 0.3, 1.0, 3.0, 10.0, 30.0))
RATES = (3e-4, 1e-3)
SEARCHES = {f'flips {name}': FLIPS[name] | {'noise_rate': 0.2} for name in FLIPS} | {
    'clean dpo': OTHERS['dpo'], 'clean kto': KTO['kto 1:1'], 'clean simpo': OTHERS['simpo'], 'clean orpo': OTHERS['orpo'],
    'clean ppo': ONLINE['ppo'], 'clean grpo': ONLINE['grpo'],
}  # fmt: skip


NAMES = {'drdpo': 'Dr. DPO', 'beta_dpo': 'beta-DPO', 'dpo': 'DPO', 'cdpo': 'cDPO', 'robust': 'robust DPO', 'ipo': 'IPO',
         'ppo': 'PPO', 'grpo': 'GRPO', 'simpo': 'SimPO', 'orpo': 'ORPO', 'tdpo1': 'TDPO1', 'tdpo2': 'TDPO2'}  # fmt: skip


def name_of(method):
    """A method's name as papers write it: 'radpo1 cvar 0.98' is Ra-DPO1 CVaR 0.98, 'kto 1:4' KTO 1:4."""
    first, *rest = method.split()
    first = NAMES.get(first) or first.replace('radpo', 'Ra-DPO').replace('kto', 'KTO')
    return ' '.join([first, *rest]).replace('cvar', 'CVaR').replace('erm', 'ERM')


def key(trial):
    """What makes two trials the same: everything but the results."""
    return json.dumps({k: trial[k] for k in ('script', 'data', 'seed', 'options')}, sort_keys=True)


def score(result):
    """Gold reward minus the price of the KL."""
    return result['gold'] - PRICE * result['kl']


def make(seed, options, cut=1, data='all'):
    """A trial. cut: train on 1 / cut of the examples."""
    if options is None:
        return {'script': None, 'data': None, 'seed': seed, 'options': None}
    if options['loss'] in ONLINE:
        options = options | {'n_examples': options['n_examples'] // cut}
        return {'script': 'ppo.py', 'data': 'toy', 'seed': seed, 'options': options}
    return {
        'script': 'dpo.py',
        'data': data,
        'seed': seed,
        'options': options | ({'n_examples': 2560 // cut} if cut > 1 else {}),
    }


def search(name):
    """The twelve trials of a method's search, on the seed that is not reported."""
    method = name.split()[1]
    strength, values = STRENGTHS.get(method, DEFAULT)
    axes = itertools.product(values, RATES)
    return [make(SEARCH_SEED, SEARCHES[name] | {strength: value, 'lr': lr}) for value, lr in axes]


def found(name, results):
    """{strength, lr} of the best trial of a finished search. results: key -> result."""
    strength = STRENGTHS.get(name.split()[1], DEFAULT)[0]
    done = [results[key(trial)] for trial in search(name)]
    best = max((r for r in done if 'error' not in r), key=score)
    return {k: best['options'][k] for k in (strength, 'lr')}


class Grid:
    """The trials of a grid (FULL or QUICK), by what they are for. settings: name of a search -> {strength, lr}."""

    def __init__(self, grid, settings):
        self.__dict__.update(grid)
        self.settings, self.lr = settings, settings['clean dpo']['lr']

    def reference(self, seed):
        """The SFT model itself."""
        return make(seed, None)

    def flips(self, method, rate, seed):
        noise = {'noise_rate': rate} if rate else {}
        return make(seed, FLIPS[method] | self.settings[f'flips {method}'] | noise, self.cut)

    def beta(self, method, beta, kind, seed):
        return make(seed, BETA[method] | {'beta': beta, 'lr': self.lr}, self.cut, kind)

    def pull(self, method, strength, seed):
        """A point of the frontier: beta for losses on pairs, kl_coef online."""
        if method in ONLINE:
            return make(seed, ONLINE[method] | self.settings[f'clean {method}'] | {'kl_coef': strength}, self.cut)
        return make(seed, FRONTIER[method] | {'beta': strength, 'lr': self.lr}, self.cut)

    def pulls(self, method):
        return self.kl_coefs if method in ONLINE else self.frontier_betas

    def other(self, method, seed):
        return make(seed, OTHERS[method] | self.settings[f'clean {method.split()[0]}'], self.cut)

    def trials(self, seeds):
        """All of them, each once, seed by seed: what is there after an hour is whole seeds."""
        every = {}
        for seed in seeds:
            some = [self.reference(seed)]
            some += [self.flips(m, r, seed) for m in FLIPS for r in self.rates]
            some += [self.beta(m, b, k, seed) for m in BETA for k in self.beta_kinds for b in self.betas]
            some += [self.pull(m, x, seed) for m in (*self.frontier, *self.online) for x in self.pulls(m)]
            some += [self.other(m, seed) for m in self.others]
            every |= {key(trial): trial for trial in some}
        return list(every.values())
