"""What the project says of itself: every command of the README and of the configs parses, imports keep to the layers."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import configure

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {'dpo.py', 'sft.py', 'reward.py', 'bench.py', 'sample.py', 'label.py', 'plot.py', 'ppo.py'}
README = (ROOT / 'README.md').read_text()
COMMANDS = [
    line.split('#')[0].strip() for block in re.findall(r'```sh\n(.*?)```', README, re.S) for line in block.splitlines()
]
CONFIGS = sorted((ROOT / 'config').glob('*.py'))


def parse(command, monkeypatch):
    """Resolve a command's options as its script would, without running it."""
    words = shlex.split(command)
    script = next(word for word in words if word in SCRIPTS)
    arguments = words[words.index(script) + 1 :]
    if script == 'plot.py':  # folders, not config files
        arguments = [word for word in arguments if word.startswith('-')]
    source = (ROOT / script).read_text()
    scope = {'__file__': str(ROOT / script), '__doc__': ''}
    for node in ast.parse(source).body:  # the constants alone
        if isinstance(node, ast.Assign | ast.AnnAssign):
            if isinstance(node.value, ast.Call):
                break
            exec(compile(ast.Module([node], []), script, 'exec'), scope)
    monkeypatch.chdir(ROOT)
    return configure(scope, arguments)


@pytest.mark.parametrize('command', [c for c in COMMANDS if c])
def test_readme_commands(command, monkeypatch, capsys):
    if command.startswith('make '):
        assert re.search(rf'^{command.split()[1]}:', (ROOT / 'Makefile').read_text(), re.M)
    elif command.startswith('sh '):
        script = ROOT / command.split()[1]
        assert subprocess.run(['sh', '-n', script]).returncode == 0
        assert set(re.findall(r'\w+\.py', script.read_text())) <= {path.name for path in ROOT.rglob('*.py')}
    elif '--help' in command:
        with pytest.raises(SystemExit) as end:
            parse(command, monkeypatch)
        assert end.value.code == 0 and '--beta_prime = None (float | None)' in capsys.readouterr().out
    else:
        assert parse(command, monkeypatch).get('batch_size', 1) > 0  # label.py has none


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_configs(path, monkeypatch):
    """Starts with what it reproduces and its command; that command parses; its out_dir is its own name."""
    text = path.read_text()
    comment = ''.join(line for line in text.splitlines(True) if line.startswith('#'))
    command = re.search(r'^#     (torchrun .*)$', comment, re.M).group(1)
    assert text.startswith('# ') and f'config/{path.name}' in command
    config = parse(command, monkeypatch)
    assert config['out_dir'] == f'out/{path.stem}'
    assert len(text.splitlines()) <= 20


def test_config_of_every_loss_that_papers_compare():
    names = {path.stem for path in CONFIGS}
    assert names >= {
        f'{x}_hh' for x in ('sft', 'dpo', 'drdpo', 'betadpo', 'tdpo', 'radpo', 'kto', 'ipo', 'cdpo', 'simpo')
    }
    assert names >= {'sft_toy', 'drdpo_toy', 'drdpo_hh_noise20', 'radpo_imdb', 'sft_imdb', 'sft_sharegpt'}


def test_papers_settings(monkeypatch):
    config = parse('dpo.py config/drdpo_hh_noise20.py', monkeypatch)
    paper = dict(batch_size=64, lr=5e-7, optimizer='RMSprop', warmup_steps=150, max_length=512, max_prompt_length=256)
    paper |= dict(beta=0.1, n_epochs=1, dtype='bfloat16', noise_rate=0.2, max_grad_norm=10.0)
    assert {k: config[k] for k in paper} == paper


@pytest.mark.parametrize('name', ['drdpo_hh', 'drdpo_hh_noise20', 'drdpo_toy'])
def test_dpo_with_the_config_of_drdpo_is_the_plain_baseline(name, monkeypatch):
    """beta' weights any loss when it is set, so these configs leave it to the loss."""
    from spec import Spec

    primes = [
        Spec(parse(f'dpo.py config/{name}.py --loss={x}', monkeypatch)).options['beta_prime'] for x in ('drdpo', 'dpo')
    ]
    assert primes == [1.0, None]


def test_readme_names_every_loss_and_every_dataset():
    import losses
    import sources

    table = README[README.index('| `--loss=` |') : README.index('On any loss on pairs')]
    assert set(losses.LOSSES) <= set(re.findall(r'`(\w+)`', table))
    known = README[README.index('Known: ') : README.index('any hub id')]
    assert {n.removeprefix('get_') for n in dir(sources) if n.startswith('get_')} == set(re.findall(r'\w+', known)) - {
        'Known'
    }


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition('.')[0])
    return names


def test_layers():
    """Libraries never import a script, scripts never one another, there is no cycle, and losses.py imports torch alone."""
    files = {path.stem: imports(path) for path in ROOT.glob('*.py')}
    scripts = {script.removesuffix('.py') for script in SCRIPTS}
    ours = {name: found & set(files) for name, found in files.items()}
    assert not any(found & scripts for found in ours.values())
    assert files['losses'] == files['risks'] == {'torch'}
    while ours:
        leaves = [name for name, found in ours.items() if not found]
        assert leaves, f'a cycle among {sorted(ours)}'
        ours = {name: found - set(leaves) for name, found in ours.items() if name not in leaves}


def test_a_new_loss_is_one_function_and_one_name(tmp_path, monkeypatch):
    """What the README says of adding a loss, done: the example of the README trains."""
    code = re.search(r'```python\n(def my_loss.*?)```', README, re.S).group(1)
    import losses

    scope = dict(vars(losses))
    exec(code, scope)
    monkeypatch.setitem(losses.LOSSES, 'my_loss', scope['my_loss'])
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path))
    flags = [
        '--loss=my_loss',
        '--beta=0.2',
        '--n_examples=16',
        '--batch_size=8',
        '--n_eval_examples=8',
        f'--out_dir={tmp_path}/run',
    ]
    monkeypatch.setattr(sys, 'argv', ['dpo.py', *flags])
    runpy.run_path(str(ROOT / 'dpo.py'), run_name='script')
    assert (tmp_path / 'run/model/model.safetensors').exists()


def test_speed_table(tmp_path):
    """The README's speeds are those of runs/speed.json; the same command writes them again."""
    (tmp_path / 'README.md').write_text(README.replace(' GB |', ' |').replace(' times as fast', ''))
    command = [
        sys.executable,
        ROOT / 'runs/speed.py',
        '--report',
        f'--readme={tmp_path / "README.md"}',
        f'--out={ROOT / "runs/speed.json"}',
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and 'head / trl' in done.stdout, done.stderr
    assert (tmp_path / 'README.md').read_text() == README
