"""The client of chat endpoints against a server that misbehaves in every way that servers do."""

import contextlib
import gzip
import json
import re
import socket
import threading
import time
from collections import Counter

import pytest
from stub import completion, serve, serve_raw

from configurator import UserError
from feedback import endpoint

FAST = {'backoff': 0.02, 'timeout': 0.5, 'concurrency': 4}
ONCE = {'retries': 0, 'concurrency': 1, 'proven': True}  # one attempt, whose failure is no reason to stop
NOWHERE = 'http://127.0.0.1:9'
KEY = 'sk-made-up_0123456789'
OK = b'HTTP/1.1 200 OK\r\n'


@pytest.fixture(autouse=True)
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
    assert str(error.value).isprintable()
    return str(error.value)


def shown_by(play, **options):
    """All that a user sees of one reply of a raw server, which plays or sends these bytes: text, json and reasons."""
    if isinstance(play, bytes):
        content = play
        play = lambda connection, n: connection.sendall(content)  # noqa: E731
    with serve_raw(play) as url:
        try:
            (reply,) = ask(url, 1, **(ONCE | options))
        except UserError as error:
            return str(error)
    return json.dumps(reply, ensure_ascii=False, allow_nan=False) + (reply.error or '')


@contextlib.contextmanager
def within(seconds):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_every_job_is_answered_once_and_as_many_are_under_way_as_asked_for():
    with serve(lambda n, body: f'answer {number(body)}') as server:
        replies = []
        for reply in endpoint.ask(server.url, jobs(30), **FAST):
            replies.append(reply)
            time.sleep(0.02)  # a slow disk
            assert len(server.seen) <= len(replies) - 1 + 4  # what is not written yet is bounded
    assert sorted(replies) == [(i, f'answer {i}', completion(f'answer {i}'), None) for i in range(30)]
    path, headers, _ = server.seen[0]
    assert len(server.seen) == 30 and (path, headers['Authorization']) == ('/v1/chat/completions', f'Bearer {KEY}')
    all_here = threading.Barrier(endpoint.FAILED_IN_A_ROW + 1, timeout=5)  # more than may fail in a row
    with serve(lambda n, body: str(n < all_here.parties and all_here.wait())) as server:
        assert len(ask(server, 90, concurrency=all_here.parties + 9, proven=True, timeout=9)) == 90
    assert len(server.seen) == 90 and not all_here.broken


FAULTS = [(429, {'error': {'message': 'slow down'}}), *((status, '') for status in (408, 409, 425, 503)), (500, 'oops'),
          (200, '<html>not json</html>'), (200, {'choices': []}), (200, {'choices': [{'message': {'content': 7}}]}),
          (200, {'error': 'overloaded'}), *({'do': do} for do in ('half', 'drop', 'hang'))]  # fmt: skip


def test_every_fault_is_asked_again():
    """Every job gets two different faults, and every fault meets others in flight."""
    turn = Counter()

    def behave(n, body):
        i = number(body)
        turn[i] += 1
        return FAULTS[(i + 4 * turn[i]) % len(FAULTS)] if turn[i] < 3 else str(i)

    with serve(behave) as server, within(8):
        replies = ask(server, 26, concurrency=8)
        assert sorted(int(r.text) for r in replies) == list(range(26)) and len(server.seen) == 78


@pytest.mark.parametrize('status, bad, n, options, requests', [
    (500, [3], 6, {'retries': 2}, 6 + 2),
    (400, [0], 12, {}, 12),
    (400, [7], 12, {}, 12),  # too long a prompt is that job's fault: the endpoint answers the others
    (400, [0], 1, {'proven': True}, 1),
    (502, range(0, 60, 2), 60, {'retries': 0}, 60),  # failures among answers are no reason to stop
])  # fmt: skip
def test_a_job_that_fails_is_given_back_with_its_reason(status, bad, n, options, requests):
    with serve(lambda n, body: (status, 'ill') if number(body) in bad else 'ok') as server:
        replies = sorted(ask(server, n, **options))
    assert [r.text for r in replies] == [None if i in bad else 'ok' for i in range(n)] and len(server.seen) == requests
    after = '' if status == 400 else f', attempts: {options["retries"] + 1}'
    assert all(replies[i].error.endswith(f'answers HTTP {status} (ill){after}') and replies[i].raw is None for i in bad)


