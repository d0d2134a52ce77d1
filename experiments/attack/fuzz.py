"""Attack the readers: mutated dataset rows through load_rows and tokenise, mutated command lines and configs through configure.

    python -m experiments.attack.fuzz --rows=100000 --lines=10000 --seed=0

A row must come out as texts that were in the file, be counted by reason, or be refused by a UserError that names file and
line; so must a command line come out as what was written, or be refused. Anything else ends the run with the case that shows
it, and exit code 1: another exception, ten seconds without an end, a text that nobody wrote, a row that nobody counted.
"""

import base64
import contextlib
import copy
import functools
import gzip
import html
import io
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from configurator import UserError, _declared, configure
from experiments import ROOT
from feedback import answers
from runtime.values import CHOICES
from text import sources, toy
from text.tokenise import tokenise

rows = 100_000  # mutated rows, in files of a few
lines = 10_000  # mutated command lines and config files
seed = 0  # of the mutations
config = configure(globals())

SCRIPTS = ['dpo.py', 'sft.py', 'reward.py', 'ppo.py', 'sample.py', 'label.py', 'tools/plot.py', 'tools/bench.py']
TRAINING = SCRIPTS[:4]  # these have the options of training.py, too
SECONDS = 10  # after which a case hangs
FILE_ROWS = 8  # rows of a file, about half of them mutated
random.seed(seed)
counts = Counter()
tokenizer = toy.tokenizer()


class Failure(Exception):
    """What must not happen."""


# ---- rows ----


def generic():
    """Rows of the documented formats, beside those of tests/raw."""
    u, a = {'role': 'user', 'content': 'What is {x}?'}, {'role': 'assistant', 'content': 'It is a letter.'}
    b, s = {'role': 'assistant', 'content': 'Ünbekannt 🙂'}, {'role': 'system', 'content': 'Be brief.'}
    return [
        {'prompt': 'p one', 'chosen': ' good', 'rejected': ' bad', 'margin': 0.5},
        {'chosen': 'The sky is blue.', 'rejected': 'The sky is green.'},
        {'prompt': [s, u], 'chosen': [a], 'rejected': [b]},
        {'chosen': [u, a], 'rejected': [u, b]},
        {'prompt': 'p', 'completion': ' c', 'label': True},
        {'prompt': [u], 'completion': [a], 'label': False},
        {'prompt': 'p', 'response': ' r', 'good': True},
        {'messages': [s, u, a, u, b]},
        {'text': 'once upon a time'},
        {'prompt': 'only a prompt'},
    ]


def seeds():
    """format -> its rows."""
    found = {'': generic()}
    for file in sorted((ROOT / 'tests/parts/raw').iterdir()):
        text = file.read_text('utf-8')
        rows = f'[{",".join(text.splitlines())}]' if text.startswith('{') else text
        found[file.name.partition('.')[0]] = json.loads(rows)
    found['hh_helpful'], found['hh_harmless'] = found['hh'], found['hh']
    found['ultrafeedback_hybrid'] = found['ultrafeedback']
    return found


def odd_text():
    return random.choice([
        '', ' ', '\n\n', '\x00', 'a\x00b', '\ud800', 'x\udfffy', '\ud83d\ude42', '\ufeff', '\u202e', '<|endoftext|>', '</s>',
        '\n\nHuman:', '\n\nAssistant:', '\n\nHuman: q\n\nAssistant: a\n\nAssistant:', '{instruction}', '{{ m.content }}',
        '$(touch x)', "'; import os", '<p>', '<![if x]>', '<![CDATA[', '<![foo[x]]>', '<!--' * 50, '<!', '&#1114112;', '&#xd800;', '<a ' * 50,
        'x' * random.choice([10, 1000, 100_000]), 'é' * 500, '\u2028', '\r', 'NaN', 'null', 'true', '0',
    ])  # fmt: skip


def odd_value(depth=0):
    return random.choice([
        odd_text, odd_text, lambda: None, lambda: True, lambda: False, lambda: 0, lambda: -1, lambda: 2, lambda: 1.5,
        lambda: float('nan'), lambda: float('inf'), lambda: -float('inf'), lambda: 10**400, lambda: 2**64, list, dict,
        lambda: nested(random.choice([3, 50, 400])), lambda: [odd_value(depth + 1)] if depth < 3 else [],
        lambda: {random.choice(['role', 'content', 'from', 'value', 'x']): odd_value(depth + 1)} if depth < 3 else {},
        lambda: {'role': 'user', 'content': odd_text()}, lambda: [{'role': 'assistant', 'content': odd_text()}],
        lambda: [{'role': 'tool', 'content': 'x', 'tool_calls': [1]}],
    ])()  # fmt: skip


