"""Models and data in folders and on the hub: which files are at hand, and whether the hub can be reached. All raise UserError."""

import contextlib
import functools
import json
import os
import sys
from pathlib import Path

from configurator import UserError
from runtime.files import say
from runtime.values import looked_in


@functools.cache
def reachable():
    """Ask the hub once. Where it does not answer, its libraries use what their caches hold, at once, and a note says so.

    By themselves they try for more than a minute, with a line for each try."""
    import huggingface_hub

    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=10)
        return True
    except Exception as error:  # no network, no such host, a proxy: each library of requests has words of its own
        reason = first_line(error)[:100]
    # for libraries that are imported already, and for those that will be
    constants.HF_HUB_OFFLINE = True
    os.environ['HF_HUB_OFFLINE'] = '1'
    if 'datasets' in sys.modules:
        sys.modules['datasets'].config.HF_HUB_OFFLINE = True
    say(f'note: the hub cannot be reached ({reason}): only what is in its cache can be used')
    return False


def first_line(error):
    """What an exception says, on one line."""
    text = ' '.join(str(error).split())[:200]
    return text if ' ' in text else f'{type(error).__name__} {text}'.strip()


def _may_be_hub_id(name):
    return name.count('/') == 1 and not name.startswith(('.', '/', '~'))


def check_there(name):
    """Refuse a name that is no folder here and cannot be a hub id, and a hub id that is neither at hand nor to be had."""
    if os.path.exists(name):
        return
    here = looked_in(name).strip() or 'on this machine'
    if not _may_be_hub_id(name):
        raise UserError(f'there is no model folder {name!r} {here}: train it first, or name another one')
    if not reachable() and file_of(name, 'config.json') is None:
        why = 'the hub cannot be reached, and its cache does not have it'
        raise UserError(f'there is no folder {name!r} {here}, {why}: name a model folder')


def file_of(name, file):
    """The path of a file of a folder or a hub id, or None where it has no such file."""
    from transformers.utils import cached_file

    if not os.path.exists(name):
        if not _may_be_hub_id(name):
            return None
        reachable()  # where it is not, only its cache is asked from here on
    # what is wrong with a hub id is said where its config is read
    kinds = ('gated_repo', 'missing_entries', 'connection_errors')
    with contextlib.suppress(OSError):
        return cached_file(name, file, **{f'_raise_exceptions_for_{kind}': False for kind in kinds})
    return None


def read_dict(name, file):
    """The dict of a JSON file of a folder or a hub id, empty where there is none: whoever needs a broken one says so."""
    found = {}
    with contextlib.suppress(OSError, TypeError, ValueError, RecursionError):
        found = json.loads(Path(file_of(name, file)).read_text('utf-8'))
    return found if isinstance(found, dict) else {}
