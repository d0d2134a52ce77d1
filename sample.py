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
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import fsdp
from configurator import UserError, configure, main_rank
from feedback import samples
from feedback.endpoint import ask, completions_url
from hf import generate
from hf.load import content, load_model, load_tokenizer
from hf.probe import room
from runtime import log
from text import sources, tokenise
from text.examples import uniform_hash

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
    config.ignored(['model', 'max_prompt_length', 'truncation', 'batch_size', 'max_tokens', 'dtype', 'trust_remote_code'],
                   'an endpoint answers')  # fmt: skip
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
    """The prompts of data, each once: rows with 'prompt' and perhaps 'tools', and a Counter of what was left out or changed."""
    rows, left_out = [], Counter()
    for source in data.split('+'):
        # a text file has a prompt a line, everything else the rows of a data set
        if source.endswith('.txt'):
            try:
                rows += [{'prompt': line} for line in Path(source).read_text('utf-8').splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f'cannot read {source}: {getattr(error, "strerror", "not a text file")}') from None
            continue
        more, out = sources.load_rows(source, split or 'test', undivided=split is None, num_turns=num_turns,
                                      skip_bad_rows=skip_bad_rows, task='prompts', columns=columns)  # fmt: skip
        if not more and source != data:
            raise sources.vanished(source, split or 'test', out)
        rows += more
        left_out.update(out)
    # each prompt once, then the part that is wanted
    found = {}
    for row in rows:
        with_tools = [row['tools']] if 'tools' in row else []
        found.setdefault(sources.content_hash(row['prompt'], *with_tools), row)
    left_out['same prompt again'] += len(rows) - len(found)
    kept = uniform_hash(np.array(list(found), np.uint64), seed) < data_fraction
    rows = [row for row, keep in zip(found.values(), kept, strict=True) if keep][:n_examples]
    if not rows:
        raise UserError(f'there are no prompts in data {data!r}; left out: {dict(+left_out) or "nothing"}')
    left_out['prompts beyond n_examples or data_fraction'] += len(found) - len(rows)
    # as chats, behind a system message, if asked
    first = [sources.message('system', system)] if system else []
    for row in rows if chat or system else []:
        turns = sources.as_chat(row['prompt'])
        row['prompt'] = first + [turn for turn in turns if not system or turn['role'] != 'system']
    if endpoint:
        left_out['tools, which are not sent to an endpoint'] += sum(row.pop('tools', None) is not None for row in rows)
    return rows, left_out


