"""Reward functions of the user's own: the option, what a function may give, mistakes in it, worker processes, and ppo.py with them."""

import os
import re

import pytest
import torch
from helpers import ROOT, metrics, read_jsonl, refused, run_script, sentence, system, tiny_model, user, write_jsonl
from tokenizers import decoders, pre_tokenizers

from configurator import Config, UserError
from experiments import rewards, sums
from hf import load
from rl import reward_functions
from runtime import log
from runtime.values import SECRETS
from tests import forks
from text import toy
from text.readers import Row

ROWS = [{'prompt': f'Say {i}:', 'answer': str(i)} for i in range(40)]
ONE = 'def f(prompts, responses, rows): return [1.0] * len(rows)'
PROMPTS, RESPONSES = [row['prompt'] for row in ROWS], [row['answer'] for row in ROWS]


@pytest.fixture
def score(tmp_path):
    """score(text, n=40, workers=None): the answers to the first rows, by the function f of a file with this text."""

    def of(text, rows=ROWS, workers=None):
        file = tmp_path / 'own.py'
        file.write_text(text)
        (part,) = reward_functions.parse(f'{file}:f')
        return reward_functions.score(part, PROMPTS, RESPONSES, rows, workers)

    return of


# ---- the option ----


def test_a_sum_of_functions_and_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ('a.py', 'b.py'):
        (tmp_path / file).write_text(ONE)
    (tmp_path / 'out/reward/model').mkdir(parents=True)
    (tmp_path / 'out/reward/model/config.json').touch()
    found = reward_functions.parse('a.py:f*1 + b.py:f * -0.2+out/reward + gold*2')
    assert [(part.name, part.weight) for part in found] == [('f_1', 1), ('f_2', -0.2), ('reward', 1), ('gold', 2)]
    assert found[2].function_or_model == 'out/reward/model' and found[0].file == str(tmp_path / 'a.py')
    # a path that is not here is one of the project's
    (own,) = reward_functions.parse('experiments/rewards.py:gsm8k')
    assert reward_functions.call(own, [''], ['#### 4'], [{'answer': '#### 4'}]) == [1.0]


@pytest.mark.parametrize('text, words', [
    ('nowhere.py:f', 'there is no file nowhere.py in '),
    ('experiments/rewards.py', 'say which function of experiments/rewards.py'),
    ('experiments/rewards.py:', 'say which function of experiments/rewards.py'),
    ('experiments/rewards.py:nothing', 'has no function nothing; it has gsm8k, '),
    ('gold*much', "cannot read 'gold*much'"), ('gold + ', "cannot read ''"), ('gold*inf', 'cannot read'), ('gold*', 'cannot read'),
])  # fmt: skip
def test_options_that_mean_nothing(text, words):
    assert words in sentence(reward_functions.parse, text)


