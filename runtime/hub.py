"""Models and data in folders and on the hub: which files are at hand, and whether the hub can be reached."""

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
    """Return whether the hub answers. It is asked once in a process.

    If it does not, the hub's libraries are set to use only what their caches hold, and a note says so. By themselves they would
    try for more than a minute, with a line for each try."""
    import huggingface_hub

    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=10)
        return True
    # no network, no such host, a proxy: each library of requests has errors of its own
    except Exception as error:
        reason = first_line(error)[:100]

    # libraries that are imported already have read the variable; those that will be imported read it then
    constants.HF_HUB_OFFLINE = True
    os.environ['HF_HUB_OFFLINE'] = '1'
    if 'datasets' in sys.modules:
        sys.modules['datasets'].config.HF_HUB_OFFLINE = True
    say(f'note: the hub cannot be reached ({reason}): only what is in its cache can be used')
    return False


def first_line(error):
    """Return what an exception says, as one line of 200 characters at most."""
    text = ' '.join(str(error).split())[:200]
    # a single word, such as a KeyError's key, says nothing without the name of its exception
    is_sentence = ' ' in text
    return text if is_sentence else f'{type(error).__name__} {text}'.strip()


def _may_be_hub_id(name):
    """Return whether a name has the form OWNER/NAME."""
    return name.count('/') == 1 and not name.startswith(('.', '/', '~'))


def check_there(name):
    """Raise UserError if a model's name is neither a folder here nor something that the hub can give.

    Only OWNER/NAME can be a name on the hub. While the hub does not answer, it must be in the hub's cache."""
    if os.path.exists(name):
        return
    # of an absolute path looked_in says nothing
    here = looked_in(name).strip() or 'on this machine'
    if not _may_be_hub_id(name):
        raise UserError(f'there is no model folder {name!r} {here}: train it first, or name another one')
    if not reachable() and file_of(name, 'config.json') is None:
        reason = 'the hub cannot be reached, and its cache does not have it'
        raise UserError(f'there is no folder {name!r} {here}, {reason}: name a model folder')


def file_of(name, file):
    """Return the path of a file of a folder or of a hub id, fetched if need be, or None if there is no such file."""
    from transformers.utils import cached_file

    if not os.path.exists(name):
        if not _may_be_hub_id(name):
            return None
        # if it is not, this has set the libraries to look only into their cache
        reachable()
    # an error about the hub id itself is left to the code that reads its config, and says more about it
    quiet = ('gated_repo', 'missing_entries', 'connection_errors')
    options = {f'_raise_exceptions_for_{kind}': False for kind in quiet}
    with contextlib.suppress(OSError):
        return cached_file(name, file, **options)
    return None


def read_dict(name, file):
    """Return the dict in a JSON file of a folder or of a hub id, or {} if there is none or it is broken.

    The code that cannot do without a broken file reports it."""
    content = {}
    # a missing file is None, and Path(None) a TypeError
    with contextlib.suppress(OSError, TypeError, ValueError, RecursionError):
        content = json.loads(Path(file_of(name, file)).read_text('utf-8'))
    return content if isinstance(content, dict) else {}
