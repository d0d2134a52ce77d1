"""From rows to token ids, and from those to steps, microbatches and packed batches: what is kept, cut, counted, flipped."""

import json
import math
import os
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from configurator import UserError
from runtime.prefetch import prefetch
from text import sources, tokenise, toy
from text.examples import Examples, uniform_hash

ROOT = Path(data.__file__).parent
MANY = settings(max_examples=100, deadline=None, database=None)
CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the token cache."""
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    return tmp_path / 'cache'


@pytest.fixture(scope='module')
def make_tokenizer():
    """make(bos=False, template=None) -> the toy world's tokenizer, perhaps with a BOS that it adds, or a template."""
    import tokenizers
    import transformers

    text = toy.tokenizer().backend_tokenizer.to_str()

    def make(bos=False, template=None):
        inner = tokenizers.Tokenizer.from_str(text)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token='<|endoftext|>')
        if bos:
            tokenizer.add_special_tokens({'bos_token': '<s>'})
            pair = ('<s>', tokenizer.bos_token_id)
            single = tokenizers.processors.TemplateProcessing(single='<s> $A', special_tokens=[pair])
            tokenizer.backend_tokenizer.post_processor = single
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope='module')
def tok(make_tokenizer):
    return make_tokenizer()


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)['input_ids']


def tokens(tokenizer, rows, task='pairs', max_length=64, max_prompt_length=32, truncation='start'):
    return tokenise.tokenise(rows, tokenizer, task, max_length, max_prompt_length, truncation, Counter())


def items(examples):
    """[(prompt ids, [answer ids ...])] as lists."""
    return [
        (p.tolist(), [a.tolist() for a in answers]) for p, answers in map(examples.__getitem__, range(len(examples)))
    ]


def pair(prompt, chosen, rejected, **more):
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected, **more}


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text):
    return {'role': 'assistant', 'content': text}


def many_pairs(n):
    return [pair(f'prompt {i}', f' good {i}', f' bad {i}') for i in range(n)]


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


# ---- tokenising ----


def test_prompt_and_answers_are_tokenised_apart_and_end_with_eos(tok):
    eos = tok.eos_token_id
    prompt, chosen, rejected = 'Review of the ho', 'tel: the bed', ' was great .'  # joined, these are other tokens
    assert encode(tok, prompt + chosen) != encode(tok, prompt) + encode(tok, chosen)
    examples = tokens(tok, [pair(prompt, chosen, rejected)])
    expected = encode(tok, prompt), [[*encode(tok, chosen), eos], [*encode(tok, rejected), eos]]
    assert items(examples) == [expected] and not examples.left_out
    assert examples.good.tolist() == [True] and examples.ids.dtype == np.int32 and examples.uid.dtype == np.uint64
    assert examples.lengths.tolist() == [len(expected[0]) + sum(map(len, expected[1]))]


def test_eos_is_not_doubled(tok):
    answer = ' great .'
    examples = tokens(tok, [pair('p', answer + '<|endoftext|>', answer * 2)])
    assert items(examples)[0][1] == [[*encode(tok, a), tok.eos_token_id] for a in (answer, answer * 2)]


def test_bos_only_where_the_tokenizer_adds_it(tok, make_tokenizer):
    adds = make_tokenizer(bos=True)
    has = make_tokenizer()
    has.add_special_tokens({'bos_token': '<s>'})  # has one and does not add it
    rows = [pair('a prompt', ' x', ' y'), pair('', ' x', ' y')]
    bos, eos = adds.bos_token_id, tok.eos_token_id
    assert [p for p, _ in items(tokens(tok, rows))] == [encode(tok, 'a prompt'), [eos]]
    assert [p for p, _ in items(tokens(has, rows))] == [encode(tok, 'a prompt'), [eos]]
    examples = tokens(adds, [*rows, pair('<s>a prompt', ' x', ' z')])
    assert [p for p, _ in items(examples)] == [[bos, *encode(tok, 'a prompt')], [bos], [bos, *encode(tok, 'a prompt')]]
    assert not any(bos in a for _, answers in items(examples) for a in answers)


def test_no_prompt_is_empty(tok):
    examples = tokens(tok, [{'prompt': '', 'response': 'all of it'}], 'sft')
    assert items(examples) == [([tok.eos_token_id], [[*encode(tok, 'all of it'), tok.eos_token_id]])]


LONG = pair('a b c d e f g h', ' 1 2 3 4 5', ' 6 7')  # 8 words, about two tokens each


@pytest.mark.parametrize('truncation', ['start', 'end'])
def test_a_long_prompt_loses_its_start_or_its_end(tok, truncation):
    prompt, answers = items(tokens(tok, [LONG]))[0]
    size = len(prompt) + max(map(len, answers))
    for limit in (1, 5, len(prompt) - 1):
        examples = tokens(tok, [LONG], max_length=size - 1, max_prompt_length=limit, truncation=truncation)
        cut = prompt[-limit:] if truncation == 'start' else prompt[:limit]
        assert items(examples) == [(cut, answers)] and examples.left_out == {'prompts cut': 1}
    whole = tokens(tok, [LONG], max_length=size, max_prompt_length=3, truncation=truncation)
    assert items(whole) == [(prompt, answers)] and not whole.left_out  # the whole fits: nothing is cut


@pytest.mark.parametrize('truncation', ['start', 'end'])
def test_a_cut_prompt_keeps_its_bos(make_tokenizer, truncation):
    tokenizer = make_tokenizer(bos=True)
    prompt = items(tokens(tokenizer, [LONG]))[0][0]
    for limit in (1, 5, len(prompt) - 1):
        cut = items(tokens(tokenizer, [LONG], max_length=18, max_prompt_length=limit, truncation=truncation))[0][0]
        rest = prompt[len(prompt) - limit + 1 :] if truncation == 'start' else prompt[1:limit]
        assert cut == [prompt[0], *rest] and len(cut) == limit and cut[0] == tokenizer.bos_token_id


def test_a_long_answer_is_cut_before_its_eos(tok):
    prompt, (chosen, rejected) = items(tokens(tok, [LONG]))[0]
    assert len(chosen) > len(rejected)
    for room in range(3, len(chosen)):
        limit = len(prompt) + room
        examples = tokens(tok, [LONG], max_length=limit, max_prompt_length=limit - 1)
        cut = [x if len(x) <= room else [*x[: room - 1], tok.eos_token_id] for x in (chosen, rejected)]
        assert items(examples) == [(prompt, cut)] and all(a[-1] == tok.eos_token_id for a in cut)
        assert examples.left_out == {'answers cut': 1 + (len(rejected) > room)}


