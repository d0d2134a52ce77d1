"""A model with several end tokens: the one that was sampled is trained on, counted, scored and measured, and no other."""

from functools import partial

import numpy as np
import pytest
import torch
import transformers
from helpers import metrics, read_jsonl, run_script, tiny_reward

from feedback import score
from hf import generate, load
from runtime import ranks
from text import toy

EOS = toy.tokenizer().eos_token_id
STOPS = range(100, 180)  # ends of the generation config, so many that most answers meet one
ENDS = {EOS, *STOPS}
LENGTH = 10  # tokens of the longest answer
SIZES = f'--n_examples=16 --batch_size=16 --minibatch_size=16 --n_eval_examples=8 --max_new_tokens={LENGTH}'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Toy models of random weights: a policy and its reference with many ends, a reward model that has one."""
    folder = tmp_path_factory.mktemp('models')
    for seed, name in enumerate(('policy', 'reference')):
        net = load.load_model('toy', seed=seed)
        net.generation_config.eos_token_id = [EOS, *STOPS]
        net.save_pretrained(folder / name)
        toy.tokenizer().save_pretrained(folder / name)
    tiny_reward(folder / 'reward')
    return folder


@pytest.fixture
def raw(monkeypatch):
    """What was drawn: a row of tokens for every answer, in the order of their beginnings, with whatever stands behind their ends."""
    rows, row_of, draw = [], {}, generate._Draw.__call__

    def recorded(self, ids, scores):
        steps = self.step.tolist()
        out = draw(self, ids, scores)
        for seed, step, token in zip(self.seeds, steps, out.argmax(1).tolist(), strict=True):
            if step == 0:
                rows.append([])
                row_of[seed] = rows[-1]
            row_of[seed].append(token)
        return out

    monkeypatch.setattr(generate._Draw, '__call__', recorded)
    return rows


def sampled(row):
    """A row of `raw` to its first end, which belongs to it, or to the length of answers."""
    ends = [place for place, token in enumerate(row[:LENGTH]) if token in ENDS]
    return row[: ends[0] + 1] if ends else row[:LENGTH]


def logps(net, prompt, answer):
    """The log-probs of an answer's tokens, by the model's own forward."""
    net.set_attn_implementation('eager')
    with torch.no_grad():
        all_logps = net(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].float().log_softmax(-1)
    return all_logps[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]


def shown(row):
    """The text of an answer as samples.jsonl has it, without its end."""
    return toy.tokenizer().decode(row[:-1] if row[-1] in ENDS else row)


FLAGS = {'ppo': '--reward_model={0}/reward', 'grpo': '--group_size=4 --missing_eos_penalty=3 --reward_model=gold'}


@pytest.mark.parametrize('loss', FLAGS)
def test_what_was_sampled_is_trained_on_scored_and_counted(folders, raw, tmp_path, loss):
    flags = f'{SIZES} --ppo_epochs=1 --loss={loss} {FLAGS[loss]} --do_first_eval=false'.format(folders)
    script = run_script('ppo.py', *flags.split(), f'--model={folders}/policy', f'--out_dir={tmp_path}/run')
    answered = script['this_round']
    trained = [answer.tolist() for _, answers in answered.examples for answer in answers]
    assert sorted(trained) == sorted(map(sampled, raw[:16]))
    ended = [answer[-1] in ENDS for answer in trained]
    assert any(answer[-1] in STOPS for answer in trained) and not all(ended)
    assert answered.answers['ended'].tolist() == ended
    (row,) = metrics(tmp_path / 'run', 'train')
    lengths = [len(answer) for answer in trained]
    assert (row['ended/train'], row['length/train']) == pytest.approx((np.mean(ended), np.mean(lengths)))
    # the log-probs of the tokens that were sampled: a random model gives each about 1/512, and none of them e^-14
    expected = logps(load.load_model(f'{folders}/policy'), answered.examples[0][0].tolist(), trained[0])
    assert answered.tokens['old'][: len(trained[0])].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    # the evaluation
    rows = list(map(sampled, raw[16:]))
    (evaluated,) = metrics(tmp_path / 'run', 'eval')
    assert evaluated['ended/eval'] == np.mean([row[-1] in ENDS for row in rows])
    assert sorted(row['response'] for row in read_jsonl(tmp_path / 'run/samples.jsonl')) == sorted(map(shown, rows))
    if loss == 'grpo':
        return

    # a reward model reads at the end of text, as in training, also behind another end that was sampled
    net = transformers.AutoModelForSequenceClassification.from_pretrained(folders / 'reward').eval()
    for i, answer in enumerate(trained):
        ids = [*answered.examples[i][0].tolist(), *answer] + [EOS] * (answer[-1] != EOS)
        with torch.no_grad():
            expected = net(torch.tensor([ids])).logits.item()
        assert answered.answers['score'][i].item() == pytest.approx(expected, abs=1e-4)


def test_functions_score_answers_without_their_ends(folders, raw, tmp_path, monkeypatch):
    """Also without one that the tokenizer does not know as a special token."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own.py').write_text("""import json
