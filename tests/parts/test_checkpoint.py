"""Checkpoints are whole or not there; what happens to them later, and a full disk, is seen and costs nothing that existed."""

import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import re
import shutil
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, cut_short, metrics, parse, read_jsonl, run_script, same_bits, sentence, shrink_toy, tensors
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import data
import fsdp
import losses
import model
import training
from configurator import Config, UserError
from data import steps
from hf import export, generate, parallel
from hf.load import load_model, load_tokenizer
from rl import formulas
from runtime import checkpoint, files, guard, log, ranks, room
from tests import forks
from text.examples import Examples
from text.tokenise import load_examples

FLAGS = ['--batch_size=12', '--n_examples=60', '--save_every=12', '--keep_last=3', '--eval_every=24', '--n_eval_examples=8',
         '--lr=1e-3', '--warmup_steps=1', '--max_length=64', '--max_prompt_length=32']  # fmt: skip
PPO = ['--reward_model=gold', '--minibatch_size=12', '--max_new_tokens=8']


def run(out_dir, *flags, script='dpo.py'):
    common = [flag for flag in FLAGS if script != 'ppo.py' or not flag.startswith('--max_length')]
    return run_script(script, *common, *flags, f'--out_dir={out_dir}')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run that was never interrupted, with its last three checkpoints."""
    folder = tmp_path_factory.mktemp('checkpoint')
    with pytest.MonkeyPatch.context() as patch:
        shrink_toy(patch, folder)
        run(folder / 'run')
        yield folder / 'run'


@pytest.fixture
def no_pause(monkeypatch):
    """guard.save_persistently tries again at once."""
    monkeypatch.setattr(guard, 'PAUSE', 1)
    monkeypatch.setattr(guard, 'time', SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def died(whole, tmp_path):
    """The same run, dead in its last step."""
    cut_short(whole, tmp_path / 'run', 60)
    return tmp_path / 'run'


def names(out):
    return sorted(os.listdir(out / 'checkpoints'))


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('precious')


def shard(folder):
    return next(folder.glob('*.safetensors'))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


full_disk = MagicMock(side_effect=OSError(28, 'No space left on device'))
not_written = MagicMock(side_effect=UserError('cannot write it'))


def test_a_shorter_run_leaves_the_model_of_a_checkpoint(whole, tmp_path):
    """As docs/coming-from.md says: data, warm-up and a constant learning rate do not depend on n_examples."""
    run(tmp_path / 'short', '--n_examples=48', '--save_every=0')
    saved = tensors(whole / 'checkpoints/0000000048')
    left = tensors(tmp_path / 'short/model')
    assert left and all(torch.equal(saved[f'model.{name}'], weight) for name, weight in left.items())


@pytest.mark.parametrize('script', ['dpo.py', 'reward.py'])
def test_a_model_is_made_of_a_checkpoint(whole, tmp_path, monkeypatch, script):
    """As docs/runs.md says, where the data are gone."""
    monkeypatch.chdir(tmp_path)
    load_model('toy', seed=5).save_pretrained('base')
    load_tokenizer('toy').save_pretrained('base')
    run('run', '--model=base', '--n_examples=36', script=script)
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/runs.md').read_text(), re.S)
    for there, here in (
        ('out/sft_hh/model', 'base'),
        ('out/dpo_hh/checkpoints/0000019968', 'run/checkpoints/0000000024'),
        ('out/dpo_hh_early', 'early'),
    ):
        assert there in code
        code = code.replace(there, here)
    if script == 'reward.py':
        code = code.replace(
            'model = load_model(base)', 'separate_pad(tokenizer)\nmodel = load_reward(base, tokenizer, new_head=True)'
        )
    exec(code)
    saved, left = tensors('run/checkpoints/0000000024'), tensors('early/model')
    assert left and all(torch.equal(saved[f'model.{name}'], weight) for name, weight in left.items())
    words = (
        ['feedback/score.py', '--reward_model=early', '--out=scores.jsonl']
        if script == 'reward.py'
        else ['sample.py', '--model=early', '--max_new_tokens=4']
    )
    run_script(*words, '--data=toy')


# ---- damage, leftovers, files of somebody else ----


def rewrite(folder, **changed):
    """Change a checkpoint's state by hand, and its manifest with it."""
    file = folder / 'state.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    (folder / 'manifest.json').write_text(json.dumps(checkpoint._manifest_of(folder)))


# fmt: off
DAMAGES = {  # what is done to a checkpoint, and what is said
    'truncated': (lambda f: os.truncate(shard(f), 1000), 'shard.* is not what its manifest says'),
    'a flipped bit': (lambda f: flip(shard(f)), 'shard.* is not what its manifest says'),
    'a missing shard': (lambda f: shard(f).unlink(), 'shard.* is not what'),
    'no manifest': (lambda f: (f / 'manifest.json').unlink(), 'manifest.json: No such file'),
    'a broken manifest': (lambda f: (f / 'manifest.json').write_text('{"a'), 'manifest.json or state.json cannot be read'),
    'a list for a manifest': (lambda f: (f / 'manifest.json').write_text('[]'), 'manifest.json or state.json cannot be read'),
    'a state without a run': (lambda f: rewrite(f, run={'script': 3}), 'manifest.json or state.json cannot be read'),
    'a list for the options of a run': (lambda f: rewrite(f, run={'script': '', 'options': []}), 'manifest.json or state.json cannot be read'),
    'an empty manifest': (lambda f: (f / 'manifest.json').write_text('{}'), 'shard.* is not what'),
    'a changed state': (lambda f: flip(f / 'state.json'), 'state.json is not what'),
    'weights of another run': (lambda f: shutil.copy(shard(f), f / 'zzz.safetensors'), 'zzz.safetensors is not what'),
    "a Mac's shadow of a shard": (lambda f: (f / f'._{shard(f).name}').write_bytes(b'\0\5\x16\7' * 99), '._shard.* is not what'),
    'a folder': (lambda f: (f / 'more').mkdir(), 'more: Is a directory'),
    'a dangling link': (lambda f: (f / 'link').symlink_to('/nowhere/x'), 'link: No such file'),
    'another checkpoint': (lambda f: shutil.copytree(f.with_name('0000000024'), f, dirs_exist_ok=True), 'after 24 examples'),
}
# fmt: on