def test_prompt_and_answers_cut(tok):
    examples = tokens(tok, [LONG, LONG | {'prompt': 'a'}, LONG], max_length=8, max_prompt_length=4)
    assert [[len(p), *map(len, a)] for p, a in items(examples)] == [[4, 4, 4], [1, 7, 5], [4, 4, 4]]
    assert examples.left_out == {'prompts cut': 2, 'answers cut': 5}
    assert all(a[-1] == tok.eos_token_id for _, answers in items(examples) for a in answers)


def test_equal_answers(tok):
    rows = [pair('p', ' a', ' a'), pair('p', ' a b c d', ' a b c e'), pair('p', ' a', ' a<|endoftext|>')]
    assert len(tokens(tok, rows[1:2])) == 1
    examples = tokens(tok, [*rows, pair('p', ' a', ' b')], max_length=5, max_prompt_length=2)  # ' a b c' of the second
    assert len(examples) == 1 and examples.left_out['pairs with equal answers'] == 3
    for task in ('pairs', 'singles'):  # before they are cut
        assert tokens(tok, rows[:1], task).left_out == {'pairs with equal answers': 1}
    chat = [pair([user('p')], [assistant('a')], [assistant('a')])]
    assert tokens(tok, chat).left_out['pairs with equal answers'] == 1
    assert len(tokens(tok, rows[:1], 'sft')) == 1  # a demonstration all the same


@pytest.mark.parametrize(
    'empty, template',
    [
        ('', None),
        (' ', None),
        ('\n', None),
        ('<|endoftext|>', None),
        ([assistant('')], None),
        ([assistant(' ')], CHATML),
        ([assistant('')], CHATML),
        ([], None),
        ([], CHATML),
    ],
)
def test_empty_answers_are_dropped_and_counted(make_tokenizer, empty, template):
    tokenizer = make_tokenizer(template=template)
    full = ' a' if isinstance(empty, str) else [assistant('a')]
    prompt = 'p' if isinstance(empty, str) else [user('p')]
    for row in (pair(prompt, full, empty), pair(prompt, empty, full)):
        examples = tokens(tokenizer, [row])
        assert len(examples) == 0 and examples.left_out['empty answers'] == 1
        examples = tokens(tokenizer, [row, pair(prompt, full, full * 2)], 'singles')
        assert len(examples) in (2, 3) and examples.left_out['empty answers'] == 1  # that answer, or its pair
    examples = tokens(tokenizer, [{'prompt': prompt, 'response': empty}], 'sft')
    assert len(examples) == 0 and examples.left_out['empty answers'] == 1


@pytest.mark.parametrize('task, answers', [('pairs', 2), ('singles', 1), ('sft', 1)])
def test_nothing_left_is_no_crash(tok, task, answers):
    for rows in ([], [{'prompt': 'p'}], [pair('p', '', '')]):
        examples = tokens(tok, rows, task)
        assert len(examples) == 0 and len(examples.select(slice(5))) == 0 and examples.lengths.sum() == 0
        assert examples.spans.shape == (0, 1 + answers, 2)


def test_what_each_task_takes_from_a_row(tok):
    rows = [
        pair('p', ' a', ' b'),
        pair('q', ' a', ' b', sft=' best'),
        {'prompt': 'p', 'response': ' c', 'good': True},
        {'prompt': 'p', 'response': ' d', 'good': False},
        {'prompt': 'p', 'response': ' e'},
        {'prompt': 'p'},
    ]

    def texts(task):
        examples = tokens(tok, rows, task)
        out = [tuple(tok.decode(x[:-1]) for x in a) for _, a in items(examples)]
        return out, examples.good.tolist(), dict(examples.left_out)

    assert texts('pairs') == (
        [(' a', ' b')] * 2,
        [True, True],
        {
            'rows with a prompt and a response only, where pairs needs chosen and rejected': 3,
            'rows with a prompt only, where pairs needs chosen and rejected': 1,
        },
    )
    singles = [(' a',), (' b',), (' a',), (' b',), (' c',), (' d',)]
    good = [True, False, True, False, True, False]
    needs = f'rows with {{}} only, where singles needs {tokenise.NEEDS["singles"]}'
    assert texts('singles') == (
        singles,
        good,
        {needs.format('a prompt and a response'): 1, needs.format('a prompt'): 1},
    )
    sft, good, out = texts('sft')
    assert sft == [(' a',), (' best',), (' c',), (' e',)]
    assert out == {
        'rows with a prompt only, where sft needs an answer': 1,
        'bad answers, which are no demonstrations': 1,
    }
    assert texts('prompts') == (
        [(' a',), (' best',), (' c',), (' d',), (' e',), ('.',)],
        [True] * 3 + [False] + [True] * 2,
        {},
    )


def test_a_prompt_is_kept_whatever_its_answer(tok):
    examples = tokens(tok, [{'prompt': 'p', 'response': ' '}, {'prompt': 'p'}, {'prompt': 'q'}], 'prompts')
    assert [tok.decode(p) for p, _ in items(examples)] == ['p', 'q'] and examples.left_out == {'same prompt again': 1}


def test_a_chat_may_be_a_prompt_alone(make_tokenizer):
    turns = [{'role': 'user', 'content': 'one two'}]
    chat, both = (
        make_tokenizer(),
        [{'prompt': turns}, {'prompt': turns, 'response': [{'role': 'assistant', 'content': 'x'}]}],
    )
    asked, answered = tokens(chat, both, 'prompts')
    assert asked[0].tolist() == answered[0].tolist() and len(asked[0]) > 1


def test_sft_takes_a_demonstration_once(tok):
    rows = [pair('p', ' a', ' b'), pair('p', ' a', ' c'), pair('q', ' a', ' b'), pair('p', ' d', ' b')]
    assert [tok.decode(a[0][:-1]) for _, a in items(tokens(tok, rows, 'sft'))] == [' a', ' a', ' d']


def test_uid_is_of_the_text(tok):
    rows = [pair('p', ' a', ' b'), pair('p', ' b', ' a'), pair('q', ' a', ' b')]
    uid = tokens(tok, rows).uid
    assert len(set(uid.tolist())) == 3 and (tokens(tok, rows[::-1]).uid == uid[::-1]).all()
    assert (tokens(tok, rows, max_length=5, max_prompt_length=2).uid == uid).all()
    assert tokens(tok, rows, 'singles').uid.tolist() == np.repeat(uid, 2).tolist()


# ---- chats ----

CHAT = {
    'prompt': [user('hi'), assistant('hello'), user('bye')],
    'chosen': [assistant('good bye')],
    'rejected': [assistant('no')],
}


