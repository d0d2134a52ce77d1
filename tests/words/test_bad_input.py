"""Everything that a user can get wrong: one sentence that says what and where, exit code 2, no traceback, no hang.

Most cases run a script in this process, where the UserError can be caught; one ends a process, one a group of two."""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import configurator
from configurator import UserError
from hf import generate, load
from text import toy

ROOT = Path(configurator.__file__).parent
SCRIPTS = ['dpo.py', 'sft.py']
PAIRS = [{'prompt': f'place {i}:', 'chosen': f' good {i} .', 'rejected': f' bad {i} .'} for i in range(6)]


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder of good and bad files that the cases name."""
    folder = tmp_path_factory.mktemp('world')

    def write(name, *rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / name).write_text(''.join(line + '\n' for line in lines))

    write('good.jsonl', *PAIRS)
    write('broken.jsonl', *PAIRS[:2], '{"prompt": "p", "chosen": ', *PAIRS[2:])
    write('fields.jsonl', *PAIRS[:3], {'prompt': 'p', 'chosen': 'a'})
    write('empty_answers.jsonl', *({**row, 'chosen': '', 'rejected': ''} for row in PAIRS))
    write('one_empty.jsonl', *({**row, 'rejected': ''} for row in PAIRS))
    write('equal_answers.jsonl', *({**row, 'rejected': row['chosen']} for row in PAIRS))
    write('prompts.jsonl', *({'prompt': row['prompt']} for row in PAIRS))
    write('no_rows.jsonl')
    write('layout.jsonl', *({'ask': f'q{i}', 'chosen': 'a', 'rejected': 'b'} for i in range(6)))
    write('no_prompt.jsonl', *({**row, 'prompt': None} for row in PAIRS))
    write('half_repeated.jsonl', *({**row, 'chosen': row['prompt'] + row['chosen']} for row in PAIRS))
    write('table.xlsx', 'prompt,chosen,rejected')
    (folder / 'binary.jsonl').write_bytes(bytes(range(256)))
    (folder / 'binary.parquet').write_bytes(bytes(range(256)))
    (folder / 'binary.json').write_bytes(bytes(range(256)))
    (folder / 'no_data').mkdir()
    write('misspelt.py', 'beta = 0.1', 'lerning_rate = 1e-3')
    write('wrong_type.py', "lr = '1e-3'")
    write('broken.py', 'beta = = 1')
    write('note.py', 'gamma = 2.0')

    config = toy.model_config()
    config.vocab_size = 100  # the toy tokenizer has more ids
    for name in ('small', 'no_tokenizer'):
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    toy.tokenizer().save_pretrained(folder / 'small')
    toy.tokenizer().save_pretrained(folder / 'only_tokenizer')
    shutil.copytree(folder / 'small', folder / 'no_eos')
    settings = json.loads((folder / 'no_eos' / 'tokenizer_config.json').read_text())
    settings.pop('eos_token')
    (folder / 'no_eos' / 'tokenizer_config.json').write_text(json.dumps(settings))
    shutil.copytree(folder / 'small', folder / 'damaged')
    (folder / 'damaged' / 'model.safetensors').write_bytes(b'damaged')
    yield folder
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.delenv('RANK', raising=False)


def arguments(world, out_dir, flags):
    """The command line of a run of three steps, with {world} in flags filled in. Flags replace what is there."""
    flags = [flag.format(world=world) for flag in flags]
    default = {'data': f'{world}/good.jsonl', 'eval_data': f'{world}/good.jsonl', 'out_dir': str(out_dir)}
    default |= {'batch_size': '2', 'n_eval_examples': '2', 'warmup_steps': '0'}
    given = {flag[2:].partition('=')[0] for flag in flags}
    return [f'--{k}={v}' for k, v in default.items() if k not in given] + flags


@pytest.fixture
def run(world, tmp_path):
    """run(script, *flags) -> the globals of the script after it has run."""

    def run(script, *flags, out_dir=tmp_path / 'out'):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', [script, *arguments(world, out_dir, flags)])
            patch.setattr(torch, 'set_num_threads', lambda n: None)  # one thread is faster for models this small
            return runpy.run_path(str(ROOT / script), run_name='script')

    return run


def refused(run, script, *flags, **more):
    with pytest.raises(UserError) as info:
        run(script, *flags, **more)
    message = str(info.value)
    assert '\n' not in message and len(message) < 600
    return message


# (flags, what the message says), for both scripts
BOTH = [
    # the command line and config files
    (['--lerning_rate=1e-3'], 'lerning_rate'),
    (['--bach_size=4'], 'did you mean batch_size'),
    (['{world}/misspelt.py'], r'misspelt\.py, line [12]: unknown option'),
    (['{world}/wrong_type.py'], r"wrong_type\.py, line 1: lr must be float, not '1e-3'"),
    (['{world}/broken.py'], r'broken\.py, line 1: SyntaxError'),
    (['{world}/missing.py'], r'missing\.py'),
    (['--lr=fast'], 'lr must be float'),
    # data
    (['--data={world}/missing.jsonl'], r'missing\.jsonl'),
    (['--data=hh:{world}/missing.jsonl'], r'no file or folder .*missing\.jsonl'),
    (['--data=unknown'], 'known datasets'),
    (['--eval_data={world}/missing.jsonl'], r'missing\.jsonl'),
    (['--data={world}/good.jsonl+{world}/missing.jsonl'], r'missing\.jsonl'),
    (['--data={world}/table.xlsx'], r'table\.xlsx: data files end in'),
    (['--data={world}/binary.jsonl'], r'binary\.jsonl, line 1'),
    (['--data={world}/binary.json'], r'binary\.json'),
    (['--data={world}/binary.parquet'], r'binary\.parquet'),
    (['--data={world}/no_data'], r'no_data has no data file'),
    (['--data={world}/broken.jsonl'], r'broken\.jsonl, line 3: not valid JSON'),
    (['--eval_data={world}/broken.jsonl'], r'broken\.jsonl, line 3: not valid JSON'),
    (['--data={world}/fields.jsonl'], r"fields\.jsonl, line 4: 'rejected' is missing"),
    (['--data=hh:{world}/good.jsonl'], r"good\.jsonl, line 1: no '.*Assistant:' in the dialogue"),
    (['--data={world}/empty_answers.jsonl'], 'no train examples are left.*empty answers.*6'),
    (['--data={world}/prompts.jsonl'], 'no train examples are left.*6'),
    (['--data={world}/no_rows.jsonl'], 'no train examples are left'),
    (['--data={world}/layout.jsonl'], r"layout\.jsonl, line 1: no column has the prompt.*'ask' \(text\).*it is the layout.*README"),
    (['--data={world}/no_prompt.jsonl'], r"no_prompt\.jsonl, line 1: no column has the prompt.*'prompt' \(null\)"),
    (['--data={world}/half_repeated.jsonl'], r'half_repeated\.jsonl, line 1: only one of'),
    (['--data={world}/good.jsonl+{world}/layout.jsonl', '--skip_bad_rows'], r'no train examples .*layout\.jsonl.*bad rows.*6'),
    (['--eval_data={world}/layout.jsonl', '--skip_bad_rows'], r'no test examples .*layout\.jsonl.*bad rows.*6'),
    # models
    (['--model={world}/nothing'], 'nothing'),
    (['--model={world}/no_tokenizer'], 'tokenizer'),
    (['--model={world}/only_tokenizer'], 'cannot load the model'),
    (['--model={world}/damaged'], 'cannot load the model'),
    (['--model={world}/no_eos'], 'eos_token'),
    (['--model={world}/small'], r'the tokenizer has \d+ ids but the model .* embeds 100'),
    # values
    (['--optimizer=adam'], "optimizer must be .*AdamW.*'adam'"),
    (['--lr_schedule=step'], "lr_schedule must be .*cosine.*'step'"),
    (['--dtype=float16'], "dtype must be .*bfloat16.*'float16'"),
    (['--truncation=middle'], "truncation must be .*start.*'middle'"),
    *(([f'--{name}={value}'], rf'{name} .*{value}')
      for name in ('batch_size', 'max_tokens', 'n_examples', 'n_epochs', 'max_length', 'max_prompt_length', 'log_every',
                   'num_turns', 'keep_last', 'max_new_tokens')
      for value in (0, -1)),
    *(([f'--{name}=-1'], rf'{name} .*-1')
      for name in ('n_eval_examples', 'warmup_steps', 'n_eval_model_samples', 'eval_every', 'save_every', 'lr',
                   'weight_decay', 'temperature')),
    *(([f'--{name}={value}'], rf'{name} .*{value}')
      for name, value in (('noise_rate', 1.5), ('noise_rate', -0.5), ('data_fraction', 1.5), ('data_fraction', -0.5),
                          ('top_p', -1), ('top_p', 1.5), ('top_p', 0), ('max_grad_norm', 0))),
    (['--data_fraction=0'], 'data_fraction|no train examples are left'),
    (['--max_length=8', '--max_prompt_length=7'], 'max_length .*8'),  # no room but for an end of text
    (['--max_length=8', '--max_prompt_length=8'], 'max_length .*8'),
    (['--max_length=8', '--max_prompt_length=9'], 'max_length .*8'),
]  # fmt: skip
DPO = [
    (['--loss=dop'], "loss must be one of .*'dop'"),
    (['--data={world}/one_empty.jsonl'], 'no train examples are left.*empty answers.*6'),
    (['--data={world}/equal_answers.jsonl'], 'no train examples are left.*equal answers.*6'),
    (['--ref_model={world}/nothing'], 'nothing'),
    (['--ref_model={world}/small'], r'the tokenizer has \d+ ids but the model .* embeds 100'),
    (['--gamma=2'], '--gamma has no effect: the loss dpo'),
    (['--loss=simpo', '--reference_free'], '--reference_free has no effect: the loss simpo'),
    (['--frac_good=0.5'], '--frac_good has no effect'),
    (['--importance_max=5'], '--importance_max has no effect'),
    (['--loss=exo', '--label_smoothing=0'], 'label_smoothing must .*exo'),
    (['--loss=cdpo', '--label_smoothing=0.5'], 'label_smoothing must .*0.5'),
    (['--loss=cdpo', '--label_smoothing=-0.1'], 'label_smoothing must .*-0.1'),
    (['--loss=radpo1', '--risk=none'], "risk must be one of .*cvar.*'none'"),
    (['--beta_prime=0'], 'beta_prime must .*0'),
    (['--loss=kto', '--batch_size=1'], 'kto'),
    (['--loss=kto', '--frac_good=1.5'], 'frac_good .*1.5'),
    (['--loss=kto', '--frac_bad=-1'], 'frac_bad .*-1'),
    (['--loss=kto', '--frac_good=0', '--frac_bad=0'], 'frac_good|no train examples'),
]
CASES = [(script, *case) for script in SCRIPTS for case in BOTH] + [('dpo.py', *case) for case in DPO]


@pytest.mark.parametrize('script, flags, words', CASES, ids=lambda x: ' '.join(x) if isinstance(x, list) else None)
def test_one_sentence(run, script, flags, words):
    message = refused(run, script, *flags)
    assert re.search(words, message), message


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize(
    'flags',
    [
        ['--optimizer=adam'],
        ['--lr_schedule=step'],
        ['--data={world}/broken.jsonl'],
        ['--model={world}/nothing'],
        ['--model={world}/small'],
    ],
)
def test_a_run_that_never_began_does_not_claim_its_folder(run, script, flags):
    refused(run, script, *flags)
    assert run(script)['run'].total == 6


# ---- the output folder ----


@pytest.mark.parametrize('script', SCRIPTS)
def test_out_dir(run, script, world, tmp_path):
    (tmp_path / 'file').write_text('')
    for path in ('file', 'file/below'):
        assert str(tmp_path / path) in refused(run, script, f'--out_dir={tmp_path / path}')
    run(script)
    kept = {f: f.read_bytes() for f in (tmp_path / 'out').rglob('*') if f.is_file()}
    message = refused(run, script, '--lr=1e-3')
    assert 'holds a different run' in message and 'lr 5e-07 there and 0.001 here' in message and '--out_dir' in message
    message = refused(run, script, '--resume=false')
    assert 'holds this run already' in message
    assert {f: f.read_bytes() for f in (tmp_path / 'out').rglob('*') if f.is_file()} == kept  # and nothing is touched
    for damaged in (
        'null',
        '{"config": {}, "command": []}',
        '{"config": {}, "contents": 3}',
        '{"config": {}, "command": 3}',
    ):
        (tmp_path / 'out' / 'config.json').write_text(damaged)
        assert 'config.json is damaged' in refused(run, script)
    (tmp_path / 'out' / 'config.json').write_text('{"config": ')
    assert 'config.json is damaged' in refused(run, script)


@pytest.mark.parametrize('content', ['{"model_type": "llama", "vocab_size": 100}', '[]', '{"config": 3}', '\xff'])
def test_an_out_dir_that_is_no_run(run, tmp_path, content):
    """The folder of a model, for one: its config.json is not ours, and stays."""
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'config.json').write_text(content, encoding='latin-1')
    assert 'config.json' in refused(run, 'sft.py')
    assert (tmp_path / 'out' / 'config.json').read_text(encoding='latin-1') == content


# ---- what is no mistake ----


@pytest.mark.parametrize('script', SCRIPTS)
def test_without_evaluation(run, script, tmp_path):
    run(script, '--n_eval_examples=0', '--eval_every=2', '--sample_during_eval')
    rows = [json.loads(line) for line in (tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()]
    assert {row['split'] for row in rows} <= {'train', 'check'} and rows[-1]['counters/examples'] == 6
    assert (tmp_path / 'out' / 'model' / 'config.json').exists()


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_file_too_small_to_hold_anything_out(run, script, tmp_path, capsys):
    """A sixth prompt in twenty is not there."""
    (tmp_path / 'd.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in PAIRS[:2]))
    from text.sources import load_rows

    assert [len(load_rows(str(tmp_path / 'd.jsonl'), split)[0]) for split in ('train', 'test')] == [2, 0]
    run(script, f'--data={tmp_path}/d.jsonl', '--eval_data=none')
    assert 'data: 2 training and 0 evaluation examples' in capsys.readouterr().out


@pytest.mark.parametrize('script', SCRIPTS)
def test_long_texts_are_cut_and_counted(run, script, capsys):
    scope = run(script, '--max_length=7', '--max_prompt_length=4')
    out = capsys.readouterr().out
    assert "'prompts cut': 6" in out and "'answers cut'" in out
    assert (scope['run'].train.lengths > 0).all() and scope['run'].total == 6
    (spans,) = {tuple(x) for x in scope['run'].train.widths[:, :2].tolist()}
    assert spans == (4, 3)


@pytest.mark.parametrize('script', SCRIPTS)
def test_bad_rows_can_be_skipped_and_are_counted(run, script, capsys):
    run(script, '--data={world}/broken.jsonl+{world}/fields.jsonl', '--skip_bad_rows')
    reasons = re.search(r'^data: [69] training and 2 evaluation examples; .*{(.*)}$', capsys.readouterr().out, re.M)[1]
    assert re.search(r'bad rows: not valid JSON [^:]*: 1\b', reasons)
    assert re.search(r"bad rows: 'rejected' is missing [^:]*: 1\b", reasons)


def test_a_config_file_may_set_what_the_loss_ignores(run, capsys):
    run('dpo.py', '{world}/note.py')
    out = capsys.readouterr().out
    assert re.search(r'^note: gamma of \S*note\.py has no effect: the loss dpo does not use it$', out, re.M)


def numbers(folder):
    """The rows of metrics.jsonl, without speeds."""
    found = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith('_per_second')} for row in found]


@pytest.mark.parametrize(('loss', 'line'), [
    ('simpo', 'importance = True'), ('kto', 'importance = True'), ('kto', 'sft_coef = 0.1'), ('tdpo2', 'reference_free = True'),
    ('simpo', "ref_model = 'nowhere'"),
])  # fmt: skip
def test_what_is_said_to_have_no_effect_has_none(run, tmp_path, capsys, loss, line):
    (tmp_path / 'ignored.py').write_text(line + '\n')
    run('dpo.py', f'--loss={loss}', str(tmp_path / 'ignored.py'), out_dir=tmp_path / 'with')
    assert re.search(rf'^note: {line.split()[0]} of \S*ignored.py has no effect: ', capsys.readouterr().out, re.M)
    run('dpo.py', f'--loss={loss}', out_dir=tmp_path / 'without')
    assert numbers(tmp_path / 'with') == numbers(tmp_path / 'without')


def test_importance_is_of_the_examples_own_reference(run, tmp_path):
    """1 before the first step, also where the loss compares with other examples' references."""
    run('dpo.py', '--loss=aot', '--importance', out_dir=tmp_path / 'run')
    assert numbers(tmp_path / 'run')[0]['loss/train'] == pytest.approx(math.log(2), abs=1e-5)


