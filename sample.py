"""Sample a model's answers to a dataset's prompts, into samples.jsonl and AlpacaEval's model_outputs.json.

    python sample.py --model=out/dpo/model --data=alpaca_eval
    torchrun --nproc_per_node=4 -- sample.py --model=out/dpo/model --data=hh --n=4 --temperature=0.7
    NANOPREF_API_KEY=... python sample.py --endpoint=https://HOST --endpoint_model=NAME --data=alpaca_eval

Each answer has its own random seed, a hash of --seed, the prompt and the sample number, and the batches are planned before they
are distributed over ranks. So answers do not depend on the number of ranks, and after a kill the same command resumes the run.
Another batch_size or processor rounds differently, which changes an answer only where two tokens nearly tie.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import itertools
import json
import math
import time
from collections import Counter
from functools import partial

import numpy as np

import fsdp
from configurator import UserError, configure
from feedback.answers import append, collect, raise_if_missing, write_model_outputs
from feedback.endpoint import ask, completions_url
from hf import generate, sharded
from hf.load import load_model, load_tokenizer
from hf.lora import content_of
from hf.probe import max_sequence_length
from rl import reward_functions
from runtime import errors, log, ranks
from runtime.files import lock, replace_text
from text import sources, tokenise
from text.chat import decode_answer
from text.examples import counted, in_words, uniform_hash
from text.files import content_hash
from text.messages import answer, as_chat, as_chats

# who answers
model = 'toy'  # hub id, local folder, or 'toy'
endpoint: str | None = None  # instead of model: the address of an OpenAI-compatible server
endpoint_model: str | None = None  # the name that the endpoint has for its model
generator: str | None = None  # what the output calls whoever answers; None: the model's name
# what
data = 'toy'  # as in dpo.py (hh, hh:PATH, hh+shp, alpaca_eval, a hub id, a file ...), or a .txt file, one prompt a line
split: str | None = None  # train or test; None: test where the data has one, else all
n_examples: int | None = None  # only the first so many prompts
data_fraction = 1.0  # only this fraction of the prompts
num_turns = 1  # sharegpt: prompts taken from a conversation
columns: str | None = None  # which column is what: 'prompt=question, system=system'
skip_bad_rows = False  # count unreadable rows instead of stopping
chat = False  # text prompts become chats (Human: is the user), so that the tokenizer's chat template applies
system: str | None = None  # a system message before every prompt; text prompts become chats
max_prompt_length: int | None = None  # a longer prompt is cut; None: to what the model's positions leave
truncation = 'start'  # which end a too long prompt loses: start or end
reward: str | None = None  # score the answers with functions: 'my_rewards.py:exact_match', or a sum, as in ppo.py
# how
n = 1  # answers to a prompt, at each temperature
temperature: float | str = 1.0  # 0: greedy; several: '0.7 1.0'
top_p = 1.0  # sample from the fewest tokens that hold this probability
max_new_tokens = 512  # length of an answer
seed = 0  # of the answers
# output
out_dir = 'out/sample'  # samples.jsonl, model_outputs.json, config.json
# machine
batch_size = 64  # answers that a rank samples side by side
max_tokens: int | None = None  # fewer side by side, if their prompts and answers could have more tokens than this
dtype = 'float32'  # float32 or bfloat16
concurrency = 8  # endpoint: requests at a time
timeout = 120.0  # endpoint: seconds that a reply may take
trust_remote_code = False  # run code that comes with a model
config = configure(globals())

# options without effect: an error on the command line, a note in a config file
if endpoint:
    model_options = 'model max_prompt_length truncation batch_size max_tokens dtype trust_remote_code'
    config.report_unused(model_options.split(), 'an endpoint answers')
    completions_url(endpoint)  # raises UserError for a bad address
    if not endpoint_model:
        raise UserError('--endpoint needs --endpoint_model, the name of a model there')
else:
    config.report_unused(['endpoint_model', 'concurrency', 'timeout'], 'there is no --endpoint')

try:
    temperatures = [float(word) for word in str(temperature).split()]
except ValueError:
    temperatures = []
in_range = all(0 <= t < math.inf for t in temperatures)
has_duplicates = len(set(temperatures)) < len(temperatures)
if not temperatures or not in_range or has_duplicates:
    raise UserError(f"temperature {temperature!r} must be a number from 0, or different ones: '0.7 1.0'")
if 0 in temperatures and n > 1:
    raise UserError(f'at temperature 0 all {n} answers to a prompt are the same: use --n=1, or another temperature')
if temperatures == [0]:
    config.report_unused(['top_p'], 'temperature 0 takes the most probable token')
# answers per prompt: samples 0 to n - 1 have the first temperature, the next n the second, ...
n_samples = n * len(temperatures)
reward_parts = reward_functions.parse(reward) if reward else []
if not all(part.file for part in reward_parts):
    raise UserError('--reward takes functions here, FILE.py:NAME: label.py and feedback.score read reward models')
rank, world_size, device = ranks.setup(options=config)
if endpoint and world_size > 1:
    raise UserError('one process is enough to ask an endpoint: run python sample.py, and raise --concurrency')

# ---- the prompts ----


def read_prompts():
    """Return (rows of --data to answer, Counter of what was left out or changed). Raises UserError if there are none.

    A row is a dict with 'prompt', text or chat, perhaps 'tools'."""
    left_out = Counter()
    row_of_hash = {}  # the first row with each prompt
    # without --split, take the split 'test', or (undivided) all rows of data without splits
    wanted_split = split or 'test'
    options = {'undivided': split is None, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows}
    for source in sources.joined(data):
        # each line of a text file is a prompt
        options['columns'] = columns or ('prompt=text' if source.lower().endswith('.txt') else None)
        new_rows, new_left_out = sources.load_rows(source, wanted_split, task='prompts', **options)
        # an empty source is an error; that of the only one is reported below
        if not new_rows and source != data:
            raise sources.nothing_left(source, wanted_split, new_left_out)
        left_out.update(new_left_out)
        for row in new_rows:
            prompt_and_tools = [row[name] for name in ('prompt', 'tools') if name in row]
            first = row_of_hash.setdefault(content_hash(*prompt_and_tools), row)
            left_out['same prompt again'] += first is not row
    # choose the fraction by hash, independent of the order of the data
    hashes = np.array(list(row_of_hash), np.uint64)
    is_chosen = uniform_hash(hashes, seed) < data_fraction
    chosen = list(itertools.compress(row_of_hash.values(), is_chosen))  # the rows where is_chosen is true
    rows = chosen[:n_examples]
    left_out['prompts beyond n_examples or data_fraction'] += len(row_of_hash) - len(rows)
    if not rows:
        raise UserError(f'there are no prompts in data {data!r}; left out: {in_words(left_out)[0]}')
    for row in rows:
        # --system is added only where the data has no system message of its own, as in training
        if chat or system:
            row['prompt'] = as_chats({'prompt': row['prompt']}, system)['prompt']
        if endpoint and row.pop('tools', None):
            left_out['tools, which are not sent to an endpoint'] += 1
        roles = [turn['role'] for turn in as_chat(row['prompt'])]
        if endpoint and roles[-1:] == ['assistant']:
            left_out['begun answers, which an endpoint may answer instead of going on'] += 1
    return rows, left_out


def expected_row(i, sample):
    """Return the fields of a row of samples.jsonl that are known before sampling, for answer number `sample` to prompt i.

    None if this run has no such answer. collect() compares the rows found in out_dir with these."""
    if not (0 <= i < len(prompts) and 0 <= sample < n_samples):
        return None
    prompt = prompts[i]['prompt']
    row = {'index': i, 'prompt': prompt}
    if prompts[i].get('tools'):
        row['tools'] = prompts[i]['tools']
    row['sample'] = sample
    row['temperature'] = temperatures[sample // n]  # the first n samples have the first temperature, and so on
    row['generator'] = generator or endpoint_model or model
    # hash the prompt rather than its index, which changes with the data; some servers take at most 31 bits
    row['seed'] = content_hash(seed, prompt, sample) % 2**31
    return row


# compare weights by content: another model under the same name makes another run
record = dict(config)
if not endpoint:
    record['weights'] = ranks.from_rank_0(partial(content_of, model))
# these options may change when a run is resumed
neutral = set('out_dir reward endpoint batch_size max_tokens concurrency timeout skip_bad_rows'.split())
written = 'samples.jsonl model_outputs.json rewards.jsonl'.split()
check_out_dir = partial(log.check_out_dir, out_dir, record, resume=True, neutral=neutral, written=written)
ranks.on_rank_0(check_out_dir)
prompts, left_out = ranks.first_of_host(read_prompts)
# an answer's key: (prompt index, sample number)
keys = list(itertools.product(range(len(prompts)), range(n_samples)))

# ---- sampling from a model ----

if not endpoint:
    tokenizer = load_tokenizer(model, trust_remote_code)
    build = partial(load_model, model, tokenizer=tokenizer, trust_remote_code=trust_remote_code, seed=seed)
    net = fsdp.shard(build, device, dtype=dtype, train=False)
    # prompts are cut to the positions that the answer leaves
    positions = max_sequence_length(net)
    if positions <= max_new_tokens:
        raise UserError(f'the model has {positions} positions in all: give --max_new_tokens={positions // 2}, say')
    max_prompt = min(max_prompt_length or math.inf, positions - max_new_tokens)
    # token ids per prompt; None if the chat template rejects it
    ids = tokenise.tokenise_prompts(prompts, tokenizer, max_prompt, truncation, left_out, skip_bad_rows)
    all_texts = all(isinstance(row['prompt'], str) for row in prompts)
    if all_texts and tokenizer.chat_template not in (None, tokenise.PLAIN_CHAT):
        log.say('note: the tokenizer has a chat template, but the prompts are text: --chat makes chats of them')
    keys = [(i, sample) for i, sample in keys if ids[i] is not None]
    if not keys:
        raise UserError(f'the chat template refuses every prompt of data {data!r}; left out: {in_words(left_out)[0]}')


def plan_batches():
    """Return batches of all answers, as (n_rows, keys of answers to generate, n_rows at a time), the same on every rank."""
    batches = []
    for temperature_number in range(len(temperatures)):
        # a batch has one temperature, as have n samples of each prompt
        waiting = [(i, sample) for i, sample in keys if sample // n == temperature_number]
        # longest prompts first; key[0]: index of the prompt; ids: the tokens of each prompt
        waiting.sort(key=lambda key: -len(ids[key[0]]))
        while waiting:
            n_rows = batch_size
            if max_tokens:
                i, _ = waiting[0]  # the longest prompt of the batch
                longest = len(ids[i]) + max_new_tokens
                n_rows = min(n_rows, max(1, max_tokens // longest))
            # four answers per row: generate() refills a row when its answer has ended, so few rows idle at the end
            size = 4 * n_rows
            batches.append((n_rows, waiting[:size]))
            waiting = waiting[size:]
    return batches


def generate_all():
    """Generate this rank's answers that are not in out_dir yet (`done` has the keys of those), and append them. Raises UserError."""
    # generate an unfinished batch as a whole, because another batch would round differently
    unfinished = [(n_rows, batch) for n_rows, batch in plan_batches() if not done.issuperset(batch)]
    for n_rows, batch in unfinished[rank::world_size]:
        rows = [expected_row(*key) for key in batch]
        prompt_ids = [ids[i] for i, _ in batch]
        seeds = [row['seed'] for row in rows]
        settings = {'max_new_tokens': max_new_tokens, 'top_p': top_p, 'temperature': rows[0]['temperature']}
        advice = f'answers side by side ({min(n_rows, len(batch))}) do not fit; run the same command with a smaller --batch_size'
        with errors.on_full_memory(f'{advice}; what is answered is kept'):
            answers = generate.generate(net, tokenizer, prompt_ids, seeds, max_rows=n_rows, **settings)

        for row, prompt, answer_ids in zip(rows, prompt_ids, answers, strict=True):
            text = decode_answer(answer_ids, prompt, tokenizer, skip_special_tokens=True)
            # chat templates add white space around messages; plain text continues the prompt
            is_chat = not isinstance(row['prompt'], str)
            row['response'] = text.strip() if is_chat else text
            # generate() has removed the end token, which counts
            row['finish'] = 'eos' if len(answer_ids) < max_new_tokens else 'length'
            row['tokens'] = min(len(answer_ids) + 1, max_new_tokens)
        append_rows([row for key, row in zip(batch, rows, strict=True) if key not in done])


