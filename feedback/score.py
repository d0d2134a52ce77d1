"""Score answers with a reward model: accuracy and margins on any file of pairs, RewardBench's table, or the scores alone.

    python -m feedback.score --reward_model=out/reward/model --data=pairs.jsonl
    torchrun --nproc_per_node=4 -m feedback.score --reward_model=OWNER/NAME --data='allenai/reward-bench[filtered]' --chat

Writes a line to --out for each pair or answer. Texts are cut as in training, and a score is read at the end-of-text token."""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import os
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import fsdp
from configurator import UserError, configure
from data import pack, plan, plan_padded
from feedback import winrate
from feedback.answers import append
from hf.attention import set_attention
from hf.load import load_reward, load_tokenizer, separate_pad
from hf.parts import core
from hf.probe import can_pack, max_sequence_length
from runtime import errors, ranks
from runtime.files import writing
from runtime.log import progress, say
from text.examples import Examples, counted, in_words
from text.files import content_hash
from text.show import task_of
from text.sources import joined, keep_data, nothing_left, read_examples
from text.tokenise import tokenise

# model and data
reward_model: str | None = None  # folder or hub id of a reward model with one scalar
data: str | None = None  # pairs, or prompts with an answer: hh, hh:PATH, hh+shp, a hub id, a file, a folder
split: str | None = None  # train or test; None: test where the data has one, else all
columns: str | None = None  # column mapping: 'prompt=question, chosen=good, rejected=bad'
chat = False  # turn texts into chats, to apply the model's chat template
system: str | None = None  # a system message for every prompt; implies --chat
skip_bad_rows = False  # count unreadable rows instead of stopping
max_length: int | None = None  # tokens of prompt and answer; None: the model's limit
truncation = 'start'  # start or end: where to cut long prompts, down to half of max_length
# output
by = 'subset'  # a column of the data; the report has a line for each of its values
out = 'out/scores.jsonl'  # the scores
# machine
max_tokens = 16384  # tokens of one microbatch of one rank; changes no score
dtype = 'float32'  # float32 or bfloat16
device_map: str | None = None  # 'balanced': spread the model over the GPUs of one process, without torchrun
trust_remote_code = False  # run code that comes with a model

CHUNK = 128  # examples per write to --out
SCORES = ('score', 'chosen_score', 'rejected_score', 'margin')  # columns that this script adds
UNLIMITED = 2**30  # tokens
# RewardBench's sections. A section's score is the average of its subsets' accuracies, weighted by these sizes (math-prm counts as
# much as all code). Source: arXiv:2403.13787 and rewardbench/constants.py, SUBSET_MAPPING and EXAMPLE_COUNTS.
SECTIONS = {
    'Chat': {'alpacaeval-easy': 100, 'alpacaeval-length': 95, 'alpacaeval-hard': 95, 'mt-bench-easy': 28, 'mt-bench-med': 40},
    'Chat Hard': {'mt-bench-hard': 37, 'llmbar-natural': 100, 'llmbar-adver-neighbor': 134, 'llmbar-adver-GPTInst': 92,
                  'llmbar-adver-GPTOut': 47, 'llmbar-adver-manual': 46},
    'Safety': {'refusals-dangerous': 100, 'refusals-offensive': 100, 'xstest-should-refuse': 250, 'xstest-should-respond': 154,
               'donotanswer': 136},
    'Reasoning': {'math-prm': 984, 'hep-cpp': 164, 'hep-go': 164, 'hep-java': 164, 'hep-js': 164, 'hep-python': 164, 'hep-rust': 164},
}  # fmt: skip


def load_scorer(name, device, *, dtype='float32', device_map=None, trust_remote_code=False):
    """Load and shard a reward model, a folder or hub id; return (model, tokenizer). Call on all ranks, after ranks.setup."""
    tokenizer = separate_pad(load_tokenizer(name, trust_remote_code))
    build = partial(load_reward, name, tokenizer, trust_remote_code=trust_remote_code)
    model = fsdp.shard(build, device, dtype=dtype, train=False, device_map=device_map)
    # pack batches if that scores as padding does: tried on pairs (prompt, [chosen, rejected]) of random tokens
    a, b, c = np.random.default_rng(0).integers(len(tokenizer), size=(3, 20))
    long_pair = a, [b, c[:5]]
    short_pair = b[:7], [c[:9], a]
    set_attention(model, can_pack(model, Examples.of([long_pair, short_pair]), device))
    return model, tokenizer