def test_chat_template(make_tokenizer):
    tokenizer = make_tokenizer(template=CHATML)
    examples = tokens(tokenizer, [CHAT])
    prompt, answers = items(examples)[0]
    assert (
        tokenizer.decode(prompt)
        == '<user>hi<|endoftext|>\n<assistant>hello<|endoftext|>\n<user>bye<|endoftext|>\n<assistant>'
    )
    assert [tokenizer.decode(a) for a in answers] == [
        'good bye<|endoftext|>',
        'no<|endoftext|>',
    ] and not examples.left_out
    assert tokenizer.chat_template == CHATML
    mixed = tokens(
        tokenizer, [{'prompt': 'bye', 'response': [assistant('no')]}, {'prompt': [user('a')], 'response': 'b'}], 'sft'
    )
    texts = [tokenizer.decode(x) for p, a in items(mixed) for x in (p, *a)]
    ends = [f'<user>{q}<|endoftext|>\n<assistant>' for q in ('bye', 'a')]
    assert texts == [ends[0], 'no<|endoftext|>', ends[1], 'b<|endoftext|>']
    plain = tokens(tokenizer, [{'prompt': 'bye', 'response': ' no'}], 'sft')  # two strings are no chat
    assert tokenizer.decode(plain[0][0]) == 'bye'


def test_chat_without_a_template(make_tokenizer):
    examples = tokens(make_tokenizer(), [CHAT, CHAT | {'rejected': [assistant('maybe')]}])
    prompt, answers = items(examples)[0]
    decode = make_tokenizer().decode
    assert decode(prompt) == '\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:'
    assert [decode(a) for a in answers] == [' good bye<|endoftext|>', ' no<|endoftext|>']
    (note, count), *more = examples.left_out.items()
    assert note.startswith('note: no chat template') and count == 1 and not more
    system = tokens(make_tokenizer(), [CHAT | {'prompt': [{'role': 'system', 'content': 'Be kind.'}, user('hi')]}])
    assert decode(system[0][0]) == '\n\nBe kind.\n\nHuman: hi\n\nAssistant:'


@pytest.mark.parametrize(
    'template, words',
    [
        ("{{ raise_exception('no such role\nhere') }}", 'refuses'),
        ('{{ nonsense', 'refuses'),
        ('{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}', 'differently'),
    ],
)
def test_templates_that_refuse(make_tokenizer, template, words):
    with pytest.raises(UserError, match=words) as info:
        tokens(make_tokenizer(template=template), [CHAT])
    assert '\n' not in str(info.value)


# ---- the cache of tokens ----

LIMITS = {'max_length': 64, 'max_prompt_length': 32}


def load(source, tokenizer, split='train', task='pairs', **options):
    return tokenise.load_examples(source, split, tokenizer, task, **LIMITS | {'undivided': True} | options)


def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) and getattr(a, k).dtype == getattr(b, k).dtype
               for k in ('ids', 'spans', 'good', 'uid')) and a.left_out == b.left_out  # fmt: skip


@pytest.fixture
def count(monkeypatch):
    """A list that grows whenever rows are tokenised."""
    calls, original = [], tokenise.tokenise_parts
    monkeypatch.setattr(tokenise, 'tokenise_parts', lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.mark.parametrize('task', ['pairs', 'singles', 'sft'])
@pytest.mark.parametrize('chat', [False, True])
def test_a_second_load_reads_the_cache(tmp_path, make_tokenizer, count, cache, task, chat):
    source = write(tmp_path / 'd.jsonl', [CHAT] if chat else [*many_pairs(20), pair('p', '', '')])
    tokenizer, other = make_tokenizer(), make_tokenizer()
    first = load(source, tokenizer, task=task)
    assert len(count) == 1 and len(list(cache.iterdir())) == 1 and len(first)
    second = load(source, other, task=task)
    assert len(count) == 1 and same(first, second) and isinstance(second.left_out, Counter) and first.left_out
    assert tokenizer.chat_template == other.chat_template  # what is exported must not depend on the cache
    load(source, tokenizer, task=task)
    assert len(count) == 1
    assert same(load(source, tokenizer, task=task, cache=False), first) and len(count) == 2
    assert len(list(cache.iterdir())) == 1


def test_what_makes_another_cache_file(tmp_path, make_tokenizer, count, cache):
    rows = many_pairs(20)
    source = write(tmp_path / 'd.jsonl', rows)
    tokenizer = make_tokenizer()
    load(source, tokenizer)
    for changed in (
        {'max_length': 63},
        {'max_prompt_length': 31},
        {'truncation': 'end'},
        {'task': 'sft'},
        {'task': 'singles'},
        {'split': 'test'},
        {'undivided': False, 'split': 'test'},
        {'skip_bad_rows': True},
        {'num_turns': 2},
        {'tokenizer': make_tokenizer(bos=True)},
        {'tokenizer': make_tokenizer(template=CHATML)},
        {'source': source + '+' + source},
        {'source': write(tmp_path / 'e.jsonl', rows[:10])},
    ):
        before = len(count)
        load(**({'source': source, 'tokenizer': tokenizer} | changed))
        assert len(count) == before + 1 == len(list(cache.iterdir())), changed
    load(source, tokenizer, data_fraction=0.5, seed=3)  # is taken from the whole
    assert len(count) == before + 1
    write(tmp_path / 'd.jsonl', rows[:10])
    assert len(load(source, tokenizer)) == 10


@pytest.mark.parametrize(
    'damage',
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:5],
        lambda b: b'',
        lambda b: b'x' * len(b),
        lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:],  # one bit: other tokens
    ],
)
def test_a_damaged_cache_file_is_rebuilt(tmp_path, tok, count, cache, damage, capsys):
    source = write(tmp_path / 'd.jsonl', many_pairs(20))
    first = load(source, tok)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert same(load(source, tok), first) and len(count) == 2
    assert 'is damaged: tokenising anew' in capsys.readouterr().out
    assert file.read_bytes() == content and len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_a_note(tmp_path, tok, cache, monkeypatch, capsys):
    source = write(tmp_path / 'd.jsonl', many_pairs(20))
    first = load(source, tok)
    (file,) = cache.iterdir()
    file.unlink()
    file.with_suffix(f'.{os.getpid()}').mkdir()  # where it would be written first
    assert same(load(source, tok), first) and 'not cached' in capsys.readouterr().out
    monkeypatch.setenv('NANOPREF_CACHE', source)  # a file
    assert same(load(source, tok), first)
    out = capsys.readouterr().out
    assert out.startswith('note: ') and 'not cached' in out and out.count('\n') == 1


