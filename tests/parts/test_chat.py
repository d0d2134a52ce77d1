"""Chat templates, in training and sampling alike: what an instruct model is trained on is what its template writes."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.distributed as dist
import transformers

from configurator import UserError
from hf import load
from text import sources, toy
from text.tokenise import NO_CHAT, PLAIN_CHAT, tokenise, tokenise_prompts

ROOT = Path(__file__).resolve().parents[2]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (  # as Llama 3: the template writes the start of text itself
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
INST = (  # as Llama 2: an answer ends with the end of text, and the question with no special token
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% elif m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ '<<SYS>>' + m.content }}{% endif %}{% endfor %}"
)
THINKS = CHATML.replace(  # as Qwen 3: the last answer begins with an empty thought
    "m.role + '\n' + m.content", "m.role + '\n' + ('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '') + m.content"
)  # fmt: skip
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
)  # as Gemma 2
OPENS = CHATML.replace(
    "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"
)  # as R1: answers show no thought
BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
SPECIAL = ['<|im_start|>', '<|im_end|>', '<|head|>', '<|/head|>', '<|eot|>', '<|begin|>']
SYSTEM = {'role': 'system', 'content': 'be nice'}
PROMPT = [
    {'role': 'user', 'content': 'the room ?'},
    {'role': 'assistant', 'content': 'clean .'},
    {'role': 'user', 'content': 'the bed ?'},
]
CHOSEN, REJECTED = ([{'role': 'assistant', 'content': text}] for text in ('very fine .', 'dusty and dull'))
EOS = '<|endoftext|>'


def tokenizer_of(template, eos, begins=False):
    t = toy.tokenizer()
    t.add_special_tokens({'additional_special_tokens': SPECIAL})
    t.eos_token, t.chat_template = eos, template
    if begins:  # and puts the start of text before every text, as Llama's do
        t.bos_token = '<|begin|>'
        one = t.convert_tokens_to_ids('<|begin|>')
        t.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single='<|begin|> $A', pair='<|begin|> $A $B', special_tokens=[('<|begin|>', one)]
        )
    return t


# template, end of text, whether BOS is added, what is added to the template's end
CASES = {
    'chatml, instruct': (CHATML, '<|im_end|>', False, []),
    'chatml on a base model': (CHATML, EOS, False, [EOS]),
    'headers': (HEADERS, '<|eot|>', True, []),
    'inst': (INST, EOS, True, []),
    'thinks': (THINKS, '<|im_end|>', False, []),
    'no system': (NO_SYSTEM, '<|im_end|>', False, []),
    'no end of turn': (BARE, EOS, False, [EOS]),
    'plain': (PLAIN_CHAT, EOS, False, [EOS]),
    'several': ({'default': CHATML, 'tool_use': HEADERS}, '<|im_end|>', False, []),
}


@pytest.mark.parametrize('messages', [PROMPT[:1], PROMPT, [SYSTEM, *PROMPT]], ids=['one turn', 'turns', 'system'])
@pytest.mark.parametrize('case', CASES)
def test_trained_ids_are_the_templates(case, messages):
    template, eos, begins, extra = CASES[case]
    t = tokenizer_of(template, eos, begins)
    row = {'prompt': messages, 'chosen': CHOSEN, 'rejected': REJECTED}
    left_out = Counter()
    if case == 'no system' and messages[0] is SYSTEM:
        with pytest.raises(UserError, match='the chat template refuses an example: no system turn'):
            tokenise([row], t, 'pairs', 256, 128, 'start', left_out)
        return
    prompt, answers = tokenise([row], t, 'pairs', 256, 128, 'start', left_out)[0]
    assert not left_out['prompts cut'] and not left_out['answers cut']
    asked = t.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)['input_ids']
    assert prompt.tolist() == asked  # what sampling begins with, and one BOS
    for answer, said in zip(answers, (CHOSEN, REJECTED), strict=True):
        whole = t.apply_chat_template(messages + said, tokenize=False).removesuffix('\n')
        ours = t.decode([*prompt, *answer])
        assert ours == whole + ''.join(extra)
        assert answer[-1] == t.eos_token_id and (answer == t.eos_token_id).sum() == 1
        if case in (
            'chatml, instruct',
            'headers',
            'thinks',
            'several',
        ):  # a special token where they meet: the same ids, too
            joint = t.apply_chat_template(messages + said, return_dict=True)['input_ids']
            assert [*prompt, *answer] == joint[: len(prompt) + len(answer)]
            assert t.decode(joint[len(prompt) + len(answer) :]).strip('\n') == ''


def user(text, **more):
    return {'role': 'user', 'content': text, **more}


def assistant(text, **more):
    return {'role': 'assistant', 'content': text, **more}


def written(t, *rows, task='pairs', **options):
    """[(prompt, answers) as text], and what was counted; ids beside as tokenise has them."""
    examples = tokenise(rows, t, task, 256, 128, 'start', Counter(), **options)
    found = [
        (t.decode(p), [t.decode(a) for a in answers]) for p, answers in map(examples.__getitem__, range(len(examples)))
    ]
    return found, examples.left_out


ASKED = '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'


# ---- thoughts ----


def test_a_template_that_opens_a_thought():
    """An answer's own thought goes on from there, in whichever field or text it is; without one it is empty, and counted."""
    t = tokenizer_of(OPENS, '<|im_end|>')
    row = {
        'prompt': [user('hi')],
        'chosen': [assistant('yes', reasoning_content='well')],
        'rejected': [assistant('<think>\nhm\n</think>\n\nno')],
    }
    (found,), _ = written(t, row)
    assert found == (ASKED + '<think>\n', ['well\n</think>\n\nyes<|im_end|>', 'hm\n</think>\n\nno<|im_end|>'])
    empty = {'prompt': [user('hi')], 'chosen': [assistant('yes')], 'rejected': [assistant('no')]}
    (found,), counted = written(t, empty)
    assert found[1] == ['\n</think>\n\nyes<|im_end|>', '\n</think>\n\nno<|im_end|>']
    assert [n for reason, n in counted.items() if 'without a thought' in reason] == [2]
    assert not written(t, {'prompt': [user('hi')]}, task='prompts')[1]  # its stand-in for an answer is not counted


