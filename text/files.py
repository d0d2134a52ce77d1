"""Where rows are read from: files, folders and hub datasets, as rows that know where they stand.

A folder is what its hub id would be: its README names configs and splits, or else the names of its files do."""

import glob
import hashlib
import json
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from configurator import UserError
from runtime import hub
from runtime.files import file_hash
from runtime.values import looked_in
from text.readers import ENDINGS, FORMATS, HELP, Row, read_file, without_inner_nulls

# in a folder, these describe the data
NOT_DATA = {'dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'state.json'}
# the names of a part for testing, where there is no test split
HELD_OUT_NAMES = ('test', 'validation', 'valid', 'dev', 'val')
# the name that datasets gives a file of a split
SHARD = re.compile(r'([^/]+?)-\d{5}(?:-of-\d{5})?\.[^/]*$')
# as datasets has them: latest.json is no test file, and values.json none for validation
WORD = re.compile(
    r'(?<![a-z])(train|training|test|testing|eval|evaluation|validation|dev|valid|val)(_sft|_prefs|_gen|_dpo|_rm)?(?![a-z])'
)
WORDS = {'training': 'train', 'testing': 'test', 'eval': 'test', 'evaluation': 'test'}
WORDS |= {'dev': 'validation', 'valid': 'validation', 'val': 'validation'}


def read_rows(hub_id, split, path, undivided=False, **options):
    """Rows of a local file, of a local folder's files for this split (undivided: of all its files), or of a hub dataset.

    path: a list of files is read as it is."""
    if path is None:
        yield from _read_hub(hub_id, split, options)
    elif not isinstance(path, list):
        path = local_files(path, None if undivided else split)
    for file in path or []:
        yield from read_file(file)


def add_to_digest(digest, path):
    """Update a digest with the contents of data files and their names, which say what split each is of."""
    readme = os.path.join(path, 'README.md')
    for file in data_files(path) + [readme] * os.path.exists(readme):
        digest.update(os.path.relpath(file, path).encode())
        try:
            digest.update(bytes.fromhex(file_hash(file)))
        except OSError as error:
            raise UserError(f'cannot read {file}: {error.strerror}') from None


def content_hash(*parts) -> int:
    """A 64-bit hash of json-able values, the same in every process."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).digest(), 'big')


# ---- which part is meant ----


def named_part(source):
    """(source, config, split) of 'SOURCE:config[split]', the last two None where they are not named.

    The config is a hub id's, or a folder's that has a README; a name with brackets that is a file, or a pattern, stays."""
    found, split = re.fullmatch(r'(.+)\[([\w.+-]+)\]', source), None
    if found and not glob.glob(os.path.expanduser(source)) and not os.path.exists(source):
        source, split = found.groups()
    name, colon, config = source.partition(':')
    folder = os.path.isdir(os.path.expanduser(name)) and not os.path.exists(config)
    if colon and config and name.count('/') and (folder or re.fullmatch(r'[\w.-]+/[\w.-]+:[\w.-]+', source)):
        return name, config, split
    return source, None, split


def choose_splits(names, wanted, source):
    """(the split to train on, the one to test on or None) of these. wanted: the first of them, if the user names one.

    Raises UserError where the user has to name one."""
    train = wanted or 'train'
    if train not in names:
        # one that is called otherwise is the one that is meant
        likely = [name for name in names if name.startswith('train')] or list(names)
        if wanted or len(likely) != 1:
            which = f'no split {wanted!r}' if wanted else 'several splits'
            name, example, there = named_part(source)[0], [*likely, 'SPLIT'][0], ', '.join(names)
            raise UserError(f"{name} has {which}; there are {there}: say which: --data='{name}[{example}]' ({HELP})")
        train = likely[0]
    held_out = [train.replace('train', name, 1) for name in HELD_OUT_NAMES]
    if sum(name.startswith('train') for name in names) == 1:
        held_out += HELD_OUT_NAMES
    return train, next((name for name in held_out if name in names and name != train), None)


# ---- the hub ----


def _read_hub(hub_id, split, options):
    import datasets

    options = {name: value for name, value in options.items() if value is not None} | _revision(hub_id)
    try:
        rows = datasets.load_dataset(hub_id, split=split, **options)
    except Exception as error:  # no network, no such dataset, no such split: the library's own words say which
        raise UserError(f'cannot load {hub_id!r}, split {split!r}, from the hub: {_reason(error)}') from None
    for number, raw in enumerate(rows, 1):
        yield Row.of(without_inner_nulls(raw), f'{hub_id} [{split}], row {number}')


def hub_splits(hub_id, config=None):
    """The names of the splits of a hub dataset, or of one of its configs. Raises UserError where one has to be named."""
    import datasets

    options = {'config_name': config} if config else {}
    try:
        return datasets.get_dataset_split_names(hub_id, **options, **_revision(hub_id))
    except Exception as error:  # no network, no such dataset, no access, several configs
        hint = f"a config is named as in --data='{hub_id}:CONFIG'"
        raise UserError(f'cannot find {hub_id!r} on the hub: {_reason(error)} ({hint})') from None


@cache
def hub_commit(hub_id):
    """The commit at which this process reads a hub dataset; None where nobody can say: no network, no such dataset."""
    with suppress(Exception):  # the reader, which comes later, says what is wrong
        import huggingface_hub

        if hub.reachable():
            return huggingface_hub.HfApi().dataset_info(hub_id, timeout=10).sha
    return None


def _revision(hub_id):
    # 'json' is no dataset: it reads files of any repository
    commit = hub_commit(hub_id) if hub_id != 'json' else None
    return {'revision': commit} if commit else {}


def _reason(error):
    return ' '.join(str(error).split())[:300] or type(error).__name__


# ---- folders ----


def data_files(path):
    """A file itself, the files that a pattern fits, or all data files in a folder."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        inside = sorted(Path(path, name) for name in glob.glob('**/*', root_dir=path, recursive=True))
        found = [str(file) for file in inside if _is_data(file)]
        if not found:
            raise UserError(f'the folder {path} has no data file; they end in {", ".join(FORMATS)} ({HELP})')
        # a licence may end in .txt
        return [file for file in found if '.txt' not in Path(file).suffixes] or found
    found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not found:
        raise UserError(f'there is no file or folder {path}{looked_in(path)}')
    if found != [path]:
        return [file for one in found for file in data_files(one)]
    # a pipe would wait for ever, and data are read more than once
    if not os.path.isfile(path):
        raise UserError(f'{path} is no file, but a pipe or a device: write its rows into a file first')
    return [path]


def folder_splits(path, config=None):
    """{split: files} of a folder or pattern, as its README's `configs:` or the files' names say; 'train' if nothing does.

    Raises UserError where the README has several configs and none is named."""
    path = os.path.expanduser(path)
    configs = _configs(path)
    entry = configs[_config_of(configs, config, path)] if configs or config else {}

    # what the README names; of a single config that names nothing that is here, the names of the files decide
    splits = _named_files(path, entry)
    if splits:
        return splits
    if len(configs) > 1 and 'data_files' in entry:
        raise UserError(f'{path} has none of the files that its README names for the config {config!r}: fetch them')
    path = os.path.join(path, str(entry['data_dir'])) if 'data_dir' in entry else path

    # a DatasetDict that was saved has a folder a split
    saved = os.path.exists(os.path.join(path, 'dataset_dict.json'))
    root = path if os.path.isdir(path) else os.path.dirname(re.split(r'[*?\[]', path)[0])
    for file in data_files(path):
        name = os.path.relpath(file, root or '.')
        splits.setdefault(name.partition('/')[0] if saved else _split_of(name), []).append(file)
    # files without a split are for training, but beside some that are named so they are something else
    unnamed = splits.pop('', None)
    if unnamed and not any(split.startswith('train') for split in splits):
        splits = {'train': unnamed, **splits}
    return splits


def _configs(folder):
    """{name: entry} of the `configs:` in the head of a folder's README."""
    import huggingface_hub

    with suppress(Exception):  # no README, or one with another head
        listed = huggingface_hub.metadata_load(os.path.join(folder, 'README.md'))['configs']
        return {str(entry.get('config_name', 'default')): entry for entry in listed}
    return {}


def _config_of(configs, config, path):
    """The config that is named, or else meant. Raises UserError where there is none of that name, or several."""
    meant = [name for name, entry in configs.items() if name == 'default' or entry.get('default')] or list(configs)
    if config is None and len(meant) == 1:
        return meant[0]
    if config not in configs:
        wrong = f'no config {config!r}' if config else 'several configs'
        there = ', '.join(configs) or 'none'
        raise UserError(f'{path} has {wrong}; there are {there}: say which: --data={path}:CONFIG ({HELP})')
    return config


def _named_files(folder, entry):
    """{split: files} that a config's data_files name: by one pattern, several, or several for a split each."""
    listed, splits = entry.get('data_files') or [], {}
    for item in listed if isinstance(listed, list) else [listed]:
        named = item if isinstance(item, dict) else {'path': item}
        patterns = named.get('path', [])
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            for name in sorted(glob.glob(str(pattern), root_dir=folder, recursive=True)):
                file, found = os.path.join(folder, name), splits.setdefault(str(named.get('split', 'train')), [])
                if _is_data(Path(file)) and file not in found:
                    found.append(file)
    return {split: found for split, found in splits.items() if found}


def _is_data(file):
    """Whether a file is one of data, neither one that describes it nor one that `map` left in a saved dataset."""
    described = file.name in NOT_DATA or (file.name.startswith('cache-') and file.suffix == '.arrow')
    return file.name.endswith(ENDINGS) and not described and file.is_file()


def _split_of(name):
    """The split that the path of a file names, '' for none: data/x-00000-of-00001 names x, and else a word such as train does."""
    found, shard = WORD.search(name.lower()), SHARD.search(name)
    if shard and (WORD.search(shard[1].lower()) or (not found and '/data/' in f'/{name}')):
        return '' if shard[1] in ('data', 'part') else shard[1]
    return WORDS.get(found[1], found[1]) + (found[2] or '') if found else ''


def has_test_part(path):
    """Whether some of a folder's files are for testing: else, and of a single file, a part is held out."""
    return len(data_files(path)) > 1 and any(name.startswith(HELD_OUT_NAMES) for name in folder_splits(path))


def local_files(path, split):
    """A file itself, or a folder's data files of this split, or of the one that serves for it; None: all of them."""
    splits = {None: data_files(path)} if split is None else folder_splits(path)
    if split in splits:
        return splits[split]
    # test_prefs may be test, or validation, or a part of what there is for training
    train, held_out = choose_splits(splits, None, path)
    return splits[train if held_out is None or split.startswith('train') else held_out]
