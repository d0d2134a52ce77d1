"""Find the files, or the split of a hub dataset, that a source of rows means. readers.py reads them."""

import glob
import gzip
import hashlib
import json
import lzma
import os
import re
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from textwrap import shorten

from configurator import UserError
from runtime import hub
from runtime.cache import path_of
from runtime.files import replace_text, say_once
from runtime.values import looked_in

FORMATS = ('.jsonl', '.ndjson', '.json', '.parquet', '.csv', '.tsv', '.arrow', '.txt')
# suffix of compressed files -> function that opens them, or pyarrow's name of the compression: Python < 3.14 has no zstd, and of
# a .bz2 file that pbzip2 has written in several streams its bz2 leaves out what follows a damaged one, without an error
PACKED = {'.gz': gzip.open, '.bz2': 'bz2', '.xz': lzma.open, '.zst': 'zstd'}
# all endings of data files; .parquet and .arrow files have compression of their own
ENDINGS = (*FORMATS, *(name + suffix for name in FORMATS if name not in ('.parquet', '.arrow') for suffix in PACKED))
# the end of messages to users
HELP = 'see README, "Data of your own"'
# words in a path that tell its split, as in `datasets`; not within longer words: latest.json is no test file
SPLIT_WORD = re.compile(
    r'(?<![a-z])(train|training|test|testing|eval|evaluation|validation|dev|valid|val)(_sft|_prefs|_gen|_dpo|_rm)?(?![a-z])'
)
SAME_SPLIT = {'training': 'train', 'testing': 'test', 'eval': 'test', 'evaluation': 'test',
              'dev': 'validation', 'valid': 'validation', 'val': 'validation'}  # fmt: skip


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
    """Choose (train split, test split or None) from the names of a source's splits. Raises UserError if it cannot.

    wanted: the train split named by the user, or None. source: its name for messages, without [split]."""
    train = wanted or 'train'
    if train not in names:
        # fall back to the only split that begins with train, or to the only split
        likely = [name for name in names if name.startswith('train')] or list(names)
        if wanted or len(likely) != 1:
            problem = f'no split {wanted!r}' if wanted else 'several splits'
            example = likely[0] if likely else 'SPLIT'
            say_which = f"say which: --data='{source}[{example}]' ({HELP})"
            raise UserError(f'{source} has {problem}; there are {", ".join(names)}: {say_which}')
        train = likely[0]
    # train_prefs is tested on test_prefs
    held_out_names = ['test', 'validation', 'valid', 'dev', 'val']
    test_names = [train.replace('train', name, 1) for name in held_out_names]
    # the only train split is tested on any of them
    if sum(name.startswith('train') for name in names) == 1:
        test_names += held_out_names
    # name != train: a split must not be its own test split
    test = next((name for name in test_names if name in names and name != train), None)
    return train, test


@cache
def hub_files(hub_id, **options):
    """Return ({split: names of its files} of a hub dataset, their commit). Offline: as they were seen last. Raises UserError.

    options: those of load_dataset that say which part is meant, such as name, its config; if that is None, the default or only one."""
    commit = hub_commit(hub_id)
    # what an earlier run noted, for a commit does not change
    with suppress(OSError, ValueError, UserError):
        return json.loads(_note(hub_id, commit or 'unknown', options).read_text()), commit
    if not hub.reachable():
        raise UserError(f'the hub cannot be reached, and {hub_id!r} was not read here before: read it once with it')
    import datasets

    try:
        # hf://: not a folder of that name here
        address = f'hf://datasets/{hub_id}'
        found = datasets.load_dataset_builder(address, revision=commit, **options).config.data_files
        splits = {str(split): [] for split in found}
        for split, addresses in found.items():
            for address in addresses:
                # hf://datasets/OWNER/NAME@COMMIT/FILE
                _, _, place = address.partition('@')
                commit, _, name = place.partition('/')
                splits[str(split)].append(name)
    except Exception as error:  # no such dataset, several configs, ...
        hint = f"a config is named as in --data='{hub_id}:CONFIG'"
        raise UserError(f'cannot read {hub_id!r} on the hub: {hub.first_line(error)} ({hint})') from None
    _write_note(json.dumps(splits), hub_id, commit, options)
    # for runs without the hub: what was read last
    _write_note(commit, hub_id)
    return splits, commit


def hub_download(hub_id, commit, name):
    """Return the local path of a file of a hub dataset, downloaded if needed. commit None: the newest. Raises UserError."""
    import huggingface_hub

    hub.reachable()  # turns offline mode on if the hub does not answer
    try:
        return huggingface_hub.hf_hub_download(hub_id, name, repo_type='dataset', revision=commit)
    except Exception as error:
        reason = hub.refusal(error, f'datasets/{hub_id}')
        raise UserError(f'cannot read {name} of {hub_id!r} from the hub: {reason}') from None


