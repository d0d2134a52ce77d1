"""sample.py: the same answers on any number of ranks, in any batches, after any kill; endpoints are asked once."""

import http.server
import json
import os
import runpy
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import ties
import torch
import torch.distributed as dist
import transformers

import configurator
import fsdp
from configurator import UserError
from feedback import samples
from hf import generate, load
from model import set_attention
from text import sources, tokenise, toy

ROOT = Path(configurator.__file__).parent
FLAGS = ['--n=3', '--temperature=0.7 1.3', '--top_p=0.9', '--max_new_tokens=10', '--batch_size=5', '--seed=4']
CHATML = (
    '{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}'
    '{% if add_generation_prompt %}<|assistant|>{% endif %}'
)


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('OMP_NUM_THREADS', str(torch.get_num_threads()))  # of processes that are launched
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model folder whose generation_config.json has two stop tokens, the tokenizer a chat template, and files of prompts."""
    folder = tmp_path_factory.mktemp('world')
    tokenizer = toy.tokenizer()
    net = load.load_model('toy', seed=3)
    net.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(20, 60)]
    net.save_pretrained(folder / 'model')
    tokenizer.save_pretrained(folder / 'model')
    net.save_pretrained(folder / 'chat')
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / 'chat')
    (folder / 'prompts.txt').write_text('Review of the hotel:\n\nWhy?\nReview of the hotel:\n' + 'long ' * 300 + '\n')
    questions = [{'instruction': f' What is {i}?\n', 'dataset': 'x'} for i in range(4)]
    (folder / 'alpaca_eval.json').write_text(json.dumps(questions))
    yield folder
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def run(tmp_path):
    """run(*flags) -> (the bytes of samples.jsonl, its rows)."""

    def run(*flags, out_dir=tmp_path / 'out'):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', ['sample.py', f'--out_dir={out_dir}', *flags])
            runpy.run_path(str(ROOT / 'sample.py'), run_name='script')
        assert sorted(f.name for f in Path(out_dir).iterdir()) == ['config.json', 'model_outputs.json', 'samples.jsonl']
        content = (out_dir / 'samples.jsonl').read_bytes()
        return content, [json.loads(line) for line in content.splitlines()]

    return run


def refused(run, *flags, **more):
    with pytest.raises(UserError) as info:
        run(*flags, **more)
    assert '\n' not in str(info.value)
    return str(info.value)


def launch(*words):
    env = {k: v for k, v in os.environ.items() if k != 'RANK'}
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def same_but_for_near_ties(rows, others, slack):
    """The same answers, but for the few of which rounding decides: those may be other ones."""
    said = ('response', 'finish', 'tokens')
    differing = []
    for row, other in zip(rows, others, strict=True):
        assert {k: v for k, v in row.items() if k not in said} == {k: v for k, v in other.items() if k not in said}
        if row != other:
            differing.append(row['seed'])
    assert all(slack[seed] < ties.ROUNDING for seed in differing) and len(differing) <= len(rows) / 9


def test_ranks_batches_and_order(run, tmp_path, monkeypatch):
    watched = ties.watch(monkeypatch)
    whole, rows = run(*FLAGS)
    slack = dict(watched)
    assert [(row['index'], row['sample']) for row in rows] == [(i, k) for i in range(6) for k in range(6)]
    assert {row['temperature'] for row in rows if row['sample'] < 3} == {0.7}
    assert len({row['seed'] for row in rows}) == len(rows) == 36 and len({row['response'] for row in rows}) > 30
    assert all(row['finish'] == ('eos' if row['tokens'] < 10 else 'length') or row['tokens'] == 10 for row in rows)
    assert slack.keys() == {row['seed'] for row in rows}
    assert statistics.median(slack.values()) > ties.ROUNDING  # most answers rest on no near tie
    # other batches, which round otherwise; nor do the other prompts matter
    others = [flag for flag in FLAGS if 'batch_size' not in flag]
    for i, flags in enumerate((['--batch_size=1'], ['--batch_size=64'], ['--max_tokens=40'])):
        same_but_for_near_ties(rows, run(*others, *flags, out_dir=tmp_path / str(i))[1], slack)
    same_but_for_near_ties(rows[:12], run(*FLAGS, '--n_examples=2', out_dir=tmp_path / 'fewer')[1], slack)
    # the same batches on two ranks: the same bytes
    two = launch('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--', 'sample.py', *FLAGS,
                 f'--out_dir={tmp_path}/two')  # fmt: skip
    assert two.wait(timeout=120) == 0, two.stderr.read().decode()
    assert (tmp_path / 'two/samples.jsonl').read_bytes() == whole
    assert not list(tmp_path.glob('two/samples-*'))
    outputs = json.loads((tmp_path / 'two/model_outputs.json').read_text())
    first = [row for row in rows if row['sample'] == 0]
    assert outputs == [{'instruction': r['prompt'], 'output': r['response'].strip(), 'generator': 'toy'} for r in first]


@pytest.fixture
def asked(monkeypatch):
    """A Counter of the seeds that generate is called with."""
    asked, real = Counter(), generate.generate

    def counting(net, tokenizer, prompts, seeds, **settings):
        asked.update(seeds)
        return real(net, tokenizer, prompts, seeds, **settings)

    monkeypatch.setattr(generate, 'generate', counting)
    return asked


def test_two_at_once_and_another_place(run, tmp_path, asked):
    whole, _ = run(*FLAGS, '--n_examples=2')
    asked.clear()
    (tmp_path / 'out').rename(tmp_path / 'moved')
    assert run(*FLAGS, '--n_examples=2', out_dir=tmp_path / 'moved')[0] == whole and not asked
    samples.lock(tmp_path / 'moved')
    code = f'import sys\nfrom feedback import samples\nsamples.lock({str(tmp_path / "moved")!r})'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and 'another run is using' in done.stderr


def test_resume(run, tmp_path, asked):
    whole, rows = run(*FLAGS)
    assert len(asked) == 36 and set(asked.values()) == {1}
    file, by_time = tmp_path / 'out/samples.jsonl', sorted(rows, key=lambda row: (row['sample'] // 3, row['index']))
    lines = [json.dumps(row).encode() + b'\n' for row in by_time]
    for kept in (0, 7, 23, 36):  # what a killed run may leave: rows in their order of completion, and half a row
        asked.clear()
        file.write_bytes(b''.join(lines[:kept]) + (lines[kept][:-1] if kept == 7 else lines[-1][:40]))
        (tmp_path / 'out/samples-1.jsonl').write_bytes(b''.join(lines[30:32]) + lines[4])
        (tmp_path / 'out/samples.tmp').write_bytes(b'half')
        assert run(*FLAGS)[0] == whole
        there = {row['seed'] for row in by_time[:kept] + by_time[30:32]}
        assert len(asked) < 36 - len(there) + 3 * 5  # batches that were begun are generated whole
        assert set(asked) >= {row['seed'] for row in rows} - there and (asked or kept == 36)
    asked.clear()
    assert run(*FLAGS)[0] == whole and not asked


def test_kill(run, tmp_path):
    """kill -9 between two batches, of a run that is slow enough to be hit."""
    flags = ['--n=10', '--max_new_tokens=60', '--batch_size=6', '--seed=1']
    process = launch('sample.py', *flags, f'--out_dir={tmp_path}/killed')
    file = tmp_path / 'killed/samples.jsonl'
    while process.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = file.read_bytes()
    assert 0 < before.count(b'\n') < 60 and not (tmp_path / 'killed/model_outputs.json').exists()
    content, rows = run(*flags, out_dir=tmp_path / 'killed')
    assert len(rows) == 60 and set(before.splitlines()) <= set(content.splitlines())
    assert content == run(*flags)[0]


def test_stops_and_greedy(run, folder):
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


def test_chat(run, folder, capsys):
    """A prompt has the ids that it has in training, through the chat template, with a system message or without."""
    question = {'prompt': '\n\nHuman: Hi\n\nAssistant:', 'response': ' ok'}
    (folder / 'hi.jsonl').write_text(json.dumps(question) + '\n')
    flags = [f'--model={folder}/chat', f'--data={folder}/hi.jsonl', '--max_new_tokens=4']
    assert run(*flags)[1][0]['prompt'] == question['prompt']
    assert 'note: the tokenizer has a chat template' in capsys.readouterr().out
    asked = [{'role': 'user', 'content': 'Hi'}]
    assert run(*flags, '--chat', out_dir=folder / 'a')[1][0]['prompt'] == asked
    assert "'<|user|>Hi\\n<|assistant|>'" in capsys.readouterr().out
    asked = [{'role': 'system', 'content': 'Be kind.'}, *asked]
    assert run(*flags, '--system=Be kind.', out_dir=folder / 'b')[1][0]['prompt'] == asked
    assert "'<|system|>Be kind.\\n<|user|>Hi\\n<|assistant|>'" in capsys.readouterr().out
    assert json.loads((folder / 'b/model_outputs.json').read_text())[0]['instruction'] == 'Hi'

    tokenizer = load.load_tokenizer(f'{folder}/chat')
    for prompt in (asked, question['prompt'], ''):
        row = {'prompt': prompt, 'response': 'fine'}
        trained = tokenise.tokenise([row], tokenizer, 'sft', 64, 32, 'start', Counter())[0][0].tolist()
        assert tokenise.tokenise_prompts([prompt], tokenizer, 64, 'start', Counter()) == [trained]


def test_tools_begun_answers_and_prompts_that_the_template_refuses(run, folder, tmp_path, capsys):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    tokenizer = load.load_tokenizer(f'{folder}/chat')
    tokenizer.chat_template = refuses + '{% if tools %}{{ tools | tojson }}{% endif %}' + CHATML
    load.load_model(f'{folder}/chat').save_pretrained(tmp_path / 'm')
    tokenizer.save_pretrained(tmp_path / 'm')
    user = {'role': 'user', 'content': 'Hi'}
    rows = [{'prompt': [{'role': 'system', 'content': 'x'}, user]}, {'prompt': [user], 'tools': [{'name': 'look'}]}, {'prompt': [user]},
            {'prompt': [user, {'role': 'assistant', 'content': 'Sure: '}]}]  # fmt: skip
    (tmp_path / 'chats.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    flags = [f'--model={tmp_path}/m', f'--data={tmp_path}/chats.jsonl', '--max_new_tokens=4']
    assert 'chats.jsonl, line 1: the chat template refuses an example: no system turn' in refused(run, *flags)
    _, found = run(*flags, '--skip_bad_rows', out_dir=tmp_path / 'skipped')
    assert [row['prompt'] for row in found] == [row['prompt'] for row in rows[1:]]
    assert [row.get('tools') for row in found] == [[{'name': 'look'}], None, None]
    said = capsys.readouterr().out
    assert "'bad rows: the chat template refuses an example: no system turn': 1" in said
    assert """first prompt: '[{"name": "look"}]<|user|>Hi""" in said
    (tmp_path / 'chats.jsonl').write_text(json.dumps(rows[0]))
    assert 'refuses every prompt' in refused(run, *flags, '--skip_bad_rows', out_dir=tmp_path / 'none')


