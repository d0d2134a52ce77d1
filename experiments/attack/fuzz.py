"""Attack the readers: mutated dataset rows through load_rows and tokenise.

    python -m experiments.attack.fuzz --rows=100000 --seed=0

A row must come out as texts whose words were in the file, be counted by reason, or be refused by a UserError that names file and line.
Anything else ends the run with exit code 1 and the case that shows it: another exception, ten seconds without an end, a text that nobody
wrote, a row that nobody counted."""

import contextlib
import copy
import gzip
import json
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter

from configurator import UserError, configure
from experiments import ROOT, read_rows
from text import sources, toy
from text.tokenise import tokenise

rows = 100_000  # mutated rows, in files of a few
seed = 0  # of the mutations
config = configure(globals())

SECONDS = 10  # after which a case hangs
ANSWERS = 'chosen', 'rejected', 'response'
FIELDS = {'prompt', *ANSWERS, 'sft', 'good', 'margin', 'tools', 'turns'}  # of an example
random.seed(seed)
counts = Counter()
tokenizer = toy.tokenizer()


class Failure(Exception):
    """Raised for a thing that must not happen."""


ODD_TEXTS = [
    '', ' ', '\n\n', '\x00', 'a\x00b', '\ud800', 'x\udfffy', '\ud83d\ude42', '\ufeff', '\u202e', '<|endoftext|>', '</s>',
    '\n\nHuman:', '\n\nAssistant:', '\n\nHuman: q\n\nAssistant: a\n\nAssistant:', '{instruction}', '{{ m.content }}',
    '$(touch x)', "'; import os", '<p>', '<![if x]>', '<![CDATA[', '<![foo[x]]>', '<!--' * 50, '<!', '&#1114112;', '&#xd800;', '<a ' * 50,
    'x' * 10, 'x' * 1000, 'x' * 100_000, 'é' * 500, '\u2028', '\r', 'NaN', 'null', 'true', '0',
]  # fmt: skip
ODD_VALUES = [None, True, False, 0, -1, 2, 1.5, float('nan'), float('inf'), -float('inf'), 10**400, 2**64, [], {},
              {'role': 'user', 'content': ' '}, [{'role': 'tool', 'content': 'x', 'tool_calls': [1]}]]  # fmt: skip
KINDS = 'text text nested messages list object value value'.split()  # of odd values
ACTS = 'delete rename copy insert wrap repeat replace replace'.split()  # of a mutation


def odd_value(depth=0):
    """Return a json value that hardly any reader expects: a text, something nested, a message, or one of ODD_VALUES."""
    kind = random.choice(KINDS)
    if kind == 'text':
        return random.choice(ODD_TEXTS)
    if kind == 'nested':
        levels = random.choice([1, 25, 200])
        return json.loads('{"x": [' * levels + ']}' * levels)
    if kind == 'messages':
        return [{'role': random.choice(['user', 'assistant']), 'content': random.choice(ODD_TEXTS)}]
    if kind == 'list' and depth < 3:
        return [odd_value(depth + 1)]
    if kind == 'object' and depth < 3:
        return {random.choice(['role', 'content', 'from', 'value', 'x']): odd_value(depth + 1)}
    return copy.deepcopy(random.choice(ODD_VALUES))


def places(value, levels):
    """Return all (container, key) in a json value, down to so many levels."""
    if levels == 0 or not isinstance(value, dict | list):
        return []
    keys = value if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        found += places(value[key], levels - 1)
    return found


def texts(value):
    """Return all texts in a json value."""
    values = [container[key] for container, key in places([value], 900)]
    return [value for value in values if isinstance(value, str)]


