"""Show what a model will be trained on, without training it. `python data.py` runs this file.

    python data.py --data=answers.jsonl --columns='prompt=question, response=reply'
    python data.py --data=trl-lib/tldr --task=sft --model=HuggingFaceTB/SmolLM2-135M-Instruct

Trained text is green on a terminal, [[bracketed]] in a file. --n=none --json prints every example as a JSON line."""

import sys
from collections import Counter
from contextlib import redirect_stdout
from itertools import islice
from json import dumps

import numpy as np

from configurator import UserError, configure
from runtime.values import printable
from text.chat import decode_answer
from text.examples import counted, in_words
from text.messages import BESIDE, as_chats, is_trained
from text.sources import LOOK_AHEAD, describe, joined, read_examples
from text.tokenise import as_parts, tokenise

# which rows, and how they are read
data = 'toy'  # hh, hh:PATH, hh+shp, a hub id, a file, a folder, toy (README has the list)
task: str | None = None  # pairs, singles, sft or prompts; None: what most of the first examples are for
columns: str | None = None  # which column is what: 'prompt=question, system=system, chosen=good, rejected=bad'
num_turns = 1  # sharegpt: answers taken from a conversation
chat = False  # texts become chats, so that the model's chat template applies
system: str | None = None  # a message of the system before every prompt; texts become chats
skip_bad_rows = False  # count unreadable rows instead of stopping
# as a model sees them
model: str | None = None  # hub id or local folder whose tokenizer to use; None: the text as it is
max_length = 512  # tokens of prompt and answer
max_prompt_length: int | None = None  # a prompt is cut to this if the whole is too long; None: half of max_length
truncation = 'start'  # which end a too long prompt loses: start or end
# what is printed
n: int | None = 3  # how many examples; None: all
json = False  # one JSON object a line, and nothing else

MEASURED = 2000  # measure only the first examples: a large data set would take long
NOTHING = 'no examples are left in {!r}: nothing can be trained on it'
# line ends beside \n that JSON does not escape: a reader may split a row there
LINE_ENDS = {ord(end): dumps(end)[1:-1] for end in '\x85\u2028\u2029'}
ANSWERS = ('chosen', 'rejected', 'response')  # what an item may have beside its prompt


def main():
    """Print the examples that the options select. Raises UserError if they cannot be read."""
    # a first call that prints no notes, since `json` decides where they go
    configure(globals(), early=True)
    out = sys.stdout
    # with --json, stdout has only JSON lines, and everything else goes to stderr
    with redirect_stdout(sys.stderr if json else out):
        config = configure(globals())
        if json or not model:
            names = 'model max_length max_prompt_length truncation'
            config.report_unused(names.split(), 'texts are shown as they stand')
        try:
            if json:
                _print_json(out)
            else:
                _print_text()
            out.flush()
        except BrokenPipeError:
            # `data.py | head` closed the pipe; closing stderr suppresses Python's warning about it at exit
            sys.stderr.close()


def _print_json(out):
    """Write the first --n items of the data to the stream `out` as JSON lines. Raises UserError without items.

    Then print (main sends that to stderr) how much was left out or changed so far."""
    left_out = Counter()
    all_items = (item for _, _, items in _read_items(left_out) for item in items)
    lines = 0
    for item in islice(all_items, n):
        out.write(dumps(item, ensure_ascii=False).translate(LINE_ENDS) + '\n')
        lines += 1
    changed, notes = in_words(left_out)
    print(f'left out or changed: {changed}', *notes, sep='\n')
    if not lines:
        raise UserError(NOTHING.format(data))


