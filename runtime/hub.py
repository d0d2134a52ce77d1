"""Find files of models and data in local folders and on the Hugging Face hub, online or offline."""

import contextlib
import functools
import json
import os
import re
from pathlib import Path

from configurator import UserError
from runtime.files import say
from runtime.values import looked_in


@functools.cache
def reachable():
    """Return whether the hub answers. If not, switch its libraries to offline mode: each would retry for a minute."""
    from huggingface_hub import constants, utils

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=10)
        return True
    # the exception type depends on the HTTP library and on what fails (network, DNS, proxy)
    except Exception as error:
        reason = first_line(error)[:100]
    # the variable is for libraries that are imported later; huggingface_hub has read it already, into this constant
    os.environ['HF_HUB_OFFLINE'] = '1'
    constants.HF_HUB_OFFLINE = True
    say(f'note: the hub cannot be reached ({reason}): only what is in its cache can be used')
    return False


def first_line(error):
    """Return the message of an exception, joined to one line, cut to 200 characters."""
    text = ' '.join(str(error).split())[:200]
    # a single word, such as the key of a KeyError, needs the exception's name
    return text if ' ' in text else f'{type(error).__name__} {text}'.strip()


def _may_be_hub_id(name):
    """Return whether name has the form OWNER/NAME of a hub id."""
    return name.count('/') == 1 and not name.startswith(('.', '/', '~'))


def check_exists(name):
    """Raise UserError if a model name is neither a local folder nor a hub id; offline, it must be in the hub cache."""
    if os.path.isfile(name):  # an archive of other code, such as policy.pt
        raise UserError(f'{name!r} is a file: a model is a folder with config.json, tokenizer and .safetensors files')
    if Path(name, 'manifest.json').exists() and Path(name, 'state.json').exists():
        problem = 'is a checkpoint, from which its own run goes on (docs/runs.md makes a model of it)'
        raise UserError(f'{name!r} {problem}: a model is what a run leaves at its end, in out_dir/model')
    if os.path.exists(name):
        return _check_config(name)
    # looked_in() returns ' in FOLDER' for a relative path, '' for an absolute one
    where = looked_in(name).strip() or 'on this machine'
    if not _may_be_hub_id(name):
        advice = f'train it first{_how_to_train(name)}, or name another one (a hub id is OWNER/NAME)'
        raise UserError(f'there is no model folder {name!r} {where}: {advice}')
    if folder_of(name) is not None:
        return
    if not reachable():
        no_hub = 'the hub cannot be reached, and its cache does not have it'
        raise UserError(f'there is no folder {name!r} {where}, {no_hub}: name a model folder')
    # raises UserError if the hub has no such repo. A repo of a tokenizer or an adapter has no config.json, and that is fine
    has_file(name, 'config.json')


def _check_config(folder):
    """Raise UserError if the config.json of a model folder is no JSON. A folder of a tokenizer or an adapter needs none."""
    file = f'{folder}/config.json'
    if not os.path.exists(file):
        return
    try:
        if not os.path.isfile(file):  # a pipe would never end
            raise ValueError('it is no file')
        content = json.loads(Path(file).read_text('utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'the config.json of {folder!r} is not valid JSON ({first_line(error)}): mend it') from None
    # num_hidden_layers, n_layer, ...: transformers would make them all
    for key, value in content.items() if isinstance(content, dict) else ():
        if re.search('layers?$', key) and isinstance(value, int) and value > 10_000:
            raise UserError(f'the config.json of {folder!r} has a {key} of {value:,}: mend it')


def _how_to_train(folder):
    """Return ' by python sft.py config/sft_toy.py' for out/sft_toy/model, which that config file trains; '' for other folders."""
    run = Path(folder).parent.name
    config_file = Path(__file__).parents[1] / 'config' / f'{run}.py'
    if folder != f'out/{run}/model' or not config_file.exists():
        return ''
    # the comment in its first lines has the command
    script = re.search(rf'\w+\.py config/{re.escape(run)}\.py', config_file.read_text('utf-8'))
    return f' by python {script[0]}' if script else ''


def has_file(name, file):
    """Return whether a hub repo has a file, which is downloaded unless it has weights. UserError if the hub does not give the repo."""
    import huggingface_hub

    try:
        # weights come later, to those ranks that read them
        huggingface_hub.hf_hub_download(name, file, dry_run=file.endswith('.safetensors'))
        return True
    except huggingface_hub.errors.RemoteEntryNotFoundError:
        return False
    except Exception as error:
        raise UserError(f'cannot read {name!r} from the hub: {refusal(error, name)}') from None


def refusal(error, address):
    """Return why a download from the hub has failed, as a phrase. address: of the repo there, OWNER/NAME or datasets/OWNER/NAME."""
    from huggingface_hub import constants, errors

    sign_in = 'set HF_TOKEN to a token of yours'
    if isinstance(error, errors.GatedRepoError):
        return f'its owner gives it to those who ask: ask at {constants.ENDPOINT}/{address}, and {sign_in}'
    if isinstance(error, errors.RepositoryNotFoundError):
        return f'there is none, or it is private: correct the name, or {sign_in}'
    return first_line(error.__cause__ or error)  # an invalid name, an overloaded server, a full disk, ...


def folder_of(name):
    """Return the folder of a model as a Path, or None if there is none. For a hub id it is in the cache, filled if needed."""
    if os.path.isdir(name):
        return Path(name)
    file = file_of(name, 'config.json') or file_of(name, 'adapter_config.json')
    return Path(file).parent if file else None


def file_of(name, file):
    """Return the local path of a file in a folder or hub repo, downloading it if needed, or None if there is none."""
    from transformers.utils import cached_file

    if not os.path.exists(name):
        if not _may_be_hub_id(name):
            return None
        reachable()  # called for what it does: if the hub does not answer, only the cache counts from now on
    quiet = ('gated_repo', 'missing_entries', 'connection_errors')  # have cached_file return None for these, too
    options = {f'_raise_exceptions_for_{kind}': False for kind in quiet}
    # OSError: an invalid hub id, which whoever reads its config reports
    with contextlib.suppress(OSError):
        return cached_file(name, file, **options)
    return None


def read_dict(name, file):
    """Return the dict in a JSON file of a folder or hub repo, or {} if the file is missing or invalid."""
    # TypeError: Path(None), if the file is missing
    with contextlib.suppress(OSError, TypeError, ValueError, RecursionError):
        content = json.loads(Path(file_of(name, file)).read_text('utf-8'))
        if isinstance(content, dict):
            return content
    return {}
