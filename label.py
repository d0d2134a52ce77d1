"""Judge pairs of answers by a chat endpoint, a reward model, or a gold reward: preferences for dpo.py, and a win rate.

    python label.py --answers=out/sample/samples.jsonl --endpoint=http://127.0.0.1:8000 --judge_model=NAME
    python label.py --answers=ours.jsonl --against=theirs.json --reward_model=out/reward/model

--answers alone: any two answers to a prompt are a pair, the lower sample number first. With --against: the answers of both
files to the same prompt, in order. A file is samples.jsonl of sample.py or AlpacaEval's model_outputs.json.

out_dir gets verdicts.jsonl, a line a verdict, with the judge's whole reply, on the disk before the next one is taken: after
a crash the same command goes on there, and what failed is asked again; annotations.json, for --data=, in AlpacaEval's format
(preference 1: output_1, 2: output_2, 1.5: tie, null: no verdict); and report.json. winrate.py says what its numbers are.

An endpoint sees every pair in both orders; the preference is the mean of its two verdicts, so that contradicting ones make a
tie, and null unless both are clear. Equal answers are a tie without a judge. The key is NANOPREF_API_KEY, or OPENAI_API_KEY.
"""

from runtime import guard

guard.watch(__name__)  # before the heavy imports

import contextlib
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError, configure
from feedback import pairs, winrate
from feedback.endpoint import ask, completions_url
from runtime import log
from text.sources import answer, content_hash
from text.sources import ask as as_question

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
max_prompt_length = 512  # a prompt is cut to this if the whole is too long
truncation = 'start'  # which end a too long prompt loses: start or end
max_tokens = 16384  # tokens of one microbatch
trust_remote_code = False  # run code that comes with a model
out_dir = 'out/label'  # everything the run leaves behind
config = configure(globals())

# ---- what is judged ----

# which options belong to which judge
FOR_ENDPOINT = ['judge_model', 'judge_prompt', 'request', 'concurrency', 'timeout', 'retries']
FOR_MODEL = ['max_length', 'max_prompt_length', 'truncation', 'max_tokens', 'trust_remote_code']
if answers is None:
    raise UserError('--answers=FILE is missing: the samples.jsonl of sample.py, or a model_outputs.json')
if sum(judge is not None for judge in (endpoint, reward_model, gold)) != 1:
    raise UserError('name one judge: --endpoint=http://... with --judge_model, --reward_model=FOLDER, or --gold=toy')
config.ignored(FOR_ENDPOINT if endpoint is None else [], 'there is no --endpoint')
config.ignored(FOR_MODEL if reward_model is None else [], 'there is no --reward_model')
# the pairs, those of equal answers, and the verdicts to take: with an endpoint in both orders
table, left_out = pairs.make_pairs(answers, against)
equal = {i for i, pair in enumerate(table) if len({output.strip() for output in pair['outputs']}) == 1}
wanted = [(i, order) for i in range(len(table)) if i not in equal for order in ((1, 2) if endpoint else (1,))]
log.say(f'data: {len(table)} pairs of answers to {len({pair["question"] for pair in table})} prompts, {len(equal)} of them equal, '
        f'{len(wanted)} verdicts to take; left out: {dict(+left_out) or "nothing"}')  # fmt: skip
record = config | {'content of answers': f'{content_hash(table):016x}'}  # and what else the verdicts depend on
failed, cut = Counter(), Counter()

# ---- a judge behind an endpoint ----

# what may stand around a verdict, and changes nothing of it: Markdown, quotes, brackets; before it, the sign of a list, too
AROUND = r'[\s*_`"\'“”‘’«»()\[\]{}<>|#]*'
BEFORE = rf'{AROUND}(?:[-–—•+]|\d{{1,3}}[.)])?{AROUND}(?:my |the )?(?:final |overall )?'
# letters of ASCII alone: under re.I others, such as a dotless i, are the same as these
VERDICT = re.compile(
    rf'{BEFORE}verdict{AROUND}[:：]{AROUND}(?:answer |response )?(a|b|tie){AROUND}[.!]?{AROUND}', re.I | re.A
)
RULE = re.compile(rf'{AROUND}[-=]*{AROUND}')  # a line that says nothing: the end of a block of code, a rule
SLOT = re.compile(r'\{(instruction|answer_1|answer_2|mark)\}')
CUT = ('length', 'max_tokens', 'content_filter')  # the reasons of servers for a reply that has no end


