"""python data.py: what a model will be trained on, on the screen and as JSON."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, assistant, run_script, system, user, write_jsonl
from test_chat import EOS, NO_SYSTEM, tokenizer_of

import text.show
from configurator import Config, UserError
from runtime.files import say_once
from tests import forks
from text import toy
from text.examples import Examples

TALK = [user('a?'), assistant('b'), user('c?'), assistant('d')]
UNTRAINED = [TALK[0], TALK[1] | {'weight': 0}, *TALK[2:]]
PAIRS = [{'prompt': f'Q: {i}?\nA:', 'chosen': ' yes', 'rejected': ' no', 'margin': 2} for i in range(5)]
PAIRS.append(PAIRS[0] | {'chosen': ' '})
MARGIN = {'margin': 2.0}
CALL = {'type': 'function', 'function': {'name': 'rain', 'arguments': {'city': 'Rome'}}}
TIE = {'prompt': 'p', 'response_a': 'a', 'response_b': 'b', 'winner': 'tie'}
LENGTH_8 = 'lengths in characters: median 8, 95% up to 8, longest 8\n'


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """What data.py prints of these rows, on both streams."""

    def run(rows, *flags):
        data = write_jsonl(tmp_path / 'data.jsonl', rows)
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
        monkeypatch.setattr(sys, 'argv', ['data.py', f'--data={data}', *flags])
        text.show.main()
        return capsys.readouterr()

    return run


@pytest.mark.parametrize('rows, flags, count, words', [
    (PAIRS, [], 3, ['Q: 2?\nA:\nchosen:\n[[ yes]]\nrejected:\n[[ no]]\n', 'data.jsonl, line 3 ---', 'data.jsonl: 5 pairs',
                    'left out or changed: 1 empty answer\n', 'lengths in characters: median',
                    'read as: pair, told by chosen (columns: prompt, chosen, rejected, margin)']),
    # lengths are of the text alone
    ([{'prompt': '12345', 'chosen': '678', 'rejected': '6'}], [], 1, [LENGTH_8]),
    ([{'prompt': '12345', 'response': '678'}], [], 1, [LENGTH_8]), ([{'prompt': '12345678'}], [], 1, [LENGTH_8]),
    ([{'messages': [user('12345'), assistant('678')]}], [], 1, [LENGTH_8]),
    ([{'prompt': 'a'}] * 2001, [], 3, ['lengths in characters, of the first 2,000 examples: median 1,']),
    ([{'prompt': 'a' * i} for i in range(1, 101)], [], 3, ['lengths in characters: median 50, 95% up to 95, longest 100\n']),
    ([{'messages': [user('Rain?'), assistant('', tool_calls=[CALL])]}], [], 1,
     ['user: Rain?\nresponse:\nassistant: [[{"tool_calls": [{"type": "function", ', '"Rome"}}}]}]]']),
    (PAIRS, ['--model=toy', '--n=1', '--max_length=12', '--max_prompt_length=6'], 1,
     ['rejected: [[', '<|endoftext|>]]', 'lengths in tokens: median', 'cut at max_length 12: 100%', '5 margins, which only reward.py uses']),
    # a pair that is two single answers is shown once
    (PAIRS, ['--model=toy', '--n=2', '--task=singles'], 1, ['label: good', 'label: bad', '10 singles']),
    ([{'prompt': 'p', 'response': 'r', 'good': x} for x in (True, False)], [], 2, ['response, good:\n[[r]]', 'response, bad:\n[[r]]']),
    ([{'messages': TALK}, {'messages': TALK[:1]}], [], 1,
     ['user: a?\nassistant: [[b]]\nuser: c?\nassistant: [[d]]\n', '1 sft', 'left out or changed: 1 conversation without a question and its answer\n']),
    # a first row of another layout does not decide
    ([{'prompt': 'p'}, *PAIRS[:3]], ['--n=1'], 1, ['3 pairs\n', 'left out or changed: 1 row with a prompt only']),
    ([{'prompt': 'Say a.', 'response': 'Say a. a'}], [], 1,
     ['changed: nothing\nnote: answers that repeated their prompt, which was taken off\n']),
])  # fmt: skip
def test_what_is_shown(show, rows, flags, count, words):
    out, _ = show(rows, *flags)
    assert [x for x in words if x not in out] == [] and out.count(' ---\n') == count and 'Q: 3?' not in out
    assert out.count('label: good') == out.count('label: bad') == ('label: good' in words)


@pytest.mark.parametrize('rows, flag, says, shown', [
    ([], '', 'no examples are left in .*data.jsonl', 'read as: nothing, there are no rows in '),
    *((PAIRS[5:], flag, 'no examples are left in .*data.jsonl', shown) for flag, shown in (('', 'read as: pair, told by chosen'), ('--json', ''))),
    ([TIE], '', 'no examples are left in .*data.jsonl', 'left out or changed: 1 tie'),
    ([{'prompt': 'p', 'response': 'a', 'good': True}], '--task=pairs', 'no examples are left', 'needs chosen and rejected: --loss=kto takes labelled answers'),
    (PAIRS, '--colums=x', "unknown option 'colums'; did you mean columns", ''),
    (PAIRS, '--MEASURED=3', 'unknown option', ''),  # names in capitals are no options
])  # fmt: skip
def test_what_is_refused(show, capsys, rows, flag, says, shown):
    with pytest.raises(UserError, match=says):
        show(rows, *flag.split())
    assert shown in capsys.readouterr().out


def test_texts_do_not_command_the_terminal(show):
    shown = show([PAIRS[0] | {'prompt': 'a\x1b]0;title\x07\x9b2J\r\t\u00e9', 'more\x1b[2J': 1}]).out
    assert r'a\x1b]0;title\x07\x9b2J\x0d' + '\t\u00e9' in shown and r'more\x1b[2J' in shown and '\x1b' not in shown


def test_columns_that_nobody_reads(show):
    rows = [{'question': f'q{i}?', 'good': f'the answer to {i} is', 'bad': f'not the answer {i}'} for i in range(9)]
    for flags in ([], ['--task=prompts'], ['--json']):
        say_once.cache_clear()
        assert 'note: columns not read: good, bad; if they ask or answer' in ''.join(show(rows, *flags))
    say_once.cache_clear()
    assert 'note' not in show(rows, '--columns=prompt=question, chosen=good, rejected=bad')[0]


def test_lengths(show, tmp_path, monkeypatch):
    """Half of the length is the prompt's; only the first examples are measured."""
    (tmp_path / 'short.py').write_text('max_length = 30')
    out, err = show(PAIRS, f'{tmp_path}/short.py', '--json')
    assert 'max_prompt_length is 15' in err and 'of short.py has no effect' in err.replace(f'{tmp_path}/', '')
    assert all(map(json.loads, out.splitlines()))
    for flags in (['--truncation=end'], ['--max_length=30', '--json'], ['--model=toy', '--json']):
        with pytest.raises(UserError, match=f'{flags[0].split("=")[0]} has no effect'):
            show(PAIRS, *flags)
    monkeypatch.setattr(text.show, 'MEASURED', 3)
    assert 'lengths in characters, of the first 3 examples: median' in show(PAIRS)[0]


