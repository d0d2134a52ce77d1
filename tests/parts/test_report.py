"""report.py: the data that a page holds, that no text of it becomes html, and, where there is a browser, what it shows."""

import json
import re
import shutil
import subprocess

import pytest
from helpers import read_jsonl, refused, run_script, write_jsonl
from test_plot import run_folder

EVIL = '</script><script>document.title = "evil"</script><!-- <img src=x onerror="document.title = 1"> \u2028 & \ud800'
SHOWN = EVIL.replace('\ud800', '?')
BROWSER = shutil.which('chromium') or shutil.which('google-chrome')


def report(tmp_path, *arguments):
    """(the page, the data in it)."""
    run_script('tools/report.py', *arguments, f'--out={tmp_path}/report.html')
    text = (tmp_path / 'report.html').read_text()
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def label_folder(folder):
    """What label.py leaves: three pairs, of which one is judged in both orders, one in one of them and one not at all; and more."""
    folder.mkdir()
    write_jsonl(folder / 'config.json', [{'config': {'judge_model': 'm', 'answers': 'x'}}])
    pair = {'output_1': 'short', 'output_2': EVIL, 'generator_1': 'ours', 'generator_2': 'theirs', 'annotator': 'm'}
    pairs = [pair | {'instruction': f'question {i}', 'preference': value} for i, value in enumerate((1.5, None, 1.5))]
    (folder / 'annotations.json').write_text(json.dumps(pairs))
    write_jsonl(folder / 'report.json', [{'win_rate': 0.5, 'win_rate_interval': [0.2, 0.8], 'first': 'ours', 'second': 'theirs', 'judge': 'm',
                 'pairs': 3, 'won': 0, 'lost': 0, 'ties': 2, 'unclear_replies': 0, 'failed': 0}])  # fmt: skip
    said = [(0, 2, 2), (0, 1, 1), (1, 1, None)]
    rows = [{'pair': i, 'order': order, 'preference': value, 'text': EVIL} for i, order, value in said]
    write_jsonl(folder / 'verdicts.jsonl', rows)
    return folder


def test_data_of_runs(tmp_path):
    """Curves thinned from the end, the last evaluation's numbers, and rewards of three kinds, or none."""
    a, b = run_folder(tmp_path / 'a', n=50), run_folder(tmp_path / 'b', n=50, loss='ipo', beta=0.5)
    known = {'examples': 400, 'generator': 'policy', 'prompt': 'Why?', 'response': EVIL}
    columns = {'tokens': 7, 'logratio': 0.4}, {'score': 2.0}, {}
    more = [known | found | {'sample': i} for i, found in enumerate(columns)]
    write_jsonl(b / 'samples.jsonl', read_jsonl(b / 'samples.jsonl') + more)
    text, data = report(tmp_path, a, b, '--max_points=20')
    assert data['names'] == ['a: loss=dpo, beta=0.1', 'b: loss=ipo, beta=0.5'] and not data['verdicts']
    assert data['options'][0] == {'name': 'loss', 'values': ['"dpo"', '"ipo"']}
    loss = data['charts'][0]
    assert loss['title'] == 'loss' and [c['split'] for c in loss['curves']] == ['train', 'train', 'eval', 'eval']
    steps = [seen for seen, _ in loss['curves'][0]['points']]
    assert len(steps) == 17 and steps[-1] == 400 and steps[-2] == 400 - 3 * 8
    assert [c['extra'] for c in loss['curves']] == [1, 0] * 2
    assert data['numbers'][0]['examples'] == 400 and data['numbers'][0]['kl'] == pytest.approx(15)
    # prompts: two places at two evaluations in each run, the latest first
    cards = data['samples']
    assert [card['examples'] for card in cards] == [400, 400, 0, 0, *[400] * 5, 0, 0]
    assert [a['who'] for a in cards[0]['answers']] == ['policy', 'reference']
    assert cards[0]['answers'][0] | {'reward_source': 'gold', 'reward': 0.5} == cards[0]['answers'][0]
    implicit, scored, unknown = (card['answers'][0] for card in cards[6:9])
    assert implicit['reward'] == pytest.approx(0.2) and implicit['reward_source'] == 'beta * log-ratio'
    assert implicit['tokens'] == 7
    assert scored['reward'] == 2 and 'reward' not in unknown and unknown['letters'] == len(EVIL)
    # no text ends the script, and nothing is loaded
    assert text.count('</script>') == 2 and implicit['text'] == SHOWN
    page = text.replace('http://www.w3.org/2000/svg', '').split('id="data"')[0]
    assert not re.search(r'https?:| (src|href)=|url\(|@import', page)


