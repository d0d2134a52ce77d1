"""ppo.py and the formulas behind it: hand-worked numbers, limits, and mistakes of the user; tests/laws/test_law_ppo.py runs it."""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, read_jsonl, refused, run_script, sentence, write_jsonl

import data
from configurator import Config
from rl import formulas, rewards, rollout
from rl.reward_functions import Part
from rl.rewards import Reward, texts
from runtime import guard, log, ranks
from text import toy
from text.examples import Examples


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, *expected):
    return torch.allclose(found, rows(*expected), atol=1e-12, rtol=0)


# ---- formulas ----


def test_gae_and_whitening_by_hand():
    """gamma 0.9, lam 0.5, so gamma lam = 0.45. Row 1: rewards 0 0 1, values 0.5 0.2 0.4.
    delta_3 = 1 - 0.4 = 0.6; delta_2 = 0 + 0.9 * 0.4 - 0.2 = 0.16; delta_1 = 0 + 0.9 * 0.2 - 0.5 = -0.32.
    A_3 = 0.6; A_2 = 0.16 + 0.45 * 0.6 = 0.43; A_1 = -0.32 + 0.45 * 0.43 = -0.1265.
    Row 2 has one token, reward -1, value 0.5: A = -1.5; what stands behind it does not count.
    Whitened: mean 2 and population variance 2/3 of 1 2 3; what is masked is neither counted nor left."""
    mask = torch.tensor([[True] * 3, [True, False, False]])
    rewards, values = rows([0, 0, 1], [-1, 7, 7]), rows([0.5, 0.2, 0.4], [0.5, 7, 7])
    found = formulas.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    assert close(found, [-0.1265, 0.43, 0.6], [-1.5, 0, 0])
    scale = (2 / 3 + 1e-8) ** 0.5
    whitened = formulas.whiten(rows([1, 2], [3, 9]), torch.tensor([[True, True], [True, False]]))
    assert close(whitened, [-1 / scale, 0], [1 / scale, 0])
    # lam = 0: delta; lam = 1: discounted rewards from here on minus the value: 0.81 - 0.5, 0.9 - 0.2, 0.6
    assert close(formulas.gae(rewards, values, mask, gamma=0.9, lam=0.0), [-0.32, 0.16, 0.6], [-1.5, 0, 0])
    assert close(formulas.gae(rewards, values, mask, gamma=0.9, lam=1.0), [0.31, 0.7, 0.6], [-1.5, 0, 0])


def test_ppo_by_hand():
    """clip 0.2. rho = 1.5, A = 1: max(-1.5, -1.2) = -1.2, clipped; A = -1: max(1.5, 1.2) = 1.5.
    rho = 0.5, A = 1: max(-0.5, -0.8) = -0.5; A = -1: max(0.5, 0.8) = 0.8, clipped. Clipped tokens have no gradient.
    At pi = old the loss is minus the advantage, and so is its gradient.
    Values, V_old = 1, R = 2, c = 0.2. V = 1.5: max(0.25, 0.64) / 2 = 0.32, clipped; V = 0.5: max(2.25, 1.44) / 2 = 1.125;
    V = 1.1: 0.81 / 2 = 0.405. Not clipped: 0.125, 1.125, 0.405."""
    pi = rows(1.5, 1.5, 0.5, 0.5, 1.0, 1.0).log().requires_grad_()
    l = formulas.ppo(pi, torch.zeros(6), rows(1, -1, 1, -1, 3, -2), clip=0.2)
    (slope,) = torch.autograd.grad(l.sum(), pi)
    assert close(l, -1.2, 1.5, -0.5, 0.8, -3, 2) and close(slope, 0, 1.5, -0.5, 0, -3, 2)
    value, old, target = rows([1.5, 0.5, 1.1], [1, 1, 1], [2, 2, 2])
    assert close(formulas.value_loss(value, old, target, value_clip=0.2), 0.32, 1.125, 0.405)
    assert close(formulas.value_loss(value, old, target, value_clip=math.inf), 0.125, 1.125, 0.405)


