"""A client for OpenAI-compatible chat endpoints (a hosted model, vLLM, `transformers serve`): many jobs at once, retried.

sample.py and label.py call ask. The key comes from the environment alone, NANOPREF_API_KEY or else OPENAI_API_KEY. It is taken
out of all that a server says; messages of the HTTP library, which quote the server, are not shown.
"""

import asyncio
import itertools
import json
import os
import random
import re
import time
from typing import NamedTuple
from urllib.parse import urlsplit

from configurator import UserError

# huggingface_hub brings one of these, which have the same interface
try:
    import httpx2 as httpx
except ImportError:
    import httpx

# seconds; if an endpoint asks for a longer wait, the run ends, and the user starts it again later
LONGEST_WAIT = 600.0
# after so many failed jobs with no answer in between, the endpoint is at fault, and not the jobs
FAILED_IN_A_ROW = 20
# bytes of a reply after unpacking
LARGEST = 64 * 2**20
# characters; a shorter key, such as EMPTY, is no secret, and may be a word of an answer
SHORT = 8


class Reply(NamedTuple):
    """The result of a job, with the job's key. A job that failed has no text and no raw, but an error, a reason in words.

    text: the answer, which may be empty; raw: the whole reply, as parsed json."""

    key: object
    text: str | None
    raw: dict | None
    error: str | None = None


class _Refused(Exception):
    """The endpoint refuses this job: another attempt would end in the same way."""


class _Again(Exception):
    """An attempt failed, and another one may succeed. wait: the seconds that the endpoint asks to wait before it."""

    wait = 0.0


class _Unreachable(_Again):
    """There was no connection."""


def completions_url(url: str) -> str:
    """Return the address of the chat completions for a base address with or without /v1. Raises UserError for no address."""
    try:
        is_plain = re.fullmatch(r'https?://[\w.:/%~+\[\]-]+', url, re.ASCII)
        is_address = is_plain and urlsplit(url).hostname and urlsplit(url).port != 0
    except ValueError:
        # the port is no number, or an IPv6 address has lost a bracket
        is_address = False
    if not is_address:
        # the message does not repeat what was given, for it may hold a key
        form = 'write http://host:port or https://host, without a name, password or query'
        raise UserError(f'--endpoint is no address: {form}; a key belongs in the environment (NANOPREF_API_KEY)')
    address = url.rstrip('/')
    if address.endswith('/chat/completions'):
        return address
    return address.removesuffix('/v1') + '/v1/chat/completions'


def ask(url, jobs, *, concurrency=8, timeout=120.0, retries=6, backoff=1.0, proven=False):
    """Send jobs (key, body) to an endpoint, and yield a Reply for each of them, in the order in which they end.

    body is the json of a chat completion's request. At most `concurrency` jobs are under way, and a job counts until the caller
    asks for the Reply after its own. timeout: seconds for a whole reply. A job is tried again, up to `retries` times, after HTTP
    408, 409, 425, 429 or 5xx, a time-out, a lost connection, or a reply that is too large or no completion. Before the first
    such retry it waits about `backoff` seconds, then twice as long each time, or longer if Retry-After says so. A job that fails
    to the end gets a Reply with an error, and so does a job that the endpoint refuses. proven: the endpoint has answered before.
    Raises UserError if going on is useless: the key is refused, or jobs fail one after the other."""
    endpoint = _Endpoint(url, concurrency, timeout, retries, backoff, proven)
    jobs = iter(jobs)
    tasks = set()  # one for each job under way
    failures = 0  # since the last answer
    # the runner also cancels what is under way when the caller stops early
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        while True:
            # an endpoint that has answered nothing yet gets no more jobs than it can answer at a time
            allowed_failures = FAILED_IN_A_ROW if endpoint.proven else max(2, concurrency)
            # no more jobs are under way than may still fail
            new_jobs = min(concurrency, allowed_failures - failures) - len(tasks)
            for key, body in itertools.islice(jobs, max(0, new_jobs)):
                tasks.add(loop.create_task(endpoint.finish(key, body)))
            if not tasks:
                break

            # a task with an exception ends the loop, so the answers that came with it are yielded first
            finished, tasks = loop.run_until_complete(asyncio.wait(tasks, return_when='FIRST_COMPLETED'))
            for task in sorted(finished, key=lambda task: task.exception() is not None):
                reply = task.result()
                if reply.error is None:
                    failures = 0
                    endpoint.proven = True
                else:
                    failures += 1
                    last_error = reply.error
                yield reply
    never_answered = failures > 0 and not endpoint.proven
    if failures >= allowed_failures or never_answered:
        advice = 'see that the server runs, and the address, the model and the other options, or run this again later'
        raise UserError(f'{failures} requests in a row failed; the last one: {last_error}: {advice}')


