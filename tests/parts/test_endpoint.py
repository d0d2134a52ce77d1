"""The client of chat endpoints against a server that misbehaves in every way that servers do."""

import base64
import contextlib
import email.utils
import gzip
import html
import json
import socket
import ssl
import time
import tracemalloc
import urllib.parse
import zlib
from collections import Counter
from types import SimpleNamespace

import pytest
from stub import completion, receive, serve, serve_raw

from configurator import UserError
from feedback import endpoint

FAST = dict(backoff=0.02, timeout=0.5, concurrency=4)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ('NANOPREF_API_KEY', 'OPENAI_API_KEY', 'HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy'):
        monkeypatch.delenv(name, raising=False)


def jobs(n):
    return [(i, {'model': 'm', 'messages': [{'role': 'user', 'content': str(i)}]}) for i in range(n)]


def number(body):
    return int(body['messages'][0]['content'])


def test_every_job_is_answered_once_and_no_more_are_under_way_than_asked_for():
    with serve(lambda n, body: f'answer {number(body)}') as server:
        replies = []
        for reply in endpoint.ask(server.url, jobs(30), **FAST):
            replies.append(reply)
            time.sleep(0.02)  # a slow disk
            assert len(server.seen) <= len(replies) - 1 + 4  # what is not written yet is bounded
        assert sorted(replies) == [(i, f'answer {i}', completion(f'answer {i}'), None) for i in range(30)]
        assert len(server.seen) == 30 and server.seen[0][0] == '/v1/chat/completions'
        for url in (server.url + '/', server.url + '/v1', server.url + '/v1/', server.url + '/v1/chat/completions'):
            assert endpoint.completions_url(url) == server.url + '/v1/chat/completions'


