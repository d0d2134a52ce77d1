"""The reward of answers in ppo.py, of sampled ones and of those to held-out prompts.

It is a weighted sum of parts: reward models, functions of the user's own (reward_functions.py), and 'gold', the toy world's known
reward (text/toy.py)."""

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
    """The weighted sum of some reward_functions.Parts. Every rank makes one, and all ranks call its methods together."""

    def __init__(self, parts, config, max_tokens, tokenizer, device):
        """Load the reward models among the parts, and get ready to run its functions. Raises UserError.

        max_tokens: of one microbatch of a reward model. tokenizer: the policy's."""
        self.parts, self.config = parts, config
        self.max_tokens, self.tokenizer = max_tokens, tokenizer
        # split -> uid of a prompt -> (the prompt, its row of the data), on rank 0 alone: functions run there
        self.rows = {}
        # Part -> (a sharded reward model, its tokenizer)
        self.reward_models = {}
        # Part -> the worker processes of its function
        self.workers = {}

        # only a process that runs nothing else can be ended when a call is late: a time limit needs worker processes
        n_workers = config.reward_workers
        if config.reward_timeout and not n_workers:
            n_workers = min(8, os.cpu_count())
        # nothing to prepare: a function without workers, which rank 0 calls in its own process, and gold
        for part in parts:
            if part.is_function and n_workers:
                self.workers[part] = reward_functions.Workers(part, n_workers, config.reward_timeout)
            elif not part.is_function and part.function_or_model != 'gold':
                self.reward_models[part] = self._load_reward_model(part.function_or_model, device)

    def _load_reward_model(self, name, device):
        """Return (sharded reward model, its tokenizer). Raises UserError if it does not read the policy's token ids."""
        options = {option: self.config[option] for option in ('dtype', 'device_map', 'trust_remote_code')}
        reward_model, tokenizer = score.load_scorer(name, device, **options)
        check_same_tokens(self.tokenizer, tokenizer, f'the reward model {name}', self.config.model)
        return reward_model, tokenizer

    def read_rows(self, **examples_of_split):
        """Read the rows of the data again with all their columns, which functions get. Without functions, do nothing.

        examples_of_split: train= and test= Examples, or None for a split whose answers are never scored."""
        if not any(part.is_function for part in self.parts):
            return
        # the options that the data was read with, so that the same prompts come out
        config = self.config
        names = ('num_turns', 'skip_bad_rows', 'columns', 'chat', 'system')
        options = {name: config[name] for name in names}
        options['undivided'] = config.eval_data is not None
        for split, examples in examples_of_split.items():
            data = config.data
            if split == 'test' and config.eval_data:
                data = config.eval_data
            if examples:
                # on_one_rank returns None on the others
                read = partial(source_rows, examples, data, split, 'prompts', **options)
                self.rows[split] = fsdp.on_one_rank(read)

    def score_columns(self, examples, split, uids, ends=()):
        """Score all answers of Examples. Return columns by name, (answers,) float64 each, equal on every rank.

        score: the weighted sum of the parts. score_NAME: one part without its weight, if the sum has several. late: 1.0 for an
        answer at which a function exceeded --reward_timeout, else 0.0; it is there if that option limits any function.
        split ('train' or 'test') and uids (examples,), hashes of the prompts, lead to the rows that read_rows has read. ends: ids
        that end an answer beside the end of text; a reward model reads its score there."""
        # 0.0 becomes a column when the first part is added
        columns = {'score': 0.0}
        late_by_part = []
        for part in self.parts:
            # one rank calls a function, all ranks together run a reward model
            if part.is_function:
                call = partial(self._call_function, part, examples, split, uids)
                values, is_late = fsdp.shared(call)
                late_by_part.append(is_late)
            elif part.function_or_model == 'gold':
                values = [toy.gold(prompt, answer) for prompt, answer in texts(examples, self.tokenizer)]
            else:
                items = [(prompt, answer) for prompt, answers in examples for answer in answers]
                reward_model, tokenizer = self.reward_models[part]
                values = score.scores(reward_model, tokenizer, items, self.max_tokens, ends=ends)

            # add the part to the sum; in the log it has a column of its own, too
            values = torch.as_tensor(values, dtype=torch.float64)
            columns['score'] += part.weight * values
            if len(self.parts) > 1:
                columns[f'score_{part.name}'] = values
        # an answer is late if any of its functions was
        if self.config.reward_timeout and late_by_part:
            columns['late'] = torch.tensor(late_by_part).any(0).double()
        return columns

    def _call_function(self, part, examples, split, uids):
        """Call a part's function on all answers, on rank 0. Return its number of each answer, and whether it was late: two lists.

        A late one has the number 0, and a note says how many there are. Raises UserError if the function fails."""
        prompts, responses, rows = [], [], []
        for uid, (_, answers) in zip(uids.tolist(), examples, strict=True):
            prompt, row = self.rows[split][uid]
            is_chat = not isinstance(prompt, str)
            for answer in answers:
                response = self.tokenizer.decode(answer, skip_special_tokens=True)
                # white space around a chat message belongs to the template; in a text it goes on from the prompt, and is kept
                if is_chat:
                    response = response.strip()
                prompts.append(prompt)
                responses.append(response)
                rows.append(row)
        # without workers the function is called right here, with all answers at once
        values, late = reward_functions.score(part, prompts, responses, rows, self.workers.get(part))
        if any(late):
            say(f'note: {sum(late)} of {len(late)} calls of {part} took too long (--reward_timeout): they give 0')
        return values, late


def toy_metrics(examples, tokenizer, split):
    """Return the toy world's metrics of answers, whatever their reward is: name -> tensor with the mean over all answers.

    gold: the known reward. well_formed: the share of answers that are grammatical to their end."""
    gold, well_formed = [], []
    for prompt, answer in texts(examples, tokenizer):
        gold.append(toy.gold(prompt, answer))
        well_formed.append(toy.well_formed(answer))
    mean_gold = torch.tensor(gold).double().mean()
    share = torch.tensor(well_formed).double().mean()
    return {f'gold/{split}': mean_gold, f'well_formed/{split}': share}


def texts(examples, tokenizer):
    """Return the texts of all answers of Examples, each with that of its prompt: a list of (prompt, answer).

    Special tokens, such as the end of text, are left out of the answer."""
    pairs = []
    for prompt_ids, answers in examples:
        prompt = tokenizer.decode(prompt_ids)
        for answer_ids in answers:
            pairs.append((prompt, tokenizer.decode(answer_ids, skip_special_tokens=True)))
    return pairs
