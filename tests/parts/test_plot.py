"""plot.py: one picture from run folders, named by what differs, and a sentence for a folder that is none."""

import contextlib
import io
import sys
from unittest.mock import MagicMock

import pytest
from helpers import python, read_jsonl, refused, run_script, write_jsonl

from text import toy
from tools.runs import bounds

pytest.importorskip('matplotlib', reason='matplotlib is not installed')

LOGPS = ['log-probs of chosen answers', 'log-probs of rejected answers']


def run_folder(folder, n=6, sampled=True, **options):
    """What dpo.py leaves: n steps of 8 examples, an evaluation before and after, samples of two prompts."""
    folder.mkdir(parents=True)
    config = {'loss': 'dpo', 'beta': 0.1, 'label_smoothing': None}
    config |= {'out_dir': str(folder), 'max_tokens': len(folder.name)}  # neutral options
    write_jsonl(folder / 'config.json', [{'config': config | options}])
    rows, samples = [], []
    for i in range(n + 1):
        for split in ['eval'] * (i in (0, n)) + ['train'] * (i > 0):
            rows.append({'split': split, 'counters/examples': 8 * i, f'loss/{split}': 0.7 - 0.01 * i, f'kl_{split}/chosen': 0.1 * i,
                         f'rewards_{split}/accuracies': 0.5 + 0.05 * i, f'rewards_{split}/margins': 0.2 * i,
                         f'rewards_{split}/chosen': 0.1 * i, f'rewards_{split}/rejected': -0.1 * i,
                         f'logps_{split}/chosen': -20.0 - i, f'logps_{split}/rejected': -20.0 - 2 * i})  # fmt: skip
            if split == 'train' or not sampled:
                continue
            rows[-1]['kl_eval/samples'] = 0.3 * i
            for name in ('policy', 'reference'):
                for place, word in (('hotel', 'nice'), ('cafe', 'superb' if name == 'policy' and i else 'dull')):
                    samples.append({'examples': 8 * i, 'generator': name, 'prompt': f'Review of the {place}:',
                                    'response': f' the {toy.PLACES[place][0]} was {word} .'})  # fmt: skip
    write_jsonl(folder / 'metrics.jsonl', rows)
    write_jsonl(folder / 'samples.jsonl', samples)
    return folder


