"""Score answers with a reward model: accuracy and margins on any file of pairs, RewardBench's table, or the scores alone.

    python -m feedback.score --reward_model=out/reward/model --data=pairs.jsonl
    torchrun --nproc_per_node=4 -m feedback.score --reward_model=OWNER/NAME --data='allenai/reward-bench[filtered]' --chat

Every pair, or prompt with an answer, becomes a line of --out. Texts and chats are read, written and cut as in training, and a
score is read at the end of text. label.py and ppo.py score through this file, too: load_scorer, then scores.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import fsdp
from configurator import UserError, configure
from data import pack, pack_probe, plan, plan_padded
from feedback import winrate
from feedback.answers import append
from hf.load import load_reward, load_tokenizer, separate_pad
from hf.probe import can_pack, room
from model import core, set_attention
from runtime.files import writing
from runtime.log import progress, say
from text.examples import Examples, in_words
from text.files import content_hash, data_files
from text.show import task_of
from text.sources import locate, read_examples, vanished
from text.tokenise import tokenise

# who scores what
reward_model: str | None = None  # folder or hub id of a reward model with one scalar
data: str | None = None  # pairs, or prompts with an answer: hh, hh:PATH, hh+shp, a hub id, a file, a folder
split: str | None = None  # train or test; None: test where the data has one, else all
columns: str | None = None  # which column is what: 'prompt=question, chosen=good, rejected=bad'
chat = False  # texts become chats, so that the model's chat template applies
system: str | None = None  # a message of the system before every prompt; texts become chats
skip_bad_rows = False  # count unreadable rows instead of stopping
max_length: int | None = None  # tokens of prompt and answer; None: what the model reads
truncation = 'start'  # which end a too long prompt loses, down to half of max_length: start or end
# what comes of it
by = 'subset'  # a column of the data, of whose values the table has a line each
out = 'out/scores.jsonl'  # the scores
# machine
max_tokens = 16384  # tokens of one microbatch of one rank; changes no score
dtype = 'float32'  # float32 or bfloat16
device_map: str | None = None  # 'balanced': one process without torchrun spreads the model over its GPUs
trust_remote_code = False  # run code that comes with a model

# examples that are scored together, and then written
CHUNK = 128
# the columns of --out that this file computes: score of a single answer, the others of a pair
SCORES = ('score', 'chosen_score', 'rejected_score', 'margin')
# stands for no limit of tokens
UNLIMITED = 2**30
# RewardBench's sections: a section's score is the mean of its subsets' accuracies with these weights, the subsets' sizes (math
# counts as much as code). Source: arXiv:2403.13787 and its code, rewardbench/constants.py, SUBSET_MAPPING and EXAMPLE_COUNTS.
SECTIONS = {
    'Chat': {'alpacaeval-easy': 100, 'alpacaeval-length': 95, 'alpacaeval-hard': 95, 'mt-bench-easy': 28, 'mt-bench-med': 40},
    'Chat Hard': {'mt-bench-hard': 37, 'llmbar-natural': 100, 'llmbar-adver-neighbor': 134, 'llmbar-adver-GPTInst': 92,
                  'llmbar-adver-GPTOut': 47, 'llmbar-adver-manual': 46},
    'Safety': {'refusals-dangerous': 100, 'refusals-offensive': 100, 'xstest-should-refuse': 250, 'xstest-should-respond': 154,
               'donotanswer': 136},
    'Reasoning': {'math-prm': 984, 'hep-cpp': 164, 'hep-go': 164, 'hep-java': 164, 'hep-js': 164, 'hep-python': 164, 'hep-rust': 164},
}  # fmt: skip


def load_scorer(name, device, *, dtype='float32', device_map=None, trust_remote_code=False):
    """Return (the sharded reward model, its tokenizer) of a folder or hub id. Every rank calls this, after fsdp.setup.

    A trial decides whether the model runs on packed or on padded batches. Raises UserError if there is no such model."""
    tokenizer = separate_pad(load_tokenizer(name, trust_remote_code))
    build = partial(load_reward, name, tokenizer, trust_remote_code=trust_remote_code)
    model = fsdp.shard(build, device, dtype=dtype, train=False, device_map=device_map)
    # two made-up pairs of different lengths must have the same scores packed as padded, or the model is not packed
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(len(tokenizer), size=(3, 20))
    long_prompt = a, [b, c[:5]]
    short_prompt = b[:7], [c[:9], a]
    trial_pairs = Examples.of([long_prompt, short_prompt])
    packed, padded = pack_probe(trial_pairs, device)
    set_attention(model, can_pack(model, packed, padded, say))
    return model, tokenizer


@guard.memory_for('answers do not fit beside the reward model; lower max_tokens, which changes no score')
@torch.no_grad()
def scores(model, tokenizer, items, max_tokens, ends=()) -> np.ndarray:
    """Return the scores (n,), float32, of n answers. They are equal on every rank, and every rank must call this.

    items: n of (prompt ids, answer ids). An answer that does not end with the end of text gets one, as in training. ends: other
    ids that may end an answer, such as the end of a turn; its score is read at its last token. max_tokens: tokens of one
    microbatch of one rank. Raises UserError for an item that the model cannot read, and for scores that are no numbers."""
    net = core(model)
    device = net.device
    is_padded = net.config._attn_implementation != 'packed'
    # a padded batch has a row for every answer: a limit of 0 tokens puts each answer into a group of its own
    group_limit = 0 if is_padded else max_tokens
    groups = _groups(items, tokenizer.eos_token_id, ends, room(model), group_limit)
    lengths = np.array([group.tokens for group in groups])

    # the microbatches of this rank, each a list of places in groups; every rank makes the same plan
    rank, world = fsdp.data_rank()
    make_plan = plan_padded if is_padded else plan
    microbatches = make_plan(lengths, world, max_tokens)[rank]
    # scores of each microbatch, and for every one of them the number of its item
    parts = []
    slots = []
    for numbers in microbatches:
        examples = []
        for number in numbers:
            group = groups[number]
            examples.append((group.prompt, group.answers))
            slots += group.slots
        batch = pack(examples, numbers, pad=is_padded, filler=1, device=device)
        parts.append(model.response_scores(batch))
        # a rank without work computes a filler of one answer, since the others wait for it; slot -1 drops its score
        if not numbers:
            slots.append(-1)

    # the scores of all ranks, in the order of the items
    columns = fsdp.gather_columns({'score': torch.cat(parts)}, slots, len(items))
    values = columns['score'].float().numpy()
    if not np.isfinite(values).all():
        raise UserError("the reward model's scores are not numbers: its weights are broken, or too large for its type")
    return values


class _Group(NamedTuple):
    """Answers to one prompt, which share its computation. slots: the number of each answer's item."""

    prompt: np.ndarray
    answers: list
    slots: list

    @property
    def tokens(self):
        """The tokens of the prompt and all answers together."""
        return len(self.prompt) + sum(map(len, self.answers))