@pytest.mark.parametrize('case', DAMAGES)
def test_a_damaged_checkpoint_is_seen_and_the_one_before_used(died, case, capsys):
    damage, words = DAMAGES[case]
    assert checkpoint.latest(died).name == '0000000048'
    damage(died / 'checkpoints/0000000048')
    assert checkpoint.latest(died).name == '0000000036'
    out = capsys.readouterr().out
    assert re.search(words, out) and 'going back to 0000000036' in out and out.count('\n') == 1


def test_a_run_does_not_start_over_by_itself(died):
    """Where all checkpoints are damaged, or a line in the middle of its rows."""
    text = (died / 'metrics.jsonl').read_text()
    lines = text.splitlines()
    (died / 'metrics.jsonl').write_text('\n'.join([lines[0], lines[1][:50], *lines[2:]]))
    with pytest.raises(UserError, match='metrics.jsonl, line 2, is damaged'):
        run(died)
    (died / 'metrics.jsonl').write_text(text)
    for folder in (died / 'checkpoints').iterdir():
        os.truncate(shard(folder), 10)
    with pytest.raises(UserError, match='no checkpoint is complete: .*48 is damaged .shard'):
        run(died)
    assert names(died) == ['0000000024', '0000000036', '0000000048'] and (died / 'metrics.jsonl').read_text() == text


def test_resumes_behind_all_that_can_be_broken_at_once(whole, died, tmp_path, capsys):
    """The end is that of an unbroken run, and nobody else's file is touched."""
    checkpoints, far = died / 'checkpoints', tmp_path / 'far'
    os.truncate(shard(checkpoints / '0000000048'), 1000)
    (died / 'latest').write_text('nonsense')
    os.truncate(died / 'metrics.jsonl', (died / 'metrics.jsonl').stat().st_size - 40)
    # leftovers of a kill, files of a Mac and of somebody, an old checkpoint moved to another disk and linked
    fill(died, ['config.json.tmp', 'metrics.jsonl.tmp', 'model.tmp/a', 'checkpoints/0000000060.tmp/a'])
    theirs = 'my_work.tmp/a notes.tmp checkpoints/mine.tmp/a checkpoints/60.tmp models.tmp/a .lock.tmp'.split()
    theirs += [f'checkpoints/{name}' for name in ('._0000000036', '.DS_Store', 'old/a', '²', '0000000060')]
    fill(died, theirs)
    shutil.move(checkpoints / '0000000024', far)
    (checkpoints / '0000000024').symlink_to(far)
    (checkpoints / '0000000048.tmp').symlink_to(far)
    before = {file.name: file.read_bytes() for file in far.iterdir()}
    run(died, '--keep_last=1')
    assert metrics(died) == metrics(whole) and same_bits(died / 'model', whole / 'model')
    assert (died / 'latest').read_text() == 'checkpoints/0000000048\n' == (whole / 'latest').read_text()
    assert {file.name: file.read_bytes() for file in far.iterdir()} == before
    assert all((died / name).read_text() == 'precious' for name in theirs)
    left = '.DS_Store ._0000000036 0000000024 0000000048 0000000048.tmp 0000000060 60.tmp mine.tmp old ²'
    assert [name.partition('.aside')[0] for name in names(died)] == left.split()
    printed = capsys.readouterr().out
    assert printed.count('is not of this run') == printed.count('is damaged') == 1
    assert names(whole) == ['0000000024', '0000000036', '0000000048'] and not (whole / 'samples.jsonl').exists()


def test_a_first_run_in_a_full_folder(tmp_path, whole, monkeypatch, capsys):
    """Such as the working directory: nothing is removed. A card that cannot be made does not cost the model."""
    there = 'my_work.tmp/a notes.tmp models.tmp/a .lock.tmp .lock config.py'.split()
    fill(tmp_path, there)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, '_card_text', lambda out_dir, folder: {}['what'])
    run('.')
    assert all((tmp_path / name).read_text() == 'precious' for name in there)
    assert 'note: no model card' in capsys.readouterr().out and (tmp_path / 'model/model.safetensors').exists()


@pytest.mark.parametrize('name', [
    'model/a', 'adapter/a', 'metrics.jsonl', 'samples.jsonl', 'bad_step.jsonl', 'model.tmp/a', 'latest', 'checkpoints/a',
])  # fmt: skip
def test_files_and_links_of_somebody_else_are_refused(tmp_path, whole, name, monkeypatch):
    """They have the names of a run's, and would be replaced or cut; --out_dir=. beside --model=model, for one."""
    fill(tmp_path / 'out', [name])
    monkeypatch.chdir(tmp_path / 'out')
    first = name.partition('/')[0]
    with pytest.raises(UserError, match=f'. has {first}, but no config.json'):
        run('.')
    assert Path(name).read_text() == 'precious' and os.listdir() == [first]
    # nor is a link followed
    fill(tmp_path, ['far/kept'])
    for link in {first, '.lock', 'config.json.tmp'}:
        (tmp_path / f'run{link}').mkdir()
        (tmp_path / f'run{link}' / link).symlink_to(tmp_path / 'far')
        with pytest.raises(UserError, match=f'run{link}/{link} is a symbolic link'):
            run(tmp_path / f'run{link}')
    assert (tmp_path / 'far/kept').read_text() == 'precious'


def test_the_card_comes_with_the_model(died, whole, monkeypatch):
    """Killed while the card is written: there is no model yet, and the next start makes both."""
    with monkeypatch.context() as patch:
        patch.setattr(export, '_card_text', lambda out_dir, folder: exit(9))
        with pytest.raises(SystemExit):
            run(died)
    assert not (died / 'model').exists()
    run(died)
    assert (died / 'model/README.md').read_text().startswith('---')


def test_loads_into_a_model_that_has_run(tmp_path, monkeypatch):
    """As a policy that was its own reference: after a forward alone FSDP shows parameters that the optimizer does not know."""
    synced = []
    monkeypatch.setattr(checkpoint, 'sync', lambda path: synced.append(path.name))
    trained = run(tmp_path / 'run', '--shard=full', '--pack=false', script='sft.py')['run']
    assert not trained.packed
    assert synced == ['metrics.jsonl', 'samples.jsonl', 'bad_step.jsonl'] * 4  # before each checkpoint has its name
    trained.policy.reshard()
    live = checkpoint._live_tensors(trained.policy, trained.optimizer).keys()
    optimizer = fsdp.make_optimizer('AdamW', trained.policy, 0.5, 0.0)
    batch = trained.make_step(trained.train, np.arange(1)).batches[0]
    with torch.no_grad():
        trained.policy.response_logps(batch)
        assert checkpoint._live_tensors(trained.policy, trained.optimizer).keys() == live
        trained.policy.response_logps(batch)
    state = checkpoint.load(checkpoint.latest(tmp_path / 'run'), trained.policy, optimizer)
    assert state['examples'] == 48 and 'run' not in state and optimizer.param_groups[0]['lr'] == 0.5


