"""wandb and tensorboard, read back with what they offer for it; what is missing is said before anything is loaded."""

import importlib.machinery
import json
import os
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import training
from configurator import UserError
from runtime import log

ROOT = Path(__file__).resolve().parents[2]
KEY = 'f00dfeed' * 5  # what a key looks like: must not appear in anything that is written


def dpo(folder, *flags, status=0):
    """dpo.py in a process of its own, so that it ends as it ends for the user."""
    command = [sys.executable, 'dpo.py', '--n_examples=64', '--batch_size=16', '--save_every=16', '--keep_last=9', '--lr=1e-3',
               '--eval_every=32', '--n_eval_examples=8', '--warmup_steps=0', f'--out_dir={folder}/run']  # fmt: skip
    given = {flag.partition('=')[0] for flag in flags}
    command = [x for x in command if x.partition('=')[0] not in given] + list(flags)
    environment = os.environ | {'WANDB_MODE': 'offline', 'WANDB_API_KEY': KEY, 'NANOPREF_CACHE': str(folder / 'cache')}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr[-2000:]


@pytest.mark.parametrize('shape', ['constant', 'linear', 'cosine'])
@pytest.mark.parametrize(('steps', 'warmup'), [(100, 150), (200, 150), (100, 50), (1000, 150), (10, 0), (1, 0)])
def test_schedule(shape, steps, warmup):
    """Rises all through warm-up, at its line unless the decay is lower; then never rises."""
    rates = [log.schedule(step, steps, warmup, shape) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == [(step + 1) / (warmup + 1) for step in range(min(steps, warmup))]
    after = rates[warmup:]
    assert after == sorted(after, reverse=True) and (not after or after[0] == pytest.approx(1, abs=1.01 / (warmup + 1)))
    if shape != 'constant' and steps >= 1000:
        half = warmup + (steps - warmup) // 2
        assert rates[half] == pytest.approx(0.5, abs=1e-2) and rates[-1] < 2e-3


@pytest.fixture(scope='module')
def resumed(tmp_path_factory):
    """out_dir of a run that was cut short after 32 of 64 examples, when its later rows had been logged already."""
    folder = tmp_path_factory.mktemp('log')
    flags = [f'--{name}' for name in ('tensorboard', 'wandb=toy') if installed(name.partition('=')[0])]
    dpo(folder, *flags)
    out = folder / 'run'
    shutil.copy(out / 'metrics.jsonl', folder / 'first.jsonl')
    shutil.rmtree(out / 'model')
    for checkpoint in sorted((out / 'checkpoints').iterdir())[2:]:
        shutil.rmtree(checkpoint)
    dpo(folder, *flags)
    return out


def installed(name):
    try:
        return bool(__import__(name))
    except ImportError:
        return False


def metrics(out):
    return [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]


def test_tensorboard_shows_the_metrics_once(resumed):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed))
    events.Reload()
    names = {k for row in metrics(resumed) for k in row} - {'split'}
    assert set(events.Tags()['scalars']) == names and 'rewards_eval/accuracies' in names
    for name in ('loss/train', 'loss/eval', 'lr', 'grad_norm'):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        rows = [(row['counters/examples'], row[name]) for row in metrics(resumed) if name in row]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in rows]
    assert [event.step for event in events.Scalars('loss/train')] == [0, 16, 32, 48, 64]


