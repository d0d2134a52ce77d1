"""Reward functions to use as they are, or to copy: ppo.py --reward='experiments/rewards.py:gsm8k + experiments/rewards.py:think*0.2'.

A function gets lists of equal length, prompts, responses and rows (all columns of each prompt's row), and gives as many numbers."""

import re

# behind #### or in \boxed{}: digits with commas, a sign, a decimal point
NUMBER = re.compile(r'(?:####|\\boxed\s*\{)\s*\$?(-?[\d,]*\.?\d+)')


def gsm8k(prompts, responses, rows):
    """Return 1 for each answer whose last number behind #### or in \\boxed{} is that of the row's column 'answer', else 0."""
    pairs = zip(responses, rows, strict=True)
    return [float(_last_number(response) == _right(row['answer'])) for response, row in pairs]


def _last_number(text):
    """Return the last number that a text marks as its answer, or None if it marks none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(',', '')) if found else None


def _right(answer):
    """Return the number of a column: as gsm8k writes it, or alone. Raises ValueError if it is no number."""
    marked = _last_number(str(answer))
    return float(str(answer).replace(',', '')) if marked is None else marked


def has_format(pattern):
    """Return a reward function: 1 for an answer that is of this form from its first to its last character, else 0."""
    form = re.compile(pattern, re.DOTALL)

    def matches(prompts, responses, rows):
        return [float(bool(form.fullmatch(response.strip()))) for response in responses]

    return matches


# thoughts, then an answer
think = has_format(r'<think>.+</think>.+')


def length(prompts, responses, rows):
    """Return the words of each answer, in hundreds: --reward='... + experiments/rewards.py:length*-0.1' makes answers short."""
    return [len(response.split()) / 100 for response in responses]