def test_between_steps_a_policy_has_its_weights(tmp_path, monkeypatch):
    """In bfloat16, where a forward shows copies: when somebody makes an optimizer, and takes a mean after an evaluation."""
    seen = []

    def spied(name):
        inner = getattr(training.Run, name)

        def call(self, *args, **options):
            inner(self, *args, **options)
            seen.append({p.dtype for p in self.policy.parameters()})

        monkeypatch.setattr(training.Run, name, call)

    spied('set_batching')
    spied('evaluate')
    run(tmp_path / 'run', '--dtype=bfloat16', '--max_tokens=400', script='sft.py')
    assert len(seen) > 2 and set.union(*seen) == {torch.float32}


def test_ranks_wait_for_one_that_works_alone():
    """In the group of training, and in that of the thread that writes."""
    ranks.setup()
    for group in (dist.group.WORLD, checkpoint._writer_group(dist.group.WORLD)):
        assert group._get_backend(torch.device('cpu')).options._timeout == ranks.PATIENCE


class Counting(torch.optim.SGD):
    """An optimizer that counts its steps in python."""

    def step(self):
        super().step()
        for p in self.param_groups[0]['params']:
            if p.grad is not None:
                self.state[p]['step'] = self.state[p].get('step', 0) + 1
                self.state[p]['decay'] = 0.9


@pytest.mark.parametrize('own', [None, Counting])
def test_layers_that_never_run_frozen_weights_and_tensors_that_are_kept(own, tmp_path):
    """As a multimodal model's image encoder, trained on texts: checkpoints lack its optimizer state, and load all the same. What
    trained and is frozen now, and what somebody keeps, such as an EMA, is in them."""
    ranks.setup()
    steps_taken, weights = [], []
    for is_first in (True, False):
        net = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ('runs', 'never')})
        net.shard_mode, net.reshard, net.kept = 'none', lambda: None, {'mean': torch.ones(2) * is_first}
        optimizer = own(net.parameters(), 0.1) if own else fsdp.make_optimizer('AdamW', net, 0.1, 0.0)
        if not is_first:
            checkpoint.load(checkpoint.latest(tmp_path), net, optimizer)
            weights.append([p.tolist() for p in (*net.parameters(), net.kept['mean'])])
        net['runs'](torch.ones(2)).sum().backward()
        optimizer.step()
        if is_first:
            net['runs'].requires_grad_(False)
            checkpoint.save(tmp_path, 5, net, optimizer, {}, 1)
            checkpoint.wait()
            assert own is None or float(optimizer.state[net['runs'].bias]['decay']) == 0.9  # all its bits
            weights.append([p.tolist() for p in (*net.parameters(), net.kept['mean'])])
        steps_taken.append(
            {name: optimizer.state[p]['step'] for name, p in net.named_parameters() if optimizer.state[p]}
        )
    assert steps_taken == [{'runs.weight': n, 'runs.bias': n} for n in (1, 2)] and weights[0] == weights[1]


# ---- a full disk ----


def test_a_save_that_fails_surfaces_at_the_next_step(tmp_path, monkeypatch, whole):
    """The disk is full while the second checkpoint is written in the background."""
    write, count = HuggingFaceStorageWriter.write_data, itertools.count()

    def second_fails(self, *arguments):
        return full_disk() if next(count) == 1 else write(self, *arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, 'write_data', second_fails)
    with pytest.raises(UserError, match='write the checkpoint .*24: No space left on device; older ones are kept'):
        run(tmp_path / 'run')
    assert names(tmp_path / 'run') == ['0000000012']
    assert len(metrics(tmp_path / 'run')) <= 7  # check, eval 0, three or four steps, eval 24
    monkeypatch.undo()
    run(tmp_path / 'run')
    assert metrics(tmp_path / 'run') == metrics(whole)


ON_A_SMALL_DISK = """
import ctypes, os, runpy, shutil, subprocess, sys, time
from runtime import guard, log
folder, size, meanwhile, *flags = sys.argv[1:]
small = folder + '/small'
os.makedirs(small)
mounts = 'mount --make-rprivate /', f'mount -t tmpfs -o size={size}m none {small}'
# a mount of this process alone
if ctypes.CDLL(None).unshare(0x20000) or any(subprocess.run(words.split()).returncode for words in mounts):
    sys.exit(99)
shell = meanwhile.replace('SAID', f'/proc/{os.getpid()}/fd/1')
subprocess.Popen(['timeout', '60', 'sh', '-c', shell], cwd=small, stderr=subprocess.DEVNULL)
sleep, time.sleep = time.sleep, lambda seconds: sleep(seconds / 10)
# the first row that is written fills the disk
fill = f'mkdir {folder}/once && cat /dev/zero > {small}/fill'
row, log.Log.row = log.Log.row, lambda *what: [row(*what), subprocess.run(fill, shell=True, capture_output=True)]
guard.PAUSE, sys.argv = 1, ['dpo.py', *flags, f'--out_dir={small}/run']
try:
    runpy.run_path('dpo.py', run_name='__main__')
finally:
    shutil.copytree(small + '/run', folder + '/kept')
"""


def test_what_was_trained_outlives_a_full_disk(tmp_path):
    """The disk is full from the first step on, until two tries to save have failed; no checkpoint was asked for."""
    flags = [flag for flag in FLAGS if not flag.startswith('--save_every')]
    make_room = 'until grep -q kept.in.memory:.make SAID; do sleep 0.1; done; sleep 0.5; rm fill'
    done = forks.python('-c', ON_A_SMALL_DISK, tmp_path, 20, make_room, *flags)
    if done.returncode == 99:
        pytest.skip('mounts are not permitted here')
    said, kept = done.stdout + done.stderr, tmp_path / 'kept'
    assert done.returncode == 2 and 'Traceback' not in said, said
    assert 'The training is in a checkpoint: the same command writes the model' in said and 'lost' not in said
    assert read_jsonl(kept / 'metrics.jsonl')[-1]['counters/examples'] == 60
    assert checkpoint._damage(kept / 'checkpoints/0000000060') is None and not list(kept.glob('model*'))


