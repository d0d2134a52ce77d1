"""The model card: README.md beside the weights, from what the run has written down. For people, and for the hub (hf upload)."""

import json
import re
from pathlib import Path

import yaml

from log import say, writing

HUB_ID = re.compile(r'[\w.-]+/[\w.-]+')


def write(out_dir, folder=None):
    """README.md of a model folder (None: out_dir/model). What it needs may be damaged: then a note, for the model matters more."""
    try:
        text = _text(Path(out_dir))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        say(f'note: no model card, for {out_dir} has not what it takes: {type(error).__name__}: {error}')
        return
    file = Path(folder or Path(out_dir) / 'model') / 'README.md'
    with writing(file):
        file.write_text(text)


def _text(out_dir):
    """Base model, data, command, commit, options, the last evaluation. No path of this machine."""
    record = json.loads((out_dir / 'config.json').read_text())
    options = record['config']
    base, script = str(options.get('model')), Path(record['command'][0]).name
    loss = options.get('loss') or script.removesuffix('.py')
    meta = {'library_name': 'transformers', 'tags': ['nanopref', loss]}
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        meta['base_model'] = base
    rows = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
    last = next((row for row in reversed(rows) if row['split'] == 'eval'), {})
    parts = [f'---\n{yaml.safe_dump(meta, sort_keys=True)}---\n', f'# {out_dir.resolve().name}\n']
    parts.append(
        f'`{base}` after {rows[-1]["counters/examples"]:,} examples of `{options.get("data")}` with the loss `{loss}`, by nanopref.\n'
    )
    parts.append('```sh\npython ' + ' '.join(record['command']) + '\n```\n')
    versions = ', '.join(f'{name} {version}' for name, version in record['versions'].items())
    parts.append(f'Commit {record["commit"] or "unknown"}; {versions}.\n')
    if last:
        parts.append('Held-out examples, after training:\n\n| metric | value |\n|---|---|')
        parts.append('\n'.join(f'| {k} | {v:.4g} |' for k, v in last.items() if isinstance(v, float)) + '\n')
    parts.append('Options:\n\n```python')
    parts.append('\n'.join(f'{k} = {v!r}' for k, v in options.items()) + '\n```\n')
    return _without_folders('\n'.join(parts))


def _without_folders(text):
    """The text with absolute paths, and those that leave the folder, cut to their last name."""
    return re.sub(r'(?<![\w./])(?:~|/|\.\./)[^\s\'"=:+|`]*/(?=[^\s/])', '', text)
