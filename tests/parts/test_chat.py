"""Chat templates, in training and sampling alike: what an instruct model is trained on is what its template writes."""

import json
import resource
import shutil
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from helpers import assistant, end_process_group, metrics, read_jsonl, run_script, silent, system, user, write_jsonl

from configurator import UserError
from hf import load
from text import chat, messages, sources, toy
from text.chat import MARK, NO_TEMPLATE, PLAIN_CHAT, THOUGHTLESS, UNMARK, decode_answer
from text.tokenise import NO_CHAT, encode, encode_texts, tokenise, tokenise_prompts

# fmt: off
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# as Llama 3: the template writes the start of text itself
HEADERS = ("{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}"
           "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}")
# as Llama 2: an answer ends with the end of text, and the question with no special token
INST = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% elif m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ '<<SYS>>' + m.content }}{% endif %}{% endfor %}")
THINKS = CHATML.replace(  # as Qwen 3: the last answer begins with an empty thought
    "m.role + '\n' + m.content", "m.role + '\n' + ('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '') + m.content")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML  # as Gemma 2
OPENS = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")  # as R1: answers show no thought
BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
FIELDS = CHATML.replace('m.content +', "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m.content + "
    '(m.tool_calls | tojson if m.tool_calls else "") + (m.tool_call_id if m.tool_call_id else "") +',
).replace('{% for m', '{% if tools %}{{ tools | tojson }}{% endif %}{% for m', 1)
OPENS_FIELDS = FIELDS.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
LAST_FIELDS = FIELDS.replace('if m.reasoning_content', 'if m.reasoning_content and loop.last')
NAMED = "{% if not messages[0].name %}{{ raise_exception('who?') }}{% endif %}" + CHATML
SYSTEMLESS = CHATML.replace('{% for m in messages %}', "{% for m in messages if m.role != 'system' %}")
OPENS_ANSWER = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<answer>\n'")
# fmt: on
SPECIAL = ['<|im_start|>', '<|im_end|>', '<|head|>', '<|/head|>', '<|eot|>', '<|begin|>']
CALL = {'type': 'function', 'function': {'name': 'look', 'arguments': {'at': 'sky'}}}
TOOLS = [{'type': 'function', 'function': {'name': 'look', 'parameters': {}}}]
ASKED = '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'
SYSTEM = system('be nice')
PROMPT = [user('the room ?'), assistant('clean .'), user('the bed ?')]
CHOSEN, REJECTED = [assistant('very fine .')], [assistant('dusty and dull')]
EOS = '<|endoftext|>'


def tokenizer_of(template, eos, begins=False):
    t = toy.tokenizer()
    t.add_special_tokens({'additional_special_tokens': SPECIAL})
    t.eos_token, t.chat_template = eos, template
    if begins:  # and puts the start of text before every text, as Llama's do
        t.bos_token = '<|begin|>'
        form = {'single': '<|begin|> $A', 'special_tokens': [('<|begin|>', t.convert_tokens_to_ids('<|begin|>'))]}
        t.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**form)
    return t


# template, end of text, whether BOS is added, what is added to the template's end
CASES = {
    'chatml, instruct': (CHATML, '<|im_end|>', False, []), 'chatml on a base model': (CHATML, EOS, False, [EOS]),
    'headers': (HEADERS, '<|eot|>', True, []), 'inst': (INST, EOS, True, []), 'thinks': (THINKS, '<|im_end|>', False, []),
    'no system': (NO_SYSTEM, '<|im_end|>', False, []), 'no end of turn': (BARE, EOS, False, [EOS]), 'plain': (PLAIN_CHAT, EOS, False, [EOS]),
    'several': ({'default': CHATML, 'tool_use': HEADERS}, '<|im_end|>', False, []),
}  # fmt: skip


def pair(prompt='hi', chosen='yes', rejected='no'):
    """A row of chats; a text stands for one message."""
    said = [[assistant(x)] if isinstance(x, str) else x for x in (chosen, rejected)]
    return {'prompt': [user(prompt)] if isinstance(prompt, str) else prompt, 'chosen': said[0], 'rejected': said[1]}


def ids_of(t, *rows, task='pairs', **options):
    return tokenise(rows, t, task, (256, 128, 'start'), Counter(), **options)


def written(t, *rows, **options):
    """[(prompt, answers) as text], and what was counted."""
    examples = ids_of(t, *rows, **options)
    items = map(examples.__getitem__, range(len(examples)))
    return [(t.decode(p), [t.decode(a) for a in answers]) for p, answers in items], examples.left_out


def read(tmp_path, *rows):
    return sources.load_rows(write_jsonl(tmp_path / 'rows.jsonl', rows), 'train', undivided=True)[0]