def nested(depth):
    value = 'deep'
    for _ in range(depth):
        value = [value] if random.random() < 0.5 else {'x': value}
    return value


def places(value, depth=0):
    """All (container, key) in a row."""
    found = []
    keys = range(len(value)) if isinstance(value, list) else ()
    for key in value if isinstance(value, dict) else keys:
        found.append((value, key))
        if depth < 5:
            found += places(value[key], depth + 1)
    return found


def mutate(row, pool):
    """A copy of a row in which a few values are gone, renamed, copied from another row, repeated or odd."""
    row = copy.deepcopy(row)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        spots = places(row)
        if not spots:
            return odd_value()
        container, key = random.choice(spots)
        act = random.randrange(8)
        if act == 0:
            del container[key]
        elif act == 1 and isinstance(container, dict):
            others = [f'{key}x', 'prompt', 'chosen', 'preference', 'output_1', odd_text()[:20]]
            container[random.choice(others)] = container.pop(key)
        elif act == 2:
            other, place = random.choice(places(random.choice(pool)))
            container[key] = copy.deepcopy(other[place])
        elif act == 3 and isinstance(container[key], str):
            text = container[key]
            at = random.randrange(len(text) + 1)
            container[key] = text[:at] + odd_text() + text[at + random.randrange(3) :]
        elif act == 4:
            container[key] = [container[key]]
        elif act == 5 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[key] = odd_value()
    return row if random.random() < 0.98 else odd_value()


def write_line(row):
    """A row as json text, sometimes broken."""
    ascii_only = random.random() < 0.5
    text = json.dumps(row, ensure_ascii=ascii_only).encode('utf-8', 'surrogatepass')
    if random.random() < 0.9:
        return text
    cut = random.randrange(len(text) + 1)
    return random.choice([
        lambda: text[:cut], lambda: text[cut:], lambda: text[:cut] + bytes([random.randrange(256)]) + text[cut + 1 :],
        lambda: text[:cut] + b'\x00' + text[cut:], lambda: b'\xef\xbb\xbf' + text, lambda: text + text, lambda: text + b',',
        lambda: text.decode('utf-8', 'replace').encode('utf-16'), lambda: text.decode('utf-8', 'replace').encode('utf-16-le'),
        lambda: text.decode('utf-8', 'replace').encode('latin-1', 'replace'), lambda: b'[' * random.choice([5, 100_000]),
        lambda: b'', lambda: b'  ', lambda: b'9' * 5000, lambda: text.replace(b'"', b"'"), lambda: b'{"prompt": NaN}',
        lambda: text[:-1] + b', "prompt": "twice"}',
    ])()  # fmt: skip


@contextlib.contextmanager
def caught(case):
    """Around a case: it must end in time, without any error. Else case() is printed, and the process ends."""

    def ring(*_):
        raise Failure(f'no end within {SECONDS} s')

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        traceback.print_exception(error)
        print(f'FAILED: {type(error).__name__}: {error}\nafter {dict(counts)}\ncase: {case()}')
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    finally:
        signal.alarm(0)


