"""The reward of sampled answers in ppo.py: a weighted sum of reward models, user-defined functions (reward_functions.py), and
'gold', the known reward of the toy world (text/toy.py)."""

import os
from functools import partial

import torch

from configurator import UserError
from feedback import score
from hf.generate import without_end
from hf.load import check_same_tokens
from hf.probe import max_sequence_length
from rl import reward_functions
from runtime import ranks
from runtime.log import say
from text import toy
from text.chat import decode_answer
from text.tokenise import source_rows


class Reward:
    """A weighted sum of reward_functions.Parts. Construct it and call its methods on all ranks together.

    rows: {split: {uid of a prompt: (prompt, data row)}}, on rank 0 only, where functions run
    reward_models: Part -> (sharded reward model, its tokenizer)
    workers: Part -> worker processes of its function, which otherwise runs in the main process of rank 0"""

    def __init__(self, parts, config, max_tokens, tokenizer, device, longest=0):
        """Load the reward models and prepare the functions. UserError for other token ids, or too few positions.

        max_tokens: of a reward model's microbatch. tokenizer: the policy's. longest: tokens of the longest answer with prompt."""
        self.parts = parts
        self.config = config
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer
        self.rows = {}
        self.reward_models = {}
        self.workers = {}
        # a time limit needs worker processes, because late calls are killed
        n_workers = config.reward_workers
        if config.reward_timeout and not n_workers:
            n_workers = min(8, os.cpu_count())
        for part in parts:
            if part.file and n_workers:
                self.workers[part] = reward_functions.Workers(part, n_workers, config.reward_timeout)
            elif not part.file and part.function_or_model != 'gold':
                self.reward_models[part] = self._load_model(part.function_or_model, device, longest)

    def _load_model(self, name, device, longest):
        """Return (sharded reward model, its tokenizer). name: folder or hub id. Raises UserError, see __init__."""
        options = {option: self.config[option] for option in ('dtype', 'device_map', 'trust_remote_code')}
        reward_model, its_tokenizer = score.load_scorer(name, device, **options)
        check_same_tokens(self.tokenizer, its_tokenizer, f'the reward model {name}', self.config.model)
        limit = max_sequence_length(reward_model)
        needed = longest + 1  # with an end, which a reward model reads
        if needed > limit:
            found = f'prompts with their answers and an end have up to {needed} tokens, where the reward model {name}'
            raise UserError(f'{found} takes {limit}: lower --max_new_tokens or --max_prompt_length')
        return reward_model, its_tokenizer

    def read_rows(self, **examples_by_split):
        """Fill self.rows, which only functions need. examples_by_split: train=, test= Examples; None if their answers are not scored."""
        if not any(part.file for part in self.parts):
            return
        config = self.config
        # as when the Examples were made, so that the prompts are the same
        options = {name: config[name] for name in 'num_turns skip_bad_rows columns chat system'.split()}
        options['undivided'] = config.eval_data is not None  # then no part of data is held out
        sources = {'train': config.data, 'test': config.eval_data or config.data}
        for split, examples in examples_by_split.items():
            if examples:
                # rank 0 reads {uid of a prompt: (prompt, data row)}; the other ranks get None
                read = partial(source_rows, examples, sources[split], split, task='prompts', **options)
                self.rows[split] = ranks.on_rank_0(read)

    def score_columns(self, examples, split, uids, ends=()):
        """Score all answers of Examples. Return columns by name, (answers,) float64 each, equal on all ranks.

        split ('train' or 'test'), uids (examples,): where self.rows has the data row of each prompt. ends: token ids that end an
        answer; functions do not see them. Columns: score, the weighted sum; with several parts score_NAME of each, unweighted;
        late, with functions and --reward_timeout: 1.0 where any function took too long, else 0."""
        columns = {'score': 0.0}
        late_by_part = []  # for each function, whether each call took too long
        for part in self.parts:
            if part.file:
                # it runs on rank 0, and all ranks get what it returns; a reward model, below, runs on all of them together
                values, late = ranks.from_rank_0(partial(self._call_function, part, examples, split, uids, ends))
                late_by_part.append(late)
            elif part.function_or_model == 'gold':
                values = [toy.gold(*pair) for pair in texts(examples, self.tokenizer)]
            else:
                items = [(prompt, answer) for prompt, answers in examples for answer in answers]
                reward_model, tokenizer = self.reward_models[part]
                values = score.scores(reward_model, tokenizer, items, self.max_tokens)

            values = torch.as_tensor(values, dtype=torch.float64)
            columns['score'] += part.weight * values
            if len(self.parts) > 1:
                columns[f'score_{part.name}'] = values
        if self.config.reward_timeout and late_by_part:
            columns['late'] = torch.tensor(late_by_part).any(0).double()
        return columns

    def _call_function(self, part, examples, split, uids, ends):
        """Call a part's function on all answers, see score_columns. Return two lists: scores, and whether each was late (score 0)."""
        prompts = []
        responses = []
        rows = []
        for uid, (prompt_ids, answers) in zip(uids.tolist(), examples, strict=True):
            prompt, row = self.rows[split][uid]  # prompt: text or chat messages, as in the data
            is_chat = not isinstance(prompt, str)
            for answer in answers:
                # skip_special_tokens does not remove every end: to some tokenizers, their end of a turn is no special token
                tokens = without_end(answer.tolist(), ends)
                response = decode_answer(tokens, prompt_ids, self.tokenizer, skip_special_tokens=True)
                # chat templates add white space around messages; in plain text it is part of the answer
                if is_chat:
                    response = response.strip()
                prompts.append(prompt)
                responses.append(response)
                rows.append(row)
        values, late = reward_functions.score(part, prompts, responses, rows, self.workers.get(part))
        if any(late):
            say(f'note: {sum(late)} of {len(late)} calls of {part} took too long (--reward_timeout): they give 0')
        return values, late


def texts(examples, tokenizer):
    """Decode Examples to a list of (prompt, answer), one per answer, without the special tokens of the answers."""
    pairs = []
    for prompt_ids, answers in examples:
        prompt = tokenizer.decode(prompt_ids)
        pairs += [(prompt, tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
    return pairs