def test_prompts_as_chats():
    hh = '\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:'
    assert [(turn['role'], turn['content']) for turn in sources.as_chat(hh)] == [
        ('user', 'a\n\nb'), ('assistant', 'c'), ('user', 'd')]  # fmt: skip
    assert sources.as_chat('Review of the hotel:') == [{'role': 'user', 'content': 'Review of the hotel:'}]
    assert sources.instruction(hh) == hh
    for text in (' odd \n', 'two\n\nlines', ''):
        assert sources.instruction(sources.ask(text)) == text
    assert sources.instruction([{'role': 'user', 'content': ' x '}]) == ' x '
    assert sources.instruction([{'role': r, 'content': r[0]} for r in ('system', 'user', 'assistant', 'user')]) == (
        'user: u\n\nassistant: a\n\nuser: u'
    )


def test_sources(run, folder, tmp_path, capsys):
    """A text file, cut to what the model's 256 positions leave; AlpacaEval's questions as they are in its file."""
    _, rows = run(f'--data={folder}/prompts.txt', '--max_new_tokens=6')
    assert [row['prompt'][:6] for row in rows] == ['Review', 'Why?', 'long l']
    assert "{'same prompt again': 1, 'prompts cut': 1}" in capsys.readouterr().out
    run(f'--data=alpaca_eval:{folder}/alpaca_eval.json', '--max_new_tokens=6', '--generator=me', out_dir=tmp_path / 'a')
    outputs = json.loads((tmp_path / 'a/model_outputs.json').read_text())
    assert [(o['instruction'], o['generator']) for o in outputs] == [(f' What is {i}?\n', 'me') for i in range(4)]