FAULTS = {
    '429': (429, {'error': {'message': 'slow down'}}),
    '500': (500, 'oops'),
    '503': (503, ''),
    'garbage': (200, '<html>not json</html>'),
    'other json': (200, {'choices': []}),
    'wrong type': (200, {'choices': [{'message': {'content': 7}}]}),
    'an error with 200': (200, {'error': 'overloaded'}),
    'half': {'do': 'half'},
    'drop': {'do': 'drop'},
    'hang': {'do': 'hang'},
    'drip': {'do': 'drip'},
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_asked_again(fault):
    """Each job's first request gets the fault, its second one an answer."""
    first = set()

    def behave(n, body):
        i = number(body)
        if i in first:
            return str(i)
        first.add(i)
        return FAULTS[fault]

    with serve(behave) as server:
        began = time.monotonic()
        replies = list(endpoint.ask(server.url, jobs(6), **FAST))
        assert sorted(r.text for r in replies) == [str(i) for i in range(6)] and len(server.seen) == 12
        assert time.monotonic() - began < 5  # even those that hang, or drip a byte at a time


def test_a_mixture_of_faults():
    """Every job gets two different faults, and every fault meets every other one in flight."""
    kinds, turn = list(FAULTS.values()), Counter()

    def behave(n, body):
        i = number(body)
        turn[i] += 1
        return kinds[(i + 4 * turn[i]) % len(kinds)] if turn[i] < 3 else str(i)

    with serve(behave) as server:
        replies = list(endpoint.ask(server.url, jobs(22), backoff=0.02, timeout=0.5, concurrency=8))
        assert sorted(int(r.text) for r in replies) == list(range(22)) and len(server.seen) == 66


def test_after_retries_a_job_is_given_back_with_its_reason():
    with serve(lambda n, body: (500, 'ill') if number(body) == 3 else 'ok') as server:
        replies = sorted(endpoint.ask(server.url, jobs(6), retries=2, **FAST))
        assert [r.text for r in replies] == ['ok', 'ok', 'ok', None, 'ok', 'ok'] and len(server.seen) == 5 + 3
        assert replies[3].error.endswith('answers HTTP 500 (ill), after 3 attempts') and replies[3].raw is None


@pytest.mark.parametrize('form', ['seconds', 'date'])
def test_retry_after_is_honoured_by_all(form):
    arrived = []

    def behave(n, body):
        arrived.append(time.monotonic())
        if n:
            return 'ok'
        soon = {'seconds': '1', 'date': email.utils.formatdate(time.time() + 2, usegmt=True)}[form]
        return 429, '', {'Retry-After': soon}

    with serve(behave) as server:
        assert len(list(endpoint.ask(server.url, jobs(3), backoff=0.01, timeout=5, concurrency=1))) == 3
    assert arrived[1] - arrived[0] >= 0.95


@pytest.mark.parametrize('form', ['0', 'past'])
def test_a_retry_after_that_asks_for_nothing_does_not_end_the_waiting(form):
    began = time.monotonic()

    def behave(n, body):
        soon = '0' if form == '0' else email.utils.formatdate(time.time() - 5, usegmt=True)
        return 'ok' if time.monotonic() - began > 0.5 else (429, '', {'Retry-After': soon})

    with serve(behave) as server:
        replies = list(endpoint.ask(server.url, jobs(2), backoff=0.1, timeout=5, concurrency=1))
        assert [r.text for r in replies] == ['ok', 'ok'] and len(server.seen) < 8


@pytest.mark.parametrize('name, value', [('ALL_PROXY', 'foo://127.0.0.1:1'), ('SSL_CERT_FILE', '/no/such/file')])
def test_an_environment_that_cannot_be_used(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='as the environment asks'):
        list(endpoint.ask('http://127.0.0.1:9', jobs(1), **FAST))


def test_a_long_retry_after_is_left_to_the_user():
    with serve(lambda n, body: (429, 'quota', {'Retry-After': '7200'})) as server:
        with pytest.raises(UserError, match='asks to wait 7200 s: run the same command again'):
            list(endpoint.ask(server.url, jobs(3), **FAST))


@pytest.mark.parametrize('status, advice', [(400, 'suit it'), (401, 'NANOPREF_API_KEY'), (403, 'NANOPREF_API_KEY'),
                                            (404, 'address and the model'), (308, 'address and the model')])  # fmt: skip
def test_refusals_stop_at_once(status, advice):
    with serve(lambda n, body: (status, {'error': {'message': 'no\nsuch model'}})) as server:
        with pytest.raises(UserError, match=f'HTTP {status} .no such model.*{advice}') as error:
            list(endpoint.ask(server.url, jobs(50), **FAST))
        assert len(server.seen) <= 4 and '\n' not in str(error.value)


def test_no_credit_stops_at_once():
    reply = (429, {'error': {'message': 'You have none', 'code': 'insufficient_quota'}})
    with serve(lambda n, body: reply) as server, pytest.raises(UserError, match='no credit left'):
        list(endpoint.ask(server.url, jobs(50), **FAST))


@pytest.mark.parametrize('bad', [{0}, {7}])
def test_one_refused_job_fails_alone(bad):
    """Too long a prompt is that job's fault: the endpoint answers the others."""
    with serve(lambda n, body: (400, 'too long') if number(body) in bad else 'ok') as server:
        replies = sorted(endpoint.ask(server.url, jobs(12), **FAST))
        assert [r.key for r in replies if r.text is None] == list(bad) and len(replies) == len(server.seen) == 12
        assert 'too long' in replies[min(bad)].error
        assert [r.text for r in endpoint.ask(server.url, [(0, jobs(8)[min(bad)][1])], proven=True, **FAST)] == [None]


@pytest.mark.parametrize('answered, limit', [(0, 4), (30, 20)])
def test_an_endpoint_that_fails_every_job_is_not_asked_for_ever(answered, limit):
    with serve(lambda n, body: 'ok' if n < answered else (502, 'bad gateway')) as server:
        with pytest.raises(UserError, match=f'^{limit} requests in a row failed; the last one: .*502'):
            list(endpoint.ask(server.url, jobs(100), retries=0, **FAST))
        assert len(server.seen) < answered + limit + 5


def test_no_server():
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        port = unused.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(UserError, match=f'{port}/v1/chat/completions cannot be reached .*is the server running'):
        list(endpoint.ask(f'http://127.0.0.1:{port}', jobs(50)))
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    'url', ['127.0.0.1:8000', 'ftp://host', 'http://', 'https://me:secret-1@host', 'https://host/?key=secret-1']
)
def test_addresses_that_are_none(url):
    with pytest.raises(UserError) as error:
        endpoint.completions_url(url)
    assert 'secret-1' not in str(error.value)


