"""Conversations: sft.py trains on every answer, in one sequence, and sees what the user says between."""

from collections import Counter
from itertools import groupby, product
from operator import itemgetter

import numpy as np
import pytest
import torch
import transformers
from helpers import assistant, metrics, run_script, tiny_model, turn, write_jsonl
from test_chat import BARE, CALL, CASES, CHATML, EOS, HEADERS, OPENS, THINKS, TOOLS, tokenizer_of

import data
import model as models
from configurator import UserError
from hf import attention
from text import turns
from text.messages import alternating
from text.tokenise import Builder, Limits, Part, fit_conversation, load_examples, tokenise

CHAT = alternating(['the room ?', 'clean .', 'the bed ?', 'very fine .', 'and the bar ?', 'dusty and dull'])
SPECIAL = [said | ({'content': 'a <|im_end|> b'} if i in (2, 3) else {}) for i, said in enumerate(CHAT)]
# answers that are not trained on: the first one, or the last one
WEIGHED = {i: [said | ({'weight': 0} if said is CHAT[i] else {}) for said in CHAT] for i in (1, 5)}
CALLS, TOOL = assistant('', tool_calls=[CALL]), turn('tool', '5')
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
BEGIN, SAYS = "{{ '<|im_start|>' + m.role + '\n' }}", "{{ m.content + '<|im_end|>' }}"
ANSWER = '{% if m.role == "assistant" %}{% generation %}TURN{% endgeneration %}{% else %}TURN{% endif %}'
GENERATES = CHATML.replace(TURN, BEGIN + ANSWER.replace('TURN', SAYS) + "{{ '\n' }}")
HIDES = CHATML.replace('m.content', "(m.content if loop.last or m.role == 'user' else '..')")  # the earlier answers
# as TRL's for Qwen 3: the header of an answer, and the line break behind its end, are of the answer, too
MARKS_ALL = CHATML.replace(TURN, ANSWER.replace('TURN', TURN))


def tokens(tokenizer, *chats, max_length=256, max_prompt_length=128, **how):
    rows = [{'prompt': chat[:-1], 'response': chat[-1:], 'turns': chat} for chat in chats]
    return tokenise(rows, tokenizer, 'sft', (max_length, max_prompt_length, 'start'), Counter(), **how)


def ids_and_mask(example):
    """(all ids of an example, whether each is trained on) as transformers has them."""
    prompt, (answer,) = example
    mask = [0] * len(prompt) + [int(x >= 0) for x in answer]
    return [*prompt.tolist(), *np.where(answer < 0, ~answer, answer).tolist()], mask


def shown(tokenizer, examples, i=0):
    """(all of an example as text, the texts of its parts that are trained on)."""
    ids, mask = ids_and_mask(examples[i])
    parts = [list(group) for used, group in groupby(zip(ids, mask, strict=True), itemgetter(1)) if used]
    return tokenizer.decode(ids), [tokenizer.decode([token for token, _ in part]) for part in parts]