def test_rows_of_the_hub_are_cached_by_their_content(tok, cache, count, monkeypatch):
    monkeypatch.setattr(sources, 'hub_splits', lambda name: ['train', 'test'])
    monkeypatch.setattr(sources, 'read_rows', lambda *args, **kwargs: map(sources.Row, many_pairs(3)))
    load('owner/name', tok)
    load('owner/name', tok)
    assert len(count) == 1
    monkeypatch.setattr(sources, 'read_rows', lambda *args, **kwargs: map(sources.Row, many_pairs(4)))
    assert len(load('owner/name', tok)) == 4 and len(count) == 2


def test_load_examples(tmp_path, tok):
    a = write(tmp_path / 'a.jsonl', [*many_pairs(20), pair('p', '', ' a')])
    b = write(tmp_path / 'b.jsonl', [pair('x', ' y', ' z'), pair('p', ' a', '')])
    both = load(f'{a}+{b}', tok)
    assert len(both) == 21 and both.left_out == {'empty answers': 2} and tok.decode(both[20][0]) == 'x'
    whole = load(write(tmp_path / 'c.jsonl', many_pairs(2000)), tok)
    parts = {f: set(load(str(tmp_path / 'c.jsonl'), tok, data_fraction=f).uid.tolist()) for f in (0.2, 0.5, 1.0)}
    assert parts[0.2] < parts[0.5] < parts[1.0] == set(whole.uid.tolist())
    assert 300 < len(parts[0.2]) < 500 and 900 < len(parts[0.5]) < 1100
    assert set(load(str(tmp_path / 'c.jsonl'), tok, data_fraction=0.5, seed=1).uid.tolist()) != parts[0.5]
    some = load(str(tmp_path / 'c.jsonl'), tok, data_fraction=0.5)
    assert 150 < some.flip(0.2, 0).left_out['labels flipped'] < 250  # a fifth of what is kept, not of the low hashes
    mixed = write(tmp_path / 'e.jsonl', [{'prompt': 'p'}, pair('p', ' a', ' b'), {'chosen': 'a'}, pair('p', ' a', '')])
    left_out = {"bad rows: 'rejected' is missing or of the wrong type": 1, 'empty answers': 1}
    left_out['rows with a prompt only, where pairs needs chosen and rejected'] = 1
    assert load(mixed, tok, skip_bad_rows=True).left_out == left_out  # from reading, and from tokenising
    empty = write(tmp_path / 'd.jsonl', [pair('p', '', ' a')] * 3)
    with pytest.raises(UserError, match='no train examples are left.*empty answers.*3'):
        load(empty, tok)
    with pytest.raises(UserError, match='no test examples are left.*empty answers.*3.*README'):
        load(empty, tok, split='test')
    for _ in range(2):  # the second from the cache; nothing held out is no mistake
        assert len(load(empty, tok, split='test', undivided=False)) == 0
    with pytest.raises(UserError, match='no train examples are left'):
        load(str(tmp_path / 'b.jsonl'), tok, data_fraction=0.0)


def test_every_source_of_several_must_give_something(tmp_path, tok):
    """Else half of the data is gone and nobody has seen it."""
    good = write(tmp_path / 'good.jsonl', many_pairs(5))
    vanishing = {
        'layout': ([{'ask': 'q', 'chosen': 'a', 'rejected': 'b'}] * 5, 'bad rows.*5'),
        'equal': ([pair(f'p{i}', ' a', ' a') for i in range(5)], 'equal answers.*5'),
        'prompts': ([{'prompt': 'p'}] * 5, 'rows with a prompt only, where pairs needs chosen and rejected.*5'),
        'empty': ([pair(f'p{i}', ' a', '') for i in range(5)], 'empty answers.*5'),
        'nothing': ([], 'left out: nothing'),
    }
    for name, (rows, words) in vanishing.items():
        bad = write(tmp_path / f'{name}.jsonl', rows)
        for both in (f'{good}+{bad}', f'{bad}+{good}'):
            with pytest.raises(
                UserError, match=rf'no train examples are left in data .*{name}\.jsonl.*{words}.*README'
            ):
                load(both, tok, skip_bad_rows=True)


def test_a_small_file_may_have_nothing_held_out(tmp_path, tok):
    source = write(tmp_path / 'd.jsonl', many_pairs(1))
    sizes = [len(load(source, tok, split=split, undivided=False)) if split == 'test' or sources.load_rows(source, split)[0]
             else 0 for split in ('train', 'test')]  # fmt: skip
    assert sorted(sizes) == [0, 1]


# ---- noise and selection ----


def labels(examples):
    """uid -> the label, seen as the chosen answer's place or as the thumbs."""
    return {
        (int(u), int(s[1, 0])): bool(g) for u, s, g in zip(examples.uid, examples.spans, examples.good, strict=True)
    }


def flipped(examples, rate, seed=0):
    """The uids of what flip changes; checks that nothing else changes, and that it is counted."""
    after = examples.flip(rate, seed)
    pairs = examples.spans.shape[1] == 3
    changed = (after.spans != examples.spans).any((1, 2)) if pairs else after.good != examples.good
    swapped = examples.spans[:, [0, 2, 1]] if pairs else examples.spans
    assert (after.spans[changed] == swapped[changed]).all() and (
        after.spans[~changed] == examples.spans[~changed]
    ).all()
    assert (after.uid == examples.uid).all() and after.left_out - examples.left_out == (
        {'labels flipped': changed.sum()} if changed.any() else {}
    )
    return set(examples.uid[changed].tolist())


def test_flips(tok):
    rows = many_pairs(1000)
    examples = tokens(tok, rows)
    before = items(examples)
    sets = {rate: flipped(examples, rate) for rate in (0.0, 0.1, 0.2, 0.5, 1.0)}
    assert sets[0.0] == set() and sets[0.0] < sets[0.1] < sets[0.2] < sets[0.5] < sets[1.0] == set(
        examples.uid.tolist()
    )
    for rate in (0.1, 0.2, 0.5):
        assert abs(len(sets[rate]) / 1000 - rate) < 0.05
    assert items(examples) == before  # the flipped are a copy
    assert flipped(tokens(tok, rows[::-1]), 0.2) == sets[0.2]  # order does not matter
    assert flipped(tokens(tok, rows[:100]), 0.2) == sets[0.2] & set(
        examples.uid[:100].tolist()
    )  # nor what else is there
    assert flipped(examples.select(np.arange(0, 1000, 7)), 0.2) == sets[0.2] & set(examples.uid[::7].tolist())
    assert flipped(tokens(tok, rows, 'singles'), 0.2) == sets[0.2]  # both answers, or none
    assert flipped(examples, 0.2, seed=1) != sets[0.2]
    chosen = [(a, b) for _, (a, b) in items(examples.flip(1.0, 0))]
    assert chosen == [(b, a) for _, (a, b) in before]


