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
from pathlib import Path
from textwrap import shorten

from configurator import UserError
from runtime import hub
from runtime.cache import path_of
from runtime.files import replace_text, say_once
from runtime.values import looked_in
from text.messages import as_list

FORMATS = '.jsonl .ndjson .json .parquet .csv .tsv .arrow .txt'.split()
# suffix of compressed files -> function that opens them, or pyarrow's name of the compression: Python < 3.14 has no zstd, and
# its bz2 leaves out what follows a damaged stream of several, as pbzip2 writes them, without an error
PACKED = {'.gz': gzip.open, '.bz2': 'bz2', '.xz': lzma.open, '.zst': 'zstd'}
# all endings of data files; .parquet and .arrow files have compression of their own
PACKABLE = [name for name in FORMATS if name not in ('.parquet', '.arrow')]
ENDINGS = (*FORMATS, *(name + suffix for name in PACKABLE for suffix in PACKED))
# words that tell files of better answers from those of worse ones
SIDE = re.compile('(?<![a-z])(chosen|rejected|accepted|(dis)?preferred|winner|loser|good|bad|better|worse|(in)?correct|pos|neg|'
                  'positive|negative|(un)?safe|(un)?desirable)(?![a-z])', re.IGNORECASE)  # fmt: skip
HELP = 'see README, "Data of your own"'  # the end of messages to users
# words in a path that tell its split, as in `datasets`; not within longer words: latest.json is no test file
SPLIT_WORD = re.compile(
    r'(?<![a-z])(train|training|test|testing|eval|evaluation|validation|dev|valid|val)(_sft|_prefs|_gen|_dpo|_rm)?(?![a-z])'
)
SAME_SPLIT = {'training': 'train', 'testing': 'test', 'eval': 'test', 'evaluation': 'test',
              'dev': 'validation', 'valid': 'validation', 'val': 'validation'}  # fmt: skip


def content_hash(*parts):
    """Return a 64-bit hash of JSON-serializable values, which unlike hash() is the same in every process."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    # surrogatepass: texts may contain lone surrogates
    digest = hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8)
    return int.from_bytes(digest.digest(), 'big')


def named_part(source):
    """Parse a source into (name, config, split): 'owner/name:easy[test]' -> ('owner/name', 'easy', 'test'). What is missing is None.

    Only hub ids and folders with a slash (./mine:easy) have configs: 'hh:PATH' -> ('hh:PATH', None, None), as hh is a reader."""
    split = None
    in_brackets = re.fullmatch(r'(.+)\[([\w.+-]+)\]', source)
    # brackets may belong to a path, or to a pattern that matches files
    if in_brackets and not os.path.exists(source) and not glob.glob(os.path.expanduser(source)):
        source, split = in_brackets.groups()
    name, _, config = source.partition(':')
    if config and '/' in name:
        is_hub_id = re.fullmatch(r'[\w.-]+/[\w.-]+:[\w.-]+', source)
        if is_hub_id or os.path.isdir(os.path.expanduser(name)):
            return name, config, split
    return source, None, split


def choose_splits(names, wanted, source):
    """Return (train split, test split or None), chosen from the names of a source's splits. Raises UserError if it cannot.

    wanted: the train split that the user named in brackets, or None. source: the data's name for messages, without brackets."""
    train = wanted or 'train'
    if train not in names:
        # fall back to the only split that begins with train, or to the only split
        likely = [name for name in names if name.startswith('train')] or list(names)
        if wanted or len(likely) != 1:
            problem = f'no split {wanted!r}' if wanted else 'several splits'
            say_which = f"say which: --data='{source}[{likely[0]}]' ({HELP})"
            raise UserError(f'{source} has {problem}; there are {", ".join(names)}: {say_which}')
        [train] = likely
    # of train_prefs: test_prefs, else validation_prefs, ...
    held_out_names = 'test validation valid dev val'.split()
    test_names = [train.replace('train', name, 1) for name in held_out_names]
    # if no other split is for training, plain names will do, too
    if sum(name.startswith('train') for name in names) == 1:
        test_names += held_out_names
    # name != train: a split without 'train' in its name, such as the only one, must not be its own test split
    test = next((name for name in test_names if name in names and name != train), None)
    return train, test