def test_a_flag_goes_before_a_config_file(tmp_path, monkeypatch, capsys):
    """config/grpo_toy.py names gold; two flags are one too many."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own.py').write_text(ONE)
    config = Config({'reward': 'own.py:f', 'reward_model': 'gold', 'data': 'toy', 'offline': False})
    config.origin = {'reward': 'command line', 'reward_model': 'config/grpo_toy.py'}
    (part,) = reward_functions.parts_of_options(config, None)
    assert part.file and config.reward_model is None
    note = "note: --reward=own.py:f scores, instead of the reward_model 'gold' of config/grpo_toy.py"
    assert note in capsys.readouterr().out
    config['reward_model'], config.origin['reward_model'] = 'gold', 'command line'
    assert "write one sum, --reward='own.py:f + gold'" in sentence(reward_functions.parts_of_options, config, None)


@pytest.mark.parametrize('option, other', [('reward', 'reward_model'), ('reward_model', 'reward')])
def test_files_of_two_reward_models_are_hashed(tmp_path, monkeypatch, option, other):
    monkeypatch.chdir(tmp_path)
    for name in ('a', 'b', 'gold'):  # gold is no model, whatever lies in a folder of that name
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text('{}')
    config = Config({option: 'a + b*0.5 + gold', other: None, 'data': 'toy', 'offline': False})
    config.origin = dict.fromkeys([*config, 'reward_workers', 'reward_timeout'], 'default')
    reward_functions.parts_of_options(config, None)
    before = load.fingerprints(config)
    assert before[option].keys() == {'a/config.json', 'b/config.json'} and config[other] is None
    (tmp_path / 'b/config.json').write_text('{ }')
    run = {'script': '', 'options': config, 'contents': before}
    words = f"{option} 'a . b.0.5 . gold' has changed since: b/config.json"
    with pytest.raises(UserError, match=words):
        log.check_same('out holds', run, run | {'contents': load.fingerprints(config)})


# ---- what a function is and gives ----


@pytest.mark.parametrize('text, expected', [
    ('def f(prompts, responses, rows):\n    print("hello")\n    return [float(p == r["prompt"]) for p, r in zip(prompts, rows)]', 1.0),
    ('f = lambda prompts, responses, rows: [row["answer"] == response for row, response in zip(rows, responses)]', 1.0),
    ('async def f(p, responses, rows):\n    import asyncio\n    await asyncio.sleep(0)\n    return [2] * len(rows)', 2.0),
    ('import numpy as np\ndef f(p, responses, rows): return list(np.full(len(rows), 3, np.float32))', 3.0),
    ('import torch\ndef f(p, responses, rows): return torch.full((len(rows),), 4.0)', 4.0),
    ('from neighbour import five\ndef f(p, responses, rows): return [five] * len(rows)', 5.0),
    ('from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Seven:\n    x: int = 7\n'
     'def f(p, responses, rows): return [Seven().x] * len(rows)', 7.0),
    ('class F:\n    def __call__(self, p, responses, rows): return tuple(6 for _ in rows)\nf = F()', 6.0),
])  # fmt: skip
def test_functions_of_all_kinds(text, expected, score, tmp_path):
    (tmp_path / 'neighbour.py').write_text('five = 5')
    assert score(text) == ([expected] * 40, [False] * 40)


def test_user_code_leaves_the_run_as_it_was(score, tmp_path):
    """Wherever it goes, and whatever it does to gradients: also while the file is loaded."""
    text = 'import os, torch\nos.chdir("/")\ntorch.set_grad_enabled(False)\ndef f(p, r, rows):\n    {}\n    return [1.0] * len(r)'
    before = os.getcwd()
    score(text.format('os.chdir("/"); torch.set_grad_enabled(False)'))
    assert os.getcwd() == before and torch.is_grad_enabled()


MIXED = 'def f(prompts, responses, rows):\n    return [{} if row["answer"] == "37" else 1.0 for row in rows]'


@pytest.mark.parametrize('text, sentence', [
    # the row, the line, and what it says
    ('def f(p, responses, rows):\n    return [row["solution"] for row in rows]',
     r"f of .*py fails at data, line 0: KeyError: 'solution' \(line 2: return .*\); its columns are prompt, answer"),
    (MIXED.format('1 / 0'), r'fails at data, line 37: ZeroDivisionError: division by zero \(line 2: '),
    (MIXED.format('None'), 'fails at data, line 37: it returned None, where a finite number is wanted'),
    (MIXED.format('float("nan")'), r'line 37: it returned nan, '), (MIXED.format('10**400'), 'line 37: it returned an integer beyond all floats'), (MIXED.format('10**5000'), 'beyond all floats'),
    (MIXED.format('"1"'), r"line 37: it returned '1', "),
    (MIXED.format('exit()'), 'line 37: SystemExit'),
    ('def f(p, responses, rows): return 0.5', r'it returned 0\.5, where a list of 1 numbers'),
    ('def f(p, responses, rows): return None', 'it returned None, where a list'),
    ('def f(p, responses, rows): return [1.0] * 3', r'it returned \[1.0, 1.0, 1.0\], where a list of 1 numbers'),
    ('def f(p, responses, rows): return [1.0] if len(rows) == 1 else 1 / 0', 'ZeroDivisionError.*no answer alone makes it fail'),
    # the file
    ('def f(completions, **more): pass', r'f\(completions, \*\*more\) of .* is called as f\(prompts, responses, rows\)'),
    ('def g(p, responses, rows): pass\nx = 1', 'has no function f; it has g'),
    ('f = 1', 'has no function f; it has none'),
    ('import nowhere_at_all\ndef f(a, b, c): pass', r"cannot load .*ModuleNotFoundError: No module named .* \(line 1: import"),
    ('def f(:', r'cannot load .*SyntaxError.*line 1'),
])  # fmt: skip
def test_a_mistake_names_row_and_function(text, sentence, score):
    rows = [Row(row) for row in ROWS]
    for i, row in enumerate(rows):
        row.where = f'data, line {i}'
    with pytest.raises(UserError, match=sentence):
        score(text, rows)


@pytest.mark.parametrize('text', ['import os\ndef f(p, responses, rows): os._exit(0)', 'import os\nos._exit(0)'])
def test_no_function_ends_the_run_as_if_it_were_done(text, tmp_path):
    (tmp_path / 'own.py').write_text(text)
    call = f'r.score(*r.parse("{tmp_path}/own.py:f"), ["p"], ["a"], [dict()])'
    done = forks.python('-c', f'from rl import reward_functions as r; {call}')
    assert done.returncode == 1 and 'SystemExit: os._exit(0) would end the run (line 2: ' in done.stderr
    # after a signal, runtime/guard.py may end the process there
    done = forks.python('-c', f'from rl import reward_functions as r; r.guard._code = 130; {call}')
    assert done.returncode == 0 and not done.stderr


SLOW = """
import os, subprocess
def f(prompts, responses, rows):
    (response,) = responses
    print('from a worker')
    if response == '3':
        child = subprocess.Popen(['sleep', '600'])
        open('child', 'w').write(str(child.pid))
        child.wait()
    while response == '5': pass
    if response == '7': 1 / 0
    if response == '9': os._exit(4)
    if response == '11': raise KeyboardInterrupt
    if response == '13' and not os.fork(): raise OSError
    if response == '15': os.kill(os.getpid(), 9)
    if response == '17' and not os.fork(): os._exit(0)
    if response == '19': return [list(os.environ.values()).count('sk-made-up')]
    return [os.getpid()]
