"""sample.py: the same answers on any number of ranks, in any batches, after any kill; endpoints are asked once."""

import fcntl
import json
import os
import statistics
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import ties
import torch
import transformers
from helpers import ROOT, assistant, launch, read_jsonl, run_script, system, user, write_jsonl
from stub import completion, serve

import fsdp
from configurator import UserError
from feedback.answers import append
from hf import generate, load, sharded
from hf.attention import set_attention
from runtime import ranks
from runtime.files import lock, move_folder
from tests import forks
from text import tokenise, toy

FLAGS = ['--n=3', '--temperature=0.7 1.3', '--top_p=0.9', '--max_new_tokens=10', '--batch_size=5', '--seed=4']
CHATML = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
USER = user('Hi')


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('OMP_NUM_THREADS', str(torch.get_num_threads()))  # of processes that are launched
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model folder whose generation_config.json has two stop tokens, the tokenizer a chat template, and files of prompts."""
    folder, tokenizer = tmp_path_factory.mktemp('world'), toy.tokenizer()
    net = load.load_model('toy', seed=3)
    net.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(20, 60)]
    for name, template in (('model', tokenizer.chat_template), ('chat', CHATML)):
        tokenizer.chat_template = template
        net.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    # as Windows editors begin a file, and with a line separator inside of a prompt
    lines = ['Review of the hotel:', '', 'Why?', 'Review of the hotel:', 'long\u2028' + ' long' * 300, '']
    (folder / 'prompts.txt').write_text('\n'.join(lines), 'utf-8-sig')
    questions = [{'instruction': f' What is {i}?\n', 'dataset': 'x'} for i in range(4)]
    (folder / 'alpaca_eval.json').write_text(json.dumps(questions))
    return folder


def run(*flags, out_dir='out'):
    """(the bytes of samples.jsonl, its rows) of a run."""
    run_script('sample.py', f'--out_dir={out_dir}', *flags)
    file, names = Path(out_dir, 'samples.jsonl'), sorted(f.name for f in Path(out_dir).iterdir())
    assert names == ['.lock', 'config.json', 'model_outputs.json', 'samples.jsonl']
    return file.read_bytes(), read_jsonl(file)


def model_outputs(out_dir):
    return json.loads(Path(out_dir, 'model_outputs.json').read_text())


def refused(*flags, **more):
    with pytest.raises(UserError) as info:
        run(*flags, **more)
    assert '\n' not in str(info.value)
    return str(info.value)


def same_but_for_near_ties(rows, others, slack):
    """The same answers, but for the few of which rounding decides: those may be other ones."""
    said = {'response': '', 'finish': '', 'tokens': 0}
    assert [row | said for row in rows] == [row | said for row in others]
    differing = [row['seed'] for row, other in zip(rows, others, strict=True) if row != other]
    assert all(slack[seed] < ties.ROUNDING for seed in differing) and len(differing) <= len(rows) / 9


def test_ranks_batches_and_order(tmp_path, monkeypatch):
    watched = ties.watch(monkeypatch)
    whole, rows = run(*FLAGS)
    slack = dict(watched)
    assert [(row['index'], row['sample']) for row in rows] == [(i, k) for i in range(6) for k in range(6)]
    assert {row['temperature'] for row in rows if row['sample'] < 3} == {0.7}
    assert len({row['seed'] for row in rows}) == len(rows) == 36 and len({row['response'] for row in rows}) > 30
    assert all(row['finish'] == ('eos' if row['tokens'] < 10 else 'length') or row['tokens'] == 10 for row in rows)
    assert slack.keys() == {row['seed'] for row in rows} and all(0 <= seed < 2**31 for seed in slack)
    assert statistics.median(slack.values()) > ties.ROUNDING  # most answers rest on no near tie
    # other batches, which round otherwise; nor do the other prompts matter
    others = [flag for flag in FLAGS if 'batch_size' not in flag]
    for i, flags in enumerate((['--batch_size=64'], ['--max_tokens=40'])):
        same_but_for_near_ties(rows, run(*others, *flags, out_dir=str(i))[1], slack)
    same_but_for_near_ties(rows[:12], run(*FLAGS, '--n_examples=2', out_dir='fewer')[1], slack)
    # the same batches on two ranks: the same bytes
    launch(2, [['sample.py', *FLAGS, f'--out_dir={tmp_path}/two']], tmp_path)
    assert Path('two/samples.jsonl').read_bytes() == whole
    assert not list(Path('two').glob('samples-*'))
    first = [(row['prompt'], row['response'].strip(), 'toy') for row in rows if row['sample'] == 0]
    assert [(o['instruction'], o['output'], o['generator']) for o in model_outputs('two')] == first


@pytest.fixture
def asked(monkeypatch):
    """{seed: times} of all calls of generate; .rows of each call is (rows at a time, tokens of the longest prompt)."""
    asked, real = Counter(), generate.generate
    asked.rows = []

    def counting(net, tokenizer, prompts, seeds, max_rows, **settings):
        asked.update(seeds)
        asked.rows.append((max_rows, max(map(len, prompts))))
        return real(net, tokenizer, prompts, seeds, max_rows=max_rows, **settings)

    monkeypatch.setattr(generate, 'generate', counting)
    return asked


@pytest.mark.parametrize('most, max_tokens', [(64, 40), (64, 1), (2, 4000)])
def test_rows_at_a_time(asked, most, max_tokens):
    """As many as batch_size says, fewer if the longest prompts with their answers would exceed max_tokens, but one at least."""
    flags = ['--n=2', '--max_new_tokens=10', f'--batch_size={most}', f'--max_tokens={max_tokens}']
    bar = run_script('sample.py', '--out_dir=out', *flags)['bar']
    assert bar.postfix.endswith(' tokens/s') and not bar.postfix.startswith('0 ')
    assert asked.rows and all(rows == min(most, max(1, max_tokens // (longest + 10))) for rows, longest in asked.rows)


def test_resume(asked, monkeypatch):
    whole, rows = run(*FLAGS)
    assert len(asked) == 36 and set(asked.values()) == {1}
    file, by_time = Path('out/samples.jsonl'), sorted(rows, key=lambda row: (row['sample'] // 3, row['index']))
    lines = [json.dumps(row).encode() + b'\n' for row in by_time]
    for kept in (0, 7, 23, 36):  # what a killed run may leave: rows in their order of completion, and half a row
        asked.clear()
        file.write_bytes(b''.join(lines[:kept]) + (lines[kept][:-1] if kept == 7 else lines[-1][:40]))
        Path('out/samples-1.jsonl').write_bytes(b''.join(lines[30:32]) + lines[4])
        Path('out/samples.jsonl.tmp').write_bytes(b'half')
        assert run(*FLAGS)[0] == whole
        there = {row['seed'] for row in by_time[:kept] + by_time[30:32]}
        assert len(asked) < 36 - len(there) + 3 * 5  # batches that were begun are generated whole
        assert set(asked) >= {row['seed'] for row in rows} - there and (asked or kept == 36)
    # another place, and another process there; a file that is no rank's stays
    asked.clear()
    Path('out').rename('moved')
    Path('moved/samples-old.jsonl').write_bytes(lines[0])
    run_script('sample.py', *FLAGS, '--out_dir=moved')
    Path('moved/samples-old.jsonl').unlink()
    assert run(*FLAGS, out_dir='moved')[0] == whole and not asked
    lock('elsewhere')  # gives up that of the run
    slept = []
    monkeypatch.setattr('runtime.files.time', SimpleNamespace(sleep=slept.append))
    with open('moved/.lock', 'a') as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert 'another run is using moved' in refused(*FLAGS, out_dir='moved')
    assert sum(slept) == pytest.approx(2)  # a killed process may take a moment to exit
    # answers outlive a power cut
    synced = []  # sizes: what Python still holds back is on no disk
    monkeypatch.setattr('os.fsync', lambda number: synced.append(os.fstat(number).st_size))
    append('synced.jsonl', [{}])
    assert synced == [3]
    Path('new.tmp/folder').mkdir(parents=True)
    move_folder(Path('new.tmp'), Path('new'))
    assert len(synced) == 4  # both folders, and where the name stands


@pytest.mark.parametrize('name', ['samples.jsonl', 'model_outputs.json', 'rewards.jsonl'])
def test_files_of_somebody_else_are_refused(name):
    Path('out').mkdir()
    Path('out', name).write_text('precious')
    assert f'out has {name}, but no config.json' in refused('--n_examples=1')
    assert Path('out', name).read_text() == 'precious'


def test_a_run_that_ended_while_this_one_loaded_its_model(monkeypatch):
    def lock_after_it(folder):
        lock(folder)
        Path(folder, 'config.json').write_text('{"config": {"max_new_tokens": 99}}')
        Path(folder, 'samples.jsonl').touch()

    monkeypatch.setattr('runtime.files.lock', lock_after_it)
    assert 'out holds a different run' in refused('--n_examples=1', '--max_new_tokens=8')
    assert '99' in Path('out/config.json').read_text()


def test_stops_and_greedy(folder):
    """Stop tokens of generation_config.json hold in a sharded model, too; temperature 0 is model.generate's greedy answer."""
    _, rows = run(f'--model={folder}/model', '--temperature=0', '--max_new_tokens=16')
    net = transformers.AutoModelForCausalLM.from_pretrained(folder / 'model')
    tokenizer = load.load_tokenizer(f'{folder}/model')
    for row in rows:
        ids = tokenizer(row['prompt'], return_tensors='pt').input_ids
        out = net.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)[0, ids.shape[1] :].tolist()
        ended = out[-1] in net.generation_config.eos_token_id
        assert row['response'] == tokenizer.decode(out[: len(out) - ended])
        assert (row['finish'], row['tokens']) == ('eos' if ended else 'length', len(out))
    assert {row['finish'] for row in rows} == {'eos', 'length'}


