"""What a run is continued with must be what it began with: models, data and options, whatever their names; or one sentence says so."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import end_process_group, metrics, read_jsonl, run_script, sentence, tiny_model, write_jsonl

import configurator
from hf import export, load
from runtime import checkpoint, files, hub, log, ranks
from text import toy
from text.examples import Examples

COMMON = ['--batch_size=12', '--n_examples=24', '--save_every=12', '--n_eval_examples=4', '--do_first_eval=false', '--lr=1e-2',
          '--warmup_steps=0', '--max_prompt_length=32', '--data=data.jsonl', '--eval_data=held_out.jsonl']  # fmt: skip
CASES = {
    'sft': ['sft.py', '--model=model'],
    'dpo': ['dpo.py', '--model=model', '--ref_model=other'],
    'lora': ['dpo.py', '--model=model', '--lora_rank=2'],
    'reward': ['reward.py', '--model=model'],
    'ppo': ['ppo.py', '--model=model', '--ref_model=other', '--reward_model=judge', '--critic=critic', '--minibatch_size=6',
            '--ppo_epochs=1', '--max_new_tokens=4'],
    'offline': ['ppo.py', '--model=model', '--offline', '--minibatch_size=6', '--ppo_epochs=1'],
}  # fmt: skip


def run(case, out_dir, *flags):
    run_script(*CASES[case][:1], *COMMON, *CASES[case][1:], *flags, f'--out_dir={out_dir}')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder with models, data and a finished run of every case."""
    folder = tmp_path_factory.mktemp('same')
    for name in ('model', 'other', 'judge', 'critic'):
        tiny_model(folder / name, 'llama')
    pairs = [{key: row[key] for key in ('prompt', 'chosen', 'rejected')} for row in toy.pairs('train', 60)]
    write_jsonl(folder / 'data.jsonl', pairs[:50])
    write_jsonl(folder / 'held_out.jsonl', pairs[50:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('NANOPREF_CACHE', str(folder / 'cache'))
        patch.chdir(folder)
        run('reward', 'judged')
        shutil.rmtree('judge')
        shutil.copytree('judged/model', 'judge')
        for case in CASES:
            run(case, case)
        yield folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of all that, where every run has died after 12 of 24 examples; the working directory."""
    folder = tmp_path / 'here'
    shutil.copytree(world, folder)
    for case in CASES:
        shutil.rmtree(folder / case / 'model')
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(folder)
    return folder


def flip_a_bit(folder):
    """Of the weights: names, shapes and sizes stay."""
    file = Path(folder, 'model.safetensors')
    data = bytearray(file.read_bytes())
    data[-4001] ^= 1
    file.write_bytes(data)


def change(file, without=(), part=None, **new):
    """Set and leave out keys of a json file, or of a part of it."""
    content = json.loads(Path(file).read_text())
    held = content[part] if part else content
    held |= new
    for key in without:
        del held[key]
    Path(file).write_text(json.dumps(content))


def change_rows(file, fn):
    write_jsonl(file, fn(read_jsonl(file)))


def flip_labels(rows):
    return [row | {'chosen': row['rejected'], 'rejected': row['chosen']} for row in rows]


def forget_run(case, *names):
    """Make a run's checkpoint one of an older version, which did not write down its run, nor these; nothing seems damaged."""
    (folder,) = Path(case, 'checkpoints').iterdir()
    state = folder / 'state.json'
    change(state, ['run', *names])
    change(folder / 'manifest.json', **{'state.json': [state.stat().st_size, files.file_hash(state)]})


def copy_in(run, other):
    shutil.rmtree(Path(run, 'checkpoints'))
    shutil.copytree(Path(other, 'checkpoints'), Path(run, 'checkpoints'))


MODEL = "model 'model' has changed since: model.safetensors"
TRAINING = 'the training examples have changed'
ATTACKS = [
    *((case, lambda: flip_a_bit('model'), MODEL) for case in CASES),
    ('dpo', lambda: flip_a_bit('other'), "ref_model 'other' has changed since: model.safetensors"),
    ('ppo', lambda: flip_a_bit('judge'), "reward_model 'judge' has changed"),
    ('ppo', lambda: flip_a_bit('critic'), "critic 'critic' has changed"),
    ('dpo', lambda: change('model/config.json', rms_norm_eps=1e-3), "model 'model' has changed since: config.json"),
    ('dpo', lambda: change('model/tokenizer_config.json', chat_template='x'), 'has changed since: tokenizer_config.json'),
    ('ppo', lambda: change('model/generation_config.json', eos_token_id=7), 'has changed since: generation_config.json'),
    ('dpo', lambda: change_rows('data.jsonl', flip_labels), TRAINING),
    ('offline', lambda: change_rows('data.jsonl', flip_labels), TRAINING),
    ('sft', lambda: change_rows('data.jsonl', lambda rows: rows[::-1]), TRAINING),
    ('ppo', lambda: change_rows('data.jsonl', lambda rows: rows[1:]), TRAINING),
    ('dpo', lambda: change_rows('held_out.jsonl', flip_labels), 'the evaluation examples have changed'),
    ('dpo', lambda: copy_in('dpo', 'sft'), 'is of a different run (of sft.py there and of dpo.py here'),
    ('dpo', lambda: copy_in('dpo', 'lora'), 'lora_rank 2 there and None here'),
]  # fmt: skip


@pytest.mark.parametrize(('case', 'attack', 'words'), ATTACKS, ids=[f'{a[0]}: {a[2]}' for a in ATTACKS])
def test_what_has_changed_is_refused(here, case, attack, words):
    attack()

    def contents():
        return {f: f.read_bytes() for f in (here / case).rglob('*') if f.is_file() and f.name != '.lock'}

    before = contents()
    assert words in sentence(run, case, case) and contents() == before


def test_the_model_changes_while_it_trains(here, monkeypatch):
    """Adapters would be merged into another model than theirs. They are kept in a checkpoint, and the model can be put back."""
    write = export.write_model
    with monkeypatch.context() as patch:
        patch.setattr(export, 'write_model', lambda *a, **b: [flip_a_bit('model'), write(*a, **b)])
        said = sentence(run, 'lora', 'lora')
    assert "model 'model' has changed since: model.safetensors" in said and 'the same command writes the model' in said
    assert not (here / 'lora/model').exists()
    flip_a_bit('model')
    run('lora', 'lora')
    assert (here / 'lora/model').exists()
    # a whole model is written with the config that it has had
    with monkeypatch.context() as patch:
        eps = {'rms_norm_eps': 0.5}
        patch.setattr(export, 'write_model', lambda *a, **b: [change('model/config.json', **eps), write(*a, **b)][1])
        run('sft', 'sft')
    assert json.loads((here / 'sft/model/config.json').read_text())['rms_norm_eps'] < 0.1


def test_what_a_run_holds_together_with_options_is_in_config_and_checkpoint(world):
    record = json.loads((world / 'ppo/config.json').read_text())
    names = {'model', 'ref_model', 'reward_model', 'critic', 'training examples', 'evaluation examples'}
    assert record['contents'].keys() == names and 'config.json' in record['contents']['model']
    (folder,) = (world / 'ppo/checkpoints').iterdir()
    state = json.loads((folder / 'state.json').read_text())
    assert state['run']['contents'] == record['contents'] and state['run']['script'] == 'ppo.py'
    assert state['run']['options'] == {k: v for k, v in record['config'].items() if k not in log.NEUTRAL}


def test_another_run_in_the_folder(here):
    assert 'sft holds a different run (of sft.py there and of reward.py here' in sentence(run, 'reward', 'sft')
    run('sft', 'seed', '--seed=1')
    copy_in('sft', 'seed')
    words = 'the checkpoint sft/checkpoints/0000000012 is of a different run (seed 1 there and 0 here'
    assert words in sentence(run, 'sft', 'sft')


def test_the_same_continues_whatever_does_not_matter(here, world, capsys):
    """A README beside the weights, rows that are not trained on, a copy of the model folder in its place, another spelling of it."""
    (here / 'model/README.md').write_text('other')
    shutil.copytree('model', 'copy')
    shutil.rmtree('model')
    shutil.move('copy', 'model')
    run('dpo', 'dpo', '--model=./model/', f'--data={here}/data.jsonl')
    assert log._in_full('hh:./model+toy') == f'hh:{here}/model+toy'
    assert metrics('dpo') == metrics(world / 'dpo')
    assert '12 a step; going on after 12 of them, from dpo/checkpoints/0000000012\n' in capsys.readouterr().out


def test_older_versions_resume_with_a_note(here, world, capsys):
    """They wrote no hashes, and had fewer options, of which none is set midway; where nobody says what a checkpoint is of, its
    shapes do."""
    change('reward/config.json', ['center_coef'], part='config')
    assert 'center_coef None there and 0.5 here' in sentence(run, 'reward', 'reward', '--center_coef=0.5')
    change('dpo/config.json', ['contents'])
    change('dpo/config.json', ['lora_targets', 'truncation'], part='config')
    forget_run('dpo')
    assert 'lora_rank None there and 1 here' in sentence(run, 'dpo', 'dpo', '--lora_rank=1', '--lora_targets=q_proj')
    run('dpo', 'dpo')
    out = capsys.readouterr().out
    assert 'kept no hash of evaluation examples, model, ref_model, training examples: not checked' in out
    assert metrics('dpo') == metrics(world / 'dpo')
    assert 'model' in json.loads(Path('dpo/config.json').read_text())['contents']
    # its warm-up was the option, also in a short run
    forget_run('sft', 'warmup')
    change('sft/config.json', part='config', warmup_steps=150)
    run_script('sft.py', *(flag for flag in COMMON if 'warmup' not in flag), '--model=model', '--out_dir=sft')
    assert 'warm-up takes' not in capsys.readouterr().out
    assert metrics('sft', 'train')[-1]['lr'] == pytest.approx(1e-2 * 2 / 151)
    copy_in('lora', 'reward')
    forget_run('lora')
    assert 'is of another model or optimizer' in sentence(run, 'lora', 'lora')


def test_hub_models_are_known_by_their_files(monkeypatch, tmp_path):
    """Those that were loaded; another README is no other model."""
    for file, text in (('config.json', '{}'), ('model.safetensors', 'weights'), ('README.md', 'one')):
        (tmp_path / file).write_text(text)
    there = {('a/b', 'config.json'): str(tmp_path / 'config.json')}
    monkeypatch.setattr(hub, 'file_of', lambda *key: there.get(key))

    def found():
        return load.fingerprints({'model': 'a/b', 'ref_model': 'a/c', 'reward_model': 'gold', 'critic': 'head'})

    before = found()
    (tmp_path / 'README.md').write_text('two')
    (tmp_path / 'merges.txt').write_text('another program has fetched it')
    assert found() == before and before['model'].keys() == {'config.json', 'model.safetensors'} and len(before) == 1
    (tmp_path / 'model.safetensors').write_text('others')
    run = {'script': 'sft.py', 'options': {'model': 'a/b'}, 'contents': before}
    log.check_same('here', run, run)
    said = sentence(log.check_same, 'here', run, run | {'contents': found()})
    assert said.startswith("here a different run (model 'a/b' has changed since: model.safetensors): ")
    for file in ('model.safetensors', 'config.json', 'merges.txt'):
        (tmp_path / file).unlink()
    assert load.fingerprints({'model': str(tmp_path)}) == {'model': {}}


def test_ranks_that_differ_are_refused(monkeypatch):
    config = configurator.Config(seed=0)
    config.origin = {'seed': 'default'}
    one, two = (Examples.of([([1], [[i]])]) for i in (2, 3))
    theirs = {'training examples': two.content(), 'evaluation examples': one.content()}
    monkeypatch.setattr(checkpoint, 'gather_objects', lambda value: [value, theirs])
    monkeypatch.setattr(checkpoint.dist, 'get_rank', lambda: 0)
    assert 'rank 1 has read other data than rank 0' in sentence(checkpoint.identify, config, dict, one, one)
    # nor may they have other options
    monkeypatch.setattr(ranks, 'gather_objects', lambda options: [options, options | {'lr': 0.5}])
    assert 'lr is 0.5 on rank 1, and 0.1 on this one' in sentence(ranks.setup, 1, {'beta': 0.1, 'lr': 0.1})
    end_process_group()
    monkeypatch.setenv('RANK', '1')
    assert 'RANK is set, and WORLD_SIZE is not: start with torchrun' in sentence(ranks.setup)