def _groups(items, eos, ends, longest, max_tokens):
    """Return the items (prompt ids, answer ids) as _Groups of at most max_tokens each, or of a single longer answer.

    eos is appended to an answer that ends neither with it nor with one of ends. longest: tokens that the model reads. Raises
    UserError for an item that is longer, or has no prompt."""
    endings = {eos, *ends}
    by_prompt = {}  # bytes of a prompt's ids -> its groups
    for slot, (prompt, answer) in enumerate(items):
        prompt = np.asarray(prompt, np.int64)
        answer = np.asarray(answer, np.int64)
        has_end = len(answer) > 0 and answer[-1] in endings
        if not has_end:
            answer = np.append(answer, eos)
        if not len(prompt) or len(prompt) + len(answer) > longest:
            takes = f'the reward model takes a prompt and at most {longest} in all'
            raise UserError(f'item {slot}: prompt and answer have {len(prompt)} + {len(answer)} tokens, where {takes}')
        # into the last group of its prompt, or into a new one if that is full
        groups = by_prompt.setdefault(prompt.tobytes(), [])
        is_full = not groups or groups[-1].tokens + len(answer) > max_tokens
        if is_full:
            groups.append(_Group(prompt, [], []))
        groups[-1].answers.append(answer)
        groups[-1].slots.append(slot)
    return [group for groups in by_prompt.values() for group in groups]


# ---- the command ----


