"""wandb and tensorboard, read back with what they offer for it; what is missing is said before anything is loaded."""

import io
import itertools
import json
import logging
import os
import re
import struct
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from helpers import cut_short, end_process_group, metrics, read_jsonl, refused, run_script, write_jsonl

import configurator
import training
from hf import load
from runtime import guard, log, ranks
from tests import forks

KEY = 'f00dfeed' * 5  # what a key looks like: must not appear in anything that is written


@pytest.mark.parametrize('shape', ['constant', 'linear', 'cosine'])
@pytest.mark.parametrize(('steps', 'warmup'), [(100, 150), (100, 50), (1000, 150), (10, 0), (1, 0)])
def test_schedule(shape, steps, warmup):
    rates = [log.schedule(step, steps, warmup, shape) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    # rises all through warm-up; then never
    assert rates[:warmup] == [(step + 1) / (warmup + 1) for step in range(min(steps, warmup))]
    after = rates[warmup:]
    assert after == sorted(after, reverse=True) and (not after or after[0] == pytest.approx(1, abs=1.01 / (warmup + 1)))
    if shape != 'constant' and steps >= 1000:
        half = warmup + (steps - warmup) // 2
        assert rates[half] == pytest.approx(0.5, abs=1e-2) and rates[-1] < 2e-3


def test_an_out_dir_that_cannot_be_looked_into(monkeypatch):
    """As where somebody else's folder is closed; root may look into all."""
    ranks.setup()
    monkeypatch.setattr(log.Path, 'exists', MagicMock(side_effect=PermissionError(13, 'Permission denied')))
    for check in (log.check_out_dir, guard.begin):
        with pytest.raises(configurator.UserError, match='cannot write to out_dir theirs/out: Permission denied'):
            check('theirs/out', {}, True)


def test_a_run_that_has_left_nothing_holds_no_folder(tmp_path, monkeypatch):
    """Such as one whose first scoring did not fit into memory: the next one has other options. The commit is told where git is."""
    (tmp_path / 'config.json').write_text('{"config": {"lr": 1}, "command": ["dpo.py"]}')
    (tmp_path / '.lock').touch()
    assert log.recorded(tmp_path) is None
    (tmp_path / 'metrics.jsonl').touch()
    assert log.recorded(tmp_path) == {'script': 'dpo.py', 'options': {'lr': 1}, 'contents': {}}
    commits = []
    for path in (os.environ['PATH'], str(tmp_path)):
        monkeypatch.setenv('PATH', path)
        log.claim_out_dir(tmp_path, {})
        commits.append(json.loads((tmp_path / 'config.json').read_text())['commit'])
    assert len(commits[0]) in (0, 40) and commits[1] == ''


# ---- trackers ----


TRACKERS = {'wandb': '--wandb=toy', 'tensorboard': '--tensorboard'}


def dpo(folder, *flags, status=0):
    """dpo.py in a process of its own, so that it ends as it ends for the user."""
    given = ['--n_examples=64', '--batch_size=16', '--save_every=16', '--keep_last=9', '--lr=1e-3', '--eval_every=32',
             '--n_eval_examples=8', '--warmup_steps=0', *flags, f'--out_dir={folder}']  # fmt: skip
    last = {flag.partition('=')[0]: flag for flag in given}
    done = forks.python('dpo.py', *last.values(), WANDB_MODE='offline', WANDB_API_KEY=KEY)
    assert done.returncode == status, done.stderr[-2000:]


@pytest.fixture(scope='module')
def resumed(tmp_path_factory):
    """out_dir of a run that was cut short after 32 of 64 examples, when its later rows had been logged already."""
    folder = tmp_path_factory.mktemp('log')
    flags = [flag for name, flag in TRACKERS.items() if find_spec(name)]
    dpo(folder / 'first', *flags)
    cut_short(folder / 'first', folder / 'run', 32)
    dpo(folder / 'run', *flags)
    return folder / 'run'


def test_tensorboard_shows_the_metrics_once(resumed):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed))
    events.Reload()
    names = {k for row in read_jsonl(resumed / 'metrics.jsonl') for k in row} - {'split'}
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
    assert all(row.items() >= by_step[row['_step']].items() for row in second)


def test_an_error_does_not_cost_the_rows_before_it(tmp_path):
    pytest.importorskip('wandb', reason='wandb is not installed')
    dpo(tmp_path / 'run', '--wandb=toy', '--lr=1e30', '--max_grad_norm=1e30', '--optimizer=SGD', status=2)
    (file,) = (tmp_path / 'run').glob('wandb/offline-run-*/*.wandb')
    written = {row['counters/examples'] for row in metrics(tmp_path / 'run')}
    assert [row['_step'] for row in history(file)] == sorted(written) and len(written) > 1


