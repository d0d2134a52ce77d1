"""Build the requests that ask a judge which of two answers is better, and parse its replies. Used by label.py."""

import os
import re
from pathlib import Path

from configurator import UserError
from runtime.files import check_file, reading, say
from runtime.values import looked_in
from text.files import content_hash

# Matches a line such as `Verdict: A` or `- **My final verdict: Answer B.**`: Markdown, quotes and brackets are allowed anywhere
AROUND = r'[\s*_`"\'“”‘’«»()\[\]{}<>|#]*'
BEFORE = rf'{AROUND}(?:[-–—•+]|\d{{1,3}}[.)])?{AROUND}(?:my |the )?(?:final |overall )?'
SAYS = rf'verdict{AROUND}[:：]{AROUND}(?:answer |response )?(a|b|tie)'
# re.A: otherwise re.I also matches non-ASCII letters, such as a dotless i
VERDICT = re.compile(rf'{BEFORE}{SAYS}{AROUND}[.!]?{AROUND}', re.I | re.A)
# a line without content, such as the end of a code block or a horizontal rule
EMPTY = re.compile(rf'{AROUND}[-=]*{AROUND}')
SLOT = re.compile(r'\{(instruction|answer_1|answer_2|mark)\}')  # placeholders of a judge prompt


def read_prompt(name):
    """Return the text of a judge prompt file. Raises UserError if it cannot be read, or lacks what it must have."""
    # a file of the working directory, else of the repository
    folder = Path() if os.path.exists(name) else Path(__file__).parents[1]
    check_file(folder / name)
    with reading(f'--judge_prompt={name}{looked_in(folder / name)}', 'name a text in UTF-8'):
        # utf-8-sig: without the mark that Windows editors write before the first character
        text = (folder / name).read_text('utf-8-sig')
    slots = SLOT.findall(text)
    found = sorted(slot for slot in slots if slot != 'mark')
    if found != ['answer_1', 'answer_2', 'instruction'] or 'Verdict:' not in text:
        has = f'{name} must have {{instruction}}, {{answer_1}} and {{answer_2}}, each once'
        raise UserError(f'{has}, and ask for a last line that is Verdict: A, Verdict: B or Verdict: tie')
    # a mark that no answer can know shows where answers begin and end
    if 'mark' not in slots:
        say(f'note: {name} has no {{mark}}, so an answer can write the signs that are to show where it ends')
    return text


def question(template, pair, order):
    """Return the request field that asks for a verdict on a pair (a dict of answers.make_pairs): {'messages': [one user message]}.

    template: a judge prompt with placeholders. order: 1 shows the first answer as A and the second as B, 2 swaps them."""
    answers = [output.strip() for output in pair['outputs']]
    if order == 2:
        answers.reverse()
    texts = {'instruction': pair['instruction'], 'answer_1': answers[0], 'answer_2': answers[1]}
    # The mark delimits the answers. As a hash of all texts it cannot be forged by an answer, and is the same after a resume.
    texts['mark'] = f'{content_hash("mark", 0, *texts.values()):016x}'
    # fill all placeholders in one pass, since an answer may itself contain `{answer_2}`
    content = SLOT.sub(lambda slot: texts[slot[1]], template)
    return {'messages': [{'role': 'user', 'content': content}]}


def preference(text, raw, order):
    """Return which answer a judge's reply prefers: 1 or 2, 1.5 for a tie, or None if the reply is unclear.

    text: the reply's text. raw: the whole reply, parsed. order: 1 if the first answer was shown as A, 2 if it was shown as B."""
    # unclear, since its end may be missing
    if raw['choices'][0].get('finish_reason') in ('length', 'max_tokens', 'content_filter'):
        return None
    # the regexes are slow on long lines: match only the start of a line, and no verdict that is longer
    lines = [line for line in text.splitlines() if not EMPTY.fullmatch(line[:200])]
    verdicts = []  # of the last two lines: 'a', 'b', 'tie', or None for a line that is not a verdict
    for line in lines[-2:]:
        # judges sometimes write non-breaking spaces
        match = VERDICT.fullmatch(line.strip().replace('\xa0', ' ')) if len(line) < 200 else None
        verdicts.append(match[1].lower() if match else None)
    verdict = verdicts[-1] if verdicts else None
    # two different verdicts in a row: the judge only repeats the options
    if verdict is None or verdicts[0] not in (None, verdict):
        return None
    # A is answer 1 in order 1, and answer 2 in order 2
    return {'a': order, 'b': 3 - order, 'tie': 1.5}[verdict]
