"""What the project says of itself: every command of the README and of the configs parses, imports keep to the layers."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
from helpers import LOSSES, ROOT, RUN, parse, source_of, write_jsonl

import losses
from configurator import _declared
from runtime.objective import objective_of
from tests import forks

README = (ROOT / 'README.md').read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / 'README.md', *ROOT.glob('docs/*.md')]}
OURS = {name: text for name, text in PAGES.items() if name not in ('docs/moved.md', 'docs/coming-from.md')}
BLOCKS = [block for text in OURS.values() for block in re.findall(r'```sh\n(.*?)```', text, re.S)]
COMMANDS = sorted({line.split('#')[0].strip() for block in BLOCKS for line in block.splitlines()} - {''})
CONFIGS = sorted((ROOT / 'config').glob('*.py'))


@pytest.mark.parametrize('command', COMMANDS)
def test_commands(command, monkeypatch, capsys):
    """Every command of README and docs parses; scripts of experiments/ are there."""
    words = command.split()
    if command.startswith('make '):
        assert re.search(rf'^{words[1]}:', (ROOT / 'Makefile').read_text(), re.M)
    elif command.startswith(('sh ', 'sbatch ')):
        script = ROOT / next(word for word in words if word.endswith('.sh'))
        assert subprocess.run(['bash', '-n', script]).returncode == 0
    elif words[:2] == ['python', '-m'] and words[2].startswith('experiments.'):  # it has options of its own
        assert (ROOT / f'{words[2].replace(".", "/")}.py').exists()
    elif '--help' in command:
        with pytest.raises(SystemExit) as end:
            parse(command, monkeypatch)
        assert end.value.code == 0 and '--beta_prime = None (float | None)' in capsys.readouterr().out
    else:
        assert parse(command, monkeypatch).get('batch_size', 1) > 0  # label.py has none


def test_make_without_a_python_that_fits(tmp_path):
    """One sentence, and nothing is made: neither of these can make a .venv."""
    for name in 'python3 python3.14 python3.13 python3.12 python3.11'.split():
        (tmp_path / name).write_text('#!/bin/sh\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    for name in ('Makefile', 'requirements.txt'):
        shutil.copy(ROOT / name, tmp_path)
    paths = f'{tmp_path}:{os.environ["PATH"]}'
    done = subprocess.run(['make', 'setup'], cwd=tmp_path, env={'PATH': paths}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: nanopref needs Python 3.11 to 3.14, with venv: ')
    assert not (tmp_path / '.venv').exists()


def test_links():
    """Links between README, docs and files of the project lead somewhere, headings included; so do the names of modules. The
    front page is short."""
    assert len(README.splitlines()) <= 250 and len(README) <= 15_500
    for name, text in PAGES.items():
        for link in re.findall(r'\]\(([^)\s]+)\)', text):
            if link.startswith('http'):
                continue
            path, _, heading = link.partition('#')
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), f'{name}: {link}'
            headings = re.findall(r'^#+ (.*)$', target.read_text(), re.M) if heading else ['']
            assert heading in [re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings], f'{name}: {link}'
    for name, text in OURS.items():
        for path in re.findall(r'`((?:text|hf|runtime|feedback|rl|tools|experiments|tests|config)/[\w/.]+)`', text):
            assert (ROOT / path).exists(), f'{name}: {path}'
        for module in re.findall(r'python -m ((?:tools|experiments|feedback)[\w.]*)', text):
            path = ROOT / module.replace('.', '/')
            assert path.with_suffix('.py').exists() or (path / '__main__.py').exists(), f'{name}: {module}'


def test_the_guide_to_the_code_fits_it():
    """Files have the lines that docs/code.md says, within a tenth, and the functions that it names after them."""
    guide = PAGES['docs/code.md']
    for path, lines in re.findall(r'^\| `([\w/.]+)` \| (\d+) \|', guide, re.M):
        assert len((ROOT / path).read_text().splitlines()) == pytest.approx(int(lines), rel=0.1), path
    named = re.findall(r'`([\w/]+\.py)` `(\w+)`', guide) + re.findall(r'`(\w+)` in `([\w/]+\.py)`', guide)
    named += [(path, name) for path, cell in re.findall(r'^\| `([\w/.]+)` \| \d+ \| (.*) \|$', guide, re.M)
              for name in re.findall(r'`(\w+)`', cell)]  # fmt: skip
    assert len(named) > 25
    for pair in named:
        name, path = sorted(pair, key=lambda word: word.endswith('.py'))
        assert re.search(rf'(def|class) {name}\b', (ROOT / path).read_text()), f'{path} has no {name}'


def test_options_exist():
    """Every --option that README and docs name is one of a script, or of another program."""
    known = {name for script in (*RUN, 'training.py') for name in _declared(source_of(script))}
    others = set('help nproc_per_node nnodes rdzv_backend rdzv_endpoint max-restarts nodes gpus-per-node'.split())
    others |= set('report quick rows lines kills seed'.split())  # of experiments
    coming_from = '\n'.join(line.rsplit(' | ', 1)[-1] for line in PAGES['docs/coming-from.md'].splitlines())
    for name, text in (OURS | {'coming from': coming_from}).items():
        text = re.sub(r'`(lm_eval|alpaca_eval|hf) [^`]*`', '', text)
        found = set(re.findall(r'(?<![\w-])--([a-z][\w-]*)', text))
        assert found <= known | others, f'{name}: {sorted(found - known - others)}'


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_configs(path, monkeypatch):
    """Starts with what it reproduces and its command; that command parses; its out_dir is its own name."""
    text = path.read_text()
    comment = ''.join(line for line in text.splitlines(True) if line.startswith('#'))
    command = re.search(r'^#     ((?:torchrun|python) .*)$', comment, re.M).group(1)
    assert text.startswith('# ') and f'config/{path.name}' in command
    config = parse(command, monkeypatch)
    assert config['out_dir'] == f'out/{path.stem}'
    assert len(text.splitlines()) <= 20


def test_configs_of_papers(monkeypatch):
    """Of every loss that they compare, and Dr. DPO's settings."""
    names = [f'{x}_hh' for x in 'sft dpo drdpo betadpo tdpo radpo kto ipo cdpo simpo drdpo'.split()]
    names += 'sft_toy drdpo_toy drdpo_hh_noise20 radpo_imdb sft_imdb sft_sharegpt'.split()
    assert {path.stem for path in CONFIGS} >= set(names)
    config = parse('dpo.py config/drdpo_hh_noise20.py', monkeypatch)
    paper = dict(batch_size=64, lr=5e-7, optimizer='RMSprop', warmup_steps=150, max_length=512, max_prompt_length=256)
    paper |= dict(beta=0.1, n_epochs=1, dtype='bfloat16', noise_rate=0.2, max_grad_norm=10.0)
    assert {k: config[k] for k in paper} == paper
    # beta' weights any loss when it is set, so these configs leave it to the loss: with --loss=dpo they are the plain baseline
    for name in [path.stem for path in CONFIGS if path.stem.startswith('drdpo')]:
        for loss, beta_prime in (('dpo', None), ('drdpo', 1.0)):
            config = parse(f'dpo.py config/{name}.py --loss={loss}', monkeypatch)
            assert objective_of(config, losses.LOSSES, losses.STATISTICS).options['beta_prime'] == beta_prime