"""


def test_workers_are_several_and_have_a_limit(tmp_path, monkeypatch):
    """A late answer gets 0 and leaves no process behind; the others come in order; an error names its row. They see no keys."""
    monkeypatch.chdir(tmp_path)
    for name in (*SECRETS, 'MINE'):
        monkeypatch.setenv(name, 'sk-made-up')
    (tmp_path / 'slow.py').write_text(SLOW)
    (own,) = reward_functions.parse('slow.py:f')
    workers = reward_functions.Workers(own, 2, timeout=1.0)

    def score(*which):
        part = slice(*which)
        return reward_functions.score(own, PROMPTS[part], RESPONSES[part], ROWS[part], workers)

    values, late = score(7)
    assert late == [i in (3, 5) for i in range(7)] and [value == 0 for value in values] == late
    assert os.getpid() not in values and len(set(values)) > 2
    # nobody waits for a child that was orphaned, so it may stay as a zombie
    child = f'/proc/{(tmp_path / "child").read_text()}/stat'
    assert not os.path.exists(child) or ') Z ' in open(child).read()
    # a forked child that comes back does not answer, too
    assert score(13, 14)[1] == [False] and score(16, 19)[1] == [False] * 3
    assert score(19, 20)[0] == [1]  # the variable of the user's own
    errors = {
        7: 'ZeroDivisionError: division by zero',
        9: r'SystemExit: os._exit\(4\)',
        15: 'its process has ended with code -9',
        11: 'KeyboardInterrupt',
    }
    for i, words in errors.items():
        with pytest.raises(UserError, match=f"f of .* fails at prompt 'Say {i}:': {words}"):
            score(i, i + 1)
    # an error leaves the others usable
    assert score(1)[1] == [False]


def test_ready_ones_and_sums(tmp_path):
    responses = ['4 + 4 = 8\n#### 1,008', r'so \boxed{1008}.', '#### 1008.0', '#### 8', '1008', '#### 7 #### 1008', '']
    for answer in ('because\n#### 1,008', '1008', 1008):
        assert rewards.gsm8k([''] * 7, responses, [{'answer': answer}] * 7) == [1, 1, 1, 0, 0, 1, 0]
    texts = ['<think>so\nit is</think> 4', 'so it is 4', '<think></think>4']
    assert rewards.think(texts, texts, texts) == [1, 0, 0] and rewards.length(texts, texts, texts) == [0.04, 0.04, 0.01]
    sums.write(tmp_path)
    answers = {row['prompt']: row['answer'] for row in read_jsonl(tmp_path / 'prompts.jsonl')}
    shown = read_jsonl(tmp_path / 'demonstrations.jsonl')
    right = [row['response'] == answers[row['prompt']] for row in shown]
    assert len(right) == len(answers) and 0.2 < sum(right) / len(right) < 0.3
    assert all(int(answer[::-1]) == sum(map(int, prompt[:-1].split('+'))) for prompt, answer in answers.items())
    held_out = read_jsonl(tmp_path / 'held_out.jsonl')
    assert len(held_out) == 256 and not answers.keys() & {row['prompt'] for row in held_out}
    assert sums.right(None, ['031', '31'], [{'answer': '031'}] * 2) == [1, 0]


# ---- ppo.py ----

RUN = 'ppo.py --model=toy --loss=grpo --group_size=2 --batch_size=8 --minibatch_size=8 --n_examples=16'.split()
RUN += ['--max_new_tokens=4', '--n_eval_examples=3', '--warmup_steps=0', '--out_dir=run']
OWN = """
def seen(prompts, responses, rows):
    with open('seen.jsonl', 'a') as file:
        for line in zip(prompts, responses, rows, strict=True):
            print(json.dumps(line), file=file)
    return [float(row['hardness']) for row in rows]

