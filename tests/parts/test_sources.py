"""Every dataset's rules on small files in its own raw format (raw/, invented text), every layout that any file may have,
how a file is divided into training and test rows, and what is said of what cannot be read."""

import contextlib
import gzip
import json
import math
import re
import shutil
from collections import Counter
from datetime import datetime, time, timedelta
from functools import partial
from pathlib import Path
from time import process_time

import pytest
from helpers import assistant, system, user
from helpers import write_data as write
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from configurator import UserError
from feedback.answers import collect, read_answers
from text import formats, messages, sources

RAW = Path(__file__).parent / 'raw'
DIFFERENT = 'chosen and rejected have different prompts'
MISSING = 'is missing or of the wrong type'


def raw(name):
    return next(str(path) for path in RAW.iterdir() if path.name.partition('.')[0] == name)


def load(source, split='train', **options):
    """(the examples, the Counter) of a source, undivided."""
    return sources.load_rows(source, split, undivided=True, **options)


def read(path, rows, **options):
    """(the examples, the Counter) of a file that has these rows, undivided."""
    return load(write(path, rows), **options)


def refusal(source, split='train', **options):
    """The message with which a source is refused."""
    with pytest.raises(UserError) as info:
        sources.load_rows(source, split, **options)
    return str(info.value)


def pair(prompt, chosen, rejected):
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


# ---- the datasets ----

EGG = messages.ask('How do I boil an egg?')
COLOUR = messages.ask('Name a colour.') + ' Blue.' + messages.ask('My script prints "Assistant: Blue." Why?')
TOMATOES, SOIL = messages.ask('Why are my tomatoes yellow?'), ' Check the soil first, then the light.'
GARLIC = messages.ask('Best time to plant garlic?')
CODE = (
    ' Use <code>print</code>:\n\n<code>for x in range(3):\n    print(x < 2 && "a")\n\n\nprint()\n</code>\n\nGood luck!'
)
PRINT = messages.ask('How do I print in Python?\n\nI tried <code>echo</code>.')
MAGNETS, SPINS = user('How do magnets work?'), [assistant('The spins of electrons line up.')]
MAGIC = [[assistant(text)] for text in ('By their spins.', 'Magic.')]
FRIDGE = [MAGNETS, *SPINS, user('And fridge magnets?')]
# fmt: off
RAWS = {  # name: (some examples by number, how many there are, what is left out, what is said of bad rows)
    'hh': ({0: pair(EGG, ' Put it into boiling water for eight minutes.', ' No idea.'),
            1: pair(COLOUR, ' Because it puts the speaker first.', ' It just does.'),
            2: pair(messages.ask('Say hello.'), ' Hello there!', ''), 3: pair(EGG, ' In water, for as long as you like it.', ' Ask the hen.')},
           4, {DIFFERENT: 1}, ['no column has the prompt', f"'rejected' {MISSING}"]),
    'shp': ({0: pair(TOMATOES, ' Too much water.', ' They like music.'), 1: pair(TOMATOES, SOIL, ' They like music.'),
             2: pair(GARLIC, ' In autumn.', ' At noon.')}, 4, {'score ratio below 2': 2}, [f"'score_B' {MISSING}"]),
    'se': ({0: pair(PRINT, CODE, ' Read the docs.'), 1: pair(messages.ask('Tea or coffee?'), ' Water.', ' Tea.')},
           4, {'tie': 2, 'fewer than two answers': 1}, [f"'text' {MISSING}"]),
    'sharegpt': ({0: {'prompt': messages.ask('Name a river.'), 'response': ' The Thames.'}, 1: {'prompt': messages.ask('What is 2 + 2?'), 'response': ' 4'}},
                 2, {'does not begin with human, gpt': 3, 'special token in the text': 1}, [f"'value' {MISSING}"]),
    'imdb': ({0: pair('I watched this film on a', ' rainy day and loved it.', ' plane and slept.'), 2: pair('So so', ' soothing, so sound.', ' sour.')},
             3, {sources.REPEATED: 3}, ["only one of 'chosen' and 'rejected' begins with the prompt"]),
    # no better answer: one is not there, one is German; not whole: a gap and a circle
    'oasst': ({0: pair([MAGNETS], SPINS, MAGIC[0]), 1: pair([MAGNETS], *MAGIC),
               2: pair(FRIDGE, [assistant('Their poles lie in stripes.')], [assistant('They are weak.')])},
              3, {'no answer of the next better rank': 2, 'not English': 4, 'an answer without a rank': 1}, ['the conversation above the answer is not whole'] * 2),
    'ultrafeedback': ({1: pair([user('What is 7 x 6?')], [assistant('42')], [assistant('36')])},
                      2, {'empty answers': 1, 'answers to something else than the prompt': 1}, []),
    'ultrachat': ({0: {'prompt': [user('Plan a picnic.')], 'response': [assistant('Bring bread and cheese.')]}},
                  2, {'does not begin with user, assistant': 2}, [f"'messages' {MISSING}"]),
    'alpaca_eval': ({0: {'prompt': messages.ask('Name three fruits.')}, 1: {'prompt': messages.ask('Explain tides\nin one line.')}},
                    3, {}, [f"'instruction' {MISSING}"]),
    'annotations': ({i: pair(messages.ask(f'Question {n}?'), f' {a} {n}.', f' {b} {n}.') for i, n, a, b in (
                         (0, 0, 'One', 'Two'), (1, 1, 'Two', 'One'), (2, 4, 'One', 'Two'), (3, 5, 'Two', 'One'))}, 4, {'tie': 2, 'no verdict': 1},
                    ["'preference' is not 0, null, or from 1 to 2", f"'preference' {MISSING}"]),
}
# fmt: on


@pytest.mark.parametrize('reader', [*RAWS, 'hh_helpful', 'hh_harmless', 'ultrafeedback_hybrid'])
def test_raw_files(reader):
    name = reader if reader in RAWS else reader.partition('_')[0]
    some, count, left_out, bad = RAWS[name]
    examples, counted = load(f'{reader}:{raw(name)}', skip_bad_rows=True)
    assert {i: examples[i] for i in some} == some and len(examples) == count
    reasons = [reason for reason, n in counted.items() if reason.startswith('bad rows') for _ in range(n)]
    assert {reason: n for reason, n in counted.items() if reason not in reasons} == left_out
    assert len(reasons) == len(bad) and all(any(words in reason for reason in reasons) for words in bad)


def test_best_answers():
    """For SFT, of data sets with many answers to a prompt."""
    best = [{'prompt': TOMATOES, 'response': SOIL}, {'prompt': GARLIC, 'response': ' In autumn.'}]
    assert load(f'shp:{raw("shp")}', task='sft', skip_bad_rows=True)[0][:2] == best
    assert [x['response'] for x in load(f'se:{raw("se")}', task='sft', skip_bad_rows=True)[0][:2]] == [CODE, ' Water.']


@pytest.mark.parametrize('num_turns', [2, 5])
def test_turns_of_sharegpt(num_turns):
    """The third question of the first chat has no answer."""
    first, second, other = load(f'sharegpt:{raw("sharegpt")}', num_turns=num_turns, skip_bad_rows=True)[0]
    assert [first, other] == list(RAWS['sharegpt'][0].values())
    asked = first['prompt'] + ' The Thames.' + messages.ask('Another?')
    assert second == {'prompt': asked, 'response': ' The Oder.'}


def test_a_text_that_goes_on_behind_its_answer_is_learnt_whole():
    text = '<|user|>\nhi</s>\n<|assistant|>\nyo</s>\n<|user|>\nmore'
    assert formats.parse_any({'text': text}, 'sft') == [{'prompt': '', 'response': text}, {'drop': formats.WHOLE}]


def test_an_empty_system_message_is_none():
    assert formats.parse_any({'systemInstruction': {}, 'contents': GEMINI}, 'sft') == [SFT]


def test_a_number_chooses_between_no_two_answers():
    turns = [user('q?'), assistant('b', n=0), assistant('a', n=True)]
    assert formats.parse_any({'messages': turns}, 'sft')[0]['turns'] == turns


TEXTS = {'prompt': 'p', 'chosen': 'a', 'rejected': 'b'}


@pytest.mark.parametrize('made', [
    # KTO's labels elsewhere; a label between 0 and 1; no prompt; numbers as texts and texts as numbers; no list
    *([{'prompt': 'p', 'response': 'a', 'good': label}] for label in (-1, 0.2, 'no')), [{'chosen': 'a', 'rejected': 'b'}],
    [TEXTS | {'margin': '2'}], *([TEXTS | {'response': 'a', name: 3}] for name in ('prompt', 'chosen', 'rejected', 'response')), TEXTS, None, ['p'],
])  # fmt: skip
def test_a_reader_of_ones_own(made, monkeypatch):
    """Its rows may be plain dicts, and what it makes of them is checked: a label of -1 would count as good."""
    monkeypatch.setattr(sources, 'get_mine', lambda split, path=None: ([{'a': 'b'}], lambda row: made), raising=False)
    with pytest.raises(UserError, match=r'no examples as text/sources.py describes them: [\[{N]'):
        sources.load_rows('mine', 'train', undivided=True)
    made = [TEXTS | {'margin': 2}, {'drop': 'too short'}]
    assert sources.load_rows('mine', 'train', undivided=True) == ([TEXTS | {'margin': 2}], Counter({'too short': 1}))
    made = [{'prompt': 'p', 'response': 'a', 'good': label} for label in (0, 1)]
    assert sources.load_rows('mine', 'train', undivided=True)[0] == made


def test_a_reader_without_a_test_split_reads_all_files(tmp_path):
    """Whatever their names, and whatever configs the README has."""
    for name in ('train', 'more'):
        shutil.copy(raw('sharegpt'), tmp_path / f'{name}.json')
    configs = [{'config_name': name, 'data_files': f'{name}.json'} for name in ('train', 'more')]
    (tmp_path / 'README.md').write_text(f'---\nconfigs: {json.dumps(configs)}\n---\n')
    alone, both = (load(f'sharegpt:{path}', skip_bad_rows=True)[0] for path in (raw('sharegpt'), tmp_path))
    assert len(both) == 2 * len(alone) > 0


def test_annotations_are_recognised_by_their_fields(tmp_path):
    by_name, bare = (load(name + raw('annotations'), skip_bad_rows=True) for name in ('annotations:', ''))
    assert by_name == bare and 'annotations:PATH' in refusal('annotations')
    for part, text in (('train', 'a'), ('test', 'b')):
        write(tmp_path / f'{part}.json', [{'instruction': 'q', 'output_1': text, 'output_2': 'c', 'preference': 1}])
    assert [answers(f'annotations:{tmp_path}', part) for part in ('train', 'test')] == [[' a'], [' b']]


def test_toy():
    train, test = (sources.load_rows('toy', split) for split in ('train', 'test'))
    assert (len(train[0]), len(test[0])) == (6000, 600) and not train[1] and train[0] != test[0]
    assert set(train[0][0]) == {'prompt', 'chosen', 'rejected'} and sources.load_rows('toy', 'test')[0] == test[0]
    assert 'toy world has no files' in refusal(f'toy:{raw("hh")}')


@pytest.mark.parametrize('html, text', [('no tags &amp; no &lt;p&gt;', 'no tags & no <p>'), ('', ''), ('<p>a</p><p>b</p>', 'a\n\nb'), ('a<br/>\n b', 'a\nb'), ('a<p>b', 'a\n\nb'),
    ('a  \n b <b> c</b>d', 'a b cd'), ('<p>unclosed', 'unclosed'), ('<p>x <a href="u>v">link</a>, y</p><!-- <p>no -->', 'x link, y'),
    ('<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>d', '- a\n- b\n- c\n\nd'), ('<H2>a</H2>2 < 3', 'a\n\n2 < 3'),
    ('<ul><li><p>a</p><p>b</p></li></ul>', '- a\n\nb'), ('<pre><code>  a\n\n\n  b</code></pre><p>c</p>', '<code>  a\n\n\n  b</code>\n\nc')])  # fmt: skip
def test_strip_html(html, text):
    assert messages.strip_html(html) == text


def test_prompts_as_chats():
    hh = '\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:'
    assert messages.as_chat(hh) == [user('a\n\nb'), assistant('c'), user('d')]
    assert messages.as_chat('Review of the hotel:') == [user('Review of the hotel:')]
    for written in ('User: q?\nAssistant:', '### Instruction:\nq?\n\n### Response:'):
        assert messages.as_chat(written) == [user('q?')] and messages.as_chat(f'{written} a') == [user(f'{written} a')]
    assert messages.instruction(hh) == hh
    for text in (' odd \n', 'two\n\nlines', ''):
        assert messages.instruction(messages.ask(text)) == text
    assert messages.instruction([user(' x ')]) == ' x '
    chat = [system('s'), user('u'), assistant('a'), user('v')]
    assert messages.instruction(chat) == 'user: u\n\nassistant: a\n\nuser: v'
    # the example that is made a chat of stays as it was
    example = {'prompt': 'a', 'response': ' b'}
    assert messages.as_chats(example)['response'] == [assistant('b')]
    assert example == {'prompt': 'a', 'response': ' b'}


# ---- the hub ----

HH, SHAREGPT = 'Anthropic/hh-rlhf', 'ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json'
IMDB = 'insub/imdb_prefix20_forDPO_gpt2-large-imdb-FT_siebert_sentiment-roberta-large-english'
ASKED = {  # name -> what the hub is asked for
    'hh': (HH, 'test', {}), 'hh_helpful': (HH, 'test', {'data_dir': 'helpful-base'}), 'hh_harmless': (HH, 'test', {'data_dir': 'harmless-base'}),
    'shp': ('stanfordnlp/SHP', 'test', {}), 'se': ('HuggingFaceH4/stack-exchange-preferences', 'train', {}), 'imdb': (IMDB, 'test', {}),
    'sharegpt': ('anon8231489123/ShareGPT_Vicuna_unfiltered', 'train', {'data_files': SHAREGPT}), 'oasst': ('OpenAssistant/oasst1', 'validation', {}),
    'ultrafeedback': ('HuggingFaceH4/ultrafeedback_binarized', 'test_prefs', {}), 'owner/name': ('owner/name', 'test', {}),
    'ultrafeedback_hybrid': ('wzhouad/gemma-2-ultrafeedback-hybrid', 'test', {}), 'ultrachat': ('HuggingFaceH4/ultrachat_200k', 'test_sft', {}),
    'alpaca_eval': ('tatsu-lab/alpaca_eval', 'alpaca_eval', {}),
}  # fmt: skip


@pytest.mark.parametrize('source, asked', ASKED.items())
def test_what_is_asked_of_the_hub(hub, source, asked):
    assert sources.load_rows(source, 'test') == ([], {}) and hub.asked and all(call[:3] == asked for call in hub.asked)
    assert sources.fingerprint(source) is None


def test_a_split_that_is_read_whole(hub):
    """By its name, or by that in brackets, though others are for training and testing."""
    hub.splits = ['train', 'validation', 'test']
    for source, split in (('owner/name', 'validation'), ('owner/name[validation]', 'test')):
        load(source, split)
    assert [split for _, split, *_ in hub.asked] == ['validation'] * 2


def test_hub_rows_and_errors(hub, monkeypatch):
    good = pair('p', 'a', 'b')
    hub.rows = [good, {'prompt': 'p', 'chosen': 'a'}]
    assert sources.load_rows('owner/name', 'test', skip_bad_rows=True)[0] == [good]
    assert refusal('owner/name').startswith("owner/name/{}/train.json, row 2: 'rejected' is missing")
    hub.splits = ['train', 'test']
    assert refusal('ultrachat').endswith("ultrachat_200k' on the hub has no split 'train_sft'; there are train, test")

    def refuse(*_, **__):
        raise ConnectionError('no network\nat all')

    monkeypatch.setattr('huggingface_hub.hf_hub_download', refuse)
    assert refusal('owner/name') == "cannot read {}/train.json of 'owner/name' from the hub: no network at all"
    assert refusal('alpaca_eval').startswith("cannot read alpaca_eval.json of 'tatsu-lab/alpaca_eval' from the hub: ")
    hub.load_dataset_builder = refuse
    assert refusal('owner/other').startswith("cannot read 'owner/other' on the hub: no network at all (a config")
    monkeypatch.setattr('text.files.hub.reachable', refuse)  # is asked before each file
    with pytest.raises(ConnectionError):
        load('alpaca_eval')


def test_a_hub_dataset_is_known_by_its_commit_and_read_there(hub, monkeypatch):
    commits = {'Anthropic/hh-rlhf': 'aaa', 'owner/name': 'bbb'}
    monkeypatch.setattr('text.files.hub_commit', commits.get)
    names = ['hh', 'hh_helpful', 'Anthropic/hh-rlhf', 'owner/name']
    before = [sources.fingerprint(name) for name in names]
    assert len(set(before)) == 4 and None not in before
    for name in names:
        sources.load_rows(name, 'test')
    assert [commit for *_, commit in hub.asked] == ['aaa', 'aaa', 'aaa', 'bbb']
    commits['Anthropic/hh-rlhf'] = 'xxx'
    after = [sources.fingerprint(name) for name in names]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False] * 3 + [True]


# ---- the layouts of any file ----

CHAT_PAIR = {'chosen': [assistant('blue')], 'rejected': [assistant('green')]}
PAIR = {'prompt': [user('q?')], 'chosen': [assistant('a')], 'rejected': [assistant('b')]}
SFT = {'prompt': [user('q?')], 'response': [assistant('a')]}
BRIEF = {'prompt': [system('Be brief.'), user('q?')]}
TWO_TURNS = [user('a'), assistant('b'), user('q?'), assistant('a')]
ASKS, SAYS, QA = TWO_TURNS[:3], TWO_TURNS[3:], TWO_TURNS[2:]
SKY, COLOURS, F = 'The sky is', [user('What colour?')], {'name': 'f'}
PARTED = messages.alternating(['a', 'x', 'y', 'z'])  # from TWO_TURNS
MULTI = {'prompt': ASKS, 'response': SAYS, 'turns': TWO_TURNS}
GEMINI = [{'role': role, 'parts': [{'text': text}]} for role, text in (('user', 'q?'), ('model', 'a'))]
WRITTEN = [('<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n', 'a<|im_end|>\n'), ('<s>[INST] q? [/INST]', ' a </s>'),
           ('<|user|>\nq?</s>\n<|assistant|>\n', 'a</s>'), ('<bos><start_of_turn>user\nq?<end_of_turn>\n<start_of_turn>model\n', 'a'),
           ('USER: q? ASSISTANT:', ' a</s>'), ('<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq?<|start_header_id|>assistant<|end_header_id|>\n\n', 'a')]  # fmt: skip