def test_what_a_sample_has_not_said_is_not_in_its_kl(run, tmp_path, monkeypatch):
    """The KL of samples is that of the sampled tokens: no end of text is put behind an answer that did not say it."""
    drawn = [('policy', 0, [5, 6, 7, 8, 9]), ('policy', 1, [5, 6, 7]), ('reference', 0, [5]), ('reference', 1, [5])]
    monkeypatch.setattr(generate, 'sample', lambda *args, **settings: drawn)
    flags = ['--sample_during_eval', '--max_new_tokens=5', '--n_eval_model_samples=2', '--lr=1e-2']
    run('dpo.py', *flags, out_dir=tmp_path / 'run')
    last = next(row for row in reversed(numbers(tmp_path / 'run')) if row['split'] == 'eval')
    assert last['kl_eval/samples'] / last['kl_eval/samples_per_token'] == pytest.approx(4.0)


def test_flags_of_samples_that_are_not_drawn(run):
    for script in ('dpo.py', 'sft.py'):
        assert '--temperature has no effect: sample_during_eval is off' in refused(run, script, '--temperature=0.3')
    assert '--ref_model has no effect: there is no reference' in refused(
        run, 'dpo.py', '--loss=simpo', '--ref_model=toy'
    )
    assert 'lora_rank freezes them' in refused(run, 'sft.py', '--control_tokens', '--lora_rank=2')