def test_another_difference_between_prompt_and_answer_is_refused():
    closed = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<answer>\n'")
    row = {'prompt': [user('hi')], 'chosen': CHOSEN, 'rejected': REJECTED}
    with pytest.raises(UserError, match=r"differently from the prompt it asks to continue: where that has '<answer>"):
        written(tokenizer_of(closed, EOS), row)


# ---- all fields of all messages ----

FIELDS = CHATML.replace(
    'm.content +',
    "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m.content + "
    '(m.tool_calls | tojson if m.tool_calls else "") + (m.tool_call_id if m.tool_call_id else "") +',
).replace('{% for m', '{% if tools %}{{ tools | tojson }}{% endif %}{% for m', 1)
CALL = {'type': 'function', 'function': {'name': 'look', 'arguments': {'at': 'sky'}}}
TOOLS = [{'type': 'function', 'function': {'name': 'look', 'parameters': {}}}]


def read(tmp_path, *rows):
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return sources.load_rows(str(tmp_path / 'rows.jsonl'), 'train', undivided=True)[0]


@pytest.mark.parametrize('field', ['reasoning_content', 'thinking', 'reasoning'])
def test_thoughts_are_trained_on_where_the_template_writes_them(tmp_path, field):
    chats = [[user('hi'), assistant('yes', **{field: thought})] for thought in ('one', 'two')]
    rows = read(tmp_path, dict(zip(('chosen', 'rejected'), chats, strict=True)))
    found, counted = written(tokenizer_of(FIELDS, '<|im_end|>'), *rows)
    assert found == [(ASKED, ['<think>one</think>yes<|im_end|>', '<think>two</think>yes<|im_end|>'])] and not counted
    found, counted = written(tokenizer_of(CHATML, '<|im_end|>'), *rows)
    assert not found and counted['pairs with equal answers'] == 1
    assert counted[f'messages with {field!r}, which the chat template does not write'] == 2


