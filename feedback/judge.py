"""How a judge behind an endpoint is asked which of two answers is better, and what its reply means."""

import json
import os
import re
from pathlib import Path

from configurator import UserError
from feedback.answers import read_text
from runtime.files import say
from text.files import content_hash

# Markdown, quotes and brackets around a verdict change nothing of it; before it there may be the sign of a list, too
AROUND = r'[\s*_`"\'“”‘’«»()\[\]{}<>|#]*'
BEFORE = rf'{AROUND}(?:[-–—•+]|\d{{1,3}}[.)])?{AROUND}(?:my |the )?(?:final |overall )?'
SAYS = rf'verdict{AROUND}[:：]{AROUND}(?:answer |response )?(a|b|tie)'
# letters of ASCII alone: under re.I others, such as a dotless i, are the same as these
VERDICT = re.compile(rf'{BEFORE}{SAYS}{AROUND}[.!]?{AROUND}', re.I | re.A)
NOTHING = re.compile(rf'{AROUND}[-=]*{AROUND}')  # a line that says nothing: the end of a block of code, a rule
SLOT = re.compile(r'\{(instruction|answer_1|answer_2|mark)\}')
CUT = ('length', 'max_tokens', 'content_filter')  # the reasons of servers for a reply that has no end


def read_prompt(name):
    """The text of a judge prompt, from the current folder or else from beside the scripts. Raises UserError."""
    folder = Path() if os.path.exists(name) else Path(__file__).parents[1]
    text = read_text(folder / name, f'--judge_prompt={name}')
    slots = sorted(slot for slot in SLOT.findall(text) if slot != 'mark')
    if slots != ['answer_1', 'answer_2', 'instruction'] or 'Verdict:' not in text:
        has = f'{name} must have {{instruction}}, {{answer_1}} and {{answer_2}}, each once'
        raise UserError(f'{has}, and ask for a last line that is Verdict: A, Verdict: B or Verdict: tie')
    if '{mark}' not in text:
        say(f'note: {name} has no {{mark}}, so an answer can write the signs that are to show where it ends')
    return text


def read_request(text):
    """The further fields of a request, which an option gives as json. Raises UserError."""
    try:
        fields = json.loads(text)
        json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()  # what json reads it cannot always write
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or fields.keys() & {'model', 'messages', 'stream', 'n'}:
        raise UserError(f'--request must be a json object without model, messages, stream and n, not {text!r}')
    return fields


def question(template, pair, order):
    """The messages of a request for a verdict on a pair; order 1 shows its first answer as A, order 2 its second."""
    shown = [output.strip() for output in pair['outputs']]
    if order == 2:
        shown.reverse()
    texts = {'instruction': pair['instruction'], 'answer_1': shown[0], 'answer_2': shown[1]}
    # a sign that nobody knew who wrote one of the texts, and the same one where a run goes on
    texts['mark'] = f'{content_hash("mark", 0, *texts.values()):016x}'
    # all slots in one pass: an answer may have slots in it
    content = SLOT.sub(lambda slot: texts[slot[1]], template)
    return {'messages': [{'role': 'user', 'content': content}]}


def verdict(line):
    """The verdict that is all of a line: 'a', 'b' or 'tie'; None where there is none, as in a long line."""
    # an unbreakable space is a space
    found = VERDICT.fullmatch(line.strip().replace('\xa0', ' ')) if len(line) < 200 else None
    return found[1].lower() if found else None


def preference(text, raw, order):
    """1, 2 or 1.5 (tie): which answer of a pair a reply prefers, by its last line; None for an unclear reply.

    A reply is unclear if its last line is more than a verdict, if it was cut short, or if the line before is another verdict:
    then both are forms to choose from. text: of the reply; raw: all of it; order: in which the answers were shown."""
    if raw['choices'][0].get('finish_reason') in CUT:
        return None
    # of the last line that says something, and of the one before it
    lines = [line for line in text.splitlines() if not NOTHING.fullmatch(line[:200])]
    *_, before, last = None, None, *map(verdict, lines)
    if not last or before not in (None, last):
        return None
    if last == 'tie':
        return 1.5
    # A is the first answer of the pair in order 1
    return 1 if (last == 'a') == (order == 1) else 2
