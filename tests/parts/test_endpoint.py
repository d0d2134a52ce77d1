"""The client of chat endpoints against a server that misbehaves in every way that servers do."""

import base64
import contextlib
import email.utils
import gzip
import html
import json
import re
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

FAST = {'backoff': 0.02, 'timeout': 0.5, 'concurrency': 4}
NOWHERE = 'http://127.0.0.1:9'
KEY = r'sk-a.b*c+(d|e)$[f]"\'/&<_09Zz'  # characters of regular expressions, json, HTML and URLs


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ('NANOPREF_API_KEY', 'OPENAI_API_KEY', 'HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv('NANOPREF_API_KEY', KEY)


def jobs(n):
    return [(i, {'model': 'm', 'messages': [{'role': 'user', 'content': str(i)}]}) for i in range(n)]


def number(body):
    return int(body['messages'][0]['content'])


def ask(where, some, **options):
    """All replies of a server, or an address, to jobs or to so many."""
    some = jobs(some) if isinstance(some, int) else some
    return list(endpoint.ask(getattr(where, 'url', where), some, **(FAST | options)))


def refused(where, some, match, **options):
    with pytest.raises(UserError, match=match) as error:
        ask(where, some, **options)
    return str(error.value)


def shown_by(behave_or_play, raw=False, **options):
    """All that a user of the endpoint ever sees of its replies: text, json and reasons."""
    with (serve_raw if raw else serve)(behave_or_play) as server:
        try:
            replies = ask(server, 1, **{'retries': 0, 'concurrency': 1, **options})
        except UserError as error:
            return str(error)
    return json.dumps(replies, ensure_ascii=False) + (replies[0].error or '')


def sends(content):
    """A raw server that sends these bytes."""
    return lambda connection, n: connection.sendall(content)


@contextlib.contextmanager
def within(seconds):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


# ---- jobs and attempts ----


def test_every_job_is_answered_once_and_no_more_are_under_way_than_asked_for():
    with serve(lambda n, body: f'answer {number(body)}') as server:
        replies = []
        for reply in endpoint.ask(server.url, jobs(30), **FAST):
            replies.append(reply)
            time.sleep(0.02)  # a slow disk
            assert len(server.seen) <= len(replies) - 1 + 4  # what is not written yet is bounded
        assert sorted(replies) == [(i, f'answer {i}', completion(f'answer {i}'), None) for i in range(30)]
        assert len(server.seen) == 30 and server.seen[0][0] == '/v1/chat/completions'


# fmt: off
FAULTS = [
    (429, {'error': {'message': 'slow down'}}), (500, 'oops'), (503, ''), (200, '<html>not json</html>'), (200, {'choices': []}),
    (200, {'choices': [{'message': {'content': 7}}]}), (200, {'error': 'overloaded'}),
    *({'do': do} for do in ('half', 'drop', 'hang', 'drip')),
]
# fmt: on


def test_every_fault_is_asked_again():
    """Every job gets two different faults, and every fault meets every other one in flight."""
    turn = Counter()

    def behave(n, body):
        i = number(body)
        turn[i] += 1
        return FAULTS[(i + 4 * turn[i]) % len(FAULTS)] if turn[i] < 3 else str(i)

    with serve(behave) as server, within(8):  # even those that hang, or drip a byte at a time
        replies = ask(server, 22, concurrency=8)
        assert sorted(int(r.text) for r in replies) == list(range(22)) and len(server.seen) == 66


def test_after_retries_a_job_is_given_back_with_its_reason():
    with serve(lambda n, body: (500, 'ill') if number(body) == 3 else 'ok') as server:
        replies = sorted(ask(server, 6, retries=2))
        assert [r.text for r in replies] == ['ok', 'ok', 'ok', None, 'ok', 'ok'] and len(server.seen) == 5 + 3
        assert replies[3].error.endswith('answers HTTP 500 (ill), after 3 attempts') and replies[3].raw is None


def date_in(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize('soon', [lambda: '1', lambda: date_in(2)], ids=['seconds', 'date'])
def test_retry_after_is_honoured_by_all(soon):
    arrived = []

    def behave(n, body):
        arrived.append(time.monotonic())
        return 'ok' if n else (429, '', {'Retry-After': soon()})

    with serve(behave) as server:
        assert len(ask(server, 3, backoff=0.01, timeout=5, concurrency=1)) == 3
    assert arrived[1] - arrived[0] >= 0.95


@pytest.mark.parametrize('soon', [lambda: '0', lambda: '0.01', lambda: date_in(-5)], ids=['0', 'little', 'past'])
def test_a_retry_after_that_asks_for_next_to_nothing_does_not_end_the_waiting(soon):
    began = time.monotonic()
    slow_down = lambda: (429, '', {'Retry-After': soon()})  # noqa: E731
    with serve(lambda n, body: 'ok' if time.monotonic() - began > 0.5 else slow_down()) as server:
        replies = ask(server, 2, backoff=0.1, timeout=5, concurrency=1)
        assert [r.text for r in replies] == ['ok', 'ok'] and len(server.seen) < 8


# fmt: off
USELESS = [
    ((429, 'quota', {'Retry-After': '7200'}), r'asks to wait 7200 s: run the same command again'),
    ((429, {'error': {'message': 'You have none', 'code': 'insufficient_quota'}}), r'no credit left'),
    *(((status, {'error': {'message': 'no\nsuch model'}}), f'HTTP {status} .no such model.*{advice}') for status, advice in [
        (400, 'suit it'), (401, 'NANOPREF_API_KEY'), (403, 'NANOPREF_API_KEY'),
        (404, 'address and the model'), (308, 'address and the model')]),
]
# fmt: on


@pytest.mark.parametrize('reply, sentence', USELESS)
def test_where_going_on_is_useless_all_stops_at_once(reply, sentence):
    with serve(lambda n, body: reply) as server:
        assert '\n' not in refused(server, 50, sentence)
        assert len(server.seen) <= 4


@pytest.mark.parametrize('bad', [0, 7])
def test_one_refused_job_fails_alone(bad):
    """Too long a prompt is that job's fault: the endpoint answers the others."""
    with serve(lambda n, body: (400, 'too long') if number(body) == bad else 'ok') as server:
        replies = sorted(ask(server, 12))
        assert [r.key for r in replies if r.text is None] == [bad] and len(replies) == len(server.seen) == 12
        assert 'too long' in replies[bad].error
        assert [r.text for r in ask(server, [jobs(8)[bad]], proven=True)] == [None]


@pytest.mark.parametrize('answered, limit', [(0, 4), (30, 20)])
def test_an_endpoint_that_fails_every_job_is_not_asked_for_ever(answered, limit):
    with serve(lambda n, body: 'ok' if n < answered else (502, 'bad gateway')) as server:
        refused(server, 100, f'^{limit} requests in a row failed; the last one: .*502', retries=0)
        assert len(server.seen) < answered + limit + 5


def test_failures_among_answers_are_no_reason_to_stop():
    with serve(lambda n, body: 'ok' if number(body) % 2 else (502, 'bad gateway')) as server:
        assert sum(reply.text is None for reply in ask(server, 60, retries=0)) == 30


def test_no_server():
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        port = unused.getsockname()[1]
    sentence = f'{port}/v1/chat/completions cannot be reached .*is the server running'
    with within(8):
        refused(f'http://127.0.0.1:{port}', 50, sentence, backoff=1.0, timeout=120.0, concurrency=8)


def test_stopping_early_asks_no_more():
    with serve(lambda n, body: {'do': 'hang'} if number(body) else 'ok') as server:
        replies = endpoint.ask(server.url, jobs(50), timeout=30, concurrency=4)
        with within(3):
            assert next(replies).text == 'ok'
            replies.close()  # as Ctrl-C does
        time.sleep(0.2)
        assert len(server.seen) == 4


# ---- addresses and surroundings ----


def test_addresses():
    base = 'http://host:1/a'
    for url in (base, base + '/', base + '/v1', base + '/v1/', base + '/v1/chat/completions'):
        assert endpoint.completions_url(url) == base + '/v1/chat/completions'
    for url in ('127.0.0.1:8000', 'ftp://host', 'http://', 'https://me:secret-1@host', 'https://host/?key=secret-1'):
        with pytest.raises(UserError) as error:
            endpoint.completions_url(url)
        assert 'secret-1' not in str(error.value)


@pytest.mark.parametrize('proxy', ['foo://127.0.0.1:1', 'foo://me:p%40ss-word-77@127.0.0.1:1', None])
def test_an_environment_that_cannot_be_used(monkeypatch, proxy):
    monkeypatch.setenv('ALL_PROXY' if proxy else 'SSL_CERT_FILE', proxy or '/no/such/file')
    assert 'ss-word' not in refused(NOWHERE, 1, 'as the environment asks')


def test_a_key_that_no_header_takes(monkeypatch):
    monkeypatch.setenv('NANOPREF_API_KEY', 'sk-\u2028secret')
    assert 'secret' not in refused(NOWHERE, 1, 'characters that no key has')


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_no_redirect_carries_the_key_away(status, key):
    with serve(lambda n, body: 'stolen') as thief:
        moved = (status, '', {'Location': thief.url + '/v1/chat/completions'})
        with serve(lambda n, body: moved) as server:
            refused(server, 3, f'HTTP {status} .*see that the address')
        assert not thief.seen


# ---- the key is shown nowhere ----


@pytest.mark.parametrize('name', ['NANOPREF_API_KEY', 'OPENAI_API_KEY'])
def test_the_key_is_sent_and_never_given_back(name, monkeypatch):
    key = 'sk-made"up\\12345678'
    monkeypatch.setenv(name, key + '\n')
    unicode = ''.join(f'\\u{ord(c):04x}' for c in key)
    escaped = '{"choices": [{"message": {"content": "KEY"}}], "you": {"KEY": 1}}'.replace('KEY', unicode)
    said = [f'you are {key}', (200, escaped), (500, 'x' * 290 + key), (401, {'error': f'wrong {key}'})]
    with serve(lambda n, body: said[number(body)]) as server:
        replies = ask(server, 3, retries=0)
        assert server.seen[0][1]['Authorization'] == f'Bearer {key}'
        shown = repr(replies) + json.dumps(replies) + refused(server, jobs(4)[3:], '401')
    assert 'sk-made' not in shown and '12345678' not in shown and shown.count('[key]') >= 4


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


@pytest.fixture
def http(request, monkeypatch):
    """The HTTP library of a parameter."""
    library = pytest.importorskip(request.param)
    monkeypatch.setattr(endpoint, '_http', lambda: library)


@pytest.mark.parametrize('http', ['httpx', 'httpx2'], indirect=True)
@pytest.mark.parametrize('where', BROKEN)
def test_no_part_of_a_reply_shows_the_key(where, http, key):
    """The HTTP library quotes what it cannot read."""
    shown = shown_by(sends(BROKEN[where].replace(b'KEY', KEY.encode())), raw=True)
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


def test_the_passwords_of_a_proxy(monkeypatch, key):
    """They stand in the environment, and in the pages of proxies."""
    login, seen = base64.b64encode(b'me:p@ss-word-77').decode(), []
    page = f'HTTP/1.1 407 No\r\n\r\nGET x\r\nProxy-Authorization: Basic {login}\r\nAuthorization: Bearer {KEY}'

    def play(connection, n):
        seen.append(n)
        sends(page.encode())(connection, n)

    with serve_raw(play) as url:
        for name in ('HTTP_PROXY', 'http_proxy'):
            monkeypatch.setenv(name, url.replace('//', '//me:p%40ss-word-77@'))
        shown = refused('http://host.invalid', 1, None)
    assert seen and login[8:-4] not in shown and not leaks(shown, KEY)


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
    'what, http',
    [(what, 'httpx2') for what in ENDLESS] + [(what, 'httpx') for what in ('a header', 'continue', 'chunks')],
    indirect=['http'],
)
def test_a_time_out_holds_for_the_whole_reply(what, http):
    with within(2.5):
        assert 'no reply within 0.3 s' in shown_by(ENDLESS[what], raw=True, timeout=0.3)


def test_a_time_out_holds_for_the_second_request_of_a_connection():
    reply = json.dumps(completion('ok')).encode()

    def play(connection, n):
        connection.sendall(OK + b'Content-Length: %d\r\n\r\n' % len(reply) + reply)
        receive(connection)
        ENDLESS['continue'](connection, n)

    with serve_raw(play) as url, within(3):
        replies = ask(url, 2, retries=0, concurrency=1)
    assert replies[0].text == 'ok' and 'no reply within' in replies[1].error


def test_a_time_out_holds_for_tls_for_what_is_sent_and_for_a_proxy(monkeypatch):
    """A server that shakes no hands and says nothing more, one that reads nothing, a proxy that goes on with itself."""
    once = {'retries': 0, 'concurrency': 1}
    with serve_raw(drip(b'\x16\x03\x03\x40\x00', b'\x02')) as url, within(3):
        with contextlib.suppress(UserError, ssl.SSLError):
            ask(url.replace('http:', 'https:'), 1, **once)
    with socket.create_server(('127.0.0.1', 0)) as deaf, within(3):
        large = [(0, {'messages': 'x' * 20_000_000})]
        (reply,) = ask(f'http://127.0.0.1:{deaf.getsockname()[1]}', large, **once)
    assert 'no reply within' in reply.error
    for name in ('a header', 'continue'):
        with serve_raw(ENDLESS[name]) as url, within(3):
            monkeypatch.setenv('https_proxy', url)
            (reply,) = ask('https://host.invalid', 1, **once)
        assert 'no reply within' in reply.error


def packed(content, code=gzip.compress, name=b'gzip'):
    content = code(content)
    return OK + b'Content-Encoding: %s\r\nContent-Length: %d\r\n\r\n' % (name, len(content)) + content


LONG = json.dumps(completion('a ' * 5000)).encode()
UNASKED = 'was not asked for'
# fmt: off
PACKED = {
    'gzip': (packed(LONG), 'a a a'),
    'deflate': (packed(LONG, zlib.compress, b'deflate'), 'a a a'),
    'half': (packed(LONG, lambda text: gzip.compress(text)[:-20]), 'the packed reply is cut short'),
    'more': (packed(LONG, lambda text: gzip.compress(text) + b'more'), 'goes on behind its end'),
    **{name[:10].decode(): (packed(b'x', bytes, name), UNASKED) for name in (b'br', b'zstd', b'gzip, gzip', b'x' * 5000)},
}
# fmt: on


@pytest.mark.parametrize('reply, words', PACKED.values(), ids=PACKED)
def test_a_packed_reply_is_read_though_none_was_asked_for(reply, words):
    assert words in shown_by(sends(reply), raw=True)


def test_a_reply_that_begins_with_a_byte_order_mark_is_read():
    assert '"fine"' in shown_by(lambda n, body: (200, '\ufeff' + json.dumps(completion('fine'))))


@pytest.mark.parametrize('content', [b'0' * 250_000_000, b'[],' * 20_000_000, b'{"a":1},' * 8_000_000])
def test_a_bomb_is_not_unpacked(content):
    """A megabyte on the wire, 250 in memory; or 60 in memory, of which the reader of json makes 1,600."""
    bomb, asked = packed(content, lambda text: gzip.compress(text, 1)), []
    del content

    def play(connection, n):
        asked.append(n)
        connection.sendall(bomb)

    tracemalloc.start()
    shown = shown_by(play, raw=True, timeout=30, retries=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert re.search('the reply (is larger than 64 MB|has more than 2000000 brackets)', shown)
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
    began = time.process_time()
    with serve_raw(sends(OK + b'Content-Length: %d\r\n\r\n' % len(content) + content)) as url:
        (reply,) = ask(url, 1, retries=0, concurrency=1, timeout=60)
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

# fmt: off
VALUES = ['null', 'true', '0', '-1', '1.5', '1e999', '-1e999', 'NaN', 'Infinity', '9' * 30, '9' * 5000, '"12"', '""', '[]', '[1]',
          '{}', '{"a": [null]}', r'"\ud800"', '[' * 99999]
# fmt: on


@pytest.mark.parametrize('value', VALUES)
def test_every_field_may_be_of_any_type(value):
    """A reply is read, or a reason is given; what is read can be written and read again by any reader of json."""
    reply = '{"choices": [{"message": {"content": "fine", "role": V}, "finish_reason": V, "index": V, "logprobs": V}], "usage": V}'
    fields = [
        '{"choices": V}',
        '{"choices": [V]}',
        '{"choices": [{"message": V}]}',
        '{"error": V}',
        '{"detail": V}',
        'V',
    ]
    fields += ['{"error": {"message": V, "code": V}}', '{"choices": [{"message": {"content": V}}]}']
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