def test_what_a_rank_wrote_elsewhere_is_missed(tmp_path):
    """Where each host has an out_dir of its own, no checkpoint is complete."""
    ranks.setup()
    group, one = checkpoint._writer_group(dist.group.WORLD), torch.ones(2)
    shapes = {'one': (2,), 'other': (3,)}
    said = sentence(checkpoint._write, tmp_path / '0000000005', {'one': one}, shapes, '{}', 1, group)
    assert 'all hosts must see one out_dir' in said and not list(tmp_path.iterdir())
    # nor where rows before it wait for room
    files.append(tmp_path / 'none/samples.jsonl', '{}\n')
    said = sentence(checkpoint._write, tmp_path / '0000000005', {'one': one}, {'one': (2,)}, '{}', 1, group)
    assert 'rows that wait for room: 1' in said and not list(tmp_path.iterdir())
    files._kept.clear()
    # nor where there can be no folder
    (tmp_path / 'file').touch()
    said = sentence(checkpoint._write, tmp_path / 'file/0000000005', {'one': one}, {'one': (2,)}, '{}', 1, group)
    assert 'Not a directory' in said


SHORT = '--n_examples=16 --batch_size=8 --n_eval_examples=0 --save_every=0'
SHORT_PPO = f'{SHORT} --reward=gold --minibatch_size=8 --ppo_epochs=1 --max_new_tokens=4 --sample_batch=8'


@pytest.mark.parametrize('script, flags', [
    ('dpo.py', SHORT), ('ppo.py', SHORT_PPO), ('ppo.py', f'{SHORT_PPO} --critic=own'), ('ppo.py', f'{SHORT_PPO} --lora_rank=2'),
])  # fmt: skip
def test_a_model_that_cannot_be_written_is_written_by_the_same_command(tmp_path, monkeypatch, whole, script, flags):
    """From a checkpoint, which has ppo's critic as well; the model is that of a run that could write it, and has no critic."""
    ill, well = ([script, *flags.split(), f'--out_dir={tmp_path / name}'] for name in ('ill', 'well'))
    run_script(*well)
    # two steps have no warm-up, a tenth of them
    assert metrics(tmp_path / 'well', 'train')[0]['lr'] == {'dpo.py': 5e-7, 'ppo.py': 1e-6}[script]
    with monkeypatch.context() as patch:
        patch.setattr(export, 'write_model', not_written)
        with pytest.raises(UserError, match='cannot write it. The training is in a checkpoint: the same command'):
            run_script(*ill)
    assert names(tmp_path / 'ill') == ['0000000016']
    run_script(*ill)
    assert same_bits(tmp_path / 'ill/model', tmp_path / 'well/model')
    assert metrics(tmp_path / 'ill') == metrics(tmp_path / 'well')
    assert not any('critic' in name or 'value_head' in name for name in tensors(tmp_path / 'ill/model'))


def test_a_save_that_has_failed_ends_the_step_and_does_not_cost_what_was_trained(monkeypatch, no_pause, capsys):
    """The disk fills while one is written in the background, and the rows cannot be written either: it is tried again."""
    ranks.setup()
    failed, tries = futures.Future(), []
    failed.set_exception(UserError('no room'))
    monkeypatch.setattr(checkpoint, '_pending', failed)
    with pytest.raises(UserError, match='no room'):
        guard.stop_asked()
    monkeypatch.setattr(checkpoint, '_pending', failed)
    guard.save_persistently(lambda: checkpoint.wait() or tries.append(1))
    assert len(tries) == 1 and 'warning: no room. The training is kept in memory' in capsys.readouterr().out
    # until a signal comes, and one more time
    monkeypatch.setattr(guard, 'stop_asked', iter([0, guard.SAVED]).__next__)
    not_written.reset_mock()
    with pytest.raises(UserError, match='cannot write it. Given up: the training since .* is lost'):
        guard.save_persistently(not_written)
    assert not_written.call_count == 3


def test_full_disk_under_rows_and_export(tmp_path, whole, monkeypatch, capsys):
    """Rows wait in memory for room, and are then appended in order; nothing ends for them, and a checkpoint waits for them."""
    logger = log.Log(tmp_path, 10, 0, 1)
    logger.path = tmp_path / 'full.jsonl'

    def rows(*all_examples, full):
        logger.path.unlink(missing_ok=True)
        if full:
            logger.path.symlink_to('/dev/full')
        for examples in all_examples:
            logger.row('train', examples, {'loss/train': 1.0, 'examples_per_second': 1.0})

    rows(1, 2, full=True)
    with pytest.raises(UserError, match=r'full\.jsonl: rows that wait for room: 2'):
        files.append_kept()
    assert capsys.readouterr().out.count('full.jsonl: No space left on device: its rows are kept in memory') == 1
    rows(3, full=False)
    assert [row['counters/examples'] for row in read_jsonl(logger.path)] == [1, 2, 3]
    rows(4, full=True)
    logger.close()
    assert 'full.jsonl: rows that wait for room: 1, and are lost' in capsys.readouterr().out
    files._kept.clear()

    # samples, too
    file = tmp_path / 'none/samples.jsonl'
    files.append(file, '{"examples": 0}\n')
    assert f'cannot write {file}: No such file' in capsys.readouterr().out
    file.parent.mkdir()
    files.append_kept()
    assert read_jsonl(file)[0]['examples'] == 0

    # what is replaced stays, and what cannot be written whole is not there
    files.replace_text(tmp_path / 'a', 'old')
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_text', full_disk)
        with pytest.raises(UserError, match='No space left'):
            files.replace_text(tmp_path / 'a', 'new')
    assert (tmp_path / 'a').read_text() == 'old' and not (tmp_path / 'a.tmp').exists()
    model = torch.nn.Linear(2, 2)
    model.reshard = lambda: None
    with pytest.raises(UserError, match='cannot write .*model: No space left on device'):
        export.write_model(model, None, full_disk, tmp_path / 'model')
    assert not (tmp_path / 'model').exists()


def test_a_checkpoint_is_not_written_twice(monkeypatch):
    """Where a signal comes in a step that saves anyway."""
    ranks.setup()
    said, code = [], []
    monkeypatch.setattr(guard, 'stop_asked', lambda: guard.SAVED)
    monkeypatch.setattr(checkpoint, 'wait', lambda: said.append('wait'))
    monkeypatch.setattr(ranks, 'leave', code.append)
    logger = SimpleNamespace(close=lambda: said.append('close'))
    run = SimpleNamespace(save_every=4, logger=logger, save=lambda seen: said.append(seen))
    run.obey_signals = functools.partial(training.Run.obey_signals, run)
    for is_due in (True, False):
        run.crossed = lambda *step, is_due=is_due: is_due
        training.Run.finish_step(run, SimpleNamespace(first=0, seen=4))
    assert said == [4, 'wait', 'close'] * 2 and code == [guard.SAVED] * 2


