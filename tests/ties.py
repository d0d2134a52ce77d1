"""Comparisons of what rounding may decide, so that they hold on any CPU: drawn tokens, accuracies, steps of AdamW."""

import math

import pytest
import torch
import transformers
from helpers import SPEEDS, metrics

from hf import generate

ROUNDING = 4e-6  # of scores of about 1: other batches and other kernels were seen to change them by 3e-7


def watch(patch):
    """Watch all sampling of this process from now on, by way of a MonkeyPatch.

    Returns a dict that fills up: seed of an answer -> the smallest change of scores that would have changed it."""
    slack, edge = {}, [torch.tensor(math.inf)]
    top_p, draw = transformers.TopPLogitsWarper.__call__, generate._Draw.__call__

    def watched_top_p(self, ids, scores):
        left = top_p(self, ids, scores.clone())
        edge[:] = [_distance_to_the_edge(scores, left.isfinite(), self.top_p)]
        return left

    def watched_draw(self, ids, scores):
        least = torch.minimum(edge[0], _lead(self, scores))
        edge[:] = [torch.tensor(math.inf)]  # the next draw may be without top_p
        for seed, change in zip(self.seeds, least.tolist(), strict=True):
            slack[seed] = min(slack.get(seed, math.inf), change)
        return draw(self, ids, scores)

    patch.setattr(transformers.TopPLogitsWarper, '__call__', watched_top_p)
    patch.setattr(generate._Draw, '__call__', watched_draw)
    return slack


def _distance_to_the_edge(scores, kept, top_p):
    """How far each row's nucleus is from another one: from another order at its edge, and from one token more or less."""
    last = scores.masked_fill(~kept, math.inf).min(1)
    first_out = scores.masked_fill(kept, -math.inf).max(1)
    p = scores.double().softmax(1)
    held = (p * kept).sum(1)
    spare = held - top_p
    missing = top_p - (held - p.gather(1, last.indices[:, None])[:, 0])
    distances = torch.stack([(last.values - first_out.values) / 2, spare, missing])
    return distances.abs().min(0).values.float()


def _lead(draw, scores):
    """Half of each row's lead, with its noise, of the block that is drawn and of the token in it, whichever is less."""
    rows, vocabulary = scores.shape
    side = math.isqrt(vocabulary - 1) + 1
    grid = torch.nn.functional.pad(scores, (0, side * side - vocabulary), value=-math.inf).view(rows, side, side)
    noise = draw.noise(2 * side)
    blocks = grid.logsumexp(2) + noise[:, :side]
    inside = grid[torch.arange(rows), blocks.argmax(1)] + noise[:, side:]
    best = torch.stack([blocks.topk(2).values, inside.topk(2).values])
    return ((best[..., 0] - best[..., 1]) / 2).min(0).values


def same_metrics(found, expected, *, rel, abs):
    """Rows of metrics are the same to a tolerance, except what rounding decides.

    An accuracy counts margins above 0: it may be off by one of eight pairs, and says nothing where all margins are rounding."""
    assert found.keys() == expected.keys()
    accuracies = {key for key in expected if key.endswith('accuracies')}
    numbers = [{key: x for key, x in row.items() if key not in accuracies} for row in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=rel, abs=abs)
    for key in accuracies:
        split = key.partition('/')[0].partition('_')[2]
        if math.fabs(expected[f'rewards_{split}/margins']) > 1e-5:
            assert found[key] == pytest.approx(expected[key], abs=0.13), key


def same_runs(found, expected, **tolerances):
    """Metrics of two runs are the same to a tolerance, however their batches were cut."""
    rows = [metrics(run, without=(*SPEEDS, 'padding_share')) for run in (found, expected)]
    for row, other in zip(*rows, strict=True):
        assert row.pop('split') == other.pop('split')
        same_metrics(row, other, **tolerances)


def same_gradients(found, expected, limits):
    """Gradients by '<step>.<parameter>', as launch.py keeps them, are the same: those of each step to a share of their norm."""
    assert found.keys() == expected.keys() and {name.partition('.')[0] for name in found} == set(
        map(str, range(len(limits)))
    )
    for step, limit in enumerate(limits):
        names = [name for name in expected if name.startswith(f'{step}.')]
        norm = math.hypot(*(expected[name].norm() for name in names))
        error = math.hypot(*((expected[name] - found[name]).norm() for name in names))
        assert norm > 1e-3 and error <= limit * norm, step


def same_weights(found, expected, limit):
    """Tensors by name are the same, each to a share of its norm, but for one element in 500.

    AdamW makes whole steps of gradients that are nothing but rounding."""
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        gaps = (found[name] - w).abs().flatten().sort().values
        few = math.ceil(len(gaps) / 500) if len(gaps) > 100 else 0
        assert gaps[: len(gaps) - few].norm() <= limit * w.norm(), name
        assert gaps[-1] < 0.05, name