@pytest.fixture(scope='module')
def short(tmp_path_factory):
    """Folders of GPT-2s with 4 and with 256 positions."""
    folder, tokenizer = tmp_path_factory.mktemp('short'), toy.tokenizer()
    for n in (4, 256):
        config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=n)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder / str(n))
        tokenizer.save_pretrained(folder / str(n))
    sizes = {'vocab_size': len(tokenizer), 'hidden_size': 16, 'intermediate_size': 16, 'num_hidden_layers': 1,
             'num_attention_heads': 2, 'max_position_embeddings': 4}  # fmt: skip
    rope = {'rope_type': 'dynamic', 'factor': 2.0, 'rope_theta': 1e4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=rope)).save_pretrained(
        folder / 'dynamic'
    )
    tokenizer.save_pretrained(folder / 'dynamic')
    return folder


@pytest.mark.parametrize('script', ['dpo.py', 'sft.py', 'reward.py', 'ppo.py'])
def test_more_tokens_than_positions(run, short, script):
    flags = ['--reward_model=gold', '--data=toy', '--eval_data=toy', '--n_examples=4'] if script == 'ppo.py' else []
    more = ['--minibatch_size=2'] if flags else []
    assert 'has 4 positions, and' in refused(run, script, f'--model={short}/4', *flags, *more)
    assert 'beyond 4 tokens Llama' in refused(run, script, f'--model={short}/dynamic', *flags, *more)
    if script in ('dpo.py', 'ppo.py'):  # nor may the reference, or the critic, be too short
        assert 'has 4 positions, and' in refused(
            run, script, f'--model={short}/256', f'--ref_model={short}/4', *flags, *more
        )
    if script == 'ppo.py':
        assert 'has 4 positions, and' in refused(
            run, script, f'--model={short}/256', f'--critic={short}/4', *flags, *more
        )
    if script == 'dpo.py':
        sampling = ['--sample_during_eval', '--max_new_tokens=300']
        assert 'and samples take' in refused(run, script, f'--model={short}/256', *sampling)
        assert 'has 4 positions' in refused(
            run, script, f'--model={short}/256', f'--ref_model={short}/4', '--cache_ref'
        )


