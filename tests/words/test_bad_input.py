"""Everything that a user can get wrong: one sentence that says what and where, exit code 2, no traceback, no hang.

Most cases run a script in this process, where the UserError can be caught; one ends a process, one a group of two."""

import errno
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import transformers
from helpers import ROOT, metrics, read_jsonl, write_jsonl

from configurator import UserError
from hf import generate
from runtime import errors, files
from tests import forks
from text import toy

PAIRS = [{'prompt': f'place {i}:', 'chosen': f' good {i} .', 'rejected': f' bad {i} .'} for i in range(6)]
CONTENTS = {
    'good': PAIRS,
    'one': [{'prompt': 'p', 'response': 'a', 'label': True}],
    'fields': [*PAIRS[:3], {'prompt': 'p', 'chosen': 'a'}],
    'empty_answers': [row | {'chosen': '', 'rejected': ''} for row in PAIRS],
    'equal_answers': [row | {'rejected': row['chosen']} for row in PAIRS],
    'prompts': [{'prompt': row['prompt']} for row in PAIRS],
    'layout': [{'ask': f'q{i}', 'chosen': 'a', 'rejected': 'b'} for i in range(6)],
}


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder of good and bad files that the cases name."""
    folder = tmp_path_factory.mktemp('world')
    for name, rows in CONTENTS.items():
        write_jsonl(folder / f'{name}.jsonl', rows)
    lines = (folder / 'good.jsonl').read_text().splitlines()
    (folder / 'broken.jsonl').write_text('\n'.join([*lines[:2], '{"prompt": "p", "chosen": ', *lines[2:]]))
    (folder / 'no_data').mkdir()
    (folder / 'checkpoint').mkdir()
    for name in ('manifest.json', 'state.json'):
        (folder / 'checkpoint' / name).write_text('{}')
    config = toy.model_config()
    config.vocab_size = 100  # the toy tokenizer has more ids
    model, tokenizer = transformers.LlamaForCausalLM(config), toy.tokenizer()
    for name in ('small', 'no_tokenizer', 'no_eos', 'damaged', 'shapes'):
        model.save_pretrained(folder / name)
    for name in ('small', 'only_tokenizer', 'damaged', 'shapes'):
        tokenizer.save_pretrained(folder / name)
    wider = config.to_dict() | {'intermediate_size': 2 * config.intermediate_size}
    (folder / 'shapes/config.json').write_text(json.dumps(wider))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / 'no_eos')
    (folder / 'damaged/model.safetensors').write_bytes(b'damaged')
    return folder


def arguments(world, out_dir, flags):
    """The command line of a run of three steps, with {world} in flags filled in. Of two flags with one name the last counts."""
    data = f'{world}/good.jsonl'
    default = [f'--data={data}', f'--eval_data={data}', f'--out_dir={out_dir}', '--batch_size=2', '--n_eval_examples=2']
    return [*default, '--warmup_steps=0', *(flag.format(world=world) for flag in flags)]


@pytest.fixture
def run(world, tmp_path):
    """run(script, *flags, out='out') -> the globals of the script after it has run."""
    return lambda script, *flags, out='out': helpers.run_script(script, *arguments(world, tmp_path / out, flags))


@pytest.fixture
def refused(world, tmp_path):
    """refused(script, *flags) -> the sentence."""
    return lambda script, *flags: helpers.refused(script, *arguments(world, tmp_path / 'out', flags))


OUT_OF_RANGE = {
    0: 'batch_size max_tokens n_examples n_epochs max_length max_prompt_length log_every num_turns keep_last max_new_tokens top_p '
       'max_grad_norm beta_prime',
    -1: 'n_eval_examples warmup_steps n_eval_model_samples eval_every save_every lr weight_decay temperature noise_rate '
        'data_fraction frac_bad',
    1.5: 'noise_rate data_fraction top_p frac_good',
}  # fmt: skip
# (flags, what the message says)
DPO = [
    ('--bach_size=4', 'did you mean batch_size'),
    # data
    ('--eval_data={world}/missing.jsonl', r'missing\.jsonl'),
    ('--data={world}/good.jsonl+{world}/missing.jsonl', r'missing\.jsonl'),
    ('--data={world}/no_data', r'no_data has no data file'),
    ('--data={world}/broken.jsonl', r'broken\.jsonl, line 3: not valid JSON'),
    ('--eval_data={world}/broken.jsonl', r'broken\.jsonl, line 3: not valid JSON'),
    ('--data={world}/fields.jsonl', r"fields\.jsonl, line 4: 'rejected' is missing"),
    ('--data={world}/empty_answers.jsonl', 'no train examples are left.*6 empty answers'),
    ('--data={world}/layout.jsonl', r"layout\.jsonl, line 1: no column has the prompt.*'ask' \(text\).*it is the layout.*README"),
    ('--eval_data={world}/layout.jsonl --skip_bad_rows', r'no test examples .*layout\.jsonl.*6 bad rows'),
    # models
    ('--model={world}/nothing', 'nothing'),
    ('--model={world}/no_tokenizer', 'tokenizer'),
    ('--model={world}/only_tokenizer', 'only_tokenizer. has no config.json'),
    ('--model={world}/good.jsonl', 'good.jsonl. is a file: a model is a folder'),
    ('--model={world}/checkpoint', 'is a checkpoint, .* in out_dir/model$'),
    ('--model={world}/damaged', 'cannot load the model'),
    ('--model={world}/shapes', r'other shapes than its config says: .* is \(.*\) in the file and \(.*\) by its config.json'),
    ('--model={world}/no_eos', 'eos_token'),
    ('--model={world}/small', r'the tokenizer has \d+ ids but the model .* embeds 100'),
    ('--ref_model={world}/nothing', 'nothing'),
    ('--ref_model={world}/small', r'the tokenizer has \d+ ids but the model .* embeds 100'),
    # values
    *((f'--{name}={value}', rf'{name} must be .*{value}')
      for name, value in (('optimizer', 'adam'), ('lr_schedule', 'step'), ('dtype', 'float16'), ('truncation', 'middle'))),
    *((f'--{name}={value}', f'{name} .*{value}') for value, names in OUT_OF_RANGE.items() for name in names.split()),
    ('--max_length=8 --max_prompt_length=7', 'max_length .*8'),  # no room but for an end of text
    # of the loss
    ('--loss=dop', "loss must be one of .*'dop'; did you mean dpo"),
    ('--loss=DPO', "not 'DPO'; did you mean dpo"),
    ('--loss=sigmoid', "not 'sigmoid'; here it is dpo$"),  # of TRL; sigmoid_norm is another loss
    ('--loss=sft', "not 'sft'; here it is sft.py$"),
    ('--data=ultrabin', '; here it is ultrafeedback$'),
    ('--data=hhh', "'hhh' is no file .*, ultrafeedback_hybrid; did you mean hh"),
    ('--gamma=2', '--gamma has no effect: the loss dpo'),
    ('--loss=simpo --reference_free', '--reference_free has no effect: the loss simpo'),
    ('--frac_good=0.5', '--frac_good has no effect'),
    ('--importance_max=5', '--importance_max has no effect'),
    ('--loss=cdpo --label_smoothing=-0.1', 'label_smoothing must .*-0.1'),
    ('--loss=radpo1 --risk=none', "risk must be one of .*cvar.*'none'"),
    ('--loss=kto --data={world}/one.jsonl --eval_data={world}/good.jsonl', "another example, .*one.jsonl' has one only"),
    ('--loss=kto --frac_good=0 --frac_bad=0', 'frac_good|no train examples'),
    ('--loss=simpo --ref_model=toy', '--ref_model has no effect: there is no reference'),
    ('--loss=kto --share_prefix=false', '--share_prefix has no effect: there is one answer to a prompt'),
    ('--num_turns=2', '--num_turns has no effect: it is for sharegpt'),
    ('--sample_during_eval --temperature=0 --top_p=0.5', '--top_p has no effect'),
    *((f'--{flag} --n_eval_examples=0', f'--{flag.split("=")[0]} has no effect: there is nothing to evaluate on')
      for flag in ('sample_during_eval', 'eval_every=2')),
    ('--loss=beta_dpo --a=inf', 'a must be a finite number, not inf'),
    ('--temperature=0.3', '--temperature has no effect: sample_during_eval is off'),
]  # fmt: skip
CASES = [
    *(('dpo.py', *case) for case in DPO),
    ('sft.py', '--control_tokens --lora_rank=2', 'lora_rank freezes them'),
    ('sft.py', '--control_tokens --last_turn_only', '--last_turn_only has no effect'),
    ('sft.py', '--noise_rate=0.1 --last_turn_only', '--last_turn_only has no effect'),
    ('sft.py', '--temperature=0.3', '--temperature has no effect: sample_during_eval is off'),
    ('sft.py', '--data={world}/empty_answers.jsonl', 'no train examples are left.*6 empty answers'),
    ('sft.py', '--model={world}/small', r'the tokenizer has \d+ ids but the model .* embeds 100'),
    ('sft.py', '--max_length=8 --max_prompt_length=9', 'max_length .*8'),
    ('reward.py', '--label_smoothing=0.5', 'label_smoothing must lie between 0 and 0.5'),
]


@pytest.mark.parametrize('script, flags, words', CASES)
def test_one_sentence(refused, script, flags, words):
    message = refused(script, *flags.split())
    assert re.search(words, message), message


def test_a_run_that_never_began_does_not_claim_its_folder(run, refused, tmp_path):
    for flag in ('--optimizer=adam', '--data={world}/broken.jsonl', '--model={world}/nothing', '--model={world}/small'):
        refused('sft.py', flag)
    # as a process, which ends without giving the lock back
    ended = forks.python('sft.py', '--model=nowhere', '--data=toy', f'--out_dir={tmp_path}/out')
    assert ended.returncode == 2 and 'nowhere' in ended.stderr
    assert [file.name for file in (tmp_path / 'out').iterdir()] == ['.lock']
    assert run('sft.py')['run'].total == 6


def test_more_examples_than_the_epochs_have(run, capsys):
    run('sft.py', '--n_examples=20', '--n_epochs=2')
    out = capsys.readouterr().out
    assert 'note: the run ends after 12 of --n_examples=20: raise --n_epochs for more\n' in out
    assert 'training on 1 rank: 12 examples (2 epochs), ' in out
    run('sft.py', '--n_examples=4', '--batch_size=5', out='fewer')
    out = capsys.readouterr().out
    assert 'n_epochs' not in out and 'note: batch_size takes the whole run at once: 4 examples\n' in out


# ---- where it prints ----


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')
def test_stdout_on_a_full_disk(monkeypatch):
    """A run goes on, since its rows and its model are elsewhere; what only prints ends with a sentence."""
    with open('/dev/full', 'w') as full:
        command = [sys.executable, 'dpo.py', '--help']
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, 'error: cannot print: No space left on device\n')
    full = open('/dev/full', 'w')
    monkeypatch.setattr(sys, 'stdout', full)
    files.say('a line')
    monkeypatch.undo()
    with pytest.raises(OSError):
        full.close()


# ---- the output folder ----


def test_a_run_that_ends_while_another_waits_for_its_lock(run, refused, tmp_path, monkeypatch):
    run('dpo.py')
    (tmp_path / 'out').rename(tmp_path / 'done')
    lock = files.lock

    def wait(out_dir):
        shutil.copytree(tmp_path / 'done', out_dir, dirs_exist_ok=True)
        return lock(out_dir)

    monkeypatch.setattr(files, 'lock', wait)
    assert 'holds this run already (finished)' in refused('dpo.py')


def test_out_dir(run, refused, tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'link').symlink_to(tmp_path / 'nothing')
    for path in ('file', 'file/below', 'link', 'link/below'):
        assert str(tmp_path / path) in (message := refused('dpo.py', f'--out_dir={tmp_path / path}'))
        assert ('link is no folder, but a file or a link to nothing' in message) == path.startswith('link')
    run('dpo.py')
    kept = {f: f.read_bytes() for f in (tmp_path / 'out').rglob('*') if f.is_file()}
    message = refused('dpo.py', '--lr=1e-3')
    assert 'holds a different run' in message and 'lr 5e-07 there and 0.001 here' in message and '--out_dir' in message
    assert 'holds this run already' in refused('dpo.py', '--resume=false')
    assert {f: f.read_bytes() for f in (tmp_path / 'out').rglob('*') if f.is_file()} == kept  # and nothing is touched


@pytest.mark.parametrize('content', [
    '{"model_type": "llama", "vocab_size": 100}', '[]', '{"config": 3}', '\xff', 'null', '{"config": {}, "command": []}',
    '{"config": {}, "contents": 3}', '{"config": ',
])  # fmt: skip
def test_an_out_dir_that_is_no_run(refused, tmp_path, content):
    """The folder of a model, for one: its config.json is not ours, and stays."""
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/config.json').write_text(content, encoding='latin-1')
    assert 'config.json is damaged' in refused('sft.py')
    assert (tmp_path / 'out/config.json').read_text(encoding='latin-1') == content


# ---- what is no mistake ----


def test_without_evaluation(run, tmp_path):
    """And the learning rate of each step: 1, 2, 3 quarters."""
    run('dpo.py', '--n_eval_examples=0', '--eval_every=none', '--warmup_steps=3', '--lr=0.3')
    rows = metrics(tmp_path / 'out')
    assert {row['split'] for row in rows} <= {'train', 'check'} and rows[-1]['counters/examples'] == 6
    assert [row['lr'] for row in rows if row['split'] == 'train'] == pytest.approx([0.075, 0.15, 0.225])
    assert (tmp_path / 'out/model/config.json').exists()


@pytest.mark.parametrize('script', ['dpo.py', 'sft.py'])
def test_what_is_counted(run, script, tmp_path, capsys):
    """A file too small to hold anything out; long texts, which are cut; bad rows, which may be skipped."""
    small = write_jsonl(tmp_path / 'd.jsonl', PAIRS[:2])  # a sixth prompt in twenty is not there
    run(script, f'--data={small}', '--eval_data=none', out='a')
    assert 'and 0 to evaluate on' in capsys.readouterr().out
    found = run(script, '--max_length=7', '--max_prompt_length=4', out='b')['run']
    said = capsys.readouterr().out
    assert '6 prompts cut' in said and ' answers cut' in said and found.total == 6
    assert {tuple(x) for x in found.train.widths[:, :2].tolist()} == {(4, 3)} and (found.train.lengths > 0).all()
    run(script, '--data={world}/broken.jsonl+{world}/fields.jsonl', '--skip_bad_rows', out='c')
    line = r'^data: [69] training examples .* and 2 to evaluate on; (.*)$'
    (reasons,) = re.findall(line, capsys.readouterr().out, re.M)
    assert all(f'1 bad row: {reason} ' in reasons for reason in ('not valid JSON', "'rejected' is missing"))


@pytest.mark.parametrize('loss, line', [
    ('kto', 'importance = True\nsft_coef = 0.1'), ('tdpo2', 'reference_free = True'), ('simpo', "ref_model = 'nowhere'\ncache_ref = True"),
    ('dpo', 'gamma = 2.0'), ('kto_zero', 'label_smoothing = 0.7'),
])  # fmt: skip
def test_what_is_said_to_have_no_effect_has_none(run, tmp_path, capsys, loss, line):
    """A config file may set what the loss ignores; a note says so."""
    (tmp_path / 'ignored.py').write_text(line + '\n')
    run('dpo.py', f'--loss={loss}', str(tmp_path / 'ignored.py'), out='with')
    why = 'there is no reference' if 'ref_model' in line else f'the loss {loss} does not use it'
    note = rf'^note: {line.split()[0]} of \S*ignored.py has no effect: {why}$'
    assert re.search(note, capsys.readouterr().out, re.M)
    run('dpo.py', f'--loss={loss}', out='without')
    assert metrics(tmp_path / 'with') == metrics(tmp_path / 'without')


def test_importance_is_of_the_examples_own_reference(run, tmp_path):
    """1 before the first step, also where the loss compares with other examples' references."""
    run('dpo.py', '--loss=aot', '--importance')
    assert metrics(tmp_path / 'out')[0]['loss/train'] == pytest.approx(math.log(2), abs=1e-5)