def test_all_wait_as_long_as_retry_after_says_and_not_less_for_one_that_says_nothing():
    arrived, later = [], (429, '', {'Retry-After': '1'})
    with serve(lambda n, body: arrived.append(time.monotonic()) or (later if n == 1 else 'ok')) as server:
        assert len(ask(server, 4, backoff=0.01, timeout=5, concurrency=1)) == 4
    assert arrived[2] - arrived[1] >= 0.95
    for soon in ('0', '0.01', 'Wed, 21 Oct 2015 07:28:00 GMT', 'x'):
        began, slow_down = time.monotonic(), (429, '', {'Retry-After': soon})
        with serve(lambda n, body: 'ok' if time.monotonic() - began > 0.5 else slow_down) as server:  # noqa: B023
            replies = ask(server, 2, backoff=0.1, timeout=5, concurrency=1)
            assert [r.text for r in replies] == ['ok', 'ok'] and len(server.seen) < 8


@pytest.mark.parametrize('some', [50, 2])
@pytest.mark.parametrize('status, sentence', [
    (429, 'HTTP 429 .no such model.*asks to wait 7200 s: run the same command again'),
    (400, 'HTTP 400 .no such model.*the model and the other options'),
    (401, 'HTTP 401 .no such model.*NANOPREF_API_KEY'),
    (403, 'HTTP 403 .no such model.*NANOPREF_API_KEY'),
    (404, 'HTTP 404 .no such model.*the address, the model'),
])  # fmt: skip
def test_where_going_on_is_useless_all_stops_at_once(status, sentence, some):
    reply = status, {'error': {'message': 'no\nsuch model'}}, {'Retry-After': '7200'}
    with serve(lambda n, body: reply) as server:
        refused(server, some, sentence)
        assert len(server.seen) <= 4


@pytest.mark.parametrize('answered, limit', [(0, 4), (30, 20)])
def test_an_endpoint_that_fails_every_job_is_not_asked_for_ever(answered, limit):
    with serve(lambda n, body: 'ok' if n < answered else (502, 'bad gateway')) as server:
        refused(server, 100, f'^requests failed, {limit} in a row; the last one: .*502', retries=0)
        assert len(server.seen) < answered + limit + 5


def test_an_endpoint_that_takes_no_more_requests_for_long():
    with serve(lambda n, body: (429, 'slow down')) as server:
        refused(
            server,
            9,
            r'HTTP 429 .slow down., attempts: 3: it takes no more requests for now: lower --concurrency, or run',
            retries=2,
        )


def test_no_server_or_one_that_writes_to_the_terminal():
    with serve(lambda n, body: (404, {'error': {'message': '\x1b[2J\x1b]0;x\x07 a\u202eb\r\n\ud800 c'}})) as server:
        shown = refused(server, 1, '404')
    assert '[2J' in shown and 'a b' in shown
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        port = unused.getsockname()[1]
    sentence = f'{port}/v1/chat/completions cannot be reached .*see that the server runs'
    with within(2):
        refused(f'http://127.0.0.1:{port}', 50, sentence, backoff=0.2, timeout=120.0, concurrency=8)
    (reply,) = ask(f'http://127.0.0.1:{port}', 1, proven=True, retries=1)
    assert 'cannot be reached' in reply.error


def test_stopping_early_asks_no_more():
    with serve(lambda n, body: {'do': 'hang'} if number(body) else 'ok') as server:
        replies = endpoint.ask(server.url, jobs(50), timeout=30, concurrency=4)
        with within(3):
            assert next(replies).text == 'ok'
            replies.close()
        time.sleep(0.2)
        assert len(server.seen) == 4


def test_addresses():  # those that are none are in test_attack.py
    base = 'http://host:1/a'
    for url in (base, base + '/', base + '/v1', base + '/v1/', base + '/v1/chat/completions'):
        assert endpoint.completions_url(url) == base + '/v1/chat/completions'
    assert endpoint.completions_url('https://[::1]/x-y/chat/completions') == 'https://[::1]/x-y/chat/completions'