def test_chat(folder, capsys):
    """A prompt has the ids that it has in training, through the chat template, with a system message or without."""
    question = {'prompt': '\n\nHuman: Hi\n\nAssistant:', 'response': ' ok'}
    flags = [f'--model={folder}/chat', f'--data={write_jsonl("hi.jsonl", [question])}', '--max_new_tokens=4']
    assert run(*flags)[1][0]['prompt'] == question['prompt']
    assert 'note: the tokenizer has a chat template' in capsys.readouterr().out
    _, rows = run(*flags, '--chat', '--n=8', out_dir='a')
    assert rows[0]['prompt'] == [USER] and all(row['response'] == row['response'].strip() for row in rows)
    assert "'<|user|>Hi\\n<|assistant|>'" in capsys.readouterr().out
    kind = [system('Be kind.'), USER]
    assert run(*flags, '--system=Be kind.', out_dir='b')[1][0]['prompt'] == kind
    assert "'<|system|>Be kind.\\n<|user|>Hi\\n<|assistant|>'" in capsys.readouterr().out
    assert model_outputs('b')[0]['instruction'] == 'Hi'
    # as in training, a system message of the data stays
    french = [system('Answer in French.'), USER]
    data = write_jsonl('french.jsonl', [{'prompt': french}])
    assert run(flags[0], f'--data={data}', *flags[2:], '--system=Be kind.', out_dir='c')[1][0]['prompt'] == french
    tokenizer = load.load_tokenizer(f'{folder}/chat')
    for prompt in (kind, question['prompt'], ''):
        row = {'prompt': prompt, 'response': 'fine'}
        trained = tokenise.tokenise([row], tokenizer, 'sft', (64, 32, 'start'), Counter())[0][0].tolist()
        assert tokenise.tokenise_prompts([prompt], tokenizer, 64, 'start', Counter()) == [trained]