def test_what_a_sample_has_not_said_is_not_in_its_kl(run, tmp_path, monkeypatch):
    """The KL of samples is that of the sampled tokens: no end of text is put behind an answer that did not say it."""
    drawn = itertools.cycle([[[5, 6, 7, 8, 9], [5, 6, 7]], [[5], [5]]])  # of the policy, and of the reference
    monkeypatch.setattr(generate, 'sample', lambda *args, **settings: next(drawn))
    run('dpo.py', '--sample_during_eval', '--max_new_tokens=5', '--n_eval_model_samples=2', '--lr=1e-2')
    last = metrics(tmp_path / 'out', 'eval')[-1]
    assert last['kl_eval/samples'] / last['kl_eval/samples_per_token'] == pytest.approx(4.0)
    # so do the rows of the samples
    rows = read_jsonl(tmp_path / 'out/samples.jsonl')[-4:]
    assert [row['tokens'] for row in rows] == [5, 3, 1, 1]
    mean = (rows[0]['logratio'] + rows[1]['logratio']) / 2
    assert mean == pytest.approx(last['kl_eval/samples'], abs=2e-6) and rows[2]['logratio'] != 0


PPO = ['--reward_model=gold', '--data=toy', '--eval_data=toy', '--n_examples=4', '--minibatch_size=2']