def test_the_first_example_of_a_run():
    """Of a conversation every answer is marked; a long text loses its middle; what is missing for an evaluation is noted."""
    tokenizer, beds = toy.tokenizer(), ' bed' * 400
    ids = {text: np.array(tokenizer(text)['input_ids']) for text in ('a ', 'clean .', 'the bed ?', 'fine .', beds)}
    answer = np.concatenate((ids['clean .'], ~ids['the bed ?'], ids['fine .']))

    def first(answers, task, n_eval=0, n_notes=0, held_out=slice(0)):
        train = Examples.of([(ids['a '], answers)])
        run = SimpleNamespace(train=train, held_out=train.select(held_out), total=1)
        run.tokenizer, run.task, run.config = tokenizer, task, Config(n_examples=None, batch_size=1)
        sizes, *notes, shown = text.show.summary(run, n_eval)
        # an answer to the task 'prompts' is only a placeholder
        n_tokens = sum(map(len, [ids['a '], *answers][: 1 if task == 'prompts' else None]))
        assert f'1 training example ({n_tokens} tokens)' in sizes
        says = ('there is nothing to evaluate on', '1 of 1 examples to evaluate on are trained on, too')
        assert str(notes).count(f'note: {says[len(run.held_out)]}') == len(notes) == n_notes
        return shown

    shown = first([answer], 'sft', n_eval=8, n_notes=1)
    assert shown.endswith('\na [[clean .]]the bed ?[[fine .]]') and 'the first example' in shown
    assert first([answer], 'sft', n_eval=8, n_notes=1, held_out=slice(1)) == shown
    assert first([ids[beds]], 'sft').partition('\n')[2] == f'a [[{beds[:596]} ... {beds[-598:]}]]'
    assert first([ids['clean .'], ids['fine .']], 'pairs').endswith('a \nchosen: [[clean .]]\nrejected: [[fine .]]')
    # what a single answer is; and an answer that is in the data and not trained on
    assert first([answer], 'singles').endswith('[[fine .]]\nlabel: good')
    assert first([answer], 'prompts') == 'the first prompt:\na '


