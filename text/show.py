"""See what a model will be trained on.

    python data.py --data=answers.jsonl --columns='prompt=question, response=reply'
    python data.py --data=trl-lib/tldr --task=sft --model=HuggingFaceTB/SmolLM2-135M-Instruct

What is trained on is coloured, or in a file between [[ and ]]. --n=none --json prints every example, one a line.
"""

import sys
from collections import Counter
from contextlib import redirect_stdout
from itertools import chain, islice
from json import dumps

import numpy as np

from configurator import UserError, configure
from text.messages import as_chats, is_trained
from text.sources import describe, read_examples
from text.tokenise import as_parts, tokenise

# what to read
data = 'toy'  # hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
task: str | None = None  # pairs, singles, sft or prompts; None: what the first example is for
columns: str | None = None  # which column is what: 'prompt=question, system=system, chosen=good, rejected=bad'
num_turns = 1  # sharegpt: answers taken from a conversation
chat = False  # texts become chats, so that the model's chat template applies
system: str | None = None  # a message of the system before every prompt; texts become chats
skip_bad_rows = False  # count unreadable rows instead of stopping
# as a model sees it
model: str | None = None  # hub id or local folder whose tokenizer to use; None: the text as it is
max_length = 512  # tokens of prompt and answer
max_prompt_length = 256  # a prompt is cut to this if the whole is too long
truncation = 'start'  # which end a too long prompt loses: start or end
# what to print
n: int | None = 3  # how many examples; None: all
json = False  # one JSON object a line, and nothing else

# lengths are those of so many examples at most
MEASURED = 2000


def main():
    """Show the examples that the options ask for. Raises UserError."""
    configure(globals())
    left_out, out = Counter(), sys.stdout
    # notes of the readers stay out of what a program reads
    with redirect_stdout(sys.stderr if json else out):
        try:
            if json:
                for found in islice(chain.from_iterable(shown for _, _, shown in _read(left_out)), n):
                    out.write(dumps(found, ensure_ascii=False) + '\n')
                _say_left_out(left_out)
            else:
                _show(left_out)
            out.flush()
        except BrokenPipeError:  # whoever reads has seen enough
            sys.stderr.close()


