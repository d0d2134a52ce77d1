"""From rows to token ids, and from those to steps, microbatches and packed batches: what is kept, cut, counted, flipped."""

import copy
import math
import types
import uuid
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from helpers import assistant, metrics, run_script, user, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import data
import training
from configurator import UserError
from hf import attention, probe
from runtime.files import file_hash
from runtime.prefetch import prefetch
from text import sources, tokenise, toy
from text.examples import Examples, in_words, uniform_hash

MANY = settings(max_examples=60, deadline=None, database=None)
BARE = '{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the token cache."""
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


tok = toy.tokenizer()


def make_tokenizer(bos=False, template=None):
    """The toy world's tokenizer, perhaps with a BOS that it adds, or a template."""
    tokenizer = copy.deepcopy(tok)
    tokenizer.chat_template = template
    if bos:
        tokenizer.add_special_tokens({'bos_token': '<s>'})
        special = [('<s>', tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single='<s> $A', special_tokens=special)
    return tokenizer


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)['input_ids']


def tokens(tokenizer, rows, task='pairs', max_length=64, max_prompt_length=32, truncation='start', **how):
    return tokenise.tokenise(rows, tokenizer, task, (max_length, max_prompt_length, truncation), Counter(), **how)


def items(examples):
    """[(prompt ids, [answer ids ...])] as lists."""
    return [(prompt.tolist(), [answer.tolist() for answer in answers]) for prompt, answers in examples]


def answers_of(examples):
    return [answer for _, answers in items(examples) for answer in answers]


def pair(prompt, chosen, rejected, **more):
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected, **more}


def many_pairs(n):
    return [pair(f'prompt {i}', f' good {i}', f' bad {i}') for i in range(n)]


# ---- tokenising ----


def check_tokens(tokenizer, prompt, answers, limits=(64, 32), truncation='start', task='pairs', bos=False):
    """One pair against the definition: tokenised apart, BOS only where the tokenizer adds it, an end of text not doubled."""
    longest, longest_prompt = limits
    found = tokens(tokenizer, [pair(prompt, *answers)], task, longest, longest_prompt, truncation)
    counts, eos, head = found.left_out, tokenizer.eos_token_id, [tokenizer.bos_token_id] if bos else []
    whole = encode(tokenizer, prompt)
    whole = whole if head and whole[:1] == head else [*head, *whole] or [eos]
    ended = [x if x[-1:] == [eos] else [*x, eos] for x in (encode(tokenizer, a) for a in answers)]
    # what is not there is counted
    said, full = counts['empty answers'] + counts['pairs with equal answers'], 1 if task == 'pairs' else 2
    assert len(found) + said == full or (task == 'singles' and not len(found) and said)
    cut_prompts = cut_answers = 0
    for i, (p, kept) in enumerate(items(found)):
        expected, mine = whole, ended if task == 'pairs' else [ended[0 if found.good[i] else 1]]
        assert all(x[-1] == eos for x in kept) and len(p) + max(map(len, kept)) <= longest
        if len(whole) + max(map(len, mine)) > longest:
            # the prompt first, then each answer
            if len(whole) > longest_prompt:
                size, rest = longest_prompt - len(head), whole[len(head) :]
                expected = head + (rest[len(rest) - size :] if truncation == 'start' else rest[:size])
                cut_prompts += 1
            room = longest - len(expected)
            cut_answers += sum(len(x) > room for x in mine)
            mine = [x if len(x) <= room else [*x[: room - 1], eos] for x in mine]
        assert (p, kept) == (expected, mine)
    if len(found) == full:
        assert (counts['prompts cut'], counts['answers cut']) == (cut_prompts, cut_answers)


@pytest.mark.parametrize('truncation', ['start', 'end'])
@pytest.mark.parametrize('bos', [False, True])
def test_lengths(truncation, bos):
    """A long prompt loses its start or its end, but for BOS; then answers are cut before their end. By every length."""
    tokenizer = make_tokenizer(bos)
    prompt, answers = 'a b c d e', [' 1 2 3', ' 6 7']
    size = max(len(p) + len(a) for p, both in items(tokens(tokenizer, [pair(prompt, *answers)])) for a in both)
    for longest in range(4, size + 2):
        for longest_prompt in range(1, longest - 1):
            check_tokens(tokenizer, prompt, answers, (longest, longest_prompt), truncation, bos=bos)


def test_what_is_joined():
    """Prompt and answers that would be other tokens if they were joined as text; empty prompts; BOS and the end as text."""
    apart = 'Review of the ho', 'tel: the bed', ' was great .<|endoftext|>'
    assert encode(tok, apart[0] + apart[1]) != encode(tok, apart[0]) + encode(tok, apart[1])
    has, adds = make_tokenizer(), make_tokenizer(bos=True)
    has.add_special_tokens({'bos_token': '<s>'})  # has one and does not add it
    for tokenizer, prompts in ((tok, [apart[0], '']), (has, [apart[0], '']), (adds, [apart[0], '', '<s>a prompt'])):
        for prompt in prompts:
            check_tokens(tokenizer, prompt, apart[1:], bos=tokenizer is adds)
    examples = tokens(tok, [pair(*apart)])
    assert examples.good.tolist() == [True] and examples.ids.dtype == np.int32 and examples.uid.dtype == np.uint64
    assert examples.lengths.tolist() == [sum(len(x) for p, a in items(examples) for x in (p, *a))]


TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=30)
TEXT |= st.sampled_from(['<|endoftext|>', 'a<|endoftext|>', '\0', ' '])
SIZES = st.integers(2, 24).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, max(1, n - 2))))
TWO = st.lists(TEXT, min_size=2, max_size=2)
TOKENIZERS = {}


@MANY
@given(TEXT, TWO, SIZES, st.sampled_from(['start', 'end']), st.sampled_from(['pairs', 'singles']), st.booleans())
def test_every_token_is_accounted_for(prompt, answers, limits, truncation, task, bos):
    tokenizer = TOKENIZERS.setdefault(bos, make_tokenizer(bos))
    check_tokens(tokenizer, prompt, answers, limits, truncation, task, bos)


@MANY
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=6), st.sampled_from(['pairs', 'singles', 'sft']))
def test_rows_do_not_touch_each_other(rows, task):
    rows = [pair(f'{i} {prompt}', chosen, rejected) for i, (prompt, chosen, rejected) in enumerate(rows)]
    alone, together = [tokens(tok, [row], task) for row in rows], tokens(tok, rows, task)
    assert items(together) == [item for one in alone for item in items(one)]
    assert together.left_out == sum((one.left_out for one in alone), Counter())
    assert together.good.tolist() == [good for one in alone for good in one.good.tolist()]