@cache
def hub_commit(hub_id):
    """Return the commit of a hub dataset, or None if unknown. Cached: all reads of a process use the same commit."""
    # ignore errors here: reading the rows will report them
    with suppress(Exception):
        # the commit that hub_files read last
        if not hub.reachable():
            return _note(hub_id).read_text()
        import huggingface_hub

        return huggingface_hub.HfApi().dataset_info(hub_id, timeout=10).sha
    return None


def _note(*parts):
    """Return the path of a file that keeps what the hub has said, for runs without it."""
    return path_of('hub', f'{content_hash(*parts):016x}').with_suffix('.txt')


def _write_note(text, *parts):
    """Keep text, what the hub has said, for runs without the hub: in the file _note(*parts), if it can be written."""
    with suppress(OSError, UserError):
        file = _note(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)


def data_files(path):
    """Return the data files of a file, folder or glob pattern. Raises UserError if there are none."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = [str(file) for file in sorted(_files_below(path)) if _is_data_file(file)]
        if not found:
            raise UserError(f'the folder {path} has no data file; they end in {", ".join(FORMATS)} ({HELP})')
        # next to other data files, a .txt is a licence or the like
        return [file for file in found if '.txt' not in Path(file.lower()).suffixes] or found
    # lexists: a broken link is not a pattern
    if not os.path.lexists(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UserError(f'there is no file or folder {path}{looked_in(path)}')
        return [file for match in matches for file in data_files(match)]
    # data files are read several times, and a second read of a pipe would block
    if not os.path.exists(path):
        raise UserError(f'{path} is a link to nothing: mend it')
    if not os.path.isfile(path):
        raise UserError(f'{path} is no file, but a pipe or a device: write its rows into a file first')
    return [path]


def _files_below(folder):
    """Return the Paths of the files in a folder and below. Links are followed; what they lead to is taken once, so that none is a loop."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real_place = os.path.realpath(place)
        if real_place in seen:
            folders.clear()
            continue
        seen.add(real_place)
        # hidden ones, such as .git, are left alone; folders that are no links come first
        visible = [Path(place, name) for name in (*folders, *names) if not name.startswith('.')]
        folders[:] = [path.name for path in sorted(visible, key=Path.is_symlink) if path.name in folders]
        found += visible
    broken = [path for path in found if path.name.lower().endswith(ENDINGS) and not path.exists()]
    if broken:
        say_once(f'note: left out, since they are links to nothing ({len(broken)}) in {folder}: {broken[0]}')
    return found


