"""The judge of a dry run (DRY=1) of a procedure in this folder, on a port of 127.0.0.1: the answer with more different letters wins.

python -m experiments.papers.judge 8765
"""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def verdict(content):
    """Return the reply to a filled-in config/judge_pair.txt: how many letters each answer has, and the line that label.py reads."""
    answers = [re.search(f'<<< answer {x} >>>(.*?)<<< end', content, re.S)[1] for x in 'AB']
    a, b = (len(set(answer)) for answer in answers)
    winner = 'A' if a > b else 'B'
    return f'Letters: {a} and {b}.\nVerdict: {"tie" if a == b else winner}'


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


if __name__ == '__main__':
    ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Judge).serve_forever()