def test_tools_begun_answers_and_prompts_that_the_template_refuses(folder, capsys):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    tokenizer = load.load_tokenizer(f'{folder}/chat')
    tokenizer.chat_template = refuses + '{% if tools %}{{ tools | tojson }}{% endif %}' + CHATML
    load.load_model(f'{folder}/chat').save_pretrained('m')
    tokenizer.save_pretrained('m')
    rows = [{'prompt': [system('x'), USER]}, {'prompt': [USER], 'tools': [{'name': 'look'}]}]
    rows += [{'prompt': [USER]}, {'prompt': [USER, assistant('Sure: ')]}]
    flags = ['--model=m', f'--data={write_jsonl("chats.jsonl", rows)}', '--max_new_tokens=4']
    assert 'chats.jsonl, line 1: the chat template refuses an example: no system turn' in refused(*flags)
    _, found = run(*flags, '--skip_bad_rows', out_dir='skipped')
    assert [row['prompt'] for row in found] == [row['prompt'] for row in rows[1:]]
    assert [row.get('tools') for row in found] == [[{'name': 'look'}], None, None]
    said = capsys.readouterr().out
    assert '1 bad row: the chat template refuses an example: no system turn' in said
    assert """first prompt: '[{"name": "look"}]<|user|>Hi""" in said
    write_jsonl('chats.jsonl', rows[:1])
    assert 'refuses every prompt' in refused(*flags, '--skip_bad_rows', out_dir='none')


