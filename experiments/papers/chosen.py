"""The chosen answers of a dataset's held-out pairs as a file of answers, so that label.py can judge a model against them.

python -m experiments.papers.chosen --data=hh --out=out/chosen.jsonl
python label.py --answers=out/sample/samples.jsonl --against=out/chosen.jsonl --endpoint=http://127.0.0.1:8000 --judge_model=NAME
"""

from configurator import UserError, configure
from experiments import write_rows
from text import sources

data = 'hh'  # what dpo.py reads
split = 'test'  # train or test
out = 'out/chosen.jsonl'  # the file: prompt and response, a line an answer

config = configure(globals())
sources.keep_data(data, out)
rows = {}
for source in sources.joined(data):
    for row in sources.load_rows(source, split)[0]:
        if 'chosen' not in row:
            raise UserError(f'{source} has no pairs, so no chosen answers')
        answer = {'prompt': row['prompt'], 'response': row['chosen'], 'generator': 'chosen', 'sample': 0}
        rows.setdefault(sources.content_hash(row['prompt']), answer)
write_rows(out, rows.values())
print(f'{len(rows)} answers: {out}')
