"""What scores the answers of a round, for ppo.py's sampled answers and for its answers to held-out prompts: a weighted sum of
reward models, of functions of the user's own (functions.py), and of the toy world's gold reward."""

import os
from functools import partial

import torch

import fsdp
from feedback import score
from hf.load import check_same_tokens
from rl import functions
from runtime.log import say
from text import toy
from text.tokenise import source_rows


class Reward:
    """The sum of Parts, loaded. Every rank makes it, and calls it, together with the others. Raises UserError."""

    def __init__(self, parts, config, max_tokens, tokenizer, device):
        self.parts, self.config, self.max_tokens, self.tokenizer = parts, config, max_tokens, tokenizer
        self.rows = {}  # split -> uid -> what functions are told of a prompt; on rank 0, where they run
        self.judges = {part: load_judge(part.what, config, tokenizer, device) for part in parts if not part.file}
        # processes for slow functions
        limit = config.reward_timeout
        n = config.reward_workers or (min(8, os.cpu_count()) if limit else 0)
        self.workers = {part: functions.Workers(part, n, limit) for part in parts if part.file and n}

    @property
    def models(self):
        """The reward models among the Parts."""
        return [judge[0] for judge in self.judges.values() if judge]

    def read_rows(self, **splits):
        """Read the rows of these splits' Examples again, with all their columns, for functions. None: nothing scores them."""
        if not any(part.file for part in self.parts):
            return
        config = self.config
        names = 'num_turns skip_bad_rows columns chat system'
        how = {name: config[name] for name in names.split()} | {'undivided': config.eval_data is not None}
        for split, examples in splits.items():
            data = config.data if split == 'train' else config.eval_data or config.data
            todo = partial(source_rows, examples, data, split, 'prompts', **how)
            self.rows[split] = fsdp.on_one_rank(todo) if examples else {}

    def __call__(self, examples, split, uids, ends=()):
        """Columns of all answers to prompts of these uids: name -> (answers,), float64, equal on every rank.

        score is the sum, score_NAME a part of several, without its weight; late: whether the time limit cut it. ends: as in
        score.scores."""
        found, late = {}, []
        for part in self.parts:
            if part.file:
                found[part], cut = fsdp.shared(lambda part=part: self._by_function(part, examples, split, uids))
                late.append(torch.tensor(cut))
            else:
                how = {'max_tokens': self.max_tokens, 'ends': ends}
                found[part] = score_answers(examples, self.tokenizer, self.judges[part], **how)
        found = {part: torch.as_tensor(values, dtype=torch.float64) for part, values in found.items()}
        columns = {'score': sum(part.weight * values for part, values in found.items())}
        if len(found) > 1:
            columns |= {f'score_{part.name}': values for part, values in found.items()}
        if self.config.reward_timeout and late:
            columns['late'] = torch.stack(late).any(0).double()
        return columns

    def _by_function(self, part, examples, split, uids):
        """(numbers, which were late) of all answers."""
        asked, responses = [], []
        for uid, (_, answers) in zip(uids.tolist(), examples, strict=True):
            one = functions.Asked(*self.rows[split][uid])
            for answer in answers:
                text = self.tokenizer.decode(answer, skip_special_tokens=True)
                responses.append(text if isinstance(one.prompt, str) else text.strip())
                asked.append(one)
        values, late = functions.score(part, asked, responses, self.workers.get(part))
        if any(late):
            say(f'note: {sum(late)} of {len(late)} calls of {part} took too long (--reward_timeout): they give 0')
        return values, late


def load_judge(name, config, tokenizer, device):
    """What gives the scores of a reward model, or of gold: the judge of score_answers. Raises UserError."""
    if name == 'gold':
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