@pytest.fixture(scope='module')
def short(tmp_path_factory):
    """Folders of GPT-2s with 4 and with 256 positions, and of a Llama whose rope changes after 4."""
    folder = tmp_path_factory.mktemp('short')
    for positions in (4, 256):
        helpers.tiny_model(folder / str(positions), 'gpt2', max_position_embeddings=positions)
    rope = {'rope_type': 'dynamic', 'factor': 2.0, 'rope_theta': 1e4}
    helpers.tiny_model(folder / 'dynamic', 'llama', max_position_embeddings=4, rope_parameters=rope)
    return folder


FOUR = 'has 4 positions, and'


@pytest.mark.parametrize('script, flags, words', [  # nor may the reference, the critic or the samples be too long
    *((script, flags, words) for script in ('dpo.py', 'sft.py', 'reward.py', 'ppo.py')
      for flags, words in (('--model={short}/4', FOUR), ('--model={short}/dynamic', 'beyond 4 tokens Llama'))),
    *((script, '--model={short}/256 --ref_model={short}/4', FOUR) for script in ('dpo.py', 'ppo.py')),
    ('ppo.py', '--model={short}/256 --critic={short}/4', FOUR),
    ('dpo.py', '--model={short}/256 --sample_during_eval --max_new_tokens=300', 'and samples take'),
    ('sft.py', '--model={short}/256 --sample_during_eval --max_new_tokens=300', 'and samples take'),
    ('dpo.py', '--model={short}/256 --ref_model={short}/4 --cache_ref', 'has 4 positions'),
])  # fmt: skip
def test_more_tokens_than_positions(refused, short, script, flags, words):
    assert words in refused(script, *(PPO if script == 'ppo.py' else []), *flags.format(short=short).split())