def _read(left_out):
    """(task, example, what the task makes of it, for_task) of all of data, before any part is held out."""
    options = {'undivided': True, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    for source in data.split('+'):
        # without a task, the first example decides
        chosen = task or task_of(next(read_examples(source, 'train', Counter(), **options), {}))
        for example in read_examples(source, 'train', left_out, task=chosen, **options):
            example = as_chats(example, system) if chat or system else example
            yield chosen, example, for_task(example, chosen, left_out)


def task_of(example):
    """The task that an example is for."""
    if 'chosen' in example:
        return 'pairs'
    if 'good' in example:
        return 'singles'
    return 'sft' if 'response' in example else 'prompts'


def for_task(example, task, left_out):
    """What a task makes of an example, as json-able dicts; none, counted in left_out, where it is of no use."""
    names = {'pairs': ('chosen', 'rejected'), 'prompts': ()}.get(task, ('response',))
    found = []
    for part in as_parts(example, task, left_out):
        shown = {'prompt': part.prompt} | dict(zip(names, part.answers, strict=False))
        if task == 'singles':
            shown['good'] = part.good
        if task == 'sft':
            turns = _turns(example.get('turns', part.answers[0]))
            shown['trained'] = [turn['content'] for turn in turns if is_trained(turn)]
        found.append(shown | {key: example[key] for key in ('margin', 'tools') if key in example})
    return found


# ---- printing ----


def _say_left_out(left_out):
    for reason, count in (+left_out).items():
        print(f'{"" if reason.startswith("note") else "left out: "}{reason}: {count}')


def _show(left_out):
    """The first examples, then what was left out, and lengths."""
    tokenizer = None
    if model:
        from hf.load import load_tokenizer

        tokenizer = load_tokenizer(model)
    kinds, lengths = Counter(), []
    for of, example, shown in _read(left_out):
        plain = [_plain(example, found) for found in shown]
        for text, _ in plain:
            kinds[of] += 1
            if n is None or kinds.total() <= n:
                print(f'--- {of}, example {kinds.total()}: {example.where or data} ---')
                print(_seen(example, of, tokenizer) if tokenizer else text, end='\n\n')
        if plain and len(lengths) < MEASURED and tokenizer:
            whole = _tokens(example, of, tokenizer, 2**30, 2**29, left_out)
            lengths += [whole.longest()] if len(whole) else []
        elif len(lengths) < MEASURED:
            lengths += [size for _, size in plain]

    # the whole, in a few lines
    print(f'{data}: {", ".join(f"{count} {of}" for of, count in kinds.items()) or "no examples"}')
    print('read as:', columns or '; '.join(map(describe, data.split('+'))))
    _say_left_out(left_out)
    if not kinds:
        raise UserError(f'no examples are left in {data!r}: nothing can be trained on it')
    middle, most, longest = np.percentile(lengths or [0], (50, 95, 100))
    unit = 'tokens' if tokenizer else 'characters'
    if len(lengths) >= MEASURED:
        unit += f', of the first {MEASURED:,} examples'
    print(f'lengths in {unit}: median {middle:.0f}, 95% up to {most:.0f}, longest {longest:.0f}')
    if tokenizer:
        print(f'cut at max_length {max_length}: {np.mean(np.array(lengths or [0]) > max_length):.0%}')
    else:
        print('this is the text as it stands: --model=FOLDER shows it as a model sees it')


def mark(text):
    """A text that is trained on: coloured on a terminal, in brackets in a file."""
    return f'\033[32m{text}\033[0m' if sys.stdout.isatty() else f'[[{text}]]'


def _turns(part):
    """The messages of a text or chat; of a text, one answer."""
    return [{'role': 'assistant', 'content': part}] if isinstance(part, str) else part


def _plain(example, found):
    """(the text of an example as it stands in the data, the characters of its prompt and longest answer)"""

    def text(part, is_marked):
        lines = [mark(turn['content']) if is_marked(turn) else turn['content'] for turn in _turns(part)]
        roles = [''] if isinstance(part, str) else [f'{turn["role"]}: ' for turn in part]
        return '\n'.join(map(''.join, zip(roles, lines, strict=True)))

    def size(part):
        return sum(len(turn['content']) for turn in _turns(part))

    if 'turns' in example and 'trained' in found:
        return text(example['turns'], is_trained), size(example['turns'])
    answers = {key: found[key] for key in ('chosen', 'rejected', 'response') if key in found}
    good = {True: ', good', False: ', bad'}.get(found.get('good'), '')
    shown = [text(found['prompt'], lambda turn: False)]
    shown += [f'{key}{good}:\n{text(part, lambda turn: True)}' for key, part in answers.items()]
    return '\n'.join(shown), size(found['prompt']) + max(map(size, answers.values()), default=0)


def _tokens(example, task, tokenizer, longest, longest_prompt, left_out):
    """The tokenised Examples of one example; none, counted, where its chat template refuses it."""
    return tokenise([example], tokenizer, task, longest, longest_prompt, truncation, left_out, skip_bad_rows=True)


def _seen(example, task, tokenizer):
    """The text of an example as a model sees it."""
    reasons = Counter()
    examples = _tokens(example, task, tokenizer, max_length, max_prompt_length, reasons)
    seen = [decoded(examples, i, tokenizer, task) for i in range(len(examples))]
    return '\n\n'.join(seen or ['left out: ' + ', '.join(+reasons)])


def decoded(examples, i, tokenizer, task):
    """Tokenised example i as text, special tokens included; what is trained on is marked, a single answer's label added."""
    prompt, answers = examples[i]
    text, marked = tokenizer.decode(prompt), []
    for answer in answers:
        # of a conversation, a token that is only seen is ~id
        parts = np.split(answer, np.flatnonzero(np.diff(answer < 0)) + 1)
        marked.append(''.join(mark(tokenizer.decode(x)) if x[0] >= 0 else tokenizer.decode(~x) for x in parts))
    if task == 'prompts':
        return text
    if len(marked) == 2:
        return f'{text}\nchosen: {marked[0]}\nrejected: {marked[1]}'
    label = 'good' if examples.good[i] else 'bad'
    return text + marked[0] + (f'\nlabel: {label}' if task == 'singles' else '')


def first(examples, tokenizer, task, longest=1200):
    """The first of tokenised examples as a model sees it, for the screen of a training script: so many characters of it."""
    text = decoded(examples, 0, tokenizer, task)
    if len(text) > longest:
        text = f'{text[: longest // 2]} ... {text[-longest // 2 :]}'
    # an answer that stands behind a prompt in the data is not what ppo.py trains on
    what = 'prompt' if task == 'prompts' else f'example, where {mark("this")} is trained on'
    return f'the first {what}:\n{text}'