def ask_all():
    """Ask the endpoint for the answers that are not in out_dir yet, and append them. Counts failures in `failed`, by reason."""

    def jobs():
        """Yield (row, request) when a request is to be sent. The row lacks response, finish and tokens."""
        for row in (expected_row(*key) for key in keys if key not in done):
            sampling = {'temperature': row['temperature'], 'seed': row['seed']}
            sampling |= {'max_tokens': max_new_tokens, 'top_p': top_p}
            yield row, {'model': endpoint_model, **sampling, 'messages': as_chat(row['prompt'])}

    settings = {'concurrency': concurrency, 'timeout': timeout, 'proven': bool(done)}  # proven: it has answered before
    for row, text, raw, error in ask(endpoint, jobs(), **settings):
        if error:
            failed[error] += 1
            continue
        is_text = isinstance(row['prompt'], str)
        row['response'] = answer(text) if is_text else text  # answer: ' ' + text, as it follows a prompt that is text
        # of the parsed reply; None if it has none, or malformed ones
        finish = raw['choices'][0].get('finish_reason')
        if finish == 'stop':
            finish = 'eos'
        usage = raw.get('usage')
        tokens = usage.get('completion_tokens') if isinstance(usage, dict) else None
        is_count = type(tokens) is int and tokens >= 0  # not isinstance: True is an int, too
        row['finish'] = finish if isinstance(finish, str) else None
        row['tokens'] = tokens if is_count else None
        append_rows([row])