def test_a_reference_or_critic_that_reads_other_tokens(refused, run, short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, 'WORDS', [*toy.WORDS[:-2], *toy.WORDS[:-3:-1]])  # as many tokens: two words change places
    other = helpers.tiny_model(tmp_path / 'other', 'gpt2', max_position_embeddings=256)
    monkeypatch.undo()
    model = f'--model={short}/256'
    words = 'reads other tokens than the model'
    for more in ([], ['--cache_ref']):
        assert words in refused('dpo.py', model, f'--ref_model={other}', *more)
    for option, who in (('ref_model', 'the reference'), ('critic', 'the critic')):
        assert who in refused('ppo.py', *PPO, model, f'--{option}={other}')
    judge = helpers.tiny_reward(tmp_path / 'reward', transformers.AutoTokenizer.from_pretrained(other))
    assert words in refused('ppo.py', *PPO, model, f'--reward_model={judge}')
    # but not where they are the same, or nobody can tell
    shutil.copytree(short / '256', tmp_path / 'same')
    run('dpo.py', model, f'--ref_model={tmp_path}/same', out='a')
    for file in (tmp_path / 'same').glob('*token*'):
        file.unlink()
    capsys.readouterr()
    run('dpo.py', model, f'--ref_model={tmp_path}/same', out='b')
    assert 'comes without a tokenizer' in capsys.readouterr().out