def other_tokens(folder, kind):
    """A model folder with as many tokens, two of which have changed places, or one of which has another name."""
    config = transformers.GPT2Config(vocab_size=len(toy.tokenizer()), n_embd=16, n_layer=1, n_head=2, n_positions=256)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    file = folder / 'tokenizer.json'
    table = json.loads(file.read_text())
    special = {entry['content'] for entry in table['added_tokens']}
    vocabulary = table['model']['vocab']
    a, b = [token for token in vocabulary if token not in special][-2:]
    if kind == 'swapped':
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    else:
        table['model']['merges'] = [
            m for m in table['model']['merges'] if ''.join(m).replace(' ', '') != b.replace(' ', '')
        ]
        vocabulary['zzz'] = vocabulary.pop(b)
    file.write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize('kind', ['swapped', 'renamed'])
def test_a_reference_or_critic_that_reads_other_tokens(run, short, tmp_path, kind):
    other = other_tokens(tmp_path / 'other', kind)
    words = 'reads other tokens than the model'
    model = f'--model={short}/256'
    assert words in refused(run, 'dpo.py', model, f'--ref_model={other}')
    assert words in refused(run, 'dpo.py', model, f'--ref_model={other}', '--cache_ref')
    ppo = ['--reward_model=gold', '--data=toy', '--eval_data=toy', '--n_examples=4', '--minibatch_size=2', model]
    assert 'the reference' in refused(run, 'ppo.py', *ppo, f'--ref_model={other}')
    assert 'the critic' in refused(run, 'ppo.py', *ppo, f'--critic={other}')
    assert words in refused(run, 'ppo.py', *ppo[1:], f'--reward_model={reward_model(tmp_path, other)}')