def test_calls_tools_and_their_results(tmp_path):
    turns = [
        user('hi', name='joe'),
        assistant(None, tool_calls=[CALL]),
        {'role': 'tool', 'content': 'blue', 'tool_call_id': 'c1'},
        assistant('it is blue'),
    ]
    for tools in (TOOLS, json.dumps(TOOLS)):
        rows = read(tmp_path, {'messages': turns, 'tools': tools})
        ((prompt, answers),), counted = written(
            tokenizer_of(FIELDS, '<|im_end|>'), *rows, task='sft', last_turn_only=True
        )
        assert prompt.startswith(json.dumps(TOOLS)) and json.dumps([CALL]) in prompt and 'bluec1' in prompt
        assert answers == ['it is blue<|im_end|>']
        assert counted == {"messages with 'name', which the chat template does not write": 1}
    for last_only in (True, False):
        t = tokenizer_of(CHATML, '<|im_end|>')
        counted = tokenise(rows, t, 'sft', 256, 128, 'start', Counter(), last_turn_only=last_only).left_out
        expected = {
            "messages with 'name'": 1,
            "messages with 'tool_calls'": 1,
            "messages with 'tool_call_id'": 1,
            'tools': 1,
        }
        # the call is not written, so there is nothing of it to train on
        expected |= {} if last_only else {'empty answers': 1}
        assert {reason.partition(',')[0]: n for reason, n in counted.items()} == expected
    call = read(tmp_path, {'messages': turns[:2]})  # a call alone is an answer where the template writes it
    assert written(tokenizer_of(FIELDS, '<|im_end|>'), *call, task='sft')[0][0][1] == [
        json.dumps([CALL]) + '<|im_end|>'
    ]
    found, counted = written(tokenizer_of(CHATML, '<|im_end|>'), *call, task='sft')
    assert not found and counted['empty answers'] == 1


def test_a_field_that_the_template_writes_of_one_message_alone():
    last = FIELDS.replace('if m.reasoning_content', 'if m.reasoning_content and loop.last')
    row = {'prompt': [user('a'), assistant('b', thinking='x'), user('c')], 'response': [assistant('d', thinking='y')]}
    (found,), counted = written(tokenizer_of(last, '<|im_end|>'), row, task='sft')
    assert found[1] == ['<think>y</think>d<|im_end|>'] and list(counted.values()) == [1]


def test_a_field_that_the_template_cannot_do_without():
    needs = "{% if not messages[0].name %}{{ raise_exception('who?') }}{% endif %}" + CHATML
    row = {'prompt': [user('hi', name='joe')], 'response': [assistant('yes')]}
    found, counted = written(tokenizer_of(needs, '<|im_end|>'), row, task='sft')
    assert found and not counted


def test_other_tools_are_another_example(tmp_path):
    chat = {'messages': [user('hi'), assistant('yes')]}
    rows = read(tmp_path, chat | {'tools': TOOLS}, chat | {'tools': TOOLS * 2}, chat | {'tools': TOOLS}, chat)
    assert len(written(tokenizer_of(FIELDS, '<|im_end|>'), *rows, task='sft')[0]) == 3


@pytest.mark.parametrize('system', ['system', 'system_prompt'])
def test_the_system_column(tmp_path, system):
    chat = {'prompt': [user('hi')], 'chosen': [assistant('yes')], 'rejected': [assistant('no')]}
    text = {'prompt': 'hi', 'chosen': ' yes', 'rejected': ' no'}
    own = chat | {'prompt': [{'role': 'system', 'content': 'Be brief.'}, user('hi')]}
    rows = read(
        tmp_path,
        *(row | {system: 'Be brief.'} for row in (chat, text, own)),
        chat | {system: None},
        text | {system: ''},
    )
    found, _ = written(tokenizer_of(CHATML, '<|im_end|>'), *rows)
    told = ('<|im_start|>system\nBe brief.<|im_end|>\n' + ASKED, ['yes<|im_end|>', 'no<|im_end|>'])
    assert found == [told] * 3 + [(ASKED, told[1]), ('hi', [' yes<|im_end|>', ' no<|im_end|>'])]
    for row, words in ((own | {system: 'Be long.'}, 'are not the same'), ({'text': 'a', system: 'b'}, 'no question')):
        with pytest.raises(UserError, match=words):
            read(tmp_path, row)