def wanted(i, sample):
    """What the row of answer number `sample` to prompt i must contain, or None if there is none in this run."""
    if 0 <= i < len(prompts) and 0 <= sample < n * len(temperatures):
        prompt, tools = prompts[i]['prompt'], prompts[i].get('tools')
        # the seed is of the prompt and the number, not of its place in the data
        answer_seed = sources.content_hash(seed, prompt, sample) % 2**31  # some servers take no longer ones
        more = {'tools': tools} if tools else {}
        return {'index': i, 'prompt': prompt, **more, 'sample': sample, 'temperature': temperatures[sample // n],
                'generator': generator or endpoint_model or model, 'seed': answer_seed}  # fmt: skip


# the weights by content: another model under the same name is another run
record = dict(config) | (
    {} if endpoint else {'weights': fsdp.gather_objects(fsdp.on_one_rank(lambda: content(model)))[0]}
)
neutral = {'out_dir', 'endpoint', 'batch_size', 'max_tokens', 'concurrency', 'timeout', 'skip_bad_rows'}
fsdp.on_one_rank(lambda: log.check_out_dir(out_dir, record, resume=True, neutral=neutral))
prompts, left_out = fsdp.first_of_host(read_prompts)
keys = [(i, k) for i in range(len(prompts)) for k in range(n * len(temperatures))]

# ---- a model here ----


def load():
    """The sharded model, its tokenizer, and the ids of the prompts."""
    # the model, and the room that its positions leave for prompts
    tokenizer = load_tokenizer(model, trust_remote_code)
    net = fsdp.shard(partial(load_model, model, tokenizer=tokenizer, trust_remote_code=trust_remote_code, seed=seed),
                     device, dtype=dtype, train=False)  # fmt: skip
    positions = room(net)
    if positions <= max_new_tokens:
        raise UserError(
            f'the model has {positions} positions: --max_new_tokens={max_new_tokens} leaves none for the prompt'
        )
    longest = min(max_prompt_length or math.inf, positions - max_new_tokens)
    ids = tokenise.tokenise_prompts(prompts, tokenizer, longest, truncation, left_out, skip_bad_rows)
    text = all(isinstance(row['prompt'], str) for row in prompts)
    if text and tokenizer.chat_template not in (None, tokenise.PLAIN_CHAT):
        log.say('note: the tokenizer has a chat template, but the prompts are text: --chat makes chats of them')
    return net, tokenizer, ids


def plan(ids):
    """All answers in batches, longest prompts first, of one temperature each. It depends on no rank and no earlier run."""
    batches = []
    # one temperature after the other; a batch is full by answers or by tokens
    for i, k in sorted(keys, key=lambda key: (key[1] // n, -len(ids[key[0]]), key)):
        batch = batches[-1] if batches else []
        width = len(ids[batch[0][0]]) + max_new_tokens if batch else 0  # of its longest prompt
        full = len(batch) == batch_size or (max_tokens and (len(batch) + 1) * width > max_tokens)
        if not batch or full or batch[0][1] // n != k // n:
            batches.append([])
        batches[-1].append((i, k))
    return batches


def generate_all():
    """Generate this rank's batches."""
    # a batch of the plan is done again as a whole, so that its noise and rounding are the same
    for batch in [batch for batch in plan(ids) if not done.issuperset(batch)][rank::world]:
        common = {'max_new_tokens': max_new_tokens, 'top_p': top_p, 'temperature': temperatures[batch[0][1] // n]}
        rows = [wanted(*key) for key in batch]  # whole batches, even if a few of their answers are there already
        advice = f'{len(batch)} answers do not fit; run the same command with a smaller --batch_size'
        with guard.memory_for(f'{advice}; what is answered is kept'):
            answers = generate.generate(net, tokenizer, [ids[i] for i, _ in batch], [r['seed'] for r in rows], **common)
        # what goes into samples.jsonl
        for row, answer in zip(rows, answers, strict=True):
            text = tokenizer.decode(answer, skip_special_tokens=True)
            ended = len(answer) < max_new_tokens
            row |= {'response': text if isinstance(row['prompt'], str) else text.strip(),
                    'finish': 'eos' if ended else 'length', 'tokens': len(answer) + ended}  # fmt: skip
        keep([row for key, row in zip(batch, rows, strict=True) if key not in done])


# ---- an endpoint ----


def ask_all():
    """Ask the endpoint for all answers that are not there. Returns a Counter of why some still are not."""
    failed, strange = Counter(), Counter()
    common = {'model': endpoint_model, 'max_tokens': max_new_tokens, 'top_p': top_p}

    def body(row):
        return common | {
            'messages': sources.as_chat(row['prompt']),
            'temperature': row['temperature'],
            'seed': row['seed'],
        }

    jobs = ((key, body(wanted(*key))) for key in keys if key not in done)
    # as they arrive, in any order
    for key, text, raw, error in ask(endpoint, jobs, concurrency=concurrency, timeout=timeout, proven=bool(done)):
        if text is None:
            failed[error] += 1
            continue
        # beside the text, a server may write anything anywhere: what is no reason or no number is none here
        row, finish = wanted(*key), raw['choices'][0].get('finish_reason')
        usage = raw.get('usage')
        tokens = usage.get('completion_tokens') if isinstance(usage, dict) else None
        strange['finish_reason'] += not isinstance(finish, str | None)
        strange['usage'] += not isinstance(usage, dict | None) or not (tokens is None or counts_tokens(tokens))
        finish = finish if isinstance(finish, str) else None
        row |= {'response': sources.answer(text) if isinstance(row['prompt'], str) else text,
                'finish': 'eos' if finish == 'stop' else finish,
                'tokens': tokens if counts_tokens(tokens) else None}  # fmt: skip
        keep([row])
    for name, times in (+strange).items():
        log.say(f'note: {times} replies have no {name} as the protocol has it: null stands in its place')
    return failed


def counts_tokens(value):
    """Whether a value of a reply can be a number of tokens: a bool is an int, too."""
    return type(value) is int and value >= 0


# ---- sampling ----


def keep(rows):
    """Write new answers down, and show the progress."""
    samples.append(out_dir, rank, rows)
    counts['answers'] += len(rows)
    counts['tokens'] += sum(row['tokens'] or 0 for row in rows)
    bar.set_postfix_str(f'{log.per_second(counts["tokens"], time.time() - started):.0f} tokens/s', refresh=False)
    bar.update(len(rows))


# the model, and what is about to be done
net, tokenizer, ids = (None, None, None) if endpoint else load()
if ids is not None:  # a prompt that the chat template refuses has no ids
    keys = [(i, k) for i, k in keys if ids[i] is not None]
    if not keys:
        raise UserError(f'the chat template refuses every prompt of data {data!r}; left out: {dict(+left_out)}')
log.say(f'data: {len(prompts)} prompts, {len(keys)} answers; left out or changed: {dict(+left_out) or "nothing"}')
text = repr(prompts[0]['prompt'] if endpoint else tokenizer.decode(ids[keys[0][0]]))
log.say(f'first prompt: {text if len(text) < 300 else text[:150] + " ... " + text[-150:]}')
# the folder is this run's; what is in it already is not done again
fsdp.on_one_rank(lambda: samples.lock(out_dir))
done = set(fsdp.gather_objects(fsdp.on_one_rank(lambda: list(samples.collect(out_dir, wanted))))[0])
if done:
    log.say(f'{len(done)} answers are in {out_dir} already')
fsdp.on_one_rank(lambda: log.claim_out_dir(out_dir, record))
guard.on_stop(lambda: f'what is answered is in {out_dir}; the same command goes on there')
started, counts, failed = time.time(), Counter(), Counter()
bar = tqdm(total=(len(keys) - len(done)) // world, unit=' answers', mininterval=0.5 if sys.stderr.isatty() else 20,
           dynamic_ncols=True, disable=not main_rank() or len(done) == len(keys), desc=f'rank 0 of {world}' if world > 1 else None)  # fmt: skip
# the work
if endpoint:
    failed = ask_all()
elif len(done) < len(keys):
    with fsdp.unsharded(net):
        fsdp.on_ranks(True, generate_all)
bar.close()
# all ranks' answers into one file, and what AlpacaEval reads
total = sum(fsdp.gather_objects(counts), Counter())
found = fsdp.on_one_rank(lambda: samples.collect(out_dir, wanted))
if rank == 0:
    samples.write_model_outputs(out_dir, found)
    lengths = sum(row['finish'] == 'length' for row in found.values())
    speed = f'{log.per_second(total["tokens"], time.time() - started):.0f} tokens/s; ' if total else ''
    log.say(f'done: {out_dir}/samples.jsonl, {len(found)} answers, {lengths} of them cut at {max_new_tokens} tokens; {speed}'
            f'{out_dir}/model_outputs.json, the first answer to each prompt')  # fmt: skip
# what is missing ends the run with a sentence
if not failed and len(fsdp.gather_objects(found and list(found))[0]) < len(keys):
    raise UserError(f'answers are missing in {out_dir}/samples.jsonl: run the same command again')
if failed:
    reason, times = failed.most_common(1)[0]
    raise UserError(
        f'{failed.total()} answers are missing ({times} times: {reason}): run the same command to ask again'
    )
if __name__ == '__main__':
    fsdp.leave()