ANSWERS = {'chosen': 'a', 'rejected': 'b'}
MARKUP = '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'


def said(human, gpt, **more):
    return [{'from': 'human', 'value': human, **more}, {'from': 'gpt', 'value': gpt, **more}]


# fmt: off
COLUMNS = {  # the names of a question's column and of one answer's (Amod counselling, Vertex, FLAN, ...), or of the better and the worse one's
    ('sft', 'q? a'): 'Context Response, input_text output_text, inputs targets, input target, human assistant, user assistant, question answer, instruction output, problem solution, '
        'problem output, query output, input answer, user_prompt response, user_input output, request answer, question_text completion, inputs generation',
    ('pairs', 'q? a b'): 'question chosen rejected, query chosen rejected, context chosen rejected, input accepted rejected, question response_j response_k, '
        'query response rejected_response, question answer rejected_answer, user_query chosen rejected, human good_answer bad_answer, '
        'request response_correct response_incorrect',
}
OWN = [{'prompt': SKY, 'chosen': ' blue.', 'rejected': ' green.'}, {'prompt': 'Q: 0? A: 4', 'response': '4'}, {'prompt': SKY, 'response': ' blue.', 'good': False}, {'prompt': SKY}, {'prompt': [user('q?')]},
       {'prompt': '["a", "b"]', 'response': ' c'}, {'prompt': 'p', 'response': "such as {'role': 'user'}"},
       {'prompt': 'q?', 'response': 'User: q?'}, {'prompt': 'q?', 'response': 'You asked: q?\nA: a'}]