def append_rows(rows):
    """Append new rows to this rank's samples file, which collect() merges at the end, and update `counts` and the progress bar."""
    name = 'samples.jsonl' if rank == 0 else f'samples-{rank}.jsonl'
    append(f'{out_dir}/{name}', rows)
    counts['tokens'] += sum(row['tokens'] or 0 for row in rows)  # None where an endpoint does not say
    speed = log.per_second(counts['tokens'], time.perf_counter() - started)
    bar.set_postfix_str(f'{speed:.0f} tokens/s', refresh=False)
    bar.update(len(rows))


changed, notes = in_words(left_out)
sizes = f'{counted(len(prompts), "prompts")}, {counted(len(keys), "answers")}'
log.say('\n'.join([f'data: {sizes}; left out or changed: {changed}', *notes]))
i, _ = keys[0]
text = str(prompts[i]['prompt']) if endpoint else tokenizer.decode(ids[i])
shown = 'first prompt' if len(text) <= 300 else 'end of the first prompt'
log.say(f'{shown}: {text[-300:]!r}')

# claim out_dir, and skip the answers that it has already
ranks.on_rank_0(partial(lock, out_dir))
ranks.on_rank_0(check_out_dir)  # again: another run may have ended while this one loaded its model
ranks.on_rank_0(partial(log.claim_out_dir, out_dir, record))
done = set(ranks.from_rank_0(lambda: list(collect(out_dir, expected_row))))  # keys
if done:
    log.say(f'{out_dir} has {counted(len(done), "answers")} already')
