"""A client for OpenAI-compatible chat endpoints (a hosted model, vLLM, `transformers serve`): many jobs at once, retried.

The key comes from the environment alone, NANOPREF_API_KEY or else OPENAI_API_KEY; it is never printed, stored or returned.
A server is not trusted: its replies have a size and a time, and each field of them may be of any type.
"""

import base64
import contextlib
import email.utils
import html.entities
import importlib
import itertools
import json
import math
import os
import queue
import random
import re
import socket
import threading
import time
import urllib.request
import zlib
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from configurator import UserError

LONGEST_WAIT = 600.0  # seconds; an endpoint that asks for more is to be asked again by the user, not waited for
FAILED_IN_A_ROW = 20  # so many jobs given up, none answered in between: the endpoint is at fault, not the jobs
LARGEST = 64 * 2**20  # bytes of a reply, unpacked
MOST_PARTS = 2_000_000  # objects and lists of a reply, each of which takes far more memory than its two bytes
DEEPEST = 100  # levels of them
SHORT = 8  # characters; a shorter key may be a word of an answer, so it is taken out of error messages alone
BACKSLASH = r'\\'  # one, in a regular expression


class Reply(NamedTuple):
    """What became of a job: text and raw (the parsed json) of the reply; or error, a reason in words, and no text."""

    key: object
    text: str | None
    raw: dict | None
    error: str | None = None


class _Refused(Exception):
    """Another attempt would end likewise: the endpoint does not want this job (400, 413, 422), or its reply is too large."""


class _Again(Exception):
    """Worth another attempt. wait: the seconds that the endpoint asks for."""

    wait = 0.0


class _Unreachable(_Again):
    """There was no connection."""


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
    address = url.rstrip('/')
    if address.endswith('/chat/completions'):
        return address
    return address.removesuffix('/v1') + '/v1/chat/completions'


def ask(url, jobs, *, concurrency=8, timeout=120.0, retries=6, backoff=1.0, proven=False):
    """Yield a Reply for every job, in order of completion. jobs: (key, body), body the json of a chat completion.

    At most `concurrency` jobs are under way, counting those whose Reply the caller has not finished with. timeout: seconds for
    a whole reply. A job is tried again on 408, 409, 425, 429, 5xx, time-outs, dropped connections, and replies cut short or not
    in the promised form: up to `retries` times, after backoff * 2^k seconds with jitter or as Retry-After says. Then its Reply
    has an error, as has that of a job refused (400, 413, 422) by an endpoint that has answered others. proven: it had answered
    some before this call. Raises UserError where going on is useless: refused key or model, no such address, nothing but
    refusals or failures."""
    address = completions_url(url)
    key = os.environ.get('NANOPREF_API_KEY') or os.environ.get('OPENAI_API_KEY') or ''
    key = key.strip()
    if not key.isascii() or not key.isprintable() or ' ' in key:
        raise UserError('the key in NANOPREF_API_KEY or OPENAI_API_KEY has characters that no key has')
    shared = _Shared(address, _Others(key), timeout, retries, backoff, proven)
    for client in _connect(concurrency, timeout, key, shared.others):
        # daemon: Ctrl-C does not wait for replies
        threading.Thread(target=shared.work, args=(client,), daemon=True).start()
    try:
        yield from shared.replies(iter(jobs), concurrency)
    finally:
        shared.stop.set()
        for _ in range(concurrency):
            shared.todo.put(None)


def _connect(n, timeout, key, others):
    """n _Clients, connecting as the environment asks for it. Raises UserError."""
    http = _http()
    headers = {'Accept-Encoding': 'identity'}
    if key:
        headers['Authorization'] = f'Bearer {key}'
    options = {'headers': headers, 'limits': http.Limits(max_connections=1)}
    options['timeout'] = http.Timeout(timeout, connect=min(timeout, 10.0))
    try:
        options['verify'] = http.create_ssl_context()
        return [_Client(http.Client(**options), timeout) for _ in range(n)]
    except (ImportError, ValueError, OSError, http.InvalidURL) as error:
        why = others.line(error, 200)
        raise UserError(f'no connection as the environment asks for it (ALL_PROXY, SSL_CERT_FILE ...): {why}') from None