@pytest.mark.parametrize('name', ['NANOPREF_API_KEY', 'OPENAI_API_KEY'])
def test_the_key_is_sent_and_never_given_back(name, monkeypatch):
    key = 'sk-made"up\\12345678'
    monkeypatch.setenv(name, key + '\n')
    unicode = ''.join(f'\\u{ord(c):04x}' for c in key)
    escaped = '{"choices": [{"message": {"content": "KEY"}}], "you": {"KEY": 1}}'.replace('KEY', unicode)

    def behave(n, body):
        return {0: f'you are {key}', 1: (200, escaped), 2: (500, 'x' * 290 + key), 3: (401, {'error': f'wrong {key}'})}[
            number(body)
        ]

    with serve(behave) as server:
        replies = list(endpoint.ask(server.url, jobs(3), retries=0, **FAST))
        assert server.seen[0][1]['Authorization'] == f'Bearer {key}'
        with pytest.raises(UserError) as error:
            list(endpoint.ask(server.url, jobs(4)[3:], **FAST))
    shown = repr(replies) + json.dumps(replies) + str(error.value)
    assert 'sk-made' not in shown and '12345678' not in shown and shown.count('[key]') >= 4


KEY = r'sk-a.b*c+(d|e)$[f]"\'/&<_09Zz'  # characters of regular expressions, json, HTML and URLs


def shown_by(behave_or_play, raw=False, **options):
    """All that a user of the endpoint ever sees of its replies: text, json and reasons."""
    options = FAST | {'retries': 0, 'concurrency': 1} | options
    with (serve_raw if raw else serve)(behave_or_play) as server:
        try:
            replies = list(endpoint.ask(server if raw else server.url, jobs(1), **options))
        except UserError as error:
            return str(error)
        return json.dumps(replies, ensure_ascii=False) + replies[0].error if replies[0].error else json.dumps(replies)


BROKEN = {
    'header': b'HTTP/1.1 200 OK\r\nX Echo KEY\r\n\r\n',
    'header with no name': b'HTTP/1.1 200 OK\r\n: KEY\r\n\r\n',
    'status line': b'HTTP/1.1 KEY OK\r\n\r\n',
    'first line': b'KEY\r\n\r\n',
    'length': b'HTTP/1.1 200 OK\r\nContent-Length: KEY\r\n\r\n',
    'lengths': b'HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: KEY\r\n\r\n',
    'transfer encoding': b'HTTP/1.1 200 OK\r\nTransfer-Encoding: KEY\r\n\r\n',
    'content encoding': b'HTTP/1.1 200 OK\r\nContent-Encoding: KEY\r\nContent-Length: 1\r\n\r\nx',
    'chunk': b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nKEY\r\n',
    'reason': b'HTTP/1.1 404 KEY\r\nContent-Length: 0\r\n\r\n',
    'place': b'HTTP/1.1 302 Found\r\nLocation: http://KEY\r\nContent-Length: 0\r\n\r\n',
    'retry': b'HTTP/1.1 429 Slow\r\nRetry-After: 99999999KEY\r\nContent-Length: 0\r\n\r\n',
    'cookie': b'HTTP/1.1 401 No\r\nSet-Cookie: KEY\r\nWWW-Authenticate: KEY\r\nContent-Length: 0\r\n\r\n',
    'page': b'HTTP/1.1 502 Bad\r\nContent-Length: 999\r\n\r\n<pre>Authorization: Bearer KEY</pre>',
}