def history(file):
    """The rows of an offline run's file: blocks of 32 KiB with records, as in LevelDB's log, of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, place, record = file.read_bytes(), 7, b''
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, size, kind = struct.unpack('<IHB', data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            message = wandb_internal_pb2.Record.FromString(record)
            record = b''
            if message.WhichOneof('record_type') == 'history':
                yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in message.history.item}


def test_wandb_goes_on_in_the_same_run(resumed):
    pytest.importorskip('wandb', reason='wandb is not installed')
    files = sorted(resumed.glob('wandb/offline-run-*/*.wandb'))
    run = (resumed / 'wandb_id.txt').read_text()
    assert [file.name for file in files] == [f'run-{run}.wandb'] * 2
    first, second = (list(history(file)) for file in files)
    assert [row['_step'] for row in first] == [0, 16, 32, 48, 64]
    assert [row['_step'] for row in second] == [48, 64]
    by_step = {}
    for row in metrics(resumed):
        by_step.setdefault(row['counters/examples'], {}).update(row)
    for row in second:
        expected = {k: v for k, v in by_step[row['_step']].items() if not k.endswith('_per_second')}
        assert {k: row[k] for k in expected} == expected


def test_an_error_does_not_cost_the_rows_before_it(tmp_path):
    pytest.importorskip('wandb', reason='wandb is not installed')
    dpo(tmp_path, '--wandb=toy', '--lr=1e30', '--max_grad_norm=1e30', '--optimizer=SGD', status=2)
    (file,) = (tmp_path / 'run').glob('wandb/offline-run-*/*.wandb')
    written = {row['counters/examples'] for row in metrics(tmp_path / 'run')}
    assert [row['_step'] for row in history(file)] == sorted(written) and len(written) > 1


def test_no_secrets(resumed):
    for file in resumed.rglob('*'):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert set(json.loads((resumed / 'config.json').read_text())) == {
        'config',
        'command',
        'commit',
        'versions',
        'contents',
    }


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, 'argv', ['dpo.py', *flags])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    runpy.run_path(str(ROOT / 'dpo.py'), run_name='script')


@pytest.mark.parametrize(('flag', 'name'), [('--wandb=toy', 'wandb'), ('--tensorboard', 'tensorboard')])
def test_a_missing_package_is_said_before_loading(flag, name, monkeypatch, tmp_path):
    for module in [m for m in sys.modules if m.partition('.')[0] == name or m.startswith('torch.utils.tensorboard')]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(training, 'load_tokenizer', lambda *a: pytest.fail('loaded something first'))
    with pytest.raises(UserError, match=f'^--{name} needs a package that is not installed: pip install {name}$'):
        run(monkeypatch, flag, f'--out_dir={tmp_path}/a/b')
    assert not (tmp_path / 'a').exists()


def test_no_key_is_said_before_loading(monkeypatch, tmp_path):
    wandb = pytest.importorskip('wandb', reason='wandb is not installed')

    def login():
        raise wandb.errors.UsageError('No API key configured.\nMore.')

    monkeypatch.setattr(wandb, 'login', login)
    monkeypatch.delenv('WANDB_MODE', raising=False)
    with pytest.raises(
        UserError, match=r'^--wandb fails \(No API key configured.\): set WANDB_API_KEY, or WANDB_MODE=offline$'
    ):
        log.check_trackers('toy', False)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    log.check_trackers('toy', False)


def test_a_run_that_fails_early_leaves_nothing(tmp_path):
    (tmp_path / 'there').mkdir()
    for out, left in (('new/deep', ['there']), ('there', ['.lock', 'there'])):
        command = [sys.executable, 'dpo.py', '--model=./nowhere', f'--out_dir={tmp_path}/{out}']
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "no model folder './nowhere'" in done.stderr
        assert sorted(x.name for x in tmp_path.rglob('*')) == left


# ---- trackers that fail ----


class Broken:
    """A stand-in for wandb, or for tensorboard's writer, that fails where it is told to, with what it is told to raise."""

    Error = type('Error', (Exception,), {})
    __spec__ = importlib.machinery.ModuleSpec('wandb', None)  # transformers looks for it

    def __init__(self, where, error=None):
        self.where, self.error, self.rows, self.calls = where, error or RuntimeError('no more\nroom'), [], []

    def _call(self, name):
        self.calls.append(name)
        if name == self.where:
            raise self.error

    def login(self):
        self._call('login')

    def init(self, *args, **options):
        self._call('init')
        return self

    def log(self, row, step):
        self._call('log')
        self.rows.append(row)

    def add_scalar(self, name, value, step):
        self._call('log')
        self.rows.append((name, value, step))

    def finish(self):
        self._call('finish')

    close = finish


def with_broken(monkeypatch, name, tool):
    """The option that logs to the stand-in in the place of what is called name."""
    if name == 'wandb':
        monkeypatch.setitem(sys.modules, 'wandb', tool)
        return '--wandb=toy'
    module = type(sys)('torch.utils.tensorboard')
    module.SummaryWriter = tool.init
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    return '--tensorboard'


def in_process(monkeypatch, tmp_path, script, *flags):
    """Run a script here, and leave no process group behind."""
    import torch
    import torch.distributed as dist

    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.setattr(sys, 'argv', [script, *flags])
    try:
        return runpy.run_path(str(ROOT / script), run_name='script')
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


SHORT = ['--n_examples=8', '--batch_size=4', '--n_eval_examples=4', '--eval_every=4']
SCRIPTS = {
    'dpo.py': SHORT,
    'sft.py': SHORT,
    'reward.py': SHORT,
    'ppo.py': [*SHORT, '--minibatch_size=4', '--ppo_epochs=1', '--max_new_tokens=4', '--reward_model=gold'],
}


@pytest.mark.parametrize(
    'error', [RuntimeError('no more\nroom'), OSError(28, 'No space left'), ValueError(), SystemExit(1)]
)
@pytest.mark.parametrize('where', ['init', 'log', 'finish'])
@pytest.mark.parametrize('name', ['wandb', 'tensorboard'])
def test_a_tracker_that_fails_costs_one_note(name, where, error, monkeypatch, tmp_path, capsys):
    tool = Broken(where, error)
    with_broken(monkeypatch, name, tool)
    (tmp_path / 'config.json').write_text('{"config": {}}')
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    logger = log.Log(tmp_path, 8, 0, 1, 'toy' if name == 'wandb' else None, name == 'tensorboard')
    for seen in (4, 8):
        logger.row('train', seen, {'loss/train': 1.0, 'examples_per_second': 2.0})
    logger.close()
    logger.close()
    out = capsys.readouterr().out
    notes = [line for line in out.splitlines() if line.startswith('note: ')]
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    assert notes == [
        f'note: {name} failed ({reason}): rows may be missing there; {tmp_path}/metrics.jsonl has all of them'
    ]
    assert [row['counters/examples'] for row in metrics(tmp_path)] == [4, 8]
    assert tool.calls.count('log') == {'init': 0, 'log': 1, 'finish': len(tool.rows)}[where]
    assert tool.calls.count('finish') == (where != 'init')  # what came before the failure is written out