def test_a_signal_ends_sampling(tmp_path, whole, monkeypatch):
    """The rank that got it stops after one more token; what it has is thrown away."""
    tokenizer = load_tokenizer('toy')
    model = load_model('toy', tokenizer=tokenizer)
    settings = {'max_new_tokens': 30, 'temperature': 0}
    assert len(generate.generate(model, tokenizer, [[5, 6]], [0], **settings)[0]) > 1
    monkeypatch.setattr(guard, '_code', guard.SAVED)
    assert len(generate.generate(model, tokenizer, [[5, 6]], [0], **settings)[0]) == 1
    run = SimpleNamespace(config=Config(seed=0, out_dir=str(tmp_path)), tokenizer=tokenizer)
    examples = Examples.of([([5, 6], [[7]])])
    assert generate.sample_held_out(run, {'policy': model}, examples, 0, measure=None, **settings) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('script', ['sft.py', 'dpo.py', 'reward.py', 'ppo.py'])
def test_disk_and_memory_are_looked_at_first(tmp_path, monkeypatch, whole, capsys, script):
    """Every 0 seconds are every step, from the fourth on; less than 15 minutes save nothing. What a microbatch takes is measured once.
    And ppo.py declares max_grad_norm again, with another default than that of training.py."""
    assert parse('dpo.py', monkeypatch).save_every == 'auto'
    flags = ['--save_every=auto', '--n_examples=96', *(PPO if script == 'ppo.py' else [])]
    flags += ['--max_tokens=600'] * script.endswith('po.py')  # in the others auto asks for the measure, too
    calls, real, update, limits = [], room.bytes_per_token, fsdp.update, set()
    with monkeypatch.context() as patch:
        patch.setattr(fsdp, 'update', lambda *arguments: limits.add(arguments[-1]) or update(*arguments))
        patch.setattr(room, 'SAVE_AFTER', 0)
        patch.setattr(room, 'machine_memory', lambda free=False: 10**10)
        patch.setattr(room, 'bytes_per_token', lambda *arguments: calls.append(1) or real(*arguments))
        run(tmp_path / 'auto', *flags, script=script)
    assert names(tmp_path / 'auto') == ['0000000060', '0000000072', '0000000084'] and len(calls) == 1
    assert limits == {1.0 if script == 'ppo.py' else 10.0}
    said = r'(?:max_tokens=\d+ \(auto\): )?a microbatch of up to (\d+) tokens takes about \d+\.\d MB \(activationsPLACE \S+ MB, weights .*, optimizer .*\), of the'
    said = said.replace('PLACE', '' if script.endswith('po.py') else ', then gradients in their place')
    text = capsys.readouterr().out
    assert re.search(f'^memory: {said} 10.0 GB of this machine$', text, re.M)

    # less memory than that
    if script == 'dpo.py':
        little = int(0.7e6 * float(re.search(r'takes about (\S+) MB', text)[1]))
        monkeypatch.setattr(room, 'machine_memory', lambda free=False: little)
        run(tmp_path / 'none', *flags, script=script)
        text = capsys.readouterr().out
        advice = f'{little / 1e6:.1f} MB .*; lower --max_tokens to (\\d+), which'
        found = re.search(f'^warning: memory: {said} {advice}', text, re.M)
        assert found and 60 < int(found[2]) < int(found[1]) <= 600, text
        assert not (tmp_path / 'none/checkpoints').exists() and metrics(tmp_path / 'none') == metrics(tmp_path / 'auto')


def test_save_every_second_epoch(tmp_path, whole):
    epochs = ['--save_every=epoch_2', '--data_fraction=0.1', '--n_epochs=5', '--n_examples=None', '--keep_last=9']
    for script, flags in {'dpo.py': [], 'ppo.py': PPO}.items():
        done = run(tmp_path / script, *flags, *epochs, script=script)['run']
        assert done.packed
        # the examples of an epoch, those of a step (of a round), and the ends of the steps that end or go beyond two and four epochs
        epoch, step = done.total // 5, done.config.batch_size
        ends = [step * math.ceil(n * epoch / step) for n in (2, 4)]
        assert step < epoch and names(tmp_path / script) == [f'{end:010d}' for end in ends if end < done.total]


@pytest.mark.parametrize(('every', 'free', 'fits'), [
    ('auto', 80, True), ('auto', 40, False), ('auto', 9, None), (12, 40, None), (0, 10, True),
])  # fmt: skip
def test_room_on_the_disk(tmp_path, monkeypatch, capsys, every, free, fits):
    """A model of 10 bytes, and up to three checkpoints of 20. fits: None where it is refused."""
    monkeypatch.setattr(room.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=free))
    config = {'out_dir': str(tmp_path), 'save_every': every, 'keep_last': 2}
    refused = pytest.raises(UserError, match='free: the model takes.*checkpoints take .* each .3 to come.; make room')
    with refused if fits is None else contextlib.nullcontext():
        assert room._check_disk(config, 10, 20, 60) is fits
    assert ('it writes no checkpoint' in capsys.readouterr().out) == (fits is False)


@pytest.mark.parametrize(('total', 'every'), [(131, 90), (130, 0)])
def test_auto_saves_every_15_minutes_of_a_longer_run(monkeypatch, capsys, total, every):
    """Steps of 10 examples take 100 seconds; after four of them, 40 examples, more than 90 must be left."""
    monkeypatch.setattr(ranks, 'from_rank_0', lambda fn: fn())
    for n_steps in range(1, 5):
        step = SimpleNamespace(first=10 * n_steps - 10, seen=10 * n_steps)
        found = room.save_every_of(list(range(0, 100 * n_steps, 100)), step, total)
        assert found == ('auto' if n_steps < 4 else every)
    assert ('a checkpoint every 90 examples' in capsys.readouterr().out) == bool(every)
    assert room.save_every_of([0, 0, 0, 0], step, total) == 0  # a clock that stands still


# ---- numbers that are not finite, memory ----