class _Shared:
    """What the threads of one ask share. Each takes jobs (key, body) from todo, and puts (key, Reply or an error) into done."""

    def __init__(self, address, others, timeout, retries, backoff, proven):
        self.address, self.others = address, others
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.proven = proven  # whether the endpoint has answered any job
        self.todo, self.done = queue.SimpleQueue(), queue.SimpleQueue()
        self.stop = threading.Event()  # the caller wants no more
        self.not_before = 0.0  # time of the next request: Retry-After is meant for all threads

    def replies(self, jobs, most):
        """Yield the Replies of ask, at most so many jobs under way."""
        refused = []  # Replies that are kept back until another job is answered
        failures = 0  # in a row
        under_way = self.hand_out(jobs, most)
        while under_way:
            key, result = self.done.get()
            under_way -= 1
            if isinstance(result, _Refused):
                refused.append(Reply(key, None, None, str(result)))
            elif isinstance(result, BaseException):
                raise result
            else:
                answered = result.text is not None
                failures = 0 if answered else failures + 1
                self.proven = self.proven or answered
                self.check_failures(failures, most, result.error)
                yield result

            # a refusal is the job's own fault where others are answered: before any is, nothing more is asked
            if self.proven:
                yield from refused
                refused = []
            if not refused:
                under_way += self.hand_out(jobs, most - under_way)
            elif not under_way:
                raise UserError(f'{refused[0].error}; see that the name of the model and the other options suit it')

    def check_failures(self, failures, most, error):
        """Raise UserError where too many jobs in a row have failed: sooner if none was ever answered."""
        limit, advice = FAILED_IN_A_ROW, 'run the same command later'
        if not self.proven:
            limit, advice = max(most, 2), "see the model's name, and the server's own log"
        if failures >= limit:
            raise UserError(f'{failures} requests in a row failed; the last one: {error}: {advice}')

    def hand_out(self, jobs, most):
        """Put up to so many jobs into todo. Returns how many there were."""
        some = list(itertools.islice(jobs, most))
        for job in some:
            self.todo.put(job)
        return len(some)

    def work(self, client):
        """Finish jobs until there is a None among them."""
        for key, body in iter(self.todo.get, None):
            try:
                result = self.finish(client, key, body)
            except BaseException as error:
                result = error  # raised again where the caller is
            self.done.put((key, result))
        client.close()

    def finish(self, client, key, body):
        """The Reply of a job, after as many attempts as it takes; None where the caller has stopped."""
        for attempt in itertools.count():
            self.stop.wait(max(0.0, self.not_before - time.monotonic()))
            if self.stop.is_set():
                return None
            try:
                return Reply(key, *self.attempt(client, body))
            except _Again as error:
                again = error

            # the last attempt: an address where nobody answers is most often a wrong one
            patience = self.retries if self.proven else min(self.retries, 2)
            if isinstance(again, _Unreachable) and attempt >= patience:
                raise UserError(f'{again}: is the server running, and the address right?')
            if attempt >= self.retries:
                return Reply(key, None, None, f'{again}, after {attempt + 1} attempts')

            # all wait as long as the endpoint asks for; where that is nothing, this thread waits longer each time
            self.not_before = max(self.not_before, time.monotonic() + again.wait)
            if again.wait < self.backoff:
                longest = min(60.0, self.backoff * 2**attempt)
                self.stop.wait(longest * random.uniform(0.5, 1.0))

    def attempt(self, client, body):
        """(text, raw) of one request. Raises _Again, _Refused or UserError."""
        http = _http()
        try:
            response, content = client.post(self.address, body)
        except (_Again, _Refused):
            raise
        except (http.ConnectError, http.ConnectTimeout) as error:
            raise _Unreachable(f'{self.address} cannot be reached ({self.others.line(error, 200)})') from None
        except (http.TimeoutException, TimeoutError):
            raise _Again(f'no reply within {self.timeout:g} s') from None
        except Exception as error:  # the library has errors of many kinds for what a server may send
            raise _Again(f'connection lost ({self.others.line(error, 200)})') from None
        return _read(response, self.others.json(content), self.address, self.others)


