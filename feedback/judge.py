"""How label.py asks a judge behind an endpoint which of two answers is better, and what the reply means.

read_prompt and read_request read two options, question makes a request, preference reads the reply."""

import json
import os
import re
from pathlib import Path

from configurator import UserError
from feedback.answers import read_text
from runtime.files import say
from text.files import content_hash

# The parts of a line that is a verdict: `Verdict: A`, perhaps with Markdown, quotes or brackets around any part of it. In front
# there may be the sign of a list, and words as in `My final verdict`.
AROUND = r'[\s*_`"\'“”‘’«»()\[\]{}<>|#]*'
BEFORE = rf'{AROUND}(?:[-–—•+]|\d{{1,3}}[.)])?{AROUND}(?:my |the )?(?:final |overall )?'
SAYS = rf'verdict{AROUND}[:：]{AROUND}(?:answer |response )?(a|b|tie)'
# re.A: without it, re.I takes letters outside of ASCII, such as a dotless i, for letters of these words
VERDICT = re.compile(rf'{BEFORE}{SAYS}{AROUND}[.!]?{AROUND}', re.I | re.A)
# a line that says nothing, such as the end of a block of code, or a horizontal rule
NOTHING = re.compile(rf'{AROUND}[-=]*{AROUND}')
# the places of a judge prompt that are filled in
SLOT = re.compile(r'\{(instruction|answer_1|answer_2|mark)\}')
# a server gives one of these as finish_reason if a reply was cut short
CUT_SHORT = ('length', 'max_tokens', 'content_filter')


def read_prompt(name):
    """Return the text of a judge prompt, from the file `name` in the current folder, or else in that of the scripts.

    Prints a note if the text has no {mark}. Raises UserError if the file cannot be read, or if the text lacks another slot,
    has one twice, or does not ask for a last line that is a verdict."""
    is_here = os.path.exists(name)
    folder = Path() if is_here else Path(__file__).parents[1]
    text = read_text(folder / name, f'--judge_prompt={name}')
    slots = SLOT.findall(text)
    required = sorted(slot for slot in slots if slot != 'mark')
    if required != ['answer_1', 'answer_2', 'instruction'] or 'Verdict:' not in text:
        has = f'{name} must have {{instruction}}, {{answer_1}} and {{answer_2}}, each once'
        raise UserError(f'{has}, and ask for a last line that is Verdict: A, Verdict: B or Verdict: tie')
    if 'mark' not in slots:
        say(f'note: {name} has no {{mark}}, so an answer can write the signs that are to show where it ends')
    return text


def read_request(text):
    """Return the dict that the option --request holds as json: more fields for every request, such as the temperature.

    Raises UserError if the text is no json object, or if it has a field that label.py sets itself."""
    try:
        fields = json.loads(text)
        # json.loads also reads NaN and half a surrogate pair, which no request can carry: then this line raises ValueError
        json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or fields.keys() & {'model', 'messages', 'stream', 'n'}:
        raise UserError(f'--request must be a json object without model, messages, stream and n, not {text!r}')
    return fields


def question(template, pair, order):
    """Return the fields of a request that ask for a verdict on a pair: {'messages': [a message of the user]}.

    template: the text of read_prompt. pair: as make_pairs of answers.py returns it. Order 1 shows the pair's first answer as A
    and its second as B; order 2 shows them the other way round."""
    answers = [output.strip() for output in pair['outputs']]
    if order == 2:
        answers.reverse()
    texts = {'instruction': pair['instruction'], 'answer_1': answers[0], 'answer_2': answers[1]}
    # The mark shows where an answer ends. It is a hash of all texts, so that nobody who wrote one of them could know it, and
    # so that the same question has the same mark when a run goes on.
    texts['mark'] = f'{content_hash("mark", 0, *texts.values()):016x}'
    # all slots in one pass, since an answer may itself contain `{answer_2}`
    content = SLOT.sub(lambda slot: texts[slot[1]], template)
    return {'messages': [{'role': 'user', 'content': content}]}


def verdict(line):
    """Return 'a', 'b' or 'tie' if a line is nothing but a verdict, and None for every other line."""
    # no verdict is as long, and on long lines the pattern is slow
    if len(line) >= 200:
        return None
    # a judge may write an unbreakable space for a space
    found = VERDICT.fullmatch(line.strip().replace('\xa0', ' '))
    return found[1].lower() if found else None


def preference(text, raw, order):
    """Return which answer of a pair a judge's reply prefers: 1 or 2, 1.5 for a tie, or None if the reply is unclear.

    text: the reply's text. raw: the whole reply, as parsed json. order: the order of question in which answers were shown.
    A reply is unclear if its last line is not a verdict alone, if it was cut short, or if the line before is another
    verdict: then both are only the forms to choose from."""
    if raw['choices'][0].get('finish_reason') in CUT_SHORT:
        return None
    # only the beginning of a line is looked at, since the pattern is slow on long ones
    lines = [line for line in text.splitlines() if not NOTHING.fullmatch(line[:200])]
    last_two = [verdict(line) for line in lines[-2:]]
    last = last_two[-1] if last_two else None
    # the line before must be no verdict, or the same one
    if last is None or last_two[0] not in (None, last):
        return None
    if last == 'tie':
        return 1.5
    # A is the pair's first answer in order 1, and its second in order 2
    letter_of_first = 'a' if order == 1 else 'b'
    return 1 if last == letter_of_first else 2
