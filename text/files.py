"""Find the files or the hub dataset to read rows from. sources.py calls this; readers.py reads each file."""

import glob
import hashlib
import json
import logging
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten

from configurator import UserError
from runtime import hub
from runtime.files import file_hash, say_once
from runtime.values import looked_in
from text.readers import ENDINGS, FORMATS, HELP, Row, read_file, without_inner_nulls

# a README without metadata is no reason to warn
logging.getLogger('huggingface_hub.repocard').setLevel(logging.ERROR)
# metadata files, which have the endings of data files
NOT_DATA = {'dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'state.json'}
# names of test splits, best first
HELD_OUT_NAMES = ('test', 'validation', 'valid', 'dev', 'val')


def read_rows(hub_id, split, path, undivided=False, **options):
    """Yield the Rows of a split of local files, or of the hub dataset hub_id if path is None. Raises UserError.

    path: a file, a folder (undivided: read all its splits), or a list of files. options: arguments of load_dataset."""
    if path is not None:
        wanted = None if undivided else split
        files = path if isinstance(path, list) else local_files(path, wanted)
        for file in files:
            yield from read_file(file)
        return
    # `datasets` reads a single file by its format, json: the file's address says more
    name = options['data_files'] if hub_id == 'json' else hub_id
    given = {name: value for name, value in options.items() if value is not None}
    try:
        import datasets

        rows = datasets.load_dataset(hub_id, split=split, **given, **_revision(hub_id))
    except Exception as error:  # no such package, no network, no such dataset or split, ...
        raise UserError(f'cannot load {name!r}, split {split!r}, from the hub: {hub.first_line(error)}') from None
    for number, raw in enumerate(rows, 1):
        yield Row.of(without_inner_nulls(raw), f'{name} [{split}], row {number}')


def add_to_digest(digest, path):
    """Update a hashlib digest with the names and contents of a path's data files and README. Raises UserError."""
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
    """Return a 64-bit hash of JSON-serializable values, which unlike hash() is the same in every process."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    # surrogatepass: texts may contain lone surrogates
    digest = hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8)
    return int.from_bytes(digest.digest(), 'big')


def named_part(source):
    """Parse a source 'NAME:config[split]' into (name, config or None, split or None).

    Only hub ids and folders with a slash (./mine:easy) have configs; in hh:PATH, hh is a reader, and the source is returned whole.
    Brackets are no split if the source as it stands is a path, or a pattern that matches files."""
    split = None
    in_brackets = re.fullmatch(r'(.+)\[([\w.+-]+)\]', source)
    if in_brackets and not os.path.exists(source) and not glob.glob(os.path.expanduser(source)):
        source, split = in_brackets.groups()
    name, _, config = source.partition(':')
    if config and '/' in name:
        is_hub_id = re.fullmatch(r'[\w.-]+/[\w.-]+:[\w.-]+', source)
        if is_hub_id or os.path.isdir(os.path.expanduser(name)):
            return name, config, split
    return source, None, split


def choose_splits(names, wanted, source):
    """Choose (train split, test split or None) from the names of a source's splits.

    wanted: the train split named by the user, or None. Raises UserError if it is missing or the choice is ambiguous."""
    train = wanted or 'train'
    if train not in names:
        # fall back to the only split that begins with train, or to the only split
        likely = [name for name in names if name.startswith('train')] or list(names)
        if wanted or len(likely) != 1:
            problem = f'no split {wanted!r}' if wanted else 'several splits'
            example = likely[0] if likely else 'SPLIT'
            name, _, _ = named_part(source)
            say_which = f"say which: --data='{name}[{example}]' ({HELP})"
            raise UserError(f'{name} has {problem}; there are {", ".join(names)}: {say_which}')
        train = likely[0]
    # train_prefs is tested on test_prefs; with a single train split, plain test names are candidates, too
    held_out_names = [train.replace('train', name, 1) for name in HELD_OUT_NAMES]
    if sum(name.startswith('train') for name in names) == 1:
        held_out_names += HELD_OUT_NAMES
    # name != train: a split must not be its own test split
    held_out = next((name for name in held_out_names if name in names and name != train), None)
    return train, held_out


def hub_splits(hub_id, config=None):
    """Return the split names of a hub dataset. config None: its default or only config. Raises UserError."""
    options = {'config_name': config} if config else {}
    try:
        import datasets

        return datasets.get_dataset_split_names(hub_id, **options, **_revision(hub_id))
    except Exception as error:  # no such package, no network, no such dataset, several configs, ...
        hint = f"a config is named as in --data='{hub_id}:CONFIG'"
        raise UserError(f'cannot find {hub_id!r} on the hub: {hub.first_line(error)} ({hint})') from None


@cache
def hub_commit(hub_id):
    """Return the commit of a hub dataset, or None if unknown. Cached: all reads of a process use the same commit."""
    # ignore errors here: reading the rows will report them
    with suppress(Exception):
        import huggingface_hub

        if hub.reachable():
            return huggingface_hub.HfApi().dataset_info(hub_id, timeout=10).sha
    return None


def _revision(hub_id):
    """Return {'revision': commit} to pin a hub dataset to its commit, or {} if that is unknown."""
    # 'json' is not a dataset, but the loader of `datasets` for JSON files
    commit = None if hub_id == 'json' else hub_commit(hub_id)
    return {'revision': commit} if commit else {}


def data_files(path):
    """Return the data files of a file, folder or glob pattern. Raises UserError if there are none."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        inside = sorted(Path(path, name) for name in glob.glob('**/*', root_dir=path, recursive=True))
        found = [str(file) for file in inside if _is_data_file(file)]
        if not found:
            raise UserError(f'the folder {path} has no data file; they end in {", ".join(FORMATS)} ({HELP})')
        # next to other data files, a .txt is a licence or the like
        return [file for file in found if '.txt' not in Path(file).suffixes] or found
    # lexists: a broken link is not a pattern
    if not os.path.lexists(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UserError(f'there is no file or folder {path}{looked_in(path)}')
        return [file for match in matches for file in data_files(match)]
    # data files are read several times, and a second read of a pipe would block
    if not os.path.isfile(path):
        raise UserError(f'{path} is no file, but a pipe or a device: write its rows into a file first')
    return [path]


def _is_data_file(file):
    """Whether a Path is a data file, and not metadata or a cache file that `datasets.map` left in a folder."""
    is_cache = file.name.startswith('cache-') and file.suffix == '.arrow'
    return file.name.endswith(ENDINGS) and file.name not in NOT_DATA and not is_cache and file.is_file()


def folder_splits(path, config=None):
    """Return {split: files} of a folder, as `datasets` finds them: by its README, or else by the names of files and folders.

    A file, or what a pattern matches, is 'train'. config: a config in the README; None: its default or only one.
    Raises UserError if there are none, or `datasets` cannot tell, such as between several configs."""
    path = os.path.expanduser(path)
    found = data_files(path)
    if not os.path.isdir(path):
        tests = [file for file in found if any(name in os.path.basename(file) for name in HELD_OUT_NAMES)]
        if 0 < len(tests) < len(found):
            say_once(f'note: what the pattern {path} matches is one part, with {tests[0]}: a folder has its splits')
        return {'train': found}
    splits = {}
    # DatasetDict.save_to_disk writes a folder per split and this file; `datasets` reads such a folder by other means
    if os.path.exists(os.path.join(path, 'dataset_dict.json')) and not config:
        for file in found:
            splits.setdefault(Path(file).relative_to(path).parts[0], []).append(file)
        return splits
    try:
        import datasets

        # its cache is for the rows, which are not read here
        with TemporaryDirectory() as scratch:
            builder = datasets.load_dataset_builder(os.path.abspath(path), config, cache_dir=scratch)
    except Exception as error:  # no such package, no valid README, several configs, splits of different kinds, ...
        problem = f'cannot tell the splits of the folder {path} by its README or its files: {hub.first_line(error)}'
        raise UserError(f'{problem} (mend that, or name a config, --data={path}:CONFIG, or a file)') from None
    for split, files in builder.config.data_files.items():
        # theirs are absolute, with symbolic links resolved
        names = [str(Path(path, os.path.relpath(file, os.path.realpath(path)))) for file in files]
        if data := [name for name in dict.fromkeys(names) if name in found]:
            splits[str(split)] = data
    unread = sorted(set(found).difference(*splits.values()))
    listed = shorten(', '.join(unread), 300)
    if not splits:
        raise UserError(f'{path} lacks the files that `datasets` would read: fetch them, or name one of {listed}')
    if unread and not config:
        # a folder is opened several times, so print the note once
        say_once(f'note: not read, since `datasets` takes other files by their names or kind: {listed}')
    return splits


def has_test_part(path):
    """Whether a folder has a test split. A single file has none, even if it is called test.jsonl."""
    return len(data_files(path)) > 1 and any(name.startswith(HELD_OUT_NAMES) for name in folder_splits(path))


def local_files(path, split):
    """Return a path's data files for a split, or all files if split is None."""
    if split is None:
        return data_files(path)
    splits = folder_splits(path)
    if split in splits:
        return splits[split]
    # the split may be called validation instead of test, or train_sft instead of train
    train, held_out = choose_splits(splits, wanted=None, source=path)
    # without a test split, the caller holds out a part of the train files
    is_train = held_out is None or split.startswith('train')
    return splits[train if is_train else held_out]