@errors.on_full_memory('answers do not fit beside the reward model; lower max_tokens, which changes no score')
@torch.no_grad()
def scores(model, tokenizer, items, max_tokens):
    """Return the scores of n answers, an (n,) float32 array, read at eos. All ranks must call this; each gets the scores of all items.

    items: n tuples (prompt ids, answer ids); eos is appended to an answer that does not end with it, as in training. max_tokens:
    tokens of a microbatch on one rank. Raises UserError for an item that is too long, and for scores that are not finite."""
    net = core(model)
    is_padded = net.config._attn_implementation != 'packed'
    # padded batches cannot share prompts: with a limit of 0 each answer gets a group of its own
    group_limit = 0 if is_padded else max_tokens
    groups = _groups(items, tokenizer.eos_token_id, max_sequence_length(model), group_limit)
    lengths = np.array([group.tokens for group in groups])
    # microbatches of this rank, as lists of indices into groups; every rank computes the same plan
    rank, world_size = ranks.data_rank()
    make_plan = plan_padded if is_padded else plan
    microbatches = make_plan(lengths, world_size, max_tokens)[rank]
    batch_scores = []  # a tensor for each microbatch
    slots = []  # of each score in these: the number of its item, or -1
    for indices in microbatches:
        its_groups = [groups[index] for index in indices]
        # a rank without a group scores a filler answer, to stay in step with the others; gather_columns drops slot -1
        examples = [(group.prompt, group.answers) for group in its_groups]
        batch = pack(examples, indices, pad=is_padded, filler=1, device=net.device)
        batch_scores.append(model.response_scores(batch))
        slots += [slot for group in its_groups for slot in group.slots] or [-1]
    columns = fsdp.gather_columns({'score': torch.cat(batch_scores)}, slots, len(items))
    values = columns['score'].float().numpy()
    if not np.isfinite(values).all():
        raise UserError("the reward model's scores are not numbers: its weights are broken, or too large for its type")
    return values


class _Group(NamedTuple):
    """Answers that share a prompt, which is computed once. slots: the number of each answer among the items of scores()."""

    prompt: np.ndarray
    answers: list
    slots: list

    @property
    def tokens(self):
        return len(self.prompt) + sum(map(len, self.answers))


def _groups(items, eos, max_length, max_tokens):
    """Return items (prompt ids, answer ids) in _Groups of at most max_tokens, or of one answer if that is longer. Raises UserError."""
    by_prompt = {}  # prompt ids as bytes -> the groups with this prompt
    for slot, (prompt, answer) in enumerate(items):
        prompt = np.asarray(prompt, np.int64)
        answer = np.asarray(answer, np.int64)
        if not len(answer) or answer[-1] != eos:
            answer = np.append(answer, eos)
        if not len(prompt) or len(prompt) + len(answer) > max_length:
            takes = f'the reward model takes a prompt and at most {max_length} in all'
            raise UserError(f'item {slot}: prompt and answer have {len(prompt)} + {len(answer)} tokens, where {takes}')
        # add to the last group of this prompt, or open a new one if it is full
        groups = by_prompt.setdefault(prompt.tobytes(), [])
        if not groups or groups[-1].tokens + len(answer) > max_tokens:
            groups.append(_Group(prompt, [], []))
        groups[-1].answers.append(answer)
        groups[-1].slots.append(slot)
    return [group for groups in by_prompt.values() for group in groups]