def test_uniform_hash():
    uid = np.arange(20000, dtype=np.uint64)
    u = uniform_hash(uid, 0)
    assert 0 <= u.min() and u.max() < 1 and np.abs(np.histogram(u, 10, (0, 1))[0] - 2000).max() < 200
    assert (uniform_hash(uid[::-1], 0)[::-1] == u).all() and len(np.unique(u)) == len(u)
    other = uniform_hash(uid, 1)
    assert abs(np.corrcoef(u, other)[0, 1]) < 0.03 and abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
    assert uniform_hash(np.array([1], np.uint64), 0)[0] == pytest.approx(0.5665616, abs=1e-6)  # the same always


def test_keep(tok):
    examples = tokens(tok, many_pairs(1000), 'singles')

    def counts(*args):
        kept = examples.keep(*args)
        assert set(labels(kept).items()) <= set(labels(examples).items())
        return int(kept.good.sum()), int((~kept.good).sum())

    assert counts(1.0, 1.0, 0) == (1000, 1000) and counts(1.0, 0.0, 0) == (1000, 0) and counts(0.0, 1.0, 0) == (0, 1000)
    good, bad = counts(0.3, 0.6, 0)
    assert abs(good - 300) < 50 and abs(bad - 600) < 50
    kept, less, other = (labels(examples.keep(f, f, seed)) for f, seed in ((0.5, 0), (0.2, 0), (0.5, 1)))
    assert less.items() < kept.items() and kept != other
    uids = [{u for (u, _), good in kept.items() if good == thumb} for thumb in (True, False)]
    assert uids[0] != uids[1]  # the two answers of a pair are drawn apart


def test_first_answers(tok):
    examples = tokens(tok, many_pairs(5))
    assert items(examples.first_answers()) == [(p, a[:1]) for p, a in items(examples)]
    assert items(examples.flip(1.0, 0).first_answers()) == [(p, a[1:]) for p, a in items(examples)]


def test_mismatched(tok):
    rows = [pair('p', ' a', ' b'), pair('q', ' c', ' d'), pair('p', ' e', ' f'), pair('r', ' g', ' h')]
    examples = tokens(tok, rows, 'singles')
    for index in (np.arange(8), np.array([5, 0, 1, 4, 2]), np.array([0, 2])):
        mixed = examples.mismatched(index, 512, examples)
        own = {}
        for prompt, (a,) in items(examples):
            own.setdefault(tuple(prompt), []).append(a)
        assert len(mixed) == len(index)
        some = [examples[i][1][0].tolist() for i in index]
        for i, (prompt, (answer,)) in zip(index, items(mixed), strict=True):
            assert prompt == examples[i][0].tolist() and answer in some and answer not in own[tuple(prompt)]
    answers = [a for _, (a,) in items(examples.mismatched(np.array([2, 6]), 512, examples))]
    assert answers == [examples[6][1][0].tolist(), examples[2][1][0].tolist()]


def answers_for(examples, index, more):
    return [answer for _, (answer,) in items(examples.mismatched(np.array(index), 512, more))]


def test_mismatched_where_the_step_has_no_other_prompt(tok):
    """The next example of the set that has one, then one of the other set; never an answer to the own prompt if there is any
    other, never the own answer."""
    rows = [pair('p', ' a', ' b'), pair('q', ' c', ' d'), pair('p', ' e', ' f'), pair('r', ' g', ' h')]
    examples = tokens(tok, rows, 'singles')
    own = [answer for _, (answer,) in items(examples)]
    assert answers_for(examples, [3], examples) == [own[4]]  # the last step of an epoch may be of one example
    assert answers_for(examples, [7], examples) == [own[0]]
    assert answers_for(examples, [0, 1, 4], examples) == [own[2], own[2], own[6]]  # or of one prompt
    assert answers_for(examples, [2, 2], examples) == [
        own[4],
        own[4],
    ]  # or, where two epochs meet, of an example and itself
    few = tokens(tok, [pair('q', ' x', ' y')], 'singles')
    assert answers_for(few, [0, 1], examples) == [
        own[0],
        own[0],
    ]  # held-out examples of one prompt, beside the training set
    assert answers_for(few, [1], few) == [items(few)[0][1][0]]  # one prompt everywhere: another answer


def test_a_mismatched_answer_is_cut_to_the_length_of_an_example():
    examples = Examples.of([(list(range(10)), [[20, 21]]), ([1], [list(range(30, 41))]), (list(range(50, 62)), [[7]])])
    assert examples.longest() == 13 and examples.longest(mixed=True) == 12 + 11 and examples.longest_prompt() == 12
    mixed = items(examples.mismatched(np.arange(3), 12, examples))
    assert mixed == [(list(range(10)), [[30, 31]]), ([1], [[7]]), (list(range(50, 62)), [[20]])]  # one token at least
    assert examples.spans[1, 1].tolist() == [13, 24]  # which the cut has left as it was
    assert Examples.of([([1], [[2]])]).select(slice(0)).longest(mixed=True) == 0


def test_examples_of():
    made = [([1, 2], [[3], [4, 5]]), ([6], [[7, 8, 9], [1]])]
    examples = Examples.of(made)
    assert items(examples) == made and examples.lengths.tolist() == [5, 5] and len(set(examples.uid.tolist())) == 2


def run(script, *argv):
    """The globals of a script that has run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [script, *argv])
        patch.setattr(torch, 'set_num_threads', lambda n: None)  # one thread is faster for models this small
        return runpy.run_path(str(ROOT / script), run_name='script')


SMALL = ['--n_examples=2', '--batch_size=2', '--n_eval_examples=8', '--do_first_eval=false']


@pytest.fixture(scope='module', autouse=True)
def process_group():
    """The scripts make a process group of one; leave none behind."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_scripts_flip_training_pairs_alone(tmp_path, tok, capsys):
    rows = many_pairs(60)
    flags = [*SMALL, '--data=' + write(tmp_path / 'd.jsonl', rows), '--eval_data=' + str(tmp_path / 'd.jsonl')]
    clean = items(tokens(tok, rows))
    scope = run('dpo.py', *flags, '--noise_rate=1', f'--out_dir={tmp_path}/dpo')
    assert (
        items(scope['run'].train) == [(p, [b, a]) for p, (a, b) in clean] and items(scope['run'].held_out) == clean[:8]
    )
    assert "'labels flipped': 60" in capsys.readouterr().out
    scope = run('dpo.py', *flags, '--noise_rate=0.2', '--seed=3', f'--out_dir={tmp_path}/part')
    assert (
        items(scope['run'].train) == items(tokens(tok, rows).flip(0.2, 3)) and items(scope['run'].held_out) == clean[:8]
    )
    scope = run('sft.py', *flags, '--noise_rate=1', f'--out_dir={tmp_path}/sft')
    assert items(scope['run'].train) == [(p, [b]) for p, (a, b) in clean]
    assert items(scope['run'].held_out) == [(p, [a]) for p, (a, b) in clean[:8]]
    scope = run('sft.py', *flags, f'--out_dir={tmp_path}/sft0')
    assert items(scope['run'].train) == [(p, [a]) for p, (a, b) in clean]


