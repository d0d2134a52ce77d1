"""What happens where the hub of models and datasets cannot be reached, or refuses."""

import os
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from configurator import UserError
from hf import load
from runtime import hub
from text import files, sources, toy

# before conftest.py puts another one in its place
from text.files import hub_commit


@pytest.fixture
def cut_off(monkeypatch):
    """No network; nothing of it is left behind."""
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            raise OSError('no such host')

    monkeypatch.setattr(huggingface_hub.utils, 'get_session', Session)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    hub.reachable.cache_clear()
    yield asked
    hub.reachable.cache_clear()


def test_the_hub_is_asked_once(cut_off, capsys):
    missing = "no folder 'nobody/nothing' in .*the hub cannot be reached.*name a model folder"
    for _ in range(2):
        with pytest.raises(UserError, match=missing):
            hub.check_exists('nobody/nothing')
    assert len(cut_off) == 1 and huggingface_hub.constants.HF_HUB_OFFLINE
    note = 'note: the hub cannot be reached (no such host): only what is in its cache can be used\n'
    assert capsys.readouterr().out == note
    # what cannot be a hub id
    for name in ('out/sft/model', './a/b', '~/b', '/tmp/none/model', 'nothing'):
        with pytest.raises(UserError, match='there is no model folder .*: train it first, or name another one'):
            hub.check_exists(name)
    assert len(cut_off) == 1


def test_what_is_here_is_not_asked_for(tmp_path, monkeypatch):
    """A file, which is no owner's repo, and a vocabulary for each layer, as of Gemma 3n, which is no number of layers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, 'file_of', lambda *_: pytest.fail('asked'))
    os.mkdir('a')
    for file, text in {'a/b': '', 'a/config.json': '{"vocab_size_per_layer_input": 262144}'}.items():
        (tmp_path / file).write_text(text)
    assert hub.check_exists('a') is None
    with pytest.raises(UserError, match="'a/b' is a file"):
        hub.check_exists('a/b')


REFUSALS = {'GatedRepoError': 'its owner gives it to those who ask: ask at .*/a/b, and set HF_TOKEN', 'RepositoryNotFoundError': 'correct the name, or',
            'HfHubHTTPError': 'the hub: 503 for you', 'RemoteEntryNotFoundError': None}  # fmt: skip


@pytest.mark.parametrize('name, says', REFUSALS.items())
def test_what_the_hub_refuses(monkeypatch, name, says):
    """Each in a sentence of its own; a repo of a tokenizer has no config.json."""

    def refuse(*_, **__):
        raise getattr(errors, name)('503 for you', response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', refuse)
    monkeypatch.setattr(hub, 'reachable', lambda: True)
    monkeypatch.setattr(hub, 'file_of', lambda *_: None)
    if says is None:
        return hub.check_exists('a/b')
    with pytest.raises(UserError, match=says):
        hub.check_exists('a/b')
    with pytest.raises(UserError, match=says.replace('/a/b', '/datasets/a/b')):
        files.hub_download('a/b', None, 'x.json')


def test_files_of_the_hub_that_are_not_there(monkeypatch):
    """A model of pickles alone is refused, and so is a tokenizer whose template did not come."""
    monkeypatch.setattr(hub, 'reachable', lambda: True)
    monkeypatch.setattr(hub, 'file_of', lambda *_: None)
    monkeypatch.setattr(hub, 'has_file', lambda name, file: file == 'chat_template.jinja')
    with pytest.raises(UserError, match="'a/b' has no .safetensors file: convert it from a pickle"):
        load._check_files('a/b', SimpleNamespace())
    monkeypatch.setattr(hub, 'check_exists', lambda *_: None)
    monkeypatch.setattr(load.transformers.AutoTokenizer, 'from_pretrained', lambda *_, **__: toy.tokenizer())
    with pytest.raises(UserError, match="the chat template of 'a/b' did not come from the hub: start again"):
        load.load_tokenizer('a/b')


def test_a_dataset_is_read_again_without_the_hub(request, monkeypatch, tmp_path):
    """As it was seen last, and known by the same hash; what was not read, and a file that never came, are named."""
    fake = request.getfixturevalue('hub')
    fake.rows = [{'prompt': f'p{i}', 'response': 'a'} for i in range(3)]
    monkeypatch.setenv('NANOPREF_CACHE', str(tmp_path))
    monkeypatch.setattr(files, 'hub_commit', hub_commit)
    monkeypatch.setattr(
        huggingface_hub, 'HfApi', lambda: SimpleNamespace(dataset_info=lambda *_, **__: SimpleNamespace(sha='c0'))
    )

    def read():
        hub_commit.cache_clear()
        files.hub_files.cache_clear()
        return sources.fingerprint('o/n'), sources.load_rows('o/n', 'train')

    before = read()
    assert before[0] and len(before[1][0]) == 3 and {commit for *_, commit in fake.asked} == {'c0'}
    monkeypatch.setattr(hub, 'reachable', lambda: False)
    fake.load_dataset_builder = None
    assert read() == before
    with pytest.raises(UserError, match="the hub cannot be reached, and 'o/m' was not read here before"):
        sources.load_rows('o/m', 'train')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="cannot read {}/train.json of 'o/n' from the hub: division by zero"):
        read()
    hub_commit.cache_clear()
