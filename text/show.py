"""See what a model will be trained on: python data.py --data=SOURCE [--task=...] [--model=FOLDER] [--n=3] [--json]

    python data.py --data=answers.jsonl --columns='prompt=question, response=reply'
    python data.py --data=trl-lib/tldr --task=sft --model=HuggingFaceTB/SmolLM2-135M-Instruct

What is trained on is coloured, or in a file between [[ and ]]. --n=none --json prints every example, one a line.
"""

import contextlib
import sys
from collections import Counter
from itertools import chain, islice
from json import dumps

import numpy as np

from configurator import configure
from text import sources
from text.tokenise import _as_texts, tokenise

# what to read
data = 'toy'  # hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
task: str | None = None  # pairs, singles, sft or prompts; None: what the first example has
columns: str | None = None  # which column is what, such as 'prompt=question, chosen=good_answer, rejected=bad_answer'
num_turns = 1  # sharegpt: answers taken from a conversation
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
    left_out = Counter()
    # notes of the readers stay out of what a program may read
    with contextlib.redirect_stdout(sys.stderr if json else sys.stdout):
        reading = _read(left_out)
    try:
        with contextlib.redirect_stdout(sys.stderr if json else sys.stdout):
            _show_json(reading, left_out) if json else _show(reading, left_out)
    except BrokenPipeError:  # | head has seen enough
        sys.stderr.close()