@pytest.mark.parametrize('messages', [PROMPT[:1], PROMPT, [SYSTEM, *PROMPT]], ids=['one turn', 'turns', 'system'])
@pytest.mark.parametrize('case', CASES)
def test_trained_ids_are_the_templates(case, messages):
    template, eos, begins, extra = CASES[case]
    t, row = tokenizer_of(template, eos, begins), {'prompt': messages, 'chosen': CHOSEN, 'rejected': REJECTED}
    if case == 'no system' and messages[0] is SYSTEM:
        with pytest.raises(UserError, match='the chat template refuses an example: no system turn'):
            ids_of(t, row)
        return
    examples = ids_of(t, row)
    prompt, answers = examples[0]
    assert not examples.left_out['prompts cut'] and not examples.left_out['answers cut']
    asked = t.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)['input_ids']
    assert prompt.tolist() == asked  # what sampling begins with, and one BOS
    for answer, said in zip(answers, (CHOSEN, REJECTED), strict=True):
        whole = t.apply_chat_template(messages + said, tokenize=False).removesuffix('\n')
        assert t.decode([*prompt, *answer]) == whole + ''.join(extra)
        assert answer[-1] == t.eos_token_id and (answer == t.eos_token_id).sum() == 1
        # a special token where they meet: the same ids, too
        if case in ('chatml, instruct', 'headers', 'thinks', 'several'):
            joint = t.apply_chat_template(messages + said, return_dict=True)['input_ids']
            length = len(prompt) + len(answer)
            assert [*prompt, *answer] == joint[:length] and t.decode(joint[length:]).strip('\n') == ''


# ---- what a template writes: thoughts, and all fields of all messages ----

CHANGED = 'messages whose content the chat template changes or leaves out'
THOUGHTS = [user('a'), assistant('b', thinking='x'), user('c'), assistant('d', thinking='y')]
HUMAN = '\n\nbe nice\n\nHuman: the room ?\n\nAssistant: clean .\n\nHuman: the bed ?\n\nAssistant:'
THINKING, CLOSED = ASKED + '<think>\n', '\n</think>\n\n'


@pytest.mark.parametrize('template, row, task, texts, counted', [
    # an answer's own thought goes on from the opened one, in whichever field or text it is
    (OPENS, pair(chosen=[assistant('yes', reasoning_content='well')], rejected='<think>\nhm\n</think>\n\nno'), 'pairs',
     [THINKING, f'well{CLOSED}yes<|im_end|>', f'hm{CLOSED}no<|im_end|>'], {CHANGED: 1}),
    (OPENS, pair(), 'pairs', [THINKING, f'{CLOSED}yes<|im_end|>', f'{CLOSED}no<|im_end|>'], {THOUGHTLESS: 2}),
    # a template that writes a thought itself, without the line break behind its tag
    (OPENS_FIELDS, {'prompt': [user('hi')], 'response': [assistant('yes', thinking='well')]}, 'sft', [THINKING, 'well</think>yes<|im_end|>'], {}),
    # the stand-in for the answer of a prompt is not counted
    (OPENS, {'prompt': [user('hi')]}, 'prompts', [THINKING, f'{CLOSED}.<|im_end|>'], {}),
    # a field that is written of one message only, and one that the template cannot do without
    (LAST_FIELDS, {'prompt': THOUGHTS[:3], 'response': THOUGHTS[3:]}, 'sft',
     ['<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n' + ASKED.replace('hi', 'c'), '<think>y</think>d<|im_end|>'],
     {"messages with 'thinking', which the chat template does not write": 1}),
    (NAMED, {'prompt': [user('hi', name='joe')], 'response': [assistant('yes')]}, 'sft', [ASKED, 'yes<|im_end|>'], {}),
    (SYSTEMLESS, pair([SYSTEM, user('hi')]), 'pairs', [ASKED, 'yes<|im_end|>', 'no<|im_end|>'], {CHANGED: 1}),
    # a text beside a chat is a message; two texts are no chat
    (CHATML, {'prompt': 'hi', 'response': [assistant('yes')]}, 'sft', [ASKED, 'yes<|im_end|>'], {}),
    (CHATML, {'prompt': [user('hi')], 'response': 'y'}, 'sft', [ASKED, 'y<|im_end|>'], {}),
    (CHATML, {'prompt': 'hi', 'response': ' yes'}, 'sft', ['hi', ' yes<|im_end|>'], {NO_CHAT: 1}),
    (CHATML, {'prompt': '', 'response': ' yes'}, 'sft', ['<|im_end|>', ' yes<|im_end|>'], {}),
    # a begun answer that a result follows, and not its end
    (CHATML, {'prompt': [user('hi'), assistant('so')], 'response': [{'role': 'tool', 'content': 'blue'}, assistant('yes')]}, 'sft',
     [ASKED + 'so', '<|im_end|>\n<|im_start|>tool\nblue<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>'], {}),
    # an answer of several messages is one text
    (CHATML, {'prompt': [user('hi')], 'response': [assistant('so'), {'role': 'tool', 'content': 'blue'}, assistant('yes')]}, 'sft',
     [ASKED, 'so<|im_end|>\n<|im_start|>tool\nblue<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>'], {}),
    # without a template; one note, however many chats
    (None, pair([SYSTEM, *PROMPT]), 'pairs', [HUMAN, ' yes<|im_end|>', ' no<|im_end|>'], {NO_TEMPLATE: 1}),
])  # fmt: skip
def test_what_a_template_writes_of_a_row(template, row, task, texts, counted):
    t = tokenizer_of(template, '<|im_end|>')
    ((prompt, answers),), left_out = written(t, row, task=task)
    assert [prompt, *answers] == texts and left_out == counted and t.chat_template == template
    assert template or written(t, row, row)[1] == counted


