"""Sample a model's answers to a dataset's prompts, into samples.jsonl and AlpacaEval's model_outputs.json.

    python sample.py --model=out/dpo/model --data=alpaca_eval
    torchrun --nproc_per_node=4 -- sample.py --model=out/dpo/model --data=hh --n=4 --temperature=0.7
    NANOPREF_API_KEY=... python sample.py --endpoint=https://HOST --endpoint_model=NAME --data=alpaca_eval

The noise of an answer comes from its own seed, a hash of --seed, the prompt and the answer's number, and the work is planned
before it is dealt out. So the answers do not depend on the number of ranks, nor on where a run was killed: the same command
continues it. Another batch_size, or another processor, rounds otherwise, which changes an answer where two tokens nearly tie.
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
from configurator import UserError, configure, main_rank
from feedback.answers import append, collect, raise_if_missing, read_text, write_model_outputs
from feedback.endpoint import ask, completions_url
from hf import generate
from hf.load import load_model, load_tokenizer
from hf.lora import weights_hash
from hf.probe import room
from rl import reward_functions
from runtime import log
from runtime.files import lock, replace_text
from text import sources, tokenise
from text.examples import in_words, uniform_hash
from text.files import content_hash
from text.messages import answer, as_chat, message

# who answers
model = 'toy'  # hub id, local folder, or 'toy'
endpoint: str | None = None  # instead of model: the address of an OpenAI-compatible server
endpoint_model: str | None = None  # the name that the endpoint has for its model
generator: str | None = None  # a name for who answers, in the output; None: that of the model
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
out_dir = 'out/sample'  # samples.jsonl, model_outputs.json, config.json
# machine
batch_size = 64  # answers at a time on a rank
max_tokens: int | None = None  # fewer at a time if their prompts and answers may hold more tokens than this
dtype = 'float32'  # float32 or bfloat16
concurrency = 8  # endpoint: requests at a time
timeout = 120.0  # endpoint: seconds that a reply may take
trust_remote_code = False  # run code that comes with a model
config = configure(globals())

# ---- set-up ----

# options without effect: an error on the command line, a note in a config file
if endpoint:
    of_model = 'model max_prompt_length truncation batch_size max_tokens dtype trust_remote_code'
    config.ignored(of_model.split(), 'an endpoint answers')
    completions_url(endpoint)  # raises where it is none
    if not endpoint_model:
        raise UserError('--endpoint needs --endpoint_model, the name of a model there')
else:
    config.ignored(['endpoint_model', 'concurrency', 'timeout'], 'there is no --endpoint')

# one temperature, or several
try:
    temperatures = [float(x) for x in str(temperature).split()]
except ValueError:
    temperatures = []
possible = all(0 <= t < math.inf for t in temperatures)
if not temperatures or not possible or len(set(temperatures)) < len(temperatures):
    raise UserError(f"temperature {temperature!r} must be a number from 0, or different ones: '0.7 1.0'")
if 0 in temperatures and n > 1:
    raise UserError(f'at temperature 0 all {n} answers to a prompt are the same: use --n=1, or another temperature')
if temperatures == [0]:
    config.ignored(['top_p'], 'temperature 0 takes the most probable token')
n_samples = n * len(temperatures)  # answers to a prompt: numbers 0 to n - 1 at the first temperature, and so on

# functions that score answers
parts = reward_functions.parse(reward) if reward else []
if not all(part.file for part in parts):
    others = 'label.py and feedback.score read reward models'
    raise UserError(f'--reward of sample.py takes functions, FILE.py:NAME: {others}')

# who answers: the ranks of a model, or one process that asks
rank, world, device = fsdp.setup()
if endpoint and world > 1:
    raise UserError('one process is enough to ask an endpoint: run python sample.py, and raise --concurrency')

# ---- what is asked ----


def read_prompts():
    """The rows to answer, each with its 'prompt' and perhaps 'tools', and a Counter of what was left out or changed."""
    # a text file has a prompt a line, everything else the rows of a data set
    rows, left_out = [], Counter()
    how = {'undivided': split is None, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows, 'columns': columns}
    for source in data.split('+'):
        if source.endswith('.txt'):
            rows += [{'prompt': line} for line in read_text(source).splitlines() if line.strip()]
            continue
        more, out = sources.load_rows(source, split or 'test', task='prompts', **how)
        if not more and source != data:
            raise sources.vanished(source, split or 'test', out)
        rows += more
        left_out.update(out)

    # each prompt once
    found = {}  # hash -> row
    for row in rows:
        parts_of_prompt = [row[name] for name in ('prompt', 'tools') if name in row]
        found.setdefault(content_hash(*parts_of_prompt), row)
    left_out['same prompt again'] += len(rows) - len(found)

    # the part that is wanted: a fraction is chosen by hash, so it is the same wherever a prompt stands
    kept = uniform_hash(np.array(list(found), np.uint64), seed) < data_fraction
    rows = list(itertools.compress(found.values(), kept))[:n_examples]
    if not rows:
        raise UserError(f'there are no prompts in data {data!r}; left out: {in_words(left_out)[0]}')
    left_out['prompts beyond n_examples or data_fraction'] += len(found) - len(rows)

    for row in rows:
        # as chats, if asked; a system message of ours takes the place of one in the data
        if chat or system:
            row['prompt'] = as_chat(row['prompt'])
        if system:
            others = [turn for turn in row['prompt'] if turn['role'] != 'system']
            row['prompt'] = [message('system', system), *others]
        # an endpoint is sent the messages alone
        if endpoint and row.pop('tools', None):
            left_out['tools, which are not sent to an endpoint'] += 1
    return rows, left_out


def wanted(i, sample):
    """What the row of answer number `sample` to prompt i must contain, or None if there is none in this run."""
    if not (0 <= i < len(prompts) and 0 <= sample < n_samples):
        return None
    prompt = prompts[i]['prompt']
    row = {'index': i, 'prompt': prompt}
    if prompts[i].get('tools'):
        row['tools'] = prompts[i]['tools']
    row |= {'sample': sample, 'temperature': temperatures[sample // n]}
    # the seed is of the prompt and the number, not of its place in the data; 31 bits, as some servers take no more
    answer_seed = content_hash(seed, prompt, sample) % 2**31
    return row | {'generator': generator or endpoint_model or model, 'seed': answer_seed}


# the weights by content: another model under the same name is another run
record = dict(config)
if not endpoint:
    record['weights'] = fsdp.shared(lambda: weights_hash(model))
neutral = {'out_dir', 'reward', 'endpoint', 'batch_size', 'max_tokens', 'concurrency', 'timeout', 'skip_bad_rows'}
fsdp.on_one_rank(lambda: log.check_out_dir(out_dir, record, resume=True, neutral=neutral))
prompts, left_out = fsdp.first_of_host(read_prompts)
keys = [(i, sample) for i in range(len(prompts)) for sample in range(n_samples)]  # of all answers

# ---- a model here ----

if not endpoint:
    tokenizer = load_tokenizer(model, trust_remote_code)
    build = partial(load_model, model, tokenizer=tokenizer, trust_remote_code=trust_remote_code, seed=seed)
    net = fsdp.shard(build, device, dtype=dtype, train=False)

    # the room that its positions leave for prompts
    positions = room(net)
    if positions <= max_new_tokens:
        raise UserError(f'the model has {positions} positions: --max_new_tokens={max_new_tokens} fills them all')
    longest = min(max_prompt_length or math.inf, positions - max_new_tokens)
    ids = tokenise.tokenise_prompts(prompts, tokenizer, longest, truncation, left_out, skip_bad_rows)
    all_texts = all(isinstance(row['prompt'], str) for row in prompts)
    if all_texts and tokenizer.chat_template not in (None, tokenise.PLAIN_CHAT):
        log.say('note: the tokenizer has a chat template, but the prompts are text: --chat makes chats of them')

    # a prompt that the chat template refuses has no ids
    keys = [(i, sample) for i, sample in keys if ids[i] is not None]
    if not keys:
        raise UserError(f'the chat template refuses every prompt of data {data!r}; left out: {in_words(left_out)[0]}')


def plan():
    """All answers in parts of one temperature each, longest prompts first: it depends on no rank and no earlier run.

    Returns (rows, answers) each: so many of the part's answers are generated at a time, and others as soon as some have ended."""
    parts = []
    for heat in range(len(temperatures)):
        left = [key for key in keys if key[1] // n == heat]
        left.sort(key=lambda key: (-len(ids[key[0]]), key))
        while left:
            # rows are limited by answers, and by the tokens that prompts and answers may come to: the first is the longest
            i, _ = left[0]
            rows = batch_size
            if max_tokens:
                rows = min(rows, max(1, max_tokens // (len(ids[i]) + max_new_tokens)))
            parts.append((rows, left[: 4 * rows]))
            left = left[4 * rows :]
    return parts


def generate_all():
    """Generate the answers of this rank's parts, and keep those that are not there yet."""
    # a part of the plan is done again as a whole, so that its noise and rounding are the same
    unfinished = [(at_a_time, part) for at_a_time, part in plan() if not done.issuperset(part)]
    for at_a_time, part in unfinished[rank::world]:
        rows = [wanted(*key) for key in part]
        asked = [ids[i] for i, _ in part]
        seeds = [row['seed'] for row in rows]
        settings = {'max_new_tokens': max_new_tokens, 'top_p': top_p, 'temperature': rows[0]['temperature']}
        advice = f'{min(at_a_time, len(part))} answers do not fit; run the same command with a smaller --batch_size'
        with guard.memory_for(f'{advice}; what is answered is kept'):
            answers = generate.generate(net, tokenizer, asked, seeds, rows=at_a_time, **settings)

        # what goes into samples.jsonl
        for row, answer_ids in zip(rows, answers, strict=True):
            text = tokenizer.decode(answer_ids, skip_special_tokens=True)
            row['response'] = text if isinstance(row['prompt'], str) else text.strip()
            ended = len(answer_ids) < max_new_tokens
            row['finish'] = 'eos' if ended else 'length'
            row['tokens'] = len(answer_ids) + ended  # the end token counts
        keep([row for key, row in zip(part, rows, strict=True) if key not in done])


# ---- an endpoint ----


def ask_all():
    """Ask the endpoint for all answers that are not there, and count in failed why some still are not."""
    jobs = ((key, body(wanted(*key))) for key in keys if key not in done)
    settings = {'concurrency': concurrency, 'timeout': timeout, 'proven': bool(done)}
    for key, text, raw, error in ask(endpoint, jobs, **settings):
        if error:
            failed[error] += 1
            continue
        row = wanted(*key)
        row['response'] = answer(text) if isinstance(row['prompt'], str) else text
        # beside the text, a server may write anything: what is no reason, or no count, is null here (True is an int to Python)
        finish, usage = raw['choices'][0].get('finish_reason'), raw.get('usage')
        row['finish'] = finish if isinstance(finish, str) else None
        if finish == 'stop':
            row['finish'] = 'eos'
        tokens = usage.get('completion_tokens') if isinstance(usage, dict) else None
        row['tokens'] = tokens if type(tokens) is int and tokens >= 0 else None
        keep([row])


def body(row):
    """The request for the answer of a row."""
    fields = {'model': endpoint_model, 'max_tokens': max_new_tokens, 'top_p': top_p}
    fields |= {'temperature': row['temperature'], 'seed': row['seed']}
    return fields | {'messages': as_chat(row['prompt'])}


# ---- sampling ----


def keep(rows):
    """Write new answers down, and show the progress."""
    name = 'samples.jsonl' if rank == 0 else f'samples-{rank}.jsonl'
    append(f'{out_dir}/{name}', rows)
    counts['tokens'] += sum(row['tokens'] or 0 for row in rows)
    speed = log.per_second(counts['tokens'], time.time() - started)
    bar.set_postfix_str(f'{speed:.0f} tokens/s', refresh=False)
    bar.update(len(rows))


# what is about to be done
changed, notes = in_words(left_out)
log.say(f'data: {len(prompts):,} prompts, {len(keys):,} answers; left out or changed: {changed}')
for note in notes:
    log.say(note)
i, _ = keys[0]
text = str(prompts[i]['prompt']) if endpoint else tokenizer.decode(ids[i])
log.say(f'first prompt: {text[-300:]!r}')

# the folder is this run's; what is in it already is not done again
fsdp.on_one_rank(lambda: lock(out_dir))
done = set(fsdp.shared(lambda: list(collect(out_dir, wanted))))
if done:
    log.say(f'{len(done)} answers are in {out_dir} already')
fsdp.on_one_rank(lambda: log.claim_out_dir(out_dir, record))
guard.on_stop(lambda: f'what is answered is in {out_dir}; the same command goes on there')

# the work
started, counts, failed = time.time(), Counter(), Counter()
missing = len(keys) - len(done)
silent = not main_rank() or not missing
with log.progress(missing // world, ' answers', 'sampled by this rank', disable=silent) as bar:
    if endpoint:
        ask_all()
    elif missing:
        with fsdp.unsharded(net):
            fsdp.on_ranks(True, generate_all)

# all ranks' answers into one file, and what AlpacaEval reads
found = fsdp.on_one_rank(lambda: collect(out_dir, wanted))
if rank == 0:
    write_model_outputs(out_dir, found)
    long = sum(row['finish'] == 'length' for row in found.values())
    log.say(f'done: {out_dir}/samples.jsonl, {len(found)} answers, {long} of them cut at {max_new_tokens} tokens')
    log.say(f'{out_dir}/model_outputs.json: the first answer to each prompt')


def score_answers():
    """Write the scores of all answers into rewards.jsonl, and their means on the screen."""
    # the rows as they were read; a line of a .txt file is its own
    rows = [prompts[row['index']] for row in found.values()]
    rows = [getattr(row, 'raw', row) for row in rows]
    asked, responses = ([row[name] for row in found.values()] for name in ('prompt', 'response'))
    lines = [{'index': index, 'sample': sample, 'score': 0.0} for index, sample in found]
    for part in parts:
        values, _ = reward_functions.score(part, asked, responses, rows)
        for line, value in zip(lines, values, strict=True):
            line['score'] += part.weight * value
            line[part.name] = value
    replace_text(f'{out_dir}/rewards.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
    for name in ('score', *(part.name for part in parts)):
        mean = sum(line[name] for line in lines) / max(1, len(lines))
        log.say(f'{out_dir}/rewards.jsonl: mean {name} {mean:.4f}')


if parts:
    fsdp.on_one_rank(score_answers)

# what is missing ends the run with a sentence, on every rank
raise_if_missing(failed, 'answers')
n_found, *_ = fsdp.gather_objects(len(found or {}))  # rank 0 alone has them
if n_found < len(keys):
    raise UserError(f'answers are missing in {out_dir}/samples.jsonl: run the same command again')
if __name__ == '__main__':
    fsdp.leave()