@cache
def hub_files(hub_id, **options):
    """Return ({split: names of its files} of a hub dataset, their commit); without the hub, as they were seen last.

    options: arguments of load_dataset, such as name: the config, or None for the default or only one. Raises UserError."""
    commit = hub_commit(hub_id)
    # the files of a commit never change, so use what an earlier run remembered, if it did
    with suppress(OSError, ValueError, UserError):
        return json.loads(_memory_file(hub_id, commit, options).read_text()), commit
    if not hub.reachable():
        raise UserError(f'the hub cannot be reached, and {hub_id!r} was not read here before: read it once with it')
    import datasets

    try:
        # hf://: not a folder of that name here
        found = datasets.load_dataset_builder(f'hf://datasets/{hub_id}', revision=commit, **options).config.data_files
        splits = {str(split): [] for split in found}
        for split, addresses in found.items():
            for address in addresses:
                # hf://datasets/OWNER/NAME@COMMIT/FILE: this gives a commit that was unknown so far
                _, _, place = address.partition('@')
                commit, _, name = place.partition('/')
                splits[str(split)].append(name)
    except Exception as error:  # no such dataset, several configs, ...
        hint = f"a config is named as in --data='{hub_id}:CONFIG'"
        raise UserError(f'cannot read {hub_id!r} on the hub: {hub.first_line(error)} ({hint})') from None
    # for runs without the hub: the files of this commit, and which commit was read last
    _remember(json.dumps(splits), hub_id, commit, options)
    _remember(commit, hub_id)
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
        if not hub.reachable():
            # the commit that hub_files read last
            return _memory_file(hub_id).read_text()
        import huggingface_hub

        return huggingface_hub.HfApi().dataset_info(hub_id, timeout=10).sha
    return None


def _memory_file(*question):
    """Return the path of the cache file that remembers the hub's answer to a question, which is any JSON values."""
    return path_of('hub', f'{content_hash(*question):016x}').with_suffix('.txt')


def _remember(text, *question):
    """Write the hub's answer to a question into the cache, for runs without the hub. If that fails, nothing is remembered."""
    with suppress(OSError, UserError):
        file = _memory_file(*question)
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
    if not os.path.exists(path):
        raise UserError(f'{path} is a link to nothing: mend it')
    # data files are read several times, and a second read of a pipe would block
    if not os.path.isfile(path):
        raise UserError(f'{path} is no file, but a pipe or a device: write its rows into a file first')
    return [path]


def _files_below(folder):
    """Return the Paths of all files and folders below a folder, except hidden ones such as .git. Links are followed."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        # a folder counts once, whatever links to it, so that a link to a folder above is no endless loop
        real_place = os.path.realpath(place)
        if real_place in seen:
            folders.clear()
            continue
        seen.add(real_place)
        visible = [Path(place, name) for name in (*folders, *names) if not name.startswith('.')]
        # os.walk visits what `folders` holds: links last, so that files get the name that they have without a link
        folders[:] = [path.name for path in sorted(visible, key=Path.is_symlink) if path.name in folders]
        found += visible
    # a snapshot in the hub's cache has links to the files beside the snapshots
    root = os.path.realpath(folder).partition('/snapshots/')[0]
    real_paths = {path: Path(os.path.realpath(path)) for path in found if path.name.lower().endswith(ENDINGS)}
    strange = []
    for path, real in real_paths.items():
        is_inside = path.exists() and real.is_relative_to(root)
        if not is_inside:
            strange.append(path)
    if strange:
        first = strange[0]
        links = f'links to nothing, which are left out, or out of the folder {folder} ({len(strange)})'
        say_once(f'note: {links}: {first} to {real_paths[first]}')
    return found


def _is_data_file(file):
    """Return whether a Path is a data file, and not metadata or a cache file that `datasets.map` left in a folder."""
    is_metadata = file.name in ('dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'state.json')
    is_cache = file.name.startswith('cache-') and file.suffix == '.arrow'
    return file.name.lower().endswith(ENDINGS) and not is_metadata and not is_cache and file.is_file()


def folder_splits(path, config=None):
    """Return {split: files} of a file, folder or pattern, from the folder's README, or else from the file names.

    config: the name of a config in the README; None: its default or only one. Raises UserError if it is missing or ambiguous."""
    path = os.path.expanduser(path)
    configs = _readme_configs(path)
    config = _choose_config(configs, config, path)
    # without a config {}, which names no files
    fields = configs.get(config, {})
    if named_files := _named_files(path, fields):
        return named_files
    if 'data_files' in fields:
        missing = f'{path} has none of the files that its README names for the config {config!r}'
        # the files present may belong to other configs
        if len(configs) > 1:
            raise UserError(f'{missing}: fetch them')
        say_once(f'note: {missing}: files count by their names')
    if 'data_dir' in fields:
        _check_inside(path, str(fields['data_dir']))
        path = os.path.join(path, str(fields['data_dir']))
    return _splits_by_name(path)


def _readme_configs(folder):
    """Return {config name: its fields} from the YAML header of a folder's README, or {} without a (readable) one."""
    import huggingface_hub

    readme = os.path.join(folder, 'README.md')
    if not os.path.exists(readme):
        return {}
    try:
        configs = (huggingface_hub.metadata_load(readme) or {}).get('configs', [])
        return {str(fields.get('config_name', 'default')): fields for fields in configs}
    except Exception as error:  # no YAML, or not as it should be
        say_once(f'note: the header of {readme} cannot be read ({hub.first_line(error)}): files count by their names')
        return {}