@pytest.mark.parametrize('case', [name for name in CASES if name not in ('several', 'no system')])
def test_every_answer_is_trained_on(case):
    """The text is the template's own, and each answer is what it writes behind the prompt that asks for it."""
    template, eos, begins, _ = CASES[case]
    tokenizer = tokenizer_of(template, eos, begins)
    examples = tokens(tokenizer, CHAT)
    text, trained = shown(tokenizer, examples)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False).rstrip('\n')
    assert text == whole + eos * (not whole.endswith(eos))

    # turn by turn; a template that thinks in the last answer alone has no thought in the others
    expected = []
    for i in (1, 3, 5):
        start = tokenizer.apply_chat_template(CHAT[:i], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(CHAT[: i + 1], tokenize=False).rstrip('\n')
        expected.append(answered[len(start) :].replace('<think>\n\n</think>\n\n' if i < 5 else '\0', ''))
    expected[-1] += eos * (not expected[-1].endswith(eos))
    assert trained == expected and len(examples) == 1


@pytest.mark.parametrize('template', [GENERATES, MARKS_ALL])
@pytest.mark.parametrize('length', [2, 4, 6])
def test_a_template_that_marks_its_answers(template, length):
    """The same as the assistant_masks of transformers, of one answer and of several; only GENERATES loses its last line break."""
    tokenizer = tokenizer_of(template, '<|im_end|>')
    ids, mask = ids_and_mask(tokens(tokenizer, CHAT[:length])[0])
    own = tokenizer.apply_chat_template(CHAT[:length], return_dict=True, return_assistant_tokens_mask=True)
    own_ids, own_mask = own['input_ids'], own['assistant_masks']
    end = len(own_ids) - (template == GENERATES)
    assert ids == own_ids[:end] and mask == own_mask[:end] and sum(mask) == sum(own_mask)


@pytest.mark.parametrize('template', [GENERATES, MARKS_ALL])
def test_a_single_answer_that_the_template_marks(template):
    """Readers give no turns to a chat with one answer; an earlier one in the prompt is not trained on."""
    tokenizer = tokenizer_of(template, '<|im_end|>')
    one, last = ({'prompt': chat[:-1], 'response': chat[-1:]} for chat in (CHAT[:2], CHAT[:4]))
    weighed = [turn | ({'weight': 0} if turn is CHAT[1] else {}) for turn in CHAT[:4]]
    found = tokenise([one, last], tokenizer, 'sft', (256, 128, 'start'), Counter())
    expected = [ids_and_mask(tokens(tokenizer, chat)[0]) for chat in (CHAT[:2], weighed)]
    assert [ids_and_mask(found[i]) for i in (0, 1)] == expected
    with pytest.raises(UserError, match='there is no message before the answer'):
        tokenise([{'prompt': [], 'response': CHAT[1:2]}], tokenizer, 'sft', (256, 128, 'start'), Counter())


def test_marks_behind_a_prompt_that_opens_more():
    """Sampling begins with what the prompt opens; so does training, or it is refused. An end alone is no answer."""
    opens = "'<|im_start|>assistant\n{}\n'".format
    # in every prompt, or behind an earlier answer alone
    later = f"({opens('<think>')} if messages | length > 1 else '<|im_start|>assistant\n')"
    for opening, length in product((opens('<think>'), later), (2, 4)):
        templates = (template.replace("'<|im_start|>assistant\n'", opening) for template in (GENERATES, CHATML))
        thinks, unmarked = (tokenizer_of(template, '<|im_end|>') for template in templates)
        row = {'prompt': CHAT[: length - 1], 'response': CHAT[length - 1 : length], 'turns': CHAT[:length]}
        found, expected = (tokenise([row], t, 'sft', (256, 128, 'start'), Counter()) for t in (thinks, unmarked))
        assert [ids_and_mask(example) for example in found] == [ids_and_mask(example) for example in expected]
        assert found.left_out == expected.left_out and len(found) == length // 2
    other = tokenizer_of(GENERATES.replace("'<|im_start|>assistant\n'", opens('<answer>')), '<|im_end|>')
    with pytest.raises(UserError, match='writes an answered chat differently from the prompt'):
        tokens(other, CHAT[:2])
    # the last answer is a thought, which the template leaves out
    says = SAYS.replace('m.content', 'm.content.split("</think>")[-1]')
    marks = tokenizer_of(GENERATES.replace(SAYS, says), '<|im_end|>')
    empty = [assistant('<|im_end|>'), assistant('<|im_end|>\n'), assistant('<think>hm</think>')]
    examples = tokens(marks, [CHAT[0], empty[0]], *([*CHAT[:3], answer] for answer in empty[1:]))
    assert len(examples) == 2 and examples.left_out['empty answers'] == 3
    assert [shown(marks, examples, i)[1] for i in (0, 1)] == [['clean .<|im_end|>']] * 2
    # another turn may follow its end at once
    dense = tokenizer_of(GENERATES.replace(SAYS, says).replace("{{ '\n' }}", ''), '<|im_end|>')
    assert shown(dense, tokens(dense, [CHAT[0], empty[2], *CHAT[2:4]]))[1] == ['very fine .<|im_end|>']


@pytest.mark.parametrize('chats, last_only, trained, num_turns, reasons', [
    # a call alone, where the template knows of none: its end of turn by itself is not trained on
    ([[*CHAT[:3], CALLS, TOOL, CHAT[3]]], False, ['clean .', 'very fine .'], 6, {'empty answers': 1}),
    ([[CHAT[0], CALLS, TOOL, CALLS, TOOL, CALLS], CHAT], False, ['clean .', 'very fine .', 'dusty and dull'], 6, {'empty answers': 3}),
    # what is not trained on is seen, unless it is the end
    ([WEIGHED[1]], False, ['very fine .', 'dusty and dull'], 6, {}), ([WEIGHED[5]], False, ['clean .', 'very fine .'], 4, {}),
    ([CHAT], True, ['dusty and dull'], 6, {}),
    ([SPECIAL], False, ['clean .', 'a <|im_end|> b', 'dusty and dull'], 6, {'special tokens in a text, kept as text': 2}),
])  # fmt: skip
def test_what_is_trained_on(chats, last_only, trained, num_turns, reasons):
    tokenizer = tokenizer_of(CHATML, '<|im_end|>')
    examples = tokens(tokenizer, *chats, last_turn_only=last_only)
    text, parts = shown(tokenizer, examples)
    assert parts == [answer + '<|im_end|>' for answer in trained] and len(examples) == 1
    assert text.count('<|im_start|>') == num_turns and 'clean .' in text
    assert reasons.items() <= examples.left_out.items() and 'weight' not in str(examples.left_out)
    ids, _ = ids_and_mask(examples[0])
    assert ids.count(tokenizer.convert_tokens_to_ids('<|im_end|>')) == num_turns
    assert text.count('<|im_end|>') == num_turns + sum(n for words, n in reasons.items() if 'kept' in words)


@pytest.mark.parametrize('template', [OPENS, HIDES])
def test_a_template_that_cannot_write_it_as_one(template):
    """An example for each answer, each after all before it."""
    tokenizer = tokenizer_of(template, '<|im_end|>')
    examples = tokens(tokenizer, CHAT)
    assert len(examples) == 3 and examples.left_out[turns.APART] == 1
    for i, last in enumerate((1, 3, 5)):
        text, trained = shown(tokenizer, examples, i)
        assert len(trained) == 1 and CHAT[last]['content'] in trained[0] and text.count('<|im_start|>') == last + 1


@pytest.mark.parametrize('template', [CHATML, HEADERS, THINKS, BARE])
def test_a_conversation_that_is_too_long(template):
    """It loses its end: no more than max_length tokens, the last one the end of an answer, nothing else trained on."""
    tokenizer = tokenizer_of(template, EOS)
    whole = tokens(tokenizer, CHAT)
    prompt, (answer,) = whole[0]
    full = answer.tolist()
    # a prompt is cut only where the whole is too long
    for room in (0, 1):
        fits = tokens(tokenizer, CHAT, max_length=len(prompt) + len(full) + room, max_prompt_length=1)
        assert ids_and_mask(fits[0]) == ids_and_mask(whole[0]) and 'prompts cut' not in fits.left_out
    for length in range(len(prompt) + 2, len(prompt) + len(full) + 1):
        cut = tokens(tokenizer, CHAT, max_length=length, max_prompt_length=len(prompt))
        again, (short,) = cut[0]
        short, room = short.tolist(), length - len(prompt)
        assert again.tolist() == prompt.tolist() and 0 < len(short) <= room and short[-1] == tokenizer.eos_token_id
        assert short[:-1] == full[: len(short) - 1]
        assert cut.left_out['conversations cut'] == (length < len(prompt) + len(full))
        # only the user's words, or one more token, were cut away without need
        assert len(short) == room or all(x < 0 for x in full[len(short) : room])


def test_a_first_answer_without_tokens():
    """A tokenizer may have none for it. If only the user's next turn fits, there is nothing to train on."""
    limits, left_out = Limits(bos=None, eos=9, max_length=4, max_prompt_length=2, truncation='start'), Counter()
    assert fit_conversation([1, 2], [[], [5, 6, 7], [8]], limits, left_out) == ([1, 2], [])
    assert left_out == {'conversations cut': 1, 'conversations without an answer within max_length': 1}
    builder = Builder(limits)
    builder.add(Part('p', [], True, 0, conversation=CHAT), [[1, 2], [], [5, 6, 7], [8]])
    assert not len(builder.examples('sft', False)) and builder.left_out == left_out
    # one of the token 0 alone, and one with its end before its last token
    assert fit_conversation([1, 2], [[0], [5, 6, 7], [8]], limits, left_out) == ([1, 2], [[0, 9]])
    assert fit_conversation([1], [[5, 9, 3], [6], [8]], limits, left_out) == ([1], [[5, 9, 3]])


@pytest.mark.parametrize('pad', [False, True])
def test_the_gradient_is_that_of_a_masked_loss(tmp_path, pad):
    """Log-probs and their gradient, beside transformers with the labels of all other tokens at -100."""
    tokenizer = tokenizer_of(CHATML, EOS)
    folder = tiny_model(tmp_path / 'model', 'llama', vocab_size=len(tokenizer) + 8)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    examples = tokens(tokenizer, CHAT, CHAT[:4], CHAT[:2])
    attention.register_attention()
    attention.set_attention(model, packed=not pad)
    batch = data.pack([examples[i] for i in range(3)], [0, 1, 2], pad=pad)
    logps = models.response_logps(model, batch)[0]
    logps.sum().backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]

    # the same by transformers, one conversation at a time
    model.zero_grad()
    attention.set_attention(model, packed=False)
    for i in range(3):
        ids, mask = map(torch.tensor, ids_and_mask(examples[i]))
        labels, count = torch.where(mask > 0, ids, -100), int(mask.sum())
        total = -model(input_ids=ids[None], labels=labels[None]).loss * count
        total.backward()
        assert batch.n[i] == count and logps[i].item() == pytest.approx(total.item(), rel=1e-5)
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-5)