def poison(monkeypatch, name, at, places):
    """losses.sft or losses.dpo with a NaN in some places, or an infinite gradient, in calls of these numbers with gradients."""
    fn, calls = getattr(losses, name), itertools.count(1)

    @functools.wraps(fn)
    def spoiled(*columns, **options):
        loss, pi = fn(*columns, **options), [*columns, *options.values()][0]
        if not loss.requires_grad or next(calls) not in at:
            return loss
        if places is None:
            return loss + (pi - pi.detach()).clamp(min=0).sqrt()  # adds 0, with an infinite slope
        return loss.index_fill(0, torch.tensor(places), torch.nan)

    monkeypatch.setattr(losses, name, spoiled)
    if name in losses.LOSSES:
        monkeypatch.setitem(losses.LOSSES, name, spoiled)


def tokens(task):
    """The training examples of the runs of this file."""
    how = {'max_length': 64, 'max_prompt_length': 32, 'truncation': 'start', 'undivided': False, 'seed': 0}
    return load_examples('toy', 'train', tokenizer=load_tokenizer('toy'), task=task, **how)


@pytest.mark.parametrize('flags', [[], ['--beta_prime=1']])
def test_bad_step_stops_before_the_weights_are_touched(tmp_path, monkeypatch, whole, flags):
    # the first call tries the formula out, before the run
    poison(monkeypatch, 'dpo', [4], [1, 4])
    with pytest.raises(UserError, match='a step from 24 to 36 .* is not finite; .*bad_step.jsonl has 2 of its'):
        run(tmp_path / 'run', *flags)
    bad = read_jsonl(tmp_path / 'run/bad_step.jsonl')
    assert {row['examples'] for row in bad} == {36} and all(row['loss'] == 'nan' for row in bad)
    assert {'place', 'index', 'uid', 'pi_w', 'ref_w'} <= set(bad[0])
    assert [r['counters/examples'] for r in metrics(tmp_path / 'run', 'train')] == [12, 24]
    # the right examples are named: those whose index the order of the data says
    wanted = list(steps(len(tokens('pairs')), 12, 60, 0))[2][1]
    assert [row['index'] for row in bad] == wanted[[row['place'] for row in bad]].tolist() and len(bad) == 2


def test_a_skipped_step_leaves_the_statistic(tmp_path, monkeypatch, whole):
    poison(monkeypatch, 'dpo', [4], [0])
    monkeypatch.setitem(losses.LOSSES, 'beta_dpo', losses.dpo)
    run(tmp_path / 'run', '--loss=beta_dpo', '--skip_bad_steps=1')
    means = [row['state/mean'] for row in metrics(tmp_path / 'run', 'train')]
    assert means[2] == means[1] and len(set(means)) == 4