def test_equal_answers():
    """Of text, of tokens once they are cut, of chats; for SFT it is a demonstration all the same."""
    rows = [pair('p', ' a', ' a'), pair('p', ' a b c d', ' a b c e'), pair('p', ' a', ' a<|endoftext|>')]
    reason = 'pairs with equal answers'
    assert len(tokens(tok, rows[1:2])) == len(tokens(tok, rows[:1], 'sft')) == 1
    examples = tokens(tok, [*rows, pair('p', ' a', ' b')], max_length=5, max_prompt_length=2)  # ' a b c' of the second
    assert len(examples) == 1 and examples.left_out[reason] == 3
    for task in ('pairs', 'singles'):  # before they are cut
        assert tokens(tok, rows[:1], task).left_out == {reason: 1}
    assert tokens(tok, [pair([user('p')], *[[assistant('a')]] * 2)]).left_out[reason] == 1


@pytest.mark.parametrize('template', [None, BARE])
@pytest.mark.parametrize('empty', ['', ' ', '\n', '<|endoftext|>', [], [assistant('')], [assistant(' ')]])
def test_empty_answers_are_dropped_and_counted(empty, template):
    tokenizer, chat = make_tokenizer(template=template), not isinstance(empty, str)
    full, prompt = ([assistant('a')], [user('p')]) if chat else (' a', 'p')
    pairs = pair(prompt, full, empty), pair(prompt, empty, full)
    for row in (*pairs, {'prompt': prompt, 'response': empty}):
        examples = tokens(tokenizer, [row], 'pairs' if 'chosen' in row else 'sft')
        assert len(examples) == 0 and examples.left_out['empty answers'] == 1
    for row in pairs:  # that answer, or its pair
        examples = tokens(tokenizer, [row, pair(prompt, full, full * 2)], 'singles')
        assert len(examples) in (2, 3) and examples.left_out['empty answers'] == 1
    if empty:  # label.py and reward.py measure it all the same
        _, ids = tokenise.encode(prompt, empty, None, tokenizer, (64, 32, 'start'), Counter())
        assert ids[-1] == tok.eos_token_id and ids.count(tok.eos_token_id) == 1


def test_what_was_left_out_is_a_sentence_and_its_notes_are_notes():
    counts = {'answers cut': 1200, 'empty answers': 0, 'note: texts': 3, 'note: no template': 1}
    assert in_words(Counter(counts)) == ('1,200 answers cut', ['note: texts (3 times)', 'note: no template'])
    assert in_words(Counter()) == ('nothing', [])
    words = {  # of one, of two
        'tie': ('1 tie', '2 ties'), 'empty answers': ('1 empty answer', '2 empty answers'),
        'bad rows: no rows': ('1 bad row: no rows', '2 bad rows: no rows'),
        'same prompt again': ('1 time the same prompt again', '2 times the same prompt again'),
        'pairs with equal answers': ('1 pair with equal answers', '2 pairs with equal answers'),
        'special tokens in a text': ('1 special tokens in a text', '2 special tokens in a text'),
    }  # fmt: skip
    for reason, said in words.items():
        assert tuple(in_words(Counter({reason: n}))[0] for n in (1, 2)) == said


@pytest.mark.parametrize('task, answers', [('pairs', 2), ('singles', 1), ('sft', 1)])
def test_nothing_left_is_no_crash(task, answers):
    for rows in ([], [{'prompt': 'p'}], [pair('p', '', '')]):
        for examples in (tokens(tok, rows, task), tokens(tok, rows, task).select(slice(5))):
            assert examples.spans.shape == (0, 1 + answers, 2) and examples.lengths.sum() == 0


ROWS = [pair('p', ' a', ' b', margin=0.5), pair('q', ' best', ' b')]
ROWS += [{'prompt': 'p', 'response': ' c', 'good': True}, {'prompt': 'p', 'response': ' d', 'good': False}]
ROWS += [{'prompt': 'p', 'response': ' e'}, {'prompt': 'p'}]
ONLY = 'rows with {} only, where {} needs {}'
TAKEN = {  # task -> (answers, good, margins, what is left out) of ROWS
    'pairs': ([' a', ' b', ' best', ' b'], [True] * 2, [0.5, 0.0], {
        ONLY.format('a prompt and a response', 'pairs', 'chosen and rejected'): 1,
        ONLY.format('a prompt and a response', 'pairs', 'chosen and rejected: --loss=kto takes labelled answers'): 2,
        ONLY.format('a prompt', 'pairs', 'chosen and rejected'): 1, 'pairs without a margin, taken as 0': 1}),
    'singles': ([' a', ' b', ' best', ' b', ' c', ' d'], [True, False] * 3, None, {
        ONLY.format('a prompt and a response', 'singles', tokenise.NEEDS['singles']): 1,
        ONLY.format('a prompt', 'singles', tokenise.NEEDS['singles']): 1}),
    'sft': ([' a', ' best', ' c', ' e'], [True] * 4, None, {
        ONLY.format('a prompt', 'sft', 'an answer'): 1, 'bad answers, which are no demonstrations': 1}),
    'prompts': ([' a', ' best', ' c', ' d', ' e', '.'], [True] * 3 + [False] + [True] * 2, None, {}),
}  # fmt: skip


@pytest.mark.parametrize('task', TAKEN)
def test_what_each_task_takes_from_a_row(task):
    """The margin of a pair is kept for pairs alone, and there only where it is asked for."""
    answers, good, margins, left_out = TAKEN[task]
    examples = tokens(tok, ROWS, task, margins=True)
    assert [tok.decode(x[:-1]) for x in answers_of(examples)] == answers and examples.good.tolist() == good
    assert (None if examples.margin is None else examples.margin.tolist()) == margins
    assert dict(examples.left_out) == left_out
    unasked = tokens(tok, ROWS, task)
    assert unasked.margin is None and unasked.left_out['margins, which only reward.py uses'] == (task == 'pairs')


def test_prompts_and_demonstrations_are_taken_once():
    """A prompt is kept whatever its answer; of a chat, too, without which a template can write it."""
    examples = tokens(tok, [{'prompt': 'p', 'response': ' '}, {'prompt': 'p'}, {'prompt': 'q'}], 'prompts')
    assert [tok.decode(p) for p, _ in items(examples)] == ['p', 'q'] and examples.left_out == {'same prompt again': 1}
    asked = {'prompt': [user('one two')]}
    answered = asked | {'response': [assistant('x')]}
    (alone, _), (answered, _) = items(tokens(make_tokenizer(), [asked, answered], 'prompts'))
    assert alone == answered and len(alone) > 1
    rows = [pair('p', ' a', ' b'), pair('p', ' a', ' c'), pair('q', ' a', ' b'), pair('p', ' d', ' b')]
    examples = tokenise.tokenise(rows, tok, 'sft', (64, 32, 'start'), counts := Counter({'tie': 1}))
    assert [tok.decode(a[:-1]) for a in answers_of(examples)] == [' a', ' a', ' d']
    assert examples.left_out == {'same demonstration again': 1} and counts == examples.left_out + Counter({'tie': 1})