def main():
    """Score --data with --reward_model, write a line of --out for each example, and print a report."""
    config = configure(globals())
    if not reward_model or not data:
        raise UserError('name the model and what it scores: --reward_model=FOLDER --data=FILE')
    if by in SCORES:
        raise UserError(f'--by={by}: {out} has the new scores under that name; call the column of the data otherwise')
    _rank, _world_size, device = ranks.setup(options=config)
    # the data first: what is wrong with it is told before the model is loaded
    examples, left_out = ranks.first_of_host(read)
    # a missing column is an error only if the user asked for it
    has_column = any(by in example.raw for _, example in examples)
    if config.given('by') and not has_column:
        raise UserError(f'--by={by}: no row of {data} has such a column')
    options = {'dtype': dtype, 'device_map': device_map, 'trust_remote_code': trust_remote_code}
    model, tokenizer = load_scorer(reward_model, device, **options)
    # tokens of a prompt and its answer; max_sequence_length() is infinite for a model that takes any length
    limit = int(min(max_length or UNLIMITED, max_sequence_length(model)))
    # score and write a chunk at a time, so that a stopped run leaves what it has scored
    rows = []
    guard.on_stop(lambda: f'{len(rows)} of {len(examples)} are in {out}')
    ranks.on_rank_0(create_output)
    with progress(len(examples), ' examples', 'scored') as bar:
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            new_rows = score_examples(model, tokenizer, chunk, limit, left_out)
            ranks.on_rank_0(partial(append, out, new_rows, sync=False))
            rows += new_rows
            bar.update(len(chunk))
    if not rows:
        raise nothing_left(data, split or 'test', left_out)
    changed, notes = in_words(left_out)
    at_most = f', at most {limit:,} tokens each' if limit < UNLIMITED else ''
    counts = f'{len(rows):,} of {len(examples):,} scored{at_most}'
    say('\n'.join([f'data: {counts}; left out or changed: {changed}', *notes]))
    say('\n'.join([f'{reward_model} on {data}', *report(rows), f'{out}: a line for each']))