def test_kto_flips_what_it_says_and_keeps_fractions_of_training_answers(tmp_path, tok, capsys):
    rows = many_pairs(60)
    flags = [*SMALL, '--loss=kto', '--data=' + write(tmp_path / 'd.jsonl', rows), f'--eval_data={tmp_path}/d.jsonl']
    (tmp_path / 'noise.py').write_text('noise_rate = 1.0\n')
    scope = run('dpo.py', str(tmp_path / 'noise.py'), *flags, f'--out_dir={tmp_path}/a')
    out = capsys.readouterr().out
    ignored = 'noise_rate' in out and 'has no effect' in out
    assert scope['run'].train.good.tolist() == [ignored, not ignored] * 60  # what is said to have no effect has none
    assert ("'labels flipped': 120" in out) != ignored and scope['run'].held_out.good.tolist() == [True, False] * 4
    scope = run('dpo.py', *flags, '--frac_good=0', '--frac_bad=0.5', f'--out_dir={tmp_path}/b')
    assert not scope['run'].train.good.any() and 15 < len(scope['run'].train) < 45 and len(scope['run'].held_out) == 8


def test_kto_with_one_example_left_over(tmp_path):
    flags = ['--loss=kto', '--data=' + write(tmp_path / 'd.jsonl', many_pairs(6)), f'--eval_data={tmp_path}/d.jsonl']
    run('dpo.py', *flags, '--n_examples=3', '--batch_size=2', '--n_eval_examples=3', f'--out_dir={tmp_path}/a')
    rows = [json.loads(line) for line in (tmp_path / 'a/metrics.jsonl').read_text().splitlines()]
    assert [row['counters/examples'] for row in rows if row['split'] == 'train'] == [2, 3]
    assert all(math.isfinite(row['loss/train']) for row in rows if row['split'] == 'train')


@pytest.mark.parametrize(('n_examples', 'n_eval'), [(3, 1), (4, 2), (5, 3)])
def test_kto_is_never_compared_with_the_own_answer(tmp_path, n_examples, n_eval):
    """Its own answer would make the loss of a single example 0.5 whatever the model has learned; here z is of another one."""
    rows = [pair(f'prompt {i}', f' good {i}', f' bad {i}') for i in range(6)]
    flags = ['--loss=kto', '--data=' + write(tmp_path / 'd.jsonl', rows), f'--eval_data={tmp_path}/d.jsonl', '--beta=1',
             '--lr=1e-2', '--warmup_steps=0', '--do_first_eval=false', '--batch_size=2', f'--n_examples={n_examples}',
             f'--n_eval_examples={n_eval}', f'--out_dir={tmp_path}/a']  # fmt: skip
    scope = run('dpo.py', *flags)
    train, held_out = scope['run'].train, scope['run'].held_out
    last = list(data.steps(len(train), 2, n_examples, 0))[-1][1]
    for examples, index in ((train, last), (held_out, np.arange(n_eval))):
        mixed = items(examples.mismatched(index, 512, train))
        assert [prompt for prompt, _ in mixed] == [items(examples)[i][0] for i in index]
        assert not any(pair in items(train) for pair in mixed)  # an answer to another prompt
    found = [json.loads(line) for line in (tmp_path / 'a/metrics.jsonl').read_text().splitlines()]
    for row in found:
        name = f'loss/{row["split"]}'
        moved = row['counters/examples'] > 2  # before the first step policy and reference agree
        assert not moved or abs(row[name] - 0.5) > 1e-4, row


def test_kto_of_one_example_is_refused(tmp_path):
    rows = [{'prompt': 'p', 'completion': ' a b', 'label': True}]
    flags = ['--loss=kto', '--data=' + write(tmp_path / 'd.jsonl', rows), f'--eval_data={tmp_path}/d.jsonl']
    with pytest.raises(UserError, match='kto .*another example.* has one'):
        run('dpo.py', *flags, f'--out_dir={tmp_path}/a')


# ---- any text ----

TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=30) | st.sampled_from(
    ['<|endoftext|>', 'a<|endoftext|>', '\0', ' ']
)
SIZES = st.integers(2, 24).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, max(1, n - 2))))


@MANY
@given(
    TEXT,
    st.lists(TEXT, min_size=2, max_size=2),
    SIZES,
    st.sampled_from(['start', 'end']),
    st.sampled_from(['pairs', 'singles']),
    st.booleans(),
)
def test_every_token_is_accounted_for(make_tokenizer, prompt, answers, limits, truncation, task, bos):
    """Against the definition: what is kept of prompt and answers, in which order, and what the counts say."""
    tokenizer = TOKENIZERS.setdefault(bos, make_tokenizer(bos))
    longest, longest_prompt = limits
    eos, head = tokenizer.eos_token_id, [tokenizer.bos_token_id] if bos else []
    found = tokens(tokenizer, [pair(prompt, *answers)], task, longest, longest_prompt, truncation)
    whole = encode(tokenizer, prompt)
    whole = [*head, *whole] if head else whole or [eos]
    ended = [x if x[-1:] == [eos] else [*x, eos] for x in (encode(tokenizer, a) for a in answers)]
    counts = found.left_out
    said = counts['empty answers'] + counts['pairs with equal answers']
    if task == 'pairs':
        assert len(found) + said == 1
    else:
        assert len(found) + counts['empty answers'] == 2 or (not len(found) and said)
    cut_prompts = cut_answers = 0
    for i, (p, kept) in enumerate(items(found)):
        mine = ended if task == 'pairs' else [ended[0 if found.good[i] else 1]]
        assert all(x[-1] == eos and len(x) for x in kept) and len(p) + max(map(len, kept)) <= longest
        if len(whole) + max(map(len, mine)) <= longest:
            assert (p, kept) == (whole, mine)
            continue
        cut = len(whole) > longest_prompt
        rest = whole[len(head) :]
        size = longest_prompt - len(head)
        expected = whole if not cut else [*head, *(rest[len(rest) - size :] if truncation == 'start' else rest[:size])]
        room = longest - len(expected)
        assert p == expected
        assert kept == [x if len(x) <= room else [*x[: room - 1], eos] for x in mine]
        cut_prompts += cut
        cut_answers += sum(len(x) > room for x in mine)
    if len(found) == (1 if task == 'pairs' else 2):
        assert (counts['prompts cut'], counts['answers cut']) == (cut_prompts, cut_answers)