def main():
    """Score the data that the options name, write a line of --out for each example, and print a report. Raises UserError."""
    config = configure(globals())
    if not reward_model or not data:
        raise UserError('name the model and what it scores: --reward_model=FOLDER --data=FILE')
    if by in SCORES:
        raise UserError(f'--by={by}: {out} has the new scores under that name; call the column of the data otherwise')
    _, _, device = fsdp.setup()
    examples, left_out = fsdp.first_of_host(read)
    # without the option, a missing column only means that there is no table
    has_column = any(by in example.raw for _, example in examples)
    if config.given('by') and not has_column:
        raise UserError(f'--by={by}: no row of {data} has such a column')
    options = {'dtype': dtype, 'device_map': device_map, 'trust_remote_code': trust_remote_code}
    model, tokenizer = load_scorer(reward_model, device, **options)

    # room is infinite for a model without a longest sequence
    limit = int(min(max_length or UNLIMITED, room(model)))
    rows = []
    guard.on_stop(lambda: f'{len(rows)} of {len(examples)} are in {out}')
    fsdp.on_one_rank(begin_file)
    with progress(len(examples), ' examples', 'scored') as bar:
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            new_rows = score_examples(model, tokenizer, chunk, limit, left_out)
            fsdp.on_one_rank(partial(append, out, new_rows, sync=False))
            rows += new_rows
            bar.update(len(chunk))
    if not rows:
        raise vanished(data, split or 'test', left_out)

    # first what was left out or cut, then the scores
    changed, notes = in_words(left_out)
    at_most = f', at most {limit:,} tokens each' if limit < UNLIMITED else ''
    counts = f'{len(rows):,} of {len(examples):,} scored{at_most}'
    lines = [f'data: {counts}; left out or changed: {changed}', *notes]
    lines += [f'{reward_model} on {data}', *report(rows)]
    lines.append(f'{out}: a line for each')
    say('\n'.join(lines))