class _Endpoint:
    """The state that the jobs of one ask share. proven: whether the endpoint is known to answer.

    not_before: the time, by time.monotonic, before which no request is sent."""

    def __init__(self, url, concurrency, timeout, retries, backoff, proven):
        """Open a client for the address. Raises UserError for an address, a key or a proxy that cannot be used."""
        self.address = completions_url(url)
        self.proven = proven
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.not_before = 0.0
        key = os.environ.get('NANOPREF_API_KEY') or os.environ.get('OPENAI_API_KEY') or ''
        self.key = key.strip()
        # printable characters of ASCII; a header takes no others
        if not re.fullmatch('[!-~]*', self.key):
            raise UserError('the key in NANOPREF_API_KEY or OPENAI_API_KEY has characters that no key has')
        headers = {'Authorization': f'Bearer {self.key}'} if self.key else {}
        limits = httpx.Limits(max_connections=concurrency)
        # post has a time-out for the whole reply, and this one is for the connection alone
        connect = httpx.Timeout(None, connect=min(timeout, 10.0))
        # no redirect is followed: it could carry the key to another server
        try:
            self.client = httpx.AsyncClient(headers=headers, limits=limits, timeout=connect, follow_redirects=False)
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            why = f'ALL_PROXY, SSL_CERT_FILE ...: {type(error).__name__}'
            raise UserError(f'no connection as the environment asks for it ({why})') from None

    async def finish(self, key, body):
        """Return the Reply of a job, after as many attempts as it needs. Raises UserError if no job can succeed."""
        for attempt in itertools.count():
            await asyncio.sleep(self.not_before - time.monotonic())
            try:
                response, content = await self.post(body)
                text, raw = self.read(response, content)
                return Reply(key, text, raw)
            except _Refused as error:
                return Reply(key, text=None, raw=None, error=str(error))
            except _Again as error:
                failure = error
            # an address where nobody has ever answered is most often a wrong one: two retries show that
            is_doubtful = isinstance(failure, _Unreachable) and not self.proven
            retries = min(2, self.retries) if is_doubtful else self.retries
            if attempt >= retries:
                return Reply(key, text=None, raw=None, error=f'{failure}, after {attempt + 1} attempts')

            # all jobs wait as long as the endpoint asks for, and this one longer after each attempt
            self.not_before = max(self.not_before, time.monotonic() + failure.wait)
            longest = min(60.0, self.backoff * 2**attempt)
            await asyncio.sleep(longest * random.uniform(0.5, 1.0))

    async def post(self, body):
        """Send a request and return (response, its content as text). Raises _Again if no reply of a sane size comes."""
        content = bytearray()
        try:
            async with asyncio.timeout(self.timeout):
                async with self.client.stream('POST', self.address, json=body) as response:
                    async for piece in response.aiter_bytes():
                        content += piece
                        if len(content) > LARGEST:
                            break
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Unreachable(f'{self.address} cannot be reached ({self.line(error)})') from None
        except TimeoutError:
            raise _Again(f'no reply within {self.timeout:g} s') from None
        except Exception as error:
            # the library has errors of many kinds for what a server may send
            raise _Again(f'connection lost ({type(error).__name__})') from None
        if len(content) > LARGEST:
            raise _Again(f'the reply is larger than {LARGEST / 2**20:g} MB')
        return response, content.decode('utf-8-sig', 'replace')

    def read(self, response, content):
        """Return (the answer's text, the reply as parsed json) of a response and its content.

        Raises _Again if another attempt may succeed, _Refused if not, and UserError if the user has to do something."""
        status = response.status_code
        raw = self.json(content)
        if 200 <= status < 300:
            try:
                # the content is null if the model refused, or thought until its tokens were used up
                text = raw['choices'][0]['message']['content'] or ''
                # no file and no tokenizer takes half a surrogate pair: it becomes a question mark
                return text.encode('utf-8', 'replace').decode(), raw
            except (LookupError, TypeError, AttributeError):
                raise _Again(f'the reply is no chat completion ({self.line(raw)})') from None

        problem = f'{self.address} answers HTTP {status} ({self.line(raw)})'
        if status in (401, 403):
            raise UserError(f'{problem}: set the key of this endpoint in NANOPREF_API_KEY')
        if status in (408, 409, 425, 429) or status >= 500:
            again = _Again(problem)
            # Retry-After may also be a date, which counts as no wait: the next attempt waits anyway
            seconds = re.match(r'\d+(\.\d+)?$', response.headers.get('retry-after', ''))
            again.wait = float(seconds[0]) if seconds else 0.0
            if again.wait > LONGEST_WAIT:
                raise UserError(f'{problem} and asks to wait {again.wait:.0f} s: run the same command again then')
            raise again
        raise _Refused(problem)

    def json(self, content):
        """Return the parsed json of a reply's content, or the content itself if it is no json; in both the key is hidden.

        NaN and infinite numbers, which python reads and other readers of json do not, become strings."""
        try:
            # a reply may spell the key with escapes; after json.dumps it has one form only
            written = json.dumps(json.loads(content))
            key_as_written = json.dumps(self.key)[1:-1]  # without the quotes
            return json.loads(self.hide(written, key_as_written), parse_constant=str)
        except (ValueError, RecursionError):
            return self.hide(content, self.key)

    def hide(self, text, key):
        """Return a text with [key] in place of the key, unless the key is so short that it is no secret."""
        return text.replace(key, '[key]') if len(key) >= SHORT else text

    def line(self, said):
        """Return a server's reply (parsed json) or an error as one line of at most 300 characters for a message.

        A reply that has a message of its own is cut down to that. No character of the line moves a cursor; the key is hidden."""
        # such as {'error': {'message': ...}}: one name after the other leads further in
        for name in ('error', 'detail', 'message'):
            if isinstance(said, dict):
                said = said.get(name) or said
        text = self.hide(str(said), self.key)[:1000]
        printable = ''.join(c if c.isprintable() else ' ' for c in text)
        return ' '.join(printable.split())[:300] or 'nothing'