def read_prompt():
    """The judge prompt, from the current folder or else from beside this file."""
    try:
        text = (
            (Path() if Path(judge_prompt).exists() else Path(__file__).parent).joinpath(judge_prompt).read_text('utf-8')
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'cannot read --judge_prompt={judge_prompt}: {reason}') from None
    # each slot once; what shows where an answer ends is added where the prompt leaves room for it
    slots = sorted(slot for slot in SLOT.findall(text) if slot != 'mark')
    if slots != ['answer_1', 'answer_2', 'instruction'] or 'Verdict:' not in text:
        raise UserError(f'{judge_prompt} must have {{instruction}}, {{answer_1}} and {{answer_2}}, each once, and ask for a last '
                        'line that is Verdict: A, Verdict: B or Verdict: tie')  # fmt: skip
    if '{mark}' not in text:
        log.say(
            f'note: {judge_prompt} has no {{mark}}, so an answer can write the signs that are to show where it ends'
        )
    return text


def read_request():
    """The further fields of a request."""
    try:
        fields = json.loads(request)
        json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()  # what json reads it cannot always write
    except (ValueError, RecursionError):
        fields = None
    # an object, without the fields that are ours
    if not isinstance(fields, dict) or fields.keys() & {'model', 'messages', 'stream', 'n'}:
        raise UserError(f'--request must be a json object without model, messages, stream and n, not {request!r}')
    return fields


def body(i, order):
    """The request for a verdict on pair i; order 1 shows its first answer as A, order 2 its second."""
    # the answer that the order shows first is A
    shown = [output.strip() for output in table[i]['outputs']][:: 1 if order == 1 else -1]
    texts = {'instruction': table[i]['instruction'], 'answer_1': shown[0], 'answer_2': shown[1]}
    texts['mark'] = mark(*texts.values())
    content = SLOT.sub(lambda slot: texts[slot[1]], template)  # in one pass: an answer may have slots in it
    return fields | {'model': judge_model, 'messages': [{'role': 'user', 'content': content}], 'stream': False}


def mark(*texts):
    """A sign of 16 digits that stands in none of the texts: whoever wrote one of them knew neither the others nor the sign.

    The same texts have the same sign, so that a run which goes on asks as before."""
    for attempt in itertools.count():
        sign = f'{content_hash("mark", attempt, *texts):016x}'
        if not any(sign in text for text in texts):
            return sign


def verdict(line):
    """The verdict that is all of a line: 'a', 'b' or 'tie', or None."""
    # a long line is none; an unbreakable space is a space
    found = VERDICT.fullmatch(line.strip().replace('\xa0', ' ')) if len(line) < 200 else None
    return found and found[1].lower()


def preference(text, raw, order):
    """1, 2 or 1.5 (tie), by the last line, which holds nothing but the verdict; None where it is not so, or was cut short.

    Where the line before is another verdict, both are forms to choose from, and the reply is none."""
    # of the lines that say something, the last and the one before it
    lines = [line for line in text.splitlines() if not RULE.fullmatch(line[:200])]
    last, before = (verdict(line) for line in (['', '', *lines])[:-3:-1])
    if not last or (before and before != last) or raw['choices'][0].get('finish_reason') in CUT:
        return None
    if last == 'tie':
        return 1.5
    return 1 if (last == 'a') == (order == 1) else 2


def ask_judge(todo, before):
    """Yield a verdict for each (pair, order), as they arrive; None for one that failed."""
    # requests are made as they are sent, replies come in any order
    jobs = ((key, body(*key)) for key in todo)
    settings = {'concurrency': concurrency, 'timeout': timeout, 'retries': retries, 'proven': bool(before)}
    with contextlib.closing(ask(endpoint, jobs, **settings)) as replies:
        for (i, order), text, raw, error in replies:
            if text is None:
                failed[error] += 1
                yield None
            else:
                yield {'pair': i, 'order': order, 'preference': preference(text, raw, order), 'text': text, 'raw': raw}


if endpoint is not None:
    completions_url(endpoint)  # raises where it is none
    if not judge_model:
        raise UserError('--endpoint needs --judge_model, the name of a model there')
    template, fields = read_prompt(), read_request()
    record['content of judge_prompt'] = f'{content_hash(template):016x}'

# ---- a reward, of a model or of gold ----