@pytest.mark.parametrize('config, flags, said', [
    ('dpo_toy', [], 'chosen: [['), ('kto_toy', [], 'label: good'), ('grpo_toy', ['--minibatch_size=8'], 'the first prompt:'),
    ('ppo_offline_toy', ['--minibatch_size=8'], 'label: '), ('reward_toy', [], 'chosen: [['), ('sft_toy', [], '[[')])  # fmt: skip
def test_training_scripts_show_their_first_example(tmp_path, capsys, config, flags, said):
    script = {'sft': 'sft.py', 'rew': 'reward.py', 'grp': 'ppo.py', 'ppo': 'ppo.py'}.get(config[:3], 'dpo.py')
    sizes = ['--n_examples=8', '--batch_size=8', '--n_eval_examples=0', *flags]
    run_script(script, f'{ROOT}/config/{config}.py', '--model=toy', *sizes, f'--out_dir={tmp_path}/run')
    shown = capsys.readouterr().out.partition('the first ')[2].partition('memory:')[0]
    assert said in f'the first {shown}' and ('[[' in shown.partition('\n')[2]) == (config != 'grpo_toy')


def test_what_a_chat_template_refuses_is_said_and_counted(show, tmp_path):
    tokenizer_of(NO_SYSTEM, EOS).save_pretrained(tmp_path / 'model')
    rows = [{'messages': TALK, 'system': x} for x in ('', 'Be brief.', '')]
    out, _ = show(rows, f'--model={tmp_path / "model"}')
    refused = 'the chat template refuses an example: no system turn\n'
    assert f'left out: bad rows: {refused}' in out and f'left out or changed: 1 bad row: {refused}' in out
    # of a conversation, both answers are marked
    assert '3 sft' in out and out.count('[[') == 4


@pytest.mark.parametrize('rows, flag, expected', [
    (PAIRS, '--task=pairs', [PAIRS[i] | MARGIN for i in range(5)]),
    (PAIRS[:1], '--task=singles', [{'prompt': 'Q: 0?\nA:', 'response': x, 'good': x == ' yes'} | MARGIN for x in (' yes', ' no')]),
    (PAIRS[:1], '--task=sft', [{'prompt': 'Q: 0?\nA:', 'response': ' yes', 'trained': [' yes']} | MARGIN]),
    (PAIRS[:1], '--task=prompts', [{'prompt': 'Q: 0?\nA:'} | MARGIN]), ([{'prompt': 'ä\u2028\u2029\x85'}], '', [{'prompt': 'ä\u2028\u2029\x85'}]),
    ([{'messages': TALK}], '', [{'prompt': TALK[:3], 'response': TALK[3:], 'trained': ['b', 'd']}]),
    ([{'prompt': 'p', 'response': 'r', 'good': True}], '', [{'prompt': 'p', 'response': 'r', 'good': True}]),
    ([{'messages': UNTRAINED}], '--task=sft', [{'prompt': TALK[:3], 'response': TALK[3:], 'trained': ['d']}]),
    ([{'messages': [*UNTRAINED, *TALK[:2]]}], '--task=sft', [{'prompt': [*TALK, TALK[0]], 'response': TALK[1:2], 'trained': ['d', 'b']}]),
    ([{'prompt': 'q', 'chosen': ' yes', 'rejected': ' no'}], '--system=s',
     [{'prompt': [system('s'), user('q')], 'chosen': [assistant('yes')], 'rejected': [assistant('no')]}]),
])  # fmt: skip
def test_json(show, rows, flag, expected):
    """Nothing but examples on the standard output; counts go elsewhere."""
    out, err = show(rows, '--n=none', '--json', *flag.split())
    assert [json.loads(line) for line in out.splitlines()] == expected
    assert len(rows) < 6 or 'left out or changed: 1 empty answer\n' in err


def test_as_a_command(tmp_path):
    data = write_jsonl(tmp_path / 'data.jsonl', PAIRS[:1])
    done = forks.python('data.py', f'--data={data}', '--n=none', '--json')
    assert json.loads(done.stdout) == PAIRS[0] and done.returncode == 0, done.stderr
    chats = f'--data=sharegpt:{ROOT}/tests/parts/raw/sharegpt.json'
    done = forks.python('data.py', chats, '--skip_bad_rows', '--model=toy')
    assert ': 2 sft\n' in done.stdout and 'cut at max_length 512: ' in done.stdout
    done = forks.python('data.py', f'--data={data}', '--task=pair')
    assert done.returncode == 2 and not done.stdout
    assert 'task must be one of pairs, singles, sft, prompts' in done.stderr