SAME = [  # task, the example that each of these rows gives: of None also with other fields, {what it is: row}
    (None, PAIR, {
        'instruction': {'instruction': 'q?', 'input': '', **ANSWERS, 'prompt': None}}),
    (None, {'prompt': 'Human: hi\nAssistant:', 'chosen': 'hello', 'rejected': 'hey'}, {'implicit, after a colon': {'chosen': 'Human: hi\nAssistant:hello', 'rejected': 'Human: hi\nAssistant:hey'}}),
    (None, {'prompt': 'Q: one?\nA:', 'chosen': ' yes', 'rejected': ' yes, no'}, {'implicit, one answer begins the other': {'chosen': 'Q: one?\nA: yes', 'rejected': 'Q: one?\nA: yes, no'}}),
    (None, {'prompt': MARKUP, **{k: f'{k}<|im_end|>' for k in ANSWERS}}, {'implicit, chat markup': {k: f'{MARKUP}{k}<|im_end|>' for k in ANSWERS}}),
    (None, {'prompt': 'Q: 0?\nA:', 'chosen': 'yes', 'rejected': ' no'}, {'repeated prompt, other blanks': {'prompt': 'Q: 0?\nA: ', 'chosen': '\nQ: 0?\nA:yes', 'rejected': 'Q: 0?\nA: no'}}),
    (None, {'prompt': 'Q: 0?\nA:', 'response': ' yes', 'good': True}, {'repeated prompt, one answer': {'prompt': 'Q: 0?\nA:', 'completion': 'Q: 0?\nA: yes', 'label': True}}),
    (None, {'prompt': messages.ask('q?'), **{k: f' {v}' for k, v in ANSWERS.items()}}, {
        'repeated with its speakers': {'prompt': 'q?', **{k: messages.ask('q?') + f' {v}' for k, v in ANSWERS.items()}},
        'repeated with its speakers, of a question': {'question': 'q?', **{k: messages.ask('q?') + f' {v}' for k, v in ANSWERS.items()}}}),
    (None, {'prompt': messages.ask('q?'), **{k: f' {v}' for k, v in ANSWERS.items()}}, {'the marker twice': {'prompt': messages.ask('q?'), **{k: f'Assistant: {v}' for k, v in ANSWERS.items()}}}),
    (None, PAIR, {'a marker behind a question': {'question': 'q?', **{k: f'Assistant: {v}' for k, v in ANSWERS.items()}}}),
    (None, BRIEF | {k: f' {v}' for k, v in ANSWERS.items()}, {'repeated without the system message': {'prompt': BRIEF['prompt'], **{k: messages.ask('q?') + f' {v}' for k, v in ANSWERS.items()}}}),
    (None, {'prompt': MARKUP, **ANSWERS}, {'repeated markup': {'prompt': MARKUP, **{k: MARKUP + v for k, v in ANSWERS.items()}}}),
    (None, {'prompt': f'<|im_start|>system\ns<|im_end|>\n{MARKUP}', **ANSWERS}, {
        'repeated markup behind a system message': {'prompt': MARKUP, **{k: f'<|im_start|>system\ns<|im_end|>\n{MARKUP}{v}' for k, v in ANSWERS.items()}}}),
    (None, PAIR | {'prompt': TWO_TURNS[:3]}, {'the last question again': {'prompt': TWO_TURNS[:3], **{k: [TWO_TURNS[2], assistant(v)] for k, v in ANSWERS.items()}}}),
    (None, {'prompt': MARKUP, **ANSWERS}, {'markup and messages': {'prompt': MARKUP, **{k: [assistant(v)] for k, v in ANSWERS.items()}}}),
    (None, {'prompt': 'Question: q?\nAnswer:', 'response': ' a'}, {'repeated behind a word': {'query': 'q?', 'response': 'Question: q?\nAnswer: a'}}),
    (None, {'prompt': MARKUP, 'response': 'a<|im_end|>'}, {'repeated with its markup': {'instruction': 'hi', 'output': f'{MARKUP}a<|im_end|>'}}),
    (None, {'prompt': 'Write a talk.', 'response': 'Human: q?\nAI: a'}, {'a dialogue that is asked for': {'prompt': 'Write a talk.', 'response': 'Human: q?\nAI: a'}}),
    (None, PAIR | BRIEF, {'prompt and system': {'system_prompt': 'Be brief.', 'prompt': 'q?', **ANSWERS}}),
    (None, {'prompt': 'p', **ANSWERS}, {'names that are taken': {'prompt': 'p', **ANSWERS, 'real': 'x', 'generated': 'y'}}),
    (None, {'prompt': 'Q: 0?\nA:', **ANSWERS}, {'question that ends in a turn marker': {'question': 'Q: 0?\nA:', **ANSWERS}}),
    (None, SFT | {'prompt': [user('i\n\nabout this')]}, {'alpaca': {'instruction': 'i', 'input': 'about this', 'output': 'a', 'text': 'all of it: i'}}),
    (None, {'prompt': 'Be brief.\nQ: 0?\nA:', **ANSWERS}, {'markup that has the system message': {'system': 'Be brief.', 'prompt': 'Be brief.\nQ: 0?\nA:', **ANSWERS}}),
    (None, {'prompt': SKY, 'response': ' green.', 'good': False}, {'label of 0 or 1': {'prompt': SKY, 'completion': ' green.', 'label': 0}}),
    (None, {'prompt': [system('s'), user('a')], **CHAT_PAIR}, {'chat prompt beside whole chats': {'prompt': [system('s'), user('a')], **{k: [user('a'), *v] for k, v in CHAT_PAIR.items()}}}),
    (None, {'prompt': [user('a'), assistant('b'), user('c')], **CHAT_PAIR}, {'answers of several turns that differ in the last': {'prompt': [user('a')], **{k: [assistant('b'), user('c'), *v] for k, v in CHAT_PAIR.items()}}}),
    (None, {'prompt': SKY, 'response': ' blue.'}, {'no history': {'prompt': SKY, 'response': ' blue.', 'history': []}}),
    (None, {'prompt': messages.ask('q?'), 'chosen': ' a', 'rejected': ' b'}, {'DeepSpeed-Chat': {'prompt': '\n\nHuman: q?\n\n', 'chosen': 'Assistant: a', 'rejected': 'Assistant: b'}}),
    (None, {'prompt': '', 'response': 'The sky is blue.'}, {'text': {'text': 'The sky is blue.'}}),
    ('pairs', PAIR, {
        'SPIN': {'generated': [user('q?'), assistant('b')], 'real': QA}, 'CValues': {'question': 'q?', 'pos_resp': 'a', 'neg_resp': 'b'}, 'dispreferred': {'question': 'q?', 'preferred': 'a', 'dispreferred': 'b'},
        'PKU-SafeRLHF, safety': {'prompt': 'q?', 'response_0': 'b', 'response_1': 'a', 'safer_response_id': 1},
        'Arena, texts as in csv': {'prompt': '["q?"]', 'response_a': '["b"]', 'response_b': '["a"]', 'winner_model_a': '0', 'winner_model_b': '1'},
        'Arena, content in parts': {'winner': 'model_a', **{f'conversation_{x}': [{'role': r, 'content': [{'type': 'text', 'text': t, 'image': None}]} for r, t in (('user', 'q?'), ('assistant', y))] for x, y in ('aa', 'bb')}},
        'Arena, sides': {'winner': 'model_a', 'full_conversation': [{'user': user('q?'), 'model_side_a': assistant('a'), 'model_side_b': assistant('b')}]},
        'Arena, other fields': {'winner': 'model_a', **{f'conversation_{x}': [user('q?') | {'num_tokens': x}, assistant(x)] for x in 'ab'}},
        'Snorkel': {'prompt': 'q?', 'chosen': QA, 'rejected': [user('q?'), assistant('b')], 'all_rm_scores': [1.0, 0.0]},
        'LLaMA-Factory, ranking': {'instruction': 'q?', 'input': '', 'output': ['a', 'b']},
        'OpenAI, preferences without tools': {'input': {'messages': [user('q?')]}, 'preferred_output': [assistant('a')], 'non_preferred_output': [assistant('b')]},
        'OpenAI, preferences in a table': {'input': json.dumps({'messages': [user('q?')], 'tools': []}), 'preferred_output': json.dumps([assistant('a')]), 'non_preferred_output': json.dumps([assistant('b')])},
        'ms-swift, chats': {'messages': QA, 'rejected_messages': [user('q?'), assistant('b')]},
        'align-anything': {'question': 'q?', 'response_1': 'b', 'response_2': 'a', 'overall_response': 2},
        'Vertex, preferences': {'input_text': 'q?', 'candidate_0': 'a', 'candidate_1': 'b', 'choice': 0},
        'PRIME rollouts': {'prompt': 'q?', 'completions': ['b', 'a'], 'correctness': [False, True], 'steps': [['b'], ['a']]},
        'answers and ratings': {'instruction': 'q?', 'generations': ['b', 'a', 'x'], 'ratings': [1, 4, None]},
        'UltraInteract': {'trajectory': said('q?', '')[:1], **ANSWERS},
        'Search Arena': {'winner': 'model_b', 'messages_a': [user('q?'), assistant('b')], 'messages_b': QA, 'turn': 1},
        'a table of raters': {'Prompt': 'q?', 'Response A': 'b', 'Response B': 'a', 'Preference': 'B is slightly better'},
        'MultiPref, one verdict': {'prompt': 'q?', 'completion_a': 'a', 'completion_b': 'b', 'verdict': 'A-is-clearly-better'},
        'the name of the better model': {'prompt': 'q?', 'response_a': 'b', 'response_b': 'a', 'model_a': 'x', 'model_b': 'Y', 'winner': 'Y'}, 'a model called as a side': {'prompt': 'q?', 'response_a': 'b', 'response_b': 'a', 'model_a': 'b', 'model_b': 'y', 'winner': 'b'},
        'compar:IA, by numbers': {'prompt': 'q?', 'response_1': 'b', 'response_2': 'a', 'model_1_name': 'x', 'model_2_name': 'Y', 'winner': 'y'},
        'compar:IA': {'model_a_name': 'x', 'model_b_name': 'Y', 'chosen_model_name': 'x', 'conversation_a': QA, 'conversation_b': [user('q?'), assistant('b')]},
        'Arena, plain texts': {'prompt': 'q?', 'response_a': 'b', 'response_b': 'a', 'winner_model_a': 0, 'winner_model_b': 1},
        'OpenPipe': {'messages': QA, 'rejected_message': assistant('b'), 'split': 'TRAIN'},
        'Gemini, preferences': {'contents': GEMINI[:1], 'completions': [{'score': n, 'completion': {'role': 'model', 'parts': [{'text': x}]}} for n, x in ((0, 'b'), (1, 'a'))]},
        'the names of answers': {'question': 'q?', 'response_1': 'b', 'response_2': 'a', 'chosen': 'response_2', 'rejected': 'response_1'}, 'the names of models': {'question': 'q?', 'gpt': 'a', 'llama': 'b', 'chosen': 'gpt', 'rejected': 'llama'},
        'ranks in objects': {'question': 'q?', 'responses': [{'text': 'b', 'rank': 2}, {'text': 'a', 'rank': 1}]}, 'scores in objects': {'question': 'q?', 'candidates': 3, 'answers': [{'answer': 'b', 'score': 2}, {'answer': 'a', 'score': 2.5}]},
        'chats in objects': {'chosen': {'messages': QA}, 'rejected': {'messages': [user('q?'), assistant('b')]}}}),
    ('pairs', PAIR | {'prompt': ASKS}, {
        'HelpSteer 3': {'domain': 'd', 'context': ASKS, 'response1': 'a', 'response2': 'b', 'overall_preference': -1},
        'a chat beside a prompt': {'messages': [user('x'), assistant('y'), user('z')], **PAIR, 'prompt': ASKS},
        'Capybara, pairs': {'conversation': [{'input': 'x', 'output': 'y'}], 'prompt': 'a q?', 'chosen': TWO_TURNS, 'rejected': [*ASKS, assistant('b')]}}),
    ('pairs', PAIR | BRIEF, {
        'chats as JSON': {k: json.dumps(v) for k, v in (PAIR | BRIEF).items()},
        'ms-swift': {'messages': [system('Be brief.'), user('q?'), assistant('a')], 'rejected_response': 'b'}}),
    ('pairs', {'prompt': messages.ask('q?'), 'chosen': ' a', 'rejected': ' b'}, {'Nectar': {'prompt': messages.ask('q?') + ' ', 'answers': [{'answer': 'b', 'rank': 7.0}, {'answer': 'a', 'rank': 1.0}]}}),
    ('pairs', {'prompt': 'q?', 'chosen': 'So a', 'rejected': 'So b'}, {'Math-Step-DPO': {'prompt': 'q?', 'initial_reason_steps': 'So ', **ANSWERS, 'full_chosen': 'x'}}),
    ('pairs', {'prompt': 'SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: p\n\nTL;DR:', 'chosen': ' a', 'rejected': ' b'}, {'TL;DR, comparisons': {'info': {'post': 'p', 'subreddit': 's', 'title': 't'}, 'summaries': [{'text': 'b'}, {'text': 'a'}], 'choice': 1}}),
    ('pairs', {'prompt': 'TITLE: t\n\nx\ny\n\nTL;DR:', 'chosen': ' a', 'rejected': ' b'}, {'TL;DR, news': {'info': {'post': None, 'article': 'x\n\ny', 'title': 't'}, 'summaries': [{'text': 'a'}, {'text': 'b'}], 'choice': 0}}),
    ('pairs', {'prompt': 'POST: p\n\nTL;DR:', 'chosen': ' a', 'rejected': ' b'}, {'CarperAI, comparisons': {'prompt': 'POST: p', 'chosen': 'TL;DR: a', 'rejected': 'TL;DR: b'}}),
    ('pairs', PAIR | BRIEF | {'tools': [F]}, {'OpenAI, preferences': {'input': {'messages': [system('Be brief.'), user('q?')], 'tools': [F], 'parallel_tool_calls': True}, 'preferred_output': [assistant('a')], 'non_preferred_output': [assistant('b')]}}),
    ('pairs', PAIR | {'prompt': [user('x q?')]}, {'monkey business': {'prompt': 'x q?', 'question': 'q?', 'gt_answer': '4', 'samples': ['b', 'a'], 'is_corrects': [False, True]}}),
    ('pairs', {'prompt': [user('x q?')], 'chosen': [assistant('a')], 'rejected': [assistant('b')]}, {'a question that the chats alone have whole': {'prompt': 'q?', 'query': 'x q?', 'chosen': [user('x q?'), assistant('a')], 'rejected': [user('x q?'), assistant('b')]}}),
    ('pairs', {'prompt': messages.ask('i\n\nabout this'), 'chosen': ' a', 'rejected': ' b'}, {'AlpacaFarm': {'instruction': 'i', 'input': 'about this', 'output_1': 'b', 'output_2': 'a', 'preference': 2}}),
    ('pairs', PAIR | {'tools': [F]}, {'When2Call': {'tools': ['{"name": "f"}'], 'messages': [user('q?')], 'chosen_response': assistant('a'), 'rejected_response': assistant('b')}}),
    ('sft', SFT, {
        'UltraFeedback': {'instruction': 'q?', 'completions': [{'response': 'b', 'overall_score': 9, 'fine-grained_score': 1.5}, {'response': 'a', 'overall_score': 2, 'fine-grained_score': 4}]},
        'names of documents': {'question': 'q?', 'document': 'a.pdf', 'passages': 3, 'answer': 'a'},
        'a flag in that column': {'question': 'q?', 'reasoning': 'on', 'answer': 'a'}, 'an answer beside the chat': {'messages': [user('q?')], 'response': 'a'},
        'OpenR1-Math, raw': {'problem': 'q?', 'solution': 'a', 'generations': ['x'], 'correctness': {'llama': [True]}},
        'python_code_instructions_18k_alpaca': {'instruction': 'q?', 'input': '', 'output': 'a', 'prompt': 'Below.\n\n### Instruction:\nq?\n\n### Output:\na'},
        'OpenAI, parts of a response': {'messages': [user([{'type': 'input_text', 'text': 'q?'}]), assistant([{'type': 'output_text', 'text': 'a'}])]},
        'a Sequence of messages': {'messages': {'role': ['user', 'assistant'], 'content': ['q?', 'a']}},
        'alpaca as text': {'text': 'Below is an instruction.\n\n### Instruction:\nq?\n\n### Response:\na'},
        'HH as text': {'text': '\n\nHuman: q?\n\nAssistant: a'}, 'OIG': {'text': '<human>: q?\n<bot>: a'}, 'lines of speakers': {'text': 'User: q?\nAssistant: a'}, 'Magpie': {'instruction': 'q?', 'response': 'a', 'conversations': said('q?', 'a')},
        'LangChain': {'text': 'Human: q?\nAI: a'}, 'OIG, in capitals': {'text': '<HUMAN>: q?\n<BOT>: a'}, 'brackets': {'text': '[User]: q?\n[Assistant]: a'}, 'a blank before the colon': {'text': 'user : q?\nchatbot : a'},
        'headings': {'text': '### User:\nq?\n\n### Response:\na'}, 'wide colons': {'text': 'User：q?\nAssistant：a'}, 'one question beside turns': {'question': 'q?', 'turns': ['x', 'y'], 'answer': 'a'},
        'DeepMath': {'question': 'q?', 'final_answer': '4', 'r1_solution_1': 'a', 'r1_solution_2': 'x'},
        'objects beside an answer': {'question': 'q?', 'answer': 'a', 'samples': [{'text': 'b', 'score': 'high'}]},
        'LIMO': {'question': 'q?', 'solution': 'a', 'answer': '4'}, 'OpenMathInstruct': {'problem': 'q?', 'generated_solution': 'a', 'expected_answer': '4'},
        'KodCode': {'style': 'complete', 'question': 'q?', 'solution': 'a', 'test': 'assert f()'}, 's1K': {'solution': 'a', 'question': 'q?', 'cot': None, 'attempt': 'x'},
        'Gemini': {'contents': GEMINI}, 'OpenChat': {'id': 'x', 'items': said('q?', 'a')},
        'items that are no chat': {'question': 'q?', 'answer': 'a', 'items': [{'name': 'x'}]},
        'data beside columns that are known': {'question': 'q?', 'answer': 'a', 'data': ['x', 'y'], 'items': [user('x')]},
        'Infinity-Instruct': {'conversations': said('q?', 'a'), 'label': {'ability': ['x']}}}),
    ('sft', MULTI, {
        'LLaMA-Factory, history': {'instruction': 'q?', 'input': '', 'output': 'a', 'history': [['a', 'b']]},
        'weights of questions': {'conversations': [x | {'weight': w} for x, w in zip(said('a', 'b') + said('q?', 'a'), (0.0, 1.0, 0.0, 1.0), strict=True)]},
        'texts in turn as JSON': {'conversations': json.dumps(['a', 'b', 'q?', 'a'])},
        'role and text as JSON': {'conversations': json.dumps(MULTI['prompt'] + MULTI['response']).replace('content', 'text')},
        'human and assistant': {'conversation': [{'human': 'a', 'assistant': 'b'}, {'human': 'q?', 'assistant': 'a'}]},
        'UltraChat': {'id': '0', 'data': ['a', 'b', 'q?', 'a']},
        'OIG, turns': {'text': '<human>: a\n<bot>: b\n<human>: q?\n<bot>: a'}, 'speakers in capitals': {'text': '\nUSER: a\nASSISTANT: b\nUSER: q?\nASSISTANT: a'},
        'bold speakers': {'text': '**User:** a\n\n**AI:** b\n\n**User:** q?\n\n**AI:** a'}, 'speakers at the beginning of lines': {'text': 'User: a\nAssistant: b\nUser: q?\nAssistant: a'},
        'Guanaco': {'text': '### Human: a### Assistant: b### Human: q?### Assistant: a'}}),
    *(('sft', {'prompt': '', 'response': text}, {'a text that is no dialogue': {'text': text}}) for text in ('AI: x\nUser: q?\nAI: a', 'Note: q?\nAssistant: a', 'Question: q?\nAnswer: a', 'User: a manual\nPart 1', 'Users:\nAssistant: a', 'Human: q? Assistant: a', '\n\nHuman: q?\nAssistant: a')),
    ('sft', SFT | {'prompt': [user('q?\n Bot: x')]}, {'the first who answers': {'text': 'Human: q?\n Bot: x\nAssistant: a'}}),
    ('sft', SFT | {'prompt': [user('q?\nSystem: x')]}, {'a system within a dialogue': {'text': 'User: q?\nSystem: x\nAssistant: a'}}),
    ('sft', SFT | {'prompt': [user('q?\nQuestion: 5')], 'response': [assistant('a\nBot: x')]}, {'the first speakers alone': {'text': 'Human: q?\nQuestion: 5\nAssistant: a\nBot: x'}}),
    ('sft', SFT | BRIEF, {
        'SmolTalk 2': {'messages': QA, 'chat_template_kwargs': {'custom_instructions': 'Be brief.', 'enable_thinking': False}},
        'OpenHermes 2.5': {'conversations': [{'from': 'system', 'value': 'Be brief.', 'weight': None}, *said('q?', 'a', weight=None)], 'system_prompt': 'Be brief.'},
        'user and assistant as columns': {'system': 'Be brief.', 'user': 'q?', 'assistant': 'a'},
        'a dialogue of messages': {'system': 'Be brief.', 'dialogue': QA}, 'messages by any name': {'system': 'Be brief.', 'id': '3', 'turns': QA, 'tags': ['x']},
        'two columns of messages': {'system': 'Be brief.', 'raw': TWO_TURNS, 'dialogue': QA}, 'names in capitals': {'Question': 'q?', 'System': 'Be brief.', 'RESPONSE': 'a'},
        'system_message': {'system_message': 'Be brief.', 'conversations': said('q?', 'a')},
        'a system message in a text': {'text': 'System: Be brief.\nUser: q?\nAssistant: a'},
        'Gemini': {'systemInstruction': {'role': 'system', 'parts': [{'text': 'Be brief.'}]}, 'contents': GEMINI}, 'Gemini, no role': {'system_instruction': {'parts': [{'text': 'Be brief.'}]}, 'contents': GEMINI},
        'Gemini as JSON': {'systemInstruction': {'role': 'system', 'parts': [{'text': 'Be brief.'}]}, 'contents': json.dumps(GEMINI)}}),
    # one answer of a whole text that a chat template has written
    *(('sft', {'prompt': asks, 'response': replies}, {'written by a template': {'text': asks + replies}}) for asks, replies in WRITTEN),
    ('sft', SFT | {'prompt': ASKS}, {
        'HelpSteer, several turns': {'prompt': 'a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nq?', 'response': 'a', 'helpfulness': 3}}),
    ('sft', SFT | {'response': [assistant('a') | {'reasoning_content': 'let me think'}]}, {
        'a thought in a column': {'question': 'q?', 'reasoning_content': 'let me think', 'answer': 'a'},
        'a thought in a column, to a chat': {'prompt': [user('q?')], 'reasoning_content': 'let me think', 'answer': 'a'},
        'R1, distilled': {'input': 'q?', 'reasoning_content': 'let me think', 'content': 'a'},
        'medical-o1': {'Question': 'q?', 'Complex_CoT': 'let me think', 'Response': 'a'}}),
    ('sft', SFT | {'prompt': [user('i\n\nabout this')]}, {
        'Natural Instructions': {'definition': 'i', 'inputs': 'about this', 'targets': 'a'},
        'Natural Instructions, other names': {'definition': 'i', 'input': 'about this', 'output': 'a'}}),
    ('sft', {'prompt': ASKS, 'response': SAYS}, {'ChatQA': {'messages': ASKS, 'answers': ['a']}, 'Arena, the better conversation': {'winner': 'model_a', 'conversation_a': TWO_TURNS, 'conversation_b': [user('a'), assistant('x'), *TWO_TURNS[2:]]}}),
    ('sft', {'prompt': 'POST: p\nTL;DR:', 'response': ' a b'}, {'CarperAI, summaries': {'prompt': 'POST: p\nTL;DR:', 'label': ' a b'}}),
    ('sft', {'prompt': [user('x'), assistant('y'), *ASKS], 'response': SAYS, 'turns': [user('x'), assistant('y') | {'weight': 0}, *TWO_TURNS]}, {'OpenAI, one of three not trained on': {'messages': [user('x'), assistant('y') | {'weight': 0}, *TWO_TURNS]}}),
    ('sft', SFT | {'prompt': [user('a'), assistant('b'), user('q?')]}, {'XTuner, answers not trained on': {'conversation': [{'input': 'a', 'output': 'b', 'need_calculate_loss': False}, {'input': 'q?', 'output': 'a', 'need_calculate_loss': True}]}}),
    ('sft', SFT | {'prompt': [user('q?') | {'replies': 3}]}, {'a number of replies': {'messages': [QA[0] | {'replies': 3}, QA[1]]}}),
    ('sft', SFT | {'response': [assistant('a') | {'mask': True}]}, {'a mask of the only answer': {'messages': [user('q?'), assistant('a') | {'mask': True}]}}),
    ('sft', SFT | {'response': [assistant('a') | {'loss': 0.3}]}, {'a number called loss': {'messages': [user('q?'), assistant('a') | {'loss': 0.3}]}}),
    ('sft', SFT | {'response': [assistant('<think>so</think>a')]}, {'a thought in both': {'question': 'q?', 'reasoning': 'let me think', 'answer': '<think>so</think>a'}}),
    ('sft', SFT | {'prompt': [user('a b c d e. q?')]}, {'documents that are asked about': {'question': 'a b c d e. q?', 'documents': [{'text': 'a b c d e.'}], 'answer': 'a'}}),
    ('sft', {'prompt': 'x q? b or a', 'response': 'a'}, {'a prompt that only ends as its answer does': {'prompt': 'x q? b or a', 'question': 'q?', 'response': 'a'}}),
    ('pairs', {'prompt': 'q? A: x B: y', 'chosen': 'A', 'rejected': 'B'}, {'options as answers': {'prompt': 'q? A: x B: y', 'A': 'x', 'B': 'y', 'chosen': 'A', 'rejected': 'B'}}),
    ('sft', {'prompt': 'p', 'response': 'TL;DR: a'}, {'an answer with a marker of its own': {'prompt': 'p', 'response': 'TL;DR: a'}}),
    ('sft', {'prompt': 'Human: p\n\nAssistant:', 'response': ' a'}, {'DeepSpeed-Chat, one answer': {'prompt': 'Human: p\n', 'response': 'Assistant: a'}}),
    ('sft', {'prompt': '', 'response': 'a'}, {'an address of an image': {'text': 'a', 'image_url': 'http://x', 'video_id': 'y'}}),
    ('sft', {'prompt': [system('Be brief.'), *ASKS], 'response': SAYS, 'turns': [system('Be brief.'), *TWO_TURNS]}, {'several turns and system': {'system': 'Be brief.', 'messages': TWO_TURNS}}),
    ('sft', SFT | {'tools': [F]}, {'functions': {'messages': QA, 'functions': [F]}}),
    ('sft', {'prompt': 'q?', 'response': 'a'}, {'names in capitals, too': {'prompt': 'q?', 'Prompt': 'x', 'response': 'a'}}),
    ('sft', SFT | {'prompt': [system('Be brief.'), user('Be brief. q?')]}, {'a question that has the system message in it': {'system': 'Be brief.', 'prompt': 'Be brief. q?', 'response': 'a'}}),
    ('sft', SFT, {
        'no image': {'question': 'q?', 'answer': 'a', 'images': [], 'image': ''}, 'an input without messages': {'instruction': 'q?', 'input': [], 'output': 'a'},
        'answers beside a whole chat': {'messages': QA, 'answers': ['x']}, 'a Sequence as ShareGPT names it': {'conversations': {'from': ['human', 'gpt'], 'value': ['q?', 'a']}}}),
    *(('sft', {'prompt': [user('q?', **{name: []})], 'response': [assistant('a', tool_calls=[])]}, {'a message without them': {'messages': [user('q?', **{name: []}), assistant('a', tool_calls='')]}}) for name in ('replies', 'images')),
    ('sft', {'prompt': 'q?'}, {'no samples': {'prompt': 'q?', 'samples': []}, 'a label of one word': {'prompt': 'q?', 'label': 'safe'}}),
    ('sft', {'prompt': [user('q?')]}, {'samples without scores': {'question': 'q?', 'samples': [{'text': 'b'}]}, 'a label of words, beside a question': {'question': 'q?', 'label': 'b a'}}),
    ('sft', {'prompt': '', 'response': 'a'}, {'no answers beside a text': {'text': 'a', 'answers': []}}),
    ('sft', SFT | {'response': 'a'}, {'a chat beside its question': {'prompt': [user('q?')], 'question': 'q?', 'response': 'a'}}),
    ('sft', SFT | {'prompt': [user('Is it: a')]}, {'a question that ends as its answer does': {'question': 'Is it: a', 'answer': 'a'}}),
    ('sft', MULTI, {'history before a prompt': {'prompt': 'q?', 'response': 'a', 'history': [['a', 'b']]}}),
    *(('pairs', {'prompt': f'{asks}\nA:', 'chosen': ' yes', 'rejected': ' no'}, {name: {column: value, 'chosen': f'{asks}\nA: yes', 'rejected': f'{asks}\nA: no'}})
      for name, column, asks, value in (('an id of the prompt', 'prompt_id', 'Q: 0?', 'x 1'), ('prompts that the answers begin with', 'prompts', 'is this so', 'is this so'))),
    ('pairs', PAIR | {'prompt': [*TWO_TURNS, user('z')]}, {'Search Arena, three turns': {'winner': 'model_b', 'turn': 1, **{f'conversation_{x}': [*TWO_TURNS, user('z'), assistant(y)] for x, y in ('ab', 'ba')}}}),
    ('pairs', PAIR, {'scores of chats to a dialogue': {'prompt': messages.ask('q?'), 'answers': [[assistant('b')], [assistant('a')]], 'scores': [0, 1]}}),
    ('sft', {'prompt': 'p', 'response': 'a'}, {'an expected number': {'prompt': 'p', 'response': 'a', 'expected': 3}}),
    ('singles', {'prompt': 'p', 'response': 'a', 'good': True}, {'a label beside an expected answer': {'prompt': 'p', 'response': 'a', 'label': True, 'expected': 'b'}}),
    ('sft', SFT | {'response': [assistant('')]}, {'an empty answer alone': {'messages': [user('q?'), assistant('')]}}),
    ('prompts', {'prompt': ASKS, 'response': [assistant('')], 'turns': [*ASKS, assistant('')]}, {'a prompt before an empty answer': {'messages': [*ASKS, assistant('')]}}),
    *(('sft', {'prompt': chat[:2], 'response': chat[2:], 'turns': chat}, {'two answers that no flag tells apart': {'messages': chat}}) for chat in [[user('q?'), assistant('b', ok=True), assistant('a', ok=True)]]),
    ('sft', {'prompt': '', 'response': '<|im_start|>user\nq?'}, {'a question of a template': {'text': '<|im_start|>user\nq?'}}),
    ('sft', SFT | {'prompt': [user('q? red or blue')]}, {'options in the question': {'question': 'q? red or blue', 'options': ['red', 'blue'], 'answer': 'a'}}),
    ('singles', SFT | {'good': True}, {
        'LLaMA-Factory, KTO': {'instruction': 'q?', 'input': '', 'output': 'a', 'kto_tag': True},
        'a reason for a label': {'question': 'q?', 'reasoning': 'it is right', 'answer': 'a', 'label': True}}),
    ('singles', {'prompt': ASKS, 'response': [assistant('')], 'good': False}, {'an empty answer with a label': {'messages': [*ASKS, assistant('')], 'label': False}}),
    ('prompts', {'prompt': [user('q?')]}, {
        'answers and scores, prompts': {'prompt': 'q?', 'responses': ['b', 'a'], 'scores': [0.1, 0.4]},
        'a question beside turns': {'question': 'q?', 'turns': ['x', 'y']},
        'prompts of questions': {'prompt': [user('q?')], 'solution': '4'}, 'a chat as query': {'query': [user('q?')], 'idx': '4'}}),
    ('prompts', PAIR, {'prompts beside a verdict': {'question': 'q?', 'response_a': 'a', 'response_b': 'b', 'winner': -2}, 'prompts of ties': {'question': 'q?', **ANSWERS, 'tie': True, 'flipped': True}}),
    ('prompts', SFT, {'prompts beside an answer that may be better': {'question': 'q?', 'output': 'a', 'expected': 'b'}}),
    ('prompts', {'prompt': ASKS}, {'NeMo Gym': {'responses_create_params': {'input': ASKS, 'temperature': 1.0}, 'question': 'q?'}, 'RLHFlow, prompts': {'context': 'q?', 'context_messages': ASKS}}),
]

