"""A client for OpenAI-compatible chat endpoints (a hosted model, vLLM, `transformers serve`): many jobs at once, retried.

The key comes from the environment alone, NANOPREF_API_KEY or else OPENAI_API_KEY; it is never printed, stored or returned.
"""

import contextlib
import email.utils
import itertools
import json
import os
import queue
import random
import threading
import time
from typing import NamedTuple
from urllib.parse import urlsplit

from configurator import UserError

LONGEST_WAIT = 600.0  # seconds; an endpoint that asks for more is to be asked again by the user, not waited for
FAILED_IN_A_ROW = 20  # so many jobs given up, none answered in between: the endpoint is at fault, not the jobs


class Reply(NamedTuple):
    """What became of a job: text and raw (the parsed json) of the reply; or text None, and error, a reason in words."""

    key: object
    text: str | None
    raw: dict | None
    error: str | None = None


class _Refused(Exception):
    """The endpoint does not want this job (400, 413, 422)."""


class _Again(Exception):
    """Worth another attempt. wait: the seconds that the endpoint asks for, if it does."""

    wait = None


def completions_url(url: str) -> str:
    """The address of the chat completions, from a base address with or without /v1. Raises UserError."""
    shown = url if '@' not in url else '...@' + url.rpartition('@')[2]  # before it stands a name and a password
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ('http', 'https') or not parts.hostname or parts.port == 0
        wrong = wrong or not url.isascii() or not url.isprintable() or ' ' in url
    except ValueError:  # a port that is none, half an IPv6 address
        wrong = True
    if wrong:
        raise UserError(f'the endpoint {shown!r} is no address: write http://host:port or https://host')
    if '@' in parts.netloc or parts.query or parts.fragment:
        raise UserError('the endpoint must be a plain address; a key belongs in the environment (NANOPREF_API_KEY)')
    base = url.rstrip('/').removesuffix('/chat/completions')
    return (base if base.endswith('/v1') or base != url.rstrip('/') else base + '/v1') + '/chat/completions'


def ask(url, jobs, *, concurrency=8, timeout=120.0, retries=6, backoff=1.0, proven=False):
    """Yield a Reply for every job, in order of completion. jobs: (key, body), body the json of a chat completion.

    At most `concurrency` jobs are under way, counting those whose Reply the caller has not finished with, so that what is
    written before the next Reply is taken is all that was ever asked but for that many. timeout: seconds for a whole
    reply. A job is tried again `retries` times, after backoff * 2^k seconds with jitter or as Retry-After says, on 408, 409,
    425, 429, 5xx, time-outs, dropped connections, and replies cut short or not in the promised form; then its Reply has an
    error. So has a job refused (400, 413, 422) by an endpoint that has answered others (proven: it has before this call).
    Raises UserError where going on is useless: refused key or model, no such address, nothing but refusals or failures."""
    address, headers = completions_url(url), {}
    key = (os.environ.get('NANOPREF_API_KEY') or os.environ.get('OPENAI_API_KEY') or '').strip()
    if key:
        if not (key.isascii() and key.isprintable() and ' ' not in key):
            raise UserError('the key in NANOPREF_API_KEY or OPENAI_API_KEY has characters that no key has')
        headers['Authorization'] = f'Bearer {key}'
    http = _http()
    try:
        client = http.Client(headers=headers, timeout=http.Timeout(timeout, connect=min(timeout, 10.0)),
                             limits=http.Limits(max_connections=concurrency))  # fmt: skip
    except (ImportError, ValueError, OSError) as error:
        raise UserError(
            f'no connection as the environment asks for it (ALL_PROXY, SSL_CERT_FILE ...): {_short(error)}'
        ) from None
    todo, done, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    pause = [0.0]  # no request before this time: Retry-After is meant for all of them

    def attempt(body):
        """(text, raw) of one request."""
        try:
            with client.stream('POST', address, json=body) as response:
                deadline, content = time.monotonic() + timeout, b''
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:  # the time-out of the library is between two chunks
                        raise http.ReadTimeout('the reply does not end')
        except (http.ConnectError, http.ConnectTimeout) as error:
            again = _Again(f'{address} cannot be reached ({_short(error)})')
            again.unreachable = True
            raise again from None
        except http.TimeoutException:
            raise _Again(f'no reply within {timeout:g} s') from None
        except (http.TransportError, http.DecodingError) as error:
            raise _Again(f'connection lost ({_short(error)})') from None
        return _read(response, _parse(content, key), address)

    def finish(job):
        """The Reply of a job, after as many attempts as it takes."""
        for k in itertools.count():
            stop.wait(max(0.0, pause[0] - time.monotonic()))
            if stop.is_set():
                return None
            try:
                return Reply(job[0], *attempt(job[1]))
            except _Again as error:
                unreachable, wait = getattr(error, 'unreachable', False), error.wait
                if unreachable and k >= (retries if proven else min(retries, 2)):
                    raise UserError(f'{error}: is the server running, and the address right?') from None
                if k >= retries:
                    return Reply(job[0], None, None, f'{error}, after {k + 1} attempts')
                if wait is not None:
                    pause[0] = max(pause[0], time.monotonic() + wait)
                if not wait or wait < backoff:  # none, 0, or a date of a clock that is behind
                    stop.wait(min(60.0, backoff * 2**k) * random.uniform(0.5, 1.0))

    def work():
        for job in iter(todo.get, None):
            try:
                done.put((job, finish(job)))
            except BaseException as error:  # raised again where the caller is
                done.put((job, error))

    for _ in range(concurrency):
        threading.Thread(target=work, daemon=True).start()  # daemon: Ctrl-C does not wait for replies
    jobs, held, failures = iter(jobs), [], 0
    try:
        under_way = sum(todo.put(job) is None for job in itertools.islice(jobs, concurrency))
        while under_way:
            job, result = done.get()
            under_way -= 1
            if isinstance(result, _Refused):
                held.append(Reply(job[0], None, None, str(result)))
            elif isinstance(result, BaseException):
                raise result
            else:
                failures = failures + 1 if result.text is None else 0
                proven = proven or result.text is not None
                if failures >= (FAILED_IN_A_ROW if proven else max(concurrency, 2)):  # sooner if all do from the start
                    advice = (
                        'run the same command later' if proven else "see the model's name, and the server's own log"
                    )
                    raise UserError(f'{failures} requests in a row failed; the last one: {result.error}: {advice}')
                yield result
            if held and not under_way and not proven:
                raise UserError(f'{held[0].error}; see that the name of the model and the other options suit it')
            if proven:
                yield from held
                held = []
            if not held:
                under_way += sum(todo.put(job) is None for job in itertools.islice(jobs, concurrency - under_way))
        client.close()
    finally:
        stop.set()
        for _ in range(concurrency):
            todo.put(None)


