"""Surroundings of every test: one thread, a cache of the session's own, no process group left from another file."""

import os
from functools import cache

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')
# what is compared bit for bit is compared on the CPU: python -m experiments.gpu_check is the test of a GPU, and
# CUDA_VISIBLE_DEVICES=0 lets the few tests run that are skipped without one
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')

import torch
from helpers import end_process_group

SLOW = ['signals', 'lora', 'ppo', 'resume', 'law', 'parallel', 'attack', 'checkpoint', 'model']


@cache
def launches(path):
    """Whether a test file starts torchrun: those of laws/ do, and those that name it."""
    return path.parent.name == 'laws' or 'torch.distributed.run' in path.read_text()


def pytest_collection_modifyitems(items):
    """The slow files first, so that two processes that share the files out end at nearly the same time."""
    order = {f'test_{name}.py': i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(SLOW)))
    for item in items:
        if launches(item.path):
            item.add_marker(pytest.mark.launch)


@pytest.fixture(scope='session', autouse=True)
def surroundings(tmp_path_factory):
    """Tests that look into the cache set one of their own; one thread is faster for models this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('NANOPREF_CACHE', str(tmp_path_factory.mktemp('cache')))
        patch.delenv('RANK', raising=False)
        patch.setattr(torch, 'set_num_threads', lambda n: None)
        yield


@pytest.fixture(scope='module', autouse=True)
def one_process_group():
    """Scripts that run in this process make a process group of one, which all tests of a file share."""
    yield
    end_process_group()