class _Client:
    """The connection of one thread. Its requests end when their time is over, whatever trickles in until then.

    The time-outs of the HTTP library are between two pieces of a reply, and `100 Continue` is followed by another wait. So a
    timer shuts the socket, which the library shows to whoever traces a request."""

    def __init__(self, client, seconds):
        self.client, self.seconds = client, seconds
        self.close = client.close
        self.stream = None  # of the open connection
        self.over = None  # an event: the time of the present request is over

    def post(self, address, body):
        """(response, its content). Raises TimeoutError, _Again, _Refused, or what the HTTP library raises."""
        request = self.client.build_request('POST', address, json=body, extensions={'trace': self._trace})

        # each request has its own event, so that a timer which comes too late ends no later one
        over = self.over = threading.Event()
        timer = threading.Timer(self.seconds, self._end, (over,))
        timer.daemon = True
        timer.start()
        try:
            # no redirect is followed: it could carry the key to another server
            with contextlib.closing(self.client.send(request, stream=True, follow_redirects=False)) as response:
                content = _content(response)
        except Exception:
            if not over.is_set():
                raise
        finally:
            timer.cancel()

        # a reply without a length seems to be whole where its socket was shut
        if over.is_set():
            raise TimeoutError
        return response, content

    def _trace(self, event, info):
        """Keep the stream of a new connection; called by the HTTP library at each stage of a request."""
        stream = info.get('return_value')
        if hasattr(stream, 'get_extra_info'):
            self.stream = stream
            if self.over.is_set():
                self._shut()

    def _end(self, over):
        """End the request whose event this is; called by its timer."""
        over.set()
        if over is self.over:
            self._shut()

    def _shut(self):
        """Shut the socket, which wakes up whoever reads from it."""
        with contextlib.suppress(OSError, AttributeError):
            # not the method of TLS sockets, which waits for the other side
            socket.socket.shutdown(self.stream.get_extra_info('socket'), socket.SHUT_RDWR)


def _content(response):
    """The bytes of a reply, unpacked, and never more of them than LARGEST. Raises _Again, _Refused or zlib.error."""
    packing = response.headers.get('content-encoding', '').strip().lower()
    if packing not in ('', 'identity', 'gzip', 'x-gzip', 'deflate'):
        raise _Again('the reply is packed in a way that was not asked for')
    unpacker = None
    if packing not in ('', 'identity'):
        unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, by its first bytes
    content = bytearray()
    for chunk in response.iter_raw():
        # one byte more than is allowed tells that there is more
        content += unpacker.decompress(chunk, LARGEST + 1 - len(content)) if unpacker else chunk
        if len(content) > LARGEST:
            raise _Refused(f'the reply is larger than {LARGEST / 2**20:g} MB')
        if unpacker and unpacker.unused_data:
            raise _Again('the packed reply goes on behind its end')
    if unpacker and content and not unpacker.eof:
        raise _Again('the packed reply is cut short')
    if content.count(b'[') + content.count(b'{') > MOST_PARTS:
        raise _Refused(f'the reply has more than {MOST_PARTS} brackets')
    return content


class _Others:
    """What others say, made fit for screen and disk: servers, proxies, and the HTTP library that quotes them.

    All of it goes through here. Taken out is the key, and the passwords of proxies from messages: plain, in the other case, with
    the escapes of json, Python, URLs and HTML, in base64 and hex, and cut short to one half."""

    def __init__(self, key):
        self.in_texts = _forms(key) if len(key) >= SHORT else []
        passwords = set()
        for proxy in urllib.request.getproxies().values():
            # name:password, or a password alone
            found = re.search('://(.*)@', proxy)
            if found:
                _, _, password = found[1].partition(':')
                password = password or found[1]
                passwords |= {password, unquote(password)}
        self.in_messages = []
        for secret in sorted({key, *passwords} - {''}, key=len, reverse=True):
            word = rf'(?<!\w){re.escape(secret)}(?!\w)'
            self.in_messages += _forms(secret) if len(secret) >= SHORT else [word]

    def text(self, text):
        """A text without the key, nor halves of surrogate pairs, which would break a tokenizer."""
        if not text.isascii():
            text = text.encode('utf-8', 'replace').decode()
        for form in self.in_texts:
            text = re.sub(form, '[key]', text)
        return text

    def line(self, said, most=300):
        """A message on one line, without secrets, of so many characters at most, none of which moves a cursor."""
        # far more than is shown, so that no key which is cut here comes into sight
        text = self.text(str(said).strip()[:100_000])
        for form in self.in_messages:
            text = re.sub(form, '[key]', text)
        text = ''.join(c if c.isprintable() else ' ' for c in text[: 10 * most])
        line = ' '.join(text.split())[:most]
        nothing = type(said).__name__ if isinstance(said, Exception) else 'nothing'
        return line or nothing

    def json(self, content):
        """The json of a reply that any reader of json reads again, or its text where it is none."""
        text = content.decode('utf-8-sig', 'replace')
        try:
            raw = json.loads(text, parse_constant=str, parse_float=_number, parse_int=_number)
            return self._tree(raw, 0)
        except (ValueError, RecursionError):
            return self.text(text)

    def _tree(self, value, depth):
        """A parsed json at this depth, each of its texts as text gives it. Raises RecursionError where it is too deep."""
        if depth > DEEPEST:
            raise RecursionError
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self._tree(item, depth + 1) for item in value]
        if isinstance(value, dict):
            return {self.text(name): self._tree(item, depth + 1) for name, item in value.items()}
        return value