def _choose_config(configs, wanted, path):
    """Return the name of the wanted config, else of the default or only one, else (without any) None. Raises UserError."""
    if not configs and not wanted:
        return None
    defaults = [name for name, fields in configs.items() if name == 'default' or fields.get('default')]
    candidates = [wanted] if wanted else defaults or list(configs)
    if len(candidates) != 1 or candidates[0] not in configs:
        problem = f'no config {wanted!r}' if wanted else 'several configs'
        names = ', '.join(configs) or 'none'
        raise UserError(f'{path} has {problem}; there are {names}: say which: --data={path}:CONFIG ({HELP})')
    return candidates[0]


def _named_files(folder, fields):
    """Return {split: existing files} that the fields of a README's config name in data_files."""
    splits = {}
    # data_files: a glob pattern, or a list of patterns or of dicts {'split': name, 'path': pattern or list of patterns}
    for item in as_list(fields.get('data_files') or []):
        named = item if isinstance(item, dict) else {'path': item}
        split = str(named.get('split', 'train'))
        for pattern in as_list(named.get('path', [])):
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
    """Return {split: files} from the file names of a file, folder or pattern; a name that tells no split means 'train'."""
    # DatasetDict.save_to_disk writes a folder per split and this file
    is_saved = os.path.exists(os.path.join(path, 'dataset_dict.json'))
    # folders above do not tell a split: take names below the folder, or below that before the first wildcard of a pattern
    root = path if os.path.isdir(path) else os.path.dirname(re.split(r'[*?\[]', path)[0])
    splits = {}
    for file in data_files(path):
        name = os.path.relpath(file, root or '.')
        split = name.partition('/')[0] if is_saved else _split_of(name)
        splits.setdefault(split, []).append(file)
    # '': the name tells no split
    unnamed = splits.pop('', [])
    if unnamed and any(split.startswith('train') for split in splits):
        # leave them out, as `datasets` does; a folder is scanned several times, so print the note once
        listed = shorten(', '.join(unnamed), 300)
        say_once(f'note: not read, since other files are named train: {listed}')
    elif unnamed:
        splits = {'train': unnamed, **splits}
    # files of several formats may have the same rows twice
    for split, files in splits.items():
        formats = {format_of(file) for file in files}.intersection(FORMATS)
        if len(formats) > 1:
            twice = f'{split} is read from {" and ".join(sorted(formats))} files in {path}'
            say_once(f'note: {twice}: if they hold the same rows, name those of one format')
    return splits


def check_no_sides(names):
    """Raise UserError if two files of a source are called as better and worse answers are: chosen.jsonl and rejected.jsonl."""
    sides = {}  # name without such words -> the first name
    for name in names:
        other = sides.setdefault(SIDE.sub('', name), name)
        if other != name:
            raise UserError(f'{other} and {name} may be two sides of pairs: make pairs, or name one, or A+B ({HELP})')


def format_of(file):
    """Return the last ending of a file's name, without that of a compression: 'a.JSONL.gz' -> '.jsonl'."""
    path = Path(file.lower())
    name = path.stem if path.suffix in PACKED else path.name
    return '.' + name.rpartition('.')[2]


def _split_of(name):
    """Return the split that a relative file path tells by the rules of `datasets`: 'my.eval.json' -> 'test', 'latest.json' -> '',
    'test_sft-00000-of-00002.parquet' -> 'test_sft', 'data/easy-00000-of-00001.parquet' -> 'easy'."""
    word = SPLIT_WORD.search(name.lower())
    # the files of a large dataset are numbered
    numbered = re.search(r'([^/]+?)-\d{5}(?:-of-\d{5})?\.[^/]*$', name)
    if numbered:
        before_number = numbered[1]
        # train_x tells a split that is called so
        if SPLIT_WORD.search(before_number.lower()):
            return before_number
        # in a folder `data` any name does, except those of data-00000-of-00002 and part-00000, which many programs write
        if not word and '/data/' in f'/{name}':
            return '' if before_number in ('data', 'part') else before_number
    if not word:
        return ''
    split, suffix = word.groups(default='')  # such as 'eval' and '_sft'
    return SAME_SPLIT.get(split, split) + suffix


def local_files(path, split):
    """Return the files of a path for a split, such as 'train' or 'test'. Without a test split, 'test' gives those of training."""
    splits = folder_splits(path)
    if split in splits:
        return splits[split]
    # it may have another name here: validation instead of test, or train_sft instead of train
    train, test = choose_splits(splits, wanted=None, source=path)
    is_test = not split.startswith('train')
    return splits[test if is_test and test else train]