@pytest.mark.parametrize(('script', 'name'), [('dpo.py', 'wandb'), ('ppo.py', 'tensorboard')])
def test_a_run_goes_on_without_its_tracker(script, name, monkeypatch, tmp_path, capsys):
    flag = with_broken(monkeypatch, name, Broken('log'))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    in_process(monkeypatch, tmp_path, script, *SCRIPTS[script], flag, f'--out_dir={tmp_path}/run')
    out = capsys.readouterr().out
    assert out.count('note: ') == out.count(f'note: {name} failed (no more)') == 1 and 'done: ' in out
    seen = [row['counters/examples'] for row in metrics(tmp_path / 'run') if row['split'] == 'train']
    assert seen == [4, 8] and (tmp_path / 'run/model').is_dir()


def test_a_key_in_a_failure_is_not_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('WANDB_API_KEY', KEY)
    with_broken(monkeypatch, 'wandb', Broken('init', RuntimeError(f'bad key {KEY}')))
    (tmp_path / 'config.json').write_text('{"config": {}}')
    log.Log(tmp_path, 8, 0, 1, 'toy').close()
    assert 'bad key ...' in (out := capsys.readouterr().out) and KEY not in out


@pytest.mark.parametrize('error', [Broken.Error(), ConnectionError('no way\nthere'), SystemExit('no terminal')])
def test_a_login_that_fails_is_one_sentence(error, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', Broken('login', error))
    monkeypatch.delenv('WANDB_MODE', raising=False)
    reason = (str(error).splitlines() or ['Error'])[0]
    with pytest.raises(UserError, match=rf'^--wandb fails \({reason}\): set WANDB_API_KEY, or WANDB_MODE=offline$'):
        log.check_trackers('toy', False)


def test_a_package_that_is_broken_is_said(monkeypatch):
    def broken(name):
        raise TypeError('Descriptors cannot be created directly.\nMore.')

    monkeypatch.setattr(log.importlib, 'import_module', broken)
    with pytest.raises(
        UserError, match=r'^--tensorboard fails \(Descriptors cannot be created directly.\): install it anew'
    ):
        log.check_trackers(None, True)


# ---- clocks that stand still ----


def test_per_second():
    assert log.per_second(6, 3) == 2 and log.per_second(0, 3) == 0
    assert all(value != value for value in (log.per_second(6, 0), log.per_second(0, 0.0), log.per_second(6, -1)))


@pytest.mark.parametrize(
    ('script', 'step'), [(name, 0) for name in [*SCRIPTS, 'sample.py', 'tools/bench.py', 'label.py']] + [('dpo.py', -5)]
)
def test_a_clock_that_stands_still_or_goes_back(script, step, monkeypatch, tmp_path, capsys):
    """Rates are then unknown: no row holds one, no run ends for it."""
    import itertools
    import time

    out = tmp_path / 'run'
    answers = [{'prompt': 'Review of the hotel:', 'sample': i, 'generator': 'x', 'response': f' the bed was {word} .'}
               for i, word in enumerate(('nice', 'dull'))]  # fmt: skip
    (tmp_path / 'samples.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in answers))
    flags = {
        'sample.py': ['--n_examples=4', '--max_new_tokens=4', f'--out_dir={out}'],
        'tools/bench.py': ['--model=toy', '--data=synthetic', '--vocabulary=500', '--prompt_tokens=5', '--answer_tokens=5', '--n_steps=1',
                     '--batch_size=2', '--variants=padded cached', f'--out={tmp_path}/bench.json'],
        'label.py': ['--gold=toy', f'--answers={tmp_path}/samples.jsonl', f'--out_dir={out}'],
    }.get(script) or [*SCRIPTS[script], f'--out_dir={out}']  # fmt: skip
    with monkeypatch.context() as patch:
        for name in ('time', 'perf_counter', 'process_time'):
            ticks = itertools.count(1e9, step)
            patch.setattr(time, name, lambda ticks=ticks: next(ticks))
        in_process(patch, tmp_path, script, *flags)
    printed = capsys.readouterr().out
    assert 'inf' not in printed.lower().replace('information', '')
    if script in SCRIPTS:
        assert 'done: ' in printed and 'nan ex/s  0:00 left' in printed
        for row in metrics(out):
            assert not any('per_second' in name or name == 'sampling_share' for name in row)
    if script == 'tools/bench.py':
        rows = json.loads((tmp_path / 'bench.json').read_text())['rows']
        assert [row['variant'] for row in rows] == ['padded', 'cached'] and 'pairs_per_second' not in rows[0]