def test_refusals(run, folder, tmp_path):
    model, here = f'--model={folder}/model', '--max_new_tokens=4'
    assert 'no model folder' in refused(run, f'--model={tmp_path}/nothing')
    assert "split must be one of train, test, not 'validation'" in refused(run, '--split=validation')
    assert 'has 256 positions' in refused(run, '--max_new_tokens=256')
    assert 'needs --endpoint_model' in refused(run, '--endpoint=http://127.0.0.1:1')
    assert '--dtype has no effect' in refused(run, '--endpoint=http://x', '--endpoint_model=m', '--dtype=bfloat16')
    assert '--concurrency has no effect' in refused(run, '--concurrency=3')
    assert '--top_p has no effect' in refused(run, '--temperature=0', '--top_p=0.9')
    assert 'at temperature 0 all 2 answers' in refused(run, '--temperature=0', '--n=2')
    for text in ('hot', '', '0.5 -1', '1 1.0', 'nan', 'inf', '-1'):
        assert 'temperature' in refused(run, f'--temperature={text}')
    assert 'cannot read nowhere.txt' in refused(run, '--data=nowhere.txt')
    (tmp_path / 'none.txt').write_text('\n')
    assert 'there are no prompts' in refused(run, f'--data={tmp_path}/none.txt')
    assert not (tmp_path / 'out/samples.jsonl').exists()

    (tmp_path / 'p.txt').write_text('one\ntwo\n')
    flags = [model, here, f'--data={tmp_path}/p.txt']
    run(*flags)
    assert 'holds a different run (seed 0 there and 1 here)' in refused(run, *flags, '--seed=1')
    (tmp_path / 'p.txt').write_text('one\nthree\n')
    assert 'samples.jsonl, line 2, answers a prompt that is not in the data' in refused(run, *flags)
    (tmp_path / 'p.txt').write_text('one\ntwo\n')
    file = tmp_path / 'out/samples.jsonl'
    content = file.read_bytes()
    file.write_bytes(b'{"index": 0\n' + content)
    assert 'line 1, is damaged' in refused(run, *flags)
    file.write_bytes(content)
    assert run(*flags)[0] == content
    net = load.load_model('toy', seed=5)
    net.save_pretrained(folder / 'model')
    assert 'holds a different run (weights' in refused(run, *flags)
    net.lm_head.weight.data.fill_(float('nan'))
    net.save_pretrained(folder / 'broken')
    toy.tokenizer().save_pretrained(folder / 'broken')
    assert 'scores are not numbers' in refused(run, f'--model={folder}/broken', here, out_dir=tmp_path / 'broken')


