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

import load
import toy
from configurator import UserError
from tokenise import PLAIN_CHAT, tokenise

ROOT = Path(__file__).resolve().parent.parent
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


def test_a_template_that_opens_a_thought():
    row = {'prompt': PROMPT, 'chosen': CHOSEN, 'rejected': REJECTED}
    with pytest.raises(UserError, match='writes an answered chat differently from the prompt'):
        tokenise([row], tokenizer_of(OPENS, EOS), 'pairs', 256, 128, 'start', Counter())


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