def test_functions_score_answers(folder, capsys):
    """Also those of a run that is done: samples.jsonl stays as it is."""
    functions = 'def f(p, responses, rows): return [len(r) for r in responses]\n'
    functions += 'def score(p, r, rows): return [1.0] * len(r)\n'  # it has the name of a column
    Path('own.py').write_text(functions + 'def g(p, r, rows): return [row["n"] for row in rows]')
    write_jsonl('data.jsonl', [{'prompt': f'Say {i}:', 'n': i} for i in range(3)])
    flags = f'--model={folder}/model --data=data.jsonl --n=2 --max_new_tokens=4'.split()
    _, before = run(*flags)
    run_script('sample.py', '--out_dir=out', *flags, '--reward=own.py:f + own.py:g*2 + own.py:score*3')
    assert read_jsonl('out/samples.jsonl') == before
    scores = {(row['index'], row['sample']): row for row in read_jsonl('out/rewards.jsonl')}
    assert len(scores) == len(before) == 6
    for row in before:
        found = scores[row['index'], row['sample']]
        assert (found['f'], found['g']) == (len(row['response']), row['index'])
        assert found['score'] == found['f'] + 2 * found['g'] + 3 and found['score_score'] == 1
    assert 'rewards.jsonl: mean g 1.0000' in capsys.readouterr().out


def test_sources(folder, capsys):
    """A text file, cut to what the model's 256 positions leave; AlpacaEval's questions as they are in its file."""
    _, rows = run(f'--data={folder}/prompts.txt', '--max_new_tokens=6')
    assert [row['prompt'][:6] for row in rows] == ['Review', 'Why?', 'long\u2028 ']
    assert 'changed: 1 time the same prompt again, 1 prompt cut' in capsys.readouterr().out
    _, rows = run(
        f'--data={folder}/prompts.txt', '--columns=question=text', '--n_examples=1', '--max_new_tokens=6', out_dir='b'
    )
    assert [row['prompt'] for row in rows] == [[user('Review of the hotel:')]]
    run(f'--data=alpaca_eval:{folder}/alpaca_eval.json', '--max_new_tokens=6', '--generator=me', out_dir='a')
    # what is shown of a long prompt is said to be its end
    assert 'end of the first prompt' not in capsys.readouterr().out
    run(
        f'--data={write_jsonl("long.jsonl", [{"prompt": "the room was clean . " * 20}])}',
        '--max_new_tokens=6',
        out_dir='long',
    )
    assert "\nend of the first prompt: 'ean . the room was clean" in capsys.readouterr().out
    found = [(output['instruction'], output['generator']) for output in model_outputs('a')]
    assert found == [(f' What is {i}?\n', 'me') for i in range(4)]