def test_uid_is_of_the_text():
    rows = [pair('p', ' a', ' b'), pair('p', ' b', ' a'), pair('q', ' a', ' b')]
    uid = tokens(tok, rows).uid
    assert len(set(uid.tolist())) == 3 and (tokens(tok, rows[::-1]).uid == uid[::-1]).all()
    assert (tokens(tok, rows, max_length=5, max_prompt_length=2).uid == uid).all()
    assert tokens(tok, rows, 'singles').uid.tolist() == np.repeat(uid, 2).tolist()


# ---- the cache of tokens ----

CHAT = pair([user('hi'), assistant('hello'), user('bye')], [assistant('good bye')], [assistant('no')])


@pytest.fixture
def write(tmp_path):
    """write(rows or number of pairs, name='d') -> the path of a file of them."""

    def write(rows, name='d'):
        return write_jsonl(tmp_path / f'{name}.jsonl', many_pairs(rows) if isinstance(rows, int) else rows)

    return write


def load(source, tokenizer=tok, split='train', task='pairs', **options):
    common = {'max_length': 64, 'max_prompt_length': 32, 'undivided': True}
    return tokenise.load_examples(source, split, tokenizer, task, **common | options)


def same(a, b):
    arrays = [(getattr(a, k), getattr(b, k)) for k in ('ids', 'spans', 'good', 'uid')]
    return a.left_out == b.left_out and all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in arrays)


@pytest.fixture
def count(monkeypatch):
    """A list that grows whenever rows are tokenised."""
    calls, original = [], tokenise.tokenise_splits
    monkeypatch.setattr(tokenise, 'tokenise_splits', lambda *args, **how: calls.append(1) or original(*args, **how))
    return calls


@pytest.mark.parametrize(('task', 'chat'), [('pairs', False), ('pairs', True), ('singles', False), ('sft', True)])
def test_a_second_load_reads_the_cache(write, count, cache, task, chat):
    source = write([CHAT] if chat else [*many_pairs(20), pair('p', '', '')])
    tokenizer, other = make_tokenizer(), make_tokenizer()
    first, second = load(source, tokenizer, task=task), load(source, other, task=task)
    assert len(count) == 1 and len(first) and same(first, second)
    assert first.left_out and isinstance(second.left_out, Counter)
    # what is exported must not depend on the cache
    assert tokenizer.chat_template == other.chat_template and bool(other.chat_template) == chat
    assert same(load(source, tokenizer, task=task, cache=False), first) and len(count) == 2
    assert [file.name[:7] for file in cache.iterdir()] == ['tokens-']


def test_what_makes_another_cache_file(write, count, cache, monkeypatch):
    source, tokenizer = write(20), make_tokenizer()
    load(source, tokenizer)
    changes = [{'max_length': 63}, {'max_prompt_length': 31}, {'truncation': 'end'}, {'task': 'sft'}, {'task': 'singles'},
               {'split': 'test'}, {'undivided': False, 'split': 'test'}, {'skip_bad_rows': True}, {'num_turns': 2},
               {'margins': True}, {'last_turn_only': True}, {'chat': True}, {'system': 's'},
               {'tokenizer': make_tokenizer(bos=True)}, {'tokenizer': make_tokenizer(template=BARE)},
               {'source': f'{source}+{source}'}, {'source': write(10, 'e')}]  # fmt: skip
    for number, changed in enumerate(changes, 2):
        load(**({'source': source, 'tokenizer': tokenizer} | changed))
        tokenizer.chat_template = None  # which a chat sets
        assert len(count) == number == len(list(cache.iterdir())), changed
    load(source, tokenizer, data_fraction=0.5, seed=3)  # is taken from the whole
    assert len(count) == len(changes) + 1
    write(10)
    assert len(load(source, tokenizer)) == 10
    # a reader of rows, or this code, which somebody has changed since
    monkeypatch.setattr(tokenise, 'file_hash', lambda path: 'changed' if path.name == 'sources.py' else file_hash(path))
    load(source, tokenizer)
    assert len(count) == len(changes) + 3