def _is_data_file(file):
    """Whether a Path is a data file, and not metadata or a cache file that `datasets.map` left in a folder."""
    is_metadata = file.name in ('dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'state.json')
    is_cache = file.name.startswith('cache-') and file.suffix == '.arrow'
    return file.name.lower().endswith(ENDINGS) and not is_metadata and not is_cache and file.is_file()


def folder_splits(path, config=None):
    """Return {split: files} of a file, folder or pattern, from the folder's README, or else from the file names.

    config: a config in the README; None: its default or only one. Raises UserError if this config is missing or ambiguous."""
    path = os.path.expanduser(path)
    config, entry, has_others = _readme_entry(path, config)
    named_files = _named_files(path, entry)
    if named_files:
        return named_files
    if 'data_files' in entry:
        missing = f'{path} has none of the files that its README names for the config {config!r}'
        # the files present may belong to other configs
        if has_others:
            raise UserError(f'{missing}: fetch them')
        say_once(f'note: {missing}: files count by their names')
    if 'data_dir' in entry:
        _check_inside(path, str(entry['data_dir']))
        path = os.path.join(path, str(entry['data_dir']))
    return _splits_by_name(path)


def _readme_entry(path, config):
    """Return (config's name, its entry in the README of a folder, whether there are other configs); {} without a README.

    config: the wanted name; None: the default or only one. Raises UserError if it is missing or ambiguous."""
    import huggingface_hub

    configs = {}  # config name -> its entry
    readme = os.path.join(path, 'README.md')
    try:
        listed = (huggingface_hub.metadata_load(readme) or {}).get('configs', []) if os.path.exists(readme) else []
        configs = {str(item.get('config_name', 'default')): item for item in listed}
    except Exception as error:  # no YAML, or not as it should be
        say_once(f'note: the header of {readme} cannot be read ({hub.first_line(error)}): files count by their names')
    if not configs and not config:
        return None, {}, False
    # fall back to the default config, or to the only one
    defaults = [name for name, item in configs.items() if name == 'default' or item.get('default')]
    candidates = [config] if config else defaults or list(configs)
    if len(candidates) != 1 or candidates[0] not in configs:
        problem = f'no config {config!r}' if config else 'several configs'
        names = ', '.join(configs) or 'none'
        raise UserError(f'{path} has {problem}; there are {names}: say which: --data={path}:CONFIG ({HELP})')
    [name] = candidates
    return name, configs[name], len(configs) > 1


def _named_files(folder, entry):
    """Return {split: existing files} that a README's config entry names in data_files."""
    splits = {}
    # data_files: a glob pattern, or a list of patterns or of dicts {'split': name, 'path': pattern or list of patterns}
    items = entry.get('data_files') or []
    for item in items if isinstance(items, list) else [items]:
        named = item if isinstance(item, dict) else {'path': item}
        split = str(named.get('split', 'train'))
        patterns = named.get('path', [])
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            # str() of lists of lists, which YAML writes as aliases, would never end
            if not isinstance(pattern, str):
                continue
            _check_inside(folder, pattern)
            for name in sorted(glob.glob(pattern, root_dir=folder, recursive=True)):
                file = os.path.join(folder, name)
                if _is_data_file(Path(file)) and file not in splits.get(split, []):
                    splits.setdefault(split, []).append(file)
    return splits


def _check_inside(folder, pattern):
    """Raise UserError if a pattern in a folder's README means files elsewhere, which are not the data set's."""
    if os.path.isabs(pattern) or '..' in Path(pattern).parts:
        raise UserError(f'the README of {folder} names {pattern[:200]!r}, which is outside of the folder: mend it')


def _splits_by_name(path):
    """Return {split: files} from the file names of a file, folder or pattern; all are 'train' if no name tells a split."""
    # DatasetDict.save_to_disk writes a folder per split and this file
    is_saved = os.path.exists(os.path.join(path, 'dataset_dict.json'))
    # names are relative to the folder, or to the folder before the first wildcard of a pattern
    root = path
    if not os.path.isdir(path):
        before_wildcard = re.split(r'[*?\[]', path)[0]
        root = os.path.dirname(before_wildcard)
    splits = {}
    for file in data_files(path):
        name = os.path.relpath(file, root or '.')
        split = name.partition('/')[0] if is_saved else _split_of(name)
        splits.setdefault(split, []).append(file)
    # _split_of returns '' if a name tells no split
    unnamed = splits.pop('', [])
    if unnamed and any(split.startswith('train') for split in splits):
        # ignore them, as `datasets` does; a folder is scanned several times, so print the note once
        listed = shorten(', '.join(unnamed), 300)
        say_once(f'note: not read, since other files are named train: {listed}')
    elif unnamed:
        splits = {'train': unnamed, **splits}
    # if a split has files of several formats, the same rows may lie there twice
    for split, split_files in splits.items():
        formats = set()
        for file in split_files:
            name = Path(file).name.lower()
            # the first ending that is in the name: .jsonl stands before .json
            formats.update(islice((ending for ending in FORMATS if ending in name), 1))
        if len(formats) > 1:
            twice = f'{split} is read from {" and ".join(sorted(formats))} files in {path}'
            say_once(f'note: {twice}: if they hold the same rows, name those of one format')
    return splits


def _split_of(name):
    """Return the split that a relative file path tells by the rules of `datasets`, or ''.

    'test_sft-00000-of-00002.parquet' -> 'test_sft', 'data/easy-00000-of-00001.parquet' -> 'easy', 'my.eval.json' -> 'test',
    'latest.json' -> ''."""
    word = SPLIT_WORD.search(name.lower())
    # a shard, train-00000-of-00002.parquet, tells its split before the number
    shard = re.search(r'([^/]+?)-\d{5}(?:-of-\d{5})?\.[^/]*$', name)
    if shard:
        # shard[1]: the name before the number, any in a folder `data`, elsewhere one with a SPLIT_WORD, such as train_x
        is_in_data_folder = not word and '/data/' in f'/{name}'
        if is_in_data_folder or SPLIT_WORD.search(shard[1].lower()):
            # data-00000-of-00002 and part-00000 are common file names, not splits
            return '' if shard[1] in ('data', 'part') else shard[1]
    if not word:
        return ''
    split, suffix = word.groups(default='')  # such as 'eval' and '_sft'
    return SAME_SPLIT.get(split, split) + suffix


def local_files(path, split):
    """Return a path's data files for a split. Without a test split, 'test' gives those of training."""
    splits = folder_splits(path)
    if split in splits:
        return splits[split]
    # the split may be called validation instead of test, or train_sft instead of train: choose_splits finds them
    train, test = choose_splits(splits, wanted=None, source=path)
    is_train = test is None or split.startswith('train')
    return splits[train if is_train else test]