def _read_items(left_out):
    """Yield (task, example, its training items) for every row of `data`; the Counter left_out counts skipped rows."""
    options = {'undivided': True, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    for source in joined(data):
        # by default the task of most of the first examples (None if there are none), which are read again below
        head = [] if task else islice(read_examples(source, 'train', Counter(), **options), LOOK_AHEAD)
        found = Counter(map(task_of, head))
        source_task = task or max(found, key=found.get, default=None)
        for example in read_examples(source, 'train', left_out, task=source_task, **options):
            if chat or system:
                example = as_chats(example, system)
            yield source_task, example, _items_of(example, source_task, left_out)


def task_of(example):
    """Return the task that fits an example's fields: 'pairs', 'singles', 'sft', or 'prompts' if it has no answer."""
    if 'chosen' in example:
        return 'pairs'
    if 'good' in example:
        return 'singles'
    return 'sft' if 'response' in example else 'prompts'


def _items_of(example, task, left_out):
    """Return what a task trains on of an example as dicts for --json; [] if it is unusable (counted in left_out)."""
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
            # SFT also trains on the earlier answers of a conversation
            turns = _messages(example.get('turns', part.answers[0]))
            item['trained'] = [turn['content'] for turn in turns if is_trained(turn)]
        for key in ('margin', 'tools'):
            if key in example:
                item[key] = example[key]
        items.append(item)
    return items


def _print_text():
    """Print the first n items as text, then a summary of all items. Raises UserError if there are none."""
    tokenizer = None
    if model:
        from hf.load import load_tokenizer

        tokenizer = load_tokenizer(model)
    left_out = Counter()
    counts = Counter()  # task -> number of items
    lengths = []  # of the first MEASURED items
    for task, example, items in _read_items(left_out):
        # unusable, as left_out says
        if not items:
            continue
        shown = items if n is None else items[: max(0, n - counts.total())]
        texts = [_as_written(example, item) for item in shown]
        if tokenizer and shown:
            texts = [_as_seen(example, task, tokenizer)]  # instead, one text for all items
        for number, text in enumerate(texts, counts.total() + 1):
            print(printable(f'--- {task}, example {number}: {example.where or data} ---\n{text}\n'))
        counts[task] += len(items)
        if len(lengths) >= MEASURED:
            continue
        if tokenizer:
            no_limits = (2**30, 2**29, truncation)  # in tokens, so large that nothing is cut
            tokenised = tokenise([example], tokenizer, task, no_limits, left_out, skip_bad_rows=True)
            lengths += [tokenised.longest()] if len(tokenised) else []
        else:
            lengths += map(_num_characters, items)
    _print_summary(counts, lengths, left_out)


def _as_seen(example, task, tokenizer):
    """Return an example as the text that a model sees, with marks around what is trained on, or else why it sees nothing."""
    reasons = Counter()
    lengths = (max_length, max_prompt_length, truncation)
    tokenised = tokenise([example], tokenizer, task, lengths, reasons, skip_bad_rows=True)
    texts = [_decode_example(tokenised, i, tokenizer, task) for i in range(len(tokenised))]
    return '\n\n'.join(texts) if texts else 'left out: ' + ', '.join(+reasons)  # + drops zero counts


def _num_characters(item):
    """Return the number of characters of an item's prompt and longest answer; of chats only the contents count."""
    texts = [item[key] for key in ('prompt', *ANSWERS) if key in item]
    of_prompt, *of_answers = [sum(len(turn['content']) for turn in _messages(text)) for text in texts]
    return of_prompt + max(of_answers, default=0)


def _print_summary(counts, lengths, left_out):
    """Print counts (task -> number of items), columns, left_out and lengths. Raises UserError if there are no items."""
    words = ', '.join(counted(count, task) for task, count in counts.items())
    print(f'{data}: {words or "no examples"}')
    print('read as:', printable(columns or '; '.join(map(describe, joined(data)))))
    changed, notes = in_words(left_out)
    print(printable('\n'.join([f'left out or changed: {changed}', *notes])))
    if not counts:
        raise UserError(NOTHING.format(data))
    # items are measured in tokens if the model option names a tokenizer
    unit = 'tokens' if model else 'characters'
    if len(lengths) >= MEASURED:
        unit += f', of the first {MEASURED:,} examples'
    # lengths is empty if the chat template rejects every example
    sizes = np.array(lengths or [0])
    median, percentile_95, longest = np.percentile(sizes, (50, 95, 100))
    print(f'lengths in {unit}: median {median:.0f}, 95% up to {percentile_95:.0f}, longest {longest:.0f}')
    if model:
        print(f'cut at max_length {max_length}: {np.mean(sizes > max_length):.0%}')
    else:
        print('this is the text as it stands: --model=FOLDER shows it as a model sees it')


def mark(text):
    """Mark a text as trained on: green on a terminal, in [[brackets]] elsewhere."""
    return f'\033[32m{text}\033[0m' if sys.stdout.isatty() else f'[[{text}]]'


def _as_written(example, item):
    """Return an item as text, in which what is trained on is marked. example: what _items_of made it from."""
    # 'turns': a conversation, of which SFT (only its items have 'trained') trains on every answer
    if 'turns' in example and 'trained' in item:
        return _format_lines(example['turns'], is_trained)
    texts = [_format_lines(item['prompt'], lambda turn: False)]
    label = {True: ', good', False: ', bad', None: ''}[item.get('good')]  # None: it has no such label
    for name in ANSWERS:
        if name in item:
            texts.append(f'{name}{label}:\n' + _format_lines(item[name], lambda turn: True))
    return '\n'.join(texts)


def _format_lines(text_or_chat, is_marked):
    """Return a text unchanged, or a chat as `role: content` lines. If is_marked(message), all but its role is marked."""
    lines = []
    for turn in _messages(text_or_chat):
        beside = {key: turn[key] for key in BESIDE if turn.get(key)}  # calls of tools, and thoughts
        texts = [turn['content'], dumps(beside, ensure_ascii=False) if beside else '']
        content = ' '.join(filter(None, texts))
        content = mark(content) if is_marked(turn) else content
        lines.append(content if isinstance(text_or_chat, str) else f'{turn["role"]}: {content}')
    return '\n'.join(lines)


def _messages(text_or_chat):
    """Return a chat's messages; a text becomes one assistant message."""
    return [{'role': 'assistant', 'content': text_or_chat}] if isinstance(text_or_chat, str) else text_or_chat


def _decode_example(examples, i, tokenizer, task):
    """Return example i of Examples as text with special tokens and marks; for the task 'prompts', the prompt alone."""
    prompt_ids, answers = examples[i]
    prompt = tokenizer.decode(prompt_ids)
    if task == 'prompts':
        return prompt
    texts = []
    for answer in answers:
        # untrained tokens (later user turns) are stored as ~id, which is negative: split where the sign changes
        changes = np.flatnonzero(np.diff(answer < 0)) + 1
        text = ''
        before = prompt_ids  # the tokens that `ids` go on from
        for ids in np.split(answer, changes):
            is_untrained = ids[0] < 0
            ids = ~ids if is_untrained else ids
            part = decode_answer(ids, before, tokenizer)
            text += part if is_untrained else mark(part)
            before = [*before, *ids]
        texts.append(text)
    if len(texts) == 2:
        return f'{prompt}\nchosen: {texts[0]}\nrejected: {texts[1]}'
    text = prompt + texts[0]
    if task == 'singles':
        text += '\nlabel: good' if examples.good[i] else '\nlabel: bad'
    return text


def summary(run, n_eval_examples):
    """Return lines on the data of a training.Run: sizes, what was left out or changed, notes, and the first example."""
    train = run.train
    n_held_out = len(run.held_out)
    n_examples = run.config.n_examples
    # to the task 'prompts' an answer is but a placeholder
    n_read = train.widths[:, 0] if run.task == 'prompts' else train.lengths
    n_tokens = int(n_read.sum())
    sizes = f'{counted(len(train), "training examples")} ({n_tokens:,} tokens) and {n_held_out:,} to evaluate on'
    changed, notes = in_words(train.left_out)
    # n_eval_examples: how many the user wants
    if n_eval_examples and not n_held_out:
        notes.append('note: there is nothing to evaluate on: --eval_data names a file of held-out examples')
    # a few texts may be in both parts, most of them only if they were read from one file
    n_shared = int(np.isin(run.held_out.uid, train.uid).sum())
    if 2 * n_shared > n_held_out:
        shared = f'{n_shared:,} of {n_held_out:,} examples to evaluate on are trained on, too'
        notes.append(f'note: {shared}: --eval_data names others')
    # run.total: how many examples the run takes in all epochs. ppo.py splits what batch_size takes at once into minibatches
    if 'minibatch_size' not in run.config and run.config.batch_size > run.total:
        notes.append(f'note: batch_size takes the whole run at once: {counted(run.total, "examples")}')
    if (n_examples or 0) > run.total:
        ends = f'the run ends after {run.total:,} of --n_examples={n_examples}'
        notes.append(f'note: {ends}: raise --n_epochs for more')
    text = _decode_example(train, 0, run.tokenizer, run.task)
    if len(text) > 1200:
        text = f'{text[:600]} ... {text[-600:]}'
    heading = 'prompt' if run.task == 'prompts' else f'example, where {mark("this")} is trained on'
    return [f'data: {sizes}; left out or changed: {changed}', *notes, f'the first {heading}:\n{text}']
