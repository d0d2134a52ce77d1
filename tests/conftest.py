"""Surroundings of every test: one thread, a cache of the session's own, no process group left from another file."""

import gc
import os
import sys
from functools import cache
from types import SimpleNamespace

import pytest

# helpers.collect_garbage() collects it between tests
gc.disable()

os.environ.setdefault('OMP_NUM_THREADS', '1')
# what is compared bit for bit is compared on the CPU: python -m experiments.gpu_check is the test of a GPU, and
# CUDA_VISIBLE_DEVICES=0 lets the few tests run that are skipped without one
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')
# to ask whether there is a GPU must not begin its use: forked processes could not use it then
os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')

import torch
from helpers import collect_garbage, end_process_group, shrink_toy

from runtime import values
from tests import forks

SLOW = 'law signals parallel law_ppo lora checkpoint bad_input model speed log attack claims trl endpoint reward sample'.split()


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


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """All test files are imported, and no test has run."""
    gc.freeze()  # what is imported stays
    forks.begin()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    collect_garbage()


@pytest.fixture(scope='session', autouse=True)
def surroundings(tmp_path_factory):
    """No keys, no network. Tests that look into the cache set one of their own; one thread is faster for models this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('NANOPREF_CACHE', str(tmp_path_factory.mktemp('cache')))
        for name in ('RANK', 'HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy', *values.SECRETS):
            patch.delenv(name, raising=False)
        patch.setattr(torch, 'set_num_threads', lambda n: None)
        patch.setattr('text.files.hub_commit', lambda hub_id: None)
        yield


@pytest.fixture
def small_toy(monkeypatch, tmp_path):
    """The toy world with 200 pairs a split in place of thousands, and a cache of the test's own."""
    shrink_toy(monkeypatch, tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for datasets: hub.rows are its rows, hub.splits its splits, hub.asked what load_dataset was asked for."""
    fake = SimpleNamespace(rows=[], splits=['train', 'test'], asked=[])

    def load_dataset(hub_id, split, **options):
        fake.asked.append((hub_id, split, options))
        return fake.rows

    fake.load_dataset = load_dataset
    fake.get_dataset_split_names = lambda *_, **__: fake.splits
    monkeypatch.setitem(sys.modules, 'datasets', fake)
    return fake


@pytest.fixture(scope='module', autouse=True)
def one_process_group():
    """Scripts that run in this process make a process group of one, which all tests of a file share."""
    yield
    end_process_group()