def test_no_secrets(resumed):
    for file in resumed.rglob('*'):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    names = {'config', 'command', 'commit', 'versions', 'contents'}
    assert json.loads((resumed / 'config.json').read_text()).keys() == names


@pytest.mark.parametrize('name', TRACKERS)
def test_a_missing_package_is_said_before_loading(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(training, 'load_tokenizer', lambda *a: pytest.fail('loaded something first'))
    message = refused('dpo.py', TRACKERS[name], f'--out_dir={tmp_path}/a/b')
    assert message == f'--{name} needs a package that is not installed: pip install {name}'
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('error, reason', [
    (RuntimeError('no more\nroom'), 'no more'), (OSError(28, 'No space left'), '[Errno 28] No space left'), (ValueError(), 'ValueError'),
    (SystemExit(1), '1'), (RuntimeError(KEY), '...'),
])  # fmt: skip
@pytest.mark.parametrize('where', ['init', 'log', 'finish', 'log finish'])
@pytest.mark.parametrize('name', TRACKERS)
def test_a_tracker_that_fails_costs_one_note(name, where, error, reason, monkeypatch, tmp_path, capsys):
    """And shows no key. Stand-ins for wandb, and for tensorboard's writer, raise an error in some calls."""
    tool = MagicMock()
    tool.__spec__ = ModuleSpec('wandb', None)  # transformers looks for it
    tool.init.return_value, tool.add_scalar, tool.close = tool, tool.log, tool.finish
    for call in where.split():
        getattr(tool, call).side_effect = error
    monkeypatch.setitem(sys.modules, 'wandb', tool)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=tool.init))
    monkeypatch.setenv('WANDB_API_KEY', KEY)
    (tmp_path / 'config.json').write_text('{"config": {}}')
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    logger = log.Log(tmp_path, 8, 0, 1, 'toy' if name == 'wandb' else None, name == 'tensorboard')
    for seen in (4, 8):
        logger.row('train', seen, {'loss/train': 1.0, 'examples_per_second': 2.0})
    logger.close()
    logger.close()
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith('note: ')]
    place = f'rows may be missing there; {tmp_path}/metrics.jsonl has all of them'
    assert notes == [f'note: {name} failed ({reason}): {place}']
    assert [row['counters/examples'] for row in metrics(tmp_path)] == [4, 8]
    each = {'wandb': 2, 'tensorboard': 6}[name]  # calls for two rows
    assert tool.log.call_count == {'init': 0, 'log': 1, 'finish': each, 'log finish': 1}[where]
    assert tool.finish.call_count == (where != 'init')  # what came before the failure is written out


# ---- clocks that stand still ----


@pytest.mark.parametrize(('start', 'evaluated', 'left'), [(0, -1, []), (8, 8, ['check', 'eval', 'train', 'eval'])])
def test_rows_of_before_that_stay(tmp_path, start, evaluated, left):
    """Of a run that begins anew none, not even that of the first check: it comes again."""
    kept = [('check', 0), ('eval', 0), ('train', 8), ('eval', 8), ('train', 16), ('eval', 16)]
    rows = [{'split': split, 'counters/examples': examples} for split, examples in kept]
    write_jsonl(tmp_path / 'metrics.jsonl', rows)
    log.cut_back(tmp_path, start, evaluated)
    assert [row['split'] for row in read_jsonl(tmp_path / 'metrics.jsonl')] == left


def test_the_time_left_is_that_of_steps(tmp_path, monkeypatch, capsys):
    """Of a run that goes on after 8 examples: 100 seconds until its first evaluation has ended, then a second for 8 examples."""
    clock = iter([0, 100, 101, 102])
    monkeypatch.setattr(log.time, 'perf_counter', lambda: next(clock))
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    logger = log.Log(tmp_path, 108, 8, 1)
    logger.row('eval', 8, {'loss/eval': 1.0})
    for seen in (16, 24):
        logger.row('train', seen, {'loss/train': 1.0, 'counters/step_examples': 8})
    assert re.findall(r'\d:\d\d left', capsys.readouterr().out) == ['0:11 left', '0:10 left']


TRAINING = '--n_examples=8 --batch_size=4 --n_eval_examples=4 --eval_every=4 --out_dir={0}/run'
FLAGS = {
    'sft.py': TRAINING, 'dpo.py': TRAINING, 'reward.py': TRAINING,
    'ppo.py': f'{TRAINING} --minibatch_size=4 --ppo_epochs=1 --max_new_tokens=4 --reward_model=gold',
    'sample.py': '--n_examples=4 --max_new_tokens=4 --out_dir={0}/run',
    'tools/bench.py': '--model=toy --data=synthetic --vocabulary=500 --prompt_tokens=5 --answer_tokens=5 --n_steps=1 --batch_size=2 '
                      '--out={0}/bench.json --variants=padded,cached',
    'label.py': '--gold=toy --answers={0}/samples.jsonl --out_dir={0}/run',
}  # fmt: skip