guard.on_stop(lambda: f'what is answered is in {out_dir}; the same command goes on there')

started = time.perf_counter()
counts = Counter()  # 'tokens' sampled by this rank
failed = Counter()  # endpoint errors by reason
n_missing = len(keys) - len(done)
with log.progress(n_missing // world_size, ' answers', 'sampled by this rank') as bar:
    if endpoint:
        ask_all()
    elif n_missing:
        # on_ranks re-raises one rank's UserError on all ranks
        with sharded.unsharded(net):
            ranks.on_ranks(True, generate_all)

rows_by_key = ranks.on_rank_0(partial(collect, out_dir, expected_row))
if rank == 0:
    write_model_outputs(out_dir, rows_by_key)
    n_cut = sum(row['finish'] == 'length' for row in rows_by_key.values())
    # an endpoint's refusals, calls of tools, and thoughts that took all tokens
    n_empty = sum(not row['response'].strip() for row in rows_by_key.values())
    empty = f', {n_empty} empty' if n_empty else ''
    saved = f'{out_dir}/samples.jsonl, {counted(len(rows_by_key), "answers")}'
    log.say(f'done: {saved}, {n_cut} of them cut at {max_new_tokens} tokens{empty}')
    log.say(f'{out_dir}/model_outputs.json: the first answer to each prompt')


def score_answers():
    """Score all answers by the functions of --reward, write rewards.jsonl, and print the means. Raises UserError if one fails."""
    asked = [row['prompt'] for row in rows_by_key.values()]
    responses = [row['response'] for row in rows_by_key.values()]
    data_rows = [prompts[i].raw for i, _ in rows_by_key]  # with all columns of the data
    # a line has the value of each function, and in 'score' their weighted sum
    lines = [{'index': i, 'sample': sample, 'score': 0.0} for i, sample in rows_by_key]
    columns = ['score']
    for part in reward_parts:
        # a function may be called as another column of the line
        column = f'score_{part.name}' if part.name in ('index', 'sample', 'score') else part.name
        columns.append(column)
        values, _timed_out = reward_functions.score(part, asked, responses, data_rows)
        for line, value in zip(lines, values, strict=True):
            line['score'] += part.weight * value
            line[column] = value
    replace_text(f'{out_dir}/rewards.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
    for name in columns:
        mean = sum(line[name] for line in lines) / max(1, len(lines))
        log.say(f'{out_dir}/rewards.jsonl: mean {name} {mean:.4f}')


if reward_parts:
    ranks.on_rank_0(score_answers)

raise_if_missing(failed, 'answers')
n_found = ranks.from_rank_0(lambda: len(rows_by_key))  # rank 0's number, so that all ranks raise the error
if n_found < len(keys):
    raise UserError(f'answers are missing in {out_dir}/samples.jsonl: run the same command again')
if __name__ == '__main__':
    ranks.leave()