def test_what_is_left_out_is_counted(tmp_path, capsys):
    run = run_folder(tmp_path / '15:30')
    long = {'examples': 48, 'generator': 'policy', 'prompt': 'p' * 60, 'response': 'x'}
    write_jsonl(run / 'samples.jsonl', [long | {'sample': i} for i in range(7)])
    limits = ['--max_samples=3', '--max_letters=10', '--max_pairs=2']
    _, data = report(tmp_path, run, label_folder(tmp_path / 'label'), *limits)
    assert capsys.readouterr().out == f'{tmp_path}/report.html: 1 run, 1 folder of verdicts\n'
    assert data['folders'] == ['15:30']
    assert len(data['samples']) == 3 and data['samples_left_out'] == 4
    assert data['samples'][0]['prompt'] == 'p' * 10 + ' … (50 more characters)'
    (found,) = data['verdicts']
    assert found['report']['win_rate_interval'] == [0.2, 0.8] and found['left_out'] == 1
    first, second = found['pairs']
    orders = [(o['order'], o['preference'], o['text'][:10]) for o in first['orders']]
    assert orders == [(k, k, SHOWN[:10]) for k in (1, 2)]
    assert len(second['orders']) == 1 and first['answers'][1]['letters'] == len(EVIL)


def test_mistakes(tmp_path):
    folder, run = label_folder(tmp_path / 'label'), run_folder(tmp_path / 'a')
    row = {'examples': 8, 'generator': 'policy', 'prompt': 'p', 'response': 'r', 'score': float('nan')}
    write_jsonl(run / 'samples.jsonl', [row])
    for arguments, message in (
        ([], 'name the folders to show'),
        ([tmp_path / 'none'], 'there is no folder'),
        ([run], 'infinite or none'),
        ([folder, f'--out={tmp_path}/no/where.html'], 'cannot write'),
        ([folder, f'--out={folder}/report.json'], 'the page is an .html file'),
        ([folder, '--max_samples=-1'], 'max_samples must be at least 0'),
    ):
        assert message in refused('tools/report.py', *arguments)
    pair, judged = json.loads((folder / 'annotations.json').read_text())[0], read_jsonl(folder / 'report.json')[0]
    sample = row | {'score': 1}
    # our own files, changed by hand
    for file, content, message in (
        ('report.json', '{', 'report.json is damaged: the same command of label.py writes it in its end'),
        ('report.json', '[]', 'report.json is damaged: '),
        ('report.json', json.dumps(judged | {'won': '3'}), "report.json is damaged ('won' is '3'): "),
        ('report.json', json.dumps(judged | {'agreement_interval': 0.5}), "report.json is damaged ('agreement_interval' is 0.5): "),
        ('annotations.json', '{"a": 3}', 'annotations.json is damaged: '),
        ('annotations.json', json.dumps([pair | {'output_2': None}]), "annotations.json is damaged ('output_2' is None): "),
        ('annotations.json', json.dumps([pair]), 'verdicts.jsonl, line 3, judges pair 1 in order 1, which is not to be judged: '),
        ('samples.jsonl', json.dumps(sample | {'sample': [1]}) + '\n', "samples.jsonl, line 1, is damaged ('sample' is [1]): "),
        ('samples.jsonl', json.dumps(sample | {'logratio': '1'}) + '\n', "samples.jsonl, line 1, is damaged ('logratio' is '1'): "),
    ):  # fmt: skip
        changed = (run if file == 'samples.jsonl' else folder) / file
        before = changed.read_text()
        changed.write_text(content)
        assert message in refused('tools/report.py', changed.parent), message
        changed.write_text(before)
    (folder / 'report.json').unlink()
    assert 'report.json: No such file or directory: the same command of label.py writes it in its end' in refused(
        'tools/report.py', folder
    )


@pytest.mark.skipif(BROWSER is None, reason='needs chromium')
def test_in_a_browser(tmp_path):
    """The page draws itself, and shows evil text as it is."""
    runs = run_folder(tmp_path / 'a'), run_folder(tmp_path / 'b', beta=0.5)
    report(tmp_path, *runs, label_folder(tmp_path / 'label'))
    flags = '--headless --no-sandbox --disable-gpu --dump-dom'.split()
    command = [BROWSER, *flags, f'file://{tmp_path}/report.html']
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert '<title>a · b · label</title>' in shown and '20.0% to 80.0%' in shown
    assert shown.count('<figure>') == 7 and shown.count('<article') == 7 and '<small>orders contradict' in shown
    assert '&lt;/script&gt;&lt;script&gt;document.title' in shown