def test_grpo_by_hand():
    """Scores 1 and 3: mean 2, std 1, so A = -+1 / (1 + eps). pi - old = 0, ref - pi = log 2: penalty 2 - log 2 - 1.
    A group whose rewards are equal teaches nothing: there is no gradient at the reference."""
    advantage = formulas.group_advantage(rows([1, 3], [5, 5]), eps=0.25)
    assert close(advantage, [-0.8, 0.8], [0, 0])
    # by default eps is 1e-4, here as large as the std
    assert close(formulas.group_advantage(rows([0, 2e-4])), [-0.5, 0.5])
    l = formulas.grpo(rows(-2), rows(-2), rows(math.log(2) - 2), rows(0.8), clip=0.2, kl_coef=0.5)
    assert l.item() == pytest.approx(-0.8 + 0.5 * (1 - math.log(2)), abs=1e-12)
    pi = rows(-2, -1).requires_grad_()
    l = formulas.grpo(pi, pi.detach(), pi.detach(), advantage[1], clip=0.2, kl_coef=0.1)
    assert not torch.autograd.grad(l.sum(), pi)[0].any()


NUMBERS = json.loads((ROOT / 'tests/parts/trl_grpo_numbers.json').read_text())


@pytest.mark.parametrize('case', NUMBERS['cases'], ids=lambda c: f'{c["kl_coef"]}-{c["per_answer"]}')
def test_grpo_is_what_trl_says(case):
    """TRL's GRPOTrainer (by experiments/trl/grpo.py of 30ee23d): loss and gradient, as a mean over tokens and over answers."""
    n = torch.tensor(NUMBERS['lengths'])
    mask = torch.arange(n.max()) < n[:, None]
    pi, old, ref = (rows(*NUMBERS[k]) for k in ('pi', 'old', 'ref'))
    pi.requires_grad_()
    advantage = rows(*NUMBERS['advantage']).repeat_interleave(n)
    l = formulas.grpo(pi[mask], old[mask], ref[mask], advantage, clip=case['clip'], kl_coef=case['kl_coef'])
    w = (1 / n).repeat_interleave(n).double() if case['per_answer'] else torch.ones_like(l)
    value = (w * l).sum() / (len(n) if case['per_answer'] else n.sum())
    assert value.item() == pytest.approx(case['loss'], rel=1e-6)
    (slope,) = torch.autograd.grad(value, pi)
    assert torch.allclose(slope, rows(*case['gradient']), atol=1e-7, rtol=1e-6)


# ---- a round ----


def test_scores_of_the_toy_world_are_of_texts():
    """Every answer in its order, without the token that ends it."""
    tokenizer, prompt = toy.tokenizer(), 'Review of the hotel:'
    answers = (' the bed was superb .', ' the bed was awful .')
    ids = [tokenizer(text)['input_ids'] + [tokenizer.eos_token_id] for text in answers]
    examples = Examples.of([(tokenizer(prompt)['input_ids'], ids)])
    assert texts(examples, tokenizer) == [(prompt, answer) for answer in answers]
    options = SimpleNamespace(reward_timeout=None, reward_workers=0)
    gold = Reward([Part('gold', 2.0, 'gold')], options, 1, tokenizer, None)
    scores = gold.score_columns(examples, 'train', examples.uid)['score']
    assert scores.tolist() == [2 * toy.gold(prompt, answer) for answer in answers] and scores[0] != scores[1]


def test_a_reward_model_has_positions_for_the_longest_answer_and_its_end(monkeypatch, tmp_path):
    options = Config(dict.fromkeys('reward_timeout reward_workers dtype device_map trust_remote_code model'.split()))
    monkeypatch.setattr(rewards.score, 'load_scorer', lambda *where, **how: (None, None))
    monkeypatch.setattr(rewards, 'check_same_tokens', lambda *names: None)
    monkeypatch.setattr(rewards, 'max_sequence_length', lambda model: 12)
    Reward([Part('rm', 1.0, 'out/rm')], options, 1, None, None, longest=11)
    longer = sentence(partial(Reward, longest=12), [Part('rm', 1.0, 'out/rm')], options, 1, None, None)
    assert 'up to 13 tokens, where the reward model out/rm takes 12: lower --max_new_tokens' in longer
    flags = '--reward_model=out/rm --model=toy --data=toy --batch_size=4 --minibatch_size=4 --max_new_tokens=9'.split()
    assert 'where the reward model out/rm takes 12' in refused('ppo.py', *flags, f'--out_dir={tmp_path}/run')