def test_a_prompt_of_one_token_brings_no_warning():
    """From transformers, which takes its cache of no tokens for padding on the right."""
    data = write_jsonl('one.jsonl', [{'prompt': 'a'}, {'prompt': 'a b'}])
    done = forks.python(ROOT / 'sample.py', f'--data={data}', '--max_new_tokens=2', '--out_dir=out', cwd=Path.cwd())
    assert done.returncode == 0 and 'padding' not in done.stderr


@pytest.mark.parametrize('flags, words', [
    (['--model=nothing/at/all'], 'no model folder'),
    (['--split=validation'], "split must be one of train, test, not 'validation'"),
    (['--max_new_tokens=256'], 'has 256 positions'),
    (['--endpoint=http://127.0.0.1:1'], 'needs --endpoint_model'),
    (['--endpoint=http://x', '--endpoint_model=m', '--dtype=bfloat16'], '--dtype has no effect'),
    (['--concurrency=3'], '--concurrency has no effect'),
    (['--temperature=0', '--top_p=0.9'], '--top_p has no effect'),
    (['--temperature=0', '--n=2'], 'at temperature 0 all 2 answers'),
    *(([f'--temperature={text}'], 'temperature') for text in ('hot', '', '0.5 -1', '1 1.0', 'nan', 'inf', '-1')),
    (['--data=nowhere.txt'], "data 'nowhere.txt' is no file or folder in "),
    (['--data=none.txt'], 'there are no prompts'),
    (['--data_fraction=1e-9'], '6 prompts beyond n_examples or data_fraction'),
    (['--data=toy+bad.jsonl', '--skip_bad_rows'], 'no test examples are left'),
])  # fmt: skip
def test_mistakes(flags, words):
    Path('none.txt').write_text('\n')
    Path('bad.jsonl').write_text('{"prompt": 3}\n')
    assert words in refused(*flags)
    assert not Path('out').exists()


def test_another_run_is_refused(folder):
    prompts, file = Path('p.txt'), Path('out/samples.jsonl')
    prompts.write_text('one\ntwo\n')
    flags = [f'--model={folder}/model', '--max_new_tokens=4', '--data=p.txt']
    content, _ = run(*flags)
    assert 'holds a different run (seed 0 there and 1 here)' in refused(*flags, '--seed=1')
    prompts.write_text('one\nthree\n')
    assert 'samples.jsonl, line 2, answers a prompt that is not in the data' in refused(*flags)
    prompts.write_text('one\ntwo\n')
    file.write_bytes(b'{"index": 0\n' + content)
    assert 'line 1, is damaged' in refused(*flags)
    file.write_bytes(content)
    assert run(*flags)[0] == content
    # other weights under the same name, and broken ones
    net = load.load_model('toy', seed=5)
    net.save_pretrained(folder / 'model')
    assert 'holds a different run (weights' in refused(*flags)
    net.lm_head.weight.data.fill_(float('nan'))
    net.save_pretrained('broken')
    toy.tokenizer().save_pretrained('broken')
    for temperature in (1, 0):
        flag = f'--temperature={temperature}'
        assert 'scores are not numbers' in refused('--model=broken', *flags[1:], flag, out_dir=f'at-{temperature}')