@pytest.mark.parametrize('proxy', ['foo://127.0.0.1:1', 'foo://me:p%40ss-word-77@127.0.0.1:1', None])
def test_an_environment_that_cannot_be_used(monkeypatch, proxy):
    monkeypatch.setenv('ALL_PROXY' if proxy else 'SSL_CERT_FILE', proxy or '/no/such/file')
    assert 'ss-word' not in refused(NOWHERE, 1, 'as the environment asks')


@pytest.mark.parametrize('status', [301, 307, 308])
def test_no_redirect_carries_the_key_away(status):
    with serve(lambda n, body: 'stolen') as thief:
        moved = (status, '', {'Location': thief.url + '/v1/chat/completions'})
        with serve(lambda n, body: moved) as server:
            refused(server, 3, f'HTTP {status} ')
        assert not thief.seen


@pytest.mark.parametrize('name', ['NANOPREF_API_KEY', 'OPENAI_API_KEY'])
def test_the_key_is_sent_and_never_given_back(name, monkeypatch):
    key = 'sk-made"up\\12345678'
    monkeypatch.delenv('NANOPREF_API_KEY')
    monkeypatch.setenv(name, key + '\n')
    unicode = ''.join(f'\\u{ord(c):04x}' for c in key)
    escaped = '{"choices": [{"message": {"content": "KEY"}}], "you": {"KEY": 1}}'.replace('KEY', unicode)
    said = [f'you are {key}', (200, escaped), (500, 'x' * 290 + key), (401, {'error': f'wrong {key}'})]
    with serve(lambda n, body: said[number(body)]) as server:
        replies = ask(server, 3, retries=0)
        assert server.seen[0][1]['Authorization'] == f'Bearer {key}'
        shown = repr(replies) + json.dumps(replies)
        shown += refused(server, jobs(4)[3:], f'401 .*; the key in {name} was sent')
        monkeypatch.setenv(name, ' ')
        refused(server, jobs(4)[3:], '401 .*; no key was sent: set the key of this endpoint in NANOPREF_API_KEY')
    assert 'sk-made' not in shown and '12345678' not in shown and shown.count('[key]') >= 4


def test_keys_that_are_none(monkeypatch):
    """No header takes the first; servers of one's own take words for a key, which answers may hold."""
    monkeypatch.setenv('NANOPREF_API_KEY', 'sk-\u2028secret')
    assert 'secret' not in refused(NOWHERE, 1, 'the key in NANOPREF_API_KEY has a character that no key has')
    monkeypatch.setenv('NANOPREF_API_KEY', 'EMPTY')
    with serve(lambda n, body: 'the box is EMPTY') as server:
        assert ask(server, 1)[0].text == 'the box is EMPTY'


def drip(*pieces, every=0.05):
    """Send one piece after the other, the last one again and again, slowly."""

    def play(connection, n):
        for piece in pieces[:-1]:
            connection.sendall(piece)
        for _ in range(int(20 / every)):
            connection.sendall(pieces[-1])
            time.sleep(every)

    return play


ENDLESS = {
    'a header': drip(OK + b'X: ', b'x'),
    'continue': drip(b'HTTP/1.1 100 Continue\r\n\r\n'),
    'continue, fast': drip(b'HTTP/1.1 100 Continue\r\n\r\n' * 50, every=0.001),
    'chunks': drip(OK + b'Transfer-Encoding: chunked\r\n\r\n', b'1\r\nx\r\n'),
    'to the end of the connection': drip(OK + b'\r\n{"choices": [{"message": {"content": "x"}}]}', b' '),
    'nothing': drip(b''),
}


@pytest.mark.parametrize('reply', ENDLESS.values(), ids=ENDLESS)
def test_a_time_out_holds_for_the_whole_reply(reply):
    with within(2.5):
        assert 'no reply within 0.3 s' in shown_by(reply, timeout=0.3)


def test_a_time_out_holds_for_tls_and_for_what_is_sent():
    """A server that shakes no hands and says nothing more, one that reads nothing."""
    with serve_raw(drip(b'\x16\x03\x03\x40\x00', b'\x02')) as url, within(3):
        (reply,) = ask(url.replace('http:', 'https:'), 1, **ONCE)
        assert reply.text is None
    with socket.create_server(('127.0.0.1', 0)) as deaf, within(3):
        large = [(0, {'messages': 'x' * 20_000_000})]
        (reply,) = ask(f'http://127.0.0.1:{deaf.getsockname()[1]}', large, **ONCE)
        assert 'no reply within' in reply.error