def reward_model(folder, other):
    """A reward model with the tokenizer of another folder."""
    config = toy.model_config()
    config.num_labels, config.vocab_size = 1, config.vocab_size + 1
    tokenizer = load.separate_pad(transformers.AutoTokenizer.from_pretrained(other))
    config.pad_token_id = tokenizer.pad_token_id
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / 'reward')
    tokenizer.save_pretrained(folder / 'reward')
    return folder / 'reward'


def test_a_reference_with_the_same_tokens_or_without_a_tokenizer(run, short, tmp_path, capsys):
    shutil.copytree(short / '256', tmp_path / 'same')
    run('dpo.py', f'--model={short}/256', f'--ref_model={tmp_path}/same', out_dir=tmp_path / 'a')
    for file in (tmp_path / 'same').glob('*token*'):
        file.unlink()
    capsys.readouterr()
    run('dpo.py', f'--model={short}/256', f'--ref_model={tmp_path}/same', out_dir=tmp_path / 'b')
    assert 'comes without a tokenizer' in capsys.readouterr().out


def test_samples_where_no_answer_is_good(run, tmp_path):
    row = {'prompt': 'p', 'completion': ' a b'}
    for name, thumbs in (('mixed', [True, False]), ('bad', [False])):
        lines = [json.dumps(row | {'prompt': f'p{i}', 'label': thumbs[i % len(thumbs)]}) for i in range(4)]
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
    data = [f'--data={tmp_path}/mixed.jsonl', f'--eval_data={tmp_path}/bad.jsonl']
    run('dpo.py', '--loss=kto', *data, '--sample_during_eval', '--max_new_tokens=3', out_dir=tmp_path / 'run')
    assert (tmp_path / 'run/samples.jsonl').read_text() == ''