def test_weights(tmp_path):
    chat = {'messages': [user('a', weight=0), assistant('b', weight=1)]}
    assert read(tmp_path, chat) == [{'prompt': [user('a')], 'response': [assistant('b')]}]
    not_trained = {'messages': [user('a'), assistant('b', weight=0)]}
    (tmp_path / 'rows.jsonl').write_text(json.dumps(not_trained) + '\n' + json.dumps(chat))
    rows, left_out = sources.load_rows(str(tmp_path / 'rows.jsonl'), 'train', undivided=True)
    assert len(rows) == 1 and left_out == {'answers of weight 0, which are not to be trained on': 1}
    with pytest.raises(UserError, match="the 'weight' of a message is 0.5"):
        read(tmp_path, {'messages': [user('a'), assistant('b', weight=0.5)]})


def test_columns_of_parquet_fill_no_fields(tmp_path):
    """In a column every message has the fields of all others: null there is no value."""
    import pyarrow
    import pyarrow.parquet

    other = CALL | {'function': {'name': 'go', 'arguments': {'to': 'sea'}}}
    chats = [[user('hi', name='joe'), assistant('', tool_calls=[call])] for call in (CALL, other)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{'messages': chat} for chat in chats]), tmp_path / 'rows.parquet'
    )
    rows, _ = sources.load_rows(str(tmp_path / 'rows.parquet'), 'train', undivided=True)
    assert [row['prompt'] + row['response'] for row in rows] == chats


def test_what_stands_beside_a_question_does_not_divide(tmp_path):
    rows = [
        {'prompt': [user(f'q{i}', id=f'{i} {k}')], 'response': [assistant('a')]} for i in range(60) for k in range(2)
    ]
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    asked = [
        {row['prompt'][0]['content'] for row in sources.load_rows(str(tmp_path / 'rows.jsonl'), split)[0]}
        for split in ('train', 'test')
    ]
    assert asked[0] and asked[1] and not asked[0] & asked[1]


def test_messages_that_the_template_leaves_out():
    silent = CHATML.replace('{% for m in messages %}', "{% for m in messages if m.role != 'system' %}")
    _, counted = written(
        tokenizer_of(silent, '<|im_end|>'), {'prompt': [SYSTEM, user('hi')], 'chosen': CHOSEN, 'rejected': REJECTED}
    )
    assert counted == {'messages whose content the chat template changes or leaves out': 1}


# ---- begun answers ----


@pytest.mark.parametrize('case', sorted(set(CASES) - {'several'}))
def test_a_begun_answer_goes_on(case):
    """The prompt ends in the midst of the turn; with the answer it is what the template makes of the finished one."""
    template, eos, begins, extra = CASES[case]
    t = tokenizer_of(template, eos, begins)
    begun = [user('hi'), assistant('Sure: ')]
    for said in ([assistant('yes')], 'yes'):
        row = {'prompt': begun, 'chosen': said, 'rejected': [assistant('no')]}
        ((prompt, answers),), _ = written(t, row)
        assert prompt.endswith(('Sure: ', 'Sure:')) and answers[0].strip().startswith('yes')
        for text, whole in zip(answers, ('Sure: yes', 'Sure: no'), strict=True):
            joint = t.apply_chat_template(
                [user('hi'), assistant(whole)], tokenize=False, chat_template=template or PLAIN_CHAT
            )
            assert prompt + text == joint.removesuffix('\n') + ''.join(extra)
    assert [t.decode(ids) for ids in tokenise_prompts([begun], t, 128, 'start', Counter())] == [prompt]


# ---- ends, and special tokens that somebody has written ----