def _read(left_out):
    """(source, task, example) of all sources, before any part is held out."""
    options = {'undivided': True, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    for source in data.split('+'):
        first = next(sources.read_examples(source, 'train', Counter(), task=task, **options), {})
        needed = task or task_of(first)
        for example in sources.read_examples(source, 'train', left_out, task=needed, **options):
            yield needed, example


def task_of(example):
    """The task that an example is of."""
    if 'chosen' in example:
        return 'pairs'
    if 'good' in example:
        return 'singles'
    return 'sft' if 'response' in example else 'prompts'


def for_task(example, task, left_out):
    """What a task makes of an example, as dicts to be written as JSON; none, counted in left_out, where it is of no use."""
    found = []
    for part in _as_texts(example, task, left_out):
        shown = {'prompt': part.prompt}
        if task == 'pairs':
            shown |= dict(zip(('chosen', 'rejected'), part.answers, strict=True))
        elif task != 'prompts':
            shown['response'] = part.answers[0]
        if task == 'singles':
            shown['good'] = part.good
        if task == 'sft':
            shown['trained'] = trained(example, part.answers[0])
        found.append(shown | {key: example[key] for key in ('margin', 'tools') if key in example})
    return found


def trained(example, answer):
    """The texts that are trained on: of every answer of a conversation, or of this one."""
    if isinstance(answer, str):
        return [answer]
    turns = example.get('turns', answer)
    return [turn['content'] for turn in turns if turn['role'] == 'assistant' and turn.get('weight') != 0]


# ---- printing ----


def _show_json(reading, left_out):
    """Every example as a line of JSON on the real standard output."""
    shown = (found for needed, example in reading for found in for_task(example, needed, left_out))
    for found in islice(shown, n):
        sys.__stdout__.write(dumps(found, ensure_ascii=False) + '\n')
    sys.__stdout__.flush()
    for reason, count in (+left_out).items():
        print(f'left out: {reason}: {count}', file=sys.stderr)


def _show(reading, left_out):
    """The first examples, then what was left out, and lengths."""
    tokenizer, marks = None, marks_of(sys.stdout)
    if model:
        from hf.load import load_tokenizer

        tokenizer = load_tokenizer(model)
    count, lengths, kinds = 0, [], Counter()
    for needed, example in reading:
        for found in for_task(example, needed, left_out):
            count += 1
            kinds[needed] += 1
            if n is None or count <= n:
                print(f'--- {needed}, example {count}: {example.where or data} ---')
                print(as_seen(example, found, needed, tokenizer, marks), end='\n\n')
        if len(lengths) < MEASURED:
            lengths += _lengths(example, needed, tokenizer)

    # the whole, in a few lines
    print(f'{data}: {", ".join(f"{number} {kind}" for kind, number in kinds.items()) or "no examples"}')
    print(f'read as: {_read_as()}')
    for reason, number in (+left_out).items():
        print(f'left out or changed: {reason}: {number}')
    if lengths:
        unit = 'tokens' if tokenizer else 'characters'
        middle, most = np.percentile(lengths, (50, 95))
        cut = f'; {np.mean(np.array(lengths) > max_length):.0%} are cut at max_length {max_length}' if tokenizer else ''
        print(f'lengths in {unit}: median {middle:.0f}, 95% up to {most:.0f}, longest {max(lengths)}{cut}')
    if not tokenizer:
        print('the text as it is: --model=FOLDER shows it as a model sees it')


def _read_as():
    """How the rows of data are told apart, for the screen."""
    return columns and f'--columns={columns!r}' or '; '.join(sources.describe(source) for source in data.split('+'))


def marks_of(stream):
    """What stands before and behind the text that is trained on: colour on a terminal, brackets in a file."""
    return ('\033[32m', '\033[0m') if stream.isatty() else ('[[', ']]')


def as_seen(example, found, task, tokenizer, marks):
    """The text of an example: with a tokenizer its tokens decoded, else as it stands in the data."""
    if tokenizer is None:
        return _plain(example, found, marks)
    examples = _tokens(example, task, tokenizer, Counter())
    return '\n\n'.join(decoded(examples, i, tokenizer, task, marks) for i in range(len(examples)))


def _plain(example, found, marks):
    """Prompt and answers as text or turn by turn."""
    begin, end = marks
    bare = {'role': '', 'content': ''}

    def lines(part, marked):
        turns = [bare | {'content': part}] if isinstance(part, str) else part
        texts = [(f'{turn["role"]}: ' if turn['role'] else '', turn) for turn in turns]
        return [f'{who}{begin}{turn["content"]}{end}' if marked(turn) else f'{who}{turn["content"]}' for who, turn in texts]

    if 'turns' in example and 'trained' in found:
        return '\n'.join(lines(example['turns'], lambda turn: turn['role'] == 'assistant' and turn.get('weight') != 0))
    shown = lines(found['prompt'], lambda turn: False)
    for key in ('chosen', 'rejected', 'response'):
        if key in found:
            shown += [f'{key}:', *lines(found[key], lambda turn: True)]
    return '\n'.join(shown)


def _tokens(example, task, tokenizer, left_out):
    """The tokenised Examples of one example."""
    return tokenise([example], tokenizer, task, max_length, max_prompt_length, truncation, left_out, skip_bad_rows=True)


def _lengths(example, task, tokenizer):
    """The lengths of prompt and longest answer: tokens before they are cut, or characters."""
    if tokenizer is None:
        return [len(str(found['prompt'])) for found in for_task(example, task, Counter())]
    whole = tokenise([example], tokenizer, task, 10**9, 10**8, truncation, Counter(), skip_bad_rows=True)
    return [int(width[0] + width[1:].max()) for width in whole.widths]


def decoded(examples, i, tokenizer, task, marks):
    """Tokenised example i as text, special tokens included, with marks around what is trained on."""
    prompt, answers = examples[i]
    texts = [tokenizer.decode(prompt)]
    if task == 'prompts':
        return texts[0]
    begin, end = marks
    names = ('chosen: ', 'rejected: ') if len(answers) == 2 else ('',)
    return texts[0] + '\n'.join(f'{name}{begin}{tokenizer.decode(a)}{end}' for name, a in zip(names, answers, strict=True))


def first(examples, tokenizer):
    """The first of tokenised examples as a model sees it, for the screen of a training script."""
    marks = marks_of(sys.stdout)
    return f'data: the first example, trained on {"in colour" if marks[0] != "[[" else "in [[ ]]"}:\n' + decoded(
        examples, 0, tokenizer, 'pairs', marks
    )