def texts(value):
    """All texts in a json value."""
    found, stack = [], [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    return found


def words(text):
    return set(re.findall(r'\w+', text))


def is_written(text, written, name):
    """Whether the words of a text stand in the file; of se, whose markup is taken out, the letters in their order in one text."""
    if name != 'se':
        speakers = 'Human Assistant user assistant'
        return words(text) <= words(' '.join([speakers, *written]))
    letters = re.findall(r'\w', re.sub(r'</?code>|Human:|Assistant:', '', text))
    rests = [iter(html.unescape(raw)) for raw in written]
    return any(all(letter in rest for letter in letters) for rest in rests)


def check_example(example, written, name):
    """Raise Failure unless an example has the fields that load_rows promises, with texts that were in the file."""
    fields = {'prompt', 'chosen', 'rejected', 'response', 'sft', 'good', 'margin', 'tools', 'turns'}
    kinds = {'good': bool, 'margin': float}
    if not {'prompt'} <= example.keys() <= fields:
        raise Failure(f'an example with the fields {sorted(example)}')
    for key, value in example.items():
        if not isinstance(value, kinds.get(key, str | list)) or (key == 'margin' and not abs(value) < 1e30):
            raise Failure(f'{key} is {value!r}')
        for text in texts(value):
            text.encode()
            if key != 'tools' and not is_written(text, written, name):
                raise Failure(f'a text that is not in the file: {text[:200]!r}')
        # an answer is by the assistant, and messages have what messages have
        messages = value if isinstance(value, list) and key != 'tools' else []
        if not all(isinstance(turn, dict) and turn.keys() >= {'role', 'content'} for turn in messages):
            raise Failure(f'messages {messages!r}')
        if messages and key in ('chosen', 'rejected', 'response') and messages[-1]['role'] != 'assistant':
            raise Failure(f'an answer by {messages[-1]["role"]!r}')


def quiet(name, raw):
    """Whether a row makes no example of its own: what is asked, and the best answers, are part of others in oasst."""
    return name == 'oasst' and raw.get('lang') == 'en' and (raw.get('role') == 'prompter' or raw.get('rank') == 0)


def read_json(content, ending):
    """(rows that are json, number of rows, all texts in them) of a file's bytes."""
    lines = content.split(b'\n') if ending.startswith('.jsonl') else [content]
    parsed = []
    for i, text in enumerate(lines):
        with contextlib.suppress(ValueError, RecursionError):
            parsed.append(json.loads(text.decode('utf-8' if i else 'utf-8-sig')))
    if ending == '.json' and parsed and isinstance(parsed[0], list):
        parsed = parsed[0]
    total = sum(bool(text.strip()) for text in lines) if ending.startswith('.jsonl') else len(parsed)
    return parsed, total, texts(parsed)


def attack_file(name, content, ending, folder, index):
    """One file through load_rows, with and without skip_bad_rows, and what is left through tokenise."""
    path = f'{folder}/data{index % 4}{ending}'
    with (gzip.open if ending.endswith('.gz') else open)(path, 'wb') as stream:
        stream.write(content)
    source, in_lines = f'{name}:{path}' if name else path, ending.startswith('.jsonl')
    parsed, total, written = read_json(content, ending)

    # read, or refused with one sentence
    options = {'undivided': True} | ({'num_turns': 3} if name == 'sharegpt' else {})
    refused = None
    try:
        sources.load_rows(source, 'train', **options)
    except UserError as error:
        refused = str(error)
        if '\n' in refused or path not in refused or len(refused) > 700:
            raise Failure(f'a message without its file, or not one sentence: {refused!r}') from None
    try:
        examples, left_out = sources.load_rows(source, 'train', skip_bad_rows=True, **options)
    except UserError as error:
        if in_lines:
            raise Failure(f'skip_bad_rows does not skip: {error}') from None
        counts.update({'files refused': 1, 'rows refused': max(1, total)})
        return

    # as many bad rows as were refused; every row is an example, or counted
    bad = sum(n for reason, n in left_out.items() if reason.startswith('bad rows'))
    nameless = refused and in_lines and not re.search(r', line \d+: ', refused)
    if (refused is None) != (bad == 0) or nameless:
        raise Failure(f'{bad} bad rows, but the message is {refused!r}')
    for example in examples:
        check_example(example, written, name)
    silent = sum(isinstance(row, dict) and quiet(name, row) for row in parsed)
    found = len(examples) + sum(n for reason, n in left_out.items() if not reason.startswith('note: '))
    several = name in ('se', 'sharegpt')  # a row is several examples
    if found < total - silent * (not several) or (found > total and not several):
        raise Failure(f'{total} rows, but {len(examples)} examples and {dict(left_out)}')

    counts.update({'rows refused': bad, 'examples accepted': len(examples)})
    counts.update({f'dropped: {reason}': n for reason, n in left_out.items() if not reason.startswith('bad rows')})
    attack_tokens(examples, ('pairs', 'singles', 'sft')[index % 3])
    if index % 7 == 0:
        with contextlib.suppress(UserError):
            answers.read_answers(path)


def attack_tokens(examples, task):
    """Tokenise; every part is accounted for, ends with the end of text, and is no longer than it may be."""
    left_out, eos, longest = Counter(), tokenizer.eos_token_id, random.choice([12, 48])
    side = random.choice(['start', 'end'])
    found = tokenise(examples, tokenizer, task, longest, longest // 2, side, left_out, True, skip_bad_rows=True)
    for i in range(len(found)):
        prompt, answers = found[i]
        if not len(prompt) or len(prompt) + max(map(len, answers)) > longest or any(a[-1] != eos for a in answers):
            raise Failure(f'tokens {prompt} {answers}')
    reasons = ('rows with ', 'bad rows', 'empty answers', 'pairs with equal answers')
    dropped = sum(n for reason, n in left_out.items() if reason.startswith(reasons))
    if task == 'pairs' and len(found) + dropped != len(examples):
        raise Failure(f'{len(examples)} examples, {len(found)} tokenised, {dict(left_out)}')
    if task == 'singles' and len(found) + dropped < len(examples):
        raise Failure(f'{len(examples)} examples, {len(found)} tokenised, {dict(left_out)}')
    counts[f'tokenised for {task}'] += len(found)


def attack_rows(total):
    """Files of mutated rows, until there are so many."""
    pool, done, index = seeds(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while done < total:
            name = random.choice([*pool, '', ''])
            ending = random.choice(['.jsonl', '.jsonl', '.jsonl', '.json', '.jsonl.gz'])
            chosen = [random.choice(pool[name]) for _ in range(FILE_ROWS)]
            changed = [mutate(row, pool[name]) if random.random() < 0.8 else row for row in chosen]
            done += sum(a is not b for a, b in zip(chosen, changed, strict=True))
            content = b'\n'.join(map(write_line, changed))
            if ending == '.json':
                content = b'[' + b','.join(json.dumps(row).encode() for row in changed) + b']'
                content = content if random.random() < 0.9 else content[: random.randrange(len(content))]
            shown = base64.b64encode(gzip.compress(content)).decode()
            with caught(lambda: f'format {name or "any"}, file {ending}, base64 of its gzip: {shown}'):  # noqa: B023
                attack_file(name, content, ending, folder, index)
            index += 1
    counts['mutated rows'] = done


# ---- command lines ----


@functools.cache
def scope_of(script):
    """The constants of a script, without running it."""
    scope = {'__file__': str(ROOT / script), '__doc__': ''}
    return scope | {name: option.default for name, option in _declared(scope).items()}


VALUES = ['', '0', '1', '-1', '1e-3', '1e999', '-inf', 'nan', 'None', 'true', 'False', '0x10', '1_0', ' 3 ', '3.0', '９', '9' * 5000,
          'toy', 'dpo', 'kto', 'radpo1', 'ipo', '[1]', '=', '--', '\x00', '\ud800', 'http://u:p@host', 'x' * 10_000, '../..', '0.5',
          '99999999999999999999', '1e308', '-0.0', 'SGD', 'cvar', 'é', "');import os", '\n']  # fmt: skip
LITERALS = ['0', '1', '-1', '1e-3', 'float("inf")', 'float("nan")', 'None', 'True', '"toy"', '""', '[]', '{}', '(1,)', 'lambda: 0', '1j',
            'b"x"', '10**400', '"a\\0b"', '"\\ud800"', 'object()', 'int', '...', '1/0', 'undefined', '"kto"', '0.5', '2**31', 'range(3)']  # fmt: skip
STATEMENTS = ['import os', 'from math import *', 'raise SystemExit', 'raise KeyError("x")', 'import no_such_module', 'def f(: pass',
              'x' * 5000, '(' * 200, 'class A: pass', '_private = 1', '\x00', 'exit()', 'assert False', 'for i in range(3): lr = 0.1',
              'beta = = 1', '\ufeff', 'return 1', 'yield 1', 'await x', 'del lr', 'lr: float = 0.1', 'raise Exception("a\\nb")', '1' * 5000,
              '# -*- coding: latin-9 -*-', '"""', 'lr = lr * 2', '-' * 3000 + '1', 'raise BaseException("x")', 'f"{"']  # fmt: skip


def attack_line(script, folder):
    """One command line; its values come out as they were written, by their declared types, or it is refused."""
    scope = copy.deepcopy(scope_of(script))
    shared = SimpleNamespace(**copy.deepcopy(scope_of('training.py'))) if script in TRAINING else None
    options = (vars(shared) if shared else {}) | scope
    argv, given = odd_arguments(options)
    argv += odd_configs(options, folder)
    random.shuffle(argv)
    before = copy.deepcopy(options)
    Path(folder, 'case.txt').write_text(repr((script, argv)))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            resolved = configure(scope, list(argv), shared)
    except UserError as error:
        if (vars(shared) if shared else {}) | scope != before:
            raise Failure('a refused command line changed the options') from None
        if '\n' in str(error) or not str(error):
            raise Failure(f'not one sentence: {str(error)!r}') from None
        counts['command lines refused'] += 1
        return argv
    except SystemExit as end:
        if end.code or not {'--help', '-h'} & set(argv):
            raise Failure(f'exit {end.code}') from None
        return argv
    check_resolved(argv, given, resolved, before)
    counts['command lines accepted'] += 1
    return argv


def odd_value_of(name, options):
    """A value that an option may have, or its default."""
    return random.choice(CHOICES.get(name, [options.get(name), '7']))


def odd_arguments(options):
    """(flags, name -> what was written for it, or None) of some of these options and of others."""
    names = [k for k in options if not k.startswith('_')]
    argv, given = [], {}
    for _ in range(random.choice([0, 1, 1, 2, 5])):
        unknown = random.choice(['lerning_rate', '', 'config', '__file__', '-x', 'é', 'x' * 999])
        name = random.choice(names) if random.random() < 0.9 else unknown
        value = random.choice(VALUES) if random.random() < 0.4 else str(odd_value_of(name, options))
        flag = f'--{name}={value}'
        if random.random() > 0.9:
            flag = random.choice(
                [f'--{name}', f'-{name}={value}', f'--{name} {value}', name, f'--{name}=={value}', '--', '-']
            )
        argv.append(flag)
        given[name] = flag.partition('=')[2] if flag.startswith(f'--{name}=') else None
    return argv, given


def odd_configs(options, folder):
    """Paths of config files, written into the folder, or of what is none."""
    names, argv = [k for k in options if not k.startswith('_')], []

    def line():
        name = random.choice(names)
        sound = f'{name} = {odd_value_of(name, options)!r}'
        return random.choice([sound, sound, f'{name} = {random.choice(LITERALS)}', random.choice(STATEMENTS)])

    for _ in range(random.choice([0, 0, 1, 1, 2])):
        path = f'{folder}/config{random.randrange(3)}.py'
        text = '\n'.join(line() for _ in range(random.randrange(4)))
        content = text.encode(random.choice(['utf-8', 'utf-8', 'utf-8', 'utf-16']), 'surrogatepass')
        Path(path).write_bytes(random.randbytes(40) if random.random() < 0.03 else content)
        other = random.choice([path, path, path, folder, f'{folder}/none.py', f'{folder}/a\x00b.py', path[:-3]])
        argv.append(path if random.random() < 0.7 else other)
    return argv


def check_resolved(argv, given, resolved, before):
    """What was written is what comes out, and nothing else has changed; else Failure."""
    for name, value in given.items():
        if value is None and not any(a == f'--{name}' for a in argv):
            raise Failure(f'{name} was not written as --name=value')
        half = name == 'max_prompt_length' and str(value).lower() in ('none', 'null')  # of max_length
        if value is not None and not half and not means(value, resolved[name]):
            raise Failure(f'--{name}={value} became {resolved[name]!r}')
    for name, value in resolved.items():
        json.dumps(value)
        if isinstance(value, str):
            value.encode()
        follows = name == 'max_prompt_length' and before[name] is None  # half of max_length
        if resolved.origin[name] == 'default' and value != before[name] and not follows:
            raise Failure(f'{name} is {value!r} though nobody set it')


def means(text, value):
    """Whether a value is what the text says."""
    if value is None:
        return text.lower() in ('none', 'null')
    if isinstance(value, bool):
        return text.lower() == str(value).lower()
    return text == value if isinstance(value, str) else float(text) == value


def attack_lines(total):
    """So many command lines, of all scripts in turn."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(total):
            with caught(lambda: {p.name: p.read_bytes() for p in Path(folder).iterdir()}):  # case.txt and configs
                attack_line(SCRIPTS[i % len(SCRIPTS)], folder)
            counts['mutated command lines'] += 1


began = time.process_time()
attack_rows(rows)
attack_lines(lines)
for what, n in sorted(counts.items()):
    print(f'{n:>9d}  {what}')
print(f'no failure; {time.process_time() - began:.0f} s of CPU')