def packed(content):
    return OK + b'Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n' % len(content) + content


LONG = json.dumps(completion('a ' * 5000)).encode()
PARTS = [{'type': 'thinking', 'thinking': 'hm'}, *({'type': 'text', 'text': text} for text in ('fi', 'ne'))]
FORMS = [
    (packed(gzip.compress(LONG)), 'a a a'),  # though nobody asked for it
    (packed(gzip.compress(LONG)[:-20]), 'connection lost|no chat completion'),
    (packed(gzip.compress(b'0' * 250_000_000, 1)), 'the reply is larger than 64 MB'),
    (drip(OK + b'\r\n', b' ' * 2**20, every=0.0001), 'the reply is larger than 64 MB'),
    (OK + b'\r\n\xef\xbb\xbf' + json.dumps(completion('fine')).encode(), '"fine"'),
    (OK + b'\r\n' + json.dumps(completion(PARTS)).encode(), '"fine"'),
    (OK + rb'{"choices": [{"message": {"content": "a\ud800"}}]}'.join([b'\r\n', b'']), r'"a\?"'),
    # the HTTP library quotes what it cannot read
    *((f'{head}\r\n\r\n{body}\r\n'.replace('KEY', KEY).encode(), '.') for head, body in (
        ('HTTP/1.1 200 OK\r\nX Echo KEY', ''), ('HTTP/1.1 200 OK\r\nContent-Length: KEY', ''), ('HTTP/1.1 KEY OK', ''), ('KEY', ''),
        ('HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked', 'KEY'), ('HTTP/1.1 404 KEY\r\nContent-Length: 0', ''),
        ('HTTP/1.1 502 Bad\r\nContent-Length: 48', '<pre>Authorization: Bearer KEY'),
        ('HTTP/1.1 429 Slow\r\nRetry-After: 99999999KEY\r\nContent-Length: 0', ''),
        ('HTTP/1.1 401 No\r\nSet-Cookie: KEY\r\nWWW-Authenticate: KEY\r\nContent-Length: 0', ''),
    )),
]  # fmt: skip


@pytest.mark.parametrize('reply, words', FORMS, ids=range(len(FORMS)))
def test_forms_of_replies(reply, words):
    """Whatever its form, no part of a reply shows the key."""
    shown = shown_by(reply, timeout=30)
    assert re.search(words, shown) and KEY[8:] not in shown


VALUES = ['null', 'true', '0', '-1', '1.5', '1e999', '-1e999', 'NaN', 'Infinity', '9' * 30, '9' * 5000, '"12"', '""', '[]', '[1]',
          '{}', '{"a": [null]}', r'"\ud800"', '[' * 99999]  # fmt: skip
FIELDS = [
    '{"choices": [{"message": {"content": "fine", "role": V}, "finish_reason": V, "index": V, "logprobs": V}], "usage": V}',
    '{"choices": [{"message": {"content": V}}]}',
    *('{"choices": V}', '{"choices": [V]}', '{"choices": [{"message": V}]}'),
    *('{"error": V}', '{"detail": V}', '{"error": {"message": V, "code": V}}', 'V'),
]


def test_every_field_may_be_of_any_type(monkeypatch):
    """A reply is read, or a reason is given; what is read can be written and read again by any reader of json."""
    monkeypatch.setattr(endpoint, 'FAILED_IN_A_ROW', 10**9)
    cases = [(status, form, value) for status in (200, 400, 500) for form in FIELDS for value in VALUES]

    def behave(n, body):
        status, form, value = cases[number(body)]
        return status, form.replace('V', value)

    with serve(behave) as server:
        replies = sorted(ask(server, len(cases), retries=0, proven=True, timeout=30))
    for (status, form, value), reply in zip(cases, replies, strict=True):
        assert (reply.error or 'x').isprintable()
        if reply.error is None:
            assert status == 200 and isinstance(reply.text, str) and reply.text.encode() is not None
            assert json.loads(json.dumps(reply.raw, allow_nan=False)) == reply.raw
        if status == 200 and form == FIELDS[0]:
            assert reply.text == ('fine' if len(value) < 999 else None)