def f(prompts, responses, rows):
    with open('told.jsonl', 'a') as file:
        file.writelines(json.dumps(response) + '\\n' for response in responses)
    return [1.0] * len(rows)""")
    flags = f'{SIZES} --loss=grpo --group_size=4 --reward=own.py:f --model={folders}/policy --out_dir=run'
    run_script('ppo.py', *flags.split())
    assert any(sampled(row)[-1] in STOPS for row in raw)
    assert sorted(read_jsonl('told.jsonl')) == sorted(shown(sampled(row)) for row in raw)


def test_scores_are_read_at_the_end_of_text(folders):
    """It is appended to an answer without it."""
    ranks.setup()
    scorer, tokenizer = score.load_scorer(str(folders / 'reward'), torch.device('cpu'))
    items = [([1, 2], answer) for answer in ([3, 100], [3, 100, EOS])]
    without, ended = score.scores(scorer, tokenizer, items, 4096)
    assert without == pytest.approx(ended, abs=1e-5)


def test_kl_of_samples_is_of_what_was_sampled(folders, raw, tmp_path):
    flags = ['--n_examples=2', '--batch_size=2', '--n_eval_examples=8', '--sample_during_eval', '--n_eval_model_samples=8',
             f'--max_new_tokens={LENGTH}', '--lr=0', f'--ref_model={folders}/reference']  # fmt: skip
    run_script('dpo.py', f'--model={folders}/policy', f'--out_dir={tmp_path}/run', *flags)
    policy, reference = (load.load_model(f'{folders}/{name}') for name in ('policy', 'reference'))
    lines = read_jsonl(tmp_path / 'run/samples.jsonl')[:8]
    assert [line['generator'] for line in lines] == ['policy'] * 8
    gaps, lengths = [], []
    for line, row in zip(lines, raw[:8], strict=True):
        prompt, answer = toy.tokenizer().encode(line['prompt']), sampled(row)
        gaps.append((logps(policy, prompt, answer) - logps(reference, prompt, answer)).sum().item())
        lengths.append(len(answer))
        assert line['response'] == shown(answer)
        assert all(value == round(value, 6) for value in line.values() if isinstance(value, float))
    assert any(sampled(row)[-1] in STOPS for row in raw[:8])
    row = metrics(tmp_path / 'run', 'eval')[0]
    assert row['kl_eval/samples'] == pytest.approx(np.mean(gaps), abs=1e-3)
    assert row['kl_eval/samples_per_token'] == pytest.approx(sum(gaps) / sum(lengths), abs=1e-3)


def test_generate_keeps_the_end_if_asked(folders, raw):
    net, tokenizer = load.load_model(f'{folders}/policy'), toy.tokenizer()
    assert generate.stop_tokens(net, tokenizer) == ENDS
    draw = partial(generate.generate, net, tokenizer, [[5, 6]] * 16, range(16), max_new_tokens=LENGTH)
    whole, bare = draw(keep_end=True), draw(keep_end=False)
    assert whole == list(map(sampled, raw[:16])) and any(len(answer) == 1 for answer in whole)
    assert bare == [generate.without_end(answer, ENDS) for answer in whole]