def mutate(row, pool):
    """Return a copy of a row in which a few values are gone, renamed, copied from another row of the pool, repeated or odd."""
    row = copy.deepcopy(row)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        spots = places(row, 6)
        if not spots:
            return odd_value()
        container, key = random.choice(spots)
        act = random.choice(ACTS)
        if act == 'delete':
            del container[key]
        elif act == 'rename' and isinstance(container, dict):
            others = [f'{key}x', 'prompt', 'chosen', 'preference', 'output_1', random.choice(ODD_TEXTS)[:20]]
            container[random.choice(others)] = container.pop(key)
        elif act == 'copy':
            other, place = random.choice(places(random.choice(pool), 6))
            container[key] = copy.deepcopy(other[place])
        elif act == 'insert' and isinstance(container[key], str):
            text = container[key]
            at = random.randrange(len(text) + 1)
            odd = random.choice(ODD_TEXTS)
            container[key] = text[:at] + odd + text[at + random.randrange(3) :]
        elif act == 'wrap':
            container[key] = [container[key]]
        elif act == 'repeat' and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[key] = odd_value()
    return row if random.random() < 0.98 else odd_value()


def write_line(row):
    """Return a row as json text, sometimes broken."""
    ascii_only = random.random() < 0.5
    text = json.dumps(row, ensure_ascii=ascii_only).encode('utf-8', 'surrogatepass')
    if random.random() < 0.9:
        return text
    cut, readable = random.randrange(len(text) + 1), text.decode('utf-8', 'replace')
    return random.choice([
        text[:cut], text[cut:], text[:cut] + random.randbytes(1) + text[cut + 1 :], text[:cut] + b'\x00' + text[cut:],
        b'\xef\xbb\xbf' + text, text + text, text + b',', readable.encode('utf-16'), readable.encode('utf-16-le'),
        readable.encode('latin-1', 'replace'), b'[' * 5, b'[' * 100_000, b'', b'  ', b'9' * 5000, text.replace(b'"', b"'"),
        b'{"prompt": NaN}', text[:-1] + b', "prompt": "twice"}',
    ])  # fmt: skip


def ring(*_):
    raise Failure(f'no end within {SECONDS} s')


def check_example(example, written, name):
    """Raise Failure unless an example has the fields that load_rows promises, with words that are written in the file."""
    if 'prompt' not in example or not example.keys() <= FIELDS:
        raise Failure(f'an example with the fields {sorted(example)}')
    for key, value in example.items():
        kinds = {'good': bool, 'margin': float}.get(key, str | list)
        if not isinstance(value, kinds) or (key == 'margin' and not abs(value) < 1e30):
            raise Failure(f'{key} is {value!r}')
        if key == 'tools':
            continue
        for text in texts(value):
            text.encode()
            # the markup of se is taken out, within words, too
            if name != 'se' and not all(word in written for word in re.findall(r'\w+', text)):
                raise Failure(f'a text that is not in the file: {text[:200]!r}')

        # messages have what messages have, and an answer is by the assistant
        messages = value if isinstance(value, list) else []
        if not all(isinstance(turn, dict) and turn.keys() >= {'role', 'content'} for turn in messages):
            raise Failure(f'messages {messages!r}')
        if messages and key in ANSWERS and messages[-1]['role'] != 'assistant':
            raise Failure(f'an answer by {messages[-1]["role"]!r}')


def load(source, path, in_lines, options):
    """Load a file without and with skip_bad_rows. Returns (examples, left_out) of the second, or None if it is refused."""
    refused = None
    try:
        sources.load_rows(source, 'train', **options)
    except UserError as error:
        refused = str(error)
        if '\n' in refused or path not in refused or len(refused) > 1000:
            raise Failure(f'a message without its file, or not one sentence: {refused!r}') from None
    try:
        examples, left_out = sources.load_rows(source, 'train', skip_bad_rows=True, **options)
    except UserError as error:
        if in_lines:
            raise Failure(f'skip_bad_rows does not skip: {error}') from None
        return None

    # a row that was refused is a bad row now, and its line was named
    bad = sum(n for reason, n in left_out.items() if reason.startswith('bad rows'))
    nameless = refused and in_lines and not re.search(r', line \d+: ', refused)
    if (refused is None) != (bad == 0) or nameless:
        raise Failure(f'{bad} bad rows, but the message is {refused!r}')
    return examples, left_out


