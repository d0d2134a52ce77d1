"""Judge pairs of answers by a chat endpoint, a reward model, or a gold reward: preferences for dpo.py, and a win rate.

    python label.py --answers=out/sample/samples.jsonl --endpoint=http://127.0.0.1:8000 --judge_model=NAME
    python label.py --answers=ours.jsonl --against=theirs.json --reward_model=out/reward/model

A file of answers is samples.jsonl of sample.py or AlpacaEval's model_outputs.json. --answers alone: any two answers to a prompt
are a pair, the lower sample number first. With --against: the answers of both files to the same prompt, in order.

out_dir gets verdicts.jsonl, a line a verdict, with the judge's whole reply, on the disk before the next one is taken: the same
command goes on there, and asks again what failed; annotations.json, for --data=, in AlpacaEval's format (preference 1: output_1,
2: output_2, 1.5: tie, null: no verdict); and report.json. feedback/winrate.py says what its numbers are.

An endpoint sees every pair in both orders; the preference is the mean of its two verdicts, and null unless both are clear.
Equal answers are a tie without a judge. The key is NANOPREF_API_KEY, or OPENAI_API_KEY.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import json
from collections import Counter
from pathlib import Path

import numpy as np

from configurator import UserError, configure
from feedback import judge, winrate
from feedback.answers import annotation, append, is_plain, make_pairs, raise_if_missing, read_verdicts
from feedback.endpoint import ask, completions_url
from runtime import log
from runtime.files import lock, replace_text
from text.examples import in_words
from text.files import content_hash
from text.messages import answer

answers: str | None = None  # a file of answers: samples.jsonl or model_outputs.json
against: str | None = None  # judge them against the answers in this file; None: against each other
# the judge, one of these
endpoint: str | None = None  # the address of an OpenAI-compatible server, such as http://127.0.0.1:8000
reward_model: str | None = None  # folder or hub id of a reward model with one scalar
gold: str | None = None  # toy: the toy world's gold reward
# with an endpoint
judge_model: str | None = None  # the name that the endpoint has for the judge
judge_prompt = 'config/judge_pair.txt'  # a text with {instruction}, {answer_1}, {answer_2} and {mark}
request = '{"temperature": 0, "max_tokens": 512}'  # what else goes into a request, as json
concurrency = 8  # requests at a time
timeout = 120.0  # seconds that a reply may take
retries = 6  # how often a request that fails is tried again
# with a reward model
max_length = 1024  # tokens of prompt and answer
max_prompt_length: int | None = None  # a prompt is cut to this if the whole is too long; None: half of max_length
truncation = 'start'  # which end a too long prompt loses: start or end
max_tokens = 16384  # tokens of one microbatch
trust_remote_code = False  # run code that comes with a model
out_dir = 'out/label'  # everything the run leaves behind
config = configure(globals())

# ---- what is judged ----

if answers is None:
    raise UserError('--answers=FILE is missing: the samples.jsonl of sample.py, or a model_outputs.json')
if sum(option is not None for option in (endpoint, reward_model, gold)) != 1:
    raise UserError('name one judge: --endpoint=http://... with --judge_model, --reward_model=FOLDER, or --gold=toy')
if endpoint is None:
    config.ignored('judge_model judge_prompt request concurrency timeout retries'.split(), 'there is no --endpoint')
if reward_model is None:
    of_model = 'max_length max_prompt_length truncation max_tokens trust_remote_code'
    config.ignored(of_model.split(), 'there is no --reward_model')

# a verdict is known by (number of the pair, order); order 2 shows the second answer first; equal answers need no judge
table, left_out = make_pairs(answers, against)
orders = (1, 2) if endpoint else (1,)
equal = {i for i, pair in enumerate(table) if len({output.strip() for output in pair['outputs']}) == 1}
wanted = [(i, order) for i in range(len(table)) if i not in equal for order in orders]
n_prompts = len({pair['question'] for pair in table})
counts = f'{len(table)} pairs of answers to {n_prompts} prompts, {len(equal)} of them equal'
log.say(f'data: {counts}, {len(wanted)} verdicts to take; left out: {in_words(left_out)[0]}')

record = config | {'content of answers': f'{content_hash(table):016x}'}  # all that the verdicts depend on
failed = Counter()  # why requests have no reply
cut = Counter()  # what a reward model could not read whole

# ---- a judge behind an endpoint ----

if endpoint is not None:
    completions_url(endpoint)  # raises where it is none
    if not judge_model:
        raise UserError('--endpoint needs --judge_model, the name of a model there')
    template = judge.read_prompt(judge_prompt)
    fields = judge.read_request(request) | {'model': judge_model, 'stream': False}
    record['content of judge_prompt'] = f'{content_hash(template):016x}'


def ask_judge(todo):
    """Yield a row of verdicts.jsonl for each (pair, order), as they arrive, but for requests that failed."""
    # a request is made when it is sent
    jobs = (((i, order), fields | judge.question(template, table[i], order)) for i, order in todo)
    settings = {'concurrency': concurrency, 'timeout': timeout, 'retries': retries, 'proven': bool(verdicts)}
    for (i, order), text, raw, error in ask(endpoint, jobs, **settings):
        if error:
            failed[error] += 1
            continue
        preference = judge.preference(text, raw, order)
        yield {'pair': i, 'order': order, 'preference': preference, 'text': text, 'raw': raw}


# ---- a reward, of a model or of gold ----


def compare_rewards(todo):
    """Yield a row of verdicts.jsonl for each pair: the answer with the higher reward. Equal rewards are a tie."""
    # 64 pairs at a time, so that what is scored is soon on the disk
    for start in range(0, len(todo), 64):
        numbers = [i for i, _ in todo[start : start + 64]]
        # each answer once, though it is in n - 1 pairs, and as dpo.py will read it from annotations.json
        items = {}
        for i in numbers:
            prompt = table[i]['prompt']
            for output in table[i]['outputs']:
                text = answer(output) if is_plain(table[i]) else output
                items[str(prompt), output] = prompt, text
        found = dict(zip(items, rewards(list(items.values())), strict=True))
        for i in numbers:
            first, second = (found[str(table[i]['prompt']), output] for output in table[i]['outputs'])
            preference = 1 if first > second else 2
            if first == second:
                preference = 1.5  # a tie
            yield {'pair': i, 'order': 1, 'preference': preference, 'rewards': [first, second]}


# the gold reward of the toy world
if gold is not None:
    from text import toy

    known_prompts = [f'Review of the {place}:' for place in toy.PLACES]
    for pair in table:
        if pair['prompt'] not in known_prompts:
            such = "the toy world's prompts, such as 'Review of the hotel:'"
            raise UserError(f'--gold=toy knows {such}, not {str(pair["prompt"])[:80]!r}')

# a reward model, which reads prompt and answer as dpo.py would
if reward_model is not None:
    import fsdp
    from feedback import score
    from hf import lora
    from text.tokenise import encode

    _, world, device = fsdp.setup()
    if world > 1:
        raise UserError('label.py scores in one process: run it with python, not torchrun')
    model, tokenizer = score.load_scorer(reward_model, device, trust_remote_code=trust_remote_code)
    record['content of reward_model'] = lora.weights_hash(reward_model)


def rewards(items):
    """The reward of each (prompt, answer)."""
    if gold is not None:
        return [toy.gold(prompt, text) for prompt, text in items]
    limits = (max_length, max_prompt_length, truncation)
    encoded = [encode(prompt, text, tokenizer, *limits, cut) for prompt, text in items]
    return score.scores(model, tokenizer, encoded, max_tokens).tolist()


# ---- the verdicts ----

# the same options and the same answers as before, or another out_dir
neutral = {'out_dir', 'endpoint', 'concurrency', 'timeout', 'retries', 'max_tokens'}
log.check_out_dir(out_dir, record, True, neutral=neutral)

# what is there already is not asked again
lock(out_dir)
begun, file = Path(out_dir) / 'config.json', Path(out_dir) / 'verdicts.jsonl'
if begun.exists() and json.loads(begun.read_text())['config']['endpoint'] != endpoint:
    log.say(f'note: this run began at another endpoint; {judge_model} must be the same model here')
append(file, [])  # it is there, even if nothing is to be judged
verdicts = read_verdicts(file)
if verdicts:
    log.say(f'{len(verdicts)} verdicts are in {out_dir} already')
todo = [key for key in wanted if key not in verdicts]

# where the run is stopped, the requests under way are given up
guard.on_stop(lambda: f'{len(verdicts)} of {len(wanted)} verdicts are in {out_dir}; the same command goes on there')
with log.progress(len(wanted), ' verdicts', 'judged', initial=len(verdicts)) as bar:
    for row in ask_judge(todo) if endpoint is not None else compare_rewards(todo):
        # out_dir is not claimed before there is something to protect: a wrong name is easily mended
        if not begun.exists():
            log.claim_out_dir(out_dir, record)
        # what was paid for goes to the disk one by one; rewards, a thousand a second, 64 at a time
        append(file, [row], sync=endpoint is not None or len(verdicts) % 64 == 63)
        verdicts[row['pair'], row['order']] = row
        bar.update()

# ---- annotations and report ----

# a preference is the mean over both orders, none where one is missing
judged, preferences = [], []
for i in range(len(table)):
    of_orders = [verdicts.get((i, order), {}).get('preference') for order in orders] if i not in equal else [1.5]
    judged.append(of_orders)
    preferences.append(None if None in of_orders else sum(of_orders) / len(of_orders))

# the verdicts as AlpacaEval and dpo.py read them
annotator = judge_model or reward_model or f'gold {gold}'
rows = [annotation(pair, preference, annotator) for pair, preference in zip(table, preferences, strict=True)]
replace_text(Path(out_dir) / 'annotations.json', json.dumps(rows, indent=1))

# the pairs with a verdict: their prompts, wins of the first answer from 0 to 1, lengths in characters
clear = [i for i, preference in enumerate(preferences) if preference is not None]
question = [table[i]['question'] for i in clear]
wins = 2 - np.array([preferences[i] for i in clear])
lengths = np.array([[len(output.strip()) for output in table[i]['outputs']] for i in clear]).reshape(-1, 2)

# who wrote the first answers, and the second
first_name, second_name = (' + '.join(sorted({pair['generators'][k] for pair in table})) for k in (0, 1))
if first_name == second_name:
    first_name, second_name = 'the first answer', 'the second'

# counts first
unclear = [row['text'] for row in verdicts.values() if row['preference'] is None]
report = {
    'first': first_name,
    'second': second_name,
    'judge': annotator,
    'pairs': len(table),
    'with_a_verdict': len(clear),
    'won': int((wins > 0.5).sum()),
    'lost': int((wins < 0.5).sum()),
    'ties': int((wins == 0.5).sum()),
    'ties_equal_answers': len(equal),
    'ties_contradicting_orders': sum(set(of_orders) == {1, 2} for of_orders in judged),
    'unclear_replies': len(unclear),
    'failed': failed.total(),
    'failures': dict(failed),
    'cut': dict(+cut),
}
# then rates, with standard errors and 95% intervals over prompts; whether the order mattered, of pairs with both verdicts
rates = {'win_rate': (wins, question)}
if endpoint is not None:
    both = [i for i in clear if i not in equal]
    found = winrate.orders([judged[i] for i in both])
    questions = [table[i]['question'] for i in both]
    rates |= {name: (values, questions) for name, values in found.items()}
for name, values in rates.items():
    report[name], report[f'{name}_se'] = winrate.mean(*values)
    report[f'{name}_interval'] = winrate.interval(*values)
# at equal length, where that can be told
n_judged, fit = len(set(question)), (None, None, None)
if n_judged >= winrate.ENOUGH:
    fit = winrate.length_controlled(wins, lengths[:, 0] - lengths[:, 1], question)
report['length_controlled'], report['length_controlled_se'], report['length_effect'] = fit
report['length_controlled_interval'] = winrate.interval_of_fit(*fit[:2])
report['mean_lengths'] = lengths.mean(0).tolist() if clear else None
replace_text(Path(out_dir) / 'report.json', json.dumps(report, indent=1))


def percent(name, why='too few verdicts'):
    """A rate of the report with its 95% interval, for the screen; without a rate, why there is none."""
    if report[f'{name}_interval'] is None:
        return why
    low, high = report[f'{name}_interval']
    return f'{report[name]:.1%} (95% interval {low:.1%} to {high:.1%})'


# the same on the screen
equal_length = percent('length_controlled', 'no finite fit')
if n_judged < winrate.ENOUGH:
    equal_length = f'not told: {n_judged} prompts, and from {winrate.ENOUGH} on length can be told from quality'
mean_lengths = ' and '.join(f'{mean:.0f}' for mean in report['mean_lengths'] or [])
log.say(f"""
{first_name} against {second_name}, judged by {annotator}
  win rate           {percent('win_rate')}; a tie is half a win
  at equal length    {equal_length}
  won, lost, tied    {report['won']}, {report['lost']}, {report['ties']}; {len(equal)} with equal answers
  mean length        {mean_lengths or 'unknown'} characters
  without a verdict  {len(table) - len(clear)} pairs; unclear replies: {len(unclear)}, failed requests: {failed.total()}""")
if endpoint is not None:
    log.say(f'  contradictions     {report["ties_contradicting_orders"]} of the ties have contradicting orders')
    log.say(f'  shown first, wins  {percent("shown_first")}; 50% without position bias')
    log.say(f'  orders agree       {percent("agreement")}')
files = f'{out_dir}/annotations.json, report.json and verdicts.jsonl'
log.say(f'{files}; answers cut for the judge: {in_words(cut)[0]}')
if unclear:
    ending = unclear[0].strip()[-150:]
    log.say(f'note: an unclear reply (cut short, or its last line is no verdict) ends: {ending!r}')

# what is missing ends the run with a sentence, after all that there is was written
raise_if_missing(failed, 'verdicts')
if reward_model is not None and __name__ == '__main__':
    fsdp.leave()