def test_samples_where_no_answer_is_good(run, tmp_path):
    for name, labels in (('mixed', [True, False]), ('bad', [False])):
        rows = [{'prompt': f'p{i}', 'completion': ' a b', 'label': labels[i % len(labels)]} for i in range(4)]
        write_jsonl(tmp_path / f'{name}.jsonl', rows)
    data = [f'--data={tmp_path}/mixed.jsonl', f'--eval_data={tmp_path}/bad.jsonl']
    run('dpo.py', '--loss=kto', *data, '--sample_during_eval', '--max_new_tokens=3')
    assert (tmp_path / 'out/samples.jsonl').read_text() == ''


def test_a_cached_reference_is_not_sampled(run, tmp_path, capsys):
    run('dpo.py', '--cache_ref', '--sample_during_eval', '--max_new_tokens=3')
    assert 'note: with --cache_ref the reference is not there to be sampled' in capsys.readouterr().out
    assert {row['generator'] for row in read_jsonl(tmp_path / 'out/samples.jsonl')} == {'policy'}
    assert not any('kl_eval/samples' in row for row in metrics(tmp_path / 'out'))


def test_prompts_alone_are_enough_for_grpo(run, tmp_path):
    run('reward.py', out='reward')
    sizes = ['--group_size=2', '--batch_size=4', '--minibatch_size=4', '--max_new_tokens=4', '--n_examples=8']
    prompts = ['--data={world}/prompts.jsonl', '--eval_data={world}/prompts.jsonl']
    run('ppo.py', '--loss=grpo', *sizes, *prompts, f'--reward_model={tmp_path}/reward/model')
    assert [row['counters/examples'] for row in metrics(tmp_path / 'out', 'train')] == [4, 8]


