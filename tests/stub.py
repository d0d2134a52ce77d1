"""An OpenAI-compatible endpoint in a thread that misbehaves as told. Used by the tests of endpoint.py and its users."""

import contextlib
import itertools
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text):
    message = {'role': 'assistant', 'content': text}
    return {'id': 'x', 'object': 'chat.completion', 'choices': [{'index': 0, 'message': message}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # head and body would be 40 ms apart

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with server.lock:
            n = len(server.seen)
            server.seen.append((self.path, dict(self.headers), body))
        # what to do, and what to reply with
        what = server.behave(n, body)
        do = what['do'] if isinstance(what, dict) else None
        reply = what if isinstance(what, tuple) else (200, completion('half' if do else what))
        status, content, headers = (*reply, {})[:3]
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.close_connection = do in ('drop', 'half')
        if do == 'hang':
            server.over.wait(60)
        if do in ('hang', 'drop'):
            return
        self.send_response(status)
        for name, value in (headers | {'Content-Length': str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if do == 'half' else content)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def handle_error(self, request, address):
        pass  # the client went away


@contextlib.contextmanager
def serve(behave):
    """Yields the server: .url, .seen (path, headers, body) of each request.

    behave(n, body) says what the n-th request (from 0) gets: a text for a good reply; (status, content) or
    (status, content, headers), content text or json; {'do': 'half'}, or drop, hang."""
    server = Server(('127.0.0.1', 0), Handler)
    server.behave, server.seen, server.lock, server.over = behave, [], threading.Lock(), threading.Event()
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def serve_raw(play):
    """Yields the url of a server in a thread. play(connection, n) answers the n-th connection, once a request has come."""
    port = socket.create_server(('127.0.0.1', 0))

    def one(connection, n):
        with contextlib.suppress(OSError), connection:
            connection.settimeout(30)
            # what is left unread makes the system reset the connection when it is closed
            request = more = connection.recv(65536)
            while more and request.startswith(b'POST') and not request.endswith(b'}'):
                more = connection.recv(65536)
                request += more
            play(connection, n)

    def listen():
        with contextlib.suppress(OSError):
            for n in itertools.count():
                connection, _ = port.accept()
                threading.Thread(target=one, args=(connection, n), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{port.getsockname()[1]}'
    finally:
        port.shutdown(socket.SHUT_RDWR)
        port.close()


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it never happened'
        time.sleep(0.02)