def test_every_loss_and_every_dataset_is_documented():
    from text import sources

    # a loss of somebody's own may do without
    assert len(LOSSES) == 27 and set(losses.LOSSES) >= set(LOSSES)
    for text in (README, PAGES['docs/losses.md']):
        table = text[text.index('| `--loss=` |') :]
        assert set(LOSSES) <= set(re.findall(r'`(\w+)`', table[: table.index('\n\n')]))
    # and so may a data set
    datasets = {name.removeprefix('get_') for name in dir(sources) if name.startswith('get_')}
    for text in (README, PAGES['docs/data.md']):
        known = re.search(r'Known[^`]*`([^`]*)`', text).group(1)
        assert len(known.split()) == 14 and datasets >= set(known.split())


def test_adding_a_loss_and_a_data_set(tmp_path):
    """The README's recipes, done to a copy: the new row is tested, and the new loss trains on the new data set."""
    ignored = shutil.ignore_patterns('.*', 'out', '__pycache__', 'experiments', 'runs', 'docs')
    here = shutil.copytree(ROOT, tmp_path / 'copy', ignore=ignored)
    function, row, dataset = re.findall(r'```python\n(.*?)```', README, re.S)

    def insert(path, before, text):
        head, mark, tail = (here / path).read_text().partition(before)
        assert mark, f'{path} has no {before!r}'
        (here / path).write_text(head + text + mark + tail)

    insert('losses.py', 'LOSSES = {', function + '\n')
    insert('losses.py', 'dpo, cdpo,', 'my_loss, ')
    insert('tests/parts/test_losses.py', "    'dpo': (", row)
    insert('text/sources.py', 'def get_toy(', dataset + '\n\n')
    write_jsonl(here / 'mine.jsonl', [{'question': f'{i}?', 'good': 'a b', 'bad': 'c d'} for i in range(200)])
    tests = (
        'tests/parts/test_losses.py tests/parts/test_golden.py'  # the new rows, and what looks at all losses at once
    )
    flags = '--n_examples=16 --batch_size=8 --n_eval_examples=8 --out_dir=run'
    for command in (
        f'-m pytest -q -p no:cacheprovider {tests} -k "my_loss or every_loss"',
        'losses.py my_loss --beta=0.2',
        f'dpo.py --loss=my_loss --beta=0.2 --data=mine:mine.jsonl {flags}',
    ):
        done = forks.python(*shlex.split(command), cwd=here, NANOPREF_CACHE=tmp_path / 'cache')
        assert done.returncode == 0, done.stdout + done.stderr
    assert (here / 'run/model/model.safetensors').exists()


def test_speed_table(tmp_path):
    """The README's speeds are those of experiments/speed/table.json; the same command writes them again."""
    start, end = README.index('<!-- speed:'), README.index('<!-- end of speed')
    stale = README[start:end].replace(' GB |', ' |').replace(' times as fast', '')
    assert stale != README[start:end]
    (tmp_path / 'README.md').write_text(README[:start] + stale + README[end:])
    files = [f'--readme={tmp_path / "README.md"}', f'--out={ROOT / "experiments/speed/table.json"}']
    done = forks.python('-m', 'experiments.speed.table', '--report', *files)
    assert done.returncode == 0 and 'head / trl' in done.stdout, done.stderr
    assert (tmp_path / 'README.md').read_text() == README