@pytest.mark.parametrize('end', ['<|im_end|>', '<|im_end|>\n', '<|im_end|>\n<|im_end|>\n', ' '])
@pytest.mark.parametrize('eos', ['<|im_end|>', EOS])
def test_an_end_is_there_once(end, eos):
    t = tokenizer_of(CHATML, eos)
    ends = '<|im_end|>' if eos == '<|im_end|>' else '<|im_end|>' + EOS
    chat = {'prompt': [user('hi')], 'chosen': [assistant('yes' + end)], 'rejected': [assistant('no')]}
    (found,), counted = written(t, chat)
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
    for name, inner, trainer in (
        ('llama', llama, trainers.BpeTrainer), ('metaspace', metaspace, trainers.BpeTrainer),
        ('unigram', unigram, trainers.UnigramTrainer), ('wordpiece', wordpiece, trainers.WordPieceTrainer),
    ):  # fmt: skip
        more = {'unk_token': '<unk>'} if name == 'unigram' else {}
        inner.train_from_iterator(text, trainer(vocab_size=120, special_tokens=special, show_progress=False, **more))
        yield name, transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token='</s>', unk_token='<unk>')
    yield 'byte level', tokenizer_of(CHATML, '<|im_end|>')


@pytest.mark.parametrize('name, t', list(tokenizers_of_all_kinds()), ids=lambda x: x if isinstance(x, str) else '')
def test_special_tokens_in_text_stay_text(name, t):
    t.chat_template = CHATML
    ids = set(t.convert_tokens_to_ids(['<|im_start|>', '<|im_end|>']))
    for row in (
        {'prompt': 'hi', 'chosen': f' {WORDS}', 'rejected': ' no'},
        {'prompt': f'hi {WORDS} yes', 'chosen': ' yes', 'rejected': ' no'},
    ):
        examples = tokenise([row], t, 'pairs', 256, 128, 'start', Counter())
        end = {t.eos_token_id}
        assert all(
            not ids & set(part[:-1]) | (ids - end) & set(part[-1:])
            for part in (examples[0][0].tolist(), *(a.tolist() for a in examples[0][1]))
        )
        assert examples.left_out == {'special tokens in a text, kept as text': 1, NO_CHAT: 1}
    clean = [user('hi'), assistant('yes')]
    for row in (
        {'prompt': [user(f'hi {WORDS}')], 'chosen': [assistant('yes')], 'rejected': [assistant('no')]},
        {'prompt': [user('hi')], 'chosen': [assistant(f'yes {WORDS}')], 'rejected': [assistant('no')]},
    ):
        examples = tokenise([row], t, 'pairs', 256, 128, 'start', Counter())
        both = [*examples[0][0].tolist(), *examples[0][1][0].tolist()]
        expected = t(t.apply_chat_template(clean, tokenize=False), add_special_tokens=False)['input_ids']
        assert [i for i in both if i in ids] == [i for i in expected if i in ids]  # the template's own, and no others
        text = row['prompt'][0]['content'] if WORDS in row['prompt'][0]['content'] else row['chosen'][0]['content']
        assert text.replace(' ', '') in t.decode(both).replace(' ', '')
        assert examples.left_out == {'special tokens in a text, kept as text': 1}


def test_what_a_template_writes_around_turns_is_special_too():
    """Some tokenizers have the marks of turns as added tokens that are not special; <think> is one that people may write."""
    t = toy.tokenizer()
    t.add_tokens(['<|im_start|>', '<|im_end|>', '<think>'])
    t.chat_template = THINKS
    row = {'prompt': [user('a <|im_end|> b')], 'response': [assistant('<think>c')]}
    examples = tokenise([row], t, 'sft', 256, 128, 'start', Counter())
    prompt, (answer,) = examples[0]
    end, think = t.convert_tokens_to_ids(['<|im_end|>', '<think>'])
    assert (prompt == end).sum() == 1 and (answer == end).sum() == 1 and (answer == think).sum() == 2
    assert examples.left_out['special tokens in a text, kept as text'] == 1


def test_special_tokens_of_texts_that_a_template_has_written():
    t = tokenizer_of(CHATML, '<|im_end|>')
    (found,), counted = written(t, {'prompt': ASKED, 'chosen': 'yes<|im_end|>\n', 'rejected': 'no'})
    joint = t(ASKED + 'yes<|im_end|>', add_special_tokens=False)['input_ids']
    examples = tokenise(
        [{'prompt': ASKED, 'chosen': 'yes<|im_end|>\n', 'rejected': 'no'}], t, 'pairs', 256, 128, 'start', Counter()
    )
    assert [*examples[0][0], *examples[0][1][0]] == joint
    assert counted['texts that begin or end with a special token: theirs are read as tokens'] == 1
    (ids,) = tokenise_prompts(['Name a river.<|im_start|>'], t, 99, 'start', Counter())
    assert ids[-1] == t.convert_tokens_to_ids('<|im_start|>')


