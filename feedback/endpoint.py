"""An async client for OpenAI-compatible chat endpoints (hosted models, vLLM, `transformers serve`), for sample.py and label.py.

The API key, from NANOPREF_API_KEY or else OPENAI_API_KEY, is redacted from everything a server says."""

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
from runtime.values import MIN_KEY_LENGTH

# huggingface_hub depends on one of these two, which have the same interface
try:
    import httpx2 as httpx
except ImportError:
    import httpx

KEY_NAMES = ('NANOPREF_API_KEY', 'OPENAI_API_KEY')  # environment variables
LONGEST_WAIT = 600.0  # seconds; end the run if Retry-After asks for more
FAILED_IN_A_ROW = 20  # consecutive failed jobs after which the endpoint is to blame, not the jobs
MAX_REPLY_BYTES = 64 * 2**20  # after decompression


class Reply(NamedTuple):
    """The result of a job: text (may be empty) and raw (the whole reply, parsed), or, if the job failed, an error message."""

    key: object
    text: str | None = None
    raw: dict | None = None
    error: str | None = None


class _AttemptFailed(Exception):
    """A failed attempt. can_retry: a retry may succeed. connected: the endpoint was reached. wait: seconds of Retry-After."""

    def __init__(self, message, *, can_retry=True, connected=True, wait=0.0):
        super().__init__(message)
        self.can_retry = can_retry
        self.connected = connected
        self.wait = wait


def completions_url(url):
    """Return the chat completions URL of a base URL with or without /v1. Raises UserError for a malformed URL."""
    try:
        is_plain = re.fullmatch(r'https?://[\w.:/%~+\[\]-]+', url, re.ASCII)
        is_valid = is_plain and urlsplit(url).hostname and urlsplit(url).port != 0
    except ValueError:
        # the port is not a number, or an IPv6 address lacks a bracket
        is_valid = False
    if not is_valid:
        # do not print the URL, which may contain a key
        form = 'write http://host:port or https://host, without a name, password or query'
        raise UserError(f'--endpoint is no address: {form}; a key belongs in the environment (NANOPREF_API_KEY)')
    base = url.rstrip('/')
    if base.endswith('/chat/completions'):
        return base
    return base.removesuffix('/v1') + '/v1/chat/completions'


def ask(url, jobs, *, concurrency, timeout, retries=6, backoff=1.0, proven=False):
    """Send requests concurrently and yield a Reply for each, in order of completion. jobs: iterable of (key, request body).

    concurrency: most requests at a time. timeout: seconds for a whole reply. proven: the endpoint has answered in an earlier run.
    Time-outs, lost connections, broken replies and HTTP 408, 409, 425, 429 and 5xx are retried up to `retries` times, first after
    about `backoff` seconds. Raises UserError if the endpoint rejects the key, asks for too long a wait, or fails too often in a row."""
    endpoint = _Endpoint(url, concurrency, timeout, retries, backoff, proven)
    jobs = iter(jobs)
    tasks = set()  # running jobs
    failures = 0  # failed jobs in a row
    # closing the runner cancels running tasks if the caller stops early
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        while True:
            # be less patient until the endpoint has answered once
            max_failures = max(concurrency, FAILED_IN_A_ROW if endpoint.proven else 2)
            # run at most as many jobs as may still fail: none after max_failures, so that the loop ends
            num_new = min(concurrency, max_failures - failures) - len(tasks)
            for key, body in itertools.islice(jobs, max(0, num_new)):
                tasks.add(loop.create_task(endpoint.run(key, body)))
            if not tasks:
                break
            finished, tasks = loop.run_until_complete(asyncio.wait(tasks, return_when='FIRST_COMPLETED'))
            # a task has an exception if no other job can succeed: yield the good replies before result() raises it
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
    if failures >= max_failures or never_answered:
        advice = 'see that the server runs, and the address, the model and the other options, and HTTP_PROXY, or retry'
        if ' answers HTTP 429 ' in last_error:
            advice = 'it takes no more requests for now: lower --concurrency, or run the same command again later'
        raise UserError(f'requests failed, {failures} in a row; the last one: {last_error}: {advice}')