def test_sft_trains_on_conversations(tmp_path):
    """The loss counts every answer's tokens, cut anyhow into microbatches; --last_turn_only switches back."""
    rows = [[said | {'content': f'{said["content"]} {i}'} for said in CHAT[: 2 + 2 * (i % 3)]] for i in range(24)]
    file = write_jsonl(tmp_path / 'd.jsonl', [{'messages': row} for row in rows])
    flags = f'--model={tiny_model(tmp_path / "model", "llama")} --data={file} --eval_data={file} --batch_size=8'.split()
    flags += ['--n_examples=16', '--lr=1e-3', '--warmup_steps=0']
    losses = {}
    for name, more in {'one': [], 'many': ['--max_tokens=300'], 'last': ['--last_turn_only']}.items():
        run_script('sft.py', *flags, *more, f'--out_dir={tmp_path / name}')
        losses[name] = [row['loss/train'] for row in metrics(tmp_path / name, 'train')]
    assert losses['one'] == pytest.approx(losses['many'], rel=1e-5)
    assert losses['one'][0] != pytest.approx(losses['last'][0], rel=1e-3)


def test_texts_become_chats_on_request(tmp_path):
    tokenizer = tokenizer_of(CHATML, '<|im_end|>')
    row = {'prompt': '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:', 'chosen': ' good', 'rejected': ' bad'}
    file = write_jsonl(tmp_path / 'd.jsonl', [row, {'prompt': 'q', 'chosen': 'x', 'rejected': 'y'}])
    limits = {'max_length': 64, 'max_prompt_length': 32, 'undivided': True}
    found = load_examples(file, 'train', tokenizer, 'pairs', chat=True, system='s', **limits)
    prompt, answers = found[0]
    told = '<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n'.format
    assert tokenizer.decode(prompt) == told('a') + 'b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n'
    assert [tokenizer.decode(a) for a in answers] == ['good<|im_end|>', 'bad<|im_end|>']
    assert tokenizer.decode(found[1][0]) == told('q')

    # without, a text that shows no turn gets a note
    plain = load_examples(file, 'train', tokenizer, 'pairs', **limits)
    assert tokenizer.decode(plain[1][0]) == 'q'
    assert plain.left_out['note: texts beside a chat template, which --chat would apply'] == 1