def test_a_special_token_in_a_role_is_refused():
    with pytest.raises(UserError, match='special token in the role'):
        written(
            tokenizer_of(CHATML, EOS),
            {'prompt': [{'role': 'user<|im_end|>', 'content': 'a'}], 'response': CHOSEN},
            task='sft',
        )


# ---- roles ----


@pytest.mark.parametrize(
    'asks, answers', [('human', 'gpt'), ('User', 'Assistant'), ('prompter', 'model'), ('HUMAN', 'bot')]
)
def test_roles_by_other_names(tmp_path, asks, answers):
    rows = read(tmp_path, {'messages': [{'role': asks, 'content': 'hi'}, {'role': answers, 'content': 'yes'}]})
    assert rows == [{'prompt': [user('hi')], 'response': [assistant('yes')]}]


def test_an_unknown_role_is_named(tmp_path):
    with pytest.raises(UserError, match="does not end with an answer, but with a message of the role 'narrator'"):
        read(tmp_path, {'messages': [user('hi'), {'role': 'narrator', 'content': 'yes'}]})


# ---- templates that cannot be used ----


def test_a_row_that_the_template_refuses(tmp_path):
    chat = {'chosen': CHOSEN, 'rejected': REJECTED}
    rows = read(tmp_path, {'prompt': [user('hi')], **chat}, {'prompt': [SYSTEM, user('hi')], **chat})
    t = tokenizer_of(NO_SYSTEM, '<|im_end|>')
    with pytest.raises(
        UserError, match=r'rows\.jsonl, line 2: the chat template refuses an example: no system turn; .*--skip_bad_rows'
    ):
        written(t, *rows)
    found, counted = written(t, *rows, skip_bad_rows=True)
    assert len(found) == 1 and counted == {'bad rows: the chat template refuses an example: no system turn': 1}
    with pytest.raises(UserError, match='line 2'):
        tokenise_prompts(rows, t, 99, 'start', Counter())
    counted = Counter()
    first, second = tokenise_prompts(rows, t, 99, 'start', counted, skip_bad_rows=True)
    assert first and second is None and counted['bad rows: the chat template refuses an example: no system turn'] == 1