@pytest.mark.parametrize('field', ['reasoning_content', 'thinking', 'reasoning'])
def test_thoughts_are_trained_on_where_the_template_writes_them(tmp_path, field):
    chats = [[user('hi'), assistant('yes', **{field: thought})] for thought in ('one', 'two')]
    rows = read(tmp_path, {'chosen': chats[0], 'rejected': chats[1]})
    found, counted = written(tokenizer_of(FIELDS, '<|im_end|>'), *rows)
    assert found == [(ASKED, ['<think>one</think>yes<|im_end|>', '<think>two</think>yes<|im_end|>'])] and not counted
    found, counted = written(tokenizer_of(CHATML, '<|im_end|>'), *rows)
    assert not found and counted['pairs with equal answers'] == 1
    assert counted[f'messages with {field!r}, which the chat template does not write'] == 2
    # whatever transformers does of it
    both = dict.fromkeys(('thinking', 'reasoning_content'), 'one')
    assert [*map(chat.with_thoughts, chats[0])] == [user('hi'), chats[0][1] | both]


def test_calls_tools_and_their_results(tmp_path):
    result = {'role': 'tool', 'content': 'blue', 'tool_call_id': 'c1'}
    turns = [user('hi', name='joe'), assistant(None, tool_calls=[CALL]), result, assistant('it is blue')]
    writes, silent = tokenizer_of(FIELDS, '<|im_end|>'), tokenizer_of(CHATML, '<|im_end|>')
    for tools in (TOOLS, json.dumps(TOOLS)):
        rows = read(tmp_path, {'messages': turns, 'tools': tools})
        ((prompt, said),), counted = written(writes, *rows, task='sft', last_turn_only=True)
        assert prompt.startswith(json.dumps(TOOLS)) and json.dumps([CALL]) in prompt and 'bluec1' in prompt
        assert said == ['it is blue<|im_end|>']
        assert counted == {"messages with 'name', which the chat template does not write": 1}
    unwritten = ("messages with 'name'", "messages with 'tool_calls'", "messages with 'tool_call_id'", 'tools')
    for last_only in (True, False):
        _, counted = written(silent, *rows, task='sft', last_turn_only=last_only)
        # the call is not written, so there is nothing of it to train on
        expected = dict.fromkeys(unwritten, 1) | ({} if last_only else {'empty answers': 1})
        assert {reason.partition(',')[0]: n for reason, n in counted.items()} == expected
    call = read(tmp_path, {'messages': turns[:2]})  # a call alone is an answer where the template writes it
    assert written(writes, *call, task='sft')[0][0][1] == [json.dumps([CALL]) + '<|im_end|>']
    found, counted = written(silent, *call, task='sft')
    assert not found and counted['empty answers'] == 1


def test_other_tools_are_another_example(tmp_path):
    several = tokenizer_of(CASES['several'][0], EOS)
    assert [chat.template_of(several, tools) for tools in (None, [], TOOLS)] == [CHATML, CHATML, HEADERS]
    talk = {'messages': [user('hi'), assistant('yes')]}
    rows = read(tmp_path, talk | {'tools': TOOLS}, talk | {'tools': TOOLS * 2}, talk | {'tools': TOOLS}, talk)
    assert len(written(tokenizer_of(FIELDS, '<|im_end|>'), *rows, task='sft')[0]) == 3


@pytest.mark.parametrize('column', ['system', 'system_prompt'])
def test_the_system_column(tmp_path, column):
    chat, text = pair(), {'prompt': 'hi', 'chosen': ' yes', 'rejected': ' no'}
    own = chat | {'prompt': [system('Be brief.'), user('hi')]}
    rows = [row | {column: 'Be brief.'} for row in (chat, text, own)] + [chat | {column: None}, text | {column: ''}]
    found, _ = written(tokenizer_of(CHATML, '<|im_end|>'), *read(tmp_path, *rows))
    told = ('<|im_start|>system\nBe brief.<|im_end|>\n' + ASKED, ['yes<|im_end|>', 'no<|im_end|>'])
    assert found == [told] * 3 + [(ASKED, told[1]), ('hi', [' yes<|im_end|>', ' no<|im_end|>'])]