def _number(text):
    """The number that a json text writes, or the text itself where 64 bits do not hold it."""
    if text.lstrip('-').isdigit():
        return int(text) if len(text) < 19 else text
    return float(text) if math.isfinite(float(text)) else text


@lru_cache
def _forms(secret):
    """Regular expressions for a secret: its first half with what follows of the rest, its last half, base64, and hex.

    None begins with a repetition, so the time of a search grows with the text, not with its square."""
    letters = [_letter(c, r'\\{1,4}') for c in secret]
    half = max(SHORT, (len(secret) + 1) // 2)
    head, rest, tail = letters[:half], letters[half:], letters[-half:]
    # backslashes before the first letter may stay, and the search is many times faster for it
    head[0] = _letter(secret[0], '')
    tail[0] = _letter(secret[-half], '')
    forms = [''.join(head) + ''.join(f'{letter}?' for letter in rest), ''.join(tail)]

    # a secret stands behind other text, so its first byte may be any of the three that four letters of base64 hold
    for before in range(3):
        coded = base64.b64encode(b'\0' * before + secret.encode()).decode().rstrip('=')
        # letters that hold bits of other text, too, are left out: the first (none, 2 or 3), and perhaps the last
        first = (0, 2, 3)[before]
        last_is_shared = (before + len(secret)) % 3 > 0
        own = coded[first : len(coded) - last_is_shared]
        forms.append(own.replace('/', '[/_]').replace('+', '[+-]'))

    hexadecimal = '[ :]?'.join(f'{byte:02x}' for byte in secret.encode())
    return [*forms, f'(?i:{hexadecimal})']


def _letter(c, backslashes):
    """A regular expression for the forms in which others write a character; backslashes: for those before it."""
    # its number in hex, and its names in HTML
    code = ord(c)
    digits = ''.join(f'[{d}{d.upper()}]' if d.isalpha() else d for d in f'{code:02x}')
    names = [re.escape(name.rstrip(';')) for name, meant in html.entities.html5.items() if meant == c]
    entity = '|'.join([f'#0{{0,4}}{code}', f'#[xX]0{{0,4}}{digits}', *names])

    # the long forms first: their first letter may itself be one of the secret
    forms = [f'%(?:25){{0,3}}{digits}', f'&(?:amp;)?(?:{entity});?', rf'{backslashes or BACKSLASH}[ux](?:00)?{digits}']
    plain = [re.escape(case) for case in sorted({c, c.swapcase()})]
    if backslashes:
        forms += [backslashes + case for case in plain]
    return '(?:' + '|'.join(forms + plain) + ')'


def _read(response, raw, address, others):
    """(text, raw) of a finished response. Raises _Again, _Refused or UserError."""
    status, said = response.status_code, others.line(_said(raw))

    # an answer; null where the model refused, or thought until its tokens were used up
    if 200 <= status < 300:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            text = raw['choices'][0]['message']['content']
            if text is None or isinstance(text, str):
                return text or '', raw
        raise _Again(f'the reply is no chat completion ({said})')

    # the user must do something, this job is refused, or it is worth another attempt
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
        if again.wait > LONGEST_WAIT:
            raise UserError(f'{what} and asks to wait {again.wait:.0f} s: run the same command again then')
        raise again
    raise UserError(f'{what}: see that the address and the model are right')


def _retry_after(text):
    """The seconds that a Retry-After header asks for (a number or a date), 0 without one."""
    with contextlib.suppress(ValueError, TypeError, OverflowError, AttributeError):
        if text.strip()[:1].isdigit():
            return float(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _said(raw):
    """A reply's own error message, or all that it says."""
    if isinstance(raw, dict):
        raw = raw.get('error') or raw.get('detail') or raw
    if not isinstance(raw, dict):
        return raw
    code, message = raw.get('code'), raw.get('message', raw)
    return f'{code}: {message}' if isinstance(code, str) else message


def _http():
    """The HTTP library that comes with huggingface_hub: httpx2, or httpx with older versions."""
    for name in ('httpx2', 'httpx'):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise UserError('asking an endpoint needs httpx2: pip install httpx2')