def characters(prompts, responses, rows):
    return [len(response) for response in responses]

def spaces(prompts, responses, rows):
    return [response.startswith(' ') for response in responses]

def slow(prompts, responses, rows):
    time.sleep(60 * (len(responses[0]) % 2))
    return [1]

def ends(prompts, responses, rows):
    child = subprocess.Popen(['sleep', '60'])
    child.terminate()
    return [child.wait(timeout=20)] * len(rows)

import json, subprocess, time
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'own.py').write_text(OWN)
    return tmp_path


@pytest.mark.parametrize('chat', [False, True])
def test_rows_come_with_their_columns(here, chat):
    """Of prompts, text or messages, with other columns; parts of the sum are logged apart."""
    prompts = [[system('Be brief.'), user(f'Say {i}:')] if chat else f'Say {i}:' for i in range(60)]
    made = [
        {'prompt': prompt, 'solution': i, 'hardness': i % 3, 'test': {'x': [i]}} for i, prompt in enumerate(prompts)
    ]
    write_jsonl('data.jsonl', made[3:])
    write_jsonl('held_out.jsonl', made[:3])
    flags = ['--data=data.jsonl', '--eval_data=held_out.jsonl', '--max_prompt_length=100']
    run_script(*RUN, *flags, '--reward=own.py:seen*0.5 + own.py:characters*0.25')
    told = read_jsonl('seen.jsonl')
    assert len(told) == 3 + 16 + 3
    assert all(row in made and prompt == row['prompt'] and isinstance(response, str) for prompt, response, row in told)
    # groups of two answers to a prompt
    assert [row['solution'] for _, _, row in told[3::2]][:8] == [row['solution'] for _, _, row in told[4::2]][:8]
    for row in metrics('run'):
        score, one, other = (row[f'{name}/{row["split"]}'] for name in ('score', 'score_seen', 'score_characters'))
        assert score == pytest.approx(0.5 * one + 0.25 * other) and f'late/{row["split"]}' not in row
    shown = read_jsonl('run/samples.jsonl')
    assert all(row['score_characters'] == len(row['response'].strip() if chat else row['response']) for row in shown)


