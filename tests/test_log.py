"""wandb and tensorboard, read back with what they offer for it; what is missing is said before anything is loaded."""

import json
import os
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import load
import log
from configurator import UserError

ROOT = Path(__file__).resolve().parent.parent
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
    monkeypatch.setattr(load, 'load_tokenizer', lambda *a: pytest.fail('loaded something first'))
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
        UserError, match='^--wandb: No API key configured. Or set WANDB_API_KEY, or WANDB_MODE=offline.$'
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