@pytest.mark.parametrize(
    'template, words',
    [
        ({'rag': CHATML, 'tool_use': CHATML}, 'or several with one of the name default, but dict of .*rag'),
        ({'default': {'a': 1}}, 'not a text of at most 1,000,000 characters.* but dict of 8'),
        (7, 'but int of 1'),
        ('x' * 1_000_001, '1,000,001 characters'),
        ('{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}', 'does not end'),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used(monkeypatch, template, words):
    monkeypatch.setattr(sys.modules['text.chat'], 'TEMPLATE_SECONDS', 0.3 if 'end' in words else 600)
    row = {'prompt': [user('hi')], 'chosen': CHOSEN, 'rejected': REJECTED}
    with pytest.raises(UserError, match=words) as info:
        written(tokenizer_of(template, EOS), row, skip_bad_rows=True)
    assert '\n' not in str(info.value) and len(str(info.value)) < 300
    if not isinstance(template, str):  # texts need no template
        assert len(written(tokenizer_of(template, EOS), {'prompt': 'hi', 'chosen': ' a', 'rejected': ' b'})[0]) == 1


def test_a_template_that_is_no_program():
    row = {'prompt': [user('hi')], 'chosen': CHOSEN, 'rejected': REJECTED}
    with pytest.raises(UserError, match='the chat template refuses an example: unexpected end'):
        written(tokenizer_of('{{ nonsense', EOS), row)


def test_a_template_file_that_is_too_long(tmp_path):
    tokenizer_of(CHATML, EOS).save_pretrained(tmp_path)
    load.load_tokenizer(str(tmp_path))
    with open(tmp_path / 'chat_template.jinja', 'wb') as stream:
        stream.truncate(3 * 10**9)  # sparse: nothing is written
    with pytest.raises(UserError, match=r'chat_template\.jinja has 3,000,000,000 bytes'):
        load.load_tokenizer(str(tmp_path))


def test_messages_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr('text.messages.LONGEST', 1000)
    for row in (
        {'messages': [user('a' * 999), assistant('b')]},
        {'prompt': [user('a')], 'response': [assistant('b', thinking='c' * 1000)]},
    ):
        with pytest.raises(UserError, match=r'line 1: .*characters; the limit is 1,000'):
            read(tmp_path, row)


@pytest.fixture(scope='module')
def instruct(tmp_path_factory):
    """A tiny instruct model: its template ends turns with <|im_end|>, which its generation config knows as an end."""
    folder = tmp_path_factory.mktemp('instruct')
    t = tokenizer_of(CHATML, EOS)
    config = toy.model_config()
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config)
    net.generation_config.eos_token_id = [t.convert_tokens_to_ids('<|im_end|>'), t.eos_token_id]
    net.generation_config.repetition_penalty = 1.5
    net.save_pretrained(folder / 'base')
    t.save_pretrained(folder / 'base')
    rows = [{'prompt': [SYSTEM, *PROMPT], 'chosen': CHOSEN, 'rejected': [{'role': 'assistant', 'content': f'dull {i}'}]} for i in range(8)]  # fmt: skip
    (folder / 'chats.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    yield folder
    if dist.is_initialized():
        dist.destroy_process_group()


def run(script, folder, *flags):
    out = folder / script.removesuffix('.py')
    flags = [f'--data={folder}/chats.jsonl', f'--eval_data={folder}/chats.jsonl', '--batch_size=8', '--warmup_steps=0',
             '--sample_during_eval', '--max_new_tokens=16', '--temperature=0', f'--out_dir={out}', *flags]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, 'argv', [script, *flags])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        patch.setattr(torch, 'set_num_threads', lambda n: None)
        patch.setenv('NANOPREF_CACHE', str(folder / 'cache'))
        runpy.run_path(str(ROOT / script), run_name='script')
    return out, [json.loads(line) for line in (out / 'samples.jsonl').read_text().splitlines()]


def test_training_and_sampling(instruct):
    """SFT learns the one answer, DPO goes on from there; both ask with the template's prompt and stop where its turn ends."""
    # 100 steps, the last of them small: the answer is settled, with every token's probability above 0.9
    learn = ['--lr=5e-3', '--lr_schedule=linear', '--n_epochs=800', '--do_first_eval=false']
    out, samples = run('sft.py', instruct, f'--model={instruct}/base', *learn)
    rows = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    assert rows[-1]['loss/eval'] < 0.025  # a mean over four tokens
    t = transformers.AutoTokenizer.from_pretrained(instruct / 'base')
    asked = t.apply_chat_template([SYSTEM, *PROMPT], add_generation_prompt=True, tokenize=False)
    assert {row['prompt'] for row in samples} == {asked}
    assert {row['response'] for row in samples} == {'very fine .'}  # neither the end of the turn nor anything after it
    for folder in (out / 'model', run('dpo.py', instruct, f'--model={out}/model', '--lr=1e-5')[0] / 'model'):
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == CHATML
        kept = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
        assert kept.eos_token_id == [t.convert_tokens_to_ids('<|im_end|>'), t.eos_token_id]
        assert kept.repetition_penalty == 1.5


@pytest.mark.parametrize(
    'content', ['{"do_sample": false, "temperature": 0.5, "eos_token_id": [3, 4]}', '{broken', None]
)
def test_odd_generation_configs(instruct, tmp_path, content):
    """One that cannot be written again keeps its tokens; a broken or a missing one is passed over."""
    shutil.copytree(instruct / 'base', tmp_path / 'm')
    (tmp_path / 'm/generation_config.json').unlink()
    if content:
        (tmp_path / 'm/generation_config.json').write_text(content)
    shell = load.load_model(str(tmp_path / 'm'), empty=True)
    assert shell.generation_config.eos_token_id == ([3, 4] if content and 'eos' in content else None)
    shell.generation_config.save_pretrained(tmp_path)
