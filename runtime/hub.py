"""Whether the hub of models and datasets can be reached. Its libraries try for more than a minute, with a line for each try."""

import functools
import os
import sys

from runtime.files import say


@functools.cache
def reachable():
    """Ask the hub once. Where it does not answer, its libraries use what their caches hold, at once, and a note says so."""
    import huggingface_hub

    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=10)
        return True
    except Exception as error:  # no network, no such host, a proxy: each library of requests has words of its own
        reason = ' '.join(str(error).split())[:100] or type(error).__name__
    # for libraries that are imported already, and for those that will be
    constants.HF_HUB_OFFLINE = True
    os.environ['HF_HUB_OFFLINE'] = '1'
    if 'datasets' in sys.modules:
        sys.modules['datasets'].config.HF_HUB_OFFLINE = True
    say(f'note: the hub cannot be reached ({reason}): only what is in its cache can be used')
    return False