DAMAGES = [lambda b: b[: len(b) // 2], lambda b: b'', lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]]


@pytest.mark.parametrize('damage', DAMAGES, ids=['half', 'nothing', 'one bit'])
def test_a_damaged_cache_file_is_rebuilt(write, count, cache, damage, capsys):
    source = write(20)
    first = copy.deepcopy(load(source))
    (file,) = cache.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert same(load(source), first) and len(count) == 2
    assert 'is damaged: tokenising anew' in capsys.readouterr().out
    assert [file.read_bytes() for file in cache.iterdir()] == [content]


def test_a_cache_that_cannot_be_written_is_a_note(write, cache, monkeypatch, capsys):
    source = write(20)
    first = load(source)
    (file,) = cache.iterdir()
    file.unlink()
    monkeypatch.setattr(uuid, 'uuid4', lambda: types.SimpleNamespace(hex='new'))
    file.with_suffix('.new').mkdir()  # where it would be written first
    for folder in (cache, source):  # the second is a file
        monkeypatch.setenv('NANOPREF_CACHE', str(folder))
        assert same(load(source), first)
        out = capsys.readouterr().out
        assert out.startswith('note: ') and 'not cached' in out and out.count('\n') == 1


def test_rows_of_the_hub_are_cached_by_their_content(cache, count, monkeypatch):
    monkeypatch.setattr(sources.files, 'hub_files', lambda *_, **__: ({'train': [], 'test': []}, 'c'))
    for rows, tokenised in ((3, 1), (3, 1), (4, 2)):
        monkeypatch.setattr(sources, 'read_rows', lambda *_, n=rows, **__: map(sources.Row, many_pairs(n)))
        assert len(load('owner/name')) == rows and len(count) == tokenised


# ---- one reading for both parts, and for no more than is needed ----


@pytest.fixture
def reads(monkeypatch):
    """A list that grows by each row that is read; a chunk is of 30 rows."""
    rows, read = [], sources.read_rows
    monkeypatch.setattr(tokenise, 'CHUNK', 30)
    monkeypatch.setattr(sources, 'read_rows', lambda *args, **how: (rows.append(x) or x for x in read(*args, **how)))
    return rows


def parts(source, **options):
    """The Examples of the train and the test part of a file."""
    return [load(source, split=split, undivided=False, **options) for split in ('train', 'test')]


def test_both_parts_are_of_one_reading(write, reads):
    source = write(400)
    alone = parts(source, cache=False)
    assert len(reads) == 800 and 0 < len(alone[1]) < 40
    for _ in range(2):  # the second time from the cache
        assert all(map(same, parts(source), alone)) and len(reads) == 1200
    assert not parts(source)[0].ids.flags.owndata


@pytest.mark.parametrize('all_first', [False, True])
def test_a_few_examples_are_the_first_and_need_few_rows(write, reads, all_first):
    source, enough = write(400), {'train': 50, 'test': 2}
    train, test = parts(source, cache=all_first)
    before = len(reads)
    for _ in range(2):
        assert list(map(items, parts(source, enough=enough))) == [items(train)[:50], items(test)[:2]]
    assert len(reads) == before if all_first else len(reads) - before <= 180
    del reads[:]  # three chunks are enough, and the next one is read meanwhile
    assert len(load(source, enough={'train': 90}, cache=False)) == 90 and len(reads) == 120
    assert len(load(source, enough={'train': None}, cache=False)) == 400
    # what was cached of the first is not taken for all
    assert len(parts(source)[0]) > 300


def test_what_a_stopped_reading_left_out_is_counted(write, reads, capsys):
    tie, *rows = [{'prompt': f'{i}', 'responses': [' a', ' b'], 'scores': [0, min(i, 1)]} for i in range(400)]
    source, options = write([tie, *rows]), {'undivided': False, 'cache': False, 'enough': {'train': 50, 'test': 2}}
    found = load(source, split='train', **options)
    assert len(found) == 50 and found.left_out['tie'] == 1 and len(reads) < 300
    assert capsys.readouterr().out == 'note: the first 50 training examples are enough: the others are not read\n'
    assert len(load(source, split='test', **options)) == 2 and not capsys.readouterr().out


# ---- what is loaded ----


def test_load_examples(write):
    """Several sources; what was left out in reading and in tokenising; a fraction, by a hash of its own."""
    a, b = write([*many_pairs(20), pair('p', '', ' a')], 'a'), write([pair('x', ' y', ' z'), pair('p', ' a', '')], 'b')
    both = load(f'{a}+{b}')
    assert len(both) == 21 and both.left_out == {'empty answers': 2} and tok.decode(both[20][0]) == 'x'
    mixed = write([{'prompt': 'p'}, pair('p', ' a', ' b'), {'chosen': 'a'}, pair('p', ' a', '')], 'm')
    left_out = {"bad rows: 'rejected' is missing or of the wrong type": 1, 'empty answers': 1}
    left_out[ONLY.format('a prompt', 'pairs', 'chosen and rejected')] = 1
    assert load(mixed, skip_bad_rows=True).left_out == left_out

    source = write(2000)
    kept = {f: set(load(source, data_fraction=f).uid.tolist()) for f in (0.2, 0.5, 1.0)}
    assert kept[0.2] < kept[0.5] < kept[1.0] == set(load(source).uid.tolist())
    assert 300 < len(kept[0.2]) < 500 and 900 < len(kept[0.5]) < 1100
    assert set(load(source, data_fraction=0.5, seed=1).uid.tolist()) != kept[0.5]
    assert load(source, data_fraction=0.2).left_out['examples not drawn, by data_fraction'] == 2000 - len(kept[0.2])
    some = load(source, data_fraction=0.5)
    assert 150 < some.flip(0.2, 0).left_out['labels flipped'] < 250  # a fifth of what is kept, not of the low hashes


VANISHING = [  # rows of which nothing is left, and what is said
    ([{'ask': 'q', 'chosen': 'a', 'rejected': 'b'}] * 5, '5 bad rows'),
    ([pair(f'p{i}', ' a', ' a') for i in range(5)], '5 pairs with equal answers'),
    ([{'prompt': 'p'}] * 5, '5 rows with a prompt only, where pairs needs chosen and rejected'),
    ([pair(f'p{i}', ' a', '') for i in range(5)], '5 empty answers'),
    ([], 'left out: nothing'),
]  # fmt: skip


@pytest.mark.parametrize('rows, words', VANISHING)
def test_every_source_must_give_something(write, rows, words):
    """Else half of the data is gone and nobody has seen it. Nothing held out of a file is no mistake, from the cache neither."""
    good, bad = write(5, 'good'), write(rows, 'bad')
    for source, split in ((f'{good}+{bad}', 'train'), (f'{bad}+{good}', 'train'), (bad, 'train'), (bad, 'test')):
        with pytest.raises(UserError, match=rf'no {split} examples are left in data .*bad\.jsonl.*{words}.*README'):
            load(source, split=split, skip_bad_rows=True)
    for _ in range(2):
        assert len(load(bad, split='test', undivided=False, skip_bad_rows=True)) == 0
    with pytest.raises(UserError, match='no train examples are left: raise data_fraction'):
        load(good, data_fraction=0.0)
    # of which the tokens are equal once they are cut
    cut, lengths = write([pair('p', ' a b c d', ' a b c e')], 'cut'), {'max_length': 5, 'max_prompt_length': 2}
    with pytest.raises(
        UserError, match='no train examples are left in data .*: 2 answers cut, 1 pair with equal answers'
    ):
        load(cut, **lengths)
    assert len(load(cut, split='test', **lengths)) == 0


def test_which_prompts_are_held_out(write):
    """Those whose hash is a multiple of 20, today and in older versions; of messages only role and content count."""
    texts, chats = [f'prompt {i}' for i in range(200)], [[user(f'chat {i}')] for i in range(200)]
    rows = [pair(text, ' a', ' b') for text in texts]
    file = write(rows + [pair([chat | {'name': 'x'}], [assistant('a')], [assistant('b')]) for (chat,) in chats])
    held_out = [prompt for prompt in texts + chats if sources.content_hash(prompt) % 20 == 0]
    for split, expected in (('test', held_out), ('train', [x for x in texts + chats if x not in held_out])):
        found = [row['prompt'] for row in sources.load_rows(file, split)[0]]
        found = [x if isinstance(x, str) else [user(x[0]['content'])] for x in found]
        assert found == expected and len(found) > 5
    # a small file may have nothing held out
    small = write(1)
    there = [split for split in ('train', 'test') if sources.load_rows(small, split)[0]]
    assert len(there) == 1 and len(load(small, split='test', undivided=False)) == (there == ['test'])


def test_what_is_not_asked_for_is_not_done(write, cache):
    """Texts stay texts, margins are left out, a part is held out, every answer of a conversation is trained on, it is cached."""
    rows, turns = [row | {'margin': 2} for row in many_pairs(400)], [*CHAT['prompt'], *CHAT['chosen']]
    limits = {'max_length': 64, 'max_prompt_length': 32}
    plain = tokenise.load_examples(write(rows), 'train', tok, 'pairs', **limits)
    assert plain.margin is None and 350 < len(plain) < 400 and len(list(cache.iterdir())) == 2
    assert plain.left_out == {'margins, which only reward.py uses': len(plain)}
    assert tok.decode(plain[0][0]) == 'prompt 0'
    chats = load(write([{'messages': turns}]), make_tokenizer(), task='sft')
    assert (chats[0][1][0] < 0).any()
    assert len(load(write(2), transformers.ByT5Tokenizer())) == 2
    with pytest.raises(UserError, match='line 401'):
        tokenise.load_examples(write([*rows, {'chosen': 1}]), 'train', tok, 'pairs', **limits)


@pytest.mark.parametrize('chat, system, task', [(False, None, 'pairs'), (True, None, 'pairs'), (False, 's', 'pairs'), (False, None, 'singles')])  # fmt: skip
def test_the_rows_behind_examples(write, chat, system, task):
    """By uid: the prompt as it was tokenised, and the row with all its columns, of equal rows the first."""
    rows = [pair(f'p{i}', ' a', f' b{i}', extra=n) for n, i in enumerate((0, 1, 1, 2, 0))]
    source, read_args = write([*rows, {'prompt': 'p'}]), {'num_turns': 1, 'skip_bad_rows': False, 'columns': None}
    examples = load(source, make_tokenizer(), task=task, chat=chat, system=system)
    source = write([*rows, *many_pairs(100), {'chosen': 1}])  # whose last rows are not needed
    found = tokenise.source_rows(examples, source, 'train', task, chat=chat, system=system, undivided=True, **read_args)
    turns = [{'role': 'system', 'content': system}] * bool(system)
    prompts = [[*turns, user(f'p{i}')] if turns or chat else f'p{i}' for i in range(3)]
    behind = [found[uid] for uid in dict.fromkeys(examples.uid.tolist())]
    assert behind == list(zip(prompts, rows[:2] + rows[3:4], strict=True))


# ---- noise and selection ----


def labels(examples):
    """{(uid, where the answer begins): whether it is good}."""
    answers = zip(examples.uid.tolist(), examples.spans[:, 1, 0].tolist(), strict=True)
    return dict(zip(answers, examples.good.tolist(), strict=True))


def flipped(examples, rate, seed=0):
    """The uids of what flip changes; checks that nothing else changes, and that it is counted."""
    after, before = examples.flip(rate, seed), examples.spans
    changed, swapped = after.good != examples.good, before
    if before.shape[1] == 3:
        changed, swapped = (after.spans != before).any((1, 2)), before[:, [0, 2, 1]]
        assert (after.good == examples.good).all()
    assert (after.spans == np.where(changed[:, None, None], swapped, before)).all()
    assert (after.uid == examples.uid).all()
    assert after.left_out - examples.left_out == +Counter({'labels flipped': int(changed.sum())})
    return set(examples.uid[changed].tolist())


def test_flips():
    rows = many_pairs(1000)
    examples = tokens(tok, rows)
    before, uid = items(examples), examples.uid.tolist()
    sets = {rate: flipped(examples, rate) for rate in (0.0, 0.1, 0.2, 0.5, 1.0)}
    assert set() == sets[0.0] < sets[0.1] < sets[0.2] < sets[0.5] < sets[1.0] == set(uid)
    assert all(abs(len(sets[rate]) / 1000 - rate) < 0.05 for rate in sets)
    # cached log-probs go with their answers
    examples.ref = np.stack([np.arange(1000), -np.arange(1000)], 1)
    assert (examples.flip(1.0, 0).ref == -examples.ref).all() and (examples.flip(0.0, 0).ref == examples.ref).all()
    # the flipped are a copy
    assert items(examples) == before and items(examples.flip(1.0, 0)) == [(p, [b, a]) for p, (a, b) in before]
    # neither the order matters, nor what else is there; both answers of a pair flip, or none
    assert flipped(tokens(tok, rows[::-1]), 0.2) == sets[0.2] == flipped(tokens(tok, rows, 'singles'), 0.2)
    assert flipped(examples.select(np.arange(0, 1000, 7)), 0.2) == sets[0.2] & set(uid[::7])
    assert flipped(examples, 0.2, seed=1) != sets[0.2]


def test_uniform_hash():
    uid = np.arange(20000, dtype=np.uint64)
    u, other = uniform_hash(uid, 0), uniform_hash(uid, 1)
    assert 0 <= u.min() and u.max() < 1 and np.abs(np.histogram(u, 10, (0, 1))[0] - 2000).max() < 200
    assert abs(np.corrcoef(u, other)[0, 1]) < 0.03 and abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
    assert u[1] == pytest.approx(0.5665616, abs=1e-6)  # the same always


def test_keep():
    examples = tokens(tok, many_pairs(1000), 'singles')
    shares = (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.6), (0.5, 0.5), (0.2, 0.2)
    found = {both: examples.keep(*both, seed=0) for both in shares}
    for (good, bad), kept in found.items():
        assert labels(kept).items() <= labels(examples).items()
        assert abs(kept.good.sum() - 1000 * good) < 50 and abs((~kept.good).sum() - 1000 * bad) < 50
    kept, less, other = labels(found[0.5, 0.5]), labels(found[0.2, 0.2]), labels(examples.keep(0.5, 0.5, seed=1))
    assert less.items() < kept.items() and kept != other
    assert (len(kept), len(less), len(other)) == (974, 391, 982)  # the same always
    good, bad = ({uid for (uid, _), is_good in kept.items() if is_good == thumb} for thumb in (True, False))
    assert good != bad  # the two answers of a pair are drawn apart


# two answers each to the prompts p, q, p, r: examples 0 to 7. `few` has one prompt, q, with the answers x and y
FEW, SET = (Examples.of([([ord(p)], [[ord(a)]]) for p, a in zip(prompts, answers, strict=True)])
            for prompts, answers in (('qq', 'xy'), ('ppqqpprr', 'abcdefgh')))  # fmt: skip
MISMATCHED = [  # set, rows of the step, the other set, answers that are taken
    (SET, range(8), SET, 'ccee' 'ggaa'),
    (SET, [5, 0, 1, 4, 2], SET, 'cccc' 'f'),
    (SET, [0, 2], SET, 'ca'),
    (SET, [2, 6], SET, 'gc'),
    (SET, [3], SET, 'e'),  # the last step of an epoch may be of one example: the next one of the set
    (SET, [7], SET, 'a'),
    (SET, [0, 1, 4], SET, 'ccg'),  # or of one prompt
    (SET, [2, 2], SET, 'ee'),  # or, where two epochs meet, of an example and itself
    (FEW, [0, 1], SET, 'aa'),  # held-out examples of one prompt, beside the training set
    (FEW, [1], FEW.select(slice(1, 2)), 'x'),  # one prompt everywhere: another answer of this set
    (FEW.select(slice(1)), [0], FEW, 'x'),  # one example, beside a set of the same prompt
]  # fmt: skip


@pytest.mark.parametrize('examples, rows, more, answers', MISMATCHED)
def test_mismatched(examples, rows, more, answers):
    """Of the next example of the step with another prompt; else of the set; else of the other set; else of any."""
    mixed = items(examples.mismatched(np.array(rows), 512, more))
    assert [prompt for prompt, _ in mixed] == [examples[i][0].tolist() for i in rows]
    assert ''.join(chr(answer[0]) for _, (answer,) in mixed) == answers


def test_a_mismatched_answer_is_cut_to_the_length_of_an_example():
    examples = Examples.of([(list(range(10)), [[20, 21]]), ([1], [list(range(30, 41))]), (list(range(50, 62)), [[7]])])
    assert examples.uid.tolist() == [0, 1, 2]
    assert examples.longest() == 13 and examples.longest(mixed=True) == 12 + 11 and examples.longest_prompt() == 12
    mixed = items(examples.mismatched(np.arange(3), 12, examples))
    assert mixed == [(list(range(10)), [[30, 31]]), ([1], [[7]]), (list(range(50, 62)), [[20]])]  # one token at least
    assert examples.spans[1, 1].tolist() == [13, 24]  # which the cut has left as it was
    none = Examples.of([([1], [[2]])]).select(slice(0))
    assert none.longest(mixed=True) == none.longest() == none.longest_prompt() == 0
    assert len({none, none.select(slice(0))}) == 2  # each is itself, whatever it holds


def test_the_hash_of_examples():
    """Tokens, their borders and order, labels and margins count; what is not selected does not."""
    some = Examples.of([([1, 2], [[3], [4, 5]]), ([6], [[7], [8]]), ([9], [[1], [2]])])
    same = Examples.of([([1, 2], [[3], [4, 5]]), ([6], [[7], [8]])])
    two = some.select(slice(2))
    assert two.content() == same.content()
    margin = Examples(two.ids, two.spans, two.good, two.uid, two.left_out, margin=np.ones(2, np.float32))
    changed = Examples(two.ids, two.spans, ~two.good, two.uid, two.left_out)
    moved = Examples.of([([1], [[2, 3], [4, 5]]), ([6], [[7], [8]])])
    others = [some, some.select(np.array([1, 0])), two.flip(1.1, 0), margin, two.first_answers(), moved, changed]
    others.append(Examples.of([([1, 2], [[3], [4, 0]]), ([6], [[7], [8]])]))
    assert len({two.content(), *(x.content() for x in others)}) == len(others) + 1
    assert some.select(slice(0)).content() == some.select(slice(0)).content()
    # wherever in ids the tokens are
    chosen = [([9], [[1], [2]]), ([6], [[7], [8]]), ([6], [[7], [8]]), ([9], [[1], [2]])]
    assert some.select(np.array([2, 1, 1, 2])).content() == Examples.of(chosen).content()
    swapped = [(prompt, answers[::-1]) for prompt, answers in chosen]
    assert Examples.of(chosen).flip(1.1, 0).content() == Examples.of(swapped).content()


# ---- what scripts train on ----


@pytest.fixture
def train(tmp_path, write):
    """train(script, number of pairs, *flags) -> its Run, of which the same pairs are held out."""

    def train(script, rows, *flags, out='run'):
        common = ['--n_examples=2', '--batch_size=2', '--n_eval_examples=8', '--do_first_eval=false']
        files = [f'--data={write(rows)}', f'--eval_data={write(rows)}', f'--out_dir={tmp_path / out}']
        return run_script(script, *common, *files, *flags)['run']

    return train


def test_scripts_flip_training_examples_alone(train, capsys):
    pairs, clean = tokens(tok, many_pairs(60)), items(tokens(tok, many_pairs(60)))
    run = train('dpo.py', 60, '--noise_rate=1', out='all')
    assert items(run.train) == [(p, [b, a]) for p, (a, b) in clean] and items(run.held_out) == clean[:8]
    assert '60 labels flipped' in capsys.readouterr().out
    run = train('dpo.py', 60, '--noise_rate=0.2', '--seed=3', out='part')
    assert items(run.train) == items(pairs.flip(0.2, 3)) and items(run.held_out) == clean[:8]
    assert torch.initial_seed() == 3 * 1_000_003  # of dropout
    run = train('sft.py', 60, '--noise_rate=1', out='sft')
    assert items(run.train) == [(p, [b]) for p, (_, b) in clean]
    assert items(run.held_out) == [(p, [a]) for p, (a, _) in clean[:8]]
    run = train('dpo.py', 60, '--loss=kto', '--noise_rate=1', out='kto')
    assert run.train.good.tolist() == [False, True] * 60 and run.held_out.good.tolist() == [True, False] * 4
    assert '120 labels flipped' in capsys.readouterr().out
    run = train('dpo.py', 60, '--loss=kto', '--frac_good=0', '--frac_bad=0.5', out='kept')
    assert not run.train.good.any() and 15 < len(run.train) < 45 and len(run.held_out) == 8
    assert f'{120 - len(run.train)} examples not drawn, by frac_good or frac_bad' in capsys.readouterr().out


def test_several_sources_all_take_part(tmp_path, monkeypatch):
    """In training, however few examples are enough, and in evaluation."""
    monkeypatch.setattr(training, 'ENOUGH', 40)
    files = [write_jsonl(tmp_path / f'{p}.jsonl', [pair(f'{p} {i}', ' a', ' b') for i in range(60)]) for p in 'pq']
    sizes = '--model=toy --n_examples=4 --batch_size=4 --n_eval_examples=8 --warmup_steps=0'.split()
    of_p = load(files[0], toy.tokenizer()).uid
    for source, n_train in ((str(files[0]), 40), (f'{files[0]}+{files[1]}', 120)):
        where = f'--data={source}', f'--eval_data={source}', f'--out_dir={tmp_path}/{n_train}'
        run = run_script('dpo.py', *sizes, *where)['run']
        assert len(run.train) == n_train
        shares = [np.isin(examples.uid, of_p).mean() for examples in (run.train, run.held_out)]
        assert shares == [1, 1] if n_train == 40 else shares[0] == 0.5 and 0 < shares[1] < 1


@pytest.mark.parametrize(('n_examples', 'n_eval'), [(3, 1), (4, 2), (5, 3)])
def test_kto_is_never_compared_with_the_own_answer(train, tmp_path, n_examples, n_eval):
    """Its own answer would make the loss of a single example 0.5 whatever the model has learned; here z is of another one."""
    sizes = f'--n_examples={n_examples}', f'--n_eval_examples={n_eval}'
    run = train('dpo.py', 6, '--loss=kto', '--beta=1', '--lr=1e-2', '--warmup_steps=0', *sizes)
    last = list(data.steps(len(run.train), 2, n_examples, 0))[-1][1]
    for examples, rows in ((run.train, last), (run.held_out, np.arange(n_eval))):
        mixed = items(examples.mismatched(rows, 512, run.train))
        assert [prompt for prompt, _ in mixed] == [items(examples)[i][0] for i in rows]
        assert not any(one in items(run.train) for one in mixed)  # an answer to another prompt
    counted = [row['counters/examples'] for row in metrics(tmp_path / 'run', 'train')]
    assert counted == [*range(2, n_examples, 2), n_examples]
    for row in metrics(tmp_path / 'run'):
        value = row[f'loss/{"eval" if row["split"] == "eval" else "train"}']
        moved = row['counters/examples'] > 2  # before the first step policy and reference agree
        assert math.isfinite(value) and (not moved or abs(value - 0.5) > 1e-4), row


# ---- steps ----

RANGES = {'n': (1, 30), 'batch_size': (1, 40), 'total': (1, 100), 'seed': (0, 9)}
STEPS = st.fixed_dictionaries({name: st.integers(*ends) for name, ends in RANGES.items()})


@MANY
@given(STEPS, st.integers(0, 5))
def test_steps(args, skip):
    n, batch_size, total = args['n'], args['batch_size'], args['total']
    plan = [(first, rows.tolist()) for first, rows in data.steps(**args)]
    assert [first for first, _ in plan] == list(range(0, total, batch_size))
    assert [len(rows) for _, rows in plan] == [min(batch_size, total - first) for first, _ in plan]
    order = sum((rows for _, rows in plan), [])
    epochs = [order[i : i + n] for i in range(0, total, n)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)  # without replacement
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs if len(epoch) == n)
    # resumed: the same steps; an example's place is its count's alone
    resumed = data.steps(**args, start=skip * batch_size)
    assert [(first, rows.tolist()) for first, rows in resumed] == plan[skip:]
    longer = data.steps(**args | {'total': total + 50, 'batch_size': 1})
    assert [rows[0] for _, rows in longer][:total] == order
    other = [rows.tolist() for _, rows in data.steps(**args | {'seed': args['seed'] + 1})]
    assert n < 8 or total < 2 * n or (other != [rows for _, rows in plan] and epochs[0] != epochs[1])
    straight = data.steps(**args, shuffle=False)
    assert np.concatenate([rows for _, rows in straight]).tolist() == [i % n for i in range(total)]


# ---- plans ----


@pytest.mark.parametrize('plan', [data.plan, data.plan_padded])
@MANY
@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 200))
def test_plan(plan, lengths, world, max_tokens):
    """Every example once, as many microbatches a rank, none of more than max_tokens unless it is one example."""
    plans = plan(np.array(lengths), world, max_tokens)
    assert plans == plan(lengths, world, max_tokens)
    assert len(plans) == world and len({len(mine) for mine in plans}) == 1 and plans[0]
    batches = [batch for mine in plans for batch in mine]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        used = sum(sizes) if plan is data.plan else len(batch) * max(sizes, default=0)
        assert batch == sorted(batch) and (len(batch) <= 1 or used <= max_tokens)
    if plan is data.plan:
        assert len(plans[0]) <= -(-len(lengths) // world)  # no more than one example each
    else:
        assert sum(not batch for batch in batches) < world


PLANS = [  # plan, lengths, ranks, max_tokens, what comes out
    (data.plan, [5, 5], 1, 10, [[[0, 1]]]),
    (data.plan, [5, 6], 1, 10, [[[1], [0]]]),
    (data.plan, [50], 2, 10, [[[0]], [[]]]),
    (data.plan, [1, 1, 1], 4, 1, [[[0]], [[1]], [[2]], [[]]]),  # equal ones in their order
    (data.plan, [1, 2, 1], 2, 2, [[[1]], [[0, 2]]]),
    (data.plan, [3, 3, 2, 2, 2], 1, 6, [[[0, 4], [2, 3], [1]]]),  # longest first makes 7 and 5 of two
    (data.plan, [50, 40, 20, 10], 2, 50, [[[0], [2]], [[1], [3]]]),  # dealt in turn
    (data.plan_padded, [9, 2, 10, 2, 2, 2], 1, 20, [[[0, 2], [1, 3, 4, 5]]]),  # similar widths side by side
    (data.plan_padded, [4] * 8, 4, 1000, [[[0, 1]], [[4, 5]], [[2, 3]], [[6, 7]]]),
    (data.plan_padded, [4] * 3, 2, 1000, [[[1, 2]], [[0]]]),
    (data.plan_padded, [4], 2, 1000, [[[0]], [[]]]),
]  # fmt: skip


@pytest.mark.parametrize('plan, lengths, world, max_tokens, expected', PLANS)
def test_plan_by_hand(plan, lengths, world, max_tokens, expected):
    assert plan(lengths, world, max_tokens) == expected


@pytest.mark.parametrize('world', [1, 2, 4])
def test_plans_are_balanced_and_no_longer_than_need_be(world):
    lengths = np.random.default_rng(0).integers(20, 200, 256)
    plans = data.plan(lengths, world, 2048)
    loads = [sum(lengths[i] for batch in mine for i in batch) for mine in plans]
    assert max(loads) - min(loads) < 0.02 * sum(loads) / world + 50
    assert len(plans[0]) <= -(-lengths.sum() // (world * 2048)) + 1


# ---- packing ----

IDS = st.lists(st.integers(1, 99), min_size=1, max_size=6)
ONE_OR_TWO = st.integers(1, 2).map(lambda n: st.lists(IDS, min_size=n, max_size=n))
GROUPS = ONE_OR_TWO.flatmap(lambda answers: st.lists(st.tuples(IDS, answers), min_size=1, max_size=12))
LAYOUTS = [{'share_prefix': True}, {'share_prefix': False}, {'pad': True}]


def packed(groups, **options):
    return data.pack(Examples.of(groups), list(range(len(groups))), **options)


def read_back(batch):
    """[(tokens before the first, the answer's tokens)] of every answer, as predict_at, target, answer and offset say."""
    flat, out = batch.ids.flatten().tolist(), []
    for number, n in enumerate(batch.n.tolist()):
        mine = (batch.answer == number).nonzero().flatten()
        assert batch.offset[mine].tolist() == list(range(n))
        target, index = batch.target[mine].tolist(), batch.predict_at[mine].tolist()
        assert [flat[i] for i in index[1:]] == target[:-1]  # the token before each is the one before
        assert index[1:] == [index[1] + i for i in range(n - 1)]
        assert flat[batch.last[number]] == target[-1]
        out.append((flat[index[0]], target))
    return out


def last_and_answers(groups):
    """What read_back should give of (prompt, answers) groups."""
    return [(prompt[-1], answer) for prompt, answers in groups for answer in answers]


@MANY
@given(GROUPS, st.sampled_from(LAYOUTS))
def test_pack(groups, layout):
    batch = packed(groups, **layout)
    flat = [(p, a) for p, answers in groups for a in answers]
    assert read_back(batch) == last_and_answers(groups) and batch.slot == list(range(len(groups)))
    assert batch.n.tolist() == [len(a) for _, a in flat] and len(batch.target) == batch.n.sum()
    assert batch.real.tolist() == [True] * len(groups)
    if 'pad' in layout:
        width = max(len(p) + len(a) for p, a in flat)
        assert batch.ids.tolist() == [p + a + [0] * (width - len(p) - len(a)) for p, a in flat]
        assert batch.mask.tolist() == [[int(i < len(p) + len(a)) for i in range(width)] for p, a in flat]
        assert batch.position is None and not batch.groups
        return
    units = groups if layout['share_prefix'] else [(p, [a]) for p, a in flat]
    ids, position, ends = [], [], []
    for p, answers in units:
        ends += [len(ids) + len(p) - 1] * len(answers)  # the first token follows this prompt, no other
        ids += [x for part in (p, *answers) for x in part]
        position += [*range(len(p)), *(len(p) + i for a in answers for i in range(len(a)))]
    assert batch.ids.tolist() == [ids] and batch.position.tolist() == [position]
    assert batch.groups == [(len(p), tuple(map(len, answers))) for p, answers in units] and batch.mask is None
    assert batch.predict_at[batch.offset == 0].tolist() == ends


@MANY
@given(GROUPS, st.sampled_from([None, 1, 2, 5]), st.sampled_from([0, 30, 10_000]))
def test_blocks(groups, window, small):
    """Bundles cut the row into its groups; a mask lets a token see its prompt and its own answer so far."""
    before = attention.MAX_BUNDLE_TOKENS
    attention.MAX_BUNDLE_TOKENS = small
    batch = packed(groups)
    bundles = batch.bundles
    attention.MAX_BUNDLE_TOKENS = before
    assert [group for bundle in bundles for group in bundle.groups] == batch.groups
    for bundle in bundles:
        tokens = sum(prompt + sum(answers) for prompt, answers in bundle.groups)
        assert sum(bundle.sizes) == tokens and (tokens <= small or len(bundle.groups) == 1)
        # (group, answer, position) of every token; answer None: the prompt
        names = []
        for g, (prompt, answers) in enumerate(bundle.groups):
            names += [(g, None, i) for i in range(prompt)]
            names += [(g, a, prompt + i) for a, n in enumerate(answers) for i in range(n)]
        for (g, a, i), row in zip(names, bundle.mask(window, 'cpu').tolist(), strict=True):
            seen = [(h, b, j) for (h, b, j), sees in zip(names, row, strict=True) if sees]
            assert seen == [x for x in names if x[0] == g and x[1] in (None, a) and i - (window or 10**6) < x[2] <= i]
        # a device map has layers elsewhere, which ask for the same mask
        assert bundle.mask(window, 'meta').device.type == 'meta'
        assert bundle.mask(window, 'cpu') is bundle.mask(window, 'cpu')  # all layers have one


@MANY
@given(GROUPS, st.randoms())
def test_batch_sum(groups, random):
    batch = packed(groups)
    values = torch.tensor([random.uniform(-9, 9) for _ in batch.target], requires_grad=True)
    sums = batch.sum(values)
    assert sums.shape == batch.n.shape and sums.dtype == values.dtype
    expected = torch.stack([values[batch.answer == i].double().sum() for i in range(len(sums))])
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=1e-4)
    (sums * torch.arange(1.0, len(sums) + 1)).sum().backward()
    assert values.grad.tolist() == (batch.answer + 1.0).tolist()


@MANY
@given(GROUPS, st.sampled_from([1, 2, 3, 5]), st.integers(1, 60), st.sampled_from(LAYOUTS), st.booleans(), st.randoms())
def test_ranks_share_a_step_out(groups, world, max_tokens, layout, cached, random):
    """All examples once, as many microbatches on every rank, every answer token predicted once, nothing else; and counts."""
    examples = Examples.of(groups)
    if cached:
        examples.ref = np.array([[answer[0] for answer in answers] for _, answers in groups], np.float32)
    rows = np.array(random.sample(range(len(groups)), len(groups)))
    ranks = [data.make_batches(examples, rows, rank, world, max_tokens, **layout) for rank in range(world)]
    assert len({(len(batches), *rest) for batches, *rest in ranks}) == 1
    counted = [batch for batches, *_ in ranks for batch in batches if batch.slot != [-1]]
    assert sorted(slot for batch in counted for slot in batch.slot) == list(range(len(groups)))
    for batch in counted:
        mine = [groups[rows[slot]] for slot in batch.slot]
        assert read_back(batch) == last_and_answers(mine)
        assert len(batch.slot) == 1 or batch.ids.numel() <= max_tokens
        assert not cached or batch.ref.tolist() == [answer[0] for _, answers in mine for answer in answers]
    # tokens, and tokens with padding
    _, real, allocated = ranks[0]
    separate = sum(len(p) + len(a) for p, answers in groups for a in answers)
    assert real == (int(examples.lengths.sum()) if layout.get('share_prefix') else separate)
    assert allocated == sum(batch.ids.numel() for batch in counted) >= real and ('pad' in layout or allocated == real)


def test_two_layouts():
    groups = [([1, 2], [[3], [4]]), ([5], [[6] * 40, [7]]), ([8], [[9], [1]])]
    packed, padded = probe.two_layouts(Examples.of(groups), 'cpu')
    assert read_back(packed) == read_back(padded) == last_and_answers(groups[:2])
    assert packed.mask is None and padded.mask is not None
    assert data.pack([], []).n.tolist() == [1, 1]  # what stands in for a pair, and has a reference of the same type
    one = Examples.of(groups[:1])
    one.ref = np.zeros((1, 2), np.float32)
    for rank in range(2):
        ((batch,), *_) = data.make_batches(one, np.array([0]), rank, 2, 99)
        assert batch.ref.dtype == torch.float32 and len(batch.ref) == len(batch.n) == 2
    widths = np.array([[5, 2, 3], [1, 4, 1]])
    taken = [data.tokens_taken(widths, **how).tolist() for how in ({}, {'share_prefix': False}, {'pad': True})]
    assert taken == [[10, 6], [15, 7], [16, 10]]


def test_prefetch():
    assert list(prefetch(iter(range(20)))) == list(range(20)) and list(prefetch(iter([]))) == []

    def breaks():
        yield 1
        raise UserError('in the middle')

    work = prefetch(breaks())
    assert next(work) == 1
    with pytest.raises(UserError, match='in the middle'):
        next(work)


def test_what_is_held_out_of_a_source_is_no_example_to_train_on(write):
    texts = sorted((f'prompt {i}' for i in range(200)), key=lambda text: sources.content_hash(text) % 20)
    rows = [pair(texts[0], ' a', ' b'), pair(texts[-1], ' a', ' a')]
    with pytest.raises(UserError, match=r"left in data '[^+]*only\.jsonl'; left out: 1 pair with equal answers"):
        load(f'{write(40)}+{write(rows, "only")}', undivided=False)


def test_a_part_for_testing_is_read_and_not_held_out(write, tmp_path):
    for count, name in ((5, 'train'), (3, 'test')):
        write(count, name)
    assert [len(load(str(tmp_path), split=split, undivided=False)) for split in ('train', 'test')] == [5, 3]
    # examples that are equal once they are cut are no fault of data_fraction
    file = write([pair('p', ' a b c d', ' a b c e')], 'cut')
    with pytest.raises(UserError, match='left in data'):
        load(file, max_length=5, max_prompt_length=2, data_fraction=0.5)