TOKENIZERS = {}


@MANY
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=6), st.sampled_from(['pairs', 'singles', 'sft']))
def test_rows_do_not_touch_each_other(tok, rows, task):
    rows = [pair(f'{i} {prompt}', chosen, rejected) for i, (prompt, chosen, rejected) in enumerate(rows)]
    alone = [tokens(tok, [row], task) for row in rows]
    together = tokens(tok, rows, task)
    assert items(together) == [item for one in alone for item in items(one)]
    assert together.left_out == sum((one.left_out for one in alone), Counter())
    assert together.good.tolist() == [g for one in alone for g in one.good.tolist()]


@MANY
@given(
    st.integers(1, 2).flatmap(lambda n: st.lists(st.tuples(st.lists(st.integers(1, 99), min_size=1, max_size=9), st.lists(
        st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=n, max_size=n)), min_size=1, max_size=12)),
    st.sampled_from([1, 2, 3, 5]), st.integers(1, 60), st.booleans(), st.booleans(), st.randoms(),
)  # fmt: skip
def test_ranks_share_a_step_out(groups, world, max_tokens, share_prefix, pad, random):
    """All examples once, as many microbatches on every rank, every answer token predicted once, nothing else."""
    examples = Examples.of(groups)
    index = list(range(len(groups)))
    random.shuffle(index)
    index = np.array(index)
    ranks = [
        data.make_batches(examples, index, r, world, max_tokens, share_prefix=share_prefix, pad=pad)
        for r in range(world)
    ]
    assert len({len(batches) for batches, *_ in ranks}) == 1 and len({tuple(rest) for _, *rest in ranks}) == 1
    seen, real, allocated = [], *ranks[0][1:]
    for batches, *_ in ranks:
        for batch in batches:
            n_answers, targets, rows = len(groups[0][1]), batch.target.tolist(), batch.answer.tolist()
            flat = batch.ids.flatten()
            assert flat[batch.last].tolist() == [
                [t for t, r in zip(targets, rows, strict=True) if r == i][-1] for i in range(len(batch.n))
            ]
            for j, place in enumerate(batch.slot):
                answers = [
                    [t for t, r in zip(targets, rows, strict=True) if r == j * n_answers + k] for k in range(n_answers)
                ]
                if place >= 0:
                    seen.append(place)
                    assert answers == groups[index[place]][1]
                    firsts = [i for i, r in zip(batch.predict_at.tolist(), rows, strict=True) if r == j * n_answers][:1]
                    assert (
                        flat[firsts].tolist() == groups[index[place]][0][-1:]
                    )  # the first is predicted from the prompt's end
    assert sorted(seen) == list(range(len(groups))) and real <= allocated


# ---- steps ----

STEPS = st.fixed_dictionaries(
    {'n': st.integers(1, 30), 'batch_size': st.integers(1, 40), 'total': st.integers(1, 100), 'seed': st.integers(0, 9)}
)


@MANY
@given(STEPS, st.integers(0, 5))
def test_steps(args, skip):
    n, batch_size, total = args['n'], args['batch_size'], args['total']
    plan = list(data.steps(**args))
    assert [first for first, _ in plan] == list(range(0, total, batch_size))
    assert [len(index) for _, index in plan] == [min(batch_size, total - first) for first, _ in plan]
    order = np.concatenate([index for _, index in plan]).tolist()
    epochs = [order[i : i + n] for i in range(0, total, n)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)  # without replacement
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs if len(epoch) == n)
    start = skip * batch_size  # resumed there: the same steps
    again = [(first, index.tolist()) for first, index in data.steps(**args, start=start)]
    assert again == [(first, index.tolist()) for first, index in plan[skip:]]
    longer = data.steps(**args | {'total': total + 50, 'batch_size': 1})  # an example's place is its count's alone
    assert [index[0] for _, index in longer][:total] == order
    straight = data.steps(**args, shuffle=False)
    assert np.concatenate([index for _, index in straight]).tolist() == [i % n for i in range(total)]


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed):
        return np.concatenate([index for _, index in data.steps(50, 7, 150, seed)]).tolist()

    epochs = [tuple(order(seed)[i : i + 50]) for seed in (0, 1) for i in (0, 50, 100)]
    assert len(set(epochs)) == 6 and tuple(range(50)) not in epochs and order(0) == order(0)


# ---- plans ----


@MANY
@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=40),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 200),
)
def test_plan(lengths, world, max_tokens):
    plans = data.plan(np.array(lengths), world, max_tokens)
    assert plans == data.plan(lengths, world, max_tokens)
    assert len(plans) == world and len({len(mine) for mine in plans}) == 1 and plans[0]
    batches = [batch for mine in plans for batch in mine]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 1 or sum(lengths[i] for i in batch) <= max_tokens
        assert batch == sorted(batch)
    assert len(plans[0]) <= -(-len(lengths) // world)  # no more than one example each


@MANY
@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 200))
def test_plan_padded(widths, world, max_tokens):
    """No padded microbatch has more than max_tokens places, unless it is one example."""
    plans = data.plan_padded(np.array(widths), world, max_tokens)
    assert len(plans) == world and len({len(mine) for mine in plans}) == 1 and plans[0]
    batches = [batch for mine in plans for batch in mine]
    assert sorted(i for batch in batches for i in batch) == list(range(len(widths)))
    assert all(len(b) <= 1 or len(b) * max(widths[i] for i in b) <= max_tokens and b == sorted(b) for b in batches)
    assert sum(not b for b in batches) < world


def test_padded_plans_put_similar_widths_side_by_side():
    assert data.plan_padded([9, 2, 10, 2, 2, 2], 1, 20) == [[[0, 2], [1, 3, 4, 5]]]
    assert data.plan_padded([4] * 8, 4, 1000) == [[[0, 1]], [[4, 5]], [[2, 3]], [[6, 7]]]
    assert data.plan_padded([4], 2, 1000) == [[[0]], [[]]]