@pytest.mark.parametrize('library', ['httpx', 'httpx2'])
@pytest.mark.parametrize('where', BROKEN)
def test_no_part_of_a_reply_shows_the_key(where, library, monkeypatch):
    """The HTTP library quotes what it cannot read."""
    http = pytest.importorskip(library)
    monkeypatch.setattr(endpoint, '_http', lambda: http)
    monkeypatch.setenv('NANOPREF_API_KEY', KEY)
    shown = shown_by(lambda connection, n: connection.sendall(BROKEN[where].replace(b'KEY', KEY.encode())), raw=True)
    assert shown and not leaks(shown, KEY)


def leaks(shown, key):
    """Whether a third of the key stands in a text, or in what the text says to those who undo escapes."""
    said = [shown, html.unescape(shown), urllib.parse.unquote(urllib.parse.unquote(shown)), shown.replace('\\', '')]
    with contextlib.suppress(ValueError):
        said.append(json.loads(f'"{shown}"'))
    bare, n = key.replace('\\', '').lower(), max(4, len(key) // 3)
    pieces = {bare[i : i + n] for i in range(len(bare) - n + 1)}
    return [piece for piece in pieces for text in said if piece in text.replace('\\', '').lower()]


WRITTEN = {
    'plain': lambda key: key,
    'lower case': str.lower,
    'upper case': str.upper,
    'json': json.dumps,
    'json in json': lambda key: json.dumps(json.dumps(key)),
    'python': lambda key: repr(key.encode()),
    'every byte': lambda key: ''.join(f'\\x{ord(c):02x}' for c in key),
    'unicode escapes': lambda key: ''.join(f'\\u{ord(c):04X}' for c in key),
    'url': lambda key: urllib.parse.quote(key, safe=''),
    'url, twice': lambda key: urllib.parse.quote(urllib.parse.quote(key)),
    'url, all': lambda key: ''.join(f'%{ord(c):02x}' for c in key),
    'html': html.escape,
    'html, decimal': lambda key: ''.join(f'&#{ord(c)};' for c in key),
    'html, hex': lambda key: ''.join(f'&#x{ord(c):X};' for c in key),
    'cut short': lambda key: key[: 2 * len(key) // 3],
    'its end': lambda key: '...' + key[len(key) // 3 :],
    'twice': lambda key: key + key,
}


@pytest.mark.parametrize('key', [KEY, 'qwertyui', 'zzzzzzzzzzzz', 'q' * 3 + '%41' * 400, '\\' * 9 + '$^'])
@pytest.mark.parametrize('written', WRITTEN)
def test_the_key_in_other_forms(written, key):
    others = endpoint._Others(key)
    text = f'before {WRITTEN[written](key)} behind'
    if written not in ('cut short', 'its end') or key == KEY:
        for found in (others.line(text), others.text(text), str(others.json(json.dumps({text: [text]}).encode()))):
            assert 'before' in found and 'behind' in found and '[key]' in found
            assert not leaks(found, key)
    assert others.text('what nobody hides: sk-, \\ and 100%') == 'what nobody hides: sk-, \\ and 100%'


@pytest.mark.parametrize('before', ['', 'B', 'Be', 'Bearer ', 'user:', 'http://host/?k='])
@pytest.mark.parametrize('code', [base64.b64encode, base64.urlsafe_b64encode])
def test_the_key_in_base64_and_hex(before, code):
    others = endpoint._Others(KEY)
    coded = code((before + KEY + '\n').encode()).decode()
    found = others.line(f'before {coded} behind')
    assert '[key]' in found and found.startswith('before ') and found.endswith(' behind')
    left = found.replace('[key]', '').removeprefix('before ').removesuffix(' behind')
    assert len(left) <= len(before) * 4 / 3 + 6
    for coded in (KEY.encode().hex(), KEY.encode().hex(' ').upper(), KEY.encode().hex(':')):
        assert others.line(f'before {coded} behind') == 'before [key] behind'


def test_a_short_key_leaves_answers_alone(monkeypatch):
    """Servers of one's own take words for a key."""
    monkeypatch.setenv('NANOPREF_API_KEY', 'EMPTY')
    assert 'the box is EMPTY' in shown_by(lambda n, body: 'the box is EMPTY')
    assert 'wrong key [key].' in shown_by(lambda n, body: (401, 'wrong key EMPTY.'))


def test_the_passwords_of_a_proxy(monkeypatch):
    """They stand in the environment, and in the pages of proxies."""
    monkeypatch.setenv('NANOPREF_API_KEY', KEY)
    page = 'HTTP/1.1 407 No\r\n\r\nGET x\r\nProxy-Authorization: Basic {}\r\nAuthorization: Bearer {}'
    login = base64.b64encode(b'me:p@ss-word-77').decode()
    seen = []

    def play(connection, n):
        seen.append(n)
        connection.sendall(page.format(login, KEY).encode())

    with serve_raw(play) as url:
        for name in ('HTTP_PROXY', 'http_proxy'):
            monkeypatch.setenv(name, url.replace('//', '//me:p%40ss-word-77@'))
        with pytest.raises(UserError) as error:
            list(endpoint.ask('http://host.invalid', jobs(1), **FAST))
    assert seen and login[8:-4] not in str(error.value) and not leaks(str(error.value), KEY)
    monkeypatch.setenv('ALL_PROXY', 'foo://me:p%40ss-word-77@127.0.0.1:1')
    with pytest.raises(UserError, match='as the environment asks') as error:
        list(endpoint.ask('http://127.0.0.1:9', jobs(1), **FAST))
    assert 'ss-word' not in str(error.value)


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_no_redirect_carries_the_key_away(status, monkeypatch):
    monkeypatch.setenv('NANOPREF_API_KEY', KEY)
    with serve(lambda n, body: 'stolen') as thief:
        with serve(lambda n, body: (status, '', {'Location': thief.url + '/v1/chat/completions'})) as server:
            with pytest.raises(UserError, match=f'HTTP {status} .*see that the address'):
                list(endpoint.ask(server.url, jobs(3), **FAST))
        assert not thief.seen


def test_messages_move_no_cursor():
    shown = shown_by(lambda n, body: (404, {'error': {'message': '\x1b[2J\x1b]0;x\x07 a\u202eb\r\n\ud800 c'}}))
    assert shown.isprintable() and '[2J' in shown and 'a b' in shown


# ---- time and size ----


def drip(*pieces, every=0.05):
    """Send one piece after the other, the last one again and again, slowly."""

    def play(connection, n):
        for piece in pieces[:-1]:
            connection.sendall(piece)
        for _ in range(int(20 / every)):
            connection.sendall(pieces[-1])
            time.sleep(every)

    return play


OK = b'HTTP/1.1 200 OK\r\n'
ENDLESS = {
    'a header': drip(OK + b'X: ', b'x'),
    'headers': drip(OK, b'X: x\r\n'),
    'the status line': drip(b'HTTP/1.1 200 ', b'O'),
    'continue': drip(b'HTTP/1.1 100 Continue\r\n\r\n'),
    'continue, fast': drip(b'HTTP/1.1 100 Continue\r\n\r\n' * 50, every=0.001),
    'early hints': drip(b'HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n'),
    'chunks': drip(OK + b'Transfer-Encoding: chunked\r\n\r\n', b'1\r\nx\r\n'),
    'the size of a chunk': drip(OK + b'Transfer-Encoding: chunked\r\n\r\n', b'0'),
    'trailers': drip(OK + b'Transfer-Encoding: chunked\r\n\r\n0\r\n', b'X: x\r\n'),
    'to the end of the connection': drip(OK + b'\r\n{"choices": [{"message": {"content": "x"}}]}', b' '),
    'gzip of nothing': drip(OK + b'Content-Encoding: gzip\r\n\r\n\x1f\x8b\x08\x08\0\0\0\0\0\0', b'x'),
    'nothing': drip(b''),
}


@pytest.mark.parametrize(
    'what, library',
    [(what, 'httpx2') for what in ENDLESS] + [('a header', 'httpx'), ('continue', 'httpx'), ('chunks', 'httpx')],
)
def test_a_time_out_holds_for_the_whole_reply(what, library, monkeypatch):
    http = pytest.importorskip(library)
    monkeypatch.setattr(endpoint, '_http', lambda: http)
    began = time.monotonic()
    assert 'no reply within 0.3 s' in shown_by(ENDLESS[what], raw=True, timeout=0.3)
    assert time.monotonic() - began < 2.5


def test_a_time_out_holds_for_the_second_request_of_a_connection():
    reply = json.dumps(completion('ok')).encode()

    def play(connection, n):
        connection.sendall(OK + b'Content-Length: %d\r\n\r\n' % len(reply) + reply)
        receive(connection)
        ENDLESS['continue'](connection, n)

    with serve_raw(play) as url:
        began = time.monotonic()
        replies = list(endpoint.ask(url, jobs(2), retries=0, concurrency=1, timeout=0.5))
    assert replies[0].text == 'ok' and 'no reply within' in replies[1].error and time.monotonic() - began < 3


def test_a_time_out_holds_for_tls():
    """A server that shakes no hands, and says nothing more."""
    with serve_raw(drip(b'\x16\x03\x03\x40\x00', b'\x02')) as url:
        began = time.monotonic()
        with contextlib.suppress(UserError, ssl.SSLError):
            list(endpoint.ask(url.replace('http:', 'https:'), jobs(1), retries=0, concurrency=1, timeout=0.5))
    assert time.monotonic() - began < 3


def packed(content, headers=b'', code=gzip.compress):
    content = code(content)
    return OK + headers + b'Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n' % len(content) + content


def test_a_reply_that_begins_with_a_byte_order_mark_is_read():
    assert '"fine"' in shown_by(lambda n, body: (200, '\ufeff' + json.dumps(completion('fine'))))


def test_a_time_out_holds_for_what_is_sent_and_for_a_proxy(monkeypatch):
    """A server that reads nothing, and a proxy that goes on with what it says of itself."""
    began = time.monotonic()
    with socket.create_server(('127.0.0.1', 0)) as deaf:
        url = f'http://127.0.0.1:{deaf.getsockname()[1]}'
        large = [(0, {'messages': 'x' * 20_000_000})]
        (reply,) = endpoint.ask(url, large, timeout=0.5, retries=0, concurrency=1)
    assert 'no reply within' in reply.error
    for name in ('a header', 'continue'):
        with serve_raw(ENDLESS[name]) as url:
            monkeypatch.setenv('https_proxy', url)
            (reply,) = endpoint.ask('https://host.invalid', jobs(1), timeout=0.5, retries=0, concurrency=1)
        assert 'no reply within' in reply.error
    assert time.monotonic() - began < 6


def test_a_packed_reply_is_read_though_none_was_asked_for():
    reply = json.dumps(completion('a ' * 5000)).encode()
    assert 'a a a' in shown_by(lambda connection, n: connection.sendall(packed(reply)), raw=True)
    deflated = packed(reply, code=zlib.compress).replace(b'gzip', b'deflate')
    assert 'a a a' in shown_by(lambda connection, n: connection.sendall(deflated), raw=True)
    half = packed(reply, code=lambda text: gzip.compress(text)[:-20])
    assert 'the packed reply is cut short' in shown_by(lambda connection, n: connection.sendall(half), raw=True)
    more = packed(reply, code=lambda text: gzip.compress(text) + b'more')
    assert 'goes on behind its end' in shown_by(lambda connection, n: connection.sendall(more), raw=True)
    for other in (b'br', b'zstd', b'gzip, gzip', b'x' * 5000):
        reply = OK + b'Content-Encoding: ' + other + b'\r\nContent-Length: 1\r\n\r\nx'
        assert 'was not asked for' in shown_by(lambda connection, n: connection.sendall(reply), raw=True)  # noqa: B023


@pytest.mark.parametrize('content', [b'0' * 250_000_000, b'[],' * 20_000_000, b'{"a":1},' * 8_000_000])
def test_a_bomb_is_not_unpacked(content):
    """A megabyte on the wire, 250 in memory; or 60 in memory, of which the reader of json makes 1,600."""
    bomb, asked = packed(content, code=lambda text: gzip.compress(text, 1)), []
    del content

    def play(connection, n):
        asked.append(n)
        connection.sendall(bomb)

    tracemalloc.start()
    shown = shown_by(play, raw=True, timeout=30, retries=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 'the reply is larger than 64 MB' in shown or 'the reply has more than 2000000 brackets' in shown
    assert peak < 200e6 and len(asked) == 1  # another attempt would cost as much again


def test_an_endless_reply_ends():
    def play(connection, n):
        connection.sendall(OK + b'\r\n')
        while True:
            connection.sendall(b' ' * 2**20)

    assert 'larger than 64 MB' in shown_by(play, raw=True, timeout=30)


def test_a_long_honest_reply_takes_time_in_proportion():
    """50 MB in pieces of every size."""
    text = 'the service says "so".\n' * 2_000_000
    content = json.dumps(completion(text)).encode()

    def play(connection, n):
        connection.sendall(OK + b'Content-Length: %d\r\n\r\n' % len(content) + content)

    began = time.process_time()
    with serve_raw(play) as url:
        (reply,) = endpoint.ask(url, jobs(1), retries=0, concurrency=1, timeout=60)
    assert reply.text == text and time.process_time() - began < 10


@pytest.mark.parametrize('flood', ['\\', '%25', '&#', 's', KEY[:12], 'sk', '&amp;', '\\u00'])
def test_taking_out_a_key_takes_time_in_proportion(flood):
    """A server cannot write what takes long to search."""
    seconds = []
    for size in (200_000, 800_000):
        others, text = endpoint._Others(KEY), flood * (size // len(flood))
        began = time.process_time()
        others.text(text), others.line(text)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 8 * seconds[0] + 0.2 and seconds[1] < 3


# ---- replies of any type ----

VALUES = ['null', 'true', '0', '-1', '1.5', '1e999', '-1e999', 'NaN', 'Infinity', '9' * 30, '9' * 5000, '"12"', '""', '[]', '[1]',
          '{}', '{"a": [null]}', r'"\ud800"', '[' * 99999]  # fmt: skip


@pytest.mark.parametrize('value', VALUES)
def test_every_field_may_be_of_any_type(value):
    """A reply is read, or a reason is given; what is read can be written and read again by any reader of json."""
    reply = '{"choices": [{"message": {"content": "fine", "role": V}, "finish_reason": V, "index": V, "logprobs": V}], "usage": V}'
    fields = ['{"choices": V}', '{"choices": [V]}', '{"choices": [{"message": V}]}', '{"error": V}', '{"detail": V}', 'V',
              '{"error": {"message": V, "code": V}}', '{"choices": [{"message": {"content": V}}]}']  # fmt: skip
    others = endpoint._Others(KEY)
    for status in (200, 400, 429, 500, 404):
        response = SimpleNamespace(status_code=status, headers={})
        for form in [reply, *fields]:
            raw = others.json(form.replace('V', value).encode())
            try:
                text, raw = endpoint._read(response, raw, 'http://x', others)
            except (endpoint._Again, endpoint._Refused, UserError) as error:
                assert str(error).isprintable() and (status != 200 or form != reply or len(value) > 9999)
                continue
            assert status == 200 and isinstance(text, str) and text.encode() is not None
            assert json.loads(json.dumps(raw, allow_nan=False)) == raw
            assert form != reply or text == 'fine'


def test_a_key_that_no_header_takes(monkeypatch):
    monkeypatch.setenv('NANOPREF_API_KEY', 'sk-\u2028secret')
    with pytest.raises(UserError, match='characters that no key has') as error:
        list(endpoint.ask('http://127.0.0.1:9', jobs(1)))
    assert 'secret' not in str(error.value)


def test_stopping_early_asks_no_more():
    with serve(lambda n, body: {'do': 'hang'} if number(body) else 'ok') as server:
        began = time.monotonic()
        replies = endpoint.ask(server.url, jobs(50), timeout=30, concurrency=4)
        assert next(replies).text == 'ok'
        replies.close()  # as Ctrl-C does
        assert time.monotonic() - began < 3
        time.sleep(0.2)
        assert len(server.seen) == 4