# ---- processes ----


DRIVER = """
import json, os, runpy, sys
from configurator import UserError
script, cases = sys.argv[1], json.loads(sys.argv[2])
for number, sys.argv in enumerate(cases):
    try:
        runpy.run_path(script, run_name='script')
    except UserError as error:
        if number == 0:
            hook = sys.excepthook  # as it is once there is a process group: torch has wrapped it
        if number == len(cases) - 1:
            hook(*sys.exc_info())
        sys.stdout.write(f'[{number} {os.environ["RANK"]}] {error}\\n')
        sys.stdout.flush()
"""


def test_two_processes_agree_and_do_not_hang(world, tmp_path):
    """Mistakes that one rank finds, or both; all but the last are caught, so that one launch does for all."""
    (tmp_path / 'file').write_text('')
    (tmp_path / 'driver.py').write_text(DRIVER)
    cases = [
        (['--batch_size=1'], 'batch_size 1 is'),
        ([f'--out_dir={tmp_path}/file'], 'cannot write to out_dir'),  # rank 0 alone
        (['--data={world}/broken.jsonl'], 'line 3: not valid JSON'),  # the first rank of a host before the others
        (['--eval_data={world}/missing.jsonl'], 'missing.jsonl'),
        (['--data={world}/equal_answers.jsonl'], 'no train examples are left'),
        (['--model={world}/damaged'], 'cannot load the model'),  # rank 0 reads the weights
        (['--loss=dop'], 'loss must be one of'),
        (['--model={world}/small'], 'the tokenizer has'),
    ]
    argv = []
    for i, (flags, _) in enumerate(cases):
        line = arguments(world, tmp_path / f'out{i}', flags)
        argv.append(['dpo.py', *{flag.partition('=')[0]: flag for flag in line}.values()])
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', tmp_path / 'driver.py']
    done = forks.python(*torchrun, ROOT / 'dpo.py', json.dumps(argv), PYTHONPATH=ROOT)
    for number, (_, words) in enumerate(cases[:-1]):
        for rank in range(2):
            (line,) = [x for x in done.stdout.splitlines() if x.startswith(f'[{number} {rank}] ')]
            assert words in line
    assert done.returncode != 0 and len(re.findall('^error: .*', done.stderr, re.M)) == 1
    assert re.search(f'^error: {cases[-1][1]}', done.stderr, re.M) and re.search(r'exitcode\s*: 2\b', done.stderr)
    assert 'driver.py", line' not in done.stderr  # no traceback of ours