WHOLE = '<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>'
VICUNA = 'USER: a ASSISTANT: b</s>USER: c ASSISTANT: d</s>'
DATA_SETS = [  # columns as these data sets have them: name, task, rows, the examples, what is left out
    ('HelpSteer', 'pairs', [{'prompt': q, 'response': x, 'helpfulness': n, 'verbosity': 9 - n} for q, x, n in (('q?', 'b', 1), ('q?', 'a', 4), ('q?', 'a', 4), ('r?', 'a', 3), ('r?', 'b', 3), ('s?', 'a', 3))], [PAIR], {'tie': 1, 'fewer than two answers': 1}),
    ('annotations, no verdict', 'pairs', [{'instruction': 'q', 'output_1': 'a', 'output_2': 'b', 'preference': math.nan}], [], {'no verdict': 1}),
    ('HelpSteer 2, preferences', 'pairs', [{'prompt': 'q?', 'response_1': x, 'response_2': y, 'preference_strength': n} for x, y, n in (('b', 'a', 2), ('b', 'a', 0), ('a', 'b', -1), ('a', 'b', None))], [PAIR] * 2, {'tie': 2}),
    ('PKU-SafeRLHF, whole numbers as fractions, and none', 'pairs', [{'prompt': 'q?', 'response_0': 'b', 'response_1': 'a', 'better_response_id': x, 'safer_response_id': 0} for x in (1.0, None)], [PAIR], {'tie': 1}),
    ('RewardBench 2', 'pairs', [{'prompt': 'q?', 'chosen': ['a'], 'rejected': ['b', 'c'], 'models': ['x'] * 3}], [PAIR, PAIR | {'rejected': [assistant('c')]}], {}),
    ('Arena, table', 'pairs', [{'prompt': '["q?"]', 'response_a': '["a"]', 'response_b': '["b"]', 'winner_model_a': x, 'winner_model_b': 0, 'winner_tie': y} for x, y in ((1, 0), (0, 1))], [PAIR], {'tie': 1}),
    ('Arena, table without an answer', 'pairs', [{'prompt': '["q?"]', 'response_a': '[null]', 'response_b': '["b"]', 'winner_model_a': 1, 'winner_model_b': 0}], [], {'empty answers': 1}),
    ('Arena, conversations', 'pairs', [{'winner': x, 'conversation_a': [user('q?'), assistant('b')], 'conversation_b': QA} for x in ('model_b', 'tie', 'tie (bothbad)', 'both_bad')], [PAIR], {'tie': 3}),
    *(('a verdict of -1 is a tie', 'pairs', [{'prompt': 'q?', f'response_{one}': 'b', f'response_{two}': 'a', 'label': x} for x in ('b', '-1', '-1.0')], [PAIR], {formats.MINUS_ONE: 2}) for one, two in ((0, 1), (1, 2))),
    ('an empty question', 'sft', [{'system': '', 'question': '', 'answer': 'a'}, {'system': 'Be brief.', 'question': ' ', 'answer': 'a'}, {'system': '', 'question': 'q?', 'answer': 'a'}],
     [SFT | {'prompt': [user('')]}, SFT | {'prompt': [system('Be brief.'), user(' ')]}, SFT], {formats.NO_QUESTION: 2}),
    ('an empty prompt', 'sft', [{'prompt': '', 'response': 'a'}], [{'prompt': '', 'response': 'a'}], {formats.NO_QUESTION: 1}),
    ('a column of objects is no mask', 'sft', [{'messages': QA, 'targets': [{'x': 1}, {'x': 2}]}], [SFT], {}),
    ('no question is missing', 'sft', [{'text': 'a'}], [{'prompt': '', 'response': 'a'}], {}),
    ('PPE', 'pairs', [{'prompt': 'q?', 'response_1': 'b', 'response_2': 'a', 'winner': x} for x in ('model_b', 'tie')], [PAIR], {'tie': 1}),
    ('Unified-Feedback', 'pairs', [{'conv_A': [user('q?'), assistant('b')], 'conv_B': QA, 'conv_A_rating': 0.0, 'conv_B_rating': x} for x in (1.0, 0.0)], [PAIR], {'tie': 1}),
    ('two of three answers have scores', 'pairs', [{'prompt': 'q?', 'response_0': 'x', 'response_1': 'b', 'response_2': 'a', 'score_1': 1, 'score_2': 2}], [PAIR], {}),
    ('sides by letters and names', 'pairs', [{'prompt': 'q?', 'response_a': 'b', 'response_b': 'a', 'preference': x} for x in ('B', 'response_b', 'model b', '[[B]]', 'Output (b)', 'draw', 'neither', 'About the same')], [PAIR] * 5, {'tie': 3}),
    *(('a verdict by another name', 'pairs', [{'prompt': 'q?', one: 'b', two: 'a', name: 'right'}, {'prompt': 'q?', one: 'a', two: 'b', name: 'Left'}], [PAIR] * 2, {})
      for (one, two), name in zip((('answer1', 'answer2'), ('model_a_response', 'model_b_response'), ('assistant_a', 'assistant_b'), ('Completion1', 'Completion2')),
                                  ('best', 'vote', 'judgement', 'Preferred Response'), strict=True)),
    ('a column that tells the split', 'sft', [{'prompt': 'p', 'response': 'a', 'fold': x} for x in ('TRAIN', 'TEST', '3')], [{'prompt': 'p', 'response': 'a'}] * 3, {formats.FOR_TESTS.format('fold'): 1}),
    *(('a column of splits by any name', 'sft', [{'prompt': 'p', 'response': 'a', 'metadata': x} for x in ('train', last, 'train')], [{'prompt': 'p', 'response': 'a'}] * 3, left)
      for last, left in (('Eval', {formats.FOR_TESTS.format('metadata'): 1}), ('train', {}))),
    ('a column of which one word is a split', 'sft', [{'prompt': 'p', 'response': 'a', 'topic': x} for x in ('exam', 'test')], [{'prompt': 'p', 'response': 'a'}] * 2, {}),
    *(('rows that lack what others have', 'sft', [{'question': 'q?', 'solution': 'a', 'answer': 'x'}] * 3 + [row], [SFT] * 3 + [SFT | {'response': [assistant('x')]}], {formats.LACKING.format('question, solution'): 1})
      for row in ({'question': 'q?', 'answer': 'x'}, {'question': 'q?', 'solution': None, 'answer': 'x'})),
    ('a row of another layout', 'sft', [{'messages': QA, 'text': None}] * 3 + [{'messages': None, 'text': 'a'}], [SFT] * 3 + [{'prompt': '', 'response': 'a'}], {formats.LACKING.format('messages'): 1}),
    ('a row with another question', 'sft', [{'instruction': 'q?', 'query': None, 'output': 'a'}] * 3 + [{'instruction': None, 'query': 'q?', 'output': 'a'}], [SFT] * 4, {formats.LACKING.format('instruction, output'): 1}),
    ('half of the rows lack what others have', 'sft', [{'question': 'q?', 'answer': 'a', 'messages': None}, {'question': None, 'answer': None, 'messages': QA}], [SFT] * 2, {formats.LACKING.format('answer, question'): 1}),
    ('OpenRLHF, prompts', 'prompts', [{'context_messages': ASKS, 'label': '34'}], [{'prompt': ASKS}], {}),
    ('a thought of which the answer was cut off', 'sft', [{'question': 'q?', 'reasoning': 'let me think', 'answer': x} for x in ('a', ' ')],
     [SFT | {'response': [assistant('a', reasoning_content='let me think')]}, SFT | {'response': [assistant('')]}], {}),
    *(('a flag of tests', 'sft', [{'prompt': 'p', 'response': 'a', name: x} for x in (True, False, True)], [{'prompt': 'p', 'response': 'a'}] * 3, {formats.FOR_TESTS.format(name): 2}) for name in ('is_test', 'held_out')),
    *(('scores that contradict', 'pairs', [pair('p', 'a', 'b') | {better: x, worse: 3} for x in (2, 3, 4.5, 1)], [pair('p', 'a', 'b')] * 4, {formats.CONTRADICTED: 2})
      for better, worse in (('score_chosen', 'score_rejected'), ('chosen-rating', 'rejected-rating'), ('chosen_avg_rating', 'rejected_avg_rating'), ('Reward_chosen', 'Reward_rejected'))),
    ('no scores', 'pairs', [pair('p', 'a', 'b') | {'chosen_score': x, 'rejected_score': 'high', 'chosen_length': 1, 'rejected_length': 2, 'score': 1, 'chosen_rank': 1, 'rejected_rank': 2, 'chosen_toxicity': 0.1, 'rejected_toxicity': 0.9} for x in ('low', 'x')], [pair('p', 'a', 'b')] * 2, {}),
    ('a margin that contradicts', 'pairs', [pair('p', 'a', 'b') | {'margin': x} for x in (-0.5, 0)], [pair('p', 'a', 'b') | {'margin': x} for x in (-0.5, 0.0)], {formats.CONTRADICTED: 1}),
    ('SHP-2', 'pairs', [{'history': 'q?', 'human_ref_A': 'b', 'human_ref_B': 'a', 'labels': 0, 'score_A': 2, 'score_B': n, 'metadata_A': ''} for n in (9, 3)], [{'prompt': messages.ask('q?'), 'chosen': ' a', 'rejected': ' b'}], {'score ratio below 2': 1}),
    ('distilabel Orca', 'pairs', [{'system': 'Be brief.', 'input': 'q?', **ANSWERS, 'generations': ['a', 'b'], 'status': x} for x in ('swapped', 'tie')], [PAIR | BRIEF], {'tie': 1}),
    *((f'{flag}, answers not trained on', 'sft', [{'messages': [TWO_TURNS[0] | {flag: None}, assistant('b') | {flag: no}, *TWO_TURNS[2:3], TWO_TURNS[3] | {flag: type(no)(1)}]}],
       [SFT | {'prompt': ASKS}], {}) for flag, no in zip(messages.TRAINS, (False, 0, 0.0, False, 0, False, 0, 0, False, 0), strict=True)),
    *(('ties by a flag', 'pairs', [{'prompt': 'q?', 'response_a': 'a', 'response_b': 'b', 'winner': 'a', name: x} for x in flags], [PAIR], {'tie': 1})
      for name, flags in (('tie', (True, False)), ('is_tie', ('no', 'Yes')), ('no_preference', (0, 1)), ('result', ('tie', 'win')))),
    *(('pairs of which one is left out', 'pairs', [pair('p', 'a', 'b') | {name: x, 'flipped': False, 'swapped': 0} for x in flags], [pair('p', 'a', 'b')], {reason: 1})
      for name, flags, reason in (('tie', (None, True), 'tie'), ('winner', ('chosen', 'tie'), 'tie'), ('status', ('APPROVED', 'REJECTED'), formats.UNUSED))),
    *(('rows not to be used', 'sft', [{'messages': x, name: flag} for x, flag in zip((TWO_TURNS, QA), flags, strict=True)], [SFT], {formats.UNUSED: 1})
      for name, flags in (('skip', (True, False)), ('deleted', (1, 0)), ('is_valid', ('false', 'true')), ('keep', (0, 1)), ('status', ('DISCARDED', 'done')))),
    *(('ms-swift, tools', 'prompts', [{'messages': [*ASKS, {'role': call, 'content': 'f'}, {'role': reply, 'content': '8'}]}], [{'prompt': [*ASKS, assistant('f'), {'role': 'tool', 'content': '8'}]}], {}) for call, reply in (('tool_call', 'tool_response'), ('Tool Call', 'function-response'))),
    ('a pair of which one is not trained on', 'pairs', [pair([user('q?')], [assistant('a', weight=w)], [assistant('b')]) for w in (0, 1)], [PAIR], {formats.UNTRAINED: 1}),
    *(('annotations, with what was asked', 'pairs', [{'prompt': x, 'instruction': 'q', 'output_1': 'a', 'output_2': 'b', 'preference': 2}], [pair(x, 'b', 'a')], {}) for x in ('p', ASKS)),
    ('a draw that is no tie', 'sft', [{'prompt': 'p', 'response': 'a', 'draw': True, 'result': 'tie', 'reversed': True, 'status': 'rejected'}], [{'prompt': 'p', 'response': 'a'}], {}),
    ('OpenCodeReasoning, questions elsewhere', 'sft', [{'question': '-', 'solution': 'a'}], [], {"questions that are only '-', in place of one that is elsewhere": 1}),
    ('a thought beside a text', 'sft', [{'prompt': 'p', 'thinking': 'let me think', 'completion': 'a'}], [{'prompt': 'p', 'response': 'a'}], {formats.UNTHOUGHT: 1}),
    *(('NeMo RL', task, [{'context': [user('q?')], 'completions': [{'rank': n, 'completion': [assistant(x)]} for n, x in ((1, 'b'), (0, 'a'))]}], [example], {})
      for task, example in (('pairs', PAIR), ('sft', SFT))),
    *(('a good conversation', 'sft', [{'messages': TWO_TURNS, name: x} for x in (True, False)], [MULTI, {'prompt': ASKS, 'response': SAYS, 'good': False}], {}) for name in ('label', 'is_correct')),
    *(('distilabel', 'sft', [{name: [user('q?')] if name == 'prompt' else 'q?', 'generation': 'a', 'model_name': 'm'}], [SFT | ({'response': 'a'} if name == 'prompt' else {})], {}) for name in ('instruction', 'prompt')),
    ('options in the question, and in columns', 'sft', [{'question': 'q? A: red B: 2', 'A': 'red', 'B': 2, 'answer': 'a'}, {'question': 'q?', 'A': 'x', 'answer': 'a'}], [SFT | {'prompt': [user('q? A: red B: 2')]}, SFT], {}),
    *(('a number as answer', 'sft', [{'question': 'q?', 'answer': x}], [SFT | {'response': [assistant(str(x))]}], {}) for x in (42, 2.5)),
    ('a weight of 0 and one of 1', 'sft', [{'messages': [user('q?'), assistant('a', weight=0)]}, {'messages': [user('q?', weight=0), assistant('a', weight=1)]}], [SFT], {formats.UNTRAINED: 1}),
    ('no flags of messages', 'sft', [{'messages': TWO_TURNS, name: x} for name, x in (('mask', 'User'), ('targets', [2, 3]), ('losses', []), ('ids', [0, 1]), ('loss_mask', [1, 1]), ('loss_mask', [0, 1, 0, 1]))], [MULTI] * 6, {}),
    *(('no answers to score', task, [{name: 'q?', answers: x} for x in ([], [{'text': 'a', 'score': 2}, {'text': 'b', 'score': 1}])], [example], {'fewer than two answers': 1})
      for task, example in (('pairs', PAIR), ('sft', SFT)) for name, answers in (('instruction', 'completions'), ('question', 'answers'), ('prompt', 'answers'))),
    ('Arena, sides beside conversations', 'pairs', [{'winner': 'model_a', 'conversation_a': TWO_TURNS, 'conversation_b': [*ASKS, assistant('b')], 'full_conversation': [{'user': user('q?'), 'model_side_a': assistant('x'), 'model_side_b': assistant('b')}]}], [PAIR | {'prompt': ASKS}], {}),
    *(('a conversation that is none of Arena', 'sft', [{'prompt': 'p', 'response': 'a', 'full_conversation': x}], [{'prompt': 'p', 'response': 'a'}], {}) for x in ('p a', [user('p')])),
    *(('keys of a message', 'sft', [{'conversations': [{role: 'user', text: 'q?'}, {role: 'assistant', text: 'a'}]}], [SFT], {}) for role, text in (('role', 'value'), ('from', 'content'), ('from', 'text'))),
    *(('OpenAI, a call as it was', 'sft', [{'messages': [user('q?'), {'role': 'assistant', 'content': x, 'function_call': {'name': 'f', 'arguments': '{}'}}]}],
       [SFT | {'response': [assistant('') | {'tool_calls': [{'type': 'function', 'function': {'name': 'f', 'arguments': '{}'}}]}]}], {}) for x in ('', None)),
    *(('tool calls as JSON', 'sft', [{'messages': [user('q?'), assistant('') | {'tool_calls': x}]}], [SFT | {'response': [assistant('') | {'tool_calls': [F]}]}], {}) for x in ('[{"name": "f"}]', "[{'name': 'f'}]")),
    *(('OLMo 3', 'sft', [{'messages': [user('a'), x, *TWO_TURNS[2:]]}], [{'prompt': [user('a'), x, user('q?')], 'response': [assistant('a')], 'turns': [user('a'), x, *TWO_TURNS[2:]]}], {}) for x in [assistant('') | {'function_calls': 'f()'}]),
    ('a question alone, and one after an answer', None, [{'messages': ASKS[:1]}, {'messages': ASKS}], [{'prompt': ASKS[:1]}, {'prompt': ASKS[:1], 'response': [assistant('b')]}], {formats.UNASKED: 1}),
    ('no tools', 'sft', [{'messages': QA, 'tools': x} for x in ('', 'null', '[]')], [SFT] * 3, {}),
    ('Guanaco, cut short', 'sft', [{'text': '### Human: q?### Assistant: a### Human: x'}], [SFT], {formats.UNASKED: 1}),
    ('ChatQA, no chat', 'sft', [{'messages': [], 'answers': ['a']}], [], {'conversations without a question and its answer': 1}),
    ('LIMA', 'sft', [{'conversations': ['a', 'b', 'q?', 'a']}, {'conversations': ['x']}], [MULTI], {'conversations without a question and its answer': 1}),
    *(('SmolTalk 2, tools', 'sft', [{'messages': QA, 'chat_template_kwargs': {'custom_instructions': None, name: [x]}} for x in ('{"name": "f"}', "{'name': 'f'}")], [SFT | {'tools': [F]}] * 2, {}) for name in ('xml_tools', 'python_tools')),
    ('an empty answer among others', 'sft', [{'messages': [user('x'), assistant(' '), *TWO_TURNS]}, {'messages': [user('q?'), assistant('a'), user('x'), assistant('')]}], [{'prompt': [user('x'), assistant(' '), *ASKS], 'response': SAYS, 'turns': [user('x'), assistant(' ') | {'weight': 0}, *TWO_TURNS]}, SFT], {formats.UNASKED: 1}),
    ('Arena, an empty conversation', 'pairs', [{'winner': 'model_a', 'conversation_a': QA, 'conversation_b': x} for x in ([user('q?'), assistant('b')], [])], [PAIR], {'empty answers': 1}),
    ('OpenR1-Math, generations', 'sft', [{'problem': 'q?', 'answer': '4', 'generations': ['b', 'a'], 'correctness_math_verify': x} for x in ([False, True], [False, False])], [SFT], {'no right answer': 1}),
    ('answers in JSON', 'sft', [{'prompt': 'q?', 'response': x} for x in ('{"content": "a"}', '[{"value": 3}]', '{"role": ')], [{'prompt': 'q?', 'response': x} for x in ('{"content": "a"}', '[{"value": 3}]', '{"role": ')], {}),
    ('chats as pandas and numpy write them', 'sft', [{'messages': x} for x in (repr(TWO_TURNS), repr(TWO_TURNS).replace('}, {', '}\n {'))], [MULTI] * 2, {}),
    ('ShareGPT, pieces', 'sft', [{'conversations': [said('', 'x')[1], *said('q?', 'a')]}, {'conversations': []}], [SFT], {formats.UNASKED: 1, 'conversations without a question and its answer': 1}),
    ('WebGPT', 'pairs', [{'question': {'id': '1', 'full_text': 'q?'}, 'answer_0': 'b', 'score_0': -n, 'answer_1': 'a', 'score_1': n} for n in (0.5, 0.0)], [PAIR], {'tie': 1}),
    ('MT-Bench', 'pairs', [{'winner': 'model_b', 'turn': n, **{f'conversation_{side}': [user('q?'), assistant(x), *TWO_TURNS[:2]] for side, x in ('ab', 'ba')}} for n in (1, 2)], [PAIR], {'chosen and rejected have different prompts': 1}),
    *(('MT-Bench, questions', 'prompts', [{'question_id': 81, 'category': 'x', name: ['q?', 'why?', 'how?'], 'reference': []}], [{'prompt': [user('q?')]}], {formats.LATER: 2}) for name in ('turns', 'prompt')),
    ('a number beside a prompt', 'sft', [{'prompt': 'q?', 'answer_tokens': 7, 'my_output': ''}], [{'prompt': 'q?'}], {}),
    ('no right answer', 'pairs', [{'prompt': 'q?', 'completions': ['b', 'a'], 'correctness': [False, False]}], [], {'tie': 1}),
    ('Arena-Hard, questions', 'prompts', [{'question_id': 'x', 'turns': [{'content': 'q?'}]}], [{'prompt': [user('q?')]}], {}),
    *(('texts of a template', 'sft', [{'text': x} for x in texts], [{'prompt': '', 'response': x} for x in texts], {formats.WHOLE: 4})
      for texts in [(WHOLE, VICUNA, 'In Llama 2 [/INST] ends a question', '[INST] a [/INST] b [INST] c', '[INST] a [/INST] b [/INST] c')]),
    ('OffsetBias', 'pairs', [{'instruction': 'q?', 'output_1': 'b', 'output_2': 'a', 'label': 2}, {'instruction': 'q?', 'output_1': 'a', 'output_2': 'b', 'label': 1}], [PAIR] * 2, {}),
    ('JudgeBench', 'pairs', [{'question': 'q?', 'response_model': 'x', 'response_A': 'b', 'response_B': 'a', 'label': x} for x in ('B>A', 'B>>A', 'A=B')], [PAIR] * 2, {'tie': 1}),
    ('NuminaMath 1.5', 'sft', [{'problem': 'q?', 'answer': '4', 'solution': 'a'}, {'problem': 'q?', 'answer': 'a', 'solution': None}], [SFT] * 2, {formats.LACKING.format('problem, solution'): 1}),
    ('XTuner', 'sft', [{'conversation': [{'system': 'Be brief.', 'input': 'q?', 'output': 'a'}]}, {'conversation': [{'input': 'a', 'output': 'b'}, {'input': 'q?', 'output': 'a'}]}], [SFT | BRIEF, MULTI], {}),
    ('SQuAD', 'sft', [{'question': 'i', 'context': 'c', 'answers': {'text': x, 'answer_start': [0] * len(x)}} for x in (['a', 'b'], [])], [{'prompt': [user('i\n\nc')], 'response': [assistant(x)]} for x in ('a', '')], {}),
    ('OpenAssistant, ranks as fractions', 'pairs', [{'message_id': i, 'parent_id': p, 'text': t, 'role': r, 'rank': n} for i, p, t, r, n in (('1', None, 'q?', 'prompter', None), ('2', '1', 'b', 'assistant', 1.0), ('3', '1', 'a', 'assistant', 0.0))], [PAIR], {}),
    ('OpenAssistant, best answers', 'sft', [{'message_id': i, 'parent_id': p, 'text': t, 'role': r, 'rank': n} for i, p, t, r, n in (('1', None, 'q?', 'prompter', None), ('2', '1', 'b', 'assistant', 1), ('3', '1', 'a', 'assistant', 0))], [SFT], {'answers that are not the best': 1}),
    ('OpenAssistant, prompts', 'prompts', [{'message_id': i, 'parent_id': p, 'text': t, 'role': r, 'rank': None} for i, p, t, r in (('1', None, 'a', 'prompter'), ('2', '1', 'b', 'assistant'), ('3', '2', 'q?', 'prompter'))], [{'prompt': [user('a')]}, {'prompt': ASKS}], {}),
    # what follows where they part would be trained on with its questions and role markers
    ('chats that part before their last answer', 'pairs', [{'prompt': x, 'chosen': y, 'rejected': z} for x, y, z in ([ASKS[:1], *CHAT_PAIR.values()], (None, TWO_TURNS, PARTED), (None, TWO_TURNS, PARTED[:2]), (ASKS[:1], TWO_TURNS[1:], PARTED[1:]), (ASKS[:1], TWO_TURNS, PARTED))],
     [{'prompt': ASKS[:1], **CHAT_PAIR}], {DIFFERENT: 4}),
    ('chats that part, a text before them', 'pairs', [pair('a', TWO_TURNS, PARTED)], [], {DIFFERENT: 1}),
    ('texts that part', 'pairs', [{'chosen': x, 'rejected': y} for x, y in (('\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d', '\n\nHuman: a\n\nAssistant: x'), ('Q: a\nA: b\nQ: c\nA: d', 'Q: a\nA: x\nQ: y\nA: z'))], [], {DIFFERENT: 2}),
    *(('another prompt', 'pairs', [{'prompt': x, **{k: [user('a'), *v] for k, v in CHAT_PAIR.items()}}], [], {'answers to something else than the prompt': 1}) for x in ('another', [user('another')])),
    ('another prompt, several turns', 'pairs', [pair('another', TWO_TURNS, [*ASKS, assistant('b')])], [], {'answers to something else than the prompt': 1}),
]