def test_bad_step_of_ppo_names_prompts_of_the_training_set(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(formulas, 'grpo', lambda pi, *rest, **options: pi * torch.nan)
    flags = '--loss=grpo --group_size=3 --reward_model=gold --max_new_tokens=4 --minibatch_size=6'.split()
    with pytest.raises(UserError, match=r'a step from 0 to 12 examples is not finite; .* has 6 of its examples'):
        run(tmp_path / 'run', *flags, script='ppo.py')
    bad, train = read_jsonl(tmp_path / 'run/bad_step.jsonl'), tokens('prompts')
    places = [row['index'] for row in bad]
    first_round = next(steps(len(train), 4, 20, 0))[1].tolist()
    assert len(places) == 6 and len(set(places)) == 2 and set(places) < set(first_round) and max(places) > 3
    assert [row['uid'] for row in bad] == train.uid[places].tolist() and all(row['loss'] == 'nan' for row in bad)


def test_a_step_without_weight_is_bad(tmp_path, monkeypatch, whole):
    """Its gradient is 0 / 0: the update changes nothing, and the sentence names the weight."""
    calls = itertools.count()  # of those with a gradient, the third

    def weigh(loss, shift, *, beta_prime):
        return torch.ones_like(loss) * (not loss.requires_grad or next(calls) != 2)

    monkeypatch.setattr(losses, 'drdpo_weight', weigh)
    with pytest.raises(UserError, match=r'the weight of a step from 24 to 36 examples is 0; .* has 12 of its examples'):
        run(tmp_path / 'run', '--beta_prime=1')
    assert {row['what'] for row in read_jsonl(tmp_path / 'run/bad_step.jsonl')} == {'weight'}


def test_skipped_steps_are_counted_and_leave_the_weights(tmp_path, monkeypatch, whole, capsys):
    """One infinite gradient is skipped; the second, after a resume, is beyond the number allowed."""
    flags = ['--skip_bad_steps=1', '--lr_schedule=cosine']
    poison(monkeypatch, 'sft', [3, 5], None)
    with pytest.raises(UserError, match='the gradient of a step from 48 to 60 .*allow more than --skip_bad_steps=1'):
        run(tmp_path / 'run', *flags, script='sft.py')
    said = 'warning: the gradient of a step from 24 to 36 examples is not finite; .* has 12 of its examples: skipped, 1 of 1 allowed'
    assert re.search(said, capsys.readouterr().out)
    train = metrics(tmp_path / 'run', 'train')
    assert [r['counters/bad_steps'] for r in train] == [0, 0, 1, 1] and 'grad_norm' not in train[2]
    before, after = (tensors(tmp_path / f'run/checkpoints/00000000{n}') for n in (24, 36))
    assert before.keys() == after.keys() and any('exp_avg' in k for k in before)
    assert all(before[k].equal(after[k]) for k in before)  # weights and optimizer: nothing was touched
    monkeypatch.undo()
    poison(monkeypatch, 'sft', [1], [0])
    with pytest.raises(UserError, match='the loss of a step from 48 to 60 .*allow more than --skip_bad_steps=1'):
        run(tmp_path / 'run', *flags, script='sft.py')
    bad = [row['examples'] for row in read_jsonl(tmp_path / 'run/bad_step.jsonl')]
    assert bad == [36] * 12 + [60]  # the unfinished step's rows are there once


# script, options, what fails there, and what is said
# fmt: off
BENCH = ['--model=toy', '--vocabulary=40', '--batch_size=2', '--n_steps=1', '--variants=head']
PLACES = {
    'the update': ('dpo.py', ['--max_tokens=200'], 'fsdp.update', r'longest microbatch has \d+ tokens \(max_tokens=200\); lower max_tokens'),
    'one example': ('sft.py', ['--max_tokens=9'], 'fsdp.update', r'\(max_tokens=9\); lower max_length'),  # fills every microbatch
    'the step-0 check': ('dpo.py', ['--max_tokens=600'], 'fsdp.gather_columns', 'lower max_tokens'),
    'sharding': ('sft.py', [], 'fsdp.set_attention', 'a model does not fit'),
    'can_pack': ('reward.py', [], 'hf.probe.set_attention', 'the two examples that try the model out'),
    'the cache': ('dpo.py', ['--cache_ref'], 'hf.reference.adapters_off', 'lower max_tokens'),
    'sampling': ('sft.py', ['--sample_during_eval'], 'hf.generate.generate', 'lower n_eval_model_samples'),
    "ppo's sampling": ('ppo.py', PPO, 'hf.generate.generate', 'lower sample_batch'),
    "ppo's log-probs": ('ppo.py', PPO, 'model.last_hidden_states', 'lower max_tokens'),
    'prefetch': ('sft.py', [], 'data.pack', 'lower max_tokens'),
    'bench': ('tools/bench.py', BENCH, 'fsdp.update', 'lower batch_size or max_tokens'),
    'sample': ('sample.py', ['--n_examples=2', '--max_new_tokens=8', '--out_dir=run'], 'hf.generate.generate', 'a smaller --batch_size'),
}
ERRORS = {
    'the GPU': torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'),
    'this machine': RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000 bytes."),
}
# fmt: on


@pytest.mark.parametrize('place', PLACES)
def test_out_of_memory_anywhere(tmp_path, monkeypatch, whole, place):
    """On the GPU, or where the CPU's allocator fails: a sentence with what to lower, whoever was at work."""
    where = list(ERRORS)[list(PLACES).index(place) % 2]
    script, flags, target, words = PLACES[place]
    module, _, name = target.rpartition('.')
    module, full = importlib.import_module(module), MagicMock(side_effect=ERRORS[where])
    monkeypatch.chdir(tmp_path)
    if place in ('prefetch', "ppo's log-probs"):
        # the set-up calls it as well
        monkeypatch.setattr(room, 'check_room', lambda *_: monkeypatch.setattr(module, name, full))
    else:
        monkeypatch.setattr(module, name, full)
    with pytest.raises(UserError, match=f'{where} is out of memory: .*{words}') as info:
        if script in ('tools/bench.py', 'sample.py'):
            run_script(script, *flags)
        else:
            run('run', *flags, script=script)
    # of a rank that is alone with it, whichever it is; sample.py tells all ranks
    assert hasattr(info.value, 'of_this_rank') or script == 'sample.py'


# ---- memory that is known beforehand ----


@pytest.mark.parametrize('script, flags, training', [  # training: memory runs out in the passes that train, or in those before
    ('dpo.py', ['--loss=drdpo'], False), ('dpo.py', ['--loss=kto'], True), ('sft.py', ['--pack=False'], True),
])  # fmt: skip
def test_auto_halves_and_goes_on(tmp_path, monkeypatch, whole, capsys, script, flags, training):
    """The first and the third microbatch do not fit: the step begins anew, and the run is the one of a smaller number."""
    sizes, real = [], model.last_hidden_states

    def small(net, batch):
        if torch.is_grad_enabled() == training and len(batch.slot) > 2:
            sizes.append(batch.ids.numel())
            if len(sizes) in (1, 3):
                raise torch.OutOfMemoryError('CUDA out of memory')
        return real(net, batch)

    monkeypatch.setattr(model, 'last_hidden_states', small)
    run(tmp_path / 'auto', *flags, script=script)
    said = capsys.readouterr().out
    found = re.findall(r'memory: a microbatch of (\d+) tokens does not fit: going on with max_tokens=(\d+)', said)
    assert 'max_tokens=16384 (auto)' in said and len(found) == 2
    # those that were prepared ahead are made anew, too
    number = int(found[1][1])
    assert number < sizes[0] / 3 and max(sizes[3:], default=0) <= number
    monkeypatch.undo()
    run(tmp_path / 'number', *flags, f'--max_tokens={number}', script=script)
    rows = [metrics(tmp_path / name, 'train') for name in ('auto', 'number')]
    names = 'loss/train grad_norm padding_share'.split()
    found, expected = (np.array([[row[name] for name in names] for row in run]) for run in rows)
    assert found == pytest.approx(expected, rel=1e-4)


def test_auto_goes_on_after_a_backward_that_failed(tmp_path, monkeypatch, whole, capsys):
    """Memory runs out in a backward of FSDP: later ones give gradients all the same."""
    real, calls = model.Head.backward, itertools.count()

    def fails_once(ctx, grad):
        if next(calls) == 0:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return real(ctx, grad)

    with monkeypatch.context() as patch:
        patch.setattr(model.Head, 'backward', staticmethod(fails_once))
        run(tmp_path / 'auto', '--shard=full', script='sft.py')
    (number,) = re.findall(r'going on with max_tokens=(\d+)', capsys.readouterr().out)
    run(tmp_path / 'number', '--shard=full', f'--max_tokens={number}', script='sft.py')
    norms = [[row['grad_norm'] for row in metrics(tmp_path / name, 'train')] for name in ('auto', 'number')]
    assert norms[0] == pytest.approx(norms[1], rel=0.02) and min(norms[1]) > 0


def test_a_limit_that_changes_while_a_step_is_prepared(monkeypatch):
    """within_memory() halves max_tokens in one thread while another prepares a step: the step says for which limit it was made."""
    examples = Examples.of([(np.arange(3), [np.arange(2)])])
    run = SimpleNamespace(max_tokens=64, batching={}, rank=0, world_size=1)

    def halves_meanwhile(examples, rows, rank, world, max_tokens, **options):
        run.max_tokens = 32
        return [f'microbatches of {max_tokens}'], 5, 5

    monkeypatch.setattr(data, 'make_batches', halves_meanwhile)
    step = training.Run.make_step(run, examples, np.array([0]))
    assert (step.batches, step.max_tokens, run.max_tokens) == (['microbatches of 64'], 64, 32)


@pytest.mark.parametrize(('packed', 'share', 'world_size', 'tp', 'batch_size', 'max_tokens'), [
    (True, True, 1, 1, 9, 10_000), (True, False, 1, 1, 9, 10_000), (True, True, 2, 1, 9, 10_000), (True, True, 8, 1, 9, 10_000),
    (True, True, 8, 8, 9, 10_000), (True, True, 1, 1, 30, 10_000), (True, True, 1, 1, 8, 10_000), (False, True, 2, 1, 9, 100),
])  # fmt: skip
def test_no_microbatch_is_larger_than_reckoned(monkeypatch, packed, share, world_size, tp, batch_size, max_tokens):
    """Nine examples on eight ranks: one rank has two. Eight ranks in one group of tp are one. A step may take an example again."""
    monkeypatch.setattr(room.dist, 'get_world_size', lambda: world_size)
    monkeypatch.setattr(room.dist, 'get_rank', lambda: 0)
    monkeypatch.setattr(ranks, '_tp_size', tp)
    lengths = [30, 31, 300, 33, 34, 35, 36, 37, 38]
    examples = Examples.of([(np.arange(50), [np.arange(40), np.arange(length)]) for length in lengths])
    config = {'batch_size': batch_size, 'share_prefix': share, 'n_epochs': 3}
    layout = {'share_prefix': share, 'pad': not packed}
    made = [
        [
            batch.ids.numel()
            for batch in data.make_batches(examples, rows, rank, world_size // tp, max_tokens, **layout)[0]
        ]
        for _, rows in steps(9, batch_size, 27, seed=0)
        for rank in range(world_size // tp)
    ]
    largest, is_step = max(map(max, made)), packed and max(map(len, made)) == 1
    run = SimpleNamespace(config=config, train=examples, packed=packed, task='pairs')
    tokens, found = room._largest_batch(run, max_tokens)
    assert largest <= tokens <= 2.5 * largest and found == is_step
    # a microbatch of half a step is none
    assert not packed or room._largest_batch(run, tokens // 2) == (max(tokens // 2, 390), False)
    # a run of one epoch is no larger than its data, whatever batch_size
    if packed and share and world_size == 1:
        run.config = config | {'batch_size': 640, 'n_epochs': 1}
        assert room._largest_batch(run, 10_000) == (9 * 90 + sum(lengths), True)


@pytest.mark.parametrize(('share', 'tokens'), [(True, [56, 58]), (False, [116, 124])])
def test_sampled_answers_take_what_they_may(share, tokens):
    """Prompts of 20 and 22 tokens with four answers of up to 9 tokens each; the answers of their rows are but placeholders."""
    examples = Examples.of([(np.arange(20), [np.arange(70)]), (np.arange(22), [np.arange(2)])])
    config = {'share_prefix': share, 'group_size': 4, 'max_new_tokens': 9}
    run = SimpleNamespace(config=config, train=examples, packed=True, task='prompts')
    assert room._lengths(run).tolist() == tokens


@pytest.mark.parametrize(('free', 'chosen'), [(3000, 1536), (4000, 2048), (100, 1024), (10**12, 16384)])
def test_the_largest_budget_that_fits(monkeypatch, whole, free, chosen):
    """Into seven tenths of what is free, beside two frozen models and the optimizer: the weights are there already."""

    def estimated(config, policy, per_token, frozen, tokens, predicted, is_step):
        assert predicted == tokens // 4
        return {'activations': per_token * tokens, 'weights': 10**6, 'optimizer': 488, 'reference': frozen}

    monkeypatch.setattr(room, 'free_memory', lambda: free)
    monkeypatch.setattr(room, '_largest_batch', lambda run, max_tokens: (max_tokens, False))
    monkeypatch.setattr(room, 'estimate', estimated)
    train = SimpleNamespace(widths=np.array([[6, 1, 1]]))
    run = SimpleNamespace(config={}, task='pairs', train=train, policy=torch.nn.Linear(2, 2), bytes_per_token=lambda: 1)
    assert room.choose_max_tokens(run, n_models=2) == chosen


@pytest.mark.parametrize(('costs', 'noted'), [(0.3, False), (40, True)])
def test_a_cpu_without_bfloat16_is_said(monkeypatch, whole, capsys, costs, noted):
    assert 0.001 < room.bfloat16_slowdown() < 10_000  # a ratio, not seconds
    with monkeypatch.context() as patch:  # as if others had the processor meanwhile
        patch.setattr(torch.Tensor, '__matmul__', lambda x, _: room.time.sleep(0.05 * (x.dtype == torch.bfloat16)))
        assert room.bfloat16_slowdown() < 100
        patch.setattr(room.time, 'thread_time', lambda: 0.01)  # a clock that counts in ticks
        assert str(room.bfloat16_slowdown()) == 'nan'
    monkeypatch.setattr(room, 'bfloat16_slowdown', lambda: costs)
    config = Config({'tf32': False, 'deterministic': False, 'dtype': 'bfloat16', 'device_map': None})
    parallel.choose_arithmetic(config, torch.device('cpu'))
    assert ('40 times as long for bfloat16 as for float32: --dtype=float32' in capsys.readouterr().out) == noted


def test_bytes_saved_are_what_autograd_holds(whole):
    """Counted by hand for two linear layers with a ReLU: x, what ReLU gives and the result, but no weights."""
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    layers.get_output_embeddings = lambda: None
    examples = Examples.of([(np.arange(3), [np.arange(2)])] * 3)
    got = room.bytes_per_token(layers, lambda batch: layers(torch.zeros(batch.ids.numel(), 4)), examples, True)
    assert got == 4 * (4 + 8 + 2)


def test_memory_of_a_control_group(tmp_path, monkeypatch):
    """The smallest limit on the way up counts, in both versions; 'max' is none."""
    files = {'/proc/self/cgroup': '3:cpu:/x\n2:cpuacct,memory:/a/b\n0::/c\n'}
    files['/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes'] = '9223372036854771712\n'
    files['/sys/fs/cgroup/memory/a/memory.limit_in_bytes'] = '70000\n'
    files |= {'/sys/fs/cgroup/c/memory.max': 'max\n', '/sys/fs/cgroup/memory.max': '60000\n'}

    def read(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, 'read_text', read)
    assert room.machine_memory() == 60000
    files['/sys/fs/cgroup/memory.max'] = 'max'
    assert room.machine_memory() == 70000
    files['/proc/meminfo'] = 'MemFree: 7 kB\nMemAvailable:   40 kB\n'
    assert room.machine_memory(free=True) == 40960 and room.machine_memory() == 70000
    files.clear()
    assert room.machine_memory() > 10**8


def test_which_old_checkpoints_are_deleted(tmp_path):
    """The newest before this one stay; those of more examples, which the run has gone back from, do not count, and stay, too."""
    folders = [tmp_path / 'checkpoints' / f'{examples:010d}' for examples in (8, 16, 24, 32)]
    for folder in folders:
        folder.mkdir(parents=True)
    checkpoint._delete_old(folders[2], keep_last=2)
    assert sorted((tmp_path / 'checkpoints').iterdir()) == folders[1:]