def compare_rewards(todo, before):
    """Yield a verdict for each pair: its higher reward. Equal rewards are a tie."""
    known = {}  # with n answers to a prompt, each is in n - 1 pairs
    # 64 pairs at a time, so that what is scored is soon on the disk
    for start in range(0, len(todo), 64):
        some = [i for i, _ in todo[start : start + 64]]
        # each answer once
        keys = {(i, k): (content_hash(table[i]['prompt']), table[i]['outputs'][k]) for i in some for k in (0, 1)}
        new = {key: (table[i]['prompt'], text_of(i, k)) for (i, k), key in keys.items() if key not in known}
        known.update(zip(new, rewards(list(new.values())), strict=True))
        for i in some:
            x, y = (known[keys[i, k]] for k in (0, 1))
            preference = 1.5  # a tie
            if x != y:
                preference = 1 if x > y else 2
            yield {'pair': i, 'order': 1, 'preference': preference, 'rewards': [x, y]}


def text_of(i, k):
    """Answer k of pair i as dpo.py will read it from annotations.json."""
    plain = table[i]['prompt'] == as_question(table[i]['instruction'])
    return answer(table[i]['outputs'][k]) if plain else table[i]['outputs'][k]


# the gold reward of the toy world
if gold is not None:
    from text import toy

    foreign = [
        pair['prompt'] for pair in table if pair['prompt'] not in {f'Review of the {place}:' for place in toy.PLACES}
    ]
    if foreign:
        raise UserError(
            f"--gold=toy knows the toy world's prompts, such as 'Review of the hotel:', not {str(foreign[0])[:80]!r}"
        )

    def rewards(items):
        return [toy.gold(prompt, text) for prompt, text in items]


# a reward model, which reads prompt and answer as dpo.py would
if reward_model is not None:
    import fsdp
    from feedback import score
    from hf import load
    from text.tokenise import encode

    if max_length < max_prompt_length + 2:
        raise UserError(
            f'max_length {max_length} leaves no room for an answer behind max_prompt_length {max_prompt_length}'
        )
    _, world, device = fsdp.setup()
    if world > 1:
        raise UserError('label.py scores in one process: run it with python, not torchrun')
    model, tokenizer = score.load_scorer(reward_model, device, trust_remote_code=trust_remote_code)
    record['content of reward_model'] = load.content(reward_model)

    def rewards(items):
        options = (tokenizer, max_length, max_prompt_length, truncation, cut)
        encoded = [encode(prompt, text, *options) for prompt, text in items]
        return score.scores(model, tokenizer, encoded, max_tokens).tolist()


# ---- the verdicts ----

# the same options and the same answers as before, or another out_dir
log.check_out_dir(
    out_dir, record, True, neutral={'out_dir', 'endpoint', 'concurrency', 'timeout', 'retries', 'max_tokens'}
)
begun = Path(out_dir) / 'config.json'
if begun.exists() and json.loads(begun.read_text())['config']['endpoint'] != endpoint:
    log.say(f'note: this run began at another endpoint; {judge_model} must be the same model here')
# what is there already is not asked again
file, verdicts = pairs.open_verdicts(out_dir)
if verdicts:
    log.say(f'{len(verdicts)} verdicts are in {out_dir} already')
todo = [key for key in wanted if key not in verdicts]
# the requests under way are given up
guard.on_stop(lambda: f'{len(verdicts)} of {len(wanted)} verdicts are in {out_dir}; the same command goes on there')
slow = 0.5 if sys.stderr.isatty() else 20
bar = tqdm(total=len(wanted), initial=len(verdicts), unit=' verdicts', mininterval=slow, dynamic_ncols=True)
try:
    for row in ask_judge(todo, verdicts) if endpoint is not None else compare_rewards(todo, verdicts):
        if row:
            if not begun.exists():  # not before there is something to protect: a wrong name is easily mended
                log.claim_out_dir(out_dir, record)
            # what was paid for goes to the disk one by one; rewards, a thousand a second, 64 at a time
            pairs.append(file, row, sync=endpoint is not None or len(verdicts) % 64 == 63)
            verdicts[row['pair'], row['order']] = row
        bar.update(row is not None)
finally:
    bar.close()
    with contextlib.suppress(OSError):  # a full disk has been said already
        file.close()

# ---- annotations and report ----

