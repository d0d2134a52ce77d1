"""What happens where the hub of models and datasets cannot be reached."""

import os

import huggingface_hub
import pytest

from configurator import UserError
from runtime import hub


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
            hub.check_there('nobody/nothing')
    assert len(cut_off) == 1 and huggingface_hub.constants.HF_HUB_OFFLINE
    note = 'note: the hub cannot be reached (no such host): only what is in its cache can be used\n'
    assert capsys.readouterr().out == note
    # what cannot be a hub id
    for name in ('out/sft/model', './a/b', '~/b', '/tmp/none/model', 'nothing'):
        with pytest.raises(UserError, match='there is no model folder .*: train it first, or name another one'):
            hub.check_there(name)
    assert len(cut_off) == 1