def test_a_call_alone_that_the_template_does_not_write():
    """Both are counted: the call that is lost, and the answer that is empty without it."""
    unwritten = "messages with 'tool_calls', which the chat template does not write"
    for count in (1, 2):
        found = tokens(tokenizer_of(CHATML, '<|im_end|>'), [CHAT[0], CALLS] * count)
        assert not len(found) and found.left_out == {unwritten: count, 'empty answers': count}


def test_what_is_no_conversation_to_learn():
    # a begun answer is no turn of its own
    tokenizer = tokenizer_of(GENERATES, '<|im_end|>')
    row = {'prompt': [CHAT[0], assistant('Sure: ')], 'response': [assistant('yes')]}
    examples = tokenise([row], tokenizer, 'sft', (256, 128, 'start'), Counter())
    whole, trained = shown(tokenizer, examples)
    assert whole.endswith('Sure: yes<|im_end|>') and trained == ['yes<|im_end|>']
    # to sample, or for a label, the template's own prompt comes first, whatever it marks
    tokenizer = tokenizer_of(MARKS_ALL, '<|im_end|>')
    for task in ('prompts', 'singles'):
        row = {'prompt': CHAT[:1], 'response': CHAT[1:2], 'good': True}
        prompt, _ = tokenise([row], tokenizer, task, (256, 128, 'start'), Counter())[0]
        assert tokenizer.decode(prompt).endswith('<|im_start|>assistant\n')


def test_calls_and_tools_that_the_template_writes():
    """A call alone is an answer, but not a thought that the template adds by itself. Tools before it move what it marks."""
    chat = [*CHAT[:3], CALLS, TOOL, CHAT[3]]
    writes = tokenizer_of(CHATML.replace('m.content', "(m.content + (m.tool_calls or ['']) | join)"), '<|im_end|>')
    _, trained = shown(writes, tokens(writes, chat))
    assert len(trained) == 3 and "'look'" in trained[1]
    thinks = tokenizer_of(THINKS.replace('loop.last and ', ''), '<|im_end|>')
    examples = tokens(thinks, chat)
    unwritten = "messages with 'tool_calls', which the chat template does not write"
    assert examples.left_out == {unwritten: 1, 'empty answers': 1}
    assert shown(thinks, examples)[1] == [
        f'<think>\n\n</think>\n\n{said}<|im_end|>' for said in ('clean .', 'very fine .')
    ]
    marks = tokenizer_of('{{ (tools or []) | join }}' + GENERATES, '<|im_end|>')
    row = {'prompt': CHAT[:1], 'response': CHAT[1:2], 'turns': CHAT[:2], 'tools': TOOLS}
    text, trained = shown(marks, tokenise([row], marks, 'sft', (256, 128, 'start'), Counter()))
    assert "'look'" in text and trained == ['clean .<|im_end|>']