def test_answers_keep_their_first_space(here):
    """Of a tokenizer that takes off the space at the beginning of a text: in rewards, samples.jsonl, sample.py and on the screen."""
    model = tiny_model(here / 'model', 'llama')
    tokenizer = toy.tokenizer()
    strip = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(' ', 1, 0)])
    tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.backend_tokenizer.decoder = pre_tokenizers.ByteLevel(), strip
    tokenizer.save_pretrained(model)
    write_jsonl('data.jsonl', ROWS)
    run_script(*RUN, f'--model={model}', '--data=data.jsonl', '--reward=own.py:spaces')
    assert any(row['score/train'] > 0 for row in metrics('run', 'train'))
    shown = read_jsonl('run/samples.jsonl')
    flags = '--data=data.jsonl --split=train --n_examples=8 --max_new_tokens=2 --out_dir=s'.split()
    run_script('sample.py', f'--model={model}', *flags)
    for rows in (shown, read_jsonl('s/samples.jsonl')):
        assert any(row['response'].startswith(' ') for row in rows)
    write_jsonl('pair.jsonl', [{'prompt': 'Say 1:', 'response': ' one'}])
    assert 'Say 1:[[ one<' in forks.python(ROOT / 'data.py', '--data=pair.jsonl', f'--model={model}', cwd=here).stdout


def test_mistakes_in_a_run(here):
    """They end with a sentence, where there is one to be mended, before anything is loaded."""
    write_jsonl('data.jsonl', ROWS * 2)
    for more, words in [
        ('--reward=own.py:nothing', 'has no function nothing; it has seen, characters'),
        ('--reward=gold', 'the reward gold is known for --data=toy alone'),
        ('--reward=own.py:seen --reward_model=gold', "write one sum, --reward='own.py:seen + gold'"),
        ('--reward_model=x --reward_timeout=3', '--reward_timeout has no effect'),
    ]:
        assert words in refused(*RUN, '--data=data.jsonl', *more.split())
    last = refused(*RUN, '--data=data.jsonl', '--reward=own.py:seen')
    assert re.match("--reward: seen of .* fails at data.jsonl, line .*KeyError: 'hardness'", last)


def test_a_process_of_the_users_can_be_ended(here):
    """The signals that our own process blocks are not blocked in what a function starts."""
    done = forks.python(ROOT / RUN[0], *RUN[1:], '--data=toy', '--reward=own.py:ends', cwd=here)
    assert done.returncode == 0, done.stderr
    assert {row['score/train'] for row in metrics('run', 'train')} == {-15}
    assert done.stdout.count('note: all answers to a prompt have the same score') == 1


def test_late_answers_are_counted(here, capsys):
    flags = '--data=toy --n_examples=8 --n_eval_examples=0 --reward_timeout=0.5 --reward_workers=2'.split()
    run_script(*RUN, *flags, '--do_first_eval=false', '--reward=own.py:slow + own.py:characters*0')
    (row,) = metrics('run', 'train')
    assert row['score/train'] == 1 - row['late/train']
    assert f'{round(8 * row["late/train"])} of 8 calls of slow of ' in capsys.readouterr().out