def test_importance_needs_a_reference(run):
    assert 'leave out --reference_free' in refused(run, 'dpo.py', '--importance', '--reference_free')


def test_a_cached_reference_is_not_sampled(run, tmp_path, capsys):
    run('dpo.py', '--cache_ref', '--sample_during_eval', '--max_new_tokens=3', out_dir=tmp_path / 'run')
    assert 'note: with --cache_ref the reference is not there to be sampled' in capsys.readouterr().out
    names = {json.loads(line)['generator'] for line in (tmp_path / 'run/samples.jsonl').read_text().splitlines()}
    assert names == {'policy'} and not any('kl_eval/samples' in row for row in numbers(tmp_path / 'run'))


def test_prompts_alone_are_enough_for_grpo(run, tmp_path):
    run('reward.py', out_dir=tmp_path / 'reward')
    flags = [
        '--loss=grpo',
        '--group_size=2',
        '--batch_size=4',
        '--minibatch_size=4',
        f'--reward_model={tmp_path}/reward/model',
        '--max_new_tokens=4',
    ]
    flags += ['--data={world}/prompts.jsonl', '--eval_data={world}/prompts.jsonl', '--n_examples=8']
    run('ppo.py', *flags, out_dir=tmp_path / 'run')
    assert [row['counters/examples'] for row in numbers(tmp_path / 'run') if row['split'] == 'train'] == [4, 8]