def plot(*arguments):
    """(what plot.py printed, the axes and the legend's texts of the picture)."""
    import matplotlib.figure

    said, figures = io.StringIO(), []
    save = matplotlib.figure.Figure.savefig
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(matplotlib.figure.Figure, 'savefig', lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
        run_script('tools/plot.py', *arguments)
    titles = {axis.get_title(loc='left'): axis for axis in figures[0].axes}
    return said.getvalue(), titles, [text.get_text() for text in figures[0].legends[0].get_texts()]


def points(line):
    return list(zip(*line.get_data(), strict=True))


def evaluations(axis):
    return [points(line) for line in axis.lines if line.get_marker() == 'o' and len(line.get_xdata())]


def test_picture(tmp_path):
    a, b = run_folder(tmp_path / 'a'), run_folder(tmp_path / r'b$\frac$', beta=0.5, label_smoothing=0.1)
    out = tmp_path / 'x.png'
    said, axes, names = plot(a, b, f'--out={out}', '--smooth=0.5')
    assert out.read_bytes()[:4] == b'\x89PNG' and said == f'{out}: 2 runs, 8 panels\n'
    # what is said is the name of the file, with the ending that it was given
    assert plot(a, f'--out={tmp_path}/y')[0] == f'{tmp_path}/y.png: 1 run, 8 panels\n' and (tmp_path / 'y.png').exists()
    # no out_dir, max_tokens, or what is None; no mathematics
    assert names == ['a: beta=0.1', r'b\$\frac\$: beta=0.5, label_smoothing=0.1']
    assert list(axes) == ['loss', 'reward accuracy', 'reward margin', 'rewards', *LOGPS, 'KL', 'gold reward against KL']
    assert evaluations(axes['reward accuracy']) == [[(0, 0.5), (48, pytest.approx(0.8))]] * 2
    rejected = evaluations(axes['rewards'])[2]  # after the chosen ones of both runs
    assert rejected == [(0, 0), (48, pytest.approx(-0.6))]
    assert [evaluations(axes[name])[0] for name in LOGPS] == [[(0, -20), (48, -26)], [(0, -20), (48, -32)]]
    assert [len(axes[name].lines) for name in LOGPS] == [2, 2]  # evaluations alone
    assert evaluations(axes['KL'])[0] == [(0, 0), (48, pytest.approx(1.8))]
    steps, means = axes['reward margin'].lines[0].get_data()
    assert list(steps) == [8, 16, 24, 32, 40, 48]
    assert list(means) == pytest.approx([0.2, 0.3, 0.4, 0.6, 0.8, 1.0])  # means of three, of fewer at the start
    gold = points(axes['gold reward against KL'].lines[0])
    assert gold == [(0, 0), (pytest.approx(1.8), 0.75)]  # nice 0.5 and dull -0.5, then superb 1
    # equal curves are both seen: each run is wider, and its points are larger, than those drawn over it
    train_a, train_b, eval_a, eval_b = axes['loss'].lines
    assert points(train_a) == points(train_b) and points(eval_a) == points(eval_b)
    assert train_a.get_linewidth() > train_b.get_linewidth() == 1
    assert eval_a.get_markersize() > eval_b.get_markersize() == 5


def test_one_value_does_not_flatten_the_rest(tmp_path):
    """Nor what is no number, or too large to be drawn."""
    folder = run_folder(tmp_path / 'a', n=20)
    rows = read_jsonl(folder / 'metrics.jsonl')
    rows[9]['loss/train'], rows[12]['loss/train'] = -1e9, float('nan')
    rows[13]['loss/train'], rows[14]['loss/train'] = 'low', 10**400
    write_jsonl(folder / 'metrics.jsonl', rows)
    _, axes, _ = plot(folder, f'--out={tmp_path}/x.png', '--smooth=0')
    low, high = axes['loss'].get_ylim()
    assert 0.4 < low < high < 0.8
    texts = [text.get_text() for text in axes['loss'].texts]
    # in lines that end before the next panel begins
    assert any('outside: 1, such as -1e+09; no numbers: 3' in text.replace('\n', ' ') for text in texts), texts
    assert max(len(line) for text in texts for line in text.split('\n')) <= 65
    assert len(axes['loss'].lines[0].get_xdata()) == 16
    # few values, and a curve that falls steeply, are drawn whole
    for whole in ([1, 1, 1, 50], [10 * 0.8**i for i in range(30)], [0.5] * 9 + [0.9]):
        low, high = bounds([whole])
        assert low <= min(whole) and max(whole) <= high
    # so is what fits the axis of the panel all the same: beside a value far off, and beside another curve
    flat = [0.5, 0.6] * 30
    assert 1.3 < bounds([[*flat, 0.88, 1.3, 1e9]])[1] < 2
    assert bounds([[*flat, 5.0]])[1] < 5 and bounds([[*flat, 5.0], [0.0, 8.0]])[1] > 5


def test_what_a_run_has_is_drawn(tmp_path):
    # names begin with what matters; there are no samples
    a = run_folder(tmp_path / 'x/run', sampled=False, model='m', top_p=0.9, lr=1.0)
    b = run_folder(tmp_path / 'y/run', sampled=False, model='n', top_p=1.0, lr=2.0, loss='ipo')
    _, axes, names = plot(a, b, f'--out={tmp_path}/x.png')
    assert names[1] == f'{tmp_path}/y/run: loss=ipo, lr=2.0, model=n, top_p=1.0'
    assert list(axes)[6:] == ['KL, as if chosen answers came from the reference']
    # a folder whose name is not UTF-8
    assert plot(run_folder(tmp_path / 'gr\udcf6n'), f'--out={tmp_path}/x.png')[2] == ['gr?n']
    # of sft.py
    rows = read_jsonl(a / 'metrics.jsonl')
    of_sft = [{k: v for k, v in row.items() if not k.startswith(('rewards', 'kl'))} for row in rows]
    write_jsonl(a / 'metrics.jsonl', of_sft)
    assert list(plot(a, f'--out={tmp_path}/x.png')[1]) == ['loss', *LOGPS]
    # of ppo.py, which is being written, or was killed
    folder = run_folder(tmp_path / 'a')
    (folder / 'samples.jsonl').unlink()
    rows = read_jsonl(folder / 'metrics.jsonl')
    write_jsonl(folder / 'metrics.jsonl', [row | {'gold/eval': 0.1 * i} for i, row in enumerate(rows)])
    with open(folder / 'metrics.jsonl', 'a') as file:
        file.write('{"split": "tr')
    said, axes, _ = plot(folder, f'--out={tmp_path}/x.png')
    gold = points(axes['gold reward against KL'].lines[0])
    assert gold == [(0, 0), (pytest.approx(1.8), pytest.approx(0.6))]
    assert (
        f'note: the last line of {folder}/metrics.jsonl was not written to its end: it is left out\n{tmp_path}/x.png: 1 run, 8 panels'
        in said
    )


DEEP = '[' * 100_000


@pytest.mark.parametrize(('file', 'text', 'message'), [
    ('config.json', None, "a holds no run: wanted is the out_dir of one"),
    ('config.json', '{"model_type": "llama"}', 'of something else than a run'),
    *(('config.json', text, 'config.json is damaged') for text in ('{"config": ', '[]', '{"config": []', '{"config": 3}', DEEP)),
    ('metrics.jsonl', None, 'has no steps in its metrics.jsonl yet: wanted is the out_dir of'),
    ('metrics.jsonl', '', 'has no steps in its metrics.jsonl yet'),
    ('metrics.jsonl', '{"split": "check", "counters/examples": 0}\n{broken\n{}\n', 'metrics.jsonl, line 2, is damaged'),
    *(('metrics.jsonl', text + '\n', 'metrics.jsonl, line 1, is damaged') for text in ('{"split": "train"}', '[]\n[]', DEEP)),
    ('metrics.jsonl', '{"split": "train", "counters/examples": 8, "x": 1}\n', 'no metric that is drawn'),
    ('samples.jsonl', '{"prompt": 3}\n', 'samples.jsonl, line 1, is damaged'),
])  # fmt: skip
def test_damaged_folders(tmp_path, file, text, message):
    damaged = run_folder(tmp_path / 'a', sampled=False) / file
    damaged.unlink()
    if text is not None:
        damaged.write_text(text)
    assert message in refused('tools/plot.py', tmp_path / 'a', f'--out={tmp_path}/x.png')


def test_mistakes(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / 'a')
    for words, message in (
        ([], 'name the folders to draw'),
        ([tmp_path / 'nowhere'], 'there is no folder'),
        ([folder, f'--out={tmp_path}/no/where.png'], 'cannot write'),
        ([folder, f'--out={tmp_path}/x.odd'], 'cannot write'),
        ([folder, '--smooth=3'], 'smooth must be at least 0 and at most 1'),
    ):
        assert message in refused('tools/plot.py', *words)
    # `| head` closes the pipe, and the picture is drawn
    with monkeypatch.context() as patch:
        patch.setattr('sys.stdout', MagicMock(write=MagicMock(side_effect=BrokenPipeError)))
        run_script('tools/plot.py', folder, f'--out={tmp_path}/piped.png')
    assert (tmp_path / 'piped.png').exists()
    # a full disk leaves the old picture
    (tmp_path / 'x.png').write_text('old')
    with monkeypatch.context() as patch:
        patch.setattr('os.fsync', MagicMock(side_effect=OSError(28, 'No space left on device')))
        assert 'x.png: No space left on device' in refused('tools/plot.py', folder, f'--out={tmp_path}/x.png')
    assert (tmp_path / 'x.png').read_text() == 'old' and not list(tmp_path.glob('*.tmp'))
    found = python('-m', 'tools.plot', folder, f'--out={tmp_path}/x.png', MPLBACKEND='garbage')
    assert found.returncode == 0, found.stderr
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert 'pip install matplotlib' in refused('tools/plot.py', folder)