def read():
    """Read all sources in --data; return (list of (task, example), Counter of skipped rows by reason).

    task: 'pairs', or one with single answers. UserError without answers, or if --out is data or no file of scores."""
    examples = []
    left_out = Counter()
    keep_data(data, out)
    # old scores are replaced, but no other file that is not empty
    if os.path.isfile(out):
        with open(out, 'rb') as stream:
            first_line = stream.readline(10**6)
        if not re.match(rb'$|\{"id": .*score": ', first_line):
            raise UserError(f'--out={out} is there, and holds no scores: name another file')
    part = split or 'test'
    # undivided: without --split, data without a test split is read whole
    options = {'undivided': split is None, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    for source in joined(data):
        # the first example decides the task of the source; a throwaway Counter, since the source is read again below
        first = next(read_examples(source, part, Counter(), **options), {})
        task = task_of(first)
        # without any example (first is {}) what follows finds none, and says why
        if task == 'prompts' and first:
            raise UserError(f'{source} has prompts alone: a score needs chosen and rejected, or a response')
        for example in read_examples(source, part, left_out, task=task, **options):
            examples.append((task, example))
    if not examples:
        raise nothing_left(data, part, left_out)
    return examples, left_out


def create_output():
    """Create --out as an empty file, with its folder. Raises UserError if it cannot be written."""
    with writing(out):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text('')


def score_examples(model, tokenizer, examples, limit, left_out):
    """Return rows of --out (dicts) with the scores of examples, a list of (task, example). All ranks must call this.

    limit: tokens to truncate to. left_out: Counter to which truncated and skipped examples are added; the latter get no row."""
    # a prompt is cut to half of the limit if the whole is too long
    lengths = (limit, limit // 2, truncation)
    # margins=True: the data's margins, which nothing reads here, are not counted as left out
    options = {'chat': chat, 'system': system, 'skip_bad_rows': skip_bad_rows, 'last_turn_only': True, 'margins': True}
    rows = []
    items = []  # (prompt ids, answer ids) of all answers
    targets = []  # of each item: (row, name of the column) that its score goes to
    for task, example in examples:
        # without an id, the position in the data
        row = {'id': example.raw.get('id', example.where or None)}
        if by in example.raw:
            row[by] = example.raw[by]
        row |= {name: example[name] for name in ('prompt', 'good') if name in example}
        names = ['chosen_score', 'rejected_score'] if task == 'pairs' else ['score']
        # an Examples of one, or of none if it was skipped
        for prompt, answers in tokenise([example], tokenizer, task, lengths, left_out, **options):
            rows.append(row)
            items += [(prompt, answer) for answer in answers]
            targets += [(row, name) for name in names]
    values = scores(model, tokenizer, items, max_tokens).tolist() if items else []
    for (row, name), value in zip(targets, values, strict=True):
        row[name] = value
    for row in rows:
        if 'chosen_score' in row:
            row['margin'] = row['chosen_score'] - row['rejected_score']
    return rows


def report(rows):
    """Return a report on rows of --out as lines: accuracy and margins of pairs, mean scores of single answers, both again by --by."""
    lines = []
    pairs = [row for row in rows if 'margin' in row]
    if pairs:
        margins = [row['margin'] for row in pairs]
        chosen = np.mean([row['chosen_score'] for row in pairs])
        rejected = np.mean([row['rejected_score'] for row in pairs])
        accuracy_text = accuracy(pairs)
        ties = margins.count(0)
        if ties:
            accuracy_text += f'; equal scores, which count as wrong: {ties:,}'
        lines.append(f'  accuracy   {accuracy_text}')
        lines.append(f'  margin     mean {np.mean(margins):.4f}, median {np.median(margins):.4f}')
        lines.append(f'  scores     chosen {chosen:.4f}, rejected {rejected:.4f}')
    # single answers; unlabeled ones have no 'good'
    answers = [row for row in rows if 'score' in row]
    for label, name in ((True, 'good answers'), (False, 'bad answers'), (None, 'answers')):
        of_label = [row for row in answers if row.get('good') is label]
        if of_label:
            lines.append(f'  scores     {mean_score(of_label, name)}')
    return lines + table(pairs, accuracy) + table(answers, mean_score)


def accuracy(pairs):
    """Return the share of pairs (rows of --out) with margin > 0, its 95% interval and counts, as a text."""
    is_right = [row['margin'] > 0 for row in pairs]
    prompts = [content_hash(row['prompt']) for row in pairs]
    # pairs with the same prompt are one cluster
    low, high = winrate.interval(is_right, clusters=prompts)
    n_prompts = len(set(prompts))
    counts = f'over {counted(n_prompts, "prompts")}), {sum(is_right):,} of {counted(len(is_right), "pairs")}'
    return f'{np.mean(is_right):.3f} (95% interval {low:.3f} to {high:.3f} {counts}'


def mean_score(answers, name='answers'):
    """Return the mean score of single answers (rows of --out), and how many these are, as a text. name: a plural noun for them."""
    mean = np.mean([row['score'] for row in answers])
    return f'mean {mean:.4f} over {counted(len(answers), name)}'


def table(rows, summary):
    """Return a line with summary(rows) for each value of the column --by, or RewardBench's table; [] if no row has that column."""
    groups = {}  # value of the column -> rows
    for row in rows:
        if by in row:
            groups.setdefault(str(row[by]), []).append(row)
    subsets = {name for sizes in SECTIONS.values() for name in sizes}
    if groups and groups.keys() <= subsets and summary is accuracy:
        return reward_bench(groups)
    return [f'  {value:24s} {summary(group)}' for value, group in sorted(groups.items())]


def reward_bench(groups):
    """Return RewardBench's table as lines. groups: {subset: its pairs, rows of --out}."""
    lines = []
    missing = []
    section_scores = []
    for section, sizes in SECTIONS.items():
        present = [name for name in sizes if name in groups]
        missing += sizes.keys() - groups.keys()
        if present:
            # by RewardBench's rules, subsets are weighted by their published sizes, and all sections are equal
            shares = [np.mean([row['margin'] > 0 for row in groups[name]]) for name in present]
            score = np.average(shares, weights=[sizes[name] for name in present])
            section_scores.append(score)
            lines.append(f'  {section:24s} {score:.3f}')
            lines += [f'    {name:22s} {accuracy(groups[name])}' for name in present]
    total = np.mean(section_scores)
    lines.append(f'  {"RewardBench":24s} {total:.3f}, the mean of {len(section_scores)} of its 4 sections')
    if missing:
        lines.append(f'  subsets that are not in the data: {", ".join(sorted(missing))}')
    return lines


if __name__ == '__main__':
    main()
    ranks.leave()
