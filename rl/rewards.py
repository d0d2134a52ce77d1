"""What scores the answers of a round: one function, for ppo.py's sampled answers and for its answers to held-out prompts."""

import torch

from feedback import score
from hf.load import check_same_tokens
from text import toy


def load_judge(config, tokenizer, device):
    """What gives the scores that --reward_model of a script asks for: the judge of score_answers. Raises UserError."""
    name = config.reward_model
    if name in (None, 'gold'):
        return None
    how = {option: config[option] for option in ('dtype', 'device_map', 'trust_remote_code')}
    judge = score.load_scorer(name, device, **how)
    check_same_tokens(tokenizer, judge[1], f'the reward model {name}', config.model)
    return judge


def score_answers(examples, tokenizer, judge, *, max_tokens, ends=()):
    """The score of every answer of Examples: (answers,), float64, equal on every rank; all of them call this together.

    tokenizer: the policy's. judge: a reward model, which reads ids, with its tokenizer; None: the gold reward of the toy world,
    which reads texts. max_tokens, ends: as in score.scores."""
    if judge is None:
        gold = [toy.gold(prompt, answer) for prompt, answer in texts(examples, tokenizer)]
        return torch.tensor(gold, dtype=torch.float64)
    model, its_tokenizer = judge
    items = [(prompt, answer) for prompt, answers in examples for answer in answers]
    found = score.scores(model, its_tokenizer, items, max_tokens, ends=ends)
    return torch.from_numpy(found).double()


def toy_metrics(examples, tokenizer, split):
    """What the toy world says of answers, whatever they are trained on: name -> tensor of one number, a mean."""
    pairs = texts(examples, tokenizer)
    gold = torch.tensor([toy.gold(prompt, answer) for prompt, answer in pairs])
    well_formed = torch.tensor([toy.well_formed(answer) for _, answer in pairs])
    return {f'gold/{split}': gold.double().mean(), f'well_formed/{split}': well_formed.double().mean()}


def texts(examples, tokenizer):
    """(prompt, answer) of every answer of Examples, as text."""
    found = []
    for prompt, answers in examples:
        asked = tokenizer.decode(prompt)
        for answer in answers:
            found.append((asked, tokenizer.decode(answer, skip_special_tokens=True)))
    return found