OF_COLUMNS = {  # what is said of a column, and (its name, a row)
    'is missing or of the wrong type': [
        ('rejected', {'prompt': 'p', 'chosen': 'a'}), ('rejected', {'prompt': 'p', 'chosen': 'a', 'rejected': None}), ('prompt', {'prompt': 3, **ANSWERS}),
        ('output_1', {'instruction': 'q', 'output_1': None, 'output_2': 'b', 'preference': 1}), ('score_b', {'prompt': 'q', 'response_a': 'a', 'response_b': 'b', 'score_a': 1, 'score_b': 'x'}),
        ('tool_calls', {'messages': [user('q'), assistant('') | {'tool_calls': 'f(x)'}]}), ('margin', {'prompt': 'p', **ANSWERS, 'margin': True}), *(('messages', {'messages': x, 'answers': ['a']}) for x in ('hello', 3, '[]'))],
    'is missing': [
        ('prompt', {'response': 'a'}), ('prompt', {'data': ['q', 'a']}), ('prompt', {'messages': said('q?', 'a'), 'chosen': ['c'], 'rejected': ['d']}), ('prompt', {'text': None}),
        ('prompt', {'Prompt': 'q', 'PROMPT': 'p', 'response': 'a'}), ('prompt', {}),
        ('content', {'prompt': 'p', 'chosen': [{'role': 'assistant'}], 'rejected': []}), ('messages', {'messages': 'hello'}),
        ('preference_strength', {'prompt': 'q', 'response_1': 'a', 'response_2': 'b', 'preference_strength': 'x'})],
    'asks something, too': [
        ('instruction', {'messages': [user('q')], 'instruction': 'Use only French words.', 'response': 'a'}),
        ('question', {'prompt': 'q', 'question': {'id': '1'}, **ANSWERS}), ('question', {'prompt': 'p', 'question': 'q', **ANSWERS}),
        ('documents', {'question': 'q', 'documents': [{'id': 'a.pdf', 'text': 'what the question is about'}], 'answer': 'a'}),
        *(('history', {'history': [['a?', 'b']], **rest}) for rest in ({'prompt': [user('q')], **ANSWERS}, {'messages': [user('q')], **ANSWERS}, {'messages': said('q', 'a')}, {'text': 'a'})),
        ('history', {'question': 'q', 'history': [['x']], **ANSWERS}), ('prompt', {'prompt': 'p', 'text': 'a'}),
        ('a', {'question': 'q', 'A': 'red', 'B': 'blue', 'answer': 'B'}), ('option_a', {'question': 'q', 'option_a': 1, 'option_b': 2, 'answer': 'b'}),
        ('opa', {'question': 'q', 'opa': 'red', 'opb': 'blue', 'cop': 1}), ('starter_code', {'question': 'q', 'starter_code': 'def f', 'input_output': None}),
        ('body', {'Body': 'Jo has three pens.', 'Question': 'How many?', 'Answer': '3'}),
        ('ctxs', {'messages': [user('q')], 'ctxs': [{'text': 'what the question is about'}], 'answers': ['a']}), ('context', {'context': 'q', 'text': 'a'}),
        ('document', {'conversations': said('q', '')[:1], 'document': 'what the question is about', **ANSWERS})],
    'is neither true': [
        ('label', {'prompt': 'p', 'completion': 'a', 'label': None}), ('good', {'prompt': 'p', 'response': 'a', 'good': 'perhaps'})],
    'may be an answer': [
        ('completions', {'prompt': 'q', 'completions': ['a', 'b'], 'labels': [1, 0]}), ('target_text', {'input': 'q', 'target_text': 'a'}),
        ('better_reply', {'prompt': 'p', 'better_reply': 'a'}),
        ('answers', {'question': 'q', 'answers': {'a': 'x'}}), ('rejected_response', {'prompt': 'q', 'rejected_response': 'b'})],
    'may be the better answer': [
        ('edited_response', {'prompt': 'q', 'response': 'b', 'edited_response': 'a'}), ('expected', {'input': 'q', 'output': 'b', 'expected': 'a'}), ('expected_output', {'input': 'q', 'output': 'b', 'expectedOutput': 'a'})],
    'may mean that the two answers have changed places': [
        ('flipped', pair('p', 'a', 'b') | {'flipped': True}), *((name, pair('p', 'a', 'b') | {name: 'Rejected'}) for name in ('winner', 'majority')),
        ('swapped', {'prompt': 'p', 'response_a': 'a', 'response_b': 'b', 'winner': 'a', 'swapped': 1})],
    'may tell which answers to train on': [
        ('training_detail', {'messages': [user('q'), assistant('a', training_detail=[{'train': False, 'end_offset': 3}])]}),
        *(('mask', {'messages': [user('q'), assistant('a', mask=x), user('q'), assistant('a', mask=y)]}) for x, y in ((True, False), (0, 1), (None, True))),
        *((name, {'messages': TWO_TURNS, name: flags}) for name, flags in (('mask', [0, 0, 0, 1]), ('loss_mask', [False, True]), ('weights', [0.0, 1.0])))],
    'of a message would be lost': [('images', {'messages': [user('q', images=['a.png']), assistant('a')]})],
    'would be lost': [
        ('images', {'messages': [user('q'), assistant('a')], 'images': ['a.png']}), ('image', {'Question': 'q', 'Answer': 'a', 'Image': 'a.png'})],
}
BAD_ROWS = [  # what is said of a row, and rows
    *((f'{name!r} {words}', [row]) for words, rows in OF_COLUMNS.items() for name, row in rows),
    ('a message is no object', [{'winner': 'model_a', 'full_conversation': [{'user': ['q?'], 'model_side_a': assistant('a'), 'model_side_b': assistant('b')}]},
        {'messages': [3]}, {'question': 'q', 'answer': [3]}]),
    ('is a list of texts: write a row for each', [{'question': 'q', 'answer': ['a', 'b']}, {'prompt': 'p', 'chosen': ['a', 'c'], 'rejected': 'b'}, {'prompt': 'p', 'chosen': 'ab', 'rejected': ['a', 'b']}]),
    ('no column has the prompt', [
        {'prompt': None, **ANSWERS}, {'chosen': 'The sky is blue.', 'rejected': 'The sky is green.'}, {'riddle': 'q', 'chosen': 'So: a', 'rejected': 'So: b'},
        {'chosen': 'x\nA: a', 'rejected': 'y\nA: b'}, {'source': 'Guten Tag', 'chosen': 'Good day', 'reject': 'Day good'}]),
    ('only one of', [
        {'prompt': 'ask', 'chosen': 'ask a', 'rejected': 'b'}, {'prompt': 'ask', 'chosen': 'a', 'rejected': ' ask b'},
        {'prompt': 'ask', **CHAT_PAIR, 'rejected': [user('ask'), assistant('b')]}]),
    ("'tools' has a text that is no JSON", [{'prompt': 'p', 'response': 'a', 'tools': '[1'}, {'prompt': 'p', 'response': 'a', 'tools': ['def f(x)']}]),
    ('not an object with named fields', [[], None]),
    ("'chosen' is text and 'rejected' is chat", [{'prompt': 'p', 'chosen': 'a', 'rejected': [assistant('b')]}]),
    ("a message has a part of the type 'thought'", [{'messages': [GEMINI[0], {'role': 'model', 'parts': [{'text': 'a', 'thought': True}]}]}]),
    ("'output' may be an answer", [{'turns': ['q'], 'output': 'a'}]),
    ("'turns' is no list of questions", [{'turns': QA, 'label': 'x'}, {'turns': [{'content': 'q?'}, QA[1]], 'label': 'x'}, {'turns': 3}]),
    ("a message has a part of the type 'image'", [{'messages': [user([{'type': 'image', 'url': 'x'}]), assistant('a')]}]),
    ("'chosen' begins as a chat in JSON does", [{'prompt': 'q', 'chosen': "[{'role': 'user', 'content': 'q'} ...", 'rejected': 'b'}]),
    ("--columns='question=text, response=summary'", [{'text': 'c', 'summary': 'a'}]),
    *((f'{x!r} is neither of response_1 and response_2', [{'prompt': 'q', 'response_1': 'a', 'response_2': 'b', 'preference': x}]) for x in ('-2', '1 is not better', '1 is worse')),
    ("a question has two answers, and 'if_chosen' is true of one: leave", [{'conversation_history': [user('q'), assistant('b', if_chosen=False), assistant('a', if_chosen=True)]}]),
    ("'responses' may be an answer", [{'prompt': 'q', 'responses': ['x', 'y'], 'samples': [{'text': 'a', 'score': n} for n in (1, 2)]}]),
    ("'question' is missing or of the wrong type", [{'question': ['q'], 'answers': [{'pm_score': n, 'text': 'a'} for n in (1, 2)]}]),
    *((f"'text' is one message, as {name!r} says: write a chat a row, as", [{'text': 'q', 'id': '1', name: x}]) for name, x in (('role', 'user'), ('speaker', 'Assistant'))),
    ("a message has 'replies'", [{'prompt': {'role': 'prompter', 'text': 'q', 'replies': [{'role': 'assistant', 'text': 'a'}]}}]),
    ("'llama-7b' is neither of response_a and response_b", [{'prompt': 'q', 'response_a': 'a', 'response_b': 'b', 'winner': 'llama-7b'}]),
    ('all or none must', [{'prompt': 'ask', 'chosen': 'ask a', 'rejected': 'ask b'}]),
    ("written by a chat template already, without the message in 'system'", [{'prompt': '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n', 'chosen': 'b', 'rejected': 'c', 'system': 'Be X.'}]),
    ("the column 'system' and the system message of the chat are not the same", [{'prompt': [system('s'), user('a')], 'system': 't', **CHAT_PAIR}]),
    ("there is a 'system' message and no question", [{'text': 'a', 'system': 'b'}]),
    ("does not end with an answer, but with a message of the role 'narrator'", [{'messages': [user('a'), {'role': 'narrator', 'content': 'b'}]}]),
    ("the 'weight' of a message is 0.5", [{'messages': [user('a'), assistant('b', weight=0.5)]}]),
    ("a message is from 'it'", [{'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'it', 'value': 'b'}]}]),
    ("'prompts' may ask: --columns='prompt=prompts", [{'prompts': 'how many is it', 'chosen': 'So\nAnswer: 4', 'rejected': 'So\nAnswer: 5'}]),
    ("--columns='question=text, response=completion_a'", [{'text': 'q', 'completion_a': 'a', 'completion_b': 'b'}]),
    ('asks something, too', [{'prompt': 'p', 'response': 'a', 'history': [[1]], 'initial_reason_steps': 3}]),
    ('its columns cannot be read', [{'prompt': 'p', 'response': 'a', 'initial_reason_steps': 3}]),
    ("'pm_score' is not a finite number", [{'question': 'q', 'answers': [{'pm_score': math.nan, 'text': 'a'}]}]),
    ('a row of the layout HelpSteer among others', [{'prompt': 'q', 'response': 'a', 'helpfulness': 1}]),
    ("'responses' and 'scores' are not as many texts and numbers", [{'prompt': 'q', 'responses': ['a', 'b'], 'scores': x} for x in ([1], [1, math.nan], [math.inf, 1], [1, 'x'])]),
    ("'choice' is neither 0 nor 1", [{'info': {}, 'summaries': [{'text': 'a'}, {'text': 'b'}], 'choice': 2}]),
    ("'chosen' has half", [{'prompt': 'p', 'chosen': [assistant('\udc00')], 'rejected': []}]),
    ("'prompt' has no messages", [{'prompt': [], 'chosen': [], 'rejected': []}]),
    ("'completion' does not end with an answer", [{'prompt': 'p', 'completion': [user('x')]}]),
    ('not with the same question', [{'chosen': [assistant('x')], 'rejected': [assistant('y')]}, {'chosen': QA, 'rejected': [user('r?'), assistant('b')]}]),
    ("'preference' is not a finite", [{'instruction': 'i', 'output_1': 'a', 'output_2': 'b', 'preference': math.inf}]),
    *((f'{name!r} would be lost', [{'question': 'q', 'answer': 'a', name: 'a.png'}]) for name in ('image_path', 'image_id', 'video_file')),
    ('not as many questions and answers', [{'prompt': ['q?'], 'response_a': ['a'], 'response_b': ['b', 'c'], 'winner_model_a': 1, 'winner_model_b': 0}]),
    ("'answer' is", [{'question': 'q', 'answer': True}, {'question': 'q', 'answer': math.nan}]),
]
# fmt: on


OTHERS = {'id': 7, 'score': 0.5}  # other fields do not matter
ALIKE = [(name, task, row, example) for task, example, rows in SAME for name, row in rows.items()]
ALIKE += [('as it is', None, row, row) for row in OWN]
ALIKE += [(names, task, dict(zip(names.split(), values.split(), strict=True)), PAIR if task == 'pairs' else SFT)
          for (task, values), several in COLUMNS.items() for names in several.split(', ')]  # fmt: skip


@pytest.mark.parametrize('ending', ['.jsonl.gz', '.parquet'])
@pytest.mark.parametrize('name, task, row, example', ALIKE, ids=lambda x: x if isinstance(x, str) else '')
def test_rows_that_are_read_alike(tmp_path, name, task, row, example, ending):
    rows = [row] if task else [row, row | OTHERS]
    examples, left_out = read(tmp_path / f'data{ending}', rows, task=task)
    assert examples == [example] * len(rows)
    assert left_out == ({sources.REPEATED: 2} if name.startswith('repeated') else {})
    assert [x.where.rpartition(' ')[2] for x in examples] == ['1', '2'][: len(rows)]


@pytest.mark.parametrize('ending', ['.json', '.parquet'])
@pytest.mark.parametrize('name, task, rows, expected, out', DATA_SETS, ids=lambda x: x if isinstance(x, str) else '')
def test_data_sets_by_their_columns(tmp_path, name, task, rows, expected, out, ending):
    """Whole, and with the nulls and the filled-up fields that a parquet file has; every example knows where it stands."""
    examples, left_out = read(tmp_path / f'data{ending}', rows, task=task)
    assert examples == expected and +left_out == out and all(x.where for x in examples)


@pytest.mark.parametrize('reason, row', [(reason, row) for reason, rows in BAD_ROWS for row in rows])
def test_bad_rows(tmp_path, row, reason):
    good = pair('p', 'a', 'b')
    path = write(tmp_path / 'data.jsonl', [good, good, row, row])
    message = refusal(path, undivided=True)
    assert message.startswith(f'{path}, line 3: ') and reason in message
    assert '--skip_bad_rows' in message and 'README' in message and len(message) < 620
    if 'all or none' not in message and isinstance(row, dict):
        assert all(repr(key) in message.partition('; found: ')[2] for key in row)
    examples, left_out = load(path, skip_bad_rows=True)
    assert examples == [good] * 2 and list(left_out.values()) == [2] and reason in next(iter(left_out))


TIE, UNUSED, LOST, CHANGED = 'tie', formats.UNUSED, 'asks something, too, which would be lost', 'have changed places'
TWO, LABELLED = {'prompt': 'p', **ANSWERS}, {'prompt': 'p', 'response': 'a'}
BY_VERDICT = ('winner verdict chosen_model_name preferred preference better_response_id safer_response_id overall_response choice label '
              'better_response human_preference human_choice preference_strength overall_preference')  # fmt: skip
NAMED = [  # names that mean the same, a row with a column (or a value) of that name, its examples or what is said
    ('skip skipped exclude excluded discard discarded ignore ignored deleted is_deleted removed invalid', lambda name: {'text': 'a', name: 'yes'}, UNUSED),
    ('valid is_valid usable keep include', lambda name: {'text': 'a', name: 0.0}, UNUSED),
    ('status review_status state', lambda name: {'text': 'a', name: 'Skipped'}, UNUSED), ('discarded skipped invalid', lambda name: {'text': 'a', 'state': name}, UNUSED),
    ('tie is_tie tied draw equal is_equal no_preference', lambda name: TWO | {name: 1}, TIE),
    (f'{BY_VERDICT} status review_status state outcome result majority', lambda name: TWO | {name: 'TIE'}, TIE),
    *((BY_VERDICT, lambda name, x=x: {'prompt': 'q?', 'response_1': 'b', 'response_2': 'a', name: x}, expected) for x, expected in ((2, [PAIR]), (None, TIE))),
    ('{} {}_response response_{} {}_answer answer_{} {}_output {}_completion {}_text text_{} {}_conversations {}_messages',
     lambda name: {'query': 'q?', name.format('win'): 'a', name.format('lose'): 'b'}, [PAIR]),
    ('chosen-rejected accepted-rejected selected-rejected preferred-non_preferred chosen-reject preferred-dispreferred winning-losing win-lose better-worse best-worst y_w-y_l',
     lambda name: dict(zip(['query', *name.split('-')], ['q?', 'a', 'b'], strict=True)), [PAIR]),
    ('flip flipped is_flipped label_flipped swap swapped is_swapped order_swapped reversed rejected_is_better', lambda name: TWO | {name: True}, CHANGED),
    ('context history options choices article passage starter_code chat_history conversation_history dialogue_history dialog_history previous_messages instructions '
     'document documents passages contexts ctxs body story paragraph premise article passage preamble sql_context', lambda name: {'prompt': 'p', name: ['what the question is about'], 'response': 'a'}, LOST),
    ('op opt option choice ans mc_answer ending', lambda name: {'question': 'q', f'{name}a': 'x', f'{name}_b': 'y', 'answer': 'a'}, LOST),
    ('generations responses completions outputs all_generated_responses samples answers', lambda name: {'prompt': 'q?', name: ['b', 'a'], 'scores': [0, 1]}, [PAIR]),
    ('correctness_math_verify correctness_llama correctness is_corrects scores ratings rating rewards all_rm_scores', lambda name: {'prompt': 'q?', 'samples': ['b', 'a'], name: [0, 1]}, [PAIR]),
    ('completion answer response text', lambda name: {'prompt': 'q?', 'samples': [{name: x, 'score': n} for n, x in enumerate('ba')]}, [PAIR]),
    ('fine-grained_score overall_score score pm_score rating reward', lambda name: {'prompt': 'q?', 'samples': [{'text': x, name: n} for n, x in enumerate('ba')]}, [PAIR]),
    *(('good label kto_tag desirable is_safe is_correct is_good is_desirable thumbs_up Liked upvoted', lambda name, x=x: LABELLED | {name: x}, found) for x, found in ((0, [LABELLED | {'good': False}]), (None, 'is neither true'))),
    ('false no 0 0.0 n bad undesirable rejected negative neg incorrect Down 👎🏿', lambda name: LABELLED | {'label': name}, [LABELLED | {'good': False}]),
    ('true yes 1 1.0 Y good desirable chosen positive pos correct up 👍🏽 Thumbs-Up', lambda name: LABELLED | {'label': name}, [LABELLED | {'good': True}]),
    ('split data_split dataset_split set subset fold partition type', lambda name: LABELLED | {name: 'Test'}, [LABELLED, {'drop': formats.FOR_TESTS.format('{name}')}]),
    ('test testing validation valid val dev eval held_out heldout holdout', lambda name: LABELLED | {'set': name}, [LABELLED, {'drop': formats.FOR_TESTS.format('set')}]),
    ('reasoning_content thinking reasoning complex_cot cot', lambda name: {'question': 'q?', name: 'let me think', 'answer': 'a'}, [SFT | {'response': [assistant('a', reasoning_content='let me think')]}]),
    *(('question instruction problem query input', lambda name, x=x: {name: 'q?', x: 'a'}, [SFT]) for x in ('response', 'output', 'solution', 'answer')),
    ('response completion output generation answer', lambda name: {'prompt': 'p', name: 'a'}, [LABELLED]),
    ('messages conversations conversation context_messages trajectory', lambda name: {name: QA}, [SFT]),
    *(('messages conversation', lambda name, x=x: {name: x}, [SFT]) for x in ([['q?', 'a']], [{'user': 'q?'}, {'assistant': 'a'}], 'User: q?\nAssistant: a')),
    ('speaker author sender', lambda name: {'messages': [{name: 'User', 'text': 'q?'}, {name: 'bot', 'text': 'a'}]}, [SFT]),
    ('value text message utterance', lambda name: {'messages': [{'role': 'user', name: 'q?'}, {'role': 'assistant', name: 'a'}]}, [SFT]),
    ('human/assistant user/assistant prompt/response question/answer query/response instruction/output', lambda name: {'conversation': [dict(zip(name.split('/'), ('q?', 'a'), strict=True))]}, [SFT]),
    ('speaker author sender', lambda name: {'messages': [{name: 'Ann', 'text': 'q?'}, {name: 'bot', 'text': 'a'}]}, "a message is from 'Ann'"),
    ('response completion output answer reply target', lambda name: {'prompt': 'p', f'My {name}s': 'a'}, 'may be an answer'),
    ('role from speaker sender author', lambda name: {'text': 'q', name: 'user'}, "'text' is one message"),
    ('response_ answer_ completion_ conversation_ conv_ output_ candidate_ messages_', lambda name: {'prompt': 'q?', f'{name}1': 'b', f'{name}2': 'a', 'winner': '2'}, [PAIR]),
    ('model response answer completion conversation assistant output option', lambda name: {'prompt': 'q?', 'response_a': 'b', 'response_b': 'a', 'winner': f'{name}_b'}, [PAIR]),
    ('b second', lambda name: {'prompt': 'q?', 'response_1': 'b', 'response_2': 'a', 'winner': name}, [PAIR]),
    ('rating score', lambda name: {'prompt': 'q?', 'response_a': 'b', 'response_b': 'a', f'response_a_{name}': 1, f'response_b_{name}': 2}, [PAIR]),
    ('input context system', lambda name: {'question': 'q?', name: math.nan, 'answer': 'a'}, [SFT]),
    ('nan None NULL n/a <noinput>', lambda name: {'question': 'q?', 'input': name, 'answer': 'a'}, [SFT | {'prompt': [user('q?\n\n{name}')]}, {'drop': formats.NO_TEXT.format('input')}]),
    *((f'{who} {who.upper()}', lambda name, x=replies: {'text': f'{name}：q?\n{x}：a'}, [SFT]) for who, replies in (('user', 'model'), ('用户', '助手'), ('问', '答'), ('ユーザー', 'アシスタント'), ('사용자', '어시스턴트'))),
    ('chosen better', lambda name: {'prompt': 'p', name: "['a', 'c']", {'chosen': 'rejected', 'better': 'worse'}[name]: 'b'}, [pair('p', "['a', 'c']", 'b'), {'drop': formats.AS_LIST}]),
    ('response answer', lambda name: {'prompt': 'p', name: '["a", "c"]'}, [LABELLED | {'response': '["a", "c"]'}, {'drop': formats.AS_LIST}]),
    ('corrected edited revised improved preferred expected reference', lambda name: LABELLED | {f'{name}_response': 'b'}, 'may be the better answer'),
    *((names, lambda name, asks=asks: {'messages': [{'role': name if asks else 'user', 'content': 'q?'}, {'role': 'bot' if asks else name.upper(), 'content': 'a'}]}, [SFT]) for asks, names in
      ((True, 'user human prompter question'), (False, 'assistant gpt chatgpt model bot chatbot ai bing bard function_call tool_call function-call'))),
]  # fmt: skip


@pytest.mark.parametrize(
    'names, row_of, expected', NAMED, ids=lambda x: x.partition(' ')[0] if isinstance(x, str) else ''
)
def test_names_that_mean_the_same(names, row_of, expected):
    """Each of them: one that is not known any more would leave its column unread."""
    for name in names.split():
        try:
            first, *others = formats.parse_any(row_of(name))
            first.pop('repeats', None)
            assert repr([first, *others]) == repr(expected).replace('{name}', name), name
        except (ValueError, formats.LeftOut) as reason:
            assert isinstance(expected, str) and expected in str(reason), (name, reason)


@pytest.mark.parametrize('skip', [False, True])
def test_a_verdict_that_makes_others_doubtful_is_not_left_out_alone(tmp_path, skip):
    """0 beside response_1 and response_2: half of the pairs would be upside down if only the rows with 0 went."""
    answers = {'prompt': 'q', 'response_1': 'a', 'response_2': 'b'}
    path = write(tmp_path / 'data.jsonl', [answers | {'winner': winner} for winner in (1, 1, 0, 1)])
    with pytest.raises(UserError, match="line 3: '0' is no number of .*: write one of these names, or tie, there"):
        load(path, skip_bad_rows=skip)


def test_columns_that_the_user_names(tmp_path):
    path, margin = tmp_path / 'data.jsonl', {'margin': 2.0}
    row = {'ask': 'q?', 'tone': 'Be brief.', 'good_answer': 'a', 'bad_answer': 'b', 'prompt': 'not this', 'sure': 2, 'ok': 0,
           'talk': TWO_TURNS, 'text': 'A film.', 'summary': 'Good.'}  # fmt: skip
    mapped = 'question=ask, system=tone,chosen=good_answer, rejected=bad_answer, margin=sure'
    assert read(path, [row, row | {'tone': None}], columns=mapped)[0] == [PAIR | BRIEF | margin, PAIR | margin]
    for columns, example in (
        ('prompt=ask, response=good_answer', {'prompt': 'q?', 'response': 'a'}), ('messages=talk', MULTI),
        ('prompt=ask, response=bad_answer, label=ok', {'prompt': 'q?', 'response': 'b', 'good': False}),
        ('text=text', {'prompt': '', 'response': 'A film.'}),
        ('question=ask, response_1=bad_answer, response_2=good_answer, winner=sure', PAIR),
    ):  # fmt: skip
        assert read(path, [row], columns=columns)[0] == [example]
    assert read(path, [row], columns='question=text', task='prompts')[0] == [{'prompt': [user('A film.')]}]
    assert "'text' is an answer, and no column asks" in refusal(write(path, [{'text': 'A film.'}]), task='prompts')
    for columns, words in (
        ('prompt=ask, chosen=good_answr', "no column 'good_answr'; there are ask, tone, good_answer,"),
        ('promt=ask', "cannot read 'promt=ask': .*names are prompt, question"), ('prompt', "cannot read 'prompt'"),
        ('prompt=ask, prompt=tone', 'each once'), ('chosen=ask, rejected=tone', r"'text=NAME' \(no other is read then\)"),
    ):  # fmt: skip
        assert re.search(words, refusal(write(path, [row]), columns=columns))


def test_rows_are_read_one_by_one(tmp_path, monkeypatch):
    """Where a row alone tells its examples, none waits for the end of the file."""
    taken = []

    def rows(*_, **__):
        for i in range(10_000):
            taken.append(i)
            yield sources.Row({'prompt': f'p{i}', 'response': 'a'})

    monkeypatch.setattr(sources, 'read_rows', rows)
    examples = sources.read_examples(write(tmp_path / 'data.jsonl', []), 'train', Counter(), undivided=True)
    assert next(examples)['prompt'] == 'p0' and len(taken) <= 201


def test_where_every_row_is_bad_it_is_the_layout(tmp_path):
    """Leaving rows out would leave nothing: what was found is said, and what is known."""
    rows = [{'ask': f'q{i}', 'chosen': 'a', 'rejected': 'b'} for i in range(200)]
    path = write(tmp_path / 'data.jsonl', rows)
    message = refusal(path)
    assert message.startswith(f'{path}, line 1: ') and '--skip_bad_rows' not in message and len(message) < 620
    for words in ('none of the first 101 rows', 'layout', "'ask' (text), 'chosen' (text), 'rejected' (text)",
                  'README', "--columns='prompt=NAME, chosen=NAME, rejected=NAME'", 'winner=NAME'):  # fmt: skip
        assert words in message
    assert "the reader 'imdb' is for another one; without 'imdb:' the columns decide" in refusal(f'imdb:{path}')
    for content, words in (
        ([{'winer': 'a', 'answer_a': 'x', 'answer_b': 'y'}], 'the nearest layout, comparison, has answer_a, answer_b, winner'),
        ([{'winer': 'a'}], 'no other column is known; found'),
        *(([dict.fromkeys(map(str, range(n)), 1)], f"'8' (number){more}; the only row") for n, more in ((9, ''), (12, ' and 3 more'))),
        ([{}, {}, {'prompt': 'p', 'response': 'r'}], 'of the 3 rows from there on, 2 are bad: 2 with no columns; mend it'),
        ([{}, {'a': 1}, {'b': 1}, {'prompt': 'p', 'response': 'r'}], "3 are bad: 1 with no columns; 1 with 'a' (number); mend it"),
        (rows[:30] + [{'prompt': 'p', 'response': 'r'}], '--skip_bad_rows'),  # not all of them after all
    ):  # fmt: skip
        assert words in refusal(write(tmp_path / 'data.jsonl', content))
    (tmp_path / 'data.jsonl').write_text('nonsense\n' * 3)
    assert re.search('line 1: not valid JSON.* none of the first 3 rows .* a row is a JSON object', refusal(path))


@pytest.mark.parametrize('rows, words', [
    ([], 'nothing, there are no rows in '), ([{'x': 1}, {'y': 1}], 'no known layout (columns: x, y)'), ([{}], 'no known layout (columns: none)'),
    ([{'x': 1}] * 99 + [pair('p', 'a', 'b')], 'pair, told by chosen (columns: x, prompt, chosen, rejected)')])  # fmt: skip
def test_how_a_source_is_read_is_said(tmp_path, rows, words):
    path = write(tmp_path / 'data.jsonl', rows)
    assert sources.describe(path) == words + path * words.endswith('in ')
    assert sources.describe(f'imdb:{raw("imdb")}') == "the reader 'imdb'"
    # and whether a part of its rows is held out
    assert sources.divides(path) == sources.divides(str(tmp_path)) and sources.divides(path)
    write(tmp_path / 'test.jsonl', [TEXTS])
    assert sources.divides(path) and not sources.divides(str(tmp_path))


def test_columns_that_are_not_read_are_said(tmp_path, capsys):
    """Not of a layout that compares all rows."""
    # tools are no messages
    rows = [sources.Row({'messages': QA, 'tools': tools}) for tools in ([3], [F | {'ok': True}], [F | {'ok': False}])]
    assert formats.unread_texts(rows, formats.layout_of(frozenset(rows[0])))[0] == []
    for row in (TEXTS, {'prompt': 'p', 'response': 'a', 'helpfulness': 1}):
        sources.say_once.cache_clear()
        read(tmp_path / 'data.jsonl', [row | {'extra': f'the extra one is {i}'} for i in range(9)])
        assert ('note: columns not read: extra; if they' in capsys.readouterr().out) == (row is TEXTS)


@pytest.mark.parametrize('row', [{}, {'response': 'it is this'}, {'chosen': 'it is this', 'rejected': 'it is that'}])
def test_columns_that_may_ask_or_answer(row):
    """Texts of four words, different in most rows, of which no example has anything."""
    texts = {'prompt': 'what the sum', 'extra': 'the extra one', 'short': 'short number', 'whole': 'Q: what the sum'}
    few = {'topic': 'sums of two or three numbers', 'level': 3} | row
    rows = [sources.Row({name: f'{text} {i}' for name, text in texts.items()} | few) for i in range(9)]
    for i, labelled in enumerate(rows):
        labelled |= {'meta': {'by': f'one of the {i} authors'}, 'votes': [{'for': f'this one by number {i}'}]}
    layout, others = formats.layout_of(frozenset(rows[0])), [sources.Row(few | {'prompt': 'p'})] * 4
    for found, rows_with in ((['extra'], rows), (['extra'], rows[:5] + others), ([], rows[:4] + others)):
        assert formats.unread_texts(rows_with, layout)[0] == found
    # a long one, although it is the same in all rows
    pirate = {'persona': 'you are a pirate of fifty who says arr'} | few
    rows = [sources.Row({'prompt': f'what is {i}'} | pirate) for i in range(9)]
    assert formats.unread_texts(rows, formats.layout_of(frozenset(rows[0])))[0] == ['persona']
    # HTML is not shown as it stands, and ties are not shown
    html = {'question': 'this is &lt; my ', 'answers': [{'pm_score': n, 'text': f'answer {n}'} for n in (1, 2)]}
    for other in (html, {'question': 'this is my ', 'response_a': 'a', 'response_b': 'b', 'winner': 'tie'}):
        rows = [sources.Row(other | {'question': f'{other["question"]}{i}'}) for i in range(9)]
        assert formats.unread_texts(rows, formats.layout_of(frozenset(formats.unified(rows[0]))))[0] == []
    rows = [sources.Row(pair(f'Q: {i}?\nA:', f'Q: {i}?\nA: yes', f'Q: {i}?\nA: no')) for i in range(9)]
    assert formats.unread_texts(rows, formats.layout_of(frozenset(rows[0])))[0] == []
    # flags of which both values occur, but no labels that are read, and no numbers that only begin with 0 and 1; grades; and
    # verdicts beside a pair, but no topics, strengths or states
    judges = {'quality': 'Good', 'winner': 'B', 'preference': 2, 'choice': 'maths', 'status': 'done', 'lang': 'no'}
    judges |= {'overall_preference': -3, 'depth': -1}
    for answers, unread in (
        ({'response': 'a'}, ['ok', 'sure', 'said', 'vote', 'quality']),
        (ANSWERS, ['ok', 'sure', 'label', 'said', 'vote', 'quality', 'winner', 'preference']),
    ):
        rows = []
        for i in range(3):
            flags = {'id': i, 'on': 1, 'ok': i > 0, 'sure': float(i > 0), 'label': 0**i, 'said': ('yes', 'no')[i % 2]}
            flags['vote'] = (1, -1)[i % 2]
            rows.append(sources.Row({'prompt': 'bad', **answers, **flags, **judges}))
        assert formats.unread_texts(rows, formats.layout_of(frozenset(rows[0])))[0] == unread


@pytest.mark.parametrize('name, first, later, count', [
    ('grade', 'excellent', 'Poor', 30), ('ok', True, False, 30), ('ok', 'no', 'yes', 30), ('topic', 'x', 'y', 0), ('number', 5, 1, 0),
    ('winner', 'x', 'y', 0)])  # fmt: skip
def test_a_column_that_judges_later_rows_alone(tmp_path, capsys, name, first, later, count):
    """Its first hundred rows do not show it: the others are counted."""
    rows = [pair(f'p{i}', 'a', 'b') | {name: later if i >= 120 else first} for i in range(150)]
    examples, left_out = read(tmp_path / 'data.jsonl', rows)
    assert len(examples) == 150 and +left_out == ({formats.JUDGES.format(name): count} if count else {})
    assert 'not read' not in capsys.readouterr().out


@pytest.mark.parametrize('field, first, second, named', [
    ('liked', True, False, True), ('rating', 'ok', 'thumbs_down', True), ('score', 1, 0, True), ('Thumb', 5, 1, True), ('toxic', False, False, False), ('model', 'x', 'y', False)])  # fmt: skip
def test_fields_of_messages_that_judge_are_named(tmp_path, capsys, field, first, second, named):
    sources.say_once.cache_clear()
    chat = [user('a'), assistant('good') | {field: first}, user('q?'), assistant('b') | {field: second}]
    assert len(read(tmp_path / 'data.jsonl', [{'messages': chat}] * 3)[0]) == 3
    assert (f'columns not read: {field} of messages;' in capsys.readouterr().out) is named


@pytest.mark.parametrize('column, named', [
    ('label', True), ('sentiment', True), ('stars', True), ('source', False), ('user', True), ('Sender', True), ('author', False)])  # fmt: skip
def test_the_class_of_a_text_is_named(tmp_path, capsys, column, named):
    sources.say_once.cache_clear()
    read(tmp_path / 'data.jsonl', [{'text': f'text {i}', column: 3} for i in range(9)], task='sft')
    assert (f'columns not read: {column};' in capsys.readouterr().out) is named


@pytest.mark.parametrize('column, named', [('persona', True), ('Rubric', True), ('topic', False)])
def test_what_an_answer_should_be_like_is_named(tmp_path, capsys, column, named):
    sources.say_once.cache_clear()
    rows = [{'prompt': f'p {i}', 'response': f'a {i}', column: 'a helpful pirate'} for i in range(9)]
    read(tmp_path / 'data.jsonl', rows, task='sft')
    assert (f'columns not read: {column};' in capsys.readouterr().out) is named


@pytest.mark.parametrize('line, named', [
    ('[12/1/24, 10:00] Ann Lee: hi', True), ('[12/01/2024, 10:00:05 AM] Ann: hi', True), ('12/1/24, 10:02 - Ann: hi', True),
    ('2024-01-12 10:02 Ann: hi', True), ('At 10:00: hi', False), ('1/2/3 are numbers: so', False)])  # fmt: skip
def test_lines_of_a_chat_are_said(tmp_path, line, named):
    (tmp_path / 'chat.txt').write_text(f'{line}\n' * 3)
    examples, left_out = sources.load_rows(str(tmp_path / 'chat.txt'), 'train', task='sft', undivided=True)
    assert [example['response'] for example in examples] == [line] * 3 and left_out == (
        {formats.LINES: 3} if named else {}
    )


@pytest.mark.parametrize('name, verdicts, reads', [
    ('winner', (1, -1), False), ('preference', ('1', '-1.0', None), False), ('winner', (1, -1, 2), True), ('winner', (1, -1, 'tie'), True),
    ('preference_strength', (1, -1), True), ('winner', (1, 1), True), ('winner', (-1, -1, 1), False), ('label', (1, -1), True)])  # fmt: skip
def test_verdicts_that_may_be_signs(tmp_path, name, verdicts, reads):
    """1 and -1 alone do not say which answer is meant; beside other verdicts -1 is a tie."""
    rows = [{'prompt': f'p {i}', 'response_1': 'a', 'response_2': 'b', name: x} for i, x in enumerate(verdicts)]
    if name == 'label':  # beside the verdict that counts
        rows = [row | {'winner': 'a'} for row in rows]
    path = write(tmp_path / 'data.jsonl', rows)
    for columns in (None, f'prompt=prompt, response_1=response_1, response_2=response_2, winner={name}'):
        if reads and name == 'winner':
            assert load(path, columns=columns)[0]
        elif not reads:
            with pytest.raises(
                UserError,
                match=r'data.jsonl, line 1: .* is 1 and -1 alone, which names neither .* or call the column preference_st',
            ):
                load(path, columns=columns)
            assert len(load(path, columns=columns, task='prompts')[0]) == len(verdicts)  # no verdict is needed
    # its sign is the lead of the second answer
    if name == 'preference_strength':
        assert [example['chosen'][0]['content'] for example in load(path)[0]] == ['b', 'a']


LINKS = ('parent parent_id parent_message_id reply_to in_reply_to previous_id prev_id reply_to_id in_response_to_tweet_id '
         'conversation_id conv_id dialogue_id dialog_id chat_id thread_id session_id thread_ts')  # fmt: skip


@pytest.mark.parametrize('link', LINKS.split())
def test_columns_that_link_rows_are_named(link):
    """Of a conversation only if its rows do not begin with the same question: then each has what was said before."""
    first, later = pair('What is it?', 'A cat.', 'A dog.'), pair('And its name?', 'Tom.', 'Rex.')
    whole = pair([user('What is it?'), assistant('A cat.'), user('Why?')], 'So.', 'Or so.')
    is_parent = bool(formats.PARENTS.fullmatch(link))
    for rows, is_named in (([first, later], True), ([first, whole], is_parent), ([first, first], is_parent)):
        rows = [sources.Row(row | {'id': f'r{i}', link: (None, 'x')[i or not is_parent]}) for i, row in enumerate(rows)]
        assert formats.unread_texts(rows, formats.layout_of(frozenset(rows[0])))[0] == [link] * is_named
    rows = [sources.Row(row | {link: None}) for row in (first, later)]
    assert formats.unread_texts(rows, formats.layout_of(frozenset(rows[0])))[0] == []


@pytest.mark.parametrize('row, named', [
    ({'text': 'a', 'Thread ID': 'x'}, 'Thread ID'), ({'text': 'a', 'threadId': None}, ''), ({'question': 'q', 'answer': 'a', 'My Score': 1}, 'My Score'),
    ({'messages': QA, 'reward': 0.5}, 'reward'), ({'chosen': QA, 'rejected': QA, 'score': 1}, ''),
    ({'messages': QA, 'metadata': {'system': 'you are the number', 'seed': 'one two three four'}}, 'system of metadata'),
    ({'instruction': 'q', 'items': [{'input': 'this is the number', 'output': 'a'}]}, 'input of items'),
    ({'messages': QA, 'metadata': {'input': 'q?', 'output': 'a'}}, ''), ({'prompt': 'p', 'completions': [{'answer': 'one of them all', 'score': 1}]}, '')])  # fmt: skip
def test_columns_are_named_as_the_file_spells_them(tmp_path, capsys, row, named):
    """Rows of one thread, scores of single answers, and what objects ask or answer."""
    sources.say_once.cache_clear()
    rows = [
        json.dumps(row)
        .replace(': 1', f': {i}')
        .replace('0.5', f'0.{i}')
        .replace('number', f'number {i}')
        .replace('"a"', f'"a {i}"')
        for i in range(1, 5)
    ]
    read(tmp_path / 'data.jsonl', [json.loads(text) for text in rows], task='prompts' if 'completions' in row else None)
    out = capsys.readouterr().out
    assert out.startswith(f'note: columns not read: {named};') if named else 'not read' not in out


def test_rows_for_tests_are_named_as_the_file_spells_them(tmp_path):
    _, left_out = read(tmp_path / 'data.jsonl', [pair('p', 'a', 'b') | {'Split': 'Test'}])
    assert left_out == {formats.FOR_TESTS.format('Split'): 1}


@pytest.mark.parametrize('task', ['pairs', 'sft', None])
@pytest.mark.parametrize('name', ['shp', 'se', 'oasst', 'ultrafeedback', 'hh'])
def test_a_named_dataset_is_read_by_its_columns(tmp_path, name, task):
    """As a bare path the same examples come out, but for other languages than English."""
    text = Path(raw(name)).read_text()
    rows = [row for row in map(json.loads, text.splitlines()) if row.get('lang', 'en') == 'en']
    path = write(tmp_path / 'data.jsonl', rows)
    named, bare = (load(source, skip_bad_rows=True, task=task)[0] for source in (f'{name}:{path}', path))
    assert named == bare and named


def test_answers_that_begin_with_the_prompt_by_chance(tmp_path):
    """Where other rows do not repeat it, nobody knows: such rows are refused, or left out and counted, in both parts."""
    rows = [pair(f'p{i}:', ' a', ' b') for i in range(99)]
    path = write(tmp_path / 'data.jsonl', rows + [pair('Hi', 'Hi there', 'Hi!')])
    mixed = 'answers that begin with their prompt among others that do not: all or none must'
    for split in ('train', 'test'):
        assert f'line 100: {mixed}' in refusal(path, split)
    parts = [sources.load_rows(path, split, skip_bad_rows=True) for split in ('train', 'test')]
    assert sum(len(examples) for examples, _ in parts) == 99
    assert all('Hi' not in {x['prompt'] for x in examples} for examples, _ in parts)
    assert all(left_out == {f'bad rows: {mixed}': 1} for _, left_out in parts)


# ---- files ----


def test_broken_and_blank_lines(tmp_path):
    good = b'{"prompt": "p", "response": "a"}'
    broken = [b'nonsense', b'{"prompt": "\xff\xfe"}', b'{"prompt": "\xed\xa0\x80"}', b'[' * 100_000]
    lines = [b'\xef\xbb\xbf' + good, b'{"prompt": "p", ', b'', good + b'\r', b'  ', *broken]
    for name, packed in (('data.jsonl', bytes), ('data.jsonl.gz', gzip.compress)):
        path = tmp_path / name
        path.write_bytes(packed(b'\n'.join(lines)))
        message = refusal(str(path), undivided=True)
        assert re.match(re.escape(str(path)) + r', line 2: not valid JSON \([^)]*\)', message)
        examples, left_out = load(str(path), skip_bad_rows=True)
        assert len(examples) == 2 and left_out.total() == 5


@pytest.mark.parametrize('start', ['Below is an instruction', 'Human', '', '**'])
@pytest.mark.parametrize('sign', ['!', ' ', '#', ':'])
def test_no_text_takes_long(start, sign):
    """How a dialogue begins is a pattern, which must not try all ways to divide a long row of signs."""
    began = process_time()
    with contextlib.suppress(ValueError):  # a text of spaces is empty
        formats.parse_any({'text': start + sign * (9_000_000 if sign == '!' else 200_000)}, 'sft')
    assert process_time() - began < 5


def test_times_in_messages(tmp_path):
    """WildChat's times become texts."""
    answer = assistant('a') | {'timestamp': datetime(2024, 1, 1)}
    examples, _ = read(tmp_path / 'data.parquet', [{'conversation': [user('q?') | {'timestamp': None}, answer]}])
    assert json.loads(json.dumps(examples)) == [SFT | {'response': [answer | {'timestamp': '2024-01-01 00:00:00'}]}]


@pytest.mark.parametrize('source', 'nothing missing.jsonl some/missing.jsonl a/b/c hhh HH nothing:missing'.split())
def test_unknown_sources(source):
    message = refusal(source)
    assert repr(source) in message and 'the known datasets' in message
    known = message.rpartition(': ')[2].split(', ')
    assert known == sorted(known) and {*RAWS, 'toy', 'hh_helpful'} <= set(known)


@pytest.mark.parametrize('source', ['hh:missing.jsonl', 'annotations:missing.json'])
def test_missing_paths(source):
    # the second comes first where tokens are cached
    for read_it in (partial(sources.load_rows, split='train'), sources.fingerprint):
        with pytest.raises(UserError, match='no file or folder .*missing'):
            read_it(source)


@pytest.mark.parametrize('ending', ['.txt', '.csv', '.tsv'])
def test_utf_16_without_its_mark(tmp_path, ending):
    """Each of its bytes is UTF-8."""
    path = tmp_path / f'data{ending}'
    path.write_bytes('text\nhello\n'.encode('utf-16-le'))
    message = refusal(str(path))
    assert 'save the file as UTF-8' in message and ('a NUL is in it' in message) == (ending == '.txt')


def test_what_json_has_no_form_for(tmp_path):
    """Bytes are text that its writer has not marked as such; those that are none, in a column that is read, are refused."""
    good = {'prompt': b'p', 'response': 'ä'.encode(), 'other': b'\xff', 'at': time(1)}
    examples, _ = read(tmp_path / 'data.parquet', [good])
    assert examples == [{'prompt': 'p', 'response': 'ä'}] and examples[0].raw['at'] == '01:00:00'
    assert "'response' has half a surrogate pair" in refusal(
        write(tmp_path / 'bad.parquet', [good | {'response': b'\xff'}])
    )
    chat = [user('q?'), assistant('a') | {'at': time(1), 'took': timedelta(1)}]
    examples, _ = sources.load_rows(write(tmp_path / 'chat.parquet', [{'messages': chat}]), 'train')
    assert examples[0]['response'] == [assistant('a') | {'at': '01:00:00', 'took': '1 day, 0:00:00'}]


# ---- training and test rows ----


def pairs(n, prompts):
    return [pair(f'p{i % prompts}', f'a{i}', 'b') for i in range(n)]


def answers(source, split, **options):
    return [x.get('chosen') or x['response'] for x in sources.load_rows(source, split, **options)[0]]


def assert_divided(source, rows):
    """Train and test rows: all of them, each once, in order, about 1 in 20 of the prompts for testing."""
    train, test = (sources.load_rows(source, split)[0] for split in ('train', 'test'))
    in_train, in_test = ({str(x['prompt']) for x in part} for part in (train, test))
    assert len(train) + len(test) == len(rows) and not in_train & in_test
    position = {str(x): i for i, x in enumerate(rows)}
    for part in (train, test):
        order = [position[str(x)] for x in part]
        assert order == sorted(set(order))
    assert 0.02 < len(in_test) / len(in_train | in_test) < 0.09


def test_one_file_is_divided_by_its_prompts(tmp_path):
    rows = pairs(2000, prompts=500)
    path = write(tmp_path / 'data.jsonl', rows)
    assert_divided(path, rows)
    assert load(path)[0] == load(path, 'test')[0] == rows
    chats = [{'prompt': [user(row['prompt'])], 'response': [assistant(row['chosen'])]} for row in rows]
    assert_divided(write(tmp_path / 'chats.jsonl', chats), chats)
    films = [{'text': f'film {i}', 'chosen': f'film {i} good', 'rejected': f'film {i} bad'} for i in range(500)]
    cut = [pair(row['text'], ' good', ' bad') for row in films]
    assert_divided('imdb:' + write(tmp_path / 'imdb.jsonl', films), cut)
    # which prompts are held out depends on the prompts alone
    path, other = (write(tmp_path / name, x) for name, x in (('a.jsonl', rows), ('b.json', rows[::-1] + pairs(9, 9))))
    held_out = [{x['prompt'] for x in sources.load_rows(source, 'test')[0]} for source in (path, other)]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize('name', ['se', 'sharegpt', 'owner/name'])
def test_a_dataset_without_a_test_split_is_divided(hub, tmp_path, name):
    """On the hub, and as a reader's folder, whatever its files are called."""
    hub.splits = ['train']
    replies = [{'pm_score': 1, 'text': 'x'}, {'pm_score': 2, 'text': 'y'}]
    hub.rows = [{'question': f'q{i}', 'answers': replies, 'conversations': said(f'a{i}', 'b')} for i in range(500)]
    for site, part in (('a', hub.rows[:250]), ('test', hub.rows[250:])):
        (tmp_path / site).mkdir()
        write(tmp_path / site / 'part.jsonl', part)
    for source in [name] if '/' in name else [name, f'{name}:{tmp_path}']:
        train, test = ({str(x['prompt']) for x in sources.load_rows(source, split)[0]} for split in ('train', 'test'))
        assert len(train) + len(test) == 500 and not train & test and 10 < len(test) < 45
        assert len(load(source, 'test')[0]) == 500


def test_a_reader_takes_the_split_of_its_name(tmp_path):
    """As the repositories of UltraFeedback and UltraChat are laid out."""
    for split in ('train', 'test'):
        for kind in ('prefs', 'sft', 'gen'):
            write(tmp_path / f'{split}_{kind}-00000.parquet', [{'text': f'{split} {kind}'}])
    for split in ('train', 'test'):
        assert answers(f'ultrafeedback:{tmp_path}', split) == [f'{split} prefs']
    assert len(sources.files.data_files(str(tmp_path))) == 6


def test_clones_of_datasets(tmp_path):
    """HH has its parts apart; oasst has a part for validation."""
    for part in ('harmless', 'helpful'):
        (tmp_path / f'{part}-base').mkdir()
        for split in ('train', 'test'):
            talk = messages.ask(f'{part} {split}')
            write(tmp_path / f'{part}-base/{split}.jsonl.gz', [{'chosen': talk + ' a', 'rejected': talk + ' b'}])

    def prompts(name, split):
        return sorted(row['prompt'].split()[1] for row in sources.load_rows(f'{name}:{tmp_path}', split)[0])

    assert prompts('hh_harmless', 'train') == ['harmless'] and prompts('hh_helpful', 'test') == ['helpful']
    assert prompts('hh', 'test') == ['harmless', 'helpful']
    (tmp_path / 'trees').mkdir()
    rows = [json.loads(line) for line in Path(raw('oasst')).read_text().splitlines()]
    write(tmp_path / 'trees/train.jsonl', rows[:7])
    write(tmp_path / 'trees/validation.jsonl', rows)
    source = f'oasst:{tmp_path}/trees'
    assert [len(sources.load_rows(source, s, skip_bad_rows=True)[0]) for s in ('train', 'test')] == [2, 3]
    assert sources.fingerprint(source)


# ---- hashes ----


def test_fingerprints(tmp_path, monkeypatch):
    path = write(tmp_path / 'data.jsonl', [{'text': 'a'}])
    for name in ('train.jsonl', 'b_train.jsonl', 'test.jsonl'):
        write(tmp_path / name, [{'text': name}])

    def stamps():
        return [sources.fingerprint(name) for name in (path, f'hh:{path}', str(tmp_path))]

    before = stamps()
    assert None not in before and len(set(before)) == 3 and before == stamps()
    assert sources.fingerprint('toy') and sources.fingerprint('owner/name') is None
    # a renamed file is of another split
    (tmp_path / 'b_train.jsonl').rename(tmp_path / 'b_test.jsonl')
    assert [a == b for a, b in zip(before, stamps(), strict=True)] == [True, True, False]
    write(tmp_path / 'data.jsonl', [{'text': 'x'}])
    assert [a == b for a, b in zip(before, stamps(), strict=True)] == [False] * 3
    # a file that cannot be opened is named, and not its folder
    monkeypatch.setattr(sources, 'file_hash', lambda file: open(f'{file}/'))
    with pytest.raises(UserError, match='cannot read .*/b_test.jsonl/: Not a directory'):
        sources.fingerprint(str(tmp_path))


def test_a_folder_that_is_called_like_a_dataset_is_not_its_fingerprint(hub, tmp_path, monkeypatch, capsys):
    """What is read decides what it is known by, and the user is told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'hh').mkdir()
    row = {'chosen': EGG + ' a', 'rejected': EGG + ' b'}
    hub.rows = [row] * 3
    write(tmp_path / 'hh' / 'train.jsonl', [row])
    sources.say_once.cache_clear()
    assert sources.fingerprint('hh') is None and len(sources.load_rows('hh', 'train')[0]) == 3
    assert capsys.readouterr().out.count("note: 'hh' is the dataset of that name") == 1
    assert sources.fingerprint('./hh') and len(load('./hh')[0]) == 1 and len(hub.asked) == 1
    # nor is a path behind the name of a reader a config of that folder
    assert len(load('hh:hh/train.jsonl')[0]) == 1 and len(hub.asked) == 1


# ---- any row ----


@pytest.mark.parametrize('name', RAWS)
def test_whatever_a_row_lacks_it_is_bad_or_good_and_nothing_else(tmp_path, hub, name):
    text = Path(raw(name)).read_text()
    rows = json.loads(text) if text.startswith('[') else [json.loads(line) for line in text.splitlines()]
    for i, row in enumerate(rows):
        lacking = [{k: v for k, v in row.items() if k != key} for key in row]
        for wrong in lacking + [{**row, key: v} for key in row for v in (None, 7, 'x', [], [7], [[]], [{}])]:
            hub.rows = rows[:i] + [wrong] + rows[i + 1 :]
            source = f'{name}:' + write(tmp_path / 'rows.json', hub.rows) if name == 'annotations' else name
            examples, left_out = load(source, skip_bad_rows=True)
            assert all({'prompt'} <= set(x) <= {'prompt', 'chosen', 'rejected', 'response'} for x in examples)


CONTENT = st.none() | st.booleans() | st.integers() | st.text(max_size=4)
ANY = st.recursive(CONTENT, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x), max_leaves=4)
ROLE = st.sampled_from(['user', 'assistant'])
CHAT = st.lists(st.fixed_dictionaries({'role': ROLE, 'content': st.text(max_size=2)}), max_size=3)
NUMBERS = st.sampled_from([0, 1, 2, -1, 0.5, True, None, math.nan, 10**400])
LISTS = st.lists(NUMBERS, max_size=2) | st.lists(st.text(max_size=2), max_size=2)
VALUE = st.text(max_size=4) | CHAT | ANY | NUMBERS | LISTS
FIELDS = ['prompt', 'chosen', 'rejected', 'response', 'good', 'completion', 'label', 'messages', 'text', 'preference']
FIELDS += ['output_1', 'output_2', 'instruction', 'tools', 'system', 'history']
LAYOUT = st.sampled_from(formats.LAYOUTS).map(lambda layout: dict.fromkeys(sorted(layout.columns | {'prompt'}), VALUE))
ROWS = st.dictionaries(st.sampled_from(FIELDS), VALUE) | LAYOUT.flatmap(st.fixed_dictionaries)


@settings(max_examples=500, deadline=None, database=None)
@given(ROWS, st.sampled_from([None, 'pairs', 'sft', 'prompts']))
def test_any_row_parses_or_is_bad(row, task):
    """Of every layout, with anything in its columns."""
    for _, found in sources._parsed([sources.Row(row)], None, task, None):
        assert isinstance(found, list) or (isinstance(found, ValueError) and str(found))
        for example in found if isinstance(found, list) else ():
            if 'drop' not in example:
                assert isinstance(example['prompt'], str | list)
                assert {type(example[k]) for k in ('chosen', 'rejected', 'response') if k in example} <= {str, list}
                assert isinstance(example.get('good', True), bool)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(VALUE | st.dictionaries(st.sampled_from(FIELDS), VALUE, max_size=4), max_size=4))
def test_any_file_is_read_row_by_row(tmp_path_factory, rows):
    """What comes out is what parse_any makes of each row; every other row is counted, and the first of them named."""
    assume(not (rows and isinstance(rows[0], list)))  # such a file is one list of rows
    path = write(tmp_path_factory.mktemp('rows') / 'data.jsonl', rows)
    alone = formats.each((sources.Row.of(json.loads(json.dumps(row)), '') for row in rows), formats.parse_any)
    found = [examples for _, examples in alone]
    bad = sum(isinstance(examples, ValueError) for examples in found)
    expected = [example for examples in found if isinstance(examples, list) for example in examples]
    assume(not any(x.pop('repeats', False) for x in expected))  # which is judged by the file
    examples, left_out = load(path, skip_bad_rows=True)
    assert examples == [x for x in expected if 'drop' not in x]
    # one note is of the file
    of_rows = [n for reason, n in left_out.items() if not reason.startswith(formats.LACKING.partition('{')[0])]
    assert sum(of_rows) == bad + sum('drop' in x for x in expected)
    assert sum(n for reason, n in left_out.items() if reason.startswith('bad rows')) == bad
    if bad:
        with pytest.raises(UserError, match=r'data\.jsonl, line \d+: '):
            load(path)


ANSWER = st.sampled_from(['prompt', 'instruction', 'output', 'response', 'generator', 'sample', 'index', 'finish'])


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.dictionaries(ANSWER, VALUE), min_size=1, max_size=4))
def test_any_file_of_answers(tmp_path_factory, rows):
    """read_answers and collect: all rows as they are, or the line that is wrong."""
    folder = tmp_path_factory.mktemp('answers')
    path = write(folder / 'samples.jsonl', rows)
    before = Path(path).read_bytes()
    try:
        found = read_answers(path, Counter())
        assert [x['response'] for x in found] == [x['output' if 'instruction' in x else 'response'] for x in rows]
        assert all(type(x['sample']) is int and isinstance(x['instruction'], str) for x in found)
    except UserError as error:
        assert re.search(r'samples\.jsonl, line \d+: ', str(error))
    try:
        kept = collect(folder, lambda i, k: {} if 0 <= i < 9 and 0 <= k < 9 else None)
        # as texts, since NaN is not equal to itself
        assert {repr(row) for row in kept.values()} <= set(map(repr, rows))
        assert all(isinstance(row['response'], str) for row in kept.values())
    except UserError as error:
        assert re.search(r'samples\.jsonl, line \d+, ', str(error)) and Path(path).read_bytes() == before


def test_an_answer_to_a_question_that_is_not_there(tmp_path):
    file = write(
        tmp_path / 'd.jsonl', [{'message_id': '2', 'parent_id': '1', 'text': 'a', 'role': 'assistant', 'rank': 0}]
    )
    assert 'the conversation above the answer is not whole' in refusal(file, task='sft')


def test_one_prompt_in_twenty_is_held_out(tmp_path):
    """The same ones for ever: another rule would train on what earlier runs were evaluated on."""
    held_out, _ = sources.load_rows(write(tmp_path / 'd.jsonl', pairs(100, prompts=100)), 'test')
    assert [x['prompt'] for x in held_out] == ['p2', 'p12', 'p24', 'p58']


def test_texts_and_no_messages_become_chats():
    assert messages.as_chats({'prompt': 'q?', 'response': 'a'}) == SFT
    assert messages.as_chats({'prompt': []}, 'Be brief.') == {'prompt': [system('Be brief.')]}
    assert messages.instruction('\n\nHuman: q?') == '\n\nHuman: q?'


def test_what_stands_beside_a_prompt_alone_is_named():
    rows = [sources.Row({'query': f'q{i}?', 'answers': f'the answer number {i}', 'checked': i > 1}) for i in range(9)]
    assert formats.unread_texts(rows, formats.layout_of(frozenset({'query'})))[0] == ['answers', 'checked']


def test_what_a_reward_function_needs_is_no_answer(tmp_path):
    path = write(tmp_path / 'd.jsonl', [{'context_messages': ASKS, 'label': '34'}])
    assert "'label' is neither true (1) nor false" in refusal(path, task='sft')


@pytest.mark.parametrize('extra, unread', [  # of row i, whose prompt is 'what is the sum of {i}'
    (lambda i: [f'the extra one is {i}'], ['extra']), (lambda i: [user(f'the extra one is {i}')], ['extra']), (lambda i: f'the sum of {i}', []),
    (lambda i: [f'the extra one is {i}'] * 5 + [f'what is the sum of {i}'], [])])  # fmt: skip
def test_columns_that_an_example_shows(extra, unread):
    rows = [sources.Row({'prompt': f'what is the sum of {i}', 'response': 'a', 'extra': extra(i)}) for i in range(9)]
    assert formats.unread_texts(rows, formats.layout_of(frozenset(rows[0])))[0] == unread


def test_columns_that_may_judge_later_rows():
    """Neither one that is read, nor one of many values."""
    row = {'prompt': 'q?', 'response_a': 'a', 'response_b': 'b', 'winner': 'a', 'sentiment': 3, 'tone': 'x'}
    rows = [sources.Row(row | {'author': f'x{i}'}) for i in range(11)]
    unread, later = formats.unread_texts(rows, formats.layout_of(frozenset(row)))
    judges = [columns for note, columns, words in later if words]
    assert unread == [] and judges == [['sentiment'], ['tone'], ['role of messages']]


def test_how_a_source_is_found(tmp_path):
    path = write(
        tmp_path / 'a[1]b.jsonl', [{'text': 'f', 'chosen': 'f a', 'rejected': 'f b', 'q': 'p', 'x': 'c', 'y': 'd'}]
    )
    assert sources.locate(path) == (None, path, None)
    # --columns counts in place of a reader, and nothing is said of the columns of no rows
    named = {'columns': 'prompt=q, chosen=x, rejected=y'}
    assert load(f'imdb:{path}', **named)[0] == [pair('p', 'c', 'd')]
    (tmp_path / 'none.jsonl').write_text('')
    assert not load(str(tmp_path / 'none.jsonl'), **named)[0]
    # a file to be written may be there if it is none of the data
    sources.keep_data(path, str(tmp_path / 'none.jsonl'))
    (tmp_path / 'parts').mkdir()
    for name in ('train', 'validation'):
        write(tmp_path / 'parts' / f'{name}.jsonl', [{'text': name}])
    assert load(str(tmp_path / 'parts'), 'test')[0][0]['response'] == 'validation'
    for source in ('./missing', 'missing/*'):
        assert 'is no file or folder' in refusal(source) and 'known datasets: alpaca_eval, annotations, hh,' in refusal(
            source
        )


def test_a_row_of_which_nothing_is_made_is_no_sign_of_a_wrong_layout(monkeypatch):
    def parse(row):
        return [TEXTS][: row['n']] if row['n'] < 2 else int('no number')

    rows = [{'n': n} for n in (1, 0, 2, 2)]
    monkeypatch.setattr(sources, 'get_mine', lambda split, path=None: (rows, parse), raising=False)
    assert 'mend it, or leave such rows out with --skip_bad_rows' in refusal('mine', undivided=True)


def test_a_folder_here_is_no_part_of_a_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'helpful-base').mkdir()
    assert sources.get_hh_helpful.local_path(None) is None


@pytest.mark.parametrize('rows, expected', [
    ([{'Prompt': 'p', 'chosenResponse': 'a', 'rejected-response': 'b'}], pair('p', 'a', 'b')),
    # two names that would be one stay as they are, and the others do not
    ([{'Prompt': 'p', 'chosen': 'a', 'Chosen': 'z', 'Rejected': 'b'}], pair('p', 'a', 'b')),
    ([{'Question': 'q', 'Answer': 'a', 'isSafe': False}], {'prompt': [user('q')], 'response': [assistant('a')], 'good': False}),
    ([{'prompt': 'p', 'response': 'a', 'label': '👍'}], {'prompt': 'p', 'response': 'a', 'good': True}),
    # one text in a list, and messages that are each JSON
    ([pair('p', ['a'], ['b'])], pair([user('p')], [assistant('a')], [assistant('b')])),
    ([{'messages': list(map(json.dumps, (user('q'), assistant('a'))))}], {'prompt': [user('q')], 'response': [assistant('a')]}),
    ([{'conversation': ['User: q', 'Assistant: a']}], {'prompt': [user('q')], 'response': [assistant('a')]}),
])  # fmt: skip
def test_names_and_lists_in_other_spellings(tmp_path, rows, expected):
    ((found,), _) = read(tmp_path / 'rows.jsonl', rows)
    assert {key: found[key] for key in expected} == expected


def test_tables_keep_lists(tmp_path):
    """In JSON or as pandas writes them; what only looks like one is a text."""
    rows = [{'prompt': 'p', 'completions': "['a', 'b']", 'scores': '[0, 1]'}]
    ((found,), _) = read(tmp_path / 'rows.csv', rows)
    assert (found['chosen'], found['rejected']) == ([assistant('b')], [assistant('a')])
    rows = [{'prompt': 'p', 'response': 'a', 'source': '[INST]'}, {'prompt': 'q', 'response': 'b', 'source': '[1'}]
    found, _ = read(tmp_path / 'texts.csv', rows)
    assert [example.raw['source'] for example in found] == ['[INST]', '[1']


def test_a_text_in_json_has_no_field_twice(tmp_path):
    twice = '[{"role": "user", "role": "assistant", "content": "q"}]'
    for file in ('rows.jsonl', 'rows.csv'):
        assert "two fields of an object are called 'role'" in refusal(write(tmp_path / file, [{'messages': twice}]))


def test_words_without_spaces_count():
    assert (
        messages.has_words('今日はとても良い天気です', 6)
        and not messages.has_words('今日は', 3)
        and not messages.has_words('a b', 3)
    )
