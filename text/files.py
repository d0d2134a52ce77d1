"""Where rows are read from: files, folders and hub datasets, as rows that know where they stand.

A folder is what its hub id would be: its README names configs and splits, or else the names of its files do."""

import glob
import hashlib
import json
import os
import re
from functools import cache
from pathlib import Path

from configurator import UserError
from runtime.files import file_hash
from text.readers import ENDINGS, FORMATS, HELP, Row, read_file, unfilled

# in a folder, these describe the data
NOT_DATA = {'dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'state.json'}
# the names of a part for testing, where there is no test split
HELD_OUT_NAMES = ('test', 'validation', 'valid', 'dev', 'val')
# the name that datasets gives a file of a split
SHARD = re.compile(r'([^/]+?)-\d{5}(?:-of-\d{5})?\.[^/]*$')


def read_rows(hub_id, split, path, undivided=False, **options):
    """Rows of a local file, of a local folder's files for this split (undivided: of all its files), or of a hub dataset.

    path: a list of files is read as it is."""
    if path is None:
        yield from _read_hub(hub_id, split, options)
        return
    wanted = None if undivided else split
    for file in path if isinstance(path, list) else local_files(path, wanted):
        yield from read_file(file)


def add_to_digest(digest, path):
    """Update a digest with the contents of data files and their names, which say what split each is of."""
    for file in [*data_files(path), *filter(os.path.exists, [os.path.join(path, 'README.md')])]:
        digest.update(os.path.relpath(file, path).encode())
        try:
            digest.update(bytes.fromhex(file_hash(file)))
        except OSError as error:
            raise UserError(f'cannot read {file}: {error.strerror}') from None


def content_hash(*parts) -> int:
    """A 64-bit hash of json-able values, the same in every process."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).digest(), 'big')


def named_part(source):
    """(source, config, split) of 'SOURCE:config[split]', the last two None where they are not named.

    The config is a hub id's, or a folder's that has a README; a name with brackets that is a file, or a pattern, stays."""
    found = re.fullmatch(r'(.+)\[([\w.+-]+)\]', source)
    split = None
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
        likely = [name for name in names if name.startswith('train')] or list(names)
        # one that is called otherwise is the one that is meant
        if wanted or len(likely) != 1:
            which = f'no split {wanted!r}' if wanted else 'several splits'
            name, there = named_part(source)[0], ', '.join(filter(None, names)) or 'none with a name'
            example = f"--data='{name}[{likely[0]}]'" if any(likely) else f'--data={name}'
            raise UserError(f'{name} has {which}; there are {there}: say which: {example} ({HELP})')
        (train,) = likely
    held_out = (train.replace('train', name, 1) for name in HELD_OUT_NAMES)
    return train, next((name for name in held_out if name in names and name != train), None)


# ---- the hub ----


def _read_hub(hub_id, split, options):
    import datasets

    options = {name: value for name, value in options.items() if value is not None}
    # 'json' is no dataset: it reads files of any repository
    if hub_id != 'json':
        options |= _revision(hub_id)
    try:
        rows = datasets.load_dataset(hub_id, split=split, **options)
    except Exception as error:  # no network, no such dataset, no such split: the library's own words say which
        raise UserError(f'cannot load {hub_id!r}, split {split!r}, from the hub: {_reason(error)}') from None
    for number, raw in enumerate(rows, 1):
        yield Row.of(unfilled(raw), f'{hub_id} [{split}], row {number}')


def hub_splits(hub_id, config=None):
    """The names of the splits of a hub dataset, or of one of its configs. Raises UserError where one has to be named."""
    import datasets

    options = {'config_name': config} if config else {}
    try:
        return datasets.get_dataset_split_names(hub_id, **options, **_revision(hub_id))
    except Exception as error:  # no network, no such dataset, no access, several configs
        reason, several = _reason(error), re.search(r'available configs: (\[.*?\])', str(error), re.S)
        if several and not config:
            names = re.findall(r"'(.*?)'", several[1])
            reason = f"it has several configs: {', '.join(names)}: say which: --data='{hub_id}:{names[0]}'"
        raise UserError(f'cannot find {hub_id!r} on the hub: {reason}') from None


@cache
def hub_commit(hub_id):
    """The commit at which this process reads a hub dataset; None where nobody can say: no network, no such dataset."""
    try:
        import huggingface_hub

        return huggingface_hub.HfApi().dataset_info(hub_id, timeout=10).sha
    except Exception:  # the reader, which comes later, says what is wrong
        return None


def _revision(hub_id):
    commit = hub_commit(hub_id)
    return {} if commit is None else {'revision': commit}


def _reason(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# ---- folders ----


def data_files(path):
    """A file itself, the files that a pattern fits, or all data files in a folder."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        there = sorted(file for file in Path(path).rglob('*') if file.name.endswith(ENDINGS) and file.is_file())
        inside = [(str(file), file.relative_to(path)) for file in there if file.name not in NOT_DATA]
        found = [file for file, parts in inside if not any(part.startswith('.') for part in parts.parts)]
        if not found:
            raise UserError(f'the folder {path} has no data file; they end in {", ".join(FORMATS)} ({HELP})')
        # a licence may end in .txt
        return [file for file in found if '.txt' not in Path(file).suffixes] or found
    found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not found:
        raise UserError(f'there is no file or folder {path}')
    return [path] if found == [path] else [file for one in found for file in data_files(one)]


def folder_splits(path, config=None):
    """{split: files} of a folder or pattern, as its README's `configs:` or the files' names say; '' for unnamed ones.

    Raises UserError where the README has several configs and none is named."""
    path = os.path.expanduser(path)
    configs = _configs(path) if os.path.isdir(path) else {}
    if config and config not in configs:
        raise UserError(f'{path} has no config {config!r}; there are {", ".join(configs) or "none"}')
    if len(configs) > 1 and not config:
        first = next(iter(configs))
        raise UserError(f'{path} has several configs: {", ".join(configs)}: say which: --data={path}:{first} ({HELP})')
    for patterns in [configs[config]] if config else configs.values():
        found = {split: [file for p in ps for file in sorted(glob.glob(os.path.join(path, p), recursive=True))]
                 for split, ps in patterns.items()}  # fmt: skip
        if any(found.values()):
            return found
    # a DatasetDict that was saved has a folder a split
    saved, splits = os.path.exists(os.path.join(path, 'dataset_dict.json')), {}
    root = path if os.path.isdir(path) else os.path.dirname(re.split(r'[*?\[]', path)[0])
    for file in data_files(path):
        name = file[len(root) :]
        splits.setdefault(name.strip('/').partition('/')[0] if saved else _split_of(name), []).append(file)
    # where some are named, the others are something else
    if len(splits) > 1:
        splits.pop('', None)
    return splits


def _configs(folder):
    """{config: {split: patterns}} of the `configs:` in the head of a folder's README."""
    import yaml

    try:
        head = re.match(r'---\n(.*?)\n---', Path(folder, 'README.md').read_text(errors='replace'), re.S)
        listed = yaml.safe_load(head[1]).get('configs') if head else None
        configs = {}
        for entry in listed or []:
            # one pattern, several, or several with a split each
            files = entry.get('data_files') or f'{entry.get("data_dir", ".")}/**'
            files = files if isinstance(files, list) else [files]
            splits = configs.setdefault(entry.get('config_name', 'default'), {})
            for file in files:
                named = file if isinstance(file, dict) else {'split': 'train', 'path': file}
                paths = named['path']
                splits.setdefault(named['split'], []).extend(paths if isinstance(paths, list) else [paths])
        return configs
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return {}


def _split_of(name):
    """The split that the path of a file names, '' for none: train_prefs-00000-of-00001, or a word such as train."""
    # latest.json is no test file, and values.json none for validation
    word = re.compile(r'(?<![a-z])(train|test|validation|(?:dev|valid|val)(?![a-z]))')
    found, shard = word.search(name.lower()), SHARD.search(name)
    if shard and (word.search(shard[1].lower()) or not found):
        return '' if shard[1] in ('data', 'part') else shard[1]
    return found[1] if found else ''


def has_test_part(path):
    """Whether some of a folder's files are for testing: else, and of a single file, a part is held out."""
    return len(data_files(path)) > 1 and any(name.startswith(HELD_OUT_NAMES) for name in folder_splits(path))


def local_files(path, split):
    """A file itself, or a folder's data files of this split, or of the one that serves for it; None: all of them."""
    splits = {'': data_files(path)} if split is None else folder_splits(path)
    if split in splits:
        return splits[split]

    # test_prefs may be test, or validation, or a part of what there is for training
    train, held_out = choose_splits(splits, None, path)
    return splits[train if held_out is None or split.startswith('train') else held_out]
