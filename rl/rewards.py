"""What scores the answers of a round, for ppo.py's sampled answers and for its answers to held-out prompts: a weighted sum of
reward models, of functions of the user's own (reward_functions.py), and of the toy world's gold reward."""

import os
from functools import partial

import torch

import fsdp
from feedback import score
from hf.load import check_same_tokens
from rl import reward_functions
from runtime.log import say
from text import toy
from text.tokenise import source_rows


class Reward:
    """The sum of Parts, loaded. Every rank makes it, and calls it, together with the others. Raises UserError."""

    def __init__(self, parts, config, max_tokens, tokenizer, device):
        self.parts, self.config, self.max_tokens, self.tokenizer = parts, config, max_tokens, tokenizer
        self.rows = {}  # split -> uid -> (prompt, its row), for functions; on rank 0, where they run
        self.judges, self.workers = {}, {}
        # processes for slow functions
        n = config.reward_workers
        if config.reward_timeout and not n:
            n = min(8, os.cpu_count())
        for part in parts:
            if part.file and n:
                self.workers[part] = reward_functions.Workers(part, n, config.reward_timeout)
            elif not part.file and part.what != 'gold':
                self.judges[part] = self._load_judge(part.what, device)

    def _load_judge(self, name, device):
        """(a reward model, its tokenizer), which reads the policy's ids."""
        how = {option: self.config[option] for option in ('dtype', 'device_map', 'trust_remote_code')}
        judge = score.load_scorer(name, device, **how)
        check_same_tokens(self.tokenizer, judge[1], f'the reward model {name}', self.config.model)
        return judge

    def read_rows(self, **splits):
        """Read the rows of these splits' Examples again, with all their columns, for functions. None: nothing scores them."""
        if not any(part.file for part in self.parts):
            return
        config = self.config
        names = 'num_turns skip_bad_rows columns chat system'
        how = {name: config[name] for name in names.split()} | {'undivided': config.eval_data is not None}
        for split, examples in splits.items():
            data = config.data if split == 'train' else config.eval_data or config.data
            if examples:
                self.rows[split] = fsdp.on_one_rank(partial(source_rows, examples, data, split, 'prompts', **how))

    def __call__(self, examples, split, uids, ends=()):
        """Columns of all answers to prompts of these uids: name -> (answers,), float64, equal on every rank.

        score is the sum, score_NAME a part of several, without its weight; late: whether the time limit cut it. ends: as in
        score.scores."""
        columns, late = {'score': 0.0}, []
        for part in self.parts:
            if part.file:
                values, which = fsdp.shared(partial(self._by_function, part, examples, split, uids))
                late.append(which)
            elif part.what == 'gold':
                values = [toy.gold(*text) for text in texts(examples, self.tokenizer)]
            else:
                items = [(prompt, answer) for prompt, answers in examples for answer in answers]
                values = score.scores(*self.judges[part], items, self.max_tokens, ends=ends)
            values = torch.as_tensor(values, dtype=torch.float64)
            columns['score'] += part.weight * values
            if len(self.parts) > 1:
                columns[f'score_{part.name}'] = values
        if self.config.reward_timeout and late:
            columns['late'] = torch.tensor(late).any(0).double()
        return columns

    def _by_function(self, part, examples, split, uids):
        """(numbers, which were late) of all answers."""
        prompts, responses, rows = [], [], []
        for uid, (_, answers) in zip(uids.tolist(), examples, strict=True):
            prompt, row = self.rows[split][uid]
            for answer in answers:
                text = self.tokenizer.decode(answer, skip_special_tokens=True)
                responses.append(text if isinstance(prompt, str) else text.strip())
                prompts.append(prompt)
                rows.append(row)
        values, late = reward_functions.score(part, prompts, responses, rows, self.workers.get(part))
        if any(late):
            say(f'note: {sum(late)} of {len(late)} calls of {part} took too long (--reward_timeout): they give 0')
        return values, late


def toy_metrics(examples, tokenizer, split):
    """What the toy world says of answers, whatever they are trained on: name -> tensor of one number, a mean."""
    pairs = texts(examples, tokenizer)
    gold = torch.tensor([toy.gold(*text) for text in pairs]).double()
    well_formed = torch.tensor([toy.well_formed(answer) for _, answer in pairs]).double()
    return {f'gold/{split}': gold.mean(), f'well_formed/{split}': well_formed.mean()}


def texts(examples, tokenizer):
    """(prompt, answer) of every answer of Examples, as text."""
    found = []
    for prompt, answers in examples:
        asked = tokenizer.decode(prompt)
        for answer in answers:
            found.append((asked, tokenizer.decode(answer, skip_special_tokens=True)))
    return found
