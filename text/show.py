"""Show what a model will be trained on, before any training. `python data.py` runs this file.

    python data.py --data=answers.jsonl --columns='prompt=question, response=reply'
    python data.py --data=trl-lib/tldr --task=sft --model=HuggingFaceTB/SmolLM2-135M-Instruct

What is trained on is coloured, or in a file between [[ and ]]. --n=none --json prints every example, one a line.
"""

import sys
from collections import Counter
from contextlib import redirect_stdout
from itertools import islice
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

# so many lengths are measured at most: of a large data set, all would take long
MEASURED = 2000
# a max_length that no example reaches, so that nothing is cut before it is measured
UNCUT = 2**30


def main():
    """Print the examples that the options ask for. Raises UserError."""
    # set the options above from the command line and config files
    configure(globals())
    left_out, out = Counter(), sys.stdout
    # a program reads the JSON lines, so the readers' notes go to the other stream
    with redirect_stdout(sys.stderr if json else out):
        try:
            if json:
                all_items = (item for _, _, items in _read(left_out) for item in items)
                for item in islice(all_items, n):
                    out.write(dumps(item, ensure_ascii=False) + '\n')
                _print_left_out(left_out)
            else:
                _print_text(left_out)
            out.flush()
        except BrokenPipeError:
            # `data.py | head` reads no more; a closed stderr keeps python from complaining about that at its exit
            sys.stderr.close()