def test_answers_go_to_their_prompts(monkeypatch):
    """Answer k of a round has seed first_seed + k, and comes after those to the prompts before its own."""

    def answer(policy, tokenizer, prompts, seeds, **settings):
        return [[*prompt, seed] for prompt, seed in zip(prompts, seeds, strict=True)]

    monkeypatch.setattr(rollout.generate, 'sample', answer)
    train = Examples.of([(np.array([n]), [np.array([0])]) for n in range(4)])
    config = Config({'max_new_tokens': 4, 'sample_batch': 2})
    run = SimpleNamespace(policy=None, tokenizer=None, train=train, config=config)
    found = rollout.sample(run, np.array([3, 1]), answers_each=2, first_seed=10)
    by_prompt = [(prompt.tolist(), [a.tolist() for a in answers]) for prompt, answers in found]
    assert by_prompt == [([3], [[3, 10], [3, 11]]), ([1], [[1, 12], [1, 13]])]


def test_slots_and_speeds_of_a_round():
    """Two answers to each of three prompts; the microbatch has the third prompt, first of its step, and a filler."""
    answer, offset = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 0, 1, 2, 0]])
    batch = SimpleNamespace(slot=[0, -1], answer=answer, offset=offset)
    starts = torch.tensor([0, 3, 5, 9, 11, 20])
    found = rollout.token_indices(batch, np.array([2, 0]), starts, per_prompt=2)
    assert found.tolist() == [11, 12, 20, 21, 22, -1]
    speeds = {'counters/step_examples': 2, 'examples_per_second': 0.5, 'tokens_per_second': 2, 'sampling_share': 0.25}
    assert log.speeds(2, 8, elapsed=4.0, sampling_share=1.0) == speeds
    # of a clock that stands still or goes back nothing is known
    assert all(rate != rate for elapsed in (0, -1) for rate in list(log.speeds(6, 0, elapsed).values())[1:])
    # every pass covers all
    of_five = rollout.Round(0, None, range(5), {}, {}, {})
    one, two, three, *more = of_five.minibatches(2, passes=2, seed=0)
    assert sorted([*one, *two, *three]) == [0, 1, 2, 3, 4] and list(map(len, more)) == [2, 2, 1]


def test_weights_of_tokens(tmp_path):
    """A rank without examples runs a filler, whose ratio to other tokens may be infinite: it counts nothing and has no gradient.
    With --per_answer answers of one and of two tokens weigh the same."""
    flags = '--reward=gold --model=toy --data=toy --loss=grpo --group_size=2 --n_examples=4 --batch_size=4 --minibatch_size=4'
    flags += ' --ppo_epochs=1 --max_new_tokens=4 --n_eval_examples=0 --sample_batch=4 --per_answer'
    script = run_script('ppo.py', *flags.split(), f'--out_dir={tmp_path}/run')
    columns = dict.fromkeys(('old', 'ref'), torch.zeros(3)) | {'advantage': torch.tensor([1.0, 10, 10])}
    this_round = SimpleNamespace(tokens=columns, answers={'start': torch.tensor([0, 1])})
    for batch, log_ratio, loss in (
        (data.pack([], [], filler=2), 500.0, 0),
        (data.pack([([5], [[6], [7, 8]])], [0]), 0.0, -11),
    ):
        pi = torch.full((1, len(batch.target)), log_ratio, requires_grad=True)
        script['policy'].token_logps = lambda batch, pi=pi: pi
        sums = script['run_minibatch'](SimpleNamespace(batches=[batch], rows=np.arange(1)), this_round)
        assert sums == {'loss': loss, 'value_loss': 0, 'clipped': 0, 'approx_kl': 0} and pi.grad.any() == bool(loss)