def attack_file(name, content, path, index):
    """Send a file through load_rows, and what is left through tokenise. Raises Failure."""
    in_lines = not path.endswith('.json')
    with (gzip.open if path.endswith('.gz') else open)(path, 'wb') as stream:
        stream.write(content)

    # the rows that are json, and the number of all rows
    lines, parsed = content.split(b'\n') if in_lines else [content], []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            parsed.append(json.loads(line.decode('utf-8-sig')))
    total = sum(bool(line.strip()) for line in lines)
    if not in_lines:
        parsed = parsed[0] if parsed and isinstance(parsed[0], list) else parsed
        total = len(parsed)
    options = {'undivided': True, 'num_turns': 3 if name == 'sharegpt' else 1}
    loaded = load(f'{name}:{path}' if name else path, path, in_lines, options)
    if loaded is None:
        counts.update({'files refused': 1, 'rows refused': max(1, total)})
        return

    # every row is an example, or counted
    examples, left_out = loaded
    written = ' '.join(['Human Assistant user assistant', *texts(parsed)])
    for example in examples:
        check_example(example, written, name)
    rows = [n for reason, n in left_out.items() if not reason.startswith(('note: ', 'messages behind'))]
    found = len(examples) + sum(rows)
    least, most = total, found if name in ('se', 'sharegpt') else total  # there a row is several examples
    if name == 'oasst':  # questions and the best answers are part of other examples
        english = [row for row in parsed if isinstance(row, dict) and row.get('lang') == 'en']
        least -= sum(row.get('role') == 'prompter' or row.get('rank') == 0 for row in english)
    if not least <= found <= most:
        raise Failure(f'{total} rows, but {len(examples)} examples and {dict(left_out)}')

    counts['examples accepted'] += len(examples)
    for reason, n in left_out.items():
        counts['rows refused' if reason.startswith('bad rows') else f'dropped: {reason}'] += n
    task = ('pairs', 'singles', 'sft')[index % 3]
    found = tokenise(examples, tokenizer, task, (48, 24, 'start'), Counter(), True, skip_bad_rows=True)
    counts[f'tokenised for {task}'] += len(found)


began = time.process_time()
signal.signal(signal.SIGALRM, ring)
# format -> rows to mutate; '' -> rows of the documented formats, which need no name
formats = {}
for file in sorted((ROOT / 'tests/parts/raw').iterdir()):
    formats[file.stem] = read_rows(file) if file.suffix == '.jsonl' else json.loads(file.read_text())
formats[''] = formats.pop('any')
formats['hh_helpful'] = formats['hh_harmless'] = formats['hh']
formats['ultrafeedback_hybrid'] = formats['ultrafeedback']

folder = tempfile.mkdtemp(prefix='fuzz-')  # a case that fails stays there
index = 0
while counts['mutated rows'] < rows:
    # a file with rows of a format, most of them mutated
    name = random.choice([*formats, '', ''])
    ending = random.choice(['.jsonl', '.jsonl', '.jsonl', '.json', '.jsonl.gz'])
    changed = []
    for _ in range(8):
        row, is_changed = random.choice(formats[name]), random.random() < 0.8
        changed.append(mutate(row, formats[name]) if is_changed else row)
        counts['mutated rows'] += is_changed
    if ending == '.json':
        content = json.dumps(changed).encode()
        if random.random() >= 0.9:
            content = content[: random.randrange(len(content))]
    else:
        content = b'\n'.join(map(write_line, changed))

    path = f'{folder}/data{index % 4}{ending}'
    case = f'format {name or "any"}, file {path}, after {dict(counts)}'
    signal.alarm(SECONDS)
    try:
        attack_file(name, content, path, index)
    except BaseException as error:  # readers may raise a UserError alone, which is caught further in
        raise Failure(f'{type(error).__name__}: {error}; {case}') from error
    signal.alarm(0)
    index += 1
shutil.rmtree(folder)
for reason, n in sorted(counts.items()):
    print(f'{n:>9d}  {reason}')
print(f'no failure; {time.process_time() - began:.0f} s of CPU')
