"""Judge pairs of answers by a chat endpoint, a reward model, or a gold reward: preferences for dpo.py, and a win rate.

    python label.py --answers=out/sample/samples.jsonl --endpoint=http://127.0.0.1:8000 --judge_model=NAME
    python label.py --answers=ours.jsonl --against=theirs.json --reward_model=out/reward/model

A file of answers is samples.jsonl of sample.py or AlpacaEval's model_outputs.json. --answers alone: any two answers to a prompt
are a pair, the lower sample number first. With --against: the answers of both files to the same prompt, in order.

out_dir gets three files:
* verdicts.jsonl: a line for each verdict, with the judge's whole reply. A line is on the disk before the next one is taken: so
  the same command goes on where a run was killed, and asks again where a request failed.
* annotations.json, for --data=, in AlpacaEval's format (preference 1: output_1, 2: output_2, 1.5: tie, null: no verdict).
* report.json: the win rate and other numbers, which feedback/winrate.py explains.

An endpoint sees every pair in both orders. The preference is the mean of its two verdicts, and null unless both are clear. Two
equal answers are a tie, and no judge is asked. The key of an endpoint is in NANOPREF_API_KEY, or else OPENAI_API_KEY.
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

BLOCK = 64  # pairs whose rewards are compared together, and then synced to the disk

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

pairs, left_out = make_pairs(answers, against)
# pairs of equal answers, by number: they need no judge
equal = set()
for i, pair in enumerate(pairs):
    first, second = pair['outputs']
    if first.strip() == second.strip():
        equal.add(i)
# a verdict's key: (number of the pair, order in which its answers are shown); order 2 shows the second answer first
orders = (1, 2) if endpoint else (1,)
judged_pairs = [i for i in range(len(pairs)) if i not in equal]
keys = [(i, order) for i in judged_pairs for order in orders]
n_prompts = len({pair['question'] for pair in pairs})
counts = f'{len(pairs)} pairs of answers to {n_prompts} prompts, {len(equal)} of them equal'
log.say(f'data: {counts}, {len(keys)} verdicts to take; left out: {in_words(left_out)[0]}')

record = config | {'content of answers': f'{content_hash(pairs):016x}'}  # all that the verdicts depend on
failed = Counter()  # why requests have no reply
cut = Counter()  # what a reward model could not read whole

# ---- a judge behind an endpoint ----

if endpoint is not None:
    completions_url(endpoint)  # raises UserError if it is no address
    if not judge_model:
        raise UserError('--endpoint needs --judge_model, the name of a model there')
    template = judge.read_prompt(judge_prompt)
    fields = judge.read_request(request) | {'model': judge_model, 'stream': False}
    record['content of judge_prompt'] = f'{content_hash(template):016x}'


def ask_judge(todo):
    """Ask the endpoint for the verdicts with these keys. Yield a row of verdicts.jsonl for each, in the order of the replies.

    A request that failed yields nothing, and is counted in `failed`. Raises UserError where going on is useless."""
    # a generator: a request is made when it is sent
    jobs = (((i, order), fields | judge.question(template, pairs[i], order)) for i, order in todo)
    settings = {'concurrency': concurrency, 'timeout': timeout, 'retries': retries, 'proven': bool(verdicts)}
    for (i, order), text, raw, error in ask(endpoint, jobs, **settings):
        if error:
            failed[error] += 1
            continue
        preference = judge.preference(text, raw, order)
        yield {'pair': i, 'order': order, 'preference': preference, 'text': text, 'raw': raw}


# ---- a reward, of a model or of gold ----


def compare_rewards(todo):
    """Compare the rewards of the answers of these pairs. Yield a row of verdicts.jsonl for each: the higher one is preferred.

    todo: keys (number of the pair, 1). Equal rewards are a tie."""
    # BLOCK pairs at a time, so that what is scored is soon on the disk
    for start in range(0, len(todo), BLOCK):
        numbers = [i for i, _ in todo[start : start + BLOCK]]
        # each answer once, though it may be in several pairs. The key has the prompt as a string, since a chat is a list
        to_score = {}
        for i in numbers:
            prompt = pairs[i]['prompt']
            for output in pairs[i]['outputs']:
                # the answer as dpo.py will read it from annotations.json
                text = answer(output) if is_plain(pairs[i]) else output
                to_score[str(prompt), output] = (prompt, text)
        scores = rewards(list(to_score.values()))
        reward_of = dict(zip(to_score, scores, strict=True))

        for i in numbers:
            prompt = str(pairs[i]['prompt'])
            first, second = [reward_of[prompt, output] for output in pairs[i]['outputs']]
            preference = 1 if first > second else 2
            if first == second:
                preference = 1.5  # a tie
            yield {'pair': i, 'order': 1, 'preference': preference, 'rewards': [first, second]}


# the gold reward of the toy world; here and below, heavy modules are imported only where they are needed
if gold is not None:
    from text import toy

    known_prompts = [f'Review of the {place}:' for place in toy.PLACES]
    for pair in pairs:
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
    """Return a list with the reward of each (prompt, answer), by gold or by the reward model. What must be cut is counted in `cut`."""
    if gold is not None:
        return [toy.gold(prompt, text) for prompt, text in items]
    ids = [encode(prompt, text, tokenizer, max_length, max_prompt_length, truncation, cut) for prompt, text in items]
    return score.scores(model, tokenizer, ids, max_tokens).tolist()


# ---- the verdicts ----

# out_dir must be new, or have the verdicts of a run with the same options and answers; these options may differ
neutral = {'out_dir', 'endpoint', 'concurrency', 'timeout', 'retries', 'max_tokens'}
log.check_out_dir(out_dir, record, resume=True, neutral=neutral)
lock(out_dir)
config_file = Path(out_dir) / 'config.json'
if config_file.exists():
    began_at = json.loads(config_file.read_text())['config']['endpoint']
    if began_at != endpoint:
        log.say(f'note: this run began at another endpoint; {judge_model} must be the same model here')

# verdicts that are there already are not taken again
verdicts_file = Path(out_dir) / 'verdicts.jsonl'
append(verdicts_file, [])  # makes the file, even if nothing is to be judged
verdicts = read_verdicts(verdicts_file)  # key -> row
if verdicts:
    log.say(f'{len(verdicts)} verdicts are in {out_dir} already')
todo = [key for key in keys if key not in verdicts]

# judge; a signal ends this at once, and gives up the requests under way
guard.on_stop(lambda: f'{len(verdicts)} of {len(keys)} verdicts are in {out_dir}; the same command goes on there')
new_rows = ask_judge(todo) if endpoint is not None else compare_rewards(todo)
with log.progress(len(keys), ' verdicts', 'judged', initial=len(verdicts)) as bar:
    for row in new_rows:
        # the first verdict claims out_dir: before it, a command with a mistake leaves nothing that a corrected one would differ from
        if not config_file.exists():
            log.claim_out_dir(out_dir, record)
        # replies were paid for, and are synced to the disk one by one; rewards come by the thousand a second, and are synced in blocks
        ends_block = (len(verdicts) + 1) % BLOCK == 0
        sync = endpoint is not None or ends_block
        append(verdicts_file, [row], sync=sync)
        verdicts[row['pair'], row['order']] = row
        bar.update()

# ---- annotations and report ----

# the preference of each pair: the mean over its orders; None if one of them has no verdict, or an unclear one
preferences_by_order = []
preferences = []
for i in range(len(pairs)):
    by_order = [1.5]  # equal answers
    if i not in equal:
        by_order = [verdicts.get((i, order), {}).get('preference') for order in orders]
    mean = None
    if None not in by_order:
        mean = sum(by_order) / len(by_order)
    preferences_by_order.append(by_order)
    preferences.append(mean)

# the file that AlpacaEval and dpo.py read
annotator = judge_model or reward_model or f'gold {gold}'
rows = []
for pair, preference in zip(pairs, preferences, strict=True):
    rows.append(annotation(pair, preference, annotator))
replace_text(Path(out_dir) / 'annotations.json', json.dumps(rows, indent=1))

# columns of the pairs with a verdict: number of the prompt, win of the first answer from 0 to 1, lengths in characters
clear = [i for i, preference in enumerate(preferences) if preference is not None]
questions = [pairs[i]['question'] for i in clear]
wins = 2 - np.array([preferences[i] for i in clear])
lengths = [[len(output.strip()) for output in pairs[i]['outputs']] for i in clear]
lengths = np.array(lengths).reshape(-1, 2)  # (pairs, first and second answer), also without any pair

# who wrote the first answers, and the second
first_name = ' + '.join(sorted({pair['generators'][0] for pair in pairs}))
second_name = ' + '.join(sorted({pair['generators'][1] for pair in pairs}))
if first_name == second_name:
    first_name = 'the first answer'
    second_name = 'the second'

# counts first
unclear = [row['text'] for row in verdicts.values() if row['preference'] is None]
report = {
    'first': first_name,
    'second': second_name,
    'judge': annotator,
    'pairs': len(pairs),
    'with_a_verdict': len(clear),
    'won': int((wins > 0.5).sum()),
    'lost': int((wins < 0.5).sum()),
    'ties': int((wins == 0.5).sum()),
    'ties_equal_answers': len(equal),
    'ties_contradicting_orders': sum(set(by_order) == {1, 2} for by_order in preferences_by_order),
    'unclear_replies': len(unclear),
    'failed': failed.total(),
    'failures': dict(failed),
    'cut': dict(+cut),
}
# then rates with standard errors and 95% intervals. name -> (a number for each pair, its prompt): pairs of a prompt go together
rates = {'win_rate': (wins, questions)}
if endpoint is not None:
    # what the order of showing did, of the pairs with a verdict in both orders
    in_both_orders = [i for i in clear if i not in equal]
    questions_there = [pairs[i]['question'] for i in in_both_orders]
    columns = winrate.orders([preferences_by_order[i] for i in in_both_orders])
    for name, column in columns.items():
        rates[name] = (column, questions_there)
for name, (column, clusters) in rates.items():
    mean, error = winrate.mean(column, clusters)
    report[name] = mean
    report[f'{name}_se'] = error
    report[f'{name}_interval'] = winrate.interval(column, clusters)

# the win rate between answers of equal length, if there are enough prompts to tell length from quality
n_judged = len(set(questions))
rate = error = effect = None
if n_judged >= winrate.ENOUGH:
    rate, error, effect = winrate.length_controlled(wins, lengths[:, 0] - lengths[:, 1], questions)
report['length_controlled'] = rate
report['length_controlled_se'] = error
report['length_effect'] = effect
report['length_controlled_interval'] = winrate.interval_of_fit(rate, error)
report['mean_lengths'] = lengths.mean(0).tolist() if clear else None
replace_text(Path(out_dir) / 'report.json', json.dumps(report, indent=1))


def percent(name, why_none='too few verdicts'):
    """Return a rate of the report with its 95% interval, in words for the screen; why_none if the report has no such rate."""
    interval = report[f'{name}_interval']
    if interval is None:
        return why_none
    low, high = interval
    return f'{report[name]:.1%} (95% interval {low:.1%} to {high:.1%})'


# the same on the screen
equal_length = percent('length_controlled', why_none='no finite fit')
if n_judged < winrate.ENOUGH:
    equal_length = f'not told: {n_judged} prompts, and from {winrate.ENOUGH} on length can be told from quality'
means = report['mean_lengths'] or []
mean_lengths = ' and '.join(f'{mean:.0f}' for mean in means)
log.say(f"""
{first_name} against {second_name}, judged by {annotator}
  win rate           {percent('win_rate')}; a tie is half a win
  at equal length    {equal_length}
  won, lost, tied    {report['won']}, {report['lost']}, {report['ties']}; {len(equal)} with equal answers
  mean length        {mean_lengths or 'unknown'} characters
  without a verdict  {len(pairs) - len(clear)} pairs; unclear replies: {len(unclear)}, failed requests: {failed.total()}""")
if endpoint is not None:
    log.say(f'  contradictions     {report["ties_contradicting_orders"]} of the ties have contradicting orders')
    log.say(f'  shown first, wins  {percent("shown_first")}; 50% without position bias')
    log.say(f'  orders agree       {percent("agreement")}')
files = f'{out_dir}/annotations.json, report.json and verdicts.jsonl'
log.say(f'{files}; answers cut for the judge: {in_words(cut)[0]}')
if unclear:
    ending = unclear[0].strip()[-150:]
    log.say(f'note: an unclear reply (cut short, or its last line is no verdict) ends: {ending!r}')

# missing verdicts end the run with a sentence, now that all the others are written
raise_if_missing(failed, 'verdicts')
if reward_model is not None and __name__ == '__main__':
    fsdp.leave()