# ---- processes ----

ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}


def test_a_process_ends_with_code_2_and_one_line(world, tmp_path):
    flags = arguments(world, tmp_path / 'out', ['--model={world}/small'])  # found late, with a process group alive
    env = {**ENV, 'NANOPREF_CACHE': str(tmp_path / 'cache')}
    done = subprocess.run(
        [sys.executable, ROOT / 'dpo.py', *flags], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2 and re.fullmatch(r'error: the tokenizer has .*\n', done.stderr), done.stderr


DRIVER = """
import json, os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
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
        (['--optimizer=adam'], 'optimizer must be'),
        (['--loss=dop'], 'loss must be one of'),
        (['--model={world}/small'], 'the tokenizer has'),
    ]
    argv = [['dpo.py', *arguments(world, tmp_path / f'out{i}', flags)] for i, (flags, _) in enumerate(cases)]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command += [str(tmp_path / 'driver.py'), str(ROOT / 'dpo.py'), json.dumps(argv)]
    env = {**ENV, 'NANOPREF_CACHE': str(tmp_path / 'cache')}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    for number, (_, words) in enumerate(cases[:-1]):
        for rank in range(2):
            (line,) = [x for x in done.stdout.splitlines() if x.startswith(f'[{number} {rank}] ')]
            assert words in line
    assert done.returncode != 0 and len(re.findall('^error: .*', done.stderr, re.M)) == 1
    assert re.search(f'^error: {cases[-1][1]}', done.stderr, re.M) and re.search(r'exitcode\s*: 2\b', done.stderr)
    assert 'driver.py", line' not in done.stderr  # no traceback of ours
