"""Judge pairs of answers by a chat endpoint, a reward model, or a gold reward: preferences for dpo.py, and a win rate.

    python label.py --answers=out/sample/samples.jsonl --endpoint=http://127.0.0.1:8000 --judge_model=NAME
    python label.py --answers=ours.jsonl --against=theirs.json --reward_model=out/reward/model

Answer files are samples.jsonl of sample.py or AlpacaEval's model_outputs.json. With --answers alone, any two answers to a prompt
are a pair, lower sample number first; of several models, two of different ones. With --against, those of both files are paired in order.

Output in out_dir:
* verdicts.jsonl: one line per verdict; a judge's reply is synced to disk at once. The same command resumes a killed run, and asks
  again what failed.
* annotations.json, for --data=, in AlpacaEval's format (preference 1: output_1, 2: output_2, 1.5: tie, null: no verdict).
* report.json: the win rate and other numbers, explained in feedback/winrate.py.

An endpoint judges every pair in both orders; the preference is the mean of the two verdicts, null unless both are clear.
Identical answers are a tie without asking. NANOPREF_API_KEY or OPENAI_API_KEY holds the endpoint's key.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np

from configurator import UserError, configure
from feedback import judge, winrate
from feedback.answers import append, is_plain, make_pairs, raise_if_missing, read_verdicts
from feedback.endpoint import ask, completions_url
from runtime import log
from runtime.files import cut_rows, lock, replace_text
from text.examples import counted, in_words
from text.files import content_hash
from text.messages import answer, as_chat

# the answers
answers: str | None = None  # a file of answers: samples.jsonl or model_outputs.json
against: str | None = None  # judge them against the answers in this file; None: against each other
# the judge, one of these
endpoint: str | None = None  # the address of an OpenAI-compatible server, such as http://127.0.0.1:8000
reward_model: str | None = None  # folder or hub id of a reward model with one scalar
gold: str | None = None  # toy: the toy world's gold reward
# with an endpoint
judge_model: str | None = None  # the name that the endpoint has for the judge
judge_prompt = 'config/judge_pair.txt'  # a text with {instruction}, {answer_1}, {answer_2} and {mark}
request = '{"temperature": 0, "max_tokens": 512}'  # all else that goes into a request, as json
concurrency = 8  # requests at a time
timeout = 120.0  # seconds that a reply may take
retries = 6  # how often a request that fails is tried again
# with a reward model
max_length = 1024  # tokens of prompt and answer
max_prompt_length: int | None = None  # a prompt is cut to this if the whole is too long; None: half of max_length
truncation = 'start'  # which end a too long prompt loses: start or end
max_tokens = 16384  # tokens of one microbatch
trust_remote_code = False  # run code that comes with a model
# output
out_dir = 'out/label'  # everything the run leaves behind
config = configure(globals())

BLOCK = 64  # pairs scored by a reward before their verdicts are flushed to disk

if int(os.environ.get('WORLD_SIZE', 1)) > 1:
    raise UserError('label.py runs in one process: start it with python, not torchrun')
if answers is None:
    raise UserError('--answers=FILE is missing: the samples.jsonl of sample.py, or a model_outputs.json')
if sum(option is not None for option in (endpoint, reward_model, gold)) != 1:
    raise UserError('name one judge: --endpoint=http://... with --judge_model, --reward_model=FOLDER, or --gold=toy')
if endpoint is None:
    options = 'judge_model judge_prompt request concurrency timeout retries'.split()
    config.report_unused(options, 'there is no --endpoint')
if reward_model is None:
    options = 'max_length max_prompt_length truncation max_tokens trust_remote_code'.split()
    config.report_unused(options, 'there is no --reward_model')

pairs, left_out = make_pairs(answers, against)
# indices of pairs with identical answers, which need no judge
equal = set()
for i, pair in enumerate(pairs):
    first_output, second_output = pair['outputs']
    if first_output.strip() == second_output.strip():
        equal.add(i)
# a verdict's key: (pair index, order); order 2 shows the second answer first
orders = (1, 2) if endpoint else (1,)
different = [i for i in range(len(pairs)) if i not in equal]
keys = list(itertools.product(different, orders))
record = config | {'content of answers': f'{content_hash(pairs):016x}'}  # everything that verdicts depend on
failed = Counter()  # request errors by reason

if endpoint is not None:
    completions_url(endpoint)  # raises UserError for a bad address
    if not judge_model:
        raise UserError('--endpoint needs --judge_model, the name of a model there')
    template = judge.read_prompt(judge_prompt)
    try:
        fields = json.loads(request)
        # json.loads accepts NaN and lone surrogates, which cannot be sent; this line raises ValueError for them
        json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or fields.keys() & {'model', 'messages', 'stream', 'n'}:
        raise UserError(f'--request must be a json object without model, messages, stream and n, not {request!r}')
    fields |= {'model': judge_model, 'stream': False}
    record['content of judge_prompt'] = f'{content_hash(template):016x}'
    turns = [turn for pair in pairs for turn in as_chat(pair['prompt'])]
    left_out['system messages, which the judge is not shown'] = sum(turn['role'] == 'system' for turn in turns)
    left_out['tools, which the judge is not shown'] = sum('tools' in pair for pair in pairs)

if gold is not None:  # heavy modules are imported only if needed
    from text import toy

    known_prompts = [f'Review of the {place}:' for place in toy.PLACES]
    for pair in pairs:
        if pair['prompt'] not in known_prompts:
            expected = "the toy world's prompts, such as 'Review of the hotel:'"
            raise UserError(f'--gold=toy knows {expected}, not {str(pair["prompt"])[:80]!r}')

if reward_model is not None:
    from feedback import score
    from hf import lora
    from hf.probe import max_sequence_length
    from runtime import ranks
    from text.tokenise import encode

    *_, device = ranks.setup()
    record['content of reward_model'] = lora.content_of(reward_model)

# out_dir must be new, or hold a run with the same answers and options except these
neutral = set('out_dir endpoint concurrency timeout retries max_tokens'.split())
written = 'verdicts.jsonl annotations.json report.json'.split()
log.check_out_dir(out_dir, record, resume=True, neutral=neutral, written=written)
lock(out_dir)

n_prompts = len({pair['question'] for pair in pairs})
counts = f'{counted(len(pairs), "pairs of answers")} to {counted(n_prompts, "prompts")}, {len(equal)} of them equal'
reasons, _ = in_words(left_out)
log.say(f'data: {counts}, {counted(len(keys), "verdicts to take")}; left out: {reasons}')
if reward_model is not None:
    model, tokenizer = score.load_scorer(reward_model, device, trust_remote_code=trust_remote_code)
    # longer texts are cut, and not refused
    max_length = min(max_length, max_sequence_length(model))
    max_prompt_length = min(max_prompt_length, max_length // 2)


def ask_judge(todo):
    """Ask the endpoint for verdicts; yield a row of verdicts.jsonl as a reply arrives. todo: keys (pair index, order).

    A failed request yields nothing, and is counted in `failed`. Raises UserError if all others would fail, too."""
    # requests, each built when it is sent; `fields` are what all have in common
    jobs = (((i, order), fields | judge.question(template, pairs[i], order)) for i, order in todo)
    # proven: the endpoint has answered, in the run that left verdicts here
    settings = {'concurrency': concurrency, 'timeout': timeout, 'retries': retries, 'proven': bool(verdicts)}
    for (i, order), text, raw, error in ask(endpoint, jobs, **settings):
        if error:
            failed[error] += 1
            continue
        preference = judge.preference(text, raw, order)
        yield {'pair': i, 'order': order, 'preference': preference, 'text': text, 'raw': raw}


def items_of(pair):
    """Return (prompt, answer, tools) of the two answers of a pair, as dpo.py will read them from annotations.json."""
    outputs = pair['outputs']
    # is_plain: the prompt is a single question, '\n\nHuman: ...\n\nAssistant:', behind which an answer is the text ' ...'
    if is_plain(pair):
        outputs = map(answer, outputs)
    return [(pair['prompt'], output, pair.get('tools')) for output in outputs]


def reward_items(items):
    """Return (reward, {what was cut of the item: times}) for each item (prompt, answer, tools), by --gold or --reward_model."""
    if gold is not None:
        return [(toy.gold(prompt, text), {}) for prompt, text, _ in items]
    lengths = (max_length, max_prompt_length, truncation)
    cuts = [Counter() for _ in items]
    ids = [encode(*item, tokenizer, lengths, left_out=cut) for item, cut in zip(items, cuts, strict=True)]
    rewards = score.scores(model, tokenizer, ids, max_tokens).tolist()
    return [(reward, +cut) for reward, cut in zip(rewards, cuts, strict=True)]  # + of a Counter drops zeros


def compare_rewards(todo):
    """Yield a row of verdicts.jsonl for each key (pair index, order), of which order is 1; the higher reward is preferred."""
    # in blocks, so that verdicts reach the disk early
    for start in range(0, len(todo), BLOCK):
        indices = [i for i, _ in todo[start : start + BLOCK]]
        # score each answer once, even if it is in several pairs; str, because a chat prompt is an unhashable list
        items = {str(item): item for i in indices for item in items_of(pairs[i])}
        result_of = dict(zip(items, reward_items(list(items.values())), strict=True))
        for i in indices:
            (first, first_cut), (second, second_cut) = [result_of[str(item)] for item in items_of(pairs[i])]
            preference = 1 if first > second else 2
            if first == second:
                preference = 1.5  # tie
            row = {'pair': i, 'order': 1, 'preference': preference, 'rewards': [first, second]}
            if first_cut or second_cut:
                row['cut'] = [first_cut, second_cut]
            yield row


# ---- the verdicts ----

verdicts_file = Path(out_dir) / 'verdicts.jsonl'
cut_rows(verdicts_file, keep=lambda row: True)  # drops an incomplete last line: the next would be appended to it
verdicts = read_verdicts(verdicts_file, keys)  # key -> row
if verdicts:
    log.say(f'{out_dir} has {counted(len(verdicts), "verdicts")} already')
todo = [key for key in keys if key not in verdicts]
# replies without a clear verdict; the progress bar counts them, since replies cost money
unclear = [row.get('text') or '' for row in verdicts.values() if row['preference'] is None]

if not keys:  # identical answers alone need no verdict
    log.claim_out_dir(out_dir, record)
# a signal stops at once and drops pending requests
guard.on_stop(lambda: f'{len(verdicts)} of {len(keys)} verdicts are in {out_dir}; the same command goes on there')
judge_pairs = ask_judge if endpoint is not None else compare_rewards
with log.progress(len(keys), ' verdicts', 'judged', initial=len(verdicts)) as bar:
    for row in judge_pairs(todo):
        # claim out_dir with the first verdict only, so that a mistaken command does not block the corrected one
        if not (Path(out_dir) / 'config.json').exists():
            log.claim_out_dir(out_dir, record)
        # sync every reply, which costs money; rewards come fast, so sync them once per block
        ends_block = (len(verdicts) + 1) % BLOCK == 0
        append(verdicts_file, [row], sync=endpoint is not None or ends_block)
        verdicts[row['pair'], row['order']] = row
        if row['preference'] is None:
            unclear.append(row.get('text') or '')
        bar.set_postfix_str(f'{len(unclear)} unclear', refresh=False)
        bar.update()
if not verdicts:  # out_dir stays free for a corrected command
    raise_if_missing(failed, 'verdicts')
append(verdicts_file, [])  # creates the file

# ---- annotations and report ----

annotator = judge_model or reward_model or f'gold {gold}'
preferences_by_order = []
preferences = []  # of each pair: mean over its orders, None if a verdict is missing or unclear
rows = []  # of annotations.json
for i, pair in enumerate(pairs):
    by_order = [1.5]  # identical answers
    if i not in equal:
        by_order = [verdicts.get((i, order), {}).get('preference') for order in orders]
    preference = None if None in by_order else sum(by_order) / len(by_order)
    preferences_by_order.append(by_order)
    preferences.append(preference)
    row = {'instruction': pair['instruction']}
    for n, (output, generator) in enumerate(zip(pair['outputs'], pair['generators'], strict=True), start=1):
        row |= {f'output_{n}': output, f'generator_{n}': generator}
    row |= {'annotator': annotator, 'preference': preference}
    # not a field of AlpacaEval's: the original prompt, if the instruction does not determine it
    if not is_plain(pair):
        row |= {name: pair[name] for name in ('prompt', 'tools') if name in pair}
    rows.append(row)
replace_text(Path(out_dir) / 'annotations.json', json.dumps(rows, indent=1))

# per clear pair: its prompt, win of the first answer (0 to 1), lengths of both answers in characters
clear = [i for i, preference in enumerate(preferences) if preference is not None]
questions = [pairs[i]['question'] for i in clear]
wins = 2 - np.array([preferences[i] for i in clear])
lengths = []
for i in clear:
    lengths.append([len(output.strip()) for output in pairs[i]['outputs']])
lengths = np.array(lengths).reshape(-1, 2)  # also without any
names = [sorted({pair['generators'][k] for pair in pairs}) for k in (0, 1)]
first_name, second_name = map(' + '.join, names)
# of one model; or of three and more, of which some are first in one pair and second in another
if set(names[0]) & set(names[1]):
    first_name, second_name = (answers, against) if against else ('the first answer', 'the second')
# prompt and answer as text -> {what was cut of them: times}; rows of verdicts without a cut have no such column
cut_texts = {}
for (i, _), row in verdicts.items():
    cut_texts |= zip(map(str, items_of(pairs[i])), row.get('cut') or (), strict=False)
cut = sum(map(Counter, cut_texts.values()), Counter())
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
    'cut': dict(cut),
}
# rates with standard errors and 95% intervals: name -> (values per pair, prompts), clustered by prompt
rates = {'win_rate': (wins, questions)}
if endpoint is not None:
    # position bias, of pairs judged in both orders: the share of the two verdicts for the answer shown first; are they the same?
    in_both_orders = [i for i in clear if i not in equal]
    clusters = [pairs[i]['question'] for i in in_both_orders]
    in_order = [preferences_by_order[i] for i in in_both_orders]
    straight, swapped = np.array(in_order).reshape(-1, 2).T
    # the mean of 2 - straight and swapped - 1, each 1 if the answer shown first won, 0 if it lost, 1/2 for a tie
    rates['shown_first'] = ((1 + swapped - straight) / 2, clusters)
    rates['agreement'] = (straight == swapped, clusters)
for name, (column, clusters) in rates.items():
    report[name], report[f'{name}_se'] = winrate.mean(column, clusters)
    report[f'{name}_interval'] = winrate.interval(column, clusters)

# length-controlled win rate; with few prompts, length cannot be told from quality
n_judged = len(set(questions))
controlled = [None] * 4
if n_judged >= winrate.ENOUGH:
    controlled = winrate.length_controlled(wins, lengths[:, 0] - lengths[:, 1], questions)
columns = 'length_controlled length_controlled_se length_controlled_interval length_effect'
report |= zip(columns.split(), controlled, strict=True)
report['mean_lengths'] = lengths.mean(0).tolist() if clear else None
replace_text(Path(out_dir) / 'report.json', json.dumps(report, indent=1))


def percent(name, why_none='too few verdicts'):
    """Format a rate of the report with its 95% interval; return why_none if it has no interval."""
    interval = report[f'{name}_interval']
    if interval is None:
        return why_none
    low, high = interval
    return f'{report[name]:.1%} (95% interval {low:.1%} to {high:.1%})'


equal_length = percent('length_controlled', why_none='no finite fit, or an exact one')
if n_judged < winrate.ENOUGH:
    found = counted(n_judged, 'prompts')
    equal_length = f'not told: {found}, and from {winrate.ENOUGH} on length can be told from quality'
# empty: of a judge that refuses, or whose thoughts took all tokens
n_empty = sum(not text.strip() for text in unclear)
replies = f'unclear replies: {len(unclear)}' + (f' ({n_empty} empty)' if n_empty else '')
mean_lengths = ' and '.join(f'{mean:.0f}' for mean in report['mean_lengths'] or [])
log.say(f"""
{first_name} against {second_name}, judged by {annotator}
  win rate           {percent('win_rate')}; a tie is half a win
  at equal length    {equal_length}
  won, lost, tied    {report['won']}, {report['lost']}, {report['ties']}; {len(equal)} with equal answers
  mean length        {mean_lengths or 'unknown'} characters
  without a verdict  {counted(len(pairs) - len(clear), 'pairs')}; {replies}, failed requests: {failed.total()}""")
if endpoint is not None:
    log.say(f'  contradictions     {report["ties_contradicting_orders"]} of the ties have contradicting orders')
    log.say(f'  shown first, wins  {percent("shown_first")}; 50% without position bias')
    log.say(f'  orders agree       {percent("agreement")}')
files = f'{out_dir}/annotations.json, report.json and verdicts.jsonl'
log.say(f'{files}; answers cut for the judge: {in_words(cut)[0]}')
if unclear:
    ending = max(unclear, key=len).strip()[-150:]
    log.say(f'note: an unclear reply (cut short, or its last line is no verdict) ends: {ending!r}')

# missing verdicts are an error, after everything else is written
raise_if_missing(failed, 'verdicts')
if reward_model is not None and __name__ == '__main__':
    ranks.leave()
