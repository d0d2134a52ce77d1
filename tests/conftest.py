"""Surroundings of every test: one thread, a cache of the session's own, no process group left from another file."""

import ast
import gc
import json
import os
import sys
from functools import cache
from types import SimpleNamespace

import pytest

# with xdist, one process only hands out the tests: torch and what imports it are imported below, where tests run
from runtime import values
from tests import forks
from text import files

# helpers.collect_garbage() collects it between tests
gc.disable()

os.environ.setdefault('OMP_NUM_THREADS', '1')
# what is compared bit for bit is compared on the CPU: python -m experiments.gpu_check is the test of a GPU, and
# CUDA_VISIBLE_DEVICES=0 lets the few tests run that are skipped without one
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')
# to ask whether there is a GPU must not begin its use: forked processes could not use it then
os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')

SLOW = 'law signals parallel law_ppo lora checkpoint bad_input model speed log attack claims trl endpoint reward sample'.split()


@cache
def launching(path):
    """Names of the functions in a test file that run a whole script or start a process, by themselves or through one another."""
    found = {'run_script', 'launch', 'python', 'subprocess', 'forks'}
    # names that each function uses, its fixtures included
    used = {}
    for function in ast.parse(path.read_text()).body:
        if isinstance(function, ast.FunctionDef):
            nodes = list(ast.walk(function))
            names = {node.id for node in nodes if isinstance(node, ast.Name)}
            # helpers.python as well as python
            names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            used[function.name] = names | {node.arg for node in nodes if isinstance(node, ast.arg)}
    while more := {name for name, names in used.items() if names & found} - found:
        found |= more
    return found


def pytest_collection_modifyitems(items):
    """The slow files first, so that two processes that share the files out end at nearly the same time; launches are marked."""
    order = {f'test_{name}.py': i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(SLOW)))
    for item in items:
        if item.path.parent.name == 'laws' or item.originalname in launching(item.path):
            item.add_marker(pytest.mark.launch)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """All test files are imported, and no test has run."""
    gc.freeze()  # what is imported stays
    forks.begin()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    from helpers import collect_garbage

    collect_garbage()


@pytest.fixture(scope='session', autouse=True)
def surroundings(tmp_path_factory):
    """No keys, no network. Tests that look into the cache set one of their own; one thread is faster for models this small."""
    import torch

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
    from helpers import shrink_toy

    shrink_toy(monkeypatch, tmp_path)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A stand-in for the hub: hub.rows are a dataset's rows, hub.splits its splits; hub.asked: (id, split, what part, commit) of reads."""
    splits = ['train', 'validation', 'test', 'train_prefs', 'test_prefs', 'train_sft', 'test_sft']
    fake = SimpleNamespace(rows=[], splits=splits, asked=[])

    def load_dataset_builder(address, revision, **options):
        part = json.dumps({key: value for key, value in options.items() if value is not None})
        data_files = {split: [f'{address}@{revision}/{part}/{split}.json'] for split in fake.splits}
        return SimpleNamespace(config=SimpleNamespace(data_files=data_files))

    def hf_hub_download(hub_id, name, repo_type, revision):
        part, _, file = name.rpartition('/')
        fake.asked.append((hub_id, file.removesuffix('.json'), json.loads(part or '{}'), revision))
        path = tmp_path_factory.mktemp('hub') / file
        path.write_text(json.dumps(fake.rows))
        return str(path)

    fake.load_dataset_builder = load_dataset_builder
    monkeypatch.setitem(sys.modules, 'datasets', fake)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', hf_hub_download)
    monkeypatch.setattr('runtime.hub.reachable', lambda: True)
    files.hub_files.cache_clear()
    return fake


@pytest.fixture(scope='module', autouse=True)
def one_process_group():
    """Scripts that run in this process make a process group of one, which all tests of a file share."""
    from helpers import end_process_group

    yield
    end_process_group()