@pytest.mark.parametrize('words, says', [
    ('dpo.py config/dpo_toy.py', r'the config file config/dpo_toy.py in {here}: No such file or directory'),
    ('dpo.py {root}/config/dpo_toy.py', "no model folder 'out/sft_toy/model' in {here}: train it first by python sft.py config/sft_toy.py, or"),
    ('sample.py --model=out/drdpo_hh/model', 'train it first by python dpo.py config/drdpo_hh.py, or'),
    ('sample.py --data=prompts.txt', "data 'prompts.txt' is no file or folder in {here} and no hub id"),
    ('label.py --gold=toy --answers=out/a.jsonl', 'no file or folder out/a.jsonl in {here}'),
    ('dpo.py --data=pairs.jsonl', "'pairs.jsonl' is no file or folder in {here} (did you mean pairs.json?) and"),
    ('dpo.py --data=pairs/*', "'pairs/*' is no file or folder in {here} (did you mean pairs.json?) and no hub id"),
    ('tools/plot.py out/a', 'no folder out/a in {here} (did you mean out/A7?)'),
    ('label.py --gold=toy --answers=uot/A7/samples.jsonl', 'no file or folder uot/A7/samples.jsonl in {here} (did you mean out?)'),
    ('dpo.py --data=paris.jsonl', "'paris.jsonl' is no file or folder in {here} (did you mean pairs.json?) and no hub id"),
    ('dpo.py --data=hh:{here}/pairs.jsonl', 'no file or folder {here}/pairs.jsonl (did you mean {here}/pairs.json?)'),
    ('dpo.py --model=./sfft/model', "no model folder './sfft/model' in {here} (did you mean sft?)"),
    ('ppo.py --loss=grpo --group_size=2 --data=toy --reward=own.pi.py:f', 'there is no file own.pi.py in {here} (did you mean own.py?)'),
])  # fmt: skip
def test_another_working_directory(words, says, tmp_path, monkeypatch):
    """A relative path, such as those in config files, is looked for where the user is; the sentence that misses it says where, and what is near."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out/A7').mkdir(parents=True)
    (tmp_path / 'sft').mkdir()
    for name in ('pairs.json', 'own.py'):
        (tmp_path / name).touch()
    places = {'here': tmp_path, 'root': helpers.ROOT}
    script, *flags = words.format(**places).split()
    with pytest.raises(UserError, match=re.escape(says.format(**places))):
        helpers.run_script(script, *flags)


# as of tokenizers at a pattern such as (a|a|aa)+$
PANIC = type('PanicException', (BaseException,), {})('Onig: retry-limit')


@pytest.mark.parametrize('error, says', [
    (PANIC, 'a library cannot go on (Onig: retry-limit)'),
    (PermissionError(errno.EACCES, 'Permission denied', 'theirs/x'), 'cannot use theirs/x: Permission denied'),
    (OSError(errno.ENAMETOOLONG, 'File name too long', 'n' * 300), 'nnn: File name too long'),
])  # fmt: skip
def test_errors_of_others_that_are_a_sentence(error, says, monkeypatch, capfd):
    codes = []
    monkeypatch.setattr('os._exit', codes.append)
    monkeypatch.setattr('sys.__stderr__', sys.stderr)
    errors.report(type(error), error, None)
    assert codes == [2] and says in capfd.readouterr().err