def _read(left_out):
    """Yield (task, example, items) for every row of `data`; no part of the rows is held out for testing.

    task: the option, or else what the first example is for. items: what items_of makes of the example. left_out: a Counter,
    to which the reasons for rows that are left out are added."""
    options = {'undivided': True, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    for source in data.split('+'):
        source_task = task
        if source_task is None:
            # these rows are read once more below, and counted there
            first_example = next(read_examples(source, 'train', Counter(), **options), {})
            source_task = task_of(first_example)
        for example in read_examples(source, 'train', left_out, task=source_task, **options):
            if chat or system:
                example = as_chats(example, system)
            yield source_task, example, items_of(example, source_task, left_out)


def task_of(example):
    """Return the name of the task that an example is for; without any answer that is 'prompts'."""
    if 'chosen' in example:
        return 'pairs'
    if 'good' in example:
        return 'singles'
    return 'sft' if 'response' in example else 'prompts'


def items_of(example, task, left_out):
    """Return what a task makes of an example: a list of json-able dicts with 'prompt' and the answers.

    For 'singles', a pair gives two items. An example of no use to the task gives [], and left_out counts the reason."""
    items = []
    for part in as_parts(example, task, left_out):
        item = {'prompt': part.prompt}
        if task == 'pairs':
            item['chosen'], item['rejected'] = part.answers
        elif task != 'prompts':
            item['response'] = part.answers[0]
        if task == 'singles':
            item['good'] = part.good
        if task == 'sft':
            # of a conversation, the earlier answers are trained on, too
            turns = _messages(example.get('turns', part.answers[0]))
            item['trained'] = [turn['content'] for turn in turns if is_trained(turn)]
        # of all tasks, if the example has them
        item.update((key, example[key]) for key in ('margin', 'tools') if key in example)
        items.append(item)
    return items


# ---- what is printed ----


def _print_text(left_out):
    """Print the first n items as text, then a summary of all items. Raises UserError if there are none."""
    tokenizer = None
    if model:
        from hf.load import load_tokenizer

        tokenizer = load_tokenizer(model)
    counts = Counter()  # items of each task
    lengths = []
    for task, example, items in _read(left_out):
        # an example of no use is counted in left_out
        if not items:
            continue
        _print_items(example, task, items, counts.total() + 1, tokenizer)
        counts[task] += len(items)
        if len(lengths) < MEASURED:
            lengths += _lengths(example, task, items, tokenizer, left_out)
    _print_summary(counts, lengths, tokenizer is not None, left_out)


def _print_items(example, task, items, first_number, tokenizer):
    """Print those items of an example whose numbers are up to n: as the data has them, or as the tokenizer's model sees them."""
    for number, item in enumerate(items, first_number):
        if n is not None and number > n:
            return
        print(f'--- {task}, example {number}: {example.where or data} ---')
        if tokenizer:
            # one text has all items of the example
            print(_as_model_sees(example, task, tokenizer), end='\n\n')
            return
        text, _ = _as_written(example, item)
        print(text, end='\n\n')


def _lengths(example, task, items, tokenizer, left_out):
    """Return a list with the characters of each item, or with a tokenizer with the tokens of the longest item.

    The list is empty, and left_out counts why, if the chat template refuses the example."""
    if not tokenizer:
        texts_and_characters = [_as_written(example, item) for item in items]
        return [characters for _, characters in texts_and_characters]
    limits = UNCUT, UNCUT // 2, truncation
    tokenised = tokenise([example], tokenizer, task, *limits, left_out, skip_bad_rows=True)
    return [tokenised.longest()] if len(tokenised) else []


def _print_summary(counts, lengths, in_tokens, left_out):
    """Print how many items there are, how they were read, what was left out, and how long the items are.

    counts: items of each task. lengths: tokens (in_tokens) or characters. Raises UserError if there are no items."""
    words = ', '.join(f'{count} {task}' for task, count in counts.items())
    print(f'{data}: {words or "no examples"}')
    print('read as:', columns or '; '.join(map(describe, data.split('+'))))
    _print_left_out(left_out)
    if not counts:
        raise UserError(f'no examples are left in {data!r}: nothing can be trained on it')
    unit = 'tokens' if in_tokens else 'characters'
    if len(lengths) >= MEASURED:
        unit += f', of the first {MEASURED:,} examples'
    # a chat template may refuse every example; then there is no length
    sizes = np.array(lengths or [0])
    middle, most, longest = np.percentile(sizes, (50, 95, 100))
    print(f'lengths in {unit}: median {middle:.0f}, 95% up to {most:.0f}, longest {longest:.0f}')
    if in_tokens:
        print(f'cut at max_length {max_length}: {np.mean(sizes > max_length):.0%}')
    else:
        print('this is the text as it stands: --model=FOLDER shows it as a model sees it')


def _print_left_out(left_out):
    """Print every reason with its count. A reason that begins with 'note' is of examples that are kept."""
    # + takes only what was counted at least once
    for reason, count in (+left_out).items():
        heading = '' if reason.startswith('note') else 'left out: '
        print(f'{heading}{reason}: {count}')


def mark(text):
    """Return a text that is trained on with its mark: a colour on a terminal, brackets in a file."""
    return f'\033[32m{text}\033[0m' if sys.stdout.isatty() else f'[[{text}]]'


# ---- an example as the data has it ----


def _as_written(example, item):
    """Return (text, characters) of an item as the data has it. In the text, what is trained on is marked.

    characters: those of a whole conversation, or else of the prompt and the longest answer."""
    # sft trains on all answers of a conversation, which stand between the messages of others
    if 'turns' in example and 'trained' in item:
        return _lines(example['turns'], is_trained), _characters(example['turns'])
    texts = [_lines(item['prompt'], lambda turn: False)]
    sizes = [0]
    for name in ('chosen', 'rejected', 'response'):
        if name in item:
            heading = name
            if 'good' in item:
                heading += ', good' if item['good'] else ', bad'
            texts.append(f'{heading}:\n' + _lines(item[name], lambda turn: True))
            sizes.append(_characters(item[name]))
    return '\n'.join(texts), _characters(item['prompt']) + max(sizes)


def _lines(part, is_marked):
    """Return a text as it is, or a chat with a line `role: content` for each message.

    is_marked(message) -> whether its content gets the mark of what is trained on."""
    lines = []
    for turn in _messages(part):
        content = mark(turn['content']) if is_marked(turn) else turn['content']
        lines.append(content if isinstance(part, str) else f'{turn["role"]}: {content}')
    return '\n'.join(lines)


def _messages(part):
    """Return the messages of a text or a chat; a text is one message of the assistant."""
    return [{'role': 'assistant', 'content': part}] if isinstance(part, str) else part


def _characters(part):
    """Return the number of characters of a text, or of the contents of a chat."""
    return sum(len(turn['content']) for turn in _messages(part))


# ---- an example as a model sees it ----


def _as_model_sees(example, task, tokenizer):
    """Return an example as text, after it was tokenised and cut; or say why it is left out."""
    reasons = Counter()
    limits = max_length, max_prompt_length, truncation
    examples = tokenise([example], tokenizer, task, *limits, reasons, skip_bad_rows=True)
    if not len(examples):
        return 'left out: ' + ', '.join(+reasons)
    return '\n\n'.join(decoded(examples, i, tokenizer, task) for i in range(len(examples)))


def decoded(examples, i, tokenizer, task):
    """Return the tokenised example i as text, with its special tokens; what is trained on is marked.

    For 'prompts' this is the prompt alone. For 'singles' it ends with the label of the answer, good or bad."""
    prompt_ids, answers = examples[i]
    prompt = tokenizer.decode(prompt_ids)
    if task == 'prompts':
        return prompt
    texts = [_decoded_answer(answer, tokenizer) for answer in answers]
    if len(texts) == 2:
        return f'{prompt}\nchosen: {texts[0]}\nrejected: {texts[1]}'
    # a single answer goes on where its prompt ends
    text = prompt + texts[0]
    if task == 'singles':
        text += '\nlabel: good' if examples.good[i] else '\nlabel: bad'
    return text


def _decoded_answer(answer, tokenizer):
    """Return the ids of an answer as text. What is trained on is marked; the user's later turns, stored as ~id, are not."""
    # ~id is negative: cut the ids wherever the sign changes
    borders = np.flatnonzero(np.diff(answer < 0)) + 1
    text = ''
    for ids in np.split(answer, borders):
        is_trained_on = ids[0] >= 0
        text += mark(tokenizer.decode(ids)) if is_trained_on else tokenizer.decode(~ids)
    return text


def first(examples, tokenizer, task, longest=1200):
    """Return the first of the tokenised examples as a model sees it, under a heading, for the screen of a training script.

    A text of more than `longest` characters loses its middle."""
    text = decoded(examples, 0, tokenizer, task)
    if len(text) > longest:
        text = f'{text[: longest // 2]} ... {text[-longest // 2 :]}'
    # ppo.py trains on answers of its own, so nothing is marked in its prompts
    heading = 'prompt' if task == 'prompts' else f'example, where {mark("this")} is trained on'
    return f'the first {heading}:\n{text}'
