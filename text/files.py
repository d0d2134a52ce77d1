"""Find the files, folders and hub datasets that rows are read from. sources.py calls this; readers.py reads each file.

A local folder is read as it would be on the hub: its README names configs and splits, or else the names of its files do.
"""

import glob
import hashlib
import json
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from textwrap import shorten

from configurator import UserError
from runtime import hub
from runtime.files import file_hash, say_once
from runtime.values import looked_in
from text.readers import ENDINGS, FORMATS, HELP, Row, read_file, without_inner_nulls

# these files of a folder describe its data
NOT_DATA = {'dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'state.json'}
# names of a split for testing, the best first
HELD_OUT_NAMES = ('test', 'validation', 'valid', 'dev', 'val')
# the name that datasets gives a file of a split: train-00000-of-00002.parquet
SHARD = re.compile(r'([^/]+?)-\d{5}(?:-of-\d{5})?\.[^/]*$')
# the words of a path that name a split for datasets; a letter beside them makes other words: latest.json is no test file
WORD = re.compile(
    r'(?<![a-z])(train|training|test|testing|eval|evaluation|validation|dev|valid|val)(_sft|_prefs|_gen|_dpo|_rm)?(?![a-z])'
)
SPLIT_OF_WORD = {'training': 'train', 'testing': 'test', 'eval': 'test', 'evaluation': 'test',
                 'dev': 'validation', 'valid': 'validation', 'val': 'validation'}  # fmt: skip


def read_rows(hub_id, split, path, undivided=False, **options):
    """Yield the Rows of a split of local files, or if path is None of the hub dataset hub_id.

    path: a file, or a folder whose files of this split are read (undivided: all its files), or a list of files to read.
    options: what load_dataset gets for a hub dataset."""
    if path is None:
        yield from _read_hub(hub_id, split, options)
        return
    files = path
    if not isinstance(path, list):
        files = local_files(path, None if undivided else split)
    for file in files:
        yield from read_file(file)


def add_to_digest(digest, path):
    """Add the contents of a path's data files to a digest, and their names, which tell their splits. Raises UserError."""
    files = data_files(path)
    readme = os.path.join(path, 'README.md')
    if os.path.exists(readme):
        files.append(readme)
    for file in files:
        digest.update(os.path.relpath(file, path).encode())
        try:
            digest.update(bytes.fromhex(file_hash(file)))
        except OSError as error:
            raise UserError(f'cannot read {file}: {error.strerror}') from None


def content_hash(*parts) -> int:
    """Return a 64-bit hash of json-able values. It is the same in every process, unlike python's hash."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    # a text may have half a surrogate pair, which utf-8 refuses by itself
    digest = hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8)
    return int.from_bytes(digest.digest(), 'big')


# ---- configs and splits that the user names ----


def named_part(source):
    """Return (name, config, split) of a source 'NAME:config[split]'. config or split is None if the source does not name it.

    A hub id may have configs, and so may a folder (./mine:easy, with a slash). A file or pattern with brackets stays whole."""
    split = None
    in_brackets = re.fullmatch(r'(.+)\[([\w.+-]+)\]', source)
    is_there = os.path.exists(source) or glob.glob(os.path.expanduser(source))
    if in_brackets and not is_there:
        source, split = in_brackets.groups()
    # without a slash, what stands before the colon is a reader: hh:PATH
    name, _, config = source.partition(':')
    if config and '/' in name:
        is_hub_id = re.fullmatch(r'[\w.-]+/[\w.-]+:[\w.-]+', source)
        if is_hub_id or os.path.isdir(os.path.expanduser(name)):
            return name, config, split
    return source, None, split


def choose_splits(names, wanted, source):
    """Return (train, held_out) of the splits of a source: which to train on, and which to test on, or None.

    wanted: the split to train on if the user names it, else None. Raises UserError if it is not there, or if it is None and
    several splits could be meant."""
    train = wanted or 'train'
    if train not in names:
        # the only split that begins with train is meant, or the only split at all
        likely = [name for name in names if name.startswith('train')] or list(names)
        if wanted or len(likely) != 1:
            problem = f'no split {wanted!r}' if wanted else 'several splits'
            example = likely[0] if likely else 'SPLIT'
            name, _, _ = named_part(source)
            say_which = f"say which: --data='{name}[{example}]' ({HELP})"
            raise UserError(f'{name} has {problem}; there are {", ".join(names)}: {say_which}')
        train = likely[0]
    # train_prefs is tested on test_prefs; if no other split is for training, test will do, too
    held_out_names = [train.replace('train', name, 1) for name in HELD_OUT_NAMES]
    if sum(name.startswith('train') for name in names) == 1:
        held_out_names += HELD_OUT_NAMES
    for name in held_out_names:
        # a split without train in its name is no test of itself
        if name in names and name != train:
            return train, name
    return train, None


# ---- the hub ----


def _read_hub(hub_id, split, options):
    """Yield the Rows of a split of a hub dataset. options: of load_dataset; those that are None count as not given."""
    import datasets

    given = {name: value for name, value in options.items() if value is not None}
    try:
        rows = datasets.load_dataset(hub_id, split=split, **given, **_revision(hub_id))
    except Exception as error:  # no network, no such dataset, no such split: the library's own words say which
        raise UserError(f'cannot load {hub_id!r}, split {split!r}, from the hub: {_reason(error)}') from None
    for number, raw in enumerate(rows, 1):
        yield Row.of(without_inner_nulls(raw), f'{hub_id} [{split}], row {number}')


def hub_splits(hub_id, config=None):
    """Return the names of the splits of a hub dataset. Raises UserError if it cannot be asked, or has several configs.

    config: one of its configs; None: its only or default one."""
    import datasets

    options = {'config_name': config} if config else {}
    try:
        return datasets.get_dataset_split_names(hub_id, **options, **_revision(hub_id))
    except Exception as error:  # no network, no such dataset, no access, several configs
        hint = f"a config is named as in --data='{hub_id}:CONFIG'"
        raise UserError(f'cannot find {hub_id!r} on the hub: {_reason(error)} ({hint})') from None


@cache
def hub_commit(hub_id):
    """Return the commit at which this process reads a hub dataset, or None if the hub does not tell."""
    # no network, no such dataset: whoever reads the rows later says what is wrong
    with suppress(Exception):
        import huggingface_hub

        if hub.reachable():
            return huggingface_hub.HfApi().dataset_info(hub_id, timeout=10).sha
    return None


def _revision(hub_id):
    """Return the option of datasets that fixes the commit of a hub dataset: {} if the commit is not known."""
    # 'json' is no dataset of the hub, but the reader of datasets for json files anywhere
    commit = None if hub_id == 'json' else hub_commit(hub_id)
    return {'revision': commit} if commit else {}


def _reason(error):
    """Return an exception's words on one line; without words, its class."""
    return ' '.join(str(error).split())[:300] or type(error).__name__


# ---- folders ----


def data_files(path):
    """Return the data files of a path: those in a folder, those that a pattern fits, or the file itself.

    Raises UserError if there are none."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        inside = sorted(Path(path, name) for name in glob.glob('**/*', root_dir=path, recursive=True))
        found = [str(file) for file in inside if _is_data(file)]
        if not found:
            raise UserError(f'the folder {path} has no data file; they end in {", ".join(FORMATS)} ({HELP})')
        # beside other data, a .txt is a licence or the like
        other_than_txt = [file for file in found if '.txt' not in Path(file).suffixes]
        return other_than_txt or found
    # lexists: a link to a file that is gone is no pattern
    if not os.path.lexists(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UserError(f'there is no file or folder {path}{looked_in(path)}')
        return [file for match in matches for file in data_files(match)]
    # data are read more than once, and a pipe would wait for ever
    if not os.path.isfile(path):
        raise UserError(f'{path} is no file, but a pipe or a device: write its rows into a file first')
    return [path]


def _is_data(file):
    """Whether a Path is a data file: not one that describes data, nor a cache that `map` left in a saved dataset."""
    is_cache = file.name.startswith('cache-') and file.suffix == '.arrow'
    return file.name.endswith(ENDINGS) and file.name not in NOT_DATA and not is_cache and file.is_file()


def folder_splits(path, config=None):
    """Return {split: its files} of a folder or pattern. The folder's README decides, or else the names of the files.

    config: a config of the README; None: its only or default one. Raises UserError if that is not there, or if the README has
    several and none is named."""
    path = os.path.expanduser(path)
    configs = _configs(path)
    entry = {}
    if configs or config:
        entry = configs[_config_of(configs, config, path)]
    named_files = _named_files(path, entry)
    if named_files:
        return named_files
    # the README names files, and none is here: what is here may belong to the other configs, if there are any
    if 'data_files' in entry and len(configs) > 1:
        raise UserError(f'{path} has none of the files that its README names for the config {config!r}: fetch them')
    if 'data_dir' in entry:
        path = os.path.join(path, str(entry['data_dir']))
    return _splits_by_name(path)


def _configs(folder):
    """Return {name: entry} of the `configs:` in the head of a folder's README, or {} if there are none that can be read."""
    import huggingface_hub

    with suppress(Exception):  # no README, no head, or a head of another form
        listed = huggingface_hub.metadata_load(os.path.join(folder, 'README.md'))['configs']
        return {str(entry.get('config_name', 'default')): entry for entry in listed}
    return {}


def _config_of(configs, config, path):
    """Return the name of the config to read: `config`, or if that is None the default or the only one. Raises UserError."""
    if config in configs:
        return config
    if config is None:
        defaults = [name for name, entry in configs.items() if name == 'default' or entry.get('default')]
        meant = defaults or list(configs)
        if len(meant) == 1:
            return meant[0]
    problem = f'no config {config!r}' if config else 'several configs'
    names = ', '.join(configs) or 'none'
    raise UserError(f'{path} has {problem}; there are {names}: say which: --data={path}:CONFIG ({HELP})')


def _named_files(folder, entry):
    """Return {split: files} that the data_files of a README's config name; {} if there are none, or none of them is here.

    data_files: a pattern, or a list of patterns or of {'split', 'path'}, where path is a pattern or a list of patterns."""
    splits = {}
    for item in _as_list(entry.get('data_files') or []):
        # a pattern alone is of files for training
        named = item if isinstance(item, dict) else {'path': item}
        split = str(named.get('split', 'train'))
        for pattern in _as_list(named.get('path', [])):
            for name in sorted(glob.glob(str(pattern), root_dir=folder, recursive=True)):
                file = os.path.join(folder, name)
                # several patterns may fit one file, and fit files that are no data
                if _is_data(Path(file)) and file not in splits.get(split, []):
                    splits.setdefault(split, []).append(file)
    return splits


def _as_list(value):
    """Return a list as it is, and any other value as the only item of a list."""
    return value if isinstance(value, list) else [value]


def _splits_by_name(path):
    """Return {split: its files} of a folder or pattern, as the names of the files tell. All are 'train' if none tells.

    Beside a split for training, files whose name tells no split are not read, as in datasets; a note names them."""
    # DatasetDict.save_to_disk writes a folder for each split, and this file beside them
    is_saved = os.path.exists(os.path.join(path, 'dataset_dict.json'))
    # names are told from the folder on; of a pattern, from the folder before its first wildcard
    root = path if os.path.isdir(path) else os.path.dirname(re.split(r'[*?\[]', path)[0])
    splits, unnamed = {}, []
    for file in data_files(path):
        name = os.path.relpath(file, root or '.')
        split = name.partition('/')[0] if is_saved else _split_of(name)
        if split:
            splits.setdefault(split, []).append(file)
        else:
            unnamed.append(file)
    has_train = any(split.startswith('train') for split in splits)
    if unnamed and has_train:
        # once, though a folder is looked at several times
        listed = shorten(', '.join(unnamed), 300)
        say_once(f'note: not read, since other files are named train: {listed}')
    elif unnamed:
        splits = {'train': unnamed, **splits}
    return splits


def _split_of(name):
    """Return the split that the path of a file tells, as datasets reads it, or '' if it tells none.

    Of train_x-00000-of-00002, and in a folder data of any x-00000-of-00002, it is the text before the number. Otherwise it is
    a word of the path, such as train."""
    word = WORD.search(name.lower())
    shard = SHARD.search(name)
    if shard:
        is_told_by_folder = not word and '/data/' in f'/{name}'
        if is_told_by_folder or WORD.search(shard[1].lower()):
            # data-00000-of-00002 and part-00000 are common names of files, and no splits
            return '' if shard[1] in ('data', 'part') else shard[1]
    if not word:
        return ''
    split, purpose = word.groups(default='')
    return SPLIT_OF_WORD.get(split, split) + purpose


def has_test_part(path):
    """Whether some of the files of a folder are for testing; of a single file, none is."""
    # a single file is divided, even if it is called test.jsonl
    return len(data_files(path)) > 1 and any(name.startswith(HELD_OUT_NAMES) for name in folder_splits(path))


def local_files(path, split):
    """Return the data files of a path that serve for a split: those of its name, or else those that choose_splits takes.

    split None: all files. If nothing is for testing, the files for training serve, of which the caller holds out a part."""
    if split is None:
        return data_files(path)
    splits = folder_splits(path)
    if split in splits:
        return splits[split]
    # test may be meant where the folder says validation, or train where it says train_sft
    train, held_out = choose_splits(splits, wanted=None, source=path)
    if held_out is None or split.startswith('train'):
        return splits[train]
    return splits[held_out]
