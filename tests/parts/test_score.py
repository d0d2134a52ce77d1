"""python -m feedback.score: scores of pairs and of answers, what it prints, RewardBench's table; the code in a reward model's card.

test_reward.py has score.scores itself: packed, padded, in microbatches, against transformers."""

import re
import sys

import numpy as np
import pytest
import torch
import transformers
from helpers import ROOT, read_jsonl, run_script, tiny_model, write_jsonl

from configurator import UserError
from feedback import score
from text import toy

CHATML = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"""
CHATML += """{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
BOS = 7  # any id


@pytest.fixture(scope='module', params=[False, True], ids=['no bos', 'bos'])
def reward_model(request, tmp_path_factory):
    """The out_dir of a reward model that two steps have trained on chats; its template ends a turn with a line break."""
    import tokenizers

    folder = tmp_path_factory.mktemp('model')
    tiny_model(folder / 'base', 'llama', vocab_size=514)
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = CHATML
    if request.param:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(BOS)
        before = tokenizers.processors.TemplateProcessing('x $A', special_tokens=[('x', BOS)])
        tokenizer.backend_tokenizer.post_processor = before
    tokenizer.save_pretrained(folder / 'base')
    data = write_jsonl(folder / 'train.jsonl', toy.pairs('train', 60))
    counts = '--n_examples=16 --batch_size=8 --n_eval_examples=4 --max_length=128 --lr=1e-2 --chat'
    run_script('reward.py', f'--model={folder}/base', f'--data={data}', *counts.split(), f'--out_dir={folder}/run')
    return folder / 'run'


def command(monkeypatch, *flags):
    """Run the command in this process."""
    monkeypatch.setattr(sys, 'argv', ['score.py', *map(str, flags)])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    score.main()


def test_the_card_and_the_command_agree(reward_model, tmp_path, monkeypatch, capsys):
    """The code in the card, as it stands there, run in the model's folder: the scores of the command, of chats and of texts."""
    # the code in the docs runs, too
    (code,) = re.findall(r'```python\n(from feedback.*?)```', (ROOT / 'docs/feedback.md').read_text(), re.S)
    names = {}
    exec(code.replace('out/reward_toy', str(reward_model)), names)
    assert names['rewards'].shape == (2,) and np.isfinite(names['rewards']).all()
    chats = [{'prompt': [{'role': 'user', 'content': row['prompt']}], 'id': f'n{i}',
              'chosen': [{'role': 'assistant', 'content': row['chosen'].strip()}],
              'rejected': [{'role': 'assistant', 'content': row['rejected'].strip()}]}
             for i, row in enumerate(toy.pairs('test', 5))]  # fmt: skip
    texts = list(toy.pairs('test', 3))
    texts[0]['prompt'] = ''
    (code,) = re.findall(r'```python\n(import.*?)```', (reward_model / 'model/README.md').read_text(), re.S)
    out = tmp_path / 'new/folder/scores.jsonl'
    for rows in (chats, texts):
        file = write_jsonl(tmp_path / 'pairs.jsonl', rows)
        command(monkeypatch, f'--reward_model={reward_model}', f'--data={file}', f'--out={out}')
        found = read_jsonl(out)
        scope = {}
        with monkeypatch.context() as inside:
            inside.chdir(reward_model / 'model')
            exec(code, scope)
        for row, line in zip(rows, found, strict=True):
            for side in ('chosen', 'rejected'):
                text = row[side] if isinstance(row[side], str) else row[side][0]['content']
                assert line[f'{side}_score'] == pytest.approx(scope['score'](row['prompt'], text), abs=1e-4)
            assert line['margin'] == line['chosen_score'] - line['rejected_score'] and line['prompt'] == row['prompt']
            assert line['id'] == row.get('id', f'{file}, line {found.index(line) + 1}')
    # the test can tell: the score behind a template's line break is another one
    turns = [*chats[0]['prompt'], *chats[0]['chosen']]
    ids = scope['tokenizer'].apply_chat_template(turns, return_dict=False, return_tensors='pt')
    assert scope['tokenizer'].decode(ids[0, -1:]) == '\n'
    assert abs(scope['model'](ids).logits.item() - scope['score'](turns[:1], turns[1]['content'])) > 1e-2
    assert 'accuracy ' in capsys.readouterr().out


def scored(subset, *margins):
    """Rows as the command writes them, of one subset."""
    return [{'id': i, 'subset': subset, 'prompt': f'{subset} {i}', 'chosen_score': m, 'rejected_score': 0.0, 'margin': m}
            for i, m in enumerate(margins)]  # fmt: skip


def test_what_is_printed():
    """By hand: 3 of 4 pairs, a tie counts as wrong; sections weighted by the published sizes, 100 to 40 and 984 to 164."""
    lines = '\n'.join(score.report(scored('mine', 1.5, 1.5, 0.0, 5.0) + scored('other', -3.0)))
    assert '0.600 (95% interval 0.231 to 0.882 over 5 prompts), 3 of 5 pairs' in lines
    assert ', 3 of 5 pairs; equal scores, which count as wrong: 1' in lines
    assert 'mean 1.0000, median 1.5000' in lines and 'chosen 1.0000, rejected 0.0000' in lines
    assert re.search(r'mine +0.750 .*3 of 4', lines) and re.search(r'other +0.000 .*0 of 1', lines)
    assert 'RewardBench' not in lines

    rows = scored('alpacaeval-easy', 1, 2) + scored('mt-bench-med', -1)
    rows += scored('math-prm', 1, -1) + scored('hep-go', 3)
    lines = '\n'.join(score.report(rows))
    assert re.search(r'Chat +0.714\n    alpacaeval-easy +1.000 .*2 of 2', lines)
    assert re.search(r'Reasoning +0.571\n    math-prm +0.500', lines) and 'Safety ' not in lines
    assert re.search(r'RewardBench +0.643, the mean of 2 of its 4 sections', lines) and 'donotanswer' in lines
    assert sum(map(len, score.SECTIONS.values())) == 23
    assert [sum(sizes.values()) for sizes in score.SECTIONS.values()] == [358, 456, 740, 1968]

    # single answers, then their means by the column; a subset of RewardBench's is one like any other
    answers = [*({'score': x, 'good': good} for x, good in ((1.0, True), (3.0, True), (-1.0, False))), {'score': 9.0}]
    said = ['mean 2.0000 over 2 good answers', 'mean -1.0000 over 1 bad answer', 'mean 9.0000 over 1 answer']
    assert [line.split(maxsplit=1)[1] for line in score.report(answers)] == said
    for name, answer in zip(('hep-go', 'hep-js', 'hep-go', 'hep-js'), answers, strict=True):
        answer['subset'] = name
    by_subset = [line.split(maxsplit=1) for line in score.report(answers)[3:]]
    assert by_subset == [['hep-go', 'mean 0.0000 over 2 answers'], ['hep-js', 'mean 6.0000 over 2 answers']]


@pytest.mark.parametrize('reward_model', [False], indirect=True)
def test_answers_long_texts_and_a_folder(reward_model, tmp_path, monkeypatch, capsys):
    """Single answers are scored; what is longer than the limit is cut and counted; of a folder the named split is read."""
    flags = f'--reward_model={reward_model}/model', f'--out={tmp_path}/scores.jsonl'
    file = write_jsonl(tmp_path / 'kto.jsonl', [{'prompt': 'a?', 'response': ' b', 'good': g} for g in (True, False)])
    command(monkeypatch, *flags, f'--data={file}')
    first, second = read_jsonl(tmp_path / 'scores.jsonl')
    assert first['score'] == pytest.approx(second['score'], abs=1e-5) and first['good'] and second['good'] is False

    (tmp_path / 'bench/data').mkdir(parents=True)
    long = {'prompt': 'why ' * 300, 'chosen': ' b' * 90, 'rejected': ' c', 'subset': 'hep-go', 'id': 3}
    write_jsonl(tmp_path / 'bench/data/filtered-00000-of-00001.jsonl', [long, long | {'prompt': 'q', 'id': 4}])
    write_jsonl(tmp_path / 'bench/data/raw-00000-of-00001.jsonl', [long])
    capsys.readouterr()
    command(monkeypatch, *flags, f'--data={tmp_path}/bench[filtered]', '--max_length=100', '--chat')
    said = capsys.readouterr().out
    assert '2 of 2 scored, at most 100 tokens each; left out or changed: 1 prompt cut, 2 answers cut' in said
    found = [(row['id'], row['subset']) for row in read_jsonl(tmp_path / 'scores.jsonl')]
    assert found == [(3, 'hep-go'), (4, 'hep-go')]
    with pytest.raises(UserError, match='several splits; there are filtered, raw: say which'):
        command(monkeypatch, *flags, f'--data={tmp_path}/bench')


@pytest.mark.parametrize('reward_model', [False], indirect=True)
@pytest.mark.parametrize('flags, words', [
    ('--data=toy', 'name the model and what it scores'),
    ('--reward_model={folder}/base --data=toy', 'is no reward model but a language model'),
    ('--reward_model={folder}/run --data={prompts}', 'has prompts alone'),
    ('--reward_model={folder}/run --data={empty}', 'no test examples are left'),
    ('--reward_model={folder}/run --data=toy --by=kind', 'no row of toy has such a column'),
    ('--reward_model={folder}/run --data=toy --by=margin', 'has the new scores under that name'),
    ('--reward_model={folder}/run --data=toy --out={prompts}', 'prompts.jsonl is there, and holds no scores: name another'),
    ('--reward_model={folder}/run --data=toy+{here} --out={here}/empty.jsonl', 'empty.jsonl is a file of the data'),
])  # fmt: skip
def test_mistakes(reward_model, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {'prompts': write_jsonl(tmp_path / 'prompts.jsonl', [{'prompt': 'a?'}]),
             'empty': write_jsonl(tmp_path / 'empty.jsonl', [{'prompt': 'a?', 'chosen': '', 'rejected': ' b'}])}  # fmt: skip
    flags = flags.format(folder=reward_model.parent, here=tmp_path, **files)
    before = (tmp_path / 'empty.jsonl').read_text()
    with pytest.raises(UserError, match=words):
        command(monkeypatch, *flags.split())
    assert (tmp_path / 'empty.jsonl').read_text() == before


def test_a_reward_model_of_somebody_else(tmp_path, monkeypatch):
    """A folder as transformers saves it, of another head width in no way ours: no pad token of its own, no card."""
    tiny_model(tmp_path / 'base', 'qwen2', vocab_size=512)
    torch.manual_seed(0)
    net = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'base', num_labels=1)
    net.save_pretrained(tmp_path / 'theirs')
    toy.tokenizer().save_pretrained(tmp_path / 'theirs')
    pairs, tokenizer = list(toy.pairs('test', 4)), toy.tokenizer()
    file = write_jsonl(tmp_path / 'pairs.jsonl', pairs)
    command(monkeypatch, f'--reward_model={tmp_path}/theirs', f'--data={file}', f'--out={tmp_path}/scores.jsonl')
    for row, line in zip(pairs, read_jsonl(tmp_path / 'scores.jsonl'), strict=True):
        prompt, chosen = tokenizer([row['prompt'], row['chosen']]).input_ids
        plain = net.eval()(input_ids=torch.tensor([[*prompt, *chosen, tokenizer.eos_token_id]])).logits.item()
        assert line['chosen_score'] == pytest.approx(plain, abs=1e-4)