# ---- begun answers ----


@pytest.mark.parametrize('case', sorted(set(CASES) - {'several'}))
def test_a_begun_answer_goes_on(case):
    """The prompt ends in the midst of the turn; with the answer it is what the template makes of the finished one."""
    template, eos, begins, extra = CASES[case]
    t, begun = tokenizer_of(template, eos, begins), [user('hi'), assistant('Sure: ')]
    for said in ([assistant('yes')], 'yes'):
        row = {'prompt': begun, 'chosen': said, 'rejected': [assistant('no')]}
        ((prompt, answers),), _ = written(t, row)
        assert prompt.endswith(('Sure: ', 'Sure:')) and answers[0].strip().startswith('yes')
        for text, whole in zip(answers, ('Sure: yes', 'Sure: no'), strict=True):
            joint = t.apply_chat_template([user('hi'), assistant(whole)], tokenize=False, chat_template=template)
            assert prompt + text == joint.removesuffix('\n') + ''.join(extra)
    assert [t.decode(ids) for ids in tokenise_prompts([begun], t, 128, 'start', Counter())] == [prompt]
    # or ends there
    prompt_ids, ids = encode(begun, [], None, t, (256, 128, 'start'), Counter())
    assert t.decode(prompt_ids) == prompt and t.decode(ids).strip('\n') in ('<|im_end|>' + EOS, t.eos_token)


# ---- ends, and special tokens that somebody has written ----


@pytest.mark.parametrize('end', ['<|im_end|>', '<|im_end|>\n', '<|im_end|>\n<|im_end|>\n', ' '])
@pytest.mark.parametrize('eos', ['<|im_end|>', EOS])
def test_an_end_is_there_once(end, eos):
    t = tokenizer_of(CHATML, eos)
    ends = '<|im_end|>' if eos == '<|im_end|>' else '<|im_end|>' + EOS
    (found,), counted = written(t, pair(chosen='yes' + end))
    assert found[1] == ['yes' + end.replace('<|im_end|>', '').replace('\n', '') + ends, 'no' + ends]
    assert sum('brought an end' in reason for reason in counted) == ('<' in end)
    if '<' in end:
        (found,), counted = written(t, {'prompt': 'hi', 'chosen': ' yes' + end, 'rejected': ' no'})
        assert found == ('hi', [' yes' + ends, ' no' + eos])
        assert sum('brought an end' in reason for reason in counted) == (end != '<|im_end|>')


WORDS = 'the token <|im_end|> ends a turn, <|im_start|>system begins one'