def test_advantages_and_targets_by_hand():
    """Log-ratios 0.5 1 | -2, so rewards -0.05 -0.1 | 0.2, and the score at each last token; offline the score alone."""
    tokens = {'pi': rows(1, 2, 3), 'ref': rows(0.5, 1, 5), 'value': rows(0.6, 0.2, 0.3)}
    table = (False, [-0.1, 0.7, -1.1], [0.5, 0.9, -0.8]), (True, [0, 0.8, -1.3], [1, 1, -1])
    for offline, *expected in table:
        options = SimpleNamespace(kl_coef=0.1, gamma=1.0, lam=0.5, whiten=False, offline=offline)
        found = rollout.advantages_and_targets(options, tokens, rows(1, -1), torch.tensor([2, 1]))
        assert close(torch.stack(found), *expected)


def test_held_out_prompts_of_bad_answers_are_answered_too(tmp_path, small_toy):
    """Labels are of the data's answers, and none of these is sampled from."""
    rows = [{'prompt': f'Review {i}:', 'completion': ' good .', 'label': i == 0} for i in range(4)]
    file = write_jsonl(tmp_path / 'rows.jsonl', rows)
    flags = (
        '--offline --batch_size=4 --minibatch_size=4 --ppo_epochs=1 --max_new_tokens=2 --max_length=32 --save_every=0'
    )
    run_script('ppo.py', *flags.split(), f'--data={file}', f'--eval_data={file}', f'--out_dir={tmp_path}/run')
    samples = read_jsonl(tmp_path / 'run/samples.jsonl')
    assert [(row['examples'], row['sample']) for row in samples] == [(n, i) for n in (0, 4) for i in range(4)]


def test_a_signal_while_sampling_saves(tmp_path, monkeypatch, small_toy):
    """In the second round: answers that wait for a free row are empty then, and no reward function sees them."""
    file = tmp_path / 'own.py'
    file.write_text(
        'def inverse(prompts, responses, rows):\n    return [1 / len(response) for response in responses]\n'
    )
    sample, rounds = rollout.sample, []

    def stopped(*arguments, **options):
        rounds.append(monkeypatch.setattr(guard, '_code', guard.SAVED * len(rounds)))
        return sample(*arguments, **options)

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(rollout, 'sample', stopped)
    monkeypatch.setattr(ranks, 'leave', leave)
    flags = '--n_examples=8 --batch_size=4 --minibatch_size=4 --ppo_epochs=1 --max_new_tokens=2 --sample_batch=1 --eval_every=none'
    with pytest.raises(SystemExit, match=str(guard.SAVED)):
        run_script(
            'ppo.py', *flags.split(), '--do_first_eval=false', f'--reward={file}:inverse', f'--out_dir={tmp_path}/run'
        )
    assert len(rounds) == 2 and (tmp_path / 'run/latest').read_text() == 'checkpoints/0000000004\n'


# ---- a user's mistakes ----


@pytest.mark.parametrize('flags, sentence', [
    ('', 'nothing scores the answers'),
    ('--reward_model=gold --loss=grpo', 'set --group_size to 2 or more'),
    ('--reward_model=gold --loss=grpo --group_size=8 --lam=0.5', '--lam has no effect: grpo has no critic'),
    ('--reward_model=gold --loss=dpo', 'loss must be one of ppo, grpo'),
    ('--reward_model=gold --data=hh', 'known for --data=toy alone'),
    ('--reward_model=nowhere', "'nowhere'"),
    ('--reward_model=gold --batch_size=10 --group_size=4', 'multiples of group_size'),
    ('--reward_model=gold --noise_rate=0.2', '--noise_rate has no effect'),
    ('--reward_model=gold --per_answer', '--per_answer has no effect'),
    ('--reward_model=gold --gamma=1.5', 'gamma and lam must lie between 0 and 1'),
    ('--reward_model=gold --group_size=4 --n_examples=2', 'n_examples 2 is less than one group of 4 answers'),
    ('--offline --group_size=2', '--group_size has no effect'),
    ('--offline --loss=grpo', '--offline goes with --loss=ppo'),
])  # fmt: skip
def test_mistakes(flags, sentence, tmp_path, capsys):
    assert sentence in refused('ppo.py', *flags.split(), f'--out_dir={tmp_path}/run')
    assert 'the run ends after 0' not in capsys.readouterr().out