def read():
    """Return (list of (task, example), Counter of what was left out) for all sources in --data.

    task: 'pairs' or the task of single answers, as task_of finds it for a source. Raises UserError for data that cannot be
    scored, and if --out is one of its files."""
    examples = []
    left_out = Counter()
    options = {'undivided': split is None, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    part = split or 'test'
    for source in data.split('+'):
        # the scores must not be written over the data
        _, path, _ = locate(source)
        may_overwrite = path and os.path.exists(out)
        if may_overwrite and any(os.path.samefile(out, file) for file in data_files(path)):
            raise UserError(f'--out={out} is a file of the data: name another file for the scores')
        # The first example decides the task of its source; an empty source has {}. What is left out until then is not counted,
        # for the source is read again.
        first = next(read_examples(source, part, Counter(), **options), {})
        task = task_of(first)
        if task == 'prompts' and first:
            raise UserError(f'{source} has prompts alone: a score needs chosen and rejected, or a response')
        for example in read_examples(source, part, left_out, task=task, **options):
            examples.append((task, example))
    if not examples:
        raise vanished(data, part, left_out)
    return examples, left_out


def begin_file():
    """Make --out an empty file, and its folder if there is none. Raises UserError if it cannot be written."""
    with writing(out):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text('')


def score_examples(model, tokenizer, examples, limit, left_out):
    """Return the rows of --out, a dict for each (task, example), with its scores. Every rank must call this.

    An example is cut to `limit` tokens. One that cannot be used has no row, and is counted in left_out, as cuts are."""
    options = {'chat': chat, 'system': system, 'skip_bad_rows': skip_bad_rows, 'last_turn_only': True, 'margins': True}
    rows = []
    items = []  # (prompt ids, answer ids) of all answers
    columns_of = []  # for each item the row and the name of the column for its score
    for task, example in examples:
        # a row is known by the id in the data, or by its place there
        row = {'id': example.raw.get('id', example.where or None)}
        if by in example.raw:
            row[by] = example.raw[by]
        row |= {name: example[name] for name in ('prompt', 'good') if name in example}
        names = ['chosen_score', 'rejected_score'] if task == 'pairs' else ['score']

        # one example goes in, and one comes out, or none if it was left out; a prompt may have to lose all but half of limit
        tokenised = tokenise([example], tokenizer, task, limit, limit // 2, truncation, left_out, **options)
        for prompt, answers in tokenised:
            rows.append(row)
            for name, answer in zip(names, answers, strict=True):
                items.append((prompt, answer))
                columns_of.append((row, name))

    # if all examples were left out, there is nothing to run the model on
    values = scores(model, tokenizer, items, max_tokens).tolist() if items else []
    for (row, name), value in zip(columns_of, values, strict=True):
        row[name] = value
    # how much better the chosen answer is
    for row in rows:
        if 'chosen_score' in row:
            row['margin'] = row['chosen_score'] - row['rejected_score']
    return rows


# ---- the report ----


def report(rows):
    """Return the lines to print on the rows of --out: of pairs accuracy and margins, of single answers their mean scores.

    Pairs with a column `by` also have a table."""
    lines = []
    pairs = [row for row in rows if 'margin' in row]
    if pairs:
        margins = [row['margin'] for row in pairs]
        chosen = np.mean([row['chosen_score'] for row in pairs])
        rejected = np.mean([row['rejected_score'] for row in pairs])
        _, accuracy_in_words = accuracy(pairs)
        ties = margins.count(0)
        if ties:
            accuracy_in_words += f'; {ties:,} with equal scores count as wrong'
        lines.append(f'  accuracy   {accuracy_in_words}')
        mean = np.mean(margins)
        median = np.median(margins)
        lines.append(f'  margin     mean {mean:.4f}, median {median:.4f}')
        lines.append(f'  scores     chosen {chosen:.4f}, rejected {rejected:.4f}')
    # nobody may have said whether an answer is good: None
    answers = [row for row in rows if 'score' in row]
    for good, name in ((True, 'good answers'), (False, 'bad answers'), (None, 'answers')):
        values = [row['score'] for row in answers if row.get('good') is good]
        if values:
            mean = np.mean(values)
            lines.append(f'  scores     mean {mean:.4f} over {len(values):,} {name}')
    return lines + table(pairs)


def accuracy(pairs):
    """Return (accuracy, the same in words with its 95% interval and its counts) for rows of --out that are pairs.

    The accuracy is the share of pairs whose chosen answer has the higher score. The interval is over prompts."""
    # equal scores are wrong
    is_right = [row['margin'] > 0 for row in pairs]
    prompts = [content_hash(row['prompt']) for row in pairs]
    share = float(np.mean(is_right))
    low, high = winrate.interval(is_right, clusters=prompts)
    # in words, as the report prints it
    counts = f'{sum(is_right):,} of {len(is_right):,} pairs'
    words = f'{share:.3f} (95% interval {low:.3f} to {high:.3f}), {counts}'
    return share, words


def table(pairs):
    """Return a line with the accuracy of the pairs for each value of the column `by`, and [] if no pair has it.

    If all values are subsets of RewardBench, they stand below their sections, whose scores and whose mean follow its rules."""
    groups = {}  # value of the column -> its pairs
    for row in pairs:
        if by in row:
            groups.setdefault(str(row[by]), []).append(row)
    # (accuracy, words) of each value
    accuracies = {name: accuracy(group) for name, group in sorted(groups.items())}
    subsets = {name for sizes in SECTIONS.values() for name in sizes}
    is_reward_bench = groups and groups.keys() <= subsets
    if not is_reward_bench:
        return [f'  {name:24s} {words}' for name, (_, words) in accuracies.items()]

    # a subset weighs as much in its section as published, whatever its size here; all sections weigh the same
    lines = []
    section_scores = []
    for section, sizes in SECTIONS.items():
        # the data may be a part of RewardBench
        present = [name for name in sizes if name in accuracies]
        if not present:
            continue
        shares = [accuracies[name][0] for name in present]
        score = np.average(shares, weights=[sizes[name] for name in present])
        section_scores.append(score)
        lines.append(f'  {section:24s} {score:.3f}')
        for name in present:
            _, words = accuracies[name]
            lines.append(f'    {name:22s} {words}')
    total = np.mean(section_scores)
    lines.append(f'  {"RewardBench":24s} {total:.3f}, the mean of {len(section_scores)} of its 4 sections')
    missing = sorted(subsets - accuracies.keys())
    if missing:
        lines.append(f'  subsets that are not in the data: {", ".join(missing)}')
    return lines


if __name__ == '__main__':
    main()
    fsdp.leave()