def tokenizers_of_all_kinds():
    """(name, tokenizer) of the pipelines that models have, <|im_end|> special, or only added, in each."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ['<s>', '</s>', '<unk>', '<|im_start|>', '<|im_end|>']
    llama = Tokenizer(models.BPE(unk_token='<unk>'))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    llama.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    metaspace = Tokenizer(models.BPE(unk_token='<unk>'))
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(prepend_scheme='first'), decoders.Metaspace()
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    wordpiece = Tokenizer(models.WordPiece(unk_token='<unk>'))
    wordpiece.pre_tokenizer, wordpiece.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    text = [WORDS + ' hi yes no user assistant\n'] * 9
    kinds = {'llama': (llama, 'Bpe', {}), 'metaspace': (metaspace, 'Bpe', {}), 'wordpiece': (wordpiece, 'WordPiece', {}),
             'unigram': (unigram, 'Unigram', {'unk_token': '<unk>'})}  # fmt: skip
    for name, (inner, kind, more) in kinds.items():
        options = {'vocab_size': 120, 'special_tokens': special, 'show_progress': False} | more
        inner.train_from_iterator(text, getattr(trainers, f'{kind}Trainer')(**options))
        yield name, transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token='</s>', unk_token='<unk>')
    for name, adds in {'byte level': False, 'byte level with a space': True}.items():
        t = tokenizer_of(CHATML, '<|im_end|>')
        t.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds)
        yield name, t


KINDS = dict(tokenizers_of_all_kinds())


@pytest.mark.parametrize('name', sorted(KINDS.keys() - {'wordpiece'}))
@pytest.mark.parametrize('template', [CHATML, INST])
def test_tokens_are_those_of_the_whole(name, template):
    """Some tokenizers put a space before every text: there is none before answers and later turns that the whole text lacks."""
    t = KINDS[name]
    t.chat_template = template
    chat = [user('hi'), assistant('yes no'), user('no'), assistant('hi')]
    for turns in (chat[:2], chat):
        row = {'prompt': turns[:-1], 'response': turns[-1:], 'turns': turns}
        prompt, (answer,) = ids_of(t, row, task='sft')[0]
        ids = [*prompt, *(max(x, ~x) for x in answer)][:-1]
        assert ids == t.apply_chat_template(turns, return_dict=True)['input_ids'][: len(ids)]
        assert [prompt.tolist()] == tokenise_prompts([chat[:1]], t, 128, 'start', Counter())
        # to sample is to ask for the last answer alone
        asked, _ = ids_of(t, row, task='prompts')[0]
        assert [asked.tolist()] == tokenise_prompts([turns[:-1]], t, 128, 'start', Counter())
    # a text, too; and the answer's text comes back as it was, also where the space before it is the prompt's
    for words, answer in (('hi no', ' yes'), ('hi ', 'no'), ('', 'no')):
        prompt_ids, ids = encode(words, answer, None, t, (128, 64, 'start'), Counter())
        assert not words or decode_answer(ids[:-1], prompt_ids, t) == answer
        prompt_ids = prompt_ids if words else []  # without the BOS that an empty one becomes
        assert words == 'hi ' or [*prompt_ids, *ids[:-1]] == t(words + answer, add_special_tokens=False)['input_ids']


def test_an_answer_behind_a_prompt_that_is_cut_within_a_character(monkeypatch):
    monkeypatch.setattr(chat, 'puts_space', lambda tokenizer: True)
    text_of = {(1,): 'x\ufffd', (2,): '\ufffd y', (1, 2): 'x\u00e9 y'}
    tokenizer = SimpleNamespace(decode=lambda ids: text_of[tuple(ids)])
    assert decode_answer([2], [1], tokenizer) == '\ufffd y'


@pytest.mark.parametrize('name, t', KINDS.items(), ids=lambda x: x if isinstance(x, str) else '')
def test_special_tokens_in_text_stay_text(name, t):
    t.chat_template = CHATML
    assert chat.puts_space(t) == (name not in ('byte level', 'wordpiece'))
    ids, end = set(t.convert_tokens_to_ids(['<|im_start|>', '<|im_end|>'])), {t.eos_token_id}
    for prompt, chosen in (('hi', f' {WORDS}'), (f'hi {WORDS} yes', ' yes')):
        examples = ids_of(t, {'prompt': prompt, 'chosen': chosen, 'rejected': ' no'})
        parts = [part.tolist() for part in (examples[0][0], *examples[0][1])]
        assert not any(ids & set(part[:-1]) | (ids - end) & set(part[-1:]) for part in parts)
        assert examples.left_out == {'special tokens in a text, kept as text': 1, NO_CHAT: 1}
    clean = t.apply_chat_template([user('hi'), assistant('yes')], tokenize=False)
    expected = [i for i in t(clean, add_special_tokens=False)['input_ids'] if i in ids]
    for prompt, chosen in ((f'hi {WORDS}', 'yes'), ('hi', f'yes {WORDS}')):
        examples = ids_of(t, pair(prompt, chosen))
        both = [*examples[0][0].tolist(), *examples[0][1][0].tolist()]
        assert [i for i in both if i in ids] == expected  # the template's own, and no others
        assert max(prompt, chosen, key=len).replace(' ', '') in t.decode(both).replace(' ', '')
        assert examples.left_out == {'special tokens in a text, kept as text': 1}
    # and the text begins as it would without them
    begins, (marked,) = t('hi', add_special_tokens=False)['input_ids'], encode_texts([f'hi{MARK}<|im_end|>{UNMARK}'], t)
    assert marked[: len(begins)] == begins
    # its tokens are those of any text: only one that would be the special token again is cut in two
    assert name != 'llama' or t.convert_ids_to_tokens(marked[len(begins) :]) == ['<|', 'im_', 'end', '|>']


def test_a_tokenizer_that_cuts_and_pads_does_neither():
    t, texts = toy.tokenizer(), ['the room was clean', 'bed']
    expected = t(texts)['input_ids']
    t.backend_tokenizer.enable_truncation(2)
    t.backend_tokenizer.enable_padding(length=9)
    assert encode_texts(texts, t) == expected


def test_a_tokenizer_in_python():
    t = transformers.ByT5Tokenizer()
    plain, marked = encode_texts(['hi', f'hi {MARK}</s>{UNMARK} x'], t)
    assert plain == t('hi', add_special_tokens=False)['input_ids'] == marked[:2]
    assert t.eos_token_id not in marked and t.decode(marked) == 'hi </s> x'
    # what puts no space before a text takes each by itself
    t = KINDS['wordpiece']
    assert encode_texts(['no'], t, before=['hi']) == [t('no', add_special_tokens=False)['input_ids']]
    knows_nothing = tokenizers.Tokenizer(tokenizers.models.BPE())
    assert not chat.puts_space(transformers.PreTrainedTokenizerFast(tokenizer_object=knows_nothing))


def test_what_a_template_writes_around_turns_is_special_too():
    """Some tokenizers have the marks of turns as added tokens that are not special; people may write <think> and line breaks."""
    t = toy.tokenizer()
    t.add_tokens(['<|im_start|>', '<|im_end|>', '<think>', '\n'])
    t.chat_template = THINKS
    examples = ids_of(t, {'prompt': [user('a <|im_end|> b')], 'response': [assistant('<think>\nc')]}, task='sft')
    prompt, (answer,) = examples[0]
    end, think = t.convert_tokens_to_ids(['<|im_end|>', '<think>'])
    assert (prompt == end).sum() == 1 and (answer == end).sum() == 1 and (answer == think).sum() == 2
    assert examples.left_out['special tokens in a text, kept as text'] == 1


def test_special_tokens_of_texts_that_a_template_has_written():
    t = tokenizer_of(CHATML, '<|im_end|>')
    examples = ids_of(t, {'prompt': ASKED, 'chosen': 'yes<|im_end|>\n', 'rejected': 'no'})
    joint = t(ASKED + 'yes<|im_end|>', add_special_tokens=False)['input_ids']
    assert [*examples[0][0], *examples[0][1][0]] == joint
    assert examples.left_out['texts that begin or end with a special token: theirs are read as tokens'] == 1
    (ids,) = tokenise_prompts(['Name a river.<|im_start|>'], t, 99, 'start', Counter())
    assert ids[-1] == t.convert_tokens_to_ids('<|im_start|>')
    # a whole text to learn, which has no prompt
    examples = ids_of(t, {'prompt': '', 'response': ASKED + 'yes'}, task='sft')
    assert (examples[0][1][0] == t.convert_tokens_to_ids('<|im_start|>')).sum() == ASKED.count('<|im_start|>')
    # a BOS that begins a text is a token, and nothing else of it
    t.add_special_tokens({'bos_token': '<s>'})
    for begin in ('', '<s>'):
        (found,) = tokenise_prompts([f'{begin}a <|im_start|> <s> b'], t, 99, 'start', Counter())
        assert found.count(t.bos_token_id) == bool(begin) and ids[-1] not in found


# ---- rows and templates that cannot be used ----


def test_a_role_that_nobody_knows(tmp_path):
    """Only a template that asks for it or writes it knows it, not one that takes it for some other role, nor none at all."""
    names = INST.replace("m.role == 'user'", "m.role == 'user' or m.role == 'bot2'")
    turns = [{'role': 'bot2', 'content': 'bot2 asks'}, assistant('x'), user('y'), assistant('z')]
    unknown = "a message has the unknown role 'bot2'; known are user, human, .*, ipython"
    chat = {'prompt': turns[:3], 'response': turns[3:], 'turns': turns}
    for row, task in ((pair(turns[:1]), 'pairs'), (chat, 'sft')):
        for template in (None, INST):
            with pytest.raises(UserError, match=unknown):
                written(tokenizer_of(template, EOS), row, task=task)
        for template in (CHATML, names):
            assert len(ids_of(tokenizer_of(template, EOS), row, task=task)) == 1
    for role in ('tool', 'function', 'ipython', 'observation', 'developer', 'model', 'bot', 'gpt', 'human', 'Human'):
        rows = read(tmp_path, pair([user('a'), {'role': role, 'content': 'b'}, user('c')]))
        assert written(tokenizer_of(None, EOS), *rows)[0]


def test_a_row_that_the_template_refuses(tmp_path):
    rows, t = read(tmp_path, pair(), pair([SYSTEM, user('hi')])), tokenizer_of(NO_SYSTEM, '<|im_end|>')
    refused, counted = 'the chat template refuses an example: no system turn', Counter()
    with pytest.raises(UserError, match=rf'rows\.jsonl, line 2: {refused}; .*--skip_bad_rows'):
        written(t, *rows)
    found, left_out = written(t, *rows, skip_bad_rows=True)
    assert len(found) == 1 and left_out == {f'bad rows: {refused}': 1}
    with pytest.raises(UserError, match='line 2'):
        tokenise_prompts(rows, t, 99, 'start', Counter())
    with pytest.raises(UserError, match=f'^{refused}$'):
        encode([SYSTEM, user('hi')], [assistant('yes')], None, t, (99, 99, 'start'), Counter())
    first, second = tokenise_prompts(rows, t, 99, 'start', counted, skip_bad_rows=True)
    assert first and second is None and counted[f'bad rows: {refused}'] == 1


LOOPS = ''.join(f'{{% for {x} in range(9999) %}}' for x in 'ijk') + '{% endfor %}' * 3
TEXTS = {'prompt': 'hi', 'chosen': ' a', 'rejected': ' b'}


@pytest.mark.parametrize('template, row, words', [
    ({'rag': CHATML, 'tool_use': CHATML}, pair(), 'or several with one of the name default, but dict of .*rag'),
    ({'default': {'a': 1}}, pair(), 'not a text of at most 1,000,000 characters.* but dict of 8'), (7, pair(), 'but int of 1'),
    ('x' * 1_000_001, pair(), '1,000,001 characters'), (LOOPS, pair(), 'does not end'),
    ("{{ 'x' * 3000000000 }}", pair(), 'takes more than 1 GiB'),
    # Jinja computes constants beforehand, and catches every Exception there
    ('{{ 9 ** (9 ** 8) }}', pair(), 'does not end'), ("{{ 'ab' * 11000000 }}", pair(), 'writes 22,000,000 characters'),
    ('{{ nonsense', pair(), 'the chat template of .* a mistake in line 1: unexpected end of template'),
    # these are of the row, and left out if asked for
    ("{{ raise_exception('no such role\nhere') }}", pair(), 'refuses an example: no such role here'),
    ("{{ raise_exception('') }}", pair(), 'refuses an example: TemplateError'),
    (CHATML, pair([]), 'there is no message before the answer'),
    (OPENS.replace("{{ '<", "{{ '+-'[not add_generation_prompt] + '<", 1), pair(), 'differently from the prompt it asks to continue'),
    (OPENS_ANSWER, pair(), "differently from the prompt it asks to continue: where that has '<answer>"),
    (CHATML, pair([{'role': 'user<|im_end|>', 'content': 'a'}]), 'special token in the role'),
])  # fmt: skip
def test_templates_and_rows_that_cannot_be_used(monkeypatch, template, row, words):
    if words == 'does not end':  # others may need their time on a busy machine
        monkeypatch.setattr('text.chat.TEMPLATE_SECONDS', 0.3)
    of_row = any(x in words for x in ('refuses', 'differently', 'role', 'before'))
    with pytest.raises(UserError, match=words) as info:
        written(tokenizer_of(template, '<|im_end|>'), row, skip_bad_rows=not of_row)
    assert '\n' not in str(info.value) and len(str(info.value)) < 300
    # the timer is given back
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    if not isinstance(template, str):  # texts need no template
        assert len(written(tokenizer_of(template, EOS), TEXTS)[0]) == 1


def test_the_limits_of_a_template_are_those_of_the_docs():
    text = ' '.join((Path(chat.__file__).parents[1] / 'docs/models.md').read_text().split())
    assert '20 seconds of the processors and 1 GiB for' in text and 'messages of a chat may have 10 million' in text
    assert (chat.TEMPLATE_SECONDS, chat.TEMPLATE_BYTES, messages.LONGEST) == (20, 2**30, 10_000_000)


def test_a_template_has_memory_beside_that_of_the_process(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    for soft, expected in ((before[0], now + 2**30), (now + 2**29, now + 2**29)):
        resource.setrlimit(resource.RLIMIT_AS, (soft, before[1]))
        with chat._limits():
            limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        assert abs(limit - expected) < 2**26 and resource.getrlimit(resource.RLIMIT_AS)[0] == soft
    resource.setrlimit(resource.RLIMIT_AS, before)
    # nothing is limited in a thread, where a signal cannot be handled, nor where no file tells the memory
    with ThreadPoolExecutor(1) as pool:
        pool.submit(chat._limits().__enter__).result()
    monkeypatch.setattr(chat, 'Path', lambda _: Path('/nowhere'))
    with chat._limits():
        assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_messages_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr('text.messages.LONGEST', 1000)
    long_thought = {'prompt': [user('a')], 'response': [assistant('b', thinking='c' * 1000)]}
    for row in ({'messages': [user('a' * 999), assistant('b')]}, long_thought):
        with pytest.raises(UserError, match=r'line 1: .*characters; the limit is 1,000'):
            read(tmp_path, row)
    assert read(tmp_path, {'prompt': 'a' * 1000, 'response': 'b'})
    # so have templates
    for too_long in (0, 1):
        length = len(CHATML) - too_long
        words = f'not a text of at most {length} characters'
        monkeypatch.setattr('text.chat.TEMPLATE_LENGTH', length)
        with pytest.raises(UserError, match=words) if too_long else silent():
            written(tokenizer_of(CHATML, EOS), pair())
    # and what they write
    monkeypatch.undo()
    longest = len(tokenizer_of(CHATML, EOS).apply_chat_template([*pair()['prompt'], *pair()['chosen']], tokenize=False))
    for limit in (longest, longest - 1):
        monkeypatch.setattr('text.chat.LONGEST', limit / 2)
        with pytest.raises(UserError, match='characters for one chat') if limit < longest else silent():
            written(tokenizer_of(CHATML, EOS), pair())


# ---- runs ----


@pytest.fixture(scope='module')
def instruct(tmp_path_factory):
    """A tiny instruct model: its template ends turns with <|im_end|>, which its generation config knows as an end."""
    folder = tmp_path_factory.mktemp('instruct')
    t = tokenizer_of(CHATML, EOS)
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(toy.model_config())
    net.generation_config.eos_token_id = [t.convert_tokens_to_ids('<|im_end|>'), t.eos_token_id]
    net.generation_config.repetition_penalty = 1.5
    for part in (net, t):
        part.save_pretrained(folder / 'base')
    write_jsonl(folder / 'chats.jsonl', [pair([SYSTEM, *PROMPT], CHOSEN, f'dull {i}') for i in range(8)])
    yield folder
    end_process_group()


def run(script, folder, *flags):
    out = folder / script.removesuffix('.py')
    data = f'--data={folder}/chats.jsonl --eval_data={folder}/chats.jsonl --out_dir={out}'
    how = '--batch_size=8 --warmup_steps=0 --sample_during_eval --max_new_tokens=16 --temperature=0'
    with pytest.MonkeyPatch.context() as patch, silent():
        patch.setattr(torch, 'set_num_threads', lambda n: None)
        patch.setenv('NANOPREF_CACHE', str(folder / 'cache'))
        run_script(script, *f'{data} {how}'.split(), *flags)
    return out


def test_training_and_sampling(instruct):
    """SFT learns the one answer, DPO goes on from there; both ask with the template's prompt and stop where its turn ends."""
    # 100 steps, the last of them small: the answer is settled, with every token's probability above 0.9
    learn = ['--lr=5e-3', '--lr_schedule=linear', '--n_epochs=800', '--do_first_eval=false']
    out = run('sft.py', instruct, f'--model={instruct}/base', *learn)
    assert metrics(out)[-1]['loss/eval'] < 0.025  # a mean over four tokens
    t = transformers.AutoTokenizer.from_pretrained(instruct / 'base')
    asked = t.apply_chat_template([SYSTEM, *PROMPT], add_generation_prompt=True, tokenize=False)
    # neither the end of the turn nor anything after it
    samples = {(row['prompt'], row['response']) for row in read_jsonl(out / 'samples.jsonl')}
    assert samples == {(asked, 'very fine .')}
    for folder in (out / 'model', run('dpo.py', instruct, f'--model={out}/model', '--lr=1e-5') / 'model'):
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == CHATML
        kept = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
        assert kept.eos_token_id == [t.convert_tokens_to_ids('<|im_end|>'), t.eos_token_id]
        assert kept.repetition_penalty == 1.5