CLOCKS = 'time', 'perf_counter', 'process_time'


@pytest.mark.parametrize('script, step, clocks', [
    *((name, 0, CLOCKS) for name in FLAGS), ('dpo.py', -5, CLOCKS), ('dpo.py', -5, CLOCKS[:1]),
])  # fmt: skip
def test_a_clock_that_stands_still_or_goes_back(script, step, clocks, monkeypatch, tmp_path, capsys, small_toy):
    """Rates are then unknown: no row holds one, no run ends for it. The time of day measures nothing: it may be set back."""
    answer = {'prompt': 'Review of the hotel:', 'generator': 'x'}
    answers = [answer | {'sample': i, 'response': f' the bed was {word} .'} for i, word in enumerate(('nice', 'dull'))]
    write_jsonl(tmp_path / 'samples.jsonl', answers)
    flags = [flag.replace(',', ' ') for flag in FLAGS[script].format(tmp_path).split()]
    end_process_group()
    with monkeypatch.context() as patch:
        for name in clocks:
            ticks = itertools.count(1e9, step)
            patch.setattr(time, name, lambda ticks=ticks: next(ticks))
        run_script(script, *flags)
    end_process_group()
    printed = capsys.readouterr().out
    assert 'inf' not in printed.lower().replace('information', '')
    if clocks != CLOCKS:
        rows = metrics(tmp_path / 'run', 'train', without=())
        assert rows and all(row['examples_per_second'] > 0 and 0 <= row['data_wait_per_second'] <= 1 for row in rows)
        return
    if TRAINING in FLAGS[script]:
        assert 'done: ' in printed and 'nan ex/s  0:00 left' in printed
        for row in read_jsonl(tmp_path / 'run/metrics.jsonl'):
            assert not any('per_second' in name or name == 'sampling_share' for name in row)
    if script == 'tools/bench.py':
        rows = json.loads((tmp_path / 'bench.json').read_text())['rows']
        assert [row['variant'] for row in rows] == ['padded', 'cached'] and 'pairs_per_second' not in rows[0]


def test_in_a_file_a_bar_is_lines(capsys, monkeypatch):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr('tqdm.std.time', lambda: next(clock))
    with log.progress(100, ' rows', 'reading') as bar:
        for _ in range(100):
            bar.update()
    text = capsys.readouterr().err
    assert '\r' not in text and 'reading: 100 of 100 rows' in text


@pytest.mark.parametrize('given, total, steps', [
    ('default', 640, 1), ('default', 64_000, 100), ('default', 10**6, 150), ('a.py', 151 * 64, 150), ('a.py', 150 * 64, 150),
])  # fmt: skip
def test_the_default_warm_up_is_at_most_a_tenth_of_the_run(capsys, given, total, steps):
    config = configurator.Config({'warmup_steps': 150, 'batch_size': 64, 'lr': 0.1})
    config.origin = {'warmup_steps': given}
    assert log.warmup_steps(config, total // 64) == steps
    said = capsys.readouterr().out
    assert ('a tenth of this short run' in said) == (steps < 150)
    # a warm-up of one's own that does not end is told; with 151 steps the last one has the whole rate, see test_schedule
    assert ('the run has 150 steps: the learning rate never reaches 0.1' in said) == (total == 150 * 64)


def test_warnings_of_libraries(monkeypatch):
    """What transformers warns of is shown, but for what is known by name to be harmless; on other ranks nothing is."""
    stream, writer = io.StringIO(), logging.getLogger('transformers.modeling_utils')
    handler = next(h for h in logging.getLogger('transformers').handlers if load.concerns_user in h.filters)
    before = handler.setStream(stream)
    try:
        for part in load.HARMLESS:
            writer.warning(f'Some {part} of a model')
        writer.warning('the weights are upside down')
        monkeypatch.setenv('RANK', '1')
        writer.warning('the weights are upside down here, too')
    finally:
        handler.setStream(before)
    assert stream.getvalue().endswith('the weights are upside down\n') and stream.getvalue().count('\n') == 1


@pytest.mark.parametrize(
    ('tp', 'world', 'said'), [(1, 1, '1 rank'), (1, 2, '2 ranks'), (2, 1, '2 ranks'), (2, 2, '4 ranks')]
)
def test_all_ranks_are_counted(tp, world, said, capsys):
    """Those that share the examples of a model's parts, too: world_size has one for all tp of them."""
    run = SimpleNamespace(
        seen=0, total=8, train=range(8), world_size=world, config=SimpleNamespace(batch_size=4, tp=tp)
    )
    log.say_start(run, 'dpo', None, None)
    assert capsys.readouterr().out == f'training dpo on {said}: 8 examples, 4 a step\n'
