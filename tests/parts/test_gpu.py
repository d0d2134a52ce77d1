"""What is done for a GPU, with stand-ins where there is none."""

import os
import re
import types

import numpy as np
import pytest
import torch
from helpers import ROOT, python
from torch.utils._pytree import tree_leaves

import data
from configurator import Config, UserError
from hf import parallel
from runtime import errors, prefetch, ranks

PAIRS = [(np.arange(3), [np.arange(2), np.arange(4)]), (np.arange(5), [np.arange(1), np.arange(2)])]


def test_random_states_of_gpus_are_left_alone():
    """torch.random.fork_rng() copies the state of every GPU of a machine, and warns on every rank."""
    files = [file for folder in ('.', 'hf', 'runtime', 'rl', 'tools') for file in (ROOT / folder).glob('*.py')]
    calls = [call for file in files for call in re.findall(r'fork_rng\(.*?\)', file.read_text())]
    assert len(calls) >= 3 and set(calls) == {'fork_rng(devices=[])', 'fork_rng(devices=devices)'}


@pytest.mark.parametrize('pad', [False, True])
def test_a_microbatch_is_copied_from_pinned_memory(pad, monkeypatch):
    """Every tensor of it, those of the attention's layout included, none of them twice."""
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda x: pinned.append(x) or x)
    monkeypatch.setattr(torch.Tensor, 'to', lambda x, *how, **more: copied.append((how, more)) or x)
    batch = data.pack(PAIRS, [0, 1], pad=pad, device='cuda:1')
    parts = {**vars(batch), **vars(batch.varlen or types.SimpleNamespace())}
    tensors = [value for value in tree_leaves(list(parts.values())) if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 9 and (pad or len(tensors) >= 12)
    assert {id(x) for x in tensors} == {id(x) for x in pinned} and len(pinned) == len(copied)
    assert all(call == (('cuda:1',), {'non_blocking': True}) for call in copied)
    # what holds the tensors stays
    monkeypatch.undo()
    layout = types.SimpleNamespace(a=torch.ones(2), rest=[(torch.ones(1), 3)], number=1)
    assert prefetch.move(layout, 'meta') is layout and layout.number == 1
    assert layout.a.is_meta and layout.rest[0][0].is_meta and layout.rest[0][1] == 3


def test_more_processes_than_gpus(monkeypatch):
    """A sentence, said once on each machine, before the ranks meet or anything loads."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '3')
    for local_rank in (0, 2):
        monkeypatch.setenv('LOCAL_RANK', str(local_rank))
        with pytest.raises(UserError, match='3 processes .* GPUs of this machine are 2.*--nproc_per_node=2') as info:
            ranks.setup()
        assert info.value.of_this_rank == (local_rank == 0)


def test_memory_that_grows_in_place():
    """Set before torch is imported, unless the user has set one of the two names."""
    done = python('-c', """import os, sys; from runtime import guard
names = 'PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'
for name in (None, *names):
    for n in names: os.environ.pop(n, 0)
    os.environ |= {name: 'mine'} if name else {}; guard._pipe = None
    guard.watch('__main__'); assert 'torch' not in sys.modules
    print(*map(os.environ.get, names))""")  # fmt: skip
    assert done.stdout.splitlines() == ['expandable_segments:True None', 'mine None', 'None mine'], done.stderr


@pytest.mark.parametrize('device, options, told, unused', [
    ('cpu', {}, {}, []), ('cpu', {'tf32': True, 'deterministic': True}, {}, ['tf32', 'deterministic']),
    ('cuda', {'tf32': True, 'dtype': 'bfloat16'}, {}, ['tf32']),
    ('cuda', {'tf32': True, 'deterministic': True}, {'precision': 'high', 'deterministic': True}, []),
])  # fmt: skip
def test_arithmetic(device, options, told, unused, monkeypatch):
    """A CPU needs neither option, bfloat16 no tf32."""
    found, said, ignored, environment = {}, [], [], {}
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda x: found.update(precision=x))
    monkeypatch.setattr(torch, 'use_deterministic_algorithms', lambda x: found.update(deterministic=x))
    monkeypatch.setattr(torch.utils.deterministic, 'fill_uninitialized_memory', True, raising=False)
    monkeypatch.setattr(parallel, 'say', said.append)
    monkeypatch.setattr(os, 'environ', environment)
    monkeypatch.setattr(Config, 'report_unused', lambda self, names, why: ignored.extend(names))
    defaults = {'tf32': False, 'deterministic': False, 'dtype': 'float32', 'device_map': None}
    parallel.choose_arithmetic(Config(defaults | options), torch.device(device))
    assert (found, ignored) == (told, unused)
    if told:
        assert 'bfloat16 is several times faster' in said[0] and environment['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
    assert bool(said) == bool(told) and torch.utils.deterministic.fill_uninitialized_memory == (not told)


def test_errors_of_torch_are_sentences():
    """Of what cannot be deterministic; and of full memory, where a microbatch of several examples can be halved."""
    error = RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set 'torch...'")
    better = errors.explained(error, '')
    assert isinstance(better, UserError) and 'no cumsum_cuda_kernel' in str(better) and '--deterministic' in str(better)
    one, two = types.SimpleNamespace(slot=[0]), types.SimpleNamespace(slot=[1, 2])
    full = errors.explained(MemoryError(), 'lower it')
    cases = [(full, [one, two]), (full, [one]), (UserError('other'), [two])]
    assert [errors.can_split(*case) for case in cases] == [True, False, False]