def test_plans_are_balanced_and_no_longer_than_need_be():
    rng = np.random.default_rng(0)
    for world in (1, 2, 4):
        lengths = rng.integers(20, 200, 256)
        plans = data.plan(lengths, world, 2048)
        loads = [sum(lengths[i] for batch in mine for i in batch) for mine in plans]
        assert max(loads) - min(loads) < 0.02 * sum(loads) / world + 50
        assert len(plans[0]) <= -(-lengths.sum() // (world * 2048)) + 1
    assert data.plan([5, 5], 1, 10) == [[[0, 1]]] and data.plan([5, 6], 1, 10) == [[[1], [0]]]
    assert data.plan([50], 2, 10) == [[[0]], [[]]]
    assert len(data.plan([3, 3, 2, 2, 2], 1, 6)[0]) == 3  # longest first makes 7 and 5 of them
    assert data.plan([50, 40, 20, 10], 2, 50) == [[[0], [2]], [[1], [3]]]  # dealt in turn


# ---- packing ----

IDS = st.lists(st.integers(1, 99), min_size=1, max_size=6)
GROUPS = st.integers(1, 2).flatmap(
    lambda n: st.lists(st.tuples(IDS, st.lists(IDS, min_size=n, max_size=n)), min_size=1, max_size=5)
)


def arrays(groups):
    return [(np.array(p, np.int32), [np.array(a, np.int32) for a in answers]) for p, answers in groups]


def read_back(batch):
    """[(tokens before the first, the answer's tokens)] of every answer, as index, target, row and column say."""
    flat, out = batch.ids.flatten().tolist(), []
    for row, n in enumerate(batch.n.tolist()):
        mine = (batch.answer == row).nonzero().flatten()
        assert batch.offset[mine].tolist() == list(range(n))
        target, index = batch.target[mine].tolist(), batch.predict_at[mine].tolist()
        assert [flat[i] for i in index[1:]] == target[:-1]  # the token before each is the one before
        assert index[1:] == list(range(index[1], index[1] + n - 1)) if n > 1 else True
        out.append((flat[index[0]], target))
    return out


@MANY
@given(GROUPS, st.booleans(), st.booleans())
def test_pack(groups, share_prefix, pad):
    batch = data.pack(arrays(groups), list(range(len(groups))), share_prefix=share_prefix, pad=pad)
    flat = [(p, a) for p, answers in groups for a in answers]
    assert read_back(batch) == [(p[-1], a) for p, a in flat] and batch.slot == list(range(len(groups)))
    assert batch.n.tolist() == [len(a) for _, a in flat] and len(batch.target) == batch.n.sum()
    if pad:
        width = max(len(p) + len(a) for p, a in flat)
        assert batch.ids.tolist() == [p + a + [0] * (width - len(p) - len(a)) for p, a in flat]
        assert batch.mask.tolist() == [[int(i < len(p) + len(a)) for i in range(width)] for p, a in flat]
        assert batch.position is None and not batch.groups
        return
    units = groups if share_prefix else [(p, [a]) for p, a in flat]
    ids = [x for p, answers in units for part in (p, *answers) for x in part]
    position = [
        i for p, answers in units for i in (*range(len(p)), *(len(p) + j for a in answers for j in range(len(a))))
    ]
    assert batch.ids.tolist() == [ids] and batch.position.tolist() == [position]
    assert batch.groups == [(len(p), tuple(map(len, answers))) for p, answers in units] and batch.mask is None
    starts = np.cumsum([0] + [len(p) + sum(map(len, answers)) for p, answers in units])
    place = iter(batch.predict_at[batch.offset == 0].tolist())
    for (p, answers), start in zip(units, starts[:-1], strict=True):  # the first token follows this prompt, no other
        assert [next(place) for _ in answers] == [start + len(p) - 1] * len(answers)


@MANY
@given(GROUPS)
def test_packed_and_padded_predict_the_same(groups):
    three = [data.pack(arrays(groups), list(range(len(groups))), share_prefix=share, pad=pad)
             for share, pad in ((True, False), (False, False), (True, True))]  # fmt: skip
    for name in ('target', 'answer', 'offset', 'n'):
        assert len({tuple(getattr(batch, name).tolist()) for batch in three}) == 1


@MANY
@given(GROUPS, st.randoms())
def test_batch_sum(groups, random):
    batch = data.pack(arrays(groups), list(range(len(groups))))
    values = torch.tensor([random.uniform(-9, 9) for _ in batch.target])
    sums = batch.sum(values)
    assert sums.shape == batch.n.shape and sums.dtype == values.dtype
    for row, got in enumerate(sums):
        assert got.item() == pytest.approx(values[batch.answer == row].double().sum().item(), abs=1e-4)
    leaf = values.clone().requires_grad_(True)
    (batch.sum(leaf) * torch.arange(1.0, len(sums) + 1)).sum().backward()
    assert leaf.grad.tolist() == (batch.answer + 1.0).tolist()


@pytest.mark.parametrize('pad', [False, True])
@pytest.mark.parametrize('answers', [1, 2])
def test_a_filler_does_not_count(pad, answers):
    batch = data.pack([], [], filler=answers, pad=pad)
    assert batch.slot == [-1] and batch.n.tolist() == [1] * answers and len(batch.target) == answers


@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('share_prefix, pad', [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize('task', ['pairs', 'singles'])
def test_microbatches(tok, task, world, share_prefix, pad):
    examples = tokens(tok, [pair('p ' * (i % 7 + 1), ' a' * (i + 1), ' b' * (5 - i % 5)) for i in range(13)], task)
    index = np.random.default_rng(0).permutation(len(examples))[:10]
    ranks = [data.make_batches(examples, index, rank, world, 40, share_prefix=share_prefix, pad=pad)
             for rank in range(world)]  # fmt: skip
    assert len({(real, allocated) for _, real, allocated in ranks}) == 1 == len({len(b) for b, *_ in ranks})
    _, real, allocated = ranks[0]
    per_rank = [b for batches, *_ in ranks for b in batches]
    counted = [b for b in per_rank if b.slot != [-1]]
    assert sorted(i for b in counted for i in b.slot) == list(range(10))
    for batch in counted:
        expected = [(p[-1], a) for p, answers in (items(examples)[index[i]] for i in batch.slot) for a in answers]
        assert read_back(batch) == expected
        assert len(batch.slot) == 1 or pad or batch.ids.numel() <= 40
    separate = sum(len(p) + len(a) for i in index for p, answers in [items(examples)[i]] for a in answers)
    assert real == (separate if pad or not share_prefix else examples.lengths[index].sum())
    assert allocated == sum(b.ids.numel() for b in counted) and allocated >= real and (pad or allocated == real)


def test_pack_probe(tok):
    examples = tokens(tok, [*many_pairs(2), pair('p', ' a' * 40, ' b'), *many_pairs(1)])
    packed, padded = data.pack_probe(examples, 'cpu')  # the first and the longest
    ends = [(p[-1], a) for p, answers in (items(examples)[0], items(examples)[2]) for a in answers]
    assert read_back(packed) == read_back(padded) == ends and packed.mask is None and padded.mask is not None


def test_prefetch():
    assert list(prefetch(iter(range(20)))) == list(range(20)) and list(prefetch(iter([]))) == []

    def breaks():
        yield 1
        raise UserError('in the middle')

    work = prefetch(breaks())
    assert next(work) == 1
    with pytest.raises(UserError, match='in the middle'):
        next(work)