def test_endpoint(capsys):
    def question(body):
        return body['messages'][-1]['content']

    def behave(n, body):
        code = status(n, body)
        reply = completion(f' {question(body)} {body["seed"]} ') | {'usage': {'completion_tokens': 7}}
        reply['choices'][0]['finish_reason'] = 'stop'
        return code, reply if code == 200 else {'error': 'no'}

    def bodies():
        """Of the requests since the last call."""
        found = [body for _, _, body in server.seen]
        server.seen.clear()
        return found

    with serve(behave) as server:
        flags = [f'--endpoint={server.url}', '--endpoint_model=m', '--n=2', '--concurrency=2', '--temperature=0.5']
        flags += ['--max_new_tokens=9', '--system=Be brief.']
        # a mistake that no answer came of leaves out_dir to the corrected command
        status = lambda n, body: 404  # noqa: E731
        assert 'HTTP 404 (no)' in refused(*flags, '--endpoint_model=wrong')
        bodies()
        # the key runs out, when what was answered before is written; then one question is refused, and nothing is asked twice
        status = lambda n, body: 200 if n < 5 else time.sleep(0.5) or 401  # noqa: E731
        assert 'NANOPREF_API_KEY' in refused(*flags)
        asked = bodies()
        answered, known = {body['seed'] for body in asked[:5]}, set(map(question, asked))
        bad = next(q for q in (f'Review of the {place}:' for place in toy.PLACES) if q not in known)
        status = lambda n, body: 400 if question(body) == bad else 200  # noqa: E731
        assert '2 answers missing (2 times: ' in refused(*flags)
        seeds = {body['seed'] for body in bodies()}
        assert not answered & seeds and len(seeds) == 12 - 5
        # it is well again
        status = lambda n, body: 200  # noqa: E731
        _, rows = run(*flags)
        (*_, last) = asked = bodies()
        assert set(map(question, asked)) == {bad}
        expected = {'model': 'm', 'max_tokens': 9, 'top_p': 1.0, 'temperature': 0.5, 'seed': last['seed']}
        assert last == expected | {'messages': [system('Be brief.'), user(bad)]}
        assert [(row['index'], row['sample']) for row in rows] == [(i, k) for i in range(6) for k in range(2)]
        fields = {'generator': 'm', 'finish': 'eos', 'tokens': 7, 'temperature': 0.5}
        for row in rows:
            assert row | fields | {'response': f' {row["prompt"][-1]["content"]} {row["seed"]} '} == row
        assert run(*flags)[1] == rows and not bodies()
        # text prompts are answered as in training data
        text = run(*(flag for flag in flags if 'system' not in flag), out_dir='text')[1][0]
        assert text['response'] == f' {text["prompt"]} {text["seed"]}'
        # tools are not sent
        data = write_jsonl('tools.jsonl', [{'prompt': [USER, assistant('I')], 'tools': [{'name': 'look'}]}])
        _, rows = run(*flags, f'--data={data}', out_dir='tools')
        assert not any('tools' in row for row in rows + bodies())
        assert 'not sent to an endpoint, 1 begun answer, which an endpoint may answer' in capsys.readouterr().out
    # replies of nothing but a refusal or blanks
    with serve(lambda n, body: (200, completion((None, ' \n', 'x')[n % 3]))) as server:
        run(f'--endpoint={server.url}', '--endpoint_model=m', '--concurrency=1', out_dir='empty')
        # a prompt that holds no message
        data = write_jsonl('none.jsonl', [{'prompt': '\n\nAssistant:'}])
        run(f'--endpoint={server.url}', '--endpoint_model=m', f'--data={data}', out_dir='none')
    assert 'samples.jsonl, 6 answers, 0 of them cut at 512 tokens, 4 empty\n' in capsys.readouterr().out


def test_unsharded_ends_well(folder):
    """An error inside leaves the model sharded, and generate leaves its settings."""
    *_, device = ranks.setup()
    net = fsdp.shard(lambda empty: load.load_model('toy', empty=empty), device, cpu_offload=True)
    groups = [m._get_fsdp_state()._fsdp_param_group for m in net.modules() if hasattr(m, 'unshard')]
    set_attention(net, packed=True)
    own = net.generation_config
    with torch.no_grad():
        net.lm_head.weight.fill_(float('nan'))
    with pytest.raises(UserError), sharded.unsharded(net):
        generate.generate(net, toy.tokenizer(), [[1]], [0], max_new_tokens=2)
    assert all(group.is_sharded for group in groups) and net.generation_config is own
    assert net.config._attn_implementation == 'packed'
