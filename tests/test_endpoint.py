"""The client of chat endpoints against a server that misbehaves in every way that servers do."""

import email.utils
import json
import socket
import time
from collections import Counter

import pytest
from stub import completion, serve

import endpoint
from configurator import UserError

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
