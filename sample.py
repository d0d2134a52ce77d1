"""Sample a model's answers to a dataset's prompts, into samples.jsonl and AlpacaEval's model_outputs.json.

    python sample.py --model=out/dpo/model --data=alpaca_eval
    torchrun --nproc_per_node=4 -- sample.py --model=out/dpo/model --data=hh --n=4 --temperature=0.7
    NANOPREF_API_KEY=... python sample.py --endpoint=https://HOST --endpoint_model=NAME --data=alpaca_eval

The noise of an answer comes from its own seed, a hash of --seed, the prompt and the answer's number; batches are planned
before they are dealt out. So the answers do not depend on the number of ranks, nor on where a run was killed: the same
command continues it. Another batch_size, or another processor, rounds otherwise, which changes an answer where two tokens are
nearly tied.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import math
import time
from collections import Counter
from functools import partial

import numpy as np

import fsdp
from configurator import UserError, configure, main_rank
from feedback.answers import append, collect, lock, progress, raise_if_missing, read_text, write_model_outputs
from feedback.endpoint import ask, completions_url
from hf import generate
from hf.load import content, load_model, load_tokenizer
from hf.probe import room
from runtime import log
from text import sources, tokenise
from text.examples import uniform_hash
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
# how
n = 1  # answers to a prompt, at each temperature
temperature: float | str = 1.0  # 0: greedy; several: '0.7 1.0'
top_p = 1.0  # sample from the fewest tokens that hold this probability
max_new_tokens = 512  # length of an answer
seed = 0  # of the answers
out_dir = 'out/sample'  # samples.jsonl, model_outputs.json, config.json
# machine
batch_size = 64  # answers at a time on a rank
max_tokens: int | None = None  # a batch is smaller if its prompts and answers may hold more tokens than this
dtype = 'float32'  # float32 or bfloat16
concurrency = 8  # endpoint: requests at a time
timeout = 120.0  # endpoint: seconds that a reply may take
trust_remote_code = False  # run code that comes with a model
config = configure(globals())

# ---- set-up ----

# what the options mean together
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
if not temperatures or not all(0 <= t < math.inf for t in temperatures) or len(set(temperatures)) < len(temperatures):
    raise UserError(f"temperature {temperature!r} must be a number from 0, or different ones: '0.7 1.0'")
if 0 in temperatures and n > 1:
    raise UserError(f'at temperature 0 all {n} answers to a prompt are the same: use --n=1, or another temperature')
if temperatures == [0]:
    config.ignored(['top_p'], 'temperature 0 takes the most probable token')
# who answers: the ranks of a model, or one process that asks
rank, world, device = fsdp.setup()
if endpoint and world > 1:
    raise UserError('one process is enough to ask an endpoint: run python sample.py, and raise --concurrency')


def read_prompts():
    """The rows to answer, each with a 'prompt' of its own and perhaps 'tools', and a Counter of what was left out or changed."""
    rows, left_out = [], Counter()
    for source in data.split('+'):
        # a text file has a prompt a line, everything else the rows of a data set
        if source.endswith('.txt'):
            rows += [{'prompt': line} for line in read_text(source).splitlines() if line.strip()]
            continue
        how = {'undivided': split is None, 'num_turns': num_turns, 'skip_bad_rows': skip_bad_rows}
        how |= {'task': 'prompts', 'columns': columns}
        more, out = sources.load_rows(source, split or 'test', **how)
        if not more and source != data:
            raise sources.vanished(source, split or 'test', out)
        rows += more
        left_out.update(out)
    # each prompt once, then the part that is wanted
    found = {}
    for row in rows:
        with_tools = [row['tools']] if 'tools' in row else []
        found.setdefault(content_hash(row['prompt'], *with_tools), row)
    left_out['same prompt again'] += len(rows) - len(found)
    kept = uniform_hash(np.array(list(found), np.uint64), seed) < data_fraction
    rows = [row for row, keep in zip(found.values(), kept, strict=True) if keep][:n_examples]
    if not rows:
        raise UserError(f'there are no prompts in data {data!r}; left out: {dict(+left_out) or "nothing"}')
    left_out['prompts beyond n_examples or data_fraction'] += len(found) - len(rows)
    # as chats, behind a system message, if asked
    first = [message('system', system)] if system else []
    for row in rows if chat or system else []:
        turns = as_chat(row['prompt'])
        row['prompt'] = first + [turn for turn in turns if not system or turn['role'] != 'system']
    if endpoint:
        left_out['tools, which are not sent to an endpoint'] += sum(row.pop('tools', None) is not None for row in rows)
    return rows, left_out


def wanted(i, sample):
    """What the row of answer number `sample` to prompt i must contain, or None if there is none in this run."""
    if not (0 <= i < len(prompts) and 0 <= sample < n * len(temperatures)):
        return None
    row = {'index': i, 'prompt': prompts[i]['prompt']}
    if prompts[i].get('tools'):
        row['tools'] = prompts[i]['tools']
    row |= {'sample': sample, 'temperature': temperatures[sample // n]}
    # the seed is of the prompt and the number, not of its place in the data; some servers take no longer ones
    answer_seed = content_hash(seed, row['prompt'], sample) % 2**31
    return row | {'generator': generator or endpoint_model or model, 'seed': answer_seed}


# the weights by content: another model under the same name is another run
record = dict(config)
if not endpoint:
    record['weights'] = fsdp.gather_objects(fsdp.on_one_rank(lambda: content(model)))[0]
neutral = {'out_dir', 'endpoint', 'batch_size', 'max_tokens', 'concurrency', 'timeout', 'skip_bad_rows'}
fsdp.on_one_rank(lambda: log.check_out_dir(out_dir, record, resume=True, neutral=neutral))
prompts, left_out = fsdp.first_of_host(read_prompts)
keys = [(i, k) for i in range(len(prompts)) for k in range(n * len(temperatures))]

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
    text = all(isinstance(row['prompt'], str) for row in prompts)
    if text and tokenizer.chat_template not in (None, tokenise.PLAIN_CHAT):
        log.say('note: the tokenizer has a chat template, but the prompts are text: --chat makes chats of them')
    # a prompt that the chat template refuses has no ids
    keys = [(i, k) for i, k in keys if ids[i] is not None]
    if not keys:
        raise UserError(f'the chat template refuses every prompt of data {data!r}; left out: {dict(+left_out)}')


def plan():
    """All answers in batches, longest prompts first, of one temperature each. It depends on no rank and no earlier run."""
    batches = [[]]
    # one temperature after the other; a batch is full by answers or by tokens
    for i, k in sorted(keys, key=lambda key: (key[1] // n, -len(ids[key[0]]), key)):
        batch = batches[-1]
        width = len(ids[batch[0][0]]) + max_new_tokens if batch else 0  # of its longest prompt
        full = len(batch) == batch_size or (max_tokens and (len(batch) + 1) * width > max_tokens)
        if batch and (full or batch[0][1] // n != k // n):
            batches.append([])
        batches[-1].append((i, k))
    return batches


def generate_all():
    """Generate this rank's batches."""
    # a batch of the plan is done again as a whole, so that its noise and rounding are the same
    for batch in [batch for batch in plan() if not done.issuperset(batch)][rank::world]:
        common = {'max_new_tokens': max_new_tokens, 'top_p': top_p, 'temperature': temperatures[batch[0][1] // n]}
        rows = [wanted(*key) for key in batch]
        asked, seeds = [ids[i] for i, _ in batch], [row['seed'] for row in rows]
        advice = f'{len(batch)} answers do not fit; run the same command with a smaller --batch_size'
        with guard.memory_for(f'{advice}; what is answered is kept'):
            answers = generate.generate(net, tokenizer, asked, seeds, **common)
        # what goes into samples.jsonl
        for row, ids_of_answer in zip(rows, answers, strict=True):
            text = tokenizer.decode(ids_of_answer, skip_special_tokens=True)
            ended = len(ids_of_answer) < max_new_tokens
            row['response'] = text if isinstance(row['prompt'], str) else text.strip()
            row |= {'finish': 'eos' if ended else 'length', 'tokens': len(ids_of_answer) + ended}
        keep([row for key, row in zip(batch, rows, strict=True) if key not in done])


# ---- an endpoint ----


def ask_all():
    """Ask the endpoint for all answers that are not there. Returns a Counter of why some still are not."""
    failed, strange = Counter(), Counter()
    jobs = ((key, body(wanted(*key))) for key in keys if key not in done)
    # as they arrive, in any order
    for key, text, raw, error in ask(endpoint, jobs, concurrency=concurrency, timeout=timeout, proven=bool(done)):
        if text is None:
            failed[error] += 1
            continue
        # beside the text, a server may write anything anywhere: what is no reason or no number is none here
        row, finish, usage = wanted(*key), raw['choices'][0].get('finish_reason'), raw.get('usage')
        tokens = usage.get('completion_tokens') if isinstance(usage, dict) else None
        if not isinstance(finish, str | None):
            strange['finish_reason'] += 1
            finish = None
        counts_tokens = type(tokens) is int and tokens >= 0  # a bool is an int, too
        if not isinstance(usage, dict | None) or not (tokens is None or counts_tokens):
            strange['usage'] += 1
            tokens = None
        row['response'] = answer(text) if isinstance(row['prompt'], str) else text
        keep([row | {'finish': 'eos' if finish == 'stop' else finish, 'tokens': tokens}])
    for name, times in strange.items():
        log.say(f'note: {times} replies have no {name} as the protocol has it: null stands in its place')
    return failed


def body(row):
    """The request for the answer of a row."""
    common = {'model': endpoint_model, 'max_tokens': max_new_tokens, 'top_p': top_p}
    return common | {'messages': as_chat(row['prompt']), 'temperature': row['temperature'], 'seed': row['seed']}


# ---- sampling ----


def keep(rows):
    """Write new answers down, and show the progress."""
    append(f'{out_dir}/samples.jsonl' if rank == 0 else f'{out_dir}/samples-{rank}.jsonl', rows)
    counts['answers'] += len(rows)
    counts['tokens'] += sum(row['tokens'] or 0 for row in rows)
    bar.set_postfix_str(f'{log.per_second(counts["tokens"], time.time() - started):.0f} tokens/s', refresh=False)
    bar.update(len(rows))


# what is about to be done
log.say(f'data: {len(prompts)} prompts, {len(keys)} answers; left out or changed: {dict(+left_out) or "nothing"}')
text = repr(prompts[0]['prompt'] if endpoint else tokenizer.decode(ids[keys[0][0]]))
log.say(f'first prompt: {text if len(text) < 300 else text[:150] + " ... " + text[-150:]}')
# the folder is this run's; what is in it already is not done again
fsdp.on_one_rank(lambda: lock(out_dir))
done = set(fsdp.gather_objects(fsdp.on_one_rank(lambda: list(collect(out_dir, wanted))))[0])
if done:
    log.say(f'{len(done)} answers are in {out_dir} already')
fsdp.on_one_rank(lambda: log.claim_out_dir(out_dir, record))
guard.on_stop(lambda: f'what is answered is in {out_dir}; the same command goes on there')
# the work
started, counts, failed = time.time(), Counter(), Counter()
who = f'rank 0 of {world}' if world > 1 else None
silent = not main_rank() or len(done) == len(keys)
with progress((len(keys) - len(done)) // world, ' answers', disable=silent, desc=who) as bar:
    if endpoint:
        failed = ask_all()
    elif len(done) < len(keys):
        with fsdp.unsharded(net):
            fsdp.on_ranks(True, generate_all)
# all ranks' answers into one file, and what AlpacaEval reads
total = sum(fsdp.gather_objects(counts), Counter())
found = fsdp.on_one_rank(lambda: collect(out_dir, wanted))
if rank == 0:
    write_model_outputs(out_dir, found)
    long = sum(row['finish'] == 'length' for row in found.values())
    speed = f'; {log.per_second(total["tokens"], time.time() - started):.0f} tokens/s' if total else ''
    log.say(
        f'done: {out_dir}/samples.jsonl, {len(found)} answers, {long} of them cut at {max_new_tokens} tokens{speed}'
    )
    log.say(f'{out_dir}/model_outputs.json: the first answer to each prompt')
# what is missing ends the run with a sentence
raise_if_missing(failed, 'answers')
if len(fsdp.gather_objects(found and list(found))[0]) < len(keys):
    raise UserError(f'answers are missing in {out_dir}/samples.jsonl: run the same command again')
if __name__ == '__main__':
    fsdp.leave()
