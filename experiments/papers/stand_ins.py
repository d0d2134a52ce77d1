"""What a dry run (DRY=1) of a procedure in this folder uses instead of the real thing.

python -m experiments.papers.stand_ins --out=FOLDER [--hh=PAIRS]    # tiny/ (a model), hh.jsonl, sharegpt.json, alpaca_eval.json: 64 examples
python -m experiments.papers.stand_ins --serve=8765                 # a judge: the answer with more different letters wins
"""

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from configurator import UserError, configure
from experiments import write_rows
from text import messages, sources, toy

out = 'out/dry'  # where the stand-ins go
hh: str | None = None  # a file of HH pairs; None: the toy world's, written as HH's
serve: int | None = None  # answer as a judge on this port of 127.0.0.1 instead


config = configure(globals())

N = 64  # examples


def make():
    from hf import load

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    source = hh or folder / 'toy.jsonl'
    if not hh:
        # dialogues of the toy world, a prompt each, enough of them for both parts of a divided file
        rows = []
        for i, row in enumerate(toy.pairs('train', 600)):
            prompt = f'\n\nHuman: {row["prompt"]} number {i}\n\nAssistant:'
            rows.append({side: prompt + row[side] for side in ('chosen', 'rejected')})
        write_rows(source, rows)
    if not Path(source).exists():
        raise UserError(f'there is no {source}: give HH=FILE, pairs of Anthropic/hh-rlhf')

    # of both parts of a divided file; the test part is a twentieth
    rows = []
    for split, n in (('train', N - 8), ('test', 8)):
        rows += sources.load_rows(f'hh:{source}', split)[0][:n]
    dialogues, talks, questions = [], [], []
    for row in rows:
        dialogues.append({side: row['prompt'] + row[side] for side in ('chosen', 'rejected')})
        asked = messages.instruction(row['prompt']).strip()
        answer = {'from': 'gpt', 'value': row['chosen'].strip()}
        talks.append({'conversations': [{'from': 'human', 'value': asked}, answer]})
        questions.append({'instruction': asked, 'output': ''})
    write_rows(folder / 'hh.jsonl', dialogues)
    (folder / 'sharegpt.json').write_text(json.dumps(talks))
    (folder / 'alpaca_eval.json').write_text(json.dumps(questions))
    if not (folder / 'tiny').exists():
        load.load_model('toy').save_pretrained(folder / 'tiny')
        toy.tokenizer().save_pretrained(folder / 'tiny')  # of bytes and a few words: any text
    print(f'stand-ins: {N} examples of {source}, an untrained model of two layers: {folder}')


def verdict(content):
    """The reply to config/judge_pair.txt filled in: how many letters both answers have, and the line that label.py reads."""
    a, b = (len(set(re.search(f'<<< answer {x} >>>(.*?)<<< end', content, re.S)[1])) for x in 'AB')
    if a == b:
        return f'Letters: {a} and {b}.\nVerdict: tie'
    return f'Letters: {a} and {b}.\nVerdict: {"A" if a > b else "B"}'


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible server with one model."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        message = {'role': 'assistant', 'content': verdict(body['messages'][-1]['content'])}
        choice = {'index': 0, 'message': message, 'finish_reason': 'stop'}
        content = json.dumps({'object': 'chat.completion', 'choices': [choice]}).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


if serve:
    ThreadingHTTPServer(('127.0.0.1', serve), Judge).serve_forever()
else:
    make()
