"""A client for OpenAI-compatible chat endpoints (a hosted model, vLLM, `transformers serve`): many jobs at once, retried.

The key comes from the environment alone, NANOPREF_API_KEY or else OPENAI_API_KEY. It is taken out of all that a server says;
messages of the HTTP library, which quote the server, are not shown.
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

try:  # what comes with huggingface_hub
    import httpx2 as httpx
except ImportError:
    import httpx

LONGEST_WAIT = 600.0  # seconds; an endpoint that asks for more is to be asked again by the user, not waited for
FAILED_IN_A_ROW = 20  # so many jobs given up, none answered in between: the endpoint is at fault, not the jobs
LARGEST = 64 * 2**20  # bytes of a reply, unpacked
SHORT = 8  # characters; a shorter key, such as EMPTY, is no secret, and may be a word of an answer


class Reply(NamedTuple):
    """What became of a job: text and raw (the parsed json) of the reply; or error, a reason in words, and no text."""

    key: object
    text: str | None
    raw: dict | None
    error: str | None = None


class _Refused(Exception):
    """Another attempt would end likewise."""


class _Again(Exception):
    """Worth another attempt. wait: the seconds that the endpoint asks for."""

    wait = 0.0


class _Unreachable(_Again):
    """There was no connection."""


def completions_url(url: str) -> str:
    """The address of the chat completions, from a base address with or without /v1. Raises UserError."""
    try:
        is_plain = re.fullmatch(r'https?://[\w.:/%~+\[\]-]+', url, re.ASCII)
        is_address = is_plain and urlsplit(url).hostname and urlsplit(url).port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        is_address = False
    if not is_address:
        # what was given is not repeated: it may hold a key
        form = 'write http://host:port or https://host, without a name, password or query'
        raise UserError(f'--endpoint is no address: {form}; a key belongs in the environment (NANOPREF_API_KEY)')
    address = url.rstrip('/')
    if address.endswith('/chat/completions'):
        return address
    return address.removesuffix('/v1') + '/v1/chat/completions'


def ask(url, jobs, *, concurrency=8, timeout=120.0, retries=6, backoff=1.0, proven=False):
    """Yield a Reply for every job, in order of completion. jobs: (key, body), body the json of a chat completion.

    At most `concurrency` jobs are under way, counting those whose Reply the caller has not finished with. timeout: seconds for
    a whole reply. A job is tried again on 408, 409, 425, 429, 5xx, time-outs, lost connections, and replies that are too large
    or no completion: `retries` times, after backoff * 2^k seconds with jitter, or as Retry-After says. Then its Reply has an
    error, as has that of a refused job. proven: the endpoint had answered before. Raises UserError where going on is useless:
    a refused key, or nothing but failures."""
    endpoint = _Endpoint(url, concurrency, timeout, retries, backoff, proven)
    jobs, tasks, failures = iter(jobs), set(), 0
    with asyncio.Runner() as runner:  # ends what is still under way when the caller stops
        loop = runner.get_loop()
        while True:
            # an endpoint that has answered nothing yet gets no more jobs than it can answer at a time
            allowed = FAILED_IN_A_ROW if endpoint.proven else max(2, concurrency)
            free = min(concurrency, allowed - failures) - len(tasks)
            for key, body in itertools.islice(jobs, max(0, free)):
                tasks.add(loop.create_task(endpoint.finish(key, body)))
            if not tasks:
                break

            # answers come before an error that ends the loop
            finished, tasks = loop.run_until_complete(asyncio.wait(tasks, return_when='FIRST_COMPLETED'))
            for task in sorted(finished, key=lambda task: task.exception() is not None):
                reply = task.result()
                answered = reply.error is None
                failures = 0 if answered else failures + 1
                endpoint.proven |= answered
                yield reply
    if failures >= allowed or (failures and not endpoint.proven):
        advice = 'see that the server runs, and the address, the model and the other options, or run this again later'
        raise UserError(f'{failures} requests in a row failed; the last one: {reply.error}: {advice}')


class _Endpoint:
    """What the jobs of one ask share. proven: whether the endpoint has answered any job."""

    def __init__(self, url, concurrency, timeout, retries, backoff, proven):
        self.address, self.proven = completions_url(url), proven
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.not_before = 0.0  # time of the next request: Retry-After is meant for all jobs
        key = os.environ.get('NANOPREF_API_KEY') or os.environ.get('OPENAI_API_KEY') or ''
        self.key = key.strip()
        if not re.fullmatch('[!-~]*', self.key):
            raise UserError('the key in NANOPREF_API_KEY or OPENAI_API_KEY has characters that no key has')
        headers = {'Authorization': f'Bearer {self.key}'} if self.key else {}
        limits = httpx.Limits(max_connections=concurrency)
        connect = httpx.Timeout(None, connect=min(timeout, 10.0))
        # no redirect is followed: it could carry the key to another server
        try:
            self.client = httpx.AsyncClient(headers=headers, limits=limits, timeout=connect, follow_redirects=False)
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            why = f'ALL_PROXY, SSL_CERT_FILE ...: {type(error).__name__}'
            raise UserError(f'no connection as the environment asks for it ({why})') from None

    async def finish(self, key, body):
        """The Reply of a job, after as many attempts as it takes. Raises UserError."""
        for attempt in itertools.count():
            await asyncio.sleep(self.not_before - time.monotonic())
            try:
                return Reply(key, *self.read(*await self.post(body)))
            except _Refused as error:
                return Reply(key, None, None, str(error))
            except _Again as error:
                again = error
            # an address where nobody answers is most often a wrong one
            patience = 2 if isinstance(again, _Unreachable) and not self.proven else self.retries
            if attempt >= min(patience, self.retries):
                return Reply(key, None, None, f'{again}, after {attempt + 1} attempts')

            # all jobs wait as long as the endpoint asks for, and this one longer each time
            self.not_before = max(self.not_before, time.monotonic() + again.wait)
            longest = min(60.0, self.backoff * 2**attempt)
            await asyncio.sleep(longest * random.uniform(0.5, 1.0))

    async def post(self, body):
        """(response, its text) of a request. Raises _Again."""
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
        except Exception as error:  # the library has errors of many kinds for what a server may send
            raise _Again(f'connection lost ({type(error).__name__})') from None
        if len(content) > LARGEST:
            raise _Again(f'the reply is larger than {LARGEST / 2**20:g} MB')
        return response, content.decode('utf-8-sig', 'replace')

    def read(self, response, content):
        """(text, raw) of a whole reply. Raises _Again, _Refused or UserError."""
        status, raw = response.status_code, self.json(content)
        if 200 <= status < 300:
            try:
                # null where the model refused, or thought until its tokens were used up; no half of a surrogate pair
                text = raw['choices'][0]['message']['content'] or ''
                return text.encode('utf-8', 'replace').decode(), raw
            except (LookupError, TypeError, AttributeError):
                raise _Again(f'the reply is no chat completion ({self.line(raw)})') from None

        # the user must do something, it is worth another attempt, or this job is refused
        what = f'{self.address} answers HTTP {status} ({self.line(raw)})'
        if status in (401, 403):
            raise UserError(f'{what}: set the key of this endpoint in NANOPREF_API_KEY')
        if status in (408, 409, 425, 429) or status >= 500:
            again = _Again(what)
            asked = re.match(r'\d+(\.\d+)?$', response.headers.get('retry-after', ''))
            again.wait = float(asked[0]) if asked else 0.0
            if again.wait > LONGEST_WAIT:
                raise UserError(f'{what} and asks to wait {again.wait:.0f} s: run the same command again then')
            raise again
        raise _Refused(what)

    def json(self, content):
        """The json of a reply as any reader of json reads it, or its text where it is none; without the key."""
        try:
            # written anew, the key has one form only, and numbers that are none become texts
            written = json.dumps(json.loads(content))
            return json.loads(self.hide(written, json.dumps(self.key)[1:-1]), parse_constant=str)
        except (ValueError, RecursionError):
            return self.hide(content, self.key)

    def hide(self, text, key):
        """A text without the key, in the form that it has there."""
        return text.replace(key, '[key]') if len(key) >= SHORT else text

    def line(self, said):
        """What others say, its own message if it has one, on a line of 300 characters at most, none of which moves a cursor."""
        for name in ('error', 'detail', 'message'):
            said = said.get(name) or said if isinstance(said, dict) else said
        shown = ''.join(c if c.isprintable() else ' ' for c in self.hide(str(said), self.key)[:1000])
        return ' '.join(shown.split())[:300] or 'nothing'
