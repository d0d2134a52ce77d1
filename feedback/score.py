"""Score answers with a reward model: accuracy and margins on any file of pairs, RewardBench's table, or the scores alone.

    python -m feedback.score --reward_model=out/reward/model --data=pairs.jsonl
    torchrun --nproc_per_node=4 -m feedback.score --reward_model=OWNER/NAME --data='allenai/reward-bench[filtered]' --chat

Every pair, or prompt with an answer, becomes a line of --out. Texts and chats are read, written and cut as in training, and a
score is read at the end of text. label.py and ppo.py score through this file, too.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import os
from collections import Counter
from functools import partial
from pathlib import Path

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
SCORES = ('score', 'chosen_score', 'rejected_score', 'margin')  # columns of what is written
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
    """(the sharded reward model of a folder or hub id, its tokenizer), after fsdp.setup. Raises UserError."""
    tokenizer = separate_pad(load_tokenizer(name, trust_remote_code))
    build = partial(load_reward, name, tokenizer, trust_remote_code=trust_remote_code)
    model = fsdp.shard(build, device, dtype=dtype, train=False, device_map=device_map)
    # packed, where that changes no score of two made-up pairs of different lengths
    a, b, c = np.random.default_rng(0).integers(len(tokenizer), size=(3, 20))
    pairs = [(a, [b, c[:5]]), (b[:7], [c[:9], a])]
    packed, padded = pack_probe(Examples.of(pairs), device)
    set_attention(model, can_pack(model, packed, padded, say))
    return model, tokenizer


@guard.memory_for('answers do not fit beside the reward model; lower max_tokens, which changes no score')
@torch.no_grad()
def scores(model, tokenizer, items, max_tokens, ends=()) -> np.ndarray:
    """Scores (n,), float32, of n answers: equal on every rank, and every rank must call this.

    items: n of (prompt ids, answer ids); where an answer lacks its end of text, that is appended, as in training. ends: other
    ids that end an answer, at which its score is read, such as the end of a turn. max_tokens: tokens of one microbatch of one
    rank. Raises UserError for an item that is longer than the model reads."""
    padded = core(model).config._attn_implementation != 'packed'
    # padded batches have a row for every answer: no answer joins a group of 0 tokens
    groups = _groups(items, tokenizer.eos_token_id, ends, room(model), 0 if padded else max_tokens)
    lengths = np.array([_tokens(prompt, answers) for prompt, answers, _ in groups])

    # this rank's microbatches, as numbers of groups
    rank, world = fsdp.data_rank()
    make_plan = plan_padded if padded else plan
    found, slots = [], []
    for numbers in make_plan(lengths, world, max_tokens)[rank]:
        examples = [groups[number][:2] for number in numbers]
        batch = pack(examples, numbers, pad=padded, filler=1, device=core(model).device)
        found.append(model.response_scores(batch))
        # a rank without work has a filler
        mine = [slot for number in numbers for slot in groups[number][2]]
        slots += mine or [-1]

    # the scores of all ranks, in the order of the items
    columns = fsdp.gather_columns({'score': torch.cat(found)}, slots, len(items))
    values = columns['score'].float().numpy()
    if not np.isfinite(values).all():
        raise UserError("the reward model's scores are not numbers: its weights are broken, or too large for its type")
    return values


def _groups(items, eos, ends, limit, max_tokens):
    """The items as (prompt, answers, numbers of the items), each of at most max_tokens: answers to a prompt share its computation.

    limit: tokens that the model reads."""
    by_prompt = {}  # prompt -> its groups
    for slot, (prompt, answer) in enumerate(items):
        prompt, answer = np.asarray(prompt, np.int64), np.asarray(answer, np.int64)
        if not len(answer) or answer[-1] not in {eos, *ends}:
            answer = np.append(answer, eos)
        if not len(prompt) or len(prompt) + len(answer) > limit:
            takes = f'the reward model takes a prompt and at most {limit} in all'
            raise UserError(f'item {slot}: prompt and answer have {len(prompt)} + {len(answer)} tokens, where {takes}')
        # into its prompt's last group, or a new one where that is full
        groups = by_prompt.setdefault(prompt.tobytes(), [])
        if not groups or _tokens(prompt, groups[-1][1]) + len(answer) > max_tokens:
            groups.append((prompt, [], []))
        _, answers, slots = groups[-1]
        answers.append(answer)
        slots.append(slot)
    return [group for groups in by_prompt.values() for group in groups]


def _tokens(prompt, answers):
    return len(prompt) + sum(map(len, answers))


# ---- the command ----


def main():
    """Score what the options name, write a line for each, and say what came of it. Raises UserError."""
    config = configure(globals())
    if not reward_model or not data:
        raise UserError('name the model and what it scores: --reward_model=FOLDER --data=FILE')
    if by in SCORES:
        raise UserError(f'--by={by}: {out} has the new scores under that name; call the column of the data otherwise')
    _, _, device = fsdp.setup()
    examples, left_out = fsdp.first_of_host(read)
    if config.given('by') and not any(by in example.raw for _, example in examples):
        raise UserError(f'--by={by}: no row of {data} has such a column')
    how = {'dtype': dtype, 'device_map': device_map, 'trust_remote_code': trust_remote_code}
    model, tokenizer = load_scorer(reward_model, device, **how)

    # a model that reads any length has no limit of its own
    limit = int(min(max_length or 2**30, room(model)))
    rows = []
    guard.on_stop(lambda: f'{len(rows)} of {len(examples)} are in {out}')
    fsdp.on_one_rank(begin_file)
    with progress(len(examples), ' examples', 'scored') as bar:
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            new = score_examples(model, tokenizer, chunk, limit, left_out)
            fsdp.on_one_rank(partial(append, out, new, sync=False))
            rows += new
            bar.update(len(chunk))
    if not rows:
        raise vanished(data, split or 'test', left_out)

    # what was cut or left out, then the numbers
    changed, notes = in_words(left_out)
    whole = f', at most {limit:,} tokens each' if limit < 2**30 else ''
    say('\n'.join([f'data: {len(rows):,} of {len(examples):,} scored{whole}; left out or changed: {changed}', *notes]))
    say('\n'.join([f'{reward_model} on {data}', *report(rows), f'{out}: a line for each']))


def read():
    """([(task, example)], Counter of what was left out) of all that is to be scored. Raises UserError."""
    examples, left_out = [], Counter()
    how = {'undivided': split is None, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    for source in data.split('+'):
        # what is scored is not to be written over
        _, path, _ = locate(source)
        if path and os.path.exists(out) and any(os.path.samefile(out, file) for file in data_files(path)):
            raise UserError(f'--out={out} is a file of the data: name another file for the scores')
        # the first example decides what its source is for
        first = next(read_examples(source, split or 'test', Counter(), **how), {})
        task = task_of(first)
        if task == 'prompts' and first:
            raise UserError(f'{source} has prompts alone: a score needs chosen and rejected, or a response')
        examples += [(task, x) for x in read_examples(source, split or 'test', left_out, task=task, **how)]
    if not examples:
        raise vanished(data, split or 'test', left_out)
    return examples, left_out


def begin_file():
    """Make the file of scores, empty."""
    with writing(out):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text('')


def score_examples(model, tokenizer, examples, limit, left_out):
    """A row of the output for each of (task, example), cut to limit tokens, but for those left out."""
    how = {'chat': chat, 'system': system, 'skip_bad_rows': skip_bad_rows, 'last_turn_only': True, 'margins': True}
    rows, items, places = [], [], []  # a place: row and column of an item's score
    for task, example in examples:
        # what the row was, by its own id or its place
        row = {'id': example.raw.get('id', example.where or None)}
        if by in example.raw:
            row[by] = example.raw[by]
        row |= {name: example[name] for name in ('prompt', 'good') if name in example}
        names = ['chosen_score', 'rejected_score'] if task == 'pairs' else ['score']

        # Examples of one or none
        for prompt, answers in tokenise([example], tokenizer, task, limit, limit // 2, truncation, left_out, **how):
            rows.append(row)
            items += [(prompt, answer) for answer in answers]
            places += [(row, name) for name in names]

    # the scores, in the order of the items
    found = scores(model, tokenizer, items, max_tokens).tolist() if items else []
    for (row, name), score in zip(places, found, strict=True):
        row[name] = score
    for row in rows:
        if 'chosen_score' in row:
            row['margin'] = row['chosen_score'] - row['rejected_score']
    return rows


# ---- what came of it ----


def report(rows):
    """The lines for the screen: of pairs accuracy and margins, by subset where there are some; of answers their mean score."""
    pairs, lines = [row for row in rows if 'margin' in row], []
    if pairs:
        chosen, rejected, margin = (np.mean([row[name] for row in pairs]) for name in SCORES[1:])
        margins = [row['margin'] for row in pairs]
        ties = margins.count(0)
        equal = f'; {ties:,} with equal scores count as wrong' if ties else ''
        lines += [
            f'  accuracy   {accuracy(pairs)[1]}{equal}',
            f'  margin     mean {margin:.4f}, median {np.median(margins):.4f}',
            f'  scores     chosen {chosen:.4f}, rejected {rejected:.4f}',
        ]
    for good, name in ((True, 'good answers'), (False, 'bad answers'), (None, 'answers')):
        some = [row['score'] for row in rows if 'score' in row and row.get('good') is good]
        if some:
            lines.append(f'  scores     mean {np.mean(some):.4f} over {len(some):,} {name}')
    return lines + table(pairs)


def accuracy(pairs):
    """(the share of pairs whose chosen answer has the higher score, the same with its 95% interval over prompts in words)."""
    wins = [row['margin'] > 0 for row in pairs]
    share = float(np.mean(wins))
    low, high = winrate.interval(wins, [content_hash(row['prompt']) for row in pairs])
    return share, f'{share:.3f} (95% interval {low:.3f} to {high:.3f}), {sum(wins):,} of {len(wins):,} pairs'


def table(pairs):
    """A line for each value of the column `by`; of RewardBench's subsets, below a line for each of its sections."""
    groups = {}
    for row in pairs:
        if by in row:
            groups.setdefault(str(row[by]), []).append(row)
    found = {name: accuracy(group) for name, group in sorted(groups.items())}
    known = {name for subsets in SECTIONS.values() for name in subsets}
    if not groups or not groups.keys() <= known:
        return [f'  {name:24s} {words}' for name, (_, words) in found.items()]

    # a section's score, from the subsets that are there
    lines, sections = [], []
    for section, sizes in SECTIONS.items():
        there = [name for name in sizes if name in found]
        if not there:
            continue
        weights = [sizes[name] for name in there]
        sections.append(np.average([found[name][0] for name in there], weights=weights))
        lines.append(f'  {section:24s} {sections[-1]:.3f}')
        lines += [f'    {name:22s} {found[name][1]}' for name in there]
    lines.append(f'  {"RewardBench":24s} {np.mean(sections):.3f}, the mean of {len(sections)} of its 4 sections')
    if missing := sorted(known - found.keys()):
        lines.append(f'  subsets that are not in the data: {", ".join(missing)}')
    return lines


if __name__ == '__main__':
    main()
    fsdp.leave()