orders_asked = (1, 2) if endpoint else (1,)
judged = [[verdicts.get((i, order), {}).get('preference') for order in orders_asked] for i in range(len(table))]
# the mean over both orders; none where one is missing
preferences = [None if None in both else sum(both) / len(both) for both in judged]
preferences = [1.5 if i in equal else preference for i, preference in enumerate(preferences)]
# the same verdicts as AlpacaEval and dpo.py read them
annotator = judge_model or reward_model or f'gold {gold}'
pairs.write_json(Path(out_dir) / 'annotations.json', [pairs.annotation(*row, annotator) for row in zip(table, preferences, strict=True)])  # fmt: skip

# the pairs with a verdict: wins from 0 to 1, and lengths in characters
clear = [i for i, p in enumerate(preferences) if p is not None]
wins, question = 2 - np.array([preferences[i] for i in clear]), [table[i]['question'] for i in clear]
lengths = np.array([[len(output.strip()) for output in table[i]['outputs']] for i in clear]).reshape(-1, 2)
# names for the screen
names = [' + '.join(sorted({pair['generators'][k] for pair in table})) for k in (0, 1)]
names = names if names[0] != names[1] else ['the first answer', 'the second']
# counts first
unclear = [row['text'] for row in verdicts.values() if row['preference'] is None]
report = {'first': names[0], 'second': names[1], 'judge': annotator, 'pairs': len(table), 'with_a_verdict': len(clear),
          'won': int((wins > 0.5).sum()), 'lost': int((wins < 0.5).sum()), 'ties': int((wins == 0.5).sum())}  # fmt: skip
report |= {'ties_equal_answers': len(equal), 'ties_contradicting_orders': sum(set(both) == {1, 2} for both in judged)}
report |= {'unclear_replies': len(unclear), 'failed': failed.total(), 'failures': dict(failed), 'cut': dict(+cut)}
# then rates, with their standard errors over prompts
report['win_rate'], report['win_rate_se'] = winrate.mean(wins, question)
fit = winrate.length_controlled(wins, lengths[:, 0] - lengths[:, 1], question)
report['length_controlled'], report['length_controlled_se'], report['length_effect'] = fit
report['mean_lengths'] = lengths.mean(0).tolist() if clear else None
# whether the order mattered
if endpoint is not None:
    orders = winrate.orders([both for both in judged if None not in both])
    report |= {'shown_first': orders['first_shown'][0], 'shown_first_se': orders['first_shown'][1]}
    report |= {'agreement': orders['agreement'][0], 'agreement_se': orders['agreement'][1]}
pairs.write_json(Path(out_dir) / 'report.json', report)


def percent(name, why='too few verdicts'):
    """A rate of the report with its standard error, for the screen."""
    value, error = report[name], report[name + '_se']
    if value is None:
        return why
    return f'{value:.1%}' if error is None else f'{value:.1%} (standard error {error:.1%})'


# the same on the screen
log.say(f"""
{names[0]} against {names[1]}, judged by {annotator}
  win rate           {percent('win_rate')}; a tie is half a win
  at equal length    {percent('length_controlled', 'no finite fit')}
                     (logistic regression on d, the difference of lengths in characters: sigmoid(a + b tanh(d / rms(d))) at d = 0)
  won, lost, tied    {report['won']}, {report['lost']}, {report['ties']}; of the ties {len(equal)} have equal answers, \
{report['ties_contradicting_orders']} contradicting orders
  mean length        {' and '.join(f'{x:.0f}' for x in report['mean_lengths'] or []) or 'unknown'} characters""")
if endpoint is not None:
    log.say(f"""  shown first, wins  {percent('shown_first')}; 50% without position bias
  orders agree       {percent('agreement')}""")
log.say(f"""  without a verdict  {len(table) - len(clear)} pairs; unclear replies: {len(unclear)}, failed requests: {failed.total()}
{out_dir}/annotations.json, report.json and verdicts.jsonl; answers cut for the judge: {dict(+cut) or 'none'}""")
if unclear:
    log.say(f'note: an unclear reply (cut short, or its last line is no verdict) ends: {unclear[0].strip()[-150:]!r}')
# what is missing ends the run with a sentence, after all that there is was written
if failed:
    reason, times = failed.most_common(1)[0]
    raise UserError(
        f'{failed.total()} verdicts are missing ({times} times: {reason}): run the same command to ask again'
    )
if reward_model is not None and __name__ == '__main__':
    fsdp.leave()