@pytest.fixture
def server():
    """An endpoint: server.status(body) decides, server.bodies keeps what was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            stub.bodies.append(body)
            status = stub.status(body)
            last = body['messages'][-1]['content']
            reply = {'choices': [{'message': {'content': f' {last} {body["seed"]} '}, 'finish_reason': 'stop'}],
                     'usage': {'completion_tokens': 7}}  # fmt: skip
            content = json.dumps(reply if status == 200 else {'error': 'no'}).encode()
            self.send_response(status)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    stub = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    stub.bodies, stub.status = [], lambda body: 200
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield stub
    stub.shutdown()
    stub.server_close()


def test_endpoint(run, tmp_path, server, monkeypatch):
    monkeypatch.setenv('NANOPREF_API_KEY', 'sk-very-secret')
    flags = [f'--endpoint=http://127.0.0.1:{server.server_port}', '--endpoint_model=m', '--n=2', '--concurrency=2']
    flags += ['--temperature=0.5', '--max_new_tokens=9', '--system=Be brief.']
    answered = []

    def until_it_runs_out(body):
        if len(answered) < 5:
            answered.append(body['seed'])
            return 200
        time.sleep(0.5)  # what was answered before is written by then
        return 401

    server.status = until_it_runs_out
    assert 'NANOPREF_API_KEY' in refused(run, *flags)  # the key runs out
    bad = next(q for q in (f'Review of the {place}:' for place in toy.PLACES) if q not in str(server.bodies))
    server.bodies.clear()
    server.status = lambda body: 400 if body['messages'][-1]['content'] == bad else 200
    message = refused(run, *flags)
    assert '2 answers are missing' in message
    assert not set(answered) & {body['seed'] for body in server.bodies}  # nothing is asked twice
    assert len({body['seed'] for body in server.bodies}) == 12 - len(answered)
    server.bodies.clear()
    server.status = lambda body: 200
    _, rows = run(*flags)
    assert {body['messages'][-1]['content'] for body in server.bodies} == {bad}
    assert [(row['index'], row['sample']) for row in rows] == [(i, k) for i in range(6) for k in range(2)]
    for row in rows:
        question = row['prompt'][-1]['content']
        assert row['response'] == f' {question} {row["seed"]} ' and row['generator'] == 'm'
        assert (row['finish'], row['tokens'], row['temperature']) == ('eos', 7, 0.5)
    assert server.bodies[0] == {
        'model': 'm', 'max_tokens': 9, 'top_p': 1.0, 'temperature': 0.5, 'seed': server.bodies[0]['seed'],
        'messages': [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': bad}]}  # fmt: skip
    server.bodies.clear()
    assert run(*flags)[1] == rows and not server.bodies
    assert not any(b'very-secret' in file.read_bytes() for file in (tmp_path / 'out').iterdir())
    text = run(*(flag for flag in flags if 'system' not in flag), out_dir=tmp_path / 'text')[1][0]
    assert text['response'] == f' {text["prompt"]} {text["seed"]}'  # as answers follow text prompts in training data


def test_unsharded_ends_well(folder):
    """An error inside leaves the model sharded, and generate leaves its settings."""
    *_, device = fsdp.setup()
    net = fsdp.shard(lambda empty: load.load_model('toy', empty=empty), device, cpu_offload=True)
    groups = [m._get_fsdp_state()._fsdp_param_group for m in net.modules() if isinstance(m, fsdp.FSDPModule)]
    set_attention(net, packed=True)
    own = net.generation_config
    with torch.no_grad():
        net.lm_head.weight.fill_(float('nan'))
    with pytest.raises(UserError), fsdp.unsharded(net):
        generate.generate(net, toy.tokenizer(), [[1]], [0], max_new_tokens=2)
    assert all(group.is_sharded for group in groups) and net.generation_config is own
    assert net.config._attn_implementation == 'packed'