GENERATION = '{"do_sample": false, "temperature": 0.5, "eos_token_id": [3, 4]}'
NO_PAD = '{"pad_token_id": -1, "eos_token_id": [3, 4]}'


@pytest.mark.parametrize('content', [GENERATION, NO_PAD, '{broken', None])
def test_odd_generation_configs(instruct, tmp_path, content, capsys):
    """One that cannot be written again keeps its tokens, with a note; a broken or a missing one is passed over."""
    shutil.copytree(instruct / 'base', tmp_path / 'm')
    (tmp_path / 'm/generation_config.json').unlink()
    if content:
        (tmp_path / 'm/generation_config.json').write_text(content)
    shell = load.load_model(str(tmp_path / 'm'), empty=True)
    assert ('contradicts itself: only its token ids are kept' in capsys.readouterr().out) == (content == GENERATION)
    assert shell.generation_config.eos_token_id == ([3, 4] if content and 'eos' in content else None)
    shell.generation_config.save_pretrained(tmp_path)


@pytest.mark.parametrize('kind', [transformers.GPTNeoXConfig, transformers.Qwen2Config, transformers.LlamaConfig])
def test_a_folder_without_a_tokenizer(tmp_path, kind):
    """transformers makes an empty one for some models, which reads every text as nothing."""
    kind().save_pretrained(tmp_path)
    with pytest.raises(UserError, match='no tokenizer in .*: it needs a tokenizer.json'):
        load.load_tokenizer(str(tmp_path))


def test_a_template_file_that_is_too_long(tmp_path):
    tokenizer_of(CHATML, EOS).save_pretrained(tmp_path)
    load.load_tokenizer(str(tmp_path))
    with open(tmp_path / 'chat_template.jinja', 'wb') as stream:
        stream.truncate(3 * 10**9)  # sparse: nothing is written
    with pytest.raises(UserError, match=r'chat_template\.jinja has 3,000,000,000 bytes'):
        load.load_tokenizer(str(tmp_path))