def _parse(content, key):
    """The json of a reply, or its text where it is none; without the key, in case an endpoint repeats it."""
    text = content.decode('utf-8', 'replace')
    with contextlib.suppress(ValueError, RecursionError):
        text = json.dumps(json.loads(text))
    if len(key) >= 8:
        text = text.replace(json.dumps(key)[1:-1], '[key]').replace(key, '[key]')
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read(response, raw, address):
    """(text, raw) of a finished response. Raises _Again, _Refused or UserError."""
    status, said = response.status_code, _said(raw)
    if 200 <= status < 300:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            text = raw['choices'][0]['message']['content']
            if text is None or isinstance(text, str):  # null: it refused, or thought until its tokens were used up
                return (text or '').encode(
                    'utf-8', 'replace'
                ).decode(), raw  # half a surrogate pair would break a tokenizer
        raise _Again(f'the reply is no chat completion ({said})')
    what = f'{address} answers HTTP {status} ({said})'
    if status in (401, 403):
        raise UserError(f'{what}: set the key of this endpoint in NANOPREF_API_KEY')
    if status in (400, 413, 422):
        raise _Refused(what)
    if status in (408, 409, 425, 429) or status >= 500:
        if 'insufficient_quota' in said:
            raise UserError(f'{what}: the account has no credit left; run the same command again when it has')
        again = _Again(what)
        again.wait = _retry_after(response.headers.get('retry-after'))
        if again.wait is not None and again.wait > LONGEST_WAIT:
            raise UserError(f'{what} and asks to wait {again.wait:.0f} s: run the same command again then')
        raise again
    raise UserError(f'{what}: see that the address and the model are right')


def _retry_after(text):
    """Seconds that a Retry-After header asks for (a number or a date), or None."""
    with contextlib.suppress(ValueError, TypeError, OverflowError, AttributeError):
        if text.strip()[:1].isdigit():
            return float(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _said(raw):
    """A reply's own error message, or its beginning, on one line."""
    found = raw.get('error') or raw.get('detail') or raw if isinstance(raw, dict) else raw
    if isinstance(found, dict):
        code, found = found.get('code'), found.get('message', found)
        found = f'{code}: {found}' if isinstance(code, str) else found
    return ' '.join(str(found).split())[:300] or 'nothing'


def _short(error):
    return ' '.join(str(error).split())[:200] or type(error).__name__


def _http():
    """The HTTP library that comes with huggingface_hub: httpx2, or httpx with older versions."""
    try:
        import httpx2 as http
    except ImportError:
        try:
            import httpx as http
        except ImportError:
            raise UserError('asking an endpoint needs httpx2: pip install httpx2') from None
    return http