class _Endpoint:
    """The HTTP client and the state shared by all jobs of one call of ask(), which explains the arguments."""

    def __init__(self, url, concurrency, timeout, retries, backoff, proven):
        """Open the client. Raises UserError for an unusable URL, API key or proxy."""
        self.url = completions_url(url)
        self.proven = proven  # the endpoint has answered at least once
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.not_before = 0.0  # the time.monotonic() from which on requests may be sent
        # the name of the first variable that is set
        names = [name for name in KEY_NAMES if os.environ.get(name, '').strip()]
        self.key_name = names[0] if names else None
        self.key = os.environ[self.key_name].strip() if names else ''
        # HTTP headers take printable ASCII only
        if not re.fullmatch('[!-~]*', self.key):
            raise UserError(f'the key in {self.key_name} has a character that no key has, such as a space or an umlaut')
        headers = {'Authorization': f'Bearer {self.key}'} if self.key else {}
        limits = httpx.Limits(max_connections=concurrency)
        # limits connecting only; post() limits the whole reply
        connect = httpx.Timeout(None, connect=min(timeout, 10.0))
        try:
            # no redirects: they could send the key to another server
            self.client = httpx.AsyncClient(headers=headers, limits=limits, timeout=connect, follow_redirects=False)
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            why = f'ALL_PROXY, SSL_CERT_FILE ...: {type(error).__name__}'
            raise UserError(f'no connection as the environment asks for it ({why})') from None

    async def run(self, key, body):
        """Run a job, with retries, and return its Reply. Raises UserError if every other job would fail, too."""
        for attempt in itertools.count():
            await asyncio.sleep(self.not_before - time.monotonic())  # a negative time is no wait
            try:
                response, content = await self.post(body)
                return Reply(key, *self.read(response, content))
            except _AttemptFailed as error:
                failure = error
            if not failure.can_retry:
                return Reply(key, error=str(failure))
            # an unreachable endpoint that has never answered is probably a wrong URL, so give up sooner
            is_known = failure.connected or self.proven
            retries = self.retries if is_known else min(2, self.retries)
            if attempt >= retries:
                return Reply(key, error=f'{failure}, attempts: {attempt + 1}')
            # the wait that the endpoint asked for holds for all jobs, the backoff for this one
            self.not_before = max(self.not_before, time.monotonic() + failure.wait)
            delay = min(60.0, self.backoff * 2**attempt)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def post(self, body):
        """Send a request and return (response, content as text). Raises _AttemptFailed if there is no complete reply."""
        content = bytearray()
        try:
            async with asyncio.timeout(self.timeout):
                async with self.client.stream('POST', self.url, json=body) as response:
                    async for chunk in response.aiter_bytes():
                        content += chunk
                        if len(content) > MAX_REPLY_BYTES:
                            break
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _AttemptFailed(f'{self.url} cannot be reached ({self.one_line(error)})', connected=False) from None
        except TimeoutError:
            raise _AttemptFailed(f'no reply within {self.timeout:g} s') from None
        except Exception as error:
            # httpx raises many unrelated types for malformed replies; name only the type, since the message may quote the key
            raise _AttemptFailed(f'connection lost ({type(error).__name__})') from None
        if len(content) > MAX_REPLY_BYTES:
            raise _AttemptFailed(f'the reply is larger than {MAX_REPLY_BYTES / 2**20:g} MB')
        return response, content.decode('utf-8-sig', 'replace')

    def read(self, response, content):
        """Return (answer text, parsed reply) of a response. Raises _AttemptFailed, or UserError if only the user can help."""
        raw = self.parse(content)
        status = response.status_code
        if 200 <= status < 300:
            try:
                # content is null if the model refused, or ran out of tokens while thinking
                text = raw['choices'][0]['message']['content'] or ''
                # or a list of parts, of which some are thoughts
                if isinstance(text, list):
                    text = ''.join(part['text'] for part in text if part['type'] == 'text')
                # replace lone surrogates, which neither files nor tokenizers accept
                return text.encode('utf-8', 'replace').decode(), raw
            except (LookupError, TypeError, AttributeError):
                raise _AttemptFailed(f'the reply is no chat completion ({self.one_line(raw)})') from None
        problem = f'{self.url} answers HTTP {status} ({self.one_line(raw)})'
        if status in (401, 403):
            sent = f'the key in {self.key_name} was sent' if self.key_name else 'no key was sent'
            raise UserError(f'{problem}; {sent}: set the key of this endpoint in NANOPREF_API_KEY')
        if status not in (408, 409, 425, 429) and status < 500:
            raise _AttemptFailed(problem, can_retry=False)
        # Retry-After may also be a date, which is ignored: the backoff applies anyway
        seconds = re.match(r'\d+(\.\d+)?$', response.headers.get('retry-after', ''))
        wait = float(seconds[0]) if seconds else 0.0
        if wait > LONGEST_WAIT:
            raise UserError(f'{problem} and asks to wait {wait:.0f} s: run the same command again then')
        raise _AttemptFailed(problem, wait=wait)

    def parse(self, content):
        """Return the content of a reply as JSON values, or as the text that it is if it is no JSON, with the key redacted."""
        try:
            # re-encode first, since the reply may spell the key with escapes
            encoded = json.dumps(json.loads(content))
            encoded_key = json.dumps(self.key)[1:-1]  # without the quotes
            # NaN and Infinity become strings
            return json.loads(self.redact(encoded, encoded_key), parse_constant=str)
        except (ValueError, RecursionError):
            return self.redact(content, self.key)

    def redact(self, text, key):
        """Replace the key in a text by [key], unless it is too short to be a secret."""
        return text.replace(key, '[key]') if len(key) >= MIN_KEY_LENGTH else text

    def one_line(self, reply):
        """Return a parsed reply or an exception as one printable line of 1 to 300 characters, with the key redacted."""
        # unwrap nested messages such as {'error': {'message': ...}}
        for name in ('error', 'detail', 'message'):
            if isinstance(reply, dict):
                reply = reply.get(name) or reply
        text = self.redact(str(reply), self.key)[:1000]
        printable = ''.join(c if c.isprintable() else ' ' for c in text)
        return ' '.join(printable.split())[:300] or 'nothing'
