"""What a dry run (DRY=1) of a procedure in this folder uses instead of the real thing.

python -m experiments.papers.stand_ins --out=FOLDER [--hh=PAIRS]    # tiny/ (a model), hh.jsonl, sharegpt.json, alpaca_eval.json: 64 examples
python -m experiments.papers.stand_ins --serve=8765                 # a judge: the answer with more different letters wins
"""

import json
import re
from itertools import islice
from pathlib import Path

from configurator import UserError, configure

out = 'out/dry'  # where the stand-ins go
hh: str | None = None  # a file of HH pairs; None: the toy world's, written as HH's
serve: int | None = None  # answer as a judge on this port of 127.0.0.1 instead


config = configure(globals())

N = 64  # examples


def toy_as_hh(file):
    """Pairs of the toy world as dialogues, a prompt each, enough of them for both parts of a divided file."""
    from text import toy

    talks = [
        (f'\n\nHuman: {row["prompt"]} number {i}\n\nAssistant:', row) for i, row in enumerate(toy.pairs('train', 600))
    ]
    rows = [{side: talk + row[side] for side in ('chosen', 'rejected')} for talk, row in talks]
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return file


def make():
    from hf import load
    from text import messages, sources, toy

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    source = hh or toy_as_hh(folder / 'toy.jsonl')
    if not Path(source).exists():
        raise UserError(f'there is no {source}: give HH=FILE, pairs of Anthropic/hh-rlhf')
    # of both parts of a divided file; the test part is a twentieth
    rows = [
        row
        for split, n in (('train', N - 8), ('test', 8))
        for row in islice(sources.load_rows(f'hh:{source}', split)[0], n)
    ]
    text = [{side: row['prompt'] + row[side] for side in ('chosen', 'rejected')} for row in rows]
    (folder / 'hh.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in text))
    asked = [messages.instruction(row['prompt']).strip() for row in rows]
    talks = [{'conversations': [{'from': 'human', 'value': q}, {'from': 'gpt', 'value': row['chosen'].strip()}]}
             for q, row in zip(asked, rows, strict=True)]  # fmt: skip
    (folder / 'sharegpt.json').write_text(json.dumps(talks))
    (folder / 'alpaca_eval.json').write_text(json.dumps([{'instruction': q, 'output': ''} for q in asked]))
    if not (folder / 'tiny').exists():
        tokenizer = toy.tokenizer()  # of bytes and a few words: any text
        load.load_model('toy').save_pretrained(folder / 'tiny')
        tokenizer.save_pretrained(folder / 'tiny')
    print(f'stand-ins: {N} examples of {source}, an untrained model of two layers: {folder}')


def verdict(content):
    """The reply to config/judge_pair.txt filled in: how many letters both answers have, and the line that label.py reads."""
    a, b = (len(set(re.search(f'<<< answer {x} >>>(.*?)<<< end', content, re.S)[1])) for x in 'AB')
    better = 'A' if a > b else 'B'
    return f'Letters: {a} and {b}.\nVerdict: {better if a != b else "tie"}'


def judge(port):
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            message = {'role': 'assistant', 'content': verdict(body['messages'][-1]['content'])}
            reply = {
                'object': 'chat.completion',
                'choices': [{'index': 0, 'message': message, 'finish_reason': 'stop'}],
            }
            content = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    ThreadingHTTPServer(('127.0.0.1', port), Handler).serve_forever()


if serve:
    judge(serve)
else:
    make()
